"""One streamed pass: inner products, changes and sign conflicts of every tensor's deltas, summed up as one likes."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.devices import byte_buffer, load_block
from stockpot.engine.native import Block, load_kernels
from stockpot.errors import ArgumentError
from stockpot.planning.plan import Action, Plan, TensorPlan

__all__ = ["LARGE", "Diagnosis", "Measured", "measure"]

#: a change beyond it is large: DARE was reported to fail there (arXiv:2311.03099)
LARGE = 0.03
#: elements that are taken in hand at once
_BLOCK = 2**16
#: memory that each thread uses again
_of_thread = threading.local()


@dataclass
class Measured:
    """Sums over some tensors. m models; deltas are theirs minus the base.

    products  [m + 1, m + 1] float64, the lower triangle: inner products of the deltas, and (last) of the base
    changed   [m]  elements that differ from the base; large [m]: by more than LARGE; conflicts: elements that two models or
              more change, not all in one direction; shared: elements that two or more change
    """

    models: int
    elements: int = 0
    tensors: int = 0
    products: Any = None
    changed: Any = None
    large: Any = None
    shared: int = 0
    conflicts: int = 0

    def __post_init__(self) -> None:
        m = self.models
        self.products = np.zeros((m + 1, m + 1)) if self.products is None else self.products
        self.changed = np.zeros(m, np.int64) if self.changed is None else self.changed
        self.large = np.zeros(m, np.int64) if self.large is None else self.large

    def add(self, other: Measured) -> None:
        self.elements += other.elements
        self.tensors += other.tensors
        self.products += other.products
        self.changed += other.changed
        self.large += other.large
        self.shared += other.shared
        self.conflicts += other.conflicts

    def product(self, i: int, j: int) -> float:
        return float(self.products[max(i, j), min(i, j)])

    def norm(self, i: int) -> float:
        """Of model i's delta; of the base for i = m."""
        return math.sqrt(max(self.product(i, i), 0.0))

    def cosine(self, i: int, j: int) -> float | None:
        """Between two deltas; None where one is zero."""
        scale = self.norm(i) * self.norm(j)
        return max(-1.0, min(1.0, self.product(i, j) / scale)) if scale > 0 else None

    def relative(self, i: int) -> float | None:
        """The delta's norm over the base's."""
        base = self.norm(self.models)
        return self.norm(i) / base if base > 0 else None

    def to_base(self, i: int) -> float | None:
        """The cosine between the model's weights and the base's."""
        b = self.models
        along = self.product(i, b) + self.product(b, b)
        scale = math.sqrt(max(self.product(i, i) + self.product(i, b) + along, 0.0)) * self.norm(b)
        return max(-1.0, min(1.0, along / scale)) if scale > 0 else None

    def share(self, count: int) -> float:
        """Of the elements; of none, none."""
        return int(count) / self.elements if self.elements else 0.0

    @property
    def conflict_rate(self) -> float | None:
        """Of the elements that two models or more change, in how many they do not agree on the sign."""
        return self.conflicts / self.shared if self.shared else None

    @property
    def conflict_of_chance(self) -> float:
        """What it is for unrelated tasks that change everything: one half for two models, three quarters for three."""
        return float(1 - 2.0 ** (1 - self.models))

    def as_json(self) -> dict[str, Any]:
        m = range(self.models)
        return {
            "tensors": self.tensors,
            "elements": self.elements,
            "base_norm": self.norm(self.models),
            "delta_norm": [self.norm(i) for i in m],
            "relative_norm": [self.relative(i) for i in m],
            "cosine_to_base": [self.to_base(i) for i in m],
            "cosines": [[self.cosine(i, j) if i != j else 1.0 for j in m] for i in m],
            "unchanged": [1 - int(c) / self.elements if self.elements else None for c in self.changed],
            "large": [int(c) / self.elements if self.elements else None for c in self.large],
            "sign_conflicts": self.conflict_rate,
        }


@dataclass(frozen=True)
class Diagnosis:
    """Measures of every tensor.

    models, base  references as the recipe has them; reference: whether the base is only the first model, for want of one
    equal         pairs of models that are the same to the last bit
    copied        tensors that are not merged: integers, or what the recipe leaves out
    """

    models: tuple[str, ...]
    base: str
    reference: bool
    tensors: dict[str, Measured] = field(repr=False)
    layers: dict[str, tuple[str, int] | None] = field(repr=False)
    equal: tuple[tuple[int, int], ...] = ()
    copied: int = 0
    notes: tuple[str, ...] = ()

    def summed(self, names: Iterable[str] | None = None) -> Measured:
        total = Measured(len(self.models))
        for name in self.tensors if names is None else names:
            total.add(self.tensors[name])
        return total

    def _by(self, key: Callable[[str], Any]) -> dict[Any, Measured]:
        groups: dict[Any, Measured] = {}
        for name, measured in self.tensors.items():
            groups.setdefault(key(name), Measured(len(self.models))).add(measured)
        return groups

    def by_layer(self) -> dict[int | str | None, Measured]:
        """Numbered layers in order, then (None) what lies outside of them. Of several stacks: by `encoder.block.0`, ..."""
        found = self._by(lambda name: self.layers[name])
        several = len({place[0] for place in found if place is not None}) > 1
        ordered = sorted(found, key=lambda place: (place is None, place))
        return {p and (f"{p[0]}.{p[1]}" if several else p[1]): found[p] for p in ordered}

    def by_kind(self) -> dict[str, Measured]:
        """`self_attn.q_proj`, `embed_tokens`, ..."""
        return self._by(lambda name: kind_of(name, self.layers[name]))


def kind_of(name: str, layer: tuple[str, int] | None) -> str:
    """A tensor's name without its layer and `.weight`."""
    return name.removeprefix(f"{layer[0]}.{layer[1]}." if layer else "").removesuffix(".weight")


Progress = Callable[[int, int], None]


def measure(plan: Plan, *, reference: bool = False, threads: int = 2, progress: Progress | None = None) -> Diagnosis:
    """Read every tensor of a plan whose method subtracts a base, once. Raises ReadError.

    reference  whether the base is the first model, for want of one
    """
    every = [t for t in plan.tensors if t.action is Action.MERGE and t.base is not None]
    groups = Counter(tuple(o.model for o in t.operands) for t in every)
    chosen = max(groups, key=lambda key: groups[key], default=())
    merged = [t for t in every if tuple(o.model for o in t.operands) == chosen]
    if not merged:
        raise ArgumentError("diagnose: no tensor is merged from models and a base")
    if 2 * len(merged) < len(every):
        raise ArgumentError(
            "diagnose compares models that are merged with one another: these slices have models of their own"
        )
    models = len(chosen)
    names = tuple(plan.inputs[i].ref for i in chosen)
    base = plan.inputs[merged[0].base.model].ref if merged and merged[0].base is not None else ""
    different: set[tuple[int, int]] = set()
    tensors = {t.name: Measured(models, tensors=1) for t in merged}
    total, done = sum(t.spec.numel for t in merged), 0
    try:
        with ThreadPoolExecutor(max(threads, 1)) as pool:
            parts = _bounded(pool, lambda part: _block(plan, part, models, different), _parts(merged), 4 * threads)
            for (t, start, stop), found in parts:
                tensors[t.name].add(found)
                done += stop - start
                if progress is not None:
                    progress(done, total)
    finally:
        for model in plan.inputs:
            model.checkpoint.close()
    pairs = itertools.combinations(range(models), 2)
    return Diagnosis(
        models=names,
        base=base,
        reference=reference,
        tensors=tensors,
        layers={t.name: t.layer for t in merged},
        equal=tuple(p for p in pairs if p not in different),
        copied=len(plan.tensors) - len(merged),
        notes=plan.notes,
    )


def _parts(merged: Sequence[TensorPlan]) -> Iterator[tuple[TensorPlan, int, int]]:
    for t in merged:
        for start in range(0, t.spec.numel, _BLOCK * 8):
            yield t, start, min(start + _BLOCK * 8, t.spec.numel)


def _bounded(
    pool: ThreadPoolExecutor, work: Callable[[Any], Any], parts: Iterable[Any], most: int
) -> Iterator[tuple[Any, Any]]:
    """(part, result) in order, with a few in hand: sums don't depend on the threads."""
    waiting: list[tuple[Any, Any]] = []
    for part in parts:
        waiting.append((part, pool.submit(work, part)))
        if len(waiting) > most:
            first, future = waiting.pop(0)
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _block(plan: Plan, part: tuple[TensorPlan, int, int], models: int, different: set[tuple[int, int]]) -> Measured:
    """A part of a tensor. different: takes the pairs of models that are not the same in it."""
    t, start, stop = part
    assert t.base is not None
    slot: dict[Any, Any] = vars(_of_thread)
    raws, dtypes = [], []
    for i, operand in enumerate([*t.operands, t.base]):
        source = plan.inputs[operand.model].checkpoint
        dtype = source.spec(operand.name).dtype
        size = (stop - start) * dtype.itemsize
        if len(slot.get(f"raw{i}", b"")) < size:
            slot[f"raw{i}"] = byte_buffer(size)
        raw = slot[f"raw{i}"][:size]
        source.read([ReadRequest(operand.name, start, stop)], raw)
        raws.append(raw)
        dtypes.append(dtype)
    found = Measured(models)
    found.elements = stop - start
    kernels = load_kernels()
    if kernels is not None and kernels.takes(dtypes):
        both, unlike = np.zeros(2, np.int64), np.zeros((models, models), np.uint8)
        for i, j in different.copy():
            unlike[i, j] = 1  # nothing more need be compared
        block = Block(stop - start, raws[:-1], dtypes[:-1], (raws[-1], dtypes[-1]), False)
        kernels.diagnose(block, LARGE, found.products, found.changed, found.large, both, unlike)
        found.shared, found.conflicts = int(both[0]), int(both[1])
        different.update((int(i), int(j)) for i, j in np.argwhere(unlike))
        return found
    scratch: dict[Any, Any] = slot.setdefault("block", {})
    for first in range(0, stop - start, _BLOCK):
        n = min(_BLOCK, stop - start - first)
        parts = [raw[first * d.itemsize : (first + n) * d.itemsize] for raw, d in zip(raws, dtypes, strict=True)]
        with np.errstate(all="ignore"):
            _count(found, load_block(parts, dtypes, n, False, scratch), different)
    return found


def _count(found: Measured, block: Any, different: set[tuple[int, int]]) -> None:
    """block: `[m + 1, n]` float32, the models and the base; it is overwritten."""
    delta = block[:-1]
    for i, j in itertools.combinations(range(len(delta)), 2):
        if (i, j) not in different and not np.array_equal(delta[i], delta[j]):
            different.add((i, j))
    delta -= block[-1]
    for i in range(len(block)):  # a product of thin matrices takes three times as long
        for j in range(i + 1):
            found.products[i, j] += float(np.dot(block[i], block[j]))
    moved = delta != 0
    ups, downs = delta > 0, delta < 0
    for i, row in enumerate(delta):
        found.changed[i] += np.count_nonzero(moved[i])
        found.large[i] += np.count_nonzero(row > np.float32(LARGE)) + np.count_nonzero(row < np.float32(-LARGE))
    if len(delta) > 1:
        up, down, several = ups[0] | ups[1], downs[0] | downs[1], moved[0] & moved[1]
        any_moved = moved[0] | moved[1]
        for i in range(2, len(delta)):
            up |= ups[i]
            down |= downs[i]
            several |= any_moved & moved[i]
            any_moved |= moved[i]
        up &= down
        found.conflicts += int(np.count_nonzero(up))
        found.shared += int(np.count_nonzero(several))
