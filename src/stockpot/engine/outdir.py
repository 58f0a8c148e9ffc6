"""OUT and what lies beside it while a merge works: what may be replaced there, what is ours, who may begin.

What stockpot makes carries a mark: the unfinished work (`OUT.partial`) its journal, the scratch directory of steps
(`OUT.steps`) a file of its own, a finished output its lineage, which lists its files. Nothing without one is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blake3 import blake3

from stockpot.errors import CheckpointError, OutputError, few_of
from stockpot.files import MOST_BYTES, TEMPORARY, make_folders, open_regular, read_bytes, read_json, write_file

__all__ = [
    "JOURNAL",
    "LINEAGE",
    "MARK",
    "alone_in",
    "check_free",
    "check_out",
    "check_trusted",
    "claim_scratch",
    "exchange",
    "is_journal",
    "is_partial",
    "partial_path",
    "remove_scratch",
    "remove_written",
    "scratch_path",
    "strangers",
]

#: the record of a merge, written last: a directory that has it is complete
LINEAGE = "stockpot.json"
#: the record of a merge that is not finished
JOURNAL = "stockpot.journal"
#: what it begins with
MARK = b'{"stockpot_journal"'
#: marks a scratch directory of steps
SCRATCH = "stockpot.scratch"
#: what desktops put anywhere
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini", ".directory"}
#: nanoseconds within which the files of a copied output are made, one after the other
_COPYING = 30 * 10**9
#: seconds that another process may take to begin or to publish
_PATIENCE = 10.0


def partial_path(out: str) -> str:
    """Where a merge into `out` keeps its unfinished work."""
    return os.path.abspath(out).rstrip(os.sep) + ".partial"


def scratch_path(out: str) -> str:
    """Where the steps of a merge into `out` are written that can't be streamed."""
    return os.path.abspath(out).rstrip(os.sep) + ".steps"


# before anything is written


def check_out(out: str, *, overwrite: bool, inputs: Iterable[str], steps: bool = False) -> None:
    """OUT must be absent or empty, or what stockpot wrote and `overwrite` given; never an input, or a directory that holds one.

    inputs  models, recipes, suites: whatever must not be removed; steps: whether some are written beside OUT
    Raises OutputError before anything is written.
    """
    path = os.path.abspath(out)
    if os.path.islink(path):
        raise OutputError(f"{out}: is a symbolic link; name the directory itself")
    if os.path.ismount(path):
        raise OutputError(f"{out}: is a mount point, which can't be renamed; name a directory in it")
    partial, scratch = partial_path(out), scratch_path(out)
    _guard(out, [path, partial, *([scratch] if steps else [])], inputs)
    check_free(out, overwrite=overwrite)
    for place, marked in ((partial, is_partial), (scratch, _is_scratch)):
        if place == scratch and not steps:
            continue
        held = _listing(place)
        if os.path.islink(place) or (held and not marked(place, held)):
            raise OutputError(
                f"{place}: needed for unfinished work, but it holds something else ({few_of(held, 3)}); move it away, or choose "
                "another OUT"
            )
        check_trusted(place)
    parent = os.path.dirname(path)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise OutputError(f"{out}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: no permission to write in {parent}")


def _guard(out: str, places: Iterable[str], inputs: Iterable[str]) -> None:
    """Raise OutputError where a place that will be written to is or holds something that is read."""
    real_places = [os.path.realpath(p) for p in places]
    for source in inputs:
        real = os.path.realpath(source)
        for place in real_places:
            if real == place or real.startswith(place + os.sep):
                raise OutputError(f"{out}: is or holds the input {source}; choose another OUT")


def check_free(out: str, *, overwrite: bool) -> None:
    """OUT must be absent or an empty directory, or with `overwrite` what stockpot wrote, and nothing else in it."""
    held = _listing(os.path.abspath(out), out)
    if not held:
        return
    if not overwrite:
        raise OutputError(f"{out}: exists and is not empty; use --overwrite to replace it")
    others = strangers(os.path.abspath(out))
    if others is None:
        raise OutputError(
            f"{out}: is no output of stockpot (no {LINEAGE}; it holds {few_of(held, 3)}), and --overwrite removes nothing else: "
            "move it away, or choose another OUT"
        )
    if others:
        raise OutputError(
            f"{out}: holds what stockpot did not write ({few_of(others, 3)}), and --overwrite removes nothing else: move that "
            "away, or choose another OUT"
        )


def _listing(path: str, out: str = "") -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        if out:
            raise OutputError(f"{out}: is a file, or lies in one; OUT must be a directory") from None
        raise OutputError(f"{path}: needed for unfinished work: Not a directory") from None
    except OSError as e:
        why = f"can't be looked into: {e.strerror or e}" if out else f"needed for unfinished work: {e.strerror or e}"
        raise OutputError(f"{out or path}: {why}") from e


def check_trusted(path: str) -> None:
    """Raise OutputError for unfinished work that somebody else may have put there: not ours, where anybody may write."""
    if not hasattr(os, "geteuid"):
        return
    try:
        own, above = os.lstat(path), os.stat(os.path.dirname(path))
    except OSError:
        return
    if own.st_uid != os.geteuid() and above.st_mode & stat.S_IWOTH:
        raise OutputError(
            f"{path}: belongs to another user (uid {own.st_uid}), in a directory where everybody may write: what lies in it "
            "would be published as yours. Choose another OUT, or have it removed"
        )


# what is ours


def is_journal(path: str) -> bool:
    """Whether a file is the journal of a merge."""
    try:
        with open(open_regular(path), "rb") as f:
            return f.read(len(MARK)) == MARK
    except OSError:
        return False


def is_partial(path: str, held: list[str]) -> bool:
    """By its journal; one that was killed as it began has an empty one, and nothing else."""
    journal = os.path.join(path, JOURNAL)
    if JOURNAL not in held or os.path.islink(journal) or not os.path.isfile(journal):
        return False
    return is_journal(journal) or (held == [JOURNAL] and os.path.getsize(journal) == 0)


def _is_scratch(path: str, held: list[str]) -> bool:
    try:
        return SCRATCH in held and b"stockpot_scratch" in read_bytes(os.path.join(path, SCRATCH), 2**12)
    except OSError:
        return False


@dataclass(frozen=True)
class _Written:
    """What the lineage in a directory says of its files: bytes of those with tensors, digests of the others.

    when  its own time, in nanoseconds: it is written last
    """

    directory: str
    when: int
    sizes: dict[str, int]
    digests: dict[str, set[str]]

    def has(self, name: str) -> bool:
        """Whether a file is one that was written, as it was written: somebody may have put another one in its place."""
        if name in (LINEAGE, JOURNAL) or os.path.basename(name) in _LITTER:
            return True
        if name.endswith(TEMPORARY):
            return name.removesuffix(TEMPORARY) in {LINEAGE, *self.sizes, *self.digests}
        path = os.path.join(self.directory, name)
        try:
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode):
                return False
            if name in self.digests:
                return found.st_size <= MOST_BYTES and blake3(read_bytes(path)).hexdigest() in self.digests[name]
        except OSError:
            return False
        # large files are not read: one of its size that is no younger than the lineage, or came with it as a copy, is it
        return found.st_size == self.sizes.get(name) and found.st_mtime_ns <= self.when + _COPYING


def _written_in(directory: str) -> _Written | None:
    """None where there is no lineage that can be read."""
    path = os.path.join(directory, LINEAGE)
    try:
        lineage = read_json(path)
        output = lineage["output"]
        sizes = {str(f["name"]): int(f["bytes"]) for f in output["files"]}
        digests = {str(n): {str(d)} for n, d in output["side_files"].items()}
        digests.get("README.md", set()).update(map(str, lineage.get("card_before", ())))
        return _Written(directory, os.lstat(path).st_mtime_ns, sizes, digests)
    except (CheckpointError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def strangers(directory: str) -> list[str] | None:
    """Files in an output that stockpot did not write, relative; None where it is no output of stockpot."""
    written = _written_in(directory)
    if written is None:
        return None
    return sorted(name for name in _files_in(directory) if not written.has(name))


def _files_in(directory: str) -> Iterator[str]:
    """Everything below a directory that is no directory, links not followed."""
    for base, folders, names in os.walk(directory):
        linked = [f for f in folders if os.path.islink(os.path.join(base, f))]
        for name in (*names, *linked):
            yield os.path.relpath(os.path.join(base, name), directory).replace(os.sep, "/")


def remove_written(directory: str) -> bool:
    """Remove an output of stockpot, its lineage last: what it did not write stays. Whether all is gone. Raises OSError."""
    written = _written_in(directory)
    if written is None:
        with contextlib.suppress(OSError):
            os.rmdir(directory)
        return not os.path.lexists(directory)
    for name in sorted(_files_in(directory), key=lambda n: n == LINEAGE):
        if name != LINEAGE and written.has(name):
            os.unlink(os.path.join(directory, name))
    for base, _, _ in os.walk(directory, topdown=False):
        if base != directory:
            with contextlib.suppress(OSError):
                os.rmdir(base)
    if os.listdir(directory) != [LINEAGE]:
        return False
    os.unlink(os.path.join(directory, LINEAGE))
    os.rmdir(directory)
    return True


# scratch directories of steps


def claim_scratch(path: str) -> None:
    """Make a scratch directory, or go on with one of ours. Raises OutputError, OSError."""
    held = _listing(path)
    if held and not _is_scratch(path, held):
        raise OutputError(f"{path}: needed for unfinished work, but it holds something else; move it away")
    make_folders(path)
    if not held:
        write_file(os.path.join(path, SCRATCH), json.dumps({"stockpot_scratch": 1}) + "\n")


def remove_scratch(path: str) -> None:
    """Remove the steps that merges have left in a scratch directory of ours, and it, if nothing else is in it."""
    held = _listing(path)
    if not _is_scratch(path, held):
        return
    for name in held:
        inner = os.path.join(path, name)
        if name.endswith(".partial") and not os.path.islink(inner) and is_journal(os.path.join(inner, JOURNAL)):
            shutil.rmtree(inner, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(path, SCRATCH))
        os.rmdir(path)


# one at a time


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Only one process at a time begins or publishes in a folder, where its file system can lock directories.

    Who waits too long goes on: the folder may be locked by a script that calls us.
    """
    fd = -1
    try:
        import fcntl

        fd = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    break
                time.sleep(0.02)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


@functools.cache
def _swap() -> object:
    """The C library's call that exchanges two names, or None."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    for name in ("renameat2", "renamex_np"):
        if libc is not None and hasattr(libc, name):
            return getattr(libc, name)
    return None


def exchange(one: str, two: str) -> bool:
    """Give two directories each other's names at once. False where the system can't."""
    call = _swap()
    if call is None:
        return False
    a, b = os.fsencode(one), os.fsencode(two)
    at_cwd, swapped = -100, 2
    linux = call.__name__ == "renameat2"  # type: ignore[attr-defined]
    failed = call(at_cwd, a, at_cwd, b, swapped) if linux else call(a, b, swapped)  # type: ignore[operator]
    return not failed
