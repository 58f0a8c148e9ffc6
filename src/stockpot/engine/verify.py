"""Checks a directory against its lineage: every tensor's bytes are read and hashed again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.devices import byte_buffer
from stockpot.engine.digests import piece_digest, tensor_digest
from stockpot.planning.grid import grid_of

__all__ = ["checkpoint_digests", "compare"]


def checkpoint_digests(checkpoint: Checkpoint, threads: int) -> dict[str, str]:
    """Digest of every tensor, read piece by piece by several threads."""

    def one(name: str) -> tuple[str, str]:
        spec = checkpoint.spec(name)
        grid = grid_of(spec.shape)
        pieces = []
        for k in range(grid.pieces):
            start, stop = grid.bounds(k)
            raw = byte_buffer((stop - start) * spec.dtype.itemsize)
            checkpoint.read([ReadRequest(name, start, stop)], raw)
            pieces.append(piece_digest(raw))
        return name, tensor_digest(pieces)

    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(one, checkpoint.names()))


def compare(recorded: Mapping[str, Any], checkpoint: Checkpoint, threads: int) -> list[str]:
    """What differs from the `output` part of a lineage, in words; an empty list when nothing does."""
    wrong = []
    for file in recorded["files"]:
        path = os.path.join(checkpoint.directory, file["name"])
        if not os.path.exists(path):
            wrong.append(f"{file['name']}: missing")
        elif os.path.getsize(path) != file["bytes"]:
            wrong.append(f"{file['name']}: {os.path.getsize(path)} bytes, the lineage says {file['bytes']}")
    tensors = recorded["tensors"]
    actual = checkpoint_digests(checkpoint, threads)
    for name, entry in tensors.items():
        if name not in actual:
            wrong.append(f"{name!r}: missing")
            continue
        spec = checkpoint.spec(name)
        if spec.dtype.label != entry["dtype"] or list(spec.shape) != entry["shape"]:
            wrong.append(
                f"{name!r}: {spec.dtype} {list(spec.shape)}, the lineage says {entry['dtype']} {entry['shape']}"
            )
        elif actual[name] != entry["digest"]:
            wrong.append(f"{name!r}: its bytes are not those that were written")
    wrong += [f"{name!r}: not in the lineage" for name in actual if name not in tensors]
    return wrong
