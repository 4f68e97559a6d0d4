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

import matplotlib
import torch

import data
import ppo
import reward
import train
from gpt import completion_logits, generate, in_chunks, load_gpt

matplotlib.use("Agg")        # figures go to files; no screen is needed
from matplotlib import pyplot as plt  # noqa: E402

MIN_ESS = 100   # effective samples below which an optimum is only a lower bound
COLUMNS = ["text", "rating", "sense", "drawn_from"]     # of a file of ratings


# ---- samples ------------------------------------------------------------------------------

def load(path):
    """(GPT, its checkpoint, tokenizer) of a checkpoint file and the tokenizer beside it."""
    state = data.load_checkpoint(path, "pretrain", "ppo")
    tokenizer = data.load_tokenizer(path.with_name("tokenizer.tiktoken"), state)
    return load_gpt(state), state, tokenizer


def beside(path, state, kind):
    """The pretrain or reward checkpoint in the folder of a checkpoint, or None if there is none.

    UserError unless they belong together.
    """
    file = path.with_name(f"{kind}.pt")
    if not file.exists():
        return None
    found = data.load_checkpoint(file, kind)
    if state["kind"] == "ppo":
        same = state["inputs"][kind] == data.digest(found["model"])
    else:
        same = found["inputs"]["pretrain"] == data.digest(state["model"])
    # Files of two studies may lie in one folder after a change of options.
    if not same:
        raise data.UserError(f"{file} and {path} are not of the same study. Run train.py again.")
    return found


def marks_of(path):
    """The marks of its drift, in nats, at which the run of a checkpoint kept its policy."""
    kept = path.parent.glob(f"{path.stem}_kl*.pt")
    return sorted(float(file.stem.split("_kl")[1]) for file in kept)


def kept_at(path, kl):
    """The file of the policy that the run of a checkpoint kept at this mark of its drift."""
    kept = path.with_name(f"{path.stem}_kl{kl:g}.pt")
    if not kept.exists():
        known = ", ".join(f"{mark:g}" for mark in marks_of(path)) or "no mark at all"
        raise data.UserError(f"{path} was not kept at {kl:g} nats. It passed {known}.")
    return kept


@torch.no_grad()
def draw(path, args, num):
    """num samples of a checkpoint: dicts of text, positive (None without a reward model), ref_kl.

    Of each args.best_of samples the one that the reward model likes best.
    """
    model, state, tokenizer = load(path)
    rewarded, rho = beside(path, state, "reward"), None
    judge = rewarded and reward.load_reward(rewarded)
    if state["kind"] == "ppo":
        base = beside(path, state, "pretrain")
        rho = base and load_gpt(base)
    if judge is None and args.best_of > 1:
        raise data.UserError("--best-of needs the reward model, and "
                             f"{path.with_name('reward.pt')} is not there. Run train.py first.")
    ids = tokenizer.encode_ordinary(args.prompt or data.BOUNDARY[:2])
    ids = ids if args.prompt else ids[:1]
    if len(ids) + args.length > model.config.block_size:
        raise data.UserError(f"a prompt of {len(ids)} tokens and --length {args.length} do not fit "
                             f"the context of {model.config.block_size} tokens. Shorten either.")
    prompt = torch.tensor([ids])
    skip = 0 if args.prompt else 1      # an unprompted sample is read without the boundary
    # One at a time, so that the first samples do not depend on how many are drawn.
    generator = torch.Generator().manual_seed(args.seed)
    samples = []
    for _ in range(num):
        tokens = generate(model, prompt.expand(args.best_of, -1), args.length, args.temperature,
                          args.top_k, generator)
        p = judge(tokens[:, skip:]).sigmoid() if judge else torch.zeros(len(tokens))
        best = tokens[p.argmax()]
        new, kl = best[None, len(ids):], None
        if rho:
            logp, ref = (ppo.token_logprobs(completion_logits(m, prompt, new), new).sum().item()
                         for m in (model, rho))
            kl = logp - ref
        samples.append({"text": tokenizer.decode(best[skip:].tolist()),
                        "positive": p.max().item() if judge else None, "ref_kl": kl})
    return samples


def print_samples(args):
    """Samples of one checkpoint; with --compare those of rho and of the twin between them."""
    path = args.checkpoint if args.kl is None else kept_at(args.checkpoint, args.kl)
    paths = [path]
    if args.compare:
        beta = path.stem.split("beta")[-1]
        twins = [path.with_name(train.run_name(toward, 0)[:-1] + f"{beta}.pt")
                 for toward in ("positive", "negative")]
        paths = [path.with_name("pretrain.pt"), *(p for p in twins if p.exists())]
        if len(paths) < 2 or not paths[0].exists():
            raise data.UserError("--compare needs a ppo checkpoint with its pretrain.pt beside it.")
    for number, together in enumerate(zip(*(draw(p, args, args.num) for p in paths)), 1):
        for p, sample in zip(paths, together):
            if args.jsonl:
                name = {"model": p.stem} if args.compare else {}
                print(json.dumps({**sample, **name}, ensure_ascii=False))
                continue
            said = []
            if sample["positive"] is not None:
                said.append(f"Positive Prob: {100 * sample['positive']:.1f}%")
            if sample["ref_kl"] is not None:
                said.append(f"KL: {sample['ref_kl']:.1f} nats")
            print(f"----- {number} {p.stem if args.compare else ''}".rstrip()
                  + f"\n{sample['text']}\n\n{'   '.join(said)}\n")


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


def passages_of_plays(args, num):
    """num passages of the training plays, one or more speeches of about --length tokens each."""
    speeches = data.load_corpus()[0].split(data.BOUNDARY)
    generator, passages = random.Random(args.seed), []
    for start in (generator.randrange(len(speeches) - 20) for _ in range(num)):
        end = start + 1
        while len(data.BOUNDARY.join(speeches[start:end])) < 2.5 * args.length:
            end += 1
        passages.append({"text": data.BOUNDARY.join(speeches[start:end])})
    return passages


def ask(question, low, high):
    """One answer from the terminal or a pipe: a number from low to high, "b" (back) or "q"."""
    while True:
        print(question, end=" ", flush=True)
        line = sys.stdin.readline()
        answer = line.strip().lower()
        if not line or answer == "q":
            return "q"              # the end of a pipe is the end of the ratings
        if answer == "b":
            return "b"
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
    items = []
    for name in args.rate:
        passages = (passages_of_plays(args, args.num) if name == "plays"
                    else draw(Path(name), args, args.num))
        items += [{"text": p["text"].strip(), "drawn_from": Path(name).stem} for p in passages]
    # The same order every time, so that a reader can stop and go on.
    random.Random(args.seed).shuffle(items)
    done = {row["text"] for row in rows}
    items = [item for item in items if item["text"] not in done]
    print(f"{len(rows)} rated, {len(items)} to go. A number and Enter; b goes back, q ends.\n")
    i = 0
    while i < len(items):
        print(f"----- {i + 1} of {len(items)}\n{items[i]['text']}\n")
        answers = [ask("feeling, -2 very negative to 2 very positive:", -2, 2)]
        if blind and isinstance(answers[0], float):
            answers.append(ask("sense, 1 none to 5 all of it:", 1, 5))
        if answers[-1] == "q":
            break
        # Takes back the rating before this one.
        if answers[-1] == "b":
            if i:
                i -= 1
                rows.pop()
                write_ratings(path, rows)
            continue
        rows.append({**items[i], "rating": answers[0], "sense": answers[1] if blind else ""})
        write_ratings(path, rows)
        i += 1
    if i < len(items):
        print(f"\n{len(rows)} ratings are in {path}; the same command goes on from here")
    elif blind:
        print_ratings(args)
    else:
        print(f"\n{len(rows)} ratings are in {path}: python train.py --labels {path}")


def mean_se(values):
    """(mean, standard error) of a list of numbers."""
    x = torch.tensor(values, dtype=torch.float64)
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
    dealt = values[order]
    differences = dealt[:, :len(a)].mean(1) - dealt[:, len(a):].mean(1)
    return differences.abs().quantile(0.95).item()


def quadratic_kappa(a, b):
    """Agreement of two readers' ratings beyond chance, 1 if perfect (Cohen 1968)."""
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    # What the mean squared difference would be if the readers knew nothing of each other.
    expected = (a[:, None] - b).square().mean()
    return 1.0 if expected == 0 else float(1 - (a - b).square().mean() / expected)


def correlation(a, b):
    """Pearson's, of two lists."""
    return torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1].item()


def groups(rows):
    """{drawn_from: its rows}, rho first."""
    names = sorted({row["drawn_from"] for row in rows}, key=lambda name: (name != "pretrain", name))
    return {name: [row for row in rows if row["drawn_from"] == name] for name in names}


def print_ratings(args):
    """The table of one or two files of ratings: each model's means, and what the readers share."""
    files = [read_ratings(path) for path in args.ratings]
    if not all(files):
        raise data.UserError("a file of ratings is empty. Rate something first: --rate.")
    rows = [row for file in files for row in file]
    p = probabilities(args.checkpoint, rows)
    lines = []
    for name, group in groups(rows).items():
        feeling, sense = mean_se([r["rating"] for r in group]), None
        if all(r["sense"] is not None for r in group):
            sense = mean_se([r["sense"] for r in group])
        known = [p[r["text"]] for r in group if r["text"] in p]
        said = ["%.2f ± %.2f" % x if x else "" for x in (feeling, sense)]
        lines.append((name, len(group), *said, sum(known) / len(known) if known else None))
    print(*table(["drawn from", "ratings", "feeling, -2 to 2", "sense, 1 to 5", "P(positive)"],
                 lines), sep="\n")
    first, *others = groups(rows).items()
    for name, group in others:
        a, b = ([r["rating"] for r in g] for g in (group, first[1]))
        gap = mean_se(a)[0] - mean_se(b)[0]
        print(f"{name} feels {gap:+.2f} from {first[0]}, 95 % interval "
              f"{gap - permutation_interval(a, b):+.2f} to {gap + permutation_interval(a, b):+.2f}")
    if p:
        pairs = [(r["rating"], p[r["text"]]) for r in rows]
        print(f"feeling and P(positive) correlate {correlation(*zip(*pairs)):.2f}")
    if len(files) == 2:
        one, two = ({row["text"]: row["rating"] for row in file} for file in files)
        both = [text for text in one if text in two]
        if len(both) > 1:
            a, b = [one[text] for text in both], [two[text] for text in both]
            print(f"two readers of {len(both)} passages: quadratic kappa "
                  f"{quadratic_kappa(a, b):.2f}, Pearson {correlation(a, b):.2f}")


def probabilities(checkpoint, rows):
    """{text: P(positive)} by the reward model beside a checkpoint; {} if there is none."""
    path = checkpoint.with_name("reward.pt")
    if not path.exists():
        return {}
    state = data.load_checkpoint(path, "reward")
    tokenizer = data.load_tokenizer(path.with_name("tokenizer.tiktoken"), state)
    texts = list({row["text"] for row in rows})
    tokens = reward.pad([tokenizer.encode_ordinary(text) for text in texts], state["length"])
    return dict(zip(texts, in_chunks(reward.load_reward(state), tokens).sigmoid().tolist()))


def table(columns, rows):
    """A markdown table: lines of text."""
    cells = [["" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in row]
             for row in (columns, ["---"] * len(columns), *rows)]
    return [f"| {' | '.join(row)} |" for row in cells] + [""]


# ---- the report ---------------------------------------------------------------------------

def load_study(out):
    """(pretrained, rewarded, judged, runs) of a folder; runs of this reward model only."""
    found = [data.load_checkpoint(out / f"{kind}.pt", kind)
             for kind in ("pretrain", "reward", "judge")]
    runs = []
    for path in out.glob("ppo_*beta*.pt"):
        if "_kl" in path.stem or ".partial" in path.name:
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


def pool(rewarded, run):
    """Scores (N,) of rho's and a run's fresh samples, and their log(rho/q), q the mixture."""
    fresh = run["fresh"]
    log_odds = torch.cat((rewarded["rho"]["log_odds"], fresh["log_odds"]))
    # log pi - log rho of every sample: rho's own row is 0, for only the ratio matters.
    # Samples of rho first, then the policy's, as their log-odds above.
    ratio = torch.cat((run["rho_log_ratio"], fresh["log_ratio"]))
    counts = [len(run["rho_log_ratio"]), len(fresh["log_ratio"])]
    weights = ppo.mixture_log_weights(torch.stack((torch.zeros_like(ratio), ratio)), counts)
    return scores_of(rewarded, log_odds, run["toward"]), weights


def summarise_run(pretrained, rewarded, judged, run):
    """The entry of a run in summary.json: what its fresh samples say, beside the optimum."""
    fresh, toward, beta = run["fresh"], run["toward"], run["beta"]
    scores, kl = scores_of(rewarded, fresh["log_odds"], toward), fresh["ref_kl"]
    objective, se = mean_se((scores - beta * kl).tolist())
    rho = scores_of(rewarded, rewarded["rho"]["log_odds"], toward).mean().item()
    best = {"objective": None, "score": None, "ref_kl": None, "ess": 0.0, "objective_se": None,
            "pareto_k": None}
    if beta:
        samples, weights = pool(rewarded, run)
        best = ppo.optimum(samples, beta, weights)
        k = ppo.pareto_k(weights + samples / beta)
        best["pareto_k"] = None if math.isnan(k) else k     # JSON knows no NaN
    known = best["ess"] >= MIN_ESS
    fraction = fraction_se = None
    if known:
        fraction = (objective - rho) / (best["objective"] - rho)
        fraction_se = math.hypot(se, fraction * best["objective_se"]) / (best["objective"] - rho)
    return {"beta": beta, "toward": toward, "iterations": len(run["history"]),
            "score": scores.mean().item(),
            "judge": scores_of(judged, fresh["judge"], toward).mean().item(),
            "positive": fresh["log_odds"].sigmoid().mean().item(), "ref_kl": kl.mean().item(),
            "objective": objective, "objective_se": se, "reference_objective": rho,
            # Too few effective samples: no number, for it would be far too low.
            "optimum": {key: x if known or key in ("ess", "pareto_k") else None
                        for key, x in best.items()},
            "fraction_of_optimum": fraction, "fraction_se": fraction_se,
            "kl_to_optimum": (best["objective"] - objective) / beta if known else None,
            "seconds_per_iteration": run["seconds"] / max(len(run["history"]), 1)}


def summarise(out, pretrained, rewarded, judged, runs):
    """summary.json as a dict."""
    seconds = {"data": data.load_checkpoint(out / "data.pt", "data")["seconds"],
               "pretrain": pretrained["seconds"], "reward": rewarded["seconds"],
               "judge": judged["seconds"],
               "ppo": {label(run): run["seconds"] for run in runs}}
    seconds["total"] = sum(seconds["ppo"].values()) + sum(
        x for key, x in seconds.items() if key != "ppo")
    about = {}
    for name, state in (("reward", rewarded), ("judge", judged)):
        reached = state["report"].get("passages") or state["report"]["samples"]
        about[name] = {"labels": state["labels"], **state["constants"]["positive"],
                       "val_pearson": reached["pearson"], "val_auc": reached["auc"],
                       "val_log_loss": reached["log_loss"], "report": state["report"],
                       "reference_positive": state["rho"]["log_odds"].sigmoid().mean().item()}
    return {"size": pretrained["args"]["size"], "device": pretrained["args"]["device"],
            "seconds": seconds, **about,
            "pretrain": {key: pretrained[key] for key in ("parameters", "val_bits_per_byte")},
            "ppo": [summarise_run(pretrained, rewarded, judged, run) for run in runs]}


def label(run):
    """How figures and tables call a run: 0.2, or negative 0.2."""
    beta = f"{run['inputs']['beta']:g}"
    return beta if run["toward"] == "positive" else f"{run['toward']} {beta}"


def root(kls):
    """sqrt of KLs: along it, scores at first grow in a straight line (Gao 2022)."""
    return [max(kl, 0.0) ** 0.5 for kl in kls]


def column(run, key):
    """A metric of every iteration of a run."""
    return [row[key] for row in run["history"] if key in row]


def save_figure(figure, path):
    """Write a figure as a PNG, whole."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    data.write_file(path, buffer.getvalue())


def draw_frontier(path, rewarded, runs, summary):
    """Score against drift: the paths of PPO, best-of-n, and what no policy can be above."""
    figure, axis = plt.subplots(figsize=(8, 5.5))
    pools = [(run["toward"], *pool(rewarded, run)) for run in runs]
    for toward in dict.fromkeys(run["toward"] for run in runs):
        style = "-" if toward == "positive" else "--"
        frontier = []
        for beta in (10 ** (e / 20) for e in range(40, -40, -1)):
            found = [ppo.optimum(scores, beta, weights) for t, scores, weights in pools
                     if t == toward]
            # Of several runs' pools the one that knows this beta best.
            best = max(found, key=lambda o: o["ess"])
            if best["ess"] >= MIN_ESS:
                frontier.append((best["ref_kl"], best["score"]))
        kls, scores = zip(*frontier)
        axis.plot(root(kls), scores, "k" + style, label=f"optimum, {toward}: no policy is above")
        rho = scores_of(rewarded, rewarded["rho"]["log_odds"], toward)
        scores, kls = zip(*(ppo.best_of_n(rho, 2 ** k) for k in range(9)))
        axis.plot(root(kls), scores, "C7s" + style, markersize=3,
                  label="best of 1, 2, 4 ... 256 samples of rho (KL at most)")
    for i, (run, row) in enumerate(zip(runs, summary["ppo"])):
        axis.plot(root(column(run, "exact_kl")), column(run, "score"), f"C{i}.-", alpha=0.6,
                  label=f"PPO, beta {label(run)}")
        axis.plot(root([row["ref_kl"]]), [row["score"]], f"C{i}o", markersize=9)
        if row["fraction_of_optimum"]:
            best = row["optimum"]
            axis.plot(root([best["ref_kl"]]), [best["score"]], f"C{i}*", markersize=14,
                      label=f"optimum of beta {label(run)}")
    axis.set(title="How much score for how much drift?", ylabel="score, deviations of rho's",
             xlabel="sqrt(KL to rho), KL in nats per completion")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def draw_judge(path, rewarded, judged, runs):
    """Score by the reward model and by the judge that was not optimised, against drift."""
    figure, axis = plt.subplots(figsize=(8, 5))
    # If the two correlate c on rho, a gain of s by one is c s by the other without any cheating.
    rho = [state["rho"]["log_odds"] for state in (rewarded, judged)]
    for i, run in enumerate(runs):
        kls, proxy = root(column(run, "exact_kl")), column(run, "score")
        ours, theirs = (scores_of(state, x, run["toward"])
                        for state, x in zip((rewarded, judged), rho))
        c = correlation(ours.tolist(), theirs.tolist())
        axis.plot(kls, proxy, f"C{i}-", label=f"reward model, beta {label(run)}")
        axis.plot(kls, column(run, "judge"), f"C{i}--", label="judge")
        axis.plot(kls, [c * s for s in proxy], f"C{i}:", label=f"what correlation {c:.2f} implies")
    axis.set(title="Does a judge who was not optimised agree?", ylabel="score, deviations of rho's",
             xlabel="sqrt(KL to rho), KL in nats per completion")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def draw_training(path, runs):
    """What PPO logs, against iteration: J with J*, drift, and the signs of collapse."""
    panels = {"objective": "objective J, dotted: J* from rho's samples", "exact_kl": "drift, nats "
              "per completion", "policy_loss": "train loss: the clipped surrogate", "clipfrac":
              "clip fraction, share of tokens", "explained_variance": "explained variance",
              "entropy": "entropy, nats per token", "distinct_2": "distinct pairs of tokens, share",
              "ref_logprob": "log rho of the samples, nats per token", "positive": "P(positive)"}
    figure, axes = plt.subplots(3, 3, figsize=(13, 9))
    for axis, (key, title) in zip(axes.flat, panels.items()):
        for i, run in enumerate(runs):
            axis.plot(column(run, "step"), column(run, key), f"C{i}", label=f"beta {label(run)}")
            if key == "objective" and run["inputs"]["beta"]:
                axis.plot(column(run, "step"), column(run, "best"), f"C{i}:")
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    save_figure(figure, path)


def draw_reliability(path, rewarded, judged, pretrained):
    """Is P(positive) what it says, on held-out ratings? And how pretraining went."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for axis, name, state in zip(axes, ("reward model", "judge"), (rewarded, judged)):
        for kind, found in state["report"].items():
            p, target, se, _ = zip(*found["reliability"])
            axis.errorbar(p, target, se, fmt="o-", capsize=3, label=f"{found['n']} {kind}")
        axis.plot([0.2, 0.8], [0.2, 0.8], "k:", label="perfect")
        axis.set(title=f"Reliability of the {name}", xlabel="mean P(positive) of a tenth",
                 ylabel="mean (rating + 2) / 4 of that tenth")
        axis.legend(fontsize=8)
    axes[2].plot(column(pretrained, "step"), column(pretrained, "loss"))
    axes[2].set(title="Pretraining", xlabel="step", ylabel="loss, nats per token")
    save_figure(figure, path)


def draw_readers(path, rows, p):
    """What readers say along the drift: feeling, sense, P(positive), in the same unit 0 to 1."""
    figure, axis = plt.subplots(figsize=(8, 5))
    paths = {}
    for name, group in groups(rows).items():
        stem, _, mark = name.partition("_kl")
        kl = 0.0 if name == "pretrain" else float(mark or "nan")
        found = [[(r["rating"] + 2) / 4 for r in group], [p[r["text"]] for r in group if p],
                 [(r["sense"] - 1) / 4 for r in group if r["sense"]]]
        paths.setdefault(stem, []).append((kl, *(mean_se(x) if x else (math.nan, 0)
                                                 for x in found)))
    start = paths.pop("pretrain", [])
    for i, (stem, points) in enumerate(paths.items()):
        kls, *found = zip(*sorted(start + points))
        for values, style, what in zip(found, ("o-", "s--", "^:"),
                                       ("readers' feeling", "P(positive)", "readers' sense")):
            means, errors = zip(*values)
            axis.errorbar(root(kls), means, errors, fmt=f"C{i}{style}", capsize=2,
                          label=f"{what}, {stem.replace('ppo_', '')}")
    axis.set(title="Where the reward model and readers part", ylabel="from 0 to 1",
             xlabel="sqrt(KL to rho), KL in nats per completion")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def sample_texts(tokenizer, rewarded, toward, pool, n=20):
    """n completions of a pool of them, each with what the reward model says and its KL."""
    texts = []
    kls = pool.get("ref_kl", torch.zeros(n))
    scores = scores_of(rewarded, pool["log_odds"], toward)
    for tokens, log_odds, score, kl in zip(pool["tokens"][:n], pool["log_odds"], scores, kls):
        texts.append(f"{tokenizer.decode(tokens.tolist())}\n\nPositive Prob: "
                     f"{100 * log_odds.sigmoid():.1f}%   Score: {score:.2f}   KL: {kl:.1f} nats")
    return texts


def strip_along_kl(out, run, args):
    """A sample of each policy that a run kept along its drift: rows of a table."""
    path, rows = out / f"{train.run_name(run['toward'], run['inputs']['beta'])}.pt", []
    for mark in marks_of(path):
        samples = draw(kept_at(path, mark), args, 8)
        texts = [sample["text"] for sample in samples]
        words = [text.split() for text in texts]
        pairs = [pair for row in words for pair in zip(row, row[1:])]
        p = sum(sample["positive"] for sample in samples) / len(samples)
        text = " / ".join(texts[0].split("\n")).replace("|", "")
        rows.append((mark, p, len(set(pairs)) / max(len(pairs), 1), text))
    return rows


def write_report(args):
    """figures/*.png, samples/*.txt, summary.json and report.md of a finished study."""
    out = args.report
    study = pretrained, rewarded, judged, runs = load_study(out)
    tokenizer = data.load_tokenizer(out / "tokenizer.tiktoken", pretrained)
    for name in ("figures", "samples"):
        (out / name).mkdir(exist_ok=True)
    summary = summarise(out, *study)
    data.write_file(out / "summary.json", json.dumps(summary, indent=1))
    figures = out / "figures"
    draw_frontier(figures / "frontier.png", rewarded, runs, summary)
    draw_judge(figures / "judge.png", rewarded, judged, runs)
    draw_training(figures / "ppo.png", runs)
    draw_reliability(figures / "reward.png", rewarded, judged, pretrained)
    names = ["frontier", "judge", "ppo", "reward"]
    if args.ratings:
        rows = [row for path in args.ratings for row in read_ratings(path)]
        draw_readers(figures / "readers.png", rows, probabilities(out / "pretrain.pt", rows))
        names.insert(2, "readers")

    results = results_table(summary)
    print("", *results, sep="\n")
    lines = ["# Report of one study", "",
             f"Size {summary['size']} on {summary['device']}, seed {pretrained['args']['seed']}: "
             f"{summary['pretrain']['val_bits_per_byte']:.3f} bits per byte on held-out plays; "
             f"P(positive) of rho {summary['reward']['reference_positive']:.3f}.", "", *results,
             "Measured on fresh samples, ± one standard error; KL in nats per completion. The "
             "optimum J* is estimated from samples of rho and of the policy; where its effective "
             f"sample size (ESS) is below {MIN_ESS}, it is not quoted. judge: the score by a "
             "second reward model, for which nothing was optimised.", "",
             *best_of_n_table(rewarded, runs),
             *[f"![{name}](figures/{name}.png)\n" for name in names]]
    for name, state in (("reward", rewarded), ("judge", judged)):
        keys = ("n", "pearson", "pearson_se", "auc", "log_loss", "constant_log_loss")
        lines += [f"## The {name} model on ratings that it was not trained on", "",
                  *table(["of", *keys], [(kind, *(found[key] for key in keys))
                                         for kind, found in state["report"].items()])]
    before = sample_texts(tokenizer, rewarded, "positive", rewarded["rho"])
    write_samples(out / "samples" / "rho.txt", before)
    for run in runs:
        name = train.run_name(run["toward"], run["inputs"]["beta"])
        after = sample_texts(tokenizer, rewarded, run["toward"], run["fresh"])
        write_samples(out / "samples" / f"{name}.txt", after)
        print(*(f"\n===== before\n{old}\n\n===== after, beta {label(run)}\n{new}"
                for old, new in list(zip(before, after))[:2]), sep="\n")
        lines += [f"## {name}: before and after", "", *(
            f"```\n{old}\n```\n\nafter:\n\n```\n{new}\n```\n"
            for old, new in list(zip(before, after))[:3])]
        strip = strip_along_kl(out, run, args)
        if strip:
            lines += [f"## {name} along its drift", "", *table(
                ["KL", "P(positive) of 8", "distinct pairs of words", "the first"], strip)]
    data.write_file(out / "report.md", "\n".join(lines))
    print(f"\n{out / 'report.md'} has the figures and more samples")


def write_samples(path, texts):
    """Samples into a text file, a line between them."""
    data.write_file(path, f"\n\n{'-' * 60}\n\n".join(texts) + "\n")


def results_table(summary):
    """What each run reached, and its optimum: lines of a markdown table."""
    def plus_minus(value, error):
        return None if value is None else f"{value:.2f} ± {error:.2f}"

    rows = [(f"{row['beta']:.3g}{'' if row['toward'] == 'positive' else ' negative'}", row["score"],
             row["judge"], row["positive"], row["ref_kl"],
             plus_minus(row["objective"], row["objective_se"]),
             plus_minus(row["optimum"]["objective"], row["optimum"]["objective_se"]),
             round(row["optimum"]["ess"]), row["optimum"]["pareto_k"],
             plus_minus(row["fraction_of_optimum"], row["fraction_se"]), row["kl_to_optimum"])
            for row in summary["ppo"]]
    return table(["beta", "score", "judge", "P(positive)", "ref_kl", "J", "J*", "ESS", "k-hat",
                  "fraction of optimum", "KL(pi to pi*)"], rows)


def best_of_n_table(rewarded, runs):
    """Best of n samples of rho, the yardstick that needs no training: score, KL, J by beta."""
    lines = []
    for toward in dict.fromkeys(run["toward"] for run in runs):
        rho = scores_of(rewarded, rewarded["rho"]["log_odds"], toward)
        betas = [run["inputs"]["beta"] for run in runs if run["toward"] == toward]
        rows = [(n, score, kl, *(score - beta * kl for beta in betas))
                for n in (1, 4, 16, 64, 256) for score, kl in [ppo.best_of_n(rho, n)]]
        lines += table([f"best of n, {toward}", "score", "KL at most",
                        *(f"J at beta {beta:g}" for beta in betas)], rows)
    return lines


# ---- the command line ---------------------------------------------------------------------

def parse():
    """The options; what is out of range is answered with one line."""
    count = data.number(int, 1)
    parser = data.Parser(description=__doc__.split("\n")[0], formatter_class=train.HelpFormatter)
    parser.add_argument("--checkpoint", default="out/pretrain.pt", type=Path,
                        help="pretrain.pt or ppo_beta*.pt, in the folder that train.py wrote")
    parser.add_argument("--kl", type=float, metavar="NATS",
                        help="the policy as it was when its drift first passed so many nats")
    parser.add_argument("--num", type=count, help="how many samples (5, or 20 to rate)")
    parser.add_argument("--length", type=count, default=64, help="tokens of each")
    parser.add_argument("--prompt", default="", help="text to continue; empty: as a speech begins")
    parser.add_argument("--temperature", type=data.number(float, 0), default=1.0,
                        help="below 1 plays safe, 0 always takes the likeliest token")
    parser.add_argument("--top-k", type=count, help="draw from the k likeliest tokens only "
                        "(unset: from all, as in training)")
    parser.add_argument("--seed", type=data.number(int, 0, 2**31), default=0,
                        help="the same seed gives the same samples")
    parser.add_argument("--best-of", type=count, default=1, metavar="N",
                        help="of N samples show the one that the reward model likes best")
    parser.add_argument("--compare", action="store_true",
                        help="show rho's samples and those of the twin as well, side by side")
    parser.add_argument("--jsonl", action="store_true", help="one JSON object a line")
    parser.add_argument("--rate", nargs="+", metavar="CHECKPOINT", help="take your ratings of "
                        "their samples: several, shuffled and blind; one, or plays: labels")
    parser.add_argument("--ratings", nargs="+", type=Path, metavar="FILE.csv",
                        help="the file of your ratings; without --rate, what one or two files say")
    parser.add_argument("--report", type=Path, metavar="DIR",
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
