"""What lies beside the weights of a model and belongs to it: folders of templates, and those of its parts."""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.files import check_link
from stockpot.errors import CheckpointError
from stockpot.files import read_any_json

__all__ = ["NOT_WEIGHTS", "TEMPLATE_FOLDERS", "copied_files", "part_files", "part_folders", "side_files", "side_stamps"]

_NOT_COPIED = re.compile(
    r"(.*\.index\.json|config\.json|adapter_config\.json|stockpot\.json|trainer_state\.json|optimizer.*|scheduler.*|"
    r"rng_state.*|training_args.*|all_results\.json|train_results\.json|eval_results\.json)$"
)
_COPIED = re.compile(
    r".*\.(json|jinja|txt|model|spm|bpe|tiktoken|vocab)$|(LICENSE|NOTICE|COPYING)(\..*)?$", re.IGNORECASE
)

TEMPLATE_FOLDERS = ("chat_templates", "additional_chat_templates")


_DEEPEST = 24
#: files of trainers that end like weights
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer.*|scheduler.*|rng_state.*|random_states.*|scaler|sampler.*|.*_optimizer.*|.*_scheduler.*|"
    r"dataloader.*|trainer_state|extra_state.*|recipe_state|loss_scaler.*)\.(bin|pt|pth|pkl|safetensors)"
)
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.index\.json)?$")


def part_folders(directory: str) -> list[str]:
    """The folders that hold parts of a model: those that a sentence encoder's modules.json names (2_Dense and the like), the
    routes of a Router, those of a pipeline's model_index.json (unet, vae, text_encoder). Raises CheckpointError where they are no
    JSON, or lead out of the directory.
    """
    modules = _json(os.path.join(directory, "modules.json"))
    rows = modules if isinstance(modules, list) else ()
    named = [m.get("path") for m in rows if isinstance(m, dict)]
    found = [_within(directory, "modules.json", n) for n in named if isinstance(n, str)]
    for top in dict.fromkeys(["", *found]):
        routes = _json(os.path.join(directory, top, "router_config.json"))
        types = routes.get("types") if isinstance(routes, dict) else None
        for name in types if isinstance(types, dict) else ():
            found.append(_within(directory, "router_config.json", os.path.join(top, name)))
    index = _json(os.path.join(directory, "model_index.json"))
    if isinstance(index, dict):
        found += [
            _within(directory, "model_index.json", k) for k, v in index.items() if isinstance(v, list) and len(v) > 1
        ]
    return [n for n in dict.fromkeys(found) if n]


def _within(directory: str, file: str, name: str) -> str:
    """A path that a file names, plain: nothing for the directory itself. Raises CheckpointError for one that leads out of it."""
    plain = posixpath.normpath(name.replace("\\", "/")) if name else ""
    if plain.startswith(("/", "..")) or ":" in plain:
        raise CheckpointError(f"{os.path.join(directory, file)}: names {name!r}, which lies outside of the directory")
    return "" if plain == "." else plain


def _json(path: str) -> Any:
    return read_any_json(path) if os.path.exists(path) else None


def copied_files(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Tokenizer, processor, generation and chat template files, licences included."""
    directory = checkpoint.directory
    if os.path.isfile(checkpoint.path) and not checkpoint.config:
        return  # a lone weights file: what lies beside it need not belong to it
    code = isinstance(checkpoint.config.get("auto_map"), dict)
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if os.path.isdir(path) and name in TEMPLATE_FOLDERS:
            check_link(directory, path)
            yield from files_below(directory, path, name)
        elif not os.path.isfile(path) or _NOT_COPIED.fullmatch(name):
            continue
        elif _COPIED.fullmatch(name) or (code and name.endswith(".py")):
            check_link(directory, path)
            yield path, name


def files_below(top: str, folder: str, name: str) -> Iterator[tuple[str, str]]:
    """Every file in a folder and its folders. Raises CheckpointError for links that lead out of `top`, and a very deep nest."""
    if name.count(os.sep) > _DEEPEST:
        raise CheckpointError(f"{top}: folders nested more than {_DEEPEST} deep ({name[:60]}...)")
    for entry in sorted(os.listdir(folder)):
        path, relative = os.path.join(folder, entry), os.path.join(name, entry)
        if os.path.isdir(path) and not os.path.islink(path):
            yield from files_below(top, path, relative)
        elif os.path.exists(path):
            check_link(top, path)
            yield path, relative


def side_files(donor: Checkpoint, tokenizer: Checkpoint) -> Iterator[tuple[str, str]]:
    """(path, name in the output) of every file that a merge copies: those of the tokenizer's model, of the donor's parts."""
    yield from copied_files(tokenizer)
    yield from part_files(donor)


def side_stamps(donor: Checkpoint, tokenizer: Checkpoint) -> tuple[tuple[str, int, int, int], ...]:
    """(path, bytes, time, number) of each of them: what shows that it is what was planned with."""
    out = []
    with contextlib.suppress(CheckpointError, OSError):  # reported where they are copied
        for path, _ in side_files(donor, tokenizer):
            found = os.stat(path)
            out.append((path, found.st_size, found.st_mtime_ns, found.st_ino))
    return tuple(dict.fromkeys(out))


def part_files(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """What lies in the folders of a model's parts, but for weights: configs, tokenizers, as they are."""
    for name in part_folders(checkpoint.directory):
        folder = os.path.join(checkpoint.directory, name)
        if os.path.isdir(folder):
            check_link(checkpoint.directory, folder)
            for path, relative in files_below(checkpoint.directory, folder, name):
                if not _WEIGHTS.fullmatch(relative):
                    yield path, relative
