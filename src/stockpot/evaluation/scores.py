"""What an evaluator gives back: metrics, and the scores of single examples behind them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from stockpot.errors import EvaluationError, nearest

__all__ = ["Evaluator", "Progress", "Scores", "checked_scores"]

Array = np.ndarray[Any, Any]
#: called with (examples done, examples in all)
Progress = Callable[[int, int], None]

#: metrics that are a function of the mean over examples, by name: (metric whose examples they use, the function)
_TRANSFORMED: dict[str, tuple[str, Callable[[Any], Any]]] = {"perplexity": ("loss", np.exp)}


class Scores(dict[str, float]):
    """`{metric: value}`, with what it was computed from where that is known.

    examples  metric -> float64 [n]: the value of each example; the metric is their mean, weighted by `counts`
    counts    float64 [n] or None: what an example weighs (tokens of a document); None: all alike
    ids       the documents that were scored, in the order of `examples`
    seconds   how long it took
    """

    def __init__(
        self,
        metrics: Mapping[str, float],
        *,
        examples: Mapping[str, Any] | None = None,
        counts: Any = None,
        ids: tuple[str, ...] = (),
        seconds: float = 0.0,
    ) -> None:
        super().__init__(metrics)
        self.examples = {k: np.asarray(v, np.float64) for k, v in (examples or {}).items()}
        self.counts: Array | None = None if counts is None else np.asarray(counts, np.float64)
        self.ids = ids
        self.seconds = seconds

    @property
    def n(self) -> int:
        """How many different examples were scored; 0 where that is not known."""
        return len(set(self.ids)) or max((len(v) for v in self.examples.values()), default=0)

    def of(self, metric: str) -> tuple[Array, Array, Callable[[Any], Any]] | None:
        """(values [n], weights [n], function of their mean) behind a metric; None where it has no examples."""
        source, transform = _TRANSFORMED.get(metric, (metric, _identity))
        values = self.examples.get(source)
        if values is None or not len(values):
            return None
        counts = self.counts if self.counts is not None and len(self.counts) == len(values) else np.ones(len(values))
        if len(set(self.ids)) < len(self.ids) == len(values):
            # equal documents are one example, however often they stand in the data
            _, first, where = np.unique(np.array(self.ids), return_index=True, return_inverse=True)
            weight = np.bincount(where, counts)
            values = np.bincount(where, values * counts) / np.where(weight > 0, weight, 1.0)
            order = np.argsort(first)
            values, counts = values[order], weight[order]
        if (counts <= 0).any():
            values, counts = values[counts > 0], counts[counts > 0]
        return (values, counts, transform) if len(values) else None


def _identity(x: Any) -> Any:
    return x


class Evaluator(Protocol):
    """Scores a checkpoint. What `python: module:name` of a suite may name; a plain function does as well.

    `checkpoint` is an evaluation.loaded.LoadedModel: `.model` (in eval mode), `.tokenizer`, `.device`, `.save()` (a directory).
    """

    def score(self, checkpoint: Any) -> Mapping[str, float]:
        """`{metric: value}`; Scores where there are values of single examples."""
        ...


def checked_scores(raw: Any, metric: str, where: str) -> Scores:
    """What an evaluator gave, as Scores that hold `metric` as a finite number. Raises EvaluationError."""
    if not isinstance(raw, Mapping):
        raise EvaluationError(f"{where}: expected a mapping from metrics to numbers, got {_short(raw)}")
    scores = _plain(raw, metric, where)
    if metric not in scores:
        known = ", ".join(sorted(scores)) or "none"
        raise EvaluationError(f"{where}: gave no metric {metric!r}; there are {known}{nearest(metric, scores)}")
    value = scores[metric]
    if not math.isfinite(value):
        raise EvaluationError(f"{where}: {metric} is {value}, which is no score")
    part = scores.of(metric)
    if part is not None and not np.isfinite(part[0]).all():
        bad = int(np.flatnonzero(~np.isfinite(part[0]))[0])
        raise EvaluationError(f"{where}: {metric} of example {bad} is {part[0][bad]}, which is no score")
    return scores


def _plain(raw: Mapping[Any, Any], metric: str, where: str) -> Scores:
    """Plain numbers by metric, whoever made the mapping. In one that is no Scores, `examples` may hold lists by metric, `counts`
    and `ids` lists of that length. Raises EvaluationError where these don't fit each other.
    """
    seconds = 0.0
    if isinstance(raw, Scores):
        extras: dict[str, Any] = {"examples": raw.examples, "counts": raw.counts, "ids": raw.ids}
        seconds = raw.seconds
    else:
        extras = {key: raw.get(key) for key in ("examples", "counts", "ids") if _number(raw.get(key)) is None}
    metrics = {}
    for key, value in raw.items():
        number = _number(value)
        # one that is asked for must be finite; others that are not are no numbers for anybody
        if isinstance(key, str) and number is not None and (key == metric or math.isfinite(number)):
            metrics[key] = number
    try:
        arrays = {str(k): np.asarray(v, np.float64) for k, v in dict(extras.get("examples") or {}).items()}
        counts = None if extras.get("counts") is None else np.asarray(extras["counts"], np.float64)
        ids = tuple(str(i) for i in (() if extras.get("ids") is None else extras["ids"]))
    except (TypeError, ValueError) as e:
        raise EvaluationError(f"{where}: examples and counts must be lists of numbers, ids a list: {e}") from e
    lengths = {len(a) if a.ndim == 1 else -1 for a in (*arrays.values(), *(() if counts is None else (counts,)))}
    lengths |= {len(ids)} if ids else set()
    if len(lengths) > 1 or -1 in lengths:
        raise EvaluationError(f"{where}: examples, counts and ids differ in length, or are no plain lists")
    if counts is not None and not (np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0):
        raise EvaluationError(f"{where}: counts must be numbers of at least 0, not all of them 0")
    for name, values in arrays.items():
        if name not in metrics and len(values):
            metrics[name] = float(np.average(values, weights=counts))
    return Scores(metrics, examples=arrays, counts=counts, ids=ids, seconds=seconds)


def _number(value: Any) -> float | None:
    """A float from a number of Python, numpy or torch; None for anything else."""
    if isinstance(value, (bool, str, bytes)) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr) if isinstance(value, (list, str, int, float)) else type(value).__name__
    return text[:80]
