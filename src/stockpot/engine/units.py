"""How a plan's pieces are put together to be worked on: bundles that one compiled call does, and units that Python does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stockpot.checkpoints.source import TensorSource
from stockpot.engine.pieces import Pieces
from stockpot.grid import PIECE, SMALL, grid_of
from stockpot.methods.declaration import Scope
from stockpot.planning.plan import Action, Plan, TensorPlan

__all__ = ["Cutter", "Segment", "Unit", "aligned", "batch_key", "most_of_a_unit", "unit_of"]

_BATCH_TENSORS = 4096
#: pieces' worth of elements in a bundle, at most: tens of mebibytes of inputs
_BUNDLE = 16


@dataclass(frozen=True, slots=True)
class Segment:
    """Pieces first..last (exclusive) of a tensor: elements start..stop."""

    tensor: TensorPlan
    first: int
    last: int
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.tensor.spec.numel


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker takes in hand: one segment, or several whole small tensors of one group."""

    segments: tuple[Segment, ...]

    @property
    def numel(self) -> int:
        return sum(s.stop - s.start for s in self.segments)

    @property
    def lead(self) -> TensorPlan:
        return self.segments[0].tensor


def unit_of(plan: Plan, pieces: Pieces, rows: Any) -> Unit:
    """The unit of pieces that follow one another."""
    segments = []
    for tensor in dict.fromkeys(pieces.tensor[rows].tolist()):
        own = rows[pieces.tensor[rows] == tensor]
        first, last = int(pieces.number[own[0]]), int(pieces.number[own[-1]]) + 1
        segments.append(
            Segment(plan.tensors[tensor], first, last, int(pieces.start[own[0]]), int(pieces.stop[own[-1]]))
        )
    return Unit(tuple(segments))


def cut_pieces(plan: Plan, tensor: TensorPlan) -> int:
    """Pieces in a unit of this tensor: the budget's, in whole rows or the whole tensor where the method needs that."""
    grid = grid_of(tensor.spec.shape)
    scope = plan.groups[tensor.group].method.scope if tensor.action is Action.MERGE else Scope.ELEMENT
    if scope is Scope.TENSOR or (scope is Scope.ROW and len(tensor.spec.shape) < 2):
        return max(grid.pieces, 1)
    if scope is Scope.ROW and grid.per_row:
        return grid.per_row
    return plan.budget.block_pieces


def aligned(size: int) -> int:
    """Bytes that an input takes in a buffer with others."""
    return -(-size // 64) * 64


def _joint(sources: Sequence[TensorSource], t: TensorPlan) -> tuple[Any, None] | None:
    """What tensors have in common that come of one computation, for one that is not alone in that. Ends with None, as no key
    of other batches does.
    """
    if t.action is Action.MERGE or not t.spec.numel:
        return None
    names = sources[t.inputs[0].model].together(t.inputs[0].name)
    return ((t.inputs[0].model, names), None) if len(names) > 1 else None


def most_of_a_unit(plan: Plan, sources: Sequence[TensorSource]) -> int:
    """Bytes of a buffer for the inputs of the largest unit."""
    most = 0
    for t in plan.tensors:
        numel = min(cut_pieces(plan, t) * PIECE, t.spec.numel)
        sizes = (numel * sources[o.model].spec(o.name).dtype.itemsize for o in t.inputs)
        most = max(most, sum(map(aligned, sizes)))
    return most


def batch_key(plan: Plan, inputs: Sequence[TensorSource], t: TensorPlan) -> Any:
    """Tensors that may be worked on together have equal ones."""
    sources = [inputs[o.model] for o in t.inputs]
    return (
        tuple(not s.parts or s.place(o.name) is not None for s, o in zip(sources, t.inputs, strict=True)),
        t.action,
        t.group,
        t.spec.dtype,
        tuple((o.model, o.position, s.spec(o.name).dtype) for s, o in zip(sources, t.inputs, strict=True)),
        tuple(of[t.index] for of in plan.span_of.values() if t.index in of),
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring tensors that are worked on together. bundles: by compiled calls; joint: whole, as they come of one
    computation.
    """

    tensors: tuple[TensorPlan, ...]
    bundles: bool
    joint: bool = False


class Cutter:
    """Cuts tensors into work. takes: whether compiled calls can do tensors of this kind, asked once for each key."""

    def __init__(
        self, plan: Plan, sources: Sequence[TensorSource], pieces: Pieces, takes: Callable[[TensorPlan], bool]
    ) -> None:
        self.plan = plan
        self.sources = sources
        self.pieces = pieces
        known: dict[Any, bool] = {}
        self.keys: list[Any] = [batch_key(plan, sources, t) for t in plan.tensors]
        self.native = np.zeros(len(plan.tensors), np.bool_)
        for t, key in zip(plan.tensors, self.keys, strict=True):
            if key not in known:
                known[key] = takes(t)
            self.native[t.index] = known[key]

    def runs(self, tensors: Sequence[TensorPlan], alone: Callable[[TensorPlan], bool]) -> Iterator[Batch]:
        """Tensors in order: those for bundles as far as they are alike, small neighbours of one kind, others one by one.

        alone: those that must be by themselves.
        """
        batch: list[TensorPlan] = []
        key: Any = None
        filled = 0
        for t in tensors:
            joint = _joint(self.sources, t)
            if joint:
                if batch and key != joint:
                    yield Batch(tuple(batch), key[1] is True, joint=key[1] is None)
                    batch, filled = [], 0
                batch.append(t)
                key = joint
                continue
            numel = t.spec.numel
            apart = alone(t)
            bundles = bool(self.native[t.index]) and not apart
            joins = numel > 0 and (bundles or numel <= SMALL)
            own = (self.keys[t.index], bundles) if joins else None
            full = not bundles and (filled + numel > PIECE or len(batch) >= _BATCH_TENSORS)
            if batch and (own is None or own != key or full):
                yield Batch(tuple(batch), key[1] is True, joint=key[1] is None)
                batch, filled = [], 0
            if own is not None:
                batch.append(t)
                key = own
                filled += numel
            else:
                yield Batch((t,), False)
        if batch:
            yield Batch(tuple(batch), key[1] is True, joint=key[1] is None)

    def cut(self, run: Batch, done: Any, elements: Callable[[], int]) -> Iterator[Any]:
        """Rows to do together. done: whether pieces are done already, or None; elements: of a bundle, at most."""
        spans = [self.pieces.of(t.index) for t in run.tensors]
        rows = spans[0] if len(spans) == 1 else np.concatenate(spans)
        if not len(rows):
            return
        if run.bundles:
            rows = rows if done is None else rows[~done[rows]]
            ends = np.cumsum(self.pieces.stop[rows] - self.pieces.start[rows])
            at, before = 0, 0
            while at < len(rows):
                last = int(np.searchsorted(ends, before + elements(), side="right"))
                last = min(max(last, at + 1), at + _BATCH_TENSORS)
                yield rows[at:last]
                at, before = last, int(ends[last - 1])
            return
        if len(run.tensors) > 1 or run.joint:
            rows = rows if done is None else rows[~done[rows]]
            if len(rows):
                yield rows
            return
        step = cut_pieces(self.plan, run.tensors[0])
        for at in range(0, len(rows), step):
            part = rows[at : at + step]
            if done is None or not done[part].all():
                yield part

    def whole(self, t: TensorPlan) -> bool:
        """Whether a unit of this tensor is all of it."""
        return cut_pieces(self.plan, t) >= grid_of(t.spec.shape).pieces

    @staticmethod
    def share(left: int, workers: int) -> int:
        """Elements of a bundle where so many are left: so that all workers end at about the same time."""
        return min(max(left // (4 * workers), PIECE), _BUNDLE * PIECE)
