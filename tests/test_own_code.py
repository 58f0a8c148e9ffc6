"""A method in a file that the recipe names: only where code is allowed, and without touching stockpot's own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import stockpot
from stockpot.methods import methods

from helpers import cli, load

CODE = '''
from typing import Annotated, Any

from stockpot.methods import PerModel, Rank, Real, Space, method
from stockpot.methods.arrays import add_rows, column, keep_where, magnitude


@method(space=Space.DELTA, stats=(Rank("density"),), neutral={"density": 1.0})
def loudest(delta: Any, *, cutoff: Any, density: Annotated[PerModel, Real(0, 1)] = 0.5) -> Any:
    """Sum of the largest changes.

    delta    [m, *block]  model minus base
    cutoff   [m]          smallest |delta| kept, from `density`
    density  [m]          kept fraction
    returns  [*block]
    """
    size = magnitude(delta)
    return FACTOR * add_rows(keep_where(delta, size >= column(cutoff, size)))
'''


@pytest.fixture
def recipe(family: Path, tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE.replace("FACTOR", "1.0"))
    path = tmp_path / "recipe.yml"
    path.write_text(
        f"merge_method: ./mine.py:loudest\nbase_model: {family}/base\nmodels: [{family}/a, {family}/b]\n"
        "parameters: {density: 0.4}\n"
    )
    return path


def test_only_where_it_is_allowed(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + CODE.replace("FACTOR", "1.0"))
    refused = cli("merge", recipe, tmp_path / "out")
    assert refused.returncode == 2
    assert (
        "recipe.yml:1: merge_method './mine.py:loudest' is code in a file, which is run only with --allow-code"
        in refused.stderr
    )
    assert not (tmp_path / "ran").exists()
    planned = cli("plan", recipe, "--allow-code")
    assert planned.returncode == 0, planned.stderr
    assert (tmp_path / "ran").exists()
    done = cli("merge", recipe, tmp_path / "out", "--allow-code")
    assert done.returncode == 0, done.stderr
    assert "is loudest of" in done.stderr
    lineage = json.loads((tmp_path / "out/stockpot.json").read_text())
    assert "./mine.py:loudest" in lineage["recipe"]["text"]
    assert lineage["groups"][0]["method"].startswith("loudest@")
    assert cli("verify", tmp_path / "out").returncode == 0


def test_it_is_the_method_that_it_says(recipe: Path, family: Path, tmp_path: Path) -> None:
    allowed = stockpot.Options(allow_code=True)
    stockpot.merge(recipe, tmp_path / "out", allowed)
    kept = {
        "merge_method": "task_arithmetic",
        "base_model": str(family / "base"),
        "models": [str(family / "a"), str(family / "b")],
    }
    trimmed = {**kept, "merge_method": "ties", "parameters": {"density": 0.4, "normalize": False}}
    stockpot.merge(trimmed, tmp_path / "ties")
    ours, ties, base = load(tmp_path / "out"), load(tmp_path / "ties"), load(family / "base")
    assert any(not torch.equal(ours[n], ties[n]) for n in ours)  # no election
    for name, start in base.items():
        if not start.is_floating_point():
            continue
        total = torch.zeros_like(start, dtype=torch.float64)
        for other in ("a", "b"):
            delta = load(family / other)[name].double() - start.double()
            keep = max(int(0.4 * delta.numel()), 1)
            least = delta.abs().float().flatten().sort().values[delta.numel() - keep]
            total += delta * (delta.abs().float() >= least)
        assert torch.allclose(
            ours[name].double(), start.double() + total, atol=2e-2 * float(start.double().abs().max())
        )


def test_a_file_that_changed_is_read_again_and_its_work_is_not_gone_on_with(recipe: Path, tmp_path: Path) -> None:
    allowed = stockpot.Options(allow_code=True)
    first = stockpot.plan(recipe, allowed)
    assert stockpot.plan(recipe, allowed).identity == first.identity
    (tmp_path / "mine.py").write_text(CODE.replace("FACTOR", "2.0"))
    second = stockpot.plan(recipe, allowed)
    assert second.identity != first.identity
    assert "loudest" not in methods()
    assert first.groups[0].method is not second.groups[0].method
    # and the one that was planned first is still what it was
    assert first.groups[0].method([{"x": torch.ones(4)}], base={"x": torch.zeros(4)})["x"].tolist() == [1, 1, 1, 1]
    assert second.groups[0].method([{"x": torch.ones(4)}], base={"x": torch.zeros(4)})["x"].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("code", "reference", "why"),
    [
        (None, "./mine.py:loudest", "can't be read"),
        ("x = 1\n", "./mine.py:loudest", "it declares none"),
        (CODE.replace("FACTOR", "1.0"), "./mine.py:loudst", "did you mean 'loudest'"),
        ("\n\n1 / 0\n", "./mine.py:loudest", "mine.py:3: ZeroDivisionError"),
        (
            CODE.replace("FACTOR", "1.0").replace("def loudest", "def ties"),
            "./mine.py:ties",
            "a method named 'ties' exists already",
        ),
        (
            CODE.replace('Rank("density")', 'Rank("densty")'),
            "./mine.py:loudest",
            "refers to 'densty', which is no parameter",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    recipe: Path, tmp_path: Path, code: str | None, reference: str, why: str
) -> None:
    before = {n: m for n, m in methods().items() if "@" not in n}
    (tmp_path / "mine.py").unlink()
    if code is not None:
        (tmp_path / "mine.py").write_text(code)
    recipe.write_text(recipe.read_text().replace("./mine.py:loudest", reference))
    with pytest.raises(stockpot.StockpotError, match=why):
        stockpot.plan(recipe, stockpot.Options(allow_code=True))
    assert {n: m for n, m in methods().items() if "@" not in n} == before


def test_rules_and_steps_may_name_files_too(family: Path, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(
        f"name: first\nmerge_method: mine.py:loudest\nbase_model: {family}/base\nmodels: [{family}/a]\n---\n"
        f"merge_method: task_arithmetic\nbase_model: {family}/base\nmodels: [first, {family}/b]\n"
        "rules: [{match: '*mlp*', merge_method: mine.py:loudest}]\n"
    )
    with pytest.raises(stockpot.StockpotError, match="run only with --allow-code"):
        stockpot.plan(recipe)
    planned = stockpot.plan(recipe, stockpot.Options(allow_code=True))
    named = {g.method.name.partition("@")[0] for g in planned.groups}
    assert named == {"task_arithmetic", "loudest"}


def test_a_sweep_says_what_to_do_instead(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "suite.yml").write_text(
        "slices: [{name: x, kind: command, metric: value, direction: max, command: 'echo {split}'}]\n"
    )
    with pytest.raises(stockpot.StockpotError, match=r"installed packages \(entry point stockpot.methods\) only"):
        stockpot.sweep(None, tmp_path / "found", tmp_path / "suite.yml", recipe=recipe, grid={"density": [0.5]})


def test_a_file_is_run_once_and_named_by_its_digest(recipe: Path, tmp_path: Path) -> None:
    text = CODE.replace("FACTOR", "1.0") + f"\nopen({str(tmp_path / 'runs')!r}, 'a').write('x')\n"
    (tmp_path / "mine.py").write_text(text)
    allowed = stockpot.Options(allow_code=True)
    notes = stockpot.plan(recipe, allowed).notes
    stockpot.plan(recipe, allowed)
    assert (tmp_path / "runs").read_text() == "x"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert any(f"(SHA-256 {digest}...)" in n for n in notes)


def test_methods_of_a_file_may_stand_in_for_one_another(recipe: Path, family: Path, tmp_path: Path) -> None:
    rest = '''

@method(space=Space.DELTA, neutral={})
def none_of_it(delta: Any) -> Any:
    """Nothing: the base.

    delta    [m, *block]  model minus base
    returns  [*block]     zeros
    """
    return add_rows(delta * 0)
'''
    code = CODE.replace("FACTOR", "1.0").replace("neutral=", 'applies=("matrix",), otherwise="none_of_it", neutral=')
    head, declared = code.split("\n\n\n", 1)
    (tmp_path / "mine.py").write_text(head + rest + "\n\n" + declared)
    stockpot.merge(recipe, tmp_path / "out", stockpot.Options(allow_code=True))
    base, out = load(family / "base"), load(tmp_path / "out")
    changed = {n.split(".")[-2] for n in out if not torch.equal(out[n], base[n])}
    assert changed
    for name, value in out.items():
        if value.dim() == 1 or "embed" in name:
            assert torch.equal(value, base[name]), name
