"""Steps from a base that are limited element by element: towards one model, or the largest of several."""

from __future__ import annotations

from typing import Annotated, Any

from stockpot.methods.arrays import add_rows, count_rows, magnitude
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.parameters import Named, Real

__all__ = ["magmax", "nearswap", "ram"]

#: below it a step in nearswap is scaled rather than cut: mergekit divides by no less
_NEAR = 1e-6


@method(
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

    active = magnitude(delta) > np.float32(epsilon) if delta.dtype == np.float32 else np.abs(delta) > epsilon
    count = count_rows(active, delta)
    return add_rows(np.where(active, delta, delta.dtype.type(0))) / np.maximum(count, 1)


@method(
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
