"""stockpot merges trained checkpoints into one better checkpoint.

    import stockpot
    stockpot.merge("recipe.yml", "out")            # or a dict, or YAML text
    stockpot.plan("recipe.yml").notes              # what would happen, from headers alone
    stockpot.open_checkpoint("model").names()
    stockpot.soup("output_dir", "soup", stockpot.SoupSpec(last=10, by="loss", penalty=0.7))
    stockpot.evaluate("soup", "suite.yml").score           # and sweep, gate, path, report
    stockpot.methods.ties([a, b], base=c, density=0.2)     # state dicts in memory

Importing it imports neither torch nor transformers nor numpy; names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stockpot.version import __version__

if TYPE_CHECKING:
    from stockpot import methods
    from stockpot.api import MergeResult, Options, inspect, merge, plan, soup, soup_recipe, verify
    from stockpot.checkpoints import Checkpoint, open_checkpoint, views
    from stockpot.errors import StockpotError
    from stockpot.evidence import Evaluation, Sweep, evaluate, gate, path, report, sweep
    from stockpot.planning import Plan
    from stockpot.recipes import Recipe, load_recipe
    from stockpot.runs import Run, Snapshot, Soup, SoupSpec, metric_weights, open_run, parse_name, resolve_soup
    from stockpot.search import SweepOptions

_WHERE = {
    "Checkpoint": "stockpot.checkpoints",
    "Evaluation": "stockpot.evidence",
    "MergeResult": "stockpot.api",
    "Options": "stockpot.api",
    "Plan": "stockpot.planning",
    "Recipe": "stockpot.recipes",
    "Run": "stockpot.runs",
    "Snapshot": "stockpot.runs",
    "Soup": "stockpot.runs",
    "SoupSpec": "stockpot.runs",
    "StockpotError": "stockpot.errors",
    "Sweep": "stockpot.evidence",
    "SweepOptions": "stockpot.search",
    "evaluate": "stockpot.evidence",
    "gate": "stockpot.evidence",
    "inspect": "stockpot.api",
    "load_recipe": "stockpot.recipes",
    "merge": "stockpot.api",
    "methods": "stockpot.methods",
    "metric_weights": "stockpot.runs",
    "open_checkpoint": "stockpot.checkpoints",
    "open_run": "stockpot.runs",
    "parse_name": "stockpot.runs",
    "path": "stockpot.evidence",
    "plan": "stockpot.api",
    "report": "stockpot.evidence",
    "resolve_soup": "stockpot.runs",
    "soup": "stockpot.api",
    "soup_recipe": "stockpot.api",
    "sweep": "stockpot.evidence",
    "verify": "stockpot.api",
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
    "__version__",
    "evaluate",
    "gate",
    "inspect",
    "load_recipe",
    "merge",
    "methods",
    "metric_weights",
    "open_checkpoint",
    "open_run",
    "parse_name",
    "path",
    "plan",
    "report",
    "resolve_soup",
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


def __dir__() -> list[str]:
    return __all__
