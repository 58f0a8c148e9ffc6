"""Paired bootstrap: how sure a difference between two checkpoints is that were scored on the same examples."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stockpot.evaluation.scores import Scores
from stockpot.evaluation.suite import Slice, Suite

__all__ = ["DRAWS", "Difference", "Interval", "bootstrap_score", "paired_difference", "suite_score"]

Array = np.ndarray[Any, Any]

DRAWS = 10_000
_SEED = 20_418_580
_CHUNK = 2**22


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; low and high are None where single examples are not known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """a minus b, where more than 0 means that a is better whatever the metric's direction.

    verdict  "better", "worse" (the interval leaves 0 out), "noise" (it does not), "same" (equal on every example),
             "unknown" (no examples to draw from)
    """

    value: float
    low: float | None
    high: float | None
    verdict: str
    n: int

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "verdict": self.verdict, "n": self.n}


def suite_score(suite: Suite, scores: Mapping[str, Scores]) -> float | None:
    """The weighted score over the slices that count; None where one of them was not scored."""
    needed = [s for s in suite.slices if s.weight]
    if any(s.name not in scores for s in needed):
        return None
    return suite.score({s.name: scores[s.name][s.metric] for s in needed})


def bootstrap_score(suite: Suite, scores: Mapping[str, Scores], draws: int = 2000) -> Interval:
    """The suite's score with the interval that resampling the examples of each slice gives."""
    value = suite_score(suite, scores)
    assert value is not None
    total = np.zeros(draws)
    weights = sum(s.weight for s in suite.slices)
    for part in suite.slices:
        if not part.weight:
            continue
        drawn = _resampled([scores[part.name]], part, draws)
        if drawn is None:
            return Interval(value)
        total = total + suite.sign(part) * part.weight / weights * drawn[0]
    low, high = np.percentile(total, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def paired_difference(
    suite: Suite, a: Mapping[str, Scores], b: Mapping[str, Scores], *, only: str | None = None, draws: int = DRAWS
) -> Difference:
    """The suite's score (or one slice's metric) of a minus that of b, signed so that more is better.

    Each draw resamples the examples of every slice, the same ones for a and b (95 % percentile interval, fixed seed).
    """
    parts = [s for s in suite.slices if (s.name == only if only else s.weight)]
    direction = parts[0].direction if only else suite.direction
    sign = 1.0 if direction == "max" else -1.0
    weights = 1.0 if only else sum(s.weight for s in parts)
    value, total, n, same = 0.0, np.zeros(draws), 0, True
    known = True
    for part in parts:
        x, y = a[part.name], b[part.name]
        share = 1.0 if only else suite.sign(part) * part.weight / weights
        value += share * (x[part.metric] - y[part.metric])
        n += min(x.n, y.n)
        drawn = _resampled([x, y], part, draws)
        same = same and _equal(x, y, part.metric)
        if drawn is None:
            known = False
        else:
            total = total + share * (drawn[0] - drawn[1])
    if same:
        return Difference(0.0, 0.0, 0.0, "same", n)
    if not known:
        return Difference(sign * value, None, None, "unknown", n)
    low, high = np.percentile(sign * total, [2.5, 97.5])
    verdict = "better" if low > 0 else "worse" if high < 0 else "noise"
    return Difference(sign * value, float(low), float(high), verdict, n)


def _equal(x: Scores, y: Scores, metric: str) -> bool:
    a, b = x.of(metric), y.of(metric)
    if a is None or b is None:
        return False
    return x.ids == y.ids and np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


def _resampled(scores: Sequence[Scores], part: Slice, draws: int) -> list[Array] | None:
    """The metric of each of `scores` in every draw, [draws] each, over the same examples. None where they are unknown."""
    found = [s.of(part.metric) for s in scores]
    if any(f is None for f in found):
        return None
    sizes = {len(f[0]) for f in found if f is not None}
    if len(sizes) != 1 or any(s.ids != scores[0].ids for s in scores):
        return None
    n = sizes.pop()
    rng = np.random.default_rng([_SEED, n, zlib.crc32(part.name.encode())])
    out: list[list[Array]] = [[] for _ in scores]
    step = max(_CHUNK // n, 1)
    for start in range(0, draws, step):
        picked = rng.integers(0, n, size=(min(step, draws - start), n))
        flat = (picked + n * np.arange(len(picked))[:, None]).reshape(-1)
        times = np.bincount(flat, minlength=len(picked) * n).reshape(len(picked), n).astype(np.float64)
        for i, f in enumerate(found):
            assert f is not None
            values, counts, transform = f
            out[i].append(transform((times @ (values * counts)) / (times @ counts)))
    return [np.concatenate(o) for o in out]
