"""Recipes: mergekit's dialect read as its users mean it, and every mistake answered with file, line and the nearest key."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stockpot
from stockpot.errors import ArgumentError, InputError, ProblemsError, StockpotError
from stockpot.planning import Plan
from stockpot.recipes import parse_recipe
from stockpot.recipes.values import ABSENT, Condition, evaluate
from stockpot.specs import parse_size

from helpers import CONFIG, SHAPES, load, write_model


def params_of(plan: Plan, name: str) -> dict[str, Any]:
    t = next(t for t in plan.tensors if t.name == name)
    return plan.groups[t.group].public_params()


Q = "model.layers.{}.self_attn.q_proj.weight"

# values


def test_gradients() -> None:
    assert [evaluate((0.0, 1.0, 0.0), "x", t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]
    assert evaluate((0.3,), "x", 0.7) == 0.3
    assert evaluate((0.1, 0.1), "x", 1 / 3) == 0.1  # equal neighbours give exactly themselves


def test_first_matching_filter_wins() -> None:
    value = (Condition("attn", 1.0), Condition("q_proj", 2.0), Condition("mlp", (0.0, 1.0)))
    assert evaluate(value, "self_attn.q_proj", 0.5) == 1
    assert evaluate(value, "mlp.up", 0.5) == 0.5
    assert evaluate(value, "norm", 0.5) is ABSENT
    assert evaluate((Condition("*", 3.0),), "norm", 0) == 3
    assert evaluate((Condition(None, 3.0),), "norm", 0) == 3


def test_layer_gradients_and_what_lies_outside(family: Path) -> None:
    text = (
        f"merge_method: slerp\nbase_model: {family}/base\nmodels: [{family}/base, {family}/a]\n"
        "parameters:\n  t:\n    - {filter: self_attn, value: [0, 0.3, 0.6, 0.9]}\n    - value: [0.2, 0.8]\n"
    )
    plan = stockpot.plan(text)
    assert [params_of(plan, Q.format(i))["t"] for i in range(4)] == pytest.approx([0, 0.3, 0.6, 0.9])
    assert params_of(plan, "model.embed_tokens.weight")["t"] == 0.2
    assert params_of(plan, "model.norm.weight")["t"] == 0.8
    assert params_of(plan, "lm_head.weight")["t"] == 0.8
    assert any("mergekit uses its first value" in n for n in plan.notes)
    plan = stockpot.plan(text + "compat: mergekit\n")
    assert params_of(plan, "lm_head.weight")["t"] == 0.2
    assert not any("first value" in n for n in plan.notes)


def test_precedence_source_over_slice_over_global(family: Path) -> None:
    text = f"""
merge_method: ties
base_model: {family}/base
slices:
  - sources:
      - {{model: {family}/base, layer_range: [0, 2]}}
      - {{model: {family}/a, layer_range: [0, 2], parameters: {{weight: 0.1}}}}
      - {{model: {family}/b, layer_range: [0, 2]}}
    parameters: {{weight: 0.2, lambda: 0.5}}
  - sources:
      - {{model: {family}/base, layer_range: [2, 4]}}
      - {{model: {family}/a, layer_range: [2, 4]}}
      - {{model: {family}/b, layer_range: [2, 4]}}
parameters: {{weight: 0.3, density: 0.4, int8_mask: true}}
"""
    plan = stockpot.plan(text)
    assert params_of(plan, Q.format(0))["weight"] == (0.1, 0.2)
    assert params_of(plan, Q.format(0))["lambda"] == 0.5
    assert params_of(plan, Q.format(3))["weight"] == (0.3, 0.3)
    assert params_of(plan, Q.format(3))["lambda"] == 1
    assert params_of(plan, "model.embed_tokens.weight")["lambda"] == 0.5  # the first slice's
    assert params_of(plan, "lm_head.weight")["lambda"] == 1  # the last one's
    assert any("int8_mask" in n and "no effect" in n for n in plan.notes)


def test_model_over_global_and_defaults_by_dialect(family: Path) -> None:
    head = f"base_model: {family}/base\nmodels:\n  - model: {family}/a\n    parameters: {{weight: 2}}\n  - {family}/b\n"
    plan = stockpot.plan("merge_method: ties\nparameters: {weight: 1}\n" + head)
    assert params_of(plan, Q.format(0))["weight"] == (2, 1)
    assert params_of(plan, Q.format(0))["density"] == (1, 1)
    plan = stockpot.plan("merge_method: ties\nparameters: {dialect: paper}\n" + head)
    assert params_of(plan, Q.format(0))["density"] == (0.2, 0.2)
    with pytest.raises(StockpotError, match="density"):
        stockpot.plan("merge_method: ties\nparameters: {dialect: peft}\n" + head)
    plan = stockpot.plan("merge_method: dare_ties\ncompat: mergekit\n" + head)
    assert params_of(plan, Q.format(0))["dialect"] == "mergekit"
    assert params_of(stockpot.plan("merge_method: dare_ties\n" + head), Q.format(0))["dialect"] == "paper"


# slices


def test_passthrough_stacks_layers(family: Path, tmp_path: Path) -> None:
    text = f"""
merge_method: passthrough
slices:
  - sources: [{{model: {family}/a, layer_range: [0, 3]}}]
  - sources: [{{model: {family}/b, layer_range: [1, 4]}}]
"""
    stockpot.merge(text, tmp_path / "out")
    out, a, b = load(tmp_path / "out"), load(family / "a"), load(family / "b")
    for layer, (source, number) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for suffix in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            assert torch.equal(out[f"model.layers.{layer}.{suffix}"], source[f"model.layers.{number}.{suffix}"])
    assert torch.equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(out["lm_head.weight"], b["lm_head.weight"])
    assert stockpot.open_checkpoint(tmp_path / "out").config["num_hidden_layers"] == 6


def test_lists_with_an_entry_for_each_layer_follow_the_slices(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "a", tmp_path / "a")
    config = CONFIG | {"layer_types": ["w", "x", "y", "z"], "other": [1, 2, 3, 4]}
    write_model(tmp_path / "a", load(family / "a"), config)
    text = f"merge_method: passthrough\nslices:\n  - sources: [{{model: {tmp_path}/a, layer_range: [2, 4]}}]\n"
    written = stockpot.plan(text).template.config
    assert written["layer_types"] == ["y", "z"]
    assert written["other"] == [1, 2, 3, 4]
    assert written["num_hidden_layers"] == 2


def test_slices_on_one_line(family: Path, tmp_path: Path) -> None:
    text = (
        f"{{merge_method: passthrough, slices: [{{sources: [{{model: {family}/a, layer_range: [0, 1]}}]}}, "
        f"{{sources: [{{model: {family}/b, layer_range: [2, 3]}}]}}]}}\n"
    )
    stockpot.merge(text, tmp_path / "out")
    out = load(tmp_path / "out")
    assert torch.equal(out[Q.format(0)], load(family / "a")[Q.format(0)])
    assert torch.equal(out[Q.format(1)], load(family / "b")[Q.format(2)])


def test_slices_of_models_that_do_not_fit(family: Path, tmp_path: Path) -> None:
    b = load(family / "b")
    bias = "model.layers.{}.self_attn.q_proj.bias"
    write_model(tmp_path / "bias", b | {bias.format(i): torch.zeros(64) for i in range(4)})
    write_model(tmp_path / "wide", {n: torch.zeros([2 * d for d in t.shape]) for n, t in b.items()})
    write_model(tmp_path / "mixed", b | {bias.format(2): torch.zeros(64)})  # its own layers differ

    def text(other: str) -> str:
        return f"""
merge_method: passthrough
slices:
  - sources: [{{model: {family}/a, layer_range: [0, 2]}}]
  - sources: [{{model: {tmp_path}/{other}, layer_range: [0, 4]}}]
"""

    with pytest.raises(InputError, match=r"'self_attn.q_proj.bias' is \[64\], but absent"):
        stockpot.plan(text("bias"))
    with pytest.raises(InputError, match="but"):
        stockpot.plan(text("wide"))
    # which of its layers have a bias no config says: they may only stay where they are
    with pytest.raises(InputError, match=r"layer 2 of the output is layer 0 of .*mixed, whose tensors are not those"):
        stockpot.plan(text("mixed"))
    stays = text("mixed").replace("layer_range: [0, 4]", "layer_range: [2, 4]")
    names = {t.name for t in stockpot.plan(stays).tensors}
    assert bias.format(2) in names
    assert bias.format(3) not in names


def test_base_of_another_shape(family: Path, tmp_path: Path) -> None:
    base = load(family / "base")
    write_model(tmp_path / "odd", base | {"model.norm.weight": torch.zeros(65)})
    with pytest.raises(InputError, match="65"):
        stockpot.plan(f"merge_method: linear\nbase_model: {tmp_path}/odd\nmodels: [{family}/a, {family}/b]\n")


def test_numbers_as_paths(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(family / "a", tmp_path / "1.10")
    shutil.copytree(family / "b", tmp_path / "1.1")
    monkeypatch.chdir(tmp_path)
    plan = stockpot.plan("merge_method: linear\nmodels: [1.10]\n")
    assert plan.inputs[0].checkpoint.path.endswith("1.10")


def test_scale_in_passthrough(family: Path, tmp_path: Path) -> None:
    text = (
        f"merge_method: passthrough\nmodels: [{family}/a]\nparameters: {{scale: [{{filter: down_proj, value: 0.5}}, "
        "{value: 1}]}\n"
    )
    stockpot.merge(text, tmp_path / "out")
    out, a = load(tmp_path / "out"), load(family / "a")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(out[name], (a[name].float() * 0.5).bfloat16())
    assert torch.equal(out[Q.format(1)], a[Q.format(1)])


# beyond mergekit


def test_include_exclude_and_rules(family: Path, tmp_path: Path) -> None:
    text = f"""
merge_method: linear
base_model: {family}/base
models: [{family}/a, {family}/b]
exclude: ["lm_head.*"]
rules:
  - match: "*.mlp.*"
    merge_method: task_arithmetic
    parameters: {{weight: 0.5, lambda: 2}}
  - match: ["*.input_layernorm.*", "model.norm.*"]
    merge_method: passthrough
"""
    stockpot.merge(text, tmp_path / "out")
    out, base, a, b = (load(p) for p in (tmp_path / "out", family / "base", family / "a", family / "b"))
    assert torch.equal(out["lm_head.weight"], base["lm_head.weight"])
    assert torch.equal(out["model.norm.weight"], base["model.norm.weight"])
    q, down = Q.format(2), "model.layers.2.mlp.down_proj.weight"
    torch.testing.assert_close(out[q], ((a[q].float() + b[q].float()) / 2).bfloat16(), rtol=1e-2, atol=0)
    want = base[down].double() + (a[down].double() - base[down].double()) + (b[down].double() - base[down].double())
    torch.testing.assert_close(out[down].double(), want, rtol=1e-2, atol=1e-5)
    only = stockpot.plan(f"merge_method: linear\nmodels: [{family}/a, {family}/b]\ninclude: ['*.self_attn.*']\n")
    actions = {t.name: t.action.value for t in only.tensors}
    assert actions[q] == "merge"
    assert actions[down] == "copy"


def test_python_recipes(family: Path, tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": str(family / "a")}, {"model": str(family / "b")}]}
    result = stockpot.merge(recipe, tmp_path / "out")
    assert result.lineage["recipe"]["text"].startswith("merge_method: linear")
    assert stockpot.load_recipe(stockpot.load_recipe(recipe)).merge_method == "linear"


def test_paths_beside_the_recipe(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(family, tmp_path / "deep/family")
    (tmp_path / "deep/r.yml").write_text("merge_method: linear\nmodels: [family/a, family/b]\n")
    monkeypatch.chdir(tmp_path)
    assert len(stockpot.plan("deep/r.yml").inputs) == 2


def test_the_same_model_twice(family: Path, tmp_path: Path) -> None:
    stockpot.merge(f"merge_method: linear\nmodels: [{family}/a, {family}/a, {family}/b]\n", tmp_path / "out")
    a, b, out = load(family / "a"), load(family / "b"), load(tmp_path / "out")
    want = (2 * a["lm_head.weight"].float() + b["lm_head.weight"].float()) / 3
    torch.testing.assert_close(out["lm_head.weight"], want.bfloat16(), rtol=1e-2, atol=0)


def test_dtypes(family: Path, tmp_path: Path) -> None:
    models = f"merge_method: linear\nmodels: [{family}/a, {family}/b]\n"
    for key, dtype in (("dtype: float16", torch.float16), ("dtype: bfloat16\nout_dtype: float32", torch.float32)):
        out = tmp_path / key[-8:].strip()
        stockpot.merge(models + key + "\n", out)
        assert {t.dtype for t in load(out).values()} == {dtype}
        assert stockpot.open_checkpoint(out).config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_tied_and_untied(family: Path, tmp_path: Path) -> None:
    """A tied model without a head merges with one that has both names, and with an untied one."""
    a, b = load(family / "a"), load(family / "b")
    tied = CONFIG | {"tie_word_embeddings": True}
    write_model(tmp_path / "one", {n: t for n, t in a.items() if n != "lm_head.weight"}, tied)
    write_model(tmp_path / "both", a | {"lm_head.weight": a["model.embed_tokens.weight"].clone()}, tied)
    stockpot.merge(f"merge_method: linear\nmodels: [{tmp_path}/one, {tmp_path}/both]\n", tmp_path / "tied")
    assert "lm_head.weight" not in load(tmp_path / "tied")
    stockpot.merge(f"merge_method: linear\nmodels: [{tmp_path}/both, {tmp_path}/one]\n", tmp_path / "tied2")
    assert load(tmp_path / "tied2").keys() == load(tmp_path / "one").keys()
    text = f"merge_method: linear\nmodels: [{tmp_path}/one, {family}/b]\n"
    assert any("untied" in n for n in stockpot.plan(text).notes)
    stockpot.merge(text, tmp_path / "mixed")
    mixed = load(tmp_path / "mixed")
    want = (a["model.embed_tokens.weight"].float() + b["lm_head.weight"].float()) / 2
    torch.testing.assert_close(mixed["lm_head.weight"], want.bfloat16(), rtol=1e-2, atol=0)
    assert stockpot.open_checkpoint(tmp_path / "mixed").config["tie_word_embeddings"] is False


def test_yaml_conveniences(family: Path) -> None:
    text = f"""
merge_method: linear
models:
  - {{model: {{model: {{path: {family}/a}}}}, parameters: &common {{weight: 2e-1}}}}
  - {{model: {family}/b, parameters: {{<<: *common}}}}
base_model: null
"""
    assert params_of(stockpot.plan(text), Q.format(0))["weight"] == (0.2, 0.2)


# mistakes

LINEAR = "merge_method: linear\nmodels:\n  - {{model: {0}/a, parameters: {{weight: {1}}}}}\n  - model: {0}/b\n"

BAD_TEXT: dict[str, tuple[str, str]] = {
    "misspelt key": ("merge_methd: linear\nmodels: [a]", r":1: .*'merge_methd'.*did you mean 'merge_method'"),
    "misspelt parameters": ("merge_method: linear\nmodels:\n  - model: a\n    paramters: {}", ":4: .*'parameters'"),
    "missing method": ("models: [a]", "merge_method is missing"),
    "models and slices": ("merge_method: x\nmodels: [a]\nslices: []", "exactly one"),
    "neither": ("merge_method: x", "exactly one"),
    "a list": ("- a\n- b", "a recipe is a mapping"),
    "empty": ("", "empty"),
    "only a comment": ("# nothing", "empty"),
    "yaml error": ("merge_method: [", r":\d+: not valid YAML"),
    "tab": ("merge_method: x\n\tmodels: y", r":2: not valid YAML"),
    "key twice": ("merge_method: x\nmerge_method: y\nmodels: [a]", ":2: key 'merge_method' given twice"),
    "normalize at the top": ("merge_method: x\nmodels: [a]\nnormalize: true", ":3: .*belongs under 'parameters:'"),
    "layer_range reversed": (
        "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [3, 1]}]",
        ":3: .*holds no layers",
    ),
    "layer_range negative": (
        "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, -1]}]",
        "holds no layers",
    ),
    "layer_range of text": (
        "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: ['0', '4']}]",
        "whole numbers",
    ),
    "empty gradient": ("merge_method: x\nmodels: [a]\nparameters: {t: []}", "empty list"),
    "gradient of text": ("merge_method: x\nmodels: [a]\nparameters: {t: [1, b]}", "gradient of numbers"),
    "filter without value": ("merge_method: x\nmodels: [a]\nparameters: {t: {filter: b}}", "needs a value"),
    "misspelt filter": (
        "merge_method: x\nmodels: [a]\nparameters: {t: [{filtr: b, value: 1}]}",
        "did you mean 'filter'",
    ),
    "unknown dtype": ("merge_method: x\nmodels: [a]\ndtype: bf17", "unknown dtype"),
    "tokens": ("merge_method: x\nmodels: [a]\ntokenizer: {source: base, tokens: {}}", "coming feature"),
    "chat template": ("merge_method: x\nmodels: [a]\nchat_template: auto", "coming feature"),
    "modules": ("merge_method: x\nmodules: {}", "coming feature"),
    "two documents": (
        "merge_method: x\nmodels: [a]\n---\nmerge_method: y\n",
        "a step that others are to use needs a 'name'",
    ),
    "python tag": ("merge_method: !!python/object:os.system x\nmodels: [a]", "tag"),
    "yaml bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{c}: &{c} [{','.join('*' + p for _ in range(10))}]\n" for p, c in zip("abcdef", "bcdefg")),
        "expanded too far",
    ),
    "deep nesting": ("[" * 60 + "]" * 60, "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text(case: str) -> None:
    text, message = BAD_TEXT[case]
    with pytest.raises(StockpotError, match=message) as caught:
        parse_recipe(text, "r.yml")
    assert caught.value.exit_code == 2
    assert "r.yml" in str(caught.value)


BAD_PLAN: dict[str, tuple[str, str, int]] = {
    "unknown method": ("merge_method: tie\nmodels: [{0}/a]", "unknown merge method 'tie'.*did you mean 'ties'", 2),
    "misspelt parameter": (
        LINEAR.replace("weight", "wieght"),
        r":3: .*no parameter 'wieght'.*did you mean 'weight'",
        2,
    ),
    "false for a number": (LINEAR.replace("{1}", "false"), ":3: weight: expected a number, got false", 2),
    "text for a number": (LINEAR.replace("{1}", "'0.5'"), "expected a number, got '0.5'", 2),
    "infinity": (LINEAR.replace("{1}", ".inf"), "expected a number", 2),
    "number for a flag": (LINEAR + "parameters: {{normalize: 1}}", "expected true or false, got 1", 2),
    "environment variable": (LINEAR.replace("{1}", "$WEIGHT"), "expected a number, got '.WEIGHT'", 2),
    "unused parameter": (LINEAR + "parameters: {{density: 0.5}}", "no parameter 'density'", 2),
    "shared parameter on a model": (LINEAR.replace("weight", "normalize"), "belongs to the whole merge", 2),
    "weights sum to zero": (LINEAR.replace("{1}", "-1"), "sum to zero", 2),
    "weights sum to nearly zero": (
        "merge_method: linear\nmodels: [{{model: {0}/a, parameters: {{weight: 0.1}}}}, {{model: {0}/b, parameters: "
        "{{weight: 0.2}}}}, {{model: {0}/c, parameters: {{weight: -0.3}}}}]",
        "sum to zero",
        2,
    ),
    "a huge weight": (LINEAR.replace("{1}", "1" + "0" * 400), "expected a number", 2),
    "a broken number": (LINEAR.replace("{1}", "!!int ''"), "can't be read", 2),
    "density out of range": (
        "merge_method: ties\nbase_model: {0}/base\nmodels: [{0}/a]\nparameters: {{density: 1.5}}",
        "from 0 to 1",
        2,
    ),
    "unknown dialect": (
        "merge_method: ties\nbase_model: {0}/base\nmodels: [{0}/a]\nparameters: {{dialect: papr}}",
        "did you mean 'paper'",
        2,
    ),
    "no base": ("merge_method: ties\nmodels: [{0}/a]", "set base_model", 2),
    "only the base": ("merge_method: ties\nbase_model: {0}/base\nmodels: [{0}/base]", "at least 1 model", 2),
    "parameters of the base": (
        "merge_method: ties\nbase_model: {0}/base\nmodels: [{{model: {0}/base, parameters: {{weight: 1}}}}, {0}/a]",
        "parameters of the base model have no effect",
        2,
    ),
    "slerp of three": ("merge_method: slerp\nmodels: [{0}/a, {0}/b, {0}/c]\nparameters: {{t: 0.5}}", "exactly 2", 2),
    "slerp without t": ("merge_method: slerp\nmodels: [{0}/a, {0}/b]", "needs the parameter 't'", 2),
    "passthrough of two": ("merge_method: passthrough\nmodels: [{0}/a, {0}/b]", "stacked with 'slices'", 2),
    "range past the end": (
        "merge_method: passthrough\nslices:\n  - sources: [{{model: {0}/a, layer_range: [2, 9]}}]",
        "past the end.*4 layers",
        2,
    ),
    "slices of unequal length": (
        "merge_method: slerp\nparameters: {{t: 0.5}}\nslices:\n  - sources: [{{model: {0}/a, layer_range: [0, 2]}}, "
        "{{model: {0}/b, layer_range: [0, 3]}}]",
        "differ in layers",
        2,
    ),
    "pattern without match": (LINEAR + "exclude: ['nothing.*']", "matches no tensor", 2),
    "rule without match": (LINEAR + "rules: [{{match: 'x*', merge_method: linear}}]", "matches no tensor", 2),
    "rule behind another": (
        LINEAR
        + "rules:\n- {{match: '*.weight', merge_method: passthrough}}\n- {{match: '*q_proj*', merge_method: linear}}",
        r"never used: every tensor it matches goes to an earlier one \('model.layers.0.self_attn.q_proj.weight' to that of",
        2,
    ),
    "tokenizer of a stranger": (LINEAR + "tokenizer_source: /nowhere", "neither 'base' nor a model", 2),
    "missing model": ("merge_method: linear\nmodels: [{0}/aa, {0}/b]", r":2: .*no such file.*did you mean", 3),
    "hub id": ("merge_method: linear\nmodels: [org/some-model]", "as a Hub id it is not complete in the cache", 3),
}


@pytest.mark.parametrize("case", BAD_PLAN)
def test_bad_plan(family: Path, tmp_path: Path, case: str) -> None:
    text, message, code = BAD_PLAN[case]
    path = tmp_path / "r.yml"
    path.write_text(text.format(family, "1"))
    with pytest.raises(StockpotError, match=message) as caught:
        stockpot.merge(path, tmp_path / "out")
    assert caught.value.exit_code == code
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.yml"]


def test_all_problems_at_once(family: Path) -> None:
    text = f"merge_method: linear\nmodls: []\nmodels: [{family}/a]\nparameters: {{t: []}}\ndtype: x\n"
    with pytest.raises(ProblemsError) as caught:
        stockpot.plan(text)
    assert len(caught.value.problems) == 3
    text = f"merge_method: linear\nmodels: [{family}/x, {family}/y]\nparameters: {{wait: 1}}\n"
    with pytest.raises(ProblemsError) as caught:
        stockpot.plan(text)
    assert len(caught.value.problems) == 3
    assert caught.value.exit_code == 2


def broken(family: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    tensors = dict(load(family / "b"))
    change(tensors)
    write_model(folder / "broken", tensors)
    return f"merge_method: linear\nmodels: [{family}/a, {folder}/broken]\n"


def test_models_that_do_not_fit(family: Path, tmp_path: Path) -> None:
    text = broken(family, tmp_path, lambda t: t.pop(Q.format(1)))
    with pytest.raises(InputError, match=r"broken: 1 tensors .* missing: 'model.layers.1.self_attn.q_proj.weight'"):
        stockpot.plan(text)
    text = broken(family, tmp_path, lambda t: t.update(extra=torch.zeros(1)))
    with pytest.raises(InputError, match=r"1 tensors are not in .*'extra'"):
        stockpot.plan(text)
    text = broken(family, tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(300, 64)}))
    with pytest.raises(InputError, match=r"\[256, 64\] .* \[300, 64\] .*vocabularies"):
        stockpot.plan(text)
    text = broken(family, tmp_path, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}))
    with pytest.raises(InputError, match=r"BF16 in .* but I32"):
        stockpot.plan(text)
    text = broken(family, tmp_path, lambda t: (t.pop(Q.format(1)), t.pop(Q.format(2)), t.pop("model.norm.weight")))
    with pytest.raises(InputError, match="3 tensors"):
        stockpot.plan(text)


def test_tokenizers_that_differ(family: Path, tmp_path: Path) -> None:
    for name, order in (("a", "xyz"), ("b", "zyx")):
        shutil.copytree(family / name, tmp_path / name)
        vocabulary = ", ".join(f'"{c}": {i}' for i, c in enumerate(order))
        (tmp_path / name / "tokenizer.json").write_text(
            f'{{"model": {{"vocab": {{{vocabulary}}}}}, "added_tokens": []}}'
        )
    text = f"merge_method: linear\nmodels: [{tmp_path}/a, {tmp_path}/b]\n"
    with pytest.raises(InputError, match=r"token 'z' is row 0, but row 2 in .*exclude.*vocab: by_position"):
        stockpot.plan(text)
    # the ways that it names work
    notes = stockpot.plan(text + "vocab: by_position\n").notes
    assert any("rows are combined by position, as the recipe says" in n for n in notes)
    left_out = stockpot.plan(text + "exclude: ['*embed_tokens*', '*lm_head*']\n")
    assert not any("position" in n for n in left_out.notes)
    with pytest.raises(InputError, match=r"can't be combined by position.*coming feature"):
        stockpot.plan(text + "tokenizer_source: base\n")
    stockpot.plan(text + "tokenizer_source: base\nvocab: by_position\n")
    for union in ("tokenizer: {}\n", "tokenizer_source: union\n", "tokenizer: {source: union}\n"):
        with pytest.raises(InputError, match="union of tokenizers is a coming feature"):
            stockpot.plan(text + union)
        stockpot.plan(text + union + "vocab: by_position\n")  # as it says
    (tmp_path / "b/tokenizer.json").write_text((tmp_path / "a/tokenizer.json").read_text())
    for union in ("", "tokenizer: {}\n", "tokenizer_source: union\n"):  # equal ones cost nothing
        assert stockpot.plan(text + union).notes == ()


@pytest.mark.parametrize("kind", ["vocab.json", "vocab.txt", "tokenizer.model", "added_tokens.json"])
def test_every_kind_of_tokenizer_is_compared(family: Path, tmp_path: Path, kind: str) -> None:
    for name, order in (("a", "xyz"), ("b", "xyw"), ("c", "xwz"), ("d", "xyz")):
        shutil.copytree(family / ("a" if name == "d" else "b"), tmp_path / name)
        place = tmp_path / name
        if kind == "vocab.txt":
            (place / kind).write_text("".join(f"{c}\n" for c in order))
        elif kind == "tokenizer.model":  # sentencepiece: field 1 holds pieces, whose field 1 is the text
            pieces = [bytes([0x0A, len(c), *c.encode(), 0x15, 0, 0, 0, 0]) for c in order]
            (place / kind).write_bytes(b"".join(bytes([0x0A, len(p)]) + p for p in pieces))
        else:
            (place / "vocab.json").write_text(json.dumps({"q": 9} if "added" in kind else _numbered(order)))
            if "added" in kind:
                (place / kind).write_text(json.dumps(_numbered(order)))

    def plan(other: str) -> Plan:
        return stockpot.plan(f"merge_method: linear\nmodels: [{tmp_path}/a, {tmp_path}/{other}]\n")

    assert plan("d").notes == ()
    with pytest.raises(InputError, match=r"row 2 is that of 'w', but of 'z' in"):
        plan("b")
    with pytest.raises(InputError, match=r"row 1 is that of 'w', but of 'y' in"):
        plan("c")


def _numbered(tokens: str) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def test_more_tokens_at_the_end_are_a_note(family: Path, tmp_path: Path) -> None:
    for name, order in (("a", "xyz"), ("b", "xyzw")):
        shutil.copytree(family / name, tmp_path / name)
        (tmp_path / name / "vocab.json").write_text(json.dumps(_numbered(order)))
    (note,) = stockpot.plan(f"merge_method: linear\nmodels: [{tmp_path}/a, {tmp_path}/b]\n").notes
    assert "1 more tokens, and 0 fewer" in note


@pytest.mark.parametrize("text", ["5B", "5b", " 1.5 B "])
def test_a_size_without_its_unit(text: str) -> None:
    with pytest.raises(ArgumentError, match="which unit is meant") as raised:
        parse_size(text)
    assert parse_size(f"{text.strip(' bB')}GB") >= 10**9  # as it says
    assert "mergekit" in str(raised.value)


def test_mergekit_takes_the_widest_dtype_of_base_and_experts(tmp_path: Path) -> None:
    for name, dtype in (("base", torch.float32), ("a", torch.bfloat16), ("b", torch.bfloat16)):
        write_model(tmp_path / name, {"w": torch.randn(8, 8).to(dtype)})
    models = f"models: [{tmp_path}/a, {tmp_path}/b]\nparameters: {{weight: 0.5}}\n"
    text = f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\n{models}"
    assert stockpot.plan(text + "compat: mergekit\n").tensors[0].spec.dtype.label == "F32"
    write_model(tmp_path / "base", {"w": torch.randn(8, 8).to(torch.bfloat16)})
    write_model(tmp_path / "b", {"w": torch.randn(8, 8)})
    assert stockpot.plan(text + "compat: mergekit\n").tensors[0].spec.dtype.label == "F32"
    assert stockpot.plan(text).tensors[0].spec.dtype.label == "BF16"


def test_compat_relaxes_what_mergekit_ignores(family: Path) -> None:
    text = f"""
merge_method: task_arithmetic
compat: mergekit
base_model: {family}/base
models:
  - {{model: {family}/base, parameters: {{weight: 1}}}}
  - {{model: {family}/a, parameters: {{weight: 1, density: 0.5}}}}
parameters: {{normalize: 0.0}}
"""
    plan = stockpot.plan(text)
    assert params_of(plan, Q.format(0))["normalize"] is False
    assert any("density" in n for n in plan.notes)
    assert any("base model" in n for n in plan.notes)


def test_compat_linear_counts_an_unlisted_base(family: Path, tmp_path: Path) -> None:
    text = f"merge_method: linear\nbase_model: {family}/base\nmodels: [{family}/a, {family}/b]\nparameters: {{weight: 1}}\n"
    assert len(params_of(stockpot.plan(text), Q.format(0))["weight"]) == 2
    assert len(params_of(stockpot.plan(text + "compat: mergekit\n"), Q.format(0))["weight"]) == 3


def test_filters_of_a_source_see_its_own_layer_numbers(family: Path) -> None:
    text = f"""
merge_method: linear
slices:
  - sources:
      - model: {family}/a
        layer_range: [2, 4]
        parameters: {{weight: [{{filter: layers.2., value: 0.9}}, {{value: 0.1}}]}}
      - {{model: {family}/b, layer_range: [2, 4], parameters: {{weight: 0.5}}}}
"""
    plan = stockpot.plan(text)
    assert params_of(plan, Q.format(0))["weight"] == (0.9, 0.5)
    assert params_of(plan, Q.format(1))["weight"] == (0.1, 0.5)


def test_unmatched_filters_are_said(family: Path) -> None:
    text = LINEAR.format(family, "[{filter: mlp, value: 1}]")
    assert any("no filter matches" in n for n in stockpot.plan(text).notes)
    text = LINEAR.format(family, "[{filter: mpl, value: 1}, {value: 2}]")
    assert any("'mpl' matches no tensor" in n for n in stockpot.plan(text).notes)


def test_every_tensor_is_planned_once(family: Path) -> None:
    plan = stockpot.plan(LINEAR.format(family, 1))
    assert sorted(t.name for t in plan.tensors) == sorted(SHAPES)
    spans = sorted((t.offset, t.offset + t.spec.nbytes) for t in plan.tensors)
    assert spans[0][0] == len(plan.shards[0].header)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert spans[-1][1] == plan.shards[0].size


def test_cropped_vocabulary(tmp_path: Path) -> None:
    """Embeddings of 20 and 23 tokens: an error that names both, unless cropping is asked for; transformers loads the result."""
    from transformers import LlamaConfig, LlamaForCausalLM

    paths = []
    for i, size in enumerate((23, 20, 21)):
        torch.manual_seed(i)
        config = LlamaConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
        )
        paths.append(tmp_path / f"m{i}")
        LlamaForCausalLM(config).save_pretrained(paths[-1])
    recipe = {"merge_method": "linear", "models": paths[:2]}
    with pytest.raises(ProblemsError, match=r"is \[23, 16\] in .*m0 but \[20, 16\] in .*m1.*'vocab: crop'"):
        stockpot.plan(recipe)
    pieces = [{"sources": [{"model": str(p), "layer_range": [0, 1]}]} for p in paths[:2]]
    slices: dict[str, Any] = {"slices": pieces}
    for method in (
        {"merge_method": "linear", "models": paths},
        {"merge_method": "ties", "base_model": paths[2], "models": paths[:2], "parameters": {"density": 0.5}},
        {"merge_method": "slerp", "models": paths[:2], "parameters": {"t": 0.5}},
        {**slices, "merge_method": "passthrough"},
    ):
        planned = stockpot.plan({**method, "vocab": "crop"})
        assert any("are cut to the 20 that all models have" in note for note in planned.notes)
        result = stockpot.merge({**method, "vocab": "crop"}, tmp_path / "out", overwrite=True)
        model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
        assert model.config.vocab_size == model.lm_head.weight.shape[0] == 20
        assert result.path
    exact = sum(load(p)["model.embed_tokens.weight"][:20].double() for p in paths) / 3
    stockpot.merge({"merge_method": "linear", "models": paths, "vocab": "crop"}, tmp_path / "one")
    assert torch.allclose(load(tmp_path / "one")["model.embed_tokens.weight"].double(), exact, atol=1e-7)
    stockpot.verify(tmp_path / "one")


def test_only_rows_of_vocabularies_are_cropped(tmp_path: Path) -> None:
    """`vocab: crop` is no leave to cut other tensors, or other dimensions."""
    for model, vocabulary, inner in (
        ("a", (9, 4), (6, 4)),
        ("rows", (8, 4), (5, 4)),
        ("width", (8, 3), (6, 4)),
        ("good", (8, 4), (6, 4)),
    ):
        tensors = {"model.embed_tokens.weight": torch.ones(vocabulary), "model.layers.0.mlp.weight": torch.ones(inner)}
        write_model(tmp_path / model, tensors, CONFIG | {"architectures": ["LlamaModel"]})
    for other, message in (
        ("rows", r"'model.layers.0.mlp.weight' is \[6, 4\] in .* but \[5, 4\] in "),
        ("width", r"'model.embed_tokens.weight' is \[9, 4\] in .* but \[8, 3\] in "),
    ):
        with pytest.raises(InputError, match=message) as raised:
            stockpot.plan({"merge_method": "linear", "models": [tmp_path / "a", tmp_path / other], "vocab": "crop"})
        assert "vocab: crop" not in str(raised.value)
    planned = stockpot.plan({"merge_method": "linear", "models": [tmp_path / "a", tmp_path / "good"], "vocab": "crop"})
    assert {t.name: t.spec.shape for t in planned.tensors} == {
        "model.embed_tokens.weight": (8, 4),
        "model.layers.0.mlp.weight": (6, 4),
    }
