"""Tensors whose elements lie in another order than that of their shapes: channels_last, transposed matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.derived import KEPT_MODULES, DerivedCheckpoint, digest_of, files_of
from stockpot.checkpoints.source import ReadRequest

__all__ = ["TransposedCheckpoint", "in_order"]


@dataclass(frozen=True)
class TransposedCheckpoint(DerivedCheckpoint):
    """One source's tensors in the order of their shapes. axes: of each that lies otherwise, from the outermost on."""

    axes: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> Checkpoint:
        return self.sources[0]

    @property
    def made(self) -> str:
        return super().made + digest_of(f"{self.axes}")

    def stored(self, name: str) -> Iterable[tuple[Checkpoint, str]]:
        return self.source.stored(name)

    @property
    def resident(self) -> int:
        """The last few tensors, as they lie and in order."""
        largest = max((self.spec(n).nbytes for n in self.axes), default=0)
        return 2 * KEPT_MODULES * largest + self.source.resident

    def passed(self, name: str) -> tuple[Checkpoint, str, int] | None:
        return None if name in self.axes else (self.source, name, 0)

    def computed(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        if name not in self.axes:
            self.source.read([ReadRequest(name, start, stop)], out)
            return
        size = self.spec(name).dtype.itemsize
        out[:] = self.cache.get(name, lambda: self._ordered(name))[start * size : stop * size]

    def _ordered(self, name: str) -> memoryview[Any]:
        import numpy as np

        spec, axes = self.spec(name), self.axes[name]
        raw = np.empty(spec.nbytes, np.uint8)
        self.source.read([ReadRequest(name, 0, spec.numel)], raw.data)
        stored = raw.view(f"u{spec.dtype.itemsize}").reshape([spec.shape[a] for a in axes])
        ordered = np.ascontiguousarray(stored.transpose([axes.index(i) for i in range(len(axes))]))
        return ordered.reshape(-1).view(np.uint8).data


def in_order(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every tensor in the order of its shape: itself where all lie so."""
    prefixes = [p.prefix for p in checkpoint.parted] or [""] * len(checkpoint.files)
    axes = {p + name: order for p, header in zip(prefixes, checkpoint.files) for name, order in header.strides.items()}
    if not axes:
        return checkpoint
    return TransposedCheckpoint(
        checkpoint.ref, checkpoint.path, checkpoint.kind, checkpoint.config, files_of([checkpoint]), sources=(checkpoint,),
        specs={name: checkpoint.spec(name) for name in checkpoint.names()}, axes=axes,
    )  # fmt: skip
