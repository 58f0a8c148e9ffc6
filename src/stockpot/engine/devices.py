"""Where the arithmetic runs. Elementwise work and its statistics stay on the CPU, in compiled kernels or numpy: measured on a GPU
it loses to them. What a device is for is whole matrices: methods with Scope.TENSOR get its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from stockpot.checkpoints.codecs import decode_into
from stockpot.errors import ArgumentError
from stockpot.specs import DType

__all__ = ["Device", "NumpyDevice", "TorchDevice", "byte_buffer", "load_block", "open_device", "scratch_block"]


def byte_buffer(size: int) -> memoryview[Any]:
    """Uninitialised memory."""
    return memoryview(np.empty(size, np.uint8).data)


def scratch_block(m: int, n: int, wide: bool, slot: dict[Any, Any]) -> Any:
    """`[m, n]`, float64 when `wide` else float32, of memory that `slot` keeps per thread."""
    scratch = slot.get((m, wide))
    if scratch is None or scratch.size < m * n:
        scratch = slot[m, wide] = np.empty(m * n, np.float64 if wide else np.float32)
    return scratch[: m * n].reshape(m, n)


def load_block(raws: Sequence[Any], dtypes: Sequence[DType], n: int, wide: bool, slot: dict[Any, Any]) -> Any:
    """`m` buffers of n elements -> `[m, n]`, float64 when `wide` else float32. `slot` keeps scratch per thread."""
    out = scratch_block(len(raws), n, wide, slot)
    for i, (raw, dtype) in enumerate(zip(raws, dtypes, strict=True)):
        decode_into(raw, dtype, out[i])
    return out


class Device(Protocol):
    """Takes numpy arrays to where matrices are worked on, and results back."""

    name: str

    def put(self, array: Any) -> Any:
        """A numpy array -> an array of this device, which may share its memory."""
        ...

    def get(self, array: Any) -> Any:
        """An array of this device -> numpy."""
        ...


class NumpyDevice:
    """The CPU."""

    name = "cpu"

    def put(self, array: Any) -> Any:
        return array

    def get(self, array: Any) -> Any:
        return array


class TorchDevice:
    """Any torch device: `cuda`, `cuda:1`, or `cpu` under the name `torch`."""

    def __init__(self, where: str) -> None:
        import torch

        self.torch = torch
        self.name = where
        self.device = torch.device("cpu" if where == "torch" else where)

    def put(self, array: Any) -> Any:
        return self.torch.from_numpy(array).to(self.device)

    def get(self, array: Any) -> Any:
        return array.cpu().numpy() if isinstance(array, self.torch.Tensor) else array


def open_device(name: str) -> Device:
    """`cpu` (numpy), `cuda`, `cuda:N`, `torch` (torch on the CPU), or `auto`: a GPU where there is one.

    Raises ArgumentError when it isn't there.
    """
    if name == "cpu":
        return NumpyDevice()
    if name == "torch":
        return TorchDevice(name)
    if name == "auto":
        return TorchDevice("cuda") if _cuda_is_there() else NumpyDevice()
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdigit()) or name.endswith(":"):
        raise ArgumentError(f"--device {name!r}: expected auto, cpu, cuda, cuda:N or torch")
    import torch

    if not torch.cuda.is_available():
        raise ArgumentError(f"--device {name}: torch {torch.__version__} finds no CUDA device here")
    if number and int(number) >= torch.cuda.device_count():
        raise ArgumentError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return TorchDevice(name)


def _cuda_is_there() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())
