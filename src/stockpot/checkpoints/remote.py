"""Checkpoints behind URLs: whatever fsspec can reach (`s3://`, `gs://`, `http(s)://`, `hf://`, `memory://`).

Headers and tensors are read by byte ranges: large ones in parts side by side, those asked for by `will_read` ahead of time,
each tried again with growing pauses. Small files (config, tokenizer) are copied to a temporary directory when the
checkpoint is opened, so that everything else finds them on disk.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import random
import shutil
import tempfile
import threading
import time
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from stockpot.checkpoints.beside import TEMPLATE_FOLDERS, part_folders
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.formats import endings, read_description
from stockpot.checkpoints.header import Header
from stockpot.checkpoints.source import ReadRequest
from stockpot.errors import ArgumentError, CheckpointError, ReadError

__all__ = ["RemoteCheckpoint", "RemoteStore", "open_remote_folder", "open_store", "remote_folder"]

T = TypeVar("T")

_TRIES = 5
_FIRST_PAUSE = 0.2
#: bytes of one request
_PART = 4 * 2**20
#: bytes between two ranges that are rather read than asked for separately
_GAP = 2**16
#: bytes that may be read ahead, for one checkpoint
_AHEAD = 48 * 2**20
#: bytes of a header's first request, and of the blocks in which small reads are kept
_BLOCK = 2**18
_SMALL = 64 * 2**20
#: weights that can't be opened, and are left where they lie
_WEIGHTS = (".gguf", ".h5", ".msgpack", ".onnx", ".pkl", ".npz", ".tflite", ".ot")
_HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ValueError, TypeError)


@dataclass(frozen=True)
class Found:
    """A file: path in the store, size in bytes (-1 where a listing does not tell), and a stamp that changes when it does."""

    path: str
    size: int
    stamp: int


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
        return _found(self.persist(f"looking up {path}", lambda: self.fs.info(path)))

    def list(self, path: str) -> tuple[dict[str, Found], list[str]]:
        """(files by name, names of folders) of a directory. Raises FileNotFoundError."""
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
        """All of a file."""
        data: bytes = self.persist(f"reading {path}", lambda: self.fs.cat_file(path))
        return data

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of a file, parts of a long range side by side."""
        data = self._read(path, start, stop)
        if len(data) != stop - start:
            why = "the server may ignore ranges, or the file was replaced"
            raise OSError(f"{path}: asked for bytes {start} to {stop}, got {len(data)} bytes: {why}")
        return data

    def _read(self, path: str, start: int, stop: int) -> bytes:
        edges = list(range(start, stop, _PART))
        stops = [min(e + _PART, stop) for e in edges]
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
    stamp = row.get("ETag") or row.get("etag") or row.get("LastModified") or row.get("mtime") or row.get("created")
    stamp = stamp or row.get("blob_id") or row.get("generation") or size
    return Found(str(row["name"]), -1 if size is None else int(size), zlib.crc32(str(stamp).encode()))


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

    def read(self, start: int, stop: int) -> bytes:
        stop = min(stop, self.size)
        if start >= stop:
            return b""
        first, last = start // _BLOCK, (stop - 1) // _BLOCK
        if last > first + 1:
            return self.store.read(self.found.path, start, stop)
        data = b"".join(self._block(k) for k in range(first, last + 1))
        return data[start - first * _BLOCK : stop - first * _BLOCK]

    def _block(self, k: int) -> bytes:
        if k not in self._blocks:
            self._blocks[k] = self.store.read(self.found.path, k * _BLOCK, min((k + 1) * _BLOCK, self.size))
            if len(self._blocks) > 16:
                self._blocks.popitem(last=False)
        return self._blocks[k]

    def close(self) -> None:
        self._blocks.clear()


class RemoteFolder:
    """A directory behind a URL, or one file in it; see opening.Folder."""

    def __init__(
        self, text: str, store: RemoteStore, root: str, only: str | None = None, found: Found | None = None
    ) -> None:
        self.text = text
        self.store = store
        self.only = only
        self.root = root.rstrip("/")
        self.make = RemoteCheckpoint
        self.files, folders = self._beside(only, found) if only and found else store.list(self.root)
        self.names = [only] if only else sorted([*self.files, *folders])
        self.local = tempfile.mkdtemp(prefix="stockpot-remote-")
        self._keeper = weakref.finalize(self, shutil.rmtree, self.local, True)
        self._copy_small(self.files, "")
        wanted = set(TEMPLATE_FOLDERS)
        with contextlib.suppress(CheckpointError):  # a damaged modules.json is reported when it is needed
            wanted |= set(part_folders(self.local))
        fetched: set[str] = set()
        while not only and (more := {n for n in wanted - fetched if n.partition("/")[0] in folders}):
            for name in sorted(more):
                with contextlib.suppress(FileNotFoundError):
                    self._copy_small(store.list(f"{self.root}/{name}")[0], name)
            fetched |= more
            with contextlib.suppress(CheckpointError):  # routes within modules
                wanted |= set(part_folders(self.local))

    def __reduce__(self) -> tuple[Any, ...]:
        # the folder with the small files is this process's: another one fetches its own
        return type(self), (self.text, self.store, self.root, self.only, self.files[self.only] if self.only else None)

    def _beside(self, only: str, found: Found) -> tuple[dict[str, Found], list[str]]:
        """The one file and the config that may lie beside it, without asking for a listing."""
        files = {only: found}
        with contextlib.suppress(OSError, ValueError):
            files["config.json"] = self.store.find(f"{self.root}/config.json")
        return files, []

    def _copy_small(self, files: Mapping[str, Found], folder: str) -> None:
        """Config, tokenizer and the like."""
        os.makedirs(os.path.join(self.local, folder), exist_ok=True)
        weights = (*endings(), *_WEIGHTS)
        chosen = [
            (n, f)
            for n, f in files.items()
            if (folder or not n.endswith(weights)) and f.size <= _SMALL and os.path.basename(n) == n and n != ".."
        ]
        if self.only:
            chosen = [(n, f) for n, f in chosen if n == "config.json"]

        def copy(item: tuple[str, Found]) -> None:
            name, found = item
            if found.size < 0:
                found = self.store.find(found.path)
            if found.size > _SMALL:
                return
            # a server that tells no size is asked for the whole
            whole = found.size < 0
            data = self.store.whole(found.path) if whole else self.store.read(found.path, 0, found.size)
            with open(os.path.join(self.local, folder, name), "wb") as f:
                f.write(data)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(copy, chosen))

    def headers(self, names: Sequence[str]) -> list[Header]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self._header, names))

    def _header(self, name: str) -> Header:
        # listings and single files may have different stamps: `changed` will look at the single file
        found = self.store.find(self.files[name].path if name in self.files else f"{self.root}/{name}")
        if found.size < 0:
            raise CheckpointError(f"{self.text}: the server tells no size of {name}, so its parts can't be read")
        file = RemoteFile(self.store, found, f"{self.text}/{name}" if self.only is None else self.text)
        return read_description(file, name, found.path)

    def has(self, name: str) -> bool:
        if name in self.files:
            return True
        try:
            return "/" in name and bool(self.store.find(f"{self.root}/{name}"))
        except OSError:
            return False

    def listing(self, name: str) -> list[str]:
        if name.partition("/")[0] not in self.names:
            return []
        files, folders = self.store.list(f"{self.root}/{name}")
        return sorted([*files, *folders])

    def build(self, kind: str, config: Mapping[str, Any], files: Sequence[Header], **more: Any) -> Checkpoint:
        # the folder goes along: it keeps the temporary directory
        return self.make(self.text, self.text, kind, config, tuple(files), folder=self, **more)


def remote_folder(url: str, text: str) -> RemoteFolder:
    """The folder of a URL, which may also name one file. Raises what the store raises, and CheckpointError."""
    store, path = open_store(url)
    bare = path.partition("?")[0]  # signed URLs
    if bare.endswith((".gguf", *endings())):
        with contextlib.suppress(IsADirectoryError):
            found = store.find(path)
            return RemoteFolder(text, store, posixpath.dirname(bare), posixpath.basename(bare), found)
    return RemoteFolder(text, store, path)


def open_remote_folder(url: str) -> RemoteFolder:
    """The same for a URL that a user wrote. Raises CheckpointError, or ArgumentError for an unknown kind of URL."""
    try:
        return remote_folder(url, url)
    except (CheckpointError, ArgumentError):
        raise
    except FileNotFoundError as e:
        raise CheckpointError(f"{url}: no such file or directory") from e
    except (OSError, ValueError, NotImplementedError) as e:
        raise CheckpointError(f"{url}: can't be reached: {e}") from e


class _Ahead:
    """Ranges on their way: asked for by `will_read`, taken by `read`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.coming: OrderedDict[tuple[int, int, int], Future[bytes]] = OrderedDict()
        self.size = 0

    def ask(self, key: tuple[int, int, int], fetch: Callable[[], bytes]) -> None:
        size = key[2] - key[1]
        with self.lock:
            if key in self.coming or self.size + size > _AHEAD:
                return
            self.pool = self.pool or ThreadPoolExecutor(8, thread_name_prefix="stockpot-remote")
            self.coming[key] = self.pool.submit(fetch)
            self.size += size

    def take(self, key: tuple[int, int, int]) -> Future[bytes] | None:
        with self.lock:
            future = self.coming.pop(key, None)
            if future is not None:
                self.size -= key[2] - key[1]
            return future

    def close(self) -> None:
        with self.lock:
            for future in self.coming.values():
                future.cancel()
            self.coming.clear()
            self.size = 0
            if self.pool is not None:
                self.pool.shutdown(wait=False, cancel_futures=True)
                self.pool = None


@dataclass(frozen=True)
class RemoteCheckpoint(Checkpoint):
    """A checkpoint behind a URL; `path` is the URL, `directory` a local one with its small files."""

    folder: RemoteFolder | None = field(default=None, repr=False, compare=False)
    _ahead: _Ahead = field(default_factory=_Ahead, repr=False, compare=False)
    held: ClassVar[Mapping[str, Callable[[], Any]]] = {**Checkpoint.held, "_ahead": _Ahead}

    @property
    def directory(self) -> str:
        assert self.folder is not None
        return self.folder.local

    @property
    def resident(self) -> int:
        return _AHEAD

    @property
    def pieces_at_once(self) -> int:
        """A request costs a round trip."""
        return 4

    def extents(self, requests: Sequence[ReadRequest]) -> list[tuple[int, int, int]] | None:
        return None

    def place(self, name: str, *, unseen: bool = False) -> tuple[int, int] | None:
        return None

    def _fetch(self, index: int, start: int, stop: int) -> bytes:
        assert self.folder is not None
        path = self.files[index].path
        try:
            return self.folder.store.read(path, start, stop)
        except Exception as e:
            raise ReadError(f"{self.ref}: {path}: bytes {start} to {stop} can't be read: {e}") from e

    def _fill_all(self, extents: Sequence[tuple[int, int, int]], out: memoryview[Any]) -> None:
        """What was read ahead is taken from there; the rest is fetched at once, near neighbours by one request."""
        position, waiting = 0, []
        for extent in extents:
            size = extent[2] - extent[1]
            waiting.append((extent, position, self._ahead.take(extent)))
            position += size
        missing = sorted(extent for extent, _, future in waiting if future is None)
        fetched = dict(self._fetch_many(missing))
        for extent, at, future in waiting:
            data = future.result() if future is not None else fetched[extent]
            out[at : at + len(data)] = data

    def _fetch_many(
        self, extents: Sequence[tuple[int, int, int]]
    ) -> Iterator[tuple[tuple[int, int, int], bytes | memoryview[Any]]]:
        groups: list[list[tuple[int, int, int]]] = []
        for extent in extents:
            last = groups[-1][-1] if groups else None
            if (
                last
                and last[0] == extent[0]
                and extent[1] - last[2] <= _GAP
                and extent[2] - groups[-1][0][1] <= 4 * _PART
            ):
                groups[-1].append(extent)
            else:
                groups.append([extent])
        spans = [(g[0][0], g[0][1], max(e[2] for e in g)) for g in groups]
        if len(spans) == 1:
            found = [self._fetch(*spans[0])]
        else:
            with ThreadPoolExecutor(min(8, len(spans) or 1)) as pool:
                found = list(pool.map(lambda s: self._fetch(*s), spans))
        for group, span, data in zip(groups, spans, found, strict=True):
            view = memoryview(data)
            for extent in group:
                yield extent, view[extent[1] - span[1] : extent[2] - span[1]]

    def will_read(self, request: ReadRequest) -> None:
        for index, start, stop in self._extents([request]):
            if stop - start < _BLOCK:
                continue  # small ones are fetched together when they are read
            self._ahead.ask((index, start, stop), lambda i=index, a=start, b=stop: self._fetch(i, a, b))  # type: ignore[misc]

    def changed(self) -> str | None:
        assert self.folder is not None
        for header in self.files:
            try:
                found = self.folder.store.find(header.path)
            except OSError as e:
                return f"{self.ref}: {header.path}: {e}"
            if (found.size, found.stamp) != (header.size, header.mtime_ns):
                return f"{self.ref}: {header.path}: was changed after its header was read"
        return None

    def close(self) -> None:
        self._ahead.close()
