"""Makes the steps of a plan readable: streamed ones get their arithmetic, the others are merged into a scratch directory."""

from __future__ import annotations

import os
import threading
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.header import read_header
from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.devices import Device
from stockpot.engine.loop import Arithmetic
from stockpot.engine.outdir import claim_scratch, scratch_path
from stockpot.engine.run import Outcome, Progress, run_plan
from stockpot.errors import OutputError
from stockpot.planning.plan import Plan
from stockpot.planning.steps import MergedCheckpoint, steps_in, why_written

__all__ = ["prepare_steps", "stream_step", "stream_steps", "written_steps"]


def prepare_steps(plan: Plan, out: str, device: Device, *, resume: bool, progress: Progress | None) -> list[Outcome]:
    """Attach a reader to every step that `plan` reads, the innermost first. Returns the outcomes of those written.

    Their locks are held until `release`. Raises what run_plan does.
    """
    outcomes: list[Outcome] = []
    done: set[int] = set()
    try:
        _prepare(plan, scratch_path(out), device, outcomes, done, resume=resume, progress=progress)
    except BaseException:
        for outcome in outcomes:
            outcome.release()
        raise
    return outcomes


def _prepare(
    plan: Plan, scratch: str, device: Device, outcomes: list[Outcome], done: set[int], *, resume: bool,
    progress: Progress | None,
) -> None:  # fmt: skip
    for step in (found for model in plan.inputs for found in steps_in(model.checkpoint)):
        if id(step) in done:
            continue
        done.add(id(step))
        _prepare(step.step, scratch, device, outcomes, done, resume=resume, progress=progress)
        step.reader.clear()
        if why_written(step.step) is None:
            step.reader.append(_Streamed(step.step, device))
            continue
        claim_scratch(scratch)
        outcome = run_plan(step.step, os.path.join(scratch, step.ref), device, resume=resume, progress=progress)
        outcomes.append(outcome)
        for (index, name), digest in outcome.input_digests.items():
            outcome.part_digests.setdefault(step.step.inputs[index].checkpoint.path, {})[name] = digest
        step.reader.append(_Written(step.step, outcome.partial))


def written_steps(plan: Plan) -> bool:
    """Whether any step that a plan reads is written, rather than streamed."""
    found = [step for model in plan.inputs for step in steps_in(model.checkpoint)]
    return any(why_written(s.step) is not None or written_steps(s.step) for s in found)


def stream_steps(plan: Plan, device: Device) -> None:
    """Attach a reader to every step that `plan` reads without writing any. Raises OutputError where that can't be."""
    for step in (found for model in plan.inputs for found in steps_in(model.checkpoint)):
        stream_step(step, device)


def stream_step(step: MergedCheckpoint, device: Device) -> None:
    """The same for one step."""
    why = why_written(step.step)
    if why is not None:
        raise OutputError(f"step {step.ref!r} can't be computed in memory: {why}; merge it into a checkpoint first")
    stream_steps(step.step, device)
    step.reader[:] = [_Streamed(step.step, device)]


class _Streamed:
    """Merges a range when it is asked for, with the engine's own arithmetic."""

    def __init__(self, plan: Plan, device: Device) -> None:
        self._arithmetic = Arithmetic(plan, [m.checkpoint for m in plan.inputs], device)
        self._local = threading.local()

    def read(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        self._arithmetic.range(name, start, stop, out, self._local.__dict__.setdefault("slots", {}))

    def close(self) -> None:
        for source in self._arithmetic.sources:
            source.close()


class _Written:
    """Reads what a step's own run has left."""

    def __init__(self, plan: Plan, partial: str) -> None:
        headers = tuple(read_header(os.path.join(partial, s.name)) for s in plan.shards)
        parts = tuple(s.part for s in plan.shards)
        self.files = Checkpoint(partial, partial, plan.template.kind, {}, headers, parted=parts)

    def read(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        self.files.read([ReadRequest(name, start, stop)], out)

    def close(self) -> None:
        self.files.close()
