"""Checks a directory against its lineage: every tensor's bytes are read and hashed again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from blake3 import blake3

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.files import check_link
from stockpot.checkpoints.header import Header
from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.devices import byte_buffer
from stockpot.engine.digests import ALGORITHM, file_digest, piece_digest, tensor_digest
from stockpot.errors import CheckpointError
from stockpot.files import open_regular
from stockpot.grid import grid_of

__all__ = ["checkpoint_digests", "compare", "side_digest", "stored_digest"]


def checkpoint_digests(checkpoint: Checkpoint, threads: int) -> dict[str, str]:
    """Digest of every tensor, read by several threads."""
    names = list(checkpoint.names())
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(lambda name: stored_digest(checkpoint, name), names), strict=True))


def stored_digest(checkpoint: Checkpoint, name: str) -> str:
    """Digest of one tensor, read piece by piece."""
    spec = checkpoint.spec(name)
    grid = grid_of(spec.shape)
    pieces = []
    for k in range(grid.pieces):
        start, stop = grid.bounds(k)
        raw = byte_buffer((stop - start) * spec.dtype.itemsize)
        checkpoint.read([ReadRequest(name, start, stop)], raw)
        pieces.append(piece_digest(raw))
    return tensor_digest(pieces)


def side_digest(path: str) -> str:
    """BLAKE3 of a file beside the tensors (config, tokenizer), hexadecimal; read in pieces. Raises OSError."""
    digest = blake3()
    with open(open_regular(path), "rb") as f:
        while piece := f.read(2**20):
            digest.update(piece)
    return str(digest.hexdigest())


def _digests(actual: Mapping[str, str], header: Header, prefixes: Mapping[str, str]) -> list[str]:
    """Of a file's tensors, in its order."""
    return [actual[prefixes.get(header.path, "") + name] for name in header.entries]


def compare(lineage: Mapping[str, Any], checkpoint: Checkpoint, threads: int) -> list[str]:
    """What differs from a lineage, in words; an empty list when nothing does."""
    wrong = []
    if lineage["format"] != 1 or lineage["digests"] != ALGORITHM:
        return [
            f"lineage format {lineage['format']!r} with digests {lineage['digests']!r} is not one this version knows"
        ]
    if hashlib.sha256(lineage["recipe"]["text"].encode()).hexdigest() != lineage["recipe"]["sha256"]:
        wrong.append("the recipe's text in the lineage does not match its digest")
    recorded = lineage["output"]
    actual = checkpoint_digests(checkpoint, threads)
    files = {file["name"]: file for file in recorded["files"]}
    headers = {checkpoint.relative(header): header for header in checkpoint.files}
    prefixes = {h.path: p.prefix for h, p in zip(checkpoint.files, checkpoint.parted)}
    for name, file in files.items():
        if name not in headers:
            wrong.append(f"{name}: missing")
        elif headers[name].size != file["bytes"]:
            wrong.append(f"{name}: {headers[name].size} bytes, the lineage says {file['bytes']}")
        elif file_digest(headers[name].raw, _digests(actual, headers[name], prefixes)) != file["digest"]:
            wrong.append(f"{name}: is not the file that was written")
    wrong += [f"{name}: not in the lineage" for name in headers if name not in files]
    tensors = recorded["tensors"]
    for name, entry in tensors.items():
        if name not in actual:
            wrong.append(f"{name!r}: missing")
            continue
        spec = checkpoint.spec(name)
        if spec.dtype.label != entry["dtype"] or list(spec.shape) != entry["shape"]:
            wrong.append(
                f"{name!r}: {spec.dtype} {list(spec.shape)}, the lineage says {entry['dtype']} {entry['shape']}"
            )
        elif actual[name] != entry["digest"]:
            wrong.append(f"{name!r}: its bytes are not those that were written")
    wrong += [f"{name!r}: not in the lineage" for name in actual if name not in tensors]
    for name, digest in lineage["output"]["side_files"].items():
        known = {digest, *(lineage.get("card_before", ()) if name == "README.md" else ())}
        why = _beside(checkpoint.directory, name, known)
        wrong += [f"{name}: {why}"] if why else []
    return wrong


def _beside(directory: str, name: str, digests: Container[str]) -> str:
    """What is wrong with a file beside the tensors; nothing outside of the directory is looked at."""
    path = os.path.join(directory, name)
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name or ":" in name:
        return "lies outside of the directory, and is not looked at"
    try:
        check_link(directory, path)
        if not os.path.isfile(path):
            return "missing"
        return "" if side_digest(path) in digests else "is not the file that was written"
    except (OSError, CheckpointError) as e:
        return f"can't be read: {e}"
