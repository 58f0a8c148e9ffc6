"""Weights of snapshots: the figures of the papers' formulas worked out by hand, and what must hold for all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.errors import ArgumentError
from stockpot.runs import SoupSpec, metric_weights, parse_name, soup_name
from stockpot.runs.metrics import known_objective
from stockpot.runs.weighting import decay_weights, effective_count, ema_weights, ranks, uniform

LOSSES = (0.5, 0.4, 0.8)


def phi_min(losses: tuple[float, ...], p: float, q: float) -> list[float]:
    """The paper's formula as it reads."""
    order = sorted(losses)
    phi = [p ** (q ** order.index(x)) / x for x in losses]
    return [x / sum(phi) for x in phi]


def test_loss_weights_by_hand() -> None:
    raw = (0.98, 1.75, 0.300125)  # .7^2/.5, .7/.4, .7^4/.8
    assert metric_weights(LOSSES, "min", 0.7, 2) == pytest.approx([x / sum(raw) for x in raw], abs=1e-12)
    assert metric_weights(LOSSES, "min", 0.7, 2) == pytest.approx([0.323419, 0.577534, 0.099047], abs=1e-6)


def test_step_weights_by_hand() -> None:
    raw = (240.1, 980.0, 2100.0)
    found = metric_weights((1000, 2000, 3000), "max", 0.7, 2)
    assert found == pytest.approx([x / sum(raw) for x in raw], abs=1e-12)
    assert found == pytest.approx([0.072317, 0.295172, 0.632511], abs=1e-6)


def test_without_penalty_only_the_metric_counts() -> None:
    assert metric_weights(LOSSES, "min") == pytest.approx([0.347826, 0.434783, 0.217391], abs=1e-6)
    assert metric_weights(LOSSES, "min", 1.0, 1.2) == metric_weights(LOSSES, "min", 1.0, 7.0)


@pytest.mark.parametrize(
    ("power", "first", "last"), [(1.1, 0.122, 0.075), (1.2, 0.160, 0.036), (1.5, 0.306, 0.0), (2.0, 0.470, 0.0)]
)
def test_how_steep_the_power_is(power: float, first: float, last: float) -> None:
    """Ten equal losses but for a hair, p = 0.7: figures of the method's notes."""
    losses = [1.0 + 1e-9 * i for i in range(10)]
    weights = metric_weights(losses, "min", 0.7, power)
    assert weights[0] == pytest.approx(first, abs=6e-4)
    assert weights[-1] == pytest.approx(last, abs=6e-4)


def test_finite_and_one_for_many_snapshots() -> None:
    for p, q in ((0.5, 2.0), (0.7, 2.0), (0.99, 5.0), (1.0, 1e3)):
        weights = metric_weights([0.5 + 0.001 * i for i in range(200)], "min", p, q)
        assert all(math.isfinite(w) and w >= 0 for w in weights)
        assert abs(sum(weights) - 1) <= 1e-15
    assert metric_weights([2.0, 1.0], "min", 1e-300, 1.2) == pytest.approx([0, 1])


def test_equal_metrics_share_their_ranks() -> None:
    assert ranks([3.0, 1.0, 1.0, 2.0], "min") == [3.0, 0.5, 0.5, 2.0]
    assert ranks([3.0, 1.0, 1.0, 2.0], "max") == [0.0, 2.5, 2.5, 1.0]
    assert metric_weights([0.3] * 5, "min", 0.5, 2) == [0.2] * 5


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30),
    st.floats(0.05, 1.0),
    st.floats(1.0, 3.0),
    st.floats(1e-3, 1e3),
)
def test_weights_in_general(values: list[float], p: float, q: float, scale: float) -> None:
    weights = metric_weights(values, "min", p, q)
    assert abs(math.fsum(weights) - 1) <= 1e-15
    assert min(weights) >= 0
    assert metric_weights([v * scale for v in values], "min", p, q) == pytest.approx(weights, abs=1e-9)
    best = values.index(min(values))
    assert weights[best] == max(weights)
    if len(set(values)) == len(values) and q ** len(values) < 1e3:
        assert weights == pytest.approx(phi_min(tuple(values), p, q), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (((0.5, 0.0), "min"), "above 0"),
        (((0.5, -1.0), "max"), "at least 0"),
        (((0.5, math.nan), "min"), "above 0"),
        (((0.0, 0.0), "max"), "every value is 0"),
        ((LOSSES, "min", 0.0), "penalty"),
        ((LOSSES, "min", -1.0), "penalty"),
        ((LOSSES, "min", 0.7, 0.0), "power"),
        ((LOSSES, "low"), "objective"),
        (([1.0 + i for i in range(5000)], "min", 1.05, 2.0), "overflows"),
    ],
)
def test_refused(arguments: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        metric_weights(*arguments)


def test_penalty_above_one_favours_the_worse() -> None:
    weights = metric_weights([1.0, 1.0001, 1.0002], "min", 1.05, 1.5)
    assert weights == sorted(weights)
    weights = metric_weights([1.0 + 1e-6 * i for i in range(60)], "min", 1.05, 2.0)
    assert weights[-1] == pytest.approx(1.0)


def test_ema_by_hand() -> None:
    assert ema_weights([1, 2, 3, 4], 0.9) == pytest.approx([0.729, 0.081, 0.09, 0.1], abs=1e-15)
    assert ema_weights([1, 2, 3], 0.0) == [0, 0, 1]
    assert ema_weights([1, 2, 3], 1.0) == [1, 0, 0]
    per_step = ema_weights([100, 110, 130], 0.99, "step")
    a, b = 0.99**10, 0.99**20
    assert per_step == pytest.approx([a * b, (1 - a) * b, 1 - b], abs=1e-15)


def test_decay_schedules_by_hand() -> None:
    """Coefficients of a decaying learning rate, as Megatron-LM's weighted merge has them for four checkpoints."""
    assert decay_weights(4, "linear") == [0.25] * 4
    assert decay_weights(4, "1-sqrt") == pytest.approx(
        [0.5, 0.20710678118654757, 0.15891862259789104, 0.1339745962155614], abs=1e-15
    )
    assert decay_weights(1, "1-sqrt") == [1.0]


def test_effective_count() -> None:
    assert effective_count(uniform(8)) == pytest.approx(8)
    assert effective_count([1.0, 0.0]) == 1


@pytest.mark.parametrize(
    ("metric", "objective"),
    [
        ("loss", "min"),
        ("eval_loss", "min"),
        ("train/loss", "min"),
        ("valLoss", "min"),
        ("eval_perplexity", "min"),
        ("eval_accuracy", "max"),
        ("mean_token_accuracy", "max"),
        ("rougeL", "max"),
        ("step", "max"),
        ("steps", "max"),
        ("grad_norm", None),
        ("reward_margin", None),
        ("loss_accuracy", None),
    ],
)
def test_known_objectives(metric: str, objective: str | None) -> None:
    assert known_objective(metric) == objective


NAMES = [
    "last_10_loss_pf-0_7",
    "last_5_3_loss_pf-0_75",
    "last_4_unweighted",
    "last_5_3_unweighted",
    "last_10_steps_pf-1_05",
    "last_10_loss_pf-1_0",
    "last_8_eval_loss_pf-0_5_q-2_0",
    "last_8_grad_norm_pf-0_5_min_s-4_final",
    "last_10_best_3_eval_loss_unweighted",
    "last_10_best_3_eval_loss_pf-0_9",
    "last_10_best_3_eval_loss_ema-0_9",
    "last_30_1_5_shot_acc_pf-0_9",
    "last_6_linear",
    "last_6_1-sqrt",
    "last_6_ema-0_9",
    "last_6_ema-step-0_999",
    "last_5_lawa",
    "from_400_swa",
    "from_400_2_unweighted",
    "steps_100-200-300_loss_pf-0_7",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_parse_back(name: str) -> None:
    spec = parse_name(name)
    assert soup_name(spec, spec.last or 0) == name


def test_what_a_name_means() -> None:
    assert parse_name("last_10_loss_pf-0_7") == SoupSpec(last=10, by="loss", penalty=0.7)
    assert parse_name("last_5_3_loss_pf-0_75") == SoupSpec(last=5, every=3, by="loss", penalty=0.75)
    assert parse_name("last_5_unweighted") == SoupSpec(last=5)
    assert parse_name("last_5_steps_pf-1_05") == SoupSpec(last=5, by="step", penalty=1.05)
    for bad in ("", "last_10", "last_x_unweighted", "last_10_loss_pf-0.7", "last_10_loss", "first_10_unweighted"):
        with pytest.raises(ArgumentError, match="not the name of a soup"):
            parse_name(bad)


@given(
    st.integers(1, 500),
    st.integers(1, 20),
    st.sampled_from(["loss", "eval_loss", "step", "accuracy"]),
    st.floats(1e-6, 3.0),
    st.floats(0.1, 9.0),
    st.integers(1, 9),
    st.booleans(),
)
def test_any_name_parses_back(
    last: int, every: int, by: str, penalty: float, power: float, smooth: int, final: bool
) -> None:
    spec = SoupSpec(last=last, every=every, by=by, penalty=penalty, power=power, smooth=smooth, include_final=final)
    assert parse_name(soup_name(spec, last)) == spec


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"last": 0}, "last: expected a whole number of at least 1"),
        ({"last": 2.5}, "last: expected a whole number"),
        ({"last": True}, "last: expected a whole number"),
        ({"last": 3, "steps": (1, 2)}, "give only one of"),
        ({"steps": ()}, "at least one step"),
        ({"steps": (5, 5)}, "given twice"),
        ({"every": 2, "steps": (1, 2)}, "every counts back"),
        ({"penalty": 0.5}, "penalty has no effect on uniform weights.*name the metric with by"),
        ({"by": "loss", "penalty": 0}, "penalty: expected a number above 0"),
        ({"by": "loss", "penalty": math.inf}, "penalty: expected a number"),
        ({"by": "loss", "power": -1}, "power: expected a number above 0"),
        ({"by": ""}, "by: expected the name"),
        ({"by": "loss", "objective": "low"}, "objective: expected one of min, max"),
        ({"scheme": "metrics"}, "did you mean 'metric'"),
        ({"scheme": "ema"}, "needs decay"),
        ({"decay": 1.5}, "from 0 to 1"),
        ({"decay": 0.9, "penalty": 0.7}, "penalty has no effect on ema"),
        ({"best": 3}, "best needs by"),
        ({"scheme": "weights"}, "needs weights"),
        ({"weights": {}}, "mapping from steps"),
        ({"weights": {1.5: 1.0}}, "expected a step"),
        ({"weights": {True: 1.0}}, "expected a step"),
        ({"weights": {1: 10**400}}, "must be a number"),
        ({"penalty": 10**400, "by": "loss"}, "penalty: expected a number"),
        ({"steps": 1.5}, "steps: expected whole numbers"),
        ({"steps": "100,200"}, "steps: expected whole numbers"),
        ({"steps": (1,), "include_final": True}, "include_final has no effect"),
        ({"best": 3, "by": "loss", "power": 1.5}, "with best, penalty makes weights"),
        ({"weights": {"a": 1}}, "expected a step"),
        ({"weights": {1: math.nan}}, "must be a number"),
        ({"weights": {1: 1.0}, "scheme": "uniform"}, "can't be uniform"),
        ({"normalize": True}, "normalize has no effect"),
        ({"scheme": "lawa", "steps": (1, 2)}, "lawa takes windows"),
    ],
)
def test_specs_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        SoupSpec(**options)
