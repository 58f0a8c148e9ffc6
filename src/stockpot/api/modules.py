"""Merging what is in memory already: modules of torch, or their state dicts, on whatever device they lie."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stockpot.errors import ArgumentError
from stockpot.methods.declaration import Method, Space, get_method, wrong_count

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = ["merge_modules"]


def merge_modules(
    models: Sequence[Module] | Sequence[Mapping[str, Tensor]],
    method: str | Method = "linear",
    *,
    base: Module | Mapping[str, Tensor] | None = None,
    seed: int = 0,
    **parameters: Any,
) -> Any:
    """Merge modules of torch, or state dicts, as a recipe's `merge_method` would, without a file.

    models      modules of one architecture, or mappings from names to tensors; base: another one, for methods that need it
    parameters  the method's, by name (`lambda` as `scale=` or `**{"lambda": 0.5}`): one value, or a list of one for each model
    returns     for modules a copy of the first (of the base, where it is subtracted) with the merged parameters and buffers, on
                its device; for state dicts a dict

    Integers (counters, position ids) are the first's (the base's). Gradients: where a state dict or a parameter has
    `requires_grad`, a method that is a plain formula of its weights (`linear`, `task_arithmetic`, `wise_ft`, `passthrough`)
    keeps the graph, on the tensors' device; the dict is then what `torch.func.functional_call` takes. Other methods compute
    on the CPU, as a merge of files does, to the same bytes.

    Raises ArgumentError for names or shapes that differ, for wrong parameters, and for gradients that could not be kept.
    """
    import torch
    from torch.nn import Module

    found = get_method(method) if isinstance(method, str) else method
    given: list[Any] = list(models)
    everything = [*given, *([base] if base is not None else [])]
    if not given:
        raise ArgumentError("merge_modules: no models")
    as_modules = isinstance(given[0], Module)
    for i, m in enumerate(everything):
        if isinstance(m, Module) != as_modules or not isinstance(m, (Module, Mapping)):
            raise ArgumentError(
                f"merge_modules: expected modules, or mappings from names to tensors, all of one kind; number {i} is a "
                f"{type(m).__name__}"
            )
    dicts = [m.state_dict() if isinstance(m, Module) else dict(m) for m in given]
    own = base.state_dict() if isinstance(base, Module) else dict(base) if base is not None else None
    graph = _wants_graph(parameters, [] if as_modules else [*dicts, *([own] if own else [])])
    if graph and as_modules:
        raise ArgumentError(
            "merge_modules: a parameter wants gradients, which the copy of a module can't keep: give state dicts "
            "(dict(model.named_parameters())) and call the model with the result by torch.func.functional_call"
        )
    if graph:
        return _with_graph(found, dicts, own, parameters)
    with torch.no_grad():
        merged = found(dicts, base=own, seed=seed, **{k: _plain(v) for k, v in parameters.items()})
    if not as_modules:
        return merged
    template: Any = base if base is not None and found.space is Space.DELTA else given[0]
    out = copy.deepcopy(template)
    out.load_state_dict(merged)
    return out


def _wants_graph(parameters: Mapping[str, Any], dicts: Sequence[Mapping[str, Any]]) -> bool:
    values = [v for p in parameters.values() for v in (p if isinstance(p, (list, tuple)) else [p])]
    tensors = [*values, *(t for d in dicts for t in d.values())]
    return any(getattr(t, "requires_grad", False) for t in tensors)


def _plain(value: Any) -> Any:
    """Tensors as numbers."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _with_graph(
    method: Method, dicts: list[dict[str, Tensor]], base: dict[str, Tensor] | None, parameters: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The method's own formula on tensors of torch, in float32 at least."""
    import torch

    from stockpot.engine.inmemory import full_parameters

    if base is None:
        method = method.without_base()
    if not method.differentiable:
        able = "linear, task_arithmetic, wise_ft, passthrough"
        raise ArgumentError(
            f"{method.name} is no differentiable formula here ({able} are): detach the tensors, or use one of those"
        )
    if method.space is Space.DELTA and base is None:
        raise ArgumentError(f"{method.name} works on differences from a base: give base=")
    if method.space is Space.WEIGHT and base is not None:
        dicts = [base, *dicts]
    if why := wrong_count(method, len(dicts)):
        raise ArgumentError(why)
    given = full_parameters(method, len(dicts), {k: _plain(v) for k, v in parameters.items()})
    if why := method.check(given) if method.check else None:
        raise ArgumentError(f"{method.name}: {why}")
    # the same values, with their graph where they have one
    for p in method.parameters.values():
        value = parameters.get(p.keyword, parameters.get(p.name))
        if value is None:
            continue
        listed = isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.ndim > 0)
        if any(isinstance(v, torch.Tensor) for v in (value if listed else [value])):
            given[p.keyword] = (tuple(value) if listed else (value,) * len(dicts)) if p.per_model else value
    template = base if method.space is Space.DELTA and base is not None else dicts[0]
    out: dict[str, Tensor] = {}
    for name, first in template.items():
        for d in dicts:
            if name not in d or d[name].shape != first.shape:
                what = "is missing" if name not in d else f"is {list(d[name].shape)}, expected {list(first.shape)}"
                raise ArgumentError(f"merge_modules: {name!r} of a model {what}")
        if not first.is_floating_point():
            out[name] = first
            continue
        work = torch.promote_types(first.dtype, torch.float32)
        block = torch.stack([d[name].to(work) for d in dicts])
        start = base[name].to(work) if method.space is Space.DELTA and base is not None else None
        result = method.function(block if start is None else block - start, **given)
        out[name] = (result if start is None else result + start).to(first.dtype)
    for d in dicts:
        if extra := d.keys() - template.keys():
            raise ArgumentError(f"merge_modules: {min(extra)!r} is in one model only")
    return out
