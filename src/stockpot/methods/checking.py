"""What `@method` refuses: a declaration that the engine could not keep, found when it is made, not in the middle of a merge."""

from __future__ import annotations

import inspect
import itertools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stockpot.errors import nearest
from stockpot.methods.parameters import KINDS, REQUIRED, ByDialect, Named, Parameter, PerLayer, PerModel, Real
from stockpot.statistics import EXTENTS, Extent, Mask, Rank, Statistic

if TYPE_CHECKING:
    from stockpot.methods.declaration import Method

__all__ = ["check_declaration", "check_extents", "declared_parameters"]

_BASE_ROLES = ("subtracted", "listed", "first", "copied")


def declared_parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters that a function's keyword-only arguments declare, by their names in recipes. Raises TypeError."""
    out: dict[str, Parameter] = {}
    for p in inspect.signature(function).parameters.values():
        annotation = p.annotation
        if p.kind is p.KEYWORD_ONLY and isinstance(annotation, str):
            try:
                annotation = eval(annotation, function.__globals__)
            except NameError as e:
                if "Annotated" in annotation:
                    raise TypeError(
                        f"method {function.__name__!r}: annotation of {p.name!r}: {e} at module level"
                    ) from e
        if p.kind is not p.KEYWORD_ONLY or typing.get_origin(annotation) is not typing.Annotated:
            continue
        first, *notes = typing.get_args(annotation)
        name = next((n.name for n in notes if isinstance(n, Named)), p.name)
        kinds = [n for n in notes if isinstance(n, KINDS)]
        if len(kinds) != 1:
            expected = ", ".join(k.__name__ for k in KINDS)
            raise TypeError(f"method {function.__name__!r}: {p.name!r} needs exactly one kind of value: {expected}")
        if name in out:
            raise TypeError(f"method {function.__name__!r}: two parameters are called {name!r}")
        default = REQUIRED if p.default is p.empty else p.default
        out[name] = Parameter(name, p.name, kinds[0], first is PerModel, default, first is PerLayer)
    return out


def check_declaration(method: Method, roles: tuple[str, ...]) -> None:
    """Raise TypeError with the first thing that can't be kept."""
    for why in _problems(method, roles):
        raise TypeError(f"method {method.name!r}: {why}")


def _problems(method: Method, roles: tuple[str, ...]) -> Iterator[str]:
    yield from _signature(method)
    yield from _statistics(method)
    yield from _draws(method)
    low, high = method.models
    if low < 1 or (high is not None and high < low):
        yield f"models={method.models}: expected (fewest, most) with 1 <= fewest <= most"
    if method.base_role not in _BASE_ROLES:
        yield f"base_role={method.base_role!r}: expected one of {', '.join(_BASE_ROLES)}"
    if method.reproducible not in ("anywhere", "machine"):
        yield f"reproducible={method.reproducible!r}: expected 'anywhere' or 'machine'"
    if method.base_role == "first" and method.companions:
        yield "base_role='first' takes a base that has no companions: with companions the models are listed"
    for name in method.neutral or {}:
        if name not in method.parameters:
            yield f"neutral= sets {name!r}, which is no parameter{nearest(name, method.parameters)}"
    if method.base_role == "subtracted" and method.space.value != "delta":
        yield "base_role='subtracted' goes with Space.DELTA"
    if method.space.value == "delta" and method.base_role != "subtracted":
        yield f"base_role={method.base_role!r}: in Space.DELTA the base is subtracted"
    if method.base_optional and method.space.value != "delta":
        yield "base_optional= goes with Space.DELTA"
    for p in method.parameters.values():
        default = p.default
        values = default.values.values() if isinstance(default, ByDialect) else [] if default is REQUIRED else [default]
        for value in values:
            if p.kind.check(value):
                yield f"the default {value!r} of {p.name!r} is not {p.kind.check(value)}"
    yield from _extent_of_tensors(method, roles)
    yield from _factors(method)
    if method.dialects_say and set(method.dialects_say) != set(method.dialects):
        yield f"dialects= describes {sorted(method.dialects_say)}, the parameter 'dialect' knows {sorted(method.dialects)}"


def _signature(method: Method) -> Iterator[str]:
    """What is declared and what the function takes must be the same, and no name may mean two things."""
    parameters = inspect.signature(method.function).parameters.values()
    leading = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if len(leading) != 1:
        yield f"takes {len(leading)} arguments before the keywords; expected one, the block"
    keywords = [p.keyword for p in method.parameters.values()]
    provided = [x.name for x in (*method.stats, *method.draws, *method.companions)]
    every = [*keywords, *provided]
    twice = sorted({name for name in every if every.count(name) > 1})
    for name in ("models", "base", "seed"):
        if name in every or name in method.parameters:
            yield f"the name {name!r} is taken: a method is called with models, base= and seed="
    if twice:
        yield f"the name {twice[0]!r} is declared twice"
    asked = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    unknown, missing = asked - set(every), set(provided) - asked
    if unknown or missing:
        yield f"declared {sorted(missing)}, undeclared {sorted(unknown)}"
    if method.form is not None:
        taken = inspect.signature(method.form).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        lacking = sorted(set(every) - set(taken)) if not takes_all else []
        if lacking:
            yield f"form= takes no {lacking[0]!r}, which it would be given"
        if method.companions or (method.scope.value != "element" and method.sees is None):
            yield "form= is for elementwise methods without companions"
        if any(not isinstance(d, Mask) or callable(d.keep) for d in method.draws):
            yield "form= knows no draws but a Mask of one probability for each model"


def _statistics(method: Method) -> Iterator[str]:
    by_keyword = {p.keyword: p for p in method.parameters.values()}
    for s in method.stats:
        for name in s.refers_to():
            if name not in by_keyword:
                yield f"statistic {s.name!r} refers to {name!r}, which is no parameter{nearest(name, by_keyword)}"
            elif not isinstance(by_keyword[name].kind, Real):
                yield f"statistic {s.name!r} refers to {name!r}, which is not a number"
        if isinstance(s, Rank) and isinstance(s.kept, str) and s.kept in by_keyword:
            p = by_keyword[s.kept]
            if isinstance(p.kind, Real) and not (p.kind.low >= 0 and p.kind.high <= 1):
                yield f"statistic {s.name!r} refers to {s.kept!r}, which is not a number from 0 to 1"
            if s.of is None and not p.per_model:
                yield (
                    f"statistic {s.name!r} ranks every model, {s.kept!r} is one number: annotate it with PerModel, or say with "
                    "of= what one thing is ranked"
                )
    fixed: list[tuple[Statistic, Extent]] = [(s, s.over) for s in method.stats if not callable(s.over)]
    if len(fixed) == len(method.stats):
        yield from check_extents(method, fixed)
    else:
        for s, over in fixed:
            yield from _extent(method, s.name, over, s.extents)


def check_extents(method: Method, stats: Sequence[tuple[Statistic, Extent]]) -> Iterator[str]:
    """A statistic may use those before it, so what is before it must not be narrower; rows are known wherever they are seen.

    stats: with their extents, in order: all of the method's, or all that are needed.
    """
    for s, over in stats:
        yield from _extent(method, s.name, over, s.extents)
    extents = [over for _, over in stats]
    after_rows = extents[extents.index("row") :] if "row" in extents else []
    if method.scope.value == "tensor" and any(e != "row" for e in after_rows):
        yield "with Scope.TENSOR a statistic over rows must come after those over more: it is only known when all is in hand"
    places = [EXTENTS.index(e) for e in extents if e != "row"]
    for before, after in itertools.pairwise(places):
        if after > before:
            yield f"a statistic over a {EXTENTS[after]} can't follow one over a {EXTENTS[before]}: declare the wider ones first"


def _extent(method: Method, name: str, over: str, known: tuple[str, ...]) -> Iterator[str]:
    if over not in EXTENTS:
        yield f"statistic {name!r}: over={over!r}; expected one of {', '.join(EXTENTS)}"
    elif over not in known:
        yield f"statistic {name!r} can't be gathered over a {over}; expected one of {', '.join(known)}"
    elif over == "row" and method.scope.value == "element":
        yield f"statistic {name!r} is over rows, which scope=Scope.ELEMENT does not see: declare Scope.ROW or Scope.TENSOR"


def _draws(method: Method) -> Iterator[str]:
    by_keyword = {p.keyword: p for p in method.parameters.values()}
    kinds = [type(draw) for draw in method.draws]
    if len(set(kinds)) < len(kinds):
        yield "two draws of one kind would be the same numbers"
    for draw in method.draws:
        if isinstance(draw, Mask) and isinstance(draw.keep, str):
            p = by_keyword.get(draw.keep)
            if p is None:
                yield f"Mask refers to {draw.keep!r}, which is no parameter{nearest(draw.keep, by_keyword)}"
            elif not p.per_model or not isinstance(p.kind, Real) or p.kind.low < 0 or p.kind.high > 1:
                yield f"Mask refers to {draw.keep!r}, which is not a number from 0 to 1 for each model"


def _factors(method: Method) -> Iterator[str]:
    """A method on factors gets whole modules, and nothing that is declared of blocks."""
    if method.space.value != "factors":
        if method.ranks is not None:
            yield "ranks= goes with Space.FACTORS"
        return
    if method.ranks is None:
        yield "space=Space.FACTORS needs ranks=: the plan must know the shapes of the result"
    given: dict[str, Any] = {
        "stats": method.stats, "draws": method.draws, "companions": method.companions, "form": method.form,
        "applies": method.applies, "cost": method.cost, "copies": method.copies,
    }  # fmt: skip
    for name, value in given.items():
        if value:
            yield f"{name}= is of blocks of tensors; in Space.FACTORS the function gets the factors of a module"
    if method.scope.value != "element":
        yield "scope= is of blocks of tensors; in Space.FACTORS the function gets the factors of a module"
    if method.base_role != "listed":
        yield f"base_role={method.base_role!r}: in Space.FACTORS there is no base"


def _extent_of_tensors(method: Method, roles: tuple[str, ...]) -> Iterator[str]:
    if method.applies is not None:
        for role in method.applies:
            if role not in roles:
                yield f"applies={role!r}: expected some of {', '.join(roles)}"
        if method.otherwise is None:
            yield "applies= leaves tensors over: say with otherwise= what they get ('mean', 'base' or a method)"
    elif method.otherwise is not None:
        yield "otherwise= goes with applies="
    if method.scope.value == "tensor" and method.cost is None:
        yield "scope=Scope.TENSOR needs cost=Cost(...): without it the memory of a merge can't be kept within its limit"
    if method.cost is not None and method.scope.value != "tensor" and method.sees is None:
        yield "cost= goes with scope=Scope.TENSOR; what elementwise methods take is known"
