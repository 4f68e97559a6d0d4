"""Looking at what came of it: samples, blind ratings, figures and the report.

Skip this file on a first reading: it holds no RLHF. Positive Prob is P(positive) by the reward
model beside the checkpoint; ref_kl is log pi - log rho of the text, in nats: at temperature 1 its
mean is KL(pi to rho).

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
from matplotlib.figure import Figure        # without pyplot no screen is needed

import data
import ppo
import reward
from gpt import cut_after, generate, load_gpt

SAMPLE = "-----\n{text}\n\nPositive Prob: {positive:.1%}   log pi - log rho: {ref_kl:.1f} nats\n"
HEADER = "text,rating,sense,drawn_from\n"       # of a file of ratings


# ---- samples ------------------------------------------------------------------------------

def load_beside(path, state, kind):
    """The checkpoint kind.pt in the folder of path. state must have been made from it."""
    beside = data.load_checkpoint(path.parent / f"{kind}.pt", kind)
    if beside["key"] != state["inputs"][kind]:
        raise data.UserError(f"{kind}.pt beside {path} is of another study. Run train.py again.")
    return beside


@torch.no_grad()
def draw(path, num, seed=0, prompt="", temperature=1.0, top_k=None):
    """num samples of a checkpoint: dicts of text, positive and ref_kl."""
    state = study = data.load_checkpoint(path, "pretrain", "ppo")
    if state["kind"] == "pretrain":
        # It is given the prompts that its policies are given.
        study = data.load_checkpoint(path.parent / "rho.pt", "rho")
    policy = load_gpt(state)
    ref = load_gpt(load_beside(path, study, "pretrain"))
    rewarded = load_beside(path, study, "reward")
    length, prompts = rewarded["length"], study["test_prompts"]
    if prompt:
        ids = data.make_tokenizer(state["vocabulary"]).encode_ordinary(prompt)
        # Of a long prompt the end is read, so that the sample fits into the context.
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
    """The rows of a file of ratings: dicts of text, rating, sense and drawn_from."""
    text = data.read_text(path, "ratings")
    if not text.startswith(HEADER):
        raise data.UserError(f"{path} does not begin with {HEADER}. Choose another file.")
    return csv.DictReader(io.StringIO(text))


def passages_to_rate(args):
    """(text, drawn from) of all that --rate names, in an order that --seed decides."""
    order, passages = random.Random(args.seed), []
    for path in args.rate:
        if path.name == "plays":
            speeches = data.load_corpus()[0].split(data.BOUNDARY)
            # About as long as samples.
            texts = [speech for speech in speeches if 100 < len(speech) < 400]
            order.shuffle(texts)
        else:
            texts = [row["text"] for row in draw(path, args.num, args.seed)]
        for text in texts[:args.num]:
            # A model can write any byte; these two do not come back from a file as they went in.
            passages.append((re.sub("[\0\r]", " ", text), path.stem))
    order.shuffle(passages)
    return passages


def ask(question, low, high):
    """A reader's number from low to high; asks until it is one."""
    while True:
        try:
            return data.parse_rating(input(question), low, high)
        except ValueError as error:
            print(error)
        except EOFError:                # Ctrl-D, or the end of a pipe
            raise KeyboardInterrupt from None


def rate(args):
    """Ask a reader for ratings; resume by count. Of one checkpoint, labels: only the feeling."""
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
        sense = ask("sense, 1 none to 5 all of it: ", 1, 5) if len(args.rate) > 1 else ""
        # Whatever happens later, this row is on the disk.
        with open(args.ratings, "a", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([text, feeling, sense, name])
        left -= 1
    # Not before the end: a reader who resumes should still be blind.
    print(f"\nAll are rated. In numbers: python results/readers.py {args.ratings}")


# ---- the report ---------------------------------------------------------------------------

def column(rows, key):
    return [row.get(key) for row in rows]


def drift_figure():
    """A figure and its one axis: scores against the drift from rho."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    # Against the root of the KL, scores at first grow in a straight line (Gao 2022).
    axis.set_xscale("function", functions=(np.sqrt, np.square))
    axis.set(xlabel="KL(pi to rho), nats per completion (square-root scale)",
             ylabel="score, standard deviations of rho's")
    axis.margins(x=0)                   # below 0, where a margin would be, there is no root
    return figure, axis


def curve(axis, x, y, style, name, color):
    """Draw a curve and write its name where it ends."""
    axis.plot(x, y, style, color=color)
    axis.annotate(name, (x[-1], y[-1]), (4, 4), textcoords="offset points", color=color)


def draw_paths(axis, runs, x, y, style="-"):
    """Two metrics of each run, iteration after iteration."""
    for i, run in enumerate(runs):
        axis.plot(column(run["history"], x), column(run["history"], y), f"C{i}{style}", lw=1,
                  label=f"{y}, beta {run['label']}")


def draw_frontier(runs, path):
    """Score against drift: the paths of PPO, best of n, and the optimum that none can exceed."""
    figure, axis = drift_figure()
    draw_paths(axis, runs, "ref_kl", "score")
    for i, run in enumerate(runs):
        curve(axis, [run["ref_kl"]], [run["score"]], "o", f"PPO, beta {run['label']}", f"C{i}")
        axis.plot(run["frontier"][0], run["frontier"][1], "k")
        best = run["optimum"]           # where J* is not known, None: no star is drawn
        axis.plot([best["ref_kl"]], [best["score"]], f"C{i}*", ms=14, mec="k", zorder=3)
    # All estimate the same curve. The name stands at the end of the longest.
    kl, scores, _ = max(column(runs, "frontier"), key=np.size)
    curve(axis, kl, scores, "-", "optimum", "k")
    _, scores, _, kl = zip(*run["best_of_n"])
    curve(axis, kl, scores, ".-", "best of n", "C7")
    figure.savefig(path)


def draw_judge(runs, path):
    """Score by the reward model and by the judge that was not optimised, against drift."""
    figure, axis = drift_figure()
    draw_paths(axis, runs, "ref_kl", "score")
    draw_paths(axis, runs, "ref_kl", "judge", "--")
    for run in runs:
        axis.plot(run["frontier"][0], run["frontier"][2], "k:")
    axis.set_title("dotted: the judge's score by selection alone")
    axis.legend()
    figure.savefig(path)


def draw_ppo(runs, path):
    """What PPO logs, against iteration; faint, the committed run of the same name and size."""
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
    """The finished PPO runs of a folder that belong to rho.pt, with their results."""
    runs = []
    for path in sorted(out.glob("ppo_*.pt")):
        run = data.load_checkpoint(path)
        # A policy kept on the way has no result.
        if "result" in run and run["inputs"]["rho"] == rho["key"]:
            run |= run["result"]
            run["name"] = path.stem
            run["label"] = path.stem.removeprefix("ppo_").replace("beta", "")
            log = data.HERE / "results/runs/{size}_{name}.metrics.jsonl".format_map(run)
            lines = log.read_text().splitlines() if log.exists() else []
            run["old"] = list(map(json.loads, lines))
            # It begins at rho.
            run["frontier"] = np.transpose([[0, 0, 0], *run["frontier"]])
            for row in run["history"]:
                row["J*"] = run["optimum"]["objective"]         # None, if not known
            runs.append(run)
    if not runs:
        raise data.UserError(f"{out} has no finished PPO run. Run train.py --out {out} first.")
    return runs


def summarise(stages, runs):
    """summary.json as a dict: plain numbers of every stage."""
    seconds = {name: state["seconds"] for name, state in stages.items()}
    seconds["total"] = sum(seconds.values()) + sum(column(runs, "seconds"))
    seconds["ppo"] = {run["label"]: run["seconds"] for run in runs}
    pretrained = stages["pretrain"]
    summary = {"size": pretrained["size"], "device": pretrained["inputs"]["device"],
               "seconds": seconds, "ppo": [],
               "pretrain": {key: pretrained[key] for key in ("parameters", "val_bits_per_byte")}}
    for name in ("reward", "judge"):
        # On passages; where the labels have none, on samples.
        measures = next(iter(stages[name]["report"].values()))
        summary[name] = {f"val_{key}": x for key, x in measures.items()}
        summary[name] |= stages["rho"]["scales"][name]["positive"]
    for run in runs:
        summary["ppo"].append({**run["result"],
                               "seconds_per_iteration": run["seconds"] / run["iterations"]})
    return summary


def result_tables(stages, runs):
    """What rho and each run reached, and the reward models: lines of markdown."""
    lines = ["| beta | score | judge | P(positive) | KL | J | J* | ESS | fraction | KL to pi* |",
             "|---|---|---|---|---|---|---|---|---|---|",
             "| rho | 0 | 0 | | 0 | 0 |"]           # its mean is what scores are measured from
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
    """A sample of rho beside one of a run, and the line that matters: text."""
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
    """Write figures/*.png, samples/*.txt, summary.json, report.md of a study; print its end."""
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
    add("--checkpoint", default="out/pretrain.pt", type=Path, help="pretrain.pt or a ppo_*.pt")
    add("--num", type=data.number(int, 1), default=20, help="samples of each (default 20)")
    add("--prompt", default="", help="text to continue (default: what the run was given)")
    add("--temperature", type=data.number(float, 0), default=1.0, help="below 1: safer")
    add("--top-k", type=data.number(int, 1), help="only the k likeliest tokens (default: all)")
    add("--seed", type=data.number(int, 0), default=0, help="decides the samples, and their order")
    add("--jsonl", action="store_true", help="one JSON object a line")
    add("--rate", nargs="+", type=Path, default=[], metavar="CHECKPOINT",
        help="rate their samples: several shuffled and blind; one, or plays, for train.py --labels")
    add("--ratings", type=Path, default="ratings.csv", metavar="FILE.csv", help="your answers")
    add("--report", type=Path, metavar="DIR", help="draw figures and tables of a study again")
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
