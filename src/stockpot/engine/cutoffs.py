"""The exact k-th largest magnitude of data that is seen block by block, in one pass as a rule.

A sample suggests a narrow window of magnitudes that should hold the k-th. One pass counts what lies below the window and
puts aside what lies inside, a percent or so. If the k-th is among what was put aside it is picked out exactly; else the next
window is derived and another pass made. Should too much lie inside to put aside, it is counted by float32 bit patterns, which
order as the numbers do, and the window narrowed to one bin. Counts and sets do not depend on the order of the blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.engine.native import load_kernels
from stockpot.methods.arrays import is_numpy, magnitude

__all__ = ["Selection", "kept_count", "kth_magnitudes"]

_TOP = 2**31
_BINS = 2**20
#: values put aside before they are counted into bins instead
_HOLD = 2**18


@dataclass
class Selection:
    """Finds the smallest kept magnitude of one model: the element of rank `count - keep` in ascending order.

    The window is of bit patterns, [low, high).
    """

    count: int
    keep: int
    low: int = 0
    high: int = _TOP
    shift: int = 0
    cutoff: float | None = None
    below: int = 0
    bins: np.ndarray[Any, Any] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    _held: list[Any] = field(default_factory=list)
    _holding: int = 0

    def __post_init__(self) -> None:
        if self.keep <= 0:
            self.cutoff = float("nan")
        elif self.keep >= self.count:
            self.cutoff = 0.0

    @property
    def rank(self) -> int:
        return self.count - self.keep

    def _open(self, low: int, high: int) -> None:
        self.low, self.high, self.shift = low, high, 0
        self.below, self.bins = 0, None
        self._held, self._holding = [], 0

    def suggest(self, sample: Any) -> None:
        """Narrow the first window by a sample of deltas (any shape)."""
        if self.cutoff is not None or len(sample) < 256:
            return
        size = np.ascontiguousarray(magnitude(sample)).view(np.uint32)
        n = len(size)
        share = self.rank / self.count
        spread = (share * (1 - share)) ** 0.5
        margin = (4 * n**0.5 + 0.004 * n) * spread + 1
        first, last = int(share * n - margin), int(share * n + margin)
        first, last = max(first, 0), min(last, n)
        self._open(_ranked(size, first) if first > 0 else 0, _ranked(size, last) + 1 if last < n else _TOP)

    def fold(self, delta: Any) -> None:
        """Take in one block `[n]` of deltas. Thread-safe."""
        if self.cutoff is not None:
            return
        self.put(*(_split_numpy if is_numpy(delta) else _split_torch)(delta, self.low, self.high))

    def put(self, below: int, chosen: Any) -> None:
        """Take in how many patterns of a block lie below the window, and those inside it. Thread-safe."""
        if self.cutoff is not None:
            return
        with self.lock:
            self.below += below
            self._held.append(chosen)
            self._holding += len(chosen)
            if self._holding > _HOLD:
                self._count()

    def _count(self) -> None:
        """Count what was put aside into bins."""
        if self.bins is None:
            while (self.high - self.low) >> self.shift > _BINS:
                self.shift += 1
            kind = np.int32 if self.count < 2**31 else np.int64
            self.bins = np.zeros(((self.high - self.low - 1) >> self.shift) + 1, kind)
        if not self._held:
            return
        values = np.concatenate(self._held) - np.uint32(self.low)
        places = values >> np.uint32(self.shift)
        self.bins += np.bincount(places, minlength=len(self.bins)).astype(self.bins.dtype, copy=False)
        self._held, self._holding = [], 0

    def finish_pass(self) -> bool:
        """After a whole pass: True when the cutoff is known, else the next window stands ready."""
        if self.cutoff is not None:
            return True
        if self.bins is not None:
            self._count()
        inside = self._holding if self.bins is None else int(self.bins.sum())
        wanted = self.rank - self.below
        if wanted < 0:
            self._open(0, self.low)
        elif wanted >= inside:
            self._open(self.high, _TOP)
        elif self.bins is None:
            return self._found(_ranked(np.concatenate(self._held), wanted))
        else:
            bin_ = int(np.searchsorted(np.cumsum(self.bins), wanted, side="right"))
            start = self.low + (bin_ << self.shift)
            if self.shift == 0:
                return self._found(start)
            self._open(start, start + (1 << self.shift))
        return False

    def _found(self, pattern: int) -> bool:
        self.cutoff = float(np.uint32(pattern).view(np.float32))
        self.bins, self._held = None, []
        return True


def _ranked(bits: Any, rank: int) -> int:
    """The pattern of this rank, from 0."""
    kernels = load_kernels()
    return int(np.partition(bits, rank)[rank]) if kernels is None else kernels.select(bits, rank)


def kept_count(density: float, count: int) -> int:
    """int(density x count) in float64, but one at least where anything is to be kept."""
    return max(int(density * count), 1) if density > 0 and count else 0


def kth_magnitudes(delta: Any, density: Sequence[float]) -> tuple[float, ...]:
    """The cutoffs of a small block `[m, n]` that is all there is, by partition."""
    out = []
    for row, d in zip(delta, density, strict=True):
        n = len(row)
        keep = kept_count(d, n)
        if 0 < keep < n:
            out.append(float(np.partition(magnitude(row), n - keep)[n - keep]))
        else:
            out.append(float("nan") if keep <= 0 else 0.0)
    return tuple(out)


def _split_numpy(delta: Any, low: int, high: int) -> tuple[int, Any]:
    """(how many patterns are below the window, those inside it)."""
    bits = np.ascontiguousarray(magnitude(delta)).view(np.uint32)
    inside = bits < np.uint32(high)
    if not low:
        return 0, bits[np.flatnonzero(inside)]
    under = bits < np.uint32(low)
    inside ^= under
    return int(np.count_nonzero(under)), bits[np.flatnonzero(inside)]  # faster than by booleans


def _split_torch(delta: Any, low: int, high: int) -> tuple[int, Any]:
    import torch

    bits = magnitude(delta).contiguous().view(torch.int32)
    under = bits < low
    inside = bits[(~under) & (bits <= high - 1)]
    return int(under.sum()), inside.cpu().numpy().view(np.uint32)
