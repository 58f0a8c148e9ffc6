"""What kind of thing a tensor is, from its name and shape: what `applies=` of a method speaks of."""

from __future__ import annotations

from stockpot.checkpoints.meaning.ties import is_embedding, is_head
from stockpot.specs import Shape

__all__ = ["is_vocabulary", "role_of"]

_ROWS = ("lm_head.bias", "predictions.bias", "final_logits_bias", "/input_embeddings", "/output_embeddings")
_TABLES = ("embeddings.weight", "embedding.weight", "wte.weight", "wpe.weight", "embed_positions.weight")


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token: embeddings, output heads and their biases."""
    return is_embedding(name) or is_head(name) or name.endswith(_ROWS)


def role_of(name: str, shape: Shape) -> str:
    """ "matrix", "convolution", "embedding" (tables of tokens or positions, output heads), "vector" (scalars too) or "stack"
    (matrices of experts along a first axis).
    """
    if len(shape) < 2:
        return "vector"
    if len(shape) == 2:
        return "embedding" if is_vocabulary(name) or name.endswith(_TABLES) else "matrix"
    packed = len(shape) == 3 and any(word in name.lower() for word in ("expert", "moe"))
    return "stack" if packed else "convolution"
