"""Elements that several tasks hold to be important (TALL masks, Consensus merging), and one vector for all (EMR)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from stockpot.methods.arrays import add_rows, column, count_rows, keep_where
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.forms import Election
from stockpot.methods.parameters import Named, PerModel, Real, Whole
from stockpot.methods.ties import disjoint_merge, trim
from stockpot.statistics import Rank, SignSum

__all__ = ["consensus_ta", "consensus_ties", "elected_largest", "emr", "tall_masks"]

_TALL = [[1, 0.1, -0.5, 0], [0.8, -0.6, 0.5, 0.2]]


def tall_masks(delta: Any, merged: Any, threshold: Sequence[float]) -> Any:
    """`[m, ...]` booleans: where |own| > threshold |merged - own|, strictly (arXiv:2405.07813)."""
    import numpy as np

    own = np.abs(delta)
    rest = np.abs(merged[None] - delta)
    rest *= column(threshold, rest)
    return np.asarray(own > rest)


def _agreed(delta: Any, merged: Any, threshold: Sequence[float], least: int) -> Any:
    votes = count_rows(tall_masks(delta, merged, threshold), merged)
    return keep_where(merged, votes >= least)


@method(
    family="consensus",
    space=Space.DELTA,
    models=(1, None),
    cite="arXiv:2405.07813",
    neutral={"k": 1},
    examples=(
        Example(_TALL, [1.8, 0, 0, 0], base=[0] * 4),
        Example(_TALL, [1.8, -0.5, 0, 0.2], base=[0] * 4, parameters={"k": 1}),
        Example(_TALL, [1.8, -0.5, 0, 0.2], base=[0] * 4, parameters={"k": 0}, source="task arithmetic"),
        Example(_TALL, [0, 0, 0, 0], base=[0] * 4, parameters={"threshold": 1.0}),
        Example(_TALL, [0.9, 0, 0, 0], base=[0] * 4, parameters={"lambda": 0.5}),
    ),
)
def consensus_ta(
    delta: Any,
    *,
    threshold: Annotated[PerModel, Real(0)] = 0.4,
    k: Annotated[int, Whole(0)] = 2,
    scale: Annotated[float, Real(), Named("lambda")] = 1.0,
) -> Any:
    """The sum of the task vectors in those elements that at least k tasks hold to be important for themselves.

    delta     [m, *block]  model minus base
    threshold [m]          an element is important to a task where |own| > threshold |sum - own|; published: 0.2 to 0.6
    k         int          tasks that must agree: 2; 1 drops what is important to none; 0 is task arithmetic
    lambda    float64      scale of the sum
    returns   [*block]     merged delta; the base is added to it
    """
    merged = _agreed(delta, add_rows(delta), threshold, k)
    return merged if scale == 1.0 else merged * scale


def _signs(delta: Any, *, cutoff: Any, **_: Any) -> Any:
    mass = add_rows(trim(delta, cutoff))
    return ((mass > 0) * 1.0 - (mass < 0) * 1.0)[None]


@method(
    family="consensus",
    space=Space.DELTA,
    models=(1, None),
    stats=(Rank("density", over="model"), SignSum("majority", of=_signs, over="model")),
    cite="arXiv:2405.07813",
    neutral={"k": 1, "density": 1.0},
    examples=(
        Example(
            _TALL, [1.8, 0, 0.5, 0], base=[0] * 4, parameters={"density": 1.0}, source="a sum of 0 goes with most signs"
        ),
        Example(_TALL, [1.8, -0.6, 0.5, 0.2], base=[0] * 4, parameters={"density": 1.0, "k": 1}),
        Example(_TALL, [1.8, 0, 0, 0], base=[0] * 4, parameters={"density": 0.25, "k": 1}),
    ),
)
def consensus_ties(
    delta: Any,
    *,
    cutoff: Any,
    majority: Any,
    density: Annotated[PerModel, Real(0, 1)] = 0.2,
    threshold: Annotated[PerModel, Real(0)] = 0.4,
    k: Annotated[int, Whole(0)] = 2,
    scale: Annotated[float, Real(), Named("lambda")] = 1.0,
) -> Any:
    """What TIES makes of the task vectors (a sum of what agrees), where at least k tasks hold it to be important.

    delta     [m, *block]  model minus base
    cutoff    [m]          smallest |delta| kept of each model, over the whole model, from `density`
    majority  [1]          sign sum over the model, for exactly zero sums
    density   [m]          fraction that TIES keeps
    threshold [m]          an element is important to a task where |own| > threshold |merged - own|, own untrimmed
    k         int          tasks that must agree
    lambda    float64      scale of the result
    returns   [*block]     merged delta; the base is added to it
    """
    election = Election(divide_by="none", zero_is_positive=float(majority[0]) >= 0)
    whole = disjoint_merge(trim(delta, cutoff), (1.0,) * len(delta), election)
    merged = _agreed(delta, whole, threshold, k)
    return merged if scale == 1.0 else merged * scale


def elected_largest(delta: Any) -> Any:
    """`[m, ...] -> [...]`: in each element the sign of the sum, and the largest magnitude among the deltas of that sign.

    A sum of exactly zero counts as negative, as in the authors' code (arXiv:2405.17461).
    """
    import numpy as np

    positive = add_rows(delta) > 0
    best: Any = None
    for x in delta:
        agreeing = keep_where(np.abs(x), ((x > 0) == positive) & (x != 0))
        best = agreeing if best is None else np.maximum(best, agreeing)
    return np.where(positive, best, -best)


@method(
    family="consensus",
    space=Space.DELTA,
    models=(1, None),
    cite="arXiv:2405.17461",
    neutral={},
    examples=(
        Example([[0.5, -0.2, 0.1], [0.4, 0.3, -0.3]], [0.5, 0.3, -0.3], base=[0, 0, 0]),
        Example([[1], [-1]], [-1], base=[0], source="a sum of zero counts as negative"),
        Example([[2, 3], [2, 3]], [2, 3], base=[1, 4]),
    ),
)
def emr(delta: Any, *, scale: Annotated[float, Real(), Named("lambda")] = 1.0) -> Any:
    """EMR-Merging's unified task vector: the elected sign, and the largest magnitude among what agrees with it.

    delta   [m, *block]  model minus base
    lambda  float64      scale of the result
    returns [*block]     merged delta; the base is added to it. The paper gives each task besides a mask of this vector and one
                         number: `stockpot masks` writes those
    """
    merged = elected_largest(delta)
    return merged if scale == 1.0 else merged * scale
