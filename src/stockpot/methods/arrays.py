"""The few array operations that methods share, for numpy arrays and torch tensors alike.

Everything is built from single IEEE operations (no fused multiply-add, no library reductions), so that a block gives
the same bytes whatever its size, on every machine and, for these operations, on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["add_rows", "column", "count_rows", "is_numpy", "keep_where", "magnitude", "weighted_sum"]


def is_numpy(x: Any) -> bool:
    """Whether x is a numpy array (else it is a torch tensor)."""
    return type(x).__module__.partition(".")[0] == "numpy"


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


def column(values: Sequence[float], like: Any) -> Any:
    """`[m]` -> an array `[m, 1, ...]` that broadcasts over the block `like [m, ...]`, in its dtype."""
    shape = (len(values),) + (1,) * (like.ndim - 1)
    if is_numpy(like):
        import numpy as np

        return np.array(values, dtype=like.dtype).reshape(shape)
    return like.new_tensor(list(values)).reshape(shape)


def magnitude(x: Any) -> Any:
    """|x| in float32: what cutoffs are compared with."""
    a = abs(x)
    if is_numpy(a):
        import numpy as np

        return a if a.dtype == np.float32 else a.astype(np.float32)
    return a.float()


def keep_where(x: Any, mask: Any) -> Any:
    """A copy of x with zeros where mask is False, also in place of NaN and infinity.

    numpy's own `where` and `copyto` take ten times as long on a random mask, which no branch predictor can follow.
    """
    if is_numpy(x):
        import numpy as np

        bits = np.uint32 if x.dtype == np.float32 else np.uint64
        kept = mask.astype(bits)
        np.multiply(kept, x.view(bits), out=kept)
        return kept.view(x.dtype)
    return x.masked_fill(~mask, 0)


def count_rows(mask: Any, like: Any) -> Any:
    """`[m, ...]` booleans -> how many are True down the first axis, in the dtype of `like`."""
    if is_numpy(mask):
        import numpy as np

        dtype = np.int8 if len(mask) < 128 else np.int64
        return np.add.reduce(mask.view(np.int8), axis=0, dtype=dtype).astype(like.dtype)
    return mask.sum(0).to(like.dtype)
