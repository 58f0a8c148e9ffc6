"""A base model with adapters applied, computed block by block while it is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.adapters.factored import module_bytes
from stockpot.adapters.fitting import check_plain, check_products
from stockpot.adapters.peft import PREFIX, Adapter, LowRank
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.derived import KEPT_MODULES, DerivedCheckpoint, files_of
from stockpot.checkpoints.source import ReadRequest
from stockpot.errors import CheckpointError, MismatchError, nearest
from stockpot.specs import DType, TensorSpec

__all__ = ["FusedModel", "fuse"]

#: models whose linear layers are transformers' Conv1D, with weights [in, out], and the names of these layers
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt-sw3")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True)
class FusedModel(DerivedCheckpoint):
    """W + sum_i w_i scale_i B_i A_i for each adapted weight; saved modules and biases replaced by their average."""

    base: Checkpoint | None = None
    adapters: tuple[Adapter, ...] = ()
    weights: tuple[float, ...] = ()
    adapted: dict[str, str] = field(default_factory=dict, repr=False)  # base tensor -> module
    replaced: dict[str, str] = field(default_factory=dict, repr=False)  # base tensor -> adapter tensor
    transposed: frozenset[str] = frozenset()  # modules whose delta is (B A)^T
    exact: bool = False

    def written(self, name: str) -> DType:
        assert self.base is not None
        return self.base.spec(name).dtype if self.exact else self.spec(name).dtype

    @property
    def made(self) -> str:
        return f"{super().made}fused {self.weights} {self.exact}"

    def passed(self, name: str) -> tuple[Checkpoint, str, int] | None:
        assert self.base is not None
        if name in self.replaced or name in self.adapted or self.base.spec(name).dtype is not self.spec(name).dtype:
            return None
        return self.base, name, 0

    def stored(self, name: str) -> Iterable[tuple[Checkpoint, str]]:
        assert self.base is not None
        own = [(a.checkpoint, self.replaced[name]) for a in self.adapters] if name in self.replaced else []
        own += [] if name in self.replaced else [(self.base, name)]
        if name in self.adapted:
            for adapter in self.adapters:
                low_rank = adapter.modules[self.adapted[name]]
                own += [(adapter.checkpoint, low_rank.a), (adapter.checkpoint, low_rank.b)]
        return (pair for source, n in own for pair in source.stored(n))

    def computed(self, name: str, start: int, stop: int, out: memoryview[Any]) -> None:
        import numpy as np

        from stockpot.adapters.arrays import averaged
        from stockpot.checkpoints.codecs import decoded, encoded

        assert self.base is not None
        spec = self.spec(name)
        stored = self.base.spec(name).dtype
        if name in self.replaced:
            values = averaged(self.adapters, self.weights, self.replaced[name], start, stop)
        elif self.passed(name):
            self.base.read([ReadRequest(name, start, stop)], out)
            return
        else:
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
        from stockpot.adapters.arrays import stacked_factors

        a, b = stacked_factors(self.adapters, self.weights, module)
        if module in self.transposed:
            return a.T.copy(), b.T.copy()
        return b, a

    @property
    def resident(self) -> int:
        return KEPT_MODULES * module_bytes(self.adapters) * 2 + sum(s.resident for s in self.sources)

    @property
    def scratch_itemsize(self) -> int:
        """As it is stored, as float32, its delta (twice while it is put together), their sum, as it is written."""
        return 20 + max(s.scratch_itemsize for s in self.sources)


def fuse(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    dtype: DType | None = None,
    exact: bool = False,
    ref: str = "",
) -> FusedModel:
    """The base with the weighted sum of adapters applied.

    dtype  of float tensors; None: as the base stores them
    exact  for what is computed with further: float32 (or wider, as stored) now, the base's dtype when it is written

    Raises MismatchError where an adapter does not fit the base, or for DoRA; nothing is read but headers.
    """
    check_products(adapters)
    check_plain(adapters)
    if base.kind != "model":
        raise CheckpointError(f"{base.ref}: an adapter; a base must be a full model")
    tied = base.tied()
    specs = {}
    for name in base.names():
        if name not in tied:
            spec = base.spec(name)
            wanted = dtype or (DType.F32 if exact and spec.dtype.itemsize < 4 else spec.dtype)
            specs[name] = TensorSpec(wanted if spec.dtype.is_float else spec.dtype, spec.shape)
    first = adapters[0]
    adapted = {}
    transposed = set()
    for module, m in first.modules.items():
        if m.bias is not None:
            raise MismatchError(
                f"{first.checkpoint.ref}: {module}: lora_bias can't be written into a base; use product"
            )
        if _is_transposed(base, first, m):
            transposed.add(module)
        adapted[_target(base, first, f"{module}.weight", _delta_shape(first, m, module in transposed))] = module
    replaced = {}
    for name in first.plain:
        if (beside := first.checkpoint.part_of(name)) is not None:
            raise MismatchError(
                f"{first.checkpoint.ref}: {beside.stem} lies beside the adapter, and has no place in a fused model: average "
                "it by itself, by naming its files as models, and move it away"
            )
        shape = first.checkpoint.spec(name).shape
        plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")  # so PEFT calls the layer that it wraps
        replaced[_target(base, first, plain, shape)] = name
    return FusedModel(
        ref or base.ref,
        base.path,
        "model",
        base.config,
        files_of((base, *(a.checkpoint for a in adapters))),
        sources=(base, *(a.checkpoint for a in adapters)),
        specs=specs,
        base=base,
        adapters=tuple(adapters),
        weights=tuple(weights),
        adapted=adapted,
        replaced=replaced,
        transposed=frozenset(transposed),
        exact=exact,
    )


def _delta_shape(adapter: Adapter, m: LowRank, transposed: bool) -> tuple[int, ...]:
    a, b = adapter.checkpoint.spec(m.a).shape, adapter.checkpoint.spec(m.b).shape
    return (*a[1:], b[0]) if transposed else (b[0], *a[1:])


def _is_transposed(base: Checkpoint, adapter: Adapter, m: LowRank) -> bool:
    """Whether the base stores the module's weight as [in, out].

    The config's fan_in_fan_out holds for one module only (PEFT corrects it module by module and saves the last): the shape
    decides, and where it is square, what the architecture is known to do.
    """
    if m.embedding:
        return True
    plain, turned = _delta_shape(adapter, m, False), _delta_shape(adapter, m, True)
    if plain != turned:
        name = f"{m.module}.weight"
        found = [
            base.spec(n).shape for n in base.names() if n == name or n.endswith("." + name) or name.endswith("." + n)
        ]
        return turned in found if found else m.transposed
    if len(plain) != 2:
        return False
    if base.config.get("model_type") in _CONV1D_MODELS:
        return m.module.rpartition(".")[2] in _CONV1D_LAYERS
    return m.transposed


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
    if found in base.ties.twins():
        raise MismatchError(
            f"{adapter.checkpoint.ref}: adapts {found!r}, which is tied in {base.ref}: fusing would change its twin too; "
            "untie the base first"
        )
    if not base.spec(found).dtype.is_float:
        raise MismatchError(
            f"{adapter.checkpoint.ref}: adapts {found!r}, which is {base.spec(found).dtype} in {base.ref}: nothing can be added "
            "to it"
        )
    if base.spec(found).shape != shape:
        raise MismatchError(
            f"{adapter.checkpoint.ref}: its change of {found!r} is {list(shape)}, the tensor in {base.ref} "
            f"{list(base.spec(found).shape)}"
        )
    return found
