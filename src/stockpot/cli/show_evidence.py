"""Scores, leaderboards, verdicts and paths as text."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.table import Table

from stockpot.api import Evaluation, Sweep
from stockpot.cli.terminal import add_row, console, print_json, say
from stockpot.errors import visible
from stockpot.evaluation.aggregate import Aggregate
from stockpot.evaluation.gates import Verdict
from stockpot.evaluation.statistics import Interval
from stockpot.search.path import PathResult
from stockpot.search.result import Row

__all__ = ["show_aggregate", "show_evaluation", "show_path", "show_sweep", "show_verdict"]

_SHOWN = 12


def _table(*heads: str, title: str | None = None) -> Table:
    table = Table(
        title=visible(title or "", line=True) or None,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for head in heads:
        words = head in (
            "name",
            "slice",
            "split",
            "stage",
            "settings",
            "gate",
            "why",
            "status",
            "severity",
            "accepted",
            "95 % interval",
        )
        table.add_column(head, justify="left" if words else "right", overflow="fold")
    return table


def show_evaluation(found: Evaluation, *, as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict())
        return
    table = _table("slice", "split", "metric", "value", "examples", "seconds")
    for (name, split), scores in found.scores.items():
        metric = found.suite.slice(name).metric
        for key in [metric, *(k for k in scores if k != metric and "," not in k)]:
            about = (name, split, str(scores.n or "?"), f"{scores.seconds:.1f}") if key == metric else ("", "", "", "")
            add_row(table, about[0], about[1], key, f"{scores[key]:.5g}", about[2], about[3])
    console(140).print(table)
    if found.score is not None:
        better = "lower" if found.suite.direction == "min" else "higher"
        say(f"score {_span(found.score)} ({better} is better)")


def _span(i: Interval) -> str:
    return f"{i.value:.5g}" + (
        f", 95 % interval {i.low:.5g} to {i.high:.5g}" if i.low is not None and i.high is not None else ""
    )


def show_aggregate(rows: Sequence[Aggregate], *, as_json: bool) -> None:
    if as_json:
        print_json([{"name": r.name, "score": r.score, "percent": dict(r.percent)} for r in rows])
        return
    references = list(rows[0].percent) if rows else []
    table = _table("name", "average", *(f"% vs {r}" for r in references))
    for r in rows:
        add_row(table, r.name, f"{r.score:.5f}", *(f"{r.percent[x]:+.2f}" for x in references))
    console(140).print(table)


def show_sweep(found: Sweep, *, as_json: bool, quiet: bool) -> None:
    result = found.result
    if as_json:
        print_json(
            result.to_dict()
            | {"best": found.best, "report": found.page, "gates": found.verdict and found.verdict.to_dict()}
        )
        return
    if quiet:
        return
    board = result.leaderboard()
    shown = board[:_SHOWN] + [r for r in board[_SHOWN:] if r.is_reference and r.tried.stage == "reference"]
    labels = [label for label in ("final", "last_merging", "uniform") if any(label in r.against for r in board)]
    better = "lower" if result.suite.direction == "min" else "higher"
    table = _table("#", "name", "stage", "score", *(f"minus {x.replace('_', ' ')}" for x in labels), "report score",
                   title=f"{result.suite.name}: {better} is better; differences are signed so that more is better")  # fmt: skip
    for r in shown:
        add_row(table, *_row(r, board.index(r) + 1, labels, winner=r.name == result.winner))
    console(140).print(table)
    if len(board) > len(shown):
        say(f"... {len(board) - len(shown)} more in leaderboard.csv")
    failed = [r for r in board if r.error]
    for r in failed[:5]:
        say(f"failed: {r.name}: {r.error}")
    say()
    for line in result.conclusion:
        say(line)
    for note in result.notes:
        say(f"note: {note}")
    say(f"{result.evaluations} evaluations, {result.reused} known before")
    if found.verdict is not None:
        show_verdict(found.verdict, as_json=False, quiet=False)
    if found.best is not None:
        say(f"published: {found.best}")
    say(f"report: {os.path.abspath(found.page)}" if found.page else "")


def _row(r: Row, rank: int, labels: Sequence[str], *, winner: bool) -> list[str]:
    cells = [
        str(rank),
        r.name + (" *" if winner else ""),
        r.tried.stage,
        "failed" if r.selection is None else f"{r.selection.value:.5g}",
    ]
    for label in labels:
        d = r.against.get(label)
        cells.append("" if d is None else f"{d.value:+.4f}{ {'noise': ' ~', 'unknown': ' ?'}.get(d.verdict, '') }")
    return [*cells, "" if r.report is None else f"{r.report.value:.5g}"]


def show_verdict(verdict: Verdict, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(verdict.to_dict())
        return
    if quiet:
        return
    table = _table("gate", "severity", "status", "why")
    for o in verdict.outcomes:
        add_row(table, o.gate.describe(), o.gate.severity, o.status, o.why)
    console(140).print(table)
    warned = sum(o.status != "pass" and o.gate.severity == "warning" for o in verdict.outcomes)
    say(("gates passed" if verdict.passed else "gates not passed") + (f", {warned} with a warning" if warned else ""))


def show_path(found: PathResult, out: str | None, *, as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict())
        return
    table = _table("t", "score", "95 % interval", "over the line", "accepted")
    for p in found.points:
        span = "" if p.score.low is None or p.score.high is None else f"{p.score.low:.5g} to {p.score.high:.5g}"
        add_row(table, f"{p.t:.3g}", f"{p.score.value:.5g}", span, f"{p.excess:+.4g}", "yes" if p.accepted else "no")
    console(140).print(table)
    if found.base is not None:
        say(f"base: {_span(found.base)}")
    say(f"{found.verdict[:1].upper()}{found.verdict[1:]}.")
    if out is not None:
        say(f"written: {os.path.abspath(out)}")
