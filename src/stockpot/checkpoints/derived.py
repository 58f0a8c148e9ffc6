"""A checkpoint that is computed while it is read: product adapters, fused models, dequantised ones."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from stockpot.checkpoints.checkpoint import Checkpoint, FilePart
from stockpot.checkpoints.header import Header
from stockpot.checkpoints.source import Origin, ReadRequest
from stockpot.specs import TensorSpec

__all__ = ["KEPT_MODULES", "DerivedCheckpoint", "ModuleCache", "digest_of", "files_of"]

KEPT_MODULES = 4


class ModuleCache:
    """The last few modules that were computed; threads that ask for one at the same time wait for one computation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: OrderedDict[str, tuple[threading.Lock, list[Any]]] = OrderedDict()

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        with self._lock:
            entry = self._values.get(key)
            if entry is None:
                entry = self._values[key] = (threading.Lock(), [])
                while len(self._values) > KEPT_MODULES:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
        own, held = entry
        with own:
            if not held:
                held.append(compute())
            return held[0]


@dataclass(frozen=True)
class DerivedCheckpoint(Checkpoint):
    """Names and specs of its own; the bytes are computed from `sources`. `files` are those of the sources."""

    sources: tuple[Checkpoint, ...] = ()
    specs: dict[str, TensorSpec] = field(default_factory=dict, repr=False)
    cache: ModuleCache = field(default_factory=ModuleCache, repr=False)
    held: ClassVar[Mapping[str, Callable[[], Any]]] = {**Checkpoint.held, "cache": ModuleCache}

    def __post_init__(self) -> None:
        self._specs.update(self.specs)

    @property
    def directory(self) -> str:
        """That of the source whose config it has."""
        return next((s.directory for s in self.sources if s.path == self.path), super().directory)

    @property
    def file_parts(self) -> tuple[FilePart, ...]:
        """Those of the source whose config it has."""
        return next((s.file_parts for s in self.sources if s.path == self.path), ())

    @property
    def stem(self) -> str:
        return next((s.stem for s in self.sources if s.path == self.path), super().stem)

    @property
    def states(self) -> dict[str, str]:
        return next((s.states for s in self.sources if s.path == self.path), {})

    @property
    def download_bytes(self) -> int:
        return sum(s.download_bytes for s in self.sources)

    @property
    def pieces_at_once(self) -> int:
        """What is computed for every call is worth many rows."""
        return 4

    @property
    def parts(self) -> tuple[Checkpoint, ...]:
        found = (part for source in self.sources for part in (source.parts or (source,)))
        return tuple({id(part): part for part in found}.values())

    def computed(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        """Fill `out` with the bytes of elements start..stop of a tensor."""
        raise NotImplementedError

    @property
    def made(self) -> str:
        return "".join(s.made for s in self.sources)

    def passed(self, name: str) -> tuple[Checkpoint, str, int] | None:
        """(source, its tensor, the element of it that is the first here) where the bytes are a run of a source's."""
        return None

    def stored(self, name: str) -> Iterable[tuple[Checkpoint, str]]:
        """Where it is computed, all that it may be computed from."""
        found = self.passed(name)
        if found is not None:
            return found[0].stored(found[1])
        return (pair for source in self.sources for own in source.names() for pair in source.stored(own))

    def origin(self, name: str) -> Origin | None:
        found = self.passed(name)
        if found is None or found[0].spec(found[1]).shape != self.spec(name).shape:
            return None
        return found[0].origin(found[1])

    def place(self, name: str, *, unseen: bool = False) -> tuple[int, int] | None:
        found = self.passed(name)
        # the engine digests what it reads; what is not all of a tensor has no digest to be told of
        at = None if found is None else found[0].place(found[1], unseen=True)
        return None if at is None or found is None else (at[0], at[1] + found[2] * self.spec(name).dtype.itemsize)

    def extents(self, requests: Sequence[ReadRequest]) -> list[tuple[int, int, int]] | None:
        out = []
        for r in requests:
            at, size = self.place(r.name), self.spec(r.name).dtype.itemsize
            if at is None:
                return None
            out.append((at[0], at[1] + r.start * size, (r.stop - r.start) * size))
        return out

    def read(self, requests: Sequence[ReadRequest], buffer: memoryview[Any]) -> None:
        position = 0
        for r in requests:
            size = (r.stop - r.start) * self.spec(r.name).dtype.itemsize
            self.computed(r.name, r.start, r.stop, buffer[position : position + size])
            position += size

    def will_read(self, request: ReadRequest) -> None:
        pass

    def changed(self) -> str | None:
        return next((why for why in (s.changed() for s in self.sources) if why), None)

    def touched(self) -> bool:
        return any(s.touched() for s in self.sources)

    def close(self) -> None:
        for source in self.sources:
            source.close()


def files_of(sources: Iterable[Checkpoint]) -> tuple[Header, ...]:
    """The files behind several checkpoints, each once."""
    return tuple({h.path: h for s in sources for h in s.files}.values())


def digest_of(text: str) -> str:
    """Of how something is made, for `made`."""
    return hashlib.sha256(text.encode()).hexdigest()
