"""The journal of a merge in progress: which pieces are safely on disk, with what was seen of them.

One JSON object a line. The first names the plan (its identity); each other holds rows of the ledger, written only after the
pieces' bytes were flushed. A line cut short by a crash is dropped. The file is locked while a merge runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.engine.ledger import Ledger
from stockpot.errors import OutputError
from stockpot.files import write_all

__all__ = ["Journal", "locked", "published_record"]

_INTERVAL = 1.0
_FORMAT = 3


@dataclass
class Journal:
    """Append-only. `add` queues pieces; a background thread flushes data, then what is known of them, about once a second."""

    path: str
    identity: str
    ledger: Ledger
    flush_data: Callable[[], None]
    #: what shows that the inputs are the files that they were; None where nothing does
    inputs: Sequence[Sequence[Any]] | None = None
    #: whether they are those of an earlier run's
    same_inputs: bool = False
    #: files at a URL that an upload from here was to remove, and may not have
    noted: list[str] = field(default_factory=list)
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
        self._fd = _open_locked(self.path, os.O_RDWR | os.O_CREAT)
        try:
            raw = _whole(self._fd)
            self.noted = _noted(raw)
            resumed = self._read(raw)
            if not resumed:
                os.ftruncate(self._fd, 0)
                self._append(self._first())
        except OSError as e:
            self.unlock()
            raise OutputError(f"{self.path}: can't be written: {e.strerror or e}") from e
        return resumed

    def _read(self, raw: bytes) -> bool:
        """Take over what the file holds, cut off where it stops making sense. Whether it is of this plan."""
        lines = raw.split(b"\n")
        resumed = False
        if len(lines) > 1 and _first_line(lines[0]) == self.identity:
            resumed = True
            held = json.loads(lines[0]).get("inputs")
            self.same_inputs = self.inputs is not None and held == [list(row) for row in self.inputs]
            keep = len(lines[0]) + 1
            for line in lines[1:-1]:
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        break
                    if "publishing" in row:  # it was about to be
                        keep += len(line) + 1
                        continue
                    self.found.append(self.ledger.decode(row))
                except (ValueError, RecursionError):
                    break
                told = row.get("warnings")
                self.warnings += [str(w) for w in told] if isinstance(told, list) else []
                keep += len(line) + 1
            os.ftruncate(self._fd, keep)
            os.lseek(self._fd, keep, os.SEEK_SET)
        return resumed

    def forget(self) -> None:
        """Start anew, whatever the file held. Raises OutputError."""
        self.found.clear()
        self.warnings.clear()
        try:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
        except OSError as e:
            raise OutputError(f"{self.path}: can't be written: {e.strerror or e}") from e
        self._append(self._first())

    def _first(self) -> str:
        """The line that names what the journal is of, and what of an earlier one must not be forgotten."""
        head = json.dumps({"stockpot_journal": _FORMAT, "plan": self.identity, "inputs": self.inputs}) + "\n"
        return head + (json.dumps({"publishing": {"files": self.noted}}) + "\n" if self.noted else "")

    def note(self, publishing: dict[str, Any]) -> None:
        """Record that the directory is about to be published, and what that replaces. Raises OutputError."""
        self._append(json.dumps({"publishing": publishing}) + "\n")

    def begin(self) -> None:
        """Start the background thread."""
        self._thread = threading.Thread(target=self._run, name="stockpot-journal", daemon=True)
        self._thread.start()

    def add(self, rows: Any, warnings: Sequence[str] = ()) -> None:
        """Queue finished pieces, which the ledger knows. Raises what the background thread failed with."""
        if self.error is not None:
            raise self.error
        with self._lock:
            self._queue.append((rows, warnings))

    def _append(self, text: str) -> None:
        try:
            write_all(self._fd, memoryview(text.encode()))
            os.fsync(self._fd)
        except OSError as e:
            raise OutputError(f"{self.path}: can't be written: {e.strerror or e}") from e

    def commit(self) -> None:
        """Flush data, then record it."""
        with self._lock:
            batch, self._queue = self._queue, []
        if batch:
            self.flush_data()
            warnings = list(dict.fromkeys(w for _, told in batch for w in told))
            self.keep(np.concatenate([rows for rows, _ in batch]), warnings)

    def keep(self, rows: Any, warnings: Sequence[str]) -> None:
        """Record pieces whose bytes are safely on disk."""
        if len(rows):
            row: dict[str, Any] = self.ledger.encode(rows)
            self._append(json.dumps(row | ({"warnings": list(warnings)} if warnings else {})) + "\n")

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


def _open_locked(path: str, flags: int) -> int:
    """A file that is locked, and the one that its path names: whoever had it locked before may have renamed or removed it.

    Raises OutputError where another merge holds the lock, OSError.
    """
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        fd = os.open(path, flags, 0o666)
        try:
            _lock_file(fd, path)
            held, named = os.fstat(fd), os.lstat(path)
            if not stat.S_ISREG(held.st_mode):
                raise OutputError(f"{path}: is no file that a merge can keep its journal in; move it away")
            if (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _whole(fd: int) -> bytes:
    parts = []
    at = 0
    while part := os.pread(fd, 2**20, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


@contextlib.contextmanager
def locked(path: str) -> Iterator[int]:
    """The descriptor of a journal that nobody else is at. Raises OutputError, OSError."""
    fd = _open_locked(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def published_record(fd: int) -> tuple[str | None, dict[str, Any] | None]:
    """(the plan of a journal, what it says of being published; None where that had not begun)."""
    lines = _whole(fd).split(b"\n")
    for line in reversed(lines[-3:]):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("publishing"), dict):
            return _first_line(lines[0]), row["publishing"]
    return _first_line(lines[0]), None


def _noted(raw: bytes) -> list[str]:
    """The files of an older merge that an upload was to remove."""
    try:
        rows = [json.loads(line) for line in raw.split(b"\n") if line.startswith(b'{"publishing"')]
        return sorted({str(n) for row in rows for n in row["publishing"].get("files", ())})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _lock_file(fd: int, path: str) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise OutputError(f"{os.path.dirname(path)}: another merge is writing here right now") from e
