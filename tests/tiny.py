"""Tiny models of as many of transformers' types as can be made of their default configs with small numbers in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf

#: values for keys of configs, where a config has them as numbers
SMALL: dict[str, int] = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "hidden_dim": 32, "embed_dim": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32, "d_embed": 32, "attention_hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_ff": 48, "d_kv": 8, "dim_ff": 48, "ffn_hidden_size": 48, "mlp_dim": 48,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "num_decoder_layers": 4, "decoder_layers": 4,
    "encoder_layers": 4, "depth": 2, "num_blocks": 4, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8,
    "global_head_dim": 8, "swa_head_dim": 8, "kv_channels": 8, "attention_head_dim": 8, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "vocab_size": 96,
    "vocab_size_per_layer_input": 96, "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "n_ctx": 64,
    "max_sequence_length": 64, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4,
    "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "num_experts_per_token": 2,
    "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "index_head_dim": 8, "index_n_heads": 2,
    "index_topk": 8, "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_n_heads": 8,
    "mamba_d_head": 8, "mamba_head_dim": 8, "mamba_expand": 2, "mamba_n_groups": 1, "n_groups": 1, "chunk_size": 8,
    "mamba_chunk_size": 8, "time_step_rank": 4, "dt_rank": 4, "lru_width": 32, "conv_dim": 32, "sliding_window": 16,
    "attention_window_size": 16, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "image_size": 16, "patch_size": 8, "expert_ffn_hidden_size": 16, "ffn_hidden_dim": 48,
    "n_shared_experts": 1, "lightning_head_dim": 8, "rotary_dim": 4, "query_pre_attn_scalar": 8, "attn_lora_rank": 8,
    "o_lora_rank": 8, "o_groups": 1, "num_mem_heads": 4, "mamba_num_groups": 1, "mlp_hidden_size": 48, "projection_dim": 32,
    "num_memory_blocks": 1, "adapter_rank": 4, "num_mem_blocks": 1, "laurel_rank": 4, "altup_num_inputs": 2, "rank": 4,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_v_head_dim": 8, "num_ngram_heads": 2,
    "dense_intermediate_size": 48, "shared_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "expert_hidden_size": 16, "encoder_hidden_size": 32, "decoder_hidden_size": 32, "context_dim": 32, "text_hidden_size": 32,
}  # fmt: skip
#: what some types need beside that
MORE: dict[str, dict[str, Any]] = {
    **{
        t: {"num_key_value_heads": 4}
        for t in (
            "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash",
            "minicpm3", "youtu",
        )
    },
    **{t: {"per_layer_config": {}} for t in ("gemma4_text", "gemma4_unified_text")},
    "bamba": {"attn_layer_indices": [1], "layer_types": None},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"], "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "reformer": {"is_decoder": True},
    "xlnet": {"d_head": 8},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xlm": {"n_words": 96},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
#: parameters of a model that is tiny
MOST = 5_000_000
_TOKENS = ("_token_id", "_token_index")


def shrink(config: dict[str, Any]) -> None:
    """Small numbers in place of a config's, lists of layers cut to as many."""
    layers = {v for k, v in config.items() if k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")}
    for key, value in list(config.items()):
        if key in SMALL and (value is None or isinstance(value, int)) and not isinstance(value, bool):
            if value is not None or key in ("num_key_value_heads", "head_dim", "vocab_size"):
                config[key] = SMALL[key]
        elif isinstance(value, list) and len(value) in layers and len(value) > 4:
            config[key] = value[:4]
        elif key.endswith(_TOKENS) and isinstance(value, int):
            config[key] = min(value, 5)
        elif key.endswith(_TOKENS) and isinstance(value, list):
            config[key] = [5]
        elif isinstance(value, dict) and "rope" in key:
            config[key] = (
                {k: v for k, v in value.items() if not k.endswith("_section")} if "mrope" not in str(value) else value
            )
        elif isinstance(value, dict) and key.endswith(("_config", "decoder", "encoder")):
            shrink(value)


def tiny(cls: type, config_class: type, seed: int = 0) -> Any:
    """A model of the class with random weights: raises whatever its type raises where it can't be made."""
    config = config_class().to_dict()
    shrink(config)
    for key, value in MORE.get(config_class.model_type, {}).items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config_class.from_dict(config)).parameters())
    if size > MOST:
        raise ValueError(f"{size / 1e6:.0f} million parameters are not tiny")
    torch.manual_seed(seed)
    model = cls(config_class.from_dict(config)).float().eval()
    with torch.no_grad():  # many begin as zeros or ones
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape) * 0.05)
    return model


_KINDS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_CTC_MAPPING_NAMES", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", "MODEL_MAPPING_NAMES",
)  # fmt: skip


def types(kinds: tuple[str, ...] = _KINDS) -> dict[str, tuple[type, type]]:
    """{model type: (the class that is tried, its config class)} of all that are installed: the first kind that a type has."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: dict[str, tuple[type, type]] = {}
    for kind in kinds:
        for model_type, name in getattr(modeling_auto, kind).items():
            if model_type in found:
                continue
            names = name if isinstance(name, (tuple, list)) else (name,)
            try:
                found[model_type] = (getattr(tf, names[0]), CONFIG_MAPPING[model_type])
            except (AttributeError, KeyError, ImportError):
                continue
    return found


def causal_types() -> dict[str, tuple[type, type]]:
    """Those that have a class for causal language models."""
    return types(_KINDS[:1])


def outputs(model: Any) -> torch.Tensor | None:
    """What a model makes of a few tokens, or an image; None where it takes neither just so."""
    tokens = torch.tensor([[1, 2, 3, 4, 6, 7]])
    size = getattr(model.config, "image_size", None)
    image = (
        {"pixel_values": torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)}
        if isinstance(size, int)
        else {}
    )
    for given in ({"input_ids": tokens}, {"input_ids": tokens, "decoder_input_ids": tokens}, image):
        if not given:
            continue
        try:
            with torch.no_grad():
                made = model(**given)
        except Exception:
            continue
        found = [v for k in ("logits", "last_hidden_state") if isinstance(v := getattr(made, k, None), torch.Tensor)]
        if found:
            return found[0]
    return None


def saved_pair(
    cls: type, config_class: type, folder: Path
) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model and a perturbed copy, saved as a and b: (the model, its state, the copy's), in the names of memory."""
    model = tiny(cls, config_class)
    model.save_pretrained(folder / "a")
    states = [{k: v.clone() for k, v in model.state_dict().items()}]
    again = cls.from_pretrained(folder / "a", dtype=torch.float32).state_dict()
    if any(k not in again or not torch.equal(again[k], v) for k, v in states[0].items() if v.is_floating_point()):
        raise ValueError("it does not load what it saves")
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape) * 0.05)
    model.save_pretrained(folder / "b")
    states.append({k: v.clone() for k, v in model.state_dict().items()})
    return model, states[0], states[1]


def wrong_with(cls: type, folder: Path, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> str:
    """What is wrong with the merge of a saved pair, as transformers loads it; "" where nothing is."""
    import stockpot

    stockpot.merge({"merge_method": "linear", "models": [str(folder / "a"), str(folder / "b")]}, folder / "out")
    made, info = cls.from_pretrained(folder / "out", output_loading_info=True, dtype=torch.float32)
    keys = {k: sorted(map(str, info[k]))[:2] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
    if keys:
        return str(keys)
    got = made.state_dict()
    for name, tensor in first.items():
        if tensor.is_floating_point() and tensor.numel():
            wanted = (tensor.double() + second[name].double()) / 2
            if not torch.allclose(got[name].double(), wanted, rtol=1e-6, atol=1e-6):
                return f"{name} is off by {float((got[name].double() - wanted).abs().max()):.2g}"
    return ""


#: layers that are taken: all but the first, some twice
TAKEN = {"all but the first": [(1, 4)], "some twice": [(0, 3), (1, 4)]}


def wrong_with_layers(cls: type, folder: Path, config: Any, ranges: list[tuple[int, int]]) -> str:
    """What is wrong with a model made of other layers, "" where nothing is, or "refused: ..."."""
    import stockpot

    pieces = [{"sources": [{"model": str(folder / "a"), "layer_range": list(r)}]} for r in ranges]
    try:
        stockpot.merge({"merge_method": "passthrough", "slices": pieces}, folder / "out", overwrite=True)
    except stockpot.StockpotError as e:
        return f"refused: {e.what.replace(str(folder / 'a'), 'its model')}"
    made, info = cls.from_pretrained(folder / "out", output_loading_info=True, dtype=torch.float32)
    keys = {k: sorted(map(str, info[k]))[:2] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
    if keys:
        return str(keys)
    picked = [i for start, stop in ranges for i in range(start, stop)]
    before, after = config.get_text_config().to_dict(), made.config.get_text_config().to_dict()
    for key in ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "indexer_types"):
        old, new = before.get(key), after.get(key)
        if isinstance(old, list) and len(old) == 4 and new != [old[i] for i in picked]:
            return f"{key} {old} became {new}"
    return ""
