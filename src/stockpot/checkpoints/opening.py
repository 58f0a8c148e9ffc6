"""`open_checkpoint`: a directory, a file, an adapter, a URL or a Hub id -> Checkpoint. Reads headers and small files only."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from stockpot.checkpoints.beside import NOT_WEIGHTS, part_folders
from stockpot.checkpoints.checkpoint import Checkpoint, FilePart
from stockpot.checkpoints.files import LocalFile, check_link
from stockpot.checkpoints.foreign import check_foreign, check_whole, foreign_file
from stockpot.checkpoints.formats import FORMATS, endings, format_of, formats, known_endings, read_description
from stockpot.checkpoints.header import Header
from stockpot.checkpoints.quantised import loadable
from stockpot.checkpoints.transposed import in_order
from stockpot.errors import CheckpointError, LayoutError
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

    def listing(self, name: str) -> list[str]: ...

    def build(self, kind: str, config: Mapping[str, Any], files: Sequence[Header], **more: Any) -> Checkpoint: ...


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
    found = _described(folder)
    check_whole(found, lambda: [] if folder.only else folder.names)
    return loadable(in_order(found))


def _described(folder: Folder) -> Checkpoint:
    """The checkpoint as its headers have it."""
    text = folder.text
    if folder.only is not None:
        found = format_of(folder.only)
        if found is None:
            raise _not_a_checkpoint(text, folder.only)
        foreign = foreign_file(folder.only)
        if foreign is not None:
            raise LayoutError(f"{text}: {foreign.replace('{there}', os.path.dirname(text) or '.')}")
        # a trainer's own file: the config beside it may be another model's
        config = {} if found is FORMATS["torch"] else _config(os.path.join(folder.local, "config.json"))
        return folder.build("model", config, folder.headers([folder.only]))
    kind, config, files = "model", _config(os.path.join(folder.local, "config.json")), []
    if "adapter_config.json" in folder.names:
        kind, config = "adapter", read_json(os.path.join(folder.local, "adapter_config.json"))
        files = [_adapter_file(folder, config)]
        headers = folder.headers(files)
    else:
        folders = part_folders(folder.local)
        parts = _folder_parts(folder, folders)
        if not parts or _has_weights(folder.names):
            files, headers = _model_files(folder)
        else:
            headers = []
        parted = [(h, FilePart("", "model")) for h in headers]
        parted += [(h, part) for part, own in parts for h in own]
    if kind == "adapter":
        parted = [(h, FilePart("", "adapter_model")) for h in headers]
    beside, left = _files_beside(folder, files, {n for h in headers for n in h.entries})
    parted += beside
    marks = tuple(part for _, part in parted)
    return folder.build(
        kind, config, [h for h, _ in parted], parted=marks if any(p.name for p in marks) else (), left=tuple(left)
    )


def _folder_parts(folder: Folder, names: Sequence[str]) -> list[tuple[FilePart, list[Header]]]:
    """The folders of a checkpoint that hold weights of it: sentence encoders' modules, pipelines' models."""
    out = []
    for name in names:
        inside = _SubFolder(folder, name)
        if not _has_weights(inside.names):
            continue
        for format in formats():
            stems = [os.path.splitext(format.model)[0]] if format.model else []
            stems += ["diffusion_pytorch_model"] if format.model else []
            for stem in stems:
                ending = os.path.splitext(str(format.model))[1]
                whole = f"{stem}{ending}"
                if whole in inside.names:
                    out.append((FilePart(name, f"{name}/{_written_stem(stem)}"), inside.headers([whole])))
                elif f"{whole}.index.json" in inside.names:
                    headers = _sharded(inside, f"{whole}.index.json")[1]
                    out.append((FilePart(name, f"{name}/{_written_stem(stem)}"), headers))
                else:
                    continue
                break
            else:
                continue
            break
        else:
            weights = [n for n in inside.names if n.endswith(endings())]
            raise CheckpointError(
                f"{folder.text}: {name}/ holds weights under a name that is not known: {', '.join(weights[:3])}; expected "
                "model.safetensors, pytorch_model.bin or diffusion_pytorch_model.safetensors"
            )
    return out


def _written_stem(stem: str) -> str:
    """What a file is called when it is written as safetensors."""
    return "model" if stem == "pytorch_model" else stem


class _SubFolder:
    """A folder of a checkpoint's directory, as a Folder."""

    only: str | None = None

    def __init__(self, folder: Folder, name: str) -> None:
        self.above, self.name = folder, name
        self.text = f"{folder.text}/{name}"
        self.local = os.path.join(folder.local, name)
        self.names = folder.listing(name)

    def headers(self, names: Sequence[str]) -> list[Header]:
        return self.above.headers([f"{self.name}/{n}" for n in names])

    def has(self, name: str) -> bool:
        return self.above.has(f"{self.name}/{name}")

    def listing(self, name: str) -> list[str]:
        return self.above.listing(f"{self.name}/{name}")

    def build(self, kind: str, config: Mapping[str, Any], files: Sequence[Header], **more: Any) -> Checkpoint:
        return self.above.build(kind, config, files, **more)


def _has_weights(names: Sequence[str]) -> bool:
    return any(n.endswith((*known_endings(), ".index.json")) and not NOT_WEIGHTS.fullmatch(n) for n in names)


def _files_beside(
    folder: Folder, read: Sequence[str], names: set[str]
) -> tuple[list[tuple[Header, FilePart]], list[tuple[str, str]]]:
    """(the files beside a model that hold more of it, what holds weights and is left out with the reason).

    names: of the model's own tensors: a file that has them again is another copy.
    """
    parts: list[tuple[Header, FilePart]] = []
    left: list[tuple[str, str]] = []
    taken: set[str] = set()
    for name in folder.names:
        if name in read or not name.endswith(known_endings()) or NOT_WEIGHTS.fullmatch(name):
            continue
        stem = name.rpartition(".")[0]
        why = next((why for pattern, why in _COPIES if re.fullmatch(pattern, name)), "")
        if not why and not (name.endswith(".safetensors") or "head" in name):
            why = "not a part that is known; name the file itself to merge it"
        if not why and stem in taken:
            why = f"{stem}.safetensors is read"
        if not why:
            try:
                header = folder.headers([name])[0]
            except CheckpointError as e:
                if name.endswith(".safetensors"):
                    raise
                why = f"no state dict: {str(e)[:80]}"
            else:
                if names & set(header.entries):
                    why = "holds the model's tensors again"
                elif not header.entries:
                    why = "holds no tensors"
        if why:
            left.append((name, why))
            continue
        parts.append((header, FilePart(stem, stem)))
        taken.add(stem)
    return parts, left


#: files that hold a model's weights once more
_COPIES = (
    (r"consolidated.*\.(safetensors|pth)", "the weights again, in their publisher's own layout"),
    (r"pytorch_model.*\.bin|model.*\.bin", "the weights again, as safetensors are read"),
    (r"(diffusion_pytorch_)?model\.[\w-]+(-\d+-of-\d+)?\.safetensors", "a variant of the weights in another precision"),
    (r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)", "a shard that no index names"),
    (r"adapter_model\.(safetensors|bin)", "the adapter again"),
)


def _not_a_checkpoint(text: str, name: str) -> CheckpointError:
    if name.endswith(".gguf"):
        return CheckpointError(
            f"{text}: GGUF holds quantised weights, which can't be averaged; merge the original safetensors and convert the "
            "result (llama.cpp: convert_hf_to_gguf.py)"
        )
    foreign = foreign_file(name)
    if foreign is not None:
        return LayoutError(f"{text}: {foreign.replace('{there}', os.path.dirname(text) or '.')}")
    known = "; ".join(f"{name} ({', '.join(f.endings)})" for name, f in FORMATS.items())
    return CheckpointError(f"{text}: only files of a known format can be opened: {known}")


def _adapter_file(folder: Folder, config: Mapping[str, Any]) -> str:
    for format in formats():
        if format.adapter in folder.names:
            return str(format.adapter)
    if "peft_type" not in config or not any(f.startswith("adapter_model") for f in folder.names):
        check_foreign(folder)
    other = [f for f in folder.names if f.startswith("adapter_model")]
    found = f"found {', '.join(other)}" if other else "found no adapter_model file"
    raise CheckpointError(
        f"{folder.text}: a PEFT adapter without adapter_model.safetensors ({found}); an interrupted save?"
    )


def _model_files(folder: Folder) -> tuple[list[str], list[Header]]:
    """(the names, the headers) of the files that are the model."""
    text, listing = folder.text, folder.names
    for format in formats():
        if format.model is None:
            continue
        ending = os.path.splitext(format.model)[1]
        indexes = [f for f in listing if f.endswith(ending + ".index.json")]
        if f"{format.model}.index.json" in indexes:
            indexes = [f"{format.model}.index.json"]
        if format.model in listing and not indexes:
            return [format.model], folder.headers([format.model])
        if len(indexes) > 1:
            raise CheckpointError(f"{text}: several index files ({', '.join(indexes)}); name one {ending} file instead")
        if indexes:
            return _sharded(folder, indexes[0])
        if any(f.startswith("adapter_model.") for f in listing):
            raise CheckpointError(f"{text}: adapter weights without adapter_config.json; an interrupted save?")
        found = [f for f in listing if f.endswith(format.endings) and not _beside_only(f)] if format.alone else []
        if len(found) == 1:
            return found, folder.headers(found)
        if len(found) > 1:
            if re.fullmatch(r"shard-\d+-.*", found[0]):  # as torch writes a distributed checkpoint
                return found, folder.headers(found)
            raise CheckpointError(
                f"{text}: {len(found)} {ending[1:]} files but no index ({found[0]}, ...); an interrupted download or "
                f"save? Name one file, or restore {format.model}.index.json"
            )
    check_foreign(folder)
    raise _no_weights(text, listing)


def _beside_only(name: str) -> bool:
    """Whether a file is never the model itself."""
    return re.fullmatch(r"(value_head|v_head|new_embeddings)\.\w+", name) is not None


def _no_weights(text: str, listing: list[str]) -> CheckpointError:
    others = [f for f in listing if f.endswith(endings())]
    quantised = [f for f in listing if f.endswith(".gguf")]
    snapshots = [f for f in listing if f.startswith("checkpoint-")]
    if others:
        expected = " and no ".join(f.model for f in FORMATS.values() if f.model)
        return CheckpointError(f"{text}: no {expected}; to take {others[0]}, name the file itself")
    if quantised:
        return _not_a_checkpoint(text, quantised[0])
    if snapshots:
        return CheckpointError(
            f"{text}: a training run, not a checkpoint: name one of its snapshots, such as {text}/{snapshots[-1]}"
        )
    if not listing:
        return CheckpointError(
            f"{text}: an empty directory; expected model.safetensors or model.safetensors.index.json"
        )
    more = ", ..." if len(listing) > 6 else ""
    return CheckpointError(f"{text}: no safetensors file; found {', '.join(listing[:6])}{more}")


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


def _sharded(folder: Folder, index_name: str) -> tuple[list[str], list[Header]]:
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
    return sorted(files), headers


def _config(path: str) -> dict[str, Any]:
    if not os.path.exists(path):
        return {}
    check_link(os.path.dirname(path), path)
    return read_json(path)
