"""Scoring checkpoints: suites, evaluators, paired statistics, release gates."""

from stockpot.evaluation.gates import GateOutcome, Verdict
from stockpot.evaluation.scores import Evaluator, Scores
from stockpot.evaluation.suite import Gate, Slice, Suite, load_suite

__all__ = ["Evaluator", "Gate", "GateOutcome", "Scores", "Slice", "Suite", "Verdict", "load_suite"]
