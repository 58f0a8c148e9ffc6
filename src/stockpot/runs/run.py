"""A training run: its snapshots in step order, and what was logged."""

from __future__ import annotations

from dataclasses import dataclass

from stockpot.errors import ArgumentError, CheckpointError, MismatchError, StockpotError
from stockpot.runs.metrics import MetricLog

__all__ = ["Run", "Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """One saved state of a run.

    step   optimiser steps taken (torchtune's epoch_N: the epoch)
    path   what open_checkpoint opens
    kind   "adapter" or "model"
    final  saved at the end of training, not at a regular interval
    fault  why it can't be used ("half-written: ..."), empty when it can
    """

    step: int
    path: str
    kind: str
    final: bool = False
    fault: str = ""


@dataclass(frozen=True)
class Run:
    """A trajectory: `snapshots` are usable and in step order, the final one last; `broken` can't be read.

    layout  how it was recognised: "transformers", "lightning", "torchtune", "pattern"
    pattern, metrics_file   what open_run was given besides the directory
    """

    path: str
    layout: str
    snapshots: tuple[Snapshot, ...]
    metrics: MetricLog
    broken: tuple[Snapshot, ...] = ()
    warnings: tuple[str, ...] = ()
    epochs_as_steps: bool = False
    pattern: str | None = None
    metrics_file: str | None = None

    @property
    def final(self) -> Snapshot | None:
        """The checkpoint saved at the end of training, if it is known which that is."""
        return next((s for s in reversed(self.snapshots) if s.final), None)

    @property
    def regular(self) -> tuple[Snapshot, ...]:
        """All but the final one, oldest first."""
        return tuple(s for s in self.snapshots if not s.final)

    @property
    def last_merging(self) -> Snapshot | None:
        """The newest regular snapshot: the newest one of `last k`."""
        return self.regular[-1] if self.regular else None

    def at(self, step: int) -> Snapshot:
        """The snapshot of a step. Raises ArgumentError with the nearest steps, CheckpointError for a broken one."""
        for s in self.snapshots:
            if s.step == step:
                return s
        for s in self.broken:
            if s.step == step:
                raise CheckpointError(f"{self.path}: the snapshot of step {step} can't be used: {s.fault}")
        known = sorted((s.step for s in self.snapshots), key=lambda n: (abs(n - step), n))[:4]
        raise ArgumentError(
            f"{self.path}: no snapshot of step {step}; the nearest are {', '.join(map(str, sorted(known)))}"
        )

    def check_kinds(self, chosen: tuple[Snapshot, ...]) -> None:
        """Adapters and full models don't mix. Raises StockpotError."""
        kinds = {s.kind for s in chosen}
        if len(kinds) > 1:
            a, b = (next(s for s in chosen if s.kind == kind) for kind in sorted(kinds))
            raise _mixed(a, b)


def _mixed(adapter: Snapshot, model: Snapshot) -> StockpotError:
    return MismatchError(
        f"step {adapter.step} is an adapter and step {model.step} a full model ({adapter.path}, {model.path}): they can't "
        "be averaged together; choose steps of one kind"
    )
