"""Models whose files call the same tensors otherwise, under the names of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stockpot.checkpoints.meaning.dialects import Unified, unify
from stockpot.checkpoints.meaning.memory import without_wrappers
from stockpot.checkpoints.views import renamed
from stockpot.errors import MismatchError, StockpotError
from stockpot.planning.matching import Section
from stockpot.planning.plan import ModelInput

__all__ = ["unify_names"]


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
