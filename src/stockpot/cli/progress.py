"""Progress by bytes: a bar with GB/s and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from stockpot.specs import format_size

__all__ = ["progress_bar"]

_PLAIN_SECONDS = 5.0


@contextlib.contextmanager
def progress_bar(*, enabled: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A function to call with (bytes done, bytes in all), or None when there is nothing to show."""
    if not enabled:
        yield None
    elif sys.stderr.isatty():
        yield from _bar()
    else:
        yield _plain()


def _bar() -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("merge", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _plain() -> Callable[[int, int], None]:
    began = last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PLAIN_SECONDS and total:
            last = now
            rate = done / (now - began)
            left = (total - done) / rate if rate else 0
            print(
                f"merging: {done / total:.0%} of {format_size(total)}, {format_size(rate)}/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    return say
