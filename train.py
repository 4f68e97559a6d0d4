"""The whole study: pretrain a GPT, train a reward model, tune the GPT by PPO, report.

Read study() first, then OPTIONS, which has every option on one screen. Between them is the loop
that remembers: each stage writes a checkpoint into --out and is repeated only if something it
depends on has changed. A stage interrupted by Ctrl-C, a kill or a crash resumes from its last
partial checkpoint; on a CPU, with as many threads and processes, the result has the same bits.

    python train.py                             everything at beta 0.2 (README: how long)
    python train.py --beta 0.02 0.1 0.2 0.4     the sweep; stages already done are reused
    python train.py --size tiny --out tiny      a smoke run
    torchrun --nproc_per_node 2 train.py        two processes share the work
"""

import ast
import functools
import json
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

Option = namedtuple("Option", "stages name tiny small base why")
# tiny is a smoke run, small is for a laptop's CPU, base for a GPU of 80 GB. An option belongs to
# the stages named; changing it repeats these stages and all that depend on them.
SIZES = ("tiny", "small", "base")
OPTIONS = list(map(Option._make, [
    # stages       name           tiny   small   base    why one would change it
    ("data", "vocab_size", 512, 2048, 4096, "more make texts shorter, but each token rarer"),
    ("pretrain", "block_size", 128, 128, 256, "tokens of context, which limit the length"),
    ("pretrain", "n_layer", 2, 4, 8, "depth of the transformer"),
    ("pretrain", "n_head", 2, 4, 8, "attention heads; n_embd must be an even multiple"),
    ("pretrain", "n_embd", 64, 256, 512, "width of the transformer"),
    ("pretrain", "pretrain_steps", 150, 330, 1000, "more make a better language model"),
    ("reward", "reward_model", "head", "head", "head",
     "head: a classifier head on the GPT; bag: a bag of words, to compare"),
    ("reward", "feedback", "ratings", "ratings", "ratings",
     "ratings: soft targets; comparisons: which of two was rated higher, as RLHF usually does"),
    ("reward judge rho ppo", "length", 64, 64, 64, "tokens per completion and per rated passage"),
    ("rho", "task", "speeches", "speeches", "speeches",
     "speeches: sample without a prompt; continue: complete openings of speeches"),
    ("rho", "prompts", 8, 8, 8, "openings to continue in PPO, and as many for testing"),
    ("rho", "rho_samples", 2048, 3072, 16384, "more samples of rho estimate J* more precisely"),
    ("ppo", "toward", "positive", "positive", "positive",
     "positive rewards log P(positive), negative log P(negative)"),
    ("ppo", "algorithm", "ppo", "ppo", "ppo", "advantages; simple: rewards-to-go; rloo: minus the "
     "mean of the group's others; grpo: scores whitened per group, KL in the loss; ppo: GAE with "
     "a value function"),
    ("ppo", "iterations", 8, 24, 40, "more come closer to the optimum"),
    ("ppo", "batch", 128, 512, 2048, "completions per iteration: more mean less noise"),
    ("ppo", "group", 4, 4, 4, "completions per prompt within a batch (one prompt: all)"),
    ("ppo", "minibatch", 16, 32, 128, "completions per optimizer step"),
    ("ppo", "unfrozen", 1, 1, 4, "last blocks that PPO trains: more fit more, noise included"),
    ("ppo", "epochs", 1, 1, 1, "passes over each batch: more use it better, but off policy"),
    ("ppo", "lr", 1.2e-3, 1.2e-3, 1.2e-3,
     "initial learning rate, decays to 0; if too high, KL is spent on noise"),
    ("ppo", "clip", 0.2, 0.2, 0.2, "PPO's clip range; lower limits each update more"),
    ("ppo", "lam", 0.8, 0.8, 0.8, "GAE's lambda: lower trusts the value function more"),
    ("ppo", "max_update_kl", 0.02, 0.02, 0.02,
     "approx_kl, nats per token, above which an update stops early"),
    ("ppo", "adaptive_kl_target", 0.0, 0.0, 0.0,
     "ref_kl, nats per completion, that an adaptive beta keeps (Ziegler 2019); 0: fixed beta"),
    ("ppo", "adaptive_kl_horizon", 1e4, 1e4, 1e4,
     "completions over which an adaptive beta changes by about a fifth at most"),
    ("ppo", "fresh_samples", 512, 2048, 4096, "samples for measuring a run: more are more precise"),
]))
CHOICES = {"reward_model": ["head", "bag"], "feedback": ["ratings", "comparisons"],
           "task": ["speeches", "continue"], "toward": ["positive", "negative"],
           "algorithm": ["simple", "rloo", "grpo", "ppo"]}
# The scripts that a stage's result depends on.
FILES = {"data": ["data"], "pretrain": ["data", "gpt"], "reward": ["data", "gpt", "reward"],
         "judge": ["data", "gpt", "reward"], "rho": ["data", "gpt", "reward", "ppo"],
         "ppo": ["data", "gpt", "reward", "ppo"]}


# ---- options ------------------------------------------------------------------------------

def make_parser():
    """The parser of the study's options: those below and one for each row of OPTIONS."""
    parser = data.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", choices=SIZES, help="set of defaults (default: base on CUDA, small on a CPU)")
    add("--beta", type=number(float, 1e-3, 10), nargs="+", default=[0.2],
        help="KL coefficients: a smaller one lets the policy drift farther (default 0.2)")
    add("--out", default="out", type=Path,
        help="folder of checkpoints, figures and report (default out)")
    add("--until", choices=["pretrain", "reward", "ppo"],
        help="stop after this stage (default: run all, write the report)")
    add("--seed", type=number(int, 0, 2**31), default=0,
        help="other seeds show how much results vary by chance (default 0)")
    add("--device", choices=["cpu", "cuda"], help="where to compute (default: cuda if available)")
    add("--fp32", action="store_true", help="compute in float32 even where bfloat16 is faster")
    add("--keep", action="store_true",
        help="reuse finished stages even if the source code has changed")
    add("--checkpoint-every", type=number(float, 0), default=30.0,
        help="seconds between partial checkpoints: what a crash may cost (default 30)")
    add("--corpus", metavar="FILE.txt", help="your own text instead of the plays")
    add("--labels", metavar="FILE.csv", nargs="+", help="your own ratings instead of labels/; "
        "columns: play, first_line, last_line, rating; or text, rating")
    for option in OPTIONS:
        kind = type(option.small)
        if kind is not str:
            kind = number(kind, 1 if kind is int else 0)
        values = f"{option.tiny}, {option.small}, {option.base}"
        if option.tiny == option.small == option.base:
            values = option.small
        add("--" + option.name.replace("_", "-"), type=kind, choices=CHOICES.get(option.name),
            help=f"{option.why} ({values})")
    return parser


def parse(argv=None):
    """Parse the options, fill in the defaults of --size, check them against each other."""
    parser = make_parser()
    args = parser.parse_args(argv)
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda: torch sees no CUDA device here; leave the option out")
    args.device = torch.device(args.device or ("cuda" if has_cuda else "cpu"))
    args.size = args.size or ("base" if args.device.type == "cuda" else "small")
    for option in OPTIONS:
        if getattr(args, option.name) is None:
            setattr(args, option.name, getattr(option, args.size))
    longest = args.block_size - (1 if args.task == "speeches" else data.LONGEST_PROMPT)
    if not reward.SHORTEST <= args.length <= longest:
        parser.error(f"--length must be {reward.SHORTEST} to {longest}, not {args.length}")
    if args.n_embd % (2 * args.n_head):
        parser.error(f"--n-embd {args.n_embd} must be an even multiple of --n-head {args.n_head}")
    if args.lam > 1:
        parser.error(f"--lam must be 0 to 1, not {args.lam:g}")
    if args.group < 2 or args.batch % args.group:
        parser.error(f"--batch {args.batch} must be a multiple of --group, 2 or more")
    args.dtype = torch.float32 if args.fp32 else gpt.compute_dtype(args.device)
    return args


# ---- the loop that remembers --------------------------------------------------------------

@functools.cache
def source(file):
    """Fingerprint of a script's syntax tree, without comments, blank lines and docstrings.

    It is cached at the first call: edits during a run count from the next run on.
    """
    tree = ast.parse((data.HERE / f"{file}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        if documented and ast.get_docstring(node):
            del node.body[0]
    kept = []
    for node in tree.body:
        # The script's own command, and the reader's reward: no stage calls them.
        if getattr(node, "name", "") not in ("main", "my_reward"):
            kept.append(ast.dump(node))
    return data.digest("".join(kept))


class Stage:
    """A stage's checkpoint, and the loop that remembers.

    inputs holds all that the result depends on: the stage's options, the source of its FILES, the
    keys of earlier stages, and outside (corpus, labels, beta). A stage receives no other options.
    key is the fingerprint of inputs, so that any change also changes the keys of later stages.
    state is the checkpoint --out/name.pt if it has the same inputs, else None.
    """

    def __init__(self, args, name, earlier, outside):
        kind = name.split("_")[0]
        self.path = args.out / f"{name}.pt"
        self.partial_path = self.path.with_suffix(".partial.pt")
        self.log_path = self.path.with_suffix(".metrics.jsonl")
        self.keep_source, self.checkpoint_every = args.keep, args.checkpoint_every
        self.inputs = {"seed": args.seed, "device": args.device.type, "dtype": str(args.dtype)}
        for option in OPTIONS:
            if kind in option.stages.split():
                self.inputs[option.name] = getattr(args, option.name)
        self.inputs |= outside
        # Every stage, beta and --seed has its own random numbers.
        self.options = SimpleNamespace(**self.inputs)
        self.options.seed = data.fold(f"{args.seed} {name}", 2**31)
        self.options.device, self.options.dtype = args.device, args.dtype
        for file in FILES[kind]:
            self.inputs[f"{file}.py"] = source(file)
        for state in earlier:
            self.inputs[state["kind"]] = state["key"]
        self.key = data.digest(json.dumps(self.inputs))
        self.about = {"kind": kind, "key": self.key, "inputs": self.inputs, "size": args.size}
        self.history, self.start = [], 0
        self.began = self.printed = time.monotonic()
        self.state = self.reuse(self.path)

    def reuse(self, path):
        """The checkpoint at path if it has the same inputs, else None; prints what has changed.

        With --keep, changes of source code are ignored.
        """
        if not path.exists():
            return None
        state = data.load_checkpoint(path)
        changed = []
        for name in state["inputs"] | self.inputs:
            same = state["inputs"].get(name) == self.inputs.get(name)
            if not same and not (self.keep_source and name.endswith(".py")):
                changed.append(name)
        if not changed:
            return state
        print(f"{path.name}: {', '.join(changed)} changed, so this stage is done again")
        return None

    def steps(self, n, **parts):
        """Yield the step numbers up to n - 1, from the last partial checkpoint if there is one.

        parts: all that the loop changes, each with state_dict() and load_state_dict().
        """
        self.n = n
        partial = self.reuse(self.partial_path)
        if partial:
            for name, part in parts.items():
                part.load_state_dict(partial["parts"][name])
            # The global random state; a loop's own generators are among its parts.
            torch.set_rng_state(partial["rng"])
            self.start, self.history = partial["step"], partial["history"]
            self.began -= partial["seconds"]
            print(f"{self.path.name}: resuming after step {self.start} of {n}")
        else:
            for old in self.path.parent.glob(f"{self.path.stem}_kl*.pt"):
                old.unlink(missing_ok=True)     # kept by a run that this one replaces
        saved = time.monotonic()
        for self.step in range(self.start, n):
            # When the generator resumes, the loop has finished this step.
            yield self.step
            if time.monotonic() - saved > self.checkpoint_every and self.step + 1 < n:
                self.save_partial(parts)
                saved = time.monotonic()

    def save_partial(self, parts):
        """Write all that is needed to resume after this step."""
        states = {name: part.state_dict() for name, part in parts.items()}
        data.save_checkpoint(self.partial_path, {
            **self.about, "kind": "partial", "step": self.step + 1, "history": self.history,
            "seconds": time.monotonic() - self.began, "parts": states,
            "rng": torch.get_rng_state()})

    def log(self, pause=5.0, shown=None, **metrics):
        """Save a step's metrics; every pause seconds print those in shown (or all), time left."""
        metrics = {"step": self.step + 1, **metrics}
        self.history.append(metrics)
        # Rewrite the whole file, so that no step is in it twice after a kill.
        lines = [json.dumps(row) + "\n" for row in self.history]
        data.write_file(self.log_path, "".join(lines))
        now, done = time.monotonic(), self.step + 1
        if now - self.printed >= pause or done == self.n:
            self.printed = now
            left = (now - self.began) / done * (self.n - done)
            values = [f"{key} {metrics[key]:.3g}" for key in shown or metrics if key in metrics]
            print(f"{self.path.stem} {done}/{self.n}  {'  '.join(values)}  "
                  f"{left // 60:.0f}:{left % 60:02.0f} left")

    def show(self, title, text):
        """Print a text under a title, indented."""
        print(f"--- {title}\n    " + text.strip().replace("\n", "\n    "))

    def keep(self, name, **state):
        """Save an intermediate policy beside the stage's checkpoint, for sample.py --checkpoint."""
        data.save_checkpoint(self.path.with_name(f"{self.path.stem}_{name}.pt"),
                             {**self.about, **state})

    def finish(self, results):
        """Write the checkpoint of the finished stage, with its inputs and history."""
        self.state = {**self.about, "history": self.history,
                      "seconds": time.monotonic() - self.began, **results}
        data.save_checkpoint(self.path, self.state)
        if data.is_first_process():     # other processes may arrive before it has written
            self.partial_path.unlink(missing_ok=True)


def run(args, name, function, *inputs, **outside):
    """The state of a stage: its checkpoint if still valid, else the results of function, saved.

    inputs: states of earlier stages, which have keys, and data from outside (corpus, labels), which
    enter the stage's key by content.
    """
    earlier = []
    for x in inputs:
        if "key" in x:
            earlier.append(x)
        else:
            name_of = "labels" if isinstance(x, dict) else "corpus"
            outside[name_of] = data.digest(json.dumps(x))
    stage = Stage(args, name, earlier, outside)
    if stage.state:
        stage.partial_path.unlink(missing_ok=True)      # left by a kill within finish()
    else:
        torch.manual_seed(stage.options.seed)           # for the stage's initial weights
        stage.finish(function(stage.options, *inputs, stage))
    return stage.state


# ---- the study ----------------------------------------------------------------------------

def study(args):
    """Run every stage in turn, up to --until."""
    if not data.is_first_process():
        gpt.barrier(args.device)        # wait for the first process to write corpus and tokenizer
    corpus = data.load_corpus(args.corpus)
    rated = reward.read_ratings(args.labels)
    texts = run(args, "data", data.prepare, corpus)
    data.save_tokenizer(args.out / "tokenizer.tiktoken", texts["vocabulary"])
    if data.is_first_process():
        gpt.barrier(args.device)        # release the others, which wait above
    pretrained = run(args, "pretrain", gpt.pretrain, texts)
    print(f"pretrain: {pretrained['parameters']:,} parameters, "
          f"{pretrained['val_bits_per_byte']:.3f} bits per byte on held-out text")
    if args.until == "pretrain":
        return
    rewarded = run(args, "reward", reward.fit_reward, pretrained, rated)
    judged = run(args, "judge", reward.fit_judge, pretrained, rated)
    if args.until == "reward":
        return
    rho = run(args, "rho", ppo.sample_reference, texts, pretrained, rewarded, judged)
    for beta in sorted(set(args.beta)):
        twin = "" if args.toward == "positive" else f"{args.toward}_"
        run(args, f"ppo_{twin}beta{beta:g}", ppo.tune, pretrained, rewarded, judged, rho, beta=beta)
    if args.until != "ppo" and data.is_first_process():
        sample.report(args.out)


def main():
    args = parse()
    for file in FILES["ppo"]:
        source(file)                    # cached before anyone can edit it
    args.device = gpt.join_processes(args.device)
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob(f".*{data.HALF_WRITTEN}"):     # of a killed write
        old.unlink(missing_ok=True)
    study(args)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    data.run(main)
