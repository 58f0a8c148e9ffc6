"""What lies beside the weights of a model and belongs to it: folders of templates, and those of a sentence encoder."""

from __future__ import annotations

import json
import os

from stockpot.errors import CheckpointError

__all__ = ["TEMPLATE_FOLDERS", "module_folders"]

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
