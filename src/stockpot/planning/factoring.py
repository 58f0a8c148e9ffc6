"""Adapters combined module by module: the plan of methods on factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from stockpot.adapters import Adapter, Combination, FactoredAdapter, check_products, factored_adapter, read_adapter
from stockpot.checkpoints.meaning.layers import LayerMap
from stockpot.errors import RecipeError, StockpotError
from stockpot.methods.declaration import Method, Space, get_method, wrong_count
from stockpot.planning.filling import Filler
from stockpot.planning.matching import Match, Matcher, Section
from stockpot.planning.plan import Action, MergeGroup, ModelInput, Operand, TensorPlan
from stockpot.planning.template import Slot
from stockpot.recipes.schema import Recipe
from stockpot.specs import BY_LABEL

__all__ = ["Factoring", "check_space", "open_adapters"]


def check_space(
    main: Method, rules: Sequence[tuple[int, Method]], recipe: Recipe, problems: list[StockpotError]
) -> None:
    """What does not go with methods on factors, or with rules that name one under a method on tensors."""
    factors = main.space is Space.FACTORS
    if factors and recipe.slices:
        why = f"{main.name} combines adapters module by module: it goes with models or run, not with slices"
        problems.append(RecipeError(why).within(recipe.at(recipe.lines.get("slices", 1))))
    if factors and recipe.base_model is not None:
        why = f"{main.name} over adapters takes no base_model (fused: adapter.base)"
        problems.append(RecipeError(why).within(recipe.at(recipe.lines.get("base_model", 1))))
    for line, method in rules:
        if method.space is Space.FACTORS and not factors:
            why = f"rules: {method.name} combines modules of adapters: it goes with a merge_method that does too"
            problems.append(RecipeError(why).within(recipe.at(line)))


def open_adapters(
    part: Section, inputs: Sequence[ModelInput], recipe: Recipe, problems: list[StockpotError]
) -> list[Adapter]:
    """The adapters of a recipe's entries, checked for fitting each other. Problems are added."""
    adapters = []
    for entry in part.entries:
        model = inputs[entry.model]
        try:
            adapters.append(read_adapter(model.checkpoint))
        except StockpotError as e:
            problems.append(e.within(*model.places))
    if len(adapters) == len(part.entries):
        try:
            check_products(adapters, absent=recipe.absent)
        except StockpotError as e:
            where = recipe.lines.get("adapter", recipe.lines.get("merge_method", 1))
            problems.append(e.within(recipe.at(where)))
    return adapters


@dataclass
class Factoring:
    """Plans the factors of every module that any adapter adapts. adapters: of the part's entries, in order."""

    recipe: Recipe
    part: Section
    adapters: Sequence[Adapter]
    filler: Filler
    matcher: Matcher
    problems: list[StockpotError]
    absent: dict[int, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor that is a factor, or the bias of one."""
        every = (m for a in self.adapters for m in a.modules.values())
        return frozenset(n for m in every for n in (m.a, m.b, m.bias) if n is not None)

    @cached_property
    def layers(self) -> list[LayerMap]:
        """Of each adapter."""
        return [a.checkpoint.layers() for a in self.adapters]

    def plan(self, index: int) -> tuple[FactoredAdapter, list[TensorPlan]] | None:
        """(the adapter that is computed, its tensors as copied from it: the input `index`). None after a problem."""
        modules = list(dict.fromkeys(name for a in self.adapters for name in a.modules))
        slots = {module: self.slot(module) for module in modules}
        self.filler.know_layers(slots.values())
        chosen = {module: self.combination(module, slots[module]) for module in modules}
        found = {module: made for module, made in chosen.items() if made is not None}
        if len(found) < len(modules):
            return None
        self.note_absent()
        wanted = self.recipe.out_dtype or self.recipe.dtype
        adapter = factored_adapter(
            self.adapters,
            {m: c for m, (c, _) in found.items()},
            self.adapters[-1],
            dtype=BY_LABEL[wanted] if wanted else None,
        )
        tensors = []
        for name in adapter.names():
            module, _ = adapter.owners[name]
            operand = Operand(index, name)
            tensors.append(
                TensorPlan(
                    0,
                    name,
                    adapter.spec(name),
                    Action.COPY,
                    found[module][1].index,
                    (operand,),
                    None,
                    layer=slots[module].layer,
                )
            )
        return adapter, tensors

    def slot(self, module: str) -> Slot:
        """Of a module, for its parameters: under the name of its first factor, at its place among the layers."""
        number, adapter = next((i, a) for i, a in enumerate(self.adapters) if module in a.modules)
        name = adapter.modules[module].a
        layers = self.layers[number]
        place = layers.places.get(name)
        layer = None if place is None else (place.stack, place.layer)
        origin = Operand(self.part.entries[number].model, name)
        return Slot(name, adapter.checkpoint.spec(name), origin, layers.depth(name), layer)

    def combination(self, module: str, slot: Slot) -> tuple[Combination, MergeGroup] | None:
        """How a module is made. None after a problem."""
        lows = [a.modules.get(module) for a in self.adapters]
        lead = next(m for m in lows if m is not None)
        rule = self.filler.rule_for(lead.a)
        line = self.recipe.rules[rule].line if rule >= 0 else self.part.line
        if any(self.filler.rule_for(n) != rule for n in (lead.b, lead.bias) if n is not None):
            self.filler.resolver.report(
                line,
                f"rules: {lead.a!r} and {lead.b!r} are one module's: a pattern must match both or neither (*{module}*)",
            )
            return None
        method = self.filler.main if rule < 0 else self.filler.rules[rule]
        if method.space is not Space.FACTORS:
            self.filler.resolver.report(
                line,
                f"rules: {method.name} works on tensors, {self.filler.main.name} on modules such as {module!r}",
            )
            return None
        absent = self.recipe.absent
        entries = [i for i, m in enumerate(lows) if m is not None or absent == "zero"]
        left_out = {n: not self.matcher.recipe.includes(n) for n in (lead.a, lead.b)}
        if len(set(left_out.values())) > 1:
            where = self.recipe.at(self.recipe.lines.get("exclude", self.recipe.lines.get("include", 1)))
            why = f"{lead.a!r} and {lead.b!r} are one module's: include or exclude both (*{module}*)"
            self.problems.append(RecipeError(why).within(where))
            return None
        if left_out[lead.a]:  # as it is in the first adapter that has it
            method, entries, rule = get_method("product"), [next(i for i, m in enumerate(lows) if m is not None)], -1
            group = self.filler.resolver.fixed(method, {"weight": (1.0,), "normalize": False})
        else:
            why_not = wrong_count(method, len(entries))
            if why_not:
                self.filler.resolver.report(
                    line, f"{module!r}, which not all adapters have (absent: {absent}): {why_not}"
                )
                return None
            operands = [Operand(self.part.entries[i].model, lead.a) for i in entries]
            made = self.filler.group(Match(slot, self.part, (), None), rule, method, entries, operands)
            if made is None:
                return None
            group = made
        for i, low in enumerate(lows):
            if low is None:
                self.absent.setdefault(i, []).append(module)
        return Combination(method, group.params, tuple((i, lows[i]) for i in entries)), group

    def note_absent(self) -> None:
        """Say what is not everywhere, and how it counts."""
        how = "count as no change" if self.recipe.absent == "zero" else "are shared among the others"
        for i, modules in self.absent.items():
            ref = self.adapters[i].checkpoint.ref
            few = f"{', '.join(modules[:4])}{', ...' if len(modules) > 4 else ''}"
            self.matcher.notes.append(
                f"absent: {self.recipe.absent}: {ref} lacks {len(modules)} modules, which {how}: {few}"
            )
