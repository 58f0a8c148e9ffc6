"""Merging in memory with the engine's own arithmetic, to the same bits as on disk: dicts of tensors, and whole plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stockpot.checkpoints.meaning.layers import LayerMap, map_layers
from stockpot.checkpoints.meaning.roles import role_of
from stockpot.checkpoints.memory import MemorySource
from stockpot.checkpoints.source import TensorSource
from stockpot.engine.devices import NumpyDevice
from stockpot.engine.executors import executor_of
from stockpot.engine.ledger import Ledger
from stockpot.engine.loop import Loop
from stockpot.engine.pieces import Pieces
from stockpot.engine.sink import MemorySink
from stockpot.errors import ArgumentError, MismatchError, nearest
from stockpot.grid import REDUCE
from stockpot.methods.averaging import linear
from stockpot.methods.declaration import Method, Space, cannot_replace, get_method, wrong_count
from stockpot.methods.parameters import REQUIRED
from stockpot.planning.layout import lay_out
from stockpot.planning.plan import Action, Budget, MergeGroup, Operand, Plan, TensorPlan
from stockpot.planning.statistics import plan_statistics
from stockpot.planning.template import Template
from stockpot.recipes.schema import Recipe

__all__ = ["full_parameters", "merge_dicts", "merge_plan"]

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
    texts = {str(key): key for key in (base if base is not None else models[0] if models else {})}
    if any(not isinstance(key, str) for key in texts.values()):  # names are text below
        named = [{str(k): v for k, v in d.items()} for d in models]
        own = None if base is None else {str(k): v for k, v in base.items()}
        found = merge_dicts(method, named, base=own, seed=seed, parameters=parameters)
        return {texts[name]: value for name, value in found.items()}
    if method.space is Space.FACTORS:
        raise ArgumentError(
            f"{method.name} combines the factors of adapters, which state dicts don't tell the scale of: merge adapter "
            f"directories by a recipe, or call stockpot.methods.{method.name}.function with Factors"
        )
    if base is None:
        method = method.without_base()
    if method.space is Space.DELTA and base is None:
        raise ArgumentError(f"{method.name} works on differences from a base: give base=")
    if method.space is Space.WEIGHT and base is not None:
        models = [base, *models]
    if why := wrong_count(method, len(models)):
        raise ArgumentError(why)
    beside = _companions(method, len(models), parameters)
    parameters = {key: value for key, value in parameters.items() if key not in beside}
    given = full_parameters(method, len(models), parameters)
    why = method.check(given) if method.check else None
    if why:
        raise ArgumentError(f"{method.name}: {why}")
    method = method.seen_with(given)
    subtracted = [base] if method.space is Space.DELTA and base is not None else []
    template = subtracted[0] if subtracted else models[0]
    dicts = [*models, *subtracted, *(d for found in beside.values() for d in found)]
    _check_names(dicts, template)
    sources = [MemorySource(d) for d in dicts]
    for name in template:
        _check_kinds(sources[: len(models) + len(subtracted)], name)
    made = _InMemory(method, given, len(models), map_layers(template))
    tensors = [made.tensor(i, name, sources) for i, name in enumerate(template)]
    placed, shards = lay_out(tensors, "adapter", 0)
    groups, stats = plan_statistics(placed, made.groups)
    plan = Plan(
        recipe=Recipe("", "", method.name),
        inputs=(),
        template=Template("model", {t.name: t.spec for t in placed}, {}, 0, 0),
        groups=groups,
        stats=stats,
        tensors=placed,
        shards=shards,
        seed=seed,
        budget=Budget(limit=0, workers=1, block_pieces=1, chunk=4 * REDUCE, hold=0, peak=0),
    )
    by_name = {t.name: _like(template[t.name], raw) for t, raw in merge_plan(plan, sources)}
    return {name: by_name[name] for name in template}


@dataclass
class _InMemory:
    """What the planner does for a recipe, for state dicts: which method each tensor gets, of which operands."""

    method: Method
    params: Mapping[str, Any]
    models: int
    layers: LayerMap
    groups: list[MergeGroup] = field(default_factory=list)

    def group(self, method: Method) -> int:
        for g in self.groups:
            if g.method.name == method.name:
                return g.index
        shared = {k: v for k, v in self.params.items() if k in {p.keyword for p in method.parameters.values()}}
        if method is linear:
            shared.pop("normalize", None)
        params = dict(self.params) if method is self.method else full_parameters(method, self.models, shared)
        self.groups.append(MergeGroup(len(self.groups), method.seen_with(params), params))
        return len(self.groups) - 1

    def tensor(self, index: int, name: str, sources: Sequence[MemorySource]) -> TensorPlan:
        delta = self.method.space is Space.DELTA
        first = self.models if delta else 0
        spec = sources[first].spec(name)
        if not spec.dtype.is_float:
            return TensorPlan(index, name, spec, Action.KEEP, -1, (Operand(first, name),), None)
        method = self.method
        if method.applies is not None and role_of(name, spec.shape) not in method.applies:
            if method.otherwise == "base":
                return TensorPlan(index, name, spec, Action.COPY, -1, (Operand(first, name),), None)
            other = linear if method.otherwise == "mean" else get_method(str(method.otherwise))
            why = cannot_replace(method, other) or wrong_count(other, self.models)
            if not why and other.space is Space.DELTA and not delta:
                why = (
                    f"{method.name}: otherwise={method.otherwise!r} works on differences from a base, which is only told apart "
                    "from the models when files are merged"
                )
            if why:
                raise ArgumentError(f"{name}: {why}")
            method = other
        operands = tuple(Operand(i, name, i) for i in range(self.models))
        base = Operand(first, name) if method.space is Space.DELTA else None
        beside = range(self.models + delta, len(sources)) if method is self.method else ()
        companions = tuple(Operand(i, name) for i in beside)
        place = self.layers.places.get(name)
        return TensorPlan(
            index, name, spec, Action.MERGE, self.group(method), operands, base, companions=companions,
            layer=None if place is None else (place.stack, place.layer),
        )  # fmt: skip


def _companions(method: Method, models: int, given: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The state dicts beside the models, by name."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for companion in method.companions:
        found = given.get(companion.name)
        if (
            not isinstance(found, (list, tuple))
            or len(found) != models
            or not all(isinstance(d, Mapping) for d in found)
        ):
            raise ArgumentError(
                f"{method.name} needs {companion.name}=, {companion.about}: a list of {models} mappings, one for each model"
            )
        out[companion.name] = list(found)
    return out


def merge_plan(plan: Plan, sources: Sequence[TensorSource], threads: int = 1) -> Iterator[tuple[TensorPlan, Array]]:
    """The output of a plan, tensor by tensor, without a file: (tensor, its bytes as uint8), those that running it would
    publish.

    sources: what is read for each input of the plan, by its index.
    """
    plan = replace(plan, budget=replace(plan.budget, workers=threads))
    sink = MemorySink(plan.shards)
    Loop(plan, sources, NumpyDevice(), sink, Ledger(Pieces(plan.tensors), 0), look=False).run(executor_of(threads))
    for t in plan.tensors:
        yield t, sink.tensor(t)


def full_parameters(method: Method, models: int, given: Mapping[str, Any]) -> dict[str, Any]:
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
        checked = [p.kind.convert(v) for v in values]
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


def _like(template: Any, raw: np.ndarray[Any, Any]) -> Any:
    """Bytes -> a tensor or array like the template."""
    if hasattr(template, "detach"):
        import torch

        flat = torch.from_numpy(raw).view(template.dtype) if raw.size else torch.empty(0, dtype=template.dtype)
        return flat.reshape(template.shape).to(template.device)
    return raw.view(template.dtype).reshape(template.shape)
