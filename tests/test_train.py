"""The study: options, keys, the loop that remembers, kills, bad input."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import gpt
import ppo
import reward
import train
from conftest import argv, assert_close, content, explains, load, run_script, toy_options

PPO = {"ppo_beta0.5", "ppo_beta2"}
# What each stage's change does again: itself, and all that is built on it.
AFTER = {"ppo": PPO, "rho": {"rho", *PPO}, "judge": {"judge", "rho", *PPO},
         "reward": {"reward", "rho", *PPO},
         "pretrain": {"pretrain", "reward", "judge", "rho", *PPO},
         "data": {"data", "pretrain", "reward", "judge", "rho", *PPO}}
ALL = AFTER["data"]


STEPS = 6


def fake_stage(out, before=lambda i: None, after=lambda i: None, every=-1.0, seed=3, lr=0.1):
    """A stage that uses all that a stage may: Adam's moments and torch's global random stream.
    before(i) and after(i) are called around the update of step i, to interrupt it."""
    def fit(options, loop):
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
        for i in loop.steps(STEPS, model=model, optimizer=optimizer):
            before(i)
            x = torch.randn(8, 3)
            loss = (model(x) - x.sum(1, keepdim=True) + torch.randn(8, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after(i)
            if i % 2:
                loop.log(loss=loss.item())
        return {"model": model.state_dict(), "drawn": torch.rand(3)}
    fit.__module__ = "data"

    args = SimpleNamespace(out=out, seed=seed, keep=False, size="tiny", dtype=torch.float32,
                           device=torch.device("cpu"))
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_EVERY", every)
        return train.run(args, "fake", fit, lr=lr)


def same_result(out, state, whole):
    """The stage in out ended in the same bits as whole, one never cut off, and cleaned up."""
    for name, weight in whole["model"].items():
        assert torch.equal(state["model"][name], weight), f"{name} differs from the whole run's"
    assert torch.equal(state["drawn"], whole["drawn"]), "what is drawn after the last step differs"
    assert state["history"] == whole["history"], "metrics differ from the whole run's"
    lines = (out / "fake.metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole["history"], "the metrics file differs"
    assert {path.name for path in out.iterdir()} == {"fake.pt", "fake.metrics.jsonl"}, "litter"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    return fake_stage(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("every", [-1.0, 1e9], ids=["saved each step", "never saved"])
@pytest.mark.parametrize("i", range(STEPS))
def test_a_stage_cut_off_at_any_step_resumes_to_the_same_bits(tmp_path, whole, i, every):
    """Weights and metrics equal the whole run's, though the cut came after step i's update."""
    def cut(step):
        if step == i:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        fake_stage(tmp_path, after=cut, every=every)
    left = [path.name for path in tmp_path.glob("*.pt")]
    assert left == ["fake_partial.pt"] * (every < 0 < i), "an unfinished stage leaves a partial one"
    done = []
    same_result(tmp_path, fake_stage(tmp_path, before=done.append), whole)
    assert done == list(range(i if every < 0 else 0, STEPS)), "the wrong steps were done again"
    (tmp_path / "fake_partial.pt").touch()      # as a kill at the very end leaves it
    (tmp_path / "fake.metrics.jsonl").write_text("of a run of other options, broken off")
    data.save_checkpoint(tmp_path / "fake_after1.pt", {"kind": "fake", "key": "of that run, too"})
    same_result(tmp_path, fake_stage(tmp_path, before=lambda i: pytest.fail("done again")), whole)


def test_seconds_before_a_cut_count(tmp_path, monkeypatch, capsys):
    """Also for the time left; of steps of 16 s every second one is saved."""
    now, saved = [0.0], []
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stage = train.Stage(tmp_path / "fake.pt", inputs={})
    stage.keep("_partial", kind="partial", parts={}, step=3, rng=torch.get_rng_state(), seconds=1e3)
    for i in stage.steps(8):
        saved.append((i, load(tmp_path, "fake_partial")["step"]))
        now[0] += 16
        stage.log()
    assert saved == [(3, 3), (4, 3), (5, 5), (6, 5), (7, 7)] and stage.keep()["seconds"] == 1080
    assert re.findall(r"(\d)/8 +(\d+) s left", capsys.readouterr().out)[::2] == [
        ("4", "1016"), ("6", "349"), ("8", "0")]


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_fetches_the_plays_and_reports(texts, again, monkeypatch, first):
    """The others wait until it has fetched them, and report nothing."""
    calls = []
    monkeypatch.setattr(data, "is_first_process", lambda: first)
    for module, name in ((gpt, "barrier"), (data, "load_corpus"), (train.sample, "report")):
        monkeypatch.setattr(module, name, lambda x, name=name, real=getattr(module, name): (
            calls.append(name) or (real(x) if name == "load_corpus" else None)))
    assert run_script(train, *argv(texts, again)) == 0
    fetched = ["load_corpus", "barrier"]
    assert calls == ([*fetched, "barrier", "report"] if first else ["barrier", *fetched])


@pytest.mark.parametrize("inputs", [{"lr": 0.2}, {"lr": 0.2, "seed": 4}])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "cut off"])
def test_a_stage_whose_inputs_changed_is_done_again(tmp_path, capsys, inputs, finished):
    """As if nothing had been there: the same bits as in an empty folder. It says what changed."""
    def cut(i):
        if not finished and i == 3:
            raise RuntimeError
    fresh = fake_stage(tmp_path / "new", **inputs)
    with contextlib.suppress(RuntimeError):
        fake_stage(tmp_path / "old", before=cut)
    capsys.readouterr()
    same_result(tmp_path / "old", fake_stage(tmp_path / "old", **inputs), fresh)
    assert f": {', '.join(inputs)} changed, so this stage is done" in capsys.readouterr().out


def test_the_seed_of_a_stage_decides_its_result(tmp_path, whole):
    """Another seed, other weights; the same seed the same, whatever torch drew before."""
    torch.rand(5)
    again, other = fake_stage(tmp_path / "again"), fake_stage(tmp_path / "other", seed=4)
    assert_close(again["model"], whole["model"], "the seed does not decide", atol=0, rtol=0)
    assert not torch.equal(other["model"]["weight"], whole["model"]["weight"]), "one for all seeds"


FUNCTIONS = [(data, "prepare"), (gpt, "pretrain"), (reward, "fit_reward"), (reward, "fit_judge"),
             (ppo, "sample_reference"), (ppo, "tune")]


@pytest.fixture
def home(texts, monkeypatch, tmp_path):
    """A folder with copies of the scripts, labels/ and the texts, where train.py looks for them."""
    folder = shutil.copytree(texts, tmp_path / "home")
    for path in data.HERE.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(data.HERE / "labels", folder / "labels")
    monkeypatch.setattr(data, "HERE", folder)
    return folder


@pytest.fixture
def edit(home, monkeypatch):
    """edit(file, regular expression, text): replace the first match in a file of home."""
    def edit(file, pattern, new):
        text, n = re.subn(pattern, new, (home / file).read_text(), count=1)
        assert n, f"{file} has no {pattern}"
        (home / file).write_text(text)
        if file[:-3] in train.SOURCES:      # a new process would read it
            monkeypatch.setitem(train.SOURCES, file[:-3], train.source(file))
    return edit


@pytest.fixture
def redone(home, study, again, monkeypatch, capsys):
    """redone(argument ...) -> {stage that the finished study does again: its seed}, what it said.
    The seed is that of torch's global stream, from which the stage has yet to draw.
    A stage's old results stand in for its work: the question is which run, not what they do."""
    seeds, about = {}, ("kind", "key", "inputs", "size", "history", "seconds")

    def old_results(options, *inputs):
        name = inputs[-1].path.stem
        seeds[name] = torch.initial_seed()
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(seeds[name]).get_state())
        state = load(study, name.replace("negative_", ""))
        return {key: x for key, x in state.items() if key not in about}

    for module, name in FUNCTIONS:
        wraps = functools.wraps(getattr(module, name))
        monkeypatch.setattr(module, name, wraps(functools.partial(old_results)))

    def run(*more):
        seeds.clear()
        capsys.readouterr()
        assert run_script(train, *argv(home, again, "--until", "ppo", *more)) == 0
        return dict(seeds), capsys.readouterr().out
    return run


RETURN = r"\n    return ", "\n    return 0 or "
WORDS = r'((def|class) .*:\n +""")', r"\1Other words. "


@pytest.mark.parametrize("file, pattern, new, stages", [
    ("data.py", "LONGEST_PROMPT = 32", "LONGEST_PROMPT = 31", ALL),
    ("data.py", *RETURN, ALL), ("gpt.py", *RETURN, AFTER["pretrain"]),
    ("reward.py", *RETURN, AFTER["reward"] | AFTER["judge"]), ("ppo.py", *RETURN, AFTER["rho"]),
    ("train.py", *RETURN, set()), ("sample.py", *RETURN, set()),
    ("data.py", '"""', '"""Other words. ', set()),
    ("gpt.py", *WORDS, set()), ("reward.py", *WORDS, set()),
    ("ppo.py", r"\n\n\n", "\n\n# A comment.\n\n\n", set()),
    ("ppo.py", r'endswith\("!"\)', 'endswith("?")', set()),       # one's own reward
    ("labels/words.csv", "love,.*", "love,-2", AFTER["reward"] | AFTER["judge"]),
    ("labels.csv", r'",.*', '",1.25', AFTER["reward"] | AFTER["judge"]),
    ("play.txt", "Love", "Death", ALL)])
def test_an_edit_repeats_exactly_what_depends_on_it(redone, edit, file, pattern, new, stages):
    """Functions, constants and texts do; comments and docstrings do not; then all is up to date."""
    assert redone()[0] == {}, "the same once more"
    edit(file, pattern, new)
    names, said = redone()
    assert set(names) == stages and said.count("done again") == len(stages), said
    assert redone()[0] == {}, "done again, it holds"


def other_value(option):
    """A legal value of an option that is not the toy study's."""
    if isinstance(option.tiny, str):
        return next(x for x in option.choices if x != option.tiny)
    return option.tiny * (2 if isinstance(option.tiny, int) else 0.5) or 1


def test_another_precision_does_all_again(redone, monkeypatch):
    """As --fp32 does where bfloat16 is fast."""
    usual = gpt.compute_dtype(torch.device("cpu"))
    other = torch.float32 if usual == torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr(gpt, "compute_dtype", lambda device: other)
    assert set(redone()[0]) == ALL


@pytest.mark.parametrize("option", toy_options(), ids=lambda option: option.name)
def test_another_option_repeats_its_stages_and_all_that_is_built_on_them(redone, option):
    """And no other; what it says names the option."""
    names, said = redone("--" + option.name.replace("_", "-"), other_value(option))
    names = {name.replace("_negative", "") for name in names}
    assert names == set().union(*(AFTER[kind] for kind in option.stages.split()))
    if option.name != "toward":                 # whose runs have files of their own
        assert re.search(rf"{option.stages.split()[0]}\S*\.pt: {option.name} changed", said), said


def test_keep_reuses_all_but_what_options_changed(redone, edit):
    """An edit of every script costs nothing with --keep, and all without."""
    for file in ("data", "gpt", "reward", "ppo"):
        edit(f"{file}.py", *RETURN)
    assert redone("--keep")[0] == {}
    assert set(redone("--keep", "--clip", 0.3)[0]) == PPO
    assert set(redone("--clip", 0.3)[0]) == ALL


def test_an_edit_during_a_run_is_the_next_runs(redone, home, monkeypatch):
    """The code that runs is that of the start, so the next run must notice the edit."""
    with monkeypatch.context() as patch:
        edited = (home / "ppo.py").read_text() + "LIMIT = 1\n"
        patch.setattr(gpt, "pretrain", functools.wraps(gpt.pretrain)(
            lambda *inputs, old=gpt.pretrain:
            (home / "ppo.py").write_text(edited) and old(*inputs)))
        assert set(redone("--pretrain-steps", 31)[0]) == AFTER["pretrain"]
    monkeypatch.setitem(train.SOURCES, "ppo", train.source("ppo.py"))
    assert set(redone("--pretrain-steps", 31)[0]) == AFTER["rho"]


def test_every_stage_beta_and_seed_has_random_numbers_of_its_own(redone):
    """No two uses share a seed."""
    seeds = [seed for i in range(1, 5) for seed in redone("--seed", i)[0].values()]
    assert len(set(seeds)) == len(seeds) == 4 * len(ALL)


def test_the_defaults_of_ppo_are_those_of_size_small():
    """PPOConfig() is what --size small runs; every setting has an option."""
    small = {option.name: option.small for option in train.OPTIONS}
    small["beta"], = train.parse(["--device", "cpu"]).beta
    for name, value in dataclasses.asdict(ppo.PPOConfig()).items():
        assert value == small[name] and type(value) is type(small[name]), name


def test_a_row_of_the_table_has_a_value_for_each_size_or_one_for_all():
    """Whole numbers stay so; of words the first is the default, and no other is taken."""
    rows = [row for row in train.OPTIONS if row.name in ("n_embd", "adaptive_kl_horizon", "task")]
    says = "sample without a prompt, or continue openings (speeches|continue)"
    assert rows == [
        ("pretrain", "n_embd", 64, 256, 512, None, "width of the transformer (64 256 512)"),
        ("rho", "task", *["speeches"] * 3, ["speeches", "continue"], says),
        ("ppo", "adaptive_kl_horizon", 1e4, 1e4, 1e4, None,
         "completions in which that beta may change by a fifth (1e4)")]
    assert [type(row.tiny) for row in rows] == [int, str, float]


@pytest.mark.parametrize("size", train.SIZES)
def test_a_size_sets_what_is_not_given(size):
    """An option beats the size; a CPU's default is small; --fp32 beats the device's own dtype."""
    args = train.parse(["--size", size, "--batch", "100", "--device", "cpu", "--fp32"])
    for option in train.OPTIONS:
        wanted = 100 if option.name == "batch" else getattr(option, size)
        assert getattr(args, option.name) == wanted, option.name
    assert args.dtype == torch.float32
    assert train.parse(["--device", "cpu"]).size == "small"


def test_help_tells_the_reason_for_every_option_and_its_values(capsys):
    """The row of the table as it is there."""
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in train.OPTIONS:
        assert option.why in text and option.why.endswith(")"), option.name


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_checkpoint_holds_its_metrics_and_can_stand_alone(study, name):
    """metrics.jsonl is the history, a line an iteration; weights and vocabulary are in it."""
    state, metrics = load(study, name), study / f"{name}.metrics.jsonl"
    assert state["size"] == "tiny" and state["inputs"]["device"] == "cpu"
    if name not in ("data", "rho"):
        assert {"model", "config", "vocabulary", "seconds"} <= set(state), "what rebuilds it"
    if name not in {"pretrain"} | PPO:          # made at once, without steps
        assert state["history"] == [] and not metrics.exists()
        return
    rows = state["history"]
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == rows
    if name in PPO:
        assert name == f"ppo_beta{state['inputs']['beta']:g}", "another beta's"
        assert [row["step"] for row in rows] == [1, 2, 3], "a line an iteration"
        assert all(math.isfinite(x) for row in rows for x in row.values())
        assert rows[0]["ref_kl"] == rows[0]["exact_kl"] == 0, "the first rollout is rho's own"


@pytest.mark.parametrize("last, files", [("pretrain", {"data", "pretrain"}),
                                         ("reward", {"data", "pretrain", "reward", "judge"})])
def test_a_run_ends_after_the_stage_asked_for(redone, again, last, files):
    """--until."""
    for path in again.glob("*.pt"):
        path.unlink()
    assert set(redone("--until", last)[0]) == files == {path.stem for path in again.glob("*.pt")}


def train_and_die(arguments, log, name, moment):
    """train.py in a process of its own, killed at the moment-th instant of writing a file name.
    The instants are before and after it is written and renamed. SIGKILL cannot be caught."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a")
    countdown, writing, write_file = itertools.count(moment, -1), [None], data.write_file

    def spy(path, content):
        writing[0] = path.name
        write_file(path, content)

    def instant():
        if name == writing[0] and next(countdown) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    data.write_file = spy
    for owner, function in ((Path, "write_bytes"), (os, "replace")):
        def dangerous(*inputs, real=getattr(owner, function)):
            instant()
            real(*inputs)
            instant()
        setattr(owner, function, dangerous)
    sys.exit(run_script(train, *arguments))


# A write has four instants: step 10 writes 41 to 44 of those of partial checkpoints.
KILLS = [("data.pt", 2), ("pretrain_partial.pt", 43), ("pretrain.metrics.jsonl", 4),
         ("pretrain.pt", 4), ("reward.pt", 3), ("rho.pt", 2), ("ppo_beta0.5_partial.pt", 4),
         ("ppo_beta0.5_after1.pt", 4), ("ppo_beta0.5.metrics.jsonl", 3), ("ppo_beta0.5.pt", 3),
         ("ppo_beta2_partial.pt", 8), ("nothing", 1)]


@pytest.fixture(scope="module")
def killed(texts, tmp_path_factory):
    """The folder of a study killed in every stage, and saved at every step."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this machine cannot fork")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "torch._dynamo"])       # imported once
    folder = tmp_path_factory.mktemp("killed")
    arguments = argv(texts, folder / "out", "--until", "ppo")
    for name, moment in KILLS:
        process = server.Process(target=train_and_die,
                                 args=(arguments, folder / "log", name, moment))
        process.start()
        process.join()
        wanted = 0 if name == "nothing" else -signal.SIGKILL
        assert process.exitcode == wanted, f"{name}: {(folder / 'log').read_text()}"
    return folder


def test_a_study_killed_in_every_stage_ends_with_the_same_bits(study, killed):
    """Weights, samples, history and the policies kept on the way equal those left in peace."""
    names = {path.name for path in study.glob("*.pt")}
    assert "ppo_beta0.5_after1.pt" in names, "policies along the way should be kept"
    for name in names:
        assert content(killed / "out" / name) == content(study / name), name
    for path in study.glob("*.metrics.jsonl"):
        assert (killed / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    log = (killed / "log").read_text()
    for name in ("pretrain", "ppo_beta0.5", "ppo_beta2"):
        assert f"{name}.pt: resuming after step" in log, f"no kill fell into {name}"
    files = {path.name for path in (killed / "out").iterdir()}
    made_by_report = {"figures", "samples", "report.md", "summary.json"}
    assert files == {path.name for path in study.iterdir()} - made_by_report, "litter"


@pytest.mark.parametrize("fault, code, says", [
    (KeyboardInterrupt, 130, "The same command goes on"),
    (math.nan, 2, "scores of the completions are not")], ids=["Ctrl-C", "NaN"])
def test_a_stopped_study_keeps_the_last_good_checkpoint(texts, study, again, command, monkeypatch,
                                                        fault, code, says):
    """One line says what and what to do; once its cause is gone, the run ends in the same bits."""
    read, calls = ppo.PPO.read, itertools.count()

    def spoilt(self, *inputs):
        batch = read(self, *inputs)
        if next(calls) == 8:            # in the third iteration: each reads 4 half minibatches
            if fault is KeyboardInterrupt:
                raise fault
            batch[0][0] = fault         # the first score
        return batch

    (again / "ppo_beta2.pt").unlink()
    arguments = argv(texts, again, "--until", "ppo")
    with monkeypatch.context() as patch:
        patch.setattr(ppo.PPO, "read", spoilt)
        got, _, err = command(train, *arguments)
    assert got == code and says in err and len(err.strip().splitlines()) == 1, err
    got, out, _ = command(train, *arguments)
    assert got == 0 and "ppo_beta2.pt: resuming after step 2 of 3" in out, out
    assert content(again / "ppo_beta2.pt") == content(study / "ppo_beta2.pt"), "another policy"


@pytest.mark.parametrize("options, says", [
    ("--nonsense", "unrecognized arguments: --nonsense"),
    *[(f"--beta {x}", f"argument --beta: invalid float from 0.001 to 10 value: '{x}'")
      for x in (-1, "much", "nan")], ("--size huge", "invalid choice: 'huge'"),
    ("--algorithm a2c", "--algorithm: invalid choice: 'a2c'"),
    *[(f"--seed {x}", f"invalid int from 0 to 1000000000 value: '{x}'") for x in (-1, 1.5)],
    ("--length 0", "--length: invalid int from 1 to 1000000000 value: '0'"),
    *[(f"--{option}", "--group and --rho-samples must be at least 2, --adaptive-kl-horizon --batch")
      for option in ("adaptive-kl-target 3 --adaptive-kl-horizon 31", "group 1", "rho-samples 1")],
    *[(option, "--n-embd must be a multiple of --n-head, and --batch of --group")
      for option in ("--n-head 3", "--group 5")], ("--device meta", "invalid choice: 'meta'"),
    pytest.param("--device cuda", "invalid choice: 'cuda'", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
    ("--out play.txt", "File exists: 'play.txt'. Put that right"),
    ("--corpus none.txt", "No such file or directory: 'none.txt'. Put that right"),
    ("--labels none.csv", "No such file or directory: 'none.csv'. Put that right"),
    ("--labels play.txt", "The columns must be play, first_line, last_line, rating (or"),
    *[(f"--labels {x}.csv", "too few passages to train and to") for x in ("few", "alike")],
    ("--labels labels.csv bad.csv", "bad.csv line 3: could not convert string to float: 'good'"), ])
def test_bad_options_are_explained(texts, command, monkeypatch, tmp_path, options, says):
    """What an option takes is said where it is given; nothing is trained first."""
    shutil.copytree(texts, tmp_path, dirs_exist_ok=True)
    for name, rows in {"few": [f"text {i},{i % 2}" for i in range(25)],     # none for report
                       "alike": [f"text {i},1" for i in range(99)],
                       "bad": ["love,1", "grief,good"]}.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,rating", *rows]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt, "pretrain", lambda *inputs: pytest.fail("trained on bad input"))
    explains(command(train, *argv(tmp_path, "out", *options.split())), says)


def test_a_judge_that_is_not_finite_stops_the_run(texts, again, command, monkeypatch):
    """Its scores are no reward, but they are averaged into metrics and results."""
    (again / "ppo_beta2.pt").unlink()
    monkeypatch.setattr(ppo, "load_scorer", lambda options, state, rho, scorer=ppo.load_scorer: (
        lambda tokens: scorer(options, state, rho)(tokens)
        * (math.nan if state["kind"] == "judge" else 1)))
    explains(command(train, *argv(texts, again, "--until", "ppo")), "scores of the completions are")


def test_a_damaged_checkpoint_is_explained(texts, again, command):
    """By the next run that reads it."""
    (again / "judge.pt").write_bytes((again / "judge.pt").read_bytes()[:5000])
    explains(command(train, *argv(texts, again)), "judge.pt is damaged, of another version, or")


@pytest.mark.network
def test_the_tiny_study_of_the_plays(tmp_path, monkeypatch):
    """python train.py --size tiny: the shipped labels on the downloaded plays."""
    arguments = ["--size", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    data.run(train.main)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["pretrain"]["val_bits_per_byte"] < 4, "150 steps compress the plays below 4"
    assert summary["reward"]["val_pearson"] > 0.4, "counting kind words does better"
    assert summary["ppo"][0]["objective"] > -1, "PPO spoilt the policy"
