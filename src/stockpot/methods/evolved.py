"""Evo-Merging's way to combine a pool of adapters: a kept fraction and a signed scale for each, found by a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from stockpot.methods.arrays import keep_where
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.factors import Factors
from stockpot.methods.parameters import Choice, PerModel, Real

__all__ = ["evo_asymmetric"]


def _rank(ranks: Sequence[int], sides: tuple[int, int], params: Mapping[str, Any]) -> int:
    return max(ranks)


def _largest(a: Any, density: float) -> Any:
    """A with its round(density n) largest elements, one at least; of density 0 zeros. Ties at the last are kept."""
    import numpy as np

    if density >= 1:
        return a
    if density <= 0:
        return a * 0
    kept = min(max(1, round(density * a.size)), a.size)
    size = np.abs(a)
    return keep_where(a, size >= np.partition(size.ravel(), a.size - kept)[a.size - kept])


def _padded(x: Any, rank: int, axis: int) -> Any:
    import numpy as np

    shape = list(x.shape)
    shape[axis] = rank - shape[axis]
    return np.concatenate((x, np.zeros(shape, x.dtype)), axis=axis)


_FIRST, _SECOND = (1.0, [[1, -3, 2, 0.5]], [[1], [2]]), (1.0, [[0, 1, 1, -2]], [[1], [-1]])


@method(
    family="adapters",
    space=Space.FACTORS,
    cite="arXiv:2509.12951",
    ranks=_rank,
    neutral={"scale": 1.0},
    dialects={
        "paper": "the scale multiplies both factors: a negative one does not negate an adapter, only what it shares with others",
        "signed": "the scale multiplies B alone: a negative one negates",
    },
    examples=(
        Example([_FIRST], [[1, -3, 2, 0.5], [2, -6, 4, 1]], parameters={"scale": -1}),
        Example(
            [_FIRST, _SECOND],
            [[0, 0, 0, 0], [0, -3, 0.75, 1.5]],
            parameters={"density": [0.5, 1], "scale": [0.5, -0.5]},
        ),
        Example([_FIRST], [[-1, 3, -2, -0.5], [-2, 6, -4, -1]], parameters={"scale": -1, "dialect": "signed"}),
    ),
)
def evo_asymmetric(
    factors: Sequence[Factors],
    *,
    density: Annotated[PerModel, Real(0, 1)] = 1.0,
    scale: Annotated[PerModel, Real()],
    dialect: Annotated[str, Choice(("paper", "signed"))] = "paper",
) -> Factors:
    """Sum of adapters factor by factor, A thinned out to its largest elements, each adapter with a signed scale.

    factors  m of one module: A [r_i, in], B [out, r_i], scale
    density  [m]  fraction of A's elements that is kept; B stays whole
    scale    [m]  float64; the search begins at 1/m
    dialect       whether the scale multiplies both factors (`paper`) or B alone (`signed`)
    returns  A [max r_i, in], B [out, max r_i]: sum s_i thinned A_i, sum s_i B_i (cross terms of different adapters included)
    """
    rank = max(f.rank for f in factors)
    a: Any = None
    b: Any = None
    bias: Any = None
    for f, d, s in zip(factors, density, scale, strict=True):
        own_a = _padded(_largest(f.a, d), rank, 0) * f.a.dtype.type(s if dialect == "paper" else 1.0)
        # scales of the adapters go with B, so that those that differ are told apart
        own_b = _padded(f.b, rank, 1) * f.b.dtype.type(s * f.scale)
        a, b = (own_a, own_b) if a is None else (a + own_a, b + own_b)
        if f.bias is not None:
            bias = (0.0 if bias is None else bias) + s * f.scale * f.bias
    return Factors(a, b, bias=bias)
