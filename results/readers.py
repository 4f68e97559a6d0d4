"""What readers felt: one or more files of ratings (sample.py --rate writes them) in numbers.

    python results/readers.py results/drift_*.csv --study out --figure readers.png    (5 seconds)

Each line is one statement. ± is a standard error over passages; a passage that several readers
rated counts once, by its mean: readers who agree are not independent. The null quantile is no error
bar: where passages are dealt to two models at random, they differ by more in 1 of 20 deals.
"""

import itertools
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import reward  # noqa: E402
import sample  # noqa: E402
from gpt import in_chunks  # noqa: E402
from tables import mean_se  # noqa: E402

# What is known of a passage, and the range that the figure maps to 0 to 1.
MEASURES = {"feeling": (-2, 2), "sense": (1, 5), "P(positive)": (0, 1), "judge's P": (0, 1)}


def read_file(path):
    """What one reader said: {(drawn from, text): (feeling, sense)}."""
    said = {}
    for row in sample.read_ratings(path):
        said[row["drawn_from"], row["text"]] = float(row["rating"]), float(row["sense"] or "nan")
    return said


def collect(readers, study):
    """MEASURES of every passage, {drawn from: (N,4)}, rho first; without a study (N,2)."""
    said = {}
    for reader in readers:
        for key, pair in reader.items():
            said.setdefault(key, []).append(pair)
    if not said:
        raise data.UserError("these files hold no ratings. Make some: sample.py --rate.")
    columns = [torch.stack([torch.tensor(pairs).mean(0) for pairs in said.values()])]
    names, texts = zip(*said)
    for kind in ("reward", "judge") if study else ():
        state = data.load_checkpoint(study / f"{kind}.pt", kind)
        tokenizer = data.make_tokenizer(state["vocabulary"])
        tokens = data.pad([tokenizer.encode_ordinary(text) for text in texts], state["length"])
        columns.append(in_chunks(reward.load_reward(state), tokens).sigmoid())
    values = torch.column_stack(columns)
    return {name: values[[other == name for other in names]]
            for name in sorted(set(names), key=lambda name: (name != "pretrain", name))}


def null_quantile(a, b, deals=10_000):
    """The 95 % quantile of |mean a - mean b| where all values are dealt to a and b at random."""
    values = torch.cat((a, b)).double()
    # Each row of argsort is a random order of all values.
    order = torch.rand(deals, len(values)).argsort(1)
    one, two = values[order].split([len(a), len(b)], dim=1)
    return (one.mean(1) - two.mean(1)).abs().quantile(0.95).item()


def pearson(a, b):
    """The correlation of a (...,N) and b (...,N)."""
    return torch.cosine_similarity(a - a.mean(-1, True), b - b.mean(-1, True), dim=-1)


def quadratic_kappa(a, b):
    """Agreement of ratings a (N,) and b (N,) beyond chance, 1 if perfect (Cohen 1968)."""
    # What the mean squared difference would be if the readers knew nothing of each other.
    return (1 - (a - b).square().mean() / (a[:, None] - b).square().mean()).item()


def print_models(passages):
    """What each model's passages are like, and how they differ from the pretrained model's."""
    means = {name: [mean_se(x) for x in values.T] for name, values in passages.items()}
    for name, values in passages.items():
        words = [f"{what} {mean:.2f} ± {se:.2f}" for what, (mean, se) in zip(MEASURES, means[name])
                 if not math.isnan(mean)]       # of one source alone sense is not asked
        print(f"{name}, {len(values)} passages: {', '.join(words)}")
        if name != "pretrain" and "pretrain" in passages:
            gaps = [f"{mean - at:+.2f} ± {math.hypot(se, at_se):.2f}"
                    for (mean, se), (at, at_se) in zip(means[name], means["pretrain"])]
            null = null_quantile(values[:, 0], passages["pretrain"][:, 0])
            print(f"{name} less pretrain: feeling {gaps[0]} (null quantile, 95 %: {null:.2f}), "
                  f"sense {gaps[1]}")


def print_correlations(passages, times=2000):
    """How far reward model and judge see what readers feel, ± a standard error by bootstrap."""
    groups = dict(passages)
    tuned = [groups.pop(name) for name in passages if name != "pretrain"]
    if tuned:
        groups["the tuned models together"] = torch.cat(tuned)
        # What is left of it where all models feel alike on average.
        groups["the same, each model's means taken out"] = torch.cat([x - x.mean(0) for x in tuned])
    for name, values in groups.items():
        n = len(values)
        again = torch.randint(n, (times, n))
        for i, measure in list(enumerate(MEASURES))[2:values.size(1)]:
            feeling, p = values[:, 0], values[:, i]
            print(f"feeling and {measure}, {name}, {n} passages: Pearson {pearson(feeling, p):.2f} "
                  f"± {pearson(feeling[again], p[again]).std():.2f}")


def print_agreement(readers):
    """How far every two readers agree on the passages that both have rated."""
    for (one, said), (two, other) in itertools.combinations(readers.items(), 2):
        shared = [key for key in said if key in other]
        for i, measure in enumerate(("feeling", "sense") if len(shared) > 1 else ()):
            a, b = torch.tensor([(said[key][i], other[key][i]) for key in shared]).T
            print(f"{one} and {two}, {measure} of {len(shared)} passages: quadratic kappa "
                  f"{quadratic_kappa(a, b):.2f}, Pearson {pearson(a, b):.2f}")


def drift(name, study):
    """The ref_kl of a model of a study. NAME_after4 is the policy after 4 iterations."""
    if name == "pretrain":
        return 0.0
    stem, _, after = name.partition("_after")
    run = data.load_checkpoint(study / f"{stem}.pt", "ppo")
    if after and data.load_checkpoint(study / f"{name}.pt")["key"] != run["key"]:
        raise data.UserError(f"{name}.pt is of another run than {stem}.pt. Run train.py again.")
    # A row of the history describes the policy before its update.
    return run["history"][int(after)]["ref_kl"] if after else run["result"]["ref_kl"]


def draw_figure(passages, study):
    """All MEASURES, mapped to 0 to 1, along the drift of the models that the study has."""
    kl = {name: drift(name, study) for name in passages if (study / f"{name}.pt").exists()}
    if not kl:
        raise data.UserError(f"{study} has none of the rated models. Name the --study they are of.")
    names, kl = sorted(kl, key=kl.get), sorted(kl.values())
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    sample.drift_axis(axis, "mean of the passages, 0 to 1")
    for i, (measure, (least, most)) in enumerate(MEASURES.items()):
        scaled = [(passages[name][:, i] - least) / (most - least) for name in names]
        means, errors = zip(*map(mean_se, scaled))
        axis.errorbar(kl, means, errors, fmt=f"C{i}o-", label=measure)
    axis.legend()
    return figure


def main():
    parser = data.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE.csv", help="of ratings, one of each reader")
    add("--study", type=Path, metavar="DIR", help="whose reward model and judge to ask as well")
    add("--figure", type=Path, metavar="FILE.png", help="draw all along the drift of --study")
    args = parser.parse_args()
    if args.figure and not args.study:
        parser.error("--figure needs the --study whose models were rated")
    readers = {path.stem: read_file(path) for path in args.files}
    passages = collect(readers.values(), args.study)
    torch.manual_seed(0)
    print_models(passages)
    print_correlations(passages)
    print_agreement(readers)
    if args.figure:
        draw_figure(passages, args.study).savefig(args.figure)


if __name__ == "__main__":
    data.run(main)
