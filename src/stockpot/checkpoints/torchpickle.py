"""A pickle of tensors, read without running any of it: what the reader does not know becomes an inert stand-in."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stockpot.specs import BY_ARRAY, MOST_AXES, DType

__all__ = ["Inert", "PickledTensor", "TensorReader", "Unreadable"]

_STORAGES = {
    "DoubleStorage": DType.F64, "FloatStorage": DType.F32, "HalfStorage": DType.F16, "BFloat16Storage": DType.BF16,
    "Float8_e4m3fnStorage": DType.F8_E4M3, "Float8_e5m2Storage": DType.F8_E5M2, "LongStorage": DType.I64,
    "IntStorage": DType.I32, "ShortStorage": DType.I16, "CharStorage": DType.I8, "ByteStorage": DType.U8,
    "BoolStorage": DType.BOOL,
}  # fmt: skip


class _Sealed:
    """What a pickle may make but not alter."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True, eq=False, slots=True)  # a pickle can make keys of them: their hash must not look into them
class _Storage(_Sealed):
    key: str
    dtype: DType | None
    numel: int


@dataclass(frozen=True, eq=False, slots=True)
class PickledTensor(_Sealed):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Table(dict[Any, Any]):
    """An OrderedDict, without attributes that a pickle could put in the way of its methods."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class Inert:
    """What stands for anything that the reader does not know: takes every call, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class Unreadable(Inert):
    """A tensor of a kind that the reader does not know (sparse, quantised...)."""

    how = ""


class _Named(_Sealed):
    """What stands for a class or function that the reader knows: made anew each time, so that a file can't reach the
    reader's own tables through it.
    """

    __slots__ = ("call", "value")

    def __init__(self, call: Callable[..., Any] | None = None, value: DType | None = None) -> None:
        self.call = call
        self.value = value

    def __call__(self, *args: Any) -> Any:
        return self.call(*args) if self.call is not None else Inert()


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    if not isinstance(storage, _Storage):
        return Inert()
    return PickledTensor(storage, _offset(offset), _sizes(shape), _sizes(stride))


def _sizes(found: Any) -> tuple[int, ...]:
    """A shape or a stride. ValueError for what is none: a long text would be copied for each tensor that names it."""
    if not isinstance(found, (tuple, list)) or len(found) > MOST_AXES or not all(type(n) is int for n in found):
        raise ValueError(f"a shape or stride that is no short list of numbers ({type(found).__name__})")
    return _kept(tuple(found))


@functools.lru_cache(maxsize=4096)
def _kept(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """One tuple for all that are equal: a file can name one list a million times."""
    return sizes


def _offset(found: Any) -> int:
    if type(found) is not int:
        raise ValueError(f"an offset that is no number ({type(found).__name__})")
    return found


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, gradient: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    """Dtypes without a storage class of their own lie in untyped storages."""
    if not isinstance(storage, _Storage):
        return Inert()
    known = dtype.value if isinstance(dtype, _Named) else None
    return PickledTensor(_Storage(storage.key, known, storage.numel), _offset(offset), _sizes(shape), _sizes(stride))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): lambda *args: _Table(),
    ("collections", "defaultdict"): lambda *args: _Table(),
}


#: characters of a class's name, its module's with it
_LONGEST = 512


class TensorReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if len(module) + len(name) > _LONGEST:
            raise ValueError(f"names a class by {len(module) + len(name)} characters")
        if (module, name) in _KNOWN:
            return _Named(_KNOWN[module, name])
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Named(value=_STORAGES[name])
        if module == "torch" and name in BY_ARRAY:
            return _Named(value=BY_ARRAY[name])
        if module.startswith("torch") and name.startswith("_rebuild"):
            return type("Unreadable", (Unreadable,), {"how": f"{module}.{name}"})
        return type("Inert", (Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[2], str):
            dtype = pid[1].value if isinstance(pid[1], _Named) else None
            return _Storage(pid[2], dtype, pid[4] if isinstance(pid[4], int) else -1)
        return Inert()
