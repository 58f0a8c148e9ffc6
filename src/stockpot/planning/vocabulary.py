"""Whether the models' tokenizers agree. Rows of embeddings are combined by position, which is right only if they do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from stockpot.checkpoints.meaning.roles import is_vocabulary
from stockpot.checkpoints.views import first_rows
from stockpot.errors import MismatchError, StockpotError
from stockpot.planning.plan import ModelInput, TensorPlan
from stockpot.recipes.schema import Recipe
from stockpot.specs import Shape

__all__ = ["check_vocabularies", "crop_vocabularies"]

_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
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
    where any such rows are, a note where none are, or the recipe says that they may be.

    rows: how many are kept of every vocabulary; None: all
    """
    mixed = {o.model for t in tensors if is_vocabulary(t.name) and len(t.inputs) > 1 for o in t.inputs}
    own = _tokens_of(inputs[donor].checkpoint.directory) if len(inputs) > 1 else None
    for model in inputs:
        if model.index == donor or own is None:
            continue
        theirs = _tokens_of(model.checkpoint.directory)
        if theirs is None or theirs == own:
            continue
        moved = _moved(own, theirs, rows)
        if recipe.tokenizer_from == "union":
            problems.append(
                MismatchError(
                    f"{model.ref}: its tokens are not those of {inputs[donor].ref}, and a union of tokenizers is a coming "
                    "feature of stockpot; 'tokenizer_source: base' copies the base's"
                ).within(*model.places)
            )
        elif moved and recipe.tokenizer_from is not None:
            text = f"{model.ref}: {moved} in {inputs[donor].ref}, and rows of embeddings are combined by position"
            problems.append(MismatchError(f"{text}; rearranging them by token is a coming feature of stockpot"))
        elif moved and model.index in mixed and recipe.vocab != "by_position":
            text = (
                f"{model.ref}: {moved} in {inputs[donor].ref}, so that rows of embeddings can't be combined by position"
            )
            problems.append(MismatchError(f"{text}: {_WAY_OUT}").within(*model.places))
        elif moved and model.index in mixed:
            notes.append(
                f"{model.ref}: {moved} in {inputs[donor].ref}; rows are combined by position, as the recipe says"
            )
        elif model.index in mixed:
            more = len(theirs.keys() - own.keys())
            less = len(own.keys() - theirs.keys())
            notes.append(
                f"{model.ref}: {more} of its tokens are none of {inputs[donor].ref}, which has {less} of its own; the others "
                "have the same rows, and rows are combined by position"
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


def _moved(own: Mapping[str, int], theirs: Mapping[str, int], rows: int | None) -> str:
    """A token that has another row, in words; nothing where all that both have are at the same place, and no row is that of two
    tokens.
    """
    kept = {t: i for t, i in own.items() if rows is None or i < rows}
    there = {t: i for t, i in theirs.items() if rows is None or i < rows}
    for token, row in there.items():
        if kept.get(token, row) != row:
            return f"token {token!r} is row {row}, but row {kept[token]}"
    by_row = {i: t for t, i in kept.items()}
    for token, row in there.items():
        if by_row.get(row, token) != token:
            return f"row {row} is that of {token!r}, but of {by_row[row]!r}"
    return ""


def _tokens_of(directory: str) -> dict[str, int] | None:
    """Token -> row of the first tokenizer file that says so; None where there is none, or none that can be understood."""
    for name in _FILES:
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            continue
        with open(path, "rb") as f:
            raw = f.read()
        found = _READERS[os.path.splitext(name)[1] if name != "vocab.json" else name](raw)
        if found is not None:
            return found | _added(directory)
    return None


def _added(directory: str) -> dict[str, int]:
    try:
        with open(os.path.join(directory, "added_tokens.json"), encoding="utf-8") as f:
            found = json.load(f)
        return {str(t): int(i) for t, i in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _of_json(raw: bytes) -> dict[str, int] | None:
    try:
        doc = json.loads(raw)
        vocabulary = doc["model"]["vocab"]
        pairs = dict(vocabulary) if isinstance(vocabulary, dict) else {v[0]: i for i, v in enumerate(vocabulary)}
        return pairs | {t["content"]: t["id"] for t in doc.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def _of_mapping(raw: bytes) -> dict[str, int] | None:
    try:
        return {str(t): int(i) for t, i in json.loads(raw).items()}
    except (ValueError, TypeError, AttributeError):
        return None


def _of_lines(raw: bytes) -> dict[str, int] | None:
    return {line: i for i, line in enumerate(raw.decode("utf-8", "replace").splitlines())}


def _of_sentencepiece(raw: bytes) -> dict[str, int] | None:
    """The pieces of a sentencepiece model: its field 1, repeated, each with the text as its own field 1."""
    out: dict[str, int] = {}
    try:
        for field, value in _fields(raw):
            if field == 1 and isinstance(value, bytes):
                text = next(v for f, v in _fields(value) if f == 1 and isinstance(v, bytes))
                out[text.decode("utf-8", "replace")] = len(out)
    except (IndexError, ValueError, StopIteration):
        return None
    return out or None


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protocol buffer. Raises IndexError or ValueError for what is none."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(raw):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind) or number()
            if at + size > len(raw):
                raise ValueError("cut short")
            yield key >> 3, raw[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {kind}")


_READERS: Mapping[str, Callable[[bytes], dict[str, int] | None]] = {
    ".json": _of_json, "vocab.json": _of_mapping, ".txt": _of_lines, ".model": _of_sentencepiece,
}  # fmt: skip
