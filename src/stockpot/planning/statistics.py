"""Which statistics a merge needs, and over which tensors each value holds: decided here, once, for every way of running a plan.

Tensors share a value where they are merged by the same method, the statistic's extent says so, and the parameters that matter to
it are equal; other parameters may differ (a lambda that changes from layer to layer leaves a cutoff over the model one cutoff).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stockpot.errors import ArgumentError
from stockpot.methods.checking import check_extents
from stockpot.planning.plan import Action, MergeGroup, StatPlan, TensorPlan

__all__ = ["plan_statistics"]


def plan_statistics(
    tensors: Sequence[TensorPlan], groups: Sequence[MergeGroup]
) -> tuple[tuple[MergeGroup, ...], tuple[StatPlan, ...]]:
    """(the groups with the places of the statistics that they need, these). Wider ones of a method come before narrower ones."""
    members: dict[int, list[TensorPlan]] = {}
    for t in tensors:
        if t.action is Action.MERGE:
            members.setdefault(t.group, []).append(t)
    found: dict[Any, StatPlan] = {}
    needed: dict[int, list[Any]] = {g.index: [] for g in groups}
    for g in groups:
        if not g.method.stats or g.index not in members:
            continue
        models = len(members[g.index][0].operands)
        active = [(i, s) for i, s in enumerate(g.method.stats) if s.needed(g.params)]
        for why in check_extents(g.method, [(s, s.extent(g.params)) for _, s in active]):
            raise ArgumentError(f"method {g.method.name!r}: {why}")
        for place, stat in active:
            extent = stat.extent(g.params)
            own = g.index if extent in ("row", "tensor", "group") else None
            key = (place, g.method.name, extent, models, own, repr(stat.matters(g.params)))
            if key not in found:
                found[key] = StatPlan(len(found), g.method, place, extent, g.params, models)
            needed[g.index].append(key)
    # those of one place after those of the places before it: what a statistic may use is known when it is gathered
    ordered = sorted(found, key=lambda key: (key[1], key[0]))
    number = {key: i for i, key in enumerate(ordered)}
    stats = []
    for key in ordered:
        mine = [t for g in groups if key in needed[g.index] for t in members[g.index]]
        stats.append(replace(found[key], index=number[key], spans=_spans(found[key], mine)))
    return (
        tuple(replace(g, stats=tuple(number[key] for key in needed[g.index])) for g in groups),
        tuple(stats),
    )


def _spans(stat: StatPlan, tensors: Sequence[TensorPlan]) -> tuple[tuple[int, ...], ...]:
    """What one value is gathered over: nothing that a merge must know beforehand for rows and tensors."""
    if not stat.wide:
        return ()
    spans: dict[Any, list[int]] = {}
    for t in tensors:
        # outside the layers every tensor stands for itself
        span: Any = None if stat.extent != "layer" else t.layer if t.layer is not None else t.name
        spans.setdefault(span, []).append(t.index)
    return tuple(tuple(sorted(span)) for span in spans.values())
