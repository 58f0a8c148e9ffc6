"""The algebra of low-rank deltas: what factors mean, adapters made of others' factors, adapters fused into a model."""

from stockpot.adapters.factored import Combination, FactoredAdapter, factored_adapter
from stockpot.adapters.fitting import check_products
from stockpot.adapters.fused import FusedModel, fuse
from stockpot.adapters.peft import Adapter, LowRank, changes_the_base, config_for, read_adapter
from stockpot.adapters.report import factors_report, product_report

__all__ = [
    "Adapter",
    "Combination",
    "FactoredAdapter",
    "FusedModel",
    "LowRank",
    "changes_the_base",
    "check_products",
    "config_for",
    "factored_adapter",
    "factors_report",
    "fuse",
    "product_report",
    "read_adapter",
]
