"""Release gates for checkpoints that are there, and for merges before they are published."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from stockpot.api.measuring import ScoringShown, SuiteLike, opened_suite
from stockpot.errors import CheckpointError, GateError, SuiteError, VerificationError
from stockpot.evaluation.gates import BEST_PARENT, GateOutcome, Verdict, judge, needed_references
from stockpot.evaluation.parts import open_parts
from stockpot.evaluation.pool import Task, WorkerPool, as_it_is, score_all
from stockpot.evaluation.suite import Suite
from stockpot.lineage import NAME, read_lineage, record_verdict
from stockpot.recipes.parsing import load_recipe

__all__ = ["ReleaseCheck", "check_verdict", "decide", "gate", "lineage_of", "release_check"]


def gate(
    out: str | os.PathLike[str], suite: SuiteLike, *, base: str | None = None, device: str | None = None, force: bool = False,
    shown: ScoringShown | None = None,
) -> Verdict:  # fmt: skip
    """Decide the suite's gates for a checkpoint, and write the verdict into its lineage and model card where it has them.

    Raises GateError where a critical gate is not passed, unless `force`; the verdict is written either way.
    """
    opened = opened_suite(suite, base=base, device=device)
    verdict = decide(os.fspath(out), opened, shown, force=force)
    if os.path.isfile(os.path.join(out, NAME)):
        record_verdict(os.fspath(out), verdict.to_dict())
    check_verdict(verdict, os.fspath(out), force=force, publishes=False)
    return verdict


def release_check(
    suite: SuiteLike, *, base: str | None = None, device: str | None = None, force: bool = False,
    shown: ScoringShown | None = None,
    told: Callable[[Verdict], None] | None = None,
) -> ReleaseCheck:  # fmt: skip
    """What merge_planned calls with the finished directory before it publishes it: raises GateError to keep it from that."""
    opened = opened_suite(suite, base=base, device=device)
    if not opened.gates:
        raise SuiteError(f"{opened.path}: has no gates to decide a release by")
    open_parts(opened, light=True)
    return ReleaseCheck(opened, shown, told, force)


@dataclass(frozen=True)
class ReleaseCheck:
    """Called with a finished directory; files: what it reads besides."""

    suite: Suite
    shown: ScoringShown | None
    told: Callable[[Verdict], None] | None
    force: bool

    @property
    def files(self) -> tuple[str, ...]:
        return (self.suite.path,) if os.path.isfile(self.suite.path) else ()

    def __call__(self, partial: str) -> None:
        verdict = decide(partial, self.suite, self.shown, force=self.force)
        record_verdict(partial, verdict.to_dict())
        if self.told is not None:
            self.told(verdict)
        check_verdict(verdict, partial, force=self.force, publishes=True)


def check_verdict(verdict: Verdict, what: str, *, force: bool, publishes: bool) -> None:
    """Raise GateError where a critical gate is not passed; publishes: whether something would be published else."""
    if verdict.passed or force:
        return
    lines = "\n".join(f"  - slice {o.gate.slice!r}: {o.status}: {o.gate.describe()}: {o.why}" for o in verdict.failing)
    many = "s" if len(verdict.failing) > 1 else ""
    way_out = "\n--force publishes it all the same, and says so in its lineage" if publishes else ""
    raise GateError(f"{what}: {len(verdict.failing)} critical gate{many} not passed:\n{lines}{way_out}")


def decide(out: str, suite: Suite, shown: ScoringShown | None = None, *, force: bool = False) -> Verdict:
    """Score the checkpoint and everything that its gates compare it with."""
    if not suite.gates:
        raise SuiteError(f"{suite.path}: has no gates")
    tasks = {out: Task(out, as_it_is(out))}
    names: dict[str, list[str]] = {}
    for reference in needed_references(suite):
        found = _reference_tasks(reference, out, suite)
        names[reference] = [t.name for t in found]
        tasks |= {t.name: t for t in found if t.name not in tasks}
    with WorkerPool(suite) as pool:
        # report data, and selection data for a slice that has nothing else
        reported = {i.slice for i in pool.infos if i.split == "report"}
        wanted = [i for i in pool.infos if i.split == "report" or i.slice not in reported]
        scored = score_all(pool, list(tasks.values()), wanted, shown)
    by_name = {name: {part: scores for (part, _), scores in parts.items()} for name, parts in scored.items()}
    references = {reference: [by_name[n] for n in found] for reference, found in names.items()}
    verdict = judge(suite, by_name[out], references)
    chosen_by = {i.slice for i in wanted if i.split == "selection"}
    return replace(verdict, forced=force, outcomes=tuple(_with_split(o, suite, chosen_by) for o in verdict.outcomes))


def _with_split(outcome: GateOutcome, suite: Suite, chosen_by: set[str]) -> GateOutcome:
    """Say it where a gate was decided on data that may have been chosen by."""
    names = {s.name for s in suite.slices if s.weight} if outcome.gate.slice == "score" else {outcome.gate.slice}
    return replace(outcome, why=f"{outcome.why} (on selection data)") if names & chosen_by else outcome


def _reference_tasks(reference: str, out: str, suite: Suite) -> list[Task]:
    """What a gate's reference stands for. Raises SuiteError where that is not known."""
    if reference == "base":
        return [_base_task(out, suite)]
    if reference == BEST_PARENT:
        parents = _parents(out)
        if not parents:
            raise SuiteError(
                f"{out}: its lineage names no parents for reference: best_parent; name a checkpoint instead"
            )
        gone = [p for p in parents if not os.path.exists(p)]
        if gone:
            raise SuiteError(
                f"{out}: reference: best_parent: {gone[0]} is not there any more; the others alone may not hold the best"
            )
        return [Task(p, as_it_is(p)) for p in parents]
    ref = suite.resolve(reference)
    return [Task(ref, as_it_is(ref))]


def lineage_of(out: str) -> dict[str, Any]:
    """The lineage of a directory; empty where it has none."""
    try:
        return read_lineage(out)[0]
    except (VerificationError, CheckpointError):
        return {}


def _parents(out: str) -> list[str]:
    """The checkpoints on disk that a merge was made from; the base is none of them."""
    paths = []
    for entry in lineage_of(out).get("inputs", ()):
        paths += [str(p.get("path")) for p in entry.get("parts", ())] or [str(entry.get("path"))]
    own = _own_base(out)
    return [p for p in dict.fromkeys(paths) if own is None or os.path.realpath(p) != os.path.realpath(own)]


def _own_base(out: str) -> str | None:
    """The base_model of the recipe that `out` was made by, where it can be found."""
    text = lineage_of(out).get("recipe", {})
    try:
        named = load_recipe(str(text.get("text", "")) + "\n").base_model
    except Exception:
        return None
    if named is None:
        return None
    beside = os.path.join(os.path.dirname(str(text.get("file", ""))), named)
    return next((p for p in (named, beside) if os.path.exists(p)), None)


def _base_task(out: str, suite: Suite) -> Task:
    if os.path.exists(os.path.join(out, "adapter_config.json")):
        return Task("base", as_it_is(out), bare=True)
    given = suite.resolve(suite.base) if suite.base else _own_base(out)
    if given is None:
        raise SuiteError(f"{out}: reference: base: which model that is isn't known: give --base, or base in the suite")
    return Task(given, as_it_is(given))
