"""What is fuzzed: each target takes bytes that began as a real file and may raise nothing but a StockpotError.

Used by tests/test_hostile.py (hypothesis, bounded) and benchmarks/fuzz.py (atheris, as long as you like).
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.journal import Journal
from stockpot.engine.ledger import Ledger
from stockpot.engine.pieces import Pieces
from stockpot.errors import StockpotError
from stockpot.planning.plan import Action, Operand, TensorPlan
from stockpot.recipes import parse_recipe
from stockpot.specs import DType, TensorSpec

#: bytes that a reader may take beside twenty times the file's own size
_ALLOWANCE = 16 * 2**20

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.zeros(0, 2, dtype=torch.int32),
}


def _read_all(checkpoint: Checkpoint) -> None:
    """Whatever a header promised must be readable, or refused."""
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        checkpoint.read([ReadRequest(name, 0, spec.numel)], memoryview(bytearray(spec.nbytes)))
    checkpoint.close()


def _with_file(name: str, data: bytes, others: dict[str, bytes] | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for other, content in (others or {}).items():
            Path(folder, other).write_bytes(content)
        Path(folder, name).write_bytes(data)
        _read_all(open_checkpoint(os.path.join(folder, name) if not others else folder))


def _torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": dict(TENSORS), "global_step": 3}, buffer)
    return buffer.getvalue()


INDEX = json.dumps(
    {"metadata": {"total_size": 58}, "weight_map": dict.fromkeys(TENSORS, "model-00001-of-00001.safetensors")}
).encode()

RECIPE = b"""merge_method: ties
base_model: base
slices:
- sources:
  - {model: a, layer_range: [0, 4], parameters: {weight: [0.1, {filter: mlp, value: 0.3}]}}
parameters: {density: 0.5, t: [{filter: self_attn, value: [0, 1.0]}, {value: 0.5}]}
rules: [{match: '*norm*', merge_method: linear}]
dtype: bfloat16
common: &x {a: 1}
<<: *x
"""


def _ledger() -> Ledger:
    """Of two tensors, one of several pieces, of two inputs each."""
    shapes = ((4, 4), (3, 700_000))
    operands = (Operand(0, "w"), Operand(1, "w"))
    plans = [
        TensorPlan(i, "w", TensorSpec(DType.BF16, s), Action.MERGE, 0, operands, None) for i, s in enumerate(shapes)
    ]
    return Ledger(Pieces(plans), 2)


def _lines(ledger: Ledger) -> bytes:
    rows = [ledger.encode(np.array(r)) for r in ([0], [2, 1, 5])]
    head = {"stockpot_journal": 3, "plan": "p"}
    return "".join(json.dumps(row) + "\n" for row in (head, rows[0], rows[1] | {"warnings": ["a warning"]})).encode()


JOURNAL = _lines(_ledger())


def _journal(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "stockpot.journal")
        Path(path).write_bytes(data)
        ledger = _ledger()
        journal = Journal(path, "p", ledger, lambda: None)
        try:
            journal.open()
        finally:
            journal.unlock()
        for rows, found in journal.found:
            ledger.take_over(rows, found, np.arange(len(rows)))
        if data == JOURNAL:
            assert [r.tolist() for r, _ in journal.found] == [[0], [2, 1, 5]]
            assert journal.warnings == ["a warning"]


def _recipe(data: bytes) -> None:
    parse_recipe(data.decode("utf-8", errors="replace"))


#: name -> (a real file to begin from, what reads it)
TARGETS: dict[str, tuple[bytes, Callable[[bytes], None]]] = {
    "header": (save(TENSORS, {"format": "pt"}), lambda data: _with_file("m.safetensors", data)),
    "index": (
        INDEX,
        lambda data: _with_file(
            "model.safetensors.index.json", data, {"model-00001-of-00001.safetensors": save(TENSORS)}
        ),
    ),
    "torch zip": (_torch_file(), lambda data: _with_file("m.pt", data)),
    "recipe": (RECIPE, _recipe),
    "journal": (JOURNAL, _journal),
}


def attack(name: str, data: bytes) -> None:
    """Run a target. Anything but a clean result or a StockpotError with a message, or too much memory, is a failure."""
    said = "nothing"
    tracemalloc.start()
    try:
        TARGETS[name][1](data)
    except StockpotError as e:
        said = str(e)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert said, "an error without a message"
    assert peak < _ALLOWANCE + 20 * len(data), f"{peak} bytes allocated for a file of {len(data)}"
