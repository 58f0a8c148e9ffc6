"""`open_checkpoint`: a directory, a file, an adapter, a URL or a Hub id -> Checkpoint. Reads headers and small files only."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.files import LocalFile, check_link
from stockpot.checkpoints.formats import FORMATS, endings, format_of, formats, read_description
from stockpot.checkpoints.header import Header
from stockpot.checkpoints.quantised import loadable
from stockpot.errors import CheckpointError
from stockpot.files import is_url, read_json, without_file_scheme

__all__ = [
    "Folder",
    "looks_like_hub_id",
    "open_checkpoint",
]


class Folder(Protocol):
    """Where a checkpoint's files lie: text is what the user wrote, local a directory with its small files, only the one
    file that was named (else None), names what is in it.
    """

    text: str
    local: str
    only: str | None
    names: list[str]

    def headers(self, names: Sequence[str]) -> list[Header]: ...

    def has(self, name: str) -> bool: ...

    def build(self, kind: str, config: Mapping[str, Any], files: Sequence[Header]) -> Checkpoint: ...


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

    def build(self, kind: str, config: Mapping[str, Any], files: Sequence[Header]) -> Checkpoint:
        """The checkpoint that reads these files."""
        return Checkpoint(self.text, self.path, kind, config, tuple(files))


def _open(folder: Folder) -> Checkpoint:
    text = folder.text
    if folder.only is not None:
        found = format_of(folder.only)
        if found is None:
            raise CheckpointError(f"{text}: {_not_a_checkpoint(folder.only)}")
        if found is FORMATS["torch"]:  # a trainer's own file: the config beside it may be another model's
            return folder.build("model", {}, folder.headers([folder.only]))
        config = _config(os.path.join(folder.local, "config.json"))
        return loadable(folder.build("model", config, folder.headers([folder.only])))
    if "adapter_config.json" in folder.names:
        return _open_adapter(folder)
    config = _config(os.path.join(folder.local, "config.json"))
    return loadable(folder.build("model", config, _model_files(folder)))


def _not_a_checkpoint(name: str) -> str:
    if name.endswith(".gguf"):
        return (
            "GGUF holds quantised weights, which can't be averaged; merge the original safetensors and convert the result "
            "(llama.cpp: convert_hf_to_gguf.py)"
        )
    known = "; ".join(f"{name} ({', '.join(f.endings)})" for name, f in FORMATS.items())
    return f"only files of a known format can be opened: {known}"


def _open_adapter(folder: Folder) -> Checkpoint:
    config = read_json(os.path.join(folder.local, "adapter_config.json"))
    for format in formats():
        if format.adapter in folder.names:
            return folder.build("adapter", config, folder.headers([format.adapter]))
    other = [f for f in folder.names if f.startswith("adapter_model")]
    found = f"found {', '.join(other)}" if other else "found no adapter_model file"
    raise CheckpointError(
        f"{folder.text}: a PEFT adapter without adapter_model.safetensors ({found}); an interrupted save?"
    )


def _model_files(folder: Folder) -> list[Header]:
    text, listing = folder.text, folder.names
    for format in formats():
        if format.model is None:
            continue
        ending = os.path.splitext(format.model)[1]
        indexes = [f for f in listing if f.endswith(ending + ".index.json")]
        if f"{format.model}.index.json" in indexes:
            indexes = [f"{format.model}.index.json"]
        if format.model in listing and not indexes:
            return folder.headers([format.model])
        if len(indexes) > 1:
            raise CheckpointError(f"{text}: several index files ({', '.join(indexes)}); name one {ending} file instead")
        if indexes:
            return _sharded(folder, indexes[0])
        if any(f.startswith("adapter_model.") for f in listing):
            raise CheckpointError(f"{text}: adapter weights without adapter_config.json; an interrupted save?")
        found = [f for f in listing if f.endswith(format.endings)] if format.alone else []
        if len(found) == 1:
            return folder.headers(found)
        if len(found) > 1:
            raise CheckpointError(
                f"{text}: {len(found)} {ending[1:]} files but no index ({found[0]}, ...); an interrupted download or "
                f"save? Name one file, or restore {format.model}.index.json"
            )
    raise CheckpointError(_no_weights(text, listing))


def _no_weights(text: str, listing: list[str]) -> str:
    others = [f for f in listing if f.endswith(endings())]
    quantised = [f for f in listing if f.endswith(".gguf")]
    snapshots = [f for f in listing if f.startswith("checkpoint-")]
    if others:
        expected = " and no ".join(f.model for f in FORMATS.values() if f.model)
        return f"{text}: no {expected}; to take {others[0]}, name the file itself"
    if quantised:
        return f"{text}: {_not_a_checkpoint(quantised[0])}"
    if snapshots:
        return f"{text}: a training run, not a checkpoint: name one of its snapshots, such as {text}/{snapshots[-1]}"
    if not listing:
        return f"{text}: an empty directory; expected model.safetensors or model.safetensors.index.json"
    return f"{text}: no safetensors file; found {', '.join(listing[:6])}{', ...' if len(listing) > 6 else ''}"


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


def _sharded(folder: Folder, index_name: str) -> list[Header]:
    index = read_json(os.path.join(folder.local, index_name))
    weight_map = index.get("weight_map")
    where = f"{folder.text}/{index_name}"
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected a 'weight_map' from tensor names to files")
    files: list[str] = []
    seen: set[str] = set()
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or os.path.isabs(file) or ".." in file.replace("\\", "/").split("/"):
            raise CheckpointError(f"{where}: tensor {name!r} points outside the directory: {file!r}")
        if file not in seen:
            seen.add(file)
            files.append(file)
    missing = [f for f in files if not folder.has(f)]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:4])}")
    headers = folder.headers(sorted(files))
    held: dict[str, str] = {}
    for file, header in zip(sorted(files), headers, strict=True):
        for name in header.entries:
            if name in held:
                raise CheckpointError(f"{folder.text}: tensor {name!r} is in both {held[name]} and {file}")
            held[name] = file
    for name, file in weight_map.items():
        if held.get(name) != file:
            raise CheckpointError(f"{where}: says that {name!r} is in {file}, which does not hold it")
    extra = [name for name in held if name not in weight_map]
    if extra:
        raise CheckpointError(f"{where}: {len(extra)} tensors of its shards are not in the index: {extra[0]!r}, ...")
    return headers


def _config(path: str) -> dict[str, Any]:
    if not os.path.exists(path):
        return {}
    check_link(os.path.dirname(path), path)
    return read_json(path)
