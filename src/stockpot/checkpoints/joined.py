"""Tensors put together of runs of elements of other checkpoints' tensors, looked up while they are read."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.derived import DerivedCheckpoint, digest_of
from stockpot.checkpoints.source import ReadRequest
from stockpot.specs import DType

__all__ = ["Joined", "JoinedCheckpoint", "Run", "join"]

#: elements of a run that is still read by itself, and of what is read at once where runs are shorter
_SHORT = 512
_BLOCK = 2**19


@dataclass(frozen=True, slots=True)
class Run:
    """Elements of a source's tensor: `length` of them from `first` + k * `step` on, for k = 0, 1, ... Source -1: zeros."""

    source: int
    name: str
    first: int
    step: int
    length: int


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor made of runs that take turns. ends: where each ends within one turn."""

    runs: tuple[Run, ...]
    ends: tuple[int, ...]

    @property
    def scattered(self) -> bool:
        """Whether runs are so short that each should not be read by itself."""
        return any(r.step and r.length < _SHORT for r in self.runs)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Run, int, int]]:
        """(run, first element of its tensor, end) of what elements start..stop are made of, in order."""
        turn = self.ends[-1]
        while start < stop:
            k, within = divmod(start, turn)
            i = bisect.bisect_right(self.ends, within)
            run = self.runs[i]
            at = within - (self.ends[i] - run.length)
            n = min(run.length - at, stop - start)
            first = run.first + k * run.step + at
            yield run, first, first + n
            start += n


def join(runs: Sequence[Run]) -> Joined:
    return Joined(tuple(runs), tuple(accumulate(r.length for r in runs)))


@dataclass(frozen=True)
class JoinedCheckpoint(DerivedCheckpoint):
    """Tensors put together of runs of elements of its sources' tensors."""

    layout: dict[str, Joined] = field(default_factory=dict, repr=False)

    @property
    def made(self) -> str:
        return super().made + digest_of(f"{self.layout}")

    def written(self, name: str) -> DType:
        spec = self.spec(name)
        found = {self.sources[r.source].written(r.name) for r in self.layout[name].runs if r.source >= 0}
        return found.pop() if len(found) == 1 and spec.dtype.is_float else spec.dtype

    def scratch_of(self, name: str) -> int:
        runs = self.layout[name].runs
        inner = max((self.sources[r.source].scratch_of(r.name) for r in runs if r.source >= 0), default=0)
        return inner + (4 * 8 * _BLOCK if self.layout[name].scattered else 0)

    def stored(self, name: str) -> Iterable[tuple[Checkpoint, str]]:
        runs = dict.fromkeys((r.source, r.name) for r in self.layout[name].runs if r.source >= 0)
        return (pair for source, own in runs for pair in self.sources[source].stored(own))

    @property
    def resident(self) -> int:
        return sum(s.resident for s in self.sources)

    @property
    def scratch_itemsize(self) -> int:
        """What is of another dtype is decoded and encoded again."""
        return 16 + max((s.scratch_itemsize for s in self.sources), default=0)

    @property
    def pieces_at_once(self) -> int:
        return max((s.pieces_at_once for s in self.sources), default=1)

    def passed(self, name: str) -> tuple[Checkpoint, str, int] | None:
        runs = self.layout[name].runs
        if len(runs) != 1 or runs[0].source < 0 or runs[0].length != self.spec(name).numel:
            return None
        source = self.sources[runs[0].source]
        same = source.spec(runs[0].name).dtype is self.spec(name).dtype
        return (source, runs[0].name, runs[0].first) if same else None

    def computed(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        if self.layout[name].scattered:
            self._interleave(name, start, stop, out)
            return
        dtype, position = self.spec(name).dtype, 0
        wanted: list[tuple[int, ReadRequest]] = []
        for run, first, end in self.layout[name].pieces(start, stop):
            wanted.append((run.source, ReadRequest(run.name, first, end)))
        at = 0
        while at < len(wanted):  # as many as possible by one call
            number, lead = wanted[at]
            if number < 0:
                size = (lead.stop - lead.start) * dtype.itemsize
                out[position : position + size] = bytes(size)
                position, at = position + size, at + 1
                continue
            stored = self.sources[number].spec(lead.name).dtype
            last, n = at, 0
            while last < len(wanted) and wanted[last][0] == number:
                if self.sources[number].spec(wanted[last][1].name).dtype is not stored:
                    break
                n += wanted[last][1].stop - wanted[last][1].start
                last += 1
            part = out[position : position + n * dtype.itemsize]
            _read_as(self.sources[number], [r for _, r in wanted[at:last]], n, stored, dtype, part)
            position, at = position + len(part), last

    def _interleave(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        """Elements start..stop where turns are short: of many turns all that lies between the runs is read, and left out."""
        import numpy as np

        joined, dtype = self.layout[name], self.spec(name).dtype
        turn, kind = joined.ends[-1], f"u{dtype.itemsize}"
        at_once = max(_BLOCK // max(turn, *(r.step for r in joined.runs)), 1)
        target = np.frombuffer(out, kind)
        for first in range(start // turn, -(-stop // turn), at_once):
            turns = min(at_once, -(-stop // turn) - first)
            block = np.zeros((turns, turn), kind)
            for run, end in zip(joined.runs, joined.ends, strict=True):
                if run.source < 0:
                    continue
                low = run.first + first * run.step
                n = (turns - 1) * run.step + run.length
                raw = np.empty(turns * run.step * dtype.itemsize, np.uint8)
                source = self.sources[run.source]
                wanted = [ReadRequest(run.name, low, low + n)]
                part = raw[: n * dtype.itemsize].data
                _read_as(source, wanted, n, source.spec(run.name).dtype, dtype, part)
                block[:, end - run.length : end] = raw.view(kind).reshape(turns, run.step)[:, : run.length]
            left, right = max(start, first * turn), min(stop, (first + turns) * turn)
            target[left - start : right - start] = block.reshape(-1)[left - first * turn : right - first * turn]


def _read_as(
    source: Checkpoint, wanted: Sequence[ReadRequest], n: int, stored: DType, dtype: DType, out: memoryview[Any]
) -> None:
    """n elements, in a dtype that holds all that the stored one does."""
    if stored is dtype:
        source.read(wanted, out)
        return
    from stockpot.checkpoints.codecs import decoded, encoded

    raw = bytearray(n * stored.itemsize)
    source.read(wanted, memoryview(raw))
    out[:] = encoded(decoded(raw, stored), dtype).data
