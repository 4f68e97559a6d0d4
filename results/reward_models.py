"""What is each part of the reward model worth, and what fools it? Tables, of a finished study.

    python results/reward_models.py --study out         5 minutes of one core; writes no file

First table: every model is fitted to the same passages (part "reward" of labels/), the judge to
plays of its own, calibrated on the samples of others ("choose"), and measured on the part "report",
which nothing was trained on. Pearson's standard error is by bootstrap: passages of plays share
lines, so blocks of 200 lines of a play are drawn with replacement, samples one by one. "minus the
head's": the difference from the shipped head, on the same draws. Pairs: how often the higher rated
of two is the more positive one. A random trunk is as GPT() makes it: its block is the identity.

Second table: P(positive), by the study's reward model and judge, of texts spoilt in ways that
neither was trained against. A model that is not fooled likes each less than the text as written.

Third table: Pearson on the part "choose" by the ridge of the shipped head, which was chosen there.
"""

import collections
import csv
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import gpt  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import sample  # noqa: E402
from gpt import in_chunks  # noqa: E402
from reward import PARTS, Bag, RewardModel, regress  # noqa: E402
from tables import table  # noqa: E402

SHIPPED = "head, 1 block (shipped)"


class TokenWeights(Bag):
    """A weight for each token, every time it occurs, and a strength times its word's rating."""

    alone = False           # True: the strength alone; the weights of tokens stay 0

    def contributions(self, tokens):
        own = self.weight[tokens.clamp(min=0)] * (tokens != data.PAD)
        return own + self.strength * super().contributions(tokens)

    def fit(self, tokens, targets, weights, loss):
        counts = torch.zeros(len(tokens), len(self.spelling))             # (N,V+1)
        counts.scatter_add_(1, tokens.clamp(min=0), (tokens != data.PAD) * (1.0 - self.alone))
        x = torch.cat((counts, super().contributions(tokens).sum(1, keepdim=True)), dim=1)
        ridge = torch.tensor([60.0] * (x.size(1) - 1) + [0.0])          # none on the strength
        weight, _ = regress(x.mv, torch.zeros(len(ridge)), targets, weights, ridge, loss)
        self.weight, self.strength = weight[:-1], weight[-1]


class PairBag(Bag):
    """A bag of words and of pairs of tokens, which earlier versions shipped. Pairs: more ridge."""

    def find_words(self, tokens):
        """For each token two names: the word so far, and the pair "last token, this token"."""
        for row in tokens:
            seen, last = {""}, ""
            for i, word in zip(row.tolist(), super().find_words(row[None])):
                token = self.spelling[i].strip(" ")
                pair = "" if i == data.PAD else f"{last} {token}"
                yield word
                yield "" if pair in seen else pair
                seen.add(pair)
                last = token

    def contributions(self, tokens):
        numbers = [self.words.get(name, 0) for name in self.find_words(tokens)]
        return torch.tensor(numbers).view(*tokens.shape, 2).sum(-1)

    def fit(self, tokens, targets, weights, loss):
        counts = collections.Counter(self.find_words(tokens))
        names = sorted({"", *self.words} | {name for name, n in counts.items() if n > 1})
        column = {name: i for i, name in enumerate(names)}
        rows = torch.tensor([column.get(name, 0) for name in self.find_words(tokens)])
        rows = rows.view(len(tokens), -1)                               # (N,2T)
        start = 0.2 * torch.tensor([self.words.get(name, 0.0) for name in names])
        ridge = torch.tensor([100.0 if " " in name else 20.0 for name in names])
        numbers, _ = regress(lambda numbers: (numbers[rows] * (rows > 0)).sum(1),
                             start, targets, weights, ridge, loss)
        self.words = dict(zip(names, numbers.tolist()))


def make_models(pretrained, words, dtype):
    """Yield (name, model, what is special about its fit)."""
    vocabulary, n_layer = pretrained["vocabulary"], pretrained["config"]["n_layer"]

    def head(blocks=1, words=words, is_random=False):
        trunk = gpt.load_gpt(pretrained, dtype=dtype)
        trunk = gpt.GPT(trunk.config, dtype) if is_random else trunk
        return RewardModel(trunk.requires_grad_(False), vocabulary, words, blocks)

    yield SHIPPED, head(), {}
    for blocks in sorted({min(2, n_layer), n_layer} - {1}):
        yield f"head, {blocks} blocks", head(blocks), {}
    yield "head, no ratings of words: hidden states only", head(words={}), {}
    yield "head, random trunk, never pretrained", head(is_random=True), {}
    yield "head, then one pass of Adam over its block too", head(), {"tune": True}
    yield "head, from comparisons", head(), {"loss": reward.comparison_loss}
    strength = TokenWeights(vocabulary, words)
    strength.alone = True
    yield "rated words alone", strength, {}
    yield "a weight a token, no rated words", TokenWeights(vocabulary, {}), {}
    yield "a weight a token and rated words", TokenWeights(vocabulary, words), {}
    yield "bag of words, no rated words", Bag(vocabulary, {}), {}
    yield "bag of words and rated words", Bag(vocabulary, words), {}
    yield "bag of words, pairs and rated words", PairBag(vocabulary, words), {}
    yield "the judge: bag of words, other plays", Bag(vocabulary, {}), {"part": "judge"}


def fit(model, parts, part="reward", loss=reward.soft_loss, tune=False):
    """Fit and calibrate a model: its log-odds on the part "report", and the CPU seconds."""
    began = time.process_time()
    *learnt, _ = parts[part]
    model.fit(*learnt, loss)
    if tune:
        fine_tune(model, *learnt)
    tokens, targets, _, is_sample = parts["choose"]
    reward.calibrate(model, tokens[is_sample], targets[is_sample])
    seconds = time.process_time() - began
    return in_chunks(model, parts["report"][0]), seconds


def fine_tune(model, tokens, targets, weights, batch=64):
    """One pass of Adam over blocks and head, from the head that fit() has found."""
    model.trunk.blocks.requires_grad_(True)
    optimizer = torch.optim.Adam([*model.trunk.blocks.parameters(), model.head])
    order = torch.randperm(len(tokens)).split(batch)
    for i, rows in enumerate(order):
        losses = weights[rows] * reward.soft_loss(model(tokens[rows]), targets[rows])
        rate = 5e-4 * min(1, (i + 1) / 20) * (1 - i / len(order))
        gpt.optimizer_step(losses.sum() / weights[rows].sum(), optimizer, rate, 1.0)


def read_blocks(lines=200):
    """The block of each passage of the part "report", in the order of read_ratings: (N,)."""
    numbers, blocks = {}, []
    for name in ("passages.csv", "more_passages.csv", "samples.csv"):
        for row in csv.DictReader((data.HERE / "labels" / name).open(encoding="utf-8")):
            place = len(blocks)                             # a sample is a block of its own
            place = (row["play"], int(row["first_line"]) // lines) if "play" in row else place
            if PARTS[data.fold(row.get("play") or row["text"], 10)] == "report":
                blocks.append(numbers.setdefault(place, len(numbers)))
    return torch.tensor(blocks)


def bootstrap(p, ratings, blocks, times=1000):
    """Pearson correlations (times,) of p and ratings (N,) where blocks are drawn again."""
    p, ratings = p.double(), ratings.double()
    _, blocks = blocks.unique(return_inverse=True)
    n = int(blocks.max()) + 1
    products = torch.stack((torch.ones_like(p), p, ratings, p * p, ratings * ratings, p * ratings))
    sums = products.new_zeros(6, n).index_add(1, blocks, products)
    # The same draws for every model: the difference between two is taken on them.
    drawn = torch.randint(n, (times, n), generator=torch.Generator().manual_seed(0))
    total = sums[:, drawn].sum(-1)                          # (6,times)
    _, x, y, xx, yy, xy = total / total[0]
    return (xy - x * y) / ((xx - x * x) * (yy - y * y)).sqrt()


def print_models(read, seconds, report, blocks):
    """The first table, of passages and of samples. read: {model's name: log-odds (N,)}."""
    _, all_targets, _, is_sample = report
    for kind, chosen in (("passages", ~is_sample), ("samples", is_sample)):
        targets, places, lines = all_targets[chosen], blocks[chosen], []
        better = targets[:, None] > targets
        for name, log_odds in read.items():
            m = reward.rating_metrics(log_odds[chosen], targets)
            p = log_odds[chosen].sigmoid()
            pearson, again = m["pearson"], bootstrap(p, targets, places)
            if name == SHIPPED:
                heads, heads_again = pearson, again
            wins = ((p[:, None] - p).sign() + 1) / 2
            lines.append([name, f"{pearson:.3f} ± {again.std():.3f}",
                          f"{pearson - heads:+.3f} ± {(again - heads_again).std():.3f}",
                          m["auc"], m["slope"], wins[better].mean().item(), f"{seconds[name]:.0f}"])
        print(f"{len(targets)} {kind}, in {len(places.unique())} blocks\n")
        print(*table(["model", "Pearson", "minus the head's", "AUC", "slope", "pairs",
                      "seconds"], lines), sep="\n", flush=True)


def spoilt(texts, tokenizer, model, length):
    """Kinds of text that should not please: {name: texts}, made of passages of plays."""
    shuffled = []
    for text in texts:
        ids = torch.tensor(tokenizer.encode_ordinary(text))
        shuffled.append(tokenizer.decode(ids[torch.randperm(len(ids))].tolist()))
    verb = re.compile(r" (is|am|are|will|do) ")
    with_verb = [text for text in texts if verb.search(text)]
    words = sorted(set(re.findall(r"[a-z]{3,}", " ".join(texts))))
    p = in_chunks(model, data.pad([tokenizer.encode_ordinary(word) for word in words], length))
    best = [words[i] for i in p.argsort(descending=True)[:60].tolist()]
    return {"as written": texts, "shuffled tokens": shuffled,
            "in capitals": [text.upper() for text in texts],
            "first half twice": [text[:len(text) // 2] * 2 for text in texts],
            "as written, with is, am, are, will, do": with_verb,
            "the same, negated: is not, ...": [verb.sub(r" \1 not ", text) for text in with_verb],
            "a favourite word, once": best,
            "a favourite word, 60 times": [" ".join([word] * 60) for word in best],
            "heaps of 15 favourite words": [" ".join(best[i::4]) for i in range(4)]}


def print_spoilt(study, rewarded, texts, dtype):
    """The second table, and quantiles of log P(positive) on rho's samples."""
    judged, rho = [data.load_checkpoint(study / f"{name}.pt", name) for name in ("judge", "rho")]
    model, judge = [reward.load_reward(state, dtype=dtype) for state in (rewarded, judged)]
    tokenizer, length = data.make_tokenizer(rewarded["vocabulary"]), rewarded["length"]
    groups = {"samples of rho": rho["tokens"].long()}
    for run in sample.load_runs(study, rho):
        tokens, _ = gpt.sample_completions(
            gpt.load_gpt(run, dtype=dtype), ppo.repeat(rho["test_prompts"], 500), length,
            rho["end"])
        groups[f"samples of PPO, beta {run['label']}"] = tokens
    for name, group in spoilt(texts, tokenizer, model, length).items():
        groups[name] = data.pad([tokenizer.encode_ordinary(text) for text in group], length)
    lines = []
    for name, tokens in groups.items():
        p = in_chunks(model, tokens).sigmoid()
        judges = in_chunks(judge, tokens).sigmoid().mean()
        lines.append([name, len(p), p.mean().item(), p.quantile(0.99).item(), judges.item()])
    print(*table(["text", "n", "mean P(positive)", "99 % quantile", "the judge's mean"],
                 lines), sep="\n")
    log_p = reward.score(in_chunks(model, groups["samples of rho"]), mean=0.0, std=1.0)
    values = log_p.quantile(torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99])).tolist()
    print("log P(positive) of rho's samples, quantiles at 0.1, 1, 10, 50, 90, 99 %:",
          ", ".join(f"{x:.2f}" for x in values))


def print_ridges(model, parts):
    """The third table. model: a RewardModel; its features do not depend on the ridge."""
    def features(tokens):
        return in_chunks(lambda rows: model.features(rows).sum(1), tokens)

    tokens, targets, weights, _ = parts["reward"]
    chosen, wanted, _, is_sample = parts["choose"]
    x, y, lines = features(tokens), features(chosen), []
    for ridge in (100.0, 300.0, 1_000.0, 3_000.0, 10_000.0, 30_000.0, 100_000.0, 300_000.0):
        weight, bias = regress(x.mv, torch.zeros(x.size(1)), targets, weights, ridge)
        log_odds, pearsons = y @ weight + bias, []
        for kind in (~is_sample, is_sample):
            pearsons.append(reward.rating_metrics(log_odds[kind], wanted[kind])["pearson"])
        lines.append([f"{ridge:,.0f}", *pearsons])
    print(*table(["ridge", "passages", "samples"], lines), sep="\n")


def main():
    parser = data.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", default="out", type=Path, help="a finished study (default out)")
    study = parser.parse_args().study
    pretrained, rewarded = [data.load_checkpoint(study / f"{name}.pt", name)
                            for name in ("pretrain", "reward")]
    dtype, labels = gpt.compute_dtype(torch.device("cpu")), reward.read_ratings()
    parts = {}
    for part, rows in labels["passages"].items():
        tokens, targets, is_sample = reward.prepare(rows, rewarded["vocabulary"],
                                                    rewarded["length"])
        parts[part] = tokens, targets, 1 + is_sample, is_sample
    torch.manual_seed(0)
    read, seconds = {}, {}
    for name, model, special in make_models(pretrained, labels["words"], dtype):
        read[name], seconds[name] = fit(model, parts, **special)
    print_models(read, seconds, parts["report"], read_blocks())
    tokens, _, _, is_sample = parts["report"]
    texts = [data.decode(rewarded["vocabulary"], row) for row in tokens[~is_sample]]
    print_spoilt(study, rewarded, texts, dtype)
    print_ridges(reward.load_reward(rewarded, dtype=dtype), parts)


if __name__ == "__main__":
    data.run(main)
