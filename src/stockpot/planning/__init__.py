"""Recipe + headers -> plan."""

from stockpot.planning.plan import Plan
from stockpot.planning.planner import build_plan

__all__ = ["Plan", "build_plan"]
