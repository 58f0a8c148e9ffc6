"""`open_run`: a directory that training left behind -> Run. Reads headers, logs and JSON only."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from stockpot.checkpoints.opening import open_checkpoint
from stockpot.errors import ArgumentError, CheckpointError, LayoutError
from stockpot.runs import lightning, torchtune, transformers
from stockpot.runs.metrics import MetricLog, read_metrics_file
from stockpot.runs.run import Run, Snapshot

__all__ = ["open_run"]


def open_run(
    path: str | os.PathLike[str], *, snapshots: str | None = None, metrics: str | os.PathLike[str] | None = None
) -> Run:
    """Open the directory of a training run.

    Recognised by themselves: transformers' Trainer and what is built on it (checkpoint-N/, trainer_state.json), PyTorch
    Lightning (.ckpt files, metrics.csv of CSVLogger), torchtune (epoch_N/, step_N/, logs of DiskLogger), TensorBoard event
    files where nothing else holds metrics and `tensorboard` is installed.

    snapshots  a pattern relative to the directory with {step}, such as "ckpt_{step}.safetensors", for any other layout
    metrics    a .csv or .jsonl file with a step and values, in place of what the layout's own log holds

    Snapshots that can't be read are kept in `broken` with the reason. Raises CheckpointError where there is no snapshot
    at all, ArgumentError for a bad pattern.
    """
    text = os.fspath(path)
    root = os.path.abspath(os.path.expanduser(text))
    if not os.path.isdir(root):
        what = "is a file; expected the directory of a run" if os.path.exists(root) else "no such directory"
        raise CheckpointError(f"{text}: {what}")
    try:
        listing = sorted(os.listdir(root))
    except OSError as e:
        raise CheckpointError(f"{text}: can't be looked into: {e.strerror or e}") from e
    if snapshots is not None:
        run = _by_pattern(text, root, snapshots)
    else:
        run = _recognised(text, root, listing)
    run = replace(run, pattern=snapshots)
    if metrics is not None:
        file = os.path.expanduser(os.fspath(metrics))
        run = replace(run, metrics=read_metrics_file(file), metrics_file=file)
    elif not run.metrics.series:
        run = replace(run, metrics=_tensorboard(root) or run.metrics)
    return _checked(run)


def _recognised(text: str, root: str, listing: Sequence[str]) -> Run:
    readers: tuple[Callable[[str, str, Sequence[str]], Run | None], ...] = (
        transformers.read_run,
        torchtune.read_run,
        lightning.read_run,
    )
    for read in readers:
        run = read(text, root, listing)
        if run is not None:
            return run
    for name in listing:  # steps of a trainer that leaves shards: verl, Megatron, DeepSpeed
        if re.fullmatch(r"(global_step_?|iter_|step_?)\d+", name) and os.path.isdir(os.path.join(root, name)):
            open_checkpoint(os.path.join(root, name))
            break
    shown = ", ".join(listing[:8]) + (", ..." if len(listing) > 8 else "")
    raise CheckpointError(
        f"{text}: no snapshots of a training run: expected checkpoint-N/ (transformers), .ckpt files (Lightning), epoch_N/ or "
        f"step_N/ (torchtune); found {shown or 'nothing'}. --snapshots 'pattern with {{step}}' names any other layout"
    )


def _by_pattern(text: str, root: str, pattern: str) -> Run:
    if pattern.count("{step}") != 1:
        raise ArgumentError(
            f"snapshots: expected a pattern with {{step}} once, such as 'ckpt_{{step}}', got {pattern!r}"
        )
    if os.path.isabs(pattern) or ".." in pattern.replace("\\", "/").split("/"):
        raise ArgumentError(f"snapshots: the pattern is relative to the run's directory, got {pattern!r}")
    pattern = os.path.normpath(pattern)
    before, after = pattern.split("{step}")
    name = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    depth = pattern.strip("/").count("/") + 1
    found: dict[int, str] = {}
    for relative in _entries(root, depth):
        match = name.fullmatch(relative)
        if match:
            step = int(match[1])
            if step in found:
                raise CheckpointError(f"{text}: {found[step]} and {relative} are both step {step}")
            found[step] = relative
    if not found:
        names = sorted(_entries(root, depth))[:6]
        raise CheckpointError(f"{text}: nothing matches {pattern!r}; there are {', '.join(names) or 'no entries'}")
    paths = {step: os.path.join(root, found[step]) for step in sorted(found)}
    warnings: list[str] = []
    log, end = _log_of(root, paths, warnings)
    shots = tuple(Snapshot(step, path, "model", final=step == end) for step, path in paths.items())
    return Run(text, "pattern", shots, log, warnings=tuple(warnings))


def _log_of(root: str, paths: Mapping[int, str], warnings: list[str]) -> tuple[MetricLog, int | None]:
    """What the trainer logged, wherever snapshots of a pattern lie below what it wrote: (the log, the step of the end)."""
    folders = {}
    for step, path in paths.items():
        place = path
        while len(place) >= len(root):
            if os.path.isfile(os.path.join(place, transformers.STATE)):
                folders[step] = os.path.relpath(place, root)
                break
            place = os.path.dirname(place)
    if folders:
        return transformers.read_log(root, folders, warnings)
    files = [p for p in paths.values() if p.endswith(".ckpt")]
    return (
        (lightning.read_log(root, os.path.dirname(files[0]), files, warnings), None) if files else (MetricLog(), None)
    )


def _entries(root: str, depth: int) -> Iterable[str]:
    """Names relative to root, `depth` levels down."""
    level = [""]
    for _ in range(depth):
        below = []
        for parent in level:
            folder = os.path.join(root, parent)
            if os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK):
                below += [os.path.join(parent, n) for n in os.listdir(folder)]
        level = below
    return level


def _checked(run: Run) -> Run:
    """Open every snapshot's headers: the kind of each, and the broken ones apart."""
    good, broken = [], []
    for shot in run.snapshots:
        try:
            checkpoint = open_checkpoint(shot.path)
            if not len(checkpoint):
                raise CheckpointError(f"{shot.path}: holds no tensors")
            good.append(replace(shot, kind=checkpoint.kind))
        except LayoutError as e:  # whole, but not weights that can be read
            broken.append(replace(shot, fault=str(e).removeprefix(shot.path + ": ")))
        except CheckpointError as e:
            broken.append(replace(shot, fault=f"half-written or damaged: {str(e).removeprefix(shot.path + ': ')}"))
    known_steps = {s.step for s in good}
    warnings = [*run.warnings, *(f"step {s.step} is left out: {s.fault}" for s in broken if s.step not in known_steps)]
    if not good and not broken:
        raise CheckpointError(f"{run.path}: no snapshots")
    return replace(run, snapshots=tuple(good), broken=(*run.broken, *broken), warnings=tuple(warnings))


def _tensorboard(root: str) -> MetricLog | None:
    from stockpot.runs.tensorboard import read_events

    return read_events(root)
