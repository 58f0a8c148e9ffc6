"""Digests of tensors, put together from those of their pieces as these pass by in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.digests import piece_digest, tensor_digest
from stockpot.grid import grid_of

__all__ = ["DigestBook", "observer"]


class DigestBook:
    """`done` holds the tensors whose every piece was added."""

    def __init__(self) -> None:
        self.done: dict[Any, str] = {}
        self._open: dict[Any, dict[int, bytes]] = {}

    def add(self, key: Any, pieces: int, first: int, digests: Sequence[bytes]) -> None:
        if key in self.done:
            return
        if pieces == 1:
            self.done[key] = tensor_digest(digests)
            return
        known = self._open.setdefault(key, {})
        known.update(enumerate(digests, first))
        if len(known) == pieces:
            self.done[key] = tensor_digest(known[k] for k in range(pieces))
            del self._open[key]


def observer(
    part: Checkpoint, book: DigestBook, lock: threading.Lock
) -> Callable[[ReadRequest, memoryview[Any]], None]:
    """Books the digests of the pieces that a read covers whole."""

    def observe(request: ReadRequest, raw: memoryview[Any]) -> None:
        spec = part.spec(request.name)
        grid = grid_of(spec.shape)
        first = next((k for k in range(grid.pieces) if grid.bounds(k)[0] >= request.start), grid.pieces)
        last = first
        digests = []
        while last < grid.pieces and grid.bounds(last)[1] <= request.stop:
            low, high = (x - request.start for x in grid.bounds(last))
            digests.append(piece_digest(raw[low * spec.dtype.itemsize : high * spec.dtype.itemsize]))
            last += 1
        if digests:
            with lock:
                book.add(request.name, grid.pieces, first, digests)

    return observe
