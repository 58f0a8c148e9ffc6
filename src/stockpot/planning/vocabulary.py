"""Whether the models' tokenizers agree. Rows of embeddings are combined by position, which is right only if they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stockpot.checkpoints.meaning.roles import is_vocabulary
from stockpot.checkpoints.tokens import compared, highest
from stockpot.checkpoints.views import first_rows
from stockpot.errors import MismatchError, StockpotError
from stockpot.planning.plan import ModelInput, TensorPlan
from stockpot.recipes.schema import Recipe
from stockpot.specs import Shape

__all__ = ["check_vocabularies", "crop_vocabularies"]

_WAY_OUT = (
    "leave them out (exclude: the embeddings and the head, which are then the first's), or say that the rows mean the same "
    "(vocab: by_position); rearranging them by token is a coming feature of stockpot"
)


def check_vocabularies(
    inputs: Sequence[ModelInput],
    donor: int,
    recipe: Recipe,
    tensors: Sequence[TensorPlan],
    rows: int | None,
    problems: list[StockpotError],
    notes: list[str],
) -> None:
    """Models whose tokenizers map tokens to other rows than the donor's can't have their rows combined by position: a problem
    where any such rows are, a note where they are and the recipe says that they may be.

    rows: how many are kept of every vocabulary; None: all
    """
    mixed = {o.model for t in tensors if is_vocabulary(t.name) and len(t.inputs) > 1 for o in t.inputs}
    for model in inputs:
        if model.index == donor or model.index not in mixed:
            continue
        found = compared(inputs[donor].checkpoint.directory, model.checkpoint.directory, rows)
        if found is None:
            continue
        there = f"{model.ref}: {found.why} in {inputs[donor].ref}"
        why = None
        if recipe.vocab == "by_position":
            notes.append(f"{there}; rows are combined by position, as the recipe says")
        elif recipe.tokenizer_from == "union":
            why = f"{there}, and a union of tokenizers is a coming feature of stockpot: {_WAY_OUT}"
        elif found.moved:
            why = f"{there}, so that rows of embeddings can't be combined by position: {_WAY_OUT}"
        else:
            notes.append(f"{there}; rows are combined by position")
        if why is not None:
            problems.append(MismatchError(why).within(*model.places))


def check_cut_off(
    inputs: Sequence[ModelInput], tokenizer: int, rows: int, recipe: Recipe, problems: list[StockpotError]
) -> None:
    """A tokenizer may give no token whose row was cut off."""
    last = highest(inputs[tokenizer].checkpoint.directory)
    if last is None or last[1] < rows:
        return
    fits = [
        m.ref
        for m in inputs
        if m.role == "model" and (own := highest(m.checkpoint.directory)) is not None and own[1] < rows
    ]
    way = f"take another one's: tokenizer_source: {fits[0]}" if fits else "take those tokens out of it first"
    problems.append(
        MismatchError(
            f"vocab: crop: the tokenizer of {inputs[tokenizer].ref} gives {last[0]!r} row {last[1]}, and {rows} rows are kept; "
            f"{way}"
        ).within(*inputs[tokenizer].places)
    )


def crop_vocabularies(
    inputs: list[ModelInput], donor: int, problems: list[StockpotError], notes: list[str]
) -> tuple[int, int] | None:
    """`vocab: crop`: read all inputs through views with only the rows of tokens that every model has: (how many the donor had,
    how many these are). None after a problem.
    """
    held: dict[int, dict[str, int]] = {m.index: {} for m in inputs}
    widths: dict[str, set[Shape]] = {}
    for m in inputs:
        for name in filter(is_vocabulary, m.checkpoint.names()):
            shape = m.checkpoint.spec(name).shape
            if shape:
                held[m.index][name] = shape[0]
                widths.setdefault(name, set()).add(shape[1:])
    rows = {n for m in inputs if m.role == "model" for n in held[m.index].values()}
    if not rows or min(rows) == 0:
        problems.append(MismatchError("vocab: crop: there are no rows that all models have"))
        return None
    least = min(rows)
    if len(rows) > 1:
        notes.append(
            f"vocab: crop: embeddings of up to {max(rows)} tokens are cut to the {least} that all models have; "
            "the tokenizer must give no others"
        )
    for model in inputs:
        # what differs in more than rows is left as it is, to be reported so
        longer = {name: least for name, n in held[model.index].items() if n > least and len(widths[name]) == 1}
        if longer:
            inputs[model.index] = replace(model, checkpoint=first_rows(model.checkpoint, longer))
    return max(held[donor].values(), default=least), least
