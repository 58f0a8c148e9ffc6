"""stockpot merges trained checkpoints into one better checkpoint.

    import stockpot
    stockpot.merge("recipe.yml", "out")            # or a dict, or YAML text
    stockpot.plan("recipe.yml").notes              # what would happen, from headers alone
    stockpot.open_checkpoint("model").names()
    stockpot.methods.ties([a, b], base=c, density=0.2)     # state dicts in memory

Importing it imports neither torch nor transformers nor numpy; names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stockpot import methods
    from stockpot.api import MergeResult, Options, inspect, merge, plan, verify
    from stockpot.checkpoints import Checkpoint, open_checkpoint
    from stockpot.errors import StockpotError
    from stockpot.planning import Plan
    from stockpot.recipes import Recipe, load_recipe

_WHERE = {
    "Checkpoint": "stockpot.checkpoints",
    "MergeResult": "stockpot.api",
    "Options": "stockpot.api",
    "Plan": "stockpot.planning",
    "Recipe": "stockpot.recipes",
    "StockpotError": "stockpot.errors",
    "inspect": "stockpot.api",
    "load_recipe": "stockpot.recipes",
    "merge": "stockpot.api",
    "methods": "stockpot.methods",
    "open_checkpoint": "stockpot.checkpoints",
    "plan": "stockpot.api",
    "verify": "stockpot.api",
}

__all__ = [
    "Checkpoint",
    "MergeResult",
    "Options",
    "Plan",
    "Recipe",
    "StockpotError",
    "__version__",
    "inspect",
    "load_recipe",
    "merge",
    "methods",
    "open_checkpoint",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'stockpot' has no attribute {name!r}")
    module = importlib.import_module(where)
    return module if where == f"stockpot.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
