"""Bytes of any float dtype <-> numpy arrays to compute with. One cast on the way out, to nearest even."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from stockpot.specs import DType

__all__ = ["decode_into", "decoded", "encode_into", "encoded"]

Array = np.ndarray[Any, Any]

_PLAIN: dict[DType, Any] = {DType.F64: np.dtype("<f8"), DType.F32: np.dtype("<f4"), DType.F16: np.dtype("<f2")}
_SHIFT = np.uint32(16)
_ONE = np.uint32(1)
_HALF = np.uint32(0x7FFF)


@cache
def _ml_dtype(dtype: DType) -> Any:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, dtype.array))


@cache
def _half_table() -> Array:
    """Every float16 as float32: a lookup is several times faster than numpy's conversion."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


def decode_into(raw: Any, dtype: DType, out: Array) -> None:
    """Little-endian bytes `raw` of `dtype` -> `out` (float32 or float64), exactly."""
    with np.errstate(invalid="ignore"):  # a signalling NaN is quietened, which numpy would warn of
        _decode(raw, dtype, out)


def _decode(raw: Any, dtype: DType, out: Array) -> None:
    if dtype is DType.BF16:
        if out.dtype == np.float32:
            bits = out.view(np.uint32)
            np.copyto(bits, np.frombuffer(raw, np.uint16))
            np.left_shift(bits, _SHIFT, out=bits)
        else:
            np.copyto(out, (np.frombuffer(raw, np.uint16).astype(np.uint32) << _SHIFT).view(np.float32))
    elif dtype is DType.F16 and len(out) > 4096:
        table = _half_table()
        if out.dtype == np.float32:
            np.take(table, np.frombuffer(raw, np.uint16), out=out, mode="clip")
        else:
            np.copyto(out, table[np.frombuffer(raw, np.uint16)])
    elif dtype in _PLAIN:
        np.copyto(out, np.frombuffer(raw, _PLAIN[dtype]), casting="same_kind")
    else:
        np.copyto(out, np.frombuffer(raw, _ml_dtype(dtype)).astype(np.float32))


def decoded(raw: Any, dtype: DType) -> Array:
    """The same in an array of its own: float32, or float64 for float64. Of these two the bytes themselves."""
    if dtype in (DType.F64, DType.F32):
        return np.frombuffer(raw, _PLAIN[dtype])
    out = np.empty(memoryview(raw).nbytes // dtype.itemsize, np.float32)
    decode_into(raw, dtype, out)
    return out


def encoded(values: Array, dtype: DType) -> Array:
    """`values` of any shape -> uint8 `[nbytes]`, rounded once, to nearest even."""
    raw = np.empty(values.size * dtype.itemsize, np.uint8)
    encode_into(np.ascontiguousarray(values).reshape(-1), dtype, raw.data)
    return raw


def encode_into(values: Array, dtype: DType, raw: Any) -> None:
    """`values` (float32 or float64) -> little-endian bytes of `dtype` in the writable buffer `raw`."""
    if dtype is DType.BF16:
        with np.errstate(over="ignore", invalid="ignore"):
            _encode_bf16(values, np.frombuffer(raw, np.uint16))
        return
    target = np.frombuffer(raw, _PLAIN[dtype] if dtype in _PLAIN else _ml_dtype(dtype))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if dtype in _PLAIN:
            np.copyto(target, values, casting="same_kind")
        else:
            target[...] = values.astype(_ml_dtype(dtype))


def _encode_bf16(values: Array, out: Array) -> None:
    """Round to nearest even on the bits: add 0x7fff plus the lowest bit that stays, keep the upper half."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = bits >> _SHIFT
    rounded &= _ONE
    rounded += _HALF
    rounded += bits
    out[...] = rounded.view(np.uint16)[1::2]
    odd = np.isnan(single)
    if odd.any():  # the carry could have turned a NaN into an infinity or a zero
        out[odd] = ((bits[odd] >> _SHIFT) | np.uint32(0x40)).astype(np.uint16)
