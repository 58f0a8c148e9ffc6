"""What can be said of a method from its declaration, in the words users search by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stockpot.errors import ArgumentError, nearest
from stockpot.methods.declaration import Method, Scope, Space, methods
from stockpot.methods.parameters import REQUIRED
from stockpot.statistics import Statistic

__all__ = ["family_of", "find_methods", "models_text", "passes_of", "passes_text", "space_text", "traits"]

_SPACES = {
    Space.DELTA: "deltas, differences from a base (`base_model` is needed)",
    Space.WEIGHT: "weights",
    Space.FACTORS: "the factors of LoRA adapters, module by module",
}


def passes_of(method: Method) -> tuple[int, int]:
    """How many times its inputs are read, at least and at most: to combine, and for each statistic that parameters ask for."""
    dialect = method.dialects[0] if method.dialects else None
    given = {p.keyword: (p.default_for(dialect), p.per_model) for p in method.parameters.values()}
    defaults = {k: (v,) if per_model else v for k, (v, per_model) in given.items() if v is not REQUIRED}
    return 1 + sum(_is_needed(s, defaults) for s in method.stats), 1 + len(method.stats)


def passes_text(method: Method) -> str:
    """The same in words."""
    fewest, most = passes_of(method)
    if fewest == most:
        return "once" if most == 1 else f"{most} times"
    return f"{fewest} to {most} times, by its parameters"


def models_text(method: Method) -> str:
    """How many models it takes: "2", "1 or more", "1 to 2"."""
    low, high = method.models
    return f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"


def space_text(method: Method) -> str:
    """What it works on."""
    if method.base_optional:
        return "deltas, or weights where there is no base"
    return _SPACES[method.space]


def family_of(method: Method) -> str:
    """What it is listed under."""
    return method.family or "of your own"


def _is_needed(statistic: Statistic, defaults: Mapping[str, object]) -> bool:
    try:
        return statistic.needed(defaults)
    except KeyError:  # it hangs on a parameter that has no default
        return True


def traits(method: Method) -> tuple[str, ...]:
    """Its family, what it needs and what it is like: "spherical", "two models", "needs a base", "random", ..."""
    low, high = method.models
    numbers = {1: "one model", 2: "two models", 3: "three models"}
    many = (
        numbers.get(low, f"{low} models") if low == high else f"up to {high} models" if high else "any number of models"
    )
    if high is None and low > 1:
        many = f"{numbers.get(low, f'{low} models')} or more"
    said = [family_of(method), many]
    if method.space is Space.FACTORS:
        said.append("LoRA factors")
    elif method.base_optional:
        said.append("with or without a base")
    else:
        said.append("needs a base" if method.space is Space.DELTA else "without a base")
    if method.draws:
        said.append("random")
    said += [f"needs a companion: {c.name}" for c in method.companions]
    if method.applies is not None:
        said.append("only for " + ", ".join(method.applies))
    if method.scope is Scope.TENSOR:
        said.append("whole tensors")
    elif method.scope is Scope.ROW or method.sees is not None:
        said.append("rows" if method.scope is Scope.ROW else "by rows on request")
    if method.ordered and not method.draws:
        said.append("order matters")
    if method.differentiable:
        said.append("keeps autograd")
    if method.dialects:
        said.append(f"dialects {', '.join(method.dialects)}")
    if method.experimental:
        said.append("experimental")
    return tuple(said)


def find_methods(words: Sequence[str]) -> list[Method]:
    """The methods of which all this is said; where the words as they stand are a trait or a name of some, those.

    Raises ArgumentError with the traits there are where nothing fits.
    """
    found = list(methods().values())
    phrase = " ".join(words).lower()
    said = {m.name: [m.name, *traits(m)] for m in found}
    exact = [m for m in found if any(phrase in s.lower() for s in said[m.name] if not s.startswith("dialects"))]
    if exact:
        return exact
    texts = {m.name: " ".join((*said[m.name], m.summary, m.cite)).lower() for m in found}
    loose = [m for m in found if all(w in texts[m.name] for w in phrase.split())]
    if not loose:
        known = sorted(
            {t for m in found for t in traits(m) if not t.startswith(("needs a companion", "dialects", "only"))}
        )
        close = nearest(phrase, [*said, *known])
        raise ArgumentError(f"unknown merge method {phrase!r}{close}; nor is it said of any: {', '.join(known)}")
    return loose
