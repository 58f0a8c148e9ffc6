"""What a sweep tries: every list of the staged protocol, and of what can be added to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stockpot.errors import ArgumentError, nearest
from stockpot.runs.weighting import DEFAULT_POWER

__all__ = ["STAGES", "SweepOptions"]

#: in the order in which they run
STAGES = ("uniform", "interval", "weights", "schedules", "comparison", "greedy", "lcsc")
DEFAULT_STAGES = ("uniform", "interval", "weights")


@dataclass(frozen=True)
class SweepOptions:
    """The protocol of arXiv 2504.18580: uniform soups of the last k; intervals for the best `keep` of them; then, for the best
    `keep` of all, weights by a metric over penalties.

    stages       of STAGES; more than the protocol on request: schedules (EMA, 1-sqrt), comparison (TIES, DARE-TIES, SLERP, with
                 the first and the last snapshot as base), greedy (arXiv 2203.05482), lcsc (arXiv 2404.02241, by CMA-ES)
    k, intervals, by, penalties, power, smooth   the lists of the protocol
    keep         how many candidates go on to the next stage
    adapter      how LoRA adapters are averaged: factors, product
    density      of TIES and DARE-TIES in comparisons, over the last comparison_k and over comparison_spaced (k, interval)
    lcsc_*       snapshots, evaluations in all, whether coefficients sum to one, whether they may be negative, seed
    """

    stages: tuple[str, ...] = DEFAULT_STAGES
    k: tuple[int, ...] = (2, 3, 4, 5, 8, 10)
    intervals: tuple[int, ...] = (2, 3)
    by: tuple[str, ...] = ("loss", "step")
    penalties: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.5)
    power: float = DEFAULT_POWER
    smooth: int = 1
    keep: int = 2
    adapter: str = "factors"
    density: float = 0.5
    comparison_k: tuple[int, ...] = (3, 5, 10)
    comparison_spaced: tuple[tuple[int, int], ...] = ()
    decays: tuple[float, ...] = (0.5, 0.8, 0.9)
    greedy_last: int = 10
    lcsc_last: int = 10
    lcsc_evaluations: int = 60
    lcsc_sum: str = "one"
    lcsc_signs: str = "any"
    seed: int = 0

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage not in STAGES:
                raise ArgumentError(
                    f"stages: expected some of {', '.join(STAGES)}, got {stage!r}{nearest(stage, STAGES)}"
                )
        object.__setattr__(self, "stages", tuple(s for s in STAGES if s in self.stages))
        if not self.stages:
            raise ArgumentError(f"stages: expected at least one of {', '.join(STAGES)}")
        if {"interval", "weights"} & set(self.stages) and "uniform" not in self.stages:
            raise ArgumentError("stages: interval and weights go on from what uniform found best: add uniform")
        _wholes("k", self.k, 1)
        _wholes("intervals", self.intervals, 2)
        _wholes("comparison_k", self.comparison_k, 2)
        for k, m in self.comparison_spaced:
            _wholes("comparison_spaced", (k,), 2)
            _wholes("comparison_spaced", (m,), 2)
        for name, low in (
            ("keep", 1),
            ("smooth", 1),
            ("greedy_last", 2),
            ("lcsc_last", 2),
            ("lcsc_evaluations", 1),
            ("seed", 0),
        ):
            _wholes(name, (getattr(self, name),), low)
        _reals("penalties", self.penalties, 0.0, None)
        _reals("decays", self.decays, 0.0, 1.0)
        _reals("density", (self.density,), 0.0, 1.0)
        _reals("power", (self.power,), 0.0, None)
        for name, known in (
            ("lcsc_sum", ("one", "free")),
            ("lcsc_signs", ("any", "positive")),
            ("adapter", ("factors", "product")),
        ):
            if getattr(self, name) not in known:
                raise ArgumentError(f"{name}: expected {' or '.join(known)}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _wholes(name: str, values: Sequence[Any], low: int) -> None:
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int) or v < low:
            raise ArgumentError(f"{name}: expected whole numbers of at least {low}, got {v!r}")
    if not values:
        raise ArgumentError(f"{name}: expected at least one number")
    if len(set(values)) != len(values):
        raise ArgumentError(f"{name}: {next(v for v in values if values.count(v) > 1)} is given twice")


def _reals(name: str, values: Sequence[Any], low: float, high: float | None) -> None:
    for v in values:
        ok = (
            isinstance(v, (int, float))
            and not isinstance(v, bool)
            and math.isfinite(v)
            and v > low
            and (high is None or v <= high)
        )
        if not ok:
            span = f"above {low:g}" + (f" and at most {high:g}" if high is not None else "")
            raise ArgumentError(f"{name}: expected numbers {span}, got {v!r}")
    if not values:
        raise ArgumentError(f"{name}: expected at least one number")
