"""A suite's slices, opened: for each slice and split an evaluator, with the digest that its scores are filed under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stockpot.errors import SuiteError
from stockpot.evaluation.documents import check_apart, in_selection, read_documents
from stockpot.evaluation.external import CommandEvaluator, PythonEvaluator
from stockpot.evaluation.harness import HarnessEvaluator
from stockpot.evaluation.scores import Progress
from stockpot.evaluation.suite import SPLITS, Slice, Suite
from stockpot.evaluation.text import ChoiceEvaluator, GenerationEvaluator, LossEvaluator

__all__ = ["Part", "PartInfo", "infos", "open_parts"]

#: raised when scores of an unchanged suite would come out different
SCORING_VERSION = 1


class OpenedEvaluator(Protocol):
    """What the evaluators of this package offer besides scoring."""

    @property
    def ids(self) -> tuple[str, ...]: ...

    def identity(self) -> Any: ...

    def score(self, checkpoint: Any, progress: Progress | None = None) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class PartInfo:
    """One slice on one split, as plain data. `key` changes when what is scored changes, and only then."""

    slice: str
    split: str
    key: str
    n: int
    ids: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.slice} ({self.split})"


@dataclass(frozen=True)
class Part:
    """One slice on one split, with what scores it."""

    slice: Slice
    split: str
    evaluator: OpenedEvaluator

    def info(self, suite: Suite) -> PartInfo:
        facts = [
            SCORING_VERSION,
            self.slice.kind,
            self.evaluator.identity(),
            suite.dtype,
            suite.device.split(":")[0],
            suite.tokenizer,
        ]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return PartInfo(self.slice.name, self.split, key, len(self.evaluator.ids), self.evaluator.ids)


def open_parts(suite: Suite, *, light: bool = False) -> list[Part]:
    """Every slice and split of a suite, data read and checked. Raises SuiteError.

    light: without those that need the harness or the user's own module; enough to find mistakes in data at once.
    """
    parts: list[Part] = []
    for part in suite.slices:
        if light and part.kind in ("harness", "python"):
            continue
        parts += _parts(part, suite)
    ids = {split: {p.slice.name: p.evaluator.ids for p in parts if p.split == split} for split in SPLITS}
    check_apart(ids["selection"], ids["report"], suite)
    return parts


def _parts(part: Slice, suite: Suite) -> list[Part]:
    splits = [part.split] if part.split != "auto" else list(SPLITS)
    if part.kind == "command":
        return [Part(part, s, CommandEvaluator(part, suite, s)) for s in splits]
    if part.kind == "python":
        return [Part(part, s, PythonEvaluator(part, suite, s)) for s in splits]
    whole: Any
    if part.kind == "harness":
        whole = HarnessEvaluator(part, suite)
    else:
        documents = tuple(read_documents(part, suite))
        made = {"exact_match": GenerationEvaluator, "choice": ChoiceEvaluator}.get(part.kind, LossEvaluator)
        whole = made(part, suite, documents)
    if part.split != "auto":
        return [Part(part, part.split, whole)]
    chosen = {i for i in whole.ids if in_selection(i, suite.selection_share)}
    out = []
    for split, ids in (("selection", chosen), ("report", set(whole.ids) - chosen)):
        if not ids:
            raise SuiteError(
                f"{suite.path}:{part.line}: slice {part.name!r}: too few different documents ({len(set(whole.ids))}) to divide "
                "between selection and report; give more, or say split: selection"
            )
        out.append(Part(part, split, whole.only(ids)))
    return out


def infos(parts: Sequence[Part], suite: Suite) -> list[PartInfo]:
    """All of them as plain data."""
    return [p.info(suite) for p in parts]
