"""Where the arithmetic runs: compiled kernels and numpy on the CPU, torch on a GPU or anything else.

Both run the same method functions. Elementwise results are the same bits: each step is one IEEE operation on either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from stockpot.checkpoints.codecs import decode_into, encode_into
from stockpot.engine.native import Kernels, load_kernels
from stockpot.errors import ArgumentError
from stockpot.specs import DType

__all__ = ["Device", "NumpyDevice", "TorchDevice", "byte_buffer", "open_device"]


def byte_buffer(size: int) -> memoryview[Any]:
    """Uninitialised memory."""
    return memoryview(np.empty(size, np.uint8).data)


class Device(Protocol):
    """Loads raw bytes as arrays `[m, n]` to compute with, and stores results."""

    name: str
    #: compiled kernels that work on this device's memory
    kernels: Kernels | None
    #: whether it rather computes a whole unit at once than what fits into a core's cache
    whole_units: bool

    def memory(self, size: int) -> memoryview[Any]:
        """Uninitialised memory of the host, of the kind that this device copies from and to without waiting."""
        ...

    def working(self) -> contextlib.AbstractContextManager[Any]:
        """What a thread computes within."""
        ...

    def settle(self) -> None:
        """Wait until what this thread has stored is there."""
        ...

    def load(self, raws: Sequence[Any], dtypes: Sequence[DType], n: int, wide: bool, slot: dict[Any, Any]) -> Any:
        """`m` buffers of n elements -> `[m, n]`, float64 when `wide` else float32. `slot` keeps scratch per thread."""
        ...

    def store(self, values: Any, dtype: DType, raw: Any) -> None:
        """`[n]` -> bytes of `dtype` in `raw`, one rounding."""
        ...

    def masks(self, masks: Any) -> Any:
        """numpy booleans -> this device."""
        ...

    def to_numpy(self, values: Any) -> Any:
        """An array of this device -> numpy."""
        ...


class NumpyDevice:
    """The CPU: compiled kernels for what they know, numpy for the rest."""

    name = "cpu"
    whole_units = False

    def __init__(self) -> None:
        self.kernels = load_kernels()

    def memory(self, size: int) -> memoryview[Any]:
        return byte_buffer(size)

    def working(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def settle(self) -> None:
        pass

    def load(self, raws: Sequence[Any], dtypes: Sequence[DType], n: int, wide: bool, slot: dict[Any, Any]) -> Any:
        m = len(raws)
        scratch = slot.get((m, wide))
        if scratch is None or scratch.size < m * n:
            scratch = slot[m, wide] = np.empty(m * n, np.float64 if wide else np.float32)
        out = scratch[: m * n].reshape(m, n)
        for i, (raw, dtype) in enumerate(zip(raws, dtypes, strict=True)):
            decode_into(raw, dtype, out[i])
        return out

    def store(self, values: Any, dtype: DType, raw: Any) -> None:
        encode_into(values, dtype, raw)

    def masks(self, masks: Any) -> Any:
        return masks

    def to_numpy(self, values: Any) -> Any:
        return values


class TorchDevice:
    """Any torch device: `cuda`, `cuda:1`, or `cpu` under the name `torch`.

    On a GPU every thread has a stream of its own and page-locked buffers, so that the copies of one thread and the
    arithmetic of another go on together; a thread waits once a unit, for its output.
    """

    def __init__(self, where: str) -> None:
        import torch

        self.torch = torch
        self.kernels: Kernels | None = None
        self.name = where
        self.device = torch.device("cpu" if where == "torch" else where)
        self.whole_units = self.device.type == "cuda"
        self.dtypes = {
            DType.F64: torch.float64,
            DType.F32: torch.float32,
            DType.F16: torch.float16,
            DType.BF16: torch.bfloat16,
            DType.F8_E4M3: torch.float8_e4m3fn,
            DType.F8_E5M2: torch.float8_e5m2,
        }

    def load(self, raws: Sequence[Any], dtypes: Sequence[DType], n: int, wide: bool, slot: dict[Any, Any]) -> Any:
        torch = self.torch
        out = torch.empty((len(raws), n), dtype=torch.float64 if wide else torch.float32, device=self.device)
        for i, (raw, dtype) in enumerate(zip(raws, dtypes, strict=True)):
            if n:
                # in its own dtype: fewer bytes to copy
                out[i] = torch.frombuffer(raw, dtype=self.dtypes[dtype]).to(self.device, non_blocking=True)
        return out

    def store(self, values: Any, dtype: DType, raw: Any) -> None:
        if values.numel():
            if dtype in (DType.F8_E4M3, DType.F8_E5M2):  # one rounding rule for all devices
                encode_into(values.cpu().numpy(), dtype, raw)
            else:
                host = self.torch.frombuffer(raw, dtype=self.dtypes[dtype])
                host.copy_(values.to(self.dtypes[dtype]), non_blocking=True)

    def memory(self, size: int) -> memoryview[Any]:
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # no more memory may be locked: copies from other memory wait
                return memoryview(self.torch.empty(size, dtype=self.torch.uint8, pin_memory=True).numpy().data)
        return byte_buffer(size)

    def working(self) -> contextlib.AbstractContextManager[Any]:
        cuda = self.torch.cuda
        return cuda.stream(cuda.Stream(self.device)) if self.device.type == "cuda" else contextlib.nullcontext()

    def settle(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.current_stream(self.device).synchronize()

    def masks(self, masks: Any) -> Any:
        return self.torch.from_numpy(masks).to(self.device)

    def to_numpy(self, values: Any) -> Any:
        return values.cpu().numpy()


def open_device(name: str) -> Device:
    """`cpu` (numpy), `cuda`, `cuda:N`, or `torch` (torch on the CPU). Raises ArgumentError when it isn't there."""
    if name == "cpu":
        return NumpyDevice()
    if name == "torch":
        return TorchDevice(name)
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdigit()) or name.endswith(":"):
        raise ArgumentError(f"--device {name!r}: expected cpu, cuda, cuda:N or torch")
    import torch

    if not torch.cuda.is_available():
        raise ArgumentError(f"--device {name}: torch {torch.__version__} finds no CUDA device here")
    if number and int(number) >= torch.cuda.device_count():
        raise ArgumentError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return TorchDevice(name)
