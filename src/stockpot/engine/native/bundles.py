"""Many pieces in one compiled call: the Python side of bundle.inc."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from stockpot.engine.native.tasks import CODES, task_of
from stockpot.specs import DType

if TYPE_CHECKING:
    from stockpot.engine.native import Kernels
    from stockpot.methods.forms import Form

__all__ = ["KINDS", "Bundle", "run_bundle"]

#: what is done with the pieces; the numbers of bundle.inc
KINDS = {"merge": 0, "copy": 1, "sample": 2, "split": 3, "gram": 4, "norms": 5, "signs": 6}
_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Bundle(ctypes.Structure):
    """Mirrors Bundle in bundle.inc."""

    _fields_ = (
        ("count", _I64), ("inputs", _I64), ("kind", _I64), ("wide", _I64), ("dtypes", _P), ("sizes", _P), ("n", _P),
        ("start", _P), ("fds", _P), ("offsets", _P), ("out_fds", _P), ("out_offsets", _P), ("rows", _P), ("kept", _P),
        ("has", _P), ("raws", _P), ("out", _P), ("mask", _P), ("out_dtype", _I32), ("out_size", _I32), ("look", _I32),
        ("unused", _I32), ("task", _P), ("keys", _P), ("whole", _P), ("rest", _P), ("pieces", _I64), ("digests", _P),
        ("squares", _P), ("nans", _P), ("infinities", _P), ("differs", _P), ("totals", _P), ("terms", _I64), ("low", _P),
        ("high", _P), ("below", _P), ("held", _P), ("inside", _P), ("room", _I64), ("samples", _P),
    )  # fmt: skip


@dataclass
class Bundle:
    """Pieces of tensors whose inputs have the same dtypes and that are merged by the same form. Arrays are int64, C order.

    n, start     [count]          elements; the first one's place in its tensor
    fds, offsets [count, inputs]  where each input's bytes lie: open file, byte
    out_fds, out_offsets [count]  where the output's go
    rows         [count]          the ledger's
    kept         [count]          addresses of memory with (`has`) or for the inputs, 0: none
    buffers      of each input, addresses of room for a group; `out`, `mask` likewise
    most         elements that the buffers have room for
    ledger       the arrays of engine.ledger.Ledger: digests, squares, nans, infinities
    """

    kind: str
    n: Any
    start: Any
    fds: Any
    offsets: Any
    dtypes: Sequence[DType]
    models: int
    has_base: bool
    wide: bool
    buffers: Sequence[int]
    out: int = 0
    mask: int = 0
    out_dtype: DType | None = None
    out_fds: Any = None
    out_offsets: Any = None
    rows: Any = None
    kept: Any = None
    has: Any = None
    look: bool = False
    form: Form | None = None
    keys: Any = None
    densities: Sequence[float] = ()
    ledger: Sequence[Any] = ()
    # what statistics look for, and what is found
    low: Any = None
    high: Any = None
    room: int = 0
    most: int = 0
    found: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.n)


def address(array: Any) -> int:
    """Where a writable buffer begins; `ndarray.ctypes` takes ten times longer to tell."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array)) if len(array) else 0


@cache
def _codes(dtypes: tuple[DType, ...]) -> tuple[Any, Any]:
    """What bundle.inc knows dtypes by, and the bytes of each."""
    return np.array([CODES.get(d, -1) for d in dtypes], np.int32), np.array([d.itemsize for d in dtypes], np.int32)


def run_bundle(kernels: Kernels, b: Bundle) -> int:
    """Do it; how many pieces were done (see bundle.inc). What statistics come to is in `b.found`."""
    count, inputs = len(b), len(b.dtypes)
    alive: list[Any] = []

    def at(array: Any) -> int | None:
        if array is None:
            return None
        alive.append(array)
        return address(array)

    codes, sizes = _codes(tuple(b.dtypes))
    raws = np.array(b.buffers, np.uint64)
    task, more = task_of(b.models, b.form)
    alive.append(more)
    task.base = 1 if b.has_base else None
    c = _Bundle(
        count=count, inputs=inputs, kind=KINDS[b.kind], wide=b.wide, dtypes=at(codes), sizes=at(sizes), n=at(b.n),
        start=at(b.start), fds=at(b.fds), offsets=at(b.offsets), out_fds=at(b.out_fds), out_offsets=at(b.out_offsets),
        rows=at(b.rows), kept=at(b.kept), has=at(b.has), raws=at(raws), out=b.out, mask=b.mask, look=b.look,
        task=ctypes.addressof(task),
    )  # fmt: skip
    if b.out_dtype is not None:
        c.out_dtype, c.out_size = CODES.get(b.out_dtype, -1), b.out_dtype.itemsize
    if b.keys is not None:
        exact = [min(max(d, 0.0), 1.0) * 256 for d in b.densities]
        whole = np.array([int(e) for e in exact], np.int32)
        rest = np.array([int((e - int(e)) * 2**64) for e in exact], np.uint64)
        c.keys, c.whole, c.rest = at(b.keys), at(whole), at(rest)
    if b.ledger:
        digests, squares, nans, infinities = b.ledger
        c.pieces = squares.shape[1]
        c.digests, c.squares, c.nans, c.infinities = at(digests), at(squares), at(nans), at(infinities)
    if b.kind == "copy":
        b.found["differs"] = np.zeros(count, np.int32)
        c.differs = at(b.found["differs"])
    elif b.kind in ("gram", "norms", "signs"):
        terms = {"gram": b.models * (b.models + 1) // 2, "norms": 2 * b.models, "signs": 1}[b.kind]
        b.found["totals"] = np.zeros((count, terms))
        c.totals, c.terms = at(b.found["totals"]), terms
    elif b.kind == "sample":
        b.found["samples"] = np.empty((b.models, b.room), np.float64 if b.wide else np.float32)
        c.samples, c.room = at(b.found["samples"]), b.room
    elif b.kind == "split":
        b.found |= {
            "below": np.zeros(b.models, np.int64),
            "held": np.zeros(b.models, np.int64),
            "inside": np.empty((b.models, b.room), np.uint32),
        }
        c.low, c.high, c.room = at(b.low), at(b.high), b.room
        c.below, c.held, c.inside = (at(b.found[k]) for k in ("below", "held", "inside"))
    return int(kernels.functions.stockpot_bundle(ctypes.byref(c)))
