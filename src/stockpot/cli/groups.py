"""Options in groups: a command takes dataclasses of options, and typer sees their fields."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["grouped"]

F = TypeVar("F", bound=Callable[..., Any])


def grouped(command: F) -> F:
    """A command whose parameters that are dataclasses are taken apart for typer, and put together again for it.

    The fields of such a dataclass are annotated as typer's options are; two groups must not share a name.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    shown: list[inspect.Parameter] = []
    for p in inspect.signature(command).parameters.values():
        kind = hints[p.name]
        if not dataclasses.is_dataclass(kind):
            shown.append(p.replace(annotation=kind))
            continue
        groups[p.name] = kind
        fields = typing.get_type_hints(kind, include_extras=True)
        for f in dataclasses.fields(kind):
            shown.append(
                inspect.Parameter(f.name, p.POSITIONAL_OR_KEYWORD, default=f.default, annotation=fields[f.name])
            )

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        made = {
            name: kind(**{f.name: given.pop(f.name) for f in dataclasses.fields(kind)}) for name, kind in groups.items()
        }
        return command(**given, **made)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown} | {"return": None}
    del run.__wrapped__
    return run  # type: ignore[return-value]
