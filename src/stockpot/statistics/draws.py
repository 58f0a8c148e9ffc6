"""Random numbers that a method can declare: element e of a tensor's draw depends on (seed, model's position, tensor name, e)
alone, so that blocks, threads and machines don't show. They are declarations; engine.draws makes the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Draw", "Mask", "Normal", "Uniform"]


@dataclass(frozen=True)
class Mask:
    """Booleans `[m, *block]`: True with a probability.

    keep  the per-model parameter that holds the probability, or a function of the block `[m, *block]` (with parameters and
          statistics as keywords) that gives one for each element, of the block's shape
    """

    keep: str | Callable[..., Any]
    name: str = "mask"


@dataclass(frozen=True)
class Uniform:
    """Numbers `[m, *block]` from 0 (included) to 1 (excluded), multiples of 2^-53 in float64 and of 2^-24 in float32."""

    name: str = "uniform"


@dataclass(frozen=True)
class Normal:
    """Standard normal numbers `[m, *block]`, worked out in float64 and rounded to the block's dtype."""

    name: str = "normal"


Draw = Mask | Uniform | Normal
