"""The few array operations that elementwise methods share, on numpy arrays.

Everything is built from single IEEE operations (no fused multiply-add, no library reductions), so that a block gives
the same bytes whatever its size, on every machine. Whole-matrix methods use `methods.backends` besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stockpot.statistics import magnitude32 as magnitude

__all__ = [
    "add_rows",
    "column",
    "count_rows",
    "keep_only",
    "keep_where",
    "magnitude",
    "row_ranks",
    "weighted_sum",
    "weighted_sum_64",
]


def add_rows(x: Any) -> Any:
    """`[m, ...] -> [...]`: rows added one after the other, in order."""
    total = x[0] + x[1] if len(x) > 1 else x[0] + 0
    for i in range(2, len(x)):
        total += x[i]
    return total


def weighted_sum(x: Any, weight: Sequence[float]) -> Any:
    """`[m, ...], [m] -> [...]`: sum of weight_i * x_i, in order; a weight of exactly 1 multiplies nothing."""
    total = None
    for i, w in enumerate(weight):
        term = x[i] if w == 1.0 else x[i] * w
        if total is None:
            total = term + 0 if w == 1.0 else term
        else:
            total += term
    return total


def weighted_sum_64(x: Any, weight: Sequence[float]) -> Any:
    """The same in float64, whatever the dtype of x."""
    import numpy as np

    total = x[0].astype(np.float64) * weight[0]
    for row, w in zip(x[1:], weight[1:], strict=True):
        total += row.astype(np.float64) * w
    return total


def column(values: Sequence[float], like: Any) -> Any:
    """`[m]` -> an array `[m, 1, ...]` that broadcasts over the block `like [m, ...]`, in its dtype."""
    import numpy as np

    return np.array(values, dtype=like.dtype).reshape((len(values),) + (1,) * (like.ndim - 1))


def keep_where(x: Any, mask: Any) -> Any:
    """A copy of x with zeros where mask is False, also in place of NaN and infinity.

    numpy's own `where` and `copyto` take ten times as long on a random mask, which no branch predictor can follow.
    """
    import numpy as np

    bits = np.uint32 if x.dtype == np.float32 else np.uint64
    kept = mask.astype(bits)
    np.multiply(kept, x.view(bits), out=kept)
    return kept.view(x.dtype)


def keep_only(x: Any, mask: Any) -> None:
    """`keep_where` into x itself; the mask may have fewer dimensions."""
    import numpy as np

    bits = np.uint32 if x.dtype == np.float32 else np.uint64
    words = x.view(bits)
    np.multiply(words, mask.astype(bits), out=words)


def count_rows(mask: Any, like: Any) -> Any:
    """`[m, ...]` booleans -> how many are True down the first axis, in the dtype of `like`."""
    import numpy as np

    dtype = np.int8 if len(mask) < 128 else np.int64
    return np.add.reduce(mask.view(np.int8), axis=0, dtype=dtype).astype(like.dtype)


def row_ranks(size: Any) -> Any:
    """`[..., n]` magnitudes, float32 -> uint32: the place of each among its row, from 0; equal ones by their place."""
    import numpy as np

    n = size.shape[-1]
    ranks = np.empty(size.shape, np.uint32)
    # magnitude and place in one number of 64 bits: such are sorted several times faster than places by a key
    keys = np.ascontiguousarray(size).view(np.uint32).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort(axis=-1)
    places = (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)
    np.put_along_axis(ranks, places, np.arange(n, dtype=np.uint32), axis=-1)
    return ranks
