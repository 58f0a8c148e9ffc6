"""The contract between what holds tensors and what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stockpot.specs import TensorSpec

__all__ = ["ReadRequest", "TensorSource"]


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Elements `start` to `stop` (exclusive, row-major) of one tensor."""

    name: str
    start: int
    stop: int


class TensorSource(Protocol):
    """What the engine needs of a checkpoint: names, specs, and raw little-endian bytes of element ranges."""

    def names(self) -> Iterable[str]:
        """Every stored tensor, in storage order."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """dtype and shape of one tensor; KeyError if there is none of that name."""
        ...

    def read(self, requests: Sequence[ReadRequest], buffer: memoryview[Any]) -> None:
        """Fill `buffer` with the bytes of the requested ranges, one after the other.

        `buffer` has exactly the requests' total size. Safe to call from several threads. Raises ReadError.
        """
        ...

    def will_read(self, request: ReadRequest) -> None:
        """A hint that this range is needed soon; may do nothing."""
        ...
