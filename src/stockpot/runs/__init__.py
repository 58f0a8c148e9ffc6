"""Training runs: snapshots and logged metrics in, chosen snapshots with weights out."""

from stockpot.runs.metrics import MetricLog, MetricValue
from stockpot.runs.naming import parse_name, soup_name
from stockpot.runs.opening import open_run
from stockpot.runs.recipe import recipe_of
from stockpot.runs.run import Run, Snapshot
from stockpot.runs.soup import Ingredient, Soup, resolve_soup, resolve_windows
from stockpot.runs.spec import SoupSpec
from stockpot.runs.weighting import metric_weights

__all__ = [
    "Ingredient",
    "MetricLog",
    "MetricValue",
    "Run",
    "Snapshot",
    "Soup",
    "SoupSpec",
    "metric_weights",
    "open_run",
    "parse_name",
    "recipe_of",
    "resolve_soup",
    "resolve_windows",
    "soup_name",
]
