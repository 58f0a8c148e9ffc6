"""What passes through the engine is looked at on the way: how large it is, and whether it is made of numbers.

A NaN or an infinity in an input or the output stops a merge before it is published, unless they are allowed; a tensor
whose norm is far from those of its inputs is worth a warning. Both are in the lineage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.checkpoints.codecs import decode_into
from stockpot.engine.native import Kernels
from stockpot.planning.plan import Plan
from stockpot.specs import DType

__all__ = ["Measure", "Sizes", "far_out", "measure", "nonfinite_report"]

#: output norm over the mean of the inputs' norms beyond which a warning is given
LOW, HIGH = 0.5, 2.0
_SHOWN = 20
_TILE = 2**16


@dataclass(frozen=True, slots=True)
class Measure:
    """Of a run of elements: the sum of the squares of its finite numbers, and counts of NaN and infinities."""

    squares: float = 0.0
    nans: int = 0
    infinities: int = 0

    def __add__(self, other: Measure) -> Measure:
        return Measure(self.squares + other.squares, self.nans + other.nans, self.infinities + other.infinities)


def measure(kernels: Kernels | None, raw: Any, dtype: DType, edges: Sequence[int]) -> list[Measure]:
    """One Measure for each range between neighbouring edges (elements); empty ones for what is no float."""
    if not dtype.is_float:
        return [Measure()] * (len(edges) - 1)
    if kernels is not None and kernels.takes([dtype]):
        return [Measure(*found) for found in kernels.measure(raw, dtype, edges)]
    return [
        sum((_tile(raw, dtype, at, min(at + _TILE, stop)) for at in range(start, stop, _TILE)), Measure())
        for start, stop in itertools.pairwise(edges)
    ]


def _tile(raw: Any, dtype: DType, start: int, stop: int) -> Measure:
    values = np.empty(stop - start, np.float64)
    decode_into(raw[start * dtype.itemsize : stop * dtype.itemsize], dtype, values)
    nans, infinities = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    if nans or infinities:
        values = values[np.isfinite(values)]
    with np.errstate(over="ignore", under="ignore"):
        return Measure(float(np.square(values).sum()), nans, infinities)


@dataclass
class Sizes:
    """Measures of whole tensors, put together from those of their parts: of the output, and of each input by its place.

    models  how many of a tensor's inputs, the first ones, are models and not companions
    """

    of: dict[str, list[Measure]] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, measures: Sequence[Measure], models: int) -> None:
        """measures: the output's, then those of the inputs, of which the first are `models`."""
        self.models[name] = models
        known = self.of.get(name)
        self.of[name] = list(measures) if known is None else [a + b for a, b in zip(known, measures, strict=True)]

    def norm(self, name: str) -> float | None:
        """The output's L2 norm; None where its square is beyond float64."""
        squares = self.of[name][0].squares if name in self.of else math.inf
        return math.sqrt(squares) if math.isfinite(squares) else None

    def ratio(self, name: str) -> float | None:
        """The output's norm over the mean of the inputs'; None where these are zero or beyond float64."""
        if name not in self.of or len(self.of[name]) < 2:
            return None
        out, *inputs = (math.sqrt(m.squares) for m in self.of[name][: 1 + self.models[name]])
        mean = sum(inputs) / len(inputs)
        return out / mean if mean > 0 and math.isfinite(mean) and math.isfinite(out) else None


def far_out(sizes: Sizes) -> list[str]:
    """Warnings about norms."""
    found = {n: r for n in sizes.of if (r := sizes.ratio(n)) is not None and not LOW <= r <= HIGH}
    if not found:
        return []
    worst = sorted(found, key=lambda n: -abs(math.log(max(found[n], 1e-300))))
    listed = ", ".join(f"{n} ({found[n]:.3g})" for n in worst[:3])
    return [
        f"{len(found)} tensor{'s' if len(found) > 1 else ''} with a norm under {LOW:g} or over {HIGH:g} times the mean of the "
        f"inputs': {listed}{', ...' if len(found) > 3 else ''}"
    ]


def nonfinite_report(sizes: Sizes, plan: Plan) -> list[str]:
    """One line for each tensor and model that holds NaN or infinities."""
    odd = {name for name, measures in sizes.of.items() if any(m.nans or m.infinities for m in measures)}
    lines = []
    for t in plan.tensors if odd else ():
        if t.name in odd:
            places = ["the output", *(plan.inputs[o.model].ref for o in t.inputs)]
            found = zip(places, sizes.of[t.name], strict=True)
            lines += [f"{t.name!r} in {where}: {_counts(m)}" for where, m in found if m.nans or m.infinities]
    return [*lines[:_SHOWN], *([f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])]


def _counts(m: Measure) -> str:
    words: Iterable[tuple[int, str]] = ((m.nans, "NaN"), (m.infinities, "infinite"))
    return ", ".join(f"{n} {word}" for n, word in words if n)
