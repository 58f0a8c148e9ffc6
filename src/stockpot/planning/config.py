"""The output's config.json: the donor's, with dtype, layer count and ties brought up to date."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from stockpot.specs import DType

__all__ = ["output_config"]

_COUNTS = (
    "num_hidden_layers n_layer n_layers num_layers num_decoder_layers decoder_layers encoder_layers depth"
).split()


def output_config(
    config: Mapping[str, Any],
    *,
    dtype: DType | None,
    layers: Sequence[int] | None,
    old_layers: int,
    untied: bool,
    vocabulary: int | None,
) -> dict[str, Any]:
    """A changed copy.

    dtype       what every float tensor was written in, None where they differ
    layers      for each output layer the donor's layer it came from; None when the recipe has no slices
    old_layers  the donor's number of layers
    vocabulary  rows that embeddings were cut to, or None
    untied      an output head was written that the donor's config declares tied
    """
    out = copy.deepcopy(dict(config))
    parts = [out] + [out[key] for key in ("text_config", "llm_config", "decoder") if isinstance(out.get(key), dict)]
    if dtype is not None and out:
        for key in ("dtype", "torch_dtype"):
            if key in out:
                out[key] = dtype.array
        if "dtype" not in out and "torch_dtype" not in out:
            out["torch_dtype"] = dtype.array
    for part in parts:
        if vocabulary is not None and isinstance(part.get("vocab_size"), int):
            part["vocab_size"] = vocabulary
    if untied:
        for part in parts:
            if part is out or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    if layers is not None:
        for part in parts:
            _set_layers(part, layers, old_layers)
    return out


def _set_layers(part: dict[str, Any], layers: Sequence[int], old: int) -> None:
    for key in _COUNTS:
        if part.get(key) == old:
            part[key] = len(layers)
    for key, value in part.items():
        # one entry for each layer: layer_types of Qwen and Gemma, attention_layers of GPT-Neo
        if isinstance(value, list) and len(value) == old and ("layer" in key or "block" in key):
            part[key] = [value[i] for i in layers]
