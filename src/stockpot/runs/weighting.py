"""Weights of snapshots: metrics-weighted averaging (arXiv 2504.18580) and the schemes it is compared with.

All functions are pure: numbers in, weights out that sum to one. Snapshots are in step order, the oldest first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from stockpot.errors import ArgumentError

__all__ = ["DEFAULT_POWER", "decay_weights", "effective_count", "ema_weights", "metric_weights", "ranks", "uniform"]

#: the paper leaves q open; 1.2 lets ten snapshots all count (docs/mwa.md)
DEFAULT_POWER = 1.2

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
}


def uniform(k: int) -> list[float]:
    """1/k each."""
    return _normalised([1.0] * k)


def metric_weights(
    values: Sequence[float], objective: str, penalty: float = 1.0, power: float = DEFAULT_POWER
) -> list[float]:
    """phi = penalty^(power^pos) / value (objective "min") or * value ("max"), normalised; pos is the rank, 0 the best.

    values   [k]   the metric of each snapshot: above 0 for "min", at least 0 for "max"
    penalty  p > 0; below 1 favours the better-ranked; 1 leaves plain metric weighting
    power    q > 0 (the paper: q > 1): how steeply the penalty grows with rank
    returns  [k]   weights that sum to one; snapshots of equal metric share the mean of their ranks

    Source: arXiv 2504.18580, eq. 3 and 4. Computed from logarithms, so that no k, p or q overflows.
    """
    check_penalty(penalty, power)
    if objective not in ("min", "max"):
        raise ArgumentError(f"objective: expected min or max, got {objective!r}")
    for v in values:
        if not math.isfinite(v) or v < 0 or (v == 0 and objective == "min"):
            bound = "above 0" if objective == "min" else "of at least 0"
            raise ArgumentError(f"metric weights need values {bound}, got {v!r}")
    logs = []
    for value, rank in zip(values, ranks(values, objective), strict=True):
        log_value = math.log(value) if value > 0 else -math.inf
        logs.append(_penalty_log(penalty, power, rank) + (log_value if objective == "max" else -log_value))
    top = max(logs, default=0.0)
    if top == -math.inf:
        raise ArgumentError("metric weights: every value is 0")
    if top == math.inf:
        raise ArgumentError(
            f"penalty {penalty} with power {power} overflows over {len(values)} ranks; choose a lower power"
        )
    return _normalised([math.exp(x - top) for x in logs])


def check_penalty(penalty: float, power: float) -> None:
    """Raises ArgumentError unless both are finite and above 0."""
    if not (math.isfinite(penalty) and penalty > 0):
        raise ArgumentError(f"penalty: expected a number above 0, got {penalty!r}")
    if not (math.isfinite(power) and power > 0):
        raise ArgumentError(f"power: expected a number above 0, got {power!r}")


def _penalty_log(penalty: float, power: float, rank: float) -> float:
    log_p = math.log(penalty)
    if log_p == 0:
        return 0.0
    exponent = rank * math.log(power)
    return log_p * math.exp(exponent) if exponent < 700 else math.copysign(math.inf, log_p)


def ranks(values: Sequence[float], objective: str) -> list[float]:
    """Zero-based rank of each value from best to worst; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda i: values[i], reverse=objective == "max")
    out = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for i in order[start:stop]:
            out[i] = (start + stop - 1) / 2
        start = stop
    return out


def decay_weights(k: int, schedule: str) -> list[float]:
    """Weights that stand for a learning rate decaying over the snapshots, oldest first: c_j = f(j/k) - f((j+1)/k).

    schedule: "linear" f(x) = 1 - x, which gives equal weights, or "1-sqrt" f(x) = 1 - sqrt(x), which favours the oldest.
    Source: arXiv 2507.17634 (averaging of a stable phase replaces its decay).
    """
    f = SCHEDULES[schedule]
    return _normalised([f(j / k) - f((j + 1) / k) for j in range(k)])


def ema_weights(steps: Sequence[int], decay: float, per: str = "snapshot") -> list[float]:
    """Weights of an exponential moving average that starts at the oldest snapshot.

    ema_1 = x_1, ema_j = m ema_{j-1} + (1 - m) x_j, with m = decay for each snapshot, or decay^(steps between them).
    """
    if not 0 <= decay <= 1:
        raise ArgumentError(f"decay: expected a number from 0 to 1, got {decay!r}")
    if per not in ("snapshot", "step"):
        raise ArgumentError(f"decay_per: expected snapshot or step, got {per!r}")
    weights = [1.0]
    for before, after in itertools.pairwise(steps):
        m = decay if per == "snapshot" else decay ** (after - before)
        weights = [w * m for w in weights]
        weights.append(1.0 - m)
    return _normalised(weights)


def effective_count(weights: Sequence[float]) -> float:
    """1 / sum w^2: how many equally weighted snapshots would average as much."""
    return 1.0 / math.fsum(w * w for w in weights)


def _normalised(raw: Sequence[float]) -> list[float]:
    """Divided by their exactly rounded sum: the weights' own sum is one within 2^-53, and equal ones stay equal."""
    total = math.fsum(raw)
    return [w / total for w in raw]
