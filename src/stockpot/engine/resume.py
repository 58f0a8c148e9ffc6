"""What an earlier run of the same plan left behind: what its journal vouches for and the disk confirms."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.digests import piece_digest
from stockpot.engine.ledger import Ledger
from stockpot.planning.plan import Plan

__all__ = ["Inputs", "take_over"]


class Inputs:
    """Whether inputs still hold what pieces were made of, where nothing else shows that they are the same files."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        #: statistics are of whole tensors and models, and gathered before: bytes of a piece say nothing about them
        self.told_by_pieces = not plan.stats

    def hold(self, tensor: int, start: int, stop: int, digests: Any) -> bool:
        """digests: of the inputs' pieces as they were read, `[inputs, 32]` uint8."""
        t = self.plan.tensors[tensor]
        if not self.told_by_pieces:
            return False
        for o, digest in zip(t.inputs, digests, strict=False):
            source = self.plan.inputs[o.model].checkpoint
            raw = bytearray((stop - start) * source.spec(o.name).dtype.itemsize)
            source.read([ReadRequest(o.name, start, stop)], memoryview(raw))
            if piece_digest(raw) != digest.tobytes():
                return False
        return True


def take_over(
    plan: Plan,
    partial: str,
    ledger: Ledger,
    found: Iterable[tuple[Any, dict[str, Any]]],
    inputs: Inputs | None = None,
) -> int:
    """Put those pieces into the ledger whose bytes are really in the shards in `partial`, and are of what the inputs hold. How
    many bytes they are.

    inputs: asked for each piece, where the inputs are not known to be the same files.
    """
    fds: dict[int, int] = {}
    pieces, taken = ledger.pieces, 0
    try:
        for rows, seen in found:
            sound = np.zeros(len(rows), np.bool_)
            for i, row in enumerate(rows):
                t = plan.tensors[pieces.tensor[row]]
                if t.shard not in fds:
                    fds[t.shard] = os.open(os.path.join(partial, plan.shards[t.shard].name), os.O_RDONLY)
                size, start = t.spec.dtype.itemsize, int(pieces.start[row])
                n = (int(pieces.stop[row]) - start) * size
                raw = os.pread(fds[t.shard], n, t.offset + start * size)
                sound[i] = not ledger.done[row] and piece_digest(raw) == seen["digests"][0, i].tobytes()
                if sound[i] and inputs is not None:
                    start, stop = int(pieces.start[row]), int(pieces.stop[row])
                    sound[i] = inputs.hold(t.index, start, stop, seen["digests"][1:, i])
                taken += n * int(sound[i])
            ledger.take_over(rows, seen, np.flatnonzero(sound))
    finally:
        for fd in fds.values():
            os.close(fd)
    return taken
