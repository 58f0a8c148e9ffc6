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
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.allocator import keep_pages
from stockpot.engine.blocks import BlockPool
from stockpot.engine.bundles import Bundles
from stockpot.engine.devices import Device, byte_buffer
from stockpot.engine.digest_book import DigestBook, observer
from stockpot.engine.journal import NAME as JOURNAL_NAME
from stockpot.engine.journal import Journal
from stockpot.engine.kernel import Kernel, UnitData, sample_runs
from stockpot.engine.ledger import Ledger
from stockpot.engine.limits import allow_open_files
from stockpot.engine.measures import Sizes, far_out
from stockpot.engine.pieces import Pieces
from stockpot.engine.publish import partial_path
from stockpot.engine.resume import take_over
from stockpot.engine.scheduler import Job, Scheduler, Work
from stockpot.engine.signals import noted_signals
from stockpot.engine.sink import ShardSink
from stockpot.engine.transfer import Seen, read_unit, write_unit
from stockpot.engine.units import Cutter, Segment, Unit, aligned, most_of_a_unit, unit_of
from stockpot.errors import Interrupted, OutputError, ReadError
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
        self.pieces = Pieces(plan.tensors)
        self.ledger = Ledger(self.pieces, max((len(t.inputs) for t in plan.tensors), default=0))
        self.lock = threading.Lock()
        self.errors: list[BaseException] = []
        self.bytes_done = 0
        self.pool = BlockPool(plan.budget.hold, most_of_a_unit(plan), byte_buffer)
        budget = plan.budget
        self.kernels = [Kernel(device, g, plan.stats, plan.seed, budget.chunk) for g in plan.groups]
        self.bundles = Bundles(plan, self.ledger, self.kernels)
        itemsizes = [
            [plan.inputs[o.model].checkpoint.spec(o.name).dtype.itemsize for o in t.inputs] for t in plan.tensors
        ]
        self.in_sizes = np.array([sum(sizes) for sizes in itemsizes], np.int64)
        self.out_sizes = np.array([t.spec.dtype.itemsize for t in plan.tensors], np.int64)

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
            os.path.join(partial, JOURNAL_NAME),
            self.plan.identity,
            self.ledger,
            lambda: sink.flush() if sink is not None else None,
        )
        try:
            resumed = journal.open() and resume
        except OSError as e:
            if isinstance(e, OutputError):
                raise
            raise OutputError(f"{partial}: can't be written: {e.strerror or e}") from e
        if not resumed:
            journal.found.clear()
            journal.warnings.clear()
        _clear(partial, keep={JOURNAL_NAME, *(s.name for s in self.plan.shards if resumed)})
        finished = False
        part_books = self._observe_parts()
        try:
            sink = ShardSink(partial, self.plan.shards, fresh=not resumed)
            self.outcome.resumed_bytes = take_over(self.plan, partial, self.ledger, journal.found)
            self.outcome.warnings += dict.fromkeys(journal.warnings)
            journal.found.clear()
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
        self.outcome.part_digests = {path: dict(book.done) for path, book in part_books.items()}
        self._sum_up()
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

    def _sum_up(self) -> None:
        """What the pieces come to, tensor by tensor."""
        for t, measures in zip(self.plan.tensors, self.ledger.measures(), strict=True):
            digest = self.ledger.digest(t.index, 0)
            assert digest is not None
            self.outcome.output_digests[t.name] = digest
            if not t.spec.numel:
                continue
            self.outcome.sizes.add(t.name, measures[: 1 + len(t.inputs)], t.weighed)
            for slot, o in enumerate(t.inputs, 1):
                # what was computed, or read in part, has no digest that a file could be held to
                checkpoint = self.plan.inputs[o.model].checkpoint
                origin = checkpoint.origin(o.name)
                digest = None if origin is None else self.ledger.digest(t.index, slot)
                if origin is None or digest is None:
                    continue
                if origin.source is checkpoint:
                    self.outcome.input_digests[o.model, o.name] = digest
                else:
                    self.outcome.part_digests.setdefault(origin.source.path, {})[origin.name] = digest

    # the threads

    def _work(self, sink: ShardSink, journal: Journal, progress: Progress | None) -> None:
        workers = self.plan.budget.workers
        self.sink = self.bundles.sink = sink
        cutter = Cutter(self.plan, self.pieces, self.bundles.takes)
        self.bundles.lay_out(cutter.native)
        scheduler = Scheduler(self.plan, cutter, self.ledger.done.copy(), read_ahead=2 * workers + 2)
        threads = [
            threading.Thread(target=self._worker, args=(scheduler, journal), name=f"stockpot-{i}", daemon=True)
            for i in range(workers)
        ]
        total = self.plan.bytes_in + self.plan.bytes_out
        try:
            for thread in threads:
                thread.start()
            while alive := [t for t in threads if t.is_alive()]:
                alive[0].join(0.1)
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

    def _worker(self, scheduler: Scheduler, journal: Journal) -> None:
        slot: dict[Any, Any] = {}
        try:
            while True:
                work, hints = scheduler.next()
                for rows in hints:
                    self._advise(rows, scheduler.cutter)
                if work is None:
                    return
                self._do(work, slot, journal)
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
            source = self.plan.inputs[operand.model].checkpoint
            for s in unit.segments if len(unit.segments) < 64 else ():
                source.will_read(ReadRequest(s.tensor.inputs[i].name, s.start, s.stop))

    # some work

    def _do(self, work: Work, slot: dict[Any, Any], journal: Journal) -> None:
        if work.job is not None and work.job.sampling:
            work.job.gathering.suggest(self._sample(work.job, slot, bundle=work.bundle))
        elif work.bundle:
            self._by_bundles(work, slot, journal)
        else:
            self._by_units(work, slot, journal)

    def _by_bundles(self, work: Work, slot: dict[Any, Any], journal: Journal) -> None:
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
                self._by_units(replace(work, rows=rows[:1], held=None), slot, journal)
                rows = rows[1:]
                continue
            self._account(rows[:done], kept, written=job is None)
            if job is None:
                self._settle(rows[:done], journal, warnings)
                self._let_go(rows[:done], work.held)
            rows = rows[done:]

    def _account(self, rows: Any, kept: Set[int], *, written: bool) -> None:
        """Bytes that were read (but for those kept) and written."""
        tensors, n = self.pieces.tensor[rows], self.pieces.stop[rows] - self.pieces.start[rows]
        each = n * self.in_sizes[tensors]
        out = int((n * self.out_sizes[tensors]).sum()) if written else 0
        again = sum(int(e) for row, e in zip(rows.tolist(), each) if row in kept) if kept else 0
        with self.lock:
            self.outcome.bytes_read += int(each.sum()) - again
            self.outcome.bytes_written += out
            self.bytes_done += int(each.sum()) + out

    def _settle(self, rows: Any, journal: Journal, warnings: Sequence[str]) -> None:
        """These pieces are merged and written."""
        with self.lock:
            self.ledger.done[rows] = True
            self.outcome.warnings += [w for w in warnings if w not in self.outcome.warnings]
        journal.add(rows, warnings)

    def _let_go(self, rows: Any, held: dict[int, Any] | None) -> None:
        """Of what was kept of pieces that are merged now."""
        for row in rows.tolist() if held else ():
            kept = held.pop(row, None)  # type: ignore[union-attr]
            if kept is not None:
                self.pool.give(kept.place)

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

    def _by_units(self, work: Work, slot: dict[Any, Any], journal: Journal) -> None:
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
            produced = write_unit(data.unit, out, self.sink, look=True)
        else:
            out = data.raws[0]
            if lead.action is Action.KEEP:
                warnings = self._differing(data)
            write_unit(data.unit, out, self.sink, look=False)
            produced = seen[:1]
        for slot_number, each in enumerate([*produced, *seen]):
            self.ledger.put(slot_number, work.rows, each.digests, each.measures)
        with self.lock:
            self.outcome.bytes_written += len(out)
            self.bytes_done += len(out)
        self._settle(work.rows, journal, warnings)
        self._let_go(work.rows[:1], work.held)

    def _sample(self, job: Job, slot: dict[Any, Any], *, bundle: bool) -> Any:
        """A few deltas from all over a job's tensors."""
        if bundle and all(b for _, b in job.passes):
            found = self.bundles.sample([t for t in job.tensors if t.spec.numel], _JOB_SAMPLES, slot)
            if found is not None:
                return found
        # a model of thousands of units has a sample of the same size
        units = [unit_of(self.plan, self.pieces, rows) for rows, _ in job.passes]
        units = units[:: -(-1024 * len(units) // (2 * _JOB_SAMPLES))]
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


def _clear(directory: str, keep: Set[str] = frozenset()) -> None:
    """Remove the files of an unfinished merge but for those to `keep`, and the directory if there are none."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name not in keep or os.path.islink(path):
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    if not keep:
        os.rmdir(directory)
