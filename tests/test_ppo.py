"""The mathematics of PPO: rewards, advantages, losses, KL, the optimum, each as an equation."""

import itertools
import math

import pytest
import torch

from conftest import assert_close, randn
from ppo import (AdaptiveKL, best_of_n, entropy, exact_kl, explained_variance, gae, kl_estimates,
                 kl_penalised_rewards, leave_one_out, masked_mean, mixture_log_weights, optimum,
                 optimum_bound, policy_loss, rewards_to_go, token_logprobs, value_loss, whiten)

B, T = 4, 6
MASKS = {                                   # which tokens of 4 completions are real
    "no mask": None,
    "right padding": ["111111", "111100", "100000", "110000"],
    "left padding": ["111111", "001111", "000001", "000111"],
    "holes": ["101101", "010010", "110110", "001000"],
    "an empty row": ["110100", "000000", "011111", "100001"],
}
MASKS = {name: rows and torch.tensor([[int(c) for c in row] for row in rows])
         for name, rows in MASKS.items()}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
some_masks = pytest.mark.parametrize("mask", list(MASKS.values())[1:], ids=list(MASKS)[1:])
shapes = pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (2, 7)], ids=str)


def real_tokens(mask, shape=(B, T)):
    """For each row, the positions of its unmasked tokens: oracles see nothing else."""
    mask = torch.ones(shape) if mask is None else mask
    return [row.nonzero().flatten().tolist() for row in mask]


def real(x, mask):
    """The unmasked entries of x, as a flat list of numbers."""
    return [x[b, t].item() for b, row in enumerate(real_tokens(mask, x.shape)) for t in row]


def mean(numbers):
    return torch.tensor(sum(numbers) / len(numbers), dtype=torch.float64)


# ---- log-probabilities and KL ---------------------------------------------------------------

@shapes
def test_token_logprobs_are_log_softmax_at_the_token(shape):
    """log p(y_t) = logit_{y_t} - log sum_v exp(logit_v), written out in float64."""
    logits = 3 * randn(*shape, 5)
    tokens = torch.randint(5, shape, generator=torch.Generator().manual_seed(0))
    at_token = logits.gather(-1, tokens[..., None]).squeeze(-1)
    assert_close(token_logprobs(logits, tokens), (at_token - logits.exp().sum(-1).log()).float(),
                 "log-probability of a token is not log softmax at that token")
    assert token_logprobs(logits, torch.full(shape, -1)).isfinite().all(), "PAD breaks the reading"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_token_logprobs_are_float32_and_finite_at_huge_logits(dtype):
    """A logit 1e4 above the others has log p = 0, the others -1e4: exp of it is never taken."""
    logits = torch.tensor([[[1e4, 0.0, -1e4], [1e4, 1e4, 0.0]]], dtype=dtype)
    logprobs = torch.cat([token_logprobs(logits, torch.full((1, 2), v)) for v in range(3)])
    gap, half = -logits[0, 0, 0].item(), -math.log(2)           # 1e4 as this dtype holds it
    assert_close(logprobs, torch.tensor([[0, half], [gap, half], [2 * gap, gap + half]]),
                 "huge logits overflow, or results are not float32", atol=2e-3, rtol=1e-6)


def sequences():
    """All 81 completions of 4 tokens out of 3: (81,4)."""
    return torch.cartesian_prod(*[torch.arange(3)] * 4)


def language(seed):
    """A random language over sequences(): logits (81,4,3), a function of the tokens before."""
    prefix, logits = torch.zeros(81, dtype=torch.long), []
    for t, token in enumerate(sequences().T):
        logits.append(randn(3 ** t, 3, seed=10 * seed + t)[prefix])
        prefix = 3 * prefix + token
    return torch.stack(logits, dim=1)


def probabilities(logits):
    """p(y) = product over t of p(y_t | y_<t), multiplied out: (81,)."""
    return logits.softmax(-1).gather(-1, sequences()[..., None]).squeeze(-1).prod(1)


def sequence_kl(p, q):
    """KL(p to q) = sum over y of p(y) log(p(y) / q(y)), in nats per completion."""
    return (p * (p / q).log()).sum()


def test_ref_kl_is_the_mean_of_the_sum_of_k1_and_of_the_exact_kl_with_less_variance():
    """KL(pi to rho) = E_pi[sum_t k1_t] = E_pi[sum_t KL(pi(.|y_<t) to rho(.|y_<t))]."""
    pi, rho = language(1), language(2)
    p, kl = probabilities(pi), sequence_kl(probabilities(pi), probabilities(rho))
    k1, _, _ = kl_estimates(token_logprobs(pi, sequences()), token_logprobs(rho, sequences()))
    sums = [x.sum(1).double() for x in (k1, exact_kl(pi.log_softmax(-1), rho.log_softmax(-1)))]
    for x in sums:
        assert_close((p * x).sum(), kl, "sums do not average to the KL", atol=1e-5, rtol=0)
    noise, less = ((p * (x - kl) ** 2).sum() for x in sums)
    assert less < 0.5 * noise, "summing over the vocabulary should be less noisy"


def test_k1_and_k3_are_unbiased_and_k2_is_half_the_square():
    """x from pi: E[k1] = E[k3] = KL, k2 = k1^2 / 2 (Schulman); k3 inverted misses it by half."""
    pi, rho = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.4, 0.4]).double()
    kl = 0.7 * math.log(3.5) + 0.2 * math.log(0.5) + 0.1 * math.log(0.25)
    k1, k2, k3 = kl_estimates(pi.log(), rho.log())
    for name, k in (("k1", k1), ("k3", k3)):
        assert_close((pi * k).sum().item(), kl, f"the mean of {name} under pi is not KL(pi to rho)")
    assert_close(k2, (pi / rho).log() ** 2 / 2, "k2 is not k1^2 / 2")
    inverted = (pi * (k1.exp() - 1 - k1)).sum()
    assert abs(inverted - kl) > kl / 2, "this pair should tell k3 from its inverse"


@pytest.mark.parametrize("size", [50, 1, 1e-3, 1e-6, 1e-9, 0])
def test_k3_is_never_negative(size):
    """exp(-k1) >= 1 - k1, with rounding too: expm1 keeps the digits that exp - 1 loses near 0."""
    k1 = size * torch.linspace(-1, 1, 10_001)
    _, _, k3 = kl_estimates(k1, torch.zeros_like(k1))
    assert k3.isfinite().all() and (k3 >= 0).all(), f"k3 = {k3.min():.1e}: it is never negative"
    assert_close(k3.double(), torch.expm1(-k1.double()) + k1.double(), "k3 lost its digits",
                 atol=1e-7 * size, rtol=1e-5)


@pytest.mark.parametrize("size", [0, 100, 1e4])
def test_entropy_is_that_of_the_whole_distribution(size):
    """H = -sum_v p_v log p_v: of 4 equal logits log 4, one far above 0, two log 2, at any shift."""
    p = randn(2, 3, 5).softmax(-1)
    assert_close(entropy(p.log()), -(p * p.log()).sum(-1), "the entropy is not -sum p log p")
    logits = size + torch.tensor([[[0.0, 0, 0, 0], [100, 0, 0, 0], [100, 100, 0, 0]]])
    assert_close(entropy(logits.log_softmax(-1)), torch.tensor([[math.log(4), 0, math.log(2)]]),
                 "wrong entropy", atol=1e-5, rtol=0)


def test_exact_kl_is_zero_between_equals_and_finite_at_huge_logits():
    """sum_v p_v (log p_v - log q_v); shifting all logits by a constant changes neither."""
    logits, other = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    p, q = logits.softmax(-1), other.softmax(-1)
    assert_close(exact_kl(p.log(), q.log()), (p * (p / q).log()).sum(-1), "not sum p log(p/q)")
    shifted = (logits + 7).log_softmax(-1)
    assert_close(exact_kl(p.log(), shifted), torch.zeros(2, 3).double(), "not 0", atol=1e-12,
                 rtol=0)
    pi, rho = (torch.tensor([x]).log_softmax(-1) for x in ([1e4, 0.0], [0.0, 1e4]))
    assert_close(exact_kl(pi, rho), torch.tensor([1e4]), "huge logits overflow")


# ---- rewards --------------------------------------------------------------------------------

@masks
def test_reward_is_minus_beta_k1_plus_the_score_on_the_last_real_token(mask):
    """r_t = -beta (log pi_old - log rho)_t + [t last] score (Ziegler 2019, section 2.1)."""
    scores, logprobs, ref_logprobs = randn(B, seed=2), randn(B, T), randn(B, T, seed=1)
    expected = torch.zeros(B, T).double()
    for b, row in enumerate(real_tokens(mask)):
        for t in row:
            paid = scores[b] if t == row[-1] else 0
            expected[b, t] = -0.3 * (logprobs[b, t] - ref_logprobs[b, t]) + paid
    assert_close(kl_penalised_rewards(scores, logprobs, ref_logprobs, 0.3, mask), expected,
                 "check the sign of k1, and that the score is on the last token but padding")


def test_no_gradient_flows_through_rewards():
    """The reward is data (Ziegler 2019): a gradient would add -beta grad log pi."""
    inputs = [x.requires_grad_() for x in (randn(B), randn(B, T), randn(B, T, seed=1))]
    assert not kl_penalised_rewards(*inputs, 0.3).requires_grad, "detach the rewards"


# ---- advantages -----------------------------------------------------------------------------

def double_sum(rewards, values, gamma, lam):
    """GAE as written: sum over l of (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l})."""
    after = values[1:] + [0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values)]
    return [sum((gamma * lam) ** l * d for l, d in enumerate(deltas[t:]))
            for t in range(len(deltas))]


@masks
@pytest.mark.parametrize("gamma, lam, options", [(1.0, 0.95, {}),      # Ziegler 2019, section 2.2
                                                 (0.9, 0.6, {"gamma": 0.9, "lam": 0.6}),
                                                 (1.0, 1.0, {"lam": 1.0})])
def test_gae_is_the_double_sum_over_the_real_tokens(mask, gamma, lam, options):
    """A_t = sum_l (gamma lam)^l delta_{t+l} (Schulman 2015, equation 16) without masked ones."""
    rewards, values = randn(B, T), randn(B, T, seed=1)
    expected, baseline, to_go = torch.zeros(3, B, T).double()
    for b, row in enumerate(real_tokens(mask)):
        r, v = rewards[b, row].tolist(), values[b, row].tolist()
        expected[b, row] = torch.tensor(double_sum(r, v, gamma, lam)).double()
        baseline[b, row] = values[b, row]
        to_go[b, row] = torch.tensor([sum(r[t:]) for t in range(len(r))]).double()
    advantages, returns = gae(rewards, values, mask=mask, **options)
    exact = {"atol": 1e-6, "rtol": 1e-6}
    assert_close(advantages, expected, "advantages differ from the double sum", **exact)
    assert_close(returns, expected + baseline, "returns are advantages + values", **exact)
    assert_close(rewards_to_go(rewards, mask), to_go, "not the sum from each token on", **exact)
    if gamma == lam == 1:
        assert_close(returns, to_go, "without discounts returns are rewards to go", **exact)


@pytest.mark.parametrize("gamma, lam, expected", [
    (1.0, 1.0, [6 - 10.0, 5 - 20, 3 - 30]),                         # rewards to go minus values
    (0.5, 0.0, [1 + 10 - 10.0, 2 + 15 - 20, 3 + 0 - 30]),           # the one-step error
])
def test_gae_by_hand_nothing_follows_the_end(gamma, lam, expected):
    """Rewards 1 2 3, values 10 20 30, and 0 after the last token."""
    advantages, _ = gae(torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20, 30]]), gamma, lam)
    assert_close(advantages, torch.tensor([expected]), "wrong by hand")


@pytest.mark.parametrize("group", [2, 3, 6])
def test_leave_one_out_compares_with_the_others_of_the_group_at_the_same_place(group):
    """R_b,t - mean of R_c,t over the other rows c of the group (Ahmadian 2024), one by one."""
    returns, expected = randn(6, T), torch.zeros(6, T).double()
    for b, t in itertools.product(range(6), range(T)):
        first = b // group * group
        others = [returns[c, t].item() for c in range(first, first + group) if c != b]
        expected[b, t] = returns[b, t] - mean(others)
    assert_close(leave_one_out(returns, group), expected, "compared with others than its group")
    with pytest.raises(ValueError, match="no others"):
        leave_one_out(returns, 1)


def test_a_baseline_of_others_leaves_the_policy_gradient_unbiased():
    """E[(R - mean of others) grad log pi] = E[R grad log pi], by enumeration."""
    p, R = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, -2.0, 5.0]).double()
    scores = torch.eye(3).double() - p                      # row a: grad log pi(a) by the logits
    expected = (p * R) @ scores
    found = torch.zeros(3).double()
    for a, b in itertools.product(range(3), repeat=2):
        advantages = leave_one_out(R[[a, b]][:, None], 2).squeeze(1)
        found += p[a] * p[b] * (advantages[0] * scores[a] + advantages[1] * scores[b]) / 2
    assert_close(found, expected, "the baseline biases the gradient", atol=1e-6, rtol=0)


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
    assert torch.equal(whiten(x, mask), whiten(x, mask, True)), "the mean should go by default"
    alike = torch.full((B, T), 7.0)
    assert not whiten(alike, mask).any(), "nothing stands out, and nothing divides by 0"


# ---- losses ---------------------------------------------------------------------------------

@pytest.mark.parametrize("advantage, ratio, loss, gradient, outside, says", [
    (1, 1.21, -1.2, 0, 1, "A > 0: beyond 1 + clip nothing more is to be gained"),
    (1, 1.19, -1.19, -1.19, 0, "inside the clip range the loss is -ratio A"),
    (1, 0.5, -0.5, -0.5, 1, "A > 0 and a ratio too small is not clipped: the way back stays open"),
    (-1, 1.5, 1.5, 1.5, 1, "A < 0 and a ratio too large is not clipped: the way back stays open"),
    (-1, 0.81, 0.81, 0.81, 0, "inside the clip range the loss is -ratio A"),
    (-1, 0.79, 0.8, 0, 1, "A < 0: below 1 - clip nothing more is to be gained"),
    (2, 1.0, -2, -2, 0, "at ratio 1 the gradient is the policy gradient, -A"),
])
def test_the_clipped_surrogate_and_its_gradient(advantage, ratio, loss, gradient, outside, says):
    """-min(q A, clip(q, 0.8, 1.2) A) (Schulman 2017); log 0.81 = -0.21, log 1.21 = 0.19."""
    logprobs = torch.tensor([[math.log(ratio) - 1]], dtype=torch.float64, requires_grad=True)
    old, A = torch.tensor([[-1.0]]).double(), torch.tensor([[float(advantage)]]).double()
    value, info = policy_loss(logprobs, old, A)
    value.backward()
    assert_close(value.item(), float(loss), says)
    assert_close(logprobs.grad.item(), float(gradient), says)
    assert info["clipfrac"] == outside, f"is a ratio of {ratio} outside 1 - 0.2 .. 1 + 0.2?"


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


@pytest.mark.parametrize("value, old, target, loss, gradient, clipfrac, says", [
    (3.0, 2.9, 1.0, 2.0, 2.0, 0, "inside the range: half the squared error"),
    (2.0, 3.0, 1.0, 0.5 * 1.8 ** 2, 0, 1, "moved too far towards its target: gradient 0"),
    (4.0, 3.0, 1.0, 4.5, 3.0, 0, "moved away from its target: it pays in full"),
    (2.0, 3.0, 5.0, 4.5, -3.0, 0, "moved away from its target: it pays in full"),
    (4.0, 3.0, 5.0, 0.5 * 1.8 ** 2, 0, 1, "moved too far towards its target: gradient 0"),
])
def test_the_clipped_value_loss_and_its_gradient(value, old, target, loss, gradient, clipfrac,
                                                 says):
    """0.5 max((v - R)^2, (clip(v, v_old - e, v_old + e) - R)^2), e = 0.2 (PPO2; Huang 2022)."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    result, info = value_loss(values, *(torch.tensor([[x]]).double() for x in (old, target)))
    result.backward()
    assert_close(result.item(), loss, says)
    assert_close(values.grad.item(), float(gradient), says)
    assert info["value_clipfrac"] == clipfrac, "the share whose clipped error is the larger"


@masks
def test_value_loss_is_half_the_mean_of_the_larger_error_of_real_tokens(mask, clip=0.5):
    """0.5 mean(max((v - R)^2, (v_clipped - R)^2)) over unmasked tokens, one number at a time."""
    values, old, returns = randn(B, T), randn(B, T, seed=1), randn(B, T, seed=2)
    numbers = zip(real(values, mask), real(old, mask), real(returns, mask))
    errors = [((v - r) ** 2, (min(max(v, o - clip), o + clip) - r) ** 2) for v, o, r in numbers]
    loss, info = value_loss(values, old, returns, clip, mask)
    assert_close(loss, mean([0.5 * max(pair) for pair in errors]), "wrong value loss")
    assert_close(info["value_clipfrac"].double(), mean([float(c > e) for e, c in errors]),
                 "value_clipfrac miscounts", atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_no_gradient_flows_through_what_the_rollout_recorded(loss):
    """What was recorded is data: only the first argument learns."""
    inputs = [randn(B, T, seed=s).requires_grad_() for s in range(3)]
    value, info = loss(*inputs)
    value.backward()
    assert inputs[0].grad.abs().sum() > 0, "the model gets no gradient"
    assert inputs[1].grad is inputs[2].grad is None, "a gradient flows into the rollout: detach it"
    assert not any(x.requires_grad for x in info.values()), "info is for reading: no gradient"


@pytest.mark.parametrize("log_ratio, expected", [(50, math.exp(50)), (200, None), (-200, 0.8)])
def test_extreme_ratios_stay_finite(log_ratio, expected):
    """exp(50) is 5e21, within float32, exp(89) is not: both leave numbers."""
    logprobs = torch.tensor([[float(log_ratio)]], requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.zeros(1, 1), -torch.ones(1, 1))
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite(), "the ratio overflows"
    if expected:
        assert_close(loss.item(), expected, "an extreme ratio breaks the loss", rtol=1e-5, atol=0)


# ---- masks, types and shapes, for every function that takes (B,T) -----------------------------

SCORES = torch.tensor([0.5, -1.0, 2.0, -0.3])
FUNCTIONS = {
    "kl_penalised_rewards":
        lambda a, b, c, mask: [kl_penalised_rewards(SCORES[:len(a)], a, b, 0.3, mask)],
    "gae": lambda a, b, c, mask: gae(a, b, 0.9, 0.8, mask),
    "rewards_to_go": lambda a, b, c, mask: [rewards_to_go(a, mask)],
    "whiten": lambda a, b, c, mask: [whiten(a, mask)],
    "whiten, mean kept": lambda a, b, c, mask: [whiten(a, mask, shift_mean=False)],
    "masked_mean": lambda a, b, c, mask: [masked_mean(a, mask)],
    "policy_loss": lambda a, b, c, mask: with_info(policy_loss(a, b, c, mask=mask)),
    "value_loss": lambda a, b, c, mask: with_info(value_loss(a, b, c, mask=mask)),
}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def with_info(result):
    return [result[0], *result[1].values()]


def inputs(*shape, dtype=torch.float32):
    return [randn(*shape, seed=s, dtype=dtype) for s in range(3)]


@functions
def test_a_mask_of_ones_is_no_mask_whatever_its_type(function):
    """None = all ones; booleans, integers and floats are the same mask."""
    holes = MASKS["holes"]
    cases = [(None, torch.ones(B, T, dtype=d)) for d in (torch.float32, torch.bool, torch.long)]
    for mask, other in [*cases, (holes, holes.bool()), (holes, holes.float())]:
        assert_close(function(*inputs(B, T), other), function(*inputs(B, T), mask),
                     "the same mask as another type changed something")


@functions
@some_masks
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


@functions
def test_float64_stays_float64_and_bf16_becomes_float32(function):
    """Advantages and losses are computed in float32 at least; float64 is kept."""
    for given, wanted in ((torch.float64, torch.float64), (torch.float32, torch.float32),
                          (torch.bfloat16, torch.float32)):
        output = function(*inputs(B, T, dtype=given), None)[0]
        assert output.dtype == wanted, f"{given} came out as {output.dtype}"


@functions
@shapes
def test_odd_shapes_work(function, shape):
    """One token, one completion: outputs are finite and (B,T), or a single number."""
    for mask in (None, torch.ones(shape)):
        for y in function(*inputs(*shape), mask):
            assert y.shape in (shape, ()) and y.isfinite().all(), "an odd shape breaks it"


@functions
@pytest.mark.parametrize("mask", [None, MASKS["holes"]], ids=["no mask", "holes"])
def test_results_stay_on_the_device_of_the_inputs(function, mask):
    """On torch's meta device, which refuses tensors of the CPU, as CUDA would."""
    there = [None if x is None else x.to("meta") for x in (*inputs(B, T), mask)]
    assert all(y.is_meta for y in function(*there)), "something was computed on the CPU"


def test_the_mean_over_nothing_is_0():
    """masked_mean is the sum over unmasked tokens by their number, and 0 where there is none."""
    assert masked_mean(torch.tensor([[1.0, 5, 9]]), torch.tensor([[1, 1, 0]])) == 3, "of 1 and 5"
    assert masked_mean(torch.tensor([[math.nan]]), torch.tensor([[0]])) == 0, "an empty mean"


# ---- diagnostics and the controller -----------------------------------------------------------

@pytest.mark.parametrize("values, returns, expected", [
    pytest.param([[1, 2], [3, 4]], [[1, 2], [3, 4]], 1.0, id="perfect"),
    pytest.param([[5, 5], [5, 5]], [[1, 2], [3, 4]], 0.0, id="constant values"),
    pytest.param([[1, 2], [3, 4]], [[7, 7], [7, 7]], 0.0, id="constant returns"),
    pytest.param([[1, 1], [3, 3]], [[0, 2], [2, 4]], 0.5, id="half"),
    pytest.param([[4, 3], [2, 1]], [[1, 2], [3, 4]], -3.0, id="worse than nothing"),
    pytest.param([[11, 12], [13, 14]], [[1, 2], [3, 4]], 1.0, id="off by a constant"),
    pytest.param([[1e-3, 0]], [[2e-3, 0]], 0.75, id="returns that hardly vary"),
])
@pytest.mark.parametrize("garbage", [None, 9.0, math.nan])
def test_explained_variance_is_1_if_perfect_and_0_if_constant(values, returns, expected, garbage):
    """1 - Var(R - V) / Var(R) of real tokens, 0 where returns do not vary (Huang 2022)."""
    values, returns = torch.tensor(values).float(), torch.tensor(returns).float()
    mask = None
    if garbage is not None:         # padding on the right, and a completion that is only padding
        mask = torch.nn.functional.pad(torch.ones_like(values), (0, 2, 0, 1))
        values, returns = (torch.nn.functional.pad(x, (0, 2, 0, 1)) for x in (values, returns))
        values, returns = values.masked_fill(mask == 0, garbage), returns.masked_fill(mask == 0, -5)
    assert_close(explained_variance(values, returns, mask), expected, "wrong", atol=1e-6, rtol=0)


@pytest.mark.parametrize("ref_kl, beta, says", [
    (6.0, 0.1, "on target beta stays"),
    (6.6, 0.1 * (1 + 0.1 * 0.0256), "10 % above the target, beta grows by 10 % of n / horizon"),
    (5.4, 0.1 * (1 - 0.1 * 0.0256), "10 % below the target, beta shrinks"),
    (60.0, 0.1 * (1 + 0.2 * 0.0256), "the error is clipped at 0.2"),
    (0.0, 0.1 * (1 - 0.2 * 0.0256), "the error is clipped at -0.2"),
])
def test_the_controller_raises_beta_when_kl_is_above_target(ref_kl, beta, says):
    """e = clip(KL / target - 1, -0.2, 0.2); beta *= 1 + e n / horizon (Ziegler 2019)."""
    controller = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    assert_close(controller.update(ref_kl, n=256), beta, says)
    assert controller.beta == controller.update(6.0, n=256), "the new beta is kept as .beta"


# ---- the exact optimum ------------------------------------------------------------------------

BETAS = pytest.mark.parametrize("beta", [0.05, 0.3, 10.0])


def world(beta):
    """rho, scores and pi* = rho exp(r / beta) / Z of all 81 completions, and J* = beta log Z."""
    rho, scores = probabilities(language(3)), randn(81, seed=7)
    Z = (rho * (scores / beta).exp()).sum()
    return rho, scores, rho * (scores / beta).exp() / Z, beta * Z.log()


@BETAS
def test_the_optimum_equals_enumeration(beta):
    """All 81 weighed by rho: J* = beta log Z, score = E_pi*[r], ref_kl = KL(pi* to rho)."""
    rho, scores, best, objective = world(beta)
    found = optimum(scores, beta, log_weights=rho.log())
    expected = {"objective": objective, "score": (best * scores).sum(),
                "ref_kl": sequence_kl(best, rho), "ess": 1 / (best ** 2).sum()}
    assert_close({name: found[name] for name in expected},
                 {name: x.item() for name, x in expected.items()},
                 "not beta log Z, E[r], KL or (sum w)^2 / sum w^2", atol=1e-9, rtol=1e-7)
    shifted = optimum(scores, beta, log_weights=rho.log() + 5)
    assert_close(shifted, found, "a constant factor should cancel", atol=1e-9, rtol=1e-7)


@BETAS
def test_no_policy_beats_the_optimum_and_the_gap_is_beta_kl_to_it(beta):
    """J* - J(pi) = beta KL(pi to pi*) >= 0, 0 at pi* only (Korbak 2022): far from it and near."""
    rho, scores, best, _ = world(beta)
    objective = optimum(scores, beta, log_weights=rho.log())["objective"]
    policies = [rho, best, *((best.log() + width * randn(81, seed=seed)).softmax(0)
                             for width in (0.1, 3.0) for seed in range(30))]
    for pi in policies:
        J = (pi * scores).sum() - beta * sequence_kl(pi, rho)
        assert J <= objective + 1e-9, "a policy beats J*"
        assert_close(objective - J.item(), beta * sequence_kl(pi, best).item(),
                     "the gap to J* is not beta KL(pi to pi*)", atol=1e-9, rtol=1e-7)


LOG2 = math.log(2)


@pytest.mark.parametrize("scores, beta, objective, score, ref_kl, ess", [
    # samples a a b c of rho = (1/2, 1/4, 1/4), r = log (1, 2, 4): Z = 2, pi* = (1/4, 1/4, 1/2);
    # r = log P(positive given y), beta = 1: J* = log P(positive), pi* = rho(y given positive)
    pytest.param([0, 0, LOG2, 2 * LOG2], 1.0, LOG2, 1.25 * LOG2, 0.25 * LOG2, 64 / 22,
                 id="each sample once"),
    pytest.param([3, -1, 0.5, 2], 1e-3, 3 - 2e-3 * LOG2, 3, 2 * LOG2, 1, id="beta to 0: the best"),
    pytest.param([3, -1, 0.5, 2], 1e6, 1.125, 1.125, 0, 4, id="a huge beta stays at rho"),
    pytest.param([-LOG2, -2 * LOG2], 1.0, math.log(3 / 8), -4 / 3 * LOG2,
                 -4 / 3 * LOG2 - math.log(3 / 8), 9 / 5, id="Bayes"),
    pytest.param([-1e4, 1e4], 0.01, 1e4 - 0.01 * LOG2, 1e4, LOG2, 1, id="no overflow"),
])
def test_the_optimum_by_hand(scores, beta, objective, score, ref_kl, ess):
    """Between the best sample, beta near 0, and the mean, a huge beta; plain lists do."""
    expected = {"objective": objective, "score": score, "ref_kl": ref_kl, "ess": ess}
    for given in (scores, torch.tensor(scores, dtype=torch.float64)):
        found = optimum(given, beta, [0] * len(scores))
        assert_close({name: found[name] for name in expected},
                     {name: float(x) for name, x in expected.items()}, "wrong", atol=1e-5, rtol=0)
        assert math.isfinite(found["objective_se"]), "every estimate should stay finite"


@pytest.mark.parametrize("beta", [0, -0.1])
def test_without_a_positive_beta_there_is_no_optimum(beta):
    """rho exp(r / beta) needs beta > 0."""
    with pytest.raises(ValueError, match="beta must be positive"):
        optimum(torch.zeros(3), beta)


def test_the_standard_error_of_the_optimum_has_its_closed_forms():
    """Equal scores: error 0. beta -> infinity: the error of a plain mean, sigma / sqrt(N)."""
    scores, equal = randn(500), optimum(torch.full((500,), 2.0), 0.1)["objective_se"]
    assert_close(equal, 0.0, "equal scores leave no doubt", atol=1e-12, rtol=0)
    assert_close(optimum(scores, 1e5)["objective_se"], scores.std(correction=0).item() / 500 ** 0.5,
                 "not the error of a mean", atol=0, rtol=1e-3)


def draw(probs, n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probs, n, replacement=True, generator=generator)


@pytest.mark.parametrize("weighted", [False, True], ids=["from rho", "from another policy"])
def test_the_standard_error_of_the_optimum_is_calibrated(weighted):
    """(estimate - J*) / objective_se has deviation 1: of 500 repeats, within 4 / sqrt(1000)."""
    rho, scores, best, objective = world(1.0)
    source = (0.5 * rho.log() + 0.5 * best.log()).softmax(0) if weighted else rho
    z = []
    for seed in range(500):
        y = draw(source, 1000, seed)
        found = optimum(scores[y], 1.0, (rho / source).log()[y] if weighted else None)
        z.append((found["objective"] - objective.item()) / found["objective_se"])
    z = torch.tensor(z)
    assert abs(z.std() - 1) < 0.127, f"errors are {z.std():.2f} times the standard error given"
    assert abs(z.mean()) < 4 / 500 ** 0.5 + 0.05, f"off by {z.mean():.2f} standard errors"


@pytest.mark.parametrize("n, beta", [(3, 0.05), (30, 0.05), (30, 0.3), (300, 1.0)])
def test_the_lower_bound_of_the_optimum_holds_however_heavy_the_tail(n, beta):
    """Of 1,000 repeats at most 50 lie above J*, and four standard errors; it costs beta log k."""
    rho, scores, best, objective = world(beta)
    source = (0.8 * rho.log() + 0.2 * best.log()).softmax(0)
    bounds = []
    for seed in range(1000):
        y = draw(source, n, seed)
        bounds.append(optimum_bound(scores[y], beta, (rho / source).log()[y]))
    above = (torch.tensor(bounds) > objective).sum()
    assert above <= 50 + 4 * (1000 * 0.05 * 0.95) ** 0.5, f"{above} of 1,000 bounds are above J*"
    assert_close(optimum_bound(scores, beta, torch.zeros(81), sure=0.9),
                 optimum(scores, beta)["objective"] - beta * math.log(10), "its cost")


# ---- samples of several policies ----------------------------------------------------------------

def test_mixture_weights_are_rho_over_the_mixture():
    """rho / sum_i (n_i / N) p_i (balance heuristic, Veach 1995), on average 1."""
    p = torch.stack([probabilities(language(s)) for s in (3, 4, 5)])                # (policy,y)
    q = (100 * p[0] + 300 * p[1] + 600 * p[2]) / 1000
    for counts in ([100, 300, 600], torch.tensor([100, 300, 600])):
        weights = mixture_log_weights(p.log(), counts)
        assert_close(weights, (p[0] / q).log(), "not log(rho / mixture)", atol=1e-12, rtol=0)
    assert_close((q * weights.exp()).sum().item(), 1.0, "weights should average to 1")
    alone = mixture_log_weights(torch.tensor([[-3.0, -1000.0], [-1.0, -990.0]]), [7, 0])
    assert_close(alone, torch.zeros(2).double(), "where rho alone drew, the weight is 1")


def test_pooling_samples_of_a_policy_reaches_small_beta():
    """3,000 samples of rho alone are too few at beta 0.02; with half of them tuned, J* is found."""
    beta, rho = 0.02, probabilities(language(3))
    scores = torch.nn.functional.logsigmoid(2 * randn(81, seed=8))
    tuned, repeats = (rho.log() + scores / 0.1).softmax(0), []
    for seed in range(40):
        y = torch.cat((draw(rho, 1500, seed), draw(tuned, 1500, 1000 + seed)))
        weights = mixture_log_weights(torch.stack((rho.log(), tuned.log()))[:, y], [1500, 1500])
        repeats.append(optimum(scores[y], beta, weights))
    assert optimum(scores[draw(rho, 3000, 0)], beta)["ess"] < 100, "out of reach of rho alone"
    assert min(found["ess"] for found in repeats) > 200, "pooled samples should be enough"
    x = torch.tensor([found["objective"] for found in repeats]).double()
    truth = optimum(scores, beta, rho.log())["objective"]
    assert abs(x.mean() - truth) < 4 * x.std() / 40 ** 0.5, f"J* is {x.mean():.4f}, not {truth:.4f}"


# ---- best of n ----------------------------------------------------------------------------------

@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_is_the_mean_of_the_maximum_over_all_subsets(n):
    """E[max of n] over the C(7, n) subsets, one by one; unsorted, with ties and negatives."""
    scores = [0.3, -2.0, 1.5, 0.3, 4.0, -0.7, 1.5]
    expected = mean([max(subset) for subset in itertools.combinations(scores, n)]).item()
    for given in (scores, torch.tensor(scores, dtype=torch.float64)):
        assert_close(best_of_n(given, n)[0], expected, f"best of {n}", atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="n must be from 1 to the number of scores, 7"):
        best_of_n(scores, 8 * (n - 1))                          # 0 or more than there are


@pytest.mark.parametrize("n", [1, 2499, 5000])
def test_best_of_n_of_many_does_not_overflow(n):
    """Of 0..N-1 it is n (N + 1) / (n + 1) - 1: the mean at n = 1, the maximum at N."""
    found, _ = best_of_n(torch.arange(5000.0), n)
    assert_close(found, n * 5001 / (n + 1) - 1, "C(N, n) overflows", atol=1e-5, rtol=0)


@pytest.mark.parametrize("n, bound", [(1, 0.0), (2, LOG2 - 1 / 2), (4, 2 * LOG2 - 3 / 4),
                                      (16, 1.8350887)])
def test_the_kl_of_best_of_n_is_at_most_log_n_minus_n_minus_1_over_n(n, bound):
    """log n - (n-1)/n, and tight: of N alike the i-th is picked with (i/N)^n - ((i-1)/N)^n."""
    assert_close(best_of_n(torch.zeros(20), n)[1], bound, "wrong bound", atol=1e-6, rtol=0)
    share = torch.linspace(0, 1, 20_001).double()
    picked = (share ** n).diff().clamp(min=1e-300)
    kl = sequence_kl(picked, torch.full((20_000,), 1 / 20_000).double())
    assert bound - 0.01 < kl <= bound + 1e-6, f"the true KL is {kl:.4f}, the bound {bound:.4f}"
