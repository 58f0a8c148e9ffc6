"""Which kernels fold which statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stockpot.statistics import Gram, L1Norms, Rank, SignSum, Statistic
from stockpot.statistics.order import Tally, Window, tally

if TYPE_CHECKING:
    from stockpot.engine.native import Kernels
    from stockpot.engine.native.tasks import Block

__all__ = ["Fold", "fold_of"]


@dataclass(frozen=True)
class Fold:
    """A statistic's `fold` on raw bytes: (what it looks for, block, form, mask, the piece so far) -> part.

    form  whether it needs to know the form of the method's arithmetic
    """

    form: bool
    fold: Callable[..., Any]


def _fold_rank(kernels: Kernels, seek: Any, block: Block, form: Any, mask: Any, so_far: Any) -> Any:
    windows = [(w.low, w.high) if isinstance(w, Window) else None for w in seek]
    found = kernels.split(block, windows)
    return [
        None if w is None else Tally(n, [inside], len(inside)) for w, (n, inside) in zip(windows, found, strict=True)
    ]


def _fold_spread(kernels: Kernels, seek: Any, block: Block, form: Any, mask: Any, so_far: Any) -> Any:
    return [tally(w, kernels.spread(block)) if isinstance(w, Window) else None for w in seek]


def _fold_total(kind: str) -> Callable[..., Any]:
    def fold(kernels: Kernels, seek: Any, block: Block, form: Any, mask: Any, so_far: Any) -> Any:
        return kernels.totals(kind, block, form, mask, so_far)

    return fold


#: by the type of the statistic: what of it is compiled
_FOLDS: dict[type, Fold] = {
    Rank: Fold(False, _fold_rank),
    Gram: Fold(False, _fold_total("gram")),
    L1Norms: Fold(True, _fold_total("norms")),
    SignSum: Fold(True, _fold_total("signs")),
}
#: by the name that a statistic gives: of those with a function of their own
_NAMED: dict[str, Fold] = {
    "spread": Fold(False, _fold_spread),
    "varying": Fold(False, _fold_total("varying")),
    "energies": Fold(True, _fold_total("energies")),
}


def fold_of(stat: Statistic) -> Fold | None:
    """How a statistic is folded by kernels; None where it is not."""
    if stat.compiled is not None:
        return _NAMED.get(stat.compiled)
    if isinstance(stat, Rank) and (stat.of is not None or stat.signed):
        return None
    return _FOLDS.get(type(stat))
