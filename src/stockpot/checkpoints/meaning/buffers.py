"""Tensors that some files of a model hold and others don't, because they are computed anew: they are no weights."""

from __future__ import annotations

import re

from stockpot.specs import TensorSpec

__all__ = ["is_computed"]

_COMPUTED = re.compile(
    r"(^|.*\.)(\w*inv_freq|position_ids|relative_position_index|masked_bias|embed_scale|_float_tensor|_extra_state|"
    r"causal_mask|cos_cached|sin_cached|EncDecAttention\.relative_attention_bias\.weight|encoder\.version|decoder\.version|"
    r"n_averaged|embeddings\.token_type_ids)"
)
_MASK = re.compile(r"(^|.*\.)(attn|attention|self_attn|self)\.bias")


def is_computed(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor is one that models make as they are built: position ids, rotary frequencies, causal masks, and the
    relative bias that T5 keeps for its cross-attention and never uses.
    """
    if _COMPUTED.fullmatch(name):
        return True
    # a causal mask [1, 1, n, n] under a name that elsewhere is a bias
    shape = spec.shape
    return bool(_MASK.fullmatch(name)) and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
