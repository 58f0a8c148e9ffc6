"""Everything that commands print goes through here: names and texts of strangers' files must not speak to the terminal."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from stockpot.errors import visible, visible_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["add_row", "console", "print_json", "say", "tell"]

#: columns where there is no terminal
_WIDTH = 160


def say(text: str = "") -> None:
    """A line, or several, to stdout."""
    print(visible(text))


def tell(text: str, *, flush: bool = False) -> None:
    """The same to stderr: notes, errors, progress, which never mix with output."""
    print(visible(text), file=sys.stderr, flush=flush)


def print_json(doc: Any) -> None:
    """One JSON document on stdout."""
    print(visible_json(json.dumps(doc, indent=2, ensure_ascii=False)))


def console(width: int = _WIDTH) -> Console:
    """For tables; width: where there is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width, markup=False, highlight=False)


def add_row(table: Table, *cells: Any) -> None:
    """A row of a table, each cell in one line."""
    table.add_row(*(visible(str(cell), line=True) for cell in cells))
