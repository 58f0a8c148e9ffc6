"""Grids over the parameters of any recipe: `weight=0.2:0.8:0.2`, `models[0].weight=0.3,0.7`, `run.penalty=0.5,0.7`."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stockpot.errors import ArgumentError, nearest
from stockpot.methods import get_method
from stockpot.search.candidates import Tried

__all__ = ["grid_candidates", "parse_grid"]

_MAX_POINTS = 10_000
_RANGE = re.compile(r"([^:]+):([^:]+):([^:]+)")


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`KEY=FIRST:LAST:STEP` (both ends included) or `KEY=A,B,C` -> values by key. Raises ArgumentError."""
    out: dict[str, list[Any]] = {}
    for text in texts:
        key, sign, values = text.partition("=")
        key = key.strip()
        if not sign or not key or not values.strip():
            raise ArgumentError(f"grid: expected KEY=FIRST:LAST:STEP or KEY=A,B,..., got {text!r}")
        if key in out:
            raise ArgumentError(f"grid: {key} is given twice")
        match = _RANGE.fullmatch(values.strip())
        out[key] = (
            _range(text, *match.groups()) if match else [_value(v.strip()) for v in values.split(",") if v.strip()]
        )
    points = math.prod(len(v) for v in out.values())
    if points > _MAX_POINTS:
        raise ArgumentError(f"grid: {points} combinations are more than {_MAX_POINTS}")
    return out


def _range(text: str, first: str, last: str, step: str) -> list[Any]:
    try:
        a, b, s = float(first), float(last), float(step)
    except ValueError:
        raise ArgumentError(f"grid: expected three numbers FIRST:LAST:STEP, got {text!r}") from None
    if not all(map(math.isfinite, (a, b, s))) or s <= 0 or b < a:
        raise ArgumentError(f"grid: expected FIRST <= LAST and STEP above 0, got {text!r}")
    count = math.floor((b - a) / s + 1e-9) + 1
    if count > _MAX_POINTS:
        raise ArgumentError(f"grid: {text!r} has {count} values")
    found = [round(a + i * s, 12) for i in range(count)]
    return [int(v) if v.is_integer() and "." not in first + last + step else v for v in found]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def grid_candidates(recipe: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> Iterator[Tried]:
    """The recipe with every combination of values. Raises ArgumentError for a key that the recipe has no place for."""
    for key in grid:
        _place(copy.deepcopy(dict(recipe)), key)
    for values in itertools.product(*grid.values()):
        made = copy.deepcopy(dict(recipe))
        settings = dict(zip(grid, values))
        for key, value in settings.items():
            container, name = _place(made, key)
            container[name] = value
        yield Tried("_".join(f"{k}-{v}" for k, v in settings.items()) or "recipe", "grid", made, settings)


def _place(recipe: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The mapping and the name in it that a key means: a parameter of the method, of one model, or an option of `run`."""
    method = recipe.get("merge_method")
    parameters = list(get_method(str(method)).parameters) if isinstance(method, str) else []
    match = re.fullmatch(r"models\[(\d+)\]\.(\w+)", key)
    if match:
        models = recipe.get("models") or []
        if int(match[1]) >= len(models):
            raise ArgumentError(f"grid: {key}: the recipe has {len(models)} models, counted from 0")
        model = models[int(match[1])]
        if not isinstance(model, dict):
            model = models[int(match[1])] = {"model": model}
        return _settings(model), _known(key, match[2], parameters)
    if key.startswith("run."):
        if not isinstance(recipe.get("run"), dict):
            raise ArgumentError(f"grid: {key}: the recipe has no run")
        return recipe["run"], key.removeprefix("run.")
    if key in recipe and not isinstance(recipe[key], (dict, list)):
        return recipe, key
    return _settings(recipe), _known(key, key, parameters)


def _settings(owner: dict[str, Any]) -> dict[str, Any]:
    found = owner.setdefault("parameters", {})
    if not isinstance(found, dict):
        raise ArgumentError("grid: the recipe's parameters are not a mapping")
    return found


def _known(key: str, name: str, parameters: Sequence[str]) -> str:
    if name not in parameters:
        raise ArgumentError(f"grid: {key}: no such parameter; known are {', '.join(parameters) or 'none'}, models[N].NAME and "
                            f"run.NAME{nearest(name, parameters)}")  # fmt: skip
    return name
