"""Layers are found from names alone: on real transformers models, and on one that nobody has heard of."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from stockpot.checkpoints.meaning.layers import map_layers, outside_depth
from stockpot.checkpoints.meaning.ties import Ties, find_ties
from stockpot.specs import DType, TensorSpec

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32}


def names(config: tf.PretrainedConfig, cls: type = tf.AutoModelForCausalLM) -> list[str]:
    with torch.device("meta"):
        return list(cls.from_config(config).state_dict())


MODELS = {
    "llama": (lambda: names(tf.LlamaConfig(**SMALL, num_key_value_heads=2)), {"model.layers": 3}),
    "gpt2": (lambda: names(tf.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32)), {"transformer.h": 3}),
    "gpt-neox": (lambda: names(tf.GPTNeoXConfig(**SMALL)), {"gpt_neox.layers": 3}),
    "bert": (lambda: names(tf.BertConfig(**SMALL), tf.AutoModelForMaskedLM), {"bert.encoder.layer": 3}),
    "t5": (
        lambda: names(
            tf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=32),
            tf.AutoModelForSeq2SeqLM,
        ),
        {"encoder.block": 3, "decoder.block": 2},
    ),
    "vit": (
        lambda: names(
            tf.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=8, patch_size=4),
            tf.AutoModelForImageClassification,
        ),
        {"stack of": 3},
    ),
    "mixture of experts": (
        lambda: names(tf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)),
        {"model.layers": 3},
    ),
    "one layer": (
        lambda: names(tf.LlamaConfig(**(SMALL | {"num_hidden_layers": 1}), num_key_value_heads=2)),
        {"model.layers": 1},
    ),
    "unheard of": (
        lambda: (
            ["in.w"]
            + [f"trunk.cells.{i}.{s}" for i in range(4) for s in ("mix.w", "mix.parts.0.w", "mix.parts.1.w")]
            + ["out.w"]
        ),
        {"trunk.cells": 4},
    ),
    "module prefix": (
        lambda: [f"0.auto_model.encoder.layer.{i}.w" for i in range(3)] + ["0.auto_model.embeddings.w"],
        {"0.auto_model.encoder.layer": 3},
    ),
    "no layers": (lambda: ["a.weight", "b.weight", "head.0.weight", "head.3.weight"], {}),
}


@pytest.mark.parametrize("model", MODELS)
def test_stacks(model: str) -> None:
    make, expected = MODELS[model]
    found = map_layers(make()).stacks
    if "stack of" in expected:
        assert list(found.values()) == [3]
    else:
        assert found == expected


def test_depth() -> None:
    layers = map_layers(MODELS["llama"][0]())
    assert layers.depth("model.layers.0.self_attn.q_proj.weight") == 0
    assert layers.depth("model.layers.1.self_attn.q_proj.weight") == 0.5
    assert layers.depth("model.layers.2.self_attn.q_proj.weight") == 1
    assert map_layers(MODELS["one layer"][0]()).depth("model.layers.0.mlp.up_proj.weight") == 1


@pytest.mark.parametrize(
    "name",
    "model.embed_tokens.weight transformer.wte.weight transformer.wpe.weight shared.weight bert.embeddings.LayerNorm.weight "
    "vit.embeddings.cls_token vit.embeddings.patch_embeddings.projection.weight gpt_neox.embed_in.weight".split(),
)
def test_before_the_layers(name: str) -> None:
    assert outside_depth(name) == 0


@pytest.mark.parametrize(
    "name",
    "model.norm.weight lm_head.weight transformer.ln_f.bias encoder.final_layer_norm.weight classifier.weight "
    "cls.predictions.bias bert.pooler.dense.weight embed_out.weight vit.layernorm.weight score.weight".split(),
)
def test_after_the_layers(name: str) -> None:
    assert outside_depth(name) == 1


def test_ties() -> None:
    matrix, other = TensorSpec(DType.F32, (8, 4)), TensorSpec(DType.F32, (4, 4))
    specs = {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix, "x.weight": other}
    head = {"lm_head.weight": "model.embed_tokens.weight"}

    def ties(config: dict[str, object], equal: bool = True) -> Ties:
        return find_ties(specs, config, lambda a, b: equal)

    assert ties({"tie_word_embeddings": True}).duplicates == head
    assert ties({"tie_word_embeddings": False}).duplicates == {}
    assert ties({"model_type": "gemma2"}).duplicates == head  # its default
    assert ties({"model_type": "llama"}).duplicates == {}
    # two that differ are never one, whatever the config says
    both = ties({"tie_word_embeddings": True}, equal=False)
    assert (both.duplicates, both.apart) == ({}, (("lm_head.weight", "model.embed_tokens.weight"),))
    # of a type that nobody has described both names stay, and equal ones are known to be copies
    assert (ties({}).duplicates, ties({}).copies) == ({}, {"lm_head.weight"})
    assert ties({}, equal=False).copies == frozenset()
    del specs["lm_head.weight"]

    def alias(name: str, config: dict[str, object]) -> str | None:
        return ties(config).alias(name, specs)

    assert alias("lm_head.weight", {"tie_word_embeddings": True}) == "model.embed_tokens.weight"
    assert alias("lm_head.weight", {}) == "model.embed_tokens.weight"
    assert alias("lm_head.weight", {"tie_word_embeddings": False}) is None
    assert alias("lm_head.weight", {"model_type": "llama"}) is None
    assert alias("lm_head.weight", {"model_type": "gemma2"}) == "model.embed_tokens.weight"
    assert alias("x.weight", {"tie_word_embeddings": True}) is None
    biases = {"cls.predictions.decoder.bias": other, "cls.predictions.bias": other, "x.bias": other}
    found = find_ties(biases, {}, lambda a, b: True)
    assert found.duplicates == {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    assert {t.second for t in found.pairs} == {"cls.predictions.decoder.bias"}
    # a copy of the embedding is no head of its own, and one that differs is
    both = {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix}
    assert not find_ties(both, {}, lambda a, b: True).stands_alone("lm_head.weight", set(both))
    assert find_ties(both, {}, lambda a, b: False).stands_alone("lm_head.weight", set(both))
    t5 = {"shared.weight": matrix, "encoder.embed_tokens.weight": matrix}
    assert find_ties(t5, {}, lambda a, b: True).duplicates == {"encoder.embed_tokens.weight": "shared.weight"}
