"""Masks of a merge that was published: one pass over experts, base and merged model.

A directory of masks:

    model/                   the merged model, as `stockpot merge` wrote it
    masks/TASK.safetensors   `mask/NAME`: a bit for each element of a merged tensor, the first in the lowest place;
                             `own/NAME`: tensors of the expert that were not merged, where they are not the merged model's
    masks.json               which tasks, from what, and how well each comes back
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.api.merging import Options, RecipeLike, check_target, merge_planned, plan
from stockpot.checkpoints import Checkpoint, open_checkpoint
from stockpot.checkpoints.header import encode_header
from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.devices import load_block
from stockpot.engine.outdir import check_trusted, claim_scratch, remove_scratch, scratch_path
from stockpot.errors import ArgumentError, OutputError, StockpotError
from stockpot.files import make_folders, pwrite_all, sync_folder, write_file
from stockpot.methods.declaration import Space
from stockpot.planning.plan import Action, Plan, TensorPlan
from stockpot.specs import DType, TensorSpec

__all__ = ["FORMAT", "INDEX", "MaskReport", "TaskReport", "base_digest", "make_masks", "read_block"]

FORMAT = 1
INDEX = "masks.json"
#: elements at once; a multiple of eight, so that parts of masks are whole bytes
_BLOCK = 2**18


@dataclass
class TaskReport:
    """One task. kept: share of ones; error: how far what comes back is from the expert, over the norm of its task vector."""

    name: str
    ref: str
    threshold: float
    kept: float = 0.0
    scale: float = 1.0
    error: float = 0.0
    bytes: int = 0


@dataclass
class MaskReport:
    """What was written. experts_bytes: what the experts take that are no longer needed."""

    path: str
    method: str
    base: str
    tasks: list[TaskReport] = field(default_factory=list)
    model_bytes: int = 0
    base_bytes: int = 0
    experts_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Of all that must be kept: the merged model, the base, the masks."""
        return self.model_bytes + self.base_bytes + sum(t.bytes for t in self.tasks)


def make_masks(
    recipe: RecipeLike,
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    threshold: float = 0.4,
    progress: Callable[[int, int], None] | None = None,
) -> MaskReport:
    """Merge a recipe and write a mask for each of its models. `out` must not exist; it appears complete or not at all.

    threshold  an element is a task's own where |own - base| > threshold |merged - own| (arXiv:2405.07813; published: 0.2 to 0.6);
               under `merge_method: emr` where signs agree (arXiv:2405.17461), and each task gets a scale besides

    Raises StockpotError.
    """
    target = os.path.abspath(os.fspath(out))
    if not 0 <= threshold < math.inf:
        raise ArgumentError(f"threshold: expected a number of at least 0, got {threshold:g}")
    if os.path.lexists(target):
        raise OutputError(f"{target}: exists; masks are written to a new directory")
    chosen = options or Options()
    planned = plan(recipe, chosen)
    experts = _experts(planned)
    base = planned.inputs[_base_of(planned)]
    parent = os.path.dirname(target)
    if not os.path.isdir(parent):
        raise OutputError(f"{target}: there is no directory {parent}")
    _check_dtypes(planned, base.checkpoint)
    check_target(planned, target, overwrite=False)
    report = MaskReport(target, planned.recipe.merge_method, base.ref)
    names = _task_names([planned.inputs[i].ref for i in experts])
    report.tasks = [TaskReport(n, planned.inputs[i].ref, threshold) for n, i in zip(names, experts, strict=True)]
    scratch = scratch_path(target)
    whole = os.path.join(scratch, "whole")
    try:
        check_trusted(scratch)
        claim_scratch(scratch)  # one that was left by a kill too: the merge in it goes on
        make_folders(whole)
        shutil.rmtree(os.path.join(whole, "masks"), ignore_errors=True)
        merge_planned(planned, os.path.join(whole, "model"), chosen, overwrite=True, progress=progress)
        merged = open_checkpoint(os.path.join(whole, "model"))
        try:
            _write(planned, experts, merged, report, os.path.join(whole, "masks"))
        finally:
            merged.close()
            for model in planned.inputs:
                model.checkpoint.close()
        _measure_bytes(report, planned, experts, whole)
        masked = [t.name for t in planned.tensors if t.action is Action.MERGE]
        index = _index(report, base.checkpoint, base_digest(base.checkpoint, masked))
        write_file(os.path.join(whole, INDEX), json.dumps(index, indent=1))
        sync_folder(whole)
        os.rename(whole, target)
        sync_folder(parent)
    except StockpotError:  # some are of OSError's kinds too
        raise
    except OSError as e:
        raise OutputError(f"{target}: can't be written: {e.strerror}; what is done lies in {scratch}") from e
    remove_scratch(scratch)
    return report


def _check_dtypes(planned: Plan, base: Checkpoint) -> None:
    """Masks choose between the bits of the merged model and the base's. Raises ArgumentError where these are of two kinds."""
    for t in planned.tensors:
        if t.action is Action.MERGE and t.spec.dtype is not base.spec(t.name).dtype:
            came, kept = base.spec(t.name).dtype, t.spec.dtype
            raise ArgumentError(
                f"{t.name} is {came.label} in the base and {kept.label} in the merged model: masks choose between the two bit by "
                f"bit; leave dtype out of the recipe, or give the base in {kept.label}"
            )


def _experts(planned: Plan) -> list[int]:
    """The models that every merged tensor is made of, by their numbers in the plan. Raises ArgumentError for other plans."""
    merged = [t for t in planned.tensors if t.action is Action.MERGE]
    sets = {tuple(o.model for o in t.operands) for t in merged}
    spaces = {planned.groups[t.group].method.space for t in merged}
    if planned.template.kind == "adapter":
        raise ArgumentError("masks are of full models; name adapters as base+adapter in the recipe")
    if spaces != {Space.DELTA} or len({t.base.model for t in merged if t.base is not None}) != 1:
        raise ArgumentError(
            "masks need a method that adds changes to a base (task_arithmetic, ties, emr, ...) for every tensor; this recipe has "
            + (", ".join(sorted({planned.groups[t.group].method.name for t in merged})) or "none")
        )
    if len(sets) != 1 or any(o.name != t.name for t in merged for o in (*t.operands, *([t.base] if t.base else ()))):
        raise ArgumentError(
            "masks need models whose tensors are merged under their own names: no slices, no absent tensors"
        )
    return list(sets.pop())


def _base_of(planned: Plan) -> int:
    return next(t.base.model for t in planned.tensors if t.base is not None)


def _task_names(refs: Sequence[str]) -> list[str]:
    """The last parts of references, made different."""
    out: list[str] = []
    for ref in refs:
        stem = os.path.basename(os.path.normpath(ref.partition("@")[0])) or "task"
        name, n = stem, 2
        while name in out:
            name, n = f"{stem}-{n}", n + 1
        out.append(name)
    return out


def read_block(source: Checkpoint, name: str, start: int, stop: int) -> tuple[memoryview[Any], DType]:
    """Raw bytes of a range."""
    dtype = source.spec(name).dtype
    raw = memoryview(np.empty((stop - start) * dtype.itemsize, np.uint8).data)
    source.read([ReadRequest(name, start, stop)], raw)
    return raw, dtype


def _ranges(numel: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _BLOCK, numel)) for start in range(0, numel, _BLOCK))


def base_digest(base: Checkpoint, names: Sequence[str]) -> str:
    """Of the bytes of these tensors, in order of their names."""
    import blake3

    hashed = blake3.blake3()
    for name in sorted(names):
        hashed.update(f"{name}\0".encode())
        for start, stop in _ranges(base.spec(name).numel):
            hashed.update(read_block(base, name, start, stop)[0])
    return hashed.hexdigest()


class _Sums:
    """Over a task's merged tensors: ones, elements, and what the error is made of."""

    def __init__(self) -> None:
        self.ones = self.elements = 0
        self.own = self.chosen = self.both = self.sizes = self.masses = self.missed = 0.0


def _write(planned: Plan, experts: list[int], merged: Checkpoint, report: MaskReport, folder: str) -> None:
    make_folders(folder)
    emr = report.method == "emr"
    sums = [_Sums() for _ in experts]
    merged_ones = [t for t in planned.tensors if t.action is Action.MERGE]
    others = [t for t in planned.tensors if t.action is not Action.MERGE]
    base = planned.inputs[_base_of(planned)].checkpoint
    files = []
    try:
        for i, task in zip(experts, report.tasks, strict=True):
            source = planned.inputs[i].checkpoint
            own = [t for t in others if _differs(source, merged, t)]
            entries: dict[str, tuple[TensorSpec, int]] = {}
            at = 0
            for t in merged_ones:
                entries[f"mask/{t.name}"] = (TensorSpec(DType.U8, (-(-t.spec.numel // 8),)), at)
                at += -(-t.spec.numel // 8)
            at += -at % 8
            for t in own:
                spec = source.spec(t.name)
                entries[f"own/{t.name}"] = (spec, at)
                at += spec.nbytes
            header = encode_header(_filled(entries, at), {"format": "stockpot masks"})
            path = os.path.join(folder, f"{task.name}.safetensors")
            write_file(path, header)
            fd = os.open(path, os.O_WRONLY | getattr(os, "O_CLOEXEC", 0))
            files.append((fd, len(header), entries))
            for t in own:
                spec, to = entries[f"own/{t.name}"]
                for start, stop in _ranges(spec.numel):
                    raw, dtype = read_block(source, t.name, start, stop)
                    pwrite_all(fd, raw, len(header) + to + start * dtype.itemsize)
            os.ftruncate(fd, len(header) + at)
        for t in merged_ones:
            for start, stop in _ranges(t.spec.numel):
                masks = _masks(planned, experts, base, merged, t, start, stop, report, sums, emr)
                for (fd, after, entries), mask in zip(files, masks, strict=True):
                    packed = np.packbits(mask, bitorder="little")
                    pwrite_all(fd, packed.data, after + entries[f"mask/{t.name}"][1] + start // 8)
        for fd, _, _ in files:
            os.fsync(fd)
        sync_folder(folder)
    finally:
        for fd, _, _ in files:
            os.close(fd)
    for task, s in zip(report.tasks, sums, strict=True):
        task.kept = s.ones / s.elements if s.elements else 0.0
        if emr:  # the task vector's L1 norm comes back; a task that is out-voted everywhere has none to scale
            task.scale = s.sizes / s.masses if s.masses > 0 else 0.0
            square = task.scale**2 * s.chosen - 2 * task.scale * s.both + s.own
        else:
            square = s.missed
        task.error = math.sqrt(max(square, 0.0) / s.own) if s.own > 0 else 0.0


def _filled(entries: Mapping[str, tuple[TensorSpec, int]], end: int) -> dict[str, tuple[TensorSpec, int]]:
    """With a tensor of padding wherever a gap is, since safetensors have none."""
    out: dict[str, tuple[TensorSpec, int]] = {}
    at = 0
    for name, (spec, start) in entries.items():
        if start > at:
            out[f"padding/{at}"] = (TensorSpec(DType.U8, (start - at,)), at)
        out[name] = (spec, start)
        at = start + spec.nbytes
    if end > at:
        out[f"padding/{at}"] = (TensorSpec(DType.U8, (end - at,)), at)
    return out


def _differs(source: Checkpoint, merged: Checkpoint, t: TensorPlan) -> bool:
    """Whether an expert's own tensor, one that was not merged, is another than the merged model's."""
    if t.name not in source:
        return False
    if source.spec(t.name) != merged.spec(t.name):
        return True
    ranges = _ranges(source.spec(t.name).numel)
    return any(read_block(source, t.name, *r)[0] != read_block(merged, t.name, *r)[0] for r in ranges)


def _masks(
    planned: Plan, experts: list[int], base: Checkpoint, merged: Checkpoint, t: TensorPlan, start: int, stop: int,
    report: MaskReport, sums: list[_Sums], emr: bool,
) -> list[Any]:  # fmt: skip
    """Booleans for each expert; adds to the sums."""
    sources = [*(planned.inputs[i].checkpoint for i in experts), base, merged]
    found = [read_block(s, t.name, start, stop) for s in sources]
    n = stop - start
    with np.errstate(all="ignore"):
        block = load_block([raw for raw, _ in found], [d for _, d in found], n, True, {})
        models, origin, whole = block[:-2], block[-2], block[-1]
        united = whole - origin
        out = []
        for x, task, s in zip(models, report.tasks, sums, strict=True):
            own = x - origin
            if emr:
                mask = (own > 0) & (united > 0) | (own < 0) & (united < 0)
                s.sizes += float(np.abs(own).sum())
                s.masses += float(np.abs(united)[mask].sum())
                s.chosen += float(np.square(united)[mask].sum())
                s.both += float((united * own)[mask].sum())
            else:
                mask = np.abs(own) > task.threshold * np.abs(whole - x)
                s.missed += float(np.square(np.where(mask, whole - x, own)).sum())
            s.own += float(np.square(own).sum())
            s.ones += int(np.count_nonzero(mask))
            s.elements += n
            out.append(mask)
    return out


def _measure_bytes(report: MaskReport, planned: Plan, experts: list[int], whole: str) -> None:
    report.model_bytes = sum(t.spec.nbytes for t in planned.tensors)
    report.base_bytes = planned.inputs[_base_of(planned)].checkpoint.nbytes
    report.experts_bytes = sum(planned.inputs[i].checkpoint.nbytes for i in experts)
    for task in report.tasks:
        task.bytes = os.path.getsize(os.path.join(whole, "masks", f"{task.name}.safetensors"))


def _index(report: MaskReport, base: Checkpoint, digest: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "method": report.method,
        "base": {"ref": report.base, "path": base.path, "digest": digest},
        "tasks": [t.__dict__ for t in report.tasks],
        "model_bytes": report.model_bytes,
        "base_bytes": report.base_bytes,
        "experts_bytes": report.experts_bytes,
    }
