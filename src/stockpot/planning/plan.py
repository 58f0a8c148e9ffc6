"""The plan: everything resolved before a byte is written. Pure data, except that inputs are open checkpoints."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint, FilePart
from stockpot.methods.declaration import Method, Scope, Space
from stockpot.planning.template import Template
from stockpot.recipes.schema import Recipe
from stockpot.runs import Soup
from stockpot.specs import TensorSpec, work_itemsize
from stockpot.statistics import Extent, Statistic

__all__ = [
    "Action",
    "Budget",
    "MergeGroup",
    "ModelInput",
    "Operand",
    "Plan",
    "Shard",
    "StatPlan",
    "TensorPlan",
    "spans_by_tensor",
]

#: raised when the bytes that a plan leads to change, so that a journal of an older engine is not resumed
ENGINE_FORMAT = 3


class Action(enum.Enum):
    """MERGE by a method; COPY bytes; KEEP a tensor that can't be averaged (integers), checking that the models agree."""

    MERGE = "merge"
    COPY = "copy"
    KEEP = "keep"


@dataclass(frozen=True)
class ModelInput:
    """One distinct checkpoint that is read.

    where  the place in the recipe that names it first, as in `recipe.yml:3`
    role   "model", "factors" for the adapter that is computed from the models, or the name of a companion
    """

    index: int
    ref: str
    checkpoint: Checkpoint
    where: str = ""
    role: str = "model"

    @property
    def places(self) -> tuple[str, ...]:
        """Where an error about it stands; see errors.StockpotError.within."""
        return (self.where,) if self.where else ()


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor of an input. `position` is the model's place in the recipe: it keys random masks."""

    model: int
    name: str
    position: int = 0


@dataclass(frozen=True)
class MergeGroup:
    """Tensors that share a method and its parameters. `params` are by keyword; per-model ones are tuples.

    stats  the statistics that they need, by their places in the plan, in the order in which the method declares them
    """

    index: int
    method: Method
    params: Mapping[str, Any]
    stats: tuple[int, ...] = ()

    def public_params(self) -> dict[str, Any]:
        """By the names that recipes use."""
        return {p.name: self.params[p.keyword] for p in self.method.parameters.values() if p.keyword in self.params}


@dataclass(frozen=True)
class StatPlan:
    """A statistic that is to be gathered: of what, with which parameters, and over which tensors one value holds.

    place   of the statistic among those of its method
    extent  over what one value holds
    params  of the first group that needs it; those that matter are the same in all
    models  how many it is gathered of
    spans   the tensors, by index, that each value is gathered over; empty where each row or each tensor has its own
    """

    index: int
    method: Method
    place: int
    extent: Extent
    params: Mapping[str, Any]
    models: int
    spans: tuple[tuple[int, ...], ...] = ()

    @property
    def stat(self) -> Statistic:
        return self.method.stats[self.place]

    @property
    def wide(self) -> bool:
        """Whether a value spans tensors, so that it must be known before any of them is merged."""
        return self.extent not in ("row", "tensor")


def spans_by_tensor(stats: Sequence[StatPlan]) -> dict[int, dict[int, int]]:
    """Statistic -> tensor -> the number of its span, for the statistics that span tensors."""
    return {s.index: {t: n for n, span in enumerate(s.spans) for t in span} for s in stats if s.wide}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor: where it comes from, what happens to it, where it goes.

    group       its method and parameters; -1 for what is copied as it is. Factors are copied from the adapter that their group's
                method computes
    operands    the models' tensors, in the order of the recipe, without the base
    base        the base's tensor where the method works on deltas
    companions  those of the models, all of the first kind that the method declares, then all of the second
    layer       (stack, number) where it lies in numbered layers
    offset      of its first byte in the shard file
    """

    index: int
    name: str
    spec: TensorSpec
    action: Action
    group: int
    operands: tuple[Operand, ...]
    base: Operand | None
    shard: int = 0
    offset: int = 0
    companions: tuple[Operand, ...] = ()
    layer: tuple[str, int] | None = None

    @property
    def inputs(self) -> tuple[Operand, ...]:
        """All that is read for it: the models', the base's, the companions'."""
        return (*self.operands, *((self.base,) if self.base else ()), *self.companions)

    @property
    def weighed(self) -> int:
        """How many of the inputs, the first ones, are models: companions are not."""
        return len(self.operands) + (self.base is not None)


@dataclass(frozen=True)
class Shard:
    """One output file: its name, the bytes before the data, its size in all, the part of the model that it holds."""

    name: str
    header: bytes
    size: int
    part: FilePart


@dataclass(frozen=True)
class Budget:
    """How the engine spends memory: `workers` blocks in flight of `block_pieces` pieces, `chunk` elements computed at once.

    hold   bytes of inputs kept between a statistic's pass and what follows it, at most
    peak   bytes over the interpreter's own that this comes to, at most
    limit  what was allowed
    """

    limit: int
    workers: int
    block_pieces: int
    chunk: int
    hold: int
    peak: int


@dataclass(frozen=True)
class Plan:
    """What a merge will do. `notes` are for the user: accepted keys without effect, differences that matter here; `account` is
    what becomes of everything that the inputs hold (see planning.account).
    """

    recipe: Recipe
    inputs: tuple[ModelInput, ...]
    template: Template
    groups: tuple[MergeGroup, ...]
    stats: tuple[StatPlan, ...]
    tensors: tuple[TensorPlan, ...]
    shards: tuple[Shard, ...]
    seed: int
    budget: Budget
    notes: tuple[str, ...] = ()
    soup: Soup | None = None
    #: of the files beside the tensors that are copied: path, bytes, time, number
    sides: tuple[tuple[str, int, int, int], ...] = ()
    account: tuple[Mapping[str, Any], ...] = ()

    @cached_property
    def by_name(self) -> dict[str, TensorPlan]:
        """The tensors by their names."""
        return {t.name: t for t in self.tensors}

    @property
    def bytes_out(self) -> int:
        """Size of the output's tensor files."""
        return sum(s.size for s in self.shards)

    def passes(self, tensor: TensorPlan) -> int:
        """How many times a tensor's inputs are read: once to combine, and about once for each statistic before it."""
        if tensor.action is not Action.MERGE:
            return 1
        return 1 + sum(self.stats[i].extent != "row" for i in self.groups[tensor.group].stats)

    def bytes_of(self, tensor: TensorPlan) -> int:
        """Bytes of a tensor's inputs, read once."""
        return sum(self.inputs[o.model].checkpoint.spec(o.name).nbytes for o in tensor.inputs)

    @cached_property
    def bytes_in(self) -> int:
        """Bytes of all inputs that take part, each pass counted."""
        return sum(self.bytes_of(t) * self.passes(t) for t in self.tensors)

    @cached_property
    def span_of(self) -> dict[int, dict[int, int]]:
        """Statistic -> tensor -> the number of its span, for the statistics that span tensors."""
        return spans_by_tensor(self.stats)

    @property
    def parameters(self) -> int:
        """Elements of the output."""
        return sum(t.spec.numel for t in self.tensors)

    @property
    def identity(self) -> str:
        """A digest of everything that decides the output's bytes: a journal is resumed only where it is equal."""
        digest = hashlib.sha256(f"{ENGINE_FORMAT}\n{self.recipe.digest}\n{self.seed}\n".encode())
        for model in self.inputs:
            for header in model.checkpoint.files:
                digest.update(header.raw)
                digest.update(f"{header.path} {header.size} {header.mtime_ns}\n".encode())
            # what a computed checkpoint is made of has settings of its own: an adapter's scale
            for part in (model.checkpoint, *model.checkpoint.parts):
                digest.update(json.dumps(dict(part.config), sort_keys=True, default=str).encode())
            digest.update(model.checkpoint.made.encode())
        if self.soup is not None:
            digest.update(json.dumps(self.soup.to_dict(), sort_keys=True).encode())
        for group in self.groups:
            if not group.method.builtin:
                digest.update(f"{group.method.name} {group.method.code}\n".encode())
        for shard in self.shards:
            digest.update(shard.name.encode() + shard.header)
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for `--json`."""
        return {
            "merge_method": self.recipe.merge_method,
            "kind": self.template.kind,
            "inputs": [
                {
                    "model": m.ref,
                    **({"role": m.role} if m.role != "model" else {}),
                    "path": m.checkpoint.path,
                    **({"parts": [p.path for p in m.checkpoint.parts]} if m.checkpoint.parts else {}),
                    "tensors": len(m.checkpoint),
                    "bytes": m.checkpoint.nbytes,
                    "donor_of_config": m.index == self.template.donor,
                }
                for m in self.inputs
            ],
            "groups": self.group_rows(),
            "output": {
                "tensors": len(self.tensors),
                "parameters": self.parameters,
                "bytes": self.bytes_out,
                "shards": [{"file": s.name, "bytes": s.size} for s in self.shards],
            },
            "read_bytes": self.bytes_in,
            "write_bytes": self.bytes_out,
            "memory": {
                "limit": self.budget.limit,
                "peak": self.budget.peak,
                "workers": self.budget.workers,
                "block_pieces": self.budget.block_pieces,
            },
            "seed": self.seed,
            "notes": list(self.notes),
            "account": [dict(row) for row in self.account],
            **({"soup": self.soup.to_dict()} if self.soup else {}),
        }

    def group_rows(self) -> list[dict[str, Any]]:
        """One row for each method and set of parameters: tensors, bytes read and written, passes."""
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        for t in self.tensors:
            key = (t.action.value, t.group)
            row = rows.get(key)
            if row is None:
                group = self.groups[t.group] if t.group >= 0 else None
                row = rows[key] = {
                    "action": t.action.value,
                    "method": group.method.name if group else t.action.value,
                    "parameters": group.public_params() if group else {},
                    "reproducible": group.method.reproducible if group else "anywhere",
                    "space": (group.method.space if group else Space.WEIGHT).value,
                    "models": len(t.operands),
                    "tensors": 0,
                    "elements": 0,
                    "read_bytes": 0,
                    "write_bytes": 0,
                    "passes": self.passes(t),
                    "scratch_bytes": 0,
                    "operations": 0.0,
                    "example": t.name,
                }
            row["tensors"] += 1
            row["elements"] += t.spec.numel
            row["read_bytes"] += self.bytes_of(t) * row["passes"]
            row["write_bytes"] += t.spec.nbytes
            method = self.groups[t.group].method if t.action is Action.MERGE else None
            if method is not None and method.cost is not None and method.scope is Scope.TENSOR:
                cost = method.cost
                wide = work_itemsize(t.spec.dtype)
                row["scratch_bytes"] = max(row["scratch_bytes"], cost.scratch(len(t.operands), t.spec.shape, wide))
                row["operations"] += cost.work(len(t.operands), t.spec.shape) if cost.work else 0.0
        return list(rows.values())
