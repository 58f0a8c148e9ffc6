"""The straight line between two checkpoints: the loss along it, the barrier, what is accepted (linear mode connectivity)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.adapters import changes_the_base
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.errors import ArgumentError, SuiteError
from stockpot.evaluation.pool import Task, WorkerPool, as_it_is, score_all
from stockpot.evaluation.scores import Scores
from stockpot.evaluation.statistics import Difference, Interval, bootstrap_score, paired_difference
from stockpot.evaluation.suite import Suite

__all__ = ["PathPoint", "PathResult", "interpolation_path", "path_from_dict"]


@dataclass(frozen=True)
class PathPoint:
    """At `t` from A (0) to B (1).

    excess    how much worse it is than the straight line between the scores of A and B; below 0: better
    accepted  not worse than the worse end, beyond noise
    """

    t: float
    score: Interval
    metrics: Mapping[str, float]
    excess: float
    accepted: bool
    against_best_end: Difference


@dataclass(frozen=True)
class PathResult:
    """barrier: the largest excess, at least 0 (arXiv 2209.04836); `verdict` says whether merging on the line makes sense."""

    a: str
    b: str
    suite: Suite
    points: tuple[PathPoint, ...]
    barrier: float
    best: float
    verdict: str
    base: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "a": self.a, "b": self.b, "direction": self.suite.direction, "barrier": self.barrier, "best_t": self.best,
            "verdict": self.verdict, "base": None if self.base is None else self.base.value,
            "points": [
                {"t": p.t, "score": p.score.value, "low": p.score.low, "high": p.score.high, "metrics": dict(p.metrics),
                 "excess": p.excess, "accepted": p.accepted, "against_best_end": p.against_best_end.to_dict()}
                for p in self.points
            ],
        }  # fmt: skip


def interpolation_path(
    a: str,
    b: str,
    suite: Suite,
    *,
    base: str | None = None,
    points: int = 11,
    split: str = "selection",
    shown: Any = None,
) -> PathResult:
    """Score `points` equal steps from A to B, both included.

    base   scored beside as a reference: the model that A and B were trained from (adapters: theirs, by itself)
    split  the data to use: it is a screening, so the selection split

    Raises StockpotError; MismatchError where A and B don't fit each other.
    """
    if points < 3:
        raise ArgumentError(f"points: expected at least 3, got {points}")
    steps = [i / (points - 1) for i in range(points)]
    exact = _products(a) and _products(b)
    tasks = [Task(f"t = {t:.4g}", _at(a, b, t, exact)) for t in steps]
    if base is not None:
        tasks.append(Task("base", as_it_is(base)))
    with WorkerPool(suite) as pool:
        wanted = [i for i in pool.infos if i.split == split]
        missing = {s.name for s in suite.slices if s.weight} - {i.slice for i in wanted}
        if missing:
            raise SuiteError(
                f"{suite.path}: a path is a screening, by {split} data, and {', '.join(sorted(missing))} have none"
            )
        found = score_all(pool, tasks, wanted, shown)
    by_task = {name: {s: scores for (s, _), scores in parts.items()} for name, parts in found.items()}
    reference = bootstrap_score(suite, by_task["base"]) if base is not None else None
    return make_path(a, b, suite, steps, [by_task[t.name] for t in tasks[: len(steps)]], reference)


def _products(ref: str) -> bool:
    """Whether it is an adapter whose change of the weights is a sum of products, so that a line between two is exact."""
    checkpoint = open_checkpoint(ref)
    config = checkpoint.config
    plain = config.get("peft_type") == "LORA" and not config.get("use_dora") and not changes_the_base(config)
    return checkpoint.kind == "adapter" and plain


def _at(a: str, b: str, t: float, exact: bool) -> dict[str, Any]:
    """The ends are the checkpoints themselves. Between adapters the line is that of the weights they lead to (exact), not of
    their factors, wherever that is defined.
    """
    if t in (0.0, 1.0):
        return as_it_is(b if t else a)
    models = [{"model": m, "parameters": {"weight": w}} for m, w in ((a, 1.0 - t), (b, t))]
    recipe: dict[str, Any] = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}}
    return recipe | ({"adapter": {"mode": "product"}} if exact else {})


def make_path(
    a: str,
    b: str,
    suite: Suite,
    steps: Sequence[float],
    scores: Sequence[Mapping[str, Scores]],
    base: Interval | None = None,
) -> PathResult:
    """The path from the scores at each step."""
    sign = 1 if suite.direction == "min" else -1  # more of sign * score is worse
    values = [bootstrap_score(suite, s) for s in scores]
    first, last = values[0].value, values[-1].value
    worse_end = max((0, -1), key=lambda i: sign * values[i].value)
    better_end = min((0, -1), key=lambda i: sign * values[i].value)
    points = []
    for t, s, v in zip(steps, scores, values, strict=True):
        excess = sign * (v.value - ((1 - t) * first + t * last))
        against = paired_difference(suite, s, scores[worse_end])
        sure = against.verdict == "worse" or (against.verdict == "unknown" and against.value < 0)
        accepted = t in (0.0, 1.0) or not sure
        metrics = {name: x[suite.slice(name).metric] for name, x in s.items()}
        points.append(PathPoint(t, v, metrics, excess, accepted, paired_difference(suite, s, scores[better_end])))
    top = max(points, key=lambda p: p.excess)
    barrier = max(top.excess, 0.0)
    best = min(points, key=lambda p: sign * p.score.value)
    return PathResult(a, b, suite, tuple(points), barrier, best.t, _verdict(points, top, barrier, best), base)


def _verdict(points: Sequence[PathPoint], top: PathPoint, barrier: float, best: PathPoint) -> str:
    inner = points[1:-1]
    if not any(p.accepted for p in inner):
        return f"not connected: every point between is worse than both ends; the barrier is {barrier:.4g} at t = {top.t:.4g}"
    if not all(p.accepted for p in inner):
        good = ", ".join(f"{p.t:.3g}" for p in inner if p.accepted)
        return f"a barrier of {barrier:.4g} at t = {top.t:.4g}; within noise of the ends, or better, at t = {good}"
    if best.t not in (0.0, 1.0) and best.against_best_end.verdict == "better":
        return f"connected, and better than both ends at t = {best.t:.4g}: {best.against_best_end.value:+.4g} (more is better)"
    return f"connected: nothing on the line is worse than the worse end beyond noise; the barrier is {barrier:.4g}"


def path_from_dict(found: Mapping[str, Any], suite: Suite) -> PathResult:
    """What to_dict gave. Raises KeyError for anything else."""
    points = tuple(
        PathPoint(
            p["t"],
            Interval(p["score"], p["low"], p["high"]),
            p["metrics"],
            p["excess"],
            p["accepted"],
            Difference(**p["against_best_end"]),
        )
        for p in found["points"]
    )
    base = None if found["base"] is None else Interval(found["base"])
    return PathResult(found["a"], found["b"], suite, points, found["barrier"], found["best_t"], found["verdict"], base)
