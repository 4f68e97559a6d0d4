"""What is each ingredient of PPO worth? PPO again on a finished study, with one thing changed.

    python tests/what_matters.py --study out                  a table (many runs: hours on 2 cores)
    python tests/what_matters.py --study out --iterations 12  shorter runs
    python tests/what_matters.py --table                      table and figure of the runs kept

Each run is one row of results/what_matters.csv, written when it ends; what is there already is not
run again, so it can be stopped at any time. J is measured on fresh samples, and the fraction
against the J* of the study's own run at that beta. A change within two or three standard errors of
the default's mean is none that was shown.
"""

import csv
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import ppo  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from gpt import compute_dtype, in_chunks, sample_completions  # noqa: E402

KEPT = data.HERE / "results" / "what_matters.csv"
COLUMNS = ["change", "beta", "seed", "iterations", "batch", "code", "score", "kl", "J", "fraction",
           "seconds"]
# What tells a row from that of another run, of other code among them.
KEYS = COLUMNS[:6]


def own_token_penalty(scores, logprobs, ref_logprobs, beta, mask=None, right=None):
    """Each token pays for its own KL only: rewards whose sum to go is score - beta k1_t."""
    own = right(torch.zeros_like(scores), logprobs, ref_logprobs, beta, mask)
    whole = right(scores, logprobs, logprobs, beta, mask)
    return own - torch.nn.functional.pad(own[:, 1:], (0, 1)) + whole


def scaled_per_batch(scores, logprobs, ref_logprobs, beta, mask=None, right=None):
    """The common bug: scores are z-scored in every batch, so beta has no fixed meaning."""
    scores = (scores - scores.mean()) / (scores.std() + 1e-8)
    return right(scores, logprobs, ref_logprobs, beta, mask)


CODE = train.digests(ppo.__file__)[""]

# Of each change: the settings it alters, and the functions of ppo.py it puts others in place of
# (and two things that are no function: whether the values are warmed up, Adam's epsilon).
CHANGES = {
    "default": ({}, {}),
    "no value function (simple)": ({"algorithm": "simple"}, {}),
    "leave-one-out (rloo)": ({"algorithm": "rloo"}, {}),
    "values start at 0": ({}, {"warm": False}),
    "lambda 1": ({"lam": 1.0}, {}),
    "lambda 0.95": ({"lam": 0.95}, {}),
    "lambda 0": ({"lam": 0.0}, {}),
    "no whitening": ({}, {"whiten": lambda x, mask=None: x / 0.15}),
    "two epochs": ({"epochs": 2}, {}),
    "Adam's epsilon 1e-5": ({"lr": 0.4}, {"eps": 1e-5}),
    "no clipping": ({"clip": 1e9, "max_update_kl": 1e9}, {}),
    "penalty of the token alone": ({}, {"kl_penalised_rewards": own_token_penalty}),
    "score scaled in each batch": ({}, {"kl_penalised_rewards": scaled_per_batch}),
    "half the batch": ({"batch": 0.5}, {}),
    "twice the batch": ({"batch": 2}, {}),
    "learning rate / 2": ({"lr": 0.5}, {}),
    "learning rate x 2": ({"lr": 2}, {}),
}
RELATIVE = {"batch", "lr"}


def weighted_scores(rho, run, beta):
    """What ppo.optimum takes, of samples of rho and of a run."""
    scores, log_weights = sample.pool(rho, run)
    return scores, beta, log_weights


def run_once(args, study, change, beta, seed, iterations):
    """One run: a row of the table, a dict of COLUMNS."""
    pretrained, rewarded, _, rho, runs = study
    known = [run for run in runs if run["beta"] == beta and run["toward"] == "positive"]
    if not known:
        raise data.UserError(f"the study has no run at beta {beta:g}, which J* is from. Run "
                             f"train.py --beta {beta:g} first.")
    best = ppo.optimum(*weighted_scores(rho, known[0], beta))
    if best["ess"] < ppo.MIN_ESS:
        raise data.UserError(f"J* at beta {beta:g} is not known from this study. Choose a "
                             "larger --beta.")
    settings, patches = CHANGES[change]
    config = ppo.PPOConfig(beta=beta, batch=args.batch, iterations=iterations,
                           length=args.length)
    for name, value in settings.items():
        old = getattr(config, name)
        setattr(config, name, type(old)(old * value) if name in RELATIVE else value)
    right = {name: getattr(ppo, name) for name in patches if name not in ("warm", "eps")}
    for name in right:
        new = patches[name]
        setattr(ppo, name, new if name == "whiten" else functools.partial(new, right=right[name]))
    try:
        began = time.process_time()
        run, model = train.make_run(args, config, 1000 + seed, pretrained, rewarded, rho)
        if not patches.get("warm", True):
            run.value.weight.zero_()
        run.optimizer.param_groups[0]["eps"] = patches.get("eps", 1e-3)
        for i in range(iterations):
            run.step(i)
        seconds = time.process_time() - began
    finally:
        for name, function in right.items():
            setattr(ppo, name, function)
    generator = torch.Generator().manual_seed(5000 + seed)
    prompts = train.repeat(run.prompts, 1024)
    tokens = sample_completions(run.policy, prompts, config.length, generator)
    scores = train.scores_of(rho, in_chunks(model, tokens), "positive")
    drift = train.measure_drift(run.policy, run.ref, prompts, tokens)
    objective = (scores - beta * drift["log_ratio"]).mean().item()
    return dict(zip(COLUMNS, (change, f"{beta:g}", str(seed), str(iterations), str(config.batch),
                              CODE, scores.mean().item(), drift["exact_kl"].mean().item(),
                              objective, objective / best["objective"], seconds)))


def mean_se(values):
    """"mean ± standard error" of some numbers."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def print_table(rows):
    """The means over seeds of all kept runs, a markdown table for each beta and length of run."""
    for beta, iterations in sorted({(r["beta"], r["iterations"]) for r in rows}):
        chosen = [r for r in rows if (r["beta"], r["iterations"]) == (beta, iterations)]
        lines = []
        for change in (c for c in CHANGES if any(r["change"] == c for r in chosen)):
            runs = [r for r in chosen if r["change"] == change]
            columns = [mean_se([float(r[key]) for r in runs])
                       for key in ("score", "kl", "J", "fraction")]
            seconds = statistics.mean(float(r["seconds"]) for r in runs)
            lines.append((change, len(runs), *columns, f"{seconds:.0f}"))
        print(f"beta {beta}, {iterations} iterations\n")
        print(*sample.table(["change", "seeds", "score", "KL", "J", "fraction of optimum",
                             "CPU seconds"], lines), sep="\n")


def draw(rows):
    """Fraction of the optimum against completions sampled, and against seconds, of each run."""
    styles = {"default": "o", "half the batch": "v", "twice the batch": "^", "two epochs": "s",
              "no value function (simple)": "x"}
    figure = Figure(figsize=(10.5, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, beta in enumerate(sorted({r["beta"] for r in rows})):
        for change, style in styles.items():
            runs = [r for r in rows if r["change"] == change and r["beta"] == beta]
            fractions = [float(r["fraction"]) for r in runs]
            counts = [int(r["iterations"]) * int(r["batch"]) for r in runs]
            left.plot(counts, fractions, f"C{i}{style}", label=f"{change}, beta {beta}")
            right.plot([float(r["seconds"]) for r in runs], fractions, f"C{i}{style}")
    left.set(xlabel="completions sampled", ylabel="fraction of the optimum")
    right.set(xlabel="seconds of one core", title="How far PPO comes")
    left.legend(fontsize=8)
    sample.save_figure(figure, data.HERE / "results" / "figures" / "what_matters.png")


def main():
    parser = data.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", default="out", type=Path, help="folder of a finished study")
    parser.add_argument("--iterations", type=data.number(int, 1), default=50)
    parser.add_argument("--batch", type=data.number(int, 4), default=512,
                        help="of the default; half and twice the batch are of this")
    parser.add_argument("--beta", type=float, nargs="+", default=[0.2])
    parser.add_argument("--seeds", type=data.number(int, 1), default=3)
    parser.add_argument("--only", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    parser.add_argument("--table", action="store_true", help="print what was kept, run nothing")
    args = parser.parse_args()
    kept = []
    if KEPT.exists():
        with open(KEPT) as file:
            kept = list(csv.DictReader(file))
    if args.table:
        draw(kept)
        return print_table(kept)
    args.device, args.toward = torch.device("cpu"), "positive"
    args.dtype = compute_dtype(args.device)
    study = sample.load_study(args.study)
    args.length = study[3]["tokens"].size(1)
    done = {tuple(row[key] for key in KEYS) for row in kept}
    for seed in range(args.seeds):
        for beta in args.beta:
            for change in args.only:
                batch = int(args.batch * CHANGES[change][0].get("batch", 1))
                if (change, f"{beta:g}", str(seed), str(args.iterations), str(batch), CODE) in done:
                    continue
                row = run_once(args, study, change, beta, seed, args.iterations)
                is_new = not KEPT.exists()
                with open(KEPT, "a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    if is_new:
                        writer.writeheader()
                    writer.writerow({key: f"{x:.4g}" if isinstance(x, float) else x
                                     for key, x in row.items()})
                print(f"{change}, beta {beta}, seed {seed}: J {row['J']:.3f}, fraction "
                      f"{row['fraction']:.3f}, {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    data.run(main)
