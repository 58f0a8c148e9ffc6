"""The mathematics: figures worked out by hand, oracles in float64, and the properties every method must have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import stockpot
from stockpot.errors import ArgumentError
from stockpot.methods import Space, dare_linear, dare_ties, linear, methods, passthrough, slerp, task_arithmetic, ties
from stockpot.methods.spherical import slerp_weights

from helpers import assert_ulp, oracle_elect, oracle_slerp, oracle_trim

TAUS = [[0.9, -0.2, 0.05, 0.4, -0.6], [-0.8, -0.3, 0.5, 0.1, 0.2], [0.3, 0.7, -0.4, 0.05, -0.1]]
ZERO5 = {"w": np.zeros(5)}


def on(method: Any, rows: list[list[float]], base: list[float] | None = None, **kw: Any) -> np.ndarray:
    out = method([{"w": np.array(r)} for r in rows], base=None if base is None else {"w": np.array(base)}, **kw)
    return out["w"]


# figures worked out by hand


def test_slerp_by_hand() -> None:
    np.testing.assert_allclose(on(slerp, [[3, 0.0], [0, 4.0]], t=0.5), [2.121320, 2.828427], atol=1e-6)
    np.testing.assert_allclose(on(slerp, [[3, 0.0], [0, 4.0]], t=0.25), [2.771638, 1.530734], atol=1e-6)
    sixty = [0.5, math.sqrt(3) / 2]
    np.testing.assert_allclose(on(slerp, [[1.0, 0], sixty], t=0.5), [0.8660254, 0.5], atol=1e-7)


def test_slerp_guards() -> None:
    np.testing.assert_array_equal(on(slerp, [[0.0, 0], [2, 4.0]], t=0.5), [1, 2])  # a zero tensor has no angle
    np.testing.assert_allclose(on(slerp, [[0.0, 0], [2, 4.0]], t=0.5, dialect="mergekit"), [2**0.5, 2 * 2**0.5])
    near_opposite = [-math.cos(0.05), math.sin(0.05)]
    assert abs(on(slerp, [[1.0, 0], near_opposite], t=0.5)).max() < 1
    assert slerp_weights(((1, -0.9985), (-0.9985, 1)), 0.5, guarded=False)[0] > 10  # 3.1 degrees from opposite
    assert slerp_weights(((1, 0.99951), (0.99951, 1)), 0.3) == (0.7, 0.3)
    assert slerp_weights(((float("nan"), 0), (0, 1)), 0.3) == (0.7, 0.3)


def test_slerp_identities() -> None:
    g = np.random.default_rng(0)
    a, b = g.standard_normal(50), g.standard_normal(50)
    np.testing.assert_array_equal(on(slerp, [a, b], t=0), a)
    np.testing.assert_array_equal(on(slerp, [a, b], t=1), b)
    np.testing.assert_allclose(on(slerp, [a, b], t=0.3), on(slerp, [b, a], t=0.7), rtol=1e-13)
    np.testing.assert_allclose(on(slerp, [3 * a, 3 * b], t=0.3), 3 * on(slerp, [a, b], t=0.3), rtol=1e-13)
    np.testing.assert_allclose(on(slerp, [a, a], t=0.4), a, rtol=1e-14)


def test_task_arithmetic_by_hand() -> None:
    assert on(task_arithmetic, [[2.5], [1.5]], [2.0], weight=[0.6, 0.4])[0] == pytest.approx(2.1)
    assert on(task_arithmetic, [[2.5], [1.5]], [2.0], weight=0.0)[0] == 2.0
    assert on(task_arithmetic, [[2.5]], [2.0], weight=-1)[0] == 1.5  # negation: forget the task
    a, b, c = [1.0, 5], [2.0, 3], [7.0, 7]
    analogy = on(task_arithmetic, [a, b, c], [1.0, 1], weight=[-1, 1, 1])
    np.testing.assert_allclose(analogy, [8, 5])  # base + (c - base) + (b - a)
    np.testing.assert_array_equal(on(task_arithmetic, [a, a, c], [1.0, 1], weight=[-1, 1, 1]), c)
    assert on(task_arithmetic, [[3.0], [5.0]], [1.0], weight=[1, 3], normalize=True, scale=2)[0] == 8.0


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"density": 0.4}, [0.9, 0.7, 0.5, 0, -0.6]),
        ({"density": 0.6}, [0.6, 0.7, 0.5, 0.4, -0.6]),
        ({"density": 0.6, "weight": [1, 2, 1], "dialect": "mergekit"}, [-0.8, 0.7, 0.5, 0.4, -0.6]),
        ({"density": 0.6, "weight": [1, 2, 1], "dialect": "peft"}, [0.6, 0.7, 1.0, 0.4, -0.6]),
        ({"density": 0.4, "dialect": "paper"}, [0.9, 0.7, 0.5, 0, -0.6]),
    ],
)
def test_ties_by_hand(keywords: dict[str, Any], expected: list[float]) -> None:
    np.testing.assert_allclose(on(ties, TAUS, [0.0] * 5, **keywords), expected, atol=1e-7)


def test_ties_survey_example() -> None:
    rows = [[0, -0.5, 0, 0.8], [0, 1.1, 0, -0.6], [0, -0.4, 0, 0.7]]
    np.testing.assert_allclose(on(ties, rows, [0.0] * 4, density=1.0), [0, 1.1, 0, 0.75], atol=1e-7)


def test_ties_cutoff_over_the_whole_model() -> None:
    """`paper` trims where the model is small, not the same share of each tensor."""
    big, small = np.array([1.0, 2, 3, 4]), np.array([0.1, 0.2, 0.3, 0.4])
    models = [{"big": big, "small": small}]
    base = {"big": np.zeros(4), "small": np.zeros(4)}
    merged = ties(models, base=base, density=0.5, dialect="paper")
    np.testing.assert_array_equal(merged["big"], big)
    np.testing.assert_array_equal(merged["small"], 0)
    merged = ties(models, base=base, density=0.5, dialect="mergekit")
    np.testing.assert_array_equal(merged["big"], [0, 0, 3, 4])


@pytest.mark.parametrize("rest", [-1.0, 1.0])
def test_ties_zero_sum_takes_the_majority_sign(rest: float) -> None:
    rows = [[0.5, 3 * rest, 3 * rest], [-0.5, 3 * rest, 3 * rest]]
    assert on(ties, rows, [0.0] * 3, density=1.0, dialect="paper")[0] == 0.5 * rest
    assert on(ties, rows, [0.0] * 3, density=1.0, dialect="mergekit")[0] == 0.5


def test_ties_keeps_all_ties_at_the_cutoff() -> None:
    assert list(on(ties, [[1.0, -1, 1, 0.5]], [0.0] * 4, density=0.25)) == [1, -1, 1, 0]


def test_density_is_not_rounded_to_float32() -> None:
    n = 10  # int(0.7 * 10) is 7 in float64 as in Python; float32 0.7 gives 6
    values = np.arange(1.0, n + 1)
    assert np.count_nonzero(on(ties, [values], np.zeros(n), density=0.7)) == 7


def test_dare_by_hand() -> None:
    from stockpot.methods.dare import drop_and_rescale

    tau = np.array([[0.002, -0.001, 0.0005, 0.003]])
    mask = np.array([[True, False, False, True]])
    np.testing.assert_allclose(drop_and_rescale(tau, mask, (0.5,), True, None), [[0.004, 0, 0, 0.006]])
    norms = np.array([abs(tau).sum(), abs(tau * mask).sum()])
    np.testing.assert_allclose(drop_and_rescale(tau, mask, (0.5,), True, norms), [[0.0026, 0, 0, 0.0039]])
    np.testing.assert_array_equal(drop_and_rescale(tau, mask, (0.5,), False, None), tau * mask)


def test_dare_is_unbiased() -> None:
    tau = np.linspace(-0.01, 0.01, 64)
    runs = 1500
    mean = sum(on(dare_linear, [tau], np.zeros(64), density=0.5, seed=s) for s in range(runs)) / runs
    assert np.all(abs(mean - tau) <= 4.5 * abs(tau) / runs**0.5 + 1e-12)


def test_dare_mergekit_keeps_the_l1_norm() -> None:
    tau = np.random.default_rng(0).standard_t(2, 3000)
    merged = on(dare_linear, [tau], np.zeros(3000), density=0.3, dialect="mergekit")
    assert abs(merged).sum() == pytest.approx(abs(tau).sum(), rel=1e-12)
    assert 0.25 < np.count_nonzero(merged) / 3000 < 0.35


def test_dare_density_zero_is_the_base() -> None:
    for method in (dare_linear, dare_ties):
        np.testing.assert_array_equal(on(method, TAUS, [1.0] * 5, density=0.0), 1.0)


def test_infinities_do_not_spread_where_they_are_dropped() -> None:
    merged = on(ties, [[np.inf, 1.0], [0.0, 1.0]], [0.0, 0.0], density=[0.0, 1.0])
    np.testing.assert_array_equal(merged, [0, 1])


def test_linear_and_passthrough() -> None:
    assert on(linear, [[1.0], [4.0]], weight=[1, 2])[0] == pytest.approx(3)
    assert on(linear, [[1.0], [4.0]], weight=[1, 2], normalize=False)[0] == 9
    assert on(passthrough, [[3.0]], scale=0.5)[0] == 1.5
    with pytest.raises(ArgumentError, match="sum to zero"):
        on(linear, [[1.0], [4.0]], weight=[1, -1])


# float64 oracles, bf16 and float32, several blocks


def state(seed: int, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(s, generator=g) * 0.02).to(dtype) for n, s in shapes.items()}


SHAPES = {"matrix": (700, 300), "vector": (130,), "one": (1,), "scalar": (), "empty": (0, 4), "long": (3, 90_000)}


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
def models(request: pytest.FixtureRequest) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    base = state(0, request.param, SHAPES)
    return base, [
        {n: (t.float() + state(i, torch.float32, SHAPES)[n] * 0.1).to(t.dtype) for n, t in base.items()}
        for i in (1, 2, 3)
    ]


WEIGHT = (0.5, 0.3, 0.2)
DENSITY = (0.5, 0.7, 0.2)


def delta(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    return model.double() - base.double()


ORACLES: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[..., torch.Tensor]]] = {
    "linear": (linear, {"weight": WEIGHT}, lambda b, ms: sum(w * m.double() for w, m in zip(WEIGHT, ms))),
    "task_arithmetic": (
        task_arithmetic,
        {"weight": WEIGHT, "scale": 0.7},
        lambda b, ms: b.double() + 0.7 * sum(w * delta(b, m) for w, m in zip(WEIGHT, ms)),
    ),
    "ties": (
        ties,
        {"weight": WEIGHT, "density": DENSITY},
        lambda b, ms: b.double() + oracle_elect([oracle_trim(delta(b, m), d) for m, d in zip(ms, DENSITY)], WEIGHT),
    ),
    "ties sum": (
        ties,
        {"density": 0.4, "normalize": False},
        lambda b, ms: b.double() + oracle_elect([oracle_trim(delta(b, m), 0.4) for m in ms], (1, 1, 1), by="none"),
    ),
    "ties peft": (
        ties,
        {"weight": WEIGHT, "density": DENSITY, "dialect": "peft"},
        lambda b, ms: (
            b.double()
            + oracle_elect(
                [oracle_trim(delta(b, m), d) for m, d in zip(ms, DENSITY)], WEIGHT, by="count", weighted=False
            )
        ),
    ),
    "dare_ties dense": (
        dare_ties,
        {"weight": WEIGHT, "normalize": True},
        lambda b, ms: b.double() + oracle_elect([delta(b, m) for m in ms], WEIGHT),
    ),
}


@pytest.mark.parametrize("case", ORACLES)
def test_against_a_float64_oracle(models: Any, case: str) -> None:
    base, experts = models
    method, keywords, oracle = ORACLES[case]
    merged = method(experts, base=base if method.space.value == "delta" else None, **keywords)
    for name in SHAPES:
        exact = oracle(base[name], [e[name] for e in experts])
        assert merged[name].dtype == base[name].dtype
        assert merged[name].shape == base[name].shape
        assert_ulp(merged[name], exact, terms=0.2)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_against_a_float64_oracle(models: Any, t: float) -> None:
    base, experts = models
    unrelated = state(9, base["matrix"].dtype, SHAPES)
    for other in (experts[0], unrelated):
        merged = slerp([base, other], t=t)
        for name in SHAPES:
            assert_ulp(merged[name], oracle_slerp(base[name], other[name], t), terms=0.2)


# properties of every method


def neutral(method: Any) -> dict[str, Any]:
    """Parameters with which one model merges to itself."""
    return {"t": 0.5} if method.name == "slerp" else dict(method.neutral or {})


#: those of companions, and those on factors, have suites of their own (test_conformance, test_quick)
ALL = [m for m in methods().values() if m.builtin and not m.companions and m.space is not Space.FACTORS]


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
@pytest.mark.parametrize("dialect", [0, 1, 2])
def test_identity(method: Any, dialect: int) -> None:
    """All models equal to the base give the base, bit for bit; so does one tensor of zeros, of one element, of none."""
    if dialect >= max(len(method.dialects), 1):
        pytest.skip("no such dialect")
    keywords = neutral(method) | ({"dialect": method.dialects[dialect]} if method.dialects else {})
    if "density" in method.parameters:
        keywords["density"] = 0.3
    base = state(0, torch.bfloat16, SHAPES) | {"zeros": torch.zeros(4, 4, dtype=torch.bfloat16)}
    for count in range(1, 4):
        low, high = method.models
        if count < low or (high is not None and count > high):
            continue
        merged = method([base] * count, base=base if method.space.value == "delta" else None, **keywords)
        for name, tensor in base.items():
            assert torch.equal(merged[name], tensor), (name, count)


@pytest.mark.parametrize("method", [m for m in ALL if m.models[0] == 1 and m.neutral is not None], ids=lambda m: m.name)
def test_one_model_with_weight_one_is_that_model(models: Any, method: Any) -> None:
    base, (expert, *_) = models
    keywords = dict(method.neutral or {}) | ({"density": 1.0} if "density" in method.parameters else {})
    merged = method([expert], base=base if method.space.value == "delta" else None, **keywords)
    for name in SHAPES:
        assert torch.equal(merged[name], expert[name])


@pytest.mark.parametrize("dialect", ["mergekit", "paper", "peft"])
def test_ties_of_identical_experts_is_the_expert(models: Any, dialect: str) -> None:
    base, (expert, *_) = models
    merged = ties([expert] * 3, base=base, density=1.0, dialect=dialect)
    for name in SHAPES:
        assert torch.equal(merged[name], expert[name])


SYMMETRIC = [linear, task_arithmetic, ties]


@pytest.mark.parametrize("method", SYMMETRIC, ids=lambda m: m.name)
def test_order_of_models_does_not_matter(models: Any, method: Any) -> None:
    base, experts = models
    keywords = {"density": 0.5} if method is ties else {}
    results = []
    for order in itertools.permutations(range(3)):
        merged = method(
            [experts[i] for i in order],
            base=base if method.space.value == "delta" else None,
            weight=[(0.5, 0.25, 0.25)[i] for i in order],  # exact in binary: no sum is zero only but for rounding
            **keywords,
        )
        results.append(merged)
    for other in results[1:]:
        for name in SHAPES:
            assert_ulp(other[name], results[0][name].double(), terms=0.2)


@pytest.mark.parametrize("method", [task_arithmetic, ties, dare_linear, dare_ties], ids=lambda m: m.name)
def test_scaling_deltas_scales_the_result(method: Any) -> None:
    base = {"w": np.zeros(5000)}
    g = np.random.default_rng(3)
    taus = [g.standard_normal(5000) for _ in range(3)]
    keywords = {"density": 0.5} if "density" in method.parameters else {}
    one = method([{"w": t} for t in taus], base=base, **keywords)["w"]
    four = method([{"w": 4 * t} for t in taus], base=base, **keywords)["w"]
    np.testing.assert_array_equal(4 * one, four)


def test_integers_are_never_averaged() -> None:
    base = {"n": np.array([1, 2]), "w": np.ones(2)}
    merged = task_arithmetic([{"n": np.array([5, 6]), "w": np.full(2, 3.0)}], base=base)
    np.testing.assert_array_equal(merged["n"], [1, 2])
    np.testing.assert_array_equal(merged["w"], 3)


def test_floats_do_not_mix_with_integers() -> None:
    with pytest.raises(stockpot.StockpotError, match="float in one model"):
        linear([{"w": torch.ones(4)}, {"w": torch.ones(4, dtype=torch.int8)}])
    with pytest.raises(ArgumentError, match="list of mappings"):
        linear({"w": torch.ones(4)})


def test_mistakes_in_notebooks() -> None:
    a = {"w": np.ones(2)}
    with pytest.raises(ArgumentError, match="base"):
        ties([a])
    with pytest.raises(ArgumentError, match="did you mean 'density'"):
        ties([a], base=a, densty=1)
    with pytest.raises(ArgumentError, match="from 0 to 1"):
        ties([a], base=a, density=1.5)
    with pytest.raises(ArgumentError, match="needs density"):
        ties([a], base=a, dialect="peft")
    with pytest.raises(ArgumentError, match="takes 2"):
        slerp([a, a, a], t=0.5)
    with pytest.raises(ArgumentError, match="needs t"):
        slerp([a, a])
    with pytest.raises(stockpot.StockpotError, match="names differ"):
        linear([a, {"x": np.ones(2)}])
    with pytest.raises(stockpot.StockpotError, match="expected"):
        linear([a, {"w": np.ones(3)}])


def test_keys_that_are_no_text_and_one_element_of_any_stride() -> None:
    models = [{1: torch.ones(2), 2: torch.full((3, 2), float(i))[:1, 0]} for i in range(2)]
    merged = linear(models)
    assert list(merged) == [1, 2]
    assert torch.equal(merged[2], torch.tensor([0.5]))


@pytest.mark.parametrize("density", [0.2, 0.5, 0.83])
def test_peft_dialect_is_what_peft_computes(density: float) -> None:
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    generator = torch.Generator().manual_seed(4)
    deltas = [torch.randn(37, 23, generator=generator) for _ in range(3)]
    zero = {"w": torch.zeros(37, 23)}
    given = [{"w": d} for d in deltas]
    weight = [0.3, 1.0, 0.6]
    theirs = merge_utils.ties(deltas, torch.tensor(weight), density)
    ours = ties(given, base=zero, weight=weight, density=density, dialect="peft")["w"]
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    # the others are other methods
    assert not torch.allclose(ties(given, base=zero, weight=weight, density=density)["w"], theirs, atol=1e-2)
    # magnitude pruning alone is TIES of one model
    one = merge_utils.magnitude_prune(deltas, torch.tensor(weight), density)
    each = [ties([g], base=zero, density=density, dialect="peft")["w"] for g in given]
    assert torch.allclose(sum(w * e for w, e in zip(weight, each)), one, rtol=1e-6, atol=1e-6)
    # DARE draws other elements; what is kept is scaled alike, here where nothing is dropped
    dense = merge_utils.dare_linear(deltas, torch.tensor(weight), 1.0)
    assert torch.allclose(dare_linear(given, base=zero, weight=weight)["w"], dense, rtol=1e-6, atol=1e-6)
    ratio = (dare_linear(given[:1], base=zero, density=density)["w"] / deltas[0]).flatten()
    assert torch.allclose(ratio[ratio != 0], torch.tensor(1 / density))
