"""Scoring one checkpoint on a suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stockpot.errors import ArgumentError, SuiteError
from stockpot.evaluation.parts import open_parts
from stockpot.evaluation.pool import Task, WorkerPool, as_it_is, score_all
from stockpot.evaluation.scores import Scores
from stockpot.evaluation.statistics import Interval, bootstrap_score, suite_score
from stockpot.evaluation.suite import SPLITS, Suite, is_device, load_suite

__all__ = ["Evaluation", "ScoringShown", "SuiteLike", "evaluate", "opened_suite"]

SuiteLike = str | os.PathLike[str] | Suite
#: told as it happens: (checkpoint, slice, examples done, examples in all)
ScoringShown = Callable[[str, str, int, int], None]


def opened_suite(suite: SuiteLike, *, base: str | None = None, device: str | None = None) -> Suite:
    """A suite with what the command line said in place of its own."""
    found = suite if isinstance(suite, Suite) else load_suite(suite)
    if base is not None:
        found = replace(found, base=os.path.abspath(base) if os.path.exists(base) else base)
    if device is not None and not is_device(device):
        raise ArgumentError(f"device: expected cpu, cuda, cuda:N or mps, got {device!r}")
    return replace(found, device=device) if device is not None else found


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint. `score` is the suite's, None where a slice that counts has no data in these splits."""

    checkpoint: str
    suite: Suite
    scores: Mapping[tuple[str, str], Scores]
    score: Interval | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "suite": self.suite.name,
            "score": None
            if self.score is None
            else {"value": self.score.value, "low": self.score.low, "high": self.score.high},
            "direction": self.suite.direction,
            "slices": [
                {"name": name, "split": split, "metrics": dict(s), "examples": s.n, "seconds": round(s.seconds, 3)}
                for (name, split), s in self.scores.items()
            ],
        }


def evaluate(
    checkpoint: str | os.PathLike[str], suite: SuiteLike, *, split: str | None = None, base: str | None = None,
    device: str | None = None, shown: ScoringShown | None = None,
) -> Evaluation:  # fmt: skip
    """Score a checkpoint: a model, or an adapter on its base.

    split  "selection", "report" or "all"; None: report where the suite has report data, else selection
    base   the model that an adapter is loaded onto, in place of the suite's or the one that its config names

    Raises StockpotError: SuiteError for the suite and its data, EvaluationError for what scoring came to.
    """
    if split not in (None, "all", *SPLITS):
        raise ArgumentError(f"split: expected selection, report or all, got {split!r}")
    opened = opened_suite(suite, base=base, device=device)
    open_parts(opened, light=True)
    ref = os.fspath(checkpoint)
    with WorkerPool(opened) as pool:
        there = {i.split for i in pool.infos}
        wanted = list(SPLITS) if split == "all" else [split or ("report" if "report" in there else "selection")]
        if not there & set(wanted):
            raise SuiteError(f"{opened.path}: no slice has data of split {wanted[0]}")
        found = score_all(pool, [Task(ref, as_it_is(ref))], [i for i in pool.infos if i.split in wanted], shown)[ref]
    score = None
    if len(wanted) == 1:
        by_slice = {name: s for (name, _), s in found.items()}
        score = bootstrap_score(opened, by_slice) if suite_score(opened, by_slice) is not None else None
    return Evaluation(ref, opened, found, score)
