"""The reward model: what it reads, what it ignores, and that its mathematics is what it says."""

import collections
import copy
import json
import math

import numpy as np
import pytest
import torch

import data
import reward
from conftest import assert_close, loops, randn
from gpt import PAD, GPTConfig, in_chunks
from reward import (SHORTEST, Bag, RewardModel, calibrate, classifier_loss, make_optimizer, pad,
                    rating_metrics, reliability, score, soft_loss)

V, T = 16, 14       # tokens of the vocabulary, of a passage
# Whole words, word pieces, a capital, a line's end.
VOCABULARY = [s.encode() for s in
              " my| Love|love|ly|\n|,| kind|ness|es| lord|Lord| O|'d| a|b| death".split("|")]
MASKS = {           # which tokens of three passages are real
    "right padding": ["1" * 14, "1" * 9 + "0" * 5, "1" + "0" * 13],
    "left padding": ["1" * 14, "0" * 5 + "1" * 9, "0" * 13 + "1"],
    "both sides": ["0" + "1" * 12 + "0", "0001" + "1" * 5 + "0" * 5, "0" * 6 + "11" + "0" * 6],
    "holes": ["10" * 7, "011" * 4 + "00", "1" + "0" * 12 + "1"],
}
MASKS = {name: torch.tensor([[int(c) for c in row] for row in rows])
         for name, rows in MASKS.items()}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
CONFIG = GPTConfig(vocab_size=V, block_size=24, n_layer=1, n_head=2, n_embd=16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def passages(n, length=T, seed=0):
    """Random tokens (n,length): words of a few tokens, repeated, a fifth of them misread."""
    words = loops(n, length, seeded(seed))
    noise = torch.randint(V, (n, length), generator=seeded(seed + 1))
    return torch.where(torch.rand(n, length, generator=seeded(seed + 2)) < 0.2, noise, words)


def rated(n=40, seed=0):
    """n passages of 1 to 14 tokens, padded on the right, with soft targets and weights."""
    gone = torch.arange(T) > (torch.arange(n) % T)[:, None]
    targets = randn(n, seed=seed, dtype=torch.float32).sigmoid()
    return (passages(n, seed=seed).masked_fill(gone, PAD), targets,
            0.5 + torch.rand(n, generator=seeded(seed)))


def real(tokens):
    """The tokens of each passage, as lists without padding: oracles see nothing else."""
    return [[i for i in row if i != PAD] for row in tokens.tolist()]


def said(bag, *passages):
    """The set of names of all that occurs in passages, lists of token ids."""
    return {name for ids in passages for name in bag.names(ids)} - {""}


def trunk_of(gpt, dtype=torch.float32):
    """A trunk reader of a pretrained GPT, with a head of random weights, frozen."""
    model = RewardModel(gpt.config, "trunk", dtype)
    model.trunk.load_state_dict({k: x for k, x in gpt.state_dict().items()
                                 if k != "lm_head.weight"})
    model.head.weight.data = randn(*model.head.weight.shape, dtype=torch.float32)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=["bag", "trunk"])
def model(request, trained):
    """A reward model of each reader: random weights for all that it reads, scale 0.7, frozen."""
    if request.param == "bag":
        found = sorted(said(Bag(VOCABULARY), *passages(200).tolist()))
        model = RewardModel(trained.config, "bag", vocabulary=VOCABULARY, names=found[::2])
        model.bag.weight[1:].normal_(generator=seeded(1))
        model.bag.bias.fill_(0.3)
    else:
        model = trunk_of(trained)
        model.head.bias.data.fill_(0.3)
    model.scale.fill_(0.7)
    return model.requires_grad_(False)


@pytest.fixture
def trunk():
    """A small new trunk reader with random output projections and head, its parameters free."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RewardModel(CONFIG, "trunk")
    for seed, (name, weight) in enumerate(model.named_parameters()):
        if not weight.any():
            weight.data = 0.2 * randn(*weight.shape, seed=seed, dtype=torch.float32)
    return model


# ---- the bag of words ---------------------------------------------------------------------

@pytest.mark.parametrize("tokens, names", [
    ("My| gra|cious| lord", "my/ my|gra/my gra|graciou/gra cious|lord/cious lord"),
    (" LOVE| Love|\n|love", "love/ love|/love love|\n/love \n|/\n love"),         # line start
    ("lo|\n|ve", "lo/ lo|\n/lo \n|ve/\n ve"),                  # no word crosses a line's end
    ("un| kind|NESS|es", "un/ un|kind/un kind|kindnes/kind ness|/ness es"),         # 7 letters
    ("un|kind|ness", "un/ un|unkind/un kind|unkindn/kind ness"),
    (" thou|'d| be", "thou/ thou|'d/thou 'd|be/'d be"),
    (",|love|,|love", ",/ ,|love/, love|/love ,|/"),                # nothing new is nothing
    ("a|1|b", "a/ a|1/a 1|b/1 b"),
    ("  |x", "/ |x/ x"),                                        # spaces alone are no word
])
def test_tokens_are_named_by_their_word_and_their_pair(tokens, names):
    """Case and spaces do not matter, pieces join into words, 7 letters count; all by hand.

    What was there before has no name, and padding after has none.
    """
    vocabulary = [token.encode() for token in tokens.split("|")]
    expected = [name for pair in names.split("|") for name in pair.split("/")]
    ids = list(range(len(vocabulary)))
    assert Bag(vocabulary).names(ids) == expected
    assert Bag(vocabulary).names([*ids, PAD, PAD]) == [*expected, "", "", "", ""]


def test_the_bag_sums_the_weights_of_what_has_occurred():
    """bias + the weights of the set of names in a prefix; one that is not known weighs nothing."""
    tokens, unknown = passages(20), 0
    names = sorted(said(Bag(VOCABULARY), *tokens.tolist()))[::3]
    weight = dict(zip(names, randn(len(names)).tolist()))
    bag = Bag(VOCABULARY, names)
    bag.weight[1:] = torch.tensor(list(weight.values()))
    bag.bias.fill_(0.4)
    for ids, values in zip(tokens.tolist(), bag(tokens)):
        for t in range(1, T + 1):
            found = said(bag, ids[:t])
            unknown += len(found - set(names))
            expected = 0.4 + sum(weight.get(name, 0.0) for name in found)
            assert_close(values[t - 1].item(), expected, "not the sum", atol=1e-5, rtol=0)
    assert unknown > 500 and len(names) > 50, "this should try known and unknown names"


# ---- its fit ------------------------------------------------------------------------------

def dense_fit(bag, tokens, targets, weights, words, ridge, pair_ridge):
    """The same objective by Newton's method, dense, float64: ({name: weight}, bias, strength)."""
    found = [said(bag, ids) for ids in real(tokens)]
    short = {word[:7]: [r for w, r in words.items() if w[:7] == word[:7]] for word in words}
    counts = collections.Counter(name for one in found for name in one)
    names = sorted({name for name, n in counts.items() if n > 1} | set(short))
    prior = np.array([np.mean(short.get(name, [0.0])) for name in names])
    X = np.array([[float(name in one) for name in names] for one in found])
    Z = np.column_stack((X, X @ prior, np.ones(len(X))))
    penalty = np.array([pair_ridge if " " in name else ridge for name in names] + [0.0, 0.0])
    y, w, theta = targets.double().numpy(), weights.double().numpy(), np.zeros(len(names) + 2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-Z @ theta))
        gradient = Z.T @ (w * (p - y)) + penalty * theta
        hessian = Z.T @ (Z * (w * p * (1 - p))[:, None]) + np.diag(penalty)
        theta -= np.linalg.lstsq(hessian, gradient, rcond=None)[0]
    assert np.abs(gradient).max() < 1e-9, "Newton's method did not converge"
    return dict(zip(names, theta[:-2] + theta[-2] * prior)), theta[-1], theta[-2]


@pytest.mark.parametrize("ridge, pair_ridge", [(20.0, 100.0), (0.5, 2.0)])
def test_the_fit_is_the_minimum_that_newton_finds(tmp_path, ridge, pair_ridge):
    """Words of 7 equal letters share a weight, and one unheard keeps its prior."""
    words = {"love": 1.5, "kindness": 1.0, "kindnesses": 2.0, "death": -2.0, "unheard": -1.5,
             "lord": 0.0}
    tokens, targets, weights = rated(60)
    bag = Bag(VOCABULARY)
    options = {} if ridge == 20 else {"ridge": ridge, "pair_ridge": pair_ridge}
    path = tmp_path / "words.csv"
    path.write_text("word,rating\n" + "".join(f"{w},{r}\n" for w, r in words.items()))
    assert bag.fit(tokens, targets, weights, reward.read_words(path), **options) is bag
    expected, bias, strength = dense_fit(bag, tokens, targets, weights, words, ridge, pair_ridge)
    assert set(bag.rows) == {"", *expected}, "other names than those expected"
    found = {name: bag.weight[row].item() for name, row in bag.rows.items()}
    assert found.pop("") == 0, "what was never seen should weigh nothing"
    assert_close(found, expected, "not the weights of the minimum", atol=2e-3, rtol=0)
    assert_close(bag.bias.item(), bias, "not the bias of the minimum", atol=2e-3, rtol=0)
    assert_close(found["unheard"], strength * -1.5, "not strength times rating", atol=2e-3, rtol=0)
    assert abs(strength) > 0.01 and max(map(abs, expected.values())) > 0.02, "too little to see"


# ---- what the readers read ----------------------------------------------------------------

def test_every_token_counts_the_last_one_too(model):
    """Changing any token changes the log-odds, unless the bag then holds the same known names."""
    tokens = passages(8)
    for t in range(T):
        changed = 0
        for k in (1, 6, 11):
            other = tokens.clone()
            other[:, t] = (tokens[:, t] + k) % V
            differs = (model(other) - model(tokens)).abs() > 1e-5
            expected = torch.ones(8, dtype=torch.bool)
            if model.reader == "bag":
                known = [[said(model.bag, ids) & model.bag.rows.keys() for ids in x.tolist()]
                         for x in (tokens, other)]
                expected = torch.tensor([one != two for one, two in zip(*known)])
            assert differs.tolist() == expected.tolist(), f"token {t} is not read"
            changed += expected.sum().item()
        assert changed > 12, "most changes should be seen"


@masks
@pytest.mark.parametrize("garbage", [PAD, V - 1])
def test_padding_on_any_side_is_not_read(model, mask, garbage):
    """The log-odds of the real tokens alone, whatever lies under the mask; PAD needs no mask."""
    tokens = passages(3)
    alone = torch.cat([model(row[m == 1][None]) for row, m in zip(tokens, mask)])
    padded = tokens.masked_fill(mask == 0, garbage)
    for m in [mask, mask.bool(), mask.float()] + [None] * (garbage == PAD):
        assert_close(model(padded, m), alone, "padding is read", atol=1e-4, rtol=1e-4)


def test_a_prefix_is_read_as_the_cut_passage_is(model):
    """prefixes(y)[t] = model(y_1..y_t) for all t, and what follows t changes no bit of it."""
    tokens = passages(8)
    values = model.prefixes(tokens)
    assert values.shape == (8, T)
    for t in range(1, T + 1):
        assert_close(values[:, t - 1], model(tokens[:, :t]), "not the cut passage", atol=1e-4,
                     rtol=1e-4)
        other = tokens.clone()
        other[:, t:] = (tokens[:, t:] + 1) % V
        assert torch.equal(model.prefixes(other)[:, :t], values[:, :t]), "it sees what follows"


def test_log_odds_are_those_of_the_reader(model):
    """scale times head(mean of hidden states, last hidden state), or times the bag's sum."""
    for row in passages(5):
        if model.reader == "bag":
            expected = model.bag(row[None])[0, -1]
        else:
            hidden = model.trunk.hidden(row[None])[0]
            expected = (torch.cat((hidden.mean(0), hidden[-1])) @ model.head.weight[0]
                        + model.head.bias[0])
        assert_close(model(row[None])[0], 0.7 * expected, "wrong log-odds", atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reader", ["bag", "trunk"])
def test_an_untrained_model_says_one_half(reader):
    """Log-odds 0 of everything, before it has learnt anything."""
    assert not RewardModel(CONFIG, reader, vocabulary=VOCABULARY)(passages(4)).any()


def test_the_trunk_reads_in_bfloat16_and_answers_in_float32(trained):
    """Hidden states in the dtype asked for; weights, pooling and log-odds in float32."""
    log_odds = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = trunk_of(trained, dtype)
        assert model.trunk.dtype == model.trunk.hidden(passages(1)).dtype == dtype
        assert {x.dtype for x in model.state_dict().values()} == {torch.float32}
        log_odds[dtype] = model(passages(40))
        assert log_odds[dtype].dtype == torch.float32, "log-odds should be float32"
    assert RewardModel(CONFIG, "trunk").trunk.dtype == torch.float32, "float32 is the default"
    full, half = log_odds.values()
    assert not torch.equal(full, half), "it did not compute in bfloat16"
    assert (full - half).abs().mean() < 0.05 * full.std(), "bfloat16 reads something else"


# ---- losses, calibration, the score -------------------------------------------------------

@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 1.0])
def test_the_loss_is_the_cross_entropy_with_gradient_p_minus_target(target):
    """-t log p - (1 - t) log(1 - p); gradient p - t: neutral passages pull nowhere."""
    log_odds = torch.tensor([-1000.0, -3.0, 0.0, 2.0, 1000.0]).double().requires_grad_()
    loss = soft_loss(log_odds, torch.tensor([target]).double())
    loss.sum().backward()
    p = log_odds.detach().sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log())
    assert_close(log_odds.grad, p - target, "not p - target", atol=1e-12, rtol=0)
    assert_close(loss[1:4], expected[1:4], "not the cross-entropy", atol=1e-12, rtol=1e-9)
    assert_close(loss[2].item(), math.log(2), "a coin's uncertainty is log 2 nats")
    assert loss.isfinite().all(), "large log-odds overflow"


@pytest.mark.parametrize("slope", [0.2, 3.0])
def test_calibration_finds_the_slope_of_a_known_miscalibration(model, slope):
    """Targets are sigmoid(slope * log-odds): the scale grows by that factor, and all is right."""
    model = copy.deepcopy(model)
    tokens = passages(150, seed=4)
    before = model(tokens)
    targets = (slope * before).sigmoid()
    calibrate(model, tokens, targets)
    assert_close(model.scale.item(), 0.7 * slope, "not the slope", atol=1e-3, rtol=0.02)
    assert_close(model(tokens).sigmoid(), targets, "still miscalibrated", atol=0.01, rtol=0)


def test_the_score_uses_the_constants_it_is_given():
    """In numbers, and whatever else is in the batch: beta means the same in every batch."""
    log_odds = torch.tensor([0.0, 5.0, -1e4])
    half = 2 * (1 - math.log(2))                    # p = 1/2: (-log 2 + 1) / 0.5
    for toward, far in (("positive", -19998.0), ("negative", 2.0)):
        found = score(log_odds, -1.0, 0.5, toward)
        assert_close(found[[0, 2]], torch.tensor([half, far]), "wrong score, or of another batch")
    assert torch.equal(score(log_odds, 0, 1), reward.log_p(log_odds, "positive"))
    assert torch.equal(score(log_odds, 0, 1), reward.log_p(log_odds)), "positive is the default"


# ---- training the trunk -------------------------------------------------------------------

def test_every_prefix_of_8_tokens_and_more_is_a_training_example(trunk):
    """The weighted mean of the loss over real prefixes, one by one; padding trains nothing."""
    tokens, targets, weights = rated()
    each, share = [], []
    for ids, target, weight in zip(real(tokens), targets, weights):
        for t in range(8, len(ids) + 1):
            each.append(weight * soft_loss(trunk(torch.tensor([ids[:t]])), target[None])[0])
            share.append(weight)
    expected = sum(each) / sum(share)
    for more in (0, 6):
        wide = torch.nn.functional.pad(tokens, (0, more), value=PAD)
        loss = classifier_loss(trunk, wide, targets, weights, seeded(), noise=0.0)
        assert_close(loss, expected, "not the mean over prefixes", atol=1e-5, rtol=1e-4)
    short = classifier_loss(trunk, tokens[:7], targets[:7], weights[:7], seeded())
    assert SHORTEST == 8 and short == 0, "up to 7 tokens are too few to learn from, and cost 0"


@pytest.mark.parametrize("options, noise", [({}, 0.1), ({"noise": 0.5}, 0.5)])
def test_a_share_of_the_real_tokens_is_replaced_at_random(trunk, monkeypatch, options, noise):
    """By default a tenth, each token of the vocabulary as likely; never padding; by the seed."""
    seen, old = [], RewardModel.prefixes
    monkeypatch.setattr(RewardModel, "prefixes", lambda self, x: seen.append(x) or old(self, x))
    tokens = torch.full((400, T), 3)
    tokens[1::2, 9:] = PAD
    kept, state = tokens.clone(), torch.get_rng_state()
    for seed in (0, 0, 1):
        classifier_loss(trunk, tokens, torch.ones(400), torch.ones(400), seeded(seed), **options)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2]), "not by the seed"
    assert torch.equal(tokens, kept) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(seen[0] == PAD, tokens == PAD), "padding was replaced, or made"
    counts = torch.bincount(seen[0][tokens != PAD], minlength=V).double()
    share = counts / counts.sum()               # of 4,600 tokens
    expected = torch.full((V,), noise / V).double()
    expected[3] += 1 - noise
    error = (expected * (1 - expected) / counts.sum()).sqrt()
    assert ((share - expected).abs() < 4.5 * error).all(), f"noise is spread as {share}"


def test_each_part_of_the_trunk_learns_at_its_rate(trunk):
    """Every parameter in one group: blocks 2e-4, embedding 1e-2, head 1e-3; nothing decays."""
    rates = {id(p): (group["lr"], group["weight_decay"], group["betas"])
             for group in make_optimizer(trunk).param_groups for p in group["params"]}
    expected = {"blocks": 2e-4, "embed": 1e-2, "weight": 1e-3, "bias": 1e-3}
    for name, p in trunk.named_parameters():
        rate = expected[name.split(".")[1]]
        assert rates.pop(id(p)) == (rate, 0.0, (0.9, 0.99)), f"another rate of {name}"
    assert not rates, "the optimizer has parameters that the model has not"


def test_training_teaches_the_trunk_its_passages(trunk):
    """Positive passages are of tokens 0 to 7, negative of 8 to 15: 40 steps tell them apart."""
    trunk.head.weight.data.zero_()
    optimizer, targets = make_optimizer(trunk), torch.tensor([1.0, 0.0]).repeat(16)
    tokens = torch.randint(8, (32, T), generator=seeded()) + 8 * (targets[:, None] == 0)
    for i in range(40):
        optimizer.zero_grad()
        classifier_loss(trunk, tokens, targets, torch.ones(32), seeded(i)).backward()
        assert all(p.grad.isfinite().all() for p in trunk.parameters())
        optimizer.step()
    p = in_chunks(trunk, tokens).sigmoid()
    assert p[::2].min() > 0.5 > p[1::2].max(), "it did not learn from its passages"


# ---- passages and measures ----------------------------------------------------------------

def test_passages_are_padded_on_the_right_and_cut():
    """Shorter ones get PAD, longer ones keep their beginning."""
    assert pad([[7, 8], [1, 2, 3, 4, 5], [], [9, 9, 9]], 3).tolist() == [
        [7, 8, PAD], [1, 2, 3], [PAD] * 3, [9, 9, 9]]


def test_rated_words_are_read_from_their_file(tmp_path):
    """{first 7 letters: mean rating}; none out of range; the words of the project can all match."""
    path = tmp_path / "words.csv"
    path.write_text("word,rating\nlove,1.5\nkindness,1\ndeath,-2\nkindnesses,1.5\n")
    assert reward.read_words(path) == {"love": 1.5, "kindnes": 1.25, "death": -2.0}
    path.write_text("word,rating\nlove,2.5\n")
    with pytest.raises(ValueError, match="2.5 is outside -2 to 2"):
        reward.read_words(path)
    words = reward.read_words()
    assert len(words) > 1000 and {min(words.values()), max(words.values())} == {-2, 2}
    wrong = [w for w in words if Bag([w.encode()]).names([0])[0] != w]
    assert not wrong, f"words that the bag never reads: {wrong[:9]}"


P = torch.tensor([0.9, 0.3, 0.3, 0.55, 0.05, 1.0, 0.0, 0.71, 0.3])
RATINGS = torch.tensor([2.0, 1.0, -1.0, 0.0, -2.0, 0.5, -0.5, 0.0, 2.0])


def test_the_measures_are_those_of_their_definitions():
    """Pearson against numpy, its error (1 - r^2) / sqrt(n - 1); auc over pairs, ties 1/2."""
    p, ratings = P.clamp(0.01, 0.99).tolist(), RATINGS.tolist()
    r = np.corrcoef(p, ratings)[0, 1].item()
    pairs = [(x, y) for x, a in zip(p, ratings) if a > 0 for y, b in zip(p, ratings) if b < 0]
    targets = [(x + 2) / 4 for x in ratings]

    def cross_entropy(predicted):
        return sum(-t * math.log(q) - (1 - t) * math.log(1 - q)
                   for q, t in zip(predicted, targets)) / len(targets)

    expected = {"n": 9, "pearson": r, "pearson_se": (1 - r * r) / 8 ** 0.5,
                "auc": sum((x > y) + (x == y) / 2 for x, y in pairs) / len(pairs),
                "log_loss": cross_entropy(p),
                "constant_log_loss": cross_entropy(9 * [sum(targets) / 9])}
    found = rating_metrics(torch.tensor(p), RATINGS)
    assert_close({key: found[key] for key in expected}, expected, "wrong", atol=1e-6, rtol=0)
    assert math.isfinite(rating_metrics(P, RATINGS)["log_loss"]), "p = 0 or 1 should stay finite"


@pytest.mark.parametrize("ratings, last", [
    ([1.0, 2.0], 0.7), ([-1.0, -1.0], 0.7), ([0.0, 0.0], 0.7), ([1.0], 0.7), ([1.0, -1.0], 0.2)])
def test_measures_are_defined_where_nothing_is_to_be_compared(ratings, last):
    """All positive, negative or neutral, one passage or prediction: auc 1/2, no nan."""
    found = rating_metrics(torch.linspace(0.2, last, len(ratings)), torch.tensor(ratings))
    assert found["auc"] == 0.5 and all(map(math.isfinite, found.values())), found
    constant = len(set(ratings)) == 1 or last == 0.2
    assert not constant or found["pearson"] == 0, "a constant correlates with nothing"


def test_reliability_compares_tenths_of_the_passages():
    """Mean p, mean soft target, its standard error, of passages sorted by p."""
    p = torch.rand(200, generator=seeded())
    ratings = torch.randint(-2, 3, (200,), generator=seeded(1)).float()
    order = np.argsort(p.numpy())
    expected = [[p.numpy()[rows].mean().item(), t.mean().item(), t.std(ddof=1).item() / 20 ** 0.5]
                for rows in order.reshape(10, 20) for t in [(ratings.numpy()[rows] + 2) / 4]]
    assert_close(reliability(p, ratings), expected, "wrong tenths", atol=1e-5, rtol=0)
    assert len(reliability(p[:9], ratings[:9], bins=3)) == 3
    assert reliability(p[:4], ratings[:4]) == [], "one passage has no standard error"


# ---- checkpoints, scoring a file ----------------------------------------------------------

TEXT = "SIR TOBY.\nA plague o' these pickle herring! How now, sot!\n\nCLOWN.\nGood Sir Toby!\n"


def checkpoint(model, config, vocabulary, **more):
    """What train.py writes of a reward model."""
    names = list(model.bag.rows)[1:] if model.reader == "bag" else []
    return {"kind": "reward", "config": vars(config), "reader": model.reader, "names": names,
            "model": model.state_dict(), "vocabulary": vocabulary, **more}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_alone_rebuilds_the_model(model, trained, tmp_path, dtype):
    """Words, spelling, weights and scale come back, frozen, in the dtype asked for."""
    torch.save(checkpoint(model, trained.config, VOCABULARY), tmp_path / "reward.pt")
    loaded = reward.load_reward(torch.load(tmp_path / "reward.pt", weights_only=True), dtype=dtype)
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), "other weights", atol=0,
                 rtol=0)
    assert loaded.reader == model.reader and not any(p.requires_grad for p in loaded.parameters())
    if model.reader == "bag":
        assert (loaded.bag.rows, loaded.bag.spelling) == (model.bag.rows, model.bag.spelling)
    else:
        assert loaded.trunk.dtype == dtype
    if model.reader == "bag" or dtype == torch.float32:
        assert torch.equal(loaded(passages(4)), model(passages(4))), "it reads otherwise"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer and a reward model of a few words, as train.py writes them."""
    out = tmp_path_factory.mktemp("out")
    ranks = data.train_bpe(3 * TEXT, 280)
    data.save_tokenizer(out / "tokenizer.tiktoken", ranks)
    tokenizer = data.load_tokenizer(out / "tokenizer.tiktoken")
    vocabulary = tokenizer.decode_tokens_bytes(range(280))
    texts = [tokenizer.encode_ordinary(TEXT[i:]) for i in range(30)]
    model = RewardModel(CONFIG, vocabulary=vocabulary, names=sorted(said(Bag(vocabulary), *texts)))
    model.bag.weight[1:].normal_(generator=seeded(1))
    model.bag.bias.fill_(0.2)
    data.save_checkpoint(out / "reward.pt", checkpoint(
        model, CONFIG, vocabulary, length=16, tokenizer=data.vocabulary_digest(ranks)))
    return out


@pytest.fixture
def score_lines(tmp_path, monkeypatch, capsys):
    """What `python reward.py --score` of a file of these lines prints: (output, error output)."""
    def run(lines, folder):
        path = tmp_path / "texts.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        monkeypatch.setattr("sys.argv", ["reward.py", "--score", str(path), "--out", str(folder)])
        reward.main()
        return capsys.readouterr()
    return run


def test_scoring_a_file_adds_positive_to_each_line_and_prints_nothing_else(folder, score_lines):
    """Other keys stay, in their order, as they were."""
    rows = [{"id": i, "text": TEXT[i % 9:i % 20 + 5], "note": ["\N{EM DASH}", None, {"x": 1.5}],
             "positive": "old"} for i in range(100)]
    out, err = score_lines([json.dumps(row) + "\n" for row in rows], folder)
    printed = [json.loads(line) for line in out.splitlines()]
    assert [list(row) for row in printed] == [list(row) for row in rows], "other keys, or order"
    assert [{**row, "positive": "old"} for row in printed] == rows, "other keys should stay"
    model = reward.load_reward(data.load_checkpoint(folder / "reward.pt", "reward"))
    tokenizer = data.load_tokenizer(folder / "tokenizer.tiktoken")
    for row in printed:
        ids = tokenizer.encode_ordinary(row["text"].strip())[:16] or [PAD]
        p = model(torch.tensor([ids])).sigmoid().item()
        assert_close(row["positive"], p, "not P(positive) of this text", atol=2e-6, rtol=0)
    assert "\N{EM DASH}" in out and len({row["positive"] for row in printed}) > 5
    assert not err, "nothing was cut"


def test_half_a_character_beside_the_text_is_kept(folder, tmp_path, monkeypatch, capsys):
    """It cannot be written as UTF-8, but as JSON has it: \\ud800."""
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "Good", "x": "\ud800"}))
    monkeypatch.setattr("sys.argv", ["reward.py", "--score", str(tmp_path / "texts.jsonl"),
                                     "--out", str(folder)])
    data.run(reward.main)
    assert json.loads(capsys.readouterr().out)["x"] == "\ud800"


def test_texts_too_long_are_said_so_on_standard_error(folder, score_lines):
    """Only 16 tokens are read here; an empty text has the bias's p; spaces around do not count."""
    texts = ["Good", "  Good \n", "", 10 * TEXT, TEXT + TEXT]
    out, err = score_lines([json.dumps({"text": text}) for text in texts], folder)
    p = [json.loads(line)["positive"] for line in out.splitlines()]
    assert p[0] == p[1] and p[3] == p[4], "spaces around, or tokens past the length, are read"
    assert_close(p[2], 1 / (1 + math.exp(-0.2)), "an empty text says nothing", atol=1e-6, rtol=0)
    assert err == "note: 2 texts are longer than 16 tokens; only their beginning was read\n"
    assert score_lines(["", ""], folder) == ("", ""), "no lines in, no lines out"


def test_a_bad_line_far_into_the_file_is_named(folder, score_lines):
    """70 good lines, then a bad one: the error names line 71."""
    with pytest.raises(data.UserError, match="line 71 is not a JSON object"):
        score_lines(['{"text": "Good"}'] * 70 + ["bad"], folder)


def test_a_reward_model_of_another_tokenizer_is_refused(folder, score_lines, tmp_path):
    """Its ids would mean other words."""
    (tmp_path / "reward.pt").write_bytes((folder / "reward.pt").read_bytes())
    data.save_tokenizer(tmp_path / "tokenizer.tiktoken", data.train_bpe(3 * TEXT, 279))
    with pytest.raises(data.UserError, match="another tokenizer"):
        score_lines([], tmp_path)
