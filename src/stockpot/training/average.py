"""The last k snapshots of a model's trainable parameters, and their weighted average. Knows no trainer."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stockpot.errors import ArgumentError
from stockpot.runs import SoupSpec
from stockpot.runs.metrics import MetricLog, known_objective
from stockpot.runs.schemes import SCHEMES
from stockpot.runs.spec import DEFAULT_LAST, scheme_weights

__all__ = ["Held", "SnapshotAverage", "checked_every", "checked_spec", "kept_random_state", "swapped", "trainable"]

Tensors = dict[str, torch.Tensor]


@dataclass
class Held:
    """One snapshot in memory. `tensors` are copies on the CPU, in the dtype that the model trains in."""

    step: int
    tensors: Tensors
    metric: float | None = None


def trainable(model: torch.nn.Module) -> Tensors:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def checked_spec(spec: SoupSpec | None) -> SoupSpec:
    """A spec that makes sense while training. Raises ArgumentError."""
    spec = spec or SoupSpec(last=10, by="loss", penalty=0.7)
    if not SCHEMES[spec.kind].while_training:
        raise ArgumentError(f"while training, snapshots can't be weighted by {spec.kind}")
    odd: list[str] = [n for n in ("start", "steps", "best", "include_final") if n in spec.given()]
    if odd or spec.every != 1:
        raise ArgumentError(
            f"{(odd or ['every'])[0]} chooses among saved snapshots; while training the last ones are kept"
        )
    if SCHEMES[spec.kind].needs_metric and spec.objective is None and known_objective(str(spec.by)) is None:
        raise ArgumentError(f"whether a low or a high {spec.by!r} is better can't be told: give objective min or max")
    return spec


def checked_every(every: int) -> int:
    """Steps between snapshots. Raises ArgumentError."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ArgumentError(f"every: expected a whole number of at least 1, got {every!r}")
    return every


class SnapshotAverage:
    """Keeps the last `spec.last` snapshots and averages them as `spec` says.

    Memory: `last` copies of the trainable parameters on the CPU.
    """

    def __init__(self, spec: SoupSpec | None = None) -> None:
        self.spec = checked_spec(spec)
        self.held: list[Held] = []

    @property
    def size(self) -> int:
        """How many snapshots are kept at most."""
        return self.spec.last or DEFAULT_LAST

    def add(self, step: int, model: torch.nn.Module, metric: float | None = None) -> None:
        """Copy the trainable parameters. A step that is held already is replaced."""
        tensors = {name: p.detach().to("cpu", copy=True) for name, p in trainable(model).items()}
        self.put(Held(step, tensors, metric))

    def put(self, snapshot: Held) -> None:
        """Take a snapshot in; the oldest beyond the size is dropped."""
        self.held = [h for h in self.held if h.step != snapshot.step]
        self.held.append(snapshot)
        self.held.sort(key=lambda h: h.step)
        del self.held[: max(len(self.held) - self.size, 0)]

    def fill_metrics(self, log: MetricLog) -> None:
        """Give each snapshot its metric from a log, where there is one by now."""
        if self.spec.by is None:
            return
        for h in self.held:
            with contextlib.suppress(ArgumentError):
                h.metric = log.value_at(self.spec.by, h.step, self.spec.smooth).value

    def weights(self) -> dict[int, float]:
        """Weight by step, of the snapshots that can be weighted: empty while there is none."""
        usable = self.held
        objective = "min"
        if SCHEMES[self.spec.kind].needs_metric:
            objective = self.spec.objective or known_objective(str(self.spec.by)) or "min"
            usable = [h for h in usable if h.metric is not None and math.isfinite(h.metric) and h.metric >= 0]
            if objective == "min" or not any(h.metric for h in usable):
                usable = [h for h in usable if h.metric]
        if not usable:
            return {}
        steps = [h.step for h in usable]
        found = scheme_weights(self.spec, steps, [h.metric or 0.0 for h in usable], objective)
        return dict(zip(steps, found, strict=True))

    def average(self) -> Tensors | None:
        """The weighted average, accumulated in float32, in the snapshots' dtype; None while nothing can be weighted."""
        weights = self.weights()
        if not weights:
            return None
        used = [h for h in self.held if h.step in weights]
        out: Tensors = {}
        for name, like in used[-1].tensors.items():
            # a parameter that was unfrozen on the way is averaged over the snapshots that hold it
            having = [h for h in used if name in h.tensors]
            total = sum(weights[h.step] for h in having)
            if total <= 0:
                having, total = used[-1:], 1.0
            mean = torch.zeros(like.shape, dtype=torch.float64 if like.dtype is torch.float64 else torch.float32)
            for h in having:
                mean.add_(h.tensors[name].to(mean.dtype), alpha=weights[h.step] / total if len(having) > 1 else 1.0)
            out[name] = mean.to(like.dtype)
        return out


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Random numbers drawn inside leave those drawn afterwards as they would have been."""
    import numpy as np

    own, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(own)
        np.random.set_state(arrays)


@contextlib.contextmanager
def swapped(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """The model with these values in its parameters; its own come back at the end, to the bit. Buffers stay as they are.

    Takes a copy of these parameters where they lie (on the GPU, if they do).
    """
    parameters = {name: p for name, p in model.named_parameters() if name in tensors}
    own = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(tensors[name])
        yield model
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(own[name])
