"""Functions that do the work of numpy code faster, to the same bytes.

The compiled kernels put themselves here when they are loaded. Who has the numpy code looks for one by name, and goes on without.

    pick   statistics.order.pick
    tally  statistics.order.tally
    elect  methods.ties.disjoint_merge, of contiguous float32 or float64
    prune  methods.pruned: one delta's rows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["FASTER"]

FASTER: dict[str, Callable[..., Any]] = {}
