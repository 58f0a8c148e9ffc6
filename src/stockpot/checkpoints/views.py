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

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.derived import files_of
from stockpot.checkpoints.gathered import GatheredCheckpoint
from stockpot.checkpoints.joined import Joined, JoinedCheckpoint, Run, join
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
    layout: dict[str, Joined] = {}
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
    layout: dict[str, Joined] = {}
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
    layout: dict[str, Joined] = {}
    own: dict[str, TensorSpec] = {}
    _take_rest(source, set(), own, layout)
    for name, spec in specs.items():
        if name in own:
            raise ArgumentError(f"{source.ref}: there is a tensor {name!r} already")
        own[name] = spec
        layout[name] = join([Run(-1, name, 0, 0, spec.numel)])
    return _joined_checkpoint(source, (source,), own, layout, ref)


def _spec(source: Checkpoint, name: str) -> TensorSpec:
    if name not in source:
        raise ArgumentError(f"{source.ref}: no tensor {name!r}{nearest(name, source.names())}")
    return source.spec(name)


def _whole(source: int, name: str, spec: TensorSpec) -> Joined:
    return join([Run(source, name, 0, 0, spec.numel)])


def _take_rest(source: Checkpoint, used: set[str], specs: dict[str, TensorSpec], layout: dict[str, Joined]) -> None:
    for name in source.names():
        if name in used:
            continue
        if name in specs:
            raise ArgumentError(f"{source.ref}: there is a tensor {name!r} already")
        specs[name] = source.spec(name)
        layout[name] = _whole(0, name, specs[name])


def _put_together(
    new: str, parts: Sequence[Span], sources: Sequence[Checkpoint], axis: int, *, new_axis: bool
) -> tuple[TensorSpec, Joined]:
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
        rest = shape[axis:] if new_axis else shape[axis + 1 :]
        inner = math.prod(rest)
        number = next(i for i, s in enumerate(sources) if s is part.source)
        runs.append(Run(number, part.name, start * inner, length * inner, (stop - start) * inner))
        shapes.append((*shape[:axis], *rest))
        dtypes.append(spec.dtype)
        along += stop - start
    if len(set(shapes)) > 1:
        each = ", ".join(f"{p.name!r} {list(p.source.spec(p.name).shape)}" for p in parts[:3])
        raise ArgumentError(f"{new!r}: its parts have different shapes: {each}")
    shape = (*shapes[0][:axis], along, *shapes[0][axis:])
    return TensorSpec(_common(new, dtypes), shape), _of_turns(runs, shape)


def _of_turns(runs: Sequence[Run], shape: Shape) -> Joined:
    """One turn where it is all: so that what is a single run can be seen to be one."""
    one = join(runs)
    whole = math.prod(shape)
    if len(runs) == 1 and runs[0].step == runs[0].length and one.ends[-1] < whole:
        run = runs[0]
        return join([Run(run.source, run.name, run.first, 0, whole)])
    return one


def _common(new: str, dtypes: Iterable[DType]) -> DType:
    """The dtype that holds all that these do. Raises ArgumentError."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    if not all(d.is_float for d in found):
        raise ArgumentError(f"{new!r}: parts of {', '.join(sorted(map(str, found)))} have no dtype in common")
    return DType.F64 if DType.F64 in found else DType.F32  # no two narrower ones hold each other


def _joined_checkpoint(
    like: Checkpoint,
    sources: tuple[Checkpoint, ...],
    specs: dict[str, TensorSpec],
    layout: dict[str, Joined],
    ref: str,
) -> JoinedCheckpoint:
    return JoinedCheckpoint(
        ref or like.ref,
        like.path,
        like.kind,
        like.config,
        files_of(sources),
        sources=sources,
        specs=specs,
        layout=layout,
    )


def _gathered_checkpoint(
    source: Checkpoint, specs: dict[str, TensorSpec], orders: dict[str, dict[int, Sequence[int]]], ref: str
) -> GatheredCheckpoint:
    return GatheredCheckpoint(
        ref or source.ref, source.path, source.kind, source.config, source.files, sources=(source,), specs=specs,
        orders=orders,
    )  # fmt: skip
