"""Quantised checkpoints: FP8 with scales is turned into real numbers while it is read; other kinds are refused with the way out.

FP8 weights come with a scale for the tensor, for each row, or for each block of rows and columns: `weight_scale_inv` of
DeepSeek and of transformers' fine-grained FP8, `weight_scale` of compressed-tensors and fbgemm. In all of them the weight
is code times scale. Scales of activations are of no use to a model in full precision and are left out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.derived import DerivedCheckpoint
from stockpot.checkpoints.source import ReadRequest
from stockpot.errors import ArgumentError, CheckpointError
from stockpot.specs import DType, TensorSpec, parse_dtype

__all__ = ["DequantisedCheckpoint", "loadable"]

_FP8 = (DType.F8_E4M3, DType.F8_E5M2)
_SCALES = ("_scale_inv", "_scale")
_ACTIVATIONS = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
_FP8_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "finegrained_fp8")
_WAY_OUT = {
    "bitsandbytes": "load it with transformers, call model.dequantize() and save_pretrained(), and merge that",
    "gptq": "merge the original model, and quantise the result again",
    "awq": "merge the original model, and quantise the result again",
    "mxfp4": "load it with transformers' Mxfp4Config(dequantize=True), save_pretrained(), and merge that",
}


@dataclass(frozen=True)
class _Scaled:
    """The scale of a weight, and how many rows and columns share one number of it."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class DequantisedCheckpoint(DerivedCheckpoint):
    """A checkpoint whose FP8 weights are read as code times scale, rounded once to a 16-bit or wider dtype."""

    scaled: dict[str, _Scaled] = field(default_factory=dict, repr=False)
    _known: dict[str, Any] = field(default_factory=dict, repr=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False)
    held: ClassVar[Mapping[str, Callable[[], Any]]] = {
        **DerivedCheckpoint.held, "_known": dict, "_guard": threading.Lock,
    }  # fmt: skip

    @property
    def source(self) -> Checkpoint:
        return self.sources[0]

    @property
    def resident(self) -> int:
        """The scales, in float32."""
        scales = sum(self.source.spec(s.name).numel * 4 for s in self.scaled.values())
        return scales + self.source.resident

    @property
    def scratch_itemsize(self) -> int:
        """The code, the number as float32, and twice more while it is encoded."""
        return 13 + self.source.scratch_itemsize

    def _scale(self, name: str) -> Any:
        """`[blocks of rows, blocks of columns]` float32."""
        import numpy as np

        from stockpot.checkpoints.codecs import decode_into

        with self._guard:
            if name not in self._known:
                spec = self.source.spec(name)
                raw = bytearray(spec.nbytes)
                self.source.read([ReadRequest(name, 0, spec.numel)], memoryview(raw))
                out = np.empty(spec.numel, np.float32)
                decode_into(raw, spec.dtype, out)
                self._known[name] = out.reshape(spec.shape if len(spec.shape) == 2 else (-1, 1))
            return self._known[name]

    def stored(self, name: str) -> Iterable[tuple[Checkpoint, str]]:
        own = [name, self.scaled[name].name] if name in self.scaled else [name]
        return (pair for n in own for pair in self.source.stored(n))

    def passed(self, name: str) -> tuple[Checkpoint, str, int] | None:
        return None if name in self.scaled else (self.source, name, 0)

    def computed(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        scaled = self.scaled.get(name)
        if scaled is None:
            self.source.read([ReadRequest(name, start, stop)], out)
            return
        import numpy as np

        from stockpot.checkpoints.codecs import decode_into, encode_into

        stored, spec = self.source.spec(name).dtype, self.spec(name)
        raw = np.empty(stop - start, np.uint8)
        self.source.read([ReadRequest(name, start, stop)], raw.data)
        values = np.empty(stop - start, np.float32)
        decode_into(raw.data, stored, values)
        width = spec.shape[-1] if spec.shape else 1
        scale = self._scale(scaled.name)
        row = start // width
        while row * width < stop:
            # rows of one block at a time: they share their scales
            last = min((row // scaled.rows + 1) * scaled.rows, -(-stop // width))
            across = np.repeat(scale[row // scaled.rows], scaled.columns)[:width]
            low, high = max(row * width, start), min(last * width, stop)
            first_whole, last_whole = -(-low // width), high // width
            if first_whole > last_whole:  # within one row
                values[low - start : high - start] *= across[low % width : low % width + high - low]
            else:
                values[low - start : first_whole * width - start] *= across[width - (first_whole * width - low) :]
                whole = values[first_whole * width - start : last_whole * width - start].reshape(-1, width)
                whole *= across
                values[last_whole * width - start : high - start] *= across[: high - last_whole * width]
            row = last
        encode_into(values, spec.dtype, out)


def loadable(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with real numbers for weights. Raises CheckpointError for kinds of quantisation that can't be undone."""
    quantised = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    names = set(checkpoint.names())
    scales = {n for n in names if n.endswith(_SCALES) and checkpoint.spec(n).dtype.is_float}
    fp8 = {n for n in names if checkpoint.spec(n).dtype in _FP8}
    if not isinstance(quantised, dict):
        if fp8 and any(n + s in names for n in fp8 for s in _SCALES):
            quantised = {"quant_method": "fp8"}
        else:
            return checkpoint
    kind = str(quantised.get("quant_method", "unknown method"))
    codes = [
        n for n in names if not checkpoint.spec(n).dtype.is_float and n.endswith((".weight", "_packed", ".qweight"))
    ]
    if kind in _FP8_METHODS and fp8 and not codes:
        return _dequantised(checkpoint, quantised, fp8, scales)
    if kind == "compressed-tensors":
        kind += f", {quantised.get('format', 'unknown format')}"
    way_out = _WAY_OUT.get(kind, "dequantise the model and merge that")
    raise CheckpointError(
        f"{checkpoint.ref}: weights are quantised ({kind}), averaging their codes would be meaningless; {way_out}"
    )


def _dequantised(
    checkpoint: Checkpoint, quantised: Mapping[str, Any], fp8: set[str], scales: set[str]
) -> DequantisedCheckpoint:
    dtype = _target(checkpoint.config)
    specs: dict[str, TensorSpec] = {}
    scaled: dict[str, _Scaled] = {}
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        if name in scales and (name.endswith(_ACTIVATIONS) or any(_scaled_by(name, s) in fp8 for s in _SCALES)):
            continue
        specs[name] = spec
        if name in fp8:
            scaled[name] = _scale_of(checkpoint, name, quantised)
            specs[name] = TensorSpec(dtype, spec.shape)
    config = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "compression_config")}
    return DequantisedCheckpoint(
        checkpoint.ref, checkpoint.path, checkpoint.kind, config, checkpoint.files,
        sources=(checkpoint,), specs=specs, scaled=scaled,
    )  # fmt: skip


def _scaled_by(name: str, ending: str) -> str | None:
    """The weight whose scale a tensor would be."""
    return name[: -len(ending)] if name.endswith(ending) else None


def _target(config: Mapping[str, Any]) -> DType:
    """What the model computes in: the config's dtype, bfloat16 where it is silent."""
    for key in ("dtype", "torch_dtype"):
        if isinstance(config.get(key), str):
            try:
                found = parse_dtype(config[key])
            except ArgumentError:
                continue
            if found not in _FP8:
                return found
    return DType.BF16


def _scale_of(checkpoint: Checkpoint, name: str, quantised: Mapping[str, Any]) -> _Scaled:
    """Which tensor scales a weight, and by what blocks."""
    scale = next((name + s for s in _SCALES if name + s in checkpoint), None)
    shape = checkpoint.spec(name).shape
    if scale is None:
        raise CheckpointError(f"{checkpoint.ref}: {name!r} is FP8, but has no scale ({name}_scale or {name}_scale_inv)")
    spec = checkpoint.spec(scale)
    if not spec.dtype.is_float:
        raise CheckpointError(f"{checkpoint.ref}: {scale!r} is {spec.dtype}; only scales of float dtypes can be read")
    columns = shape[-1] if shape else 1
    rows = checkpoint.spec(name).numel // columns if columns else 0
    if spec.numel == 1:
        return _Scaled(scale, max(rows, 1), max(columns, 1))
    if len(shape) == 2 and spec.shape in ((rows,), (rows, 1)):
        return _Scaled(scale, 1, columns)
    block = quantised.get("weight_block_size") or _block_structure(quantised)
    if len(shape) == 2 and len(spec.shape) == 2 and isinstance(block, (list, tuple)) and len(block) == 2:
        tall, wide = (int(b) if isinstance(b, int) and b > 0 else 1 for b in block)
        if spec.shape == (-(-rows // tall), -(-columns // wide)):
            return _Scaled(scale, tall, wide)
    raise CheckpointError(
        f"{checkpoint.ref}: {scale!r} is {list(spec.shape)}, which fits {name!r} {list(shape)} neither as one number, nor as one "
        f"for each row, nor by blocks of {block or 'unknown size'}"
    )


def _block_structure(quantised: Mapping[str, Any]) -> Any:
    """compressed-tensors: the blocks of the first group that has any."""
    groups = quantised.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("block_structure"):
            return weights["block_structure"]
    return None
