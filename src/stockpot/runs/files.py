"""Weights of snapshots that the user gives in a file."""

from __future__ import annotations

import csv
import json
import os
from typing import Any

from stockpot.errors import ArgumentError

__all__ = ["read_weights"]


def read_weights(path: str) -> dict[int, float]:
    """A JSON object from step to weight, or a CSV with the columns step and weight. Raises ArgumentError."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8", newline="") as f:
            text = f.read(2**24)
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not a text file"
        raise ArgumentError(f"{path}: can't be read: {why}") from e
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
        try:
            reader = csv.DictReader(text.splitlines())
            columns = [c.strip() for c in reader.fieldnames or ()]
            reader.fieldnames = columns
            if "step" not in columns or "weight" not in columns:
                raise ArgumentError(
                    f"{path}: expected the columns step and weight, got {', '.join(columns) or 'nothing'}"
                )
            rows = [(row["step"], row["weight"]) for row in reader]
        except csv.Error as e:
            raise ArgumentError(f"{path}: not a CSV file: {e}") from e
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
