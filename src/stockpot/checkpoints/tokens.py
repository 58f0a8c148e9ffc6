"""Which token has which row: what tokenizer files of two models say, compared."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stockpot.checkpoints.beside import part_folders
from stockpot.errors import CheckpointError
from stockpot.files import read_bytes, read_json

__all__ = ["Difference", "compared", "highest"]

#: where tokens are listed, the first that both models have counts
_FILES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "qwen.tiktoken", "tokenizer.tiktoken", "tiktoken.model",
)  # fmt: skip


#: bytes of a tokenizer's file that are read, at most
_MOST = 2**28


@dataclass(frozen=True)
class Difference:
    """How one model's tokens are not another's. moved: a token has another row, or may have; why: in words."""

    moved: bool
    why: str


def compared(own: str, theirs: str, rows: int | None = None) -> Difference | None:
    """How the tokens of a directory differ from those of another one, in their parts too; None where they don't, or no two files
    say the same kind of thing. rows: how many are kept; None: all.
    """
    for place in _places(own, theirs):
        found = _compared(os.path.join(own, place), os.path.join(theirs, place), rows)
        if found is not None:
            return Difference(found.moved, f"{place}: {found.why}" if place else found.why)
    return None


def highest(directory: str) -> tuple[str, int] | None:
    """The token with the highest row that the tokenizer of a directory gives; None where that is not known."""
    found = _added(directory)
    for name in _FILES:
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            read = _READERS[name] if name in _READERS else _READERS[os.path.splitext(name)[1]]
            found |= read(_read(path)) or {}
            break
    return max(found.items(), key=lambda pair: pair[1], default=None)


def _places(own: str, theirs: str) -> list[str]:
    """The directory itself, and its parts that both have."""
    try:
        both = set(part_folders(own)) & set(part_folders(theirs))
    except CheckpointError:  # reported where it is opened
        both = set()
    return ["", *sorted(both)]


def _compared(own: str, theirs: str, rows: int | None) -> Difference | None:
    added = [_added(d) for d in (own, theirs)]
    for name in _FILES:
        one, two = os.path.join(own, name), os.path.join(theirs, name)
        if not (os.path.isfile(one) and os.path.isfile(two)):
            continue
        raw = [_read(p) for p in (one, two)]
        if raw[0] == raw[1] and added[0] == added[1]:
            return None
        read = _READERS[name] if name in _READERS else _READERS[os.path.splitext(name)[1]]
        a, b = (read(r) for r in raw)
        if a is None or b is None:
            return Difference(True, f"{name} is another one than") if raw[0] != raw[1] else None
        return _difference(a | added[0], b | added[1], rows)
    return _difference(added[0], added[1], rows) if added[0] and added[1] else None


def _read(path: str) -> bytes:
    try:
        return read_bytes(path, _MOST)
    except OSError as e:
        raise CheckpointError(f"{path}: can't be read: {e.strerror or e}") from e


def _difference(own: Mapping[str, int], theirs: Mapping[str, int], rows: int | None) -> Difference | None:
    kept = {t: i for t, i in own.items() if rows is None or i < rows}
    there = {t: i for t, i in theirs.items() if rows is None or i < rows}
    if kept == there:
        return None
    for token, row in there.items():
        if kept.get(token, row) != row:
            return Difference(True, f"token {token!r} is row {row}, but row {kept[token]}")
    by_row = {i: t for t, i in kept.items()}
    for token, row in there.items():
        if by_row.get(row, token) != token:
            return Difference(True, f"row {row} is that of {token!r}, but of {by_row[row]!r}")
    more, less = len(there.keys() - kept.keys()), len(kept.keys() - there.keys())
    return Difference(False, f"{more} more tokens, and {less} fewer, all others with the same rows as")


def _rows(pairs: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    """Tokens and their rows. Raises ValueError for what is none."""
    found: dict[str, int] = {}
    for token, row in pairs:
        row = int(row) if isinstance(row, str) and row.isdigit() and len(row) < 19 else row
        if not isinstance(token, str) or isinstance(row, bool) or not isinstance(row, int):
            raise ValueError("not a token and its row")
        found[token] = row
    return found


def _added(directory: str) -> dict[str, int]:
    """Tokens that were added beside the tokenizer's own file."""
    found: dict[str, int] = {}
    with contextlib.suppress(CheckpointError, *_ODD):
        found |= _rows(read_json(os.path.join(directory, "added_tokens.json")).items())
    with contextlib.suppress(CheckpointError, *_ODD):
        listed = read_json(os.path.join(directory, "tokenizer_config.json"))["added_tokens_decoder"]
        found |= _rows((t["content"], i) for i, t in listed.items())
    return found


#: what comes of a file that holds something else
_ODD = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)


def _of_json(raw: bytes) -> dict[str, int] | None:
    try:
        doc = json.loads(raw)
        vocabulary = doc["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((v[0], i) for i, v in enumerate(vocabulary))
        return _rows(pairs) | _rows((t["content"], t["id"]) for t in doc.get("added_tokens") or ())
    except _ODD:
        return None


def _of_mapping(raw: bytes) -> dict[str, int] | None:
    try:
        return _rows(json.loads(raw).items())
    except _ODD:
        return None


def _of_tekken(raw: bytes) -> dict[str, int] | None:
    try:
        doc: Any = json.loads(raw)
        found = _rows((t["token_bytes"], t["rank"]) for t in doc["vocab"])
        return found | _rows((f"special {t['token_str']}", t["rank"]) for t in doc.get("special_tokens") or ())
    except _ODD:
        return None


def _of_lines(raw: bytes) -> dict[str, int] | None:
    lines = raw.decode("utf-8", "replace").removesuffix("\n").split("\n")
    return {line.removesuffix("\r"): i for i, line in enumerate(lines)}


def _of_ranks(raw: bytes) -> dict[str, int] | None:
    """A line for each token: base64 and its rank."""
    try:
        pairs = (line.split() for line in raw.decode().splitlines() if line.strip())
        return {base64.b64decode(token).hex(): int(rank) for token, rank in pairs}
    except ValueError:
        return None


def _of_sentencepiece(raw: bytes) -> dict[str, int] | None:
    """The pieces of a sentencepiece model: its field 1, repeated, each with the text as its own field 1."""
    out: dict[str, int] = {}
    try:
        for field, value in _fields(raw):
            if field == 1 and isinstance(value, bytes):
                text = next(v for f, v in _fields(value) if f == 1 and isinstance(v, bytes))
                out[text.decode("utf-8", "replace")] = len(out)
    except (IndexError, ValueError, StopIteration):
        return None
    return out or None


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protocol buffer. Raises IndexError or ValueError for what is none."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while shift < 70:  # ten bytes; a number without end would take the square of its length
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError("a number that does not end")

    while at < len(raw):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind) or number()
            if at + size > len(raw):
                raise ValueError("cut short")
            yield key >> 3, raw[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {kind}")


_READERS: Mapping[str, Callable[[bytes], dict[str, int] | None]] = {
    "vocab.json": _of_mapping, "tekken.json": _of_tekken, "tiktoken.model": _of_ranks, ".json": _of_json, ".txt": _of_lines,
    ".model": _of_sentencepiece, ".tiktoken": _of_ranks,
}  # fmt: skip
