"""The merge methods: mathematics only, declared with `@method`, one file a method or family.

Every module of this folder is imported, so a method is added by adding its file. Other packages add theirs by an entry point of
the group `stockpot.methods` that names a module.
"""

import importlib as _importlib
import pkgutil as _pkgutil

from stockpot.methods.declaration import (
    _REGISTRY,
    Companion,
    Cost,
    Example,
    Method,
    Scope,
    Space,
    get_method,
    method,
    methods,
)
from stockpot.methods.factors import Factors
from stockpot.methods.parameters import ByDialect, Choice, Flag, Named, PerLayer, PerModel, Real, Text, Whole
from stockpot.statistics import Extremes, Gram, L1Norms, Mask, Normal, Quantile, Rank, SignSum, Total, Uniform

for _module in sorted(m.name for m in _pkgutil.iter_modules(__path__)):
    _importlib.import_module(f"{__name__}.{_module}")

_DECLARED = {name: found for name, found in sorted(_REGISTRY.items()) if found.builtin}
globals().update(_DECLARED)

__all__ = [
    "ByDialect", "Choice", "Companion", "Cost", "Example", "Extremes", "Factors", "Flag", "Gram", "L1Norms", "Mask", "Method",
    "Named", "Normal", "PerLayer", "PerModel", "Quantile", "Rank", "Real", "Scope", "SignSum", "Space", "Text", "Total",
    "Uniform", "Whole", "get_method", "method", "methods",
]  # fmt: skip
__all__ += list(_DECLARED)
