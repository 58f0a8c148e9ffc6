"""The statistics of one tensor, or of the whole model, while they are being gathered: which one, which pass, what so far."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from stockpot.engine.cutoffs import Selection, kept_count
from stockpot.engine.reduce import piece_sum
from stockpot.methods.statistics import Cutoff, Statistic, Total

__all__ = ["Gathering"]


class Gathering:
    """Statistics one after the other, each in as many passes over the data as it needs.

    Every pass: `fold` each block (from any thread, in any order), then `finish_pass` once. `results` holds what is known.
    """

    def __init__(self, stats: Sequence[Statistic], params: Mapping[str, Any], models: int, count: int) -> None:
        self.results: dict[str, Any] = {}
        self._queue = list(stats)
        self._params = params
        self._models = models
        self._count = count
        self._lock = threading.Lock()
        self._selections: list[Selection] = []
        self._partial: dict[tuple[int, int], Any] = {}
        self.fresh = False
        self._open()

    @property
    def current(self) -> Statistic | None:
        """The statistic that the next pass is for; None when all are known."""
        return self._queue[0] if self._queue else None

    def _open(self) -> None:
        stat = self.current
        self._partial = {}
        if isinstance(stat, Cutoff):
            density = self._params[stat.param]
            self._selections = [Selection(self._count, kept_count(d, self._count)) for d in density]
            self.fresh = True
            if all(s.cutoff is not None for s in self._selections):
                self._close(tuple(s.cutoff for s in self._selections))

    def _close(self, result: Any) -> None:
        self.results[self._queue.pop(0).name] = result
        self.fresh = False
        self._open()

    def suggest(self, deltas: Any) -> None:
        """A sample `[m, n]` before the first pass of a cutoff."""
        for selection, sample in zip(self._selections, deltas, strict=True):
            selection.suggest(sample)
        self.fresh = False

    def fold(self, block: Any, keywords: Mapping[str, Any], key: tuple[int, int]) -> None:
        """Take in one block `[m, n]`. `key` is (tensor, piece): sums are added up in the order of the keys.

        For a Total a piece may come in several calls, in order, from one thread.
        """
        stat = self.current
        if isinstance(stat, Total):
            terms = stat.of(block, **keywords)
            total = piece_sum(terms, self._partial.get(key))
            self.put_total(key, total)
        else:
            for selection, row in zip(self._selections, block, strict=True):
                selection.fold(row)

    def partial(self, key: tuple[int, int]) -> Any:
        """What a Total's piece comes to so far; None before its first call."""
        return self._partial.get(key)

    def put_total(self, key: tuple[int, int], total: Any) -> None:
        """A Total's piece as summed up elsewhere, `partial` included."""
        with self._lock:
            self._partial[key] = total

    def windows(self) -> list[tuple[int, int] | None]:
        """For each model the bit patterns that a Cutoff's pass looks for; None where the cutoff is known."""
        return [None if s.cutoff is not None else (s.low, s.high) for s in self._selections]

    def put_split(self, found: Sequence[tuple[int, Any]]) -> None:
        """For each model how many patterns lie below its window, and those inside, of one block."""
        for selection, (below, inside) in zip(self._selections, found, strict=True):
            selection.put(below, inside)

    def finish_pass(self) -> None:
        """All blocks of this pass were folded."""
        stat = self.current
        if isinstance(stat, Total):
            total: Any = 0.0
            for key in sorted(self._partial):
                total = total + self._partial[key]
            self._close(total)
        elif stat is not None:
            done = [s.finish_pass() for s in self._selections]
            if all(done):
                self._close(tuple(s.cutoff for s in self._selections))
