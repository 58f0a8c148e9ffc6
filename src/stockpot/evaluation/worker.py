"""The process that makes candidates and scores them; `pool.py` is the other end of its connection.

    python -m stockpot.evaluation.worker FD

It gets (suite, bytes for snapshots, threads, scratch directory) and says ("ready", parts). Then it answers "make" with
("made", digest, seconds) and "score" with ("scored", Scores); what goes wrong is ("failed", text).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import blake3

from stockpot.checkpoints.hub import fetch_missing
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.engine.candidates import Candidate, CheckpointCache, make_candidate
from stockpot.errors import StockpotError
from stockpot.evaluation.external import stop_commands, told_of_commands
from stockpot.evaluation.loaded import LoadedModel
from stockpot.evaluation.parts import Part, infos, open_parts
from stockpot.evaluation.pool import Task
from stockpot.evaluation.scores import checked_scores
from stockpot.evaluation.suite import Suite
from stockpot.planning.planner import build_plan
from stockpot.recipes.parsing import load_recipe

__all__ = ["main"]

_PROGRESS_SECONDS = 0.2


class Worker:
    """One loaded model, one candidate at a time."""

    def __init__(self, connection: Connection, suite: Suite, memory: int, threads: int, scratch: str | None) -> None:
        self.connection = connection
        self.suite = suite
        self.threads = threads
        self.cache = CheckpointCache(memory)
        self.loaded = LoadedModel(suite, threads, scratch)
        self.parts: dict[str, list[Part]] = {}
        self._last = 0.0

    def open(self) -> list[Any]:
        parts = open_parts(self.suite)
        found = infos(parts, self.suite)
        for info, part in zip(found, parts, strict=True):
            self.parts.setdefault(info.key, []).append(part)
        return found

    def make(self, task: Task) -> tuple[str, float]:
        """Put the candidate in; (its digest, seconds)."""
        began = time.monotonic()
        self.loaded.forget()
        plan = build_plan(load_recipe(task.recipe), threads=self.threads)
        if fetch_missing(m.checkpoint for m in plan.inputs):
            plan = build_plan(plan.recipe, threads=self.threads)
        candidate = make_candidate(plan, self.cache, self.threads)
        self.loaded.put(candidate)
        if task.bare:
            self.loaded.put(None)
        return self._digest(candidate, bare=task.bare), time.monotonic() - began

    def _digest(self, candidate: Candidate, *, bare: bool) -> str:
        """Of all of a candidate that scores depend on: its content, its tokenizer, and the base it is loaded onto."""
        base = base_digest(self.loaded.base_path()) if candidate.kind == "adapter" else ""
        parts = ["" if bare else candidate.digest, base, self.loaded.tokenizer_files()]
        return blake3.blake3("\n".join(parts).encode()).hexdigest()

    def score(self, key: str) -> Any:
        part, *others = self.parts[key]
        before = os.getcwd()
        try:
            raw = part.evaluator.score(self.loaded, self._progress)
        finally:
            os.chdir(before)
            if part.slice.kind == "python":
                self.loaded.check_untouched()
        scores = checked_scores(raw, part.slice.metric, f"slice {part.slice.name!r}")
        for other in others:
            checked_scores(scores, other.slice.metric, f"slice {other.slice.name!r}")
        if not scores.ids:
            scores.ids = part.evaluator.ids
        return scores

    def _progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= _PROGRESS_SECONDS:
            self._last = now
            self.connection.send(("progress", done, total))

    def serve(self) -> None:
        """Until the other end is gone."""
        while True:
            self.connection.send(self.answer(*self.connection.recv()))

    def answer(self, kind: str, argument: Any) -> tuple[Any, ...]:
        """What to say to one request; whatever an evaluator raises is an answer too."""
        began = time.monotonic()
        try:
            if kind == "make":
                return ("made", *self.make(argument))
            scores = self.score(argument)
            scores.seconds = scores.seconds or time.monotonic() - began
            return ("scored", scores)
        except StockpotError as e:
            return ("failed", str(e))
        except Exception as e:
            traceback.print_exc()
            return ("failed", f"{type(e).__name__}: {e}")


def base_digest(path: str) -> str:
    """Of a base model: its configuration, and headers, sizes and times of its weights; a change of any scores it again."""
    checkpoint = open_checkpoint(path)
    hashed = blake3.blake3(json.dumps(dict(checkpoint.config), sort_keys=True).encode())
    for name in ("generation_config.json", "adapter_config.json"):
        beside = os.path.join(checkpoint.directory, name)
        if os.path.isfile(beside):
            with open(beside, "rb") as f:
                hashed.update(f.read())
    for header in checkpoint.files:
        hashed.update(header.raw)
        hashed.update(f"{header.size} {header.mtime_ns}\n".encode())
    return hashed.hexdigest()


def _terminate(*_: object) -> None:
    stop_commands()
    os._exit(143)


def _watch(parent: int, scratch: list[str | None]) -> None:
    """End with the parent, and with all that evaluators started: one that was killed can't say goodbye."""
    while os.getppid() == parent:
        time.sleep(0.5)
    stop_commands()
    for folder in scratch:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Serve the connection whose file descriptor is the argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops its workers
    signal.signal(signal.SIGTERM, _terminate)
    connection = Connection(int(sys.argv[1]))
    scratch: list[str | None] = []
    threading.Thread(target=_watch, args=(os.getppid(), scratch), daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionError, KeyboardInterrupt):
        settings = connection.recv()
        scratch.append(settings[-1])
        worker = Worker(connection, *settings)
        told_of_commands.append(lambda group: connection.send(("command", group)))
        try:
            found = worker.open()
        except StockpotError as e:
            connection.send(("error", e))
            return
        connection.send(("ready", found))
        try:
            worker.serve()
        finally:
            worker.loaded.discard()


if __name__ == "__main__":
    main()
