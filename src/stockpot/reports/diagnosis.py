"""The page of a diagnosis: findings, advice, and heatmaps by layer and kind of module."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stockpot.errors import OutputError
from stockpot.reports.charts import Chart, heatmap, require_charts
from stockpot.reports.page import document, figures, notes_section, table, text_of, verdict

if TYPE_CHECKING:
    from stockpot.diagnosis import Diagnosis, Measured

__all__ = ["diagnosis_charts", "diagnosis_page", "write_page"]


def write_page(path: str, d: Diagnosis | None = None) -> None:
    """Write the page, or (without a diagnosis) only see that it could be. Raises OutputError, ArgumentError."""
    from stockpot.files import replace_file

    require_charts()
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise OutputError(f"{path}: there is no directory {folder}")
    if os.path.isdir(path):
        raise OutputError(f"{path}: is a directory; name a file, such as {os.path.join(path, 'diagnosis.html')}")
    if d is not None:
        try:
            replace_file(path, diagnosis_page(d))
        except OSError as e:
            raise OutputError(f"{path}: can't be written: {e.strerror}") from e


def diagnosis_charts(d: Diagnosis) -> list[Chart]:
    """Heatmaps."""
    names = [_short(n) for n in d.models]
    layers, kinds = d.by_layer(), d.by_kind()
    m = range(len(d.models))
    rows = [str(k) if k is not None else "others" for k in layers]
    charts = [
        heatmap(
            "norms",
            "Size of the changes by layer",
            "Norm of each delta over the base's norm.",
            rows,
            names,
            [[v.relative(i) for i in m] for v in layers.values()],
        ),
        heatmap(
            "kinds",
            "Size of the changes by kind of module",
            "Norm of each delta over the base's norm, over all layers.",
            list(kinds),
            names,
            [[v.relative(i) for i in m] for v in kinds.values()],
        ),
    ]
    if len(d.models) > 1:
        total = d.summed()
        pairs = [(i, j) for i in m for j in m if i < j]
        labels = [f"{names[i]} | {names[j]}" for i, j in pairs]
        cosines: Callable[[Measured], list[float | None]] = lambda v: [v.cosine(i, j) for i, j in pairs]  # noqa: E731
        charts += [
            heatmap(
                "cosines",
                "Cosines between deltas",
                "1: the same direction; 0: independent; below 0: they undo one another.",
                names,
                names,
                [[1.0 if i == j else total.cosine(i, j) for j in m] for i in m],
                span=(-1, 1),
            ),
            heatmap(
                "cosines-by-layer",
                "Cosines between deltas by layer",
                "Each pair of models.",
                rows,
                labels,
                [cosines(v) for v in layers.values()],
                span=(-1, 1),
            ),
            heatmap(
                "conflicts",
                "Sign conflicts by layer",
                "Share of the elements that two models or more change, in which they do not agree on the sign.",
                rows,
                ["conflicts"],
                [[v.conflict_rate] for v in layers.values()],
                span=(0, 1),
            ),
        ]
    return charts


def _short(ref: str) -> str:
    return os.path.basename(os.path.normpath(ref)) or ref


def diagnosis_page(d: Diagnosis) -> str:
    """One HTML file that needs no network."""
    from stockpot.diagnosis import THRESHOLDS, judge

    findings, advice = judge(d)
    total = d.summed()
    against = [f.text for f in findings if f.level != "note"]
    parts = [verdict(against or ["Nothing speaks against merging these models."])]
    rows = []
    for i, name in enumerate(d.models):
        relative = total.relative(i)
        share = total.share(total.changed[i])
        rows.append(
            [text_of(name), f"{total.norm(i):.4g}", "" if relative is None else f"{relative:.3g}", f"{share:.1%}"]
        )
    parts.append(
        f"<section><h2>Models</h2>{table(['model', 'delta norm', 'over the base', 'elements changed'], rows)}</section>"
    )
    parts.append(_section("Methods", [[", ".join(a.methods), "fits" if a.fits else "does not fit", a.why, a.by] for a in advice],
                          ["methods", "", "why", "judged by"]))  # fmt: skip
    parts.append(_section("Findings", [[f.level, f.text, f.by] for f in findings], ["level", "finding", "judged by"]))
    charts = diagnosis_charts(d)
    parts.append(figures(charts))
    used = [[k, f"{v:g}", about] for k, (v, about) in THRESHOLDS.items()]
    parts.append(_section("Thresholds", used, ["name", "value", "what it decides"]))
    parts.append(notes_section(d.notes))
    about = (
        f"Base: {d.base}. {len(d.tensors)} tensors compared, {total.elements} elements; {d.copied} others not compared."
    )
    downloads = [(f"{c.name}.png", "image/png", c.png) for c in charts]
    return document("Diagnosis before merging", about, parts, downloads, {})


def _section(title: str, rows: Sequence[Sequence[Any]], heads: Sequence[str]) -> str:
    if not rows:
        return ""
    cells = [[text_of(c) for c in row] for row in rows]
    return f"<section><h2>{text_of(title)}</h2>{table(heads, cells, wrap=len(heads) - (2 if len(heads) > 2 else 1))}</section>"
