"""The whole study: pretrain a GPT, train a reward model, tune the GPT by PPO, and report what came of it.

Fifth on the reader's path: it adds no idea, it puts the others together. Stages: data,
pretrain, reward, one PPO run for each beta, report. Each writes a checkpoint into --out and is
not done again while its inputs stay the same; one that was cut off goes on where it was.

    python train.py                             everything at beta 0.2
    python train.py --beta 0.02 0.1 0.2 0.4     the sweep; stages already done are reused
    python train.py --size tiny                 a smoke run (half a minute)
"""

import argparse
import dataclasses
import hashlib
import io
import json
import math
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

import data
import ppo
import reward
from gpt import GPT, GPTConfig, completion_logits, has_bf16, in_chunks, load_gpt, make_optimizers, sample_completions

matplotlib.use("Agg")        # figures go to files; no screen is needed
from matplotlib import pyplot as plt  # noqa: E402

SIZES = {   # what --size sets; tiny shows that all works, small is for a laptop's CPU, base for a GPU
    "tiny": {"vocab_size": 512, "block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 64, "pretrain_steps": 150,
             "reward_steps": 60, "iterations": 4, "batch": 64, "rho_samples": 2048, "fresh_samples": 256},
    "small": {"vocab_size": 2048, "block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 256, "pretrain_steps": 1000,
              "reward_steps": 410, "iterations": 30, "batch": 256, "rho_samples": 4096, "fresh_samples": 1024},
    "base": {"vocab_size": 4096, "block_size": 256, "n_layer": 8, "n_head": 8, "n_embd": 512, "pretrain_steps": 2000,
             "reward_steps": 410, "iterations": 60, "batch": 512, "rho_samples": 16384, "fresh_samples": 4096},
}
MIN_ESS = 100   # effective samples below which no optimum is quoted
PPO_SHOWN = ["score", "positive", "ref_kl", "objective", "clipfrac", "approx_kl", "entropy", "explained_variance"]
FOLDS = 4       # of the labels: see reward.loss_on_prefixes


def number(kind, low, high=10**9):
    """An argparse type: a number of this kind from low to high."""
    def check(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    check.__name__ = kind.__name__
    return check


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
          checkpoint_every=("seconds of work that a crash may cost", {"type": number(float, 0), "default": 45.0}))
    group("texts",
          corpus=("a text of your own instead of the plays", {"metavar": "FILE.txt"}),
          labels=("your own ratings instead of labels.csv: play, first_line, last_line, rating; or text, rating",
                  {"metavar": "FILE.csv"}),
          tokenizer=("gpt2 (downloaded once) compares with models that use it", {"choices": ["own", "gpt2"], "default": "own"}),
          vocab_size=("tokens of the tokenizer trained here: more make texts shorter, tokens rarer", {"type": number(int, 257, 65535)}))
    group("budgets, set by --size where you do not",
          pretrain_steps=("more make a better writer", {"type": count}),
          reward_steps=("more fit the labels more closely", {"type": count}),
          iterations=("more PPO iterations come closer to the optimum", {"type": count}),
          batch=("completions an iteration: more mean less noise", {"type": count}))
    kinds = {int: count, float: number(float, 0, 10**6), str: str}
    group("PPO", **{field.name: (field.metadata["help"], {"type": kinds[field.type], "default": field.default,
                                                          "choices": field.metadata["choices"]})
                    for field in dataclasses.fields(ppo.PPOConfig) if field.name not in ("beta", "iterations", "batch")})
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; leave the option out")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.size = args.size or ("base" if args.device.type == "cuda" else "small")
    for name, value in {"beta": [0.2], **SIZES[args.size]}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.length + 1 > args.block_size:
        parser.error(f"--length {args.length} does not fit the context: give at most {args.block_size - 1}")
    if args.length < reward.SHORTEST:
        parser.error(f"--length {args.length} is too short to have a feeling: give at least {reward.SHORTEST}")
    if args.kl_target and args.kl_horizon <= 0.2 * args.batch:
        parser.error(f"--kl-horizon must be above 0.2 of --batch, {0.2 * args.batch:g}, or beta could become negative")
    args.bf16 = not args.fp32 and has_bf16(args.device)
    args.out = Path(args.out)
    return args


def stage(args, name, inputs, steps, build, keys=None, pause=5):
    """data.run_stage for --out/name.pt: its inputs are these, the seed and the precision. Returns its checkpoint."""
    def build_named():
        step, parts, result = build()
        options = {key: value if isinstance(value, (int, float, bool, list, type(None))) else str(value)
                   for key, value in vars(args).items()}
        return step, parts, lambda: {"kind": name.split("_")[0], "args": options, **result()}

    return data.run_stage(args.out / f"{name}.pt", {**inputs, "seed": args.seed, "bf16": args.bf16, "device": args.device.type}, steps, build_named,
                          progress(name, steps, keys, pause), args.checkpoint_every)


def progress(name, steps, keys=None, pause=5):
    """A show() for run_stage: every pause seconds a line with the metrics named by keys (all) and the time left."""
    shown = [-math.inf]

    def show(i, metrics, left):
        if time.monotonic() - shown[0] >= pause or i + 1 == steps:
            shown[0] = time.monotonic()
            values = "  ".join(f"{key} {metrics[key]:.3g}" for key in keys or metrics if key != "step")
            print(f"{name} {i + 1}/{steps}  {values}  {left // 60:.0f}:{left % 60:02.0f} left", flush=True)
    return show


# ---- stages -------------------------------------------------------------------------------

def data_stage(args):
    """Corpus -> tokenizer.tiktoken and token arrays."""
    texts = data.load_corpus(args.corpus)
    inputs = {"tokenizer": args.tokenizer, "vocab_size": args.vocab_size,
              "corpus": [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]}
    path = args.out / "tokenizer.tiktoken"
    if not path.exists():
        (args.out / "data.pt").unlink(missing_ok=True)

    def result():
        data.save_tokenizer(path, data.make_tokenizer(args.tokenizer, texts[0], args.vocab_size))
        tokenizer = data.load_tokenizer(path)
        tokens = [torch.tensor(tokenizer.encode_ordinary(text), dtype=torch.int32) for text in texts]
        size = [len(token) for token in tokenizer.decode_tokens_bytes(list(range(tokenizer.n_vocab)))]
        return {"tokenizer": data.tokenizer_hash(tokenizer), "train": tokens[0], "validation": tokens[1],
                "bytes": torch.tensor(size)}

    state = stage(args, "data", inputs, 0, lambda: (None, {}, result))
    tokenizer = data.load_tokenizer(path)
    data.check_tokenizer(state, tokenizer, args.out)
    print(f"data: {len(state['train']):,} training tokens, {len(state['validation']):,} held out, of {tokenizer.n_vocab:,} kinds")
    return state, tokenizer


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


def must_be_finite(norm, name):
    """Stop, before the weights are touched, where a gradient is not finite: then the last checkpoint is good."""
    if not norm.isfinite():
        raise FloatingPointError(f"the {name} is not finite: try --fp32 or another --seed")


def trapezoid(i, steps):
    """Learning rate as a share of its peak: 20 steps up, level, down to 0 over the last 60 percent."""
    return min(1.0, (i + 1) / 20, (1 - i / steps) / 0.6)


def pretrain_stage(args, texts):
    """A GPT that predicts the next token of the plays: pretrain.pt."""
    steps, batch, sizes = args.pretrain_steps, 16, texts["bytes"]
    config = {"vocab_size": len(sizes), **{k: getattr(args, k) for k in ("block_size", "n_layer", "n_head", "n_embd")}}
    if min(len(texts[part]) for part in ("train", "validation")) < args.block_size + 2:
        raise data.UserError("the corpus is too short for the model's context. Give a longer text.")

    def build():
        model = GPT(GPTConfig(**config), args.bf16).to(args.device)
        optimizers = make_optimizers(model, matrix_lr=0.02, embed_lr=0.01)
        peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        sampler = data.Generator().manual_seed(args.seed)

        def step(i):
            starts = torch.randint(len(texts["train"]) - args.block_size, (batch,), generator=sampler)
            tokens = windows(texts["train"], starts, args.block_size + 1).to(args.device)
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            must_be_finite(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf), f"pretraining gradient of step {i + 1}")
            for optimizer, peak in zip(optimizers, peaks):
                for group, lr in zip(optimizer.param_groups, peak):
                    group["lr"] = lr * trapezoid(i, steps)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if (i + 1) % 10 and i + 1 < steps:
                return None
            metrics = {"step": i + 1, "loss": loss.item()}
            if (i + 1) % 100 == 0 or i + 1 == steps:
                metrics["val_bits_per_byte"] = bits_per_byte(model, texts["validation"], sizes, args.device, 40_000)
            return metrics

        def result():
            return {"config": config, "model": model.state_dict(), "tokenizer": texts["tokenizer"],
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "val_bits_per_byte": bits_per_byte(model, texts["validation"], sizes, args.device)}
        return step, {"model": model, "muon": optimizers[0], "adam": optimizers[1], "sampler": sampler}, result

    state = stage(args, "pretrain", {"pretrain_steps": steps, **config, "data": texts["inputs"]}, steps, build)
    print(f"pretrain: {state['parameters']:,} parameters, {state['val_bits_per_byte']:.3f} bits per byte on held-out text")
    return state


def reward_stage(args, tokenizer, pretrained):
    """A reward model on the pretrained trunk, and the constants of its score from samples of rho: reward.pt."""
    steps, batch = args.reward_steps, 32
    path = args.labels or data.HERE / "labels.csv"
    passages = data.read_labels(path, args.corpus)
    ratings = torch.tensor([rating for _, rating in passages], dtype=torch.float32)
    held = torch.tensor([data.text_fold(text, 10) == 0 for text, _ in passages])
    if not 1 < held.sum() < len(held) - 1:
        raise data.UserError(f"labels {path} have too few passages to train and to measure on. Give a hundred or more.")
    passages_cpu, mask_cpu = reward.pad([tokenizer.encode_ordinary(text) for text, _ in passages], args.length)
    train = (~held).nonzero().squeeze(1)
    names = torch.tensor([i for i, token in enumerate(tokenizer.decode_tokens_bytes(list(range(tokenizer.n_vocab))))
                          if token.isupper() and len(token) > 2] or [0])
    base_rate = ((ratings[train] + 2) / 4).mean().item()
    tokens, mask, targets = (x.to(args.device) for x in (passages_cpu, mask_cpu, (ratings + 2) / 4))

    def build():
        model = reward.RewardModel(GPTConfig(**pretrained["config"]), args.bf16).to(args.device)
        model.trunk.load_state_dict({k: v for k, v in pretrained["model"].items() if k != "lm_head.weight"})
        # The deep reader is trained beside bags of words that have not seen the passages of its batch.
        parts = [train[k::FOLDS] for k in range(FOLDS)]
        bags = [reward.Wide().fit(passages_cpu[rest], mask_cpu[rest], ratings[rest]).to(args.device)
                for rest in (torch.cat(parts[:k] + parts[k + 1:]) for k in range(FOLDS))]
        model.wide.cpu().fit(passages_cpu[train], mask_cpu[train], ratings[train]).to(args.device)
        optimizer = reward.make_optimizer(model)
        peaks = [group["lr"] for group in optimizer.param_groups]
        shuffler = data.Generator().manual_seed(args.seed + 1)

        def measure():
            return reward.rating_metrics(reward.positive(model, tokens[held], mask[held]), ratings[held], base_rate)

        def step(i):
            for group, lr in zip(optimizer.param_groups, peaks):
                group["lr"] = lr * min(1, (i + 1) / 20) * (1 - i / steps)
            part = parts[i % FOLDS]
            rows = part[torch.randperm(len(part), generator=shuffler)[:batch]]
            loss = reward.loss_on_prefixes(model, bags[i % FOLDS], tokens[rows], mask[rows], targets[rows], names, shuffler)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            must_be_finite(norm, f"reward model's gradient of step {i + 1}")
            optimizer.step()
            if (i + 1) % 10 and i + 1 < steps:
                return None
            metrics = {"step": i + 1, "loss": loss.item()}
            if (i + 1) % 50 == 0 or i + 1 == steps:
                measured = measure()
                metrics |= {"val_" + key: measured[key] for key in ("pearson", "auc", "log_loss")}
            return metrics

        def result():
            p = reward.positive(model, tokens[held], mask[held]).cpu()
            rho = load_gpt(pretrained, args.device, args.bf16)
            prompt = boundary(args, tokenizer)
            samples = sample_completions(rho, prompt, args.rho_samples, args.length, sampler_of(args, 2))
            log_odds = in_chunks(model, samples)
            log_p = F.logsigmoid(log_odds)
            return {"config": pretrained["config"], "model": model.state_dict(), "tokenizer": pretrained["tokenizer"],
                    "length": args.length, "mean": log_p.mean().item(), "std": log_p.std().item(),
                    "metrics": measure(), "held": {"p": p, "rating": ratings[held]},
                    "rho": {"tokens": samples.int().cpu(), "log_odds": log_odds.cpu()}}
        return step, {"model": model, "optimizer": optimizer, "shuffler": shuffler}, result

    inputs = {"reward_steps": steps, "length": args.length, "rho_samples": args.rho_samples,
              "pretrain": data.digest(pretrained["model"]),
              "labels": hashlib.sha256(json.dumps(passages).encode()).hexdigest()[:16]}
    state = stage(args, "reward", inputs, steps, build)
    print("reward: " + "  ".join(f"{key} {value:.3f}" for key, value in state["metrics"].items()))
    return state


def boundary(args, tokenizer):
    """The prompt of unconditional samples (1,1): the blank line between speeches."""
    return torch.tensor([tokenizer.encode_ordinary(data.BOUNDARY)[:1]], device=args.device)


def sampler_of(args, use):
    """A generator on the device for one use (2 rho's samples, 3 fresh samples, 4 PPO); each use has its own seed."""
    return torch.Generator(args.device).manual_seed(1000 * args.seed + use)


def ppo_stage(args, beta, tokenizer, pretrained, judge):
    """The policy tuned at one beta, and fresh samples of it: ppo_beta{beta}.pt."""
    config = ppo.PPOConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(ppo.PPOConfig)})
    config.beta = beta
    prompt, steps = boundary(args, tokenizer), config.iterations

    def build():
        rho = load_gpt(pretrained, args.device, args.bf16)
        model = reward.load_reward(judge, args.device, args.bf16)
        run = ppo.PPO(rho, lambda tokens: reward.score(model(tokens), judge["mean"], judge["std"]), prompt, config,
                      1000 * args.seed + 4, model.features)

        def step(i):
            if i == 0 and config.advantage == "gae":     # the value function starts from what rho's samples teach
                tokens = judge["rho"]["tokens"][:2048].long().to(args.device)
                scores = reward.score(judge["rho"]["log_odds"][:2048].to(args.device), judge["mean"], judge["std"])
                run.fit_values(in_chunks(run.prefix_features, tokens), scores[:, None].expand(tokens.shape), epochs=3)
            metrics = {"step": i + 1, **run.step(i)}
            metrics["positive"] = (run.batch["scores"] * judge["std"] + judge["mean"]).exp().mean().item()
            metrics |= collapse(run.batch["tokens"].cpu(), tokenizer)
            print("".join(f"warning: {line}\n" for line in ppo.diagnose(metrics, config.epochs)), end="")
            if (i + 1) % 5 == 0:
                for tokens, score in zip(run.batch["tokens"][:2], run.batch["scores"]):
                    print(f"--- score {score:.2f}\n{tokenizer.decode(tokens.tolist())}")
            return metrics

        def result():
            fresh = measure_policy(args, run.policy, rho, model, prompt, judge)
            return {"config": pretrained["config"], "model": run.policy.state_dict(), "value": run.value.state_dict(),
                    "tokenizer": pretrained["tokenizer"], "beta": run.controller.beta, "fresh": fresh}
        return step, {"run": run}, result

    inputs = {**dataclasses.asdict(config), "fresh_samples": args.fresh_samples, "mean": judge["mean"], "std": judge["std"],
              "pretrain": data.digest(pretrained["model"]), "reward": data.digest(judge["model"])}
    return stage(args, f"ppo_beta{beta:g}", inputs, steps, build, PPO_SHOWN, pause=0)


def measure_policy(args, policy, rho, model, prompt, judge):
    """Fresh samples of a policy: tokens (N,T), and of each its log-odds of positive and exact KL to rho, nats."""
    tokens = sample_completions(policy, prompt, args.fresh_samples, args.length, sampler_of(args, 3))

    def kl(chunk):
        return ppo.exact_kl(completion_logits(policy, prompt, chunk), completion_logits(rho, prompt, chunk)).sum(1)

    return {"tokens": tokens.int().cpu(), "log_odds": in_chunks(model, tokens).cpu(), "ref_kl": in_chunks(kl, tokens).cpu()}


def collapse(tokens, tokenizer):
    """How far completions (B,T) have collapsed: separators, distinct-2, duplicates, each a share from 0 to 1."""
    text = "".join(tokenizer.decode_batch(tokens.tolist()))
    pairs = [pair for row in tokens.tolist() for pair in zip(row, row[1:])]
    return {"separators": sum(text.count(c) for c in "\n ,.") / len(text), "distinct_2": len(set(pairs)) / len(pairs),
            "duplicates": 1 - len({tuple(row) for row in tokens.tolist()}) / len(tokens)}


# ---- report -------------------------------------------------------------------------------

@torch.no_grad()
def optima(args, tokenizer, pretrained, judge, runs):
    """The exact optimum of each run's beta, from samples of rho and of every run pooled (balance heuristic).

    Returns (a dict of ppo.optimum for each run, the pooled scores (N,), their log(rho/q) (N,)).
    """
    prompt, pools = boundary(args, tokenizer), [judge["rho"]] + [run["fresh"] for run in runs]
    tokens = torch.cat([pool["tokens"] for pool in pools]).long().to(args.device)
    scores = torch.cat([scores_of(judge, pool) for pool in pools])

    def logprob(state):
        model = load_gpt(state, args.device, args.bf16)
        return in_chunks(lambda y: ppo.token_logprobs(completion_logits(model, prompt, y), y).sum(1), tokens).cpu()

    weights = ppo.mixture_log_weights(torch.stack([logprob(state) for state in [pretrained, *runs]]),
                                      [len(pool["tokens"]) for pool in pools])
    return [ppo.optimum(scores, run["beta"], weights) if run["beta"] else
            {"objective": None, "score": None, "ref_kl": None, "ess": 0.0} for run in runs], scores, weights


def scores_of(judge, pool):
    """The scores (N,) of completions kept with their log-odds."""
    return reward.score(pool["log_odds"], judge["mean"], judge["std"])


def summarise(args, pretrained, judge, runs, best):
    """The numbers of summary.json. An optimum whose effective sample size is below 100 is left null."""
    rho, rows = scores_of(judge, judge["rho"]).mean().item(), []
    for run, optimum in zip(runs, best):
        scores, kl, known = scores_of(judge, run["fresh"]), run["fresh"]["ref_kl"], optimum["ess"] >= MIN_ESS
        objective = scores - run["beta"] * kl
        rows.append({
            "beta": run["beta"], "iterations": len(run["history"]), "score": scores.mean().item(),
            "positive": run["fresh"]["log_odds"].sigmoid().mean().item(), "ref_kl": kl.mean().item(),
            "objective": objective.mean().item(), "objective_se": objective.std().item() / len(kl) ** 0.5,
            "reference_objective": rho,
            "optimum": {key: value if known or key == "ess" else None for key, value in optimum.items()},
            "fraction_of_optimum": (objective.mean().item() - rho) / (optimum["objective"] - rho) if known else None,
            "seconds_per_iteration": run["step_seconds"] / len(run["history"])})
    seconds = {"data": args.data_seconds, "pretrain": pretrained["seconds"], "reward": judge["seconds"],
               "ppo": {f"{run['inputs']['beta']:g}": run["seconds"] for run in runs}}
    seconds["total"] = sum(seconds["ppo"].values()) + seconds["data"] + seconds["pretrain"] + seconds["reward"]
    return {"size": args.size, "device": args.device.type, "seconds": seconds,
            "pretrain": {key: pretrained[key] for key in ("parameters", "val_bits_per_byte")},
            "reward": {**{f"val_{key}": value for key, value in judge["metrics"].items()}, "mean": judge["mean"],
                       "std": judge["std"], "reference_positive": judge["rho"]["log_odds"].sigmoid().mean().item()},
            "ppo": rows}


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


def draw_training(folder, pretrained, judge):
    """pretrain.png and reward.png: learning curves, and the calibration of the reward model."""
    def curve(state, key, style, label=None):
        rows = [row for row in state["history"] if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows], style, label or key.replace("val_", "")

    draw(folder / "pretrain.png", ("Pretraining", "step", "nats per token; bits per byte", [
        curve(pretrained, "loss", "C0-", "training loss, nats per token"),
        curve(pretrained, "val_bits_per_byte", "C1o-", "held-out plays, bits per byte")]), size=(7, 4))
    p, target = judge["held"]["p"], (judge["held"]["rating"] + 2) / 4
    bins = [rows for rows in p.argsort().chunk(8) if len(rows)]
    steps = [row["step"] for row in judge["history"]]
    draw(folder / "reward.png",
         ("Reward model, held-out passages", "step", "from 0 to 1",
          [curve(judge, "val_pearson", "C0o-"), curve(judge, "val_auc", "C1o-")]),
         ("Log loss, held-out passages", "step", "nats", [
             curve(judge, "val_log_loss", "C0o-", "reward model"),
             ([steps[0], steps[-1]], [judge["metrics"]["constant_log_loss"]] * 2, "k:", "constant predictor")]),
         ("Calibration, held-out passages", "mean P(positive) of an eighth", "mean (rating + 2) / 4 of the eighth", [
             ([p[rows].mean() for rows in bins], [target[rows].mean() for rows in bins], "C0o-", "reward model"),
             ([0, 1], [0, 1], "k:", "perfect")]))


def draw_ppo(folder, judge, runs, best, scores, weights):
    """ppo.png, collapse.png: metrics against iteration. frontier.png: score against drift, and what is possible."""
    def panel(title, y, key, extra=()):
        return (title, "iteration", y, [(column(run, "step"), column(run, key), f"C{i}-", names[i])
                                        for i, run in enumerate(runs)] + list(extra))

    def column(run, key):
        return [row[key] for row in run["history"]]

    names = [f"beta {run['beta']:.3g}" for run in runs]
    known = [(i, run, o) for i, (run, o) in enumerate(zip(runs, best)) if o["ess"] >= MIN_ESS]
    floors = [([1, len(run["history"])], [o["objective"]] * 2, f"C{i}:", f"J*, {names[i]}") for i, run, o in known]
    draw(folder / "ppo.png", panel("Score", "deviations of rho's score", "score"),
         panel("Drift", "ref_kl, nats per completion", "ref_kl"),
         panel("Objective J", "score - beta KL", "objective", floors), panel("Train loss", "clipped surrogate", "policy_loss"), panel("Clip fraction", "share of tokens", "clipfrac"),
         panel("Sentiment", "mean P(positive)", "positive"))
    draw(folder / "collapse.png", panel("Separators: newline space , .", "share of characters", "separators"),
         panel("Distinct pairs of tokens", "share of pairs", "distinct_2"),
         panel("Duplicates", "share of completions", "duplicates"),
         panel("Likelihood under rho", "nats per token", "ref_logprob"), panel("Entropy", "nats per token", "entropy"))

    def root(kl):
        return max(kl, 0.0) ** 0.5

    frontier = [ppo.optimum(scores, 10 ** (e / 20), weights) for e in range(40, -40, -1)]
    frontier = [o for o in frontier if o["ess"] >= MIN_ESS]
    bests = [ppo.best_of_n(scores_of(judge, judge["rho"]), 2 ** k) for k in range(9)]
    draw(folder / "frontier.png", ("How much score for how much drift?", "sqrt(KL to rho), KL in nats per completion",
                                   "score, deviations of rho's", [
        ([root(o["ref_kl"]) for o in frontier], [o["score"] for o in frontier], "k-", "exact frontier: no policy is above it"),
        ([root(kl) for _, kl in bests], [score for score, _ in bests], "C7s--", "best of n = 1, 2, 4 ... 256 (KL at most)"),
        *(([root(kl) for kl in column(run, "exact_kl")], column(run, "score"), f"C{i}.-", f"PPO, {names[i]}")
          for i, run in enumerate(runs)),
        *(([root(o["ref_kl"])], [o["score"]], f"C{i}*", f"exact optimum, {names[i]}") for i, run, o in known)]),
        size=(8, 5.5))


def write_samples(args, tokenizer, judge, pool, name):
    """samples/{name}.txt: twenty completions with what the reward model says of each. Returns them as a list."""
    texts = []
    rows = zip(pool["tokens"][:20], pool["log_odds"], scores_of(judge, pool), pool["ref_kl"])
    for tokens, log_odds, score, kl in rows:
        texts.append(f"{tokenizer.decode(tokens.tolist())}\n\nPositive Prob: {100 * log_odds.sigmoid():.1f}%"
                     f"   Score: {score:.2f}   KL: {kl:.1f} nats")
    data.write_file(args.out / "samples" / f"{name}.txt", f"\n\n{'-' * 60}\n\n".join(texts) + "\n")
    return texts


def write_report(args, tokenizer, pretrained, judge, runs):
    """samples/*.txt, figures/*.png, summary.json and report.md; prints samples before and after, and the table."""
    best, scores, weights = optima(args, tokenizer, pretrained, judge, runs)
    for name in ("figures", "samples"):
        (args.out / name).mkdir(exist_ok=True)
    draw_training(args.out / "figures", pretrained, judge)
    draw_ppo(args.out / "figures", judge, runs, best, scores, weights)
    summary = summarise(args, pretrained, judge, runs, best)
    data.write_file(args.out / "summary.json", json.dumps(summary, indent=1))

    def cell(x):
        return "" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)

    columns = ["beta", "score", "positive", "ref_kl", "objective", "objective_se", "fraction_of_optimum"]
    lines = ["# Report of one study", "", f"Size {args.size} on {args.device.type}, seed {args.seed}. Pretraining: "
             f"{pretrained['val_bits_per_byte']:.3f} bits per byte on held-out text. Reward model on held-out passages: "
             f"Pearson {judge['metrics']['pearson']:.3f}, AUC {judge['metrics']['auc']:.3f}. Samples of rho: P(positive) "
             f"{summary['reward']['reference_positive']:.3f}, score 0.", "",
             "| " + " | ".join([*columns, "J*", "score*", "KL*", "ESS"]) + " |", "|" + "---|" * (len(columns) + 4)]
    for row, optimum in zip(summary["ppo"], best):
        stars = [row["optimum"].get(key) for key in ("objective", "score", "ref_kl", "ess")]
        lines.append("| " + " | ".join(cell(x) for x in [*(row[c] for c in columns), *stars]) + " |")
    lines += ["", f"Measured on {args.fresh_samples} fresh samples of each policy; ref_kl in nats per completion. J*, the exact "
              f"optimum, is left out where its effective sample size (ESS) is below {MIN_ESS}.", ""]
    print("\n".join(lines[4:]))
    lines += [f"![{name}](figures/{name}.png)\n" for name in ("frontier", "ppo", "collapse", "pretrain", "reward")]
    before = write_samples(args, tokenizer, judge, {**judge["rho"], "ref_kl": torch.zeros(20)}, "rho")
    for run in runs:
        name = f"ppo_beta{run['inputs']['beta']:g}"
        pairs = list(zip(before, write_samples(args, tokenizer, judge, run["fresh"], name)))
        print("\n".join(f"\n===== before\n{old}\n\n===== after, beta {run['beta']:g}\n{new}" for old, new in pairs[:2]))
        lines += [f"## {name}, before and after", ""]
        lines += [f"```\n{old}\n```\n\nafter:\n\n```\n{new}\n```\n" for old, new in pairs[:4]]
    data.write_file(args.out / "report.md", "\n".join(lines))


def main(argv=None, until="report"):
    args = parse(argv)
    began = time.monotonic()
    with data.locked(args.out):
        texts, tokenizer = data_stage(args)
        args.data_seconds = time.monotonic() - began
        data.read_labels(args.labels or data.HERE / "labels.csv", args.corpus)    # a bad row is told now, not after pretraining
        pretrained = pretrain_stage(args, texts)
        judge = reward_stage(args, tokenizer, pretrained)
        if until in ("ppo", "report"):
            runs = [ppo_stage(args, beta, tokenizer, pretrained, judge) for beta in sorted(set(args.beta))]
        if until == "report":
            write_report(args, tokenizer, pretrained, judge, runs)
            minutes = (time.monotonic() - began) / 60
            print(f"\n{args.out / 'report.md'} has the figures and more samples. {minutes:.1f} minutes.")


if __name__ == "__main__":
    data.run(main)
