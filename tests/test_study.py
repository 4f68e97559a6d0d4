"""One tiny whole run, as its user sees it: files, going on after kills, bad input, the command lines."""

import csv
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import data
import ppo
import reward
import sample
import train
from conftest import assert_close

train.SIZES["toy"] = {"vocab_size": 300, "block_size": 80, "n_layer": 1, "n_head": 2, "n_embd": 32, "pretrain_steps": 30,
                      "reward_steps": 12, "iterations": 3, "batch": 32, "rho_samples": 512, "fresh_samples": 128}
KIND = "love joy sweet merry gentle blessed laughing friend golden dear".split()
SAD = "death grief bloody cruel tears grave traitor poison weeping curse".split()
PLAIN = "the my lord thou and of night a shall king come to that with not her sea morning".split()
STAGES = ["data.pt", "pretrain.pt", "reward.pt", "gold.pt", "ppo_beta0.5.pt", "ppo_beta2.pt"]


# ---- the run ------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder with play.txt, 50 kB of speeches in seeded words, and labels.csv, which counts the kind and sad ones."""
    folder, rng, lines = tmp_path_factory.mktemp("texts"), random.Random(0), []
    while len(lines) < 1800:
        mood = rng.choice([KIND, SAD, PLAIN])
        speech = [" ".join(rng.choices(mood + PLAIN, k=rng.randint(4, 9))).capitalize() + rng.choice(",.;!?") for _ in range(rng.randint(1, 4))]
        lines += [rng.choice(["ORSINO.", "VIOLA.", "SIR TOBY.", "CURIO."]), *speech, ""]
    (folder / "play.txt").write_text("\n".join(lines))
    with open(folder / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["play", "first_line", "last_line", "rating"])
        for first in range(0, 1500, 6):
            words = " ".join(lines[first:first + 6]).lower()
            rating = sum(word in words for word in KIND) - sum(word in words for word in SAD)
            rows.writerow(["play", first + 1, first + 6, max(-2, min(2, rating))])
    return folder


def argv(texts, out, *more):
    """The command line of the tiny study."""
    options = {"--size": "toy", "--device": "cpu", "--length": 16, "--minibatch": 16,
               "--corpus": texts / "play.txt", "--labels": texts / "labels.csv", "--out": out}
    return [str(x) for pair in options.items() for x in pair] + ["--beta", "2", "0.5", *map(str, more)]


@pytest.fixture(scope="session")
def study(texts, tmp_path_factory):
    """The folder of a whole run; look, but do not write."""
    out = tmp_path_factory.mktemp("study") / "out"
    train.main(argv(texts, out))
    return out


@pytest.fixture
def again(study, tmp_path):
    """A copy of that folder, to run in."""
    return shutil.copytree(study, tmp_path / "out")


@pytest.fixture
def command(monkeypatch, capsys):
    """command(script, arguments ...) -> exit code, standard output, standard error, as the shell would have them."""
    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            data.run(script.main)
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()
    return run


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def without_times(x):
    """A summary less its seconds."""
    if isinstance(x, dict):
        return {key: without_times(value) for key, value in x.items() if not key.startswith("seconds")}
    return [without_times(y) for y in x] if isinstance(x, list) else x


def stamps(out):
    """When each checkpoint of a stage was last written."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}


def content(path):
    """What a checkpoint holds but for its times and options: tensors as bytes."""
    def plain(x):
        if isinstance(x, torch.Tensor):
            return x.dtype, x.shape, x.numpy().tobytes()
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items() if key not in ("seconds", "step_seconds", "args")}
        return [plain(y) for y in x] if isinstance(x, (list, tuple)) else x
    return plain(data.load_checkpoint(path))


# ---- what it writes -----------------------------------------------------------------------------

def test_the_study_writes_what_it_promises(study):
    """Checkpoints, a metrics file for each stage, figures, samples, report and summary; nothing half done is left."""
    files = {str(path.relative_to(study)) for path in study.rglob("*") if path.is_file()}
    wanted = {"tokenizer.tiktoken", "report.md", "summary.json", *STAGES, *(name.replace(".pt", ".metrics.jsonl") for name in STAGES),
              *(f"figures/{name}.png" for name in ("pretrain", "reward", "ppo", "collapse", "frontier", "gold")),
              *(f"samples/{name}.txt" for name in ("rho", "ppo_beta0.5", "ppo_beta2"))}
    assert files - {".lock"} == wanted, f"missing: {wanted - files}, unexpected: {files - wanted}"
    assert all((study / name).read_bytes()[:4] == b"\x89PNG" for name in wanted if name.endswith(".png")), "a figure is no PNG"
    report = (study / "report.md").read_text()
    for name in ("frontier", "gold", "ppo", "collapse", "pretrain", "reward"):
        assert f"(figures/{name}.png)" in report, f"the report does not show figures/{name}.png"
    assert (study / "samples" / "rho.txt").read_text().count("Positive Prob: ") == 20, "20 samples of rho, each judged"


def test_the_summary_has_the_keys_that_others_read(study):
    """Those of the README's summary.json; there may be more."""
    summary = summary_of(study)
    keys = {"": "size device seconds pretrain reward ppo", "seconds": "data pretrain reward ppo total",
            "pretrain": "parameters val_bits_per_byte", "reward": "val_pearson val_auc val_log_loss mean std"}
    for part, names in keys.items():
        assert set(names.split()) <= set(summary[part] if part else summary), f"summary.json lacks keys in {part or 'its top level'}"
    assert (summary["size"], summary["device"], list(summary["seconds"]["ppo"])) == ("toy", "cpu", ["0.5", "2"])
    for row in summary["ppo"]:
        assert set("beta iterations score positive ref_kl objective reference_objective optimum fraction_of_optimum "
                   "seconds_per_iteration".split()) <= set(row), "a row of ppo lacks keys"
        assert {"objective", "score", "ref_kl", "ess"} <= set(row["optimum"]), "the optimum lacks keys"
    assert [row["beta"] for row in summary["ppo"]] == [0.5, 2.0] and summary["ppo"][0]["iterations"] == 3


def test_the_numbers_of_the_summary_hang_together(study):
    """J = score - beta KL; fraction = (J - J_rho) / (J* - J_rho); no optimum is quoted below an ess of 100."""
    for row in summary_of(study)["ppo"]:
        found = row["optimum"]
        assert_close(row["objective"], row["score"] - row["beta"] * row["ref_kl"], "J is not score - beta KL", atol=1e-5, rtol=0)
        assert_close(row["reference_objective"], 0.0, "scores are normalised on these very samples of rho", atol=1e-4, rtol=0)
        if found["ess"] < 100:
            assert row["fraction_of_optimum"] is None and found["objective"] is None, "an optimum from too few samples is quoted"
            continue
        assert_close(row["fraction_of_optimum"], (row["objective"] - row["reference_objective"]) / (found["objective"] - row["reference_objective"]),
                     "the fraction is not the share of the way from rho to the optimum")
        assert row["objective"] < found["objective"] + 4 * row["objective_se"], "J lies above J*"
    assert summary_of(study)["ppo"][1]["optimum"]["ess"] >= 100, "beta 2 should be in reach of these samples"


@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_holds_its_metrics_and_can_stand_alone(study, name):
    """metrics.jsonl is the history, a line an iteration; weights, config and options are in the file."""
    state = data.load_checkpoint(study / name)
    rows = [json.loads(line) for line in (study / name.replace(".pt", ".metrics.jsonl")).read_text().splitlines()]
    assert rows == state["history"], "the metrics file and the checkpoint's history differ"
    assert name == "data.pt" or {"model", "config", "tokenizer", "args", "inputs"} <= set(state), "a checkpoint lacks what rebuilds it"
    if name.startswith("ppo"):
        assert [row["step"] for row in rows] == [1, 2, 3], "a line an iteration"
        assert all(math.isfinite(x) for row in rows for x in row.values()), "a metric is not finite"
        assert rows[0]["ref_kl"] == rows[0]["exact_kl"] == 0, "the first rollout is rho's own, so its KL is exactly 0"


def test_the_constants_of_the_score_are_those_of_the_samples_of_rho(study):
    """score = (log p - mean) / std: mean 0 and deviation 1 over the samples that are saved with the reward model."""
    state = data.load_checkpoint(study / "reward.pt")
    assert state["rho"]["tokens"].shape == (512, 16), "512 samples of 16 tokens were asked for"
    scores = reward.score(state["rho"]["log_odds"], state["mean"], state["std"])
    assert_close([scores.mean().item(), scores.std().item()], [0.0, 1.0], "scores of rho are not normalised", atol=1e-4, rtol=0)
    model, tokens = reward.load_reward(state), state["rho"]["tokens"].long()
    assert_close(reward.positive(model, tokens), state["rho"]["log_odds"].sigmoid(), "the saved model judges otherwise", atol=0.02, rtol=0)


def test_reference_and_held_out_passages_stay_out_of_training(study, texts):
    """PPO left pretrain.pt and reward.pt as they were, and no passage is on both sides of the split."""
    inputs = data.load_checkpoint(study / "ppo_beta0.5.pt")["inputs"]
    for stage in ("pretrain", "reward", "gold"):
        assert inputs[stage] == data.digest(data.load_checkpoint(study / f"{stage}.pt")["model"]), f"PPO changed {stage}.pt"
    passages = data.read_labels(texts / "labels.csv", texts / "play.txt")
    held = [rating for text, rating in passages if data.text_fold(text, 30) % 10 == 0]
    assert data.load_checkpoint(study / "reward.pt")["held"]["rating"].tolist() == held, "measured on other passages than those held out"


def test_half_of_the_windows_begin_where_a_speech_does(texts, tmp_path, monkeypatch):
    """Unconditional samples have only the blank line before them, so that context must be seen in training."""
    windows, seen = train.windows, []

    def spy(tokens, starts, length):
        seen.append((tokens, starts))
        return windows(tokens, starts, length)

    monkeypatch.setattr(train, "windows", spy)
    args = train.parse(argv(texts, tmp_path))
    arrays, _, prompt = train.data_stage(args)
    train.pretrain_stage(args, arrays, prompt)
    starts = [starts for tokens, starts in seen if tokens is arrays["train"]]
    assert len(starts) == 30 and all((arrays["train"][rows[::2]] == prompt.item()).all() for rows in starts), "no speech begins there"
    others = arrays["train"][torch.cat([rows[1::2] for rows in starts])]
    assert (others == prompt.item()).float().mean() < 0.5, "the other half should begin anywhere"


def test_supervised_training_follows_its_schedule_after_a_checkpoint_too():
    """Rate = peak * schedule(i); loading an optimizer makes new groups, which must follow as well."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    step = train.descend(model, [optimizer], lambda i: model(torch.ones(1, 1)).sum(), lambda i: 1 / (i + 1), 9, math.inf, dict, every=5)
    for i in range(4):
        step(i)
        assert_close(optimizer.param_groups[0]["lr"], 0.5 / (i + 1), "the rate does not follow its schedule")
        optimizer.load_state_dict(optimizer.state_dict())


def test_the_ratings_of_samples_are_many_and_of_both_kinds():
    """At least 600 completions of rho and 300 of tuned policies, rated from -2 to 2; a quarter by hash is held out."""
    with open(data.HERE / "labels_samples.csv", newline="") as file:
        drawn_from = [row["drawn_from"] for row in csv.DictReader(file)]
    passages = data.read_labels(data.HERE / "labels_samples.csv")
    assert drawn_from.count("rho") >= 600 and len(drawn_from) - drawn_from.count("rho") >= 300, "too few ratings of a kind"
    assert len({text for text, _ in passages}) == len(passages), "a sample is rated twice"
    held = sum(data.text_fold(text, 16) % 4 == 0 for text, _ in passages) / len(passages)
    assert abs(held - 0.25) < 0.03, f"{held:.2f} of the samples are held out, not a quarter"


# ---- running it again ---------------------------------------------------------------------------

def test_a_second_run_does_nothing_again(texts, again, capsys, monkeypatch):
    """No stage is redone, no checkpoint touched, and the summary says the same."""
    monkeypatch.setattr(ppo.PPO, "step", lambda self, i: pytest.fail("PPO was done again"))
    before, summary = stamps(again), summary_of(again)
    capsys.readouterr()
    train.main(argv(texts, again))
    assert "done again" not in capsys.readouterr().out and stamps(again) == before, "a finished stage was done again"
    assert without_times(summary_of(again)) == without_times(summary), "the second report differs from the first"


def test_other_iterations_redo_ppo_alone_and_say_so(texts, again, capsys):
    """Each stage depends on its own inputs only."""
    before = stamps(again)
    capsys.readouterr()
    train.main(argv(texts, again, "--iterations", 2), until="ppo")
    out = capsys.readouterr().out
    redone = {name for name, stamp in stamps(again).items() if stamp != before[name]}
    assert redone == {"ppo_beta0.5.pt", "ppo_beta2.pt"}, f"these stages were done again: {redone}"
    assert "ppo_beta2.pt: iterations changed, so this stage is done again" in out and out.count("done again") == 2, out


def test_more_samples_to_measure_on_do_not_change_training(texts, again, monkeypatch):
    """Fresh samples have their own random stream; history and weights stay the same to the last bit."""
    before = content(again / "ppo_beta2.pt")
    monkeypatch.setitem(train.SIZES, "toy", {**train.SIZES["toy"], "fresh_samples": 40})
    train.main(argv(texts, again), until="ppo")
    after = content(again / "ppo_beta2.pt")
    assert len(data.load_checkpoint(again / "ppo_beta2.pt")["fresh"]["tokens"]) == 40, "40 fresh samples were asked for"
    assert (after["model"], after["history"]) == (before["model"], before["history"]), "measuring changed the training"


def test_a_lost_tokenizer_is_made_again_just_the_same(texts, again):
    """The file is a function of corpus and --vocab-size, so no later stage is done again."""
    tokenizer, before = (again / "tokenizer.tiktoken").read_bytes(), stamps(again)
    (again / "tokenizer.tiktoken").unlink()
    train.main(argv(texts, again), until="ppo")
    assert (again / "tokenizer.tiktoken").read_bytes() == tokenizer, "the same corpus gave another tokenizer"
    assert {name for name in before if stamps(again)[name] != before[name]} == {"data.pt"}, "more than data.pt was done again"


# ---- kills, Ctrl-C, NaN, two at once ------------------------------------------------------------

def train_and_die(arguments, log, moment):
    """In a process of its own: train.main up to PPO, killed at the moment-th of the instants that could hurt (0: never).

    The instants are those before and after each fsync and rename, in the middle of writing
    a file, when a crash would leave it half written. SIGKILL cannot be caught.
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
    train.main(arguments, until="ppo")


@pytest.fixture(scope="session")
def killed(texts, tmp_path_factory):
    """The folder of a study that was killed ten times at random moments, and saved at every step."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this machine cannot fork")
    server, folder, rng = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("killed"), random.Random(0)
    server.set_forkserver_preload(["train", "torch._dynamo"])      # imported once (optimizers want the latter), and forked from there
    for moment in [rng.randint(1, most) for most in [70] * 6 + [14] * 4] + [0]:
        process = server.Process(target=train_and_die, args=(argv(texts, folder / "out", "--checkpoint-every", 0), folder / "log", moment))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL) and (moment or not process.exitcode), f"exit code {process.exitcode}:\n{(folder / 'log').read_text()}"
    return folder


@pytest.mark.parametrize("name", STAGES)
def test_a_study_killed_ten_times_ends_with_the_same_bits(study, killed, name):
    """Weights, optimizer's work, samples and history equal those of the study that was left in peace."""
    assert content(killed / "out" / name) == content(study / name), f"{name} differs after kills"
    metrics = name.replace(".pt", ".metrics.jsonl")
    assert (killed / "out" / metrics).read_bytes() == (study / metrics).read_bytes(), f"{metrics} differs after kills"


def test_the_kills_hit_every_kind_of_stage_and_leave_no_litter(killed):
    """Else the test above shows nothing."""
    log = (killed / "log").read_text()
    for name in ("pretrain", "reward", "ppo_beta"):
        assert re.search(rf"{name}\S*\.pt: going on after step", log), f"no kill fell into {name}: choose other moments"
    litter = [path.name for path in (killed / "out").iterdir() if "tmp" in path.name or "partial" in path.name]
    assert not litter, f"files of killed runs are left: {litter}"


def test_the_same_seed_gives_the_same_summary(texts, study, killed):
    """Two folders, one command: all numbers but the times agree."""
    train.main(argv(texts, killed / "out"))
    assert without_times(summary_of(killed / "out")) == without_times(summary_of(study)), "the same seed gave other numbers"


def test_ctrl_c_ends_the_step_saves_it_and_says_how_to_go_on(texts, study, again, command, monkeypatch):
    """Exit code 130, one line with the command; that command then goes on to the same bits."""
    step = ppo.PPO.step
    (again / "ppo_beta2.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(ppo.PPO, "step", lambda self, i: (signal.raise_signal(signal.SIGINT) if i == 1 else None, step(self, i))[1])
        code, _, err = command(train, *argv(texts, again))
    assert code == 130 and len(err.splitlines()) == 1, f"exit code {code}, said: {err}"
    assert "after step 2 of 3 of ppo_beta2.pt" in err and "to go on, run the same command again: python train.py --size toy" in err, err
    code, out, _ = command(train, *argv(texts, again))
    assert code == 0 and "ppo_beta2.pt: going on after step 2 of 3" in out, out
    assert content(again / "ppo_beta2.pt") == content(study / "ppo_beta2.pt"), "going on after Ctrl-C gave another policy"


def test_a_nan_stops_the_study_and_keeps_the_last_good_checkpoint(texts, again, command, monkeypatch):
    """One line that says what and when; once its cause is gone, the run goes on from before it."""
    rollout, iteration = ppo.PPO.rollout, itertools.count()

    def spoilt(self, n):
        batch = rollout(self, n)
        if next(iteration) == 2:
            batch["scores"][0] = math.nan
        return batch

    (again / "ppo_beta2.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(ppo.PPO, "rollout", spoilt)
        code, _, err = command(train, *argv(texts, again, "--checkpoint-every", 0))
    assert code == 2 and "iteration 2: scores" in err and "last good checkpoint is kept" in err, f"exit code {code}, said: {err}"
    code, out, _ = command(train, *argv(texts, again))
    assert code == 0 and "ppo_beta2.pt: going on after step 2 of 3" in out, out


def test_two_runs_in_one_folder_are_kept_apart(texts, again, command):
    """The second is told so at once; the lock goes with the process that holds it."""
    with data.locked(again):
        code, _, err = command(train, *argv(texts, again))
    assert code == 2 and "another run is using" in err and len(err.splitlines()) == 1, f"exit code {code}, said: {err}"
    assert command(train, *argv(texts, again))[0] == 0, "the lock should be gone with the run that held it"


# ---- bad input: exit code 2, one line, no traceback ------------------------------------------------

def explains(result, says):
    """A failed command said what is wrong in one line, below argparse's usage if that is what printed it."""
    code, _, err = result
    lines = err.splitlines()
    assert code == 2, f"exit code {code}, said: {err}"
    assert "Traceback" not in err and lines and (len(lines) == 1 or lines[0].startswith("usage:")), f"more than a line: {err}"
    assert says in lines[-1], f"the message should hold {says!r}: {lines[-1]}"


@pytest.mark.parametrize("options, says", [
    ("--nonsense", "unrecognized arguments: --nonsense"),
    ("--beta -1", "-1 is not from 0 to 10"),
    ("--beta much", "invalid float value: 'much'"),
    ("--beta nan", "nan is not from"),
    ("--beta", "expected at least one argument"),
    ("--size huge", "invalid choice: 'huge'"),
    ("--iterations 0", "0 is not from 1"),
    ("--iterations 1.5", "invalid int value"),
    ("--seed -1", "-1 is not from 0"),
    ("--lam -1", "-1 is not from 0 to"),
    ("--length 80", "to 79, the context"),
    ("--vocab-size 256", "256 is not from 257"),
    ("--vocab-size 60000", "Give more text or a smaller --vocab-size"),
    ("--device nonsense", "nonsense"),
    ("--device meta", "meta"),
    pytest.param("--device cuda", "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ("--tokenizer none", "invalid choice: 'none'"),
    ("--out play.txt", "cannot use the folder play.txt: File exists"),
    ("--out play.txt/out", "cannot use the folder play.txt/out: Not a directory"),
    ("--corpus none.txt", "corpus none.txt: No such file or directory"),
    ("--corpus .", "corpus .: Is a directory"),
    ("--labels none.csv", "labels none.csv: No such file or directory"),
    ("--labels .", "labels .: Is a directory"),
])
def test_bad_options_of_train_are_explained(texts, again, command, monkeypatch, options, says):
    """What an option takes is said where it is given; no stage is spoilt by a failed command."""
    monkeypatch.chdir(texts)
    before = stamps(again)
    explains(command(train, *argv(texts, again, *options.split())), says)
    assert stamps(again) == before, "a command that failed changed a checkpoint"


@pytest.mark.parametrize("corpus, says", [
    (b"", "has 0 characters, too few"),
    (b"To be, or not to be.\n" * 100, "Give at least 20,000"),
    (b"\xff\xfe" + b"x" * 30_000, "is not UTF-8 text (byte 0)"),
    (b"To be\n\0" * 5000, "NUL bytes"),
    (b"x" * 200_000, "line 1 has 200,000 characters"),
    (b"\n" * 50_000, "too few"),
], ids=["empty", "short", "binary", "NUL", "one line", "blank"])
def test_a_bad_corpus_is_explained(texts, tmp_path, command, corpus, says):
    """Before anything is trained."""
    (tmp_path / "play.txt").write_bytes(corpus)
    explains(command(train, *argv(texts, tmp_path / "out", "--corpus", tmp_path / "play.txt")), says)


@pytest.mark.parametrize("labels, says", [
    ("", "line 1: the first line must name the columns"),
    ("play,rating\nplay,1\n", "line 1: the first line must name the columns"),
    ("play,first_line,last_line,rating\n", "has no passages"),
    ("play,first_line,last_line,rating\nplay,1,3,1\nplay,1,3,good\n", "line 3: rating 'good' is not a number"),
    ("play,first_line,last_line,rating\nplay,1,3,3\n", "line 2: rating 3 is outside -2 to 2"),
    ("play,first_line,last_line,rating\nplay,1,3,nan\n", "line 2: rating nan is outside"),
    ("play,first_line,last_line,rating\nplay,1,3\n", "line 2: the row has not as many fields"),
    ("play,first_line,last_line,rating\nplay,1,3,1,9\n", "line 2: the row has not as many fields"),
    ("play,first_line,last_line,rating\nplay,0,3,1\n", "line 2: lines 0 to 3 are not in play"),
    ("play,first_line,last_line,rating\nplay,3,1,1\n", "line 2: lines 3 to 1 are not in play"),
    ("play,first_line,last_line,rating\nplay,1,99999,1\n", "which has lines 1 to"),
    ("play,first_line,last_line,rating\nplay,1,x,1\n", "lines 1 to x are not in play"),
    ("text,rating\n  ,1\n", "line 2: the passage is empty"),
    ("text,rating\na,1\n\"b,1\n", "labels"),
    ("text,rating\nlove,1\ngrief,-1\n", "too few passages"),
])
def test_bad_labels_are_explained_by_their_line(texts, again, command, tmp_path, labels, says):
    """The message names the file and the line to correct."""
    (tmp_path / "bad.csv").write_text(labels)
    explains(command(train, *argv(texts, again, "--labels", tmp_path / "bad.csv")), says)


def test_labels_may_be_the_texts_themselves(texts, again):
    """Columns text, rating: the same passages give the same reward model, so its stage is not done again."""
    with open(again / "texts.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "rating"), *data.read_labels(texts / "labels.csv", texts / "play.txt")])
    assert data.read_labels(again / "texts.csv") == data.read_labels(texts / "labels.csv", texts / "play.txt"), "other passages"
    before = stamps(again)
    train.main(argv(texts, again, "--labels", again / "texts.csv"), until="reward")
    assert stamps(again) == before, "the same passages were taken for others"


def cut(path):
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def other_tokenizer(path):
    """Exchange the ranks of the last two tokens of a tokenizer."""
    lines = path.read_bytes().split(b"\n")
    first, second = (line.split(b" ")[0] for line in lines[-3:-1])
    path.write_bytes(b"\n".join([*lines[:-3], first + b" 299", second + b" 298", b""]))


def not_ours(path):
    torch.save({"some": "weights"}, path)


def code(path):
    torch.save({"kind": "pretrain", "model": os.path.join}, path)


DAMAGE = pytest.mark.parametrize("name, damage, says", [
    ("pretrain.pt", cut, "pretrain.pt is damaged or not a checkpoint"),
    ("pretrain.pt", lambda path: path.write_bytes(b""), "pretrain.pt is damaged or not a checkpoint"),
    ("pretrain.pt", lambda path: path.write_text("To be, or not to be"), "pretrain.pt"),
    ("pretrain.pt", not_ours, "was not written by this project"),
    ("pretrain.pt", code, "could run code"),
    ("tokenizer.tiktoken", cut, "tokenizer"),
    ("tokenizer.tiktoken", lambda path: path.write_text("To be\n"), "line 1 is not a token and its rank"),
    ("tokenizer.tiktoken", other_tokenizer, "was made with another tokenizer"),
], ids=["cut", "empty", "text", "not ours", "code", "tokenizer cut", "tokenizer text", "another tokenizer"])


@DAMAGE
@pytest.mark.parametrize("script", [train, sample], ids=lambda script: script.__name__)
def test_a_damaged_file_is_explained(texts, again, command, script, name, damage, says):
    """By the next command that reads it."""
    damage(again / name)
    arguments = argv(texts, again) if script is train else ["--checkpoint", again / "pretrain.pt"]
    explains(command(script, *arguments), says)


# ---- sample.py ----------------------------------------------------------------------------------

@pytest.mark.parametrize("options, says", [
    ("--checkpoint none.pt", "checkpoint none.pt: No such file or directory"),
    ("--checkpoint .", "checkpoint .: Is a directory"),
    ("--checkpoint reward.pt", "is a reward checkpoint, where one of kind pretrain or ppo is needed"),
    ("--checkpoint data.pt", "is a data checkpoint, where one of kind pretrain or ppo is needed"),
    ("--checkpoint summary.json", "checkpoint summary.json"),
    ("--top-k 0", "--top-k: 0 is not from 1"),
    ("--num 0", "--num: 0 is not from 1"),
    ("--best-of 0", "--best-of: 0 is not from 1"),
    ("--length 0", "--length: 0 is not from 1"),
    ("--length 80", "Shorten either"),
    ("--prompt " + "love" * 100, "Shorten either"),
    ("--temperature -1", "--temperature: -1 is not from 0"),
    ("--temperature nan", "--temperature: nan is not from 0"),
    ("--seed -1", "--seed: -1 is not from 0"),
    ("--seed 99999999999999999999", "--seed"),
    ("--nonsense", "unrecognized arguments"),
])
def test_bad_options_of_sample_are_explained(study, command, monkeypatch, options, says):
    """In one line, with what to give instead."""
    monkeypatch.chdir(study)
    explains(command(sample, "--checkpoint", "ppo_beta2.pt", *options.split()), says)


def test_a_policy_without_the_files_beside_it_is_explained(study, tmp_path, command):
    """A tokenizer is needed always, a reward model for --best-of; without the latter samples are not judged."""
    shutil.copy(study / "ppo_beta2.pt", tmp_path)
    arguments = ["--checkpoint", tmp_path / "ppo_beta2.pt", "--num", 1]
    explains(command(sample, *arguments), "tokenizer.tiktoken: No such file or directory")
    shutil.copy(study / "tokenizer.tiktoken", tmp_path)
    explains(command(sample, *arguments, "--best-of", 2), "--best-of needs the reward model")
    code, out, _ = command(sample, *arguments, "--jsonl")
    assert code == 0 and json.loads(out)["positive"] is None, "without a reward model P(positive) is unknown"


@pytest.fixture
def drawn(study, command):
    """drawn(options ...) -> the JSON lines that sample.py prints."""
    def draw(*options):
        code, out, err = command(sample, "--checkpoint", study / "ppo_beta2.pt", "--jsonl", *options)
        assert (code, err) == (0, ""), err
        return [json.loads(line) for line in out.splitlines()]
    return draw


def test_samples_are_printed_with_their_probability(study, command):
    """Positive Prob: 44.0% under each."""
    code, out, err = command(sample, "--checkpoint", study / "ppo_beta2.pt", "--num", 3)
    assert (code, err) == (0, "") and out.count("Positive Prob: ") == 3 and out.count("KL: ") == 3, out


def test_json_lines_hold_text_positive_and_ref_kl(drawn):
    """Exactly these keys; ref_kl of one sample may have either sign, its mean is KL(pi to rho)."""
    rows = drawn("--num", 4)
    assert len(rows) == 4 and all(set(row) == {"text", "positive", "ref_kl"} for row in rows), rows
    assert all(isinstance(row["text"], str) and 0 < row["positive"] < 1 and math.isfinite(row["ref_kl"]) for row in rows), rows


def test_the_same_seed_draws_the_same_samples(drawn):
    """And another one others."""
    assert drawn("--seed", 3) == drawn("--seed", 3) != drawn("--seed", 4), "samples do not follow the seed"
    assert drawn("--temperature", 0, "--seed", 3)[0] == drawn("--temperature", 0, "--seed", 4)[0], "greedy samples need no seed"
    assert drawn("--top-k", 1)[0]["text"] == drawn("--temperature", 0)[0]["text"], "the likeliest token only: greedy"


def test_the_prompt_opens_the_text(drawn):
    """What is typed is kept, and continued."""
    text = drawn("--prompt", "VIOLA.\nMy love", "--num", 1)[0]["text"]
    assert text.startswith("VIOLA.\nMy love") and len(text) > 20, text


def test_the_best_of_many_is_judged_more_positive(drawn):
    """Each sample shown is the likeliest positive of its N: of 8, all 10 lie above the mean of single samples."""
    single, best = ([row["positive"] for row in drawn("--num", 10, "--best-of", n)] for n in (1, 8))
    assert min(best) > sum(single) / 10, f"single {single}, best of 8 {best}"


def test_compare_shows_the_pretrained_model_too(study, command, drawn):
    """before and after, sample by sample; the pretrained model's are those it draws itself from that seed."""
    rows = drawn("--compare", "--num", 2)
    assert [row["model"] for row in rows] == ["before", "after"] * 2, rows
    code, out, _ = command(sample, "--checkpoint", study / "pretrain.pt", "--jsonl", "--num", 2)
    assert [json.loads(line)["text"] for line in out.splitlines()] == [row["text"] for row in rows[::2]], "before is not rho's"
    assert command(sample, "--checkpoint", study / "ppo_beta2.pt", "--compare", "--num", 1)[1].count("----- 1") == 2


# ---- reward.py --score --------------------------------------------------------------------------

def test_scoring_keeps_what_a_line_holds_and_adds_positive(study, tmp_path, command):
    """One line out for each line in, in order, other keys kept; nothing else on standard output."""
    rows = [{"text": "My love", "id": 7, "tags": ["a", None]}, {"n": 1.5, "text": "Grief \N{EM DASH} \N{GRINNING FACE}"},
            {"text": ""}, {"text": "My love", "positive": "old"}, *({"text": f"S {i}"} for i in range(70))]
    (tmp_path / "in.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    code, out, err = command(reward, "--score", tmp_path / "in.jsonl", "--out", study)
    assert (code, err) == (0, ""), err
    scored = [json.loads(line) for line in out.splitlines()]
    assert [{**row, "positive": 0} for row in scored] == [{**row, "positive": 0} for row in rows], "a line was lost or changed"
    assert all(0 < row["positive"] < 1 for row in scored), "positive should be a probability"
    assert scored[0]["positive"] == scored[3]["positive"], "the same text got two scores"


def test_a_text_too_long_is_read_as_far_as_it_goes_and_that_is_said(study, tmp_path, command):
    """The note goes to standard error, so that standard output stays JSON lines."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("love " * 16, "love " * 500)))
    code, out, err = command(reward, "--score", tmp_path / "in.jsonl", "--out", study)
    assert code == 0 and len(out.splitlines()) == 2 and "only their beginning was read" in err, err


@pytest.mark.parametrize("lines, says", [
    (None, "in.jsonl: No such file or directory"),
    ('{"text": "a"}\nlove\n', "line 2 is not a JSON object"),
    ('["text"]\n', "line 1 is not a JSON object"),
    ('{"words": "love"}\n', 'with a "text"'),
    ('{"text": 5}\n', 'with a "text"'),
    ("[" * 100_000, "line 1 is not a JSON object"),
    ('{"text": "\\ud800"}\n', "line 1 is not a JSON object"),
], ids=["missing", "not JSON", "no object", "no text", "a number", "deep", "half a surrogate pair"])
def test_bad_lines_to_score_are_explained(study, tmp_path, command, lines, says):
    """By their number."""
    if lines is not None:
        (tmp_path / "in.jsonl").write_text(lines)
    explains(command(reward, "--score", tmp_path / "in.jsonl", "--out", study), says)


def test_scoring_without_a_reward_model_is_explained(study, tmp_path, command):
    """A folder without reward.pt, a folder as the file, an option forgotten."""
    explains(command(reward, "--score", tmp_path / "in.jsonl", "--out", tmp_path), "reward.pt: No such file or directory")
    explains(command(reward, "--score", tmp_path, "--out", study), "Is a directory")
    explains(command(reward, "--score"), "expected one argument")


# ---- from the shell -----------------------------------------------------------------------------

def test_the_script_itself_exits_with_2_and_one_line(tmp_path):
    """python sample.py where there is nothing to sample from, in a process of its own."""
    done = subprocess.run([sys.executable, data.HERE / "sample.py"], cwd=tmp_path, capture_output=True, text=True)
    explains((done.returncode, done.stdout, done.stderr), "checkpoint out/pretrain.pt: No such file or directory")


@pytest.mark.network
def test_the_tiny_study_of_the_plays(tmp_path):
    """python train.py --size tiny, about a minute: the shipped labels on the downloaded plays."""
    train.main(["--size", "tiny", "--device", "cpu", "--out", str(tmp_path)])
    summary = summary_of(tmp_path)
    assert summary["pretrain"]["val_bits_per_byte"] < 4, "150 steps should compress the plays below 4 bits per byte"
    assert summary["reward"]["val_pearson"] > 0.4, "a bag of words alone does better"
    assert summary["ppo"][0]["objective"] > -1, "PPO spoilt the policy"
