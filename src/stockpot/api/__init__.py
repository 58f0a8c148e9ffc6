"""What Python users call, as `stockpot.NAME`: merging, soups, measuring, searching. A name is loaded when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stockpot import methods
    from stockpot.api.diagnosing import diagnose
    from stockpot.api.looking import inspect, verify
    from stockpot.api.measuring import Evaluation, evaluate
    from stockpot.api.merging import MergeResult, Options, merge, plan
    from stockpot.api.modules import merge_modules
    from stockpot.api.multitask import make_masks, open_task, restore_task
    from stockpot.api.pages import path, report
    from stockpot.api.release import gate
    from stockpot.api.searching import Sweep, sweep
    from stockpot.api.soups import soup, soup_recipe
    from stockpot.checkpoints import Checkpoint, open_checkpoint, views
    from stockpot.errors import StockpotError
    from stockpot.planning import Plan
    from stockpot.recipes import Recipe, load_recipe
    from stockpot.runs import Run, Snapshot, Soup, SoupSpec, metric_weights, open_run, parse_name, resolve_soup
    from stockpot.search import SweepOptions

_WHERE = {
    "Checkpoint": "stockpot.checkpoints",
    "Evaluation": "stockpot.api.measuring",
    "MergeResult": "stockpot.api.merging",
    "Options": "stockpot.api.merging",
    "Plan": "stockpot.planning",
    "Recipe": "stockpot.recipes",
    "Run": "stockpot.runs",
    "Snapshot": "stockpot.runs",
    "Soup": "stockpot.runs",
    "SoupSpec": "stockpot.runs",
    "StockpotError": "stockpot.errors",
    "Sweep": "stockpot.api.searching",
    "SweepOptions": "stockpot.search",
    "diagnose": "stockpot.api.diagnosing",
    "evaluate": "stockpot.api.measuring",
    "gate": "stockpot.api.release",
    "inspect": "stockpot.api.looking",
    "load_recipe": "stockpot.recipes",
    "make_masks": "stockpot.api.multitask",
    "merge": "stockpot.api.merging",
    "merge_modules": "stockpot.api.modules",
    "methods": "stockpot.methods",
    "metric_weights": "stockpot.runs",
    "open_checkpoint": "stockpot.checkpoints",
    "open_run": "stockpot.runs",
    "open_task": "stockpot.api.multitask",
    "parse_name": "stockpot.runs",
    "path": "stockpot.api.pages",
    "plan": "stockpot.api.merging",
    "report": "stockpot.api.pages",
    "resolve_soup": "stockpot.runs",
    "restore_task": "stockpot.api.multitask",
    "soup": "stockpot.api.soups",
    "soup_recipe": "stockpot.api.soups",
    "sweep": "stockpot.api.searching",
    "verify": "stockpot.api.looking",
    "views": "stockpot.checkpoints.views",
}

__all__ = [
    "Checkpoint",
    "Evaluation",
    "MergeResult",
    "Options",
    "Plan",
    "Recipe",
    "Run",
    "Snapshot",
    "Soup",
    "SoupSpec",
    "StockpotError",
    "Sweep",
    "SweepOptions",
    "diagnose",
    "evaluate",
    "gate",
    "inspect",
    "load_recipe",
    "make_masks",
    "merge",
    "merge_modules",
    "methods",
    "metric_weights",
    "open_checkpoint",
    "open_run",
    "open_task",
    "parse_name",
    "path",
    "plan",
    "report",
    "resolve_soup",
    "restore_task",
    "soup",
    "soup_recipe",
    "sweep",
    "verify",
    "views",
]


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'stockpot' has no attribute {name!r}")
    module = importlib.import_module(where)
    return module if where.rpartition(".")[2] == name else getattr(module, name)
