"""The journal of a merge in progress: which pieces are safely on disk, with what was seen of them.

One JSON object a line. The first names the plan (its identity); each other holds rows of the ledger, written only after the
pieces' bytes were flushed. A line cut short by a crash is dropped. The file is locked while a merge runs.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.engine.ledger import Ledger
from stockpot.errors import OutputError

__all__ = ["Journal"]

NAME = "stockpot.journal"
_INTERVAL = 1.0
_FORMAT = 3


@dataclass
class Journal:
    """Append-only. `add` queues pieces; a background thread flushes data, then what is known of them, about once a second."""

    path: str
    identity: str
    ledger: Ledger
    flush_data: Callable[[], None]
    #: rows of the ledger that an earlier run vouches for, with what it saw of them
    found: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: BaseException | None = None
    _queue: list[tuple[Any, Sequence[str]]] = field(default_factory=list)
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
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        break
                    self.found.append(self.ledger.decode(row))
                except (ValueError, RecursionError):
                    break
                told = row.get("warnings")
                self.warnings += [str(w) for w in told] if isinstance(told, list) else []
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

    def add(self, rows: Any, warnings: Sequence[str] = ()) -> None:
        """Queue finished pieces, which the ledger knows. Raises what the background thread failed with."""
        if self.error is not None:
            raise self.error
        with self._lock:
            self._queue.append((rows, warnings))

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
            row: dict[str, Any] = self.ledger.encode(np.concatenate([rows for rows, _ in batch]))
            warnings = list(dict.fromkeys(w for _, told in batch for w in told))
            self._append(json.dumps(row | ({"warnings": warnings} if warnings else {})) + "\n")

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
