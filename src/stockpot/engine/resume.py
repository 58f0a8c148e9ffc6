"""What an earlier run of the same plan left behind: what its journal vouches for and the disk confirms."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from stockpot.engine.digests import piece_digest
from stockpot.engine.ledger import Ledger
from stockpot.planning.plan import Plan

__all__ = ["take_over"]


def take_over(plan: Plan, partial: str, ledger: Ledger, found: Iterable[tuple[Any, dict[str, Any]]]) -> int:
    """Put those pieces into the ledger whose bytes are really in the shards in `partial`. How many bytes they are."""
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
                taken += n * int(sound[i])
            ledger.take_over(rows, seen, np.flatnonzero(sound))
    finally:
        for fd in fds.values():
            os.close(fd)
    return taken
