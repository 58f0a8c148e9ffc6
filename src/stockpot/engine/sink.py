"""Where a merge's output goes: shard files, preallocated, header first, every tensor at its planned offset; or memory."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from stockpot.errors import OutputError
from stockpot.files import pwrite_all
from stockpot.planning.plan import Shard, TensorPlan

__all__ = ["MemorySink", "ShardSink", "Sink"]


class Sink(Protocol):
    """Takes bytes at offsets of the plan's shards, from any thread. direct: has files, for callers that write themselves."""

    direct: bool

    def fd(self, shard: int) -> int:
        """The open file of a shard, where `direct`; what was written to it is told by `wrote`."""
        ...

    def wrote(self, shards: Iterable[int]) -> None: ...

    def write(self, shard: int, buffer: memoryview[Any], offset: int) -> None:
        """Write at `offset`. Raises OutputError."""
        ...


class MemorySink:
    """Shards in memory, without their headers."""

    direct = False

    def __init__(self, shards: Sequence[Shard]) -> None:
        import numpy as np

        self._skipped = [len(s.header) for s in shards]
        self._memory = [np.empty(s.size - len(s.header), np.uint8) for s in shards]

    def fd(self, shard: int) -> int:
        raise OutputError("memory has no files")

    def wrote(self, shards: Iterable[int]) -> None:
        return None

    def write(self, shard: int, buffer: memoryview[Any], offset: int) -> None:
        at = offset - self._skipped[shard]
        self._memory[shard][at : at + len(buffer)] = buffer

    def tensor(self, t: TensorPlan) -> Any:
        """A tensor's bytes, uint8 `[nbytes]`: a view of its shard's."""
        at = t.offset - self._skipped[t.shard]
        return self._memory[t.shard][at : at + t.spec.nbytes]


class ShardSink:
    """Writes at offsets from any thread; `flush` makes what was written so far survive a power cut."""

    direct = True

    def __init__(self, directory: str, shards: Sequence[Shard], *, fresh: bool) -> None:
        self.paths = [os.path.join(directory, s.name) for s in shards]
        self._fds: list[int] = []
        self._dirty: set[int] = set()
        self._lock = threading.Lock()
        try:
            for path, shard in zip(self.paths, shards, strict=True):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                fd = os.open(path, _FLAGS, 0o666)
                self._fds.append(fd)
                if os.fstat(fd).st_nlink > 1:
                    raise OSError(errno.EMLINK, "has another name besides; remove it", path)
                if fresh or os.fstat(fd).st_size != shard.size:
                    _reserve(fd, shard.size)
                self._write(len(self._fds) - 1, shard.header, 0)  # again on resume: a crash may have taken it
        except OSError as e:
            self.close()
            raise OutputError(f"{directory}: can't be written: {e.strerror or e}") from e

    def fd(self, shard: int) -> int:
        """The descriptor, for a caller that writes directly and then calls `wrote`."""
        return self._fds[shard]

    def wrote(self, shards: Iterable[int]) -> None:
        """These were written to."""
        with self._lock:
            self._dirty.update(shards)

    def write(self, shard: int, buffer: memoryview[Any], offset: int) -> None:
        """Write at `offset`. Raises OutputError."""
        try:
            self._write(shard, buffer, offset)
        except OSError as e:
            raise OutputError(f"{self.paths[shard]}: write at byte {offset} failed: {e.strerror or e}") from e

    def _write(self, shard: int, buffer: Any, offset: int) -> None:
        pwrite_all(self._fds[shard], memoryview(buffer), offset)
        self.wrote([shard])

    def flush(self) -> None:
        """fdatasync every file written to since the last flush."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        for shard in dirty:
            try:
                os.fdatasync(self._fds[shard]) if hasattr(os, "fdatasync") else os.fsync(self._fds[shard])
            except OSError as e:
                raise OutputError(f"{self.paths[shard]}: flushing to disk failed: {e.strerror or e}") from e

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []


#: a link in place of a shard is not followed
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


def _reserve(fd: int, size: int) -> None:
    """Take the space now, so that a full disk is found before the work and not after it."""
    os.ftruncate(fd, 0)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(fd, size)
