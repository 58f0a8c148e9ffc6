"""What a method may ask for beside the elements in hand: statistics over more of the model, and keyed random draws.

Imports numpy where numbers are touched, not before: declarations cost nothing.
"""

from stockpot.statistics.base import EXTENTS, Extent, Known, Statistic
from stockpot.statistics.draws import Draw, Mask, Normal, Uniform
from stockpot.statistics.extremes import Extremes
from stockpot.statistics.rank import Quantile, Rank, kept_count, magnitude32
from stockpot.statistics.sums import Gram, L1Norms, SignSum, Total

__all__ = [
    "EXTENTS", "Draw", "Extent", "Extremes", "Gram", "Known", "L1Norms", "Mask", "Normal", "Quantile", "Rank", "SignSum",
    "Statistic", "Total", "Uniform", "kept_count", "magnitude32",
]  # fmt: skip
