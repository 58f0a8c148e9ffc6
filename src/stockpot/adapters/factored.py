"""An adapter whose factors a method computes from those of others, a module at a time, while it is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stockpot.adapters.fitting import sides_of
from stockpot.adapters.peft import Adapter, LowRank
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.derived import KEPT_MODULES, DerivedCheckpoint, files_of
from stockpot.checkpoints.source import ReadRequest
from stockpot.errors import MethodError, MismatchError
from stockpot.methods.declaration import Method
from stockpot.specs import DType, Shape, TensorSpec

__all__ = ["Combination", "FactoredAdapter", "factored_adapter", "module_bytes"]


@dataclass(frozen=True)
class Combination:
    """How one module is made: a method of FACTORS space with its parameters, and what it is made of.

    of  (number of an adapter, its factors; None where it does not adapt the module, which counts as no change)
    """

    method: Method
    params: Mapping[str, Any]
    of: tuple[tuple[int, LowRank | None], ...]

    def lead(self) -> tuple[int, LowRank]:
        """The first that adapts the module: its names and shapes are the output's."""
        return next((i, m) for i, m in self.of if m is not None)


@dataclass(frozen=True)
class FactoredAdapter(DerivedCheckpoint):
    """Factors of every module, computed together when one is asked for. Scales are folded into B; its own scale is one.

    modules  by name, in the order of the output
    owners   tensor -> (module, "a" | "b" | "bias")
    errors   Frobenius norms of what the method loses and of the whole, of each module that was computed
    """

    adapters: tuple[Adapter, ...] = ()
    modules: Mapping[str, Combination] = field(default_factory=dict)
    owners: Mapping[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)

    @property
    def made(self) -> str:
        each = (f"{n} {c.method.name} {dict(c.params)} {[i for i, _ in c.of]}" for n, c in self.modules.items())
        return super().made + "\n".join(each)

    def stored(self, name: str) -> Iterable[tuple[Checkpoint, str]]:
        """The factors and biases of its module, of every adapter that has it."""
        module, _ = self.owners[name]
        for i, m in self.modules[module].of:
            for own in (m.a, m.b, m.bias) if m is not None else ():
                if own is not None:
                    yield from self.adapters[i].checkpoint.stored(own)

    def read(self, requests: Sequence[ReadRequest], buffer: memoryview[Any]) -> None:
        """What is asked for together comes of one computation, whatever other threads do to the cache meanwhile."""
        from stockpot.checkpoints.codecs import encoded

        held: dict[str, dict[str, Any]] = {}
        position = 0
        for r in requests:
            module, part = self.owners[r.name]
            values = held.get(module) or held.setdefault(module, self.computed_module(module))
            raw = encoded(values[part].reshape(-1)[r.start : r.stop], self.spec(r.name).dtype)
            buffer[position : position + len(raw)] = raw.data
            position += len(raw)

    def computed_module(self, module: str) -> dict[str, Any]:
        """A, B and B's bias of one module, from the cache if it was asked for lately."""
        values: dict[str, Any] = self.cache.get(module, lambda: self._module(module))
        return values

    def _module(self, module: str) -> dict[str, Any]:
        from stockpot.adapters.arrays import factors_of

        own = self.modules[module]
        number, lead = own.lead()
        sides = sides_of(self.adapters[number], lead)
        given = [factors_of(self.adapters[i], m, sides) for i, m in own.of]
        made = own.method.run(module, given, **own.params)
        rank = self.spec(lead.a).shape[0]
        wanted = ((rank, sides[0]), (sides[1], rank))
        if (made.a.shape, made.b.shape) != wanted:
            raise MethodError(
                f"{module}: method {own.method.name!r} returned factors of {made.a.shape} and {made.b.shape}; expected "
                f"{wanted[0]} and {wanted[1]}, as its ranks= says"
            )
        if lead.bias is not None and made.bias is None:
            raise MismatchError(
                f"{own.method.name}: combines no biases of B (lora_bias), which {module} has; use product, or adapters without"
            )
        self.errors[module] = (made.lost, made.whole)
        b = made.b if made.scale == 1.0 else made.b * made.scale
        return {
            "a": made.a,
            "b": b,
            "bias": made.bias if made.scale == 1.0 or made.bias is None else made.bias * made.scale,
        }

    def together(self, name: str) -> tuple[str, ...]:
        module, _ = self.owners[name]
        dtype = self.spec(name).dtype
        lead = self.modules[module].lead()[1]
        return tuple(n for n in (lead.a, lead.b, lead.bias) if n is not None and self.spec(n).dtype is dtype)

    def scratch_of(self, name: str) -> int:
        """The factors of all, stacked, and for linear algebra as float64."""
        module, _ = self.owners[name]
        copies = 2 if self.modules[module].method.reproducible == "anywhere" else 6
        return copies * module_bytes(self.adapters, module)

    @property
    def resident(self) -> int:
        return KEPT_MODULES * module_bytes(self.adapters) * 2


def module_bytes(adapters: Sequence[Adapter], module: str | None = None) -> int:
    """Bytes in float32 of the factors of a module, of all adapters; None: of the largest one."""
    each: dict[str, int] = {}
    for adapter in adapters:
        for name, m in adapter.modules.items() if module is None else [(module, adapter.modules.get(module))]:
            if m is not None:
                numel = adapter.checkpoint.spec(m.a).numel + adapter.checkpoint.spec(m.b).numel
                each[name] = each.get(name, 0) + 4 * numel
    return max(each.values(), default=0)


def factored_adapter(
    adapters: Sequence[Adapter], modules: Mapping[str, Combination], donor: Adapter, *, dtype: DType | None = None
) -> FactoredAdapter:
    """The adapter of these combinations, with the donor's config brought up to date. Reads nothing but headers.

    Factors are written in float32 where they are stored narrower, unless dtype says otherwise: weights and scales go into B,
    which would lose digits. Modules and shapes must fit (check_products).
    """
    specs: dict[str, TensorSpec] = {}
    owners: dict[str, tuple[str, str]] = {}
    ranks: dict[str, int] = {}
    for module, own in modules.items():
        number, m = own.lead()
        held = adapters[number].checkpoint
        assert own.method.ranks is not None
        given = [0 if low is None else low.rank for _, low in own.of]
        inner, outer = sides_of(adapters[number], m)
        rank = ranks[module] = own.method.ranks(given, (outer, inner), own.params)

        def add(name: str, part: str, shape: Shape, module: str = module, stored: DType = DType.F32) -> None:
            specs[name] = TensorSpec(dtype or (stored if stored.itemsize >= 4 else DType.F32), shape)
            owners[name] = (module, part)

        a, b = held.spec(m.a), held.spec(m.b)
        add(m.a, "a", (rank, *a.shape[1:]), stored=a.dtype)
        add(m.b, "b", (b.shape[0], rank, *b.shape[2:]), stored=b.dtype)
        if m.bias is not None:
            bias = held.spec(m.bias)
            specs[m.bias] = TensorSpec(dtype or bias.dtype, bias.shape)
            owners[m.bias] = (module, "bias")
    return FactoredAdapter(
        "factors",
        donor.checkpoint.path,
        "adapter",
        _config(donor, ranks),
        files_of(a.checkpoint for a in adapters),
        sources=tuple(a.checkpoint for a in adapters),
        specs=specs,
        adapters=tuple(adapters),
        modules=modules,
        owners=owners,
    )


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
