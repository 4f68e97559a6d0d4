"""The whole study: pretrain a GPT, train a reward model, tune the GPT by PPO, and report what came of it.

Fifth on the reader's path: it adds no idea, it puts the others together. Stages: data, pretrain,
reward, gold (a second reward model, only to measure with), one PPO run for each beta, report.
Each writes a checkpoint into --out and is not done again while its inputs stay the same; one
that was cut off goes on where it was.

    python train.py                             everything at beta 0.2
    python train.py --beta 0.02 0.1 0.2 0.4     the sweep; stages already done are reused
    python train.py --size tiny                 a smoke run (a minute)
"""

import dataclasses
import io
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
import torch.nn.functional as F

import data
import ppo
import reward
from data import number
from gpt import GPT, Generator, GPTConfig, completion_logits, has_bf16, in_chunks, load_gpt, make_optimizers, sample_completions

matplotlib.use("Agg")        # figures go to files; no screen is needed
from matplotlib import pyplot as plt  # noqa: E402

SIZES = {   # what --size sets; tiny shows that all works, small is for a laptop's CPU, base for a GPU
    "tiny": {"vocab_size": 512, "block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 64, "pretrain_steps": 150,
             "reward_steps": 60, "iterations": 4, "batch": 64, "rho_samples": 2048, "fresh_samples": 256},
    "small": {"vocab_size": 2048, "block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 256, "pretrain_steps": 1000,
              "reward_steps": 410, "iterations": 36, "batch": 256, "rho_samples": 4096, "fresh_samples": 1024},
    "base": {"vocab_size": 4096, "block_size": 256, "n_layer": 8, "n_head": 8, "n_embd": 512, "pretrain_steps": 2000,
             "reward_steps": 410, "iterations": 60, "batch": 512, "rho_samples": 16384, "fresh_samples": 4096},
}
LABELS = {"labels.csv": 10, "labels_more.csv": 0, "labels_samples.csv": 4}      # one in how many is held out (0: none)
MIN_ESS = 100   # effective samples below which no optimum is quoted
FOLDS = 4       # of the labels: see reward.loss_on_prefixes
PPO_SHOWN = ["score", "gold", "positive", "ref_kl", "objective", "clipfrac", "approx_kl", "entropy", "explained_variance"]


def parse(argv=None):
    """The options of the study, with those filled in that --size sets."""
    parser = data.Parser(description=__doc__.split("\n")[0])
    count = number(int, 1)

    def group(title, **options):
        section = parser.add_argument_group(title)
        for name, (text, settings) in options.items():
            shown = " (default %(default)s)" if settings.get("default") is not None else ""
            section.add_argument("--" + name.replace("_", "-"), help=text + shown, **settings)

    group("the study",
          size=("model and budget; unset: base on CUDA, small on a CPU", {"choices": list(SIZES)}),
          beta=("KL coefficients: smaller lets the policy drift farther for reward (default 0.2)",
                {"type": number(float, 0, 10), "nargs": "+"}),
          out=("folder of checkpoints, figures and report; another one keeps this study", {"default": "out"}),
          seed=("another seed shows how far results are chance", {"type": number(int, 0, 2**31), "default": 0}),
          device=("unset: cuda where there is one", {"choices": ["cpu", "cuda"]}),
          fp32=("no bfloat16: slower, to compare with machines that lack it", {"action": "store_true"}),
          learning_curve=("also train reward models on 250 labels and more, to see what labels are worth", {"action": "store_true"}),
          checkpoint_every=("seconds of work that a crash may cost", {"type": number(float, 0), "default": 45.0}))
    group("texts",
          corpus=("a text of your own instead of the plays", {"metavar": "FILE.txt"}),
          labels=("your own ratings instead of those that come along: play, first_line, last_line, rating; or text, rating",
                  {"metavar": "FILE.csv", "nargs": "+"}),
          tokenizer=("gpt2 (downloaded once) compares with models that use it", {"choices": ["own", "gpt2"], "default": "own"}),
          vocab_size=("tokens of the tokenizer trained here: more make texts shorter, tokens rarer", {"type": number(int, 257, 65535)}))
    group("budgets, set by --size where you do not",
          pretrain_steps=("more make a better writer", {"type": count}),
          reward_steps=("more fit the labels more closely", {"type": count}),
          iterations=("more PPO iterations come closer to the optimum", {"type": count}),
          batch=("completions an iteration: more mean less noise", {"type": count}))
    kinds = {int: count, float: number(float, 0, 10**6)}
    group("PPO", **{field.name: (field.metadata["help"], {"type": kinds[field.type], "default": field.default})
                    for field in dataclasses.fields(ppo.PPOConfig) if field.name not in ("beta", "iterations", "batch")})
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; leave the option out")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.size = args.size or ("base" if args.device.type == "cuda" else "small")
    for name, value in {"beta": [0.2], **SIZES[args.size]}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if not reward.SHORTEST <= args.length < args.block_size:
        parser.error(f"--length {args.length} must be from {reward.SHORTEST}, or it has no feeling, to {args.block_size - 1}, the context")
    if args.kl_target and args.kl_horizon <= 0.2 * args.batch:
        parser.error(f"--kl-horizon must be above 0.2 of --batch, {0.2 * args.batch:g}, or beta could become negative")
    args.bf16 = not args.fp32 and has_bf16(args.device)
    args.out = Path(args.out)
    return args


def stage(args, name, inputs, steps, build, shown=None, pause=5):
    """data.run_stage for --out/name.pt: it depends on inputs, the seed, the precision and the device. Returns its checkpoint.

    Every pause seconds it prints the metrics shown (all) and the time left.
    """
    printed = [-math.inf]

    def show(i, metrics, left):
        if time.monotonic() - printed[0] >= pause or i + 1 == steps:
            printed[0] = time.monotonic()
            values = "  ".join(f"{key} {metrics[key]:.3g}" for key in shown or metrics if key != "step")
            print(f"{name} {i + 1}/{steps}  {values}  {left // 60:.0f}:{left % 60:02.0f} left", flush=True)

    def build_named():
        step, parts, result = build()
        options = {key: value if isinstance(value, (int, float, bool, list, type(None))) else str(value)
                   for key, value in vars(args).items()}
        return step, parts, lambda: {"kind": name.split("_")[0], "args": options, **result()}

    inputs = {**inputs, "seed": args.seed, "bf16": args.bf16, "device": args.device.type}
    return data.run_stage(args.out / f"{name}.pt", inputs, steps, build_named, show, args.checkpoint_every)


def descend(model, optimizers, loss_of, schedule, steps, clip, measure, every):
    """step(i) of supervised training: one step down loss_of(i), at schedule(i) of each peak rate; metrics every 10 steps."""
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def step(i):
        for optimizer, rates in zip(optimizers, peaks):
            for group, peak in zip(optimizer.param_groups, rates):
                group["lr"] = peak * schedule(i)
        loss = loss_of(i)
        loss.backward()
        if not torch.nn.utils.clip_grad_norm_(model.parameters(), clip).isfinite():
            # Before the weights are touched: so the last checkpoint is good.
            raise FloatingPointError(f"the gradient of step {i + 1} is not finite: try --fp32 or another --seed")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (i + 1) % 10 and i + 1 < steps:
            return None
        return {"step": i + 1, "loss": loss.item(), **(measure() if (i + 1) % every == 0 or i + 1 == steps else {})}
    return step


def sampler_of(args, use):
    """A generator on the device for one use (2 rho's samples, 3 fresh samples, 4 PPO); each use has its own seed."""
    return torch.Generator(args.device).manual_seed(1000 * args.seed + use)


# ---- stages -------------------------------------------------------------------------------

def data_stage(args):
    """Corpus -> tokenizer.tiktoken and token arrays: data.pt, the tokenizer, the prompt (1,1) of unconditional samples."""
    texts = data.load_corpus(args.corpus)
    inputs = {"tokenizer": args.tokenizer, "vocab_size": args.vocab_size, "corpus": [data.digest(text) for text in texts]}
    path = args.out / "tokenizer.tiktoken"
    if not path.exists():
        (args.out / "data.pt").unlink(missing_ok=True)

    def result():
        data.save_tokenizer(path, data.make_tokenizer(args.tokenizer, texts[0], args.vocab_size))
        tokenizer = data.load_tokenizer(path)
        tokens = [torch.tensor(tokenizer.encode_ordinary(text), dtype=torch.int32) for text in texts]
        vocabulary = tokenizer.decode_tokens_bytes(list(range(tokenizer.n_vocab)))
        return {"tokenizer": data.digest(b" ".join(vocabulary)), "train": tokens[0], "validation": tokens[1],
                "bytes": torch.tensor([len(token) for token in vocabulary]),
                "names": torch.tensor([i for i, token in enumerate(vocabulary) if token.isupper() and len(token) > 2] or [0])}

    state = stage(args, "data", inputs, 0, lambda: (None, {}, result))
    tokenizer = data.load_tokenizer(path, state)
    print(f"data: {len(state['train']):,} training tokens, {len(state['validation']):,} held out, of {tokenizer.n_vocab:,} kinds")
    return state, tokenizer, torch.tensor([tokenizer.encode_ordinary(data.BOUNDARY)[:1]], device=args.device)


def windows(tokens, starts, length):
    """tokens[s : s + length] for each of starts: (B,length), int64."""
    return tokens[starts[:, None] + torch.arange(length)].long()


@torch.no_grad()
def bits_per_byte(model, tokens, sizes, device, most=10**9):
    """-log2 P(tokens) over their bytes, in windows of the model's context; sizes (V,) = bytes of each token."""
    T = model.config.block_size
    starts = torch.arange(0, min(len(tokens) - T - 1, most), T)
    nats = size = 0.0
    for rows in starts.split(32):
        batch = windows(tokens, rows, T + 1).to(device)
        nats += F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        size += sizes[batch[:, 1:].cpu()].sum().item()
    return nats / math.log(2) / size


def trapezoid(i, steps):
    """Learning rate as a share of its peak: 20 steps up, level, down to 0 over the last 60 percent."""
    return min(1.0, (i + 1) / 20, (1 - i / steps) / 0.6)


def pretrain_stage(args, texts, prompt):
    """A GPT that predicts the next token of the plays: pretrain.pt."""
    steps, batch, T = args.pretrain_steps, 16, args.block_size
    config = {"vocab_size": len(texts["bytes"]), **{k: getattr(args, k) for k in ("block_size", "n_layer", "n_head", "n_embd")}}
    train, validation = texts["train"], texts["validation"]
    if min(len(train), len(validation)) < T + 2:
        raise data.UserError("the corpus is too short for the model's context. Give a longer text.")
    # Half of the windows begin where a speech does: there samples will begin, with nothing before.
    openings = (train[:-T] == prompt.item()).nonzero().squeeze(1)
    openings = openings if len(openings) else torch.arange(len(train) - T)

    def build():
        model = GPT(GPTConfig(**config), args.bf16).to(args.device)
        optimizers = make_optimizers(model, matrix_lr=0.02, embed_lr=0.01)
        sampler = Generator().manual_seed(args.seed)

        def loss_of(i):
            starts = torch.randint(len(train) - T, (batch,), generator=sampler)
            starts[::2] = openings[torch.randint(len(openings), (batch // 2,), generator=sampler)]
            tokens = windows(train, starts, T + 1).to(args.device)
            return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

        def measure(most=40_000):
            return {"val_bits_per_byte": bits_per_byte(model, validation, texts["bytes"], args.device, most)}

        def result():
            return {"config": config, "model": model.state_dict(), "tokenizer": texts["tokenizer"],
                    "parameters": sum(p.numel() for p in model.parameters()), **measure(10**9)}

        step = descend(model, optimizers, loss_of, lambda i: trapezoid(i, steps), steps, math.inf, measure, every=100)
        return step, {"model": model, "muon": optimizers[0], "adam": optimizers[1], "sampler": sampler}, result

    state = stage(args, "pretrain", {"pretrain_steps": steps, **config, "data": texts["inputs"]}, steps, build)
    print(f"pretrain: {state['parameters']:,} parameters, {state['val_bits_per_byte']:.3f} bits per byte on held-out text")
    return state


def rated_passages(args, tokenizer):
    """The rated passages: tokens, mask (N,T), ratings (N,), and in sets the rows of each use.

    A hash of its words decides. A share of each file (LABELS) is held out, under the file's name; of
    the rest three quarters train the reward model, "reward", and one quarter its judge, "gold".
    """
    passages, sets = [], {"reward": [], "gold": []}
    for path in args.labels or [data.HERE / name for name in LABELS]:
        folds = 10 if args.labels else LABELS[path.name]
        for text, rating in data.read_labels(path, args.corpus):
            fold = data.text_fold(text, 4 * folds or 4)
            part = Path(path).stem if folds and fold % folds == 0 else "gold" if fold >= 3 * (folds or 1) else "reward"
            sets.setdefault(part, []).append(len(passages))
            passages.append((text, rating))
        if len(sets["reward"]) < FOLDS or len(sets["gold"]) < FOLDS or folds and len(sets.get(Path(path).stem, ())) < 2:
            raise data.UserError(f"labels {path} have too few passages to train and to measure on. Give a hundred or more.")
    tokens, mask = reward.pad([tokenizer.encode_ordinary(text) for text, _ in passages], args.length)
    return SimpleNamespace(tokens=tokens.to(args.device), mask=mask.to(args.device), ratings=torch.tensor([float(r) for _, r in passages]),
                           sets={name: torch.tensor(rows) for name, rows in sets.items()}, digest=data.digest(json.dumps(passages)))


def reward_stage(args, texts, prompt, pretrained, rated, part="reward", limit=None):
    """A reward model on the pretrained trunk, and the constants of its score from samples of rho: reward.pt, gold.pt.

    part: whose share of the labels it is trained on; limit: at most so many of them.
    """
    train, batch = rated.sets[part], 32
    shuffler = Generator().manual_seed(args.seed + 1 + (part == "gold"))
    train = train[torch.randperm(len(train), generator=shuffler)[:limit]]
    steps = min(args.reward_steps, 2 * len(train) // batch + 20)
    tokens, mask, ratings = rated.tokens, rated.mask, rated.ratings.to(args.device)
    base_rate = ((ratings[train] + 2) / 4).mean().item()
    held = {name: rows for name, rows in rated.sets.items() if name not in ("reward", "gold")}

    def build():
        model = reward.RewardModel(GPTConfig(**pretrained["config"]), args.bf16).to(args.device)
        model.trunk.load_state_dict({k: v for k, v in pretrained["model"].items() if k != "lm_head.weight"})
        # The deep reader is trained beside bags of words that have not seen the passages of its batch.
        parts = [train[k::FOLDS] for k in range(FOLDS)]
        bags = [reward.Wide().to(args.device).fit(tokens[rest], mask[rest], ratings[rest])
                for rest in (torch.cat(parts[:k] + parts[k + 1:]) for k in range(FOLDS))]
        model.wide.fit(tokens[train], mask[train], ratings[train])
        optimizer = reward.make_optimizer(model)

        def loss_of(i):
            rows = parts[i % FOLDS]
            rows = rows[torch.randperm(len(rows), generator=shuffler)[:batch]]
            return reward.loss_on_prefixes(model, bags[i % FOLDS], tokens[rows], mask[rows], (ratings[rows] + 2) / 4, texts["names"], shuffler)

        def metrics(rows):
            return reward.rating_metrics(reward.positive(model, tokens[rows], mask[rows]), ratings[rows], base_rate)

        def measure():
            return {"val_" + key: value for key, value in metrics(next(iter(held.values()))).items() if key in ("pearson", "auc", "log_loss")}

        def result():
            rows = next(iter(held.values()))
            whole = tokens[rows][mask[rows].all(1)]
            rho = load_gpt(pretrained, args.device, args.bf16)
            samples = sample_completions(rho, prompt, args.rho_samples, args.length, sampler_of(args, 2))
            log_odds = in_chunks(model, samples)
            log_p = F.logsigmoid(log_odds)
            return {"config": pretrained["config"], "model": model.state_dict(), "tokenizer": pretrained["tokenizer"],
                    "length": args.length, "labels": len(train), "mean": log_p.mean().item(), "std": log_p.std().item(),
                    "metrics": {name: metrics(rows) for name, rows in held.items()},
                    "held": {"p": reward.positive(model, tokens[rows], mask[rows]).cpu(), "rating": rated.ratings[rows],
                             "tokens": tokens[rows].int().cpu(), "mask": mask[rows].cpu()},
                    "fooled": reward.fooled(model, whole, texts["names"], torch.Generator().manual_seed(args.seed)),
                    "rho": {"tokens": samples.int().cpu(), "log_odds": log_odds.cpu()}}

        step = descend(model, [optimizer], loss_of, lambda i: min(1, (i + 1) / 20) * (1 - i / steps), steps, 1.0, measure, every=50)
        return step, {"model": model, "optimizer": optimizer, "shuffler": shuffler}, result

    inputs = {"reward_steps": steps, "length": args.length, "rho_samples": args.rho_samples, "limit": limit,
              "pretrain": data.digest(pretrained["model"]), "labels": rated.digest}
    state = stage(args, part if limit is None else f"{part}_{limit}", inputs, steps, build)
    for name, found in state["metrics"].items():
        print(f"{part}, {name}: " + "  ".join(f"{key} {value:.3f}" for key, value in found.items()))
    return state


def ppo_stage(args, beta, tokenizer, prompt, pretrained, judge, gold):
    """The policy tuned at one beta, and fresh samples of it: ppo_beta{beta}.pt."""
    config = ppo.PPOConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(ppo.PPOConfig)})
    config.beta = beta
    steps = config.iterations

    def build():
        rho = load_gpt(pretrained, args.device, args.bf16)
        model, gold_model = (reward.load_reward(state, args.device, args.bf16) for state in (judge, gold))
        score_fn, features_fn = reward.readings(model, judge["mean"], judge["std"])
        run = ppo.PPO(rho, score_fn, prompt, config, 1000 * args.seed + 4, features_fn)

        def step(i):
            if i == 0:       # the value function starts from what rho's samples teach
                tokens = judge["rho"]["tokens"][:2048].long().to(args.device)
                scores = scores_of(judge, judge["rho"])[:2048].to(args.device)
                run.fit_values(in_chunks(run.prefix_features, tokens), scores[:, None].expand(tokens.shape), epochs=3)
            metrics, tokens = {"step": i + 1, **run.step(i)}, run.batch["tokens"]
            metrics["positive"] = (run.batch["scores"] * judge["std"] + judge["mean"]).exp().mean().item()
            metrics["gold"] = reward.score(in_chunks(gold_model, tokens), gold["mean"], gold["std"]).mean().item()
            metrics |= collapse(tokens.tolist(), tokenizer)
            print("".join(f"warning: {line}\n" for line in ppo.diagnose(metrics, config.epochs)), end="")
            if (i + 1) % 5 == 0:
                for row, score in zip(tokens[:2].tolist(), run.batch["scores"]):
                    print(f"--- score {score:.2f}\n{tokenizer.decode(row)}")
            return metrics

        def kl(chunk):
            return ppo.exact_kl(*(completion_logits(m, prompt, chunk).log_softmax(-1) for m in (run.policy, rho))).sum(1)

        def result():
            tokens = sample_completions(run.policy, prompt, args.fresh_samples, args.length, sampler_of(args, 3))
            return {"config": pretrained["config"], "model": run.policy.state_dict(), "value": run.value.state_dict(),
                    "tokenizer": pretrained["tokenizer"], "beta": run.controller.beta,
                    "fresh": {"tokens": tokens.int().cpu(), "log_odds": in_chunks(model, tokens).cpu(),
                              "gold": in_chunks(gold_model, tokens).cpu(), "ref_kl": in_chunks(kl, tokens).cpu()}}
        return step, run.parts, result

    inputs = {**dataclasses.asdict(config), "fresh_samples": args.fresh_samples, **{key: judge[key] for key in ("mean", "std")},
              **{name: data.digest(state["model"]) for name, state in (("pretrain", pretrained), ("reward", judge), ("gold", gold))}}
    return stage(args, f"ppo_beta{beta:g}", inputs, steps, build, PPO_SHOWN, pause=0)


def collapse(rows, tokenizer):
    """How far completions, lists of tokens, have collapsed: separators, distinct-2, duplicates, each a share from 0 to 1."""
    text = "".join(tokenizer.decode_batch(rows))
    pairs = [pair for row in rows for pair in zip(row, row[1:])]
    return {"separators": sum(text.count(c) for c in "\n ,.") / len(text), "distinct_2": len(set(pairs)) / len(pairs),
            "duplicates": 1 - len(set(map(tuple, rows))) / len(rows)}


# ---- report -------------------------------------------------------------------------------

def scores_of(judge, pool, key="log_odds"):
    """The scores (N,) of completions kept with their log-odds."""
    return reward.score(pool[key], judge["mean"], judge["std"])


@torch.no_grad()
def optima(args, prompt, pretrained, judge, runs):
    """The exact optimum of each run's beta, from samples of rho and of every run pooled (balance heuristic).

    Returns (a dict of ppo.optimum for each run, the pooled scores (N,), their log(rho/q) (N,)).
    """
    pools = [judge["rho"]] + [run["fresh"] for run in runs]
    tokens = torch.cat([pool["tokens"] for pool in pools]).long().to(args.device)
    scores = torch.cat([scores_of(judge, pool) for pool in pools])

    def logprob(state):
        model = load_gpt(state, args.device, args.bf16)
        return in_chunks(lambda y: ppo.token_logprobs(completion_logits(model, prompt, y), y).sum(1), tokens).cpu()

    weights = ppo.mixture_log_weights(torch.stack([logprob(state) for state in [pretrained, *runs]]),
                                      [len(pool["tokens"]) for pool in pools])
    return [ppo.optimum(scores, run["beta"], weights) if run["beta"] else
            {"objective": None, "score": None, "ref_kl": None, "ess": 0.0} for run in runs], scores, weights


def summarise(args, pretrained, judge, gold, runs, best):
    """The numbers of summary.json. An optimum whose effective sample size is below 100 is left null."""
    rho, rows = scores_of(judge, judge["rho"]).mean().item(), []
    for run, optimum in zip(runs, best):
        scores, kl, known = scores_of(judge, run["fresh"]), run["fresh"]["ref_kl"], optimum["ess"] >= MIN_ESS
        objective = scores - run["beta"] * kl
        rows.append({
            "beta": run["beta"], "iterations": len(run["history"]), "score": scores.mean().item(),
            "gold": scores_of(gold, run["fresh"], "gold").mean().item(),
            "positive": run["fresh"]["log_odds"].sigmoid().mean().item(), "ref_kl": kl.mean().item(),
            "objective": objective.mean().item(), "objective_se": objective.std().item() / len(kl) ** 0.5,
            "reference_objective": rho,
            "optimum": {key: value if known or key == "ess" else None for key, value in optimum.items()},
            "fraction_of_optimum": (objective.mean().item() - rho) / (optimum["objective"] - rho) if known else None,
            "seconds_per_iteration": run["step_seconds"] / len(run["history"])})
    seconds = {"data": args.data_seconds, "pretrain": pretrained["seconds"], "reward": judge["seconds"], "gold": gold["seconds"],
               "ppo": {f"{run['inputs']['beta']:g}": run["seconds"] for run in runs}}
    seconds["total"] = sum(seconds["ppo"].values()) + sum(value for key, value in seconds.items() if key != "ppo")
    first, *others = judge["metrics"]
    return {"size": args.size, "device": args.device.type, "seconds": seconds,
            "pretrain": {key: pretrained[key] for key in ("parameters", "val_bits_per_byte")},
            "reward": {"labels": judge["labels"], **{f"val_{key}": value for key, value in judge["metrics"][first].items()},
                       "mean": judge["mean"], "std": judge["std"], "fooled": judge["fooled"],
                       "reference_positive": judge["rho"]["log_odds"].sigmoid().mean().item(),
                       **{name: judge["metrics"][name] for name in others}},
            "gold": {f"val_{key}": value for key, value in gold["metrics"][first].items()}, "ppo": rows}


def draw(path, *panels, size=(4.4, 3.4)):
    """A PNG of panels side by side, at most three in a row.

    A panel is (title, x label, y label, curves), a curve (xs, ys, matplotlib's format, label or None).
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis, (title, x, y, curves) in zip(axes.flat, panels):
        for xs, ys, style, label in curves:
            axis.plot(xs, ys, style, label=label, markersize=14 if "*" in style else 4)
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    data.write_file(path, buffer.getvalue())


def column(state, key):
    """A metric of a stage's history, where it was measured."""
    return [row[key] for row in state["history"] if key in row]


def draw_training(folder, pretrained, judge, curve):
    """pretrain.png, reward.png: learning curves, and the calibration of the reward model. labels.png: what labels are worth."""
    def line(state, key, style, label=None):
        return [row["step"] for row in state["history"] if key in row], column(state, key), style, label or key.replace("val_", "")

    draw(folder / "pretrain.png", ("Pretraining", "step", "nats per token; bits per byte", [
        line(pretrained, "loss", "C0-", "training loss, nats per token"),
        line(pretrained, "val_bits_per_byte", "C1o-", "held-out plays, bits per byte")]), size=(7, 4))
    p, target = judge["held"]["p"], (judge["held"]["rating"] + 2) / 4
    bins = [rows for rows in p.argsort().chunk(8) if len(rows)]
    constant = next(iter(judge["metrics"].values()))["constant_log_loss"]
    draw(folder / "reward.png",
         ("Reward model, held-out passages", "step", "from 0 to 1",
          [line(judge, "val_pearson", "C0o-"), line(judge, "val_auc", "C1o-")]),
         ("Log loss, held-out passages", "step", "nats", [
             line(judge, "val_log_loss", "C0o-", "reward model"), ([0, len(judge["history"]) * 10], [constant] * 2, "k:", "constant predictor")]),
         ("Calibration, held-out passages", "mean P(positive) of an eighth", "mean (rating + 2) / 4 of the eighth", [
             ([p[rows].mean() for rows in bins], [target[rows].mean() for rows in bins], "C0o-", "reward model"),
             ([0, 1], [0, 1], "k:", "perfect")]))
    if curve:
        sizes, found = [s["labels"] for s in curve], [next(iter(s["metrics"].values())) for s in curve]
        draw(folder / "labels.png", *(
            (name, "labels (log 10)", "on held-out passages", [
                ([math.log10(n) for n in sizes], [m[key] for m in found], "C0o-", "reward model"),
                ([math.log10(n) for n in sizes], [anchor] * len(sizes), "k:", "TF-IDF + ridge, 4,370 labels")])
            for name, key, anchor in (("Pearson", "pearson", 0.562), ("AUC", "auc", 0.843))))


def draw_ppo(folder, judge, runs, best, scores, weights):
    """ppo.png, collapse.png: metrics against iteration. frontier.png, gold.png: score against drift, and what is possible."""
    names = [f"beta {run['beta']:.3g}" for run in runs]
    known = [(i, run, o) for i, (run, o) in enumerate(zip(runs, best)) if o["ess"] >= MIN_ESS]
    floors = [([1, len(run["history"])], [o["objective"]] * 2, f"C{i}:", f"J*, {names[i]}") for i, run, o in known]

    def panel(title, y, key, extra=()):
        return title, "iteration", y, [(column(run, "step"), column(run, key), f"C{i}-", names[i]) for i, run in enumerate(runs)] + list(extra)

    draw(folder / "ppo.png", panel("Score", "deviations of rho's score", "score"),
         panel("Drift", "ref_kl, nats per completion", "ref_kl"),
         panel("Objective J", "score - beta KL", "objective", floors), panel("Train loss", "clipped surrogate", "policy_loss"),
         panel("Clip fraction", "share of tokens", "clipfrac"), panel("Sentiment", "mean P(positive)", "positive"))
    draw(folder / "collapse.png", panel("Separators: newline space , .", "share of characters", "separators"),
         panel("Distinct pairs of tokens", "share of pairs", "distinct_2"),
         panel("Duplicates", "share of completions", "duplicates"),
         panel("Likelihood under rho", "nats per token", "ref_logprob"), panel("Entropy", "nats per token", "entropy"))

    def root(kls):
        return [max(kl, 0.0) ** 0.5 for kl in kls]

    def paths(key, style, what):
        return [(root(column(run, "exact_kl")), column(run, key), f"C{i}{style}", f"{what}, {names[i]}") for i, run in enumerate(runs)]

    frontier = [ppo.optimum(scores, 10 ** (e / 20), weights) for e in range(40, -40, -1)]
    frontier = [o for o in frontier if o["ess"] >= MIN_ESS]
    bests = [ppo.best_of_n(scores_of(judge, judge["rho"]), 2 ** k) for k in range(9)]
    axes = "sqrt(KL to rho), KL in nats per completion", "score, deviations of rho's"
    draw(folder / "frontier.png", ("How much score for how much drift?", *axes, [
        (root(o["ref_kl"] for o in frontier), [o["score"] for o in frontier], "k-", "exact frontier: no policy is above it"),
        (root(kl for _, kl in bests), [score for score, _ in bests], "C7s--", "best of n = 1, 2, 4 ... 256 (KL at most)"),
        *paths("score", ".-", "PPO"),
        *((root([o["ref_kl"]]), [o["score"]], f"C{i}*", f"exact optimum, {names[i]}") for i, run, o in known)]), size=(8, 5.5))
    draw(folder / "gold.png", ("Does the judge who was not optimised agree?", *axes, paths("score", ".-", "proxy") + paths("gold", ".--", "gold")), size=(8, 5.5))


def write_samples(path, tokenizer, judge, pool):
    """Twenty completions with what the reward model says of each, into a text file. Returns them as a list."""
    texts = []
    for tokens, log_odds, score, kl in zip(pool["tokens"][:20], pool["log_odds"], scores_of(judge, pool), pool["ref_kl"]):
        texts.append(f"{tokenizer.decode(tokens.tolist())}\n\nPositive Prob: {100 * log_odds.sigmoid():.1f}%"
                     f"   Score: {score:.2f}   KL: {kl:.1f} nats")
    data.write_file(path, f"\n\n{'-' * 60}\n\n".join(texts) + "\n")
    return texts


def table(columns, rows):
    """A markdown table: lines of text."""
    def cell(x):
        return "" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)
    return [f"| {' | '.join(map(cell, row))} |" for row in (columns, ["---"] * len(columns), *rows)] + [""]


def mistakes(judge, tokenizer, n=10):
    """Rows of a table: the held-out passages where P(positive) is farthest from the rating."""
    held = judge["held"]
    worst = (held["p"] - (held["rating"] + 2) / 4).abs().argsort(descending=True)[:n]
    return [(held["rating"][i].item(), held["p"][i].item(),
             " / ".join(tokenizer.decode(held["tokens"][i][held["mask"][i]].tolist()).split("\n")).replace("|", "")) for i in worst]


def write_report(args, tokenizer, prompt, pretrained, judge, gold, curve, runs):
    """samples/*.txt, figures/*.png, summary.json and report.md; prints samples before and after, and the table."""
    best, scores, weights = optima(args, prompt, pretrained, judge, runs)
    for name in ("figures", "samples"):
        (args.out / name).mkdir(exist_ok=True)
    draw_training(args.out / "figures", pretrained, judge, curve)
    draw_ppo(args.out / "figures", judge, runs, best, scores, weights)
    summary = summarise(args, pretrained, judge, gold, runs, best)
    data.write_file(args.out / "summary.json", json.dumps(summary, indent=1))
    columns = ["beta", "score", "gold", "positive", "ref_kl", "objective", "objective_se", "fraction_of_optimum"]
    results = table([*columns, "J*", "score*", "KL*", "ESS"], [
        [*(row[c] for c in columns), *(row["optimum"][key] for key in ("objective", "score", "ref_kl", "ess"))] for row in summary["ppo"]])
    print("", *results, sep="\n")
    lines = ["# Report of one study", "", f"Size {args.size} on {args.device.type}, seed {args.seed}. Pretraining: "
             f"{pretrained['val_bits_per_byte']:.3f} bits per byte on held-out text. Samples of rho: P(positive) "
             f"{summary['reward']['reference_positive']:.3f}, score 0.", "", *results,
             f"Measured on {args.fresh_samples} fresh samples of each policy; ref_kl in nats per completion. J*, the exact "
             f"optimum, is left out where its effective sample size (ESS) is below {MIN_ESS}. gold: the score by a reward "
             "model trained on other labels, which nothing was optimised for.", ""]
    lines += [f"![{name}](figures/{name}.png)\n" for name in ("frontier", "gold", "ppo", "collapse", "pretrain", "reward", *["labels"] * bool(curve))]
    lines += ["## The reward model on what it was not trained on", "", *table(["held out", *next(iter(judge["metrics"].values()))], [
        [f"{who}: {name}", *found.values()] for who, state in (("reward", judge), ("gold", gold)) for name, found in state["metrics"].items()])]
    lines += ["## Can nonsense please it?", "", *table(["passages", "mean P(positive)"], judge["fooled"].items())]
    lines += ["## Its ten most confident mistakes", "", *table(["rating", "P(positive)", "passage"], mistakes(judge, tokenizer))]
    before = write_samples(args.out / "samples" / "rho.txt", tokenizer, judge, {**judge["rho"], "ref_kl": torch.zeros(20)})
    for run in runs:
        name = f"ppo_beta{run['inputs']['beta']:g}"
        pairs = list(zip(before, write_samples(args.out / "samples" / f"{name}.txt", tokenizer, judge, run["fresh"])))
        print("\n".join(f"\n===== before\n{old}\n\n===== after, beta {run['beta']:g}\n{new}" for old, new in pairs[:2]))
        lines += [f"## {name}, before and after", "", *(f"```\n{old}\n```\n\nafter:\n\n```\n{new}\n```\n" for old, new in pairs[:4])]
    data.write_file(args.out / "report.md", "\n".join(lines))


def main(argv=None, until="report"):
    args = parse(argv)
    began = time.monotonic()
    with data.locked(args.out):
        texts, tokenizer, prompt = data_stage(args)
        args.data_seconds = time.monotonic() - began
        rated = rated_passages(args, tokenizer)       # before pretraining: a bad row is told now
        pretrained = pretrain_stage(args, texts, prompt)
        judge, gold = (reward_stage(args, texts, prompt, pretrained, rated, part) for part in ("reward", "gold"))
        limits = [n for n in (250, 500, 1000, 2000, 4000, 8000, 16000) if args.learning_curve and n < judge["labels"]]
        curve = [reward_stage(args, texts, prompt, pretrained, rated, limit=n) for n in limits] + [judge] * bool(limits)
        if until in ("ppo", "report"):
            runs = [ppo_stage(args, beta, tokenizer, prompt, pretrained, judge, gold) for beta in sorted(set(args.beta))]
        if until == "report":
            write_report(args, tokenizer, prompt, pretrained, judge, gold, curve, runs)
            print(f"\n{args.out / 'report.md'} has the figures and more samples. {(time.monotonic() - began) / 60:.1f} minutes.")


if __name__ == "__main__":
    data.run(main)
