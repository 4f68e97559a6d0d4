"""DPO (Rafailov 2023) on a finished study: trained on pairs of rho's samples, without rollouts.

    python results/dpo.py --study out --beta 0.2               4 minutes on one thread
    python results/dpo.py --study out --beta 0.2 --seed 1 --lr 1e-4

The optimum of J is pi*(y) = rho(y) exp(r(y) / beta) / Z, so r(y) = beta log(pi*/rho)(y) + constant:
every policy pi is optimal for some reward, beta log(pi/rho), DPO's implicit reward. The preferences
are Bradley-Terry's on the study's score r: a is preferred to b with probability
P = sigmoid(r(a) - r(b)). DPO trains pi to predict them:

    loss = -log sigmoid(h) if a is preferred, -log sigmoid(-h) if b is,
    h = beta log(pi/rho)(a) - beta log(pi/rho)(b)

The expected loss is a cross-entropy, lowest where sigmoid(h) = P for every pair. There
h = r(a) - r(b), so log(pi/rho) = r / beta + constant: pi is pi*. The labels here are soft, P itself
in place of a draw from it. The expected loss is the same and so is the optimum, but the gradient
has less noise, and DPO learns as much of the score as PPO does.

The pairs are fresh samples of rho, two of the same prompt, each used once: as many as PPO draws at
its defaults (iterations x batch). Optimizer, gradient clipping, completions a step and the schedule
of the rate, which falls to 0, are PPO's.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import ppo  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from gpt import in_chunks, load_gpt, optimizer_step, sample_completions  # noqa: E402
from reward import soft_loss  # noqa: E402
from tables import table  # noqa: E402

LR = 3e-4       # below PPO's: log pi of a completion is a sum, so gradients are larger, and clipped


def train_dpo(ref, score_fn, prompts, config, end=None):
    """Train a copy of ref by DPO: a ppo.PPO whose policy is the trained one.

    Inputs as for ppo.PPO, but that score_fn gives the scores of all prefixes (B,T+1).
    """
    run = ppo.PPO(ref, score_fn, prompts, config, end)
    n = config.iterations * config.batch // 2                               # pairs
    prompts = run.prompts[torch.arange(n) % len(prompts)].repeat_interleave(2, 0)
    tokens = []
    for rows in prompts.split(512):     # all at once would keep the streams of all, over 1 GB
        tokens.append(sample_completions(run.ref, rows, config.length, end)[0])
    tokens = torch.cat(tokens)
    scores = in_chunks(score_fn, tokens)[:, -1].view(n, 2)
    target = (scores[:, 0] - scores[:, 1]).sigmoid()                        # P(a over b)
    prompts, tokens = prompts.view(n, 2, -1), tokens.view(n, 2, -1)         # (n,2,T0), (n,2,T)
    minibatches = torch.randperm(n).split(max(config.minibatch // 2, 1))
    for i, rows in enumerate(minibatches):
        log_ratio = ppo.log_ratios(run.policy, run.ref, prompts[rows].flatten(0, 1),
                                   tokens[rows].flatten(0, 1))              # (2B,)
        implicit = config.beta * log_ratio.view(-1, 2)
        loss = soft_loss(implicit[:, 0] - implicit[:, 1], target[rows]).mean()
        optimizer_step(loss, run.optimizer, config.lr * (1 - i / len(minibatches)), 1.0)
    return run


def load_study(out, beta):
    """options, pretrained, rewarded, judged, rho of a folder; train.OPTIONS at the study's size."""
    rho = data.load_checkpoint(out / "rho.pt", "rho")
    states = []
    for kind in ("pretrain", "reward", "judge"):
        states.append(sample.load_beside(out / "rho.pt", rho, kind))
    options = SimpleNamespace(**{row.name: getattr(row, rho["size"]) for row in train.OPTIONS})
    options.beta, options.length = beta, rho["tokens"].size(1)
    options.device = torch.device(rho["inputs"]["device"])
    options.dtype = getattr(torch, rho["inputs"]["dtype"].removeprefix("torch."))
    return options, *states, rho


def inputs(options, pretrained, rewarded, judged, rho):
    """What ppo.PPO and train_dpo take. Both draw from torch's global generator: seed it before."""
    return (load_gpt(pretrained, options.device, options.dtype),
            ppo.load_scorer(options, rewarded, rho), rho["prompts"].to(options.device), options,
            rho["end"])


def main():
    parser = data.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--study", default="out", type=Path, help="folder of a finished study (default out)")
    add("--beta", default=0.2, type=data.number(float, 1e-3, 10), help="default 0.2")
    add("--seed", default=0, type=data.number(int, 0, 2**31), help="of pairs and minibatches")
    add("--lr", default=LR, type=data.number(float, 0, 1), help=f"at the start (default {LR:g})")
    add("--iterations", type=data.number(int, 1), help="of PPO, whose samples are matched")
    args = parser.parse_args()
    study = load_study(args.study, args.beta)
    options, _, _, judged, rho = study
    options.lr, options.iterations = args.lr, args.iterations or options.iterations
    torch.manual_seed(data.fold(f"{args.seed} dpo", 2**31))
    began = time.process_time()
    run = train_dpo(*inputs(*study))
    seconds = time.process_time() - began
    reached = ppo.evaluate(options, run, ppo.load_scorer(options, judged, rho), rho)
    best = reached["optimum"]
    row = {"score": reached["score"], "judge": reached["judge"], "KL": reached["ref_kl"],
           "J": (reached["objective"], reached["objective_se"]),
           "J*": (best["objective"], best["objective_se"]), "ESS": best["ess"],
           "fraction": (reached["fraction_of_optimum"], reached["fraction_se"]),
           "KL(pi to pi*)": reached["kl_to_optimum"], "CPU seconds": round(seconds)}
    print(*table(list(row), [row.values()]), sep="\n")


if __name__ == "__main__":
    data.run(main)
