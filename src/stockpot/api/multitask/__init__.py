"""One multi-task checkpoint and a bit for every weight and task, from which each task's model comes back (TALL masks, EMR)."""

from stockpot.api.multitask.making import MaskReport, TaskReport, make_masks
from stockpot.api.multitask.restoring import open_task, restore_task

__all__ = ["MaskReport", "TaskReport", "make_masks", "open_task", "restore_task"]
