"""Formats of files that hold tensors: which names they have, and how a file is described.

A format reads descriptions only: where in the file each tensor lies, as contiguous little-endian elements. The bytes are then
read by the engine, from local disks, URLs and the Hub alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stockpot.checkpoints.files import ByteFile
from stockpot.checkpoints.header import Header, header_of
from stockpot.checkpoints.torchzip import torch_file_of
from stockpot.errors import CheckpointError
from stockpot.installed import load_installed

__all__ = ["FORMATS", "Format", "add_format", "endings", "format_of", "formats", "known_endings", "read_description"]


@dataclass(frozen=True)
class Format:
    """How tensors lie in files of one kind.

    endings    what such a file's name ends in: `(".npz",)`
    describe   (an open file, the path for the header to name) -> Header; raises CheckpointError for what is damaged
    model      the file of a whole model in a directory; shards have `<model>.index.json` beside them. None where a file of
               the format is only opened by its own name
    alone      whether the only file of the format in a directory is the model, whatever its name
    adapter    the file of a PEFT adapter in its directory, or None
    """

    endings: tuple[str, ...]
    describe: Callable[[ByteFile, str], Header]
    model: str | None = None
    alone: bool = False
    adapter: str | None = None


#: by name, in the order in which a directory is searched
FORMATS: dict[str, Format] = {
    "safetensors": Format(
        (".safetensors",), header_of, "model.safetensors", alone=True, adapter="adapter_model.safetensors"
    ),
    "torch": Format(
        (".ckpt", ".pt", ".pth", ".bin", ".pth.tar", ".pt.tar"),
        lambda file, path: torch_file_of(file, path).header,
        "pytorch_model.bin",
        adapter="adapter_model.bin",
    ),
}
_BUILT_IN = tuple(FORMATS)


def add_format(name: str, format: Format) -> None:
    """Add a format of your own; a directory is searched for it after those that come with stockpot.

    Call it in a module that is imported before checkpoints are opened, or that an installed package names as an entry point
    of the group `stockpot.formats`. What `describe` returns is checked: every tensor within the file, as many bytes as its
    dtype and shape need. Raises ValueError for a name or an ending that another format has.
    """
    others = {n: f for n, f in FORMATS.items() if n != name}
    if name in _BUILT_IN:
        raise ValueError(f"format {name!r} comes with stockpot; choose another name")
    if not format.endings or not all(e.startswith(".") and len(e) > 1 for e in format.endings):
        raise ValueError(f"format {name!r}: endings are such as '.npz', got {format.endings!r}")
    for other, known in others.items():
        if clash := sorted(set(format.endings) & set(known.endings)):
            raise ValueError(f"format {name!r}: files ending in {clash[0]} are those of the format {other!r}")
    for file in (format.model, format.adapter):
        if file is not None and not file.endswith(format.endings):
            raise ValueError(f"format {name!r}: {file} does not end in {' or '.join(format.endings)}")
    FORMATS[name] = format


def formats() -> Iterator[Format]:
    """Every format, those that come with stockpot first: other packages' are looked for when these are not enough."""
    yield from (FORMATS[name] for name in _BUILT_IN)
    load_installed("stockpot.formats")
    yield from (format for name, format in FORMATS.items() if name not in _BUILT_IN)


def endings() -> tuple[str, ...]:
    """What the names of files that can be opened end in."""
    return tuple(e for f in formats() for e in f.endings)


def known_endings() -> tuple[str, ...]:
    """Those of the formats that are there already: other packages are not looked for."""
    return tuple(e for f in FORMATS.values() for e in f.endings)


def format_of(name: str) -> Format | None:
    """The format of a file by its name; None for one that can't be opened."""
    return next((f for f in formats() if name.endswith(f.endings)), None)


def read_description(file: ByteFile, name: str, path: str) -> Header:
    """The checked header of an open file whose name says its format; `path` is what the header will name.

    Raises CheckpointError.
    """
    format = format_of(name)
    # a shard of an index may have any name: what an index lists is safetensors unless its name says otherwise
    header = (format or FORMATS["safetensors"]).describe(file, path)
    own = format is None or any(format is FORMATS[n] for n in _BUILT_IN)  # these check for themselves
    return header if own else _checked(file, header)


def _checked(file: ByteFile, header: Header) -> Header:
    """What a format of somebody else's found, held to the file."""
    for name, entry in header.entries.items():
        if not 0 <= entry.start <= entry.stop <= file.size:
            raise CheckpointError(
                f"{file.label}: tensor {name!r}: bytes {entry.start} to {entry.stop} are not in the file ({file.size} bytes)"
            )
        if entry.stop - entry.start != entry.spec.nbytes:
            raise CheckpointError(
                f"{file.label}: tensor {name!r}: {entry.spec.dtype} x {list(entry.spec.shape)} needs {entry.spec.nbytes} bytes, "
                f"its place has {entry.stop - entry.start}"
            )
    if not header.raw:
        raise CheckpointError(f"{file.label}: its format gives no bytes of the description (Header.raw) to be recorded")
    return header
