"""How much memory a merge takes, and how many blocks of what size may be in flight within a limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stockpot.errors import ArgumentError
from stockpot.grid import PIECE, REDUCE, grid_of
from stockpot.methods.declaration import Scope
from stockpot.planning.plan import Action, Budget, MergeGroup, ModelInput, StatPlan, TensorPlan
from stockpot.specs import format_size, work_itemsize
from stockpot.statistics import Mask, Rank

__all__ = ["DEFAULT_LIMIT", "choose_budget", "chunk_for"]

DEFAULT_LIMIT = 512 * 2**20
#: what a cutoff in the making holds for each model (see engine.cutoffs)
_CUTOFF_WINDOW = 2**20 * 4 * 2
#: elements of all models computed at once: what stays in a core's own cache
_IN_CACHE = 2**19
_FIXED = 16 * 2**20
#: inputs kept from one pass to the next, where there is room for them
_HOLD = 64 * 2**20
_PER_TENSOR = 4096
#: what is noted of a piece of the output or of an input: its digest and three measures
_SEEN = 32 + 3 * 8
#: the allocator's share: freed blocks that it keeps
_SLACK = 1.25


def chunk_for(models: int) -> int:
    """Elements of each model to compute at once: a power of two, 2^13 to 2^17."""
    chunk = 2**17
    while chunk > 2**13 and chunk * (models + 1) > _IN_CACHE:
        chunk //= 2
    return chunk


def _worker_bytes(
    t: TensorPlan,
    inputs: Sequence[ModelInput],
    groups: Sequence[MergeGroup],
    stats: Sequence[StatPlan],
    pieces: int,
    chunk: int,
) -> int:
    """Bytes of one worker while it has a block of this tensor in hand."""
    grid = grid_of(t.spec.shape)
    sizes = [inputs[o.model].checkpoint.spec(o.name).dtype.itemsize for o in t.inputs]
    block = min(pieces * PIECE, max(t.spec.numel, 1))
    sizes.append(max(inputs[o.model].checkpoint.scratch_itemsize for o in t.inputs))
    reading = max(inputs[o.model].checkpoint.scratch_of(o.name) for o in t.inputs)
    if t.action is not Action.MERGE:
        source, name = inputs[t.inputs[0].model].checkpoint, t.inputs[0].name
        joint = source.together(name)
        block = block if len(joint) == 1 else sum(source.spec(n).numel for n in joint)
        return reading + block * (sum(sizes) + t.spec.dtype.itemsize)
    group = groups[t.group]
    method, wide, m = group.method, work_itemsize(t.spec.dtype), len(t.operands)
    if method.scope is Scope.TENSOR:
        block = chunk = max(t.spec.numel, 1)
    elif method.scope is Scope.ROW:
        row = t.spec.numel if len(t.spec.shape) == 1 else grid.row
        block = chunk = max(block, row)  # whole rows are computed at once, and so is all that is read
    needed = [stats[i].stat for i in group.stats]
    chunk = min(max(chunk, REDUCE) if needed else chunk, block)
    if method.cost is not None and method.scope is Scope.TENSOR:
        # as arrays: the inputs, and the result, which the base may be added to
        arrays = block * wide * (len(t.inputs) + 2) + method.cost.scratch(m, t.spec.shape, wide)
        # statistics come before it, in blocks
        arrays = max(arrays, *(min(REDUCE, block) * (8 * s.scratch(m) + wide * len(t.inputs)) for s in needed), 0)
        return reading + block * (sum(sizes) + t.spec.dtype.itemsize) + arrays
    rows = len(t.inputs) + (6 * m + 8 if needed or method.draws else 4)
    arrays = chunk * wide * rows
    drawn = sum(8 * m for d in method.draws if not isinstance(d, Mask)) * chunk
    folded = max((chunk * (8 * s.scratch(m) + wide * len(t.inputs)) for s in needed), default=0)
    return reading + block * (sum(sizes) + t.spec.dtype.itemsize) + max(arrays + drawn, folded)


def _passed_twice(
    tensors: Iterable[TensorPlan], inputs: Sequence[ModelInput], groups: Sequence[MergeGroup], stats: Sequence[StatPlan]
) -> int:
    """Bytes of inputs of the largest tensor that is read for its own statistics first, in whole pieces."""
    most = 0
    for t in tensors:
        if t.action is not Action.MERGE or not any(stats[i].extent == "tensor" for i in groups[t.group].stats):
            continue
        sizes = (inputs[o.model].checkpoint.spec(o.name).dtype.itemsize for o in t.inputs)
        most = max(most, grid_of(t.spec.shape).pieces * PIECE * sum(sizes))
    return most


def _module(t: TensorPlan, inputs: Sequence[ModelInput]) -> tuple[int, ...]:
    """Of a factor what its module takes: others of its shape may belong to smaller ones."""
    model, name = inputs[t.inputs[0].model], t.inputs[0].name
    if model.role != "factors":
        return ()
    return model.checkpoint.scratch_of(name), sum(
        model.checkpoint.spec(n).numel for n in model.checkpoint.together(name)
    )


def choose_budget(
    tensors: Sequence[TensorPlan],
    inputs: Sequence[ModelInput],
    groups: Sequence[MergeGroup],
    stats: Sequence[StatPlan],
    limit: int,
    threads: int,
) -> Budget:
    """The most workers, then the largest blocks, that stay within `limit` bytes over the interpreter's own memory.

    Raises ArgumentError, naming what would be enough, when one worker with the smallest block does not fit.
    """
    threads = max(1, min(threads, 1024))
    most = max((len(t.operands) for t in tensors), default=1)
    ranks = (len(s.stat.fractions(s.params)) for s in stats if isinstance(s.stat, Rank) and s.extent != "row")
    window = min(_CUTOFF_WINDOW, 8 * sum(t.spec.numel for t in tensors)) * max(ranks, default=0)
    pieces = sum(grid_of(t.spec.shape).pieces for t in tensors)
    slots = 1 + max((len(t.inputs) for t in tensors), default=0)
    fixed = _FIXED + _PER_TENSOR * len(tensors) + _SEEN * pieces * slots + sum(m.checkpoint.resident for m in inputs)
    chunk = chunk_for(most)
    worst: dict[int, tuple[int, TensorPlan | None]] = {}
    distinct = {
        (
            t.action,
            t.group,
            tuple(inputs[o.model].checkpoint.spec(o.name).dtype for o in t.inputs),
            t.spec,
            *_module(t, inputs),
        ): t
        for t in tensors
    }
    most_pieces = max((m.checkpoint.pieces_at_once for m in inputs), default=1)
    choices = [most_pieces >> k for k in range(most_pieces.bit_length())]
    for pieces in choices:
        worst[pieces] = max(
            ((_worker_bytes(t, inputs, groups, stats, pieces, chunk), t) for t in distinct.values()),
            key=lambda pair: pair[0],
            default=(0, None),
        )
    for workers in range(threads, 0, -1):
        for pieces in choices:
            peak = fixed + workers * window + window // 2 + int(workers * worst[pieces][0] * _SLACK)
            if peak <= limit:
                hold = min(_HOLD, _passed_twice(distinct.values(), inputs, groups, stats), limit - peak)
                return Budget(limit, workers, pieces, chunk, hold, peak + hold)
    need, tensor = worst[choices[-1]]
    total = fixed + window + window // 2 + int(need * _SLACK)
    raise ArgumentError(
        f"--max-memory {format_size(limit)} is not enough: {tensor.name if tensor else 'the plan'!r} needs "
        f"{format_size(total)} with one worker; allow at least that"
    )
