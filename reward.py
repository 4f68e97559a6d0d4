"""The reward model: how positive does a passage feel? A classifier head on the GPT.

Read this file second, after gpt.py. RewardModel is the first block of the pretrained GPT, frozen,
with a linear head: every token adds to the log-odds of "positive" how it feels where it stands. It
is told how single words feel (labels/words.csv), for five megabytes of plays teach a transformer
little of that; from rated passages, soft targets (rating + 2) / 4, it learns when to believe it.

Bag, a bag of words, is the other kind of model here. Trained on other plays and without the rated
words, it is the judge: it measures what PPO did and is never optimised.

The reward of PPO is the score r(y) = (log P(positive given y) - mean) / std, with mean and std
taken once over samples of the pretrained model.

    python train.py --until reward               trains both, prints what they reach
    python reward.py --score FILE.jsonl          prints each line {"text": ...} with "positive": p
"""

import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import PAD
from gpt import GPT, GPTConfig, in_chunks, load_gpt

SHORTEST = 8            # tokens: shorter prefixes say too little to train on
ENOUGH = 100            # samples to calibrate on
LETTERS = 7             # of a word that are read: then kindness and kindnesses share a weight


# ---- the models ---------------------------------------------------------------------------

class PrefixClassifier(nn.Module):
    """Log-odds of positive for every prefix: bias + scale * the sum of what each token adds.

    Subclasses say what: contributions(tokens (B,T)) -> (B,T), 0 at PAD. vocabulary: the bytes of
    each token. words: {first LETTERS letters of a word: a number}. calibrate() sets the scale.
    """

    config = None                   # a bag has none

    def __init__(self, vocabulary, words):
        super().__init__()
        self.vocabulary = vocabulary
        self.words = words
        # " Love", "LOVE" and "love" are one word to a reader. PAD, which is -1, finds the last: "".
        self.spelling = [token.decode("latin-1").lower() for token in [*vocabulary, b""]]
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("bias", torch.zeros(1))

    def prefixes(self, tokens):
        """Log-odds (B,T+1) of the prefixes, of 0 to T tokens, of tokens (B,T), padded right."""
        sums = self.contributions(tokens).cumsum(1)
        return self.bias + self.scale * F.pad(sums, (1, 0))

    def forward(self, tokens, mask=None):
        """Log-odds of positive (B,) of tokens (B,T); without a mask, PAD is not read."""
        if mask is not None:
            tokens = tokens.masked_fill(mask == 0, PAD)
        # Real tokens first, in their order, padding after: so padding anywhere is not read.
        order = (tokens == PAD).int().argsort(dim=1, stable=True)
        return self.prefixes(tokens.gather(1, order))[:, -1]

    def find_words(self, ids):
        """Yield the word so far at each token of a passage: its first LETTERS letters.

        "My", " gra", "cious", " lord" give "my", "gra", "graciou", "lord". A word that was there
        before is "", for saying it again adds nothing; so is padding.
        """
        word = ""
        seen = {""}
        for i in ids:
            token = self.spelling[i]
            # BPE cuts words into tokens; letters after letters belong to the same word.
            if not (word[-1:] + token[:1]).isalpha():
                word = ""
            word += token.strip()
            name = word[:LETTERS]
            yield "" if name in seen else name
            seen.add(name)

    def look_up(self, tokens, numbers):
        """The number (B,T) of the word that each of tokens (B,T) completes, 0 where it has none."""
        rows = []
        for ids in tokens.tolist():
            words = self.find_words(ids)
            rows.append([numbers.get(word, 0) for word in words])
        return torch.tensor(rows, device=tokens.device)


class RewardModel(PrefixClassifier):
    """The reward model: RewardModel(gpt, vocabulary, words)(tokens (B,T)) -> log-odds (B,).

    The first blocks of a GPT, which it takes over, and a linear head. words: how each feels alone,
    -2 to 2. The head reads a token's hidden state, and the hidden state times the rating of the
    word that it completes: so what stands around a word decides how much its rating counts.
    """

    def __init__(self, gpt, vocabulary, words, blocks=1):
        super().__init__(vocabulary, words)
        self.config = vars(gpt.config)
        self.trunk = gpt
        self.trunk.blocks = gpt.blocks[:blocks]
        self.trunk.lm_head = nn.Identity()              # the trunk predicts no tokens here
        self.head = nn.Linear(2 * gpt.config.n_embd + 2, 1, bias=False)

    def features(self, tokens):
        """What the head reads at each token (B,T,2C+2): x and rating * x, x = (hidden state, 1)."""
        # Causal attention: no state knows what follows.
        hidden = self.trunk.hidden(tokens).float()                          # (B,T,C)
        x = F.pad(hidden, (0, 1), value=1.0) * (tokens != PAD)[..., None]
        ratings = self.look_up(tokens, self.words)[..., None]               # (B,T,1)
        return torch.cat((x, ratings * x), dim=-1)

    def contributions(self, tokens):
        return self.head(self.features(tokens)).squeeze(-1)

    def fit(self, tokens, targets, weights, loss):
        """Fit the head to soft targets (N,) of passages tokens (N,T); weights (N,): their counts.

        The trunk stays as it was pretrained: fine-tuning it takes longer and reads new passages no
        better (results/README.md).
        """
        x = in_chunks(lambda rows: self.features(rows).sum(1), tokens)      # (N,2C+2)
        weight, self.bias = regress(x.mv, x.size(1), targets, weights, 300.0, loss)
        self.head.weight.data = weight[None]


class Bag(PrefixClassifier):
    """A bag of words: Bag(vocabulary, words). Each word that has occurred adds its number, once."""

    def contributions(self, tokens):
        return self.look_up(tokens, self.words)

    def fit(self, tokens, targets, weights, loss):
        """Replace words by what each adds: its own weight, and its rating times a strength."""
        names = {"", *self.words}
        for ids in tokens.tolist():
            names.update(self.find_words(ids))
        names = sorted(names)                                           # "" comes first
        column = {name: i for i, name in enumerate(names)}
        rows = self.look_up(tokens, column)                             # (N,T)
        told = [self.words.get(name, 0.0) for name in names]
        ratings = torch.tensor(told, device=rows.device)
        # weight[0] is the strength. "" has no weight of its own: by this rating it adds 0.
        ratings[0] = -1.0

        def sums(weight):
            added = weight + weight[0] * ratings
            return added[rows].sum(1)

        weight, self.bias = regress(sums, len(names), targets, weights, 20.0, loss)
        added = weight + weight[0] * ratings
        self.words = dict(zip(names, added.tolist()))


# ---- losses and regression ----------------------------------------------------------------

def soft_loss(log_odds, targets):
    """Cross-entropy with soft targets from 0 to 1, elementwise, in nats.

    At target 1/2 and log-odds 0 it is log 2, and its gradient 0: a neutral passage pulls nowhere.
    """
    return F.binary_cross_entropy_with_logits(log_odds, targets, reduction="none")


def comparison_loss(log_odds, targets, rounds=8):
    """Bradley-Terry: -log sigmoid(r(better) - r(worse)), the usual loss of RLHF, in nats.

    log_odds, targets (N,) -> (N,). In each round every passage is compared with another at random.
    The one of the higher target is the better one; ties are left out (Ziegler 2019).
    """
    generator = torch.Generator().manual_seed(0)            # the same pairs at every call
    orders = [torch.randperm(len(targets), generator=generator) for _ in range(rounds)]
    other = torch.stack(orders)
    better = (targets - targets[other]).sign()              # (rounds,N): 1, -1, or 0: a tie
    gap = better * (log_odds - log_odds[other])
    losses = -better.abs() * F.logsigmoid(gap)
    return losses.mean(0)


def regress(linear, size, targets, weights=1.0, ridge=0.0, loss=soft_loss):
    """Ridge logistic regression on soft targets (N,): the best weight (size,) and bias (1,).

    Log-odds: linear(weight) (N,) + bias. weights (N,): how much each passage counts. The loss is
    convex: L-BFGS finds its minimum without a learning rate.
    """
    weight = targets.new_zeros(size, requires_grad=True)
    bias = targets.new_zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        misfit = weights * loss(linear(weight) + bias, targets)
        value = misfit.sum() + (ridge * weight.square()).sum() / 2
        value.backward()
        return value

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def calibrate(model, tokens, targets):
    """Rescale a model's log-odds (Platt 1999) on passages that it was not trained on.

    A model of comparisons, which have no zero, learns these two numbers from ratings too.
    """
    log_odds = in_chunks(model, tokens)
    slope, intercept = regress(log_odds.mul, 1, targets)
    model.scale *= slope
    model.bias = slope * model.bias + intercept


# ---- the score ----------------------------------------------------------------------------

def log_p(log_odds, toward="positive"):
    """log P(positive), or log P(negative), of log-odds of positive, in nats."""
    return F.logsigmoid(log_odds if toward == "positive" else -log_odds)


def score_constants(log_odds, toward="positive"):
    """Mean and std of log P(toward) over samples of rho, log-odds (N,): what scales the score."""
    values = log_p(log_odds, toward)
    return {"mean": values.mean().item(), "std": values.std().item()}


def score(log_odds, mean, std, toward="positive"):
    """The score r(y) = (log P(toward) - mean) / std of log-odds of positive (B,): (B,)."""
    return (log_p(log_odds, toward) - mean) / std


# ---- ratings and measures -----------------------------------------------------------------

# The use of a rated passage, by a fold of the play it is from (of its words, where it is from
# none): so no line of a play is on two sides. Fold 0, never trained on, are the plays that the
# GPT has not read either; "choose" is for whatever is tuned.
PARTS = ["report", "choose", "judge", "judge", *["reward"] * 6]


def read_ratings(labels=None):
    """Passages {part: [(text, rating, is a sample)]}, and words {first LETTERS letters: rating}.

    labels: CSV files of one's own. Words that share their first letters share their mean rating.
    """
    folder = data.HERE / "labels"
    names = ("passages.csv", "more_passages.csv", "samples.csv")
    passages = {part: [] for part in PARTS}
    for path in labels or [folder / name for name in names]:
        for text, rating, play in data.read_labels(path):
            part = PARTS[data.fold(play or text, 10)]
            passages[part].append((text, rating, play is None))
    if min(map(len, passages.values())) < 3:
        raise data.UserError("the labels have too few passages to train and to measure on. "
                             "Give a hundred or more.")
    ratings = {}
    for word, rating, _ in data.read_labels(folder / "words.csv"):
        ratings.setdefault(word[:LETTERS], []).append(rating)
    words = {word: sum(same) / len(same) for word, same in ratings.items()}
    return {"passages": passages, "words": words}


def prepare(rated, vocabulary, length, device="cpu"):
    """Ratings as tensors: {part: (tokens (N,length), targets, weights, whether samples (N,))}."""
    tokenizer = data.make_tokenizer(vocabulary)
    parts = {}
    for part, passages in rated["passages"].items():
        texts, ratings, is_sample = zip(*passages)
        ids = [tokenizer.encode_ordinary(text) for text in texts]
        lengths = torch.tensor(list(map(len, ids)))
        is_sample = torch.tensor(is_sample)
        targets = (torch.tensor(ratings) + 2) / 4
        # A rating is of the whole passage: it counts by the share that is read. Samples of models,
        # which is what PPO shows the reward model, count twice.
        weights = (length / lengths).clamp(max=1) * (1 + is_sample)
        columns = data.pad(ids, length), targets, weights, is_sample
        parts[part] = [column.to(device) for column in columns]
    return parts


def rating_metrics(log_odds, targets):
    """How well log-odds (N,) of positive predict soft targets (N,): a dict of floats.

    pearson of P(positive) and target; auc of targets above 1/2 against below; slope of the
    calibration, above 1: too unsure of itself, below: too sure; log_loss, nats.
    """
    p = log_odds.sigmoid()
    # Pearson's r is the cosine of the angle between both without their means.
    pearson = F.cosine_similarity(p - p.mean(), targets - targets.mean(), dim=0)
    # Of every two passages, what the better one wins by its p: 1, 0, or 1/2, a tie.
    wins = ((p[targets > 0.5][:, None] - p[targets < 0.5]).sign() + 1) / 2
    slope, _ = regress(log_odds.mul, 1, targets)
    return {"n": len(p),
            "pearson": pearson.item(),
            "auc": wins.mean().nan_to_num(0.5).item(),
            "slope": slope.item(),
            "log_loss": soft_loss(log_odds, targets).mean().item()}


# ---- the study's stages -------------------------------------------------------------------

def fit_reward(options, pretrained, rated, loop):
    """The reward model that PPO optimises: what reward.pt holds, a dict."""
    told = pretrained["vocabulary"], rated["words"]
    if options.reward_model == "bag":
        model = Bag(*told)
    else:
        gpt = load_gpt(pretrained, dtype=options.dtype)
        model = RewardModel(gpt, *told)
    loss = comparison_loss if options.feedback == "comparisons" else soft_loss
    return fit_to_ratings(options, model, rated, "reward", loss, loop)


def fit_judge(options, pretrained, rated, loop):
    """The judge, which is never optimised: what judge.pt holds, a dict."""
    model = Bag(pretrained["vocabulary"], {})
    return fit_to_ratings(options, model, rated, "judge", soft_loss, loop)


def fit_to_ratings(options, model, rated, part, loss, loop):
    """Fit a model to its part of the ratings, calibrate and measure it on others: a dict."""
    parts = prepare(rated, model.vocabulary, options.length, options.device)
    tokens, targets, weights, _ = parts[part]
    model.to(options.device).fit(tokens, targets, weights, loss)
    tokens, targets, _, is_sample = parts["choose"]
    if is_sample.sum() >= ENOUGH:           # calibrated for what PPO will show it
        tokens, targets = tokens[is_sample], targets[is_sample]
    calibrate(model, tokens, targets)
    tokens, targets, _, is_sample = parts["report"]
    log_odds = in_chunks(model, tokens)
    report = {}
    line = ("{} model, {n} held-out {}: Pearson {pearson:.3f}, AUC {auc:.3f}, "
            "calibration slope {slope:.2f}")
    for kind, chosen in (("passages", ~is_sample), ("samples", is_sample)):
        if chosen.any():
            report[kind] = rating_metrics(log_odds[chosen], targets[chosen])
            print(line.format(part, kind, **report[kind]))
    # The three most negative, and the three most positive.
    order = log_odds.argsort()
    for i in order[[0, 1, 2, -3, -2, -1]]:
        p = log_odds[i].sigmoid()
        text = data.decode(model.vocabulary, tokens[i])
        loop.show(f"P(positive) {p:.2f}", text)
    return {"model": model.state_dict(),
            "config": model.config,
            "vocabulary": model.vocabulary,
            "words": model.words,
            "length": options.length,
            "labels": len(weights),
            "report": report}


def load_reward(state, device="cpu", dtype=torch.float32):
    """The model of a reward or judge checkpoint, frozen."""
    told = state["vocabulary"], state["words"]
    if state["config"] is None:
        model = Bag(*told)
    else:
        config = GPTConfig(**state["config"])
        model = RewardModel(GPT(config, dtype), *told)
    model.load_state_dict(state["model"])
    return model.requires_grad_(False).to(device)


# ---- the command line ---------------------------------------------------------------------

def main():
    parser = data.Parser(description="Score texts with the reward model. "
                                     "(python train.py --until reward trains it.)")
    parser.add_argument("--score", metavar="FILE.jsonl", required=True,
                        help='print each line {"text": ...} of this file with "positive" added; '
                             "of a text longer than --length its beginning is read")
    parser.add_argument("--out", default="out", type=Path,
                        help="the folder of reward.pt (default out)")
    args = parser.parse_args()
    state = data.load_checkpoint(args.out / "reward.pt", "reward")
    tokenizer = data.make_tokenizer(state["vocabulary"])
    model = load_reward(state)
    for row in data.read_jsonl(args.score):
        ids = tokenizer.encode_ordinary(row["text"].strip())
        p = model(data.pad([ids], state["length"])).sigmoid()
        row["positive"] = round(p.item(), 6)
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    data.run(main)
