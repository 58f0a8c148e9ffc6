"""Progress by bytes, by examples, by candidates: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from stockpot.cli.terminal import tell
from stockpot.errors import visible
from stockpot.specs import format_size

__all__ = ["progress_bar", "scoring_bar", "sweep_bar"]

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
            tell(
                f"merging: {done / total:.0%} of {format_size(total)}, {format_size(rate)}/s, {left:.0f} s left",
                flush=True,
            )

    return say


@contextlib.contextmanager
def scoring_bar(*, enabled: bool) -> Iterator[Callable[[str, str, int, int], None] | None]:
    """A function to call with (checkpoint, slice, examples done, examples in all), or None."""
    with _counted(enabled=enabled) as show:
        yield None if show is None else lambda name, label, done, total: show(done, total, f"{name}: {label}")


@contextlib.contextmanager
def sweep_bar(*, enabled: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A function to call with (candidates done, candidates known, what is being done), or None."""
    with _counted(enabled=enabled) as show:
        yield show


@contextlib.contextmanager
def _counted(*, enabled: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    if not enabled:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=None)
            yield lambda done, total, what: progress.update(
                task, completed=done, total=total or None, description=visible(what, line=True)
            )
    else:
        last = time.monotonic()

        def say(done: int, total: int, what: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _PLAIN_SECONDS:
                last = now
                tell(f"scoring: {done} of {total or '?'}: {what}", flush=True)

        yield say
