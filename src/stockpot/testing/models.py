"""Small models on disk and in memory, made of numpy alone, with tensors large enough that the engine cuts them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from stockpot.checkpoints.codecs import decode_into, encode_into
from stockpot.checkpoints.header import encode_header
from stockpot.specs import BY_LABEL, TensorSpec

__all__ = ["CUT", "DEGENERATE", "WHOLE", "read_model", "state", "write_model"]

#: several pieces, rows longer than a piece, one dimension, small ones, layers
CUT: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (530, 1000),
    "model.layers.0.mlp.weight": (1, 540_000),
    "model.layers.1.mlp.weight": (1, 540_000),
    "model.layers.0.norm.weight": (97,),
    "model.layers.1.norm.weight": (97,),
    "model.flat": (600_001,),
    "model.norm.weight": (97,),
} | {f"model.layers.{i}.tiny.{j}.weight": (7, 5) for i in range(2) for j in range(9)}
#: for methods on whole tensors, whose work grows faster than these
WHOLE: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (90, 40),
    "model.layers.0.mlp.weight": (120, 75),
    "model.layers.1.mlp.weight": (75, 120),
    "model.layers.0.experts.up": (3, 40, 30),
    "model.conv.weight": (6, 4, 3, 3),
    "model.norm.weight": (97,),
}
DEGENERATE: dict[str, tuple[int, ...]] = {"one": (1,), "scalar": (), "empty": (0, 4), "row": (1, 3), "column": (5, 1)}


def state(shapes: Mapping[str, tuple[int, ...]], seed: int, scale: float = 0.02) -> dict[str, Any]:
    """{name: float64 numpy}."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) * scale for name, shape in shapes.items()}


def write_model(
    folder: str, tensors: Mapping[str, Any], dtype: str = "BF16", *, adapter: Mapping[str, Any] | None = None
) -> str:
    """A safetensors model of numpy arrays, each rounded to dtype; with `adapter`, its adapter_config.json, an adapter of PEFT's.

    Returns the folder.
    """
    os.makedirs(folder, exist_ok=True)
    kind = BY_LABEL[dtype]
    entries: dict[str, tuple[TensorSpec, int]] = {}
    blobs = []
    at = 0
    for name, value in tensors.items():
        array = np.ascontiguousarray(value, np.float64)
        spec = TensorSpec(kind, array.shape)
        raw = bytearray(spec.nbytes)
        encode_into(array.reshape(-1), kind, memoryview(raw))
        entries[name] = (spec, at)
        at += spec.nbytes
        blobs.append(bytes(raw))
    stem = "model" if adapter is None else "adapter_model"
    with open(os.path.join(folder, f"{stem}.safetensors"), "wb") as f:
        f.write(encode_header(entries, {"format": "pt"}))
        f.writelines(blobs)
    layers = {int(n.split(".")[2]) for n in tensors if n.startswith("model.layers.")}
    config = {"model_type": "llama", "num_hidden_layers": len(layers), "tie_word_embeddings": False}
    name = "config.json" if adapter is None else "adapter_config.json"
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(config if adapter is None else dict(adapter), f)
    return folder


def read_model(folder: str) -> dict[str, Any]:
    """{name: float64 numpy} of every tensor."""
    from stockpot.checkpoints.opening import open_checkpoint
    from stockpot.checkpoints.source import ReadRequest

    checkpoint = open_checkpoint(folder)
    out = {}
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        raw = bytearray(spec.nbytes)
        checkpoint.read([ReadRequest(name, 0, spec.numel)], memoryview(raw))
        values = np.empty(spec.numel, np.float64)
        if spec.numel:
            decode_into(memoryview(raw), spec.dtype, values)
        out[name] = values.reshape(spec.shape)
    checkpoint.close()
    return out
