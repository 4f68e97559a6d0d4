"""Look at the results: samples, blind ratings, figures and the report. This file holds no RLHF.

Positive Prob is P(positive) by the reward model. ref_kl is log pi - log rho of a completion, in
nats; its mean is KL(pi to rho), unless --temperature or --top-k changes the sampling.

    python sample.py --checkpoint out/ppo_beta0.2.pt --num 20   samples with Positive Prob
    python sample.py --rate out/pretrain.pt out/ppo_beta0.2.pt  rate samples of both, blind
    python sample.py --report out                               figures, report.md, summary.json
"""

import csv
import io
import json
import random
import re
from itertools import zip_longest
from pathlib import Path

import torch
from matplotlib.figure import Figure        # unlike pyplot, needs no display

import data
from data import UserError, number
from gpt import cut_after, generate, load_gpt
from ppo import log_ratios
from reward import load_reward

SAMPLE = "-----\n{text}\n\nPositive Prob: {positive:.1%}   log pi - log rho: {ref_kl:.1f} nats\n"
HEADER = "text,rating,sense,drawn_from\n"       # first line of a ratings file
REPORT = """# Size {size}: {pretrain[val_bits_per_byte]:.3f} bits per byte on held-out text\n
| beta | score | judge | P(positive) | KL | J | J* | ESS | fraction | KL to pi* |
|---|---|---|---|---|---|---|---|---|---|\n| rho | 0 | 0 | | 0 | 0 | | | | |
{results}
± a standard error; KL in nats; J* takes an effective sample size (ESS) of 100; fraction: of the \
way from rho to J*; judge: the score by a model never optimised.\n
| on held-out passages | Pearson | AUC | calibration slope | log loss |\n|---|---|---|---|---|
| reward | {reward[val_pearson]:.3f} | {reward[val_auc]:.3f} | {reward[val_slope]:.2f} | \
{reward[val_log_loss]:.3f} |
| judge | {judge[val_pearson]:.3f} | {judge[val_auc]:.3f} | {judge[val_slope]:.2f} | \
{judge[val_log_loss]:.3f} |\n
![](figures/frontier.png)\n\n![](figures/ppo.png)\n\n```\n{samples}```
"""
# A run's row in the table and its printed line, if J* is known; if the ESS is too small, UNKNOWN.
KNOWN = """| {label} | {score:.2f} | {judge:.2f} | {positive:.2f} | {ref_kl:.2f} | \
{objective:.2f} ± {objective_se:.2f} | {optimum[objective]:.2f} ± {optimum[objective_se]:.2f} | \
{optimum[ess]:.0f} | {fraction_of_optimum:.2f} ± {fraction_se:.2f} | {kl_to_optimum:.2f} |
beta {label}: score {score:.2f}, KL {ref_kl:.2f} nats, J {objective:.2f} of J* \
{optimum[objective]:.2f}: {fraction_of_optimum:.0%} of the way from rho"""
UNKNOWN = """| {label} | {score:.2f} | {judge:.2f} | {positive:.2f} | {ref_kl:.2f} | \
{objective:.2f} ± {objective_se:.2f} | not known | {optimum[ess]:.0f} | | |
beta {label}: score {score:.2f}, KL {ref_kl:.2f} nats, J {objective:.2f}; \
J* is not known from these samples"""
METRICS = """objective score judge ref_kl policy_loss clipfrac
             explained_variance entropy exact_kl""".split()     # the panels of figures/ppo.png


def load_beside(path, state, kind):
    """The checkpoint kind.pt beside path; UserError if path's state was made from another one."""
    beside = data.load_checkpoint(path.parent / f"{kind}.pt")
    if state["inputs"].get(kind, beside["key"]) != beside["key"]:
        raise UserError(f"{kind}.pt beside {path} is of another study. Run train.py again.")
    return beside


@torch.no_grad()
def draw(path, num, seed=0, prompt="", temperature=1.0, top_k=None):
    """Yield num samples of a checkpoint's policy: dicts of text, positive (0 to 1) and ref_kl."""
    state = data.load_checkpoint(path, "pretrain", "ppo")
    rho = load_beside(path, state, "rho")       # its prompts serve the pretrained model, too
    policy, ref = load_gpt(state), load_gpt(load_beside(path, rho, "pretrain"))
    rewarded = load_beside(path, rho, "reward")
    encode = data.make_tokenizer(state["vocabulary"]).encode_ordinary
    prompts = torch.tensor([encode(prompt)]) if prompt else rho["test_prompts"]
    torch.manual_seed(seed)
    prompts = prompts[torch.randint(len(prompts), (num,))]
    tokens = generate(policy, prompts, rewarded["length"], temperature, top_k)
    tokens = cut_after(tokens[:, prompts.size(1):], rho["end"])
    positive = load_reward(rewarded)(tokens).sigmoid().tolist()
    ref_kl = log_ratios(policy, ref, prompts, tokens).tolist()
    for row, p, kl in zip(torch.cat((prompts, tokens), dim=1), positive, ref_kl):
        yield {"text": data.decode(state["vocabulary"], row).removeprefix(data.BOUNDARY),
               "positive": p, "ref_kl": kl}


# ---- ratings ------------------------------------------------------------------------------
def read_ratings(path):
    """The rows of a ratings file: an iterator of dicts of text, rating, sense and drawn_from."""
    text = data.read_text(path)
    if not text.startswith(HEADER):
        raise UserError(f"{path} lacks the header of a ratings file. Give another.")
    return csv.DictReader(io.StringIO(text))


def rate(args):
    """Ask a reader to rate texts, resuming after those rated; ask sense only to compare sources."""
    def ask(question, low, high):
        while True:
            try:
                return number(float, low, high)(input(question))
            except ValueError:
                print(f"The answer must be a number from {low} to {high}.")

    if len({path.stem for path in args.rate}) < len(args.rate):
        raise UserError("--rate tells checkpoints apart by their file names. Rename a copy.")
    random.seed(args.seed)
    passages = []                       # (text, name of its checkpoint or "plays") each
    for path in args.rate:
        if path.name == "plays":
            # Choose speeches about as long as samples.
            texts = [x for x in data.load_corpus()[0].split(data.BOUNDARY) if 100 < len(x) < 400]
            random.shuffle(texts)
        else:
            texts = [row["text"] for row in draw(path, args.num, args.seed)]
        # A model can write any character; a CSV file does not preserve these two.
        passages += [(re.sub("[\0\r]", " ", text), path.stem) for text in texts[:args.num]]
    random.shuffle(passages)
    if not args.ratings.exists():
        data.write_file(args.ratings, HEADER)
    rated = [(row["text"], row["drawn_from"]) for row in read_ratings(args.ratings)]
    todo = passages[len(rated):]
    if rated + todo != passages:
        raise UserError(f"{args.ratings} was begun with other --rate, --num or --seed. Give those.")
    print(f"{len(rated)} rated, {len(todo)} to go. Ctrl-C ends; the same command goes on.")
    for i, (text, name) in enumerate(todo):
        print(f"\n----- {len(todo) - i} to go\n{text}\n")
        feeling = ask("feeling, -2 very negative to 2 very positive: ", -2, 2)
        sense = ask("sense, 1 (none) to 5 (all makes sense): ", 1, 5) if len(args.rate) > 1 else ""
        # Append each row at once, so that no crash loses it.
        with open(args.ratings, "a", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([text, feeling, sense, name])
    # Show no results before the end: a reader who resumes must still be blind.
    print(f"\nAll are rated. In numbers: python results/readers.py {args.ratings}")


# ---- the report ---------------------------------------------------------------------------
def drift_axis(axis, ylabel):
    """Give a matplotlib axis KL(pi to rho) as x, on a root scale; without margin, as x >= 0."""
    # Scores at first grow linearly with the square root of the KL (Gao 2022).
    axis.set_xscale("function", functions=(lambda kl: kl.clip(0) ** 0.5, lambda root: root ** 2))
    axis.set(xmargin=0, ylabel=ylabel, xlabel="KL(pi to rho), nats per completion (root scale)")


def draw_figures(runs, folder):
    """Draw load_runs' runs: frontier.png, scores against KL; ppo.png, metrics by iteration."""
    def plot(axis, rows, x, y, style, **options):       # column y against x; None is left out
        axis.plot([row[x] for row in rows], [row[y] for row in rows], style, **options)

    frontier, panels = [Figure(figsize=(13, y), layout="constrained") for y in (5, 9)]
    left, right = frontier.subplots(1, 2, sharey=True)
    axes = panels.subplots(3, 3).flatten()
    for i, run in enumerate(runs):
        color = f"C{i}"
        for axis, key, column in ((left, "score", 1), (right, "judge", 2)):
            drift_axis(axis, f"{key}, standard deviations of rho's")
            # The line of the training run ends in a dot, the finished policy.
            plot(axis, [*run["history"], run], "ref_kl", key, color + "o-", markevery=[-1],
                 label=run["label"])
            plot(axis, run["frontier"], 0, column, "k")
        plot(left, run["best_of_n"], 3, 1, "C7.-")
        log = data.HERE / f"results/runs/{run['size']}_{run['path'].stem}.metrics.jsonl"
        logged = list(map(json.loads, log.open())) if log.exists() else []
        for axis, key in zip(axes, METRICS):
            axis.set_title(key)
            plot(axis, run["history"], "step", key, color, label=run["label"])
            plot(axis, logged, "step", key, color, alpha=0.3)
        # The optimum's star and dotted line; not drawn if J* is not known.
        plot(left, [run["optimum"]], "ref_kl", "score", color + "*", ms=14, zorder=3)
        axes[0].hlines(run["optimum"]["objective"], 1, run["iterations"], color, "dotted")
    left.legend(title="black: the optimum\ngrey: best of n\nPPO, beta:")
    axes[5].legend(title="dotted: J*\nfaint: results/runs\nbeta:")
    folder.mkdir(exist_ok=True)
    frontier.savefig(folder / "frontier.png")
    panels.savefig(folder / "ppo.png")


def load_runs(out, rho):
    """Yield the finished PPO runs in folder out made from rho, its rho.pt: dicts with results."""
    for path in sorted(out.glob("ppo_*.pt")):
        run = data.load_checkpoint(path)
        result = run.get("result")          # a policy kept during a run has none
        if result and run["inputs"]["rho"] == rho["key"]:
            result["seconds_per_iteration"] = run["seconds"] / result["iterations"]
            # The beta at the end, if adapted; the algorithm is named only where it is not PPO.
            label = re.sub(r"ppo_|beta\S+ |, ppo", "", f"{path.stem} {result['beta']:.3g}, "
                           f"{run['inputs']['algorithm']}")
            yield {**run, **result, "path": path, "label": label}


def report(out):
    """Write figures/*.png, samples/*.txt, summary.json, report.md in folder out; print samples."""
    def first_sample(path):             # write 20 samples; return the first, as lines
        texts = [SAMPLE.format_map(row) for row in draw(path, 20)]
        data.write_file(out / f"samples/{path.stem}.txt", "\n".join(texts))
        return texts[0].split("\n")

    rho = data.load_checkpoint(out / "rho.pt")
    runs = list(load_runs(out, rho))
    if not runs:
        raise UserError(f"{out} has no finished PPO run. Run train.py first.")
    seconds = {"rho": rho["seconds"]}
    summary = {"size": rho["size"], "device": rho["inputs"]["device"], "seconds": seconds,
               "ppo": [run["result"] for run in runs]}
    for name in ("data", "pretrain", "reward", "judge"):
        state = load_beside(out / "rho.pt", rho, name)
        seconds[name] = state["seconds"]
        if name == "pretrain":
            summary[name] = {key: state[key] for key in ("parameters", "val_bits_per_byte")}
        elif name != "data":
            # Those on passages, which come first, or on samples if the labels have no passages.
            metrics, *_ = state["report"].values()
            metrics = {f"val_{key}": x for key, x in metrics.items()}
            summary[name] = metrics | rho["scales"][name]["positive"]
    seconds["total"] = sum(seconds.values()) + sum(run["seconds"] for run in runs)
    seconds["ppo"] = {run["label"]: run["seconds"] for run in runs}
    results = samples = ""
    before = ["before", *first_sample(out / "pretrain.pt")]
    for run in runs:
        template = UNKNOWN if run["fraction_of_optimum"] is None else KNOWN
        row, line = template.format_map(run).split("\n")
        results += row + "\n"
        for pair in zip_longest(before, ["after", *first_sample(run["path"])], fillvalue=""):
            samples += "{:52.52}  {}\n".format(*pair)
        samples += line + "\n\n"
    print(samples)
    draw_figures(runs, out / "figures")
    data.write_file(out / "summary.json", json.dumps(summary, indent=1))
    data.write_file(out / "report.md", REPORT.format(results=results, samples=samples, **summary))
    print(f"Figures, tables and samples: {out}/report.md")


def main():
    parser = data.Parser(description="Samples, blind ratings, figures, the report.")
    add = parser.add_argument
    add("--checkpoint", default="out/pretrain.pt", type=Path, help="pretrain.pt or ppo_*.pt")
    add("--num", type=number(int, 1), default=20, help="samples per checkpoint (default 20)")
    add("--prompt", default="", help="text to continue (default: the run's test prompts)")
    add("--temperature", type=number(float, 0), default=1.0, help="below 1: likelier tokens")
    add("--top-k", type=number(int, 1), help="only the k likeliest tokens (default: all)")
    add("--seed", type=number(int, 0), default=0, help="seed of samples and rating order")
    add("--jsonl", action="store_true", help="print one JSON object per line")
    add("--rate", nargs="+", type=Path, metavar="CHECKPOINT",
        help="rate samples: several checkpoints blind; or one, or plays, for train.py --labels")
    add("--ratings", type=Path, default="ratings.csv", metavar="FILE.csv", help="where answers go")
    add("--report", type=Path, metavar="DIR", help="write a study's figures and tables again")
    args = parser.parse_args()
    if args.report:
        return report(args.report)
    if args.rate:
        return rate(args)
    for row in draw(args.checkpoint, args.num, args.seed, args.prompt, args.temperature,
                    args.top_k):
        print(json.dumps(row, ensure_ascii=False) if args.jsonl else SAMPLE.format_map(row))


if __name__ == "__main__":
    data.run(main)
