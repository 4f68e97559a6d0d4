"""The whole study: pretrain a GPT, train a reward model, tune the GPT by PPO, report.

Read study() first, then TABLE, which has every knob on one screen. What lies between is the loop
that remembers: each stage writes a checkpoint into --out, and is done again only if something it
depends on has changed. A stage that was cut off, by Ctrl-C or a kill or a crash, resumes from its
last partial checkpoint, on a CPU (with as many threads and processes) to the same bits.

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
from data import number

# tiny is a smoke run, small is for a laptop's CPU, base for a GPU of 80 GB. An option belongs to
# the stages named; changing it repeats these stages and all that depend on them. The columns, two
# spaces apart: stages, name, value (of tiny, small and base; or one for all; or choices, the first
# the default), reason to change it.
SIZES = ("tiny", "small", "base")
TABLE = """
data      vocab_size      512 2048 4096  more make texts shorter, but each token rarer
pretrain  block_size      128 128 256    tokens of context, which limit the length
pretrain  n_layer         2 4 8          depth of the transformer
pretrain  n_head          2 4 8          attention heads; n_embd must be an even multiple
pretrain  n_embd          64 256 512     width of the transformer
pretrain  pretrain_steps  150 300 1000   more make a better language model
reward    reward_model    head|bag       a classifier head on the GPT, or a bag of words to compare
reward    feedback        ratings|comparisons  soft targets, or which of two is rated higher
reward judge rho ppo  length  64         tokens per completion and per rated passage
rho       task            speeches|continue  sample without a prompt, or continue openings
rho       prompts         8              openings to continue in PPO, and as many for testing
rho       rho_samples     2048 3072 16384  more samples of rho estimate J* more precisely
ppo       toward          positive|negative  rewards log P(positive) or log P(negative)
ppo       algorithm       ppo|simple|rloo|grpo  the estimator in PPO.advantages
ppo       iterations      8 50 50        more come closer to the optimum
ppo       batch           128 512 2048   completions per iteration: more mean less noise
ppo       group           4              completions per prompt within a batch (one prompt: all)
ppo       minibatch       16 32 128      completions per optimizer step
ppo       unfrozen        1 1 4          last blocks that PPO trains: more fit more, noise included
ppo       epochs          1              passes over each batch: more reuse it, but pi has moved
ppo       lr              1.2e-3 1.2e-3 6e-4  PPO's learning rate; if too high, KL is spent on noise
ppo       clip            0.2            PPO's clip range; lower limits each update more
ppo       lam             0.8            GAE's lambda: lower trusts the value function more
ppo       max_update_kl   0.02           approx_kl, nats per token, that ends an update
ppo       adaptive_kl_target  0.0        ref_kl that an adaptive beta keeps (Ziegler 2019); 0: fixed
ppo       adaptive_kl_horizon  1e4       completions in which that beta may change by a fifth
ppo       fresh_samples   512 2048 4096  samples for measuring a run: more are more precise
"""
Option = namedtuple("Option", "stages name tiny small base choices why")


def read_options(table):
    """The rows of the table as Options; choices is None for numbers."""
    options = []
    for line in table.strip().split("\n"):
        stages, name, values, why = re.split("  +", line)
        choices = values.split("|") if "|" in values else None
        defaults = choices[:1] if choices else list(map(ast.literal_eval, values.split()))
        sizes = (defaults * 3)[:3]                      # of three values or of one
        options.append(Option(stages, name, *sizes, choices, f"{why} ({values})"))
    return options


OPTIONS = read_options(TABLE)
CHECKPOINT_EVERY = 30.0     # seconds of work that a crash or Ctrl-C may cost


# ---- options ------------------------------------------------------------------------------

def parse(argv=None):
    """The options below and those of OPTIONS, filled in by --size, checked against each other."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = data.Parser(description="The whole study, from text to plots.")
    add = parser.add_argument
    add("--size", choices=SIZES, help="three values below are for tiny, small and base "
        "(default: base on CUDA, small on a CPU)")
    add("--beta", type=number(float, 1e-3, 10), nargs="+", default=[0.2],
        help="KL coefficients: smaller lets the policy drift farther for reward (default 0.2)")
    add("--out", default="out", type=Path, help="checkpoints, figures and report (default out)")
    add("--until", choices=["pretrain", "reward", "ppo"],
        help="stop after this stage (default: all, and the report)")
    add("--seed", type=number(int, 0, 2**31), default=0,
        help="another seed shows how far results are chance (default 0)")
    add("--device", choices=devices, default=devices[0], help="default: cuda where there is one")
    add("--fp32", action="store_true", help="compute in float32 where bfloat16 would be faster")
    add("--keep", action="store_true", help="reuse finished stages although source code changed")
    add("--corpus", metavar="FILE.txt", help="a text of your own, not the plays")
    add("--labels", metavar="FILE.csv", nargs="+", help="your own ratings, not those of labels/: "
        "text, rating; or play, first_line, last_line, rating")
    types = {int: number(int, 1), float: number(float, 0)}
    for option in OPTIONS:
        add("--" + option.name.replace("_", "-"), type=types.get(type(option.small)),
            choices=option.choices, help=option.why)
    args = parser.parse_args(argv)
    args.device = torch.device(args.device)
    args.dtype = torch.float32 if args.fp32 else gpt.compute_dtype(args.device)
    args.size = args.size or ("base" if args.device.type == "cuda" else "small")
    for option in OPTIONS:
        if getattr(args, option.name) is None:
            setattr(args, option.name, getattr(option, args.size))
    longest = args.block_size - (1 if args.task == "speeches" else data.LONGEST_PROMPT)
    if not reward.SHORTEST <= args.length <= longest:
        parser.error(f"--length must be from {reward.SHORTEST} to {longest}")
    if args.n_embd % (2 * args.n_head):
        parser.error("--n-embd must be an even multiple of --n-head")
    if args.group < 2 or args.batch % args.group:
        parser.error("--batch must be a multiple of --group, 2 or more")
    if args.rho_samples < 100:
        parser.error("--rho-samples must be 100 or more")
    if args.adaptive_kl_target and args.adaptive_kl_horizon < args.batch:
        parser.error("--adaptive-kl-horizon must be --batch or more")
    return args


# ---- the loop that remembers --------------------------------------------------------------

def source(file):
    """Fingerprint of a script's syntax tree, without comments, blank lines and docstrings."""
    tree = ast.parse((data.HERE / file).read_bytes())
    for node in ast.walk(tree):
        # No stage calls a script's own command or the reward that users replace.
        if getattr(node, "name", "") in ("main", "my_reward"):
            node.body = []
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = None           # a docstring
    return data.digest(ast.dump(tree))


# The script whose function does a stage. What it imports counts through the stages before it.
FILES = {"data": "data.py", "pretrain": "gpt.py", "reward": "reward.py", "judge": "reward.py",
         "rho": "ppo.py", "ppo": "ppo.py"}
# As they are now: edits during a run count from the next run on.
SOURCES = {file: source(file) for file in FILES.values()}


class Stage:
    """The loop that remembers: checkpoints and metrics of the stage whose file is path.

    about: its kind, its inputs (all that the result depends on), their key and the size.
    """

    def __init__(self, path, about):
        self.path, self.about = path, about
        self.partial = path.with_stem(path.stem + "_partial")
        self.history, self.began = [], time.monotonic()

    def reuse(self, path):
        """The checkpoint at path, or None if there is none or an input changed (printed)."""
        if path.exists():
            state = data.load_checkpoint(path)
            changed = dict(self.about["inputs"].items() - state["inputs"].items())
            if not changed:
                return state
            print(f"{path.name}: {', '.join(sorted(changed))} changed, so this stage is done again")

    def keep(self, *mark, **state):
        """Write and return the stage's checkpoint, a dict (*mark: name suffixes)."""
        state = {**self.about, "history": self.history,
                 "seconds": time.monotonic() - self.began, **state}
        name = "_".join([self.path.stem, *mark])
        data.save_checkpoint(self.path.with_stem(name), state)
        return state

    def steps(self, n, **parts):
        """Yield the steps of n still to do, writing partial checkpoints.

        parts: all that the loop changes, with state_dict() and load_state_dict().
        """
        self.n, start, partial = n, 0, self.reuse(self.partial)
        if partial and partial["parts"].keys() == parts.keys():
            for name, part in parts.items():
                part.load_state_dict(partial["parts"][name])
            torch.set_rng_state(partial["rng"])
            start, self.history = partial["step"], partial["history"]
            self.began -= partial["seconds"]
            print(f"{self.path.name}: resuming after step {start} of {n}")
        saved = time.monotonic()
        for self.step in range(start, n):
            # The loop has done all of step i when it asks for the next one.
            yield self.step
            if time.monotonic() - saved > CHECKPOINT_EVERY:
                self.keep("partial", kind="partial", step=self.step + 1, rng=torch.get_rng_state(),
                          parts={name: part.state_dict() for name, part in parts.items()})
                saved = time.monotonic()

    def log(self, shown=None, **metrics):
        """Keep a step's metrics; print those shown or all, and the time left."""
        done = self.step + 1
        self.history.append({"step": done, **metrics})
        # The whole file each time: so no step stands in it twice after a kill.
        lines = "\n".join(map(json.dumps, self.history)) + "\n"
        data.write_file(self.path.with_suffix(".metrics.jsonl"), lines)
        left = (time.monotonic() - self.began) / done * (self.n - done)
        values = [f"{key} {metrics[key]:.3g}" for key in shown or metrics if key in metrics]
        print(f"{self.path.stem} {done}/{self.n}", *values, f"{left:.0f} s left", sep="  ")

    def show(self, title, text):
        print(f"--- {title}\n{text.strip()}")


def run(args, name, function, *earlier, **options):
    """The state of a stage: its checkpoint if it still holds, else the results of function, saved.

    earlier: states of earlier stages, and the corpus or ratings read from files. function gets the
    stage's own options and no others, so any change of an input changes this key and all later.
    """
    kind = name.split("_")[0]
    for option in OPTIONS:
        if kind in option.stages:
            options[option.name] = getattr(args, option.name)
    inputs = {"seed": args.seed, "device": args.device.type, "dtype": str(args.dtype), **options}
    for state in earlier:
        # A key stands for all that an earlier stage read, so keys chain.
        if "key" in state:
            inputs[state["kind"]] = state["key"]
        else:
            inputs["files"] = data.digest(str(state))
    if not args.keep:
        inputs[FILES[kind]] = SOURCES[FILES[kind]]
    about = {"kind": kind, "key": data.digest(str(inputs)), "inputs": inputs, "size": args.size}
    stage = Stage(args.out / f"{name}.pt", about)
    state = stage.reuse(stage.path)
    if not state:
        # Its own stream of random numbers for every stage, beta and --seed, from torch's global
        # generator, whose state the loop saves. (comparison_loss has pairs of its own.)
        torch.manual_seed(data.fold(f"{args.seed} {name}", 2**31))
        options = SimpleNamespace(**options, device=args.device, dtype=args.dtype)
        state = stage.keep(**function(options, *earlier, stage))
    if data.is_first_process():         # the others may be here before it has written
        stage.partial.unlink(missing_ok=True)
    return state


# ---- the study ----------------------------------------------------------------------------

def study(args):
    """Every stage in turn, as far as --until."""
    first = data.is_first_process()
    if not first:                       # the first process fetches the plays, once for all
        gpt.barrier(args.device)
    corpus = data.load_corpus(args.corpus)
    rated = reward.read_ratings(args.labels)
    if first:
        gpt.barrier(args.device)
    texts = run(args, "data", data.prepare, corpus)
    data.save_tokenizer(args.out / "tokenizer.tiktoken", texts["vocabulary"])
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
        twin = "" if args.toward == "positive" else f"{args.toward}_"
        run(args, f"ppo_{twin}beta{beta:g}", ppo.tune, pretrained, rewarded, judged, rho, beta=beta)
    if args.until != "ppo" and first:
        sample.report(args.out)


def main():
    args = parse()
    args.device = gpt.join_processes(args.device)
    began = time.monotonic()
    study(args)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    data.run(main)
