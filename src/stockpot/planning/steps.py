"""A step of a recipe as a checkpoint for later steps: a merge that is computed while it is read, or written first.

A step whose every method works element by element and needs no statistics is **streamed**: a range of it is merged when it is
asked for, and nothing of it is ever written. Other steps are merged into a scratch directory beside OUT before the steps
that use them. Either way later steps read the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from stockpot.checkpoints.checkpoint import Checkpoint, FilePart
from stockpot.checkpoints.derived import DerivedCheckpoint, files_of
from stockpot.methods.declaration import Scope
from stockpot.planning.plan import Action, Plan

__all__ = ["MergedCheckpoint", "StepReader", "leaves", "merged_checkpoint", "steps_in", "why_written"]


class StepReader(Protocol):
    """What the engine puts into a step: reads elements start..stop of a tensor into `out`; close lets go of files."""

    def read(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class MergedCheckpoint(DerivedCheckpoint):
    """The output of `plan`, before it exists. `sources` are the checkpoints on disk at its bottom."""

    plan: Plan | None = field(default=None, repr=False, compare=False)
    reader: list[StepReader] = field(default_factory=list, repr=False, compare=False)
    held: ClassVar[Mapping[str, Callable[[], Any]]] = {**DerivedCheckpoint.held, "reader": list}

    @property
    def step(self) -> Plan:
        assert self.plan is not None
        return self.plan

    @property
    def directory(self) -> str:
        return self.step.inputs[self.step.template.tokenizer].checkpoint.directory

    def stored(self, name: str) -> Iterable[tuple[Checkpoint, str]]:
        """What the step reads for it."""
        t = self.step.by_name[name]
        return (p for o in t.inputs for p in self.step.inputs[o.model].checkpoint.stored(o.name))

    @property
    def file_parts(self) -> tuple[FilePart, ...]:
        return self.step.inputs[self.step.template.donor].checkpoint.file_parts

    @property
    def states(self) -> dict[str, str]:
        return {p.name: p.prefix for p in self.file_parts}

    @property
    def made(self) -> str:
        """By everything that decides its bytes: views below it read the same files."""
        return self.step.identity

    def scratch_of(self, name: str) -> int:
        t = self.step.by_name[name]
        return sum(self.step.inputs[o.model].checkpoint.scratch_of(o.name) for o in t.inputs)

    @property
    def resident(self) -> int:
        return sum(m.checkpoint.resident for m in self.step.inputs)

    @property
    def scratch_itemsize(self) -> int:
        """Where it is streamed: the inputs of an element, and what is computed with."""
        if why_written(self.step):
            return 0
        inputs = [m.checkpoint for m in self.step.inputs]
        widest = max((len(t.inputs) for t in self.step.tensors), default=1)
        return 4 * widest + 8 + max(c.scratch_itemsize for c in inputs)

    def computed(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        self.reader[0].read(name, start, stop, out)

    def close(self) -> None:
        super().close()
        for reader in self.reader:
            reader.close()


def merged_checkpoint(name: str, plan: Plan) -> MergedCheckpoint:
    """The checkpoint that a planned step is."""
    sources = leaves(plan)
    donor = plan.inputs[plan.template.donor].checkpoint
    return MergedCheckpoint(
        name, donor.path, plan.template.kind, dict(plan.template.config), files_of(sources),
        sources=sources, specs={t.name: t.spec for t in plan.tensors}, plan=plan,
    )  # fmt: skip


def leaves(plan: Plan) -> tuple[Checkpoint, ...]:
    """The checkpoints that a plan reads at its bottom, through all steps."""
    out: dict[int, Checkpoint] = {}
    for model in plan.inputs:
        for part in model.checkpoint.parts or (model.checkpoint,):
            out[id(part)] = part
    return tuple(out.values())


def steps_in(checkpoint: Checkpoint) -> tuple[MergedCheckpoint, ...]:
    """The step that a checkpoint is, or those that it is a view of."""
    if isinstance(checkpoint, MergedCheckpoint):
        return (checkpoint,)
    sources = checkpoint.sources if isinstance(checkpoint, DerivedCheckpoint) else ()
    return tuple(step for source in sources for step in steps_in(source))


def why_written(plan: Plan) -> str | None:
    """Why a step can't be streamed; None where it can."""
    for t in plan.tensors:
        if t.action is Action.MERGE:
            group = plan.groups[t.group]
            if group.stats:
                return f"{group.method.name} needs {plan.stats[group.stats[0]].stat.name} of whole tensors first"
            if group.method.scope is not Scope.ELEMENT:
                return f"{group.method.name} needs whole {'rows' if group.method.scope is Scope.ROW else 'tensors'}"
    return None
