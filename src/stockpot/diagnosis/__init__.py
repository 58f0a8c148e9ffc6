"""What can be known of models before they are merged, from one pass over their weights: measures, and what they speak for."""

from stockpot.diagnosis.findings import THRESHOLDS, Advice, Finding, judge
from stockpot.diagnosis.measuring import Diagnosis, Measured, measure

__all__ = ["THRESHOLDS", "Advice", "Diagnosis", "Finding", "Measured", "judge", "measure"]
