"""A base model with adapters applied, computed block by block while it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.adapters.derived import DerivedCheckpoint
from stockpot.adapters.peft import PREFIX, Adapter, LowRank
from stockpot.adapters.product import check_products
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.source import ReadRequest
from stockpot.checkpoints.tied import ties_embeddings
from stockpot.errors import CheckpointError, MismatchError, nearest
from stockpot.specs import DType, TensorSpec

__all__ = ["FusedModel", "fuse"]


@dataclass(frozen=True)
class FusedModel(DerivedCheckpoint):
    """W + sum_i w_i scale_i B_i A_i for each adapted weight; saved modules and biases replaced by their average."""

    base: Checkpoint | None = None
    adapters: tuple[Adapter, ...] = ()
    weights: tuple[float, ...] = ()
    adapted: dict[str, str] = field(default_factory=dict, repr=False)  # base tensor -> module
    replaced: dict[str, str] = field(default_factory=dict, repr=False)  # base tensor -> adapter tensor

    def computed(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        import numpy as np

        from stockpot.adapters.arrays import decoded, encoded

        assert self.base is not None
        spec = self.spec(name)
        if name in self.replaced:
            values = self.cache.get(name, lambda: self._saved(self.replaced[name])).reshape(-1)[start:stop]
            out[:] = encoded(values, spec.dtype).data
            return
        stored = self.base.spec(name).dtype
        if name not in self.adapted and stored is spec.dtype:
            self.base.read([ReadRequest(name, start, stop)], out)
            return
        raw = np.empty((stop - start) * stored.itemsize, np.uint8)
        self.base.read([ReadRequest(name, start, stop)], raw.data)
        values = decoded(raw, stored)
        if name in self.adapted:
            values = values + self._delta(name, start, stop)
        out[:] = encoded(values, spec.dtype).data

    def _delta(self, name: str, start: int, stop: int) -> Any:
        """Elements start..stop of the weight's delta: the rows that they lie in, then the part."""
        import numpy as np

        module = self.adapted[name]
        left, right = self.cache.get(module, lambda: self._factors(module))
        row = right.shape[1]
        first, last = start // row, -(-stop // row)
        # rows in fixed groups, so that the same bits come out however the engine cuts its blocks
        group = max(2**19 // row, 1)
        parts = []
        for k in range(first // group, -(-last // group)):
            low, high = k * group, min((k + 1) * group, len(left))
            parts.append((left[low:high] @ right)[max(first - low, 0) : max(min(last, high) - low, 0)])
        flat = np.concatenate(parts).reshape(-1)
        return flat[start - first * row : stop - first * row]

    def _factors(self, module: str) -> tuple[Any, Any]:
        """(left [rows, R], right [R, row]) with the delta's rows as the base stores them."""
        from stockpot.adapters.algebra import stacked
        from stockpot.adapters.arrays import load_tensor

        factors = []
        for weight, adapter in zip(self.weights, self.adapters, strict=True):
            m = adapter.modules[module]
            a, b = load_tensor(adapter.checkpoint, m.a), load_tensor(adapter.checkpoint, m.b)
            factors.append((weight * m.scale, a.reshape(len(a), -1), b.reshape(len(b), -1)))
        a, b = stacked(factors)
        if self.adapters[0].modules[module].transposed:
            return a.T.copy(), b.T.copy()
        return b, a

    def _saved(self, name: str) -> Any:
        from stockpot.adapters.arrays import load_tensor

        tensors = [load_tensor(a.checkpoint, name).astype("float64") for a in self.adapters]
        return sum(w * t for w, t in zip(self.weights, tensors, strict=True))


def fuse(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    dtype: DType | None = None,
    ref: str = "",
) -> FusedModel:
    """The base with the weighted sum of adapters applied. dtype: of float tensors; None: as the base stores them.

    Raises MismatchError where an adapter does not fit the base, or for DoRA; nothing is read but headers.
    """
    check_products(adapters)
    if base.kind != "model":
        raise CheckpointError(f"{base.ref}: an adapter; a base must be a full model")
    tied = base.tied()
    specs = {}
    for name in base.names():
        if name not in tied:
            spec = base.spec(name)
            specs[name] = TensorSpec(dtype if dtype and spec.dtype.is_float else spec.dtype, spec.shape)
    first = adapters[0]
    adapted = {}
    for module, m in first.modules.items():
        if m.bias is not None:
            raise MismatchError(
                f"{first.checkpoint.ref}: {module}: lora_bias can't be written into a base; use product"
            )
        adapted[_target(base, first, f"{module}.weight", _delta_shape(first, m))] = module
    replaced = {}
    for name in first.plain:
        shape = first.checkpoint.spec(name).shape
        plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")  # so PEFT calls the layer that it wraps
        replaced[_target(base, first, plain, shape)] = name
    return FusedModel(
        ref or base.ref,
        base.path,
        "model",
        base.config,
        (*base.files, *(h for a in adapters for h in a.checkpoint.files)),
        sources=(base, *(a.checkpoint for a in adapters)),
        specs=specs,
        base=base,
        adapters=tuple(adapters),
        weights=tuple(weights),
        adapted=adapted,
        replaced=replaced,
    )


def _delta_shape(adapter: Adapter, m: LowRank) -> tuple[int, ...]:
    a, b = adapter.checkpoint.spec(m.a).shape, adapter.checkpoint.spec(m.b).shape
    return (*a[1:], b[0]) if m.transposed else (b[0], *a[1:])


def _target(base: Checkpoint, adapter: Adapter, name: str, shape: tuple[int, ...]) -> str:
    """The base's tensor of that name (a name that only lacks a prefix is found too). Raises MismatchError."""
    found = name if name in base else None
    if found is None:
        ends = [n for n in base.names() if n.endswith("." + name) or name.endswith("." + n)]
        found = ends[0] if len(ends) == 1 else None
    if found is None:
        alias = base.resolve(name)
        if alias is not None:
            raise MismatchError(
                f"{adapter.checkpoint.ref}: adapts {name!r}, which {base.ref} ties to {alias!r}: fusing would change both; "
                "untie the base first"
            )
        raise MismatchError(
            f"{adapter.checkpoint.ref}: adapts {name!r}, which {base.ref} does not have{nearest(name, base.names())}"
        )
    twins = {*base.tied(), *base.tied().values()}
    if ties_embeddings(base.config) is True and base.resolve("lm_head.weight") == found:
        twins.add(found)
    if found in twins:
        raise MismatchError(
            f"{adapter.checkpoint.ref}: adapts {found!r}, which is tied in {base.ref}: fusing would change its twin too; "
            "untie the base first"
        )
    if base.spec(found).shape != shape:
        raise MismatchError(
            f"{adapter.checkpoint.ref}: its change of {found!r} is {list(shape)}, the tensor in {base.ref} "
            f"{list(base.spec(found).shape)}"
        )
    return found
