"""Which unit comes next: statistics before what needs them, and the combining pass soon after, while data is still cached."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.engine.gathering import Gathering, WideValues
from stockpot.engine.units import Unit, units_of, work_lists
from stockpot.planning.plan import Action, Plan, StatPlan, TensorPlan

__all__ = ["Job", "Scheduler", "Work"]


@dataclass(frozen=True)
class WideJob:
    """A statistic to be gathered over the tensors of one span."""

    stat: StatPlan
    number: int
    span: tuple[int, ...]


@dataclass(eq=False)
class Job:
    """Statistics being gathered over some tensors. When they are known, `then` units become ready with them.

    wide  the span that they are of, if they span tensors
    held  what is kept of the units' data until `then`, by first piece; None where nothing may be
    """

    gathering: Gathering
    units: list[Unit]
    stats: Mapping[int, Any]
    then: list[Unit]
    wide: WideJob | None = None
    left: int = 0
    sampling: bool = False
    held: dict[int, Any] | None = None

    def __post_init__(self) -> None:
        # only what will be used again: of a tensor that was done in part before, not all is
        if self.then and len(self.then) == len(self.units):
            self.held = {}


@dataclass(frozen=True)
class Work:
    """A unit to do: fold it into `job`'s statistic (or sample the whole job), or combine it with `stats`; held: see Job."""

    unit: Unit
    job: Job | None
    stats: Mapping[int, Any] = field(default_factory=dict)
    held: dict[int, Any] | None = None

    def kept(self) -> Any:
        """What an earlier pass over the unit has kept, or None."""
        return None if self.held is None else self.held.get(self.unit.segments[0].first)

    def keep(self, taken: Any) -> None:
        """Keep something of the unit for later passes."""
        if self.held is not None:
            self.held[self.unit.segments[0].first] = taken

    def let_go(self) -> Any:
        """What was kept of a unit that is now merged, for the last time; or None."""
        if self.job is not None or self.held is None:
            return None
        return self.held.pop(self.unit.segments[0].first, None)


class Scheduler:
    """Hands out work to any number of threads. `next` blocks while nothing is ready and returns None at the end."""

    def __init__(self, plan: Plan, done: Callable[[int], set[int]], read_ahead: int) -> None:
        self.plan = plan
        self.done = done
        self._condition = threading.Condition()
        self._ready: deque[Work] = deque()
        self._ahead: deque[Work | Job] = deque()
        self._read_ahead = read_ahead
        self._active = 0
        self._stopped = False
        self._values = WideValues(plan.groups, plan.stats)
        self._wide = self._wide_jobs()
        self._wide_running = 0
        self._items = self._combine_items()
        self._exhausted = False

    # what there is to do

    def _own_stats(self, t: TensorPlan) -> list[StatPlan]:
        """The statistics of which this tensor has values of its own."""
        if t.action is not Action.MERGE:
            return []
        return [self.plan.stats[i] for i in self.plan.groups[t.group].stats if self.plan.stats[i].extent == "tensor"]

    def _wide_jobs(self) -> deque[list[WideJob]]:
        """The statistics that span tensors, one after the other: a job for each span."""
        out: deque[list[WideJob]] = deque()
        for stat in self.plan.stats:
            spans = [
                (n, span)
                for n, span in enumerate(stat.spans)
                if any(units_of(self.plan, self.plan.tensors[t], self.done) for t in span)
            ]
            if spans:
                out.append([WideJob(stat, n, span) for n, span in spans])
        return out

    def _units(self, done: Callable[[int], set[int]] | None) -> Iterator[Unit]:
        for tensors in work_lists(self.plan):
            if len(tensors) == 1:
                yield from units_of(self.plan, tensors[0], done)
            else:
                parts = [units_of(self.plan, t, done) for t in tensors]
                segments = [unit.segments[0] for units in parts for unit in units]
                if segments:
                    yield Unit(tuple(segments))

    def _combine_items(self) -> Iterator[Work | Job]:
        """Every unit left to combine, or the job that must come before a tensor's units."""
        for tensors in work_lists(self.plan):
            t = tensors[0]
            if len(tensors) > 1:
                segments = [u.segments[0] for each in tensors for u in units_of(self.plan, each, self.done)]
                if segments:
                    yield Work(Unit(tuple(segments)), None, self._known(t))
                continue
            left = units_of(self.plan, t, self.done)
            if not left:
                continue
            stats = self._own_stats(t)
            known = self._known(t)
            if stats and not left[0].segments[0].whole:
                gathering = Gathering(stats, t.spec.numel, self._names(known))
                yield Job(gathering, units_of(self.plan, t), known, left)
            else:
                for unit in left:
                    yield Work(unit, None, known)

    def _known(self, t: TensorPlan) -> Mapping[int, Any]:
        return self._values.of(t.index, t.group)

    def _names(self, known: Mapping[int, Any]) -> dict[str, Any]:
        return {self.plan.stats[i].stat.name: value for i, value in known.items()}

    # handing it out

    def next(self) -> tuple[Work | None, Sequence[Unit]]:
        """(work or None at the end, units whose inputs are worth asking the kernel for now)."""
        with self._condition:
            while True:
                if self._stopped:
                    return None, ()
                self._start_wide()
                hints = [] if self._wide or self._wide_running else self._fill()
                if self._ready:
                    self._active += 1
                    return self._ready.popleft(), hints
                if self._ahead:
                    item = self._ahead.popleft()
                    if isinstance(item, Job):
                        self._start(item)
                        continue
                    self._active += 1
                    return item, hints
                if self._exhausted and not self._active and not self._wide and not self._wide_running:
                    self._condition.notify_all()
                    return None, ()
                self._condition.wait()

    def _fill(self) -> list[Unit]:
        hints: list[Unit] = []
        while not self._exhausted and len(self._ahead) < self._read_ahead:
            item = next(self._items, None)
            if item is None:
                self._exhausted = True
                break
            self._ahead.append(item)
            hints += item.units[:1] if isinstance(item, Job) else [item.unit]
        return hints

    def _start_wide(self) -> None:
        """Begin on the next statistic that spans tensors, all its spans at once, when the one before is known."""
        while self._wide and not self._wide_running:
            jobs = self._wide.popleft()
            self._wide_running = len(jobs)
            by_tensor = {t: job for job in jobs for t in job.span}
            units: dict[int, list[Unit]] = {job.number: [] for job in jobs}
            for unit in self._units(None):
                job = by_tensor.get(unit.lead.index)
                if job is not None:
                    units[job.number].append(unit)
            for job in jobs:
                first = self.plan.tensors[job.span[0]]
                count = sum(self.plan.tensors[t].spec.numel for t in job.span)
                gathering = Gathering([job.stat], count, self._names(self._known(first)))
                self._start(Job(gathering, units[job.number], {}, [], job))

    def _start(self, job: Job) -> None:
        """Queue a job's next pass: a sample first where a cutoff wants one, then all its units."""
        if job.gathering.current is None:
            self._finish(job)
            return
        if not job.units:  # nothing to fold: tensors without elements
            job.gathering.fresh = False
            job.gathering.finish_pass()
            self._start(job)
            return
        job.sampling = job.gathering.fresh
        units = job.units[:1] if job.sampling else job.units
        job.left = len(units)
        own = (job.stats if job.wide is None else self._known(u.lead) for u in units)
        self._ready.extend(Work(u, job, known, job.held) for u, known in zip(units, own, strict=True))
        self._condition.notify_all()

    def _finish(self, job: Job) -> None:
        if job.wide is not None:
            self._values.put(job.wide.stat.index, job.wide.number, job.gathering.results[job.wide.stat.index])
            self._wide_running -= 1
            self._start_wide()
        stats = {**job.stats, **job.gathering.results}
        self._ready.extendleft(Work(u, None, stats, job.held) for u in reversed(job.then))
        self._condition.notify_all()

    def finished(self, work: Work) -> None:
        """A unit, or a job's sample, is done."""
        with self._condition:
            self._active -= 1
            job = work.job
            if job is not None:
                job.left -= 1
                if job.left == 0:
                    if not job.sampling:
                        job.gathering.finish_pass()
                    self._start(job)
            self._condition.notify_all()

    @property
    def complete(self) -> bool:
        """Whether everything was handed out and finished."""
        return self._exhausted and not (self._active or self._ready or self._ahead or self._wide or self._wide_running)

    def stop(self) -> None:
        """Make every `next` return None."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
