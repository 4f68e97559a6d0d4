"""The whole study: pretrain a GPT, train a reward model, tune the GPT by PPO, and report what came of it.

Fifth on the reader's path: it adds no idea, it puts the others together. Stages: data,
pretrain, reward, one PPO run for each beta, report. Each writes a checkpoint into --out and is
not done again while its inputs stay the same; one that was cut off goes on where it was.

    python train.py                             everything at beta 0.2
    python train.py --beta 0.02 0.1 0.2 0.4     the sweep; stages already done are reused
    python train.py --size tiny                 a smoke run (about a minute)
"""

import argparse
import dataclasses
import hashlib
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
              "reward_steps": 410, "iterations": 25, "batch": 256, "rho_samples": 4096, "fresh_samples": 1024},
    "base": {"vocab_size": 4096, "block_size": 256, "n_layer": 8, "n_head": 8, "n_embd": 512, "pretrain_steps": 2000,
             "reward_steps": 410, "iterations": 60, "batch": 512, "rho_samples": 16384, "fresh_samples": 4096},
}


def parse(argv=None):
    """The options of the study, those that --size sets filled in."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def number(kind, low, high=math.inf):
        def check(text):
            value = kind(text)
            if not low <= value <= high:
                raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
            return value
        check.__name__ = kind.__name__
        return check

    count, rate = number(int, 1), number(float, 0.0, 10.0)
    study = parser.add_argument_group("the study")
    study.add_argument("--size", choices=SIZES, help="model and budget; unset: base on CUDA, small on a CPU")
    study.add_argument("--beta", type=rate, nargs="+", default=[0.2], help="KL coefficients: smaller lets the policy drift farther from rho for reward")
    study.add_argument("--out", default="out", help="folder of checkpoints, figures and report; another one keeps this study")
    study.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="another seed shows how far results are chance")
    study.add_argument("--device", help="cpu or cuda; unset: cuda where there is one")
    study.add_argument("--fp32", action="store_true", help="no bfloat16: slower, for comparing with other machines")
    study.add_argument("--checkpoint-every", type=number(float, 0), default=45.0, help="seconds of work that a crash may cost")
    texts = parser.add_argument_group("texts")
    texts.add_argument("--corpus", metavar="FILE.txt", help="a text of your own instead of Shakespeare's plays")
    texts.add_argument("--labels", metavar="FILE.csv", default=str(data.HERE / "labels.csv"), help="your own ratings: play, first_line, last_line, rating; or text, rating")
    texts.add_argument("--tokenizer", choices=["own", "gpt2"], default="own", help="gpt2 (downloaded once) compares with models that use it")
    texts.add_argument("--vocab-size", type=number(int, 257, 65535), help="tokens of the tokenizer trained here: more make shorter texts, rarer tokens")
    budget = parser.add_argument_group("budgets (unset: as --size sets them)")
    for name, text in {"pretrain_steps": "more steps make a better writer", "reward_steps": "more steps fit the labels more closely",
                       "iterations": "more PPO iterations come closer to the optimum", "batch": "completions an iteration: more mean less noise"}.items():
        budget.add_argument("--" + name.replace("_", "-"), type=count, help=text)
    tune = parser.add_argument_group("PPO")
    defaults = ppo.PPOConfig()
    for name, kind, text in [("lr", rate, "falls linearly to 0; too high spends KL on noise"), ("epochs", count, "passes over each batch"),
                             ("minibatch", count, "completions an optimizer step"), ("clip", rate, "how far a ratio may go before its gradient stops"),
                             ("lam", number(float, 0, 1), "GAE's lambda: lower trusts the value function more"),
                             ("length", number(int, 4), "tokens of a completion"),
                             ("kl_target", rate, "nats per completion that an adaptive beta keeps (Ziegler 2019); 0: beta stays")]:
        tune.add_argument("--" + name.replace("_", "-"), type=kind, default=getattr(defaults, name), help=text)
    tune.add_argument("--advantage", choices=["gae", "score"], default="gae", help="score: the exercise's simpler form, without a value function")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.size = args.size or ("base" if args.device.type == "cuda" else "small")
    for name, value in SIZES[args.size].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.length + 1 > args.block_size:
        parser.error(f"--length {args.length} does not fit the context of {args.block_size} tokens: give at most {args.block_size - 1}")
    args.bf16 = not args.fp32 and has_bf16(args.device)
    args.out = Path(args.out)
    return args


def pick(args, *names):
    """Some of the options as a dict of plain values: what a stage's result depends on."""
    return {name: getattr(args, name) for name in ("seed", "bf16", *names)}


def progress(name, steps):
    """A show() for run_stage: a line every few seconds with what is reached and the time left."""
    shown = [0.0]

    def show(i, metrics, left):
        if time.monotonic() - shown[0] > 5 or i + 1 == steps:
            shown[0] = time.monotonic()
            values = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key != "step")
            print(f"{name} {i + 1}/{steps}  {values}  {left // 60:.0f}:{left % 60:02.0f} left", flush=True)
    return show


# ---- stages -------------------------------------------------------------------------------

def data_stage(args):
    """Corpus -> tokenizer.tiktoken and token arrays."""
    texts = data.load_corpus(args.corpus)
    inputs = {**pick(args, "tokenizer", "vocab_size"), "corpus": [hashlib.sha256(t.encode()).hexdigest()[:16] for t in texts]}
    path = args.out / "tokenizer.tiktoken"
    if not path.exists():
        (args.out / "data.pt").unlink(missing_ok=True)

    def result():
        data.save_tokenizer(path, data.make_tokenizer(args.tokenizer, texts[0], args.vocab_size))
        tokenizer = data.load_tokenizer(path)
        tokens = [torch.tensor(tokenizer.encode_ordinary(text), dtype=torch.int32) for text in texts]
        size = [len(token) for token in tokenizer.decode_tokens_bytes(list(range(tokenizer.n_vocab)))]
        return {"kind": "data", "tokenizer": data.tokenizer_hash(tokenizer), "train": tokens[0], "validation": tokens[1],
                "bytes": torch.tensor(size)}

    state = data.run_stage(args.out / "data.pt", inputs, 0, lambda: (None, {}, result), None)
    tokenizer = data.load_tokenizer(path)
    data.check_tokenizer(state, tokenizer, args.out)
    print(f"data: {len(state['train']):,} training tokens, {len(state['validation']):,} held out, vocabulary {tokenizer.n_vocab}")
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


def trapezoid(i, steps):
    """Learning rate as a share of its peak: 20 steps up, level, down to 0 over the last 60 percent."""
    return min(1.0, (i + 1) / 20, (1 - i / steps) / 0.6)


def pretrain_stage(args, texts):
    """A GPT that predicts the next token of the plays: pretrain.pt."""
    steps, batch, sizes = args.pretrain_steps, 16, texts["bytes"]
    config = {"vocab_size": len(sizes), **{k: getattr(args, k) for k in ("block_size", "n_layer", "n_head", "n_embd")}}
    if len(texts["validation"]) < args.block_size + 2:
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
            for optimizer, peak in zip(optimizers, peaks):
                for group, lr in zip(optimizer.param_groups, peak):
                    group["lr"] = lr * trapezoid(i, steps)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if (i + 1) % 10 and i + 1 < steps:
                return None
            if not loss.isfinite():
                raise FloatingPointError(f"pretraining loss is not finite at step {i + 1}: use --fp32 or another --seed")
            metrics = {"step": i + 1, "loss": loss.item()}
            if (i + 1) % 100 == 0 or i + 1 == steps:
                metrics["val_bits_per_byte"] = bits_per_byte(model, texts["validation"], sizes, args.device, 40_000)
            return metrics

        def result():
            return {"kind": "pretrain", "config": config, "model": model.state_dict(), "tokenizer": texts["tokenizer"], "args": plain(args),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "val_bits_per_byte": bits_per_byte(model, texts["validation"], sizes, args.device)}
        return step, {"model": model, "muon": optimizers[0], "adam": optimizers[1], "sampler": sampler}, result

    inputs = {**pick(args, "pretrain_steps"), **config, "data": texts["inputs"]}
    state = data.run_stage(args.out / "pretrain.pt", inputs, steps, build, progress("pretrain", steps), args.checkpoint_every)
    print(f"pretrain: {state['parameters']:,} parameters, {state['val_bits_per_byte']:.3f} bits per byte on held-out text")
    return state


def plain(args):
    """The options as plain values, to be kept with a checkpoint."""
    return {key: value if isinstance(value, (int, float, bool, list, type(None))) else str(value) for key, value in vars(args).items()}


def reward_stage(args, tokenizer, pretrained):
    """A reward model on the pretrained trunk, and the constants of its score from samples of rho: reward.pt."""
    steps, batch = args.reward_steps, 32
    passages = data.read_labels(args.labels, args.corpus)
    ratings = torch.tensor([rating for _, rating in passages], dtype=torch.float32)
    held = torch.tensor([data.text_fold(text, 10) == 0 for text, _ in passages])
    if not 1 < held.sum() < len(held) - 1:
        raise data.UserError(f"labels {args.labels} have too few passages to train and to measure on. Give a hundred or more.")
    tokens, mask = reward.pad([tokenizer.encode_ordinary(text) for text, _ in passages], args.length)
    train = (~held).nonzero().squeeze(1)
    names = torch.tensor([i for i, token in enumerate(tokenizer.decode_tokens_bytes(list(range(tokenizer.n_vocab))))
                          if token.isupper() and len(token) > 2] or [0])
    base_rate = ((ratings[train] + 2) / 4).mean().item()
    tokens, mask, targets = tokens.to(args.device), mask.to(args.device), ((ratings + 2) / 4).to(args.device)

    def build():
        model = reward.RewardModel(GPTConfig(**pretrained["config"]), args.bf16).to(args.device)
        model.trunk.load_state_dict({k: v for k, v in pretrained["model"].items() if k != "lm_head.weight"})
        model.wide.fit(tokens[train], mask[train], ratings[train].to(args.device))
        optimizer = reward.make_optimizer(model)
        peaks = [group["lr"] for group in optimizer.param_groups]
        shuffler = data.Generator().manual_seed(args.seed + 1)

        def measure():
            return reward.rating_metrics(reward.positive(model, tokens[held], mask[held]), ratings[held], base_rate)

        def step(i):
            for group, lr in zip(optimizer.param_groups, peaks):
                group["lr"] = lr * min(1, (i + 1) / 20) * (1 - i / steps)
            rows = train[torch.randint(len(train), (batch,), generator=shuffler)]
            loss = reward.loss_on_prefixes(model, tokens[rows], mask[rows], targets[rows], names, shuffler)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (i + 1) % 10 and i + 1 < steps:
                return None
            metrics = {"step": i + 1, "loss": loss.item()}
            if (i + 1) % 50 == 0 or i + 1 == steps:
                metrics |= {"val_" + key: value for key, value in measure().items() if key in ("pearson", "auc", "log_loss")}
            return metrics

        def result():
            p = reward.positive(model, tokens[held], mask[held]).cpu()
            prompt = torch.tensor([tokenizer.encode_ordinary(data.BOUNDARY)[:1]], device=args.device)
            rho = load_gpt(pretrained, args.device, args.bf16)
            samples = sample_completions(rho, prompt, args.rho_samples, args.length, sampler_of(args, 2))
            log_odds = in_chunks(model, samples)
            log_p = F.logsigmoid(log_odds)
            return {"kind": "reward", "config": pretrained["config"], "model": model.state_dict(), "tokenizer": pretrained["tokenizer"],
                    "args": plain(args), "length": args.length, "mean": log_p.mean().item(), "std": log_p.std().item(),
                    "metrics": measure(), "calibration": {"p": p, "rating": ratings[held]},
                    "rho": {"tokens": samples.int().cpu(), "log_odds": log_odds.cpu()}}
        return step, {"model": model, "optimizer": optimizer, "shuffler": shuffler}, result

    inputs = {**pick(args, "reward_steps", "length", "rho_samples"), "pretrain": data.digest(pretrained["model"]),
              "labels": hashlib.sha256(json.dumps(passages).encode()).hexdigest()[:16]}
    state = data.run_stage(args.out / "reward.pt", inputs, steps, build, progress("reward", steps), args.checkpoint_every)
    print("reward: " + "  ".join(f"{key} {value:.3f}" for key, value in state["metrics"].items()))
    return state


def sampler_of(args, use):
    """A generator on the device for one use (2 rho's samples, 3 fresh samples, 4 PPO); each use has its own seed."""
    return torch.Generator(args.device).manual_seed(1000 * args.seed + use)


def ppo_stage(args, beta, tokenizer, pretrained, judge):
    """The policy tuned at one beta, and fresh samples of it: ppo_beta{beta}.pt."""
    config = ppo.PPOConfig(beta=beta, **{f.name: getattr(args, f.name) for f in dataclasses.fields(ppo.PPOConfig) if hasattr(args, f.name) and f.name != "beta"})
    prompt = torch.tensor([tokenizer.encode_ordinary(data.BOUNDARY)[:1]], device=args.device)
    steps = config.iterations

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
            if (i + 1) % 5 == 0:
                for row in range(2):
                    print(f"--- score {run.batch['scores'][row]:.2f}\n{tokenizer.decode(run.batch['tokens'][row].tolist())}")
            return metrics

        def result():
            fresh = measure_policy(args, run.policy, rho, model, prompt, judge)
            return {"kind": "ppo", "config": pretrained["config"], "model": run.policy.state_dict(), "value": run.value.state_dict(),
                    "tokenizer": pretrained["tokenizer"], "args": plain(args), "beta": beta, "final_beta": run.controller.beta, "fresh": fresh}
        return step, {"run": run}, result

    inputs = {**pick(args, "fresh_samples"), **dataclasses.asdict(config), "pretrain": data.digest(pretrained["model"]), "reward": data.digest(judge["model"])}
    state = data.run_stage(args.out / f"ppo_beta{beta:g}.pt", inputs, steps, build, show_ppo(steps), args.checkpoint_every)
    return {**state, "name": f"ppo_beta{beta:g}"}


def show_ppo(steps):
    """A show() that prints every iteration of PPO with the metrics that tell how it goes."""
    shown = ["score", "positive", "ref_kl", "objective", "clipfrac", "approx_kl", "entropy", "explained_variance"]

    def show(i, metrics, left):
        print(f"ppo {i + 1}/{steps}  " + "  ".join(f"{key} {metrics[key]:.3g}" for key in shown) + f"  {left // 60:.0f}:{left % 60:02.0f} left", flush=True)
    return show


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

def scores_of(judge, log_odds):
    """The score of each completion, float32 on the CPU, from its log-odds."""
    return reward.score(log_odds, judge["mean"], judge["std"])


@torch.no_grad()
def optima(args, tokenizer, pretrained, judge, runs):
    """The exact optimum at each run's beta, from samples of rho and of every run pooled (balance heuristic)."""
    prompt = torch.tensor([tokenizer.encode_ordinary(data.BOUNDARY)[:1]], device=args.device)
    pools = [judge["rho"]] + [run["fresh"] for run in runs]
    tokens = torch.cat([pool["tokens"] for pool in pools]).long().to(args.device)
    scores = scores_of(judge, torch.cat([pool["log_odds"] for pool in pools]))

    def logprob(state):
        model = load_gpt(state, args.device, args.bf16)
        return in_chunks(lambda chunk: ppo.token_logprobs(completion_logits(model, prompt, chunk), chunk).double().sum(1), tokens).cpu()

    logprobs = torch.stack([logprob(state) for state in [pretrained, *runs]])
    weights = ppo.mixture_log_weights(logprobs, [len(pool["tokens"]) for pool in pools])
    return [ppo.optimum(scores, run["beta"], weights) if run["beta"] > 0 else None for run in runs], scores, weights


def summarise(args, pretrained, judge, runs, best):
    """summary.json: the numbers of the study. Optima with an effective sample size below 100 are left null."""
    rho_score = scores_of(judge, judge["rho"]["log_odds"]).mean().item()
    rows = []
    for run, optimum in zip(runs, best):
        scores, kl = scores_of(judge, run["fresh"]["log_odds"]), run["fresh"]["ref_kl"]
        objective = (scores - run["beta"] * kl)
        known = optimum is not None and optimum["ess"] >= 100
        rows.append({
            "beta": run["beta"], "iterations": len(run["history"]), "score": scores.mean().item(),
            "positive": run["fresh"]["log_odds"].sigmoid().mean().item(), "ref_kl": kl.mean().item(),
            "objective": objective.mean().item(), "objective_se": objective.std().item() / len(kl) ** 0.5, "reference_objective": rho_score,
            "optimum": {key: optimum[key] if known or key == "ess" else None for key in optimum} if optimum else None,
            "fraction_of_optimum": (objective.mean().item() - rho_score) / (optimum["objective"] - rho_score) if known else None,
            "seconds_per_iteration": run["seconds"] / len(run["history"])})
    seconds = {"data": args.seconds["data"], "pretrain": pretrained["seconds"], "reward": judge["seconds"],
               "ppo": {f"{run['beta']:g}": run["seconds"] for run in runs}}
    return {"size": args.size, "device": args.device.type, "seconds": {**seconds, "total": sum(seconds["ppo"].values()) + sum(v for v in seconds.values() if not isinstance(v, dict))},
            "pretrain": {"parameters": pretrained["parameters"], "val_bits_per_byte": pretrained["val_bits_per_byte"]},
            "reward": {**{f"val_{key}": value for key, value in judge["metrics"].items()}, "mean": judge["mean"], "std": judge["std"],
                       "reference_positive": judge["rho"]["log_odds"].sigmoid().mean().item()}, "ppo": rows}


def save_figure(figure, path):
    """A matplotlib figure as a PNG, written whole."""
    import io
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    plt.close(figure)
    data.write_file(path, buffer.getvalue())


def panels(titles, width=3):
    """A figure with a panel for each title, (x label, y label, title)."""
    rows = math.ceil(len(titles) / width)
    figure, axes = plt.subplots(rows, width, figsize=(4.4 * width, 3.3 * rows), squeeze=False)
    for axis in axes.flat[len(titles):]:
        axis.remove()
    for axis, (x, y, title) in zip(axes.flat, titles):
        axis.set(xlabel=x, ylabel=y, title=title)
        axis.grid(alpha=0.3)
    return figure, axes.flat


def draw_training(folder, pretrained, judge):
    """pretrain.png and reward.png: learning curves and calibration."""
    figure, (axis,) = panels([("step", "nats per token", "Pretraining loss")], 1)
    axis.plot(*zip(*[(row["step"], row["loss"]) for row in pretrained["history"]]), alpha=0.6, label="training, nats per token")
    axis.plot(*zip(*[(row["step"], row["val_bits_per_byte"]) for row in pretrained["history"] if "val_bits_per_byte" in row]), "o-", label="held out, bits per byte")
    axis.legend()
    save_figure(figure, folder / "pretrain.png")
    figure, (left, middle, right) = panels([("step", "Pearson, AUC", "Reward model on held-out passages"), ("step", "nats", "Log loss on held-out passages"),
                                            ("mean P(positive) of the bin", "mean (rating + 2) / 4", "Calibration")])
    rows = [row for row in judge["history"] if "val_pearson" in row]
    for key in ("val_pearson", "val_auc"):
        left.plot([row["step"] for row in rows], [row[key] for row in rows], "o-", label=key[4:])
    middle.plot([row["step"] for row in rows], [row["val_log_loss"] for row in rows], "o-", label="reward model")
    middle.axhline(judge["metrics"]["constant_log_loss"], color="gray", linestyle=":", label="constant predictor")
    p, target = judge["calibration"]["p"], (judge["calibration"]["rating"] + 2) / 4
    bins = [rows for rows in p.argsort().chunk(8) if len(rows)]
    right.plot([p[rows].mean() for rows in bins], [target[rows].mean() for rows in bins], "o-", label="an eighth of the passages each")
    right.plot([0, 1], [0, 1], ":", color="gray", label="perfect")
    for axis in (left, middle, right):
        axis.legend()
    save_figure(figure, folder / "reward.png")


def draw_ppo(folder, runs, best):
    """ppo.png and collapse.png: what changes over iterations, a line for each beta."""
    draw = {"ppo.png": [("score", "score", "Score"), ("ref_kl", "nats per completion", "KL to the reference (ref_kl)"), ("objective", "score - beta KL", "Objective J; dotted: J*"),
                        ("clipfrac", "share of tokens", "Clip fraction"), ("policy_loss", "-mean(min(q A, clip(q) A))", "Train loss (clipped surrogate)"), ("positive", "P(positive)", "Mean P(positive)")],
            "collapse.png": [("separators", "share of characters", "Separators: newline space , ."), ("distinct_2", "share of pairs", "Distinct pairs of tokens"), ("duplicates", "share of completions", "Duplicate completions"),
                             ("ref_logprob", "nats per token", "Mean log-probability under rho"), ("entropy", "nats per token", "Entropy of the policy")]}
    for name, keys in draw.items():
        figure, axes = panels([("iteration", y, title) for _, y, title in keys])
        for axis, (key, *_) in zip(axes, keys):
            for run, optimum in zip(runs, best):
                line, = axis.plot([row["step"] for row in run["history"]], [row[key] for row in run["history"]], label=f"beta {run['beta']:g}")
                if key == "objective" and optimum and optimum["ess"] >= 100:
                    axis.axhline(optimum["objective"], color=line.get_color(), linestyle=":")
        axes[0].legend()
        save_figure(figure, folder / name)


def draw_frontier(folder, judge, runs, best, scores, weights):
    """frontier.png: score against sqrt(KL), the exact frontier, best-of-n and each run's path."""
    figure, (axis,) = panels([("sqrt(KL to rho), KL in nats per completion", "score (deviations of rho's)", "How much score for how much drift?")], 1)
    figure.set_size_inches(7.5, 5.5)
    frontier = [o for o in (ppo.optimum(scores, 10 ** (e / 20), weights) for e in range(30, -40, -1)) if o["ess"] >= 100]
    axis.plot([math.sqrt(max(o["ref_kl"], 0)) for o in frontier], [o["score"] for o in frontier], "k-", label="exact frontier: nothing lies above it")
    rho = scores_of(judge, judge["rho"]["log_odds"])
    points = [ppo.best_of_n(rho, n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    axis.plot([math.sqrt(kl) for _, kl in points], [score for score, _ in points], "s--", color="gray", label="best of n = 1, 2, 4 ... 256 (KL at most)")
    for run, optimum in zip(runs, best):
        line, = axis.plot([math.sqrt(max(row["exact_kl"], 0)) for row in run["history"]], [row["score"] for row in run["history"]], ".-", alpha=0.7, label=f"PPO, beta {run['beta']:g}")
        if optimum and optimum["ess"] >= 100:
            axis.plot(math.sqrt(optimum["ref_kl"]), optimum["score"], "*", color=line.get_color(), markersize=15)
    axis.plot([], [], "k*", markersize=12, label="exact optimum of that beta")
    axis.legend(fontsize=8)
    save_figure(figure, folder / "frontier.png")


def sample_text(tokenizer, tokens, log_odds, judge, ref_kl=None):
    """One sample as printed: the text, and under it what the reward model says."""
    p, score = torch.sigmoid(log_odds).item(), scores_of(judge, log_odds).item()
    kl = "" if ref_kl is None else f"   KL: {ref_kl.item():.1f} nats"
    return f"{tokenizer.decode(tokens.tolist())}\n\nPositive Prob: {100 * p:.1f}%   Score: {score:.2f}{kl}\n"


def write_report(args, tokenizer, pretrained, judge, runs):
    """samples/*.txt, figures/*.png, summary.json and report.md."""
    best, scores, weights = optima(args, tokenizer, pretrained, judge, runs)
    for name in ("figures", "samples"):
        (args.out / name).mkdir(exist_ok=True)
    before = [sample_text(tokenizer, t, o, judge) for t, o in zip(judge["rho"]["tokens"][:20], judge["rho"]["log_odds"])]
    data.write_file(args.out / "samples" / "rho.txt", ("\n" + "-" * 60 + "\n").join(before))
    after = {}
    for run in runs:
        fresh = run["fresh"]
        after[run["name"]] = [sample_text(tokenizer, *row, judge, kl) for *row, kl in zip(fresh["tokens"][:20], fresh["log_odds"], fresh["ref_kl"])]
        data.write_file(args.out / "samples" / f"{run['name']}.txt", ("\n" + "-" * 60 + "\n").join(after[run["name"]]))
    draw_training(args.out / "figures", pretrained, judge)
    draw_ppo(args.out / "figures", runs, best)
    draw_frontier(args.out / "figures", judge, runs, best, scores, weights)
    summary = summarise(args, pretrained, judge, runs, best)
    data.write_file(args.out / "summary.json", json.dumps(summary, indent=1))

    def cell(x):
        return "" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x)

    columns = ["beta", "iterations", "score", "positive", "ref_kl", "objective", "fraction_of_optimum"]
    lines = ["# Report of one study", "", f"Size {args.size} on {args.device.type}, seed {args.seed}. Pretraining: {pretrained['val_bits_per_byte']:.3f} bits per byte on held-out text. "
             f"Reward model, on held-out passages: Pearson {judge['metrics']['pearson']:.3f}, AUC {judge['metrics']['auc']:.3f}. "
             f"Samples of rho: P(positive) {summary['reward']['reference_positive']:.3f}, score {summary['ppo'][0]['reference_objective']:.3f} by {len(judge['rho']['tokens'])} samples.", "",
             "| " + " | ".join([*columns, "J*", "score*", "KL*", "ESS"]) + " |", "|" + "---|" * (len(columns) + 4)]
    for row in summary["ppo"]:
        optimum = row["optimum"] or {}
        lines.append("| " + " | ".join([*(cell(row[c]) for c in columns), *(cell(optimum.get(c)) for c in ("objective", "score", "ref_kl", "ess"))]) + " |")
    lines += ["", "Each beta is measured on fresh samples; ref_kl in nats per completion. J* is left empty where the effective sample size (ESS) is below 100.", ""]
    lines += [f"![{name}](figures/{name}.png)\n" for name in ("frontier", "ppo", "collapse", "pretrain", "reward")]
    for name, texts in after.items():
        lines += [f"## Before and after: {name}", ""]
        for old, new in zip(before[:4], texts):
            lines += ["Before:", "```", old.rstrip(), "```", "After:", "```", new.rstrip(), "```", ""]
    data.write_file(args.out / "report.md", "\n".join(lines))
    return summary, before, after


def main(argv=None, until="report"):
    args = parse(argv)
    began, args.seconds = time.monotonic(), {}
    with data.locked(args.out):
        texts, tokenizer = data_stage(args)
        args.seconds["data"] = time.monotonic() - began
        pretrained = pretrain_stage(args, texts)
        if until == "pretrain":
            return
        judge = reward_stage(args, tokenizer, pretrained)
        if until == "reward":
            return
        runs = [ppo_stage(args, beta, tokenizer, pretrained, judge) for beta in sorted(set(args.beta))]
        if until == "ppo":
            return
        summary, before, after = write_report(args, tokenizer, pretrained, judge, runs)
        for name, texts in after.items():
            for old, new in zip(before[:2], texts):
                print(f"===== before\n{old}===== after: {name}\n{new}")
        for row in summary["ppo"]:
            print("  ".join(f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, (int, float))))
        print(f"report: {args.out / 'report.md'}, after {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    data.run(main)
