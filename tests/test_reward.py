"""The reward model: what it reads and ignores, what fit() finds, and that no split leaks."""

import copy
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import reward
from conftest import assert_close, loops, randn, seeded
from data import PAD
from gpt import GPT, GPTConfig, norm
from reward import Bag, RewardModel, calibrate, rating_metrics, regress, score, soft_loss

V, T = 16, 14       # tokens of the vocabulary, of a passage
# Whole words, word pieces, a capital, a line's end.
VOCABULARY = [s.encode() for s in
              " my| Love|love|ly|\n|,| kind|ness|es| lord|Lord| O|'d| a|b| death".split("|")]
WORDS = {"love": 1.5, "kindnes": 1.0, "death": -2.0, "lord": 0.5, "unheard": -1.5}


def passages(n, seed=0):
    """Random tokens (n,T): words of a few tokens, repeated, a fifth of them misread."""
    words = loops(n, T, seeded(seed))
    noise = torch.randint(V, (n, T), generator=seeded(seed + 1))
    return torch.where(torch.rand(n, T, generator=seeded(seed + 2)) < 0.2, noise, words)


def words_of(ids):
    """Oracle: the word that each token completes, read off the text so far; "" if said before."""
    text, names = "", []
    for i in ids:
        text += VOCABULARY[i].decode().lower()
        end = re.search(r"('?[a-z]+|,)$", text)
        name = end[0][:7] if end else ""
        names.append("" if name in names else name)
    return names


def features_of(model, ids):
    """Oracle: (hidden state, 1) and rating times it, each token read at the end of its prefix."""
    rows = []
    for t, name in enumerate(words_of(ids)):
        hidden = norm(model.trunk.stream(torch.tensor([ids[:t + 1]])))[0, -1]
        x = torch.cat((hidden, torch.ones(1)))
        rows.append(torch.cat((x, WORDS.get(name, 0.0) * x)))
    return torch.stack(rows).detach()


def head_of(gpt):
    """A reward model on the first block of a GPT."""
    return RewardModel(copy.deepcopy(gpt), VOCABULARY, WORDS)


@pytest.fixture(scope="module", params=["head", "bag"])
def model(request, trained):
    """A model of each kind: random weights for all that it reads, scale 0.7, bias 0.3, frozen."""
    if request.param == "head":
        model = head_of(trained)
        model.head.data = randn(len(model.head), dtype=torch.float32)
    else:
        names = sorted({name for ids in passages(200).tolist() for name in words_of(ids)} - {""})
        model = Bag(VOCABULARY, dict(zip(names[::2], randn(len(names)).tolist())))
    model.scale.fill_(0.7)
    model.bias.fill_(0.3)
    return model.requires_grad_(False)


def test_log_odds_of_a_prefix_are_summed_from_what_each_token_adds(model):
    """bias + scale * sum, each token read where the text ends with it.
    A word said again adds no rating to the head's features, and nothing to a bag."""
    tokens = torch.cat((passages(6), passages(6).flip(1)))
    values = model.prefixes(tokens)
    assert torch.equal(values[:, T], model(tokens)), "not that of the whole"
    for ids, found in zip(tokens.tolist(), values.tolist(), strict=True):
        names = words_of(ids)
        assert list(model.find_words(torch.tensor([ids]))) == names and names.count("") > 1
        if type(model) is Bag:
            added = [model.words.get(name, 0.0) for name in names]
        else:
            added = (features_of(model, ids) @ model.head).tolist()
        expected = [0.3 + 0.7 * sum(added[:t]) for t in range(T + 1)]
        assert_close(found, expected, "it sees what follows, or is not the running sum",
                     atol=1e-4, rtol=0)


@pytest.mark.parametrize("real", [
    ["1" * 9 + "0" * 5, "1" + "0" * 13], ["0" * 5 + "1" * 9, "0" * 13 + "1"],
    ["0" + "1" * 12 + "0", "0001" + "1" * 5 + "0" * 5], ["10" * 7, "0" * T],
], ids=["right", "left", "both sides", "holes, nothing"])
@pytest.mark.parametrize("garbage", [PAD, V - 1])
def test_padding_on_any_side_is_not_read(model, real, garbage):
    """The log-odds of the real tokens alone, PAD or not under the mask; of none: the bias."""
    tokens, mask = passages(2), torch.tensor([[int(c) for c in row] for row in real])
    alone = [model(row[m == 1][None]).item() if m.any() else 0.3 for row, m in zip(tokens, mask)]
    padded = tokens.masked_fill(mask == 0, garbage)
    for m in [mask, mask.bool(), mask.float()] + [None] * (garbage == PAD):
        assert_close(model(padded, m).tolist(), alone, "padding is read", atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_cross_entropy_with_gradient_p_minus_target():
    """-t log p - (1 - t) log(1 - p); gradient p - t: neutral passages pull nowhere."""
    log_odds = torch.tensor([-3.0, 0.0, 2.0, 1000.0]).double().requires_grad_()
    for target in torch.tensor([0.0, 0.25, 0.5, 1.0]).double():
        loss = soft_loss(log_odds, target.expand(4))
        gradient, = torch.autograd.grad(loss.sum(), log_odds)
        p = log_odds.detach().sigmoid()
        expected = -(target * p.log() + (1 - target) * (1 - p).log())
        assert_close(gradient, p - target, "not p - target", atol=1e-12, rtol=0)
        assert_close(loss[:3].detach(), expected[:3], "not the cross-entropy")
        assert loss[3] == 1000 * (1 - target), "large log-odds overflow"


def test_comparison_loss_is_bradley_terrys():
    """Over its pairs, by hand; ties cost a constant, and a constant more changes nothing."""
    r, targets = randn(30), torch.randint(5, (30,), generator=seeded()) / 4
    expected = torch.zeros(30, dtype=torch.float64)
    for row in torch.randint(30, (8, 30), generator=seeded()).tolist():
        for i, j in enumerate(row):
            better, worse = (i, j) if targets[i] > targets[j] else (j, i)
            gap = r[better] - r[worse] if targets[i] != targets[j] else 0.0
            expected[i] += math.log1p(math.exp(-gap)) / 8
    assert_close(reward.comparison_loss(r + 7, targets), expected, "not Bradley-Terry's")


def rated(n=60, seed=0):
    """n passages of 1 to 14 tokens, padded on the right, with soft targets and weights."""
    gone = torch.arange(T) > (torch.arange(n) % T)[:, None]
    tokens = passages(n, seed).masked_fill(gone, PAD)
    feeling = [sum(WORDS.get(word, 0.0) for word in words_of(ids)) for ids in real(tokens)]
    targets = (torch.tensor(feeling) + randn(n, seed=seed, dtype=torch.float32)).sigmoid()
    return tokens, targets, 0.5 + torch.rand(n, generator=seeded(seed))


def real(tokens):
    """The tokens of each passage, as lists without padding: oracles see nothing else."""
    return [[i for i in row if i != PAD] for row in tokens.tolist()]


@pytest.mark.parametrize("kind", ["head", "bag"])
def test_fit_finds_the_minimum_that_newton_finds(trained, kind):
    """In float64. Ridge 10,000 around 0 on the head; on a bag 20 around 0.2 times the ratings."""
    tokens, targets, weights = rated()
    if kind == "head":
        model, ridge, prior, weights = head_of(trained), [10_000.0] * 66, [0.0] * 66, 40 * weights
        Z = torch.stack([features_of(model, ids).sum(0) for ids in real(tokens)]).double().numpy()
    else:
        model, said = Bag(VOCABULARY, WORDS), [words_of(ids) for ids in real(tokens)]
        names = sorted(WORDS.keys() | {name for one in said for name in one if name})
        prior = np.array([0.2 * WORDS.get(name, 0.0) for name in names])
        Z = np.array([[float(name in one) for name in names] for one in said])
        ridge = [20.0] * len(names)
    model.fit(tokens, targets, weights, soft_loss)
    Z, ridge, prior = np.column_stack((Z, np.ones(60))), np.array([*ridge, 0.0]), [*prior, 0.0]
    y, w, theta = targets.double().numpy(), weights.double().numpy(), np.zeros(len(ridge))
    for _ in range(50):
        p = 1 / (1 + np.exp(-Z @ theta))
        gradient = Z.T @ (w * (p - y)) + ridge * (theta - prior)
        hessian = Z.T @ (Z * (w * p * (1 - p))[:, None]) + np.diag(ridge)
        theta = theta - np.linalg.lstsq(hessian, gradient, rcond=None)[0]
    assert np.abs(gradient).max() < 1e-9, "Newton's method did not converge"
    if kind == "head":
        found, expected = model.head.tolist(), theta[:-1].tolist()
        for name, weight in model.trunk.state_dict().items():
            assert torch.equal(weight, trained.state_dict()[name]), f"{name} has changed"
    else:
        assert list(model.words) == ["", *names], "other words than those said, and rated ones"
        found, expected = list(model.words.values()), [0.0, *theta[:-1]]
        assert model.words["unheard"] == pytest.approx(0.2 * WORDS["unheard"]), "a word not said"
    assert max(map(abs, expected)) > 0.02, "too little to see"
    assert_close(found, expected, "not the minimum", atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["head", "bag"])
def test_comparisons_teach_the_order_and_ratings_the_zero(trained, kind):
    """Of three texts fit() learns the order; calibrate() finds the bias in the ratings."""
    model = head_of(trained) if kind == "head" else Bag(VOCABULARY, {})
    tokens = torch.tensor([[1, 0, 0], [9, 0, 0], [15, 0, 0]] * 40)      # love, lord, death
    targets = torch.tensor([0.9, 0.5, 0.3] * 40)
    model.fit(tokens, targets, torch.ones(120), reward.comparison_loss)
    love, lord, death = model(tokens[:3]).tolist()
    assert love > lord + 0.1 and lord > death + 0.1, "the order is not learnt"
    calibrate(model, tokens, targets)
    assert_close(model(tokens).sigmoid().mean(), targets.mean(), "mean P", atol=1e-3, rtol=0)


def test_calibration_leaves_slope_1_and_intercept_0(model):
    """On the data it was given; and regress() finds a known slope and intercept."""
    model = copy.deepcopy(model)
    tokens, targets, _ = rated(150, seed=4)
    slope, intercept = regress(model(tokens).mul, torch.ones(1), targets)
    assert abs(slope - 1) > 0.3 and abs(intercept) > 0.02, "nothing to calibrate here"
    model.scale, model.bias = torch.ones(1), torch.zeros(1)         # as fit() leaves them
    calibrate(model, tokens, targets)
    slope, intercept = regress(model(tokens).mul, torch.ones(1), targets)
    assert_close([slope.item(), intercept.item()], [1.0, 0.0], "still miscalibrated", atol=2e-3,
                 rtol=0)
    x = randn(400)
    slope, intercept = regress((2.5 * x - 0.5).mul, torch.ones(1), x.sigmoid())
    assert_close([slope.item(), intercept.item()], [0.4, 0.2], "1 / 2.5 and 0.5 / 2.5", atol=1e-3,
                 rtol=0)


def test_the_score_uses_the_constants_it_is_given():
    """(log p - mean) / std of samples of rho, in any batch: so beta always means the same."""
    samples, x = randn(50), torch.tensor([0.0, 5.0, -30.0]).double()
    for toward, sign in (("positive", 1), ("negative", -1)):
        log_p = (sign * samples).sigmoid().log()
        expected = (-torch.log1p((-sign * x).exp()) - log_p.mean()) / log_p.std()
        found = score(x, **reward.score_constants(samples)[toward], toward=toward)
        assert_close(found, expected, "not (log p - mean) / std")


def test_the_measures_are_those_of_their_definitions():
    """Pearson against numpy, auc over pairs with ties 1/2, cross-entropy, Platt's slope."""
    ratings = torch.tensor([2.0, 1.0, -1.0, 0.0, -2.0, 0.5, -0.5, 0.0, 2.0])
    p = torch.tensor([0.9, 0.3, 0.3, 0.55, 0.05, 0.99, 0.01, 0.71, 0.3])
    targets = (ratings.double() + 2) / 4
    wins = [float(x > y) + float(x == y) / 2 for x, a in zip(p, ratings) if a > 0
            for y, b in zip(p, ratings) if b < 0]
    expected = {"n": 9, "pearson": np.corrcoef(p, ratings)[0, 1].item(),
                "auc": sum(wins) / len(wins), "slope": 1 / 3,
                "log_loss": -(targets * p.log() + (1 - targets) * (1 - p).log()).mean().item()}
    found = rating_metrics(p.logit(), targets)
    slope = rating_metrics(3 * p.logit(), targets)["slope"]     # three times as sure
    found["slope"] = slope / found["slope"]
    assert_close(found, expected, "wrong", atol=1e-3, rtol=0)
    for few in ([1, 2], [0, 0], [1]):               # nothing is to be compared: a half
        found = rating_metrics(torch.linspace(-1, 2, len(few)), (torch.tensor(few) + 2) / 4)
        assert found["auc"] == 0.5 and all(map(math.isfinite, found.values())), found


BYTES, LENGTH = [bytes([b]) for b in range(256)], 48
PLAYS = {f"comedies/play-{i}": [f"{i} in {j} {words}" for j, words in enumerate(
    ("sweet love", "kind joy", "the sea", "cruel", "bloody death"))] for i in range(80)}


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    """400 passages of 80 made-up plays and 120 samples, each text twice, otherwise spaced."""
    folder = tmp_path_factory.mktemp("labels")
    lines = [f"{play},{i},{i},{3 - i}\n" for play in PLAYS for i in range(1, 6)]
    (folder / "a.csv").write_text("play,first_line,last_line,rating\n" + "".join(lines))
    lines = [f"a{space}sample {i} {feeling},{rating}\n" for i in range(60) for space in (" ", "  ")
             for feeling, rating in [[("love", 2), ("sea", 0), ("death", -2)][i % 3]]]
    (folder / "b.csv").write_text("text,rating\n" + "".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_plays", lambda: PLAYS)
        return reward.read_ratings([folder / "a.csv", folder / "b.csv"])


def part_of(text):
    """Oracle: the part of a text made above, by its play, or its words."""
    key = " ".join(text.split()) if text[0] == "a" else f"comedies/play-{text.split()[0]}"
    return ["report", "choose", "judge", "judge", *["reward"] * 6][data.fold(key, 10)]


def test_every_passage_of_a_play_and_every_text_is_on_one_side(ratings):
    """Each row is in one part, that of its play; held-out plays are the report's."""
    parts = ratings["passages"]
    assert sum(map(len, parts.values())) == 520 and set(parts) == set(reward.PARTS)
    for part, rows in parts.items():
        texts = [text for text, *_ in rows]
        assert len(texts) > 10 and {part_of(text) for text in texts} == {part}
        plays = {f"comedies/play-{text.split()[0]}" for text in texts if text[0] != "a"}
        held_out = {data.fold(play, 10) == 0 for play in plays}
        assert held_out == {part == "report"}, "has the GPT read it?"


def test_words_cut_alike_share_their_mean_and_texts_of_plays_are_no_samples(monkeypatch):
    """Of all the files of labels/."""
    words, seen = [("gracious", 2.0, None), ("graciously", 1.0, None), ("grace", -1.0, None)], []
    monkeypatch.setattr(data, "read_labels", lambda path: seen.append(path.stem) or (
        words if path.stem == "words" else [(f"text {i}", i % 2, "") for i in range(200)]))
    found = reward.read_ratings()
    assert seen == ["passages", "more_passages", "samples", "words"]
    assert found["words"] == {"graciou": 1.5, "grace": -1.0}
    assert not any(x for rows in found["passages"].values() for *_, x in rows), "samples"


def test_rated_texts_become_tokens_and_soft_targets(ratings):
    """Targets (rating + 2) / 4; texts are cut at 16 tokens."""
    for rows in ratings["passages"].values():
        for tokens, target, sampled, row in zip(*reward.prepare(rows, BYTES, 16), rows):
            text, rating, is_sample = row
            assert target == (rating + 2) / 4 and sampled == is_sample
            assert data.decode(BYTES, tokens) == text[:16]


@pytest.fixture(scope="module")
def learnt(ratings):
    """Of both kinds and the judge: the state, the texts given to fit, those given to calibrate."""
    config = GPTConfig(vocab_size=256, block_size=LENGTH, n_layer=2, n_head=2, n_embd=16)
    weights = {name: randn(*x.shape, dtype=torch.float32) / 4
               for name, x in GPT(config).state_dict().items()}
    learnt = {"pretrained": {"config": vars(config), "model": weights, "vocabulary": BYTES}}

    def spy(function):
        def spied(model, tokens, *more):
            seen.append([data.decode(BYTES, row) for row in tokens])
            counts.extend(zip(seen[-1], more[1].tolist() if len(more) == 3 else ()))
            return function(model, tokens, *more)
        return spied

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardModel, "fit", spy(RewardModel.fit))
        patch.setattr(Bag, "fit", spy(Bag.fit))
        patch.setattr(reward, "calibrate", spy(calibrate))
        patch.setattr(reward, "ENOUGH", 10)
        for kind in ("head", "bag", "judge"):
            seen, counts, stage = [], [], reward.fit_judge if kind == "judge" else reward.fit_reward
            options = SimpleNamespace(reward_model=kind, feedback="ratings", length=LENGTH,
                                      device="cpu", dtype=torch.float32)
            state = stage(options, learnt["pretrained"], ratings, SimpleNamespace(show=print))
            learnt[kind] = [{"kind": "reward", **state}, *seen]
            assert counts and all(n == (2 if text[0] == "a" else 1) for text, n in counts), "twice"
    return learnt


@pytest.mark.parametrize("kind", ["head", "bag", "judge"])
def test_what_is_fitted_calibrated_and_measured_never_meet(learnt, ratings, kind):
    """fit() sees its own part, calibrate() "choose", neither "report", which alone is measured."""
    state, fitted, calibrated = learnt[kind]
    passages = sum(ratings["passages"].values(), [])
    wanted = {name: sorted(text for text, *_ in passages if part_of(text) == name)
              for name in reward.PARTS}
    assert sorted(fitted) == wanted["judge" if kind == "judge" else "reward"]
    # Calibrated for what PPO will show it: samples begin with "a" here.
    assert sorted(calibrated) == [text for text in wanted["choose"] if text[0] == "a"]
    model = reward.load_reward(state)
    for name, is_sample in (("passages", False), ("samples", True)):
        rows = [x for x in passages if part_of(x[0]) == "report" and x[2] == is_sample]
        log_odds = model(data.pad([list(text.encode()) for text, *_ in rows], LENGTH))
        expected = rating_metrics(log_odds, torch.tensor([(row[1] + 2) / 4 for row in rows]))
        assert_close(state["report"][name], expected, f"of held-out {name}", atol=1e-4, rtol=1e-4)
        assert expected["pearson"] > 0.5, "it has not learnt"


@pytest.mark.parametrize("n", [2, 12])
def test_the_most_negative_and_the_most_positive_held_out_texts_are_shown(
        learnt, ratings, monkeypatch, n):
    """Three each, of passages and samples, in order, each under its own P."""
    parts, shows = ratings["passages"], []
    report = [row for row in parts["report"] if not row[2]] + parts["reward"][-n:]
    assert all(is_sample for *_, is_sample in report[-n:])
    seen = []       # samples to calibrate on are too few here
    monkeypatch.setattr(reward, "calibrate", lambda model, tokens, targets: seen.extend(
        data.decode(BYTES, row) for row in tokens) or calibrate(model, tokens, targets))
    state = reward.fit_judge(SimpleNamespace(length=LENGTH, device="cpu"), learnt["pretrained"],
                             {**ratings, "passages": {**parts, "report": report}},
                             SimpleNamespace(show=lambda *x: shows.append(x)))
    model, p = reward.load_reward(state), {}
    for text, *_ in report:
        p[text] = model(data.pad([list(text.encode())], LENGTH)).sigmoid().item()
    assert [title for title, _ in shows] == [f"P(positive) {p[text]:.2f}" for _, text in shows]
    order = sorted(p[text] for text, *_ in report)
    assert_close([p[text] for _, text in shows], order[:3] + order[-3:], "others")
    assert seen == [text for text, *_ in parts["choose"]], "calibrated on others"


@pytest.mark.parametrize("kind", ["head", "bag", "judge"])
def test_a_checkpoint_alone_rebuilds_the_model(learnt, ratings, tmp_path, kind):
    """Words, weights, scale and bias come back, frozen; the trunk is the GPT's first block."""
    state, *_ = learnt[kind]
    assert (state["words"] == ratings["words"]) == (kind == "head")
    # "lord" is rated, but in none of the passages.
    assert "love" in state["words"] and ("lord" in state["words"]) == (kind != "judge")
    data.save_checkpoint(tmp_path / "reward.pt", state)
    loaded = reward.load_reward(data.load_checkpoint(tmp_path / "reward.pt", "reward"))
    assert_close(dict(loaded.state_dict()), dict(state["model"]), "weights", atol=0, rtol=0)
    assert loaded.words == state["words"]
    assert not any(p.requires_grad for p in loaded.parameters())
    trunk = {name for name in state["model"] if name.startswith("trunk.")}
    assert bool(trunk) == (kind == "head") and not any("blocks.1" in name for name in trunk)
    for name in trunk:
        pretrained = learnt["pretrained"]["model"][name.removeprefix("trunk.")]
        assert torch.equal(state["model"][name], pretrained), f"{name} has changed"


def test_scoring_a_file_adds_positive_to_each_line(learnt, tmp_path, monkeypatch, capsys):
    """And prints nothing else. A bad line is named before any is scored."""
    def score_lines(lines):
        (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
        data.run(reward.main)
        return capsys.readouterr()
    data.save_checkpoint(tmp_path / "reward.pt", learnt["head"][0])
    monkeypatch.setattr("sys.argv", ["reward.py", "--score", str(tmp_path / "texts.jsonl"),
                                     "--out", str(tmp_path)])
    texts = ["Good", "  Good \n", "", "love " * 20, "love " * 10, "love \N{EM DASH} joy"]
    rows = [{"id": i, "text": text, "note": ["\N{EM DASH}", "\ud800", {"x": 1.5}],
             "positive": "old"} for i, text in enumerate(texts)]
    out, err = score_lines([json.dumps(row) + "\n" for row in rows])
    printed = [json.loads(line) for line in out.splitlines()]
    assert [list(row) for row in printed] == [list(row) for row in rows], "other keys, or order"
    assert [{**row, "positive": "old"} for row in printed] == rows, "other keys should stay"
    model = reward.load_reward(learnt["head"][0])
    for row in printed:
        ids = list(row["text"].strip().encode())[:LENGTH] or [PAD]
        p = model(torch.tensor([ids])).sigmoid().item()
        assert_close(row["positive"], p, "not P(positive) of this text", atol=2e-6, rtol=0)
    assert err == ""
    with pytest.raises(SystemExit):
        score_lines(['{"text": "Good"}'] * 70 + ["bad"])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "line 71 is not a JSON object" in err, err
