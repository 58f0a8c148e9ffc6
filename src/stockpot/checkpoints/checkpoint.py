"""A checkpoint on local disk: safetensors files, their headers, and the config beside them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from stockpot.checkpoints.header import Entry, Header
from stockpot.checkpoints.meaning.layers import LayerMap, map_layers
from stockpot.checkpoints.meaning.ties import Ties, find_ties
from stockpot.checkpoints.source import ReadRequest, TensorSource
from stockpot.errors import CheckpointError, ReadError
from stockpot.files import open_regular
from stockpot.specs import TensorSpec

__all__ = ["Checkpoint", "FilePart"]

#: elements of two tensors that are compared at once
_COMPARED = 2**20
_CHANGED = "was changed after its header was read"


@dataclass(frozen=True)
class FilePart:
    """Files of a checkpoint that hold one part of it: a folder, or a head beside the model.

    name    what it is called: "unet", "2_Dense", "value_head"; "" for the model itself
    stem    its file without the ending, relative to the directory: "2_Dense/model"
    whole   whether it is written as one file whatever its size, for who loads it knows no index

    Its tensors' names begin with the name and a slash.
    """

    name: str
    stem: str
    whole: bool = False

    @property
    def prefix(self) -> str:
        return f"{self.name}/" if self.name else ""


@dataclass(frozen=True)
class Checkpoint(TensorSource):
    """A named set of tensors plus its config. Holds headers only; reads are positional and thread-safe.

    ref      what the user wrote
    path     the directory or the single file
    kind     "model" or "adapter" (PEFT: its factors as plain tensors)
    config   config.json or adapter_config.json, {} where there is none
    files    the checked headers, in shard order
    parted   the part that each of the files is of; empty where all are the model's
    left     files with weights beside it that are not read, and why
    """

    ref: str
    path: str
    kind: str
    config: Mapping[str, Any]
    files: tuple[Header, ...]
    parted: tuple[FilePart, ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    _specs: dict[str, TensorSpec] = field(default_factory=dict, repr=False)
    _where: dict[str, tuple[int, Entry]] = field(default_factory=dict, repr=False)
    _fds: dict[int, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    #: when each open file was last touched, as it was opened
    _opened: dict[int, int] = field(default_factory=dict, repr=False, compare=False)
    _ties: list[Ties] = field(default_factory=list, repr=False, compare=False)
    #: called with (request, its bytes) after each read: how what is read inside a computed checkpoint gets its digests
    observers: list[Callable[[ReadRequest, memoryview[Any]], None]] = field(
        default_factory=list, repr=False, compare=False
    )

    #: what belongs to this process: a checkpoint that was sent to another one makes its own
    held: ClassVar[Mapping[str, Callable[[], Any]]] = {
        "_fds": dict,
        "_opened": dict,
        "_lock": threading.Lock,
        "observers": list,
    }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self.held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update({name: make() for name, make in self.held.items()})

    def __post_init__(self) -> None:
        for index, header in enumerate(self.files):
            prefix = self.parted[index].prefix if self.parted else ""
            for name, entry in header.entries.items():
                if prefix + name in self._where:
                    raise CheckpointError(f"{self.ref}: two of its parts have a tensor {prefix + name!r}")
                self._where[prefix + name] = (index, entry)
                self._specs[prefix + name] = entry.spec

    # what it holds

    @property
    def parts(self) -> tuple[Checkpoint, ...]:
        return ()

    @property
    def made(self) -> str:
        """How it is computed, for one that is: two that differ in it are two models, although they read the same files."""
        return ""

    @property
    def file_parts(self) -> tuple[FilePart, ...]:
        """Its parts that have files of their own, the model itself not among them."""
        return tuple(dict.fromkeys(p for p in self.parted if p.name))

    def part_of(self, name: str) -> FilePart | None:
        """The part that a tensor is written with; None for the model itself."""
        found = [p for p in self.file_parts if name.startswith(p.prefix)]
        return max(found, key=lambda p: len(p.prefix), default=None)

    @property
    def states(self) -> dict[str, str]:
        """What the names of its parts begin with, by part: state dicts within a file, files of parts."""
        found = {key: prefix for header in self.files for key, prefix in header.parts.items() if len(header.parts) > 1}
        return found | {p.name: p.prefix for p in self.file_parts}

    def members(self, part: str) -> list[str]:
        """The names of a part's tensors, in storage order."""
        own = {n for header in self.files for n in header.members.get(part, ())}
        if own:
            return [n for n in self.names() if n in own]
        return [n for n in self.names() if (p := self.part_of(n)) is not None and p.name == part]

    def relative(self, header: Header) -> str:
        """A file's name within the checkpoint's directory, with slashes."""
        top = self.path.rstrip("/") + "/"
        if header.path.startswith(top):
            return header.path[len(top) :].replace(os.sep, "/")
        return os.path.basename(header.path)

    @property
    def stem(self) -> str:
        """What the files of the model itself are called."""
        own = [h for i, h in enumerate(self.files) if not self.parted or not self.parted[i].name]
        names = {os.path.basename(h.path) for h in own}
        return "diffusion_pytorch_model" if any(n.startswith("diffusion_pytorch_model") for n in names) else "model"

    @property
    def dialect(self) -> str:
        """The framework that its files say they are of: "pt", "mlx"; nothing where they don't, or differ."""
        found = {h.metadata.get("format", "") for h in self.files}
        return found.pop() if len(found) == 1 else ""

    @property
    def directory(self) -> str:
        """Where config and tokenizer files lie."""
        return self.path if os.path.isdir(self.path) else os.path.dirname(self.path) or "."

    def names(self) -> Iterable[str]:
        """Every stored tensor, in storage order."""
        return self._specs.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def __len__(self) -> int:
        return len(self._specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """dtype and shape; KeyError when there is no such tensor."""
        return self._specs[name]

    @property
    def parameters(self) -> int:
        """Elements of all tensors, tied copies counted once."""
        tied = self.tied()
        return sum(spec.numel for n, spec in self._specs.items() if n not in tied)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data as stored."""
        return sum(spec.nbytes for spec in self._specs.values())

    def stored(self, name: str) -> Iterable[tuple[Checkpoint, str]]:
        """The tensors in files that one is made of: (the checkpoint that they lie in, its name there)."""
        return ((self, name),)

    # what its names mean

    def layers(self) -> LayerMap:
        """The stacks of layers that the names show."""
        return map_layers(self._specs)

    @property
    def ties(self) -> Ties:
        """Which of its tensors are one, and how that is known. Adapters tie nothing."""
        if not self._ties:
            self._ties.append(find_ties(self._specs, self.config, self._same) if self.kind == "model" else Ties((), {}))
        return self._ties[0]

    def tied(self) -> Mapping[str, str]:
        """Stored tensors that are another one, which is stored too: name -> the name that counts."""
        return self.ties.duplicates

    def resolve(self, name: str) -> str | None:
        """The stored tensor that `name` means: itself, or the embedding an absent tied head stands for."""
        return name if name in self._specs else self.ties.alias(name, self._specs)

    def _same(self, a: str, b: str) -> bool:
        """Whether two tensors hold the same bytes. Raises ReadError."""
        spec = self.spec(a)
        if spec != self.spec(b):
            return False
        first = self.place(a, unseen=True)
        if first is not None and first == self.place(b, unseen=True):
            return True  # one storage under two names
        for start in range(0, spec.numel, _COMPARED):
            stop = min(start + _COMPARED, spec.numel)
            both = [bytearray((stop - start) * spec.dtype.itemsize) for _ in range(2)]
            for name, raw in zip((a, b), both, strict=True):
                self.read([ReadRequest(name, start, stop)], memoryview(raw))
            if both[0] != both[1]:
                return False
        return True

    # reading

    def _fd(self, index: int) -> int:
        fd = self._fds.get(index)
        if fd is None:
            with self._lock:
                fd = self._fds.get(index)
                if fd is None:
                    header = self.files[index]
                    try:
                        fd = open_regular(header.path)
                    except OSError as e:
                        raise ReadError(f"{header.path}: can't be opened any more: {e.strerror or e}") from e
                    found = os.fstat(fd)
                    same = header.is_that(found)
                    if same and not header.is_untouched(found) and header.path.endswith(".safetensors"):
                        same = (
                            os.pread(fd, len(header.raw), 0) == header.raw
                        )  # new permissions, another name: or new content
                    if not same:
                        os.close(fd)
                        raise ReadError(f"{header.path}: {_CHANGED}")
                    self._opened[index] = found.st_ctime_ns
                    self._fds[index] = fd
        return fd

    def _extents(self, requests: Sequence[ReadRequest]) -> Iterator[tuple[int, int, int]]:
        """(file, start, stop) in bytes, neighbours joined."""
        current: tuple[int, int, int] | None = None
        for r in requests:
            index, entry = self._where[r.name]
            size = entry.spec.dtype.itemsize
            start, stop = entry.start + r.start * size, entry.start + r.stop * size
            if current and current[0] == index and current[2] == start:
                current = (index, current[1], stop)
            else:
                if current:
                    yield current
                current = (index, start, stop)
        if current:
            yield current

    def place(self, name: str, *, unseen: bool = False) -> tuple[int, int] | None:
        if self.observers and not unseen:
            return None
        index, entry = self._where[name]
        return self._fd(index), entry.start

    def extents(self, requests: Sequence[ReadRequest]) -> list[tuple[int, int, int]] | None:
        if self.observers:
            return None
        return [(self._fd(index), start, stop - start) for index, start, stop in self._extents(requests)]

    def read(self, requests: Sequence[ReadRequest], buffer: memoryview[Any]) -> None:
        """Fill `buffer` with the requested ranges one after the other; see TensorSource. Raises ReadError."""
        self._fill_all(list(self._extents(requests)), buffer)
        position = 0
        for r in requests if self.observers else ():
            size = (r.stop - r.start) * self.spec(r.name).dtype.itemsize
            for observer in self.observers:
                observer(r, buffer[position : position + size])
            position += size

    def _fill_all(self, extents: Sequence[tuple[int, int, int]], out: memoryview[Any]) -> None:
        """(file, start, stop) one after the other into `out`."""
        position = 0
        for index, start, stop in extents:
            self._fill(index, start, out[position : position + stop - start])
            position += stop - start

    def _fill(self, index: int, start: int, out: memoryview[Any]) -> None:
        """Bytes of one file from `start` on into `out`."""
        fd = self._fd(index)
        path = self.files[index].path
        while len(out):
            try:
                n = os.preadv(fd, [out], start)
            except OSError as e:
                raise ReadError(f"{path}: read at byte {start} failed: {e.strerror or e}") from e
            if n == 0:
                raise ReadError(
                    f"{path}: ended at byte {start}, its header promised {start + len(out)}; "
                    "the file was cut short after it was opened"
                )
            start += n
            out = out[n:]

    def changed(self) -> str | None:
        """What happened to a file since its header was read, in words; None where nothing did."""
        for header in self.files:
            try:
                found = [
                    os.stat(header.path),
                    *(os.fstat(fd) for i, fd in self._fds.items() if self.files[i] is header),
                ]
            except OSError as e:
                return f"{header.path}: {e.strerror or e}"
            if not all(map(header.is_that, found)):
                return f"{header.path}: {_CHANGED}"
        return None

    def touched(self) -> bool:
        """Whether anything has happened to a file since it was opened, although size and time are as they were."""
        return any(os.fstat(fd).st_ctime_ns != self._opened.get(i) for i, fd in list(self._fds.items()))

    def will_read(self, request: ReadRequest) -> None:
        """Ask the kernel to start reading a range."""
        advise = getattr(os, "posix_fadvise", None)
        if advise is None:
            return
        for index, start, stop in self._extents([request]):
            advise(self._fd(index), start, stop - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files. Reading again opens them again."""
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()
