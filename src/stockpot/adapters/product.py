"""The exact average of adapters: their products averaged, as an adapter of stacked factors or of a given rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.adapters.peft import Adapter, LowRank, changes_the_base
from stockpot.checkpoints.derived import KEPT_MODULES, DerivedCheckpoint
from stockpot.errors import ArgumentError, CheckpointError, MismatchError
from stockpot.specs import DType, TensorSpec

__all__ = ["ProductAdapter", "check_products", "module_bytes", "product_adapter"]


@dataclass(frozen=True)
class ProductAdapter(DerivedCheckpoint):
    """An adapter whose deltas are the weighted sums of the others'. Scales are folded into B; its own scale is one.

    rank    None: all factors stacked, exact; else recompressed to this rank
    errors  Frobenius norms of what recompressing loses and of the whole, of each module that was read
    """

    adapters: tuple[Adapter, ...] = ()
    weights: tuple[float, ...] = ()
    rank: int | None = None
    errors: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)
    owners: dict[str, tuple[str, str]] = field(
        default_factory=dict, repr=False
    )  # tensor -> (module, "a" | "b" | "bias")

    @property
    def made(self) -> str:
        return f"{super().made}product {self.weights} {self.rank}"

    def computed(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        from stockpot.adapters.arrays import averaged, encoded

        module, part = self.owners.get(name, ("", ""))
        if module:
            values = self.computed_module(module)[part].reshape(-1)[start:stop]
        else:
            values = averaged(self.adapters, self.weights, name, start, stop)
        out[:] = encoded(values, self.spec(name).dtype).data

    def computed_module(self, module: str) -> dict[str, Any]:
        """A, B and B's bias of one module, from the cache if it was asked for lately."""
        values: dict[str, Any] = self.cache.get(module, lambda: self._module(module))
        return values

    def _module(self, module: str) -> dict[str, Any]:
        from stockpot.adapters.algebra import truncated
        from stockpot.adapters.arrays import load_tensor, stacked_factors

        bias: Any = 0.0
        for weight, adapter in zip(self.weights, self.adapters, strict=True):
            m = adapter.modules[module]
            if m.bias is not None:
                bias = bias + weight * m.scale * load_tensor(adapter.checkpoint, m.bias)
        a, b = stacked_factors(self.adapters, self.weights, module)
        if self.rank is not None:
            a, b, lost, total = truncated(a, b, self.spec(self.adapters[0].modules[module].a).shape[0])
            self.errors[module] = (lost, total)
        return {"a": a, "b": b, "bias": bias}

    @property
    def resident(self) -> int:
        return KEPT_MODULES * module_bytes(self.adapters) * (4 if self.rank is not None else 2)


def module_bytes(adapters: Sequence[Adapter]) -> int:
    """Bytes in float32 of the factors of the largest module, of all adapters."""
    specs = [(a.checkpoint.spec(m.a), a.checkpoint.spec(m.b)) for a in adapters[:1] for m in a.modules.values()]
    return max((4 * (a.numel + b.numel) for a, b in specs), default=0) * len(adapters)


def product_adapter(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    dtype: DType | None = None,
    ref: str = "product",
) -> ProductAdapter:
    """The adapter of sum_i w_i (scale_i B_i A_i); biases and saved modules are averaged with the same weights.

    Factors are written in float32 where they are stored narrower, unless dtype says otherwise: weights and scales go into
    B, which would lose digits.

    Raises MismatchError where modules or shapes differ, or for DoRA. Ranks and scales may differ.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ArgumentError(f"rank: expected a whole number of at least 1, got {rank!r}")
    check_products(adapters)
    first = adapters[0]
    specs: dict[str, TensorSpec] = {}
    owners: dict[str, tuple[str, str]] = {}
    ranks: dict[str, int] = {}
    for name in first.checkpoint.names():
        spec = first.checkpoint.spec(name)
        specs[name] = TensorSpec(dtype if dtype and spec.dtype.is_float else spec.dtype, spec.shape)
    for module, m in first.modules.items():
        total = sum(a.modules[module].rank for a in adapters)
        ranks[module] = total if rank is None else min(rank, total, *_sides(first, m))
        a, b = specs[m.a], specs[m.b]
        specs[m.a] = TensorSpec(dtype or _wide(a.dtype), (ranks[module], *a.shape[1:]))
        specs[m.b] = TensorSpec(dtype or _wide(b.dtype), (b.shape[0], ranks[module], *b.shape[2:]))
        owners |= {m.a: (module, "a"), m.b: (module, "b")} | ({m.bias: (module, "bias")} if m.bias else {})
    return ProductAdapter(
        ref,
        adapters[-1].checkpoint.path,
        "adapter",
        _config(adapters[-1], ranks),
        tuple(h for a in adapters for h in a.checkpoint.files),
        sources=tuple(a.checkpoint for a in adapters),
        specs=specs,
        adapters=tuple(adapters),
        weights=tuple(weights),
        rank=rank,
        owners=owners,
    )


def _wide(dtype: DType) -> DType:
    return dtype if dtype.itemsize >= 4 else DType.F32


def _sides(adapter: Adapter, m: LowRank) -> tuple[int, int]:
    a, b = adapter.checkpoint.spec(m.a), adapter.checkpoint.spec(m.b)
    return a.numel // a.shape[0], b.shape[0]


def _config(adapter: Adapter, ranks: dict[str, int]) -> dict[str, Any]:
    """adapter_config.json: alpha equal to the rank everywhere, so that PEFT's scale is one."""
    config = dict(adapter.checkpoint.config)
    usual = max(set(ranks.values()), key=lambda r: (list(ranks.values()).count(r), r))
    odd = {}
    if len(set(ranks.values())) > 1:
        # every module, the longest names first: PEFT takes the first pattern that matches a name's end
        odd = {re.escape(m): r for m, r in sorted(ranks.items(), key=lambda i: (-len(i[0]), i[0]))}
    config |= {"r": usual, "lora_alpha": usual, "use_rslora": False, "rank_pattern": odd, "alpha_pattern": dict(odd)}
    return config


def check_products(adapters: Sequence[Adapter]) -> None:
    """Whether adapters have products that can be averaged. Raises MismatchError."""
    first = adapters[0]
    for other in adapters:
        ref = other.checkpoint.ref
        start = other.checkpoint.config.get("init_lora_weights")
        if changes_the_base(other.checkpoint.config):
            raise MismatchError(
                f"{ref}: initialised with {start!r}, for which PEFT changes the base's weights as it loads the adapter, by an "
                "amount that depends on the rank: average it as factors, or convert it to a plain LoRA with PEFT "
                "(path_initial_model_for_weight_conversion) first"
            )
        if other.is_dora:
            raise MismatchError(
                f"{ref}: a DoRA adapter: its change of a weight depends on the base's weight, so that products B A don't add "
                "up; average it as factors, or apply each to its base with PEFT and average the models"
            )
        missing = sorted(set(first.modules) ^ set(other.modules))
        if missing:
            raise MismatchError(
                f"{ref} and {first.checkpoint.ref} adapt different modules: {', '.join(missing[:4])}"
                f"{', ...' if len(missing) > 4 else ''} in one of them only"
            )
        odd = sorted(set(first.plain) ^ set(other.plain))
        if odd:
            raise MismatchError(f"{ref} and {first.checkpoint.ref} hold different tensors: {', '.join(odd[:4])}")
        for name in first.plain:
            _same_shape(first, other, name, first.checkpoint.spec(name).shape)
            if not first.checkpoint.spec(name).dtype.is_float:
                raise CheckpointError(f"{ref}: {name}: {first.checkpoint.spec(name).dtype} can't be averaged")
        for module, m in first.modules.items():
            own = other.modules[module]
            for name in (own.a, own.b):
                if not other.checkpoint.spec(name).dtype.is_float:
                    raise CheckpointError(f"{ref}: {name}: {other.checkpoint.spec(name).dtype} is no dtype of a factor")
            if (
                _sides(first, m) != _sides(other, own)
                or m.transposed != own.transposed
                or bool(m.bias) != bool(own.bias)
            ):
                raise MismatchError(f"{module}: of another shape in {ref} than in {first.checkpoint.ref}")


def _same_shape(first: Adapter, other: Adapter, name: str, shape: tuple[int, ...]) -> None:
    if other.checkpoint.spec(name).shape != shape:
        raise MismatchError(
            f"{name!r} is {list(shape)} in {first.checkpoint.ref} but {list(other.checkpoint.spec(name).shape)} in "
            f"{other.checkpoint.ref}"
        )
