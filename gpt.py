"""The transformer: a small GPT, its key-value cache, and sampling from it.

Second on the reader's path, after data.py. The model follows nanoGPT (Karpathy) with the
changes that paid most at this size: rotary positions (Su 2021), layer norm without weights,
normalised queries and keys, squared ReLU (So 2021), output projections that start at zero,
and Muon for the matrices. Two things differ from nanoGPT because PPO needs them:

- forward() returns logits at *every* position: sampling looks at the last one, scoring at all;
- hidden() returns the final hidden states: the value head and the reward head are a few
  lines on top of it, and share everything below.

    python gpt.py        prints the parameter count and the shapes of the default model
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 2048   # tokens
    block_size: int = 128    # the longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256

    def __post_init__(self):
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} must be an even multiple of n_head {self.n_head}: "
                             "rotary positions turn pairs of features within a head")


class KVCache:
    """Keys and values of the tokens read so far, in buffers for all that will be read: (layer, B, H, S, head).

    Attention reads whole buffers and masks what is not filled yet. So no step copies a part out of them,
    and every step does the same to the same memory: on CUDA one step can be captured and replayed.
    """

    def __init__(self, config, batch, size, device, dtype):
        if size > config.block_size:
            raise ValueError(f"{size} tokens do not fit the context of {config.block_size}")
        shape = (config.n_layer, batch, config.n_head, size, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)     # not empty: 0 times NaN would be NaN
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros((), dtype=torch.long, device=device)              # tokens read so far

    def positions(self, T):
        """Of the next T tokens: (T,)."""
        return self.length + torch.arange(T, device=self.length.device)

    def append(self, layer, k, v):
        """Store k, v (B,H,T,head) of the newest tokens; return the buffers (B,H,S,head)."""
        positions = self.positions(k.size(2))
        return self.k[layer].index_copy_(2, positions, k), self.v[layer].index_copy_(2, positions, v)


def norm(x):
    """Layer norm over features, no weights (Ba 2016); on the CPU torch fuses it, and not the RMS norm."""
    return F.layer_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary position: turns each pair (x1, x2) of features of x (B,H,T,head) by its position's angle."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


def causal_attention(q, k, v, future=None):
    """softmax(q k' / sqrt(head)) v, each query seeing no key of its future.

    q (B,H,T,head); k, v (B,H,S,head); future (T,S) is True where the key comes after the query. Returns
    (B,H,T,head). Without future, T = S, a whole text: torch's fused kernel masks by itself.
    """
    if future is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                        # (B,H,T,S)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.out = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, future, layer=0, cache=None):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)      # (B,H,T,head)
                   for y in self.qkv(norm(x)).split(C, dim=-1))
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        x = x + self.proj(causal_attention(q, k, v, future).transpose(1, 2).reshape(B, T, C))
        y = F.relu(self.fc(norm(x)))
        return x + self.out(y * y)


class GPT(nn.Module):
    """GPT(config)(tokens): tokens (B,T) -> next-token logits (B,T,V), float32, at every position.

    bf16=True computes in bfloat16 (autocast); weights stay float32, and logits come out as float32.
    """

    def __init__(self, config, bf16=False):
        super().__init__()
        self.config, self.bf16 = config, bf16
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        half = config.n_embd // config.n_head // 2
        angle = torch.arange(config.block_size)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos(), persistent=False)                  # (T, head/2)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, weight in self.named_parameters():
            fan_in = weight.size(1)
            if name.endswith(("proj.weight", "out.weight", "lm_head.weight")):
                nn.init.zeros_(weight)          # each layer starts as the identity, logits uniform
            else:
                nn.init.normal_(weight, std=1.0 if weight is self.embed.weight else fan_in ** -0.5)

    def precision(self):
        """The autocast context of this model's matrix products."""
        return torch.autocast(self.embed.weight.device.type, torch.bfloat16, enabled=self.bf16)

    def hidden(self, tokens, cache=None):
        """Final hidden states (B,T,C) of tokens (B,T); with a cache, tokens are those after it."""
        T = tokens.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.block_size}")
        keys = torch.arange(T if cache is None else cache.k.size(3), device=tokens.device)
        positions = keys if cache is None else cache.positions(T)
        # The fused kernel is for CUDA: on the CPU the written-out products are faster (bf16, short contexts).
        future = None if tokens.is_cuda and cache is None else keys > positions[:, None]          # (T,S)
        dtype = torch.bfloat16 if self.bf16 else self.embed.weight.dtype
        with self.precision():
            cos, sin = self.cos[positions].to(dtype), self.sin[positions].to(dtype)
            x = norm(self.embed(tokens).to(dtype))                                  # (B,T,C)
            for layer, block in enumerate(self.blocks):
                x = block(x, cos, sin, future, layer, cache)
            if cache is not None:
                cache.length += T
            return norm(x)

    def logits(self, hidden):
        """Logits (B,T,V), float32, of hidden states (B,T,C)."""
        with self.precision():
            return self.lm_head(hidden).float()

    def forward(self, tokens, cache=None):
        return self.logits(self.hidden(tokens, cache))


class Generator(torch.Generator):
    """A stream of randomness of its own, whose state goes into checkpoints."""

    def state_dict(self):
        return {"state": self.get_state()}

    def load_state_dict(self, state):
        self.set_state(state["state"])


def sample_tokens(logits, temperature=1.0, top_k=None, generator=None):
    """One token for each row of logits (B,V), from softmax(logits / temperature): (B,).

    top_k keeps only the k likeliest tokens (for display; rollouts use the whole softmax, or
    the scorer would score another distribution than was sampled). temperature 0 is greedy.
    The draw inverts the cumulative distribution: one uniform number a row, where
    torch.multinomial draws one for each token of the vocabulary, and is slower.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    if temperature != 1:             # the largest first: then no temperature above 0 overflows
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.size(-1):
        best = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(1, best.indices, best.values)
    cdf = logits.softmax(-1).cumsum(-1)                                    # (B,V)
    u = torch.rand(len(cdf), 1, dtype=cdf.dtype, device=cdf.device, generator=generator)
    # The first token whose cdf exceeds u: a token of probability 0 never does first. Where logits are
    # NaN none does, and clamp keeps the index legal until the NaN is reported.
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=cdf.size(-1) - 1).squeeze(-1)


def captured(step, generator):
    """step(), all of whose tensors stay where they are, as one CUDA graph: a launch, where there were hundreds."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def generate(model, prompt, length, temperature=1.0, top_k=None, generator=None, capture=None):
    """Continue prompt (B,T0) by length tokens: (B,T0+length).

    Reads each token once, through a key-value cache. generator: a torch.Generator on the
    model's device, so that sampling has its own stream of randomness. capture(step, generator)
    makes a faster step; by default captured on CUDA and nothing elsewhere.
    """
    capture = capture or (captured if prompt.is_cuda else lambda step, generator: step)
    B, T0 = prompt.shape
    tokens = torch.cat((prompt, prompt.new_zeros(B, length)), dim=1)
    dtype = torch.bfloat16 if model.bf16 else model.embed.weight.dtype
    cache = KVCache(model.config, B, T0 + length, prompt.device, dtype)

    def step(new=None):
        """Read the tokens new (B,T), or else the newest; draw the one that follows; put it in its place."""
        new = tokens.index_select(1, cache.length[None]) if new is None else new
        logits = model(new, cache)[:, -1]                                           # (B,V)
        drawn = sample_tokens(logits, temperature, top_k, generator)                # (B,)
        tokens.index_copy_(1, cache.length[None], drawn[:, None])

    with model.precision():      # once outside, so that weights are cast once, not at every token
        for t in range(length):
            if t == 2:               # after one such step, which warms up what a capture needs
                step = capture(step, generator)
            step(prompt) if t == 0 else step()
    return tokens


@torch.no_grad()
def sample_completions(model, prompt, n, length, generator, batch=512):
    """n completions (n,length), without the prompt (1,T0), from the whole softmax at temperature 1."""
    parts = [generate(model, prompt.expand(min(batch, n - start), -1), length, generator=generator)
             for start in range(0, n, batch)]
    return torch.cat(parts)[:, prompt.size(1):]


def completion_logits(model, prompt, tokens):
    """Logits (B,T,V) that predict completions tokens (B,T) after prompt (1,T0): those one position earlier."""
    inputs = torch.cat((prompt.expand(len(tokens), -1), tokens), 1)[:, :-1]
    return model.logits(model.hidden(inputs)[:, prompt.size(1) - 1:])


@torch.no_grad()
def in_chunks(function, tokens, size=64):
    """function over the rows of tokens, a few at a time so that logits stay in the cache, concatenated."""
    return torch.cat([function(chunk) for chunk in tokens.split(size)])


def make_optimizers(model, matrix_lr, embed_lr, weight_decay=0.0):
    """Muon for the matrices inside the blocks, AdamW for all else: a list of two optimizers.

    Muon (Jordan 2024) orthogonalises each matrix's momentum; embeddings and the output
    layer, whose rows are tokens, do better with Adam.
    """
    matrices = list(model.blocks.parameters())
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [torch.optim.Muon(matrices, lr=matrix_lr, momentum=0.95, weight_decay=weight_decay,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=embed_lr, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)]


def has_bf16(device):
    """Whether bfloat16 products are faster than float32 on this device, by its instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capable = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))


def load_gpt(state, device="cpu", bf16=False):
    """The GPT of a checkpoint: its "config" and "model" are all it takes."""
    model = GPT(GPTConfig(**state["config"]), bf16)
    model.load_state_dict(state["model"])
    return model.to(device)


if __name__ == "__main__":
    model = GPT(GPTConfig())
    print(model.config, f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print("logits", tuple(model(torch.zeros(2, 10, dtype=torch.long)).shape))
