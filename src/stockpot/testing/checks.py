"""One check of a suite, and running all of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["Check", "run_checks"]


@dataclass(frozen=True)
class Check:
    """Something that must hold; called with a folder that it may write to. Raises AssertionError where it does not."""

    name: str
    run: Callable[[str], None]

    def __call__(self, folder: str | os.PathLike[str]) -> None:
        self.run(os.fspath(folder))

    def __str__(self) -> str:
        return self.name


def run_checks(checks: Iterable[Check]) -> None:
    """All of them, each in a temporary folder of its own; the first that fails raises."""
    for check in checks:
        with tempfile.TemporaryDirectory() as folder:
            check(folder)
