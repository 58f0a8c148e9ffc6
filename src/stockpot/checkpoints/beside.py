"""What lies beside the weights of a model and belongs to it: folders of templates, and those of a sentence encoder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.files import check_link
from stockpot.errors import CheckpointError

__all__ = ["TEMPLATE_FOLDERS", "copied_files", "module_files", "module_folders"]

_NOT_COPIED = re.compile(
    r"(.*\.index\.json|config\.json|adapter_config\.json|stockpot\.json|trainer_state\.json|optimizer.*|scheduler.*|"
    r"rng_state.*|training_args.*|all_results\.json|train_results\.json|eval_results\.json)$"
)
_COPIED = re.compile(
    r".*\.(json|jinja|txt|model|spm|bpe|tiktoken|vocab)$|(LICENSE|NOTICE|COPYING)(\..*)?$", re.IGNORECASE
)

TEMPLATE_FOLDERS = ("chat_templates", "additional_chat_templates")


def module_folders(directory: str) -> list[str]:
    """The folders that modules.json names (1_Pooling and the like). Raises CheckpointError where it is no JSON."""
    path = os.path.join(directory, "modules.json")
    if not os.path.isfile(path):
        return []
    try:
        with open(path, encoding="utf-8") as f:
            modules = json.load(f)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: not valid JSON: {e}") from e
    names = [m.get("path") for m in (modules if isinstance(modules, list) else ()) if isinstance(m, dict)]
    return [n for n in names if isinstance(n, str) and n and os.path.basename(n) == n and not n.startswith(".")]


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
    """Every file in a folder and its folders; links must not lead out of `top`."""
    for entry in sorted(os.listdir(folder)):
        path, relative = os.path.join(folder, entry), os.path.join(name, entry)
        if os.path.isdir(path) and not os.path.islink(path):
            yield from files_below(top, path, relative)
        elif os.path.exists(path):
            check_link(top, path)
            yield path, relative


def module_files(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """The folders that a sentence encoder's modules.json names (1_Pooling and the like), as they are."""
    for name in module_folders(checkpoint.directory) if checkpoint.kind == "model" else ():
        folder = os.path.join(checkpoint.directory, name)
        if os.path.isdir(folder):
            check_link(checkpoint.directory, folder)
            yield from files_below(checkpoint.directory, folder, name)
