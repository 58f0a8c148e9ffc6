"""Who does the work of a loop: the caller's own thread, or several threads while the caller looks on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

__all__ = ["Executor", "Inline", "Threads", "executor_of"]


class Executor(Protocol):
    """Runs a worker until there is no work; any number of times at once."""

    def run(self, worker: Callable[[], None], tick: Callable[[], bool], stop: Callable[[], None]) -> None:
        """Return when no worker is left.

        worker  takes work until there is none, and raises nothing
        tick    called now and then from this thread; when it says so, or raises, workers are to stop
        stop    makes workers find no more work
        """
        ...


class Inline:
    """This thread alone. tick is called before and after."""

    def run(self, worker: Callable[[], None], tick: Callable[[], bool], stop: Callable[[], None]) -> None:
        if not tick():
            worker()
            tick()


class Threads:
    """So many threads; this one calls tick about every 0.1 s."""

    def __init__(self, count: int) -> None:
        self.count = count

    def run(self, worker: Callable[[], None], tick: Callable[[], bool], stop: Callable[[], None]) -> None:
        threads = [threading.Thread(target=worker, name=f"stockpot-{i}", daemon=True) for i in range(self.count)]
        try:
            for thread in threads:
                thread.start()
            while alive := [t for t in threads if t.is_alive()]:
                alive[0].join(0.1)
                if tick():
                    stop()
        finally:
            # whatever `tick` raises: no thread may go on once the files are closed, their descriptors may soon be others'
            stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


def executor_of(threads: int) -> Executor:
    """Inline for one thread, where nobody waits for ticks."""
    return Inline() if threads == 1 else Threads(threads)
