"""`stockpot diagnose`: what speaks for and against merging some models."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from stockpot.cli.boundary import boundary
from stockpot.cli.options import AsJson, Quiet, Threads

__all__ = ["diagnose"]


@boundary
def diagnose(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    html: Annotated[Optional[str], typer.Option("--html", metavar="FILE", help="Write a page with heatmaps.")] = None,  # noqa: UP045
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure the models of RECIPE before merging: sizes and directions of their changes, conflicts, and which methods fit.

    Every tensor is read once, and nothing is written but the page.
    """
    from stockpot.api.diagnosing import diagnose
    from stockpot.cli.progress import progress_bar
    from stockpot.cli.show_diagnosis import show_diagnosis
    from stockpot.reports.diagnosis import write_page

    if html is not None:
        write_page(html)  # says now what would be missing then
    with progress_bar(enabled=not (quiet or as_json)) as progress:
        found = diagnose(recipe, threads=threads, progress=progress)
    if html is not None:
        write_page(html, found)
    show_diagnosis(found, as_json=as_json, page=html)
