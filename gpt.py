"""The transformer: a small GPT, its key-value cache, and sampling from it.

Second on the reader's path, after data.py. The model follows nanoGPT (Karpathy) with the
changes that paid most at this size: rotary positions (Su 2021), layer norm without weights,
normalised queries and keys, squared ReLU (So 2021), output projections that start at zero,
and Muon for the matrices. Two things differ from nanoGPT because PPO needs them:

- forward() returns logits at *every* position: sampling looks at the last one, scoring at all;
- hidden() returns the final hidden states, which a value function or a classifier head can read.

Precision, the same on every device. Weights are float32. Each model has one compute dtype,
bfloat16 where the machine is fast at it: the residual stream, matrix products and attention
are in it. Norms are computed in float32 within. Logits are rounded to it too and then turned into
float32, in which all that follows is done (softmax, log-probabilities, losses): in bfloat16 a
log-probability is off by some hundredths of a nat, equally often up and down.

Lines that depend on the device: attention() calls torch's fused kernel on CUDA; compute_dtype()
asks what the machine is good at; join_processes() gives each process a GPU of its own;
data.keep_freed_memory() speaks to glibc's allocator.
Everything else is one path, and the tests walk it on a CPU.

Several processes, if torchrun started them: see share(), which says what each works on.

`pytest tests/test_gpt.py` proves it.
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

# The id of "no token": it pads prompts on the left, and completions after their end.
PAD = -1


@dataclass
class GPTConfig:
    vocab_size: int = 2048   # tokens
    block_size: int = 128    # the longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256

    def __post_init__(self):
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} must be an even multiple of n_head "
                             f"{self.n_head}: rotary positions turn pairs of features of a head")


class Linear(nn.Linear):
    """A linear layer without bias that computes in its input's dtype; its weight stays float32."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class KVCache:
    """Keys and values of the tokens read so far, in buffers for all that will be read."""

    def __init__(self, config, batch, size, device, dtype, pad=None):
        if size > config.block_size:
            raise ValueError(f"{size} tokens do not fit the context of {config.block_size}")
        head = config.n_embd // config.n_head
        shape = (config.n_layer, batch, config.n_head, size, head)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)
        self.length = 0                             # tokens read so far
        self.pad = torch.zeros(batch, size, dtype=torch.bool, device=device)
        if pad is not None:
            self.pad[:, :pad.size(1)] = pad         # where the prompt has no token

    def append(self, layer, k, v):
        """Store k, v (B,H,T,head) of the newest tokens; return all so far (B,H,S,head)."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def norm(x):
    """Layer norm over features, no weights (Ba 2016): in x's dtype, computed in float32.

    torch's kernel keeps mean, variance and products in float32 and rounds at the end (a test holds
    it to that), on the CPU fused; the RMS norm that most new models have is not fused there.
    """
    return F.layer_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary position: turns each pair (x1, x2) of features of x (B,H,T,head) by an angle.

    The angle grows with the position, so that q . k depends on the distance alone (Su 2021).
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


def blocked_keys(queries, keys, device, pad=None):
    """Which of S keys each of the last T queries must not see: (T,S), or with padding (B,1,T,S).

    Those of its future, and those of padding, pad (B,S). A padded query sees itself: nobody reads
    what comes of it, but a softmax over nothing would be NaN.
    """
    key = torch.arange(keys, device=device)
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    blocked = key > query
    if pad is None:
        return blocked
    return blocked | (pad[:, None, None, :] & (key != query))


def attention(q, k, v, blocked):
    """softmax(q k' / sqrt(head)) v: q (B,H,T,head), k and v (B,H,S,head) -> (B,H,T,head)."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~blocked)
    # On the CPU, at 64 tokens in bfloat16, the written-out products are faster than the kernel.
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))        # (B,H,T,S)
    return scores.masked_fill(blocked, -math.inf).softmax(-1) @ v


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
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for y in self.qkv(norm(x)).split(C, dim=-1))     # each (B,H,T,head)
        # Norms of q and k bound the attention scores: training stays calm at high rates.
        q = rotate(norm(q), cos, sin)
        k = rotate(norm(k), cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)                        # (B,H,S,head)
        # Mix what other positions know into this one ...
        y = attention(q, k, v, blocked)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        # ... then think about it, each position alone. relu(y)^2 learns faster than GELU here.
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
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "out.weight", "lm_head.weight")):
                nn.init.zeros_(weight)          # each layer starts as the identity, logits uniform
            elif name == "embed.weight":
                nn.init.normal_(weight)
            else:
                nn.init.normal_(weight, std=weight.size(1) ** -0.5)

    def hidden(self, tokens, cache=None, pad=None):
        """Final hidden states (B,T,C), in the compute dtype, of tokens (B,T).

        With a cache, tokens are those that follow what it has read. pad (B,T) is True where
        there is no token; a cache knows that by itself.
        """
        T = tokens.size(1)
        start = 0 if cache is None else cache.length
        end = start + T
        # Angles exist for block_size positions.
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit the context of {self.config.block_size}")
        if cache is not None:
            pad = cache.pad[:, :end]
        blocked = blocked_keys(T, end, tokens.device, pad)
        cos = self.cos[start:end].to(self.dtype)
        sin = self.sin[start:end].to(self.dtype)
        # PAD has no row in the table; it borrows that of token 0; nobody reads what comes of it.
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


# ---- several processes --------------------------------------------------------------------
# torchrun starts N copies of train.py. All hold the same weights and draw the same random
# numbers. Of what takes long (pretraining, sampling, reading, updates) each computes a share of
# the rows and is given the others' results; the rest each does by itself, with the same outcome.
# A process alone works on all rows, and nothing is sent.

def join_processes(device):
    """Meet the other processes that torchrun started, if it did. Returns this one's device."""
    if not dist.is_torchelastic_launched():
        return device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")    # the first speaks for all
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def share(n):
    """The slice of n rows that this process works on."""
    if not dist.is_initialized():
        return slice(0, n)
    i, processes = dist.get_rank(), dist.get_world_size()
    return slice(n * i // processes, n * (i + 1) // processes)


def add_up(x):
    """The sum of a tensor over all processes, in its place. ConnectionError if one has ended."""
    try:
        dist.all_reduce(x)
    except RuntimeError:
        raise ConnectionError("another process of this run has ended") from None
    return x


def wait(device):
    """Return when every process has come here."""
    if dist.is_initialized():
        add_up(torch.zeros(1, device=device))


def gather(rows, n):
    """All n rows, of which this process has made its share. No gradient flows through it."""
    if not dist.is_initialized():
        return rows
    # Zeros where the others' rows belong: shares may differ in size.
    whole = rows.new_zeros(n, *rows.shape[1:])
    whole[share(n)] = rows
    return add_up(whole)


def average(tensors, weight):
    """Each tensor's mean over all processes, in its place; the weights add up to 1.

    weight None: every process has the same already.
    """
    if dist.is_initialized() and weight is not None:
        for x in tensors:
            add_up(x.mul_(weight))


# ---- sampling -----------------------------------------------------------------------------

class Generator(torch.Generator):
    """A stream of randomness of its own, whose state goes into checkpoints."""

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
    # A sum of 2,048 float32 probabilities would miss the rarest tokens.
    logits = logits.double()
    if temperature != 1:             # the largest first: then no temperature above 0 overflows
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.size(-1):
        best = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(1, best.indices, best.values)
    # Invert the cumulative distribution: one uniform number a row, where torch.multinomial
    # draws one for each token of the vocabulary, and is slower.
    cdf = logits.softmax(-1).cumsum(-1)                                 # (B,V)
    # The first token whose cdf exceeds u: one of probability 0 never does first. Where logits are
    # NaN none does, and clamp keeps the index legal until the NaN is reported.
    drawn = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).squeeze(-1)
    return drawn.clamp(max=cdf.size(-1) - 1)


def draw_uniform(length, batch, device, generator=None):
    """The random numbers (length,batch,1) that sampling so many tokens takes."""
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
    cache = KVCache(model.config, B, T0 + length, prompt.device, model.dtype, padding(prompt))
    # The first pass reads the prompt, each later one the token just drawn.
    new, tokens = prompt, [prompt]
    for t in range(length):
        logits = model(new, cache)[:, -1]                               # (B,V)
        new = sample_tokens(logits, uniform[t], temperature, top_k)[:, None]
        tokens.append(new)
    return torch.cat(tokens, dim=1)


def cut_after(tokens, end):
    """Completions tokens (B,T) with PAD in the place of all that follows the first end token.

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
    return cut_after(torch.cat(parts)[:, prompts.size(1):], end)


# ---- scoring ------------------------------------------------------------------------------

def completion_hidden(model, prompts, tokens):
    """Hidden states (B,T,C) before each token of completions tokens (B,T) of prompts (B,T0).

    Those at the position of the token before, so that token t is predicted, and valued, by what
    was known before it.
    """
    inputs = torch.cat((prompts, tokens), dim=1)[:, :-1]
    hidden = model.hidden(inputs, pad=padding(inputs))
    hidden = hidden[:, prompts.size(1) - 1:]
    # Of a strided input torch computes the product in one way if weights need a gradient and in
    # another if not: rho and a policy equal to it would differ in the last bit.
    return hidden.contiguous()


def completion_logits(model, prompts, tokens):
    """Logits (B,T,V) that predict completions tokens (B,T) of prompts (B,T0)."""
    return model.logits(completion_hidden(model, prompts, tokens))


@torch.no_grad()
def in_chunks(function, *tensors, size=64):
    """function over the rows of tensors, a few at a time so that logits stay small.

    What it returns, a tensor or a dict of tensors, for all rows.
    """
    n = len(tensors[0])
    mine = [x[share(n)].split(size) for x in tensors]
    found = [function(*chunk) for chunk in zip(*mine)]
    if not isinstance(found[0], dict):
        return gather(torch.cat(found), n)
    return {key: gather(torch.cat([part[key] for part in found]), n) for key in found[0]}


# ---- training and loading -----------------------------------------------------------------

def set_rates(optimizers, part):
    """Every learning rate to this part of the one its optimizer was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = part * group.setdefault("peak", group["lr"])


def descend(loss, model, optimizers, clip=math.inf, weight=None):
    """One step down the gradient of loss, a scalar. Returns the gradient's norm before clipping.

    weight: this process's share of the batch that the loss is a mean over; None: all of it.
    Raises FloatingPointError, before any weight changes, where the gradient is not finite.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)       # nothing is left of an earlier batch
    loss.backward()
    average([p.grad for p in model.parameters()], weight)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    if not norm.isfinite():
        raise FloatingPointError("a gradient is not finite. Try --fp32, another --seed or, in "
                                 "PPO, a lower --lr.")
    for optimizer in optimizers:
        optimizer.step()
    return norm


def make_optimizers(model, matrix_lr, embed_lr):
    """Muon for the matrices inside the blocks, AdamW for all else: a list of two optimizers.

    Muon (Jordan 2024) orthogonalises each matrix's momentum; embeddings and the output
    layer, whose rows are tokens, do better with Adam.
    """
    # Every parameter of a block is a matrix.
    matrices = list(model.blocks.parameters())
    rest = [model.embed.weight, model.lm_head.weight]
    return [torch.optim.Muon(matrices, lr=matrix_lr, momentum=0.95, weight_decay=0.0,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=embed_lr, betas=(0.8, 0.95), eps=1e-10,
                              weight_decay=0.0, fused=True)]


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


def load_gpt(state, device="cpu", dtype=torch.float32):
    """The GPT of a checkpoint: its "config" and "model" are all it takes."""
    model = GPT(GPTConfig(**state["config"]), dtype)
    model.load_state_dict(state["model"])
    return model.to(device)
