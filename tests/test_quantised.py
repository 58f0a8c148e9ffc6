"""FP8 checkpoints are read as real numbers; other quantised ones are refused with the way out."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

import stockpot
from stockpot.checkpoints import ReadRequest, open_checkpoint
from stockpot.errors import CheckpointError

from fp8 import quantise, settings, write_fp8
from helpers import CONFIG, SHAPES, load, write_model


@pytest.mark.parametrize("how", ["tensor", "row", "block", "compressed block"])
def test_fp8_is_read_as_what_it_means(how, tmp_path):
    meant = write_fp8(tmp_path / "m", how, 0)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert set(checkpoint.names()) == set(meant)
    assert "quantization_config" not in checkpoint.config
    for name, tensor in meant.items():
        n = tensor.numel()
        expected = tensor.view(torch.uint8).numpy().tobytes()
        for start, stop in [(0, n), (1, n - 1), (n // 3, n // 3 + 7), (n // 2 + 5, n), (63, min(130, n))]:
            raw = bytearray(2 * (stop - start))
            checkpoint.read([ReadRequest(name, start, stop)], memoryview(raw))
            assert raw == expected[2 * start : 2 * stop], (name, start, stop)


@pytest.mark.parametrize("how", ["tensor", "block"])
def test_merging_fp8_models_is_merging_what_they_mean(how, tmp_path):
    for i in range(2):
        write_model(tmp_path / f"plain{i}", write_fp8(tmp_path / f"m{i}", how, i))
    for method in ({"merge_method": "linear"}, {"merge_method": "slerp", "parameters": {"t": 0.3}}):
        stockpot.merge({**method, "models": [tmp_path / "m0", tmp_path / "m1"]}, tmp_path / "a", overwrite=True)
        stockpot.merge({**method, "models": [tmp_path / "plain0", tmp_path / "plain1"]}, tmp_path / "b", overwrite=True)
        a, b = load(tmp_path / "a"), load(tmp_path / "b")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in b)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"
    lineage = stockpot.verify(tmp_path / "a")
    assert lineage["inputs"][0]["parts"][0]["files"][0]["tensors_read"] > len(SHAPES)  # scales included


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            {"a.weight": torch.zeros(4, dtype=torch.uint8)},
            r"bitsandbytes.*dequantize\(\)",
        ),
        ({"quant_method": "gptq"}, {"a.qweight": torch.zeros(4, dtype=torch.int32)}, "gptq.*merge the original model"),
        ({"quant_method": "awq"}, {"a.qweight": torch.zeros(4, dtype=torch.int32)}, "awq.*merge the original model"),
        (
            {"quant_method": "mxfp4"},
            {"a.blocks": torch.zeros(4, dtype=torch.uint8)},
            r"mxfp4.*Mxfp4Config\(dequantize=True\)",
        ),
        ({"quant_method": "hqq"}, {"a.W_q": torch.zeros(4, dtype=torch.uint8)}, "hqq.*dequantise the model"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            {"a.weight_packed": torch.zeros(4, dtype=torch.int32)},
            "compressed-tensors, pack-quantized",
        ),
        (
            {"quant_method": "fp8"},
            {"a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)},
            "'a.weight' is FP8, but has no scale",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [2, 2]},
            {"a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(3, 2)},
            r"'a.weight_scale_inv' is \[3, 2\], which fits 'a.weight' \[4, 4\] neither",
        ),
        (
            {"quant_method": "fp8"},
            {
                "a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
                "a.weight_scale": torch.full((4,), 120, dtype=torch.uint8),
            },
            "'a.weight_scale' is U8; only scales of float dtypes can be read",
        ),
    ],
)
def test_other_kinds_are_refused_with_the_way_out(config, tensors, message, tmp_path):
    write_model(tmp_path / "m", tensors, {**CONFIG, "quantization_config": config})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m")


def test_gguf_is_refused(tmp_path):
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"GGUF holds quantised weights.*convert_hf_to_gguf"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="GGUF holds quantised weights"):
        open_checkpoint(tmp_path / "model.Q4_K_M.gguf")


def test_a_single_fp8_file_without_config(tmp_path):
    codes, scale, meant = quantise(torch.randn(10, 20), "row")
    save_file({"w.weight": codes, "w.weight_scale": scale}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    raw = bytearray(400)
    checkpoint.read([ReadRequest("w.weight", 0, 200)], memoryview(raw))
    assert raw == meant.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", [(), (5,), (4, 6, 8)])
def test_one_scale_for_a_tensor_of_any_shape(shape, tmp_path):
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    save_file({"w": codes, "w_scale": torch.tensor(0.25)}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    n = codes.numel()
    raw = bytearray(2 * n)
    checkpoint.read([ReadRequest("w", 0, n)], memoryview(raw))
    assert raw == (codes.float() * 0.25).bfloat16().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_memory_of_reading_is_what_the_budget_says(tmp_path):
    """Numbers beside the output while FP8 is read, for each element."""
    n = 2**20
    codes, scale, _ = quantise(torch.randn(1024, 1024), "block")
    config = {**CONFIG, "quantization_config": settings("block")}
    write_model(tmp_path / "m", {"w.weight": codes, "w.weight_scale_inv": scale}, config)
    checkpoint = open_checkpoint(tmp_path / "m")
    raw = memoryview(bytearray(2 * n))
    checkpoint.read([ReadRequest("w.weight", 0, 1024)], raw[:2048])  # imports, scales
    tracemalloc.start()
    checkpoint.read([ReadRequest("w.weight", 0, n)], raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 5 * n < peak <= checkpoint.scratch_itemsize * n + 2**20
