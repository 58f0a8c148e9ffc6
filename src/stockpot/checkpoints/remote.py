"""Checkpoints behind URLs: whatever fsspec can reach (`s3://`, `gs://`, `http(s)://`, `hf://`, `memory://`).

Headers and tensors are read by byte ranges: large ones in parts side by side, those asked for by `will_read` ahead of time,
each tried again with growing pauses. Small files (config, tokenizer) are copied to a temporary directory when the
checkpoint is opened, so that everything else finds them on disk.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

from stockpot.checkpoints.beside import TEMPLATE_FOLDERS, part_folders
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.formats import endings, read_description
from stockpot.checkpoints.header import Header
from stockpot.checkpoints.source import ReadRequest
from stockpot.checkpoints.stores import BLOCK, PART, SMALL, Found, RemoteFile, RemoteStore, open_store
from stockpot.errors import ArgumentError, CheckpointError, ReadError

__all__ = ["RemoteCheckpoint", "RemoteStore", "open_remote_folder", "open_store", "remote_folder"]

#: bytes between two ranges that are rather read than asked for separately
_GAP = 2**16
#: bytes that may be read ahead, for one checkpoint
_AHEAD = 48 * 2**20
#: weights that can't be opened, and are left where they lie
_WEIGHTS = (".gguf", ".h5", ".msgpack", ".onnx", ".pkl", ".npz", ".tflite", ".ot")


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
            if (folder or not n.endswith(weights)) and f.size <= SMALL and os.path.basename(n) == n and n != ".."
        ]
        if self.only:
            chosen = [(n, f) for n, f in chosen if n == "config.json"]

        def copy(item: tuple[str, Found]) -> None:
            name, found = item
            if found.size < 0:
                found = self.store.find(found.path)
            if found.size > SMALL:
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
                and extent[2] - groups[-1][0][1] <= 4 * PART
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
            if stop - start < BLOCK:
                continue  # small ones are fetched together when they are read
            self._ahead.ask((index, start, stop), lambda i=index, a=start, b=stop: self._fetch(i, a, b))  # type: ignore[misc]

    def changed(self) -> str | None:
        assert self.folder is not None
        for header in self.files:
            try:
                found = self.folder.store.find(header.path)
            except OSError as e:
                return f"{self.ref}: {header.path}: {e}"
            if (found.size, found.stamp) != (header.size, header.mtime_ns) or not self._reads_the_same(header):
                return f"{self.ref}: {header.path}: was changed after its header was read"
        return None

    def _reads_the_same(self, header: Header) -> bool:
        """Where the server has nothing that changes with a file: whether its header is the one that was read."""
        assert self.folder is not None
        if header.inode is not None:
            return True
        try:
            return self.folder.headers([self.relative(header)])[0].raw == header.raw
        except (CheckpointError, OSError):
            return False

    def close(self) -> None:
        self._ahead.close()
