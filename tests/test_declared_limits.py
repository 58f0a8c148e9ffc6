"""What methods may declare, and what becomes of odd declarations: refused, or kept end to end, on disk as in memory."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

import stockpot
from stockpot.checkpoints.header import encode_header
from stockpot.engine.native import numpy_only
from stockpot.errors import ArgumentError, NonfiniteError, ProblemsError, RecipeError, StockpotError
from stockpot.methods import (
    Companion,
    Cost,
    Extremes,
    Mask,
    Normal,
    PerModel,
    Quantile,
    Rank,
    Real,
    Scope,
    Space,
    Total,
    Uniform,
    get_method,
    method,
)
from stockpot.methods.arrays import add_rows, column, keep_where, weighted_sum
from stockpot.methods.declaration import _REGISTRY
from stockpot.methods.forms import Form
from stockpot.specs import DType, TensorSpec
from stockpot.testing.models import read_model, state, write_model

SHAPES = {
    "model.embed_tokens.weight": (60, 20),
    "model.layers.0.mlp.weight": (1400, 1000),
    "model.layers.0.bias": (31,),
    "model.layers.1.mlp.weight": (50, 30),
    "model.norm.weight": (97,),
}
COST = Cost(lambda m, shape, size: 4 * m * size * int(np.prod(shape)))


pytestmark = pytest.mark.usefixtures("registry")


@dataclass
class Family:
    """Four float32 models, on disk and in memory; the first is the base."""

    folder: Path
    paths: list[str]
    dicts: list[dict[str, Any]]

    def recipe(self, name: str, n: int = 2, *, base: bool = True, **parameters: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"merge_method": name, "models": self.paths[1 : 1 + n], "parameters": parameters}
        return found | ({"base_model": self.paths[0]} if base else {})

    def everywhere(self, name: str, n: int = 2, *, base: bool = True, **parameters: Any) -> dict[str, Any]:
        """The result, the same from disk (1 and 3 threads, with and without compiled kernels) and in memory."""
        found = [get_method(name)(self.dicts[1 : 1 + n], base=self.dicts[0] if base else None, **parameters)]
        for number, threads in enumerate((1, 3, 1)):
            out = self.folder / f"{name}{number}"
            shutil.rmtree(out, ignore_errors=True)
            options = stockpot.Options(threads=threads, max_memory="1GiB")
            if number == 2:
                with numpy_only():
                    stockpot.merge(self.recipe(name, n, base=base, **parameters), out, options)
            else:
                stockpot.merge(self.recipe(name, n, base=base, **parameters), out, options)
            found.append(read_model(str(out)))
        for other in found[1:]:
            assert set(other) == set(found[0])
            for key in other:
                assert np.array_equal(other[key].astype(np.float32), found[0][key]), key
        return found[0]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("declared")
    base = state(SHAPES, 0)
    models = [base, *({n: base[n] + state(SHAPES, i, 0.004)[n] for n in SHAPES} for i in (1, 2, 3))]
    dicts = [{n: v.astype(np.float32) for n, v in m.items()} for m in models]
    return Family(folder, [write_model(str(folder / f"m{i}"), m, "F32") for i, m in enumerate(dicts)], dicts)


def _square(delta: Any, **_: Any) -> Any:
    return delta.astype(np.float64) ** 2


# what is copied


def test_nan_in_copied_fp8_is_found(tmp_path: Path) -> None:
    """Compiled calls measure no FP8: such tensors take the way that does, copied or not."""
    spec = TensorSpec(DType.F8_E4M3, (40,))
    for name, byte in (("a", b"\x7f"), ("b", b"\x7f"), ("good", b"\x30")):
        (tmp_path / name).mkdir()
        head = encode_header({"f8": (spec, 0), "w": (TensorSpec(DType.F32, (10,)), 40)}, {"format": "pt"})
        (tmp_path / name / "model.safetensors").write_bytes(head + byte * 40 + np.ones(10, "<f4").tobytes())
    linear = {"merge_method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")], "exclude": ["f8"]}
    for recipe in ({"merge_method": "passthrough", "models": [str(tmp_path / "a")]}, linear):
        with pytest.raises(NonfiniteError, match="'f8' in the output: 40 NaN"):
            stockpot.merge(recipe, tmp_path / "out", overwrite=True)
    copied = stockpot.merge({"merge_method": "passthrough", "models": [str(tmp_path / "good")]}, tmp_path / "copied")
    with numpy_only():
        plain = stockpot.merge({"merge_method": "passthrough", "models": [str(tmp_path / "good")]}, tmp_path / "plain")
    assert copied.lineage["output"]["tensors"] == plain.lineage["output"]["tensors"]


@pytest.mark.parametrize("kinds", [("BF16", "F32"), ("F32", "BF16"), ("F16", "BF16")])
def test_the_bases_tensor_keeps_its_meaning_in_another_dtype(kinds: tuple[str, str], tmp_path: Path) -> None:
    @method(space=Space.DELTA, applies=("matrix",), otherwise="base")
    def matrices(delta: Any) -> Any:
        """Mean."""
        return delta.mean(0)

    shapes = {f"model.layers.{i}.{n}": s for i in range(2) for n, s in {"w": (30, 20), "b": (30,)}.items()}
    shapes |= {"model.norm.weight": (96,)}
    base = write_model(str(tmp_path / "base"), state(shapes, 0), kinds[0])
    source = write_model(str(tmp_path / "source"), state(shapes, 1), kinds[1])
    slices = [{"sources": [{"model": source, "layer_range": [0, 2]}]}]
    stockpot.merge({"merge_method": "matrices", "base_model": base, "slices": slices}, tmp_path / "out")
    made, own = read_model(str(tmp_path / "out")), read_model(base)
    for name in made:
        if not name.endswith(".w"):
            np.testing.assert_allclose(made[name], own[name], rtol=2**-7, atol=1e-6)
    wide = write_model(str(tmp_path / "wide"), state({**shapes, "model.norm.weight": (97,)}, 0), kinds[0])
    with pytest.raises(StockpotError, match=r"'model.norm.weight' is \[96\] in .* but \[97\] in "):
        stockpot.plan({"merge_method": "matrices", "base_model": wide, "slices": slices})


def test_every_differing_tensor_is_named_whatever_the_threads(tmp_path: Path) -> None:
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        entries: dict[str, tuple[TensorSpec, int]] = {}
        blobs, at = [], 0
        for i in range(6):
            for name, kind in ((f"model.layers.{i}.ids", "<i8"), (f"model.layers.{i}.w", "<f4")):
                spec = TensorSpec(DType.I64 if kind == "<i8" else DType.F32, (50,))
                entries[name] = (spec, at)
                blobs.append(np.full(50, value if i != 3 or kind == "<f4" else 0, kind).tobytes())
                at += spec.nbytes
        (tmp_path / folder / "model.safetensors").write_bytes(
            encode_header(entries, {"format": "pt"}) + b"".join(blobs)
        )
    recipe = {"merge_method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}
    wanted = [f"model.layers.{i}.ids" for i in (0, 1, 2, 4, 5)]
    for threads in (1, 2, 5):
        told = stockpot.merge(recipe, tmp_path / "out", stockpot.Options(threads=threads), overwrite=True).warnings
        assert sorted(w.split(":")[0] for w in told) == wanted
    with numpy_only():
        told = stockpot.merge(recipe, tmp_path / "out", overwrite=True).warnings
    assert sorted(w.split(":")[0] for w in told) == wanted


# statistics


def test_row_methods_with_statistics_of_tensors(family: Family) -> None:
    @method(
        space=Space.DELTA,
        scope=Scope.ROW,
        stats=(Rank("density"), Quantile("density"), Extremes(), Total("norm", of=_square, over="row")),
    )
    def rows(
        delta: Any, *, cutoff: Any, quantile: Any, extremes: Any, norm: Any,
        density: Annotated[PerModel, Real(0, 1)] = 0.2,
    ) -> Any:  # fmt: skip
        """Every value by its definition."""
        flat = np.abs(delta.reshape(len(delta), -1))
        if flat.shape[1] > 1 and density[0] < 1:
            ordered = np.sort(flat, axis=1)
            keep = max(int(density[0] * flat.shape[1]), 1)
            if flat.shape[1] < 10_000:  # a piece of a larger tensor is not all of it
                assert list(cutoff) == ordered[:, -keep].tolist()
                assert np.allclose(quantile, np.quantile(flat.astype(float), density[0], axis=1), rtol=1e-6)
                assert np.array_equal(extremes[1], delta.reshape(len(delta), -1).max(1))
        assert norm.shape == (*delta.shape[:-1], 1)
        return add_rows(keep_where(delta, abs(delta) >= column(cutoff, delta)))

    family.everywhere("rows", density=0.3)


def test_cutoffs_of_rows_have_the_shape_of_rows_at_any_density(family: Family) -> None:
    @method(space=Space.DELTA, scope=Scope.ROW, stats=(Rank("density", over="row"),))
    def by_rows(delta: Any, *, cutoff: Any, density: Annotated[PerModel, Real(0, 1)] = 0.2) -> Any:
        """Trimmed row by row."""
        assert cutoff.shape == (*delta.shape[:-1], 1)
        return add_rows(keep_where(delta, abs(delta) >= cutoff))

    family.everywhere("by_rows", density=0.5)
    whole = family.everywhere("by_rows", density=1)
    name = "model.norm.weight"
    base, a, b = (d[name] for d in family.dicts[:3])
    assert np.allclose(whole[name], base + (a - base) + (b - base), atol=1e-7)


def test_one_cutoff_of_one_thing_is_one_value(family: Family) -> None:
    def total(delta: Any, **_: Any) -> Any:
        return np.abs(delta).sum(0, keepdims=True)

    @method(space=Space.DELTA, stats=(Rank("density", of=total),))
    def single(delta: Any, *, cutoff: Any, density: Annotated[float, Real(0, 1)] = 0.2) -> Any:
        """Sum."""
        assert len(cutoff) == 1
        return add_rows(delta)

    family.everywhere("single", density=0.3)
    family.everywhere("single", density=1.0)


def test_statistics_over_layers_are_the_same_in_memory(family: Family) -> None:
    @method(space=Space.DELTA, stats=(Total("norm", of=_square, over="layer"),))
    def by_layer(delta: Any, *, norm: Any) -> Any:
        """Deltas over the norm of the layer."""
        return add_rows(delta / column(np.sqrt(norm), delta))

    made = family.everywhere("by_layer")
    deltas = [{n: d[n].astype(float) - family.dicts[0][n] for n in d} for d in family.dicts[1:3]]
    layer = ("model.layers.0.mlp.weight", "model.layers.0.bias")
    norms = [np.sqrt(sum((d[n] ** 2).sum() for n in layer)) for d in deltas]
    wanted = family.dicts[0][layer[1]] + sum(d[layer[1]] / norm for d, norm in zip(deltas, norms, strict=True))
    assert np.allclose(made[layer[1]], wanted, rtol=1e-5)


def test_a_mask_that_comes_of_a_statistic(family: Family) -> None:
    def keep(delta: Any, *, norm: Any, **_: Any) -> Any:
        return np.minimum(np.abs(delta) / np.sqrt(column(norm, delta)) * 30, 1.0)

    @method(space=Space.DELTA, stats=(Total("norm", of=_square),), draws=(Mask(keep),))
    def by_size(delta: Any, *, norm: Any, mask: Any) -> Any:
        """What the mask keeps."""
        assert mask.any()
        assert not mask.all()
        return add_rows(keep_where(delta, mask))

    family.everywhere("by_size")


def test_a_statistic_of_rows_that_uses_a_mask(family: Family) -> None:
    def masked(delta: Any, *, mask: Any, **_: Any) -> Any:
        return keep_where(delta, mask).astype(np.float64) ** 2

    @method(
        space=Space.DELTA, scope=Scope.ROW, stats=(Total("t", of=masked, over="row"),), draws=(Mask("density"),)
    )  # fmt: skip
    def of_kept(delta: Any, *, t: Any, mask: Any, density: Annotated[PerModel, Real(0, 1)] = 0.2) -> Any:
        """Scaled by what the mask keeps."""
        assert np.allclose(t[..., 0], (keep_where(delta, mask).astype(float) ** 2).sum(-1))
        return add_rows(delta * t.astype(delta.dtype))

    family.everywhere("of_kept")


def test_a_mask_of_any_name_is_applied(family: Family) -> None:
    def form(drop: Any, weight: Any, density: Any) -> Form:
        return Form(weight, masked=True)

    @method(space=Space.DELTA, draws=(Mask("density", name="drop"),), form=form)
    def dropped(
        delta: Any,
        *,
        drop: Any,
        weight: Annotated[PerModel, Real()] = 1.0,
        density: Annotated[PerModel, Real(0, 1)] = 0.5,
    ) -> Any:
        """Weighted sum of what is kept."""
        return weighted_sum(keep_where(delta, drop), weight)

    made = family.everywhere("dropped", density=0.4)
    changed = np.mean(made["model.layers.0.mlp.weight"] != family.dicts[0]["model.layers.0.mlp.weight"])
    assert changed == pytest.approx(1 - 0.6**2, abs=0.01)


def test_negative_numbers_are_not_ranked_as_magnitudes(family: Family) -> None:
    def raw(delta: Any, **_: Any) -> Any:
        return delta

    def minus(delta: Any, **_: Any) -> Any:
        return np.where(np.abs(delta) > 0.004, np.abs(delta), np.float32(-0.0))

    @method(space=Space.DELTA, stats=(Rank("density", of=raw),))
    def unsigned(delta: Any, *, cutoff: Any, density: Annotated[PerModel, Real(0, 1)] = 0.1) -> Any:
        """Sum."""
        return add_rows(delta)

    with pytest.raises(ArgumentError, match="'cutoff': what it ranks is negative in places: declare it signed=True"):
        stockpot.merge(family.recipe("unsigned"), family.folder / "unsigned", overwrite=True)

    @method(space=Space.DELTA, stats=(Rank("density", of=minus),))
    def zeros(delta: Any, *, cutoff: Any, density: Annotated[PerModel, Real(0, 1)] = 0.1) -> Any:
        """Negative zeros rank as zeros."""
        if delta.shape[1:] == (97,):
            assert list(cutoff) == [0.0, 0.0]
        return add_rows(delta)

    family.everywhere("zeros", density=0.9)


def test_a_rank_outside_what_is_there_ends() -> None:
    from stockpot.statistics.order import Tally, Window, next_window

    for low, high, t in ((0, 2**31, Tally(below=0)), (0, 50, Tally(below=20))):
        window = Window(10, 9, low, high, high)
        with pytest.raises(ValueError, match="rank 9 of 10 values is not among those that were given"):
            next_window(window, t)


def test_hundreds_of_spans_that_need_no_data(tmp_path: Path) -> None:
    @method(space=Space.DELTA, stats=(Rank("density", over="group"),))
    def grouped(
        delta: Any,
        *,
        cutoff: Any,
        density: Annotated[PerModel, Real(0, 1)] = 0.2,
        scale: Annotated[float, Real()] = 1.0,
    ) -> Any:
        """Trimmed by group."""
        return add_rows(keep_where(delta, abs(delta) >= column(cutoff, delta))) * scale

    shapes = {f"model.layers.{i}.w": (4, 4) for i in range(700)}
    paths = [write_model(str(tmp_path / f"m{i}"), state(shapes, i), "F32") for i in range(2)]
    recipe = {"merge_method": "grouped", "base_model": paths[0], "models": paths[1:]}
    recipe |= {"parameters": {"density": 0.0, "scale": [0.0, 1.0]}}
    assert len(stockpot.plan(recipe).groups) == 700
    stockpot.merge(recipe, tmp_path / "out", stockpot.Options(threads=2))
    made, base = read_model(str(tmp_path / "out")), read_model(paths[0])
    assert all(np.array_equal(made[n], base[n]) for n in base)


def test_one_value_over_slices_of_different_models_is_refused(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.w": (30, 20) for i in range(4)}
    paths = [write_model(str(tmp_path / f"m{i}"), state(shapes, i), "F32") for i in range(3)]
    companions = [
        write_model(str(tmp_path / f"c{i}"), {n: np.ones(s) for n, s in shapes.items()}, "F32") for i in range(3)
    ]

    def slices(first: list[int], second: list[int], *, fisher: bool) -> list[Any]:
        def source(i: int, layers: list[int]) -> dict[str, Any]:
            beside = {"companions": {"fisher": companions[i]}} if fisher else {}
            return {"model": paths[i], "layer_range": layers} | beside

        return [
            {"sources": [source(i, [0, 2]) for i in first]},
            {"sources": [source(i, [2, 4]) for i in second]},
        ]

    trimmed = {"merge_method": "ties", "base_model": paths[0], "parameters": {"dialect": "paper", "density": 0.3}}
    with pytest.raises(StockpotError, match="one cutoff over the whole model can't span slices of different models"):
        stockpot.plan({**trimmed, "slices": slices([1], [2], fisher=False)})
    stockpot.plan({**trimmed, "slices": slices([1], [1], fisher=False)})
    with pytest.raises(
        RecipeError, match=r"fisher: one \w+ over the whole model can't span slices of different models"
    ):
        stockpot.plan({"merge_method": "fisher", "slices": slices([1, 2], [2, 1], fisher=True)})
    stockpot.plan({"merge_method": "fisher", "slices": slices([1, 2], [1, 2], fisher=True)})


def test_extents_that_a_function_gives_are_checked(family: Family) -> None:
    for over, message in (
        ("row", "does not see"),
        ("layers", "statistic 't': over='layers'; expected one of row, tensor"),
    ):
        _REGISTRY.pop("chosen", None)

        @method(space=Space.DELTA, stats=(Total("t", of=_square, over=lambda p, over=over: over),))
        def chosen(delta: Any, *, t: Any) -> Any:
            """Sum."""
            return add_rows(delta)

        with pytest.raises(ArgumentError, match=message):
            stockpot.plan(family.recipe("chosen"))
        with pytest.raises(ArgumentError, match=message):
            chosen(family.dicts[1:3], base=family.dicts[0])


# the rest of the tensors


def test_what_the_other_tensors_get_is_checked(family: Family) -> None:
    def declared(space: Space = Space.WEIGHT, **given: Any) -> Any:
        _REGISTRY.pop("some", None)

        @method(space=space, applies=("matrix",), **given)
        def some(models: Any) -> Any:
            """Mean."""
            return models.mean(0)

        return some

    @method(space=Space.WEIGHT, scope=Scope.TENSOR, applies=("matrix",), otherwise="mean", cost=COST)
    def whole(models: Any) -> Any:
        """Mean."""
        return models.mean(0)

    for other, message in (
        ("slerp", "slerp takes 2 models, got 3"),
        ("fisher", "some: otherwise='fisher' needs fisher, which some has not"),
        ("whole", "some: otherwise='whole' is itself for matrix tensors only"),
        ("some", "some: otherwise='some' is the method itself"),
        ("ties", "needs base_model"),
    ):
        made = declared(otherwise=other)
        with pytest.raises((ProblemsError, RecipeError), match=message):
            stockpot.plan(family.recipe("some", 3, base=False))
        with pytest.raises(ArgumentError, match="works on differences" if other == "ties" else message):
            made(family.dicts[1:4])
    declared(space=Space.DELTA, otherwise="task_arithmetic")
    found = family.everywhere("some", 2)
    name = "model.norm.weight"
    base, a, b = (d[name] for d in family.dicts[:3])
    assert np.allclose(found[name], base + (a - base) + (b - base), atol=1e-7)


def test_a_step_is_no_companion(family: Family) -> None:
    models = [{"model": p, "companions": {"fisher": "one"}} for p in family.paths[:2]]
    first = {"name": "one", "merge_method": "linear", "models": family.paths[:2]}
    with pytest.raises(
        StockpotError, match="fisher: 'one' is a step of the recipe; companions are checkpoints: write it"
    ):
        stockpot.plan({"steps": [first, {"merge_method": "fisher", "models": models}]})
    out = family.folder / "one"
    stockpot.merge({k: v for k, v in first.items() if k != "name"}, out)  # the way out
    models = [{"model": p, "companions": {"fisher": str(out)}} for p in family.paths[:2]]
    stockpot.plan({"merge_method": "fisher", "models": models})


# refused when it is declared


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stats": (Rank("one"),)}, "'cutoff' ranks every model, 'one' is one number: annotate it with PerModel"),
        ({"stats": (Quantile("one"),)}, "'quantile' ranks every model, 'one' is one number"),
        ({"stats": (Rank("any"),)}, "'cutoff' refers to 'any', which is not a number from 0 to 1"),
        ({"stats": (Quantile("any"),)}, "'quantile' refers to 'any', which is not a number from 0 to 1"),
        ({"draws": (Uniform("u"), Uniform("v"))}, "two draws of one kind would be the same numbers"),
        ({"draws": (Mask("density"), Mask("density", name="v"))}, "two draws of one kind"),
        ({"base_role": "frist"}, "base_role='frist': expected one of subtracted, listed, first, copied"),
        ({"reproducible": "never"}, "reproducible='never': expected 'anywhere' or 'machine'"),
        ({"neutral": {"densty": 1}}, "neutral= sets 'densty', which is no parameter; did you mean 'density'?"),
        (
            {"companions": (Companion("seed", "x"),)},
            "the name 'seed' is taken: a method is called with models, base= and seed=",
        ),
        ({"companions": (Companion("base", "x"),)}, "the name 'base' is taken"),
        (
            {"base_role": "first", "space": Space.WEIGHT, "companions": (Companion("c", "x"),)},
            "base_role='first' takes a base that has no companions",
        ),
        (
            {
                "scope": Scope.TENSOR,
                "cost": COST,
                "stats": (Total("r", of=_square, over="row"), Total("s", of=_square)),
            },
            "with Scope.TENSOR a statistic over rows must come after",
        ),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    names = [x.name for key in ("stats", "draws", "companions") for x in given.get(key, ())]
    text = f"""
def odd(
    block, *, {"".join(n + ", " for n in names)}density: Annotated[PerModel, Real(0, 1)] = 0.5,
    one: Annotated[float, Real(0, 1)] = 0.5, any: Annotated[PerModel, Real()] = 0.5,
):
    "Odd."
"""
    space: dict[str, Any] = {"Annotated": Annotated, "PerModel": PerModel, "Real": Real}
    exec(text, space)
    with pytest.raises(TypeError) as raised:
        method(**{"space": Space.DELTA, **given})(space["odd"])
    assert message in str(raised.value)


def test_accepted_beside_them(family: Family) -> None:
    """Neighbours of what is refused are not."""

    @method(space=Space.DELTA, draws=(Uniform("u"), Normal("v"), Mask("density")), neutral={"density": 1})
    def kinds(delta: Any, *, u: Any, v: Any, mask: Any, density: Annotated[PerModel, Real(0, 1)] = 0.5) -> Any:
        """One draw of each kind."""
        assert not np.array_equal(u, v)
        return add_rows(keep_where(delta, mask & (u > 0.1) & (v < 1)))

    family.everywhere("kinds")
