"""Weights of snapshots that the user gives in a file."""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

from stockpot.errors import ArgumentError
from stockpot.files import read_table, read_text

__all__ = ["read_weights"]


def read_weights(path: str) -> dict[int, float]:
    """A JSON object from step to weight, or a CSV with the columns step and weight. Raises ArgumentError."""
    text = read_text(os.path.expanduser(path), "a file of weights", ArgumentError, most=2**24)
    rows: list[tuple[Any, Any]] = []
    if path.endswith(".json"):
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except (ValueError, RecursionError) as e:
            raise ArgumentError(f"{path}: not valid JSON: {e}") from e
        if not isinstance(pairs, list) or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
            raise ArgumentError(f'{path}: expected an object from step to weight, such as {{"100": 0.4, "200": 0.6}}')
        rows = list(pairs)
    else:
        columns, lines = read_table(text, path, ArgumentError)
        if "step" not in columns or "weight" not in columns:
            raise ArgumentError(f"{path}: expected the columns step and weight, got {', '.join(columns) or 'nothing'}")
        found = (dict(itertools.zip_longest(columns, cells[: len(columns)])) for _, cells in lines)
        rows = [(row.get("step"), row.get("weight")) for row in found]
    out: dict[int, float] = {}
    for step, weight in rows:
        try:
            key, value = int(step), float(weight)
        except (TypeError, ValueError, OverflowError):
            raise ArgumentError(f"{path}: step {step!r} with weight {weight!r}: expected two numbers") from None
        if key in out:
            raise ArgumentError(f"{path}: step {key} is given twice")
        out[key] = value
    if not out:
        raise ArgumentError(f"{path}: holds no weights")
    return out
