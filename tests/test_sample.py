"""What looks at a study: samples, blind ratings and what they say, figures, report, summary."""

import csv
import io
import itertools
import json
import math
import random
import shutil
import statistics
import subprocess
import sys

import pytest
import torch

import data
import gpt
import reward
import sample
import train
from conftest import argv, assert_close, explains, run_script

NEGATIVE = "ppo_negative_beta0.02"


@pytest.fixture(scope="module")
def drifted(study, texts, tmp_path_factory):
    """That study with a negative twin, whose policy was kept along its drift, and beta 0."""
    out = shutil.copytree(study, tmp_path_factory.mktemp("drifted") / "out")
    more = ["--lr", 0.01, "--max-update-kl", 0.1, "--iterations", 4]
    run_script(train, *argv(texts, out, "--beta", 0, "--iterations", 1, "--until", "ppo"))
    assert run_script(train, *argv(texts, out, "--toward", "negative", "--beta", 0.02, *more)) == 0
    return out


def summary_of(out):
    """summary.json, which holds no NaN or Infinity: other readers of JSON refuse them."""
    return json.loads((out / "summary.json").read_text(), parse_constant=lambda x: pytest.fail(x))


def without_times(x):
    """A summary less its seconds."""
    if isinstance(x, dict):
        return {key: without_times(y) for key, y in x.items() if not key.startswith("seconds")}
    return [without_times(y) for y in x] if isinstance(x, list) else x


# ---- samples ------------------------------------------------------------------------------

@pytest.fixture
def drawn(study, command):
    """drawn(options ...) -> the JSON lines that sample.py prints."""
    def draw(*options, checkpoint=study / "ppo_beta2.pt"):
        code, out, err = command(sample, "--checkpoint", checkpoint, "--jsonl", *options)
        assert (code, err) == (0, ""), err
        return [json.loads(line) for line in out.splitlines()]
    return draw


def test_samples_are_printed_with_their_probability(study, command):
    """Positive Prob: 44.0% under each, and how far pi's log-probability is from rho's."""
    code, out, err = command(sample, "--checkpoint", study / "ppo_beta2.pt", "--num", 3)
    assert (code, err) == (0, ""), err
    counts = {out.count(part) for part in ("----- ", "Positive Prob: ", "log pi - log rho: ")}
    assert counts == {3}, out


@pytest.mark.parametrize("prompt", ["", "VIOLA.\nMy love"], ids=["no prompt", "a prompt"])
def test_a_sample_is_what_its_line_says(study, monkeypatch, prompt):
    """positive by the reward model, ref_kl = log pi - log rho, of the tokens drawn."""
    generate, drawn = sample.generate, []

    def spy(*args):
        drawn.append(generate(*args))
        return drawn[-1]

    monkeypatch.setattr(sample, "generate", spy)
    policy, rho = (gpt.load_gpt(data.load_checkpoint(study / f"{name}.pt"))
                   for name in ("ppo_beta2", "pretrain"))
    judge = reward.load_reward(data.load_checkpoint(study / "reward.pt"))
    encoding = data.load_tokenizer(study / "tokenizer.tiktoken")
    rows = sample.draw(study / "ppo_beta2.pt",
                       run_options("--prompt", prompt), 4)
    before, tokens = encoding.encode_ordinary(prompt or data.BOUNDARY), drawn[0]
    assert tokens[:, :len(before)].tolist() == [before] * 4 == [before] * len(rows)
    assert tokens.size(1) == len(before) + 16 and len(tokens.unique(dim=0)) == 4
    text = tokens if prompt else tokens[:, 1:]          # the blank line before is not read
    assert [row["text"] for row in rows] == [encoding.decode(ids) for ids in text.tolist()]
    assert_close([row["positive"] for row in rows],
                 judge(tokens[:, len(before):]).sigmoid().tolist(), "P(positive)", atol=1e-5,
                 rtol=0)
    with torch.no_grad():
        logp, ref = (model(tokens)[:, len(before) - 1:-1].log_softmax(-1).gather(
            2, tokens[:, len(before):, None]).sum((1, 2)) for model in (policy, rho))
    assert_close([row["ref_kl"] for row in rows], (logp - ref).tolist(), "log pi - log rho",
                 atol=1e-3, rtol=0)


def run_options(*arguments):
    """The options of sample.py with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        return sample.parse()


def test_the_seed_the_temperature_and_top_k_decide_what_is_drawn(drawn):
    """The same seed the same samples, another others; greedy needs no seed, and is top 1."""
    first = drawn("--seed", 3, "--num", 2)
    assert first == drawn("--seed", 3, "--num", 2) != drawn("--seed", 4, "--num", 2)
    greedy, other, top = (drawn(*options, "--num", 1) for options in (
        ("--temperature", 0, "--seed", 3), ("--temperature", 0, "--seed", 4), ("--top-k", 1)))
    assert greedy == other == top


def test_compare_shows_rho_and_the_twins_side_by_side(drifted, command, drawn):
    """Sample by sample, each model's its own from that seed; text says whose each is."""
    shutil.copy(drifted / f"{NEGATIVE}.pt", drifted / "ppo_negative_beta2.pt")
    rows = drawn("--compare", "--num", 2, checkpoint=drifted / "ppo_beta2.pt")
    (drifted / "ppo_negative_beta2.pt").unlink()
    names = ["pretrain", "ppo_beta2", "ppo_negative_beta2"]
    assert [row.pop("model") for row in rows] == names * 2
    for i, name in enumerate((*names[:2], NEGATIVE)):
        assert rows[i::3] == drawn("--num", 2, checkpoint=drifted / f"{name}.pt"), f"not {name}'s"
    assert rows[0]["ref_kl"] == 0 != rows[1]["ref_kl"], "only rho has not drifted"
    out = command(sample, "--checkpoint", drifted / "ppo_beta2.pt", "--compare", "--num", 1)[1]
    assert "----- pretrain\n" in out and "----- ppo_beta2\n" in out, out


def test_a_policy_of_the_drift_is_drawn_from_at_its_mark(drifted, drawn, command):
    """--kl; where the run kept none, that is said."""
    found = drawn("--kl", 0.5, checkpoint=drifted / f"{NEGATIVE}.pt")
    kept = drifted / f"{NEGATIVE}_kl0.5.pt"
    assert found == drawn(checkpoint=kept) != drawn(checkpoint=drifted / f"{NEGATIVE}.pt")
    explains(command(sample, "--checkpoint", drifted / f"{NEGATIVE}.pt", "--kl", 3),
             "--kl: invalid choice: 3.0 (choose from 0.5, 1, 2")
    explains(command(sample, "--checkpoint", drifted / "ppo_beta2.pt", "--kl", 32),
             "ppo_beta2_kl32.pt. Choose a mark that its drift has passed")


@pytest.mark.parametrize("options, says", [
    ("--checkpoint none.pt", "checkpoint none.pt: No such file or directory"),
    ("--checkpoint .", "checkpoint .: Is a directory"),
    ("--checkpoint . --kl 1", "kept no policy at 1 nats: there is no _kl1.pt"),
    ("--checkpoint pretrain.pt --compare", "--compare needs the --checkpoint of a policy"),
    ("--checkpoint reward.pt", "is a reward checkpoint, where one of kind pretrain or ppo"),
    ("--checkpoint summary.json", "checkpoint summary.json"),
    ("--top-k 0", "--top-k: 0 is not from 1"),
    ("--num 0", "--num: 0 is not from 1"),
    ("--prompt " + "love" * 100, "and 16 tokens more do not fit the model's context. Shorten it"),
    ("--temperature nan", "--temperature: nan is not from 0"),
    ("--seed -1", "--seed: -1 is not from 0"),
    ("--nonsense", "unrecognized arguments"),
    ("--rate pretrain.pt", "--rate needs a file to keep the ratings in"),
    ("--rate a.pt b/a.pt --ratings new.csv", "apart by their file names. Rename a copy"),
    ("--ratings none.csv", "ratings none.csv: No such file or directory"),
    ("--report samples", "samples/rho.pt: No such file or directory"),
])
def test_bad_options_of_sample_are_explained(study, command, monkeypatch, options, says):
    """In one line, with what to give instead."""
    monkeypatch.chdir(study)
    explains(command(sample, "--checkpoint", "ppo_beta2.pt", *options.split()), says)


def test_a_policy_without_the_files_beside_it_is_explained(study, tmp_path, command):
    """A tokenizer is needed, and rho to say how far off; a reward model only if there is one."""
    shutil.copy(study / "ppo_beta2.pt", tmp_path)
    arguments = ["--checkpoint", tmp_path / "ppo_beta2.pt", "--num", 1]
    explains(command(sample, *arguments), "tokenizer.tiktoken: No such file or directory")
    shutil.copy(study / "tokenizer.tiktoken", tmp_path)
    explains(command(sample, *arguments), "pretrain.pt: No such file or directory")
    shutil.copy(study / "pretrain.pt", tmp_path)
    assert json.loads(command(sample, *arguments, "--jsonl")[1])["positive"] is None
    assert "Positive Prob: unknown   log pi - log rho: " in command(sample, *arguments)[1]
    state = data.load_checkpoint(study / "reward.pt")
    state["model"]["bag.bias"] += 1
    data.save_checkpoint(tmp_path / "reward.pt", state)
    explains(command(sample, *arguments), "are not of the same study")
    state["inputs"]["pretrain"] = "another"
    data.save_checkpoint(tmp_path / "reward.pt", state)
    arguments[1] = tmp_path / "pretrain.pt"
    explains(command(sample, *arguments), "are not of the same study")


def test_the_script_itself_exits_with_2_and_one_line(tmp_path):
    """python sample.py where there is nothing to sample from, in a process of its own."""
    done = subprocess.run([sys.executable, data.HERE / "sample.py"], cwd=tmp_path,
                          capture_output=True, text=True)
    explains((done.returncode, done.stdout, done.stderr), "checkpoint out/pretrain.pt: No such")


# ---- reward.py --score --------------------------------------------------------------------

@pytest.mark.parametrize("arguments, says", [
    (["--score", "none.jsonl"], "none.jsonl: No such file or directory"),
    (["--score", "."], "Is a directory"),
    (["--score", "bad.jsonl"], "bad.jsonl line 2 is not a JSON object"),
    (["--score", "bad.jsonl", "--out", "."], "reward.pt: No such file or directory"),
    (["--score"], "expected one argument"),
])
def test_what_cannot_be_scored_is_explained(study, tmp_path, command, monkeypatch, arguments, says):
    """By its line, where it has one."""
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nlove\n')
    monkeypatch.chdir(tmp_path)
    explains(command(reward, "--out", study, *arguments), says)


# ---- ratings ------------------------------------------------------------------------------

@pytest.fixture
def rated(drifted, tmp_path, command, monkeypatch):
    """rated(answers, checkpoint ...) -> what --rate printed, the rows on disk afterwards."""
    def rate(answers, *names, num=2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in answers)))
        code, out, err = command(sample, "--rate", *(drifted / f"{name}.pt" for name in names),
                                 "--ratings", tmp_path / "mine.csv", "--num", num,
                                 "--checkpoint", drifted / "pretrain.pt")
        assert (code, err) == (0, ""), err
        with open(tmp_path / "mine.csv", newline="") as file:
            return out, list(csv.DictReader(file))
    return rate


THREE = ["pretrain", "ppo_beta2", NEGATIVE]


def test_samples_of_three_models_are_rated_blind(rated, drifted, tmp_path):
    """Each shown once, shuffled, without a word of whose it is; the table afterwards says it."""
    out, rows = rated([x for i in range(6) for x in (i % 5 - 2, 1 + i % 5)], *THREE)
    shown, _, table = out.partition("| drawn from")
    assert not any(word in shown for word in ("pretrain", "ppo", "beta", "Positive Prob")), out
    args = run_options()
    wanted = {(row["text"].strip(), name) for name in THREE
              for row in sample.draw(drifted / f"{name}.pt", args, 2)}
    assert {(row["text"], row["drawn_from"]) for row in rows} == wanted and len(rows) == 6
    switches = sum(a["drawn_from"] != b["drawn_from"] for a, b in itertools.pairwise(rows))
    assert switches > 2, "one model's samples stand together"
    at = [shown.index(f"----- {6 - i} to go\n{row['text']}\n") for i, row in enumerate(rows)]
    assert at == sorted(at), "an answer belongs to another text"
    assert [(float(r["rating"]), float(r["sense"])) for r in rows] == [
        (i % 5 - 2, 1 + i % 5) for i in range(6)]
    assert all(name in table for name in THREE), table
    # What a reader has rated can be trained on.
    assert data.read_labels(tmp_path / "mine.csv") == [
        (row["text"], float(row["rating"]), None) for row in rows]


def test_rating_goes_back_and_stops_and_goes_on(rated):
    """b asks again, also from the second question; q keeps what is done; the rest comes later."""
    out, rows = rated([1, 5, "b", -1, 4, 2, "b", 0, 3, "b", "b", "q"], *THREE)
    assert rows == [], "what was taken back is gone"
    first = out.partition("----- 6 to go\n")[2].partition("\n\nfeeling")[0]
    assert out.count("----- 6 to go\n") == out.count(f"----- 6 to go\n{first}\n") == 5, "another"
    out, rows = rated([1, 2, "q"], *THREE)
    assert len(rows) == 1 and rows[0]["text"] == first and "1 ratings are in" in out, out
    assert "| drawn from" not in out, "means would tell a reader who goes on"
    out, again = rated([0, 1] * 5, *THREE)
    assert out.startswith("1 rated, 5 to go.") and again[0] == rows[0] and len(again) == 6
    assert len({row["text"] for row in again}) == 6, "a text was asked twice"
    assert rated([], *THREE)[0].startswith("6 rated, 0 to go.")


@pytest.mark.parametrize("answer, says", [
    ("3", "rating 3 is outside -2 to 2"), ("good", "could not convert string to float: 'good'"),
    ("nan", "rating nan is outside"), ("", "could not convert string to float: ''"),
    ("1,5", "could not convert string to float")])
def test_an_answer_that_is_none_is_asked_for_again(rated, answer, says):
    """With what is wrong; nothing is written down. A rating may lie between whole numbers."""
    out, rows = rated([answer, " 0.5 ", "q"], "pretrain")
    assert says in out and out.count("feeling, -2 very negative") == 3, out
    assert [float(row["rating"]) for row in rows] == [0.5]


def test_no_rating_is_lost_by_a_kill(drifted, tmp_path, monkeypatch):
    """Whenever the next question is asked, all answers before are on the disk."""
    path, seen = tmp_path / "mine.csv", []

    class Reader:
        def readline(self):
            seen.append(len(sample.read_ratings(path)) if path.exists() else 0)
            if len(seen) == 4:
                raise KeyboardInterrupt
            return "1\n"

    monkeypatch.setattr(sys, "stdin", Reader())
    args = ["--rate", drifted / "pretrain.pt", "--ratings", path, "--num", 5]
    assert run_script(sample, *args) == 130
    assert seen == [0, 1, 2, 3] and len(sample.read_ratings(path)) == 3


def test_passages_of_the_plays_are_rated_as_labels(monkeypatch, tmp_path, command):
    """--rate plays: whole speeches of training plays, feeling alone; sense stays empty."""
    speeches = [f"SPEAKER {i}.\n" + "Words. " * i for i in range(99)]
    monkeypatch.setattr(data, "load_corpus", lambda: (data.BOUNDARY.join(speeches), "held out"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n-2\n"))
    path = tmp_path / "mine.csv"
    code, out, _ = command(sample, "--rate", "plays", "--ratings", path, "--num", 2)
    assert code == 0 and "sense" not in out and "2 ratings are in" in out, out
    rows = sample.read_ratings(path)
    assert [(r["rating"], r["sense"], r["drawn_from"]) for r in rows] == [
        (1.0, "", "plays"), (-2.0, "", "plays")]
    for row in rows:
        assert row["text"] in speeches and 100 < len(row["text"]) < 400, "about as long as samples"
    assert rows[0]["text"] != rows[1]["text"]


@pytest.mark.parametrize("content, says", [
    ("play,first_line\n", "line 1: the columns must be text, rating, sense, drawn_from"),
    ("To be, or not to be\n", "line 1: the columns must be"),
    ("text,rating,sense,drawn_from\na,1,1,x\nb,1\n", "line 3: the row has not as many fields"),
    ("text,rating,sense,drawn_from\na,1,1,x,y\n", "line 2: the row has not as many fields"),
    ("text,rating,sense,drawn_from\na,3,1,x\n", "line 2: rating 3 is outside -2 to 2"),
    ("text,rating,sense,drawn_from\na,1,0,x\n", "line 2: rating 0 is outside 1 to 5"),
    ("text,rating,sense,drawn_from\na,good,1,x\n", "line 2: could not convert string to float"),
    ("text,rating,sense,drawn_from\n" + "a" * 200_000 + ",1,1,x\n", "field larger than"),
    ("a\0b", "is not UTF-8 text"),
    ("text,rating,sense,drawn_from\n", "files of ratings are empty"),
    ("", "files of ratings are empty"),
], ids=range(11))
def test_a_bad_file_of_ratings_is_explained_and_left_alone(study, tmp_path, command, content,
                                                           says):
    """Read or to go on with: one line, and no byte of somebody's file is changed."""
    path = tmp_path / "mine.csv"
    path.write_text(content)
    more = ["--checkpoint", study / "pretrain.pt"]
    explains(command(sample, "--ratings", path, *more), says)
    if "empty" not in says:
        explains(command(sample, "--rate", study / "pretrain.pt", "--ratings", path, *more), says)
    assert path.read_text() == content


def test_the_table_of_ratings_says_what_readers_found(study, tmp_path, command):
    """Means with standard errors by hand, rho first; how two readers agree on what both read."""
    header = "text,rating,sense,drawn_from\n"
    (tmp_path / "a.csv").write_text(header + "love,2,5,ppo\n\njoy,1,4,ppo\nsir,0,3,pretrain\n"
                                    "death,-1,1,pretrain\nhere,1,1,pretrain\n")
    (tmp_path / "b.csv").write_text(header + "love,1,4,ppo\njoy,1,3,ppo\nsir,0,2,pretrain\n"
                                    "death,-2,1,pretrain\n")
    code, out, _ = command(sample, "--ratings", tmp_path / "a.csv", tmp_path / "b.csv",
                           "--checkpoint", study / "pretrain.pt")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()
            if line.startswith("|")]
    assert code == 0 and [row[0] for row in rows[2:]] == ["pretrain", "ppo"], out
    # A passage read by two is one, their mean. Of rho 0, -1.5 and 1: mean -1/6, deviation
    # sqrt(19 / 12), error sqrt(19 / 36) = 0.73; and so on.
    assert rows[2][1:4] == ["3", "-0.17 ± 0.73", "1.50 ± 0.50"], rows[2]
    assert rows[3][1:4] == ["2", "1.25 ± 0.25", "4.00 ± 0.50"], rows[3]
    rho, ppo = torch.tensor([0.0, -1.5, 1.0]), torch.tensor([1.5, 1.0])
    for row, gap, values in ((rows[2], 0, rho), (rows[3], 17 / 12, ppo)):
        assert row[5] == f"{gap:.2f} ± {sample.permutation_interval(values, rho):.2f}", row
    # Common: 2 1 0 -1 and 1 1 0 -2: disagreement 0.5, by chance mean (a - b)^2 = 3; r by hand.
    assert "two readers of 4 passages: quadratic kappa 0.83, Pearson 0.91" in out, out
    p = positive_of(study / "reward.pt", ["love", "joy", "sir", "death", "here"])
    error = statistics.stdev(p[:2]) / 2 ** 0.5
    assert rows[3][4] == f"{statistics.mean(p[:2]):.2f} ± {error:.2f}", "P(positive)"
    r = statistics.correlation([1.5, 1, 0, -1.5, 1], p)
    assert f"feeling and P(positive) correlate {r:.2f}" in out, out


def positive_of(path, texts):
    """P(positive) of each text by the model at path, read alone and whole."""
    model = reward.load_reward(data.load_checkpoint(path))
    encoding = data.load_tokenizer(path.with_name("tokenizer.tiktoken"))
    return [model(torch.tensor([encoding.encode_ordinary(text)])).sigmoid().item()
            for text in texts]


def test_passages_have_what_readers_and_both_models_say(study, tmp_path):
    """Rows of feeling, sense, P(positive) by either model; NaN is what nobody said."""
    (tmp_path / "mine.csv").write_text("text,rating,sense,drawn_from\nO love,1,,ppo\n"
                                       "O love,2,,ppo\nBloody grave,-1,2,ppo\n"
                                       "Bloody grave,-2,,ppo\nO love,0,5,pretrain\n")
    found = sample.read_passages([tmp_path / "mine.csv"], study)
    assert list(found) == ["pretrain", "ppo"], "rho first"
    love, grave = zip(*(positive_of(study / f"{kind}.pt", ["O love", "Bloody grave"])
                        for kind in ("reward", "judge")))
    expected = torch.tensor([[1.5, math.nan, *love], [-1.5, 2, *grave]])
    assert_close(found["ppo"], expected, "ppo", atol=1e-5, rtol=0, equal_nan=True)
    assert_close(found["pretrain"], torch.tensor([[0, 5, *love]]), "rho", atol=1e-5, rtol=0)
    alone = sample.read_passages([tmp_path / "mine.csv"], tmp_path)
    assert alone["ppo"][:, 2:].isnan().all(), "there is no model in that folder"
    mean, error = sample.mean_se(found["ppo"][:, 1])
    assert mean == 2 and math.isnan(error), "of one value"


def test_permutation_interval_is_that_of_all_ways_to_deal():
    """10,000 random deals of 3 + 4 values against all 35: the 95 % quantile of |difference|."""
    rng = random.Random(0)
    for _ in range(5):
        values = [rng.uniform(-2, 2) for _ in range(7)]
        gaps = []
        for chosen in itertools.combinations(range(7), 3):
            a = [values[i] for i in chosen]
            b = [x for i, x in enumerate(values) if i not in chosen]
            gaps.append(abs(sum(a) / 3 - sum(b) / 4))
        gaps.sort()
        # Each way has chance 1/35: the quantile is the 34th, within the noise of the deals.
        found = sample.permutation_interval(*torch.tensor(values).split([3, 4]))
        assert gaps[32] - 1e-9 <= found <= gaps[34] + 1e-9, f"{found} in {gaps[-4:]}"
    alike = sample.permutation_interval(torch.ones(3), torch.ones(4))
    assert alike == 0, "all alike: no difference"


@pytest.mark.parametrize("a, b, kappa", [
    ([1, 2, 3], [1, 2, 3], 1.0),
    ([0, 0], [0, 0], 1.0),
    ([-1, 1], [1, -1], -1.0),       # 4 / mean of 4 0 0 4 = 2
    ([-2, 0, 2], [0, 0, 0], 0.0),   # a reader who always says the same
    ([0, 1], [0, 2], 1 - 0.5 / 1.5),
])
def test_quadratic_kappa_by_hand(a, b, kappa):
    """1 - disagreement / disagreement by chance; 1 for two who agree, though they say one thing."""
    a, b = torch.tensor([a, b], dtype=torch.float64)
    assert_close(sample.quadratic_kappa(a, b), kappa, "kappa")


# ---- the report ---------------------------------------------------------------------------

def test_the_report_is_what_was_promised(study, drifted):
    """Figures, samples, report.md with them, a strip along the drift; nothing half done is left."""
    def made(out):
        return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}

    runs, figures = ["ppo_beta0.5", "ppo_beta2"], ("frontier", "judge", "ppo", "reward")
    stages = ["data", "pretrain", "reward", "judge", "rho", *runs]
    wanted = {"tokenizer.tiktoken", "report.md", "summary.json", ".lock",
              *(f"{name}.pt" for name in stages),
              *(f"{name}.metrics.jsonl" for name in ("pretrain", "judge", *runs)),
              *(f"figures/{name}.png" for name in figures),
              *(f"samples/{name}.txt" for name in ("rho", *runs))}
    assert made(study) == wanted, f"missing or unexpected: {made(study) ^ wanted}"
    report = (study / "report.md").read_text()
    for name in figures:
        assert f"(figures/{name}.png)" in report, f"the report does not show {name}.png"
        assert (study / f"figures/{name}.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("rho", *runs):
        assert (study / "samples" / f"{name}.txt").read_text().count("Positive Prob: ") == 20
    assert "along its drift" not in report
    report = (drifted / "report.md").read_text()
    strip = report.partition(f"## {NEGATIVE} along its drift")[2].splitlines()[4:]
    marks = [line.split("|")[1].strip() for line in itertools.takewhile(bool, strip)]
    kept = sorted(float(path.stem.split("_kl")[1]) for path in drifted.glob("*_kl*"))
    assert marks == [f"{mark:g}" for mark in kept] and kept, "one line for each policy kept"


def test_the_summary_has_the_keys_that_others_read(study):
    """Those of the README's summary.json; there may be more."""
    summary = summary_of(study)
    keys = {"seconds": "data pretrain reward judge ppo total",
            "pretrain": "parameters val_bits_per_byte",
            "reward": "val_pearson val_auc val_log_loss mean std reference_positive",
            "judge": "val_pearson val_auc val_log_loss mean std"}
    for part, names in keys.items():
        assert set(names.split()) <= set(summary[part]), f"summary.json lacks keys in {part}"
    assert (summary["size"], summary["device"]) == ("toy", "cpu")
    seconds = summary["seconds"]
    assert list(seconds["ppo"]) == ["0.5", "2"]
    assert_close(seconds["total"], sum(seconds["ppo"].values()) + sum(
        seconds[x] for x in ("data", "pretrain", "reward", "judge", "rho")), "the total")
    for row in summary["ppo"]:
        assert set("beta iterations score positive ref_kl objective reference_objective optimum "
                   "fraction_of_optimum seconds_per_iteration judge toward".split()) <= set(row)
        assert set(row["optimum"]) == set(
            "objective score ref_kl ess objective_se at_least".split())
        assert row["iterations"] == 3
    assert [row["beta"] for row in summary["ppo"]] == [0.5, 2.0], "sorted, whatever was asked first"


def test_the_numbers_of_the_summary_hang_together(drifted):
    """J = score - beta log ratio; fraction = (J - J_rho) / (J* - J_rho); no J* of an ess of 99."""
    rows = summary_of(drifted)["ppo"]
    assert [(row["toward"], row["beta"]) for row in rows] == [
        ("negative", 0.02), ("positive", 0.0), ("positive", 0.5), ("positive", 2.0)]
    for row in rows:
        best, J = row["optimum"], row["objective"]
        run = data.load_checkpoint(drifted / f"{train.run_name(row['toward'], row['beta'])}.pt")
        fresh = run["fresh"]
        k1, kl = fresh["log_ratio"].double(), fresh["exact_kl"].double()
        assert_close(row["ref_kl"], kl.mean().item(), "exact KL", atol=1e-5, rtol=0)
        assert_close(J, row["score"] - row["beta"] * k1.mean().item(), "J", atol=1e-5, rtol=0)
        noise = row["beta"] * (k1 - kl).std().item() / len(kl) ** 0.5
        other = row["score"] - row["beta"] * row["ref_kl"]
        assert abs(J - other) <= 4 * noise + 1e-6, "J by the exact KL"
        assert_close(row["reference_objective"], 0.0, "scores are of these samples of rho",
                     atol=1e-4, rtol=0)
        if row["beta"]:
            assert best["at_least"] < (best["objective"] or math.inf), "a bound above the estimate"
        if best["ess"] < 100:
            assert row["fraction_of_optimum"] is row["kl_to_optimum"] is best["objective"] is None
            continue
        way = best["objective"] - row["reference_objective"]
        assert_close(row["fraction_of_optimum"], (J - row["reference_objective"]) / way, "fraction")
        assert_close(row["kl_to_optimum"], (best["objective"] - J) / row["beta"], "KL(pi to pi*)")
        assert J < best["objective"] + 4 * row["objective_se"], "J lies above J*"
    ess = [row["optimum"]["ess"] for row in rows]
    assert ess[3] >= 100 > ess[2] and ess[1] == 0, f"beta 2 is in reach, 0 has no optimum: {ess}"
    # The report's table: where J* is not known, its cell and those that need it are empty.
    table = (drifted / "report.md").read_text().partition("| beta |")[2].splitlines()[2:6]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert [row[0] for row in cells] == ["negative 0.02", "0", "0.5", "2"]
    for row, n, found in zip(cells, ess, rows):
        known = {bool(row[column]) for column in (6, 11)}         # J*, KL(pi to pi*)
        assert known == {n >= 100} and row[8] == f"{n:.0f}", row
        assert bool(row[9]) == (n >= 100), "the fraction of J*"
        least = found["optimum"]["at_least"]
        assert bool(row[7]) == (row[0] != "0" and n < 100), "what J* is at least, if that is all"
        if row[0] != "0" and n < 100:
            most = found["objective"] / max(least, found["objective"])
            assert_close(float(row[10]), most, "what the fraction is at most", atol=6e-3, rtol=0)
        else:
            assert row[10] == "", row


def test_the_pool_weighs_by_the_right_policys_probabilities(drifted):
    """log(rho/q) of rho's and pi's samples, q their mixture: by forward passes of both models."""
    run, pretrained, rewarded, samples = (data.load_checkpoint(drifted / f"{name}.pt")
                                          for name in (NEGATIVE, "pretrain", "reward", "rho"))
    tokens = torch.cat((samples["tokens"], run["fresh"]["tokens"])).long()
    start = data.load_tokenizer(drifted / "tokenizer.tiktoken").encode_ordinary("\n\n")[0]
    whole = torch.cat((torch.full((len(tokens), 1), start), tokens), 1)
    with torch.no_grad():
        pi, rho = (gpt.load_gpt(state)(whole[:, :-1]).log_softmax(-1).gather(
            2, tokens[..., None]).sum((1, 2)).double() for state in (run, pretrained))
    n = torch.tensor([512, 128]) / 640
    log_q = torch.stack((rho + n[0].log(), pi + n[1].log())).logsumexp(0)
    scores, weights = (x.squeeze(0) for x in sample.pool(samples, run))
    # The run's numbers were made in the device's own precision, these in float32.
    assert_close(weights, rho - log_q, "log(rho/q)", atol=0.15, rtol=0)
    assert (weights[:512].mean() - weights[512:].mean()) > 1, "the two should differ much"
    logp = reward.load_reward(rewarded)(tokens).neg().sigmoid().log()
    assert_close(scores, (logp - logp[:512].mean()) / logp[:512].std(), "the score toward negative",
                 atol=0.05, rtol=0)


def test_of_samples_of_the_optimum_the_objective_is_known_without_error():
    """score - beta log(pi*/rho) is beta log Z of every text; with the exact KL it would vary.

    rho of 8 texts is uniform; pi* = rho exp(r / beta) / Z, by enumeration.
    """
    log_odds, beta = torch.linspace(-2, 3, 8, dtype=torch.float64), 0.5
    constants = reward.constants(log_odds)
    r = reward.score(log_odds, **constants)
    log_z = (r / beta).exp().mean().log()
    texts = (r / beta).softmax(0).multinomial(64, replacement=True)
    log_ratio = r / beta - log_z
    kl = ((r / beta).softmax(0) * log_ratio).sum()
    fresh = {"log_odds": log_odds[texts], "judge": log_odds[texts], "log_ratio": log_ratio[texts],
             "exact_kl": kl.expand(64)}
    both = {"reward": log_odds, "judge": log_odds}
    rho = {"prompts": torch.zeros(1, 1), "log_odds": both,
           "constants": {name: {"positive": constants} for name in both}}
    run = {"toward": "positive", "beta": beta, "fresh": fresh, "rho_log_ratio": log_ratio,
           "history": [{}], "seconds": 1.0}
    found = sample.summarise_run(rho, run)
    assert_close(found["objective"], beta * log_z.item(), "J*")
    assert found["objective_se"] < 1e-6, "the estimate should not vary"
    assert_close(found["ref_kl"], kl.item(), "the exact KL")
    assert sample.mean_se(r[texts] - beta * kl)[1] > 0.01, "with the exact KL it would"
    assert found["fraction_at_most"] <= 1, "J is never above J*"


def test_ratings_add_a_figure_and_the_readers_sense(drifted, tmp_path, monkeypatch):
    """The strip has the mean sense at each mark that was rated; the figure its four lines."""
    out = shutil.copytree(drifted, tmp_path / "out")
    kept = [path.stem.split("_kl")[1] for path in out.glob(f"{NEGATIVE}_kl*.pt")]
    mark = min(map(float, kept))
    (tmp_path / "mine.csv").write_text("text,rating,sense,drawn_from\n"
                                       f"love,2,5,{NEGATIVE}_kl{mark:g}\n"
                                       f"joy,1,2,{NEGATIVE}_kl{mark:g}\n"
                                       f"death,-2,1,{NEGATIVE}\n"
                                       "sir,0,3,pretrain\nmy,1,3,pretrain\n")
    figures = {}
    monkeypatch.setattr(sample, "save_figure",
                        lambda figure, path: figures.update({path.stem: figure}))
    assert run_script(sample, "--report", out, "--ratings", tmp_path / "mine.csv") == 0
    report = (out / "report.md").read_text()
    strip = report.partition(f"## {NEGATIVE} along its drift")[2].splitlines()[2:]
    column = [line.split("|")[6].strip() for line in itertools.takewhile(bool, strip)]
    assert column[0] == "readers' sense" and column[2] == "3.5" and not any(column[3:]), column
    assert "(figures/readers.png)" in report
    lines = {line.get_label(): line.lines[0] for line in figures["readers"].axes[0].containers}
    # In the unit 0 to 1: feeling (0 + 1) / 2 and (2 + 1) / 2 from -2 to 2; sense from 1 to 5.
    expected = {"readers' feeling": [0.625, 0.875, 0.0], "readers' sense": [0.5, 0.625, 0.0]}
    for name, file in (("P(positive)", "reward.pt"), ("the judge's P(positive)", "judge.pt")):
        p = positive_of(out / file, ["sir", "my", "love", "joy", "death"])
        expected[name] = [(p[0] + p[1]) / 2, (p[2] + p[3]) / 2, p[4]]
    assert set(lines) == {f"{name}, {NEGATIVE}" for name in expected}
    for name, ys in expected.items():
        x, y = lines[f"{name}, {NEGATIVE}"].get_data()
        run = data.load_checkpoint(out / f"{NEGATIVE}.pt")
        past = next(row["exact_kl"] for row in run["history"] if row["exact_kl"] >= mark)
        end = run["fresh"]["exact_kl"].mean().item()
        assert_close(list(map(float, x)), [0.0, past, end], "each stands where its drift was")
        assert_close(list(map(float, y)), ys, name, atol=1e-5, rtol=0)


def test_a_second_report_says_the_same(study, tmp_path, texts, monkeypatch):
    """Drawn again by a run that finds all done: only times differ."""
    out = shutil.copytree(study, tmp_path / "out")
    for name in ("summary.json", "report.md"):
        (out / name).unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    monkeypatch.setattr(sample, "save_figure", lambda *_: None)     # they have been drawn
    assert run_script(train, *argv(texts, out)) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    assert (out / "report.md").read_text() == (study / "report.md").read_text()
    assert without_times(summary_of(out)) == without_times(summary_of(study))


@pytest.mark.parametrize("kind", ["pretrain", "reward", "judge", "rho"])
def test_a_run_of_another_study_is_left_out(study, tmp_path, command, monkeypatch, kind):
    """Its scores mean something else; where no run is left, one line says so."""
    out = shutil.copytree(study, tmp_path / "out")
    state = data.load_checkpoint(out / "ppo_beta2.pt")
    state["inputs"][kind] = "another"
    monkeypatch.setattr(sample, "save_figure", lambda *_: None)     # figures only take time here
    data.save_checkpoint(out / "ppo_beta2.pt", state)
    code, said, _ = command(sample, "--report", out)
    assert code == 0, said
    assert "ppo_beta2.pt is of another task, reward model or judge and is left out" in said, said
    assert [row["beta"] for row in summary_of(out)["ppo"]] == [0.5]
    (out / "ppo_beta0.5.pt").unlink()
    explains(command(sample, "--report", out), "has no finished PPO run")
