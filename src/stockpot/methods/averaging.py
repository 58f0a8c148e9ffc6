"""Weighted averages of weights, the straight line between two, and the method that copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from stockpot.methods.arrays import weighted_sum
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.forms import Form
from stockpot.methods.parameters import Flag, PerModel, Real

__all__ = [
    "check_weights", "cocktail_weights", "layer_average", "linear", "lm_cocktail", "normalised", "passthrough",
    "wise_ft",
]  # fmt: skip


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
    family="averages",
    space=Space.WEIGHT,
    models=(1, None),
    average=True,
    neutral={},
    cite="arXiv:2203.05482",
    check=check_weights,
    form=_form,
    differentiable=True,
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
    family="layers",
    space=Space.WEIGHT,
    models=(1, 1),
    base_role="copied",
    neutral={},
    copies=lambda params: params["scale"] == (1.0,),
    form=lambda scale: Form(scale),
    differentiable=True,
    examples=(Example([[3, -1]], [1.5, -0.5], parameters={"scale": 0.5}),),
)
def passthrough(models: Any, *, scale: Annotated[PerModel, Real()] = 1.0) -> Any:
    """Copy one model's tensors, unchanged or times `scale`: for stacking layers with `slices`.

    models  [1, *block]
    scale   [1]          float64; with 1 (and the same dtype) bytes are copied as they are
    returns [*block]
    """
    return weighted_sum(models, scale)


def cocktail_weights(loss: Sequence[float], temperature: float, alpha: float) -> tuple[float, ...]:
    """softmax(-loss / temperature) over the models; with alpha > 0 over those after the first, which gets alpha itself."""
    others = loss if alpha == 0 else loss[1:]
    best = min(others)
    raw = [math.exp((best - x) / temperature) for x in others]
    total = math.fsum(raw)
    mixed = tuple((1 - alpha) * r / total for r in raw)
    return mixed if alpha == 0 else (alpha, *mixed)


def _cocktail_check(params: Mapping[str, Any]) -> str | None:
    if params["temperature"] <= 0:
        return f"temperature {params['temperature']:g}: expected a number above 0"
    if params["alpha"] > 0 and len(params["loss"]) < 2:
        return "alpha is what the first model gets beside a mixture of the others: there are no others"
    return None


@method(
    family="averages",
    space=Space.WEIGHT,
    models=(1, None),
    neutral={"loss": 1.0},
    cite="arXiv:2311.13534",
    check=_cocktail_check,
    form=lambda loss, temperature, alpha: Form(cocktail_weights(loss, temperature, alpha)),
    ordered=True,
    examples=(
        Example([[1], [0]], [0.549834], parameters={"loss": [1, 2]}),
        Example([[1], [0], [0]], [0.422379], parameters={"loss": [1, 2, 4]}),
        Example([[0], [0], [1]], [0.176491], parameters={"loss": [1, 2, 4], "temperature": 3}),
        Example([[10], [1], [0]], [5.274917], parameters={"loss": [9, 1, 2], "alpha": 0.5}),
    ),
)
def lm_cocktail(
    models: Any,
    *,
    loss: Annotated[PerModel, Real()],
    temperature: Annotated[float, Real(0)] = 5.0,
    alpha: Annotated[float, Real(0, 1)] = 0.0,
) -> Any:
    """Average of models by their losses on a few examples of the task: weights softmax(-loss / temperature).

    models      [m, *block]  weights of the models
    loss        [m]          mean loss of each on the examples; of models with one tokenizer
    temperature float64      above 0; the published 5 makes weights nearly uniform for losses of language models
    alpha       float64      the first model's share, kept out of the mixture (its loss is then of no account): the published
                             resilient tuning has 0.5
    returns     [*block]
    """
    return weighted_sum(models, cocktail_weights(loss, temperature, alpha))


@method(
    family="layers",
    space=Space.WEIGHT,
    models=(1, 2),
    neutral={},
    cite="arXiv:2506.15461",
    check=lambda params: check_weights({**params, "normalize": True}),
    form=lambda weight: Form(normalised(weight)),
    examples=(
        Example([[1, 3], [5, 3]], [3, 3]),
        Example([[1, 3], [5, 3]], [2, 3], parameters={"weight": [3, 1]}),
        Example([[1, 3]], [1, 3], source="the first or the last layer: a copy of its neighbour"),
    ),
)
def layer_average(models: Any, *, weight: Annotated[PerModel, Real(0)] = 1.0) -> Any:
    """A layer that is missing, made of its neighbours (CheckFree): in `slices`, whose two sources are the layers beside it.

    models  [1 or 2, *block]  the layer before, the layer after
    weight  [m]               the gradient norm of each, where it is known; equal ones are an approximation without training
    returns [*block]          their weighted mean
    """
    return weighted_sum(models, normalised(weight))


@method(
    family="averages",
    space=Space.WEIGHT,
    models=(2, 2),
    base_role="first",
    ordered=True,
    cite="arXiv:2109.01903",
    form=lambda alpha: Form((1.0 - alpha, alpha)),
    differentiable=True,
    examples=(
        Example([[1, 0], [3, 10]], [1.6, 3], parameters={"alpha": 0.3}),
        Example([[1, 0], [3, 10]], [2, 5]),
        Example([[1, 0], [3, 10]], [3, 10], parameters={"alpha": 1}),
    ),
)
def wise_ft(models: Any, *, alpha: Annotated[float, Real(0, 1)] = 0.5) -> Any:
    """The straight line from a pretrained model to its fine-tune: alpha = 0 gives the base (or first), 1 the other.

    models  [2, *block]  the base (or first) model, the fine-tune
    alpha   float64      0 to 1; 0.5 where nothing is known
    returns [*block]     (1 - alpha) a + alpha b
    """
    return weighted_sum(models, (1.0 - alpha, alpha))
