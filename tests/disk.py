"""A disk that remembers: every call that changes files below a directory is recorded, in order, and can be replayed up to any of
them, as a kill leaves things, or as a cut of power does: there what no file's flush has confirmed is gone.
"""

from __future__ import annotations

import builtins
import copy
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stockpot.engine import publish

Tree = dict[str, Any]


class File:
    """Bytes as they are, and as they are surely on disk."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.durable = bytes(data)


class Folder(Tree):
    """Names to files and folders; dirty: whether its list of names was changed and not flushed."""

    dirty = False


def snapshot(path: Path) -> Folder:
    out = Folder()
    for entry in sorted(path.iterdir()):
        out[entry.name] = snapshot(entry) if entry.is_dir() else File(entry.read_bytes())
    return out


def contents(folder: Folder, *, durable: bool) -> dict[str, bytes]:
    """Relative path -> bytes."""
    found: dict[str, bytes] = {}
    for name, node in folder.items():
        if isinstance(node, Folder):
            found |= {f"{name}/{k}": v for k, v in contents(node, durable=durable).items()}
        else:
            found[name] = node.durable if durable else bytes(node.data)
    return found


def write_out(folder: Folder, path: Path, *, durable: bool) -> None:
    path.mkdir(parents=True)
    for name, node in folder.items():
        if isinstance(node, Folder):
            write_out(node, path / name, durable=durable)
        else:
            (path / name).write_bytes(node.durable if durable else bytes(node.data))


class Disk:
    """What a directory held, and what was done below it."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self.first = snapshot(root)
        self.done: list[tuple[str, tuple[Any, ...]]] = []
        self.fds: dict[int, str] = {}
        self.count = 0

    def inside(self, path: Any) -> str | None:
        """A path below the root, relative to it."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None
        full = (
            os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
            + "/"
            + os.path.basename(os.fsdecode(path))
        )
        return full[len(self.root) + 1 :] if full.startswith(self.root + "/") else None

    def replayed(self) -> Iterator[tuple[int, str, Folder]]:
        """(how much was done, what last, the tree) before anything, and after each call."""
        tree = copy.deepcopy(self.first)
        open_files: dict[str, Any] = {}
        yield 0, "nothing", tree
        for n, (kind, args) in enumerate(self.done, 1):
            _ACTS[kind](tree, open_files, *args)
            yield n, f"{kind} {args[:1]}", tree


def _at(tree: Folder, path: str) -> tuple[Folder, str]:
    *above, name = path.split("/")
    for part in above:
        tree = tree[part]
    return tree, name


def _open(tree: Folder, files: dict[str, Any], path: str, key: str, new: bool) -> None:
    folder, name = _at(tree, path) if path else (tree, "")
    if name and name not in folder:
        assert new, path
        folder[name] = File()
        folder.dirty = True
    files[key] = folder[name] if name else tree


def _write(tree: Folder, files: dict[str, Any], key: str, offset: int | None, data: bytes) -> None:
    file = files[key]
    at = len(file.data) if offset is None else offset
    file.data.extend(bytes(max(0, at + len(data) - len(file.data))))
    file.data[at : at + len(data)] = data


def _truncate(tree: Folder, files: dict[str, Any], key: str, size: int) -> None:
    file = files[key]
    del file.data[size:]
    file.data.extend(bytes(size - len(file.data)))


def _sync(tree: Folder, files: dict[str, Any], key: str) -> None:
    node = files[key]
    if isinstance(node, Folder):
        node.dirty = False
    else:
        node.durable = bytes(node.data)


def _mkdir(tree: Folder, files: dict[str, Any], path: str) -> None:
    folder, name = _at(tree, path)
    folder[name] = Folder()
    folder.dirty = True


def _rename(tree: Folder, files: dict[str, Any], one: str, two: str) -> None:
    a, name = _at(tree, one)
    b, other = _at(tree, two)
    b[other] = a.pop(name)
    a.dirty = b.dirty = True


def _exchange(tree: Folder, files: dict[str, Any], one: str, two: str) -> None:
    (a, name), (b, other) = _at(tree, one), _at(tree, two)
    a[name], b[other] = b[other], a[name]
    a.dirty = b.dirty = True


def _remove(tree: Folder, files: dict[str, Any], path: str) -> None:
    folder, name = _at(tree, path)
    del folder[name]
    folder.dirty = True


_ACTS: dict[str, Callable[..., None]] = {
    "open": _open, "write": _write, "truncate": _truncate, "sync": _sync, "mkdir": _mkdir, "rename": _rename,
    "exchange": _exchange, "remove": _remove,
}  # fmt: skip


@contextmanager
def recording(disk: Disk) -> Iterator[Disk]:
    """Within it everything that is done below the disk's root by calls of `os` is recorded; other ways of writing fail."""
    real = {name: getattr(os, name) for name in (
        "open", "close", "write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "fdatasync", "rename", "replace", "unlink",
        "remove", "rmdir", "mkdir", "lseek",
    )}  # fmt: skip
    swap, builtin_open = publish.exchange, builtins.open

    def note(kind: str, *args: Any) -> None:
        disk.done.append((kind, args))

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        there = disk.inside(path) if dir_fd is None else None
        if dir_fd in disk.fds:
            there = f"{disk.fds[dir_fd].partition('#')[2]}/{path}"
        fd: int = real["open"](path, flags, mode, dir_fd=dir_fd)
        if there is not None or (isinstance(path, (str, os.PathLike)) and os.path.realpath(path) == disk.root):
            disk.count += 1
            disk.fds[fd] = f"{disk.count}#{there or ''}"
            note("open", there or "", disk.fds[fd], bool(flags & os.O_CREAT))
        return fd

    def closed(fd: int) -> None:
        disk.fds.pop(fd, None)
        real["close"](fd)

    def written(fd: int, data: Any) -> int:
        n: int = real["write"](fd, data)
        if fd in disk.fds:  # all of ours append
            note("write", disk.fds[fd], None, bytes(memoryview(data)[:n]))
        return n

    def written_at(fd: int, data: Any, offset: int) -> int:
        n: int = real["pwrite"](fd, data, offset)
        if fd in disk.fds:
            note("write", disk.fds[fd], offset, bytes(memoryview(data).cast("B")[:n]))
        return n

    def truncated(fd: int, size: int) -> None:
        real["ftruncate"](fd, size)
        if fd in disk.fds:
            note("truncate", disk.fds[fd], size)

    def reserved(fd: int, offset: int, size: int) -> None:
        real["posix_fallocate"](fd, offset, size)
        if fd in disk.fds:
            note("truncate", disk.fds[fd], os.fstat(fd).st_size)

    def synced(fd: int) -> None:
        real["fsync"](fd)
        if fd in disk.fds:
            note("sync", disk.fds[fd])

    def renamed(one: Any, two: Any, **kwargs: Any) -> None:
        a, b = disk.inside(one), disk.inside(two)
        real["rename"](one, two, **kwargs)
        if a is not None:
            note("rename", a, b)

    def removed(call: str) -> Callable[..., None]:
        def remove(path: Any, *, dir_fd: int | None = None) -> None:
            there = disk.inside(path) if dir_fd is None else None
            if dir_fd in disk.fds:
                there = f"{disk.fds[dir_fd].partition('#')[2]}/{path}"
            real[call](path, dir_fd=dir_fd)
            if there is not None:
                note("remove", there)

        return remove

    def made(path: Any, mode: int = 0o777, **kwargs: Any) -> None:
        there = disk.inside(path)
        real["mkdir"](path, mode, **kwargs)
        if there is not None:
            note("mkdir", there)

    def exchanged(one: str, two: str) -> bool:
        done: bool = swap(one, two)
        if done:
            note("exchange", disk.inside(one), disk.inside(two))
        return done

    def only_reading(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        assert not (set(mode) & set("wax+") and disk.inside(file) is not None), (
            f"{file} is written past what is recorded"
        )
        return builtin_open(file, mode, *args, **kwargs)

    with pytest.MonkeyPatch.context() as m:
        for name, call in {
            "open": opened, "close": closed, "write": written, "pwrite": written_at, "ftruncate": truncated,
            "posix_fallocate": reserved, "fsync": synced, "fdatasync": synced, "rename": renamed, "replace": renamed,
            "unlink": removed("unlink"), "remove": removed("remove"), "rmdir": removed("rmdir"), "mkdir": made,
        }.items():  # fmt: skip
            m.setattr(os, name, call)
        m.setattr(publish, "exchange", exchanged)
        m.setattr(builtins, "open", only_reading)
        m.setattr(io, "open", only_reading)
        yield disk
