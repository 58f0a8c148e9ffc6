"""One checkpoint's tensors with the entries of their axes in other orders, looked up while they are read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.derived import DerivedCheckpoint, digest_of
from stockpot.checkpoints.source import ReadRequest
from stockpot.specs import DType

__all__ = ["GatheredCheckpoint"]


@dataclass(frozen=True)
class GatheredCheckpoint(DerivedCheckpoint):
    """One source's tensors with the entries of their axes in other orders. Along the first axis -1 stands for zeros.

    orders  name -> axis -> the source's index for each entry of the output
    """

    orders: dict[str, dict[int, Sequence[int]]] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> Checkpoint:
        return self.sources[0]

    @property
    def made(self) -> str:
        orders = (
            (n, a, array("q", o).tobytes().hex()) for n, by_axis in self.orders.items() for a, o in by_axis.items()
        )
        return super().made + digest_of("\n".join(map(str, orders)))

    def written(self, name: str) -> DType:
        return self.source.written(name)

    def scratch_of(self, name: str) -> int:
        return self.source.scratch_of(name)

    def stored(self, name: str) -> Iterable[tuple[Checkpoint, str]]:
        return self.source.stored(name)

    @property
    def resident(self) -> int:
        """Whole rows of those tensors whose rows are rearranged, in eight threads."""
        inner = [n for n, by_axis in self.orders.items() if set(by_axis) - {0}]
        widest = max((self.spec(n).nbytes // max(self.spec(n).shape[0], 1) for n in inner), default=0)
        return 3 * 8 * widest + self.source.resident

    @property
    def scratch_itemsize(self) -> int:
        return 16 + self.source.scratch_itemsize

    @property
    def pieces_at_once(self) -> int:
        return self.source.pieces_at_once

    def passed(self, name: str) -> tuple[Checkpoint, str, int] | None:
        return None if name in self.orders else (self.source, name, 0)

    def computed(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        by_axis = self.orders.get(name)
        if start == stop:
            return
        if by_axis is None:
            self.source.read([ReadRequest(name, start, stop)], out)
            return
        shape = self.spec(name).shape
        row = math.prod(shape[1:])
        if not set(by_axis) - {0}:
            self._rows(name, row, start, stop, out)
            return
        import numpy as np

        size = self.spec(name).dtype.itemsize
        first, last = start // row, -(-stop // row)
        raw = np.empty((last - first) * row * size, np.uint8)
        self._rows(name, row, first * row, last * row, raw.data)
        values = raw.view(f"u{size}").reshape(last - first, *shape[1:])
        for axis, order in by_axis.items():
            if axis:
                values = values.take(np.asarray(order), axis)
        flat = np.ascontiguousarray(values).reshape(-1)[start - first * row : stop - first * row]
        out[:] = flat.view(np.uint8).data

    def _rows(self, name: str, row: int, start: int, stop: int, out: memoryview[Any]) -> None:
        """Elements start..stop, rows found by the order of the first axis."""
        order = self.orders[name].get(0)
        size = self.spec(name).dtype.itemsize
        wanted: list[ReadRequest] = []
        position = filled = 0

        def read() -> None:
            nonlocal filled
            if wanted:
                self.source.read(wanted, out[filled:position])
            wanted.clear()
            filled = position

        while start < stop:
            number, within = divmod(start, row)
            n = min(row - within, stop - start)
            own = number if order is None else order[number]
            if own < 0:
                read()
                out[position : position + n * size] = bytes(n * size)
                filled = position + n * size
            else:
                at = own * row + within
                if wanted and wanted[-1].stop == at:
                    wanted[-1] = ReadRequest(name, wanted[-1].start, at + n)
                else:
                    wanted.append(ReadRequest(name, at, at + n))
            position += n * size
            start += n
        read()
