"""Soups of a training run, and the windows of LAWA."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stockpot.api.merging import MergeResult, Options, merge_planned, plan
from stockpot.errors import ArgumentError
from stockpot.files import is_url, read_json
from stockpot.runs import Run, Soup, SoupSpec, open_run, recipe_of

if TYPE_CHECKING:
    from stockpot.engine.run import Progress

__all__ = ["check_windows", "soup", "soup_recipe", "window_done", "window_recipe"]


def soup_recipe(
    run: Run | str | os.PathLike[str],
    spec: SoupSpec | None = None,
    *,
    adapter: str | None = None,
    rank: int | None = None,
    base: str | os.PathLike[str] | None = None,
    part: str | None = None,
) -> dict[str, Any]:
    """The recipe of a soup, as a mapping: what `soup` merges, and a start for one of another method."""
    opened = run if isinstance(run, Run) else open_run(run)
    return recipe_of(opened, spec or SoupSpec(), adapter=adapter, rank=rank, base=base, part=part)


def soup(
    run: Run | str | os.PathLike[str],
    out: str | os.PathLike[str],
    spec: SoupSpec | None = None,
    *,
    adapter: str | None = None,
    rank: int | None = None,
    base: str | os.PathLike[str] | None = None,
    part: str | None = None,
    options: Options | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Average snapshots of a training run into the directory `out`; spec says which and how (runs.SoupSpec).

    run      a directory, or what open_run gave
    adapter  how LoRA adapters are averaged: "factors" (A and B apart, the default, as in arXiv 2504.18580), "product"
             (exactly: stacked factors, or recompressed to `rank`), "fused" (written into `base`, by default the model
             that adapter_config.json names)
    part     of snapshots that hold several state dicts or models: which one

    Returns a MergeResult with `soup` and `adapter`. Raises StockpotError; nothing is then left at `out`.
    """
    opened = run if isinstance(run, Run) else open_run(run)
    recipe = soup_recipe(opened, spec, adapter=adapter, rank=rank, base=base, part=part)
    planned = plan(recipe, options, run=opened)
    return merge_planned(planned, out, options or Options(), overwrite=overwrite, progress=progress)


def window_recipe(run: Run, made: Soup, **adapter: Any) -> dict[str, Any]:
    """The recipe of one window of LAWA: its snapshots by step, equally weighted. adapter: as for soup_recipe."""
    steps = tuple(i.snapshot.step for i in made.ingredients)
    return soup_recipe(run, SoupSpec(steps=steps), **adapter)


def window_done(out: str, step: int, made: Soup) -> bool:
    """Whether the soup of a window stands complete where it belongs."""
    from stockpot.engine.outdir import LINEAGE
    from stockpot.engine.publish import tidy

    tidy(os.path.join(out, f"checkpoint-{step}"))
    path = os.path.join(out, f"checkpoint-{step}", LINEAGE)
    return os.path.isfile(path) and read_json(path).get("soup") == made.to_dict()


def check_windows(run: Run, windows: Sequence[tuple[int, Soup]], out: str, *, overwrite: bool) -> None:
    """Whether every window's directory can be made, before the first is. Raises OutputError."""
    from stockpot.engine.outdir import check_out

    if is_url(out):
        raise ArgumentError(f"{out}: the windows of LAWA go to a directory on this machine; upload them from there")
    paths = [s.path for s in run.snapshots]
    for step, _ in windows:
        check_out(os.path.join(out, f"checkpoint-{step}"), overwrite=overwrite, inputs=paths)
