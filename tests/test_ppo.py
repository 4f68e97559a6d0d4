"""The mathematics of PPO: rewards, advantages, losses, KL, and the exact optimum, each as an equation."""

import itertools
import math

import pytest
import torch

from conftest import assert_close, randn
from ppo import (AdaptiveKL, best_of_n, entropy, exact_kl, explained_variance, gae, kl_estimates,
                 kl_penalised_rewards, masked_mean, mixture_log_weights, optimum, policy_loss,
                 token_logprobs, value_loss, whiten)

B, T = 4, 6
MASKS = {                                   # which tokens of 4 completions are real
    "no mask": None,
    "all ones": [[1, 1, 1, 1, 1, 1]] * 4,
    "right padding": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    "left padding": [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]],
    "an empty row": [[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 1]],
}
masks = pytest.mark.parametrize("mask", [m and torch.tensor(m) for m in MASKS.values()], ids=MASKS)
some_masks = pytest.mark.parametrize("mask", [torch.tensor(m) for m in list(MASKS.values())[2:]], ids=list(MASKS)[2:])
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
    """log p(y_t) = logit_{y_t} - log sum_v exp(logit_v), against torch's log_softmax in float64."""
    logits, tokens = 3 * randn(*shape, 5), torch.randint(5, shape, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    assert_close(token_logprobs(logits, tokens), expected.float(), "log-probability of a token is not log softmax at that token")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_token_logprobs_are_float32_and_finite_at_huge_logits(dtype):
    """A logit 1e4 above the others has log p = 0, the others -1e4: exp of it must never be taken."""
    logits = torch.tensor([[[1e4, 0.0, -1e4], [1e4, 1e4, 0.0]]], dtype=dtype)
    logprobs = torch.cat([token_logprobs(logits, torch.full((1, 2), v)) for v in range(3)])
    gap = -logits[0, 0, 0].item()           # 1e4 as this dtype holds it
    assert_close(logprobs, torch.tensor([[0, -math.log(2)], [gap, -math.log(2)], [2 * gap, gap - math.log(2)]]),
                 "huge logits overflow, or log-probabilities are not float32", atol=2e-3, rtol=1e-6)


def sequences():
    """All 81 completions of 4 tokens out of 3: (81,4)."""
    return torch.cartesian_prod(*[torch.arange(3)] * 4)


def language(seed):
    """A random language over sequences(): logits (81,4,3), those at t a function of the tokens before t."""
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


def test_token_logprobs_of_a_completion_sum_to_its_log_probability():
    """log pi(y) = sum over t of log pi(y_t | y_<t), and the 81 probabilities sum to 1."""
    logits = language(1)
    logprob = token_logprobs(logits, sequences()).sum(1).double()
    assert_close(logprob.exp(), probabilities(logits),
                 "token log-probabilities do not add up to the completion's", atol=1e-6, rtol=1e-5)
    assert_close(logprob.exp().sum().item(), 1.0, "probabilities of all completions should sum to 1", atol=1e-5, rtol=0)


def test_ref_kl_is_the_mean_over_completions_of_the_sum_of_k1_over_tokens():
    """KL(pi to rho) = E_pi[sum over t of k1_t], nats per completion (Ziegler 2019, section 2.1), by enumeration."""
    pi, rho = language(1), language(2)
    k1, _, _ = kl_estimates(token_logprobs(pi, sequences()), token_logprobs(rho, sequences()))
    p, q = probabilities(pi), probabilities(rho)
    assert_close((p * k1.sum(1)).sum(), sequence_kl(p, q), "sums of k1 do not average to the KL", atol=1e-5, rtol=0)


def test_exact_kl_has_the_same_mean_as_k1_and_less_variance():
    """E_pi[sum_t KL(pi(.|y_<t) to rho(.|y_<t))] = KL(pi to rho): the chain rule of KL, by enumeration."""
    pi, rho = language(1), language(2)
    p, kl = probabilities(pi), sequence_kl(probabilities(pi), probabilities(rho))
    exact = exact_kl(pi.log_softmax(-1), rho.log_softmax(-1)).sum(1).double()
    k1 = (token_logprobs(pi, sequences()) - token_logprobs(rho, sequences())).sum(1).double()
    assert_close((p * exact).sum(), kl, "the exact per-token KL does not add up to the KL of completions", atol=1e-5, rtol=0)
    variance, k1_variance = ((p * (x - kl) ** 2).sum() for x in (exact, k1))
    assert variance < 0.5 * k1_variance, "summing over the vocabulary should be less noisy"


def test_k1_and_k3_are_unbiased_and_k2_is_half_the_square():
    """x from pi: E[k1] = E[k3] = KL, k2 = k1^2 / 2 (Schulman, "Approximating KL divergence").

    exp(k1) - 1 - k1, the inverted k3 of several repositories, misses the KL by a half here.
    """
    pi, rho = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.4, 0.4]).double()
    kl = 0.7 * math.log(3.5) + 0.2 * math.log(0.5) + 0.1 * math.log(0.25)
    k1, k2, k3 = kl_estimates(pi.log(), rho.log())
    for name, k in (("k1", k1), ("k3", k3)):
        assert_close((pi * k).sum().item(), kl, f"the mean of {name} under pi is not KL(pi to rho)")
    assert_close(k2, (pi / rho).log() ** 2 / 2, "k2 is not k1^2 / 2")
    assert abs((pi * (k1.exp() - 1 - k1)).sum() - kl) > kl / 2, "this pair should tell k3 from its inverse"


@pytest.mark.parametrize("size", [50, 1, 1e-3, 1e-6, 1e-9, 0])
def test_k3_is_never_negative(size):
    """exp(-k1) >= 1 - k1, with rounding too: expm1 keeps the digits that exp - 1 loses near 0."""
    k1 = size * torch.linspace(-1, 1, 10_001)
    _, _, k3 = kl_estimates(k1, torch.zeros_like(k1))
    assert k3.isfinite().all() and (k3 >= 0).all(), f"k3 = {k3.min():.1e}: it is never negative"
    assert_close(k3.double(), torch.expm1(-k1.double()) + k1.double(), "k3 lost its digits", atol=1e-7 * size, rtol=1e-5)


def test_entropy_is_that_of_the_whole_distribution():
    """H = -sum over v of p_v log p_v, and not the -log p of the one token sampled."""
    logits = randn(2, 3, 5)
    p = logits.softmax(-1)
    assert_close(entropy(p.log()), -(p * p.log()).sum(-1), "the entropy is not -sum p log p")


@pytest.mark.parametrize("size", [0, 100, 1e4])
def test_entropy_is_log_of_the_number_of_equally_likely_tokens_at_any_size_of_logits(size):
    """4 equal logits: log 4; one far above: 0; two far above: log 2. A shift of all logits changes nothing."""
    logits = size + torch.tensor([[[0.0, 0, 0, 0], [100, 0, 0, 0], [100, 100, 0, 0]]])
    assert_close(entropy(logits.log_softmax(-1)), torch.tensor([[math.log(4), 0, math.log(2)]]), "wrong entropy",
                 atol=1e-5, rtol=0)


def test_exact_kl_is_zero_between_equals_and_finite_at_huge_logits():
    """sum over v of p_v (log p_v - log q_v); shifting all logits by a constant changes neither."""
    logits, other = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    p, q = logits.softmax(-1), other.softmax(-1)
    assert_close(exact_kl(p.log(), q.log()), (p * (p / q).log()).sum(-1), "the exact KL is not sum p log(p/q)")
    assert_close(exact_kl(p.log(), (logits + 7).log_softmax(-1)), torch.zeros(2, 3).double(), "KL(pi to pi) should be 0", atol=1e-12, rtol=0)
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
            expected[b, t] = -0.3 * (logprobs[b, t] - ref_logprobs[b, t]) + (scores[b] if t == row[-1] else 0)
    rewards = kl_penalised_rewards(scores, logprobs, ref_logprobs, 0.3, mask)
    assert_close(rewards, expected, "wrong reward: check the sign of k1, and that the score is on the last token but padding")


def test_rewards_of_a_row_sum_to_score_minus_beta_times_its_kl():
    """sum_t r_t = score - beta sum_t k1_t, in numbers: 1 - 0.5 * (1 + 0) = 0.5."""
    rewards = kl_penalised_rewards(torch.tensor([1.0]), torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]]), 0.5)
    assert_close(rewards, torch.tensor([[-0.5, 1.0]]), "the worked example of kl_penalised_rewards")


@masks
def test_a_policy_equal_to_the_reference_pays_exactly_nothing(mask):
    """pi = rho: every penalty is 0, to the last bit, for any beta."""
    logprobs = randn(B, T, dtype=torch.float32)
    rewards = kl_penalised_rewards(torch.zeros(B), logprobs, logprobs.clone(), 1e6, mask)
    assert torch.equal(rewards, torch.zeros(B, T)), "a policy equal to the reference was charged for KL"


def test_beta_0_leaves_the_score_alone():
    """Without penalty the last token earns the score, all others 0."""
    rewards = kl_penalised_rewards(torch.tensor([2.0, -3.0]), randn(2, 3), randn(2, 3, seed=1), 0.0)
    assert_close(rewards, torch.tensor([[0, 0, 2.0], [0, 0, -3.0]]).double(), "beta = 0 should mean no penalty")


def test_no_gradient_flows_through_rewards():
    """The reward is data (Ziegler 2019): its gradient would add -beta grad log pi, own token only."""
    inputs = [x.requires_grad_() for x in (randn(B), randn(B, T), randn(B, T, seed=1))]
    assert not kl_penalised_rewards(*inputs, 0.3).requires_grad, "rewards carry a gradient: detach them"


# ---- advantages -----------------------------------------------------------------------------

def double_sum(rewards, values, gamma, lam):
    """GAE as written: sum over l of (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), on plain lists."""
    after = values[1:] + [0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values)]
    return [sum((gamma * lam) ** l * d for l, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@masks
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_the_double_sum_over_the_real_tokens(mask, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} (Schulman 2015, equation 16); masked tokens are not there at all."""
    rewards, values = randn(B, T), randn(B, T, seed=1)
    expected, baseline = torch.zeros(2, B, T).double()
    for b, row in enumerate(real_tokens(mask)):
        advantages = double_sum(rewards[b, row].tolist(), values[b, row].tolist(), gamma, lam)
        expected[b, row], baseline[b, row] = torch.tensor(advantages).double(), values[b, row]
    advantages, returns = gae(rewards, values, gamma, lam, mask)
    assert_close(advantages, expected, "advantages differ from the double sum", atol=1e-6, rtol=1e-6)
    assert_close(returns, expected + baseline, "returns should be unwhitened advantages + values", atol=1e-6, rtol=1e-6)


def test_gae_with_gamma_and_lambda_1_is_the_monte_carlo_return_minus_the_value():
    """A_t = sum over s >= t of r_s - V_t, by hand: rewards 1 2 3, values 10 20 30."""
    advantages, returns = gae(torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20, 30]]), 1.0, 1.0)
    assert_close(returns, torch.tensor([[6.0, 5, 3]]), "returns should be rewards to go")
    assert_close(advantages, torch.tensor([[-4.0, -15, -27]]), "advantages should be rewards to go minus values")


def test_gae_with_lambda_0_is_the_one_step_error_and_nothing_follows_the_end():
    """A_t = r_t + gamma V_{t+1} - V_t with V after the last token 0, by hand: gamma = 1/2."""
    advantages, _ = gae(torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20, 30]]), 0.5, 0.0)
    assert_close(advantages, torch.tensor([[1 + 10 - 10.0, 2 + 15 - 20, 3 + 0 - 30]]), "wrong one-step error")


def test_gae_defaults_are_no_discount_and_lambda_095():
    """gamma = 1, lambda = 0.95 (Ziegler 2019, section 2.2)."""
    rewards, values = randn(1, 5), randn(1, 5, seed=1)
    expected = double_sum(rewards[0].tolist(), values[0].tolist(), 1.0, 0.95)
    assert_close(gae(rewards, values)[0][0].tolist(), expected, "the defaults of gae changed")


def test_the_advantage_of_a_token_holds_the_kl_of_all_later_tokens():
    """With gamma = lambda = 1, dA_t / dk1_s = -beta for s >= t, else 0: tokens pay for what they lead to.

    Charging each token its own KL only has another fixed point than pi*.
    """
    advantages = torch.stack([
        gae(kl_penalised_rewards(torch.zeros(1), spent[None], torch.zeros(1, T), 0.3), torch.zeros(1, T), 1.0, 1.0)[0][0]
        for spent in torch.eye(T)])                     # (s,t): one nat of k1 at s, seen from t
    assert_close(advantages, -0.3 * torch.ones(T, T).tril(), "KL is not credited to its own and all earlier tokens")


@masks
def test_whitening_uses_all_unmasked_tokens_of_the_batch(mask):
    """(x - mean) / sigma, sigma the population deviation, over the batch: never inside one row or over padding."""
    x = 3 * randn(B, T) + 5
    numbers = torch.tensor(real(x, mask)).double()
    expected = (x - numbers.mean()) / numbers.std(correction=0)
    zero = torch.zeros(B, T, dtype=torch.bool) if mask is None else mask == 0
    assert_close(whiten(x, mask), expected.masked_fill(zero, 0),
                 "whitened values should have mean 0 and population deviation 1", atol=1e-6, rtol=1e-6)
    assert_close(whiten(x, mask, shift_mean=False), (expected + numbers.mean()).masked_fill(zero, 0),
                 "shift_mean=False should rescale about the mean and keep it", atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("x", [torch.full((2, 3), 7.0), torch.tensor([[3.0]])], ids=["constant", "one token"])
def test_whitening_without_variance_gives_zeros(x):
    """sigma = 0: nothing stands out, and nothing divides by 0."""
    assert_close(whiten(x), torch.zeros_like(x), "equal values should whiten to 0")
    assert_close(whiten(x, shift_mean=False), x, "equal values should keep their mean")


# ---- losses ---------------------------------------------------------------------------------

@pytest.mark.parametrize("advantage, ratio, loss, gradient, says", [
    (1, 1.5, -1.2, 0, "A > 0: beyond 1 + clip nothing more is to be gained"),
    (1, 1.1, -1.1, -1.1, "inside the clip range the loss is -ratio A"),
    (1, 0.5, -0.5, -0.5, "A > 0 and a ratio too small is not clipped: the way back stays open"),
    (-1, 1.5, 1.5, 1.5, "A < 0 and a ratio too large is not clipped: the way back stays open"),
    (-1, 0.9, 0.9, 0.9, "inside the clip range the loss is -ratio A"),
    (-1, 0.5, 0.8, 0, "A < 0: below 1 - clip nothing more is to be gained"),
    (2, 1.0, -2, -2, "at ratio 1 the gradient is the policy gradient, -A"),
])
def test_the_clipped_surrogate_and_its_gradient(advantage, ratio, loss, gradient, says):
    """-min(q A, clip(q, 1 - e, 1 + e) A), e = 0.2 (Schulman 2017, equation 7); d q / d log pi = q."""
    logprobs = torch.tensor([[math.log(ratio) - 1]], dtype=torch.float64, requires_grad=True)
    value, _ = policy_loss(logprobs, torch.tensor([[-1.0]]).double(), torch.tensor([[float(advantage)]]).double())
    value.backward()
    assert_close(value.item(), float(loss), says)
    assert_close(logprobs.grad.item(), float(gradient), says)


@masks
@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_policy_loss_is_minus_the_mean_clipped_surrogate_of_real_tokens(mask, clip):
    """-mean(min(q A, clip(q, 1 - e, 1 + e) A)) over unmasked tokens, one number at a time."""
    logprobs, old, advantages = 0.2 * randn(B, T), 0.2 * randn(B, T, seed=1), randn(B, T, seed=2)
    ratios = [math.exp(x) for x in real(logprobs - old, mask)]
    surrogate = [min(q * a, min(max(q, 1 - clip), 1 + clip) * a) for q, a in zip(ratios, real(advantages, mask))]
    loss, info = policy_loss(logprobs, old, advantages, clip, mask)
    assert_close(loss, -mean(surrogate), "wrong clipped surrogate")
    expected = {"approx_kl": [q - 1 - math.log(q) for q in ratios],
                "clipfrac": [float(abs(q - 1) > clip) for q in ratios], "ratio": ratios}
    for name, numbers in expected.items():
        assert_close(info[name].double(), mean(numbers), f"{name} is not the mean over real tokens", atol=1e-6, rtol=0)


@pytest.mark.parametrize("ratio, outside", [(0.79, 1), (0.81, 0), (1.0, 0), (1.19, 0), (1.21, 1)])
def test_clipfrac_counts_ratios_and_not_their_logarithms(ratio, outside):
    """|q - 1| > 0.2, which is not |log q| > 0.2: log 0.81 = -0.21 and log 1.21 = 0.19."""
    _, info = policy_loss(torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1), torch.ones(1, 1))
    assert info["clipfrac"] == outside, f"is a ratio of {ratio} outside 1 - 0.2 .. 1 + 0.2?"


def test_approx_kl_estimates_the_kl_from_the_old_policy_to_the_new():
    """Four tokens drawn exactly in the proportions 1/2 1/4 1/4 of pi_old: their mean k3 is KL(pi_old to pi)."""
    old, new = torch.tensor([1 / 2, 1 / 4, 1 / 4]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    drawn = torch.tensor([[0, 0, 1, 2]])
    _, info = policy_loss(new.log()[drawn], old.log()[drawn], torch.ones(1, 4))
    assert_close(info["approx_kl"].item(), sequence_kl(old, new).item(), "approx_kl is not KL(pi_old to pi)")


def test_at_the_first_minibatch_the_ratio_is_1_and_the_gradient_is_the_policy_gradient():
    """pi = pi_old: loss -mean A, clipfrac 0, approx_kl 0, gradient -A / N (Huang 2022, detail on ratio 1)."""
    logprobs, advantages = randn(B, T).requires_grad_(), randn(B, T, seed=1)
    loss, info = policy_loss(logprobs, logprobs.detach().clone(), advantages)
    loss.backward()
    assert_close(loss.item(), -advantages.mean().item(), "at ratio 1 the loss is -mean A")
    assert_close(logprobs.grad, -advantages / (B * T), "at ratio 1 the gradient is -A / N")
    assert (info["ratio"], info["clipfrac"], info["approx_kl"]) == (1, 0, 0), f"nothing has moved yet: {info}"


@pytest.mark.parametrize("value, old, target, loss, gradient, clipfrac, says", [
    (3.0, 2.9, 1.0, 2.0, 2.0, 0, "inside the range: half the squared error"),
    (2.0, 3.0, 1.0, 0.5 * 1.8 ** 2, 0, 1, "a value that moved too far towards its target gains nothing: gradient 0"),
    (4.0, 3.0, 1.0, 4.5, 3.0, 0, "a value that moved away from its target pays in full"),
    (2.0, 3.0, 5.0, 4.5, -3.0, 0, "a value that moved away from its target pays in full"),
    (4.0, 3.0, 5.0, 0.5 * 1.8 ** 2, 0, 1, "a value that moved too far towards its target gains nothing: gradient 0"),
])
def test_the_clipped_value_loss_and_its_gradient(value, old, target, loss, gradient, clipfrac, says):
    """0.5 max((v - R)^2, (clip(v, v_old - e, v_old + e) - R)^2), e = 0.2 (PPO2; Huang 2022)."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    result, info = value_loss(values, torch.tensor([[old]]).double(), torch.tensor([[target]]).double())
    result.backward()
    assert_close(result.item(), loss, says)
    assert_close(values.grad.item(), float(gradient), says)
    assert info["value_clipfrac"] == clipfrac, "value_clipfrac is the share of tokens whose clipped error is the larger"


@masks
@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_value_loss_is_half_the_mean_of_the_larger_error_of_real_tokens(mask, clip):
    """0.5 mean(max((v - R)^2, (v_clipped - R)^2)) over unmasked tokens, one number at a time."""
    values, old, returns = randn(B, T), randn(B, T, seed=1), randn(B, T, seed=2)
    numbers = zip(real(values, mask), real(old, mask), real(returns, mask))
    errors = [((v - r) ** 2, (min(max(v, o - clip), o + clip) - r) ** 2) for v, o, r in numbers]
    loss, info = value_loss(values, old, returns, clip, mask)
    assert_close(loss, mean([0.5 * max(pair) for pair in errors]), "wrong value loss")
    assert_close(info["value_clipfrac"].double(), mean([float(c > e) for e, c in errors]),
                 "value_clipfrac counts a token whose value did not leave the range, or misses one", atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
@masks
def test_a_loss_of_a_batch_is_that_of_its_halves_by_token_count(loss, mask):
    """Token means: loss = sum of n_i loss_i / sum of n_i, so long completions count more than short ones."""
    inputs = [randn(B, T, seed=s) for s in range(3)]
    mask = torch.ones(B, T) if mask is None else mask
    whole, top, bottom = (loss(*(x[rows] for x in inputs), mask=mask[rows])[0] for rows in (slice(B), slice(1), slice(1, B)))
    n, m = mask[:1].sum(), mask[1:].sum()
    assert_close(whole, (n * top + m * bottom) / (n + m), "the loss is not a mean over tokens")


LEAVES = {policy_loss: ("old_logprobs", "advantages"), value_loss: ("old_values", "returns")}


@pytest.mark.parametrize("loss, argument", [(f, i) for f in LEAVES for i in (1, 2)],
                         ids=[f"{f.__name__}: {name}" for f in LEAVES for name in LEAVES[f]])
def test_no_gradient_flows_through_what_the_rollout_recorded(loss, argument):
    """Old log-probabilities, old values, advantages and returns are data: only the first argument learns."""
    inputs = [randn(B, T, seed=s).requires_grad_() for s in range(3)]
    value, info = loss(*inputs)
    value.backward()
    assert inputs[0].grad.abs().sum() > 0, "the model gets no gradient"
    assert inputs[argument].grad is None, "a gradient flows into the rollout: detach it"
    assert not any(x.requires_grad for x in info.values()), "info is for reading: no gradient"


@pytest.mark.parametrize("log_ratio", [50.0, -50.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_extreme_ratios_stay_finite(log_ratio, advantage):
    """exp(50) is 5e21, within float32: loss, gradient and approx_kl are numbers, gradient 0 where clipped."""
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    loss, info = policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]))
    loss.backward()
    ratio = math.exp(log_ratio)
    slope = 0.0 if log_ratio * advantage > 0 else -ratio * advantage
    expected = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert_close(loss.item(), expected, "an extreme ratio breaks the loss", rtol=1e-5, atol=1e-6)
    assert_close(logprobs.grad.item(), slope, "an extreme ratio breaks the gradient", rtol=1e-5, atol=1e-6)
    assert_close(info["approx_kl"].item(), ratio - 1 - log_ratio, "an extreme ratio breaks approx_kl", rtol=1e-5, atol=1e-6)


# ---- masks, types and shapes, for every function that takes (B,T) -----------------------------

SCORES = torch.tensor([0.5, -1.0, 2.0, -0.3])
FUNCTIONS = {
    "kl_penalised_rewards": lambda a, b, c, mask: [kl_penalised_rewards(SCORES[:len(a)], a, b, 0.3, mask)],
    "gae": lambda a, b, c, mask: gae(a, b, 0.9, 0.8, mask),
    "whiten": lambda a, b, c, mask: [whiten(a, mask)],
    "whiten, mean kept": lambda a, b, c, mask: [whiten(a, mask, shift_mean=False)],
    "masked_mean": lambda a, b, c, mask: [masked_mean(a, mask)],
    "policy_loss": lambda a, b, c, mask: [(r := policy_loss(a, b, c, mask=mask))[0], *r[1].values()],
    "value_loss": lambda a, b, c, mask: [(r := value_loss(a, b, c, mask=mask))[0], *r[1].values()],
}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def inputs(*shape, dtype=torch.float32):
    return [randn(*shape, seed=s, dtype=dtype) for s in range(3)]


@functions
def test_a_mask_of_ones_is_no_mask_whatever_its_type(function):
    """None = all ones; booleans, integers and floats are the same mask."""
    holes = torch.tensor(MASKS["holes"])
    for full in (torch.ones(B, T), torch.ones(B, T, dtype=torch.bool), torch.ones(B, T, dtype=torch.long)):
        assert_close(function(*inputs(B, T), full), function(*inputs(B, T), None), "a mask of ones changed something")
    for same in (holes.bool(), holes.float()):
        assert_close(function(*inputs(B, T), same), function(*inputs(B, T), holes), "the type of the mask changed something")


@functions
@some_masks
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_lies_under_the_mask_never_leaks(function, mask, garbage):
    """Masked positions influence no value, come out 0, and get gradient 0: padding may hold anything."""
    clean = function(*inputs(B, T), mask)
    dirty = [x.masked_fill(mask == 0, garbage).requires_grad_() for x in inputs(B, T)]
    outputs = function(*dirty, mask)
    assert_close(list(outputs), list(clean), f"{garbage} under the mask leaked into the result")
    for y in outputs:
        if y.dim() == 2:
            assert (y[mask == 0] == 0).all(), "masked positions should come out 0"
    if any(y.requires_grad for y in outputs):
        sum((i + 1) * y.sum() for i, y in enumerate(outputs) if y.requires_grad).backward()
        for x in dirty:
            assert x.grad is None or x.grad.isfinite().all() and (x.grad[mask == 0] == 0).all(), \
                f"{garbage} under the mask leaked into the gradient"


@functions
def test_float64_stays_float64_and_bf16_becomes_float32(function):
    """Advantages and losses are computed in float32 at least; float64 is kept for checks like these."""
    for given, wanted in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        output = function(*inputs(B, T, dtype=given), None)[0]
        assert output.dtype == wanted, f"{given} came out as {output.dtype}"


@functions
@shapes
def test_odd_shapes_work(function, shape):
    """One token, one completion: outputs are finite and (B,T), or a single number."""
    for mask in (None, torch.ones(shape)):
        for y in function(*inputs(*shape), mask):
            assert y.shape in (shape, ()) and y.isfinite().all(), "an odd shape breaks this function"


@functions
@masks
def test_results_stay_on_the_device_of_the_inputs(function, mask):
    """On torch's meta device, which refuses tensors of the CPU, as CUDA would."""
    outputs = function(*(x.to("meta") for x in inputs(B, T)), None if mask is None else mask.to("meta"))
    assert all(y.is_meta for y in outputs), "something was computed on the CPU"


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_gae_keeps_the_digits_of_whichever_input_has_more(dtypes):
    """Rewards and values of two precisions: advantages in the higher one."""
    rewards, values = randn(B, T).to(dtypes[0]), randn(B, T, seed=1).to(dtypes[1])
    for found, expected in zip(gae(rewards, values), gae(rewards.double(), values.double())):
        assert_close(found, expected, "digits were lost on the way")


def test_nothing_is_clipped_where_nothing_moved():
    """clipfrac counts ratios outside the range, and 1 is inside even where the range is [1, 1]."""
    x = randn(B, T)
    assert policy_loss(x, x, x, clip=0.0)[1]["clipfrac"] == 0, "a ratio of 1 was counted as clipped"


def test_the_mean_over_nothing_is_0():
    """masked_mean is the sum over unmasked tokens by their number, and 0 where there is none."""
    assert masked_mean(torch.tensor([[1.0, 5.0, 9.0]]), torch.tensor([[1, 1, 0]])) == 3, "mean of 1 and 5"
    assert masked_mean(torch.tensor([[math.nan]]), torch.tensor([[0]])) == 0, "an empty mean should be 0"


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
def test_explained_variance_is_1_if_perfect_and_0_if_constant(values, returns, expected):
    """1 - Var(R - V) / Var(R), defined as 0 where returns do not vary (Huang 2022)."""
    result = explained_variance(torch.tensor(values).float(), torch.tensor(returns).float())
    assert_close(result, expected, "wrong explained variance", atol=1e-6, rtol=0)


@pytest.mark.parametrize("ref_kl, beta, says", [
    (6.0, 0.1, "on target beta stays"),
    (6.6, 0.1 * (1 + 0.1 * 0.0256), "10 % above the target, beta grows by 10 % of n / horizon"),
    (5.4, 0.1 * (1 - 0.1 * 0.0256), "10 % below the target, beta shrinks"),
    (60.0, 0.1 * (1 + 0.2 * 0.0256), "the error is clipped at 0.2"),
    (0.0, 0.1 * (1 - 0.2 * 0.0256), "the error is clipped at -0.2"),
])
def test_the_controller_raises_beta_when_kl_is_above_target(ref_kl, beta, says):
    """e = clip(KL / target - 1, -0.2, 0.2); beta *= 1 + e n / horizon (Ziegler 2019, section 2.2)."""
    controller = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    assert_close(controller.update(ref_kl, n=256), beta, says)
    assert controller.beta == controller.update(6.0, n=256), "the new beta should be kept as .beta"


def test_the_controller_goes_on_where_it_stopped():
    """beta multiplies up over updates, and survives being saved and loaded."""
    controller, resumed = AdaptiveKL(0.1, 6.0, 1000), AdaptiveKL(9.0, 6.0, 1000)
    for _ in range(3):
        controller.update(100.0, 500)
    assert_close(controller.beta, 0.1 * 1.1 ** 3, "three updates of +10 % should multiply")
    resumed.load_state_dict(controller.state_dict())
    assert resumed.beta == controller.beta, "beta was lost in the checkpoint"


# ---- the exact optimum ------------------------------------------------------------------------

BETAS = pytest.mark.parametrize("beta", [0.05, 0.2, 1.0, 10.0])


def world(beta):
    """rho, scores and pi* = rho exp(r / beta) / Z of all 81 completions, and J* = beta log Z."""
    rho, scores = probabilities(language(3)), randn(81, seed=7)
    Z = (rho * (scores / beta).exp()).sum()
    return rho, scores, rho * (scores / beta).exp() / Z, beta * Z.log()


@BETAS
def test_the_optimum_equals_enumeration(beta):
    """Weighing all 81 completions by rho: J* = beta log Z, score = E_pi*[r], ref_kl = KL(pi* to rho)."""
    rho, scores, best, objective = world(beta)
    found = optimum(scores, beta, log_weights=rho.log())
    assert_close(found["objective"], objective.item(), "J* is not beta log E_rho[exp(r / beta)]")
    assert_close(found["score"], (best * scores).sum().item(), "score is not the mean of r under pi*")
    assert_close(found["ref_kl"], sequence_kl(best, rho).item(), "ref_kl is not KL(pi* to rho)", atol=1e-9, rtol=1e-7)
    assert_close(found["ess"], 1 / (best ** 2).sum().item(), "ess is (sum w)^2 / sum w^2")
    shifted = optimum(scores, beta, log_weights=rho.log() + 5)
    assert_close(shifted, found, "weights are self-normalised: a constant factor should cancel", atol=1e-9, rtol=1e-7)


@BETAS
def test_no_policy_beats_the_optimum_and_the_gap_is_beta_kl_to_it(beta):
    """J* - J(pi) = beta KL(pi to pi*) >= 0, with equality at pi* only (Korbak 2022), for 200 random policies."""
    rho, scores, best, _ = world(beta)
    objective = optimum(scores, beta, log_weights=rho.log())["objective"]
    policies = [rho, best] + [(3 * randn(81, seed=s)).softmax(0) for s in range(100)] \
        + [(best.log() + 0.1 * randn(81, seed=s)).softmax(0) for s in range(100)]
    for pi in policies:
        J = (pi * scores).sum() - beta * sequence_kl(pi, rho)
        assert J <= objective + 1e-9, "a policy beats J*"
        assert_close(objective - J.item(), beta * sequence_kl(pi, best).item(),
                     "the gap to J* is not beta KL(pi to pi*)", atol=1e-9, rtol=1e-7)


def test_the_optimum_from_samples_of_the_reference_counts_each_once():
    """Samples a a b c of rho = (1/2, 1/4, 1/4), r = log (1, 2, 4), beta = 1: Z = 2, pi* = (1/4, 1/4, 1/2)."""
    found = optimum(torch.tensor([1.0, 1.0, 2.0, 4.0]).log(), 1.0)
    assert_close(found["objective"], math.log(2), "J* = log 2")
    assert_close(found["score"], 1.25 * math.log(2), "score = (log 2) / 4 + (log 4) / 2", atol=1e-6, rtol=0)
    assert_close(found["ref_kl"], 0.25 * math.log(2), "KL = (log 1/2) / 4 + (log 2) / 2", atol=1e-6, rtol=0)
    assert_close(found["ess"], 64 / 22, "weights 1 1 2 4: ess = 8^2 / 22", atol=1e-6, rtol=0)


def test_with_score_log_p_and_beta_1_the_optimum_is_bayes():
    """r = log P(positive given y), beta = 1: J* = log P(positive), and pi* = rho(y given positive)."""
    p = torch.tensor([0.9, 0.5, 0.1]).double()
    found = optimum(p.log(), 1.0)
    assert_close(found["objective"], math.log(0.5), "J* should be the log of the mean probability")
    assert_close(found["score"], ((p / 1.5) * p.log()).sum().item(), "score should be the posterior mean")


def test_the_optimum_goes_from_the_best_sample_to_the_mean_as_beta_grows():
    """beta -> 0: all weight on max r, ess 1. beta -> infinity: pi* = rho, ess N, KL 0."""
    scores = torch.tensor([3.0, -1.0, 0.5, 2.0])
    names = ("score", "objective", "ref_kl", "ess")
    for beta, expected, says in (
            (1e-3, [3.0, 3.0 - 1e-3 * math.log(4), math.log(4), 1.0], "beta near 0 takes the best sample"),
            (1e6, [1.125, 1.125, 0.0, 4.0], "a huge beta stays at rho")):
        found = optimum(scores, beta)
        assert_close([found[name] for name in names], expected, says, atol=1e-5, rtol=0)


def test_the_optimum_takes_extreme_scores_and_plain_lists():
    """exp(r / beta) overflows long before its logarithm does."""
    assert_close(optimum([0, 1], 1.0, [0, 1]), optimum(torch.arange(2.0), 1.0, torch.arange(2.0)), "plain numbers are read otherwise")
    found = optimum([-1e4, 1e4], 0.01)
    assert_close(found["objective"], 1e4 - 0.01 * math.log(2), "a large score overflows")
    assert all(math.isfinite(x) for x in found.values()), "every estimate should stay finite"


@pytest.mark.parametrize("beta", [0, -0.1])
def test_without_a_positive_beta_there_is_no_optimum(beta):
    """rho exp(r / beta) needs beta > 0."""
    with pytest.raises(ValueError, match="beta must be positive"):
        optimum(torch.zeros(3), beta)


def test_the_standard_error_of_the_optimum_has_its_closed_forms():
    """Equal scores: J* is that score, error 0. beta -> infinity: the error of a plain mean, sigma / sqrt(N)."""
    scores = randn(500)
    error = scores.std(correction=0).item() / math.sqrt(500)
    assert_close(optimum(torch.full((500,), 2.0), 0.1)["objective_se"], 0.0, "equal scores leave no doubt", atol=1e-12, rtol=0)
    assert_close(optimum(scores, 1e5)["objective_se"], error, "not the error of a mean", atol=0, rtol=1e-3)


def draw(probs, n, seed):
    return torch.multinomial(probs, n, replacement=True, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighted", [False, True], ids=["from rho", "from another policy"])
def test_the_standard_error_of_the_optimum_is_calibrated(weighted):
    """(estimate - J*) / objective_se has deviation 1: over 500 repeats, within 4 of its errors (4 / sqrt(1000))."""
    rho, scores, best, objective = world(1.0)
    source = (0.5 * rho.log() + 0.5 * best.log()).softmax(0) if weighted else rho
    z = []
    for seed in range(500):
        y = draw(source, 1000, seed)
        found = optimum(scores[y], 1.0, (rho / source).log()[y] if weighted else None)
        z.append((found["objective"] - objective.item()) / found["objective_se"])
    z = torch.tensor(z)
    assert abs(z.std() - 1) < 0.127, f"errors are {z.std():.2f} times the standard error given"
    assert abs(z.mean()) < 4 / math.sqrt(500) + 0.05, f"the estimate is off by {z.mean():.2f} standard errors"


# ---- samples of several policies ----------------------------------------------------------------

def test_mixture_weights_are_rho_over_the_mixture():
    """rho / sum_i (n_i / N) p_i (the balance heuristic, Veach 1995); their mean over the mixture is 1."""
    p = torch.stack([probabilities(language(s)) for s in (3, 4, 5)])                # (policy,y)
    q = (100 * p[0] + 300 * p[1] + 600 * p[2]) / 1000
    for counts in ([100, 300, 600], torch.tensor([100, 300, 600])):
        weights = mixture_log_weights(p.log(), counts)
        assert_close(weights, (p[0] / q).log(), "the weight of a sample is not log(rho / mixture)", atol=1e-12, rtol=0)
    assert_close((q * weights.exp()).sum().item(), 1.0, "weights should average to 1 over the mixture")


def test_samples_of_the_reference_alone_have_weight_1():
    """One policy, or others that drew nothing: log(rho / rho) = 0, and log-probabilities of -1000 do not underflow."""
    assert_close(mixture_log_weights(torch.tensor([[-3.0, -1000.0]]), [7]), torch.zeros(2).double(), "rho / rho should be 1")
    assert_close(mixture_log_weights(torch.tensor([[-3.0, -1000.0], [-1.0, -990.0]]), [7, 0]), torch.zeros(2).double(),
                 "a policy that drew nothing should not count")


def test_pooling_samples_of_a_policy_reaches_small_beta():
    """beta = 0.02: 3,000 samples of rho have ess below 100; with half of them from a tuned policy all is found.

    40 repeats; their mean lies within 4 standard errors of enumeration (one false alarm in 5,000 with fresh seeds).
    """
    beta, rho, scores = 0.02, probabilities(language(3)), torch.nn.functional.logsigmoid(2 * randn(81, seed=8))
    best, tuned = (rho.log() + scores / beta).softmax(0), (rho.log() + scores / 0.1).softmax(0)
    repeats = []
    for seed in range(40):
        y = torch.cat((draw(rho, 1500, seed), draw(tuned, 1500, 1000 + seed)))
        log_weights = mixture_log_weights(torch.stack((rho.log(), tuned.log()))[:, y], [1500, 1500])
        repeats.append(optimum(scores[y], beta, log_weights))
    assert optimum(scores[draw(rho, 3000, 0)], beta)["ess"] < 100, "this beta should be out of reach of rho alone"
    assert min(found["ess"] for found in repeats) > 200, "pooled samples should be enough"
    truth = {"objective": beta * (rho * (scores / beta).exp()).sum().log(),
             "score": (best * scores).sum(), "ref_kl": sequence_kl(best, rho)}
    for name, expected in truth.items():
        x = torch.tensor([found[name] for found in repeats]).double()
        assert abs(x.mean() - expected) < 4 * x.std() / math.sqrt(40), \
            f"pooled samples give {name} {x.mean():.4f}, enumeration {expected:.4f}"
    errors = [abs(found["objective"] - truth["objective"]) / found["objective_se"] for found in repeats]
    assert max(errors) < 5, f"J* is {max(errors):.1f} standard errors off"


# ---- best of n ----------------------------------------------------------------------------------

@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_is_the_mean_of_the_maximum_over_all_subsets(n):
    """E[max of n] over the C(7, n) subsets, one by one; unsorted, with ties and negatives."""
    scores = [0.3, -2.0, 1.5, 0.3, 4.0, -0.7, 1.5]
    expected = mean([max(subset) for subset in itertools.combinations(scores, n)]).item()
    for given in (scores, torch.tensor(scores, dtype=torch.float64)):
        assert_close(best_of_n(given, n)[0], expected, f"best of {n} differs from brute force", atol=1e-12, rtol=0)


def test_best_of_1_is_the_mean_and_best_of_all_the_maximum():
    """n = 1 and n = N, for 5,000 scores, where C(N, n) overflows but its logarithm does not."""
    scores = randn(5000)
    assert_close(best_of_n(scores, 1)[0], scores.mean().item(), "best of 1 is the mean", atol=1e-9, rtol=0)
    assert_close(best_of_n(scores, 5000)[0], scores.max().item(), "best of all is the maximum", atol=1e-8, rtol=0)
    middle = best_of_n(torch.arange(5000.0), 2499)[0]
    assert_close(middle, 2499 * 5001 / 2500 - 1, "best of n of 0..N-1 is n (N + 1) / (n + 1) - 1", atol=1e-5, rtol=0)


@pytest.mark.parametrize("n, bound", [(1, 0.0), (2, math.log(2) - 1 / 2), (4, math.log(4) - 3 / 4), (16, 1.8350887)])
def test_the_kl_of_best_of_n_is_at_most_log_n_minus_n_minus_1_over_n(n, bound):
    """log n - (n-1)/n, and tight: 20,000 equally likely texts, the i-th best picked with (i/N)^n - ((i-1)/N)^n."""
    assert_close(best_of_n(torch.zeros(20), n)[1], bound, "wrong bound on the KL of best-of-n", atol=1e-6, rtol=0)
    share = torch.linspace(0, 1, 20_001).double()
    kl = sequence_kl((share ** n).diff().clamp(min=1e-300), torch.full((20_000,), 1 / 20_000).double())
    assert bound - 0.01 < kl <= bound + 1e-6, f"the true KL is {kl:.4f}, the bound {bound:.4f}"


@pytest.mark.parametrize("n", [0, 4])
def test_best_of_n_needs_n_scores(n):
    """1 <= n <= N, else there is no subset to take the best of."""
    with pytest.raises(ValueError, match="n must be from 1 to the number of scores, 3"):
        best_of_n([1.0, 2.0, 3.0], n)
