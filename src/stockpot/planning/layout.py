"""Where every output tensor goes: shards, headers and byte offsets, all known before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stockpot.checkpoints.header import encode_header
from stockpot.planning.plan import Shard, TensorPlan

__all__ = ["lay_out"]


def lay_out(
    tensors: Sequence[TensorPlan], kind: str, shard_size: int
) -> tuple[tuple[TensorPlan, ...], tuple[Shard, ...]]:
    """Fill shards in order up to `shard_size` bytes of data each (a larger tensor gets a shard of its own).

    Adapters are one file whatever their size, as PEFT reads one. Inside a shard wide dtypes come first, so that
    every tensor is aligned. Returns the tensors, renumbered in the order of the bytes, and the shards.
    """
    stem = "adapter_model" if kind == "adapter" else "model"
    bins: list[list[TensorPlan]] = [[]]
    filled = 0
    for t in tensors:
        if kind != "adapter" and bins[-1] and filled + t.spec.nbytes > shard_size:
            bins.append([])
            filled = 0
        bins[-1].append(t)
        filled += t.spec.nbytes
    placed: list[TensorPlan] = []
    shards = []
    for number, content in enumerate(bins):
        content.sort(key=lambda t: -t.spec.dtype.itemsize)
        entries, position = {}, 0
        for t in content:
            entries[t.name] = (t.spec, position)
            position += t.spec.nbytes
        header = encode_header(entries, {"format": "pt"})
        name = f"{stem}.safetensors" if len(bins) == 1 else f"{stem}-{number + 1:05d}-of-{len(bins):05d}.safetensors"
        shards.append(Shard(name, header, len(header) + position))
        for t in content:
            placed.append(replace(t, index=len(placed), shard=number, offset=len(header) + entries[t.name][1]))
    return tuple(placed), tuple(shards)
