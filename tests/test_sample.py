"""What looks at a study: samples with their numbers, blind ratings, figures, report, summary."""

import functools
import io
import itertools
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

import data
import gpt
import reward
import sample
import train
from conftest import argv, assert_close, explains, load, run_script

HEADER = "text,rating,sense,drawn_from\n"
RUNS = {"0.5": "ppo_beta0.5", "2": "ppo_beta2", "negative_0.02": "ppo_negative_beta0.02"}


@pytest.fixture(scope="module")
def continued(study, texts, tmp_path_factory):
    """The folder of a study that continues speeches to their end; PPO took a single step."""
    out = shutil.copytree(study, tmp_path_factory.mktemp("continued") / "out")
    assert run_script(train, *argv(texts, out, "--task", "continue", "--beta", 2, "--lr", 0.01,
                                   "--iterations", 1, "--until", "ppo")) == 0
    return out


@pytest.fixture
def drawn(command, monkeypatch):
    """drawn(checkpoint, options ...) -> the JSON lines that sample.py prints, the tokens drawn."""
    tokens = []
    monkeypatch.setattr(sample, "log_ratios", lambda *args, real=sample.log_ratios:
                        tokens.append(torch.cat(args[2:], dim=1)) or real(*args))

    def draw(checkpoint, *options):
        code, out, err = command(sample, "--checkpoint", checkpoint, "--jsonl", *options)
        assert (code, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()], tokens[-1]
    return draw


@pytest.mark.parametrize("name", ["ppo_beta2", "pretrain"])
@pytest.mark.parametrize("options", [[], ["--prompt", "VIOLA.\nMy love"]], ids=["no prompt", "one"])
@pytest.mark.parametrize("task", ["study", "continued"])
def test_each_number_is_that_of_the_text_beside_it(request, drawn, command, task, options, name):
    """P(positive) and log pi - log rho, of each text alone, without padding; printed or as JSON."""
    folder, options = request.getfixturevalue(task), ["--num", 6, "--seed", 1, *options]
    rows, tokens = drawn(folder / f"{name}.pt", *options)
    policy, rho = (gpt.load_gpt(load(folder, x)) for x in (name, "pretrain"))
    model, end = reward.load_reward(load(folder, "reward")), load(folder, "rho")["end"]
    for row, ids in zip(rows, tokens, strict=True):
        before, after = ids[:-16][ids[:-16] != data.PAD], ids[-16:]
        if end in after.tolist():
            after = after[:after.tolist().index(end) + 1]
        ids = torch.cat((before, after))
        pi, ref = (m(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[len(before) - 1:]
                   for m in (policy, rho))
        text = data.decode(load(folder, "data")["vocabulary"], ids)
        assert row["text"] == text.removeprefix("\n\n")
        assert_close([row["positive"], row["ref_kl"]],
                     [model(after[None]).sigmoid().item(), (pi - ref).sum().item()],
                     "not the model's numbers of this text", atol=1e-4, rtol=0)
    assert min(len({round(row[key], 3) for row in rows}) for key in ("positive", "ref_kl")) > (
        3 if name == "ppo_beta2" else 0), "too alike to tell apart"
    out = command(sample, "--checkpoint", folder / f"{name}.pt", *options)[1]
    shown = re.findall(r"(?s)-----\n(.*?)\n\nPositive Prob: (.*?)%   log pi - log rho: (.*?) nats",
                       out)
    for (text, p, kl), row in zip(shown, rows, strict=True):
        assert text == row["text"], "not the same samples as --jsonl"
        assert abs(float(p) - 100 * row["positive"]) < 0.051 > abs(float(kl) - row["ref_kl"])


def test_rho_and_its_policies_answer_the_same_prompts(continued, drawn):
    """Those that the policies were measured with, of held-out text."""
    prompts = {tuple(row) for row in load(continued, "rho")["test_prompts"].tolist()}
    one, two = ([tuple(row) for row in drawn(continued / name, "--num", 12)[1][:, :-16].tolist()]
                for name in ("pretrain.pt", "ppo_beta2.pt"))
    assert one == two and set(one) <= prompts and len(set(one)) > 3


def test_a_prompt_longer_than_the_training_windows_is_continued(study, drawn):
    """All of it is read, and the sample begins with it."""
    prompt = "My love " * 100 + "SIR TOBY."
    [row], tokens = drawn(study / "ppo_beta2.pt", "--num", 1, "--prompt", prompt)
    assert tokens.size(1) > 80 and row["text"].startswith(prompt)


def test_the_seed_decides_what_is_drawn(study, drawn):
    """The same seed the same samples, another others; but greedy ones, of a policy kept early."""
    one, same, other = (drawn(study / "ppo_beta2.pt", "--num", 2, "--seed", seed)[0]
                        for seed in (3, 3, 0))
    assert one == same != other and one[0] != one[1]
    rows = [row["text"] for options in (["--temperature", 0], ["--top-k", 1, "--seed", 3])
            for row in drawn(study / "ppo_beta2_after1.pt", "--num", 2, *options)[0]]
    assert len(rows) == 4 and len(set(rows)) == 1, "the likeliest tokens are always the same"


@pytest.mark.parametrize("options, says", [
    ("--checkpoint reward.pt", "is a reward checkpoint. Give one of kind pretrain or ppo."),
    ("--top-k 0", "--top-k: invalid int from 1 to 1000000000 value: '0'"),
    ("--temperature nan", "float from 0 "), ("--seed -1", "int from 0 "), ("--num 0", "from 1 "),
    ("--checkpoint .", "there is no file ."),
    ("--rate a.pt b/a.pt --ratings new.csv", "apart by their file names. Rename a copy")])
def test_bad_options_are_explained(study, command, monkeypatch, options, says):
    """In one line, with what to give instead."""
    monkeypatch.chdir(study)
    explains(command(sample, "--checkpoint", "ppo_beta2.pt", *options.split()), says)


def test_where_nothing_was_made_the_command_that_makes_it_is_told(tmp_path, command, monkeypatch):
    """In a fresh clone, which has no folder out."""
    monkeypatch.chdir(tmp_path)
    for script, name, *options in ((sample, "pretrain"), (sample, "rho", "--report", "out"),
                                   (reward, "reward", "--score", "x")):
        explains(command(script, *options),
                 f"there is no file out/{name}.pt. python train.py --out out makes it.")


def test_a_policy_without_its_study_beside_it_is_explained(study, tmp_path, command):
    """rho says how far off it is, the reward model how positive: both of this study."""
    shutil.copy(study / "ppo_beta2.pt", tmp_path)
    draw = [sample, "--checkpoint", tmp_path / "ppo_beta2.pt", "--num", 1]
    for name in ("rho", "pretrain", "reward"):
        explains(command(*draw), f"there is no file {tmp_path}/{name}.pt")
        data.save_checkpoint(tmp_path / f"{name}.pt", {**load(study, name), "key": "another"})
        explains(command(*draw), f"{name}.pt beside {draw[2]} is of another study")
        shutil.copy(study / f"{name}.pt", tmp_path)
    assert "Positive Prob: " in command(*draw)[1]


def rows_of(path):
    """The rows of a file of ratings: (text, rating, sense, drawn from)."""
    return [(row["text"], float(row["rating"]), float(row["sense"]), row["drawn_from"])
            for row in (sample.read_ratings(path) if path.exists() else ())]


def opinion(text):
    """Feeling and sense that the reader of these tests finds in a text."""
    return len(text) % 5 - 2, len(text) // 5 % 5 + 1


@pytest.fixture
def session(study, tmp_path, monkeypatch):
    """session(told, options ...) -> exit code, the screen: a reader rates 3 samples of two models.
    Question n is answered told[n], others by opinion(); all answers before it must be on the disk.
    """
    monkeypatch.setattr(sample, "draw", functools.cache(lambda *args, real=sample.draw:
                                                        list(real(*args))))

    def rate(told, *options, path=tmp_path / "mine.csv"):
        screen, questions = io.TextIOWrapper(io.BytesIO(), write_through=True), itertools.count(1)
        given = [row[:3] for row in rows_of(path)]

        def readline():
            assert [row[:3] for row in rows_of(path)] == given, "not what the reader has answered"
            shown = screen.buffer.getvalue().decode().rpartition(" to go\n")[2]
            text, _, asked = shown.partition("\n\nfeeling")
            answer = told.get(next(questions))
            if answer == "kill":
                raise KeyboardInterrupt
            if answer == "end":
                return ""
            if answer is None:
                answer = opinion(text)["sense" in asked]
                if "sense" in asked:
                    given.append((text, *opinion(text)))
            return f"{answer}\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            patch.setattr(sys, "stdin", SimpleNamespace(readline=readline))
            code = run_script(sample, "--rate", study / "pretrain.pt", study / "ppo_beta2.pt",
                              "--num", 3, "--ratings", path, *options)
        return code, screen.buffer.getvalue().decode()
    return rate


def test_samples_are_rated_blind_and_each_answer_stands_beside_its_text(session, study, tmp_path):
    """Each sample once, shuffled, nothing said of whose it is; its file is one of labels."""
    code, out = session({}, "--seed", 5)
    assert code == 0 and not re.search("pretrain|ppo|beta|Positive", out), out
    rows, names = rows_of(tmp_path / "mine.csv"), ["pretrain", "ppo_beta2"]
    drawn = [(row["text"], name) for name in names
             for row in sample.draw(study / f"{name}.pt", 3, 5)]
    order = [drawn.index((text, name)) for text, _, _, name in rows]
    assert sorted(order) == list(range(6)), "not the samples of these models"
    assert order not in ([0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2]), "whose it is can be told"
    assert all((rating, sense) == opinion(text) for text, rating, sense, _ in rows), "shifted"
    assert len({opinion(text) for text, *_ in rows}) > 3, "too alike to tell apart"
    assert data.read_labels(tmp_path / "mine.csv") == [
        (text.strip(), rating, None) for text, rating, *_ in rows], "train.py --labels reads it"


@pytest.mark.parametrize("told", [
    *({n: "kill"} for n in (1, 2, 3, 12)), {3: "end"}, {4: "end"},
    {1: "q", 2: "nan", 3: "good", 4: "", 5: "1,5", 7: "0", 8: "6", 10: "kill"}], ids=str)
def test_a_session_ends_the_same_however_it_went(session, tmp_path, told):
    """Killed, ended or answered wrongly: at last the file is that of a session in one go."""
    session({}, path=tmp_path / "whole.csv")
    code, out = session(told)
    done = len(rows_of(tmp_path / "mine.csv"))
    assert code == 130 and done == (len(told) > 1 or (max(told) - 1) // 2), out
    wrong = [out.count(f"The answer must be a number from {x}.\n") for x in ("-2 to 2", "1 to 5")]
    assert wrong == ([5, 2] if len(told) > 1 else [0, 0]), out
    code, out = session({})
    assert code == 0 and out.startswith(f"{done} rated, {6 - done} to go."), out
    assert (tmp_path / "mine.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_session_of_other_passages_is_refused(session, study, tmp_path, capsys):
    """Other --num, --seed or checkpoints: one line, and no byte of the file changes."""
    session({5: "kill"})
    before, _ = (tmp_path / "mine.csv").read_bytes(), capsys.readouterr()
    for options in (["--num", 4], ["--num", 1], ["--seed", 1], ["--rate", study / "ppo_beta2.pt"]):
        code, out = session({}, *options)
        explains((code, out, capsys.readouterr().err), "begun with other --rate, --num or --seed")
        assert (tmp_path / "mine.csv").read_bytes() == before and out == ""


def test_no_text_hinders_going_on(session, monkeypatch):
    """Quotes, carriage returns, zero bytes and half characters, which models can write."""
    odd = ["a\rb", "a\0b", 'say "it", he', "a\N{REPLACEMENT CHARACTER}", "\ttab\x85", "a\r\n\r\nb"]
    monkeypatch.setattr(sample, "draw", lambda path, num, seed: [{"text": text} for text in odd])
    for done in (0, 3, 6, 9):
        _, out = session({7: "kill"}, "--num", 6)
        assert out.startswith(f"{done} rated, {12 - done} to go."), out


def test_passages_of_the_plays_are_rated_as_labels(monkeypatch, tmp_path, command):
    """--rate plays: whole speeches of training plays, as many as there are; feeling alone."""
    speeches = [f"SPEAKER {i}.\n" + "Words. " * i for i in range(99)]
    monkeypatch.setattr(data, "load_corpus", lambda: (data.BOUNDARY.join(speeches), "held out"))
    wanted = {text for text in speeches if 100 < len(text) < 400}       # about as long as samples
    for num in (2, 999):
        monkeypatch.setattr(sys, "stdin", io.StringIO("1\n" * 200))
        path = tmp_path / f"{num}.csv"
        code, out, err = command(sample, "--rate", "plays", "--num", num, "--ratings", path)
        assert code == 0 and "sense" not in out, err
        rows = list(sample.read_ratings(path))
        texts = {row["text"] for row in rows}
        assert len(texts) == len(rows) == min(num, len(wanted)) and texts <= wanted
        assert {(row["sense"], row["drawn_from"]) for row in rows} == {("", "plays")}
        assert {play for _, _, play in data.read_labels(path)} == {""}, "these are no samples"


@pytest.mark.parametrize("content, says", [
    (HEADER + "a,1,1\n", "was begun with other --rate"), *[
        (x, "lacks the header of a") for x in ("play,first_line\n", "To be\n", "", "a\0b")]])
def test_a_bad_file_of_ratings_is_explained_and_left_alone(study, tmp_path, command, content, says):
    """One line, and no byte of somebody's file is changed."""
    (path := tmp_path / "notes.csv").write_text(content)
    explains(command(sample, "--rate", study / "pretrain.pt", "--ratings", path), says)
    assert path.read_text() == content


@pytest.fixture(scope="module")
def reported(study, texts, tmp_path_factory):
    """(folder, figures, what was printed): that study, a negative twin, a run of another rho."""
    out, figures = shutil.copytree(study, tmp_path_factory.mktemp("reported") / "out"), {}
    assert run_script(train, *argv(texts, out, "--toward", "negative", "--beta", 0.02,
                                   "--iterations", 2, "--until", "ppo")) == 0
    run = load(out, "ppo_beta2")
    for name in ("reward", "judge"):            # as of labels with both: these are reported
        state = load(out, name)
        first = {key: x + 0.1 for key, x in state["report"]["samples"].items()}
        data.save_checkpoint(out / f"{name}.pt", {**state, "report": {
            "passages": first, **state["report"]}})
    data.save_checkpoint(out / "ppo_beta7.pt", {**run, "inputs": {**run["inputs"], "rho": "other"}})
    printed = io.TextIOWrapper(io.BytesIO(), write_through=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda x, path: figures.update({path.stem: x}))
        patch.setattr(sys, "stdout", printed)
        assert run_script(sample, "--report", out) == 0
    return out, figures, printed.buffer.getvalue().decode()


def test_the_summary_has_the_fixed_keys_and_the_checkpoints_numbers(reported):
    """No NaN or Infinity, which other readers of JSON refuse; a run of another rho is left out."""
    out, *_ = reported
    summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    states = {name: load(out, name)
              for name in ("data", "pretrain", "reward", "judge", "rho", *RUNS.values())}
    assert (summary["size"], summary["device"]) == ("tiny", "cpu")
    seconds = {name: state["seconds"] for name, state in states.items()}
    assert summary["seconds"].keys() > {"data", "pretrain", "reward", "ppo", "total"}
    assert summary["seconds"]["ppo"] == {key: seconds[name] for key, name in RUNS.items()}
    assert_close(summary["seconds"]["total"], sum(seconds.values()), "total")
    for key in ("parameters", "val_bits_per_byte"):
        assert summary["pretrain"][key] == states["pretrain"][key]
    for name in ("reward", "judge"):
        measures = next(iter(states[name]["report"].values()))
        expected = {f"val_{key}": measures[key] for key in ("pearson", "auc", "log_loss")}
        expected |= states["rho"]["scales"][name]["positive"]       # mean, std
        assert expected.items() <= summary[name].items()
    for row, name in zip(summary["ppo"], RUNS.values(), strict=True):
        assert set("beta iterations score positive ref_kl objective reference_objective optimum "
                   "fraction_of_optimum".split()) <= row.keys()
        assert {"objective", "score", "ref_kl", "ess"} <= row["optimum"].keys()
        assert row.pop("seconds_per_iteration") == seconds[name] / row["iterations"]
        assert row == states[name]["result"], f"not the numbers of {name}"


def test_the_tables_show_the_checkpoints_numbers(reported):
    """A row for rho and each run, samples side by side; below an ESS of 100 nothing needs J*."""
    out, _, printed = reported
    report = (out / "report.md").read_text()
    assert "| rho | 0 | 0 | | 0 | 0 |" in report
    for key, name in RUNS.items():
        x = load(out, name)["result"]
        assert abs(x["reference_objective"]) < 0.005, "rho's own scores are on another scale"
        row = (f"| {key} | %(score).2f | %(judge).2f | %(positive).2f | %(ref_kl).2f | "
               "%(objective).2f ± %(objective_se).2f |") % x
        line = f"beta {key}: score %(score).2f, KL %(ref_kl).2f nats, J %(objective).2f" % x
        assert (key != "negative_0.02") == (x["optimum"]["ess"] >= 100)
        if key == "negative_0.02":
            row += f" not known | {x['optimum']['ess']:.0f} | | |"
            line += "; J* is not known from these samples"
        else:
            row += (" %(objective).2f ± %(objective_se).2f | %(ess).0f | " % x["optimum"]
                    + "%(fraction_of_optimum).2f ± %(fraction_se).2f | %(kl_to_optimum).2f |" % x)
            line += (f" of J* {x['optimum']['objective']:.2f}: {x['fraction_of_optimum']:.0%} of "
                     "the way from rho")
        assert f"\n{row}\n" in report, f"{key}: not in the table"
        before, after = ((out / f"samples/{x}.txt").read_text().split("\n-----\n")[0].split("\n")
                         for x in ("pretrain", name))
        for left, right in itertools.zip_longest(before, after, fillvalue=""):
            assert f"\n{left[:52]:52}  {right}\n" in report, f"{key}: not side by side"
        assert f"\n{line}\n" in printed and f"\n{line}\n" in report
    assert "ppo_beta7" not in report and "| 7 |" not in report, "a run of another rho"
    for name in ("reward", "judge"):
        x = next(iter(load(out, name)["report"].values()))
        assert (f"| {name} | {x['pearson']:.3f} | {x['auc']:.3f} | {x['slope']:.2f} | "
                f"{x['log_loss']:.3f} |") in report


def test_the_figures_draw_the_runs_and_samples_are_kept(reported, study):
    """Paths and ends, stars where J* is known; each run's name can be seen on each figure."""
    (out, figures, _), drawn, seen = reported, {}, {}
    for name, figure in figures.items():
        figure.draw_without_rendering()
        drawn[name] = [x.get_xydata().tolist() for axis in figure.axes for x in axis.lines]
        seen[name] = [text.get_text() for text in figure.findobj(Text)
                      if 0 < text.get_window_extent().y0 < figure.bbox.y1]
        assert (study / f"figures/{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"(figures/{name}.png)" in (out / "report.md").read_text()
    left, right = ([(to_rgba(x.get_color()), x.get_xydata().tolist()) for x in axis.lines]
                   for axis in figures["frontier"].axes)
    for axis in figures["frontier"].axes:
        assert axis.xaxis.get_transform().transform(torch.tensor([4.0]).numpy()) == 2, "no root"
    levels = [x.tolist() for y in figures["ppo"].axes[0].collections for x in y.get_segments()]
    for i, (key, name) in enumerate(RUNS.items()):
        samples = [sample.SAMPLE.format(**row) for row in sample.draw(out / f"{name}.pt", 20)]
        assert "\n".join(samples) == (out / f"samples/{name}.txt").read_bytes().decode()
        history, x = load(out, name)["history"], load(out, name)["result"]
        for lines, measure, column in ((left, "score", 1), (right, "judge", 2)):
            path = [[row["ref_kl"], row[measure]] for row in (*history, x)]
            assert (to_rgba(f"C{i}"), path) in lines
            assert (to_rgba("k"), [[row[0], row[column]] for row in x["frontier"]]) in lines
        assert (to_rgba("C7"), [[row[3], row[1]] for row in x["best_of_n"]]) in left
        for axis in figures["ppo"].axes:
            path = [[row["step"], row[axis.get_title()]] for row in history]
            assert path in [y.get_xydata().tolist() for y in axis.lines], axis.get_title()
        J = x["optimum"]["objective"]
        assert J is None or [[1, J], [x["iterations"], J]] in levels, "J*"
        star = [[x["optimum"]["ref_kl"], x["optimum"]["score"]]]
        assert (star in drawn["frontier"]) == (key != "negative_0.02")
        for name, texts in seen.items():
            assert key in texts, f"no {key} on {name}.png"


def test_the_committed_run_is_drawn_for_its_size(again, tmp_path, monkeypatch, command):
    """results/runs/small_*.metrics.jsonl, for size small alone."""
    keys, figures = ["step", *sample.METRICS], {}
    rows = "".join(json.dumps({key: i * 0.125 for key in keys}) + "\n" for i in range(5))
    data.write_file(tmp_path / "results" / "runs" / "small_ppo_beta2.metrics.jsonl", rows)
    monkeypatch.setattr(data, "HERE", tmp_path)
    monkeypatch.setattr(Figure, "savefig", lambda x, path: figures.update({path.stem: x}))
    (again / "ppo_beta0.5.pt").unlink()
    for size in ("small", "tiny"):
        data.save_checkpoint(again / "ppo_beta2.pt", {**load(again, "ppo_beta2"), "size": size})
        assert command(sample, "--report", again)[0] == 0
        drawn = [curve.get_xydata().tolist() for curve in figures["ppo"].axes[1].lines]
        assert ([[i * 0.125] * 2 for i in range(5)] in drawn) == (size == "small")
    (again / "ppo_beta2.pt").unlink()
    explains(command(sample, "--report", again), "has no finished PPO run. Run train.py first")


def test_a_run_by_another_algorithm_or_beta_says_so(study, monkeypatch):
    """Or a table that mixes algorithms would compare them by beta alone, or by one not J's."""
    def load(path, *kinds, load=data.load_checkpoint):
        state = load(path, *kinds)
        state.get("result", {}).update(beta=0.123456)       # as an adapted one may end
        return {**state, "inputs": {**state["inputs"], "algorithm": "rloo"}}
    rho = load(study / "rho.pt")
    monkeypatch.setattr(data, "load_checkpoint", load)
    assert {run["label"] for run in sample.load_runs(study, rho)} == {"0.123, rloo"}
