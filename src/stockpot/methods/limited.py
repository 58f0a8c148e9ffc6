"""Steps from a base, chosen element by element: limited, the largest of several, or those of the models that changed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from stockpot.methods.arrays import add_rows, column, count_rows, keep_where
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.parameters import ByDialect, Choice, Named, Real
from stockpot.statistics import Extent, Total

__all__ = ["magmax", "nearswap", "ram", "ramplus_tl"]

#: below it a step in nearswap is scaled rather than cut: mergekit divides by no less
_NEAR = 1e-6


@method(
    family="task vectors",
    space=Space.DELTA,
    models=(1, 1),
    cite="mergekit (no paper)",
    neutral={"t": 1e300},
    examples=(
        Example([[1.1, 2, 2, 8]], [1.1, 2, 2.5, 4.5], base=[1, 2, 3, 4], parameters={"t": 0.5}),
        Example([[1.1, 2, 2, 8]], [1.05, 2, 2.95, 4.05], base=[1, 2, 3, 4], parameters={"t": 0.05}),
        Example([[5e-7, 1e-3]], [1e-7, 2e-7], base=[0, 0], parameters={"t": 2e-7}, within=1e-12),
    ),
)
def nearswap(delta: Any, *, t: Annotated[float, Real(0)]) -> Any:
    """The base moved towards one model, by `t` at most in each element: small differences are taken whole, large ones cut off.

    delta   [1, *block]  model minus base
    t       float64      most that an element moves; 0 gives the base. mergekit's users take 0.0001 to 0.01
    returns [*block]     min(1, t / max(|delta|, 1e-6)) delta
    """
    import numpy as np

    step = delta[0]
    limit = step.dtype.type(min(t, float(np.finfo(step.dtype).max)))
    if t >= _NEAR:
        return np.clip(step, -limit, limit)
    near = np.abs(step) < _NEAR
    return np.where(near, step * step.dtype.type(t / _NEAR), np.copysign(limit, step))


@method(
    family="consensus",
    space=Space.DELTA,
    models=(1, None),
    cite="arXiv:2601.13572",
    neutral={"epsilon": 0.0},
    examples=(
        Example([[0.1, 0.2, 0, 0.3], [0.3, 0, 0.5, -0.1]], [0.2, 0.2, 0.5, 0.1], base=[0, 0, 0, 0]),
        Example([[1.5, 2.0], [0.5, 2.0]], [1.0, 2.0], base=[1.0, 2.0], source="opposite steps, and none"),
    ),
)
def ram(delta: Any, *, epsilon: Annotated[float, Real(0)] = 1e-5) -> Any:
    """The mean of the task vectors that change an element; one that only a single model changes is taken at full size.

    delta   [m, *block]  model minus base
    epsilon float64      a change of at most this much is none
    returns [*block]     the mean over the models with |delta| > epsilon; 0 where there are none
    """
    import numpy as np

    active = _active(delta, epsilon)
    count = count_rows(active, delta)
    return add_rows(keep_where(delta, active)) / np.maximum(count, 1)


def _active(delta: Any, epsilon: float) -> Any:
    return abs(delta) > delta.dtype.type(epsilon)


def _shared_and_unique(delta: Any, *, epsilon: float, **_: Any) -> Any:
    """`[2m, n]`: what each model changes with another, what it alone changes."""
    import numpy as np

    active = _active(delta, epsilon)
    alone = add_rows(active.astype(np.int32)) == 1
    return np.concatenate((active & ~alone, active & alone))


def _plus_extent(params: Mapping[str, Any]) -> Extent:
    return "model" if params["dialect"] == "paper" else "tensor"


def _boosts(overlap: Any, r: float, alpha: float) -> tuple[float, ...]:
    """What each model's sole changes are multiplied by: 1 + r min(shared / unique, alpha)."""
    m = len(overlap) // 2
    pairs = [(float(s), float(u)) for s, u in zip(overlap[:m], overlap[m:], strict=True)]
    return tuple(1 + r * (min(s / u, alpha) if u > 0 else 0.0) for s, u in pairs)


_RAM = [[0.1, 0.2, 0, 0.3], [0.3, 0, 0.5, -0.1]]


@method(
    family="consensus",
    space=Space.DELTA,
    models=(1, None),
    stats=(Total("overlap", of=_shared_and_unique, over=_plus_extent),),
    cite="arXiv:2601.13572",
    neutral={"epsilon": 0.0},
    dialects={
        "mergekit": "overlap counted by tensors; at most 2 % more",
        "paper": "as the authors' code (r = 1.2 there): overlap counted over the whole model",
    },
    examples=(
        Example(_RAM, [0.2, 0.204, 0.51, 0.1], base=[0] * 4),
        Example(_RAM, [0.2, 0.24, 0.6, 0.1], base=[0] * 4, parameters={"r": 0.2, "alpha": 1}),
        Example(_RAM, [0.2, 0.24, 0.6, 0.1], base=[0] * 4, parameters={"dialect": "paper"}),
        Example([[2, 3], [2, 3]], [2, 3], base=[1, 1], source="nothing is changed by one alone"),
    ),
)
def ramplus_tl(
    delta: Any,
    *,
    overlap: Any,
    epsilon: Annotated[float, Real(0)] = 1e-5,
    r: Annotated[Any, Real(0)] = ByDialect({"mergekit": 0.1, "paper": 0.2}),
    alpha: Annotated[Any, Real(0)] = ByDialect({"mergekit": 0.2, "paper": 1.0}),
    dialect: Annotated[str, Choice(("mergekit", "paper"))] = "mergekit",
) -> Any:
    """As ram, but what a single model changes is made up for its share in what is averaged.

    delta   [m, *block]  model minus base
    overlap [2m]         of each model: elements that it changes with another, elements that it alone changes
    epsilon float64      a change of at most this much is none
    r, alpha             sole changes are multiplied by 1 + r min(shared / sole, alpha)
    dialect              `mergekit` counts by tensors, `paper` over the model
    returns [*block]     the mean over the models that change an element; a sole change, made larger
    """
    import numpy as np

    active = _active(delta, epsilon)
    count = count_rows(active, delta)
    kept = keep_where(delta, active)
    alone = add_rows(kept * column(_boosts(overlap, r, alpha), kept))
    return np.where(count == 1, alone, add_rows(kept) / np.maximum(count, 1))


@method(
    family="consensus",
    space=Space.DELTA,
    models=(1, None),
    cite="arXiv:2407.06322",
    ordered=True,
    neutral={"lambda": 1.0},
    examples=(
        Example([[0.5, -1, 0], [-1.5, 0.4, 0]], [-1.5, -1, 0], base=[0, 0, 0], parameters={"lambda": 1}),
        Example([[2, -3], [1, 3]], [1, 1.5], base=[0, 0], source="half of the largest; of two as large the later"),
        Example([[0.5, -0.2, 0.1, 0], [-0.5, 0.3, -0.05, 0.2]], [-0.25, 0.15, 0.05, 0.1], base=[0, 0, 0, 0]),
    ),
)
def magmax(delta: Any, *, scale: Annotated[float, Real(), Named("lambda")] = 0.5) -> Any:
    """In each element the task vector of the largest magnitude.

    delta   [m, *block]  model minus base
    lambda  float64      scale of what was chosen
    returns [*block]     lambda times the delta of the largest magnitude, a later model's where two are equal
    """
    import numpy as np

    best = delta[0]
    for other in delta[1:]:
        best = np.where(np.abs(other) >= np.abs(best), other, best)
    return best * best.dtype.type(scale)
