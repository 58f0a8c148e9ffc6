"""One model under several names: what transformers, wrappers, older versions call the same tensors, merged under the base's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import stockpot
import tiny
from stockpot.checkpoints.meaning.architectures import table_version
from stockpot.checkpoints.meaning.buffers import is_computed
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.errors import MismatchError, StockpotError
from stockpot.specs import DType, TensorSpec

State = dict[str, torch.Tensor]


def state_of(model: Any) -> State:
    return {k: v.clone() for k, v in model.state_dict().items()}


def mean(*states: State) -> State:
    return {
        k: sum(s[k].double() for s in states) / len(states) if v.is_floating_point() else v
        for k, v in states[0].items()
    }


def load_all(cls: type, path: Path) -> State:
    """What transformers makes of an output that has everything, and nothing else."""
    model, info = cls.from_pretrained(path, output_loading_info=True, dtype=torch.float32)  # type: ignore[attr-defined]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return state_of(model)


def same(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert torch.allclose(tensor.double(), wanted[name].double(), atol=1e-6), name


def rewritten(path: Path, change: Callable[[State], State]) -> Path:
    tensors = load_file(path / "model.safetensors")
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, path / "model.safetensors", {"format": "pt"})
    return path


def linear(*paths: Path, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [str(p) for p in paths], **more}


def family(tmp_path: Path, name: str, count: int = 2) -> tuple[type, list[State]]:
    """Models of a type, saved as 0, 1, ...; their states."""
    cls, config = tiny.types()[name]
    states = []
    for seed in range(count):
        model = tiny.tiny(cls, config, seed)
        model.save_pretrained(tmp_path / str(seed))
        states.append(state_of(model))
    return cls, states


# prefixes and wrappers


def drop(prefix: str) -> Callable[[State], State]:
    return lambda t: {k.removeprefix(prefix): v for k, v in t.items()}


def put(prefix: str) -> Callable[[State], State]:
    return lambda t: {prefix + k: v for k, v in t.items()}


WRITTEN: dict[str, tuple[str, Callable[[State], State]]] = {
    "gpt2 without its prefix": ("gpt2", drop("transformer.")),
    "bert without its prefix": ("bert", drop("bert.")),
    "llama without its prefix": ("llama", drop("model.")),
    "compiled": ("llama", put("_orig_mod.")),
    "distributed": ("llama", put("module.")),
    "compiled and distributed": ("llama", put("module._orig_mod.")),
    "one part compiled": ("llama", lambda t: {k.replace(".mlp.", ".mlp._orig_mod."): v for k, v in t.items()}),
    "of FSDP": (
        "llama",
        lambda t: {k.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."): v for k, v in t.items()},
    ),
    "of a trainer's attribute": ("llama", put("net.")),
    "old BERT": (
        "bert",
        lambda t: {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
            for k, v in t.items()
        },
    ),
    "llava as it is in memory": (
        "llava",
        lambda t: {
            ("" if k.startswith("language_model.lm_head") else "model.")
            + k.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head"): v
            for k, v in t.items()
        },
    ),
}


WRAPPED = ("compiled", "distributed", "compiled and distributed", "one part compiled", "of FSDP")


@pytest.mark.parametrize("case", WRITTEN)
def test_names_of_one_model(tmp_path: Path, case: str) -> None:
    """The output has the names of the first model, whichever of the two that is, and transformers loads it."""
    name, change = WRITTEN[case]
    cls, states = family(tmp_path, name)
    plain = load_file(tmp_path / "0/model.safetensors")
    rewritten(tmp_path / "1", change)
    plan = stockpot.plan(linear(tmp_path / "0", tmp_path / "1"))
    assert any("are called otherwise in" in n for n in plan.notes)
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == plain.keys()
    same(load_all(cls, tmp_path / "out"), mean(*states))
    # the other way round the output takes the other one's names
    stockpot.merge(linear(tmp_path / "1", tmp_path / "0"), tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    wanted = mean(plain, load_file_of(tmp_path / "1", change, plain))
    if case not in WRAPPED:  # of a wrapper nothing is left, so that transformers finds its weights
        wanted = change(wanted)
    else:
        same(load_all(cls, tmp_path / "back"), mean(*states))
    assert back.keys() == wanted.keys()
    for key, tensor in back.items():
        assert torch.allclose(tensor.double(), wanted[key].double(), atol=1e-6), key


def load_file_of(path: Path, change: Callable[[State], State], plain: State) -> State:
    """The tensors of a rewritten file under the plain names."""
    tensors = load_file(path / "model.safetensors")
    names = {next(iter(change({k: v}))): k for k, v in plain.items()}
    return {names[k]: v for k, v in tensors.items()}


def test_a_wrapper_is_said_and_dropped(tmp_path: Path) -> None:
    cls, states = family(tmp_path, "llama", 1)
    rewritten(tmp_path / "0", put("_orig_mod."))
    recipe = {"merge_method": "passthrough", "models": [str(tmp_path / "0")]}
    assert any("'_orig_mod.' of a wrapper" in n for n in stockpot.plan(recipe).notes)
    stockpot.merge(recipe, tmp_path / "out")
    same(load_all(cls, tmp_path / "out"), states[0])
    # a trainer's own file has no config by which anybody would look for other names
    rewritten(tmp_path / "0", lambda t: t)
    (tmp_path / "0/config.json").unlink()
    assert all(t.name.startswith("_orig_mod.") for t in stockpot.plan(recipe).tensors)


def test_a_base_in_a_third_dialect(tmp_path: Path) -> None:
    cls, states = family(tmp_path, "gpt2", 3)
    rewritten(tmp_path / "0", drop("transformer."))
    rewritten(tmp_path / "1", put("module."))
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "0"),
        "models": [str(tmp_path / "1"), str(tmp_path / "2")],
        "parameters": {"weight": 0.5},
    }
    stockpot.merge(recipe, tmp_path / "out")
    same(load_all(cls, tmp_path / "out"), mean(states[1], states[2]))


def test_base_model_without_its_head(tmp_path: Path) -> None:
    """A missing head is never made up: it is an error, unless only one is asked for."""
    model = tiny.tiny(tf.LlamaForCausalLM, tf.LlamaConfig, 1)
    model.save_pretrained(tmp_path / "whole")
    tiny.tiny(tf.LlamaModel, tf.LlamaConfig, 2).save_pretrained(tmp_path / "bare")
    with pytest.raises(MismatchError, match=r"bare: 1 tensors of .*whole are missing: 'lm_head.weight'"):
        stockpot.plan(linear(tmp_path / "whole", tmp_path / "bare"))
    with pytest.raises(MismatchError, match=r"whole: 1 tensors are not in .*bare: 'lm_head.weight'; exclude them"):
        stockpot.plan(linear(tmp_path / "bare", tmp_path / "whole"))
    stockpot.merge(linear(tmp_path / "bare", tmp_path / "whole", exclude=["lm_head.weight"]), tmp_path / "out")
    load_all(tf.LlamaModel, tmp_path / "out")
    stockpot.merge(linear(tmp_path / "whole", tmp_path / "bare", absent="skip"), tmp_path / "out2")
    assert torch.equal(load_all(tf.LlamaForCausalLM, tmp_path / "out2")["lm_head.weight"], model.lm_head.weight)


def test_a_text_model_within_one_that_sees(tmp_path: Path) -> None:
    cls, states = family(tmp_path, "llava", 1)
    text = tf.AutoConfig.from_pretrained(tmp_path / "0").text_config
    llm = tf.LlamaForCausalLM(text)
    llm.save_pretrained(tmp_path / "llm")
    seeing = ["*vision*", "*projector*"]
    with pytest.raises(MismatchError, match="missing"):
        stockpot.plan(linear(tmp_path / "0", tmp_path / "llm"))
    stockpot.merge(linear(tmp_path / "0", tmp_path / "llm", exclude=seeing), tmp_path / "out")
    got, other = load_all(cls, tmp_path / "out"), llm.state_dict()
    for name, tensor in got.items():
        own = name.replace("model.language_model.", "model.")
        wanted = states[0][name].double()
        if own in other and "vision" not in name:
            wanted = (wanted + other[own].double()) / 2
        assert torch.allclose(tensor.double(), wanted, atol=1e-6), name
    stockpot.merge(linear(tmp_path / "llm", tmp_path / "0", exclude=seeing), tmp_path / "back")
    load_all(tf.LlamaForCausalLM, tmp_path / "back")


# layouts


PACKED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "jamba", "phimoe", "granitemoe", "hrm_text"]


@pytest.mark.parametrize("name", PACKED)
def test_experts_packed_and_apart(tmp_path: Path, name: str) -> None:
    """A file that was loaded packed is saved packed; its sisters are not."""
    cls, config = tiny.types()[name]
    states = []
    for seed, original in ((0, True), (1, False)):
        model = tiny.tiny(cls, config, seed)
        model.save_pretrained(tmp_path / str(seed), save_original_format=original)
        states.append(state_of(model))
    names = [set(load_file(tmp_path / n / "model.safetensors")) for n in "01"]
    assert names[0] != names[1]
    for order in ("01", "10"):
        stockpot.merge(linear(*(tmp_path / n for n in order)), tmp_path / f"out{order}")
        assert set(load_file(tmp_path / f"out{order}/model.safetensors")) == names[int(order[0])]
        same(load_all(cls, tmp_path / f"out{order}"), mean(*states))


def test_rotary_rows_in_another_layout_are_refused(tmp_path: Path) -> None:
    """`PermuteForRope`: the same weights, their rows in another order; so is what can't be turned round."""
    cls, config = tiny.types()["kimi_k25"]
    for seed, original in ((0, True), (1, False)):
        tiny.tiny(cls, config, seed).save_pretrained(tmp_path / str(seed), save_original_format=original)
    with pytest.raises(StockpotError, match=r"layouts that differ by .*PermuteForRope"):
        stockpot.plan(linear(tmp_path / "0", tmp_path / "1"))
    with pytest.raises(StockpotError, match=r"layouts that differ by .*PermuteForRope"):
        stockpot.plan(linear(tmp_path / "1", tmp_path / "0"))
    shutil.copytree(tmp_path / "0", tmp_path / "2")
    stockpot.plan(linear(tmp_path / "0", tmp_path / "2"))
    for n in "01":  # as it says
        cls.from_pretrained(tmp_path / n).save_pretrained(tmp_path / f"same{n}", save_original_format=False)  # type: ignore[attr-defined]
    stockpot.plan(linear(tmp_path / "same0", tmp_path / "same1"))


def test_packed_the_other_way_round_is_refused(tmp_path: Path) -> None:
    cls, config = tiny.types()["mixtral"]
    for seed, original in ((0, True), (1, False)):
        tiny.tiny(cls, config, seed).save_pretrained(tmp_path / str(seed), save_original_format=original)
    rewritten(tmp_path / "1", lambda t: {k: v.transpose(1, 2) if "gate_up_proj" in k else v for k, v in t.items()})
    with pytest.raises(StockpotError, match="in a layout that is not theirs"):
        stockpot.plan(linear(tmp_path / "0", tmp_path / "1"))


# ties


def silent(path: Path) -> None:
    """A config.json that says nothing of ties."""
    config = json.loads((path / "config.json").read_text())
    for part in (config, config.get("text_config") or {}):
        part.pop("tie_word_embeddings", None)
    (path / "config.json").write_text(json.dumps(config))


HEADS = {
    "gemma2": ("lm_head.weight", "model.embed_tokens.weight"),
    "whisper": ("proj_out.weight", "model.decoder.embed_tokens.weight"),
    "mamba": ("lm_head.weight", "backbone.embeddings.weight"),
    "bert": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    "roberta": ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    "modernbert": ("decoder.weight", "model.embeddings.tok_embeddings.weight"),
    "opt": ("lm_head.weight", "model.decoder.embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "bart": ("lm_head.weight", "model.decoder.embed_tokens.weight"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_one_file_stores_as_well(tmp_path: Path, name: str) -> None:
    """Nobody's config speaks of ties; the output has as many parameters as the models."""
    head, embedding = HEADS[name]
    cls, states = family(tmp_path, name)
    for n in "01":
        silent(tmp_path / n)
    plain = load_file(tmp_path / "0/model.safetensors")
    assert embedding in plain
    assert head not in plain
    rewritten(tmp_path / "1", lambda t: t | {head: t[embedding].clone()})
    for order in ("01", "10"):
        stockpot.merge(linear(*(tmp_path / n for n in order)), tmp_path / f"out{order}")
        assert load_file(tmp_path / f"out{order}/model.safetensors").keys() == plain.keys()
        same(load_all(cls, tmp_path / f"out{order}"), mean(*states))


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "modernbert", "mamba"])
def test_a_head_that_differs_is_kept(tmp_path: Path, name: str) -> None:
    """Two stored tensors that differ are never one: so transformers loads them too, and the output's config says so."""
    head, embedding = HEADS[name]
    family(tmp_path, name)
    own = torch.randn_like(load_file(tmp_path / "1/model.safetensors")[embedding])
    rewritten(tmp_path / "1", lambda t: t | {head: own})
    first = load_file(tmp_path / "0/model.safetensors")[embedding]
    for order in ("01", "10"):
        plan = stockpot.plan(linear(*(tmp_path / n for n in order)))
        assert any("it holds two that differ" in n for n in plan.notes)
        stockpot.merge(linear(*(tmp_path / n for n in order)), tmp_path / f"out{order}")
        got = load_all(tiny.types()[name][0], tmp_path / f"out{order}")
        assert torch.allclose(got[head].double(), (first.double() + own.double()) / 2, atol=1e-6)
        assert not torch.allclose(got[head], got[embedding])


@pytest.mark.parametrize("name", ["bart", "mbart", "bert", "roberta", "albert"])
def test_all_that_one_key_ties_is_untied_together(tmp_path: Path, name: str) -> None:
    """The config has one word for a head, its bias and the copies of the embedding: each is written out."""
    cls, _ = family(tmp_path, name)
    made = open_checkpoint(tmp_path / "0").ties.pairs
    second = next(t.second for t in made if t.tied and t.second.endswith(("lm_head.weight", "decoder.weight")))
    first = next(t.first for t in made if t.second == second)
    own = torch.randn_like(load_file(tmp_path / "1/model.safetensors")[first])
    rewritten(tmp_path / "1", lambda t: t | {second: own})
    for order in ("01", "10", "11"):
        paths = [tmp_path / order[0]] if order == "11" else [tmp_path / n for n in order]
        stockpot.merge(linear(*paths), tmp_path / f"out{order}")
        got = load_all(cls, tmp_path / f"out{order}")
        assert not torch.allclose(got[second], got[first])


def test_copies_that_the_config_unties_are_kept(tmp_path: Path) -> None:
    cls, _ = family(tmp_path, "bart", 1)
    config = json.loads((tmp_path / "0/config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "0/config.json").write_text(json.dumps(config))
    shared = load_file(tmp_path / "0/model.safetensors")
    (base,) = (k for k in shared if k.endswith(("shared.weight", "embed_tokens.weight")) and "positions" not in k)
    names = [n for n in cls.from_pretrained(tmp_path / "0").state_dict() if n not in shared]  # type: ignore[attr-defined]
    rewritten(tmp_path / "0", lambda t: t | {n: t[base].clone() for n in names if n.endswith("weight")})
    stockpot.merge(linear(tmp_path / "0"), tmp_path / "out")
    load_all(cls, tmp_path / "out")


def test_a_t5_that_is_untied_keeps_its_scale(tmp_path: Path) -> None:
    cls, _ = family(tmp_path, "t5", 1)
    config = json.loads((tmp_path / "0/config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    (tmp_path / "0/config.json").write_text(json.dumps(config))
    rewritten(tmp_path / "0", lambda t: t | {"lm_head.weight": torch.randn_like(t["shared.weight"])})
    stockpot.merge(linear(tmp_path / "0"), tmp_path / "out")
    before, after = (cls.from_pretrained(tmp_path / n).eval() for n in ("0", "out"))  # type: ignore[attr-defined]
    one, two = tiny.outputs(before), tiny.outputs(after)
    assert one is not None
    assert two is not None
    assert torch.allclose(one, two, atol=1e-4)


def test_a_head_that_its_class_does_not_tie_is_kept(tmp_path: Path) -> None:
    """Equal bytes are no tie where the class declares none."""
    family(tmp_path, "gpt_neox", 1)
    rewritten(tmp_path / "0", lambda t: t | {"embed_out.weight": t["gpt_neox.embed_in.weight"].clone()})
    stockpot.merge(linear(tmp_path / "0"), tmp_path / "out")
    assert "embed_out.weight" in load_file(tmp_path / "out/model.safetensors")


def test_a_text_model_of_another_type(tmp_path: Path) -> None:
    """Llava with a Mixtral in it: the experts of a Mixtral go where they belong."""
    text = tiny.types()["mixtral"][1]().to_dict()
    tiny.shrink(text)
    text_config = tf.MixtralConfig(**{k: v for k, v in text.items() if k != "model_type"})
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    seeing = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text_config, image_token_index=5)
    )
    seeing.save_pretrained(tmp_path / "vlm")
    llm = tf.MixtralForCausalLM(text_config)
    for form in (True, False):
        llm.save_pretrained(tmp_path / f"llm{form}", save_original_format=form)
        recipe = linear(tmp_path / "vlm", tmp_path / f"llm{form}", exclude=["*vision*", "*projector*"])
        stockpot.merge(recipe, tmp_path / f"out{form}")
        got, own, other = load_all(type(seeing), tmp_path / f"out{form}"), seeing.state_dict(), llm.state_dict()
        for name, tensor in got.items():
            wanted = own[name].double()
            if (theirs := name.replace("model.language_model.", "model.")) in other and "vision" not in name:
                wanted = (wanted + other[theirs].double()) / 2
            assert torch.allclose(tensor.double(), wanted, atol=1e-6), name


def test_deeper_layers_of_another_dialect(tmp_path: Path) -> None:
    """Layers that only the other one has are read under names of the first's kind too."""
    model = tiny.tiny(tf.GPT2LMHeadModel, tf.GPT2Config, 0)
    model.save_pretrained(tmp_path / "deep")
    rewritten(tmp_path / "deep", drop("transformer."))
    short = tf.GPT2LMHeadModel(tf.GPT2Config(**{**model.config.to_dict(), "n_layer": 2}))
    short.save_pretrained(tmp_path / "short")
    pieces = [
        {"sources": [{"model": str(tmp_path / "short"), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(tmp_path / "deep"), "layer_range": [2, 4]}]},
    ]
    stockpot.merge({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out")
    got = load_all(tf.GPT2LMHeadModel, tmp_path / "out")
    assert torch.equal(got["transformer.h.3.attn.c_attn.weight"], model.transformer.h[3].attn.c_attn.weight)
    with pytest.raises(MismatchError, match="name the deepest model first"):
        stockpot.plan(linear(tmp_path / "short", tmp_path / "deep", absent="skip"))


def test_deeper_layers_of_packed_experts(tmp_path: Path) -> None:
    cls, config = tiny.types()["mixtral"]
    model = tiny.tiny(cls, config, 0)
    model.save_pretrained(tmp_path / "deep", save_original_format=False)
    made = {k: v for k, v in model.config.to_dict().items() if k != "model_type"}
    tf.MixtralForCausalLM(tf.MixtralConfig(**{**made, "num_hidden_layers": 2})).save_pretrained(tmp_path / "short")
    pieces = [
        {"sources": [{"model": str(tmp_path / "short"), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(tmp_path / "deep"), "layer_range": [2, 4]}]},
    ]
    stockpot.merge({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out")
    got = load_all(cls, tmp_path / "out")
    name = "model.layers.3.mlp.experts.gate_up_proj"
    assert torch.equal(got[name], model.state_dict()[name])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("ernie4_5_vl_moe", "model.layers.1.mlp.experts.{}.down_proj.weight"),
        ("ernie4_5_vl_moe", "model.layers.1.mlp.experts.1.{}.weight"),
        ("step3p7", "model.layers.1.moe.{}.weight"),
        ("qwen4_exp_text", "model.ngram_embedding.shard_{}.weight"),
    ],
)
def test_parts_of_a_layout_known_by_name_keep_apart(tmp_path: Path, kind: str, name: str) -> None:
    """Several tensors go into one of memory in a way that is not understood: each still meets its own, under a wrapper too."""
    whats = ("gate_proj", "up_proj") if "experts.1." in name or "moe." in name else ("0", "1", "2")
    states = []
    for seed, wrapper in ((0, ""), (1, "_orig_mod.")):
        path = tmp_path / str(seed)
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
        made = torch.Generator().manual_seed(seed)
        states.append({name.format(what): torch.randn(4, 4, generator=made) for what in whats})
        save_file({wrapper + k: v for k, v in states[-1].items()}, path / "model.safetensors", {"format": "pt"})
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    same(load_file(tmp_path / "out" / "model.safetensors"), mean(*states))


def test_fused_projections_with_biases(tmp_path: Path) -> None:
    cls, config = tiny.types()["gte"]
    states = []
    for seed, original in ((0, True), (1, False)):
        model = tiny.tiny(cls, config, seed)
        model.save_pretrained(tmp_path / str(seed), save_original_format=original)
        states.append(state_of(model))
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    same(load_all(cls, tmp_path / "out"), mean(*states))


def test_t5_stored_once_and_three_times(tmp_path: Path) -> None:
    cls, states = family(tmp_path, "t5", 3)
    again = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    rewritten(tmp_path / "1", lambda t: t | {n: t["shared.weight"].clone() for n in again})
    rewritten(tmp_path / "2", lambda t: {again[0] if k == "shared.weight" else k: v for k, v in t.items()})
    stockpot.merge(linear(*(tmp_path / n for n in "012")), tmp_path / "out")
    assert "encoder.embed_tokens.weight" not in load_file(tmp_path / "out/model.safetensors")
    same(load_all(cls, tmp_path / "out"), mean(*states))


def test_a_bin_file_has_both_names_of_a_tie(tmp_path: Path) -> None:
    """torch stores one storage under two names, which is seen without reading it."""
    cls, states = family(tmp_path, "gpt2")
    (tmp_path / "1/model.safetensors").unlink()
    model = cls.from_pretrained(tmp_path / "0")  # type: ignore[attr-defined]
    model.load_state_dict(states[1])
    torch.save(model.state_dict(), tmp_path / "1/pytorch_model.bin")
    assert "lm_head.weight" in open_checkpoint(tmp_path / "1").tied()
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    same(load_all(cls, tmp_path / "out"), mean(*states))


def test_inspect_says_what_is_tied_and_how_that_is_known(tmp_path: Path) -> None:
    family(tmp_path, "gemma2", 1)
    known = {t["known"] for t in stockpot.inspect(tmp_path / "0")["ties"]}
    assert known == {"config.json"}
    silent(tmp_path / "0")
    (tie,) = stockpot.inspect(tmp_path / "0")["ties"]
    assert (tie["second"], tie["tied"], tie["known"]) == ("lm_head.weight", True, "the default of gemma2")
    assert stockpot.inspect(tmp_path / "0")["dialect"]["class"] == "Gemma2ForCausalLM"


# tensors that are no weights


@pytest.mark.parametrize("order", ["01", "10"])
def test_buffers_that_one_file_holds(tmp_path: Path, order: str) -> None:
    cls, states = family(tmp_path, "llama")
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(4)}
    rewritten(tmp_path / "1", lambda t: t | more)
    plan = stockpot.plan(linear(*(tmp_path / n for n in order)))
    assert any("4 tensors that models compute anew are left out" in n for n in plan.notes)
    stockpot.merge(linear(*(tmp_path / n for n in order)), tmp_path / "out")
    same(load_all(cls, tmp_path / "out"), mean(*states))
    (row,) = (r for r in plan.account if r["path"].endswith("/1"))
    assert {n for left in row["tensors"]["left_out"] for n in left["names"]} == set(more)


def test_buffers_that_all_hold_are_copied(tmp_path: Path) -> None:
    family(tmp_path, "llama")
    for n in "01":
        rewritten(tmp_path / n, lambda t: t | {"model.rotary_emb.inv_freq": torch.rand(4)})
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    name = "model.rotary_emb.inv_freq"
    assert torch.equal(
        load_file(tmp_path / "out/model.safetensors")[name], load_file(tmp_path / "0/model.safetensors")[name]
    )


def test_what_is_a_buffer() -> None:
    vector, mask = TensorSpec(DType.F32, (8,)), TensorSpec(DType.U8, (1, 1, 8, 8))
    assert is_computed("bert.embeddings.position_ids", TensorSpec(DType.I64, (1, 8)))
    assert is_computed("model.layers.0.self_attn.rotary_emb.inv_freq", vector)
    assert is_computed("transformer.h.0.attn.bias", mask)
    assert is_computed("transformer.h.0.attn.masked_bias", TensorSpec(DType.F32, ()))
    assert not is_computed("transformer.h.0.attn.bias", vector)  # a bias
    assert not is_computed("layers.0.attn.bias", TensorSpec(DType.F32, (1, 4, 8, 8)))
    assert not is_computed("model.layers.0.self_attn.q_proj.bias", vector)
    assert not is_computed("bn.running_mean", vector)


def test_the_table_is_of_the_pinned_transformers() -> None:
    if tf.__version__ != table_version():
        pytest.skip(f"the table is of {table_version()}, installed is {tf.__version__}")
    import importlib.util

    place = Path(__file__).parents[1] / "tools/architectures.py"
    loaded = importlib.util.spec_from_file_location("architectures", place)
    assert loaded is not None
    assert loaded.loader is not None
    tool = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(tool)
    written = json.loads(tool.TABLE.read_text())
    for name in (
        "llama",
        "gemma2",
        "t5",
        "mixtral",
        "llava",
        "bert",
        "modernbert",
        "qwen3_next",
        "exaone_moe",
        "gpt_oss",
    ):
        _, found, _ = tool.described(name)
        for entry in found["classes"].values():
            entry["rules"] = json.loads(json.dumps(entry.get("rules")))
        stored = json.loads(json.dumps(written["types"][name]))
        for entry in stored["classes"].values():
            entry["rules"] = None if entry.get("rules") is None else written["rules"][entry["rules"]]
        assert json.loads(json.dumps(found)) == stored, name


def test_configs_that_say_tied_on_a_level_that_does_not_count() -> None:
    """Qwen3-VL-MoE's text_config ties by default while the model does not: the level that the class asks is what counts."""
    from stockpot.checkpoints.meaning.ties import find_ties

    matrix = TensorSpec(DType.F32, (8, 4))
    specs = {"model.language_model.embed_tokens.weight": matrix, "lm_head.weight": matrix}
    for model_type, name in (
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
    ):
        config = {"model_type": model_type, "architectures": [name], "text_config": {"tie_word_embeddings": True}}
        assert find_ties(specs, config | {"tie_word_embeddings": False}, lambda a, b: True).duplicates == {}
    llava = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    assert find_ties(specs, llava | {"tie_word_embeddings": True}, lambda a, b: True).duplicates == {
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }
    # T5 1.1: the head is its own, the encoder's and the decoder's embeddings are the shared one
    t5 = {"shared.weight": matrix, "lm_head.weight": matrix, "encoder.embed_tokens.weight": matrix}
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False}
    assert find_ties(t5, config, lambda a, b: True).duplicates == {"encoder.embed_tokens.weight": "shared.weight"}


def test_mlx_beside_torch_where_channels_lie_elsewhere(tmp_path: Path) -> None:
    for n, form in (("0", "pt"), ("1", "mlx")):
        (tmp_path / n).mkdir()
        save_file({"conv.weight": torch.randn(4, 4, 4)}, tmp_path / n / "model.safetensors", {"format": form})
    with pytest.raises(MismatchError, match=r"of MLX, where 'conv.weight' has its channels last"):
        stockpot.plan(linear(tmp_path / "0", tmp_path / "1"))
