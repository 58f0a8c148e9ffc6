"""PCB-Merging: elements of task vectors compete within their task and across tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from stockpot.methods.arrays import add_rows, column, magnitude
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.parameters import ByDialect, Choice, Named, PerModel, Real
from stockpot.statistics import Rank

__all__ = ["pcb"]

Params = Mapping[str, Any]


def _ends(params: Params) -> tuple[float, ...]:
    """Two for each model: where magnitudes are clipped. Fractions below 1, so that they are always looked for."""
    return (0.5,) * (2 * len(params["weight"]))


def _end_counts(params: Params, count: int, known: Params) -> list[int]:
    """sorted[int(n c)] and sorted[int(n (1 - c)) - 1], counted from the top."""
    m, clip = len(params["weight"]), params["clip"]
    low, high = min(int(count * clip), count - 1), max(min(int(count * (1 - clip)), count) - 1, 0)
    return [count - low] * m + [count - high] * m


def _twice(delta: Any, **_: Any) -> Any:
    import numpy as np

    size = magnitude(delta)
    return np.concatenate((size, size))


def _fitted(delta: Any, ends: Any) -> tuple[Any, Any]:
    """(magnitudes clipped to the ends, the same scaled to 0 to 1), `[m, ...]`."""
    import numpy as np

    m = len(delta)
    low = [0.0 if math.isnan(e) else e for e in ends[:m]]
    high = [0.0 if math.isnan(e) else e for e in ends[m:]]
    clipped = np.minimum(np.maximum(np.abs(delta), column(low, delta)), column(high, delta))
    span = [h - b if h > b else math.inf for b, h in zip(low, high, strict=True)]
    return clipped, (clipped - column(low, delta)) / column(span, delta)


def balance(delta: Any, *, ends: Any, dialect: str, **_: Any) -> Any:
    """`[m, ...]`: how an element does within its task, times how it does against the other tasks."""
    import numpy as np

    _, share = _fitted(delta, ends)
    within = np.exp(len(delta) * (share * share))
    if dialect == "text":
        return within * np.tanh(delta * add_rows(delta))
    signed = np.copysign(share, delta)
    across = np.zeros_like(delta)
    for i in range(len(delta)):
        across[i] += np.tanh(signed[i] * signed[i])
        for j in range(i + 1, len(delta)):
            both = np.tanh(signed[i] * signed[j])
            across[i] += both
            across[j] += both
    return within * across


def _scores(delta: Any, **keywords: Any) -> Any:
    """`[2m, n]`: the scores twice, for the cutoff and for the largest."""
    import numpy as np

    found = balance(delta, **keywords)
    return np.concatenate((found, found))


def _score_ends(params: Params) -> tuple[float, ...]:
    return (0.5,) * (2 * len(params["weight"]))


def _score_counts(params: Params, count: int, known: Params) -> list[int]:
    """sorted[int(n (1 - density))] of each model, then the largest."""
    low = [min(int(count * (1 - d)), count - 1) for d in params["density"]]
    return [count - k for k in low] + [min(1, count)] * len(low)


def _scale(delta: Any, ends: Any, scores: Any, dialect: str) -> Any:
    """`[m, ...]`: scores above the cutoff, from 0 at it to 1 at the largest."""
    import numpy as np

    m = len(delta)
    low, high = ([0.0 if math.isnan(s) else s for s in part] for part in (scores[:m], scores[m:]))
    span = [h - b if h > b else math.inf for b, h in zip(low, high, strict=True)]
    found = balance(delta, ends=ends, dialect=dialect)
    # compared in float32, as it was ranked: a last bit above the cutoff would be a whole element where it is the only one
    above = found.astype(np.float32) > column(low, found.astype(np.float32))
    return np.where(above, (found - column(low, delta)) / column(span, delta), delta.dtype.type(0))


@method(
    family="trimmed",
    space=Space.DELTA,
    models=(1, None),
    stats=(
        Rank(_ends, of=_twice, name="ends", over="model", counts=_end_counts),
        Rank(_score_ends, of=_scores, name="scores", over="model", counts=_score_counts, signed=True),
    ),
    cite="arXiv:2410.02396",
    reproducible="machine",
    dialects={
        "vision": "as the authors' script for images: products of magnitudes scaled to 0 to 1: their size does not count",
        "text": "as their script for text: products of the changes as they are",
    },
    examples=(
        Example(
            [[0.5, -0.2, 0.1, 0], [0.4, 0.3, -0.1, 0.2]],
            [0.45, 0, 0, 0],
            base=[0] * 4,
            parameters={"dialect": "text", "clip": 0, "density": 0.5, "lambda": 1},
        ),
        Example([[1, 1], [1, 1]], [1, 1], base=[1, 1], source="nothing has changed"),
    ),
)
def pcb(
    delta: Any,
    *,
    ends: Any,
    scores: Any,
    weight: Annotated[PerModel, Real()] = 1.0,
    density: Annotated[PerModel, Real(0, 1)] = ByDialect({"vision": 0.05, "text": 0.1}),
    clip: Annotated[Any, Real(0, 0.5)] = ByDialect({"vision": 0.01, "text": 1e-4}),
    scale: Annotated[float, Real(), Named("lambda")] = 1.2,
    dialect: Annotated[str, Choice(("vision", "text"))] = "vision",
) -> Any:
    """Each element is weighted by how it does within its task and against the other tasks; the lowest scores drop out.

    delta    [m, *block]  model minus base
    ends     [2m]         magnitudes that outliers are clipped to, over the whole model: lower ends, upper ends
    scores   [2m]         over the whole model: the score at which elements drop out, and the largest one
    weight   [m]          float64: the authors' lambda of each task
    density  [m]          fraction of elements that is kept
    clip     float64      fraction of magnitudes that is clipped at either end
    lambda   float64      scale of the result; published: 0.8 to 2.2
    dialect               `vision` or `text`: two formulas of one repository
    returns  [*block]     sum of delta times score over the sum of scores; the base is added to it
    """
    import numpy as np

    clipped, _ = _fitted(delta, ends)
    share = _scale(delta, ends, scores, dialect)
    kept = np.copysign(clipped, delta) * share * column(_lambdas(weight, scale), delta)
    return add_rows(kept) / np.maximum(add_rows(share), delta.dtype.type(1e-12))


def _lambdas(weight: Sequence[float], scale: float) -> tuple[float, ...]:
    return tuple(w * scale for w in weight)
