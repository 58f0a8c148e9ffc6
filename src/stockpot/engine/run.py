"""Runs a plan into a directory: opens the journal, goes on with what an earlier run has done, lets the loop work, sums up.

The result lies in a `.partial` directory, complete and flushed but for config, card and lineage, which the caller adds
before `publish` renames it into place.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.engine.allocator import keep_pages
from stockpot.engine.devices import Device
from stockpot.engine.digest_book import DigestBook, observer
from stockpot.engine.executors import Threads
from stockpot.engine.journal import Journal
from stockpot.engine.ledger import Ledger
from stockpot.engine.limits import allow_open_files
from stockpot.engine.loop import Loop
from stockpot.engine.measures import Sizes, far_out
from stockpot.engine.outdir import JOURNAL, alone_in, check_trusted, is_partial, partial_path
from stockpot.engine.pieces import Pieces
from stockpot.engine.resume import Inputs, take_over
from stockpot.engine.signals import noted_signals
from stockpot.engine.sink import ShardSink
from stockpot.errors import Interrupted, OutputError, ReadError
from stockpot.files import make_folders
from stockpot.planning.plan import Plan

__all__ = ["Outcome", "Progress", "run_plan"]

#: called from the main thread with (bytes done, bytes in all)
Progress = Callable[[int, int], None]


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


class _Runner:
    def __init__(self, plan: Plan, partial: str, device: Device, asked_to_stop: threading.Event) -> None:
        self.asked_to_stop = asked_to_stop
        self.plan = plan
        self.device = device
        self.outcome = Outcome(partial)
        self.ledger = Ledger(Pieces(plan.tensors), max((len(t.inputs) for t in plan.tensors), default=0))
        self.lock = threading.Lock()

    # setting up and winding down

    def run(self, resume: bool, progress: Progress | None) -> Outcome:
        keep_pages()
        allow_open_files(self.plan)
        began = time.monotonic()
        self._check_unchanged()
        partial = self.outcome.partial
        sink: ShardSink | None = None
        journal = Journal(
            os.path.join(partial, JOURNAL),
            self.plan.identity,
            self.ledger,
            lambda: sink.flush() if sink is not None else None,
            inputs=_identities(self.plan),
        )
        resumed = _claimed(partial, journal)
        if resumed and not resume:
            journal.forget()
            resumed = False
        try:
            _clear(partial, keep={JOURNAL, *(s.name for s in self.plan.shards if resumed)})
        except OSError as e:
            journal.unlock()
            raise OutputError(f"{partial}: can't be cleared: {e.strerror or e}") from e
        finished = False
        part_books = self._observe_parts()
        try:
            sink = ShardSink(partial, self.plan.shards, fresh=not resumed)
            sound = Inputs(self.plan) if resumed and not journal.same_inputs else None
            self.outcome.resumed_bytes = take_over(self.plan, partial, self.ledger, journal.found, sound)
            self.outcome.warnings += dict.fromkeys(journal.warnings)
            if sound is not None:  # what is not sound must not be taken for it by the next run
                journal.forget()
                journal.keep(np.flatnonzero(self.ledger.done), self.outcome.warnings)
            journal.found.clear()
            journal.begin()
            self._work(sink, journal, progress)
            self._check_unchanged()
            self._check_untouched()
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
                    for part in model.checkpoint.parts:
                        part.observers.clear()  # who holds it may merge it again
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

    def _check_untouched(self) -> None:
        """Where something has happened to an input that may be no change (a backup's hard link, new permissions), what was read
        is compared with what is there. Raises ReadError.
        """
        touched = [m for m in self.plan.inputs if m.checkpoint.touched()]
        if not touched:
            return
        inputs, pieces = Inputs(self.plan), self.ledger.pieces
        for row in np.flatnonzero(self.ledger.done):
            start, stop = int(pieces.start[row]), int(pieces.stop[row])
            if not inputs.hold(int(pieces.tensor[row]), start, stop, self.ledger.digests[1:, row]):
                raise ReadError(
                    f"{touched[0].ref}: was touched during the merge (written to, given another name or other permissions), and "
                    "what was read of it can't be shown to be what is there; merge again to take it as it is now"
                )

    def _observe_parts(self) -> dict[str, DigestBook]:
        """Hash what is read inside computed checkpoints: whole pieces as they come by."""
        books: dict[str, DigestBook] = {}
        for model in self.plan.inputs:
            for part in model.checkpoint.parts:
                book = books.setdefault(part.path, DigestBook())
                part.observers[:] = [observer(part, book, self.lock)]
        return books

    def _work(self, sink: ShardSink, journal: Journal, progress: Progress | None) -> None:
        sources = [m.checkpoint for m in self.plan.inputs]
        loop = Loop(self.plan, sources, self.device, sink, self.ledger, settled=journal.add, lock=self.lock)
        total = self.plan.bytes_in + self.plan.bytes_out

        def tick() -> bool:
            if not self.asked_to_stop.is_set() and progress is not None:
                progress(min(loop.totals.done + self.outcome.resumed_bytes, total), total)
            return self.asked_to_stop.is_set()

        try:
            complete = loop.run(Threads(self.plan.budget.workers), tick)
        finally:
            self.outcome.warnings += [w for w in loop.totals.warnings if w not in self.outcome.warnings]
            self.outcome.bytes_read, self.outcome.bytes_written = loop.totals.read, loop.totals.written
        if not complete:
            raise Interrupted(
                f"stopped; {self.outcome.partial} keeps what is done, and the same command goes on from there"
            )

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


def _identities(plan: Plan) -> list[list[Any]] | None:
    """What shows that files are those that they were; None where for one of them nothing does."""
    leaves = {id(c): c for m in plan.inputs for c in (m.checkpoint.parts or (m.checkpoint,))}
    headers = {h.path: h for c in leaves.values() for h in c.files}
    if any(h.inode is None for h in headers.values()):
        return None
    return [[h.path, h.size, h.mtime_ns, *(h.inode or ())] for h in headers.values()]


def _claimed(partial: str, journal: Journal) -> bool:
    """Make the directory, or take over one of ours, and lock its journal. Whether there is work of this plan in it.

    Raises OutputError.
    """
    try:
        make_folders(os.path.dirname(partial))
        with alone_in(os.path.dirname(partial)):
            found = os.path.lexists(partial)
            make_folders(partial)
            if found:  # what was made just now is ours, whoever the file system says it belongs to
                check_trusted(partial)
            held = sorted(os.listdir(partial))
            if os.path.islink(partial) or (held and not is_partial(partial, held)):
                raise OutputError(f"{partial}: needed for unfinished work, but it holds something else; move it away")
            return journal.open()
    except OutputError:
        raise
    except OSError as e:
        raise OutputError(f"{partial}: can't be written: {e.strerror or e}") from e


def _clear(directory: str, keep: Set[str] = frozenset()) -> None:
    """Remove the files of an unfinished merge but for those to `keep`, and the directory if there are none."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        within = {k.partition("/")[2] for k in keep if k.startswith(name + "/")}
        if within and os.path.isdir(path) and not os.path.islink(path):
            _clear(path, within)
        elif name not in keep or os.path.islink(path) or _shared(path):
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    if not keep:
        os.rmdir(directory)


def _shared(path: str) -> bool:
    """Whether a file has another name besides: what is written into it would be written there too."""
    return os.lstat(path).st_nlink > 1 and not os.path.isdir(path)
