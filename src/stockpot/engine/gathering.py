"""Statistics while they are being gathered: the one place where folded blocks become values, on disk and in memory alike."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from stockpot.planning.plan import MergeGroup, StatPlan, spans_by_tensor
from stockpot.statistics import Known

__all__ = ["Gathering", "WideValues"]


class Gathering:
    """Statistics of the same elements, one after the other, each in as many passes over the data as it needs.

    Every pass: `add` what each block contributes (from any thread, in any order), then `finish_pass` once. `results` holds the
    values that are known, by the statistics' places in the plan.

    count  elements in all; names  values that are known beforehand, by name
    """

    def __init__(self, stats: Sequence[StatPlan], count: int, names: Mapping[str, Any]) -> None:
        self.results: dict[int, Any] = {}
        self.seek: Any = None
        #: whether a sample of the deltas should come first
        self.fresh = False
        self._queue = list(stats)
        self._count = count
        self._names = dict(names)
        self._lock = threading.Lock()
        self._parts: dict[tuple[int, int], Any] = {}
        self._total: Any = None
        self._open()

    @property
    def current(self) -> StatPlan | None:
        """The statistic that the next pass is for; None when all are known."""
        return self._queue[0] if self._queue else None

    def _open(self) -> None:
        """Start on the first statistic of the queue that needs data."""
        while self._queue:
            plan = self._queue[0]
            seek = plan.stat.start(plan.params, plan.models, self._count, self._names)
            if not isinstance(seek, Known):
                self.seek, self.fresh = seek, plan.stat.samples
                return
            self._close(seek)

    def _close(self, found: Known) -> None:
        plan = self._queue.pop(0)
        self.results[plan.index] = self._names[plan.stat.name] = found.value
        self.seek, self.fresh = None, False

    def suggest(self, sample: Any) -> None:
        """A sample `[m, n]` of the block before the first pass."""
        self.seek = self._queue[0].stat.suggest(self.seek, sample)
        self.fresh = False

    def so_far(self, key: tuple[int, int]) -> Any:
        """What an ordered statistic's piece comes to so far; None before its first block. key: (tensor, piece)."""
        return self._parts.get(key)

    def add(self, key: tuple[int, int], part: Any) -> None:
        """Take in what a block contributes: of an ordered statistic all of its piece so far."""
        stat = self._queue[0].stat
        with self._lock:
            if stat.ordered:
                self._parts[key] = part
            else:
                self._total = part if self._total is None else stat.merge(self.seek, self._total, part)

    def finish_pass(self) -> None:
        """All blocks of this pass were folded."""
        stat = self._queue[0].stat
        total = self._total
        if stat.ordered:
            for key in sorted(self._parts):
                part = self._parts[key]
                total = part if total is None else stat.merge(self.seek, total, part)
        self._parts, self._total = {}, None
        found = stat.finish(self.seek, total)
        if isinstance(found, Known):
            self._close(found)
            self._open()
        else:
            self.seek = found


class WideValues:
    """Values of the statistics that span tensors, and which of them each tensor gets."""

    def __init__(self, groups: Sequence[MergeGroup], stats: Sequence[StatPlan]) -> None:
        self._groups = groups
        self._span_of = spans_by_tensor(stats)
        self._values: dict[tuple[int, int], Any] = {}

    def put(self, stat: int, span: int, value: Any) -> None:
        self._values[stat, span] = value

    def of(self, tensor: int, group: int) -> dict[int, Any]:
        """Those that are known already, for one tensor of a group: by the statistics' places in the plan."""
        out = {}
        for stat in self._groups[group].stats if group >= 0 else ():
            span = self._span_of.get(stat, {}).get(tensor)
            if span is not None and (stat, span) in self._values:
                out[stat] = self._values[stat, span]
        return out
