"""Which value of each parameter holds for a tensor: precedence, gradients, filters, defaults, and all the checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.errors import RecipeError, StockpotError, nearest
from stockpot.methods.declaration import Method
from stockpot.methods.parameters import REQUIRED, Flag, Parameter
from stockpot.planning.plan import MergeGroup
from stockpot.recipes.schema import Recipe, Settings
from stockpot.recipes.values import ABSENT, Setting, chosen, evaluate, filters, is_dynamic, reaches_gradient

__all__ = ["Levels", "ParameterResolver", "Place"]

#: accepted for mergekit's sake, without effect here
NO_EFFECT = {"int8_mask": "masks take no memory here"}
#: what mergekit's methods declare: under `compat: mergekit` those that a method does not use are noted, as there
MERGEKIT_KNOWS = frozenset(
    "weight density lambda normalize rescale epsilon gamma t scale select_topk filter_wise max_iter tol eps r alpha "
    "nuslerp_flatten nuslerp_row_wise normalize_weights".split()
)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its depth, 0 to 1, and in numbered layers the number of its layer and how many there are."""

    depth: float = 0.0
    layer: int | None = None
    layers: int | None = None


@dataclass(frozen=True)
class Levels:
    """The settings that can decide a tensor's parameters. `shared`: most specific first; `own`: one for each model."""

    shared: tuple[Settings, ...]
    own: tuple[Settings, ...]
    rule: Settings = field(default_factory=dict)

    def without(self, name: str) -> Levels:
        """The same without one parameter."""

        def rest(settings: Settings) -> Settings:
            return {key: value for key, value in settings.items() if key != name}

        return Levels(tuple(map(rest, self.shared)), tuple(map(rest, self.own)), rest(self.rule))

    @property
    def dynamic(self) -> bool:
        """Whether any setting may differ from tensor to tensor."""
        chain = (self.rule, *self.own, *self.shared)
        return any(is_dynamic(s.value) for settings in chain for s in settings.values())


@dataclass
class ParameterResolver:
    """Resolves parameters and gathers problems and notes, each once."""

    recipe: Recipe
    problems: list[StockpotError]
    notes: list[str]
    groups: list[MergeGroup] = field(default_factory=list)
    _keys: dict[Any, MergeGroup] = field(default_factory=dict)
    unmatched: dict[str, list[str]] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    def report(self, line: int, why: str) -> None:
        """Record a problem of the recipe once."""
        error = RecipeError(why).within(self.recipe.at(line))
        if str(error) not in self._said:
            self._said.add(str(error))
            self.problems.append(error)

    def note(self, text: str) -> None:
        """Record a note once."""
        if text not in self.notes:
            self.notes.append(text)

    # what is set but never used

    def check_names(self, settings: Settings, used: Iterable[Method], where: str, *, own: bool) -> None:
        """Every key must be a parameter of a method in use, and per-model where it stands on a model."""
        used = list(used)
        known: dict[str, Parameter] = {}
        for method in used:
            for name, parameter in method.parameters.items():
                if parameter.per_model or not own:
                    known[name] = parameter
        label = " and ".join(sorted({m.name for m in used})) or "this recipe"
        for name, setting in settings.items():
            if name in NO_EFFECT:
                self.note(self.recipe.told(setting.line, f"{name} is accepted but has no effect: {NO_EFFECT[name]}"))
            elif name not in known and self._passed_over(name, known):
                self.note(self.recipe.told(setting.line, f"{name} has no effect in {label} {where}"))
            elif name not in known:
                shared = own and any(name in m.parameters for m in used)
                why = (
                    f"parameter {name!r} of {label} belongs to the whole merge, not to one model"
                    if shared
                    else f"{label} has no parameter {name!r}; it has {', '.join(known) or 'none'} {where}".rstrip()
                    + nearest(name, known)
                )
                self.report(setting.line, f"{where}: {why}")

    def _passed_over(self, name: str, known: Iterable[str]) -> bool:
        """Whether a name that no method in use has goes with a note, as in mergekit, which reads past all of them.

        A name that looks like a misspelt one is an error all the same.
        """
        return self.recipe.mergekit_compat and (name in MERGEKIT_KNOWS or not nearest(name, known))

    def check_filters(self, all_settings: Iterable[Settings], names: Sequence[str]) -> None:
        """Note filters that match no tensor: usually a misspelt part of a name."""
        for settings in all_settings:
            for key, setting in settings.items():
                for pattern in filters(setting.value):
                    if not any(pattern in name for name in names):
                        self.note(
                            self.recipe.told(setting.line, f"{key}: the filter {pattern!r} matches no tensor name")
                        )

    # the value for one tensor

    def group(self, method: Method, levels: Levels, sources: Sequence[str], name: str, at: Place) -> MergeGroup | None:
        """The group of a tensor: its method with every parameter resolved. None after a problem.

        Filters see the output's `name`; those of per-model parameters see the tensor's name in that model (`sources`),
        which differs where slices renumber layers.
        """
        params: dict[str, Any] = {}
        dialect: str | None = None
        ordered = sorted(method.parameters.values(), key=lambda p: p.name != "dialect")
        for parameter in ordered:
            if parameter.per_model:
                value: Any = tuple(
                    self.value(method, parameter, levels, i, source, at, dialect) for i, source in enumerate(sources)
                )
                if any(v is None for v in value):
                    return None
            else:
                value = self.value(method, parameter, levels, None, name, at, dialect)
                if value is None:
                    return None
            params[parameter.keyword] = value
            if parameter.name == "dialect":
                dialect = value
        return self.fixed(method, params, len(sources))

    def fixed(self, method: Method, params: Mapping[str, Any], models: int = 1) -> MergeGroup:
        """The group of a method with these parameters, made once."""
        key = (method.name, models, tuple(sorted(params.items())))
        group = self._keys.get(key)
        if group is None:
            group = self._keys[key] = MergeGroup(len(self.groups), method.seen_with(params), params)
            self.groups.append(group)
            self.check_group(group)
        return group

    def value(
        self,
        method: Method,
        parameter: Parameter,
        levels: Levels,
        model: int | None,
        name: str,
        at: Place,
        dialect: str | None,
    ) -> Any:
        chain = [levels.rule, *([levels.own[model]] if model is not None else []), *levels.shared]
        setting, found = self.lookup(chain, parameter, name, at)
        if setting is None:
            default = parameter.default_for(dialect)
            if parameter.name == "dialect" and self.recipe.mergekit_compat and "mergekit" in method.dialects:
                default = "mergekit"
            if default is REQUIRED:
                self.report(
                    self.recipe.lines.get("merge_method", 1),
                    f"{method.name} needs the parameter {parameter.name!r} ({parameter.kind.describe()})"
                    + (f" for every model; none is set for model {model + 1}" if model is not None else "")
                    + (f" (tensor {name!r})" if any(parameter.name in s for s in chain) else ""),
                )
                return None
            if any(parameter.name in s for s in chain):
                self.unmatched.setdefault(parameter.name, []).append(name)
            return default
        if self.recipe.mergekit_compat and isinstance(parameter.kind, Flag) and found in (0, 1):
            found = bool(found)  # mergekit takes numbers for flags
        expected = parameter.kind.check(found)
        if expected:
            self.report(setting.line, f"{parameter.name}: expected {expected}, got {_shown(found)}")
            return None
        return parameter.kind.convert(found)

    def lookup(
        self, chain: Sequence[Settings], parameter: Parameter, name: str, at: Place
    ) -> tuple[Setting | None, Any]:
        for settings in chain:
            setting = settings.get(parameter.name)
            if setting is not None:
                if parameter.per_layer:
                    found = self.entry(parameter.name, setting, name, at)
                else:
                    found = evaluate(setting.value, name, at.depth)
                if found is not ABSENT:
                    return setting, found
        return None, ABSENT

    def entry(self, key: str, setting: Setting, name: str, at: Place) -> Any:
        """Of a vector with an entry for each layer: that of the tensor's layer, ABSENT outside the layers."""
        found = chosen(setting.value, name)
        if not isinstance(found, tuple):
            return found
        if at.layers is not None and len(found) != at.layers:
            self.report(setting.line, f"{key}: expected one entry for each of the {at.layers} layers, got {len(found)}")
            return found[0]
        return ABSENT if at.layer is None else found[at.layer]

    def note_unmatched(self) -> None:
        """Say where a parameter is set by filters only, none of which matched."""
        for key, names in self.unmatched.items():
            unique = list(dict.fromkeys(names))
            more = f" and {len(unique) - 1} more" if len(unique) > 1 else ""
            self.note(
                f"{key}: no filter matches {unique[0]!r}{more}, so the default is used; add '- value: ...' to set it"
            )

    # combinations that make no sense

    def check_group(self, group: MergeGroup) -> None:
        why = group.method.check(group.params) if group.method.check else None
        if why:
            self.report(self.recipe.lines.get("merge_method", 1), f"{group.method.name}: {why}")

    # gradients outside the layers

    def gradient_note(self, method: Method, levels: Levels, name: str) -> bool:
        """Whether a gradient decides a parameter of this tensor."""
        vectors = {p.name for p in method.parameters.values() if p.per_layer}
        return any(
            reaches_gradient(setting.value, name)
            for settings in (levels.rule, *levels.own, *levels.shared)
            for key, setting in settings.items()
            if key not in vectors
        )


def _shown(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)


def all_settings(recipe: Recipe) -> list[Mapping[str, Setting]]:
    """Every mapping of parameters in a recipe."""
    return [
        recipe.parameters,
        *(m.parameters for m in recipe.models),
        *(s.parameters for s in recipe.slices),
        *(source.parameters for s in recipe.slices for source in s.sources),
        *(r.parameters for r in recipe.rules),
    ]
