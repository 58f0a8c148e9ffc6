"""The smallest and the largest of something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from stockpot.statistics.base import EXTENTS, Extent, Known, Over, Params, Statistic

__all__ = ["Extremes"]


@dataclass(frozen=True)
class Extremes(Statistic):
    """Smallest and largest value of each row of terms, NaN passed over: float64 `[2, k]`; over rows `[2, k, rows, 1]`.

    of   block `[m, n]` (with parameters, earlier statistics and draws as keywords) -> `[k, n]`; None: the block itself

    Where nothing is a number: infinity and minus infinity.
    """

    name: str = "extremes"
    of: Callable[..., Any] | None = None
    over: Over = "tensor"
    when: Callable[[Params], bool] | None = None
    extents: ClassVar[tuple[Extent, ...]] = EXTENTS

    def start(self, params: Params, models: int, count: int, known: Mapping[str, Any]) -> Any:
        return models

    def fold(self, seek: Any, block: Any, keywords: Mapping[str, Any], so_far: Any = None) -> Any:
        import numpy as np

        values = np.asarray(block if self.of is None else self.of(block, **keywords))
        return self._ends(values.reshape(len(values), -1))[..., 0]

    def merge(self, seek: Any, a: Any, b: Any) -> Any:
        import numpy as np

        return np.stack((np.minimum(a[0], b[0]), np.maximum(a[1], b[1])))

    def finish(self, seek: Any, total: Any) -> Any:
        import numpy as np

        return Known(np.array([[np.inf] * seek, [-np.inf] * seek]) if total is None else total)

    def of_rows(self, block: Any, params: Params, keywords: Mapping[str, Any]) -> Any:
        import numpy as np

        return self._ends(np.asarray(block if self.of is None else self.of(block, **keywords)))

    @staticmethod
    def _ends(values: Any) -> Any:
        """Along the last axis, which stays."""
        import numpy as np

        low = np.fmin.reduce(values, axis=-1, keepdims=True, initial=np.inf)
        high = np.fmax.reduce(values, axis=-1, keepdims=True, initial=-np.inf)
        return np.stack((low, high)).astype(np.float64)
