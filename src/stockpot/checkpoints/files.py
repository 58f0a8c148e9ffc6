"""Files that headers are read from: by byte ranges, wherever they lie. Local ones here; see `remote` for those behind URLs."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from dataclasses import dataclass
from typing import Any, Protocol

from stockpot.errors import CheckpointError
from stockpot.files import open_regular

__all__ = ["ByteFile", "FileStream", "LocalFile", "check_link", "inode_of", "stored_range"]


class ByteFile(Protocol):
    """label names it in errors; stamp changes when the file does (its time of change, or what a store has instead); inode is what
    else shows that it is this file, see Header.
    """

    label: str

    @property
    def size(self) -> int: ...

    @property
    def stamp(self) -> int: ...

    @property
    def inode(self) -> tuple[int, ...] | None: ...

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start..stop, fewer only where the file ends. Raises OSError."""
        ...

    def close(self) -> None: ...


@dataclass
class LocalFile:
    """A file on a local disk."""

    label: str
    size: int
    stamp: int
    inode: tuple[int, ...] | None
    _fd: int

    @classmethod
    def open(cls, path: str) -> LocalFile:
        """Raises CheckpointError."""
        try:
            fd = open_regular(path)
        except OSError as e:
            raise CheckpointError(f"{path}: can't be read: {e.strerror or e}") from e
        found = os.fstat(fd)
        return cls(path, found.st_size, found.st_mtime_ns, inode_of(found), fd)

    def read(self, start: int, stop: int) -> bytes:
        parts = []
        while start < stop:
            part = os.pread(self._fd, min(stop - start, 2**26), start)
            if not part:
                break
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def close(self) -> None:
        os.close(self._fd)


def inode_of(found: os.stat_result) -> tuple[int, ...]:
    """What shows that a file is the one it was, beside its size and time: where it lies, and when anything about it changed."""
    return found.st_dev, found.st_ino, found.st_ctime_ns


class FileStream(io.RawIOBase):
    """A ByteFile as what `zipfile` reads from."""

    def __init__(self, file: ByteFile) -> None:
        self.file = file
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        start = {0: 0, 1: self.position, 2: self.file.size}[whence]
        if start + offset < 0:
            raise ValueError("before the beginning of the file")
        self.position = start + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        found = self.file.read(self.position, min(self.position + len(buffer), self.file.size))
        buffer[: len(found)] = found
        self.position += len(found)
        return len(found)


def stored_range(file: ByteFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    """The bytes of an uncompressed member of a zip file: its local header says where they begin. Raises CheckpointError."""
    where = f"{file.label}: {info.filename}"
    if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{where} is compressed: tensors can't be read from its middle; save it uncompressed")
    head = file.read(info.header_offset, info.header_offset + 30)
    if len(head) != 30 or head[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{where}: its entry is damaged")
    name, extra = struct.unpack("<HH", head[26:30])
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > file.size:
        raise CheckpointError(f"{where} runs past the end of the file")
    return start, start + info.file_size


def check_link(directory: str, path: str) -> None:
    """Refuse a file of a checkpoint that is a link to somewhere outside the checkpoint's directory.

    The Hub's cache links snapshots to blobs beside them, which is allowed; STOCKPOT_FOLLOW_SYMLINKS=1 allows everything.
    """
    if os.environ.get("STOCKPOT_FOLLOW_SYMLINKS") == "1":
        return
    inside, target = os.path.realpath(directory), os.path.realpath(path)
    if target.startswith(inside + os.sep):
        return
    above, kind = os.path.split(os.path.dirname(inside))
    if kind == "snapshots" and target.startswith(os.path.join(above, "blobs") + os.sep):
        return
    raise CheckpointError(
        f"{path}: is a symbolic link to {target}, outside the checkpoint; set STOCKPOT_FOLLOW_SYMLINKS=1 to allow such links"
    )
