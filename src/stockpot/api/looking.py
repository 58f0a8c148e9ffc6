"""Looking into checkpoints and outputs: inspect, verify."""

from __future__ import annotations

import os
from typing import Any

from stockpot.api.merging import check_threads
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.meaning.architectures import architecture_of, renames_of
from stockpot.checkpoints.meaning.memory import pieces_of, without_wrappers
from stockpot.errors import VerificationError
from stockpot.planning.inputs import open_reference

__all__ = ["inspect", "verify"]


def inspect(ref: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint holds, from its headers alone, as plain data: `base+adapter` too.

    parts      state dicts within a file, folders and heads with files of their own: tensors and bytes of each
    ties       pairs that are one matrix or may be: {second, first, tied: true, false or null, known: from what}
    dialect    the class that the config names, what its names begin with in memory and in the file, wrappers, the format
    beside     files with weights that are not read, and why
    """
    checkpoint = open_reference(os.fspath(ref))
    layers = checkpoint.layers()
    architecture = checkpoint.config.get("architectures")
    dtypes: dict[str, dict[str, int]] = {}
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        row = dtypes.setdefault(spec.dtype.label, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += spec.numel
        row["bytes"] += spec.nbytes
    leaves = checkpoint.parts or (checkpoint,)
    return {
        "path": checkpoint.path if not checkpoint.parts or len(leaves) == 1 else os.fspath(ref),
        "kind": checkpoint.kind,
        "architecture": architecture[0] if isinstance(architecture, list) and architecture else None,
        "files": [{"name": leaf.relative(h), "bytes": h.size} for leaf in leaves for h in leaf.files],
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.nbytes,
        "dtypes": dtypes,
        "layers": layers.stacks,
        "parts": _parts(checkpoint),
        "tied": dict(checkpoint.tied()),
        "ties": [
            {"second": t.second, "first": t.first, "tied": t.tied, "known": t.known, "stored": t.second in checkpoint}
            for t in checkpoint.ties.pairs
        ],
        "dialect": _dialect(checkpoint),
        "beside": [{"name": name, "why": why} for leaf in leaves for name, why in leaf.left],
        "tensors": {
            name: {"dtype": checkpoint.spec(name).dtype.label, "shape": list(checkpoint.spec(name).shape)}
            for name in checkpoint.names()
        },
    }


def _parts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for part, prefix in checkpoint.states.items():
        names = checkpoint.members(part)
        out[part] = {"prefix": prefix, "tensors": len(names), "bytes": sum(checkpoint.spec(n).nbytes for n in names)}
    return out


def _dialect(checkpoint: Checkpoint) -> dict[str, Any]:
    """How its names are to be read."""
    plain, wrapped = without_wrappers(checkpoint.names())
    found = architecture_of(checkpoint.config, plain.values()) if checkpoint.kind == "model" else None
    row: dict[str, Any] = {"format": checkpoint.dialect or None, "wrappers": wrapped or None}
    if found is not None:
        prefix = f"{found.prefix}." if found.prefix else ""
        renames = renames_of(found, checkpoint.config)
        renamed = [n for n in plain.values() if any(p.key != n for p in pieces_of(n, renames, found.prefix))]
        row |= {
            "class": found.name,
            "prefix": prefix,
            "prefixed": bool(prefix) and any(n.startswith(prefix) for n in plain.values()),
            "renamed_in_memory": len(renamed),
        }
    return row


def verify(directory: str | os.PathLike[str], *, threads: int | None = None) -> dict[str, Any]:
    """Read an output again and compare it with its lineage. Returns the lineage; raises VerificationError."""
    from stockpot.engine.verify import compare
    from stockpot.lineage import read_lineage

    workers = min(check_threads(threads), 256) if threads is not None else os.cpu_count() or 1
    lineage, checkpoint = read_lineage(os.fspath(directory))
    try:
        wrong = compare(lineage, checkpoint, workers)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise VerificationError(f"{directory}: the lineage is not one that stockpot writes: {e!r}") from e
    finally:
        checkpoint.close()
    if wrong:
        listed = "\n".join(f"  - {w}" for w in wrong)
        raise VerificationError(f"{os.fspath(directory)}: differs from its lineage:\n{listed}")
    return lineage
