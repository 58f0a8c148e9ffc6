"""Files on this machine: text in UTF-8 as people write it, tables, JSON, writing that a crash can't halve; and what is a URL."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
from typing import Any

from stockpot.errors import CheckpointError, StockpotError, nearest_file

__all__ = ["is_url", "read_json", "read_table", "read_text", "replace_file", "without_file_scheme", "write_file"]

_MAX_JSON = 64 * 2**20


def read_text(path: str, what: str, error: type[StockpotError], *, most: int = 2**28, where: str = "") -> str:
    """The whole file. what: "a recipe", for the error when it has more than `most` bytes; where: what errors begin with."""
    try:
        if os.path.getsize(path) > most:
            raise error(f"{where}{path}: {os.path.getsize(path)} bytes is too large for {what}")
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except OSError as e:
        raise error(f"{where}{path}: can't be read: {e.strerror or e}{nearest_file(path)}") from e
    except UnicodeDecodeError as e:
        raise error(f"{where}{path}: not a text file in UTF-8: {e.reason} at byte {e.start}") from e


def read_table(text: str, path: str, error: type[StockpotError]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """A CSV file's names of columns, and (line, cells) of every row that isn't blank."""
    reader = csv.reader(io.StringIO(text))
    try:
        names = [c.strip() for c in next(reader, [])]
        return names, [(reader.line_num, row) for row in reader if any(c.strip() for c in row)]
    except csv.Error as e:
        raise error(f"{path}:{reader.line_num}: not a CSV file: {e}") from e


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError for anything else."""
    try:
        if os.path.getsize(path) > _MAX_JSON:
            raise CheckpointError(f"{path}: {os.path.getsize(path)} bytes is too large for a JSON file of a checkpoint")
        with open(path, encoding="utf-8") as f:
            doc = json.load(f)
    except OSError as e:
        raise CheckpointError(f"{path}: can't be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(doc, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(doc).__name__}")
    return doc


def write_file(path: str, text: str) -> None:
    """Write and flush one file."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def replace_file(path: str, content: str | bytes) -> None:
    """Write a file whole, flushed, in place of what was there; or leave that."""
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    try:
        with open(path + ".tmp", "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path + ".tmp")
        raise


def without_file_scheme(text: str) -> str:
    """`file:///a/b` and `local:///a/b` -> `/a/b`; anything else as it is."""
    return re.sub(r"^(file|local)://(?=/)", "", text)


def is_url(text: str) -> bool:
    """Whether a reference is a URL rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None
