"""Spherical interpolation: weights computed from the Gram matrix of the inputs alone."""

from __future__ import annotations

import math
from typing import Annotated, Any

from stockpot.methods.arrays import weighted_sum
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.forms import Form
from stockpot.methods.parameters import Choice, Real
from stockpot.statistics import Gram

__all__ = ["slerp", "slerp_weights"]

PARALLEL = 0.9995
ANTIPARALLEL = -0.99
TINY_NORM = 1e-8


def slerp_weights(gram: Any, t: float, guarded: bool = True) -> tuple[float, float]:
    """(weight of a, weight of b) from ((a.a, a.b), (b.a, b.b)).

    Linear where the vectors are nearly parallel (|cos| > 0.9995). `guarded` also where one is zero (an angle is then
    undefined) and where they are nearly opposite (cos < -0.99, where the weights grow past 30 and the plane is arbitrary).
    """
    (aa, ab), (_, bb) = ((float(g) for g in row) for row in gram)
    if not (math.isfinite(aa) and math.isfinite(ab) and math.isfinite(bb)):
        return 1.0 - t, t  # a NaN or infinity shows in the result either way
    na, nb = math.sqrt(aa), math.sqrt(bb)
    if guarded and (na <= TINY_NORM or nb <= TINY_NORM):
        return 1.0 - t, t
    cos = ab / ((na if na > TINY_NORM else 1.0) * (nb if nb > TINY_NORM else 1.0))
    cos = max(-1.0, min(1.0, cos))
    if abs(cos) > PARALLEL or (guarded and cos < ANTIPARALLEL):
        return 1.0 - t, t
    angle = math.acos(cos)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _form(gram: Any, t: float, dialect: str) -> Form:
    return Form(slerp_weights(gram, t, guarded=dialect == "stockpot"))


@method(
    space=Space.WEIGHT,
    models=(2, 2),
    stats=(Gram(),),
    base_role="first",
    ordered=True,
    cite="Shoemake 1985",
    form=_form,
    dialects={
        "stockpot": "linear where a tensor is zero or both are nearly opposite",
        "mergekit": "no guard there: weights may grow past 30",
    },
    examples=(
        Example([[3, 0], [0, 4]], [2.121320, 2.828427], parameters={"t": 0.5}),
        Example([[3, 0], [0, 4]], [2.771638, 1.530734], parameters={"t": 0.25}),
        Example([[0, 0], [2, 4]], [1, 2], parameters={"t": 0.5}, source="a zero tensor has no angle"),
    ),
)
def slerp(
    models: Any,
    *,
    gram: Any,
    t: Annotated[float, Real(0, 1)],
    dialect: Annotated[str, Choice(("stockpot", "mergekit"))] = "stockpot",
) -> Any:
    """Spherical interpolation of two models, each tensor as one vector: t = 0 gives the base (or first), 1 the other.

    models  [2, *block]  the base (or first) model, the other one
    gram    [2, 2]       float64: inner products over the whole tensor
    t       float64      0 to 1
    returns [*block]     (sin((1-t) w) a + sin(t w) b) / sin w, w the angle; linear where that is ill-conditioned
    dialect              `mergekit` drops the guards for zero and nearly opposite tensors
    """
    return weighted_sum(models, slerp_weights(gram, t, guarded=dialect == "stockpot"))
