"""The transformer and the sampler: what is sampled is exactly what is scored."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F

import gpt
from conftest import assert_close, chi_square_p, loops, randn
from gpt import (GPT, Block, GPTConfig, KVCache, causal_attention, completion_logits, generate, in_chunks, make_optimizers,
                 norm, rotate, sample_completions, sample_tokens)

# A statistical test passes at p > ALPHA: with a fresh seed it would fail once in 10,000 runs.
ALPHA = 1e-4


def new_cache(model, batch, length):
    return KVCache(model.config, batch, length, model.embed.weight.device, model.embed.weight.dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def streams(n, length, seed=1):
    return loops(n, length, seeded(seed))


def bigram(probs):
    """A real GPT, weights set by hand: after token i, token j has probability probs[i][j]."""
    V = len(probs)
    model = GPT(GPTConfig(vocab_size=V, block_size=16, n_layer=1, n_head=1, n_embd=8)).requires_grad_(False)
    model.embed.weight.copy_(randn(V, 8, dtype=torch.float32))
    # The one block starts as the identity, so hidden states are a function of the last token alone.
    states = model.hidden(torch.arange(V)[:, None])[:, 0]                           # (V,8)
    model.lm_head.weight.copy_((torch.linalg.pinv(states) @ torch.tensor(probs).log()).T)
    return model


# ---- a pass ---------------------------------------------------------------------------------

@pytest.mark.parametrize("bf16", [False, True])
def test_logits_come_at_every_position_and_in_float32(trained, bf16):
    """PPO scores every token, so (B,T,V) and not the last position only; losses need float32."""
    model = copy.deepcopy(trained)
    model.bf16 = bf16
    logits = model(streams(3, 10))
    assert logits.shape == (3, 10, 16), "logits should be (B,T,V)"
    assert logits.dtype == torch.float32, "log-softmax of bf16 logits loses two digits: return float32"


@pytest.mark.parametrize("training", [False, True])
def test_two_passes_over_the_same_text_agree_to_the_last_bit(trained, training):
    """There is no dropout, so train() and eval() are one: else the ratio is not 1 before the first step."""
    model, tokens = copy.deepcopy(trained).train(training), streams(8, 20)
    assert torch.equal(model(tokens), model(tokens)), "two passes differ: is dropout on?"
    assert torch.equal(model(tokens), trained.eval()(tokens)), "training mode computes something else"


# ---- the pieces -----------------------------------------------------------------------------

@pytest.mark.parametrize("T, S", [(7, 7), (1, 7), (2, 7), (5, 7), (1, 1)])
def test_attention_is_scaled_dot_product_attention_over_the_past(T, S):
    """softmax(q k' / sqrt(d)) v (Vaswani 2017, equation 1); the T queries are the last of S positions."""
    q, k, v = randn(2, 3, T, 4), randn(2, 3, S, 4, seed=1), randn(2, 3, S, 4, seed=2)
    past = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    assert_close(causal_attention(q, k, v, ~past), F.scaled_dot_product_attention(q, k, v, attn_mask=past),
                 "attention differs from torch's own: check the mask, the scale, and softmax over keys")
    if T == S:
        assert_close(causal_attention(q, k, v), causal_attention(q, k, v, ~past), "the fused kernel is not the written-out products")
    if T == S:
        assert_close(causal_attention(q, k, v), causal_attention(q, k, v, ~past), "the fused kernel is not the written-out products")


def test_the_norm_has_unit_mean_square_and_ignores_scale():
    """mean(norm(x)^2) = 1 and norm(c x) = norm(x) for c > 0 (Zhang 2019)."""
    x = randn(3, 32)
    assert_close(norm(x).square().mean(-1), torch.ones(3).double(), "normed features should have mean square 1", atol=1e-4, rtol=0)
    assert_close(norm(100 * x), norm(x), "the norm should not depend on the length of x", atol=1e-4, rtol=0)


def test_rotary_positions_turn_each_pair_by_position_times_frequency():
    """(x1 + i x2) exp(i t theta_j), theta_j = 10000^(-2j/d) (Su 2021, equation 15)."""
    model = GPT(GPTConfig(vocab_size=4, block_size=50, n_layer=1, n_head=2, n_embd=16))    # heads of 8: 4 pairs
    x = randn(2, 2, 50, 8)
    angle = torch.arange(50).double()[:, None] * 10_000.0 ** (-2 * torch.arange(4).double() / 8)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    assert_close(rotate(x, model.cos, model.sin), torch.cat((turned.real, turned.imag), -1),
                 "rotary positions are not a rotation by t * theta", atol=1e-4, rtol=0)


def test_rotary_products_depend_on_relative_position_only():
    """<rotate(q, m), rotate(k, n)> is a function of m - n, and not a constant (Su 2021, section 3.2)."""
    model = GPT(GPTConfig(vocab_size=4, block_size=20, n_layer=1, n_head=1, n_embd=8))
    q, k = (rotate(randn(8, seed=s).expand(1, 1, 20, 8), model.cos, model.sin)[0, 0] for s in (0, 1))
    products = q @ k.T                                                              # (m,n)
    assert_close(products[1:, 1:], products[:-1, :-1], "moving query and key together changed their product", atol=1e-4, rtol=0)
    assert products[0].std() > 0.1, "the product ignores positions altogether"


def test_the_cache_returns_everything_appended_so_far_for_each_layer():
    """Keys stay keys, values stay values, layers stay apart, in the order of reading; what is not read yet is 0."""
    config = GPTConfig(vocab_size=4, block_size=8, n_layer=2, n_head=3, n_embd=12)
    k, v = randn(2, 5, 3, 8, 4), randn(2, 5, 3, 8, 4, seed=1)                       # (layer,B,H,T,head)
    cache = KVCache(config, 5, 8, "cpu", torch.float64)
    for start, end in ((0, 3), (3, 4), (4, 6)):
        for layer in range(2):
            keys, values = cache.append(layer, k[layer, :, :, start:end], v[layer, :, :, start:end])
            assert_close(keys, F.pad(k[layer, :, :, :end], (0, 0, 0, 8 - end)), "the cache lost or moved keys")
            assert_close(values, F.pad(v[layer, :, :, :end], (0, 0, 0, 8 - end)), "the cache lost or moved values")
        cache.length += end - start


def test_a_block_adds_attention_and_then_a_squared_relu():
    """x + proj(attention), then + out(relu(fc(norm(x)))^2) (So 2021); over a single token attention is v."""
    config = GPTConfig(vocab_size=4, block_size=8, n_layer=1, n_head=2, n_embd=16)
    block, x = Block(config).double(), randn(3, 1, 16)
    h = x + block.proj(block.qkv(norm(x))[..., 32:])
    block_output = block(x, torch.ones(1, 4).double(), torch.zeros(1, 4).double(), torch.zeros(1, 1).bool())
    assert_close(block_output, h + block.out(block.fc(norm(h)).clamp(min=0) ** 2), "a layer is not attention and then the mlp")


# ---- logits -----------------------------------------------------------------------------------

def test_the_trained_model_knows_its_language(trained):
    """Guards the other tests: one that stayed uniform (loss log 16 = 2.77) would prove nothing."""
    tokens = streams(256, 24)
    loss = F.cross_entropy(trained(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss < 2.0, f"training does not work: loss {loss:.2f} nats a token"


def test_an_untrained_model_is_uniform():
    """Zero output projections: every token has probability 1/V before the first step."""
    logits = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16))(torch.arange(8)[None])
    assert_close(logits.softmax(-1), torch.full((1, 8, 11), 1 / 11), "an untrained model should know nothing")


@pytest.mark.parametrize("training", [False, True])
def test_changing_token_t_plus_1_leaves_logits_up_to_t_unchanged(trained, training):
    """Causality: p(y_t | y_<t). A model that sees the token it predicts learns to copy it."""
    model, tokens = copy.deepcopy(trained).train(training), streams(8, 20)
    logits = model(tokens)
    for t in range(20):
        other = tokens.clone()
        other[:, t:] = (tokens[:, t:] + 1) % 16
        changed = model(other)
        assert_close(changed[:, :t], logits[:, :t], f"positions before {t} saw token {t}")
        assert (changed[:, t] - logits[:, t]).abs().max() > 0.01, f"position {t} does not see its own token"


def test_reading_the_same_text_at_later_positions_changes_nothing(trained):
    """Queries and keys both turn, values do not: only distances between tokens reach the logits."""
    later, tokens = copy.deepcopy(trained), streams(8, 10)
    later.cos, later.sin = trained.cos[7:], trained.sin[7:]
    assert_close(later(tokens), trained(tokens), "logits depend on where the text stands: are queries and keys both rotated?",
                 atol=1e-4, rtol=1e-4)
    later.cos, later.sin = trained.cos[:1].expand(24, -1), trained.sin[:1].expand(24, -1)
    assert (later(tokens) - trained(tokens)).abs().max() > 0.1, "the model does not use positions at all"


def test_sampling_further_leaves_the_tokens_sampled_so_far_unchanged(trained):
    """Causality while sampling: the first 5 tokens cannot know that 10 more will follow."""
    short, long = (generate(trained, streams(8, 4), n, generator=seeded()) for n in (5, 15))
    assert torch.equal(short, long[:, :9]), "the length still to come changed the tokens already drawn"


@pytest.mark.parametrize("pieces", [[1] * 20, [5] + [1] * 15, [20], [3, 2, 5, 10]], ids=str)
def test_logits_with_the_cache_equal_logits_of_the_whole_sequence(trained, pieces):
    """Reading a batch in pieces through the key-value cache is reading it at once."""
    tokens = streams(8, 20)
    cache = new_cache(trained, 8, 20)
    logits = torch.cat([trained(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    assert_close(logits, trained(tokens), "cached logits differ: check positions, layers and order in the cache",
                 atol=1e-4, rtol=1e-4)
    assert cache.length == 20, "the cache should count the tokens read"


@pytest.mark.parametrize("read", [lambda model: model(streams(2, 25)), lambda model: new_cache(model, 2, 25)], ids=["text", "cache"])
def test_a_context_too_long_is_a_value_error(trained, read):
    """Positions end at block_size = 24; a longer text is refused, and so is room for one."""
    with pytest.raises(ValueError, match="25 tokens do not fit the context of 24"):
        read(trained)


def test_prompt_and_completion_may_fill_the_context_but_not_exceed_it(trained):
    """T0 + length <= block_size, said before any token is drawn."""
    assert generate(trained, streams(2, 4), 20, generator=seeded()).shape == (2, 24)
    with pytest.raises(ValueError, match="context of 24"):
        generate(trained, streams(2, 4), 21, generator=seeded())


def test_heads_need_an_even_number_of_features():
    """Rotary positions turn pairs of features within a head: n_embd / n_head must be even."""
    with pytest.raises(ValueError, match="n_embd 12 must be an even multiple of n_head 4"):
        GPTConfig(n_embd=12, n_head=4)


def test_bf16_log_probabilities_stay_near_float32_ones(trained):
    """bf16 has 8 bits of precision; in matrix products only, a token's log-probability moves a few hundredths."""
    tokens = streams(256, 24)
    half = copy.deepcopy(trained)
    half.bf16 = True
    error = (half(tokens).log_softmax(-1) - trained(tokens).log_softmax(-1))[:, :-1].gather(-1, tokens[:, 1:, None])
    assert error.abs().mean() < 0.02, f"bf16 moves log-probabilities by {error.abs().mean():.3f} nats on average"
    assert error.mean().abs() < 0.003, f"bf16 biases log-probabilities by {error.mean():.4f} nats"
    assert error.abs().max() < 0.3, f"bf16 moves a log-probability by {error.abs().max():.2f} nats"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cpu_and_gpu_log_probabilities_agree(trained):
    """The fused CUDA kernel and the written-out CPU products are the same attention, cached or not."""
    tokens, gpu = streams(8, 20), copy.deepcopy(trained).cuda()
    cache = new_cache(gpu, 8, 20)
    cached = torch.cat([gpu(piece, cache) for piece in tokens.cuda().split([5] + [1] * 15, dim=1)], dim=1)
    for logits in (gpu(tokens.cuda()), cached):
        assert_close(logits.cpu().log_softmax(-1), trained(tokens).log_softmax(-1), "CPU and GPU disagree", atol=1e-3, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_captured_step_draws_the_tokens_that_a_plain_one_draws(trained, bf16):
    """A CUDA graph replays the same kernels on the same memory, and each replay goes on in the stream of randomness."""
    gpu, prompt = copy.deepcopy(trained).cuda(), streams(64, 3).cuda()
    gpu.bf16 = bf16
    plain, replayed = (generate(gpu, prompt, 20, generator=torch.Generator("cuda").manual_seed(0), capture=capture)
                       for capture in (lambda step, generator: step, gpt.captured))
    assert torch.equal(plain, replayed), "captured and plain decoding differ"


# ---- sampling ---------------------------------------------------------------------------------

@pytest.mark.parametrize("options, temperature", [({}, 1), ({"temperature": 0.5}, 0.5), ({"temperature": 2.0}, 2)])
def test_one_step_samples_match_the_softmax(options, temperature):
    """100,000 draws of softmax(logits / temperature), by chi-square; 4 tokens of probability 0 never come."""
    logits = randn(20, dtype=torch.float32) * 2
    logits[[0, 7, 8, 19]] = -math.inf
    draws = sample_tokens(logits.expand(100_000, 20), **options, generator=seeded())
    p = chi_square_p(draws, (logits / temperature).softmax(-1))
    assert p > ALPHA, f"samples do not follow softmax(logits / {temperature})"


@pytest.mark.parametrize("temperature, top_k", [(1.0, 1), (1.0, 5), (0.5, 5), (1.0, 20), (1.0, 25)])
def test_top_k_samples_the_k_likeliest_tokens_in_proportion(temperature, top_k):
    """p_i / (sum of the k largest p) for those k, 0 for all others; k at or above V changes nothing."""
    logits = randn(20, dtype=torch.float32)
    probs = (logits / temperature).softmax(-1)
    probs[probs.argsort(descending=True)[top_k:]] = 0
    draws = sample_tokens(logits.expand(20_000, 20), temperature, top_k, generator=seeded())
    p = chi_square_p(draws, probs / probs.sum())
    assert p > ALPHA, f"top-{top_k} samples do not follow the softmax cut to {top_k} tokens"


def test_rows_are_sampled_from_their_own_logits():
    """Row b's token comes from row b's softmax, here one with a single possible token."""
    wanted = torch.tensor([3, 0, 2, 2, 1])
    logits = torch.full((5, 4), -math.inf).scatter(1, wanted[:, None], 0.0)
    assert torch.equal(sample_tokens(logits, generator=seeded()), wanted), "a row was sampled from another row's logits"


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (0.25, 1), (0.5, 2), (0.75, 2), (1 - 2 ** -53, 2)])
def test_no_uniform_number_reaches_a_token_of_probability_0(monkeypatch, uniform, token):
    """Inverting the cdf (0, 1/2, 1, 1): the first token whose cdf exceeds u, at both ends of [0, 1) too."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **like: torch.full(shape, uniform, dtype=like.get("dtype")))
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    assert sample_tokens(logits).item() == token, f"u = {uniform} should give token {token} of (0, 1/2, 1/2, 0)"


def test_rounding_of_the_cumulative_sum_never_yields_a_token_that_does_not_exist(monkeypatch):
    """A sum of 2,048 rounded probabilities may end below 1: the largest u < 1 still gives one of them."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **like: torch.full(shape, 1 - 2 ** -53, dtype=like.get("dtype")))
    tokens = sample_tokens(randn(100, 2048, dtype=torch.float32))
    assert tokens.max() < 2048, "the draw fell off the end of the vocabulary"


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, None), (1.5, 5)])
def test_generate_draws_what_a_loop_without_cache_draws(trained, temperature, top_k):
    """The oracle reads the whole text again for every token: slow and plain."""
    tokens, generator = streams(8, 4), seeded()
    for _ in range(20):
        new = sample_tokens(trained(tokens)[:, -1], temperature, top_k, generator)
        tokens = torch.cat((tokens, new[:, None]), dim=1)
    fast = generate(trained, streams(8, 4), 20, temperature, top_k, seeded())
    assert torch.equal(fast, tokens), "the cached sampler draws other tokens than the plain loop"


def test_log_probabilities_of_the_sampler_equal_teacher_forced_ones(trained, monkeypatch):
    """log pi(y_t | y_<t) at sampling is what one pass over the finished text gives, token by token."""
    seen = []
    monkeypatch.setattr(gpt, "sample_tokens", lambda logits, *rest: seen.append(logits) or sample_tokens(logits, *rest))
    tokens = generate(trained, streams(32, 4), 20, generator=seeded())
    sampled, forced = (logits.log_softmax(-1).gather(-1, tokens[:, 4:, None])
                       for logits in (torch.stack(seen, dim=1), trained(tokens)[:, 3:-1]))
    assert_close(sampled, forced, "the sampler's log-probability is not the scorer's", atol=1e-4, rtol=0)


def test_temperature_0_is_greedy(trained):
    """The limit of softmax(logits / temperature): every token is the likeliest one, on a whole-sequence pass."""
    tokens = generate(trained, streams(8, 4), 20, temperature=0)
    assert torch.equal(tokens[:, 4:], trained(tokens)[:, 3:-1].argmax(-1)), "a greedy token is not the likeliest"
    assert torch.equal(generate(trained, streams(8, 4), 20, top_k=1), tokens), "top_k = 1 is greedy too"
    assert torch.equal(generate(trained, streams(8, 4), 20, temperature=1e-308), tokens), "a tiny temperature overflows"


def test_pairs_of_tokens_come_as_often_as_they_are_scored(trained):
    """20,000 completions of 2 tokens against p(a) p(b | a), by chi-square; the defaults are the whole softmax."""
    prompt = streams(1, 4)
    first = trained(prompt)[0, -1].softmax(-1)                                      # (16,)
    second = trained(torch.cat((prompt.expand(16, 4), torch.arange(16)[:, None]), 1))[:, -1].softmax(-1)
    draws = generate(trained, prompt.expand(20_000, 4), 2, generator=seeded())[:, 4:]
    assert chi_square_p(draws[:, 0] * 16 + draws[:, 1], (first[:, None] * second).flatten()) > ALPHA, \
        "completions are sampled from another distribution than they are scored with"


def test_a_prompt_is_kept_and_each_row_continues_its_own(trained):
    """generate returns (B,T0+length), prompt first; a row's text does not depend on its neighbours."""
    prompt = streams(8, 4)
    tokens = generate(trained, prompt, 20, temperature=0)
    assert torch.equal(tokens[:, :4], prompt), "the prompt came back changed"
    alone = torch.cat([generate(trained, row, 20, temperature=0) for row in prompt.split(1)])
    assert torch.equal(tokens, alone), "rows of a batch influence each other"


def test_the_same_seed_gives_the_same_samples_and_the_global_stream_is_left_alone(trained):
    """Sampling has its own torch.Generator, so other randomness neither moves it nor is moved."""
    state = torch.get_rng_state()
    first = generate(trained, streams(8, 4), 20, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state), "sampling drew from torch's global generator"
    torch.rand(5)
    assert torch.equal(generate(trained, streams(8, 4), 20, generator=seeded(1)), first), "same seed, other samples"
    assert not torch.equal(generate(trained, streams(8, 4), 20, generator=seeded(2)), first), "the seed is ignored"
    torch.set_rng_state(state)


def test_token_t_is_scored_by_the_logits_at_t_minus_1():
    """A bigram model: log p(0 1 2 0 given 0) = log(1/2 * 1/4 * 1/8 * 3/4), by hand from the table."""
    model = bigram([[1 / 2, 1 / 2 - 1 / 4, 1 / 4], [1 / 2, 3 / 8, 1 / 8], [3 / 4, 1 / 8, 1 / 8]])
    tokens = torch.tensor([[0, 0, 1, 2, 0]])
    logprobs = model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    assert_close(logprobs.flatten().exp(), torch.tensor([1 / 2, 1 / 4, 1 / 8, 3 / 4]), "a token was scored by the wrong position",
                 atol=1e-4, rtol=0)


def test_completions_are_scored_by_the_logits_one_position_earlier(trained):
    """Completion token t stands at T0 + t, so the logits at T0 + t - 1 predict it; the last token's predict nothing."""
    prompt, tokens = streams(1, 4), streams(8, 20)
    whole = trained(torch.cat((prompt.expand(8, 4), tokens), dim=1))
    assert_close(completion_logits(trained, prompt, tokens), whole[:, 3:-1], "completions are scored at shifted positions",
                 atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 10, 13])
def test_sample_completions_draws_n_from_the_whole_softmax_without_the_prompt(trained, n):
    """Batches of 5 share one generator, so 13 completions are those of generate for 5, 5 and 3 rows."""
    prompt, generator = streams(1, 4), seeded()
    expected = torch.cat([generate(trained, prompt.expand(len(rows), 4), 20, generator=generator)[:, 4:]
                          for rows in torch.arange(n).split(5)])
    assert torch.equal(sample_completions(trained, prompt, n, 20, seeded(), batch=5), expected), "other completions than generate's"


def test_chunks_give_what_the_whole_gives(trained):
    """Rows are independent: 13 of them by 5 come back in order, none lost or read twice."""
    tokens = streams(13, 10)
    assert_close(in_chunks(trained, tokens, size=5), trained(tokens), "chunks lost, moved or changed rows", atol=1e-5, rtol=1e-5)


def test_a_model_that_always_says_the_next_number_counts():
    """A fake with a known answer: 0 1 2 3 4 0 1 ... from any start, at temperature 1."""
    table = torch.full((5, 5), 1e-12) + torch.eye(5).roll(1, dims=1)
    tokens = generate(bigram(table.tolist()), torch.tensor([[0], [3]]), 7, generator=seeded())
    assert tokens.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [3, 4, 0, 1, 2, 3, 4, 0]], "each token should follow the one before"


def test_every_parameter_has_exactly_one_optimizer_and_a_step_lowers_the_loss(trained):
    """Muon takes the blocks' matrices (Jordan 2024), AdamW embeddings and output layer; none is left out or taken twice."""
    model, tokens = copy.deepcopy(trained).requires_grad_(True), streams(64, 24)
    optimizers = make_optimizers(model, 1e-3, 1e-3)
    taken = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters()), "a parameter is trained twice or never"

    def loss():
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    before = loss()
    before.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert loss() < before, "a small step along the gradient should lower the loss"


def test_completions_come_from_the_whole_softmax_at_temperature_1():
    """What rollouts draw from, by chi-square: 200 tokens, a long tail, so a top-k or a temperature in the sampler shows."""
    model = GPT(GPTConfig(vocab_size=200, block_size=4, n_layer=1, n_head=1, n_embd=8)).requires_grad_(False)
    model.lm_head.weight.copy_(randn(200, 8) / 3)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    draws = sample_completions(model, prompt, 20_000, 1, seeded(), batch=5000)
    assert draws.shape == (20_000, 1), "completions come without the prompt"
    assert chi_square_p(draws[:, 0], model(prompt)[0, -1].softmax(-1)) > ALPHA, \
        "rollouts are drawn from another distribution than they are scored with"


def test_every_step_after_the_first_two_can_be_captured_and_replayed(trained):
    """capture gets the step and the generator, once; what it returns draws all further tokens, the same ones."""
    replays, generator = [], seeded()
    tokens = generate(trained, streams(8, 4), 20, generator=generator, capture=lambda step, g: lambda: replays.append(g) or step())
    assert replays == [generator] * 18, "18 of 20 tokens should come from the captured step"
    assert torch.equal(tokens, generate(trained, streams(8, 4), 20, generator=seeded())), "captured steps draw other tokens"


def test_decoding_moves_no_tensor_from_step_to_step(trained, monkeypatch):
    """What a capture needs, and no CPU can capture: each step after the first works on tensors that stay where they are."""
    places = []
    monkeypatch.setattr(KVCache, "append", lambda self, *args, old=KVCache.append:
                        places.append((self.k.data_ptr(), self.v.data_ptr(), self.length.data_ptr())) or old(self, *args))
    generate(trained, streams(2, 3), 5, generator=seeded())
    assert len(places) == 15 and len(set(places)) == 1, "a cache that moves cannot be replayed"


def test_decoding_and_scoring_stay_on_the_device_of_the_model_and_never_wait_for_it(trained, monkeypatch):
    """On torch's meta device, which refuses tensors of the CPU and has no values to look at: so would a CUDA graph."""
    monkeypatch.setattr(GPT, "precision", lambda self: contextlib.nullcontext())         # autocast knows no meta device
    model, prompt = copy.deepcopy(trained).to("meta"), torch.zeros(2, 3, dtype=torch.long, device="meta")
    for options in ({}, {"temperature": 0.7, "top_k": 3}, {"temperature": 0}):
        tokens = generate(model, prompt, 5, **options)
        assert tokens.shape == (2, 8) and tokens.is_meta, "decoding left the model's device"
    assert completion_logits(model, prompt[:1], tokens).is_meta, "scoring left the model's device"
    assert KVCache(model.config, 2, 8, "meta", torch.float32).length.is_meta, "the cache counts on another device"


def test_logits_that_are_not_numbers_give_a_token_that_exists():
    """NaN reaches no cumulative sum: the draw stays in the vocabulary, so that check_finite can report the NaN."""
    tokens = sample_tokens(torch.full((3, 5), math.nan), generator=seeded())
    assert ((tokens >= 0) & (tokens < 5)).all(), "a draw from NaN is no token"


def test_bf16_is_bf16_whatever_half_precision_the_device_prefers(trained):
    """CUDA's default of autocast is float16, which overflows at 65,504. Hidden states are kept in bf16 too: half the memory to move."""
    half, default = copy.deepcopy(trained), torch.get_autocast_dtype("cpu")
    half.bf16 = True
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        assert half.precision().fast_dtype == torch.bfloat16, "autocast would use the device's default"
    finally:
        torch.set_autocast_dtype("cpu", default)
    assert half.hidden(streams(2, 5)).dtype == torch.bfloat16, "hidden states should be bf16"
