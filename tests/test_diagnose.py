"""`stockpot diagnose`: measures against their definitions, what they are taken to say, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stockpot
from stockpot.diagnosis import THRESHOLDS, Diagnosis, judge
from stockpot.testing.models import write_model

from helpers import cli

SHAPES = {"model.embed_tokens.weight": (50, 32), "model.norm.weight": (32,)} | {
    f"model.layers.{i}.{x}.weight": (48, 32) for i in range(3) for x in ("self_attn.q_proj", "mlp.up_proj")
}


def drawn(seed: int, scale: float = 0.5) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def near(base: dict[str, Any], seed: int, scale: float = 0.005, share: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        n: v + (scale * rng.standard_normal(v.shape) * (rng.random(v.shape) < share)).astype(np.float32)
        for n, v in base.items()
    }


class Shelf:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.values: dict[str, dict[str, Any]] = {}

    def put(self, name: str, values: dict[str, Any]) -> str:
        self.values[name] = values
        return write_model(str(self.root / name), values, "F32")

    def recipe(self, *names: str, base: str | None = "base", **more: Any) -> dict[str, Any]:
        doc: dict[str, Any] = {"merge_method": "linear", "models": [str(self.root / n) for n in names], **more}
        return doc | ({"base_model": str(self.root / base)} if base else {})


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    made = Shelf(tmp_path / "models")
    made.put("base", drawn(0))
    for i, name in enumerate("abc"):
        made.put(name, near(made.values["base"], i + 1))
    return made


def said(d: Diagnosis) -> tuple[list[str], dict[str, bool]]:
    findings, advice = judge(d)
    return [f"{f.level}: {f.text}" for f in findings], {m: a.fits for a in advice for m in a.methods}


def test_measures_are_what_they_are_called(shelf: Shelf) -> None:
    d = stockpot.diagnose(shelf.recipe("a", "b", "c"), threads=3)
    base = shelf.values["base"]
    flat = {n: np.stack([shelf.values[m][n].astype(np.float64) - base[n] for m in "abc"]).reshape(3, -1) for n in base}

    def check(found: Any, names: list[str]) -> None:
        delta = np.concatenate([flat[n] for n in names], axis=1)
        origin = np.concatenate([base[n].ravel().astype(np.float64) for n in names])
        norms = np.linalg.norm(delta, axis=1)
        for i in range(3):
            assert found.norm(i) == pytest.approx(norms[i], rel=1e-4)
            assert found.relative(i) == pytest.approx(norms[i] / np.linalg.norm(origin), rel=1e-4)
            weights = origin + delta[i]
            to_base = weights @ origin / np.linalg.norm(weights) / np.linalg.norm(origin)
            assert found.to_base(i) == pytest.approx(to_base, rel=1e-5)
            for j in range(3):
                assert found.cosine(i, j) == pytest.approx(delta[i] @ delta[j] / norms[i] / norms[j], abs=1e-4)
        moved = delta.astype(np.float32) != 0
        assert found.changed.tolist() == moved.sum(1).tolist()
        shared = moved.sum(0) > 1
        conflicts = (delta > 0).any(0) & (delta < 0).any(0)
        assert found.conflict_rate == pytest.approx(conflicts.sum() / shared.sum())
        assert found.elements == delta.shape[1]

    check(d.summed(), list(base))
    assert list(d.by_layer()) == [0, 1, 2, None]
    check(d.by_layer()[1], [n for n in base if ".1." in n])
    assert set(d.by_kind()) == {"self_attn.q_proj", "mlp.up_proj", "model.embed_tokens", "model.norm"}
    check(d.by_kind()["mlp.up_proj"], [n for n in base if "up_proj" in n])
    again = stockpot.diagnose(shelf.recipe("a", "b", "c"), threads=1)
    assert np.array_equal(again.summed().products, d.summed().products)


def test_large_tensors_come_in_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal(1_200_003).astype(np.float32)}
    shelf = Shelf(tmp_path)
    shelf.put("base", base)
    shelf.put("a", {"w": base["w"] + np.float32(0.05)})
    shelf.put("b", {"w": base["w"] + (0.01 * rng.standard_normal(1_200_003)).astype(np.float32)})
    total = stockpot.diagnose(shelf.recipe("a", "b")).summed()
    assert total.elements == 1_200_003
    assert int(total.large[0]) == 1_200_003
    wide = shelf.values["b"]["w"].astype(np.float64) - base["w"]
    assert total.norm(1) == pytest.approx(np.linalg.norm(wide), rel=1e-4)
    assert int(total.large[1]) == np.count_nonzero(np.abs(wide.astype(np.float32)) > np.float32(0.03))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_the_same_without_kernels(tmp_path: Path, dtype: str) -> None:
    from stockpot.engine.native import load_kernels, numpy_only

    assert load_kernels() is not None
    rng = np.random.default_rng(0)
    shape = (211, 1037)  # no whole tiles
    base = rng.standard_normal(shape).astype(np.float32)
    made = {"base": base, "same": base}
    for i, name in enumerate("abc"):
        moved = rng.random(shape) < 0.5
        made[name] = base + (0.02 * (i + 1) * rng.standard_normal(shape) * moved).astype(np.float32)
    for name, values in made.items():
        write_model(str(tmp_path / name), {"w": values}, dtype)
    # two of a kind among them
    recipe = {"merge_method": "linear", "models": [str(tmp_path / n) for n in ("a", "b", "c", "a", "same")]}
    recipe["base_model"] = str(tmp_path / "base")
    found = stockpot.diagnose(recipe)
    with numpy_only():
        plain = stockpot.diagnose(recipe)
    assert found.equal == plain.equal == ((0, 3),)
    one, two = found.summed(), plain.summed()
    assert np.allclose(one.products, two.products, rtol=1e-5, atol=1e-3)
    for what in ("changed", "large"):
        assert getattr(one, what).tolist() == getattr(two, what).tolist()
    assert (one.shared, one.conflicts, one.elements) == (two.shared, two.conflicts, two.elements)
    assert min(one.shared, one.conflicts, *one.changed[:4], *one.large[:4]) > 1000


def test_fine_tunes_of_unrelated_tasks(shelf: Shelf) -> None:
    findings, fits = said(stockpot.diagnose(shelf.recipe("a", "b", "c")))
    assert not [f for f in findings if not f.startswith("note")]
    assert fits["task_arithmetic"]
    assert not fits["linear"]
    assert fits["dare_ties"]
    assert fits["sce"]  # 75 % of three unrelated tasks' elements conflict


def test_runs_of_one_task(shelf: Shelf) -> None:
    common = near(shelf.values["base"], 9, 0.02)
    for i, name in enumerate("xy"):
        shelf.put(name, near(common, 20 + i, 0.004))
    _, fits = said(stockpot.diagnose(shelf.recipe("x", "y")))
    assert fits["model_stock"]
    assert not fits["task_arithmetic"]
    assert not fits["ties"]


def test_a_model_that_is_the_base_and_one_twice(shelf: Shelf) -> None:
    shelf.put("same", shelf.values["base"])
    shelf.put("copy", shelf.values["a"])
    almost = {n: v.copy() for n, v in shelf.values["b"].items()}
    almost["model.norm.weight"][0] += np.float32(1e-4)
    shelf.put("almost", almost)
    findings, _ = said(stockpot.diagnose(shelf.recipe("a", "same", "copy", "b", "almost")))
    text = "\n".join(findings)
    assert "stop: " + str(shelf.root / "same") + " is the base: it adds nothing" in text
    assert f"{shelf.root / 'a'} and {shelf.root / 'copy'} are the same to the last bit" in text
    assert f"{shelf.root / 'b'} and {shelf.root / 'almost'} are nearly the same" in text
    assert findings[0].startswith("stop")


def test_models_of_another_base(shelf: Shelf) -> None:
    shelf.put("stranger", drawn(77))
    findings, fits = said(stockpot.diagnose(shelf.recipe("a", "stranger")))
    assert any(f.startswith("stop") and "stranger is no fine-tune of" in f for f in findings)
    assert not fits["ties"]
    assert not fits["linear"]
    shelf.put("further", near(shelf.values["base"], 5, 0.1))
    findings, fits = said(stockpot.diagnose(shelf.recipe("a", "further")))
    assert any("continued pretraining" in f for f in findings)
    assert any("the largest delta is" in f for f in findings)
    assert not fits["dare_linear"]


def test_opposite_and_sparse_changes(shelf: Shelf) -> None:
    base, one = shelf.values["base"], near(shelf.values["base"], 3, 0.005, 0.05)
    shelf.put("one", one)
    shelf.put("other", {n: base[n] - (one[n] - base[n]) for n in base})
    findings, fits = said(stockpot.diagnose(shelf.recipe("one", "other")))
    assert any("undo one another" in f for f in findings)
    assert sum("leaves 9" in f for f in findings) == 2
    assert fits["ram"]


def test_without_a_base_the_first_model_is_it(shelf: Shelf) -> None:
    d = stockpot.diagnose(shelf.recipe("a", "b", "c", base=None))
    assert d.reference
    assert d.models == (str(shelf.root / "b"), str(shelf.root / "c"))
    assert d.base == str(shelf.root / "a")
    shelf.put("again", shelf.values["a"])
    findings, _ = said(stockpot.diagnose(shelf.recipe("a", "again", base=None)))
    assert any("is the first model: it adds nothing" in f for f in findings)


def test_what_can_not_be_compared_is_said(shelf: Shelf, tmp_path: Path) -> None:
    for recipe, why in [
        (shelf.recipe("a", base=None), "name two, or a base_model"),
        (shelf.recipe("base"), "names no model but the base"),
        ({"merge_method": "linear", "run": {"path": str(tmp_path), "last": 2}}, "stockpot run show"),
        (
            "merge_method: linear\nname: x\nmodels: [a, b]\n---\nmerge_method: linear\nmodels: [x, c]\n",
            "takes one recipe",
        ),
        (shelf.recipe("a", "nothing"), "nothing"),
    ]:
        with pytest.raises(stockpot.StockpotError, match=why):
            stockpot.diagnose(recipe)
    apart = {
        "merge_method": "passthrough",
        "base_model": str(shelf.root / "base"),
        "slices": [
            {"sources": [{"model": str(shelf.root / n), "layer_range": [i, i + 1]}]} for i, n in enumerate("abc")
        ],
    }
    with pytest.raises(stockpot.StockpotError, match="slices have models of their own"):
        stockpot.diagnose(apart)


def test_parameters_do_not_matter_and_slices_do(shelf: Shelf) -> None:
    recipe = shelf.recipe(
        "a", "b", merge_method="ties", parameters={"density": [0.1, 0.9], "weight": 0.3}, dtype="bfloat16"
    )
    d = stockpot.diagnose(recipe)
    assert len(d.tensors) == len(SHAPES)
    left_out = stockpot.diagnose({**recipe, "exclude": ["model.embed_tokens.weight"]})
    assert "model.embed_tokens.weight" not in left_out.tensors
    assert left_out.copied == 1


def test_the_docs_have_the_thresholds_that_are_used() -> None:
    page = Path(__file__).parents[1] / "docs/diagnosis.md"
    if not page.exists():
        pytest.skip("not a source checkout")
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    assert rows == [f"| `{name}` | {value:g} | {about} |" for name, (value, about) in THRESHOLDS.items()]


def test_a_share_of_large_changes_between_says_nothing_of_dropping(shelf: Shelf) -> None:
    for name, share, fits in (("few", 0.0, True), ("some", 0.004, None), ("many", 0.02, False)):
        rng = np.random.default_rng(8)
        values = near(shelf.values["base"], 9, 0.001)
        far = {n: v + np.where(rng.random(v.shape) < share, np.float32(0.05), np.float32(0)) for n, v in values.items()}
        shelf.put(name, far)
        _, fitting = said(stockpot.diagnose(shelf.recipe(name)))
        assert fitting.get("dare_linear") is fits


def test_conflicts_by_chance_few_and_many(shelf: Shelf) -> None:
    base = shelf.values["base"]
    ups = {n: np.abs(v) * np.float32(0.01) + np.float32(1e-4) for n, v in base.items()}
    shelf.put("up", {n: base[n] + u for n, u in ups.items()})
    shelf.put("alike", {n: base[n] + u * np.float32(0.5) for n, u in ups.items()})
    shelf.put("half", {n: base[n] + u * _signs(u.shape, 0.2) for n, u in ups.items()})
    shelf.put("against", {n: base[n] + u * _signs(u.shape, 0.5) for n, u in ups.items()})
    for other, fits in (("alike", False), ("against", True)):  # rates of 0 and 1/2
        _, advice = judge(stockpot.diagnose(shelf.recipe("up", other)))
        assert [a.fits for a in advice if a.methods[0] == "ties" and "conflicts" in a.why] == [fits]
    _, advice = judge(stockpot.diagnose(shelf.recipe("up", "half")))  # 0.2 of a half that chance gives
    assert not [a for a in advice if "conflicts" in a.why]


def _signs(shape: tuple[int, ...], against: float) -> Any:
    return np.where(np.random.default_rng(1).random(shape) < against, np.float32(-1), np.float32(1))


def test_a_base_of_zeros_and_progress(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put("base", {n: np.zeros(s, np.float32) for n, s in SHAPES.items()})
    shelf.put("a", near(shelf.values["base"], 1))
    seen: list[tuple[int, int]] = []
    d = stockpot.diagnose(shelf.recipe("a"), progress=lambda done, total: seen.append((done, total)))
    assert d.summed().relative(0) is None
    assert not any("moved by" in f or "no fine-tune" in f for f in said(d)[0])
    whole = sum(int(np.prod(s)) for s in SHAPES.values())
    assert seen[-1] == (whole, whole)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_layers_of_two_stacks_are_not_one(tmp_path: Path) -> None:
    names = [f"{side}.block.{i}.layer.0.wo.weight" for side in ("encoder", "decoder") for i in range(2)]
    rng = np.random.default_rng(0)
    base = {n: rng.standard_normal((8, 8)).astype(np.float32) for n in [*names, "shared.weight"]}
    shelf = Shelf(tmp_path)
    shelf.put("base", base)
    shelf.put("a", near(base, 1))
    d = stockpot.diagnose(shelf.recipe("a"))
    assert list(d.by_layer()) == ["decoder.block.0", "decoder.block.1", "encoder.block.0", "encoder.block.1", None]
    assert d.by_layer()["encoder.block.1"].elements == 64
    assert {k: v.tensors for k, v in d.by_kind().items()} == {"layer.0.wo": 4, "shared": 1}


def test_what_is_not_compared_is_said(shelf: Shelf, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(shelf.recipe("a", "b", exclude=["model.norm.weight"])))
    assert "tensors not compared: 1 (" in cli("diagnose", path).stdout
    path.write_text(json.dumps(shelf.recipe("a", "b")))
    assert "tensors not compared" not in cli("diagnose", path).stdout


def test_on_the_command_line(shelf: Shelf, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(shelf.recipe("a", "b", "base")))
    done = cli("diagnose", path, "--quiet")
    assert done.returncode == 0, done.stderr
    assert "cosines between deltas:" in done.stdout
    assert "fits: task_arithmetic, ties: deltas have a mean cosine" in done.stdout
    assert "[independent 0.05]" in done.stdout
    as_json = json.loads(cli("diagnose", path, "--json").stdout)
    assert as_json["models"] == [str(shelf.root / n) for n in "ab"]
    assert len(as_json["layers"]) == 4
    assert as_json["total"]["cosines"][0][0] == 1
    assert as_json["thresholds"]["independent"]["value"] == 0.05
    assert {a["by"] for a in as_json["advice"]} <= {"", *as_json["thresholds"]}
    assert cli("diagnose", path, "--html", tmp_path / "no" / "page.html").returncode != 0
    wrong = cli("diagnose", path, "--html", tmp_path)
    assert "is a directory; name a file" in wrong.stderr


def test_the_page(shelf: Shelf, tmp_path: Path) -> None:
    strange = "<b>odd\u202e"
    shelf.put(strange, near(shelf.values["base"], 6))
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(shelf.recipe("a", strange)))
    page = tmp_path / "page.html"
    done = cli("diagnose", path, "--html", page, "--quiet")
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.count("<svg") >= 5
    assert "<b>odd" not in text
    assert "&lt;b&gt;odd" in text
    assert "\u202e" not in text
    assert "Content-Security-Policy" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert text.count("Cosines between deltas") >= 2
