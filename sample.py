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

Positive Prob is what the reward model beside the checkpoint says of the text; ref_kl is
log pi - log rho of the tokens drawn, in nats: at temperature 1 its mean is KL(pi to rho).
"""

import csv
import io
import json
import math
import random
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure        # without pyplot no screen is needed

import data
import ppo
import reward
import train
from gpt import completion_logits, generate, in_chunks, load_gpt

MIN_ESS = 100   # effective samples below which an optimum is only a lower bound
COLUMNS = ["text", "rating", "sense", "drawn_from"]     # of a file of ratings


# ---- samples ------------------------------------------------------------------------------

def load(path):
    """(GPT, rho, reward model, tokenizer) of a checkpoint and the files beside it.

    rho is None beside rho itself; both are None where their file is not there.
    """
    state = data.load_checkpoint(path, "pretrain", "ppo")
    tokenizer = data.load_tokenizer(path.with_name("tokenizer.tiktoken"), state)
    rho = beside(path, state, "pretrain", load_gpt) if state["kind"] == "ppo" else None
    judge = beside(path, state, "reward", reward.load_reward)
    return load_gpt(state), rho, judge, tokenizer


def beside(path, state, kind, make):
    """make() of the pretrain or reward checkpoint beside the one at path; None if there is none.

    UserError unless they belong together.
    """
    file = path.with_name(f"{kind}.pt")
    if not file.exists():
        return None
    found = data.load_checkpoint(file, kind)
    # The later stage has the digest of the earlier one's model among its inputs.
    later, earlier = (state, found) if state["kind"] == "ppo" else (found, state)
    # Files of two studies may lie in one folder after a change of options.
    if later["inputs"][earlier["kind"]] != data.digest(earlier["model"]):
        raise data.UserError(f"{file} and {path} are not of the same study. Run train.py again.")
    return make(found)


def kept_along_kl(path):
    """{nats: file} of the policies that the run of a checkpoint kept as it drifted."""
    files = path.parent.glob(f"{path.stem}_kl*.pt")
    return dict(sorted((float(file.stem.split("_kl")[1]), file) for file in files))


def shown(args):
    """The checkpoints to draw from: one, or with --compare rho and the twins of its beta."""
    path = args.checkpoint
    if args.kl is not None:
        kept = kept_along_kl(path)
        if args.kl not in kept:
            known = ", ".join(f"{mark:g}" for mark in kept) or "no mark at all"
            raise data.UserError(f"{path} was not kept at {args.kl:g} nats. It passed {known}.")
        path = kept[args.kl]
    if not args.compare:
        return [path]
    rho, beta = path.with_name("pretrain.pt"), path.stem.split("beta")[-1]
    twins = sorted(path.parent.glob(f"ppo_*beta{beta}.pt"))     # negative comes last
    if not twins or not rho.exists():
        raise data.UserError("--compare needs a ppo checkpoint with its pretrain.pt beside it.")
    return [rho, *twins]


@torch.no_grad()
def draw(path, args, num):
    """num samples of a checkpoint: dicts of text, positive (None without a reward model), ref_kl.

    Of each args.best_of samples the one that the reward model likes best.
    """
    model, rho, judge, tokenizer = load(path)
    if judge is None and args.best_of > 1:
        raise data.UserError("--best-of needs the reward model, and "
                             f"{path.with_name('reward.pt')} is not there. Run train.py first.")
    given = tokenizer.encode_ordinary(args.prompt)
    # Without a prompt samples go on from the boundary of speeches, which is not part of the text.
    ids = given or tokenizer.encode_ordinary(data.BOUNDARY)[:1]
    skip = len(ids) - len(given)
    if len(ids) + args.length > model.config.block_size:
        raise data.UserError(f"a prompt of {len(ids)} tokens and --length {args.length} do not fit "
                             f"the context of {model.config.block_size} tokens. Shorten either.")
    prompt = torch.tensor([ids])
    generator = torch.Generator().manual_seed(args.seed)
    samples = []
    # One at a time, so that the first samples do not depend on how many are drawn.
    for _ in range(num):
        tokens = generate(model, prompt.expand(args.best_of, -1), args.length, args.temperature,
                          args.top_k, generator)
        best, positive = 0, None
        if judge:
            p = judge(tokens[:, skip:]).sigmoid()
            best, positive = p.argmax(), p.max().item()
        text = tokenizer.decode(tokens[best, skip:].tolist())
        kl = log_ratio(model, rho, prompt, tokens[best, None, len(ids):]) if rho else None
        samples.append({"text": text, "positive": positive, "ref_kl": kl})
    return samples


def log_ratio(policy, rho, prompt, tokens):
    """log pi - log rho of a completion (1,T) of a prompt (1,T0), in nats: a float."""
    logp, ref = (ppo.token_logprobs(completion_logits(model, prompt, tokens), tokens).sum().item()
                 for model in (policy, rho))
    return logp - ref


def as_text(sample):
    """A sample as it is printed: its text, and below it what is known of it."""
    forms = {"positive": "Positive Prob: {:.1%}", "score": "Score: {:.2f}",
             "ref_kl": "KL: {:.1f} nats"}
    known = [form.format(sample[key]) for key, form in forms.items()
             if sample.get(key) is not None]
    return f"{sample['text']}\n\n{'   '.join(known)}"


def print_samples(args):
    """Samples of one checkpoint; with --compare those of several, turn by turn."""
    drawn = {path.stem: draw(path, args, args.num) for path in shown(args)}
    for i in range(args.num):
        for name, samples in drawn.items():
            sample = samples[i]
            if args.compare:
                sample["model"] = name
            if args.jsonl:
                print(json.dumps(sample, ensure_ascii=False))
            else:
                print(f"----- {i + 1} {sample.get('model', '')}".rstrip())
                print(as_text(sample), end="\n\n")


# ---- ratings ------------------------------------------------------------------------------

def read_ratings(path):
    """The rows of a file of ratings, dicts of COLUMNS, rating and sense as floats (or None)."""
    reader, rows = csv.DictReader(io.StringIO(data.read_text(path, "ratings"))), []
    try:
        if set(reader.fieldnames or COLUMNS) != set(COLUMNS):
            raise ValueError(f"the columns must be {', '.join(COLUMNS)}")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError("it has not as many fields as there are columns")
            row["rating"] = data.parse_rating(row["rating"])
            row["sense"] = data.parse_rating(row["sense"], 1, 5) if row["sense"] else None
            rows.append(row)
    except (ValueError, csv.Error) as error:
        raise data.UserError(f"ratings {path}, line {max(reader.line_num, 1)}: {error}. "
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
    """Texts of the training plays, one or more speeches of about --length tokens each."""
    plays = data.load_corpus()[0]
    generator = random.Random(args.seed)
    length = int(2.5 * args.length)         # in characters: a token has more than two
    passages = []
    for _ in range(args.num):
        start = plays.find(data.BOUNDARY, generator.randrange(len(plays) - 8 * length))
        start += len(data.BOUNDARY)
        passages.append(plays[start:plays.find(data.BOUNDARY, start + length)])
    return passages


def passages_to_rate(args):
    """Passages of all that --rate names, shuffled: dicts of text, drawn_from."""
    items = []
    for name in args.rate:
        if name == "plays":
            texts = passages_of_plays(args)
        else:
            texts = column(draw(Path(name), args, args.num), "text")
        items += [{"text": text.strip(), "drawn_from": Path(name).stem} for text in texts]
    # The same order every time, so that a reader can stop and go on.
    random.Random(args.seed).shuffle(items)
    return items


def ask(question, low, high):
    """One answer from the terminal or a pipe: a number from low to high, "b" (back) or "q"."""
    while True:
        print(question, end=" ", flush=True)
        # The end of a pipe is the end of the ratings.
        answer = (sys.stdin.readline() or "q").strip().lower()
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
    before, done = len(rows), [(row["text"], row["drawn_from"]) for row in rows]
    # Two models that are close may have written the same.
    items = [item for item in passages_to_rate(args) if tuple(item.values()) not in done]
    print(f"{before} rated, {len(items)} to go. A number and Enter; b goes back, q ends.\n")
    while len(rows) < before + len(items):
        i = len(rows) - before
        print(f"----- {i + 1} of {len(items)}\n{items[i]['text']}\n")
        feeling, sense = ask("feeling, -2 very negative to 2 very positive:", -2, 2), ""
        if blind and isinstance(feeling, float):
            sense = ask("sense, 1 none to 5 all of it:", 1, 5)
        if "q" in (feeling, sense):
            print(f"\n{len(rows)} ratings are in {path}; the same command goes on from here")
            return
        if "b" in (feeling, sense):
            # The rating before this one is taken back, but none of an earlier session.
            del rows[max(before, len(rows) - 1):]
        else:
            rows.append({**items[i], "rating": feeling, "sense": sense})
        write_ratings(path, rows)
    if blind:
        print_ratings(args)
    else:
        print(f"\n{len(rows)} ratings are in {path}: python train.py --labels {path}")


# ---- what ratings say ---------------------------------------------------------------------

def mean_se(values):
    """(mean, standard error) of numbers; NaN where they are too few."""
    x = torch.as_tensor(values, dtype=torch.float64)
    return x.mean().item(), x.std().item() / len(x) ** 0.5 if len(x) > 1 else math.nan


def permutation_interval(a, b, times=10_000, seed=0):
    """How far apart the means of a and b may be by chance: the 95 % quantile of |difference|.

    All values are dealt into two heaps of these sizes at random, many times. A difference
    within this distance from 0 is none that was shown.
    """
    values = torch.tensor(a + b, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    # Each row of argsort is a random order of all values.
    order = torch.rand(times, len(values), generator=generator).argsort(1)
    one, two = values[order].split([len(a), len(b)], dim=1)
    return (one.mean(1) - two.mean(1)).abs().quantile(0.95).item()


def quadratic_kappa(a, b):
    """Agreement of two readers' ratings beyond chance, 1 if perfect (Cohen 1968)."""
    a, b = torch.tensor([a, b], dtype=torch.float64)
    # What the mean squared difference would be if the readers knew nothing of each other.
    expected = (a[:, None] - b).square().mean()
    return 1.0 if expected == 0 else float(1 - (a - b).square().mean() / expected)


def correlation(a, b):
    """Pearson's, of two lists."""
    return torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1].item()


def groups(rows, key):
    """{value: the rows that have it at key}, in the order of their first."""
    found = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def column(rows, key):
    """What the rows have at key, where they have something."""
    return [row[key] for row in rows if row.get(key) is not None]


def with_positive(checkpoint, rows):
    """Rows of ratings, each with its P(positive) if there is a reward model beside a checkpoint."""
    path = checkpoint.with_name("reward.pt")
    if not path.exists():
        return rows
    state = data.load_checkpoint(path, "reward")
    tokenizer = data.load_tokenizer(path.with_name("tokenizer.tiktoken"), state)
    ids = [tokenizer.encode_ordinary(row["text"]) for row in rows]
    p = in_chunks(reward.load_reward(state), reward.pad(ids, state["length"])).sigmoid()
    return [{**row, "positive": positive} for row, positive in zip(rows, p.tolist())]


def by_model(rows):
    """{drawn_from: its rows}, rho first."""
    rows = sorted(rows, key=lambda row: (row["drawn_from"] != "pretrain", row["drawn_from"]))
    return groups(rows, "drawn_from")


def print_ratings(args):
    """What one or two files of ratings say of each model, and what the readers share."""
    files = [read_ratings(path) for path in args.ratings]
    if not all(files):
        raise data.UserError("a file of ratings is empty. Rate something first: --rate.")
    rows = with_positive(args.checkpoint, sum(files, []))
    print_means(by_model(rows))
    print_differences(by_model(rows))
    positive = column(rows, "positive")
    if positive:
        found = correlation(column(rows, "rating"), positive)
        print(f"feeling and P(positive) correlate {found:.2f}")
    if len(files) == 2:
        print_agreement(*files)


def print_means(models):
    """The mean feeling, sense and P(positive) of each model's samples: a table."""
    rows = []
    for name, group in models.items():
        feeling, sense, positive = (mean_se(column(group, key))
                                    for key in ("rating", "sense", "positive"))
        rows.append((name, len(group), feeling, sense, positive[0]))
    print(*table(["drawn from", "ratings", "feeling, -2 to 2", "sense, 1 to 5", "P(positive)"],
                 rows), sep="\n")


def print_differences(models):
    """How far the feeling of each model is from the first's, and how far chance alone would go."""
    (first, base), *others = ((name, column(group, "rating")) for name, group in models.items())
    for name, ratings in others:
        gap = mean_se(ratings)[0] - mean_se(base)[0]
        chance = permutation_interval(ratings, base)
        print(f"{name} feels {gap:+.2f} from {first}, 95 % interval "
              f"{gap - chance:+.2f} to {gap + chance:+.2f}")


def print_agreement(one, two):
    """How far two readers agree on the passages that both rated."""
    ratings = {row["text"]: row["rating"] for row in two}
    both = [(row["rating"], ratings[row["text"]]) for row in one if row["text"] in ratings]
    if len(both) > 1:
        a, b = zip(*both)
        print(f"two readers of {len(both)} passages: quadratic kappa "
              f"{quadratic_kappa(a, b):.2f}, Pearson {correlation(a, b):.2f}")


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
    return f"{x:.3g}" if isinstance(x, float) else str(x)


def table(columns, rows):
    """A markdown table: lines of text."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(map(cell, line))} |" for line in lines] + [""]


# ---- the summary --------------------------------------------------------------------------

def load_study(out):
    """(pretrained, rewarded, judged, runs) of a folder; runs of this reward model only."""
    found = [data.load_checkpoint(out / f"{kind}.pt", kind)
             for kind in ("pretrain", "reward", "judge")]
    rho = data.load_checkpoint(out / "rho.pt", "rho")
    for name, state in (("reward", found[1]), ("judge", found[2])):
        state["constants"] = rho["constants"][name]
        state["rho"] = {"tokens": rho["tokens"], "log_odds": rho["log_odds"][name]}
    runs = []
    for path in out.glob("ppo_*beta*.pt"):
        if "_kl" in path.name or ".partial" in path.name:
            continue
        run = data.load_checkpoint(path, "ppo")
        if run["inputs"]["reward"] == data.digest(found[1]["model"]):
            runs.append(run)
        else:
            print(f"{path.name} is of another reward model and is left out")
    if not runs:
        raise data.UserError(f"{out} has no finished PPO run. Run train.py first.")
    return *found, sorted(runs, key=lambda run: (run["toward"], run["inputs"]["beta"]))


def scores_of(state, log_odds, toward):
    """The scores (N,) by a reward checkpoint of completions kept with their log-odds."""
    return reward.score(log_odds, **state["constants"][toward], toward=toward)


def rho_scores(state, toward):
    """The scores (N,) by a reward checkpoint of the samples of rho that it keeps."""
    return scores_of(state, state["rho"]["log_odds"], toward)


def pool(rewarded, run):
    """Scores (N,) of rho's and a run's fresh samples, and their log(rho/q), q the mixture."""
    rho, fresh = rewarded["rho"]["log_odds"], run["fresh"]
    # log pi - log rho of every sample: rho's own row is 0, for only the ratio matters.
    ratio = torch.cat((run["rho_log_ratio"], fresh["log_ratio"]))
    weights = ppo.mixture_log_weights(torch.stack((0 * ratio, ratio)),
                                      [len(rho), len(fresh["log_ratio"])])
    return scores_of(rewarded, torch.cat((rho, fresh["log_odds"])), run["toward"]), weights


def summarise_optimum(rewarded, run):
    """ppo.optimum at the beta of a run, what J* is at_least, and pareto_k; NaN if not known."""
    names = ("objective", "score", "ref_kl", "objective_se", "at_least", "pareto_k")
    best = {**dict.fromkeys(names, math.nan), "ess": 0.0}
    beta = run["beta"]
    # Without a penalty no policy is the best.
    if beta:
        scores, weights = pool(rewarded, run)
        found = ppo.optimum(scores, beta, weights)
        # Too few effective samples: no number, for it would be far too low.
        best |= found if found["ess"] >= MIN_ESS else {"ess": found["ess"]}
        best["at_least"] = ppo.optimum_bound(scores, beta, weights)
    return best


def summarise_run(rewarded, judged, run):
    """The entry of a run in summary.json: what its fresh samples say, beside the optimum."""
    fresh, toward, beta = run["fresh"], run["toward"], run["beta"]
    scores, kl = scores_of(rewarded, fresh["log_odds"], toward), fresh["ref_kl"]
    objective, se = mean_se(scores - beta * kl)
    rho = rho_scores(rewarded, toward).mean().item()
    best = summarise_optimum(rewarded, run)
    way = best["objective"] - rho
    fraction = (objective - rho) / way
    iterations = len(run["history"])
    return {"beta": beta, "toward": toward, "iterations": iterations,
            "score": scores.mean().item(),
            "judge": scores_of(judged, fresh["judge"], toward).mean().item(),
            "positive": fresh["log_odds"].sigmoid().mean().item(),
            "ref_kl": kl.mean().item(),
            "objective": objective, "objective_se": se, "reference_objective": rho,
            "optimum": best,
            "fraction_of_optimum": fraction,
            "fraction_se": math.hypot(se, fraction * best["objective_se"]) / way,
            "kl_to_optimum": (best["objective"] - objective) / (beta or math.nan),
            "seconds_per_iteration": run["seconds"] / max(iterations, 1)}


def summarise_reward(state):
    """The entry of a reward model in summary.json."""
    report = state["report"]
    reached = report.get("passages") or report["samples"]
    return {"labels": state["labels"], **state["constants"]["positive"],
            "val_pearson": reached["pearson"], "val_auc": reached["auc"],
            "val_log_loss": reached["log_loss"], "report": report,
            "reference_positive": state["rho"]["log_odds"].sigmoid().mean().item()}


def summarise(out, pretrained, rewarded, judged, runs):
    """summary.json as a dict."""
    texts = data.load_checkpoint(out / "data.pt", "data")
    stages = {"data": texts, "pretrain": pretrained, "reward": rewarded, "judge": judged}
    seconds = {name: state["seconds"] for name, state in stages.items()}
    ppo_seconds = {label(run): run["seconds"] for run in runs}
    total = sum(ppo_seconds.values()) + sum(seconds.values())
    summary = {"size": pretrained["args"]["size"], "device": pretrained["args"]["device"],
               "seconds": {**seconds, "ppo": ppo_seconds, "total": total},
               "reward": summarise_reward(rewarded), "judge": summarise_reward(judged),
               "pretrain": {key: pretrained[key] for key in ("parameters", "val_bits_per_byte")},
               "ppo": [summarise_run(rewarded, judged, run) for run in runs]}
    # JSON knows no NaN: what is not known is null there, None here.
    return json.loads(json.dumps(summary), parse_constant=lambda name: None)


def label(run):
    """How figures and tables call a run: 0.2, or negative 0.2."""
    return f"{run['toward']} {run['inputs']['beta']:g}".removeprefix("positive ")


# ---- figures: first the numbers, panel by panel -------------------------------------------

def draw_figure(path, panels):
    """Write panels (title, x label, y label, lines) as a PNG, three side by side.

    A line is (label, style, x, y), and standard errors of y where there are some.
    """
    columns, rows = min(len(panels), 3), math.ceil(len(panels) / 3)
    figure = Figure(figsize=(5.5 + 2.5 * columns, 3 + 2 * rows))
    for i, (title, xlabel, ylabel, lines) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, i)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.grid(alpha=0.3)
        for name, style, *points in lines:
            axis.errorbar(*points, fmt=style, capsize=2, markersize=8, label=name)
    figure.axes[0].legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    path.parent.mkdir(exist_ok=True)
    data.write_file(path, buffer.getvalue())


def drift_panels(title, lines, ylabel="score, deviations of rho's"):
    """The panel of a figure whose lines have KLs as x, shown by their root."""
    # Along the root scores at first grow in a straight line (Gao 2022).
    lines = [(name, style, torch.tensor(kls).clamp(min=0).sqrt(), *values)
             for name, style, kls, *values in lines]
    return [(title, "sqrt(KL to rho), KL in nats per completion", ylabel, lines)]


def logged(run, x, y):
    """What a run logged as x and as y, in the steps in which it logged y: two lists."""
    rows = [row for row in run["history"] if y in row]
    return column(rows, x), column(rows, y)


def frontier(rewarded, runs):
    """The optimum at many betas: ppo.optimum's dicts, from the samples of runs of one direction."""
    pools = [pool(rewarded, run) for run in runs]
    found = []
    for beta in torch.logspace(2, -2, 81).tolist():
        optima = [ppo.optimum(scores, beta, weights) for scores, weights in pools]
        # Of several runs' pools the one that knows this beta best.
        found.append(max(optima, key=lambda best: best["ess"]))
    return [best for best in found if best["ess"] >= MIN_ESS]


def frontier_panels(rewarded, runs, summary):
    """Score against drift: the paths of PPO, best-of-n, and what no policy can be above."""
    lines = []
    for toward, group in groups(runs, "toward").items():
        style = "-" if toward == "positive" else "--"
        best = frontier(rewarded, group)
        rho = rho_scores(rewarded, toward)
        scores, kls = zip(*(ppo.best_of_n(rho, 2 ** k) for k in range(9)))
        lines += [(f"optimum, {toward}: no policy is above; stars: of these betas", f"k{style}",
                   column(best, "ref_kl"), column(best, "score")),
                  ("best of 1, 2, 4 ... 256 samples of rho (KL at most)", f"C7.{style}",
                   kls, scores)]
    for i, (run, row) in enumerate(zip(runs, summary["ppo"])):
        lines.append((f"PPO, beta {label(run)}", f"C{i}.-", *logged(run, "exact_kl", "score")))
        # Where it ended, and where it could have: nowhere, if that is not known.
        for marker, end in (("o", row), ("*", row["optimum"])):
            lines.append((None, f"C{i}{marker}", column([end], "ref_kl"), column([end], "score")))
    return drift_panels("How much score for how much drift?", lines)


def judge_panels(rewarded, judged, runs):
    """Score by the reward model and by the judge that was not optimised, against drift."""
    lines = []
    for i, run in enumerate(runs):
        kls, scores = logged(run, "exact_kl", "score")
        # If the two correlate c on rho, a gain of s by one is c s by the other without cheating.
        c = correlation(*(rho_scores(state, run["toward"]).tolist()
                          for state in (rewarded, judged)))
        lines += [(f"reward model, beta {label(run)}", f"C{i}-", kls, scores),
                  ("judge", f"C{i}--", *logged(run, "exact_kl", "judge")),
                  (f"what correlation {c:.2f} implies", f"C{i}:", kls, [c * s for s in scores])]
    return drift_panels("Does a judge who was not optimised agree?", lines)


def training_panels(runs):
    """What PPO logs, against iteration: J with J*, drift, and the signs of collapse."""
    titles = {"objective": "objective J, dotted: J* from rho's samples",
              "exact_kl": "drift, nats per completion",
              "policy_loss": "train loss: the clipped surrogate",
              "clipfrac": "clip fraction, share of tokens",
              "explained_variance": "explained variance",
              "entropy": "entropy, nats per token",
              "distinct_2": "distinct pairs of tokens, share",
              "ref_logprob": "log rho of the samples, nats per token",
              "positive": "P(positive)"}
    panels = []
    for key, title in titles.items():
        lines = [(f"beta {label(run)}", f"C{i}", *logged(run, "step", key))
                 for i, run in enumerate(runs)]
        if key == "objective":
            lines += [(None, f"C{i}:", *logged(run, "step", "best")) for i, run in enumerate(runs)]
        panels.append((title, "iteration", "", lines))
    return panels


def reward_panels(rewarded, judged, pretrained):
    """Is P(positive) what it says, on held-out ratings? And how pretraining went."""
    panels = []
    for name, state in (("reward model", rewarded), ("judge", judged)):
        lines = [("perfect", "k:", [0.2, 0.8], [0.2, 0.8])]
        for kind, found in state["report"].items():
            p, target, se, _ = zip(*found["reliability"])
            lines.append((f"{found['n']} {kind}", "o-", p, target, se))
        panels.append((f"Reliability of the {name}", "mean P(positive) of a tenth",
                       "mean (rating + 2) / 4 of that tenth", lines))
    loss = (None, "-", *logged(pretrained, "step", "loss"))
    return [*panels, ("Pretraining", "step", "loss, nats per token", [loss])]


def along_drift(rows):
    """{run: {KL: ratings}} of rho, at 0, and of each policy that a run kept, at its mark."""
    models, runs = by_model(rows), {}
    rho = models.pop("pretrain", [])
    for name, group in models.items():
        run, _, mark = name.partition("_kl")
        points = runs.setdefault(run, {0.0: rho})
        # How far the policy at the end of a run is, its name does not say.
        if mark:
            points[float(mark)] = group
    return runs


def reader_panels(rows):
    """What readers say along the drift: feeling, sense, P(positive), in the same unit 0 to 1."""
    scales = {"rating": ("readers' feeling", "o-", -2, 2),
              "positive": ("P(positive)", "s--", 0, 1),
              "sense": ("readers' sense", "^:", 1, 5)}
    lines = []
    for i, (run, points) in enumerate(along_drift(rows).items()):
        kls = sorted(points)
        for key, (what, style, low, high) in scales.items():
            found = torch.tensor([mean_se(column(points[kl], key)) for kl in kls])
            means, errors = found.T / (high - low)
            lines.append((f"{what}, {run.removeprefix('ppo_')}", f"C{i}{style}",
                          kls, means - low / (high - low), errors))
    return drift_panels("Where the reward model and readers part", lines, ylabel="from 0 to 1")


# ---- the report ---------------------------------------------------------------------------

def results_table(summary):
    """What each run reached, and its optimum: lines of a markdown table."""
    rows = []
    for row in summary["ppo"]:
        best = row["optimum"]
        rows.append((f"{row['beta']:.3g} {row['toward']}".removesuffix(" positive"),
                     row["score"], row["judge"], row["positive"], row["ref_kl"],
                     (row["objective"], row["objective_se"]),
                     (best["objective"], best["objective_se"]),
                     best["at_least"],
                     round(best["ess"]), best["pareto_k"],
                     (row["fraction_of_optimum"], row["fraction_se"]),
                     row["kl_to_optimum"]))
    return table(["beta", "score", "judge", "P(positive)", "ref_kl", "J", "J*", "J* at least",
                  "ESS", "k-hat", "fraction of optimum", "KL(pi to pi*)"], rows)


def best_of_n_table(rewarded, runs):
    """Best of n samples of rho, the yardstick that needs no training: score, KL, J by beta."""
    lines = []
    for toward, group in groups(runs, "toward").items():
        betas, rows = [run["inputs"]["beta"] for run in group], []
        for n in (1, 4, 16, 64, 256):
            score, kl = ppo.best_of_n(rho_scores(rewarded, toward), n)
            rows.append((n, score, kl, *(score - beta * kl for beta in betas)))
        lines += table([f"best of n, {toward}", "score", "KL at most",
                        *(f"J at beta {beta:g}" for beta in betas)], rows)
    return lines


def measures(name, state):
    """How well a reward model predicts held-out ratings: lines of markdown."""
    keys = ["n", "pearson", "pearson_se", "auc", "log_loss", "constant_log_loss"]
    rows = [(kind, *(found[key] for key in keys)) for kind, found in state["report"].items()]
    return [f"## The {name} model on ratings that it was not trained on", "",
            *table(["of", *keys], rows)]


def write_samples(path, tokenizer, rewarded, toward, pool, n=20):
    """Write the first n completions of a pool of them into a text file; returns their texts."""
    scores = scores_of(rewarded, pool["log_odds"], toward)
    kls = pool.get("ref_kl", torch.zeros(n))
    texts = []
    for tokens, log_odds, score, kl in zip(pool["tokens"][:n], pool["log_odds"], scores, kls):
        texts.append(as_text({"text": data.decode(tokenizer, tokens.tolist()),
                              "positive": log_odds.sigmoid(), "score": score, "ref_kl": kl}))
    path.parent.mkdir(exist_ok=True)
    data.write_file(path, f"\n\n{'-' * 60}\n\n".join(texts) + "\n")
    return texts


def table_along_kl(path, run, args):
    """Each policy that a run, its file at path, kept along its drift: lines of a markdown table."""
    rows = []
    for mark, kept in kept_along_kl(path).items():
        step = next(row for row in run["history"] if row["exact_kl"] >= mark)
        text = draw(kept, args, 1)[0]["text"]
        rows.append((mark, step["score"], step["positive"], step["distinct_2"],
                     text.replace("\n", " / ").replace("|", "")))
    return table(["KL", "score", "P(positive)", "distinct pairs of tokens", "a sample"], rows)


def write_report(args):
    """figures/*.png, samples/*.txt, summary.json and report.md of a finished study."""
    out = args.report
    study = pretrained, rewarded, judged, runs = load_study(out)
    tokenizer = data.load_tokenizer(out / "tokenizer.tiktoken", pretrained)
    summary = summarise(out, *study)
    data.write_file(out / "summary.json", json.dumps(summary, indent=1))
    figures = {"frontier": frontier_panels(rewarded, runs, summary),
               "judge": judge_panels(rewarded, judged, runs),
               "ppo": training_panels(runs),
               "reward": reward_panels(rewarded, judged, pretrained)}
    if args.ratings:
        rows = [row for path in args.ratings for row in read_ratings(path)]
        figures["readers"] = reader_panels(with_positive(out / "pretrain.pt", rows))
    for name, panels in figures.items():
        draw_figure(out / f"figures/{name}.png", panels)

    results = results_table(summary)
    print("", *results, sep="\n")
    lines = ["# Report of one study", "",
             f"Size {summary['size']} on {summary['device']}, seed {pretrained['args']['seed']}: "
             f"{summary['pretrain']['val_bits_per_byte']:.3f} bits per byte on held-out plays; "
             f"P(positive) of rho {summary['reward']['reference_positive']:.3f}.", "", *results,
             "Measured on fresh samples, ± one standard error; KL in nats per completion. The "
             "optimum J* is estimated from samples of rho and of the policy; where its effective "
             f"sample size (ESS) is below {MIN_ESS}, it is not quoted, only what it is at least, "
             "with 95 % certainty. judge: the score by a second reward model, for which nothing "
             "was optimised.", "",
             *best_of_n_table(rewarded, runs),
             *(f"![{name}](figures/{name}.png)\n" for name in figures),
             *measures("reward", rewarded), *measures("judge", judged)]
    before = write_samples(out / "samples/rho.txt", tokenizer, rewarded, "positive",
                           rewarded["rho"])
    for run in runs:
        name = train.run_name(run["toward"], run["inputs"]["beta"])
        after = write_samples(out / f"samples/{name}.txt", tokenizer, rewarded, run["toward"],
                              run["fresh"])
        pairs = [f"===== before\n{old}\n\n===== after, beta {label(run)}\n{new}\n"
                 for old, new in zip(before[:2], after)]
        print("", *pairs, sep="\n", end="")
        lines += [f"## {name}: before and after", "", "```", *pairs, "```", ""]
        path = out / f"{name}.pt"
        if kept_along_kl(path):
            lines += [f"## {name} along its drift", "", *table_along_kl(path, run, args)]
    data.write_file(out / "report.md", "\n".join(lines))
    print(f"\n{out / 'report.md'} has the figures and more samples")


# ---- the command line ---------------------------------------------------------------------

def parse():
    """The options; what is out of range is answered with one line."""
    count = data.number(int, 1)
    parser = data.Parser(description=__doc__.split("\n")[0], formatter_class=data.argparse.HelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="out/pretrain.pt", type=Path,
        help="pretrain.pt or ppo_beta*.pt, in the folder that train.py wrote")
    add("--kl", type=float, metavar="NATS",
        help="the policy as it was when its drift first passed so many nats")
    add("--num", type=count, help="how many samples (5, or 20 to rate)")
    add("--length", type=count, default=64, help="tokens of each")
    add("--prompt", default="", help="text to continue; empty: as a speech begins")
    add("--temperature", type=data.number(float, 0), default=1.0,
        help="below 1 plays safe, 0 always takes the likeliest token")
    add("--top-k", type=count,
        help="draw from the k likeliest tokens only (unset: from all, as in training)")
    add("--seed", type=data.number(int, 0, 2**31), default=0,
        help="the same seed gives the same samples")
    add("--best-of", type=count, default=1, metavar="N",
        help="of N samples show the one that the reward model likes best")
    add("--compare", action="store_true",
        help="show rho's samples and those of the twin as well, side by side")
    add("--jsonl", action="store_true", help="one JSON object a line")
    add("--rate", nargs="+", metavar="CHECKPOINT",
        help="take your ratings of their samples: several, shuffled and blind; one, or plays: "
             "labels")
    add("--ratings", nargs="+", type=Path, metavar="FILE.csv",
        help="the file of your ratings; without --rate, what one or two files say")
    add("--report", type=Path, metavar="DIR",
        help="draw figures, report.md and summary.json of a study again")
    args = parser.parse_args()
    args.num = args.num or (20 if args.rate else 5)
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
