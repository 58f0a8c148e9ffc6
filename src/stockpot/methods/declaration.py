"""`@method`: a pure function on blocks, declared once.

The signature is the only declaration. Recipe validation, `stockpot methods`, the docs table, the plan and the engine all
derive from it. A method is one of six families, told apart by what it declares:

- nothing more: a weighted sum (linear, task arithmetic);
- `stats=(Total(gram),)`: weights computed from a few sums (the SLERP family);
- `stats=(Cutoff(...),)`: trimmed by a magnitude that is known only after a first pass (TIES);
- `random=Mask(...)`: keyed random masks (DARE); `scope=Scope.ROW` for ranks inside a row (DELLA);
- `companions=("fisher",)`: a second checkpoint of the same names beside each model (Fisher averaging);
- `scope=Scope.TENSOR`: the whole matrix at once (subspace methods).
"""

from __future__ import annotations

import enum
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stockpot.errors import RecipeError, nearest
from stockpot.methods.forms import Form
from stockpot.methods.parameters import REQUIRED, Choice, Flag, Named, Parameter, PerModel, Real
from stockpot.methods.statistics import Cutoff, Mask, Statistic

__all__ = ["Method", "Scope", "Space", "get_method", "method", "methods"]


class Scope(enum.Enum):
    """How much of a tensor the function must see at once."""

    ELEMENT = "element"
    ROW = "row"
    TENSOR = "tensor"


class Space(enum.Enum):
    """WEIGHT: the function gets the models' weights. DELTA: weights minus base, and the base is added after it."""

    WEIGHT = "weight"
    DELTA = "delta"


@dataclass(frozen=True)
class Method:
    """A declared merge method. Calling it merges plain dicts of tensors; `function` is the mathematics on blocks.

    models        fewest and most models (None: any number); the base does not count in DELTA space
    check         what is wrong with a combination of parameters, or None
    form          the function's keywords -> the Form that does the same, for compiled kernels; or None
    """

    name: str
    function: Callable[..., Any]
    scope: Scope
    space: Space
    models: tuple[int, int | None]
    stats: tuple[Statistic, ...]
    random: Mask | None
    companions: tuple[str, ...]
    cite: str
    parameters: dict[str, Parameter]
    check: Callable[[Mapping[str, Any]], str | None] | None = None
    form: Callable[..., Form] | None = None

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def dialects(self) -> tuple[str, ...]:
        """The named readings of the formula, the default first."""
        dialect = self.parameters.get("dialect")
        if dialect is None or not isinstance(dialect.kind, Choice):
            return ()
        rest = tuple(d for d in dialect.kind.options if d != dialect.default)
        return (dialect.default, *rest)

    def active_stats(self, params: Mapping[str, Any]) -> tuple[Statistic, ...]:
        """The statistics that these parameters make necessary."""
        return tuple(s for s in self.stats if s.needed(params))

    def __call__(self, models: Any, *, base: Any = None, seed: int = 0, **parameters: Any) -> Any:
        """Merge state dicts in memory. models: list of {name: tensor}; base: {name: tensor} or None.

        Per-model parameters take one value or a list of one value per model. Returns {name: tensor} of the type given.
        """
        from stockpot.engine.inmemory import merge_dicts

        return merge_dicts(self, models, base=base, seed=seed, parameters=parameters)


_REGISTRY: dict[str, Method] = {}


def method(
    *,
    scope: Scope = Scope.ELEMENT,
    space: Space,
    models: tuple[int, int | None] = (1, None),
    stats: tuple[Statistic, ...] = (),
    random: Mask | None = None,
    companions: tuple[str, ...] = (),
    cite: str = "",
    check: Callable[[Mapping[str, Any]], str | None] | None = None,
    form: Callable[..., Form] | None = None,
) -> Callable[[Callable[..., Any]], Method]:
    """Declare and register a merge method; see the module's docstring and `docs/methods.md`.

    The function takes the block first (`[m, *block]`), then keyword-only arguments: parameters annotated
    `Annotated[..., Real(...)]`, and by name what it declares (each statistic, `mask`, companions).
    """

    def declare(function: Callable[..., Any]) -> Method:
        name = function.__name__
        parameters = _parameters(function)
        provided = {s.name for s in stats} | set(companions) | ({"mask"} if random else set())
        asked = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        unknown = asked - {p.keyword for p in parameters.values()} - provided
        if unknown or provided - asked:
            raise TypeError(f"method {name!r}: declared {sorted(provided - asked)}, undeclared {sorted(unknown)}")
        for s in stats:
            if isinstance(s, Cutoff) and s.param not in parameters:
                raise TypeError(f"method {name!r}: Cutoff refers to {s.param!r}, which is no parameter")
        if name in _REGISTRY:
            raise TypeError(f"a method named {name!r} exists already: {_REGISTRY[name].function.__module__}")
        made = Method(name, function, scope, space, models, stats, random, companions, cite, parameters, check, form)
        _REGISTRY[name] = made
        return made

    return declare


def _parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    out = {}
    for p in inspect.signature(function).parameters.values():
        annotation = p.annotation
        if p.kind is p.KEYWORD_ONLY and isinstance(annotation, str) and "Annotated" in annotation:
            try:
                annotation = eval(annotation, function.__globals__)
            except NameError as e:
                raise TypeError(f"method {function.__name__!r}: annotation of {p.name!r}: {e} at module level") from e
        if p.kind is not p.KEYWORD_ONLY or typing.get_origin(annotation) is not typing.Annotated:
            continue
        first, *notes = typing.get_args(annotation)
        name = next((n.name for n in notes if isinstance(n, Named)), p.name)
        kind = next(n for n in notes if isinstance(n, (Real, Flag, Choice)))
        default = REQUIRED if p.default is p.empty else p.default
        out[name] = Parameter(name, p.name, kind, first is PerModel, default)
    return out


def methods() -> dict[str, Method]:
    """Every registered method by name."""
    return dict(sorted(_REGISTRY.items()))


def get_method(name: str) -> Method:
    """Look a method up. RecipeError with the nearest name when there is none."""
    found = _REGISTRY.get(name)
    if found is None:
        raise RecipeError(
            f"unknown merge method {name!r}: known are {', '.join(sorted(_REGISTRY))}{nearest(name, _REGISTRY)}"
        )
    return found
