"""Torch files made of random documents: whole tensors of all dtypes and views among whatever else a pickle may hold.

What stockpot reads of one is what torch reads of it; or both refuse; or stockpot alone does, with a message. Used by
tests/test_hostile.py and benchmarks/attack.py.
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from stockpot.checkpoints.opening import open_checkpoint
from stockpot.checkpoints.source import ReadRequest
from stockpot.errors import StockpotError

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
           torch.uint8, torch.bool, torch.float8_e4m3fn)  # fmt: skip
_WORDS = (
    "w",
    "model.layers.0.weight",
    "état",
    "a.b",
    "lm_head.weight",
    "",
    "0",
    "optimizer",
    "state_dict",
    "model",
    "ema",
    "x y",
)


def tensor(rnd: random.Random) -> torch.Tensor:
    shape = [rnd.choice((0, 1, 2, 3, 5)) for _ in range(rnd.randrange(4))]
    whole = torch.randint(0, 100, [n + 1 for n in shape]).to(rnd.choice(_DTYPES))
    kind = rnd.randrange(6)
    if kind == 0 and whole.dim() == 2:
        return whole.t()
    if kind == 1 and whole.dim():
        return whole[1:]
    if kind == 2 and whole.dim() and whole.dtype is not torch.float8_e4m3fn:
        return whole[..., ::2]
    if kind == 3 and whole.is_floating_point():
        return torch.nn.Parameter(whole, requires_grad=False)
    return whole.contiguous()


def value(rnd: random.Random, shared: list[torch.Tensor], depth: int = 0) -> Any:
    """Something that a training loop may have saved."""
    kind = rnd.randrange(14 if depth < 4 else 8)
    if kind < 5:
        shared.append(tensor(rnd) if not shared or rnd.random() < 0.8 else rnd.choice(shared))
        return shared[-1]
    if kind < 8:
        return rnd.choice(
            (None, True, 3, -(2**40), 1.5, float("nan"), "text", "\U0001f372" * 3, b"bytes", torch.float16)
        )
    if kind < 12:
        table: Any = OrderedDict() if rnd.random() < 0.5 else {}
        for _ in range(rnd.randrange(6)):
            key: Any = rnd.choice(_WORDS) if rnd.random() < 0.9 else rnd.choice((0, 7, None, 2.5, (1, "a"), True))
            table[key] = value(rnd, shared, depth + 1)
        return table
    items = [value(rnd, shared, depth + 1) for _ in range(rnd.randrange(5))]
    return items if kind == 12 else tuple(items)


def file_of(rnd: random.Random) -> bytes:
    """A file as torch.save writes it, now and then with its pickle damaged, or written by another protocol."""
    document = value(rnd, [])
    while not isinstance(document, dict):
        document = {rnd.choice(_WORDS): document}
    buffer = io.BytesIO()
    torch.save(document, buffer, pickle_protocol=rnd.choice((2, 2, 2, 3, 4)))
    if rnd.random() < 0.7:
        return buffer.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                data = damaged(rnd, data)
            new.writestr(info.filename, data)
    return out.getvalue()


def damaged(rnd: random.Random, data: bytes) -> bytes:
    """With opcodes put in, taken out or doubled, mostly where an opcode begins."""
    import pickletools

    ends = [pos for _, _, pos in pickletools.genops(data) if pos is not None]
    out = bytearray(data)
    for _ in range(rnd.randrange(1, 4)):
        at = min(rnd.choice(ends), len(out))
        what = rnd.randrange(5)
        if what == 0:
            del out[at : at + rnd.randrange(1, 12)]
        elif what == 1:
            out[at:at] = rnd.choice(
                (b"0", b"2", b")", b"}", b"(", b"N", b"\x85", b"R", b"h\x01", b"q\x07", b"\x8f", b"K\x03", b"t", b"u")
            )
        elif what == 2:
            out[at:at] = out[at : at + rnd.randrange(1, 40)]
        elif what == 3:
            out[at:at] = rnd.choice((b"cos\nsystem\n", b"cbuiltins\ngetattr\n", b"r" + struct.pack("<I", rnd.randrange(2**32)),
                                     b"X" + struct.pack("<I", rnd.randrange(2**20)), b"\x8a\x7f"))  # fmt: skip
        elif out:
            out[min(at, len(out) - 1)] = rnd.randrange(256)
    return bytes(out)


def torch_tensors(path: Path) -> dict[str, torch.Tensor] | None:
    """Every tensor that torch finds, by the keys that lead to it; None where it refuses, or finds no mapping."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:
        return None
    out: dict[str, torch.Tensor] = {}

    def walk(node: Any, *at: str) -> None:
        if isinstance(node, torch.Tensor):
            out[".".join(at)] = node
        elif isinstance(node, (dict, list, tuple)):
            for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
                walk(inner, *at, str(key))

    walk(found)
    return out if isinstance(found, dict) else None


def check(path: Path) -> bool:
    """Whether a file was read; AssertionError where what was read is not what torch reads."""
    try:
        checkpoint = open_checkpoint(path)
    except StockpotError as e:
        if not str(e):
            raise ValueError("an error without a message") from e
        return False
    there = torch_tensors(path)
    names = list(checkpoint.names())
    for name in names:
        spec = checkpoint.spec(name)
        raw = bytearray(spec.nbytes)
        checkpoint.read([ReadRequest(name, 0, spec.numel)], memoryview(raw))
        if there is None:
            continue  # torch refuses what lies beside: what is read must only be readable
        wanted = [t for k, t in there.items() if k == name or k.endswith("." + name)]
        assert wanted, (name, sorted(there))
        same = [t.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for t in wanted]
        assert bytes(raw) in [t.numpy().tobytes() for t in same], name
    checkpoint.close()
    return True


def one(seed: int, folder: Path) -> bool:
    """The file of a seed, made and checked. Whether it was read."""
    rnd = random.Random(seed)
    torch.manual_seed(seed)
    path = folder / "m.pt"
    path.write_bytes(file_of(rnd))
    return check(path)


__all__ = ["check", "file_of", "one"]
