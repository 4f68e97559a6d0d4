"""RLHF itself: rollouts, the KL penalty, advantages, losses, the PPO loop, and the exact optimum.

Read this file third, after reward.py. PPO knows nothing of sentiment: a reward is any
score_fn(tokens (B,T)) -> (B,). The policy pi starts as a copy of the reference rho and is trained
to maximise

    J(pi) = E[score(y)] - beta * KL(pi to rho)          (Ziegler 2019)

One iteration, numbered as in PPO.step and in the README:

    1. sample completions from the policy
    2. read them: log-probabilities under policy and reference, values, scores
    3. rewards: the KL penalty of every token, and the score on the last
    4. advantages and returns
    5. update the policy on minibatches (clipped ratio)
    6. fit the value function to the rewards-to-go

Two departures from the textbook. The value function knows the reward model's score of each prefix
(Stiennon 2020 start their critic from the reward model too) and is fitted by least squares, where
others train a network: step 6 costs next to nothing. And there is one epoch of updates, not four:
the time is better spent on fresh samples.

A completion is T token ids. Where it ended before its full length, PAD (-1) fills the rest, and
mask (B,T), 1 for real tokens, keeps padding out of every sum. Prompts are padded on the left.
Unconditional samples are the case of one prompt, the blank line before a speech.

    python ppo.py                        a reward of your own, at the end of this file, in a minute
    python train.py --beta 0.1           the study (its part here: sample_reference, tune)
    pytest tests/test_ppo.py tests/test_loop.py
"""

import copy
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

import data
import reward
from data import PAD
from gpt import (Generator, average, completion_logits, compute_dtype, in_chunks, load_gpt,
                 optimizer_step, sample_completions, set_rates, share)

MIN_ESS = 100       # effective samples below which no optimum is quoted
# Nats per completion at which PPO keeps a copy of the policy, the first time its drift passes them.
KL_MARKS = [0.5, 1, 2, 4, 6, 8, 10, 16, 32]


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
    """Gather each token's log-probability: logits (B,T,V), tokens (B,T) -> (B,T) float32, nats.

    logits[:, t] must be those that predict tokens[:, t]: the model's output one position
    earlier. The values at PAD are meaningless; the mask keeps them out.
    """
    logprobs = logits.float().log_softmax(-1)
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
    T = k1.size(1)
    position = torch.arange(1, T + 1, device=mask.device)
    last = (mask * position).argmax(1, keepdim=True)                    # (B,1): the last real one
    scores = scores.detach().to(k1.dtype)[:, None]
    rewards = rewards.scatter_add(1, last, scores)
    return rewards.masked_fill(~mask, 0.0)


def gae(rewards, values, gamma=1.0, lam=0.8, mask=None):
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
    to_go = rewards.flip(1).cumsum(1).flip(1)
    return to_go.masked_fill(~mask, 0.0)


def leave_one_out(returns, group):
    """returns (B,T) minus the mean of the others of its group at the same position.

    After Ahmadian 2024 (RLOO), who compare whole completions. Every group of consecutive rows
    completes one prompt. The others' returns do not depend on this completion's tokens, so as a
    baseline they change no expectation. Raises ValueError for a group of one.
    """
    if group < 2:
        raise ValueError("a completion alone has no others to be compared with")
    grouped = returns.view(-1, group, returns.size(1))
    total = grouped.sum(1, keepdim=True)
    others = (total - grouped) / (group - 1)
    return (grouped - others).view_as(returns)


def whiten_groups(returns, group):
    """GRPO's advantages (Shao 2024, DeepSeekMath): each score whitened within its group, (B,T).

    returns (B,T): the score at every token, for GRPO keeps the penalty out of the rewards and adds
    beta * mean of k3 to the loss. That has another optimum than J: the gradient of k3, averaged
    over tokens drawn from pi, is that of KL(rho to pi) of the next token at the prefixes pi visits,
    the penalty in the other direction, and dividing by the group's deviation multiplies beta by it.
    (E_pi[grad k3] = E_pi[(1 - rho/pi) grad log pi] = -sum of rho grad log pi, as E_pi[grad log pi]
    is 0; tests/test_loop.py finds the fixed point.)
    """
    scores = returns[:, 0].view(-1, group)
    deviation = scores.std(1, correction=0, keepdim=True)
    whitened = (scores - scores.mean(1, keepdim=True)) / (deviation + 1e-6)
    return whitened.view(-1, 1).expand_as(returns)


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
    # exp(89) is infinite in float32, and its gradient NaN.
    ratio = log_ratio.clamp(max=80).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    # The smaller of both: outside the range a token cannot gain, but it can still lose.
    surrogate = torch.min(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        outside = (ratio - 1).abs() > clip
        # The tokens were drawn from pi_old, so its log-probability comes first.
        _, _, k3 = kl_estimates(-log_ratio, torch.zeros_like(log_ratio))
        info = {"approx_kl": masked_mean(k3, mask),
                "clipfrac": masked_mean(outside.float(), mask),
                "ratio": masked_mean(ratio, mask)}
    return -masked_mean(surrogate, mask), info


def kl_estimates(logprobs, ref_logprobs):
    """Schulman's k1, k2, k3 of KL(pi to rho) from tokens drawn from pi, each (B,T), in nats.

    k1 = log pi - log rho, unbiased; k2 = k1^2 / 2, biased; k3 = exp(-k1) - 1 + k1, unbiased
    and never negative. (exp(k1) - 1 - k1, often seen, estimates another quantity.)
    """
    k1 = logprobs - ref_logprobs
    k2 = k1 ** 2 / 2
    k3 = torch.expm1(-k1) + k1
    return k1, k2, k3


def exact_kl(logprobs, ref_logprobs):
    """KL(pi to rho) of the next token, from whole distributions (B,T,V) at every prefix: (B,T).

    In nats. Its sum over tokens estimates the same KL as the sum of k1.
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
    unexplained = (returns - values)[mask].var(correction=0)
    return (1 - unexplained / variance).item()


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
    ref_kl = (score - objective) / beta in nats per completion, ess, the effective sample size (of
    the prompt with the smallest), and objective_se, the standard error of J* (delta method). Warns
    below an ess of MIN_ESS: J* is then biased downward and its error understated. Raises
    ValueError for a beta of 0. (Korbak 2022: RL with KL penalties is Bayesian inference.)
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
    best = {"objective": objective.mean(),
            "score": score.mean(),
            "ref_kl": (score - objective).mean() / beta,
            "ess": (1 / weights.square().sum(-1)).min(),
            "objective_se": beta * variance.sum().sqrt() / variance.numel()}
    if best["ess"] < MIN_ESS:
        warnings.warn(f"the optimum at beta {beta:g} rests on an effective sample size below "
                      f"{MIN_ESS}: do not quote it", stacklevel=2)
    return {name: x.item() for name, x in best.items()}


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
    log_ways = torch.lgamma(i + 1)
    log_ways = log_ways - torch.lgamma(i + 1 - n)
    # How likely all n are among the i smallest; its steps: how likely the i-th smallest is best.
    all_below = (log_ways - log_ways[-1]).exp()
    is_best = all_below.diff()
    best = (is_best * scores).sum(-1)
    kl = math.log(n) - (n - 1) / n
    return best.mean().item(), kl


# ---- the loop -----------------------------------------------------------------------------

@dataclass
class PPOConfig:
    """The settings of a PPO run; train.OPTIONS says why one would change them."""
    beta: float = 0.2
    algorithm: str = "ppo"              # or simple, rloo, grpo
    iterations: int = 22
    length: int = 64                    # tokens of a completion
    batch: int = 512                    # completions an iteration
    group: int = 4                      # of each prompt; with one prompt, all are of it
    minibatch: int = 32                 # completions an optimizer step
    unfrozen: int = 1                   # blocks, the last ones
    epochs: int = 1
    lr: float = 1.2e-3
    clip: float = 0.2
    lam: float = 0.8
    max_update_kl: float = 0.02         # nats per token
    adaptive_kl_target: float = 0.0     # nats per completion
    adaptive_kl_horizon: float = 10_000.0       # completions


def make_config(options, beta):
    """The PPOConfig of one run, from options that have a value for each of its settings."""
    settings = {name: getattr(options, name) for name in PPOConfig.__dataclass_fields__}
    settings["beta"] = beta
    return PPOConfig(**settings)


class ValueFunction(nn.Module):
    """V: the score still to come, from the score k so far and the position t. Starts at 0.

    A quadratic polynomial in t, from 0 to 1, and k: six weights, which least squares finds at
    once, where a network would need a learning rate and many steps. It knows no words, so a lambda
    below 1 leaves a small bias: on an enumerable model 0.02 nats farther from pi*.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(6, dtype=torch.float64))

    def terms(self, so_far):
        """so_far (B,T), the score before each token -> what the weights multiply (B,T,6)."""
        k = so_far.double()
        t = torch.arange(k.size(1), device=k.device).expand_as(k) / k.size(1)
        return torch.stack((torch.ones_like(k), t, t * t, k, k * t, k * k), dim=-1)

    def forward(self, so_far):
        """so_far (B,T) -> values (B,T) before each token."""
        return (self.terms(so_far) @ self.weight).float()

    def fit(self, so_far, returns, mask):
        """Step 6: the weights whose values are nearest to returns (B,T) over unmasked tokens."""
        x, y = self.terms(so_far)[mask], returns[mask].double()
        # Ridge regression: the ones pull weights that nothing else decides to 0.
        ridge = torch.eye(len(self.weight), dtype=torch.float64, device=x.device)
        self.weight.copy_(torch.linalg.solve(x.T @ x + ridge, x.T @ y))


def learning_rate(i, iterations):
    """The learning rate of iteration i as a share of its peak: falls to 0.

    The late, small steps average out the noise.
    """
    return 1 - i / iterations


class PPO:
    """A PPO run: step(i) does iteration i and returns its metrics; parts is all that it changes.

    ref: the GPT rho, copied and frozen. score_fn: tokens (B,T), completions without their prompt,
    -> scores (B,), or (B,T+1): the score of every prefix, the empty one first, so that the value
    function knows the score so far. prompts (P,T0); one row: unconditional. end: the token that
    ends a completion; None: none does. seed: of sampling and shuffling. The values start at 0:
    warm_up() first, or at lambda below 1 the early tokens hardly see the score.
    """

    def __init__(self, ref, score_fn, prompts, config, seed=0, end=None):
        if prompts.dim() != 2:
            raise ValueError(f"prompts must be (P,T0) token ids, not {tuple(prompts.shape)}")
        self.config = config
        self.score_fn = score_fn
        self.prompts = prompts
        self.end = end
        # All of a batch continue the one prompt, or --group each of several.
        self.group = config.batch if len(prompts) == 1 else config.group
        if config.batch % self.group:
            raise ValueError(f"batch {config.batch} must be a multiple of the group of completions "
                             f"of one prompt, {self.group}")
        # A copy: shared weights would move along, and KL would be 0 for ever.
        self.ref = copy.deepcopy(ref).requires_grad_(False)
        # The last blocks and the output layer are trained. The others stay as they were pretrained:
        # fewer weights for noise to move, and less to compute.
        self.policy = copy.deepcopy(ref).requires_grad_(False)
        self.policy.lm_head.requires_grad_(True)
        self.policy.blocks[-config.unfrozen:].requires_grad_(True)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        # Two streams, two seeds: from the same one both would draw the same numbers. The second
        # chooses prompts and minibatches.
        self.sampler = Generator(prompts.device).manual_seed(seed)
        self.shuffler = Generator().manual_seed(seed + 1)
        self.value = ValueFunction().to(prompts.device)
        # Adam moves every weight about as far, however small its gradient, for it divides by the
        # gradient's size. But a small one may be mostly noise. With so large an epsilon Adam is
        # close to momentum SGD, and its rates are not comparable with published ones.
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, eps=1e-3, betas=(0.9, 0.95),
                                           weight_decay=0.0, fused=True)
        self.controller = AdaptiveKL(config.beta, config.adaptive_kl_target,
                                     config.adaptive_kl_horizon)
        names = ("policy", "value", "optimizer", "controller", "sampler", "shuffler")
        self.parts = {name: getattr(self, name) for name in names}

    def warm_up(self, n=512):
        """Fit the values to n completions of rho, before the first step.

        The policy is still rho, so there is no penalty to come: at every token just the score.
        """
        batch = self.rollout(max(n, self.group))
        returns = batch["scores"][:, None].expand_as(batch["tokens"])
        self.value.fit(batch["so_far"], returns, batch["mask"])

    @torch.no_grad()
    def read(self, prompts, tokens):
        """Step 2: read completions (B,T): a dict of tensors (B,) and (B,T)."""
        logits = completion_logits(self.policy, prompts, tokens)
        ref_logits = completion_logits(self.ref, prompts, tokens)
        scores = self.score_fn(tokens)
        B, T = tokens.shape
        if scores.shape not in ((B,), (B, T + 1)) or not scores.is_floating_point():
            raise ValueError(f"score_fn must give a float for each completion, ({B},), or for each "
                             f"prefix, ({B},{T + 1}), not {scores.dtype} {tuple(scores.shape)}")
        so_far = torch.zeros(B, T, device=scores.device)
        if scores.dim() == 2:
            # Before token t the text ends with token t-1; before the first it is empty.
            so_far, scores = scores[:, :-1], scores[:, -1]
        return {"scores": scores,
                "logprobs": token_logprobs(logits, tokens),
                "ref_logprobs": token_logprobs(ref_logits, tokens),
                "so_far": so_far,
                "values": self.value(so_far)}

    def rollout(self, n):
        """Steps 1 and 2: n completions drawn from the policy, and what is read of them."""
        # Each prompt once before any comes again; its completions stand side by side.
        many = n // self.group
        rows = torch.empty(0, dtype=torch.long)
        while len(rows) < many:
            order = torch.randperm(len(self.prompts), generator=self.shuffler)
            rows = torch.cat((rows, order))
        rows = rows[:many].repeat_interleave(self.group)
        prompts = self.prompts[rows]
        tokens = sample_completions(self.policy, prompts, self.config.length, self.sampler,
                                    self.end)
        read = in_chunks(self.read, prompts, tokens, size=self.config.minibatch)
        return {"prompts": prompts,
                "tokens": tokens,
                "mask": tokens != PAD,
                **read}

    def step(self, i):
        """One iteration: steps 1 to 6. Returns its metrics, a dict of floats."""
        config, beta = self.config, self.controller.beta
        set_rates([self.optimizer], learning_rate(i, config.iterations))
        # 1. and 2. sample completions, read them
        self.batch = batch = self.rollout(config.batch)
        mask = batch["mask"]
        check_finite(batch, i)
        # 3. rewards; GRPO alone has the penalty in the loss instead
        in_loss = beta if config.algorithm == "grpo" else 0.0
        rewards = kl_penalised_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"],
                                       beta - in_loss, mask)
        # 4. advantages and returns
        advantages, returns = self.advantages(rewards, batch["values"], mask)
        metrics = self.describe(batch, returns)         # of the policy that sampled
        # 5. update the policy
        metrics |= self.update(batch, advantages, in_loss)
        # 6. fit the value function
        if config.algorithm == "ppo":
            self.value.fit(batch["so_far"], returns, mask)
        if config.adaptive_kl_target:
            self.controller.update(metrics["ref_kl"], config.batch)
        return metrics

    def advantages(self, rewards, values, mask):
        """Step 4: how much better than expected each token was, and the returns: (B,T) both.

        The returns, to which the values are fitted, are the rewards-to-go: lambda 1.
        """
        returns = rewards_to_go(rewards, mask)
        if self.config.algorithm == "grpo":
            return whiten_groups(returns, self.group), returns
        if self.config.algorithm == "simple":
            advantages = returns
        elif self.config.algorithm == "rloo":
            advantages = leave_one_out(returns, self.group)
        else:
            advantages, _ = gae(rewards, values, lam=self.config.lam, mask=mask)
        return whiten(advantages, mask), returns

    def update(self, batch, advantages, kl_in_loss=0.0):
        """Step 5: epochs of minibatches, each completion once an epoch. Returns mean metrics.

        Stops before a step that would start farther than max_update_kl from the policy that
        sampled. kl_in_loss: GRPO's beta.
        """
        config = self.config
        infos = []
        for everyones in self.minibatches(len(advantages), config.minibatch, config.epochs):
            rows = everyones[share(len(everyones))]
            tokens = batch["tokens"][rows]
            mask = batch["mask"][rows]
            # This process's part of the tokens, over which losses are means: all of them, if alone.
            weight = mask.sum() / batch["mask"][everyones].sum()
            logits = completion_logits(self.policy, batch["prompts"][rows], tokens)
            logprobs = token_logprobs(logits, tokens)
            loss, info = policy_loss(logprobs, batch["logprobs"][rows], advantages[rows],
                                     config.clip, mask)
            if kl_in_loss:
                _, _, k3 = kl_estimates(logprobs, batch["ref_logprobs"][rows])
                loss = loss + kl_in_loss * masked_mean(k3, mask)
            info["policy_loss"] = loss.detach().clone()
            average(info.values(), weight)
            # The first step is always taken: it starts where the sampler stood.
            if infos and info["approx_kl"] > config.max_update_kl:
                break
            info["grad_norm"] = optimizer_step(loss, self.policy, [self.optimizer], 1.0, weight)
            infos.append(info)
        metrics = {}
        for key in infos[0]:
            metrics[key] = torch.stack([info[key] for info in infos]).mean().item()
        metrics["epochs"] = len(infos) / math.ceil(len(advantages) / config.minibatch)
        return metrics

    def minibatches(self, n, size, epochs):
        """Rows of each minibatch: all n once an epoch, in a new order every time."""
        for _ in range(epochs):
            yield from torch.randperm(n, generator=self.shuffler).split(size)

    @torch.no_grad()
    def describe(self, batch, returns, whole=32):
        """The metrics of a batch of completions, of the policy that drew them: a dict of floats.

        exact_kl and entropy need whole distributions, so they are of the first 32 completions.
        """
        mask, scores = batch["mask"], batch["scores"]
        k1, _ = _masked(batch["logprobs"] - batch["ref_logprobs"], mask)
        ref_kl = k1.sum(1)                                              # (B,): nats a completion
        prompts = batch["prompts"][:whole]
        tokens = batch["tokens"][:whole]
        logits = completion_logits(self.policy, prompts, tokens)
        ref_logits = completion_logits(self.ref, prompts, tokens)
        logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
        kl, _ = _masked(exact_kl(logprobs, ref_logprobs), mask[:whole])
        objective = scores - self.controller.beta * ref_kl
        metrics = {"score": scores.mean(),
                   "ref_kl": ref_kl.mean(),
                   "ref_kl_se": ref_kl.std(correction=0) / len(ref_kl) ** 0.5,
                   "exact_kl": kl.sum(1).mean(),
                   "objective": objective.mean(),
                   "entropy": masked_mean(entropy(logprobs), mask[:whole]),
                   "ref_logprob": masked_mean(batch["ref_logprobs"], mask),
                   "tokens": mask.sum(1).float().mean()}
        metrics = {name: x.item() for name, x in metrics.items()}
        metrics["beta"] = self.controller.beta
        if self.config.algorithm == "ppo":      # the others do not use the values
            metrics["explained_variance"] = explained_variance(batch["values"], returns, mask)
        return metrics


def check_finite(batch, i):
    """Raise FloatingPointError naming the first tensor of iteration i that is not finite."""
    for name, x in batch.items():
        if not torch.isfinite(x).all():
            raise FloatingPointError(f"iteration {i + 1}: {name} of the completions are not "
                                     "finite. Try --fp32 or a lower --lr.")


# ---- what a run reached -------------------------------------------------------------------

def mean_se(x):
    """(mean, standard error) of independent values (N,), as floats; NaN for one or none."""
    x = x.double().flatten()
    variance = (x - x.mean()).square().sum() / (len(x) * (len(x) - 1))
    return x.mean().item(), variance.sqrt().item()


def pool(scores, log_ratio, rho_scores, rho_log_ratio):
    """Scores (P,M+N) of rho's M and pi's N samples of each of P prompts, and their log(rho/q).

    log_ratio: log pi - log rho of pi's samples (P,N); rho_log_ratio: of rho's (P,M). q is the
    mixture of both. With them optimum() reaches smaller betas than with rho's samples alone.
    """
    scores = torch.cat((rho_scores, scores), dim=1)
    ratio = torch.cat((rho_log_ratio, log_ratio), dim=1).flatten()
    counts = (rho_log_ratio.numel(), log_ratio.numel())
    # Only the ratio matters, so rho's own row may be 0.
    log_weights = mixture_log_weights(torch.stack((torch.zeros_like(ratio), ratio)), counts)
    return scores, log_weights.view_as(scores)


def prompts_se(parts):
    """Standard error of a mean over P prompts of sums over N samples, parts (P,N): a float.

    The prompts are given, so only the spread within each counts.
    """
    P, N = parts.shape
    parts = parts.double()
    within = parts - parts.mean(1, keepdim=True)
    variance = within.square().sum() * N / (N - 1)
    return variance.sqrt().item() / P


def fraction_of_optimum(scores, log_ratio, rho_scores, rho_log_ratio, beta):
    """How far a policy came toward the optimum: a dict of floats, None where not known.

    Inputs as for pool(). objective = J(pi) and its standard error; reference_objective = J(rho);
    optimum; fraction_of_optimum = (J(pi) - J(rho)) / (J* - J(rho)) and its standard error;
    kl_to_optimum = KL(pi to pi*) = (J* - J(pi)) / beta.
    """
    N, M = scores.size(1), rho_scores.size(1)
    # log_ratio itself, not the exact KL: near pi*, score - beta log_ratio hardly varies.
    gains = scores - beta * log_ratio                                   # (P,N)
    objective, start = gains.mean().item(), rho_scores.mean().item()
    unknown = ("objective", "score", "ref_kl", "ess", "objective_se")
    reached = {"objective": objective,
               "objective_se": prompts_se(gains / N),
               "reference_objective": start,
               "optimum": dict.fromkeys(unknown),
               "fraction_of_optimum": None,
               "fraction_se": None,
               "kl_to_optimum": None}
    if beta == 0:                               # no penalty, no optimum
        return reached
    pooled, log_weights = pool(scores, log_ratio, rho_scores, rho_log_ratio)
    best = quiet_optimum(pooled, beta, log_weights)
    reached["optimum"]["ess"] = best["ess"]
    if best["ess"] < MIN_ESS:
        return reached
    way = best["objective"] - start
    fraction = (objective - start) / way
    # Delta method: what each sample adds to the fraction through J*, J(rho) and J(pi). These share
    # samples, and errors that move together cancel.
    tilted = log_weights + pooled / beta
    shares = tilted.softmax(-1) - log_weights.softmax(-1)
    old, new = (-fraction * beta * shares).split([M, N], dim=1)
    old_error = prompts_se(old - (1 - fraction) * rho_scores / M)
    new_error = prompts_se(new + gains / N)
    reached["optimum"] = best
    reached["fraction_of_optimum"] = fraction
    reached["fraction_se"] = math.hypot(old_error, new_error) / way
    reached["kl_to_optimum"] = (best["objective"] - objective) / beta
    return reached


def quiet_optimum(scores, beta, log_weights=None):
    """optimum() for callers that look at the effective sample size themselves: no warning."""
    with warnings.catch_warnings(action="ignore"):
        return optimum(scores, beta, log_weights)


def frontier(scores, log_weights, judge_scores):
    """The optimum at every beta that these samples (P,N) can tell: rows of KL, score, judge.

    The third is what selection alone does to a judge that nobody optimises: its mean over the same
    weighted samples, judge_scores (P,N).
    """
    rows = []
    for beta in torch.logspace(2, -2, 81).tolist():
        best = quiet_optimum(scores, beta, log_weights)
        if best["ess"] >= MIN_ESS:
            weights = (log_weights + scores / beta).softmax(-1)
            judge = (weights * judge_scores).sum(-1).mean().item()
            rows.append([best["ref_kl"], best["score"], judge])
    return rows


def best_of_n_rows(scores):
    """Rows of n, expected best score of n samples, its standard error (bootstrap), KL at most."""
    rows = []
    N = scores.size(-1)
    generator = torch.Generator().manual_seed(0)
    for n in (1, 4, 16, 64, 256):
        if n > N:
            break
        best, kl = best_of_n(scores, n)
        again = []
        for _ in range(50):
            drawn = torch.randint(N, (N,), generator=generator)
            again.append(best_of_n(scores[:, drawn], n)[0])
        rows.append([n, best, torch.tensor(again).std().item(), kl])
    return rows


# ---- the study's stages -------------------------------------------------------------------

def repeat(prompts, n):
    """prompts (P,T0), each repeated, so that there are n in all, or the next lower multiple."""
    return prompts.repeat_interleave(max(n // len(prompts), 1), 0)


def sample_reference(options, texts, pretrained, rewarded, judged, loop):
    """Samples of rho, and the mean and std that turn log P(positive) into a score: rho.pt.

    Task speeches has one prompt, the boundary before a speech, and no end. continue: openings of
    speeches, of the training plays to train on and of held-out ones to measure on (test_prompts);
    there a text ends where the speech does.
    """
    prompts = test_prompts = torch.full((1, 1), texts["start"])
    end = None
    if options.task == "continue":
        n, seed = options.prompts, options.seed
        prompts = data.choose_prompts(texts["openings"], n, seed)
        test_prompts = data.choose_prompts(texts["test_openings"], n, seed)
        end = texts["start"]
    rho = load_gpt(pretrained, options.device, options.dtype)
    sampler = torch.Generator(options.device).manual_seed(options.seed)
    repeated = repeat(test_prompts, options.rho_samples).to(options.device)
    tokens = sample_completions(rho, repeated, options.length, sampler, end)
    scales = {}
    for state in (rewarded, judged):
        model = reward.load_reward(state, options.device, options.dtype)
        log_odds = in_chunks(model, tokens)
        scales[state["kind"]] = {
            "positive": reward.score_constants(log_odds, "positive"),
            "negative": reward.score_constants(log_odds, "negative")}
    if not scales["reward"]["positive"]["std"] > 0:
        raise data.UserError("the reward model finds all of rho's samples alike, so there is "
                             "nothing to learn. Give labels that differ.")
    return {"prompts": prompts,
            "test_prompts": test_prompts,
            "end": end,
            "tokens": tokens.int().cpu(),
            "scales": scales}


def load_scorer(options, state, rho):
    """The score_fn of a reward model or judge: tokens (B,T) -> score of every prefix (B,T+1)."""
    model = reward.load_reward(state, options.device, options.dtype)
    scale = rho["scales"][state["kind"]][options.toward]
    return lambda tokens: reward.score(model.prefixes(tokens), **scale, toward=options.toward)


def tune(options, pretrained, rewarded, judged, rho, loop):
    """PPO on the reward model at one beta: the policy and what it reached, a dict for ppo_*.pt."""
    config = make_config(options, options.beta)
    ref = load_gpt(pretrained, options.device, options.dtype)
    score_fn = load_scorer(options, rewarded, rho)
    judge_fn = load_scorer(options, judged, rho)
    prompts = rho["prompts"].to(options.device)
    run = PPO(ref, score_fn, prompts, config, options.seed, rho["end"])
    about = {"config": pretrained["config"],
             "vocabulary": pretrained["vocabulary"],
             "test_prompts": rho["test_prompts"],
             "end": rho["end"]}
    if config.algorithm == "ppo":           # the others do not use values
        run.warm_up()

    for i in loop.steps(config.iterations, **run.parts):
        # Score, KL and entropy of a step are those of the policy before its update.
        before = copy.deepcopy(run.policy.state_dict())
        metrics = run.step(i)
        tokens, scores = run.batch["tokens"], run.batch["scores"]
        judged_scores = in_chunks(judge_fn, tokens)[:, -1]
        metrics["positive"] = positive(scores, rho, options.toward).mean().item()
        metrics["judge"] = judged_scores.mean().item()
        farthest = max([row["ref_kl"] for row in loop.history], default=0.0)
        for mark in KL_MARKS:
            if farthest < mark <= metrics["ref_kl"]:
                loop.keep(f"kl{mark:g}", **about, model=before)
        loop.log(shown=["score", "judge", "ref_kl", "objective", "clipfrac",
                        "explained_variance"], **metrics)
        if (i + 1) % 5 == 0:
            for row, score in zip(tokens[:2], scores):
                loop.show(f"score {score:.2f}", data.decode(pretrained["vocabulary"], row))

    result = evaluate(options, run, judge_fn, rho)
    return {**about, "model": run.policy.state_dict(), "result": result}


def positive(scores, rho, toward):
    """P(positive) of scores toward "positive" or "negative": the scaling undone."""
    scale = rho["scales"]["reward"][toward]
    p = (scores * scale["std"] + scale["mean"]).exp()
    return p if toward == "positive" else 1 - p


def log_ratios(policy, ref, prompts, tokens):
    """log pi(y) - log rho(y) of completions (B,T): (B,), nats; its mean over pi's own is ref_kl."""
    logprobs = token_logprobs(completion_logits(policy, prompts, tokens), tokens)
    ref_logprobs = token_logprobs(completion_logits(ref, prompts, tokens), tokens)
    k1, _ = _masked(logprobs - ref_logprobs, tokens != PAD)
    return k1.sum(1)


def evaluate(options, run, judge_fn, rho):
    """What a finished run reached: a dict of plain numbers.

    Measured on fresh samples of pi and on rho's, both of the test prompts.
    """
    def read(prompts, tokens):
        return {"score": run.score_fn(tokens)[:, -1],
                "judge": judge_fn(tokens)[:, -1],
                "ref_kl": log_ratios(run.policy, run.ref, prompts, tokens)}

    beta, toward = run.controller.beta, options.toward
    test_prompts = rho["test_prompts"].to(options.device)
    sampler = torch.Generator(options.device).manual_seed(options.seed + 2)
    prompts = repeat(test_prompts, options.fresh_samples)
    tokens = sample_completions(run.policy, prompts, options.length, sampler, run.end)
    fresh = in_chunks(read, prompts, tokens)
    tokens = rho["tokens"].long().to(options.device)
    prompts = repeat(test_prompts, len(tokens))
    old = in_chunks(read, prompts, tokens)
    result = {"beta": beta,
              "toward": toward,
              "iterations": run.config.iterations,
              "positive": positive(fresh["score"], rho, toward).mean().item()}
    for key, x in fresh.items():
        result[key] = x.mean().item()
        # A row for each prompt.
        fresh[key] = x.view(len(test_prompts), -1).cpu()
        old[key] = old[key].view(len(test_prompts), -1).cpu()
    both = (fresh["score"], fresh["ref_kl"], old["score"], old["ref_kl"])
    scores, log_weights = pool(*both)
    judge = torch.cat((old["judge"], fresh["judge"]), dim=1)
    result |= fraction_of_optimum(*both, beta)
    result["frontier"] = frontier(scores, log_weights, judge)
    result["best_of_n"] = best_of_n_rows(old["score"])
    return result


# ---- a reward of your own: python ppo.py --------------------------------------------------

def main():
    """The shortest whole example: rho, a reward, PPO, and the optimum to compare with."""
    parser = data.Parser(description="PPO toward the reward at the end of ppo.py.")
    parser.add_argument("--out", default="out", type=Path, help="the folder of pretrain.pt")
    parser.add_argument("--beta", default=0.5, type=data.number(float, 1e-3, 1e3),
                        help="price of a nat of drift, in units of the reward (default 0.5)")
    parser.add_argument("--iterations", default=20, type=data.number(int, 1),
                        help="more come closer to the optimum (default 20)")
    args = parser.parse_args()
    state = data.load_checkpoint(args.out / "pretrain.pt", "pretrain")
    dtype = compute_dtype(torch.device("cpu"))
    rho = load_gpt(state, dtype=dtype)
    prompt = torch.full((1, 1), state["start"])         # the blank line before a speech
    config = PPOConfig(beta=args.beta, iterations=args.iterations, length=32, batch=256)

    def text(row):
        return data.decode(state["vocabulary"], row)

    def score_fn(tokens):               # of every prefix, the empty one first
        rows = []
        for row in tokens:
            prefixes = [row[:t] for t in range(len(row) + 1)]
            rows.append([float(my_reward(text(prefix))) for prefix in prefixes])
        return torch.tensor(rows)

    def show(name, tokens):
        for row in tokens[:2]:
            print(f"\n----- {name}, reward {my_reward(text(row)):g}\n{text(row)}")

    sampler = torch.Generator().manual_seed(0)
    before = sample_completions(rho, prompt.expand(4096, 1), config.length, sampler)
    scores = score_fn(before)[:, -1]
    best = quiet_optimum(scores, args.beta)
    print(f"rho: J {scores.mean():.2f}; the optimum: J* {best['objective']:.2f}, score "
          f"{best['score']:.2f}, KL {best['ref_kl']:.1f} nats (effective sample size "
          f"{best['ess']:.0f}; below {MIN_ESS} trust no optimum)")
    run = PPO(rho, score_fn, prompt, config)
    run.warm_up()
    for i in range(args.iterations):
        x = run.step(i)
        print(f"{i + 1}/{args.iterations}  score {x['score']:.2f}  KL {x['ref_kl']:.2f}  "
              f"J {x['objective']:.2f} of {best['objective']:.2f}")
    # Samples of pi* itself: those of rho, drawn again by their weight exp(r / beta).
    weights = (scores / args.beta).softmax(0)
    at_optimum = before[weights.multinomial(2, generator=sampler)]
    show("before", before)
    show("after", run.batch["tokens"])
    show("at the optimum", at_optimum)


def my_reward(text):
    """Replace this: a number for a text. Here, how many of its lines end with an exclamation."""
    lines = text.split("\n")
    return sum(line.endswith("!") for line in lines)


if __name__ == "__main__":
    data.run(main)
