"""Which tensors of which models make each output tensor, by name; `slicing.py` does so layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.meaning.buffers import is_computed
from stockpot.checkpoints.meaning.layers import LayerMap, map_layers
from stockpot.errors import MismatchError, StockpotError, few_of, nearest
from stockpot.methods.declaration import Method, Space
from stockpot.planning.plan import ModelInput, Operand
from stockpot.planning.template import Slot
from stockpot.recipes.schema import Recipe, Settings
from stockpot.specs import TensorSpec

__all__ = ["Match", "Matcher", "Member", "Section", "layer_of", "match_models"]


@dataclass(frozen=True)
class Member:
    """One model of `models` or one source of a slice, resolved. companions: models by the names of what they are to it."""

    model: int
    position: int
    parameters: Settings
    layers: tuple[int, int] | None = None
    companions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """Entries that merge together (all `models`, or the sources of one slice), and the base they refer to."""

    entries: tuple[Member, ...]
    base: int | None
    parameters: Settings
    line: int

    def participants(self, method: Method, *, rule: bool = False) -> list[int]:
        """Which entries a method takes. -1 stands for a base that is not among them."""
        entries = range(len(self.entries))
        if method.space is Space.DELTA:
            return [i for i in entries if self.entries[i].model != self.base]
        at_base = next((i for i in entries if self.entries[i].model == self.base), None)
        if rule and method.base_role == "copied":
            return [at_base if at_base is not None else (-1 if self.base is not None else 0)]
        if method.base_role == "first" and self.base is not None:
            return [-1 if at_base is None else at_base, *(i for i in entries if i != at_base)]
        return list(entries)


@dataclass(frozen=True)
class Match:
    """A tensor of the output and what it is made of: its operands entry by entry (a base among `models` included; None of a
    model that has none, under `absent: skip`), the base's, the part of the recipe.
    """

    slot: Slot
    part: Section
    operands: tuple[Operand | None, ...]
    base: Operand | None
    merged: bool = True

    @property
    def name(self) -> str:
        return self.slot.name


@dataclass
class Matcher:
    """Shared state while matching."""

    recipe: Recipe
    inputs: Sequence[ModelInput]
    problems: list[StockpotError]
    notes: list[str]
    #: names that are filled otherwise
    apart: frozenset[str] = frozenset()
    untied: set[str] = field(default_factory=set)
    #: under `absent: zero`, what counts as zeros: model -> name -> shape and dtype
    zeros: dict[int, dict[str, TensorSpec]] = field(default_factory=dict)
    #: what is no weight, and not everywhere: by model
    left: dict[int, list[str]] = field(default_factory=dict)
    #: under `absent: skip`, what models don't have
    skipped: dict[int, list[str]] = field(default_factory=dict)

    def checkpoint(self, model: int) -> Checkpoint:
        return self.inputs[model].checkpoint

    # names

    def wanted(self, donor: int, others: Sequence[int]) -> list[str]:
        """The output's names: the donor's, without tied second copies, with a head that another model has untied. Where
        tensors may be absent, those of the others too.
        """
        checkpoint = self.checkpoint(donor)
        duplicates = checkpoint.tied()
        names = [
            n
            for n in checkpoint.names()
            if n not in duplicates and n not in self.apart and not self.leaves(donor, n, others)
        ]
        self.note_untied(donor)
        seen = {*names, *self.apart}
        for other in others:
            theirs = self.checkpoint(other)
            tied, ties, stored = theirs.tied(), theirs.ties, set(theirs.names())
            self.note_untied(other)
            for name in theirs.names():
                if name in seen or name in tied or self.leaves(other, name, (donor,)):
                    continue
                if self.recipe.absent != "error" and not checkpoint.resolve(name) and self.recipe.includes(name):
                    names.append(name)
                    seen.add(name)
                    continue
                if ties.stands_alone(name, stored) and checkpoint.resolve(name):
                    names.append(name)
                    seen.add(name)
                    self.untied.add(name)
                    self.notes.append(
                        f"{self.inputs[other].ref} has its own {name!r}, which is tied elsewhere: the output is untied"
                    )
        if self.untied:  # the config has one word for all that it ties
            for name in checkpoint.ties.together(self.untied):
                if name not in seen and checkpoint.resolve(name):
                    names.append(name)
                    seen.add(name)
        return names

    def note_untied(self, model: int) -> None:
        """Say where a config ties what the file holds twice, and differently."""
        for second, first in self.checkpoint(model).ties.apart:
            self.untied.add(second)
            note = (
                f"{self.inputs[model].ref}: its config ties {second!r} to {first!r}, but it holds two that differ: the output "
                "is untied"
            )
            self.notes += [note] if note not in self.notes else []

    def leaves(self, model: int, name: str, others: Iterable[int]) -> bool:
        """Whether a tensor of a model is left out because it is no weight, and not all have it."""
        if self.checkpoint(model).kind != "model" or not is_computed(name, self.checkpoint(model).spec(name)):
            return False
        if all(name in self.checkpoint(other) for other in others) or not self.recipe.includes(name):
            return False
        return self.leave(model, name)

    def leave(self, model: int, name: str) -> bool:
        """Keep in mind what is left out."""
        held = self.left.setdefault(model, [])
        held += [name] if name not in held else []
        return True

    def check_extra(self, donor: int, model: int, names: set[str]) -> None:
        """Tensors that only another model has would be dropped: an error unless they are excluded."""
        theirs = self.checkpoint(model)
        tied, copies = theirs.tied(), theirs.ties.copies
        names = names | self.apart | {own for own in map(theirs.resolve, names) if own is not None}
        extra = [
            n
            for n in theirs.names()
            if n not in names
            and n not in tied
            and n not in copies
            and self.recipe.includes(n)
            and n not in self.left.get(model, ())
        ]
        if extra:
            self.problems.append(
                MismatchError(
                    f"{self.inputs[model].ref}: {len(extra)} tensors are not in {self.inputs[donor].ref}: "
                    f"{few_of(extra)}; exclude them to leave them out, or say what they count as in models without them: "
                    "'absent: zero' or 'absent: skip'"
                ).within(*self.inputs[model].places)
            )

    def operand(
        self, model: int, slot: Slot, name: str, position: int, missing: dict[int, list[str]]
    ) -> Operand | None:
        found = self.checkpoint(model).resolve(name)
        if found is not None:
            return Operand(model, found, position)
        if self.recipe.absent == "skip":
            self.skipped.setdefault(model, []).append(name)
        elif self.recipe.absent == "zero":
            self.zeros.setdefault(model, {})[name] = slot.spec
            return Operand(model, name, position)
        else:
            missing.setdefault(model, []).append(name)
        return None

    def lacks(self, model: int, name: str, suffix: str, holding: Sequence[set[str]]) -> bool:
        """Whether a layer's tensor is left out because it is no weight, and not all models have it in their layers."""
        if not is_computed(name, self.checkpoint(model).spec(name)) or all(suffix in held for held in holding):
            return False
        return self.leave(model, name)

    def note_left(self) -> None:
        """Say what is no weight and was left out."""
        for model, names in self.left.items():
            self.notes.append(
                f"{self.inputs[model].ref}: {len(names)} tensors that models compute anew are left out, for not all have them: "
                f"{few_of(names)}"
            )

    def note_absent(self) -> None:
        """Say what is not everywhere, and how it counts."""
        for how, found in (("count as zeros", self.zeros), ("take no part", self.skipped)):
            for model, names in found.items():
                unique = list(dict.fromkeys(names))
                self.notes.append(
                    f"absent: {self.recipe.absent}: {self.inputs[model].ref} lacks {len(unique)} tensors, which {how}: "
                    f"{few_of(unique)}"
                )

    def report_missing(self, missing: dict[int, list[str]], donor: int) -> None:
        for model, names in missing.items():
            unique = list(dict.fromkeys(names))
            hint = nearest(unique[0], self.checkpoint(model).names()) if len(unique) < 100 else ""
            if not self.recipe.slices:
                hint += "; 'absent: zero' counts them as zeros there, 'absent: skip' merges them without that model"
            self.problems.append(
                MismatchError(
                    f"{self.inputs[model].ref}: {len(unique)} tensors of {self.inputs[donor].ref} are missing: "
                    f"{few_of(unique)}{hint}"
                ).within(*self.inputs[model].places)
            )

    def slot(self, name: str, origin: Operand, depth: float, layer: tuple[str, int] | None) -> Slot:
        return Slot(name, self.checkpoint(origin.model).spec(origin.name), origin, depth, layer)

    def make(
        self, slot: Slot, source: Mapping[int, str], part: Section, base_name: str, missing: dict[int, list[str]]
    ) -> Match:
        """A match from the name that the tensor has in each entry. Excluded tensors need only be in the donor."""
        if not self.recipe.includes(slot.name) or is_computed(slot.name, slot.spec):
            return Match(slot, part, (), None, merged=False)
        operands = [self.operand(e.model, slot, source[i], e.position, missing) for i, e in enumerate(part.entries)]
        base = None
        if part.base is not None:
            base = self.operand(part.base, slot, base_name, 0, missing)
        return Match(slot, part, tuple(operands), base)


def match_models(m: Matcher, part: Section, donor: int) -> list[Match]:
    """`models:` every tensor by its name."""
    others = list(dict.fromkeys([e.model for e in part.entries] + ([part.base] if part.base is not None else [])))
    names = m.wanted(donor, others)
    layers = m.checkpoint(donor).layers()
    if m.recipe.absent != "error":
        wider = map_layers(names)
        if layers.places.keys() <= wider.places.keys():  # with the layers that only others have
            layers = wider
    missing: dict[int, list[str]] = {}
    out = []
    for name in names:
        found = ((i, m.checkpoint(i).resolve(name)) for i in (donor, *others))
        origin = next(Operand(i, own) for i, own in found if own is not None)
        slot = m.slot(name, origin, layers.depth(name), layer_of(layers, name))
        out.append(m.make(slot, dict.fromkeys(range(len(part.entries)), name), part, name, missing))
    m.report_missing(missing, donor)
    m.note_absent()
    m.note_left()
    for model in others:
        if model != donor:
            m.check_extra(donor, model, set(names))
    return out


def layer_of(layers: LayerMap, name: str) -> tuple[str, int] | None:
    """(stack, number) of a tensor that lies in numbered layers."""
    place = layers.places.get(name)
    return None if place is None else (place.stack, place.layer)
