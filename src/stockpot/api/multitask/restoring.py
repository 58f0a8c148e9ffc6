"""A task's model from the merged one, the base and the task's mask: computed while it is read, written like any merge."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.api.merging import MergeResult, Options, merge_planned, plan
from stockpot.api.multitask.making import FORMAT, INDEX, base_digest, read_block
from stockpot.checkpoints import Checkpoint, open_checkpoint
from stockpot.checkpoints.codecs import encode_into
from stockpot.checkpoints.derived import DerivedCheckpoint, digest_of, files_of
from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.devices import load_block
from stockpot.errors import ArgumentError, CheckpointError, nearest
from stockpot.files import read_json

__all__ = ["RestoredCheckpoint", "open_task", "restore_task"]


@dataclass(frozen=True)
class RestoredCheckpoint(DerivedCheckpoint):
    """sources: the merged model, the base, the task's masks. scale: None where elements of either are taken as they are."""

    masked: frozenset[str] = field(default=frozenset(), repr=False)
    own: frozenset[str] = field(default=frozenset(), repr=False)
    scale: float | None = None

    @property
    def made(self) -> str:
        return super().made + digest_of(f"restored {self.scale}")

    def passed(self, name: str) -> tuple[Checkpoint, str, int] | None:
        merged, _, masks = self.sources
        if name in self.own:
            return masks, f"own/{name}", 0
        return None if name in self.masked else (merged, name, 0)

    def stored(self, name: str) -> Iterable[tuple[Checkpoint, str]]:
        merged, base, masks = self.sources
        if name not in self.masked:
            return super().stored(name)
        made_of = ((merged, name), (base, name), (masks, f"mask/{name}"))
        return (pair for source, own in made_of for pair in source.stored(own))

    @property
    def scratch_itemsize(self) -> int:
        return 40

    def computed(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        merged, base, masks = self.sources
        found = self.passed(name)
        if found is not None:
            found[0].read([ReadRequest(found[1], start, stop)], out)
            return
        first, last = start // 8, -(-stop // 8)
        packed = np.frombuffer(read_block(masks, f"mask/{name}", first, last)[0], np.uint8)
        mask = np.unpackbits(packed, bitorder="little")[start - 8 * first : stop - 8 * first].astype(np.bool_)
        whole, dtype = read_block(merged, name, start, stop)
        origin, _ = read_block(base, name, start, stop)
        if self.scale is None:
            kind = f"u{dtype.itemsize}"
            chosen = np.where(mask, np.frombuffer(whole, kind), np.frombuffer(origin, kind))
            out[:] = chosen.view(np.uint8).data
            return
        block = load_block([whole, origin], [dtype, dtype], stop - start, True, {})
        block[0] -= block[1]
        encode_into(block[1] + np.where(mask, self.scale * block[0], 0.0), dtype, out)


def open_task(folder: str | os.PathLike[str], task: str, *, base: str | None = None) -> RestoredCheckpoint:
    """The model of a task, as a checkpoint: read it, or merge it with `sources={"...": open_task(...)}`.

    folder  what `stockpot masks` wrote; base: where the base lies now, in place of where it lay then

    Raises ArgumentError for an unknown task, CheckpointError for a folder or base that is not what it was made with.
    """
    place = os.fspath(folder)
    path = os.path.join(place, INDEX)
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{place}: holds no masks ({INDEX} is missing); `stockpot masks RECIPE {place}` makes them"
        )
    doc = read_json(path)
    try:
        if doc["format"] != FORMAT:
            raise CheckpointError(f"{path}: is of format {doc['format']}, expected {FORMAT}")
        tasks = {str(t["name"]): t for t in doc["tasks"]}
        was = str(doc["base"]["path"])
        scale = float(tasks[task]["scale"]) if task in tasks and doc["method"] == "emr" else None
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{path}: is not what stockpot writes ({type(e).__name__}: {e})") from e
    if task not in tasks:
        raise ArgumentError(f"{place}: no task {task!r}; there are {', '.join(tasks)}{nearest(task, tasks)}")
    merged = open_checkpoint(os.path.join(place, "model"))
    masks = open_checkpoint(os.path.join(place, "masks", f"{os.path.basename(task)}.safetensors"))
    if base is None and not os.path.exists(was):
        raise CheckpointError(f"{place}: the base is no longer at {was}; say with --base where it is")
    origin = open_checkpoint(base or was)
    masked = frozenset(n.removeprefix("mask/") for n in masks.names() if n.startswith("mask/"))
    own = frozenset(n.removeprefix("own/") for n in masks.names() if n.startswith("own/"))
    specs = {n: masks.spec(f"own/{n}") if n in own else merged.spec(n) for n in merged.names()}
    for name in masked:
        if name not in specs or name not in origin or origin.spec(name) != specs[name]:
            raise CheckpointError(
                f"{origin.ref}: has no {name!r} like the merged model's: it is not the base of these masks"
            )
        if masks.spec(f"mask/{name}").numel != -(-specs[name].numel // 8):
            raise CheckpointError(f"{place}: the mask of {name!r} has another size than the tensor")
    if base_digest(origin, [n for n in specs if n in masked]) != doc.get("base", {}).get("digest"):
        raise CheckpointError(f"{origin.ref}: holds other weights than when the masks were made: it is not their base")
    return RestoredCheckpoint(
        f"{place}#{task}", merged.path, merged.kind, merged.config, files_of([merged, origin, masks]),
        sources=(merged, origin, masks), specs=specs, masked=masked, own=own, scale=scale,
    )  # fmt: skip


def restore_task(
    folder: str | os.PathLike[str],
    task: str,
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    base: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Write the model of a task, as any merge is written: complete or not at all, with its lineage. See open_task."""
    chosen = options or Options()
    found = open_task(folder, task, base=base)
    sources = {found.ref: found}
    planned = plan({"merge_method": "passthrough", "models": [found.ref]}, chosen, sources=sources)
    return merge_planned(planned, out, chosen, overwrite=overwrite, progress=progress, sources=sources)
