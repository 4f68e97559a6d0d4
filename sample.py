"""Look at the results: samples, blind ratings, figures and the report.

Skip this file on a first reading: it holds no RLHF. Positive Prob is P(positive) by the reward
model in the checkpoint's folder. ref_kl is log pi - log rho of the completion, in nats; its mean is
KL(pi to rho), unless --temperature or --top-k changes the sampling.

    python sample.py                                            the pretrained model's samples
    python sample.py --checkpoint out/ppo_beta0.2.pt --num 20   a tuned model's, with Positive Prob
    python sample.py --rate out/pretrain.pt out/ppo_beta0.2.pt --ratings mine.csv     rate blind
    python sample.py --rate out/pretrain.pt --ratings mine.csv  label samples; or: --rate plays
    python sample.py --report out                               figures, report.md, summary.json
"""

import csv
import io
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure        # unlike pyplot, needs no display

import data
import ppo
import reward
from gpt import cut_after, generate, load_gpt

SAMPLE = "-----\n{text}\n\nPositive Prob: {positive:.1%}   log pi - log rho: {ref_kl:.1f} nats\n"
HEADER = "text,rating,sense,drawn_from\n"       # first line of a ratings file
REPORT = """# Size {size}: {pretrain[val_bits_per_byte]:.3f} bits per byte on held-out text

| beta | score | judge | P(positive) | KL | J | J* | ESS | fraction | KL to pi* |
|---|---|---|---|---|---|---|---|---|---|
| rho | 0 | 0 | | 0 | 0 | | | | |
{results}
± a standard error; KL in nats; J* takes an effective sample size (ESS) of 100; fraction: of the \
way from rho to J*; judge: the score by a model never optimised.

| model | Pearson | AUC | calibration slope | log loss |
|---|---|---|---|---|
| reward | {reward[val_pearson]:.3f} | {reward[val_auc]:.3f} | {reward[val_slope]:.2f} | \
{reward[val_log_loss]:.3f} |
| judge | {judge[val_pearson]:.3f} | {judge[val_auc]:.3f} | {judge[val_slope]:.2f} | \
{judge[val_log_loss]:.3f} |

![](figures/frontier.png)

![](figures/ppo.png)

```
{samples}```
"""
# A run's row and line; where the effective sample size is too small, J* is not known.
KNOWN = """| {label} | {score:.2f} | {judge:.2f} | {positive:.2f} | {ref_kl:.2f} | \
{objective:.2f} ± {objective_se:.2f} | {optimum[objective]:.2f} ± {optimum[objective_se]:.2f} | \
{optimum[ess]:.0f} | {fraction_of_optimum:.2f} ± {fraction_se:.2f} | {kl_to_optimum:.2f} |
beta {label}: score {score:.2f}, KL {ref_kl:.2f} nats, J {objective:.2f} of J* \
{optimum[objective]:.2f}: {fraction_of_optimum:.0%} of the way from rho"""
UNKNOWN = """| {label} | {score:.2f} | {judge:.2f} | {positive:.2f} | {ref_kl:.2f} | \
{objective:.2f} ± {objective_se:.2f} | not known | {optimum[ess]:.0f} | | |
beta {label}: score {score:.2f}, KL {ref_kl:.2f} nats, J {objective:.2f}; \
J* is not known from these samples"""
# The panels of figures/ppo.png.
METRICS = """objective score judge ref_kl policy_loss clipfrac
             explained_variance entropy exact_kl""".split()


# ---- samples ------------------------------------------------------------------------------

def load_beside(path, state, kind):
    """The checkpoint kind.pt in path's folder. Raises UserError if state was not made from it."""
    beside = data.load_checkpoint(path.parent / f"{kind}.pt", kind)
    if beside["key"] != state["inputs"][kind]:
        raise data.UserError(f"{kind}.pt beside {path} is of another study. Run train.py again.")
    return beside


@torch.no_grad()
def draw(path, num, seed=0, prompt="", temperature=1.0, top_k=None):
    """Draw num samples of a checkpoint's policy: a list of dicts of text, positive and ref_kl."""
    state = study = data.load_checkpoint(path, "pretrain", "ppo")
    if state["kind"] == "pretrain":
        # rho gets the same prompts as the policies tuned from it.
        study = data.load_checkpoint(path.parent / "rho.pt", "rho")
    policy, ref = load_gpt(state), load_gpt(load_beside(path, study, "pretrain"))
    rewarded = load_beside(path, study, "reward")
    length, prompts = rewarded["length"], study["test_prompts"]
    if prompt:
        ids = data.make_tokenizer(state["vocabulary"]).encode_ordinary(prompt)
        # Only the end of a long prompt is read, so that the sample fits the context.
        prompts = torch.tensor([ids[length - policy.config.block_size:]])
    torch.manual_seed(seed)
    prompts = prompts[torch.randint(len(prompts), (num,))]
    tokens = generate(policy, prompts, length, temperature, top_k)
    completions = cut_after(tokens[:, prompts.size(1):], study["end"])
    positive = reward.load_reward(rewarded)(completions).sigmoid().tolist()
    ref_kl = ppo.log_ratios(policy, ref, prompts, completions).tolist()
    samples = []
    for row, p, kl in zip(torch.cat((prompts, completions), dim=1), positive, ref_kl):
        text = data.decode(state["vocabulary"], row).removeprefix(data.BOUNDARY)
        samples.append({"text": text, "positive": p, "ref_kl": kl})
    return samples


# ---- ratings ------------------------------------------------------------------------------

def read_ratings(path):
    """The rows of a ratings file: dicts of text, rating, sense and drawn_from."""
    text = data.read_text(path, "ratings")
    if not text.startswith(HEADER):
        raise data.UserError(f"{path} does not begin with {HEADER.strip()}. Give another file.")
    return csv.DictReader(io.StringIO(text))


def passages_to_rate(args):
    """The texts to rate, shuffled by --seed: (text, name of its checkpoint or "plays") each."""
    random.seed(args.seed)
    passages = []
    for path in args.rate:
        if path.name == "plays":
            speeches = data.load_corpus()[0].split(data.BOUNDARY)
            # Choose speeches about as long as samples.
            texts = [speech for speech in speeches if 100 < len(speech) < 400]
            random.shuffle(texts)
        else:
            texts = [row["text"] for row in draw(path, args.num, args.seed)]
        for text in texts[:args.num]:
            # A model can write any byte; a CSV file does not preserve these two.
            passages.append((re.sub("[\0\r]", " ", text), path.stem))
    random.shuffle(passages)
    return passages


def ask(question, low, high):
    """Ask the reader for a number from low to high until the answer is one."""
    while True:
        try:
            return data.number(float, low, high)(input(question))
        except ValueError:
            print(f"The answer must be a number from {low} to {high}.")


def rate(args):
    """Ask a reader to rate texts, resuming after those rated; ask sense only to compare sources."""
    if len({path.stem for path in args.rate}) < len(args.rate):
        raise data.UserError("--rate tells checkpoints apart by their file names. Rename a copy.")
    passages = passages_to_rate(args)
    if not args.ratings.exists():
        data.write_file(args.ratings, HEADER)
    rated = [(row["text"], row["drawn_from"]) for row in read_ratings(args.ratings)]
    todo = passages[len(rated):]
    if rated + todo != passages:
        raise data.UserError(f"{args.ratings} was begun with other --rate, --num or --seed. "
                             "Give those, or another file.")
    print(f"{len(rated)} rated, {len(todo)} to go. Ctrl-C ends; the same command goes on.")
    for i, (text, name) in enumerate(todo):
        print(f"\n----- {len(todo) - i} to go\n{text}\n")
        feeling = ask("feeling, -2 very negative to 2 very positive: ", -2, 2)
        sense = ""
        if len(args.rate) > 1:
            sense = ask("sense, 1 (none) to 5 (all of it makes sense): ", 1, 5)
        # Append each row at once, so that no crash loses it.
        with open(args.ratings, "a", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([text, feeling, sense, name])
    # Results are shown only at the end: a reader who resumes must still be blind.
    print(f"\nAll are rated. In numbers: python results/readers.py {args.ratings}")


# ---- figures ------------------------------------------------------------------------------

def plot(axis, rows, x, y, style, **options):
    """Plot column y of rows against column x. matplotlib leaves out what is None."""
    axis.plot([row[x] for row in rows], [row[y] for row in rows], style, **options)


def drift_axis(axis, ylabel):
    """Prepare an axis for what is drawn against KL(pi to rho)."""
    # Scores at first grow linearly with the square root of the KL (Gao 2022).
    axis.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    # A margin would reach below 0, which has no root.
    axis.set(xmargin=0, ylabel=ylabel,
             xlabel="KL(pi to rho), nats per completion (square-root scale)")


def draw_frontier(runs):
    """Score and judge against KL: PPO's paths, best of n, and the optimum."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle("black: the optimum, the highest score at each KL; grey: best of n")
    axes = figure.subplots(1, 2, sharey=True)
    for run in runs:
        for axis, key, column in zip(axes, ("score", "judge"), (1, 2)):
            drift_axis(axis, f"{key}, standard deviations of rho's")
            plot(axis, run["history"], "ref_kl", key, run["color"], lw=1)
            plot(axis, [run], "ref_kl", key, run["color"] + "o", label=run["label"])
            plot(axis, run["frontier"], 0, column, "k")
        plot(axes[0], run["best_of_n"], 3, 1, "C7.-")
        star = run["color"] + "*"               # not drawn if J* is not known
        plot(axes[0], [run["optimum"]], "ref_kl", "score", star, ms=14, mec="k", zorder=3)
    axes[0].legend(title="PPO, beta")
    return figure


def draw_ppo(runs):
    """PPO's metrics by iteration; faint: the run of this name and size in results/runs."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle("PPO's metrics by iteration; dotted: J*; faint: results/runs")
    axes = figure.subplots(3, 3).flatten()
    for run in runs:
        log = data.HERE / f"results/runs/{run['size']}_{run['path'].stem}.metrics.jsonl"
        logged = list(map(json.loads, log.read_text().splitlines())) if log.exists() else []
        for axis, key in zip(axes, METRICS):
            axis.set_title(key)
            plot(axis, run["history"], "step", key, run["color"], label=run["label"])
            plot(axis, logged, "step", key, run["color"], alpha=0.3)
        # No line is drawn if J* is not known.
        axes[0].hlines(run["optimum"]["objective"], 1, run["iterations"], run["color"], "dotted")
    axes[5].legend(title="beta")
    return figure


# ---- the report ---------------------------------------------------------------------------

def load_runs(out, rho):
    """The finished PPO runs of a folder that were made with its rho.pt, with their results."""
    runs = []
    for path in sorted(out.glob("ppo_*.pt")):
        run = data.load_checkpoint(path)
        result = run.get("result")          # an intermediate policy has none
        if result and run["inputs"]["rho"] == rho["key"]:
            result["seconds_per_iteration"] = run["seconds"] / result["iterations"]
            # The algorithm is told only where it is not PPO.
            label = re.sub("ppo_|beta|, ppo", "", f"{path.stem}, {run['inputs']['algorithm']}")
            runs.append({**run, **result,
                         "path": path, "label": label, "color": f"C{len(runs)}"})
    if not runs:
        raise data.UserError(f"{out} has no finished PPO run. Run train.py --out {out} first.")
    return runs


def report(out):
    """Write a study's figures/*.png, samples/*.txt, summary.json, report.md; print samples."""
    rho = data.load_checkpoint(out / "rho.pt", "rho")
    runs = load_runs(out, rho)
    stages = {"rho": rho}
    for name in ("data", "pretrain", "reward", "judge"):
        stages[name] = load_beside(out / "rho.pt", rho, name)
    seconds = {name: state["seconds"] for name, state in stages.items()}
    seconds["total"] = sum(state["seconds"] for state in [*stages.values(), *runs])
    seconds["ppo"] = {run["label"]: run["seconds"] for run in runs}
    measured = {key: stages["pretrain"][key] for key in ("parameters", "val_bits_per_byte")}
    summary = {"size": rho["size"], "device": rho["inputs"]["device"], "seconds": seconds,
               "pretrain": measured, "ppo": [run["result"] for run in runs]}
    for name in ("reward", "judge"):
        # The metrics on passages, or on samples if the labels have no passages.
        metrics, *_ = stages[name]["report"].values()
        summary[name] = {f"val_{key}": x for key, x in metrics.items()}
        summary[name] |= rho["scales"][name]["positive"]
    first = {}                          # the first sample of each checkpoint, as lines
    for path in [out / "pretrain.pt", *(run["path"] for run in runs)]:
        texts = [SAMPLE.format_map(row) for row in draw(path, 20)]
        data.write_file(out / f"samples/{path.stem}.txt", "\n".join(texts))
        first[path] = texts[0].split("\n")
    before = ["before", *first[out / "pretrain.pt"]]
    results = samples = ""
    for run in runs:
        template = UNKNOWN if run["fraction_of_optimum"] is None else KNOWN
        row, line = template.format_map(run).split("\n")
        results += row + "\n"
        after = ["after", *first[run["path"]]]
        for pair in itertools.zip_longest(before, after, fillvalue=""):
            samples += "{:52.52}  {}\n".format(*pair)
        samples += line + "\n\n"
    print(samples, end="")
    (out / "figures").mkdir(exist_ok=True)
    draw_frontier(runs).savefig(out / "figures/frontier.png")
    draw_ppo(runs).savefig(out / "figures/ppo.png")
    data.write_file(out / "summary.json", json.dumps(summary, indent=1))
    text = REPORT.format(results=results, samples=samples, **summary)
    data.write_file(out / "report.md", text)
    print(f"Figures, tables and samples: {out / 'report.md'}")


# ---- the command line ---------------------------------------------------------------------

def main():
    parser = data.Parser(description="Samples, blind ratings, figures, the report.")
    add = parser.add_argument
    add("--checkpoint", default="out/pretrain.pt", type=Path, help="pretrain.pt or ppo_*.pt")
    add("--num", type=data.number(int, 1), default=20, help="samples per checkpoint (default 20)")
    add("--prompt", default="", help="text to continue (default: the run's test prompts)")
    add("--temperature", type=data.number(float, 0), default=1.0, help="below 1: likelier tokens")
    add("--top-k", type=data.number(int, 1), help="only the k likeliest tokens (default: all)")
    add("--seed", type=data.number(int, 0), default=0, help="seed of samples and rating order")
    add("--jsonl", action="store_true", help="print one JSON object per line")
    add("--rate", nargs="+", type=Path, metavar="CHECKPOINT",
        help="rate samples: several checkpoints blind; or one, or plays, for train.py --labels")
    add("--ratings", type=Path, default="ratings.csv", metavar="FILE.csv", help="where answers go")
    add("--report", type=Path, metavar="DIR", help="write a study's figures and tables again")
    args = parser.parse_args()
    if args.report:
        report(args.report)
    elif args.rate:
        rate(args)
    else:
        for row in draw(args.checkpoint, args.num, args.seed, args.prompt, args.temperature,
                        args.top_k):
            print(json.dumps(row, ensure_ascii=False) if args.jsonl else SAMPLE.format_map(row))


if __name__ == "__main__":
    data.run(main)
