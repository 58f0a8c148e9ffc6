"""Searching merges: candidates by stage, scored through a pool of workers, remembered in SQLite."""

from stockpot.search.grid import parse_grid
from stockpot.search.options import STAGES, SweepOptions
from stockpot.search.path import PathResult, interpolation_path
from stockpot.search.result import Row, SweepResult
from stockpot.search.sweep import run_sweep

__all__ = [
    "STAGES",
    "PathResult",
    "Row",
    "SweepOptions",
    "SweepResult",
    "interpolation_path",
    "parse_grid",
    "run_sweep",
]
