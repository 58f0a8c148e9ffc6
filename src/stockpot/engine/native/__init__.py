"""The compiled kernels (kernels.c): a plain shared library, built when stockpot is installed, called through ctypes.

Where it is missing (no C compiler at install time, Windows) or switched off (STOCKPOT_NATIVE=0) the numpy code does the
same work: the same bytes, several times slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from stockpot.engine.native.folds import Fold, fold_of
from stockpot.engine.native.tasks import CODES, Block, Task, address, formed
from stockpot.faster import FASTER
from stockpot.methods.declaration import Method
from stockpot.methods.forms import Election, Form
from stockpot.specs import DType
from stockpot.statistics import Statistic

__all__ = ["CODES", "LIBRARY", "Block", "Fold", "Kernels", "Stream", "load_kernels", "numpy_only"]

LIBRARY = os.path.join(os.path.dirname(__file__), "kernels.so.1")
_ABI = 14
_SLACK = 16  # places that the kernel may write past those that count
_ALL = 2**64 - 1


class _Stream(ctypes.Structure):
    """Mirrors Stream in transfer.inc."""

    _fields_ = (
        ("raw", ctypes.c_void_p),
        ("extents", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("itemsize", ctypes.c_int32),
        ("digests", ctypes.c_void_p),
        ("squares", ctypes.c_void_p),
        ("nans", ctypes.c_void_p),
        ("infinities", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Stream:
    """Bytes in memory and where they are in files, one after the other: (open file, offset, bytes)."""

    raw: Any
    dtype: DType
    extents: Sequence[tuple[int, int, int]]


class Kernels:
    """The functions of the library. Every call runs without Python's lock."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.functions = library
        p, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        u32, u64 = ctypes.c_uint32, ctypes.c_uint64
        library.stockpot_combine.argtypes = (p, i32)
        library.stockpot_totals.argtypes = (p, i32, i32, p)
        library.stockpot_signs.argtypes = (p, i32, p)
        library.stockpot_split.argtypes = (p, i32, p, p, p, p, p)
        library.stockpot_select.argtypes = (p, i64, i64, p)
        library.stockpot_select.restype = ctypes.c_uint32
        library.stockpot_spread.argtypes = (p, i32, p)
        library.stockpot_tally.argtypes = (p, i64, i32, u32, u32, p, p)
        library.stockpot_tally.restype = i64
        library.stockpot_see.argtypes = (p, i32, p, p)
        library.stockpot_see.restype = None
        library.stockpot_finish.argtypes = (p, p, i64, i32, i32, p)
        library.stockpot_finish.restype = None
        library.stockpot_deltas.argtypes = (p, i32, p, i64, i64, p)
        library.stockpot_mask.argtypes = (u64, u64, i64, i64, i32, u64, p)
        library.stockpot_mask.restype = None
        library.stockpot_words.argtypes = (u64, u64, i64, i64, p)
        library.stockpot_words.restype = None
        library.stockpot_keys.argtypes = (p, i32, i64, i64, p)
        library.stockpot_keys.restype = None
        library.stockpot_prune.argtypes = (p, p, p, i32, i64, i64, ctypes.c_double, ctypes.c_double, i32, p)
        library.stockpot_prune.restype = None
        library.stockpot_uniform.argtypes = (u64, u64, i64, i64, i32, p)
        library.stockpot_uniform.restype = None
        library.stockpot_diagnose.argtypes = (p, ctypes.c_float, p, p, p, p, p)
        library.stockpot_measure.argtypes = (p, i32, p, i64, p, p, p)
        library.stockpot_measure.restype = None
        library.stockpot_transfer.argtypes = (p, i32, i32, p, i64, p, i64)
        library.stockpot_bundle.argtypes = (p,)
        library.stockpot_bundle.restype = i64
        library.stockpot_allow.argtypes = (i32,)
        library.stockpot_allow.restype = None

    def folds(self, stat: Statistic, method: Method) -> Fold | None:
        """How a statistic of a method is folded here; None where it is not known."""
        found = fold_of(stat)
        if found is None or (found.form and method.form is None):
            return None
        return Fold(found.form, partial(found.fold, self))

    def allow(self, most: int) -> None:
        """Use at most these instructions of the processor: 0 common ones, 1 AVX2, 2 AVX-512. The bytes are the same."""
        self.functions.stockpot_allow(most)

    @staticmethod
    def takes(dtypes: Sequence[DType]) -> bool:
        """Whether these dtypes are among those the kernels read and write."""
        return all(d in CODES for d in dtypes)

    def _task(self, block: Block, form: Form | None, mask: Any) -> tuple[Task, list[Any]]:
        """The task and what must stay alive while it is used."""
        m = len(block.raws)
        raws = (ctypes.c_void_p * m)(*map(address, block.raws))
        dtypes = (ctypes.c_int32 * m)(*(CODES[d] for d in block.dtypes))
        alive: list[Any] = [raws, dtypes, block]
        task = Task(n=block.n, m=m, scale=1.0, raws=ctypes.addressof(raws), dtypes=ctypes.addressof(dtypes))
        if block.base is not None:
            task.base, task.base_dtype = address(block.base[0]), CODES[block.base[1]]
        return formed(task, form, mask, alive), alive

    def combine(self, block: Block, form: Form, mask: Any, out: Any, dtype: DType) -> None:
        """Fill `out` with n elements of `dtype`. mask: booleans `[m, n]` where the form wants them."""
        task, alive = self._task(block, form, mask)
        task.out, task.out_dtype = address(out), CODES[dtype]
        _check(self.functions.stockpot_combine(ctypes.byref(task), block.wide))
        del alive

    def diagnose(
        self, block: Block, large: float, products: Any, changed: Any, beyond: Any, both: Any, different: Any
    ) -> None:
        """Add to arrays what a block comes to: see kernels.c and diagnosis.measuring."""
        task, alive = self._task(block, None, None)
        arrays = (x.ctypes.data for x in (products, changed, beyond, both, different))
        _check(self.functions.stockpot_diagnose(ctypes.byref(task), large, *arrays))
        del alive

    def elect(self, kept: Any, weight: Sequence[float], election: Election, out: Any) -> None:
        """Of arrays `[m, n]`, float32 or float64, into `out` `[n]` of that dtype: see methods.ties.disjoint_merge."""
        dtype = DType.F64 if kept.itemsize == 8 else DType.F32
        raws = [row.view(np.uint8).data for row in kept]
        block = Block(kept.shape[1], raws, [dtype] * len(raws), None, kept.itemsize == 8)
        self.combine(block, Form(tuple(weight), election=election), None, out.view(np.uint8).data, dtype)

    def totals(self, kind: str, block: Block, form: Form | None, mask: Any, total: Any) -> Any:
        """`total` (float64 `[k]`, or None for zeros) plus the terms of the block: kind "gram" (products of each two models, by
        rows of the upper triangle), "norms", "energies", "varying" or "signs".
        """
        task, alive = self._task(block, form, mask)
        m = task.m
        k = {"gram": m * (m + 1) // 2, "norms": 2 * m, "energies": m + 1, "varying": 1, "signs": 1}[kind]
        out = np.zeros(k) if total is None else np.array(total, np.float64)
        if kind == "signs":
            status = self.functions.stockpot_signs(ctypes.byref(task), block.wide, out.ctypes.data)
        else:
            number = ("gram", "norms", "energies", "varying").index(kind)
            status = self.functions.stockpot_totals(ctypes.byref(task), block.wide, number, out.ctypes.data)
        _check(status)
        del alive
        return out

    def see(self, block: Block, out: Any, base: Any) -> None:
        """Fill `out` `[m, n]` with what the method sees of the block, and `base` `[n]` (None where there is none)."""
        task, alive = self._task(block, None, None)
        self.functions.stockpot_see(
            ctypes.byref(task), block.wide, out.ctypes.data, None if base is None else base.ctypes.data
        )
        del alive

    def finish(self, result: Any, base: Any, dtype: DType, out: Any) -> None:
        """Fill `out` with n elements of `dtype`: result, float32 or float64, and base (None: there is none) added up."""
        start = None if base is None else base.ctypes.data
        wide = result.itemsize == 8
        self.functions.stockpot_finish(result.ctypes.data, start, len(result), wide, CODES[dtype], address(out))

    def deltas(self, block: Block, starts: Sequence[int], run: int) -> Any:
        """`[m, len(starts) * run]`: what the method sees of runs of elements of the block; float64 where it is wide."""
        task, alive = self._task(block, None, None)
        places = np.array(starts, np.int64)
        out = np.empty((task.m, len(places) * run), np.float64 if block.wide else np.float32)
        pointer = ctypes.byref(task)
        _check(
            self.functions.stockpot_deltas(pointer, block.wide, places.ctypes.data, len(places), run, out.ctypes.data)
        )
        del alive
        return out

    def split(self, block: Block, windows: Sequence[tuple[int, int] | None]) -> list[tuple[int, Any]]:
        """For each model (how many magnitudes' bit patterns lie below its window [low, high), those inside it).

        A window of None passes the model over.
        """
        task, alive = self._task(block, None, None)
        m = len(windows)
        if m != len(block.raws):
            raise TypeError(f"{len(block.raws)} models and {m} windows")
        low = np.array([1 if w is None else w[0] for w in windows], np.uint32)
        high = np.array([0 if w is None else w[1] for w in windows], np.uint32)
        below, held = np.zeros(m, np.int64), np.zeros(m, np.int64)
        inside = np.empty((m, block.n + _SLACK), np.uint32)
        pointers = (x.ctypes.data for x in (low, high, below, inside, held))
        _check(self.functions.stockpot_split(ctypes.byref(task), block.wide, *pointers))
        del alive
        return [(int(below[i]), inside[i, : int(held[i])].copy()) for i in range(m)]

    def select(self, values: Any, rank: int) -> int:
        """The value of this rank (from 0) among uint32, as `numpy.partition` would find it."""
        scratch = np.empty(len(values) + 1, np.uint32)
        return int(self.functions.stockpot_select(values.ctypes.data, len(values), rank, scratch.ctypes.data))

    def spread(self, block: Block) -> Any:
        """How much the models differ in each element, float32 `[n]`: see methods.selection.spread."""
        task, alive = self._task(block, None, None)
        out = np.empty(block.n, np.float32)
        _check(self.functions.stockpot_spread(ctypes.byref(task), block.wide, out.ctypes.data))
        del alive
        return out

    def tally(self, low: int, high: int, values: Any, signed: bool) -> tuple[int, Any]:
        """(how many patterns of the float32 `values` lie below the window [low, high), those inside it): see order.tally."""
        out = np.empty(len(values) + _SLACK, np.uint32)
        below = ctypes.c_int64()
        pointers = out.ctypes.data, ctypes.byref(below)
        held = self.functions.stockpot_tally(values.ctypes.data, len(values), signed, low, high - low, *pointers)
        return below.value, out[:held].copy()

    def measure(self, raw: Any, dtype: DType, edges: Sequence[int]) -> Iterator[tuple[float, int, int]]:
        """(sum of squares, count of NaN, of infinities) of each range between neighbouring `edges`."""
        k = len(edges) - 1
        counts = ctypes.c_int64 * k
        squares, nans, infinities = (ctypes.c_double * k)(), counts(), counts()
        places = (ctypes.c_int64 * (k + 1))(*edges)
        self.functions.stockpot_measure(address(raw), CODES[dtype], places, k, squares, nans, infinities)
        return zip(squares, nans, infinities, strict=True)

    @property
    def transfers(self) -> bool:
        """Whether `transfer` works here, and is faster than its parts."""
        return bool(self.functions.stockpot_transfers())

    def transfer(
        self, streams: Sequence[Stream], pieces: Sequence[int], edges: Sequence[int], *, look: bool, write: bool
    ) -> list[tuple[list[bytes], list[tuple[float, int, int]]]] | None:
        """Read every stream, or write it. Of each, where asked to look: the BLAKE3 digests of the ranges between neighbouring
        `pieces` (elements), and what `measure` finds between `edges`, nothing where it doesn't know the dtype.

        None when a file did not give or take all of it, or there is no memory for scratch.
        """
        n, k = len(pieces) - 1, len(edges) - 1
        doubles, counts = ctypes.c_double * k, ctypes.c_int64 * k
        tasks = (_Stream * len(streams))()
        found = []
        for task, s in zip(tasks, streams, strict=True):
            extents = (ctypes.c_int64 * (3 * len(s.extents)))(*itertools.chain.from_iterable(s.extents))
            digests, known = (ctypes.c_char * (32 * n))(), (doubles(), counts(), counts())
            found.append((extents, digests, known))
            task.raw, task.extents, task.count = address(s.raw), ctypes.addressof(extents), len(s.extents)
            task.dtype, task.itemsize = CODES.get(s.dtype, -1), s.dtype.itemsize
            if look:
                task.digests = ctypes.addressof(digests)
                task.squares, task.nans, task.infinities = (ctypes.addressof(x) for x in known)
        whole, parts = (ctypes.c_int64 * (n + 1))(*pieces), (ctypes.c_int64 * (k + 1))(*edges)
        if self.functions.stockpot_transfer(tasks, len(streams), write, whole, n, parts, k):
            return None
        if not look:
            return []
        out = []
        for s, (_, digests, known) in zip(streams, found, strict=True):
            raw = digests.raw
            measures = list(zip(*known, strict=True)) if s.dtype in CODES else []
            out.append(([raw[i : i + 32] for i in range(0, 32 * n, 32)], measures))
        return out

    def mask(self, key: int, start: int, whole: int, rest: int, out: Any) -> None:
        """Fill the booleans `out` with those of elements start, start + 1, ...: see masks.MaskStream."""
        self.functions.stockpot_mask(key & _ALL, key >> 64, start, len(out), whole, rest, out.ctypes.data)

    def words(self, key: int, start: int, out: Any) -> None:
        """Fill the uint64 `out` with words start, start + 1, ... of a stream: see masks.MaskStream."""
        self.functions.stockpot_words(key & _ALL, key >> 64, start, len(out), out.ctypes.data)

    def uniform(self, key: int, start: int, out: Any) -> None:
        """Fill `out`, float32 or float64, with numbers from 0 to 1 by words start, start + 1, ...: see engine.draws."""
        self.functions.stockpot_uniform(key & _ALL, key >> 64, start, len(out), out.itemsize == 8, out.ctypes.data)

    def prune(self, delta: Any, uniform: Any, low: float, step: float, inverse: bool, out: Any) -> None:
        """Of contiguous rows `[rows, n]`: see methods.pruned, which this does the work of."""
        rows, n = delta.shape
        keys = np.empty(delta.shape, np.uint64)
        wide = delta.itemsize == 8
        self.functions.stockpot_keys(delta.ctypes.data, wide, rows, n, keys.ctypes.data)
        keys.sort(axis=-1)  # numpy's is in vectors
        where = keys.ctypes.data, delta.ctypes.data, uniform.ctypes.data
        self.functions.stockpot_prune(*where, wide, rows, n, low, step, inverse, out.ctypes.data)


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory for a kernel's scratch")


_off: list[bool] = []


def load_kernels() -> Kernels | None:
    """The kernels, or None where there are none."""
    return None if _off else _loaded()


@contextlib.contextmanager
def numpy_only() -> Iterator[None]:
    """Within it numpy does the kernels' work, in all threads: for tests, which hold the two to the same bytes."""
    _off.append(True)
    _use(None)
    try:
        yield
    finally:
        _off.pop()
        _use(load_kernels())


@cache
def _loaded() -> Kernels | None:
    if os.environ.get("STOCKPOT_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(LIBRARY)
        if library.stockpot_abi() != _ABI:
            return None
        kernels = Kernels(library)
    except (OSError, AttributeError):
        return None
    _use(kernels)
    return kernels


def _use(kernels: Kernels | None) -> None:
    """Statistics and methods have functions of their own that kernels do faster, to the same bytes."""
    FASTER.clear()
    if kernels is not None:
        FASTER.update(pick=kernels.select, tally=kernels.tally, elect=kernels.elect, prune=kernels.prune)
