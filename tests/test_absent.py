"""`absent:` what becomes of tensors that only some models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import stockpot
from stockpot.errors import RecipeError, StockpotError

from helpers import LAYERS, SHAPES, load, write_model

CONFIG = {"architectures": ["X"], "model_type": "x"}


def draw(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}


GATE = "model.layers.1.mlp.gate_proj.weight"
EXTRA = "model.layers.9.extra.weight"
HEAD = "score.weight"


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """a has everything and a tensor more, b lacks one of a's, c is whole; base is whole."""
    states = {name: draw(i) for i, name in enumerate(("base", "a", "b", "c"))}
    states["a"] |= {HEAD: torch.randn(3, 64), EXTRA: torch.randn(5, 7)}
    del states["b"][GATE]
    for name, state in states.items():
        write_model(tmp_path / name, state, CONFIG)
    return states


def merge(tmp_path: Path, **recipe: Any) -> dict[str, torch.Tensor]:
    weights = recipe.pop("weights", None) or [1] * len(recipe["models"])
    own = [{"model": str(tmp_path / m), "parameters": {"weight": w}} for m, w in zip(recipe["models"], weights)]
    recipe["models"] = own if set(weights) != {1} else [e["model"] for e in own]
    if "base_model" in recipe:
        recipe["base_model"] = str(tmp_path / recipe["base_model"])
    stockpot.merge(recipe, tmp_path / "out", overwrite=True)
    stockpot.verify(tmp_path / "out")
    return load(tmp_path / "out")


def test_an_error_names_them_and_what_helps(models: Any, tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [str(tmp_path / m) for m in "cb"]}
    for given in (recipe, {**recipe, "absent": "error"}):
        with pytest.raises(
            StockpotError, match=r"b: 1 tensors of .*c are missing: .*gate_proj.*absent: zero.*absent: skip"
        ):
            stockpot.plan(given)
    with pytest.raises(
        StockpotError, match=r"a: 2 tensors are not in .*c: .*exclude them to leave them out, or say what"
    ):
        stockpot.plan({**recipe, "models": [str(tmp_path / m) for m in "ca"]})
    out = merge(tmp_path, merge_method="linear", models=["c", "a"], exclude=[HEAD, EXTRA])
    assert out.keys() == models["c"].keys()
    out = merge(tmp_path, merge_method="linear", models=["c", "b"], absent="zero")
    assert out.keys() == models["c"].keys()


def test_zero_and_skip_of_averages(models: Any, tmp_path: Path) -> None:
    a, b, c = (models[m] for m in "abc")
    zero = merge(tmp_path, merge_method="linear", models=["c", "a", "b"], absent="zero")
    skip = merge(tmp_path, merge_method="linear", models=["c", "a", "b"], absent="skip", weights=[1, 2, 5])
    assert zero.keys() == skip.keys() == {*c, HEAD, EXTRA}
    for name in c:
        if name != GATE:
            torch.testing.assert_close(zero[name], (a[name] + b[name] + c[name]) / 3)
            torch.testing.assert_close(skip[name], (2 * a[name] + 5 * b[name] + c[name]) / 8)
    torch.testing.assert_close(zero[GATE], (a[GATE] + c[GATE]) / 3)
    torch.testing.assert_close(zero[HEAD], a[HEAD] / 3)
    torch.testing.assert_close(skip[GATE], (2 * a[GATE] + c[GATE]) / 3)  # the weights of those that have it, as shares
    torch.testing.assert_close(skip[EXTRA], a[EXTRA])


def test_zero_of_differences_is_no_difference(models: Any, tmp_path: Path) -> None:
    base, a, b = (models[m] for m in ("base", "a", "b"))
    out = merge(
        tmp_path, merge_method="task_arithmetic", models=["a", "b"], base_model="base", absent="zero",
        weights=[0.5, 2.0],
    )  # fmt: skip
    torch.testing.assert_close(out[GATE], base[GATE] + 0.5 * (a[GATE] - base[GATE]))
    torch.testing.assert_close(out[HEAD], 0.5 * a[HEAD])  # a base that lacks it has zeros too
    name = "model.norm.weight"
    torch.testing.assert_close(out[name], base[name] + 0.5 * (a[name] - base[name]) + 2 * (b[name] - base[name]))


def test_skip_of_differences(models: Any, tmp_path: Path) -> None:
    base, a = models["base"], models["a"]
    recipe: dict[str, Any] = {
        "merge_method": "ties", "models": ["a", "b"], "base_model": "base", "absent": "skip",
        "parameters": {"density": 1.0},
    }  # fmt: skip
    with pytest.raises(
        StockpotError, match=r"needs base_model, and .*base has no .*: exclude it, or let it count as zeros"
    ):
        merge(tmp_path, **recipe)
    out = merge(tmp_path, **recipe, exclude=[HEAD, EXTRA])
    torch.testing.assert_close(out[GATE], a[GATE])
    assert out.keys() == base.keys()


def test_method_that_needs_more_models(models: Any, tmp_path: Path) -> None:
    with pytest.raises(
        StockpotError, match=r"gate_proj.*which not all models have \(absent: skip\): slerp takes 2 models, got 1"
    ):
        merge(tmp_path, merge_method="slerp", models=["c", "b"], absent="skip", parameters={"t": 0.5})
    out = merge(tmp_path, merge_method="slerp", models=["c", "b"], absent="skip", parameters={"t": 0.5}, exclude=[GATE])
    assert torch.equal(out[GATE], models["c"][GATE])


def test_gradients_go_by_all_layers(models: Any, tmp_path: Path) -> None:
    """A tensor in a layer that only another model has lies at that layer's depth."""
    names = dict.fromkeys(n.replace("layers.3", "layers.4") for n in models["c"] if "layers.3" in n)
    del models["a"][EXTRA]  # a layer 9 would leave a gap
    write_model(tmp_path / "a", {**models["a"], **{n: torch.ones(2) for n in names}}, CONFIG)
    text = (
        f"merge_method: linear\nmodels: [{tmp_path}/a, {tmp_path}/c]\nabsent: skip\nparameters: {{weight: [0.5, 1]}}\n"
    )
    planned = stockpot.plan(text)
    assert {t.layer for t in planned.tensors if t.layer} >= {("model.layers", n) for n in range(LAYERS + 1)}


def test_notes_say_what_counts_how(models: Any, tmp_path: Path) -> None:
    names = [str(tmp_path / m) for m in "cab"]
    for how, word, k in (("zero", "count as zeros", 3), ("skip", "take no part", 3)):
        notes = stockpot.plan({"merge_method": "linear", "models": names, "absent": how}).notes
        assert any(f"absent: {how}: {names[2]} lacks {k} tensors, which {word}: " in n and GATE in n for n in notes), (
            notes
        )
        assert any(f"absent: {how}: {names[0]} lacks 2 tensors, which {word}: " in n for n in notes), notes


def test_tied_heads_are_not_absent(tmp_path: Path) -> None:
    state = draw(0)
    write_model(tmp_path / "a", state, {**CONFIG, "tie_word_embeddings": False})
    del state["lm_head.weight"]
    write_model(tmp_path / "b", state, {**CONFIG, "tie_word_embeddings": True})
    for how in ("zero", "skip"):
        recipe = {"merge_method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")], "absent": how}
        assert not any("lacks" in n for n in stockpot.plan(recipe).notes)


def test_bad_values(models: Any, tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [str(tmp_path / "c")]}
    for bad in ("none", ["zero"], 0):
        with pytest.raises(RecipeError, match="absent: expected error, zero or skip, got"):
            stockpot.plan({**recipe, "absent": bad})
    source = {"model": str(tmp_path / "c"), "layer_range": [0, 4]}
    with pytest.raises(RecipeError, match="absent: skip goes with models or run, not with slices"):
        stockpot.plan({"merge_method": "linear", "slices": [{"sources": [source]}], "absent": "skip"})


def test_a_run_whose_snapshots_differ(models: Any, tmp_path: Path) -> None:
    """Adapters that adapt different modules, averaged as factors."""
    for step, missing in ((10, False), (20, True)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        state = draw(step)
        if missing:
            del state[GATE]
        write_model(folder, state, CONFIG)
    recipe = {"merge_method": "linear", "run": str(tmp_path / "run"), "absent": "skip"}
    stockpot.merge(recipe, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[GATE], load(tmp_path / "run" / "checkpoint-10")[GATE])


def test_models_of_different_depth(models: Any, tmp_path: Path) -> None:
    """The config comes from one model: its layers must be all, and the advice to name the deepest first works."""
    deep = {
        **models["c"],
        **{n.replace("layers.3", "layers.4"): t.clone() for n, t in models["c"].items() if "layers.3" in n},
    }
    write_model(tmp_path / "deep", deep, {**CONFIG, "num_hidden_layers": 5})
    recipe = {"merge_method": "linear", "models": [str(tmp_path / "c"), str(tmp_path / "deep")], "absent": "skip"}
    with pytest.raises(
        StockpotError, match=r"another model has 5 layers in 'model.layers', .*c has 4.* deepest model first"
    ):
        stockpot.plan(recipe)
    planned = stockpot.plan({**recipe, "models": recipe["models"][::-1]})
    assert planned.template.config["num_hidden_layers"] == 5


def test_a_statistic_over_the_model_says_what_to_leave_out(models: Any, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "merge_method": "ties", "models": [str(tmp_path / m) for m in ("c", "b")], "base_model": str(tmp_path / "base"),
        "absent": "skip", "parameters": {"density": 0.5, "dialect": "paper"},
    }  # fmt: skip
    with pytest.raises(
        StockpotError, match=r"can't span tensors that only some models have \(absent: skip\): exclude them"
    ):
        stockpot.plan(recipe)
    stockpot.plan({**recipe, "exclude": [GATE]})


def test_integers_that_are_absent_differ_from_nothing(tmp_path: Path) -> None:
    """They are not averaged: who has them gives them, and that others lack them is no difference."""
    ids = torch.arange(6)
    for name, more in (("a", {}), ("b", {"ids": ids})):
        write_model(tmp_path / name, {"w": torch.ones(2, 2), **more}, CONFIG)
    for how in ("zero", "skip"):
        recipe = {"merge_method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")], "absent": how}
        result = stockpot.merge(recipe, tmp_path / how)
        assert torch.equal(load(tmp_path / how)["ids"], ids)
        assert result.warnings == ()
