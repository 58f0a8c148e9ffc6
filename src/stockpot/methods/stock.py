"""Model Stock: how far to go from the base to the mean of the models, by the angles between their changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from stockpot.methods.arrays import weighted_sum
from stockpot.methods.declaration import Example, Scope, Space, method
from stockpot.methods.forms import Form
from stockpot.methods.parameters import Choice, Flag
from stockpot.methods.spherical import mixed
from stockpot.statistics import Extent, Gram

__all__ = ["model_stock", "stock_share", "stock_shares"]


def stock_share(gram: Any, clamped: bool = True) -> float:
    """How far Model Stock goes from the base to the mean of the models: k c / (1 + (k - 1) c), c the mean cosine of deltas.

    clamped  to 0 and 1; else as mergekit has it: norms' products count as 1e-6 at least, and beyond the base for c < 0
    """
    k = len(gram)
    inner = [[float(g) for g in row] for row in gram]
    cosines = []
    for i in range(k):
        for j in range(i + 1, k):
            scale = math.sqrt(inner[i][i]) * math.sqrt(inner[j][j])
            if clamped:
                cos = inner[i][j] / scale if scale > 0 and math.isfinite(scale) else 0.0
            else:
                cos = inner[i][j] / max(scale, 1e-6)
            cosines.append(max(-1.0, min(1.0, cos)))
    cos = sum(cosines) / len(cosines)
    if abs(1 + (k - 1) * cos) < 1e-6:
        return 0.0
    share = k * cos / (1 + (k - 1) * cos)
    return max(0.0, min(1.0, share)) if clamped else share


def stock_shares(gram: Any, clamped: bool = True) -> Any:
    """`stock_share` of many at once: gram `[m, m, ...]` -> `[...]`."""
    import numpy as np

    k = len(gram)
    norms = [np.sqrt(gram[i, i]) for i in range(k)]
    total: Any = 0.0
    for i in range(k):
        for j in range(i + 1, k):
            scale = norms[i] * norms[j]
            if clamped:
                cos = np.where((scale > 0) & np.isfinite(scale), gram[i, j] / np.where(scale > 0, scale, 1.0), 0.0)
            else:
                cos = gram[i, j] / np.maximum(scale, 1e-6)
            total = total + np.clip(cos, -1.0, 1.0)
    cos = total / (k * (k - 1) // 2)
    below = 1 + (k - 1) * cos
    share = np.where(np.abs(below) < 1e-6, 0.0, k * cos / np.where(np.abs(below) < 1e-6, 1.0, below))
    return np.clip(share, 0.0, 1.0) if clamped else share


def _stock_weights(gram: Any, dialect: str) -> tuple[float, ...]:
    return (stock_share(gram, dialect == "stockpot") / len(gram),) * len(gram)


def _stock_extent(params: Mapping[str, Any]) -> Extent:
    return "row" if params["filter_wise"] else "tensor"


def _stock_scope(params: Mapping[str, Any]) -> Scope:
    return Scope.ROW if params["filter_wise"] else Scope.ELEMENT


@method(
    family="spherical",
    space=Space.DELTA,
    models=(2, None),
    sees=_stock_scope,
    stats=(Gram(over=_stock_extent),),
    cite="arXiv:2403.19522",
    form=lambda gram, filter_wise, dialect: Form(_stock_weights(gram, dialect)),
    dialects={
        "stockpot": "between the base and the mean; cosines of deltas however small",
        "mergekit": "products of norms count as 1e-6 at least; a negative cosine goes beyond the base",
    },
    examples=(
        Example([[1, 0], [0.6, 0.8]], [0.6, 0.3], base=[0, 0]),
        Example([[1, 1, 0], [1, 0, 1], [0, 1, 1]], [0.5, 0.5, 0.5], base=[0, 0, 0]),
        Example([[1, 0], [-0.6, 0.8]], [0, 0], base=[0, 0], source="a negative cosine: the base"),
        Example([[1, 0], [-0.6, 0.8]], [-0.6, -1.2], base=[0, 0], parameters={"dialect": "mergekit"}),
        Example([[5e-4, 0], [3e-4, 4e-4]], [3e-4, 1.5e-4], base=[0, 0], within=1e-9),
        Example(
            [[5e-4, 0], [3e-4, 4e-4]], [1.04e-4, 5.2e-5], base=[0, 0], parameters={"dialect": "mergekit"}, within=1e-6
        ),
        Example([[2, 3], [2, 3]], [2, 3], base=[2, 3], source="nothing has changed"),
        Example(
            [[[1, 0], [1, 0]], [[0.6, 0.8], [1, 0]]],
            [[0.6, 0.3], [1, 0]],
            base=[[0, 0], [0, 0]],
            parameters={"filter_wise": True},
        ),
    ),
)
def model_stock(
    delta: Any,
    *,
    gram: Any,
    filter_wise: Annotated[bool, Flag()] = False,
    dialect: Annotated[str, Choice(("stockpot", "mergekit"))] = "stockpot",
) -> Any:
    """The mean of the models, as far from the base as the angles between their task vectors say, each tensor by itself.

    delta   [m, *block]  model minus base
    gram    [m, m]       float64: inner products of the deltas over the whole tensor (row)
    filter_wise          each row of a tensor by itself; a vector is one row
    returns [*block]     t times the mean delta, t = m c / (1 + (m - 1) c), c the mean of the cosines
    dialect              `stockpot` keeps t within 0 and 1; `mergekit` does not, and takes small deltas for orthogonal ones
    """
    if filter_wise:
        share = stock_shares(gram, dialect == "stockpot") / len(delta)
        return mixed(delta, (share,) * len(delta))
    return weighted_sum(delta, _stock_weights(gram, dialect))
