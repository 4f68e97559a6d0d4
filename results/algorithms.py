"""Policy gradients, GRPO, DPO and best-of-n beside the exact optimum, on a finished study.

    python train.py                                     the study; its run at beta 0.2 gives J*
    OMP_NUM_THREADS=1 python results/algorithms.py      26 runs, 1.2 hours
    python results/algorithms.py --table                table and figure of the runs kept

simple, rloo, grpo, ppo (train.py --algorithm) and dpo (results/dpo.py) run at the defaults of
train.OPTIONS, with equally many samples. Each tries half, once and twice a learning rate (CENTRES)
with seed 0, and goes on as long as the best is the lowest or the highest.
Two further seeds run at the rate of the highest J. The means include seed 0, on which the rate was
chosen, so all are slightly high.

Every finished run appends one row to the CSV file. Rows of the same study and the same code are not
run again, so the script can be killed and started again.

J is measured by ppo.evaluate on fresh samples. J* is the same for all: result["optimum"] of the
study's own PPO run (ppo_beta0.2.pt), from one pool of rho's samples and that run's fresh ones. Its
standard error is common to all fractions and not part of theirs. Best-of-n has a bound only: its KL
is at most log n - (n - 1) / n.
"""

import csv
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import dpo  # noqa: E402
import ppo  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from tables import mean_se, table  # noqa: E402

COLUMNS = ["algorithm", "lr", "seed", "study", "score", "ref_kl", "J", "J_se", "fraction",
           "kl_to_optimum", "seconds", "code"]
CODE = data.digest(" ".join([*train.SOURCES.values(), train.source("results/dpo.py")]))[:16]
# Near the best rates of an earlier version.
CENTRES = {"simple": 6e-4, "rloo": 6e-4, "grpo": 1.5e-4, "ppo": 1.2e-3, "dpo": dpo.LR}


# ---- runs ---------------------------------------------------------------------------------

def compare(args, study, result, rows, key):
    """Run what is not among the rows yet."""
    def run(algorithm, lr, seed):
        if not select(rows, algorithm, lr, seed):
            row = {"algorithm": algorithm, "lr": lr, "seed": seed, "study": key, "code": CODE,
                   **run_once(study, result, algorithm, lr, seed)}
            rows.append(append_row(args.rows, row))

    for algorithm in args.only:
        centre = CENTRES[algorithm]
        rates = [centre / 2, centre, centre * 2]
        for lr in rates:                # it grows while the best rate is at an end of it
            run(algorithm, lr, 0)
            best = best_rate(rows, algorithm)
            if lr == rates[-1] and best in (min(rates), max(rates)):
                rates.append(best * 2 if best == max(rates) else best / 2)
        for seed in (1, 2):
            run(algorithm, best, seed)


def run_once(study, result, algorithm, lr, seed):
    """Train and measure one policy: the rest of its row, a dict of floats."""
    options, _, _, judged, rho = study
    options.lr, options.algorithm = lr, algorithm
    torch.manual_seed(data.fold(f"{seed} {algorithm}", 2**31))
    began = time.process_time()
    if algorithm == "dpo":
        run = dpo.train_dpo(*dpo.inputs(*study))
    else:
        run = ppo.PPO(*dpo.inputs(*study))
        for i in range(options.iterations):
            run.step(i)
    seconds = time.process_time() - began
    reached = ppo.evaluate(options, run, ppo.load_scorer(options, judged, rho), rho)
    J, se = reached["objective"], reached["objective_se"]
    return {"score": reached["score"], "ref_kl": reached["ref_kl"], "J": J, "J_se": se,
            **short_of_optimum(J, result), "seconds": seconds}


def short_of_optimum(J, result):
    """fraction and kl_to_optimum of a policy of this J: a dict."""
    best, start = result["optimum"]["objective"], result["reference_objective"]
    return {"fraction": (J - start) / (best - start), "kl_to_optimum": (best - J) / result["beta"]}


# ---- rows ---------------------------------------------------------------------------------

def read_rows(path, key, any_code):
    """The rows of the study of this key by the present code (any_code: by any), dicts of text."""
    lines = data.read_text(path).split("\n") if path.exists() else []
    return [row for row in csv.DictReader(lines) if row["study"] == key
            and (any_code or row["code"] == CODE)]


def append_row(path, row):
    """Write a row at the end of the file; returns it as text."""
    for name, x in row.items():
        row[name] = f"{x:.5g}" if isinstance(x, float) else str(x)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{name} {row[name]}" for name in COLUMNS), flush=True)
    return row


def select(rows, algorithm, lr=None, seed=None):
    """The rows of an algorithm, of one learning rate and seed or of all."""
    return [row for row in rows if row["algorithm"] == algorithm
            and lr in (None, float(row["lr"])) and seed in (None, int(row["seed"]))]


def best_rate(rows, algorithm):
    """The rate of the highest J with seed 0."""
    return float(max(select(rows, algorithm, seed=0), key=lambda row: float(row["J"]))["lr"])


# ---- table and figure ---------------------------------------------------------------------

def means(runs, *names):
    """(mean, standard error) over runs of each column; of a single run the error is NaN."""
    return [mean_se([float(row[name]) for row in runs]) for name in names]


def print_table(rows, ends, result):
    """What each algorithm reached at its best rate, and best of n."""
    best, lines = result["optimum"], []
    print(f"beta {result['beta']:g}: J* {best['objective']:.3f} ± {best['objective_se']:.3f} at "
          f"score {best['score']:.2f}, KL {best['ref_kl']:.2f}\n")
    for algorithm, runs in ends.items():
        scan = ", ".join(f"{row['lr']}: {row['J']}" for row in select(rows, algorithm, seed=0))
        values = means(runs, "score", "ref_kl", "J", "fraction", "kl_to_optimum", "seconds")
        lines.append([algorithm, len(runs), *values, scan])
    for n, score, se, kl in result["best_of_n"]:
        J = score - result["beta"] * kl
        lines.append(["rho" if n == 1 else f"best of {n}, J at least", "", (score, se), kl, J,
                      *short_of_optimum(J, result).values(), "", ""])
    print(*table(["algorithm", "seeds", "score", "KL", "J", "fraction of optimum",
                  "KL(pi to pi*)", "CPU seconds", "rate: J, seed 0"], lines), sep="\n")


def draw(ends, result, path):
    """Score against KL: the frontier, best of n, and where each algorithm ends."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    sample.drift_axis(axis, "score, standard deviations of rho's")
    best = result["optimum"]
    kl, scores, _ = zip(*result["frontier"])
    axis.plot(kl, scores, "k")
    axis.plot(best["ref_kl"], best["score"], "k*", ms=14)
    axis.annotate("optimum", (best["ref_kl"], best["score"]), (-65, 8), textcoords="offset points")
    n, scores, _, kl = zip(*result["best_of_n"])
    axis.plot(kl, scores, "C7.-")
    axis.annotate(f"best of 1 to {n[-1]}", (kl[-1], scores[-1]), (4, 4),
                  textcoords="offset points", color="C7")
    points = [(*means(runs, "score", "ref_kl"), algorithm) for algorithm, runs in ends.items()]
    right = 1.15 * max(x for _, (x, _), _ in points)        # names stand in one column
    height = best["score"]                                  # of the name before
    for i, ((y, dy), (x, dx), algorithm) in enumerate(sorted(points, reverse=True)):
        height = min(y, height) - 0.06 * best["score"]
        axis.errorbar(x, y, dy, dx, f"C{i}o", ms=5, capsize=3)
        axis.annotate(algorithm, (x, y), (right, height), color=f"C{i}",
                      arrowprops={"arrowstyle": "-", "color": f"C{i}"})
    axis.set(xlim=(0, 1.5 * max(best["ref_kl"], *kl)), ylim=(-0.1, None))
    figure.savefig(path)


def main():
    parser = data.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--study", default="out", type=Path, help="folder of a finished study (default out)")
    add("--beta", default=0.2, type=data.number(float, 1e-3, 10), help="default 0.2")
    add("--only", nargs="+", choices=list(CENTRES), default=list(CENTRES), help="default: all")
    add("--iterations", type=data.number(int, 1), help="fewer for a trial (default: train.py's)")
    add("--rows", default=data.HERE / "results/algorithms.csv", type=Path, help="the CSV file")
    add("--keep", action="store_true", help="reuse rows although source code has changed since")
    add("--table", action="store_true", help="print and draw the rows, run nothing")
    args = parser.parse_args()
    study = dpo.load_study(args.study, args.beta)
    state = data.load_checkpoint(args.study / f"ppo_beta{args.beta:g}.pt", "ppo")
    options, rho, result = study[0], study[-1], state["result"]
    if state["inputs"]["rho"] != rho["key"] or result["optimum"]["objective"] is None:
        raise data.UserError(f"{args.study} has no J* at beta {args.beta:g}. Choose a larger "
                             "--beta, or run train.py again.")
    options.iterations = args.iterations or options.iterations
    key = data.digest(f"{state['key']} {options.iterations}")[:16]
    rows = read_rows(args.rows, key, args.keep)
    if not args.table:
        return compare(args, study, result, rows, key)
    ends = {}
    for algorithm in CENTRES:
        if select(rows, algorithm, seed=0):
            ends[algorithm] = select(rows, algorithm, best_rate(rows, algorithm))
    print_table(rows, ends, result)
    draw(ends, result, args.rows.parent / "figures/frontier_all.png")


if __name__ == "__main__":
    data.run(main)
