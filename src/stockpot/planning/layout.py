"""Where every output tensor goes: shards, headers and byte offsets, all known before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from stockpot.checkpoints.checkpoint import FilePart
from stockpot.checkpoints.header import encode_header
from stockpot.planning.plan import Shard, TensorPlan

__all__ = ["lay_out"]


def lay_out(
    tensors: Sequence[TensorPlan],
    kind: str,
    shard_size: int,
    *,
    part_of: Callable[[str], FilePart | None] = lambda name: None,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
) -> tuple[tuple[TensorPlan, ...], tuple[Shard, ...]]:
    """Fill shards in order up to `shard_size` bytes of data each (a larger tensor gets a shard of its own).

    Adapters are one file whatever their size, as PEFT reads one. Parts have files of their own, without their prefix in the
    names. Inside a shard wide dtypes come first, so that every tensor is aligned. Returns the tensors, renumbered in the order
    of the bytes, and the shards.
    """
    whole = FilePart("", "adapter_model" if kind == "adapter" else stem)
    by_part: dict[FilePart, list[TensorPlan]] = {}
    for t in tensors:
        by_part.setdefault(part_of(t.name) or whole, []).append(t)
    placed: list[TensorPlan] = []
    shards: list[Shard] = []
    for part, own in by_part.items():
        bins = _bins(own, None if kind == "adapter" or part.whole else shard_size)
        for number, content in enumerate(bins):
            content.sort(key=lambda t: -t.spec.dtype.itemsize)
            entries, position = {}, 0
            for t in content:
                entries[t.name.removeprefix(part.prefix)] = (t.spec, position)
                position += t.spec.nbytes
            header = encode_header(entries, dict(metadata or {"format": "pt"}))
            of = f"-{number + 1:05d}-of-{len(bins):05d}" if len(bins) > 1 else ""
            for t in content:
                at = len(header) + entries[t.name.removeprefix(part.prefix)][1]
                placed.append(replace(t, index=len(placed), shard=len(shards), offset=at))
            shards.append(Shard(f"{part.stem}{of}.safetensors", header, len(header) + position, part))
    return tuple(placed), tuple(shards)


def _bins(tensors: Sequence[TensorPlan], size: int | None) -> list[list[TensorPlan]]:
    bins: list[list[TensorPlan]] = [[]]
    filled = 0
    for t in tensors:
        if size is not None and bins[-1] and filled + t.spec.nbytes > size:
            bins.append([])
            filled = 0
        bins[-1].append(t)
        filled += t.spec.nbytes
    return bins
