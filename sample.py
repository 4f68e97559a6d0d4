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


# ---- samples ------------------------------------------------------------------------------

def load_beside(path, state, kind):
    """The pretrain or reward checkpoint in the folder of another, state at path.

    UserError unless they belong together: two studies may lie in one folder.
    """
    file = path.with_name(f"{kind}.pt")
    found = data.load_checkpoint(file, kind)
    # The later stage has the digest of the earlier one's model among its inputs.
    later, earlier = (found, state) if state["kind"] == "pretrain" else (state, found)
    if later["inputs"][earlier["kind"]] != data.digest(earlier["model"]):
        raise data.UserError(f"{file} and {path} are not of the same study. Run train.py again.")
    return found


@torch.no_grad()
def draw(path, args, num):
    """num samples of a checkpoint: dicts of text, positive, ref_kl (0 if it is rho's).

    positive is None where no reward model is beside the checkpoint.
    """
    state = data.load_checkpoint(path, "pretrain", "ppo")
    tokenizer = data.load_tokenizer(path.with_name("tokenizer.tiktoken"), state)
    policy = load_gpt(state)
    # What the run was given. Of rho: what its runs were given, so that they can be compared.
    given = state
    if state["kind"] == "pretrain" and path.with_name("rho.pt").exists():
        given = load_beside(path, state, "rho")
    prompts = given.get("prompts", torch.tensor([tokenizer.encode_ordinary(data.BOUNDARY)[:1]]))
    if args.prompt:
        prompts = torch.tensor([tokenizer.encode_ordinary(args.prompt)])
    length = args.length or given["inputs"].get("length", 64)
    if prompts.size(1) + length > policy.config.block_size:
        raise data.UserError("--prompt and --length do not fit the model's context. "
                             "Shorten either.")
    generator = torch.Generator().manual_seed(args.seed)
    prompts = prompts[torch.randint(len(prompts), (num,), generator=generator)]
    tokens = generate(policy, prompts, length, args.temperature, args.top_k, generator)
    completions = cut_after(tokens[:, prompts.size(1):], given.get("end"))
    positive, ref_kl = [None] * num, [0.0] * num
    # After train.py --until pretrain there is no reward model yet.
    if path.with_name("reward.pt").exists():
        model = reward.load_reward(load_beside(path, state, "reward"))
        positive = in_chunks(model, completions).sigmoid().tolist()
    if state["kind"] == "ppo":
        rho = load_gpt(load_beside(path, state, "pretrain"))
        drift = train.measure_drift(policy, rho, prompts, completions)
        ref_kl = drift["log_ratio"].tolist()
    texts = texts_of(tokenizer, prompts, completions)
    return [{"text": text, "positive": p, "ref_kl": kl}
            for text, p, kl in zip(texts, positive, ref_kl)]


def texts_of(tokenizer, prompts, completions):
    """Prompts (N,T0) with their completions (N,T) as texts, without the blank line before."""
    rows = torch.cat((prompts, completions), dim=1).tolist()
    return [data.decode(tokenizer, row).removeprefix(data.BOUNDARY) for row in rows]


def kept_along_kl(path):
    """{nats: file} of the policies that the run of a checkpoint kept as it drifted."""
    files = {mark: path.with_name(f"{path.stem}_kl{mark:g}.pt") for mark in train.KL_MARKS}
    return {mark: file for mark, file in files.items() if file.exists()}


def as_text(text, positive, ref_kl):
    """A sample as it is printed: its text, and below it what is known of it."""
    known = "unknown" if positive is None else f"{positive:.1%}"
    return f"{text}\n\nPositive Prob: {known}   log pi - log rho: {ref_kl:.1f} nats\n"


def print_samples(args):
    """Samples of one checkpoint; with --compare those of rho and of the twins, turn by turn."""
    path = args.checkpoint
    if args.kl is not None:
        path = path.with_name(f"{path.stem}_kl{args.kl:g}.pt")
        if not path.exists():
            kept = ", ".join(f"{mark:g}" for mark in kept_along_kl(args.checkpoint)) or "none"
            raise data.UserError(f"{args.checkpoint} kept no policy at {args.kl:g} nats. "
                                 f"Of these marks it passed: {kept}.")
    paths = [path]
    if args.compare:
        beta = path.stem.split("beta")[-1]
        # In this order negative comes last.
        twins = sorted(path.parent.glob(f"ppo_*beta{beta}.pt"))
        if not twins:
            raise data.UserError("--compare needs the --checkpoint of a policy, ppo_*.pt.")
        paths = [path.with_name("pretrain.pt"), *twins]
    drawn = [draw(path, args, args.num) for path in paths]
    for turn in zip(*drawn):
        for path, sample in zip(paths, turn):
            if not args.jsonl:
                print(f"----- {path.stem}\n{as_text(**sample)}")
                continue
            if args.compare:
                sample["model"] = path.stem
            print(json.dumps(sample, ensure_ascii=False))


# ---- ratings ------------------------------------------------------------------------------

def read_ratings(path):
    """The rows of a file of ratings, dicts of COLUMNS, rating and sense as floats (or None)."""
    rows, reader = [], csv.reader(io.StringIO(data.read_text(path, "ratings")))
    try:
        if next(reader, COLUMNS) != COLUMNS:
            raise ValueError(f"the columns must be {', '.join(COLUMNS)}")
        # A blank line is an empty row.
        for row in filter(None, reader):
            if len(row) != len(COLUMNS):
                raise ValueError("the row has not as many fields as there are columns")
            text, rating, sense, drawn_from = row
            rating = data.parse_rating(rating)
            # A label for training has none.
            sense = data.parse_rating(sense, 1, 5) if sense else None
            rows.append(dict(zip(COLUMNS, (text, rating, sense, drawn_from))))
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


def passages_of_plays(args):
    """args.num texts of the training plays, one or more speeches of about --length tokens each."""
    plays = data.load_corpus()[0]
    generator = random.Random(args.seed)
    # In characters: a token has more than two.
    length = int(2.5 * (args.length or 64))
    texts = []
    for _ in range(args.num):
        anywhere = generator.randrange(len(plays) - 8 * length)
        start = plays.find(data.BOUNDARY, anywhere)
        end = plays.find(data.BOUNDARY, start + length)
        texts.append(plays[start:end])
    return texts


def passages_to_rate(args):
    """Passages of all that --rate names, shuffled: dicts of text and drawn_from."""
    passages = []
    if len({Path(name).stem for name in args.rate}) < len(args.rate):
        raise data.UserError("--rate tells checkpoints apart by their file names. Rename a copy.")
    for name in args.rate:
        if name == "plays":
            texts = passages_of_plays(args)
        else:
            texts = [sample["text"] for sample in draw(Path(name), args, args.num)]
        for text in texts:
            passages.append({"text": text.strip(), "drawn_from": Path(name).stem})
    # The same order every time, so that a reader can stop and go on.
    random.Random(args.seed).shuffle(passages)
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
    path, blind = args.ratings[0], len(args.rate) > 1
    rows = read_ratings(path) if path.exists() else []
    # A file that cannot be written is told before the first rating.
    write_ratings(path, rows)
    # By text and model, for two models that are close may have written the same.
    done = {(row["text"], row["drawn_from"]) for row in rows}
    left = [row for row in passages_to_rate(args) if (row["text"], row["drawn_from"]) not in done]
    print(f"{len(rows)} rated, {len(left)} to go. A number and Enter; b goes back, q ends.")
    while left:
        print(f"\n----- {len(left)} to go\n{left[0]['text']}\n")
        feeling, sense = ask("feeling, -2 very negative to 2 very positive:", -2, 2), None
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
    """(mean, standard error) of numbers; NaN where they are too few."""
    x = torch.as_tensor(values, dtype=torch.float64)
    mean = x.mean().item()
    if len(x) < 2:
        return mean, math.nan
    return mean, x.std().item() / len(x) ** 0.5


def permutation_interval(a, b):
    """How far apart the means of a and b may be by chance: the 95 % quantile of |difference|.

    All values are dealt into two heaps of these sizes at random, many times. A difference
    within this distance from 0 is none that was shown.
    """
    values = torch.tensor(a + b, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    # Each row of argsort is a random order of all values.
    order = torch.rand(10_000, len(values), generator=generator).argsort(1)
    one, two = values[order].split([len(a), len(b)], dim=1)
    return (one.mean(1) - two.mean(1)).abs().quantile(0.95).item()


def quadratic_kappa(a, b):
    """Agreement of two readers' ratings beyond chance, 1 if perfect (Cohen 1968)."""
    a, b = torch.tensor([a, b], dtype=torch.float64)
    # What the mean squared difference would be if the readers knew nothing of each other.
    expected = (a[:, None] - b).square().mean()
    if expected == 0:
        return 1.0
    return float(1 - (a - b).square().mean() / expected)


def rated(rows, name, key):
    """What the rows drawn from one model have at key, where they have something."""
    known = [row for row in rows if row["drawn_from"] == name]
    return [row[key] for row in known if row.get(key) is not None]


def one_a_passage(rows):
    """Ratings of the same passage by several readers as one row, their mean.

    Readers who agree are not independent: two of them are little more than one.
    """
    same = {}
    for row in rows:
        same.setdefault((row["text"], row["drawn_from"]), []).append(row)
    merged = []
    for group in same.values():
        means = {}
        for key in ("rating", "sense"):
            known = [row[key] for row in group if row[key] is not None]
            means[key] = sum(known) / len(known) if known else None
        merged.append({**group[0], **means})
    return merged


def with_positive(folder, rows):
    """Rows of ratings, each with P(positive) of its text, as far as the models are in the folder.

    At "positive" that of the reward model, at "judge" that of the second, which nobody optimised.
    """
    for kind, key in (("reward", "positive"), ("judge", "judge")):
        path = folder / f"{kind}.pt"
        if path.exists():
            state = data.load_checkpoint(path, kind)
            tokenizer = data.load_tokenizer(folder / "tokenizer.tiktoken", state)
            ids = [tokenizer.encode_ordinary(row["text"]) for row in rows]
            tokens = reward.pad(ids, state["length"])
            p = in_chunks(reward.load_reward(state), tokens).sigmoid()
            rows = [{**row, key: each} for row, each in zip(rows, p.tolist())]
    return rows


def print_ratings(args):
    """What one or two files of ratings say of each model, and how far two readers agree."""
    files = [read_ratings(path) for path in args.ratings]
    if not all(files):
        raise data.UserError("a file of ratings is empty. Rate something first: --rate.")
    # Beside the samples are the models that judge them.
    folder = Path(args.rate[0]).parent if args.rate else args.checkpoint.parent
    rows = with_positive(folder, one_a_passage(sum(files, [])))
    rho, lines = rated(rows, "pretrain", "rating"), []
    # In this order pretrain, which is rho, comes first.
    for name in sorted({row["drawn_from"] for row in rows}, reverse=True):
        feeling = rated(rows, name, "rating")
        means = [mean_se(rated(rows, name, key)) for key in ("rating", "sense", "positive")]
        gap = means[0][0] - mean_se(rho)[0]
        lines.append([name, len(feeling), *means, (gap, permutation_interval(feeling, rho))])
    print(*table(["drawn from", "passages", "feeling, -2 to 2", "sense, 1 to 5", "P(positive)",
                  "feeling less rho's ± chance, 95 %"], lines), sep="\n")
    if "positive" in rows[0] and len(rows) > 1:
        pairs = torch.tensor([(row["rating"], row["positive"]) for row in rows])
        print(f"feeling and P(positive) correlate {torch.corrcoef(pairs.T)[0, 1]:.2f}")
    other = {row["text"]: row["rating"] for row in files[-1]}
    both = []
    for row in files[0]:
        if row["text"] in other:
            both.append((row["rating"], other[row["text"]]))
    if len(files) == 2 and len(both) > 1:
        a, b = zip(*both)
        kappa = quadratic_kappa(a, b)
        pearson = torch.corrcoef(torch.tensor([a, b]))[0, 1]
        print(f"two readers of {len(both)} passages: quadratic kappa {kappa:.2f}, "
              f"Pearson {pearson:.2f}")


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
    pretrained, rewarded, judged, rho = (data.load_checkpoint(out / f"{kind}.pt", kind)
                                         for kind in ("pretrain", "reward", "judge", "rho"))
    for state in (pretrained, rewarded, judged):
        if rho["inputs"][state["kind"]] != data.digest(state["model"]):
            raise data.UserError(f"{state['kind']}.pt is newer than rho.pt in {out}. "
                                 "Run train.py again.")
    runs = []
    for path in out.glob("ppo_*beta*.pt"):
        # What a run kept on its way is not its end.
        if "_kl" in path.name or ".partial" in path.name:
            continue
        run = data.load_checkpoint(path, "ppo")
        same = run["inputs"]["rho"] == train.state_digest(rho)
        if same and run["inputs"]["reward"] == rho["inputs"]["reward"]:
            runs.append(run)
        else:
            print(f"{path.name} is of another task or reward model and is left out")
    if not runs:
        raise data.UserError(f"{out} has no finished PPO run. Run train.py first.")
    runs.sort(key=lambda run: (run["toward"], run["inputs"]["beta"]))
    return pretrained, rewarded, judged, rho, runs


def label(run):
    """How figures and tables call a run: 0.2, or negative 0.2."""
    return f"{run['toward']} {run['inputs']['beta']:g}".removeprefix("positive ")


def scores_of(rho, log_odds, toward, name="reward"):
    """The scores of log-odds by a reward model, "reward" or "judge": of the same shape."""
    return reward.score(log_odds, **rho["constants"][name][toward], toward=toward)


def rho_scores(rho, toward, name="reward"):
    """The scores (P,N) of rho's samples, N for each of P prompts, by a reward model."""
    return scores_of(rho, rho["log_odds"][name], toward, name).view(len(rho["prompts"]), -1)


def pool(rho, run):
    """Scores (P,N) of rho's and a run's fresh samples, and their log(rho/q), q the mixture."""
    fresh, P = run["fresh"], len(rho["prompts"])
    scores = scores_of(rho, fresh["log_odds"], run["toward"]).view(P, -1)
    # log pi - log rho of every sample: rho's own row is 0, for only the ratio matters.
    ratios = [run["rho_log_ratio"].view(P, -1), fresh["log_ratio"].view(P, -1)]
    ratio = torch.cat(ratios, dim=1).flatten()
    counts = [ratios[0].size(1), ratios[1].size(1)]
    weights = ppo.mixture_log_weights(torch.stack((0 * ratio, ratio)), counts).view(P, -1)
    return torch.cat((rho_scores(rho, run["toward"]), scores), dim=1), weights


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
    scores, kl = scores_of(rho, fresh["log_odds"], toward), fresh["ref_kl"]
    objective, se = mean_se(scores - beta * kl)
    start = rho_scores(rho, toward).mean().item()
    best = summarise_optimum(rho, run)
    way = best["objective"] - start
    fraction = (objective - start) / way
    iterations = len(run["history"])
    return {"beta": beta, "toward": toward, "iterations": iterations,
            "score": scores.mean().item(),
            "judge": scores_of(rho, fresh["judge"], toward, "judge").mean().item(),
            "positive": fresh["log_odds"].sigmoid().mean().item(),
            "ref_kl": kl.mean().item(),
            "objective": objective, "objective_se": se, "reference_objective": start,
            "optimum": best,
            "fraction_of_optimum": fraction,
            "fraction_se": math.hypot(se, fraction * best["objective_se"]) / way,
            "fraction_at_most": (objective - start) / (best["at_least"] - start),
            "kl_to_optimum": (best["objective"] - objective) / (beta or math.nan),
            "seconds_per_iteration": run["seconds"] / max(iterations, 1)}


def summarise_reward(state, rho):
    """The entry of a reward model in summary.json."""
    report, name = state["report"], state["kind"]
    reached = report.get("passages") or report["samples"]
    return {"labels": state["labels"], **rho["constants"][name]["positive"],
            "val_pearson": reached["pearson"], "val_auc": reached["auc"],
            "val_log_loss": reached["log_loss"], "report": report,
            "reference_positive": rho["log_odds"][name].sigmoid().mean().item()}


def summarise(out, pretrained, rewarded, judged, rho, runs):
    """summary.json as a dict."""
    texts = data.load_checkpoint(out / "data.pt", "data")
    stages = (texts, pretrained, rewarded, judged, rho)
    seconds = {state["kind"]: state["seconds"] for state in stages}
    ppo_seconds = {label(run): run["seconds"] for run in runs}
    total = sum(seconds.values()) + sum(ppo_seconds.values())
    summary = {"size": pretrained["args"]["size"], "device": pretrained["args"]["device"],
               "seconds": {**seconds, "ppo": ppo_seconds, "total": total},
               "reward": summarise_reward(rewarded, rho), "judge": summarise_reward(judged, rho),
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
    """What rows have at x and at y, where they know y: two lists, to plot."""
    rows = [row for row in rows if row.get(y) is not None]
    return [row[x] for row in rows], [row[y] for row in rows]


def drift_axis(title, ylabel):
    """A figure and its one axis, along which policies drift away from rho."""
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axis = figure.subplots()
    # Along the root of the KL scores at first grow in a straight line (Gao 2022).
    axis.set_xscale("function", functions=(np.sqrt, np.square))
    axis.set(title=title, ylabel=ylabel, xticks=[0, *train.KL_MARKS],
             xlabel="KL to rho in nats per completion, its root to scale")
    # Below 0, where a margin would be, there is no root.
    axis.margins(x=0)
    axis.grid(alpha=0.3)
    return figure, axis


def draw_frontier(rho, runs, summary):
    """Score against drift: the paths of PPO, best-of-n, and what no policy can be above."""
    figure, axis = drift_axis("Circle: where a run ended; star: the optimum at its beta\n"
                              "black: the optimum at any beta, by the samples of each run\n"
                              "grey: best of 1, 2, 4 ... 256 samples of rho, KL at most",
                              "score, deviations of rho's")
    end = {"markersize": 12, "markeredgecolor": "k", "zorder": 3}
    for i, (run, row) in enumerate(zip(runs, summary["ppo"])):
        axis.plot(*points(run["history"], "exact_kl", "score"), f"C{i}.-", label=label(run))
        axis.plot(row["ref_kl"], row["score"], f"C{i}o", **end)
        # No star where the optimum is not known.
        axis.plot(*points([row["optimum"]], "ref_kl", "score"), f"C{i}*", **end)
        scores, weights = pool(rho, run)
        best = [ppo.optimum(scores, beta, weights) for beta in np.logspace(2, -2, 81)]
        # Each pool knows the optimum as far as its own run drifted.
        best = [optimum for optimum in best if optimum["ess"] >= ppo.MIN_ESS]
        axis.plot(*points(best, "ref_kl", "score"), "k")
        of_rho = rho_scores(rho, run["toward"])
        # No more than there are of a prompt.
        counts = [2 ** k for k in range(9) if 2 ** k <= of_rho.size(1)]
        scores, kls = zip(*[ppo.best_of_n(of_rho, n) for n in counts])
        axis.plot(kls, scores, "C7.-")
    figure.legend(loc="outside right upper", title="beta")
    return figure


def draw_judge(rho, runs):
    """Score by the reward model and by the judge that was not optimised, against drift."""
    figure, axis = drift_axis("Solid: the reward model; dashed: the judge, not optimised\n"
                              "dotted: what their correlation on rho implies for the judge",
                              "score, deviations of rho's")
    for i, run in enumerate(runs):
        kls, scores = points(run["history"], "exact_kl", "score")
        # If the two correlate c on rho, a gain of s by one is c s by the other without cheating.
        one, two = (rho_scores(rho, run["toward"], name).flatten()
                    for name in ("reward", "judge"))
        c = np.corrcoef(one, two)[0, 1]
        axis.plot(kls, scores, f"C{i}", label=label(run))
        axis.plot(*points(run["history"], "exact_kl", "judge"), f"C{i}--")
        axis.plot(kls, c * np.array(scores), f"C{i}:")
    figure.legend(loc="outside right upper", title="beta")
    return figure


def draw_ppo(runs, summary):
    """What PPO logs, against iteration; with the objective J also J*, dotted, where it is known."""
    keys = ("objective", "exact_kl", "policy_loss", "clipfrac", "explained_variance", "entropy",
            "distinct_2", "ref_logprob", "positive")
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(3, 3).flatten()
    for i, (run, row) in enumerate(zip(runs, summary["ppo"])):
        for axis, key in zip(axes, keys):
            axis.plot(*points(run["history"], "step", key), f"C{i}")
            axis.set(title=key, xlabel="iteration")
        axes[0].get_lines()[-1].set_label(f"beta {label(run)}")
        if row["optimum"]["objective"] is not None:
            axes[0].axhline(row["optimum"]["objective"], color=f"C{i}", linestyle=":")
    axes[0].set_title("objective J; dotted: J*")
    figure.legend(loc="outside upper center", ncols=len(runs))
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
    left.legend()
    right.plot(*points(pretrained["history"], "step", "loss"))
    right.set(title="Pretraining", xlabel="step", ylabel="loss, nats per token")
    return figure


def draw_readers(rows, runs):
    """What readers and both models say of the same texts along the drift, all from 0 to 1."""
    ends = {}
    for run in runs:
        name = train.run_name(run["toward"], run["inputs"]["beta"])
        ends[name] = run["fresh"]["ref_kl"].mean().item()
    figure, axis = drift_axis("Where the models and readers part", "from 0 to 1")
    scales = {"rating": ("readers' feeling", -2, 4), "sense": ("readers' sense", 1, 4),
              "positive": ("P(positive)", 0, 1), "judge": ("the judge's P(positive)", 0, 1)}
    along = {row["drawn_from"].split("_kl")[0] for row in rows if "_kl" in row["drawn_from"]}
    styles = itertools.cycle(("o-", "s--", "^:", "v-."))
    for run, style in zip(sorted(along), styles):
        # Every run begins as rho. Where it ends may lie nearer than where it has been.
        names = {0: "pretrain", **{mark: f"{run}_kl{mark:g}" for mark in train.KL_MARKS}}
        if run in ends:
            names[ends[run]] = run
        kls = [kl for kl in names if rated(rows, names[kl], "rating")]
        if not kls:
            continue
        for i, (key, (what, low, width)) in enumerate(scales.items()):
            found = [mean_se(rated(rows, names[kl], key)) for kl in kls]
            means, errors = np.transpose(found)
            axis.errorbar(kls, (means - low) / width, errors / width, fmt=f"C{i}{style}",
                          label=f"{what}, {run}")
    figure.legend(loc="outside right upper")
    return figure


# ---- the report ---------------------------------------------------------------------------

def results_table(runs, summary):
    """What each run reached, and its optimum: lines of a markdown table."""
    lines = []
    for run, row in zip(runs, summary["ppo"]):
        best = row["optimum"]
        fraction = (row["fraction_of_optimum"], row["fraction_se"])
        # Where J* is not known, what it is at least may say something.
        if row["fraction_of_optimum"] is None and (best["at_least"] or 0) > row["objective"]:
            fraction = f"at most {row['fraction_at_most']:.2f}"
        lines.append([
            label(run),
            row["score"],
            row["judge"],
            row["positive"],
            row["ref_kl"],
            (row["objective"], row["objective_se"]),
            (best["objective"], best["objective_se"]),
            best["at_least"] if best["objective"] is None else None,
            round(best["ess"]),
            fraction,
            row["kl_to_optimum"]])
    return table(["beta", "score", "judge", "P(positive)", "ref_kl", "J", "J*", "J* at least",
                  "ESS", "fraction of optimum", "KL(pi to pi*)"], lines)


def best_of_n_table(rho, runs):
    """Best of n samples of rho, the yardstick that needs no training: lines of a markdown table."""
    rows = []
    for n in (1, 4, 16, 64, 256):
        if n > rho_scores(rho, "positive").size(1):
            break
        row = []
        for run in runs:
            score, kl = ppo.best_of_n(rho_scores(rho, run["toward"]), n)
            row.append(score - run["inputs"]["beta"] * kl)
        # That of the last run's direction, positive if there is one; the KL is that of all.
        rows.append([n, score, kl, *row])
    return table(["best of n", f"score, {runs[-1]['toward']}", "KL at most",
                  *[f"J at beta {label(run)}" for run in runs]], rows)


def measures_table(states):
    """How well reward models predict ratings that they were not trained on: lines of markdown."""
    keys = ["n", "pearson", "pearson_se", "auc", "pair_accuracy", "slope", "log_loss",
            "constant_log_loss"]
    rows = []
    for state in states:
        for kind, found in state["report"].items():
            rows.append([f"{state['kind']} model, {kind}", *[found[key] for key in keys]])
    return table(["held-out ratings", *keys], rows)


def write_samples(path, tokenizer, prompts, samples):
    """Write 20 of samples, dicts of (N,...) tensors, with their prompts (P,T0); returns the texts.
    """
    n = len(samples["tokens"])
    # Far apart, so that they are of several prompts.
    rows = torch.arange(0, n, max(n // 20, 1))[:20]
    texts = texts_of(tokenizer, train.repeat(prompts, n)[rows], samples["tokens"][rows])
    p, log_ratio = samples["log_odds"].sigmoid()[rows], samples["log_ratio"][rows]
    texts = [as_text(*sample) for sample in zip(texts, p, log_ratio)]
    path.parent.mkdir(exist_ok=True)
    line = "-" * 60
    data.write_file(path, f"\n{line}\n\n".join(texts))
    return texts


def table_along_kl(kept, run, args, ratings):
    """Each policy that a run kept along its drift, kept {nats: file}: lines of a markdown table.

    ratings: rows of them, for the sense that readers find in its texts.
    """
    rows = []
    for mark, path in kept.items():
        step = next((row for row in run["history"] if row["exact_kl"] >= mark), None)
        # Of a run that was resumed on another machine, say.
        if step is None:
            continue
        sense, _ = mean_se(rated(ratings, path.stem, "sense"))
        # A newline or a bar would end the cell.
        text = draw(path, args, 1)[0]["text"].replace("\n", " / ").replace("|", "")
        rows.append([mark, step["score"], step["positive"], step["distinct_2"], sense, text])
    return table(["KL", "score", "P(positive)", "distinct pairs of tokens", "readers' sense",
                  "a sample"], rows)


def write_report(args):
    """figures/*.png, samples/*.txt, summary.json and report.md of a finished study."""
    out = args.report
    pretrained, rewarded, judged, rho, runs = load_study(out)
    tokenizer = data.load_tokenizer(out / "tokenizer.tiktoken", pretrained)
    ratings = one_a_passage(sum([read_ratings(path) for path in args.ratings or []], []))
    summary = summarise(out, pretrained, rewarded, judged, rho, runs)
    data.write_file(out / "summary.json", json.dumps(summary, indent=1))
    results = results_table(runs, summary)
    print("", *results, sep="\n")
    args_of = pretrained["args"]
    lines = [f"# Size {args_of['size']}, seed {args_of['seed']}: "
             f"{pretrained['val_bits_per_byte']:.3f} bits per byte on held-out text\n", *results,
             "Measured on fresh samples, ± one standard error; KL in nats per completion. J* is "
             "estimated from samples of rho and of the policy; where its effective sample size "
             f"(ESS) is below {ppo.MIN_ESS}, it is not quoted, only what it is at least, with 95 % "
             "certainty. judge: the score by a second reward model, for which nothing was "
             "optimised.\n",
             *best_of_n_table(rho, runs), *measures_table((rewarded, judged))]

    figures = {"frontier": draw_frontier(rho, runs, summary),
               "judge": draw_judge(rho, runs),
               "ppo": draw_ppo(runs, summary),
               "reward": draw_reward(rewarded, judged, pretrained)}
    if any("_kl" in row["drawn_from"] for row in ratings):
        figures["readers"] = draw_readers(with_positive(out, ratings), runs)
    for name, figure in figures.items():
        save_figure(figure, out / f"figures/{name}.png")
        lines.append(f"![{name}](figures/{name}.png)\n")

    log_odds = rho["log_odds"]["reward"]
    of_rho = {"tokens": rho["tokens"], "log_odds": log_odds,
              "log_ratio": torch.zeros_like(log_odds)}
    before = write_samples(out / "samples/rho.txt", tokenizer, rho["prompts"], of_rho)
    for run in runs:
        name = train.run_name(run["toward"], run["inputs"]["beta"])
        after = write_samples(out / f"samples/{name}.txt", tokenizer, rho["prompts"], run["fresh"])
        pairs = [*before[:2], "===== after\n", *after[:2]]
        print("", f"===== {name}: before\n", *pairs, sep="\n")
        lines += [f"## {name}: before and after\n\n```", *pairs, "```\n"]
        kept = kept_along_kl(out / f"{name}.pt")
        if kept:
            lines += [f"## {name} along its drift\n", *table_along_kl(kept, run, args, ratings)]
    data.write_file(out / "report.md", "\n".join(lines))
    print(f"{out / 'report.md'} has the figures, and samples before and after")


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
    add("--length", type=data.number(int, 1, 1000),
        help="tokens of each (default: as in training, else 64)")
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
    add("--ratings", nargs="+", type=Path, metavar="FILE.csv",
        help="the file of your ratings; without --rate, what one or two files say")
    add("--report", type=Path, metavar="DIR",
        help="draw figures, report.md and summary.json of a study again")
    args = parser.parse_args()
    if not args.checkpoint.name:
        parser.error("--checkpoint must be a file")
    return args


def main():
    args = parse()
    if args.report:
        write_report(args)
    elif args.rate and not args.ratings:
        raise data.UserError("--rate needs a file to keep the ratings in: --ratings FILE.csv")
    elif args.rate:
        rate(args)
    elif args.ratings:
        print_ratings(args)
    else:
        print_samples(args)


if __name__ == "__main__":
    data.run(main)
