"""The kinds of parameters a method can declare, each able to check a value by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from stockpot.errors import nearest

__all__ = [
    "KINDS", "REQUIRED", "ByDialect", "Choice", "Flag", "Kind", "Named", "Parameter", "PerLayer", "PerModel", "Real", "Text",
    "Whole",
]  # fmt: skip

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "required"})()


if TYPE_CHECKING:
    PerModel: TypeAlias = Any
    PerLayer: TypeAlias = Any
else:

    class PerModel:
        """Marks a parameter that has one value for each model (base excluded): a tuple in the function."""

    class PerLayer:
        """Marks a parameter for which a list in a recipe is a vector with an entry for each layer, not a gradient.

        The function gets the entry of the layer that its tensor lies in. Tensors outside the layers take the default, or what
        a filter gives them.
        """


@dataclass(frozen=True)
class Named:
    """The name in recipes where it can't be the Python keyword: `lambda`."""

    name: str


@dataclass(frozen=True)
class ByDialect:
    """A default that depends on the method's dialect; a dialect not named here makes the parameter required."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Real:
    """A finite float64 within [low, high], both included."""

    low: float = -math.inf
    high: float = math.inf

    def check(self, value: Any) -> str | None:
        """None, or what was expected."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e300:
            return "a number"
        if not self.low <= value <= self.high:
            return f"a number {_range(self.low, self.high)}"
        return None

    def convert(self, value: Any) -> float:
        """What the function gets for a value that was checked."""
        return float(value)

    def describe(self) -> str:
        return f"number {_range(self.low, self.high)}".strip()


def _range(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    if math.isinf(high):
        return f"of at least {low:g}"
    if math.isinf(low):
        return f"of at most {high:g}"
    return f"from {low:g} to {high:g}"


@dataclass(frozen=True)
class Whole:
    """A whole number within [low, high], both included: an int in the function."""

    low: float = -math.inf
    high: float = math.inf

    def check(self, value: Any) -> str | None:
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not abs(value) <= 2**53
            or value != int(value)
        ):
            return f"a whole number {_range(self.low, self.high)}".strip()
        if not self.low <= value <= self.high:
            return f"a whole number {_range(self.low, self.high)}"
        return None

    def convert(self, value: Any) -> int:
        return int(value)

    def describe(self) -> str:
        return f"whole number {_range(self.low, self.high)}".strip()


@dataclass(frozen=True)
class Text:
    """Any text that is not empty; `what` says in two words what it is: "layer name"."""

    what: str = "text"

    def check(self, value: Any) -> str | None:
        return None if isinstance(value, str) and value.strip() else self.what

    def convert(self, value: Any) -> str:
        return str(value)

    def describe(self) -> str:
        return self.what


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def check(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else "true or false"

    def convert(self, value: Any) -> bool:
        return bool(value)

    def describe(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    options: tuple[str, ...]

    def check(self, value: Any) -> str | None:
        if isinstance(value, str) and value in self.options:
            return None
        return f"one of {', '.join(self.options)}" + (nearest(value, self.options) if isinstance(value, str) else "")

    def describe(self) -> str:
        return " | ".join(self.options)

    def convert(self, value: Any) -> str:
        return str(value)


Kind = Real | Whole | Flag | Choice | Text
KINDS = (Real, Whole, Flag, Choice, Text)


@dataclass(frozen=True)
class Parameter:
    """One declared parameter of a method.

    name      in recipes
    keyword   of the Python function
    per_layer a list in a recipe has an entry for each layer
    default   REQUIRED, a plain value, or ByDialect
    """

    name: str
    keyword: str
    kind: Kind
    per_model: bool
    default: Any
    per_layer: bool = False

    def default_for(self, dialect: str | None) -> Any:
        """The default under a dialect, REQUIRED when there is none."""
        if isinstance(self.default, ByDialect):
            return self.default.values.get(dialect or "", REQUIRED)
        return self.default
