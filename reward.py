"""The reward model: how positive does a passage feel? Two readers, and what they are worth.

Third on the reader's path. The curriculum's exercise asks for a classifier trained on soft
targets (rating + 2) / 4. A RewardModel is one of two readers, each of which gives the log-odds
of "positive" for every prefix of a passage:

- "bag": a bag of words. Which words and which pairs of tokens have occurred, each with one
  weight, summed: logistic regression. It starts from what a reader said of single words
  (labels/words.csv) and is fitted in seconds;
- "trunk": a classifier head on the pretrained GPT without its output layer, fine-tuned.

The bag is the default, because it is better: five megabytes of plays teach a trunk little of what
words feel like (the README has the numbers). The trunk then serves as the judge, a second reader of
another kind, trained on other plays, that measures what PPO did and is never optimised.

The reward of PPO is the score r(y) = (log P(positive given y) - mean) / std, with mean and std
taken once over samples of the pretrained model.

    python train.py --until reward               trains both, prints what they reach
    python reward.py --score FILE.jsonl          prints each line {"text": ...} with "positive": p
"""

import collections
import csv
import io
import json
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from gpt import GPT, PAD, GPTConfig, in_chunks

SHORTEST = 8            # tokens: shorter prefixes say too little to train on
LETTERS = 7             # of a word that are read: then kindness and kindnesses share a weight
WORDS = data.HERE / "labels/words.csv"


# ---- losses -------------------------------------------------------------------------------

def minimise(loss, parameters):
    """Lower loss(), which is convex, over tensors parameters: L-BFGS needs no learning rate."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def soft_loss(log_odds, targets):
    """Cross-entropy with soft targets from 0 to 1, elementwise, in nats.

    At target 1/2 and log-odds 0 it is log 2, and its gradient 0: a neutral passage pulls nowhere.
    """
    return F.binary_cross_entropy_with_logits(log_odds, targets.expand_as(log_odds),
                                              reduction="none")


def comparison_loss(log_odds, targets, rounds=8):
    """Bradley-Terry: -log sigmoid(r(better) - r(worse)), the usual loss of RLHF (N,), in nats.

    In each round every passage (N,) is compared with another, drawn at random. The one of the
    higher target is the better one; ties are left out (Ziegler 2019, Stiennon 2020).
    """
    loss = 0.0
    for seed in range(rounds):
        other = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
        better = (targets - targets[other]).sign()          # 1, -1, or 0: a tie
        gap = better * (log_odds - log_odds[other])
        loss = loss - better.abs() * F.logsigmoid(gap)
    return loss / rounds


# ---- the bag of words ---------------------------------------------------------------------

class Bag(nn.Module):
    """Logistic regression on which words and pairs of tokens have occurred, for every prefix.

    vocabulary: the bytes of each token. rows: {name of a word or pair: its row of weight}; row 0,
    whose weight is 0, is for what was never seen.
    """

    def __init__(self, vocabulary=(), names=()):
        super().__init__()
        # " Love", "LOVE" and "love" are one word to a reader. PAD, which is -1, finds the last: "".
        self.spelling = [token.decode("latin-1").lower() for token in [*vocabulary, b""]]
        self.rows = {name: row for row, name in enumerate(["", *names])}
        self.register_buffer("weight", torch.zeros(len(self.rows)))
        self.register_buffer("bias", torch.zeros(()))

    def names(self, ids):
        """What each token of a passage adds: the word it ends or goes on with, then its pair.

        Of the tokens "My", " gra", "cious", " lord": "my", " my", "gra", "my gra", "graciou",
        "gra cious", "lord", "cious lord". Case and spaces do not matter. What was there before
        adds nothing, and neither does padding: "".
        """
        word = ""
        last = ""
        seen = set()
        named = []
        for i in ids:
            token = self.spelling[i]
            new = token.strip(" ")
            # BPE cuts words into tokens; letters after letters belong to the same word.
            goes_on = (last[-1:] + token[:1]).isalpha()
            word = word + new if goes_on else new
            for name in (word[:LETTERS], f"{last} {new}"):
                named.append(name if token and name not in seen else "")
                seen.add(name)
            last = new
        return named

    def occurrences(self, tokens):
        """Rows (B,2T), on the CPU, of what tokens (B,T) add: each a word and a pair; 0: nothing."""
        return torch.tensor([[self.rows.get(name, 0) for name in self.names(ids)]
                             for ids in tokens.tolist()], dtype=torch.long)

    def forward(self, tokens):
        """Log-odds of positive for every prefix of tokens (B,T): (B,T).

        What is said again adds nothing, so repeating a kind word does not please.
        """
        new = self.weight[self.occurrences(tokens)].view(*tokens.shape, 2).sum(-1)      # (B,T)
        return self.bias + new.cumsum(1)

    def fit(self, tokens, targets, weights, words, ridge=20.0, pair_ridge=100.0, loss=soft_loss):
        """Fit to soft targets (N,) of passages tokens (N,T), padded with PAD.

        loss: soft_loss, then this is logistic regression, or comparison_loss. weights (N,): how
        much each passage counts. The weight of each word is shrunk toward its rating by a reader
        (words: see read_words), times a strength that is fitted too; those of pairs, which are
        many and rare, more strongly, toward 0.
        """
        counts = collections.Counter(name for ids in tokens.tolist() for name in self.names(ids))
        # What occurs in a single passage teaches its weight that passage's rating, no more.
        often = {name for name, count in counts.items() if count > 1}
        names = sorted(often | words.keys() | {""})         # "" comes first: row 0
        self.rows = {name: row for row, name in enumerate(names)}
        prior = torch.tensor([words.get(name, 0.0) for name in names])
        penalty = torch.tensor([pair_ridge if " " in name else ridge for name in names])
        rows = self.occurrences(tokens)
        targets = targets.cpu()
        weights = weights.cpu()
        # What the passages teach beyond the rated words. It starts at 0; the ridge pulls it back.
        change = torch.zeros_like(prior, requires_grad=True)
        strength = torch.zeros((), requires_grad=True)
        bias = torch.zeros((), requires_grad=True)

        def penalised():
            weight = change + strength * prior
            weight[0] = 0.0             # what was never seen weighs nothing
            # gather, where weight[rows] says the same: its backward pass is many times as fast.
            sums = weight.gather(0, rows.flatten()).view_as(rows).sum(1)
            misfit = weights * loss(bias + sums, targets)
            shrinkage = penalty * change.square() / 2
            return misfit.sum() + shrinkage.sum()

        minimise(penalised, [change, strength, bias])
        self.weight = (change + strength * prior).detach()
        if loss is comparison_loss:
            # The bias cancels in comparisons, so it is still 0; P(positive) needs one.
            sums = self.weight[rows].sum(1)
            minimise(lambda: (weights * soft_loss(bias + sums, targets)).sum(), [bias])
        self.bias = bias.detach()
        return self


# ---- the reward model ---------------------------------------------------------------------

class RewardModel(nn.Module):
    """RewardModel(config)(tokens (B,T), mask=None) -> log-odds of positive (B,).

    reader: "bag", of tokens spelt as in vocabulary (their bytes) and of words and pairs called
    names; or "trunk". Without a mask, what is PAD is not read.
    """

    def __init__(self, config, reader="bag", dtype=torch.float32, vocabulary=(), names=()):
        super().__init__()
        self.reader = reader
        self.register_buffer("scale", torch.ones(()))       # 1 / temperature: see calibrate()
        if reader == "bag":
            self.bag = Bag(vocabulary, names)
        else:
            self.trunk = GPT(config, dtype)
            self.trunk.lm_head = nn.Identity()              # the trunk predicts no tokens here
            self.head = nn.Linear(2 * config.n_embd, 1)
            for parameter in self.head.parameters():
                nn.init.zeros_(parameter)

    def prefixes(self, tokens):
        """Log-odds of positive (B,T) of every prefix of tokens (B,T), padded on the right."""
        if self.reader == "bag":
            return self.scale * self.bag(tokens)
        # Causal attention: the state of each prefix does not know what follows, nor the padding.
        hidden = self.trunk.hidden(tokens).float()                      # (B,T,C)
        count = torch.ones_like(tokens).cumsum(1)                       # (B,T)
        mean = hidden.cumsum(1) / count[..., None]
        log_odds = self.head(torch.cat((mean, hidden), -1))             # of mean so far, and last
        return self.scale * log_odds.squeeze(-1)

    def forward(self, tokens, mask=None):
        mask = (tokens != PAD if mask is None else mask).int()
        # Real tokens first, in their order, padding after: so padding anywhere is not read.
        order = mask.argsort(dim=1, descending=True, stable=True)
        tokens = tokens.gather(1, order)
        last = mask.sum(1, keepdim=True).clamp(min=1) - 1
        return self.prefixes(tokens).gather(1, last).squeeze(1)


def classifier_loss(model, tokens, targets, weights, generator, noise=0.1):
    """Mean loss of the trunk's reader on all prefixes of passages tokens (B,T): a scalar, in nats.

    targets, weights (B,). Every prefix of SHORTEST tokens or more is an example of its own. A
    share of the tokens, noise, is replaced at random, so that no single word decides.
    """
    mask = tokens != PAD
    # Drawn on the CPU, so that every device sees the same noise.
    replaced = torch.rand(tokens.shape, generator=generator) < noise
    random = torch.randint(model.trunk.config.vocab_size, tokens.shape, generator=generator)
    replaced = replaced.to(tokens.device) & mask
    tokens = torch.where(replaced, random.to(tokens.device), tokens)
    weights = mask * weights[:, None]
    weights[:, :SHORTEST - 1] = 0.0         # of prefixes that are too short
    loss = soft_loss(model.prefixes(tokens), targets[:, None]) * weights
    return loss.sum() / weights.sum().clamp(min=1e-6)


def make_optimizer(model):
    """Adam for the trunk's reader: words must learn what they feel like, layers know the rest."""
    return torch.optim.Adam([
        {"params": model.trunk.blocks.parameters(), "lr": 2e-4},
        {"params": model.trunk.embed.parameters(), "lr": 1e-2},
        {"params": model.head.parameters(), "lr": 1e-3},
    ], betas=(0.9, 0.99), fused=True)


def calibrate(model, tokens, targets):
    """Set the model's scale, so that P(positive) is neither over- nor underconfident.

    One number, 1 / temperature (Guo 2017): calibration_slope of passages that the model was not
    trained on.
    """
    model.scale *= calibration_slope(in_chunks(model, tokens), targets)


def calibration_slope(log_odds, targets):
    """The slope of a logistic regression of soft targets (N,) on log-odds (N,): 1 if calibrated.

    Above 1 the model is too unsure of itself, below 1 too sure.
    """
    slope = torch.ones((), device=log_odds.device, requires_grad=True)
    minimise(lambda: soft_loss(slope * log_odds, targets).mean(), [slope])
    return slope.detach()


def score(log_odds, mean, std, toward="positive"):
    """The score r(y) = (log P(toward) - mean) / std of log-odds of positive (B,): (B,)."""
    return (log_p(log_odds, toward) - mean) / std


def constants(log_odds, toward="positive"):
    """What makes a score of log P(toward): mean and std over samples of rho, log-odds (N,)."""
    values = log_p(log_odds, toward)
    return {"mean": values.mean().item(), "std": values.std().item()}


def log_p(log_odds, toward="positive"):
    """log P(positive), or log P(negative), of log-odds of positive, in nats."""
    return F.logsigmoid(log_odds if toward == "positive" else -log_odds)


# ---- passages and measures ----------------------------------------------------------------

def read_words(path=WORDS):
    """The rated words of a CSV file word,rating: {first LETTERS letters: rating from -2 to 2}.

    Words that share these letters are one to the bag: it has their mean.
    """
    ratings = collections.defaultdict(list)
    for row in csv.DictReader(io.StringIO(data.read_text(path, "rated words"))):
        ratings[row["word"][:LETTERS]].append(data.parse_rating(row["rating"]))
    return {word: sum(found) / len(found) for word, found in ratings.items()}


def pad(passages, length):
    """Lists of token ids, cut to length, as a tensor (N,length) padded with PAD on the right."""
    return torch.tensor([ids[:length] + [PAD] * (length - len(ids)) for ids in passages])


def rating_metrics(p, ratings):
    """How well P(positive) p (N,) predicts ratings (N,) from -2 to 2: a dict of floats.

    pearson with the rating, pearson_se its standard error; auc of ratings above 0 against below 0;
    pair_accuracy: how often the higher-rated of two has the higher p; log_loss with soft targets,
    nats, and that of the best constant.
    """
    p = p.double()
    ratings = ratings.double()
    targets = (ratings + 2) / 4
    # Pearson's r is the cosine of the angle between what is left without the means.
    pearson = F.cosine_similarity(p - p.mean(), targets - targets.mean(), dim=0).item()
    # Of every two passages, what the first wins by its p: 1, 0, or 1/2, a tie.
    wins = ((p[:, None] - p).sign() + 1) / 2
    is_better = ratings[:, None] > ratings
    opposite = (ratings[:, None] > 0) & (ratings < 0)
    constant = targets.mean().expand(len(p))
    return {"n": len(p),
            "pearson": pearson,
            "pearson_se": (1 - pearson ** 2) / max(len(p) - 1, 1) ** 0.5,
            "auc": wins[opposite].mean().nan_to_num(0.5).item(),
            "pair_accuracy": wins[is_better].mean().nan_to_num(0.5).item(),
            "slope": calibration_slope(p.logit(eps=1e-6), targets).item(),
            "log_loss": F.binary_cross_entropy(p, targets).item(),
            "constant_log_loss": F.binary_cross_entropy(constant, targets).item()}


def reliability(p, ratings, bins=10):
    """Is P(positive) what it says? Of tenths of the passages by p: lists of three numbers each.

    Mean p, mean soft target, its standard error. In a calibrated model the first two agree within
    a few of the third.
    """
    targets = (ratings + 2) / 4
    return [[p[rows].mean().item(),
             targets[rows].mean().item(),
             targets[rows].std().item() / len(rows) ** 0.5]
            for rows in p.argsort().chunk(bins)
            if len(rows) > 1]


def load_reward(state, device="cpu", dtype=torch.float32):
    """The RewardModel of a checkpoint, frozen."""
    model = RewardModel(GPTConfig(**state["config"]), state["reader"], dtype, state["vocabulary"],
                        state["names"])
    model.load_state_dict(state["model"])
    return model.requires_grad_(False).to(device)


# ---- the command line ---------------------------------------------------------------------

def main():
    parser = data.Parser(description="Score texts with the reward model. "
                                     "(python train.py --until reward trains it.)")
    parser.add_argument("--score", metavar="FILE.jsonl", required=True,
                        help='print each line {"text": ...} of this file with "positive" added')
    parser.add_argument("--out", default="out", help="the folder of reward.pt (default out)")
    args = parser.parse_args()
    state = data.load_checkpoint(f"{args.out}/reward.pt", "reward")
    tokenizer = data.load_tokenizer(f"{args.out}/tokenizer.tiktoken", state)
    model = load_reward(state)
    length = state["length"]
    cut = 0
    for row in data.read_jsonl(args.score):
        ids = tokenizer.encode_ordinary(row["text"].strip())
        cut += len(ids) > length
        p = model(pad([ids], length)).sigmoid().item()
        row["positive"] = round(p, 6)
        print(json.dumps(row, ensure_ascii=False))
    if cut:
        print(f"note: {cut} texts are longer than {length} tokens; only their beginning was read",
              file=sys.stderr)


if __name__ == "__main__":
    data.run(main)
