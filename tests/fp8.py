"""FP8 checkpoints of every layout, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers import CONFIG, SHAPES, write_model

BLOCK = 48  # divides neither side of most tensors


def quantise(weight: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale, what the model means) of a matrix."""
    rows, columns = weight.shape
    if how == "tensor":
        blocks = weight.abs().max().reshape(1, 1)
        spread = blocks.expand(rows, columns)
    elif how == "row":
        blocks = weight.abs().amax(1, keepdim=True)
        spread = blocks.expand(rows, columns)
    else:
        tall, wide = -(-rows // BLOCK), -(-columns // BLOCK)
        padded = torch.zeros(tall * BLOCK, wide * BLOCK)
        padded[:rows, :columns] = weight.abs()
        blocks = padded.reshape(tall, BLOCK, wide, BLOCK).amax((1, 3))
        spread = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    scale, spread = (x / 448 for x in (blocks, spread))
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return codes, scale.reshape(1) if how == "tensor" else scale, (codes.float() * spread).bfloat16()


def settings(how: str) -> dict[str, object]:
    if how == "block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "activation_scheme": "dynamic",
        }
    strategy = {"row": "channel", "compressed block": "block", "tensor": "tensor"}[how]
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": [BLOCK, BLOCK]}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


def write_fp8(path: Path, how: str, seed: int) -> dict[str, torch.Tensor]:
    """An FP8 model; returns what it means in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    stored, meant = {}, {}
    suffix = "_scale_inv" if how == "block" else "_scale"
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator) * 0.02
        if "proj" in name:
            kind = "block" if "block" in how else how
            stored[name], stored[name + suffix], meant[name] = quantise(weight, kind)
            if how == "tensor":
                stored[name.removesuffix(".weight") + ".input_scale"] = torch.tensor([0.5])
        else:
            stored[name] = meant[name] = weight.bfloat16()
    write_model(path, stored, {**CONFIG, "quantization_config": settings(how)})
    return meant
