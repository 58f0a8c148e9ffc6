"""What a sweep found, with its uncertainty: the rows of the leaderboard, the winner, how it compares on the report split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.evaluation.scores import Scores
from stockpot.evaluation.statistics import Difference, Interval, bootstrap_score, paired_difference, suite_score
from stockpot.evaluation.suite import Suite
from stockpot.search.candidates import Tried

__all__ = ["Row", "SweepResult", "make_result"]

#: candidates that are there to compare with: they can't win
REFERENCE_STAGES = ("reference", "single")


@dataclass(frozen=True)
class Row:
    """One candidate. `selection` and `report` are the suite's score with its interval on either split; None where not scored.

    metrics   slice -> metric's value, on the selection split
    against   name of what it is compared with ("final", "last_merging", "uniform") -> difference on the selection split
    error     why a score is missing
    """

    tried: Tried
    digest: str | None
    selection: Interval | None
    report: Interval | None
    metrics: Mapping[str, float]
    report_metrics: Mapping[str, float]
    against: Mapping[str, Difference]
    seconds_made: float | None
    seconds_scored: float
    error: str | None = None

    @property
    def name(self) -> str:
        return self.tried.name

    @property
    def is_reference(self) -> bool:
        return self.tried.stage in REFERENCE_STAGES

    def to_dict(self) -> dict[str, Any]:
        t = self.tried
        return {
            "name": t.name, "stage": t.stage, "settings": dict(t.settings), "weights": {str(k): v for k, v in t.weights.items()},
            "recipe": dict(t.recipe), "digest": self.digest,
            "selection": _interval(self.selection), "report": _interval(self.report),
            "metrics": dict(self.metrics), "report_metrics": dict(self.report_metrics),
            "against": {k: d.to_dict() for k, d in self.against.items()},
            "seconds_made": self.seconds_made, "seconds_scored": self.seconds_scored, "error": self.error,
        }  # fmt: skip


def _interval(i: Interval | None) -> dict[str, Any] | None:
    return None if i is None else {"value": i.value, "low": i.low, "high": i.high}


@dataclass(frozen=True)
class SweepResult:
    """Rows in the order tried; `ranking` is the names of the merges that were scored, the best first (selection split).

    final_comparison  on the report split: the winner minus each reference, by the reference's name
    conclusion        in words: what to ship, and how sure that is
    """

    suite: Suite
    what: str
    rows: tuple[Row, ...]
    ranking: tuple[str, ...]
    winner: str | None
    final_comparison: Mapping[str, Difference]
    conclusion: tuple[str, ...]
    notes: tuple[str, ...] = ()
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    evaluations: int = 0
    reused: int = 0

    def row(self, name: str) -> Row:
        return next(r for r in self.rows if r.name == name)

    def leaderboard(self) -> list[Row]:
        """Everything that was scored, references included, the best first; then what failed."""
        sign = 1 if self.suite.direction == "max" else -1
        scored = [r for r in self.rows if r.selection is not None]
        scored.sort(key=lambda r: -sign * r.selection.value if r.selection else 0.0)
        return scored + [r for r in self.rows if r.selection is None]

    def to_dict(self) -> dict[str, Any]:
        return {
            "suite": self.suite.name, "what": self.what, "direction": self.suite.direction,
            "slices": [{"name": s.name, "kind": s.kind, "metric": s.metric, "direction": s.direction, "weight": s.weight}
                       for s in self.suite.slices],
            "winner": self.winner, "ranking": list(self.ranking), "conclusion": list(self.conclusion), "notes": list(self.notes),
            "final_comparison": {k: d.to_dict() for k, d in self.final_comparison.items()},
            "candidates": [r.to_dict() for r in self.rows],
            "evaluations": self.evaluations, "reused": self.reused,
        }  # fmt: skip


Known = Mapping[str, Mapping[str, Scores]]


def goodness(suite: Suite, scores: Mapping[str, Scores]) -> float | None:
    """The suite's score, signed so that more is better."""
    value = suite_score(suite, scores)
    return None if value is None else value * (1 if suite.direction == "max" else -1)


def references_of(tried: Sequence[Tried], good: Mapping[str, float], winner: str | None) -> dict[str, str]:
    """What the winner is compared with: label -> candidate. The uniform soup is that of the same snapshots where there is one."""
    names = {t.name: t for t in tried}
    out: dict[str, str] = {label: label for label in ("final", "last_merging", "base") if label in names}
    if winner is not None:
        own = names[winner]
        soups = [
            t
            for t in tried
            if t.settings.get("by") == "uniform" and t.stage in ("uniform", "interval") and t.name in good
        ]
        same = [t for t in soups if set(t.weights) == set(own.weights)]
        best = max(soups, key=lambda t: good[t.name], default=None)
        uniform = same[0] if same else best
        if uniform is not None and uniform.name != winner:
            out["uniform"] = uniform.name
    return out


def make_result(
    suite: Suite,
    what: str,
    known: Sequence[tuple[Tried, str | None, float | None, str | None]],
    selection: Known,
    report: Known,
    errors: Mapping[str, str],
    **facts: Any,
) -> SweepResult:
    """Rows, winner and words from the scores of each candidate, by its name, on either split."""
    tried = [t for t, _, _, _ in known]
    good = {t.name: g for t in tried if (g := goodness(suite, selection.get(t.name, {}))) is not None}
    merges = [t for t in tried if t.name in good and t.stage not in REFERENCE_STAGES]
    ranking = [t.name for t in sorted(merges, key=lambda t: -good[t.name])]
    winner = ranking[0] if ranking else None
    labels = references_of(tried, good, winner)
    rows = []
    for t, digest, seconds, error in known:
        own, own_report = selection.get(t.name, {}), report.get(t.name, {})
        complete = t.name in good
        against = {
            label: paired_difference(suite, own, selection[name], draws=2000)
            for label, name in labels.items()
            if complete and name != t.name and name in good
        }
        rows.append(
            Row(
                t, digest, bootstrap_score(suite, own) if complete else None,
                bootstrap_score(suite, own_report) if goodness(suite, own_report) is not None else None,
                {n: s[suite.slice(n).metric] for n, s in own.items()},
                {n: s[suite.slice(n).metric] for n, s in own_report.items()},
                against, seconds, sum(s.seconds for s in (*own.values(), *own_report.values())),
                errors.get(t.name) if complete else error or errors.get(t.name) or "was not scored",
            )
        )  # fmt: skip
    comparison = {}
    if winner is not None and goodness(suite, report.get(winner, {})) is not None:
        for label, name in labels.items():
            if goodness(suite, report.get(name, {})) is not None:
                comparison[label] = paired_difference(suite, report[winner], report[name])
    failed = errors.get(winner) if winner is not None else None
    words = _conclusion(winner, labels, comparison, failed=failed, has_report=bool(report))
    return SweepResult(suite, what, tuple(rows), tuple(ranking), winner, comparison, words, **facts)


_LABELS = {"final": "the final checkpoint", "last_merging": "the last merging checkpoint", "base": "the base",
           "uniform": "its uniform soup"}  # fmt: skip


def label_text(label: str) -> str:
    """In words what a reference is."""
    return _LABELS.get(label, label)


def _conclusion(
    winner: str | None,
    labels: Mapping[str, str],
    comparison: Mapping[str, Difference],
    *,
    failed: str | None,
    has_report: bool,
) -> tuple[str, ...]:
    """Plain sentences; a difference within noise is called that."""
    if winner is None:
        return ("No merge could be scored.",)
    lines = [f"Best on the selection data: {winner}."]
    if failed is not None:
        return (*lines, f"It could not be scored on the report data: {failed}.")
    if not comparison:
        lines.append(
            "It was not scored on data of its own: give the suite a report split before you publish a number. What a search "
            "chose by looks better on that data than it is."
            if not has_report
            else "There is nothing to compare it with on the report data."
        )
        return tuple(lines)
    for label, d in comparison.items():
        who = label_text(label) + (f" ({labels[label]})" if label == "uniform" else "")
        lines.append(f"On the report data against {who}: {sentence(d)}.")
    final = comparison.get("final")
    if final is not None:
        if final.verdict == "better":
            lines.append(f"Ship {winner}: it beats the final checkpoint on data that it was not chosen by.")
        elif final.verdict == "worse":
            lines.append(
                "Ship the final checkpoint: the best merge is worse than it on data that it was not chosen by."
            )
        else:
            lines.append(
                "Whether the merge or the final checkpoint is better can't be told from this data: within noise."
            )
    return tuple(lines)


def sentence(d: Difference) -> str:
    """A difference in words."""
    if d.verdict == "same":
        return "the same on every example"
    if d.low is None or d.high is None:
        return f"{d.value:+.4g} (more is better), how sure is not known: an evaluator gives no single examples"
    span = f"{d.value:+.4g} (more is better), 95 % interval {d.low:+.4g} to {d.high:+.4g}"
    return {"better": f"better by {span}", "worse": f"worse: {span}"}.get(d.verdict, f"within noise: {span}")
