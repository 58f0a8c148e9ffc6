"""The arithmetic that most methods come down to, as data: what the compiled kernels can do by themselves.

A method may declare, beside its function, how its parameters and statistics become a Form. The function stays the
definition; the form is an equal and faster way to the same bytes, and a test holds every method to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DivideBy", "Election", "Form"]

DivideBy = Literal["none", "weight", "count"]


@dataclass(frozen=True)
class Election:
    """How signs are elected and what agrees is combined (ties.disjoint_merge).

    weighted          the sign of sum(w x) rather than of sum(x)
    divide_by         "weight" (agreeing weight), "count" (agreeing models) or "none"; an empty divisor counts as 1
    zero_is_positive  the sign that an exactly zero sum takes
    least             a divisor below it counts as it; 0: only an empty one counts, as 1
    """

    weighted: bool = True
    divide_by: DivideBy = "weight"
    zero_is_positive: bool = True
    least: float = 0.0


@dataclass(frozen=True)
class Form:
    """For each model: thin out, multiply by `factor`; then the sum weighted by `weight`, or an election; times `scale`.

    weight    [m]  float64
    cutoff    [m]  magnitudes below it go; nan: everything goes. None: nothing does
    ceiling   [m]  magnitudes above it go; None: nothing does
    masked         whether the random mask is applied
    factor    [m]  float64, or None
    spread         least variance over the models (selection.spread) of elements that stay, before an election; None: all stay
    election       None: a weighted sum
    """

    weight: tuple[float, ...]
    cutoff: tuple[float, ...] | None = None
    ceiling: tuple[float, ...] | None = None
    masked: bool = False
    factor: tuple[float, ...] | None = None
    spread: float | None = None
    election: Election | None = None
    scale: float = 1.0
