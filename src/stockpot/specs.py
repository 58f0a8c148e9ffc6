"""What is known of a tensor without reading it: dtype, shape, sizes. Imports nothing heavy."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass, field

from stockpot.errors import ArgumentError, nearest

__all__ = ["DType", "Shape", "TensorSpec", "format_count", "format_size", "parse_dtype", "parse_size", "work_itemsize"]

Shape = tuple[int, ...]

#: dimensions of a tensor, and characters of its name, at most: far more than any model has
MOST_AXES = 64
MOST_NAME = 1024


class DType(enum.Enum):
    """A dtype of the safetensors format: its name there, bytes per element, whether it can be averaged, and the name that
    torch, numpy and configs have for it.
    """

    F64 = ("F64", 8, True, "float64")
    F32 = ("F32", 4, True, "float32")
    F16 = ("F16", 2, True, "float16")
    BF16 = ("BF16", 2, True, "bfloat16")
    F8_E4M3 = ("F8_E4M3", 1, True, "float8_e4m3fn")
    F8_E5M2 = ("F8_E5M2", 1, True, "float8_e5m2")
    I64 = ("I64", 8, False, "int64")
    I32 = ("I32", 4, False, "int32")
    I16 = ("I16", 2, False, "int16")
    I8 = ("I8", 1, False, "int8")
    U64 = ("U64", 8, False, "uint64")
    U32 = ("U32", 4, False, "uint32")
    U16 = ("U16", 2, False, "uint16")
    U8 = ("U8", 1, False, "uint8")
    BOOL = ("BOOL", 1, False, "bool")

    def __init__(self, label: str, itemsize: int, is_float: bool, array: str) -> None:
        self.label = label
        self.itemsize = itemsize
        self.is_float = is_float
        self.array = array

    def __str__(self) -> str:
        return self.label


def work_itemsize(out: DType) -> int:
    """Bytes of a number while computing: float64 for float32 and float64 outputs, float32 for narrower ones."""
    return 8 if out.itemsize >= 4 else 4


BY_LABEL = {d.label: d for d in DType}

#: by the names that torch and numpy have for them
BY_ARRAY = {d.array: d for d in DType}

_ALIASES = {d.array: d for d in DType if d.is_float} | {
    "double": DType.F64, "float": DType.F32, "half": DType.F16, "fp32": DType.F32, "fp16": DType.F16, "bf16": DType.BF16,
}  # fmt: skip


def parse_dtype(text: str) -> DType:
    """`bfloat16`, `torch.float32`, `F16`... -> DType. Raises ArgumentError for anything else."""
    key = text.strip().removeprefix("torch.")
    found = _ALIASES.get(key.lower())
    if found is None:
        raise ArgumentError(
            f"unknown dtype {text!r}: expected one of {', '.join(d.array for d in DType if d.is_float)}"
            + nearest(key.lower(), _ALIASES)
        )
    return found


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """dtype and shape of one tensor; `numel` elements in `nbytes` bytes."""

    dtype: DType
    shape: Shape
    numel: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numel", math.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str | int) -> int:
    """Bytes from `5GB` (10^9), `512MiB` (2^20), `4096`. Raises ArgumentError."""
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ArgumentError(f"expected a size such as 512MiB or 5GB, got {text!r}")
    if isinstance(text, int):
        value = text
    else:
        bare = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[bB]\s*", text)
        if bare:  # mergekit's 5B are parameters
            raise ArgumentError(
                f"{text!r}: which unit is meant? Sizes are in bytes here: {bare[1]}GB for 10^9 of them, {bare[1]} for so many "
                "bytes; a number of parameters, as mergekit's 5B, is not understood"
            )
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
        if not match or match[2] == "I":
            raise ArgumentError(f"expected a size such as 512MiB or 5GB, got {text!r}")
        value = int(min(float(match[1]), 1e15) * _UNITS[match[2]])
    if value <= 0:
        raise ArgumentError(f"a size must be positive, got {text!r}")
    return value


def format_size(n: float) -> str:
    """`1.81 GB`: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def format_count(n: float) -> str:
    """`1.24 B` parameters."""
    for unit in ("", " K", " M", " B", " T"):
        if abs(n) < 1000 or unit == " T":
            return f"{n:.0f}" if not unit else f"{n:.3g}{unit}"
        n /= 1000
    raise AssertionError("unreachable")
