"""Checkpoints in parts: state dicts within a file, folders of encoders and pipelines, heads beside models; nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import stockpot
import tiny
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.errors import ArgumentError, CheckpointError, MismatchError, StockpotError

from helpers import cli

State = dict[str, torch.Tensor]


def linear(*paths: Path | str, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [str(p) for p in paths], **more}


def body(seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    return {"encoder.weight": torch.randn(8, 8, generator=g), "encoder.bias": torch.randn(8, generator=g)}


def head(seed: int) -> State:
    g = torch.Generator().manual_seed(seed + 100)
    return {"0.weight": torch.randn(20, 8, generator=g)}


def mean(a: State, b: State) -> State:
    return {k: (a[k].double() + b[k].double()) / 2 for k in a}


def close(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert torch.allclose(tensor.double(), wanted[name].double(), atol=1e-6), name


# state dicts within a file

FILES: dict[str, tuple[Any, dict[str, Any]]] = {
    "OpenNMT": (
        lambda n: {"model": body(n), "generator": head(n), "opt": {}, "optim": {"state": {0: torch.ones(3)}}},
        {"": body, "generator.": head},
    ),
    "two nets": (lambda n: {"netG": body(n), "netD": head(n), "epoch": 3}, {"netG.": body, "netD.": head}),
    "EMA of timm": (
        lambda n: {"state_dict": body(n), "state_dict_ema": body(n + 7), "arch": "x", "optimizer": {"state": {}}},
        {"": body, "state_dict_ema.": lambda n: body(n + 7)},
    ),
    "EMA of Lightning": (
        lambda n: {"state_dict": body(n), "current_model_state": body(n + 7), "averaging_state": {"n": torch.ones(1)}},
        {"": body, "current_model_state.": lambda n: body(n + 7)},
    ),
    "super-resolution": (
        lambda n: {"params": body(n), "params_ema": body(n + 7)}, {"": body, "params_ema.": lambda n: body(n + 7)},
    ),
    "fairseq": (
        lambda n: {"args": None, "cfg": {"model": {}}, "model": body(n), "extra_state": {"ema": body(n + 7)}},
        {"": body, "extra_state.ema.": lambda n: body(n + 7)},
    ),
    "nested": (
        lambda n: {"nets": {"backbone": body(n), "head": head(n)}}, {"nets.backbone.": body, "nets.head.": head},
    ),
}  # fmt: skip


MORE: dict[str, tuple[Any, set[str], str]] = {
    "a list of nets": (lambda n: {"nets": [body(n), head(n)]}, {"nets.0.encoder.weight", "nets.1.0.weight"}, ""),
    "numbered heads": (lambda n: {"model": body(n), "heads": {0: head(n)}}, {"encoder.weight", "heads.0.0.weight"}, ""),
    "a state within a state": (
        lambda n: {"model": body(n) | {"extra": {"w": torch.ones(2)}}}, {"encoder.weight", "model.extra.w"}, ""),
    "deep": (lambda n: {"a": {"b": {"c": {"d": {"e": body(n)}}}}}, {"encoder.weight"}, ""),
    "criterion with weights": (
        lambda n: {"model": body(n), "criterion": {"arc.weight": torch.ones(3)}}, {"encoder.weight", "criterion.arc.weight"}, ""),
    "an optimiser of another name": (
        lambda n: {"model": body(n), "adam": {"state": {0: {"m": torch.ones(2)}}, "param_groups": []}}, {"encoder.weight"}, ""),
    "the best accuracy": (
        lambda n: {"state_dict": body(n), "best_acc1": torch.tensor(71.0), "arch": "x"}, {"encoder.weight"}, ""),
    "statistics beside": (
        lambda n: {"model": body(n), "mean": torch.ones(3)}, {"encoder.weight", "mean"}, ""),
    "a pickled EMA": (
        lambda n: {"model": body(n), "ema": torch.nn.Linear(2, 2)}, {"encoder.weight"}, "ema \\(a pickled module\\)"),
    "an object in a state": (
        lambda n: {"model": body(n) | {"scheme": Path("x")}}, {"encoder.weight"}, "scheme \\(no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", MORE)
def test_what_trainers_write_besides(tmp_path: Path, case: str) -> None:
    """Nothing is dropped: a tensor is in the output, or the trainer's own, or a note names it."""
    document, names, said = MORE[case]
    for n in (0, 1):
        torch.save(document(n), tmp_path / f"{n}.pt")
    plan = stockpot.plan(linear(tmp_path / "0.pt", tmp_path / "1.pt"))
    assert {t.name for t in plan.tensors if not t.name.endswith("encoder.bias")} == names
    assert not said or any(re.search(said, n) for n in plan.notes)


def test_a_name_that_two_parts_would_have(tmp_path: Path) -> None:
    torch.save({"model": {"ema.w": torch.ones(2)}, "ema": {"v": torch.ones(3)}}, tmp_path / "0.pt")
    recipe = linear(tmp_path / "0.pt", part="model")
    assert {t.name for t in stockpot.plan(recipe).tensors} == {"ema.w"}
    torch.save({"model": {"ema.v": torch.ones(2)}, "ema": {"v": torch.ones(3)}}, tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match=r"two of its parts have a tensor 'ema.v'"):
        open_checkpoint(tmp_path / "1.pt")


def test_a_part_of_a_step(tmp_path: Path) -> None:
    for n in (0, 1):
        torch.save(FILES["OpenNMT"][0](n), tmp_path / f"{n}.pt")
    pipeline(tmp_path / "p", 0)
    text = f"name: s\nmerge_method: linear\nmodels: [{tmp_path}/p]\n---\nmerge_method: linear\nmodels: [s]\npart: vae\n"
    assert {t.name for t in stockpot.plan(text).tensors} == {"decoder.weight"}


def test_turned_tensors_in_parts(tmp_path: Path) -> None:
    """Two parts have a tensor of one name, turned in one of them only."""
    for n in (0, 1):
        pipeline(tmp_path / str(n), n)
        for part in ("unet", "vae"):
            turned = torch.randn(5, 4).T if part == "unet" else torch.randn(4, 5)
            (tmp_path / str(n) / part / "diffusion_pytorch_model.safetensors").unlink()
            torch.save({"w": turned}, tmp_path / str(n) / part / "diffusion_pytorch_model.bin")
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model"
        states = [torch.load(tmp_path / str(n) / f"{name}.bin") for n in (0, 1)]
        close(load_file(tmp_path / f"out/{name}.safetensors"), mean(*states))


@pytest.mark.parametrize("case", FILES)
def test_state_dicts_in_parts(tmp_path: Path, case: str) -> None:
    document, parts = FILES[case]
    for n in (0, 1):
        torch.save(document(n), tmp_path / f"{n}.pt")
    stockpot.merge(linear(tmp_path / "0.pt", tmp_path / "1.pt"), tmp_path / "out")
    wanted = {p + k: v for p, make in parts.items() for k, v in mean(make(0), make(1)).items()}
    close(load_file(tmp_path / "out/model.safetensors"), wanted)
    shown = stockpot.inspect(tmp_path / "0.pt")["parts"]
    assert {row["prefix"] for row in shown.values()} == set(parts)
    # one of them by name, under its own names
    for part, row in shown.items():
        recipe = linear(tmp_path / "0.pt", tmp_path / "1.pt", part=part)
        stockpot.merge(recipe, tmp_path / "one", overwrite=True)
        close(load_file(tmp_path / "one/model.safetensors"), mean(parts[row["prefix"]](0), parts[row["prefix"]](1)))


def test_what_a_file_holds_besides_is_named(tmp_path: Path) -> None:
    torch.save(FILES["OpenNMT"][0](0), tmp_path / "0.pt")
    (row,) = stockpot.plan(linear(tmp_path / "0.pt")).account
    assert row["files"] == [{"name": "0.pt", "fate": "read", "why": "but not optim (training state)"}]


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    torch.save(FILES["two nets"][0](0), tmp_path / "0.pt")
    torch.save(body(1), tmp_path / "1.pt")
    with pytest.raises(ArgumentError, match=r"no part 'netg'; it has 'netG', 'netD'.*did you mean 'netG'"):
        stockpot.plan(linear(tmp_path / "0.pt", part="netg"))
    with pytest.raises(ArgumentError, match="one state dict, and no parts"):
        stockpot.plan(linear(tmp_path / "1.pt", part="netG"))
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / "0.pt"), "part": "netG"}, str(tmp_path / "1.pt")],
    }
    stockpot.merge(recipe, tmp_path / "out")
    close(load_file(tmp_path / "out/model.safetensors"), mean(body(0), body(1)))


def test_a_part_that_only_one_has(tmp_path: Path) -> None:
    torch.save(FILES["OpenNMT"][0](0), tmp_path / "0.pt")
    torch.save({"model": body(1)}, tmp_path / "1.pt")
    for order in ("01", "10"):
        with pytest.raises(MismatchError, match=r"generator\.0\.weight"):
            stockpot.plan(linear(*(tmp_path / f"{n}.pt" for n in order)))


def test_parts_of_a_run(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        torch.save(FILES["OpenNMT"][0](step), tmp_path / f"step_{step}.pt")
    run = {"path": str(tmp_path), "snapshots": "step_{step}.pt", "steps": [20, 30], "part": "generator"}
    stockpot.merge({"merge_method": "linear", "run": run}, tmp_path / "out")
    close(load_file(tmp_path / "out/model.safetensors"), mean(head(20), head(30)))
    done = cli("soup", tmp_path, tmp_path / "two", "--snapshots", "step_{step}.pt", "--last", 2, "--part", "generator")
    assert done.returncode == 0, done.stderr
    close(load_file(tmp_path / "two/model.safetensors"), mean(head(20), head(30)))


def test_inspect_shows_parts_and_what_lies_beside(tmp_path: Path) -> None:
    torch.save(FILES["OpenNMT"][0](0), tmp_path / "0.pt")
    assert (
        "part: generator: 1 tensors, 640 B, names begin with 'generator.'" in cli("inspect", tmp_path / "0.pt").stdout
    )
    llamas(tmp_path)
    torch.save(load_file(tmp_path / "0/model.safetensors"), tmp_path / "0/pytorch_model.bin")
    shown = cli("inspect", tmp_path / "0").stdout
    assert "beside: pytorch_model.bin: not read: the weights again" in shown
    assert "not tied: lm_head.weight = model.embed_tokens.weight (config.json)" in shown
    assert "of LlamaForCausalLM, with the base's prefix 'model.'" in shown


def test_inspect_of_a_base_with_an_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    llamas(tmp_path)
    base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "0")
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    ref = f"{tmp_path}/0+{tmp_path}/lora"
    info = stockpot.inspect(ref)
    assert info["kind"] == "model"
    assert {f["name"] for f in info["files"]} == {"model.safetensors", "adapter_model.safetensors"}
    assert cli("inspect", ref).returncode == 0
    assert (
        cli("plan", _written(tmp_path / "r.yml", f"merge_method: linear\nmodels: ['{ref}']\n")).stdout.count(
            "accounted for"
        )
        == 2
    )


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ending", [".pth", ".pth.tar", ".ckpt"])
def test_images_channels_last(tmp_path: Path, layout: Any, ending: str) -> None:
    states = []
    for n in (0, 1):
        torch.manual_seed(n)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).to(memory_format=layout)
        net.train()(torch.randn(2, 3, 6, 6))
        state = net.state_dict() | {"turned": torch.randn(5, 4).T, "cube": torch.randn(2, 3, 4).permute(2, 0, 1)}
        states.append({k: v.double().clone() for k, v in state.items() if v.is_floating_point()})
        torch.save({"state_dict": state}, tmp_path / f"{n}{ending}")
    stockpot.merge(linear(tmp_path / f"0{ending}", tmp_path / f"1{ending}"), tmp_path / "out")
    got = load_file(tmp_path / "out/model.safetensors")
    close({k: v for k, v in got.items() if v.is_floating_point()}, mean(*states))


# folders


def encoder(path: Path, seed: int) -> None:
    """A sentence encoder with modules that hold weights, saved by sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = Tokenizer(
        models.WordLevel({"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 90)}}, unk_token="[UNK]")
    )
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(seed)
    config = tf.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    inner = path.with_name(path.name + "-hf")
    tf.BertModel(config).save_pretrained(inner)
    fast.save_pretrained(inner)
    norm = LayerNorm(16)
    torch.nn.init.normal_(norm.norm.weight)
    modules = [Transformer(str(inner)), Pooling(32), Dense(32, 24), Dense(24, 16), norm]
    SentenceTransformer(modules=modules, device="cpu").save(str(path))


def test_modules_of_a_sentence_encoder(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    for n in (0, 1):
        encoder(tmp_path / str(n), n)
    plan = stockpot.plan(linear(tmp_path / "0", tmp_path / "1"))
    assert {"2_Dense/model.safetensors", "3_Dense/model.safetensors", "4_LayerNorm/model.safetensors"} < {
        s.name for s in plan.shards
    }
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    stockpot.verify(tmp_path / "out")
    models = [SentenceTransformer(str(tmp_path / n), device="cpu").state_dict() for n in ("0", "1", "out")]
    floats = [{k: v for k, v in m.items() if v.is_floating_point()} for m in models]
    close(floats[2], mean(floats[0], floats[1]))
    # an output is an input like any other
    stockpot.merge(linear(tmp_path / "out", tmp_path / "0"), tmp_path / "again")
    stockpot.verify(tmp_path / "again")


def test_a_module_that_only_one_has(tmp_path: Path) -> None:
    for n in (0, 1):
        encoder(tmp_path / str(n), n)
    modules = json.loads((tmp_path / "1/modules.json").read_text())
    (tmp_path / "1/modules.json").write_text(json.dumps(modules[:-1]))
    with pytest.raises(MismatchError, match="4_LayerNorm/norm"):
        stockpot.plan(linear(tmp_path / "0", tmp_path / "1"))
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1", exclude=["4_LayerNorm/*"]), tmp_path / "out")
    kept = "4_LayerNorm/model.safetensors"
    assert (load_file(tmp_path / "out" / kept)["norm.weight"] == load_file(tmp_path / "0" / kept)["norm.weight"]).all()


def test_the_old_layout_of_encoders(tmp_path: Path) -> None:
    """Everything in folders, the weights pickled: 0_Transformer/pytorch_model.bin, 2_Dense/pytorch_model.bin."""
    from sentence_transformers import SentenceTransformer

    for n in (0, 1):
        encoder(tmp_path / str(n), n)
        top = tmp_path / str(n)
        inside = top / "0_Transformer"
        inside.mkdir()
        for file in list(top.iterdir()):
            if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json"):
                shutil.move(file, inside / file.name)
        modules = json.loads((top / "modules.json").read_text())
        modules[0]["path"] = "0_Transformer"
        (top / "modules.json").write_text(json.dumps(modules))
        for folder in (inside, top / "2_Dense", top / "3_Dense", top / "4_LayerNorm"):
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.bin"))
    models = [SentenceTransformer(str(tmp_path / n), device="cpu").state_dict() for n in ("0", "1", "out")]
    floats = [{k: v for k, v in m.items() if v.is_floating_point()} for m in models]
    close(floats[2], mean(floats[0], floats[1]))


def pipeline(path: Path, seed: int, shards: bool = False) -> dict[str, State]:
    """A folder as diffusers writes it, with tensors of no meaning."""
    g = torch.Generator().manual_seed(seed)
    parts = {
        "unet": {f"down.{i}.weight": torch.randn(6, 5, generator=g) for i in range(3)},
        "vae": {"decoder.weight": torch.randn(7, 3, generator=g)},
        "text_encoder": {"text_model.embed.weight": torch.randn(9, 4, generator=g)},
    }
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    for part, tensors in parts.items():
        index[part] = ["transformers" if part == "text_encoder" else "diffusers", "X"]
        folder = path / part
        folder.mkdir(parents=True)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        (folder / "config.json").write_text(json.dumps({"_class_name": part}))
        if shards and part == "unet":
            names = {}
            for i, (name, tensor) in enumerate(tensors.items()):
                names[name] = f"{stem}-{i + 1:05d}-of-00003.safetensors"
                save_file({name: tensor}, folder / names[name])
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        else:
            save_file(tensors, folder / f"{stem}.safetensors")
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text("{}")
    (path / "model_index.json").write_text(json.dumps(index))
    return parts


@pytest.mark.parametrize("shards", [False, True])
def test_a_pipeline(tmp_path: Path, shards: bool) -> None:
    parts = [pipeline(tmp_path / str(n), n, shards) for n in (0, 1)]
    options = stockpot.Options(shard_size=130) if shards else stockpot.Options()
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out", options)
    for part in parts[0]:
        files = sorted((tmp_path / "out" / part).glob("*.safetensors"))
        got = {k: v for f in files for k, v in load_file(f).items()}
        close(got, mean(parts[0][part], parts[1][part]))
    for copied in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "out" / copied).is_file()
    if shards:
        assert len(list((tmp_path / "out/unet").glob("*.safetensors"))) > 1
        assert (tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").is_file()
    stockpot.verify(tmp_path / "out")
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1", part="vae"), tmp_path / "vae")
    close(load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors"), mean(parts[0]["vae"], parts[1]["vae"]))


def test_parts_in_steps(tmp_path: Path) -> None:
    parts = [pipeline(tmp_path / str(n), n) for n in (0, 1, 2)]
    for method in ("linear", "slerp"):  # streamed, and written first
        text = f"""
name: first
merge_method: {method}
models: [{tmp_path}/0, {tmp_path}/1]
parameters: {{{"t: 0.5" if method == "slerp" else "weight: 0.5"}}}
---
merge_method: linear
models: [first, {tmp_path}/2]
"""
        stockpot.merge(text, tmp_path / method)
        names = {str(p.relative_to(tmp_path / method)) for p in (tmp_path / method).rglob("*.safetensors")}
        assert names == {
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
        }
    first = mean(parts[0]["vae"], parts[1]["vae"])
    close(load_file(tmp_path / "linear/vae/diffusion_pytorch_model.safetensors"), mean(first, parts[2]["vae"]))


def test_killed_and_resumed_with_folders(tmp_path: Path) -> None:
    """A kill in the middle leaves what is done in the folders of the parts, too."""
    for n in (0, 1):
        g = torch.Generator().manual_seed(n)
        pipeline(tmp_path / str(n), n)
        big = {f"blocks.{i}.weight": torch.randn(1024, 2048, generator=g) for i in range(40)}
        save_file(big, tmp_path / str(n) / "unet/diffusion_pytorch_model.safetensors")
    (tmp_path / "r.yml").write_text(f"merge_method: linear\nmodels: [{tmp_path}/0, {tmp_path}/1]\n")
    command = [sys.executable, "-m", "stockpot", "merge", str(tmp_path / "r.yml"), str(tmp_path / "out")]
    started = subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.partial"
    until = time.monotonic() + 60
    while time.monotonic() < until and started.poll() is None:
        if journal.is_dir() and sum(f.stat().st_size for f in journal.glob("*journal*")) > 400:
            break
        time.sleep(0.002)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stockpot.verify(tmp_path / "out")
    both = [load_file(tmp_path / str(n) / "unet/diffusion_pytorch_model.safetensors") for n in (0, 1)]
    close(load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors"), mean(*both))


# heads and other files beside a model


def llamas(tmp_path: Path) -> list[State]:
    for n in (0, 1):
        tiny.tiny(tf.LlamaForCausalLM, tf.LlamaConfig, n).save_pretrained(tmp_path / str(n))
    return [{"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)} for _ in "01"]


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin", "v_head.bin", "extra.safetensors"])
def test_a_head_beside_a_model(tmp_path: Path, name: str) -> None:
    heads = llamas(tmp_path)
    for n in (0, 1):
        write = torch.save if name.endswith(".bin") else save_file
        write(heads[n], tmp_path / str(n) / name)
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    close(load_file(tmp_path / "out" / f"{Path(name).stem}.safetensors"), mean(*heads))
    tf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    (tmp_path / "1" / name).unlink()
    with pytest.raises(MismatchError, match=rf"{Path(name).stem}/v_head"):
        stockpot.plan(linear(tmp_path / "0", tmp_path / "1"))


def test_a_head_beside_an_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny.tiny(tf.LlamaForCausalLM, tf.LlamaConfig, 0)
    heads = []
    for n in (0, 1):
        torch.manual_seed(n)
        get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / str(n))
        heads.append({"v_head.summary.weight": torch.randn(1, 32)})
        save_file(heads[n], tmp_path / str(n) / "value_head.safetensors")
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1", adapter="factors"), tmp_path / "out")
    close(load_file(tmp_path / "out/value_head.safetensors"), mean(*heads))


COPIES = {
    "pytorch_model.bin": "as safetensors are read", "consolidated.safetensors": "their publisher's own layout",
    "model.fp16.safetensors": "holds tensors of the model again", "again.safetensors": "holds tensors of the model again",
}  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_the_weights_are_left_out(tmp_path: Path, name: str) -> None:
    llamas(tmp_path)
    tensors = load_file(tmp_path / "0/model.safetensors")
    (torch.save if name.endswith(".bin") else save_file)(tensors, tmp_path / "0" / name)
    plan = stockpot.plan(linear(tmp_path / "0", tmp_path / "1"))
    assert any(name in n and COPIES[name] in n for n in plan.notes)
    rows = [f for f in plan.account[0]["files"] if f["name"] == name]
    assert [r["fate"] for r in rows] == ["left out"]


def test_every_file_is_accounted_for(tmp_path: Path) -> None:
    llamas(tmp_path)
    for name in ("optimizer.pt", "trainer_state.json", "tokenizer.json", "photo.png", "notes.txt"):
        (tmp_path / "0" / name).write_text("{}")
    plan = stockpot.plan(linear(tmp_path / "0", tmp_path / "1"))
    fates = {f["name"]: f["fate"] for f in plan.account[0]["files"]}
    assert fates == {
        "config.json": "written anew",
        "generation_config.json": "copied",
        "model.safetensors": "read",
        "notes.txt": "copied",
        "optimizer.pt": "left out",
        "photo.png": "left out",
        "tokenizer.json": "copied",
        "trainer_state.json": "left out",
    }
    tensors = plan.account[0]["tensors"]
    assert tensors["merged"] + tensors["copied"] == len(open_checkpoint(tmp_path / "0"))
    result = stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    assert result.lineage["account"] == json.loads(json.dumps(plan.to_dict()["account"]))


def test_slices_account_for_what_they_don_t_take(tmp_path: Path) -> None:
    llamas(tmp_path)
    pieces = [{"sources": [{"model": str(tmp_path / "0"), "layer_range": [0, 3]}]}]
    (row,) = stockpot.plan({"merge_method": "passthrough", "slices": pieces}).account
    (left,) = row["tensors"]["left_out"]
    assert left["why"] == "of layers that the recipe does not take"
    assert all(n.startswith("model.layers.3.") for n in left["names"])


def test_modules_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    encoder(tmp_path / "0", 0)
    modules = json.loads((tmp_path / "0/modules.json").read_text())
    modules[2]["path"] = "../0-hf"
    (tmp_path / "0/modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"names '../0-hf', which lies outside"):
        open_checkpoint(tmp_path / "0")
    (tmp_path / "0/modules.json").write_text("[")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(tmp_path / "0")


def test_weights_under_a_name_that_nobody_knows(tmp_path: Path) -> None:
    pipeline(tmp_path / "0", 0)
    shutil.move(tmp_path / "0/vae/diffusion_pytorch_model.safetensors", tmp_path / "0/vae/mine.safetensors")
    with pytest.raises(StockpotError, match=r"vae/ holds weights under a name that is not known: mine.safetensors"):
        open_checkpoint(tmp_path / "0")


def test_out_may_not_hold_the_files_of_an_input(tmp_path: Path) -> None:
    for n in (0, 1):
        encoder(tmp_path / str(n), n)
    before = load_file(tmp_path / "1/2_Dense/model.safetensors")
    with pytest.raises(StockpotError, match="is or holds the input"):
        stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "1/2_Dense", overwrite=True)
    close(load_file(tmp_path / "1/2_Dense/model.safetensors"), before)
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "1/merged")  # within one, beside its files


def test_a_model_of_pickles_beside_safetensors(tmp_path: Path) -> None:
    """The only safetensors file is not the model where a pytorch_model.bin is."""
    for n in (0, 1):
        (tmp_path / str(n)).mkdir()
        torch.save(body(n), tmp_path / str(n) / "pytorch_model.bin")
        save_file(head(n), tmp_path / str(n) / "classifier.safetensors")
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    close(load_file(tmp_path / "out/model.safetensors"), mean(body(0), body(1)))
    close(load_file(tmp_path / "out/classifier.safetensors"), mean(head(0), head(1)))


@pytest.mark.parametrize("name", ["mm_projector.bin", "mtp.pt", "model.mtp.safetensors", "pytorch_model_head.bin"])
def test_whatever_lies_beside_is_merged(tmp_path: Path, name: str) -> None:
    heads = llamas(tmp_path)
    for n in (0, 1):
        (save_file if name.endswith(".safetensors") else torch.save)(heads[n], tmp_path / str(n) / name)
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    close(load_file(tmp_path / "out" / f"{name.rpartition('.')[0]}.safetensors"), mean(*heads))


def test_a_file_that_has_one_of_the_models_names(tmp_path: Path) -> None:
    heads = llamas(tmp_path)
    for n in (0, 1):
        save_file(heads[n] | {"model.norm.weight": torch.full((32,), float(n))}, tmp_path / str(n) / "more.safetensors")
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    assert (load_file(tmp_path / "out/more.safetensors")["model.norm.weight"] == 0.5).all()


def test_a_part_that_only_the_second_has(tmp_path: Path) -> None:
    heads = llamas(tmp_path)
    save_file(heads[1], tmp_path / "1/value_head.safetensors")
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1", absent="skip"), tmp_path / "out")
    close(load_file(tmp_path / "out/value_head.safetensors"), {k: v.double() for k, v in heads[1].items()})
    assert not any("/" in n for n in load_file(tmp_path / "out/model.safetensors"))


def test_folders_that_nothing_names_are_named(tmp_path: Path) -> None:
    llamas(tmp_path)
    (tmp_path / "0/vision-lora").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "0/vision-lora/model.safetensors")
    assert any(
        "vision-lora/': left out: a folder with weights" in n for n in stockpot.plan(linear(tmp_path / "0")).notes
    )


def test_quantised_parts_are_refused(tmp_path: Path) -> None:
    pipeline(tmp_path / "0", 0)
    (tmp_path / "0/text_encoder/config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    with pytest.raises(CheckpointError, match="text_encoder/ is quantised"):
        open_checkpoint(tmp_path / "0")


def test_settings_of_parts_that_differ_are_said(tmp_path: Path) -> None:
    for n in (0, 1):
        pipeline(tmp_path / str(n), n)
    (tmp_path / "1/scheduler/scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    notes = stockpot.plan(linear(tmp_path / "0", tmp_path / "1")).notes
    assert any("scheduler/scheduler_config.json': not the settings of" in n for n in notes)


def test_heads_are_one_file_whatever_the_size(tmp_path: Path) -> None:
    for n in (0, 1):
        encoder(tmp_path / str(n), n)
    stockpot.merge(linear(tmp_path / "0", tmp_path / "1"), tmp_path / "out", stockpot.Options(shard_size=300))
    assert [f.name for f in (tmp_path / "out/2_Dense").glob("*.safetensors")] == ["model.safetensors"]
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    stockpot.verify(tmp_path / "out")


def test_factors_without_a_config_are_not_averaged(tmp_path: Path) -> None:
    """kohya's and diffusers' LoRA files."""
    for n in (0, 1):
        names = ("lora_unet_down_0.lora_down.weight", "lora_unet_down_0.lora_up.weight", "lora_unet_down_0.alpha")
        save_file({name: torch.ones(4, 4) for name in names}, tmp_path / f"{n}.safetensors")
    with pytest.raises(MismatchError, match=r"'lora_unet_down_0.lora_down.weight' is a factor of a LoRA"):
        stockpot.plan(linear(tmp_path / "0.safetensors", tmp_path / "1.safetensors"))
    stockpot.inspect(tmp_path / "0.safetensors")


def test_an_adapter_of_a_compiled_model(tmp_path: Path) -> None:
    """PEFT finds what is averaged: no part of its names is the compiler's."""
    from peft import LoraConfig, PeftModel, get_peft_model

    llamas(tmp_path)
    for n in (0, 1):
        base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "0")
        torch.manual_seed(n)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(tmp_path / f"lora{n}")
        file = tmp_path / f"lora{n}/adapter_model.safetensors"
        save_file({f"_orig_mod.{k}": v for k, v in load_file(file).items()}, file)
    for mode in ("factors", "product"):
        stockpot.merge(linear(tmp_path / "lora0", tmp_path / "lora1", adapter=mode), tmp_path / mode)
        loaded = PeftModel.from_pretrained(tf.LlamaForCausalLM.from_pretrained(tmp_path / "0"), tmp_path / mode)
        assert all(p.abs().max() > 0 for n, p in loaded.named_parameters() if "lora_B" in n)


def test_tokens_whose_rows_are_cut_off(tmp_path: Path) -> None:
    for n, size in ((0, 96), (1, 90)):
        model = tf.LlamaForCausalLM(tiny.tiny(tf.LlamaForCausalLM, tf.LlamaConfig, n).config)
        model.resize_token_embeddings(size)
        model.save_pretrained(tmp_path / str(n))
        (tmp_path / str(n) / "vocab.json").write_text(json.dumps({f"t{i}": i for i in range(size)}))
    with pytest.raises(MismatchError, match=r"gives 't95' row 95, and 90 rows are kept; .*tokenizer_source: .*/1"):
        stockpot.plan(linear(tmp_path / "0", tmp_path / "1", vocab="crop"))
    stockpot.plan(linear(tmp_path / "0", tmp_path / "1", vocab="crop", tokenizer_source=str(tmp_path / "1")))


def test_a_folder_of_folders_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "unet").mkdir(parents=True)
    save_file({"w": torch.ones(2)}, folder / "unet/model.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights of its own, but folders with some \(unet/\): name one") as e:
        open_checkpoint(folder)
    assert list(open_checkpoint(str(e.value).rpartition("them, ")[2]).names()) == ["w"]
