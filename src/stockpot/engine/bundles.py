"""Many pieces in one compiled call, without Python's lock: read, hashed, measured, merged or counted, written.

What the plan knows is laid out once, as arrays; a worker hands over the numbers of the pieces. Where that can't be done
(computed and remote checkpoints, methods without a form, other processors), and whenever a call stops short, Python does the
same piece by piece, and says what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.checkpoints.source import TensorSource
from stockpot.engine.blocks import BlockPool
from stockpot.engine.devices import byte_buffer
from stockpot.engine.gathering import Gathering
from stockpot.engine.kernel import Kernel
from stockpot.engine.ledger import Ledger
from stockpot.engine.masks import mask_key
from stockpot.engine.native import CODES, load_kernels
from stockpot.engine.native.bundles import Bundle, address, run_bundle
from stockpot.engine.sink import Sink
from stockpot.engine.units import aligned
from stockpot.grid import PIECE
from stockpot.methods.declaration import Scope
from stockpot.planning.plan import Action, Operand, Plan, TensorPlan
from stockpot.specs import DType, work_itemsize
from stockpot.statistics import Gram, L1Norms, Rank, SignSum, Statistic
from stockpot.statistics.order import Tally, Window

__all__ = ["Bundles", "Kept"]

_ALL = 2**64 - 1
#: places for what lies inside the windows of a cutoff, for each model
_ROOM = 2**20
_TOTALS: dict[type, str] = {Gram: "gram", L1Norms: "norms", SignSum: "signs"}


@dataclass(frozen=True, slots=True)
class Kept:
    """A piece's inputs in memory, and the place in the pool."""

    place: int
    memory: memoryview[Any]


@dataclass(frozen=True)
class _Kind:
    """What tensors that are worked on together share: dtypes of their inputs, how many are models."""

    dtypes: tuple[DType, ...]
    sizes: Any
    models: int
    has_base: bool
    wide: bool


@dataclass
class Bundles:
    """Does bundles of a plan. kernels: those of its groups."""

    plan: Plan
    sources: Sequence[TensorSource]
    ledger: Ledger
    kernels: Sequence[Kernel]
    sink: Sink
    _fds: Any = None
    _offsets: Any = None
    _kinds: dict[Any, _Kind] = field(default_factory=dict)
    _keys: dict[int, Any] = field(default_factory=dict)

    # what can be done

    def takes(self, t: TensorPlan) -> bool:
        """Whether compiled calls can do tensors of this kind, statistics included."""
        native = load_kernels()
        if native is None or not native.transfers:
            return False
        sources = [self.sources[o.model] for o in t.inputs]
        if any(s.place(o.name) is None for s, o in zip(sources, t.inputs, strict=True)):
            return False
        dtypes = [s.spec(o.name).dtype for s, o in zip(sources, t.inputs, strict=True)]
        if t.action is not Action.MERGE:
            # compiled calls measure no other floats, and NaN must be found in what is copied too
            measured = not t.spec.dtype.is_float or t.spec.dtype in CODES
            return measured and all(d is t.spec.dtype for d in dtypes)
        method = self.plan.groups[t.group].method
        if method.form is None or method.scope is not Scope.ELEMENT or not native.takes([*dtypes, t.spec.dtype]):
            return False
        return all(self._counts(self.plan.stats[i].stat) for i in self.plan.groups[t.group].stats)

    @staticmethod
    def _counts(stat: Statistic) -> bool:
        return type(stat) in _TOTALS or (type(stat) is Rank and stat.of is None and not stat.signed)

    def lay_out(self, native: Any) -> None:
        """Note where every input of these tensors lies, once. native: `[tensors]` booleans. Raises ReadError."""
        tensors = self.plan.tensors
        self._of: list[_Kind | None] = [self._kind(t) if native[t.index] else None for t in tensors]
        width = max((len(t.inputs) for t in tensors), default=1)
        self._fds = np.zeros((len(tensors), width), np.int64)
        self._offsets = np.zeros((len(tensors), width), np.int64)
        for t in (tensors[i] for i in np.flatnonzero(native)):
            places = [self._place(o) for o in t.inputs]
            self._fds[t.index, : len(places)] = [fd for fd, _ in places]
            self._offsets[t.index, : len(places)] = [offset for _, offset in places]
        self._out_offsets = np.array([t.offset for t in tensors], np.int64)
        self._shards = np.array([t.shard for t in tensors], np.int64)

    def _place(self, operand: Operand) -> tuple[int, int]:
        found = self.sources[operand.model].place(operand.name)
        assert found is not None
        return found

    # a bundle

    def _lead(self, rows: Any) -> TensorPlan:
        return self.plan.tensors[int(self.ledger.pieces.tensor[rows[0]])]

    def _kind(self, t: TensorPlan) -> _Kind:
        dtypes = tuple(self.sources[o.model].spec(o.name).dtype for o in t.inputs)
        key = (dtypes, len(t.operands), t.base is None, t.spec.dtype, t.action)
        if key not in self._kinds:
            wide = t.action is Action.MERGE and work_itemsize(t.spec.dtype) == 8
            sizes = np.array([d.itemsize for d in dtypes], np.int64)
            self._kinds[key] = _Kind(dtypes, sizes, len(t.operands), t.base is not None, wide)
        return self._kinds[key]

    def _bundle(self, what: str, rows: Any, slot: dict[Any, Any], start: Any, n: Any) -> Bundle:
        """n elements from `start` on of the tensors of rows, which may also be parts of pieces."""
        tensors = self.ledger.pieces.tensor[rows]
        kind = self._of[tensors[0]]
        assert kind is not None
        used = len(kind.dtypes)
        most = min(int(np.add.reduce(n)), PIECE)
        return Bundle(
            what,
            n,
            start,
            np.ascontiguousarray(self._fds[tensors, :used]),
            self._offsets[tensors, :used] + start[:, None] * kind.sizes,
            kind.dtypes,
            kind.models,
            kind.has_base,
            kind.wide,
            self._buffers(slot, "raw", [most * d.itemsize for d in kind.dtypes]),
            most=most,
        )

    @staticmethod
    def _buffers(slot: dict[Any, Any], key: str, sizes: Sequence[int]) -> list[int]:
        """Addresses of this thread's memory, cut into parts of these sizes."""
        total = sum(map(aligned, sizes))
        held: memoryview[Any] | None = slot.get(key)
        if held is None or len(held) < total:
            slot[key] = held = byte_buffer(max(total, 1))
        at = address(held)
        out = []
        for size in sizes:
            out.append(at)
            at += aligned(size)
        return out

    def _whole(self, kind: str, rows: Any, slot: dict[Any, Any]) -> Bundle:
        pieces = self.ledger.pieces
        start = pieces.start[rows]
        return self._bundle(kind, rows, slot, start, pieces.stop[rows] - start)

    def _dress(self, b: Bundle, rows: Any, kernel: Kernel, known: Mapping[int, Any], slot: dict[Any, Any]) -> None:
        """The form of a group's arithmetic, and the keys of its masks."""
        lead = self._lead(rows)
        b.form = kernel.form_of(known, len(lead.operands))
        if not b.form.masked:
            return
        tensors = self.ledger.pieces.tensor[rows]
        for t in dict.fromkeys(tensors.tolist()):
            if t not in self._keys:
                plan = self.plan.tensors[t]
                keys = [mask_key(self.plan.seed, o.position, plan.name) for o in plan.operands]
                self._keys[t] = np.array([[k & _ALL, k >> 64] for k in keys], np.uint64)
        b.keys = np.stack([self._keys[t] for t in tensors.tolist()])
        b.densities = kernel.group.params[kernel.method.draws[0].keep]  # type: ignore[union-attr, index]
        (b.mask,) = self._buffers(slot, "mask bytes", [len(lead.operands) * b.most])

    def _hold(self, b: Bundle, rows: Any, held: dict[int, Kept] | None) -> None:
        """Tell where inputs are kept already."""
        if not held:
            return
        found = [held.get(row) for row in rows.tolist()]
        b.kept = np.array([0 if k is None else address(k.memory) for k in found], np.uint64)
        b.has = np.array([k is not None for k in found], np.uint8)

    # what is done with it

    def merge(
        self, rows: Any, known: Mapping[int, Any], slot: dict[Any, Any], held: dict[int, Kept] | None
    ) -> tuple[int, list[str]]:
        """(how many pieces were merged or copied and written, warnings)."""
        lead = self._lead(rows)
        native = load_kernels()
        assert native is not None
        b = self._whole("merge" if lead.action is Action.MERGE else "copy", rows, slot)
        tensors = self.ledger.pieces.tensor[rows]
        size = lead.spec.dtype.itemsize
        shards = self._shards[tensors]
        b.out_fds = np.array([self.sink.fd(s) for s in shards.tolist()], np.int64)
        b.out_offsets = self._out_offsets[tensors] + b.start * size
        b.out_dtype, b.rows, b.look, b.ledger = lead.spec.dtype, rows, True, self.ledger.arrays
        self._hold(b, rows, held)
        if lead.action is Action.MERGE:
            self._dress(b, rows, self.kernels[lead.group], known, slot)
            (b.out,) = self._buffers(slot, "out", [b.most * size])
        done = run_bundle(native, b)
        self.sink.wrote(set(shards[:done].tolist()))
        if lead.action is not Action.KEEP:
            return done, []
        differs = b.found["differs"][:done]
        found = [self._differs(rows[place], int(differs[place])) for place in np.flatnonzero(differs).tolist()]
        return done, list(dict.fromkeys(found))

    def _differs(self, row: int, other: int) -> str:
        """A warning that models disagree on a tensor that is not averaged."""
        t = self.plan.tensors[self.ledger.pieces.tensor[row]]
        a, b = (self.plan.inputs[o.model].ref for o in (t.inputs[0], t.inputs[other]))
        return f"{t.name}: {t.spec.dtype} differs between {a} and {b}; taken from {a}"

    def fold(
        self, gathering: Gathering, rows: Any, known: Mapping[int, Any], slot: dict[Any, Any],
        held: dict[int, Kept] | None, pool: BlockPool,
    ) -> int:  # fmt: skip
        """One pass of a statistic over some pieces; how many were done. What is read is kept while there is room."""
        plan = gathering.current
        assert plan is not None
        native = load_kernels()
        assert native is not None
        lead = self._lead(rows)
        kernel = self.kernels[lead.group]
        kind = _TOTALS.get(type(plan.stat), "split")
        b = self._whole(kind, rows, slot)
        if kind in ("norms", "signs"):
            self._dress(b, rows, kernel, {**known, **gathering.results}, slot)
        if kind == "split":
            windows = [w if isinstance(w, Window) else None for w in gathering.seek]
            if len(windows) != b.models:
                raise TypeError(f"statistic {plan.stat.name!r}: {b.models} rows are ranked by {len(windows)} fractions")
            b.low = np.array([1 if w is None else w.low for w in windows], np.uint32)
            b.high = np.array([0 if w is None else w.high for w in windows], np.uint32)
            b.room = _ROOM
        fresh: dict[int, Kept] = {}
        if held is not None:
            for row in rows.tolist():
                if row not in held:
                    room = pool.take()
                    if room is None:
                        break
                    fresh[row] = Kept(*room)
            if fresh or held:
                self._hold(b, rows, {**held, **fresh})
                b.has = np.array([row in held for row in rows.tolist()], np.uint8)
        b.rows, b.ledger = rows, self.ledger.arrays
        done = run_bundle(native, b)
        finished = set(rows[:done].tolist()) if fresh else set()
        for row, kept in fresh.items():
            if row in finished:
                held[row] = kept  # type: ignore[index]
            else:
                pool.give(kept.place)
        if kind == "split":
            found = zip(b.found["below"], b.found["held"], b.found["inside"], strict=True)
            parts = [Tally(int(n), [inside[: int(h)].copy()], int(h)) for n, h, inside in found]
            gathering.add((0, 0), [None if w is None else p for w, p in zip(windows, parts, strict=True)])
        else:
            for row, total in zip(rows[:done].tolist(), b.found["totals"], strict=False):
                gathering.add((int(self.ledger.pieces.tensor[row]), int(self.ledger.pieces.number[row])), total)
        return done

    def sample(self, tensors: Sequence[TensorPlan], count: int, slot: dict[Any, Any]) -> Any:
        """About `count` of what the method sees, `[m, count]`, in short runs from all over these tensors; None on failure."""
        native = load_kernels()
        assert native is not None
        pieces = self.ledger.pieces
        ends = np.cumsum([t.spec.numel for t in tensors])
        total, run = int(ends[-1]), 1024
        runs = max(min(count, total) // run, 1)
        places = np.unique(np.linspace(0, max(total - run, 0), runs).astype(np.int64))
        which = np.searchsorted(ends, places, side="right")
        first = np.array([0, *ends[:-1].tolist()], np.int64)[which]
        start = places - first
        n = np.minimum(run, ends[which] - places)
        parts = []
        keys = np.array([id(self._of[t.index]) for t in tensors])[which]
        for kind in dict.fromkeys(keys.tolist()):
            own = np.flatnonzero(keys == kind)
            rows = pieces.first[np.array([t.index for t in tensors], np.int64)[which[own]]]
            b = self._bundle("sample", rows, slot, np.ascontiguousarray(start[own]), np.ascontiguousarray(n[own]))
            b.room = int(b.n.sum())
            if run_bundle(native, b) < len(b):
                return None
            parts.append(b.found["samples"])
        return np.concatenate(parts, axis=1)

    def advise(self, rows: Any) -> None:
        """Ask the system to read ahead what these pieces need."""
        import os

        if not hasattr(os, "posix_fadvise"):
            return
        pieces, lead = self.ledger.pieces, self._lead(rows)
        first, last = rows[0], rows[-1]
        same = pieces.tensor[first] == pieces.tensor[last]
        start = int(pieces.start[first])
        count = int(pieces.stop[last] if same else lead.spec.numel) - start
        kind = self._of[lead.index]
        assert kind is not None
        places = zip(self._fds[lead.index].tolist(), self._offsets[lead.index].tolist(), kind.dtypes, strict=False)
        for fd, offset, dtype in places:
            os.posix_fadvise(fd, offset + start * dtype.itemsize, count * dtype.itemsize, os.POSIX_FADV_WILLNEED)
