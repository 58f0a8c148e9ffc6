"""A run and a SoupSpec as a recipe: what is merged, recorded, and shown for copying."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from stockpot.runs.run import Run
from stockpot.runs.spec import SoupSpec

__all__ = ["recipe_of"]


def recipe_of(
    run: Run,
    spec: SoupSpec,
    *,
    adapter: str | None = None,
    rank: int | None = None,
    base: str | os.PathLike[str] | None = None,
    part: str | None = None,
) -> dict[str, Any]:
    """The recipe of a soup, as a mapping; adapter, rank, base and part as for api.soup."""
    options: dict[str, Any] = {"path": run.path}
    if run.pattern is not None:
        options["snapshots"] = run.pattern
    if run.metrics_file is not None:
        options["metrics"] = run.metrics_file
    for key, value in spec.given().items():
        options[key] = list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
    if part is not None:
        options["part"] = part
    recipe: dict[str, Any] = {"merge_method": "linear", "run": options}
    if adapter is not None or rank is not None or base is not None:
        recipe["adapter"] = {"mode": "factors" if adapter is None else adapter}
        recipe["adapter"] |= {"rank": rank} if rank is not None else {}
        recipe["adapter"] |= {"base": os.fspath(base)} if base is not None else {}
    return recipe
