"""Tensors that are already in memory, served like a checkpoint on disk: for notebooks and tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stockpot.checkpoints.source import ReadRequest, TensorSource
from stockpot.errors import CheckpointError
from stockpot.specs import BY_ARRAY, DType, TensorSpec

__all__ = ["MemorySource"]


class MemorySource(TensorSource):
    """A TensorSource over a mapping of names to torch tensors or numpy arrays."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._bytes: dict[str, memoryview[Any]] = {}
        self._specs: dict[str, TensorSpec] = {}
        for name, value in tensors.items():
            dtype, raw = _raw(name, value)
            self._specs[name] = TensorSpec(dtype, tuple(int(d) for d in value.shape))
            self._bytes[name] = raw

    def __getstate__(self) -> dict[str, Any]:
        return {"_specs": self._specs, "_bytes": {name: bytes(raw) for name, raw in self._bytes.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._specs = state["_specs"]
        self._bytes = {name: memoryview(raw) for name, raw in state["_bytes"].items()}

    def names(self) -> Iterable[str]:
        return self._specs.keys()

    def spec(self, name: str) -> TensorSpec:
        return self._specs[name]

    def read(self, requests: Sequence[ReadRequest], buffer: memoryview[Any]) -> None:
        position = 0
        for r in requests:
            size = self._specs[r.name].dtype.itemsize
            part = self._bytes[r.name][r.start * size : r.stop * size]
            buffer[position : position + len(part)] = part
            position += len(part)


def _raw(name: str, value: Any) -> tuple[DType, memoryview[Any]]:
    import numpy as np

    dtype = BY_ARRAY.get(str(getattr(value, "dtype", "")).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"{name!r}: expected a torch tensor or numpy array of a known dtype, got {type(value)}")
    if hasattr(value, "detach"):  # a torch tensor: reinterpret, since numpy knows no bfloat16
        import torch

        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel() == 1:  # which counts as contiguous whatever its stride
            flat = flat.clone(memory_format=torch.contiguous_format)
        array = flat.view(torch.uint8).numpy()
    else:
        array = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return dtype, memoryview(array)
