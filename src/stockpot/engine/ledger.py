"""What was seen of every piece that passed by: digests and measures of the output's and of each input's bytes.

Compiled calls write into it directly, in any order; at the end a tensor's digest is that of its pieces', and what is in the
journal are its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stockpot.engine.digests import tensor_digest
from stockpot.engine.measures import Measure
from stockpot.engine.pieces import Pieces

__all__ = ["Ledger"]


class Ledger:
    """Slot 0 is the output's, slot 1 + i that of a tensor's input i. `done` says which pieces are safely merged.

    digests [slots, pieces, 32] uint8; squares [slots, pieces] float64; nans, infinities [slots, pieces] int64
    """

    def __init__(self, pieces: Pieces, inputs: int) -> None:
        shape = (1 + inputs, len(pieces))
        self.pieces = pieces
        self.digests = np.zeros((*shape, 32), np.uint8)
        self.squares = np.zeros(shape)
        self.nans = np.zeros(shape, np.int64)
        self.infinities = np.zeros(shape, np.int64)
        self.done = np.zeros(len(pieces), np.bool_)

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        return self.digests, self.squares, self.nans, self.infinities

    def put(self, slot: int, rows: Any, digests: Sequence[bytes], measures: Sequence[Measure]) -> None:
        """Of some pieces: the digest and the measure of each."""
        self.digests[slot, rows] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        self.squares[slot, rows] = [m.squares for m in measures]
        self.nans[slot, rows] = [m.nans for m in measures]
        self.infinities[slot, rows] = [m.infinities for m in measures]

    # what tensors come to

    def digest(self, tensor: int, slot: int) -> str | None:
        """A tensor's digest; None where not all of its pieces are done."""
        span = slice(self.pieces.first[tensor], self.pieces.first[tensor + 1])
        if not self.done[span].all():
            return None
        return tensor_digest([self.digests[slot, span].tobytes()])

    def measures(self) -> list[list[Measure]]:
        """Of every tensor's output and inputs, slot by slot; empty lists for tensors without elements."""
        first = self.pieces.first
        full = np.flatnonzero(first[1:] > first[:-1])
        out: list[list[Measure]] = [[] for _ in range(len(first) - 1)]
        if len(full):
            sums = [
                np.add.reduceat(a, first[full], axis=1).T.tolist() for a in (self.squares, self.nans, self.infinities)
            ]
            for t, squares, nans, infinities in zip(full.tolist(), *sums, strict=True):
                out[t] = [Measure(*m) for m in zip(squares, nans, infinities, strict=True)]
        return out

    # what a journal keeps

    def encode(self, rows: Any) -> dict[str, str]:
        """Rows as text."""
        parts: dict[str, Any] = {
            "digests": self.digests,
            "squares": self.squares,
            "nans": self.nans,
            "infinities": self.infinities,
        }
        texts = {name: np.ascontiguousarray(array[:, rows]).tobytes().hex() for name, array in parts.items()}
        return {"rows": np.asarray(rows, np.int64).tobytes().hex(), **texts}

    def decode(self, texts: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """(rows, their arrays) of what `encode` gave. ValueError for anything else."""
        try:
            rows = np.frombuffer(bytes.fromhex(texts["rows"]), np.int64)
            n, slots = len(rows), len(self.squares)
            kinds = {"squares": np.float64, "nans": np.int64, "infinities": np.int64}
            found: dict[str, Any] = {
                k: np.frombuffer(bytes.fromhex(texts[k]), kind).reshape(slots, n) for k, kind in kinds.items()
            }
            found["digests"] = np.frombuffer(bytes.fromhex(texts["digests"]), np.uint8).reshape(slots, n, 32)
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError("not a record") from e
        if not n or rows.min() < 0 or rows.max() >= len(self.pieces):
            raise ValueError("not rows of this plan")
        return rows, found

    def take_over(self, rows: Any, found: dict[str, Any], which: Any) -> None:
        """Rows of an earlier run, those of `which` among them."""
        for name, array in found.items():
            getattr(self, name)[:, rows[which]] = array[:, which]
        self.done[rows[which]] = True
