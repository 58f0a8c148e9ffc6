"""Which files of a directory are a checkpoint: the model, folders and heads that are parts of it, what is left out and why."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from stockpot.checkpoints.beside import NOT_WEIGHTS, part_folders
from stockpot.checkpoints.checkpoint import Checkpoint, FilePart
from stockpot.checkpoints.files import check_link
from stockpot.checkpoints.foreign import check_foreign, check_sharded, foreign_file
from stockpot.checkpoints.formats import FORMATS, endings, format_of, formats, known_endings
from stockpot.checkpoints.header import Header
from stockpot.errors import CheckpointError, LayoutError
from stockpot.files import read_json

__all__ = ["Folder", "contents_of"]


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


def contents_of(folder: Folder) -> Checkpoint:
    """The checkpoint as its headers have it. Raises CheckpointError that says what was found instead."""
    text = folder.text
    if folder.only is not None:
        found = format_of(folder.only)
        if found is None:
            raise _not_a_checkpoint(text, folder.only)
        foreign = foreign_file(folder.only)
        if foreign is not None and found in (FORMATS["safetensors"], FORMATS["torch"]):
            raise LayoutError(f"{text}: {foreign.replace('{there}', os.path.dirname(text) or '.')}")
        # a trainer's own file: the config beside it may be another model's
        config = {} if found is FORMATS["torch"] else _config(os.path.join(folder.local, "config.json"))
        return folder.build("model", config, folder.headers([folder.only]))
    kind, config, files = "model", _config(os.path.join(folder.local, "config.json")), []
    parts, left = _folder_parts(folder)
    headers: list[Header] = []
    is_pipeline = "model_index.json" in folder.names
    if "adapter_config.json" in folder.names:
        kind, config = "adapter", read_json(os.path.join(folder.local, "adapter_config.json"))
        files = [_adapter_file(folder, config)]
        headers = folder.headers(files)
    elif not parts or (_has_weights(folder.names) and not is_pipeline):
        files, headers = _model_files(folder)
    marks = [(h, FilePart("", "adapter_model" if kind == "adapter" else "model")) for h in headers]
    marks += parts
    beside, more = _files_beside(folder, "", files, headers, pipeline=is_pipeline)
    marks += beside
    left += more + _other_folders(folder, {p.name.partition("/")[0] for _, p in parts}, kind)
    named = tuple(part for _, part in marks)
    return folder.build(
        kind, config, [h for h, _ in marks], parted=named if any(p.name for p in named) else (), left=tuple(left)
    )


# parts in folders


def _folder_parts(folder: Folder) -> tuple[list[tuple[Header, FilePart]], list[tuple[str, str]]]:
    """The folders of a checkpoint that hold weights of it: sentence encoders' modules, pipelines' models; and what lies in them
    and is left out.
    """
    out: list[tuple[Header, FilePart]] = []
    left: list[tuple[str, str]] = []
    for name in part_folders(folder.local):
        inside = _SubFolder(folder, name)
        if not _has_weights(inside.names):
            continue
        config = _config(os.path.join(inside.local, "config.json"))
        if config.get("quantization_config"):
            raise CheckpointError(
                f"{folder.text}: {name}/ is quantised ({name}/config.json); dequantise it, or merge the model that it was made of"
            )
        files, headers = _part_weights(folder, inside)
        stem = re.sub(r"(-\d+-of-\d+)?(\.safetensors|\.bin)$", "", files[0])
        stem = "model" if stem == "pytorch_model" else stem
        whole = "model_type" not in config and "_class_name" not in config
        out += [(h, FilePart(name, f"{name}/{stem}", whole)) for h in headers]
        beside, more = _files_beside(inside, name, files, headers)
        out += beside
        left += more
    return out, left


def _part_weights(folder: Folder, inside: Folder) -> tuple[list[str], list[Header]]:
    """The files in a part's folder that are its weights."""
    for whole in _whole_names():
        if f"{whole}.index.json" in inside.names:
            return _sharded(inside, f"{whole}.index.json")
        if whole in inside.names:
            return [whole], inside.headers([whole])
    weights = [n for n in inside.names if n.endswith(known_endings()) and not NOT_WEIGHTS.fullmatch(n)]
    raise CheckpointError(
        f"{inside.text}/ holds weights under a name that is not known: {', '.join(weights[:3])}; expected model.safetensors, "
        "pytorch_model.bin or diffusion_pytorch_model.safetensors"
    )


def _whole_names() -> list[str]:
    """What a whole model's file is called, in the order in which a directory is searched."""
    out = []
    for format in formats():
        if format.model is not None:
            out += [format.model, f"diffusion_pytorch_model{os.path.splitext(format.model)[1]}"]
    return out


class _SubFolder:
    """A folder of a checkpoint's directory, as a Folder."""

    only: str | None = None

    def __init__(self, folder: Folder, name: str) -> None:
        self.above, self.name = folder, name
        self.text = f"{folder.text.rstrip('/')}/{name}"
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


def _other_folders(folder: Folder, taken: set[str], kind: str) -> list[tuple[str, str]]:
    """Folders with weights that nothing names: another adapter, a model of its own."""
    out = []
    for name in folder.names:
        if name in taken or not os.path.isdir(os.path.join(folder.local, name)) or _TRAINING_FOLDER.match(name):
            continue
        inside = folder.listing(name)
        if _has_weights(inside):
            what = (
                "another adapter" if kind == "adapter" and "adapter_config.json" in inside else "a folder with weights"
            )
            out.append((f"{name}/", f"{what} that nothing in the model's own files names; name it to merge it"))
    return out


_TRAINING_FOLDER = re.compile(r"(checkpoint-|global_step|epoch_|step_|runs$|logs$|lightning_logs$|\.)")

# files beside


def _files_beside(
    folder: Folder, part: str, read: Sequence[str], headers: Sequence[Header], *, pipeline: bool = False
) -> tuple[list[tuple[Header, FilePart]], list[tuple[str, str]]]:
    """(the files beside a model that hold more of it, what holds weights and is left out with the reason).

    part: whose folder it is. A file whose tensors the model has already is another copy; of a pipeline, whose weights lie in
    folders, it is the pipeline again.
    """
    parts: list[tuple[Header, FilePart]] = []
    left: list[tuple[str, str]] = []
    at = f"{part}/" if part else ""
    held = {n: e.spec.shape for h in headers for n, e in h.entries.items()}
    taken: set[str] = set()
    for name in folder.names:
        if name in read or not name.endswith(known_endings()) or NOT_WEIGHTS.fullmatch(name):
            continue
        stem = re.sub(r"\.(safetensors|bin|pt|pth|ckpt|pth\.tar|pt\.tar)$", "", name)
        why = next((why for pattern, why in _COPIES if re.fullmatch(pattern, name)), "")
        if pipeline and not why:
            why = "the pipeline's weights lie in its folders; name the file itself to merge it"
        if not why and stem in taken:
            why = f"{stem}.safetensors is read"
        if not why:
            try:
                header = folder.headers([name])[0]
            except CheckpointError as e:
                if name.endswith(".safetensors"):
                    raise
                why = f"no state dict: {str(e).partition(': ')[2][:80]}"
            else:
                found = {n: e.spec.shape for n, e in header.entries.items()}
                if not found:
                    why = "holds no tensors"
                elif all(held.get(n) == shape for n, shape in found.items()):
                    why = "holds tensors of the model again, under the same names"
        if why:
            left.append((at + name, why))
            continue
        parts.append((header, FilePart(at + stem, at + stem, True)))
        taken.add(stem)
    return parts, left


#: files that hold a model's weights once more
_COPIES = (
    (r"consolidated(\.\d+)?\.(safetensors|pth)", "the weights again, in their publisher's own layout"),
    (r"pytorch_model(-\d+-of-\d+)?\.bin", "the weights again, as safetensors are read"),
    (r"(model|pytorch_model|diffusion_pytorch_model)-\d+-of-\d+\.(safetensors|bin)", "a shard that no index names"),
    (r"adapter_model\.(safetensors|bin)", "the adapter again"),
)

# the model itself


def _not_a_checkpoint(text: str, name: str) -> CheckpointError:
    if name.endswith(".gguf"):
        return LayoutError(
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
    for whole in _whole_names():
        ending = os.path.splitext(whole)[1]
        indexes = [f for f in listing if f.endswith(ending + ".index.json")]
        if f"{whole}.index.json" in indexes:
            indexes = [f"{whole}.index.json"]
        if whole in listing and not indexes:
            return [whole], folder.headers([whole])
        if len(indexes) > 1:
            raise CheckpointError(f"{text}: several index files ({', '.join(indexes)}); name one {ending} file instead")
        if indexes:
            return _sharded(folder, indexes[0])
    if any(f.startswith("adapter_model.") for f in listing):
        raise CheckpointError(f"{text}: adapter weights without adapter_config.json; an interrupted save?")
    for format in formats():
        found = [f for f in listing if f.endswith(format.endings) and not _beside_only(f)] if format.alone else []
        if len(found) == 1:
            return found, folder.headers(found)
        if len(found) > 1:
            ending = format.endings[0]
            if re.fullmatch(r"shard-\d+-.*", found[0]):  # as torch writes a distributed checkpoint
                headers = folder.headers(found)
                check_sharded(text, found, headers)
                return found, headers
            raise CheckpointError(
                f"{text}: {len(found)} {ending[1:]} files but no index ({found[0]}, ...); an interrupted download or "
                f"save? Name one file, or restore {format.model}.index.json"
            )
    check_foreign(folder)
    raise _no_weights(folder)


def _beside_only(name: str) -> bool:
    """Whether a file is never the model itself."""
    return re.fullmatch(r"(value_head|v_head|new_embeddings)\.\w+", name) is not None


def _no_weights(folder: Folder) -> CheckpointError:
    text, listing = folder.text, folder.names
    others = [f for f in listing if f.endswith(endings()) and not NOT_WEIGHTS.fullmatch(f)]
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
    inside = _other_folders(folder, set(), "model")
    if inside:
        names = ", ".join(name for name, _ in inside[:4])
        return CheckpointError(
            f"{text}: no weights of its own, but folders with some ({names}): name one of them, {text}/{inside[0][0]}"
        )
    more = ", ..." if len(listing) > 6 else ""
    return CheckpointError(f"{text}: no safetensors file; found {', '.join(listing[:6])}{more}")


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
