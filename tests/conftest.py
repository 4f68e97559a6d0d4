"""What the test files share: the import path, comparisons that explain themselves, a trained GPT.

Read the tests in this order: test_ppo (the equations), test_loop, test_gpt, test_reward, test_data,
test_train, test_tasks, test_sample; then bug_hunt.py: are the tests strong?
"""

import csv
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from gpt import GPT, GPTConfig  # noqa: E402  (found through the line above)

torch.set_num_threads(1)    # the tensors here are tiny: threads only cost time


def assert_close(actual, expected, says, **tolerance):
    """actual equals expected within rounding, or the failure opens with what that says in words."""
    torch.testing.assert_close(actual, expected, msg=lambda numbers: f"{says}\n{numbers}",
                               **tolerance)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    """The same normal numbers at every call with the same seed."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def chi_square_p(draws, probs):
    """The chance of counts at least this far from probs (V,) if draws (N,) do follow it.
    Pearson 1900. Cells expecting fewer than 5 draws are pooled; a draw of probability 0 gives 0."""
    counts = torch.bincount(draws, minlength=len(probs)).double()
    expected = probs.double() * len(draws)
    if counts[probs == 0].any():
        return 0.0
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) == 1:
        return 1.0          # one cell takes every draw
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1).double()
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def loops(n, length, generator):
    """n token streams (n,length), each a random word of 2 to 6 of 16 tokens, repeated."""
    words = torch.randint(16, (n, 6), generator=generator)
    period = torch.randint(2, 7, (n, 1), generator=generator)
    return words.gather(1, torch.arange(length) % period)


@pytest.fixture(autouse=True)
def same_numbers():
    """torch's global generator, which the scripts draw from, begins alike in every test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained():
    """A GPT of 3 layers trained for two seconds to go on with loops().
    An untrained one would hide errors: it attends to nothing, and its logits are uniform."""
    generator = seeded()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=16, block_size=24, n_layer=3, n_head=4, n_embd=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        tokens = loops(32, 24, generator)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


# Stands in the place of size tiny, which the tests cannot wait for.
TOY = {"vocab_size": 300, "block_size": 80, "n_layer": 2, "n_head": 2, "n_embd": 32,
       "pretrain_steps": 30, "length": 16, "prompts": 16, "rho_samples": 512, "iterations": 3,
       "batch": 32, "minibatch": 16, "fresh_samples": 128, "lr": 6e-3, "max_update_kl": 0.05}
KIND = "love joy sweet merry gentle blessed laughing friend golden dear".split()
SAD = "death grief bloody cruel tears grave traitor poison weeping curse".split()
PLAIN = "the my lord thou and of night a shall king come to that with not her sea morning".split()


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder with play.txt, 50 kB of speeches, and labels.csv, which rates kind and sad words."""
    folder, rng, lines = tmp_path_factory.mktemp("texts"), random.Random(0), []
    while len(lines) < 1800:
        words = rng.choice([KIND, SAD, PLAIN]) + PLAIN
        speech = [" ".join(rng.choices(words, k=rng.randint(4, 9))).capitalize()
                  + rng.choice(",.;!?") for _ in range(rng.randint(1, 4))]
        lines += [rng.choice(["ORSINO.", "VIOLA.", "SIR TOBY.", "CURIO."]), *speech, ""]
    (folder / "play.txt").write_text("\n".join(lines))
    with open(folder / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "rating"])
        for first in range(0, 1500, 6):
            text = "\n".join(lines[first:first + 6]).strip()
            words = text.lower()
            rating = sum(word in words for word in KIND) - sum(word in words for word in SAD)
            rows.writerow([text, max(-2, min(2, rating))])
    return folder


def argv(texts, out, *more):
    """The command line of the toy study."""
    files = ["--out", out, "--corpus", texts / "play.txt", "--labels", texts / "labels.csv"]
    return [str(x) for x in ("--size", "tiny", "--device", "cpu", *files, "--beta", 0.5, 2, *more)]


def toy_options():
    """train.OPTIONS with TOY in the column of size tiny."""
    import train
    return [row._replace(tiny=TOY.get(row.name, row.tiny)) for row in train.OPTIONS]


STREAMS = {}        # of PPO runs by rho's key, beta, target: torch's stream when measuring began


def run_script(script, *arguments):
    """Run a script in this process as its command line would: its exit code."""
    import data
    import ppo
    import train

    def evaluate(options, run, judge_fn, rho, real=ppo.evaluate):
        STREAMS.setdefault((rho["key"], options.beta, options.toward), torch.get_rng_state())
        return real(options, run, judge_fn, rho)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "OPTIONS", toy_options())
        patch.setattr(train, "CHECKPOINT_EVERY", 0.0)
        patch.setattr(ppo, "evaluate", evaluate)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        try:
            data.run(script.main)
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="session")
def study(texts, tmp_path_factory):
    """The folder of a whole run; look, but do not write."""
    import train
    out = tmp_path_factory.mktemp("study") / "out"
    assert run_script(train, *argv(texts, out)) == 0, "the toy study failed"
    return out


@pytest.fixture
def again(study, tmp_path):
    """A copy of that folder, to run in."""
    return shutil.copytree(study, tmp_path / "out")


@pytest.fixture
def command(capsys):
    """command(script, arguments ...) -> exit code, standard output, standard error."""
    def run(script, *arguments):
        capsys.readouterr()
        return run_script(script, *arguments), *capsys.readouterr()
    return run


def load(folder, name):
    """The checkpoint of a stage."""
    import data
    return data.load_checkpoint(folder / f"{name}.pt")


def content(path):
    """What a checkpoint holds but for its seconds: tensors as bytes."""
    import data

    def plain(x):
        if torch.is_tensor(x):
            return x.dtype, x.shape, x.numpy().tobytes()
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items() if key != "seconds"}
        return [plain(y) for y in x] if isinstance(x, (list, tuple)) else x
    return plain(data.load_checkpoint(path))


def explains(result, says):
    """A failed command said what is wrong in one line, with exit code 2."""
    code, _, err = result
    assert code == 2 and len(err.splitlines()) == 1, f"exit code {code}, said: {err}"
    assert says in err, f"the message should hold {says!r}: {err}"
