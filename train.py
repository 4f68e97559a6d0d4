"""The whole study: pretrain a GPT, train a reward model, tune the GPT by PPO, report.

Fifth on the reader's path: it adds the loop that remembers, and puts the others together. Its
stages are data, pretrain, reward, judge (a second reward model, only to measure with), rho (samples
of the pretrained model, which say what a score is) and one PPO run for each beta. Each writes a
checkpoint into --out. A stage is done again only if something that it read has changed: an option,
its input, or the source it runs. One that was cut off, by Ctrl-C or a kill or a crash, goes on from
its last partial checkpoint, on a CPU (with as many threads and processes) to the same bits.

    python train.py                             everything at beta 0.2 (README: how long)
    python train.py --beta 0.02 0.1 0.2 0.4     the sweep; stages already done are reused
    python train.py --size tiny --out tiny      a smoke run
    torchrun --nproc_per_node 2 train.py        two processes share the work
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import gpt
import ppo
import reward
from data import number
from gpt import GPT, PAD, Generator, GPTConfig, in_chunks, load_gpt, sample_completions

try:
    import fcntl                # locks; Windows has none, and there two runs are not kept apart
except ImportError:
    fcntl = None

# What --size sets: tiny shows that all works, small is for a laptop's CPU, base for a GPU of 80 GB.
SIZES = {
    "tiny": {"vocab_size": 512, "block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 64,
             "pretrain_steps": 150, "judge_steps": 60, "iterations": 4, "batch": 64,
             "minibatch": 32, "prompts": 32, "rho_samples": 2048, "fresh_samples": 256},
    "small": {"vocab_size": 2048, "block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 256,
              "pretrain_steps": 1000, "judge_steps": 400, "iterations": 50, "batch": 512,
              "minibatch": 32, "prompts": 128, "rho_samples": 4096, "fresh_samples": 2048},
    "base": {"vocab_size": 4096, "block_size": 256, "n_layer": 8, "n_head": 8, "n_embd": 512,
             "pretrain_steps": 2000, "judge_steps": 400, "iterations": 60, "batch": 2048,
             "minibatch": 128, "prompts": 256, "rho_samples": 16384, "fresh_samples": 4096},
}
# Nats per completion at which PPO keeps a copy of the policy, the first time its drift passes them.
KL_MARKS = [0.5, 1, 2, 4, 6, 8, 10, 16, 32]
LONGEST_PROMPT = 32             # tokens


# ---- options ------------------------------------------------------------------------------

def make_parser():
    """The options of the study. Those that --size sets have no default of their own."""
    parser = data.Parser(description=__doc__.split("\n")[0])
    count, amount = number(int, 1), number(float, 0, 10**6)
    study = parser.add_argument_group("the study")
    study.add_argument("--size", choices=list(SIZES),
                       help="model and budget (default: base on CUDA, small on a CPU)")
    study.add_argument("--beta", type=number(float, 0, 10), nargs="+", default=[0.2],
                       help="KL coefficients: smaller lets the policy drift farther for reward "
                       "(default 0.2)")
    study.add_argument("--task", choices=["speeches", "continue"], default="speeches",
                       help="write from nothing; or continue speeches whose first lines are "
                       "given, each to its end (default speeches)")
    study.add_argument("--reward", choices=["ratings", "comparisons"], default="ratings",
                       help="the reward model learns ratings; or which of two passages was rated "
                       "higher, as RLHF usually does (default ratings)")
    study.add_argument("--toward", choices=["positive", "negative"], default="positive",
                       help="negative: the twin that is rewarded for log P(negative)")
    study.add_argument("--out", default="out", type=Path, help="folder of checkpoints, figures "
                       "and report; another one keeps this study (default out)")
    study.add_argument("--seed", type=number(int, 0, 2**31), default=0,
                       help="another seed shows how far results are chance (default 0)")
    study.add_argument("--device", choices=["cpu", "cuda"],
                       help="where to compute (default: cuda where there is one)")
    study.add_argument("--fp32", action="store_true", help="compute in float32 where bfloat16 "
                       "would be faster, to compare with machines that lack it")
    study.add_argument("--keep", action="store_true", help="reuse finished stages although their "
                       "source code has changed since")
    study.add_argument("--checkpoint-every", type=amount, default=30.0,
                       help="seconds of work that a crash or Ctrl-C may cost (default 30)")
    texts = parser.add_argument_group("texts")
    texts.add_argument("--corpus", metavar="FILE.txt", help="a text of your own, not the plays")
    texts.add_argument("--labels", metavar="FILE.csv", nargs="+", help="your own ratings, not "
                       "those of labels/: play, first_line, last_line, rating; or text, rating")
    texts.add_argument("--vocab-size", type=number(int, 257, 65535), help="tokens of the tokenizer "
                       "trained here: more make texts shorter, tokens rarer")
    budgets = parser.add_argument_group("budgets (--size sets them)")
    budgets.add_argument("--until", choices=["pretrain", "reward", "ppo"], help="stop after this "
                         "stage (reward: after both reward models; default: all, and the report)")
    budgets.add_argument("--pretrain-steps", type=count, help="more make a better writer")
    budgets.add_argument("--judge-steps", type=count, help="of the classifier head on the trunk")
    settings = parser.add_argument_group("PPO")
    settings.add_argument("--stop-at-kl", type=amount, metavar="NATS",
                          help="end a run where its drift passes so many nats a completion")
    kinds = {int: count, float: amount, str: str}
    for field in dataclasses.fields(ppo.PPOConfig):
        if field.name == "beta":                # stands above, for there may be several
            continue
        by_size = field.name in SIZES["small"]
        text = field.metadata["help"] + (" (--size sets it)" if by_size else
                                         f" (default {field.default})")
        settings.add_argument("--" + field.name.replace("_", "-"), type=kinds[field.type],
                              default=None if by_size else field.default,
                              help=text, choices=field.metadata.get("choices"))
    return parser


def parse(argv=None):
    """The options, with those filled in that --size sets, checked against each other."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; leave the option out")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(args.device or found)
    args.size = args.size or ("base" if args.device.type == "cuda" else "small")
    for name, value in SIZES[args.size].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    longest = args.block_size - (1 if args.task == "speeches" else LONGEST_PROMPT)
    if not reward.SHORTEST <= args.length <= longest:
        parser.error(f"--length {args.length} must be from {reward.SHORTEST}, or it has no "
                     f"feeling, to {longest}, or it leaves the context")
    if args.task == "continue" and args.batch % args.per_prompt:
        parser.error(f"--batch {args.batch} must be a multiple of --per-prompt {args.per_prompt}")
    try:
        args.runs = [ppo_config(args, beta) for beta in sorted(set(args.beta))]
    except ValueError as error:
        parser.error(str(error))
    args.dtype = torch.float32 if args.fp32 else gpt.compute_dtype(args.device)
    return args


def ppo_config(args, beta):
    """The PPOConfig of one run; ValueError where the options do not fit together."""
    names = [field.name for field in dataclasses.fields(ppo.PPOConfig)]
    options = {name: getattr(args, name) for name in names}
    return ppo.PPOConfig(**{**options, "beta": beta})


# ---- the loop that remembers --------------------------------------------------------------

@functools.cache
def digests(file):
    """{name: digest} of the functions and classes of a script, and of all of it under "".

    Comments and docstrings do not count. Of the script as it was when first asked for: later edits
    are the next run's.
    """
    # A syntax tree knows neither comments nor blank lines.
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        if documented and ast.get_docstring(node):
            del node.body[0]
    found = {node.name: data.digest(ast.dump(node)) for node in tree.body if hasattr(node, "name")}
    return {**found, "": data.digest(ast.dump(tree))}


def source_digests(code):
    """Of modules and functions: {"gpt.py": digest, "train.py: pretrain_stage": digest}."""
    found = {}
    for thing in code:
        # A decorated function is not its decorator's.
        file = inspect.getsourcefile(inspect.unwrap(thing))
        name = "" if inspect.ismodule(thing) else thing.__name__
        found[f"{Path(file).name}: {name}".removesuffix(": ")] = digests(file)[name]
    return found


def state_digest(state):
    """What tells what a stage left from anything else: a digest of its model's tensors, or its own.
    """
    tensors = state.get("model", state)
    return data.digest({key: x for key, x in tensors.items() if torch.is_tensor(x)})


def finished(path, inputs, keep=False):
    """The checkpoint at path if what wrote it had these inputs, else None, saying what changed.

    keep: a change of source code alone does not count.
    """
    if not path.exists():
        return None
    state = data.load_checkpoint(path)
    old = state.get("inputs", {})
    # Whatever is new, gone, or different.
    changed = [key for key in {**old, **inputs} if old.get(key) != inputs.get(key)]
    if keep:
        changed = [key for key in changed if ".py" not in key]
    if changed:
        print(f"{path.name}: {', '.join(changed)} changed, so this stage is done again", flush=True)
        return None
    return state


class Stage:
    """One stage of the study, and its loop: an iterator over steps that remembers.

        stage = Stage(args, "pretrain", ["pretrain_steps"], [texts], code=[gpt, pretrain_stage])
        if stage.done:
            return stage.state
        model, optimizer = ...
        for i in stage.steps(1000, model=model, optimizer=optimizer):
            ...                                  one step
            stage.log(loss=loss.item())
        return stage.finish(model=model.state_dict())

    The result depends on these options, on what earlier stages left (states), and on the source of
    code, modules and functions; more: what else there is. The stage is done if all these, its
    inputs, are those of --out/name.pt.
    """

    def __init__(self, args, name, options, states, code, **more):
        self.args, self.path = args, args.out / f"{name}.pt"
        values = {option: getattr(args, option) for option in [*options, "seed"]}
        earlier = {state["kind"]: state_digest(state) for state in states}
        self.inputs = {**more, **values, "dtype": str(args.dtype), "device": args.device.type,
                       **earlier, **source_digests([*code, seed_of, generator])}
        self.partial = self.path.with_suffix(".partial.pt")
        self.log_path = self.path.with_suffix(".metrics.jsonl")
        self.state = finished(self.path, self.inputs, args.keep)
        self.done = self.state is not None
        self.history, self.start = [], 0
        self.began = self.printed = time.monotonic()
        if self.done:
            self.partial.unlink(missing_ok=True)    # left by a kill at the end of finish()
        else:
            torch.manual_seed(args.seed)            # of the weights that the stage will make

    def steps(self, n, **parts):
        """Yield the numbers of the steps of n that are still to do.

        parts: whatever the loop changes, each with state_dict() and load_state_dict().
        """
        self.n = n
        left = finished(self.partial, self.inputs, self.args.keep)
        if left:
            for name, part in parts.items():
                part.load_state_dict(left["parts"][name])
            # The global stream; each loop's own generators are among its parts.
            torch.set_rng_state(left["rng"])
            self.start, self.history = left["step"], left["history"]
            self.began -= left["seconds"]
            print(f"{self.path.name}: going on after step {self.start} of {n}", flush=True)
        saved = time.monotonic()
        for self.step in range(self.start, n):
            # Whatever the loop does with step i is done when it asks for the next one.
            yield self.step
            if time.monotonic() - saved > self.args.checkpoint_every and self.step + 1 < n:
                self.save_partial(parts)
                saved = time.monotonic()

    def save_partial(self, parts):
        """Write all that going on after this step needs."""
        data.save_checkpoint(self.partial, {
            "kind": "partial",
            "inputs": self.inputs,
            "step": self.step + 1,
            "seconds": time.monotonic() - self.began,
            "history": self.history,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "rng": torch.get_rng_state()})

    def log(self, pause=5.0, shown=None, **metrics):
        """Keep a step's metrics; print those shown (all), every pause seconds, with time left."""
        metrics = {"step": self.step + 1, **metrics}
        self.history.append(metrics)
        # The whole file each time: so no step stands in it twice after a kill.
        data.write_file(self.log_path, "".join(json.dumps(row) + "\n" for row in self.history))
        now, done = time.monotonic(), self.step + 1
        if now - self.printed >= pause or done == self.n:
            self.printed = now
            left = (now - self.began) / done * (self.n - done)
            shown = shown or [key for key in metrics if key != "step"]
            values = "  ".join(f"{key} {metrics[key]:.3g}" for key in shown if key in metrics)
            print(f"{self.path.stem} {done}/{self.n}  {values}  "
                  f"{left // 60:.0f}:{left % 60:02.0f} left", flush=True)

    def finish(self, **results):
        """Write the checkpoint of the finished stage, with its options and history; return it."""
        # weights_only reads plain values alone, so paths and dtypes are kept as text.
        plain = (int, float, list, type(None))
        options = {key: value if isinstance(value, plain) else str(value)
                   for key, value in vars(self.args).items() if key != "runs"}
        self.state = {"kind": self.path.stem.split("_")[0],
                      "args": options,
                      "inputs": self.inputs,
                      "history": self.history,
                      "seconds": time.monotonic() - self.began,
                      **results}
        data.save_checkpoint(self.path, self.state)
        if data.is_first_process():     # the others may be here before it has written
            self.partial.unlink(missing_ok=True)
        return self.state


@contextlib.contextmanager
def locked(folder):
    """Make folder and hold it for this run alone: a second is refused. The lock dies with us."""
    if not data.is_first_process():                 # it holds the folder for all
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise data.UserError(f"cannot use the folder {folder}: {error.strerror}. "
                             "Choose another --out.") from None
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise data.UserError(f"another run is using {folder}. Wait for it to end, "
                                 "or choose another --out.") from None
        for left in folder.glob(f".*{data.HALF_WRITTEN}"):      # of a write that was killed
            left.unlink()
        yield


def seed_of(args, use, beta=0.0):
    """The seed of one use of randomness, different for every --seed, use, and beta of a sweep.

    With one seed for all, what one use draws would depend on what another drew.
    """
    return data.fold(f"{args.seed} {use} {beta:g}", 2**31)


def generator(args, use, beta=0.0):
    """A generator on the device for one use."""
    return torch.Generator(args.device).manual_seed(seed_of(args, use, beta))


# ---- the stages ---------------------------------------------------------------------------

def data_stage(args, corpus):
    """The corpus (training text, held-out text) -> tokenizer.tiktoken, token arrays: data.pt."""
    path = args.out / "tokenizer.tiktoken"
    # A lost tokenizer is made again, just the same.
    if not path.exists():
        (args.out / "data.pt").unlink(missing_ok=True)
    stage = Stage(args, "data", ["vocab_size"], [], pieces=data.PIECES,
                  corpus=data.digest(json.dumps(corpus)),
                  code=[data.train_bpe, data.merge, data_stage])
    if not stage.done:
        data.save_tokenizer(path, data.train_bpe(corpus[0], args.vocab_size))
        tokenizer = data.load_tokenizer(path)
        train, held_out = (torch.tensor(tokenizer.encode_ordinary(text), dtype=torch.int32)
                           for text in corpus)
        vocabulary = tokenizer.decode_tokens_bytes(list(range(tokenizer.n_vocab)))
        sizes = torch.tensor([len(token) for token in vocabulary])
        stage.finish(tokenizer=data.vocabulary_digest(tokenizer._mergeable_ranks),
                     train=train, held_out=held_out, bytes=sizes)
    texts = stage.state
    tokenizer = data.load_tokenizer(path, texts)
    n, held_out = len(texts["train"]), len(texts["held_out"])
    print(f"data: {n:,} training tokens, {held_out:,} held out, of {tokenizer.n_vocab:,} kinds")
    return texts, tokenizer


def windows(tokens, starts, length):
    """tokens[s : s + length] for each of starts: (B,length), int64."""
    rows = starts[:, None] + torch.arange(length)
    return tokens[rows].long()


def draw_starts(n, openings, batch, generator):
    """Where a batch of windows begins, of n places: half of them at openings, (batch,).

    There samples will begin, with nothing before.
    """
    starts = torch.randint(n, (batch,), generator=generator)
    half = (batch + 1) // 2
    chosen = torch.randint(len(openings), (half,), generator=generator)
    starts[::2] = openings[chosen]
    return starts


def trapezoid(i, steps):
    """Learning rate as a share of its peak: 20 steps up, level, down to 0 over the last 60 %."""
    up = (i + 1) / 20
    down = (1 - i / steps) / 0.6
    return min(1.0, up, down)


@torch.no_grad()
def bits_per_byte(model, tokens, sizes, device):
    """-log2 P(tokens (N,)) over their bytes, in windows of the model's context.

    sizes (V,): bytes of each token. Per byte, for tokens of different tokenizers are not
    comparable.
    """
    T = model.config.block_size
    starts = torch.arange(0, len(tokens) - T - 1, T)
    nats = size = 0.0
    for rows in starts.split(32):
        batch = windows(tokens, rows, T + 1).to(device)
        logits, targets = model(batch[:, :-1]), batch[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        nats += loss.item()
        size += sizes[targets.cpu()].sum().item()
    return nats / math.log(2) / size


def pretrain_stage(args, texts, start):
    """A GPT that predicts the next token of the plays: pretrain.pt. start: the boundary's token."""
    n, T, batch = args.pretrain_steps, args.block_size, 16
    shape = ["vocab_size", "block_size", "n_layer", "n_head", "n_embd"]
    stage = Stage(args, "pretrain", ["pretrain_steps", *shape], [texts], code=[
        gpt, pretrain_stage, bits_per_byte, windows, draw_starts, trapezoid])
    if stage.done:
        return stage.state
    train, held_out = texts["train"], texts["held_out"]
    # Where a blank line ends a speech, so that the next token opens one.
    openings = (train[:-T] == start).nonzero().squeeze(1)
    if len(openings) == 0:
        openings = torch.arange(len(train) - T)
    config = {name: getattr(args, name) for name in shape}
    model = GPT(GPTConfig(**config), args.dtype).to(args.device)
    optimizers = gpt.make_optimizers(model, matrix_lr=0.02, embed_lr=0.01)
    sampler = Generator().manual_seed(seed_of(args, "pretrain"))
    # Of several processes each reads some of the batch.
    rows = gpt.share(batch)
    weight = (rows.stop - rows.start) / batch

    for i in stage.steps(n, model=model, muon=optimizers[0], adam=optimizers[1], sampler=sampler):
        gpt.set_rates(optimizers, trapezoid(i, n))
        starts = draw_starts(len(train) - T, openings, batch, sampler)
        tokens = windows(train, starts[rows], T + 1).to(args.device)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        gpt.descend(loss, model, optimizers, weight=weight)
        gpt.average([loss.detach()], weight)
        metrics = {"loss": loss.item()}
        if (i + 1) % 100 == 0:
            metrics["val_bits_per_byte"] = bits_per_byte(model, held_out[:40_000], texts["bytes"],
                                                         args.device)
        if (i + 1) % 10 == 0 or i + 1 == n:
            stage.log(**metrics)

    bits = bits_per_byte(model, held_out, texts["bytes"], args.device)
    return stage.finish(config=config, model=model.state_dict(), tokenizer=texts["tokenizer"],
                        parameters=sum(p.numel() for p in model.parameters()),
                        val_bits_per_byte=bits)


# What a rated passage is for, by a fold of the play it is from (of its words, where it is from
# none): so no line of a play is on two sides. Fold 0, read once at the end, are the plays that the
# GPT has not read either; "choose" is for whatever is tuned.
PARTS = ["report", "choose", "judge", "judge", *["reward"] * 6]


def rated_passages(args, tokenizer):
    """The rated passages: a dict of tokens (N,T), ratings, targets, weights (N,), rows of PARTS."""
    names = ("passages.csv", "more_passages.csv", "samples.csv")
    passages = []
    for path in args.labels or [data.HERE / "labels" / name for name in names]:
        passages += data.read_labels(path, args.corpus)
    own = args.corpus and Path(args.corpus).stem        # one text: its passages are split, not it
    parts = [PARTS[data.fold(text if play in (None, own) else play, 10)]
             for text, _, play in passages]
    rows = {name: torch.tensor([i for i, part in enumerate(parts) if part == name])
            for name in dict.fromkeys(PARTS)}
    if min(map(len, rows.values())) < 2:
        raise data.UserError("the labels have too few passages to train and to measure on. "
                             "Give a hundred or more.")
    ids = [tokenizer.encode_ordinary(text) for text, _, _ in passages]
    ratings = torch.tensor([rating for _, rating, _ in passages], dtype=torch.float32)
    is_sample = torch.tensor([play is None for _, _, play in passages])
    # A rating is of the whole passage: it counts by the share that is read. Samples of models,
    # which is what PPO has read to it, count twice.
    lengths = torch.tensor([max(len(i), 1) for i in ids])
    weights = (args.length / lengths).clamp(max=1) * torch.where(is_sample, 2, 1)
    targets = (ratings + 2) / 4
    words = reward.read_words()
    return {"tokens": reward.pad(ids, args.length).to(args.device),
            "words": words,
            "ratings": ratings,
            "targets": targets.to(args.device),
            "weights": weights.to(args.device),
            "is_sample": is_sample,
            "rows": rows,
            "digest": data.digest(json.dumps([passages, parts, weights.tolist(), words]))}


def fine_tune(args, stage, model, rated, rows):
    """Train a RewardModel that reads with its trunk on these rows of the ratings."""
    n = args.judge_steps
    tokens, targets, weights = (rated[key] for key in ("tokens", "targets", "weights"))
    optimizer = reward.make_optimizer(model)
    sampler = Generator().manual_seed(seed_of(args, "judge"))

    for i in stage.steps(n, model=model, optimizer=optimizer, sampler=sampler):
        gpt.set_rates([optimizer], min(1, (i + 1) / 20) * (1 - i / n))
        batch = rows[torch.randperm(len(rows), generator=sampler)[:32]]
        loss = reward.classifier_loss(model, tokens[batch], targets[batch], weights[batch], sampler)
        gpt.descend(loss, model, [optimizer], clip=1.0)
        if (i + 1) % 10 == 0 or i + 1 == n:
            stage.log(loss=loss.item())


def reward_stage(args, name, pretrained, rated, tokenizer):
    """A reward model trained on its part of the ratings: reward.pt, a bag; or judge.pt, a trunk."""
    reader, option = {"reward": ("bag", "reward"), "judge": ("trunk", "judge_steps")}[name]
    stage = Stage(args, name, ["length", option], [pretrained], labels=rated["digest"], code=[
        gpt, reward, reward_stage, fine_tune, measure_reward])
    if stage.done:
        return stage.state
    rows, choose = rated["rows"][name], rated["rows"]["choose"]
    tokens, targets, weights = (rated[key] for key in ("tokens", "targets", "weights"))
    vocabulary = tokenizer.decode_tokens_bytes(list(range(tokenizer.n_vocab)))
    model = reward.RewardModel(GPTConfig(**pretrained["config"]), reader, args.dtype, vocabulary)
    names = []
    if reader == "bag":
        losses = {"ratings": reward.soft_loss, "comparisons": reward.comparison_loss}
        model.bag.fit(tokens[rows], targets[rows], weights[rows], rated["words"],
                      loss=losses[args.reward])
        model.to(args.device)
        names = list(model.bag.rows)[1:]
    else:
        trunk = {key: x for key, x in pretrained["model"].items() if key != "lm_head.weight"}
        model.trunk.load_state_dict(trunk)
        model.to(args.device)
        fine_tune(args, stage, model, rated, rows)
    model.requires_grad_(False)
    # On ratings that it was not trained on: on its own it would look too sure.
    reward.calibrate(model, tokens[choose], targets[choose])
    report = measure_reward(model, rated)
    for kind, found in report.items():
        print(f"{name}, {found['n']} held-out {kind}: Pearson {found['pearson']:.3f} "
              f"+- {found['pearson_se']:.3f}, AUC {found['auc']:.3f}, of pairs "
              f"{found['pair_accuracy']:.3f} right, calibration slope {found['slope']:.2f}")
    return stage.finish(
        config=pretrained["config"], reader=reader, model=model.state_dict(), length=args.length,
        vocabulary=vocabulary, names=names, tokenizer=pretrained["tokenizer"], labels=len(rows),
        report=report)


def measure_reward(model, rated):
    """What the model reaches on the ratings kept for the report, of plays' passages and samples."""
    rows, found = rated["rows"]["report"], {}
    p = in_chunks(model, rated["tokens"][rows]).sigmoid().cpu()
    ratings, is_sample = rated["ratings"][rows], rated["is_sample"][rows]
    for name, chosen in (("passages", ~is_sample), ("samples", is_sample)):
        if chosen.sum() > 1:
            found[name] = reward.rating_metrics(p[chosen], ratings[chosen])
            found[name]["reliability"] = reward.reliability(p[chosen], ratings[chosen])
    return found


def make_prompts(args, text, tokenizer, start):
    """(prompts (P,T0) of the task, padded on the left with PAD; the token that ends a text).

    speeches: one prompt, start, the blank line before a speech, and no end. continue: openings of P
    speeches of the training text, the speaker's name and a line or two. They end as speeches do.
    """
    if args.task == "speeches":
        return torch.full((1, 1), start), None
    openings = []
    for lines in (2, 3):                # the name is one; a line of the speech follows
        openings += re.findall(r"\n\n(?:.+\n){%d}(?=.)" % lines, text)
    prompts = [tokenizer.encode_ordinary(opening) for opening in openings]
    prompts = [ids for ids in prompts if len(ids) <= LONGEST_PROMPT]
    if len(prompts) < args.prompts:
        raise data.UserError(f"the corpus has only {len(prompts)} openings of speeches to "
                             "continue. Give a longer text, or --task speeches.")
    prompts = random.Random(seed_of(args, "prompts")).sample(prompts, args.prompts)
    # Padding on the left, so that every completion begins at the same place.
    backwards = reward.pad([ids[::-1] for ids in prompts], LONGEST_PROMPT)
    return backwards.flip(1), start


def repeat(prompts, n):
    """prompts (P,T0), each repeated, so that there are n in all, or the next lower multiple."""
    return prompts.repeat_interleave(n // len(prompts), 0)


def rho_stage(args, prompts, end, pretrained, rewarded, judged):
    """Samples of rho for each prompt, and what they say a score is: rho.pt.

    Holds the log-odds of the samples by both reward models, and the constants of their scores.
    """
    stage = Stage(args, "rho", ["task", "prompts", "rho_samples", "length"],
                  [pretrained, rewarded, judged],
                  code=[gpt, reward, rho_stage, make_prompts, repeat])
    if stage.done:
        return stage.state
    rho = load_gpt(pretrained, args.device, args.dtype)
    repeated = repeat(prompts.to(args.device), args.rho_samples)
    tokens = sample_completions(rho, repeated, args.length, generator(args, "rho"), end)
    log_odds, constants = {}, {}
    for name, state in (("reward", rewarded), ("judge", judged)):
        model = reward.load_reward(state, args.device, args.dtype)
        log_odds[name] = in_chunks(model, tokens).cpu()
        constants[name] = {toward: reward.constants(log_odds[name], toward)
                           for toward in ("positive", "negative")}
    if not constants["reward"][args.toward]["std"] > 0:
        raise data.UserError("the reward model finds all of rho's samples alike, so there is "
                             "nothing to learn. Give labels that differ.")
    return stage.finish(prompts=prompts, end=end, tokens=tokens.int().cpu(), log_odds=log_odds,
                        constants=constants)


def run_name(toward, beta):
    """The file name of a PPO run, without its ending: ppo_beta0.2, ppo_negative_beta0.2."""
    return f"ppo_beta{beta:g}" if toward == "positive" else f"ppo_{toward}_beta{beta:g}"


def distinct_pairs(tokens):
    """Distinct pairs of neighbouring tokens in completions (N,T), as a share of all pairs.

    It falls as a policy grows monotonous.
    """
    pairs = torch.stack((tokens[:, :-1], tokens[:, 1:]), dim=-1)        # (N,T-1,2)
    pairs = pairs[pairs[..., 1] != PAD]
    return len(pairs.unique(dim=0)) / max(len(pairs), 1)


def keep_along_kl(args, name, before, history, kl, state):
    """If drift kl is the first past a mark of KL_MARKS, write before, the weights that had it."""
    # From the history, which a resumed run has too: so a kill changes nothing here.
    farthest = max([row["exact_kl"] for row in history], default=0.0)
    for mark in KL_MARKS:
        if farthest < mark <= kl:
            weights = {key: x.to(args.dtype) for key, x in before.items()}
            data.save_checkpoint(args.out / f"{name}_kl{mark:g}.pt",
                                 {**state, "kind": "ppo", "model": weights})
    if farthest < 10 <= kl:
        print("warning: the drift has passed 10 nats a completion. Beyond, completions often grow "
              "alike, heaps of what scores best: read samples, watch distinct_2.")


def scores_of(rho, log_odds, toward, name="reward"):
    """The scores of log-odds by a reward model, "reward" or "judge": of the same shape."""
    return reward.score(log_odds, **rho["constants"][name][toward], toward=toward)


def rho_scores(rho, toward, name="reward"):
    """The scores (P,N) of rho's samples, N for each of P prompts, by a reward model."""
    return scores_of(rho, rho["log_odds"][name], toward, name).view(len(rho["prompts"]), -1)


def scorer(args, name, state, rho):
    """A reward model, "reward" or "judge", and its score: tokens (B,T) -> (B,)."""
    model = reward.load_reward(state, args.device, args.dtype)

    def score_fn(tokens):
        return scores_of(rho, model(tokens), args.toward, name)

    return model, score_fn


def make_run(args, config, seed, pretrained, rewarded, rho):
    """A PPO run at its beginning, and the reward model that scores it.

    Its value function has been warmed up: fitted to the scores of samples of rho already drawn.
    """
    model, score_fn = scorer(args, "reward", rewarded, rho)
    run = ppo.PPO(load_gpt(pretrained, args.device, args.dtype), score_fn,
                  rho["prompts"].to(args.device), config, seed,
                  features_fn=lambda tokens: model.prefixes(tokens)[..., None], end=rho["end"])
    # The same number for each prompt, about 2,048 in all.
    each = max(2048 // len(run.prompts), 1)
    tokens = rho["tokens"].view(len(run.prompts), -1, args.length)[:, :each]
    tokens = tokens.flatten(0, 1).long().to(args.device)
    run.warm_up(repeat(run.prompts, len(tokens)), tokens)
    return run, model


def ppo_stage(args, config, tokenizer, pretrained, rewarded, judged, rho):
    """The policy tuned at one beta, and fresh samples of it: ppo_beta{beta}.pt."""
    name = run_name(args.toward, config.beta)
    stage = Stage(args, name, ["toward", "stop_at_kl", "fresh_samples"],
                  [pretrained, rewarded, judged, rho], **dataclasses.asdict(config), code=[
        gpt, reward, ppo, ppo_stage, make_run, scorer, scores_of, rho_scores, repeat, draw_fresh,
        measure_drift, keep_along_kl, distinct_pairs])
    if stage.done:
        return stage.state
    constants = rho["constants"]["reward"][args.toward]
    seed = seed_of(args, "ppo", config.beta)
    run, model = make_run(args, config, seed, pretrained, rewarded, rho)
    judge, judge_score = scorer(args, "judge", judged, rho)
    of_rho = rho_scores(rho, args.toward)
    about = {"config": pretrained["config"], "tokenizer": pretrained["tokenizer"],
             "toward": args.toward, "inputs": stage.inputs,
             "prompts": rho["prompts"], "end": rho["end"]}

    for i in stage.steps(config.iterations, **run.parts):
        if i == 0:
            for old in args.out.glob(f"{name}_kl*.pt"):
                old.unlink(missing_ok=True)         # of a run with other options
        # Score, KL and entropy of a step are those of the policy before its update.
        before = copy.deepcopy(run.policy.state_dict())
        metrics = run.step(i)
        keep_along_kl(args, name, before, stage.history, metrics["exact_kl"], about)
        tokens, scores = run.batch["tokens"], run.batch["scores"]
        # The score undone: P(toward).
        p = (scores * constants["std"] + constants["mean"]).exp().mean().item()
        metrics |= {"positive": p if args.toward == "positive" else 1 - p,
                    "judge": in_chunks(judge_score, tokens).mean().item(),
                    "distinct_2": distinct_pairs(tokens)}
        if metrics["beta"]:             # without a penalty there is no optimum
            optimum = ppo.optimum(of_rho, metrics["beta"])
            if optimum["ess"] >= ppo.MIN_ESS:
                metrics["optimum"] = optimum["objective"]
        stage.log(pause=0, shown=["score", "judge", "ref_kl", "objective", "optimum", "clipfrac",
                                  "entropy", "explained_variance"], **metrics)
        if (i + 1) % 10 == 0:
            for row, score in zip(tokens[:2].tolist(), scores):
                print(f"--- score {score:.2f}\n{data.decode(tokenizer, row)}")
        if args.stop_at_kl and metrics["exact_kl"] >= args.stop_at_kl:
            run.policy.load_state_dict(before)      # the policy whose drift was measured
            break

    fresh, rho_log_ratio = draw_fresh(args, run, model, judge, rho)
    return stage.finish(**about, beta=stage.history[-1]["beta"], model=run.policy.state_dict(),
                        fresh=fresh, rho_log_ratio=rho_log_ratio)


def draw_fresh(args, run, model, judge, rho):
    """Fresh samples of a tuned policy, a dict of what is read off them; and rho's log_ratio.

    How likely each of these and of rho's samples is under pi and rho: all that the report needs to
    know how far from the optimum the policy is.
    """
    prompts = repeat(run.prompts, args.fresh_samples)
    sampler = generator(args, "fresh", run.config.beta)
    tokens = sample_completions(run.policy, prompts, args.length, sampler, run.end)
    fresh = {"tokens": tokens.int(),
             "log_odds": in_chunks(model, tokens),
             "judge": in_chunks(judge, tokens),
             **measure_drift(run.policy, run.ref, prompts, tokens)}
    rho_tokens = rho["tokens"].long().to(args.device)
    rho_prompts = repeat(run.prompts, len(rho_tokens))
    of_rho = measure_drift(run.policy, run.ref, rho_prompts, rho_tokens)
    return {key: x.cpu() for key, x in fresh.items()}, of_rho["log_ratio"].cpu()


def measure_drift(policy, ref, prompts, tokens):
    """Of completions (N,T): log_ratio = log pi(y) - log rho(y), and exact_kl, the KL summed over
    their tokens from whole distributions: each (N,), in nats.
    """
    def read(prompts, tokens):
        logprobs, ref_logprobs = (gpt.completion_logits(model, prompts, tokens).log_softmax(-1)
                                  for model in (policy, ref))
        log_ratio = ppo.of_tokens(logprobs - ref_logprobs, tokens)
        mask = tokens != PAD
        return {"log_ratio": (log_ratio * mask).sum(1),
                "exact_kl": (ppo.exact_kl(logprobs, ref_logprobs) * mask).sum(1)}

    return in_chunks(read, prompts, tokens)


def main():
    args = parse()
    source_digests([data, gpt, reward, ppo, sys.modules[__name__]])     # as they are now
    args.device = gpt.join_processes(args.device)
    began = time.monotonic()
    with locked(args.out):
        if not data.is_first_process():
            gpt.wait(args.device)       # for the first process to get corpus and tokenizer
        corpus = data.load_corpus(args.corpus)
        texts, tokenizer = data_stage(args, corpus)
        start = tokenizer.encode_ordinary(data.BOUNDARY)[0]
        prompts, end = make_prompts(args, corpus[0], tokenizer, start)
        rated = rated_passages(args, tokenizer)     # before pretraining: a bad row is told now
        if data.is_first_process():
            gpt.wait(args.device)       # lets the others, waiting above, go on
        pretrained = pretrain_stage(args, texts, start)
        print(f"pretrain: {pretrained['parameters']:,} parameters, "
              f"{pretrained['val_bits_per_byte']:.3f} bits per byte on held-out plays")
        if args.until == "pretrain":
            return
        rewarded = reward_stage(args, "reward", pretrained, rated, tokenizer)
        judged = reward_stage(args, "judge", pretrained, rated, tokenizer)
        if args.until == "reward":
            return
        rho = rho_stage(args, prompts, end, pretrained, rewarded, judged)
        for config in args.runs:
            ppo_stage(args, config, tokenizer, pretrained, rewarded, judged, rho)
        if args.until == "ppo" or not data.is_first_process():
            return
        # In a process of its own, for sample.py stands after this file on the reader's path.
        report = [sys.executable, data.HERE / "sample.py", "--report", args.out]
        code = subprocess.run(report).returncode
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    sys.exit(code)


if __name__ == "__main__":
    data.run(main)
