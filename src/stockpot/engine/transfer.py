"""Bytes between files and memory, looked at on the way.

Where the files are local and the kernels know how, a whole unit is read (or written), hashed and measured by one compiled
call without Python's lock. Elsewhere, and where that call fails, Python does the same, and says what is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.checkpoints.source import ReadRequest, TensorSource
from stockpot.engine.digests import piece_digest
from stockpot.engine.measures import Measure, measure
from stockpot.engine.native import Stream, load_kernels
from stockpot.engine.sink import Sink
from stockpot.engine.units import Unit
from stockpot.grid import grid_of
from stockpot.specs import DType

__all__ = ["Seen", "read_unit", "write_unit"]


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one input of a unit, or of its output: the digest and the measure of each piece, in order."""

    digests: list[bytes]
    measures: list[Measure]


def read_unit(
    unit: Unit, inputs: Sequence[TensorSource], raws: Sequence[memoryview[Any]], dtypes: Sequence[DType], *, look: bool
) -> list[Seen]:
    """Fill `raws` with the unit's bytes of every input. What was seen of each, if asked to look. Raises ReadError."""
    sources = [inputs[operand.model] for operand in unit.lead.inputs]
    wanted = [
        [ReadRequest(s.tensor.inputs[i].name, s.start, s.stop) for s in unit.segments] for i in range(len(sources))
    ]
    if _compiled():
        places = [source.extents(requests) for source, requests in zip(sources, wanted, strict=True)]
        streams = [Stream(raw, d, at) for raw, d, at in zip(raws, dtypes, places, strict=True) if at is not None]
        if len(streams) == len(raws):
            seen = _at_once(unit, streams, look=look, write=False)
            if seen is not None:
                return seen
    seen = []
    for source, requests, raw, dtype in zip(sources, wanted, raws, dtypes, strict=True):
        source.read(requests, raw)
        if look:  # now, while its bytes are in the core's cache
            seen.append(_look(unit, raw, dtype))
    return seen


def write_unit(unit: Unit, out: memoryview[Any], sink: Sink, *, look: bool) -> list[Seen]:
    """Write a unit's output to its places. What was seen of it, if asked to look. Raises OutputError."""
    dtype = unit.lead.spec.dtype
    runs = list(_runs(unit))
    if sink.direct and _compiled():
        extents = [(sink.fd(shard), offset, stop - start) for shard, offset, start, stop in runs]
        seen = _at_once(unit, [Stream(out, dtype, extents)], look=look, write=True)
        if seen is not None:
            sink.wrote({shard for shard, *_ in runs})
            return seen
    seen = [_look(unit, out, dtype)] if look else []
    for shard, offset, start, stop in runs:
        sink.write(shard, out[start:stop], offset)
    return seen


def _compiled() -> bool:
    kernels = load_kernels()
    return kernels is not None and kernels.transfers


def _at_once(unit: Unit, streams: Sequence[Stream], *, look: bool, write: bool) -> list[Seen] | None:
    """By one compiled call; None where that did not work."""
    kernels = load_kernels()
    assert kernels is not None
    pieces = _bounds(unit)
    found = kernels.transfer(streams, pieces, pieces, look=look, write=write)
    if found is None:
        return None
    seen = []
    for stream, (digests, measures) in zip(streams, found, strict=False):  # none where it did not look
        known = [Measure(*m) for m in measures] if measures else measure(kernels, stream.raw, stream.dtype, pieces)
        seen.append(Seen(digests, known))
    return seen


def _look(unit: Unit, raw: memoryview[Any], dtype: DType) -> Seen:
    pieces, size = _bounds(unit), dtype.itemsize
    digests = [piece_digest(raw[a * size : b * size]) for a, b in itertools.pairwise(pieces)]
    return Seen(digests, measure(load_kernels(), raw, dtype, pieces))


def _bounds(unit: Unit) -> list[int]:
    """Where the unit's pieces lie in its data: elements, each beginning where the last ended."""
    pieces, end = [0], 0
    for s in unit.segments:
        bounds = grid_of(s.tensor.spec.shape).bounds
        at = end - s.start
        pieces += [at + bounds(k)[1] for k in range(s.first, s.last)]
        end = at + s.stop
    return pieces


def _runs(unit: Unit) -> Iterator[tuple[int, int, int, int]]:
    """(shard, offset there, start, stop) in bytes; neighbours in the file are written together."""
    size = unit.lead.spec.dtype.itemsize
    shard, offset, start, at = -1, 0, 0, 0
    for s in unit.segments:
        place = s.tensor.offset + s.start * size
        if s.tensor.shard != shard or place != offset + at - start:
            if shard >= 0:
                yield shard, offset, start, at
            shard, offset, start = s.tensor.shard, place, at
        at += (s.stop - s.start) * size
    yield shard, offset, start, at
