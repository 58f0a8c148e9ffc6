"""Elementwise methods against their definitions, written in float64 as they read, on whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stockpot
from stockpot.methods import get_method
from stockpot.methods.arrays import row_ranks
from stockpot.methods.consensus import tall_masks
from stockpot.methods.pruned import magprune_probabilities
from stockpot.methods.selection import divergence
from stockpot.methods.spherical import arcs, nuslerp_arcs, nuslerp_weights, slerp_weights
from stockpot.methods.stock import stock_share, stock_shares
from stockpot.testing import method_checks
from test_spherical import SHAPE, close, drawn, merged

Array = Any


def rows_of(x: Array) -> Array:
    """A tensor as rows: the last axis (of packed experts too), of a convolution (four axes here) a filter, all of a vector."""
    if x.ndim == 3:
        return x.reshape(-1, x.shape[-1])
    return x.reshape(1, -1) if x.ndim < 2 else x.reshape(len(x), -1)


def magnitudes(x: Array) -> Array:
    return np.abs(x).astype(np.float32)


def crumbs(delta: Array, density: float, gamma: float, dialect: str) -> Array:
    """By sorting. A band's ends are magnitudes, so that equal ones go together."""
    flat = rows_of(delta) if dialect == "paper" else delta.reshape(1, -1)
    out = np.zeros_like(flat)
    for row, kept in zip(flat, out):
        n, size = len(row), magnitudes(row)
        order = np.sort(size)
        if dialect == "paper":
            top = int(gamma * n)
            k = min(int(density * n), n - top)
            first = n - top - k
        elif density >= 1:
            kept[...] = row
            continue
        else:
            k = int(density * n)
            first = max(0, n - k - int(gamma * n))
        if k:
            inside = (size >= order[first]) & (size <= order[first + k - 1])
            kept[inside] = row[inside]
    return out.reshape(delta.shape)


def each(value: Any, count: int) -> list[float]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def all_crumbs(models: Array, base: Array, density: Any, gamma: Any, dialect: str, rescale: bool) -> Array:
    paper = dialect == "paper"
    densities = each((0.2 if paper else 1.0) if density is None else density, len(models))
    gammas = each((0.1 if paper else 0.01) if gamma is None else gamma, len(models))
    out = []
    for m, d, g in zip(models, densities, gammas):
        kept = crumbs(m - base, d, g, dialect)
        norm = np.abs(kept).sum()
        out.append(kept * (np.abs(m - base).sum() / norm) if rescale and norm > 0 else kept)
    return np.stack(out)


def breadcrumbs_of(
    models: Array, base: Array, *, density: Any = None, gamma: Any = None, dialect: str = "mergekit", rescale: bool = False,
    normalize: bool = False,
) -> Array:  # fmt: skip
    total = all_crumbs(models, base, density, gamma, dialect, rescale).sum(0)
    return base + (0.4 if dialect == "paper" else 1.0) * total / (len(models) if normalize else 1)


def breadcrumbs_ties_of(
    models: Array, base: Array, *, density: Any = None, gamma: Any = None, dialect: str = "mergekit", rescale: bool = False,
    normalize: bool = False,
) -> Array:  # fmt: skip
    kept = all_crumbs(models, base, density, gamma, dialect, rescale)
    agree = np.sign(kept) == np.where(kept.sum(0) >= 0, 1.0, -1.0)
    total = (kept * agree).sum(0) / (np.maximum(agree.sum(0), 1) if normalize else 1)
    return base + (0.4 if dialect == "paper" else 1.0) * total


def sce_of(models: Array, base: Array, *, select_topk: float = 1.0, dialect: str = "stockpot") -> Array:
    delta = models - base
    variance = delta.var(0).astype(np.float32)
    if select_topk < 1:
        k = int(select_topk * np.count_nonzero(variance))
        least = np.sort(variance.ravel())[variance.size - k] if k else np.inf
        delta = delta * (variance >= least)
    energy = (delta**2).reshape(len(delta), -1).mean(1)
    small = energy.sum() < 1e-6 if dialect == "mergekit" else energy.sum() == 0
    weight = np.full(len(delta), 1 / len(delta)) if small else energy / energy.sum()
    weight = weight.reshape(-1, *[1] * base.ndim)
    agree = np.sign(delta) == np.where(delta.sum(0) >= 0, 1.0, -1.0)
    shares = (weight * agree).sum(0)
    divisor = np.maximum(shares, 1e-6) if dialect == "mergekit" else np.where(shares == 0, 1, shares)
    return base + (weight * delta * agree).sum(0) / divisor


def arcee_of(models: Array, base: Any, *, fence: float = 1.5, dialect: str = "stockpot") -> Array:
    first, second = (rows_of(m) for m in models)

    def softmax(x: Array) -> Array:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    more = 1e-8 if dialect == "mergekit" else 0.0
    q, p = softmax(first) + more, softmax(second) + more
    score = (np.abs(second - first) * (p * np.log(p / q)).sum(-1, keepdims=True)).astype(np.float32)
    ordered = np.sort(score.ravel())
    low, middle, high = (float(ordered[int(f * (len(ordered) - 1))]) for f in (0.25, 0.5, 0.75))
    taken = score >= np.float32(middle + fence * (high - low))
    if dialect != "mergekit":
        taken &= score > 0
    return np.where(taken, second, first).reshape(models[0].shape)


def ramplus_of(models: Array, base: Array, *, dialect: str = "mergekit") -> Array:
    delta = models - base
    active = np.abs(delta) > 1e-5
    count = active.sum(0)
    r, alpha = (0.1, 0.2) if dialect == "mergekit" else (0.2, 1.0)
    alone = np.zeros_like(base)
    for d, a in zip(delta, active):
        shared, unique = np.count_nonzero(a & (count > 1)), np.count_nonzero(a & (count == 1))
        alone += d * a * (1 + r * min(shared / unique if unique else 0, alpha))
    return base + np.where(count == 1, alone, (delta * active).sum(0) / np.maximum(count, 1))


def consensus_of(models: Array, base: Array, *, threshold: Any = 0.4, k: int = 2) -> Array:
    delta = models - base
    merged = delta.sum(0)
    votes = sum(np.abs(d) > t * np.abs(merged - d) for d, t in zip(delta, each(threshold, len(delta))))
    return base + merged * (votes >= k)


def emr_of(models: Array, base: Array) -> Array:
    delta = models - base
    sign = np.where(delta.sum(0) > 0, 1.0, -1.0)
    return base + sign * np.where(delta * sign > 0, np.abs(delta), 0).max(0)


def ota_of(models: Array, base: Array, *, moment: Array, density: Any = 1.0, power: float = 0.5) -> Array:
    delta = models - base
    weight = np.abs(moment) ** power
    return base + (weight * delta).sum(0) / weight.sum(0)


def cocktail_of(models: Array, base: Any, *, loss: Any, temperature: float = 5.0) -> Array:
    raw = np.exp(-np.array(each(loss, len(models))) / temperature)
    return np.tensordot(raw / raw.sum(), models, 1)


def average_of(models: Array, base: Any) -> Array:
    return models.mean(0)


#: not those with statistics over a whole model, which the suite's oracle of single tensors can't tell
ORACLES: dict[str, Callable[..., Array]] = {
    "breadcrumbs": breadcrumbs_of,
    "breadcrumbs_ties": breadcrumbs_ties_of,
    "sce": sce_of,
    "arcee_fusion": arcee_of,
    "emr": emr_of,
    "consensus_ta": consensus_of,
    "lm_cocktail": cocktail_of,
    "layer_average": average_of,
}


@pytest.mark.parametrize("name", ORACLES)
def test_as_defined(name: str, tmp_path: Path) -> None:
    (check,) = (c for c in method_checks(name, oracle=ORACLES[name]) if c.name == "oracle")
    check(tmp_path)


# on their own


def sparse(count: int, spread: float = 1.0) -> tuple[Any, list[Any]]:
    """Models that leave half of the elements as they were."""
    base, models = drawn(count, spread)
    rng = np.random.default_rng(4)
    return base, [np.where(rng.random(SHAPE) < 0.5, m, base) for m in models]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dialect", ["mergekit", "paper"])
def test_ramplus(count: int, dialect: str) -> None:
    base, models = sparse(count)
    wide = np.stack(models).astype(np.float64)
    wanted = ramplus_of(wide, base.astype(np.float64), dialect=dialect)
    close(merged(get_method("ramplus_tl"), models, base, dialect=dialect), wanted, base)


def test_ramplus_counts_over_the_model_in_the_paper() -> None:
    """Two tensors, of which only one has an overlap."""
    base = {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)}
    one = {"a": np.array([1, 1, 0, 0], np.float32), "b": np.array([1, 0, 0, 0], np.float32)}
    two = {"a": np.array([1, 0, 1, 0], np.float32), "b": np.array([0, 1, 0, 0], np.float32)}
    by_tensor = stockpot.methods.ramplus_tl([one, two], base=base, r=1.0, alpha=1.0)
    assert by_tensor["b"].tolist() == [1, 1, 0, 0]
    over_all = stockpot.methods.ramplus_tl([one, two], base=base, r=1.0, alpha=1.0, dialect="paper")
    assert over_all["b"].tolist() == [1.5, 1.5, 0, 0]


@pytest.mark.parametrize("density", [1.0, 0.35])
@pytest.mark.parametrize("power", [0.5, 1.0, 0.7])
def test_ota(density: float, power: float) -> None:
    base, models = drawn(3, 0.1)
    rng = np.random.default_rng(5)
    moments = [(rng.random(SHAPE) ** 4 * 1e-8).astype(np.float32) for _ in models]
    delta = np.stack(models).astype(np.float64) - base
    v = np.stack(moments).astype(np.float64)
    score = (v * delta**2).astype(np.float32)
    kept = np.ones(delta.shape, bool)
    if density < 1:
        keep = int(density * base.size)
        kept = np.stack([s >= np.sort(s.ravel())[s.size - keep] for s in score])
    weight = v**power * kept
    total = weight.sum(0)
    wanted = base + (weight * delta).sum(0) / np.where(total > 0, total, 1)
    import torch

    got = merged(
        get_method("ota"),
        models,
        base,
        density=density,
        power=power,
        moment=[{"w": torch.from_numpy(m)} for m in moments],
    )
    close(got, wanted, base)
    assert (got == base)[~kept.any(0)].all()


@pytest.mark.parametrize("dialect", ["vision", "text"])
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_pcb(dialect: str, density: float) -> None:
    base, models = drawn(3, 0.5)
    delta = (np.stack(models) - base).astype(np.float64).reshape(3, -1)
    n, d = delta.shape
    clip = 0.01 if dialect == "vision" else 1e-4
    size = np.abs(delta)
    ordered = np.sort(size, axis=1)
    size = np.clip(size, ordered[:, [int(d * clip)]], ordered[:, [int(d * (1 - clip)) - 1]])
    share = (size - size.min(1, keepdims=True)) / (size.max(1, keepdims=True) - size.min(1, keepdims=True))
    signed = np.sign(delta) * share
    across = (
        np.stack([sum(np.tanh(signed[i] * signed[j]) for j in range(n)) for i in range(n)])
        if dialect == "vision"
        else np.tanh(delta * delta.sum(0))
    )
    beta = np.exp(n * share**2) * across
    least = np.sort(beta, axis=1)[:, [int(d * (1 - density))]]
    scale = np.clip(beta, least, None)
    scale = (scale - least) / (scale.max(1, keepdims=True) - least)
    wanted = (np.sign(delta) * size * scale).sum(0) / np.maximum(scale.sum(0), 1e-12)
    got = merged(get_method("pcb"), models, base, dialect=dialect, density=density, scale=1.0).astype(np.float64) - base
    settled = scale.sum(0) > 1e-4  # next to the cutoff the ratio of two small numbers says nothing
    assert np.abs(got.reshape(-1) - wanted)[settled].max() <= 2e-3 * np.abs(wanted).max()
    assert (np.abs(got.reshape(-1)) > 0).mean() == pytest.approx((scale.sum(0) > 0).mean(), abs=2e-3)


def test_consensus_ties_takes_ties_of_the_whole_model() -> None:
    base, models = drawn(3, 0.5)
    delta = np.stack(models).astype(np.float64) - base
    kept = []
    for x in delta:
        size = np.abs(x).astype(np.float32)
        keep = int(0.3 * x.size)
        kept.append(x * (size >= np.sort(size.ravel())[x.size - keep]))
    trimmed = np.stack(kept)
    sign = np.sign(trimmed.sum(0))
    whole = (trimmed * (np.sign(trimmed) == sign)).sum(0)
    votes = sum(np.abs(x) > 0.5 * np.abs(whole - x) for x in delta)
    got = merged(get_method("consensus_ties"), models, base, density=0.3, threshold=0.5, k=2)
    close(got, base + whole * (votes >= 2), base)


def test_masks_shrink_as_the_threshold_grows() -> None:
    _, models = drawn(3, 1.0)
    delta = np.stack(models)
    before = np.ones(delta.shape, bool)
    for threshold in (0.0, 0.2, 0.6, 1.0, 3.0):
        masks = tall_masks(delta, delta.sum(0), (threshold,) * 3)
        assert not (masks & ~before).any()
        before = masks
    assert tall_masks(delta[:1], delta[0], (0.4,)).all()  # of one task all that it changes


# DELLA


def test_ranks_and_probabilities() -> None:
    rows = np.array([[0.1, 0.4, 0.3, 0.2], [2, 2, 1, 0]], np.float32)
    assert row_ranks(rows).tolist() == [[0, 3, 2, 1], [2, 3, 1, 0]]  # equal ones by their place
    keep = magprune_probabilities(np.array([[[0.1, -0.4, 0.3, -0.2]]]), (0.5,), (0.2,))
    assert keep[0, 0] == pytest.approx([0.3, 0.7, 0.566667, 0.433333], abs=1e-6)
    assert magprune_probabilities(np.ones((1, 5, 1)), (0.5,), (0.2,)).tolist() == [[[0.5]] * 5]
    rng = np.random.default_rng(0)
    many = magprune_probabilities(rng.standard_normal((2, 7, 100)), (0.4, 1.0), (0.3, 0.15))
    assert many[0].mean() == pytest.approx(0.4)
    assert many[0].min() == pytest.approx(0.1)
    assert many[0].max() == pytest.approx(0.7)
    assert (many[1] == 1).all()


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_is_the_delta_on_average(name: str) -> None:
    """`paper` divides each survivor by its own probability; `mergekit` restores the L1 norm, which favours large ones."""
    base = np.zeros((1, 4), np.float32)
    model = np.array([[0.1, -0.4, 0.3, 0.2]], np.float32)
    runs = 4000
    total = np.zeros(4)
    for seed in range(runs):
        got = get_method(name)([{"w": model}], base={"w": base}, seed=seed, density=0.5, epsilon=0.2)
        total += got["w"][0]
    chance = np.array([0.3, 0.7, 0.566667, 0.433333])
    spread = np.abs(model[0]) * np.sqrt((1 - chance) / chance / runs)
    assert (np.abs(total / runs - model[0]) < 4 * spread).all()


def test_della_of_mergekit_keeps_the_norm() -> None:
    base, (model,) = drawn(1, 0.1)
    got = merged(get_method("della_linear"), [model], base, density=0.5, dialect="mergekit") - base
    assert np.abs(got).sum() == pytest.approx(np.abs(model - base).sum(), rel=1e-4)
    dropped = (got == 0).mean()
    assert 0.45 < dropped < 0.55
    plain = merged(get_method("della_linear"), [model], base, density=0.5, rescale=False) - base
    kept = plain != 0
    assert np.abs(plain - (model - base))[kept].max() < 1e-6


@pytest.mark.parametrize(("density", "epsilon", "most"), [(0.1, 0.15, "0.1"), (0.9, 0.15, "0.1"), (0.5, 0.6, "0.5")])
def test_della_says_which_epsilon_goes(density: float, epsilon: float, most: str) -> None:
    base, models = drawn(2, 0.1)
    with pytest.raises(stockpot.StockpotError, match=f"set epsilon to less than {most}"):
        merged(get_method("della"), models, base, density=density, epsilon=epsilon)
    merged(get_method("della"), models, base, density=density, epsilon=float(most) * 0.99)


# rows at once are what one vector by itself is


def grams(count: int, pairs: int = 200) -> Any:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((count, pairs, 6)) * rng.choice([1e-9, 1e-3, 1.0], (1, pairs, 1))
    x[1, :20] = x[0, :20] * (1 + 1e-5 * rng.standard_normal((20, 1)))
    x[1, 20:40] = -x[0, 20:40]
    x[0, 40:50] = 0
    x[:, 50:55] = 0
    return np.einsum("ipn,jpn->ijp", x, x)


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_arcs_of_rows(guarded: bool, t: float) -> None:
    gram = grams(2)
    a, b = arcs(gram, t, guarded)
    dialect = "stockpot" if guarded else "mergekit"
    c, d = nuslerp_arcs(gram, (1 - t, t), dialect)
    for p in range(gram.shape[2]):
        assert (a[p], b[p]) == slerp_weights(gram[..., p], t, guarded)
        assert (c[p], d[p]) == nuslerp_weights(gram[..., p], (1 - t, t), dialect)


@pytest.mark.parametrize("clamped", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_shares_of_rows(clamped: bool, count: int) -> None:
    gram = grams(count)
    found = stock_shares(gram, clamped)
    for p in range(gram.shape[2]):
        assert found[p] == pytest.approx(stock_share(gram[..., p], clamped), rel=1e-12, abs=1e-300)


def test_divergence_is_exact_where_the_definition_cancels() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((3, 64)) * 0.02
    small = np.stack((base, base + rng.standard_normal((3, 64)) * 1e-6))
    found = divergence(small, "stockpot")[:, 0]
    d = small[1] - small[0]
    q = np.exp(base) / np.exp(base).sum(-1, keepdims=True)
    variance = (q * d * d).sum(-1) - (q * d).sum(-1) ** 2
    assert found == pytest.approx(variance / 2, rel=1e-4)  # the second order, all there is at this size
    apart = np.stack((base, base + np.eye(3, 64) * 200.0))
    p = np.exp(apart[1] - apart[1].max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    assert divergence(apart, "stockpot")[:, 0] == pytest.approx(
        (p * np.log(np.maximum(p, 1e-300) / q)).sum(-1), rel=1e-9
    )


def test_slerp_over_layers_and_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    names = {f"model.layers.{i}.{x}.weight": (5, 4) for i in range(2) for x in "ab"}
    one, two = ({n: rng.standard_normal(s).astype(np.float32) for n, s in names.items()} for _ in range(2))
    method = get_method("slerp")
    by_layer = method([one, two], t=0.4, over="layer")
    for i in range(2):
        mine = [n for n in names if f".{i}." in n]
        x, y = (np.concatenate([m[n].ravel() for n in mine]).astype(np.float64) for m in (one, two))
        a, b = slerp_weights([[x @ x, x @ y], [x @ y, y @ y]], 0.4)
        for n in mine:
            assert by_layer[n] == pytest.approx(a * one[n] + b * two[n], abs=1e-6)
    by_row = method([one, two], t=0.4, over="row")
    for n in names:
        for x, y, z in zip(one[n], two[n], by_row[n]):
            x, y = x.astype(np.float64), y.astype(np.float64)
            a, b = slerp_weights([[x @ x, x @ y], [x @ y, y @ y]], 0.4)
            assert z == pytest.approx(a * x + b * y, abs=1e-6)
