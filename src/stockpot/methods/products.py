"""Averages of adapters that are exact: of the products B A, not of the factors apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from stockpot.methods.averaging import check_weights, normalised
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.factors import Factors, stacked, truncated
from stockpot.methods.parameters import Flag, PerModel, Real, Whole

__all__ = ["product", "product_svd"]


def _stacked_rank(ranks: Sequence[int], sides: tuple[int, int], params: Mapping[str, Any]) -> int:
    return sum(ranks)


def _kept_rank(ranks: Sequence[int], sides: tuple[int, int], params: Mapping[str, Any]) -> int:
    return min(int(params["rank"]), sum(ranks), *sides)


def _sum(factors: Sequence[Factors], weight: tuple[float, ...]) -> tuple[Any, Any, Any]:
    """(A, B, bias) of the weighted sum of the products: factors stacked, scales and weights in B."""
    a, b = stacked([(w * f.scale, f.a, f.b) for w, f in zip(weight, factors, strict=True)])
    bias: Any = None
    for w, f in zip(weight, factors, strict=True):
        if f.bias is not None:
            bias = (0.0 if bias is None else bias) + w * f.scale * f.bias
    return a, b, bias


@method(
    family="adapters",
    space=Space.FACTORS,
    average=True,
    neutral={},
    check=check_weights,
    ranks=_stacked_rank,
    examples=(
        Example(
            [(2.0, [[1, 0]], [[1], [3]]), (1.0, [[0, 1]], [[4], [0]])],
            [[1, 2], [3, 0]],
            source="the mean of 2 B A = [[2, 0], [6, 0]] and of [[0, 4], [0, 0]]",
        ),
    ),
)
def product(
    factors: Sequence[Factors],
    *,
    weight: Annotated[PerModel, Real()] = 1.0,
    normalize: Annotated[bool, Flag()] = True,
) -> Factors:
    """Weighted average of adapters, exact: the products B A are averaged, and the ranks add up.

    factors  m of one module: A [r_i, in], B [out, r_i], scale
    weight   [m]  float64; divided by their sum when `normalize`
    returns  A [sum r_i, in], B [out, sum r_i]
    """
    a, b, bias = _sum(factors, normalised(weight) if normalize else weight)
    return Factors(a, b, bias=bias)


@method(
    family="adapters",
    space=Space.FACTORS,
    average=True,
    neutral={"rank": 1000},
    check=check_weights,
    ranks=_kept_rank,
    reproducible="machine",
    examples=(
        Example(
            [(1.0, [[2, 0]], [[2], [0]]), (1.0, [[0, 1]], [[0], [2]])],
            [[2, 0], [0, 0]],
            parameters={"rank": 1},
            source="the mean is diag(2, 1); its best approximation of rank 1 keeps the larger",
        ),
    ),
)
def product_svd(
    factors: Sequence[Factors],
    *,
    rank: Annotated[int, Whole(1)],
    weight: Annotated[PerModel, Real()] = 1.0,
    normalize: Annotated[bool, Flag()] = True,
) -> Factors:
    """Weighted average of adapters' products B A, in the best factors of a given rank.

    factors  m of one module: A [r_i, in], B [out, r_i], scale
    rank     of the result, at most; what it loses is measured (Frobenius norm) and stands in the lineage
    weight   [m]  float64; divided by their sum when `normalize`
    returns  A [rank, in], B [out, rank], by QR of the stacked factors and an SVD as small as their rank
    """
    a, b, bias = _sum(factors, normalised(weight) if normalize else weight)
    kept = _kept_rank([f.rank for f in factors], (len(b), a.shape[1]), {"rank": rank})
    a, b, lost, whole = truncated(a, b, kept)
    return Factors(a, b, bias=bias, lost=lost, whole=whole)
