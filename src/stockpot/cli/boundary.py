"""The one place where errors become messages and exit codes."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import typer

from stockpot.cli.terminal import tell
from stockpot.errors import ProblemsError, StockpotError

__all__ = ["boundary"]

#: of many problems, how many are printed
_SHOWN = 50

F = TypeVar("F", bound=Callable[..., Any])


def boundary(command: F) -> F:
    """Wrap a command: StockpotError -> message and its exit code; a signal -> 130; anything else is a bug, 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        for name in ("SIGTERM", "SIGHUP"):  # `kill`, and a terminal that was closed
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:  # nohup
                signal.signal(getattr(signal, name), _stop)
        try:
            return command(*args, **kwargs)
        except ProblemsError as e:
            for problem in e.problems[:_SHOWN]:
                _say(f"error: {problem}")
            if len(e.problems) > _SHOWN:
                _say(f"error: and {len(e.problems) - _SHOWN} more")
            raise typer.Exit(e.exit_code) from None
        except StockpotError as e:
            _say(f"error: {e}" if e.exit_code != 130 else str(e))
            raise typer.Exit(e.exit_code) from None
        except KeyboardInterrupt:
            _say("stopped")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # the reader of our output went away (`stockpot methods | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception:
            import traceback

            _say(traceback.format_exc().rstrip())
            _say("error: this is a bug in stockpot; please report it with the lines above")
            raise typer.Exit(1) from None

    return run  # type: ignore[return-value]


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        tell(text)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
