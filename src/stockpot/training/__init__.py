"""While training: callbacks that keep a metrics-weighted average of the last snapshots beside the live model.

from stockpot.training import MergingCallback                  # transformers' Trainer
from stockpot.training.lightning import MergingCallback        # PyTorch Lightning
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stockpot.training.average import SnapshotAverage
    from stockpot.training.transformers import MergingCallback

__all__ = ["MergingCallback", "SnapshotAverage"]

_WHERE = {"MergingCallback": "transformers", "SnapshotAverage": "average"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'stockpot.training' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"stockpot.training.{_WHERE[name]}"), name)
