"""One part of a checkpoint that has several: a state dict of a file, a folder of a pipeline."""

from __future__ import annotations

import os
from dataclasses import replace

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.checkpoints.views import renamed
from stockpot.errors import ArgumentError, nearest

__all__ = ["picked"]


def picked(checkpoint: Checkpoint, part: str) -> Checkpoint:
    """The part under its own names, without the prefix that it has among others. Raises ArgumentError where there is none."""
    states = checkpoint.states
    alone = {key: prefix for header in checkpoint.files for key, prefix in header.parts.items() if key}
    if part not in states and part in alone:
        return checkpoint  # the only one
    if part not in states:
        has = f"it has {', '.join(map(repr, states))}" if states else "it has one state dict, and no parts"
        raise ArgumentError(f"{checkpoint.ref}: no part {part!r}; {has}{nearest(part, states)}")
    if part in {p.name for p in checkpoint.file_parts} and os.path.isdir(os.path.join(checkpoint.path, part)):
        return open_checkpoint(os.path.join(checkpoint.path, part))  # a folder of its own
    prefix = states[part]
    found = renamed(
        checkpoint, {n[len(prefix) :]: n for n in checkpoint.members(part)}, ref=f"{checkpoint.ref} ({part})"
    )
    own = [h.path for h, p in zip(checkpoint.files, checkpoint.parted) if p.name == part]
    # what lies beside the model is not the part's
    return replace(found, path=own[0], config={}) if own and not checkpoint.parts else found
