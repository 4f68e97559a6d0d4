"""The reward model: how positive does a passage feel? A classifier head on the GPT.

Read this file second, after gpt.py. The exercise asks for a classifier trained on soft targets
(rating + 2) / 4. RewardModel is the first block of the pretrained GPT, frozen, with a linear head:
every token adds to the log-odds of "positive" how it feels where it stands, and a prefix's log-odds
are the sum over its tokens. It is told how single words feel (labels/words.csv), for five megabytes
of plays teach a transformer little of that; from the passages it learns when to believe it.

Bag, a bag of words, is the other kind of model here. Trained on other plays and without the rated
words, it is the judge: it measures what PPO did and is never optimised.

The reward of PPO is the score r(y) = (log P(positive given y) - mean) / std, with mean and std
taken once over samples of the pretrained model.

On a first reading skip "ratings and measures".

    python train.py --until reward               trains both, prints what they reach
    python reward.py --score FILE.jsonl          prints each line {"text": ...} with "positive": p
"""

import collections
import csv
import io
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import PAD
from gpt import GPT, GPTConfig, in_chunks

SHORTEST = 8            # tokens: shorter prefixes say too little to train on
ENOUGH = 100            # samples to calibrate on
LETTERS = 7             # of a word that are read: then kindness and kindnesses share a weight


# ---- the models ---------------------------------------------------------------------------

class PrefixClassifier(nn.Module):
    """Log-odds of positive for every prefix: scale * (bias + the sum of what each token adds).

    Subclasses say what: contributions(tokens (B,T)) -> (B,T). vocabulary: the bytes of each token.
    scale and bias are set by calibrate().
    """

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        # " Love", "LOVE" and "love" are one word to a reader. PAD, which is -1, finds the last: "".
        self.spelling = [token.decode("latin-1").lower() for token in [*vocabulary, b""]]
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def prefixes(self, tokens):
        """Log-odds (B,T+1) of the prefixes, of 0 to T tokens, of tokens (B,T), padded right."""
        added = self.contributions(tokens).masked_fill(tokens == PAD, 0.0)
        sums = F.pad(added.cumsum(1), (1, 0))
        return self.scale * (self.bias + sums)

    def forward(self, tokens, mask=None):
        """Log-odds of positive (B,) of tokens (B,T); without a mask, PAD is not read."""
        mask = (tokens != PAD if mask is None else mask).int()
        # Real tokens first, in their order, padding after: so padding anywhere is not read.
        order = mask.argsort(dim=1, descending=True, stable=True)
        tokens = tokens.masked_fill(mask == 0, PAD).gather(1, order)
        return self.prefixes(tokens)[:, -1]

    def find_words(self, ids):
        """For each token of a passage the word so far, a list: its first LETTERS letters.

        Of the tokens "My", " gra", "cious", " lord": "my", "gra", "graciou", "lord". Case does not
        matter. A word that was there before is "", for saying it again adds nothing; so is padding.
        """
        word = last = ""
        seen = {""}
        words = []
        for i in ids:
            token = self.spelling[i]
            # BPE cuts words into tokens; letters after letters belong to the same word.
            goes_on = (last[-1:] + token[:1]).isalpha()
            word = word + token.strip() if goes_on else token.strip()
            name = word[:LETTERS] if token else ""
            words.append("" if name in seen else name)
            seen.add(name)
            last = token
        return words

    def fit(self, tokens, targets, weights, loss):
        """Ridge logistic regression on soft targets (N,) of passages tokens (N,T).

        Convex: sums() are linear in what is fitted. weights (N,): how much each passage counts.
        """
        parameters, sums, shrinkage = self.linear(tokens)
        bias = torch.zeros_like(self.bias, requires_grad=True)

        def penalised():
            misfit = weights * loss(bias + sums(), targets)
            return misfit.sum() + shrinkage()

        lbfgs(penalised, [*parameters, bias])
        self.bias = bias.detach()
        for parameter in parameters:
            parameter.requires_grad_(False)


class RewardModel(PrefixClassifier):
    """The reward model: RewardModel(config, vocabulary, words)(tokens (B,T)) -> log-odds (B,).

    A GPT of config.n_layer blocks and a linear head. words: {first LETTERS letters of a word: how
    it feels alone, -2 to 2}; each token has the rating of the word that it completes, 0 if none.
    The head reads a token's hidden state, and the hidden state times its rating: so what stands
    around a word decides how much its rating counts.
    """

    def __init__(self, config, vocabulary, words, dtype=torch.float32):
        super().__init__(vocabulary)
        self.words = words
        self.trunk = GPT(config, dtype)
        self.trunk.lm_head = nn.Identity()              # the trunk predicts no tokens here
        self.head = nn.Linear(2 * config.n_embd + 2, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def features(self, tokens):
        """What the head reads at each token (B,T,2C+2): x and rating * x, x = (hidden state, 1)."""
        rows = []
        for ids in tokens.tolist():
            words = self.find_words(ids)
            rows.append([self.words.get(word, 0.0) for word in words])
        ratings = torch.tensor(rows, device=tokens.device)[..., None]       # (B,T,1)
        # Causal attention: no state knows what follows.
        hidden = self.trunk.hidden(tokens).float()                          # (B,T,C)
        x = F.pad(hidden, (0, 1), value=1.0)
        return torch.cat((x, ratings * x), dim=-1)

    def contributions(self, tokens):
        return self.head(self.features(tokens)).squeeze(-1)

    def linear(self, tokens, ridge=300.0):
        """What fit() takes: the head's weight, the log-odds of tokens (N,T) by it, its ridge.

        The trunk stays as it was pretrained: fine-tuning it takes longer and reads new passages no
        better (results/README.md).
        """
        def summed(tokens):
            real = (tokens != PAD)[..., None]
            return (self.features(tokens) * real).sum(1)

        x = in_chunks(summed, tokens)                                       # (N,2C+2)
        weight = self.head.weight
        return [weight], lambda: x @ weight[0], lambda: ridge / 2 * weight.square().sum()


class Bag(PrefixClassifier):
    """A bag of words: each word that has occurred adds its weight, once.

    words: as for RewardModel; none for the judge. names: the words that have weights, after "",
    whose weight is 0, for all others.
    """

    def __init__(self, vocabulary, words, names=("",)):
        super().__init__(vocabulary)
        self.words = words
        self.rows = {name: row for row, name in enumerate(names)}
        self.register_buffer("weight", torch.zeros(len(names)))

    def occurrences(self, tokens):
        """The row (B,T) of the word that each token adds; 0: nothing."""
        rows = []
        for ids in tokens.tolist():
            words = self.find_words(ids)
            rows.append([self.rows.get(word, 0) for word in words])
        return torch.tensor(rows, device=tokens.device)

    def contributions(self, tokens):
        return self.weight[self.occurrences(tokens)]

    def linear(self, tokens, ridge=20.0):
        """What fit() takes; a word's weight is shrunk toward its rating times a fitted strength."""
        counts = collections.Counter()
        for ids in tokens.tolist():
            counts.update(self.find_words(ids))
        # A word that occurs in a single passage would only teach that passage's rating.
        often = {name for name, count in counts.items() if count > 1}
        names = sorted(often | self.words.keys() | {""})        # "" comes first: row 0
        self.rows = {name: row for row, name in enumerate(names)}
        prior = torch.tensor([self.words.get(name, 0.0) for name in names], device=tokens.device)
        known = torch.ones_like(prior)
        known[0] = 0.0
        rows = self.occurrences(tokens)
        weight = self.weight = torch.zeros_like(prior, requires_grad=True)
        strength = torch.zeros_like(prior[0], requires_grad=True)

        def sums():
            # gather, where weight[rows] is the same: its backward pass is many times as fast.
            return (weight * known).gather(0, rows.flatten()).view_as(rows).sum(1)

        def shrinkage():
            return ridge / 2 * (weight - strength * prior).square().sum()

        return [weight, strength], sums, shrinkage


# ---- losses -------------------------------------------------------------------------------

def soft_loss(log_odds, targets):
    """Cross-entropy with soft targets from 0 to 1, elementwise, in nats.

    At target 1/2 and log-odds 0 it is log 2, and its gradient 0: a neutral passage pulls nowhere.
    """
    return F.binary_cross_entropy_with_logits(log_odds, targets.expand_as(log_odds),
                                              reduction="none")


def comparison_loss(log_odds, targets, rounds=8):
    """Bradley-Terry: -log sigmoid(r(better) - r(worse)), the usual loss of RLHF, in nats.

    log_odds, targets (N,) -> (N,). In each round every passage is compared with another at random.
    The one of the higher target is the better one; ties are left out (Ziegler 2019).
    """
    loss = 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        other = torch.randperm(len(targets), generator=generator)
        better = (targets - targets[other]).sign()          # 1, -1, or 0: a tie
        gap = better * (log_odds - log_odds[other])
        loss = loss - better.abs() * F.logsigmoid(gap)
    return loss / rounds


LOSSES = {"ratings": soft_loss, "comparisons": comparison_loss}


def lbfgs(loss, parameters):
    """Minimise loss(), which is convex, over tensors parameters: L-BFGS needs no learning rate."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


# ---- training ---------------------------------------------------------------------------

def calibrate(model, tokens, targets):
    """Set the model's scale and bias (Platt 1999) on passages that it was not trained on.

    So P(positive) is neither over- nor underconfident. These two numbers a model of comparisons,
    which have no zero, learns from ratings too.
    """
    log_odds = in_chunks(model, tokens)
    scale, bias = platt(log_odds, targets)
    # scale (scale' (bias' + sum)) + bias = (scale scale') (bias' + bias / (scale scale') + sum)
    model.scale *= scale
    model.bias += bias / model.scale


def platt(log_odds, targets):
    """Slope and intercept of a logistic regression of soft targets (N,) on log-odds (N,).

    Slope 1: calibrated; above: the model is too unsure of itself; below: too sure.
    """
    slope = torch.ones((), device=log_odds.device, requires_grad=True)
    intercept = torch.zeros((), device=log_odds.device, requires_grad=True)
    lbfgs(lambda: soft_loss(slope * log_odds + intercept, targets).mean(), [slope, intercept])
    return slope.detach(), intercept.detach()


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
    """What readers rated: passages (text, rating, fold 0 to 9, whether a sample) and words, a dict.

    labels: CSV files of one's own. words: {first LETTERS letters: mean rating of the words that
    share them}.
    """
    folder = data.HERE / "labels"
    names = ("passages.csv", "more_passages.csv", "samples.csv")
    passages = []
    for path in labels or [folder / name for name in names]:
        for text, rating, play in data.read_labels(path):
            passages.append((text, rating, data.fold(play or text, 10), play is None))
    sizes = collections.Counter(PARTS[fold] for _, _, fold, _ in passages)
    if min(sizes[part] for part in PARTS) < 3:
        raise data.UserError("the labels have too few passages to train and to measure on. "
                             "Give a hundred or more.")
    ratings = collections.defaultdict(list)
    file = io.StringIO(data.read_text(folder / "words.csv", "rated words"))
    for row in csv.DictReader(file):
        word = row["word"][:LETTERS]
        ratings[word].append(data.parse_rating(row["rating"]))
    words = {word: sum(found) / len(found) for word, found in ratings.items()}
    return {"passages": passages, "words": words}


def prepare(rated, vocabulary, length, device="cpu"):
    """Ratings as tensors: tokens (N,length), ratings, targets, weights (N,), and rows of PARTS."""
    tokenizer = data.make_tokenizer(vocabulary)
    texts, ratings, folds, is_sample = zip(*rated["passages"])
    ids = [tokenizer.encode_ordinary(text) for text in texts]
    ratings, is_sample = torch.tensor(ratings), torch.tensor(is_sample)
    # A rating is of the whole passage: it counts by the share that is read. Samples of models,
    # which is what PPO shows the reward model, count twice.
    lengths = torch.tensor([max(len(i), 1) for i in ids])
    weights = (length / lengths).clamp(max=1) * torch.where(is_sample, 2, 1)
    rows = {name: [] for name in PARTS}
    for i, fold in enumerate(folds):
        rows[PARTS[fold]].append(i)
    targets = (ratings + 2) / 4
    return {"tokens": data.pad(ids, length).to(device),
            "ratings": ratings.to(device),
            "targets": targets.to(device),
            "weights": weights.to(device),
            "is_sample": is_sample,
            "rows": {part: torch.tensor(found) for part, found in rows.items()}}


def rating_metrics(p, ratings):
    """How well P(positive) p (N,) predicts ratings (N,) from -2 to 2: a dict of floats.

    pearson with the rating; auc of ratings above 0 against below 0; slope of the calibration;
    log_loss with soft targets, nats.
    """
    p = p.double()
    ratings = ratings.double()
    targets = (ratings + 2) / 4
    # Pearson's r is the cosine of the angle between both without their means.
    pearson = F.cosine_similarity(p - p.mean(), targets - targets.mean(), dim=0)
    # Of every two passages, what the first wins by its p: 1, 0, or 1/2, a tie.
    wins = ((p[:, None] - p).sign() + 1) / 2
    opposite = (ratings[:, None] > 0) & (ratings < 0)
    slope, _ = platt(p.logit(eps=1e-6), targets)
    metrics = {"pearson": pearson,
               "auc": wins[opposite].mean().nan_to_num(0.5),
               "slope": slope,
               "log_loss": F.binary_cross_entropy(p, targets)}
    return {"n": len(p), **{name: x.item() for name, x in metrics.items()}}


def measure(model, rated):
    """rating_metrics on the ratings kept for the report, of plays' passages and of samples."""
    rows = rated["rows"]["report"]
    log_odds = in_chunks(model, rated["tokens"][rows])
    p = log_odds.sigmoid().cpu()
    ratings = rated["ratings"][rows].cpu()
    is_sample = rated["is_sample"][rows]
    report = {}
    for name, chosen in (("passages", ~is_sample), ("samples", is_sample)):
        if chosen.sum() > 1:
            report[name] = rating_metrics(p[chosen], ratings[chosen])
    return report


# ---- the study's stages -------------------------------------------------------------------

def fit_reward(options, pretrained, rated, loop):
    """The reward model that PPO optimises: what reward.pt holds, a dict."""
    vocabulary, words = pretrained["vocabulary"], rated["words"]
    if options.reward_model == "bag":
        model = Bag(vocabulary, words)
    else:
        config = GPTConfig(**{**pretrained["config"], "n_layer": 1})
        model = RewardModel(config, vocabulary, words, options.dtype)
        for name, weight in model.trunk.state_dict().items():
            weight.copy_(pretrained["model"][name])
    return fit_to_ratings(options, model, rated, "reward", LOSSES[options.feedback], loop)


def fit_judge(options, pretrained, rated, loop):
    """The judge, which is never optimised: what judge.pt holds, a dict."""
    model = Bag(pretrained["vocabulary"], {})
    return fit_to_ratings(options, model, rated, "judge", soft_loss, loop)


def fit_to_ratings(options, model, rated, part, loss, loop):
    """Fit a model to its part of the ratings, calibrate and measure it on others: a dict."""
    rated = prepare(rated, model.vocabulary, options.length, options.device)
    tokens, targets, rows = rated["tokens"], rated["targets"], rated["rows"][part]
    model.to(options.device)
    model.fit(tokens[rows], targets[rows], rated["weights"][rows], loss)
    model.requires_grad_(False)
    choose = rated["rows"]["choose"]
    is_sample = rated["is_sample"][choose]
    if is_sample.sum() >= ENOUGH:           # calibrated for what PPO will show it
        choose = choose[is_sample]
    calibrate(model, tokens[choose], targets[choose])
    report = measure(model, rated)
    for kind, found in report.items():
        print(f"{part} model, {found['n']} held-out {kind}: Pearson {found['pearson']:.3f}, AUC "
              f"{found['auc']:.3f}, calibration slope {found['slope']:.2f}")
    if part == "reward":
        show_extremes(model, tokens[rated["rows"]["report"]][:500], loop)
    names = list(model.rows) if isinstance(model, Bag) else None
    config = vars(model.trunk.config) if names is None else None
    return {"model": model.state_dict(),
            "config": config,
            "vocabulary": model.vocabulary,
            "words": model.words,
            "names": names,
            "length": options.length,
            "labels": len(rows),
            "report": report}


def show_extremes(model, tokens, loop):
    """Print the three most negative and the three most positive of held-out passages (N,T)."""
    p = in_chunks(model, tokens).sigmoid()
    order = p.argsort().tolist()
    for i in [*order[:3], *order[-3:]]:
        loop.show(f"P(positive) {p[i]:.2f}", data.decode(model.vocabulary, tokens[i]))


def load_reward(state, device="cpu", dtype=torch.float32):
    """The model of a reward or judge checkpoint, frozen."""
    if state["names"] is None:
        config = GPTConfig(**state["config"])
        model = RewardModel(config, state["vocabulary"], state["words"], dtype)
    else:
        model = Bag(state["vocabulary"], state["words"], state["names"])
    model.load_state_dict(state["model"])
    return model.requires_grad_(False).to(device)


# ---- the command line ---------------------------------------------------------------------

def main():
    parser = data.Parser(description="Score texts with the reward model. "
                                     "(python train.py --until reward trains it.)")
    parser.add_argument("--score", metavar="FILE.jsonl", required=True,
                        help='print each line {"text": ...} of this file with "positive" added')
    parser.add_argument("--out", default="out", type=Path,
                        help="the folder of reward.pt (default out)")
    args = parser.parse_args()
    state = data.load_checkpoint(args.out / "reward.pt", "reward")
    tokenizer = data.make_tokenizer(state["vocabulary"])
    model = load_reward(state)
    too_long = 0
    for row in data.read_jsonl(args.score):
        ids = tokenizer.encode_ordinary(row["text"].strip())
        too_long += len(ids) > state["length"]
        with torch.no_grad():
            p = model(data.pad([ids], state["length"])).sigmoid().item()
        row["positive"] = round(p, 6)
        print(json.dumps(row, ensure_ascii=False))
    if too_long:
        print(f"note: {too_long} texts are longer than {state['length']} tokens; only their "
              "beginning was read", file=sys.stderr)


if __name__ == "__main__":
    data.run(main)
