"""The element of a given rank: of numbers in memory, or of data that is seen block by block, in one pass as a rule.

Magnitudes (and other numbers, made to order alike) are compared as bit patterns of float32. A sample suggests a narrow
**window** of patterns that should hold the wanted one. One pass counts what lies below the window and puts aside what lies
inside, a percent or so. If the wanted pattern is among what was put aside it is picked out exactly; else the next window is
derived and another pass made. Should too much lie inside to put aside, it is counted by patterns, and the window narrowed to one
bin. Counts and sets do not depend on the order of the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stockpot.faster import FASTER

__all__ = [
    "TOP",
    "Tally",
    "Window",
    "add_tallies",
    "kth_smallest",
    "narrowed",
    "next_window",
    "patterns",
    "pick",
    "tally",
]

#: patterns of magnitudes lie below it
TOP = 2**31
_BINS = 2**20
#: values put aside before they are counted into bins instead
_HOLD = 2**18


def patterns(values: Any, *, signed: bool) -> Any:
    """float32 -> uint32 that order as the numbers do (NaN above infinity); magnitudes keep their own bits."""
    import numpy as np

    bits = np.ascontiguousarray(values).view(np.uint32)
    if not signed:
        return bits
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(2**31))


def pick(bits: Any, rank: int) -> int:
    """The value of this rank, from 0, among uint32."""
    import numpy as np

    faster = FASTER.get("pick")
    return int(faster(bits, rank) if faster else np.partition(bits, rank)[rank])


def kth_smallest(values: Any, rank: int) -> Any:
    """`[..., n] -> [..., 1]`: the value of this rank, from 0, along the last axis."""
    import numpy as np

    return np.partition(values, rank, axis=-1)[..., rank : rank + 1]


@dataclass(frozen=True)
class Window:
    """The search for the pattern of ascending `rank` among `count`: it lies in [low, high), or is looked for there."""

    count: int
    rank: int
    low: int = 0
    high: int = TOP
    top: int = TOP

    @property
    def shift(self) -> int:
        """By how many bits patterns inside are shortened to become bins."""
        span, shift = self.high - self.low, 0
        while span >> shift > _BINS:
            shift += 1
        return shift


@dataclass
class Tally:
    """Of one pass: how many patterns lie below the window, and those inside, put aside or counted into bins."""

    below: int = 0
    held: list[Any] = field(default_factory=list)
    holding: int = 0
    bins: Any = None


def narrowed(window: Window, sample: Any) -> Window:
    """The window by a sample of the patterns (uint32): where the wanted one is, but for bad luck."""
    n = len(sample)
    if n < 256:
        return window
    share = window.rank / window.count
    spread = (share * (1 - share)) ** 0.5
    margin = (4 * n**0.5 + 0.004 * n) * spread + 1
    first, last = max(int(share * n - margin), 0), min(int(share * n + margin), n)
    low = pick(sample, first) if first > 0 else 0
    high = pick(sample, last) + 1 if last < n else window.top
    return Window(window.count, window.rank, low, high, window.top)


def tally(window: Window, values: Any, *, signed: bool = False) -> Tally:
    """Of a block's numbers, float32 `[n]`: magnitudes, or numbers of both signs."""
    import numpy as np

    faster = FASTER.get("tally")
    if faster and window.high - window.low < 2**32:
        below, chosen = faster(window.low, window.high, np.ascontiguousarray(values), signed)
        return Tally(below, [chosen], len(chosen))
    bits = patterns(values, signed=signed)
    inside = bits < np.uint32(window.high) if window.high < 2**32 else np.ones(len(bits), np.bool_)
    below = 0
    if window.low:
        under = bits < np.uint32(window.low)
        inside ^= under
        below = int(np.count_nonzero(under))
    chosen = bits[np.flatnonzero(inside)]  # faster than by booleans
    return Tally(below, [chosen], len(chosen))


def add_tallies(window: Window, a: Tally, b: Tally) -> Tally:
    """Both together, in `a`."""
    a.below += b.below
    a.held += b.held
    a.holding += b.holding
    if b.bins is not None:
        a.bins = b.bins if a.bins is None else a.bins + b.bins
    if a.holding > _HOLD:
        _count(window, a)
    return a


def _count(window: Window, t: Tally) -> None:
    """Count what was put aside into bins."""
    import numpy as np

    if t.bins is None:
        kind = np.int32 if window.count < 2**31 else np.int64
        t.bins = np.zeros(((window.high - window.low - 1) >> window.shift) + 1, kind)
    if t.held:
        values = np.concatenate(t.held) - np.uint32(window.low)
        places = values >> np.uint32(window.shift)
        t.bins += np.bincount(places, minlength=len(t.bins)).astype(t.bins.dtype, copy=False)
        t.held, t.holding = [], 0


def next_window(window: Window, t: Tally) -> int | Window:
    """After a whole pass: the wanted pattern, or where to look for it next."""
    import numpy as np

    if t.bins is not None:
        _count(window, t)
    inside = t.holding if t.bins is None else int(t.bins.sum())
    wanted = window.rank - t.below
    if (wanted < 0 and window.low == 0) or (wanted >= inside and window.high == window.top):
        raise ValueError(f"rank {window.rank} of {window.count} values is not among those that were given")
    if wanted < 0:
        return Window(window.count, window.rank, 0, window.low, window.top)
    if wanted >= inside:
        return Window(window.count, window.rank, window.high, window.top, window.top)
    if t.bins is None:
        return pick(np.concatenate(t.held), wanted)
    place = int(np.searchsorted(np.cumsum(t.bins), wanted, side="right"))
    start = window.low + (place << window.shift)
    if window.shift == 0:
        return start
    return Window(window.count, window.rank, start, start + (1 << window.shift), window.top)
