"""Files that people write: text in UTF-8, with or without the mark that Excel puts first, and tables."""

from __future__ import annotations

import csv
import io
import os

from stockpot.errors import StockpotError, nearest_file

__all__ = ["read_table", "read_text"]


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
