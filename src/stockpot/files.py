"""Files on this machine: text in UTF-8 as people write it, tables, JSON, writing that a crash can't halve; and what is a URL."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import re
import stat
from typing import Any

from stockpot.errors import CheckpointError, StockpotError, nearest_file

__all__ = [
    "MOST_BYTES",
    "TEMPORARY",
    "copy_file",
    "is_url",
    "make_folders",
    "open_regular",
    "pwrite_all",
    "read_any_json",
    "read_bytes",
    "read_json",
    "read_table",
    "read_text",
    "replace_file",
    "sync_folder",
    "without_file_scheme",
    "write_all",
    "write_file",
]

#: of a JSON file, or another small one of a checkpoint
MOST_BYTES = 64 * 2**20
#: what the name of a file ends with until it is renamed into place
TEMPORARY = ".tmp"
_PIECE = 2**20


def open_regular(path: str) -> int:
    """A descriptor of a regular file, to read from. Raises OSError, for anything else too: who opens a FIFO waits for ever, and a
    device need not end.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    kind = os.fstat(fd).st_mode
    if not stat.S_ISREG(kind):
        os.close(fd)
        raise OSError(errno.EINVAL, "is a directory" if stat.S_ISDIR(kind) else "is not a regular file", path)
    return fd


def read_bytes(path: str, most: int = MOST_BYTES) -> bytes:
    """The whole of a regular file. Raises OSError, for one of more than `most` bytes too."""
    with open(open_regular(path), "rb") as f:
        size = os.fstat(f.fileno()).st_size
        data = bytearray()
        while size <= most and len(data) <= most and (piece := f.read(min(_PIECE, most + 1))):
            data += piece
    if max(size, len(data)) > most:
        raise OSError(errno.EFBIG, f"{max(size, len(data))} bytes is too large", path)
    return bytes(data)


def read_text(path: str, what: str, error: type[StockpotError], *, most: int = 2**28, where: str = "") -> str:
    """The whole file. what: "a recipe", for the error when it has more than `most` bytes; where: what errors begin with."""
    try:
        return io.TextIOWrapper(io.BytesIO(read_bytes(path, most)), encoding="utf-8-sig").read()
    except OSError as e:
        if e.errno == errno.EFBIG:
            raise error(f"{where}{path}: {e.strerror} for {what}") from e
        raise error(f"{where}{path}: can't be read: {e.strerror or e}{nearest_file(path)}") from e
    except UnicodeDecodeError as e:
        raise error(f"{where}{path}: not a text file in UTF-8: {e.reason} at byte {e.start}") from e


def read_table(text: str, path: str, error: type[StockpotError]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """A CSV file's names of columns, and (line, cells) of every row that isn't blank."""
    reader = csv.reader(io.StringIO(text))
    try:
        names = [c.strip() for c in next(reader, [])]
        return names, [(reader.line_num, row) for row in reader if any(c.strip() for c in row)]
    except csv.Error as e:
        raise error(f"{path}:{reader.line_num}: not a CSV file: {e}") from e


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError for anything else."""
    doc = read_any_json(path)
    if not isinstance(doc, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(doc).__name__}")
    return doc


def read_any_json(path: str) -> Any:
    """Whatever a JSON file holds. Raises CheckpointError where it is none, or can't be read."""
    try:
        raw = read_bytes(path)
    except OSError as e:
        raise CheckpointError(f"{path}: can't be read: {e.strerror or e}") from e
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON: {e}") from e


# writing: what is renamed into place afterwards survives a cut of power


def write_file(path: str, content: str | bytes) -> None:
    """Write a new file and flush it. Nothing that stands there is followed or written into: it is removed. Raises OSError."""
    view = memoryview(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
    fd = _fresh(path)
    try:
        write_all(fd, view)
        os.fsync(fd)
    finally:
        os.close(fd)


def copy_file(source: str, target: str) -> None:
    """Copy a regular file, flushed, in pieces. Raises OSError."""
    reads = open_regular(source)
    try:
        writes = _fresh(target)
        try:
            while piece := os.read(reads, _PIECE):
                write_all(writes, memoryview(piece))
            os.fsync(writes)
        finally:
            os.close(writes)
    finally:
        os.close(reads)


def write_all(fd: int, view: memoryview) -> None:
    """All of it, however little is taken at once. Raises OSError."""
    while len(view):
        n = os.write(fd, view)
        if not n:
            raise OSError(errno.EIO, "nothing can be written any more")
        view = view[n:]


def pwrite_all(fd: int, view: memoryview, offset: int) -> None:
    """The same at an offset; the file's own place stays where it is. Raises OSError."""
    while len(view):
        n = os.pwrite(fd, view, offset)
        if not n:
            raise OSError(errno.EIO, "nothing can be written any more")
        view = view[n:]
        offset += n


def _fresh(path: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o666)


def replace_file(path: str, content: str | bytes) -> None:
    """Write a file whole, flushed, in place of what was there; or leave that."""
    try:
        write_file(path + TEMPORARY, content)
        os.replace(path + TEMPORARY, path)
        sync_folder(os.path.dirname(path) or ".")
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path + TEMPORARY)
        raise


def make_folders(path: str) -> None:
    """A directory and those above it that are missing, each entered into the one above for good. Raises OSError."""
    path = os.path.abspath(path)
    missing: list[str] = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        sync_folder(os.path.dirname(folder))
    if missing and not os.path.isdir(missing[0]):
        raise NotADirectoryError(errno.ENOTDIR, "is not a directory", missing[0])


def sync_folder(path: str) -> None:
    """Flush what a directory lists. Raises OSError; file systems that know no such thing are left alone."""
    if os.name == "nt":
        return
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except PermissionError:  # who may write into it need not be able to list it
        return
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


def without_file_scheme(text: str) -> str:
    """`file:///a/b` and `local:///a/b` -> `/a/b`; anything else as it is."""
    return re.sub(r"^(file|local)://(?=/)", "", text)


def is_url(text: str) -> bool:
    """Whether a reference is a URL rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None
