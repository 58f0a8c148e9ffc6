"""The last steps: side files, flush, rename into place. OUT is there complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

from stockpot.engine.journal import NAME as JOURNAL_NAME
from stockpot.errors import OutputError

__all__ = ["check_out", "publish", "write_file"]


def check_out(out: str, *, overwrite: bool, inputs: Iterable[str]) -> None:
    """OUT must be absent or empty, or `overwrite` given; never an input or a directory that holds one.

    Raises OutputError before anything is written.
    """
    path = os.path.realpath(out)
    for source in inputs:
        real = os.path.realpath(source)
        if real == path or real.startswith(path + os.sep):
            raise OutputError(f"{out}: is or holds the input {source}; choose another OUT")
    if os.path.isfile(path):
        raise OutputError(f"{out}: is a file; OUT must be a directory")
    if os.path.isdir(path) and os.listdir(path) and not overwrite:
        raise OutputError(f"{out}: exists and is not empty; use --overwrite to replace it")
    parent = os.path.dirname(path)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise OutputError(f"{out}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: no permission to write in {parent}")


def write_file(path: str, text: str) -> None:
    """Write and flush one file."""
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def publish(partial: str, out: str) -> None:
    """Flush the directory, drop the journal, rename it to OUT. An old OUT is replaced and then removed."""
    target = os.path.abspath(out)
    journal = os.path.join(partial, JOURNAL_NAME)
    old = target + ".replaced"
    try:
        _sync_directory(partial)
        if os.path.isdir(target) and os.listdir(target):
            if os.path.isdir(old):
                shutil.rmtree(old)
            os.rename(target, old)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(target):
            os.rmdir(target)
        os.unlink(journal)
        os.rename(partial, target)
        _sync_directory(os.path.dirname(target))
        if os.path.isdir(old):
            shutil.rmtree(old)
    except OSError as e:
        raise OutputError(f"{out}: could not be put into place: {e.strerror or e}; the result is in {partial}") from e


def _sync_directory(path: str) -> None:
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
