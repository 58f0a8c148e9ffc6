"""Scalars of TensorBoard event files, where nothing else holds metrics. Needs the `tensorboard` package."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from stockpot.runs.metrics import MetricLog

__all__ = ["read_events"]

_EVENTS = "events.out.tfevents"
#: folders with event files that are read, the newest
_MOST_FOLDERS = 64


def read_events(root: str) -> MetricLog | None:
    """Every scalar of the event files below a directory; None where there are none, or tensorboard is missing."""
    folders = [
        folder
        for folder, _, names in os.walk(root)
        if any(n.startswith(_EVENTS) for n in names)
    ]  # fmt: skip
    if not folders:
        return None
    if importlib.util.find_spec("tensorboard") is None:
        return MetricLog({}, "there are TensorBoard event files: install tensorboard to read them")
    accumulator: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    series: dict[str, dict[int, float]] = {}
    newest = sorted(folders, key=os.path.getmtime)[-_MOST_FOLDERS:]
    for folder in newest:
        if not all(os.path.isfile(os.path.join(folder, n)) for n in os.listdir(folder) if n.startswith(_EVENTS)):
            return MetricLog(
                {}, f"{folder} has something that is called like a file of TensorBoard's events, and is none"
            )
        events = accumulator.EventAccumulator(folder, size_guidance={accumulator.SCALARS: 0, accumulator.TENSORS: 0})
        try:
            events.Reload()
        except Exception as error:  # whatever its parser makes of a damaged file
            return MetricLog(
                {}, f"the TensorBoard event files in {folder} can't be read: {type(error).__name__}: {error}"
            )
        for tag in events.Tags()["scalars"]:
            for e in events.Scalars(tag):
                series.setdefault(tag.removeprefix("train/"), {})[e.step] = e.value
        for tag in events.Tags()["tensors"]:
            for e in events.Tensors(tag):
                if e.tensor_proto.float_val:
                    series.setdefault(tag.removeprefix("train/"), {})[e.step] = e.tensor_proto.float_val[0]
    source = "TensorBoard"
    if len(newest) < len(folders):
        source += f" (the newest {len(newest)} of {len(folders)} folders with event files)"
    return MetricLog({name: tuple(sorted(points.items())) for name, points in series.items()}, source)
