"""Sums of low-rank products, in factors: stacking, truncating, norms. Nothing here ever forms a full matrix.

A module's delta in the soup is sum_i c_i B_i A_i, where c_i = weight times scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["mean_error", "product_norm", "stacked", "truncated"]

Array = np.ndarray[Any, Any]


def stacked(factors: Sequence[tuple[float, Array, Array]]) -> tuple[Array, Array]:
    """[(c, A [r_i, n], B [m, r_i])] -> (A [sum r_i, n], B [m, sum r_i]) with B A = sum c_i B_i A_i exactly."""
    a = np.concatenate([a for _, a, _ in factors], axis=0)
    b = np.concatenate([np.multiply(b, c, dtype=b.dtype) for c, _, b in factors], axis=1)
    return a, b


def truncated(a: Array, b: Array, rank: int) -> tuple[Array, Array, float, float]:
    """The best approximation of B A of a given rank: (A [rank, n], B [m, rank], Frobenius norm of what is lost, of B A).

    The triangular factors of two QR decompositions, then an SVD of a matrix as small as the stacked rank; float64.
    With B = Q R and A^T = P S, the left singular vectors of B A are B S^T v / sigma and the right ones A^T R^T u / sigma,
    so that neither Q nor P is ever needed. Singular values are split evenly between A and B; rows beyond the true rank
    are zero.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    rb: Array = np.asarray(np.linalg.qr(b, mode="r"))
    ra: Array = np.asarray(np.linalg.qr(a.T, mode="r"))
    u, s, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    kept = min(rank, int(np.count_nonzero(s > s[0] * 1e-14)) if len(s) else 0)
    lost, total = float(np.linalg.norm(s[kept:])), float(np.linalg.norm(s))
    root = np.sqrt(s[:kept])
    new_b = np.zeros((b.shape[0], rank))
    new_a = np.zeros((rank, a.shape[1]))
    new_b[:, :kept] = b @ (ra.T @ (vt[:kept].T / root))
    new_a[:kept] = ((u[:, :kept] / root).T @ rb) @ a
    return new_a, new_b, lost, total


def product_norm(a: Array, b: Array) -> float:
    """Frobenius norm of B A, from two Gram matrices of the rank's size."""
    return float(np.sqrt(max(np.sum((b.T @ b).astype(np.float64) * (a @ a.T).astype(np.float64)), 0.0)))


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
