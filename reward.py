"""The reward model: how positive does a passage feel? A classifier head on the GPT.

Read this file second, after gpt.py. P(positive) is the sigmoid of a passage's log-odds, a sum over
its tokens. In a Bag of words each word has one number. RewardModel reads words in context: each
token's number comes from a linear head on the first block of the pretrained GPT, frozen. Both learn
from rated passages, with soft targets (rating + 2) / 4. RewardModel is also told the ratings of
single words (labels/words.csv), which five megabytes of plays do not teach. The judge is a Bag
fitted to other plays, without word ratings: it measures PPO and is never optimised.

    python train.py --until reward               trains both, prints their held-out metrics
    python reward.py --score FILE.jsonl          prints each line {"text": ...} with "positive": p
"""

import json
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

import data
from data import PAD
from gpt import GPT, GPTConfig, in_chunks, load_gpt, norm

ENOUGH = 100            # rated samples that suffice to calibrate on samples alone
LETTERS = 7             # words are cut to 7 letters, so kindness and kindnesses share a number
# A hash puts each play, with all its passages, into one of ten folds (a passage of no play by its
# words); entry i is the use of fold i. "report" is never trained on, and its plays (fold 0) are
# held out from pretraining too; "choose" is for calibration and for choosing settings.
PARTS = ["report", "choose", "judge", "judge", *["reward"] * 6]


# ---- the models ---------------------------------------------------------------------------
class Bag(torch.nn.Module):
    """A bag of words: log-odds of positive = bias + scale * the sum of tokens' contributions.
    vocabulary: the bytes of each token. words: {word, cut to LETTERS: number}."""

    def __init__(self, vocabulary, words):
        super().__init__()
        self.words = words          # ratings, -2 to 2; in a Bag, after fit(), contributions
        # " Love", "LOVE" and "love" count as one word. PAD = -1 indexes the last entry, "".
        self.spelling = [token.decode("ascii", "replace").lower() for token in [*vocabulary, b""]]
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("bias", torch.zeros(1))

    def prefixes(self, tokens):
        """Log-odds of positive (B,T+1) of the first 0, 1 ... T of tokens (B,T), padded right."""
        sums = self.contributions(tokens).cumsum(1)
        return self.bias + self.scale * F.pad(sums, (1, 0))

    def forward(self, tokens, mask=None):
        """Log-odds of positive (B,) of tokens (B,T), but for PAD and where mask (B,T) is 0."""
        if mask is not None:
            tokens = tokens.masked_fill(mask == 0, PAD)
        # A stable sort moves padding, wherever it is, to the right of the real tokens.
        order = (tokens == PAD).int().argsort(stable=True)
        return self.prefixes(tokens.gather(1, order))[:, -1]

    def find_words(self, tokens):
        """Yield, at each of tokens (B,T) row by row, the word so far; "" at PAD and at repeats."""
        # "My", " gra", "cious", " lord" give "my", "gra", "graciou", "lord". A repeated word does
        # not add its number again; otherwise PPO could write one positive word over and over.
        for ids in tokens.tolist():
            word = ""
            seen = set()
            for i in ids:
                token = self.spelling[i]
                # BPE splits words into tokens: a letter right after a letter continues a word.
                if not (word[-1:] + token[:1]).isalpha():
                    word = ""
                word = (word + token.strip())[:LETTERS]
                yield "" if word in seen else word
                seen.add(word)

    def contributions(self, tokens):
        """Each token's number, self.words[the word so far] or 0: tokens (B,T) -> (B,T)."""
        numbers = [self.words.get(word, 0) for word in self.find_words(tokens)]
        return torch.tensor(numbers, device=tokens.device).view_as(tokens)

    def fit(self, tokens, targets, weights, loss):
        """Fit the words' numbers to tokens (N,T), with soft targets and weights (N,), by loss."""
        names = sorted({"", *self.words, *self.find_words(tokens)})
        # The ridge shrinks a number to 0.2 * its word's rating; words not in tokens keep that.
        start = 0.2 * targets.new_tensor([self.words.get(name, 0) for name in names])
        # For now a word's number is its index in names: contributions() gives indices.
        self.words = {name: i for i, name in enumerate(names)}
        columns = self.contributions(tokens)                                # (N,T)

        def sums(numbers):
            # Not numbers[columns], whose gradient's last bits vary with several threads.
            added = numbers.gather(0, columns.flatten()).view_as(columns)
            return (added * (columns > 0)).sum(1)           # index 0, "", adds nothing

        numbers, _ = regress(sums, start, targets, weights, 20.0, loss)
        self.words = dict(zip(names, numbers.tolist()))


class RewardModel(Bag):
    """The reward model: a linear head on the first blocks of gpt, from which the rest is deleted.
    It reads each token's hidden state, and the hidden state times the rating of the word so far:
    so the context of a word decides how much its rating counts."""

    def __init__(self, gpt, vocabulary, words, blocks=1):
        super().__init__(vocabulary, words)
        self.trunk = gpt
        del gpt.blocks[blocks:], gpt.lm_head            # the trunk predicts no tokens
        self.head = torch.nn.Parameter(torch.zeros(2 * gpt.config.n_embd + 2))

    def features(self, tokens):
        """The head's input (B,T,2C+2) at tokens (B,T): x and rating * x, x = (hidden state, 1)."""
        # Attention is causal, so the features of a prefix do not depend on what follows.
        hidden = norm(self.trunk.stream(tokens)).float()                    # (B,T,C)
        x = F.pad(hidden, (0, 1), value=1.0)
        x[tokens == PAD] = 0.0
        ratings = super().contributions(tokens)[..., None]                  # (B,T,1)
        return torch.cat((x, ratings * x), dim=-1)

    def contributions(self, tokens):        # (B,T) -> (B,T): as in Bag, but from the head
        return self.features(tokens) @ self.head

    def fit(self, tokens, targets, weights, loss):
        """As Bag.fit, but the head alone: training the trunk does not help samples (results/)."""
        x = in_chunks(lambda rows: self.features(rows).sum(1), tokens)      # (N,2C+2)
        # A passage's log-odds are the head times its summed features. Ridges of 100 to 30,000
        # predict "choose" equally well; a large one makes a smoother reward.
        self.head.data, _ = regress(x.mv, self.head.data, targets, weights, 10_000.0, loss)


# Cross-entropy of log-odds (N,) with soft targets (N,), 0 to 1 (neutral: 1/2): (N,), in nats.
soft_loss = partial(F.binary_cross_entropy_with_logits, reduction="none")


def comparison_loss(log_odds, targets):
    """Bradley-Terry, RLHF's usual loss: -log sigmoid(better - worse log-odds): (N,), in nats."""
    generator = torch.Generator().manual_seed(0)            # the same pairs in every call
    # Each passage is compared with 8 random ones; a tie's loss is constant, without a gradient.
    other = torch.randint(len(targets), (8, len(targets)), generator=generator)     # (8,N)
    better = (targets - targets[other]).sign()              # 1, -1, or 0 (tie)
    return -F.logsigmoid(better * (log_odds - log_odds[other])).mean(0)


def regress(linear, start, targets, weights=1.0, ridge=0.0, loss=soft_loss):
    """Logistic regression: weight and bias (1,) of the log-odds linear(weight) + bias (N,).
    Minimises sum(weights * loss), targets and weights (N,), plus ridge/2 * |weight - start|^2."""
    weight = start.clone().requires_grad_()
    bias = targets.new_zeros(1, requires_grad=True)
    # The loss is convex, so L-BFGS finds its minimum without a learning rate.
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        misfits = weights * loss(linear(weight) + bias, targets)
        value = misfits.sum() + (ridge * (weight - start).square()).sum() / 2
        value.backward()
        return value

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def calibrate(model, tokens, targets):
    """Set model's scale and bias (Platt 1999) on tokens (N,T), targets (N,) that are new to it."""
    # fit() keeps no bias, as comparisons determine none: both numbers are fitted here.
    log_odds = in_chunks(model, tokens)
    model.scale, model.bias = regress(log_odds.mul, model.scale, targets)


def score(log_odds, mean, std, toward="positive"):
    """The score r(y) = (log P(toward) - mean) / std, which PPO maximises; log_odds of any shape."""
    if toward == "negative":
        log_odds = -log_odds
    return (F.logsigmoid(log_odds) - mean) / std


def score_constants(log_odds):
    """{toward: {"mean", "std"}} of log P(toward), nats, over samples of rho with log-odds (N,)."""
    constants = {}
    for toward in ("positive", "negative"):
        log_p = score(log_odds, 0.0, 1.0, toward)
        constants[toward] = {"mean": log_p.mean().item(),
                             "std": log_p.std().item()}
    return constants


# ---- ratings and measures -----------------------------------------------------------------
def read_ratings(labels=None):
    """{"passages": {part: [(text, rating, is_sample)]}, "words": {first letters: mean rating}}.
    Ratings are -2 to 2. labels: CSV files of passages, in place of ours."""
    folder = data.HERE / "labels"
    names = ("passages.csv", "more_passages.csv", "samples.csv")
    passages = {part: [] for part in PARTS}
    for path in labels or map(folder.joinpath, names):
        for text, rating, play in data.read_labels(path):
            part = PARTS[data.fold(play or text, 10)]
            passages[part].append((text, rating, play is None))
    for rows in passages.values():
        if len({rating for _, rating, _ in rows}) < 2:
            raise data.UserError("the labels have too few passages to train and to measure on, or "
                                 "rate all alike. Give a hundred or more, rated differently.")
    ratings = {}
    for word, rating, _ in data.read_labels(folder / "words.csv"):
        ratings.setdefault(word[:LETTERS], []).append(rating)
    words = {word: fmean(same) for word, same in ratings.items()}
    return {"passages": passages,
            "words": words}


def prepare(passages, vocabulary, length):
    """Rated passages as tensors: tokens (N,length), soft targets (N,), is_sample (N,) bool."""
    texts, ratings, is_sample = zip(*passages)
    ids = map(data.make_tokenizer(vocabulary).encode_ordinary, texts)
    targets = (torch.tensor(ratings) + 2) / 4
    return data.pad(ids, length), targets, torch.tensor(is_sample)


def rating_metrics(log_odds, targets):
    """How well log-odds (N,) predict soft targets (N,): a dict of numbers, log_loss in nats."""
    p = log_odds.sigmoid()
    # Pearson's r is the cosine similarity of the centred vectors.
    pearson = F.cosine_similarity(p - p.mean(), targets - targets.mean(), dim=0)
    # For each pair of a better and a worse passage: 1 if the better has the higher p, else -1.
    better = p[targets > 0.5]
    worse = p[targets < 0.5]
    wins = (better[:, None] - worse).sign()
    auc = (1 + wins.mean().nan_to_num()) / 2            # without any pair: 1/2
    # The calibration slope: above 1 the model is underconfident, below 1 overconfident.
    slope, _ = regress(log_odds.mul, targets.new_ones(1), targets)
    log_loss = soft_loss(log_odds, targets).mean()
    return {"n": len(p),
            "pearson": pearson.item(),
            "auc": auc.item(),
            "slope": slope.item(),
            "log_loss": log_loss.item()}


def fit_reward(options, pretrained, rated, loop):
    """Fit the reward model that PPO optimises: the content of reward.pt, a dict.
    options: the stage's. pretrained: pretrain.pt. rated: read_ratings(). loop: a train.Stage."""
    vocabulary, words = pretrained["vocabulary"], rated["words"]
    model = Bag(vocabulary, words)
    if options.reward_model == "head":
        model = RewardModel(load_gpt(pretrained, dtype=options.dtype), vocabulary, words)
    loss = comparison_loss if options.feedback == "comparisons" else soft_loss
    return fit_ratings(options, pretrained, rated, loop, model, "reward", loss)


def fit_judge(options, pretrained, rated, loop):
    """Fit the judge, which PPO never optimises: the content of judge.pt; as fit_reward."""
    model = Bag(pretrained["vocabulary"], {})
    return fit_ratings(options, pretrained, rated, loop, model, "judge", soft_loss)


def fit_ratings(options, pretrained, rated, loop, model, part, loss):
    """Fit model to its part of the ratings, calibrate it on "choose", measure it on "report"."""
    vocabulary = pretrained["vocabulary"]
    with torch.device(options.device):                  # where the tensors are made
        learn, choose, report = [
            prepare(rated["passages"][name], vocabulary, options.length)
            for name in (part, "choose", "report")]
    tokens, targets, is_sample = learn
    # Samples of models count twice: PPO asks the reward model about samples.
    model.to(options.device).fit(tokens, targets, 1 + is_sample, loss)
    tokens, targets, is_sample = choose
    # Samples are PPO's kind of text; if they are fewer than ENOUGH, calibrate on all passages.
    rows = is_sample | (is_sample.sum() < ENOUGH)
    calibrate(model, tokens[rows], targets[rows])
    tokens, targets, is_sample = report
    log_odds = in_chunks(model, tokens)
    measures = {}
    for kind, rows in (("passages", ~is_sample), ("samples", is_sample)):
        if rows.any():
            measures[kind] = rating_metrics(log_odds[rows], targets[rows])
            print("{} model, {n} held-out {}: Pearson {pearson:.3f}, AUC {auc:.3f}, "
                  "calibration slope {slope:.2f}".format(part, kind, **measures[kind]))
    order = log_odds.argsort().tolist()
    for i in order[:3] + order[-3:]:        # the three most negative and the three most positive
        text = data.decode(vocabulary, tokens[i])
        loop.show(f"P(positive) {log_odds[i].sigmoid():.2f}", text)
    return {"model": model.state_dict(),
            "words": model.words,
            "vocabulary": vocabulary,
            "config": pretrained["config"],
            "length": options.length,
            "report": measures}


def load_reward(state, device="cpu", dtype=torch.float32):
    """The frozen Bag or RewardModel of state, a reward.pt or judge.pt checkpoint."""
    told = state["vocabulary"], state["words"]
    model = Bag(*told)
    if "head" in state["model"]:
        gpt = GPT(GPTConfig(**state["config"]), dtype)
        model = RewardModel(gpt, *told)
    model.load_state_dict(state["model"])
    return model.requires_grad_(False).to(device)


def main():
    parser = data.Parser(description="Score texts by the reward model that train.py trained.")
    parser.add_argument("--score", metavar="FILE.jsonl", required=True,
                        help='print each line {"text": ...} of this file with "positive" added; '
                             "of a text longer than --length its beginning is read")
    parser.add_argument("--out", default="out", type=Path,
                        help="the folder of reward.pt (default out)")
    args = parser.parse_args()
    state = data.load_checkpoint(args.out / "reward.pt", "reward")
    encode = data.make_tokenizer(state["vocabulary"]).encode_ordinary
    model = load_reward(state)
    for row in data.read_jsonl(args.score):
        tokens = data.pad([encode(row["text"].strip())], state["length"])
        row["positive"] = model(tokens).sigmoid().item()
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    data.run(main)
