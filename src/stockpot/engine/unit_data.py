"""What a worker has in hand: a unit with its inputs' bytes; and which elements of it make a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.checkpoints.source import ReadRequest, TensorSource
from stockpot.engine.devices import byte_buffer
from stockpot.engine.units import Segment, Unit
from stockpot.specs import DType, work_itemsize

__all__ = ["SAMPLES", "UnitData", "read_segment", "sample_runs"]

#: elements of a sample
SAMPLES = 2**15


@dataclass
class UnitData:
    """A unit with its inputs' bytes: `raws[i]` holds input i of every segment, one after the other."""

    unit: Unit
    raws: list[memoryview[Any]]
    dtypes: list[DType]
    slot: dict[Any, Any] = field(default_factory=dict)

    def part(self, i: int, start: int, stop: int) -> memoryview[Any]:
        """Bytes of elements start..stop of the unit, of input i."""
        size = self.dtypes[i].itemsize
        return self.raws[i][start * size : stop * size]

    @property
    def wide(self) -> bool:
        """Whether it is computed in float64."""
        return work_itemsize(self.unit.lead.spec.dtype) == 8


def read_segment(segment: Segment, sources: Sequence[TensorSource], slot: dict[Any, Any] | None = None) -> UnitData:
    """A unit of one segment, read into memory of its own. sources: by the numbers that the tensor's operands give."""
    raws, dtypes = [], []
    for operand in segment.tensor.inputs:
        source = sources[operand.model]
        dtype = source.spec(operand.name).dtype
        raw = byte_buffer((segment.stop - segment.start) * dtype.itemsize)
        source.read([ReadRequest(operand.name, segment.start, segment.stop)], raw)
        raws.append(raw)
        dtypes.append(dtype)
    return UnitData(Unit((segment,)), raws, dtypes, {} if slot is None else slot)


def sample_runs(n: int, samples: int = SAMPLES, run: int = 1024) -> list[tuple[int, int]]:
    """Short runs spread evenly over n elements, `samples` elements in all."""
    if n <= run:
        return [(0, n)]
    count = max(min(samples // run, n // run), 1)
    return [(start, start + run) for start in ((n - run) * i // max(count - 1, 1) for i in range(count))]
