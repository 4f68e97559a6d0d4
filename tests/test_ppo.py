"""The mathematics of PPO: rewards, advantages, losses, KL, the optimum, each as an equation."""

import itertools
import math
import warnings

import pytest
import torch

from conftest import assert_close, randn, seeded
from ppo import (MIN_ESS, AdaptiveKL, PPOConfig, best_of_n, best_of_n_rows, bootstrap, entropy,
                 exact_kl, explained_variance, fraction_of_optimum, frontier, gae, kl_estimates,
                 kl_penalised_rewards, leave_one_out, masked_mean, mixture_log_weights, optimum,
                 policy_loss, pool, rewards_to_go, token_logprobs, whiten, whiten_groups)

B, T = 4, 6
LOG2 = math.log(2)
MASKS = {                                   # which tokens of 4 completions are real
    "no mask": None,
    "right padding": ["111111", "111100", "100000", "110000"],
    "holes": ["101101", "010010", "110110", "001000"],
    "an empty row": ["110100", "000000", "011111", "100001"],
}
MASKS = {name: rows and torch.tensor([[int(c) for c in row] for row in rows])
         for name, rows in MASKS.items()}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def real_tokens(mask, shape=(B, T)):
    """For each row, the positions of its unmasked tokens: oracles see nothing else."""
    mask = torch.ones(shape) if mask is None else mask
    return [row.nonzero().flatten().tolist() for row in mask]


def real(x, mask):
    """The unmasked entries of x, as a flat list of numbers."""
    return [x[b, t].item() for b, row in enumerate(real_tokens(mask, x.shape)) for t in row]


def mean(numbers):
    return torch.tensor(sum(numbers) / len(numbers), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_token_logprobs_are_log_softmax_at_the_token_in_float32(dtype):
    """logit_{y_t} - log sum_v exp(logit_v); a logit 1e4 above the others overflows nothing."""
    logits, tokens = (3 * randn(2, 7, 5)).to(dtype), torch.arange(14).view(2, 7) % 5
    at_token = logits.double().gather(-1, tokens[..., None]).squeeze(-1)
    expected = (at_token - logits.double().exp().sum(-1).log()).float()
    assert_close(token_logprobs(logits, tokens), expected, "not log softmax at that token")
    assert token_logprobs(logits, 0 * tokens - 1).isfinite().all(), "PAD breaks the reading"
    huge = torch.tensor([[[8192.0, 0, -8192], [8192, 8192, 0]]], dtype=dtype)
    logprobs = torch.cat([token_logprobs(huge, torch.full((1, 2), v)) for v in range(3)])
    assert_close(logprobs, torch.tensor([[0, -LOG2], [-8192, -LOG2], [-16384, -8192 - LOG2]]),
                 "huge logits overflow", atol=2e-3, rtol=1e-6)


# All 81 completions of 4 tokens out of 3: (81,4).
SEQUENCES = torch.cartesian_prod(*[torch.arange(3)] * 4)


def tables(seed):
    """A random language over SEQUENCES: the next token's logits (3^t,3) for each prefix."""
    return [randn(3 ** t, 3, seed=10 * seed + t) for t in range(4)]


def spell(tables):
    """The logits (81,4,3) of tables at every token of SEQUENCES."""
    prefix, logits = torch.zeros(81, dtype=torch.long), []
    for t, token in enumerate(SEQUENCES.T):
        logits.append(tables[t][prefix])
        prefix = 3 * prefix + token
    return torch.stack(logits, dim=1)


def probabilities(logits):
    """p(y) = product over t of p(y_t | y_<t), multiplied out: (81,)."""
    return logits.softmax(-1).gather(-1, SEQUENCES[..., None]).squeeze(-1).prod(1)


def sequence_kl(p, q):
    """KL(p to q) = sum over y of p(y) log(p(y) / q(y)), in nats per completion."""
    return (p * (p / q).log()).sum()


def test_the_estimates_average_to_the_kl():
    """E_pi of summed k1, of k3 and of the less noisy exact KL is KL(pi to rho); k2 = k1^2 / 2."""
    pi, rho = spell(tables(1)), spell(tables(2))
    p, kl = probabilities(pi), sequence_kl(probabilities(pi), probabilities(rho))
    k1, k2, k3 = kl_estimates(token_logprobs(pi, SEQUENCES), token_logprobs(rho, SEQUENCES))
    sums = [x.sum(1).double() for x in (k1, exact_kl(pi.log_softmax(-1), rho.log_softmax(-1)), k3)]
    for x in sums:
        assert_close((p * x).sum(), kl, "sums do not average to the KL", atol=1e-5, rtol=0)
    noise, less, _ = ((p * (x - kl) ** 2).sum() for x in sums)
    assert less < 0.5 * noise, "summing over the vocabulary should be less noisy"
    assert_close(k2, k1 ** 2 / 2, "k2 is not k1^2 / 2")
    for size in (50, 1, 1e-3, 1e-6, 1e-9):          # exp - 1, not expm1, would lose digits near 0
        _, _, k3 = kl_estimates(size * torch.linspace(-1, 1, 10_001), torch.zeros(10_001))
        assert k3.isfinite().all() and (k3 >= 0).all(), f"k3 = {k3.min():.1e} is negative"


def test_entropy_and_exact_kl_are_sums_over_the_vocabulary():
    """-sum p log p and sum p (log p - log q), finite at huge logits: log 4, 0, and 1e4."""
    p, q = randn(2, 3, 5).softmax(-1), randn(2, 3, 5, seed=1).softmax(-1)
    assert_close(entropy(p.log()), -(p * p.log()).sum(-1), "the entropy is not -sum p log p")
    assert_close(exact_kl(p.log(), q.log()), (p * (p / q).log()).sum(-1), "not sum p log(p/q)")
    logprobs = torch.tensor([[[1e4, 1e4, 1e4, 1e4], [1e4, 0, 0, 0]]]).log_softmax(-1)
    assert_close(entropy(logprobs), torch.tensor([[math.log(4), 0]]), "huge logits overflow")
    assert_close(exact_kl(logprobs[:, 1:], logprobs[:, 1:].flip(-1)), torch.tensor([[1e4]]),
                 "huge logits overflow")


@masks
def test_reward_is_minus_beta_k1_plus_the_score_on_the_last_real_token(mask):
    """r_t = -beta (log pi_old - log rho)_t + [t last] score (Ziegler 2019), without gradient."""
    scores, logprobs, ref_logprobs = randn(B, seed=2), randn(B, T), randn(B, T, seed=1)
    expected = torch.zeros(B, T).double()
    for b, row in enumerate(real_tokens(mask)):
        for t in row:
            paid = scores[b] if t == row[-1] else 0
            expected[b, t] = -0.3 * (logprobs[b, t] - ref_logprobs[b, t]) + paid
    inputs = [x.requires_grad_() for x in (scores, logprobs, ref_logprobs)]
    found = kl_penalised_rewards(*inputs, 0.3, mask)
    assert not found.requires_grad, "a gradient would add -beta grad log pi: detach the rewards"
    assert_close(found, expected,
                 "check the sign of k1, and that the score is on the last token but padding")


@masks
@pytest.mark.parametrize("gamma, lam, options", [
    (1.0, PPOConfig().lam, {}),                 # by default that of the loop
    (0.9, 0.6, {"gamma": 0.9, "lam": 0.6}), (1.0, 1.0, {"lam": 1.0}), (1.0, 0.0, {"lam": 0.0})])
def test_gae_is_the_double_sum_over_the_real_tokens(mask, gamma, lam, options):
    """A_t = sum_l (gamma lam)^l delta_{t+l} (Schulman 2015, equation 16) without masked ones."""
    rewards, values = randn(B, T), randn(B, T, seed=1)
    expected, baseline, to_go = torch.zeros(3, B, T).double()
    for b, row in enumerate(real_tokens(mask)):
        r, v = rewards[b, row].tolist(), values[b, row].tolist()
        deltas = [r[t] + gamma * (v[1:] + [0.0])[t] - v[t] for t in range(len(r))]
        expected[b, row] = torch.tensor([sum((gamma * lam) ** i * d for i, d in enumerate(
            deltas[t:])) for t in range(len(r))]).double()
        baseline[b, row] = values[b, row]
        to_go[b, row] = torch.tensor([sum(r[t:]) for t in range(len(r))]).double()
    advantages, returns = gae(rewards, values, mask=mask, **options)
    exact = {"atol": 1e-6, "rtol": 1e-6}
    assert_close(advantages, expected, "advantages differ from the double sum", **exact)
    assert_close(returns, expected + baseline, "returns are advantages + values", **exact)
    assert_close(rewards_to_go(rewards, mask), to_go, "not the sum from each token on", **exact)


@pytest.mark.parametrize("group", [2, 3, 6])
def test_completions_are_compared_with_those_of_their_group(group):
    """Return minus mean of the others; GRPO: (score - mean) / deviation of the group."""
    returns, expected, whitened = 3 * randn(6, T) + 5, *torch.zeros(2, 6, T).double()
    for b, t in itertools.product(range(6), range(T)):
        rows = range(b // group * group, b // group * group + group)
        expected[b, t] = returns[b, t] - mean([returns[c, t].item() for c in rows if c != b])
        scores = returns[rows, 0]
        whitened[b, t] = (returns[b, 0] - scores.mean()) / scores.var(correction=0) ** 0.5
    assert_close(leave_one_out(returns, group), expected, "compared with others than its group")
    assert_close(whiten_groups(returns[:, :1].expand(6, T), group), whitened,
                 "not whitened within the group", atol=1e-5, rtol=1e-5)
    assert not whiten_groups(torch.ones(6, T), group).any(), "of equals none stands out"
    with pytest.raises(AssertionError, match="no others"):
        leave_one_out(returns, 1)


@masks
def test_whitening_uses_all_unmasked_tokens_of_the_batch(mask):
    """(x - mean) / sigma, population deviation, over the batch: not by row, not padding."""
    x = 3 * randn(B, T) + 5
    numbers = torch.tensor(real(x, mask)).double()
    expected = (x - numbers.mean()) / numbers.std(correction=0)
    zero = torch.zeros(B, T, dtype=torch.bool) if mask is None else mask == 0
    for shift_mean, shift in ((True, 0), (False, numbers.mean())):
        assert_close(whiten(x, mask, shift_mean), (expected + shift).masked_fill(zero, 0),
                     f"not mean 0 and deviation 1; shift_mean {shift_mean}", atol=1e-6, rtol=1e-6)
    assert not whiten(torch.full((B, T), 7.0), mask).any(), "nothing stands out of equals"


@pytest.mark.parametrize("advantage, ratio, loss, gradient, outside", [
    (1, 1.21, -1.2, 0, 1), (-1, 0.79, 0.8, 0, 1),           # clipped: no more is to be gained
    (1, 1.19, -1.19, -1.19, 0), (-1, 0.81, 0.81, 0.81, 0), (2, 1.0, -2, -2, 0),         # inside
    (1, 0.5, -0.5, -0.5, 1), (-1, 1.5, 1.5, 1.5, 1),        # not clipped: the way back stays open
    (-1, math.exp(50), math.exp(50), math.exp(50), 1)])
def test_the_clipped_surrogate_and_its_gradient(advantage, ratio, loss, gradient, outside):
    """-min(q A, clip(q, 0.8, 1.2) A) (Schulman 2017), finite where exp overflows float32, at 89."""
    inputs = [torch.tensor([[float(x)]], dtype=torch.float64, requires_grad=True)
              for x in (math.log(ratio) - 1, -1, advantage)]
    value, info = policy_loss(*inputs)
    value.backward()
    assert_close(value.item(), float(loss), "another loss", atol=1e-9, rtol=1e-9)
    assert_close(inputs[0].grad.item(), float(gradient), "another gradient", atol=1e-9, rtol=1e-9)
    assert inputs[1].grad is inputs[2].grad is None, "a gradient flows into the rollout: detach it"
    assert not any(x.requires_grad for x in info.values()), "info is for reading: no gradient"
    assert info["clipfrac"] == outside, f"is a ratio of {ratio} outside 1 - 0.2 .. 1 + 0.2?"
    extreme = torch.full((1, 1), 200.0, requires_grad=True)
    policy_loss(extreme, torch.zeros(1, 1), -torch.ones(1, 1))[0].backward()
    assert extreme.grad.isfinite(), "exp overflows in float32"


@masks
def test_policy_loss_is_minus_the_mean_clipped_surrogate_of_real_tokens(mask, clip=0.05):
    """Over unmasked tokens, one by one; approx_kl is the mean k3 of KL(pi_old to pi)."""
    logprobs, old, advantages = 0.2 * randn(B, T), 0.2 * randn(B, T, seed=1), randn(B, T, seed=2)
    ratios = [math.exp(x) for x in real(logprobs - old, mask)]
    surrogate = [min(q * a, min(max(q, 1 - clip), 1 + clip) * a)
                 for q, a in zip(ratios, real(advantages, mask))]
    loss, info = policy_loss(logprobs, old, advantages, clip, mask)
    assert_close(loss, -mean(surrogate), "wrong clipped surrogate")
    expected = {"approx_kl": real(kl_estimates(old, logprobs)[2], mask),
                "clipfrac": [float(abs(q - 1) > clip) for q in ratios], "ratio": ratios}
    for name, numbers in expected.items():
        assert_close(info[name].double(), mean(numbers), f"{name} is not the mean of real tokens",
                     atol=1e-6, rtol=0)


SCORES = torch.tensor([0.5, -1.0, 2.0, -0.3])
FUNCTIONS = {
    "kl_penalised_rewards":
        lambda a, b, c, mask: [kl_penalised_rewards(SCORES[:len(a)], a, b, 0.3, mask)],
    "gae": lambda a, b, c, mask: gae(a, b, 0.9, 0.8, mask),
    "rewards_to_go": lambda a, b, c, mask: [rewards_to_go(a, mask)],
    "whiten": lambda a, b, c, mask: [whiten(a, mask)],
    "whiten, mean kept": lambda a, b, c, mask: [whiten(a, mask, shift_mean=False)],
    "masked_mean": lambda a, b, c, mask: [masked_mean(a, mask)],
    "policy_loss": lambda a, b, c, mask: [(found := policy_loss(a, b, c, mask=mask))[0],
                                          *found[1].values()],}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def inputs(*shape, dtype=torch.float32):
    return [randn(*shape, seed=s, dtype=dtype) for s in range(3)]


@functions
def test_masks_of_any_type_inputs_of_any_shape_type_and_device(function):
    """Ones are no mask; float32 at least; one token is enough; on the device of the inputs."""
    holes = MASKS["holes"]
    cases = [(None, torch.ones(B, T, dtype=d)) for d in (torch.float32, torch.bool, torch.long)]
    for mask, other in [*cases, (holes, holes.bool()), (holes, holes.float())]:
        assert_close(function(*inputs(B, T), other), function(*inputs(B, T), mask),
                     "the same mask as another type changed something")
    for given, wanted in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        output = function(*inputs(B, T, dtype=given), None)[0]
        assert output.dtype == wanted, f"{given} came out as {output.dtype}"
    for shape in ((1, 1), (1, 5), (3, 1)):
        for y in function(*inputs(*shape), None):
            assert y.shape in (shape, ()) and y.isfinite().all(), f"shape {shape} breaks it"
    assert masked_mean(torch.tensor([[math.nan]]), torch.tensor([[0]])) == 0, "an empty mean"
    # torch's meta device refuses tensors of the CPU, as CUDA would.
    there = [x.to("meta") for x in (*inputs(B, T), holes)]
    assert all(y.is_meta for y in function(*there)), "something was computed on the CPU"


@functions
@pytest.mark.parametrize("mask", list(MASKS.values())[1:], ids=list(MASKS)[1:])
@pytest.mark.parametrize("garbage", [math.nan, -math.inf, 1e30])
def test_what_lies_under_the_mask_never_leaks(function, mask, garbage):
    """Masked positions influence no value, come out 0, and get gradient 0."""
    clean = function(*inputs(B, T), mask)
    dirty = [x.masked_fill(mask == 0, garbage).requires_grad_() for x in inputs(B, T)]
    outputs = function(*dirty, mask)
    assert_close(list(outputs), list(clean), f"{garbage} under the mask leaked into the result")
    for y in outputs:
        assert y.dim() < 2 or (y[mask == 0] == 0).all(), "masked positions should come out 0"
    if any(y.requires_grad for y in outputs):
        sum((i + 1) * y.sum() for i, y in enumerate(outputs) if y.requires_grad).backward()
        for x in dirty:
            clean = x.grad is None or x.grad.isfinite().all() and not x.grad[mask == 0].any()
            assert clean, f"{garbage} under the mask leaked into the gradient"


@pytest.mark.parametrize("values, returns, expected", [
    ([1, 2, 3, 4], [1, 2, 3, 4], 1.0), ([5, 5, 5, 5], [1, 2, 3, 4], 0.0),
    ([1, 2, 3, 4], [7, 7, 7, 7], 0.0), ([1, 1, 3, 3], [0, 2, 2, 4], 0.5)])
def test_explained_variance_is_1_if_perfect_and_0_if_constant(values, returns, expected):
    """1 - Var(R - V) / Var(R) of real tokens, 0 where returns do not vary (Huang 2022)."""
    values, returns = torch.tensor([values]).float(), torch.tensor([returns]).float()
    assert_close(explained_variance(values + 9, returns), expected, "wrong", atol=1e-6, rtol=0)
    # Padding on the right, and a completion that is only padding.
    mask, values, returns = (torch.nn.functional.pad(x, (0, 2, 0, 1))
                             for x in (torch.ones_like(values), values, returns))
    found = explained_variance(values.masked_fill(mask == 0, math.nan), returns - 5, mask)
    assert_close(found, expected, "padding counts", atol=1e-6, rtol=0)


@pytest.mark.parametrize("ref_kl, error", [(6.0, 0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2),
                                           (0.0, -0.2)])
def test_the_controller_raises_beta_when_kl_is_above_target(ref_kl, error):
    """e = clip(KL / target - 1, -0.2, 0.2); beta *= 1 + e n / horizon (Ziegler 2019)."""
    controller = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    assert_close(controller.update(ref_kl, n=256), 0.1 * (1 + error * 0.0256), "another beta")
    assert controller.beta == controller.update(6.0, n=256), "the new beta is kept as .beta"


pytestmark = pytest.mark.filterwarnings("ignore:the optimum at beta")   # 81 samples are few


def world(beta, seed=0):
    """rho, scores and pi* = rho exp(r / beta) / Z of all 81 completions, and J* = beta log Z."""
    rho, scores = probabilities(spell(tables(3 + seed))), randn(81, seed=7 + seed)
    Z = (rho * (scores / beta).exp()).sum()
    return rho, scores, rho * (scores / beta).exp() / Z, beta * Z.log()


@pytest.mark.parametrize("beta", [0.05, 0.3, 10.0])
def test_the_optimum_equals_enumeration_and_no_policy_beats_it(beta):
    """J* = beta log Z, its score, its KL; J* - J(pi) = beta KL(pi to pi*) >= 0 (Korbak 2022)."""
    rho, scores, best, objective = world(beta)
    found = optimum(scores, beta, log_weights=rho.log() + 5)       # a constant factor cancels
    expected = {"objective": objective, "score": (best * scores).sum(),
                "ref_kl": sequence_kl(best, rho), "ess": 1 / (best ** 2).sum()}
    assert_close({name: found[name] for name in expected},
                 {name: x.item() for name, x in expected.items()},
                 "not beta log Z, E[r], KL or (sum w)^2 / sum w^2", atol=1e-9, rtol=1e-7)
    for seed, width in itertools.product(range(20), (0, 0.1, 3.0)):
        pi = (best.log() + width * randn(81, seed=seed)).softmax(0)
        J = (pi * scores).sum() - beta * sequence_kl(pi, rho)
        assert J <= found["objective"] + 1e-9, "a policy beats J*"
        assert_close(found["objective"] - J.item(), beta * sequence_kl(pi, best).item(),
                     "the gap to J* is not beta KL(pi to pi*)", atol=1e-9, rtol=1e-7)


def test_the_optimum_does_not_overflow_and_needs_a_positive_beta():
    """Of scores -1e4 and 1e4 at beta 0.01 J* is 1e4 - beta log 2, though exp(1e6) is infinite."""
    found = optimum([-1e4, 1e4], 0.01)
    assert_close(found["objective"], 1e4 - 0.01 * LOG2, "exp(score / beta) overflows")
    with pytest.raises(ValueError, match="beta must be positive"):
        optimum([1.0, 2.0], 0)


@pytest.mark.parametrize("others", [[], [1.0]], ids=["alone", "beside a prompt of many"])
def test_an_optimum_of_few_effective_samples_warns(others):
    """Equal scores weigh alike: n samples are n effective ones, of the prompt with the fewest."""
    for n in (MIN_ESS - 1, MIN_ESS + 1):
        few = torch.cat((torch.zeros(n), torch.full((300 - n,), -1e3)))
        scores = torch.stack((few, *[torch.full((300,), x) for x in others]))
        with warnings.catch_warnings(record=True, action="always") as said:
            found = optimum(scores, 1.0)
        assert_close(found["ess"], float(n), "not the smallest effective sample size")
        assert [str(x.message)[:24] for x in said] == ["the optimum at beta 1 re"] * (n < MIN_ESS)


def draw(probs, n, seed):
    return torch.multinomial(probs, n, replacement=True, generator=seeded(seed))


def test_a_bootstrap_error_is_the_deviation_of_repeated_studies():
    """Within 20 % of 500 repeats', of 2 prompts: of a mean, of a difference and a product of two
    numbers of each completion, of J*, and of the best of 1, 4, 16, 64, 256."""
    def told(x, y):
        return [x[0].mean().item(), (x[0] - x[1]).mean().item(),
                (x[0].mean() * x[1].mean()).item(), optimum(y, 1.0)["objective"]]

    repeats, errors = [], []
    for seed in range(500):
        x = randn(2, 2, 200, seed=seed) + torch.tensor([[[0.0], [9.0]], [[1.0], [2.0]]])
        x[1] = x[0] + 0.3 * x[1]        # of one completion, so nearly alike
        y, z = randn(2, 100, seed=1000 + seed), randn(2, 4000, seed=2000 + seed)
        rows = [best_of_n(z, n)[0] for n in (1, 4, 16, 64, 256)]
        repeats.append(told(x, y) + rows)
        if seed < 10:
            found = best_of_n_rows(z)
            assert [row[1] for row in found] == rows, "not the expected best score"
            errors.append(bootstrap(told, x, y) + [row[2] for row in found])
    assert_close(torch.tensor(errors).mean(0), torch.tensor(repeats).std(0), "wrong errors",
                 atol=0, rtol=0.2)
    assert [row[0] for row in best_of_n_rows(z[:, :20])] == [1, 4, 16], "n above N"


def test_mixture_weights_are_rho_over_the_mixture():
    """rho / sum_i (n_i / N) p_i (balance heuristic, Veach 1995), on average 1; pool() of two."""
    p = torch.stack([probabilities(spell(tables(s))) for s in (3, 4, 5)])           # (policy,y)
    q = (100 * p[0] + 300 * p[1] + 600 * p[2]) / 1000
    weights = mixture_log_weights(p.log(), [100, 300, 600])
    assert_close(weights, (p[0] / q).log(), "not log(rho / mixture)", atol=1e-12, rtol=0)
    ours, old = draw(p[1], 600, 0).view(2, 300), draw(p[0], 200, 1).view(2, 100)
    log_ratio, y = (p[1] / p[0]).log(), torch.cat((old, ours), dim=1)
    rho, pi = (torch.stack((p[2][x], log_ratio[x], p[0][x])) for x in (old, ours))
    samples, weights = pool(rho, pi)
    assert torch.equal(samples, torch.cat((rho, pi), dim=-1)), "rho's first, a row for each prompt"
    assert_close(weights, -(0.25 + 0.75 * p[1] / p[0]).log()[y], "not rho over the mixture")


def study(rho, scores, pi, beta, seed, M=2048, N=1024):
    """What fraction_of_optimum takes, from M samples of rho and N of pi for each prompt (P,81)."""
    samples = []
    for probs, n in ((rho, M), (pi, N)):
        y = torch.stack([draw(p, n, seed + 1000 * i + n) for i, p in enumerate(probs)])
        samples.append(torch.stack((scores.gather(1, y), (pi / rho).log().gather(1, y))))
    return *samples, beta


def test_the_fraction_of_the_optimum_comes_with_an_honest_error(prompts=2, beta=0.5, width=0.8):
    """90 to 99 % of the 95 % intervals of 200 studies hold the exact fraction, and J."""
    worlds = [world(beta, seed) for seed in range(prompts)]
    rho, scores, best = (torch.stack(x) for x in list(zip(*worlds))[:3])
    scores = scores + 2 * torch.arange(prompts)[:, None]        # one prompt scores better
    pi = (rho.log() + width * scores / beta + 0.3 * randn(81, seed=1)).softmax(1)
    J = (pi * scores - beta * pi * (pi / rho).log()).sum(1).mean().item()
    most = torch.stack([x[3] for x in worlds]).mean().item() + (prompts - 1)
    start = (rho * scores).sum(1).mean().item()
    exact = {"objective": J, "optimum": most, "fraction": (J - start) / (most - start)}
    inside = dict.fromkeys(exact, 0)
    for seed in range(200):
        found = fraction_of_optimum(*study(rho, scores, pi, beta, seed))
        found["fraction"] = found["fraction_of_optimum"]
        best = found["optimum"]
        found |= {"optimum": best["objective"], "optimum_se": best["objective_se"]}
        for name in inside:
            inside[name] += abs(found[name] - exact[name]) < 1.96 * found[f"{name}_se"]
    large = fraction_of_optimum(*study(rho, scores, pi, beta, 0, M=200_000, N=100_000))
    names = ("objective", "reference_objective", "kl_to_optimum", "fraction_of_optimum")
    assert_close([large[name] for name in names], [J, start, (most - J) / beta, exact["fraction"]],
                 "many samples should tell the exact sums", atol=0.02, rtol=0.02)
    for name, n in inside.items():
        assert 180 <= n <= 198, f"{name}: {n} of 200 intervals of 95 % hold the exact value"


def test_no_fraction_is_given_where_the_optimum_is_not_known():
    """Below MIN_ESS effective samples nothing is quoted but J and the effective sample size."""
    rho, scores, _, _ = (x[None] for x in world(0.3))
    found = fraction_of_optimum(*study(rho, scores, rho, 0.01, 0))
    names = ("fraction_of_optimum", "fraction_se", "kl_to_optimum")
    assert [found[name] for name in names] == [None] * 3
    assert 0 < found["optimum"].pop("ess") < MIN_ESS
    assert set(found["optimum"].values()) == {None}
    assert_close(found["objective"], (rho * scores).sum().item(), "J", atol=0.1, rtol=0)


def test_the_frontier_is_that_of_enumeration_at_every_beta_the_samples_tell():
    """KL, score and judge of pi* = rho exp(r / beta) / Z, where (sum w)^2 / sum w^2 >= MIN_ESS."""
    rho, scores, _, _ = world(1.0)
    judge, expected, times = randn(81, seed=9), [], 20
    for beta in torch.logspace(2, -2, 81).tolist():
        best = (rho.log() + scores / beta).softmax(0)
        if times / (best ** 2).sum() >= MIN_ESS:
            expected.append([sequence_kl(best, rho), (best * scores).sum(), (best * judge).sum()])
    # Each completion 20 times: so many samples, and the same distribution.
    samples = torch.stack((scores, rho.log(), judge))[:, None].repeat(1, 2, times)
    rows = frontier(samples, samples[1])
    assert 20 < len(expected) < 81, "this test needs betas on both sides of the limit"
    assert_close(rows, [[x.item() for x in row] for row in expected], "another frontier",
                 atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_is_the_mean_of_the_maximum_over_all_subsets(n):
    """E[max of n] over the C(7, n) subsets, one by one; unsorted, with ties and negatives."""
    scores = [0.3, -2.0, 1.5, 0.3, 4.0, -0.7, 1.5]
    expected = mean([max(subset) for subset in itertools.combinations(scores, n)]).item()
    assert_close(best_of_n(scores, n)[0], expected, f"best of {n}", atol=1e-12, rtol=0)
    # Of 0..N-1 it is n (N + 1) / (n + 1) - 1, and C(N, n) a number of 1,500 digits.
    assert_close(best_of_n(torch.arange(5000.0), 357 * n)[0],
                 357 * n * 5001 / (357 * n + 1) - 1, "C(N, n) overflows", atol=1e-5, rtol=0)
    # The bound is tight: of N alike the i-th is picked with (i/N)^n - ((i-1)/N)^n.
    picked = (torch.linspace(0, 1, 20_001).double() ** n).diff().clamp(min=1e-300)
    kl = (picked * (20_000 * picked).log()).sum().item()
    assert_close(best_of_n(scores, n)[1], kl, "not log n - (n-1)/n", atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="n must be from 1 to the number of scores"):
        best_of_n(scores, 8 * (n - 1))                          # 0 or more than there are
