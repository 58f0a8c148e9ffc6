"""A SoupSpec and a Run -> snapshots with weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.errors import ArgumentError, CheckpointError
from stockpot.runs.metrics import MetricValue, known_objective
from stockpot.runs.naming import soup_name
from stockpot.runs.run import Run, Snapshot
from stockpot.runs.schemes import SCHEMES
from stockpot.runs.spec import DEFAULT_LAST, SoupSpec, scheme_weights
from stockpot.runs.weighting import effective_count, uniform

__all__ = ["Ingredient", "Soup", "resolve_soup", "resolve_windows"]


@dataclass(frozen=True)
class Ingredient:
    """One snapshot with its weight, and the metric that decided it (None where none did)."""

    snapshot: Snapshot
    weight: float
    metric: MetricValue | None = None


@dataclass(frozen=True)
class Soup:
    """Snapshots in step order with weights that sum to one (given ones as given)."""

    name: str
    ingredients: tuple[Ingredient, ...]
    notes: tuple[str, ...] = ()

    @property
    def effective_snapshots(self) -> float:
        """1 / sum w^2."""
        return effective_count([i.weight for i in self.ingredients])

    def to_dict(self) -> dict[str, Any]:
        """`name`, `snapshots` (step, metric, weight), `effective_snapshots`, as plain data."""
        return {
            "name": self.name,
            "snapshots": [
                {
                    "step": i.snapshot.step,
                    "metric": None if i.metric is None else i.metric.value,
                    "weight": i.weight,
                    "rule": None if i.metric is None else i.metric.rule,
                    "path": i.snapshot.path,
                }
                for i in self.ingredients
            ],
            "effective_snapshots": self.effective_snapshots,
        }


def resolve_soup(run: Run, spec: SoupSpec) -> Soup:
    """Choose and weight. Raises ArgumentError, CheckpointError or MismatchError."""
    if SCHEMES[spec.kind].windows:
        raise ArgumentError(
            "lawa makes one soup for every window, which only `stockpot soup` can write (resolve_windows)"
        )
    notes: list[str] = []
    chosen = _choose(run, spec, notes)
    count = len(chosen)
    metrics = _metrics(run, spec, chosen)
    objective = _objective(spec)
    if spec.best is not None:
        chosen, metrics = _best(spec, chosen, metrics, objective)
    run.check_kinds(chosen)
    weights = _weights(spec, chosen, metrics, objective, notes)
    found: list[MetricValue | None] = [*metrics] if metrics else [None] * len(chosen)
    return Soup(
        soup_name(spec, count),
        tuple(Ingredient(s, w, m) for s, w, m in zip(chosen, weights, found, strict=True)),
        tuple(notes),
    )


def resolve_windows(run: Run, spec: SoupSpec) -> list[tuple[int, Soup]]:
    """LAWA: (newest step, uniform soup) of every window of `last` snapshots, `every` apart, along the run."""
    k = spec.last or DEFAULT_LAST
    pool = run.snapshots if spec.include_final else run.regular
    reach = (k - 1) * spec.every + 1
    if len(pool) < reach:
        raise ArgumentError(_too_few(run, k, spec.every, len(pool)))
    out = []
    for end in range(reach, len(pool) + 1):
        window = pool[end - reach : end : spec.every]
        run.check_kinds(window)
        name = soup_name(SoupSpec(steps=tuple(s.step for s in window)), k)
        out.append((window[-1].step, Soup(name, tuple(Ingredient(s, w) for s, w in zip(window, uniform(k))))))
    return out


def _choose(run: Run, spec: SoupSpec, notes: list[str]) -> tuple[Snapshot, ...]:
    if not run.snapshots:
        faults = "; ".join(f"step {s.step}: {s.fault}" for s in run.broken[:4])
        raise CheckpointError(f"{run.path}: no usable snapshot{': ' + faults if faults else ''}")
    steps = spec.steps or (tuple(spec.weights) if spec.weights is not None else None)
    if steps is not None:
        return tuple(run.at(step) for step in steps)
    pool = run.snapshots if spec.include_final else run.regular
    if not pool:
        raise ArgumentError(
            f"{run.path}: the only snapshot is the final checkpoint of step {run.snapshots[-1].step}; include_final takes it"
        )
    if spec.start is not None or (SCHEMES[spec.kind].from_start and spec.last is None):
        start = spec.start or 0
        pool = tuple(s for s in pool if s.step >= start)
        if not pool:
            raise ArgumentError(f"{run.path}: no regular snapshot from step {start} on; the newest is of step "
                                f"{(run.last_merging or run.snapshots[-1]).step}")  # fmt: skip
        return tuple(reversed(pool[:: -spec.every]))
    spaced = tuple(reversed(pool[:: -spec.every]))
    if spec.last is None:
        if len(spaced) > DEFAULT_LAST:
            notes.append(f"the last {DEFAULT_LAST} of {len(spaced)} snapshots; --last K takes more or fewer")
        return spaced[-DEFAULT_LAST:]
    if len(spaced) < spec.last:
        raise ArgumentError(_too_few(run, spec.last, spec.every, len(pool)))
    return spaced[-spec.last :]


def _too_few(run: Run, k: int, every: int, there: int) -> str:
    reach = (k - 1) * every + 1
    spaced = f", {every} apart," if every > 1 else ""
    final = run.final
    besides = f" besides the final one of step {final.step}" if final else ""
    broken = f"; {len(run.broken)} more can't be used ({run.broken[0].fault})" if run.broken else ""
    return f"{run.path}: the last {k} snapshots{spaced} were asked for, which needs {reach}; the run has {there}{besides}{broken}"


def _metrics(run: Run, spec: SoupSpec, chosen: Sequence[Snapshot]) -> list[MetricValue] | None:
    if spec.by is None:
        return None
    return [run.metrics.value_at(spec.by, s.step, spec.smooth) for s in chosen]


def _objective(spec: SoupSpec) -> str | None:
    if spec.by is None:
        return None
    objective = spec.objective or known_objective(spec.by)
    if objective is None:
        raise ArgumentError(
            f"whether a low or a high {spec.by!r} is better can't be told from its name: give objective min or max"
        )
    return objective


def _best(
    spec: SoupSpec, chosen: Sequence[Snapshot], metrics: Sequence[MetricValue] | None, objective: str | None
) -> tuple[tuple[Snapshot, ...], list[MetricValue]]:
    """The best N by the metric, back in step order; of equals the newer."""
    assert spec.best is not None
    assert metrics is not None
    if len(chosen) < spec.best:
        raise ArgumentError(f"the best {spec.best} were asked for, among {len(chosen)} snapshots")
    sign = 1 if objective == "min" else -1
    order = sorted(range(len(chosen)), key=lambda i: (sign * metrics[i].value, -chosen[i].step))[: spec.best]
    return tuple(chosen[i] for i in sorted(order)), [metrics[i] for i in sorted(order)]


def _weights(
    spec: SoupSpec,
    chosen: Sequence[Snapshot],
    metrics: Sequence[MetricValue] | None,
    objective: str | None,
    notes: list[str],
) -> list[float]:
    scheme = SCHEMES[spec.kind]
    if scheme.needs_metric:
        assert metrics is not None
        assert objective is not None
        if spec.penalty is not None and spec.penalty > 1:
            notes.append(f"penalty {spec.penalty:g} is above 1: it favours the snapshots that rank worse")
        bad = [
            (s.step, m.value) for s, m in zip(chosen, metrics) if m.value < 0 or (m.value == 0 and objective == "min")
        ]
        if bad:
            raise ArgumentError(
                f"{spec.by!r} is {bad[0][1]:g} at step {bad[0][0]}: weights by a metric need values "
                f"{'above 0' if objective == 'min' else 'of at least 0'}; choose another metric or scheme"
            )
    if scheme.weights is None:
        return _given(spec, chosen, notes)
    return scheme_weights(spec, [s.step for s in chosen], [m.value for m in metrics or ()], objective or "min")


def _given(spec: SoupSpec, chosen: Sequence[Snapshot], notes: list[str]) -> list[float]:
    assert spec.weights is not None
    if spec.steps is not None and set(spec.steps) != set(spec.weights):
        odd = sorted(set(spec.steps) ^ set(spec.weights))
        raise ArgumentError(f"steps and weights name different snapshots: {', '.join(map(str, odd[:6]))}")
    values = [spec.weights[s.step] for s in chosen]
    total = sum(values)
    if spec.normalize:
        if not 0 < total < math.inf:
            raise ArgumentError(f"weights: they sum to {total:g}, which can't be normalised")
        return [v / total for v in values]
    if abs(total - 1) > 1e-6:
        raise ArgumentError(f"weights: they sum to {total:g}, not 1; normalize divides them by their sum")
    if min(values) < 0:
        notes.append("some weights are negative: the result lies outside the snapshots")
    return values
