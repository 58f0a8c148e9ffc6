"""What is tried, as recipes: names as in the paper, settings for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stockpot.evaluation.pool import Task, as_it_is
from stockpot.runs import Run, Snapshot, SoupSpec, recipe_of, resolve_soup
from stockpot.search.options import SweepOptions

__all__ = ["Tried", "comparison_candidates", "single", "soup_candidate"]


@dataclass(frozen=True)
class Tried:
    """One candidate. `settings` say what was chosen (k, interval, by, penalty, method, ...); `weights` by snapshot's step."""

    name: str
    stage: str
    recipe: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[int, float] = field(default_factory=dict)
    bare: bool = False

    def task(self) -> Task:
        return Task(self.name, self.recipe, self.bare)


def soup_candidate(
    run: Run, spec: SoupSpec, stage: str, options: SweepOptions, *, name: str | None = None, **settings: Any
) -> Tried:
    """A soup of the run. Raises ArgumentError where the run is too short for it."""
    soup = resolve_soup(run, spec)
    adapter = options.adapter if options.adapter != "factors" else None
    weights = {i.snapshot.step: i.weight for i in soup.ingredients}
    return Tried(name or soup.name, stage, recipe_of(run, spec, adapter=adapter), settings, weights)


def single(snapshot: Snapshot, name: str, stage: str = "reference") -> Tried:
    """One snapshot as it is."""
    return Tried(name, stage, as_it_is(snapshot.path), {"step": snapshot.step}, {snapshot.step: 1.0})


def comparison_candidates(run: Run, options: SweepOptions) -> Iterator[Tried]:
    """The paper's comparisons: TIES and DARE-TIES over the last k and over every m-th of them, SLERP over the last two,
    each with the first and with the last snapshot as base. Those that the run is too short for are left out.
    """
    regular = run.regular
    windows = [(k, 1) for k in options.comparison_k] + list(options.comparison_spaced)
    for method in ("ties", "dare_ties"):
        for k, every in windows:
            if (k - 1) * every + 1 > len(regular):
                continue
            for end, snapshot in (("first", regular[0]), ("last", regular[-1])):
                name = f"last_{k}{f'_{every}' if every > 1 else ''}_{method}_base_{end}"
                of_run = dict(recipe_of(run, SoupSpec(last=k, every=every))["run"]) | {"base": snapshot.step}
                recipe = {"merge_method": method, "run": of_run, "parameters": {"density": options.density}}
                yield Tried(name, "comparison", recipe, {"method": method, "k": k, "interval": every, "base": end})
    if len(regular) >= 2:
        for end in ("first", "last"):
            recipe = {"merge_method": "slerp", "run": dict(recipe_of(run, SoupSpec(last=2))["run"]) | {"base": end},
                      "parameters": {"t": 0.5}}  # fmt: skip
            yield Tried(
                f"last_2_slerp_base_{end}",
                "comparison",
                recipe,
                {"method": "slerp", "k": 2, "interval": 1, "base": end},
            )
