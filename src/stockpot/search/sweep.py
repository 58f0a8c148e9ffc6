"""Runs a sweep: stages are asked for candidates, workers make and score them, the store remembers, the winner is scored again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.errors import ArgumentError, EvaluationError, OutputError
from stockpot.evaluation.parts import open_parts
from stockpot.evaluation.pool import Task, WorkerPool, as_it_is
from stockpot.evaluation.scores import Scores
from stockpot.evaluation.suite import Suite
from stockpot.runs import Run
from stockpot.search.candidates import Tried, single
from stockpot.search.grid import Simplex, grid_candidates
from stockpot.search.options import SweepOptions
from stockpot.search.result import REFERENCE_STAGES, SweepResult, goodness, make_result, references_of
from stockpot.search.stages import STAGE_FUNCTIONS, Stage
from stockpot.search.store import ScoreStore

__all__ = ["Shown", "SweepJob", "read_sweep", "run_sweep"]

#: told as it happens: (candidates done, candidates known, what is being done)
Shown = Callable[[int, int, str], None]
SCRATCH = "candidates.tmp"


@dataclass(frozen=True)
class SweepJob:
    """What a sweep is over: the snapshots of a run, or a recipe with a grid.

    The suite's base, a full model that a full run started from, is scored as a reference (of adapters it is known by itself).
    """

    suite: Suite
    out: str
    run: Run | None = None
    options: SweepOptions = field(default_factory=SweepOptions)
    recipe: Mapping[str, Any] | None = None
    grid: Mapping[str, Sequence[Any] | Simplex] = field(default_factory=dict)
    jobs: int = 1
    memory: int | None = None
    retry_failed: bool = False

    @property
    def what(self) -> str:
        """What is swept, for people and to know the same sweep again."""
        return f"run {os.path.realpath(self.run.path)}" if self.run is not None else f"recipe {self.recipe!r}"


def run_sweep(job: SweepJob, shown: Shown | None = None) -> SweepResult:
    """Try and score everything; a sweep that was stopped goes on. Raises StockpotError; what was scored is kept."""
    open_parts(job.suite, light=True)  # mistakes in data are said before anything is made or started
    try:
        os.makedirs(job.out, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{job.out}: can't be created: {e.strerror or e}") from e
    store = ScoreStore(job.out, exclusive=True)
    try:
        before = store.meta("what")
        if before is not None and before != job.what:
            raise ArgumentError(f"{job.out}: holds a sweep of {before}; give this one another directory")
        store.set_meta("what", job.what)
        store.set_meta("suite", {"path": os.path.abspath(job.suite.path), "text": job.suite.text})
        store.set_meta("run", None if job.run is None else [job.run.path, job.run.pattern, job.run.metrics_file])
        store.set_meta("options", job.options.to_dict())
        if job.retry_failed:
            store.forget_failures()
        with WorkerPool(job.suite, job.jobs, job.memory, os.path.join(os.path.abspath(job.out), SCRATCH)) as pool:
            return _Sweep(job, store, pool, shown).run()
    finally:
        store.close()


class _Sweep:
    """The state of one run of a sweep, and the recorder of its pool."""

    def __init__(self, job: SweepJob, store: ScoreStore, pool: WorkerPool, shown: Shown | None) -> None:
        self.job, self.store, self.pool, self.shown = job, store, pool, shown
        self.tried: list[Tried] = []
        self.notes: list[str] = []
        self.digests: dict[str, str] = {}
        self.good: dict[str, float] = {}  # by digest: what was scored stays so
        self.split = "selection"
        self.done: set[str] = set()
        self.left: dict[str, int] = {}
        self.underway: set[tuple[str, str]] = set()
        self.evaluations = 0
        self.reused = 0
        self.splits = {i.split for i in pool.infos}
        if "selection" not in self.splits:
            raise ArgumentError(f"{job.suite.path}: no slice of split selection, so there is nothing to choose by")
        counted = {s.name for s in job.suite.slices if s.weight}
        for split in ("selection", "report"):
            missing = counted - {i.slice for i in pool.infos if i.split == split}
            if missing and split == "selection":
                names = ", ".join(sorted(missing))
                raise ArgumentError(f"{job.suite.path}: slices without selection data can't be chosen by: {names}; "
                                    "give them weight 0, or data of split selection")  # fmt: skip
            if missing and split in self.splits:
                self.notes.append(f"no report score: {', '.join(sorted(missing))} have no report data")
                self.splits.discard(split)

    def run(self) -> SweepResult:
        self.store.clear_candidates()
        self._score(self._references())
        if self.job.run is not None:
            for name in self.job.options.stages:
                self._run_stage(STAGE_FUNCTIONS[name](self.job.run, self.job.options, self.tried, self.notes))
        else:
            assert self.job.recipe is not None
            self._score(list(grid_candidates(self.job.recipe, self.job.grid)))
        self._score_again()
        self.store.set_meta("keys", {s: self._keys(s) for s in ("selection", "report")})
        self.notes += self.pool.notes
        self.store.set_meta("notes", self.notes)
        if self.shown is not None:
            self.shown(len(self.done), len(self.tried), "intervals")
        return read_result(self.job.suite, self.store, self.job.run, evaluations=self.evaluations, reused=self.reused)

    # candidates

    def _references(self) -> list[Tried]:
        """The final checkpoint, the last merging one, the base."""
        run, suite, out = self.job.run, self.job.suite, []
        base = [Tried("base", "reference", as_it_is(suite.resolve(suite.base)))] if suite.base else []
        if run is None:
            return base
        last = run.final or run.last_merging
        if run.final is not None:
            out.append(single(run.final, "final"))
        if run.last_merging is not None:
            out.append(single(run.last_merging, "last_merging"))
        if last is not None and last.kind == "adapter":
            recipe = single(last, "base").recipe
            out.append(Tried("base", "reference", recipe, {}, {}, bare=True))
        else:
            out += base
        return out

    def _run_stage(self, stage: Stage) -> None:
        batch: list[Tried] | None = next(stage)
        while batch is not None:
            self._score(batch)
            try:
                batch = stage.send(self.goodness())
            except StopIteration:
                batch = None

    def _score(self, batch: list[Tried]) -> None:
        """Make and score those that are not there under their names yet."""
        names = {t.name for t in self.tried}
        new = [t for t in {t.name: t for t in batch}.values() if t.name not in names]
        if not new:
            return
        self.store.add(new, len(self.tried))
        self.tried += new
        self.pool.run([t.task() for t in new], self)

    def _score_again(self) -> None:
        """The winner, and what it is compared with, on the report split."""
        if "report" not in self.splits:
            return
        good = self.goodness()
        merges = [t for t in self.tried if t.name in good and t.stage not in REFERENCE_STAGES]
        winner = max(merges, key=lambda t: good[t.name], default=None)
        if winner is None:
            return
        names = {winner.name, *references_of(self.tried, good, winner.name).values()}
        self.split = "report"
        self.pool.run([t.task() for t in self.tried if t.name in names and t.name in good], self)

    def goodness(self) -> dict[str, float]:
        """Of every candidate that was scored, more is better."""
        for digest in set(self.digests.values()) - self.good.keys():
            value = goodness(self.job.suite, self._known(digest, "selection"))
            if value is not None:
                self.good[digest] = value
        return {name: self.good[digest] for name, digest in self.digests.items() if digest in self.good}

    def _known(self, digest: str, split: str) -> dict[str, Scores]:
        return self.store.scores(digest, self._keys(split), metrics_of(self.job.suite))

    def _keys(self, split: str) -> dict[str, str]:
        return {i.slice: i.key for i in self.pool.infos if i.split == split}

    # what the pool tells

    def made(self, task: Task, digest: str, seconds: float) -> Sequence[str]:
        self.digests[task.name] = digest
        self.store.made(task.name, digest, seconds)
        keys = self._keys(self.split)
        known = self._known(digest, self.split)
        asked = list(dict.fromkeys(key for name, key in keys.items() if name not in known))
        # what failed before is left; what another worker is scoring under another name need not be scored again
        asked = [k for k in asked if self.store.failure(digest, k) is None and (digest, k) not in self.underway]
        self.reused += len(known)
        self.underway |= {(digest, k) for k in asked}
        self.left[task.name] = len(asked)
        if not asked:
            self._finished(task)
        return asked

    def scored(self, task: Task, digest: str, key: str, scores: Scores) -> None:
        info = self.pool.info(key)
        self.store.scored(digest, key, (info.slice, info.split), scores)
        self.evaluations += 1
        self._scored_part(task, digest, key)

    def failed(self, task: Task, digest: str | None, key: str | None, error: str) -> None:
        if digest is None or key is None:
            self.store.not_made(task.name, error)
            self._finished(task)
        else:
            info = self.pool.info(key)
            self.store.failed(digest, key, (info.slice, info.split), error)
            self._scored_part(task, digest, key)

    def progress(self, task: Task, label: str, done: int, total: int) -> None:
        if self.shown is not None:
            part = f", {done} of {total}" if total else ""
            self.shown(len(self.done), len(self.tried), f"{task.name}: {label}{part}")

    def _scored_part(self, task: Task, digest: str, key: str) -> None:
        self.underway.discard((digest, key))
        self.left[task.name] -= 1
        if not self.left[task.name]:
            self._finished(task)

    def _finished(self, task: Task) -> None:
        self.done.add(task.name)
        if self.shown is not None:
            self.shown(len(self.done), len(self.tried), task.name)


def metrics_of(suite: Suite) -> dict[str, str]:
    """The metric of each slice."""
    return {s.name: s.metric for s in suite.slices}


def read_result(suite: Suite, store: ScoreStore, run: Run | None, **facts: Any) -> SweepResult:
    """The result from what the store holds."""
    keys = store.meta("keys")
    if keys is None:
        raise EvaluationError(f"{store.path}: the sweep did not come to its end; the same command goes on")
    known = store.candidates()
    found: dict[str, dict[str, dict[str, Scores]]] = {"selection": {}, "report": {}}
    errors: dict[str, str] = {}
    for t, digest, _, _ in known:
        if digest is None:
            continue
        for split, by_slice in found.items():
            scores = store.scores(digest, keys[split], metrics_of(suite))
            if scores:
                by_slice[t.name] = scores
        for split, by_name in keys.items():
            for name, key in by_name.items():
                why = store.failure(digest, key)
                if why is not None and name not in found[split].get(t.name, {}):
                    errors.setdefault(t.name, f"{name} ({split}): {why}")
    curves = {} if run is None else dict(run.metrics.series)
    return make_result(
        suite, str(store.meta("what")), known, found["selection"], found["report"], errors,
        notes=tuple(store.meta("notes") or ()), curves=curves, **facts,
    )  # fmt: skip


def read_sweep(out: str, suite: Suite, run: Run | None) -> SweepResult:
    """The result of a sweep that has ended, without scoring anything. Raises ArgumentError where there is none."""
    from stockpot.search.store import NAME

    if not os.path.isfile(os.path.join(out, NAME)):
        raise ArgumentError(f"{out}: no sweep here ({NAME} is missing)")
    store = ScoreStore(out)
    try:
        return read_result(suite, store, run)
    finally:
        store.close()
