"""Runs of torchtune: `epoch_N/` or `step_N/` folders in the output directory, `log_*.txt` of DiskLogger."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from stockpot.files import read_bytes
from stockpot.runs.metrics import MetricLog, log_from_rows
from stockpot.runs.run import Run, Snapshot

__all__ = ["read_run"]

_FOLDER = re.compile(r"(epoch|step)_(\d{1,18})")
_LOG = re.compile(r"log_\d+\.txt")
_LINE = re.compile(r"Step (\d{1,18}) \| (.*)")
#: bytes of a log that are read, at most
_MOST = 2**28


def read_run(text: str, root: str, listing: Sequence[str]) -> Run | None:
    """The run in a directory with epoch_N/ or step_N/ folders; None where there are none."""
    found: dict[str, dict[int, str]] = {"epoch": {}, "step": {}}
    for name in listing:
        m = _FOLDER.fullmatch(name)
        if m and os.path.isdir(os.path.join(root, name)):
            found[m[1]][int(m[2])] = name
    unit = "step" if found["step"] else "epoch"
    if not found[unit]:
        return None
    warnings = []
    if found["step"] and found["epoch"]:
        warnings.append(f"{len(found['epoch'])} epoch_N folders are left out beside step_N")
    shots = [Snapshot(n, os.path.join(root, name), "") for n, name in sorted(found[unit].items())]
    log = _log(root, listing)
    if unit == "epoch" and log.series:
        log = _by_epoch(log, sorted(found["epoch"]), warnings)
    return Run(text, "torchtune", tuple(shots), log, warnings=tuple(warnings), epochs_as_steps=unit == "epoch")


def _log(root: str, listing: Sequence[str]) -> MetricLog:
    """`Step 3 | loss:1.2 lr:2e-05` lines of the newest log, here or in logs/."""
    places = [os.path.join(root, n) for n in listing if _LOG.fullmatch(n)]
    logs = os.path.join(root, "logs")
    if os.path.isdir(logs):
        places += [os.path.join(logs, n) for n in os.listdir(logs) if _LOG.fullmatch(n)]
    if not places:
        return MetricLog()
    newest = max(places, key=os.path.getmtime)
    rows: list[dict[str, Any]] = []
    try:
        text = read_bytes(newest, _MOST).decode("utf-8", "replace")
    except OSError as e:
        return MetricLog({}, f"{newest} can't be read: {e.strerror or e}")
    for line in text.splitlines():
        m = _LINE.match(line)
        if m:
            pairs = (item.partition(":") for item in m[2].split())
            rows.append({"step": int(m[1]), **{k: v for k, _, v in pairs}})
    return log_from_rows(rows, newest)


def _by_epoch(log: MetricLog, epochs: Sequence[int], warnings: list[str]) -> MetricLog:
    """Steps as epochs: with E epochs saved from 0 on and S logged steps, epoch e ends at step (e + 1) S / E."""
    last = max(points[-1][0] for points in log.series.values())
    if list(epochs) != list(range(len(epochs))) or last < len(epochs) or last % len(epochs):
        warnings.append(
            f"the log goes to step {last}, which does not divide into the {len(epochs)} epochs saved: its metrics can't be "
            "assigned; give --metrics FILE with the epoch as step"
        )
        return MetricLog()
    each = last // len(epochs)
    series: dict[str, tuple[tuple[int, float], ...]] = {}
    for name, points in log.series.items():
        by_epoch = {max(-(-step // each) - 1, 0): value for step, value in points}
        series[name] = tuple(sorted(by_epoch.items()))
    return MetricLog(series, log.source)
