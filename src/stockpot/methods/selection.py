"""Elements of task vectors chosen by a score of their own: SCE (FuseChat) and Arcee's fusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from stockpot.methods.arrays import keep_only
from stockpot.methods.declaration import Example, Scope, Space, method
from stockpot.methods.forms import Election, Form
from stockpot.methods.parameters import Choice, Real
from stockpot.methods.ties import disjoint_merge
from stockpot.statistics import Rank, Total

__all__ = ["arcee_fusion", "sce"]

Params = Mapping[str, Any]


# SCE: select, calculate, erase


def spread(delta: Any, **_: Any) -> Any:
    """`[m, n] -> [1, n]`: the variance over models. Of equal numbers it is exactly 0.

    About the first model's: with one distance of 0 among m the square of the mean is at most (m - 1) / m of the mean square.
    """
    import numpy as np

    m = len(delta)
    if m == 1:
        return np.zeros((1, *delta.shape[1:]), delta.dtype)
    away = delta[1] - delta[0]
    total, squares = away, away * away
    for x in delta[2:]:
        away = x - delta[0]
        total = total + away
        away *= away
        squares += away
    total = total * delta.dtype.type(1 / m)
    total *= total
    squares *= delta.dtype.type(1 / m)
    squares -= total
    return np.maximum(squares, delta.dtype.type(0), out=squares)[None]


def _varies(delta: Any, **_: Any) -> Any:
    differs = delta[1:] != delta[0]
    return differs.any(0, keepdims=True)


def _selects(params: Params) -> bool:
    return bool(params["select_topk"] < 1)


def _selected_count(params: Params, count: int, known: Params) -> list[int]:
    varying = float(known["varying"][0])
    if params["dialect"] == "mergekit":  # which multiplies in float32: 0.29 of 200 are 58 there
        import numpy as np

        return [int(np.float32(params["select_topk"]) * np.float32(varying))]
    return [int(params["select_topk"] * varying)]


def _selected(delta: Any, cutoff: Any) -> Any:
    """`[*block]`: where the models differ enough, or None: everywhere. cutoff: `[1]`; 0 keeps everything."""
    import numpy as np

    if cutoff[0] == 0:
        return None
    return spread(delta)[0].astype(np.float32, copy=False) >= np.float32(cutoff[0])


def _energies(delta: Any, *, cutoff: Any, **_: Any) -> Any:
    """`[m + 1, n]` float64: squares of what is selected, and ones to count the elements."""
    import numpy as np

    out = np.empty((len(delta) + 1, *delta.shape[1:]))
    np.multiply(delta, delta, out=out[:-1], dtype=np.float64)
    out[-1] = 1
    selected = _selected(delta, cutoff)
    if selected is not None:
        keep_only(out[:-1], selected)
    return out


def _sce_weights(energy: Any, dialect: str) -> tuple[float, ...]:
    squares = [float(e) for e in energy[:-1]]
    total = sum(squares)
    means = total / max(float(energy[-1]), 1.0)
    if not total > 0 or (dialect == "mergekit" and means < 1e-6):
        return (1 / len(squares),) * len(squares)
    return tuple(s / total for s in squares)


def _sce_election(dialect: str) -> Election:
    return Election(weighted=False, least=1e-6 if dialect == "mergekit" else 0.0)


def _sce_form(varying: Any, cutoff: Any, energy: Any, select_topk: float, dialect: str) -> Form:
    # how many models there are shows in the energies, which alone are gathered without weights
    weight = (1.0,) if energy is None else _sce_weights(energy, dialect)
    return Form(weight, spread=None if cutoff[0] == 0 else cutoff[0], election=_sce_election(dialect))


_T = [[0.3, -0.1, 0.2, 0], [0.1, 0.2, -0.4, 0.1]]
_TINY = [[x * 1e-3 for x in row] for row in _T]


@method(
    family="trimmed",
    space=Space.DELTA,
    models=(1, None),
    stats=(
        Total("varying", of=_varies, when=_selects, compiled="varying"),
        Rank("select_topk", of=spread, counts=_selected_count, compiled="spread"),
        Total("energy", of=_energies, compiled="energies"),
    ),
    cite="arXiv:2408.07990",
    form=_sce_form,
    neutral={"select_topk": 1.0},
    dialects={
        "stockpot": "weights by energy however small it is; what a sole model carries is kept whole",
        "mergekit": "uniform weights where the mean square is below 1e-6 (so for most fine-tunes); an agreeing weight counts as "
        "1e-6 at least",
    },
    examples=(
        Example(_T, [0.177778, 0.2, -0.4, 0.1], base=[0] * 4),
        Example(_T, [0, 0.2, -0.4, 0], base=[0] * 4, parameters={"select_topk": 0.5}),
        Example(_T, [0] * 4, base=[0] * 4, parameters={"select_topk": 0.1}, source="a tenth of four is none: the base"),
        Example(_TINY, [1.77778e-4, 2e-4, -4e-4, 1e-4], base=[0] * 4, within=1e-9),
        Example(_TINY, [2e-4, 2e-4, -4e-4, 1e-4], base=[0] * 4, parameters={"dialect": "mergekit"}, within=1e-9),
        Example([[1000, 0], [-0.5, 0.2]], [1000, 0.2], base=[0, 0]),
        Example([[1], [-1]], [1], base=[0], source="a sum of zero counts as positive"),
    ),
)
def sce(
    delta: Any,
    *,
    varying: Any,
    cutoff: Any,
    energy: Any,
    select_topk: Annotated[float, Real(0, 1)] = 1.0,
    dialect: Annotated[str, Choice(("stockpot", "mergekit"))] = "stockpot",
) -> Any:
    """Select the elements in which the models differ most, weight models by the energy of theirs, erase minority signs.

    delta    [m, *block]  model minus base
    varying  [1]          how many elements of the tensor differ between models (`select_topk` below 1)
    cutoff   [1]          smallest variance over models that is selected; all ties at it are
    energy   [m + 1]      sums of squares of what is selected, and the number of elements
    select_topk           fraction selected of the elements in which models differ; 1 selects all
    dialect               `mergekit` has absolute limits of 1e-6
    returns  [*block]     sum w_i x_i over those with the sign of the plain sum, divided by their weights
    """
    merged = disjoint_merge(delta, _sce_weights(energy, dialect), _sce_election(dialect))
    selected = _selected(delta, cutoff)  # or not: of all models together
    if selected is not None:
        keep_only(merged, selected)
    return merged


# Arcee's fusion

_QUARTERS = (0.25, 0.5, 0.75)


def _quarters(params: Params) -> tuple[float, ...]:
    return _QUARTERS


def _quarter_counts(params: Params, count: int, known: Params) -> list[int]:
    return [count - int(q * (count - 1)) for q in _QUARTERS]


def divergence(models: Any, dialect: str) -> Any:
    """`[2, rows, n]` (base, model) -> `[rows, 1]` float64: the KL divergence of the softmax of each row, model from base.

    A second-order quantity: the difference of two terms of size 1 by which it is defined loses most of it in float32, and all
    in 16 bits. `stockpot` works it out from the centred difference; `mergekit` adds 1e-8 to probabilities.
    """
    import numpy as np

    base, model = models.astype(np.float64)
    if base.shape[-1] == 0:
        return np.zeros((*base.shape[:-1], 1))
    q = np.exp(base - base.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    if dialect == "mergekit":
        p = np.exp(model - model.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        p += 1e-8
        q += 1e-8
        return (p * np.log(p / q)).sum(-1, keepdims=True)
    d = model - base
    d -= (q * d).sum(-1, keepdims=True)
    top = np.maximum(d.max(-1, keepdims=True), 0)
    if (top > 50).any():  # beyond what exp takes: as the definition reads, which is exact enough for such
        shifted = model - model.max(-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        log_q = np.log(np.maximum(q, 1e-300))
        plain = (np.exp(log_p) * (log_p - log_q)).sum(-1, keepdims=True)
        d = np.where(top > 50, 0.0, d)
    e = np.expm1(d)
    z = (q * e).sum(-1, keepdims=True)
    stable = (q * (1 + e) * d).sum(-1, keepdims=True) / (1 + z) - np.log1p(z)
    return np.maximum(np.where(top > 50, plain, stable) if (top > 50).any() else stable, 0.0)


def importance(models: Any, *, dialect: str, **_: Any) -> Any:
    """`[2, rows, n] -> [rows, n]` float32: |model - base| times the row's divergence."""
    import numpy as np

    wide = models.astype(np.float64)
    return (np.abs(wide[1] - wide[0]) * divergence(models, dialect)).astype(np.float32)


def _three(models: Any, **keywords: Any) -> Any:
    import numpy as np

    score = importance(models, **keywords)
    return np.broadcast_to(score, (3, *score.shape))


@method(
    family="task vectors",
    space=Space.WEIGHT,
    scope=Scope.ROW,
    models=(2, 2),
    base_role="first",
    ordered=True,
    stats=(Rank(_quarters, of=_three, name="quartiles", counts=_quarter_counts),),
    cite="mergekit (no paper)",
    reproducible="machine",
    dialects={
        "stockpot": "the divergence worked out without cancellation; where three quarters of a tensor score 0, only what scores "
        "more is taken",
        "mergekit": "1e-8 added to probabilities; such tensors are taken whole",
    },
    examples=(
        Example([[0] * 8, [0.1, -0.2, 0.3, -0.1, 0.2, 2, 0.1, -0.05]], [0, 0, 0.3, 0, 0, 2, 0, 0]),
        Example([[[0] * 4, [0] * 4], [[0.1, 0, 0.5, 0], [1, 0, 0, -1]]], [[0] * 4, [1, 0, 0, -1]]),
        Example([[[0, 1], [0, 0]], [[0.5, 1], [1, -1]]], [[0, 1], [0, 0]], source="the fence lies above every score"),
        Example([[[0, 0]] * 4, [[1, 0]] + [[0, 0]] * 3], [[1, 0]] + [[0, 0]] * 3),
        Example([[0, 1, 2, 3], [5, 6, 7, 8]], [0, 1, 2, 3], source="a shift of a row changes no probability"),
        Example([[0, 1, 2, 3], [5, 6, 7, 8]], [5, 6, 7, 8], parameters={"dialect": "mergekit"}),
    ),
)
def arcee_fusion(
    models: Any,
    *,
    quartiles: Any,
    fence: Annotated[float, Real(0)] = 1.5,
    dialect: Annotated[str, Choice(("stockpot", "mergekit"))] = "stockpot",
) -> Any:
    """The base, with those elements of one model that matter most: outliers of |change| times how far the row's softmax moved.

    models    [2, rows, n]  the base (or first) model, the other one
    quartiles [3]           of the scores over the tensor: the elements at a quarter, half and three quarters in order
    fence     float64       scores of at least median + fence (third - first quartile) are taken; mergekit's is 1.5
    dialect                 `mergekit` takes tensors whole whose fence is 0
    returns   [rows, n]     elements of the model where it matters, of the base elsewhere
    """
    import numpy as np

    score = importance(models, dialect=dialect)
    low, middle, high = (float(q) for q in quartiles)
    least = middle + fence * (high - low)
    taken = score >= np.float32(least)
    if dialect == "stockpot":
        taken &= score > 0
    return np.where(taken, models[1], models[0])
