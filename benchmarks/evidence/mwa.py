"""What averaging snapshots gains, and over what: every family of merges on every run of runs.py, chosen and reported apart.

    python benchmarks/evidence/runs.py runs --seeds 5
    python benchmarks/evidence/mwa.py runs --write docs/evidence.md

Each family (uniform, by loss, by steps, EMA, greedy, LCSC, TIES, ...) tries its settings on the selection half of the held-out
text; its best is scored on the report half, and only those scores are compared. Differences are of the mean loss in nats a
token, positive when the family is better; the interval is Student's over seeds. Results are kept in runs/*/seed-*.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stockpot.evaluation.pool import Pool, score_all
from stockpot.evaluation.suite import load_suite
from stockpot.runs import open_run
from stockpot.search import SweepOptions, SweepResult
from stockpot.search.options import STAGES
from stockpot.search.result import Row
from stockpot.search.sweep import SweepJob, run_sweep

SUITE = "slices:\n  - {name: text, kind: loss, data: held_out.txt, chunk: 1000, max_length: 96}\n"
LATE, WHOLE = (2, 3, 5, 10), 16
#: weights over fixed numbers of snapshots, whether or not the search would have come to them
REACHES = SweepOptions(stages=("uniform", "weights"), k=(5, 10, WHOLE), keep=3)
OPTIONS = SweepOptions(stages=STAGES, k=(*LATE, WHOLE), intervals=(2, 3), keep=5, decays=(0.5, 0.8, 0.9))
#: two-sided 97.5 % points of Student's t by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def family_of(row: Row) -> list[str]:
    """The families that a candidate competes in; fixed settings, which nothing was chosen for, are families of one."""
    s, name = row.tried.settings, row.name
    k, stage = s.get("k"), row.tried.stage
    reach = "whole" if k == WHOLE else "late"
    if stage == "uniform":
        return [f"uniform, {reach}", f"uniform, k = {k}"]
    if stage == "interval":
        return ["spaced, uniform"]
    if stage == "weights" and s["interval"] == 1:
        kind = "loss" if s["by"] == "loss" else "steps"
        fixed = [f"by {kind} p = 0.7, k = {k}"] if s["penalty"] == 0.7 else []
        return [f"by {kind}, {reach}", *fixed]
    if stage == "weights":
        return [f"spaced, by {'loss' if s['by'] == 'loss' else 'steps'}"]
    if stage == "schedules":
        return ["EMA, whole" if s["by"].startswith("ema") else "1-sqrt, whole"]
    if stage == "comparison":
        return [{"ties": "TIES", "dare_ties": "DARE-TIES", "slerp": "SLERP"}[s["method"]]]
    return {"greedy": ["greedy soup"], "lcsc": ["LCSC"], "reference": [name]}.get(stage, [])


def measure(folder: Path) -> dict[str, Any]:
    """Search on the selection half; the best of each family on the report half."""
    suite_file = folder.parent / "suite.yml"
    suite_file.write_text(SUITE)
    suite = load_suite(suite_file)
    run = open_run(folder)
    result: SweepResult = run_sweep(SweepJob(suite, str(folder.with_suffix(".sweep")), run, OPTIONS))
    reaches = run_sweep(SweepJob(suite, str(folder.with_suffix(".reaches")), run, REACHES))
    best: dict[str, Row] = {}
    rows = {row.name: row for row in (*result.rows, *reaches.rows)}
    for row in sorted(rows.values(), key=lambda r: r.selection.value if r.selection else math.inf):
        if row.selection is not None:
            for family in family_of(row):
                best.setdefault(family, row)
    tasks = {row.name: row.tried.task() for row in best.values()}
    with Pool(suite) as pool:
        found = score_all(pool, list(tasks.values()), [i for i in pool.infos if i.split == "report"])
    scored = [r for r in rows.values() if r.seconds_made is not None and r.seconds_scored]
    return {
        "families": {
            family: {"name": row.name, "selection": row.selection and row.selection.value,
                     "report": found[row.name]["text", "report"]["loss"]}
            for family, row in best.items()
        },
        "candidates": len(rows),
        "seconds_made": statistics.median(r.seconds_made or 0.0 for r in scored),
        "seconds_scored": statistics.median(r.seconds_scored for r in scored),
    }  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, STUDENT[min(len(values) - 1, 9)] * statistics.stdev(values) / math.sqrt(len(values))


def gain(found: Mapping[str, Mapping[str, Any]], family: str, reference: str) -> list[float]:
    """Loss of the reference minus loss of the family, of every seed that has both."""
    return [
        f["families"][reference]["report"] - f["families"][family]["report"]
        for f in found.values()
        if family in f["families"] and reference in f["families"]
    ]


def cell(values: list[float]) -> str:
    """`+0.0123 ± 0.0045`, bold where the interval leaves 0 out."""
    if not values:
        return ""
    mean, half = interval(values)
    text = f"{mean:+.4f} ± {half:.4f}"
    return f"**{text}**" if abs(mean) > half else text


FAMILIES = [
    "uniform, late", "by loss, late", "by steps, late", "spaced, uniform", "spaced, by loss", "uniform, whole", "by loss, whole",
    "by steps, whole", "EMA, whole", "1-sqrt, whole", "greedy soup", "LCSC", "TIES", "DARE-TIES", "SLERP",
]  # fmt: skip
FIXED = [(f"by {kind} p = 0.7, k = {k}", f"uniform, k = {k}") for kind in ("loss", "steps") for k in (5, 10, 16)]


def tables(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The Markdown of the study."""
    out = []
    for setting, found in results.items():
        some = next(iter(found.values()))
        names = [r for r in ("base", "last_merging", "final") if r in some["families"]]
        losses = {r: statistics.fmean(f["families"][r]["report"] for f in found.values()) for r in names}
        out.append(f"## {setting}\n")
        means = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in losses.items())
        share = statistics.fmean(f["seconds_made"] / f["seconds_scored"] for f in found.values())
        out.append(f"{len(found)} seeds, {some['candidates']} candidates each or so. Mean loss: {means}. Making a candidate took "
                   f"{100 * share:.0f} % of the time that scoring it took.\n")  # fmt: skip
        out.append(
            "| family (its best by the selection half) | over the final | over the last merging | over the best uniform soup |"
        )
        out.append("|---|---|---|---|")
        for family in FAMILIES:
            if family in some["families"]:
                cells = [cell(gain(found, family, r)) for r in ("final", "last_merging", "uniform, late")]
                out.append(f"| {family} | {' | '.join(cells if family != 'uniform, late' else [*cells[:2], ''])} |")
        out.append("\nWith nothing chosen, against the uniform soup of the same snapshots:\n\n| | gain |\n|---|---|")
        for family, reference in FIXED:
            if family in some["families"]:
                out.append(f"| {family} | {cell(gain(found, family, reference))} |")
        out.append("")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--write", type=Path, help="put the tables into this file, after its line '<!-- tables -->'")
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for state in sorted(options.runs.resolve().glob("*/seed-*/trainer_state.json")):
        folder = state.parent
        kept = folder.with_suffix(".json")
        if not kept.exists():
            kept.write_text(json.dumps(measure(folder), indent=1))
            print(f"{folder.parent.name}, {folder.name}: measured", flush=True)
        results.setdefault(folder.parent.name, {})[folder.name] = json.loads(kept.read_text())
    text = tables(results)
    if options.write is None:
        print(text)
        return
    head = options.write.read_text().split("<!-- tables -->")[0]
    options.write.write_text(f"{head}<!-- tables -->\n\n{text}")


if __name__ == "__main__":
    main()
