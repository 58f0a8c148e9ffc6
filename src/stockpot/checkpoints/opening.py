"""`open_checkpoint`: a directory, a file, an adapter, a URL or a Hub id -> Checkpoint. Reads headers and small files only."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.contents import Folder, contents_of
from stockpot.checkpoints.files import LocalFile, check_link
from stockpot.checkpoints.foreign import check_whole
from stockpot.checkpoints.formats import read_description
from stockpot.checkpoints.header import Header
from stockpot.checkpoints.meaning.memory import without_wrappers
from stockpot.checkpoints.quantised import loadable
from stockpot.checkpoints.transposed import in_order
from stockpot.checkpoints.views import renamed
from stockpot.errors import CheckpointError
from stockpot.files import is_url, without_file_scheme

__all__ = [
    "looks_like_hub_id",
    "open_checkpoint",
]


def open_checkpoint(ref: str | os.PathLike[str]) -> Checkpoint:
    """Open a model directory, a PEFT adapter directory, one `.safetensors` file or one of torch's zip files.

    ref: a path, a URL that fsspec knows (`s3://bucket/model`), or a Hugging Face Hub id (`org/name`, `org/name@revision`);
    a path that exists is always taken for one. Only headers and small files are read. Raises CheckpointError that names what
    was found instead.
    """
    text = without_file_scheme(os.fspath(ref))
    if is_url(text):
        from stockpot.checkpoints.remote import open_remote_folder

        return _open(open_remote_folder(text))
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isfile(path):
        return _open(LocalFolder(text, os.path.dirname(path), os.path.basename(path)))
    if os.path.isdir(path):
        return _open(LocalFolder(text, path))
    close = _close_name(text, path)
    if not close and looks_like_hub_id(text):
        from stockpot.checkpoints.hub import open_hub

        return open_hub(text, _open)
    raise CheckpointError(f"{text}: no such file or directory{close}")


class LocalFolder:
    """A directory on a local disk, or one file in it: what a Folder must offer."""

    def __init__(self, text: str, path: str, only: str | None = None) -> None:
        self.text = text
        self.local = path
        self.only = only
        self.path = os.path.join(path, only) if only else path
        try:
            self.names = [only] if only else sorted(os.listdir(path))
        except OSError as e:
            raise CheckpointError(f"{text}: can't be looked into: {e.strerror or e}") from e

    def headers(self, names: Sequence[str]) -> list[Header]:
        """The headers of files in it, in the order given."""
        return [self._header(name) for name in names]

    def _header(self, name: str) -> Header:
        path = os.path.join(self.local, name)
        if self.only is None:
            check_link(self.local, path)
        with contextlib.closing(LocalFile.open(path)) as file:
            return read_description(file, name, path)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name (or relative path)."""
        return os.path.isfile(os.path.join(self.local, name))

    def listing(self, name: str) -> list[str]:
        """What is in a folder of it; nothing where there is none."""
        path = os.path.join(self.local, name)
        if not os.path.isdir(path):
            return []
        check_link(self.local, path)
        try:
            return sorted(os.listdir(path))
        except OSError as e:
            raise CheckpointError(f"{self.text}/{name}: can't be looked into: {e.strerror or e}") from e

    def build(self, kind: str, config: Mapping[str, Any], files: Sequence[Header], **more: Any) -> Checkpoint:
        """The checkpoint that reads these files. more: see Checkpoint."""
        return Checkpoint(self.text, self.path, kind, config, tuple(files), **more)


def _open(folder: Folder) -> Checkpoint:
    found = contents_of(folder)
    check_whole(found, lambda: [] if folder.only else folder.names)
    return _unwrapped(loadable(in_order(found)))


def _unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """An adapter under the names that PEFT looks for: without what torch.compile and the like put into them."""
    if checkpoint.kind != "adapter":
        return checkpoint
    plain, wrapped = without_wrappers(checkpoint.names())
    if not wrapped or len(set(plain.values())) < len(plain):
        return checkpoint
    return renamed(checkpoint, {new: old for old, new in plain.items()})


def _close_name(text: str, path: str) -> str:
    """The ending of an error for a path that does not exist: what it may have been meant to be, or nothing."""
    parent = os.path.dirname(path)
    local, _, revision = path.rpartition("@")
    if revision and os.path.exists(local):
        return f"; a local path has no revision: name {text.rpartition('@')[0]!r} without '@{revision}'"
    if os.path.isdir(parent) and os.access(parent, os.R_OK):
        close = difflib.get_close_matches(os.path.basename(path), os.listdir(parent), n=1, cutoff=0.6)
        if close:
            return f"; did you mean {os.path.join(os.path.dirname(text), close[0])!r}?"
    return ""


def looks_like_hub_id(text: str) -> bool:
    """Whether a reference that is no path could be a Hub id: `org/name`, `org/name@revision`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", text) is not None
