"""`stockpot masks`: one multi-task checkpoint with a bit for every weight and task, and each task's model back from it."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from stockpot.cli.boundary import boundary
from stockpot.cli.groups import grouped
from stockpot.cli.options import Engine, Shown

__all__ = ["masks"]


@boundary
@grouped
def masks(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|restore", help="A recipe, a YAML file; or the word restore.")
    ],
    out: Annotated[str, typer.Argument(help="Directory to create; with restore: what `stockpot masks` wrote.")],
    engine: Engine,
    shown: Shown,
    task: Annotated[Optional[str], typer.Argument(help="With restore: the task.")] = None,  # noqa: UP045
    dest: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="With restore: directory to create [default: OUT-TASK]."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="An element is a task's own beyond this many times what the others change.")
    ] = 0.4,
    base: Annotated[Optional[str], typer.Option(help="With restore: where the base lies now.")] = None,  # noqa: UP045
) -> None:
    """Merge as RECIPE says and keep a mask for each of its models, from which `stockpot masks restore OUT TASK` gives it back.

    Published as TALL masks (arXiv:2405.07813); with merge_method emr as EMR-Merging (arXiv:2405.17461).
    """
    from dataclasses import asdict

    from stockpot.api.multitask import make_masks, restore_task
    from stockpot.cli.progress import progress_bar
    from stockpot.cli.show import show_merge
    from stockpot.cli.terminal import print_json, say
    from stockpot.errors import ArgumentError
    from stockpot.specs import format_size

    options = engine.options()
    if recipe == "restore":
        if task is None:
            raise ArgumentError("stockpot masks restore OUT TASK: name the task")
        with progress_bar(enabled=shown.talks) as progress:
            result = restore_task(
                out,
                task,
                dest or f"{out.rstrip('/')}-{task}",
                options,
                base=base,
                overwrite=engine.overwrite,
                progress=progress,
            )
        show_merge(result, as_json=shown.as_json, quiet=shown.quiet)
        return
    if task is not None or base is not None or engine.overwrite:
        raise ArgumentError(
            "stockpot masks RECIPE OUT takes no task, no --base and no --overwrite; they go with `stockpot masks restore`"
        )
    with progress_bar(enabled=shown.talks) as progress:
        report = make_masks(recipe, out, options, threshold=threshold, progress=progress)
    if shown.as_json:
        print_json({**asdict(report), "bytes": report.bytes})
    elif not shown.quiet:
        for t in report.tasks:
            within = f"comes back within {t.error:.3g} of its task vector's norm"
            say(f"{t.name}: {t.kept:.1%} of the bits set; {within}; {format_size(t.bytes)}")
        whole = report.experts_bytes + report.base_bytes
        say(
            f"{report.path}: {format_size(report.bytes)} with the base; {len(report.tasks)} experts and the base take "
            f"{format_size(whole)} ({1 - report.bytes / whole:.0%} saved)"
        )
