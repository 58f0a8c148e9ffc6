"""Keyed random masks: element e of a tensor is kept or dropped by (seed, model, tensor name, e) alone.

Byte e of a Philox4x64 stream, keyed by the first three, is compared with the kept fraction in 256ths. Where it hits
the boundary exactly (one element in 256) a second, 64-bit draw, a hash of key and e, decides the rest of the fraction. So one
byte an element is drawn, any range can be drawn by itself, and the probability is exact to 2^-64.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from stockpot.engine.native import Kernels, load_kernels

__all__ = ["MaskStream", "mask_key"]

_BYTES_PER_COUNTER = 32  # four 64-bit words
_ALL = 2**64 - 1


def mask_key(seed: int, position: int, name: str) -> int:
    """128 bits from seed, the model's place in the recipe and the tensor's name."""
    text = f"stockpot mask 1\0{seed}\0{position}\0{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


class MaskStream:
    """Draws masks; one for each thread, since making a generator costs more than a block of masks."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._draws = np.random.Generator(self._bits)
        self._kernels: Kernels | None = load_kernels()

    def fill(self, key: int, density: float, start: int, out: np.ndarray[Any, Any]) -> None:
        """Fill the booleans `out` for elements start, start + 1, ...: True with probability `density`."""
        n = len(out)
        if density >= 1 or density <= 0 or n == 0:
            out[...] = density >= 1
            return
        whole, fraction = divmod(density * 256, 1)
        rest = int(fraction * 2**64)
        if self._kernels is not None:
            self._kernels.mask(key, start, int(whole), rest, out)
            return
        draws = self._bytes(key, start, n)
        np.less(draws, whole, out=out)
        if rest:
            edge = np.flatnonzero(draws == int(whole))
            out[edge] = _hash(key, edge.astype(np.uint64) + np.uint64(start)) < np.uint64(rest)

    def fill_each(self, key: int, probability: np.ndarray[Any, Any], start: int, out: np.ndarray[Any, Any]) -> None:
        """The same with a probability for each element: where all are equal, the mask that `fill` draws."""
        exact = np.asarray(probability, np.float64) * 256
        whole = np.floor(exact)
        draws = self._bytes(key, start, len(out))
        np.less(draws, whole, out=out)
        edge = np.flatnonzero(draws == whole)
        rest = ((exact[edge] - whole[edge]) * 2.0**64).astype(np.uint64)
        out[edge] = _hash(key, edge.astype(np.uint64) + np.uint64(start)) < rest

    def words(self, key: int, start: int, n: int) -> Any:
        """64-bit words start..start + n of the stream of this key."""
        if self._kernels is not None:
            out = np.empty(n, "<u8")
            self._kernels.words(key, start, out)
            return out
        return self._bytes(key, 8 * start, 8 * n).view("<u8")

    def uniform(self, key: int, start: int, out: Any) -> None:
        """Fill `out` with the numbers from 0 to 1 of elements start, start + 1, ...

        The upper 53 bits of a word each as float64, or 24 as float32: both exact.
        """
        if self._kernels is not None:
            self._kernels.uniform(key, start, out)
        elif out.dtype == np.float64:
            np.multiply(self.words(key, start, len(out)) >> np.uint64(11), 2.0**-53, out=out)
        else:
            high = (self.words(key, start, len(out)) >> np.uint64(40)).astype(np.int32)
            np.multiply(high, np.float32(2.0**-24), out=out, dtype=np.float32, casting="unsafe")

    def _bytes(self, key: int, start: int, n: int) -> Any:
        """Bytes start..start + n of the stream of this key."""
        counter, skip = divmod(start, _BYTES_PER_COUNTER)
        self._bits.state = {
            "bit_generator": "Philox",
            "state": {"counter": _words(counter, 4), "key": _words(key, 2)},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        words = -(-(skip + n) // 8)
        drawn = self._draws.integers(0, _ALL, words, dtype=np.uint64, endpoint=True).astype("<u8", copy=False)
        return drawn.view(np.uint8)[skip : skip + n]


def _words(value: int, count: int) -> np.ndarray[Any, Any]:
    """A whole number as 64-bit words, the lowest first."""
    return np.array([(value >> (64 * i)) & _ALL for i in range(count)], np.uint64)


def _hash(key: int, index: Any) -> Any:
    """SplitMix64's finaliser over key and index: 64 well-mixed bits."""
    with np.errstate(over="ignore"):
        z = (index * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(key & _ALL)
        z += np.uint64(key >> 64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z
