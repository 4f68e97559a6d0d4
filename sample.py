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
    policy = load_gpt(state)
    ref = load_gpt(load_beside(path, study, "pretrain"))
    rewarded = load_beside(path, study, "reward")
    length, prompts = rewarded["length"], study["test_prompts"]
    if prompt:
        ids = data.make_tokenizer(state["vocabulary"]).encode_ordinary(prompt)
        # Only the end of a long prompt is read, so that the sample fits the context.
        prompts = torch.tensor([ids[length - policy.config.block_size:]])
    generator = torch.Generator().manual_seed(seed)
    prompts = prompts[torch.randint(len(prompts), (num,), generator=generator)]
    tokens = generate(policy, prompts, length, temperature, top_k, generator)
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
    order, passages = random.Random(args.seed), []
    for path in args.rate:
        if path.name == "plays":
            speeches = data.load_corpus()[0].split(data.BOUNDARY)
            # Choose speeches about as long as samples.
            texts = [speech for speech in speeches if 100 < len(speech) < 400]
            order.shuffle(texts)
        else:
            texts = [row["text"] for row in draw(path, args.num, args.seed)]
        for text in texts[:args.num]:
            # A model can write any byte; a CSV file does not preserve these two.
            passages.append((re.sub("[\0\r]", " ", text), path.stem))
    order.shuffle(passages)
    return passages


def ask(question, low, high):
    """Ask the reader for a number from low to high until the answer is one."""
    while True:
        try:
            return data.parse_rating(input(question), low, high)
        except ValueError as error:
            print(error)
        except EOFError:                # Ctrl-D, or the end of a pipe
            raise KeyboardInterrupt from None


def rate(args):
    """Ask a reader to rate texts, resuming after those rated; ask sense only to compare sources."""
    passages = passages_to_rate(args)
    if not args.ratings.exists():
        data.write_file(args.ratings, HEADER)
    rated = [(row["text"], row["drawn_from"]) for row in read_ratings(args.ratings)]
    if rated != passages[:len(rated)]:
        raise data.UserError(f"{args.ratings} was begun with other --rate, --num or --seed. "
                             "Give those, or another file.")
    left = len(passages) - len(rated)
    print(f"{len(rated)} rated, {left} to go. Ctrl-C ends; the same command goes on.")
    for text, name in passages[len(rated):]:
        print(f"\n----- {left} to go\n{text}\n")
        feeling = ask("feeling, -2 very negative to 2 very positive: ", -2, 2)
        sense = ""
        if len(args.rate) > 1:
            sense = ask("sense, 1 (none) to 5 (all of it makes sense): ", 1, 5)
        # Append each row at once, so that no crash loses it.
        with open(args.ratings, "a", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([text, feeling, sense, name])
        left -= 1
    # Results are shown only at the end: a reader who resumes must still be blind.
    print(f"\nAll are rated. In numbers: python results/readers.py {args.ratings}")


# ---- the report ---------------------------------------------------------------------------

def column(rows, key):
    return [row.get(key) for row in rows]


def drift_figure():
    """A figure and its axis for scores against KL(pi to rho)."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    # Scores at first grow linearly with the square root of the KL (Gao 2022).
    axis.set_xscale("function", functions=(np.sqrt, np.square))
    axis.set(xlabel="KL(pi to rho), nats per completion (square-root scale)",
             ylabel="score, standard deviations of rho's")
    axis.margins(x=0)                   # a margin would reach below 0, which has no root
    return figure, axis


def curve(axis, x, y, style, name, color):
    """Draw a curve, labelled at its end."""
    axis.plot(x, y, style, color=color)
    axis.annotate(name, (x[-1], y[-1]), (4, 4), textcoords="offset points", color=color)


def draw_paths(axis, runs, x, y, style="-"):
    """Plot metric y against metric x of each run's iterations."""
    for i, run in enumerate(runs):
        axis.plot(column(run["history"], x), column(run["history"], y), f"C{i}{style}", lw=1,
                  label=f"{y}, beta {run['label']}")


def draw_frontier(runs, path):
    """Score against KL: PPO's paths, best of n, and the optimum, which no policy can exceed."""
    figure, axis = drift_figure()
    draw_paths(axis, runs, "ref_kl", "score")
    for i, run in enumerate(runs):
        curve(axis, [run["ref_kl"]], [run["score"]], "o", f"PPO, beta {run['label']}", f"C{i}")
        axis.plot(run["frontier"][0], run["frontier"][1], "k")
        best = run["optimum"]           # None if J* is not known: then no star is drawn
        axis.plot([best["ref_kl"]], [best["score"]], f"C{i}*", ms=14, mec="k", zorder=3)
    # All runs estimate the same curve; the longest is labelled.
    kl, scores, _ = max(column(runs, "frontier"), key=np.size)
    curve(axis, kl, scores, "-", "optimum", "k")
    _, scores, _, kl = zip(*run["best_of_n"])
    curve(axis, kl, scores, ".-", "best of n", "C7")
    figure.savefig(path)


def draw_judge(runs, path):
    """Scores by the reward model and by the judge, which is not optimised, against KL."""
    figure, axis = drift_figure()
    draw_paths(axis, runs, "ref_kl", "score")
    draw_paths(axis, runs, "ref_kl", "judge", "--")
    for run in runs:
        axis.plot(run["frontier"][0], run["frontier"][2], "k:")
    axis.set_title("dotted: the judge's score by selection alone")
    axis.legend()
    figure.savefig(path)


def draw_ppo(runs, path):
    """PPO's metrics against iteration; faint: the run of this name and size in results/runs."""
    keys = "objective score judge ref_kl policy_loss clipfrac explained_variance entropy exact_kl"
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(3, 3).flatten()
    for axis, key in zip(axes, keys.split()):
        axis.set(title=key, xlabel="iteration")
        draw_paths(axis, runs, "step", key)
        for i, run in enumerate(runs):
            axis.plot(column(run["old"], "step"), column(run["old"], key), f"C{i}", alpha=0.3)
    axes[0].legend()
    axes[0].set_title("objective J; dotted: J*")
    draw_paths(axes[0], runs, "step", "J*", ":")
    figure.savefig(path)


def load_runs(out, rho):
    """The finished PPO runs of a folder that were made with its rho.pt, with their results."""
    runs = []
    for path in sorted(out.glob("ppo_*.pt")):
        run = data.load_checkpoint(path)
        # An intermediate policy has no result.
        if "result" in run and run["inputs"]["rho"] == rho["key"]:
            run |= run["result"]
            run["name"] = path.stem
            run["label"] = path.stem.removeprefix("ppo_").replace("beta", "")
            log = data.HERE / "results/runs/{size}_{name}.metrics.jsonl".format_map(run)
            lines = log.read_text().splitlines() if log.exists() else []
            run["old"] = list(map(json.loads, lines))
            # The frontier begins at rho, with KL and scores 0.
            run["frontier"] = np.transpose([[0, 0, 0], *run["frontier"]])
            for row in run["history"]:
                row["J*"] = run["optimum"]["objective"]         # None if not known
            runs.append(run)
    if not runs:
        raise data.UserError(f"{out} has no finished PPO run. Run train.py --out {out} first.")
    return runs


def summarise(stages, runs):
    """The content of summary.json: a dict of numbers of every stage."""
    seconds = {name: state["seconds"] for name, state in stages.items()}
    seconds["total"] = sum(seconds.values()) + sum(column(runs, "seconds"))
    seconds["ppo"] = {run["label"]: run["seconds"] for run in runs}
    pretrained = stages["pretrain"]
    summary = {"size": pretrained["size"], "device": pretrained["inputs"]["device"],
               "seconds": seconds, "ppo": [],
               "pretrain": {key: pretrained[key] for key in ("parameters", "val_bits_per_byte")}}
    for name in ("reward", "judge"):
        # The metrics on passages, or on samples if the labels have no passages.
        measures = next(iter(stages[name]["report"].values()))
        summary[name] = {f"val_{key}": x for key, x in measures.items()}
        summary[name] |= stages["rho"]["scales"][name]["positive"]
    for run in runs:
        summary["ppo"].append({**run["result"],
                               "seconds_per_iteration": run["seconds"] / run["iterations"]})
    return summary


def result_tables(stages, runs):
    """Tables of the results of rho, each run and the reward models: lines of markdown."""
    lines = ["| beta | score | judge | P(positive) | KL | J | J* | ESS | fraction | KL to pi* |",
             "|---|---|---|---|---|---|---|---|---|---|",
             "| rho | 0 | 0 | | 0 | 0 | | | | |"]       # scores have mean 0 on rho's samples
    for run in runs:
        line = ("| {label} | {score:.2f} | {judge:.2f} | {positive:.2f} | {ref_kl:.2f} | "
                "{objective:.2f} ± {objective_se:.2f} | ")
        if run["fraction_of_optimum"] is None:
            line += "not known | {optimum[ess]:.0f} | | |"
        else:
            line += ("{optimum[objective]:.2f} ± {optimum[objective_se]:.2f} | {optimum[ess]:.0f} "
                     "| {fraction_of_optimum:.2f} ± {fraction_se:.2f} | {kl_to_optimum:.2f} |")
        lines.append(line.format_map(run))
    lines += [f"\n± a standard error; KL in nats; J* takes {ppo.MIN_ESS} effective samples (ESS); "
              "fraction: of the way from rho to J*; judge: the score by a model never optimised.\n",
              "| model | Pearson | AUC | calibration slope | log loss |", "|---|---|---|---|---|"]
    for name in ("reward", "judge"):
        for kind, measures in stages[name]["report"].items():
            line = " | {pearson:.3f} | {auc:.3f} | {slope:.2f} | {log_loss:.3f} |"
            lines.append(f"| {name}, held-out {kind}{line.format_map(measures)}")
    return lines


def before_and_after(run, before, after):
    """A sample of rho beside a sample of a run, and a line with the run's results: text."""
    text = f"\n{'before':52}  after\n"
    for left, right in itertools.zip_longest(before.split("\n"), after.split("\n"), fillvalue=""):
        text += f"{left[:52]:52}  {right}\n"
    line = "beta {label}: score {score:.2f}, KL {ref_kl:.2f} nats, J {objective:.2f}"
    if run["fraction_of_optimum"] is None:
        line += "; J* is not known from these samples"
    else:
        line += " of J* {optimum[objective]:.2f}: {fraction_of_optimum:.0%} of the way from rho"
    return text + line.format_map(run)


def report(out):
    """Write a study's figures/*.png, samples/*.txt, summary.json, report.md; print samples."""
    rho = data.load_checkpoint(out / "rho.pt", "rho")
    runs = load_runs(out, rho)
    stages = {"rho": rho}
    for name in ("data", "pretrain", "reward", "judge"):
        stages[name] = load_beside(out / "rho.pt", rho, name)
    summary = summarise(stages, runs)
    data.write_file(out / "summary.json", json.dumps(summary, indent=1))
    (out / "figures").mkdir(exist_ok=True)
    draw_frontier(runs, out / "figures/frontier.png")
    draw_judge(runs, out / "figures/judge.png")
    draw_ppo(runs, out / "figures/ppo.png")
    lines = ["# Size {size}: {pretrain[val_bits_per_byte]:.3f} bits per byte on held-out text\n"
             .format_map(summary), *result_tables(stages, runs), "\n![](figures/frontier.png)\n\n"
             "![](figures/judge.png)\n\n![](figures/ppo.png)\n"]
    first = {}
    for name in ["pretrain", *column(runs, "name")]:
        texts = [SAMPLE.format_map(row) for row in draw(out / f"{name}.pt", 20)]
        data.write_file(out / f"samples/{name}.txt", "\n".join(texts))
        first[name] = texts[0]
    for run in runs:
        text = before_and_after(run, first["pretrain"], first[run["name"]])
        lines += ["```", text, "```\n"]
        print(text)
    data.write_file(out / "report.md", "\n".join(lines))
    print(f"Figures, tables and samples: {out / 'report.md'}")


# ---- the command line ---------------------------------------------------------------------

def main():
    parser = data.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", default="out/pretrain.pt", type=Path, help="pretrain.pt or ppo_*.pt")
    add("--num", type=data.number(int, 1), default=20, help="samples per checkpoint (default 20)")
    add("--prompt", default="", help="text to continue (default: the run's test prompts)")
    add("--temperature", type=data.number(float, 0), default=1.0, help="below 1: likelier tokens")
    add("--top-k", type=data.number(int, 1), help="only the k likeliest tokens (default: all)")
    add("--seed", type=data.number(int, 0), default=0, help="seed of samples and rating order")
    add("--jsonl", action="store_true", help="print one JSON object per line")
    add("--rate", nargs="+", type=Path, default=[], metavar="CHECKPOINT",
        help="rate samples: several checkpoints blind; or one, or plays, for train.py --labels")
    add("--ratings", type=Path, default="ratings.csv", metavar="FILE.csv", help="where answers go")
    add("--report", type=Path, metavar="DIR", help="write a study's figures and tables again")
    args = parser.parse_args()
    if len({path.stem for path in args.rate}) < len(args.rate):
        parser.error("--rate tells checkpoints apart by their file names. Rename a copy")
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
