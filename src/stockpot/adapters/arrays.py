"""Raw bytes of a checkpoint <-> numpy arrays, and factors loaded whole with the digests of what was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stockpot.adapters.peft import Adapter, LowRank
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.codecs import decoded
from stockpot.checkpoints.source import ReadRequest
from stockpot.methods.factors import Factors, stacked
from stockpot.specs import TensorSpec

__all__ = ["averaged", "factors_of", "load_factors", "load_tensor", "stacked_factors"]

Array = np.ndarray[Any, Any]


def load_tensor(checkpoint: Checkpoint, name: str) -> Array:
    """A whole tensor, float32 or float64, of its own shape."""
    spec: TensorSpec = checkpoint.spec(name)
    raw = np.empty(spec.nbytes, np.uint8)
    checkpoint.read([ReadRequest(name, 0, spec.numel)], raw.data)
    return decoded(raw, spec.dtype).reshape(spec.shape)


def load_factors(adapter: Adapter, module: str) -> tuple[Array, Array]:
    """(A [rank, in], B [out, rank]) of one module; kernels of convolutions flattened."""
    m = adapter.modules[module]
    a, b = load_tensor(adapter.checkpoint, m.a), load_tensor(adapter.checkpoint, m.b)
    return a.reshape(len(a), -1), b.reshape(len(b), -1)


def factors_of(adapter: Adapter, m: LowRank | None, sides: tuple[int, int]) -> Factors:
    """What a method on factors gets of one adapter: of one that does not adapt the module, factors of rank 0."""
    if m is None:
        return Factors(np.zeros((0, sides[0]), np.float32), np.zeros((sides[1], 0), np.float32))
    a, b = load_factors(adapter, m.module)
    bias = None if m.bias is None else load_tensor(adapter.checkpoint, m.bias)
    return Factors(a, b, m.scale, bias)


def stacked_factors(adapters: Sequence[Adapter], weights: Sequence[float], module: str) -> tuple[Array, Array]:
    """(A, B) of one module of all adapters, weighted and stacked: B A is the weighted sum of the products."""
    pairs = zip(weights, adapters, strict=True)
    return stacked([(w * adapter.modules[module].scale, *load_factors(adapter, module)) for w, adapter in pairs])


def averaged(adapters: Sequence[Adapter], weights: Sequence[float], name: str, start: int, stop: int) -> Array:
    """Elements start..stop of the weighted sum of a plain tensor, float64."""
    total: Array = np.zeros(stop - start)
    for weight, adapter in zip(weights, adapters, strict=True):
        dtype = adapter.checkpoint.spec(name).dtype
        raw = np.empty((stop - start) * dtype.itemsize, np.uint8)
        adapter.checkpoint.read([ReadRequest(name, start, stop)], raw.data)
        total += weight * decoded(raw, dtype).astype(np.float64)
    return total
