"""The stages of a sweep, each a generator: it yields a batch of candidates and is sent how good every candidate so far is.

What is sent maps names to numbers of which more is better; candidates that could not be scored are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from stockpot.errors import ArgumentError
from stockpot.runs import Run, SoupSpec
from stockpot.runs.weighting import ema_weights, uniform
from stockpot.search.candidates import Tried, comparison_candidates, single, soup_candidate
from stockpot.search.options import SweepOptions

__all__ = ["STAGE_FUNCTIONS", "Stage", "shortlist"]

Goodness = Mapping[str, float]
Stage = Generator[list[Tried], Goodness, None]
Array = np.ndarray[Any, Any]


def shortlist(tried: Sequence[Tried], good: Goodness, keep: int) -> list[Tried]:
    """The best `keep`; of equals the one tried first."""
    return sorted((t for t in tried if t.name in good), key=lambda t: -good[t.name])[:keep]


def uniform_stage(run: Run, options: SweepOptions, tried: list[Tried], notes: list[str]) -> Stage:
    """Uniform soups of the last k."""
    batch = []
    for k in options.k:
        if k > len(run.regular):
            notes.append(f"k = {k} is left out: the run has {len(run.regular)} regular snapshots")
        else:
            batch.append(soup_candidate(run, SoupSpec(last=k), "uniform", options, k=k, interval=1, by="uniform"))
    if not batch:
        raise ArgumentError(f"{run.path}: has {len(run.regular)} regular snapshots, fewer than every k asked for: "
                            f"{', '.join(map(str, options.k))}")  # fmt: skip
    yield batch


def interval_stage(run: Run, options: SweepOptions, tried: list[Tried], notes: list[str]) -> Stage:
    """Every m-th snapshot, for the k that came out best."""
    good = yield []
    batch = []
    for best in shortlist([t for t in tried if t.stage == "uniform"], good, options.keep):
        k = best.settings["k"]
        for m in options.intervals:
            if (k - 1) * m + 1 <= len(run.regular):
                batch.append(
                    soup_candidate(run, SoupSpec(last=k, every=m), "interval", options, k=k, interval=m, by="uniform")
                )
    yield batch


def weights_stage(run: Run, options: SweepOptions, tried: list[Tried], notes: list[str]) -> Stage:
    """Metric weights over penalties, for the best of all so far."""
    good = yield []
    batch = []
    metrics = []
    for metric in options.by:
        if metric not in ("step", "steps") and metric not in run.metrics.series:
            notes.append(
                f"weights by {metric!r} are left out: it was not logged (there are {', '.join(run.metrics.series) or 'none'})"
            )
        else:
            metrics.append(metric)
    for best in shortlist([t for t in tried if t.stage in ("uniform", "interval")], good, options.keep):
        k, m = best.settings["k"], best.settings["interval"]
        for metric in metrics:
            for p in options.penalties:
                smooth = 1 if metric in ("step", "steps") else options.smooth
                spec = SoupSpec(last=k, every=m, by=metric, penalty=p, power=options.power, smooth=smooth)
                try:
                    batch.append(soup_candidate(run, spec, "weights", options, k=k, interval=m, by=metric, penalty=p))
                except ArgumentError as e:
                    notes.append(f"weights by {metric!r} with k = {k} are left out: {e}")
                    break
    yield batch


def schedules_stage(run: Run, options: SweepOptions, tried: list[Tried], notes: list[str]) -> Stage:
    """EMA and the weights that stand for a decaying learning rate, over the most snapshots asked for."""
    k = max((k for k in options.k if k <= len(run.regular)), default=0)
    batch = []
    if k >= 2:
        for d in options.decays:
            spec = SoupSpec(last=k, decay=d)
            batch.append(soup_candidate(run, spec, "schedules", options, k=k, interval=1, by=f"ema {d:g}"))
        batch.append(
            soup_candidate(run, SoupSpec(last=k, scheme="1-sqrt"), "schedules", options, k=k, interval=1, by="1-sqrt")
        )
    yield batch


def comparison_stage(run: Run, options: SweepOptions, tried: list[Tried], notes: list[str]) -> Stage:
    """TIES, DARE-TIES, SLERP."""
    yield list(comparison_candidates(run, options))


def greedy_stage(run: Run, options: SweepOptions, tried: list[Tried], notes: list[str]) -> Stage:
    """Snapshots from best to worst, each kept if the soup with it is better (arXiv 2203.05482; strictly, as its code does)."""
    pool = run.regular[-options.greedy_last :]
    alone = [single(s, f"step_{s.step}", "single") for s in pool]
    good = yield alone
    order = [s for s in alone if s.name in good]
    order.sort(key=lambda t: -good[t.name])
    if not order:
        return
    chosen = [order[0].settings["step"]]
    best = good[order[0].name]
    for number, t in enumerate(order[1:], 2):
        steps = tuple(sorted([*chosen, t.settings["step"]]))
        name = f"greedy_{number}"
        good = yield [
            soup_candidate(
                run,
                SoupSpec(steps=steps),
                "greedy",
                options,
                name=name,
                k=len(steps),
                by="uniform",
                added=t.settings["step"],
            )
        ]
        if good.get(name, -np.inf) > best:
            chosen, best = list(steps), good[name]


def lcsc_stage(run: Run, options: SweepOptions, tried: list[Tried], notes: list[str]) -> Stage:
    """Coefficients of the snapshots found by CMA-ES (arXiv 2404.02241 has its own evolution, unpublished; same objective).

    sum to one: by leaving out the first snapshot's coefficient. The first batch holds EMA weights of several decays, uniform
    weights and the last snapshot, so that the best found is never worse than these on the selection data.
    """
    try:
        import cma
    except ImportError as e:
        raise ArgumentError("stage lcsc needs the cma package: pip install 'stockpot[evaluate]'") from e
    pool = run.regular[-options.lcsc_last :]
    k = len(pool)
    if k < 2:
        notes.append("lcsc is left out: it needs at least two regular snapshots")
        return
    space = _Coefficients(k, options.lcsc_sum, options.lcsc_signs)
    starts = [uniform(k), *(ema_weights(range(k), d) for d in (0.5, 0.7, 0.8, 0.9, 0.95)), [0.0] * (k - 1) + [1.0]]
    steps = [s.step for s in pool]

    def made(alpha: Sequence[float], number: int) -> Tried:
        return _with_coefficients(run, dict(zip(steps, alpha)), f"lcsc_{number:03d}", options)

    first = [made(a, i) for i, a in enumerate(starts[: options.lcsc_evaluations])]
    good = yield first
    count = len(first)
    best = max(range(len(first)), key=lambda i: good.get(first[i].name, -np.inf))
    generator = np.random.default_rng(options.seed)  # of its own: cma would seed the one that belongs to the user
    settings = {"randn": lambda *shape: generator.standard_normal(shape), "seed": np.nan, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy(space.point(starts[best]), 0.1, settings)
    strategy.inject([space.point(a) for a in starts], force=False)
    while count + strategy.popsize <= options.lcsc_evaluations and not strategy.stop():
        points = strategy.ask()
        batch = [made(space.coefficients(x), count + i) for i, x in enumerate(points)]
        good = yield batch
        found = [-good[t.name] if t.name in good else np.nan for t in batch]
        worst = np.nanmax(found) if not np.isnan(found).all() else 1e9
        strategy.tell(points, [worst + abs(worst) + 1.0 if np.isnan(f) else f for f in found])
        count += len(batch)


class _Coefficients:
    """Between points of the search and coefficients of k snapshots."""

    def __init__(self, k: int, total: str, signs: str) -> None:
        self.k, self.total, self.signs = k, total, signs

    def point(self, alpha: Sequence[float]) -> list[float]:
        return list(alpha[1:] if self.total == "one" else alpha)

    def coefficients(self, x: Any) -> list[float]:
        """Rounded, so that equal candidates are recognised; the sum is one to the last digit where it must be."""
        free = np.asarray(x, np.float64)
        alpha: Array = np.concatenate([[1.0 - free.sum()], free]) if self.total == "one" else free
        if self.signs == "positive":
            alpha = _on_simplex(alpha) if self.total == "one" else np.maximum(alpha, 0.0)
        rounded = [round(float(a), 6) for a in alpha]
        if self.total == "one":
            largest = max(range(len(rounded)), key=lambda i: rounded[i])  # so that what is positive stays so
            rounded[largest] = round(1.0 - sum(r for i, r in enumerate(rounded) if i != largest), 6)
        return rounded


def _on_simplex(x: Array) -> Array:
    """The nearest point whose coordinates are at least 0 and sum to one."""
    ordered = np.sort(x)[::-1]
    shift = (np.cumsum(ordered) - 1.0) / np.arange(1, len(x) + 1)
    last = int(np.flatnonzero(ordered - shift > 0)[-1])
    result: Array = np.maximum(x - shift[last], 0.0)
    return result


def _with_coefficients(run: Run, weights: Mapping[int, float], name: str, options: SweepOptions) -> Tried:
    """A linear combination, its sum as it is."""
    models = [{"model": run.at(step).path, "parameters": {"weight": w}} for step, w in weights.items()]
    recipe: dict[str, Any] = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}}
    if options.adapter != "factors":
        recipe["adapter"] = {"mode": options.adapter}
    total = float(np.abs(list(weights.values())).sum())
    return Tried(
        name, "lcsc", recipe, {"k": len(weights), "by": "lcsc", "absolute_sum": round(total, 4)}, dict(weights)
    )


STAGE_FUNCTIONS: dict[str, Callable[[Run, SweepOptions, list[Tried], list[str]], Stage]] = {
    "uniform": uniform_stage,
    "interval": interval_stage,
    "weights": weights_stage,
    "schedules": schedules_stage,
    "comparison": comparison_stage,
    "greedy": greedy_stage,
    "lcsc": lcsc_stage,
}
