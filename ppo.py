"""RLHF itself: rollouts, the KL penalty, advantages, losses, the PPO loop, and the exact optimum.

Fourth on the reader's path, after reward.py. This file knows nothing of sentiment: a reward
is any score_fn(tokens (B,T)) -> (B,). The policy pi starts as a copy of the reference rho
and is trained to maximise

    J(pi) = E[score(y)] - beta * KL(pi to rho)          (Ziegler 2019)

One iteration of PPO, with the numbers of the comments below and of the README:

    1. sample completions from the policy
    2. read them: log-probabilities under policy and reference, values, scores
    3. rewards: the KL penalty of every token, and the score on the last
    4. advantages and returns (GAE)
    5. update the policy on minibatches, several times over (clipped ratio)
    6. fit the value function to the returns

Departures from the textbook: completions have no end token, all have the same length; the
value function reads fixed features of the prefix instead of sharing the policy's trunk, so
step 6 costs next to nothing and cannot disturb the policy.

    python ppo.py --beta 0.1     tunes one policy (train.py does all stages, figures and report)
"""

import copy
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import Generator, completion_logits, sample_completions


# ---- the mathematics: pure functions on plain tensors ----------------------------------

def _masked(x, mask):
    """x in at least float32 with masked positions set to 0, and the mask as booleans."""
    x = x if x.dtype == torch.float64 else x.float()
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    return x.masked_fill(~mask, 0.0), mask


def masked_mean(x, mask=None):
    """Mean of x (B,T) over unmasked positions; 0 where there is none."""
    x, mask = _masked(x, mask)
    return x.sum() / mask.sum().clamp(min=1)


def token_logprobs(logits, tokens):
    """log softmax(logits)[token]: logits (B,T,V), tokens (B,T) -> (B,T), float32.

    logits[:, t] must be those that predict tokens[:, t]: the model's output one position
    earlier.
    """
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def kl_penalised_rewards(scores, logprobs, ref_logprobs, beta, mask=None):
    """Per-token rewards (B,T): -beta (log pi_old - log rho), plus the score on the last token.

    scores (B,), logprobs and ref_logprobs (B,T) of the sampled tokens, in nats. Each row
    sums to score - beta * sum of k1 (Ziegler 2019, equation 2). No gradient flows through it.

    >>> kl_penalised_rewards(torch.tensor([1.]), torch.tensor([[-1., -2.]]), torch.tensor([[-2., -2.]]), 0.5)
    tensor([[-0.5000,  1.0000]])
    """
    k1, mask = _masked((logprobs - ref_logprobs).detach(), mask)
    T = k1.size(1)
    last = (mask * torch.arange(1, T + 1, device=mask.device)).argmax(1, keepdim=True)     # (B,1)
    rewards = -beta * k1
    rewards = rewards.scatter_add(1, last, scores.detach().to(rewards.dtype)[:, None])
    return rewards.masked_fill(~mask, 0.0)


def gae(rewards, values, gamma=1.0, lam=0.95, mask=None):
    """Generalised advantage estimation (Schulman 2015, equation 16): advantages, returns (B,T).

    advantage_t = sum over l >= 0 of (gamma lam)^l delta_{t+l},
    delta_t = reward_t + gamma value_{t+1} - value_t, with value 0 after the last token.
    returns = advantages + values. Masked positions are skipped over and come out 0.
    """
    rewards, mask = _masked(rewards, mask)
    values, _ = _masked(values, mask)
    advantages = torch.zeros_like(rewards + values)
    advantage = next_value = torch.zeros_like(advantages[:, 0])
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values


def whiten(x, mask=None, shift_mean=True):
    """x (B,T) with mean 0 and population deviation 1 over all unmasked positions of the batch.

    shift_mean=False rescales and keeps the mean. Masked positions come out 0.
    """
    x, mask = _masked(x, mask)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def policy_loss(logprobs, old_logprobs, advantages, clip=0.2, mask=None):
    """PPO's clipped surrogate (Schulman 2017, equation 7): loss, info.

    -mean(min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)) with ratio = pi / pi_old, over unmasked
    tokens. info: approx_kl = KL(pi_old to pi) in nats per token (k3), clipfrac = share of
    tokens whose ratio lies outside the clip range, ratio = its mean.
    """
    log_ratio, mask = _masked(logprobs - old_logprobs.detach(), mask)
    advantages, _ = _masked(advantages.detach(), mask)
    ratio = log_ratio.clamp(max=80).exp()       # exp(89) is infinite in float32, and its gradient no number
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    with torch.no_grad():
        info = {"approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask),
                "clipfrac": masked_mean(((ratio - 1).abs() > clip).float(), mask),
                "ratio": masked_mean(ratio, mask)}
    return -masked_mean(surrogate, mask), info


def value_loss(values, old_values, returns, clip=0.2, mask=None):
    """Half the squared error, clipped as PPO2 does: loss, info.

    0.5 mean(max((v - R)^2, (v_old + clip(v - v_old, -clip, clip) - R)^2)) over unmasked tokens.
    """
    values, mask = _masked(values, mask)
    old_values, _ = _masked(old_values.detach(), mask)
    returns, _ = _masked(returns.detach(), mask)
    clipped = values.clamp(old_values - clip, old_values + clip)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    info = {"value_clipfrac": masked_mean((clipped_error > error).float(), mask).detach()}
    return 0.5 * masked_mean(torch.max(error, clipped_error), mask), info


def kl_estimates(logprobs, ref_logprobs):
    """Schulman's k1, k2, k3 of KL(pi to rho) from tokens drawn from pi, each (B,T), in nats.

    k1 = log pi - log rho, unbiased; k2 = k1^2 / 2, biased; k3 = exp(-k1) - 1 + k1, unbiased
    and never negative. (exp(k1) - 1 - k1, often seen, estimates another quantity.)
    """
    k1 = logprobs - ref_logprobs
    return k1, k1 ** 2 / 2, torch.expm1(-k1) + k1


def exact_kl(logprobs, ref_logprobs):
    """KL(pi to rho) of the next token, from the whole distributions (B,T,V) at every prefix: (B,T), nats."""
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


def entropy(logprobs):
    """Entropy of the next token, from the whole distribution (B,T,V): (B,T), nats."""
    return torch.special.entr(logprobs.exp()).sum(-1)


def explained_variance(values, returns):
    """1 - Var(returns - values) / Var(returns); 0 where the returns do not vary."""
    variance = returns.var(unbiased=False)
    return float(1 - (returns - values).var(unbiased=False) / variance) if variance > 0 else 0.0


class AdaptiveKL:
    """The KL controller of Ziegler 2019, section 2.2: moves beta until ref_kl meets its target.

    ref_kl and target in nats per completion, n and horizon in completions. .beta is the
    coefficient in force.
    """

    def __init__(self, beta, target, horizon):
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, ref_kl, n):
        """beta *= 1 + clip(ref_kl / target - 1, -0.2, 0.2) * n / horizon; returns the new beta."""
        error = min(max(ref_kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * n / self.horizon
        return self.beta

    def state_dict(self):
        return {"beta": self.beta}

    def load_state_dict(self, state):
        self.beta = state["beta"]


# ---- the yardsticks: the exact optimum and best-of-n ------------------------------------

def optimum(scores, beta, log_weights=None):
    """The best policy there is, pi*(y) = rho(y) exp(r(y)/beta) / Z, from samples of rho.

    scores (N,). log_weights: log(rho/q) of each sample where it was drawn from q instead;
    the estimate is self-normalised. Returns a dict: objective J* = beta log E_rho[exp(r/beta)],
    score = E_pi*[r], ref_kl = (score - objective) / beta in nats per completion, ess, and
    objective_se, the standard error of J* (delta method). Below an ess of 100 the numbers
    mean little. (Korbak 2022 has pi*; RL with KL penalties is Bayesian inference.)
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive for an optimum to exist, not {beta}")
    scores = torch.as_tensor(scores, dtype=torch.float64)
    base = torch.zeros_like(scores) if log_weights is None else torch.as_tensor(log_weights, dtype=torch.float64)
    tilted = base + scores / beta
    objective = beta * (tilted.logsumexp(0) - base.logsumexp(0))
    weights = tilted.softmax(0)
    score = (weights * scores).sum()
    spread = (weights - base.softmax(0)).square().sum().sqrt()
    return {"objective": objective.item(), "score": score.item(), "ref_kl": ((score - objective) / beta).item(),
            "ess": (1 / weights.square().sum()).item(), "objective_se": (beta * spread).item()}


def mixture_log_weights(logprobs, counts):
    """log(rho/q) of samples pooled from several policies, q their mixture (the balance heuristic, Veach 1995).

    logprobs (P,N): row i is policy i's log-probability of every pooled sample, row 0 that of
    rho; counts (P,): how many of the N samples each policy drew. Returns (N,).
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    logprobs = logprobs.double()
    return logprobs[0] - (logprobs + (counts / counts.sum()).log()[:, None]).logsumexp(0)


def best_of_n(scores, n):
    """(expected best score among n samples, bound on KL(best-of-n to rho) in nats).

    The expectation over all subsets of n of the scores (N,) given: the i-th smallest is the
    best of C(i-1, n-1) of the C(N, n). The bound is log n - (n-1)/n.
    """
    scores = torch.as_tensor(scores, dtype=torch.float64).cpu().sort().values
    N = len(scores)
    if not 1 <= n <= N:
        raise ValueError(f"n must be from 1 to the number of scores, {N}, not {n}")
    i = torch.arange(n, N + 1, dtype=torch.float64)

    def log_choose(a, b):
        return torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma(a - b + 1)

    k = torch.tensor(float(n), dtype=torch.float64)
    weights = (log_choose(i - 1, k - 1) - log_choose(i[-1], k)).exp()
    return (weights * scores[n - 1:]).sum().item(), math.log(n) - (n - 1) / n


# ---- the loop -----------------------------------------------------------------------------

def option(default, text):
    """A field of PPOConfig: its default, and what --help says of it."""
    return field(default=default, metadata={"help": text})


@dataclass
class PPOConfig:
    """The settings of a PPO run; each is an option of train.py."""
    beta: float = option(0.2, "KL coefficient")
    iterations: int = option(30, "of sampling and updating")
    length: int = option(64, "tokens of a completion")
    batch: int = option(256, "completions an iteration")
    minibatch: int = option(32, "completions an optimizer step")
    epochs: int = option(2, "passes over each batch")
    lr: float = option(4e-4, "learning rate at the start, falls linearly to 0; too high spends KL on noise")
    clip: float = option(0.2, "how far from 1 a ratio may go before its gradient stops")
    lam: float = option(0.9, "GAE's lambda: lower trusts the value function more")
    target_kl: float = option(0.05, "approx_kl, nats per token, at which an update stops early")
    kl_target: float = option(0.0, "ref_kl, nats per completion, that an adaptive beta keeps (Ziegler 2019); 0: beta stays")
    kl_horizon: float = option(500.0, "completions: beta moves by at most 0.2 batch / horizon an iteration")


class ValueFunction(nn.Module):
    """V(prefix): the expected rest of the rewards, from features of each prefix. Starts at 0 (Huang 2024)."""

    def __init__(self, features, width=128):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.ReLU())
        self.out = nn.Linear(width + 1, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features):
        """features (B,T,F) of the prefixes that end at each token -> values (B,T) before each token."""
        B, T, _ = features.shape
        h = F.pad(self.net(features), (0, 0, 1, -1))        # before token t the prefix ends at t-1, if there is one
        time = (torch.arange(T, device=h.device) / T).expand(B, T)
        return self.out(torch.cat((h, time[..., None]), -1)).squeeze(-1)


class PPO:
    """A PPO run: step(i) does iteration i and returns its metrics; parts names all that it changes.

    ref: the GPT rho, copied and frozen. score_fn: tokens (B,T) -> (B,), on completions without
    the prompt (1,T0). features_fn: tokens (B,T) -> (B,T,F), what the value function sees
    of each prefix; by default the reference's hidden states. seed: of sampling and shuffling.
    """

    def __init__(self, ref, score_fn, prompt, config, seed=0, features_fn=None):
        self.config, self.score_fn, self.prompt, self.features_fn = config, score_fn, prompt, features_fn
        self.ref = copy.deepcopy(ref).requires_grad_(False)
        self.policy = copy.deepcopy(ref).requires_grad_(True)
        self.sampler = Generator(prompt.device).manual_seed(seed)
        self.shuffler = Generator().manual_seed(seed)
        size = self.prefix_features(prompt.new_zeros(1, config.length)).size(-1)
        self.value = ValueFunction(size).to(prompt.device)
        # Adam's epsilon is 1e-5, as in the original code (Huang 2022); torch's 1e-8 steps farther on rare tokens.
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=config.lr, betas=(0.9, 0.95),
                                           eps=1e-5, weight_decay=0.0, fused=True)
        self.value_optimizer = torch.optim.AdamW(self.value.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.0)
        self.controller = AdaptiveKL(config.beta, config.kl_target, config.kl_horizon)
        self.parts = {"policy": self.policy, "value": self.value, "optimizer": self.optimizer,
                      "value_optimizer": self.value_optimizer, "controller": self.controller,
                      "sampler": self.sampler, "shuffler": self.shuffler}

    @torch.no_grad()
    def read(self, tokens):
        """Step 2: all that is read off completions (B,T), a dict of (B,) and (B,T) tensors."""
        logprobs, ref_logprobs = (completion_logits(model, self.prompt, tokens).log_softmax(-1) for model in (self.policy, self.ref))
        features = self.prefix_features(tokens)
        return {"tokens": tokens, "scores": self.score_fn(tokens), "features": features, "values": self.value(features),
                "logprobs": logprobs.gather(-1, tokens[..., None]).squeeze(-1),
                "ref_logprobs": ref_logprobs.gather(-1, tokens[..., None]).squeeze(-1),
                "exact_kl": exact_kl(logprobs, ref_logprobs), "entropy": entropy(logprobs)}

    @torch.no_grad()
    def prefix_features(self, tokens):
        if self.features_fn is not None:
            return self.features_fn(tokens)
        inputs = torch.cat((self.prompt.expand(len(tokens), -1), tokens), 1)
        return self.ref.hidden(inputs)[:, self.prompt.size(1):].float()

    def rollout(self, n):
        """Steps 1 and 2: n completions drawn from the policy at temperature 1, and all that is read off them."""
        tokens = sample_completions(self.policy, self.prompt, n, self.config.length, self.sampler)
        chunks = [self.read(chunk) for chunk in tokens.split(self.config.minibatch)]
        return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}

    def step(self, i):
        """One iteration: steps 1 to 6. Returns its metrics, a dict of floats (the README's glossary)."""
        config, beta = self.config, self.controller.beta
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * (1 - i / config.iterations)
        # 1. and 2. sample completions, read them
        batch = self.rollout(config.batch)
        check_finite(batch, i)
        # 3. rewards
        rewards = kl_penalised_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"], beta)
        # 4. advantages and returns, then whitening over the whole batch
        advantages, returns = gae(rewards, batch["values"], lam=config.lam)
        # 5. and 6. update the policy, fit the value function
        info = self.update(batch, whiten(advantages))
        info["value_loss"] = self.fit_values(batch["features"], returns, epochs=4)
        ref_kl = (batch["logprobs"] - batch["ref_logprobs"]).sum(1)
        if config.kl_target:
            self.controller.update(ref_kl.mean().item(), config.batch)
        self.batch = batch                       # for those who want to look at the samples
        return {"score": batch["scores"].mean().item(), "ref_kl": ref_kl.mean().item(),
                "ref_kl_se": ref_kl.std(unbiased=False).item() / len(ref_kl) ** 0.5,
                "exact_kl": batch["exact_kl"].sum(1).mean().item(),
                "objective": (batch["scores"] - beta * batch["exact_kl"].sum(1)).mean().item(), "beta": beta,
                "entropy": batch["entropy"].mean().item(), "ref_logprob": batch["ref_logprobs"].mean().item(),
                "explained_variance": explained_variance(batch["values"], rewards.flip(1).cumsum(1).flip(1)), **info}

    def update(self, batch, advantages):
        """Step 5: several epochs of minibatches, each completion once an epoch, reshuffled. Mean metrics.

        Stops before a step that starts farther than target_kl from the policy that sampled.
        """
        infos, steps = [], 0
        for epoch in range(self.config.epochs):
            for rows in torch.randperm(len(advantages), generator=self.shuffler).split(self.config.minibatch):
                tokens = batch["tokens"][rows]
                logprobs = token_logprobs(completion_logits(self.policy, self.prompt, tokens), tokens)
                loss, info = policy_loss(logprobs, batch["logprobs"][rows], advantages[rows], self.config.clip)
                infos.append({**info, "policy_loss": loss.detach()})
                if info["approx_kl"] > self.config.target_kl:
                    break
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
                infos[-1]["grad_norm"] = norm
                if not norm.isfinite():
                    raise FloatingPointError("the policy's gradient is not finite: lower --lr, or use --fp32")
                self.optimizer.step()
                steps += 1
            else:
                continue
            break
        self.optimizer.zero_grad(set_to_none=True)
        return {**mean_info(infos), "epochs": steps / math.ceil(len(advantages) / self.config.minibatch)}

    def fit_values(self, features, returns, epochs, minibatch=64):
        """Step 6: regress the value function on the returns (N,T) of prefixes with features (N,T,F): mean loss.

        The value function has its own weights and fixed inputs, so it may move as far as it
        likes: the clip that value_loss offers for a shared trunk is left open.
        """
        losses = []
        for epoch in range(epochs):
            for rows in torch.randperm(len(features), generator=self.shuffler).split(minibatch):
                values = self.value(features[rows])
                loss, _ = value_loss(values, values, returns[rows], clip=math.inf)
                if not loss.isfinite():
                    raise FloatingPointError("the value function's loss is not finite: lower --lr")
                self.value_optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.value_optimizer.step()
                losses.append(loss.detach())
        return torch.stack(losses).mean().item()


def mean_info(infos):
    """Means of the metrics of an update's minibatches: a list of dicts of tensors -> a dict of floats."""
    keys = dict.fromkeys(key for info in infos for key in info)
    return {key: torch.stack([info[key] for info in infos if key in info]).float().mean().item() for key in keys}


def check_finite(batch, i):
    """Raise FloatingPointError naming the first thing read off the completions that is not finite."""
    for name, x in batch.items():
        if not torch.isfinite(x).all():
            raise FloatingPointError(f"iteration {i}: {name} of the completions are not finite")


def diagnose(metrics, epochs):
    """What an experienced eye would say of an iteration's metrics: a list of sentences, empty when all is well."""
    said = []
    if metrics["ref_kl"] < -5 * metrics["ref_kl_se"]:
        said.append("ref_kl is negative by 5 standard errors: the sampler and the scorer differ")
    if metrics["exact_kl"] > 10:
        said.append("KL to the reference is above 10 nats: samples stop reading like rho's; raise --beta or stop")
    if metrics["entropy"] < 0.5:
        said.append("entropy is below half a nat a token: the policy is collapsing; raise --beta or lower --lr")
    if metrics["epochs"] < epochs:
        said.append("the update stopped early, too far from the policy that sampled: lower --lr or --epochs")
    return said


def main():
    import train                 # the stages live there; ppo.py alone does them up to PPO and draws nothing
    train.main(until="ppo")


if __name__ == "__main__":
    from data import run
    run(main)
