"""The algebra of low-rank deltas: what an adapter's factors mean, their exact products, adapters fused into a model."""

from stockpot.adapters.fused import FusedModel, fuse
from stockpot.adapters.peft import Adapter, LowRank, changes_the_base, read_adapter
from stockpot.adapters.product import ProductAdapter, product_adapter
from stockpot.adapters.report import factors_report, product_report

__all__ = [
    "Adapter",
    "FusedModel",
    "LowRank",
    "ProductAdapter",
    "changes_the_base",
    "factors_report",
    "fuse",
    "product_adapter",
    "product_report",
    "read_adapter",
]
