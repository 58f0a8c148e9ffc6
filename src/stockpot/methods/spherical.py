"""From one model to another along an arc, by weights from their Gram matrix alone: SLERP, NuSLERP, WARP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from stockpot.methods.arrays import weighted_sum
from stockpot.methods.backends import backend_of
from stockpot.methods.declaration import Cost, Example, Scope, Space, method
from stockpot.methods.forms import Form
from stockpot.methods.parameters import Choice, Flag, PerModel, Real
from stockpot.statistics import Extent, Gram

__all__ = [
    "arcs",
    "mixed",
    "nuslerp",
    "nuslerp_arcs",
    "nuslerp_weights",
    "slerp",
    "slerp_weights",
    "warp",
    "warp_weights",
]

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


def arcs(gram: Any, t: float, guarded: bool = True) -> tuple[Any, Any]:
    """`slerp_weights` of many pairs at once: gram `[2, 2, ...]` -> two arrays `[...]`, float64."""
    import numpy as np

    (aa, ab), (_, bb) = gram
    na, nb = np.sqrt(aa), np.sqrt(bb)
    cos = ab / (np.where(na > TINY_NORM, na, 1.0) * np.where(nb > TINY_NORM, nb, 1.0))
    cos = np.clip(cos, -1.0, 1.0)
    straight = ~(np.abs(cos) <= PARALLEL)  # also where it is no number
    if guarded:
        straight |= (na <= TINY_NORM) | (nb <= TINY_NORM) | (cos < ANTIPARALLEL)
    return _on_arcs(cos, t, straight)


def _on_arcs(cos: Any, t: float, straight: Any) -> tuple[Any, Any]:
    """Weights on arcs of these cosines, of straight lines where they are said to be.

    Angles and sines are Python's, one by one: numpy's own differ in the last bit from processor to processor.
    """
    import numpy as np

    def each(function: Callable[[float], float], x: Any) -> Any:
        return np.asarray(np.frompyfunc(function, 1, 1)(x), np.float64)

    angle = each(math.acos, np.where(straight, 0.0, cos))
    whole = np.where(straight, 1.0, each(math.sin, angle))
    a = np.where(straight, 1.0 - t, each(math.sin, (1.0 - t) * angle) / whole)
    return a, np.where(straight, t, each(math.sin, t * angle) / whole)


def mixed(models: Any, weight: Sequence[Any]) -> Any:
    """Sum of weight_i x_i, the weights arrays that broadcast over a block."""
    total = models[0] * weight[0].astype(models.dtype)
    for x, w in zip(models[1:], weight[1:], strict=True):
        total += x * w.astype(models.dtype)
    return total


def _slerp_extent(params: Mapping[str, Any]) -> Extent:
    over: Extent = params["over"]
    return over


def _slerp_scope(params: Mapping[str, Any]) -> Scope:
    return Scope.ROW if params["over"] == "row" else Scope.ELEMENT


def _slerp_check(params: Mapping[str, Any]) -> str | None:
    if params["dialect"] != "mergekit" and not 0 <= params["t"] <= 1:
        return f"t: expected a number from 0 to 1, got {params['t']:g}; 'dialect: mergekit' goes beyond the ends"
    return None


def _form(gram: Any, t: float, over: str, dialect: str) -> Form:
    return Form(slerp_weights(gram, t, guarded=dialect == "stockpot"))


@method(
    family="spherical",
    space=Space.WEIGHT,
    models=(2, 2),
    sees=_slerp_scope,
    stats=(Gram(over=_slerp_extent),),
    base_role="first",
    ordered=True,
    cite="Shoemake 1985",
    check=_slerp_check,
    form=_form,
    dialects={
        "stockpot": "linear where a tensor is zero or both are nearly opposite",
        "mergekit": "no guard there: weights may grow past 30; t beyond 0 and 1 goes on along the arc",
    },
    examples=(
        Example([[3, 0], [0, 4]], [2.121320, 2.828427], parameters={"t": 0.5}),
        Example([[3, 0], [0, 4]], [2.771638, 1.530734], parameters={"t": 0.25}),
        Example([[0, 0], [2, 4]], [1, 2], parameters={"t": 0.5}, source="a zero tensor has no angle"),
        Example(
            [[[3, 0], [1, 2]], [[0, 4], [2, 1]]],
            [[2.121320, 2.828427], [1.581139, 1.581139]],
            parameters={"t": 0.5, "over": "row"},
        ),
    ),
)
def slerp(
    models: Any,
    *,
    gram: Any,
    t: Annotated[float, Real()],
    over: Annotated[str, Choice(("tensor", "row", "layer"))] = "tensor",
    dialect: Annotated[str, Choice(("stockpot", "mergekit"))] = "stockpot",
) -> Any:
    """Spherical interpolation of two models, each tensor as one vector: t = 0 gives the base (or first), 1 the other.

    models  [2, *block]  the base (or first) model, the other one
    gram    [2, 2]       float64: inner products over the whole tensor (row, layer)
    t       float64      0 to 1 (`mergekit`: any)
    over                 what is one vector: each `tensor`, each `row` of it, or all tensors of a `layer` together
    returns [*block]     (sin((1-t) w) a + sin(t w) b) / sin w, w the angle; linear where that is ill-conditioned
    dialect              `mergekit` drops the guards for zero and nearly opposite tensors
    """
    if over == "row":
        return mixed(models, arcs(gram, t, guarded=dialect == "stockpot"))
    return weighted_sum(models, slerp_weights(gram, t, guarded=dialect == "stockpot"))


def nuslerp_weights(gram: Any, weight: tuple[float, ...], dialect: str) -> tuple[float, float]:
    """(weight of a, weight of b) on the arc from one to the other, at t = w_b / (w_a + w_b).

    As slerp's, but for vectors that are nearly parallel: there the arc is followed too, down to the last bits of a cosine.
    `mergekit` has no guard for zero and nearly opposite vectors, takes weights that cancel for halves, and goes beyond the
    ends for negative ones.
    """
    total = weight[0] + weight[1]
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    (aa, ab), (_, bb) = ((float(g) for g in row) for row in gram)
    if not (math.isfinite(aa) and math.isfinite(ab) and math.isfinite(bb)):
        return 1.0 - t, t
    na, nb = math.sqrt(aa), math.sqrt(bb)
    guarded = dialect == "stockpot"
    if guarded and (na == 0 or nb == 0):
        return 1.0 - t, t
    least = 0.0 if guarded else 1e-7
    cos = max(-1.0, min(1.0, ab / (max(na, least) * max(nb, least))))
    if 1.0 - cos * cos <= 1e-16 or (guarded and cos < ANTIPARALLEL):
        return 1.0 - t, t
    angle = math.acos(cos)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def nuslerp_arcs(gram: Any, weight: tuple[float, ...], dialect: str) -> tuple[Any, Any]:
    """`nuslerp_weights` of many pairs at once: gram `[2, 2, ...]` -> two arrays `[...]`, float64."""
    import numpy as np

    total = weight[0] + weight[1]
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    (aa, ab), (_, bb) = gram
    na, nb = np.sqrt(aa), np.sqrt(bb)
    guarded = dialect == "stockpot"
    least = 0.0 if guarded else 1e-7
    scale = np.maximum(na, least) * np.maximum(nb, least)
    cos = np.clip(ab / np.where(scale > 0, scale, 1.0), -1.0, 1.0)
    straight = ~(1.0 - cos * cos > 1e-16) | ~np.isfinite(aa + ab + bb)
    if guarded:
        straight |= (na == 0) | (nb == 0) | (cos < ANTIPARALLEL)
    return _on_arcs(cos, t, straight)


def _vectors(params: Mapping[str, Any]) -> str:
    """What nuslerp takes as one vector: the tensor, its rows, or its columns."""
    return "tensor" if params["nuslerp_flatten"] else "column" if params["nuslerp_row_wise"] else "row"


def _nuslerp_extent(params: Mapping[str, Any]) -> Extent:
    return "row" if _vectors(params) == "row" else "tensor"


def _nuslerp_gathers(params: Mapping[str, Any]) -> bool:
    return _vectors(params) != "column"  # those are all in hand


def _nuslerp_scope(params: Mapping[str, Any]) -> Scope:
    return {"tensor": Scope.ELEMENT, "row": Scope.ROW, "column": Scope.TENSOR}[_vectors(params)]


def _column_gram(delta: Any) -> Any:
    """`[2, n, ...]` -> `[2, 2, ...]` float64 numpy: products along the first axis of the tensor."""
    import numpy as np

    xp = backend_of(delta)
    a, b = (xp.astype(x, "float64") for x in delta)
    found = [(x * y).sum(0) for x, y in ((a, a), (a, b), (b, b))] if a.ndim else [a * a, a * b, b * b]
    aa, ab, bb = (np.asarray(f.cpu() if hasattr(f, "cpu") else f, np.float64) for f in found)
    return np.stack((np.stack((aa, ab)), np.stack((ab, bb))))


def _nuslerp_check(params: Any) -> str | None:
    if params["nuslerp_row_wise"] and params["nuslerp_flatten"] and params["dialect"] != "mergekit":
        return (
            "nuslerp_row_wise has no effect beside nuslerp_flatten: true (each tensor as one vector): set that to false"
        )
    weight = params["weight"]
    if params["dialect"] == "stockpot" and (min(weight) < 0 or not sum(weight) > 0):
        return f"weights {list(weight)}: expected none below zero, and one above it; 'dialect: mergekit' goes beyond the ends"
    return None


_A, _B = [[3, 0], [1, 2]], [[0, 4], [2, 1]]


@method(
    family="spherical",
    space=Space.DELTA,
    base_optional=True,
    models=(2, 2),
    sees=_nuslerp_scope,
    stats=(Gram(over=_nuslerp_extent, when=_nuslerp_gathers),),
    check=_nuslerp_check,
    form=lambda gram, weight, nuslerp_flatten, nuslerp_row_wise, dialect: Form(nuslerp_weights(gram, weight, dialect)),
    cost=Cost(scratch=lambda m, shape, size: 40 * math.prod(shape) + 4096),
    cite="mergekit (no paper)",
    dialects={
        "stockpot": "a straight line where a tensor is zero or both are nearly opposite; weights of at least 0",
        "mergekit": "no guards there; negative weights go beyond the ends; nuslerp_row_wise counts only without nuslerp_flatten",
    },
    examples=(
        Example([[3, 0], [0, 4]], [2.121320, 2.828427]),
        Example([[3, 0, 1, 2], [0, 4, 2, 1]], [1.910181, 2.546908, 1.910181, 1.910181]),
        Example([[3, 0, 1, 2], [0, 4, 2, 1]], [1.010900, 3.464733, 2.069333, 1.540117], parameters={"weight": [1, 3]}),
        Example([[3, 0, 1, 2], [0, 4, 2, 1]], [2.140283, 3.280567, 2.140283, 2.140283], base=[1, 1, 1, 1]),
        Example([[0, 0], [2, 4]], [1, 2], source="a zero tensor has no angle"),
        Example([[1, 0], [-1, 0]], [0.4, 0], parameters={"weight": [0.7, 0.3]}, source="opposite: a straight line"),
        Example([_A, _B], [[2.121320, 2.828427], [1.581139, 1.581139]], parameters={"nuslerp_flatten": False}),
        Example(
            [_A, _B],
            [[1.849016, 2.537410], [1.849016, 1.903057]],
            parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True},
        ),
        Example(
            [_A, _B],
            [[2.306563, 3.613126], [1.707107, 1.707107]],
            base=[[1, 1], [1, 1]],
            parameters={"nuslerp_flatten": False},
        ),
    ),
)
def nuslerp(
    delta: Any,
    *,
    gram: Any,
    weight: Annotated[PerModel, Real()] = 1.0,
    nuslerp_flatten: Annotated[bool, Flag()] = True,
    nuslerp_row_wise: Annotated[bool, Flag()] = False,
    dialect: Annotated[str, Choice(("stockpot", "mergekit"))] = "stockpot",
) -> Any:
    """Spherical interpolation of two models by their weights, each tensor as one vector; with a base, of their task vectors.

    delta   [2, *block]  model minus base, or the weights themselves
    gram    [2, 2]       float64: inner products over the whole tensor (row)
    weight  [2]          float64: t is the second one's share of their sum
    nuslerp_flatten      each tensor as one vector; false: its parts by themselves
    nuslerp_row_wise     parts are columns W[:, j] (true) or rows W[i, :] (false), as mergekit's code (its docs say the reverse)
    returns [*block]     (sin((1-t) w) a + sin(t w) b) / sin w, w the angle
    dialect              `mergekit` drops the guards
    """
    if nuslerp_flatten:
        return weighted_sum(delta, nuslerp_weights(gram, weight, dialect))
    if not nuslerp_row_wise:
        return mixed(delta, nuslerp_arcs(gram, weight, dialect))
    xp = backend_of(delta)
    a, b = (xp.array(w, delta) for w in nuslerp_arcs(_column_gram(delta), weight, dialect))
    return delta[0] * a + delta[1] * b


def warp_weights(gram: Any, t: float, eta: float) -> tuple[float, ...]:
    """Of each delta: SLERP of the first two at t; of more, the m-th is taken in at 1/m; all of it times eta.

    gram  [m, m] float64: what is folded so far stays in the span of the deltas, so that their products are enough
    """
    m = len(gram)
    inner = [[float(g) for g in row] for row in gram]
    folded = [1.0] + [0.0] * (m - 1)
    for k in range(1, m):
        own = sum(folded[i] * folded[j] * inner[i][j] for i in range(k) for j in range(k))
        cross = sum(folded[i] * inner[i][k] for i in range(k))
        share = t if m == 2 else 1.0 / (k + 1)
        a, b = slerp_weights([[max(own, 0.0), cross], [cross, inner[k][k]]], share)
        folded = [a * f for f in folded]
        folded[k] = b
    return tuple(eta * f for f in folded)


@method(
    family="spherical",
    space=Space.DELTA,
    models=(1, None),
    stats=(Gram(over="layer"),),
    ordered=True,
    experimental=True,
    cite="arXiv:2406.16768",
    form=lambda gram, t, eta: Form(warp_weights(gram, t, eta)),
    neutral={"eta": 1.0},
    examples=(
        Example([[1.3, 1], [1.1, 1.2]], [1.235114, 1.117557], base=[1, 1], parameters={"eta": 1}),
        Example([[1.3, 1], [1.1, 1.2]], [1.070534, 1.035267], base=[1, 1]),
        Example([[0.3, 0], [0.1, 0.2], [0, 0.4]], [0.176878, 0.249762], base=[0, 0], parameters={"eta": 1}),
        Example([[0.1, 0.2], [0, 0.4], [0.3, 0]], [0.179317, 0.251824], base=[0, 0], parameters={"eta": 1}),
        Example([[1, 1], [1, 2]], [1, 1.15], base=[1, 1], source="one run has changed nothing: a straight line"),
    ),
)
def warp(
    delta: Any,
    *,
    gram: Any,
    t: Annotated[float, Real(0, 1)] = 0.5,
    eta: Annotated[float, Real(0, 1)] = 0.3,
) -> Any:
    """WARP's merge: SLERP of the runs' task vectors, all tensors of a layer as one vector, then back towards the initialisation.

    delta   [m, *block]  model minus the initialisation
    gram    [m, m]       float64: inner products over the layer; tensors in no numbered layer are by themselves
    t       float64      of two models; of more the k-th is taken in at 1/k, in the recipe's order
    eta     float64      1 stays at what was merged, 0 goes back to the initialisation; the published next start has 0.3
    returns [*block]     merged delta; the base is added to it
    """
    return weighted_sum(delta, warp_weights(gram, t, eta))
