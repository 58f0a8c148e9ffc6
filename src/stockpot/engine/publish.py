"""The last steps: side files, flush, rename into place. OUT is there complete, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable

from stockpot.engine.journal import NAME as JOURNAL_NAME
from stockpot.errors import OutputError

#: the record of a merge, written last: a directory that has it is complete
LINEAGE = "stockpot.json"

__all__ = ["LINEAGE", "check_out", "partial_path", "publish"]


def check_out(out: str, *, overwrite: bool, inputs: Iterable[str]) -> None:
    """OUT must be absent or empty, or `overwrite` given; never an input or a directory that holds one.

    Raises OutputError before anything is written.
    """
    path = os.path.abspath(out)
    if os.path.islink(path):
        raise OutputError(f"{out}: is a symbolic link; name the directory itself")
    partial = partial_path(out)
    for source in inputs:
        real = os.path.realpath(source)
        for place in (os.path.realpath(path), os.path.realpath(partial)):
            if real == place or real.startswith(place + os.sep):
                raise OutputError(f"{out}: is or holds the input {source}; choose another OUT")
    _check_free(out, path, overwrite=overwrite)
    try:
        held = os.listdir(partial)
    except FileNotFoundError:
        held = []
    except OSError as e:
        raise OutputError(f"{partial}: needed for unfinished work: {e.strerror or e}") from e
    if held and JOURNAL_NAME not in held:
        raise OutputError(f"{partial}: needed for unfinished work, but it holds something else; move it away")
    parent = os.path.dirname(path)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise OutputError(f"{out}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: no permission to write in {parent}")


def _check_free(out: str, path: str, *, overwrite: bool) -> None:
    """OUT must be absent or an empty directory, or any directory with `overwrite`."""
    try:
        full = bool(os.listdir(path))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise OutputError(f"{out}: is a file, or lies in one; OUT must be a directory") from None
    except OSError as e:
        raise OutputError(f"{out}: can't be looked into: {e.strerror or e}") from e
    if full and not overwrite:
        raise OutputError(f"{out}: exists and is not empty; use --overwrite to replace it")


def partial_path(out: str) -> str:
    """Where a merge into `out` keeps its unfinished work."""
    return os.path.abspath(out).rstrip(os.sep) + ".partial"


def publish(partial: str, out: str, *, overwrite: bool) -> None:
    """Flush the directory, rename it to OUT, drop the journal. An old OUT is set aside, replaced, and then removed.

    Whether OUT is free is looked at once more: something may have appeared there during the merge. Where renaming fails, all is
    as before, journal included, and the same command goes on.
    """
    target = os.path.abspath(out)
    _check_free(out, target, overwrite=overwrite)
    old = None
    try:
        for folder, _, _ in os.walk(partial):  # parts have folders of their own
            _sync_directory(folder)
        if os.path.isdir(target):
            if os.listdir(target):
                old = tempfile.mkdtemp(prefix=os.path.basename(target) + ".replaced-", dir=os.path.dirname(target))
                os.rename(target, old)
            else:
                os.rmdir(target)
        try:
            os.rename(partial, target)
        except OSError:
            if old is not None:
                os.rename(old, target)
            raise
        os.unlink(os.path.join(target, JOURNAL_NAME))
        _sync_directory(os.path.dirname(target))
        if old is not None:
            shutil.rmtree(old)
    except OSError as e:
        where = partial if os.path.isdir(partial) else out
        raise OutputError(f"{out}: could not be put into place: {e.strerror or e}; the result is in {where}") from e


def _sync_directory(path: str) -> None:
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
