"""Worker processes that make candidates and score them: several at once, each with one loaded model.

A process of its own is what lets a hanging evaluator be stopped, and keeps torch out of the process that the user talks to.
A worker that dies or takes too long costs the evaluation it was at; another one takes its place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from stockpot.errors import EvaluationError, OutputError
from stockpot.evaluation.parts import PartInfo
from stockpot.evaluation.scores import Scores
from stockpot.evaluation.suite import Suite
from stockpot.machine import available_threads, memory
from stockpot.specs import format_size

__all__ = ["Recorder", "Task", "WorkerPool", "as_it_is", "memory_for_snapshots", "score_all"]

_START_SECONDS = 300.0
#: what the parent allows over an evaluator's own limit, which a command keeps by itself
_GRACE = 2.0
_COMMAND_GRACE = 120.0


@dataclass(frozen=True)
class Task:
    """One candidate: a recipe as a mapping. bare: the base that the recipe's adapter is loaded onto is scored instead."""

    name: str
    recipe: Mapping[str, Any]
    bare: bool = False


class Recorder(Protocol):
    """What is told as it happens, from the thread that called `WorkerPool.run`. Exceptions end the run."""

    def made(self, task: Task, digest: str, seconds: float) -> Sequence[str]:
        """A candidate is there: the keys of the parts that it must be scored on (none: it is known)."""
        ...

    def scored(self, task: Task, digest: str, key: str, scores: Scores) -> None: ...

    def failed(self, task: Task, digest: str | None, key: str | None, error: str) -> None: ...

    def progress(self, task: Task, label: str, done: int, total: int) -> None: ...


def memory_for_snapshots(jobs: int) -> int:
    """Bytes that each worker may keep checkpoints in: a third of what is free, shared among them."""
    found = memory()
    room = [n for n in (found["available"] or found["total"], found["container_limit"]) if n]
    return max(min(room, default=4 * 2**30) // 3 // jobs, 64 * 2**20)


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    log: Any
    task: Task | None = None
    only: list[str] | None = None
    digest: str | None = None
    part: PartInfo | None = None
    left: deque[str] = field(default_factory=deque)
    deadline: float = float("inf")
    has_scored: bool = False
    command: int = 0  # the process group of the command that it runs

    def tail(self) -> str:
        """The last lines that it printed."""
        try:
            self.log.seek(0, os.SEEK_END)
            self.log.seek(max(self.log.tell() - 2000, 0))
            lines = self.log.read().decode(errors="replace").strip().splitlines()[-3:]
        except (OSError, ValueError):
            return ""
        return "".join(f"\n    {line}" for line in lines)


class WorkerPool:
    """Use as a context. `infos` are the parts of the suite, known once the first worker has opened it.

    memory   bytes of snapshots that each worker keeps
    scratch  a directory of its own, for candidates that an evaluator wants as files; removed at the end
    """

    def __init__(self, suite: Suite, jobs: int = 1, memory: int | None = None, scratch: str | None = None) -> None:
        self.suite = suite
        self.jobs = jobs
        self.memory = memory if memory is not None else memory_for_snapshots(jobs)
        self.infos: list[PartInfo] = []
        self._workers: list[_Worker] = []
        self._waiting: deque[tuple[Task, list[str] | None]] = deque()
        self._scratch = scratch
        self.notes: list[str] = []

    def __enter__(self) -> WorkerPool:
        if self._scratch is None:
            self._scratch = tempfile.mkdtemp(
                prefix="stockpot-candidates-", dir=os.environ.get("STOCKPOT_SCRATCH") or None
            )
        else:
            _own_directory(self._scratch)
        try:
            self._workers.append(self._start())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            self._stop(worker)
        self._workers.clear()
        self._waiting.clear()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def info(self, key: str) -> PartInfo:
        """The first part of a key: slices of the same data and options share one."""
        return next(i for i in self.infos if i.key == key)

    # workers

    def _start(self) -> _Worker:
        """A worker that has opened the suite. Raises what it found wrong with it."""
        ours, theirs = socket.socketpair()
        threads = max(available_threads() // self.jobs, 1)
        log = tempfile.TemporaryFile()
        # what this process can import the worker can, but nothing from a directory that happens to be the current one
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONSAFEPATH": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "stockpot.evaluation.worker", str(theirs.fileno())], pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        worker = _Worker(process, Connection(ours.detach()), log)
        try:
            worker.connection.send((self.suite, self.memory, threads, self._scratch))
            if not worker.connection.poll(_START_SECONDS):
                raise EvaluationError(f"the worker did not open the suite within {_START_SECONDS:g} s{worker.tail()}")
            kind, content = worker.connection.recv()
        except (EOFError, OSError) as e:
            tail = worker.tail()
            raise EvaluationError(f"the worker died with {self._stop(worker)} as it started{tail}") from e
        except BaseException:
            self._stop(worker)
            raise
        if kind == "error":
            self._stop(worker)
            raise content
        if self.infos and [i.key for i in content] != [i.key for i in self.infos]:
            self._stop(worker)
            raise EvaluationError(f"{self.suite.path}: the suite's data changed while it was used; start again")
        self.infos = content
        return worker

    def _room_for_another(self) -> bool:
        """Whether memory allows one more worker, judged by the largest that one has grown; the first must have scored."""
        if not self._workers:
            return True
        if not any(w.has_scored for w in self._workers):
            return False
        grown = max((_peak_memory(w.process.pid) for w in self._workers), default=0)
        found = memory()
        room = [n for n in (found["available"], found["container_limit"]) if n]
        if grown and room and min(room) < 1.2 * grown:
            self.jobs = len(self._workers)
            self.notes.append(
                f"{self.jobs} of the jobs asked for: another would need {format_size(grown)}, {format_size(min(room))} is free"
            )
            return False
        return True

    @staticmethod
    def _stop(worker: _Worker) -> int:
        """End it, asking first: it stops the commands that it runs. Its exit code."""
        with contextlib.suppress(OSError):
            worker.connection.close()
        worker.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(2)
        for group in (worker.process.pid, worker.command):  # with what evaluators have started
            if group:
                with contextlib.suppress(OSError):
                    os.killpg(group, signal.SIGKILL)
        code = worker.process.wait()
        worker.log.close()
        return code

    # tasks

    def run(self, tasks: Iterable[Task], recorder: Recorder) -> None:
        """Make and score every task. Raises only what the recorder raises, and where no worker can be started."""
        self._waiting.extend((task, None) for task in tasks)
        while self._waiting or any(w.task is not None for w in self._workers):
            busy = sum(w.task is not None for w in self._workers)
            while len(self._workers) < min(self.jobs, len(self._waiting) + busy) and self._room_for_another():
                self._workers.append(self._start())
            for worker in list(self._workers):
                if worker.task is None and worker.process.poll() is not None:
                    self._stop(worker)  # it died while there was nothing to do
                    self._workers.remove(worker)
                elif worker.task is None and self._waiting:
                    self._give(worker, *self._waiting.popleft(), recorder)
            if any(w.task is not None for w in self._workers):
                self._listen(recorder)

    def _give(self, worker: _Worker, task: Task, only: list[str] | None, recorder: Recorder) -> None:
        worker.task, worker.only, worker.digest, worker.part = task, only, None, None
        worker.left.clear()
        worker.deadline = float("inf")
        try:
            worker.connection.send(("make", task))
        except OSError:
            self._lost(worker, recorder)

    def _listen(self, recorder: Recorder) -> None:
        busy = [w for w in self._workers if w.task is not None]
        nearest = min((w.deadline for w in busy), default=float("inf"))
        ready = wait([w.connection for w in busy], timeout=min(max(nearest - time.monotonic(), 0.0), 0.5))
        for worker in busy:
            if worker.connection in ready:
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self._lost(worker, recorder)
                    continue
                self._hear(worker, message, recorder)
            elif worker.process.poll() is not None:
                self._lost(worker, recorder)  # its end may be held open by what it had started
            elif time.monotonic() > worker.deadline:
                self._hang(worker, recorder)

    def _hear(self, worker: _Worker, message: tuple[Any, ...], recorder: Recorder) -> None:
        kind, *content = message
        assert worker.task is not None
        if kind == "made":
            worker.digest, seconds = content
            asked = recorder.made(worker.task, str(worker.digest), seconds) if worker.only is None else worker.only
            worker.left = deque(asked)
            self._next(worker, recorder)
        elif kind == "command":
            worker.command = content[0]
        elif kind == "progress":
            recorder.progress(worker.task, worker.part.label if worker.part else "", *content)
        elif kind == "scored":
            key = worker.left.popleft()
            worker.has_scored = True
            recorder.scored(worker.task, str(worker.digest), key, content[0])
            self._next(worker, recorder)
        elif kind == "failed":
            key_or_none = worker.left.popleft() if worker.left else None
            recorder.failed(worker.task, worker.digest, key_or_none, content[0])
            if key_or_none is None:
                worker.task = None
            else:
                self._next(worker, recorder)

    def _next(self, worker: _Worker, recorder: Recorder) -> None:
        """Score the next part, or be free."""
        assert worker.task is not None
        if not worker.left:
            worker.task, worker.part, worker.deadline = None, None, float("inf")
            return
        worker.part = self.info(worker.left[0])
        part = self.suite.slice(worker.part.slice)
        # a command keeps its limit by itself, once the candidate that it wants was written
        worker.deadline = time.monotonic() + part.timeout + (_COMMAND_GRACE if part.kind == "command" else _GRACE)
        recorder.progress(worker.task, worker.part.label, 0, worker.part.n)
        try:
            worker.connection.send(("score", worker.part.key))
        except OSError:
            self._lost(worker, recorder)

    def _hang(self, worker: _Worker, recorder: Recorder) -> None:
        assert worker.part is not None
        limit = self.suite.slice(worker.part.slice).timeout
        self._lost(
            worker,
            recorder,
            f"did not end within {limit:g} s and was stopped (after raising the timeout: --retry-failed)",
        )

    def _lost(self, worker: _Worker, recorder: Recorder, why: str | None = None) -> None:
        """A worker is gone or is to go: note it, and put what was left of the candidate first in the queue."""
        task, left = worker.task, list(worker.left)
        assert task is not None
        if why is None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed its end and live on
                worker.process.wait(1)
            code, tail = worker.process.returncode, worker.tail()
            how = "it closed its connection" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
            why = f"the process that scored it died ({how}{', out of memory?' if code == -9 else ''}){tail}"
        self._stop(worker)
        self._workers.remove(worker)
        if left[1:]:
            self._waiting.appendleft((task, left[1:]))
        recorder.failed(task, worker.digest, left[0] if left else None, why)


def _own_directory(path: str) -> None:
    """An empty directory of ours: one that a killed sweep left is emptied, anything else is left alone. Raises OutputError."""
    mark = os.path.join(path, ".stockpot")
    if os.path.exists(path) and not os.path.exists(mark):
        raise OutputError(f"{path}: is in the way of the candidates that are written for commands; move it")
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    with open(mark, "w"):
        pass


def _peak_memory(pid: int) -> int:
    """Most bytes that a process has had in memory; 0 where that can't be told."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        return 0


def as_it_is(ref: str) -> dict[str, Any]:
    """The recipe of a checkpoint itself."""
    return {"merge_method": "passthrough", "models": [{"model": os.path.abspath(ref) if os.path.exists(ref) else ref}]}


def score_all(
    pool: WorkerPool, tasks: Sequence[Task], wanted: Sequence[PartInfo], shown: Any = None
) -> dict[str, dict[tuple[str, str], Scores]]:
    """Scores of every task on the wanted parts, by (slice, split). Raises EvaluationError for the first that fails."""
    collected = _Collector(pool, wanted, shown)
    pool.run(tasks, collected)
    return collected.found


@dataclass
class _Collector:
    pool: WorkerPool
    wanted: Sequence[PartInfo]
    shown: Any = None
    found: dict[str, dict[tuple[str, str], Scores]] = field(default_factory=dict)

    def made(self, task: Task, digest: str, seconds: float) -> Sequence[str]:
        self.found.setdefault(task.name, {})
        return list(dict.fromkeys(i.key for i in self.wanted))

    def scored(self, task: Task, digest: str, key: str, scores: Scores) -> None:
        for info in self.wanted:
            if info.key == key:  # slices of the same data and options are scored once
                self.found[task.name][info.slice, info.split] = scores

    def failed(self, task: Task, digest: str | None, key: str | None, error: str) -> None:
        what = f", {self.pool.info(key).label}" if key else ""
        raise EvaluationError(f"{task.name}{what}: {error}")

    def progress(self, task: Task, label: str, done: int, total: int) -> None:
        if self.shown is not None:
            self.shown(task.name, label, done, total)
