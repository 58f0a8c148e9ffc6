"""merge_modules: modules of torch and state dicts in memory, with and without gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import stockpot


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    made(torch.randn(16, 6, dtype=dtype))  # running statistics of its own
    return made


@pytest.fixture
def three() -> list[nn.Sequential]:
    return [network(i) for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_modules(dtype: torch.dtype) -> None:
    a, b, base = (network(i, dtype) for i in range(3))
    before = {n: v.clone() for n, v in base.state_dict().items()}
    merged = stockpot.merge_modules([a, b], "ties", base=base, density=0.5)
    assert type(merged) is nn.Sequential
    assert merged is not base
    wanted = stockpot.methods.ties([a.state_dict(), b.state_dict()], base=base.state_dict(), density=0.5)
    for name, value in merged.state_dict().items():
        assert torch.equal(value, wanted[name])
        assert value.dtype == before[name].dtype
    assert all(torch.equal(v, before[n]) for n, v in base.state_dict().items())
    assert merged(torch.randn(4, 6, dtype=dtype)).shape == (4, 3)
    assert all(p.requires_grad for p in merged.parameters())


def test_counters_are_the_first_ones(three: list[nn.Sequential]) -> None:
    three[1](torch.randn(9, 6))
    merged = stockpot.merge_modules(three[:2])
    assert merged[1].num_batches_tracked == 1
    assert torch.allclose(merged[1].running_mean, (three[0][1].running_mean + three[1][1].running_mean) / 2)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    merged = stockpot.merge_modules([Tied(0), Tied(1)], "karcher")
    assert merged.head.weight is merged.embed.weight


def parameters(model: nn.Module) -> dict[str, Any]:
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_gradients_reach_the_weights(method: str, three: list[nn.Sequential]) -> None:
    """As learned coefficients need it: the slope is that of finite differences."""
    *models, base = (parameters(m.double()) for m in three)
    x = torch.randn(5, 6, dtype=torch.float64)

    def loss(weight: Any) -> Any:
        more = {"base": base} if method == "task_arithmetic" else {}
        merged = stockpot.merge_modules(models, method, weight=weight, normalize=False, **more)
        return torch.func.functional_call(three[2].eval(), merged, (x,)).square().sum()

    weight = torch.tensor([0.4, 0.7], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(weight), weight)
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-6
        with torch.no_grad():
            found = (loss((weight + step).tolist()) - loss((weight - step).tolist())) / 2e-6
        assert slope[i] == pytest.approx(float(found), rel=1e-5)
    # the same numbers as without
    plain = stockpot.merge_modules(models, "linear", weight=[0.4, 0.7])
    kept = stockpot.merge_modules(models, "linear", weight=weight)
    assert all(torch.allclose(plain[n], kept[n], rtol=1e-14) for n in plain)


def test_gradients_reach_the_models(three: list[nn.Sequential]) -> None:
    models = [dict(m.named_parameters()) for m in three[:2]]
    merged = stockpot.merge_modules(models, "wise_ft", alpha=0.25)
    sum(v.sum() for v in merged.values()).backward()
    assert torch.allclose(three[0][0].weight.grad, torch.full((8, 6), 0.75))
    assert torch.allclose(three[1][0].weight.grad, torch.full((8, 6), 0.25))
    bent = stockpot.merge_modules([models[0]], "passthrough", scale=torch.tensor(2.0, requires_grad=True))
    assert torch.equal(bent["0.weight"], 2 * three[0][0].weight)


def test_what_can_not_be_done_is_said(three: list[nn.Sequential]) -> None:
    weight = torch.tensor([0.5, 0.5], requires_grad=True)
    dicts = [parameters(m) for m in three]
    with pytest.raises(stockpot.StockpotError, match="functional_call"):
        stockpot.merge_modules(three[:2], "linear", weight=weight)
    with pytest.raises(stockpot.StockpotError, match="ties is no differentiable formula here"):
        stockpot.merge_modules(dicts[:2], "ties", base=dicts[2], weight=weight)
    with pytest.raises(stockpot.StockpotError, match="all of one kind; number 1 is a dict"):
        stockpot.merge_modules([three[0], dicts[1]])
    with pytest.raises(stockpot.StockpotError, match="no models"):
        stockpot.merge_modules([])
    with pytest.raises(stockpot.StockpotError, match="give base="):
        stockpot.merge_modules(dicts[:2], "task_arithmetic", weight=weight)
    with pytest.raises(stockpot.StockpotError, match="did you mean 'ties'"):
        stockpot.merge_modules(three, "tis")
    with pytest.raises(stockpot.StockpotError, match="sum to zero"):
        stockpot.merge_modules(dicts[:2], "linear", weight=torch.tensor([1.0, -1.0], requires_grad=True))
    smaller = {**dicts[1], "0.weight": torch.zeros(2, 2)}
    with pytest.raises(stockpot.StockpotError, match=r"'0.weight' of a model is \[2, 2\], expected \[8, 6\]"):
        stockpot.merge_modules([dicts[0], smaller], weight=weight)
    with pytest.raises(stockpot.StockpotError, match="'more' is in one model only"):
        stockpot.merge_modules([dicts[0], {**dicts[1], "more": torch.ones(1)}], weight=weight)
    # the advice
    merged = stockpot.merge_modules(dicts[:2], "linear", weight=weight)
    torch.func.functional_call(three[0], merged, (torch.randn(4, 6),)).sum().backward()
    assert weight.grad is not None
