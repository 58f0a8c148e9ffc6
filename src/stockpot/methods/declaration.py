"""`@method`: a pure function on blocks, declared once.

The signature is the only declaration. Recipe validation, `stockpot methods`, the docs, the plan and the engine all derive from
it, and nothing outside asks for a method by name. A declaration that can't be kept is refused when it is made. A method says,
beside its parameters,

- `space`: whether it sees weights, deltas, or the factors of adapters; `scope`: single elements, rows, or whole tensors at once;
- `stats`: what it must know of more than the block in hand (see stockpot.statistics), and `draws`: its random numbers;
- `companions`: checkpoints of the same names beside each model (a Fisher diagonal);
- `applies` and `otherwise`: the kinds of tensors it is for, and what happens to the rest; `cost`: the memory of a whole-tensor
  method, which the plan keeps within its limit;
- `sees`: the scope where it depends on the parameters (rows for one dialect, elements for another);
- `base_role`, `base_optional`, `average`, `copies`, `ordered`, `reproducible`, `experimental`: see Method.
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stockpot.errors import MethodError, RecipeError, StockpotError, nearest
from stockpot.installed import load_installed
from stockpot.methods.checking import check_declaration, declared_parameters
from stockpot.methods.forms import Form
from stockpot.methods.parameters import Choice, Parameter
from stockpot.specs import Shape
from stockpot.statistics import Draw, Statistic

__all__ = [
    "ROLES", "BaseRole", "Companion", "Cost", "Example", "Method", "Scope", "Space", "get_method", "method", "methods",
]  # fmt: skip


class Scope(enum.Enum):
    """How much of a tensor the function must see at once: `[m, n]` elements, `[m, rows, n]` rows, `[m, *shape]`."""

    ELEMENT = "element"
    ROW = "row"
    TENSOR = "tensor"


class Space(enum.Enum):
    """WEIGHT: the function gets the models' weights. DELTA: weights minus base, and the base is added after it. FACTORS: it gets
    a module's low-rank factors of every adapter, whatever their ranks, and returns factors (stockpot.methods.factors).
    """

    WEIGHT = "weight"
    DELTA = "delta"
    FACTORS = "factors"


#: kinds of tensors: two-dimensional ones, convolution kernels, tables with a row for each token (heads too), one-dimensional
#: ones and scalars (norms, biases), and matrices stacked along a first axis (packed experts)
ROLES = ("matrix", "convolution", "embedding", "vector", "stack")

#: what becomes of the base model: it is subtracted (DELTA); one of the models where the recipe lists it ("listed"); the first
#: of the models, listed or not ("first"); what a rule with this method copies ("copied")
BaseRole = Literal["subtracted", "listed", "first", "copied"]


@dataclass(frozen=True)
class Companion:
    """A checkpoint of the same names and shapes beside each model.

    name       in recipes and of the keyword, `[m, *block]`
    optimizer  what it is called in the state of a torch optimizer, whose file may then be given instead; None: in none
    """

    name: str
    about: str
    optimizer: str | None = None


@dataclass(frozen=True)
class Cost:
    """What a whole-tensor method takes beside the inputs it is given and the result.

    scratch  (models, shape, bytes of a number) -> bytes
    work     (models, shape) -> floating point operations, for the plan to show; None: not worth showing
    """

    scratch: Callable[[int, Shape, int], int]
    work: Callable[[int, Shape], float] | None = None


@dataclass(frozen=True)
class Example:
    """A merge with a known result, by hand or from a paper: in the docs, and checked by `stockpot.testing`.

    models, base, companions, expected are nested lists of numbers, of one shape; in FACTORS space models are (scale, A, B), and
    what is expected is the product B A of the result
    within  largest difference from what is expected
    """

    models: Any
    expected: Any
    base: Any = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    companions: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    within: float = 1e-6


@dataclass(frozen=True)
class Method:
    """A declared merge method. Calling it merges plain dicts of tensors; `function` is the mathematics on blocks.

    models        fewest and most models (None: any number); the base does not count in DELTA space
    check         what is wrong with a combination of parameters, or None
    form          the function's keywords -> the Form that does the same, for compiled kernels; or None
    applies       the roles of tensors that it is for; None: all
    otherwise     what the other tensors get: "mean" of the models, "base", or another method's name
    reproducible  "anywhere": the same bytes on every machine; "machine": on machines with the same linear algebra library
    base_optional in DELTA space: whether it works on the weights themselves where there is no base; see without_base
    average       whether it is the sum of weight_i model_i: what a run's weights are for
    copies        whether with these parameters it copies its one model
    ordered       whether the order of the models matters beyond rounding
    experimental  rebuilt from a description, or not settled: the plan says so
    dialects_say  for each dialect what it does differently
    ranks         in FACTORS space the rank of a result: (ranks of the models, (out, in), parameters) -> int
    sees          (parameters) -> the scope with these parameters, where they decide it; `scope` is then that of the defaults
    differentiable  whether the function takes tensors of torch too, for its block and its parameters, and keeps their graph
    family        what it is listed under: "averages", "trimmed", ...
    neutral       the parameters, beside the defaults, with which one model merges to itself; None: there are none
    """

    name: str
    function: Callable[..., Any]
    scope: Scope
    space: Space
    models: tuple[int, int | None]
    stats: tuple[Statistic, ...]
    draws: tuple[Draw, ...]
    companions: tuple[Companion, ...]
    cite: str
    parameters: dict[str, Parameter]
    check: Callable[[Mapping[str, Any]], str | None] | None = None
    form: Callable[..., Form] | None = None
    applies: tuple[str, ...] | None = None
    otherwise: str | None = None
    cost: Cost | None = None
    reproducible: Literal["anywhere", "machine"] = "anywhere"
    base_role: BaseRole = "listed"
    base_optional: bool = False
    average: bool = False
    copies: Callable[[Mapping[str, Any]], bool] | None = None
    ordered: bool = False
    experimental: bool = False
    dialects_say: Mapping[str, str] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    neutral: Mapping[str, Any] | None = None
    ranks: Callable[[Sequence[int], tuple[int, int], Mapping[str, Any]], int] | None = None
    sees: Callable[[Mapping[str, Any]], Scope] | None = None
    differentiable: bool = False
    family: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.function.__module__, self.name, self.space.value, self.scope.value)

    def without_base(self) -> Method:
        """The same method where a recipe names no base: one whose base is optional works on weights then, not on deltas."""
        if not self.base_optional:
            return self
        examples = tuple(e for e in self.examples if e.base is None)
        return _variant(self, space=Space.WEIGHT, base_role="listed", base_optional=False, examples=examples)

    def seen_with(self, params: Mapping[str, Any]) -> Method:
        """The same method with the scope that these parameters (by keyword) make necessary."""
        scope = self.sees(params) if self.sees else self.scope
        if scope is self.scope:
            return self
        declared = _REGISTRY[self.name]
        return _variant(self, scope=scope, form=declared.form if scope is Scope.ELEMENT else None)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def builtin(self) -> bool:
        """Whether it comes with stockpot."""
        return self.function.__module__.startswith("stockpot.")

    @property
    def code(self) -> str:
        """SHA-256 of the file that declares it, hexadecimal; "" where there is none, as in a notebook."""
        try:
            file = inspect.getsourcefile(self.function)
            with open(file or "", "rb") as f:
                return hashlib.sha256(f.read()).hexdigest()
        except (OSError, TypeError):
            return ""

    @property
    def dialects(self) -> tuple[str, ...]:
        """The named readings of the formula, the default first."""
        dialect = self.parameters.get("dialect")
        if dialect is None or not isinstance(dialect.kind, Choice):
            return ()
        rest = tuple(d for d in dialect.kind.options if d != dialect.default)
        return (dialect.default, *rest)

    @property
    def streams(self) -> bool:
        """Whether, without statistics, any run of elements can be merged by itself."""
        return self.scope is Scope.ELEMENT

    def run(self, what: str, block: Any, **keywords: Any) -> Any:
        """The function. what: a tensor or a module, for the error. Raises MethodError for what a function of somebody's own
        raises; of those that come with stockpot it is a bug, and stays what it is.
        """
        if self.builtin:
            return self.function(block, **keywords)
        try:
            return self.function(block, **keywords)
        except StockpotError:
            raise
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            why = f"{type(e).__name__}: {e} ({last.filename}:{last.lineno})"
            raise MethodError(f"{what}: method {self.name!r} failed: {why}") from e

    def active_stats(self, params: Mapping[str, Any]) -> tuple[Statistic, ...]:
        """The statistics that these parameters make necessary."""
        return tuple(s for s in self.stats if s.needed(params))

    def __call__(self, models: Any, *, base: Any = None, seed: int = 0, **parameters: Any) -> Any:
        """Merge state dicts in memory. models: list of {name: tensor}; base: {name: tensor} or None.

        Per-model parameters take one value or a list of one value per model; companions a list of one state dict per model.
        Returns {name: tensor} of the type given.
        """
        from stockpot.engine.inmemory import merge_dicts

        return merge_dicts(self, models, base=base, seed=seed, parameters=parameters)


def cannot_replace(method: Method, other: Method) -> str | None:
    """Why `other` can't merge the tensors that `method` is not for, or None."""
    given = f"{method.name}: otherwise={method.otherwise!r}"
    if other is method:
        return f"{given} is the method itself"
    if other.space is Space.FACTORS:
        return f"{given} works on modules of adapters, not on tensors"
    if other.companions:
        return f"{given} needs {other.companions[0].name}, which {method.name} has not"
    if other.applies is not None:
        return f"{given} is itself for {', '.join(other.applies)} tensors only"
    return None


def wrong_count(method: Method, models: int) -> str | None:
    """Why a method can't take this many models, or None."""
    low, high = method.models
    if models >= low and (high is None or models <= high):
        return None
    return f"{method.name} takes {low if low == high else f'at least {low}'} models, got {models}"


_REGISTRY: dict[str, Method] = {}
#: what methods are without their base, or with another scope: by name, space and scope
_VARIANTS: dict[tuple[str, Space, Scope], Method] = {}
#: modules of other packages that declare methods
_GROUP = "stockpot.methods"


def _variant(method: Method, **changes: Any) -> Method:
    """The one method that differs in this; the declared one where nothing does."""
    key = (method.name, changes.get("space", method.space), changes.get("scope", method.scope))
    declared = _REGISTRY.get(method.name)
    if declared is not None and (declared.space, declared.scope) == key[1:]:
        return declared
    if key not in _VARIANTS:
        _VARIANTS[key] = replace(method, **changes)
    return _VARIANTS[key]


def method(
    *,
    scope: Scope = Scope.ELEMENT,
    space: Space,
    models: tuple[int, int | None] = (1, None),
    stats: tuple[Statistic, ...] = (),
    draws: tuple[Draw, ...] = (),
    companions: tuple[Companion, ...] = (),
    cite: str = "",
    check: Callable[[Mapping[str, Any]], str | None] | None = None,
    form: Callable[..., Form] | None = None,
    applies: tuple[str, ...] | None = None,
    otherwise: str | None = None,
    cost: Cost | None = None,
    reproducible: Literal["anywhere", "machine"] = "anywhere",
    base_role: BaseRole | None = None,
    base_optional: bool = False,
    average: bool = False,
    copies: Callable[[Mapping[str, Any]], bool] | None = None,
    ordered: bool = False,
    experimental: bool = False,
    dialects: Mapping[str, str] | None = None,
    examples: tuple[Example, ...] = (),
    neutral: Mapping[str, Any] | None = None,
    ranks: Callable[[Sequence[int], tuple[int, int], Mapping[str, Any]], int] | None = None,
    sees: Callable[[Mapping[str, Any]], Scope] | None = None,
    differentiable: bool = False,
    family: str = "",
) -> Callable[[Callable[..., Any]], Method]:
    """Declare and register a merge method; see the module's docstring and `docs/extending.md`.

    The function takes the block first (`[m, *block]`; in FACTORS space a list of Factors), then keyword-only arguments:
    parameters annotated `Annotated[..., Real(...)]`, and by name what it declares (each statistic, draw and companion). Raises
    TypeError for what it could not do.
    """

    def declare(function: Callable[..., Any]) -> Method:
        made = Method(
            name=function.__name__,
            function=function,
            scope=scope,
            space=space,
            models=models,
            stats=stats,
            draws=draws,
            companions=companions,
            cite=cite,
            parameters=declared_parameters(function),
            check=check,
            form=form,
            applies=applies,
            otherwise=otherwise,
            cost=cost,
            reproducible=reproducible,
            base_role=base_role or ("subtracted" if space is Space.DELTA else "listed"),
            base_optional=base_optional,
            average=average,
            copies=copies,
            ordered=ordered or bool(draws),
            experimental=experimental,
            dialects_say=dict(dialects or {}),
            examples=examples,
            neutral=neutral,
            ranks=ranks,
            sees=sees,
            differentiable=differentiable,
            family=family,
        )
        check_declaration(made, ROLES)
        if made.name in _REGISTRY:
            raise TypeError(f"a method named {made.name!r} exists already: {_REGISTRY[made.name].function.__module__}")
        _REGISTRY[made.name] = made
        return made

    return declare


def _restored(module: str, name: str, space: str, scope: str) -> Method:
    """A pickled method: its module declares it where it is read."""
    if name not in _REGISTRY:
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise MethodError(f"the code of method {name!r} is not here ({e}): plan the recipe on this machine") from e
    found = _REGISTRY[name]
    if found.space.value != space:
        found = found.without_base()
    if found.scope.value == scope:
        return found
    return _variant(found, scope=Scope(scope), form=_REGISTRY[name].form if scope == Scope.ELEMENT.value else None)


def methods() -> dict[str, Method]:
    """Every registered method by name."""
    load_installed(_GROUP)
    return dict(sorted(_REGISTRY.items()))


def get_method(name: str) -> Method:
    """Look a method up. RecipeError with the nearest name when there is none."""
    if name not in _REGISTRY:
        load_installed(_GROUP)
    found = _REGISTRY.get(name)
    if found is None:
        raise RecipeError(
            f"unknown merge method {name!r}: known are {', '.join(sorted(_REGISTRY))}{nearest(name, _REGISTRY)}"
        )
    return found
