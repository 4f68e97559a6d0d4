"""How long does each part take, and how far is that from the arithmetic alone?

    python results/benchmark.py --study out     a study's stages as well (3 minutes)
    python results/benchmark.py --no-naive      without the slow twin (1 minute)
    python results/benchmark.py --json          one JSON object on one line

Of size small on one thread of an AMD EPYC. Let nothing else run beside it. Timed are PPO.step and a
step of pretraining, on random weights: medians of --repeats after a warm-up.

- total_seconds of an iteration = rollout (sampling) + scoring (all of PPO.read) + update (the rest:
  nearly all of it gradient_seconds, step 6). Scoring = policy_and_rho + reward_model.
- matmul_gflops is the rate of a block's largest product, timed after each iteration; floor_seconds
  is what the matrix products of an iteration take at that rate; floor_ratio = total / floor.
- products_seconds is what they do take, at the shapes they have; softmax_seconds what softmax,
  log-softmax, its gradient and cumulative sums take, nearly all over the vocabulary; rest_seconds =
  total less both. Each operation is timed as it runs, in iterations of their own.
- naive_seconds: one iteration in float32 without a key-value cache; naive_ratio = naive / total.
"""

import itertools
import json
import math
import resource
import statistics
import sys
import time
from pathlib import Path
from string import ascii_lowercase
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import train  # noqa: E402
from gpt import (GPT, GPTConfig, compute_dtype, in_chunks, next_token_nats,  # noqa: E402
                 optimizer_step, sample_completions, sample_tokens)
from tables import table  # noqa: E402

# The flags of the shape, and the options of train.py whose values at --size are their defaults.
SHAPE = {"batch": "batch", "length": "length", "epochs": "epochs", "minibatch": "minibatch",
         "layers": "n_layer", "width": "n_embd", "vocab": "vocab_size", "context": "block_size"}
PRETRAIN_BATCH = 16     # windows, as in gpt.pretrain
# The kinds of operations that are told apart; all others are "other".
KINDS = {"mm": "products", "bmm": "products", "cumsum": "softmax", "_softmax": "softmax",
         "_log_softmax": "softmax", "_log_softmax_backward_data": "softmax"}


class Stopwatch:
    """Seconds of each part of each step: part(name, function) is the function, now timed."""

    def __init__(self, device):
        self.device, self.steps = device, []

    def clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()            # a GPU works behind our back
        return time.perf_counter()

    def part(self, name, function):
        def call(*args, **kwargs):
            start = self.clock()
            result = function(*args, **kwargs)
            seconds = self.steps[-1]
            seconds[name] = seconds.get(name, 0.0) + self.clock() - start
            return result
        return call

    def medians(self, step, repeats, warm_ups=1):
        """Median seconds of step() as a whole ("total") and of its parts, a dict."""
        step = self.part("total", step)
        for _ in range(warm_ups + repeats):
            self.steps.append({})
            step()
        counted = self.steps[warm_ups:]
        return {name: statistics.median(seconds[name] for seconds in counted)
                for name in counted[0]}


class Kinds(TorchDispatchMode):
    """While active, times every operation, forward and backward, as the part of its KIND."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kind = KINDS.get(operation.overloadpacket.__name__, "other")
        return self.watch.part(kind, operation)(*args, **kwargs or {})


def largest_product(args, times=20):
    """A function that does a block's largest product so many times, and its number of FLOP.
    It is (minibatch tokens, n_embd) by (n_embd, 4 n_embd)."""
    rows, n_in, n_out = args.minibatch * args.length, args.width, 4 * args.width
    x = torch.randn(rows, n_in, device=args.device, dtype=args.dtype)
    weight = torch.randn(n_out, n_in, device=args.device, dtype=args.dtype)

    def multiply():
        for _ in range(times):
            F.linear(x, weight)

    return multiply, 2 * rows * n_in * n_out * times


def forward_flops(args, batch, length, blocks, vocab):
    """Arithmetic of one forward pass over so many rows: two operations a multiply-add."""
    head = args.width // args.config.n_head                 # all heads share a key and a value
    weights = blocks * args.width * (10 * args.width + 2 * head) + args.width * vocab
    # Attention multiplies twice, q with keys and weights with values; a token sees half of them.
    attention = 2 * blocks * args.width * length / 2
    return 2 * batch * length * (weights + attention)


def randomise(model):
    """The model with random weights: speed depends on them only if they are 0 or not finite."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_run(args, dtype):
    """A PPO run of the shape asked for, on a reward model of one block, as train.py ships it."""
    rho = randomise(GPT(args.config, dtype)).to(args.device)
    names = ["".join(name) for name in itertools.product(ascii_lowercase, repeat=3)][:args.vocab]
    # Every third token goes on with the word before it; half of the words have ratings.
    vocabulary = [(" " * (i % 3 > 0) + name).encode() for i, name in enumerate(names)]
    words = dict.fromkeys(names[::2], 1.0)
    trunk = GPT(args.config, dtype)
    model = randomise(reward.RewardModel(trunk, vocabulary, words)).to(args.device)
    # No update ends early: all epochs are timed.
    settings = ppo.PPOConfig(batch=args.batch, length=args.length, minibatch=args.minibatch,
                             epochs=args.epochs, max_update_kl=math.inf)

    def score_fn(tokens):
        return reward.score(model.prefixes(tokens), mean=-0.7, std=0.3)

    return ppo.PPO(rho, score_fn, torch.zeros(1, 1, device=args.device).long(), settings)


def iteration_seconds(run, repeats, sampler=sample_completions, warm_ups=1, product=None):
    """Median seconds of run.step, drawing with sampler, of its parts, and of product: a dict."""
    watch = Stopwatch(run.prompts.device)
    run.score_fn = watch.part("reward_model", run.score_fn)
    run.update = watch.part("gradient", run.update)
    iterate = watch.part("iteration", run.step)
    multiply = watch.part("product", product or (lambda: None))

    def step():
        iterate(0)
        multiply()          # right after it, because the speed of a shared machine varies

    # These two names of ppo.py are called once an iteration each.
    with mock.patch.multiple(ppo, sample_completions=watch.part("rollout", sampler),
                             in_chunks=watch.part("scoring", in_chunks)):
        return watch.medians(step, repeats, warm_ups)


def kind_seconds(run, repeats):
    """Median seconds of each kind of operation in run.step: a dict."""
    watch = Stopwatch(run.prompts.device)
    with Kinds(watch):
        return watch.medians(lambda: run.step(0), repeats)


@torch.no_grad()
def naive_completions(model, prompts, length, end=None, frozen=0):
    """sample_completions without a cache: the whole prefix is read again for each token."""
    tokens = prompts
    for _ in range(length):
        uniform = torch.rand(len(tokens), 1).to(tokens.device)
        new = sample_tokens(model(tokens)[:, -1], uniform)[:, None]
        tokens = torch.cat((tokens, new), dim=1)
    lower = in_chunks(lambda rows: model.stream(rows, blocks=slice(frozen)), tokens[:, :-1])
    return tokens[:, prompts.size(1):], lower


def pretrain_seconds(args):
    """Median seconds of a step of pretraining and of its optimizer: a dict."""
    model = randomise(GPT(args.config, args.dtype)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    watch = Stopwatch(args.device)
    optimizer.step = watch.part("optimizer", optimizer.step)
    tokens = torch.randint(args.vocab, (PRETRAIN_BATCH, args.context + 1), device=args.device)

    def step():
        optimizer_step(next_token_nats(model, tokens).mean(), optimizer, 1e-3)

    return watch.medians(step, 4 * args.repeats, warm_ups=2)


def measure(args):
    """All numbers of one shape, a dict in the order of the table."""
    torch.manual_seed(0)
    has_cuda = args.device.type == "cuda"
    product, flops = largest_product(args)
    parts = iteration_seconds(make_run(args, args.dtype), args.repeats, product=product)
    rate = flops / parts["product"]
    # The most so far, MiB, before anything else takes some: of the process, on CUDA of tensors.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if has_cuda:
        memory = torch.cuda.max_memory_allocated() / 2**20
    kinds = kind_seconds(make_run(args, args.dtype), args.repeats)
    pretrain = pretrain_seconds(args)
    # Sampling runs all blocks; reading the trained ones for policy and reference, and the reward
    # model's block; an epoch the trained ones forward and, at twice the cost, backward.
    shape = args.batch, args.length
    forward = forward_flops(args, *shape, args.layers, args.vocab)
    unfrozen = ppo.PPOConfig().unfrozen
    trained = forward_flops(args, *shape, unfrozen, args.vocab)
    floor = forward + (2 + 3 * args.epochs) * trained
    floor = (floor + forward_flops(args, *shape, 1, 0)) / rate
    both = pretrain["total"] - pretrain["optimizer"]
    windows = PRETRAIN_BATCH, args.context
    pretrain_floor = 3 * forward_flops(args, *windows, args.layers, args.vocab) / rate
    naive = None
    if not args.no_naive:
        run = make_run(args, torch.float32)
        naive = iteration_seconds(run, 1, naive_completions, 0)["iteration"]
    total, rollout, scoring = [parts[name] for name in ("iteration", "rollout", "scoring")]
    return {"shape": {name: getattr(args, name) for name in SHAPE},
            "device": torch.cuda.get_device_name() if has_cuda else "cpu",
            "torch": torch.__version__, "threads": torch.get_num_threads(),
            "dtype": str(args.dtype).removeprefix("torch."),
            "rollout_seconds": rollout, "scoring_seconds": scoring,
            "policy_and_rho_seconds": scoring - parts["reward_model"],
            "reward_model_seconds": parts["reward_model"],
            "update_seconds": total - rollout - scoring, "gradient_seconds": parts["gradient"],
            "total_seconds": total,
            "products_seconds": kinds["products"], "softmax_seconds": kinds["softmax"],
            "rest_seconds": total - kinds["products"] - kinds["softmax"],
            "rollout_tokens_per_second": args.batch * args.length / rollout,
            "pretrain_tokens_per_second": PRETRAIN_BATCH * args.context / pretrain["total"],
            "pretrain_step_seconds": pretrain["total"],
            "pretrain_forward_backward_seconds": both,
            "pretrain_optimizer_seconds": pretrain["optimizer"],
            "pretrain_floor_ratio": both / pretrain_floor, "peak_memory_mb": memory,
            "matmul_gflops": rate / 1e9, "floor_seconds": floor, "floor_ratio": total / floor,
            "naive_seconds": naive, "naive_ratio": naive and naive / total}


def study_seconds(folder):
    """Seconds of each stage of a finished study, by its summary.json: a dict."""
    seconds = json.loads(data.read_text(folder / "summary.json"))["seconds"]
    for beta, x in seconds.pop("ppo").items():
        seconds[f"ppo, beta {beta}"] = x
    return seconds


def parse():
    parser, count = data.Parser(description=__doc__.split("\n")[0]), data.number(int, 1)
    add = parser.add_argument
    add("--study", type=Path, metavar="DIR", help="a finished study, whose seconds to tell as well")
    add("--size", choices=train.SIZES, default="small", help="whose shape is timed (default small)")
    for name, option in SHAPE.items():
        add(f"--{name}", type=count, help=f"instead of the size's {option}")
    add("--repeats", type=count, default=3, help="of which the median is taken (default 3)")
    add("--fp32", action="store_true", help="no bfloat16")
    add("--no-naive", action="store_true", help="leave the naive twin out: it takes longest")
    add("--json", action="store_true", help="one JSON object on one line")
    args = parser.parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = torch.float32 if args.fp32 else compute_dtype(args.device)
    sizes = {option.name: getattr(option, args.size) for option in train.OPTIONS}
    for name, option in SHAPE.items():
        setattr(args, name, getattr(args, name) or sizes[option])
    heads = max(1, args.width // 64)
    args.config = GPTConfig(args.vocab, args.context, args.layers, heads, args.width)
    return args


def main():
    args = parse()
    stages = study_seconds(args.study) if args.study else {}
    result = measure(args)
    if args.json:
        print(json.dumps({**result, "study": stages}))
    else:
        if stages:
            print(*table(["stage of the study", "seconds"], stages.items()), sep="\n")
        print(*table(["of an iteration or a step", "value"], result.items()), sep="\n")


if __name__ == "__main__":
    data.run(main)
