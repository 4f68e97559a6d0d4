"""What the test files share: the import path, comparisons that explain themselves, a trained GPT."""

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
    torch.testing.assert_close(actual, expected, msg=lambda numbers: f"{says}\n{numbers}", **tolerance)


def randn(*shape, seed=0, dtype=torch.float64):
    """The same normal numbers at every call with the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chi_square_p(draws, probs):
    """The chance of counts at least this far from probs (V,) if draws (N,) do follow it (Pearson 1900).

    Cells expecting fewer than 5 draws are pooled; a draw of probability 0 gives 0.
    """
    counts, expected = torch.bincount(draws, minlength=len(probs)).double(), probs.double() * len(draws)
    if counts[probs == 0].any():
        return 0.0
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) == 1:
        return 1.0          # one cell takes every draw
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def loops(n, length, generator):
    """n token streams (n,length), each a random word of 2 to 6 of 16 tokens, repeated."""
    words = torch.randint(16, (n, 6), generator=generator)
    period = torch.randint(2, 7, (n, 1), generator=generator)
    return words.gather(1, torch.arange(length) % period)


@pytest.fixture(scope="session")
def trained():
    """A GPT of 3 layers trained for two seconds to go on with loops().

    An untrained one would hide errors: its output projections are 0, so it attends to
    nothing, and its logits are uniform.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=16, block_size=24, n_layer=3, n_head=2, n_embd=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        tokens = loops(32, 24, generator)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)
