"""Bytes to numbers and back, against torch, over every value where that is possible."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stockpot.checkpoints.codecs import decode_into, encode_into
from stockpot.specs import DType

TORCH = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.F8_E5M2: torch.float8_e5m2,
}


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("out", [np.float32, np.float64])
def test_decode_is_exact(dtype: DType, out: type) -> None:
    if dtype.itemsize <= 2:
        values = torch.arange(256**dtype.itemsize).to(torch.uint8 if dtype.itemsize == 1 else torch.int32)
        values = (values if dtype.itemsize == 1 else values.to(torch.uint16)).view(TORCH[dtype])
    else:
        values = torch.randn(10000, dtype=TORCH[dtype])
    raw = values.view(torch.uint8).numpy()
    got = np.empty(len(values), out)
    decode_into(raw, dtype, got)
    expected = (values.double() if out is np.float64 else values.float()).numpy()
    np.testing.assert_array_equal(got, expected.astype(out))
    short = np.empty(16, out)
    decode_into(raw[: 16 * dtype.itemsize], dtype, short)
    np.testing.assert_array_equal(short, got[:16])


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16, DType.F8_E4M3, DType.F8_E5M2])
def test_encode_rounds_as_torch_does(dtype: DType) -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 400_000, dtype=np.uint32).view(np.float32)  # every kind of float, NaN included
    halfway = (np.arange(2**16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([bits, halfway, np.float32([0.0, -0.0, np.inf, -np.inf, 448, 464, 465, 480, 1e-8])])
    if dtype is DType.F8_E4M3:
        values = values[np.abs(values) < 464]  # beyond, torch versions differ between NaN and saturation
    got = np.empty(len(values) * dtype.itemsize, np.uint8)
    encode_into(values, dtype, got)
    expected = torch.from_numpy(values.copy()).to(TORCH[dtype])
    ours = torch.from_numpy(got).view(TORCH[dtype])
    both_nan = torch.isnan(ours.float()) & torch.isnan(expected.float())
    same = (ours.view(torch.uint8).reshape(len(values), -1) == expected.view(torch.uint8).reshape(len(values), -1)).all(
        1
    )
    assert bool((same | both_nan).all())


def test_encode_from_float64_rounds_once() -> None:
    values = np.float64([1 + 2**-24 + 2**-40, 1 + 2**-24, 1 - 2**-25 - 2**-40])
    got = np.empty(12, np.uint8)
    encode_into(values, DType.F32, got)
    np.testing.assert_array_equal(got.view(np.float32), values.astype(np.float32))
