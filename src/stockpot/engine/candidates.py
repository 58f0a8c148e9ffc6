"""Candidates of a search: plans that are computed in memory, never written, from checkpoints that are kept in memory.

What a candidate is made of is kept as it is stored, not as differences: the compiled kernels read it faster than float32
differences would be, and the candidate has the very bytes that publishing it would write. Tensors that every snapshot has
alike are kept once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import blake3
import numpy as np

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.source import ReadRequest, TensorSource
from stockpot.engine.devices import NumpyDevice, byte_buffer
from stockpot.engine.inmemory import merge_plan
from stockpot.engine.steps import stream_steps
from stockpot.planning.plan import Plan
from stockpot.specs import TensorSpec

__all__ = ["Candidate", "CheckpointCache", "make_candidate"]

Array = np.ndarray[Any, Any]

#: of a config, what says where it came from rather than what it is
_ORIGINS = ("_name_or_path", "transformers_version", "base_model_name_or_path", "revision", "inference_mode")


@dataclass(frozen=True)
class Candidate:
    """The output of a plan, in memory. `tensors` are raw bytes by name, `config` what would be written beside them.

    digest  of content alone: names, dtypes, shapes, bytes, config; equal for candidates that are equal
    """

    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[TensorSpec, Array]] = field(repr=False)
    tokenizer: str = ""
    digest: str = ""


class CheckpointCache:
    """Tensors of checkpoints, read once and kept while they fit `limit` bytes; others are read each time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._sources: dict[tuple[Any, ...], _CachedSource] = {}
        self._by_digest: dict[bytes, memoryview[Any]] = {}
        self._lock = threading.Lock()

    def source(self, checkpoint: Checkpoint) -> TensorSource:
        """What reads `checkpoint`: from memory what was kept of the same files. Computed ones are computed each time."""
        if checkpoint.parts:
            return checkpoint
        key = (checkpoint.path, *((h.path, h.size, h.mtime_ns) for h in checkpoint.files))
        found = self._sources.get(key)
        if found is None:
            found = self._sources[key] = _CachedSource(checkpoint, self)
        return found

    def keep(self, raw: memoryview[Any]) -> memoryview[Any] | None:
        """The memory to keep a tensor in: that of an equal one where there is one. None where it does not fit."""
        if self.held >= self.limit:
            return None
        digest = blake3.blake3(raw).digest()
        with self._lock:
            found = self._by_digest.get(digest)
            if found is not None:
                return found
            if self.held + len(raw) > self.limit:
                return None
            self.held += len(raw)
            self._by_digest[digest] = raw
        return raw


class _CachedSource(TensorSource):
    """Over a checkpoint on disk."""

    def __init__(self, checkpoint: Checkpoint, cache: CheckpointCache) -> None:
        self._checkpoint = checkpoint
        self._cache = cache
        self._held: dict[str, memoryview[Any]] = {}

    def names(self) -> Iterable[str]:
        return self._checkpoint.names()

    def spec(self, name: str) -> TensorSpec:
        return self._checkpoint.spec(name)

    def read(self, requests: Sequence[ReadRequest], buffer: memoryview[Any]) -> None:
        position = 0
        for r in requests:
            size = self.spec(r.name).dtype.itemsize
            part = self._whole(r.name)[r.start * size : r.stop * size]
            buffer[position : position + len(part)] = part
            position += len(part)

    def _whole(self, name: str) -> memoryview[Any]:
        found = self._held.get(name)
        if found is not None:
            return found
        spec = self.spec(name)
        raw = byte_buffer(spec.nbytes)
        self._checkpoint.read([ReadRequest(name, 0, spec.numel)], raw)
        kept = self._cache.keep(raw)
        if kept is not None:
            self._held[name] = kept
        return raw if kept is None else kept


def make_candidate(plan: Plan, cache: CheckpointCache, threads: int = 1) -> Candidate:
    """Compute a plan's output in memory. Raises ReadError, and OutputError where a step would have to be written."""
    stream_steps(plan, NumpyDevice())
    try:
        sources = [cache.source(m.checkpoint) for m in plan.inputs]
        tensors = {t.name: (t.spec, raw) for t, raw in merge_plan(plan, sources, threads)}
    finally:
        for model in plan.inputs:
            model.checkpoint.close()
    tokenizer = plan.inputs[plan.template.tokenizer].checkpoint.directory
    return Candidate(plan.template.kind, dict(plan.template.config), tensors, tokenizer, _digest(plan, tensors))


def _digest(plan: Plan, tensors: Mapping[str, tuple[TensorSpec, Array]]) -> str:
    config = {k: v for k, v in plan.template.config.items() if k not in _ORIGINS}
    hashed = blake3.blake3(json.dumps([plan.template.kind, config], sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        spec, raw = tensors[name]
        hashed.update(f"{name} {spec.dtype.label} {list(spec.shape)}\n".encode())
        hashed.update(raw.data)
    return hashed.hexdigest()
