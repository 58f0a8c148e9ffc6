"""Sums over elements in float64, whose order depends on the tensors' shapes alone: totals, Gram matrices, norms, signs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from stockpot.grid import REDUCE
from stockpot.statistics.base import EXTENTS, Extent, Known, Over, Params, Statistic

__all__ = ["Gram", "L1Norms", "SignSum", "Total", "gram_terms", "piece_sum", "square"]


@dataclass(frozen=True)
class Total(Statistic):
    """Sums of terms over all elements, as a float64 array `[k]`; over rows `[k, rows, 1]`.

    of   block `[m, n]` (with the method's parameters, earlier statistics and draws as keywords, which it may ignore) ->
         terms `[k, n]`
    """

    name: str
    of: Callable[..., Any]
    over: Over = "tensor"
    when: Callable[[Params], bool] | None = None
    compiled: str | None = None
    ordered: ClassVar[bool] = True
    extents: ClassVar[tuple[Extent, ...]] = EXTENTS

    def start(self, params: Params, models: int, count: int, known: Mapping[str, Any]) -> Any:
        return ()

    def fold(self, seek: Any, block: Any, keywords: Mapping[str, Any], so_far: Any = None) -> Any:
        return piece_sum(self.terms(block, keywords), so_far)

    def terms(self, block: Any, keywords: Mapping[str, Any]) -> Any:
        return self.of(block, **keywords)

    def merge(self, seek: Any, a: Any, b: Any) -> Any:
        return a + b

    def finish(self, seek: Any, total: Any) -> Any:
        import numpy as np

        return Known(np.zeros(0) if total is None else 0.0 + total)

    def scratch(self, models: int) -> int:
        return 4 * models + 2

    def of_rows(self, block: Any, params: Params, keywords: Mapping[str, Any]) -> Any:
        import numpy as np

        terms = np.array(self.terms(block, keywords), np.float64)
        return _halved(terms)[..., None]


@dataclass(frozen=True)
class L1Norms(Total):
    """`[2m]`: the L1 norm of each delta, then that of what the method keeps of it.

    of   block `[m, n]` -> `[2m, n]`: magnitudes of all, then of what is kept
    """


@dataclass(frozen=True)
class SignSum(Total):
    """`[1]`: how many elements are positive less how many are negative, in the sum that the method elects signs by.

    of   block `[m, n]` -> `[1, n]` of 1, -1 and 0
    """


@dataclass(frozen=True)
class Gram(Statistic):
    """The inner products of the models (of their deltas, where the method works on those): float64 `[m, m]`, symmetric.

    Over rows `[m, m, rows, 1]`.
    """

    name: str = "gram"
    over: Over = "tensor"
    when: Callable[[Params], bool] | None = None
    ordered: ClassVar[bool] = True
    extents: ClassVar[tuple[Extent, ...]] = EXTENTS

    def start(self, params: Params, models: int, count: int, known: Mapping[str, Any]) -> Any:
        return models

    def fold(self, seek: Any, block: Any, keywords: Mapping[str, Any], so_far: Any = None) -> Any:
        return piece_sum(gram_terms(block), so_far)

    def terms(self, block: Any, keywords: Mapping[str, Any]) -> Any:
        return gram_terms(block)

    def merge(self, seek: Any, a: Any, b: Any) -> Any:
        return a + b

    def finish(self, seek: Any, total: Any) -> Any:
        import numpy as np

        return Known(square(np.zeros(seek * (seek + 1) // 2) if total is None else 0.0 + total, seek))

    def scratch(self, models: int) -> int:
        return models * (models + 1) // 2 + models

    def of_rows(self, block: Any, params: Params, keywords: Mapping[str, Any]) -> Any:
        return square(_halved(gram_terms(block))[..., None], len(block))


def square(upper: Any, models: int) -> Any:
    """`[m(m+1)/2, ...]` products i <= j, by rows -> `[m, m, ...]`."""
    import numpy as np

    out = np.empty((models, models, *upper.shape[1:]))
    k = 0
    for i in range(models):
        for j in range(i, models):
            out[i, j] = out[j, i] = upper[k]
            k += 1
    return out


def gram_terms(block: Any) -> Any:
    """`[m, ...] -> [m(m+1)/2, ...]` float64: x_i x_j for i <= j, by rows of the upper triangle."""
    import numpy as np

    m = len(block)
    wide = block.astype(np.float64)
    terms = np.empty((m * (m + 1) // 2, *block.shape[1:]))
    k = 0
    for i in range(m):
        np.multiply(wide[i], wide[i:], out=terms[k : k + m - i])
        k += m - i
    return terms


def piece_sum(terms: Any, total: Any = None) -> Any:
    """`[k, n] -> [k]` float64: chunks of REDUCE elements by halving, added in order to `total` (or to zeros).

    float64 terms are overwritten. A piece may come in several calls, each but the last of a multiple of REDUCE elements.

    Halving adds element i and element i + h, so it needs nothing but elementwise addition: the same on every machine.
    """
    import numpy as np

    wide = terms.astype(np.float64, copy=False)
    k, n = wide.shape
    total = np.zeros(k, np.float64) if total is None else total
    whole = n // REDUCE
    sums = []
    if whole:
        sums.append(_halved(wide[:, : whole * REDUCE].reshape(k, whole, REDUCE)))
    if n % REDUCE:
        sums.append(_halved(wide[:, whole * REDUCE :].reshape(k, 1, -1)))
    for part in sums:
        for j in range(part.shape[1]):
            total = total + part[:, j]
    return total


def _halved(x: Any) -> Any:
    """`[..., n] -> [...]`; x is overwritten."""
    n = x.shape[-1]
    if n == 0:
        return x.sum(-1)
    while n > 1:
        h = (n + 1) // 2
        x[..., : n - h] += x[..., h:n]
        n = h
    return x[..., 0].copy()
