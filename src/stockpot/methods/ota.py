"""Averages weighted by the second moments that Adam kept of each parameter (OTA), and grafts of what they mark (FFG)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from stockpot.methods.arrays import add_rows, column, keep_where
from stockpot.methods.declaration import Companion, Example, Space, method
from stockpot.methods.parameters import PerModel, Real
from stockpot.statistics import Rank

__all__ = ["ota"]


def _saliency(delta: Any, *, moment: Any, **_: Any) -> Any:
    """`[m, n]`: second moment times the square of the change."""
    import numpy as np

    wide = delta.astype(np.float64)
    return np.abs(moment.astype(np.float64)) * (wide * wide)


def _grafts(params: Mapping[str, Any]) -> bool:
    return any(d < 1 for d in params["density"])


def _check(params: Mapping[str, Any]) -> str | None:
    if any(w < 0 for w in params["weight"]) or not sum(params["weight"]) > 0:
        return f"weights {list(params['weight'])}: expected none below zero, and one above it"
    return None


_TAUS = [[0.02, -0.01], [0.01, 0.03]]
_MOMENTS = {"moment": [[1e-4, 4e-4], [9e-4, 1e-4]]}


@method(
    family="averages",
    space=Space.DELTA,
    models=(1, None),
    companions=(
        Companion(
            "moment", "Adam's second moments (exp_avg_sq), or the file of the optimizer's state", optimizer="exp_avg_sq"
        ),
    ),
    stats=(Rank("density", of=_saliency, over="model", when=_grafts),),
    cite="arXiv:2509.11167",
    check=_check,
    reproducible="machine",
    neutral={"density": 1.0},
    examples=(
        Example(_TAUS, [0.0125, 0.0033333], base=[0, 0], companions=_MOMENTS),
        Example(_TAUS, [0.015, 0.01], base=[0, 0], companions={"moment": [[3, 3], [3, 3]]}),
        Example(
            [[0.02, -0.01, 0.005]],
            [0.02, 0, 0],
            base=[0, 0, 0],
            companions={"moment": [[1e-4, 1e-4, 4e-4]]},
            parameters={"density": 0.34},
        ),
        Example(_TAUS, [0.015, 0.01], base=[0, 0], companions={"moment": [[0, 0], [0, 0]]}, source="nothing is known"),
    ),
)
def ota(
    delta: Any,
    *,
    moment: Any,
    cutoff: Any,
    weight: Annotated[PerModel, Real(0)] = 1.0,
    density: Annotated[PerModel, Real(0, 1)] = 1.0,
    power: Annotated[float, Real(0, 4)] = 0.5,
) -> Any:
    """Average of the changes, each element weighted by a power of the model's second moment of it; Fast Fisher Grafting first.

    delta    [m, *block]  model minus base
    moment   [m, *block]  the optimizer's second moments
    cutoff   [m]          smallest moment times squared change that is kept, over the whole model, from `density`
    weight   [m]          float64, at least 0
    density  [m]          fraction of the elements that a model's change is grafted in; 1 is OTA without grafting, published: 0.3
                          to 0.4
    power    float64      of the moments in the weights: 0.5 published with grafting, 1 without
    returns  [*block]     sum w_i v_i^p x_i / sum w_i v_i^p over what is kept; where nothing is known of it the plain mean, where
                          nothing is kept none
    """
    import numpy as np

    kept: Any = np.ones(delta.shape, np.bool_)
    if any(c != 0 for c in cutoff):
        score = _saliency(delta, moment=moment).astype(np.float32)
        kept = score >= column(cutoff, score)
    known = np.abs(moment.astype(np.float64))
    share = (np.sqrt(known) if power == 0.5 else known if power == 1 else known**power) * column(weight, known)
    share = share * kept
    plain = kept * column(weight, share)
    share = np.where(add_rows(share) == 0, plain, share)
    total = add_rows(share)
    total += total == 0
    return (add_rows(keep_where(delta.astype(np.float64), kept) * share) / total).astype(delta.dtype)
