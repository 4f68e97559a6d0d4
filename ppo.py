"""RLHF itself: rollouts, the KL penalty, advantages, losses, the PPO loop, and the exact optimum.

Fourth on the reader's path, after reward.py. This file knows nothing of sentiment: a reward
is any score_fn(tokens (B,T)) -> (B,). The policy pi starts as a copy of the reference rho
and is trained to maximise

    J(pi) = E[score(y)] - beta * KL(pi to rho)          (Ziegler 2019)

One iteration, with the numbers of the comments below and of the README:

    1. sample completions from the policy
    2. read them: log-probabilities under policy and reference, values, scores
    3. rewards: the KL penalty of every token, and the score on the last
    4. advantages and returns
    5. update the policy on minibatches (clipped ratio)
    6. fit the value function to the rewards-to-go

Departures from the textbook: the value function is linear in fixed features of what was written so
far, and fitted by least squares, where others train one more layer on the policy's trunk. So step 6
costs next to nothing and disturbs no policy. And there is one epoch of updates, not four: in a run
of full length the time is better spent on fresh samples.

A completion is T token ids. Where it ended before its full length, PAD (-1) fills the rest, and
mask (B,T), 1 for real tokens, keeps what lies there out of every sum. Prompts are padded on the
left. Unconditional samples are the case of one prompt, the blank line before a speech.

`python train.py --beta 0.1` runs it; `pytest tests/test_ppo.py tests/test_loop.py` proves it.
"""

import copy
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import (PAD, Generator, average, completion_hidden, completion_logits, descend, in_chunks,
                 sample_completions, set_rates, share)


MIN_ESS = 100       # effective samples below which an optimum is not quoted


# ---- the mathematics: pure functions on plain tensors -------------------------------------

def _masked(x, mask):
    """x in at least float32 with masked positions set to 0, and the mask as booleans."""
    x = x if x.dtype == torch.float64 else x.float()
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    mask = mask.bool()
    return x.masked_fill(~mask, 0.0), mask


def masked_mean(x, mask=None):
    """Mean of x (B,T) over unmasked positions; 0 where there is none."""
    x, mask = _masked(x, mask)
    return x.sum() / mask.sum().clamp(min=1)


def token_logprobs(logits, tokens):
    """log softmax(logits)[token]: logits (B,T,V), tokens (B,T) -> (B,T), float32, in nats.

    logits[:, t] must be those that predict tokens[:, t]: the model's output one position
    earlier. What comes out for PAD means nothing; the mask keeps it out.
    """
    return of_tokens(logits.float().log_softmax(-1), tokens)


def of_tokens(logprobs, tokens):
    """Of whole distributions (B,T,V) what they say of tokens (B,T): (B,T)."""
    index = tokens.clamp(min=0)[..., None]
    return logprobs.gather(-1, index).squeeze(-1)


def kl_penalised_rewards(scores, logprobs, ref_logprobs, beta, mask=None):
    """Per-token rewards (B,T): -beta (log pi_old - log rho), plus the score on the last token.

    scores (B,), logprobs and ref_logprobs (B,T) of the sampled tokens, in nats. Each row
    sums to score - beta * sum of k1 (Ziegler 2019, equation 2). No gradient flows through it.

    >>> logprobs, ref_logprobs = torch.tensor([[-1., -2.]]), torch.tensor([[-2., -2.]])
    >>> kl_penalised_rewards(torch.tensor([1.]), logprobs, ref_logprobs, beta=0.5)
    tensor([[-0.5000,  1.0000]])
    """
    k1, mask = _masked((logprobs - ref_logprobs).detach(), mask)
    rewards = -beta * k1
    position = torch.arange(1, k1.size(1) + 1, device=mask.device)
    last = (mask * position).argmax(1, keepdim=True)                    # (B,1): the last real one
    scores = scores.detach().to(k1.dtype)[:, None]
    rewards = rewards.scatter_add(1, last, scores)
    return rewards.masked_fill(~mask, 0.0)


def gae(rewards, values, gamma=1.0, lam=0.95, mask=None):
    """Generalised advantage estimation (Schulman 2015, equation 16): advantages, returns (B,T).

    advantage_t = sum over l >= 0 of (gamma lam)^l delta_{t+l},
    delta_t = reward_t + gamma value_{t+1} - value_t, with value 0 after the last token.
    returns = advantages + values (the loop fits its values to rewards_to_go instead). Masked
    positions are skipped over and come out 0.
    """
    rewards, mask = _masked(rewards, mask)
    values, _ = _masked(values, mask)
    advantages = torch.zeros_like(rewards + values)
    advantage = next_value = torch.zeros_like(advantages[:, 0])
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Where token t is masked, both stay what they were after it.
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values


def rewards_to_go(rewards, mask=None):
    """The sum of the rewards from each token to the last: (B,T)."""
    rewards, mask = _masked(rewards, mask)
    return rewards.flip(1).cumsum(1).flip(1).masked_fill(~mask, 0.0)


def leave_one_out(returns, group):
    """returns (B,T) minus the mean of the others of its group at the same position.

    After Ahmadian 2024, who compare whole completions. Every group of consecutive rows completes
    one prompt. What the others earned does not depend on this completion's tokens, so as a baseline
    it changes no expectation. Raises ValueError for a group of one.
    """
    if group < 2:
        raise ValueError("a completion alone has no others to be compared with")
    grouped = returns.view(-1, group, returns.size(1))
    total = grouped.sum(1, keepdim=True)
    others = (total - grouped) / (group - 1)
    return (grouped - others).view_as(returns)


def whiten(x, mask=None, shift_mean=True):
    """x (B,T) with mean 0 and population deviation 1 over all unmasked positions of the batch.

    shift_mean=False rescales and keeps the mean. Masked positions come out 0.
    """
    x, mask = _masked(x, mask)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0.0)


def policy_loss(logprobs, old_logprobs, advantages, clip=0.2, mask=None):
    """PPO's clipped surrogate (Schulman 2017, equation 7): loss, info.

    -mean(min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)) with ratio = pi / pi_old, over unmasked
    tokens. info: approx_kl = KL(pi_old to pi) in nats per token (k3), clipfrac = share of
    tokens whose ratio lies outside the clip range, ratio = its mean.
    """
    # Masked ratios become 1, and masked advantages 0: they add nothing to any sum.
    log_ratio, mask = _masked(logprobs - old_logprobs.detach(), mask)
    advantages, _ = _masked(advantages.detach(), mask)
    # exp(89) is infinite in float32, and its gradient no number.
    ratio = log_ratio.clamp(max=80).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    # The smaller of both: nothing is gained outside the range, but what is lost there counts.
    surrogate = torch.min(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        outside = (ratio - 1).abs() > clip
        # Tokens come from pi_old, so k1 of KL(pi_old to pi) is -log_ratio: see kl_estimates.
        k3 = torch.expm1(log_ratio) - log_ratio
        info = {"approx_kl": masked_mean(k3, mask),
                "clipfrac": masked_mean(outside.float(), mask),
                "ratio": masked_mean(ratio, mask)}
    return -masked_mean(surrogate, mask), info


def value_loss(values, old_values, returns, clip=0.2, mask=None):
    """The textbook's loss of values on a shared trunk, clipped as PPO2 does: loss, info.

    Training does not use it, for least squares fits the values: its unclipped value is logged.
    0.5 mean(max((v - R)^2, (v_old + clip(v - v_old, -clip, clip) - R)^2)) over unmasked tokens.
    """
    values, mask = _masked(values, mask)
    old_values, _ = _masked(old_values.detach(), mask)
    returns, _ = _masked(returns.detach(), mask)
    # The old values are what the rollout recorded.
    clipped = values.clamp(old_values - clip, old_values + clip)
    error = (values - returns) ** 2
    clipped_error = (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(error, clipped_error), mask)
    clipfrac = masked_mean((clipped_error > error).float(), mask)
    return loss, {"value_clipfrac": clipfrac.detach()}


def kl_estimates(logprobs, ref_logprobs):
    """Schulman's k1, k2, k3 of KL(pi to rho) from tokens drawn from pi, each (B,T), in nats.

    k1 = log pi - log rho, unbiased; k2 = k1^2 / 2, biased; k3 = exp(-k1) - 1 + k1, unbiased
    and never negative. (exp(k1) - 1 - k1, often seen, estimates another quantity.) The loop uses k1
    and, in policy_loss, k3.
    """
    k1 = logprobs - ref_logprobs
    k2 = k1 ** 2 / 2
    k3 = torch.expm1(-k1) + k1
    return k1, k2, k3


def exact_kl(logprobs, ref_logprobs):
    """KL(pi to rho) of the next token, from whole distributions (B,T,V) at every prefix: (B,T).

    In nats. Its sum over tokens estimates the same KL as the sum of k1, with less variance.
    """
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


def entropy(logprobs):
    """Entropy of the next token, from the whole distribution (B,T,V): (B,T), nats."""
    return torch.special.entr(logprobs.exp()).sum(-1)


def explained_variance(values, returns, mask=None):
    """1 - Var(returns - values) / Var(returns) over unmasked tokens; 0 if returns do not vary."""
    returns, mask = _masked(returns, mask)
    variance = returns[mask].var(correction=0)
    if variance == 0:
        return 0.0
    left = (returns - values)[mask].var(correction=0)
    return (1 - left / variance).item()


class AdaptiveKL:
    """The KL controller of Ziegler 2019, section 2.2: moves beta until ref_kl meets its target.

    ref_kl and target in nats per completion, n and horizon in completions. .beta is the
    coefficient in force.
    """

    def __init__(self, beta, target, horizon):
        self.beta = beta
        self.target = target
        self.horizon = horizon

    def update(self, ref_kl, n):
        """beta *= 1 + clip(ref_kl / target - 1, -0.2, 0.2) * n / horizon; returns the new beta."""
        # Bounded, or one noisy batch could throw beta far off.
        error = min(max(ref_kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * n / self.horizon
        return self.beta

    def state_dict(self):
        return {"beta": self.beta}

    def load_state_dict(self, state):
        self.beta = state["beta"]


# ---- the yardsticks: the exact optimum and best-of-n --------------------------------------

def optimum(scores, beta, log_weights=None):
    """The best policy there is, pi*(y) = rho(y) exp(r(y)/beta) / Z, from samples of rho.

    scores (N,), or (P,N) of N completions of each of P prompts: then means over prompts.
    log_weights: log(rho/q) of each sample where it was drawn from q instead; the estimate is
    self-normalised. Returns a dict: objective J* = beta log E_rho[exp(r/beta)], score = E_pi*[r],
    ref_kl = (score - objective) / beta in nats per completion, ess, the effective number of
    samples (of the prompt that has fewest), and objective_se, the standard error of J* (delta
    method). Below an ess of 100 the numbers mean little: the logarithm of a mean of few is too
    low, for every prompt. (Korbak 2022: RL with KL penalties is Bayesian inference.)
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive for an optimum to exist, not {beta}")
    scores = torch.as_tensor(scores, dtype=torch.float64)
    base = torch.zeros_like(scores)
    if log_weights is not None:
        base = torch.as_tensor(log_weights, dtype=torch.float64)
    # In logarithms throughout: exp(score / beta) overflows for small beta.
    tilted = base + scores / beta
    objective = beta * (tilted.logsumexp(-1) - base.logsumexp(-1))       # (P,), or of one prompt ()
    weights = tilted.softmax(-1)
    score = (weights * scores).sum(-1)
    # Delta method: J* is a smooth function of two weighted means of the same samples.
    difference = weights - base.softmax(-1)
    variance = difference.square().sum(-1)
    found = {"objective": objective.mean(),
             "score": score.mean(),
             "ref_kl": (score - objective).mean() / beta,
             "ess": (1 / weights.square().sum(-1)).min(),
             "objective_se": beta * variance.sum().sqrt() / variance.numel()}
    return {name: x.item() for name, x in found.items()}


def optimum_bound(scores, beta, log_weights, sure=0.95):
    """What J* is at least, with this certainty, however few of the samples count. A float.

    scores and log_weights (N,) or (P,N) as for optimum(), the latter exact: log(rho/q). The mean of
    exp(r/beta) rho/q is right on average and positive, so by Markov's inequality it is k times too
    large in one of k cases at most; and so is the product of such means of P prompts. Being that
    sure costs beta log k / P: little where beta is small.
    """
    tilted = log_weights.double() + scores.double() / beta
    log_means = tilted.logsumexp(-1) - math.log(tilted.size(-1))        # (P,), or of one prompt ()
    k = 1 / (1 - sure)
    price = math.log(k) / log_means.numel()
    return beta * (log_means.mean().item() - price)


def mixture_log_weights(logprobs, counts):
    """log(rho/q) of samples of several policies, q their mixture (balance heuristic, Veach 1995).

    logprobs (P,N): row i is policy i's log-probability of every pooled sample, row 0 that of
    rho; counts (P,): how many of the N samples each policy drew. Returns (N,).
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    logprobs = logprobs.double()
    shares = (counts / counts.sum()).log()[:, None]
    return logprobs[0] - (logprobs + shares).logsumexp(0)


def best_of_n(scores, n):
    """(expected best score among n samples, bound on KL(best-of-n to rho) in nats).

    The expectation over all subsets of n of the scores (N,) given: in C(i, n) of the C(N, n) all
    are among the i smallest. Of scores (P,N) the mean over prompts. The bound is log n - (n-1)/n.
    """
    scores = torch.as_tensor(scores, dtype=torch.float64).cpu().sort(-1).values
    N = scores.size(-1)
    if not 1 <= n <= N:
        raise ValueError(f"n must be from 1 to the number of scores, {N}, not {n}")
    i = torch.arange(N + 1, dtype=torch.float64)
    # log C(i, n) but for a constant; where i is below n, lgamma is infinite, and this log 0.
    log_ways = torch.lgamma(i + 1) - torch.lgamma(i + 1 - n)
    # How likely all n are among the i smallest; its steps: how likely the i-th smallest is best.
    all_below = (log_ways - log_ways[-1]).exp()
    is_best = all_below.diff()
    best = (is_best * scores).sum(-1)
    kl = math.log(n) - (n - 1) / n
    return best.mean().item(), kl


# ---- the loop -----------------------------------------------------------------------------

def option(default, text, **more):
    """A field of PPOConfig: its default, and what --help says of it."""
    return field(default=default, metadata={"help": text, **more})


@dataclass
class PPOConfig:
    """The settings of a PPO run; each is an option of train.py."""
    beta: float = option(0.2, "KL coefficient")
    algorithm: str = option("ppo", "simple: rewards-to-go as advantages, no value function; rloo: "
                            "minus those of the other completions; ppo: GAE on a value function",
                            choices=["simple", "rloo", "ppo"])
    iterations: int = option(50, "of sampling and updating: more come closer to the optimum")
    length: int = option(64, "tokens of a completion")
    batch: int = option(512, "completions an iteration: more mean less noise")
    per_prompt: int = option(4, "completions of each prompt in a batch (rloo compares them); "
                             "where there is one prompt, all are of it")
    minibatch: int = option(32, "completions an optimizer step")
    epochs: int = option(1, "passes over each batch")
    lr: float = option(1.5e-3, "learning rate at the start; too high spends KL on noise")
    clip: float = option(0.2, "how far from 1 a ratio may gain by going")
    lam: float = option(0.8, "GAE's lambda: lower trusts the value function more")
    max_update_kl: float = option(0.01, "approx_kl, nats per token, that ends an update early")
    adaptive_kl_target: float = option(0.0, "ref_kl, nats per completion, that an adaptive beta "
                                       "keeps (Ziegler 2019); 0: beta stays")
    adaptive_kl_horizon: float = option(10_000.0, "completions: beta moves by at most "
                                        "0.2 batch / horizon an iteration")

    def __post_init__(self):
        wrong = {
            f"--lam {self.lam:g} must be from 0 to 1": not 0 <= self.lam <= 1,
            "--algorithm rloo compares completions: --batch and --per-prompt must be 2 or more":
                self.algorithm == "rloo" and min(self.batch, self.per_prompt) < 2,
            "--adaptive-kl-target multiplies beta, so --beta 0 would stay 0: start above":
                self.adaptive_kl_target > 0 and self.beta == 0,
            f"--adaptive-kl-horizon must be above 0.2 of --batch, {0.2 * self.batch:g}, or beta "
            "could become negative":
                self.adaptive_kl_target > 0 and self.adaptive_kl_horizon <= 0.2 * self.batch}
        for message, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(message)


class ValueFunction(nn.Module):
    """V: the rewards still to come, linear in features of the text before each token. Starts at 0.

    Its terms: 1, t and t^2 of the position t, from 0 to 1; the features; and of the last `known` of
    these, which are readings of the score so far, also their products with t and their squares.
    Few weights on fixed inputs: a batch decides them in one go, by least squares, where a network
    would need a learning rate and many steps.
    """

    def __init__(self, features, known=0):
        super().__init__()
        self.known = known
        size = 3 + features + 2 * known
        self.register_buffer("weight", torch.zeros(size, dtype=torch.float64))

    def terms(self, features):
        """features (B,T,F) before each token -> what the weights multiply (B,T,M), float64."""
        B, T, n = features.shape
        known = features[..., n - self.known:]
        t = torch.arange(T, device=features.device) / T
        t = t.expand(B, T)[..., None]                                   # (B,T,1)
        terms = (torch.ones_like(t), t, t * t, features, known * t, known * known)
        return torch.cat(terms, dim=-1).double()

    def forward(self, features):
        """features (B,T,F) before each token -> values (B,T) before each token."""
        return (self.terms(features) @ self.weight).float()

    def fit(self, features, returns, mask):
        """Step 6: the weights whose values are nearest to returns (B,T) over unmasked tokens."""
        # Ridge regression: the ones pull weights that nothing else decides to 0.
        covariance = torch.eye(len(self.weight), dtype=torch.float64, device=self.weight.device)
        correlation = torch.zeros_like(self.weight)
        # A few rows at a time: all terms of a large batch, in float64, would fill the memory.
        for x, y, real in zip(features.split(64), returns.split(64), mask.split(64)):
            x = self.terms(x)[real]                                     # (tokens,M)
            covariance += x.T @ x
            correlation += x.T @ y[real].double()
        self.weight.copy_(torch.linalg.solve(covariance, correlation))


def learning_rate(i, iterations):
    """The learning rate of iteration i as a share of its peak: falls to 0, fast at first.

    So many late steps average out the noise.
    """
    return (1 - i / iterations) ** 2


class PPO:
    """A PPO run: step(i) does iteration i and returns its metrics; parts is all that it changes.

    ref: the GPT rho, copied and frozen. score_fn: tokens (B,T) -> (B,), on completions without
    their prompt. prompts (P,T0): drawn from at random; one row: unconditional. features_fn:
    tokens (B,T) -> (B,T,F), features of the text up to and with each token; the value function
    reads them beside rho's hidden states. end: the token that ends a completion; None: none does.
    seed: of sampling and shuffling. The values start at 0: warm_up() first, or at lambda below 1
    the early tokens hardly see the score.
    """

    def __init__(self, ref, score_fn, prompts, config, seed=0, features_fn=None, end=None):
        self.config = config
        self.score_fn = score_fn
        self.features_fn = features_fn
        self.prompts = prompts
        self.end = end
        # A copy: shared weights would move along, and KL would be 0 for ever.
        self.ref = copy.deepcopy(ref).requires_grad_(False)
        self.policy = copy.deepcopy(ref).requires_grad_(True)
        # Two streams, two seeds: from the same one both would draw the same numbers. The second
        # chooses prompts and minibatches.
        self.sampler = Generator(prompts.device).manual_seed(seed)
        self.shuffler = Generator().manual_seed(seed + 1)
        known = 0
        if features_fn is not None:
            known = features_fn(prompts.new_zeros(1, config.length)).size(-1)
        self.value = ValueFunction(ref.config.n_embd + known, known).to(prompts.device)
        # Adam moves every weight about as far, however small its gradient, for it divides by the
        # gradient's size. But a small one may be mostly noise. With so large an epsilon it moves
        # its weight little, as plain momentum does (results/LOG.md compares).
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=config.lr, eps=1e-3,
                                           betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.controller = AdaptiveKL(config.beta, config.adaptive_kl_target,
                                     config.adaptive_kl_horizon)
        names = ("policy", "value", "optimizer", "controller", "sampler", "shuffler")
        self.parts = {name: getattr(self, name) for name in names}

    def warm_up(self, prompts, tokens):
        """Fit the values to completions tokens (N,T) of prompts (N,T0) that rho has drawn.

        The policy is still rho, so there is no penalty to come: at every token just the score.
        """
        read = in_chunks(self.read, prompts, tokens)
        returns = read["scores"][:, None].expand(tokens.shape)
        self.value.fit(read["features"], returns, tokens != PAD)

    def features(self, tokens, hidden):
        """What the value function knows before each token of completions (B,T): (B,T,F).

        hidden (B,T,C): rho's hidden states there.
        """
        if self.features_fn is None:
            return hidden.float()
        # One place later, zeros in front: before token t the text ends with token t-1.
        known = F.pad(self.features_fn(tokens), (0, 0, 1, -1))
        return torch.cat((hidden.float(), known), -1)

    @torch.no_grad()
    def read(self, prompts, tokens):
        """Step 2: all that is read off completions (B,T): a dict of (B,), (B,T), (B,T,F)."""
        hidden = completion_hidden(self.ref, prompts, tokens)
        ref_logprobs = self.ref.logits(hidden).log_softmax(-1)                      # (B,T,V)
        logprobs = completion_logits(self.policy, prompts, tokens).log_softmax(-1)
        features = self.features(tokens, hidden)
        return {"scores": self.score_fn(tokens),
                "logprobs": of_tokens(logprobs, tokens),
                "ref_logprobs": of_tokens(ref_logprobs, tokens),
                "features": features,
                "values": self.value(features),
                "exact_kl": exact_kl(logprobs, ref_logprobs),
                "entropy": entropy(logprobs)}

    def rollout(self, n):
        """Steps 1 and 2: n completions drawn from the policy, and all that is read off them."""
        # Completions of one prompt stand side by side, for leave_one_out.
        group = self.group(n)
        rows = torch.randint(len(self.prompts), (n // group,), generator=self.shuffler)
        prompts = self.prompts[rows.repeat_interleave(group)]
        tokens = sample_completions(self.policy, prompts, self.config.length, self.sampler,
                                    self.end)
        read = in_chunks(self.read, prompts, tokens, size=self.config.minibatch)
        return {"prompts": prompts, "tokens": tokens, "mask": tokens != PAD, **read}

    def group(self, n):
        """How many completions of one prompt stand together in a batch of n."""
        return n if len(self.prompts) == 1 else self.config.per_prompt

    def step(self, i):
        """One iteration: steps 1 to 6. Returns its metrics, a dict of floats (README: glossary)."""
        config, beta = self.config, self.controller.beta
        set_rates([self.optimizer], learning_rate(i, config.iterations))
        # 1. and 2. sample completions, read them
        batch = self.rollout(config.batch)
        mask = batch["mask"]
        check_finite(batch, i)
        # 3. rewards
        rewards = kl_penalised_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"],
                                       beta, mask)
        # 4. advantages and returns, then whitening over the whole batch
        advantages, returns = self.advantages(rewards, batch["values"], mask)
        # What the policy that sampled is worth, before it moves
        metrics = self.describe(batch, returns, beta)
        # 5. and 6. update the policy, fit the value function
        metrics |= self.update(batch, whiten(advantages, mask))
        if config.algorithm == "ppo":
            self.value.fit(batch["features"], returns, mask)
        if config.adaptive_kl_target:
            self.controller.update(metrics["ref_kl"], config.batch)
        self.batch = batch                      # for those who want to look at the samples
        return metrics

    def advantages(self, rewards, values, mask):
        """Step 4: how much better than expected each token was, and the returns: (B,T) both.

        The returns, which the values are fitted to, are what did come: lambda 1.
        """
        returns = rewards_to_go(rewards, mask)
        if self.config.algorithm == "ppo":
            advantages, _ = gae(rewards, values, lam=self.config.lam, mask=mask)
            return advantages, returns
        if self.config.algorithm == "rloo":
            group = self.group(len(returns))
            return leave_one_out(returns, group), returns
        return returns, returns

    def update(self, batch, advantages):
        """Step 5: epochs of minibatches, each completion once an epoch. Returns mean metrics.

        Stops before a step that would start farther than max_update_kl from the policy that
        sampled.
        """
        config, infos = self.config, []
        for everyones in self.minibatches(len(advantages), config.minibatch, config.epochs):
            rows = everyones[share(len(everyones))]
            tokens, mask = batch["tokens"][rows], batch["mask"][rows]
            # This process's part of the tokens, over which losses are means: all of them, if alone.
            weight = mask.sum() / batch["mask"][everyones].sum()
            logits = completion_logits(self.policy, batch["prompts"][rows], tokens)
            logprobs = token_logprobs(logits, tokens)
            loss, info = policy_loss(logprobs, batch["logprobs"][rows], advantages[rows],
                                     config.clip, mask)
            info["policy_loss"] = loss.detach().clone()
            average(info.values(), weight)
            # The first step is always taken: it starts where the sampler stood.
            if infos and info["approx_kl"] > config.max_update_kl:
                break
            info["grad_norm"] = descend(loss, self.policy, [self.optimizer], 1.0, weight)
            infos.append(info)
        metrics = {}
        for key in infos[0]:
            values = torch.stack([info[key] for info in infos])
            metrics[key] = values.mean().item()
        metrics["epochs"] = len(infos) / math.ceil(len(advantages) / config.minibatch)
        return metrics

    def minibatches(self, n, size, epochs):
        """Rows of each minibatch: all n once an epoch, in a new order every time."""
        for _ in range(epochs):
            yield from torch.randperm(n, generator=self.shuffler).split(size)

    def describe(self, batch, returns, beta):
        """The metrics of a batch of completions, of the policy that drew them: a dict of floats."""
        mask, scores = batch["mask"], batch["scores"]
        k1, _ = _masked(batch["logprobs"] - batch["ref_logprobs"], mask)
        ref_kl = k1.sum(1)                                              # (B,): nats a completion
        kl = _masked(batch["exact_kl"], mask)[0].sum(1)
        found = {"score": scores.mean(),
                 "ref_kl": ref_kl.mean(),
                 "ref_kl_se": ref_kl.std(correction=0) / len(ref_kl) ** 0.5,
                 "exact_kl": kl.mean(),
                 # With k1, not the exact KL: near pi*, score - beta k1 is nearly constant.
                 "objective": (scores - beta * ref_kl).mean(),
                 "entropy": masked_mean(batch["entropy"], mask),
                 "ref_logprob": masked_mean(batch["ref_logprobs"], mask),
                 "tokens": mask.sum(1).float().mean()}
        metrics = {name: x.item() for name, x in found.items()}
        metrics["beta"] = beta
        if self.config.algorithm == "ppo":      # the others have no use for values
            values = batch["values"]
            loss, _ = value_loss(values, values, returns, mask=mask)    # nothing to be clipped
            metrics["value_loss"] = loss.item()
            metrics["explained_variance"] = explained_variance(values, returns, mask)
        return metrics


def check_finite(batch, i):
    """Raise FloatingPointError naming the first thing read in iteration i that is not finite."""
    for name, x in batch.items():
        if not torch.isfinite(x).all():
            raise FloatingPointError(f"iteration {i + 1}: {name} of the completions are not "
                                     "finite. Try --fp32 or a lower --lr.")
