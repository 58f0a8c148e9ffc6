"""How a tensor is cut. The grid depends on the shape alone, never on the budget, the threads or the machine.

A **piece** is the unit of digests, journal and partial sums: as many whole rows as fit into PIECE elements, or
PIECE-sized parts of one row where a row is longer. A block is a run of pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from stockpot.specs import Shape

__all__ = ["PIECE", "REDUCE", "SMALL", "Grid", "grid_of"]

#: elements of a piece, at most
PIECE = 2**19
#: elements of one partial sum inside a piece
REDUCE = 2**16
#: tensors of at most this many elements are batched
SMALL = 2**16


@dataclass(frozen=True, slots=True)
class Grid:
    """Pieces of one tensor. `row` is the elements of a row; 1-D tensors have rows of one element."""

    numel: int
    row: int
    piece: int
    per_row: int  # pieces per row where rows are longer than a piece, else 0

    @property
    def pieces(self) -> int:
        if self.numel == 0:
            return 0
        if self.per_row:
            return (self.numel // self.row) * self.per_row
        return -(-self.numel // self.piece)

    def bounds(self, k: int) -> tuple[int, int]:
        """First element and end of piece k."""
        if self.per_row:
            base = (k // self.per_row) * self.row
            start = base + (k % self.per_row) * self.piece
            return start, min(start + self.piece, base + self.row)
        start = k * self.piece
        return start, min(start + self.piece, self.numel)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """First element and end of pieces first..last (exclusive)."""
        return self.bounds(first)[0], self.bounds(last - 1)[1]


@lru_cache(maxsize=65536)
def grid_of(shape: Shape) -> Grid:
    """The grid of a tensor of this shape."""
    numel = math.prod(shape)
    row = math.prod(shape[1:]) if len(shape) > 1 else 1
    if row > PIECE:
        return Grid(numel, row, PIECE, -(-row // PIECE))
    return Grid(numel, row, (PIECE // max(row, 1)) * max(row, 1), 0)
