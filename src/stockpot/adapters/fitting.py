"""Whether adapters can be combined as products: what they change, module by module, must be one kind of thing."""

from __future__ import annotations

from collections.abc import Sequence

from stockpot.adapters.peft import Adapter, LowRank, changes_the_base
from stockpot.errors import CheckpointError, MismatchError

__all__ = ["check_plain", "check_products", "sides_of"]


def sides_of(adapter: Adapter, m: LowRank) -> tuple[int, int]:
    """(in, out) of a module: kernels of convolutions flattened."""
    a, b = adapter.checkpoint.spec(m.a), adapter.checkpoint.spec(m.b)
    return a.numel // a.shape[0], b.shape[0]


def check_products(adapters: Sequence[Adapter], *, absent: str | None = None) -> None:
    """Whether adapters have products that can be combined. Raises MismatchError.

    absent: the recipe's choice for modules that only some adapt; None where there is none: all must adapt the same
    """
    first = adapters[0]
    leads: dict[str, Adapter] = {}
    for adapter in adapters:
        for module in adapter.modules:
            leads.setdefault(module, adapter)
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
        if missing and absent in (None, "error"):
            way_out = (
                "; 'absent: zero' takes that for no change, 'absent: skip' shares the weights among those that have it"
                if absent
                else ""
            )
            raise MismatchError(
                f"{ref} and {first.checkpoint.ref} adapt different modules: {', '.join(missing[:4])}"
                f"{', ...' if len(missing) > 4 else ''} in one of them only{way_out}"
            )
        for module, own in other.modules.items():
            lead = leads[module]
            m = lead.modules[module]
            for name in (own.a, own.b):
                if not other.checkpoint.spec(name).dtype.is_float:
                    raise CheckpointError(f"{ref}: {name}: {other.checkpoint.spec(name).dtype} is no dtype of a factor")
            if (
                sides_of(lead, m) != sides_of(other, own)
                or m.transposed != own.transposed
                or bool(m.bias) != bool(own.bias)
            ):
                raise MismatchError(f"{module}: of another shape in {ref} than in {lead.checkpoint.ref}")


def check_plain(adapters: Sequence[Adapter]) -> None:
    """Whether what lies beside the factors (saved modules, biases) can be averaged. Raises MismatchError, CheckpointError."""
    first = adapters[0]
    for other in adapters:
        ref = other.checkpoint.ref
        odd = sorted(set(first.plain) ^ set(other.plain))
        if odd:
            raise MismatchError(f"{ref} and {first.checkpoint.ref} hold different tensors: {', '.join(odd[:4])}")
        for name in first.plain:
            spec, own = first.checkpoint.spec(name), other.checkpoint.spec(name)
            if own.shape != spec.shape:
                raise MismatchError(
                    f"{name!r} is {list(spec.shape)} in {first.checkpoint.ref} but {list(own.shape)} in {ref}"
                )
            if not spec.dtype.is_float:
                raise CheckpointError(f"{ref}: {name}: {spec.dtype} can't be averaged")
