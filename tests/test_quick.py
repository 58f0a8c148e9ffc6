"""What a contributor wants to know at once, without torch: every method's suite, recipes parsed and planned, codecs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stockpot
from stockpot.checkpoints.codecs import decode_into, encode_into
from stockpot.errors import StockpotError
from stockpot.methods import methods
from stockpot.specs import DType
from stockpot.testing import Check, method_checks
from stockpot.testing.models import state, write_model

SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    **{f"model.layers.{i}.mlp.weight": (16, 24) for i in range(4)},
    "model.norm.weight": (16,),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for i, name in enumerate(("base", "a", "b")):
        write_model(str(root / name), state(SHAPES, i))
    return root


@pytest.mark.parametrize(
    "check",
    [pytest.param(c, id=f"{name}-{c.name}") for name, m in methods().items() if m.builtin for c in method_checks(name)]
    + [
        pytest.param(c, id=f"{name} without a base-{c.name}")
        for name, m in methods().items()
        if m.base_optional
        for c in method_checks(m.without_base())
    ],
)
def test_methods(check: Check, tmp_path: Path) -> None:
    check(tmp_path)


PLANNED = {
    "a gradient": ("merge_method: ties\nparameters: {{density: [0.2, 0.8]}}\n", "density", [0.2, 0.4, 0.6, 0.8]),
    "a filter": (
        "merge_method: ties\nparameters: {{density: [{{filter: layers.1, value: 0.5}}, {{value: 1.0}}]}}\n",
        "density",
        [1.0, 0.5, 1.0, 1.0],
    ),
    "a rule": (
        "merge_method: ties\nrules: [{{match: '*layers.2*', parameters: {{density: 0.25}}}}]\n",
        "density",
        [1.0, 1.0, 0.25, 1.0],
    ),
    "lambda": ("merge_method: task_arithmetic\nparameters: {{lambda: [0, 3]}}\n", "scale", [0.0, 1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("what", PLANNED)
def test_recipes_are_planned(what: str, models: Path) -> None:
    text, key, expected = PLANNED[what]
    planned = stockpot.plan(text.format() + f"base_model: {models}/base\nmodels: [{models}/a, {models}/b]\n")
    by_name = {t.name: planned.groups[t.group].params[key] for t in planned.tensors}
    found = [by_name[f"model.layers.{i}.mlp.weight"] for i in range(4)]
    assert [pytest.approx(v[0] if isinstance(v, tuple) else v) for v in found] == expected


WRONG = {
    "merge_method: teis\n": "did you mean 'ties'",
    "merge_method: ties\nparameters: {densty: 0.5}\n": "did you mean 'density'",
    "merge_method: ties\nparameters: {density: 1.5}\n": "from 0 to 1, got 1.5",
    "merge_method: ties\nrules: [{match: '*nothing*', parameters: {density: 0.5}}]\n": "matches no tensor",
    "merge_method: slerp\nparameters: {t: 0.5}\n": "takes exactly 2 models",
    "merge_mehtod: ties\n": "did you mean 'merge_method'",
}


@pytest.mark.parametrize("text", WRONG)
def test_mistakes_name_their_line(text: str, models: Path) -> None:
    with pytest.raises(StockpotError, match=WRONG[text]) as caught:
        stockpot.plan(text + f"base_model: {models}/base\nmodels: [{models}/a, {models}/b]\n")
    assert "<recipe>:" in str(caught.value)


ML: dict[DType, Any] = {
    DType.BF16: ml_dtypes.bfloat16,
    DType.F16: np.float16,
    DType.F8_E4M3: ml_dtypes.float8_e4m3fn,
    DType.F8_E5M2: ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("dtype", ML, ids=str)
def test_codecs_over_every_value(dtype: DType) -> None:
    bits = np.arange(2 ** (8 * dtype.itemsize), dtype=np.uint16 if dtype.itemsize == 2 else np.uint8)
    expected = bits.view(ML[dtype]).astype(np.float32)
    found = np.empty(len(bits), np.float32)
    decode_into(bits.view(np.uint8).data, dtype, found)
    np.testing.assert_array_equal(found, expected)
    numbers = np.isfinite(expected)
    back = bytearray(len(bits) * dtype.itemsize)
    encode_into(expected.copy(), dtype, memoryview(back))
    assert np.array_equal(np.frombuffer(back, bits.dtype)[numbers], bits[numbers])
