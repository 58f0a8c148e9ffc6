"""Torch's zip files: the same bytes as torch.load gives, and nothing in them is ever run."""

from __future__ import annotations

import os
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from stockpot.checkpoints import ReadRequest, open_checkpoint
from stockpot.checkpoints.torchzip import read_torch_file
from stockpot.errors import CheckpointError

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.float8_e5m2,
)  # fmt: skip


def bytes_of(path: Path, name: str) -> bytes:
    checkpoint = open_checkpoint(path)
    spec = checkpoint.spec(name)
    buffer = bytearray(spec.nbytes)
    checkpoint.read([ReadRequest(name, 0, spec.numel)], memoryview(buffer))
    checkpoint.close()
    return bytes(buffer)


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
def test_every_dtype(tmp_path: Path, key: str | None) -> None:
    state: dict[str, Any] = {str(d): (torch.randn(3, 5) * 9).to(d) for d in DTYPES}
    state["parameter"] = torch.nn.Parameter(torch.randn(4))
    state["part of a storage"] = torch.randn(10, 4)[2:5]
    state["shared"] = state["torch.float32"]
    state["scalar"] = torch.tensor(2.5)
    state["empty"] = torch.empty(0, 3, dtype=torch.int64)
    document = state if key is None else {key: state, "global_step": 7, "hyper": Namespace(a=1), "none": None}
    path = tmp_path / "x.ckpt"
    torch.save(document, path)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.names()) == set(state)
    for name, tensor in state.items():
        assert checkpoint.spec(name).shape == tuple(tensor.shape)
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert bytes_of(path, name) == raw, name
    if key:
        assert read_torch_file(str(path)).scalars["global_step"] == 7


class Evil:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARK}",)


MARK = ""


@pytest.mark.parametrize("where", ["beside", "inside", "class state"])
def test_nothing_is_run(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_torchzip.MARK", str(tmp_path / "ran"))
    path = tmp_path / "x.pt"
    if where == "inside":
        torch.save({"state_dict": {"w": torch.ones(2), "evil": Evil()}}, path)
    elif where == "beside":
        torch.save({"state_dict": {"w": torch.ones(2)}, "evil": Evil()}, path)
    else:
        torch.save({"state_dict": {"w": torch.ones(2)}, "h": {Evil(): [Evil()]}}, path)
    assert list(open_checkpoint(path).names()) == ["w"]
    assert not (tmp_path / "ran").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def craft(path: Path, pickled: bytes, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", pickled)
        for name, data in members.items():
            z.writestr(f"x/{name}", data)


@pytest.mark.parametrize(
    "victim", [b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"]
)
def test_a_pickle_can_t_alter_the_reader(tmp_path: Path, victim: bytes) -> None:
    """BUILD on what stands for a class: the next file must be read as if nothing had been."""
    from stockpot.specs import DType

    state = pickle.dumps(({"itemsize": 2}, {"itemsize": 2, "__defaults__": (1,), "call": print, "value": 3}))[2:-1]
    craft(tmp_path / "evil.pt", b"\x80\x04" + victim + state + b"b.")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "evil.pt")
    assert DType.F32.itemsize == 4
    torch.save({"w": torch.ones(4, 4)}, tmp_path / "good.pt")
    assert open_checkpoint(tmp_path / "good.pt").spec("w").nbytes == 64


def test_one_state_dict_under_very_many_keys(tmp_path: Path) -> None:
    state = {"w": torch.zeros(2)}
    torch.save({f"k{i}": state for i in range(1001)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="holds one state dict under more than 1000 keys, the last 'k1000'"):
        open_checkpoint(tmp_path / "m.pt")
    torch.save({f"k{i}": {"w": torch.zeros(2)} for i in range(1001)}, tmp_path / "n.pt")
    assert len(open_checkpoint(tmp_path / "n.pt")) == 1001


def test_containers_of_nothing_are_looked_into_once_and_others_again(tmp_path: Path) -> None:
    """What holds state dicts is found under each of its keys, also where it was first met too deep."""
    empty: dict[str, Any] = {"x": [{}, {"y": 1}]}
    held = {"net": {"w": torch.zeros(2)}}
    deep: dict[str, Any] = {"end": held}
    for i in range(9):
        deep = {f"d{i}": deep}
    torch.save({"a": empty, "deep": deep, "b": held, "c": {"empty": empty, "held": held}}, tmp_path / "m.pt")
    assert set(open_checkpoint(tmp_path / "m.pt").names()) == {"b.net.w", "c.held.net.w"}


def test_a_shallower_way_to_what_lay_too_deep_for_a_look(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"e": {"f": {"g": {"h": {"net": {"w": torch.zeros(2)}}}}}}
    deep: dict[str, Any] = {"e": inner}
    for i in range(7):
        deep = {f"d{i}": deep}
    torch.save({"deep": deep, "near": inner}, tmp_path / "m.pt")
    assert "w" in {n.rsplit(".", 1)[-1] for n in open_checkpoint(tmp_path / "m.pt").names()}


def test_odd_members(tmp_path: Path) -> None:
    craft(tmp_path / "a.pt", pickle.dumps({}), byteorder=b" " * 10_000)
    with pytest.raises(CheckpointError, match="little-endian"):
        open_checkpoint(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x/data.pkl", pickle.dumps({}) * 100)
    with pytest.raises(CheckpointError, match="is compressed"):
        open_checkpoint(tmp_path / "b.pt")


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.randn(100)}, path)
    whole = path.read_bytes()
    for cut in (0, 3, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    for seed in range(60):
        damaged = bytearray(whole)
        for k in range(8):
            damaged[(seed * 7919 + k * 104729) % len(damaged)] ^= 1 << (seed % 8)
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.names():
                bytes_of(path, name)
        except CheckpointError:
            pass
    for said, document in [
        ("holds no tensors by name", {"a": 1}),
        ("expected a mapping", [torch.ones(1)]),
        ("is not contiguous", {"w": torch.randn(3, 8)[:, ::2]}),
        ("can't be read", {"v": torch.ones(2), "w": torch.eye(3).to_sparse()}),
    ]:
        torch.save(document, path)
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(path)
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"saved by a torch older than 1.6"):
        open_checkpoint(path)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("other.txt", "x")
    with pytest.raises(CheckpointError, match=r"no data.pkl"):
        open_checkpoint(path)


def test_pickled_adapters_and_models(tmp_path: Path, lora_run: Path, tiny_llama: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    for source, old, new in (
        (lora_run / "checkpoint-4", "adapter_model.safetensors", "adapter_model.bin"),
        (tiny_llama, "model.safetensors", "pytorch_model.bin"),
    ):
        folder = tmp_path / new
        shutil.copytree(source, folder)
        tensors = load_file(folder / old)
        (folder / old).unlink()
        torch.save(tensors, folder / new)
        checkpoint = open_checkpoint(folder)
        assert set(checkpoint.names()) == set(tensors)
