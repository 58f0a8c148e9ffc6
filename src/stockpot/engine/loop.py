"""The one loop of every merge: work from the scheduler is read, folded or combined, and written to a sink.

Where the output goes (shards on disk, memory) is the sink's business, and who does the work an executor's: the caller's own
thread, or several. Digests, journal and progress are for those that want them. A step of a recipe that is computed while it
is read has ranges of it combined by the same `Arithmetic`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stockpot.checkpoints.source import ReadRequest, TensorSource
from stockpot.engine.blocks import BlockPool
from stockpot.engine.bundles import Bundles
from stockpot.engine.devices import Device, byte_buffer
from stockpot.engine.executors import Executor
from stockpot.engine.kernel import Kernel
from stockpot.engine.ledger import Ledger
from stockpot.engine.scheduler import Scheduler, Work
from stockpot.engine.sink import Sink
from stockpot.engine.transfer import Seen, read_unit, write_unit
from stockpot.engine.unit_data import UnitData, read_segment
from stockpot.engine.units import Cutter, Segment, Unit, aligned, most_of_a_unit, unit_of
from stockpot.methods.declaration import Scope
from stockpot.planning.plan import Action, Plan

__all__ = ["Arithmetic", "Loop", "Totals"]

_JOB_SAMPLES = 2**17

#: called when pieces are merged and written: their rows, and warnings about them
Settled = Callable[[Any, Sequence[str]], None]


def kernels_of(plan: Plan, device: Device) -> list[Kernel]:
    """One for each of its groups."""
    return [Kernel(device, g, plan.stats, plan.seed, plan.budget.chunk) for g in plan.groups]


class Arithmetic:
    """A plan's kernels over its sources. sources: by the numbers of the plan's inputs."""

    def __init__(self, plan: Plan, sources: Sequence[TensorSource], device: Device) -> None:
        self.plan = plan
        self.sources = sources
        self.kernels = kernels_of(plan, device)
        self._tensors = {t.name: t for t in plan.tensors}

    def range(self, name: str, start: int, stop: int, out: memoryview[Any], slot: dict[Any, Any]) -> None:
        """Elements start..stop of an output tensor, of a plan without statistics. slot: this thread's scratch memory."""
        t = self._tensors[name]
        if t.action is not Action.MERGE:
            first = t.inputs[0]
            self.sources[first.model].read([ReadRequest(first.name, start, stop)], out)
            return
        data = read_segment(Segment(t, 0, 0, start, stop), self.sources, slot.setdefault(t.group, {}))
        self.kernels[t.group].combine(data, {}, out)


@dataclass(frozen=True, slots=True)
class _Taken:
    """A unit's inputs and what was seen of each. place: that of the pool where they are kept, if they are."""

    data: UnitData
    seen: list[Seen]
    place: int = -1


@dataclass
class Totals:
    """What a loop has done so far, in bytes; and what it has to say."""

    read: int = 0
    written: int = 0
    done: int = 0
    warnings: list[str] = field(default_factory=list)


class Loop:
    """Does all of a plan that `ledger` does not have as done.

    look     whether digests and measures of all that passes by are wanted, in the ledger
    settled  told of pieces that are merged and written
    """

    def __init__(
        self, plan: Plan, sources: Sequence[TensorSource], device: Device, sink: Sink, ledger: Ledger, *, look: bool = True,
        settled: Settled | None = None, lock: threading.Lock | None = None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.sources = sources
        self.sink = sink
        self.look = look
        self.settled = settled
        self.lock = lock or threading.Lock()
        self.totals = Totals()
        self.errors: list[BaseException] = []
        self.ledger, self.pieces = ledger, ledger.pieces
        self.kernels = kernels_of(plan, device)
        self.pool = BlockPool(plan.budget.hold, most_of_a_unit(plan, sources), byte_buffer)
        self.bundles = Bundles(plan, sources, self.ledger, self.kernels, sink)
        itemsizes = [[sources[o.model].spec(o.name).dtype.itemsize for o in t.inputs] for t in plan.tensors]
        self.in_sizes = np.array([sum(sizes) for sizes in itemsizes], np.int64)
        self.out_sizes = np.array([t.spec.dtype.itemsize for t in plan.tensors], np.int64)

    def run(self, executor: Executor, tick: Callable[[], bool] | None = None) -> bool:
        """Until all is done, or `tick` (called now and then from this thread) says to stop. Whether all is done.

        Raises what the work raised first.
        """
        workers = self.plan.budget.workers
        takes = self.bundles.takes if self.sink.direct and self.look else lambda t: False
        cutter = Cutter(self.plan, self.sources, self.pieces, takes)
        self.bundles.lay_out(cutter.native)
        scheduler = Scheduler(self.plan, cutter, self.ledger.done.copy(), read_ahead=2 * workers + 2)
        whole = any(g.method.scope is Scope.TENSOR for g in self.plan.groups)
        with _one_blas_thread(whole or any(source.parts for source in self.sources)):
            executor.run(lambda: self._worker(scheduler), tick or (lambda: False), scheduler.stop)
        if self.errors:
            raise self.errors[0]
        return scheduler.complete

    def _worker(self, scheduler: Scheduler) -> None:
        slot: dict[Any, Any] = {}
        try:
            while True:
                work, hints = scheduler.next()
                for rows in hints:
                    self._advise(rows, scheduler.cutter)
                if work is None:
                    return
                self._do(work, slot)
                scheduler.finished(work)
        except BaseException as e:
            self.errors.append(e)
            scheduler.stop()

    def _advise(self, rows: Any, cutter: Cutter) -> None:
        if cutter.native[self.pieces.tensor[rows[0]]]:
            self.bundles.advise(rows)
            return
        unit = unit_of(self.plan, self.pieces, rows)
        for i, operand in enumerate(unit.lead.inputs):
            source = self.sources[operand.model]
            for s in unit.segments if len(unit.segments) < 64 else ():
                source.will_read(ReadRequest(s.tensor.inputs[i].name, s.start, s.stop))

    # some work

    def _do(self, work: Work, slot: dict[Any, Any]) -> None:
        if work.job is not None and work.job.sampling:
            work.job.gathering.suggest(self._sample(work, slot))
        elif work.bundle:
            self._by_bundles(work, slot)
        else:
            self._by_units(work, slot)

    def _by_bundles(self, work: Work, slot: dict[Any, Any]) -> None:
        """By compiled calls, piece by piece in Python where one stops short: it works there, or says what is wrong."""
        rows, job = work.rows, work.job
        while len(rows):
            kept = {row for row in rows.tolist() if work.held and row in work.held}
            warnings: list[str] = []
            if job is None:
                done, warnings = self.bundles.merge(rows, work.known, slot, work.held)
            else:
                done = self.bundles.fold(job.gathering, rows, work.known, slot, work.held, self.pool)
            if not done:
                self._by_units(replace(work, rows=rows[:1], held=None), slot)
                rows = rows[1:]
                continue
            self._account(rows[:done], kept, written=job is None)
            if job is None:
                self._settle(rows[:done], warnings)
                self._let_go(rows[:done], work.held)
            rows = rows[done:]

    def _account(self, rows: Any, kept: Set[int], *, written: bool) -> None:
        """Bytes that were read (but for those kept) and written."""
        tensors, n = self.pieces.tensor[rows], self.pieces.stop[rows] - self.pieces.start[rows]
        each = n * self.in_sizes[tensors]
        out = int((n * self.out_sizes[tensors]).sum()) if written else 0
        again = sum(int(e) for row, e in zip(rows.tolist(), each) if row in kept) if kept else 0
        with self.lock:
            self.totals.read += int(each.sum()) - again
            self.totals.written += out
            self.totals.done += int(each.sum()) + out

    def _settle(self, rows: Any, warnings: Sequence[str]) -> None:
        """These pieces are merged and written."""
        with self.lock:
            self.ledger.done[rows] = True
            self.totals.warnings += [w for w in warnings if w not in self.totals.warnings]
        if self.settled is not None:
            self.settled(rows, warnings)

    def _let_go(self, rows: Any, held: dict[int, Any] | None) -> None:
        """Of what was kept of pieces that are merged now."""
        for row in rows.tolist() if held else ():
            kept = held.pop(row, None)  # type: ignore[union-attr]
            if kept is not None:
                self.pool.give(kept.place)

    # one unit

    def _read(self, unit: Unit, slot: dict[Any, Any], *, look: bool = False) -> _Taken:
        """The unit's bytes of every input, into this thread's buffer."""
        dtypes = [self.sources[o.model].spec(o.name).dtype for o in unit.lead.inputs]
        edges = [0]
        for dtype in dtypes:
            edges.append(edges[-1] + aligned(unit.numel * dtype.itemsize))
        buffer = self._buffer(slot, "raw", edges[-1])
        raws = [buffer[at : at + unit.numel * d.itemsize] for at, d in zip(edges, dtypes, strict=False)]
        seen = read_unit(unit, self.sources, raws, dtypes, look=look and self.look)
        return _Taken(UnitData(unit, raws, dtypes, slot), seen)

    def _buffer(self, slot: dict[Any, Any], key: str, size: int) -> memoryview[Any]:
        """A reused buffer of this thread."""
        held: memoryview[Any] | None = slot.get(key)
        if held is None or len(held) < size:
            slot[key] = held = byte_buffer(max(size, 1))
        return held[:size]

    def _take(self, work: Work, slot: dict[Any, Any]) -> _Taken:
        """The data of a unit: from what an earlier pass has kept, or read, and then kept for the next while there is room."""
        first = int(work.rows[0])
        kept: _Taken | None = work.held.get(first) if work.held is not None else None
        if kept is not None:
            self._account(work.rows, set(work.rows.tolist()), written=False)
            return replace(kept, data=replace(kept.data, slot=slot))
        unit = unit_of(self.plan, self.pieces, work.rows)
        self._account(work.rows, set(), written=False)
        room = self.pool.take() if work.job is not None and work.held is not None else None
        if room is None or work.held is None:
            return self._read(unit, slot, look=work.job is None)
        place, memory = room
        taken = replace(self._read(unit, {"raw": memory}, look=True), place=place)
        work.held[first] = taken
        return replace(taken, data=replace(taken.data, slot=slot))

    def _by_units(self, work: Work, slot: dict[Any, Any]) -> None:
        taken = self._take(work, slot)
        data, seen = taken.data, taken.seen
        lead = data.unit.lead
        if work.job is not None:
            self.kernels[lead.group].fold(work.job.gathering, data, work.known)
            return
        warnings: list[str] = []
        if lead.action is Action.MERGE:
            out = self._buffer(slot, "out", data.unit.numel * lead.spec.dtype.itemsize)
            self.kernels[lead.group].combine(data, work.known, out)
            produced = write_unit(data.unit, out, self.sink, look=self.look)
        else:
            out = data.raws[0]
            if lead.action is Action.KEEP:
                warnings = self._differing(data)
            write_unit(data.unit, out, self.sink, look=False)
            produced = seen[:1]
        for slot_number, each in enumerate([*produced, *seen] if self.look else []):
            self.ledger.put(slot_number, work.rows, each.digests, each.measures)
        with self.lock:
            self.totals.written += len(out)
            self.totals.done += len(out)
        self._settle(work.rows, warnings)
        self._let_go(work.rows[:1], work.held)

    def _sample(self, work: Work, slot: dict[Any, Any]) -> Any:
        """What a job's statistic looks at, of a few elements from all over its tensors."""
        job = work.job
        assert job is not None
        plan = job.gathering.current
        assert plan is not None
        if work.bundle and all(b for _, b in job.passes):
            found = self.bundles.sample([t for t in job.tensors if t.spec.numel], _JOB_SAMPLES, slot)
            if found is not None:
                return found
        # a model of thousands of units has a sample of the same size
        units = [unit_of(self.plan, self.pieces, rows) for rows, _ in job.passes]
        known: Mapping[int, Any] = {}
        if not plan.stat.of_block:  # its function may need values that other groups have not, or have others of
            known = {**work.known, **job.gathering.results}
            units = [u for u in units if u.lead.group == units[0].lead.group]
        # of a unit at least 1024 elements are taken, or one row, however long
        runs = [self.kernels[u.lead.group].sample_runs(plan, u.segments[0], 1)[0] for u in units]
        least = max([1024, *(stop - start for start, stop in runs)])
        units = units[:: -(-least * len(units) // (2 * _JOB_SAMPLES))]
        total = sum(u.numel for u in units)
        parts = []
        for unit in units:
            share = max(_JOB_SAMPLES * unit.numel // total, 1024)
            for segment in unit.segments[:: -(-512 * len(unit.segments) // share)]:
                kernel = self.kernels[segment.tensor.group]
                runs = kernel.sample_runs(plan, segment, max(share // len(unit.segments), 512))
                pieces = [Segment(segment.tensor, 0, 0, segment.start + a, segment.start + b) for a, b in runs]
                parts.append(kernel.seen(plan, self._read(Unit(tuple(pieces)), slot).data, known))
        return np.concatenate(parts, axis=1)

    def _differing(self, data: UnitData) -> list[str]:
        """A warning for each tensor on which models disagree although it is not averaged."""
        out = []
        at = 0
        for segment in data.unit.segments:
            stop = at + segment.stop - segment.start
            t = segment.tensor
            first = data.part(0, at, stop)
            other = next((i for i in range(1, len(data.raws)) if data.part(i, at, stop) != first), None)
            if other is not None:
                a, b = (self.plan.inputs[t.inputs[i].model].ref for i in (0, other))
                out.append(f"{t.name}: {t.spec.dtype} differs between {a} and {b}; taken from {a}")
            at = stop
        return out


def _one_blas_thread(needed: bool) -> contextlib.AbstractContextManager[Any]:
    """Matrix products inside the worker threads: more threads below each of them would only get in each other's way."""
    if not needed:
        return contextlib.nullcontext()
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)  # type: ignore[no-any-return]
