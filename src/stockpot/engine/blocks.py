"""Memory for what is kept from one pass to the next: one piece of it, cut into equal places, so that its size is known."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["BlockPool"]


class BlockPool:
    """`size` bytes from `memory` in places of `each` bytes. Thread-safe."""

    def __init__(self, size: int, each: int, memory: Callable[[int], memoryview[Any]]) -> None:
        self._new = memory
        self._each = each
        self._free = list(range(size // each if each else 0))
        self._lock = threading.Lock()
        self._memory: memoryview[Any] | None = None

    def take(self) -> tuple[int, memoryview[Any]] | None:
        """The number of a place and its memory, or None where all are taken."""
        with self._lock:
            if not self._free:
                return None
            if self._memory is None:
                self._memory = self._new(len(self._free) * self._each)
            place = self._free.pop()
            return place, self._memory[place * self._each : (place + 1) * self._each]

    def give(self, place: int) -> None:
        """Take a place back."""
        with self._lock:
            self._free.append(place)
