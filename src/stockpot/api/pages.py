"""The report of a sweep as files, and interpolation paths."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stockpot.api.measuring import ScoringShown, SuiteLike, opened_suite
from stockpot.api.release import lineage_of
from stockpot.errors import ArgumentError, CheckpointError, OutputError, StockpotError
from stockpot.evaluation.parts import open_parts
from stockpot.evaluation.suite import parse_suite
from stockpot.files import read_json, replace_file
from stockpot.recipes.parsing import load_recipe
from stockpot.runs import open_run
from stockpot.search import PathResult, SweepResult, interpolation_path
from stockpot.search.path import path_from_dict
from stockpot.search.store import NAME as STORE
from stockpot.search.store import ScoreStore
from stockpot.search.sweep import read_sweep

if TYPE_CHECKING:
    from stockpot.reports.charts import Chart

__all__ = ["BEST", "path", "published_lineage", "report", "write_report"]

BEST, PAGE, CHARTS, LEADERBOARD, PATH = "best", "report.html", "charts", "leaderboard.csv", "path.json"


def path(
    a: str | os.PathLike[str], b: str | os.PathLike[str], suite: SuiteLike, *, base: str | None = None, points: int = 11,
    out: str | os.PathLike[str] | None = None, device: str | None = None, shown: ScoringShown | None = None,
) -> PathResult:  # fmt: skip
    """Score the straight line from A to B: whether merging them can work (linear mode connectivity).

    base  for full models a reference that is scored beside; for adapters the model they are loaded onto
    out   a directory for path.json, path.csv, path.png and path.html; that of a sweep takes the path into its report
    """
    from stockpot.checkpoints.opening import open_checkpoint

    first = os.fspath(a)
    adapter = open_checkpoint(first).kind == "adapter"
    opened = opened_suite(suite, base=base if adapter else None, device=device)
    open_parts(opened, light=True)
    found = interpolation_path(
        _full(first), _full(os.fspath(b)), opened, base=None if adapter else base, points=points, shown=shown
    )
    if out is not None:
        _write_path(os.fspath(out), found)
    return found


def _full(ref: str) -> str:
    return os.path.abspath(ref) if os.path.exists(ref) else ref


def _write_path(out: str, found: PathResult) -> None:
    from stockpot.reports.charts import path_chart
    from stockpot.reports.page import path_page
    from stockpot.reports.table import path_csv

    chart = path_chart(found)
    with _writing(out):
        os.makedirs(out, exist_ok=True)
        replace_file(os.path.join(out, PATH), json.dumps(found.to_dict(), indent=1))
        replace_file(os.path.join(out, "path.csv"), path_csv(found))
        replace_file(os.path.join(out, "path.png"), chart.png)
        if not os.path.exists(os.path.join(out, STORE)):
            replace_file(os.path.join(out, "path.html"), path_page(found))
    if os.path.exists(os.path.join(out, STORE)):
        report(out)


def report(out: str | os.PathLike[str]) -> str:
    """Write the report of a sweep again, from what it stored. Returns the page's path."""
    folder = os.fspath(out)
    if not os.path.isfile(os.path.join(folder, STORE)):
        raise ArgumentError(f"{folder}: no sweep here ({STORE} is missing)")
    store = ScoreStore(folder)
    try:
        kept, place, gates = store.meta("suite"), store.meta("run"), store.meta("gates")
    finally:
        store.close()
    try:
        return _report(folder, kept, place, gates)
    except _ODD as e:
        if isinstance(e, StockpotError):
            raise
        raise ArgumentError(
            f"{os.path.join(folder, STORE)}: holds what this version of stockpot does not store ({type(e).__name__}: {e}); run "
            "the sweep again, or report with the version that made it"
        ) from e


#: what comes of taking data of other types, or of another version, for one's own
_ODD = (
    AttributeError, EOFError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _report(folder: str, kept: Any, place: Any, gates: Any) -> str:
    suite = parse_suite(kept["text"], kept["path"])
    run = None
    if place is not None:
        with contextlib.suppress(CheckpointError):  # the run may be gone: only its curves are missed
            run = open_run(place[0], snapshots=place[1], metrics=place[2])
    result = read_sweep(folder, suite, run)
    return write_report(folder, result, gates=gates)[0]


def write_report(
    folder: str, result: SweepResult, *, gates: Mapping[str, Any] | None = None
) -> tuple[str, tuple[str, ...]]:
    """The page, the charts as PNG and the leaderboard as CSV. (the page's path, every file)."""
    from stockpot.reports.charts import sweep_charts
    from stockpot.reports.page import sweep_page
    from stockpot.reports.table import leaderboard_csv

    along = None
    kept = os.path.join(folder, PATH)
    if os.path.isfile(kept):
        try:
            along = path_from_dict(read_json(kept), result.suite)
        except _ODD as e:
            note = f"{kept}: is left out, for it is no path that this version of stockpot wrote ({e})"
            result = replace(result, notes=(*result.notes, note))
    charts: list[Chart] = sweep_charts(result, along)
    lineage = published_lineage(folder, result)
    page = os.path.join(folder, PAGE)
    files = [page, os.path.join(folder, LEADERBOARD)]
    with _writing(folder):
        replace_file(files[1], leaderboard_csv(result))
        os.makedirs(os.path.join(folder, CHARTS), exist_ok=True)
        for chart in charts:
            files.append(os.path.join(folder, CHARTS, f"{chart.name}.png"))
            replace_file(files[-1], chart.png)
        replace_file(page, sweep_page(result, path=along, lineage=lineage, gates=gates, charts=charts))
    return page, tuple(files)


def published_lineage(folder: str, result: SweepResult) -> dict[str, Any] | None:
    """The lineage of OUT/best where it is the winner, not one of an earlier sweep."""
    place = os.path.join(folder, BEST)
    found = lineage_of(place) if os.path.isdir(place) else {}
    if result.winner is None or not found:
        return None
    own = load_recipe(result.row(result.winner).tried.recipe).digest
    return found if found.get("recipe", {}).get("sha256") == own else None


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(f"{folder}: the report can't be written: {e.strerror or e}; what was scored is kept") from e
