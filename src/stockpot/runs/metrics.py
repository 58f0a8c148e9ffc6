"""What a trainer logged: named series of (step, value), and the value that a snapshot gets from them."""

from __future__ import annotations

import bisect
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stockpot.errors import ArgumentError, CheckpointError, nearest
from stockpot.files import read_table, read_text

__all__ = ["MetricLog", "MetricValue", "known_objective", "log_from_rows", "read_metrics_file"]


_MIN_WORDS = frozenset(
    "loss losses perplexity ppl nll error err wer cer ter mse mae rmse brier bpb bpc ce crossentropy xent".split()
)
_MAX_WORDS = frozenset(
    "accuracy accuracies acc f1 bleu rouge rouge1 rouge2 rougel meteor chrf auc map mrr ndcg precision recall pearson "
    "spearman matthews mcc exact match em win winrate pass step steps epoch".split()
)


@dataclass(frozen=True)
class MetricValue:
    """The value that a snapshot gets, and where it came from: "logged at step 90, the last before 100"."""

    metric: str
    value: float
    rule: str


@dataclass(frozen=True)
class MetricLog:
    """`series[name]` is sorted by step, one value a step. `damage`: (last step covered, why) when newer entries are lost."""

    series: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    source: str = ""
    damage: tuple[int, str] | None = None

    def names(self) -> list[str]:
        """Every metric, `step` not among them."""
        return list(self.series)

    def value_at(self, metric: str, step: int, smooth: int = 1) -> MetricValue:
        """The value logged at `step`, else the nearest before it; the mean of the last `smooth` values up to there.

        `step` (or `steps`) is the step itself. Raises ArgumentError that lists what was logged.
        """
        if metric in ("step", "steps"):
            return MetricValue(metric, float(step), "the step itself")
        found = self.series.get(metric)
        if not found:
            raise ArgumentError(self._unknown(metric))
        if self.damage is not None and step > self.damage[0]:
            raise ArgumentError(
                f"{metric!r} of step {step} is not known: {self.damage[1]}, and what is left of the log ends at step "
                f"{self.damage[0]}"
            )
        end = bisect.bisect_right(found, (step, math.inf))
        if end == 0:
            raise ArgumentError(f"{metric!r} was first logged at step {found[0][0]}, after step {step}")
        window = found[max(end - smooth, 0) : end]
        bad = [s for s, v in window if not math.isfinite(v)]
        if bad:
            values = ", ".join(f"{v} at step {s}" for s, v in window if not math.isfinite(v))
            raise ArgumentError(
                f"{metric!r} of step {step} is not a number: {values}; leave the snapshot out with steps, or weight by "
                "another metric"
            )
        if smooth > 1:
            if len(window) < smooth:
                raise ArgumentError(
                    f"{metric!r}: only {len(window)} values were logged up to step {step}, smooth asks for {smooth}"
                )
            mean = math.fsum(v for _, v in window) / len(window)
            return MetricValue(
                metric, mean, f"mean of {smooth} values logged at steps {window[0][0]} to {window[-1][0]}"
            )
        at, value = window[0]
        rule = f"logged at step {at}" if at == step else f"logged at step {at}, the last before {step}"
        return MetricValue(metric, value, rule)

    def _unknown(self, metric: str) -> str:
        if not self.series:
            where = f" ({self.source})" if self.source else ""
            return f"no metric {metric!r}: nothing was logged{where}; 'step' is always there"
        known = ", ".join(sorted(self.series))
        return f"no metric {metric!r} was logged; there are {known}, and step{nearest(metric, self.series)}"


def known_objective(metric: str) -> str | None:
    """`min` or `max` where the name says which is better (eval_loss, accuracy...), else None."""
    words = set(re.split(r"[^a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", metric).lower()))
    low, high = bool(words & _MIN_WORDS), bool(words & _MAX_WORDS)
    if low == high:
        return None
    return "min" if low else "max"


def log_from_rows(rows: Iterable[Mapping[str, Any]], source: str, *, drop: re.Pattern[str] | None = None) -> MetricLog:
    """Rows with a `step` and values -> MetricLog. A later row wins over an earlier one of the same step."""
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        step = _number(row.get("step", row.get("global_step")))
        if step is None or not math.isfinite(step):
            continue
        for name, raw in row.items():
            if name in ("step", "global_step") or not isinstance(name, str) or (drop and drop.search(name)):
                continue
            value = _number(raw)
            if value is not None:
                series.setdefault(name, {})[int(step)] = value
    return MetricLog({name: tuple(sorted(points.items())) for name, points in series.items()}, source)


def _number(raw: Any) -> float | None:
    if isinstance(raw, bool) or raw is None:
        return None
    if isinstance(raw, (int, float)) or (isinstance(raw, str) and raw.strip()):
        try:
            return float(raw)
        except ValueError:
            return None
        except OverflowError:  # an integer of hundreds of digits
            return math.inf
    return None


def read_metrics_file(path: str) -> MetricLog:
    """A `.csv` with a column `step`, or `.jsonl` with a key `step` a line. Raises CheckpointError."""
    text = read_text(path, "a file of metrics", CheckpointError)
    rows: list[Mapping[str, Any]] = []
    if path.endswith((".jsonl", ".json", ".ndjson")):
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise CheckpointError(f"{path}:{number}: not valid JSON: {e}") from e
            if not isinstance(row, dict):
                raise CheckpointError(f"{path}:{number}: expected an object with a step and values, got {line[:40]!r}")
            rows.append(row)
        named = any("step" in r or "global_step" in r for r in rows)
    else:
        fields, lines = read_table(text, path, CheckpointError)
        rows = [{k: v for k, v in zip(fields, cells, strict=False) if k} for _, cells in lines]
        named = "step" in fields or "global_step" in fields
    if not named:
        raise CheckpointError(f"{path}: expected a column 'step' beside the metrics")
    log = log_from_rows(rows, path)
    if not log.series:
        raise CheckpointError(f"{path}: holds no numbers beside 'step'")
    return log
