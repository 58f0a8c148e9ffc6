"""Low-rank algebra against PEFT: scales, patterns, kinds of layers, and what can't be averaged as products."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stockpot
from stockpot.adapters import factors_report, read_adapter
from stockpot.adapters.algebra import mean_error
from stockpot.checkpoints import open_checkpoint
from stockpot.errors import CheckpointError, MismatchError, StockpotError
from stockpot.methods.factors import stacked, truncated

from helpers import cli, write_model

WEIGHTS = (0.2, 0.5, 0.3)


class Net(torch.nn.Module):
    """Every kind of layer that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, 12)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(12, 12) for _ in range(12)])
        self.wide = torch.nn.Linear(12, 30)
        self.conv = torch.nn.Conv2d(1, 6, 3, padding=1)
        self.head = torch.nn.Linear(6 * 30, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x).mean(1)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        h = self.wide(h)
        return self.head(self.conv(h[:, None, None, :]).flatten(1))


def inputs() -> torch.Tensor:
    return torch.randint(0, 20, (6, 4), generator=torch.Generator().manual_seed(3))


def snapshots(
    model: Any, folder: Path, options: Mapping[str, Any], count: int = 3, dtype: torch.dtype = torch.float32
) -> list[Path]:
    """`count` adapters with random factors, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    paths = []
    for i in range(count):
        torch.manual_seed(100)
        peft = get_peft_model(model(), LoraConfig(**options)).to(dtype)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for name, p in peft.named_parameters():
                if p.requires_grad:
                    p.add_((torch.randn(p.shape, generator=generator) * 0.2).to(dtype))
                assert name
        path = folder / f"checkpoint-{i + 1}"
        peft.save_pretrained(str(path), save_embedding_layers=False)
        paths.append(path)
    return paths


def base_net() -> Net:
    torch.manual_seed(7)
    return Net()


def dense(model: Any, path: Path) -> dict[str, torch.Tensor]:
    """The full weights that PEFT makes of base and adapter."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model(), str(path)).double().merge_and_unload()
    return dict(merged.state_dict())


def oracle(model: Any, paths: list[Path]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for weight, path in zip(WEIGHTS, paths):
        for name, tensor in dense(model, path).items():
            total[name] = total.get(name, 0) + weight * tensor.double()
    return total


CASES: dict[str, dict[str, Any]] = {
    "linear": {"r": 3, "lora_alpha": 6, "target_modules": ["wide", "layers.1", "layers.11"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["wide", "layers.2"]},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": r".*layers\.\d+|wide",
        "rank_pattern": {"layers.1": 2, r"layers\.(4|5)": 6}, "alpha_pattern": {"layers.11": 3, "wide": 1},
    },
    "embedding": {"r": 3, "lora_alpha": 5, "target_modules": ["embed", "wide"]},
    "convolution": {"r": 3, "lora_alpha": 5, "target_modules": ["conv", "layers.0"]},
    "saved modules": {"r": 2, "target_modules": ["wide"], "modules_to_save": ["head"]},
    "biases": {"r": 2, "target_modules": ["wide", "layers.3"], "bias": "all"},
    "biases of lora": {"r": 2, "target_modules": ["wide", "layers.3"], "bias": "lora_only"},
    "bias on B": {"r": 2, "lora_alpha": 3, "target_modules": ["wide"], "lora_bias": True},
}  # fmt: skip


def make(paths: list[Path], out: Path, **adapter: Any) -> stockpot.MergeResult:
    models = [{"model": str(p), "parameters": {"weight": w}} for p, w in zip(paths, WEIGHTS)]
    return stockpot.merge({"merge_method": "linear", "models": models, "adapter": adapter}, out)


@pytest.mark.parametrize("case", CASES)
def test_product_is_the_average_of_the_full_weights(case: str, tmp_path: Path) -> None:
    from peft import PeftModel

    paths = snapshots(base_net, tmp_path, CASES[case])
    make(paths, tmp_path / "out", mode="product")
    exact = oracle(base_net, paths)
    merged = PeftModel.from_pretrained(base_net(), str(tmp_path / "out"))
    result = merged(inputs())
    found = merged.double().merge_and_unload().state_dict()
    assert set(found) == set(exact)
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), exact[name], atol=2e-6), name
    net = base_net()
    net.load_state_dict({k: v.float() for k, v in exact.items()})
    assert torch.allclose(result, net(inputs()), atol=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if c != "bias on B"])
def test_fused_is_the_average_of_the_full_weights(case: str, tmp_path: Path) -> None:
    paths = snapshots(base_net, tmp_path, CASES[case])
    (tmp_path / "base").mkdir()
    save_file(base_net().state_dict(), tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text('{"model_type": "net"}')
    make(paths, tmp_path / "out", mode="fused", base=str(tmp_path / "base"))
    exact = oracle(base_net, paths)
    found = load_file(tmp_path / "out/model.safetensors")
    assert set(found) == set(exact)
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), exact[name], atol=2e-6), name
    lineage = stockpot.verify(tmp_path / "out")
    assert [len(part["files"]) for part in lineage["inputs"][0]["parts"]] == [1, 1, 1, 1]
    assert all(f["tensors_read"] == f["tensors"] for p in lineage["inputs"][0]["parts"] for f in p["files"])


@pytest.mark.parametrize("rank", [1, 4, 9, 50])
def test_recompressed(rank: int, tmp_path: Path) -> None:
    """The best approximation of that rank, and its error as reported."""
    from peft import PeftModel

    paths = snapshots(base_net, tmp_path, CASES["linear"])
    result = make(paths, tmp_path / "out", mode="product", rank=rank)
    exact = oracle(base_net, paths)
    found = PeftModel.from_pretrained(base_net(), str(tmp_path / "out")).double().merge_and_unload().state_dict()
    own = base_net().double().state_dict()
    assert result.adapter is not None
    lost = whole = 0.0
    for module, error in result.adapter["modules"].items():
        delta = exact[f"{module}.weight"] - own[f"{module}.weight"]
        values = torch.linalg.svdvals(delta)
        best = float(values[rank:].norm())
        off = float((found[f"{module}.weight"] - exact[f"{module}.weight"]).norm())
        assert off == pytest.approx(best, abs=2e-5)
        assert error == pytest.approx(best / float(values.norm()), abs=1e-6)
        lost, whole = lost + best**2, whole + float(values.norm()) ** 2
    assert result.adapter["relative_error"] == pytest.approx((lost / whole) ** 0.5, abs=1e-6)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == min(rank, 9)


def test_gpt2_conv1d(tmp_path: Path) -> None:
    """fan_in_fan_out: the weight is stored transposed."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "base"
    )

    def model() -> Any:
        return GPT2LMHeadModel.from_pretrained(tmp_path / "base")

    options = {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    paths = snapshots(model, tmp_path, options)
    exact = oracle(model, paths)
    for mode in ("product", "fused"):
        make(paths, tmp_path / mode, mode=mode, **({"base": str(tmp_path / "base")} if mode == "fused" else {}))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict()
    assert all(torch.allclose(merged[n].double(), exact[n], atol=2e-6) for n in exact)
    from peft import PeftModel

    product = PeftModel.from_pretrained(model(), str(tmp_path / "product")).double().merge_and_unload().state_dict()
    assert all(torch.allclose(product[n], exact[n], atol=2e-6) for n in exact)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_fused_head_and_embedding(target: str, tmp_path: Path) -> None:
    """PEFT saves the base's own weight beside the factors of these."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=[target, "q_proj"]))
    with torch.no_grad():
        for p in peft.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    peft.save_pretrained(tmp_path / "checkpoint-1")
    assert any("base_layer" in n for n in load_file(tmp_path / "checkpoint-1/adapter_model.safetensors"))
    stockpot.soup(tmp_path, tmp_path / "out", adapter="fused", base=tmp_path / "base")
    exact = peft.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.allclose(found[n], exact[n], atol=2e-6) for n in exact)


def test_fused_square_conv1d_beside_linear(tmp_path: Path) -> None:
    """PEFT keeps one fan_in_fan_out for all, that of the last module: the base's architecture knows better."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "base")

    def model() -> Any:
        return GPT2ForSequenceClassification.from_pretrained(tmp_path / "base")

    paths = snapshots(model, tmp_path, {"r": 2, "target_modules": ["attn.c_proj", "score"]})
    assert json.loads((paths[0] / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    make(paths, tmp_path / "out", mode="fused", base=str(tmp_path / "base"))
    exact = oracle(model, paths)
    found = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), exact[name], atol=2e-6), name


def test_names_that_end_alike(tmp_path: Path) -> None:
    """Ranks by module must reach the right ones when PEFT matches the ends of names."""
    from peft import PeftModel

    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleDict({"fc": torch.nn.Linear(6, 6)})
            self.fc = torch.nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.inner["fc"](x))

    def model() -> Any:
        torch.manual_seed(5)
        return Nested()

    for ranks in ({"^fc": 2}, {"inner.fc": 4}):
        folder = tmp_path / str(len(ranks)) / next(iter(ranks)).strip("^")
        paths = snapshots(model, folder, {"r": 3, "target_modules": ["fc"], "rank_pattern": ranks})
        make(paths, folder / "out", mode="product")
        found = PeftModel.from_pretrained(model(), str(folder / "out")).double().merge_and_unload().state_dict()
        exact = oracle(model, paths)
        assert all(torch.allclose(found[n], exact[n], atol=2e-6) for n in exact)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
        ({"init_lora_weights": "olora"}, "changes the base's weights"),
        ({"alora_invocation_tokens": [3]}, "acts on some tokens only"),
        ({"lora_alpha": float("nan")}, "not a number"),
        ({"lora_alpha": 10**400}, "not a number"),
        ({"target_parameters": ["x"]}, "expert parameters"),
    ],
)
def test_adapters_without_a_product(change: Mapping[str, Any], said: str, tmp_path: Path) -> None:
    """Refused as products, averaged as factors without a report."""
    paths = snapshots(base_net, tmp_path / "run", {"r": 2, "target_modules": ["wide"]}, count=2)
    for path in paths:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | dict(change)))
    with pytest.raises(stockpot.StockpotError, match=said):
        stockpot.soup(tmp_path / "run", tmp_path / "out", adapter="product")
    if "lora_alpha" not in change or change["lora_alpha"] == change["lora_alpha"]:
        stockpot.soup(tmp_path / "run", tmp_path / "out", adapter="factors")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_grouped_convolution_is_averaged_as_factors(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(2)
        return torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.Flatten(), torch.nn.Linear(8, 2))

    snapshots(model, tmp_path / "run", {"r": 4, "target_modules": ["0"]}, count=2)
    result = stockpot.soup(tmp_path / "run", tmp_path / "out")
    assert result.adapter is None
    with pytest.raises(StockpotError, match="don't multiply"):
        stockpot.soup(tmp_path / "run", tmp_path / "other", adapter="product")


def test_bfloat16_adapters(tmp_path: Path) -> None:
    paths = snapshots(lambda: base_net().bfloat16(), tmp_path, CASES["linear"], dtype=torch.bfloat16)
    """Weights and scales in B need more digits than bfloat16 has: written in float32, unless a dtype is asked for."""
    make(paths, tmp_path / "out", mode="product")
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    exact, found = oracle(base_net, paths), dense(base_net, tmp_path / "out")
    assert all(torch.allclose(found[n], exact[n], atol=2e-6) for n in exact)
    models = [{"model": str(p)} for p in paths]
    recipe = {"merge_method": "linear", "models": models, "adapter": "product", "dtype": "bfloat16"}
    stockpot.merge(recipe, tmp_path / "narrow")
    name = "base_model.model.wide.lora_A.weight"
    parts = [load_file(p / "adapter_model.safetensors")[name] for p in paths]
    assert torch.equal(load_file(tmp_path / "narrow/adapter_model.safetensors")[name], torch.cat(parts))


def test_adapters_of_different_ranks_add_up(tmp_path: Path) -> None:
    paths = []
    for i, rank in enumerate((2, 3, 5)):
        options = {"r": rank, "lora_alpha": 4, "target_modules": ["wide", "layers.1"]}
        paths += snapshots(base_net, tmp_path / str(i), options, count=1)
    make(paths, tmp_path / "out", mode="product")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 10
    exact = oracle(base_net, paths)
    found = dense(base_net, tmp_path / "out")
    assert all(torch.allclose(found[n], exact[n], atol=2e-6) for n in exact)


def test_dora_is_averaged_as_factors_only(tmp_path: Path) -> None:
    from peft import PeftModel

    paths = snapshots(base_net, tmp_path, {"r": 2, "target_modules": ["wide"], "use_dora": True})
    for mode in ({"mode": "product"}, {"mode": "fused", "base": str(paths[0])}):
        with pytest.raises(MismatchError, match=r"DoRA adapter.*average it as factors"):
            make(paths, tmp_path / "out", **mode)
    make(paths, tmp_path / "out", mode="factors")
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    parts = [load_file(p / "adapter_model.safetensors") for p in paths]
    for name, tensor in found.items():
        assert torch.allclose(tensor, sum(w * p[name] for w, p in zip(WEIGHTS, parts)), atol=1e-6)
    assert torch.isfinite(PeftModel.from_pretrained(base_net(), str(tmp_path / "out"))(inputs())).all()


def test_reported_error_of_factors(tmp_path: Path) -> None:
    paths = snapshots(base_net, tmp_path, CASES["linear"])
    adapters = [read_adapter(open_checkpoint(p)) for p in paths]
    report = factors_report(adapters, WEIGHTS)
    make(paths, tmp_path / "out", mode="factors")
    exact, found, own = oracle(base_net, paths), dense(base_net, tmp_path / "out"), base_net().double().state_dict()
    lost = whole = 0.0
    for module, error in report["modules"].items():
        name = f"{module}.weight"
        off, size = float((found[name] - exact[name]).norm()), float((exact[name] - own[name]).norm())
        assert error == pytest.approx(off / size, rel=1e-4)
        lost, whole = lost + off**2, whole + size**2
    assert report["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert report["worst_error"] == max(report["modules"].values())
    same = factors_report([adapters[0]] * 3, WEIGHTS)
    assert same["relative_error"] < 1e-6


def test_algebra() -> None:
    rng = np.random.default_rng(0)
    factors = [(c, rng.normal(size=(r, 7)), rng.normal(size=(9, r))) for c, r in ((0.5, 2), (-1.5, 3), (2.0, 1))]
    dense = sum(c * b @ a for c, a, b in factors)
    a, b = stacked(factors)
    assert np.allclose(b @ a, dense)
    for rank in (1, 4, 6, 8):
        low_a, low_b, lost, whole = truncated(a, b, rank)
        assert low_a.shape == (rank, 7)
        values = np.linalg.svd(dense, compute_uv=False)
        assert np.linalg.norm(low_b @ low_a - dense) == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-9)
        assert lost == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-9)
        assert whole == pytest.approx(np.linalg.norm(dense))
    zero = truncated(np.zeros((2, 5)), np.zeros((4, 2)), 2)
    assert np.isfinite(zero[0]).all()
    pairs = [(w, 2.0, rng.normal(size=(3, 7)), rng.normal(size=(9, 3))) for w in WEIGHTS]
    exact = sum(w * s * b @ a for w, s, a, b in pairs)
    apart = 2.0 * sum(w * b for w, _, _, b in pairs) @ sum(w * a for w, _, a, _ in pairs)
    off, whole = mean_error(pairs)
    assert off == pytest.approx(np.linalg.norm(exact - apart))
    assert whole == pytest.approx(np.linalg.norm(exact))


def test_what_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    one = snapshots(base_net, tmp_path / "a", CASES["linear"], count=2)
    other = snapshots(base_net, tmp_path / "b", {"r": 3, "target_modules": ["wide"]}, count=1)
    with pytest.raises(MismatchError, match=r"adapt different modules: layers.1, layers.11"):
        make([one[0], other[0]], tmp_path / "out", mode="product")
    with pytest.raises(MismatchError, match=r"adapts 'layers.1.weight', which .* does not have"):
        make(one, tmp_path / "out", mode="fused", base=str(tiny_llama))
    with pytest.raises(stockpot.StockpotError, match=r"fused needs the base model.*give adapter.base"):
        make(one, tmp_path / "out", mode="fused")
    config = json.loads((one[0] / "adapter_config.json").read_text())
    for change, said in [
        ({"r": 7}, "factors of rank 3, adapter_config.json says 7"),
        ({"peft_type": "IA3"}, "known for LoRA adapters only"),
        ({"lora_alpha": "x"}, "not a number"),
        ({"rank_pattern": {"(": 3}}, "is not a pattern"),
    ]:
        copy = tmp_path / "copy"
        shutil.copytree(one[0], copy)
        (copy / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=said):
            read_adapter(open_checkpoint(copy))
        shutil.rmtree(copy)
    tensors = load_file(one[0] / "adapter_model.safetensors")
    del tensors["base_model.model.wide.lora_B.weight"]
    save_file(tensors, one[0] / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="one of its two factors is missing"):
        read_adapter(open_checkpoint(one[0]))


def test_integers_are_no_factors_and_no_base(tmp_path: Path) -> None:
    paths = snapshots(base_net, tmp_path, {"r": 2, "target_modules": ["wide"]}, count=2)
    (tmp_path / "base").mkdir()
    state = base_net().state_dict() | {"wide.weight": torch.zeros(30, 12, dtype=torch.int8)}
    save_file(state, tmp_path / "base/model.safetensors")
    with pytest.raises(MismatchError, match="nothing can be added"):
        make(paths, tmp_path / "out", mode="fused", base=str(tmp_path / "base"))
    tensors = {k: v.to(torch.int8) for k, v in load_file(paths[0] / "adapter_model.safetensors").items()}
    save_file(tensors, paths[0] / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="no dtype of a factor"):
        make(paths, tmp_path / "out", mode="product")


def test_tied_weights_are_not_fused(tmp_path: Path) -> None:
    """A change of a tied embedding would change its twin."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def model() -> Any:
        return LlamaForCausalLM.from_pretrained(tmp_path / "base")

    for target in ("embed_tokens", "lm_head"):
        paths = snapshots(model, tmp_path / target, {"r": 2, "target_modules": [target]})
        with pytest.raises(MismatchError, match="tie"):
            make(paths, tmp_path / "out", mode="fused", base=str(tmp_path / "base"))


@pytest.fixture(scope="module")
def large_adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base whose matrices are cut into many pieces, and three snapshots of an adapter of it."""
    import json

    root = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    names = {
        f"model.layers.{i}.mlp.{p}_proj.weight": s
        for i in range(2)
        for p, s in (("up", (3000, 900)), ("down", (900, 3000)))
    }
    write_model(root / "base", {n: torch.randn(s, generator=generator).bfloat16() * 0.02 for n, s in names.items()})
    paths = []
    for k in range(3):
        factors = {}
        for n, (rows, columns) in names.items():
            stem = f"base_model.model.{n.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
            factors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
        folder = root / "run" / f"checkpoint-{k + 1}"
        folder.mkdir(parents=True)
        save_file(factors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "down_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        paths.append(folder)
    return root / "base", paths


def test_fused_is_the_same_for_any_threads_and_memory(large_adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Of matrices that are cut: other memory, other blocks."""
    base, paths = large_adapters
    outs = []
    for threads, memory in (("1", "100MiB"), ("2", "512MiB"), ("3", "130MiB")):
        out = tmp_path / threads
        done = cli("soup", paths[0].parent, out, "--adapter", "fused", "--base", base, "--threads", threads,
                   "--max-memory", memory)  # fmt: skip
        assert done.returncode == 0, done.stderr
        outs.append((out / "model.safetensors").read_bytes())
    assert outs[0] == outs[1] == outs[2]
    recipe = {
        "merge_method": "linear",
        "models": list(map(str, paths)),
        "adapter": {"mode": "fused", "base": str(base)},
    }
    limits = [stockpot.Options(threads=1, max_memory=m) for m in ("60MiB", "512MiB")]
    blocks = [stockpot.plan(recipe, options).budget.block_pieces for options in limits]
    assert blocks[0] < blocks[1]


def test_lineage_of_parts_after_resume(lora_run: Path, tmp_path: Path) -> None:
    """Digests of the parts and the errors of modules cover everything: in a fresh merge, after half of the work, and when
    nothing was left to read."""
    import shutil

    from stockpot.engine import devices, loop, run

    factors = stockpot.soup(lora_run, tmp_path / "factors")
    expected = [i["files"][0]["digest"] for i in factors.lineage["inputs"]]
    rank = {"adapter": "product", "rank": 3}
    whole = stockpot.soup(lora_run, tmp_path / "whole", **rank)  # type: ignore[arg-type]
    assert [i["files"][0]["digest"] for i in whole.lineage["inputs"] if i.get("role") != "factors"] == expected
    assert len(whole.lineage["adapter"]["modules"]) == 4
    planned = stockpot.plan(stockpot.soup_recipe(lora_run, **rank))  # type: ignore[arg-type]
    real = loop.Loop._settle
    settled: list[int] = []

    def stops(self: Any, rows: Any, *args: Any) -> None:
        real(self, rows, *args)
        settled.append(len(rows))
        if len(settled) == most:
            raise KeyboardInterrupt

    for most, name in ((1, "half"), (10**6, "all")):  # noqa: B007
        settled.clear()
        loop.Loop._settle = stops  # type: ignore[method-assign]
        try:
            run.run_plan(planned, str(tmp_path / name), devices.NumpyDevice()).release()
        except KeyboardInterrupt:
            pass
        finally:
            loop.Loop._settle = real  # type: ignore[method-assign]
        resumed = stockpot.soup(lora_run, tmp_path / name, **rank)  # type: ignore[arg-type]
        assert resumed.lineage["bytes_resumed"] > 0
        own = [i for i in resumed.lineage["inputs"] if i.get("role") != "factors"]
        assert [i["files"][0]["digest"] for i in own] == expected
        assert resumed.adapter == whole.adapter
        shutil.rmtree(tmp_path / name)


# base+adapter, as mergekit's recipes write it


@pytest.fixture
def llama_adapters(tiny_llama: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base in bfloat16 and two adapters of different ranks, saved by PEFT."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    paths = []
    for i, options in enumerate(
        ({"r": 2, "target_modules": ["q_proj", "up_proj"]}, {"r": 4, "target_modules": ["v_proj"]})
    ):
        (tmp_path / f"run{i}").mkdir()
        paths += snapshots(fresh, tmp_path / f"run{i}", {**options, "task_type": "CAUSAL_LM"}, count=1)
    return tmp_path / "base", paths


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return dict(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())


def test_base_plus_adapter(llama_adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Deltas are not rounded to the base's bfloat16 before they are merged; the output is, once."""
    base, adapters = llama_adapters
    models = [{"model": f"{base}+{a}", "parameters": {"weight": w}} for a, w in zip(adapters, (0.7, 0.2))]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    result = stockpot.merge(recipe, tmp_path / "out")
    start = {k: v.double() for k, v in load_file(base / "model.safetensors").items()}
    experts = [merged_by_peft(base, a) for a in adapters]
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in out.items():
        exact = start[name] + 0.7 * (experts[0][name] - start[name]) + 0.2 * (experts[1][name] - start[name])
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor, exact.float().to(torch.bfloat16)), name
    assert [p["path"] for p in result.lineage["inputs"][1]["parts"]] == [str(base), str(adapters[0])]
    stockpot.verify(tmp_path / "out")


def test_ways_to_name_base_and_adapter(llama_adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """mergekit's short and long form, relative to the recipe, with a + in the names of folders; and as the base."""
    base, adapters = llama_adapters
    base.rename(tmp_path / "c++ base")
    adapters[0].rename(tmp_path / "a+b")
    outs = []
    for i, model in enumerate(
        ("c++ base+a+b", f"{tmp_path}/c++ base+{tmp_path}/a+b", "{model: {path: c++ base}, lora: {path: a+b}}",
         "{path: c++ base, lora: a+b}")
    ):  # fmt: skip
        recipe = tmp_path / f"{i}.yml"
        recipe.write_text(f"merge_method: passthrough\nmodels:\n  - model: {model}\n")
        stockpot.merge(recipe, tmp_path / f"out{i}")
        outs.append((tmp_path / f"out{i}" / "model.safetensors").read_bytes())
    assert len(set(outs)) == 1
    exact = merged_by_peft(tmp_path / "c++ base", tmp_path / "a+b")
    for name, tensor in load_file(tmp_path / "out0" / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].float().to(torch.bfloat16)), name
    as_base = f"merge_method: linear\nbase_model: c++ base+a+b\nmodels: [c++ base+a+b, c++ base+{adapters[1]}]\n"
    (tmp_path / "as_base.yml").write_text(as_base)
    assert len(stockpot.plan(tmp_path / "as_base.yml").inputs) == 2


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{base}+nowhere", "nowhere: no such file"),
        ("nowhere+{adapter}", "nowhere+/"),
        ("{base}+{adapter}+{adapter}", "one adapter a model"),
        ("{base}xx+y/z", "basexx+y/z: no such file"),
        ("{base}+{base}", "a full model; expected a LoRA adapter"),
        ("{adapter}+{adapter}", "a base must be a full model"),
        ("{base}+", "no such file"),
        ("{base}+{pissa}", "PEFT changes the base as it loads this adapter"),
        ("{small}+{adapter}", "up_proj"),
    ],
)
def test_base_plus_adapter_that_does_not_fit(
    model: str, said: str, llama_adapters: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, (adapter, _) = llama_adapters
    pissa, small = tmp_path / "pissa", tmp_path / "small"
    shutil.copytree(adapter, pissa)
    config = json.loads((pissa / "adapter_config.json").read_text())
    (pissa / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    small.mkdir()
    save_file({"model.embed_tokens.weight": torch.zeros(64, 32)}, small / "model.safetensors")
    ref = model.format(base=base, adapter=adapter, pissa=pissa, small=small)
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels:\n  - model: {ref}\n")
    done = cli("merge", recipe, tmp_path / "out")
    assert done.returncode in (2, 3), done.stderr
    assert said in " ".join(done.stderr.split())
    assert "r.yml:3" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_step_is_no_base_of_an_adapter(llama_adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (adapter, _) = llama_adapters
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"name: avg\nmerge_method: linear\nmodels: [{base}, {base}]\n---\n"
        f"merge_method: linear\nmodels: [avg+{adapter}, {base}]\n"
    )
    with pytest.raises(StockpotError, match=r"'avg' is a step, and steps can't be part of base.adapter"):
        stockpot.plan(recipe)


def test_an_adapter_that_changes_before_a_resume(llama_adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Its scale decides the bytes like its tensors do: what was merged with another one is not taken over."""
    base, (adapter, _) = llama_adapters
    recipe = {"merge_method": "passthrough", "models": [f"{base}+{adapter}"]}
    before = stockpot.plan(recipe).identity
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 80}))
    assert stockpot.plan(recipe).identity != before
