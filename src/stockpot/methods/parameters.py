"""The kinds of parameters a method can declare, each able to check a value by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from stockpot.errors import nearest

__all__ = ["REQUIRED", "ByDialect", "Choice", "Flag", "Kind", "Named", "Parameter", "PerModel", "Real"]

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "required"})()


if TYPE_CHECKING:
    PerModel: TypeAlias = Any
else:

    class PerModel:
        """Marks a parameter that has one value for each model (base excluded): a tuple of floats in the function."""


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
            return f"a number {self.range}"
        return None

    @property
    def range(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return ""
        if math.isinf(self.high):
            return f"of at least {self.low:g}"
        if math.isinf(self.low):
            return f"of at most {self.high:g}"
        return f"from {self.low:g} to {self.high:g}"

    def describe(self) -> str:
        return f"number {self.range}".strip()


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def check(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else "true or false"

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


Kind = Real | Flag | Choice


@dataclass(frozen=True)
class Parameter:
    """One declared parameter of a method.

    name      in recipes
    keyword   of the Python function
    default   REQUIRED, a plain value, or ByDialect
    """

    name: str
    keyword: str
    kind: Kind
    per_model: bool
    default: Any

    def default_for(self, dialect: str | None) -> Any:
        """The default under a dialect, REQUIRED when there is none."""
        if isinstance(self.default, ByDialect):
            return self.default.values.get(dialect or "", REQUIRED)
        return self.default
