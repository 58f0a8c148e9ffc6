"""Which pieces come next: statistics before what needs them, and the combining pass soon after, while data is still cached."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.engine.gathering import Gathering, WideValues
from stockpot.engine.units import Cutter
from stockpot.planning.plan import Action, Plan, StatPlan, TensorPlan

__all__ = ["Job", "Scheduler", "Work"]


@dataclass(eq=False)
class Job:
    """Statistics being gathered over some tensors. When they are known, `then` becomes ready with them.

    passes  the rows of each part of a pass, and whether a compiled call does it
    stat    the statistic and the number of the span that it is of, if it spans tensors
    held    what is kept of the data until `then`, by first row; None where nothing may be
    """

    gathering: Gathering
    tensors: Sequence[TensorPlan]
    passes: list[tuple[Any, bool]]
    known: Mapping[int, Any]
    then: list[tuple[Any, bool]]
    stat: StatPlan | None = None
    number: int = 0
    left: int = 0
    sampling: bool = False
    held: dict[int, Any] | None = None


@dataclass(frozen=True)
class Work:
    """Pieces to do: fold them into `job`'s statistic (or sample the whole job), or combine them with what is known.

    bundle  whether one compiled call does them; held: see Job
    """

    rows: Any
    bundle: bool
    job: Job | None
    known: Mapping[int, Any] = field(default_factory=dict)
    held: dict[int, Any] | None = None


class Scheduler:
    """Hands out work to any number of threads. `next` blocks while nothing is ready and returns None at the end.

    done  which pieces an earlier run has done, `[pieces]` booleans
    """

    def __init__(self, plan: Plan, cutter: Cutter, done: Any, read_ahead: int) -> None:
        self.plan = plan
        self.cutter = cutter
        self.done = done
        self._condition = threading.Condition()
        self._ready: deque[Work] = deque()
        self._ahead: deque[Work | Job] = deque()
        self._read_ahead = read_ahead
        self._active = 0
        self._stopped = False
        self._values = WideValues(plan.groups, plan.stats)
        self._wide = deque(s for s in plan.stats if any(self._left(t) for span in s.spans for t in span))
        self._wide_running = 0
        sizes = cutter.pieces.stop - cutter.pieces.start
        self._elements = int(sizes[~done].sum())
        self._items = self._combine_items()
        self._exhausted = False

    # what there is to do

    def _left(self, tensor: int) -> bool:
        """Whether a tensor has pieces that are not done."""
        rows = self.cutter.pieces.of(tensor)
        return len(rows) > 0 and not self.done[rows].all()

    def _own_stats(self, t: TensorPlan) -> list[StatPlan]:
        """The statistics of which this tensor has values of its own."""
        if t.action is not Action.MERGE:
            return []
        return [self.plan.stats[i] for i in self.plan.groups[t.group].stats if self.plan.stats[i].extent == "tensor"]

    def _bundle(self) -> int:
        return self.cutter.share(self._elements, self.plan.budget.workers)

    def _cut(self, tensors: Sequence[TensorPlan], done: Any, elements: int) -> list[tuple[Any, bool]]:
        """Parts of a pass over whole tensors."""
        return [
            (rows, run.bundles)
            for run in self.cutter.runs(tensors, lambda t: False)
            for rows in self.cutter.cut(run, done, lambda: elements)
        ]

    def _combine_items(self) -> Iterator[Work | Job]:
        """All that is left to combine, or the job that must come before a tensor's pieces."""
        pieces = self.cutter.pieces
        for run in self.cutter.runs(self.plan.tensors, lambda t: bool(self._own_stats(t))):
            t = run.tensors[0]
            stats = self._own_stats(t)
            known = self._values.of(t.index, t.group)
            if stats and len(run.tensors) == 1 and not self.cutter.whole(t):
                if self._left(t.index):
                    yield self._job(t, stats, known)
                continue
            for rows in self.cutter.cut(run, self.done, self._bundle):
                self._elements -= int((pieces.stop[rows] - pieces.start[rows]).sum())
                yield Work(rows, run.bundles, None, known)

    def _job(self, t: TensorPlan, stats: list[StatPlan], known: Mapping[int, Any]) -> Job:
        gathering = Gathering(stats, t.spec.numel, self._names(known))
        share = self._bundle()
        passes, then = self._cut([t], None, share), self._cut([t], self.done, share)
        self._elements -= t.spec.numel
        # only what will be used again: of a tensor that was done in part before, not all is
        held: dict[int, Any] | None = {} if sum(len(r) for r, _ in then) == sum(len(r) for r, _ in passes) else None
        return Job(gathering, [t], passes, known, then, held=held)

    def _names(self, known: Mapping[int, Any]) -> dict[str, Any]:
        return {self.plan.stats[i].stat.name: value for i, value in known.items()}

    # handing it out

    def next(self) -> tuple[Work | None, Sequence[Any]]:
        """(work or None at the end, rows whose inputs are worth asking the kernel for now)."""
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

    def _fill(self) -> list[Any]:
        hints: list[Any] = []
        while not self._exhausted and len(self._ahead) < self._read_ahead:
            item = next(self._items, None)
            if item is None:
                self._exhausted = True
                break
            self._ahead.append(item)
            hints += [rows for rows, _ in item.passes[:1]] if isinstance(item, Job) else [item.rows]
        return hints

    def _start_wide(self) -> None:
        """Begin on the next statistic that spans tensors, all its spans at once, when the one before is known."""
        while self._wide and not self._wide_running:
            stat = self._wide.popleft()
            spans = [(n, s) for n, s in enumerate(stat.spans) if any(self._left(t) for t in s)]
            self._wide_running = len(spans)
            for number, span in spans:
                tensors = [self.plan.tensors[t] for t in span]
                count = sum(t.spec.numel for t in tensors)
                known = self._values.of(tensors[0].index, tensors[0].group)
                share = self.cutter.share(count, self.plan.budget.workers)
                gathering = Gathering([stat], count, self._names(known))
                self._start(Job(gathering, tensors, self._cut(tensors, None, share), {}, [], stat, number))

    def _start(self, job: Job) -> None:
        """Queue a job's next pass: a sample first where a cutoff wants one, then all its pieces."""
        if job.gathering.current is None:
            self._finish(job)
            return
        if not job.passes:  # tensors without elements
            job.gathering.fresh = False
            job.gathering.finish_pass()
            self._start(job)
            return
        job.sampling = job.gathering.fresh
        parts = job.passes[:1] if job.sampling else job.passes
        job.left = len(parts)
        for rows, bundle in parts:
            lead = self.plan.tensors[self.cutter.pieces.tensor[rows[0]]]
            known = job.known if job.stat is None else self._values.of(lead.index, lead.group)
            self._ready.append(Work(rows, bundle, job, known, job.held))
        self._condition.notify_all()

    def _finish(self, job: Job) -> None:
        if job.stat is not None:
            self._values.put(job.stat.index, job.number, job.gathering.results[job.stat.index])
            self._wide_running -= 1  # whoever asks next begins on the next one
        known = {**job.known, **job.gathering.results}
        self._ready.extendleft(Work(rows, bundle, None, known, job.held) for rows, bundle in reversed(job.then))
        self._condition.notify_all()

    def finished(self, work: Work) -> None:
        """Some work, or a job's sample, is done."""
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
