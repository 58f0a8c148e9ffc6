"""The mean direction of any number of models, by weights from their Gram matrix alone: Karcher mean, multislerp."""

from __future__ import annotations

import math
from typing import Annotated, Any

from stockpot.methods.arrays import weighted_sum
from stockpot.methods.declaration import Example, Space, method
from stockpot.methods.forms import Form
from stockpot.methods.parameters import Choice, Flag, PerModel, Real, Whole
from stockpot.methods.spherical import ANTIPARALLEL
from stockpot.statistics import Gram

__all__ = ["karcher", "karcher_weights", "multislerp", "multislerp_weights"]


def _karcher_weights(
    gram: Any, weight: tuple[float, ...], max_iter: int, tol: float, dialect: str
) -> tuple[float, ...]:
    return karcher_weights(gram, weight if dialect == "stockpot" else (1.0,) * len(weight), max_iter, tol)


def karcher_weights(gram: Any, weight: tuple[float, ...], max_iter: int = 10, tol: float = 1e-5) -> tuple[float, ...]:
    """What each model counts in the Karcher mean: the mean direction on the sphere, times the mean of the norms.

    gram    [m, m] float64; weight [m], at least 0, divided by their sum
    tol     where the tangent is shorter, the iteration ends; and a norm below this share of the largest has no direction
    A sphere has no mean direction for opposite vectors (cos < -0.99): then, and where all are zero, the plain mean.
    """
    m = len(weight)
    total = sum(weight)
    share = [w / total for w in weight]
    inner = [[float(g) for g in row] for row in gram]
    if not all(math.isfinite(g) for row in inner for g in row):
        return tuple(share)
    norms = [math.sqrt(inner[i][i]) for i in range(m)]
    kept = [i for i in range(m) if share[i] > 0 and norms[i] > tol * max(norms)]
    if not kept:
        return tuple(share)
    cosines = {
        (i, j): max(-1.0, min(1.0, inner[i][j] / (norms[i] * norms[j]))) if i != j else 1.0 for i in kept for j in kept
    }
    if min(cosines.values()) < ANTIPARALLEL:
        return tuple(share)
    part = sum(share[i] for i in kept)
    alpha = {i: share[i] / part for i in kept}

    def unit(c: dict[int, float]) -> dict[int, float]:
        length = math.sqrt(max(sum(c[i] * c[j] * cosines[i, j] for i in kept for j in kept), 0.0))
        return {i: c[i] / length for i in kept}

    u = unit(alpha)
    for _ in range(max_iter):
        tangent = dict.fromkeys(kept, 0.0)
        for i in kept:
            cos = max(-1.0, min(1.0, sum(u[j] * cosines[i, j] for j in kept)))
            angle = math.acos(cos)
            if angle < 1e-9:
                continue
            scale = alpha[i] * angle / math.sin(angle)
            for j in kept:
                tangent[j] -= scale * cos * u[j]
            tangent[i] += scale
        length = math.sqrt(max(sum(tangent[i] * tangent[j] * cosines[i, j] for i in kept for j in kept), 0.0))
        if length < tol:
            break
        u = unit({i: math.cos(length) * u[i] + math.sin(length) / length * tangent[i] for i in kept})
    mean_norm = sum(s * n for s, n in zip(share, norms, strict=True))
    return tuple(mean_norm * u[i] / norms[i] if i in u else 0.0 for i in range(m))


def _karcher_check(params: Any) -> str | None:
    if params["dialect"] == "stockpot" and (any(w < 0 for w in params["weight"]) or not sum(params["weight"]) > 0):
        return f"weights {list(params['weight'])}: expected none below zero, and one above it"
    return None


@method(
    family="spherical",
    space=Space.WEIGHT,
    models=(1, None),
    stats=(Gram(),),
    cite="arXiv:2603.04972",
    check=_karcher_check,
    neutral={},
    form=lambda gram, weight, max_iter, tol, dialect: Form(_karcher_weights(gram, weight, max_iter, tol, dialect)),
    dialects={"stockpot": "a mean by weights", "mergekit": "weights are of no account"},
    examples=(
        Example([[1, 0, 0], [1, 0, 0], [0, 1, 0]], [0.866025, 0.5, 0], within=1e-5),
        Example([[3, 0], [0, 4]], [2.474874, 2.474874], within=1e-5),
        Example([[0, 0], [3, 0]], [1.5, 0], source="a zero tensor has no direction"),
        Example([[2, 0], [0, 1], [-1, 1]], [0.380828, 1.421268], within=1e-5),
        Example([[3, 0], [-3, 0]], [0, 0], source="opposite: the plain mean"),
        Example([[3, 0], [0, 4]], [1.435063, 3.464548], parameters={"weight": [1, 3]}, within=1e-5),
    ),
)
def karcher(
    models: Any,
    *,
    gram: Any,
    weight: Annotated[PerModel, Real()] = 1.0,
    max_iter: Annotated[int, Whole(0, 10**6)] = 10,
    tol: Annotated[float, Real(0, 1)] = 1e-5,
    dialect: Annotated[str, Choice(("stockpot", "mergekit"))] = "stockpot",
) -> Any:
    """The mean direction of the models on the sphere (Karcher mean), each tensor as one vector, times the mean of their norms.

    models   [m, *block]  a base that the recipe lists is one of them
    gram     [m, m]       float64: inner products over the whole tensor
    weight   [m]          float64, at least 0; divided by their sum
    max_iter, tol         steps of the iteration, and the length of a step that ends it
    dialect               `mergekit` counts all models alike
    returns  [*block]
    """
    return weighted_sum(models, _karcher_weights(gram, weight, max_iter, tol, dialect))


def multislerp_weights(
    gram: Any, weight: tuple[float, ...], normalize: bool = True, eps: float = 1e-8
) -> tuple[float, ...]:
    """What each model counts: the direction is that of the weighted mean of unit vectors, the length that of the norms.

    The step in the tangent space that the method is described by is always zero there. Where the unit vectors cancel, or all
    are zero, the plain mean is taken.
    """
    m = len(weight)
    total = sum(weight)
    share = [w / total for w in weight]
    scale = share if normalize else list(weight)
    inner = [[float(g) for g in row] for row in gram]
    if m == 1 or not all(math.isfinite(g) for row in inner for g in row):
        return tuple(share)
    norms = [math.sqrt(inner[i][i]) for i in range(m)]
    unit = [s / (n + eps) for s, n in zip(share, norms, strict=True)]
    length = math.sqrt(max(sum(unit[i] * unit[j] * inner[i][j] for i in range(m) for j in range(m)), 0.0))
    if length < 1e-7:
        return tuple(scale)
    mean_norm = sum(s * n for s, n in zip(scale, norms, strict=True))
    return tuple(mean_norm * u / length for u in unit)


def _multislerp_check(params: Any) -> str | None:
    weight = params["weight"]
    if not abs(sum(weight)) > 1e-12 * sum(map(abs, weight)):
        return f"weights {list(weight)} sum to zero, so that they have no mean direction"
    return None


@method(
    family="spherical",
    space=Space.DELTA,
    base_optional=True,
    models=(1, None),
    stats=(Gram(),),
    check=_multislerp_check,
    form=lambda gram, weight, normalize_weights, eps: Form(multislerp_weights(gram, weight, normalize_weights, eps)),
    cite="mergekit (no paper)",
    neutral={},
    examples=(
        Example([[3, 0], [0, 4]], [2.474874, 2.474874]),
        Example([[1, 0, 0], [1, 0, 0], [0, 1, 0]], [0.894427, 0.447214, 0]),
        Example([[2, 0], [0, 1], [-1, 1]], [0.248817, 1.450214]),
        Example([[3, 0], [0, 4]], [4.949747, 4.949747], parameters={"normalize_weights": False}),
        Example([[3, 0], [0, 4]], [1.788854, -0.894427], parameters={"weight": [2, -1]}),
        Example([[3, 0], [-3, 0]], [0, 0], source="they cancel: the plain mean"),
        Example([[4, 1], [1, 5]], [3.474874, 3.474874], base=[1, 1]),
        Example([[2, 2], [2, 2], [2, 2]], [2, 2], base=[2, 2], source="nothing has changed"),
    ),
)
def multislerp(
    delta: Any,
    *,
    gram: Any,
    weight: Annotated[PerModel, Real()] = 1.0,
    normalize_weights: Annotated[bool, Flag()] = True,
    eps: Annotated[float, Real(0, 1)] = 1e-8,
) -> Any:
    """The weighted mean direction of the models times the weighted mean of their norms; with a base, of their task vectors.

    delta   [m, *block]  model minus base, or the weights themselves
    gram    [m, m]       float64: inner products over the whole tensor
    weight  [m]          float64
    normalize_weights    divide the weights by their sum, for the length too
    eps     float64      added to norms before they divide
    returns [*block]     (sum w_i |x_i|) m / |m|, m = sum w_i x_i / (|x_i| + eps)
    """
    return weighted_sum(delta, multislerp_weights(gram, weight, normalize_weights, eps))
