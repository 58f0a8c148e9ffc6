"""What averaging factors apart costs, computed in factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["mean_error"]

Array = np.ndarray[Any, Any]


def mean_error(factors: Sequence[tuple[float, float, Array, Array]]) -> tuple[float, float]:
    """How far averaging A and B apart is from averaging their products: (norm of the difference, norm of the average).

    factors: [(weight, scale, A_i, B_i)] of one rank and scale, weights summing to one. With A_i = A + a_i and B_i = B + b_i
    around the weighted means, sum w_i B_i A_i - B A = sum w_i b_i a_i: the difference without cancellation.
    """
    scale = factors[0][1]
    w = np.array([weight for weight, _, _, _ in factors], factors[0][2].dtype)
    left = np.stack([a for _, _, a, _ in factors])  # [k, r, n]
    right = np.stack([b for _, _, _, b in factors], axis=1)  # [m, k, r]
    mean_a: Array = np.tensordot(w, left, 1)
    mean_b: Array = np.einsum("k,mkr->mr", w, right)
    left -= mean_a
    right -= mean_b[:, None, :]
    a = left.reshape(-1, left.shape[-1])
    b = right.reshape(len(right), -1)
    each = np.repeat(w.astype(np.float64), left.shape[1])  # the weight of every stacked rank
    gram_a, gram_b = (a @ a.T).astype(np.float64), b.T @ b
    difference = float(each @ (gram_a * gram_b) @ each)
    own = float(np.sum((mean_a @ mean_a.T).astype(np.float64) * (mean_b.T @ mean_b)))
    cross = float(each @ np.sum((a @ mean_a.T).astype(np.float64) * (b.T @ mean_b), axis=1))
    total = own + 2 * cross + difference
    return scale * max(difference, 0.0) ** 0.5, scale * max(total, 0.0) ** 0.5
