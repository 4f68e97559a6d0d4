"""The transformer: a small GPT, sampling from it, scoring with it, and its pretraining.

Read this file first. The model follows nanoGPT (Karpathy), but has positions by a bias on attention
(Press 2021), layer norm without weights, one key and value for all heads (Shazeer 2019), squared
ReLU (So 2021), output projections that start at zero, and an embedding and output layer that start
as a bigram model. Two more differences serve PPO:
- forward() returns logits at *every* position: sampling uses the last one, scoring all of them;
- stream() gives the hidden states after any block: the reward model's classifier head reads them,
  and PPO computes those of its frozen blocks once per batch.
On a first reading skip "several processes": a single process works on all rows and sends nothing.

Shapes, in every file: B rows (texts), T tokens of a row, T0 of a prompt, C = n_embd features,
V = vocab_size, H heads of C/H features ("head" in shapes), S keys; N samples, P prompts.
Log-probabilities, entropies and KLs are in nats. Weights are float32; the residual stream, matrix
products and attention have a model's compute dtype, bfloat16 where the machine is fast at it;
logits and all that is computed from them are float32. The device decides in two functions:
compute_dtype() chooses the dtype, join_processes() gives each process its own GPU.
"""

import copy
import math
import os
import sys
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
from data import PAD

BLOCKED = -1e4      # gives a key weight 0; -inf would give NaN at padding, where all are blocked


@dataclass
class GPTConfig:             # the sizes of a GPT, here those of --size small
    vocab_size: int = 2048   # tokens
    block_size: int = 128    # tokens of a training window: longer contexts are never trained
    n_layer: int = 4         # blocks
    n_head: int = 4          # attention heads; must divide n_embd
    n_embd: int = 256        # features of the residual stream


class Linear(nn.Linear):
    """x (...,n_in) -> (...,n_out), no bias, in x's dtype; the float32 weight is drawn with std."""

    def __init__(self, n_in, n_out, std=0.0):
        super().__init__(n_in, n_out, bias=False)
        nn.init.normal_(self.weight, std=std)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def norm(x):
    """Layer norm (Ba 2016) of x (...,C) without weights, in x's dtype, float32 inside."""
    # Most newer models use RMS norm, for which torch has no fused CPU kernel.
    return F.layer_norm(x, (x.size(-1),))


def attention_bias(start, end, heads, device, pad=None):
    """The bias added to attention scores, float32: (T,H,S), or (B,T,H,S) with pad.
    The T queries are positions start to end - 1, the S = end keys all positions before end. Head h
    lowers a key's score by 2^-h times its distance from the query (ALiBi, Press 2021): the
    model's only sense of position. Later keys and padding are blocked: pad (B,T0) is True at
    padding among the first T0 keys. The output at a padded query is meaningless and never used."""
    query = torch.arange(start, end, device=device)[:, None, None]
    distance = query - torch.arange(end, device=device)                 # (T,1,S)
    slopes = 0.5 ** torch.arange(heads, device=device)
    bias = -distance * slopes[:, None]                                  # (T,H,S)
    bias = bias.masked_fill(distance < 0, BLOCKED)                      # the future
    if pad is None:
        return bias
    padding = F.pad(pad * BLOCKED, (0, end - pad.size(1)))              # (B,S)
    return bias + padding[:, None, None]


def attention(q, k, v, bias):
    """softmax(q k' / sqrt(head) + bias) v for each head: q (B,T,C), k and v (B,S,head) -> (B,T,C).
    bias: attention_bias(). As k and v are shared, all heads' queries are rows of one matrix."""
    head = k.size(2)
    rows = q.unflatten(2, (-1, head)).flatten(1, 2)                     # (B,T*H,head)
    rows = rows / math.sqrt(head)
    scores = rows @ k.mT                                                # (B,T*H,S)
    scores = scores.unflatten(1, bias.shape[-3:-1]) + bias              # (B,T,H,S)
    weights = scores.softmax(-1)
    y = weights.flatten(1, 2) @ v                                       # (B,T*H,head)
    return y.view(q.shape)


class Block(nn.Module):
    """One layer, x (B,T,C) -> (B,T,C): x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        head = C // config.n_head
        # A query for each head, but one key and one value for all of them (multi-query attention,
        # Shazeer 2019): with a pair for each head, sampling takes 1.5 times as long.
        self.sizes = (C, head, head)
        self.qkv = Linear(C, sum(self.sizes), C ** -0.5)
        self.proj = Linear(C, C)            # zeros, like out: a block starts as the identity
        self.fc = Linear(C, 4 * C, C ** -0.5)
        self.out = Linear(4 * C, C)

    def forward(self, x, bias, cache=None):
        q, k, v = self.qkv(norm(x)).split(self.sizes, dim=-1)           # k, v: (B,T,head)
        if cache is not None:
            if self in cache:
                past_k, past_v = cache[self]
                k = torch.cat((past_k, k), dim=1)                       # (B,S,head)
                v = torch.cat((past_v, v), dim=1)
            cache[self] = k, v
        x = x + self.proj(attention(q, k, v, bias))     # only attention mixes positions
        # The MLP works on each position alone. nanoGPT has GELU here, no worse (results/).
        y = F.relu(self.fc(norm(x)))
        return x + self.out(y * y)


class GPT(nn.Module):
    """GPT(config, dtype)(tokens): tokens (B,T) -> float32 logits (B,T,V) of each next token."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)         # zeros until bigram_start()

    def stream(self, x, start=0, cache=None, pad=None, blocks=slice(None)):
        """The residual stream (B,T,C), in the compute dtype, after blocks, a slice of self.blocks.
        x: tokens (B,T), or the stream (B,T,C) before those blocks. start: the position of x's first
        token. cache: a dict, empty at first, in which each block keeps the keys and values
        (B,S,head) of all tokens so far, for x to continue. pad: as in attention_bias."""
        if not x.is_floating_point():
            # PAD (-1) has no embedding and gets that of token 0; its output is never used.
            x = norm(self.embed(x.clamp(min=0)).to(self.dtype))
        bias = attention_bias(start, start + x.size(1), self.config.n_head, x.device, pad)
        bias = bias.to(self.dtype)
        for block in self.blocks[blocks]:
            x = block(x, bias, cache)
        return x

    def logits(self, x):
        """Logits (B,T,V), float32, from the stream (B,T,C) after the last block."""
        return self.lm_head(norm(x)).float()

    def forward(self, tokens, **options):
        return self.logits(self.stream(tokens, **options))


# ---- sampling -----------------------------------------------------------------------------
def sample_tokens(logits, uniform, temperature=1.0, top_k=None):
    """Sample a token for each row of logits (B,V) from softmax(logits / temperature): (B,).
    uniform (B,1): a random number in [0, 1) for each row. Temperature 0 is greedy; top_k keeps only
    the k likeliest tokens. PPO's rollouts use neither: their log-probabilities are computed from
    the whole softmax, which must be the distribution that was sampled."""
    logits = logits / max(temperature, 1e-9)
    if top_k is not None:
        best = logits.topk(min(top_k, logits.size(-1))).values
        logits = logits.masked_fill(logits < best[:, -1:], -math.inf)
    # Invert the cumulative distribution: one uniform number a row, where torch.multinomial draws
    # one for each token of the vocabulary. Each probability is off by 2e-7 at most (CPU).
    probs = logits.softmax(-1)
    cdf = probs.cumsum(-1)                                              # (B,V)
    # Draw the first token whose cdf exceeds the threshold, never one of probability 0. For NaN
    # logits there is none; clamp keeps the index valid until check_finite (ppo.py) reports NaN.
    threshold = uniform * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, threshold, right=True)
    return drawn.squeeze(-1).clamp(max=cdf.size(-1) - 1)


def padding(tokens):
    """Where tokens (B,T) are PAD: (B,T) bool, or None without padding, for cheaper attention."""
    pad = tokens == PAD
    return pad if pad.any() else None


@torch.no_grad()
def extend(model, prompt, uniform, temperature=1.0, top_k=None, frozen=0):
    """Continue each prompt (B,T0), padded left, by T tokens: tokens (B,T0+T), lower (B,T0+T-1,C).
    uniform (B,T): sample_tokens' random numbers. tokens begin with the prompt. lower is the stream
    after the first `frozen` blocks, which PPO does not train and so computes once, at every token
    but the last (meaningless at padding). With a key-value cache each token is read only once."""
    # A copy in the compute dtype; otherwise every weight would be cast again for each token.
    model = copy.deepcopy(model).to(model.dtype)
    cache = {}
    pad = padding(prompt)
    # The first pass reads the prompt, each later one the token just drawn.
    new = tokens = prompt
    lower = []
    for column in uniform.to(prompt.device).split(1, dim=1):                # (B,1)
        start = tokens.size(1) - new.size(1)
        x = model.stream(new, start, cache, pad, slice(frozen))
        lower.append(x)
        x = model.stream(x, start, cache, pad, slice(frozen, None))
        logits = model.logits(x[:, -1])                                     # (B,V)
        new = sample_tokens(logits, column, temperature, top_k)[:, None]
        tokens = torch.cat((tokens, new), dim=1)
    return tokens, torch.cat(lower, dim=1)


def generate(model, prompt, length, temperature=1.0, top_k=None, generator=None):
    """Continue prompts (B,T0), padded left with PAD, by length tokens: tokens (B,T0+length)."""
    uniform = torch.rand(len(prompt), length, generator=generator)  # on the CPU: for any device
    tokens, _ = extend(model, prompt, uniform, temperature, top_k)
    return tokens


def cut_after(tokens, end):
    """Replace all after the first end, a token id, in tokens (B,T) by PAD; nothing if it is None.
    >>> cut_after(torch.tensor([[5, 0, 7, 0], [5, 6, 7, 8]]), 0)
    tensor([[ 5,  0, -1, -1],
            [ 5,  6,  7,  8]])
    """
    if end is None:
        return tokens
    is_end = tokens == end
    ended_before = is_end.cumsum(1) - is_end.long() > 0
    return tokens.masked_fill(ended_before, PAD)


def sample_completions(model, prompts, length, end=None, frozen=0):
    """Sample a completion of T = length tokens for each prompt (N,T0): tokens (N,T), lower.
    The whole softmax at temperature 1 is sampled, as scoring assumes. tokens come without the
    prompt and are PAD after end, a token id or None. lower (N,T0+T-1,C), frozen: as in extend."""
    # Random numbers for all rows, so that samples do not depend on the number of processes.
    uniform = torch.rand(len(prompts), length)
    draw = partial(extend, model, frozen=frozen)
    tokens, lower = in_chunks(draw, prompts, uniform, size=512)
    return cut_after(tokens[:, prompts.size(1):], end), lower


# ---- scoring ------------------------------------------------------------------------------
def completion_logits(model, prompts, tokens, blocks=slice(None), lower=None):
    """The logits (B,T,V) that predict each of tokens (B,T), completions of prompts (B,T0).
    lower: extend's stream (B,T0+T-1,C), if known; blocks is then the slice of those after it."""
    inputs = torch.cat((prompts, tokens), dim=1)[:, :-1]                # (B,T0+T-1)
    pad = padding(inputs)
    x = inputs if lower is None else lower
    x = model.stream(x, pad=pad, blocks=blocks)
    return model.logits(x[:, prompts.size(1) - 1:])     # the state before a token predicts it


def token_logprobs(logits, tokens):
    """Gather each token's log-probability: logits (B,T,V), tokens (B,T) -> (B,T) float32, nats.
    logits[:, t] must predict tokens[:, t]. The result is 0 at PAD."""
    index = tokens.clamp(min=0)[..., None]
    logprobs = logits.float().log_softmax(-1).gather(-1, index)
    return logprobs.squeeze(-1).masked_fill(tokens == PAD, 0.0)


@torch.no_grad()
def in_chunks(function, *tensors, size=64):
    """function(*tensors), a tensor or several, computed size rows at a time to save memory.
    Row i of a result may depend on row i alone: processes share the rows. No gradient flows."""
    n = len(tensors[0])
    wholes = []
    for rows in torch.arange(n)[share(n)].split(size):
        result = function(*[x[rows] for x in tensors])
        parts = [result] if torch.is_tensor(result) else result
        # Copied at once: results kept where they are would lie between the chunks' large temporary
        # tensors, whose freed memory, cut into pieces, could not be used again for the next ones.
        wholes = wholes or [part.new_zeros(n, *part.shape[1:]) for part in parts]
        for whole, part in zip(wholes, parts):
            whole[rows] = part
    for whole in wholes:
        all_reduce(whole)               # adds the other processes' rows, which are 0 here
    return wholes[0] if torch.is_tensor(result) else wholes


# ---- gradient steps -----------------------------------------------------------------------
def optimizer_step(loss, optimizer, lr, clip=math.inf, weight=None):
    """One step of the optimizer on loss, a scalar. Returns the gradient's norm before clipping.
    clip: the largest norm. weight: this process's share of the batch, 0 to 1; None if each has all
    of it. Raises FloatingPointError, before any weight changes, if the gradient is not finite."""
    [group] = optimizer.param_groups
    group["lr"] = lr
    optimizer.zero_grad()               # otherwise backward() adds to the last gradient
    loss.backward()
    average([p.grad for p in group["params"]], weight)
    grad_norm = nn.utils.clip_grad_norm_(group["params"], clip)
    if not grad_norm.isfinite():
        raise FloatingPointError("a gradient is not finite. Try --fp32, another --seed or, in "
                                 "PPO, a lower --lr.")
    optimizer.step()
    return grad_norm


# ---- pretraining --------------------------------------------------------------------------
def windows(tokens, starts, length):
    """tokens[s : s + length] of tokens (N,) for each s of starts (B,): (B,length), int64."""
    rows = starts[:, None] + torch.arange(length)
    return tokens[rows].long()


def learning_rate(i, steps, n_embd):
    """The learning rate of step i: rises for 40 steps, is constant, falls to 0 in the last 60 %."""
    # Adam's best rate for matrices is inversely proportional to the width (Yang 2022). The
    # embedding gets the same, though its best rate depends less on the width.
    peak = 1 / n_embd
    up = (i + 1) / 40
    down = (1 - i / steps) / 0.6
    return peak * min(1.0, up, down)


@torch.no_grad()
def bigram_start(model, tokens, smooth=20.0):
    """Initialise embedding and output layer to predict, nearly, the bigrams of tokens (N,).
    An SVD of rank n_embd factorises the log-frequencies (V,V) of each token's successors (Levy
    2014), smoothed by unigrams. As blocks start as the identity, only the last token counts."""
    V, C = model.embed.weight.shape
    tokens = tokens.long()
    pairs = tokens[:-1] * V + tokens[1:]
    counts = torch.bincount(pairs, minlength=V * V)
    counts = counts.view(V, V).float()                  # (this, next)
    often = counts.sum(0) + 1
    counts += smooth * often / often.sum()
    logits = counts.log()
    # Softmax ignores a row's mean: counts need no division by their sum, the SVD need not fit it.
    logits -= logits.mean(1, keepdim=True)
    u, s, v = torch.svd_lowrank(logits, C)
    embed = u * s.sqrt()
    scale = embed.std(1).mean()         # norm divides rows by their std; output multiplies back
    output = v * s.sqrt()
    model.embed.weight.copy_(embed / scale)
    model.lm_head.weight.copy_(output * scale)


def next_token_nats(model, rows):
    """-log P, in nats, of every token but the first of rows (B,T+1), given those before: (B,T)."""
    logits = model(rows[:, :-1])
    return -token_logprobs(logits, rows[:, 1:])


@torch.no_grad()
def bits_per_byte(model, tokens, vocabulary):
    """-log2 P of tokens (N,) per byte of text, over all full windows of block_size tokens.
    vocabulary: the bytes of each token. Unlike bits per token it compares across tokenizers."""
    T = model.config.block_size
    starts = torch.arange(0, len(tokens) - T, T)
    rows = windows(tokens, starts, T + 1).to(model.embed.weight.device)
    nats = in_chunks(lambda rows: next_token_nats(model, rows), rows)
    total = nats.sum(dtype=torch.float64).item()
    bits = total / math.log(2)
    predicted = rows[:, 1:].flatten().tolist()
    size = sum(len(vocabulary[i]) for i in predicted)
    return bits / size


def pretrain(options, texts, loop):
    """Train a GPT to predict the next token of the plays: the content of pretrain.pt, a dict.
    options: the stage's, from train.TABLE. texts: data.prepare's dict, of token ids (N,). loop: a
    train.Stage, which yields the steps, saves them now and then, and resumes after a kill."""
    train = texts["train"]
    held_out = texts["held_out"]
    vocabulary = texts["vocabulary"]
    T = options.block_size
    steps = options.pretrain_steps
    batch = 16                                      # windows per step
    if len(held_out) <= T:
        raise data.UserError("the held-out text is shorter than a window. Give a longer --corpus, "
                             "or a smaller --block-size.")
    config = GPTConfig(len(vocabulary), T,
                       options.n_layer, options.n_head, options.n_embd)
    model = GPT(config, options.dtype)
    if config.n_embd < config.vocab_size:           # an SVD (V,V) has at most rank V
        bigram_start(model, train)
    model.to(options.device)

    rows = share(batch)                             # each process trains on its share of the batch
    weight = (rows.stop - rows.start) / batch
    # An SVD may differ in its last bits between processes; all must start from equal weights.
    average([p.data for p in model.parameters()], weight)
    optimizer = torch.optim.AdamW(model.parameters(),
                                  betas=(0.8, 0.95), eps=1e-10,
                                  weight_decay=0.0, fused=True)
    start = torch.full((1, 1), texts["start"], device=options.device)
    n = len(train) - T
    for i in loop.steps(steps, model=model, optimizer=optimizer):
        if i % 100 == 0 or i == 50:                 # a new Generator: the same numbers each time
            tokens = generate(model, start, 48, generator=torch.Generator())
            loop.show(f"after {i} steps the model writes:", data.decode(vocabulary, tokens[0]))
        starts = torch.randint(n, (batch,))[rows]
        tokens = windows(train, starts, T + 1).to(options.device)
        loss = next_token_nats(model, tokens).mean()
        lr = learning_rate(i, steps, config.n_embd)
        optimizer_step(loss, optimizer, lr, weight=weight)
        average([loss.detach()], weight)
        metrics = {"loss": loss.item()}
        if (i + 1) % 100 == 0:
            metrics["val_bits_per_byte"] = bits_per_byte(model, held_out[:10_000], vocabulary)
        if (i + 1) % 10 == 0 or i + 1 == steps:
            loop.log(**metrics)
    return {"config": vars(config),
            "model": model.state_dict(),
            "vocabulary": vocabulary,
            "start": texts["start"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "val_bits_per_byte": bits_per_byte(model, held_out, vocabulary)}


def load_gpt(state, device="cpu", dtype=torch.float32):
    """The GPT of a checkpoint, state, from its "config" and "model"; dtype: to compute in."""
    model = GPT(GPTConfig(**state["config"]), dtype)
    model.load_state_dict(state["model"])
    return model.to(device)


# ---- several processes --------------------------------------------------------------------
# torchrun starts several copies of train.py, with the same weights and random numbers. In the slow
# parts (pretraining, sampling, reading, updates) each process computes its share of the rows and
# receives the others' results or, for gradients, their average. All other work every process
# repeats, with the same result. A single process works on all rows and sends nothing.

def join_processes(device):
    """Join the process group if torchrun started this process. Returns its device."""
    if not dist.is_torchelastic_launched():
        return device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")    # only rank 0 prints
    if device.type == "cuda":
        rank = int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    return device


def share(n):
    """This process's share of n rows: a slice of range(n)."""
    if not dist.is_initialized():
        return slice(0, n)
    i = dist.get_rank()
    processes = dist.get_world_size()
    return slice(n * i // processes, n * (i + 1) // processes)


def all_reduce(x):
    """Sum a tensor over all processes, in place. Raises ConnectionError if one has ended."""
    if dist.is_initialized():
        try:
            dist.all_reduce(x)
        except RuntimeError:
            raise ConnectionError("another process of this run has ended") from None


def barrier(device):
    """Wait until every process has reached this point."""
    all_reduce(torch.zeros(1, device=device))


def average(tensors, weight):
    """Average tensors over processes, in place, by weights of sum 1; None: they are equal."""
    if dist.is_initialized() and weight is not None:
        for x in tensors:
            all_reduce(x.mul_(weight))


def compute_dtype(device):
    """torch.bfloat16 if this device multiplies matrices faster in it, else torch.float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capable = torch.cpu.get_capabilities()
        # AVX-512 bfloat16 runs at half float32's speed on Intel, at twice it on AMD; AMX is fast.
        fast = capable.get("amx_bf16") or (
            capable.get("avx512_bf16") and "Intel" not in capable.get("cpu_name", ""))
    return torch.bfloat16 if fast else torch.float32
