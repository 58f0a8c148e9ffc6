"""The arithmetic of one unit: raw bytes in, statistics or output bytes out. No files, no threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from stockpot.checkpoints.codecs import encode_into
from stockpot.checkpoints.meaning.roles import role_of
from stockpot.engine.devices import Device, load_block, scratch_block
from stockpot.engine.draws import draw
from stockpot.engine.gathering import Gathering
from stockpot.engine.native import Block, Kernels, load_kernels
from stockpot.engine.unit_data import SAMPLES, UnitData, sample_runs
from stockpot.engine.units import Segment, Unit
from stockpot.errors import MethodError
from stockpot.grid import PIECE, REDUCE, SMALL, grid_of
from stockpot.methods.declaration import Method, Scope, Space
from stockpot.methods.forms import Form
from stockpot.planning.plan import MergeGroup, StatPlan
from stockpot.specs import DType
from stockpot.statistics import Draw, Mask
from stockpot.statistics.sums import piece_sum

__all__ = ["Kernel"]

#: (segment, first element, end) of a tensor: what elements a block is made of
Place = tuple[Segment, int, int]


@dataclass(frozen=True)
class Kernel:
    """Computes with one group of a plan. plans: all statistics of the plan; device: for whole matrices."""

    device: Device
    group: MergeGroup
    plans: Sequence[StatPlan]
    seed: int
    chunk: int

    @property
    def method(self) -> Method:
        return self.group.method

    @cached_property
    def _stats(self) -> tuple[StatPlan, ...]:
        """Those of the group."""
        return tuple(self.plans[i] for i in self.group.stats)

    @cached_property
    def _of_tensors(self) -> tuple[StatPlan, ...]:
        """Those of which every tensor has its own value."""
        return tuple(s for s in self._stats if s.extent == "tensor")

    @cached_property
    def _of_rows(self) -> tuple[StatPlan, ...]:
        return tuple(s for s in self._stats if s.extent == "row")

    @cached_property
    def _native(self) -> Kernels | None:
        return load_kernels()

    # arrays

    def _load(self, data: UnitData, start: int, stop: int) -> tuple[Any, Any]:
        """(block `[m, n]`, base `[n]` or None) of elements start..stop of the unit; deltas where the method wants them."""
        n = stop - start
        m = len(data.unit.lead.operands)
        models, under = data.slot.setdefault("models", {}), data.slot.setdefault("base", {})
        if compiled := self._compiled(data):
            seen = scratch_block(m, n, data.wide, models)
            below = scratch_block(1, n, data.wide, under)[0] if self.method.space is Space.DELTA else None
            compiled.see(self._block(data, start, stop), seen, below)
            return seen, below
        raws = [data.part(i, start, stop) for i in range(len(data.raws))]
        block = load_block(raws[:m], data.dtypes[:m], n, data.wide, models)
        if self.method.space is Space.WEIGHT:
            return block, None
        at = slice(m, m + 1)
        base = load_block(raws[at], data.dtypes[at], n, data.wide, under)[0]
        block -= base
        return block, base

    def _companions(self, data: UnitData, start: int, stop: int) -> dict[str, Any]:
        """`[m, n]` of each companion, by name."""
        lead = data.unit.lead
        m, first = len(lead.operands), lead.weighed
        out = {}
        for k, companion in enumerate(self.method.companions):
            which = range(first + k * m, first + (k + 1) * m)
            raws, dtypes = [data.part(i, start, stop) for i in which], [data.dtypes[i] for i in which]
            out[companion.name] = load_block(
                raws, dtypes, stop - start, data.wide, data.slot.setdefault(companion.name, {})
            )
        return out

    def _compiled(self, data: UnitData) -> Kernels | None:
        """The kernels, if they can read these dtypes and write the output's."""
        kernels = self._native
        known = kernels is not None and kernels.takes([*data.dtypes, data.unit.lead.spec.dtype])
        return kernels if known and not self.method.companions else None

    def _block(self, data: UnitData, start: int, stop: int) -> Block:
        """Elements start..stop of the unit as they are, for a kernel."""
        m = len(data.unit.lead.operands)
        raws = [data.part(i, start, stop) for i in range(len(data.raws))]
        base = (raws[m], data.dtypes[m]) if self.method.space is Space.DELTA else None
        return Block(stop - start, raws[:m], data.dtypes[:m], base, data.wide)

    def _names(self, known: Mapping[int, Any]) -> dict[str, Any]:
        """The values of statistics by name."""
        return {s.stat.name: known[s.index] for s in self._stats if s.index in known}

    def _keywords(
        self, known: Mapping[int, Any], places: Sequence[Place], data: UnitData, block: Any = None, start: int = 0,
        *, folding: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """All that the function takes beside the block: what its group asked for, and nothing else that may be known.

        block: the elements in hand, in the shape in which the method sees them, from `start` of the unit on. folding: for a
        statistic, without masks whose probabilities are worked out, perhaps from statistics that are not known yet.
        """
        m = len(data.unit.lead.operands)
        keywords = dict(self.group.params)
        keywords.update((s.name, s.absent(m, self.group.params)) for s in self.method.stats)
        keywords.update(self._names(known))
        if self.method.companions:
            n = sum(stop - first for _, first, stop in places)
            found = self._companions(data, start, start + n)
            keywords.update({k: v if block is None else v.reshape(block.shape) for k, v in found.items()})
        # probabilities that a function works out may come of statistics of rows, these of plain draws
        late = [d for d in self.method.draws if isinstance(d, Mask) and callable(d.keep)]
        draws = [d for d in self.method.draws if d not in late]
        self._draw(draws, keywords, places, data, block)
        for s in self._of_rows:
            if block is not None:
                keywords[s.stat.name] = s.stat.of_rows(block, self.group.params, keywords)
        if not folding:
            self._draw(late, keywords, places, data, block)
        return keywords

    def _draw(
        self, draws: Sequence[Draw], keywords: dict[str, Any], places: Sequence[Place], data: UnitData, block: Any
    ) -> None:
        for declared in draws:
            made = draw(declared, self.seed, places, keywords, block, data.slot, wide=data.wide)
            keywords[declared.name] = made if block is None else made.reshape(block.shape)

    def _rows(self, segment: Segment, n: int) -> tuple[int, int]:
        """n elements of a tensor as (rows, elements of a row): along the last axis; of a convolution all that one filter has."""
        tensor = segment.tensor
        shape = tensor.spec.shape
        if len(shape) > 2 and role_of(tensor.name, shape) != "convolution":
            row = shape[-1]
        else:
            row = grid_of(shape).row if len(shape) > 1 else tensor.spec.numel
        return (n // row if row else 0), row

    # statistics

    def fold(self, gathering: Gathering, data: UnitData, known: Mapping[int, Any]) -> None:
        """One pass of a statistic over the unit's segments. known: values of statistics gathered before."""
        at = 0
        for segment in data.unit.segments:
            self.fold_segment(gathering, data, segment, at, known)
            at += segment.stop - segment.start

    def fold_segment(
        self, gathering: Gathering, data: UnitData, segment: Segment, at: int, known: Mapping[int, Any]
    ) -> None:
        """The same for one segment, which begins at element `at` of the unit's data."""
        plan = gathering.current
        assert plan is not None
        known = {**known, **gathering.results}
        with np.errstate(all="ignore"):
            if self.method.scope is Scope.ROW and segment.stop > segment.start:
                self._fold_rows(gathering, data, segment, at, known)
                return
            compiled = self._compiled(data)
            folds = compiled.folds(plan.stat, self.method) if compiled else None
            step = max(self.chunk // REDUCE, 1) * REDUCE
            if folds and not (folds.form and self.method.draws):
                step = PIECE
            elif plan.stat.ordered:
                step = REDUCE
            grid, offset = grid_of(segment.tensor.spec.shape), at - segment.start
            for piece in range(segment.first, segment.last):
                key = (segment.tensor.index, piece)
                low, high = grid.bounds(piece)
                for start in range(low, high, step):
                    stop = min(start + step, high)
                    places = [(segment, start, stop)]
                    first = offset + start
                    if folds:
                        raw = self._block(data, first, offset + stop)
                        keywords = self._keywords(known, places, data) if folds.form else {}
                        form = self._form(keywords) if folds.form else None
                        part = folds.fold(gathering.seek, raw, form, self._mask(keywords), gathering.so_far(key))
                    else:
                        block, _ = self._load(data, first, offset + stop)
                        keywords = self._keywords(known, places, data, block, first, folding=True)
                        part = plan.stat.fold(gathering.seek, block, keywords, gathering.so_far(key))
                    gathering.add(key, part)

    def _mask(self, keywords: Mapping[str, Any]) -> Any:
        """The one mask that a form may have, whatever its name."""
        return keywords[self.method.draws[0].name] if self.method.draws and keywords else None

    def _form(self, keywords: Mapping[str, Any]) -> Form:
        assert self.method.form is not None
        return self.method.form(**keywords)

    def form_of(self, known: Mapping[int, Any], models: int) -> Form:
        """The form of this group's arithmetic, with the values of statistics."""
        keywords = dict(self.group.params)
        keywords.update((s.name, s.absent(models, self.group.params)) for s in self.method.stats)
        keywords.update(self._names(known))
        keywords.update((d.name, None) for d in self.method.draws)
        return self._form(keywords)

    def _fold_rows(
        self, gathering: Gathering, data: UnitData, segment: Segment, at: int, known: Mapping[int, Any]
    ) -> None:
        """By whole rows: a piece of several, or all pieces of a long one."""
        plan = gathering.current
        assert plan is not None
        grid, offset = grid_of(segment.tensor.spec.shape), at - segment.start
        together = grid.per_row or (grid.pieces if len(segment.tensor.spec.shape) < 2 else 1)
        for first in range(segment.first, segment.last, together):
            pieces = range(first, min(first + together, segment.last))
            start, stop = grid.span(pieces[0], pieces[-1] + 1)
            tiles = []
            for low, high in self._tiles(segment, start, stop):
                block, _ = self._load(data, offset + low, offset + high)
                block = block.reshape(len(block), *self._rows(segment, high - low))
                keywords = self._keywords(known, [(segment, low, high)], data, block, offset + low, folding=True)
                if plan.stat.ordered:
                    terms = plan.stat.terms(block, keywords).reshape(-1, high - low)
                    # which may be the block itself, whose memory the next tile uses again
                    tiles.append(np.array(terms) if high - low < stop - start else terms)
                    continue
                # what a function works out of rows it gets as rows; the rest is told of elements
                looked_at = block.reshape(len(block), -1) if plan.stat.of_block else block
                gathering.add((segment.tensor.index, first), plan.stat.fold(gathering.seek, looked_at, keywords))
            if not tiles:
                continue
            terms = tiles[0] if len(tiles) == 1 else np.concatenate(tiles, axis=1)
            for piece in pieces:
                low, high = (edge - start for edge in grid.bounds(piece))
                gathering.add((segment.tensor.index, piece), piece_sum(terms[:, low:high]))

    def _tiles(self, segment: Segment, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Elements start..stop of a segment in parts of whole rows that stay in the cache."""
        _, row = self._rows(segment, stop - start)
        step = max(self.chunk // max(row, 1), 1) * max(row, 1)
        for low in range(start, stop, step):
            yield low, min(low + step, stop)

    def sample(self, plan: StatPlan, data: UnitData, segment: Segment, at: int, known: Mapping[int, Any]) -> Any:
        """`[k, s]`: what a statistic looks at of a few thousand elements of a segment, which begins at `at` of the unit."""
        runs = self.sample_runs(plan, segment)
        if plan.stat.of_block:
            return self.deltas(data, [(at + a, at + b) for a, b in runs])
        segments = tuple(Segment(segment.tensor, 0, 0, segment.start + a, segment.start + b) for a, b in runs)
        raws = [memoryview(b"".join(data.part(i, at + a, at + b) for a, b in runs)) for i in range(len(data.raws))]
        return self.seen(plan, replace(data, unit=Unit(segments), raws=raws), known)

    def sample_runs(self, plan: StatPlan, segment: Segment, samples: int = SAMPLES) -> list[tuple[int, int]]:
        """Parts of a segment, spread evenly over it: of whole rows where what is looked at is worked out of such."""
        n = segment.stop - segment.start
        if self.method.scope is not Scope.ROW or plan.stat.of_block:
            return sample_runs(n, samples)
        rows, row = self._rows(segment, n)
        count = max(min(samples // max(row, 1), rows), 1)
        return [(r * row, (r + 1) * row) for r in (rows * i // count for i in range(count))]

    def seen(self, plan: StatPlan, data: UnitData, known: Mapping[int, Any]) -> Any:
        """`[k, n]`: what a statistic looks at of all of a unit: parts of one tensor, whole rows where the method wants them."""
        if plan.stat.of_block:
            return self.deltas(data, [(0, data.unit.numel)])
        segments, n = data.unit.segments, data.unit.numel
        places = [(s, s.start, s.stop) for s in segments]
        with np.errstate(all="ignore"):
            block, _ = self._load(data, 0, n)
            if self.method.scope is Scope.ROW:
                block = block.reshape(len(block), *self._rows(segments[0], n))
            return plan.stat.seen(block, self._keywords(known, places, data, block, folding=True))

    def deltas(self, data: UnitData, runs: Sequence[tuple[int, int]]) -> Any:
        """`[m, n]` numpy: what the method would get for runs of elements, all of one length."""
        if compiled := self._compiled(data):
            block = self._block(data, 0, data.unit.numel)
            return compiled.deltas(block, [start for start, _ in runs], runs[0][1] - runs[0][0])
        return np.concatenate([self._load(data, a, b)[0].copy() for a, b in runs], axis=1)

    def gather(self, data: UnitData, segment: Segment, at: int, known: Mapping[int, Any]) -> Mapping[int, Any]:
        """All statistics of one tensor whose every element is in hand, beside those known."""
        active = self._of_tensors
        if not active:
            return known
        found = dict(known)
        n = segment.stop - segment.start
        if n <= SMALL and self.method.scope is not Scope.ROW:
            value = self._at_once(active[0], data, segment, at, found)
            if value is not None:
                found[active[0].index] = value
                active = active[1:]
        gathering = Gathering(active, n, self._names(found))
        while gathering.current is not None:
            if gathering.fresh:
                assert gathering.current is not None
                gathering.suggest(self.sample(gathering.current, data, segment, at, {**found, **gathering.results}))
            self.fold_segment(gathering, data, segment, at, found)
            gathering.finish_pass()
        return {**found, **gathering.results}

    def _at_once(self, plan: StatPlan, data: UnitData, segment: Segment, at: int, known: Mapping[int, Any]) -> Any:
        """A statistic of a small tensor, where there is a short way."""
        n = segment.stop - segment.start
        if not plan.stat.samples:
            return None
        if plan.stat.of_block:
            return plan.stat.at_once(self.deltas(data, [(at, at + n)]), plan.params, self._names(known))
        with np.errstate(all="ignore"):
            block, _ = self._load(data, at, at + n)
            keywords = self._keywords(known, [(segment, segment.start, segment.stop)], data, block, at, folding=True)
            return plan.stat.at_once(block, plan.params, keywords)

    # output

    def combine(self, data: UnitData, known: Mapping[int, Any], out: memoryview[Any]) -> None:
        """Fill `out` with the unit's output bytes. known: values of statistics gathered beforehand."""
        with np.errstate(all="ignore"):
            if self.method.scope is not Scope.ELEMENT:
                at = 0
                for segment in data.unit.segments:
                    own = self.gather(data, segment, at, known) if segment.whole else known
                    self._combine_shaped(data, segment, at, own, out)
                    at += segment.stop - segment.start
                return
            compiled = self._compiled(data) if self.method.form is not None else None
            dtype = data.unit.lead.spec.dtype
            # kernels work in tiles of their own; what bounds their blocks is the size of a mask
            step = 4 * self.chunk if compiled else self.chunk
            if compiled and not self.method.draws:
                step = max(data.unit.numel, 1)
            for places, start, stop, own in self._runs(data, known, step):
                if compiled:
                    keywords = self._keywords(own, places, data)
                    raw = out[start * dtype.itemsize : stop * dtype.itemsize]
                    compiled.combine(
                        self._block(data, start, stop), self._form(keywords), self._mask(keywords), raw, dtype
                    )
                    continue
                block, base = self._load(data, start, stop)
                keywords = self._keywords(own, places, data, block, start)
                self._store(data, self.method.run(places[0][0].tensor.name, block, **keywords), base, start, stop, out)

    def _runs(
        self, data: UnitData, known: Mapping[int, Any], step: int
    ) -> Iterator[tuple[list[Place], int, int, Mapping[int, Any]]]:
        """Runs of elements to compute at once: (places of them, start, stop, statistics)."""
        if len(data.unit.segments) > 1 and not self._of_tensors:
            whole = [(s, s.start, s.stop) for s in data.unit.segments]
            yield from self._small_runs(whole, known, step)
            return
        at = 0
        for segment in data.unit.segments:
            n = segment.stop - segment.start
            own = self.gather(data, segment, at, known) if segment.whole else known
            for start in range(0, n, step):
                stop = min(start + step, n)
                yield [(segment, segment.start + start, segment.start + stop)], at + start, at + stop, own
            at += n

    def _small_runs(
        self, whole: list[Place], known: Mapping[int, Any], step: int
    ) -> Iterator[tuple[list[Place], int, int, Mapping[int, Any]]]:
        """Several small tensors at once, up to `step` elements."""
        at, first = 0, 0
        run: list[Place] = []
        for item in whole:
            n = item[2] - item[1]
            if run and at + n - first > step:
                yield run, first, at, known
                run, first = [], at
            run.append(item)
            at += n
        if run:
            yield run, first, at, known

    def _combine_shaped(
        self, data: UnitData, segment: Segment, at: int, known: Mapping[int, Any], out: memoryview[Any]
    ) -> None:
        """ROW: `[m, rows, row]`; TENSOR: `[m, *shape]`, on the device."""
        rows = self.method.scope is Scope.ROW
        tiles: Iterable[tuple[int, int]] = [(segment.start, segment.stop)]
        if rows and segment.stop > segment.start:
            tiles = self._tiles(segment, segment.start, segment.stop)
        for low, high in tiles:
            shape = self._rows(segment, high - low) if rows else segment.tensor.spec.shape
            first, last = at + low - segment.start, at + high - segment.start
            block, base = self._load(data, first, last)
            block = block.reshape(len(block), *shape)
            keywords = self._keywords(known, [(segment, low, high)], data, block, first)
            if rows:
                result = self.method.run(segment.tensor.name, block, **keywords)
            else:
                arrays = {name for name in keywords if isinstance(keywords[name], np.ndarray)}
                moved = {name: self.device.put(v) if name in arrays else v for name, v in keywords.items()}
                result = self.device.get(self.method.run(segment.tensor.name, self.device.put(block), **moved))
            if result.shape != tuple(shape):
                name, found = segment.tensor.name, tuple(result.shape)
                raise MethodError(f"{name}: method {self.method.name!r} returned {found}, expected {tuple(shape)}")
            self._store(data, result.reshape(-1), base, first, last, out)

    def _store(self, data: UnitData, result: Any, base: Any, start: int, stop: int, out: memoryview[Any]) -> None:
        if result.shape != (stop - start,):
            raise MethodError(
                f"{data.unit.lead.name}: method {self.method.name!r} returned {tuple(result.shape)} for {stop - start} elements; "
                "expected [*block]"
            )
        dtype = data.unit.lead.spec.dtype
        raw = out[start * dtype.itemsize : stop * dtype.itemsize]
        given = [x for x in (result, base) if x is not None]
        work = np.float64 if dtype is DType.F64 else np.float32  # else numbers would be rounded twice
        plain = all(x.dtype == work and x.flags.c_contiguous for x in given)
        if self._native is not None and plain and self._native.takes([dtype]):
            self._native.finish(result, base, dtype, raw)
            return
        if base is not None:
            result = np.add(result, base, out=result if result.flags.writeable and result.dtype == base.dtype else None)
        encode_into(result, dtype, raw)
