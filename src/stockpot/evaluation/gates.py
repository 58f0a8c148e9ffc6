"""Release gates: conditions that a checkpoint must meet. Regressions are decided with the uncertainty of the difference; `min`
and `max` by the value itself, from enough examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.evaluation.scores import Scores
from stockpot.evaluation.statistics import paired_difference, suite_score
from stockpot.evaluation.suite import Gate, Suite

__all__ = ["GateOutcome", "Verdict", "judge", "needed_references"]

BEST_PARENT = "best_parent"
SliceScores = Mapping[str, Scores]


@dataclass(frozen=True)
class GateOutcome:
    """status  "pass", "fail", or "inconclusive" (too few examples, or an interval that reaches beyond the margin)"""

    gate: Gate
    status: str
    why: str
    value: float | None = None
    reference: float | None = None

    @property
    def blocks(self) -> bool:
        """Whether it stands against a release."""
        return self.gate.severity == "critical" and self.status != "pass"

    def to_dict(self) -> dict[str, Any]:
        return {
            "gate": self.gate.describe(), "slice": self.gate.slice, "severity": self.gate.severity, "status": self.status,
            "why": self.why, "value": self.value, "reference": self.reference,
        }  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What all gates of a suite say of one checkpoint."""

    outcomes: tuple[GateOutcome, ...]
    suite: str = ""
    forced: bool = False

    @property
    def passed(self) -> bool:
        return not any(o.blocks for o in self.outcomes)

    @property
    def failing(self) -> tuple[GateOutcome, ...]:
        return tuple(o for o in self.outcomes if o.blocks)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the lineage."""
        return {
            "passed": self.passed, **({"forced": True} if self.forced and not self.passed else {}), "suite_sha256": self.suite,
            "gates": [o.to_dict() for o in self.outcomes],
        }  # fmt: skip


def needed_references(suite: Suite) -> list[str]:
    """Which checkpoints the gates compare with: "base", "best_parent", paths."""
    return list(dict.fromkeys(g.reference for g in suite.gates if g.reference is not None))


def judge(suite: Suite, scores: SliceScores, references: Mapping[str, Sequence[SliceScores]]) -> Verdict:
    """Decide every gate.

    references  what each reference of the gates scored: one entry, for "best_parent" one for each parent

    A regression passes where the lower bound of the 95 % interval of (checkpoint minus reference) is not below minus the
    margin (non-inferiority, paired on examples); it fails where the difference itself is; else it is inconclusive.
    """
    return Verdict(tuple(_decide(suite, g, scores, references) for g in suite.gates), suite.digest)


def _decide(
    suite: Suite, gate: Gate, scores: SliceScores, references: Mapping[str, Sequence[SliceScores]]
) -> GateOutcome:
    value, n = _value(suite, gate, scores)
    if n < gate.min_examples:
        return GateOutcome(gate, "inconclusive", _too_few(n, gate), value)
    if gate.reference is None:
        bound, ok = (gate.low, value >= gate.low) if gate.low is not None else (gate.high, value <= (gate.high or 0.0))
        relation = "at least" if gate.low is not None else "at most"
        return GateOutcome(gate, "pass" if ok else "fail", f"{value:.6g}, {relation} {bound:.6g} is asked", value)
    found = references.get(gate.reference) or ()
    if not found:
        return GateOutcome(gate, "inconclusive", f"{gate.reference} was not scored", value)
    other = max(found, key=lambda s: _signed(suite, gate, s))
    reference, others = _value(suite, gate, other)
    assert gate.max_drop is not None
    margin = gate.max_drop * (abs(reference) / 100 if gate.percent else 1.0)
    difference = paired_difference(suite, scores, other, only=None if gate.slice == "score" else gate.slice)
    against = f"{gate.reference} has {reference:.6g}, this {value:.6g}"
    if difference.low is None:
        if gate.min_examples:
            why = f"{against}; no scores of the same examples tell how sure that is (min_examples: 0 takes it so)"
            return GateOutcome(gate, "inconclusive", why, value, reference)
        return GateOutcome(gate, "pass" if difference.value >= -margin else "fail", against, value, reference)
    if others < gate.min_examples:
        return GateOutcome(gate, "inconclusive", f"{gate.reference}: {_too_few(others, gate)}", value, reference)
    span = f"difference {difference.value:+.4g}, 95 % from {difference.low:+.4g} to {difference.high:+.4g} (more is better)"
    if difference.low >= -margin:
        return GateOutcome(gate, "pass", f"{against}; {span}", value, reference)
    if difference.value < -margin:
        return GateOutcome(gate, "fail", f"{against}; {span}; {margin:.4g} is allowed", value, reference)
    why = f"{against}; {span}: within {margin:.4g}, but too few examples to be sure of it"
    return GateOutcome(gate, "inconclusive", why, value, reference)


def _too_few(n: int, gate: Gate) -> str:
    known = f"{n} examples" if n else "how many examples there are is not known"
    return f"{known}, {gate.min_examples} are needed" + ("" if n else " (min_examples: 0 takes the value as it is)")


def _value(suite: Suite, gate: Gate, scores: SliceScores) -> tuple[float, int]:
    """(the metric or the score, how many examples the smallest slice in it has)."""
    if gate.slice != "score":
        return scores[gate.slice][suite.slice(gate.slice).metric], scores[gate.slice].n
    value = suite_score(suite, scores)
    assert value is not None
    return value, min(scores[s.name].n for s in suite.slices if s.weight)


def _signed(suite: Suite, gate: Gate, scores: SliceScores) -> float:
    direction = suite.direction if gate.slice == "score" else suite.slice(gate.slice).direction
    return _value(suite, gate, scores)[0] * (1 if direction == "max" else -1)
