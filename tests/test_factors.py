"""Methods on factors: module by module, several tensors from one computation, for adapters that differ in rank and modules."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

import stockpot
from stockpot.errors import MethodError, MismatchError, NonfiniteError, RecipeError, StockpotError
from stockpot.methods import Cost, Example, Extremes, Factors, PerLayer, PerModel, Real, Scope, Space, Whole, method
from stockpot.methods.declaration import _REGISTRY
from stockpot.testing import method_checks, run_checks
from stockpot.testing.models import read_model, write_model

PREFIX = "base_model.model."
SHAPES = {f"model.layers.{i}.{kind}": (20, 16) for i in range(4) for kind in ("q_proj", "v_proj")} | {"big": (900, 700)}


def adapter(
    folder: Path,
    seed: int,
    rank: int,
    alpha: float,
    modules: Sequence[str] = tuple(SHAPES),
    *,
    head: bool = False,
    **config: Any,
) -> Path:
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for module in modules:
        out, inner = SHAPES[module]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = rng.normal(size=(rank, inner)).astype(np.float32)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = rng.normal(size=(out, rank)).astype(np.float32)
        if config.get("lora_bias"):
            tensors[f"{PREFIX}{module}.lora_B.bias"] = rng.normal(size=out).astype(np.float32)
    if head:
        tensors[f"{PREFIX}score.modules_to_save.weight"] = rng.normal(size=(3, 16)).astype(np.float32)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "v_proj", "big"],
        **config,
    }
    write_model(str(folder), tensors, "F32", adapter=config)
    return folder


def deltas(folder: Path) -> dict[str, Any]:
    """Dense float64 changes by module, scale included, from the files alone."""
    config = stockpot.open_checkpoint(folder).config
    tensors = read_model(str(folder))
    modules = {n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")}
    out = {}
    for module in modules:
        a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        rank, alpha = len(a), config["lora_alpha"]
        for pattern, own in (config.get("alpha_pattern") or {}).items():
            alpha = own if pattern.replace("\\", "") == module else alpha
        out[module] = alpha / rank * b @ a
    return out


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters of different ranks and scales."""
    return [adapter(tmp_path / f"a{i}", i, r, alpha) for i, (r, alpha) in enumerate(((2, 4), (3, 5.0), (5, 5)))]


def merged(tmp_path: Path, paths: Sequence[Path], name: str = "out", **recipe: Any) -> dict[str, Any]:
    weights = recipe.pop("weights", None)
    models: list[Any] = [str(p) for p in paths]
    if weights:
        models = [{"model": p, "parameters": {"weight": w}} for p, w in zip(models, weights)]
    stockpot.merge({"merge_method": "product", "models": models, **recipe}, tmp_path / name, overwrite=True)
    stockpot.verify(tmp_path / name)
    return deltas(tmp_path / name)


def close(got: dict[str, Any], want: dict[str, Any]) -> bool:
    return got.keys() == want.keys() and all(np.allclose(got[m], want[m], rtol=0, atol=2e-5) for m in want)


def test_adapters_of_different_ranks(three: list[Path], tmp_path: Path) -> None:
    """One in `adapter: product` and as a method of its own; weights of any sign, as they are or as shares."""
    each = [deltas(p) for p in three]
    got = merged(tmp_path, three, weights=[0.5, -1.0, 2.0], parameters={"normalize": False})
    assert close(got, {m: 0.5 * each[0][m] - each[1][m] + 2 * each[2][m] for m in SHAPES})
    shares = merged(tmp_path, three, weights=[1, 1, 2])
    assert close(shares, {m: (each[0][m] + each[1][m] + 2 * each[2][m]) / 4 for m in SHAPES})
    first = read_model(str(tmp_path / "out"))
    merged(tmp_path, three, name="other", merge_method="linear", adapter="product", weights=[1, 1, 2])
    again = read_model(str(tmp_path / "other"))
    assert all(np.array_equal(first[n], again[n]) for n in first)


def test_settings_by_layer_and_module(three: list[Path], tmp_path: Path) -> None:
    """Gradients, filters and rules reach modules as they reach tensors."""
    each = [deltas(p) for p in three]
    gradient = merged(tmp_path, three[:1], parameters={"weight": [0.0, 3.0], "normalize": False})
    assert close(gradient, {m: each[0][m] * (int(m.split(".")[2]) if "layers" in m else 0) for m in SHAPES})
    recipe = {
        "parameters": {"normalize": False, "weight": [{"filter": "q_proj", "value": 2.0}, {"value": 0.5}]},
        "rules": [
            {"match": "*layers.3.v_proj*", "parameters": {"weight": -1.0}},
            {"match": "*big*", "merge_method": "product_svd", "parameters": {"rank": 1, "weight": 1.0}},
        ],
    }
    got = merged(tmp_path, three, **recipe)
    total = {m: sum(d[m] for d in each) for m in SHAPES}
    want = {m: total[m] * (2.0 if "q_proj" in m else 0.5) for m in SHAPES}
    want["model.layers.3.v_proj"] = -total["model.layers.3.v_proj"]
    u, s, vt = np.linalg.svd(total["big"])
    want["big"] = s[0] * np.outer(u[:, 0], vt[0])
    assert close(got, want)
    lineage = stockpot.verify(tmp_path / "out")
    report = lineage["adapter"]
    assert list(report["modules"]) == ["big"]
    assert report["modules"]["big"] == pytest.approx(np.linalg.norm(s[1:]) / np.linalg.norm(s), rel=1e-6)
    rows = {
        r["method"]: r
        for r in stockpot.plan(recipe | {"merge_method": "product", "models": [str(p) for p in three]}).group_rows()
    }
    assert rows["product_svd"]["tensors"] == 2
    assert rows["product_svd"]["reproducible"] == "machine"


def test_modules_that_only_some_adapt(tmp_path: Path) -> None:
    some = [m for m in SHAPES if m != "big" and "layers.3" not in m]
    a, b = adapter(tmp_path / "a", 0, 2, 4), adapter(tmp_path / "b", 1, 3, 3, some)
    with pytest.raises(MismatchError, match=r"adapt different modules: big, .*'absent: zero' takes that for no change"):
        merged(tmp_path, [a, b])
    one, two = deltas(a), deltas(b)
    zero = merged(tmp_path, [a, b], weights=[1, 3], absent="zero")
    assert close(zero, {m: (one[m] + 3 * two.get(m, 0)) / 4 for m in SHAPES})
    skip = merged(tmp_path, [b, a], weights=[3, 1], absent="skip")
    assert close(skip, {m: (one[m] + 3 * two[m]) / 4 if m in two else one[m] for m in SHAPES})
    notes = stockpot.plan({"merge_method": "product", "models": [str(a), str(b)], "absent": "skip"}).notes
    assert any("lacks 3 modules, which are shared among the others: model.layers.3.q_proj" in n for n in notes), notes


def test_what_lies_beside_factors(tmp_path: Path) -> None:
    """A head saved whole: the mean, by the same weights; rules and excludes are for it too."""
    a, b = adapter(tmp_path / "a", 0, 2, 4, head=True), adapter(tmp_path / "b", 1, 3, 3, head=True)
    name = PREFIX + "score.modules_to_save.weight"
    one, two = read_model(str(a))[name], read_model(str(b))[name]
    merged(tmp_path, [a, b], weights=[1, 3])
    assert np.allclose(read_model(str(tmp_path / "out"))[name], (one + 3 * two) / 4, atol=1e-6)
    merged(tmp_path, [a, b], exclude=["*score*"])
    assert np.array_equal(read_model(str(tmp_path / "out"))[name], two)  # config and the rest are the last one's


def test_excluded_modules_are_the_first_ones(three: list[Path], tmp_path: Path) -> None:
    each = [deltas(p) for p in three]
    got = merged(tmp_path, three, exclude=["*layers.1.q_proj*"])
    want = {m: sum(d[m] for d in each) / 3 for m in SHAPES} | {
        "model.layers.1.q_proj": each[0]["model.layers.1.q_proj"]
    }
    assert close(got, want)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "half a module by a rule": ({"rules": [{"match": "*0.q_proj.lora_A*", "parameters": {"weight": 2.0}}]},
                                r"are one module's: a pattern must match both or neither \(\*model.layers.0.q_proj\*\)"),
    "half a module excluded": ({"exclude": ["*0.q_proj.lora_B*"]}, "are one module's: include or exclude both"),
    "a base": ({"base_model": "{0}"}, "product over adapters takes no base_model"),
    "slices": ({"models": None, "slices": [{"sources": [{"model": "{0}", "layer_range": [0, 2]}]}]}, "goes with models or run"),
    "a method on tensors by a rule": (
        {"rules": [{"match": "*big*", "merge_method": "linear"}]},
        "rules: linear works on tensors, product on modules such as 'big'"),
    "factors by a rule of tensors": (
        {"merge_method": "linear", "rules": [{"match": "*big*", "merge_method": "product"}]},
        "rules: product combines modules of adapters: it goes with a merge_method that does too"),
    "an unknown parameter": ({"parameters": {"rnak": 3}}, "product has no parameter 'rnak'"),
    "no rank": ({"merge_method": "product_svd"}, "product_svd needs the parameter 'rank'"),
    "rank 0": ({"merge_method": "product_svd", "parameters": {"rank": 0}}, "rank: expected a whole number of at least 1"),
    "weights that vanish": ({"parameters": {"weight": 0.0}}, r"weights \[0.0, 0.0, 0.0\] sum to zero"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, three: list[Path], tmp_path: Path) -> None:
    changes, message = REFUSED[what]
    recipe = {"merge_method": "product", "models": [str(p) for p in three], **changes}
    text = str(recipe).replace("{0}", str(three[0]))
    recipe = {k: v for k, v in eval(text).items() if v is not None}
    with pytest.raises(StockpotError, match=message):
        stockpot.plan(recipe)


def test_full_models_are_no_adapters(three: list[Path], tmp_path: Path) -> None:
    full = write_model(str(tmp_path / "full"), {"w": np.ones((3, 3))})
    with pytest.raises(
        StockpotError, match="full: a full model; expected a LoRA adapter, whose factors the method combines"
    ):
        stockpot.plan({"merge_method": "product", "models": [full]})
    with pytest.raises(StockpotError, match="adapters and full models can't be mixed"):
        stockpot.plan({"merge_method": "product", "models": [full, str(three[0])]})
    with pytest.raises(stockpot.StockpotError, match=r"combines the factors of adapters.*product\.function"):
        stockpot.methods.product([{"w": np.ones((3, 3))}])


def test_too_few_adapters_left(own: None, tmp_path: Path) -> None:
    """A method that takes two adapters, and a module that only one has: named, at the recipe's line."""

    @method(space=Space.FACTORS, models=(2, 2), ranks=lambda ranks, sides, params: ranks[0])
    def pair(factors: Any) -> Factors:
        """The first of two."""
        one: Factors = factors[0]
        return one

    a, b = adapter(tmp_path / "a", 0, 2, 4), adapter(tmp_path / "b", 1, 2, 4, [m for m in SHAPES if m != "big"])
    text = f"merge_method: pair\nabsent: skip\nmodels: [{a}, {b}]\n"
    with pytest.raises(
        RecipeError, match=r":3: 'big', which not all adapters have \(absent: skip\): pair takes 2 models, got 1"
    ):
        stockpot.plan(text)
    stockpot.plan(text.replace("skip", "zero"))


# a method of one's own

CALLS: list[tuple[int, ...]] = []
LOCK = threading.Lock()


@pytest.fixture
def own() -> Iterator[None]:
    before = dict(_REGISTRY)
    CALLS.clear()

    @method(
        space=Space.FACTORS,
        models=(1, None),
        ranks=lambda ranks, sides, params: max(ranks),
        examples=(
            Example(
                [
                    (1.0, [[1, 0]], [[2], [0]]),
                    (
                        1.0,
                        [
                            [
                                5,
                                5,
                            ][:2]
                        ],
                        [[1], [1]],
                    ),
                ],
                [[2, 0], [0, 0]],
                source="the first",
            ),
        ),
        ordered=True,
        neutral={},
    )
    def first_padded(
        factors: Any, *, weight: Annotated[PerModel, Real()] = 1.0, gain: Annotated[PerLayer, Real()] = 1.0
    ) -> Factors:
        """The first adapter, padded with zeros to the largest rank.

        weight  [m], not used
        gain    of the layer
        """
        with LOCK:
            CALLS.append(tuple(f.rank for f in factors))
        one, most = factors[0], max(f.rank for f in factors)
        a, b = np.zeros((most, one.a.shape[1])), np.zeros((len(one.b), most))
        a[: one.rank], b[:, : one.rank] = one.a, one.b
        return Factors(a, b * gain, one.scale)

    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


def test_one_computation_writes_both_factors(own: None, three: list[Path], tmp_path: Path) -> None:
    """Once for each module, whatever the number of threads, and with the scale that the function returns."""
    for threads in (1, 4):
        CALLS.clear()
        recipe = {
            "merge_method": "first_padded",
            "models": [str(p) for p in three],
            "parameters": {"gain": [1, 2, 3, 4]},
        }
        stockpot.merge(recipe, tmp_path / f"out{threads}", stockpot.Options(threads=threads))
        assert [(2, 3, 5)] * len(SHAPES) == CALLS
        got, first = deltas(tmp_path / f"out{threads}"), deltas(three[0])
        assert close(got, {m: first[m] * (int(m.split(".")[2]) + 1 if "layers" in m else 1) for m in SHAPES})
        assert stockpot.open_checkpoint(tmp_path / f"out{threads}").config["r"] == 5


def test_its_suite(own: None) -> None:
    run_checks(method_checks("first_padded"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: Factors(a[:1], b), "returned factors of"),
        (lambda a, b: Factors(a, b[:1]), "returned factors of"),
    ],
)
def test_factors_of_another_shape(change: Any, message: str, own: None, three: list[Path], tmp_path: Path) -> None:
    @method(space=Space.FACTORS, ranks=lambda ranks, sides, params: ranks[0])
    def odd(factors: Any) -> Factors:
        """Wrong."""
        made: Factors = change(factors[0].a, factors[0].b)
        return made

    with pytest.raises(MethodError, match=message):
        stockpot.merge({"merge_method": "odd", "models": [str(three[0])]}, tmp_path / "out")
    with pytest.raises(AssertionError, match="ranks= said rank"):
        run_checks(method_checks("odd"))


def test_biases_are_not_lost(own: None, tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 0, 2, 4, lora_bias=True)
    merged(tmp_path, [path])
    name = f"{PREFIX}big.lora_B.bias"
    assert np.allclose(read_model(str(tmp_path / "out"))[name], 2 * read_model(str(path))[name], atol=1e-6)
    with pytest.raises(MismatchError, match=r"first_padded: combines no biases of B .* use product"):
        merged(tmp_path, [path], name="lost", merge_method="first_padded")


DECLARED: dict[str, tuple[dict[str, Any], str]] = {
    "no rank": ({"ranks": None}, "needs ranks="),
    "statistics": ({"stats": (Extremes(),)}, "stats= is of blocks"),
    "a scope": ({"scope": Scope.ROW}, "scope= is of blocks"),
    "roles": ({"applies": ("matrix",), "otherwise": "mean"}, "applies= is of blocks"),
    "a base": ({"base_role": "first"}, "there is no base"),
    "ranks of tensors": ({"space": Space.WEIGHT}, "ranks= goes with Space.FACTORS"),
}  # fmt: skip


@pytest.mark.parametrize("what", DECLARED)
def test_declarations_that_can_not_be_kept(what: str, own: None) -> None:
    changes, message = DECLARED[what]
    declared: dict[str, Any] = {"space": Space.FACTORS, "ranks": lambda *a: 1, **changes}

    def wrong(factors: Any) -> Any:
        """Wrong."""

    def wrong_extremes(factors: Any, *, extremes: Any) -> Any:
        """Wrong."""

    with pytest.raises(TypeError, match=message):
        method(**declared)(wrong_extremes if what == "statistics" else wrong)


def test_a_run_of_adapters_of_one_rank(lora_run: Path, tmp_path: Path) -> None:
    """The heart's own weights, as a product of a given rank, equal to what `soup --adapter product --rank` writes."""
    spec = {"path": str(lora_run), "last": 3, "by": "loss"}
    stockpot.merge({"merge_method": "product_svd", "run": spec, "parameters": {"rank": 4}}, tmp_path / "a")
    stockpot.soup(lora_run, tmp_path / "b", stockpot.SoupSpec(last=3, by="loss"), adapter="product", rank=4)
    one, two = read_model(str(tmp_path / "a")), read_model(str(tmp_path / "b"))
    assert all(np.array_equal(one[n], two[n]) for n in one)
    with pytest.raises(RecipeError, match="whole number"):
        stockpot.plan({"merge_method": "product_svd", "run": spec, "parameters": {"rank": 2.5}})


def test_whole_numbers_are_whole() -> None:
    assert Whole(1).check(0)


@pytest.mark.parametrize("scope", [Scope.ELEMENT, Scope.ROW, Scope.TENSOR])
def test_a_method_of_ones_own_that_fails_is_named(scope: Scope, own: None, tmp_path: Path) -> None:
    """With the tensor, what it raised, and where; a built-in one's exception stays what it is."""

    @method(space=Space.WEIGHT, scope=scope, cost=Cost(lambda m, shape, size: 0) if scope is Scope.TENSOR else None)
    def breaks(models: Any) -> Any:
        """Wrong."""
        return models[0] if models.size % 4 else models[7]

    for name, width in (("good", 3), ("bad", 4)):
        write_model(str(tmp_path / name), {"w.one": np.ones((5, width))})
    recipe = {"merge_method": "breaks", "models": [str(tmp_path / "good")]}
    stockpot.merge(recipe, tmp_path / "out")
    with pytest.raises(
        MethodError, match=r"w\.one: method 'breaks' failed: IndexError: .*test_factors\.py:\d+\)"
    ) as caught:
        stockpot.merge({**recipe, "models": [str(tmp_path / "bad")]}, tmp_path / "other")
    assert isinstance(caught.value.__cause__, IndexError)
    assert not (tmp_path / "other").exists()


def test_a_scale_that_is_returned_holds_for_the_bias_too(own: None, tmp_path: Path) -> None:
    @method(space=Space.FACTORS, ranks=lambda ranks, sides, params: ranks[0])
    def thrice(factors: Any) -> Factors:
        """Three times the first."""
        one = factors[0]
        return Factors(one.a, one.b, 3 * one.scale, one.scale * one.bias)

    path = adapter(tmp_path / "a", 0, 2, 4, lora_bias=True)
    got = merged(tmp_path, [path], merge_method="thrice")
    assert close(got, {m: 3 * d for m, d in deltas(path).items()})
    name = f"{PREFIX}big.lora_B.bias"
    assert np.allclose(read_model(str(tmp_path / "out"))[name], 6 * 2 * read_model(str(path))[name], atol=1e-5)


def test_memory_of_products_is_planned(tmp_path: Path) -> None:
    """Ten adapters of rank 64: what a merge takes stays within what the plan says, and more is planned for more of them."""
    from stockpot.testing.methods import _high_water, _resident_and_reset

    rng = np.random.default_rng(0)
    paths = []
    for i in range(10):
        tensors = {f"{PREFIX}m{k}.lora_{s}.weight": rng.normal(size=shape) for k in range(6)
                   for s, shape in (("A", (64, 3000)), ("B", (2000, 64)))}  # fmt: skip
        config = {"peft_type": "LORA", "r": 64, "lora_alpha": 64, "target_modules": ["m0"]}
        paths.append(write_model(str(tmp_path / f"a{i}"), tensors, "F32", adapter=config))
    recipe = {"merge_method": "product_svd", "models": paths, "parameters": {"rank": 16}}
    options = stockpot.Options(threads=1, max_memory="2GiB")
    stockpot.merge({**recipe, "models": paths[:1]}, tmp_path / "first", options)
    planned = stockpot.plan(recipe, options)
    before = _resident_and_reset()
    stockpot.merge(recipe, tmp_path / "out", options)
    after = _high_water()
    assert before is not None
    assert after is not None
    assert after - before <= planned.budget.peak
    assert planned.budget.peak - stockpot.plan({**recipe, "models": paths[:2]}, options).budget.peak > 50 * 2**20


def test_peft_loads_all_that_came_of_different_modules(tmp_path: Path, tiny_llama: Path) -> None:
    """The config names every module of the output, whoever's it was; PEFT would leave out the others without a word."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    paths, full = [], []
    for i, targets in enumerate((["q_proj", "v_proj"], ["q_proj"])):
        torch.manual_seed(i)
        peft = get_peft_model(model(), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        for name, p in peft.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.3)
        peft.save_pretrained(str(tmp_path / f"a{i}"))
        paths.append(str(tmp_path / f"a{i}"))
        full.append(peft.merge_and_unload().state_dict())
    base = model().state_dict()
    for how, models in (("product", paths), ("product", paths[::-1]), ("linear", paths[::-1])):
        recipe = {"merge_method": how, "models": models, "absent": "zero"}
        stockpot.merge(recipe, tmp_path / "out", overwrite=True)
        loaded = PeftModel.from_pretrained(model(), str(tmp_path / "out"))
        wanted = set(stockpot.open_checkpoint(tmp_path / "out").names())
        assert {n.replace(".default", "") for n in loaded.state_dict() if "lora_" in n} == wanted
        found = loaded.merge_and_unload().state_dict()
        if how == "product":
            for name in base:
                want = (full[0][name] + full[1][name]) / 2
                assert torch.allclose(found[name], want, atol=1e-5), name


def test_nan_in_a_factor_is_found(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 0, 2, 4)
    tensors = read_model(str(path))
    tensors[f"{PREFIX}big.lora_B.weight"][3, 1] = np.nan
    write_model(str(path), tensors, "F32", adapter=stockpot.open_checkpoint(path).config)
    recipe = {"merge_method": "product_svd", "models": [str(path)], "parameters": {"rank": 1}}
    with pytest.raises(NonfiniteError, match="big"):
        stockpot.merge(recipe, tmp_path / "out")


def test_what_a_step_loses_is_recorded(three: list[Path], tmp_path: Path) -> None:
    first = {"name": "one", "merge_method": "product_svd", "models": [str(p) for p in three], "parameters": {"rank": 1}}
    result = stockpot.merge({"steps": [first, {"merge_method": "linear", "models": ["one"]}]}, tmp_path / "out")
    assert result.lineage["steps"][0]["adapter"]["relative_error"] > 0.1
