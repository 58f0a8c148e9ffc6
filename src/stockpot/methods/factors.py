"""What methods on adapters see: factors of low-rank changes, and their algebra. Nothing here ever forms a full matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]

__all__ = ["Factors", "stacked", "truncated"]


@dataclass(frozen=True, eq=False)
class Factors:
    """A low-rank change of one module's weight: scale * B A, and scale * bias of its output.

    a     [rank, in]   float32, or float64 where it is stored so
    b     [out, rank]
    bias  [out] or None (PEFT's lora_bias)
    lost, whole  Frobenius norms of what a result lacks of the exact one, and of the exact one; 0 and 0: nothing is lost
    """

    a: Array
    b: Array
    scale: float = 1.0
    bias: Array | None = None
    lost: float = 0.0
    whole: float = 0.0

    @property
    def rank(self) -> int:
        return len(self.a)


def stacked(factors: Sequence[tuple[float, Array, Array]]) -> tuple[Array, Array]:
    """[(c, A [r_i, n], B [m, r_i])] -> (A [sum r_i, n], B [m, sum r_i]) with B A = sum c_i B_i A_i exactly."""
    import numpy as np

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
    import numpy as np

    a, b = a.astype(np.float64), b.astype(np.float64)
    rb: Array = np.asarray(np.linalg.qr(b, mode="r"))
    ra: Array = np.asarray(np.linalg.qr(a.T, mode="r"))
    small = rb @ ra.T
    if not np.isfinite(small).all():  # NaN or infinities in an input: what is made of it has them too, to be found
        return np.full((rank, a.shape[1]), np.nan), np.full((b.shape[0], rank), np.nan), 0.0, 0.0
    u, s, vt = np.linalg.svd(small, full_matrices=False)
    kept = min(rank, int(np.count_nonzero(s > s[0] * 1e-14)) if len(s) else 0)
    lost, total = float(np.linalg.norm(s[kept:])), float(np.linalg.norm(s))
    root = np.sqrt(s[:kept])
    new_b = np.zeros((b.shape[0], rank))
    new_a = np.zeros((rank, a.shape[1]))
    new_b[:, :kept] = b @ (ra.T @ (vt[:kept].T / root))
    new_a[:kept] = ((u[:, :kept] / root).T @ rb) @ a
    return new_a, new_b, lost, total
