"""Layers of every decoder of the installed transformers that can be made tiny, taken apart and put together otherwise: the config
follows them, or the merge is refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny

TYPES = tiny.causal_types()
#: what a type's config can't say, or what stands outside of its layers
REFUSED = {
    "deepseek_v3": "first_k_dense_replace", "hrm_text": "several stacks",
    "gemma4_text": "has an entry for each layer", "inkling2_text": "has an entry for each layer",
    "modernbert-decoder": "whose tensors are not those of layer", "rwkv": "whose tensors are not those of layer",
    "zaya": "whose tensors are not those of layer", "gpt_neox_japanese": "whose tensors are not those of layer",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TYPES))
def test_the_config_follows(tmp_path: Path, name: str) -> None:
    cls, config = TYPES[name]
    try:
        model = tiny.tiny(cls, config)
        model.save_pretrained(tmp_path / "a")
    except Exception as e:
        pytest.skip(f"can't be made tiny: {type(e).__name__}: {str(e)[:100]}")
    for taken, ranges in tiny.TAKEN.items():
        wrong = tiny.wrong_with_layers(cls, tmp_path, model.config, ranges)
        if wrong.startswith("refused: "):
            assert name in REFUSED, f"{taken}: {wrong}"
            assert REFUSED[name] in wrong
        else:
            assert not wrong, taken
