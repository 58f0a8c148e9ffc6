"""How a plan is cut into units of work: a block of one large tensor, or a batch of small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stockpot.grid import PIECE, SMALL, grid_of
from stockpot.methods.declaration import Scope
from stockpot.planning.plan import Action, Plan, TensorPlan

__all__ = ["Segment", "Unit", "aligned", "cut_pieces", "most_of_a_unit", "units_of", "work_lists"]

_BATCH_TENSORS = 4096


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


def cut_pieces(plan: Plan, tensor: TensorPlan) -> int:
    """Pieces in a block of this tensor: the budget's, in whole rows or the whole tensor where the method needs that."""
    grid = grid_of(tensor.spec.shape)
    scope = plan.groups[tensor.group].method.scope if tensor.action is Action.MERGE else Scope.ELEMENT
    if scope is Scope.TENSOR or (scope is Scope.ROW and len(tensor.spec.shape) < 2):
        return max(grid.pieces, 1)
    if scope is Scope.ROW and grid.per_row:
        return grid.per_row
    return plan.budget.block_pieces


def units_of(plan: Plan, tensor: TensorPlan, done: Callable[[int], set[int]] | None = None) -> list[Unit]:
    """The blocks of one tensor, leaving out pieces that a journal says are done."""
    grid = grid_of(tensor.spec.shape)
    if grid.pieces == 0:
        return []
    step = cut_pieces(plan, tensor)
    finished = done(tensor.index) if done else set()
    out = []
    first = 0
    while first < grid.pieces:
        last = min(first + step, grid.pieces)
        if not all(k in finished for k in range(first, last)):
            out.append(Unit((Segment(tensor, first, last, *grid.span(first, last)),)))
        first = last
    return out


def aligned(size: int) -> int:
    """Bytes that an input takes in a buffer with others."""
    return -(-size // 64) * 64


def most_of_a_unit(plan: Plan) -> int:
    """Bytes of a buffer for the inputs of the largest unit."""
    most = 0
    for t in plan.tensors:
        numel = min(cut_pieces(plan, t) * PIECE, t.spec.numel)
        sizes = (numel * plan.inputs[o.model].checkpoint.spec(o.name).dtype.itemsize for o in t.inputs)
        most = max(most, sum(map(aligned, sizes)))
    return most


def _batch_key(plan: Plan, t: TensorPlan) -> Any:
    return (
        t.action,
        t.group,
        t.shard,
        t.spec.dtype,
        tuple((o.model, o.position, plan.inputs[o.model].checkpoint.spec(o.name).dtype) for o in t.inputs),
        tuple(of[t.index] for of in plan.span_of.values() if t.index in of),
    )


def work_lists(plan: Plan) -> Iterator[tuple[TensorPlan, ...]]:
    """Tensors in the order of the output: a large one alone, small neighbours of one kind together."""
    batch: list[TensorPlan] = []
    key: Any = None
    filled = 0
    for t in plan.tensors:
        small = 0 < t.spec.numel <= SMALL
        own = _batch_key(plan, t) if small else None
        if batch and (not small or own != key or filled + t.spec.numel > PIECE or len(batch) >= _BATCH_TENSORS):
            yield tuple(batch)
            batch, filled = [], 0
        if small:
            batch.append(t)
            key = own
            filled += t.spec.numel
        else:
            yield (t,)
    if batch:
        yield tuple(batch)
