"""What other tools made of recorded inputs: every deterministic method of mergekit 0.1.5 (golden/mergekit.json, made by
tools/golden_mergekit.py), and FusionBench's functions for methods that are here too (golden/fusion_bench.json, made by
tools/golden_fusion_bench.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stockpot
from stockpot.testing.models import read_model, write_model

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mergekit.json").read_text())
FUSION_BENCH = json.loads((Path(__file__).parent / "golden" / "fusion_bench.json").read_text())
#: what mergekit runs and stockpot refuses, and what it says
REFUSED = {
    "task_arithmetic: normalized, sum is zero": "sum to zero",
    "ties: density above 1": "a number from 0 to 1, got 1.5",
    "linear: sum is zero": "sum to zero",  # NaN in mergekit
    "multislerp: sum is zero": "sum to zero",
}
#: what mergekit refuses and stockpot runs: weights are 1 where a recipe says nothing, the first model is slerp's base, and a
#: base_model that a method has no use for is no model of it
RUN = {
    "linear: filter without match, no fallback", "linear: weight missing", "linear: base without weight", "slerp: no base",
    "task_arithmetic: no weight", "nuslerp: no weight", "passthrough: base beside a model", "della_linear: epsilon too large",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    for name, tensors in {**GOLDEN["inputs"], **FUSION_BENCH["inputs"]}.items():
        write_model(str(root / name), {n: np.array(v, np.float32) for n, v in tensors.items()}, "F32")
    return root


def placed(recipe: Any, root: Path) -> Any:
    if isinstance(recipe, dict):
        return {
            k: str(root / v) if k in ("model", "base_model", "fisher") and isinstance(v, str) else placed(v, root)
            for k, v in recipe.items()
        }
    return [placed(x, root) for x in recipe] if isinstance(recipe, list) else recipe


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["id"])
def test_as_mergekit(case: dict[str, Any], models: Path, tmp_path: Path) -> None:
    recipe = {**placed(case["recipe"], models), "compat": "mergekit"}
    if case["id"] in REFUSED:
        with pytest.raises(stockpot.StockpotError, match=REFUSED[case["id"]]):
            stockpot.merge(recipe, tmp_path / "out")
        return
    if "error" in case and case["id"] not in RUN:
        with pytest.raises(stockpot.StockpotError):
            stockpot.merge(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    stockpot.merge(recipe, tmp_path / "out")
    assert_close(tmp_path / "out", case.get("values", {}))


def assert_close(folder: Path, expected: dict[str, Any]) -> None:
    got = read_model(str(folder))
    for name, values in expected.items():
        wanted = np.array(values, np.float32)
        assert np.abs(got[name] - wanted).max() <= 2e-5 * max(float(np.abs(wanted).max()), 1.0), name


def test_every_method_of_mergekit_is_there() -> None:
    used = {c["recipe"]["merge_method"] for c in GOLDEN["cases"]}
    assert used <= set(stockpot.methods.methods())
    assert len(used) == 20


@pytest.mark.parametrize("case", FUSION_BENCH["cases"], ids=lambda c: c["id"])
def test_as_fusion_bench(case: dict[str, Any], models: Path, tmp_path: Path) -> None:
    assert case["values"].keys() == GOLDEN["inputs"]["base"].keys()
    stockpot.merge(placed(case["recipe"], models), tmp_path / "out")
    assert_close(tmp_path / "out", case["values"])
