"""The exact k-th largest magnitude of data that is seen block by block, in one pass as a rule.

Magnitudes are float32 bit patterns, which order as the numbers do. A sample suggests a narrow window of patterns that
should hold the k-th; one pass counts what lies below it and histograms what lies inside. If the window was narrow enough
for a bin a pattern and the k-th is inside, that is the exact answer; else the next window is derived and another pass made
(three at the very most). Counts are integers, so the order of blocks does not matter.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.methods.arrays import is_numpy, magnitude

__all__ = ["Selection", "kept_count", "kth_magnitudes"]

_TOP = 2**31
_BINS = 2**19
_FLUSH = 2**18


@dataclass
class Selection:
    """Finds the smallest kept magnitude of one model: the element of rank `count - keep` in ascending order."""

    count: int
    keep: int
    low: int = 0
    shift: int = 13
    cutoff: float | None = None
    width: int = 0
    below: int = 0
    bins: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, np.int64))
    _held: list[Any] = field(default_factory=list)
    _holding: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.keep <= 0:
            self.cutoff = float("nan")
        elif self.keep >= self.count:
            self.cutoff = 0.0
        self._open(0, _TOP)

    @property
    def rank(self) -> int:
        return self.count - self.keep

    def _open(self, low: int, high: int) -> None:
        self.low, self.shift = low, 0
        while (high - low) >> self.shift > _BINS:
            self.shift += 1
        self.width = ((high - low - 1) >> self.shift) + 1 if high > low else 1
        self.below, self.bins = 0, np.zeros(0, np.int64)
        self._held, self._holding = [], 0

    def suggest(self, sample: Any) -> None:
        """Narrow the first window by a sample of deltas (any shape)."""
        if self.cutoff is not None or len(sample) < 256:
            return
        ordered = np.sort(_bits_numpy(sample))
        n = len(ordered)
        share = self.rank / self.count
        spread = (share * (1 - share)) ** 0.5
        margin = (4 * n**0.5 + 0.004 * n) * spread + 1
        first, last = int(share * n - margin), int(share * n + margin)
        low = int(ordered[first]) if first > 0 else 0
        high = int(ordered[last]) + 1 if last < n else _TOP
        self._open(low, high)

    def fold(self, delta: Any) -> None:
        """Count one block `[n]` of deltas. Thread-safe."""
        if self.cutoff is not None:
            return
        span = self.width << self.shift
        below, chosen = (_count_numpy if is_numpy(delta) else _count_torch)(delta, self.low, span)
        with self.lock:
            self.below += below
            self._held.append(chosen)
            self._holding += len(chosen)
            if self._holding >= _FLUSH:
                self._flush()

    def _flush(self) -> None:
        """Histogram what was put aside: a histogram for every block would cost more than the block."""
        if self._held:
            counts = np.bincount(np.concatenate(self._held) >> self.shift, minlength=self.width)
            self.bins = counts if not len(self.bins) else self.bins + counts
            self._held, self._holding = [], 0

    def finish_pass(self) -> bool:
        """After a whole pass: True when the cutoff is known, else the next window stands ready."""
        if self.cutoff is not None:
            return True
        self._flush()
        inside = int(self.bins.sum())
        if self.rank < self.below:
            self._open(0, self.low)
        elif self.rank >= self.below + inside:
            self._open(self.low + (self.width << self.shift), _TOP)
        else:
            bin_ = int(np.searchsorted(np.cumsum(self.bins), self.rank - self.below, side="right"))
            start = self.low + (bin_ << self.shift)
            if self.shift == 0:
                self.cutoff = float(np.uint32(start).view(np.float32))
                self.bins = np.zeros(0, np.int64)
                return True
            self._open(start, start + (1 << self.shift))
        return False


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


def _bits_numpy(delta: Any) -> Any:
    return np.ascontiguousarray(magnitude(delta)).view(np.uint32)


def _count_numpy(delta: Any, low: int, span: int) -> tuple[int, Any]:
    bits = _bits_numpy(delta)
    below = int(np.count_nonzero(bits < np.uint32(low))) if low else 0
    bits = bits - np.uint32(low)  # what is below wraps around to the top
    return below, bits[bits < np.uint32(span)] if span < _TOP or low else bits


def _count_torch(delta: Any, low: int, span: int) -> tuple[int, Any]:
    import torch

    bits = magnitude(delta).contiguous().view(torch.int32).long() - low
    inside = bits[(bits >= 0) & (bits < span)]
    return int((bits < 0).sum()), inside.cpu().numpy()
