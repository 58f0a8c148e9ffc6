"""Where a statistic holds is decided in the plan, once: on disk, in memory and in a sweep the same."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch

import stockpot
from stockpot.engine.candidates import CheckpointCache, make_candidate
from stockpot.errors import RecipeError
from stockpot.methods import Flag, PerModel, Rank, Real, Scope, Space, Total, method
from stockpot.methods.declaration import _REGISTRY
from stockpot.testing.models import CUT, read_model, state, write_model
from test_engine import METHODS, text_of

from helpers import load


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose last layer changed ten times as much: a cutoff over the model is none of any tensor's own."""
    root = tmp_path_factory.mktemp("uneven")
    base = state(CUT, 0)
    write_model(str(root / "base"), base)
    for seed, name in enumerate("abc", 1):
        change = state(CUT, seed, 0.002)
        write_model(str(root / name), {n: base[n] + d * (10 if "layers.1" in n else 1) for n, d in change.items()})
    return root


VARIANTS = {
    "plain": "",
    "gradient": "gradient",
    "rule": "rules:\n  - match: '*layers.1*'\n    parameters: {lambda: 0.5}\n",
    "another method": "rules:\n  - match: '*layers.1*'\n    merge_method: linear\n    parameters: {weight: 1.0}\n",
}


def recipe_of(name: str, variant: str, root: Path) -> str | None:
    text = text_of(name, root)
    extra = VARIANTS[variant]
    if "slices" in text:
        return None if extra else text.replace("[0, 3]", "[0, 2]").replace("[1, 4]", "[1, 2]")
    if extra == "gradient":
        return (
            None
            if "lambda" not in text and name in ("linear", "slerp")
            else text.replace("parameters: {density", "parameters: {lambda: [0.5, 1.0], density")
        )
    if "lambda" in extra and name in ("linear", "slerp"):
        return None
    return text + extra


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", METHODS)
def test_a_candidate_is_what_is_published(uneven: Path, tmp_path: Path, name: str, variant: str) -> None:
    text = recipe_of(name, variant, uneven)
    if text is None:
        pytest.skip("has no such parameter")
    stockpot.merge(text, tmp_path / "out", stockpot.Options(threads=2))
    planned = stockpot.plan(text)
    candidate = make_candidate(planned, CheckpointCache(2**30), threads=2)
    disk = (tmp_path / "out/model.safetensors").read_bytes()
    for t in planned.tensors:
        assert candidate.tensors[t.name][1].tobytes() == disk[t.offset : t.offset + t.spec.nbytes], t.name


def test_another_dialect_by_a_rule_is_what_it_is_alone(uneven: Path, tmp_path: Path) -> None:
    """Beside a main method that trims over the whole model: nothing of that reaches the rule's tensors."""
    models = f"base_model: {uneven}/base\nmodels: [{uneven}/a, {uneven}/b]\n"
    rule = "rules:\n  - match: '*mlp*'\n    parameters: {dialect: mergekit, density: 1.0}\n"
    stockpot.merge("merge_method: ties\nparameters: {dialect: mergekit, density: 1.0}\n" + models, tmp_path / "alone")
    stockpot.merge(
        "merge_method: ties\nparameters: {dialect: paper, density: 0.2}\n" + rule + models, tmp_path / "rule"
    )
    stockpot.merge(
        "merge_method: ties\nparameters: {dialect: paper, density: 0.2}\nexclude: '*mlp*'\n" + models, tmp_path / "rest"
    )
    alone, ruled, rest, base = (
        load(p) for p in (tmp_path / "alone", tmp_path / "rule", tmp_path / "rest", uneven / "base")
    )
    for name in base:
        assert torch.equal(ruled[name], (alone if "mlp" in name else rest)[name]), name
    planned = stockpot.plan("merge_method: ties\nparameters: {dialect: paper, density: 0.2}\n" + rule + models)
    (cutoff, majority) = planned.stats
    assert {planned.tensors[i].name for i in cutoff.spans[0]} == {n for n in base if "mlp" not in n}
    assert majority.spans == cutoff.spans


def test_one_density_for_one_cutoff(uneven: Path) -> None:
    text = (
        f"merge_method: ties\nparameters: {{dialect: paper, density: 0.2}}\nbase_model: {uneven}/base\n"
        f"models: [{uneven}/a]\nrules:\n  - match: '*mlp*'\n    parameters: {{density: 0.3}}\n"
    )
    with pytest.raises(RecipeError, match="one cutoff over the whole model needs one density for all tensors, got 2"):
        stockpot.plan(text)


# extents of a user's own statistics


def _energy(delta: Any, **_: Any) -> Any:
    return delta.astype(np.float64) ** 2


def _rows_energy(delta: Any, *, cutoff: Any, **_: Any) -> Any:
    return np.where(abs(delta) >= cutoff, delta, 0).astype(np.float64) ** 2


@pytest.fixture
def extents() -> Iterator[None]:
    def declare(extent: str) -> None:
        @method(space=Space.DELTA, stats=(Total("energy", of=_energy, over=extent),))  # type: ignore[arg-type]
        def by_extent(delta: Any, *, energy: Any, sign: Annotated[bool, Flag()] = True) -> Any:
            """energy, sign."""
            return delta.sum(0) * 0 + float(energy.sum())

        _REGISTRY[f"by_{extent}"] = _REGISTRY.pop("by_extent")
        object.__setattr__(_REGISTRY[f"by_{extent}"], "name", f"by_{extent}")

    for extent in ("tensor", "layer", "group", "model"):
        declare(extent)

    @method(
        space=Space.DELTA,
        scope=Scope.ROW,
        stats=(Rank("density", over="row"), Total("energy", of=_rows_energy)),
    )
    def rows(delta: Any, *, cutoff: Any, energy: Any, density: Annotated[PerModel, Real(0, 1)] = 0.5) -> Any:
        """A sum over the tensor of what each row keeps."""
        return delta.sum(0) * 0 + float(energy.sum())

    yield
    for name in ("by_tensor", "by_layer", "by_group", "by_model", "rows"):
        _REGISTRY.pop(name, None)


@pytest.mark.parametrize("extent", ["tensor", "layer", "group", "model"])
@pytest.mark.usefixtures("extents")
def test_extents(uneven: Path, tmp_path: Path, extent: str) -> None:
    text = (
        f"merge_method: by_{extent}\nbase_model: {uneven}/base\nmodels: [{uneven}/a, {uneven}/b]\nout_dtype: float32\n"
        "rules:\n  - match: '*flat'\n    parameters: {sign: false}\n"
    )
    stockpot.merge(text, tmp_path / "out", stockpot.Options(threads=3))
    base, a, b, merged = (read_model(str(p)) for p in (uneven / "base", uneven / "a", uneven / "b", tmp_path / "out"))
    own = {n: ((a[n] - base[n]) ** 2).sum() + ((b[n] - base[n]) ** 2).sum() for n in base}

    def alike(n: str) -> list[str]:
        if extent == "layer":
            stack = ".".join(n.split(".")[:3])
            return [m for m in base if m.startswith(stack + ".")] if n.startswith("model.layers") else [n]
        if extent == "group":
            return [m for m in base if (m == "model.flat") == (n == "model.flat")]
        return list(base) if extent == "model" else [n]

    for n in base:
        expected = sum(own[m] for m in alike(n))
        np.testing.assert_allclose(merged[n], base[n] + expected, rtol=1e-5)
    candidate = make_candidate(stockpot.plan(text), CheckpointCache(2**30))
    disk = (tmp_path / "out/model.safetensors").read_bytes()
    for t in stockpot.plan(text).tensors:
        assert candidate.tensors[t.name][1].tobytes() == disk[t.offset : t.offset + t.spec.nbytes]


@pytest.mark.usefixtures("extents")
def test_a_total_over_the_tensor_of_what_rows_keep(uneven: Path, tmp_path: Path) -> None:
    text = (
        f"merge_method: rows\nbase_model: {uneven}/base\nmodels: [{uneven}/a]\nout_dtype: float32\n"
        "parameters: {density: 0.37}\n"
    )
    stockpot.merge(text, tmp_path / "one", stockpot.Options(threads=1))
    stockpot.merge(text, tmp_path / "three", stockpot.Options(threads=3))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "three/model.safetensors").read_bytes()
    base, a, merged = (read_model(str(p)) for p in (uneven / "base", uneven / "a", tmp_path / "one"))
    for n in base:
        d = (a[n] - base[n]).reshape(len(base[n]) if base[n].ndim > 1 else 1, -1)
        keep = max(int(0.37 * d.shape[1]), 1)
        cut = np.sort(np.abs(d).astype(np.float32), axis=1)[:, -keep][:, None]
        energy = (np.where(np.abs(d) >= cut, d, 0) ** 2).sum()
        np.testing.assert_allclose(merged[n], base[n] + energy, rtol=1e-5, err_msg=n)


def test_stat_plans_groups_and_tensors_pickle(uneven: Path) -> None:
    planned = stockpot.plan(text_of("ties paper", uneven))
    for thing in (planned.stats, planned.groups, planned.tensors, planned.shards, planned.budget):
        assert pickle.loads(pickle.dumps(thing)) == thing


RUN = """
import pickle, sys
from stockpot.engine.devices import NumpyDevice
from stockpot.engine.run import run_plan
with open(sys.argv[1], "rb") as f:
    plan = pickle.load(f)
outcome = run_plan(plan, sys.argv[2], NumpyDevice())
outcome.release()
print(outcome.partial)
"""


@pytest.mark.parametrize("name", ["linear", "ties paper", "dare_ties mergekit", "slerp"])
def test_a_plan_is_run_by_another_process(uneven: Path, tmp_path: Path, name: str) -> None:
    """What was planned travels as data: references, headers, statistics; whoever runs it opens the files."""
    import subprocess
    import sys

    planned = stockpot.plan(text_of(name, uneven))
    planned.inputs[0].checkpoint.place(next(iter(planned.inputs[0].checkpoint.names())))  # with a file open
    (tmp_path / "plan").write_bytes(pickle.dumps(planned))
    stockpot.merge(text_of(name, uneven), tmp_path / "here")
    arguments = [sys.executable, "-c", RUN, str(tmp_path / "plan"), str(tmp_path / "there")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    there = Path(done.stdout.strip()) / "model.safetensors"
    assert there.read_bytes() == (tmp_path / "here/model.safetensors").read_bytes()
    again = pickle.loads(pickle.dumps(planned))
    assert again.identity == planned.identity
    for model in again.inputs:
        assert model.checkpoint._fds == {}


def test_plans_of_computed_models_travel(uneven: Path, lora_run: Path, tiny_llama: Path) -> None:
    steps = f"name: x\nmerge_method: linear\nmodels: [{uneven}/a, {uneven}/b]\n---\nmerge_method: linear\nmodels: [x]\n"
    for recipe in (
        steps,
        stockpot.soup_recipe(lora_run, adapter="product"),
        stockpot.soup_recipe(lora_run, adapter="fused", base=tiny_llama),
        f"merge_method: linear\nmodels: ['{tiny_llama}+{lora_run}/checkpoint-4']\n",
    ):
        planned = stockpot.plan(recipe)
        again = pickle.loads(pickle.dumps(planned))
        assert again.identity == planned.identity
        one, two = (make_candidate(p, CheckpointCache(2**30)) for p in (planned, again))
        assert one.digest == two.digest
