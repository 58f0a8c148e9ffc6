"""The report as one HTML file that needs no network: scores, charts, recipes, gates, lineage."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from stockpot.errors import visible, visible_json
from stockpot.evaluation.statistics import Difference, Interval
from stockpot.reports.charts import Chart, path_chart, sweep_charts
from stockpot.reports.table import leaderboard_csv, path_csv, recipe_text, settings_text
from stockpot.search.path import PathResult
from stockpot.search.result import Row, SweepResult, label_text

__all__ = ["document", "figures", "notes_section", "path_page", "sweep_page", "table", "text_of", "verdict"]


def sweep_page(
    result: SweepResult, *, path: PathResult | None = None, lineage: Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | None = None, charts: Sequence[Chart] | None = None,
) -> str:  # fmt: skip
    """The page of a sweep. lineage: that of the published winner; gates: a verdict as plain data."""
    drawn = sweep_charts(result, path) if charts is None else charts
    parts = [
        verdict(result.conclusion),
        _comparison(result),
        _leaderboard(result),
        figures(drawn),
        _gates(gates),
        _lineage(lineage),
        notes_section(result.notes),
    ]
    downloads = [("leaderboard.csv", "text/csv", leaderboard_csv(result).encode())]
    downloads += [("path.csv", "text/csv", path_csv(path).encode())] if path is not None else []
    recipes = {r.name: recipe_text(r.tried.recipe) for r in result.rows}
    title = f"Sweep of {result.what}"
    return document(
        title,
        _about(result),
        [p for p in parts if p],
        [*downloads, *((f"{c.name}.png", "image/png", c.png) for c in drawn)],
        recipes,
    )


def path_page(path: PathResult) -> str:
    """The page of an interpolation path by itself."""
    chart = path_chart(path)
    rows = [
        [_number(p.t, "g"), _span(p.score), _number(p.excess, "+.4g"), "yes" if p.accepted else "no"]
        for p in path.points
    ]
    points = table(["t", "score", "over the straight line", "accepted"], rows)
    words = [f"A: {path.a}", f"B: {path.b}", f"Barrier {path.barrier:.4g}: {path.verdict}."]
    body = [verdict(words), figures([chart]), f"<section><h2>Points</h2>{points}</section>"]
    downloads = [("path.csv", "text/csv", path_csv(path).encode()), ("path.png", "image/png", chart.png)]
    return document("Interpolation path", f"{len(path.points)} points, suite {path.suite.name}", body, downloads, {})


def document(
    title: str,
    about: str,
    parts: Sequence[str],
    downloads: Sequence[tuple[str, str, bytes]],
    recipes: Mapping[str, str],
) -> str:
    """A page of these parts, each markup already."""

    def text(name: str) -> str:
        return resources.files("stockpot.reports").joinpath(name).read_text("utf-8")

    links = " · ".join(
        f'<a download="{text_of(name)}" href="data:{kind};base64,{base64.b64encode(data).decode()}">{text_of(name)}</a>'
        for name, kind, data in downloads
    )
    held = visible_json(json.dumps(dict(recipes))).replace("<", "\\u003c")
    script = f"\n{text('page.js')}"
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text_of(title)}</title>
<link rel="icon" href="data:,">
<style>
{text("page.css")}</style>
</head>
<body>
<div class="page">
<a class="skip" href="#main">Skip to the results</a>
<header><h1>{text_of(title)}</h1><button id="theme" type="button">Light or dark</button></header>
<p class="muted">{text_of(about)}</p>
<main id="main">
{"".join(parts)}
<section><h2>Downloads</h2><p>{links}</p></section>
</main>
<p id="said" class="muted" role="status" aria-live="polite"></p>
</div>
<script type="application/json" id="recipes">{held}</script>
<script>{script}</script>
</body>
</html>
"""


def _about(result: SweepResult) -> str:
    scored = sum(r.selection is not None for r in result.rows)
    better = "lower" if result.suite.direction == "min" else "higher"
    slices = ", ".join(f"{s.name} ({s.metric}, weight {s.weight:g})" for s in result.suite.slices)
    failed = len(result.rows) - scored
    return f"Suite {result.suite.name}: {slices}; {better} is better. {scored} candidates scored" + (
        f", {failed} failed." if failed else "."
    )


def verdict(lines: Iterable[str]) -> str:
    """What a page says first."""
    said = "".join(f"<p>{text_of(line)}</p>" for line in lines)
    return f'<section class="verdict" aria-label="Conclusion">{said}</section>'


def _comparison(result: SweepResult) -> str:
    """The winner on the report split."""
    if not result.final_comparison or result.winner is None:
        return ""
    rows = []
    for label, d in result.final_comparison.items():
        rows.append(
            [
                text_of(label_text(label)),
                _number(d.value, "+.4g"),
                _difference(d),
                f'<span class="{text_of(d.verdict)}">{_words(d)}</span>',
                str(d.n),
            ]
        )
    compared = table(["against", "difference", "95 % interval", "verdict", "examples"], rows)
    return (
        f"<section><h2>{text_of(result.winner)} on the report data</h2>"
        f'<p class="muted">Data that nothing was chosen by. Paired bootstrap; above 0 means that the merge is better.</p>{compared}</section>'
    )


def _words(d: Difference) -> str:
    return {"noise": "within noise", "unknown": "not known"}.get(d.verdict, d.verdict)


def _leaderboard(result: SweepResult) -> str:
    labels = [label for label in ("final", "last_merging", "uniform") if any(label in r.against for r in result.rows)]
    slices = [s.name for s in result.suite.slices]
    several = len(slices) > 1
    heads = ["#", "name", "", "stage", "score", "95 % interval", *(slices if several else [])]
    heads += [f"minus {label.replace('_', ' ')}" for label in labels] + ["report score", "settings"]
    rows = []
    for rank, r in enumerate(result.leaderboard(), 1):
        cells = [
            _cell(str(rank), rank),
            f"<td>{text_of(r.name)}{' ★' if r.name == result.winner else ''}</td>",
            f'<td><button type="button" data-copy="{text_of(r.name)}" aria-label="Copy the recipe of {text_of(r.name)}">Copy recipe</button></td>',
            f"<td>{text_of(r.tried.stage)}</td>",
        ]
        score = r.selection
        cells += [
            _cell(_number(score.value), score.value) if score else _cell("failed", None),
            f"<td>{_interval(score)}</td>",
        ]
        if several:
            cells += [_cell(_number(r.metrics[s]), r.metrics[s]) if s in r.metrics else _cell("", None) for s in slices]
        for label in labels:
            d = r.against.get(label)
            cells.append(
                _cell(f'<span class="{text_of(d.verdict)}">{_number(d.value, "+.4g")}</span>', d.value)
                if d
                else _cell("", None)
            )
        cells.append(_cell(_number(r.report.value), r.report.value) if r.report else _cell("", None))
        cells.append(f'<td class="wrap">{_settings(r)}</td>')
        kind = "winner" if r.name == result.winner else "reference" if r.is_reference else ""
        rows.append(f'<tr class="{kind}" data-stage="{text_of(r.tried.stage)}">{"".join(cells)}</tr>')
    stages = "".join(f"<option>{text_of(s)}</option>" for s in dict.fromkeys(r.tried.stage for r in result.rows))
    head = "".join(
        f'<th scope="col"><button type="button">{text_of(h)}</button></th>' if h else '<th scope="col">recipe</th>'
        for h in heads
    )
    return f"""<section><h2>Leaderboard</h2>
<p class="muted">Selection data: what was chosen by. Differences are paired, more is better; coloured where the 95 % interval leaves 0 out.</p>
<div class="tools"><input id="filter" type="search" placeholder="Filter: words of a name or setting" aria-label="Filter candidates">
<select id="stage" aria-label="Stage"><option value="">every stage</option>{stages}</select><span id="count" class="muted">{len(rows)} of {len(rows)}</span></div>
<div class="scroll" tabindex="0" role="region" aria-label="Leaderboard"><table id="leaderboard" class="sortable"><thead><tr>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div></section>"""


def _settings(r: Row) -> str:
    error = f'<br><span class="fail">{text_of(r.error)}</span>' if r.error else ""
    recipe = f"<details><summary>Recipe</summary><pre>{text_of(recipe_text(r.tried.recipe))}</pre></details>"
    return f"{text_of(settings_text(r))}{error}{recipe}"


def figures(charts: Sequence[Chart]) -> str:
    """The section of charts."""
    drawn = "".join(
        f'<figure id="chart-{text_of(c.name)}"><h3>{text_of(c.title)}</h3><div class="drawing" tabindex="0" role="group" aria-label="{text_of(c.title)}">'
        f"{c.svg}</div><figcaption>{text_of(c.caption)}</figcaption></figure>"
        for c in charts
    )
    return f'<section><h2>Charts</h2><div class="charts">{drawn}</div></section>' if drawn else ""


def _gates(verdict: Mapping[str, Any] | None) -> str:
    if not verdict or not verdict.get("gates"):
        return ""
    rows = [
        [
            text_of(g["gate"]),
            text_of(g["severity"]),
            f'<span class="{text_of(g["status"])}">{text_of(g["status"])}</span>',
            text_of(g["why"]),
        ]
        for g in verdict["gates"]
    ]
    word = "passed" if verdict["passed"] else "not passed" + (", published by force" if verdict.get("forced") else "")
    return (
        f"<section><h2>Release gates: {word}</h2>{table(['gate', 'severity', 'status', 'why'], rows, wrap=3)}</section>"
    )


def _lineage(lineage: Mapping[str, Any] | None) -> str:
    if not lineage:
        return ""
    inputs = "".join(f"<li>{text_of(str(i.get('path')))}</li>" for i in lineage.get("inputs", ()))
    files = ", ".join(f"{f['name']} {f['digest'][:16]}…" for f in lineage.get("output", {}).get("files", ()))
    packages = ", ".join(f"{k} {v}" for k, v in lineage.get("packages", {}).items())
    facts = {"created": lineage.get("created"), "recipe (SHA-256)": lineage.get("recipe", {}).get("sha256"), "files": files,
             "made with": packages, "on": lineage.get("platform")}  # fmt: skip
    rows = "".join(f"<dt>{text_of(k)}</dt><dd>{text_of(str(v))}</dd>" for k, v in facts.items() if v)
    return f"<section><h2>Lineage of the published merge</h2><dl>{rows}</dl><details><summary>Inputs</summary><ul>{inputs}</ul></details></section>"


def notes_section(notes: Sequence[str]) -> str:
    return (
        f"<section><h2>Notes</h2><ul>{''.join(f'<li>{text_of(n)}</li>' for n in notes)}</ul></section>" if notes else ""
    )


def text_of(value: object) -> str:
    """Anybody's text, as a page may hold it: what is markup in it, or can't be seen, is written out."""
    return escape(visible(str(value)))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], wrap: int | None = None) -> str:
    """Cells are markup; those of column `wrap` may break into lines."""
    head = "".join(f'<th scope="col">{text_of(h)}</th>' for h in heads)
    body = "".join(
        "<tr>" + "".join(f"<td{' class=wrap' if i == wrap else ''}>{c}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text_of(heads[0])}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str, value: float | None) -> str:
    return f'<td class="number" data-value="{"" if value is None else value}">{text}</td>'


def _number(value: float, form: str = ".5g") -> str:
    return f"{value:{form}}"


def _interval(i: Interval | None) -> str:
    return "" if i is None or i.low is None or i.high is None else f"{i.low:.5g} to {i.high:.5g}"


def _span(i: Interval) -> str:
    known = _interval(i)
    return f"{i.value:.5g}" + (f" ({known})" if known else "")


def _difference(d: Difference) -> str:
    return "not known" if d.low is None or d.high is None else f"{d.low:+.4g} to {d.high:+.4g}"
