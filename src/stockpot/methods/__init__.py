"""The merge methods: mathematics only, declared with `@method`, one file a family."""

from stockpot.methods.arithmetic import task_arithmetic
from stockpot.methods.averaging import linear, passthrough
from stockpot.methods.dare import dare_linear, dare_ties
from stockpot.methods.declaration import Method, Scope, Space, get_method, method, methods
from stockpot.methods.parameters import ByDialect, Choice, Flag, Named, PerModel, Real
from stockpot.methods.spherical import slerp
from stockpot.methods.statistics import Cutoff, Mask, Total
from stockpot.methods.ties import ties

__all__ = [
    "ByDialect", "Choice", "Cutoff", "Flag", "Mask", "Method", "Named", "PerModel", "Real", "Scope", "Space", "Total",
    "dare_linear", "dare_ties", "get_method", "linear", "method", "methods", "passthrough", "slerp", "task_arithmetic",
    "ties",
]  # fmt: skip
