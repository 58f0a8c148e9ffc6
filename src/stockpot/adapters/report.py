"""What averaging factors apart costs against averaging the products, measured without forming a product."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stockpot.adapters.factored import FactoredAdapter
from stockpot.adapters.peft import Adapter

__all__ = ["factors_report", "product_report"]


def factors_report(adapters: Sequence[Adapter], weights: Sequence[float], *, threads: int = 1) -> dict[str, Any]:
    """Relative Frobenius error of B A (averaged apart) against the average of the products, of each module and of all.

    weights sum to one. Adapters have the same modules, ranks and scales. Reads every factor once.
    """
    from concurrent.futures import ThreadPoolExecutor

    from threadpoolctl import threadpool_limits

    from stockpot.adapters.algebra import mean_error
    from stockpot.adapters.arrays import load_factors

    def measured(module: str) -> tuple[float, float]:
        pairs = zip(weights, adapters, strict=True)
        return mean_error([(w, adapter.modules[module].scale, *load_factors(adapter, module)) for w, adapter in pairs])

    modules = list(adapters[0].modules)
    # one module a thread and one BLAS thread each: BLAS's own threads wait on each other where the machine is busy
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        return _report("factors", dict(zip(modules, pool.map(measured, modules), strict=True)))


def product_report(made: FactoredAdapter) -> dict[str, Any]:
    """Relative error of each module of which a method has lost something; no modules where nothing was lost."""
    for module in made.modules:
        if module not in made.errors:  # a resumed merge had no need of it
            made.computed_module(module)
    pairs = {module: made.errors[module] for module in made.modules if made.errors[module][1]}
    written = max(made.spec(c.lead()[1].a).shape[0] for c in made.modules.values())
    return _report("product", pairs) | ({"rank": written} if pairs else {})


def _report(mode: str, pairs: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    errors = {module: lost / whole if whole else 0.0 for module, (lost, whole) in pairs.items()}
    worst = max(errors, key=errors.__getitem__, default=None)
    lost, whole = (math.sqrt(math.fsum(pair[i] ** 2 for pair in pairs.values())) for i in (0, 1))
    if not all(math.isfinite(e) for e in errors.values()):
        errors = {}  # factors with NaN or infinity: there is no error to speak of, nor a number that JSON could hold
        lost, whole, worst = 0.0, 0.0, None
    return {
        "mode": mode,
        "relative_error": lost / whole if whole else 0.0,
        "worst_module": worst,
        "worst_error": errors[worst] if worst is not None else 0.0,
        "modules": errors,
    }
