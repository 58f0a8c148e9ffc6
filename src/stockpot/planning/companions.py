"""Checkpoints that lie beside models: which are wanted, and which of their tensors go with which operand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stockpot.errors import MismatchError, RecipeError, StockpotError, nearest
from stockpot.methods.declaration import Method
from stockpot.planning.matching import Section
from stockpot.planning.plan import ModelInput, Operand
from stockpot.recipes.schema import ModelEntry, Recipe, Source

__all__ = ["check_companions", "companion_operands"]


def check_companions(
    recipe: Recipe, used: Sequence[Method], parts: Sequence[Section], inputs: Sequence[ModelInput],
    participants: Callable[[Method, Section], Sequence[int]], problems: list[StockpotError],
) -> None:  # fmt: skip
    """Every model needs those of its methods, and none that no method asks for. participants: entries, -1 for no entry."""
    wanted = {c.name: c for m in used for c in m.companions}
    entries: list[ModelEntry | Source] = [*recipe.models]
    entries += [s for piece in recipe.slices for s in piece.sources]
    for entry in entries:
        for name, given in entry.companions.items():
            if name not in wanted:
                label = " and ".join(sorted({m.name for m in used}))
                known = f"it takes {', '.join(wanted)}" if wanted else "it takes none"
                problems.append(
                    RecipeError(f"companions: {label} has no use for {name!r}; {known}{nearest(name, wanted)}").within(
                        recipe.at(given.line)
                    )
                )
    for method in used:
        for companion in method.companions:
            for part in parts:
                for i in participants(method, part):
                    if i < 0 or companion.name in part.entries[i].companions:
                        continue
                    model = inputs[part.entries[i].model]
                    problems.append(
                        RecipeError(
                            f"{model.ref}: {method.name} needs {companion.name} of every model ({companion.about}): give "
                            f"'companions: {{{companion.name}: CHECKPOINT}}' beside it"
                        ).within(*model.places)
                    )


def companion_operands(
    method: Method, part: Section, chosen: Sequence[int], operands: Sequence[Operand], inputs: Sequence[ModelInput],
    problems: list[StockpotError],
) -> tuple[Operand, ...] | None:  # fmt: skip
    """The companions of an output tensor's operands, as TensorPlan orders them; None after a problem.

    chosen: the entry of each operand.
    """
    out = []
    for companion in method.companions:
        for i, operand in zip(chosen, operands, strict=True):
            model = inputs[part.entries[i].companions[companion.name]]
            why = None
            if operand.name not in model.checkpoint:  # no stand-in: a head's Fisher is not its embedding's
                hint = nearest(operand.name, model.checkpoint.names())
                why = f"has no tensor {operand.name!r}, which {inputs[operand.model].ref} has{hint}"
            else:
                spec, wanted = model.checkpoint.spec(operand.name), inputs[operand.model].checkpoint.spec(operand.name)
                if spec.shape != wanted.shape or not spec.dtype.is_float:
                    expected = f"expected floats {list(wanted.shape)} as in the model"
                    why = f"{operand.name!r} is {spec.dtype} {list(spec.shape)}, {expected}"
            if why is not None:
                problems.append(MismatchError(f"{model.ref}: {why}").within(*model.places))
                return None
            out.append(Operand(model.index, operand.name, operand.position))
    return tuple(out)
