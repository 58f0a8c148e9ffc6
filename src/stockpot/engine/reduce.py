"""Sums in float64 whose order depends on the tensor's shape alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from stockpot.methods.arrays import is_numpy
from stockpot.planning.grid import REDUCE

__all__ = ["piece_sum"]


def piece_sum(terms: Any, total: Any = None) -> Any:
    """`[k, n] -> [k]` float64: chunks of REDUCE elements by halving, added in order to `total` (or to zeros).

    float64 terms are overwritten. A piece may come in several calls, each but the last of a multiple of REDUCE elements.

    Halving adds element i and element i + h, so it needs nothing but elementwise addition: the same on every machine.
    """
    wide = terms.astype(np.float64, copy=False) if is_numpy(terms) else terms.double()
    k, n = wide.shape
    total = np.zeros(k, np.float64) if total is None else total
    whole = n // REDUCE
    sums = []
    if whole:
        sums.append(_halve(wide[:, : whole * REDUCE].reshape(k, whole, REDUCE)))
    if n % REDUCE:
        sums.append(_halve(wide[:, whole * REDUCE :].reshape(k, 1, -1)))
    for part in sums:
        for j in range(part.shape[1]):
            total = total + part[:, j]
    return total


def _halve(x: Any) -> Any:
    """`[k, c, n] -> [k, c]` numpy."""
    n = x.shape[2]
    while n > 1:
        h = (n + 1) // 2
        x[:, :, : n - h] += x[:, :, h:n]
        n = h
    sums = x[:, :, 0]
    return sums.copy() if is_numpy(sums) else sums.cpu().numpy()
