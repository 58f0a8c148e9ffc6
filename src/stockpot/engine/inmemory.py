"""Merging in memory with the engine's own arithmetic, to the same bits as on disk: dicts of tensors, and whole plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from stockpot.checkpoints.memory import MemorySource
from stockpot.checkpoints.source import TensorSource
from stockpot.engine.devices import NumpyDevice
from stockpot.engine.gathering import Gathering
from stockpot.engine.kernel import Kernel, UnitData, read_segment
from stockpot.engine.units import Segment
from stockpot.errors import ArgumentError, MismatchError, nearest
from stockpot.methods.declaration import Method, Space
from stockpot.methods.parameters import REQUIRED
from stockpot.planning.grid import REDUCE, grid_of
from stockpot.planning.plan import Action, MergeGroup, Operand, Plan, TensorPlan

__all__ = ["merge_dicts", "merge_plan"]

Array = np.ndarray[Any, Any]


def merge_dicts(
    method: Method,
    models: Sequence[Mapping[str, Any]],
    *,
    base: Mapping[str, Any] | None,
    seed: int,
    parameters: Mapping[str, Any],
) -> dict[str, Any]:
    """Merge state dicts; see Method.__call__. Names, shapes, dtypes and device of the result are the first's (the base's)."""
    if isinstance(models, Mapping) or not all(isinstance(m, Mapping) for m in models):
        raise ArgumentError(f"{method.name}: expected a list of mappings from names to tensors")
    models = list(models)
    if method.space is Space.DELTA and base is None:
        raise ArgumentError(f"{method.name} works on differences from a base: give base=")
    if method.space is Space.WEIGHT and base is not None:
        models = [base, *models]
    low, high = method.models
    if len(models) < low or (high is not None and len(models) > high):
        raise ArgumentError(
            f"{method.name} takes {low if low == high else f'at least {low}'} models, got {len(models)}"
        )
    group = MergeGroup(0, method, _parameters(method, len(models), parameters))
    why = method.check(group.params) if method.check else None
    if why:
        raise ArgumentError(f"{method.name}: {why}")
    dicts = [*models, base] if method.space is Space.DELTA and base is not None else models
    template = dicts[-1] if method.space is Space.DELTA else dicts[0]
    _check_names(dicts, template)
    sources = [MemorySource(d) for d in dicts]
    for name in template:
        _check_kinds(sources, name)
    tensors = [_tensor(i, name, sources, method) for i, name in enumerate(template)]
    return {
        t.name: _like(template[t.name], raw) for t, raw in merged_tensors(tensors, [group], sources, seed, 4 * REDUCE)
    }


def merge_plan(plan: Plan, sources: Sequence[TensorSource], threads: int = 1) -> Iterator[tuple[TensorPlan, Array]]:
    """The output of a plan, tensor by tensor, without a file: the bytes that running it would publish.

    sources: what is read for each input of the plan, by its index.
    """
    yield from merged_tensors(plan.tensors, plan.groups, sources, plan.seed, plan.budget.chunk, threads)


def merged_tensors(
    tensors: Sequence[TensorPlan], groups: Sequence[MergeGroup], sources: Sequence[TensorSource], seed: int, chunk: int,
    threads: int = 1,
) -> Iterator[tuple[TensorPlan, Array]]:  # fmt: skip
    """(tensor, its bytes as uint8) in order. What a method needs of the whole model is gathered first."""
    kernels = [Kernel(NumpyDevice(), g, seed, chunk) for g in groups]
    stats = [
        _model_stats(k, [t for t in tensors if t.action is Action.MERGE and t.group == k.group.index], sources)
        for k in kernels
    ]

    def one(t: TensorPlan) -> tuple[TensorPlan, Array]:
        data = _data(t, sources)
        if t.action is not Action.MERGE or t.spec.numel == 0:
            return t, np.frombuffer(data.raws[0], np.uint8)
        raw = np.empty(t.spec.nbytes, np.uint8)
        kernels[t.group].combine(data, stats[t.group], raw.data)
        return t, raw

    if threads == 1:
        yield from map(one, tensors)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(one, tensors)


def _parameters(method: Method, models: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Checked and complete, by keyword. Accepts both `scale` and recipe names such as `lambda` (as `**{"lambda": 1}`)."""
    names = {p.keyword: p for p in method.parameters.values()} | method.parameters
    for key in given:
        if key not in names:
            raise ArgumentError(f"{method.name} has no parameter {key!r}{nearest(key, names)}")
    by_keyword = {names[key].keyword: value for key, value in given.items()}
    dialect = by_keyword.get("dialect", method.dialects[0] if method.dialects else None)
    out = {}
    for p in method.parameters.values():
        value = by_keyword.get(p.keyword, p.default_for(dialect))
        if value is REQUIRED:
            raise ArgumentError(f"{method.name} needs {p.keyword}=, {p.kind.describe()}")
        values = (
            list(value)
            if p.per_model and isinstance(value, (list, tuple))
            else [value] * (models if p.per_model else 1)
        )
        if p.per_model and len(values) != models:
            raise ArgumentError(f"{p.keyword}: expected one value or {models}, got {len(values)}")
        for v in values:
            expected = p.kind.check(v)
            if expected:
                raise ArgumentError(f"{p.keyword}: expected {expected}, got {v!r}")
        checked = [v if isinstance(v, (bool, str)) else float(v) for v in values]
        out[p.keyword] = tuple(checked) if p.per_model else checked[0]
    return out


def _check_names(dicts: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> None:
    for i, d in enumerate(dicts):
        different = set(d) ^ set(template)
        if different:
            raise MismatchError(f"model {i}: tensor names differ: {sorted(different)[:5]}")
        for name in template:
            if tuple(d[name].shape) != tuple(template[name].shape):
                raise MismatchError(
                    f"{name!r}: {tuple(d[name].shape)} in model {i}, expected {tuple(template[name].shape)}"
                )


def _check_kinds(sources: Sequence[MemorySource], name: str) -> None:
    """All float, or all of one dtype that is copied."""
    dtypes = [source.spec(name).dtype for source in sources]
    if any(d.is_float for d in dtypes) and not all(d.is_float for d in dtypes):
        raise MismatchError(f"{name!r}: float in one model, not in another: {', '.join(map(str, dtypes))}")


def _tensor(index: int, name: str, sources: Sequence[MemorySource], method: Method) -> TensorPlan:
    delta = method.space is Space.DELTA
    first = len(sources) - 1 if delta else 0
    spec = sources[first].spec(name)
    if not spec.dtype.is_float:
        return TensorPlan(index, name, spec, Action.KEEP, -1, (Operand(first, name),), None)
    operands = tuple(Operand(i, name, i) for i in range(len(sources) - (1 if delta else 0)))
    base = Operand(first, name) if delta else None
    return TensorPlan(index, name, spec, Action.MERGE, 0, operands, base)


def _data(t: TensorPlan, sources: Sequence[TensorSource]) -> UnitData:
    n = t.spec.numel
    return read_segment(Segment(t, 0, grid_of(t.spec.shape).pieces, 0, n), sources)


def _model_stats(kernel: Kernel, tensors: Sequence[TensorPlan], sources: Sequence[TensorSource]) -> dict[str, Any]:
    """Statistics over all tensors together."""
    params = kernel.group.params
    wide = [s for s in kernel.method.active_stats(params) if s.scope_for(params) == "model"]
    if not wide or not tensors:
        return {}
    gathering = Gathering(wide, params, len(tensors[0].operands), sum(t.spec.numel for t in tensors))
    gathering.fresh = False
    while gathering.current is not None:
        for t in tensors:
            if t.spec.numel:
                kernel.fold(gathering, _data(t, sources), {})
        gathering.finish_pass()
    return gathering.results


def _like(template: Any, raw: np.ndarray[Any, Any]) -> Any:
    """Bytes -> a tensor or array like the template."""
    if hasattr(template, "detach"):
        import torch

        flat = torch.from_numpy(raw).view(template.dtype) if raw.size else torch.empty(0, dtype=template.dtype)
        return flat.reshape(template.shape).to(template.device)
    return raw.view(template.dtype).reshape(template.shape)
