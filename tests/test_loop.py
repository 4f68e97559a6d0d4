"""The PPO loop as shipped, on a model whose completions can all be enumerated: does it find pi*?

3 tokens, length 4: 81 completions. So KL(pi to rho), KL(pi to pi*), J(pi) and J* are sums, not
estimates. Where token 2 ends a completion there are 31, of 1 to 4 tokens, and two prompts of
different length: all that padding and masks can spoil. At the end of the file the demo of ppo.py.
"""

import copy
import functools
import io
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import ppo
from conftest import assert_close, randn
from data import PAD
from gpt import GPT, GPTConfig, completion_logits, cut_after, norm, padding
from ppo import (PPO, PPOConfig, exact_kl, fit_values, gae, kl_penalised_rewards, leave_one_out,
                 policy_loss, token_logprobs, whiten_groups)

SEQUENCES = torch.cartesian_prod(*[torch.arange(3)] * 4)                # all completions (81,4)
END = 2
ENDED = cut_after(SEQUENCES, END).unique(dim=0)                 # and where 2 ends them (31,4)
PLACES = torch.tensor([27, 9, 3, 1])    # a completion, read to base 3, is its row of SEQUENCES
PROMPTS = torch.tensor([[PAD, 0, 1], [2, 1, 0]])
PROMPT = PROMPTS[:1, 1:]    # two tokens: after one alone, attention could not count zeros
SCORES = randn(81, seed=7)


def place(tokens):
    """The number of each completion (B,4); those that end early count as if 0 followed."""
    return (tokens.clamp(min=0) * PLACES[:tokens.size(1)]).sum(1)


def score_fn(tokens):
    """The score of completions (B,4), out of a table of 81."""
    return SCORES[place(tokens)].float()


def prefix_scores(tokens):
    """The same for every prefix, the empty one first: (B,4) -> (B,5)."""
    return torch.stack([score_fn(tokens[:, :t]) for t in range(tokens.size(1) + 1)], dim=1)


@functools.cache
def rho():
    """A GPT taught to tell prefixes apart, so that its logits are nearly a table's.
    PPO is tested here, not how fast a tiny transformer with random weights learns."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = GPTConfig(vocab_size=3, block_size=8, n_layer=2, n_head=4, n_embd=64)
        guess, model = nn.Linear(64, 80), GPT(config)
    for seed, weight in enumerate(model.parameters()):
        weight.data.copy_(randn(*weight.shape, seed=seed) / weight.size(1) ** 0.5)
    firsts = SEQUENCES[::3]         # nobody reads the last token
    prefix = torch.stack([torch.arange(27) // 3 ** (3 - t) + (3 ** t - 1) // 2 for t in range(4)],
                         dim=1)
    targets = torch.cat((prefix, prefix + 40)).flatten()                # 0 to 39, 40 to 79
    inputs = torch.cat((PROMPTS.repeat_interleave(27, 0), firsts.repeat(2, 1)), dim=1)[:, :-1]
    optimizer = torch.optim.Adam([*model.parameters(), *guess.parameters()], lr=5e-3)
    for _ in range(200):
        hidden = norm(model.stream(inputs, pad=padding(inputs)))[:, 2:]
        loss = F.cross_entropy(guess(hidden).flatten(0, 1), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()
    model.lm_head.weight.data.copy_(randn(3, 64, seed=9) / 8)
    return model.requires_grad_(False)


@torch.no_grad()
def logprobs(model, prompt=PROMPT, tokens=SEQUENCES):
    """log p(y) of all completions of a prompt (1,T0): (81,), or (31,) of those that end."""
    logits = completion_logits(model, prompt.expand(len(tokens), -1), tokens)
    return token_logprobs(logits, tokens).masked_fill(tokens == PAD, 0).sum(1).double()


def kl(p, q):
    """KL(p to q) = sum over y of p (log p - log q), from log-probabilities (81,)."""
    return (p.exp() * (p - q)).sum().item()


def best(beta, prompt=PROMPT, tokens=SEQUENCES):
    """log pi* = log rho + r / beta - log Z."""
    return (logprobs(rho(), prompt, tokens) + SCORES[place(tokens)] / beta).log_softmax(0)


def new_run(seed=0, score=prefix_scores, prompts=PROMPT, end=None, **options):
    """A PPO run that has not begun; it draws from torch's global generator, which has this seed."""
    torch.manual_seed(seed)
    settings = {"length": 4, "batch": 128, "minibatch": 64, "epochs": 2, "iterations": 40,
                "lr": 2e-3, "lam": 1.0, "max_update_kl": 1.0}
    return PPO(rho(), score, prompts, PPOConfig(**{**settings, **options}), end)


def train(**options):
    """A run taken to its end, and its metrics, a dict an iteration."""
    run = new_run(**options)
    return run, [run.step(i) for i in range(run.config.iterations)]


RLOO = {"algorithm": "rloo", "iterations": 40, "lr": 1.2e-3, "batch": 256, "epochs": 1}
LONG = {"iterations": 60, "lr": 2e-3}
SETTINGS = {"simple": {**RLOO, "algorithm": "simple"}, "rloo": RLOO,
            "grpo": {**RLOO, **LONG, "algorithm": "grpo"},
            "ppo": {**RLOO, **LONG, "algorithm": "ppo", "lam": PPOConfig().lam, "minibatch": 128,
                    "max_update_kl": PPOConfig().max_update_kl}}


def weights(model):
    return [x.clone() for x in model.state_dict().values()]


def same(a, b):
    """Whether two lists of tensors agree to the last bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def all_once(run, scale=1.0):
    """A rollout that holds each of the 81 completions once, with random advantages."""
    prompts = PROMPT.expand(81, -1)
    inputs = torch.cat((prompts, SEQUENCES), dim=1)[:, :-1]
    lower = run.ref.stream(inputs, blocks=slice(run.frozen))
    with torch.no_grad():
        scores, so_far, logprobs, ref_logprobs = run.read(prompts, SEQUENCES, lower)
    return {"prompts": prompts, "tokens": SEQUENCES, "mask": torch.ones(81, 4, dtype=torch.bool),
            "lower": lower, "scores": scores, "so_far": so_far, "logprobs": logprobs,
            "ref_logprobs": ref_logprobs, "advantages": scale * randn(81, 4, dtype=torch.float32)}


@pytest.fixture
def spy_on(monkeypatch):
    """spy_on(owner, name): owner.name works as before; a list of (inputs, options, result)."""
    def spy_on(owner, name):
        function, seen = getattr(owner, name), []

        def spy(*inputs, **options):
            seen.append((inputs, options, function(*inputs, **options)))
            return seen[-1][2]

        monkeypatch.setattr(owner, name, spy)
        return seen
    return spy_on


def test_a_batch_has_each_prompt_once_in_its_group_and_nothing_after_the_end():
    """None of 9 prompts comes a second time before all did, and every batch has its own order."""
    assert [ppo.repeat(PROMPTS, n)[:, 2].tolist() for n in (1, 5)] == [[1, 0], [1, 1, 0, 0]]
    run, orders = new_run(prompts=torch.cartesian_prod(torch.arange(3), torch.arange(3)), end=END,
                          group=4), []
    for groups in (5, 9, 9, 20):
        run.config.batch = 4 * groups
        batch = run.rollout()
        prompts = batch["prompts"].view(groups, 4, 2)
        assert (prompts == prompts[:, :1]).all(), "a group has more than one prompt"
        drawn = prompts[:, 0] @ torch.tensor([3, 1])
        for part in drawn.split(9):
            assert len(part.unique()) == len(part), f"a prompt is drawn twice: {drawn.tolist()}"
        orders.append(drawn[:9].tolist())
    assert orders[1] != orders[2], "every batch has the same order of prompts"
    assert torch.equal(cut_after(batch["tokens"], END), batch["tokens"]), "tokens after the end"
    assert torch.equal(batch["mask"], batch["tokens"] != PAD), "the mask is not that of real tokens"
    assert not batch["mask"].all(), "some should end early"


def test_at_the_start_policy_and_reference_are_one():
    """KL exactly 0, to the last bit, with no dropout anywhere: two readings agree."""
    run = new_run()
    first, second = all_once(run), all_once(run)
    assert torch.equal(first["logprobs"], first["ref_logprobs"]), "pi should start as a copy of rho"
    assert same(list(first.values()), list(second.values())), "two readings differ: is dropout on?"
    assert not any(x.requires_grad for x in run.rollout().values()), "rollouts need no gradient"
    metrics = run.step(0)
    assert metrics["ref_kl"] == metrics["exact_kl"] == 0, "iteration 0 samples from rho itself"
    assert metrics["objective"] == metrics["score"], "a policy equal to rho pays exactly nothing"
    run, _ = train(score=lambda tokens: torch.zeros(len(tokens)), iterations=2)
    assert same(weights(run.policy), weights(rho())), "the policy moved, with nothing to gain"


def test_training_leaves_the_reference_alone():
    """A frozen copy: no shared storage, no gradient, no change (nanoChatGPT shares weights)."""
    run = train(iterations=2)[0]
    owners = [{x.data_ptr() for x in model.parameters()} for model in (rho(), run.ref, run.policy)]
    assert len(set.union(*owners)) == sum(map(len, owners)), "policy and reference share storage"
    frozen = not any(x.requires_grad or x.grad is not None for x in run.ref.parameters())
    assert frozen, "the reference has gradients"
    assert same(weights(run.ref), weights(rho())), "training changed the reference"
    assert not same(weights(run.policy), weights(rho())), "training should change the policy"


@pytest.mark.parametrize("algorithm", ["simple", "rloo", "grpo", "ppo"])
def test_the_first_step_is_the_policy_gradient_of_each_completion_by_itself(algorithm, monkeypatch):
    """grad of mean(beta k3 in GRPO - A log pi), each completion read by itself, unpadded."""
    run = new_run(prompts=PROMPTS, end=END, algorithm=algorithm, batch=32, minibatch=32, epochs=1,
                  group=4, lam=0.6, beta=0.7)
    run.policy.lm_head.weight.data += randn(3, 64, dtype=torch.float32) / 8
    parameters, gradients = [p for p in run.policy.parameters() if p.requires_grad], []
    monkeypatch.setattr(run.optimizer, "step",
                        lambda: gradients.append([p.grad for p in parameters]))
    run.step(0)
    own, k3, paid = [], [], []
    for prompt, y, score in zip(run.batch["prompts"], run.batch["tokens"], run.batch["scores"]):
        prompt, y = prompt[prompt != PAD], y[y != PAD]
        text = torch.cat((prompt, y))[None, :-1]
        pi, ref = (token_logprobs(model(text)[:, len(prompt) - 1:], y[None])[0]
                   for model in (run.policy, run.ref))
        own.append(pi)
        k3.append((ref - pi).exp() - 1 + pi - ref)
        paid.append(-(0.0 if algorithm == "grpo" else 0.7) * (pi - ref).detach())
        paid[-1][-1] += score
    to_go = torch.stack([F.pad(x.flip(0).cumsum(0).flip(0), (0, 4 - len(x))) for x in paid])
    values = fit_values(run.batch["so_far"], to_go, run.batch["mask"])
    table = {"simple": to_go, "rloo": leave_one_out(to_go, 4), "grpo": whiten_groups(to_go, 4)}
    advantages = []
    for b, x in enumerate(paid):
        advantages.append(table[algorithm][b, :len(x)] if algorithm != "ppo" else
                          gae(x[None], values[b:b + 1, :len(x)], lam=0.6)[0][0])
    A, penalty = torch.cat(advantages), 0.7 * torch.cat(k3).mean()
    if algorithm != "grpo":
        A, penalty = (A - A.mean()) / A.std(correction=0), 0
    loss = penalty - (A * torch.cat(own)).mean()
    expected = torch.autograd.grad(loss, parameters)
    norm = torch.cat([x.flatten() for x in expected]).norm().clamp(min=1)
    assert run.batch["mask"].float().mean() < 0.9, "this test needs completions that end early"
    assert_close(gradients[0], [x / norm for x in expected],
                 "the step is not that of the shipped advantages: masked wrongly, or changed?",
                 atol=2e-5, rtol=1e-3)


def test_with_learning_rate_0_the_ratio_is_1_in_every_minibatch_of_every_epoch(spy_on):
    """What is scored in the update is what was read at the rollout (Huang 2022)."""
    seen, run = spy_on(ppo, "policy_loss"), new_run(lr=0.0, prompts=PROMPTS, end=END)
    metrics = run.step(0)
    assert len(seen) == 4 and metrics["epochs"] == 2, "2 epochs of 2 minibatches"
    for _, _, (_, info) in seen:
        assert_close(info["ratio"].item(), 1.0, "nothing moved: the ratio is 1", atol=1e-6, rtol=0)
        assert info["clipfrac"] == 0 and abs(info["approx_kl"]) < 1e-9, "nothing moved or clips"
    assert same(weights(run.policy), weights(rho())), "learning rate 0 moved the policy"


def test_each_completion_is_used_once_an_epoch_in_a_new_order(spy_on):
    """Minibatches of 20 from 81 completions: every epoch holds all, shuffled anew, by the seed."""
    def order(seed):
        run = new_run(seed, minibatch=20, epochs=3, max_update_kl=math.inf)
        batch = all_once(run)
        seen = spy_on(ppo, "completion_logits")
        run.update(batch, 1e-3)
        return place(torch.cat([inputs[2] for inputs, _, _ in seen])).view(3, 81)

    epochs = order(seed=0)
    assert torch.equal(epochs.sort(1).values, torch.arange(81).expand(3, 81)), "not each once"
    assert not torch.equal(epochs[0], epochs[1]), "epochs should be reshuffled"
    assert torch.equal(epochs, order(seed=0)), "the order should follow the seed"
    assert not torch.equal(epochs, order(seed=1)), "the order should follow the seed"


def test_gradients_are_clipped_to_norm_1_and_their_norm_is_logged():
    """At advantages of 1e4 Adam gets norm 1, the log has the norm before (Huang 2022)."""
    run = new_run(minibatch=81, epochs=1)
    metrics = run.update(all_once(run, scale=1e4), 2e-3)
    grads = [p.grad.flatten() for p in run.policy.parameters() if p.requires_grad]
    norm = torch.cat(grads).norm().item()
    assert_close(norm, 1.0, "the gradient that reached Adam", atol=1e-3, rtol=0)
    assert metrics["grad_norm"] > 10, "the logged norm should be that before clipping"


def test_values_are_fitted_to_what_did_come(spy_on):
    """To rewards-to-go whatever lambda is, of real tokens."""
    run = new_run(lam=0.3, prompts=PROMPTS, end=END, group=4)
    rewards, fits = spy_on(ppo, "kl_penalised_rewards"), spy_on(ppo, "fit_values")
    run.step(0)
    [((so_far, returns, mask), _, _)] = fits
    to_go = torch.stack([rewards[0][2][:, t:].sum(1) for t in range(4)], 1)
    assert_close(returns, to_go * mask, "values are not fitted to the rewards still to come")
    assert torch.equal(so_far, prefix_scores(run.batch["tokens"])[:, :-1]), "other scores"
    assert torch.equal(mask, run.batch["mask"]) and not mask.all(), "other tokens"


def test_the_learning_rate_falls_to_0():
    """The first iteration has the whole rate, each later one a quarter less; steps are as large."""
    run, moved = new_run(iterations=4, lr=1e-3, batch=8, minibatch=8, epochs=1), []
    for i in range(4):
        run.optimizer.state.clear()             # Adam's moments, which would carry steps over
        before = run.policy.lm_head.weight.detach().clone()
        run.step(i)
        assert_close(run.optimizer.param_groups[0]["lr"], 1e-3 * (1 - i / 4), "the rate")
        gradient = run.policy.lm_head.weight.grad
        step = 1e-3 * (1 - i / 4) * gradient / (gradient.abs() + 1e-3)
        assert_close(before - run.policy.lm_head.weight, step, "the step", atol=2e-7, rtol=0)


@pytest.mark.parametrize("approx_kl, steps", [(0.0099, 9), (0.0101, 2)])
def test_an_early_stop_takes_no_step_after_it_and_leaves_no_gradient(approx_kl, steps, monkeypatch):
    """Of 9 minibatches, those from the third on are said to start at approx_kl; the limit: 0.01."""
    run, taken, infos = new_run(max_update_kl=0.01, minibatch=27, epochs=3), [], []

    def loss(*inputs):
        value, info = policy_loss(*inputs)
        info["approx_kl"] = torch.tensor(approx_kl if len(infos) > 1 else 0.0)
        infos.append({**info, "policy_loss": value.detach()})
        return value, info

    monkeypatch.setattr(ppo, "policy_loss", loss)
    step = run.optimizer.step
    monkeypatch.setattr(run.optimizer, "step", lambda: (step(), taken.append(weights(run.policy))))
    metrics = run.update(all_once(run), 2e-3)
    assert len(taken) == steps, f"{len(taken)} optimizer steps, {steps} expected"
    assert same(weights(run.policy), taken[-1]), "the policy moved after its last step"
    run.update(all_once(run, scale=0.0), 2e-3)
    # Adam moves on by momentum; but of the gradients of the update before nothing may be left.
    stale = any(p.grad is not None and p.grad.any() for p in run.policy.parameters())
    assert not stale, "a stale gradient was added"
    assert_close(metrics["epochs"], steps / 3, "an epoch is three minibatches")
    assert infos[1]["ratio"] != 1, "the policy has moved away from the one that sampled"
    for name in infos[0]:
        mean = torch.stack([info[name] for info in infos[:steps]]).mean().item()
        assert_close(metrics[name], mean, f"{name} is not the mean over the steps that were taken")


@pytest.mark.parametrize("score", [prefix_scores, score_fn])
def test_values_know_the_score_of_the_prefix_before_each_token(score):
    """First the empty text's score, never one that saw the token; 0 if score_fn tells none."""
    batch = all_once(new_run(score=score))
    expected = prefix_scores(SEQUENCES)[:, :-1] * (score is prefix_scores)
    assert_close(batch["so_far"], expected, "not the score so far")
    assert_close(batch["scores"], SCORES.float(), "the score is not that of the whole completion")
    assert_close(batch["logprobs"].sum(1).double(), logprobs(rho()),
                 "the log-probability is not that of the whole completion", atol=1e-5, rtol=0)


def test_values_are_the_least_squares_fit_over_real_tokens_alone():
    """1, t, t^2, k, kt, k^2 against numpy's lstsq; masks may hide NaN."""
    so_far, returns = randn(90, 4, dtype=torch.float32), randn(90, 4, seed=1)
    mask = randn(90, 4, seed=2) > 0
    k, t = so_far.double(), (torch.arange(4).double() / 4).expand(90, 4)
    terms = torch.stack((t ** 0, t, t ** 2, k, k * t, k ** 2), dim=-1)
    expected = np.linalg.lstsq(terms[mask].numpy(), returns[mask].numpy(), rcond=None)[0]
    values = fit_values(so_far, returns.masked_fill(~mask, math.nan), mask)
    assert_close(values.double(), terms @ torch.from_numpy(expected), "another fit", atol=1e-5,
                 rtol=0)
    assert not fit_values(so_far, returns, torch.zeros_like(mask)).any(), "fitted to padding"
    alike = torch.full((90, 4), 3.0)        # nothing to forecast: whitening would amplify an error
    assert_close(fit_values(alike, alike, mask), alike, "a constant", atol=1e-6, rtol=0)


@pytest.mark.parametrize("scores", [
    torch.zeros(8, 4), torch.zeros(8, 1), torch.zeros(1), torch.zeros(8, dtype=torch.long)],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype}")
def test_what_has_another_shape_or_type_is_refused_in_a_sentence(scores):
    """Scores (8,1) would broadcast against (8,)."""
    with pytest.raises(AssertionError, match=re.escape(
            f"score_fn must give floats (8,) or (8,5), not {tuple(scores.shape)}")):
        new_run(score=lambda tokens: scores, batch=8).step(0)
    with pytest.raises(AssertionError, match="no algorithm reinforce"):
        new_run(algorithm="reinforce").step(0)


def test_scores_gradients_and_weights_that_are_not_finite_stop_the_run():
    """It says what and when, and the policy is left as it was."""
    run = new_run()
    for bad in (math.nan, -math.inf):
        run.score_fn = lambda tokens: torch.where(torch.arange(len(tokens)) == 3, bad, 1.0)
        with pytest.raises(FloatingPointError, match="scores of the completions"):
            run.step(1)
    with pytest.raises(FloatingPointError, match="gradient is not finite"):
        run.update(all_once(new_run(), scale=math.nan), 2e-3)
    assert same(weights(run.policy), weights(rho())), "a bad number reached the weights"
    options = SimpleNamespace(device="cpu", fresh_samples=8, length=4)
    rho_stage = {"test_prompts": PROMPT, "tokens": SEQUENCES}
    run.score_fn = prefix_scores
    with pytest.raises(FloatingPointError, match="scores of the completions"):
        ppo.evaluate(options, run, lambda tokens: prefix_scores(tokens) * math.nan, rho_stage)
    run.score_fn, run.policy.lm_head.weight.data[1, 0] = score_fn, math.nan
    with pytest.raises(FloatingPointError, match="are not finite"):
        run.step(0)


def test_going_on_from_a_checkpoint_gives_the_same_bits():
    """4 iterations = 2, saved with the global random stream, loaded into a new run, 2 more."""
    options = {"iterations": 4, "adaptive_kl_target": 0.6, "beta": 0.2, "prompts": PROMPTS,
               "end": END}
    whole = new_run(seed=1, **options)
    expected = [whole.step(i) for i in range(4)]
    first = new_run(seed=1, **options)
    metrics, file = [first.step(i) for i in range(2)], io.BytesIO()
    torch.save({name: part.state_dict() for name, part in first.parts.items()}, file)
    stream = torch.get_rng_state()
    second = new_run(seed=99, **options)
    for name, state in torch.load(io.BytesIO(file.getvalue()), weights_only=True).items():
        second.parts[name].load_state_dict(state)
    torch.set_rng_state(stream)
    metrics += [second.step(i) for i in range(2, 4)]
    assert metrics == expected, "the metrics differ: something was lost on the way"
    for part in ("policy", "ref"):
        found, wanted = (weights(getattr(run, part)) for run in (second, whole))
        assert same(found, wanted), f"{part} differs after going on"
    controller = ppo.AdaptiveKL(0.2, 0.6, 10_000.0)
    for row in metrics:                     # in nats per completion, from one step to the next
        assert row["beta"] == controller.beta, "beta follows another KL"
        controller.update(row["ref_kl"], 128)
    drawn = [train(seed=s, iterations=1, prompts=PROMPTS)[0].batch for s in (1, 4)]
    for name in ("tokens", "prompts"):
        assert not torch.equal(drawn[0][name], drawn[1][name]), f"another seed, the same {name}"


def test_clip_and_unfrozen_are_those_of_the_settings(trained, spy_on):
    """The clip range reaches the loss; the last blocks and the output layer alone are trained."""
    seen = spy_on(ppo, "policy_loss")
    new_run(clip=0.35).step(0)
    assert {inputs[3] for inputs, _, _ in seen} == {0.35}
    for unfrozen in range(5):
        config = PPOConfig(unfrozen=unfrozen, batch=8, minibatch=8, length=6, max_update_kl=9.0)
        run = PPO(trained, lambda tokens: tokens.sum(1).float(), PROMPT, config)
        run.step(0)
        names = {name for name, x in run.policy.named_parameters() if x.requires_grad}
        layers = ["blocks.0", "blocks.1", "blocks.2"][max(3 - unfrozen, 0):]
        assert len(names) == 1 + 4 * len(layers), names
        assert all(name.startswith(("lm_head", *layers)) for name in names), names
        batch = run.rollout()           # of a policy that is no longer rho
        for model, name in ((run.policy, "logprobs"), (trained, "ref_logprobs")):
            logits = completion_logits(model, batch["prompts"], batch["tokens"])
            assert_close(batch[name], token_logprobs(logits, batch["tokens"]), f"{name} are others")


@pytest.mark.parametrize("algorithm, beta, limit", [("simple", 1.0, 0.04), ("rloo", 2.5, 0.015),
                                                    ("ppo", 1.0, 0.08)])
def test_the_loop_reaches_the_optimum(algorithm, beta, limit):
    """KL(pi to pi*) = (J* - J(pi)) / beta is small: 0.03, 0.011, 0.05 over seeds."""
    run, metrics = train(beta=beta, **SETTINGS[algorithm])
    gap, start = kl(logprobs(run.policy), best(beta)), kl(logprobs(rho()), best(beta))
    assert gap < limit < 0.2 * start, f"{gap:.4f} nats from pi*, {start:.4f} at first"
    assert {row["beta"] for row in metrics} == {beta}, "beta moved by itself"


def gaps(policy):
    """KL(pi to pi*) over the 31 completions, of each of PROMPTS."""
    found = []
    for prompt in PROMPTS.split(1):
        p = logprobs(policy, prompt, ENDED)
        assert_close(p.exp().sum().item(), 1.0, "these should be all there are", atol=1e-5, rtol=0)
        found.append(kl(p, best(0.5, prompt, ENDED)))
    return found


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_with_ends_the_loop_reaches_the_optimum_of_each_prompt(algorithm):
    """KL(pi to pi*) ends below 0.1, above if a token pays for its own KL only (ZiyueWang25)."""
    run, _ = train(prompts=PROMPTS, end=END, beta=0.5, group=32, **SETTINGS[algorithm] | LONG)
    found = gaps(run.policy)
    assert max(found) < 0.1, f"{found} nats from pi*: does a token pay for the KL of later ones?"


def grpo_fixed_point(beta):
    """log pi (81,) at which GRPO's gradient is 0, in float64, from the last token backward.
    The gradient by the logits of a prefix is pi (Q - V) / std - beta (pi - rho), times how often pi
    visits it: Q the expected score after each token, V = sum of pi Q, std that of the scores under
    pi. It is 0 at pi = rho c / (x - Q) with c = beta std and the x that makes the sum 1."""
    start, std = logprobs(rho()).exp().view(3, 3, 3, 3), torch.ones(()).double()
    for _ in range(60):
        Q, log_pi = SCORES.view(3, 3, 3, 3), torch.zeros(3, 3, 3, 3).double()
        for t in (3, 2, 1, 0):
            weight = start.view(*Q.shape, -1).sum(-1)
            weight = beta * std * weight / weight.sum(-1, keepdim=True)
            low, high = (Q + weight).amax(-1, keepdim=True), Q.amax(-1, keepdim=True) + beta * std
            for _ in range(50):
                x = (low + high) / 2
                above = (weight / (x - Q)).sum(-1, keepdim=True) > 1
                low, high = torch.where(above, x, low), torch.where(above, high, x)
            pi = weight / (high - Q)
            log_pi = log_pi + pi.log().view(*pi.shape, *[1] * (3 - t))
            Q = (pi * Q).sum(-1)
        std = (log_pi.exp() * (SCORES.view_as(log_pi) - Q) ** 2).sum().sqrt()
    return log_pi.flatten()


def test_grpo_reaches_a_fixed_point_of_its_own_which_is_not_the_optimum():
    """The fixed point lies 0.10 nats from pi*: its J is 0.10 below J* at beta 1 (rho's: 0.63).
    The loop ends 0.01 nats from its fixed point. (rho is trained, so machines differ a little.)"""
    for beta, gap in ((0.3, 0.71), (0.5, 0.40), (1.0, 0.10), (2.0, 0.02)):      # results/README.md
        distance = kl(grpo_fixed_point(beta), best(beta))
        assert_close(distance, gap, "results/ is out of date", atol=0.005, rtol=0.05)
    fixed, target = grpo_fixed_point(1.0), best(1.0)
    p = logprobs(train(beta=1.0, **SETTINGS["grpo"])[0].policy)
    assert kl(p, fixed) < 0.03, f"{kl(p, fixed):.4f} nats from its own fixed point"
    assert kl(p, target) > 0.08, f"only {kl(p, target):.4f} nats from pi*"


def test_metrics_are_per_completion_and_of_the_rollout():
    """Means over completions of sums over real tokens, of the policy that sampled them."""
    run = new_run(beta=0.5, prompts=PROMPTS, end=END)
    run.step(0)
    before = copy.deepcopy(run.policy).requires_grad_(False)
    metrics, batch = run.step(1), run.batch
    mask, n = batch["mask"], batch["mask"].sum()
    sums = ((batch["logprobs"] - batch["ref_logprobs"]) * mask).sum(1)
    rewards = kl_penalised_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"], 0.5,
                                   mask)
    to_go = torch.stack([rewards[:, t:].sum(1) for t in range(4)], 1)
    pi, ref = (completion_logits(model, batch["prompts"][:16], batch["tokens"][:16]).log_softmax(-1)
               for model in (before, rho()))
    expected = {"ref_kl": sums.mean(), "ref_kl_se": sums.std() / 128 ** 0.5,
                "exact_kl": exact_kl(pi, ref)[mask[:16]].sum() / 16,
                "score": batch["scores"].mean(),
                "objective": batch["scores"].mean() - 0.5 * sums.mean(),
                "entropy": ppo.entropy(pi)[mask[:16]].mean(), "beta": 0.5, "tokens": n / 128,
                "explained_variance": ppo.explained_variance(
                    fit_values(batch["so_far"], to_go, mask)[mask], to_go[mask])}
    assert_close({name: metrics[name] for name in expected},
                 {name: float(x) for name, x in expected.items()},
                 "not per completion, or not over real tokens", atol=1e-5, rtol=1e-4)
    assert metrics["ref_kl"] != 0, "after an update the policy should differ from rho"


def test_the_demo_finds_the_optimum_of_a_toy_language_and_nears_it(monkeypatch, tmp_path, capsys):
    """32 tokens of 4 bytes alike: J* by recursion, samples and rewards; no model: one line."""
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path), "--beta=2", "--iterations=5"])
    with pytest.raises(SystemExit, match="2"):
        data.run(ppo.main)
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "there is no file" in err, out + err
    config = GPTConfig(vocab_size=4, block_size=40, n_layer=1, n_head=2, n_embd=16)
    data.save_checkpoint(tmp_path / "pretrain.pt", {
        "kind": "pretrain", "config": vars(config), "model": GPT(config).state_dict(),
        "vocabulary": [b"\n", b"!", b"a", b"b"], "start": 0})
    data.run(ppo.main)
    out, _ = capsys.readouterr()
    gain, other, mark = math.exp(1 / 2), 1.0, 0.0       # E[exp(r / 2)] so far, by the last token
    for _ in range(32):
        other, mark = 0.75 * other + (0.5 + 0.25 * gain) * mark, 0.25 * (other + mark)
    best, mean = 2 * math.log(other + gain * mark), 31 / 16 + 1 / 4
    found = [float(x) for x in re.search(r"J (\S+); .* J\* ([\d.]+)", out).groups()]
    assert_close(found, [mean, best], "J of rho and J*", atol=0.15, rtol=0)
    steps = re.findall(r"iteration (\d): score (\S+), KL (\S+), J (\S+)\n", out)
    assert [i for i, *_ in steps] == list("12345"), out
    score, kl, J = map(float, steps[-1][1:])
    assert_close(J, score - 2 * kl, "J is score - beta KL", atol=0.02, rtol=0)
    assert mean + 0.3 * (best - mean) < J < best + 0.2, f"J* is {best}:\n{out}"
    shown = re.findall(r"----- (.+), reward (\S+)\n([^-]*)\n(?=\n-----|\Z)", out)
    assert [name for name, _, _ in shown] == ["before"] * 2 + ["after"] * 2 + ["at the optimum"] * 2
    assert shown[0][2] != shown[2][2], "the sample after is that before"
    assert float(shown[4][1]) + float(shown[5][1]) < 10, "these are the best, not pi*'s"
    for name, reward, text in shown:
        assert float(reward) == ppo.my_reward(text), f"the reward {name} is not that of {text!r}"
