"""RLHF itself: rollouts, the KL penalty, advantages, losses, the PPO loop, and the exact optimum.

Read this file third, after reward.py. PPO works with any reward, not only sentiment: it takes a
function score_fn(tokens (B,T)) that gives a score for each completion, or better for each prefix.
The policy pi starts as a copy of the reference rho and is trained to maximise

    J(pi) = E[score(y)] - beta * KL(pi to rho)          (Ziegler 2019)

The six steps of an iteration have the same numbers in PPO.step and in the README. The main
departures from the textbook: the value function is no network but a polynomial in the reward
model's score of each prefix, fitted by least squares (Stiennon 2020 initialise their critic from
the reward model); only the last block and output layer are trained, for one epoch a batch.

A completion is T token ids. If it ends early, PAD (-1) fills the rest, and mask (B,T), True at real
tokens, keeps padding out of every sum; where mask is None, all are real. Prompts are padded on the
left. Unconditional sampling uses one prompt, the blank line before a speech. There is a score per
completion, a reward per token; ref_kl is in nats per completion, approx_kl in nats per token.

    python ppo.py                        a reward of your own, at the end of this file, in a minute
    python train.py --beta 0.1           the study (its part here: sample_reference, tune)
"""

import copy
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

import data
import reward
from data import PAD
from gpt import (average, completion_logits, compute_dtype, in_chunks, load_gpt, optimizer_step,
                 sample_completions, share, token_logprobs)

MIN_ESS = 100       # the smallest effective sample size at which an optimum is quoted
KEPT = (1, 2, 4, 8, 16, 32)     # checkpoints of the policy are kept after so many iterations


# ---- the mathematics: pure functions on plain tensors -------------------------------------
def _masked(x, mask):
    """x (B,T) as float32 (float64 stays), 0 where mask (B,T) is 0, and the mask as bool."""
    x = x if x.dtype == torch.float64 else x.float()
    mask = torch.ones_like(x).bool() if mask is None else mask.bool()
    return x.masked_fill(~mask, 0.0), mask


def masked_mean(x, mask=None):
    """Mean of x (B,T) over unmasked positions, a scalar tensor; 0 if there are none."""
    x, mask = _masked(x, mask)
    return x.sum() / mask.sum().clamp(min=1)


def kl_penalised_rewards(scores, logprobs, ref_logprobs, beta, mask=None):
    """Rewards (B,T): -beta k1 at each token, k1 = log pi_old - log rho; at the last also the score.
    scores (B,); logprobs and ref_logprobs (B,T): log pi_old and log rho of the sampled tokens. Each
    row sums to score - beta * sum of k1 (Ziegler 2019, equation 2). Rewards have no gradient.

    >>> logprobs, ref_logprobs = torch.tensor([[-1., -2.]]), torch.tensor([[-2., -2.]])
    >>> kl_penalised_rewards(torch.tensor([1.]), logprobs, ref_logprobs, beta=0.5)
    tensor([[-0.5000,  1.0000]])
    """
    k1, mask = _masked((logprobs - ref_logprobs).detach(), mask)
    rewards = -beta * k1
    # The last real token: the first position where the count of real tokens is largest, (B,1).
    last = mask.cumsum(1).argmax(1, keepdim=True)
    scores = scores.detach()[:, None].to(k1)
    rewards = rewards.scatter_add(1, last, scores)
    return rewards.masked_fill(~mask, 0.0)


def gae(rewards, values, gamma=1.0, lam=0.8, mask=None):
    """Generalised advantage estimation (Schulman 2015, equation 16): advantages, returns (B,T).
    advantage_t = sum over l >= 0 of (gamma lam)^l delta_{t+l},
    delta_t = reward_t + gamma value_{t+1} - value_t, with value 0 after the last token.
    rewards, values (B,T). returns = advantages + values, the usual target of a value network;
    PPO.step uses rewards_to_go instead. Masked positions are skipped and come out 0."""
    rewards, mask = _masked(rewards, mask)
    values, _ = _masked(values, mask)
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(advantages[:, 0])
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        real = mask[:, t]               # if False, both keep their values from t + 1
        advantage = torch.where(real, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = advantage
    advantages = advantages.masked_fill(~mask, 0.0)
    returns = advantages + values
    return advantages, returns


def rewards_to_go(rewards, mask=None):
    """The sum of rewards (B,T) from each token, inclusive, to the last: (B,T)."""
    rewards, mask = _masked(rewards, mask)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    return to_go.masked_fill(~mask, 0.0)


def fit_values(so_far, returns, mask):
    """Values (B,T): a forecast of returns (B,T) from so_far (B,T), the score before each token.
    A quadratic polynomial in t, the position from 0 to 1, and k, the score so far, is fitted by
    least squares: six weights, no learning rate. Fitted to the returns they are compared with, they
    bias the gradient, less in larger batches; a lambda below 1 does, too: values know no words."""
    T = so_far.size(1)
    k = so_far.double().cpu()
    t = (torch.arange(T) / T).expand_as(k)
    one = torch.ones_like(k)
    terms = torch.stack((one, t, t * t, k, k * t, k * k), dim=-1)       # (B,T,6)
    mask = mask.cpu()
    y = returns.double().cpu()[mask]
    # gelsd, on the CPU only, gives the smallest weights where data do not determine them (all k 0).
    weights = torch.linalg.lstsq(terms[mask], y[:, None], driver="gelsd").solution
    values = (terms @ weights).squeeze(-1)
    return values.to(returns)


def leave_one_out(returns, group):
    """Leave-one-out advantages (B,T): returns (B,T) minus the mean of the group's other rows.
    Ahmadian 2024 (RLOO) do so for whole completions. A group is that many adjacent rows of one
    prompt. The others do not depend on this completion, so they do not bias the gradient."""
    assert group > 1, "a completion alone has no others to be compared with"
    grouped = returns.view(-1, group, returns.size(1))
    total = grouped.sum(1, keepdim=True)
    others = (total - grouped) / (group - 1)
    return (grouped - others).view_as(returns)


def whiten_groups(returns, group):
    """GRPO's advantages (B,T) (Shao 2024, DeepSeekMath): each score whitened within its group.
    returns (B,T) are the score at every token, because GRPO keeps the penalty out of the rewards
    and adds beta * mean of k3 (kl_estimates) to the loss. Its optimum is not J's (test_loop.py):
    E_pi[grad k3] = E_pi[(1 - rho/pi) grad log pi] = -E_rho[grad log pi], as E_pi[grad log pi] = 0:
    that of the next token's KL(rho to pi). Dividing scores by a deviation multiplies beta by it.
    update() means over a minibatch's tokens; Shao's loss first over those of each completion."""
    scores = returns[:, 0].view(-1, group)
    mean = scores.mean(1, keepdim=True)
    deviation = scores.std(1, correction=0, keepdim=True)
    whitened = (scores - mean) / (deviation + 1e-6)
    whitened = whitened.view(-1, 1)
    return whitened.expand_as(returns)


def whiten(x, mask=None, shift_mean=True):
    """Rescale x (B,T) to mean 0 (unless shift_mean is False) and population deviation 1."""
    x, mask = _masked(x, mask)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened += mean
    return whitened.masked_fill(~mask, 0.0)


def policy_loss(logprobs, old_logprobs, advantages, clip=0.2, mask=None):
    """PPO's clipped surrogate (Schulman 2017, equation 7): loss, info, a scalar and a dict of them.
    loss = -mean(min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)) over unmasked tokens, with ratio =
    pi / pi_old; logprobs, old_logprobs, advantages A: (B,T). info: approx_kl = KL(pi_old to pi),
    nats per token, by k3; clipfrac = share of ratios outside the clip range; ratio = their mean."""
    # Masked log-ratios and advantages become 0, so they add nothing to any sum.
    log_ratio, mask = _masked(logprobs - old_logprobs.detach(), mask)
    advantages, _ = _masked(advantages.detach(), mask)
    # Clamped, because exp(89) is infinite in float32 and makes the gradient NaN.
    ratio = log_ratio.clamp(max=80).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    # The minimum: outside the clip range a token can gain nothing more, but it can still lose.
    surrogate = torch.min(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        outside = (ratio - 1).abs() > clip
        _, _, k3 = kl_estimates(old_logprobs, logprobs)                 # pi_old drew the tokens
        info = {"approx_kl": masked_mean(k3, mask),
                "clipfrac": masked_mean(outside.float(), mask),
                "ratio": masked_mean(ratio, mask)}
    return -masked_mean(surrogate, mask), info


def kl_estimates(logprobs, ref_logprobs):
    """Schulman's estimators k1, k2, k3 of KL(pi to rho), for tokens drawn from pi: (B,T), nats.
    The arguments are log pi and log rho (B,T). k1 = log pi - log rho, unbiased; k2 = k1^2 / 2,
    biased; k3 = exp(-k1) - 1 + k1, unbiased, never negative (exp(k1) - 1 - k1 is a common bug)."""
    k1 = logprobs - ref_logprobs
    k2 = k1 ** 2 / 2
    k3 = torch.expm1(-k1) + k1
    return k1, k2, k3


def exact_kl(logprobs, ref_logprobs):
    """KL(pi to rho) of each next token, from both log-probabilities (B,T,V): (B,T), nats."""
    log_ratio = logprobs - ref_logprobs
    return (logprobs.exp() * log_ratio).sum(-1)


def entropy(logprobs):
    """Entropy of each next token, from the log-probabilities (B,T,V): (B,T), nats."""
    return torch.special.entr(logprobs.exp()).sum(-1)


def explained_variance(values, returns, mask=None):
    """1 - Var(returns - values) / Var(returns), both (B,T), a float; 0 if returns do not vary."""
    returns, mask = _masked(returns, mask)
    variance = returns[mask].var(correction=0)
    unexplained = (returns - values)[mask].var(correction=0)
    if variance == 0:
        return 0.0
    return 1 - (unexplained / variance).item()


@dataclass
class AdaptiveKL:
    """The KL controller of Ziegler 2019, section 2.2: adapts .beta to keep ref_kl at its target.
    ref_kl, KL(pi to rho) of a batch of n completions, and target are in nats per completion. In
    horizon completions beta changes by about a fifth at most."""
    beta: float
    target: float
    horizon: float

    def update(self, ref_kl, n):
        """beta *= 1 + clip(ref_kl / target - 1, -0.2, 0.2) * n / horizon; returns the new beta."""
        error = ref_kl / self.target - 1
        error = min(max(error, -0.2), 0.2)      # clipped, as one batch's ref_kl is noisy
        self.beta *= 1 + error * n / self.horizon
        return self.beta

    def state_dict(self):
        return {"beta": self.beta}

    def load_state_dict(self, state):
        self.beta = state["beta"]


# ---- the yardsticks: the exact optimum and best-of-n --------------------------------------
def optimum(scores, beta, log_weights=None):
    """Estimate the optimal policy pi*(y) = rho(y) exp(r(y)/beta) / Z from samples of rho.
    scores (N,), or (P,N) for N completions of each of P prompts; results are means over prompts.
    log_weights, shaped like scores: log(rho/q) of samples drawn from q instead of rho; the estimate
    is self-normalised. Returns a dict: objective J* = beta log E_rho[exp(r/beta)], score =
    E_pi*[r], ref_kl = (score - objective) / beta in nats per completion, and ess, the effective
    sample size, of the prompt where it is smallest. Warns if it is below MIN_ESS: J* is then biased
    downward. Raises ValueError unless beta > 0. (Korbak 2022: this is Bayesian inference.)"""
    if beta <= 0:
        raise ValueError("beta must be positive for an optimum to exist")
    scores = torch.as_tensor(scores, dtype=torch.float64)
    base = torch.zeros_like(scores)
    if log_weights is not None:
        base = torch.as_tensor(log_weights, dtype=torch.float64)
    tilted = base + scores / beta       # logarithms, as exp(score / beta) overflows at small beta
    objective = beta * (tilted.logsumexp(-1) - base.logsumexp(-1))       # (P,), or () for (N,)
    weights = tilted.softmax(-1)
    score = (weights * scores).sum(-1)
    ess = 1 / weights.square().sum(-1)
    if ess.min() < MIN_ESS:
        warnings.warn(f"the optimum at beta {beta:g} rests on an effective sample size below "
                      f"{MIN_ESS}: do not quote it", stacklevel=2)
    return {"objective": objective.mean().item(),
            "score": score.mean().item(),
            "ref_kl": (score - objective).mean().item() / beta,
            "ess": ess.min().item()}


def mixture_log_weights(logprobs, counts):
    """log(rho/q) (N,) of pooled samples; q: the policies' mixture (balance heuristic, Veach 1995).
    logprobs (K,N): row i holds policy i's log-probability of each completion, row 0 rho's. counts
    (K,): how many of the N completions each policy drew."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    logprobs = logprobs.double()
    shares = counts / counts.sum()
    mixture = logprobs + shares.log()[:, None]
    return logprobs[0] - mixture.logsumexp(0)


def best_of_n(scores, n):
    """(expected best score of n samples, upper bound on KL(best-of-n to rho) in nats), floats.
    The expectation is over all subsets of n of scores (N,): the i-th smallest, counted from 0, is
    the best of C(i, n-1) of them. For scores (P,N) it is the mean over prompts."""
    scores = torch.as_tensor(scores, dtype=torch.float64).cpu()
    scores = scores.sort(-1).values
    N = scores.size(-1)
    if not 1 <= n <= N:
        raise ValueError("n must be from 1 to the number of scores")
    i = torch.arange(N, dtype=torch.float64)
    # log C(i, n-1) up to a constant; for i < n - 1 lgamma is infinite and this is the log of 0.
    log_ways = torch.lgamma(i + 1) - torch.lgamma(i + 2 - n)
    best = (log_ways.softmax(0) * scores).sum(-1)
    kl = math.log(n) - (n - 1) / n
    return best.mean().item(), kl


# ---- the loop -----------------------------------------------------------------------------
@dataclass
class PPOConfig:
    """The settings of a PPO run; TABLE in train.py gives reasons to change them."""
    beta: float = 0.2                   # price of a nat of KL, in units of the score
    algorithm: str = "ppo"              # or simple, rloo, grpo: see PPO.advantages
    iterations: int = 50
    length: int = 64                    # tokens of a completion
    batch: int = 512                    # completions per iteration
    group: int = 4                      # completions of a prompt that rloo and grpo compare
    minibatch: int = 32                 # completions per optimizer step
    unfrozen: int = 1                   # last blocks, which are trained
    epochs: int = 1                     # passes over each batch
    lr: float = 1.2e-3                  # of the first iteration; it falls to 0
    clip: float = 0.2                   # ratios gain nothing outside 1 - clip to 1 + clip
    lam: float = 0.8                    # GAE's lambda
    max_update_kl: float = 0.02         # approx_kl, nats per token, that ends an update
    adaptive_kl_target: float = 0.0     # nats per completion; 0: beta is fixed
    adaptive_kl_horizon: float = 10_000.0       # completions


def check_finite(**tensors):
    """Raise FloatingPointError unless all numbers in these tensors, of any shape, are finite."""
    for name, x in tensors.items():
        if not torch.isfinite(x).all():
            raise FloatingPointError(f"{name} of the completions are not finite. Try another "
                                     "reward, a lower --lr, or --fp32.")


def learning_rate(i, config):
    """The learning rate of iteration i, a linear decay to 0: small last steps average out noise."""
    return config.lr * (1 - i / config.iterations)


class PPO:
    """A PPO run: step(i) does iteration i and returns its metrics; parts holds what resuming needs.
    ref: the GPT rho, copied and frozen. score_fn: completions (B,T) without prompts -> scores (B,),
    or (B,T+1) of all prefixes, the empty one first, for the values. prompts (P,T0); one row for
    unconditional samples. config: a PPOConfig, or train.py's options. end: the token that ends a
    completion, or None. Random numbers come from torch's global generator."""

    def __init__(self, ref, score_fn, prompts, config, end=None):
        self.config = config
        self.score_fn = score_fn
        self.prompts = prompts
        self.end = end
        # With one prompt, the whole batch continues it; with several, --group completions each.
        self.group = config.batch if len(prompts) == 1 else config.group
        # Copies, because with shared weights rho would change with pi, and KL would stay 0.
        self.ref = copy.deepcopy(ref).requires_grad_(False)
        self.policy = copy.deepcopy(self.ref)
        # Only the last blocks and the output layer are trained: fewer weights can fit noise, and
        # policy and reference share the output of the frozen blocks, which is computed once.
        self.frozen = max(ref.config.n_layer - config.unfrozen, 0)
        self.tuned = slice(self.frozen, None)
        trained = torch.nn.ModuleList([*self.policy.blocks[self.tuned], self.policy.lm_head])
        trained.requires_grad_(True)
        # Adam divides by the gradient's size, so every weight moves about equally far, even if its
        # small gradient is mostly noise. This large epsilon brings Adam close to momentum SGD; its
        # learning rates are not comparable with published ones.
        self.optimizer = torch.optim.AdamW(trained.parameters(), eps=1e-3, betas=(0.9, 0.95),
                                           weight_decay=0.0, fused=True)
        self.controller = AdaptiveKL(config.beta,
                                     config.adaptive_kl_target,
                                     config.adaptive_kl_horizon)
        self.parts = {"policy": self.policy,
                      "optimizer": self.optimizer,
                      "controller": self.controller}

    def logits(self, model, batch):
        """Logits (B,T,V) of policy or reference, as model, from the frozen blocks' output."""
        return completion_logits(model, batch["prompts"], batch["tokens"], self.tuned,
                                 batch["lower"])

    def read(self, prompts, tokens, lower):
        """Step 2: scores (B,), so_far, logprobs, ref_logprobs (B,T) of completions tokens (B,T).
        so_far at token t is the score of the tokens before t. lower: see sample_completions."""
        batch = {"prompts": prompts, "tokens": tokens, "lower": lower}
        scores = self.score_fn(tokens)
        B, T = tokens.shape
        assert scores.shape in ((B,), (B, T + 1)) and scores.is_floating_point(), \
            f"score_fn must give floats ({B},) or ({B},{T + 1}), not {tuple(scores.shape)}"
        if scores.dim() == 1:           # only whole completions have a score: let so_far be 0
            scores = F.pad(scores[:, None], (T, 0))
        logprobs = token_logprobs(self.logits(self.policy, batch), tokens)
        ref_logprobs = token_logprobs(self.logits(self.ref, batch), tokens)
        return scores[:, -1], scores[:, :-1], logprobs, ref_logprobs

    def rollout(self):
        """Steps 1 and 2: sample a batch and read it: a dict of tensors, a row per completion."""
        config = self.config
        P = len(self.prompts)
        # Each prompt is used once before any is used again; a group's rows are adjacent.
        groups = torch.arange(config.batch) // self.group
        prompts = self.prompts[torch.randperm(P)[groups % P]]
        tokens, lower = sample_completions(self.policy, prompts,
                                           config.length, self.end,
                                           self.frozen)
        # Half minibatches: their logits fit the processor's cache.
        read = in_chunks(self.read, prompts, tokens, lower, size=(config.minibatch + 1) // 2)
        batch = dict(zip(("scores", "so_far", "logprobs", "ref_logprobs"), read))
        check_finite(**batch)
        return batch | {"prompts": prompts, "tokens": tokens, "lower": lower, "mask": tokens != PAD}

    def step(self, i):
        """One iteration: steps 1 to 6. Returns its metrics, a dict of floats."""
        config = self.config
        beta = self.controller.beta
        # 1. and 2. sample completions, read them
        self.batch = batch = self.rollout()
        mask = batch["mask"]
        # 3. rewards; GRPO alone puts the penalty into the loss instead
        in_loss = beta if config.algorithm == "grpo" else 0.0
        rewards = kl_penalised_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"],
                                       beta - in_loss, mask)
        # 4. values: a forecast of the rewards still to come
        returns = rewards_to_go(rewards, mask)
        values = fit_values(batch["so_far"], returns, mask)
        # 5. advantages
        batch["advantages"] = self.advantages(rewards, returns, values, mask)
        metrics = self.describe(batch)                  # of the policy that sampled
        metrics["explained_variance"] = explained_variance(values, returns, mask)
        # 6. update the policy
        metrics |= self.update(batch, learning_rate(i, config), in_loss)
        if config.adaptive_kl_target:
            self.controller.update(metrics["ref_kl"], config.batch)
        return metrics

    def advantages(self, rewards, returns, values, mask):
        """Step 5: advantages (B,T): how much better each token was than expected."""
        algorithm = self.config.algorithm
        if algorithm == "grpo":
            return whiten_groups(returns, self.group)
        if algorithm == "ppo":
            advantages, _ = gae(rewards, values, lam=self.config.lam, mask=mask)
        elif algorithm == "rloo":
            advantages = leave_one_out(returns, self.group)
        else:
            assert algorithm == "simple", f"no algorithm {algorithm}"
            advantages = returns
        return whiten(advantages, mask)

    def update(self, batch, lr, kl_in_loss=0.0):
        """Step 6: epochs of minibatches over rollout()'s batch. Returns metrics, means over steps.
        Stops before a step whose approx_kl exceeds max_update_kl. kl_in_loss: GRPO's beta or 0."""
        config = self.config
        minibatches = []
        infos = []
        for _ in range(config.epochs):
            minibatches += torch.randperm(len(batch["tokens"])).split(config.minibatch)
        for everyones in minibatches:
            rows = everyones[share(len(everyones))]
            part = {name: x[rows] for name, x in batch.items()}
            mask = part["mask"]
            # This process's share of the minibatch's tokens; 1 for a single process.
            weight = mask.sum() / batch["mask"][everyones].sum()
            logprobs = token_logprobs(self.logits(self.policy, part), part["tokens"])
            loss, info = policy_loss(logprobs, part["logprobs"], part["advantages"], config.clip,
                                     mask)
            if kl_in_loss:
                _, _, k3 = kl_estimates(logprobs, part["ref_logprobs"])
                loss = loss + kl_in_loss * masked_mean(k3, mask)
            info["policy_loss"] = loss.detach().clone()
            average(info.values(), weight)
            # The first step is always taken: it starts at the policy that sampled.
            if infos and info["approx_kl"] > config.max_update_kl:
                break
            info["grad_norm"] = optimizer_step(loss, self.optimizer, lr, 1.0, weight)
            infos.append(info)
        metrics = {"epochs": config.epochs * len(infos) / len(minibatches)}
        for key in infos[0]:
            metrics[key] = fmean(info[key] for info in infos)
        return metrics

    @torch.no_grad()
    def describe(self, batch):
        """Metrics of the policy that sampled the batch, before its update: a dict of floats.
        exact_kl and entropy need logits (B,T,V) of both models, so they use 16 completions only."""
        beta = self.controller.beta
        scores = batch["scores"]
        log_ratio = batch["logprobs"] - batch["ref_logprobs"]
        ref_kl = log_ratio.sum(1)                                       # (B,): nats per completion
        first = {name: x[:16] for name, x in batch.items()}
        logprobs = self.logits(self.policy, first).log_softmax(-1)
        ref_logprobs = self.logits(self.ref, first).log_softmax(-1)
        kl, first_mask = _masked(exact_kl(logprobs, ref_logprobs), first["mask"])
        metrics = {"score": scores.mean(),
                   "ref_kl": ref_kl.mean(),
                   "ref_kl_se": ref_kl.std() / len(ref_kl) ** 0.5,
                   "exact_kl": kl.sum(1).mean(),
                   "objective": (scores - beta * ref_kl).mean(),
                   "entropy": masked_mean(entropy(logprobs), first_mask),
                   "tokens": batch["mask"].sum(1).float().mean(),
                   "beta": beta}
        return {name: float(x) for name, x in metrics.items()}


# ---- what a run reached -------------------------------------------------------------------
def bootstrap(function, *samples):
    """Bootstrap standard errors (Efron 1979) of function(*samples), K numbers: a list of K.
    100 times each prompt's N completions in samples (...,P,N) are redrawn; N must not be small."""
    again = []
    for _ in range(100):
        drawn = [x[..., torch.randint(x.size(-1), x.shape[-1:])] for x in samples]
        again.append(function(*drawn))
    return torch.tensor(again).std(0).tolist()


def pool(rho, pi):
    """Pool samples of rho (K,P,M) and pi (K,P,N): (K,P,M+N), and their log(rho/q) (P,M+N).
    Row 0 of K: scores; row 1: log pi - log rho. q mixes rho and pi, which has high scores."""
    both = torch.cat((rho, pi), dim=-1)
    log_ratio = both[1].flatten()
    # Only rho/q matters, so log pi - log rho and 0 can stand for log pi and log rho.
    logprobs = torch.stack((torch.zeros_like(log_ratio), log_ratio))
    counts = (rho[1].numel(), pi[1].numel())
    log_weights = mixture_log_weights(logprobs, counts)
    return both, log_weights.view_as(both[1])


def compare(rho, pi, beta):
    """J(pi) and the optimum, from samples of rho and pi as in pool(): a dict.
    objective = J(pi); reference_objective = J(rho); optimum: optimum()'s dict; fraction_of_optimum
    = (J(pi) - J(rho)) / (J* - J(rho)); kl_to_optimum = KL(pi to pi*) = (J* - J(pi)) / beta."""
    both, log_weights = pool(rho, pi)
    best = optimum(both[0], beta, log_weights)
    # Sampled log-ratios, not exact_kl: at pi*, score - beta * log-ratio is J* for every completion.
    objective = (pi[0] - beta * pi[1]).mean().item()
    start = rho[0].mean().item()        # J(rho): its KL is 0
    return {"objective": objective,
            "reference_objective": start,
            "optimum": best,
            "fraction_of_optimum": (objective - start) / (best["objective"] - start),
            "kl_to_optimum": (best["objective"] - objective) / beta}


def fraction_of_optimum(rho, pi, beta):
    """compare() with standard errors, keys *_se; what needs J* is None if ess is below MIN_ESS."""
    def estimates(rho, pi):
        again = compare(rho, pi, beta)
        return again["objective"], again["optimum"]["objective"], again["fraction_of_optimum"]

    result = compare(rho, pi, beta)
    best = result["optimum"]
    result["objective_se"], best["objective_se"], result["fraction_se"] = bootstrap(
        estimates, rho, pi)
    if best["ess"] < MIN_ESS:
        result |= dict.fromkeys(("fraction_of_optimum", "fraction_se", "kl_to_optimum"))
        result["optimum"] = {**dict.fromkeys(best), "ess": best["ess"]}
    return result


def frontier(samples, log_weights):
    """Rows [KL in nats, score, judge] of pi* at each beta, 100 to 0.01, where ess >= MIN_ESS.
    samples (3,P,N), log_weights (P,N): of pool(). Row 2 of samples holds the judge's scores, whose
    mean under pi*'s weights is what selection alone, without training, does to them."""
    rows = []
    for beta in torch.logspace(2, -2, 81).tolist():
        best = optimum(samples[0], beta, log_weights)
        if best["ess"] >= MIN_ESS:
            weights = (log_weights + samples[0] / beta).softmax(-1)
            judge = (weights * samples[2]).sum(-1).mean().item()
            rows.append([best["ref_kl"], best["score"], judge])
    return rows


def best_of_n_rows(scores):
    """Rows [n, expected best of n scores (P,N), its standard error, upper bound on KL in nats]."""
    rows = []
    for n in (1, 4, 16, 64, 256):
        if n <= scores.size(-1):
            best, kl = best_of_n(scores, n)
            error, _ = bootstrap(lambda x: best_of_n(x, n), scores)
            rows.append([n, best, error, kl])
    return rows


# ---- the study's stages -------------------------------------------------------------------
def repeat(prompts, n):
    """prompts (P,T0), each repeated max(n // P, 1) times in adjacent rows."""
    return prompts.repeat_interleave(max(n // len(prompts), 1), 0)


def sample_reference(options, texts, pretrained, rewarded, judged, loop):
    """Samples of rho (N,T), and mean and std that scale log P(toward) to a score: rho.pt, a dict.
    texts, pretrained, rewarded, judged: earlier stages' dicts. Task "speeches" has one prompt, the
    boundary before a speech, and no end token. Task "continue" has openings of speeches as prompts,
    of training plays for PPO, of held-out ones for measuring; a completion ends with the speech."""
    prompts = test_prompts = torch.full((1, 1), texts["start"])
    end = None
    if options.task == "continue":
        prompts = data.choose_prompts(texts["openings"], options.prompts)
        test_prompts = data.choose_prompts(texts["test_openings"], options.prompts)
        end = texts["start"]
    rho = load_gpt(pretrained, options.device, options.dtype)
    repeated = repeat(test_prompts, options.rho_samples).to(options.device)
    tokens, _ = sample_completions(rho, repeated, options.length, end)
    scales = {}
    for state in (rewarded, judged):
        model = reward.load_reward(state, options.device, options.dtype)
        scales[state["kind"]] = reward.score_constants(in_chunks(model, tokens))
    return {"prompts": prompts, "test_prompts": test_prompts,
            "end": end,
            "tokens": tokens.int().cpu(),
            "scales": scales}


def load_scorer(options, state, rho):
    """The score_fn of state, reward.pt or judge.pt: tokens (B,T) -> scores of prefixes (B,T+1)."""
    model = reward.load_reward(state, options.device, options.dtype)
    scale = rho["scales"][state["kind"]][options.toward]
    return lambda tokens: reward.score(model.prefixes(tokens), **scale, toward=options.toward)


def tune(options, pretrained, rewarded, judged, rho, loop):
    """PPO on the reward model at one beta: the content of ppo_*.pt, policy and results, a dict.
    rho: rho.pt. loop: a train.Stage. The other arguments are as in sample_reference."""
    ref = load_gpt(pretrained, options.device, options.dtype)
    score_fn = load_scorer(options, rewarded, rho)
    judge_fn = load_scorer(options, judged, rho)
    prompts = rho["prompts"].to(options.device)
    run = PPO(ref, score_fn, prompts, options, rho["end"])
    about = {"config": pretrained["config"],
             "vocabulary": pretrained["vocabulary"]}
    shown = ["score", "judge", "ref_kl", "objective", "clipfrac",
             "explained_variance"]
    for i in loop.steps(options.iterations, **run.parts):
        if i in KEPT:                   # i iterations are done
            loop.keep(f"_after{i}", **about, model=run.policy.state_dict())
        metrics = run.step(i)
        tokens = run.batch["tokens"]
        metrics["judge"] = in_chunks(judge_fn, tokens)[:, -1].mean().item()
        loop.log(shown=shown, **metrics)
        if (i + 1) % 5 == 0:
            for row, score in zip(tokens[:2], run.batch["scores"]):
                text = data.decode(pretrained["vocabulary"], row)
                loop.show(f"score {score:.2f}", text)
    return {**about,
            "model": run.policy.state_dict(),
            "result": evaluate(options, run, judge_fn, rho)}


def log_ratios(policy, ref, prompts, tokens):
    """log pi(y) - log rho(y) of completions (B,T): (B,), nats. Their mean over pi's is ref_kl."""
    logits = completion_logits(policy, prompts, tokens)
    ref_logits = completion_logits(ref, prompts, tokens)
    log_ratio = token_logprobs(logits, tokens) - token_logprobs(ref_logits, tokens)
    return log_ratio.sum(1)


def evaluate(options, run, judge_fn, rho):
    """A finished run's results, a dict, on the test prompts: fresh samples of pi, and rho's."""
    def read(prompts, tokens):
        scores = run.score_fn(tokens)[:, -1]
        ratios = log_ratios(run.policy, run.ref, prompts, tokens)
        judged_scores = judge_fn(tokens)[:, -1]
        return scores, ratios, judged_scores

    test_prompts = rho["test_prompts"].to(options.device)
    prompts = repeat(test_prompts, options.fresh_samples)
    fresh, _ = sample_completions(run.policy, prompts, options.length, run.end)
    samples = []
    for tokens in (rho["tokens"].long().to(options.device), fresh):
        prompts = repeat(test_prompts, len(tokens))
        rows = torch.stack(in_chunks(read, prompts, tokens)).cpu()
        check_finite(scores=rows)
        samples.append(rows.view(3, len(test_prompts), -1))             # (3,P,samples a prompt)
    old, new = samples
    beta = run.controller.beta
    score, ref_kl, judged_score = new.mean((1, 2)).tolist()
    scale = rho["scales"]["reward"][options.toward]
    p = (new[0] * scale["std"] + scale["mean"]).exp().mean().item()     # P(toward)
    with warnings.catch_warnings(action="ignore"):      # both functions check the ESS
        known = fraction_of_optimum(old, new, beta)
        rows = frontier(*pool(old, new))
    return {"beta": beta,
            "iterations": options.iterations,
            "score": score,
            "positive": p if options.toward == "positive" else 1 - p,
            "judge": judged_score,
            "ref_kl": ref_kl,
            **known,
            "frontier": rows,
            "best_of_n": best_of_n_rows(old[0])}


# ---- a reward of your own: python ppo.py --------------------------------------------------
def main():
    """The shortest complete example: rho, a reward, PPO, and the optimum for comparison."""
    parser = data.Parser(description="PPO toward the reward at the end of ppo.py.")
    parser.add_argument("--out", default="out", type=Path, help="the folder of pretrain.pt")
    parser.add_argument("--beta", default=0.5, type=data.number(float, 1e-3, 1e3),
                        help="price of a nat of drift, in units of the reward (default 0.5)")
    parser.add_argument("--iterations", default=20, type=data.number(int, 1), help="default 20")
    args = parser.parse_args()
    state = data.load_checkpoint(args.out / "pretrain.pt", "pretrain")
    rho = load_gpt(state, dtype=compute_dtype(torch.device("cpu")))
    prompt = torch.full((1, 1), state["start"])         # the boundary before a speech
    config = PPOConfig(beta=args.beta, iterations=args.iterations, length=32, batch=256,
                       lr=3e-4)         # this reward needs smaller steps than the study's

    def read(row):
        return data.decode(state["vocabulary"], row)

    def score_fn(tokens):               # (B,T) -> (B,T+1), scores of all prefixes
        scores = []
        for row in tokens:
            scores.append([float(my_reward(read(row[:t]))) for t in range(len(row) + 1)])
        return torch.tensor(scores)

    torch.manual_seed(0)
    before, _ = sample_completions(rho, prompt.expand(4096, 1), config.length)
    scores = score_fn(before)[:, -1]
    check_finite(scores=scores)
    best = optimum(scores, args.beta)
    print("rho: J {:.2f}; the optimum: J* {objective:.2f}, score {score:.2f}, KL {ref_kl:.2f} "
          "(effective sample size {ess:.0f})".format(scores.mean(), **best))
    run = PPO(rho, score_fn, prompt, config)
    for i in range(args.iterations):
        print("iteration {}: score {score:.2f}, KL {ref_kl:.2f}, J {objective:.2f}".format(
            i + 1, **run.step(i)))
    # Samples of pi*: samples of rho, resampled with weights exp(r / beta).
    weights = (scores / args.beta).softmax(0)
    at_optimum = before[weights.multinomial(2, True)]
    for name, tokens in [("before", before),
                         ("after", run.batch["tokens"]),
                         ("at the optimum", at_optimum)]:
        for text in map(read, tokens[:2]):
            print(f"\n----- {name}, reward {my_reward(text)}\n{text}")


def my_reward(text):
    """Replace this: the score of a text, which may be any prefix of one, even the empty string.
    Here: how many lines end with an exclamation mark."""
    lines = text.split("\n")
    return sum(line.endswith("!") for line in lines)


if __name__ == "__main__":
    data.run(main)
