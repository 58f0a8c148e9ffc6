"""What `@method` refuses, and that what it accepts is kept end to end."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch

import stockpot
from stockpot.errors import ArgumentError, CheckpointError, MismatchError, ProblemsError, RecipeError, StockpotError
from stockpot.methods import (
    Choice,
    Companion,
    Cost,
    Gram,
    Mask,
    Normal,
    PerLayer,
    PerModel,
    Rank,
    Real,
    Scope,
    Space,
    Text,
    Total,
    Uniform,
    Whole,
    fisher,
    get_method,
    method,
    methods,
)
from stockpot.methods.backends import backend_of
from stockpot.methods.declaration import _REGISTRY
from stockpot.methods.forms import Form
from stockpot.testing import method_checks
from stockpot.testing.models import WHOLE, read_model, state, write_model

Density = Annotated[PerModel, Real(0, 1)]
FREE = Cost(lambda m, shape, size: 0)


pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def models(tmp_path: Path) -> str:
    """The part of a recipe that names a base and two models of all kinds of tensors."""
    for i, name in enumerate(("base", "a", "b")):
        write_model(str(tmp_path / name), {n: v + (i and 1) * 0.01 for n, v in state(WHOLE, i).items()}, "F32")
    return f"base_model: {tmp_path}/base\nmodels: [{tmp_path}/a, {tmp_path}/b]\n"


# refused


def row_without_rows(delta: Any, *, cutoff: Any, density: Density = 0.5) -> Any: ...
def one(delta: Any) -> Any: ...
def weighted(delta: Any, *, weight: Annotated[PerModel, Real()] = 1.0) -> Any: ...
def two_names(delta: Any, *, weight: Any) -> Any: ...
def no_kind(delta: Any, *, x: Annotated[float, "a number"] = 1.0) -> Any: ...
def bad_default(delta: Any, *, x: Annotated[int, Whole(1)] = 2.5) -> Any: ...
def masked(delta: Any, *, mask: Any, weight: Annotated[PerModel, Real()] = 1.0) -> Any: ...
def sums(delta: Any, *, a: Any, b: Any) -> Any: ...
def two_blocks(delta: Any, base: Any) -> Any: ...
def spoken(delta: Any, *, dialect: Annotated[str, Choice(("x", "y"))] = "x") -> Any: ...


def _terms(delta: Any, **_: Any) -> Any:
    return delta


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a cutoff over rows without rows": (row_without_rows, {"stats": (Rank("density", over="row"),)}, "Scope.ROW"),
    "an extent that does not exist": (
        row_without_rows,
        {"stats": (Rank("density", over="block"),)},
        "expected one of row, tensor, layer, group, model",
    ),
    "a form that lacks a keyword": (
        weighted,
        {"form": lambda: Form(())},
        "form= takes no 'weight', which it would be given",
    ),
    "one name for two things": (two_names, {"stats": (Total("weight", of=_terms),), "companions": (Companion("weight", ""),)},
                                "'weight' is declared twice"),
    "a parameter without a kind": (no_kind, {}, "exactly one kind of value"),
    "a default that is none": (bad_default, {}, "is not a whole number"),
    "a mask of no parameter": (masked, {"draws": (Mask("densty"),)}, "no parameter"),
    "a mask of any number": (masked, {"draws": (Mask("weight"),)}, "not a number from 0 to 1"),
    "narrow before wide": (sums, {"stats": (Total("a", of=_terms), Total("b", of=_terms, over="model"))},
                           "declare the wider ones first"),
    "two blocks": (two_blocks, {}, "takes 2 arguments before the keywords"),
    "whole tensors for free": (one, {"scope": Scope.TENSOR}, "needs cost="),
    "a cost of elements": (one, {"cost": FREE}, "goes with scope=Scope.TENSOR"),
    "a kind of tensor nobody knows": (one, {"applies": ("matrices",), "otherwise": "mean"}, "expected some of matrix"),
    "tensors left over": (one, {"applies": ("matrix",)}, "what they get"),
    "a rest without applies": (one, {"otherwise": "mean"}, "goes with applies="),
    "no models": (one, {"models": (0, None)}, "1 <= fewest"),
    "a role of the base": (one, {"base_role": "first"}, "the base is subtracted"),
    "unknown dialects": (spoken, {"dialects": {"z": "."}}, "describes ['z']"),
    "a form with companions": (
        weighted,
        {"companions": (Companion("other", ""),), "form": lambda **_: Form(())},
        "undeclared|declared",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_when_it_is_declared(what: str) -> None:
    function, given, message = REFUSED[what]
    with pytest.raises(TypeError) as caught:
        method(space=Space.DELTA, **given)(function)
    assert any(part in str(caught.value) for part in message.split("|")), caught.value
    assert function.__name__ not in _REGISTRY


def test_a_result_of_another_shape(models: str, tmp_path: Path) -> None:
    @method(space=Space.DELTA)
    def two_rows(delta: Any) -> Any:
        """Forgets to add up."""
        return delta

    with pytest.raises(StockpotError, match="returned"):
        stockpot.merge("merge_method: two_rows\n" + models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# kinds of parameters


def test_whole_numbers_text_and_vectors(models: str, tmp_path: Path) -> None:
    seen: dict[int, tuple[Any, ...]] = {}

    @method(space=Space.DELTA)
    def picky(
        delta: Any,
        *,
        rank: Annotated[int, Whole(1, 64)] = 4,
        label: Annotated[str, Text()] = "plain",
        share: Annotated[PerLayer, Real(0, 1)] = 0.25,
    ) -> Any:
        """rank, label, share."""
        seen[delta.shape[-1]] = (rank, label, share)
        return delta.sum(0)

    head = "merge_method: picky\n" + models
    planned = stockpot.plan(head + "parameters: {rank: 7, label: 'a b', share: [0.5, 0.75]}\n")
    by_name = {t.name: planned.groups[t.group].params for t in planned.tensors}
    assert by_name["model.norm.weight"] == {"rank": 7, "label": "a b", "share": 0.25}
    assert by_name["model.layers.0.mlp.weight"]["share"] == 0.5
    assert by_name["model.layers.1.mlp.weight"]["share"] == 0.75
    assert type(by_name["model.norm.weight"]["rank"]) is int
    for bad, message in {
        "rank: 2.5": "expected a whole number from 1 to 64, got 2.5",
        "rank: 65": "whole number from 1 to 64",
        "rank: true": "whole number",
        "label: 3": "expected text, got 3",
        "share: [0.1, 0.2, 0.3]": "one entry for each of the 2 layers, got 3",
        "share: [0.1, 2]": "from 0 to 1",
    }.items():
        with pytest.raises((RecipeError, ProblemsError), match=message):
            stockpot.plan(head + f"parameters: {{{bad}}}\n")
    stockpot.merge(head + "parameters: {rank: 8.0}\n", tmp_path / "out")
    assert set(seen.values()) == {(8, "plain", 0.25)}


def test_kinds_show_in_the_list_of_methods() -> None:
    @method(space=Space.DELTA, scope=Scope.TENSOR, cost=FREE, applies=("matrix",), otherwise="mean", experimental=True)
    def shown(delta: Any, *, rank: Annotated[int, Whole(1)] = 4) -> Any:
        """rank."""

    from stockpot.cli.show import _method_row

    row = json.loads(json.dumps(_method_row(get_method("shown"))))
    assert row["parameters"][0]["kind"] == "whole number of at least 1"
    assert (row["applies"], row["otherwise"], row["experimental"]) == (["matrix"], "mean", True)


# kinds of tensors, cost, reproducibility


@method(
    space=Space.DELTA,
    scope=Scope.TENSOR,
    applies=("matrix",),
    otherwise="mean",
    cost=Cost(
        scratch=lambda m, shape, size: size * (4 * m * shape[0] * shape[1] + 6 * m * min(shape) ** 2),
        work=lambda m, shape: 14.0 * m * shape[0] * shape[1] * min(shape),
    ),
    reproducible="machine",
    neutral={"keep": 1.0},
)
def truncated(delta: Any, *, keep: Annotated[float, Real(0, 1)] = 0.5) -> Any:
    """Mean of the deltas, each by its largest singular values.

    keep  the fraction of the singular values that is kept
    """
    xp = backend_of(delta)
    u, s, vt = xp.svd(delta)
    rank = max(int(keep * s.shape[-1]), 1)
    return (u[..., :rank] * s[..., None, :rank] @ vt[..., :rank, :]).mean(0)


TRUNCATED = _REGISTRY.pop("truncated")


@pytest.fixture
def svd() -> None:
    _REGISTRY["truncated"] = TRUNCATED


@pytest.mark.usefixtures("svd")
def test_what_a_method_is_not_for_gets_the_mean(models: str, tmp_path: Path) -> None:
    text = "merge_method: truncated\nparameters: {keep: 0.4}\n" + models
    planned = stockpot.plan(text)
    rows = {r["method"]: r for r in planned.group_rows()}
    assert rows["truncated"]["tensors"] == 2  # the two matrices of the layers
    assert rows["linear"]["tensors"] == 4
    assert rows["truncated"]["scratch_bytes"] > 0
    assert rows["truncated"]["operations"] > 1e5
    assert any("linear algebra" in n for n in planned.notes)
    result = stockpot.merge(text, tmp_path / "out")
    base, a, b, merged = (read_model(str(tmp_path / n)) for n in ("base", "a", "b", "out"))
    for name, value in merged.items():
        if "mlp" in name:
            expected = base[name]
            for m in (a, b):
                u, s, vt = np.linalg.svd(m[name] - base[name], full_matrices=False)
                k = int(0.4 * len(s))
                expected = expected + (u[:, :k] * s[:k]) @ vt[:k] / 2
        else:
            expected = (a[name] + b[name]) / 2
        np.testing.assert_allclose(value, expected, atol=1e-6)
    groups = {g["method"]: g for g in result.lineage["groups"]}
    assert groups["truncated"]["reproducible"] == "machine"
    assert "reproducible" not in groups["linear"]
    memory = TRUNCATED([{"model.layers.0.mlp.weight": a["model.layers.0.mlp.weight"], "n": a["model.norm.weight"]}] * 2,
                       base={"model.layers.0.mlp.weight": base["model.layers.0.mlp.weight"], "n": base["model.norm.weight"]},
                       keep=0.4)  # fmt: skip
    np.testing.assert_allclose(memory["n"], a["model.norm.weight"])


@pytest.mark.usefixtures("svd")
def test_the_rest_can_be_the_bases_or_another_methods(models: str, tmp_path: Path) -> None:
    def declare(name: str, otherwise: str) -> None:
        @method(space=Space.DELTA, scope=Scope.TENSOR, applies=("matrix", "stack"), otherwise=otherwise, cost=FREE)
        def summed(delta: Any) -> Any:
            """Sum."""
            return delta.sum(0)

        _REGISTRY[name] = _REGISTRY.pop("summed")
        object.__setattr__(_REGISTRY[name], "name", name)

    declare("keeps", "base")
    declare("adds", "task_arithmetic")
    base, a, b = (read_model(str(tmp_path / n)) for n in ("base", "a", "b"))
    stockpot.merge("merge_method: keeps\n" + models, tmp_path / "keeps")
    for name, value in read_model(str(tmp_path / "keeps")).items():
        changed = "mlp" in name or "experts" in name
        expected = a[name] + b[name] - base[name] if changed else base[name]
        np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=name)
    stockpot.merge("merge_method: adds\nparameters: {lambda: 0.5}\n" + models, tmp_path / "adds")
    value = read_model(str(tmp_path / "adds"))["model.norm.weight"]
    n = "model.norm.weight"
    np.testing.assert_allclose(value, base[n] + 0.5 * (a[n] + b[n] - 2 * base[n]), atol=1e-6)


@pytest.mark.usefixtures("svd")
def test_weights_are_the_means_and_normalize_is_not(models: str, tmp_path: Path) -> None:
    head = "merge_method: truncated\n" + models
    stockpot.merge(head + "parameters: {weight: 3}\n", tmp_path / "out")
    a, b, merged = (read_model(str(tmp_path / n))["model.norm.weight"] for n in ("a", "b", "out"))
    np.testing.assert_allclose(merged, (a + b) / 2, atol=1e-6)
    with pytest.raises(RecipeError, match="no parameter 'normalize'"):
        stockpot.plan(head + "parameters: {normalize: false}\n")


@pytest.mark.usefixtures("svd")
@pytest.mark.parametrize("check", method_checks(TRUNCATED), ids=str)
def test_a_method_on_matrices_passes_the_suite(check: Any, tmp_path: Path) -> None:
    """Its memory above all: what singular values take is in the plan, and the plan is kept."""
    if check.name == "docstring":
        pytest.skip("the pickled method is found by its module")
    check(tmp_path)


BUDGET = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
import stockpot, stockpot.api.merging, stockpot.engine.run, stockpot.lineage
from test_declarations import TRUNCATED, _REGISTRY
_REGISTRY["truncated"] = TRUNCATED
np.linalg.svd(np.ones((50, 50)))

def high():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

options = stockpot.Options(threads=1, max_memory='2GiB')
planned = stockpot.plan({recipe!r}, options)
before = high()
stockpot.merge({recipe!r}, {out!r}, options)
print(planned.budget.peak, high() - before)
"""


def test_memory_of_a_whole_matrix_method_is_kept(tmp_path: Path) -> None:
    """A singular value decomposition of 3000 x 2000 of two models, in a process of its own."""
    shapes = {"w": (3000, 2000)}
    paths = [write_model(str(tmp_path / f"m{i}"), state(shapes, i)) for i in range(3)]
    recipe = f"merge_method: truncated\nbase_model: {paths[0]}\nmodels: [{paths[1]}, {paths[2]}]\n"
    code = BUDGET.format(tests=str(Path(__file__).parent), recipe=recipe, out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    planned, taken = map(int, done.stdout.split())
    assert taken <= planned
    assert taken > planned / 4  # and the plan is no fantasy either
    _REGISTRY["truncated"] = TRUNCATED
    with pytest.raises(ArgumentError, match="allow at least"):
        stockpot.plan(recipe, stockpot.Options(max_memory="100MiB"))


# companions


@pytest.fixture
def informed(tmp_path: Path) -> dict[str, Any]:
    """Two models with Fisher information beside them, as a recipe."""
    shapes = {"model.layers.0.mlp.weight": (600, 900), "model.norm.weight": (97,)}
    for i, name in enumerate("ab"):
        write_model(str(tmp_path / name), state(shapes, i))
        fishers = {n: v**2 for n, v in state(shapes, 10 + i).items()}
        write_model(str(tmp_path / f"{name}-fisher"), fishers, "F32")
        (tmp_path / f"{name}-fisher/config.json").unlink()
    entries = [{"model": str(tmp_path / n), "companions": {"fisher": str(tmp_path / f"{n}-fisher")}} for n in "ab"]
    return {"merge_method": "fisher", "models": entries, "out_dtype": "float32"}


def test_companions_from_recipe_to_lineage(informed: dict[str, Any], tmp_path: Path) -> None:
    informed["models"][0]["parameters"] = {"weight": 3.0}
    result = stockpot.merge(informed, tmp_path / "out", stockpot.Options(threads=3))
    a, b, fa, fb, merged = (read_model(str(tmp_path / n)) for n in ("a", "b", "a-fisher", "b-fisher", "out"))
    rms = [np.sqrt(sum((f[n] ** 2).sum() for n in f) / sum(f[n].size for n in f)) for f in (fa, fb)]
    for n in a:
        x, y = 3.0 * np.maximum(fa[n] / rms[0], 1e-6), np.maximum(fb[n] / rms[1], 1e-6)
        np.testing.assert_allclose(merged[n], (x * a[n] + y * b[n]) / (x + y), rtol=2e-5, atol=1e-7)
    roles = [i.get("role", "model") for i in result.lineage["inputs"]]
    assert roles == ["model", "fisher", "model", "fisher"]
    assert all(f["tensors_read"] == 2 for i in result.lineage["inputs"] for f in i["files"])
    assert not [w for w in result.warnings if "norm" in w]  # a companion's size says nothing of the output's
    stockpot.verify(tmp_path / "out")
    states = [{n: m[n] for n in m} for m in (a, b)]
    memory = fisher(states, fisher=[fa, fb], weight=[3.0, 1.0])
    for n in a:
        np.testing.assert_allclose(merged[n], memory[n], rtol=2e-5, atol=1e-7)


def test_companions_are_part_of_a_plans_identity(informed: dict[str, Any], tmp_path: Path) -> None:
    before = stockpot.plan(informed).identity
    raw = bytearray((tmp_path / "a-fisher/model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a-fisher/model.safetensors").write_bytes(raw)
    assert stockpot.plan(informed).identity != before


def test_mistakes_with_companions(informed: dict[str, Any], tmp_path: Path) -> None:
    def fails(change: Any, message: str, kind: type[Exception] = RecipeError) -> None:
        recipe = json.loads(json.dumps(informed))
        change(recipe)
        with pytest.raises(kind, match=message):
            stockpot.plan(recipe)

    fails(
        lambda r: r["models"][1].pop("companions"), r"fisher needs fisher of every model .* give 'companions: \{fisher:"
    )
    fails(lambda r: r["models"][0]["companions"].update(fsher="x"), "fsher: x: no such", CheckpointError)
    other = str(tmp_path / "a-fisher")
    fails(
        lambda r: r["models"][0]["companions"].update(fsher=other), "no use for 'fsher'; it takes fisher; did you mean"
    )
    fails(lambda r: r.update(merge_method="linear"), "linear has no use for 'fisher'; it takes none", ProblemsError)
    fails(lambda r: r["models"][0].update(companions=5), "expected a mapping from names to checkpoints")
    write_model(str(tmp_path / "other"), {"model.norm.weight": np.ones(97)})
    fails(
        lambda r: r["models"][0]["companions"].update(fisher=str(tmp_path / "other")),
        "has no tensor 'model.layers.0.mlp.weight'",
        MismatchError,
    )
    shapes = {"model.layers.0.mlp.weight": (900, 600), "model.norm.weight": (97,)}
    write_model(str(tmp_path / "turned"), state(shapes, 0))
    turned = str(tmp_path / "turned")
    fails(lambda r: r["models"][0]["companions"].update(fisher=turned), r"expected floats \[600, 900\]", MismatchError)
    with pytest.raises(ArgumentError, match="needs fisher="):
        fisher([{"w": np.ones(2)}])


# draws


@method(space=Space.DELTA, draws=(Uniform(), Normal(), Mask(lambda delta, **_: np.clip(abs(delta) * 100, 0, 1))))
def drawn(delta: Any, *, uniform: Any, normal: Any, mask: Any) -> Any:
    """uniform, normal, mask."""
    return uniform[0] + 10 * np.rint(normal[0] * 100) + 0 * mask[0]


DRAWN = _REGISTRY.pop("drawn")


def test_draws_do_not_depend_on_blocks(tmp_path: Path) -> None:
    _REGISTRY["drawn"] = DRAWN
    shapes = {"big": (1300, 1000), "small": (40, 3), "tiny": (5,)}
    write_model(str(tmp_path / "base"), {n: np.zeros(s) for n, s in shapes.items()}, "F32")
    write_model(str(tmp_path / "a"), state(shapes, 1, 0.005), "F32")
    recipe = f"merge_method: drawn\nbase_model: {tmp_path}/base\nmodels: [{tmp_path}/a]\n"
    outs = []
    for i, options in enumerate(({"threads": 1}, {"threads": 3, "max_memory": "80MiB"}, {"seed": 1})):
        stockpot.merge(recipe, tmp_path / str(i), stockpot.Options(**options))  # type: ignore[arg-type]
        outs.append(read_model(str(tmp_path / str(i))))
    for n in shapes:
        assert np.array_equal(outs[0][n], outs[1][n])
        assert not np.array_equal(outs[0][n], outs[2][n])
    memory = DRAWN([read_model(str(tmp_path / "a"))], base={n: np.zeros(s) for n, s in shapes.items()})
    np.testing.assert_allclose(memory["tiny"], outs[0]["tiny"], rtol=1e-6)


def test_numbers_drawn_are_what_they_are_called() -> None:
    @method(space=Space.DELTA, draws=(Uniform(), Normal()))
    def both(delta: Any, *, uniform: Any, normal: Any) -> Any:
        """uniform, normal."""
        assert uniform.dtype == normal.dtype == delta.dtype
        kept.append((uniform.copy(), normal.copy()))
        return delta[0] * 0

    for dtype in (np.float16, np.float64):
        kept: list[tuple[Any, Any]] = []
        zero = {"w": np.zeros(400_000, dtype)}
        both([zero, zero], base=zero)
        u, z = (np.concatenate([k[i] for k in kept], axis=1) for i in (0, 1))
        assert u.min() >= 0
        assert u.max() < 1
        assert abs(u.mean() - 0.5) < 0.003
        assert abs(u.var() - 1 / 12) < 0.001
        assert abs(z.mean()) < 0.01
        assert abs(z.var() - 1) < 0.01
        assert abs((z**4).mean() - 3) < 0.1
        assert abs(np.corrcoef(u[0], u[1])[0, 1]) < 0.01
        assert abs(np.corrcoef(u[0], z[0])[0, 1]) < 0.01
        if dtype is np.float16:
            first = u[0, :4].tolist(), z[0, :4].tolist()
    # frozen: recipes with a seed must keep their bytes
    assert first == (
        [0.2656586170196533, 0.5529694557189941, 0.14365017414093018, 0.09831094741821289],
        [-0.2582780122756958, -1.8712111711502075, 0.3940489888191223, 1.3270957469940186],
    )


def test_sums_over_rows_of_the_block_itself(tmp_path: Path) -> None:
    """Rows come in tiles in memory that is used again: terms that are the block must not change with it."""

    @method(space=Space.DELTA, scope=Scope.ROW, stats=(Total("sums", of=lambda delta, **_: delta),))
    def summed(delta: Any, *, sums: Any) -> Any:
        """sums."""
        found.append(float(sums[0]))
        return delta[0] * 0

    found: list[float] = []
    values = np.random.default_rng(0).standard_normal((1024, 512)).astype(np.float32)
    summed([{"w": values}], base={"w": np.zeros_like(values)})
    assert found
    assert all(abs(x - values.astype(np.float64).sum()) < 1e-6 for x in found)


def test_a_sample_of_long_rows_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of every unit would be more than all that was planned for."""
    from stockpot.engine.loop import Loop

    shape, sizes = (1024, 6000), []
    for i, name in enumerate("ab"):
        values = 0.02 * np.random.default_rng(i).standard_normal(shape)
        write_model(str(tmp_path / name), {"w.weight": values.astype(np.float32)}, "BF16")

    def sample(self: Loop, *given: Any) -> Any:
        found = taken(self, *given)
        sizes.append(found.shape)
        return found

    taken = Loop._sample
    monkeypatch.setattr(Loop, "_sample", sample)
    monkeypatch.setattr("stockpot.engine.loop._JOB_SAMPLES", 6000)
    recipe = {"merge_method": "arcee_fusion", "base_model": str(tmp_path / "a"), "models": [str(tmp_path / "b")]}
    stockpot.merge(recipe, tmp_path / "out")
    assert sizes
    assert all(0 < n <= 2 * 6000 for _, n in sizes)


def test_masks_with_a_probability_for_each_element() -> None:
    from stockpot.engine.masks import MaskStream, mask_key

    stream, key = MaskStream(), mask_key(0, 1, "w")
    one, each = np.empty(100_003, np.bool_), np.empty(100_003, np.bool_)
    for p in (0.0, 0.3, 0.5, 0.999, 1.0, 1 / 256):
        stream.fill(key, p, 17, one)
        stream.fill_each(key, np.full(len(each), p), 17, each)
        assert np.array_equal(one, each), p
    ramp = np.linspace(0, 1, len(each))
    stream.fill_each(key, ramp, 0, each)
    for low in np.arange(0, 1, 0.1):
        inside = (ramp >= low) & (ramp < low + 0.1)
        assert abs(each[inside].mean() - low - 0.05) < 0.02


# the registry


def test_methods_pickle_and_are_found(tmp_path: Path) -> None:
    for found in methods().values():
        assert pickle.loads(pickle.dumps(found)) is found
    package = tmp_path / "theirs-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[stockpot.methods]\nhalf = theirs\n")
    (tmp_path / "theirs.py").write_text(
        "from stockpot.methods import Space, method\n\n"
        "@method(space=Space.DELTA)\ndef half(delta):\n    'Half of the sum.'\n    return delta.sum(0) / 2\n"
    )
    code = "import stockpot; print(stockpot.methods.get_method('half').summary); print('half' in stockpot.methods.methods())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.stdout.split("\n")[:2] == ["Half of the sum.", "True"], done.stderr


def test_a_device_is_for_whole_matrices(models: str, tmp_path: Path) -> None:
    kinds = []

    @method(space=Space.DELTA, scope=Scope.TENSOR, cost=FREE, stats=(Gram(),))
    def watched(delta: Any, *, gram: Any) -> Any:
        """gram."""
        kinds.append((type(delta).__module__, type(gram).__module__))
        return delta.sum(0)

    stockpot.merge("merge_method: watched\n" + models, tmp_path / "torch", stockpot.Options(device="torch"))
    assert set(kinds) == {("torch", "torch")}
    kinds.clear()
    stockpot.merge("merge_method: watched\n" + models, tmp_path / "auto", stockpot.Options(device="auto"))
    assert set(kinds) == {("numpy", "numpy")}  # there is no GPU here
    result = stockpot.merge("merge_method: linear\n" + models, tmp_path / "linear", stockpot.Options(device="torch"))
    assert any("on the CPU" in n for n in result.notes)


def test_backends_agree() -> None:
    a = np.random.default_rng(0).standard_normal((3, 8, 5))
    for kind in (np.asarray, torch.from_numpy):
        x = kind(a)
        xp = backend_of(x)
        u, s, vt = xp.svd(x)
        np.testing.assert_allclose(np.asarray(u * s[..., None, :] @ vt), a, atol=1e-12)
        q, r = xp.qr(x)
        np.testing.assert_allclose(np.asarray(q @ r), a, atol=1e-12)
        square = xp.swap(x) @ x
        values, vectors = xp.eigh(square)
        np.testing.assert_allclose(np.asarray(square @ vectors), np.asarray(vectors * values[..., None, :]), atol=1e-10)
        np.testing.assert_allclose(np.asarray(square @ xp.solve(square, xp.swap(x))), np.asarray(xp.swap(x)), atol=1e-8)
        np.testing.assert_array_equal(np.asarray(xp.sort(x)), np.sort(a))
        np.testing.assert_array_equal(np.asarray(xp.argsort(x)), np.argsort(a, axis=-1, kind="stable"))
        np.testing.assert_array_equal(np.asarray(xp.where(x > 0, x, -x)), abs(a))
        assert xp.stack([x, x]).shape == (2, 3, 8, 5)
        assert xp.concatenate([x, x], 1).shape == (3, 16, 5)
        assert str(xp.astype(x, "float32").dtype).endswith("float32")
        assert xp.array([1.0, 2.0], x).dtype == x.dtype


def test_a_companion_has_no_stand_ins(tmp_path: Path) -> None:
    """A head that is not tied needs its own Fisher: that of the embedding, of the same shape, is of other weights."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    for i, (name, held) in enumerate((("a", names), ("a-fisher", names[:1]), ("whole", names))):
        write_model(str(tmp_path / name), {n: abs(t) for n, t in state(dict.fromkeys(held, (6, 4)), i).items()}, "F32")
        if name != "a":
            (tmp_path / name / "config.json").unlink()

    def recipe(beside: str) -> dict[str, Any]:
        entry = {"model": str(tmp_path / "a"), "companions": {"fisher": str(tmp_path / beside)}}
        return {"merge_method": "fisher", "models": [entry]}

    with pytest.raises(MismatchError, match=r"a-fisher: has no tensor 'lm_head\.weight', which .*a has"):
        stockpot.plan(recipe("a-fisher"))
    assert all(t.companions[0].name == t.name for t in stockpot.plan(recipe("whole")).tensors)
