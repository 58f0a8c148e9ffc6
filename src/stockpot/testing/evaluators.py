"""What every evaluator must do: give its metric, the same each time, made of what it says it is made of."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from stockpot.testing.checks import Check

__all__ = ["evaluator_checks"]


def evaluator_checks(suite: Any, checkpoint: Any) -> list[Check]:
    """Everything that must hold of the evaluators of a suite (a path, or one that was opened), tried on a checkpoint.

    Each runs as in a sweep: in a process of its own, where what it does to the model is noticed.
    """
    seen: list[Any] = []

    def scores() -> dict[str, Any]:
        from stockpot.api import evaluate

        found = evaluate(checkpoint, suite)
        return {f"{slice_} ({split})": s for (slice_, split), s in found.scores.items()}

    def first() -> dict[str, Any]:
        if not seen:
            seen.append(scores())
        return dict(seen[0])

    def gives(folder: str) -> None:
        """Every part is scored with finite numbers; one that touched the model has failed instead."""
        found = first()
        assert found, "nothing was scored"
        for part, s in found.items():
            assert s, f"{part}: no metric"
            assert all(np.isfinite(v) for v in s.values()), f"{part}: {dict(s)}"

    def again(folder: str) -> None:
        for part, s in scores().items():
            before = first()[part]
            assert dict(s) == dict(before), f"{part}: other scores the second time: {dict(s)}, {dict(before)}"

    def made_of_examples(folder: str) -> None:
        for part, s in first().items():
            for metric, value in s.items():
                behind = s.of(metric)
                if behind is not None:
                    values, weights, transform = behind
                    mean = float(transform(np.average(values, weights=weights)))
                    assert np.isclose(mean, value, rtol=1e-6), f"{part}: {metric} is {value}, its examples' mean {mean}"

    def travels(folder: str) -> None:
        for part, s in first().items():
            again_ = pickle.loads(pickle.dumps(s))
            assert dict(again_) == dict(s), f"{part}: other scores after pickling"

    named = {
        "scores": gives, "same scores again": again, "metrics are their examples' means": made_of_examples,
        "scores pickle": travels,
    }  # fmt: skip
    return [Check(name, run) for name, run in named.items()]
