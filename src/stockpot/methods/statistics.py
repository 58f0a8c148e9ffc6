"""The statistics a method can declare. They are declarations only: the engine gathers them block by block.

A statistic becomes a keyword argument of the method's function. Statistics are gathered in the order declared, and a
later one may use an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Cutoff", "Mask", "Over", "Statistic", "Total"]

Over = Literal["row", "tensor", "model"]
Params = Mapping[str, Any]


@dataclass(frozen=True)
class Total:
    """A sum over elements, in float64 over fixed chunks merged in a fixed order.

    name   the keyword under which the function gets it, as a float64 numpy array `[k]`
    of     the function of a block `[m, n]` (with the method's parameters, earlier statistics and mask as keywords
           it may ignore) that returns the terms `[k, n]`
    over   "tensor" or "model"
    when   whether these parameters need it; the function gets None where they do not
    kernel the compiled kernel that adds up the same terms, if there is one
    """

    name: str
    of: Callable[..., Any]
    over: Over = "tensor"
    when: Callable[[Params], bool] | None = None
    kernel: Literal["gram", "norms", "signs"] | None = None

    def scope_for(self, params: Params) -> Over:
        return self.over

    def needed(self, params: Params) -> bool:
        return self.when is None or self.when(params)


@dataclass(frozen=True)
class Cutoff:
    """The smallest magnitude that is kept, for each model: the k-th largest |delta|, k = int(density x count), at least 1
    unless the density is 0 (else a small tensor would lose its whole delta).

    Exact. Magnitudes are compared in float32 (`arrays.magnitude`), the density is float64. Every element equal to the
    cutoff is kept.
    The function gets a tuple `[m]` of floats: nan keeps nothing (no comparison with it is true), 0 keeps everything.

    param   the per-model parameter that holds the kept fraction
    over    "row" (the last axis; needs Scope.ROW or TENSOR), "tensor" or "model", or a function of the parameters
    """

    param: str
    over: Over | Callable[[Params], Over] = "tensor"
    name: str = "cutoff"

    def scope_for(self, params: Params) -> Over:
        return self.over(params) if callable(self.over) else self.over

    def needed(self, params: Params) -> bool:
        """False where every model keeps everything: the cutoff is then 0 and nothing needs to be read for it."""
        values = params[self.param]
        return any(v < 1 for v in values)


Statistic = Total | Cutoff


@dataclass(frozen=True)
class Mask:
    """A random mask `[m, *block]` of booleans, True with the probability that a per-model parameter gives.

    Element e of a tensor depends on (seed, model's position, tensor name, e) alone.
    """

    param: str
