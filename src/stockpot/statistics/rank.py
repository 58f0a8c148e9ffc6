"""Statistics by order: cutoffs that keep a fraction of the elements, and quantiles. Exact, in one pass as a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from stockpot.errors import ArgumentError
from stockpot.statistics.base import EXTENTS, Extent, Known, Over, Params, Statistic
from stockpot.statistics.order import (
    TOP,
    Tally,
    Window,
    add_tallies,
    kth_smallest,
    narrowed,
    next_window,
    patterns,
    tally,
)

__all__ = ["Counts", "Fractions", "Quantile", "Rank", "Rounding", "kept_count", "magnitude32"]

#: how a fraction of n elements becomes a number of them: int(fraction n), but one at least where the fraction is not zero;
#: int(fraction n); the nearest whole number, halves to even; the next whole number
Rounding = Literal["at_least_one", "down", "nearest", "up"]
#: the name of a parameter, or a function of the parameters
Fractions = str | Callable[[Params], float | Sequence[float]]
#: (parameters, how many elements there are, earlier statistics by name) -> how many are kept, for each fraction
Counts = Callable[[Params, int, Mapping[str, Any]], Sequence[int]]


def kept_count(fraction: float, count: int, rounding: Rounding = "at_least_one") -> int:
    """How many of `count` elements a fraction keeps, worked out in float64; never more than there are."""
    if not fraction > 0 or not count:
        return 0
    exact = fraction * count
    if rounding == "up":
        kept = math.ceil(exact)
    elif rounding == "nearest":
        kept = round(exact)
    else:
        kept = int(exact)
    return min(max(kept, 1) if rounding == "at_least_one" else kept, count)


def magnitude32(x: Any) -> Any:
    """|x| in float32: what cutoffs are compared with."""
    import numpy as np

    a = abs(x)
    return a if a.dtype == np.float32 else a.astype(np.float32)


def _number(pattern: int, *, signed: bool) -> float:
    import numpy as np

    if signed:
        pattern = pattern - 2**31 if pattern >= 2**31 else 2**32 - 1 - pattern
    return float(np.uint32(pattern).view(np.float32))


@dataclass(frozen=True)
class Rank(Statistic):
    """The smallest value that is kept, for each model, where a fraction of them is: the k-th largest |delta|.

    kept     the kept fraction, 0 to 1: a parameter, for each model or one, or a function of the parameters that gives one or
             several. There are as many cutoffs as fractions
    of       block `[m, n]` (with parameters, earlier statistics and draws as keywords) -> what is ranked, `[k, n]`, k the
             number of fractions; None: the magnitudes of the block. Compared in float32
    rounding how the fraction becomes k: "at_least_one" (the default: int(fraction x count), but one at least unless the
             fraction is 0, else a small tensor would lose its whole delta), "down", "nearest", "up"; worked out in float64
    signed   whether what `of` gives may be negative; magnitudes are not
    counts   how many are kept, where that is no fraction of the elements by one of these roundings: all of them gives the
             smallest, more than all 0 (minus infinity where signed). `kept` then only says how many fractions there are, and by
             fractions of 1 that nothing need be read

    The function gets a tuple `[k]` of floats: nan keeps nothing (no comparison with it is true), 0 keeps everything (-inf where
    signed). Every element equal to the cutoff is kept. Over rows it gets `[k, rows, 1]`.
    """

    kept: Fractions
    of: Callable[..., Any] | None = None
    name: str = "cutoff"
    over: Over = "tensor"
    when: Callable[[Params], bool] | None = None
    rounding: Rounding = "at_least_one"
    signed: bool = False
    counts: Counts | None = None
    compiled: str | None = None
    extents: ClassVar[tuple[Extent, ...]] = EXTENTS

    def fractions(self, params: Params) -> tuple[float, ...]:
        """The kept fractions with these parameters."""
        found = self.kept(params) if callable(self.kept) else params[self.kept]
        return tuple(found) if isinstance(found, Sequence) else (found,)

    def refers_to(self) -> tuple[str, ...]:
        return () if callable(self.kept) else (self.kept,)

    def needed(self, params: Params) -> bool:
        """False where everything is kept: the cutoff is then 0 and nothing needs to be read for it."""
        # over rows nothing is read for it, and the function wants it in the shape of rows
        part = self.extent(params) == "row" or any(f < 1 for f in self.fractions(params))
        return super().needed(params) and part

    def matters(self, params: Params) -> Any:
        return self.fractions(params) if self.counts is None else tuple(sorted(params.items()))

    def absent(self, models: int, params: Params) -> Any:
        return (self._all,) * len(self.fractions(params))

    @property
    def samples(self) -> bool:
        return True

    @property
    def _all(self) -> float:
        return -math.inf if self.signed else 0.0

    def scratch(self, models: int) -> int:
        return 2 * models

    def ranked(self, block: Any, keywords: Mapping[str, Any]) -> Any:
        """What is ranked, float32 `[k, ...]`."""
        import numpy as np

        if self.of is None:
            return magnitude32(block)
        values = np.asarray(self.of(block, **keywords)).astype(np.float32, copy=False)
        if self.signed:
            return values
        if (values < 0).any():
            raise ArgumentError(f"statistic {self.name!r}: what it ranks is negative in places: declare it signed=True")
        return abs(values)  # -0 as 0

    def _rows(self, block: Any, keywords: Mapping[str, Any]) -> Any:
        """The same `[k, n]`."""
        values = self.ranked(block, keywords)
        return values.reshape(len(values), -1)

    def seen(self, block: Any, keywords: Mapping[str, Any]) -> Any:
        return self._rows(block, keywords)

    def start(self, params: Params, models: int, count: int, known: Mapping[str, Any]) -> Any:
        return self._settled(tuple(self._search(k, count) for k in self._kept(params, count, known)))

    def _kept(self, params: Params, count: int, known: Mapping[str, Any]) -> Sequence[int]:
        """How many of `count` elements are kept, for each fraction."""
        if self.counts is not None:
            return self.counts(params, count, known)
        return [count if f >= 1 else kept_count(f, count, self.rounding) for f in self.fractions(params)]

    def _search(self, keep: int, count: int) -> float | Window:
        if keep <= 0:
            return math.nan
        if keep > count or (keep == count and self.counts is None):
            return self._all
        top = 2**32 if self.signed else TOP
        return Window(count, count - keep, 0, top, top)

    def _settled(self, found: tuple[float | Window, ...]) -> Any:
        return Known(found) if all(isinstance(f, float) for f in found) else found

    def suggest(self, seek: Any, sample: Any) -> Any:
        values = sample if self.signed else magnitude32(sample)
        rows = patterns(values.reshape(len(values), -1), signed=self.signed)
        return tuple(narrowed(w, row) if isinstance(w, Window) else w for w, row in zip(seek, rows, strict=True))

    def fold(self, seek: Any, block: Any, keywords: Mapping[str, Any], so_far: Any = None) -> Any:
        rows = self._rows(block, keywords)
        if len(rows) != len(seek):
            raise TypeError(f"statistic {self.name!r}: {len(rows)} rows are ranked by {len(seek)} fractions")
        return [
            tally(w, row, signed=self.signed) if isinstance(w, Window) else None
            for w, row in zip(seek, rows, strict=True)
        ]

    def merge(self, seek: Any, a: Any, b: Any) -> Any:
        return [add_tallies(w, x, y) if isinstance(w, Window) else None for w, x, y in zip(seek, a, b, strict=True)]

    def finish(self, seek: Any, total: Any) -> Any:
        tallies: Sequence[Tally | None] = total if total is not None else [Tally()] * len(seek)
        out: list[float | Window] = []
        for w, t in zip(seek, tallies, strict=True):
            found = next_window(w, t) if isinstance(w, Window) and t is not None else w
            out.append(_number(found, signed=self.signed) if isinstance(found, int) else found)
        return self._settled(tuple(out))

    def at_once(self, block: Any, params: Params, keywords: Mapping[str, Any]) -> Any:
        return tuple(float(c[0]) for c in self._of_last_axis(self.ranked(block, keywords), params, keywords))

    def of_rows(self, block: Any, params: Params, keywords: Mapping[str, Any]) -> Any:
        import numpy as np

        return np.stack(self._of_last_axis(self.ranked(block, keywords), params, keywords))

    def _of_last_axis(self, values: Any, params: Params, known: Mapping[str, Any]) -> list[Any]:
        """`[k, ..., n]` -> k arrays `[..., 1]`."""
        import numpy as np

        n = values.shape[-1]
        out = []
        for row, keep in zip(values, self._kept(params, n, known), strict=True):
            search = self._search(keep, n)
            if isinstance(search, Window):
                out.append(kth_smallest(row, search.rank))
            else:
                out.append(np.full((*row.shape[:-1], 1), search, np.float32))
        return out


@dataclass(frozen=True)
class Quantile(Rank):
    """The value below which a fraction of the elements lies, interpolated linearly between the two nearest: tuple `[k]`.

    As numpy.quantile computes it by default, of float32 numbers. kept is that fraction, from 0 (the smallest) to 1 (the largest).
    """

    name: str = "quantile"

    def needed(self, params: Params) -> bool:
        return self.when is None or self.when(params)

    def absent(self, models: int, params: Params) -> Any:
        return None

    def start(self, params: Params, models: int, count: int, known: Mapping[str, Any]) -> Any:
        if not all(0 <= f <= 1 for f in self.fractions(params)):
            raise ArgumentError(f"statistic {self.name!r}: fractions from 0 to 1, got {list(self.fractions(params))}")
        if not count:
            return Known((math.nan,) * len(self.fractions(params)))
        top = 2**32 if self.signed else TOP
        places = [f * (count - 1) for f in self.fractions(params)]
        wanted = tuple(
            Window(count, rank, 0, top, top)
            for p in places
            for rank in (math.floor(p), min(math.floor(p) + 1, count - 1))
        )
        return _Between(wanted, tuple(p - math.floor(p) for p in places))

    def suggest(self, seek: Any, sample: Any) -> Any:
        import numpy as np

        return _Between(super().suggest(seek.ends, np.repeat(sample, 2, axis=0)), seek.shares)

    def fold(self, seek: Any, block: Any, keywords: Mapping[str, Any], so_far: Any = None) -> Any:
        rows = self._rows(block, keywords)
        if 2 * len(rows) != len(seek.ends):
            raise TypeError(f"statistic {self.name!r}: {len(rows)} rows are ranked by {len(seek.ends) // 2} fractions")
        return [
            tally(w, rows[i // 2], signed=self.signed) if isinstance(w, Window) else None
            for i, w in enumerate(seek.ends)
        ]

    def merge(self, seek: Any, a: Any, b: Any) -> Any:
        return super().merge(seek.ends, a, b)

    def finish(self, seek: Any, total: Any) -> Any:
        found = super().finish(seek.ends, total)
        if not isinstance(found, Known):
            return _Between(found, seek.shares)
        ends = found.value
        return Known(tuple(_mixed(ends[2 * i], ends[2 * i + 1], s) for i, s in enumerate(seek.shares)))

    def at_once(self, block: Any, params: Params, keywords: Mapping[str, Any]) -> Any:
        return tuple(float(q[0]) for q in self._of_last_axis(self.ranked(block, keywords), params, keywords))

    def _of_last_axis(self, values: Any, params: Params, known: Mapping[str, Any]) -> list[Any]:
        n = values.shape[-1]
        out = []
        for row, fraction in zip(values, self.fractions(params), strict=True):
            place = fraction * (n - 1)
            low = math.floor(place)
            first, second = (kth_smallest(row, rank).astype(float) for rank in (low, min(low + 1, n - 1)))
            out.append(_mixed(first, second, place - low))
        return out


@dataclass(frozen=True)
class _Between:
    """What a Quantile looks for: the elements on both sides, and how far it lies from the first to the second."""

    ends: tuple[Any, ...]
    shares: tuple[float, ...]


def _mixed(low: Any, high: Any, share: float) -> Any:
    return low if share == 0 else low + (high - low) * share
