"""The transformer: a small GPT, sampling from it, scoring with it, and its pretraining.

Read this file first. The model follows nanoGPT (Karpathy) with the changes that paid most at this
size: rotary positions (Su 2021), layer norm without weights, normalised queries and keys, squared
ReLU (So 2021), output projections that start at zero, and Muon (Jordan 2024) for the matrices.
Two things differ from nanoGPT because PPO needs them:

- forward() returns logits at *every* position: sampling looks at the last one, scoring at all;
- hidden() returns the final hidden states, which the reward model's classifier head reads.

On a first reading skip "several processes": a process alone works on all rows and sends nothing.

Precision, the same on every device. Weights are float32. Each model has one compute dtype,
bfloat16 where the machine is fast at it: the residual stream, matrix products and attention
are in it. Norms are computed in float32 within. Logits are rounded to it, then turned into float32,
in which everything after them is done (softmax, log-probabilities, losses).

Lines that depend on the device: attention() calls torch's fused kernel on CUDA; compute_dtype()
asks what the machine is good at; join_processes() gives each process a GPU of its own.

`pytest tests/test_gpt.py` checks it.
"""

import copy
import math
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
from data import PAD


@dataclass
class GPTConfig:
    vocab_size: int = 2048   # tokens
    block_size: int = 128    # the longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256


class Linear(nn.Linear):
    """A linear layer without bias that computes in its input's dtype; its weight stays float32."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class KVCache:
    """Keys and values of the tokens read so far, for each layer."""

    def __init__(self, config):
        self.layers = [None] * config.n_layer
        self.length = 0                             # tokens read so far

    def append(self, layer, k, v):
        """Add k, v (B,H,T,head) of the newest tokens; return all so far (B,H,S,head)."""
        if self.layers[layer]:
            # New tensors: a slice of a preallocated buffer would be copied by every product.
            old_k, old_v = self.layers[layer]
            k = torch.cat((old_k, k), dim=2)
            v = torch.cat((old_v, v), dim=2)
        self.layers[layer] = k, v
        return k, v


def norm(x):
    """Layer norm over features, no weights (Ba 2016): in x's dtype, computed in float32.

    torch's CPU kernel fuses it, which it does not do for the RMS norm of most newer models.
    """
    return F.layer_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary position: turns each pair (x1, x2) of features of x (B,H,T,head) by an angle.

    The angle grows with the position, so that q . k depends on the distance alone (Su 2021).
    """
    x1, x2 = x.chunk(2, dim=-1)
    y1 = x1 * cos - x2 * sin
    y2 = x1 * sin + x2 * cos
    return torch.cat((y1, y2), dim=-1)


def blocked_keys(queries, keys, device, pad=None):
    """Which of S keys each of the last T queries must not see: (T,S), or with padding (B,1,T,S).

    Blocked are the future and padding, pad (B,S). A padded query sees itself, or its softmax over
    nothing would be NaN; its output is never used.
    """
    key = torch.arange(keys, device=device)
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    future = key > query
    if pad is None:
        return future
    padding = pad[:, None, None, :]
    return future | (padding & (key != query))


def attention(q, k, v, blocked):
    """softmax(q k' / sqrt(head)) v: q (B,H,T,head), k and v (B,H,S,head) -> (B,H,T,head)."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~blocked)
    # On the CPU, at 64 tokens in bfloat16, the written-out products are faster than the kernel.
    q = q / math.sqrt(q.size(-1))
    scores = q @ k.transpose(-2, -1)                                # (B,H,T,S)
    weights = scores.masked_fill(blocked, -math.inf).softmax(-1)
    return weights @ v


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)
        self.proj = Linear(config.n_embd, config.n_embd)
        self.fc = Linear(config.n_embd, 4 * config.n_embd)
        self.out = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x, cos, sin, blocked, layer=0, cache=None):
        B, T, C = x.shape
        head = C // self.n_head
        qkv = self.qkv(norm(x)).view(B, T, 3, self.n_head, head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # each (B,H,T,head)
        # Norms of q and k bound the attention scores: training stays calm at high rates.
        q = rotate(norm(q), cos, sin)
        k = rotate(norm(k), cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)                        # (B,H,S,head)
        # Attention mixes positions ...
        y = attention(q, k, v, blocked)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + self.proj(y)
        # ... and the MLP works on each alone. relu(y)^2 learns faster than GELU here.
        y = F.relu(self.fc(norm(x)))
        return x + self.out(y * y)


class GPT(nn.Module):
    """GPT(config)(tokens): tokens (B,T) -> next-token logits (B,T,V), float32, at each position."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        # One frequency for each pair of features of a head, 1 to about 1/10,000 radians a token.
        half = config.n_embd // config.n_head // 2
        position = torch.arange(config.block_size)[:, None]
        angle = position * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos(), persistent=False)      # (block_size, head/2)
        self.register_buffer("sin", angle.sin(), persistent=False)
        nn.init.normal_(self.embed.weight)
        nn.init.zeros_(self.lm_head.weight)             # logits start uniform
        for block in self.blocks:
            nn.init.normal_(block.qkv.weight, std=config.n_embd ** -0.5)
            nn.init.normal_(block.fc.weight, std=config.n_embd ** -0.5)
            nn.init.zeros_(block.proj.weight)           # each layer starts as the identity
            nn.init.zeros_(block.out.weight)

    def hidden(self, tokens, cache=None, pad=None):
        """Final hidden states (B,T,C), in the compute dtype, of tokens (B,T).

        With a cache, tokens are those that follow what it has read. pad (B,S) is True where there
        is no token, of all that were read so far.
        """
        T = tokens.size(1)
        start = 0 if cache is None else cache.length
        end = start + T
        if end > self.config.block_size:        # there are no angles beyond
            raise ValueError(f"{end} tokens do not fit the context of {self.config.block_size}")
        blocked = blocked_keys(T, end, tokens.device, pad)
        cos = self.cos[start:end].to(self.dtype)
        sin = self.sin[start:end].to(self.dtype)
        # PAD has no row in the table; it borrows that of token 0, and its output is never used.
        x = norm(self.embed(tokens.clamp(min=0)).to(self.dtype))        # (B,T,C)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, blocked, layer, cache)
        if cache is not None:
            cache.length = end
        return norm(x)

    def logits(self, hidden):
        """Logits (B,T,V), float32, of hidden states (B,T,C)."""
        return self.lm_head(hidden).float()

    def forward(self, tokens, cache=None, pad=None):
        return self.logits(self.hidden(tokens, cache, pad))


# ---- sampling -----------------------------------------------------------------------------

class Generator(torch.Generator):
    """A random stream of its own, whose state goes into checkpoints."""

    def state_dict(self):
        return {"state": self.get_state()}

    def load_state_dict(self, state):
        self.set_state(state["state"])


def sample_tokens(logits, uniform, temperature=1.0, top_k=None):
    """One token for each row of logits (B,V), from softmax(logits / temperature): (B,).

    uniform (B,1): a random number from 0 to 1 for each row, float64, which decides. top_k keeps
    only the k likeliest tokens. It is for display: in rollouts the scorer would then score another
    distribution than was sampled. temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:             # the largest first: then no temperature above 0 overflows
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        top_k = min(top_k, logits.size(-1))
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    # Invert the cumulative distribution: one uniform number a row, where torch.multinomial
    # draws one for each token of the vocabulary, and is slower.
    # Summed in float64: a float32 sum of 2,048 probabilities would miss the rarest tokens.
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)            # (B,V)
    # The first token whose cdf exceeds u: one of probability 0 never does first. Where logits are
    # NaN none does, and clamp keeps the index legal until the NaN is reported.
    threshold = uniform * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, threshold, right=True)
    return drawn.squeeze(-1).clamp(max=cdf.size(-1) - 1)


def draw_uniform(length, batch, device, generator=None):
    """The random numbers (length,batch,1) that decide so many tokens."""
    return torch.rand(length, batch, 1, dtype=torch.float64, device=device, generator=generator)


def padding(tokens):
    """Where tokens (B,T) are PAD: (B,T) booleans, or None if nowhere: then attention is cheaper."""
    pad = tokens == PAD
    return pad if pad.any() else None


def cast_weights(model):
    """The model with its weights in its compute dtype: a copy, unless they are so already.

    Decoding reads every weight once for each token; this casts it once instead.
    """
    if model.embed.weight.dtype == model.dtype:
        return model
    return copy.deepcopy(model).to(model.dtype)


@torch.no_grad()
def generate(model, prompt, length, temperature=1.0, top_k=None, generator=None, uniform=None):
    """Continue prompts (B,T0), padded with PAD on the left, by length tokens: (B,T0+length).

    Reads each token once, through a key-value cache. generator: a torch.Generator on the
    model's device, so that sampling has its own stream of randomness; or uniform: the numbers
    that draw_uniform drew from it.
    """
    B, T0 = prompt.shape
    if uniform is None:
        uniform = draw_uniform(length, B, prompt.device, generator)
    model = cast_weights(model)
    cache = KVCache(model.config)
    pad = padding(prompt)
    # The first pass reads the prompt, each later one the token just drawn.
    new, tokens = prompt, [prompt]
    for t in range(length):
        so_far = pad if pad is None else F.pad(pad, (0, t))             # (B,T0+t)
        logits = model(new, cache, so_far)[:, -1]                       # (B,V)
        new = sample_tokens(logits, uniform[t], temperature, top_k)[:, None]
        tokens.append(new)
    return torch.cat(tokens, dim=1)


def cut_after(tokens, end):
    """Completions tokens (B,T) with everything after the first end token replaced by PAD.

    end None: texts have no end, and stay as they are.

    >>> cut_after(torch.tensor([[5, 0, 7, 0], [5, 6, 7, 8]]), 0)
    tensor([[ 5,  0, -1, -1],
            [ 5,  6,  7,  8]])
    """
    if end is None:
        return tokens
    is_end = tokens == end
    ended_before = is_end.cumsum(1) - is_end.long() > 0
    return tokens.masked_fill(ended_before, PAD)


@torch.no_grad()
def sample_completions(model, prompts, length, generator, end=None, batch=512):
    """A completion (T = length tokens) of each of prompts (N,T0), without the prompt: (N,T).

    Drawn from the whole softmax at temperature 1, so that what is scored is what was sampled.
    """
    parts = []
    for part in prompts.split(batch):
        # The numbers of all rows: then it does not matter how many processes share them.
        uniform = draw_uniform(length, len(part), part.device, generator)
        rows = share(len(part))
        tokens = generate(model, part[rows], length, uniform=uniform[:, rows])
        parts.append(gather(tokens, len(part)))
    completions = torch.cat(parts)[:, prompts.size(1):]
    return cut_after(completions, end)


# ---- scoring ------------------------------------------------------------------------------

def completion_hidden(model, prompts, tokens):
    """Hidden states (B,T,C) before each token of completions tokens (B,T) of prompts (B,T0).

    Those one position earlier, which predict the token.
    """
    texts = torch.cat((prompts, tokens), dim=1)
    inputs = texts[:, :-1]
    hidden = model.hidden(inputs, pad=padding(inputs))
    hidden = hidden[:, prompts.size(1) - 1:]
    # torch multiplies a strided input in one way if weights need a gradient and in another if not:
    # rho and a policy equal to it would differ in the last bit.
    return hidden.contiguous()


def completion_logits(model, prompts, tokens):
    """Logits (B,T,V) that predict completions tokens (B,T) of prompts (B,T0)."""
    return model.logits(completion_hidden(model, prompts, tokens))


@torch.no_grad()
def in_chunks(function, *tensors, size=64):
    """function over the rows of tensors, a few at a time so that logits stay small.

    The function returns a tensor or a dict of tensors; so does this, for all rows.
    """
    n = len(tensors[0])
    mine = [x[share(n)].split(size) for x in tensors]
    parts = [function(*chunk) for chunk in zip(*mine)]
    if torch.is_tensor(parts[0]):
        return gather(torch.cat(parts), n)
    whole = {}
    for key in parts[0]:
        rows = torch.cat([part[key] for part in parts])
        whole[key] = gather(rows, n)
    return whole


# ---- gradient steps -----------------------------------------------------------------------

def orthogonalise(x, dtype, steps=5):
    """Matrices x (N,R,C) with their singular values moved to about 1, .7 to 1.2: (N,R,C).

    Newton-Schulz iteration (Jordan 2024): an odd polynomial of x, of products alone. The exact
    result, the polar factor U V' of x = U S V', would take an SVD.
    """
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x.to(dtype).contiguous()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)               # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        # 3.4445 x - 4.7750 (x x') x + 2.0315 (x x')^2 x
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum SGD whose steps are orthogonalised (Jordan 2024), so that all directions of a matrix
    move alike. Matrices of one shape are stacked; dtype: of the products.
    """

    def __init__(self, parameters, lr, dtype, momentum=0.95):
        super().__init__(parameters, {"lr": lr})
        self.dtype, self.momentum = dtype, momentum

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (R, C), matrices in by_shape.items():
                updates = []
                for p in matrices:
                    average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - self.momentum)
                    updates.append(p.grad.lerp(average, self.momentum))         # Nesterov
                updates = orthogonalise(torch.stack(updates), self.dtype)
                # Steps as large as Adam's, 0.2 an element (Liu 2025).
                rate = 0.2 * group["lr"] * max(R, C) ** 0.5
                for p, update in zip(matrices, updates):
                    p.sub_(update, alpha=rate)


def make_optimizers(model, matrix_lr=0.015, embed_lr=0.004):
    """Muon for the matrices inside the blocks, AdamW for all else: a list of two optimizers.

    Embeddings and the output layer, whose rows are tokens, do better with Adam.
    """
    # Every parameter of a block is a matrix.
    rest = [model.embed.weight, model.lm_head.weight]
    return [Muon(model.blocks.parameters(), matrix_lr, model.dtype),
            torch.optim.AdamW(rest, lr=embed_lr, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0,
                              fused=True)]


def set_rates(optimizers, part):
    """Set every learning rate to this part of the one its optimizer was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = part * group.setdefault("peak", group["lr"])


def optimizer_step(loss, model, optimizers, clip=math.inf, weight=None):
    """One step down the gradient of loss, a scalar. Returns the gradient's norm before clipping.

    weight: this process's share of the batch that the loss is a mean over; None: all of it.
    Raises FloatingPointError, before any weight changes, where the gradient is not finite.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)       # no gradient of an earlier batch is left
    loss.backward()
    average([p.grad for p in model.parameters() if p.requires_grad], weight)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    if not norm.isfinite():
        raise FloatingPointError("a gradient is not finite. Try --fp32, another --seed or, in "
                                 "PPO, a lower --lr.")
    for optimizer in optimizers:
        optimizer.step()
    return norm


# ---- pretraining --------------------------------------------------------------------------

def windows(tokens, starts, length):
    """tokens[s : s + length] for each of starts: (B,length), int64."""
    rows = starts[:, None] + torch.arange(length)
    return tokens[rows].long()


def draw_starts(n, openings, batch, generator):
    """Where a batch of windows begins, of n places: half of them at openings, (batch,).

    Samples will begin there too, with nothing before.
    """
    starts = torch.randint(n, (batch,), generator=generator)
    half = (batch + 1) // 2
    chosen = torch.randint(len(openings), (half,), generator=generator)
    starts[::2] = openings[chosen]
    return starts


def trapezoid(i, steps):
    """Learning rate as a share of its peak: 40 steps up, level, down to 0 over the last 60 %."""
    up = (i + 1) / 40
    down = (1 - i / steps) / 0.6
    return min(1.0, up, down)


@torch.no_grad()
def bigram_start(model, tokens, smooth=20.0):
    """Set embedding and output layer so that the model predicts the bigrams of tokens (N,).

    Log-frequencies of the next token after each token, smoothed, factorised to n_embd numbers a
    token by SVD (Levy 2014 explain word vectors so). The blocks start as the identity, so this is
    what the model says before its first step; it saves half of the steps.
    """
    V, C = model.embed.weight.shape
    pairs = tokens[:-1].long() * V + tokens[1:].long()
    counts = torch.bincount(pairs, minlength=V * V)
    counts = counts.view(V, V).float()                  # (this, next)
    seen = counts.sum(1, keepdim=True)
    share = (counts.sum(0) + 1) / (counts.sum() + V)
    smoothed = (counts + smooth * share) / (seen + smooth)
    logits = smoothed.log()
    logits = logits - logits.mean(1, keepdim=True)
    u, s, _ = torch.svd_lowrank(logits, C)
    embed = norm(u * s.sqrt())
    weight = (seen + 5).sqrt()                          # frequent tokens matter more
    # Normal equations in float64: lstsq gives other last bits in every process.
    x = (embed * weight).double()
    y = (logits * weight).double()
    ridge = torch.eye(C, dtype=torch.float64)
    output = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    model.embed.weight.copy_(embed)
    model.lm_head.weight.copy_(output.T)


@torch.no_grad()
def bits_per_byte(model, tokens, vocabulary):
    """-log2 P(tokens (N,)) over their bytes, in windows of the model's context.

    vocabulary: the bytes of each token. Per byte, for tokens of different tokenizers are not
    comparable.
    """
    T = model.config.block_size
    sizes = torch.tensor([len(token) for token in vocabulary])
    starts = torch.arange(0, len(tokens) - T, T)
    nats = size = 0.0
    for rows in starts.split(32):
        batch = windows(tokens, rows, T + 1).to(model.embed.weight.device)
        targets = batch[:, 1:].flatten()
        logits = model(batch[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        nats += loss.item()
        size += sizes[targets.cpu()].sum().item()
    bits = nats / math.log(2)
    return bits / size


def pretrain(options, texts, loop):
    """Train a GPT to predict the next token of the plays: what pretrain.pt holds, a dict.

    options: those of this stage (train.OPTIONS), texts: what data.prepare made, loop: the
    train.Stage that counts the steps and goes on after a kill.
    """
    train = texts["train"]
    vocabulary = texts["vocabulary"]
    T = options.block_size
    steps = options.pretrain_steps
    batch = 16
    config = GPTConfig(len(vocabulary), T, options.n_layer, options.n_head, options.n_embd)
    model = GPT(config, options.dtype)
    if config.n_embd < config.vocab_size:
        bigram_start(model, train)
    model.to(options.device)
    muon, adam = make_optimizers(model)
    sampler = Generator().manual_seed(options.seed)
    start = torch.full((1, 1), texts["start"], device=options.device)
    # The boundary before a speech, so that the next token opens one; any place if there is none.
    is_start = train[:-T] == texts["start"]
    openings = is_start.nonzero().squeeze(1)
    if len(openings) == 0:
        openings = torch.arange(len(train) - T)
    rows = share(batch)                             # of several processes each reads its part
    weight = (rows.stop - rows.start) / batch

    for i in loop.steps(steps, model=model, muon=muon, adam=adam, sampler=sampler):
        if i % 100 == 0 or i == 50:                 # always from the same random numbers
            same = torch.Generator(options.device)
            tokens = generate(model, start, min(48, T - 1), generator=same)
            text = data.decode(vocabulary, tokens[0])
            loop.show(f"after {i} steps the model writes:", text)
        set_rates([muon, adam], trapezoid(i, steps))
        starts = draw_starts(len(train) - T, openings, batch, sampler)
        tokens = windows(train, starts[rows], T + 1).to(options.device)
        logits = model(tokens[:, :-1]).flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        loss = F.cross_entropy(logits, targets)
        optimizer_step(loss, model, [muon, adam], weight=weight)
        average([loss.detach()], weight)
        metrics = {"loss": loss.item()}
        if (i + 1) % 100 == 0:
            held_out = texts["held_out"][:10_000]
            metrics["val_bits_per_byte"] = bits_per_byte(model, held_out, vocabulary)
        if (i + 1) % 10 == 0 or i + 1 == steps:
            loop.log(**metrics)

    return {"config": vars(config),
            "model": model.state_dict(),
            "vocabulary": vocabulary,
            "start": texts["start"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "val_bits_per_byte": bits_per_byte(model, texts["held_out"], vocabulary)}


def load_gpt(state, device="cpu", dtype=torch.float32):
    """The GPT of a checkpoint: its "config" and "model" are all it takes."""
    model = GPT(GPTConfig(**state["config"]), dtype)
    model.load_state_dict(state["model"])
    return model.to(device)


# ---- several processes --------------------------------------------------------------------
# torchrun starts N copies of train.py. All hold the same weights and draw the same random
# numbers. In what takes long (pretraining, sampling, reading, updates) each computes a share of
# the rows and receives the others' results; everything else each does by itself, with the same
# outcome. A process alone works on all rows, and nothing is sent.

def join_processes(device):
    """Meet the other processes that torchrun started, if it did. Returns this one's device."""
    if not dist.is_torchelastic_launched():
        return device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")    # the first prints for all
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def share(n):
    """The slice of n rows that this process works on."""
    if not dist.is_initialized():
        return slice(0, n)
    i = dist.get_rank()
    processes = dist.get_world_size()
    return slice(n * i // processes, n * (i + 1) // processes)


def all_reduce(x):
    """The sum of a tensor over all processes, in place. ConnectionError if one has ended."""
    try:
        dist.all_reduce(x)
    except RuntimeError:
        raise ConnectionError("another process of this run has ended") from None
    return x


def barrier(device):
    """Return when every process has come here."""
    if dist.is_initialized():
        all_reduce(torch.zeros(1, device=device))


def gather(rows, n):
    """All n rows, of which this process has made its share. No gradient flows through it."""
    if not dist.is_initialized():
        return rows
    # Zeros in the others' rows: shares may differ in size.
    whole = rows.new_zeros(n, *rows.shape[1:])
    whole[share(n)] = rows
    return all_reduce(whole)


def average(tensors, weight):
    """Each tensor's mean over all processes, in place; the weights add up to 1.

    weight None: every process has the same already.
    """
    if dist.is_initialized() and weight is not None:
        for x in tensors:
            all_reduce(x.mul_(weight))


def compute_dtype(device):
    """bfloat16 where this device multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capable = torch.cpu.get_capabilities()
        # Intel's AVX-512 instructions for it are half as fast as those for float32, AMD's twice
        # as fast; Intel's AMX is fast.
        intel = "Intel" in capable.get("cpu_name", "")
        fast = capable.get("amx_bf16") or (capable.get("avx512_bf16") and not intel)
    return torch.bfloat16 if fast else torch.float32
