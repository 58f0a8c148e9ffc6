"""Whether the models' tokenizers agree. Rows of embeddings are combined by position, which is right only if they do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stockpot.checkpoints.meaning.roles import is_vocabulary
from stockpot.checkpoints.views import first_rows
from stockpot.errors import MismatchError, StockpotError
from stockpot.planning.plan import ModelInput
from stockpot.recipes.schema import Recipe
from stockpot.specs import Shape

__all__ = ["check_vocabularies", "crop_vocabularies"]

_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def check_vocabularies(
    inputs: Sequence[ModelInput], donor: int, recipe: Recipe, problems: list[StockpotError], notes: list[str]
) -> None:
    """Report models whose token ids differ from the donor's: a note, or a problem when the recipe asks for a tokenizer.

    mergekit rearranges embeddings by token under `tokenizer_source`; that feature is still to come here.
    """
    for model in inputs:
        if model.index == donor:
            continue
        difference = _difference(inputs[donor].checkpoint.directory, model.checkpoint.directory)
        if not difference:
            continue
        text = f"{model.ref}: {difference} from {inputs[donor].ref}, and rows of embeddings are combined by position"
        if recipe.tokenizer_from is None:
            notes.append(text)
        else:
            problems.append(MismatchError(f"{text}; rearranging them by token is a coming feature of stockpot"))


def crop_vocabularies(inputs: list[ModelInput], problems: list[StockpotError], notes: list[str]) -> int | None:
    """`vocab: crop`: read all inputs through views with only the rows of tokens that every model has; how many these are.

    None after a problem.
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
    return least


def _difference(a: str, b: str) -> str | None:
    if a == b:
        return None
    for name in _FILES:
        one, two = os.path.join(a, name), os.path.join(b, name)
        if not (os.path.isfile(one) and os.path.isfile(two)):
            continue
        with open(one, "rb") as f, open(two, "rb") as g:
            left, right = f.read(), g.read()
        if left == right:
            return None
        if name != "tokenizer.json":
            return f"{name} differs"
        tokens = _tokens(left), _tokens(right)
        if tokens[0] is None or tokens[1] is None or tokens[0] == tokens[1]:
            return None
        return "token ids in tokenizer.json differ"
    return None


def _tokens(raw: bytes) -> Mapping[str, Any] | None:
    """Token -> id, added tokens included; None for a file that can't be understood."""
    try:
        doc = json.loads(raw)
        vocabulary = doc["model"]["vocab"]
        pairs = dict(vocabulary) if isinstance(vocabulary, dict) else {v[0]: i for i, v in enumerate(vocabulary)}
        return pairs | {t["content"]: t["id"] for t in doc.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, IndexError):
        return None
