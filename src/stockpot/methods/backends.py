"""Linear algebra and a few array operations for numpy arrays and torch tensors alike, for methods on whole matrices.

    xp = backend_of(delta)
    u, s, vt = xp.svd(delta)

A whole-matrix method gets numpy arrays on the CPU and torch tensors where the merge has a device; written with a backend it
serves both. Names and results are numpy's: singular and eigenvalues as `numpy.linalg` gives them, `svd` thin, `eigh` ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

__all__ = ["Backend", "backend_of"]


class Backend(Protocol):
    """What both can do. Arrays are of the backend's own kind; dtypes are named: "float32", "float64"."""

    name: str

    def where(self, condition: Any, x: Any, y: Any, /) -> Any: ...

    def stack(self, arrays: Sequence[Any], axis: int = 0) -> Any: ...

    def concatenate(self, arrays: Sequence[Any], axis: int = 0) -> Any: ...

    def sort(self, x: Any) -> Any:
        """Along the last axis, ascending."""
        ...

    def argsort(self, x: Any) -> Any:
        """The same as places; equal elements in their order."""
        ...

    def svd(self, x: Any, /) -> tuple[Any, ...]:
        """`[..., a, b]` -> U `[..., a, k]`, S `[..., k]` descending, V transposed `[..., k, b]`, k = min(a, b)."""
        ...

    def qr(self, x: Any, /) -> tuple[Any, ...]:
        """`[..., a, b]` -> Q `[..., a, k]`, R `[..., k, b]`."""
        ...

    def eigh(self, x: Any, /) -> tuple[Any, ...]:
        """Symmetric `[..., n, n]` -> eigenvalues `[..., n]` ascending, eigenvectors as columns."""
        ...

    def solve(self, a: Any, b: Any, /) -> Any:
        """x with a x = b: `[..., n, n], [..., n, k] -> [..., n, k]`."""
        ...

    def swap(self, x: Any) -> Any:
        """The last two axes exchanged."""
        ...

    def astype(self, x: Any, dtype: str) -> Any: ...

    def array(self, values: Any, like: Any) -> Any:
        """Numbers as an array of the dtype and device of `like`."""
        ...


class _Shared:
    """What both libraries call alike."""

    name: str
    _lib: Any

    def where(self, condition: Any, x: Any, y: Any, /) -> Any:
        return self._lib.where(condition, x, y)

    def svd(self, x: Any, /) -> tuple[Any, ...]:
        return tuple(self._lib.linalg.svd(x, full_matrices=False))

    def qr(self, x: Any, /) -> tuple[Any, ...]:
        return tuple(self._lib.linalg.qr(x))

    def eigh(self, x: Any, /) -> tuple[Any, ...]:
        return tuple(self._lib.linalg.eigh(x))

    def solve(self, a: Any, b: Any, /) -> Any:
        return self._lib.linalg.solve(a, b)


class _Numpy(_Shared):
    name = "numpy"

    def __init__(self) -> None:
        import numpy as np

        self._lib = np

    def stack(self, arrays: Sequence[Any], axis: int = 0) -> Any:
        return self._lib.stack(arrays, axis)

    def concatenate(self, arrays: Sequence[Any], axis: int = 0) -> Any:
        return self._lib.concatenate(arrays, axis)

    def sort(self, x: Any) -> Any:
        return self._lib.sort(x, axis=-1)

    def argsort(self, x: Any) -> Any:
        return self._lib.argsort(x, axis=-1, kind="stable")

    def swap(self, x: Any) -> Any:
        return self._lib.swapaxes(x, -1, -2)

    def astype(self, x: Any, dtype: str) -> Any:
        return x.astype(dtype, copy=False)

    def array(self, values: Any, like: Any) -> Any:
        return self._lib.asarray(values, dtype=like.dtype)


class _Torch(_Shared):
    name = "torch"

    def __init__(self) -> None:
        import torch

        self._lib = torch

    def stack(self, arrays: Sequence[Any], axis: int = 0) -> Any:
        return self._lib.stack(tuple(arrays), axis)

    def concatenate(self, arrays: Sequence[Any], axis: int = 0) -> Any:
        return self._lib.cat(tuple(arrays), axis)

    def sort(self, x: Any) -> Any:
        return self._lib.sort(x, dim=-1).values

    def argsort(self, x: Any) -> Any:
        return self._lib.argsort(x, dim=-1, stable=True)

    def swap(self, x: Any) -> Any:
        return x.transpose(-1, -2)

    def astype(self, x: Any, dtype: str) -> Any:
        return x.to(getattr(self._lib, dtype))

    def array(self, values: Any, like: Any) -> Any:
        return self._lib.as_tensor(values, dtype=like.dtype, device=like.device)


@cache
def _backend(torch: bool) -> Backend:
    return _Torch() if torch else _Numpy()


def backend_of(x: Any) -> Backend:
    """The backend of an array: torch's for its tensors, numpy's for everything else."""
    return _backend(type(x).__module__.partition(".")[0] == "torch")
