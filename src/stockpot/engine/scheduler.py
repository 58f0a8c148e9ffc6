"""Which unit comes next: statistics before what needs them, and the combining pass soon after, while data is still cached."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.engine.gathering import Gathering
from stockpot.engine.units import Unit, units_of, work_lists
from stockpot.methods.statistics import Statistic
from stockpot.planning.plan import Action, Plan, TensorPlan

__all__ = ["Job", "Scheduler", "Work"]


@dataclass(eq=False)
class Job:
    """Statistics being gathered over some tensors. When they are known, `then` units become ready with them.

    held  what is kept of the units' data until `then`, by first piece; None where nothing may be
    """

    gathering: Gathering
    units: list[Unit]
    stats: Mapping[str, Any]
    then: list[Unit]
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
    stats: Mapping[str, Any] = field(default_factory=dict)
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
        self._model_stats: dict[str, dict[str, Any]] = {}
        self._wide = self._wide_jobs()
        self._wide_running = False
        self._items = self._combine_items()
        self._exhausted = False

    # what there is to do

    def _stats(self, tensor: TensorPlan, over: str) -> list[Statistic]:
        if tensor.action is not Action.MERGE:
            return []
        group = self.plan.groups[tensor.group]
        return [s for s in group.method.active_stats(group.params) if s.scope_for(group.params) == over]

    def _wide_jobs(self) -> deque[tuple[str, Job]]:
        """One job for each method with statistics over the whole model."""
        found: dict[str, list[TensorPlan]] = {}
        for t in self.plan.tensors:
            if self._stats(t, "model"):
                found.setdefault(self.plan.groups[t.group].method.name, []).append(t)
        jobs: deque[tuple[str, Job]] = deque()
        for name, tensors in found.items():
            if all(not units_of(self.plan, t, self.done) for t in tensors):
                continue
            group = self.plan.groups[tensors[0].group]
            count = sum(t.spec.numel for t in tensors)
            gathering = Gathering(self._stats(tensors[0], "model"), group.params, len(tensors[0].operands), count)
            chosen = {t.index for t in tensors}
            units = [u for u in self._units(None) if u.lead.index in chosen]
            jobs.append((name, Job(gathering, units, {}, [])))
        return jobs

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
            stats = self._stats(t, "tensor")
            if stats and not left[0].segments[0].whole:
                group = self.plan.groups[t.group]
                gathering = Gathering(stats, group.params, len(t.operands), t.spec.numel)
                yield Job(gathering, units_of(self.plan, t), self._known(t), left)
            else:
                for unit in left:
                    yield Work(unit, None, self._known(t))

    def _known(self, t: TensorPlan) -> Mapping[str, Any]:
        if t.action is not Action.MERGE:
            return {}
        return self._model_stats.get(self.plan.groups[t.group].method.name, {})

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
        if self._wide and not self._wide_running:
            self._wide_running = True
            self._start(self._wide[0][1])

    def _start(self, job: Job) -> None:
        """Queue a job's next pass: a sample first where a cutoff wants one, then all its units."""
        if job.gathering.current is None:
            self._finish(job)
            return
        job.sampling = job.gathering.fresh
        units = job.units[:1] if job.sampling else job.units
        job.left = len(units)
        self._ready.extend(Work(u, job, job.stats, job.held) for u in units)
        self._condition.notify_all()

    def _finish(self, job: Job) -> None:
        if self._wide and self._wide[0][1] is job:
            name, _ = self._wide.popleft()
            self._model_stats[name] = dict(job.gathering.results)
            self._wide_running = False
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
