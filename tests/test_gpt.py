"""The transformer, the sampler and pretraining: what is sampled is exactly what is scored."""

import copy
import itertools
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import gpt
from conftest import assert_close, chi_square_p, loops, randn, seeded
from gpt import (GPT, PAD, Block, GPTConfig, attention, attention_bias, completion_logits,
                 cut_after, generate, in_chunks, load_gpt, norm, sample_completions, sample_tokens)

# A statistical test passes at p > ALPHA: with a fresh seed it would fail once in 10,000 runs.
ALPHA = 1e-4
F32, BF16 = torch.float32, torch.bfloat16
both_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])


def streams(n, length, seed=1):
    return loops(n, length, seeded(seed))


def copy_of(model, dtype):
    """The same weights, frozen, computing in this dtype."""
    state = {"config": vars(model.config), "model": model.state_dict()}
    return load_gpt(state, dtype=dtype).requires_grad_(False)


def padded_left(tokens, pads):
    """tokens (B,T) with pads PADs before each row: (B,pads+T)."""
    return F.pad(tokens, (pads, 0), value=PAD)


def logprobs_of(logits, tokens):
    """The log-probability of each of tokens (B,T) under logits (B,T,V): (B,T)."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


@pytest.mark.parametrize("T, S", [(7, 7), (2, 40), (1, 7), (1, 1)])
@pytest.mark.parametrize("pads", [None, (0, 2)], ids=["full", "padded"])
def test_attention_is_scaled_dot_product_attention_over_the_past(T, S, pads):
    """softmax(q k' / sqrt(d) - distance / 2^head) v (Press 2021); T queries are the last of S."""
    q, k, v = randn(2, T, 12), randn(2, S, 4, seed=1), randn(2, S, 4, seed=2)       # 3 heads of 4
    first, bias = pads or (0, 0), torch.full((2, 3, T, S), -math.inf).double()
    for b, h, t in itertools.product(range(2), range(3), range(T)):
        for s in range(first[b], S - T + t + 1):
            bias[b, h, t, s] = -(S - T + t - s) / (1, 2, 4)[h]
    pad = pads and torch.arange(min(S, 3)) < torch.tensor(pads)[:, None]
    y = attention(q, k, v, attention_bias(S - T, S, 3, "cpu", pad).to(q))
    assert y.isfinite().all(), "a softmax over nothing"
    real = bias[:, 0].isfinite().any(-1)                # what padding itself sees is never used
    k, v = k[:, None].expand(2, 3, S, 4), v[:, None].expand(2, 3, S, 4)     # shared by all heads
    expected = F.scaled_dot_product_attention(q.view(2, T, 3, 4).transpose(1, 2), k, v, bias)
    assert_close(y[real], expected.transpose(1, 2).flatten(2)[real],
                 "check the slopes, the mask, the scale, and softmax over keys")


def test_distance_alone_counts_so_texts_may_start_later_and_be_longer_than_windows(trained):
    """A single block knows the order of its past, which without the bias would be a set to it."""
    tokens = streams(8, 12)
    for pads, pieces in ((1, [5, 8]), (5, [17]), (40, [44, 1, 1, 6])):
        moved = padded_left(tokens, pads)
        logits = read_in_pieces(trained, moved, pieces, moved == PAD)[:, pads:]
        assert_close(logits, trained(tokens), f"moved by {pads}", atol=1e-4, rtol=1e-4)
    other = tokens[:, [*range(9), 10, 9, 11]]
    one, two = trained.stream(torch.cat((tokens, other)), blocks=slice(1))[:, -1].chunk(2)
    assert torch.equal((two - one).abs().amax(1) > 1e-3, (other != tokens).any(1)), "no order"
    tokens = streams(256, 72)           # windows have 24; a word and its repetition up to 12
    nats = -logprobs_of(trained(tokens)[:, :-1], tokens[:, 1:]).mean(0)
    assert nats[24:].mean() < nats[12:24].mean() + 0.1 < nats[:12].mean(), "worse beyond a window"


def test_a_block_adds_attention_and_then_a_squared_relu():
    """x + proj(attention), then + out(relu(fc)^2) (So 2021); over one token attention is v."""
    x = 5 + randn(3, 1, 16)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(norm(x), expected, "not a layer norm without weights (Ba 2016)")
    block = Block(GPTConfig(vocab_size=4, block_size=8, n_layer=1, n_head=2, n_embd=16)).double()
    for seed, layer in enumerate((block.proj, block.out)):
        torch.nn.init.normal_(layer.weight, generator=seeded(seed))        # they start at 0
    value = block.qkv(norm(x))[..., 24:]                # 16 queries, 8 keys, 8 values for 2 heads
    h = x + block.proj(torch.cat((value, value), dim=-1))
    y = block(x, torch.zeros(1, 2, 1).double())
    assert_close(y, h + block.out(block.fc(norm(h)).clamp(min=0) ** 2), "not attention, then mlp")


@both_dtypes
def test_the_trunk_is_in_the_compute_dtype_and_logits_in_float32(trained, monkeypatch, dtype):
    """Products, norms and attention, in scoring and in decoding; weights stay float32."""
    model, seen = copy_of(trained, dtype), set()
    for owner, name in ((F, "linear"), (gpt, "norm"), (gpt, "attention")):
        def spied(*inputs, function=getattr(owner, name)):
            result = function(*inputs)
            seen.update(x.dtype for x in (*inputs, result) if x.is_floating_point())
            return result
        monkeypatch.setattr(owner, name, spied)
    logits = completion_logits(model, padded_left(streams(4, 3), 2), streams(4, 10))
    generate(model, streams(4, 3), 5)
    assert seen == {dtype} and logits.dtype == F32
    assert {p.dtype for p in model.parameters()} == {F32}, "the model's weights were cast"


def test_two_passes_agree_to_the_last_bit_and_bf16_ones_stay_near_float32(trained):
    """No dropout, else the ratio is not 1 at first; bfloat16 rounds to 8 bits, without bias."""
    tokens, passes = streams(256, 24), []
    for dtype in (F32, BF16):
        model = copy_of(trained, dtype)
        passes.append(logprobs_of(model.train()(tokens)[:, :-1], tokens[:, 1:]))
        assert torch.equal(logprobs_of(model.eval()(tokens)[:, :-1], tokens[:, 1:]), passes[-1])
    error = passes[1] - passes[0]
    assert 0 < error.abs().mean() < 0.02, "too far on average, or not in bfloat16 at all"
    assert error.mean().abs() < 0.003, f"bf16 biases log-probabilities by {error.mean():.4f} nats"
    assert error.abs().max() < 0.3, f"bf16 moves a log-probability by {error.abs().max():.2f} nats"


@both_dtypes
def test_generate_uses_the_weights_of_the_moment(trained, dtype):
    """The policy is updated between rollouts: no rollout may use older weights."""
    model, prompts = copy_of(trained, dtype).requires_grad_(True), streams(8, 4)
    before = generate(model, prompts, 20, generator=seeded())
    model(prompts).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    after = generate(model, prompts, 20, generator=seeded())
    assert torch.equal(after, generate(copy_of(model, dtype), prompts, 20, generator=seeded()))
    assert not torch.equal(after, before), "sampled with the old weights"


def test_the_compute_dtype_is_bfloat16_where_the_cpu_is_fast_at_it(monkeypatch):
    """Emulated bfloat16 would be slower than float32, so is Intel's without AMX; never float16."""
    bf16 = {"avx512_bf16": True}
    for capable, dtype in [({"avx512_fp16": True}, F32), (bf16 | {"cpu_name": "AMD Zen 4"}, BF16),
                           (bf16 | {"cpu_name": "Intel Xeon"}, F32),
                           (bf16 | {"amx_bf16": True, "cpu_name": "Intel Xeon"}, BF16)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)
        assert gpt.compute_dtype(torch.device("cpu")) == dtype, capable


def test_changing_token_t_plus_1_leaves_logits_up_to_t_unchanged(trained):
    """Causality: p(y_t | y_<t). A model that sees the token it predicts learns to copy it."""
    tokens = streams(8, 20)
    logits = trained(tokens)
    for t in range(20):
        changed = trained(torch.cat((tokens[:, :t], (tokens[:, t:] + 1) % 16), 1))
        assert_close(changed[:, :t], logits[:, :t], f"positions before {t} saw token {t}")
        assert (changed[:, t] - logits[:, t]).abs().max() > 0.01, f"position {t} is blind to itself"


def read_in_pieces(model, tokens, pieces, pad=None):
    """Logits of tokens (B,T) read through a key-value cache, a few positions at a time."""
    cache, logits, start = {}, [], 0
    for piece in tokens.split(pieces, dim=1):
        logits.append(model(piece, start=start, cache=cache, pad=pad))
        start += piece.size(1)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("pieces", [[1] * 40, [5] + [1] * 35, [40], [3, 2, 5, 30]], ids=str)
@pytest.mark.parametrize("pads", [0, 2])
def test_logits_with_the_cache_equal_logits_of_the_whole_sequence(trained, pieces, pads):
    """In pieces or at once, also past the length of training windows, 24."""
    tokens = streams(8, 40)
    tokens[:4, :pads] = PAD
    pad, real = tokens == PAD if pads else None, tokens != PAD
    assert_close(read_in_pieces(trained, tokens, pieces, pad)[real], trained(tokens, pad=pad)[real],
                 "check positions, layers, order, padding", atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cpu_and_gpu_log_probabilities_agree(trained):
    """Cached or not, padded or not."""
    tokens, gpu = streams(8, 20), copy.deepcopy(trained).cuda()
    for pads in (0, 2):
        tokens[:4, :pads] = PAD
        pad, there = tokens == PAD, tokens.cuda()
        for logits in (gpu(there, pad=pad.cuda()),
                       read_in_pieces(gpu, there, [5] + [1] * 15, pad.cuda())):
            assert_close(logits.cpu().log_softmax(-1)[~pad],
                         trained(tokens, pad=pad).log_softmax(-1)[~pad],
                         "CPU and GPU disagree", atol=1e-3, rtol=0)


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, 5), (1.0, 1), (1.0, 25)])
def test_samples_match_the_softmax_of_the_k_likeliest_tokens(temperature, top_k):
    """p_i / (sum of the k largest p), p = softmax(logits / temperature); 4 tokens never come."""
    logits = randn(20, dtype=F32) * 2
    logits[[0, 7, 8, 19]] = -math.inf
    probs = (logits / temperature).softmax(-1)
    probs[probs.argsort(descending=True)[top_k or 20:]] = 0
    numbers = torch.rand(50_000, 1, generator=seeded())
    draws = sample_tokens(logits.expand(50_000, 20), numbers, temperature, top_k)
    assert chi_square_p(draws, probs / probs.sum()) > ALPHA


@pytest.mark.parametrize("number, token", [(0.0, 1), (0.25, 1), (0.5, 2), (0.75, 2),
                                           (1 - 2 ** -24, 2)])
def test_no_uniform_number_reaches_a_token_of_probability_0(number, token):
    """Inverting the cdf (0, 1/2, 1, 1), at both ends too; sums of 2,048 may end below 1."""
    def drawn(logits):
        return sample_tokens(logits, torch.full((len(logits), 1), number))

    assert drawn(torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])).item() == token
    logits = F.pad(randn(100, 2048, dtype=F32), (0, 1), value=-math.inf)
    assert drawn(logits).max() < 2048
    # NaN reaches no cumulative sum: the draw stays legal until the NaN is reported.
    assert 0 <= drawn(torch.full((1, 5), math.nan)) < 5, "a draw from NaN is no token"


def test_cumulative_sums_in_float32_draw_what_exact_ones_draw_but_for_2e_minus_7():
    """Each u lies in the float64 interval of the token that it draws, of 2,048 in a long tail."""
    probs = (3 * randn(1, 2048, dtype=F32)).softmax(-1)
    u = torch.rand(20_000, 1, generator=seeded())
    drawn = sample_tokens(probs.log().expand(20_000, -1), u)
    exact = F.pad(probs.double().cumsum(-1), (1, 0))[0]
    u = u[:, 0] * exact[-1]
    assert (exact[drawn] - 2e-7 < u).all() and (u < exact[drawn + 1] + 2e-7).all()


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, None), (1.5, 5), (0.0, None)])
def test_generate_draws_what_a_loop_without_cache_and_padding_draws(trained, temperature, top_k):
    """The oracle reads a row alone, its whole text again for every token; temperature 0 is greedy.
    Prompts of 1 to 4 tokens, padded on the left, and 70 more, which exceeds the windows' 24."""
    numbers, state = torch.rand(8, 70, generator=seeded()), torch.get_rng_state()
    prompts = [streams(1, 4, seed=row)[:, row % 4:] for row in range(8)]
    batch = torch.cat([padded_left(prompt, 4 - prompt.size(1)) for prompt in prompts])
    drawn = generate(trained, batch, 70, temperature, top_k, seeded())
    assert torch.equal(torch.get_rng_state(), state), "sampling drew from torch's global generator"
    for row, tokens in enumerate(prompts):
        for number in numbers[row].view(70, 1, 1):
            logits = trained(tokens)[:, -1]
            new = logits.argmax(-1)
            if temperature > 0:
                new = sample_tokens(logits, number, temperature, top_k)
            tokens = torch.cat((tokens, new[:, None]), dim=1)
        assert torch.equal(drawn[row, -tokens.size(1):], tokens[0]), f"row {row}: other tokens"


@pytest.mark.parametrize("n", [1, 520])     # two chunks
def test_sample_completions_continues_every_prompt_without_it_up_to_its_end(trained, n):
    """They are generate's, cut after the first token that is the end; lower is what frozen blocks
    give for what was read."""
    prompts = padded_left(streams(n, 4), 2)
    text = generate(trained, prompts, 10, generator=seeded())
    whole = text[:, 6:]
    for frozen in range(3):
        torch.manual_seed(0)
        tokens, lower = sample_completions(trained, prompts, 10, frozen=frozen)
        assert torch.equal(tokens, whole)
        expected = trained.stream(text[:, :-1], pad=text[:, :-1] == PAD, blocks=slice(frozen))
        assert_close(lower[:, 2:], expected[:, 2:], "another stream", atol=1e-4, rtol=1e-4)
    for end in (0, 3):
        torch.manual_seed(0)
        tokens, lower = sample_completions(trained, prompts, 10, end)
        assert_close(lower, trained.stream(text[:, :-1], blocks=slice(0)), "not the embedding")
        for row, found in zip(whole.tolist(), tokens.tolist()):
            length = row.index(end) + 1 if end in row else 10
            assert found == row[:length] + [PAD] * (10 - length), "cut at another place"
    assert torch.equal(cut_after(tokens, end), tokens), "what is cut already stays so"


def test_completions_come_from_the_whole_softmax_at_temperature_1():
    """By chi-square: 200 tokens, a long tail, so a top-k or a temperature in the sampler shows."""
    model = GPT(GPTConfig(vocab_size=200, block_size=4, n_layer=1, n_head=1, n_embd=8))
    prompts = torch.zeros(20_000, 1, dtype=torch.long)
    assert_close(model(prompts[:1]).softmax(-1), torch.full((1, 1, 200), 1 / 200),
                 "uniform before the first step: output projections start at 0")
    model.requires_grad_(False).lm_head.weight.copy_(randn(200, 8) / 3)
    draws, _ = sample_completions(model, prompts, 1)
    assert chi_square_p(draws[:, 0], model(prompts[:1])[0, -1].softmax(-1)) > ALPHA


def test_completions_are_scored_by_what_stands_before_each_token_and_by_no_padding(trained):
    """Token t stands at T0 + t: the state at T0 + t - 1 is known before it; PADs change nothing."""
    prompts, tokens = streams(8, 4), cut_after(streams(8, 15, seed=2), 3)
    assert (tokens[:, -1] == PAD).any() and (tokens[:, -1] != PAD).any()
    prompts = [prompt[None, row % 4:] for row, prompt in enumerate(prompts)]
    padded = torch.cat([padded_left(prompt, 6 - prompt.size(1)) for prompt in prompts])
    logits = in_chunks(lambda *rows: completion_logits(trained, *rows), padded, tokens, size=3)
    assert logits.shape == (8, 15, 16)
    for row in range(8):
        real = tokens[row][tokens[row] != PAD]
        inputs = torch.cat((prompts[row], real[None]), dim=1)[:, :-1]
        assert_close(logits[row, :len(real)], trained(inputs)[0, -len(real):],
                     "logits are shifted, or padding counts", atol=1e-4, rtol=0)
    assert not gpt.token_logprobs(logits, tokens)[tokens == PAD].any(), "padding has no probability"
    assert completion_logits(trained, padded[:0], tokens[:0]).shape == (0, 15, 16), "a share of 0"


@both_dtypes
def test_log_probabilities_of_the_sampler_equal_teacher_forced_ones(trained, monkeypatch, dtype):
    """So before the first update the mean of k1 is 0, within 4 standard errors."""
    model, prompts, seen = copy_of(trained, dtype), padded_left(streams(1024, 4), 1), []
    monkeypatch.setattr(gpt, "sample_tokens", lambda logits, *rest:
                        seen.append(logits) or sample_tokens(logits, *rest))
    tokens, _ = sample_completions(model, prompts, 12)
    sampled = logprobs_of(torch.cat([torch.stack(seen[i:i + 12], 1) for i in (0, 12)]), tokens)
    forced = in_chunks(lambda *rows: logprobs_of(completion_logits(model, *rows), rows[1]),
                       prompts, tokens, size=512)
    k1 = (sampled - forced).double()
    mean, most = (1e-5, 1e-4) if dtype == F32 else (1e-3, 0.1)
    assert k1.abs().mean() < mean and k1.abs().max() < most, f"a token is {k1.abs().max():.3g} off"
    k1 = k1.sum(1)                                                                  # (B,)
    assert k1.mean().abs() <= 4 * k1.std() / 32, "ref_kl is not 0 before the first update"


def test_a_gradient_that_is_not_finite_changes_no_weight():
    """It stops the run before the step; of a finite one the rate and the clip given decide it."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    before = model.weight.item()
    with pytest.raises(FloatingPointError, match="gradient is not finite"):
        gpt.optimizer_step(model(torch.tensor([[math.inf]])).sum(), optimizer, 1.0)
    assert model.weight.item() == before
    # The bad gradient is still there, and must not join the next.
    for lr, *clip, left in ((1.0, 0.25, 0.25), (0.5, 0.25, 0.25), (1.0, 7.0)):
        before = model.weight.item()
        norm = gpt.optimizer_step(model(torch.tensor([[7.0]])).sum(), optimizer, lr, *clip)
        assert_close([norm.item(), before - model.weight.item()], [7.0, left * lr],
                     "the norm before it is clipped, and the step", atol=1e-5, rtol=0)


VERSE = [0, *torch.randint(1, 24, (31,), generator=seeded()).tolist()]     # 0 is the boundary
TEXTS = {"vocabulary": [b"\n\n"] + [b"word%d " % i for i in range(1, 24)], "start": 0,
         "train": torch.tensor(VERSE * 40, dtype=torch.int32),
         "held_out": torch.tensor(VERSE[::-1] * 5, dtype=torch.int32)}


def pretrain(texts=TEXTS, steps=105, block_size=64):
    """The result of gpt.pretrain, and what its loop was told: texts shown, rows by step."""
    options = SimpleNamespace(block_size=block_size, n_layer=1, n_head=2, n_embd=16,
                              pretrain_steps=steps, device=torch.device("cpu"), dtype=F32)
    done, shown, rows = [], [], {}
    loop = SimpleNamespace(steps=lambda n, **parts: (done.append(i) or i for i in range(n)),
                           show=lambda title, text: shown.append((done[-1], title, text)),
                           log=lambda **metrics: rows.update({len(done): metrics}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return gpt.pretrain(options, texts, loop), shown, rows


def test_pretraining_learns_a_verse_and_says_how_it_goes(monkeypatch):
    """Samples at steps 0, 50, 100; a row every ten steps and at the end; the loss falls until the
    verse is known by heart; the result rebuilds the model and holds its bits per byte."""
    rates, step = [], gpt.optimizer_step
    monkeypatch.setattr(gpt, "optimizer_step", lambda loss, optimizer, lr, **options: (
        step(loss, optimizer, lr, **options), rates.append(optimizer.param_groups[0]["lr"])))
    state, shown, rows = pretrain()
    for i, (at, title, text) in enumerate(shown):
        assert at == 50 * i and f"{at} steps" in title, "when it shows a text"
    assert i == 2 and text != shown[0][2] and text.startswith("\n\nword")
    assert list(rows) == [*range(10, 101, 10), 105], "when it logs"
    losses = [row["loss"] for row in rows.values()]
    assert losses[0] > 0.5 and losses[-1] < 0.2, f"not learnt: {losses}"
    assert [i for i, row in rows.items() if "val_bits_per_byte" in row] == [100]
    assert (state["vocabulary"], state["start"]) == (TEXTS["vocabulary"], 0)
    model = load_gpt(state)
    assert state["parameters"] == sum(x.numel() for x in model.parameters())
    bits = gpt.bits_per_byte(model, TEXTS["held_out"], TEXTS["vocabulary"])
    assert_close(state["val_bits_per_byte"], bits, "bits per byte of what is returned")
    assert rates == [gpt.learning_rate(i, 105, 16) for i in range(105)], "learning rates"
    held_out, read = torch.arange(11_000) % 24, []
    monkeypatch.setattr(gpt, "bits_per_byte", lambda model, x, vocabulary: read.append(x) or 0.0)
    pretrain({**TEXTS, "held_out": held_out}, steps=100)
    assert_close(read, [held_out[:10_000], held_out], "bits per byte of another text")


def test_pretraining_moves_every_weight_once_a_step_at_the_rate_of_the_schedule(monkeypatch):
    """None is left out. Adam's first step is the rate, up or down, or 0 where the gradient is."""
    weights, moves, step = [], [], gpt.optimizer_step

    def spy(loss, optimizer, lr, **options):
        weights[:] = optimizer.param_groups[0]["params"]
        before = [p.detach().clone() for p in weights]
        step(loss, optimizer, lr, **options)
        moves.append([p.detach() - x for p, x in zip(weights, before)])
        gradients = [p.grad.sign() * (p.grad.abs() > 1e-6) for p in weights]
        if lr == gpt.learning_rate(0, 3, 16):
            for p, move, sign in zip(weights, moves[0], gradients):
                clear = (sign != 0) | (p.grad == 0)
                assert_close(move[clear], -lr * sign[clear], "no step", atol=1e-2 * lr, rtol=0)

    monkeypatch.setattr(gpt, "optimizer_step", spy)
    state, _, _ = pretrain(steps=3)
    one, two = ([x.data_ptr() for x in y] for y in (weights, state["model"].values()))
    assert sorted(one) == sorted(set(two)) and all(x.any() for x in moves[2]), "one never moves"


def test_pretraining_reads_a_text_without_boundary_in_short_windows(monkeypatch):
    """The text shown is longer than a window; held-out text changes no weight."""
    texts = {**TEXTS, "start": 24, "vocabulary": TEXTS["vocabulary"] + [b"|"]}
    state, [(_, _, text)], rows = pretrain(texts, 3, block_size=16)
    assert 0 < rows[3]["loss"] < 1.5, "it should begin with the bigrams of the text"
    assert text[0] == "|" and len(re.findall(r"\n\n|word|\|", text)) == 1 + 48
    other, _, _ = pretrain({**texts, "held_out": texts["held_out"].flip(0)}, 3, block_size=16)
    assert_close(other["model"], state["model"], "it is trained on held-out text", atol=0, rtol=0)
    sizes = []
    monkeypatch.setattr(gpt, "average", lambda xs, _: sizes.append(sum(x.numel() for x in xs)))
    pretrain(texts, 3, block_size=16)
    assert sizes.count(state["parameters"]) == 1 + 3, "first weights and 3 gradients are averaged"
    with pytest.raises(data.UserError, match="Give a longer --corpus, or a smaller --block-size"):
        pretrain({**texts, "held_out": texts["held_out"][:16]}, 3, block_size=16)


def test_a_model_starts_with_the_bigrams_of_its_text():
    """On a Markov chain of 24 tokens, with a width of nearly its rank: almost the bigrams' loss."""
    rng, chances, tokens = random.Random(0), randn(24, 24).mul(2).exp().tolist(), [0]
    while len(tokens) < 20_000:
        tokens += rng.choices(range(24), chances[tokens[-1]])
    model = GPT(GPTConfig(vocab_size=24, block_size=8, n_layer=1, n_head=1, n_embd=22))
    gpt.bigram_start(model, torch.tensor(tokens, dtype=torch.int32))
    this, following = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
    counts = torch.zeros(24, 24).index_put((this, following), torch.ones(()), accumulate=True)
    best = F.cross_entropy((counts / counts.sum(1, keepdim=True)).log()[this], following)
    loss = F.cross_entropy(model(this[:, None])[:, 0], following)
    assert best < loss < best + 0.05, f"{loss:.3f}, by counts {best:.3f}"


def test_windows_begin_anywhere_each_place_as_likely_as_another(monkeypatch):
    """In both halves of a batch, independently; boundaries, every 32 tokens, get their share."""
    train, asked, windows = TEXTS["train"][:64 + 40], [], gpt.windows
    monkeypatch.setattr(gpt, "windows", lambda tokens, *x: (
        asked.append(x) if tokens is train else None) or windows(tokens, *x))
    pretrain({**TEXTS, "train": train}, steps=150)
    assert [(len(x), length) for x, length in asked] == 150 * [(16, 64 + 1)]
    one, two = torch.cat([x.view(2, 8) for x, _ in asked], dim=1)
    for draws in (one, two, (one - two) % 40):
        assert len(draws.unique()) == 40 and chi_square_p(draws, torch.full((40,), 1 / 40)) > ALPHA
    rows = windows(torch.arange(1000, dtype=torch.int32), one, 7)
    assert_close(rows, one[:, None] + torch.arange(7), "7 tokens from each start, in int64")


def test_the_learning_rate_rises_and_falls():
    """Up in equal steps, level at its peak, down to 0 over the last 60 %."""
    shares = [gpt.learning_rate(i, 1000, 1) for i in range(1000)]
    assert_close([gpt.learning_rate(i, 1000, 4) for i in range(1000)], [x / 4 for x in shares],
                 "the peak is one over the width")
    up = [(i + 1) / (shares.index(1.0) + 1) for i in range(100)]
    expected = [min(1.0, x, (1000 - i) / 600) for i, x in enumerate(up + 900 * [1.0])]
    assert_close(shares, expected, "the schedule")


@pytest.mark.parametrize("length", [1000, 25, 49])
def test_bits_per_byte_are_log_2_of_the_probability_over_the_bytes(trained, length):
    """Window by window: all whole ones are read, and bytes are those of the tokens predicted."""
    tokens = torch.randint(16, (length,), generator=seeded())
    vocabulary = [b"x" * n for n in range(1, 17)]
    bits = size = 0
    for start in range(0, length - 24, 24):
        window = tokens[None, start:start + 25]
        bits -= logprobs_of(trained(window[:, :-1]), window[:, 1:]).sum().item() / math.log(2)
        size += (window[:, 1:] + 1).sum().item()
    assert_close(gpt.bits_per_byte(trained, tokens, vocabulary), bits / size, "bits per byte",
                 atol=0, rtol=1e-5)
