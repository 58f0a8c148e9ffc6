"""The safetensors header: read and checked in full before any tensor is trusted.

A file is 8 bytes of little-endian header length N, N bytes of JSON, then the data. Checked here, as the format
demands: N within the file and at most 100 MB, UTF-8 JSON that starts with `{`, no key twice, a known dtype, a shape of
non-negative integers, `dtype x shape == length`, offsets that tile the data exactly: no holes, no overlaps, no tail.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

from stockpot.checkpoints.files import ByteFile, LocalFile, inode_of
from stockpot.errors import CheckpointError, brief
from stockpot.specs import BY_LABEL, MOST_AXES, MOST_NAME, TensorSpec

__all__ = ["MAX_HEADER_BYTES", "Entry", "Header", "check_name", "encode_header", "header_of", "read_header"]

MAX_HEADER_BYTES = 100_000_000
_MAX_ELEMENTS = 2**62


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file: its spec and the absolute byte range of its data."""

    spec: TensorSpec
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. `entries` is ordered by offset; `raw` are the header's own bytes, for its digest.

    path       where reads will find the file: a path, or a URL
    mtime_ns   its time of change; of a file behind a URL whatever stands for it there
    inode      what else shows that the file is the same: device, number and time of its last change of any kind; () where the
               stamp of a store says it all, None where nothing does but size and header
    strides    of tensors whose elements lie in another order than theirs: the axes from the outermost to the innermost
    parts      what the names of the file's parts begin with, by part: several state dicts in one file
    members    the names of each part's tensors
    left       what the file holds besides that is no weight, in words
    """

    path: str
    size: int
    mtime_ns: int
    data_start: int
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    raw: bytes = b""
    inode: tuple[int, ...] | None = ()
    strides: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    members: dict[str, frozenset[str]] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def is_that(self, found: os.stat_result) -> bool:
        """Whether a local file is the one whose header this is, of the same size and time; see `is_untouched`."""
        if (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns):
            return False
        return not self.inode or inode_of(found)[:2] == self.inode[:2]

    def is_untouched(self, found: os.stat_result) -> bool:
        """Whether nothing at all has happened to it: no new permissions or names, no writing with the time set back."""
        return self.is_that(found) and (not self.inode or inode_of(found) == self.inode)


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return out


def read_header(path: str) -> Header:
    """Read and check the header of one `.safetensors` file. Raises CheckpointError naming file and fault."""
    with contextlib.closing(LocalFile.open(path)) as file:
        return header_of(file, path)


def header_of(file: ByteFile, path: str) -> Header:
    """The same of a file that is open; path is what the header will say."""
    label, size = file.label, file.size
    try:
        head = file.read(0, 8)
        if len(head) < 8:
            raise CheckpointError(f"{label}: {size} bytes is too short for a safetensors file")
        if head == b"version ":
            raise CheckpointError(
                f"{label}: is a Git LFS pointer, not the file that it stands for: run `git lfs pull` there"
            )
        n = int.from_bytes(head, "little")
        if n > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{label}: header length {n} is over the format's limit of {MAX_HEADER_BYTES} bytes; "
                "this is not a safetensors file, or it is damaged"
            )
        if n > size - 8:
            raise CheckpointError(f"{label}: header length {n} runs past the end of the file ({size} bytes)")
        raw = file.read(8, 8 + n)
    except OSError as e:
        raise CheckpointError(f"{label}: can't be read: {e.strerror or e}") from e
    if len(raw) != n:
        raise CheckpointError(f"{label}: truncated inside its header")
    entries, metadata = _parse(label, raw, 8 + n, size)
    return Header(path, size, file.stamp, 8 + n, entries, metadata, head + raw, file.inode)


def _parse(path: str, raw: bytes, data_start: int, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: header does not start with '{{'; this is not a safetensors file")
    try:
        doc = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKey as e:
        raise CheckpointError(f"{path}: header names {e.args[0]!r} twice") from e
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: header is not valid JSON: {e}") from e
    metadata = doc.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    found = [_entry(path, name, value, data_start) for name, value in doc.items()]
    found.sort(key=lambda item: (item[1].start, item[1].stop))
    position = data_start
    for name, entry in found:
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: {name!r} starts at byte {entry.start - data_start} and {kind}")
        position = entry.stop
    if position != size:
        what = "is truncated" if position > size else "has bytes that no tensor owns"
        raise CheckpointError(f"{path}: {what}: the header describes {position} bytes, the file has {size}")
    return dict(found), metadata


def _entry(path: str, name: str, value: Any, data_start: int) -> tuple[str, Entry]:
    def bad(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {why}")

    check_name(name, path)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad("expected exactly the keys dtype, shape, data_offsets")
    dtype = BY_LABEL.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise bad(f"dtype {brief(value['dtype'])} is not supported; known are {', '.join(BY_LABEL)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if isinstance(shape, list) and len(shape) > MOST_AXES:
        raise bad(f"a shape of {len(shape)} dimensions; at most {MOST_AXES} are taken")
    if not isinstance(shape, list) or not all(type(d) is int and 0 <= d <= _MAX_ELEMENTS for d in shape):
        raise bad(f"shape {brief(shape)} is not a list of non-negative integers")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)):
        raise bad(f"data_offsets {brief(offsets)} is not a pair of non-negative integers")
    spec = TensorSpec(dtype, tuple(shape))
    if spec.numel > _MAX_ELEMENTS:
        raise bad(f"shape {brief(shape)} overflows")
    start, stop = offsets
    if stop - start != spec.nbytes:
        raise bad(f"{dtype} x {shape} needs {spec.nbytes} bytes, data_offsets give {stop - start}")
    return name, Entry(spec, data_start + start, data_start + stop)


def check_name(name: str, path: str) -> None:
    """Raise CheckpointError for a tensor's name that is no text, or far longer than any model's."""
    if len(name) > MOST_NAME:
        raise CheckpointError(
            f"{path}: a tensor's name of {len(name)} characters ({name[:40]!r}...): at most {MOST_NAME} are taken"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: tensor {name!r}: its name is not valid Unicode") from None


def encode_header(entries: dict[str, tuple[TensorSpec, int]], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes before the data: length, JSON, padding to 8. `entries`: name -> (spec, offset within the data)."""
    doc: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, (spec, start) in entries.items():
        doc[name] = {
            "dtype": spec.dtype.label,
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.nbytes],
        }
    raw = json.dumps(doc, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
