"""Runs of PyTorch Lightning: `.ckpt` files of ModelCheckpoint, `metrics.csv` of CSVLogger."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence

from stockpot.checkpoints.torchzip import read_torch_file
from stockpot.errors import CheckpointError
from stockpot.runs.metrics import MetricLog, log_from_rows, read_metrics_file
from stockpot.runs.run import Run, Snapshot
from stockpot.runs.transformers import off_interval

__all__ = ["read_log", "read_run"]

_STEP = re.compile(r"step=(\d+)")
_VERSION = re.compile(r"version_(\d+)")
_DEPTH = 3


def read_run(text: str, root: str, listing: Sequence[str]) -> Run | None:
    """The run in a directory with .ckpt files, here, in checkpoints/, in the newest lightning_logs/version_N/, or in the one
    folder below that has any (ModelCheckpoint's own dirpath).
    """
    warnings: list[str] = []
    for folder in _folders(root, listing, warnings):
        files = sorted(n for n in os.listdir(folder) if n.endswith(".ckpt"))
        if files:
            shots = _snapshots(folder, files, warnings)
            log = read_log(root, folder, [os.path.join(folder, n) for n in files], warnings)
            return Run(text, "lightning", tuple(shots), log, warnings=tuple(warnings))
    return None


def _folders(root: str, listing: Sequence[str], warnings: list[str]) -> list[str]:
    places = [root, os.path.join(root, "checkpoints")]
    for logs in (root, os.path.join(root, "lightning_logs")):
        if not os.path.isdir(logs):
            continue
        versions = sorted((int(m[1]), n) for n in os.listdir(logs) if (m := _VERSION.fullmatch(n)))
        with_files = [n for _, n in versions if os.path.isdir(os.path.join(logs, n, "checkpoints"))]
        if len(with_files) > 1:
            warnings.append(f"{logs} holds {len(with_files)} versions; {with_files[-1]}, the newest, is read")
        places += [os.path.join(logs, n, "checkpoints") for n in reversed(with_files)]
    places = [p for p in places if os.path.isdir(p)]
    if not any(n.endswith(".ckpt") for p in places for n in os.listdir(p)):
        below = sorted(_below(root))
        if len(below) > 1:
            raise CheckpointError(
                f"{root}: several folders hold .ckpt files ({', '.join(os.path.relpath(p, root) for p in below[:6])}): name one "
                "of them"
            )
        places += below
    return places


def _below(root: str) -> Iterator[str]:
    """Folders with .ckpt files, not too deep."""
    depth = root.rstrip(os.sep).count(os.sep)
    for place, folders, names in os.walk(root):
        if place.count(os.sep) - depth >= _DEPTH:
            folders.clear()
        if any(n.endswith(".ckpt") for n in names):
            yield place


def read_log(root: str, folder: str, files: Sequence[str], warnings: list[str]) -> MetricLog:
    """metrics.csv of CSVLogger, beside the checkpoints or near them; else the score that each file keeps of itself."""
    log = _metrics(root, folder, warnings)
    return log if log.series else _own_scores(files) or log


def _own_scores(files: Sequence[str]) -> MetricLog | None:
    """What ModelCheckpoint monitors, as it stands in each file."""
    rows = []
    for path in files:
        try:
            found = read_torch_file(path)
        except CheckpointError:
            continue
        step = found.scalars.get("global_step")
        if isinstance(step, int) and found.scores:
            rows.append({"step": step, **found.scores})
    return log_from_rows(rows, "the scores that the .ckpt files keep") if rows else None


def _snapshots(folder: str, files: Sequence[str], warnings: list[str]) -> list[Snapshot]:
    by_step: dict[int, Snapshot] = {}
    unread = []
    for name in sorted(files, key=lambda n: n.startswith("last")):
        path = os.path.join(folder, name)
        step, fault = _step(path, name)
        if step < 0:
            unread.append(f"{name}: {fault}")
            continue
        is_last = name.startswith("last")
        if step in by_step:
            if not is_last:
                warnings.append(f"{name} is of step {step} like {os.path.basename(by_step[step].path)}, which is used")
            continue
        by_step[step] = Snapshot(step, path, "", final=is_last)
    warnings += [f"{u}; left out" for u in unread]
    ordered = [by_step[s] for s in sorted(by_step)]
    if not any(s.final for s in ordered):
        end = off_interval([s.step for s in ordered])
        ordered = [Snapshot(s.step, s.path, "", final=s.step == end) for s in ordered]
    return ordered


def _step(path: str, name: str) -> tuple[int, str]:
    """`global_step` of the file, else the step in its name."""
    in_name = _STEP.search(name)
    try:
        step = read_torch_file(path).scalars.get("global_step")
        if isinstance(step, int) and step >= 0:
            return step, ""
        fault = "names no step"
    except CheckpointError as e:
        fault = str(e).removeprefix(path + ": ")
    return (int(in_name[1]), "") if in_name else (-1, fault)


def _metrics(root: str, folder: str, warnings: list[str]) -> MetricLog:
    """metrics.csv beside the checkpoints or of the same version; else the newest one in the run's directory."""
    beside = [os.path.join(p, "metrics.csv") for p in (folder, os.path.dirname(folder))]
    found = [p for p in beside if os.path.isfile(p)]
    depth = root.rstrip(os.sep).count(os.sep)
    for place, folders, names in os.walk(root) if not found else ():
        if place.count(os.sep) - depth >= _DEPTH:
            folders.clear()
        if "metrics.csv" in names:
            found.append(os.path.join(place, "metrics.csv"))
    above = os.path.dirname(root)  # the logger's folder may lie beside the checkpoints', but other runs' do too
    for place in (above, os.path.join(above, "lightning_logs")) if not found else ():
        versions = [n for n in os.listdir(place) if _VERSION.fullmatch(n)] if os.path.isdir(place) else []
        found += [f for n in versions if os.path.isfile(f := os.path.join(place, n, "metrics.csv"))]
    if found:
        found.sort(key=lambda p: (-os.path.getmtime(p), p))
    logs = []
    for path in found:
        try:
            logs.append(read_metrics_file(path))
        except CheckpointError as e:
            warnings.append(f"its metrics can't be used: {e}")
    if not logs:
        return MetricLog({}, warnings[-1] if found else "")
    log = logs[0]
    series = dict(log.series)
    for older in logs[1:]:  # what a resumed run logged before
        for name, points in older.series.items():
            begin = series[name][0][0] if name in series else math.inf
            series[name] = (*(p for p in points if p[0] < begin), *series.get(name, ()))
    # Lightning logs the first batch as step 0, and names the checkpoint after it step=1
    shifted = {name: tuple((step + 1, value) for step, value in points) for name, points in series.items()}
    return MetricLog(shifted, log.source)
