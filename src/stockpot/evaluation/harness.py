"""Tasks of lm-evaluation-harness, run on the model that is loaded already. The one place that imports lm_eval."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stockpot.errors import EvaluationError, SuiteError
from stockpot.evaluation.documents import document_id
from stockpot.evaluation.scores import Progress, Scores
from stockpot.evaluation.suite import Slice, Suite

if TYPE_CHECKING:
    from stockpot.evaluation.loaded import LoadedModel

__all__ = ["HarnessEvaluator"]


@dataclass(frozen=True)
class HarnessEvaluator:
    """`task`: a name that the harness knows, or one of the YAML files in `include_path`. Metrics are the harness's own.

    Documents are numbered as the task gives them; `chosen` are those that belong to this split, None for all.
    """

    slice: Slice
    suite: Suite
    chosen: tuple[int, ...] | None = None
    _state: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if "task" not in self._state:
            self._state["task"] = self._load()
            self._state["ids"] = tuple(
                document_id(json.dumps(doc, sort_keys=True, default=str)) for doc in self._state["task"].eval_docs
            )

    @property
    def _where(self) -> str:
        return f"{self.suite.path}:{self.slice.line}: slice {self.slice.name!r}: task"

    def _load(self) -> Any:
        """The task, its data read. Raises SuiteError."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as e:
            raise SuiteError(
                f"{self._where}: needs lm-evaluation-harness: pip install 'stockpot[harness]' ({e})"
            ) from e
        folder = self.slice.options.get("include_path")
        place = None if folder is None else self.suite.locate(folder)
        if place is not None and not os.path.isdir(place):
            raise SuiteError(f"{self._where}: include_path: {place}: no such directory")
        name = self.slice.options["task"]
        with _kept_random_state():
            try:
                # thousands of the harness's own files are only looked through where the user's folder lacks the task
                manager = TaskManager(include_path=place, include_defaults=place is None)
                if place is not None and name not in manager.all_tasks:
                    manager = TaskManager(include_path=place)
            except Exception as e:
                raise SuiteError(f"{self._where}: {place}: the harness can't read it: {type(e).__name__}: {e}") from e
            if name not in manager.all_tasks:
                from stockpot.errors import nearest

                raise SuiteError(f"{self._where}: the harness knows no task {name!r}{nearest(name, manager.all_tasks)}")
            try:
                task = _single(manager, name)
            except SuiteError:
                raise
            except Exception as e:
                raise SuiteError(f"{self._where}: {name}: can't be loaded: {type(e).__name__}: {e}") from e
        if task is None:
            raise SuiteError(f"{self._where}: {name} is a group of tasks; give each of them a slice")
        if self.slice.options.get("num_fewshot") is not None:
            task.set_config(key="num_fewshot", value=self.slice.options["num_fewshot"])
        return task

    @property
    def ids(self) -> tuple[str, ...]:
        every: tuple[str, ...] = self._state["ids"]
        return tuple(every[i] for i in self._numbers())

    def _numbers(self) -> list[int]:
        numbers = list(range(len(self._state["ids"]))) if self.chosen is None else list(self.chosen)
        return numbers if self.slice.limit is None else [i for i in numbers if i < self.slice.limit]

    def only(self, ids: set[str]) -> HarnessEvaluator:
        """The same over some of the documents."""
        return replace(self, chosen=tuple(i for i in self._numbers() if self._state["ids"][i] in ids))

    def identity(self) -> Any:
        """The task as configured, the documents, and the harness's version."""
        import lm_eval

        config = {k: v for k, v in self._state["task"].dump_config().items() if k not in ("dataset_kwargs", "metadata")}
        return [lm_eval.__version__, config, self.ids]

    def score(self, checkpoint: LoadedModel, progress: Progress | None = None) -> Mapping[str, float]:
        from lm_eval import simple_evaluate

        began = time.monotonic()
        task = self._state["task"]
        name = task.config.task
        numbers = self._numbers()
        with _kept_random_state():
            found: Any = simple_evaluate(
                model=self._wrapped(checkpoint), tasks=[task], samples={name: numbers}, log_samples=True, bootstrap_iters=0,
            )  # fmt: skip
        if found is None:
            raise EvaluationError("the harness gave no results")
        metrics: dict[str, float] = {}
        examples: dict[str, list[float]] = {}
        for key, value in found["results"][name].items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or isinstance(value, (str, bool)) or value is None:
                continue
            rows = sorted(
                (s for s in found["samples"][name] if s.get("filter", "none") == filtered), key=lambda s: s["doc_id"]
            )
            values = [_number(row.get(metric)) for row in rows]
            for label in (key, *([metric] if metric not in metrics else [])):
                metrics[label] = float(value)
                if len(values) == len(numbers) and None not in values and abs(sum(values) / len(values) - value) < 1e-6:  # type: ignore[arg-type]
                    examples[label] = values  # type: ignore[assignment]
        return Scores(metrics, examples=examples, ids=self.ids, seconds=time.monotonic() - began)

    def _wrapped(self, checkpoint: LoadedModel) -> Any:
        """The harness's own model class around the loaded module, made once for it."""
        module, tokenizer = checkpoint.model, checkpoint.tokenizer
        held = checkpoint.attached.get("harness")
        if held is None or held[0] is not module or held[1] is not tokenizer:
            from lm_eval.models.huggingface import HFLM

            lm = HFLM(
                pretrained=module,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=self.suite.batch_size,
                device=checkpoint.device,
            )
            held = checkpoint.attached["harness"] = (module, tokenizer, lm)
        return held[2]


def _single(manager: Any, name: str) -> Any:
    """The one task of a name; None for a group."""
    from lm_eval.api.task import Task
    from lm_eval.tasks import get_task_dict

    loaded = get_task_dict([name], manager)
    found = next(iter(loaded.values())) if len(loaded) == 1 else None
    return found if isinstance(found, Task) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """The harness seeds every generator there is: put them back."""
    import random

    import numpy as np
    import torch

    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
