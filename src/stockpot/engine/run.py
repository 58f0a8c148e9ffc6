"""Runs a plan: threads take units from the scheduler, read, compute, hash, write and journal them.

The result lies in a `.partial` directory, complete and flushed but for config, card and lineage, which the caller adds
before `publish` renames it into place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.allocator import keep_pages
from stockpot.engine.devices import Device, byte_buffer
from stockpot.engine.digest_book import DigestBook, observer
from stockpot.engine.digests import tensor_digest
from stockpot.engine.journal import NAME as JOURNAL_NAME
from stockpot.engine.journal import Journal, Record
from stockpot.engine.kernel import Kernel, UnitData, sample_runs
from stockpot.engine.limits import allow_open_files
from stockpot.engine.measures import Sizes, far_out
from stockpot.engine.pool import Pool
from stockpot.engine.publish import partial_path
from stockpot.engine.resume import sound_records
from stockpot.engine.scheduler import Job, Scheduler, Work
from stockpot.engine.signals import noted_signals
from stockpot.engine.sink import ShardSink
from stockpot.engine.transfer import Seen, read_unit, records, write_unit
from stockpot.engine.units import Segment, Unit, aligned, most_of_a_unit
from stockpot.errors import Interrupted, OutputError, ReadError
from stockpot.grid import grid_of
from stockpot.methods.declaration import Scope
from stockpot.planning.plan import Action, Plan

__all__ = ["Outcome", "Progress", "run_plan"]

#: called from the main thread with (bytes done, bytes in all)
Progress = Callable[[int, int], None]

_JOB_SAMPLES = 2**17


@dataclass
class Outcome:
    """What a run produced. Digests are hexadecimal; input digests are by (model, tensor), those of the parts of computed
    checkpoints by path and tensor.
    """

    partial: str
    output_digests: dict[str, str] = field(default_factory=dict)
    input_digests: dict[tuple[int, str], str] = field(default_factory=dict)
    part_digests: dict[str, dict[str, str]] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    warnings: list[str] = field(default_factory=list)
    bytes_read: int = 0
    bytes_written: int = 0
    resumed_bytes: int = 0
    seconds: float = 0.0
    journal: Journal | None = None

    def release(self) -> None:
        """Give up the lock on the partial directory, once it was published or the caller has given up."""
        if self.journal is not None:
            self.journal.unlock()


def run_plan(plan: Plan, out: str, device: Device, *, resume: bool = True, progress: Progress | None = None) -> Outcome:
    """Do everything that a plan says, into `out`.partial. Raises OutputError, ReadError, Interrupted."""
    with noted_signals() as asked:
        return _Runner(plan, partial_path(out), device, asked).run(resume, progress)


@dataclass(frozen=True, slots=True)
class _Taken:
    """A unit's inputs and what was seen of each. place: that of the pool where they are kept, if they are."""

    data: UnitData
    seen: list[Seen]
    place: int = -1


class _Runner:
    def __init__(self, plan: Plan, partial: str, device: Device, asked_to_stop: threading.Event) -> None:
        self.asked_to_stop = asked_to_stop
        self.plan = plan
        self.outcome = Outcome(partial)
        self.pieces_done: dict[int, set[int]] = {}
        self.out_book = DigestBook()
        self.in_book = DigestBook()
        self.lock = threading.Lock()
        self.errors: list[BaseException] = []
        self.bytes_done = 0
        self.pool = Pool(plan.budget.hold, most_of_a_unit(plan), byte_buffer)
        budget = plan.budget
        self.kernels = [Kernel(device, g, plan.stats, plan.seed, budget.chunk) for g in plan.groups]

    # setting up and winding down

    def run(self, resume: bool, progress: Progress | None) -> Outcome:
        keep_pages()
        allow_open_files(self.plan)
        began = time.monotonic()
        self._check_unchanged()
        partial = self.outcome.partial
        try:
            os.makedirs(partial, exist_ok=True)
        except OSError as e:
            raise OutputError(f"{partial}: can't be created: {e.strerror or e}") from e
        sink: ShardSink | None = None
        journal = Journal(
            os.path.join(partial, JOURNAL_NAME), self.plan.identity, lambda: sink.flush() if sink is not None else None
        )
        try:
            resumed = journal.open() and resume
        except OSError as e:
            if isinstance(e, OutputError):
                raise
            raise OutputError(f"{partial}: can't be written: {e.strerror or e}") from e
        if not resumed:
            journal.records.clear()
        _clear(partial, keep={JOURNAL_NAME, *(s.name for s in self.plan.shards if resumed)})
        finished = False
        part_books = self._observe_parts()
        try:
            sink = ShardSink(partial, self.plan.shards, fresh=not resumed)
            for record in sound_records(self.plan, partial, journal.records):
                self._take_over(record)
            journal.begin(resumed=resumed)
            whole = any(g.method.scope is Scope.TENSOR for g in self.plan.groups)
            with _one_blas_thread(whole or any(m.checkpoint.parts for m in self.plan.inputs)):
                self._work(sink, journal, progress)
            self._check_unchanged()
            finished = True
        finally:
            try:
                self._wind_down(sink, journal, resumed=resumed, finished=finished)
            except BaseException:
                finished = False
                raise
            finally:
                if not finished:
                    journal.unlock()
                for model in self.plan.inputs:
                    model.checkpoint.close()
        empty = (t.name for t in self.plan.tensors if t.spec.numel == 0)
        self.outcome.output_digests = {**self.out_book.done, **{name: tensor_digest(()) for name in empty}}
        self.outcome.input_digests = self.in_book.done
        self.outcome.part_digests = {path: book.done for path, book in part_books.items()}
        self.outcome.warnings += far_out(self.outcome.sizes)
        self.outcome.seconds = time.monotonic() - began
        self.outcome.journal = journal
        return self.outcome

    def _wind_down(self, sink: ShardSink | None, journal: Journal, *, resumed: bool, finished: bool) -> None:
        """Commit what is done, or remove what never began."""
        if sink is None:
            if not resumed:
                journal.close(commit=False)
                _clear(self.outcome.partial)
            return
        try:
            journal.close(commit=True)
            if finished:
                sink.flush()
        finally:
            sink.close()

    def _check_unchanged(self) -> None:
        """Inputs must be those that were planned with. Raises ReadError."""
        for model in self.plan.inputs:
            why = model.checkpoint.changed()
            if why:
                raise ReadError(f"{why}; merge again to take it as it is now")

    def _observe_parts(self) -> dict[str, DigestBook]:
        """Hash what is read inside computed checkpoints: whole pieces as they come by."""
        books: dict[str, DigestBook] = {}
        for model in self.plan.inputs:
            for part in model.checkpoint.parts:
                book = books.setdefault(part.path, DigestBook())
                part.observers[:] = [observer(part, book, self.lock)]
        return books

    def _take_over(self, record: Record) -> None:
        """A record of an earlier run, whose bytes are there."""
        t = self.plan.tensors[record.tensor]
        self.pieces_done.setdefault(t.index, set()).update(range(record.first, record.last))
        self._book(record)
        start, stop = grid_of(t.spec.shape).span(record.first, record.last)
        self.outcome.resumed_bytes += (stop - start) * t.spec.dtype.itemsize

    def _book(self, record: Record) -> None:
        t = self.plan.tensors[record.tensor]
        pieces = grid_of(t.spec.shape).pieces
        self.out_book.add(t.name, pieces, record.first, record.out)
        for operand, digests in zip(t.inputs, record.inputs, strict=True):
            if self.plan.inputs[operand.model].checkpoint.spec(operand.name).shape != t.spec.shape:
                continue  # cropped: only a part of that tensor was read
            self.in_book.add((operand.model, operand.name), pieces, record.first, digests)
        self.outcome.sizes.add(t.name, record.measures, t.weighed)
        if record.warning and record.warning not in self.outcome.warnings:
            self.outcome.warnings.append(record.warning)

    # the threads

    def _work(self, sink: ShardSink, journal: Journal, progress: Progress | None) -> None:
        workers = self.plan.budget.workers
        scheduler = Scheduler(self.plan, lambda i: self.pieces_done.get(i, set()), read_ahead=2 * workers + 2)
        threads = [
            threading.Thread(target=self._worker, args=(scheduler, sink, journal), name=f"stockpot-{i}", daemon=True)
            for i in range(workers)
        ]
        total = self.plan.bytes_in + self.plan.bytes_out
        try:
            for thread in threads:
                thread.start()
            while any(t.is_alive() for t in threads):
                for thread in threads:
                    thread.join(0.05)
                if self.asked_to_stop.is_set():
                    scheduler.stop()
                elif progress is not None:
                    progress(min(self.bytes_done + self.outcome.resumed_bytes, total), total)
        finally:
            # whatever `progress` raises: no thread may go on once the files are closed, their descriptors may soon be others'
            scheduler.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self.asked_to_stop.is_set() and not scheduler.complete:
            raise Interrupted(
                f"stopped; {self.outcome.partial} keeps what is done, and the same command goes on from there"
            )
        if self.errors:
            raise self.errors[0]

    def _worker(self, scheduler: Scheduler, sink: ShardSink, journal: Journal) -> None:
        slot: dict[Any, Any] = {}
        try:
            while True:
                work, hints = scheduler.next()
                for unit in hints:
                    self._advise(unit)
                if work is None:
                    return
                self._do(work, slot, sink, journal)
                kept = work.let_go()
                if kept is not None:
                    self.pool.give(kept.place)
                scheduler.finished(work)
        except BaseException as e:
            self.errors.append(e)
            scheduler.stop()

    def _advise(self, unit: Unit) -> None:
        for i, operand in enumerate(unit.lead.inputs):
            source = self.plan.inputs[operand.model].checkpoint
            for s in unit.segments if len(unit.segments) < 64 else ():
                source.will_read(ReadRequest(s.tensor.inputs[i].name, s.start, s.stop))

    # one unit

    def _read(self, unit: Unit, slot: dict[Any, Any], *, look: bool = False) -> _Taken:
        """The unit's bytes of every input, into this thread's buffer."""
        dtypes = [self.plan.inputs[o.model].checkpoint.spec(o.name).dtype for o in unit.lead.inputs]
        edges = [0]
        for dtype in dtypes:
            edges.append(edges[-1] + aligned(unit.numel * dtype.itemsize))
        buffer = self._buffer(slot, "raw", edges[-1])
        raws = [buffer[at : at + unit.numel * d.itemsize] for at, d in zip(edges, dtypes, strict=False)]
        seen = read_unit(unit, self.plan.inputs, raws, dtypes, look=look)
        with self.lock:
            self.outcome.bytes_read += sum(map(len, raws))
            self.bytes_done += sum(map(len, raws))
        return _Taken(UnitData(unit, raws, dtypes, slot), seen)

    def _buffer(self, slot: dict[Any, Any], key: str, size: int) -> memoryview[Any]:
        """A reused buffer of this thread."""
        held: memoryview[Any] | None = slot.get(key)
        if held is None or len(held) < size:
            slot[key] = held = byte_buffer(max(size, 1))
        return held[:size]

    def _take(self, work: Work, slot: dict[Any, Any]) -> _Taken:
        """The data of a unit: from what an earlier pass has kept, or read, and then kept for the next while there is room."""
        kept: _Taken | None = work.kept()
        if kept is not None:
            with self.lock:
                self.bytes_done += sum(map(len, kept.data.raws))
            return replace(kept, data=replace(kept.data, slot=slot))
        room = self.pool.take() if work.job is not None and work.held is not None else None
        if room is None:
            return self._read(work.unit, slot, look=work.job is None)
        place, memory = room
        taken = replace(self._read(work.unit, {"raw": memory}, look=True), place=place)
        work.keep(taken)
        return replace(taken, data=replace(taken.data, slot=slot))

    def _do(self, work: Work, slot: dict[Any, Any], sink: ShardSink, journal: Journal) -> None:
        if work.job is not None and work.job.sampling:
            work.job.gathering.suggest(self._sample(work.job, slot))
            return
        lead = work.unit.lead
        taken = self._take(work, slot)
        data, seen = taken.data, taken.seen
        if work.job is not None:
            self.kernels[lead.group].fold(work.job.gathering, data, work.stats)
            return
        warning = None
        if lead.action is Action.MERGE:
            out = self._buffer(slot, "out", work.unit.numel * lead.spec.dtype.itemsize)
            self.kernels[lead.group].combine(data, work.stats, out)
            produced = write_unit(work.unit, out, sink, look=True)
        else:
            out = data.raws[0]
            if lead.action is Action.KEEP:
                warning = self._differing(data)
            write_unit(work.unit, out, sink, look=False)
            produced = seen[:1]
        for record in records(work.unit, [*produced, *seen], warning):
            with self.lock:
                self._book(record)
            journal.add(record)
        with self.lock:
            self.outcome.bytes_written += len(out)
            self.bytes_done += len(out)

    def _sample(self, job: Job, slot: dict[Any, Any]) -> Any:
        """A few deltas from all over a job's tensors."""
        # a model of thousands of units has a sample of the same size
        units = job.units[:: -(-1024 * len(job.units) // (2 * _JOB_SAMPLES))]
        total = sum(u.numel for u in units)
        parts = []
        for unit in units:
            share = max(_JOB_SAMPLES * unit.numel // total, 1024)
            for segment in unit.segments[:: -(-512 * len(unit.segments) // share)]:
                n = segment.stop - segment.start
                runs = sample_runs(n, samples=max(share // len(unit.segments), 512))
                pieces = [Segment(segment.tensor, 0, 0, segment.start + a, segment.start + b) for a, b in runs]
                data = self._read(Unit(tuple(pieces)), slot).data
                count = sum(b - a for a, b in runs)
                parts.append(self.kernels[segment.tensor.group].deltas(data, [(0, count)]))
        return np.concatenate(parts, axis=1)

    def _differing(self, data: UnitData) -> str | None:
        """A warning when models disagree on a tensor that is not averaged."""
        first = np.frombuffer(data.raws[0], np.uint8)
        for operand, raw in zip(data.unit.lead.inputs[1:], data.raws[1:], strict=True):
            if not np.array_equal(first, np.frombuffer(raw, np.uint8)):
                names = data.unit.lead.name + (", ..." if len(data.unit.segments) > 1 else "")
                a, b = (self.plan.inputs[i].ref for i in (data.unit.lead.inputs[0].model, operand.model))
                return f"{names}: {data.unit.lead.spec.dtype} differs between {a} and {b}; taken from {a}"
        return None


def _one_blas_thread(needed: bool) -> contextlib.AbstractContextManager[Any]:
    """Matrix products inside the worker threads: more threads below each of them would only get in each other's way."""
    if not needed:
        return contextlib.nullcontext()
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)  # type: ignore[no-any-return]


def _clear(directory: str, keep: Set[str] = frozenset()) -> None:
    """Remove the files of an unfinished merge but for those to `keep`, and the directory if there are none."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name not in keep or os.path.islink(path):
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    if not keep:
        os.rmdir(directory)
