"""What every method on factors must do: its own examples, identities, shapes as it said, and a loss that is measured."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stockpot.methods.declaration import Example, Method
from stockpot.methods.factors import Factors
from stockpot.methods.parameters import REQUIRED
from stockpot.testing.models import read_model, write_model

__all__ = ["factor_examples", "factor_tests"]

Array = np.ndarray[Any, Any]


def _drawn(seed: int, rank: int, out: int = 9, inner: int = 13, scale: float = 1.5) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(rng.normal(size=(rank, inner)), rng.normal(size=(out, rank)), scale)


def _dense(f: Factors) -> Array:
    full: Array = f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64))
    return full


def _parameters(method: Method, models: int, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Complete, by keyword: what is given, else the defaults, else what an example sets."""
    out: dict[str, Any] = {}
    for p in method.parameters.values():
        value = (given or {}).get(p.name, p.default_for(None))
        if value is REQUIRED:
            value = next((e.parameters[p.name] for e in method.examples if p.name in e.parameters), REQUIRED)
            assert value is not REQUIRED, f"{method.name}: no example says what the required {p.name!r} may be"
        if p.per_model:
            values = (
                [value[i % len(value)] for i in range(models)] if isinstance(value, (list, tuple)) else [value] * models
            )
            out[p.keyword] = tuple(p.kind.convert(v) for v in values)
        else:
            out[p.keyword] = p.kind.convert(value)
    return out


def _run(method: Method, factors: Sequence[Factors], given: Mapping[str, Any] | None = None) -> Factors:
    """The result, of the rank that was announced, with its inputs as they were."""
    params = _parameters(method, len(factors), given)
    before = [(f.a.copy(), f.b.copy()) for f in factors]
    made: Factors = method.function(list(factors), **params)
    assert method.ranks is not None
    sides = len(factors[0].b), factors[0].a.shape[1]
    rank = method.ranks([f.rank for f in factors], sides, params)
    assert made.a.shape == (rank, sides[1]), f"A is {made.a.shape}, ranks= said rank {rank}"
    assert made.b.shape == (sides[0], rank), f"B is {made.b.shape}, ranks= said rank {rank}"
    for f, (a, b) in zip(factors, before, strict=True):
        assert np.array_equal(f.a, a), "an input was changed"
        assert np.array_equal(f.b, b), "an input was changed"
    assert 0 <= made.lost <= made.whole * (1 + 1e-9), f"lost {made.lost} of {made.whole}"
    return made


def _shapes(method: Method, folder: str) -> None:
    """Of ranks that differ, of none, of one element."""
    for ranks in itertools.product((0, 1, 4), repeat=max(method.models[0], 2)):
        if any(ranks):
            assert np.isfinite(_dense(_run(method, [_drawn(i, r) for i, r in enumerate(ranks)]))).all()
    assert _dense(_run(method, [_drawn(i, 1, 1, 1) for i in range(max(method.models[0], 2))])).shape == (1, 1)


def _one_adapter(method: Method, folder: str) -> None:
    """One alone is itself, with the parameters that its declaration calls neutral."""
    if method.neutral is None or method.models[0] > 1:
        return
    alone = _drawn(3, 4)
    worst = float(np.abs(_dense(_run(method, [alone], method.neutral)) - _dense(alone)).max())
    assert worst <= 1e-9, f"one adapter comes out {worst} off"


def _order(method: Method, folder: str) -> None:
    if method.ordered:
        return
    factors = [_drawn(i, 2 + i) for i in range(max(method.models[0], 3))]
    one, two = _dense(_run(method, factors)), _dense(_run(method, factors[::-1]))
    assert np.allclose(one, two, rtol=0, atol=1e-9), "the order of the adapters matters: declare ordered=True"


def _bias(method: Method, folder: str) -> None:
    """A bias of B that is combined at all is combined like what it stands beside."""
    base = [_drawn(i, 2) for i in range(max(method.models[0], 2))]
    given = [Factors(f.a, f.b, f.scale, np.arange(len(f.b)) + float(i)) for i, f in enumerate(base)]
    made = method.function(given, **_parameters(method, len(given)))
    assert made.bias is None or made.bias.shape == (len(given[0].b),), f"the bias is {np.shape(made.bias)}"


def _merged(method: Method, folder: str) -> None:
    """What a recipe writes is what the function says, for threads of any number and adapters of any rank."""
    import stockpot

    shapes = {"layers.0.q_proj": (24, 40), "layers.1.q_proj": (24, 40), "layers.1.big": (900, 700)}
    paths, factors = [], []
    for i in range(max(method.models[0], 2)):
        rank, alpha = 3 + i, 5.0
        rng = np.random.default_rng(i)
        tensors: dict[str, Array] = {}
        own: dict[str, Factors] = {}
        for module, (rows, inner) in shapes.items():
            a, b = rng.normal(size=(rank, inner)).astype(np.float32), rng.normal(size=(rows, rank)).astype(np.float32)
            prefix = f"base_model.model.{module}"
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
            own[module] = Factors(a, b, alpha / rank)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "big"]}
        path = write_model(os.path.join(folder, f"adapter{i}"), tensors, "F32", adapter=config)
        paths.append(path)
        factors.append(own)
    needed = {p.name: _parameters(method, 1)[p.keyword] for p in method.parameters.values() if p.default is REQUIRED}
    recipe = {"merge_method": method.name, "models": paths, "parameters": needed}
    outputs = []
    for threads in (1, 3):
        out = os.path.join(folder, f"out{threads}")
        stockpot.merge(recipe, out, stockpot.Options(threads=threads))
        stockpot.verify(out)
        outputs.append(read_model(out))
    assert all(np.array_equal(outputs[0][n], outputs[1][n]) for n in outputs[0]), "other bytes with other threads"
    for module in shapes:
        made = _run(method, [own[module] for own in factors], needed)
        a, b = (outputs[0][f"base_model.model.{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        want = _dense(made)
        assert np.allclose(b @ a, want, rtol=0, atol=1e-5 * np.abs(want).max()), (
            f"{module}: not what the function returns"
        )


def factor_tests(method: Method) -> list[tuple[str, Any]]:
    """(name, check) of what must hold beside docstring and pickling."""
    return [
        ("ranks", _shapes), ("one adapter", _one_adapter), ("order of adapters", _order), ("biases", _bias),
        ("as merged", _merged),
    ]  # fmt: skip


def factor_examples(example: Example) -> Any:
    """The check of an example: models are (scale, A, B), what is expected is the product of the result."""

    def check(method: Method, folder: str) -> None:
        factors = [Factors(np.array(a, np.float64), np.array(b, np.float64), s) for s, a, b in example.models]
        found, expected = _dense(_run(method, factors, example.parameters)), np.array(example.expected, np.float64)
        worst = float(np.abs(found - expected).max())
        assert worst <= example.within, f"{method.name}: expected {expected.tolist()}, got {found.tolist()}"

    return check
