"""Methods of weights from the Gram matrix, and limited steps, against their definitions in float64."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

import stockpot
from stockpot.methods import karcher, magmax, model_stock, multislerp, nearswap, nuslerp, ram, wise_ft
from stockpot.methods.directions import karcher_weights
from stockpot.methods.stock import stock_share

from helpers import load

SHAPE = (37, 53)


def drawn(count: int, spread: float, seed: int = 0) -> tuple[Any, list[Any]]:
    """A base and models around it, float64 of float32 values."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(SHAPE).astype(np.float32)
    return base, [base + (spread * rng.standard_normal(SHAPE)).astype(np.float32) for _ in range(count)]


def merged(method: Any, models: list[Any], base: Any = None, **parameters: Any) -> Any:
    given = [{"w": torch.from_numpy(m)} for m in models]
    out = method(given, base=None if base is None else {"w": torch.from_numpy(base)}, **parameters)
    return out["w"].numpy()


def close(got: Any, wanted: Any, scale: Any) -> None:
    assert np.abs(got - wanted).max() <= 4e-7 * np.abs(scale).max()


def karcher_of(models: list[Any], weight: list[float], steps: int = 10, tol: float = 1e-5) -> Any:
    """On the vectors themselves, as the fixed point is written: exp of the weighted mean of logs."""
    vectors = [m.astype(np.float64).ravel() for m in models]
    share = np.array(weight) / sum(weight)
    norms = np.array([np.linalg.norm(v) for v in vectors])
    units = [v / n for v, n in zip(vectors, norms)]
    u = sum(w * x for w, x in zip(share, units))
    u = u / np.linalg.norm(u)
    for _ in range(steps):
        tangent = np.zeros_like(u)
        for w, x in zip(share, units):
            angle = np.arccos(np.clip(u @ x, -1, 1))
            if angle > 1e-9:
                tangent += w * angle / np.sin(angle) * (x - np.cos(angle) * u)
        length = np.linalg.norm(tangent)
        if length < tol:
            break
        u = np.cos(length) * u + np.sin(length) * tangent / length
        u = u / np.linalg.norm(u)
    return (share @ norms * u).reshape(models[0].shape)


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("weight", [[1, 1, 1], [0.2, 3, 1], [0, 1, 2]])
def test_karcher_is_the_mean_on_the_sphere(spread: float, weight: list[float]) -> None:
    _, models = drawn(3, spread)
    used = [(m, w) for m, w in zip(models, weight) if w]
    wanted = karcher_of([m for m, _ in used], [w for _, w in used])
    close(merged(karcher, models, weight=weight), wanted, wanted)
    if len(set(weight)) == 1:  # order counts for nothing
        close(merged(karcher, models[::-1]), wanted, wanted)


def test_karcher_at_its_limits() -> None:
    _, models = drawn(3, 1.0)
    wanted = sum(m.astype(np.float64) for m in models) / 3
    opposite = [models[0], -models[0], models[1]]
    plain = (opposite[0].astype(np.float64) + opposite[1] + opposite[2]) / 3
    close(merged(karcher, opposite), plain, models[0])
    norm = sum(np.linalg.norm(m) for m in models) / 3
    assert np.linalg.norm(merged(karcher, models)) == pytest.approx(norm, rel=1e-6)
    assert np.linalg.norm(wanted) < norm
    assert np.array_equal(merged(karcher, [models[0] * 0] * 2), models[0] * 0)
    assert karcher_weights(np.full((2, 2), np.nan), (1.0, 3.0)) == (0.25, 0.75)
    tiny = [(m * 1e-12).astype(np.float32) for m in models]  # a tolerance is relative
    close(merged(karcher, tiny), karcher_of(tiny, [1, 1, 1]), tiny[0])
    with pytest.raises(stockpot.StockpotError, match="expected none below zero, and one above it"):
        karcher([{"w": torch.ones(2)}] * 2, weight=[0, 0])


def stock_of(base: Any, models: list[Any]) -> Any:
    deltas = [(m.astype(np.float64) - base).ravel() for m in models]
    k = len(deltas)
    cos = np.mean(
        [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for i, a in enumerate(deltas) for b in deltas[i + 1 :]]
    )
    t = min(max(k * cos / (1 + (k - 1) * cos), 0), 1)
    return base + (t * sum(deltas) / k).reshape(base.shape)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("common", [0.0, 0.5, 3.0, -1.0])
def test_model_stock_goes_as_far_as_the_angles_say(count: int, common: float) -> None:
    base, models = drawn(count, 0.01)
    shift = np.random.default_rng(9).standard_normal(SHAPE).astype(np.float32) * np.float32(0.01 * common)
    models = [(m + (shift if i else np.sign(common) * shift)).astype(np.float32) for i, m in enumerate(models)]
    close(merged(model_stock, models, base), stock_of(base, models), base)


def test_model_stock_of_small_deltas() -> None:
    """mergekit counts products of norms below 1e-6 as 1e-6: gentle fine-tunes are taken for orthogonal."""
    gram = np.array([[1e-8, 9e-9], [9e-9, 1e-8]])
    assert stock_share(gram) == pytest.approx(2 * 0.9 / 1.9)
    assert stock_share(gram, clamped=False) == pytest.approx(2 * 0.009 / 1.009)
    assert stock_share(np.zeros((3, 3))) == 0
    assert stock_share(np.array([[1.0, -1.0], [-1.0, 1.0]]), clamped=False) == 0
    assert stock_share(np.array([[1.0, -0.5], [-0.5, 1.0]]), clamped=False) == pytest.approx(-2)
    assert stock_share(np.array([[1.0, -0.5], [-0.5, 1.0]])) == 0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_wise_ft(alpha: float) -> None:
    base, (model,) = drawn(1, 1.0)
    got = merged(wise_ft, [model], base, alpha=alpha)
    close(got, (1 - alpha) * base.astype(np.float64) + alpha * model, base)
    if alpha in (0.0, 1.0):
        assert np.array_equal(got, model if alpha else base)


@pytest.mark.parametrize("t", [0.0, 1e-9, 1e-6, 1e-4, 0.3, 1e30])
def test_nearswap(t: float) -> None:
    base, (model,) = drawn(1, 1.0)
    model = np.where(np.arange(SHAPE[1]) % 3 == 0, base, model)
    model[0] = base[0] + np.float32(3e-7)
    delta = model.astype(np.float64) - base
    wanted = base + delta * np.clip(t / np.maximum(np.abs(delta), 1e-6), 0, 1)
    close(merged(nearswap, [model], base, t=t), wanted, model)
    if t == 0:
        assert np.array_equal(merged(nearswap, [model], base, t=t), base)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.7])
def test_ram(count: int, epsilon: float) -> None:
    base, models = drawn(count, 1.0)
    rng = np.random.default_rng(4)
    models = [np.where(rng.random(SHAPE) < 0.5, m, base) for m in models]
    deltas = np.stack([m.astype(np.float64) - base for m in models])
    active = np.abs(deltas) > epsilon
    mean = (deltas * active).sum(0) / np.maximum(active.sum(0), 1)
    close(merged(ram, models, base, epsilon=epsilon), base + mean, base)
    assert np.array_equal(merged(ram, models, base, epsilon=100.0), base)


def test_magmax() -> None:
    base, models = drawn(4, 1.0)
    models[2][:5] = 2 * base[:5] - models[1][:5]
    deltas = np.stack([m.astype(np.float64) - base for m in models])
    largest = np.abs(deltas).max(0)
    got = merged(magmax, models, base, **{"lambda": 1.0}) - base.astype(np.float64)
    assert np.abs(np.abs(got) - largest).max() < 1e-6
    ties = [{"w": torch.tensor([1.0, -1.0])}, {"w": torch.tensor([-1.0, 1.0])}]
    assert magmax(ties, base={"w": torch.zeros(2)}, **{"lambda": 1.0})["w"].tolist() == [-1.0, 1.0]
    assert magmax(ties, base={"w": torch.zeros(2)})["w"].tolist() == [-0.5, 0.5]


def arc(a: Any, b: Any, t: float) -> Any:
    """The great circle through two vectors, as it is written."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    w = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    return (np.sin((1 - t) * w) * x + np.sin(t * w) * y) / np.sin(w)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("weight", [[1, 1], [1, 3], [0, 1], [5, 0.1]])
def test_nuslerp(spread: float, weight: list[float]) -> None:
    base, (a, b) = drawn(2, spread)
    t = weight[1] / sum(weight)
    close(merged(nuslerp, [a, b], weight=weight), arc(a, b, t), a)
    wanted = base + arc(a.astype(np.float64) - base, b.astype(np.float64) - base, t)
    close(merged(nuslerp, [a, b], base, weight=weight), wanted, wanted)


def test_nuslerp_at_its_limits() -> None:
    one, other = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([-1.0, 0.0])}
    assert nuslerp([one, other], weight=[0.7, 0.3])["w"].tolist() == pytest.approx([0.4, 0])
    assert nuslerp([one, one], weight=[0.7, 0.3])["w"].tolist() == [1, 0]
    side = {"w": torch.tensor([0.0, 1.0])}
    beyond = nuslerp([one, side], weight=[2, -1], dialect="mergekit")["w"].numpy()
    assert np.allclose(beyond, [np.sin(np.pi), np.sin(-np.pi / 2)], atol=1e-7)
    zero = {"w": torch.zeros(2)}
    assert nuslerp([zero, side], dialect="mergekit")["w"].tolist() == pytest.approx([0, 0.5**0.5])
    for weight in ([1, -1], [0, 0], [2, -1]):
        with pytest.raises(stockpot.StockpotError, match="expected none below zero"):
            nuslerp([one, side], weight=weight)


@pytest.mark.parametrize("weight", [[1, 1, 1], [0.2, 3, 1], [2, -0.5, 1]])
@pytest.mark.parametrize("with_base", [False, True])
def test_multislerp(weight: list[float], with_base: bool) -> None:
    base, models = drawn(3, 1.0)
    vectors = [m.astype(np.float64) - (base if with_base else 0) for m in models]
    share = np.array(weight) / sum(weight)
    norms = np.array([np.linalg.norm(v) for v in vectors])
    mean = sum(s * v / n for s, v, n in zip(share, vectors, norms))
    wanted = (share @ norms) * mean / np.linalg.norm(mean) + (base if with_base else 0)
    close(merged(multislerp, models, base if with_base else None, weight=weight), wanted, wanted)


def test_multislerp_at_its_limits() -> None:
    base, models = drawn(3, 1.0)
    assert np.array_equal(merged(multislerp, [base] * 4, base), base)
    close(merged(multislerp, models[:1]), models[0].astype(np.float64), models[0])
    with pytest.raises(stockpot.StockpotError, match="sum to zero, so that they have no mean direction"):
        multislerp([{"w": torch.ones(2)}] * 2, weight=[1, -1])


@pytest.mark.parametrize("method", [nuslerp, multislerp])
def test_a_base_is_optional(method: Any, tmp_path: Any, family: Any) -> None:
    """In recipes, in plans that travel, in rules and slices."""
    base, a, b = (str(family / n) for n in ("base", "a", "b"))
    plain: dict[str, Any] = {"merge_method": method.name, "models": [a, b]}
    on_weights, on_deltas = stockpot.plan(plain), stockpot.plan({**plain, "base_model": base})
    assert [g.method.space.value for p in (on_weights, on_deltas) for g in p.groups] == ["weight", "delta"]
    again = pickle.loads(pickle.dumps(on_weights))
    assert again.groups[0].method is method.without_base()
    assert pickle.loads(pickle.dumps(on_deltas)).groups[0].method is method
    stockpot.merge(plain, tmp_path / "weights")
    stockpot.merge({**plain, "base_model": base}, tmp_path / "deltas")
    tensors = {n: load(family / n) for n in ("base", "a", "b")}
    for out, given in (("weights", None), ("deltas", tensors["base"])):
        wanted = method([tensors["a"], tensors["b"]], base=given)
        for name, tensor in load(tmp_path / out).items():
            assert torch.equal(tensor, wanted[name]), (out, name)
    slices = [{"sources": [{"model": a, "layer_range": [0, 2]}, {"model": b, "layer_range": [0, 2]}]}]
    sliced = stockpot.plan({"merge_method": method.name, "slices": slices})
    assert {g.method.space.value for g in sliced.groups} == {"weight"}
    rules = [{"match": "*norm*", "merge_method": method.name}]
    mixed = stockpot.plan({"merge_method": "linear", "models": [a, b], "rules": rules})
    assert {g.method.space.value for g in mixed.groups} == {"weight"}
    assert method.base_optional
    assert method.without_base().without_base() is method.without_base()


def test_recipes_of_mergekit(tmp_path: Any, family: Any) -> None:
    """As they are published: names and defaults; `compat: mergekit` takes its dialect."""
    base, a, b = (family / n for n in ("base", "a", "b"))
    for text, dialect in (
        (f"merge_method: model_stock\nbase_model: {base}\nmodels: [{a}, {b}]\n", "stockpot"),
        (f"merge_method: model_stock\nbase_model: {base}\nmodels: [{a}, {b}]\ncompat: mergekit\n", "mergekit"),
        (f"merge_method: karcher\nmodels: [{a}, {b}]\nparameters: {{max_iter: 10, tol: 1e-5}}\n", "stockpot"),
        (f"merge_method: nuslerp\nmodels: [{a}, {b}]\nparameters: {{weight: 0.5}}\ncompat: mergekit\n", "mergekit"),
        (
            f"merge_method: multislerp\nbase_model: {base}\nmodels: [{a}, {b}]\nparameters: {{weight: 0.5, eps: 1e-8}}\n",
            None,
        ),
        (f"merge_method: nearswap\nbase_model: {base}\nmodels: [{a}]\nparameters: {{t: 0.0001}}\n", None),
        (f"merge_method: ram\nbase_model: {base}\nmodels: [{a}, {b}]\nparameters: {{epsilon: 1e-5}}\n", None),
    ):
        planned = stockpot.plan(text)
        assert all(g.params.get("dialect") == dialect for g in planned.groups)
        stockpot.merge(text, tmp_path / "out", overwrite=(tmp_path / "out").exists())
