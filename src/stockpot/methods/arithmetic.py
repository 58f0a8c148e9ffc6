"""Task arithmetic: adding, negating and combining task vectors."""

from __future__ import annotations

from typing import Annotated, Any

from stockpot.methods.arrays import weighted_sum
from stockpot.methods.averaging import check_weights, normalised
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.forms import Form
from stockpot.methods.parameters import Flag, Named, PerModel, Real

__all__ = ["scaled", "task_arithmetic"]


def scaled(weight: tuple[float, ...], scale: float, normalize: bool) -> tuple[float, ...]:
    """The weight of each delta, in float64: normalised if asked, times lambda."""
    return tuple(w * scale for w in (normalised(weight) if normalize else weight))


def _form(weight: tuple[float, ...], scale: float, normalize: bool) -> Form:
    return Form(scaled(weight, scale, normalize))


@method(
    family="task vectors",
    space=Space.DELTA,
    models=(1, None),
    cite="arXiv:2212.04089",
    check=check_weights,
    form=_form,
    neutral={},
    differentiable=True,
    examples=(
        Example([[2.5], [1.5]], [2.1], base=[2], parameters={"weight": [0.6, 0.4]}, within=1e-6),
        Example([[2.5]], [1.5], base=[2], parameters={"weight": -1}, source="forgetting"),
        Example([[1, 5], [2, 3], [7, 7]], [8, 5], base=[1, 1], parameters={"weight": [-1, 1, 1]}, source="analogy"),
        Example([[3], [5]], [8], base=[1], parameters={"weight": [1, 3], "normalize": True, "lambda": 2}),
    ),
)
def task_arithmetic(
    delta: Any,
    *,
    weight: Annotated[PerModel, Real()] = 1.0,
    scale: Annotated[float, Real(), Named("lambda")] = 1.0,
    normalize: Annotated[bool, Flag()] = False,
) -> Any:
    """Weighted sum of task vectors. Add with positive weights, forget with negative ones, analogies with both.

    delta   [m, *block]  model minus base
    weight  [m]          float64; "A is to B as C is to D" is A: -1, B: 1, C: 1
    lambda  float64      scale of the sum
    normalize            divide the weights by their sum
    returns [*block]     merged delta; the base is added to it
    """
    return weighted_sum(delta, scaled(weight, scale, normalize))
