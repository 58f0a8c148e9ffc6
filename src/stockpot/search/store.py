"""What a sweep knows, in SQLite: candidates, and scores filed under what was scored and on what.

A score is committed the moment it is there, so that a sweep that is killed loses the one evaluation it was at.
"""

from __future__ import annotations

import io
import json
import math
import os
import sqlite3
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from stockpot.errors import ArgumentError, OutputError
from stockpot.evaluation.scores import Scores
from stockpot.search.candidates import Tried

__all__ = ["NAME", "ScoreStore"]

NAME = "sweep.sqlite"
_FORMAT = 1
#: bytes of the scores of a slice's examples, at most: some million examples
_MOST_UNPACKED = 2**27
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS candidates (
    name TEXT PRIMARY KEY, position INTEGER NOT NULL, stage TEXT NOT NULL, recipe TEXT NOT NULL, settings TEXT NOT NULL,
    weights TEXT NOT NULL, bare INTEGER NOT NULL, digest TEXT, seconds REAL, error TEXT
);
CREATE TABLE IF NOT EXISTS scores (
    digest TEXT NOT NULL, part TEXT NOT NULL, slice TEXT NOT NULL, split TEXT NOT NULL, metrics TEXT NOT NULL,
    examples BLOB NOT NULL, seconds REAL NOT NULL, at REAL NOT NULL, PRIMARY KEY (digest, part)
);
CREATE TABLE IF NOT EXISTS failures (
    digest TEXT NOT NULL, part TEXT NOT NULL, slice TEXT NOT NULL, split TEXT NOT NULL, error TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (digest, part)
);
"""


class ScoreStore:
    """The database of one sweep. Raises OutputError when it can't be written, with what is in it kept.

    exclusive  refuse where another process has it open so: two sweeps would undo each other's work
    """

    def __init__(self, folder: str, *, exclusive: bool = False) -> None:
        self.path = os.path.join(folder, NAME)
        self._lock = _lock(folder) if exclusive else None
        with self._guard():
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(
                "PRAGMA synchronous = NORMAL"
            )  # survives a killed process; after a power cut a score may be missing
            self._db.executescript(_TABLES)
        found = self.meta("format")
        if found is None:
            self.set_meta("format", _FORMAT)
        elif found != _FORMAT:
            raise ArgumentError(
                f"{self.path}: written by another version of stockpot (format {found}, this one knows {_FORMAT})"
            )

    def close(self) -> None:
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as e:
            hint = (
                "; what was scored so far is kept, and the same command goes on"
                if "full" in str(e) or "I/O" in str(e)
                else ""
            )
            raise OutputError(f"{self.path}: {e}{hint}") from e

    # facts about the sweep

    def meta(self, key: str) -> Any:
        with self._guard():
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_meta(self, key: str, value: Any) -> None:
        with self._guard():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    # candidates

    def clear_candidates(self) -> None:
        """Forget which candidates there were, not what was scored: a sweep names them anew each time. Until it has ended
        there are no `keys`, so that a half-finished one is not taken for a result.
        """
        with self._guard():
            self._db.execute("DELETE FROM candidates")
            self._db.execute("DELETE FROM meta WHERE key = 'keys'")

    def add(self, tried: Sequence[Tried], position: int) -> None:
        rows = [
            (
                t.name,
                position + i,
                t.stage,
                json.dumps(t.recipe),
                json.dumps(t.settings),
                json.dumps(dict(t.weights)),
                int(t.bare),
            )
            for i, t in enumerate(tried)
        ]
        with self._guard():
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT OR REPLACE INTO candidates (name, position, stage, recipe, settings, weights, bare) "
                "VALUES (?,?,?,?,?,?,?)",
                rows,
            )
            self._db.execute("COMMIT")

    def made(self, name: str, digest: str, seconds: float) -> None:
        with self._guard():
            self._db.execute(
                "UPDATE candidates SET digest = ?, seconds = ?, error = NULL WHERE name = ?", (digest, seconds, name)
            )

    def not_made(self, name: str, error: str) -> None:
        with self._guard():
            self._db.execute("UPDATE candidates SET error = ? WHERE name = ?", (error, name))

    def candidates(self) -> list[tuple[Tried, str | None, float | None, str | None]]:
        """(candidate, digest, seconds to make it, why it could not be made) in the order in which they were tried."""
        with self._guard():
            rows = self._db.execute(
                "SELECT name, stage, recipe, settings, weights, bare, digest, seconds, error FROM candidates ORDER BY position"
            ).fetchall()
        return [
            (
                Tried(n, stage, json.loads(r), json.loads(s), {int(k): v for k, v in json.loads(w).items()}, bool(bare)),
                digest, seconds, error,
            )
            for n, stage, r, s, w, bare, digest, seconds, error in rows
        ]  # fmt: skip

    # scores

    def scored(self, digest: str, part: str, where: tuple[str, str], scores: Scores) -> None:
        with self._guard():
            self._db.execute(
                "INSERT OR REPLACE INTO scores VALUES (?,?,?,?,?,?,?,?)",
                (digest, part, *where, json.dumps(dict(scores)), _packed(scores), scores.seconds, time.time()),
            )

    def failed(self, digest: str, part: str, where: tuple[str, str], error: str) -> None:
        with self._guard():
            self._db.execute(
                "INSERT OR REPLACE INTO failures VALUES (?,?,?,?,?,?)", (digest, part, *where, error, time.time())
            )

    def forget_failures(self) -> None:
        with self._guard():
            self._db.execute("DELETE FROM failures")

    def failure(self, digest: str, part: str) -> str | None:
        with self._guard():
            row = self._db.execute(
                "SELECT error FROM failures WHERE digest = ? AND part = ?", (digest, part)
            ).fetchone()
        return None if row is None else str(row[0])

    def scores(self, digest: str, parts: Mapping[str, str], metrics: Mapping[str, str]) -> dict[str, Scores]:
        """What is known of a candidate; parts, metrics: by slice. Slices not scored, or not by that metric, are missing."""
        out = {}
        with self._guard():
            for name, key in parts.items():
                row = self._db.execute(
                    "SELECT metrics, examples, seconds FROM scores WHERE digest = ? AND part = ?", (digest, key)
                ).fetchone()
                found = None if row is None else _unpacked(row[0], row[1], row[2])
                if found is not None and math.isfinite(found.get(metrics[name], math.nan)):
                    out[name] = found
        return out


def _lock(folder: str) -> int | None:
    """A lock on the directory itself, gone with the process. Raises OutputError where another holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise OutputError(f"{folder}: another sweep is running there") from None
    except OSError:  # a file system without locks
        pass
    return fd


def _packed(scores: Scores) -> bytes:
    arrays: dict[str, Any] = {f"x_{k}": v for k, v in scores.examples.items()}
    if scores.counts is not None:
        arrays["counts"] = scores.counts
    if scores.ids:
        arrays["ids"] = np.array(scores.ids)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _unpacked(metrics: str, blob: bytes, seconds: float) -> Scores:
    with zipfile.ZipFile(io.BytesIO(blob)) as packed:
        unpacked = sum(i.file_size for i in packed.infolist())
    if unpacked > _MOST_UNPACKED:
        raise OutputError(f"scores of single examples take {unpacked} bytes, more than {_MOST_UNPACKED} are not taken")
    with np.load(io.BytesIO(blob), allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    examples = {k.removeprefix("x_"): v for k, v in arrays.items() if k.startswith("x_")}
    ids = tuple(map(str, arrays.get("ids", ())))
    return Scores(json.loads(metrics), examples=examples, counts=arrays.get("counts"), ids=ids, seconds=seconds)
