"""Views: checkpoints whose tensors have other names, orders or shapes than those that they are read from.

A method never changes names or shapes; a view does. None copies anything: a range of a view is looked up in its sources
while it is read.

    renamed     other names
    first_rows  fewer rows: vocabularies cut to what all have
    rows        rows by an index, zeros where there are none: vocabularies rearranged by token
    permuted    axes in another order: nets that were trained apart, aligned
    stacked     several tensors as one along a new axis (experts), or one after the other along one they have (projections)
    unstacked   the opposite: one entry, or a range, of an axis
    chunked     tensors whose parts lie in several checkpoints: shards of a distributed one
    with_zeros  zeros for tensors that are not there
"""

from __future__ import annotations

import bisect
import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.derived import DerivedCheckpoint
from stockpot.checkpoints.source import ReadRequest
from stockpot.errors import ArgumentError, nearest
from stockpot.specs import DType, Shape, TensorSpec

__all__ = ["Span", "chunked", "first_rows", "permuted", "renamed", "rows", "stacked", "unstacked", "with_zeros"]


@dataclass(frozen=True)
class Span:
    """Entries start..stop (exclusive; None: all) along `axis` of a tensor of a checkpoint."""

    source: Checkpoint
    name: str
    axis: int = 0
    start: int = 0
    stop: int | None = None


#: elements of a run that is still read by itself, and of what is read at once where runs are shorter
_SHORT = 512
_BLOCK = 2**19

# how tensors are put together of runs of others


@dataclass(frozen=True, slots=True)
class _Run:
    """Elements of a source's tensor: `length` of them from `first` + k * `step` on, for k = 0, 1, ... Source -1: zeros."""

    source: int
    name: str
    first: int
    step: int
    length: int


@dataclass(frozen=True, slots=True)
class _Joined:
    """A tensor made of runs that take turns. ends: where each ends within one turn."""

    runs: tuple[_Run, ...]
    ends: tuple[int, ...]

    @property
    def scattered(self) -> bool:
        """Whether runs are so short that each should not be read by itself."""
        return any(r.step and r.length < _SHORT for r in self.runs)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[_Run, int, int]]:
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


def _joined(runs: Sequence[_Run]) -> _Joined:
    return _Joined(tuple(runs), tuple(accumulate(r.length for r in runs)))


@dataclass(frozen=True)
class JoinedCheckpoint(DerivedCheckpoint):
    """Tensors put together of runs of elements of its sources' tensors."""

    layout: dict[str, _Joined] = field(default_factory=dict, repr=False)

    @property
    def made(self) -> str:
        return super().made + _digest(f"{self.layout}")

    def written(self, name: str) -> DType:
        spec = self.spec(name)
        found = {self.sources[r.source].written(r.name) for r in self.layout[name].runs if r.source >= 0}
        return found.pop() if len(found) == 1 and spec.dtype.is_float else spec.dtype

    def scratch_of(self, name: str) -> int:
        runs = self.layout[name].runs
        inner = max((self.sources[r.source].scratch_of(r.name) for r in runs if r.source >= 0), default=0)
        return inner + (4 * 8 * _BLOCK if self.layout[name].scattered else 0)

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
    import numpy as np

    from stockpot.checkpoints.codecs import decode_into, encode_into

    raw = bytearray(n * stored.itemsize)
    source.read(wanted, memoryview(raw))
    values = np.empty(n, np.float64 if dtype is DType.F64 else np.float32)
    decode_into(raw, stored, values)
    encode_into(values, dtype, out)


# gathering along axes


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
        return super().made + _digest("\n".join(map(str, orders)))

    def written(self, name: str) -> DType:
        return self.source.written(name)

    def scratch_of(self, name: str) -> int:
        return self.source.scratch_of(name)

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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# making them


def renamed(source: Checkpoint, names: Mapping[str, str], *, ref: str = "") -> Checkpoint:
    """The tensors of `names` (new name -> stored one), in this order, and no others. Raises ArgumentError."""
    layout, specs = {}, {}
    for new, old in names.items():
        specs[new] = _spec(source, old)
        layout[new] = _whole(0, old, specs[new])
    return _joined_checkpoint(source, (source,), specs, layout, ref)


def first_rows(source: Checkpoint, count: Mapping[str, int], *, ref: str = "") -> Checkpoint:
    """Some tensors without the rows (entries of the first axis) after the first `count[name]`. Raises ArgumentError."""
    layout, specs = {}, {}
    for name in count:
        shape = _spec(source, name).shape
        if not shape or not 0 <= count[name] <= shape[0]:
            raise ArgumentError(f"{source.ref}: {name!r} is {list(shape)}: it has no first {count[name]} rows")
    for name in source.names():
        spec = source.spec(name)
        specs[name] = TensorSpec(spec.dtype, (count[name], *spec.shape[1:])) if name in count else spec
        layout[name] = _whole(0, name, specs[name])
    return _joined_checkpoint(source, (source,), specs, layout, ref)


def rows(source: Checkpoint, index: Mapping[str, Sequence[int]], *, ref: str = "") -> Checkpoint:
    """Row i of a tensor is the source's row `index[name][i]`; -1: zeros. Other tensors are as they are.

    Raises ArgumentError where there is no such row.
    """
    orders: dict[str, dict[int, Sequence[int]]] = {}
    specs = {name: source.spec(name) for name in source.names()}
    for name, order in index.items():
        shape, kept = _spec(source, name).shape, _whole_numbers(source, name, order)
        if not shape or any(not -1 <= i < shape[0] for i in kept):
            odd = next((i for i in kept if not -1 <= i < (shape or (0,))[0]), "")
            raise ArgumentError(f"{source.ref}: {name!r} is {list(shape)}: it has no row {odd}")
        orders[name] = {0: kept}
        specs[name] = TensorSpec(specs[name].dtype, (len(kept), *shape[1:]))
    return _gathered_checkpoint(source, specs, orders, ref)


def _whole_numbers(source: Checkpoint, name: str, order: Sequence[int]) -> array[int]:
    try:
        return array("q", order)
    except TypeError as e:
        raise ArgumentError(f"{source.ref}: {name!r}: rows are whole numbers: {e}") from None


def permuted(source: Checkpoint, orders: Mapping[str, Mapping[int, Sequence[int]]], *, ref: str = "") -> Checkpoint:
    """Axes in other orders: entry i along `axis` is the source's entry `orders[name][axis][i]`.

    Raises ArgumentError where an order is no permutation of its axis.
    """
    kept: dict[str, dict[int, Sequence[int]]] = {}
    for name, by_axis in orders.items():
        shape = _spec(source, name).shape
        for axis, order in by_axis.items():
            if not 0 <= axis < len(shape) or sorted(order) != list(range(shape[axis])):
                raise ArgumentError(
                    f"{source.ref}: {name!r} is {list(shape)}: the order of axis {axis} is no permutation of its entries"
                )
        kept[name] = {axis: array("q", order) for axis, order in sorted(by_axis.items())}
    specs = {name: source.spec(name) for name in source.names()}
    return _gathered_checkpoint(source, specs, kept, ref)


def stacked(
    source: Checkpoint, tensors: Mapping[str, Sequence[str]], *, axis: int = 0, new_axis: bool = True, ref: str = ""
) -> Checkpoint:
    """Several tensors as one: each an entry of a new axis, or one after the other along one that they have.

    tensors  new name -> the stored ones, in order; what is in none of them is as it is
    axis     the output's

    Floats of different dtypes are read in one that holds all of them. Raises ArgumentError where shapes don't fit.
    """
    used = {n for parts in tensors.values() for n in parts}
    layout: dict[str, _Joined] = {}
    specs: dict[str, TensorSpec] = {}
    for new, parts in tensors.items():
        found = [Span(source, old, axis) for old in parts]
        specs[new], layout[new] = _put_together(new, found, [source], axis, new_axis=new_axis)
    _take_rest(source, used, specs, layout)
    return _joined_checkpoint(source, (source,), specs, layout, ref)


def unstacked(
    source: Checkpoint, tensors: Mapping[str, Span | tuple[str, int]], *, axis: int = 0, ref: str = ""
) -> Checkpoint:
    """Entries of tensors as tensors of their own.

    tensors  new name -> (stored name, entry of `axis`), which then is no axis any more; or -> Span, a range of an axis
    """
    layout: dict[str, _Joined] = {}
    specs: dict[str, TensorSpec] = {}
    used = set()
    for new, which in tensors.items():
        part = which if isinstance(which, Span) else Span(source, which[0], axis, which[1], which[1] + 1)
        if part.source is not source:
            raise ArgumentError(
                f"{new!r}: a span of {part.source.ref}, not of {source.ref}: 'chunked' takes those of several"
            )
        used.add(part.name)
        spec, layout[new] = _put_together(new, [part], [part.source], part.axis, new_axis=False)
        shape = spec.shape if isinstance(which, Span) else (*spec.shape[:axis], *spec.shape[axis + 1 :])
        specs[new] = TensorSpec(spec.dtype, shape)
    _take_rest(source, used, specs, layout)
    return _joined_checkpoint(source, (source,), specs, layout, ref)


def chunked(like: Checkpoint, tensors: Mapping[str, Sequence[Span]], *, axis: int = 0, ref: str = "") -> Checkpoint:
    """Tensors whose parts lie in several checkpoints, one after the other along `axis`; config and files are those of `like`.

    Floats of different dtypes are read in one that holds all of them. Raises ArgumentError where shapes don't fit.
    """
    sources: list[Checkpoint] = [like]
    for part in (p for parts in tensors.values() for p in parts):
        if not any(part.source is s for s in sources):
            sources.append(part.source)
    layout, specs = {}, {}
    for new, parts in tensors.items():
        specs[new], layout[new] = _put_together(new, parts, sources, axis, new_axis=False)
    return _joined_checkpoint(like, tuple(sources), specs, layout, ref)


def with_zeros(source: Checkpoint, specs: Mapping[str, TensorSpec], *, ref: str = "") -> Checkpoint:
    """Tensors of zeros beside those that there are. Raises ArgumentError for a name that is taken."""
    layout: dict[str, _Joined] = {}
    own: dict[str, TensorSpec] = {}
    _take_rest(source, set(), own, layout)
    for name, spec in specs.items():
        if name in own:
            raise ArgumentError(f"{source.ref}: there is a tensor {name!r} already")
        own[name] = spec
        layout[name] = _joined([_Run(-1, name, 0, 0, spec.numel)])
    return _joined_checkpoint(source, (source,), own, layout, ref)


def _spec(source: Checkpoint, name: str) -> TensorSpec:
    if name not in source:
        raise ArgumentError(f"{source.ref}: no tensor {name!r}{nearest(name, source.names())}")
    return source.spec(name)


def _whole(source: int, name: str, spec: TensorSpec) -> _Joined:
    return _joined([_Run(source, name, 0, 0, spec.numel)])


def _take_rest(source: Checkpoint, used: set[str], specs: dict[str, TensorSpec], layout: dict[str, _Joined]) -> None:
    for name in source.names():
        if name in used:
            continue
        if name in specs:
            raise ArgumentError(f"{source.ref}: there is a tensor {name!r} already")
        specs[name] = source.spec(name)
        layout[name] = _whole(0, name, specs[name])


def _put_together(
    new: str, parts: Sequence[Span], sources: Sequence[Checkpoint], axis: int, *, new_axis: bool
) -> tuple[TensorSpec, _Joined]:
    """Shape, dtype and runs of a tensor of parts. Raises ArgumentError."""
    if not parts:
        raise ArgumentError(f"{new!r}: made of no tensor")
    runs, shapes, dtypes, along = [], [], [], 0
    for part in parts:
        spec = _spec(part.source, part.name)
        shape = spec.shape
        if not 0 <= axis < len(shape) + new_axis:
            raise ArgumentError(f"{part.source.ref}: {part.name!r} is {list(shape)}: it has no axis {axis}")
        length = 1 if new_axis else shape[axis]
        start, stop = part.start, length if part.stop is None else part.stop
        if not 0 <= start < stop <= length:
            raise ArgumentError(
                f"{part.source.ref}: {part.name!r} is {list(shape)}: it has no entries {start} to {stop}"
            )
        inner = math.prod(shape[axis:] if new_axis else shape[axis + 1 :])
        number = next(i for i, s in enumerate(sources) if s is part.source)
        runs.append(_Run(number, part.name, start * inner, length * inner, (stop - start) * inner))
        shapes.append((*shape[:axis], *(shape[axis:] if new_axis else shape[axis + 1 :])))
        dtypes.append(spec.dtype)
        along += stop - start
    if len(set(shapes)) > 1:
        each = ", ".join(f"{p.name!r} {list(p.source.spec(p.name).shape)}" for p in parts[:3])
        raise ArgumentError(f"{new!r}: its parts have different shapes: {each}")
    shape = (*shapes[0][:axis], along, *shapes[0][axis:])
    return TensorSpec(_common(new, dtypes), shape), _of_turns(runs, shape)


def _of_turns(runs: Sequence[_Run], shape: Shape) -> _Joined:
    """One turn where it is all: so that what is a single run can be seen to be one."""
    one = _joined(runs)
    whole = math.prod(shape)
    if len(runs) == 1 and runs[0].step == runs[0].length and one.ends[-1] < whole:
        run = runs[0]
        return _joined([_Run(run.source, run.name, run.first, 0, whole)])
    return one


def _common(new: str, dtypes: Iterable[DType]) -> DType:
    """The dtype that holds all that these do. Raises ArgumentError."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    if not all(d.is_float for d in found):
        raise ArgumentError(f"{new!r}: parts of {', '.join(sorted(map(str, found)))} have no dtype in common")
    if DType.F64 in found:
        return DType.F64
    return DType.F32  # no two narrower ones hold each other


def _joined_checkpoint(
    like: Checkpoint,
    sources: tuple[Checkpoint, ...],
    specs: dict[str, TensorSpec],
    layout: dict[str, _Joined],
    ref: str,
) -> JoinedCheckpoint:
    return JoinedCheckpoint(
        ref or like.ref, like.path, like.kind, like.config, _files(sources), sources=sources, specs=specs, layout=layout
    )


def _gathered_checkpoint(
    source: Checkpoint, specs: dict[str, TensorSpec], orders: dict[str, dict[int, Sequence[int]]], ref: str
) -> GatheredCheckpoint:
    return GatheredCheckpoint(
        ref or source.ref, source.path, source.kind, source.config, source.files, sources=(source,), specs=specs,
        orders=orders,
    )  # fmt: skip


def _files(sources: Sequence[Checkpoint]) -> tuple[Any, ...]:
    return tuple({h.path: h for s in sources for h in s.files}.values())
