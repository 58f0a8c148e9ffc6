"""Measuring merges, from Python and for the command line: evaluate, sweep, gate, path, report."""

from stockpot.evidence.pages import path, report
from stockpot.evidence.release import check_verdict, gate, release_check
from stockpot.evidence.scoring import Evaluation, evaluate
from stockpot.evidence.sweeping import Sweep, sweep

__all__ = ["Evaluation", "Sweep", "check_verdict", "evaluate", "gate", "path", "release_check", "report", "sweep"]
