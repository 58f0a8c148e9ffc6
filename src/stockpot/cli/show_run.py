"""Runs and soups as text for people or JSON for programs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stockpot.cli.show import print_table, show_merge
from stockpot.cli.terminal import print_json, say, tell
from stockpot.errors import ArgumentError
from stockpot.runs.metrics import known_objective

if TYPE_CHECKING:
    from stockpot.api import MergeResult
    from stockpot.runs import Run, Soup

__all__ = ["show_run", "show_soup", "show_soup_result", "sparkline"]

_BARS = "▁▂▃▄▅▆▇█"
_SPARK = 32


def sparkline(values: Sequence[float], width: int = _SPARK) -> str:
    """Numbers as a line of bars, low to high; means of neighbours where there are more than `width`."""
    if len(values) > width:
        cuts = [len(values) * i // width for i in range(width + 1)]
        values = [_mean(values[a:b]) for a, b in itertools.pairwise(cuts)]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    span = high - low
    return "".join(
        " " if not math.isfinite(v) else _BARS[min(int((v - low) / span * len(_BARS)), len(_BARS) - 1) if span else 0]
        for v in values
    )


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def show_run(run: Run, *, smooth: int, as_json: bool) -> None:
    if smooth < 0:
        raise ArgumentError(f"smooth: expected a whole number of at least 0, got {smooth}")
    smooth = max(smooth, 1)
    for warning in run.warnings:
        tell(f"warning: {warning}")
    if as_json:
        print_json(_as_data(run, smooth))
        return
    kinds = sorted({s.kind for s in run.snapshots})
    what = {"adapter": "adapters", "model": "full models"}
    count = len(run.snapshots)
    say(
        f"{run.path}: {count} snapshot{'s' if count != 1 else ''} ({', '.join(what.get(k, k) for k in kinds)}), "
        f"{run.layout} layout"
    )
    names = run.metrics.names()
    if names:
        say()
        print_table(
            "",
            ("metric", "over the run", "#first", "#last", "#lowest", "#highest", "#values", "better"),
            (
                (
                    n,
                    sparkline([v for _, v in run.metrics.series[n]]),
                    _short(run.metrics.series[n][0][1]),
                    _short(run.metrics.series[n][-1][1]),
                    _extreme(run, n, min),
                    _extreme(run, n, max),
                    len(run.metrics.series[n]),
                    {"min": "low", "max": "high"}.get(known_objective(n) or "", ""),
                )
                for n in names
            ),
        )
    else:
        say("no metrics" + (f" ({run.metrics.source})" if run.metrics.source else " were logged"))
    dull = ("epoch", "learning_rate", "grad_norm")
    telling = [n for n in names if n not in dull and len(run.metrics.series[n]) > 1]
    shown = telling[:6]
    say()
    rows = []
    inexact = False
    for s in run.snapshots:
        cells = []
        for n in shown:
            try:
                found = run.metrics.value_at(n, s.step, smooth)
            except ArgumentError:
                cells.append("")
                continue
            exact = found.rule == f"logged at step {s.step}" or smooth > 1
            inexact = inexact or not exact
            cells.append(_short(found.value) + ("" if exact else "*"))
        rows.append((s.step, *cells, _mark(run, s.step)))
    print_table("", ("#epoch" if run.epochs_as_steps else "#step", *(f"#{n}" for n in shown), ""), rows)
    if len(telling) > len(shown):
        say(f"{len(telling) - len(shown)} more metrics by snapshot: --json")
    if inexact:
        say("* the last value logged before the step")


def _mark(run: Run, step: int) -> str:
    if run.final is not None and run.final.step == step:
        return "final checkpoint"
    if run.last_merging is not None and run.last_merging.step == step:
        return "last merging checkpoint"
    return ""


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.3e}"


def _extreme(run: Run, name: str, pick: Any) -> str:
    finite = [(v, -s) for s, v in run.metrics.series[name] if math.isfinite(v)]
    if not finite:
        return ""
    value, step = pick(finite)
    return f"{_short(value)} at {-step}"


def _as_data(run: Run, smooth: int) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def metrics(step: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name in run.metrics.names():
            try:
                found = run.metrics.value_at(name, step, smooth)
                out[name] = {"value": found.value, "rule": found.rule}
            except ArgumentError as e:
                out[name] = {"value": None, "rule": str(e)}
        return out

    return {
        "path": run.path,
        "layout": run.layout,
        "final": run.final.step if run.final else None,
        "last_merging": run.last_merging.step if run.last_merging else None,
        "snapshots": [
            {"step": s.step, "path": s.path, "kind": s.kind, "final": s.final, "metrics": metrics(s.step)}
            for s in run.snapshots
        ],
        "broken": [{"step": s.step, "path": s.path, "fault": s.fault} for s in run.broken],
        "metrics": {
            name: {
                "objective": known_objective(name),
                "steps": [step for step, _ in points],
                "values": [number(v) for _, v in points],
            }
            for name, points in run.metrics.series.items()
        },
        "warnings": list(run.warnings),
    }


def show_soup(soup: Soup) -> None:
    """The weights, the effective number of snapshots, the name."""
    top = max((abs(i.weight) for i in soup.ingredients), default=1.0) or 1.0
    metric = next((i.metric.metric for i in soup.ingredients if i.metric), None)
    columns = ("#step", *((f"#{metric}", "") if metric else ()), "#weight", "")
    rows = []
    for i in soup.ingredients:
        found = (_short(i.metric.value), i.metric.rule) if i.metric else (() if metric is None else ("", ""))
        rows.append((i.snapshot.step, *found, f"{i.weight:.6f}", "█" * max(round(abs(i.weight) / top * 24), 0)))
    print_table("", columns, rows)
    say(f"{soup.name}: {len(soup.ingredients)} snapshots, {soup.effective_snapshots:.2f} effective (1 / sum of w²)")


def show_soup_result(result: MergeResult, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(
            {
                "path": result.path,
                **(result.soup or {}),
                "adapter": result.adapter,
                "seconds": round(result.seconds, 3),
                "bytes_read": result.bytes_read,
                "bytes_written": result.bytes_written,
                "warnings": list(result.warnings),
                "notes": list(result.notes),
            }
        )
        return
    show_merge(result, as_json=False, quiet=quiet)
    report = result.adapter
    if report and not quiet:
        if report["mode"] == "factors":
            say(
                f"A and B were averaged apart: {report['relative_error']:.2%} from the average of the products B A "
                f"(worst {report['worst_error']:.2%}, {report['worst_module']}); --adapter product is exact"
            )
        elif report.get("rank"):
            say(
                f"products recompressed to rank {report['rank']}: {report['relative_error']:.2%} lost "
                f"(worst {report['worst_error']:.2%}, {report['worst_module']})"
            )
        else:
            say("the products B A were averaged exactly, as stacked factors")
