"""The charts of a report, drawn by matplotlib: as SVG that takes the page's colours, and as PNG. Only this file imports it."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from stockpot.errors import ArgumentError, visible
from stockpot.search.path import PathResult
from stockpot.search.result import Row, SweepResult

__all__ = ["Chart", "heatmap", "path_chart", "require_charts", "sweep_charts"]

#: drawn in these, which the page replaces by its own (light and dark)
_COLOURS = {"#1b1f24": "--text", "#6e7781": "--muted", "#d0d7de": "--line", "#0969da": "--c1", "#bc4c00": "--c2",
            "#1a7f37": "--c3", "#8250df": "--c4", "#cf222e": "--c5", "#9a6700": "--c6"}  # fmt: skip
_TEXT, _MUTED, _LINE = list(_COLOURS)[:3]
_SERIES = list(_COLOURS)[3:]
_PER_STAGE = 8
_MOST_ROWS = 64


@dataclass(frozen=True)
class Chart:
    """One picture with its words. `svg` is inline markup, `png` bytes."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as e:
        raise ArgumentError("charts and the HTML report need matplotlib: pip install 'stockpot[evaluate]'") from e
    matplotlib.use("Agg")
    return matplotlib


def require_charts() -> None:
    """Raises ArgumentError where charts could not be drawn."""
    _matplotlib()


def heatmap(
    name: str, title: str, caption: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]],
    span: tuple[float, float] | None = None,
) -> Chart:  # fmt: skip
    """A table as colours, with its numbers in it. span: the values that the palest and the fullest colour stand for."""
    order = range(len(rows))
    if len(rows) > _MOST_ROWS:  # the fullest, in their order
        weight = {i: max((abs(v) for v in values[i] if v is not None), default=0.0) for i in order}
        order = sorted(sorted(order, key=lambda i: -weight[i])[:_MOST_ROWS])  # type: ignore[assignment]
        caption = f"{caption} The {_MOST_ROWS} largest of {len(rows)} rows."
    shown = [(rows[i], values[i]) for i in order]
    known = [abs(v) for _, line in shown for v in line if v is not None and math.isfinite(v)]
    top = max(map(abs, span)) if span else max(known, default=0.0) or 1.0

    def fill(figure: Any, data: Any) -> bool:
        figure.set_size_inches(max(3.0, 1.6 + 0.8 * len(columns)), 0.9 + 0.24 * len(shown))
        ax = figure.add_subplot()
        for i, (_, line) in enumerate(shown):
            for j, v in enumerate(line):
                if v is not None and math.isfinite(v):
                    ax.add_patch(_square(j, i, min(abs(v) / top, 1.0), _SERIES[0] if v >= 0 else _SERIES[4]))
                text = "-" if v is None else f"{v:.2f}" if abs(v) >= 0.1 or v == 0 else f"{v:.2g}"
                ax.text(j, i, text, ha="center", va="center", fontsize=7, color=_TEXT)
        ax.set_xlim(-0.5, len(columns) - 0.5)
        ax.set_ylim(len(shown) - 0.5, -0.5)
        turned = len(columns) > 1
        ax.set_xticks(
            range(len(columns)), columns, rotation=30 * turned, ha="right" if turned else "center", fontsize=8
        )
        ax.set_yticks(range(len(shown)), [label for label, _ in shown], fontsize=8)
        return True

    made = _draw(name, title, caption, None, fill)
    assert made is not None
    return made


def sweep_charts(result: SweepResult, path: PathResult | None = None) -> list[Chart]:
    """Every chart that there is something to show in."""
    drawn: list[Chart | None] = [
        _draw("scores", "Scores by stage", _scores_caption(result), result, _scores),
        _draw(
            "differences", "Compared with the final checkpoint",
            "Paired differences on the selection data with 95 % intervals: right of the line is better.", result, _differences,
        ),
        _draw("weights", "Weights of the snapshots", "Of the best candidates, by training step.", result, _weights),
        _draw("k", "Score against k", "Uniform soups of the last k snapshots.", result, _by_k),
        _draw("interval", "Score against the interval", "Uniform soups of every m-th snapshot.", result, _by_interval),
        _draw("penalty", "Score against the penalty", "Metrics-weighted averages: a line for each choice of snapshots and "
              "metric.", result, _by_penalty),
        _draw("search", "Search by CMA-ES", "The best score so far over the evaluations of lcsc.", result, _by_evaluation),
        _draw("curves", "What training logged", "The run's own metrics over its steps.", result, _curves),
    ]  # fmt: skip
    if path is not None:
        drawn.append(path_chart(path))
    return [c for c in drawn if c is not None]


def path_chart(path: PathResult) -> Chart:
    """The score along the line from A to B."""
    made = _draw("path", "Interpolation path", f"{path.verdict[:1].upper()}{path.verdict[1:]}.", path, _path)
    assert made is not None
    return made


def _scores_caption(result: SweepResult) -> str:
    better = "lower" if result.suite.direction == "min" else "higher"
    return f"Selection data, {better} is better; whiskers: 95 % intervals of the score; dashed: the final checkpoint."


def _draw(name: str, title: str, caption: str, data: Any, draw: Callable[..., bool]) -> Chart | None:
    """One figure. None where `draw` says that there is nothing in it."""
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": _TEXT, "axes.labelcolor": _MUTED,
        "axes.edgecolor": _LINE, "xtick.color": _MUTED, "ytick.color": _MUTED, "axes.spines.top": False, "svg.hashsalt": name,
        "axes.spines.right": False, "axes.grid": False, "figure.facecolor": "none", "axes.facecolor": "none",
        "legend.frameon": False, "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        if not draw(figure, data):
            return None
        vector, pixels = io.StringIO(), io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # of a name that no font has
            figure.savefig(vector, format="svg", metadata={"Date": None})
            figure.savefig(pixels, format="png", dpi=160, facecolor="white")
    return Chart(name, title, caption, _inline(vector.getvalue(), name, title), pixels.getvalue())


def _inline(svg: str, name: str, title: str) -> str:
    """SVG markup for a page: its colours as variables, its ids made its own, a title for those who can't see it."""
    svg = visible(svg[svg.index("<svg") :])
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{escape(title)}">',
        svg,
        count=1,
    )
    return re.sub(r"font: ([\d.]+)px [^;\"]+", r"font: \1px system-ui, sans-serif", svg)


def _bars(value: Sequence[float], row_low: Sequence[float | None], row_high: Sequence[float | None]) -> Any:
    """Lengths of error bars below and above; none where an interval is not known."""
    low = [0.0 if a is None else max(v - a, 0.0) for v, a in zip(value, row_low)]
    high = [0.0 if b is None else max(b - v, 0.0) for v, b in zip(value, row_high)]
    return [low, high]


def _by_stage(result: SweepResult) -> list[tuple[str, list[Row]]]:
    """The best of each stage, stages in the order in which they ran. The base is far off: it would flatten the rest."""
    board = [r for r in result.leaderboard() if r.selection is not None and r.name != "base"]
    stages = dict.fromkeys(r.tried.stage for r in result.rows if r.selection is not None and r.name != "base")
    return [(s, [r for r in board if r.tried.stage == s][:_PER_STAGE]) for s in stages]


def _scores(figure: Any, result: SweepResult) -> bool:
    groups = _by_stage(result)
    if not groups:
        return False
    rows = [(n, r) for n, (_, found) in enumerate(groups) for r in found]
    figure.set_size_inches(7.2, 1.1 + 0.24 * len(rows))
    ax = figure.add_subplot()
    values = [r.selection.value for _, r in rows if r.selection]
    whiskers = _bars(
        values, [r.selection.low for _, r in rows if r.selection], [r.selection.high for _, r in rows if r.selection]
    )
    colours = [_SERIES[n % len(_SERIES)] for n, _ in rows]
    place = range(len(rows))
    ax.barh(place, values, color=colours, alpha=0.75, height=0.7)
    ax.errorbar(values, place, xerr=whiskers, fmt="none", ecolor=_TEXT, elinewidth=0.8, capsize=2)
    ax.set_yticks(place, [f"{r.name}{' ★' if r.name == result.winner else ''}" for _, r in rows])
    ax.invert_yaxis()
    spread = max(values) - min(values) or abs(values[0]) or 1.0
    reach = max(spread, *(max(a, b) for a, b in zip(*whiskers))) * 1.08
    ax.set_xlim(min(values) - reach, max(values) + reach)
    final = next((r for r in result.rows if r.name == "final" and r.selection), None)
    if final is not None and final.selection:
        ax.axvline(final.selection.value, color=_MUTED, linestyle="--", linewidth=1)
    seen = set()
    for i, (stage_number, _) in enumerate(rows):
        if stage_number not in seen:
            seen.add(stage_number)
            ax.annotate(groups[stage_number][0], (1.0, i), xycoords=("axes fraction", "data"), ha="right", va="center",
                        color=_SERIES[stage_number % len(_SERIES)], fontsize=9)  # fmt: skip
    ax.set_xlabel(f"score ({'lower' if result.suite.direction == 'min' else 'higher'} is better; axis cut)")
    return True


def _differences(figure: Any, result: SweepResult) -> bool:
    rows = [r for _, found in _by_stage(result) for r in found if "final" in r.against]
    if not rows:
        return False
    figure.set_size_inches(7.2, 1.1 + 0.24 * len(rows))
    ax = figure.add_subplot()
    found = [r.against["final"] for r in rows]
    values = [d.value for d in found]
    colours = {"better": _SERIES[2], "worse": _SERIES[4]}
    for i, (d, whisker) in enumerate(zip(found, zip(*_bars(values, [d.low for d in found], [d.high for d in found])))):
        colour = colours.get(d.verdict, _MUTED)
        ax.errorbar(
            [d.value],
            [i],
            xerr=[[whisker[0]], [whisker[1]]],
            fmt="o",
            color=colour,
            markersize=4,
            elinewidth=1.2,
            capsize=2,
        )
    ax.axvline(0, color=_MUTED, linewidth=1)
    ax.set_yticks(range(len(rows)), [r.name for r in rows])
    ax.invert_yaxis()
    ax.set_xlabel("better than the final checkpoint by")
    return True


def _weights(figure: Any, result: SweepResult) -> bool:
    rows = [result.row(n) for n in result.ranking if len(result.row(n).tried.weights) > 1][:10]
    if not rows:
        return False
    steps = sorted({s for r in rows for s in r.tried.weights})
    table = [[r.tried.weights.get(s, 0.0) for s in steps] for r in rows]
    top = max(abs(v) for line in table for v in line) or 1.0
    figure.set_size_inches(7.2, 1.0 + 0.3 * len(rows))
    ax = figure.add_subplot()
    for i, line in enumerate(table):
        for j, v in enumerate(line):
            if v:
                ax.add_patch(_square(j, i, abs(v) / top, _SERIES[0] if v > 0 else _SERIES[4]))
                ax.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=7, color=_TEXT)
    ax.set_xlim(-0.5, len(steps) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xticks(range(len(steps)), [str(s) for s in steps], rotation=45 if len(steps) > 8 else 0, fontsize=8)
    ax.set_yticks(range(len(rows)), [r.name for r in rows], fontsize=8)
    ax.set_xlabel("training step")
    return True


def _square(x: float, y: float, share: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=colour, alpha=0.12 + 0.55 * share, linewidth=0)


def _lines(figure: Any, result: SweepResult, x: str, chosen: Mapping[str, list[Row]], label: str) -> bool:
    """Score over one setting, a line for each group."""
    groups = {name: [r for r in rows if r.selection is not None] for name, rows in chosen.items()}
    groups = {name: sorted(rows, key=lambda r: r.tried.settings[x]) for name, rows in groups.items() if len(rows) > 1}
    if not groups:
        return False
    ax = figure.add_subplot()
    for n, (name, rows) in enumerate(groups.items()):
        values = [r.selection.value for r in rows if r.selection]
        ax.plot(
            [r.tried.settings[x] for r in rows],
            values,
            "o-",
            color=_SERIES[n % len(_SERIES)],
            label=name,
            markersize=4,
            linewidth=1.5,
        )
    final = next((r for r in result.rows if r.name == "final" and r.selection), None)
    if final is not None and final.selection:
        ax.axhline(final.selection.value, color=_MUTED, linestyle="--", linewidth=1, label="final checkpoint")
    ax.set_xlabel(label)
    ax.set_ylabel("score")
    ax.legend(fontsize=8)
    return True


def _by_k(figure: Any, result: SweepResult) -> bool:
    rows = [r for r in result.rows if r.tried.stage == "uniform"]
    return _lines(figure, result, "k", {"uniform": rows}, "k")


def _by_interval(figure: Any, result: SweepResult) -> bool:
    groups: dict[str, list[Row]] = {}
    spaced = {r.tried.settings["k"] for r in result.rows if r.tried.stage == "interval"}
    for r in result.rows:
        if r.tried.stage in ("uniform", "interval") and r.tried.settings["k"] in spaced:
            groups.setdefault(f"k = {r.tried.settings['k']}", []).append(r)
    return _lines(figure, result, "interval", groups, "every m-th snapshot")


def _by_penalty(figure: Any, result: SweepResult) -> bool:
    groups: dict[str, list[Row]] = {}
    for r in result.rows:
        if r.tried.stage == "weights":
            s = r.tried.settings
            spaced = f", every {s['interval']}" if s["interval"] > 1 else ""
            groups.setdefault(f"last {s['k']}{spaced}, by {s['by']}", []).append(r)
    return _lines(figure, result, "penalty", groups, "penalty p")


def _by_evaluation(figure: Any, result: SweepResult) -> bool:
    rows = [r for r in result.rows if r.tried.stage == "lcsc" and r.selection]
    if len(rows) < 2:
        return False
    pick = min if result.suite.direction == "min" else max
    values = [r.selection.value for r in rows if r.selection]
    ax = figure.add_subplot()
    ax.plot(range(1, len(values) + 1), values, ".", color=_MUTED, label="candidate")
    ax.plot(
        range(1, len(values) + 1),
        [pick(values[: i + 1]) for i in range(len(values))],
        color=_SERIES[0],
        label="best so far",
    )
    ax.set_xlabel("evaluation")
    ax.set_ylabel("score")
    ax.legend(fontsize=8)
    return True


def _curves(figure: Any, result: SweepResult) -> bool:
    plain = {n: p for n, p in result.curves.items() if len(p) > 1}
    names = sorted(plain, key=lambda n: (n not in ("loss", "eval_loss", "train_loss"), "loss" not in n, n))[:4]
    if not names:
        return False
    figure.set_size_inches(7.2, 2.4 if len(names) < 3 else 4.4)
    axes = figure.subplots(1 if len(names) < 3 else 2, min(len(names), 2), squeeze=False).reshape(-1)
    for n, ax in enumerate(axes):
        if n >= len(names):
            ax.set_axis_off()
            continue
        points = plain[names[n]]
        ax.plot([s for s, _ in points], [v for _, v in points], color=_SERIES[n], linewidth=1.3)
        ax.set_title(names[n], fontsize=10, color=_TEXT)
        ax.set_xlabel("step")
    return True


def _path(figure: Any, path: PathResult) -> bool:
    ax = figure.add_subplot()
    t = [p.t for p in path.points]
    values = [p.score.value for p in path.points]
    whiskers = _bars(values, [p.score.low for p in path.points], [p.score.high for p in path.points])
    ax.plot([0, 1], [values[0], values[-1]], "--", color=_MUTED, linewidth=1, label="between the ends' scores")
    ax.errorbar(t, values, yerr=whiskers, color=_SERIES[0], linewidth=1.5, elinewidth=0.7, capsize=2)
    good, bad = [p for p in path.points if p.accepted], [p for p in path.points if not p.accepted]
    ax.plot(
        [p.t for p in good], [p.score.value for p in good], "o", color=_SERIES[2], label="not worse than the worse end"
    )
    if bad:
        ax.plot([p.t for p in bad], [p.score.value for p in bad], "x", color=_SERIES[4], label="worse")
    if path.base is not None:
        ax.axhline(path.base.value, color=_SERIES[5], linestyle=":", linewidth=1, label="base")
    ax.set_xlabel("t, from A (0) to B (1)")
    ax.set_ylabel("score")
    ax.legend(fontsize=8)
    return True
