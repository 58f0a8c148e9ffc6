"""Weighted averages over a table of scores, with percentages against named rows (arXiv 2504.18580, tables 2 and 3)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stockpot.errors import ArgumentError, nearest
from stockpot.files import read_table, read_text

__all__ = ["Aggregate", "aggregate_scores", "parse_weights"]


@dataclass(frozen=True)
class Aggregate:
    """One row: its name, the weighted average, and by how many percent that is above each reference's."""

    name: str
    score: float
    percent: Mapping[str, float]


def parse_weights(text: str) -> dict[str, float]:
    """`gsm8k=0.3,gsm_plus=0.7` -> weights by column. Raises ArgumentError."""
    out: dict[str, float] = {}
    for item in text.split(","):
        name, sign, value = item.partition("=")
        name = name.strip()
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not sign or not name or not math.isfinite(weight):
            raise ArgumentError(f"weights: expected COLUMN=NUMBER,..., got {item.strip()!r}")
        if name in out:
            raise ArgumentError(f"weights: {name} is given twice")
        out[name] = weight
    if not sum(out.values()):
        raise ArgumentError("weights: they sum to 0")
    return out


def aggregate_scores(
    path: str | os.PathLike[str], weights: Mapping[str, float], references: Sequence[str] = ()
) -> list[Aggregate]:
    """Weighted averages of the columns of a CSV file whose first column names the rows, in the file's order.

    weights     by column; divided by their sum
    references  names of rows: each average is given in percent above theirs

    Raises ArgumentError with line and column for what is missing or no number.
    """
    where = os.fspath(path)
    rows = _rows(where, weights)
    total = sum(weights.values())
    scores = {name: math.fsum(values[c] * w for c, w in weights.items()) / total for name, values in rows.items()}
    for reference in references:
        if reference not in scores:
            raise ArgumentError(
                f"reference: {where} has no row {reference!r}; there are {', '.join(scores)}{nearest(reference, scores)}"
            )
        if scores[reference] == 0:
            raise ArgumentError(f"reference: {reference!r} scores 0, so nothing can be given in percent of it")
    return [Aggregate(n, s, {r: 100 * (s - scores[r]) / abs(scores[r]) for r in references}) for n, s in scores.items()]


def _rows(where: str, weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
    head, lines = read_table(read_text(where, "a table of scores", ArgumentError), where, ArgumentError)
    if len(head) < 2 or not lines:
        raise ArgumentError(f"{where}: expected a line of column names, then rows of a name and numbers")
    twice = next((c for c in weights if head.count(c) > 1), None)
    if twice is not None:
        raise ArgumentError(f"{where}: the column {twice!r} stands there twice")
    for column in weights:
        if column not in head[1:]:
            raise ArgumentError(
                f"weights: {where} has no column {column!r}; there are {', '.join(head[1:])}{nearest(column, head[1:])}"
            )
    out: dict[str, dict[str, float]] = {}
    for number, row in lines:
        name = row[0].strip()
        if name in out:
            raise ArgumentError(f"{where}:{number}: {name!r} stands there twice")
        out[name] = {}
        for column in weights:
            at = head.index(column)
            text = row[at].strip() if at < len(row) else ""
            try:
                value = float(text) if "_" not in text else math.nan
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise ArgumentError(f"{where}:{number}: {column} of {name!r}: expected a number, got {text!r}")
            out[name][column] = value
    return out
