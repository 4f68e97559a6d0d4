"""Is it the network that holds PPO back? The same GPT tuned toward pi* without RL.

    python tests/likelihood.py --study out --beta 0.4 0.2       (14 minutes on one core)

pi* = rho exp(r / beta) / Z is known up to Z, so samples of rho, weighted by exp(r / beta), are
samples of it. Maximum likelihood on them moves a copy of rho toward pi*: supervised learning,
with no rollouts, penalty or advantages. Where it comes closer than PPO, the network can do better
than PPO makes it do. It is no bound from above: its samples are few too, and weights make them
fewer.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import ppo  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from gpt import (completion_logits, descend, in_chunks, load_gpt, sample_completions,  # noqa: E402
                 set_rates)


def fit(policy, prompts, tokens, weights, epochs, lr, minibatch=64):
    """Maximum likelihood of completions tokens (N,T), each counting by its weight (N,), mean 1."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    batches = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(epoch)
        batches += torch.randperm(len(tokens), generator=generator).split(minibatch)
    for i, rows in enumerate(batches):
        set_rates([optimizer], ppo.learning_rate(i, len(batches)))
        logits = completion_logits(policy, prompts[rows], tokens[rows])
        logprobs = ppo.token_logprobs(logits, tokens[rows]).sum(1)
        loss = -(weights[rows] * logprobs).mean() / tokens.size(1)
        descend(loss, policy, [optimizer], clip=1.0)


def main():
    parser = data.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", default="out", type=Path, help="folder of a finished study")
    parser.add_argument("--beta", type=float, nargs="+", default=[0.2])
    parser.add_argument("--samples", type=data.number(int, 1), default=12_288, help="of rho")
    parser.add_argument("--epochs", type=data.number(int, 1), default=2)
    parser.add_argument("--lr", type=float, default=3e-4, help="at the start; it falls to 0")
    options = parser.parse_args()
    args = train.parse(["--out", str(options.study)])
    pretrained, rewarded, _, rho, runs = sample.load_study(options.study)
    model, score_fn = train.scorer(args, "reward", rewarded, rho)
    ref = load_gpt(pretrained, args.device, args.dtype).requires_grad_(False)
    prompts = train.repeat(rho["prompts"], options.samples)
    tokens = sample_completions(ref, prompts, args.length, torch.Generator().manual_seed(99))
    scores = in_chunks(score_fn, tokens)
    for beta in options.beta:
        weights = (scores / beta).softmax(0) * len(scores)
        policy = load_gpt(pretrained, args.device, args.dtype)
        fit(policy, prompts, tokens, weights, options.epochs, options.lr)
        fresh = sample_completions(policy, prompts[:1024], args.length,
                                   torch.Generator().manual_seed(98))
        drift = train.measure_drift(policy, ref, prompts[:1024], fresh)
        reached, kl = in_chunks(score_fn, fresh), drift["exact_kl"]
        objective, error = sample.mean_se(reached - beta * drift["log_ratio"])
        known = next(run for run in runs if run["inputs"]["beta"] == beta
                     and run["toward"] == "positive")
        pooled, log_weights = sample.pool(rho, known)
        best = ppo.optimum(pooled, beta, log_weights)
        print(f"beta {beta:g}: ess {len(scores) ** 2 / weights.square().sum():.0f} of "
              f"{len(scores)}, score {reached.mean():.2f}, KL {kl.mean():.2f}, J {objective:.3f} "
              f"+- {error:.3f}, fraction {objective / best['objective']:.2f}", flush=True)


if __name__ == "__main__":
    data.run(main)
