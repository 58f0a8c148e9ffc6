"""Quantised checkpoints: recognised, and refused with the way out."""

from __future__ import annotations

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.errors import CheckpointError

__all__ = ["loadable"]


def loadable(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with real numbers for weights. Raises CheckpointError for kinds of quantisation that can't be undone."""
    quantised = checkpoint.config.get("quantization_config")
    if isinstance(quantised, dict):
        kind = quantised.get("quant_method", "unknown method")
        raise CheckpointError(
            f"{checkpoint.ref}: weights are quantised ({kind}), averaging their codes would be meaningless; "
            "dequantise the model and merge that"
        )
    return checkpoint
