"""What fills each slot of the output: which method, which operands, which parameters, in which dtype."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stockpot.checkpoints.meaning.roles import role_of
from stockpot.errors import StockpotError
from stockpot.methods.averaging import linear, passthrough
from stockpot.methods.declaration import Method, Space, cannot_replace, get_method, wrong_count
from stockpot.planning.checks import check_fit
from stockpot.planning.companions import companion_operands
from stockpot.planning.matching import Match
from stockpot.planning.parameters import Levels, ParameterResolver, Place
from stockpot.planning.plan import Action, MergeGroup, ModelInput, Operand, TensorPlan
from stockpot.planning.template import Slot
from stockpot.recipes.schema import Recipe, Rule
from stockpot.specs import BY_LABEL, DType, TensorSpec

__all__ = ["Filler", "replacement"]

_NO_RULE = Rule((), None, {}, 0)


def replacement(method: Method) -> Method | None:
    """What merges the tensors that a method is not for; None where it is for all, or they are the base's."""
    if method.otherwise in (None, "base"):
        return None
    return linear if method.otherwise == "mean" else get_method(str(method.otherwise))


@dataclass
class Filler:
    """Turns matches into tensors of a plan, and gathers what is wrong with them.

    main, rules  the recipe's method, and those of its rules by number
    zeros        model -> tensors that count as zeros, for they are absent
    """

    recipe: Recipe
    inputs: Sequence[ModelInput]
    resolver: ParameterResolver
    problems: list[StockpotError]
    main: Method
    rules: Mapping[int, Method]
    zeros: Mapping[int, Mapping[str, TensorSpec]]
    _layers: dict[str, int] = field(default_factory=dict)
    _outside: list[str] = field(default_factory=list)
    _groups: dict[tuple[int, int, tuple[int, ...], str], MergeGroup | None] = field(default_factory=dict)

    def fill(self, matches: Sequence[Match]) -> list[TensorPlan]:
        """The tensors of the output, without their places in its files."""
        self.know_layers(match.slot for match in matches)
        out = [planned for planned in map(self.tensor, matches) if planned is not None]
        self.resolver.note_unmatched()
        if self._outside:
            few = f"{', '.join(self._outside[:3])}{', ...' if len(self._outside) > 3 else ''}"
            self.resolver.note(
                f"a gradient's last value is used for {few}, which come after the layers; mergekit uses its first value "
                "('compat: mergekit' does too)"
            )
        return out

    def know_layers(self, slots: Iterable[Slot]) -> None:
        """Count the layers of the output: what vectors with an entry for each are held to."""
        for stack, number in (slot.layer for slot in slots if slot.layer is not None):
            self._layers[stack] = max(self._layers.get(stack, 0), number + 1)

    def tensor(self, match: Match) -> TensorPlan | None:
        """One of them; None after a problem."""
        rule = self.rule_for(match.name)
        method = self.main if rule < 0 else self.rules[rule]
        if method.space is Space.FACTORS:
            method = linear  # what lies beside factors: the mean, by the same weights
        leaves = method.applies is not None and role_of(match.name, match.slot.spec.shape) not in method.applies
        if leaves and match.slot.spec.dtype.is_float:
            instead = self.instead(match, rule, method)
            if instead is None:
                return None
            match, method = instead
        if not match.merged:
            return self.copied(match)
        chosen = self.chosen(match, rule, method)
        if chosen is None:
            return None
        operands = self.operands(match, chosen, method)
        base = match.base if method.space is Space.DELTA else None
        if not self.fits(match, [*operands, *([base] if base else [])]):
            return None
        if not match.slot.spec.dtype.is_float:
            there = [o for o in (*operands, *([base] if base else [])) if o.name not in self.zeros.get(o.model, ())]
            kept = tuple(dict.fromkeys([match.slot.origin, *there]))
            return TensorPlan(0, match.name, match.slot.spec, Action.KEEP, -1, kept, None)
        group = self.group(match, rule, method, chosen, operands, plain=leaves and method is linear)
        if group is None:
            return None
        spec = TensorSpec(self.target(match), match.slot.spec.shape)
        plain = method.copies is not None and method.copies(group.params)
        if plain and self.spec(operands[0]).dtype is spec.dtype:
            return TensorPlan(0, match.name, spec, Action.COPY, -1, operands, None)
        beside = companion_operands(method, match.part, chosen, operands, self.inputs, self.problems)
        if beside is None:
            return None
        return TensorPlan(
            0, match.name, spec, Action.MERGE, group.index, operands, base, companions=beside, layer=match.slot.layer
        )

    # its method and operands

    def rule_for(self, name: str) -> int:
        """The first rule that speaks of a tensor; -1 for none."""
        found = (
            i for i, rule in enumerate(self.recipe.rules) if any(fnmatch.fnmatchcase(name, p) for p in rule.patterns)
        )
        return next(found, -1)

    def instead(self, match: Match, rule: int, method: Method) -> tuple[Match, Method] | None:
        """For a tensor that its method is not for: what happens to it. None after a problem."""
        if method.otherwise == "base":
            origin = match.base or match.slot.origin
            if not self.fits(match, [origin]):
                return None
            return replace(match, slot=replace(match.slot, spec=self.spec(origin), origin=origin), merged=False), method
        found = replacement(method)
        assert found is not None
        why = cannot_replace(method, found) or wrong_count(found, len(match.part.participants(found, rule=rule >= 0)))
        if why:
            self.resolver.report(match.part.line, f"{match.name}: {why}")
            return None
        return match, found

    def chosen(self, match: Match, rule: int, method: Method) -> list[int] | None:
        """The entries that take part, those left out that lack the tensor. None after a problem."""
        line = self.recipe.rules[rule].line if rule >= 0 else match.part.line
        asked = match.part.participants(method, rule=rule >= 0)
        if match.base is None and (method.space is Space.DELTA or -1 in asked):
            lacks = ""
            if match.part.base is not None:
                base = self.inputs[match.part.base].ref
                lacks = f", and {base} has no {match.name!r}: exclude it, or let it count as zeros (absent: zero)"
            self.resolver.report(line, f"{method.name} needs base_model{lacks}")
            return None
        chosen = [i for i in asked if i < 0 or match.operands[i] is not None]
        if rule >= 0 or len(chosen) < len(asked):
            why = wrong_count(method, len(chosen))
            if why:
                what = "rules" if rule >= 0 else f"{match.name!r}, which not all models have (absent: skip)"
                self.resolver.report(line, f"{what}: {why}")
                return None
        return chosen

    def operands(self, match: Match, chosen: Sequence[int], method: Method) -> tuple[Operand, ...]:
        """Of a model that lacks a tensor zeros, or where differences from a base are merged, the base's: no difference."""
        out = []
        for i in chosen:
            own = match.base if i < 0 else match.operands[i]
            assert own is not None
            if method.space is Space.DELTA and match.base and own.name in self.zeros.get(own.model, ()):
                own = Operand(match.base.model, match.base.name, own.position)
            out.append(own)
        return tuple(out)

    def fits(self, match: Match, operands: Sequence[Operand]) -> bool:
        return check_fit(match.slot, operands, self.inputs, self.problems)

    # its parameters

    def group(
        self,
        match: Match,
        rule: int,
        method: Method,
        chosen: Sequence[int],
        operands: Sequence[Operand],
        *,
        plain: bool = False,
    ) -> MergeGroup | None:
        """The method with the tensor's parameters. plain: a mean that takes weights only. None after a problem."""
        part = match.part
        levels = Levels(
            (part.parameters, self.recipe.parameters),
            tuple(part.entries[i].parameters if i >= 0 else {} for i in chosen),
            (self.recipe.rules[rule] if rule >= 0 else _NO_RULE).parameters,
        )
        if plain:
            levels = levels.without("normalize")
        depth, layer = match.slot.depth, match.slot.layer
        if layer is None:
            if self.recipe.mergekit_compat:
                depth = 0.0
            elif depth == 1.0 and self.resolver.gradient_note(method, levels, match.name):
                self._outside.append(match.name)
        key = (id(part), rule, tuple(chosen), method.name)
        if key in self._groups:
            return self._groups[key]
        place = Place(depth, None if layer is None else layer[1], None if layer is None else self._layers[layer[0]])
        group = self.resolver.group(method, levels, [o.name for o in operands], match.name, place)
        if not levels.dynamic:
            self._groups[key] = group
        return group

    def copied(self, match: Match) -> TensorPlan | None:
        """An excluded tensor: as it is where it is taken from, in the output's dtype."""
        spec, origin, target = match.slot.spec, match.slot.origin, self.target(match)
        if spec.dtype is target:
            return TensorPlan(0, match.name, spec, Action.COPY, -1, (origin,), None)
        group = self.resolver.group(passthrough, Levels((), ({},)), [match.name], match.name, Place())
        if group is None:
            return None
        spec = TensorSpec(target, spec.shape)
        return TensorPlan(0, match.name, spec, Action.MERGE, group.index, (origin,), None)

    # its dtype

    def spec(self, operand: Operand) -> TensorSpec:
        return self.inputs[operand.model].checkpoint.spec(operand.name)

    def written(self, operand: Operand) -> DType:
        return self.inputs[operand.model].checkpoint.written(operand.name)

    def target(self, match: Match) -> DType:
        """The output's dtype: the recipe's, else that of where it is taken from (mergekit: the widest of the inputs')."""
        wanted = self.recipe.out_dtype or self.recipe.dtype
        if not match.slot.spec.dtype.is_float:
            return match.slot.spec.dtype
        if wanted:
            return BY_LABEL[wanted]
        operands = [*match.operands, match.base] if self.recipe.mergekit_compat else match.operands
        found = [self.written(o) for o in operands if o is not None and self.spec(o).dtype.is_float]
        if self.recipe.mergekit_compat and len(set(found)) > 1:
            wide = max(found, key=lambda d: d.itemsize)
            return DType.F32 if wide.itemsize == 2 else wide  # bfloat16 with float16
        return self.written(match.slot.origin)
