"""Spherical interpolation: weights computed from the Gram matrix of the inputs alone."""

from __future__ import annotations

import math
from typing import Annotated, Any

from stockpot.methods.arrays import is_numpy, weighted_sum
from stockpot.methods.declaration import Space, method
from stockpot.methods.forms import Form
from stockpot.methods.parameters import Choice, Real
from stockpot.methods.statistics import Total

__all__ = ["slerp", "slerp_weights"]

PARALLEL = 0.9995
ANTIPARALLEL = -0.99
TINY_NORM = 1e-8


def pair_gram(models: Any, **_: Any) -> Any:
    """`[2, n] -> [3, n]` float64 terms of a.a, a.b, b.b."""
    if is_numpy(models):
        import numpy as np

        terms = np.empty((3, *models[0].shape), np.float64)
        a, b = terms[0], terms[2]
        a[...], b[...] = models[0], models[1]
        np.multiply(a, b, out=terms[1])
        np.multiply(a, a, out=a)
        np.multiply(b, b, out=b)
        return terms
    import torch

    a, b = models[0].double(), models[1].double()
    return torch.stack((a * a, a * b, b * b))


def slerp_weights(gram: Any, t: float, guarded: bool = True) -> tuple[float, float]:
    """(weight of a, weight of b) from (a.a, a.b, b.b).

    Linear where the vectors are nearly parallel (|cos| > 0.9995). `guarded` also where one is zero (an angle is then
    undefined) and where they are nearly opposite (cos < -0.99, where the weights grow past 30 and the plane is arbitrary).
    """
    aa, ab, bb = (float(g) for g in gram)
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
    stats=(Total("gram", of=pair_gram, kernel="gram"),),
    cite="Shoemake 1985",
    form=_form,
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
    gram    [3]          float64: a.a, a.b, b.b of the whole tensor
    t       float64      0 to 1
    returns [*block]     (sin((1-t) w) a + sin(t w) b) / sin w, w the angle; linear where that is ill-conditioned
    dialect              `mergekit` drops the guards for zero and nearly opposite tensors
    """
    return weighted_sum(models, slerp_weights(gram, t, guarded=dialect == "stockpot"))
