"""The journal of a merge in progress: which pieces are safely on disk, with their digests.

One JSON object a line. The first names the plan (its identity); each other is one finished unit, written only after the
unit's bytes were flushed. A line cut short by a crash is dropped. The file is locked while a merge runs.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stockpot.engine.measures import Measure
from stockpot.errors import OutputError

__all__ = ["Journal", "Record"]

NAME = "stockpot.journal"
_INTERVAL = 1.0
_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Record:
    """Pieces first..last of a tensor: digests of the output's pieces and of each input's, measures of the output and of each
    input, and a warning if any.
    """

    tensor: int
    first: int
    last: int
    out: tuple[bytes, ...]
    inputs: tuple[tuple[bytes, ...], ...]
    measures: tuple[Measure, ...]
    warning: str | None = None

    def encode(self) -> str:
        row: list[Any] = [
            self.tensor,
            self.first,
            self.last,
            b"".join(self.out).hex(),
            [b"".join(d).hex() for d in self.inputs],
            [[m.squares, m.nans, m.infinities] for m in self.measures],
        ]
        if self.warning:
            row.append(self.warning)
        return json.dumps(row, separators=(",", ":"))

    @classmethod
    def decode(cls, row: Any) -> Record:
        """The inverse of encode. ValueError for anything that encode does not write."""
        if not (isinstance(row, list) and len(row) in (6, 7) and all(type(v) is int for v in row[:3])):
            raise ValueError("not a record")
        if not isinstance(row[4], list) or not all(isinstance(v, str) for v in (row[3], *row[4], *row[6:])):
            raise ValueError("not a record")
        if not isinstance(row[5], list) or not all(_is_measure(m) for m in row[5]):
            raise ValueError("not a record")
        measures = tuple(Measure(float(s), nans, infinities) for s, nans, infinities in row[5])
        warning = row[6] if len(row) == 7 else None
        return cls(row[0], row[1], row[2], _split(row[3]), tuple(map(_split, row[4])), measures, warning)


def _is_measure(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and type(value[0]) in (int, float)
        and all(type(v) is int and v >= 0 for v in value[1:])
    )


def _split(text: str) -> tuple[bytes, ...]:
    raw = bytes.fromhex(text)
    return tuple(raw[i : i + 32] for i in range(0, len(raw), 32))


@dataclass
class Journal:
    """Append-only. `add` queues a record; a background thread flushes data, then records, about once a second."""

    path: str
    identity: str
    flush_data: Callable[[], None]
    records: list[Record] = field(default_factory=list)
    error: BaseException | None = None
    _queue: list[Record] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _fd: int = -1
    _thread: threading.Thread | None = None

    def open(self) -> bool:
        """Lock the file and read what it holds. True when it belongs to this plan; else it is started anew.

        Raises OutputError when another merge holds the lock.
        """
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        _lock_file(self._fd, self.path)
        with open(self.path, "rb") as f:
            raw = f.read()
        lines = raw.split(b"\n")
        resumed = False
        keep = 0
        if len(lines) > 1 and _first_line(lines[0]) == self.identity:
            resumed = True
            keep = len(lines[0]) + 1
            for line in lines[1:-1]:
                try:
                    record = Record.decode(json.loads(line))
                except (ValueError, RecursionError):
                    break
                self.records.append(record)
                keep += len(line) + 1
        os.ftruncate(self._fd, keep)
        os.lseek(self._fd, keep, os.SEEK_SET)
        return resumed

    def begin(self, *, resumed: bool) -> None:
        """Write the first line of a new journal and start the background thread."""
        if not resumed:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._append(json.dumps({"stockpot_journal": _FORMAT, "plan": self.identity}) + "\n")
        self._thread = threading.Thread(target=self._run, name="stockpot-journal", daemon=True)
        self._thread.start()

    def add(self, record: Record) -> None:
        """Queue a finished unit. Raises what the background thread failed with."""
        if self.error is not None:
            raise self.error
        with self._lock:
            self._queue.append(record)

    def _append(self, text: str) -> None:
        view = memoryview(text.encode())
        try:
            while len(view):
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError as e:
            raise OutputError(f"{self.path}: can't be written: {e.strerror or e}") from e

    def commit(self) -> None:
        """Flush data, then record it."""
        with self._lock:
            batch, self._queue = self._queue, []
        if batch:
            self.flush_data()
            self._append("".join(r.encode() + "\n" for r in batch))

    def _run(self) -> None:
        try:
            while not self._stop.wait(_INTERVAL):
                before = time.monotonic()
                self.commit()
                # a slow disk must not be asked to flush all the time
                self._stop.wait(time.monotonic() - before)
        except BaseException as e:
            self.error = e

    def close(self, *, commit: bool) -> None:
        """Stop the thread and commit what is queued if asked. The lock is kept until `unlock`."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if commit and self.error is None:
            self.commit()
        if commit and self.error is not None:
            raise self.error

    def unlock(self) -> None:
        """Close the file, and with it release the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _first_line(line: bytes) -> str | None:
    try:
        doc = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return doc.get("plan") if isinstance(doc, dict) and doc.get("stockpot_journal") == _FORMAT else None


def _lock_file(fd: int, path: str) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        raise OutputError(f"{os.path.dirname(path)}: another merge is writing here right now") from e
