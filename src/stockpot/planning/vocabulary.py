"""Whether the models' tokenizers agree. Rows of embeddings are combined by position, which is right only if they do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from stockpot.errors import MismatchError, StockpotError
from stockpot.planning.plan import ModelInput
from stockpot.recipes.schema import Recipe

__all__ = ["check_vocabularies"]

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
