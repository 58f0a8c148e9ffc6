"""What other installed packages add: modules that they name as entry points, and that register things when imported."""

from __future__ import annotations

__all__ = ["load_installed"]

_done: set[str] = set()


def load_installed(group: str) -> None:
    """Import what is named under a group of entry points, once. What registers itself may call this again meanwhile."""
    if group in _done:
        return
    _done.add(group)
    from importlib.metadata import entry_points

    for entry in entry_points(group=group):
        entry.load()
