"""Digests that don't ask for an order of reading.

A tensor's digest is the BLAKE3 of the BLAKE3 digests of its pieces (see stockpot.grid), in order. Pieces are hashed as
they pass through, so no input is read a second time for its digest. A file's digest is the BLAKE3 of its header and of the
digests of its tensors in the order of their bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from blake3 import blake3

__all__ = ["ALGORITHM", "file_digest", "piece_digest", "tensor_digest"]

#: the name under which lineage files record it
ALGORITHM = "blake3-pieces-1"


def piece_digest(raw: Any) -> bytes:
    """32 bytes for the raw bytes of one piece."""
    return blake3(raw).digest()


def tensor_digest(pieces: Iterable[bytes]) -> str:
    """Hexadecimal digest of a tensor from those of its pieces, in order."""
    return blake3(b"".join(pieces)).hexdigest()


def file_digest(header: bytes, tensors: Iterable[str]) -> str:
    """Hexadecimal digest of a file from its header bytes and its tensors' digests in the order of their bytes."""
    h = blake3(header)
    for digest in tensors:
        h.update(bytes.fromhex(digest))
    return h.hexdigest()
