"""The whole study: pretrain a GPT, train a reward model, tune the GPT by PPO, report.

Read main() first, then TABLE, which has the options. Between them is the loop that remembers: each
stage writes a checkpoint into --out and is done again only if something it depends on has changed.
A stage that was cut off resumes, on a CPU (with as many threads and processes) to the same bits.

    python train.py                             everything at beta 0.2 (README: how long)
    python train.py --beta 0.02 0.1 0.2 0.4     the sweep; stages already done are reused
    python train.py --size tiny --out tiny      a smoke run
    torchrun --nproc_per_node 2 train.py        two processes share the work
"""

import ast
import json
import re
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import gpt
import ppo
import reward
import sample

# tiny is a smoke run, small is for a laptop's CPU, base for a GPU of 80 GB. The columns, at least
# two spaces apart: the stages that use the option (a change repeats them and all that depend on
# them); name; values of tiny, small and base, or one for all, or choices, default first; help.
SIZES = ("tiny", "small", "base")
TABLE = """\
data      vocab_size      512 2048 4096  more make texts fewer tokens, but each token rarer
pretrain  block_size      128 128 256    tokens of a training window
pretrain  n_layer         2 4 8          depth of the transformer
pretrain  n_head          2 4 8          attention heads; n_embd must be a multiple
pretrain  n_embd          64 256 512     width of the transformer
pretrain  pretrain_steps  150 300 1000   optimizer steps: more make a better language model
reward    reward_model    head|bag       a classifier head on the GPT, or a bag of words to compare
reward    feedback        ratings|comparisons  soft targets, or which of two is rated higher
reward judge rho ppo  length  64         tokens per completion and per rated passage
rho       task            speeches|continue  sample without a prompt, or continue openings
rho       prompts         8              openings to continue in PPO, and as many for measuring
rho       rho_samples     2048 3072 16384  more samples of rho estimate J* more precisely
ppo       toward          positive|negative  rewards log P(positive) or log P(negative)
ppo       algorithm       ppo|simple|rloo|grpo  the estimator in PPO.advantages
ppo       iterations      8 50 50        of PPO: more come closer to the optimum
ppo       batch           128 512 2048   completions per iteration: more mean less noise
ppo       group           4              completions compared by rloo and grpo (one prompt: all)
ppo       minibatch       16 32 128      completions per optimizer step
ppo       unfrozen        1 1 4          last blocks that PPO trains: more fit more, noise included
ppo       epochs          1              passes over each batch: more reuse it, but pi has moved
ppo       lr              1.2e-3 1.2e-3 6e-4  PPO's learning rate; if too high, KL is spent on noise
ppo       clip            0.2            PPO's clip range; lower limits each update more
ppo       lam             0.8            GAE's lambda: lower trusts the value function more
ppo       max_update_kl   0.02           approx_kl, nats per token, that ends an update
ppo       adaptive_kl_target  0.0        ref_kl, nats, that an adaptive beta keeps; 0: fixed
ppo       adaptive_kl_horizon  1e4       completions in which that beta may change by a fifth
ppo       fresh_samples   512 2048 4096  samples for measuring a run: more are more precise
"""
Option = namedtuple("Option", "stages name tiny small base choices why")
OPTIONS = []
for line in TABLE.splitlines():
    stages, name, values, why = re.split("  +", line)
    choices = values.split("|") if "|" in values else None
    defaults = choices[:1] if choices else list(map(ast.literal_eval, values.split()))
    OPTIONS.append(Option(stages, name, *(defaults * 3)[:3], choices, f"{why} ({values})"))
CHECKPOINT_EVERY = 30.0     # seconds: about as much work is lost in a crash or by Ctrl-C


def parse(argv=None):
    """The options of argv, checked, with defaults by --size; device and dtype become torch's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = data.Parser(description="The whole study, from text to plots.")
    add = parser.add_argument
    add("--size", choices=SIZES, help="which of three values below (default: small; on CUDA, base)")
    add("--beta", type=data.number(float, 1e-3, 10), nargs="+", default=[0.2],
        help="KL coefficients: smaller lets the policy drift farther for reward (default 0.2)")
    add("--out", default="out", type=Path, help="checkpoints, figures and report (default out)")
    add("--until", choices=["pretrain", "reward", "ppo"], help="stop after this stage")
    add("--seed", type=data.number(int, 0), default=0, help="default 0; others show what is chance")
    add("--device", choices=sorted({device, "cpu"}), default=device, help="default: cuda, if any")
    add("--fp32", action="store_true", help="compute in float32 where bfloat16 would be faster")
    add("--keep", action="store_true", help="reuse what an older version of the source code made")
    add("--corpus", metavar="FILE.txt", help="a text of your own, not the plays")
    add("--labels", metavar="FILE.csv", nargs="+", help="passages of your own, instead of ours: "
        "text, rating; or play, first_line, last_line, rating")
    types = {int: data.number(int, 1), float: data.number(float, 0)}
    for option in OPTIONS:
        add("--" + option.name.replace("_", "-"), type=types.get(type(option.small)),
            choices=option.choices, help=option.why)
    args = parser.parse_args(argv)
    args.size = args.size or ("base" if args.device == "cuda" else "small")
    for option in OPTIONS:
        if getattr(args, option.name) is None:
            setattr(args, option.name, getattr(option, args.size))
    if args.n_embd % args.n_head or args.batch % args.group:
        parser.error("--n-embd must be a multiple of --n-head, and --batch of --group")
    if min(args.group, args.rho_samples) < 2 or (
            args.adaptive_kl_target and args.adaptive_kl_horizon < args.batch):
        parser.error("--group and --rho-samples must be at least 2, --adaptive-kl-horizon --batch")
    args.device = gpt.join_processes(torch.device(args.device))
    args.dtype = torch.float32 if args.fp32 else gpt.compute_dtype(args.device)
    return args


# ---- the loop that remembers --------------------------------------------------------------
def source(file):
    """SHA-256 of a script's syntax tree without docstrings; comments are not in it. Hexadecimal."""
    tree = ast.parse((data.HERE / file).read_bytes())
    for node in ast.walk(tree):
        match node:
            # No stage calls a script's own command, or the reward that users replace.
            case ast.FunctionDef(name="main" | "my_reward"):
                node.body = []
            case ast.Expr(value=ast.Constant()):        # a docstring
                node.value = None
    return data.digest(ast.dump(tree))


# Read once, at the start: edits during a run count from the next run on.
SOURCES = {name: source(f"{name}.py") for name in ("data", "gpt", "reward", "ppo")}


class Stage:
    """A stage's checkpoint, at path, and metrics; the stage's function gets it as loop.
    about: kind, the stage's name; inputs, a dict of all that it depends on; key, its digest."""

    def __init__(self, path, **about):
        self.path, self.partial = path, path.with_stem(path.stem + "_partial")
        self.history, self.began = [], time.monotonic()
        self.about = {**about, "history": self.history}

    def reuse(self, path):
        """The checkpoint at path, or None if there is none or an input changed (printed)."""
        if path.exists():
            state = data.load_checkpoint(path)
            changed = dict(self.about["inputs"].items() - state["inputs"].items())
            if not changed:
                self.history += state["history"]
                self.write_history()    # an unfinished run of other options may have replaced it
                return state
            print(f"{path.name}: {', '.join(sorted(changed))} changed, so this stage is done again")

    def keep(self, suffix="", **state):
        """Write and return a checkpoint, a dict with state; suffix is added to the file's name."""
        state = {**self.about, "seconds": time.monotonic() - self.began, **state}
        data.save_checkpoint(self.path.with_stem(self.path.stem + suffix), state)
        return state

    def steps(self, n, **parts):
        """Yield the steps, from 0 to n - 1, still to do. parts: the models, optimizers and so on
        that they change, saved every CHECKPOINT_EVERY seconds, with the random state."""
        self.n, start, partial = n, 0, self.reuse(self.partial)
        if partial:
            for name, part in parts.items():
                part.load_state_dict(partial["parts"][name])
            torch.set_rng_state(partial["rng"])
            start = partial["step"]
            self.began -= partial["seconds"]
            print(f"{self.path.name}: resuming after step {start} of {n}")
        saved = time.monotonic()
        for self.step in range(start, n):
            yield self.step             # all of it is done when the loop asks for the next one
            if time.monotonic() - saved > CHECKPOINT_EVERY:
                self.keep("_partial", kind="partial", step=self.step + 1, rng=torch.get_rng_state(),
                          parts={name: part.state_dict() for name, part in parts.items()})
                saved = time.monotonic()

    def log(self, shown=None, **metrics):
        """Keep a step's metrics, floats; print those named in shown, or all, and the time left."""
        done = self.step + 1
        self.history.append({"step": done, **metrics})
        self.write_history()
        left = (time.monotonic() - self.began) / done * (self.n - done)
        values = [f"{key} {metrics[key]:.3g}" for key in shown or metrics]
        print(f"{self.path.stem} {done}/{self.n}", *values, f"{left:.0f} s left", sep="  ")

    def write_history(self):            # whole each time: no step is in it twice after a kill
        if self.history:
            data.write_file(self.path.with_suffix(".metrics.jsonl"),
                            "\n".join(map(json.dumps, self.history)) + "\n")

    def show(self, title, text):        # prints a sample, say, under its title
        print(f"--- {title}\n{text.strip()}")


def run(args, name, function, *earlier, **options):
    """A stage's state: its checkpoint if no input changed, else what function returns, saved.
    earlier: function's arguments, states or texts. options: beta, for PPO; the rest are args'."""
    kind = name.split("_")[0]
    # function gets the stage's own options and no others, so the key has all that it depends on.
    options |= {row.name: getattr(args, row.name) for row in OPTIONS if kind in row.stages}
    inputs = {"seed": args.seed, "device": args.device.type, "dtype": str(args.dtype), **options}
    # The key of an earlier stage stands for all of its inputs, so keys chain.
    inputs |= {state["kind"]: state["key"] for state in earlier if "key" in state}
    inputs["files"] = data.digest(str([texts for texts in earlier if "key" not in texts]))
    if not args.keep:       # scripts that it imports are in the keys of earlier stages
        inputs[function.__module__ + ".py"] = SOURCES[function.__module__]
    stage = Stage(args.out / f"{name}.pt", kind=kind, key=data.digest(str(inputs)), inputs=inputs)
    state = stage.reuse(stage.path)
    if not state:
        # Its own stream of random numbers for every stage, beta and --seed, from torch's global
        # generator, whose state the loop saves. (comparison_loss has pairs of its own.)
        torch.manual_seed(data.fold(f"{args.seed} {name}", 2**31))
        options = SimpleNamespace(**options, device=args.device, dtype=args.dtype)
        state = stage.keep(size=args.size, **function(options, *earlier, stage))
    if data.is_first_process():         # others may get here before it has saved the stage
        stage.partial.unlink(missing_ok=True)
        for kept in args.out.glob(name + "_after*"):
            if data.load_checkpoint(kept)["key"] != state["key"]:       # by a run of other options
                kept.unlink()
    return state


def main():
    """The study: every stage in turn, as far as --until."""
    args, began = parse(), time.monotonic()
    for first in (True, False):         # the first process downloads the plays for all
        if data.is_first_process() == first:
            corpus = data.load_corpus(args.corpus)
            rated = reward.read_ratings(args.labels)
        gpt.barrier(args.device)
    texts = run(args, "data", data.prepare, corpus)
    pretrained = run(args, "pretrain", gpt.pretrain, texts)
    print(f"pretrain: {pretrained['val_bits_per_byte']:.3f} bits per byte on held-out text")
    if args.until == "pretrain":
        return
    rewarded = run(args, "reward", reward.fit_reward, pretrained, rated)
    judged = run(args, "judge", reward.fit_judge, pretrained, rated)
    if args.until == "reward":
        return
    rho = run(args, "rho", ppo.sample_reference, texts, pretrained, rewarded, judged)
    for beta in args.beta:
        name = f"ppo_{args.toward}_beta{beta:g}".replace("positive_", "")
        run(args, name, ppo.tune, pretrained, rewarded, judged, rho, beta=beta)
    if args.until != "ppo" and data.is_first_process():
        sample.report(args.out)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    data.run(main)
