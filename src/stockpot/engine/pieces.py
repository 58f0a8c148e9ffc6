"""Every piece of a plan's tensors (see stockpot.grid), numbered in the order of the output: what the engine counts work in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stockpot.grid import grid_of
from stockpot.planning.plan import TensorPlan

__all__ = ["Pieces"]


class Pieces:
    """Arrays int64 over pieces: the `tensor` of each, its `number` there, its elements `start`..`stop`; `first`, by tensor."""

    def __init__(self, tensors: Sequence[TensorPlan]) -> None:
        grids = [grid_of(t.spec.shape) for t in tensors]
        counts = np.array([g.pieces for g in grids], np.int64)
        self.first = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        self.tensor = np.repeat(np.arange(len(tensors), dtype=np.int64), counts)
        self.number = np.arange(len(self.tensor), dtype=np.int64) - self.first[self.tensor]
        numel, row, piece, per_row = (
            np.array([getattr(g, name) for g in grids], np.int64)[self.tensor]
            for name in ("numel", "row", "piece", "per_row")
        )
        long = per_row > 0
        whole = np.where(long, self.number // np.maximum(per_row, 1) * row, 0)
        self.start = whole + (self.number - np.where(long, self.number // np.maximum(per_row, 1) * per_row, 0)) * piece
        self.stop = np.minimum(self.start + piece, np.where(long, whole + row, numel))

    def __len__(self) -> int:
        return len(self.tensor)

    def of(self, tensor: int) -> Any:
        """A tensor's pieces, as an array of their numbers here."""
        return np.arange(self.first[tensor], self.first[tensor + 1])
