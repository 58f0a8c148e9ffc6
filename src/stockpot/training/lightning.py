"""A callback for PyTorch Lightning (`lightning` or `pytorch_lightning`, whichever is in use)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from stockpot.errors import ArgumentError
from stockpot.runs import SoupSpec
from stockpot.training.average import Held, SnapshotAverage, checked_every, swapped

__all__ = ["MergingCallback"]

if TYPE_CHECKING:

    class _Callback:
        pass

else:
    _NAMES = ("lightning.pytorch", "pytorch_lightning")

    def _callback_class() -> type:
        for name in sorted(_NAMES, key=lambda n: n not in sys.modules):
            try:
                return importlib.import_module(name).Callback
            except ImportError:
                continue
        raise ImportError("stockpot.training.lightning needs lightning or pytorch_lightning")

    _Callback = _callback_class()


class MergingCallback(_Callback):
    """Keeps the metrics-weighted average (arXiv 2504.18580) of the last k snapshots beside the model that trains.

    every     optimiser steps between snapshots
    spec      how many and how weighted; by default the last 10 by `loss` with penalty 0.7. The metric is what the module
              logs under that name (`self.log("loss", ...)`), as it stands when the snapshot is taken
    evaluate  a function from module to metrics, called with the average after each validation; its results go to the
              logger as `merged_*` and into `history`
    save      put the average into each .ckpt as `merged_state_dict`, for `load_state_dict(..., strict=False)`

    The snapshots are part of the callback's state, so that a resumed run goes on with them: each .ckpt grows by `last`
    copies of the trainable parameters.
    """

    def __init__(
        self,
        every: int,
        spec: SoupSpec | None = None,
        *,
        evaluate: Callable[[Any], Mapping[str, float]] | None = None,
        save: bool = True,
    ) -> None:
        super().__init__()
        self.every = checked_every(every)
        self.snapshots = SnapshotAverage(spec)
        if self.snapshots.spec.smooth != 1:
            raise ArgumentError(
                "smooth: the metric is taken as it stands when a snapshot is; log a smoothed one instead"
            )
        self.evaluate = evaluate
        self.save = save
        self.history: list[dict[str, float]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        strategy = type(trainer.strategy).__name__
        if "FSDP" in strategy or "DeepSpeed" in strategy:
            raise ArgumentError(
                f"MergingCallback keeps whole parameters; {strategy} shards them, which is not supported"
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        newest = self.snapshots.held[-1].step if self.snapshots.held else 0
        if step % self.every or step == newest or step == 0:
            return
        metric = None
        by = self.snapshots.spec.by
        if by in ("step", "steps"):
            metric = float(step)
        elif by is not None and by in trainer.callback_metrics:
            metric = float(trainer.callback_metrics[by])
        self.snapshots.add(step, pl_module, metric)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        average = self.snapshots.average()
        if self.evaluate is None or trainer.sanity_checking or average is None:
            return
        was_training = pl_module.training
        with swapped(pl_module, average), torch.no_grad():
            pl_module.eval()
            found = {f"merged_{k}": float(v) for k, v in self.evaluate(pl_module).items()}
        pl_module.train(was_training)
        self.history.append({"step": float(trainer.global_step), **found})
        if trainer.logger is not None:
            trainer.logger.log_metrics(found, step=trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        average = self.snapshots.average()
        if self.save and average is not None:
            checkpoint["merged_state_dict"] = average

    def state_dict(self) -> dict[str, Any]:
        held = [{"step": h.step, "metric": h.metric, "tensors": h.tensors} for h in self.snapshots.held]
        return {"snapshots": held, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.snapshots.held = [Held(h["step"], h["tensors"], h["metric"]) for h in state_dict["snapshots"]]
        self.history = list(state_dict["history"])
