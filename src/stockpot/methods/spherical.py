"""Weights from the Gram matrix of the inputs alone: spherical interpolation and mean, Model Stock; and the straight line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from stockpot.methods.arrays import weighted_sum
from stockpot.methods.backends import backend_of
from stockpot.methods.declaration import Cost, Example, Scope, Space, method
from stockpot.methods.forms import Form
from stockpot.methods.parameters import Choice, Flag, PerModel, Real, Whole
from stockpot.statistics import Extent, Gram

__all__ = [
    "arcs", "karcher", "karcher_weights", "model_stock", "multislerp", "multislerp_weights", "nuslerp", "nuslerp_arcs",
    "nuslerp_weights", "slerp", "slerp_weights", "stock_share", "stock_shares", "warp", "warp_weights", "wise_ft",
]  # fmt: skip

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


def _mixed(models: Any, weight: Sequence[Any]) -> Any:
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
        return _mixed(models, arcs(gram, t, guarded=dialect == "stockpot"))
    return weighted_sum(models, slerp_weights(gram, t, guarded=dialect == "stockpot"))


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


def stock_share(gram: Any, clamped: bool = True) -> float:
    """How far Model Stock goes from the base to the mean of the models: k c / (1 + (k - 1) c), c the mean cosine of deltas.

    clamped  to 0 and 1; else as mergekit has it: norms' products count as 1e-6 at least, and beyond the base for c < 0
    """
    k = len(gram)
    inner = [[float(g) for g in row] for row in gram]
    cosines = []
    for i in range(k):
        for j in range(i + 1, k):
            scale = math.sqrt(inner[i][i]) * math.sqrt(inner[j][j])
            if clamped:
                cos = inner[i][j] / scale if scale > 0 and math.isfinite(scale) else 0.0
            else:
                cos = inner[i][j] / max(scale, 1e-6)
            cosines.append(max(-1.0, min(1.0, cos)))
    cos = sum(cosines) / len(cosines)
    if abs(1 + (k - 1) * cos) < 1e-6:
        return 0.0
    share = k * cos / (1 + (k - 1) * cos)
    return max(0.0, min(1.0, share)) if clamped else share


def stock_shares(gram: Any, clamped: bool = True) -> Any:
    """`stock_share` of many at once: gram `[m, m, ...]` -> `[...]`."""
    import numpy as np

    k = len(gram)
    norms = [np.sqrt(gram[i, i]) for i in range(k)]
    total: Any = 0.0
    for i in range(k):
        for j in range(i + 1, k):
            scale = norms[i] * norms[j]
            if clamped:
                cos = np.where((scale > 0) & np.isfinite(scale), gram[i, j] / np.where(scale > 0, scale, 1.0), 0.0)
            else:
                cos = gram[i, j] / np.maximum(scale, 1e-6)
            total = total + np.clip(cos, -1.0, 1.0)
    cos = total / (k * (k - 1) // 2)
    below = 1 + (k - 1) * cos
    share = np.where(np.abs(below) < 1e-6, 0.0, k * cos / np.where(np.abs(below) < 1e-6, 1.0, below))
    return np.clip(share, 0.0, 1.0) if clamped else share


def _stock_weights(gram: Any, dialect: str) -> tuple[float, ...]:
    return (stock_share(gram, dialect == "stockpot") / len(gram),) * len(gram)


def _stock_extent(params: Mapping[str, Any]) -> Extent:
    return "row" if params["filter_wise"] else "tensor"


def _stock_scope(params: Mapping[str, Any]) -> Scope:
    return Scope.ROW if params["filter_wise"] else Scope.ELEMENT


@method(
    family="spherical",
    space=Space.DELTA,
    models=(2, None),
    sees=_stock_scope,
    stats=(Gram(over=_stock_extent),),
    cite="arXiv:2403.19522",
    form=lambda gram, filter_wise, dialect: Form(_stock_weights(gram, dialect)),
    dialects={
        "stockpot": "between the base and the mean; cosines of deltas however small",
        "mergekit": "products of norms count as 1e-6 at least; a negative cosine goes beyond the base",
    },
    examples=(
        Example([[1, 0], [0.6, 0.8]], [0.6, 0.3], base=[0, 0]),
        Example([[1, 1, 0], [1, 0, 1], [0, 1, 1]], [0.5, 0.5, 0.5], base=[0, 0, 0]),
        Example([[1, 0], [-0.6, 0.8]], [0, 0], base=[0, 0], source="a negative cosine: the base"),
        Example([[1, 0], [-0.6, 0.8]], [-0.6, -1.2], base=[0, 0], parameters={"dialect": "mergekit"}),
        Example([[5e-4, 0], [3e-4, 4e-4]], [3e-4, 1.5e-4], base=[0, 0], within=1e-9),
        Example(
            [[5e-4, 0], [3e-4, 4e-4]], [1.04e-4, 5.2e-5], base=[0, 0], parameters={"dialect": "mergekit"}, within=1e-6
        ),
        Example([[2, 3], [2, 3]], [2, 3], base=[2, 3], source="nothing has changed"),
        Example(
            [[[1, 0], [1, 0]], [[0.6, 0.8], [1, 0]]],
            [[0.6, 0.3], [1, 0]],
            base=[[0, 0], [0, 0]],
            parameters={"filter_wise": True},
        ),
    ),
)
def model_stock(
    delta: Any,
    *,
    gram: Any,
    filter_wise: Annotated[bool, Flag()] = False,
    dialect: Annotated[str, Choice(("stockpot", "mergekit"))] = "stockpot",
) -> Any:
    """The mean of the models, as far from the base as the angles between their task vectors say, each tensor by itself.

    delta   [m, *block]  model minus base
    gram    [m, m]       float64: inner products of the deltas over the whole tensor (row)
    filter_wise          each row of a tensor by itself; a vector is one row
    returns [*block]     t times the mean delta, t = m c / (1 + (m - 1) c), c the mean of the cosines
    dialect              `stockpot` keeps t within 0 and 1; `mergekit` does not, and takes small deltas for orthogonal ones
    """
    if filter_wise:
        share = stock_shares(gram, dialect == "stockpot") / len(delta)
        return _mixed(delta, (share,) * len(delta))
    return weighted_sum(delta, _stock_weights(gram, dialect))


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
        return _mixed(delta, nuslerp_arcs(gram, weight, dialect))
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
