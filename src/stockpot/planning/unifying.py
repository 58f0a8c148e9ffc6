"""Models whose files call the same tensors otherwise, under the names of one of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.meaning.dialects import Unified, unify
from stockpot.checkpoints.meaning.memory import without_wrappers
from stockpot.checkpoints.views import renamed
from stockpot.errors import MismatchError, StockpotError
from stockpot.planning.matching import Section
from stockpot.planning.plan import ModelInput
from stockpot.recipes.schema import Recipe
from stockpot.specs import TensorSpec

__all__ = ["check_other_names", "unify_names"]


def unify_names(
    inputs: list[ModelInput],
    donor: int,
    parts: Sequence[Section],
    problems: list[StockpotError],
    notes: list[str],
) -> None:
    """Replace the inputs that call their tensors otherwise than the donor by views under its names, companions with them."""
    like = inputs[donor].checkpoint
    if like.kind != "model":
        return
    plain, wrapped = without_wrappers(like.names())
    if wrapped and like.config and len(set(plain.values())) == len(plain):
        # nothing that loads a model of a config would find its weights under such names
        like = renamed(like, {new: old for old, new in plain.items()}, ref=like.ref)
        inputs[donor] = replace(inputs[donor], checkpoint=like)
        notes.append(f"{inputs[donor].ref}: its names have {wrapped} of a wrapper in them, which the output's have not")
    beside = [(e.model, index) for part in parts for e in part.entries for index in e.companions.values()]
    for model in list(inputs):
        if model.role != "model" or model.index == donor or model.checkpoint.kind != "model":
            continue
        if "mlx" in (like.dialect, model.checkpoint.dialect) and like.dialect != model.checkpoint.dialect:
            turned = next((n for n in like.names() if len(like.spec(n).shape) > 2), None)
            if turned is not None:
                why = (
                    f"{model.ref}: one of it and {inputs[donor].ref} is of MLX, where {turned!r} has its channels last"
                )
                problems.append(MismatchError(f"{why}; convert it back with mlx_lm.convert").within(*model.places))
        found = unify(like, model.checkpoint)
        for why in found.problems:
            problems.append(MismatchError(f"{model.ref}: {why}{_WAY_OUT}").within(*model.places))
        if found.checkpoint is model.checkpoint:
            continue
        inputs[model.index] = replace(model, checkpoint=found.checkpoint)
        if found.renamed:
            notes.append(_said(model.ref, inputs[donor].ref, found))
        for owner, index in beside:
            if owner == model.index:
                own = unify(like, inputs[index].checkpoint)
                inputs[index] = replace(inputs[index], checkpoint=own.checkpoint)


_WAY_OUT = (
    "; load each with transformers and save it again in one way: save_pretrained(DIR, save_original_format=False)"
)


def _said(ref: str, like: str, found: Unified) -> str:
    own, there = found.example
    packed = f", {found.repacked} of them put together of parts or taken out of packed ones" if found.repacked else ""
    return (
        f"{ref}: {found.renamed} tensors are called otherwise in {like} and read under its names{packed}: "
        f"{own!r} is {there!r} there"
    )


#: so many tensors of one kind without their likes are not looked through: what they would be is not plain
_MOST = 64


def check_other_names(
    inputs: Sequence[ModelInput], donor: int, recipe: Recipe, problems: list[StockpotError], notes: list[str]
) -> None:
    """What nothing knows to be one tensor, and seems so by name and shape: not something that only some models have.

    `absent:` takes each for a tensor of one model alone, and merges nothing of them: refused too where that is most of both
    models, else noted.
    """
    like = inputs[donor].checkpoint
    for model in inputs:
        if model.role != "model" or model.index == donor or {like.kind, model.checkpoint.kind} != {"model"}:
            continue
        ours = _without(like, model.checkpoint, recipe)
        theirs = _without(model.checkpoint, like, recipe)
        total = max(len(list(c.names())) for c in (like, model.checkpoint))
        pairs = _by_components(ours, theirs) or _by_beginning(ours, theirs, total)
        if pairs and recipe.absent != "error" and 2 * len(pairs) <= total:
            own, there = next(iter(pairs.items()))
            notes.append(
                f"{model.ref}: {len(pairs)} tensors may be those of {inputs[donor].ref} under other names ({there!r} is {own!r} "
                f"there), and are merged with none of them (absent: {recipe.absent})"
            )
        elif pairs:
            own, there = next(iter(pairs.items()))
            why = (
                f"{model.ref}: {len(pairs)} tensors seem to be those of {inputs[donor].ref} under other names: {there!r} is "
                f"{own!r} there{_WAY_OUT}. If they are others, leave both out with 'exclude'"
            )
            problems.append(MismatchError(why).within(*model.places))


def _without(held: Checkpoint, other: Checkpoint, recipe: Recipe) -> dict[str, TensorSpec]:
    """What another model has nothing for, of what is merged."""
    return {n: held.spec(n) for n in held.names() if recipe.includes(n) and other.resolve(n) is None}


def _alike(specs: Mapping[str, TensorSpec]) -> dict[object, list[str]]:
    """Names by what a tensor keeps under another one: its shape, its numbers, the last of its words."""
    out: dict[object, list[str]] = {}
    for name, spec in specs.items():
        words = name.split(".")
        out.setdefault((spec.shape, tuple(w for w in words if w.isdigit()), words[-1]), []).append(name)
    return out


def _by_components(ours: Mapping[str, TensorSpec], theirs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Pairs where one name has the words of the other and more: all of the side that has fewer, or none."""
    there = _alike(theirs)
    pairs: dict[str, str] = {}
    for key, names in _alike(ours).items():
        others = there.get(key, [])
        if len(names) > _MOST or len(others) > _MOST:
            return {}
        words = {n: Counter(n.split(".")) for n in (*names, *others)}
        for name in names:
            found = [o for o in others if words[name] <= words[o] or words[o] <= words[name]]
            if len(found) == 1:
                pairs[name] = found[0]
    unique = len(set(pairs.values())) == len(pairs)
    return pairs if unique and len(pairs) == min(len(ours), len(theirs)) else {}


def _by_beginning(ours: Mapping[str, TensorSpec], theirs: Mapping[str, TensorSpec], total: int) -> dict[str, str]:
    """Pairs whose names begin otherwise, all in one way: where that is most of both models."""
    there = _alike(theirs)
    ways: dict[tuple[str, str], None] = {}
    for key, names in _alike(ours).items():
        ways.update(dict.fromkeys(_beginnings(names[0], other) for other in there.get(key, ())[:_MOST]))
        if len(ways) > _MOST:
            break
    for old, new in list(ways)[:_MOST]:
        if _TOWER.search(old) and _TOWER.search(new):
            continue  # two of the kinds that models have beside each other
        pairs = {n: new + n[len(old) :] for n in ours if n.startswith(old)}
        pairs = {a: b for a, b in pairs.items() if b in theirs and theirs[b].shape == ours[a].shape}
        if 2 * len(pairs) > total:
            return pairs
    return {}


#: what leads to a part that has others of its kind beside it
_TOWER = re.compile(r"(text|vision|visual|image|audio|speech|video|encoder|decoder|query|passage|student|teacher)")


def _beginnings(a: str, b: str) -> tuple[str, str]:
    """What two names begin with, without what they end with alike."""
    left, right = a.split("."), b.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return "".join(f"{w}." for w in left), "".join(f"{w}." for w in right)
