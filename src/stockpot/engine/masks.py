"""Keyed random masks: element e of a tensor is kept or dropped by (seed, model, tensor name, e) alone.

Byte e of a Philox4x64 stream, keyed by the first three, is compared with the kept fraction in 256ths. Where it hits
the boundary exactly (one element in 256) a second, 64-bit draw, a hash of key and e, decides the rest of the fraction. So one
byte an element is drawn, any range can be drawn by itself, and the probability is exact to 2^-64.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

__all__ = ["keep_mask", "mask_key"]

_BYTES_PER_COUNTER = 32  # four 64-bit words
_ALL = 2**64 - 1


def mask_key(seed: int, position: int, name: str) -> int:
    """128 bits from seed, the model's place in the recipe and the tensor's name."""
    text = f"stockpot mask 1\0{seed}\0{position}\0{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def keep_mask(key: int, density: float, start: int, out: np.ndarray[Any, Any]) -> None:
    """Fill the booleans `out` for elements start, start + 1, ...: True with probability `density`."""
    n = len(out)
    if density >= 1 or density <= 0 or n == 0:
        out[...] = density >= 1
        return
    counter, skip = divmod(start, _BYTES_PER_COUNTER)
    words = -(-(skip + n) // 8)
    stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
    drawn = stream.integers(0, _ALL, words, dtype=np.uint64, endpoint=True).astype("<u8", copy=False)
    draws = drawn.view(np.uint8)[skip : skip + n]
    whole, rest = divmod(density * 256, 1)
    np.less(draws, whole, out=out)
    if rest:
        edge = np.flatnonzero(draws == int(whole))
        out[edge] = _hash(key, edge.astype(np.uint64) + np.uint64(start)) < np.uint64(int(rest * 2**64))


def _hash(key: int, index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """SplitMix64's finaliser over key and index: 64 well-mixed bits."""
    with np.errstate(over="ignore"):
        z = (index * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(key & _ALL)
        z += np.uint64(key >> 64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
