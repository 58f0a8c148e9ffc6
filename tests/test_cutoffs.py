"""The k-th largest magnitude, block by block, against a sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.engine.unit_data import sample_runs
from stockpot.statistics import Known, Rank


def select(values: np.ndarray, keep: int, sample: np.ndarray | None = None, block: int = 1000) -> tuple[float, int]:
    """(the cutoff that keeps `keep` of the values, passes that it took)."""
    stat = Rank("density", rounding="nearest")
    seek = stat.start({"density": (keep / len(values),)}, 1, len(values), {})
    if sample is not None and not isinstance(seek, Known):
        seek = stat.suggest(seek, sample[None])
    passes = 0
    while not isinstance(seek, Known):
        total = None
        for start in range(0, len(values), block):
            part = stat.fold(seek, values[None, start : start + block], {})
            total = part if total is None else stat.merge(seek, total, part)
        seek = stat.finish(seek, total)
        passes += 1
        assert passes < 6
    return seek.value[0], passes


def expected(values: np.ndarray, keep: int) -> float:
    return float(np.sort(np.abs(values.astype(np.float32)))[len(values) - keep])


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.8])
def test_exact_with_a_sample(share: float) -> None:
    values = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    keep = int(share * len(values))
    cutoff, passes = select(values, keep, sample=values[::2])
    assert cutoff == expected(values, keep)
    assert passes <= 2


def test_a_good_sample_needs_one_pass() -> None:
    values = np.random.default_rng(0).standard_normal(2**20).astype(np.float32)
    assert select(values, len(values) // 2, sample=values[::8])[1] == 1
    assert select(values, len(values) // 5, sample=values[::8])[1] == 1


def test_a_misleading_sample_costs_passes_not_exactness() -> None:
    values = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    for sample in (values * 1e-3, values * 1e3, np.zeros(1000, np.float32)):
        assert select(values, 10_000, sample=sample)[0] == expected(values, 10_000)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60),
    st.data(),
)
def test_against_sorting(values: list[float], data: st.DataObject) -> None:
    array = np.float32(values)
    keep = data.draw(st.integers(0, len(values)))
    cutoff, _ = select(array, keep, block=7)
    if keep == 0:
        assert np.isnan(cutoff)
        return
    if keep == len(values):
        assert cutoff == 0.0
    else:
        assert cutoff == expected(array, keep)
    (direct,) = Rank("density", rounding="nearest").at_once(array[None], {"density": (keep / len(values),)}, {})
    assert direct == cutoff


@pytest.mark.parametrize("n", [1, 511, 2048, 2049, 5000, 10**6])
@pytest.mark.parametrize("samples", [1, 512, 2**16])
def test_sample_runs_lie_within_the_tensor(n: int, samples: int) -> None:
    runs = sample_runs(n, samples)
    assert runs
    assert all(0 <= start < stop <= n for start, stop in runs)


def test_too_much_inside_the_window_is_counted_instead() -> None:
    values = np.random.default_rng(2).standard_normal(3 * 2**20).astype(np.float32)
    for block in (2**18, 2**20, 2**20 + 1):  # one of them counts exactly at the end of the pass
        assert select(values, 2**20, block=block)[0] == expected(values, 2**20)


def test_float64_is_compared_in_float32() -> None:
    values = np.random.default_rng(1).standard_normal(5000)
    assert select(values, 1000)[0] == expected(values, 1000)
