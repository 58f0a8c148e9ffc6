"""Stores of files that fsspec reaches: every call is tried again with growing pauses, ranges are read side by side."""

from __future__ import annotations

import posixpath
import random
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stockpot.checkpoints.http import TooMuch, bounded, info, is_http, listing
from stockpot.errors import ArgumentError, CheckpointError

__all__ = ["BLOCK", "PART", "SMALL", "Found", "RemoteFile", "RemoteStore", "open_store"]

T = TypeVar("T")

_TRIES = 5
_FIRST_PAUSE = 0.2
#: bytes of one request
PART = 4 * 2**20
#: bytes of a header's first request, and of the blocks in which small reads are kept
BLOCK = 2**18
#: bytes of a small file: config, tokenizer
SMALL = 64 * 2**20
#: what stores tell of a file that changes when it does
_STAMPS = (
    "ETag", "etag", "Content-MD5", "Digest", "content_md5", "md5Hash", "LastModified", "Last-Modified", "last_modified",
    "mtime", "updated", "VersionId", "version_id", "generation", "blob_id", "sha", "created",
)  # fmt: skip
_HOPELESS = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ValueError, TypeError, TooMuch,
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A file: path in the store, size in bytes (-1 where a listing does not tell), and a stamp that changes when it does.

    stamped  whether the store had anything to make that of
    """

    path: str
    size: int
    stamp: int
    stamped: bool = True


class RemoteStore:
    """One fsspec file system; every call is tried again. Raises OSError for what does not get better."""

    def __init__(self, fs: Any, url: str) -> None:
        self.fs = fs
        self.url = url

    def persist(self, what: str, call: Callable[[], T]) -> T:
        """The result of a call that may fail now and then."""
        for attempt in range(_TRIES):
            try:
                return call()
            except _HOPELESS:
                raise
            except Exception as e:
                if attempt == _TRIES - 1:
                    raise OSError(f"{what} failed {_TRIES} times; the last time: {type(e).__name__}: {e}") from e
                time.sleep(_FIRST_PAUSE * 2**attempt * (0.5 + random.random()))
        raise AssertionError("unreachable")

    def find(self, path: str) -> Found:
        """One file as it is now. Raises FileNotFoundError."""
        self.fs.invalidate_cache()
        look = (lambda: info(self.fs, path)) if is_http(self.fs) else (lambda: self.fs.info(path))
        return _found(self.persist(f"looking up {path}", look))

    def list(self, path: str) -> tuple[dict[str, Found], list[str]]:
        """(files by name, names of folders) of a directory. Raises FileNotFoundError."""
        if is_http(self.fs):
            rows = self.persist(f"listing {path}", lambda: listing(self.fs, path))
        else:
            rows = self.persist(f"listing {path}", lambda: self.fs.ls(path, detail=True, refresh=True))
        files, folders = {}, []
        for row in rows:
            name = posixpath.basename(str(row["name"]).rstrip("/"))
            if row.get("type") == "directory":
                folders.append(name)
            elif str(row["name"]).rstrip("/") != path.rstrip("/"):
                files[name] = _found(row)
        return files, folders

    def whole(self, path: str) -> bytes:
        """All of a small file. Raises OSError, for one that is large too."""
        if is_http(self.fs):
            return self.persist(f"reading {path}", lambda: bounded(self.fs, path, 0, None, SMALL))
        with self.persist(f"opening {path}", lambda: self.fs.open(path, "rb")) as f:
            data: bytes = f.read(SMALL + 1)
        if len(data) > SMALL:
            raise TooMuch(f"{path}: more than {SMALL} bytes: too large for a small file of a checkpoint")
        return data

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of a file, parts of a long range side by side."""
        data = self._read(path, start, stop)
        if len(data) != stop - start:
            why = "the server may ignore ranges, or the file was replaced"
            raise OSError(f"{path}: asked for bytes {start} to {stop}, got {len(data)} bytes: {why}")
        return data

    def _read(self, path: str, start: int, stop: int) -> bytes:
        edges = list(range(start, stop, PART))
        stops = [min(e + PART, stop) for e in edges]
        if is_http(self.fs):

            def part(edge: int, end: int) -> bytes:
                return self.persist(f"reading {path}", lambda: bounded(self.fs, path, edge, end, end - edge))

            if len(edges) <= 1:
                return part(start, stop)
            with ThreadPoolExecutor(8) as pool:
                return b"".join(pool.map(part, edges, stops))
        if len(edges) <= 1:
            data: bytes = self.persist(f"reading {path}", lambda: self.fs.cat_file(path, start=start, end=stop))
            return data
        parts = self.persist(
            f"reading {path}", lambda: self.fs.cat_ranges([path] * len(edges), edges, stops, on_error="raise")
        )
        return b"".join(parts)


def _found(row: Mapping[str, Any]) -> Found:
    size = row.get("size")
    if row.get("type") == "directory":
        raise IsADirectoryError(row["name"])
    stamps = [(k, row[k]) for k in _STAMPS if row.get(k)]
    stamp = zlib.crc32(str(stamps or size).encode())
    return Found(str(row["name"]), -1 if size is None else int(size), stamp, bool(stamps))


def open_store(url: str) -> tuple[RemoteStore, str]:
    """(the file system of a URL, the path in it). Raises CheckpointError where a package is missing."""
    try:
        import fsspec
    except ImportError as e:
        raise CheckpointError(f"{url}: reading URLs needs fsspec: pip install 'stockpot[remote]'") from e
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as e:
        raise CheckpointError(f"{url}: {e}; pip install 'stockpot[remote]' brings S3 and HTTP") from e
    except ValueError as e:
        raise ArgumentError(f"{url}: {e}") from e
    except Exception as e:
        raise CheckpointError(f"{url}: can't be reached: {type(e).__name__}: {e}") from e
    return RemoteStore(fs, url), path


@dataclass
class RemoteFile:
    """A ByteFile of a store. Small reads are kept by blocks: zip files are read in many."""

    store: RemoteStore
    found: Found
    label: str
    _blocks: OrderedDict[int, bytes] = field(default_factory=OrderedDict)

    @property
    def size(self) -> int:
        return self.found.size

    @property
    def stamp(self) -> int:
        return self.found.stamp

    @property
    def inode(self) -> tuple[int, ...] | None:
        return () if self.found.stamped else None

    def read(self, start: int, stop: int) -> bytes:
        stop = min(stop, self.size)
        if start >= stop:
            return b""
        first, last = start // BLOCK, (stop - 1) // BLOCK
        if last > first + 1:
            return self.store.read(self.found.path, start, stop)
        data = b"".join(self._block(k) for k in range(first, last + 1))
        return data[start - first * BLOCK : stop - first * BLOCK]

    def _block(self, k: int) -> bytes:
        if k not in self._blocks:
            self._blocks[k] = self.store.read(self.found.path, k * BLOCK, min((k + 1) * BLOCK, self.size))
            if len(self._blocks) > 16:
                self._blocks.popitem(last=False)
        return self._blocks[k]

    def close(self) -> None:
        self._blocks.clear()
