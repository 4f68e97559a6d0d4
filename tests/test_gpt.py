"""The transformer and the sampler: what is sampled is exactly what is scored."""

import copy
import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpt
from conftest import assert_close, chi_square_p, loops, randn
from gpt import (GPT, PAD, Block, GPTConfig, KVCache, Linear, attention, blocked_keys, cast_weights,
                 completion_hidden, completion_logits, compute_dtype, cut_after, generate,
                 in_chunks, load_gpt, make_optimizers, norm, rotate, sample_completions,
                 draw_uniform, sample_tokens)

# A statistical test passes at p > ALPHA: with a fresh seed it would fail once in 10,000 runs.
ALPHA = 1e-4
F32, BF16 = torch.float32, torch.bfloat16
both_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])


def new_cache(model, batch, length, pad=None):
    return KVCache(model.config, batch, length, model.embed.weight.device, model.dtype, pad)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(n, generator=None):
    """The random numbers (n,1) that n rows are sampled with."""
    return draw_uniform(1, n, "cpu", generator or seeded())[0]


def streams(n, length, seed=1):
    return loops(n, length, seeded(seed))


def copy_of(model, dtype):
    """The same weights, computing in another dtype."""
    model = copy.deepcopy(model)
    model.dtype = dtype
    return model


def padded_left(tokens, pads):
    """tokens (B,T) with pads PADs before each row: (B,pads+T)."""
    return F.pad(tokens, (pads, 0), value=PAD)


def logprobs_of(logits, tokens):
    """The log-probability of each of tokens (B,T) under logits (B,T,V): (B,T)."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


# ---- the pieces -----------------------------------------------------------------------------

@pytest.mark.parametrize("T, S", [(7, 7), (2, 7), (1, 1)])
@pytest.mark.parametrize("pads", [None, (0, 2)], ids=["full", "padded"])
def test_attention_is_scaled_dot_product_attention_over_the_past(T, S, pads):
    """softmax(q k' / sqrt(d)) v (Vaswani 2017); the T queries are the last of S positions."""
    q, k, v = randn(2, 3, T, 4), randn(2, 3, S, 4, seed=1), randn(2, 3, S, 4, seed=2)
    pad = None if pads is None else torch.arange(S) < torch.tensor(pads)[:, None]
    y = attention(q, k, v, blocked_keys(T, S, q.device, pad))
    for b in range(2):
        for t in range(T):
            position = S - T + t
            first = 0 if pads is None else min(pads[b], position)     # a padded query sees itself
            seen = slice(first, position + 1)
            weights = (k[b, :, seen] @ q[b, :, t, :, None] / 2).softmax(1)          # (H,S,1)
            assert_close(y[b, :, t], (weights * v[b, :, seen]).sum(1),
                         f"row {b}, query {t}: check the mask, the scale, and softmax over keys")


@pytest.mark.parametrize("offset", [0, 10, 100])
def test_the_norm_is_layer_norm_rounded_once(offset):
    """(x - mean) / deviation (Ba 2016); in bfloat16 only the result is rounded, to 8 bits."""
    x = offset + randn(50, 32)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(norm(x), expected, "not a layer norm")
    rough = x.to(BF16)
    assert norm(rough).dtype == BF16
    assert_close(norm(rough).float(), F.layer_norm(rough.float(), (32,)),
                 "mean or variance was rounded within", rtol=2 ** -8, atol=2e-5)


def test_rotary_positions_turn_each_pair_by_position_times_frequency():
    """(x1 + i x2) exp(i t theta_j), theta_j = 10000^(-2j/d) (Su 2021, equation 15)."""
    model = GPT(GPTConfig(vocab_size=4, block_size=50, n_layer=1, n_head=2, n_embd=16))
    x = randn(2, 2, 50, 8)                                                  # heads of 8: 4 pairs
    angle = torch.arange(50).double()[:, None] * 10_000.0 ** (-2 * torch.arange(4).double() / 8)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    assert_close(rotate(x, model.cos, model.sin), torch.cat((turned.real, turned.imag), -1),
                 "rotary positions are not a rotation by t * theta", atol=1e-4, rtol=0)


def test_a_block_adds_attention_and_then_a_squared_relu():
    """x + proj(attention), then + out(relu(fc)^2) (So 2021); over one token attention is v."""
    config = GPTConfig(vocab_size=4, block_size=8, n_layer=1, n_head=2, n_embd=16)
    block, x = Block(config).double(), randn(3, 1, 16)
    for seed, layer in enumerate((block.proj, block.out)):
        torch.nn.init.normal_(layer.weight, generator=seeded(seed))        # they start at 0
    h = x + block.proj(block.qkv(norm(x))[..., 32:])
    y = block(x, torch.ones(1, 4).double(), torch.zeros(1, 4).double(), torch.zeros(1, 1).bool())
    assert_close(y, h + block.out(block.fc(norm(h)).clamp(min=0) ** 2), "not attention, then mlp")


def test_heads_need_an_even_number_of_features():
    """Rotary positions turn pairs of features within a head: n_embd / n_head must be even."""
    with pytest.raises(ValueError, match="n_embd 12 must be an even multiple of n_head 4"):
        GPTConfig(n_embd=12, n_head=4)


# ---- dtypes ---------------------------------------------------------------------------------

class Results(TorchDispatchMode):
    """Notes what every operation of torch gives: {floating dtype: names of operations}."""

    def __init__(self):
        super().__init__()
        self.names = defaultdict(set)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.is_floating_point():
                self.names[x.dtype].add(operation.overloadpacket.__name__)
        return result


def scoring(model, prompts, tokens):
    return in_chunks(lambda *rows: completion_logits(model, *rows), prompts, tokens)


def training_step(model, prompts, tokens):
    logits = completion_logits(model.requires_grad_(True), prompts, tokens)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    assert {p.grad.dtype for p in model.parameters()} == {F32}, "gradients should be float32"


# Passes over prompts (B,T0) with padding and completions (B,T).
PASSES = {"forward": lambda model, prompts, tokens: model(tokens),
          "decoding": lambda model, prompts, tokens: generate(model, prompts, 5),
          "scoring": scoring, "training": training_step}
# Where tensors flow: all floating ones that go in and come out there are in the compute dtype.
PLACES = {"residual stream": (Block, "forward"), "norm": (gpt, "norm"), "angles": (gpt, "rotate"),
          "q, k, v, attended": (gpt, "attention"), "products": (Linear, "forward"),
          "mlp": (F, "relu"), "hidden states": (GPT, "hidden"), "cache": (KVCache, "append")}


@both_dtypes
@pytest.mark.parametrize("name", PASSES)
def test_every_tensor_has_the_dtype_that_the_docstring_states(trained, monkeypatch, name, dtype):
    """Weights and logits float32, all between in the compute dtype; only decoding casts weights."""
    model = copy_of(trained, dtype)
    seen, used = defaultdict(set), set()

    def spy(owner, name, place):
        old = getattr(owner, name)

        def spied(*args, **kwargs):
            result = old(*args, **kwargs)
            tensors = [x for x in tree_leaves((args, result)) if torch.is_tensor(x)]
            seen[place] |= {x.dtype for x in tensors if x.is_floating_point()}
            if owner is Linear:
                used.add(args[0].weight.dtype)
            return result
        monkeypatch.setattr(owner, name, spied)

    for place, (owner, function) in PLACES.items():
        spy(owner, function, place)
    monkeypatch.setattr(GPT, "logits", lambda self, hidden, old=GPT.logits:
                        seen["logits"].add((result := old(self, hidden)).dtype) or result)
    with Results() as results:
        PASSES[name](model, padded_left(streams(4, 3), 2), streams(4, 10, seed=2))
    places = set(PLACES) - (set() if name == "decoding" else {"cache"})
    assert seen == {place: {dtype} for place in places} | {"logits": {F32}}
    assert {p.dtype for p in model.parameters()} == {F32}, "the model's weights were cast"
    assert used == {dtype if name == "decoding" else F32}, "weights are cast at another place"
    assert set(results.names) <= {dtype, F32, torch.float64}, "float16 overflows at 65,504"
    if name in ("forward", "scoring"):
        assert torch.float64 not in results.names
        if dtype == BF16:
            # Rows of tables, and the logits, cast and joined; nothing is computed.
            moved = {"embedding", "slice", "_to_copy", "cat"}
            assert results.names[F32] <= moved, "something is computed in float32"


def test_bf16_log_probabilities_stay_near_float32_ones(trained):
    """bfloat16 has 8 bits: log-probabilities move by a few hundredths, without bias."""
    tokens = streams(256, 24)
    error = logprobs_of(copy_of(trained, BF16)(tokens)[:, :-1], tokens[:, 1:]) \
        - logprobs_of(trained(tokens)[:, :-1], tokens[:, 1:])
    assert 0 < error.abs().mean() < 0.02, "too far on average, or not in bfloat16 at all"
    assert error.mean().abs() < 0.003, f"bf16 biases log-probabilities by {error.mean():.4f} nats"
    assert error.abs().max() < 0.3, f"bf16 moves a log-probability by {error.abs().max():.2f} nats"


@both_dtypes
def test_a_cast_copy_follows_the_weights_at_the_next_call(trained, dtype):
    """The policy is updated between rollouts: none may be drawn with older weights."""
    model, prompts = copy_of(trained, dtype).requires_grad_(True), streams(8, 4)
    before = generate(model, prompts, 20, generator=seeded())
    weights = [p.detach().clone() for p in model.parameters()]
    assert (cast_weights(model) is model) == (dtype == F32), "copies only what needs a cast"
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(prompts).square().mean().backward()
    optimizer.step()
    for p, old, cast in zip(model.parameters(), weights, cast_weights(model).parameters()):
        assert not torch.equal(p, old) and torch.equal(p.to(dtype), cast), "the copy is an old one"
    after = generate(model, prompts, 20, generator=seeded())
    fresh = load_gpt({"config": vars(model.config), "model": model.state_dict()}, dtype=dtype)
    assert fresh.dtype == dtype and fresh.embed.weight.dtype == F32
    assert torch.equal(after, generate(fresh, prompts, 20, generator=seeded()))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("capable, dtype", [
    ({"avx512_fp16": True}, F32),
    ({"avx512_bf16": True, "cpu_name": "AMD Zen 4"}, BF16),
    ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, F32),
    ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, BF16)])
def test_the_compute_dtype_is_bfloat16_where_the_cpu_is_fast_at_it(monkeypatch, capable, dtype):
    """Emulated bfloat16 would be slower than float32, so is Intel's without AMX; never float16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)
    assert compute_dtype(torch.device("cpu")) == dtype


# ---- logits -----------------------------------------------------------------------------------

def test_an_untrained_model_is_uniform():
    """Zero output projections: every token has probability 1/V before the first step."""
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16))
    probs = model(torch.arange(8)[None]).softmax(-1)
    assert_close(probs, torch.full((1, 8, 11), 1 / 11), "not 1/V")


@both_dtypes
def test_two_passes_over_the_same_text_agree_to_the_last_bit(trained, dtype):
    """No dropout: train() and eval() are one, else the ratio is not 1 before the first step."""
    model, tokens = copy_of(trained, dtype), streams(8, 20)
    logits = model.eval()(tokens)
    assert logits.shape == (8, 20, 16), "logits should come at every position"
    for _ in range(2):
        assert torch.equal(model.train()(tokens), logits), "two passes differ: is dropout on?"


def test_changing_token_t_plus_1_leaves_logits_up_to_t_unchanged(trained):
    """Causality: p(y_t | y_<t). A model that sees the token it predicts learns to copy it."""
    tokens = streams(8, 20)
    logits = trained(tokens)
    for t in range(20):
        changed = trained(torch.cat((tokens[:, :t], (tokens[:, t:] + 1) % 16), 1))
        assert_close(changed[:, :t], logits[:, :t], f"positions before {t} saw token {t}")
        assert (changed[:, t] - logits[:, t]).abs().max() > 0.01, f"position {t} is blind to itself"


def test_reading_the_same_text_at_later_positions_changes_nothing(trained):
    """Queries and keys both turn, values do not: only distances count (Su 2021, section 3.2)."""
    later, tokens = copy.deepcopy(trained), streams(8, 10)
    later.cos, later.sin = trained.cos[7:], trained.sin[7:]
    assert_close(later(tokens), trained(tokens), "logits depend on where the text stands",
                 atol=1e-4, rtol=1e-4)
    later.cos, later.sin = trained.cos[:1].expand(24, -1), trained.sin[:1].expand(24, -1)
    assert (later(tokens) - trained(tokens)).abs().max() > 0.1, "positions are not used at all"


@pytest.mark.parametrize("pieces", [[1] * 20, [5] + [1] * 15, [20], [3, 2, 5, 10]], ids=str)
@pytest.mark.parametrize("pads", [0, 2])
def test_logits_with_the_cache_equal_logits_of_the_whole_sequence(trained, pieces, pads):
    """Reading a batch in pieces through the key-value cache is reading it at once."""
    tokens = streams(8, 20)
    tokens[:4, :pads] = PAD
    cache = new_cache(trained, 8, 20, tokens[:, :4] == PAD)
    logits = torch.cat([trained(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    assert_close(logits, trained(tokens, pad=tokens == PAD),
                 "check positions, layers, order, padding", atol=1e-4, rtol=1e-4)
    assert cache.length == 20, "the cache should count the tokens read"


@both_dtypes
def test_left_padding_changes_nothing_of_the_text_after_it(trained, dtype):
    """Within rounding, for 0 to 7 PADs; in bfloat16 rounding depends on the position."""
    model = copy_of(trained, dtype)
    texts = [streams(1, 20 - pads, seed=pads) for pads in range(8)]
    batch = torch.cat([padded_left(text, 20 - text.size(1)) for text in texts])
    hidden, logits = model.hidden(batch, pad=batch == PAD), model(batch, pad=batch == PAD)
    assert logits.isfinite().all(), "a query of padding attends to nothing"
    mean, most = (1e-5, 1e-4) if dtype == F32 else (0.02, 0.3)
    for row, text in enumerate(texts):
        for padded, alone in ((hidden, model.hidden(text)), (logits, model(text))):
            error = (padded[row, 20 - text.size(1):] - alone[0]).abs()
            assert error.mean() < mean and error.max() < most, f"{row} PADs: {error.max():.3g} off"


@pytest.mark.parametrize("read", [lambda model: model(streams(2, 25)),
                                  lambda model: new_cache(model, 2, 25),
                                  lambda model: generate(model, streams(2, 4), 21)])
def test_a_context_too_long_is_a_value_error(trained, read):
    """Positions end at block_size = 24: no longer text, no room for one, and no token drawn."""
    with pytest.raises(ValueError, match="25 tokens do not fit the context of 24"):
        read(trained)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cpu_and_gpu_log_probabilities_agree(trained):
    """The CUDA kernel and the written-out CPU products are one attention, cached, padded or not."""
    tokens, gpu = streams(8, 20), copy.deepcopy(trained).cuda()
    for pads in (0, 2):
        tokens[:4, :pads] = PAD
        pad, there = tokens == PAD, tokens.cuda()
        cache = new_cache(gpu, 8, 20, pad[:, :5].cuda())
        cached = torch.cat([gpu(x, cache) for x in there.split([5] + [1] * 15, dim=1)], dim=1)
        for logits in (gpu(there, pad=pad.cuda()), cached):
            assert_close(logits.cpu().log_softmax(-1), trained(tokens, pad=pad).log_softmax(-1),
                         "CPU and GPU disagree", atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype, padded", [(F32, True), (BF16, False)])
def test_decoding_and_scoring_never_leave_or_await_the_device(trained, monkeypatch, dtype, padded):
    """On the meta device, which has no values to look at; what padding() looks at is given."""
    looks = []
    monkeypatch.setattr(gpt, "padding", lambda tokens:
                        looks.append(1) or (tokens == PAD if padded else None))
    model = copy_of(trained, dtype).to("meta")
    prompts = torch.zeros(4, 3, dtype=torch.long, device="meta")
    for options in ({}, {"temperature": 0.7, "top_k": 3}, {"temperature": 0}):
        tokens = generate(model, prompts, 2, **options)
        assert tokens.shape == (4, 5) and tokens.is_meta, "decoding left the model's device"
    assert len(looks) == 3, "decoding looks at the prompts once"
    tokens = sample_completions(model, prompts, 2, None, end=0, batch=2)
    assert tokens.shape == (4, 2) and tokens.is_meta, "sampling left the model's device"
    assert scoring(model, prompts, tokens).is_meta, "scoring left the model's device"


# ---- sampling ---------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, 5), (1.0, 1), (1.0, 25)])
def test_samples_match_the_softmax_of_the_k_likeliest_tokens(temperature, top_k):
    """p_i / (sum of the k largest p), p = softmax(logits / temperature); 4 tokens never come."""
    logits = randn(20, dtype=F32) * 2
    logits[[0, 7, 8, 19]] = -math.inf
    probs = (logits / temperature).softmax(-1)
    probs[probs.argsort(descending=True)[top_k or 20:]] = 0
    draws = sample_tokens(logits.expand(50_000, 20), uniform(50_000), temperature, top_k)
    assert chi_square_p(draws, probs / probs.sum()) > ALPHA


def test_rows_are_sampled_from_their_own_logits():
    """Row b's token comes from row b's softmax, here one with a single possible token."""
    wanted = torch.tensor([3, 0, 2, 2, 1])
    logits = torch.full((5, 4), -math.inf).scatter(1, wanted[:, None], 0.0)
    assert torch.equal(sample_tokens(logits, uniform(5)), wanted)


@pytest.mark.parametrize("number, token", [(0.0, 1), (0.25, 1), (0.5, 2), (0.75, 2),
                                           (1 - 2 ** -53, 2)])
def test_no_uniform_number_reaches_a_token_of_probability_0(number, token):
    """Inverting the cdf (0, 1/2, 1, 1), at both ends too; sums of 2,048 may end below 1."""
    def drawn(logits):
        return sample_tokens(logits, torch.full((len(logits), 1), number, dtype=torch.float64))

    assert drawn(torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])).item() == token
    logits = F.pad(randn(100, 2048, dtype=F32), (0, 1), value=-math.inf)
    assert drawn(logits).max() < 2048
    # NaN reaches no cumulative sum: the draw stays legal, so that check_finite can report it.
    assert 0 <= drawn(torch.full((1, 5), math.nan)) < 5, "a draw from NaN is no token"


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, None), (1.5, 5)])
@pytest.mark.parametrize("pads", [0, 3])
def test_generate_draws_what_a_loop_without_cache_draws(trained, temperature, top_k, pads):
    """The oracle reads the whole text again for every token, and no padding: slow and plain."""
    prompt, generator = streams(8, 4), seeded()
    tokens = prompt
    for _ in range(17):
        new = sample_tokens(trained(tokens)[:, -1], uniform(len(tokens), generator),
                            temperature, top_k)
        tokens = torch.cat((tokens, new[:, None]), dim=1)
    for length in (5, 17):
        fast = generate(trained, padded_left(prompt, pads), length, temperature, top_k, seeded())
        assert torch.equal(fast, padded_left(tokens[:, :4 + length], pads)), "other tokens"


def test_temperature_0_is_greedy(trained):
    """The limit of softmax(logits / temperature): the likeliest token, on a whole-sequence pass."""
    tokens = generate(trained, streams(8, 4), 20, temperature=0)
    assert torch.equal(tokens[:, 4:], trained(tokens)[:, 3:-1].argmax(-1))
    for options in ({"top_k": 1}, {"temperature": 1e-308}):
        assert torch.equal(generate(trained, streams(8, 4), 20, **options), tokens), options


def test_each_row_continues_its_own_prompt(trained):
    """A row's text does not depend on its neighbours, nor on how much they are padded."""
    prompts = [streams(1, 4, seed=row)[:, row % 4:] for row in range(8)]
    batch = torch.cat([padded_left(prompt, 4 - prompt.size(1)) for prompt in prompts])
    tokens = generate(trained, batch, 20, temperature=0)
    for row, prompt in enumerate(prompts):
        alone = generate(trained, prompt, 20, temperature=0)
        assert torch.equal(tokens[row, -alone.size(1):], alone[0]), "rows influence each other"


def test_the_same_seed_gives_the_same_samples_and_the_global_stream_is_left_alone(trained):
    """Sampling has its own stream, which nothing else moves, and whose state can be saved."""
    state = torch.get_rng_state()
    stream = gpt.Generator().manual_seed(1)
    saved = stream.state_dict()
    first = generate(trained, streams(8, 4), 20, generator=stream)
    assert torch.equal(torch.get_rng_state(), state), "sampling drew from torch's global generator"
    torch.rand(5)
    torch.set_rng_state(state)
    other = gpt.Generator().manual_seed(2)
    assert not torch.equal(generate(trained, streams(8, 4), 20, generator=other), first)
    other.load_state_dict(saved)
    assert torch.equal(generate(trained, streams(8, 4), 20, generator=other), first)


@pytest.mark.parametrize("n", [1, 13])
def test_sample_completions_continues_every_prompt_without_it_up_to_its_end(trained, n):
    """Batches of 5 share one generator: 13 completions are generate's for 5, 5, 3 prompts."""
    prompts, generator = padded_left(streams(n, 4), 2), seeded()
    expected = torch.cat([generate(trained, part, 10, generator=generator)[:, 6:]
                          for part in prompts.split(5)])
    for end in (None, 3):
        tokens = sample_completions(trained, prompts, 10, seeded(), end, batch=5)
        assert torch.equal(tokens, cut_after(expected, end)), "other completions than generate's"


def test_cut_after_keeps_each_row_up_to_and_with_its_first_end():
    """Against a loop over rows; what is PAD already stays so, and end None ends nothing."""
    tokens = torch.randint(4, (200, 6), generator=seeded())
    tokens[:100, 4:] = PAD
    expected = []
    for row in tokens.tolist():
        length = row.index(0) + 1 if 0 in row else 6
        expected.append(row[:length] + [PAD] * (6 - length))
    before = tokens.clone()
    cut = cut_after(tokens, 0)
    assert cut.tolist() == expected and torch.equal(tokens, before), "wrong, or changed in place"
    assert torch.equal(cut_after(cut, 0), cut) and torch.equal(cut_after(tokens, None), before)


def test_completions_come_from_the_whole_softmax_at_temperature_1():
    """By chi-square: 200 tokens, a long tail, so a top-k or a temperature in the sampler shows."""
    model = GPT(GPTConfig(vocab_size=200, block_size=4, n_layer=1, n_head=1, n_embd=8))
    model.requires_grad_(False).lm_head.weight.copy_(randn(200, 8) / 3)
    prompts = torch.zeros(20_000, 1, dtype=torch.long)
    draws = sample_completions(model, prompts, 1, seeded(), batch=5000)
    assert chi_square_p(draws[:, 0], model(prompts[:1])[0, -1].softmax(-1)) > ALPHA


# ---- scoring ----------------------------------------------------------------------------------

def test_completions_are_scored_by_what_stands_before_each_token_and_by_no_padding(trained):
    """Token t stands at T0 + t: the state at T0 + t - 1 is known before it; PADs change nothing."""
    prompts, tokens = streams(8, 4), cut_after(streams(8, 15, seed=2), 3)
    assert (tokens[:, -1] == PAD).any() and (tokens[:, -1] != PAD).any()
    padded = padded_left(prompts, 3)
    hidden = completion_hidden(trained, padded, tokens)
    logits = in_chunks(lambda *rows: completion_logits(trained, *rows), padded, tokens, size=3)
    assert hidden.shape == (8, 15, 32) and logits.shape == (8, 15, 16)
    for row in range(8):
        real = tokens[row][tokens[row] != PAD]
        inputs = torch.cat((prompts[row], real))[None, :-1]
        assert_close(hidden[row, :len(real)], trained.hidden(inputs)[0, 3:], "states are shifted",
                     atol=1e-4, rtol=0)
        assert_close(logits[row, :len(real)], trained(inputs)[0, 3:], "logits are shifted",
                     atol=1e-4, rtol=0)


@both_dtypes
def test_log_probabilities_of_the_sampler_equal_teacher_forced_ones(trained, monkeypatch, dtype):
    """log pi(y_t | y_<t) at sampling is what one pass over the text gives: so before the first
    update the mean of k1 over 1,024 completions is 0, within 4 standard errors.

    Token by token to 1e-4 in float32. In bfloat16 products of other shapes may round otherwise: to
    0.1, and 0.001 on average.
    """
    model, prompts, seen = copy_of(trained, dtype), padded_left(streams(1024, 4), 1), []
    monkeypatch.setattr(gpt, "sample_tokens", lambda logits, *rest:
                        seen.append(logits) or sample_tokens(logits, *rest))
    tokens = sample_completions(model, prompts, 12, seeded(), batch=1024)
    sampled = logprobs_of(torch.stack(seen, dim=1), tokens)
    forced = in_chunks(lambda *rows: logprobs_of(completion_logits(model, *rows), rows[1]),
                       prompts, tokens, size=512)
    k1 = (sampled - forced).double()
    mean, most = (1e-5, 1e-4) if dtype == F32 else (1e-3, 0.1)
    assert k1.abs().mean() < mean and k1.abs().max() < most, f"a token is {k1.abs().max():.3g} off"
    k1 = k1.sum(1)                                                                  # (B,)
    assert k1.mean().abs() <= 4 * k1.std() / 32, "ref_kl is not 0 before the first update"


def test_every_parameter_has_exactly_one_optimizer_and_a_step_lowers_the_loss(trained):
    """Muon takes the blocks' matrices (Jordan 2024), AdamW the rest; none is left out or twice."""
    model, tokens = copy.deepcopy(trained).requires_grad_(True), streams(64, 24)
    optimizers = make_optimizers(model, 1e-3, 1e-3)
    taken = [id(p) for optimizer in optimizers for group in optimizer.param_groups
             for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters())

    def loss():
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    before = loss()
    before.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert loss() < before, "a small step along the gradient should lower the loss"


# ---- training -----------------------------------------------------------------------------------

def test_learning_rates_follow_their_schedule_after_a_checkpoint_too():
    """Rate = peak * share; loading an optimizer makes new groups, which must follow as well."""
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizers = [torch.optim.SGD([x], lr=lr) for x, lr in zip(parameters, (0.5, 2.0))]
    for i in range(4):
        gpt.set_rates(optimizers, 1 / (i + 1))
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert_close(rates, [0.5 / (i + 1), 2 / (i + 1)], "the rates do not follow")
        for optimizer in optimizers:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_a_gradient_that_is_not_finite_changes_no_weight():
    """It stops the run before the step; a finite one is clipped to the norm asked for."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.item()
    with pytest.raises(FloatingPointError, match="gradient is not finite"):
        gpt.descend(model(torch.tensor([[math.inf]])).sum(), model, [optimizer])
    assert model.weight.item() == before
    # The bad gradient is still there, and must not join the next.
    norm = gpt.descend(model(torch.tensor([[7.0]])).sum(), model, [optimizer], clip=0.25)
    assert_close([norm.item(), before - model.weight.item()], [7.0, 0.25],
                 "the norm before it is clipped, and the step", atol=1e-5, rtol=0)
