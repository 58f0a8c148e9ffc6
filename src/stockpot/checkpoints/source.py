"""The contract between what holds tensors and what reads them: all that the engine uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stockpot.specs import DType, TensorSpec

__all__ = ["Origin", "ReadRequest", "TensorSource"]


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Elements `start` to `stop` (exclusive, row-major) of one tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Origin:
    """The stored tensor that one is, byte for byte and whole."""

    source: Any
    name: str


class TensorSource(Protocol):
    """Named tensors: files, computed checkpoints, views, memory.

    The first three must be there. The others have answers that are right for a source that only computes: a class that
    names this one as its base inherits them, and replaces those it knows better.
    """

    def names(self) -> Iterable[str]:
        """Every stored tensor, in storage order."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """dtype and shape of one tensor; KeyError if there is none of that name."""
        ...

    def read(self, requests: Sequence[ReadRequest], buffer: memoryview[Any]) -> None:
        """Fill `buffer` with the raw little-endian bytes of the requested ranges, one after the other.

        `buffer` has exactly the requests' total size. Safe to call from several threads. Raises ReadError.
        """
        ...

    # where bytes lie

    def will_read(self, request: ReadRequest) -> None:
        """A hint that this range is needed soon."""
        return

    def extents(self, requests: Sequence[ReadRequest]) -> list[tuple[int, int, int]] | None:
        """Where the ranges lie, for callers that do the I/O themselves: (open file, offset, bytes). None where only `read`
        will do: they are computed, elsewhere, or somebody wants to be told. Raises ReadError.
        """
        return None

    def place(self, name: str, *, unseen: bool = False) -> tuple[int, int] | None:
        """Where a tensor's bytes begin, all in one run: (open file, offset); None where only `read` will do.

        unseen: although somebody wants to be told of what is read, who then is told otherwise. Raises ReadError.
        """
        return None

    def origin(self, name: str) -> Origin | None:
        """The stored tensor that this one is, byte for byte; None where it is computed, or put together of several."""
        return Origin(self, name)

    # what it is made of

    @property
    def parts(self) -> Sequence[Any]:
        """The checkpoints on disk that it is computed from; empty for what lies there itself."""
        return ()

    def written(self, name: str) -> DType:
        """The dtype in which a merge writes the tensor where the recipe names none."""
        return self.spec(name).dtype

    # what reading takes

    @property
    def resident(self) -> int:
        """Bytes of memory that reading it holds on to, at most."""
        return 0

    @property
    def scratch_itemsize(self) -> int:
        """Bytes of memory for each element that is being read, beside where it is read to."""
        return 0

    def scratch_of(self, name: str) -> int:
        """Bytes of memory while any range of this tensor is being read, beside those for each element."""
        return 0

    def together(self, name: str) -> tuple[str, ...]:
        """The tensors that come of one computation, this one among them: read whole, by one thread, one after the other."""
        return (name,)

    @property
    def pieces_at_once(self) -> int:
        """Pieces of a tensor that are best read together: one, which is still in a core's cache when it is hashed."""
        return 1

    @property
    def download_bytes(self) -> int:
        """Bytes that are better brought here before they are merged (see hub.fetch)."""
        return 0

    # its life

    def changed(self) -> str | None:
        """What happened to it since it was opened, in words; None where nothing did."""
        return None

    def touched(self) -> bool:
        """Whether anything has happened to its files that may be no change: a new name, permissions."""
        return False

    def close(self) -> None:
        """Let go of files. Reading again opens them again."""
        return
