"""The reward model: how positive does a passage feel? A classifier head on the GPT trunk.

Third on the reader's path. The curriculum's exercise asks for a classifier on top of the
pretrained model, trained on soft targets (rating + 2) / 4. Here two readers add up to the log-odds
of "positive", for every prefix of a passage:

- wide: which tokens and pairs of tokens have occurred, weighted by rarity (TF-IDF),
  through one linear layer, fitted in closed form (ridge regression);
- deep: the trunk's last hidden state and the mean of all so far, through one linear layer,
  trained to correct the other.

A trunk that has read five megabytes knows little of word meaning, and alone loses to a bag of
words (the README has the numbers); wide and deep together: Cheng 2016. Each prefix is a training
example: augmentation for free, and a start for PPO's value function.

    python reward.py                             trains it (after pretraining), prints what it reaches
    python reward.py --score FILE.jsonl          prints each line {"text": ...} with "positive": p
"""

import functools
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Parser, load_checkpoint, load_tokenizer, read_jsonl, run
from gpt import GPT, GPTConfig

BUCKETS = 1 << 17       # rows of each hash table: of tokens, of pairs
SHORTEST = 8            # tokens: shorter prefixes say too little to train on


class Wide(nn.Module):
    """The bag of words: a rating from -2 to 2, read as log-odds, for every prefix: (B,T)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(2 * BUCKETS))
        self.register_buffer("idf", torch.ones(2 * BUCKETS))
        self.register_buffer("mean", torch.zeros(()))

    def bag(self, tokens):
        """Table rows (B,2T) of the tokens and pairs of tokens (B,T), and 1.0 where each first occurs (B,2T)."""
        before = F.pad(tokens, (1, 0), value=0)[:, :-1]
        pairs = (before * 1_000_003 + tokens + 1) * 0x9E3779B1 % (1 << 32) >> 15   # Knuth's multiplicative hash
        rows = torch.stack((tokens % BUCKETS, pairs + BUCKETS), -1).flatten(1)      # token, pair, token, pair ...
        order = rows.argsort(dim=1, stable=True)              # equal rows side by side, the earliest first
        ordered = rows.gather(1, order)
        first = F.pad((ordered[:, 1:] != ordered[:, :-1]).float(), (1, 0), value=1.0)
        return rows, torch.zeros_like(first).scatter(1, order, first)

    @torch.no_grad()
    def fit(self, tokens, mask, ratings, ridge=1.0, iterations=60):
        """Ridge regression of ratings (N,) on the bags X (N, rows of the table) of passages tokens, mask (N,T).

        The weights are X' u with (X X' + ridge I) u = ratings - mean, solved by conjugate gradients.
        """
        N = len(tokens)
        rows, first = self.bag(tokens)
        mask = mask.repeat_interleave(2, 1).float()
        frequency = torch.zeros_like(self.idf).scatter_add_(0, rows.flatten(), (first * mask).flatten())
        self.idf.copy_(torch.log((1 + N) / (1 + frequency)) + 1)
        self.mean.copy_(ratings.mean())
        idf = self.idf[rows] * mask
        values = idf * first / idf.square().sum(1, keepdim=True).sqrt()                # the entries of X: (N,2T)

        def transposed(u):
            return torch.zeros_like(self.weight).scatter_add_(0, rows.flatten(), (values * u[:, None]).flatten())

        u, residual = torch.zeros_like(ratings), ratings - self.mean
        direction = residual
        for _ in range(iterations):
            if residual.norm() <= 1e-6 * (ratings - self.mean).norm():
                break                # solved: another step would divide by 0
            image = (values * transposed(direction)[rows]).sum(1) + ridge * direction
            step = residual.square().sum() / (direction @ image)
            u, old, residual = u + step * direction, residual, residual - step * image
            direction = residual + residual.square().sum() / old.square().sum() * direction
        self.weight.copy_(transposed(u))
        return self

    def forward(self, tokens):
        """The sum over n-grams of their first occurrence, over the norm of all occurrences.

        So a word repeated adds nothing to the sum, and by the norm draws the value to the mean.
        """
        rows, first = self.bag(tokens)
        idf = self.idf[rows]
        total = (idf * first * self.weight[rows]).cumsum(1)
        return (self.mean + total / idf.square().cumsum(1).sqrt())[:, 1::2]          # after each pair: (B,T)


class RewardModel(nn.Module):
    """RewardModel(config)(tokens (B,T), mask=None) -> log-odds of positive (B,), of the unmasked tokens."""

    def __init__(self, config, bf16=False):
        super().__init__()
        self.trunk = GPT(config, bf16)
        self.trunk.lm_head = nn.Identity()      # the trunk predicts no tokens here
        self.head = nn.Linear(2 * config.n_embd, 1)
        self.wide = Wide()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def pooled(self, tokens):
        """Mean and last hidden state of each prefix of tokens (B,T): (B,T,2C)."""
        hidden = self.trunk.hidden(tokens).float()
        count = torch.arange(1, tokens.size(1) + 1, device=tokens.device)[:, None]
        return torch.cat((hidden.cumsum(1) / count, hidden), -1)

    def features(self, tokens):
        """What is known of each prefix, for a value function: pooled states, both log-odds: (B,T,2C+2)."""
        pooled = self.pooled(tokens)
        return torch.cat((pooled, self.head(pooled), self.wide(tokens)[..., None]), -1)

    def forward(self, tokens, mask=None):
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        tokens = tokens.gather(1, (~mask).int().argsort(dim=1, stable=True))    # unmasked first, padding after
        deep = self.head(self.pooled(tokens)).squeeze(-1)
        last = mask.sum(1, keepdim=True) - 1
        return (deep + self.wide(tokens)).gather(1, last).squeeze(1)


# ---- training -----------------------------------------------------------------------------

def pad(passages, length):
    """Lists of token ids, cut to length: tokens (N,length) and mask (N,length), padded on the right with 0."""
    tokens = torch.zeros(len(passages), length, dtype=torch.long)
    mask = torch.zeros(len(passages), length, dtype=torch.bool)
    for row, ids in enumerate(passages):
        ids = ids[:length]
        tokens[row, :len(ids)], mask[row, :len(ids)] = torch.tensor(ids), True
    return tokens, mask


def soft_loss(log_odds, target):
    """Cross-entropy with a soft target from 0 to 1, elementwise, in nats: at target 1/2 and log-odds 0 it is log 2."""
    return F.binary_cross_entropy_with_logits(log_odds, target.expand_as(log_odds), reduction="none")


def nonsense(tokens, vocab_size, names, generator):
    """Passages (B,T) spoilt as word salad is spoilt: a dict of five kinds, each (B,T).

    Their tokens shuffled; drawn at random from all of them; one to four tokens of the
    vocabulary over and over; the first half twice; speakers' names (a list of ids) strewn in.
    """
    B, T = tokens.shape

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    few = torch.randint(vocab_size, (B, 4), generator=generator)
    return {"shuffled": tokens.gather(1, rand(B, T).argsort(1)),
            "drawn at random": tokens.flatten()[(rand(B, T) * B * T).long()],
            "few tokens repeated": few.gather(1, (rand(B, T) * (1 + 3 * rand(B, 1))).long()),
            "first half twice": torch.cat((tokens[:, :T // 2], tokens[:, :T - T // 2]), 1),
            "heap of names": torch.where(rand(B, T) < 0.7, names[(rand(B, T) * len(names)).long()], tokens)}


def make_optimizer(model):
    """AdamW, fastest for the embeddings: words must learn how kind they are, the layers know the rest."""
    return torch.optim.AdamW([{"params": model.trunk.blocks.parameters(), "lr": 2e-4},
                              {"params": model.trunk.embed.parameters(), "lr": 1e-2},
                              {"params": model.head.parameters(), "lr": 1e-3}],
                             betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def loss_on_prefixes(model, wide, tokens, mask, target, names, generator, noise=0.1, spoilt=2, spoilt_target=0.25):
    """Mean loss on all prefixes of passages tokens, mask (B,T), soft targets (B,), in nats.

    wide: a bag of words fitted on other passages than these: on those it was fitted on its errors
    are far smaller than on new ones, and the deep reader would learn to trust it. A tenth of
    the tokens is replaced at random, so that no single word decides. A few whole passages
    are also shown as nonsense of each kind, with spoilt_target for their last quarter: it should not please.
    """
    device, T, V = tokens.device, tokens.size(1), model.trunk.config.vocab_size
    replaced = (torch.rand(tokens.shape, generator=generator) < noise).to(device)
    random = torch.randint(V, tokens.shape, generator=generator).to(device)
    bad = torch.cat(list(nonsense(tokens[mask[:, -1]][:spoilt].cpu(), V, names, generator).values())).to(device)
    inputs = torch.cat((torch.where(replaced, random, tokens), bad))
    position = torch.arange(T, device=device)
    weight = torch.cat((mask & (position >= SHORTEST - 1), (position >= 3 * T // 4).expand(bad.shape))).float()
    target = torch.cat((target, target.new_full((len(bad),), spoilt_target)))[:, None]
    loss = soft_loss(model.head(model.pooled(inputs)).squeeze(-1) + wide(inputs), target)
    return (loss * weight).sum() / weight.sum().clamp(min=1)


# ---- measuring ----------------------------------------------------------------------------

def positive(model, tokens, mask=None):
    """P(positive given y) of tokens (N,T): (N,)."""
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    with torch.no_grad():
        return torch.cat([model(t, m) for t, m in zip(tokens.split(64), mask.split(64))]).sigmoid()


def fooled(model, tokens, names, generator):
    """Mean P(positive) of whole passages (N,T), of the same as nonsense of each kind, and of favourite words: a dict.

    Favourites are the twenty tokens that the bag of words likes best, each said T times; beside
    them stand the passages in which one of them occurs.
    """
    vocab_size = model.trunk.config.vocab_size
    weights = model.wide.weight[:min(vocab_size, BUCKETS)]
    favourites = weights.topk(min(20, len(weights))).indices
    pleasant = tokens[torch.isin(tokens, favourites).any(1)]
    kinds = {"as written": tokens, **nonsense(tokens.cpu(), vocab_size, names, generator),
             "with a favourite word": pleasant, "a favourite word repeated": favourites[:, None].expand(-1, tokens.size(1))}
    return {kind: positive(model, x.to(tokens.device)).mean().item() for kind, x in kinds.items() if len(x)}


def rating_metrics(p, ratings, base_rate):
    """How well p (N,) predicts ratings (N,) from -2 to 2: a dict of floats.

    pearson with the rating; auc of rating above 0 against below 0; log_loss with soft targets in nats,
    and of the constant predictor base_rate; sign_log_loss, on passages not neutral, likewise;
    ece, expected calibration error over ten equal bins of p.
    """
    p, ratings = p.double().cpu(), ratings.double().cpu()
    target, sign = (ratings + 2) / 4, (ratings > 0).double()
    pairs = p[ratings > 0][:, None] - p[ratings < 0]
    taken = ratings != 0

    def cross_entropy(q, t):
        return F.binary_cross_entropy(q, t).item()

    bins = (p * 10).long().clamp(0, 9)
    gaps = [(p - target)[bins == b].sum().abs() for b in range(10)]
    share = sign[taken].mean()
    return {"pearson": torch.corrcoef(torch.stack((p, target))).nan_to_num()[0, 1].item() if len(p) > 1 else 0.0,
            "auc": ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item() if pairs.numel() else 0.5,
            "log_loss": cross_entropy(p, target),
            "constant_log_loss": cross_entropy(torch.full_like(p, base_rate), target),
            "sign_log_loss": cross_entropy(p[taken], sign[taken]) if taken.any() else 0.0,
            "constant_sign_log_loss": cross_entropy(share.expand(int(taken.sum())), sign[taken]) if taken.any() else 0.0,
            "ece": (sum(gaps) / len(p)).item()}


def score(log_odds, mean, std):
    """The score r(y) = (log P(positive) - mean) / std of log-odds (B,): (B,)."""
    return (F.logsigmoid(log_odds) - mean) / std


def readings(model, mean, std):
    """score_fn (tokens (B,T) -> (B,)) and features_fn (tokens -> (B,T,F)) for PPO.

    The features of the last prefix end with its log-odds, deep and wide; so both share one pass over
    the tokens asked for last.
    """
    features_fn = functools.lru_cache(maxsize=1)(model.features)
    return lambda tokens: score(features_fn(tokens)[:, -1, -2:].sum(-1), mean, std), features_fn


def load_reward(state, device="cpu", bf16=False):
    """The RewardModel of a checkpoint, frozen."""
    model = RewardModel(GPTConfig(**state["config"]), bf16)
    model.load_state_dict(state["model"])
    return model.requires_grad_(False).to(device)


# ---- the command line ---------------------------------------------------------------------

def score_file(path, out, batch=64):
    """Print each line {"text": ...} of a JSON-lines file with "positive": p added, a batch at a time."""
    state = load_checkpoint(Path(out) / "reward.pt", "reward")
    tokenizer = load_tokenizer(Path(out) / "tokenizer.tiktoken", state)
    model, cut, rows = load_reward(state), 0, read_jsonl(path)
    while chunk := list(itertools.islice(rows, batch)):
        passages = [tokenizer.encode_ordinary(row["text"].strip()) for row in chunk]
        cut += sum(len(ids) > state["length"] for ids in passages)
        tokens, mask = pad([ids or [0] for ids in passages], state["length"])
        for row, p in zip(chunk, positive(model, tokens, mask).tolist()):
            print(json.dumps({**row, "positive": round(p, 6)}, ensure_ascii=False))
    if cut:
        print(f"note: {cut} texts are longer than {state['length']} tokens; only their beginning was read", file=sys.stderr)


def main():
    parser = Parser(description="Score texts with the reward model, or train it.", allow_abbrev=False,
                    epilog="Without --score it is trained, with the options of train.py.")
    parser.add_argument("--score", metavar="FILE.jsonl", help='print each line {"text": ...} of this file with "positive" added')
    parser.add_argument("--out", default="out", help="the folder of reward.pt and tokenizer.tiktoken (default out)")
    args, rest = parser.parse_known_args()
    if args.score is None:
        import train             # training is a stage of the study, with the study's options
        train.main(["--out", args.out, *rest], until="reward")
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        score_file(args.score, args.out)


if __name__ == "__main__":
    run(main)
