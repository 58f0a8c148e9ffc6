"""What is whole but can't be merged as it lies: named, with the way out, never called damaged, never merged."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stockpot
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.errors import CheckpointError, LayoutError


def touch(*names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"x")

    return make


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "ZeRO": (touch("zero_to_fp32.py", "latest", "global_step7/x.pt"), "zero_to_fp32.py . gathered"),
    "ZeRO without its script": (
        touch("global_step7/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "DeepSpeed ZeRO shards"),
    "FSDP": (touch("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"), "merge-weights .*_fsdp_0 gathered"),
    "FSDP by ranks": (touch("pytorch_model_fsdp_rank0.bin", "pytorch_model_fsdp_rank1.bin"), "FSDP shards"),
    "DCP": (touch(".metadata", "__0_0.distcp", "__1_0.distcp"), "dcp_to_torch"),
    "verl": (touch("model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"), "verl.model_merger"),
    "fairseq": (touch("checkpoint_last-shard0.pt", "checkpoint_last-shard1.pt"), "fairseq.checkpoint_utils.load_model_ensemble"),
    "fairseq, model parallel": (touch("model-model_part-0.pt"), "shards of fairseq"),
    "verl, a step": (touch("actor/model_world_size_2_rank_0.pt", "data.pt"), "verl.model_merger"),
    "Megatron": (touch("iter_0000010/mp_rank_00/model_optim_rng.pt", "latest_checkpointed_iteration.txt"), "Megatron"),
    "Orbax": (touch("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "d/0"), "Orbax"),
    "NeMo 2": (touch("context/io.json", "weights/.metadata", "weights/__0_0.distcp"), "NeMo 2"),
    "Flax": (touch("config.json", "flax_model.msgpack"), "from_flax=True"),
    "TensorFlow": (touch("tf_model.h5"), "from_tf=True"),
    "TensorFlow, older": (touch("model.ckpt.index", "model.ckpt.meta"), "TensorFlow"),
    "MLX, older": (touch("weights.npz"), "safetensors.numpy.save_file"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tmp_path: Path, case: str) -> None:
    make, way_out = FOLDERS[case]
    make(tmp_path)
    if (tmp_path / "config.json").exists():
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LayoutError, match=way_out) as raised:
        open_checkpoint(tmp_path)
    assert "damaged" not in str(raised.value)
    assert "interrupted" not in str(raised.value)


FILES = {
    "model.nemo": "tar -xf", "weights.npz": "numpy.load", "flax_model.msgpack": "Flax", "tf_model.h5": "TensorFlow",
    "model.onnx": "ONNX", "last-shard1.pt": "fairseq", "__0_0.distcp": "FSDP shards", "model_world_size_4_rank_3.pt": "verl",
    "bf16_zero_pp_rank_0_mp_rank_00_model_states.pt": "zero_to_fp32", "pytorch_model_fsdp_rank3.bin": "FSDP shards",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(LayoutError, match=FILES[name]):
        open_checkpoint(tmp_path / name)


def test_a_nemo_archive_unpacked_as_the_error_says(tmp_path: Path) -> None:
    data = io.BytesIO()
    torch.save({"w": torch.ones(2, 2)}, data)
    with tarfile.open(tmp_path / "a.nemo", "w") as tar:
        info = tarfile.TarInfo("./model_weights.ckpt")
        info.size = data.getbuffer().nbytes
        tar.addfile(info, io.BytesIO(data.getvalue()))
    with pytest.raises(LayoutError, match=r"name the model_weights.ckpt in it"):
        open_checkpoint(tmp_path / "a.nemo")
    subprocess.run(["tar", "-xf", "a.nemo"], cwd=tmp_path, check=True)
    assert list(open_checkpoint(tmp_path / "model_weights.ckpt").names()) == ["w"]


def test_arrays_of_numpy_saved_as_the_error_says(tmp_path: Path) -> None:
    import safetensors.numpy

    np.savez(tmp_path / "weights.npz", w=np.ones((2, 2), np.float32))
    with pytest.raises(LayoutError) as raised:
        open_checkpoint(tmp_path / "weights.npz")
    assert "`safetensors.numpy.save_file(dict(numpy.load(FILE)), 'model.safetensors')`" in str(raised.value)
    safetensors.numpy.save_file(dict(np.load(tmp_path / "weights.npz")), tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path / "model.safetensors").names()) == ["w"]


def test_a_distributed_checkpoint_gathered_as_the_error_says(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = {"model": {"w": torch.randn(6, 5), "b": torch.randn(6)}}
    dcp.save(state, checkpoint_id=str(tmp_path / "step"), no_dist=True)
    with pytest.raises(LayoutError) as raised:
        open_checkpoint(tmp_path / "step")
    module = "torch.distributed.checkpoint.format_utils"
    assert f"python -m {module} dcp_to_torch {tmp_path}/step gathered.pt" in str(raised.value)
    gathered = tmp_path / "gathered.pt"
    subprocess.run(
        [sys.executable, "-m", module, "dcp_to_torch", tmp_path / "step", gathered], check=True, capture_output=True
    )
    found = open_checkpoint(gathered)
    assert set(found.names()) == {"w", "b"}


def test_shards_of_a_distributed_checkpoint_in_safetensors(tmp_path: Path) -> None:
    for rank in (0, 1):
        info = json.dumps({"w": {"saved_offsets": [3 * rank, 0]}})
        save_file(
            {"w": torch.ones(3, 2)}, tmp_path / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors",
            {"DCP_SHARDING_INFO": info, "DCP_VERSION": "1.0"},
        )  # fmt: skip
    with pytest.raises(LayoutError, match="one rank's part of each tensor"):
        open_checkpoint(tmp_path)
    with pytest.raises(LayoutError, match="one rank's part of each tensor"):
        open_checkpoint(tmp_path / "shard-00001-model-00001-of-00001.safetensors")


@pytest.mark.parametrize("shape", [(0,), (0, 4)])
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_empty_shells(tmp_path: Path, shape: tuple[int, ...], form: str) -> None:
    tensors = {"norm.weight": torch.ones(4), "w": torch.empty(shape)}
    (torch.save if form.endswith(".bin") else save_file)(tensors, tmp_path / form)
    with pytest.raises(
        LayoutError, match=r"an empty shell: 1 of 2 tensors have no elements, such as 'w'.*gather them before"
    ):
        open_checkpoint(tmp_path)
    touch("global_step7/x.pt")(tmp_path)
    with pytest.raises(LayoutError, match=r"in that directory \(the script lies in it\)"):
        open_checkpoint(tmp_path)


def test_empty_tensors_that_are_the_models_own(tmp_path: Path) -> None:
    """A width of nothing, as MobileBERT may have, and integers: not what gathering leaves."""
    own = {"w": torch.empty(4, 0), "n": torch.empty(0, dtype=torch.int64), "v": torch.empty(0, 4)}
    save_file(own | {f"{i}": torch.ones(2) for i in range(8)}, tmp_path / "model.safetensors")
    assert len(open_checkpoint(tmp_path)) == 11


def test_an_adapter_of_mlx(tmp_path: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(32, 8)}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_parameters": {"rank": 8}, "num_layers": 1}')
    with pytest.raises(LayoutError, match="an adapter of MLX"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("how", ["inside", "whole"])
def test_a_pickled_module(tmp_path: Path, how: str) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    torch.save({"epoch": 1, "model": net, "ema": None} if how == "inside" else net, tmp_path / "yolo.pt")
    with pytest.raises(CheckpointError, match=r"pickled.*torch.save\(") as raised:
        open_checkpoint(tmp_path / "yolo.pt")
    assert "interrupted" not in str(raised.value)
    # as it says
    found: Any = torch.load(tmp_path / "yolo.pt", weights_only=False)
    state = found["model"].state_dict() if how == "inside" else found.state_dict()
    torch.save({"state_dict": state}, tmp_path / "plain.pt")
    assert len(open_checkpoint(tmp_path / "plain.pt")) == len(state)


def test_a_model_of_mlx_keeps_its_format(tmp_path: Path) -> None:
    for n in "01":
        (tmp_path / n).mkdir()
        save_file({"w": torch.randn(3, 3)}, tmp_path / n / "model.safetensors", {"format": "mlx"})
    stockpot.merge({"merge_method": "linear", "models": [str(tmp_path / n) for n in "01"]}, tmp_path / "out")
    from safetensors import safe_open

    with safe_open(tmp_path / "out/model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "mlx"}
    assert load_file(tmp_path / "out/model.safetensors")["w"].shape == (3, 3)


def test_a_run_of_shards(tmp_path: Path) -> None:
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        touch("zero_to_fp32.py", "global_step1/x.pt", "config.json")(folder)
        (folder / "config.json").write_text("{}")
        (folder / "trainer_state.json").write_text(
            json.dumps({"global_step": step, "max_steps": 20, "log_history": []})
        )
    with pytest.raises(CheckpointError, match="zero_to_fp32") as raised:
        stockpot.soup(tmp_path, tmp_path / "out", stockpot.SoupSpec(last=2))
    assert "damaged" not in str(raised.value)


@pytest.mark.parametrize("name", ["global_step_10", "iter_0000010", "step_10"])
def test_a_run_that_is_no_run_of_ours(tmp_path: Path, name: str) -> None:
    touch(f"{name}/actor/model_world_size_2_rank_0.pt")(tmp_path)
    with pytest.raises(CheckpointError, match="verl"):
        stockpot.soup(tmp_path, tmp_path / "out", stockpot.SoupSpec(last=2))
