"""How fast is one PPO iteration, and how far from what the machine could do?

    python tests/benchmark.py            a table
    python tests/benchmark.py --json     one JSON object on one line
    python tests/benchmark.py --scaling  how the times grow with length, batch, depth and width (minutes)

Times, medians of several repeats after a warm-up, of one iteration as ppo.PPO does it: rollout
(sampling), scoring (policy, reference, bag of words, values), update (all epochs and the value
function). Beside them the machine's measured matrix-product rate, the arithmetic floor that follows from it (multiply-adds
of the iteration at that rate), and a naive twin: no key-value cache, float32, the whole prefix read for each token.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Parser, number, run  # noqa: E402
from gpt import (GPT, GPTConfig, compute_dtype, make_optimizers,  # noqa: E402
                 sample_completions, sample_tokens)
from ppo import PPO, PPOConfig, kl_penalised_rewards, whiten  # noqa: E402
from reward import Bag  # noqa: E402


def median_seconds(function, repeats, device):
    """Median wall-clock seconds of function() after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matmul_rate(config, rows, dtype, device, repeats):
    """Multiply-adds a second, times two, of the model's own largest product: rows x n_embd by n_embd x 4 n_embd."""
    a = torch.randn(rows, config.n_embd, device=device, dtype=dtype)
    b = torch.randn(4 * config.n_embd, config.n_embd, device=device, dtype=dtype)
    many = 20
    seconds = median_seconds(lambda: [F.linear(a, b) for _ in range(many)], repeats, device) / many
    return 2 * a.numel() * b.size(0) / seconds


def iteration_flops(config, batch, length, epochs):
    """Arithmetic of one iteration: 2 a parameter and token forward, 6 with backward, and attention's products.

    Forward passes: sampling, policy, reference; update: epochs. (The bag of words multiplies nothing.)
    """
    blocks = 12 * config.n_layer * config.n_embd ** 2 + 2 * config.n_layer * config.n_embd * length / 2
    output = config.n_embd * config.vocab_size
    tokens = batch * length
    return tokens * (2 * 3 + 6 * epochs) * (blocks + output)


@torch.no_grad()
def naive_rollout(model, prompt, batch, length, generator):
    """Sampling without a cache: the whole prefix is read again for each token."""
    tokens = prompt.expand(batch, -1)
    for _ in range(length):
        tokens = torch.cat((tokens, sample_tokens(model(tokens)[:, -1], generator=generator)[:, None]), 1)
    return tokens[:, prompt.size(1):]


def make_run(args, dtype, device):
    """A PPO run on random weights of the shape asked for; speed does not depend on what they say."""
    torch.manual_seed(0)
    length = max(128, args.length + 1)
    config = GPTConfig(args.vocab, length, args.layers, args.width // 64 or 1, args.width)
    rho = GPT(config, dtype).to(device)
    for parameter in rho.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    bag = Bag([b" %x" % i for i in range(args.vocab)]).to(device)
    settings = PPOConfig(batch=args.batch, length=args.length, minibatch=args.minibatch,
                         epochs=args.epochs, max_update_kl=1e9)
    prompts = torch.zeros(1, 1, dtype=torch.long, device=device)
    return PPO(rho, lambda y: bag(y)[:, -1] + torch.randn(len(y), device=device), prompts, settings,
               0, lambda y: bag(y)[..., None])


def time_iteration(run, repeats, device, sampler):
    """Median seconds of rollout, scoring and update. sampler(run) draws the completions."""
    config, kept = run.config, {}

    def rollout():
        kept["tokens"] = sampler(run)

    def scoring():
        tokens = kept["tokens"]
        prompts = run.prompts.expand(len(tokens), -1)
        chunks = zip(prompts.split(config.minibatch), tokens.split(config.minibatch))
        parts = [run.read(*chunk) for chunk in chunks]
        kept["batch"] = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def update():
        batch, mask = kept["batch"], kept["batch"]["mask"]
        rewards = kl_penalised_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"],
                                       config.beta, mask)
        advantages, returns = run.advantages(rewards, batch["values"], mask)
        run.update(batch, whiten(advantages, mask))
        run.fit_values(batch["features"], returns, mask, epochs=4)

    return [median_seconds(part, repeats, device) for part in (rollout, scoring, update)]


def pretrain_rate(args, dtype, device):
    """Pretraining tokens a second, in batches of 16 windows of 128 tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(args.vocab, 128, args.layers, args.width // 64 or 1, args.width), dtype).to(device)
    optimizers = make_optimizers(model, 0.02, 0.01)
    tokens = torch.randint(args.vocab, (16, 129), device=device)

    def step():
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return 16 * 128 / median_seconds(lambda: [step() for _ in range(4)], args.repeats, device) * 4


SCALES = {"length": (32, 64, 128, 256), "batch": (32, 64, 128, 256, 512), "layers": (2, 4, 8), "width": (128, 256, 512)}


def scaling(options):
    """A markdown table: the times of an iteration and its memory as one number of its shape changes, each in a process of its own."""
    columns = ["rollout_seconds", "scoring_seconds", "update_seconds", "total_seconds", "floor_seconds", "floor_ratio", "peak_memory_mb"]
    print(f"| shape | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, values in SCALES.items():
        for value in values:
            command = [sys.executable, __file__, *options, "--json", "--no-naive", f"--{name}", str(value)]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(f"| {name} {value} | " + " | ".join(f"{result[column]:.3g}" for column in columns) + " |", flush=True)


def main():
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shape = {"batch": 128, "length": 64, "epochs": 4, "layers": 4, "width": 256, "vocab": 2048, "minibatch": 32}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=number(int, 1), default=value, help="of the iteration timed")
    parser.add_argument("--repeats", type=number(int, 1), default=3, help="of which the median is taken")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive twin out: it takes longest")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--scaling", action="store_true", help="a table over lengths, batches, depths and widths instead")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if args.fp32 else compute_dtype(device)
    if args.scaling:
        return scaling([option for option in sys.argv[1:] if option != "--scaling"])
    ppo = make_run(args, dtype, device)
    rollout, scoring, update = time_iteration(ppo, args.repeats, device, lambda r: sample_completions(
        r.policy, r.prompts.expand(args.batch, -1), args.length, r.sampler))
    memory = (torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**20
    rate = matmul_rate(ppo.ref.config, args.minibatch * args.length, dtype, device, args.repeats)
    total, floor = rollout + scoring + update, iteration_flops(ppo.ref.config, args.batch, args.length, args.epochs) / rate
    naive = None
    if not args.no_naive:
        naive = sum(time_iteration(make_run(args, torch.float32, device), 1, device, lambda r: naive_rollout(
            r.policy, r.prompts, args.batch, args.length, r.sampler)))
    result = {"shape": {name: getattr(args, name) for name in shape}, "dtype": str(dtype).removeprefix("torch."),
              "rollout_seconds": rollout, "scoring_seconds": scoring, "update_seconds": update, "total_seconds": total,
              "rollout_tokens_per_second": args.batch * args.length / rollout, "pretrain_tokens_per_second": pretrain_rate(args, dtype, device),
              "peak_memory_mb": memory, "matmul_gflops": rate / 1e9, "floor_seconds": floor, "floor_ratio": total / floor,
              "naive_seconds": naive, "naive_ratio": naive and naive / total}
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:28s} {value:.4g}" if isinstance(value, float) else f"{key:28s} {value}")


if __name__ == "__main__":
    run(main)
