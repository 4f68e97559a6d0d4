"""Markdown tables, which the scripts of this folder print."""

import numpy as np


def mean_se(values):
    """(mean, standard error) of independent values (N,); the error of a single one is NaN."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return values.mean(), np.nan
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5


def cell(x):
    """How a table shows a value; a pair is a mean and its standard error.

    >>> cell(0.12345), cell((0.5, 0.25)), cell(None)
    ('0.123', '0.50 ± 0.25', '')
    """
    if x in (None, (None, None)):
        return ""
    if isinstance(x, tuple):
        return "%.2f ± %.2f" % x
    # Adding 0.0 turns -0 into 0.
    return f"{round(x, 5) + 0.0:.3g}" if isinstance(x, float) else str(x)


def table(columns, rows):
    """A markdown table: lines of text."""
    lines = []
    for row in [columns, ["---"] * len(columns), *rows]:
        lines.append(f"| {' | '.join(map(cell, row))} |")
    return lines + [""]
