"""How fast is one PPO iteration, and how far from what the machine could do?

    python tests/benchmark.py            a table
    python tests/benchmark.py --json     one JSON object on one line
    python tests/benchmark.py --scaling  how the times grow with the shape, a table (minutes)

Times PPO.step, on random weights, in three parts: rollout (sampling), scoring (what PPO.read reads
off the completions) and update (all else: all epochs, and the value function). Each number is a
median of several repeats after a warm-up. Beside them stand:

- matmul_gflops, the measured rate of matrix products; floor_seconds, what the arithmetic of the
  iteration takes at that rate; and update_flops_share, how much of that rate the update reaches;
- rollout_bandwidth_share: the bytes that sampling has to read, a second, as a share of the
  bandwidth of a plain copy. Above 1 if weights stay in a cache that a large copy does not fit;
- naive_seconds, a twin in float32 whose sampler has no key-value cache.
"""

import argparse
import inspect
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
from gpt import (GPT, GPTConfig, compute_dtype, descend, in_chunks, make_optimizers,  # noqa: E402
                 draw_uniform, sample_completions, sample_tokens)

SHAPE = {"batch": 128, "length": 64, "epochs": 4, "layers": 4, "width": 256, "vocab": 2048,
         "minibatch": 32}
# What --scaling changes, one at a time, and the columns of its table.
SCALES = {"length": (32, 64, 128, 256),
          "batch": (32, 64, 128, 256, 512),
          "layers": (2, 4, 8),
          "width": (128, 256, 512)}
COLUMNS = ["rollout_seconds", "scoring_seconds", "update_seconds", "total_seconds",
           "floor_seconds", "floor_ratio", "peak_memory_mb"]


# ---- clocks -------------------------------------------------------------------------------

def clock(device):
    """Seconds, once the device has done all it was given: a GPU works behind our back."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, times, device):
    """The function, which now appends the seconds that each call takes to times."""
    def call(*args, **kwargs):
        start = clock(device)
        result = function(*args, **kwargs)
        times.append(clock(device) - start)
        return result
    return call


def median_seconds(function, repeats, device):
    """Median seconds of function() after one warm-up."""
    times = []
    function = timed(function, times, device)
    for _ in range(repeats + 1):
        function()
    return statistics.median(times[1:])


def calls_a_second(function, repeats, device, many=10):
    """How often a second function() can be done, many at a time: one alone may be too short."""
    def several():
        for _ in range(many):
            function()
    return many / median_seconds(several, repeats, device)


# ---- what the machine can do --------------------------------------------------------------

def matmul_rate(config, rows, dtype, repeats, device):
    """FLOP/s of a block's largest product: (rows, n_embd) by (n_embd, 4 n_embd)."""
    n_in, n_out = config.n_embd, 4 * config.n_embd
    x = torch.randn(rows, n_in, device=device, dtype=dtype)
    weight = torch.randn(n_out, n_in, device=device, dtype=dtype)
    rate = calls_a_second(lambda: F.linear(x, weight), repeats, device)
    return 2 * rows * n_in * n_out * rate


def copy_rate(repeats, device, size=2**27):
    """Bytes a second that a copy reads and writes; more of them than caches hold."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size * calls_a_second(lambda: target.copy_(source), repeats, device)


# ---- what an iteration has to do ----------------------------------------------------------

def multiplied_weights(config):
    """Weights of all matrix products: the blocks' and the output layer's."""
    return 12 * config.n_layer * config.n_embd ** 2 + config.n_embd * config.vocab_size


def forward_flops(config, batch, length):
    """Arithmetic of one forward pass over completions: two operations a multiply-add."""
    # Attention multiplies twice, q with keys and weights with values; a token sees half of them.
    attention = 2 * config.n_layer * config.n_embd * length / 2
    return 2 * batch * length * (multiplied_weights(config) + attention)


def rollout_bytes(config, batch, length, dtype):
    """What sampling has to read: at each token all weights, and the keys and values so far."""
    at_once = inspect.signature(sample_completions).parameters["batch"].default
    weights = math.ceil(batch / at_once) * multiplied_weights(config)
    # The prompt is one token, so the cache holds 1 to length of them.
    cache = 2 * config.n_layer * config.n_embd * batch * (length + 1) / 2
    return dtype.itemsize * length * (weights + cache)


# ---- what is timed ------------------------------------------------------------------------

def make_config(args, block_size):
    heads = max(1, args.width // 64)
    return GPTConfig(args.vocab, block_size, args.layers, heads, args.width)


def make_run(args, dtype, device):
    """A PPO run of the shape asked for, put together as train.make_run does."""
    torch.manual_seed(0)
    config = make_config(args, max(128, args.length + 1))
    rho = GPT(config, dtype).to(device)
    # Speed does not depend on what the weights say, unless they are 0 or not finite.
    for parameter in rho.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    words = [b"%x" % i for i in range(args.vocab)]
    bag = reward.RewardModel(config, "bag", vocabulary=words).to(device)
    # No update ends early: all epochs are timed.
    settings = ppo.PPOConfig(batch=args.batch, length=args.length, minibatch=args.minibatch,
                             epochs=args.epochs, max_update_kl=math.inf)

    def score_fn(tokens):
        # An empty bag scores all alike; noise gives the update something to do.
        return bag(tokens) + torch.randn(len(tokens), device=device)

    return ppo.PPO(rho, score_fn, torch.zeros(1, 1, dtype=torch.long, device=device), settings,
                   features_fn=lambda tokens: bag.prefixes(tokens)[..., None])


def iteration_seconds(run, repeats, device, sampler=sample_completions):
    """Median seconds of rollout, scoring and update of run.step, which draws with sampler."""
    rollouts, scorings, steps = [], [], []
    step = timed(run.step, steps, device)
    # These two names of ppo.py are called once an iteration each.
    with mock.patch.multiple(ppo, sample_completions=timed(sampler, rollouts, device),
                             in_chunks=timed(in_chunks, scorings, device)):
        for _ in range(repeats + 1):
            step(0)
    parts = zip(rollouts, scorings, steps, strict=True)
    updates = [step - rollout - scoring for rollout, scoring, step in parts]
    return [statistics.median(times[1:]) for times in (rollouts, scorings, updates)]


@torch.no_grad()
def naive_completions(model, prompts, length, generator, end=None):
    """sample_completions without a cache: the whole prefix is read again for each token."""
    tokens = prompts
    for _ in range(length):
        logits = model(tokens)[:, -1]
        uniform = draw_uniform(1, len(logits), logits.device, generator)[0]
        new = sample_tokens(logits, uniform)[:, None]
        tokens = torch.cat((tokens, new), dim=1)
    return tokens[:, prompts.size(1):]


def naive_seconds(args, device):
    """Seconds of one iteration of the naive twin; it is slow, so one repeat has to do."""
    run = make_run(args, torch.float32, device)
    return sum(iteration_seconds(run, 1, device, naive_completions))


def pretrain_rate(args, dtype, device, batch=16, length=128):
    """Pretraining, tokens a second, in train.py's batches of 16 windows."""
    torch.manual_seed(0)
    model = GPT(make_config(args, length), dtype).to(device)
    optimizers = make_optimizers(model, matrix_lr=0.02, embed_lr=0.01)
    tokens = torch.randint(args.vocab, (batch, length + 1), device=device)

    def step():
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        descend(loss, model, optimizers)

    return batch * length * calls_a_second(step, args.repeats, device, many=4)


def peak_memory(device):
    """The most memory so far, MiB: on CUDA of tensors, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10       # from KiB


# ---- the numbers --------------------------------------------------------------------------

def measure(args, device):
    """All numbers of one shape, a dict in the order of the table."""
    dtype = torch.float32 if args.fp32 else compute_dtype(device)
    run = make_run(args, dtype, device)
    config, tokens = run.ref.config, args.batch * args.length
    rollout, scoring, update = iteration_seconds(run, args.repeats, device)
    total = rollout + scoring + update
    memory = peak_memory(device)        # before anything else takes some
    matmul = matmul_rate(config, args.minibatch * args.length, dtype, args.repeats, device)
    # Three passes: sampling, policy, reference. A backward pass is worth two. (The bag of words
    # multiplies nothing, and the value function next to nothing.)
    forward = forward_flops(config, args.batch, args.length)
    update_flops = 3 * args.epochs * forward
    floor = (3 * forward + update_flops) / matmul
    read = rollout_bytes(config, args.batch, args.length, dtype)
    naive = None if args.no_naive else naive_seconds(args, device)
    return {"shape": {name: getattr(args, name) for name in SHAPE},
            "dtype": str(dtype).removeprefix("torch."),
            "rollout_seconds": rollout,
            "scoring_seconds": scoring,
            "update_seconds": update,
            "total_seconds": total,
            "rollout_tokens_per_second": tokens / rollout,
            "pretrain_tokens_per_second": pretrain_rate(args, dtype, device),
            "peak_memory_mb": memory,
            "matmul_gflops": matmul / 1e9,
            "floor_seconds": floor,
            "floor_ratio": total / floor,
            "naive_seconds": naive,
            "naive_ratio": naive and naive / total,
            "rollout_bandwidth_share": read / rollout / copy_rate(args.repeats, device),
            "update_flops_share": update_flops / update / matmul}


def print_row(*cells):
    """A row of a markdown table, at once: the next may take minutes."""
    print(f"| {' | '.join(cells)} |", flush=True)


def scaling(options):
    """Print how the numbers grow with each dimension of the shape, a markdown table."""
    print_row("shape", *COLUMNS)
    print_row(*["---"] * (1 + len(COLUMNS)))
    for name, values in SCALES.items():
        for value in values:
            # A process each: peak memory never falls within one.
            command = [sys.executable, __file__, *options, "--json", "--no-naive",
                       f"--{name}", str(value)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            result = json.loads(done.stdout)
            print_row(f"{name} {value}", *(f"{result[column]:.3g}" for column in COLUMNS))


def parse():
    # No abbreviations: scaling() hands all options but its own to the processes it starts.
    parser = data.Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    positive = data.number(int, 1)
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=positive, default=value,
                            help="of the iteration timed")
    parser.add_argument("--repeats", type=positive, default=3, help="of which the median is taken")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16")
    parser.add_argument("--no-naive", action="store_true",
                        help="leave the naive twin out: it takes longest")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--scaling", action="store_true",
                        help="a table over lengths, batches, depths and widths instead")
    return parser.parse_args()


def main():
    args = parse()
    if args.scaling:
        return scaling([option for option in sys.argv[1:] if option != "--scaling"])
    result = measure(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name:28s} {shown}")


if __name__ == "__main__":
    data.run(main)
