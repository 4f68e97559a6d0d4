"""What is each ingredient of PPO worth? PPO again on a finished study, with one thing changed.

    python results/what_matters.py --study out                  63 runs: 15 minutes of one core
    python results/what_matters.py --csv results/what_matters.csv --table       of the runs kept

Each run is a row of --csv, written when it ends; a run that is there is not done again. Rows name
the study (the key of its rho.pt), the machine and the code: a digest of the scripts that PPO is
made of, not of this one, so who edits a change here deletes its rows. J is measured on 1,024 fresh
samples; fraction = (J - J(rho)) / (J* - J(rho)) with the J* of the study's own run at that beta,
whose settings hold but for what is said here. A run depends on its row alone, not on those before.
"""

import csv
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import ppo  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from gpt import in_chunks, load_gpt, norm, padding  # noqa: E402
from tables import mean_se, table  # noqa: E402

COLUMNS = ["change", "beta", "seed", "iterations", "batch", "study", "machine", "code", "score",
           "ref_kl", "J", "fraction", "seconds"]


class HiddenValues(ppo.PPO):
    """Values by ridge regression on the position and rho's hidden states, as others start a critic.

    259 weights would learn the completions of their own batch by heart, so they are those that the
    batch before decided.
    """

    weight = None

    def states(self, prompts, tokens):
        inputs = torch.cat((prompts, tokens), dim=1)[:, :-1]
        return norm(self.ref.stream(inputs, pad=padding(inputs)))[:, prompts.size(1) - 1:]

    def advantages(self, rewards, returns, values, mask):
        hidden = in_chunks(self.states, self.batch["prompts"], self.batch["tokens"]).double()
        t = torch.linspace(0, 1, hidden.size(1)).to(hidden)[:, None].expand(*hidden.shape[:2], 1)
        x = torch.cat((torch.ones_like(t), t, t * t, hidden), dim=-1)           # (B,T,C+3)
        values = torch.zeros_like(rewards) if self.weight is None else (x @ self.weight).float()
        known, decided = x[mask], returns[mask].double()
        ridge = torch.eye(known.size(1)).to(known)
        self.weight = torch.linalg.solve(known.T @ known + ridge, known.T @ decided)
        return super().advantages(rewards, returns, values, mask)


class Unwhitened(ppo.PPO):
    def advantages(self, rewards, returns, values, mask):
        advantages, _ = ppo.gae(rewards, values, lam=self.config.lam, mask=mask)
        return advantages


class OwnPenalty(ppo.PPO):
    """A bug: every token is charged its own log-ratio alone, not those of the tokens after it."""

    def advantages(self, rewards, returns, values, mask):
        k1 = self.batch["logprobs"] - self.batch["ref_logprobs"]
        penalty = self.controller.beta * k1.masked_fill(~mask, 0.0)
        returns = ppo.rewards_to_go(rewards + penalty, mask)        # the score, at every token
        values = ppo.fit_values(self.batch["so_far"], returns, mask)
        advantages, _ = ppo.gae(rewards + penalty, values, lam=self.config.lam, mask=mask)
        return ppo.whiten(advantages - penalty, mask)


class BatchScale(ppo.PPO):
    """A bug: scores are whitened in every batch, so beta has no fixed meaning."""

    def advantages(self, rewards, returns, values, mask):
        batch, scores = self.batch, self.batch["scores"]
        scores = (scores - scores.mean()) / (scores.std() + 1e-8)
        rewards = ppo.kl_penalised_rewards(scores, batch["logprobs"], batch["ref_logprobs"],
                                           self.controller.beta, mask)
        returns = ppo.rewards_to_go(rewards, mask)
        values = ppo.fit_values(batch["so_far"], returns, mask)
        return super().advantages(rewards, returns, values, mask)


# Each change: what differs (batch, minibatch, lr: times so much), and the class. reading: values
# know the score so far; eps: Adam's.
CHANGES = {
    "default": ({}, ppo.PPO),
    "baseline of the batch (simple)": ({"algorithm": "simple"}, ppo.PPO),
    "leave-one-out baseline (rloo)": ({"algorithm": "rloo"}, ppo.PPO),
    "values from the position alone": ({"reading": False}, ppo.PPO),
    "values from rho's hidden states": ({}, HiddenValues),
    "lambda 1": ({"lam": 1.0}, ppo.PPO),
    "lambda 0.95": ({"lam": 0.95}, ppo.PPO),
    "lambda 0": ({"lam": 0.0}, ppo.PPO),
    "no whitening, rate x 5": ({"lr": 5}, Unwhitened),
    "half the minibatch": ({"minibatch": 0.5}, ppo.PPO),
    "half the batch": ({"batch": 0.5}, ppo.PPO),
    "twice the batch": ({"batch": 2}, ppo.PPO),
    "twice the batch and minibatch": ({"batch": 2, "minibatch": 2}, ppo.PPO),
    "two epochs": ({"epochs": 2}, ppo.PPO),
    "four epochs": ({"epochs": 4}, ppo.PPO),
    "rate / 2": ({"lr": 0.5}, ppo.PPO),
    "rate x 2": ({"lr": 2}, ppo.PPO),
    "Adam's epsilon 1e-5, rate x 0.4": ({"lr": 0.4, "eps": 1e-5}, ppo.PPO),
    "no clipping, no early stop": ({"clip": 1e9, "max_update_kl": 1e9}, ppo.PPO),
    "bug: penalty of the token alone": ({}, OwnPenalty),
    "bug: score scaled in each batch": ({}, BatchScale),
}


def load_study(folder, beta):
    """Of a study: what its run at beta reached, its options, pretrain.pt, reward.pt, rho.pt."""
    path = folder / f"ppo_beta{beta:g}.pt"
    tuned = data.load_checkpoint(path, "ppo")
    if tuned["result"]["optimum"]["objective"] is None:
        raise data.UserError(f"{path}: J* is not known. Choose a larger --beta.")
    options = SimpleNamespace(**tuned["inputs"])
    options.device = torch.device(options.device)
    options.dtype = getattr(torch, options.dtype.removeprefix("torch."))
    beside = [sample.load_beside(path, tuned, kind) for kind in ("pretrain", "reward", "rho")]
    return tuned["result"], options, *beside


def run_once(study, change, seed, iterations, batch):
    """One run: score, ref_kl, J, fraction and CPU seconds, a dict of floats."""
    reached, options, pretrained, rewarded, rho = study
    settings, algorithm = CHANGES[change]
    config = SimpleNamespace(**{**vars(options), "iterations": iterations, "batch": batch})
    for name, value in settings.items():
        if name in ("batch", "minibatch", "lr"):
            old = getattr(config, name)
            value = type(old)(old * value)
        setattr(config, name, value)
    torch.manual_seed(seed)
    score_fn = ppo.load_scorer(options, rewarded, rho)
    began = time.process_time()
    run = algorithm(load_gpt(pretrained, options.device, options.dtype), score_fn,
                    rho["prompts"].to(options.device), config, rho["end"])
    if not settings.get("reading", True):
        run.score_fn = lambda tokens: score_fn(tokens)[:, -1]
    run.optimizer.param_groups[0]["eps"] = settings.get("eps", 1e-3)
    for i in range(iterations):
        run.step(i)
    seconds = time.process_time() - began
    torch.manual_seed(5000 + seed)
    run.prompts, run.group = rho["test_prompts"].to(options.device), 1
    config.batch = 1024
    fresh = run.rollout()               # from the same random numbers whatever was changed
    k1 = (fresh["logprobs"] - fresh["ref_logprobs"]).masked_fill(~fresh["mask"], 0.0)
    score, ref_kl = fresh["scores"].mean().item(), k1.sum(1).mean().item()
    objective, start = score - options.beta * ref_kl, reached["reference_objective"]
    return {"score": score, "ref_kl": ref_kl, "J": objective, "seconds": seconds,
            "fraction": (objective - start) / (reached["optimum"]["objective"] - start)}


def read_rows(path):
    """The rows of a file of runs, dicts of text; a new file if there is none."""
    if not path.exists():
        data.write_file(path, ",".join(COLUMNS) + "\n")
    reader = csv.DictReader(data.read_text(path).splitlines())
    if reader.fieldnames != COLUMNS:
        raise data.UserError(f"{path} has other columns. Move it away or name another --csv.")
    return list(reader)


def print_table(rows):
    """Means and standard errors over seeds."""
    groups, lines = {}, []
    for row in rows:
        key = (row["study"][:6], row["code"][:6], row["beta"], row["iterations"], row["batch"],
               row["change"])
        groups.setdefault(key, []).append(row)
    for key, runs in groups.items():
        cells = []
        for name in ("score", "ref_kl", "J", "fraction", "seconds"):
            mean, se = mean_se([float(row[name]) for row in runs])
            cells.append((mean, se) if len(runs) > 1 else mean)
        lines.append([*key, len(runs), *cells])
    print(*table(["study", "code", "beta", "iterations", "batch", "change", "seeds", "score",
                  "ref_kl", "J", "fraction of optimum", "seconds"], lines), sep="\n")


def main():
    parser = data.Parser(description=__doc__.split("\n")[0])
    add, count = parser.add_argument, data.number(int, 1)
    add("--study", default="out", type=Path, help="folder of a finished study (default out)")
    add("--csv", type=Path, help="file of rows (default: what_matters.csv in that folder)")
    add("--beta", type=data.number(float, 1e-6), default=0.2, help="of a run of it (default 0.2)")
    add("--iterations", type=count, default=8, help="of each run (default 8)")
    add("--batch", type=count, default=192, help="of the default (192); changes are relative to it")
    add("--seeds", type=count, default=3, help="runs of each change (default 3)")
    add("--only", nargs="+", choices=list(CHANGES), default=list(CHANGES), help="these changes")
    add("--table", action="store_true", help="print the rows there are, run nothing")
    args = parser.parse_args()
    path = args.csv or args.study / "what_matters.csv"
    code = data.digest(" ".join(train.SOURCES.values()))[:16]
    rows = read_rows(path)
    if args.table:
        return print_table(rows)
    study = load_study(args.study, args.beta)
    cpu = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    about = {"beta": f"{args.beta:g}", "iterations": str(args.iterations),
             "batch": str(args.batch), "study": study[-1]["key"][:16], "code": code}
    for seed in range(args.seeds):
        for change in args.only:
            row = {"change": change, "seed": str(seed), **about}
            if any(row.items() <= old.items() for old in rows):
                continue
            found = run_once(study, change, seed, args.iterations, args.batch)
            row["machine"] = f"{cpu}, {torch.get_num_threads()} threads"
            row |= {key: f"{x:.4g}" for key, x in found.items()}
            with open(path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
            print(f"{change}, seed {seed}: J {row['J']}, fraction {row['fraction']}", flush=True)


if __name__ == "__main__":
    data.run(main)
