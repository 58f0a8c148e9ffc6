"""Fisher averaging: every parameter weighted by how much its model's predictions depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from stockpot.methods.arrays import add_rows, column
from stockpot.methods.averaging import check_weights
from stockpot.methods.declaration import Companion, Example, Space, method
from stockpot.methods.parameters import Flag, PerModel, Real
from stockpot.statistics import Total

__all__ = ["fisher"]


def _normalises(params: Mapping[str, Any]) -> bool:
    return bool(params["normalize"])


def _squares_and_count(models: Any, *, fisher: Any, **_: Any) -> Any:
    """`[m + 1, n]` float64: squares of the Fisher information, and ones to count the elements."""
    import numpy as np

    wide = fisher.astype(np.float64)
    return np.concatenate((wide * wide, np.ones_like(wide[:1])))


def _check(params: Mapping[str, Any]) -> str | None:
    if any(w < 0 for w in params["weight"]):
        return f"weights {list(params['weight'])}: expected none below zero"
    return check_weights({**params, "normalize": True})


@method(
    family="averages",
    space=Space.WEIGHT,
    companions=(Companion("fisher", "the diagonal of its Fisher information"),),
    stats=(Total("squares", of=_squares_and_count, over="model", when=_normalises),),
    cite="arXiv:2111.09832",
    check=_check,
    neutral={},
    examples=(
        Example([[1.0], [3.0]], [1.5], companions={"fisher": [[3.0], [1.0]]}, parameters={"normalize": False}),
        Example(
            [[1.0, 2.0], [3.0, 6.0]],
            [2.0, 4.0],
            companions={"fisher": [[0.0, 0.0], [0.0, 0.0]]},
            source="nothing is known: the mean",
        ),
        Example([[1.0], [3.0]], [2.0], companions={"fisher": [[0.0], [0.0]]}, parameters={"floor": 0.0}),
        Example(
            [[1.0, 2.0], [3.0, 6.0]],
            [1.5, 5.0],
            companions={"fisher": [[3.0, 1.0], [10.0, 30.0]]},
            parameters={"floor": 0.0},
            source="the same information in other units counts the same",
        ),
    ),
)
def fisher(
    models: Any,
    *,
    fisher: Any,
    squares: Any,
    weight: Annotated[PerModel, Real(0)] = 1.0,
    floor: Annotated[float, Real(0)] = 1e-6,
    normalize: Annotated[bool, Flag()] = True,
) -> Any:
    """Average in which each element is weighted by the model's Fisher information of it.

    models    [m, *block]  weights of the models
    fisher    [m, *block]  diagonal of each model's Fisher information, at least 0
    squares   [m + 1]      sum of its squares over the model, and the number of elements (`normalize`)
    weight    [m]          float64, at least 0
    normalize              divide each model's information by its root mean square over the model, so that no model counts for
                           more because its numbers are larger
    floor     float64      information below it counts as this much: where no model knows anything, the mean is taken
    returns   [*block]     sum w_i F_i x_i / sum w_i F_i
    """
    import numpy as np

    known = fisher
    if squares is not None:
        count = float(squares[-1])
        scale = [(float(s) / count) ** 0.5 if count else 0.0 for s in squares[:-1]]
        known = known / column([s if s > 0 else 1.0 for s in scale], known)
    plain = column(weight, known)
    share = np.maximum(known, known.dtype.type(floor)) * plain
    share = np.where(add_rows(share) == 0, plain, share)  # nothing is known of it, and the floor is 0
    return add_rows(share * models) / add_rows(share)
