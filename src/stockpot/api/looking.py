"""Looking into checkpoints and outputs: inspect, verify."""

from __future__ import annotations

import os
from typing import Any

from stockpot.api.merging import check_threads
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.errors import VerificationError

__all__ = ["inspect", "verify"]


def inspect(ref: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint holds, from its headers alone, as plain data."""
    checkpoint = open_checkpoint(ref)
    layers = checkpoint.layers()
    tied = checkpoint.tied()
    architecture = checkpoint.config.get("architectures")
    dtypes: dict[str, dict[str, int]] = {}
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        row = dtypes.setdefault(spec.dtype.label, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += spec.numel
        row["bytes"] += spec.nbytes
    return {
        "path": checkpoint.path,
        "kind": checkpoint.kind,
        "architecture": architecture[0] if isinstance(architecture, list) and architecture else None,
        "files": [{"name": checkpoint.relative(h), "bytes": h.size} for h in checkpoint.files],
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.nbytes,
        "dtypes": dtypes,
        "layers": layers.stacks,
        "tied": tied,
        "tensors": {
            name: {"dtype": checkpoint.spec(name).dtype.label, "shape": list(checkpoint.spec(name).shape)}
            for name in checkpoint.names()
        },
    }


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
