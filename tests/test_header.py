"""The safetensors header reader: what it accepts is what safetensors writes, and nothing else."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from stockpot.checkpoints.header import encode_header, read_header
from stockpot.errors import CheckpointError
from stockpot.specs import DType, TensorSpec

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: object, data: bytes = b"") -> str:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return str(path)


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.float64),
        "b": torch.randn(5).bfloat16(),
        "c": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "d": torch.tensor(7),
        "e": torch.tensor([True, False]),
        "f": torch.zeros(0, 3),
    }
    save_file(tensors, tmp_path / "m.safetensors", {"who": "me"})
    header = read_header(str(tmp_path / "m.safetensors"))
    assert header.metadata == {"who": "me"}
    raw = (tmp_path / "m.safetensors").read_bytes()
    for name, tensor in tensors.items():
        entry = header.entries[name]
        assert entry.spec.shape == tuple(tensor.shape)
        stored = (
            torch.frombuffer(bytearray(raw[entry.start : entry.stop]), dtype=torch.uint8) if tensor.numel() else None
        )
        if stored is not None:
            assert torch.equal(stored, tensor.reshape(-1).view(torch.uint8))


def test_safetensors_reads_what_we_encode(tmp_path: Path) -> None:
    specs = {"x": (TensorSpec(DType.F32, (2, 3)), 0), "größe": (TensorSpec(DType.BF16, (4,)), 24)}
    (tmp_path / "m.safetensors").write_bytes(encode_header(specs, {"format": "pt"}) + bytes(32))
    with safe_open(tmp_path / "m.safetensors", "pt") as f:
        assert set(f.keys()) == set(specs)
        assert f.get_tensor("x").shape == (2, 3)
    assert read_header(str(tmp_path / "m.safetensors")).data_start % 8 == 0


BAD = {
    "empty file": (b"", "too short"),
    "length past the end": (struct.pack("<Q", 100) + b"{}", "past the end"),
    "length 2^63": (struct.pack("<Q", 2**63) + b"{}", "limit"),
    "not json": (struct.pack("<Q", 4) + b"{,,}", "not valid JSON"),
    "not an object": (struct.pack("<Q", 2) + b"[]", "does not start"),
    "not utf-8": (struct.pack("<Q", 6) + b'{"\xff":1', "JSON"),
    "key twice": (struct.pack("<Q", 14) + b'{"a":1,"a":2}\n', "twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bytes(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(str(tmp_path / "m.safetensors"))


BAD_ENTRIES = {
    "unknown dtype": ({"a": F32 | {"dtype": "F4"}}, 8, "dtype 'F4'"),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "exactly the keys"),
    "extra key": ({"a": F32 | {"x": 1}}, 8, "exactly the keys"),
    "negative shape": ({"a": F32 | {"shape": [-2]}}, 8, "non-negative"),
    "float shape": ({"a": F32 | {"shape": [2.0]}}, 8, "non-negative"),
    "bool shape": ({"a": F32 | {"shape": [True, 2]}}, 8, "non-negative"),
    "length mismatch": ({"a": F32 | {"shape": [3]}}, 8, "needs 12 bytes"),
    "overflow": ({"a": F32 | {"shape": [2**40, 2**40]}}, 8, "overflows"),
    "reversed": ({"a": F32 | {"data_offsets": [8, 0]}}, 8, "needs 8 bytes"),
    "hole": ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, 20, "hole"),
    "hole at the start": ({"a": F32 | {"data_offsets": [4, 12]}}, 12, "hole"),
    "overlap": ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, 12, "overlaps"),
    "truncated data": ({"a": F32}, 7, "truncated"),
    "tail": ({"a": F32}, 9, "no tensor owns"),
    "metadata not strings": ({"__metadata__": {"a": 1}, "a": F32}, 8, "__metadata__"),
    "entry not a mapping": ({"a": 5}, 0, "exactly the keys"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entries(tmp_path: Path, case: str) -> None:
    header, size, message = BAD_ENTRIES[case]
    path = write(tmp_path / "m.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert path in str(caught.value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_an_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Flip, cut or insert bytes of a real file: either it still is a sound file, or CheckpointError. Nothing else."""
    source = tmp_path / "good.safetensors"
    if not source.exists():
        save_file({"a": torch.randn(3, 2), "b": torch.arange(4)}, source)
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut" and len(raw) > 1:
            del raw[at : at + data.draw(st.integers(1, 9))]
            raw = raw or bytearray(b"x")
        else:
            raw[at:at] = data.draw(st.binary(max_size=9))
    damaged = tmp_path / "bad.safetensors"
    damaged.write_bytes(raw)
    try:
        header = read_header(str(damaged))
    except CheckpointError:
        return
    assert sum(e.stop - e.start for e in header.entries.values()) == len(raw) - header.data_start
