"""Where tensors come from and go to."""

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.memory import MemorySource
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.checkpoints.source import ReadRequest, TensorSource

__all__ = ["Checkpoint", "MemorySource", "ReadRequest", "TensorSource", "open_checkpoint"]
