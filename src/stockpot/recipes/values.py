"""Parameter values as recipes write them: a scalar, a gradient over the layers, or values chosen by tensor name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ABSENT", "Condition", "Setting", "Value", "chosen", "evaluate", "filters", "is_dynamic", "reaches_gradient"]

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "absent", "__bool__": lambda self: False})()

Scalar = float | int | bool | str


@dataclass(frozen=True)
class Condition:
    """`{filter: self_attn, value: ...}`: the value where the filter is a substring of the tensor's name."""

    filter: str | None
    value: Value

    def matches(self, name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in name


#: a scalar, a gradient (tuple of numbers) or conditions, the first match of which wins
Value = Scalar | tuple[float, ...] | tuple[Condition, ...]


@dataclass(frozen=True)
class Setting:
    """A value and the line that it stands on."""

    value: Value
    line: int


def chosen(value: Value, name: str) -> Any:
    """The scalar or the list of numbers that holds for tensor `name`, or ABSENT."""
    if isinstance(value, tuple) and value and isinstance(value[0], Condition):
        for condition in value:
            assert isinstance(condition, Condition)
            if condition.matches(name):
                return chosen(condition.value, name)
        return ABSENT
    return value


def evaluate(value: Value, name: str, t: float) -> Any:
    """The scalar that holds for tensor `name` at depth `t` (0 first layer, 1 last), or ABSENT.

    A gradient is piecewise linear over evenly spaced points.
    """
    points = chosen(value, name)
    if not isinstance(points, tuple):
        return points
    position = t * (len(points) - 1)
    low = min(int(position), len(points) - 1)
    high = min(low + 1, len(points) - 1)
    fraction = position - low
    if fraction == 0 or points[low] == points[high]:
        return points[low]
    return (1 - fraction) * points[low] + fraction * points[high]


def is_dynamic(value: Value) -> bool:
    """Whether it may differ from tensor to tensor."""
    return isinstance(value, tuple)


def reaches_gradient(value: Value, name: str) -> bool:
    """Whether a gradient with different ends decides the value for this tensor."""
    if not isinstance(value, tuple) or not value:
        return False
    if isinstance(value[0], Condition):
        for condition in value:
            if isinstance(condition, Condition) and condition.matches(name):
                return reaches_gradient(condition.value, name)
        return False
    return value[0] != value[-1]


def filters(value: Value) -> list[str]:
    """Every name filter inside a value."""
    out = []
    if isinstance(value, tuple):
        for condition in value:
            if isinstance(condition, Condition):
                if condition.filter not in (None, "*"):
                    out.append(str(condition.filter))
                out += filters(condition.value)
    return out
