"""The public suites run over what stockpot has: its statistics, sources and evaluators (its methods: test_quick)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

import stockpot
from stockpot.checkpoints.memory import MemorySource
from stockpot.methods import Cost, Example, PerModel, Real, Scope, Space, get_method, method, methods
from stockpot.methods.declaration import _REGISTRY
from stockpot.methods.forms import Form
from stockpot.statistics import Extremes, Gram, Quantile, Rank, Total
from stockpot.testing import Check, evaluator_checks, method_checks, run_checks, source_checks, statistic_checks
from stockpot.testing.models import state, write_model

BUILTIN = [name for name, m in methods().items() if m.builtin]  # their suites are run by test_quick


PARAMS = {"density": (0.37, 0.5, 1.0), "q": 0.3, "dialect": "x"}


def _terms(block: Any, **_: Any) -> Any:
    return block.astype(np.float64) ** 3


def _spread(block: Any, **_: Any) -> Any:
    return block.var(0, keepdims=True)


def _signed(block: Any, **_: Any) -> Any:
    return block.sum(0, keepdims=True)


def kth(values: Any, keep: int) -> float:
    return float(np.sort(values)[len(values) - keep])


N = 3 * 2**16 + 1001
STATISTICS = {
    "gram": (Gram(), lambda b: b.astype(np.float64) @ b.astype(np.float64).T),
    "total": (Total("cubes", of=_terms), lambda b: (b.astype(np.float64) ** 3).sum(1)),
    "rank": (
        Rank("density"),
        lambda b: [kth(abs(b[0]), int(0.37 * N)), kth(abs(b[1]), int(0.5 * N)), 0.0],
    ),
    "rank of a spread": (Rank("q", of=_spread, name="spread"), lambda b: [kth(b.var(0), int(0.3 * N))]),
    "signed rank": (Rank("q", of=_signed, signed=True, rounding="up"), lambda b: [kth(b.sum(0), -int(-0.3 * N // 1))]),
    "quantile": (
        Quantile("density"),
        lambda b: [np.quantile(abs(b[i].astype(float)), q) for i, q in enumerate(PARAMS["density"])],
    ),
    "signed quantile": (Quantile("q", of=_signed, signed=True), lambda b: [np.quantile(b.sum(0).astype(float), 0.3)]),
    "extremes": (Extremes(), lambda b: [b.min(1), b.max(1)]),
    "extremes of a spread": (Extremes(of=_spread), lambda b: [[b.var(0).min()], [b.var(0).max()]]),
}


def of_statistics() -> list[Any]:
    return [
        pytest.param(c, id=f"{name}-{c.name}")
        for name, (stat, oracle) in STATISTICS.items()
        for c in statistic_checks(stat, PARAMS, oracle=oracle)
    ]


@pytest.mark.parametrize("check", of_statistics())
def test_statistics(check: Check, tmp_path: Path) -> None:
    check(tmp_path)


SMALL = {"a": (7, 5), "layers.0.w": (300, 400), "layers.1.w": (300, 400), "scalar": ()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for i, name in enumerate(("a", "b")):
        write_model(str(root / name), state(SMALL, i))
    return root


def memory(root: Path) -> Any:
    return MemorySource({n: v.astype(np.float16) for n, v in state(SMALL, 0).items()})


def step(root: Path) -> Any:
    """A step of a recipe, streamed."""
    from stockpot.engine.devices import NumpyDevice
    from stockpot.engine.steps import stream_steps

    text = f"name: mid\nmerge_method: linear\nmodels: [{root}/a, {root}/b]\n---\nmerge_method: linear\nmodels: [mid]\n"
    planned = stockpot.plan(text)
    stream_steps(planned, NumpyDevice())
    return planned.inputs[0].checkpoint


def arrive(sent: Any) -> None:
    """What the engine does for a step wherever it runs a plan."""
    from stockpot.engine.devices import NumpyDevice
    from stockpot.engine.steps import stream_step

    stream_step(sent, NumpyDevice())


def torch_file(root: Path) -> Any:
    import torch

    path = root / "file.bin"
    if not path.exists():
        torch.save({n: torch.from_numpy(np.asarray(v)).to(torch.bfloat16) for n, v in state(SMALL, 0).items()}, path)
    return stockpot.open_checkpoint(path)


SOURCES = {
    "safetensors": lambda root: stockpot.open_checkpoint(root / "a"),
    "torch": torch_file,
    "memory": memory,
    "step": step,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources(kind: str, small: Path) -> None:
    run_checks(source_checks(lambda: SOURCES[kind](small), arrive=arrive if kind == "step" else lambda source: None))


def test_fp8_is_a_source(tmp_path: Path) -> None:
    from fp8 import write_fp8

    write_fp8(tmp_path / "m", "block", 0)
    run_checks(source_checks(lambda: stockpot.open_checkpoint(tmp_path / "m")))


def test_adapters_are_sources(lora_run: Path, tiny_llama: Path) -> None:
    from stockpot.adapters import fuse, read_adapter

    def adapters() -> list[Any]:
        return [read_adapter(stockpot.open_checkpoint(lora_run / f"checkpoint-{s}")) for s in (4, 8)]

    def product(method: str) -> Any:
        """What a recipe computes of factors."""
        models = [str(lora_run / f"checkpoint-{s}") for s in (4, 8)]
        parameters = {"rank": 3} if method == "product_svd" else {}
        planned = stockpot.plan({"merge_method": method, "models": models, "parameters": parameters})
        return next(m.checkpoint for m in planned.inputs if m.role == "factors")

    for name in ("product", "product_svd"):
        run_checks(source_checks(lambda name=name: product(name)))
    run_checks(source_checks(lambda: fuse(stockpot.open_checkpoint(tiny_llama), adapters()[:1], [1.0], exact=True)))


def test_evaluators(tmp_path: Path, small: Path) -> None:
    from scoring import distance_suite

    suite = distance_suite(tmp_path)
    for check in evaluator_checks(suite, write_model(str(tmp_path / "m"), state({"w": (40, 40)}, 0), "F32")):
        check(tmp_path)


# what the suites find


def test_a_method_that_cheats_is_caught(tmp_path: Path) -> None:
    """Each check fails for a method that breaks what it is about."""

    @method(space=Space.DELTA, neutral={}, examples=(Example([[1.0]], [3.0], base=[0.0]),))
    def standardised(delta: Any, *, scale: Annotated[float, Real()] = 1.0) -> Any:
        """Depends on the block in hand."""
        return delta[-1] / (abs(delta).max() if delta.size else 1.0) * scale * 1e-3

    @method(
        space=Space.DELTA,
        scope=Scope.TENSOR,
        cost=Cost(lambda m, shape, size: 0),
        form=None,
    )
    def greedy(delta: Any) -> Any:
        """Takes far more memory than it says."""
        return np.concatenate([delta] * 12).mean(0)

    @method(space=Space.DELTA, form=lambda weight: Form(tuple(2 * w for w in weight)))
    def two_faced(delta: Any, *, weight: Annotated[PerModel, Real()] = 1.0) -> Any:
        """Its form is another method. weight."""
        return (delta * np.asarray(weight, delta.dtype)[:, None]).sum(0)

    try:
        caught = set()
        for name in ("standardised", "greedy", "two_faced"):
            for check in method_checks(name):
                folder = tmp_path / name / check.name
                folder.mkdir(parents=True)
                try:
                    check(folder)
                except AssertionError:
                    caught.add((name, check.name))
        expected = {
            ("standardised", "docstring"),
            ("standardised", "example 1"),
            ("standardised", "one model"),
            ("standardised", "order of models"),
            ("standardised", "blocks, threads and memory"),
            ("greedy", "memory as planned"),
            ("two_faced", "compiled kernels"),
        }
        assert expected <= caught, expected - caught
        assert {n for n, c in caught if c == "memory as planned"} == {"greedy"}
    finally:
        for name in ("standardised", "greedy", "two_faced"):
            _REGISTRY.pop(name, None)


def test_a_source_that_lies_is_caught(small: Path) -> None:
    class Shifted(MemorySource):
        def read(self, requests: Any, buffer: Any) -> None:
            super().read(requests, buffer)
            if requests[0].start and len(buffer):
                buffer[0] ^= 1

    with pytest.raises(AssertionError, match="differ from the whole"):
        run_checks(source_checks(lambda: Shifted({"w": np.ones((50, 50), np.float32)})))


def test_every_method_has_an_example() -> None:
    for name in BUILTIN:
        assert get_method(name).examples, name
