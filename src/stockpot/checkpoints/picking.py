"""One part of a checkpoint that has several: a state dict of a file, a folder of a pipeline."""

from __future__ import annotations

import os

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.checkpoints.views import renamed
from stockpot.errors import ArgumentError, nearest

__all__ = ["picked"]


def picked(checkpoint: Checkpoint, part: str) -> Checkpoint:
    """The part under its own names, without the prefix that it has among others. Raises ArgumentError where there is none."""
    states = checkpoint.states
    if part not in states:
        has = f"it has {', '.join(map(repr, states))}" if states else "it has one state dict, and no parts"
        raise ArgumentError(f"{checkpoint.ref}: no part {part!r}; {has}{nearest(part, states)}")
    folder = os.path.join(checkpoint.path, part)
    if os.path.isfile(os.path.join(folder, "config.json")):
        return open_checkpoint(folder)  # a model of its own, with a config
    prefix = states[part]
    others = [p for key, p in states.items() if key != part and p.startswith(prefix) and p != prefix]
    names = {
        n[len(prefix) :]: n for n in checkpoint.names() if n.startswith(prefix) and not n.startswith(tuple(others))
    }
    return renamed(checkpoint, names, ref=f"{checkpoint.ref} ({part})")
