"""Signals are noted and acted upon between steps: a KeyboardInterrupt anywhere would find half-made threads and files."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["noted_signals"]


_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def noted_signals() -> Iterator[threading.Event]:
    """Within it SIGINT, SIGTERM and SIGHUP (a closed terminal) set the event. Outside the main thread they go where they went."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(signum: int, frame: FrameType | None) -> None:
        asked.set()

    # what is ignored stays so: SIGHUP under nohup
    before = {s: signal.signal(s, note) for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
