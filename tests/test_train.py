"""The study: options, the loop that remembers, what each stage does, kills, bad input."""

import collections
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import gpt
import ppo
import reward
import train
from conftest import TOY, argv, assert_close, content, explains, run_script

STAGES = ["data", "pretrain", "reward", "judge", "rho", "ppo_beta0.5", "ppo_beta2"]
DRIFTING = ["--lr", "0.01", "--max-update-kl", "0.1", "--iterations", "8", "--until", "ppo"]


def load(folder, name):
    return data.load_checkpoint(folder / f"{name}.pt")


def corpus(args):
    """The texts that a study of these options learns from."""
    return data.load_corpus(args.corpus)


@pytest.fixture
def options(monkeypatch, texts, tmp_path):
    """options(argument ...) -> what train.parse makes of them and the tiny study's own."""
    monkeypatch.setitem(train.SIZES, "toy", TOY)
    return lambda *more: train.parse(argv(texts, tmp_path, *more))


@pytest.fixture
def redone(texts, again, capsys):
    """redone(argument ...) -> the stages that the finished study does again, what it said."""
    def stamps():
        return {path.stem: path.stat().st_mtime_ns for path in again.glob("*.pt")}

    def run(*more):
        before = stamps()
        capsys.readouterr()
        assert run_script(train, *argv(texts, again, *more)) == 0
        changed = {name for name, stamp in stamps().items() if stamp != before.get(name)}
        return changed, capsys.readouterr().out
    return run


# ---- the loop that remembers --------------------------------------------------------------

STEPS = 6


def fake_stage(out, before=lambda i: None, after=lambda i: None, every=-1.0, seed=3, lr=0.1,
               keep=False, code=()):
    """A stage that uses all that a stage may: Adam's moments, a stream of its own, torch's own.

    before(i) and after(i) are called around the update of step i, to interrupt it.
    """
    args = SimpleNamespace(out=out, seed=seed, keep=keep, checkpoint_every=every,
                           dtype=torch.float32, device=torch.device("cpu"))
    out.mkdir(exist_ok=True)
    with torch.random.fork_rng():
        stage = train.Stage(args, "fake", [], [], code, lr=lr)
        if stage.done:
            return stage.state
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        stream = gpt.Generator().manual_seed(seed)
        for i in stage.steps(STEPS, model=model, optimizer=optimizer, stream=stream):
            before(i)
            x = torch.randn(8, 3, generator=stream)
            loss = (model(x) - x.sum(1, keepdim=True) + torch.randn(8, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after(i)
            if i % 2:
                stage.log(loss=loss.item())
        return stage.finish(model=model.state_dict())


def same_result(out, state, whole):
    """The stage in out ended in the same bits as whole, one never cut off, and cleaned up."""
    for name, weight in whole["model"].items():
        assert torch.equal(state["model"][name], weight), f"{name} differs from the whole run's"
    assert state["history"] == whole["history"], "metrics differ from the whole run's"
    lines = (out / "fake.metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole["history"], "the metrics file differs"
    assert {path.name for path in out.iterdir()} == {"fake.pt", "fake.metrics.jsonl"}, "litter"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    return fake_stage(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("every", [-1.0, 1e9], ids=["saved each step", "never saved"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("i", range(STEPS))
def test_a_stage_cut_off_at_any_step_goes_on_to_the_same_bits(tmp_path, whole, i, error, every):
    """Weights and metrics equal the whole run's, though the cut came after step i's update."""
    def cut(step):
        if step == i:
            raise error
    with pytest.raises(error):
        fake_stage(tmp_path, after=cut, every=every)
    assert not (tmp_path / "fake.pt").exists(), "an unfinished stage should leave no checkpoint"
    done = []
    same_result(tmp_path, fake_stage(tmp_path, before=done.append), whole)
    assert done == list(range(i if every < 0 else 0, STEPS)), "the wrong steps were done again"


def test_a_stage_cut_off_at_every_step_goes_on_to_the_same_bits(tmp_path, whole):
    """Six runs, each a step further, killed by the error of the next; then not a step is done."""
    def cut(i):
        if i > reached[-1]:
            reached.append(i)
            raise RuntimeError
    reached = [-1]
    for _ in range(STEPS):
        with pytest.raises(RuntimeError):
            fake_stage(tmp_path, before=cut)
    same_result(tmp_path, fake_stage(tmp_path, before=cut), whole)
    (tmp_path / "fake.partial.pt").touch()      # as a kill at the very end leaves it
    same_result(tmp_path, fake_stage(tmp_path, before=lambda i: pytest.fail("done again")), whole)


@pytest.mark.parametrize("inputs, said", [({"lr": 0.2}, "lr"), ({"seed": 4, "lr": 0.2}, "lr, seed"),
                                          ({"code": [gpt]}, "gpt.py")])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "cut off"])
def test_a_stage_whose_inputs_changed_is_done_again_and_says_which(tmp_path, capsys, inputs, said,
                                                                   finished):
    """As if nothing had been there: the same bits as in an empty folder."""
    def cut(i):
        if not finished and i == 3:
            raise RuntimeError
    fresh = fake_stage(tmp_path / "new", **inputs)
    try:
        fake_stage(tmp_path / "old", before=cut)
    except RuntimeError:
        pass
    capsys.readouterr()
    same_result(tmp_path / "old", fake_stage(tmp_path / "old", **inputs), fresh)
    assert f": {said} changed, so this stage is done again" in capsys.readouterr().out


def test_the_seed_of_a_stage_decides_its_result(tmp_path, whole):
    """Another seed, other weights; the same seed the same, whatever torch drew before."""
    torch.rand(5)
    again, other = fake_stage(tmp_path / "again"), fake_stage(tmp_path / "other", seed=4)
    assert_close(again["model"], whole["model"], "the seed does not decide", atol=0, rtol=0)
    assert not torch.equal(other["model"]["weight"], whole["model"]["weight"]), "one for all seeds"


SOURCE = '''"""Of a module."""
LIMIT = 3


def work(x):
    """What it does."""
    return x * 2


def other(x):
    return x
'''


def written(path, old, new):
    """The module that SOURCE is at path, with old replaced by new."""
    assert old in SOURCE
    path.write_text(SOURCE.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("old, new, module_same, work_same", [
    ("return x * 2", "return x * 2      # twice", True, True),
    ("    return x * 2", "\n    # twice\n\n    return x * 2", True, True),
    ("What it does.", "Says it in other words.", True, True),
    ('    """What it does."""\n', "", True, True),
    ("    return x\n", '    """What it does not."""\n    return x\n', True, True),
    ("Of a module.", "Of this module.", True, True),
    ("return x * 2", "return (x*2)", True, True),
    ("x * 2", "x * 3", False, False),
    ("work(x)", "work(x=1)", False, False),
    ("LIMIT = 3", "LIMIT = 4", False, True),
    ("return x\n", "return -x\n", False, True),
])
def test_only_an_edit_of_what_is_computed_changes_the_digest(tmp_path, old, new, module_same,
                                                             work_same):
    """Comments, blank lines and words of docstrings are free; a function's digest is its own."""
    before, after = written(tmp_path / "a.py", "x", "x"), written(tmp_path / "b.py", old, new)
    found = [set(train.source_digests([x]).values()) == set(train.source_digests([y]).values())
             for x, y in ((before, after), (before.work, after.work))]
    assert found == [module_same, work_same], "digests of module and function"


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_runs_is_told_by_file_and_function(study, name):
    """Of this project alone, decorated functions too, and of each the digest of its own source."""
    digests = {key: digest for key, digest in load(study, name)["inputs"].items() if ".py" in key}
    assert len(set(digests.values())) == len(digests) > 0, "two have the same digest"
    for key in digests:
        file, _, function = key.partition(": ")
        source = (data.HERE / file).read_text()
        assert not function or re.search(rf"^(def|class) {function}\b", source, re.M), key


def test_an_edit_of_a_function_is_named_and_can_be_kept(tmp_path, capsys):
    """The file and the function; --keep reuses the stage, but not where an option changed too."""
    (tmp_path / "new").mkdir()
    old = written(tmp_path / "toy.py", "x", "x").work
    state = fake_stage(tmp_path / "out", code=[old])
    new = written(tmp_path / "new" / "toy.py", "x * 2", "x * 3").work
    done = []
    fake_stage(tmp_path / "out", done.append, code=[new], keep=True)
    assert not done, "--keep should reuse what other code made"
    fake_stage(tmp_path / "out", done.append, code=[new], keep=True, lr=0.2)
    assert len(done) == STEPS, "--keep is about code alone"
    fake_stage(tmp_path / "out", code=[old])
    capsys.readouterr()
    again = fake_stage(tmp_path / "out", done.append, code=[new])
    assert len(done) == 2 * STEPS and "fake.pt: toy.py: work changed" in capsys.readouterr().out
    assert torch.equal(again["model"]["weight"], state["model"]["weight"])


@pytest.mark.skipif(train.fcntl is None, reason="this system has no locks")
def test_two_runs_in_one_folder_are_kept_apart(texts, tmp_path, command):
    """The second is told so at once; the lock goes with its holder, litter of killed writes too."""
    out = tmp_path / "a" / "out"
    with train.locked(out):
        explains(command(train, *argv(texts, out)), "another run is using")
        (out / f".data.pt.99{data.HALF_WRITTEN}").touch()
        (out / ".mine.tmp").touch()
    with train.locked(out):
        assert {path.name for path in out.iterdir()} == {".lock", ".mine.tmp"}


# ---- options ------------------------------------------------------------------------------

def test_every_setting_of_ppo_comes_from_its_option(options, texts, study, monkeypatch, tmp_path):
    """None is left at its default, the threshold of the early stop among them."""
    given = {"algorithm": "rloo", "iterations": 5, "length": 12, "batch": 24, "minibatch": 12,
             "epochs": 7, "lr": 0.5, "clip": 0.25, "lam": 0.75,
             "per_prompt": 2, "max_update_kl": 0.125,
             "adaptive_kl_target": 4.0, "adaptive_kl_horizon": 99.0}
    names = {field.name for field in dataclasses.fields(ppo.PPOConfig)}
    assert names == {"beta", *given}, "the test should know every setting"
    args = options(*(x for name, value in given.items()
                     for x in ("--" + name.replace("_", "-"), str(value))))

    def spy(ref, score_fn, prompts, config, *more, **named):
        assert dataclasses.asdict(config) == {**given, "beta": 0.5}, "one was lost"
        raise StopIteration
    monkeypatch.setattr(ppo, "PPO", spy)
    with pytest.raises(StopIteration):
        train.ppo_stage(args, args.runs[0], None, *(load(study, x) for x in STAGES[1:5]))


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_a_size_sets_what_is_not_given(size):
    """An option beats the size; a CPU's default is small; --fp32 beats the device's own dtype."""
    args = train.parse(["--size", size, "--batch", "100", "--device", "cpu", "--fp32"])
    assert {name: getattr(args, name) for name in train.SIZES[size]} == {
        **train.SIZES[size], "batch": 100}
    assert args.dtype == torch.float32
    assert train.parse(["--device", "cpu"]).size == "small"


def test_seeds_differ_by_seed_use_and_beta(options):
    """What one use draws must not be what another drew."""
    uses = ("pretrain", "judge", "rho", "fresh", "ppo")
    seeds = [train.seed_of(options("--seed", seed), use, beta) for seed in range(20)
             for use in uses for beta in (0, 0.02, 0.1, 0.2, 0.4)]
    assert len(set(seeds)) == len(seeds), "two uses share a seed"


def test_the_seed_reaches_every_use_of_randomness(texts, tmp_path, monkeypatch):
    """Whatever is seeded in a whole run: once for each use and beta, and by --seed."""
    seeded, of_weights, real, manual_seed = [], set(), torch.Generator, torch.manual_seed

    class Spy(real):
        def manual_seed(self, seed):
            seeded.append(seed)
            return super().manual_seed(seed)

    def spy(self, seed):
        seeded.append(seed)
        return real.manual_seed(self, seed)

    def spy_weights(seed):
        of_weights.add(seed)
        return manual_seed(seed)

    monkeypatch.setattr(torch, "manual_seed", spy_weights)
    monkeypatch.setattr(torch, "Generator", Spy)
    monkeypatch.setattr(gpt.Generator, "manual_seed", spy, raising=False)
    runs = []
    for seed in (0, 1):
        seeded.clear()
        out = tmp_path / str(seed)
        assert run_script(train, *argv(texts, out, "--seed", seed, "--until", "ppo")) == 0
        runs.append(collections.Counter(seeded))
    assert set(runs[0].values()) == {1}, f"a seed is used twice: {runs[0]}"
    assert len(runs[0]) == 9, "pretraining, judge, rho; two runs that sample, shuffle, are measured"
    assert not set(runs[0]) & set(runs[1]), "--seed does not reach this use"
    assert of_weights == {0, 1}, "the first weights do not depend on --seed"


# ---- pretraining --------------------------------------------------------------------------

@pytest.fixture
def steps(monkeypatch):
    """What each call of gpt.descend was given: the rate as a share of its peak, and the clip."""
    descend, seen = gpt.descend, []

    def spy(loss, model, optimizers, clip=math.inf, weight=None):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        shares = {round(group["lr"] / group["peak"], 6) for group in groups}
        seen.append((*shares, clip))
        return descend(loss, model, optimizers, clip, weight)

    monkeypatch.setattr(gpt, "descend", spy)
    return seen


def test_half_of_the_windows_begin_where_a_speech_does(options, monkeypatch, steps):
    """Samples have only the blank line before them, so that context must be seen in training."""
    windows, seen = train.windows, []

    @functools.wraps(windows)
    def spy(tokens, starts, length):
        seen.append((tokens, starts))
        return windows(tokens, starts, length)

    monkeypatch.setattr(train, "windows", spy)
    texts, tokenizer = train.data_stage(options(), corpus(options()))
    start = tokenizer.encode_ordinary(data.BOUNDARY)[0]
    train.pretrain_stage(options(), texts, start)
    tokens = texts["train"]
    starts = torch.stack([starts for read, starts in seen if read is tokens])
    assert len(starts) == TOY["pretrain_steps"] and (tokens[starts[:, ::2]] == start).all()
    assert (tokens[starts[:, 1::2]] == start).float().mean() < 0.5, "the others begin anywhere"
    assert starts.unique().numel() > 0.7 * starts.numel(), "the same windows again and again"
    n = TOY["pretrain_steps"]
    assert steps == [(round(train.trapezoid(i, n), 6), math.inf) for i in range(n)], "its rates"


def test_the_learning_rate_rises_and_falls():
    """20 steps up, level, down to 0 over the last 60 %."""
    shares = [train.trapezoid(i, 1000) for i in (0, 9, 19, 400, 700, 999)]
    assert_close(shares, [0.05, 0.5, 1.0, 1.0, 0.5, 1 / 600], "the schedule")


def test_bits_per_byte_of_a_uniform_model_are_known():
    """log2 V bits for every token, over the bytes of the tokens predicted, not their number."""
    V, T = 16, 8
    sizes, tokens = torch.arange(1, V + 1), torch.arange(1000) % V
    model = lambda tokens: torch.zeros(*tokens.shape, V)      # noqa: E731
    model.config = SimpleNamespace(block_size=T)
    read = tokens[1:992 + 1]                                # 124 windows: the last is not whole
    assert (len(tokens) - T - 1 + T - 1) // T * T == len(read)
    assert_close(train.bits_per_byte(model, tokens, sizes, "cpu"),
                 math.log2(V) * len(read) / sizes[read].sum().item(), "bits per byte")


# ---- ratings and reward models ------------------------------------------------------------

@pytest.fixture
def plays(monkeypatch, options, tmp_path):
    """What rated_passages makes of ratings of 40 made-up plays and of 100 samples, rated twice."""
    names = [f"comedies/play-{i}" for i in range(40)]
    monkeypatch.setattr(data, "load_plays", lambda: {
        name: [f"{name} line {i}" for i in range(9)] for name in names})
    rows = "".join(f"{name},{i},{i},{i % 5 - 2}\n" for name in names for i in range(1, 10))
    (tmp_path / "plays.csv").write_text("play,first_line,last_line,rating\n" + rows)
    (tmp_path / "samples.csv").write_text("text,rating\n" + "".join(
        f"sample{'  ' if again else ' '}{i},{i % 5 - 2}\n" for i in range(100) for again in (0, 1)))
    args = options("--labels", tmp_path / "plays.csv", tmp_path / "samples.csv", "--length", 20)
    tokenizer = SimpleNamespace(encode_ordinary=lambda text: list(text.encode()))
    return train.rated_passages(args, tokenizer)


def test_no_text_and_no_play_is_on_two_sides(plays):
    """Whole plays go to one part, samples by their words; report plays are held out of all."""
    sides = collections.defaultdict(set)
    for part, rows in plays["rows"].items():
        for ids in plays["tokens"][rows].tolist():
            text = bytes(i for i in ids if i >= 0).decode()
            # Cut to 20 tokens, a passage is "comedies/play-12 lin".
            sides[" ".join(text.split()[:2 if "sample" in text else 1])].add(part)
    assert len(sides) == 140 and all(len(parts) == 1 for parts in sides.values()), "two sides"
    for name, (part,) in sides.items():
        if "play" in name:
            assert (part == "report") == data.is_held_out(name), f"{name} is for {part}"
    together = torch.cat(list(plays["rows"].values())).sort().values
    assert together.tolist() == list(range(560)), "each passage is for one part"
    shares = [len(plays["rows"][part]) / 560 for part in ("report", "choose", "judge", "reward")]
    assert_close(shares, [0.1, 0.1, 0.2, 0.6], "the sizes of the parts", atol=0.1, rtol=0)


def test_a_rating_counts_by_what_is_read_of_it_and_samples_twice(plays):
    """20 tokens of "comedies/play-1 line 3" (22) are 20/22 of a rating."""
    lengths = torch.tensor([len(f"comedies/play-{i} line 3") for i in range(40) for _ in range(9)])
    assert_close(plays["weights"][:360], 20 / lengths, "of passages")
    assert (plays["weights"][360:] == 2).all() and plays["is_sample"].nonzero().min() == 360


def test_the_passages_of_a_text_of_ones_own_are_split_too(options, texts, monkeypatch):
    """It is one play, which would all fall into one part."""
    _, tokenizer = train.data_stage(options(), corpus(options()))
    rated = train.rated_passages(options(), tokenizer)
    assert {part: len(rows) > 10 for part, rows in rated["rows"].items()} == {
        part: True for part in train.PARTS}
    digest = rated["digest"]
    monkeypatch.setattr(train, "PARTS", train.PARTS[::-1])
    assert train.rated_passages(options(), tokenizer)["digest"] != digest, "another split is news"


def test_each_reader_learns_soft_targets_of_its_own_passages(options, texts, study, monkeypatch,
                                                             steps):
    """(rating + 2) / 4 of the part that bears its name; "choose" calibrates both."""
    args, seen = options(), {}
    fit, loss, calibrate = reward.Bag.fit, reward.classifier_loss, reward.calibrate

    def note(name, tokens, targets):
        seen.setdefault(name, []).extend(zip(map(tuple, tokens.tolist()), targets.tolist()))

    def spy_fit(self, tokens, targets, *more, **loss):
        note("reward", tokens, targets)
        return fit(self, tokens, targets, *more, **loss)

    def spy_loss(model, tokens, targets, *more):
        note("judge", tokens, targets)
        return loss(model, tokens, targets, *more)

    def spy_calibrate(model, tokens, targets):
        note(f"choose {model.reader}", tokens, targets)
        return calibrate(model, tokens, targets)

    monkeypatch.setattr(reward.Bag, "fit", spy_fit)
    monkeypatch.setattr(reward, "classifier_loss", spy_loss)
    monkeypatch.setattr(reward, "calibrate", spy_calibrate)
    _, tokenizer = train.data_stage(args, corpus(args))
    rated, pretrained = train.rated_passages(args, tokenizer), load(study, "pretrain")
    for name in ("reward", "judge"):
        train.reward_stage(args, name, pretrained, rated, tokenizer)

    def wanted(part):
        rows = rated["rows"][part]
        ratings = [(rating + 2) / 4 for rating in rated["ratings"][rows].tolist()]
        return list(zip(map(tuple, rated["tokens"][rows].tolist()), ratings))
    assert seen["reward"] == wanted("reward") and len({target for _, target in seen["reward"]}) > 3
    assert set(seen["judge"]) <= set(wanted("judge")), "the judge has read others' passages"
    assert len(set(seen["judge"])) > 0.9 * len(set(wanted("judge"))), "12 batches of 32 reach most"
    assert seen["choose bag"] == seen["choose trunk"] == wanted("choose")
    n = TOY["judge_steps"]
    rates = [round(min(1, (i + 1) / 20) * (1 - i / n), 6) for i in range(n)]
    assert steps == [(rate, 1.0) for rate in rates], "rates and clips of the judge"


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_the_constants_of_the_score_are_those_of_the_samples_of_rho(study, name):
    """score = (log p - mean) / std: mean 0, deviation 1 over the samples saved with the model."""
    rho, state = load(study, "rho"), load(study, name)
    tokens, log_odds = rho["tokens"].long(), rho["log_odds"][name]
    assert tokens.shape == (512, 16), "512 samples of 16 tokens were asked for"
    for toward, constants in rho["constants"][name].items():
        scores = reward.score(log_odds, **constants, toward=toward)
        assert_close([scores.mean().item(), scores.std().item()], [0.0, 1.0], toward, atol=1e-4,
                     rtol=0)
    assert_close(reward.load_reward(state)(tokens), log_odds, "the saved model judges otherwise",
                 atol=0.08, rtol=0)


# ---- PPO ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def negative(study, texts, tmp_path_factory):
    """A study toward negative that drifts far, and what its policy was before each step."""
    import shutil
    out = shutil.copytree(study, tmp_path_factory.mktemp("negative") / "out")
    (out / "ppo_negative_beta0.02_kl99.pt").touch()     # kept by some earlier run
    befores, batches, step = [], [], ppo.PPO.step

    def spy(self, i):
        befores.append(copy.deepcopy(self.policy.state_dict()))
        metrics = step(self, i)
        batches.append(self.batch["tokens"])
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.PPO, "step", spy)
        patch.setattr(ppo, "MIN_ESS", 0)        # J* is logged though few samples know it
        arguments = argv(texts, out, "--toward", "negative", "--beta", 0.02, *DRIFTING)
        assert run_script(train, *arguments) == 0
    return out, befores, batches


def test_what_two_models_say_of_each_batch_and_of_fresh_samples(negative):
    """score, positive by the reward model, judge by the judge, each with constants of its own."""
    out, _, batches = negative
    run, rho = load(out, "ppo_negative_beta0.02"), load(out, "rho")
    models = {name: reward.load_reward(load(out, name)) for name in ("reward", "judge")}
    for row, tokens in zip(run["history"], batches):
        for key, name in (("score", "reward"), ("judge", "judge")):
            scores = reward.score(models[name](tokens), **rho["constants"][name]["negative"],
                                  toward="negative")
            assert_close(row[key], scores.mean().item(), key, atol=0.05, rtol=0)
        p = models["reward"](tokens).sigmoid().mean().item()
        assert_close(row["positive"], p, "P(positive)", atol=0.02, rtol=0)
    tokens = run["fresh"]["tokens"].long()
    for key, name in (("log_odds", "reward"), ("judge", "judge")):
        assert_close(run["fresh"][key], models[name](tokens), key, atol=0.05, rtol=0)


def test_the_negative_twin_has_its_own_files_and_grows_negative(study, negative):
    """It is rewarded for log P(negative); its samples are less positive than rho's by 5 errors."""
    out, *_ = negative
    run, samples = load(out, "ppo_negative_beta0.02"), load(out, "rho")
    assert content(out / "ppo_beta2.pt") == content(study / "ppo_beta2.pt"), "its twin was touched"
    rho, fresh = samples["log_odds"]["reward"].sigmoid(), run["fresh"]["log_odds"].sigmoid()
    se = math.hypot(*(x.std().item() / len(x) ** 0.5 for x in (rho, fresh)))
    assert rho.mean() - fresh.mean() > 5 * se, "it should drift toward negative"
    # J* of the same samples: score = (log P(negative) - mean) / std.
    logp = (1 - rho.double()).log()
    scores = (logp - logp.mean()) / logp.std()
    best = 0.02 * ((scores / 0.02).logsumexp(0) - math.log(len(scores)))
    assert_close(run["history"][0]["optimum"], best.item(), "J*", atol=1e-3, rtol=1e-3)
    assert_close(run["history"][0]["positive"], rho.mean().item(), "P(positive) of the first batch",
                 atol=4 * rho.std().item() / 32 ** 0.5, rtol=0)
    assert run["toward"] == "negative"


def test_policies_are_kept_where_their_drift_was_measured(negative):
    """A mark's file is the policy that drew the first batch whose drift passed it."""
    out, befores, _ = negative
    history = load(out, "ppo_negative_beta0.02")["history"]
    drifts = [row["exact_kl"] for row in history]
    kept = {float(path.stem.split("_kl")[1]) for path in out.glob("ppo_negative*_kl*")}
    assert kept == {mark for mark in train.KL_MARKS if max(drifts) >= mark}, "marks passed"
    assert len(kept) > 3
    for mark in kept:
        state = load(out, f"ppo_negative_beta0.02_kl{mark:g}")
        first = next(i for i, kl in enumerate(drifts) if kl >= mark)
        dtype = state["model"]["embed.weight"].dtype
        assert torch.equal(state["model"]["embed.weight"],
                           befores[first]["embed.weight"].to(dtype)), "another step's policy"


def test_a_mark_is_kept_once_and_ten_nats_are_warned_of(tmp_path, capsys):
    """The first time the drift passes it, though the drift may come back and pass it again."""
    args, history = SimpleNamespace(out=tmp_path, dtype=torch.float32), []
    for i, kl in enumerate([0.1, 1.5, 0.4, 3.0, 9.9, 10.1, 5.0, 11.0]):
        train.keep_along_kl(args, "run", {"i": torch.tensor(i)}, history, kl, {})
        history.append({"exact_kl": kl})
        warned = "warning: the drift has passed 10 nats" in capsys.readouterr().out
        assert warned == (i == 5), f"at {kl} nats"
    kept = {path.stem: int(data.load_checkpoint(path)["model"]["i"]) for path in tmp_path.iterdir()}
    assert kept == {"run_kl0.5": 1, "run_kl1": 1, "run_kl2": 3, "run_kl4": 4, "run_kl6": 4,
                    "run_kl8": 4, "run_kl10": 5}


def test_a_run_stops_at_its_kl_with_the_policy_that_was_measured(texts, again, monkeypatch):
    """Not with what the last update, which nobody measured, made of it."""
    befores, step = [], ppo.PPO.step

    def spy(self, i):
        befores.append(self.policy.embed.weight.detach().clone())
        return step(self, i)

    monkeypatch.setattr(ppo.PPO, "step", spy)
    run_script(train, *argv(texts, again, "--beta", 0.3, *DRIFTING, "--stop-at-kl", 0.5))
    run = load(again, "ppo_beta0.3")
    drifts = [row["exact_kl"] for row in run["history"]]
    assert 1 < len(drifts) < 8 and drifts[-1] >= 0.5 > max(drifts[:-1]), f"drifts: {drifts}"
    assert torch.equal(run["model"]["embed.weight"], befores[-1]), "an update too far"
    kl = run["fresh"]["exact_kl"]
    assert_close(kl.mean().item(), drifts[-1], "the drift of fresh samples", rtol=0.5, atol=0)


def test_drift_is_measured_over_whole_distributions(study, negative):
    """log pi - log rho of each completion, and its exact KL, by a forward pass over each prefix."""
    out, *_ = negative
    run = load(out, "ppo_negative_beta0.02")
    tokens, start = run["fresh"]["tokens"].long()[:5], 10
    policy, rho = (gpt.load_gpt(state) for state in (run, load(study, "pretrain")))
    prompts = torch.tensor([[start]])
    # What stands in the place of no token counts for nothing.
    tokens[0, 9:] = gpt.PAD
    found = train.measure_drift(policy, rho, prompts.expand(5, 1), tokens)
    ratio, kl = torch.zeros(5), torch.zeros(5)
    with torch.no_grad():
        for b, t in itertools.product(range(5), range(16)):
            if b == 0 and t >= 9:
                continue
            prefix = torch.cat((torch.tensor([start]), tokens[b, :t]))[None]
            p, q = (model(prefix)[0, -1].float().log_softmax(-1) for model in (policy, rho))
            ratio[b] += (p - q)[tokens[b, t]]
            kl[b] += torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    assert_close(found["log_ratio"], ratio, "log pi - log rho", atol=1e-3, rtol=0)
    assert_close(found["exact_kl"], kl, "KL(pi to rho)", atol=1e-3, rtol=0)


def test_distinct_pairs_by_hand():
    """01 12 23 | 01 12 23 | 01 10 04: of nine pairs five are distinct."""
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 4]])
    assert_close(train.distinct_pairs(tokens), 5 / 9, "share")
    tokens[1, 2:] = tokens[2, 1:] = gpt.PAD
    assert_close(train.distinct_pairs(tokens), 3 / 4, "01 12 23 | 01: what is no token is no pair")


# ---- the whole ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_holds_its_metrics_and_can_stand_alone(study, name):
    """metrics.jsonl is the history, a line an iteration; weights, config, options are in it."""
    state, metrics = load(study, name), study / f"{name}.metrics.jsonl"
    if name in ("data", "rho"):
        return
    assert {"model", "config", "tokenizer", "args", "inputs"} <= set(state), "what rebuilds it"
    if name == "reward":        # fitted at once, without steps
        assert state["history"] == [] and not metrics.exists()
        return
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == state["history"]
    if name.startswith("ppo"):
        rows = state["history"]
        assert [row["step"] for row in rows] == [1, 2, 3], "a line an iteration"
        assert all(math.isfinite(x) for row in rows for x in row.values())
        assert rows[0]["ref_kl"] == rows[0]["exact_kl"] == 0, "the first rollout is rho's own"
        for stage in ("pretrain", "reward", "judge"):
            digest = data.digest(load(study, stage)["model"])
            assert state["inputs"][stage] == digest, f"PPO changed {stage}.pt"


@pytest.mark.parametrize("changed, again_done", [
    (None, set()),
    (ppo, {"ppo_beta0.5", "ppo_beta2"}),
    (reward, {"reward", "judge", "rho", "ppo_beta0.5", "ppo_beta2"}),
    (train.measure_drift, {"ppo_beta0.5", "ppo_beta2"}),
    (train.pretrain_stage, {"pretrain"}),
    (data.train_bpe, {"data"}),
    (gpt, {"pretrain", "reward", "judge", "rho", "ppo_beta0.5", "ppo_beta2"}),
], ids=lambda x: getattr(x, "__name__", "nothing") if not isinstance(x, set) else "")
def test_an_edit_repeats_the_stages_that_run_the_code_alone(redone, monkeypatch, changed,
                                                            again_done):
    """And --keep none: what is done again comes out the same, so the next stage's input stands."""
    digests = train.source_digests
    monkeypatch.setattr(train, "source_digests", lambda code: {
        **digests(code), **{"edited.py": "anew" for thing in code if thing is changed}})
    assert redone("--keep", "--until", "ppo")[0] == set(), "--keep should reuse all"
    names, said = redone("--until", "ppo")
    assert names == again_done and said.count("done again") == len(again_done), said


@pytest.mark.parametrize("option, value", [("--iterations", 2), ("--stop-at-kl", 1000)])
def test_other_options_of_ppo_repeat_ppo_alone_and_say_so(redone, again, option, value):
    """Each stage depends on its own inputs only."""
    names, said = redone(option, value, "--until", "ppo")
    assert names == {"ppo_beta0.5", "ppo_beta2"}
    changed = option[2:].replace("-", "_")
    assert f"ppo_beta2.pt: {changed} changed, so this stage is done again" in said, said


def test_more_samples_to_measure_on_do_not_change_training(redone, again, study, monkeypatch):
    """They have their own random stream; history and weights stay the same to the last bit."""
    monkeypatch.setitem(TOY, "fresh_samples", 40)
    redone("--until", "ppo")
    before, after = (content(folder / "ppo_beta2.pt") for folder in (study, again))
    assert len(load(again, "ppo_beta2")["fresh"]["tokens"]) == 40
    assert (after["model"], after["history"]) == (before["model"], before["history"])


def test_a_lost_tokenizer_is_made_again_just_the_same(redone, again, study):
    """The file is a function of corpus and --vocab-size, so no later stage is done again."""
    name = "tokenizer.tiktoken"
    (again / name).unlink()
    assert redone("--until", "ppo")[0] == {"data"}, "more than data.pt was done again"
    assert (again / name).read_bytes() == (study / name).read_bytes()


@pytest.mark.parametrize("last, files", [("pretrain", STAGES[:2]), ("reward", STAGES[:4])])
def test_a_run_ends_after_the_stage_asked_for(texts, tmp_path, last, files):
    """--until."""
    assert run_script(train, *argv(texts, tmp_path, "--until", last)) == 0
    assert {path.stem for path in tmp_path.glob("*.pt")} == set(files)


# ---- kills, Ctrl-C, NaN -------------------------------------------------------------------

def train_and_die(arguments, log, moment):
    """train.py in a process of its own, killed at the moment-th instant that hurts (0: never).

    Those are before and after each fsync and rename, in the middle of writing a file, when a crash
    would leave it half written. SIGKILL cannot be caught.
    """
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a")
    countdown = itertools.count(moment, -1)

    def instant():
        if next(countdown) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("fsync", "replace"):
        def dangerous(*inputs, real=getattr(os, name)):
            instant()
            real(*inputs)
            instant()
        setattr(os, name, dangerous)
    sys.exit(run_script(train, *arguments))


@pytest.fixture(scope="session")
def killed(texts, tmp_path_factory):
    """The folder of a study killed ten times, in all its stages, and saved at every step."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this machine cannot fork")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "sample", "torch._dynamo"])     # imported once
    folder = tmp_path_factory.mktemp("killed")
    arguments = argv(texts, folder / "out", "--checkpoint-every", 0, "--until", "ppo")
    for moment in (13, 50, 39, 45, 50, 10, 30, 12, 9, 5, 0):
        process = server.Process(target=train_and_die, args=(arguments, folder / "log", moment))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if moment else 0), (folder / "log").read_text()
    return folder


@pytest.mark.parametrize("name", STAGES)
def test_a_study_killed_ten_times_ends_with_the_same_bits(study, killed, name):
    """Weights, samples and history equal those of the study that was left in peace."""
    assert content(killed / "out" / f"{name}.pt") == content(study / f"{name}.pt")
    metrics = f"{name}.metrics.jsonl"
    if name not in ("data", "reward", "rho"):
        assert (killed / "out" / metrics).read_bytes() == (study / metrics).read_bytes()


def test_the_kills_hit_every_kind_of_stage_and_leave_no_litter(killed):
    """Else the test above shows nothing."""
    log = (killed / "log").read_text()
    for name in ("pretrain", "judge", "ppo_beta"):
        assert re.search(rf"{name}\S*\.pt: going on after step", log), f"no kill fell into {name}"
    litter = [path.name for path in (killed / "out").iterdir()
              if "tmp" in path.name or "partial" in path.name]
    assert not litter, f"files of killed runs are left: {litter}"


@pytest.mark.parametrize("fault, code, says", [
    (KeyboardInterrupt, 130, "run the same command again"),
    (math.nan, 2, "iteration 3: scores"),
], ids=["Ctrl-C", "NaN"])
def test_a_stopped_study_keeps_the_last_good_checkpoint(texts, study, again, command, monkeypatch,
                                                        fault, code, says):
    """One line says what and what to do; once its cause is gone, the run ends in the same bits."""
    rollout, iteration = ppo.PPO.rollout, itertools.count()

    def spoilt(self, n):
        batch = rollout(self, n)
        if next(iteration) == 2:
            if fault is KeyboardInterrupt:
                raise fault
            batch["scores"][0] = fault
        return batch

    (again / "ppo_beta2.pt").unlink()
    arguments = argv(texts, again, "--until", "ppo", "--checkpoint-every", 0)
    with monkeypatch.context() as patch:
        patch.setattr(ppo.PPO, "rollout", spoilt)
        got, _, err = command(train, *arguments)
    assert got == code and says in err and len(err.strip().splitlines()) == 1, err
    got, out, _ = command(train, *arguments)
    assert got == 0 and "ppo_beta2.pt: going on after step 2 of 3" in out, out
    assert content(again / "ppo_beta2.pt") == content(study / "ppo_beta2.pt"), "another policy"


# ---- bad input: exit code 2, one line, no traceback ---------------------------------------

@pytest.mark.parametrize("options, says", [
    ("--nonsense", "unrecognized arguments: --nonsense"),
    ("--beta -1", "-1 is not from 0 to 10"),
    ("--beta much", "invalid float value: 'much'"),
    ("--beta nan", "nan is not from"),
    ("--beta", "expected at least one argument"),
    ("--size huge", "invalid choice: 'huge'"),
    ("--toward sad", "invalid choice: 'sad'"),
    ("--until end", "invalid choice: 'end'"),
    ("--algorithm reinforce", "invalid choice: 'reinforce'"),
    ("--iterations 0", "0 is not from 1"),
    ("--iterations 1.5", "invalid int value"),
    ("--seed -1", "-1 is not from 0"),
    ("--lam -1", "-1 is not from 0 to"),
    ("--stop-at-kl -1", "-1 is not from 0"),
    ("--length 80", "to 79, or it leaves the context"),
    ("--length 7", "must be from 8"),
    ("--adaptive-kl-target 5 --adaptive-kl-horizon 6.4", "must be above 0.2 of --batch, 6.4"),
    ("--vocab-size 256", "256 is not from 257"),
    ("--vocab-size 60000", "Give more text or a smaller --vocab-size"),
    ("--device meta", "invalid choice: 'meta'"),
    pytest.param("--device cuda", "torch sees no CUDA device", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
    ("--out play.txt", "cannot use the folder play.txt: File exists"),
    ("--out play.txt/out", "cannot use the folder play.txt/out: Not a directory"),
    ("--corpus none.txt", "corpus none.txt: No such file or directory"),
    ("--corpus labels.csv", "characters, too few to learn from"),
    ("--labels none.csv", "labels none.csv: No such file or directory"),
    ("--labels play.txt", ": the first line must name the columns"),
    ("--labels few.csv", "too few passages to train and to measure on"),
    ("--labels labels.csv bad.csv", "bad.csv line 3: could not convert string to float: good"),
])
def test_bad_options_are_explained(texts, study, command, monkeypatch, tmp_path, options, says):
    """What an option takes is said where it is given; nothing is trained first."""
    for name in ("play.txt", "labels.csv"):
        (tmp_path / name).write_bytes((texts / name).read_bytes())
    (tmp_path / "few.csv").write_text("text,rating\nlove,1\ngrief,-1\n")
    (tmp_path / "bad.csv").write_text("text,rating\nlove,1\ngrief,good\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "pretrain_stage", lambda *args: pytest.fail("trained on bad input"))
    explains(command(train, *argv(tmp_path, "out", *options.split())), says.replace(
        "good", "'good'"))


def cut(path):
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def other_tokenizer(path):
    """Exchange the last two tokens of a tokenizer."""
    lines = path.read_bytes().split(b"\n")
    first, second = (line.split(b" ")[0] for line in lines[-3:-1])
    path.write_bytes(b"\n".join([*lines[:-3], second + b" 298", first + b" 299", b""]))


@pytest.mark.parametrize("name, damage, says", [
    ("pretrain.pt", cut, "pretrain.pt is damaged"),
    ("reward.pt", lambda path: path.write_bytes(b""), "reward.pt is damaged"),
    ("ppo_beta2.pt", lambda path: torch.save({"some": "weights"}, path),
     "was not written by this project"),
    ("judge.pt", lambda path: torch.save({"kind": "judge", "model": os.path.join}, path),
     "could run code"),
    ("tokenizer.tiktoken", cut, "tokenizer"),
    ("tokenizer.tiktoken", other_tokenizer, "was made with another tokenizer"),
], ids=["cut", "empty", "not ours", "code", "tokenizer cut", "another tokenizer"])
def test_a_damaged_file_is_explained(texts, again, command, name, damage, says):
    """By the next run that reads it."""
    damage(again / name)
    explains(command(train, *argv(texts, again)), says)


@pytest.mark.network
def test_the_tiny_study_of_the_plays(tmp_path):
    """python train.py --size tiny, half a minute: the shipped labels on the downloaded plays."""
    arguments = ["--size", "tiny", "--device", "cpu", "--out", tmp_path]
    assert run_script(train, *arguments) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["pretrain"]["val_bits_per_byte"] < 4, "150 steps compress the plays below 4"
    assert summary["reward"]["val_pearson"] > 0.4, "counting kind words does better"
    assert summary["ppo"][0]["objective"] > -1, "PPO spoilt the policy"
