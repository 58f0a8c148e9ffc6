"""Weighted averages of weights, and the method that copies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from stockpot.methods.arrays import weighted_sum
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.forms import Form
from stockpot.methods.parameters import Flag, PerModel, Real

__all__ = ["check_weights", "linear", "normalised", "passthrough"]


def normalised(weight: tuple[float, ...]) -> tuple[float, ...]:
    """Weights divided by their sum, in float64. `check_weights` refuses a sum of zero beforehand."""
    total = sum(weight)
    return tuple(w / total for w in weight)


def check_weights(params: Mapping[str, Any]) -> str | None:
    """What is wrong with weights that are to be normalised, or None."""
    weight = params["weight"]
    if not params["normalize"]:
        return None
    if not abs(sum(weight)) > 1e-12 * sum(map(abs, weight)):
        return f"weights {list(weight)} sum to zero, so they can't be normalised"
    if not math.isfinite(sum(map(abs, weight))):
        return f"weights {list(weight)} are too large to be added up"
    return None


def _form(weight: tuple[float, ...], normalize: bool) -> Form:
    return Form(normalised(weight) if normalize else weight)


@method(
    space=Space.WEIGHT,
    models=(1, None),
    average=True,
    neutral={},
    cite="arXiv:2203.05482",
    check=check_weights,
    form=_form,
    examples=(
        Example([[1, -2], [4, 1]], [3, 0], parameters={"weight": [1, 2]}),
        Example([[1, -2], [4, 1]], [9, 0], parameters={"weight": [1, 2], "normalize": False}),
    ),
)
def linear(
    models: Any,
    *,
    weight: Annotated[PerModel, Real()] = 1.0,
    normalize: Annotated[bool, Flag()] = True,
) -> Any:
    """Weighted average of the models: a uniform soup when all weights are equal.

    models  [m, *block]  weights of the models
    weight  [m]          float64; divided by their sum when `normalize`
    returns [*block]
    """
    return weighted_sum(models, normalised(weight) if normalize else weight)


@method(
    space=Space.WEIGHT,
    models=(1, 1),
    base_role="copied",
    neutral={},
    copies=lambda params: params["scale"] == (1.0,),
    form=lambda scale: Form(scale),
    examples=(Example([[3, -1]], [1.5, -0.5], parameters={"scale": 0.5}),),
)
def passthrough(models: Any, *, scale: Annotated[PerModel, Real()] = 1.0) -> Any:
    """Copy one model's tensors, unchanged or times `scale`: for stacking layers with `slices`.

    models  [1, *block]
    scale   [1]          float64; with 1 (and the same dtype) bytes are copied as they are
    returns [*block]
    """
    return weighted_sum(models, scale)
