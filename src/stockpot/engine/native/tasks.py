"""What a kernel is to do, as it is handed over: Task of kernels.c."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stockpot.methods.forms import Form
from stockpot.specs import DType

__all__ = ["CODES", "Block", "Task", "address", "formed", "task_of"]

CODES = {DType.BF16: 0, DType.F16: 1, DType.F32: 2, DType.F64: 3}
_DIVIDE = {"none": 0, "weight": 1, "count": 2}


class Task(ctypes.Structure):
    """Mirrors Task in kernels.c."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("m", ctypes.c_int32),
        ("base_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("elect", ctypes.c_int32),
        ("weighted_election", ctypes.c_int32),
        ("divide", ctypes.c_int32),
        ("zero_is_positive", ctypes.c_int32),
        ("trims", ctypes.c_int32),
        ("raws", ctypes.c_void_p),
        ("dtypes", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("cutoff", ctypes.c_void_p),
        ("ceiling", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("scale", ctypes.c_double),
        ("least", ctypes.c_double),
        ("spread", ctypes.c_float),
        ("selects", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Block:
    """n elements of every input as raw bytes. base: None, or (bytes, dtype); wide: computed in float64."""

    n: int
    raws: Sequence[Any]
    dtypes: Sequence[DType]
    base: tuple[Any, DType] | None
    wide: bool


def address(buffer: Any) -> int:
    if not len(buffer):
        return 0
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except TypeError:  # read-only: a view of it takes twenty times longer to make
        return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])


def task_of(models: int, form: Form | None) -> tuple[Task, list[Any]]:
    """A task without its data, and what must stay alive while it is used."""
    alive: list[Any] = []
    return formed(Task(m=models, scale=1.0), form, None, alive), alive


def formed(task: Task, form: Form | None, mask: Any, alive: list[Any]) -> Task:
    """The task with a form's arithmetic. alive: takes what must stay alive while it is used."""
    if form is None:
        return task

    def keep(values: Sequence[float], kind: Any) -> int:
        array = (kind * len(values))(*values)
        alive.append(array)
        return ctypes.addressof(array)

    task.weight = keep(form.weight, ctypes.c_double)
    task.scale = form.scale
    if form.cutoff is not None:
        task.trims, task.cutoff = 1, keep(form.cutoff, ctypes.c_float)
    if form.ceiling is not None:
        task.ceiling = keep(form.ceiling, ctypes.c_float)
    if form.factor is not None:
        task.factor = keep(form.factor, ctypes.c_double)
    if form.masked and mask is not None:
        alive.append(mask)
        task.mask = mask.ctypes.data
    if form.election is not None:
        task.elect = 1
        task.weighted_election = form.election.weighted
        task.divide = _DIVIDE[form.election.divide_by]
        task.zero_is_positive = form.election.zero_is_positive
        task.least = form.election.least
    if form.spread is not None:
        task.selects, task.spread = 1, form.spread
    return task
