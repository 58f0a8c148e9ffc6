"""The arithmetic of one unit: raw bytes in, statistics or output bytes out. No files, no threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.checkpoints.source import ReadRequest, TensorSource
from stockpot.engine.cutoffs import kept_count, kth_magnitudes
from stockpot.engine.devices import Device, byte_buffer
from stockpot.engine.gathering import Gathering
from stockpot.engine.masks import MaskStream, mask_key
from stockpot.engine.native import Block, Kernels
from stockpot.engine.units import Segment, Unit
from stockpot.methods.arrays import is_numpy, magnitude
from stockpot.methods.declaration import Method, Scope, Space
from stockpot.methods.forms import Form
from stockpot.methods.statistics import Cutoff, Total
from stockpot.planning.budget import work_itemsize
from stockpot.planning.grid import PIECE, REDUCE, SMALL, grid_of
from stockpot.planning.plan import MergeGroup
from stockpot.specs import DType

__all__ = ["Kernel", "UnitData", "read_segment", "sample_runs"]


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


@dataclass(frozen=True)
class Kernel:
    """Computes with one group of a plan on one device."""

    device: Device
    group: MergeGroup
    seed: int
    chunk: int

    @property
    def method(self) -> Method:
        return self.group.method

    # arrays

    def _load(self, data: UnitData, start: int, stop: int) -> tuple[Any, Any]:
        """(block `[m, n]`, base `[n]` or None) of elements start..stop of the unit; deltas where the method wants them."""
        n = stop - start
        wide = work_itemsize(data.unit.lead.spec.dtype) == 8
        m = len(data.unit.lead.operands)
        raws = [data.part(i, start, stop) for i in range(len(data.raws))]
        block = self.device.load(raws[:m], data.dtypes[:m], n, wide, data.slot.setdefault("models", {}))
        if self.method.space is Space.WEIGHT:
            return block, None
        base = self.device.load(raws[m:], data.dtypes[m:], n, wide, data.slot.setdefault("base", {}))[0]
        block -= base
        return block, base

    def _compiled(self, data: UnitData) -> tuple[Kernels, Callable[..., Form]] | None:
        """The kernels that can do this group's arithmetic on these dtypes, and what makes its form; or None."""
        kernels, form = self.device.kernels, self.method.form
        if kernels is None or form is None or not kernels.takes([*data.dtypes, data.unit.lead.spec.dtype]):
            return None
        return kernels, form

    def _block(self, data: UnitData, start: int, stop: int) -> Block:
        """Elements start..stop of the unit as they are, for a kernel."""
        m = len(data.unit.lead.operands)
        raws = [data.part(i, start, stop) for i in range(len(data.raws))]
        base = (raws[m], data.dtypes[m]) if self.method.space is Space.DELTA else None
        return Block(stop - start, raws[:m], data.dtypes[:m], base, work_itemsize(data.unit.lead.spec.dtype) == 8)

    def _mask(self, segment: Segment, start: int, stop: int, slot: dict[Any, Any]) -> Any:
        """Booleans `[m, n]` for elements start..stop of a tensor."""
        assert self.method.random is not None
        density = self.group.params[self.method.random.param]
        out = np.empty((len(density), stop - start), np.bool_)
        stream = slot.get("masks")
        if stream is None:
            stream = slot["masks"] = MaskStream()
        for i, (operand, d) in enumerate(zip(segment.tensor.operands, density, strict=True)):
            stream.fill(mask_key(self.seed, operand.position, segment.tensor.name), d, start, out[i])
        return out

    def _masks(self, segments: Sequence[tuple[Segment, int, int]], slot: dict[Any, Any]) -> Any:
        parts = [self._mask(s, start, stop, slot) for s, start, stop in segments]
        return self.device.masks(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))

    def _keywords(
        self, stats: Mapping[str, Any], segments: Sequence[tuple[Segment, int, int]], data: UnitData
    ) -> dict[str, Any]:
        keywords = dict(self.group.params)
        for stat in self.method.stats:
            absent = (0.0,) * len(data.unit.lead.operands) if isinstance(stat, Cutoff) else None
            keywords[stat.name] = stats.get(stat.name, absent)
        if self.method.random is not None:
            keywords["mask"] = self._masks(segments, data.slot)
        return keywords

    # statistics

    def fold(self, gathering: Gathering, data: UnitData, stats: Mapping[str, Any]) -> None:
        """One pass of a statistic over the unit's segments. `stats` are those known already."""
        at = 0
        for segment in data.unit.segments:
            self.fold_segment(gathering, data, segment, at, stats)
            at += segment.stop - segment.start

    def fold_segment(
        self, gathering: Gathering, data: UnitData, segment: Segment, at: int, stats: Mapping[str, Any]
    ) -> None:
        """The same for one segment, which begins at element `at` of the unit's data."""
        grid = grid_of(segment.tensor.spec.shape)
        stat, known = gathering.current, {**stats, **gathering.results}
        compiled = self._compiled(data) if isinstance(stat, Cutoff) or (stat and stat.kernel) else None
        step = max(self.chunk // REDUCE, 1) * REDUCE
        if compiled and (isinstance(stat, Cutoff) or not self.method.random):
            step = PIECE
        elif isinstance(stat, Total):
            step = REDUCE
        offset = at - segment.start
        with np.errstate(all="ignore"):
            for piece in range(segment.first, segment.last):
                key = (segment.tensor.index, piece)
                low, high = grid.bounds(piece)
                for start in range(low, high, step):
                    stop = min(start + step, high)
                    place = [(segment, start, stop)]
                    if compiled is None:
                        block, _ = self._load(data, offset + start, offset + stop)
                        gathering.fold(block, self._keywords(known, place, data), key)
                        continue
                    kernels, form = compiled
                    raw = self._block(data, offset + start, offset + stop)
                    if isinstance(stat, Total):
                        # the Gram matrix is of the inputs as they are, and what the form needs is made from it
                        keywords = {} if stat.kernel == "gram" else self._keywords(known, place, data)
                        made = form(**keywords) if keywords else None
                        total = gathering.partial(key)
                        gathering.put_total(
                            key, kernels.totals(str(stat.kernel), raw, made, keywords.get("mask"), total)
                        )
                    else:
                        gathering.put_split(kernels.split(raw, gathering.windows()))

    def sample(self, data: UnitData, at: int, n: int) -> Any:
        """A few thousand deltas `[m, s]` from n elements that begin at `at` of the unit's data, for a first guess."""
        return self.deltas(data, [(at + a, at + b) for a, b in sample_runs(n)])

    def deltas(self, data: UnitData, runs: Sequence[tuple[int, int]]) -> Any:
        """`[m, n]` numpy: what the method would get for runs of elements, all of one length."""
        if compiled := self._compiled(data):
            block = self._block(data, 0, data.unit.numel)
            return compiled[0].deltas(block, [start for start, _ in runs], runs[0][1] - runs[0][0])
        return np.concatenate([self.device.to_numpy(self._load(data, a, b)[0]).copy() for a, b in runs], axis=1)

    def gather(self, data: UnitData, segment: Segment, at: int, stats: Mapping[str, Any]) -> dict[str, Any]:
        """All statistics of one tensor whose every element is in hand."""
        active = [s for s in self.method.active_stats(self.group.params) if s.scope_for(self.group.params) == "tensor"]
        known = dict(stats)
        if not active:
            return known
        n = segment.stop - segment.start
        if n <= SMALL and isinstance(active[0], Cutoff):
            density = self.group.params[active[0].param]
            known[active[0].name] = kth_magnitudes(self.deltas(data, [(at, at + n)]), density)
            active = active[1:]
        gathering = Gathering(active, self.group.params, len(segment.tensor.operands), n)
        while gathering.current is not None:
            if gathering.fresh:
                gathering.suggest(self.sample(data, at, n))
            self.fold_segment(gathering, data, segment, at, known)
            gathering.finish_pass()
        return {**known, **gathering.results}

    # output

    def combine(self, data: UnitData, stats: Mapping[str, Any], out: memoryview[Any]) -> None:
        """Fill `out` with the unit's output bytes. `stats` are those gathered beforehand."""
        try:
            self._combine(data, stats, out)
        finally:
            self.device.settle()

    def _combine(self, data: UnitData, stats: Mapping[str, Any], out: memoryview[Any]) -> None:
        with np.errstate(all="ignore"):
            if self.method.scope is not Scope.ELEMENT:
                at = 0
                for segment in data.unit.segments:
                    known = self.gather(data, segment, at, stats) if segment.whole else stats
                    self._combine_shaped(data, segment, at, known, out)
                    at += segment.stop - segment.start
                return
            compiled = self._compiled(data)
            dtype = data.unit.lead.spec.dtype
            # kernels work in tiles of their own; what bounds their blocks is the size of a mask
            step = 4 * self.chunk if compiled else self.chunk
            if self.device.whole_units or (compiled and not self.method.random):
                step = data.unit.numel
            for segments, start, stop, known in self._runs(data, stats, step):
                keywords = self._keywords(known, segments, data)
                if compiled:
                    kernels, form = compiled
                    raw = out[start * dtype.itemsize : stop * dtype.itemsize]
                    kernels.combine(self._block(data, start, stop), form(**keywords), keywords.get("mask"), raw, dtype)
                    continue
                block, base = self._load(data, start, stop)
                self._store(data, self.method.function(block, **keywords), base, start, stop, out)

    def _runs(
        self, data: UnitData, stats: Mapping[str, Any], step: int
    ) -> Iterator[tuple[list[tuple[Segment, int, int]], int, int, Mapping[str, Any]]]:
        """Runs of elements to compute at once: (segments in it, start, stop, statistics)."""
        own_stats = any(s.scope_for(self.group.params) == "tensor" for s in self.method.active_stats(self.group.params))
        if len(data.unit.segments) > 1 and not own_stats:
            whole = [(s, s.start, s.stop) for s in data.unit.segments]
            yield from self._small_runs(whole, stats, step)
            return
        at = 0
        for segment in data.unit.segments:
            n = segment.stop - segment.start
            known = self.gather(data, segment, at, stats) if own_stats and segment.whole else stats
            for start in range(0, n, step):
                stop = min(start + step, n)
                yield [(segment, segment.start + start, segment.start + stop)], at + start, at + stop, known
            at += n

    def _small_runs(
        self, whole: list[tuple[Segment, int, int]], stats: Mapping[str, Any], step: int
    ) -> Iterator[tuple[list[tuple[Segment, int, int]], int, int, Mapping[str, Any]]]:
        """Several small tensors at once, up to `step` elements."""
        at, first = 0, 0
        run: list[tuple[Segment, int, int]] = []
        for item in whole:
            n = item[2] - item[1]
            if run and at + n - first > step:
                yield run, first, at, stats
                run, first = [], at
            run.append(item)
            at += n
        if run:
            yield run, first, at, stats

    def _combine_shaped(
        self, data: UnitData, segment: Segment, at: int, known: Mapping[str, Any], out: memoryview[Any]
    ) -> None:
        """ROW: `[m, rows, row]`; TENSOR: `[m, *shape]`."""
        n = segment.stop - segment.start
        shape = segment.tensor.spec.shape
        if self.method.scope is Scope.ROW:
            row = grid_of(shape).row if len(shape) > 1 else n
            shape = (n // row if row else 0, row)
        block, base = self._load(data, at, at + n)
        block = block.reshape(len(block), *shape)
        keywords = self._keywords(known, [(segment, segment.start, segment.stop)], data)
        for stat in self.method.active_stats(self.group.params):
            if isinstance(stat, Cutoff) and stat.scope_for(self.group.params) == "row":
                keywords[stat.name] = _row_cutoffs(block, self.group.params[stat.param])
        if "mask" in keywords:
            keywords["mask"] = keywords["mask"].reshape(block.shape)
        self._store(data, self.method.function(block, **keywords).reshape(-1), base, at, at + n, out)

    def _store(self, data: UnitData, result: Any, base: Any, start: int, stop: int, out: memoryview[Any]) -> None:
        if result.shape[-1] != stop - start:
            raise TypeError(f"method {self.method.name!r} returned {tuple(result.shape)} for {stop - start} elements")
        if base is not None:
            result += base
        dtype = data.unit.lead.spec.dtype
        self.device.store(result, dtype, out[start * dtype.itemsize : stop * dtype.itemsize])


def sample_runs(n: int, samples: int = 2**15, run: int = 1024) -> list[tuple[int, int]]:
    """Short runs spread evenly over n elements, `samples` elements in all."""
    if n <= run:
        return [(0, n)]
    count = max(min(samples // run, n // run), 1)
    return [(start, start + run) for start in ((n - run) * i // max(count - 1, 1) for i in range(count))]


def _row_cutoffs(block: Any, density: Sequence[float]) -> Any:
    """`[m, ..., n]` -> `[m, ..., 1]`: each row's k-th magnitude; nan where k is 0, 0 where everything is kept."""
    size = magnitude(block)
    n = size.shape[-1]
    out = size[..., :1] * 0
    for i, d in enumerate(density):
        keep = kept_count(d, n)
        if keep <= 0:
            out[i] = float("nan")
        elif keep < n:
            ordered = np.sort(size[i], axis=-1) if is_numpy(size) else size[i].sort(dim=-1).values
            out[i] = ordered[..., n - keep : n - keep + 1]
    return out
