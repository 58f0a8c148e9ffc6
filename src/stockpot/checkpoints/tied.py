"""Tied weights: one matrix under two names (input embedding and output head), read once and written once.

transformers stores a tied pair under one name, other tools under both. What is tied is known from the config
(`tie_word_embeddings`), never guessed from values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stockpot.specs import TensorSpec

__all__ = ["head_alias", "is_embedding", "is_head", "tied_duplicates", "ties_embeddings"]

_HEADS = ("lm_head.weight", "embed_out.weight", "output_projection.weight", "cls.predictions.decoder.weight",
          "lm_head.decoder.weight", "vocab_projector.weight")  # fmt: skip
_EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
               "tok_embeddings.weight", "tok_embed.weight", "embedding.weight")  # fmt: skip
#: second names of an encoder-decoder's shared embedding, tied whatever `tie_word_embeddings` says
_SHARED_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def ties_embeddings(config: Mapping[str, Any]) -> bool | None:
    """The config's word on it: True, False, or None when it is silent."""
    for part in (config, config.get("text_config"), config.get("decoder")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def is_head(name: str) -> bool:
    """Whether a name is that of an output head which may be tied to the embedding."""
    return any(name == h or name.endswith("." + h) for h in _HEADS)


def is_embedding(name: str) -> bool:
    """Whether a name is that of an embedding of tokens."""
    return any(name == e or name.endswith("." + e) for e in (*_EMBEDDINGS, *_SHARED_COPIES))


def _embedding_for(spec: TensorSpec | None, specs: Mapping[str, TensorSpec]) -> str | None:
    for suffix in _EMBEDDINGS:
        for name in specs:
            if (name == suffix or name.endswith("." + suffix)) and (spec is None or specs[name].shape == spec.shape):
                return name
    return None


def tied_duplicates(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> dict[str, str]:
    """Stored second names of tied tensors -> the name that counts."""
    out = {}
    tied = ties_embeddings(config) is True
    for name, spec in specs.items():
        if tied and is_head(name):
            embedding = _embedding_for(spec, specs)
            if embedding:
                out[name] = embedding
        for suffix in _SHARED_COPIES:
            if name == suffix or name.endswith("." + suffix):
                shared = name[: len(name) - len(suffix)] + "shared.weight"
                if shared in specs and specs[shared].shape == spec.shape:
                    out[name] = shared
    return out


def head_alias(name: str, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> str | None:
    """The stored embedding that the absent head `name` stands for, or None. A config that unties forbids it."""
    if not is_head(name) or ties_embeddings(config) is False:
        return None
    return _embedding_for(None, specs)
