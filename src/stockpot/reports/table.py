"""The leaderboard as rows of text: for the terminal, for CSV, for the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

import yaml

from stockpot.search.path import PathResult
from stockpot.search.result import Row, SweepResult

__all__ = ["leaderboard_csv", "path_csv", "recipe_text", "settings_text"]

_FIELDS = ("k", "interval", "by", "penalty", "method", "base", "step")


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML, to copy into a file."""
    return str(yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True, width=120))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def settings_text(row: Row) -> str:
    """`k 10, by loss, penalty 0.7`."""
    settings = row.tried.settings
    known = [f for f in _FIELDS if f in settings and not (f == "interval" and settings[f] == 1)]
    rest = [f for f in settings if f not in _FIELDS]
    return ", ".join(f"{f} {settings[f]}" for f in (*known, *rest))


def leaderboard_csv(result: SweepResult) -> str:
    """Every candidate with its scores, intervals and differences."""
    labels = sorted({label for r in result.rows for label in r.against})
    slices = [s.name for s in result.suite.slices]
    head = ["rank", "name", "stage", *_FIELDS, "score", "low", "high", *(f"slice:{s}" for s in slices)]
    for label in labels:
        head += [f"minus_{label}", f"minus_{label}_low", f"minus_{label}_high", f"minus_{label}_verdict"]
    head += ["report_score", "report_low", "report_high", "seconds_made", "seconds_scored", "digest", "error"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for rank, row in enumerate(result.leaderboard(), 1):
        score, report = row.selection, row.report
        cells: list[Any] = [rank, row.name, row.tried.stage, *(row.tried.settings.get(f, "") for f in _FIELDS)]
        cells += [score.value, score.low, score.high] if score else ["", "", ""]
        cells += [row.metrics.get(s, "") for s in slices]
        for label in labels:
            d = row.against.get(label)
            cells += [d.value, d.low, d.high, d.verdict] if d else ["", "", "", ""]
        cells += [report.value, report.low, report.high] if report else ["", "", ""]
        writer.writerow([*cells, row.seconds_made, row.seconds_scored, row.digest, row.error])
    return out.getvalue()


def path_csv(path: PathResult) -> str:
    """One row for each point of an interpolation path."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [s.name for s in path.suite.slices]
    writer.writerow(["t", "score", "low", "high", "excess", "accepted", *names])
    for p in path.points:
        writer.writerow(
            [
                p.t,
                p.score.value,
                p.score.low,
                p.score.high,
                p.excess,
                p.accepted,
                *(p.metrics.get(n, "") for n in names),
            ]
        )
    return out.getvalue()
