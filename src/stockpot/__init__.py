"""stockpot merges trained checkpoints into one better checkpoint.

    import stockpot
    stockpot.merge("recipe.yml", "out")            # or a dict, or YAML text
    stockpot.plan("recipe.yml").notes              # what would happen, from headers alone
    stockpot.open_checkpoint("model").names()
    stockpot.soup("output_dir", "soup", stockpot.SoupSpec(last=10, by="loss", penalty=0.7))
    stockpot.evaluate("soup", "suite.yml").score           # and sweep, gate, path, report
    stockpot.merge_modules([a, b], "ties", base=c, density=0.2)    # modules of torch in memory

Importing it imports neither torch nor transformers nor numpy; names are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stockpot.api import __all__ as _OFFERED
from stockpot.version import __version__

if TYPE_CHECKING:
    from stockpot.api import *  # noqa: F403

__all__ = [*_OFFERED, "__version__"]


def __getattr__(name: str) -> Any:
    from stockpot import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
