"""Grids over the parameters of any recipe: `weight=0.2:0.8:0.2`, `models[0].weight=0.3,0.7`, `run.penalty=0.5,0.7`.

`models.weight=simplex:10` is the grid of rewarded soups (arXiv 2306.04488): every way to share 1 among the models in tenths.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.errors import ArgumentError, nearest
from stockpot.methods import get_method
from stockpot.search.candidates import Tried

__all__ = ["Simplex", "grid_candidates", "parse_grid"]

_MAX_POINTS = 10_000
_RANGE = re.compile(r"([^:]+):([^:]+):([^:]+)")


@dataclass(frozen=True)
class Simplex:
    """Every way to share 1 among the models in steps of 1 / parts: C(parts + models - 1, models - 1) points, corners included."""

    parts: int

    def count(self, models: int) -> int:
        return math.comb(self.parts + models - 1, models - 1)

    def points(self, models: int) -> Iterator[tuple[float, ...]]:
        # the places of models - 1 bars among parts stars
        for bars in itertools.combinations(range(self.parts + models - 1), models - 1):
            edges = (-1, *bars, self.parts + models - 1)
            yield tuple((b - a - 1) / self.parts for a, b in itertools.pairwise(edges))


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any] | Simplex]:
    """`KEY=FIRST:LAST:STEP` (both ends included), `KEY=A,B,C` or `models.KEY=simplex:PARTS` -> values by key.

    Raises ArgumentError.
    """
    out: dict[str, list[Any] | Simplex] = {}
    for text in texts:
        key, sign, values = text.partition("=")
        key = key.strip()
        if not sign or not key or not values.strip():
            raise ArgumentError(f"grid: expected KEY=FIRST:LAST:STEP or KEY=A,B,..., got {text!r}")
        if key in out:
            raise ArgumentError(f"grid: {key} is given twice")
        if values.strip().startswith("simplex"):
            out[key] = _simplex(text, key, values.strip())
            continue
        match = _RANGE.fullmatch(values.strip())
        out[key] = (
            _range(text, *match.groups()) if match else [_value(v.strip()) for v in values.split(",") if v.strip()]
        )
    _few_enough(math.prod(len(v) for v in out.values() if not isinstance(v, Simplex)))
    return out


def _few_enough(points: int) -> None:
    if points > _MAX_POINTS:
        raise ArgumentError(f"grid: {points} combinations are more than {_MAX_POINTS}")


def _simplex(text: str, key: str, values: str) -> Simplex:
    match = re.fullmatch(r"simplex:(\d{1,4})", values)
    if match is None or int(match[1]) < 1:
        raise ArgumentError(f"grid: expected simplex:PARTS, as simplex:10 for tenths, got {text!r}")
    if not re.fullmatch(r"models\.\w+", key):
        raise ArgumentError(f"grid: a simplex shares 1 among all models: models.weight={values}, got {text!r}")
    return Simplex(int(match[1]))


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


def grid_candidates(recipe: Mapping[str, Any], grid: Mapping[str, Sequence[Any] | Simplex]) -> Iterator[Tried]:
    """The recipe with every combination of values. Raises ArgumentError for a key that the recipe has no place for."""
    models = len(recipe.get("models") or [])
    places = {key: _each(key, models) if isinstance(v, Simplex) else [key] for key, v in grid.items()}
    for place in itertools.chain(*places.values()):
        _place(copy.deepcopy(dict(recipe)), place)
    _few_enough(math.prod(v.count(models) if isinstance(v, Simplex) else len(v) for v in grid.values()))
    axes = [list(v.points(models)) if isinstance(v, Simplex) else v for v in grid.values()]
    for chosen in itertools.product(*axes):
        made = copy.deepcopy(dict(recipe))
        settings = dict(zip(grid, chosen))
        for key, value in settings.items():
            for place, one in zip(places[key], value if isinstance(grid[key], Simplex) else [value]):
                container, name = _place(made, place)
                container[name] = one
        yield Tried("_".join(f"{k}-{_written(v)}" for k, v in settings.items()) or "recipe", "grid", made, settings)


def _each(key: str, models: int) -> list[str]:
    """`models.weight` -> `models[0].weight`, ..."""
    if models < 2:
        raise ArgumentError(f"grid: {key}: a simplex shares 1 among two models or more, the recipe lists {models}")
    return [f"models[{i}].{key.removeprefix('models.')}" for i in range(models)]


def _written(value: Any) -> str:
    return "-".join(f"{v:.4g}" for v in value) if isinstance(value, tuple) else str(value)


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
        raise ArgumentError(f"grid: {key}: no such parameter; known are {', '.join(parameters) or 'none'}, models[N].NAME, "
                            f"models.NAME=simplex:PARTS and run.NAME{nearest(name, parameters)}")  # fmt: skip
    return name
