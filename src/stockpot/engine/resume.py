"""What an earlier run of the same plan left behind: what its journal vouches for and the disk confirms."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from stockpot.engine.digests import piece_digest
from stockpot.engine.journal import Record
from stockpot.grid import grid_of
from stockpot.planning.plan import Plan

__all__ = ["sound_records"]


def sound_records(plan: Plan, partial: str, records: Sequence[Record]) -> Iterator[Record]:
    """Those records whose bytes are really in the shards in `partial`."""
    fds: dict[int, int] = {}
    try:
        for record in records:
            if not _plausible(plan, record):
                continue
            t = plan.tensors[record.tensor]
            if t.shard not in fds:
                fds[t.shard] = os.open(os.path.join(partial, plan.shards[t.shard].name), os.O_RDONLY)
            grid = grid_of(t.spec.shape)
            size = t.spec.dtype.itemsize
            for piece, digest in zip(range(record.first, record.last), record.out, strict=True):
                start, stop = grid.bounds(piece)
                if piece_digest(os.pread(fds[t.shard], (stop - start) * size, t.offset + start * size)) != digest:
                    break
            else:
                yield record
    finally:
        for fd in fds.values():
            os.close(fd)


def _plausible(plan: Plan, record: Record) -> bool:
    """Whether a journal's record can be one of this plan's at all."""
    if not 0 <= record.tensor < len(plan.tensors):
        return False
    t = plan.tensors[record.tensor]
    count = record.last - record.first
    return (
        0 <= record.first < record.last <= grid_of(t.spec.shape).pieces
        and len(record.out) == count
        and len(record.inputs) == len(t.inputs)
        and len(record.measures) == len(t.inputs) + 1
        and all(len(d) == count for d in record.inputs)
    )
