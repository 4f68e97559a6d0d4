"""Looking at what came of it: samples, blind ratings, figures and the report.

The last file of the reader's path.

    python sample.py                                            the pretrained model's samples
    python sample.py --checkpoint out/ppo_beta0.2.pt --num 20   a tuned model's, with Positive Prob
    python sample.py --checkpoint out/ppo_beta0.2.pt --kl 4     where its drift passed 4 nats
    python sample.py --checkpoint out/ppo_beta0.2.pt --compare  rho, positive and negative together
    python sample.py --rate out/pretrain.pt out/ppo_beta0.2.pt --ratings mine.csv     rate blind
    python sample.py --rate out/pretrain.pt --ratings mine.csv  label samples; or: --rate plays
    python sample.py --ratings mine.csv yours.csv               what two readers found
    python sample.py --report out                               figures, report.md, summary.json

Positive Prob is what the reward model beside the checkpoint says of what was written; ref_kl is
log pi - log rho of it, in nats: at temperature 1 its mean is KL(pi to rho).
"""

import csv
import io
import itertools
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure        # without pyplot no screen is needed

import data
import ppo
import reward
import train
from gpt import cut_after, generate, in_chunks, load_gpt

COLUMNS = ["text", "rating", "sense", "drawn_from"]     # of a file of ratings
# What is said of a passage, from least to most.
MEASURES = {"readers' feeling": (-2, 2), "readers' sense": (1, 5), "P(positive)": (0, 1),
            "the judge's P(positive)": (0, 1)}


# ---- samples ------------------------------------------------------------------------------

def load_beside(path, state, kind):
    """The checkpoint kind.pt in the folder of another, state at path.

    UserError unless they belong together: two studies may lie in one folder.
    """
    found = data.load_checkpoint(path.parent / f"{kind}.pt", kind)
    # The later stage has the digest of the earlier one's model among its inputs.
    later, earlier = (found, state) if state["kind"] == "pretrain" else (state, found)
    if later["inputs"][earlier["kind"]] != train.state_digest(earlier):
        raise data.UserError(f"{path} and {kind}.pt beside it are not of the same study. "
                             "Run train.py again.")
    return found


@torch.no_grad()
def draw(path, args, num):
    """num samples of a checkpoint, as describe() has them."""
    folder = path.parent
    state = given = data.load_checkpoint(path, "pretrain", "ppo")
    tokenizer = data.load_tokenizer(folder / "tokenizer.tiktoken", state)
    policy = ref = load_gpt(state)
    if state["kind"] == "ppo":
        ref = load_gpt(load_beside(path, state, "pretrain"))
    elif (folder / "rho.pt").exists():
        # rho is given what its runs are, so that they can be compared.
        given = load_beside(path, state, "rho")
    prompts = given.get("prompts")
    if args.prompt or prompts is None:
        prompts = torch.tensor([tokenizer.encode_ordinary(args.prompt or data.BOUNDARY)])
    length = given["inputs"].get("length", ppo.PPOConfig.length)
    if prompts.size(1) + length > policy.config.block_size:
        raise data.UserError(f"--prompt and {length} tokens more do not fit the model's context. "
                             "Shorten it.")
    generator = torch.Generator().manual_seed(args.seed)
    prompts = prompts[torch.randint(len(prompts), (num,), generator=generator)]
    tokens = generate(policy, prompts, length, args.temperature, args.top_k, generator)
    completions = cut_after(tokens[:, prompts.size(1):], given.get("end"))
    log_ratio = train.measure_drift(policy, ref, prompts, completions)["log_ratio"]
    log_odds = None
    # After train.py --until pretrain there is no reward model yet.
    if (folder / "reward.pt").exists():
        model = reward.load_reward(load_beside(path, state, "reward"))
        log_odds = in_chunks(model, completions)
    return describe(tokenizer, prompts, completions, log_odds, log_ratio)


def describe(tokenizer, prompts, completions, log_odds, log_ratio):
    """Samples as dicts: the text, positive or None if not known, ref_kl = log pi - log rho.

    prompts (N,T0), completions (N,T), log_odds (N,) or None, log_ratio (N,). The blank line before
    a text is left out.
    """
    rows = torch.cat((prompts, completions), dim=1).tolist()
    texts = [data.decode(tokenizer, row).removeprefix(data.BOUNDARY) for row in rows]
    positive = [None] * len(rows) if log_odds is None else log_odds.sigmoid().tolist()
    return [{"text": text, "positive": p, "ref_kl": kl}
            for text, p, kl in zip(texts, positive, log_ratio.tolist())]


def as_text(text, positive, ref_kl):
    """A sample as it is printed: its text, and below it what is known of it."""
    known = "unknown" if positive is None else f"{positive:.1%}"
    return f"{text}\n\nPositive Prob: {known}   log pi - log rho: {ref_kl:.1f} nats\n"


def at_kl(path, mark):
    """The file of the policy that the run of a checkpoint kept when its drift passed a mark."""
    return path.parent / f"{path.stem}_kl{mark:g}.pt"


def print_samples(args):
    """Samples of one checkpoint; with --compare those of rho and of the twins, turn by turn."""
    path = at_kl(args.checkpoint, args.kl) if args.kl else args.checkpoint
    if args.kl and not path.exists():
        raise data.UserError(f"{args.checkpoint} kept no policy at {args.kl:g} nats: there is no "
                             f"{path}. Choose a mark that its drift has passed.")
    paths = [path]
    if args.compare:
        beta = path.stem.split("beta")[-1]
        # In this order negative comes last.
        twins = sorted(path.parent.glob(f"ppo_*beta{beta}.pt"))
        if not twins:
            raise data.UserError("--compare needs the --checkpoint of a policy, ppo_*.pt.")
        paths = [path.parent / "pretrain.pt", *twins]
    for turn in zip(*[draw(path, args, args.num) for path in paths]):
        for path, sample in zip(paths, turn):
            if not args.jsonl:
                print(f"----- {path.stem}\n{as_text(**sample)}")
                continue
            if args.compare:
                sample["model"] = path.stem
            print(json.dumps(sample, ensure_ascii=False))


# ---- ratings ------------------------------------------------------------------------------

def read_ratings(path):
    """The rows of a file of ratings, dicts of COLUMNS: rating a float, sense one or ""."""
    reader = csv.DictReader(io.StringIO(data.read_text(path, "ratings")))
    rows = []
    try:
        # An empty file has no names of columns.
        if reader.fieldnames not in (COLUMNS, None):
            raise ValueError(f"the columns must be {', '.join(COLUMNS)}")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError("the row has not as many fields as there are columns")
            row["rating"] = data.parse_rating(row["rating"])
            # A label for training has none.
            if row["sense"]:
                row["sense"] = data.parse_rating(row["sense"], 1, 5)
            rows.append(row)
    except (ValueError, csv.Error) as error:
        raise data.UserError(f"ratings {path}, line {reader.line_num}: {error}. "
                             "Correct it or choose another file.") from None
    return rows


def write_ratings(path, rows):
    """Write a file of ratings whole, so that no kill loses one that was given."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data.write_file(path, file.getvalue())


def passages_to_rate(args):
    """Passages of all that --rate names, shuffled: dicts of text and drawn_from."""
    passages = []
    if len({Path(name).stem for name in args.rate}) < len(args.rate):
        raise data.UserError("--rate tells checkpoints apart by their file names. Rename a copy.")
    generator = random.Random(args.seed)
    for name in args.rate:
        if name == "plays":
            # Of the plays whole speeches, about as long as samples.
            speeches = data.load_corpus()[0].split(data.BOUNDARY)
            speeches = [speech for speech in speeches if 100 < len(speech) < 400]
            generator.shuffle(speeches)
            texts = speeches[:args.num]
        else:
            texts = [sample["text"].strip() for sample in draw(Path(name), args, args.num)]
        passages += [{"text": text, "drawn_from": Path(name).stem} for text in texts]
    # The same order every time, so that a reader can stop and go on.
    generator.shuffle(passages)
    return passages


def ask(question, low, high):
    """One answer from the terminal or a pipe: a number from low to high, "b" (back) or "q"."""
    while True:
        print(question, end=" ", flush=True)
        # The end of a pipe is the end of the ratings.
        answer = (sys.stdin.readline() or "q").strip()
        if answer in ("b", "q"):
            return answer
        try:
            return data.parse_rating(answer, low, high)
        except ValueError as error:
            print(f"{error}; or b to go back, q to end")


def rate(args):
    """Show passages of checkpoints in random order, take a reader's ratings; go on where it was.

    Of several checkpoints: feeling and sense, blind. Of one: feeling alone, labels to train on.
    """
    path = args.ratings[0]
    blind = len(args.rate) > 1
    rows = read_ratings(path) if path.exists() else []
    # By text and model, for two models that are close may have written the same.
    done = {(row["text"], row["drawn_from"]) for row in rows}
    left = [row for row in passages_to_rate(args) if (row["text"], row["drawn_from"]) not in done]
    # A file that cannot be written is told before the first rating.
    write_ratings(path, rows)
    print(f"{len(rows)} rated, {len(left)} to go. A number and Enter; b goes back, q ends.")
    while left:
        print(f"\n----- {len(left)} to go\n{left[0]['text']}\n")
        feeling = ask("feeling, -2 very negative to 2 very positive:", -2, 2)
        sense = ""
        if blind and feeling not in ("b", "q"):
            sense = ask("sense, 1 none to 5 all of it:", 1, 5)
        if "q" in (feeling, sense):
            break
        if "b" not in (feeling, sense):
            rows.append({**left.pop(0), "rating": feeling, "sense": sense})
        elif rows:
            left.insert(0, rows.pop())
        write_ratings(path, rows)
    print(f"\n{len(rows)} ratings are in {path}; the same command goes on from here")
    # No means before the end: whoever goes on should still be blind.
    if blind and not left:
        print_ratings(args)


# ---- what ratings say ---------------------------------------------------------------------

def mean_se(values):
    """(mean, standard error) of those of values (N,) that are known; NaN where they are too few."""
    x = values[~values.isnan()].double()
    # Of one value or none this is 0 / 0.
    variance = (x - x.mean()).square().sum() / (len(x) * (len(x) - 1))
    return x.mean().item(), variance.sqrt().item()


def permutation_interval(a, b):
    """How far apart the means of a (N,) and b (M,) are by chance: the 95 % quantile.

    All values are dealt into two heaps of these sizes at random, many times. A difference
    within this distance from 0 is none that was shown.
    """
    values = torch.cat((a, b)).double()
    generator = torch.Generator().manual_seed(0)
    # Each row of argsort is a random order of all values.
    order = torch.rand(10_000, len(values), generator=generator).argsort(1)
    one, two = values[order].split([len(a), len(b)], dim=1)
    return (one.mean(1) - two.mean(1)).abs().quantile(0.95).item()


def pearson(a, b):
    """The correlation of a (N,) and b (N,)."""
    return torch.corrcoef(torch.stack((a, b)))[0, 1].item()


def quadratic_kappa(a, b):
    """Agreement of two readers' ratings (N,) beyond chance, 1 if perfect (Cohen 1968)."""
    # What the mean squared difference would be if the readers knew nothing of each other.
    expected = (a[:, None] - b).square().mean()
    kappa = 1 - (a - b).square().mean() / expected
    # 0 / 0: both always say the same one thing, so they agree.
    return kappa.nan_to_num(1.0).item()


def positive_of(folder, kind, texts):
    """P(positive) (N,) of texts by a model of a study, "reward" or "judge"; NaN if it has none."""
    path = folder / f"{kind}.pt"
    if not path.exists():
        return torch.full((len(texts),), math.nan)
    state = data.load_checkpoint(path, kind)
    tokenizer = data.load_tokenizer(folder / "tokenizer.tiktoken", state)
    tokens = reward.pad([tokenizer.encode_ordinary(text) for text in texts], state["length"])
    return in_chunks(reward.load_reward(state), tokens).sigmoid()


def read_passages(paths, folder):
    """What readers and models say of the passages in files of ratings: {drawn from: (N,4)}.

    The columns are MEASURES; NaN is what nobody said. A passage that several have read counts
    once, by the mean: readers who agree are not independent.
    """
    ratings = {}
    for row in itertools.chain(*map(read_ratings, paths)):
        said = ratings.setdefault((row["drawn_from"], row["text"]), [])
        said.append((row["rating"], float(row["sense"] or "nan")))
    if not ratings:
        raise data.UserError("these files of ratings are empty. Rate something first: --rate.")
    names, texts = zip(*ratings)
    means = torch.stack([torch.tensor(said).nanmean(0) for said in ratings.values()])
    models = [positive_of(folder, kind, texts) for kind in ("reward", "judge")]
    values = torch.column_stack((means, *models))
    # In this order pretrain, which is rho, comes first.
    return {name: values[[other == name for other in names]]
            for name in sorted(set(names), reverse=True)}


def print_ratings(args):
    """What one or two files of ratings say of each model, and how far two readers agree."""
    # Beside the samples are the models that judge them.
    rated = [Path(name) for name in args.rate or [] if name != "plays"]
    folder = [*rated, args.checkpoint][0].parent
    found = read_passages(args.ratings, folder)
    rho = found.get("pretrain", torch.empty(0, 4))[:, 0]
    lines = []
    for name, values in found.items():
        feeling = values[:, 0]
        gap = (feeling.mean() - rho.mean()).item()
        lines.append([name, len(values), *map(mean_se, values.T[:3]),
                      (gap, permutation_interval(feeling, rho))])
    print(*table(["drawn from", "passages", "feeling, -2 to 2", "sense, 1 to 5", "P(positive)",
                  "feeling less rho's ± chance, 95 %"], lines), sep="\n")
    feeling, _, positive, _ = torch.cat(list(found.values())).T
    if len(feeling) > 1 and not positive.isnan().any():
        print(f"feeling and P(positive) correlate {pearson(feeling, positive):.2f}")
    if len(args.ratings) == 2:
        one, two = map(read_ratings, args.ratings)
        # By text and model, for two models that are close may have written the same.
        other = {(row["text"], row["drawn_from"]): row["rating"] for row in two}
        both = []
        for row in one:
            key = (row["text"], row["drawn_from"])
            if key in other:
                both.append((row["rating"], other[key]))
        if len(both) > 1:
            a, b = torch.tensor(both).T
            print(f"two readers of {len(both)} passages: quadratic kappa "
                  f"{quadratic_kappa(a, b):.2f}, Pearson {pearson(a, b):.2f}")


def cell(x):
    """How a table shows a value; a pair is a mean and its standard error.

    >>> cell(0.12345), cell((0.5, 0.25)), cell(None)
    ('0.123', '0.50 ± 0.25', '')
    """
    if isinstance(x, tuple):
        return cell(x[0]) and "%.2f ± %.2f" % x
    # NaN, the mean of nothing, is the one value that differs from itself.
    if x is None or x != x:
        return ""
    return f"{round(x, 5):.3g}" if isinstance(x, float) else str(x)


def table(columns, rows):
    """A markdown table: lines of text."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(map(cell, line))} |" for line in lines] + [""]


# ---- the summary --------------------------------------------------------------------------

def load_study(out):
    """(pretrained, rewarded, judged, rho, runs) of a folder; runs of these samples of rho only."""
    rho = data.load_checkpoint(out / "rho.pt", "rho")
    kinds = ("pretrain", "reward", "judge")
    stages = [load_beside(out / "rho.pt", rho, kind) for kind in kinds]
    wanted = {"rho": train.state_digest(rho), **{kind: rho["inputs"][kind] for kind in kinds}}
    runs = []
    for path in out.glob("ppo_*beta*.pt"):
        # What a run kept on its way is not its end.
        if "_kl" in path.name or ".partial" in path.name:
            continue
        run = data.load_checkpoint(path, "ppo")
        if wanted.items() <= run["inputs"].items():
            runs.append({**run, "name": path.stem})
        else:
            print(f"{path.name} is of another task, reward model or judge and is left out")
    if not runs:
        raise data.UserError(f"{out} has no finished PPO run. Run train.py first.")
    runs.sort(key=lambda run: (run["toward"], run["inputs"]["beta"]))
    return *stages, rho, runs


def label(run):
    """How figures and tables call a run: 0.2, or negative 0.2."""
    return f"{run['toward']} {run['inputs']['beta']:g}".removeprefix("positive ")


def pool(rho, run):
    """Scores (P,N) of rho's and a run's fresh samples, and their log(rho/q), q the mixture."""
    fresh = run["fresh"]
    log_odds = torch.cat((rho["log_odds"]["reward"], fresh["log_odds"]))
    # log pi - log rho of every sample: rho's own row is 0, for only the ratio matters.
    ratio = torch.cat((run["rho_log_ratio"], fresh["log_ratio"]))
    counts = [len(run["rho_log_ratio"]), len(fresh["log_ratio"])]
    weights = ppo.mixture_log_weights(torch.stack((0 * ratio, ratio)), counts)
    scores = train.scores_of(rho, log_odds, run["toward"])
    # A row for each prompt: first rho's samples of it, then the run's.
    return [torch.cat([part.view(len(rho["prompts"]), -1) for part in x.split(counts)], dim=1)
            for x in (scores, weights)]


def summarise_optimum(rho, run):
    """ppo.optimum at the beta of a run, and what J* is at_least; NaN where it is not known."""
    unknown = dict.fromkeys(("objective", "score", "ref_kl", "objective_se"), math.nan)
    # Without a penalty no policy is the best.
    if run["beta"] == 0:
        return {**unknown, "ess": 0.0, "at_least": math.nan}
    scores, weights = pool(rho, run)
    best = ppo.optimum(scores, run["beta"], weights)
    # Too few effective samples: no number, for it would be far too low.
    if best["ess"] < ppo.MIN_ESS:
        best.update(unknown)
    best["at_least"] = ppo.optimum_bound(scores, run["beta"], weights)
    return best


def summarise_run(rho, run):
    """The entry of a run in summary.json: what its fresh samples say, beside the optimum."""
    fresh, toward, beta = run["fresh"], run["toward"], run["beta"]
    scores = train.scores_of(rho, fresh["log_odds"], toward)
    # Not the exact KL, as right on average: near pi* score - beta log_ratio hardly varies (at pi*
    # it is the constant beta log Z), so this standard error is half as large.
    objective, se = mean_se(scores - beta * fresh["log_ratio"])
    start = train.rho_scores(rho, toward).mean().item()
    best = summarise_optimum(rho, run)
    gain = objective - start
    way = best["objective"] - start
    iterations = len(run["history"])
    return {"beta": beta,
            "toward": toward,
            "iterations": iterations,
            "score": scores.mean().item(),
            "judge": train.scores_of(rho, fresh["judge"], toward, "judge").mean().item(),
            "positive": fresh["log_odds"].sigmoid().mean().item(),
            "ref_kl": fresh["exact_kl"].mean().item(),
            "objective": objective,
            "objective_se": se,
            "reference_objective": start,
            "optimum": best,
            "fraction_of_optimum": gain / way,
            "fraction_se": math.hypot(se, gain / way * best["objective_se"]) / way,
            # No policy is above J*: it is at least J as well.
            "fraction_at_most": gain / (max(best["at_least"], objective) - start),
            "kl_to_optimum": (best["objective"] - objective) / (beta or math.nan),
            "seconds_per_iteration": run["seconds"] / iterations}


def summarise_reward(state, rho):
    """The entry of a reward model in summary.json."""
    report, name = state["report"], state["kind"]
    reached = report.get("passages") or report["samples"]
    return {"labels": state["labels"],
            **rho["constants"][name]["positive"],
            **{f"val_{key}": reached[key] for key in ("pearson", "auc", "log_loss")},
            "report": report,
            "reference_positive": rho["log_odds"][name].sigmoid().mean().item()}


def summarise(out, study):
    """summary.json of what load_study has read, as a dict."""
    *stages, runs = study
    pretrained, rewarded, judged, rho = stages
    stages.insert(0, data.load_checkpoint(out / "data.pt", "data"))
    seconds = {state["kind"]: state["seconds"] for state in stages}
    ppo_seconds = {label(run): run["seconds"] for run in runs}
    total = sum(seconds.values()) + sum(ppo_seconds.values())
    summary = {"size": pretrained["args"]["size"],
               "device": pretrained["args"]["device"],
               "seconds": {**seconds, "ppo": ppo_seconds, "total": total},
               "reward": summarise_reward(rewarded, rho),
               "judge": summarise_reward(judged, rho),
               "pretrain": {key: pretrained[key] for key in ("parameters", "val_bits_per_byte")},
               "ppo": [summarise_run(rho, run) for run in runs]}
    # JSON knows no NaN: what is not known is null there, None here.
    return json.loads(json.dumps(summary), parse_constant=lambda name: None)


# ---- figures ------------------------------------------------------------------------------

def save_figure(figure, path):
    """Write a figure as a PNG; its folder is made if need be."""
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    data.write_file(path, buffer.getvalue())


def points(rows, x, y):
    """What rows have at x and at y: two lists, to plot. Where there is None nothing is drawn."""
    return [row[x] for row in rows], [row.get(y) for row in rows]


def drift_figure(title, ylabel, runs=()):
    """A figure and its one axis, along which policies drift away from rho: the scores of runs."""
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axis = figure.subplots()
    # Along the root of the KL scores at first grow in a straight line (Gao 2022).
    axis.set_xscale("function", functions=(np.sqrt, np.square))
    axis.set(title=title, ylabel=ylabel, xticks=[0, *train.KL_MARKS],
             xlabel="KL to rho in nats per completion, its root to scale")
    # Below 0, where a margin would be, there is no root.
    axis.margins(x=0)
    for i, run in enumerate(runs):
        axis.plot(*points(run["history"], "exact_kl", "score"), f"C{i}.-",
                  label=f"beta {label(run)}")
    return figure, axis


def draw_frontier(rho, runs, summary):
    """Score against drift: the paths of PPO, best-of-n, and what no policy can be above."""
    figure, axis = drift_figure("Circle: where a run ended; star: the optimum at its beta\n"
                                "black: the optimum at any beta, by the samples of each run\n"
                                "grey: best of 1, 4, 16, 64, 256 samples of rho, KL at most",
                                "score, deviations of rho's", runs)
    for i, (run, row) in enumerate(zip(runs, summary["ppo"])):
        for found, style in ((row, "o"), (row["optimum"], "*")):
            axis.plot(*points([found], "ref_kl", "score"), f"C{i}{style}", ms=12, mec="k",
                      zorder=3)
        scores, weights = pool(rho, run)
        best = [ppo.optimum(scores, beta, weights) for beta in np.logspace(2, -2, 81)]
        # Each pool knows the optimum as far as its own run drifted.
        best = [optimum for optimum in best if optimum["ess"] >= ppo.MIN_ESS]
        axis.plot(*points(best, "ref_kl", "score"), "k")
        _, scores, kls = zip(*best_of_rho(rho, run["toward"]))
        axis.plot(kls, scores, "C7.-")
    return figure


def draw_judge(rho, runs):
    """Score by the reward model and by the judge that was not optimised, against drift."""
    figure, axis = drift_figure("Solid: the reward model; dashed: the judge, not optimised\n"
                                "dotted: what their correlation on rho implies for the judge",
                                "score, deviations of rho's", runs)
    for i, run in enumerate(runs):
        axis.plot(*points(run["history"], "exact_kl", "judge"), f"C{i}--")
        # If the two correlate c on rho, a gain of s by one is c s by the other without cheating.
        both = [train.rho_scores(rho, run["toward"], name).flatten()
                for name in ("reward", "judge")]
        kls, scores = points(run["history"], "exact_kl", "score")
        axis.plot(kls, pearson(*both) * np.array(scores), f"C{i}:")
    return figure


def draw_ppo(runs, summary):
    """What PPO logs, against iteration; with the objective J also J*, dotted, where it is known."""
    keys = ("objective", "exact_kl", "policy_loss", "clipfrac", "explained_variance", "entropy",
            "distinct_2", "ref_logprob", "positive")
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(3, 3).flatten()
    for i, (run, row) in enumerate(zip(runs, summary["ppo"])):
        for axis, key in zip(axes, keys):
            line, = axis.plot(*points(run["history"], "step", key))
            axis.set(title=key, xlabel="iteration")
        line.set_label(f"beta {label(run)}")
        axes[0].axhline(row["optimum"]["objective"] or math.nan, color=f"C{i}", linestyle=":")
    axes[0].set_title("objective J; dotted: J*")
    return figure


def draw_reward(rewarded, judged, pretrained):
    """Is P(positive) what it says, on held-out ratings? And how pretraining went."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(title="Reliability", xlabel="mean P(positive) of a tenth",
             ylabel="mean (rating + 2) / 4 of that tenth")
    left.plot([0.2, 0.8], [0.2, 0.8], "k:", label="perfect")
    for state in (rewarded, judged):
        for kind, found in state["report"].items():
            # Few ratings have no tenths.
            p, target, error = np.reshape(found["reliability"], (-1, 3)).T
            left.errorbar(p, target, error, fmt="o-", label=f"{state['kind']} model, {kind}")
    right.plot(*points(pretrained["history"], "step", "loss"))
    right.set(title="Pretraining", xlabel="step", ylabel="loss, nats per token")
    return figure


def first_past(run):
    """[(mark, the first row of a run's history whose drift has passed it)], of all marks passed."""
    past = [(mark, [row for row in run["history"] if row["exact_kl"] >= mark])
            for mark in train.KL_MARKS]
    return [(mark, rows[0]) for mark, rows in past if rows]


def draw_readers(passages, runs):
    """What readers and both models say of the same texts along the drift, all from 0 to 1."""
    figure, axis = drift_figure("Where the models and readers part", "from 0 to 1")
    for run, style in zip(runs, itertools.cycle(("o-", "s--", "^:", "v-."))):
        # Every run begins as rho. Where it ends may lie nearer than where it has been.
        models = [("pretrain", 0.0),
                  *[(f"{run['name']}_kl{mark:g}", row["exact_kl"])
                    for mark, row in first_past(run)],
                  (run["name"], run["fresh"]["exact_kl"].mean().item())]
        rated = {name: kl for name, kl in models if name in passages}
        # Of two ends, with nothing between them, nobody sees where they part.
        if not any("_kl" in name for name in rated):
            continue
        for i, (measure, (least, most)) in enumerate(MEASURES.items()):
            values = [(passages[name][:, i] - least) / (most - least) for name in rated]
            means, errors = zip(*map(mean_se, values))
            axis.errorbar(list(rated.values()), means, errors, fmt=f"C{i}{style}",
                          label=f"{measure}, {run['name']}")
    return figure


# ---- the report ---------------------------------------------------------------------------

def results_table(runs, summary):
    """What each run reached, and its optimum: lines of a markdown table."""
    lines = []
    for run, row in zip(runs, summary["ppo"]):
        best = row["optimum"]
        bounds = (best["at_least"], row["fraction_at_most"])
        # They matter where J* is not known.
        if best["objective"] is not None:
            bounds = (None, None)
        lines.append([
            label(run),
            *[row[key] for key in ("score", "judge", "positive", "ref_kl")],
            (row["objective"], row["objective_se"]),
            (best["objective"], best["objective_se"]),
            bounds[0],
            round(best["ess"]),
            (row["fraction_of_optimum"], row["fraction_se"]),
            bounds[1],
            row["kl_to_optimum"]])
    return table(["beta", "score", "judge", "P(positive)", "ref_kl", "J", "J*", "J* at least",
                  "ESS", "fraction of optimum", "at most", "KL(pi to pi*)"], lines)


def best_of_rho(rho, toward):
    """Of n samples of rho the best: [(n, its score on average, its KL at most)].

    The yardstick that needs no training. n is no more than there are samples of a prompt.
    """
    scores = train.rho_scores(rho, toward)
    counts = [n for n in (1, 4, 16, 64, 256) if n <= scores.size(1)]
    return [(n, *ppo.best_of_n(scores, n)) for n in counts]


def best_of_n_table(rho, runs):
    """Best of n, and its J at the beta of each run: lines of a markdown table."""
    rows = []
    for found in zip(*[best_of_rho(rho, run["toward"]) for run in runs]):
        objectives = [score - run["inputs"]["beta"] * kl
                      for run, (_, score, kl) in zip(runs, found)]
        # The score is that toward which the last run goes, positive if one does.
        rows.append([*found[-1], *objectives])
    return table(["best of n", f"score, {runs[-1]['toward']}", "KL at most",
                  *[f"J at beta {label(run)}" for run in runs]], rows)


def measures_table(states):
    """How well reward models predict ratings that they were not trained on: lines of markdown."""
    rows = []
    for state in states:
        for kind, found in state["report"].items():
            *keys, _ = found        # without the last, which a figure shows
            rows.append([f"{state['kind']} model, {kind}", *[found[key] for key in keys]])
    return table(["held-out ratings", *keys], rows)


def write_samples(path, tokenizer, prompts, tokens, log_odds, log_ratio):
    """Write 20 of N completions tokens (N,T) of prompts (P,T0) to a file; returns them as texts."""
    # Far apart, so that they are of several prompts.
    n = len(tokens)
    rows = torch.arange(0, n, max(n // 20, 1))[:20]
    samples = describe(tokenizer, train.repeat(prompts, n)[rows], tokens[rows], log_odds[rows],
                       log_ratio[rows])
    texts = [as_text(**sample) for sample in samples]
    path.parent.mkdir(exist_ok=True)
    data.write_file(path, f"\n{'-' * 60}\n\n".join(texts))
    return texts


def strip_along_kl(path, run, args, passages):
    """The policies that a run kept along its drift, a sample of each: lines of markdown.

    path: of the run. passages: those that were rated, for the sense that readers find in them.
    """
    rows = []
    for mark, step in first_past(run):
        kept = at_kl(path, mark)
        if kept.exists():
            sense = mean_se(passages[kept.stem][:, 1])[0] if kept.stem in passages else None
            # A newline or a bar would end the cell.
            text = draw(kept, args, 1)[0]["text"].replace("\n", " / ").replace("|", "")
            numbers = [step[key] for key in ("exact_kl", "score", "positive", "distinct_2")]
            rows.append([mark, *numbers, sense, text])
    if not rows:
        return []
    return [f"## {path.stem} along its drift\n",
            *table(["past", "KL", "score", "P(positive)", "distinct pairs of tokens",
                    "readers' sense", "a sample"], rows)]


def draw_figures(study, summary, passages):
    """{name: figure} of a study; the readers' only where passages along the drift were rated."""
    pretrained, rewarded, judged, rho, runs = study
    figures = {"frontier": draw_frontier(rho, runs, summary),
               "judge": draw_judge(rho, runs),
               "ppo": draw_ppo(runs, summary),
               "reward": draw_reward(rewarded, judged, pretrained)}
    if any("_kl" in name for name in passages):
        figures["readers"] = draw_readers(passages, runs)
    return figures


def write_report(args):
    """figures/*.png, samples/*.txt, summary.json and report.md of a finished study."""
    out = args.report
    study = load_study(out)
    pretrained, rewarded, judged, rho, runs = study
    tokenizer = data.load_tokenizer(out / "tokenizer.tiktoken", pretrained)
    passages = read_passages(args.ratings, out) if args.ratings else {}
    summary = summarise(out, study)
    data.write_file(out / "summary.json", json.dumps(summary, indent=1))
    lines = [f"# Size {summary['size']}, seed {pretrained['args']['seed']}: "
             f"{pretrained['val_bits_per_byte']:.3f} bits per byte on held-out text\n",
             *results_table(runs, summary),
             "Measured on fresh samples, ± one standard error; KL in nats per completion. J* is "
             "estimated from samples of rho and of the policy; where its effective sample size "
             f"(ESS) is below {ppo.MIN_ESS}, it is not quoted, but what it is at least, and the "
             "fraction at most, with 95 % certainty. judge: the score by a second reward model, "
             "for which nothing was optimised.\n",
             *best_of_n_table(rho, runs), *measures_table((rewarded, judged))]
    for name, figure in draw_figures(study, summary, passages).items():
        figure.legend(loc="outside right upper")
        save_figure(figure, out / f"figures/{name}.png")
        lines.append(f"![{name}](figures/{name}.png)\n")
    log_odds = rho["log_odds"]["reward"]
    prompts = rho["prompts"]
    before = write_samples(out / "samples/rho.txt", tokenizer, prompts, rho["tokens"], log_odds,
                           torch.zeros(len(log_odds)))
    for run in runs:
        name = run["name"]
        fresh = run["fresh"]
        after = write_samples(out / f"samples/{name}.txt", tokenizer, prompts, fresh["tokens"],
                              fresh["log_odds"], fresh["log_ratio"])
        lines += [f"## {name}: before and after\n\n```", *before[:2], "===== after\n",
                  *after[:2], "```\n"]
        lines += strip_along_kl(out / f"{name}.pt", run, args, passages)
    report = "\n".join(lines)
    data.write_file(out / "report.md", report)
    print(f"\n{report}\n{out / 'report.md'} is this text, with the figures")


# ---- the command line ---------------------------------------------------------------------

def parse():
    """The options; what is out of range is answered with one line."""
    count = data.number(int, 1)
    parser = data.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", default="out/pretrain.pt", type=Path,
        help="pretrain.pt or ppo_beta*.pt, in the folder that train.py wrote (default: rho's)")
    add("--kl", type=float, choices=train.KL_MARKS,
        help="the policy when its drift first passed so many nats a completion")
    add("--num", type=count, default=20, help="how many samples, of each checkpoint (default 20)")
    add("--prompt", default="", help="text to continue (default: what the run was given)")
    add("--temperature", type=data.number(float, 0), default=1.0,
        help="below 1 plays safe, 0 always takes the likeliest token (default 1)")
    add("--top-k", type=count,
        help="draw from the k likeliest tokens only (unset: from all, as in training)")
    add("--seed", type=data.number(int, 0, 2**31), default=0,
        help="the same seed and --num give the same samples")
    add("--compare", action="store_true", help="show rho's samples and the twin's as well, in turn")
    add("--jsonl", action="store_true", help="one JSON object a line")
    add("--rate", nargs="+", metavar="CHECKPOINT",
        help="rate their samples: several shuffled and blind; one, or plays, for train.py --labels")
    add("--ratings", nargs="+", type=Path, metavar="FILE.csv", default=[],
        help="the file of your ratings; without --rate, what one or two files say")
    add("--report", type=Path, metavar="DIR",
        help="draw figures, report.md and summary.json of a study again")
    args = parser.parse_args()
    if args.rate and not args.ratings:
        parser.error("--rate needs a file to keep the ratings in: --ratings FILE.csv")
    return args


def main():
    args = parse()
    if args.report:
        write_report(args)
    elif args.rate:
        rate(args)
    elif args.ratings:
        print_ratings(args)
    else:
        print_samples(args)


if __name__ == "__main__":
    data.run(main)
