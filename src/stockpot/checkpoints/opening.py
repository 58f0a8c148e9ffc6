"""`open_checkpoint`: a directory, a file or an adapter -> Checkpoint. Reads headers and JSON only."""

from __future__ import annotations

import difflib
import json
import os
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.header import Header, read_header
from stockpot.checkpoints.torchzip import read_torch_file
from stockpot.errors import CheckpointError

__all__ = ["TORCH_ENDINGS", "open_checkpoint", "read_json"]

TORCH_ENDINGS = (".ckpt", ".pt", ".pth", ".bin")

_MAX_JSON = 64 * 2**20
_INDEX = ".safetensors.index.json"


def open_checkpoint(ref: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face model directory, a PEFT adapter directory, one `.safetensors` file or one of torch's zip files.

    Only headers and JSON files are read. Raises CheckpointError that names what was found instead.
    """
    text = os.fspath(ref)
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isfile(path):
        if path.endswith(TORCH_ENDINGS):
            return Checkpoint(text, path, "model", {}, (read_torch_file(path).header,))
        if not path.endswith(".safetensors"):
            raise CheckpointError(
                f"{text}: only .safetensors files and torch's zip files ({', '.join(TORCH_ENDINGS)}) can be opened"
            )
        config = _config(os.path.join(os.path.dirname(path), "config.json"))
        return _checked(Checkpoint(text, path, "model", config, (read_header(path),)))
    if not os.path.isdir(path):
        raise CheckpointError(_not_found(text, path))
    try:
        os.listdir(path)
    except OSError as e:
        raise CheckpointError(f"{text}: can't be looked into: {e.strerror or e}") from e
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        return _open_adapter(text, path)
    return _checked(
        Checkpoint(text, path, "model", _config(os.path.join(path, "config.json")), _model_files(text, path))
    )


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    quantised = checkpoint.config.get("quantization_config")
    if isinstance(quantised, dict):
        kind = quantised.get("quant_method", "unknown method")
        raise CheckpointError(
            f"{checkpoint.ref}: weights are quantised ({kind}), averaging their codes would be meaningless; "
            "dequantise the model and merge that"
        )
    return checkpoint


def _open_adapter(text: str, path: str) -> Checkpoint:
    weights = os.path.join(path, "adapter_model.safetensors")
    config = read_json(os.path.join(path, "adapter_config.json"))
    pickled = os.path.join(path, "adapter_model.bin")
    if not os.path.exists(weights) and os.path.exists(pickled):
        return Checkpoint(text, path, "adapter", config, (read_torch_file(pickled).header,))
    if not os.path.exists(weights):
        other = [f for f in sorted(os.listdir(path)) if f.startswith("adapter_model")]
        found = f"found {', '.join(other)}" if other else "found no adapter_model file"
        raise CheckpointError(
            f"{text}: a PEFT adapter without adapter_model.safetensors ({found}); an interrupted save?"
        )
    return Checkpoint(text, path, "adapter", config, (read_header(weights),))


def _model_files(text: str, path: str) -> tuple[Header, ...]:
    listing = sorted(os.listdir(path))
    indexes = [f for f in listing if f.endswith(_INDEX)]
    if "model" + _INDEX in indexes:
        indexes = ["model" + _INDEX]
    if "model.safetensors" in listing and not indexes:
        return (read_header(os.path.join(path, "model.safetensors")),)
    if len(indexes) > 1:
        raise CheckpointError(f"{text}: several index files ({', '.join(indexes)}); name one .safetensors file instead")
    if indexes:
        return _sharded(text, path, indexes[0])
    if any(f.startswith("adapter_model.") for f in listing):
        raise CheckpointError(f"{text}: adapter weights without adapter_config.json; an interrupted save?")
    single = [f for f in listing if f.endswith(".safetensors")]
    if len(single) == 1:
        return (read_header(os.path.join(path, single[0])),)
    if len(single) > 1:
        raise CheckpointError(
            f"{text}: {len(single)} safetensors files but no index ({single[0]}, ...); an interrupted download or save? "
            "Name one file, or restore model.safetensors.index.json"
        )
    if "pytorch_model.bin" in listing:
        return (read_torch_file(os.path.join(path, "pytorch_model.bin")).header,)
    raise CheckpointError(_no_weights(text, listing))


def _no_weights(text: str, listing: list[str]) -> str:
    pickles = [f for f in listing if f.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    snapshots = [f for f in listing if f.startswith("checkpoint-")]
    if pickles:
        return (
            f"{text}: holds pickled weights ({pickles[0]}), which this version does not read; load the model and "
            "save it again with save_pretrained, which writes safetensors"
        )
    if snapshots:
        return f"{text}: a training run, not a checkpoint: name one of its snapshots, such as {text}/{snapshots[-1]}"
    if not listing:
        return f"{text}: an empty directory; expected model.safetensors or model.safetensors.index.json"
    return f"{text}: no safetensors file; found {', '.join(listing[:6])}{', ...' if len(listing) > 6 else ''}"


def _not_found(text: str, path: str) -> str:
    parent = os.path.dirname(path)
    hint = ""
    if os.path.isdir(parent) and os.access(parent, os.R_OK):
        close = difflib.get_close_matches(os.path.basename(path), os.listdir(parent), n=1, cutoff=0.6)
        if close:
            hint = f"; did you mean {os.path.join(os.path.dirname(text), close[0])!r}?"
    local, _, revision = path.rpartition("@")
    if revision and os.path.exists(local):
        hint = f"; a local path has no revision: name {text.rpartition('@')[0]!r} without '@{revision}'"
    if not hint and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        hint = (
            "; if this is a Hugging Face Hub id, download it first (`hf download "
            f"{text.partition('@')[0]} --local-dir DIR`) and name DIR: this version reads local files"
        )
    return f"{text}: no such file or directory{hint}"


def _sharded(text: str, path: str, index_name: str) -> tuple[Header, ...]:
    index = read_json(os.path.join(path, index_name))
    weight_map = index.get("weight_map")
    where = f"{text}/{index_name}"
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected a 'weight_map' from tensor names to files")
    files: list[str] = []
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or os.path.isabs(file) or ".." in file.replace("\\", "/").split("/"):
            raise CheckpointError(f"{where}: tensor {name!r} points outside the directory: {file!r}")
        if file not in files:
            files.append(file)
    missing = [f for f in files if not os.path.isfile(os.path.join(path, f))]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:4])}")
    headers = tuple(read_header(os.path.join(path, f)) for f in sorted(files))
    held: dict[str, str] = {}
    for file, header in zip(sorted(files), headers, strict=True):
        for name in header.entries:
            if name in held:
                raise CheckpointError(f"{text}: tensor {name!r} is in both {held[name]} and {file}")
            held[name] = file
    for name, file in weight_map.items():
        if held.get(name) != file:
            raise CheckpointError(f"{where}: says that {name!r} is in {file}, which does not hold it")
    extra = [name for name in held if name not in weight_map]
    if extra:
        raise CheckpointError(f"{where}: {len(extra)} tensors of its shards are not in the index: {extra[0]!r}, ...")
    return headers


def _config(path: str) -> dict[str, Any]:
    return read_json(path) if os.path.exists(path) else {}


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError for anything else."""
    try:
        if os.path.getsize(path) > _MAX_JSON:
            raise CheckpointError(f"{path}: {os.path.getsize(path)} bytes is too large for a JSON file of a checkpoint")
        with open(path, encoding="utf-8") as f:
            doc = json.load(f)
    except OSError as e:
        raise CheckpointError(f"{path}: can't be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(doc, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(doc).__name__}")
    return doc
