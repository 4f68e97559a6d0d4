"""The reward model: what it reads, what it ignores, and that its mathematics is what it says."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import reward
import train
from conftest import assert_close, loops, randn
from gpt import GPT, GPTConfig
from reward import RewardModel, Wide, loss_on_prefixes, nonsense, pad, positive, rating_metrics, readings, score, soft_loss

V, T = 16, 14       # tokens of the vocabulary, of a passage
MASKS = {           # which tokens of three passages are real
    "right padding": [[1] * 14, [1] * 9 + [0] * 5, [1] + [0] * 13],
    "left padding": [[1] * 14, [0] * 5 + [1] * 9, [0] * 13 + [1]],
    "both sides": [[0] + [1] * 12 + [0], [0] * 3 + [1] * 6 + [0] * 5, [0] * 6 + [1] * 2 + [0] * 6],
    "holes": [[1, 0] * 7, [0, 1, 1] * 4 + [0, 0], [1] + [0] * 12 + [1]],
}
NAMES = torch.tensor([5000, 5001, 5002])
masks = pytest.mark.parametrize("mask", [torch.tensor(m) for m in MASKS.values()], ids=MASKS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def passages(n, length=T, seed=0):
    """Random tokens (n,length): words of a few tokens, repeated, a fifth of them misread."""
    words = loops(n, length, seeded(seed))
    noise = torch.randint(V, (n, length), generator=seeded(seed + 1))
    return torch.where(torch.rand(n, length, generator=seeded(seed + 2)) < 0.2, noise, words)


def rated(n=40):
    """n passages of 1 to 14 tokens, padded on the right: tokens, mask, ratings."""
    mask = torch.arange(T) < torch.arange(n)[:, None] % T + 1
    return passages(n).masked_fill(~mask, 0), mask, 2 * randn(n, dtype=torch.float32).clamp(-1, 1)


@pytest.fixture(scope="module")
def model(trained):
    """A reward model on a trained trunk, with a head that reads every feature and a fitted bag of words."""
    model = RewardModel(trained.config)
    model.trunk.load_state_dict({k: v for k, v in trained.state_dict().items() if k != "lm_head.weight"})
    model.head.weight.data = randn(*model.head.weight.shape, dtype=torch.float32)
    model.wide.fit(*rated())
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def deep(model):
    """The same without its bag of words."""
    deep = RewardModel(model.trunk.config)
    deep.load_state_dict({**model.state_dict(), "wide.weight": torch.zeros_like(model.wide.weight), "wide.mean": torch.zeros(())})
    return deep.requires_grad_(False)


# ---- what the model reads -----------------------------------------------------------------------

@pytest.mark.parametrize("reader", ["model", "deep", "wide"])
@pytest.mark.parametrize("t", range(T))
def test_every_token_counts_the_last_one_too(reader, t, model, deep):
    """Changing token t changes the log-odds: some public code never shows the last sampled token to its reward model."""
    wide = Wide()                # of random weights: a fitted bag cannot tell apart two pairs it never saw
    wide.weight.normal_(generator=seeded(1))
    wide.idf.uniform_(1, 5, generator=seeded())
    read = {"model": model, "deep": deep, "wide": lambda tokens: wide(tokens)[:, -1]}[reader]
    tokens, ones = passages(8), torch.ones(8, T)
    for k in range(1, V):
        other = tokens.clone()
        other[:, t] = (tokens[:, t] + k) % V
        change = (read(other) - read(tokens)).abs()
        assert (change > 0).all(), f"token {t} can be changed without the log-odds of {reader} noticing"
    if reader != "wide":
        assert_close(read(tokens, ones), read(tokens), "a mask of ones should change nothing")


@masks
@pytest.mark.parametrize("garbage", [0, 5, V - 1])
def test_padding_on_any_side_is_not_read(mask, garbage, model):
    """The log-odds of the unmasked tokens alone, whatever lies under the mask (N Implementation Details of RLHF)."""
    tokens = passages(3)
    alone = torch.cat([model(row[m == 1][None]) for row, m in zip(tokens, mask)])
    for m in (mask, mask.bool(), mask.float()):
        assert_close(model(tokens.masked_fill(mask == 0, garbage), m), alone, "padding changes the log-odds", atol=1e-4, rtol=1e-4)


def test_a_passage_is_read_alike_in_any_company(model):
    """No row influences another, and chunks of 64 are joined in order."""
    tokens, mask, _ = rated(150)
    alone = torch.cat([model(row[m][None]) for row, m in zip(tokens, mask)])
    assert_close(positive(model, tokens, mask), alone.sigmoid(), "a passage is judged otherwise among others", atol=1e-5, rtol=1e-4)
    assert_close(positive(model, tokens), model(tokens).sigmoid(), "without a mask all tokens are read", atol=1e-5, rtol=1e-4)


def test_log_odds_are_those_of_both_readers(model):
    """log-odds = head(mean of hidden states, last hidden state) + bag of words, written out for each passage."""
    for row in passages(5):
        hidden = model.trunk.hidden(row[None])[0]
        deep = torch.cat((hidden.mean(0), hidden[-1])) @ model.head.weight[0] + model.head.bias[0]
        assert_close(model(row[None])[0], deep + model.wide(row[None])[0, -1], "the log-odds are not the sum of two readings",
                     atol=1e-4, rtol=1e-4)


def test_a_new_head_leaves_the_bag_of_words_alone():
    """The head starts at 0: before training, the log-odds are the bag's."""
    model = RewardModel(GPTConfig(vocab_size=V, block_size=T, n_layer=1, n_head=1, n_embd=8)).requires_grad_(False)
    model.wide.fit(*rated())
    assert_close(model(passages(4)), model.wide(passages(4))[:, -1], "an untrained head should add nothing")


def test_features_of_a_prefix_do_not_see_what_follows(model):
    """Causality: changing token t leaves features up to t - 1 as they were, to the bit; those at t change."""
    tokens = passages(8)
    before = model.features(tokens)
    for t in range(T):
        other = tokens.clone()
        other[:, t] = (tokens[:, t] + 1) % V
        after = model.features(other)
        assert torch.equal(after[:, :t], before[:, :t]), f"features before token {t} see it"
        assert (after[:, t] != before[:, t]).any(1).all(), f"features at token {t} do not see it"


def test_features_of_a_prefix_are_those_of_the_prefix_alone(model):
    """The last two are the deep and the wide log-odds: a value function can start from what the model makes of a prefix."""
    tokens = passages(8)
    features = model.features(tokens)
    assert features.shape == (8, T, 2 * model.trunk.config.n_embd + 2)
    for t in range(1, T + 1):
        assert_close(features[:, t - 1], model.features(tokens[:, :t])[:, -1], "a prefix is read otherwise than alone", atol=1e-4, rtol=1e-4)
        assert_close(features[:, t - 1, -2:].sum(1), model(tokens[:, :t]), "the two log-odds do not add up", atol=1e-4, rtol=1e-4)


# ---- the bag of words ---------------------------------------------------------------------------

def ngrams(ids):
    """The tokens and pairs of tokens of a passage, in order; before the first token comes token 0."""
    return [gram for before, token in zip([0, *ids], ids) for gram in ((token,), (before, token))]


class Oracle:
    """The bag of words by dictionaries and dense float64 matrices, no hashing: TF-IDF, then primal ridge regression.

    idf = log((1 + N) / (1 + passages that hold it)) + 1; w = (X'X + ridge I)^-1 X'(ratings - mean).
    """

    def __init__(self, texts, ratings, ridge):
        self.known = {gram: i for i, gram in enumerate(sorted({gram for ids in texts for gram in ngrams(ids)}))}
        frequency = [sum(gram in ngrams(ids) for ids in texts) for gram in self.known]
        self.idf = {gram: math.log((1 + len(texts)) / (1 + n)) + 1 for gram, n in zip(self.known, frequency)}
        self.unseen = math.log(1 + len(texts)) + 1
        X = np.stack([self.features(ids) for ids in texts])
        self.mean = np.mean(ratings)
        self.w = np.linalg.solve(X.T @ X + ridge * np.eye(X.shape[1]), X.T @ (np.array(ratings) - self.mean))

    def features(self, ids):
        """Each n-gram's idf, once, over the norm of all, each as often as it occurs."""
        x, idf = np.zeros(len(self.known)), [self.idf.get(gram, self.unseen) for gram in ngrams(ids)]
        for gram in self.known.keys() & set(ngrams(ids)):
            x[self.known[gram]] = self.idf[gram]
        return x / np.linalg.norm(idf)

    def __call__(self, ids):
        """The rating predicted for each prefix."""
        return torch.tensor([self.mean + self.features(ids[:t]) @ self.w for t in range(1, len(ids) + 1)])


@pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
def test_the_bag_of_words_is_ridge_regression_on_tf_idf(ridge):
    """X'(XX' + ridge I)^-1 y, by hashing and sparse float32, equals (X'X + ridge I)^-1 X'y: all prefixes, old and new passages."""
    tokens, mask, ratings = rated()
    texts = [row[m].tolist() for row, m in zip(tokens, mask)]
    oracle, wide = Oracle(texts, ratings.tolist(), ridge), Wide().fit(tokens, mask, ratings, ridge)
    for ids in [*texts, *passages(10, seed=7).tolist()]:
        assert_close(wide(torch.tensor([ids]))[0].double(), oracle(ids), "the bag of words differs from dense ridge regression",
                     atol=1e-3, rtol=1e-3)


def test_ridge_goes_from_repeating_the_ratings_to_their_mean():
    """ridge -> 0 gives back each rating it was fitted on; ridge -> infinity the mean for any passage."""
    tokens, mask, ratings = rated(20)
    keep = [next(i for i in range(20) if torch.equal(tokens[i], tokens[j]) and torch.equal(mask[i], mask[j])) for j in range(20)]
    tokens, mask, ratings = tokens[sorted(set(keep))], mask[sorted(set(keep))], ratings[sorted(set(keep))]
    last = mask.sum(1) - 1
    read = [Wide().fit(tokens, mask, ratings, ridge)(tokens).gather(1, last[:, None]).squeeze(1) for ridge in (1e-4, 1e8)]
    assert_close(read[0], ratings, "without a penalty the ratings should come back", atol=0.02, rtol=0)
    assert_close(read[1], ratings.mean().expand(len(ratings)), "a huge penalty leaves only the mean", atol=1e-4, rtol=0)


def test_the_bag_does_not_read_padding_when_it_is_fitted():
    """The same passages with other tokens under the mask, or cut to other lengths, give the same bag."""
    tokens, mask, ratings = rated()
    wide, other = Wide().fit(tokens, mask, ratings), Wide().fit(tokens.masked_fill(~mask, 9), mask, ratings)
    longer = Wide().fit(torch.cat((tokens, tokens), 1), torch.cat((mask, torch.zeros_like(mask)), 1), ratings)
    for name, value in wide.state_dict().items():
        assert_close(other.state_dict()[name], value, f"{name} of the bag depends on padding", atol=1e-5, rtol=1e-4)
        assert_close(longer.state_dict()[name], value, f"{name} of the bag depends on the length of padding", atol=1e-5, rtol=1e-4)


def test_the_bag_of_a_prefix_is_that_of_the_cut_passage(model):
    """value(y_1..y_T) at t = value(y_1..y_t), for all t, and another token after t changes nothing, to the bit."""
    tokens = passages(20, seed=5)
    values = model.wide(tokens)
    for t in range(1, T + 1):
        assert_close(values[:, :t], model.wide(tokens[:, :t]), f"the prefix of {t} tokens reads otherwise alone", atol=1e-5, rtol=1e-5)


def test_repetition_takes_away_from_what_was_said_once(model):
    """After a phrase was read twice no n-gram is new: each further time the value comes nearer to the mean, so it never pays.

    Twice, because the pair of its last and its first token is new the second time.
    """
    for length in (1, 2, 3):
        phrases = torch.cartesian_prod(*[torch.arange(V)] * length).view(-1, length)[::1 + 7 * (length == 3)]
        distance = (model.wide(phrases.repeat(1, 6)) - model.wide.mean)[:, 2 * length - 1:].abs()
        assert (distance.diff(dim=1) < 0).all(), f"saying a phrase of {length} tokens again makes the bag surer of it"


def test_a_pleasing_word_pleases_most_when_it_is_said_once():
    """One word of weight 1, all else 0: its value is largest at the first occurrence and falls like 1 / sqrt(n)."""
    wide = Wide()
    wide.weight[3] = 1.0
    values = wide(torch.full((1, 8), 3))[0]
    assert_close(values, 1 / (2 * torch.arange(1, 9.0)).sqrt(), "n times a token and n pairs, all of idf 1: 1 / sqrt(2 n)")


def test_the_bag_marks_first_occurrences():
    """a b a a: tokens first at a, b; pairs first at (0,a), (a,b), (b,a), (a,a)."""
    rows, first = Wide().bag(torch.tensor([[3, 5, 3, 3]]))
    assert_close(first, torch.tensor([[1, 1, 1, 1, 0, 1, 0, 1.0]]), "wrong first occurrences (token, pair, token, pair, ...)")
    assert rows[0, ::2].tolist() == [3, 5, 3, 3], "tokens of a small vocabulary have a row each"
    assert (rows[0, 1::2] >= reward.BUCKETS).all(), "pairs should have a table of their own"


@pytest.mark.parametrize("vocab_size", [16, 512, 50_257])
def test_pairs_are_spread_over_the_table_evenly(vocab_size):
    """m random pairs fill n (1 - exp(-m / n)) of n rows, as random rows would, within 2 percent; the order of a pair matters."""
    n = reward.BUCKETS
    pairs = torch.unique(torch.randint(vocab_size, (n, 2), generator=seeded()), dim=0)
    rows = Wide().bag(pairs)[0][:, 3]
    assert rows.min() >= n and rows.max() < 2 * n, "a pair falls outside its table"
    expected = n * (1 - math.exp(-len(pairs) / n))
    filled = len(rows.unique())
    assert filled > 0.98 * expected, f"{len(pairs)} pairs fill {filled} rows where {expected:.0f} are expected: a poor hash"


# ---- losses and the score -----------------------------------------------------------------------

def test_a_passage_rated_neutral_costs_log_2_and_pulls_nowhere_at_one_half():
    """Soft label 1/2 at p = 1/2: loss log 2, gradient 0 (the exercise's treatment of neutral passages)."""
    log_odds = torch.zeros(3, requires_grad=True)
    loss = soft_loss(log_odds, torch.tensor([0.5]))
    assert_close(loss, torch.full((3,), math.log(2)), "a coin's uncertainty is log 2 nats")
    loss.sum().backward()
    assert (log_odds.grad == 0).all(), "a neutral passage should not move a model that says one half"


@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_loss_is_the_cross_entropy_with_gradient_p_minus_target(target):
    """-t log p - (1 - t) log(1 - p), least at p = t; its gradient in the log-odds is p - t, also at log-odds of 1000."""
    log_odds = torch.tensor([-1000.0, -3.0, 0.0, 2.0, 1000.0]).double().requires_grad_()
    loss = soft_loss(log_odds, torch.tensor([target]).double())
    loss.sum().backward()
    p = log_odds.detach().sigmoid()
    assert_close(log_odds.grad, p - target, "the gradient is not p - target", atol=1e-12, rtol=0)
    assert_close(loss[1:4], -(target * p.log() + (1 - target) * (1 - p).log())[1:4], "not the cross-entropy", atol=1e-12, rtol=1e-9)
    assert loss.isfinite().all(), "large log-odds overflow"


@pytest.mark.parametrize("a, b", [(1.0, 0.0), (2.0, 0.0), (0.1, -5.0), (30.0, 7.0)])
def test_an_affine_change_of_the_raw_reward_leaves_the_score_unchanged(a, b):
    """r = (log p - mean) / std: with raw reward a log p + b and its own constants, the same score (Ziegler 2019)."""
    log_odds = 3 * randn(2000)
    raw = log_odds.sigmoid().log()
    changed = a * raw + b
    assert_close(score(log_odds, raw.mean(), raw.std()), (changed - changed.mean()) / changed.std(), "the score depends on the raw reward's unit",
                 atol=1e-9, rtol=1e-9)


def test_score_and_features_share_a_pass_and_answer_for_no_other_tokens(model, monkeypatch):
    """score_fn = (log P - mean) / std of the whole passage, features_fn = the model's, whatever was read before."""
    passes = []
    monkeypatch.setattr(RewardModel, "pooled", lambda self, tokens, old=RewardModel.pooled: passes.append(1) or old(self, tokens))
    score_fn, features_fn = readings(model, -0.8, 0.3)
    for tokens in (passages(4), passages(4, seed=5), passages(4)):
        read = len(passes)
        scores, features = score_fn(tokens), features_fn(tokens)
        assert len(passes) == read + 1, "the trunk read the same tokens twice"
        assert_close(scores, score(model(tokens), -0.8, 0.3), "the score is not that of the log-odds of the whole passage")
        assert_close(features, model.features(tokens), "the features are not those of these tokens")


def test_the_score_uses_the_constants_it_is_given():
    """(log p - mean) / std in numbers, whatever else is in the batch: beta then means the same in every batch."""
    assert_close(score(torch.tensor([0.0]), -1.0, 0.5), torch.tensor([2 * (1 - math.log(2))]), "p = 1/2: (-log 2 + 1) / 0.5")
    batch = score(torch.tensor([0.0, 5.0, -1e4]), -1.0, 0.5)
    assert_close(batch[0].item(), 2 * (1 - math.log(2)), "the score depends on the rest of the batch")
    assert_close(batch[2].item(), -19998.0, "log p of very negative log-odds is the log-odds themselves")


def prefix_loss(model, tokens, mask, target, **options):
    """loss_on_prefixes without replaced tokens and nonsense."""
    options = {"noise": 0.0, "spoilt": 0, **options}
    return loss_on_prefixes(model, model.wide, tokens, mask, target, torch.tensor([1, 2]), seeded(), **options)


def test_every_prefix_of_8_tokens_and_more_is_a_training_example(model):
    """The mean over real prefixes of soft_loss(log-odds of the prefix, target), one by one; nothing under the mask counts."""
    tokens, mask, ratings = rated()
    target = (ratings + 2) / 4
    each = [soft_loss(model(row[:t][None]), y[None]) for row, m, y in zip(tokens, mask, target) for t in range(8, int(m.sum()) + 1)]
    for padding in (0, 5):
        loss = prefix_loss(model, tokens.masked_fill(~mask, padding), mask, target)
        assert_close(loss, torch.cat(each).mean(), "the loss is not the mean over prefixes", atol=1e-4, rtol=1e-4)


def test_nonsense_has_its_own_target_in_its_last_quarter(model):
    """2 of the whole passages (14 tokens) spoilt in 5 ways: prefixes of 11 to 14 tokens, target 1/4, beside the passages as they are."""
    tokens, mask, target = passages(4), torch.ones(4, T, dtype=torch.bool), torch.full((4,), 0.75)
    mask[0, 9:] = False                  # not a whole passage, so none of the two: nonsense is not mixed with padding
    generator = seeded()
    torch.rand(tokens.shape, generator=generator), torch.randint(V, tokens.shape, generator=generator)      # the noise's draws
    spoilt = torch.cat(list(nonsense(tokens[1:3], V, torch.tensor([1, 2]), generator).values()))
    each = [soft_loss(model(row[:t][None]), torch.tensor([0.75])) for row, m in zip(tokens, mask) for t in range(8, int(m.sum()) + 1)]
    each += [soft_loss(model(row[:t][None]), torch.tensor([0.25])) for row in spoilt for t in range(11, T + 1)]
    assert_close(prefix_loss(model, tokens, mask, target, spoilt=2), torch.cat(each).mean(), "nonsense counts otherwise", atol=1e-4, rtol=1e-4)


def test_by_default_a_tenth_of_the_tokens_is_noise_and_two_whole_passages_are_spoilt(model, monkeypatch):
    """What the trunk is shown: 200 passages, 1 token in 10 of them drawn anew from 16, and 5 kinds of nonsense made of 2."""
    seen = []
    monkeypatch.setattr(RewardModel, "pooled", lambda self, tokens, old=RewardModel.pooled: seen.append(tokens) or old(self, tokens))
    tokens, mask, target = passages(200), torch.ones(200, T, dtype=torch.bool), torch.full((200,), 0.75)
    mask[0, -1] = False                  # all but whole: not to be spoilt
    loss = loss_on_prefixes(model, model.wide, tokens.masked_fill(~mask, 0), mask, target, NAMES % V, seeded())
    assert len(seen[0]) == 210, "2 passages in 5 ways, beside the 200"
    assert (seen[0][206].view(2, 7) == tokens[1, :7]).all(), "the first whole passage is the second: its first half twice"
    share = (seen[0][1:200] != tokens[1:]).float().mean().item()
    assert abs(share - 0.1 * 15 / 16) < 0.03, f"{share:.3f} of the tokens are noise"
    each = soft_loss(model(seen[0][:200][:, :T]), target)
    assert loss.isfinite() and each.isfinite().all(), "the loss should be a number"


def test_a_single_prefix_has_its_own_loss(model):
    """One passage of 8 tokens is one example: its mean is itself; a shorter one is none, and costs 0."""
    tokens, target = passages(1, length=8), torch.tensor([0.75])
    mask = torch.ones(1, 8, dtype=torch.bool)
    assert_close(prefix_loss(model, tokens, mask, target), soft_loss(model(tokens), target)[0], "the mean of one example", atol=1e-5, rtol=1e-5)
    mask[0, -1] = False
    assert prefix_loss(model, tokens, mask, target) == 0, "7 tokens are too few to learn from"


def test_training_teaches_the_head_and_leaves_the_bag_alone():
    """Positive passages are of tokens 0 to 7, negative of 8 to 15: after 40 steps of the shipped optimizer they are told apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RewardModel(GPTConfig(vocab_size=V, block_size=T, n_layer=1, n_head=1, n_embd=16))
    optimizer, bag = reward.make_optimizer(model), {k: v.clone() for k, v in model.wide.state_dict().items()}
    target = torch.tensor([1.0, 0.0]).repeat(16)
    tokens = torch.randint(8, (32, T), generator=seeded()) + 8 * (target[:, None] == 0)
    for _ in range(40):
        optimizer.zero_grad()
        prefix_loss(model, tokens, torch.ones(32, T, dtype=torch.bool), target).backward()
        optimizer.step()
    p = positive(model, tokens)
    assert p[::2].min() > 0.5 > p[1::2].max(), "the head did not learn from its passages"
    assert_close(model.wide.state_dict(), bag, "training should not move the bag of words", atol=0, rtol=0)


# ---- nonsense -----------------------------------------------------------------------------------

def numbered(kind, B=20, T=T):
    """Passages (B,T) in which every token is another number, and nonsense of one kind made of them."""
    tokens = torch.arange(B * T).view(B, T)
    return tokens, nonsense(tokens.clone(), 16, NAMES, seeded())[kind]


def test_shuffled_passages_keep_their_tokens():
    """The same tokens in another order."""
    for row, out in zip(*numbered("shuffled")):
        assert sorted(out.tolist()) == row.tolist() != out.tolist(), "not a shuffled passage"


def test_words_are_drawn_from_all_passages():
    """Tokens of many passages."""
    for out in numbered("drawn at random")[1]:
        assert out.min() >= 0 and out.max() < 20 * T and len({i // T for i in out.tolist()}) > 5, "not drawn from the batch"


def test_few_tokens_are_said_over_and_over():
    """At most 4 tokens of the vocabulary, sometimes one alone, sometimes four."""
    kinds = {len(set(out.tolist())) for out in numbered("few tokens repeated", B=100)[1]}
    assert kinds == {1, 2, 3, 4}, f"{kinds} different tokens in a passage"
    assert numbered("few tokens repeated", B=100)[1].unique().tolist() == list(range(16)), "not from the whole vocabulary"
    patterns = {tuple((out == out[0]).tolist()) for out in numbered("few tokens repeated", B=100)[1]}
    assert len(patterns) > 50, f"only {len(patterns)} different orders in 100 passages"
    counts = [len(row.unique()) for row in nonsense(passages(100), 10_000, NAMES, seeded())["few tokens repeated"]]
    assert counts.count(1) + counts.count(2) > 10 < counts.count(4), "some passages repeat one or two tokens, others four"


@pytest.mark.parametrize("T", [14, 15])
def test_the_first_half_is_said_twice(T):
    """At odd lengths too."""
    for row, out in zip(*numbered("first half twice", T=T)):
        assert out.tolist() == (row.tolist()[:T // 2] * 3)[:T // 2] + row.tolist()[:T - T // 2], "not the first half twice"


def test_names_are_strewn_in():
    """Every token is the passage's or a name, names about 7 of 10 (1,400 tokens: 0.7 within 4 errors of 0.012)."""
    tokens, out = numbered("heap of names", 100)
    assert ((out == tokens) | (out >= 5000)).all(), "a token is neither the passage's nor a name"
    assert set(out[out >= 5000].tolist()) == {5000, 5001, 5002}, "some name is never used"
    share = (out >= 5000).float().mean().item()
    assert abs(share - 0.7) < 0.05, f"names are {share:.2f} of the tokens"
    both = (out[0] >= 5000) & (out[1:] >= 5000)
    assert (out[1:] != out[0])[both].any(), "all passages hold the same names"


def test_nonsense_depends_on_its_generator_alone():
    """The same seed, the same nonsense; torch's global generator is not touched; the passages stay as they are."""
    tokens, state = torch.arange(280).view(20, 14), torch.get_rng_state()
    one, two = (nonsense(tokens, 16, NAMES, seeded()) for _ in range(2))
    assert_close(one, two, "the same seed gave other nonsense", atol=0, rtol=0)
    assert torch.equal(state, torch.get_rng_state()), "nonsense draws from another generator too"
    assert torch.equal(tokens, torch.arange(280).view(20, 14)), "the passages were changed"
    for B, length in ((0, 8), (1, 4), (3, 5), (7, 64)):
        assert all(x.shape == (B, length) for x in nonsense(torch.zeros(B, length, dtype=torch.long), 9, torch.tensor([5]), seeded()).values())


def test_what_fools_a_model_is_measured_by_its_own_mean_probability(model):
    """Mean P of the passages, of each kind of nonsense, and of the bag's favourite words repeated."""
    tokens = passages(30)
    found = reward.fooled(model, tokens, torch.tensor([1, 2]), seeded())
    assert_close(found["as written"], model(tokens).sigmoid().mean().item(), "not the mean over the passages", atol=1e-5, rtol=0)
    for kind, x in nonsense(tokens, V, torch.tensor([1, 2]), seeded()).items():
        assert_close(found[kind], model(x).sigmoid().mean().item(), f"not the mean over passages: {kind}", atol=1e-5, rtol=0)
    words = torch.arange(V)[:, None].expand(V, T)       # fewer than twenty tokens: all are favourites
    assert_close(found["a favourite word repeated"], model(words).sigmoid().mean().item(), "not the mean over words repeated", atol=1e-5, rtol=0)


def test_favourites_are_the_twenty_tokens_that_the_bag_likes_best():
    """Of a vocabulary of 40; beside them stand the passages in which one of them occurs."""
    model = RewardModel(GPTConfig(vocab_size=40, block_size=T, n_layer=1, n_head=1, n_embd=8)).requires_grad_(False)
    model.wide.weight[:40] = torch.arange(40.0)
    tokens = torch.cat((torch.randint(20, (5, T), generator=seeded()), torch.randint(20, 40, (7, T), generator=seeded())))
    found = reward.fooled(model, tokens, torch.tensor([1, 2]), seeded())
    assert_close(found["with a favourite word"], positive(model, tokens[5:]).mean().item(), "7 passages hold a favourite", atol=1e-6, rtol=0)
    words = torch.arange(20, 40)[:, None].expand(20, T)
    assert_close(found["a favourite word repeated"], positive(model, words).mean().item(), "not the twenty best", atol=1e-6, rtol=0)


def test_the_trunk_computes_in_the_precision_asked_for():
    """bf16 reaches the trunk, and float32 is the default."""
    config = GPTConfig(vocab_size=V, block_size=T, n_layer=1, n_head=1, n_embd=8)
    assert RewardModel(config, bf16=True).trunk.bf16 and not RewardModel(config).trunk.bf16, "the trunk's precision is not the one asked for"


# ---- padding ------------------------------------------------------------------------------------

def test_passages_are_padded_on_the_right_and_cut():
    """Shorter ones get zeros and mask 0, longer ones keep their beginning."""
    tokens, mask = pad([[7, 8], [1, 2, 3, 4, 5], [], [9, 9, 9]], 3)
    assert tokens.tolist() == [[7, 8, 0], [1, 2, 3], [0, 0, 0], [9, 9, 9]], "wrong padding"
    assert mask.tolist() == [[True, True, False], [True] * 3, [False] * 3, [True] * 3], "wrong mask"


# ---- measures -----------------------------------------------------------------------------------

P = torch.tensor([0.9, 0.3, 0.3, 0.55, 0.05, 1.0, 0.0, 0.71, 0.3])
RATINGS = torch.tensor([2.0, 1.0, -1.0, 0.0, -2.0, 0.5, -0.5, 0.0, 2.0])


def test_pearson_is_the_correlation_with_the_rating():
    """cov / (sigma sigma), against numpy; the unit of the rating does not matter."""
    expected = np.corrcoef(P.numpy(), RATINGS.numpy())[0, 1]
    assert_close(rating_metrics(P, RATINGS, 0.5)["pearson"], expected.item(), "not Pearson's correlation", atol=1e-6, rtol=0)
    assert_close(rating_metrics((RATINGS + 2) / 4, RATINGS, 0.5)["pearson"], 1.0, "a perfect prediction correlates 1", atol=1e-6, rtol=0)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    """Over pairs (rated above 0, below 0): 1 if p is larger, 1/2 for a tie; neutral passages are in no pair."""
    pairs = [(p, q) for p, r in zip(P, RATINGS) if r > 0 for q, s in zip(P, RATINGS) if s < 0]
    expected = sum(1.0 if p > q else 0.5 if p == q else 0.0 for p, q in pairs) / len(pairs)
    assert_close(rating_metrics(P, RATINGS, 0.5)["auc"], expected, "not the area under the ROC curve")
    for p, auc in ((RATINGS / 4 + 0.5, 1.0), (0.5 - RATINGS / 4, 0.0), (torch.full((9,), 0.4), 0.5)):
        assert_close(rating_metrics(p, RATINGS, 0.5)["auc"], auc, "right order 1, wrong order 0, no order 1/2")


def test_a_slight_leaning_counts_in_the_auc_as_a_strong_one_does():
    """Above 0 is above 0: ratings 0.5 and 1 against -0.5, both pairs in the right order."""
    found = rating_metrics(torch.tensor([0.7, 0.6, 0.4]), torch.tensor([0.5, 1.0, -0.5]), 0.5)
    assert found["auc"] == 1, f"auc {found['auc']}, where both pairs are in order"


def test_log_losses_are_those_of_soft_targets_and_of_signs():
    """Mean of -t log p - (1 - t) log(1 - p), t = (rating + 2) / 4; for signs t = 1 or 0, neutral passages left out."""
    p, ratings = P.clamp(0.01, 0.99).double(), RATINGS.tolist()

    def cross_entropy(predicted, targets):
        return sum(-t * math.log(q) - (1 - t) * math.log(1 - q) for q, t in zip(predicted, targets)) / len(targets)

    soft = [(r + 2) / 4 for r in ratings]
    signs = [(q, float(r > 0)) for q, r in zip(p.tolist(), ratings) if r != 0]
    found = rating_metrics(p, RATINGS, 0.4)
    for name, expected in {"log_loss": cross_entropy(p.tolist(), soft), "constant_log_loss": cross_entropy([0.4] * 9, soft),
                           "sign_log_loss": cross_entropy(*zip(*signs)),
                           "constant_sign_log_loss": cross_entropy([4 / 7] * 7, [t for _, t in signs])}.items():
        assert_close(found[name], expected, f"{name} differs from its definition", atol=1e-6, rtol=1e-6)
    assert math.isfinite(rating_metrics(P, RATINGS, 0.4)["sign_log_loss"]), "a sure mistake (p = 0 or 1) should stay finite"


@pytest.mark.parametrize("p, ratings, expected", [
    ([0.5, 0.5], [2, -2], 0.0),                     # right on average
    ([0.75, 0.25, 0.0, 1.0], [1, -1, -2, 2], 0.0),  # right everywhere, bins 0 and 9 included
    ([0.9, 0.9], [-2, -2], 0.9),                    # sure and wrong
    ([0.11, 0.19, 0.85, 0.85], [-1, -1, 2, 0], 0.5 * 0.1 + 0.5 * 0.1),      # bin 1: .15 for .25; bin 8: .85 for .75
    ([0.05, 0.95], [2, -2], 0.95),                  # errors of two bins do not cancel
])
def test_ece_is_the_mean_gap_between_saying_and_being_right(p, ratings, expected):
    """sum over ten bins of (n_b / N) |mean p - mean target| (Naeini 2015), by hand."""
    found = rating_metrics(torch.tensor(p), torch.tensor(ratings).float(), 0.5)["ece"]
    assert_close(found, expected, "wrong expected calibration error", atol=1e-6, rtol=0)


def test_ece_has_ten_bins_and_both_ends_belong_to_one():
    """Sum over bins of |sum of (p - target)| / N (Guo 2017), bin by bin; p = 0 is in the first, p = 1 in the last."""
    p = torch.linspace(0, 1, 81).double()
    ratings = torch.where((p * 10).long() % 2 == 0, 1.5, -1.5)          # neighbouring bins err in opposite directions
    gaps = [0.0] * 10
    for x, r in zip(p.tolist(), ratings.tolist()):
        gaps[min(int(x * 10), 9)] += x - (r + 2) / 4
    assert_close(rating_metrics(p, ratings, 0.5)["ece"], sum(map(abs, gaps)) / 81, "not the gaps of ten bins")


@pytest.mark.parametrize("ratings", [[1.0, 2.0], [-1.0, -1.0], [0.0, 0.0], [1.0]])
def test_measures_are_defined_without_pairs_to_compare(ratings):
    """All positive, all negative, all neutral, one passage: auc 1/2, everything else a number."""
    ratings = torch.tensor(ratings)
    found = rating_metrics(torch.linspace(0.2, 0.7, len(ratings)), ratings, 0.5)
    assert found.pop("auc") == 0.5, "without a pair the auc is that of guessing"
    if len(set(ratings.tolist())) == 1 and len(ratings) > 1:
        del found["pearson"]        # a constant correlates with nothing: 0 / 0
    assert all(math.isfinite(x) for x in found.values()), f"not a number in {found}"
    assert len(ratings) > 1 or found["pearson"] == 0, "a single passage correlates with nothing"
    assert ratings.any() or found["sign_log_loss"] == found["constant_sign_log_loss"] == 0, "nothing but neutral passages costs nothing"


# ---- scoring a file -----------------------------------------------------------------------------

TEXT = "SIR TOBY.\nA plague o' these pickle herring! How now, sot!\n\nCLOWN.\nGood Sir Toby!\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer and a reward model of a few hundred tokens, as train.py writes them."""
    out = tmp_path_factory.mktemp("out")
    data.save_tokenizer(out / "tokenizer.tiktoken", data.train_bpe(3 * TEXT, 280))
    tokenizer = data.load_tokenizer(out / "tokenizer.tiktoken")
    config = {"vocab_size": 280, "block_size": 24, "n_layer": 1, "n_head": 1, "n_embd": 8}
    model = RewardModel(GPTConfig(**config))
    model.head.weight.data = randn(1, 16, dtype=torch.float32)
    model.wide.weight.normal_(generator=seeded(1))
    data.save_checkpoint(out / "reward.pt", {"kind": "reward", "config": config, "model": model.state_dict(), "length": 16,
                                             "tokenizer": data.digest(b" ".join(tokenizer.decode_tokens_bytes(range(280)))), "mean": -0.7, "std": 0.5})
    return out


def score_lines(folder, path, monkeypatch, capsys):
    """What `python reward.py --score path --out folder` prints: (standard output, standard error)."""
    monkeypatch.setattr("sys.argv", ["reward.py", "--score", str(path), "--out", str(folder)])
    reward.main()
    return capsys.readouterr()


def test_scoring_a_file_adds_positive_to_each_line_and_prints_nothing_else(folder, tmp_path, monkeypatch, capsys):
    """Other keys stay, in their order, as they were; 100 lines cross the batches of 64."""
    rows = [{"id": i, "text": TEXT[i % 9:i % 23 + 5], "note": ["\N{EM DASH}", None, {"x": 1.5}], "positive": "old"} for i in range(100)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    out, err = score_lines(folder, path, monkeypatch, capsys)
    printed = [json.loads(line) for line in out.splitlines()]
    assert [list(row) for row in printed] == [list(row) for row in rows], "keys were lost, added or put in another order"
    assert [{**row, "positive": "old"} for row in printed] == rows, "other keys should stay as they are"
    model = reward.load_reward(data.load_checkpoint(folder / "reward.pt"))
    tokenizer = data.load_tokenizer(folder / "tokenizer.tiktoken")
    for row in printed:
        ids = tokenizer.encode_ordinary(row["text"].strip())[:16] or [0]
        assert_close(row["positive"], model(torch.tensor([ids])).sigmoid().item(), "not P(positive) of this text", atol=2e-6, rtol=0)
    assert "\N{EM DASH}" in out, "letters should be printed as they are"


def test_texts_too_long_are_said_so_on_standard_error(folder, tmp_path, monkeypatch, capsys):
    """Only the first 16 tokens are read here; an empty text is scored too; spaces around a text are not read."""
    path = tmp_path / "texts.jsonl"
    texts = ["Good", "  Good \n", "", 10 * TEXT, TEXT + TEXT]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out, err = score_lines(folder, path, monkeypatch, capsys)
    p = [json.loads(line)["positive"] for line in out.splitlines()]
    assert len(p) == 5 and all(0 < x < 1 for x in p), "every line should get a probability"
    assert p[0] == p[1] and p[3] == p[4], "spaces around, or tokens past the length, change the reading"
    assert err == "note: 2 texts are longer than 16 tokens; only their beginning was read\n", "it should say what was cut"


def test_a_file_of_nothing_prints_nothing(folder, tmp_path, monkeypatch, capsys):
    """No lines in, no lines out."""
    (tmp_path / "empty.jsonl").write_text("\n")
    assert score_lines(folder, tmp_path / "empty.jsonl", monkeypatch, capsys) == ("", ""), "nothing should be printed"


def test_a_bad_line_far_into_the_file_is_named(folder, tmp_path, monkeypatch, capsys):
    """70 good lines, then a bad one: the error names line 71."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "Good"}\n' * 70 + "bad\n")
    with pytest.raises(data.UserError, match="line 71 is not a JSON object"):
        score_lines(folder, path, monkeypatch, capsys)


def test_a_reward_model_of_another_tokenizer_is_refused(folder, tmp_path, monkeypatch, capsys):
    """Its ids would mean other words."""
    (tmp_path / "reward.pt").write_bytes((folder / "reward.pt").read_bytes())
    data.save_tokenizer(tmp_path / "tokenizer.tiktoken", data.train_bpe(3 * TEXT, 279))
    with pytest.raises(data.UserError, match="another tokenizer"):
        score_lines(tmp_path, tmp_path / "none.jsonl", monkeypatch, capsys)


def test_a_loaded_reward_model_is_frozen_and_reads_alike(folder):
    """Its checkpoint rebuilds it alone; no parameter asks for a gradient."""
    state = data.load_checkpoint(folder / "reward.pt")
    models = [reward.load_reward(state) for _ in range(2)]
    tokens = torch.randint(280, (4, 16), generator=seeded())
    assert_close(models[0](tokens), models[1](tokens), "two loads differ", atol=0, rtol=0)
    assert not any(p.requires_grad for p in models[0].parameters()), "a reward model should not be trained by PPO"


def test_passages_measured_on_are_never_trained_on(monkeypatch, tmp_path):
    """Every passage is on one side of the split, through the whole stage (ckkissane shuffled twice: on both).

    Both readers are watched, the bags of words as they are fitted and the deep reader as it learns.
    """
    seen = {"trained on": set(), "measured on": set()}

    def spy(owner, name, side, at):
        function = getattr(owner, name)

        def watched(*inputs):
            seen[side].update(map(tuple, inputs[at].tolist()))
            return function(*inputs)
        monkeypatch.setattr(owner, name, watched)

    spy(reward.Wide, "fit", "trained on", 1)
    spy(reward, "loss_on_prefixes", "trained on", 2)
    spy(reward, "positive", "measured on", 1)
    (tmp_path / "labels.csv").write_text("text,rating\n" + "".join(f"passage number {i} of all,{i % 5 - 2}\n" for i in range(200)))
    args = train.parse(["--size", "tiny", "--device", "cpu", "--length", "24", "--reward-steps", "12",
                        "--labels", str(tmp_path / "labels.csv"), "--out", str(tmp_path)])
    args.rho_samples = 8
    config = {"vocab_size": 256, "block_size": 32, "n_layer": 1, "n_head": 1, "n_embd": 8}
    rated = train.rated_passages(args, SimpleNamespace(encode_ordinary=lambda text: list(text.encode())))
    pretrained = {"config": config, "model": GPT(GPTConfig(**config)).state_dict(), "tokenizer": ""}
    texts, prompt, trained = {"names": torch.tensor([7])}, torch.zeros(1, 1, dtype=torch.long), {}
    for part in ("reward", "gold"):
        train.reward_stage(args, texts, prompt, pretrained, rated, part)
        trained[part], seen["trained on"] = seen["trained on"], set()
    assert not trained["reward"] & trained["gold"], "the judge was trained on passages of the model that it judges"
    assert len(trained["reward"] | trained["gold"] | seen["measured on"]) >= 200, "some passage is on no side"
    assert not (trained["reward"] | trained["gold"]) & seen["measured on"], "passages were trained on and measured on"
