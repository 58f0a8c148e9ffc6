"""Paired bootstrap, gates, aggregates: against known figures and planted differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stockpot.errors import ArgumentError, EvaluationError
from stockpot.evaluation.aggregate import aggregate_scores, parse_weights
from stockpot.evaluation.gates import judge
from stockpot.evaluation.scores import Scores, checked_scores
from stockpot.evaluation.statistics import bootstrap_score, paired_difference
from stockpot.evaluation.suite import Suite, parse_suite

from helpers import cli

SUITE = "slices:\n  - {name: a, kind: choice, data: x, weight: 1}\n"


def suite(text: str = SUITE) -> Suite:
    return parse_suite(text, "suite.yml")


def right(n: int, share: float, seed: int = 0) -> Scores:
    values = (np.random.default_rng(seed).random(n) < share).astype(float)
    return Scores({"accuracy": float(values.mean())}, examples={"accuracy": values}, ids=tuple(map(str, range(n))))


def test_intervals_are_those_of_the_binomial() -> None:
    scores = right(400, 0.7)
    p = scores["accuracy"]
    found = bootstrap_score(suite(), {"a": scores}, draws=10_000)
    half = 1.96 * (p * (1 - p) / 400) ** 0.5
    assert found.value == p
    assert found.low == pytest.approx(p - half, abs=0.006)
    assert found.high == pytest.approx(p + half, abs=0.006)
    assert found == bootstrap_score(suite(), {"a": scores}, draws=10_000)  # the same every time


def test_pairs_are_what_makes_a_difference_visible() -> None:
    """Noise that both share cancels: the interval is that of the differences."""
    rng = np.random.default_rng(1)
    hard = rng.normal(3, 1, 300)
    text = "slices:\n  - {name: a, kind: loss, data: x}\n"
    x = Scores({"loss": float(hard.mean())}, examples={"loss": hard})
    y = Scores({"loss": float((hard + 0.02).mean())}, examples={"loss": hard + 0.02 + rng.normal(0, 0.05, 300)})
    y["loss"] = float(y.examples["loss"].mean())
    d = paired_difference(suite(text), {"a": x}, {"a": y})
    assert d.verdict == "better"  # lower loss is better, and better is positive
    assert d.value == pytest.approx(y["loss"] - x["loss"])
    assert d.high is not None
    assert d.low is not None
    assert d.high - d.low < 0.02
    back = paired_difference(suite(text), {"a": y}, {"a": x})
    assert back.verdict == "worse"
    assert back.low == pytest.approx(-d.high)


def test_equal_documents_are_one_example() -> None:
    values = np.array([1.0] * 30 + [2.0])
    ids = ("same",) * 30 + ("other",)
    scores = Scores({"accuracy": float(values.mean())}, examples={"accuracy": values}, ids=ids)
    assert scores.n == 2
    found = bootstrap_score(suite(), {"a": scores}, draws=2000)
    assert found.low == 1.0
    assert found.high == 2.0


def test_examples_that_weigh_nothing_are_none() -> None:
    scores = Scores({"accuracy": 3.0}, examples={"accuracy": [1.0, 2.0, 3.0]}, counts=[0.0, 0.0, 1.0])
    found = bootstrap_score(suite(), {"a": scores}, draws=100)
    assert (found.low, found.high) == (3.0, 3.0)


def test_verdicts() -> None:
    a = right(200, 0.5)
    assert paired_difference(suite(), {"a": a}, {"a": a}).verdict == "same"
    assert paired_difference(suite(), {"a": a}, {"a": right(200, 0.52, seed=3)}).verdict == "noise"
    assert paired_difference(suite(), {"a": right(2000, 0.8)}, {"a": right(2000, 0.6, seed=3)}).verdict == "better"
    assert paired_difference(suite(), {"a": Scores({"accuracy": 1.0})}, {"a": a}).verdict == "unknown"


def test_tokens_weigh_and_perplexity_is_of_the_mean() -> None:
    values, counts = np.array([1.0, 3.0]), np.array([30.0, 10.0])
    scores = Scores({"loss": 1.5, "perplexity": float(np.exp(1.5))}, examples={"loss": values}, counts=counts)
    text = "slices:\n  - {name: a, kind: perplexity, data: x}\n"
    found = bootstrap_score(suite(text), {"a": scores}, draws=4000)
    assert found.value == pytest.approx(np.exp(1.5))
    assert found.low == pytest.approx(np.exp(1.0))
    assert found.high == pytest.approx(np.exp(3.0))


def test_scores_of_several_slices_are_weighted() -> None:
    text = "slices:\n  - {name: a, kind: choice, data: x, weight: 3}\n  - {name: b, kind: choice, data: y, weight: 1}\n"
    a, b = right(500, 0.9), right(500, 0.1, seed=4)
    found = bootstrap_score(suite(text), {"a": a, "b": b}, draws=10_000)
    assert found.value == pytest.approx(0.75 * a["accuracy"] + 0.25 * b["accuracy"])
    spread = (0.75**2 * a["accuracy"] * (1 - a["accuracy"]) + 0.25**2 * b["accuracy"] * (1 - b["accuracy"])) / 500
    assert found.high is not None
    assert found.low is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * spread**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"acc": float("nan")}, "acc is nan, which is no score"),
        ({"acc": float("inf")}, "is inf"),
        ({"accuracy": 1}, "gave no metric 'acc'; there are accuracy"),
        ({}, "there are none"),
        (3, "expected a mapping from metrics to numbers, got 3"),
        ({"acc": 1, "examples": {"acc": [1, "x"]}}, "lists of numbers"),
        ({"acc": 1, "examples": {"acc": [1.0, float("nan")]}}, "acc of example 1 is nan"),
        ({"acc": 1, "examples": {"acc": [1, 0]}, "ids": ["a"]}, "differ in length"),
    ],
)
def test_what_is_no_score_is_refused(raw: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        checked_scores(raw, "acc", "slice 'x'")


def test_scores_of_the_users_own_are_made_plain() -> None:
    class Mine(Scores):
        pass

    found = checked_scores(Mine({"acc": np.float32(0.5)}, examples={"acc": [1, 0]}), "acc", "x")  # type: ignore[dict-item]
    assert type(found) is Scores
    assert type(found["acc"]) is float
    with pytest.raises(EvaluationError, match="differ in length"):
        checked_scores(Scores({"acc": 1.0}, examples={"acc": [1.0, 0.0]}, counts=[1.0]), "acc", "x")
    weighted = checked_scores(
        {"examples": {"acc": np.array([1.0, 0.0])}, "counts": np.array([9, 1]), "ids": ("a", "b")}, "acc", "x"
    )
    assert weighted["acc"] == 0.9
    assert weighted.ids == ("a", "b")


def test_plain_results_with_examples() -> None:
    found = checked_scores(
        {"acc": np.float32(0.5), "note": "text", "examples": {"acc": [1, 0], "other": [2, 4]}}, "acc", "x"
    )
    assert found == {"acc": 0.5, "other": 3.0}
    assert found.n == 2


# gates


def verdict_of(gate: str, mine: Scores, *others: Scores, reference: str = "base") -> tuple[str, bool]:
    found = judge(suite(SUITE + "gates:\n  - " + gate + "\n"), {"a": mine}, {reference: [{"a": o} for o in others]})
    return found.outcomes[0].status, found.passed


def test_gates() -> None:
    base = right(1000, 0.80)
    drop = Scores({}, examples={"accuracy": base.examples["accuracy"].copy()}, ids=base.ids)
    hit = np.flatnonzero(drop.examples["accuracy"] == 1)[:50]
    drop.examples["accuracy"][hit] = 0.0
    drop["accuracy"] = float(drop.examples["accuracy"].mean())
    regression = "{slice: a, reference: base, max_drop: 0.01}"
    assert verdict_of(regression, base, base) == ("pass", True)
    assert verdict_of(regression, drop, base) == ("fail", False)  # five points at n = 1000
    assert verdict_of("{slice: a, reference: base, max_drop: 0.01, severity: warning}", drop, base) == ("fail", True)
    assert verdict_of("{slice: a, reference: base, max_drop_percent: 10}", drop, base) == ("pass", True)
    assert verdict_of("{slice: a, reference: base, max_drop: 0.051}", drop, base) == (
        "inconclusive",
        False,
    )  # too near to tell
    small = right(20, 0.8)
    assert verdict_of(regression, small, small) == ("inconclusive", False)
    assert verdict_of("{slice: a, min: 0.5}", small) == ("inconclusive", False)
    assert verdict_of("{slice: a, min: 0.5, min_examples: 20}", small) == ("pass", True)
    assert verdict_of("{slice: a, min: 0.9}", base) == ("fail", False)
    assert verdict_of("{slice: score, min: 0.5}", base) == ("pass", True)
    assert verdict_of("{slice: a, max: 0.9}", base) == ("pass", True)
    # without pairs nothing tells how sure a difference is
    assert verdict_of(regression, base, Scores({"accuracy": base["accuracy"]})) == ("inconclusive", False)
    assert (
        verdict_of(
            "{slice: a, reference: base, max_drop: 0.01, min_examples: 0}", base, Scores({"accuracy": base["accuracy"]})
        )[0]
        == "pass"
    )
    # the best parent counts, not the average one
    assert (
        verdict_of("{slice: a, reference: best_parent, max_drop: 0.01}", drop, drop, base, reference="best_parent")[0]
        == "fail"
    )
    assert (
        verdict_of("{slice: a, reference: best_parent, max_drop: 0.01}", base, drop, reference="best_parent")[0]
        == "pass"
    )


# the published aggregates (arXiv 2504.18580, tables 2 and 3)

TABLE2 = """model,gsm8k,gsm_plus,weighted_average,vs_last_merging_pct,vs_final_pct
last_10_loss_pf-0_7,0.304,0.1958,0.22826,5.05,1.76
last_4_3_loss_pf-0_8,0.3017,0.1938,0.22617,4.09,0.83
last_10_steps_pf-1_0,0.3055,0.1917,0.22584,3.94,0.68
last_4_3_loss_pf-0_5,0.2934,0.1954,0.2248,3.46,0.22
last_10_steps_pf-1_05,0.2980,0.1933,0.22471,3.42,0.18
last_merging_checkpoint,0.2926,0.1850,0.21728,,
final_checkpoint,0.3025,0.1908,0.22431,,
gemma-2b,0.1751,0.1004,0.12281,,
"""
TABLE3 = """model,toxigen,truthfulqa_mc1,truthfulqa_mc2,weighted_average
last_5_3_loss_pf-0_7,0.5543,0.3452,0.5142,0.4920
last_5_3_loss_pf-0_9,0.5543,0.3439,0.5143,0.4917
last_5_3_loss_pf-0_8,0.5543,0.3366,0.5132,0.4896
last_5_3_loss_pf-1_0,0.5553,0.3354,0.5121,0.4895
last_5_3_unweighted,0.5553,0.3354,0.5105,0.4891
last_merging_checkpoint,0.5553,0.3268,0.5114,0.4872
final_checkpoint,0.5553,0.3244,0.5102,0.4863
gemma-2b-it,0.5128,0.2901,0.4583,0.4435
"""


def test_the_published_aggregates_come_out(tmp_path: Path) -> None:
    (tmp_path / "t2.csv").write_text(TABLE2)
    found = aggregate_scores(
        tmp_path / "t2.csv", {"gsm8k": 0.3, "gsm_plus": 0.7}, ["last_merging_checkpoint", "final_checkpoint"]
    )
    rows = [line.split(",") for line in TABLE2.splitlines()[1:]]
    for row, made in zip(rows, found, strict=True):
        assert made.name == row[0]
        assert made.score == pytest.approx(float(row[3]), abs=5.1e-6)
        if row[4]:
            # computed from rounded columns: the published percentages have two digits
            assert made.percent["last_merging_checkpoint"] == pytest.approx(float(row[4]), abs=0.0051)
            assert made.percent["final_checkpoint"] == pytest.approx(float(row[5]), abs=0.0051)
    (tmp_path / "t3.csv").write_text(TABLE3)
    weights = parse_weights("toxigen=0.5,truthfulqa_mc1=0.25,truthfulqa_mc2=0.25")
    for line, made in zip(TABLE3.splitlines()[1:], aggregate_scores(tmp_path / "t3.csv", weights), strict=True):
        assert made.score == pytest.approx(float(line.rsplit(",", 1)[1]), abs=5.1e-5)


def test_aggregate_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "t2.csv").write_text(TABLE2)
    done = cli("aggregate", "t2.csv", "--weights", "gsm8k=0.3,gsm_plus=0.7", "--reference", "final_checkpoint",
               "--reference", "last_merging_checkpoint", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0.22826" in done.stdout
    assert "+1.76" in done.stdout
    assert "+5.05" in done.stdout
    bad = cli("aggregate", "t2.csv", "--weights", "gsm8=1", cwd=tmp_path)
    assert bad.returncode == 2
    assert "did you mean 'gsm8k'" in bad.stderr
    worse = cli("aggregate", "t2.csv", "--weights", "gsm8k=1", "--reference", "final_chekpoint", cwd=tmp_path)
    assert "did you mean 'final_checkpoint'" in worse.stderr


def test_percent_above_a_negative_reference(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("m,a\nlow,-2\nhigh,-1\n")
    assert [r.percent["low"] for r in aggregate_scores(tmp_path / "t.csv", {"a": 1.0}, ["low"])] == [0.0, 50.0]


@pytest.mark.parametrize(
    ("content", "weights", "message"),
    [
        ("m,a\nx,1\nx,2\n", "a=1", "stands there twice"),
        ("m,a\nx,one\n", "a=1", r":2: a of 'x': expected a number, got 'one'"),
        ("m,a\n", "a=1", "expected a line of column names"),
        ("m,a\nx,0\n", "a=1", "scores 0"),
        ("m,a\nx,1_0\n", "a=1", "expected a number"),
        ("m,a,a\nx,1,2\n", "a=1", "the column 'a' stands there twice"),
        ("m,a\nx,1\n", "a=x", "expected COLUMN=NUMBER"),
        ("m,a\nx,1\n", "a=1,a=2", "given twice"),
        ("m,a\nx,1\n", "a=0", "sum to 0"),
    ],
)
def test_bad_tables(tmp_path: Path, content: str, weights: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ArgumentError, match=message):
        aggregate_scores(tmp_path / "t.csv", parse_weights(weights), ["x"])
