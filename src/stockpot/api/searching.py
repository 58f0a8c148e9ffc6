"""A sweep as a whole: search, publish the winner, write the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stockpot.api.measuring import SuiteLike, opened_suite
from stockpot.api.merging import Options, merge_planned, plan
from stockpot.api.pages import BEST, published_lineage, write_report
from stockpot.api.release import lineage_of, release_check
from stockpot.errors import ArgumentError, GateError, OutputError
from stockpot.evaluation.gates import Verdict
from stockpot.evaluation.suite import Suite
from stockpot.methods.code import names_file
from stockpot.planning.inputs import located
from stockpot.recipes.parsing import load_recipe
from stockpot.runs import Run, open_run
from stockpot.search import SweepOptions, SweepResult
from stockpot.search.grid import Simplex
from stockpot.search.store import ScoreStore
from stockpot.search.sweep import Shown, SweepJob, run_sweep

__all__ = ["Sweep", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: what it found, the directory of the published winner (None: not published), the report's path."""

    result: SweepResult
    best: str | None
    page: str | None
    verdict: Verdict | None = None
    files: tuple[str, ...] = field(default=(), repr=False)


def sweep(
    run: Run | str | os.PathLike[str] | None, out: str | os.PathLike[str], suite: SuiteLike,
    options: SweepOptions | None = None, *,
    recipe: Any = None, grid: Mapping[str, Sequence[Any] | Simplex] | None = None, base: str | None = None,
    device: str | None = None,
    jobs: int = 1, publish: bool = True, force: bool = False, retry_failed: bool = False, shown: Shown | None = None,
) -> Sweep:  # fmt: skip
    """Search merges of a run's snapshots, or a grid over a recipe, and publish the best as OUT/best with a report.

    out      holds sweep.sqlite (what was scored: a sweep that was stopped goes on), best/, report.html, charts/, leaderboard.csv
    recipe   in place of a run: a recipe (as for merge), with `grid`: values by key (search.parse_grid)
    jobs     candidates scored at once, each by a process with its own model
    publish  merge the winner into OUT/best; where the suite has gates, only if they pass or with `force`

    Raises StockpotError; GateError after the report was written.
    """
    opened = opened_suite(suite, base=base, device=device)
    folder = os.fspath(out)
    found = None if run is None else run if isinstance(run, Run) else open_run(run)
    if found is not None:  # recipes of candidates are used in other processes, and copied from the report
        metrics = None if found.metrics_file is None else os.path.abspath(found.metrics_file)
        found = replace(found, path=os.path.abspath(found.path), metrics_file=metrics)
    if (found is None) == (recipe is None):
        raise ArgumentError("give a run, or a recipe with a grid: one of the two")
    plain = None if recipe is None else _plain_recipe(recipe)
    job = SweepJob(
        opened, folder, found, options or SweepOptions(), plain, grid or {}, jobs=jobs, retry_failed=retry_failed
    )
    result = run_sweep(job, shown)
    verdict: list[Verdict] = []
    best: str | None = None
    refused: GateError | None = None
    if publish and result.winner is not None:
        try:
            best = _publish_winner(result, folder, opened, force=force, told=verdict.append)
        except GateError as e:
            refused = e
    gates = verdict[0].to_dict() if verdict else None
    remember(folder, gates=gates)
    page, files = write_report(folder, result, gates=gates)
    done = Sweep(result, best, page, verdict[0] if verdict else None, files)
    if refused is not None:
        refused.found = done
        raise refused
    return done


def _plain_recipe(recipe: Any) -> dict[str, Any]:
    """A recipe as a mapping whose paths no longer depend on where its file lies."""
    parsed = load_recipe(recipe)
    if parsed.steps:
        raise ArgumentError("recipe: several steps can't be swept; merge the earlier ones first")
    for name in (parsed.merge_method, *(r.merge_method for r in parsed.rules if r.merge_method)):
        if names_file(name):
            raise ArgumentError(
                f"recipe: merge_method {name!r}: a sweep scores in processes of its own, which know methods of installed "
                "packages (entry point stockpot.methods) only"
            )
    plan(parsed)  # every mistake in it, before the grid
    return located(parsed)


def _publish_winner(
    result: SweepResult, folder: str, suite: Suite, *, force: bool, told: Callable[[Verdict], None]
) -> str:
    """Merge the winner into OUT/best, unless the very same merge is there and has no gates to pass."""
    target = os.path.join(folder, BEST)
    assert result.winner is not None
    planned = plan(dict(result.row(result.winner).tried.recipe), Options())
    if not suite.gates and published_lineage(folder, result) and remembered(folder, "published") == planned.identity:
        return target
    if os.path.isdir(target) and os.listdir(target) and not lineage_of(target):
        raise OutputError(
            f"{target}: was not written by stockpot, so it is not replaced; move it away, or choose another OUT"
        )
    check = release_check(suite, force=force, told=told) if suite.gates else None
    merge_planned(planned, target, Options(), overwrite=True, release=check)
    remember(folder, published=planned.identity)
    return target


def remember(folder: str, **facts: Any) -> None:
    """Put facts beside the scores of a sweep."""
    store = ScoreStore(folder)
    try:
        for key, value in facts.items():
            store.set_meta(key, value)
    finally:
        store.close()


def remembered(folder: str, key: str) -> Any:
    """A fact from there; None where it was never put."""
    store = ScoreStore(folder)
    try:
        return store.meta(key)
    finally:
        store.close()
