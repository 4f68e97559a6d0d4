"""Looking at what came of it: samples, blind ratings, figures and the report.

Skip this file on a first reading: it holds no RLHF.

    python sample.py                                            the pretrained model's samples
    python sample.py --checkpoint out/ppo_beta0.2.pt --num 20   a tuned model's, with Positive Prob
    python sample.py --rate out/pretrain.pt out/ppo_beta0.2.pt --ratings mine.csv     rate blind
    python sample.py --rate out/pretrain.pt --ratings mine.csv  label samples; or: --rate plays
    python sample.py --report out                               figures, report.md, summary.json

Positive Prob is P(positive) by the reward model beside the checkpoint; ref_kl is log pi - log rho
of the text, in nats: at temperature 1 its mean is KL(pi to rho).
"""

import csv
import io
import itertools
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure        # without pyplot no screen is needed

import data
import ppo
import reward
from gpt import cut_after, generate, load_gpt

COLUMNS = ["text", "rating", "sense", "drawn_from"]     # of a file of ratings
LENGTH = 64             # tokens of a sample, where no reward model says otherwise


# ---- samples ------------------------------------------------------------------------------

def load_beside(path, state, kind):
    """The checkpoint kind.pt in the folder of another, state at path; they must belong together."""
    beside = data.load_checkpoint(path.parent / f"{kind}.pt", kind)
    # The later stage has the key of the earlier one among its inputs.
    later, earlier = (beside, state) if state["kind"] == "pretrain" else (state, beside)
    if later["inputs"][earlier["kind"]] != earlier["key"]:
        raise data.UserError(f"{path} and {kind}.pt beside it are not of the same study. "
                             "Run train.py again.")
    return beside


@torch.no_grad()
def draw(path, num, seed=0, prompt="", temperature=1.0, top_k=None):
    """num samples of a checkpoint: dicts of text, positive (None if not known) and ref_kl."""
    state = given = data.load_checkpoint(path, "pretrain", "ppo")
    vocabulary, length, model = state["vocabulary"], LENGTH, None
    policy = ref = load_gpt(state)
    if state["kind"] == "ppo":
        ref = load_gpt(load_beside(path, state, "pretrain"))
    elif (path.parent / "rho.pt").exists():
        given = load_beside(path, state, "rho")         # the prompts that its policies are given
    if (path.parent / "reward.pt").exists():            # not after train.py --until pretrain
        rewarded = load_beside(path, state, "reward")
        length, model = rewarded["length"], reward.load_reward(rewarded)
    prompts = given.get("test_prompts")
    if prompt or prompts is None:
        ids = data.make_tokenizer(vocabulary).encode_ordinary(prompt or data.BOUNDARY)
        prompts = torch.tensor([ids])
    if prompts.size(1) + length > policy.config.block_size:
        raise data.UserError(f"--prompt and {length} tokens more do not fit the model's context. "
                             "Shorten it.")
    generator = torch.Generator().manual_seed(seed)
    prompts = prompts[torch.randint(len(prompts), (num,), generator=generator)]
    tokens = generate(policy, prompts, length, temperature, top_k, generator)
    completions = cut_after(tokens[:, prompts.size(1):], given.get("end"))
    log_ratio = ppo.log_ratios(policy, ref, prompts, completions).tolist()
    positive = [None] * num if model is None else model(completions).sigmoid().tolist()
    samples = []
    for row, p, kl in zip(torch.cat((prompts, completions), dim=1), positive, log_ratio):
        text = data.decode(vocabulary, row).removeprefix(data.BOUNDARY)
        samples.append({"text": text, "positive": p, "ref_kl": kl})
    return samples


def as_text(text, positive, ref_kl):
    """A sample as it is printed."""
    known = "unknown" if positive is None else f"{positive:.1%}"
    return f"{text}\n\nPositive Prob: {known}   log pi - log rho: {ref_kl:.1f} nats\n"


def print_samples(args):
    samples = draw(args.checkpoint, args.num, args.seed, args.prompt, args.temperature, args.top_k)
    for row in samples:
        if args.jsonl:
            print(json.dumps(row, ensure_ascii=False))
        else:
            print(f"-----\n{as_text(**row)}")


# ---- ratings ------------------------------------------------------------------------------

def read_ratings(path):
    """The rows of a file of ratings, dicts of COLUMNS; none if there is no file yet."""
    if not path.exists():
        return []
    reader = csv.DictReader(io.StringIO(data.read_text(path, "ratings")))
    rows, wrong = [], ValueError(f"the columns must be {', '.join(COLUMNS)}")
    try:
        if reader.fieldnames not in (None, COLUMNS):
            raise wrong
        for row in reader:
            if None in row or None in row.values():
                raise wrong
            data.parse_rating(row["rating"])
            data.parse_rating(row["sense"] or "1", 1, 5)        # a label for training has none
            rows.append(row)
    except (ValueError, csv.Error) as error:
        raise data.UserError(f"ratings {path}, line {reader.line_num}: {error}. "
                             "Correct it or choose another file.") from None
    return rows


def write_ratings(path, rows):
    """Write a file of ratings whole, so that a kill loses none that was given."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data.write_file(path, file.getvalue())


def passages_to_rate(args):
    """(text, drawn from) of all that --rate names, in an order that --seed decides."""
    todo = []
    for name in args.rate:
        if name == "plays":
            # Of the plays whole speeches, about as long as samples.
            speeches = data.load_corpus()[0].split(data.BOUNDARY)
            speeches = [speech for speech in speeches if 100 < len(speech) < 400]
            texts = random.Random(args.seed).sample(speeches, min(args.num, len(speeches)))
        else:
            texts = [row["text"].strip() for row in draw(Path(name), args.num, args.seed)]
        for text in texts:
            # A model can write any byte; these two do not come back from a file as they went in.
            todo.append((re.sub("[\0\r]", " ", text), Path(name).stem))
    random.Random(args.seed).shuffle(todo)
    return todo


def ask(question, low, high):
    """One answer from the terminal or a pipe: a number from low to high, "b" (back) or "q"."""
    while True:
        print(question, end=" ")
        # The end of a pipe is the end of the ratings.
        answer = (sys.stdin.readline() or "q").strip()
        if answer in ("b", "q"):
            return answer
        try:
            return data.parse_rating(answer, low, high)
        except ValueError as error:
            print(f"{error}; or b to go back, q to end")


def rate(args):
    """Show passages of checkpoints in a seeded order, take a reader's ratings; resume by count.

    Of several checkpoints: feeling and sense, blind. Of one: feeling alone, labels to train on.
    """
    blind = len(args.rate) > 1
    todo, done = passages_to_rate(args), read_ratings(args.ratings)
    rated = [(row["text"], row["drawn_from"]) for row in done]
    if rated != todo[:len(rated)]:
        raise data.UserError(f"{args.ratings} was begun with other --rate, --num or --seed. "
                             "Give those, or another file.")
    write_ratings(args.ratings, done)       # a file that cannot be written is told at once
    print(f"{len(done)} rated, {len(todo) - len(done)} to go. A number and Enter; b goes back, "
          "q ends.")
    while len(done) < len(todo):
        text, name = todo[len(done)]
        print(f"\n----- {len(todo) - len(done)} to go\n{text}\n")
        feeling, sense = ask("feeling, -2 very negative to 2 very positive:", -2, 2), ""
        if blind and feeling not in ("b", "q"):
            sense = ask("sense, 1 none to 5 all of it:", 1, 5)
        if "q" in (feeling, sense):
            break
        if "b" not in (feeling, sense):
            done.append(dict(zip(COLUMNS, (text, feeling, sense, name))))
        elif done:
            done.pop()
        write_ratings(args.ratings, done)
    print(f"\n{len(done)} ratings are in {args.ratings}; the same command goes on from here")
    # No means before the end: a reader who resumes should still be blind.
    if blind and len(done) == len(todo):
        print_means(done)


def print_means(rows):
    """Mean feeling and sense of what each checkpoint wrote, with standard errors."""
    lines = []
    for name in sorted({row["drawn_from"] for row in rows}, reverse=True):      # pretrain first
        chosen = [row for row in rows if row["drawn_from"] == name]
        feeling = ppo.mean_se(torch.tensor([float(row["rating"]) for row in chosen]))
        sense = ppo.mean_se(torch.tensor([float(row["sense"]) for row in chosen]))
        lines.append([name, len(chosen), feeling, sense])
    print(*table(["drawn from", "passages", "feeling, -2 to 2", "sense, 1 to 5"], lines), sep="\n")


# ---- tables and figures -------------------------------------------------------------------

def cell(x):
    """How a table shows a value; a pair is a mean and its standard error.

    >>> cell(0.12345), cell((0.5, 0.25)), cell(None)
    ('0.123', '0.50 ± 0.25', '')
    """
    if x is None or x == (None, None):
        return ""
    if isinstance(x, tuple):
        return "%.2f ± %.2f" % x
    # Adding 0.0 turns -0 into 0.
    return f"{round(x, 5) + 0.0:.3g}" if isinstance(x, float) else str(x)


def table(columns, rows):
    """A markdown table: lines of text."""
    lines = []
    for row in [columns, ["---"] * len(columns), *rows]:
        lines.append(f"| {' | '.join(map(cell, row))} |")
    return lines + [""]


def side_by_side(left, right, width=48):
    """Two texts in columns."""
    lines = []
    for one, two in itertools.zip_longest(left.split("\n"), right.split("\n"), fillvalue=""):
        lines.append(f"{one[:width]:{width}}  {two}".rstrip())
    return "\n".join(lines)


def label(run):
    """How figures and tables call a run: 0.2, or negative 0.2."""
    return f"{run['inputs']['toward']} {run['inputs']['beta']:g}".removeprefix("positive ")


def column(rows, key):
    return [row.get(key) for row in rows]


def save_figure(figure, path):
    """Write a figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    data.write_file(path, buffer.getvalue())


def drift_figure():
    """A figure and its one axis: scores against the drift from rho."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    # Against the root of the KL, scores at first grow in a straight line (Gao 2022).
    axis.set_xscale("function", functions=(np.sqrt, np.square))
    axis.set_xticks([0, *ppo.KL_MARKS])
    axis.set_xlabel("KL(pi to rho), nats per completion (square-root scale)")
    axis.set_ylabel("score, standard deviations of rho's")
    axis.margins(x=0)                   # below 0, where a margin would be, there is no root
    return figure, axis


def curve(axis, x, y, style, name, color):
    """Draw a curve and write its name where it ends."""
    axis.plot(x, y, style, color=color)
    axis.annotate(name, (x[-1], y[-1]), (4, 4), textcoords="offset points", color=color)


def draw_frontier(runs):
    """Score against drift: the paths of PPO, best of n, and the optimum that none can exceed."""
    figure, axis = drift_figure()
    for i, run in enumerate(runs):
        result, color = run["result"], f"C{i}"
        axis.plot(column(run["history"], "ref_kl"), column(run["history"], "score"), color, lw=0.7)
        curve(axis, [result["ref_kl"]], [result["score"]], "o", f"PPO, beta {label(run)}", color)
        best = result["optimum"]
        if best["objective"] is not None:
            axis.plot(best["ref_kl"], best["score"], "*", color=color, ms=14, mec="k", zorder=3)
    for run in runs:
        if run["result"]["frontier"]:
            kl, scores, _ = zip(*run["result"]["frontier"])
            curve(axis, kl, scores, "-", "optimum", "k")
    n, scores, _, kl = zip(*runs[0]["result"]["best_of_n"])
    curve(axis, kl, scores, ".-", f"best of 1 to {n[-1]}", "C7")
    return figure


def draw_judge(runs):
    """Score by the reward model and by the judge that was not optimised, against drift."""
    figure, axis = drift_figure()
    for i, run in enumerate(runs):
        kl = column(run["history"], "ref_kl")
        for key, style in (("score", "-"), ("judge", "--")):
            values = column(run["history"], key)
            curve(axis, kl, values, style, f"{key}, beta {label(run)}", f"C{i}")
        if run["result"]["frontier"]:
            kl, _, judge = zip(*run["result"]["frontier"])
            curve(axis, kl, judge, ":", "judge, by selection alone", "k")
    return figure


def draw_ppo(runs, reference):
    """What PPO logs, against iteration; faint, the committed run of the same name."""
    keys = ("objective", "score", "judge", "ref_kl", "policy_loss", "clipfrac",
            "explained_variance", "entropy", "positive")
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(3, 3).flatten()
    for axis, key in zip(axes, keys):
        axis.set_title(key)
        axis.set_xlabel("iteration")
        for i, run in enumerate(runs):
            old = reference.get(run["name"], [])
            axis.plot(column(old, "step"), column(old, key), f"C{i}", alpha=0.3)
            steps, values = column(run["history"], "step"), column(run["history"], key)
            axis.plot(steps, values, f"C{i}", label=f"beta {label(run)}")
    for i, run in enumerate(runs):
        best = run["result"]["optimum"]["objective"]
        if best is not None:
            axes[0].axhline(best, color=f"C{i}", linestyle=":")
    axes[0].set_title("objective J; dotted: J*")
    axes[0].legend()
    return figure


# ---- the report ---------------------------------------------------------------------------

def load_runs(out, rho):
    """The finished PPO runs of a folder that belong to rho.pt, by direction and beta."""
    runs = []
    for path in out.glob("ppo_*beta*.pt"):
        if "_kl" in path.name or ".partial" in path.name:
            continue
        run = data.load_checkpoint(path, "ppo")
        if run["inputs"]["rho"] == rho["key"]:
            run["name"] = path.stem
            runs.append(run)
        else:
            print(f"{path.name} is of another study and is left out")
    if not runs:
        raise data.UserError(f"{out} has no finished PPO run. Run train.py --out {out} first.")
    return sorted(runs, key=lambda run: (run["inputs"]["toward"], run["inputs"]["beta"]))


def summarise(stages, runs):
    """summary.json as a dict: plain numbers of every stage."""
    seconds = {name: state["seconds"] for name, state in stages.items()}
    total = sum(seconds.values()) + sum(column(runs, "seconds"))
    seconds["ppo"] = {label(run): run["seconds"] for run in runs}
    seconds["total"] = total
    pretrained = stages["pretrain"]
    summary = {"size": runs[0]["size"],
               "device": runs[0]["inputs"]["device"],
               "seconds": seconds,
               "pretrain": {"parameters": pretrained["parameters"],
                            "val_bits_per_byte": pretrained["val_bits_per_byte"]}}
    for name in ("reward", "judge"):
        report = stages[name]["report"]
        measures = report.get("passages") or report["samples"]
        summary[name] = {f"val_{key}": x for key, x in measures.items()}
        summary[name] |= stages["rho"]["scales"][name]["positive"]
        summary[name] |= {"labels": stages[name]["labels"], "report": report}
    summary["ppo"] = []
    for run in runs:
        seconds = run["seconds"] / len(run["history"])
        summary["ppo"].append({**run["result"], "seconds_per_iteration": seconds})
    return summary


def result_tables(stages, runs):
    """What rho and each run reached, best of n, the reward models: lines of markdown."""
    start = runs[0]["result"]["reference_objective"]
    rows = [["rho", start, 0.0, None, 0.0, start]]
    for run in runs:
        x = run["result"]
        best = x["optimum"]
        rows.append([label(run), x["score"], x["judge"], x["positive"], x["ref_kl"],
                     (x["objective"], x["objective_se"]),
                     (best["objective"], best["objective_se"]), best["ess"],
                     (x["fraction_of_optimum"], x["fraction_se"]), x["kl_to_optimum"]])
    lines = table(["beta", "score", "judge", "P(positive)", "ref_kl", "J", "J*", "ESS",
                   "fraction of optimum", "KL(pi to pi*)"], rows)
    lines.append("Measured on fresh samples, ± one standard error; KL in nats per completion. "
                 f"Where the effective sample size (ESS) is below {ppo.MIN_ESS}, J* is not quoted. "
                 "judge: the score by a second model, for which nothing was optimised.\n")
    rows = []
    for i, (n, best, se, kl) in enumerate(runs[0]["result"]["best_of_n"]):
        objectives = []
        for run in runs:            # each by its own scores: those toward negative are others
            own = run["result"]["best_of_n"][i][1]
            objectives.append(own - run["inputs"]["beta"] * kl)
        rows.append([n, (best, se), kl, *objectives])
    columns = [f"J at least, beta {label(run)}" for run in runs]
    lines += table(["best of n", "score", "KL at most", *columns], rows)
    rows = []
    for name in ("reward", "judge"):
        for kind, measures in stages[name]["report"].items():
            rows.append([f"{name}, held-out {kind}", *measures.values()])
    return lines + table(["model", *measures], rows)


def before_and_after(run, before, after):
    """A sample of rho beside one of a run, and the line that matters: text."""
    x = run["result"]
    line = f"beta {label(run)}: score {x['score']:.2f}, KL {x['ref_kl']:.2f} nats, J "
    line += f"{x['objective']:.2f}"
    if x["fraction_of_optimum"] is None:
        line += "; J* is not known from these samples"
    else:
        best = x["optimum"]["objective"]
        line += f" of J* {best:.2f}: {x['fraction_of_optimum']:.0%} of the way from rho"
    return side_by_side(f"before\n\n{before}", f"after\n\n{after}") + f"\n\n{line}\n"


def read_reference(size):
    """The metrics of the README's runs, {run's name: rows}, to compare a run of this size with."""
    reference = {}
    for path in (data.HERE / "results" / "runs").glob(f"{size}_*.metrics.jsonl"):
        name = path.name.removeprefix(f"{size}_").removesuffix(".metrics.jsonl")
        reference[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return reference


def report(out):
    """Write figures/*.png, samples/*.txt, summary.json, report.md of a study; print its end."""
    stages = {}
    for name in ("rho", "data", "pretrain", "reward", "judge"):
        stages[name] = data.load_checkpoint(out / f"{name}.pt", name)
    runs = load_runs(out, stages["rho"])
    summary = summarise(stages, runs)
    data.write_file(out / "summary.json", json.dumps(summary, indent=1))
    bits = summary["pretrain"]["val_bits_per_byte"]
    lines = [f"# Size {summary['size']}: {bits:.3f} bits per byte on held-out text\n"]
    lines += result_tables(stages, runs)
    figures = {"frontier": draw_frontier(runs),
               "judge": draw_judge(runs),
               "ppo": draw_ppo(runs, read_reference(summary["size"]))}
    for name, figure in figures.items():
        save_figure(figure, out / f"figures/{name}.png")
        lines.append(f"![{name}](figures/{name}.png)\n")
    samples = {}
    for name in ["pretrain", *column(runs, "name")]:
        samples[name] = [as_text(**row) for row in draw(out / f"{name}.pt", 20)]
        separator = f"\n{'-' * 60}\n\n"
        data.write_file(out / f"samples/{name}.txt", separator.join(samples[name]))
    for run in runs:
        text = before_and_after(run, samples["pretrain"][0], samples[run["name"]][0])
        lines.append(f"```\n{text}```\n")
        print(f"\n{text}")
    data.write_file(out / "report.md", "\n".join(lines))
    print(f"Figures, tables and samples: {out / 'report.md'}")


# ---- the command line ---------------------------------------------------------------------

def parse():
    count = data.number(int, 1)
    parser = data.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", default="out/pretrain.pt", type=Path,
        help="pretrain.pt or ppo_*.pt, in the folder that train.py wrote (default: rho's)")
    add("--num", type=count, default=20, help="how many samples, of each checkpoint (default 20)")
    add("--prompt", default="", help="text to continue (default: what the run was given)")
    add("--temperature", type=data.number(float, 0), default=1.0,
        help="below 1 plays safe, 0 always takes the likeliest token (default 1)")
    add("--top-k", type=count,
        help="draw from the k likeliest tokens only (unset: from all, as in training)")
    add("--seed", type=data.number(int, 0, 2**31), default=0,
        help="the same seed and --num give the same samples")
    add("--jsonl", action="store_true", help="one JSON object a line")
    add("--rate", nargs="+", metavar="CHECKPOINT",
        help="rate their samples: several shuffled and blind; one, or plays, for train.py --labels")
    add("--ratings", type=Path, metavar="FILE.csv", help="the file of your ratings")
    add("--report", type=Path, metavar="DIR", help="draw figures and tables of a study again")
    args = parser.parse_args()
    if args.rate and not args.ratings:
        parser.error("--rate needs a file to keep the ratings in: --ratings FILE.csv")
    if args.rate and len({Path(name).stem for name in args.rate}) < len(args.rate):
        parser.error("--rate tells checkpoints apart by their file names. Rename a copy")
    return args


def main():
    args = parse()
    if args.report:
        report(args.report)
    elif args.rate:
        rate(args)
    else:
        print_samples(args)


if __name__ == "__main__":
    data.run(main)
