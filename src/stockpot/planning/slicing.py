"""Slices: which tensors of which models make each output tensor where layers are taken from several places."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.meaning.buffers import is_computed
from stockpot.checkpoints.meaning.depth import Pick, describing_part, hidden_layers, sees
from stockpot.checkpoints.meaning.layers import outside_depth
from stockpot.errors import MismatchError, RecipeError
from stockpot.planning.config import Layers
from stockpot.planning.matching import Match, Matcher, Section, layer_of
from stockpot.planning.plan import ModelInput, Operand
from stockpot.specs import Shape

__all__ = ["layer_kinds", "match_slices", "output_layers", "primary_stack"]

#: types whose layers do with their number something that no config says
_BY_NUMBER = ("diffllama", "beam", "minicpm3", "minimax", "decision_transformer")


def primary_stack(checkpoint: Checkpoint) -> tuple[str, int, list[str]]:
    """(prefix, layers, other prefixes of comparable size) of the stack that `layer_range` means: the largest, of models that see
    or hear as well the largest of those that do neither.
    """
    layers = checkpoint.layers()
    weight: dict[str, int] = {}
    for name, place in layers.places.items():
        weight[place.stack] = weight.get(place.stack, 0) + checkpoint.spec(name).numel
    if not weight:
        return "", 0, []
    text = {p: n for p, n in weight.items() if not sees(p)}
    weight = text or weight
    ordered = sorted(weight, key=lambda p: (-weight[p], p))
    rivals = [p for p in ordered[1:] if 4 * weight[p] >= weight[ordered[0]]]
    return ordered[0], layers.stacks[ordered[0]], rivals


def match_slices(m: Matcher, parts: Sequence[Section]) -> list[Match]:
    """`slices:` output layers one after the other.

    What comes before the layers follows the first slice, what comes after them the last one.
    """
    first, last = parts[0], parts[-1]
    donor = _donor(first)
    prefix, _, _ = primary_stack(m.checkpoint(donor))
    if not prefix:
        m.problems.append(
            MismatchError(
                f"{m.inputs[donor].ref}: no numbered layers found in its tensor names, so slices can't apply; use 'models'"
            ).within(*m.inputs[donor].places)
        )
        return []
    known = _check_ranges(m, parts, prefix)
    if not known:
        return []
    missing: dict[int, list[str]] = {}
    before, after = _outside(m, first, last, donor, prefix, missing)
    holding = [
        {suffix for names in _names_by_layer(m.checkpoint(e.model), prefix).values() for suffix in names}
        for part in parts
        for e in part.entries
    ]
    inside = []
    total = 0
    for number, part in enumerate(parts):
        entries = part.entries
        starts = [known[number, i][0] for i in range(len(entries))]
        count = known[number, 0][1] - starts[0]
        lead = _lead(part)
        lead_donor = entries[lead].model
        by_layer = _names_by_layer(m.checkpoint(lead_donor), prefix)
        base_start = starts[lead]
        for i, e in enumerate(entries):
            if e.model == part.base:
                base_start = starts[i]
        for j in range(count):
            depth = j / (count - 1) if count > 1 else 1.0
            for suffix in by_layer.get(starts[lead] + j, ()):
                source = {i: f"{prefix}.{starts[i] + j}.{suffix}" for i in range(len(entries))}
                if m.lacks(lead_donor, source[lead], suffix, holding):
                    continue
                origin = Operand(lead_donor, source[lead])
                slot = m.slot(f"{prefix}.{total + j}.{suffix}", origin, depth, (prefix, total + j))
                inside.append(m.make(slot, source, part, f"{prefix}.{base_start + j}.{suffix}", missing))
        total += count
    m.report_missing(missing, donor)
    m.note_left()
    _check_slices(m, parts, prefix, known)
    return before + inside + after


def _check_slices(
    m: Matcher, parts: Sequence[Section], prefix: str, known: dict[tuple[int, int], tuple[int, int]]
) -> None:
    """Every source's layers must have the tensors of the first slice's, of the same shape but for experts' numbers."""
    reference: dict[str, Shape] | None = None
    owner = ""
    for number, part in enumerate(parts):
        for i, entry in enumerate(part.entries):
            checkpoint = m.checkpoint(entry.model)
            layers = _names_by_layer(checkpoint, prefix)
            for layer in range(*known[number, i]):
                specs = {s: checkpoint.spec(f"{prefix}.{layer}.{s}") for s in layers.get(layer, ())}
                shapes = {s: spec.shape for s, spec in specs.items() if not is_computed(f"{prefix}.{layer}.{s}", spec)}
                if reference is None:
                    reference, owner = shapes, f"layer {layer} of {m.inputs[entry.model].ref}"
                odd = [
                    s
                    for s in sorted(set(shapes) | set(reference))
                    if shapes.get(s) != reference.get(s) and m.recipe.includes(f"{prefix}.0.{s}")
                ]
                if odd and not _differs_within(m, checkpoint, prefix, odd):
                    source = m.inputs[entry.model]
                    m.problems.append(
                        MismatchError(
                            f"layer {layer} of {source.ref}: {odd[0]!r} is {_shape(shapes, odd[0])}, but "
                            f"{_shape(reference, odd[0])} in {owner}"
                        ).within(*source.places)
                    )
                    return


def _differs_within(m: Matcher, checkpoint: Checkpoint, prefix: str, odd: Sequence[str]) -> bool:
    """Whether the model's own layers differ in these tensors anyway (dense and sparse layers, first T5 block)."""
    layers = _names_by_layer(checkpoint, prefix)
    for suffix in odd:
        found = {
            checkpoint.spec(f"{prefix}.{n}.{suffix}").shape if suffix in names else None for n, names in layers.items()
        }
        if len(found) == 1:
            return False
    return True


def _shape(shapes: dict[str, Shape], suffix: str) -> str:
    return str(list(shapes[suffix])) if suffix in shapes else "absent"


def _donor(part: Section) -> int:
    return part.entries[_lead(part)].model


def _lead(part: Section) -> int:
    """Index of the entry whose names count: the base if it is a source, else the first."""
    return next((i for i, e in enumerate(part.entries) if e.model == part.base), 0)


def _outside(
    m: Matcher, first: Section, last: Section, donor: int, prefix: str, missing: dict[int, list[str]]
) -> tuple[list[Match], list[Match]]:
    """Tensors outside the sliced stack: before the layers by the first slice, after them by the last."""
    before: list[Match] = []
    after: list[Match] = []
    involved = [e.model for part in (first, last) for e in part.entries]
    layers = m.checkpoint(donor).layers()
    for name in m.wanted(donor, list(dict.fromkeys(involved))):
        place = layers.places.get(name)
        if place is not None and place.stack == prefix:
            continue
        is_exit = place is None and outside_depth(name) == 1.0
        part = last if is_exit else first
        owner = _donor(part)
        found = m.checkpoint(owner).resolve(name)
        if found is None:
            missing.setdefault(owner, []).append(name)
            continue
        slot = m.slot(name, Operand(owner, found), layers.depth(name), layer_of(layers, name))
        match = m.make(slot, dict.fromkeys(range(len(part.entries)), name), part, name, missing)
        (after if is_exit else before).append(match)
    return before, after


def _names_by_layer(checkpoint: Checkpoint, prefix: str) -> dict[int, list[str]]:
    out: dict[int, list[str]] = {}
    for name, place in checkpoint.layers().places.items():
        if place.stack == prefix:
            suffix = name[len(prefix) + 1 :].partition(".")[2]
            out.setdefault(place.layer, []).append(suffix)
    return out


def layer_kinds(checkpoint: Checkpoint, prefix: str) -> tuple[Hashable, ...]:
    """What the tensors of each layer of a stack are: their names in it and their shapes."""
    found = _names_by_layer(checkpoint, prefix)
    kinds = []
    for number in range(len(found)):
        specs = ((s, checkpoint.spec(f"{prefix}.{number}.{s}")) for s in found.get(number, ()))
        kinds.append(frozenset((s, spec.shape) for s, spec in specs if not is_computed(f"x.{s}", spec)))
    return tuple(kinds)


def _check_ranges(m: Matcher, parts: Sequence[Section], prefix: str) -> dict[tuple[int, int], tuple[int, int]]:
    """The layer range of every source, {} after a problem."""
    out: dict[tuple[int, int], tuple[int, int]] = {}
    bad = len(m.problems)
    for number, (part, piece) in enumerate(zip(parts, m.recipe.slices, strict=True)):
        for i, (entry, source) in enumerate(zip(part.entries, piece.sources, strict=True)):
            own, layers, rivals = primary_stack(m.checkpoint(entry.model))
            layers = hidden_layers(m.checkpoint(entry.model).config, own, layers)
            start, stop = entry.layers or (0, layers)
            where = m.recipe.at(source.line)
            if own != prefix:
                m.problems.append(
                    MismatchError(f"{source.ref}: its layers are {own or 'none'!r}, not {prefix!r}").within(where)
                )
            elif stop > layers:
                m.problems.append(
                    RecipeError(
                        f"layer_range [{start}, {stop}] goes past the end: {source.ref} has {layers} layers"
                    ).within(where)
                )
            elif rivals and (start, stop) != (0, layers):
                m.problems.append(
                    RecipeError(
                        f"{source.ref} has several stacks of layers ({', '.join([own, *rivals])}); "
                        "layer_range can't say which: use 'models' with 'rules' instead"
                    ).within(where)
                )
            out[number, i] = (start, stop)
        counts = {out[number, i][1] - out[number, i][0] for i in range(len(part.entries))}
        if len(counts) > 1:
            m.problems.append(
                RecipeError(f"sources of one slice differ in layers: {sorted(counts)}").within(m.recipe.at(piece.line))
            )
    return out if len(m.problems) == bad else {}


def output_layers(
    donor: Checkpoint, parts: Sequence[Section], inputs: Sequence[ModelInput], notes: list[str]
) -> Layers:
    """Which layers of which models the output's are described by."""
    stack, old, _ = primary_stack(donor)
    picks: list[Pick] = []
    known: dict[int, tuple[Any, ...]] = {}
    for part in parts:
        lead = next((e for e in part.entries if e.model == part.base), part.entries[0])
        checkpoint = inputs[lead.model].checkpoint
        if lead.model not in known:
            held = primary_stack(checkpoint)[1]
            found = describing_part(checkpoint.config, stack, held)
            own = found[1:] if found is not None else (describing_part(donor.config, stack, old) or ("", {}, None))[1:]
            known[lead.model] = (
                *own,
                hidden_layers(checkpoint.config, stack, held),
                layer_kinds(checkpoint, stack),
            )
        config, kind, count, kinds = known[lead.model]
        start, stop = lead.layers or (0, count)
        picks += [Pick(config, count, i, kind, kinds, inputs[lead.model].ref) for i in range(start, stop)]
    config = donor.config
    counts = config.get("model_type") in _BY_NUMBER or config.get("scale_attn_by_inverse_layer_idx")
    if counts and [p.layer for p in picks] != list(range(len(picks))):
        notes.append(
            f"{donor.ref}: its layers compute with their own number, which is another one for some of them in the output"
        )
    stacks = donor.layers().stacks
    _check_outside(donor, stack, [p.layer for p in picks] != list(range(old)))
    return Layers(stack, old, picks, alone=all(n != old for s, n in stacks.items() if s != stack))


def _check_outside(donor: Checkpoint, stack: str, changed: bool) -> None:
    """Nothing outside the layers may have an entry for each of them. Raises MismatchError."""
    numbered: dict[str, list[str]] = {}
    for name in donor.names() if changed else ():
        if not name.startswith(f"{stack}."):
            head, _, last = name.rpartition(".")
            key = head if last.isdigit() else name if "per_layer" in name else ""
            numbered.setdefault(key, []).append(name)
    old = donor.layers().stacks[stack]
    for key, names in numbered.items():
        if key and ("per_layer" in key or abs(len(names) - old) <= 1):
            raise MismatchError(
                f"{names[0]!r} {list(donor.spec(names[0]).shape)} has an entry for each layer, but lies outside of them, so "
                "that other layers can't be chosen: merge it with 'models'"
            )
