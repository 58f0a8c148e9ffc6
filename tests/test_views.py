"""Views: other names, orders and shapes, read as they are asked for; equal to the same done to whole tensors."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stockpot
from stockpot import views
from stockpot.checkpoints import Checkpoint, ReadRequest
from stockpot.errors import ArgumentError
from stockpot.testing import run_checks, source_checks

from helpers import load, perturbed, write_model

Span = views.Span
CONFIG = {"architectures": ["X"], "model_type": "x", "vocab_size": 50}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    return {
        "embed.weight": make(50, 24).bfloat16(),
        "q": make(24, 24),
        "k": make(8, 24),
        "v": make(8, 24),
        "qkv": make(40, 24),
        "conv": make(12, 10, 3, 3).half(),
        "experts": make(5, 7, 11),
        "e0": make(7, 11).bfloat16(),
        "e1": make(7, 11).half(),
        "ids": torch.arange(60).reshape(20, 3),
        "scalar": make(),
        "empty": make(4, 0),
        "large": make(700, 2000),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("views") / "m", tensors(), CONFIG, shards=2)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("views") / "n", tensors(1), CONFIG)


def shuffled(n: int, seed: int = 0) -> list[int]:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


ROWS = [3, 3, -1, 49, 0, 1, 2, 48, -1]
BIG = shuffled(700)

#: name -> (the view of a checkpoint, the tensors that it should have, from all of them)
VIEWS: dict[str, tuple[Callable[[Checkpoint], Checkpoint], Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]]] = {
    "renamed": (
        lambda c: views.renamed(c, {"a": "q", "b": "large", "same": "q", "nothing": "empty"}),
        lambda t: {"a": t["q"], "b": t["large"], "same": t["q"], "nothing": t["empty"]},
    ),
    "first_rows": (
        lambda c: views.first_rows(c, {"embed.weight": 20, "large": 1, "ids": 0}),
        lambda t: {**t, "embed.weight": t["embed.weight"][:20], "large": t["large"][:1], "ids": t["ids"][:0]},
    ),
    "rows": (
        lambda c: views.rows(c, {"embed.weight": ROWS, "large": BIG, "ids": [19, 0]}),
        lambda t: {
            **t,
            "embed.weight": torch.stack([t["embed.weight"][i] if i >= 0 else torch.zeros(24).bfloat16() for i in ROWS]),
            "large": t["large"][BIG], "ids": t["ids"][[19, 0]],
        },
    ),
    "permuted": (
        lambda c: views.permuted(
            c, {"large": {1: shuffled(2000, 1), 0: BIG}, "conv": {1: shuffled(10)}, "ids": {1: [2, 0, 1]}, "q": {0: shuffled(24)}}
        ),
        lambda t: {
            **t, "large": t["large"][BIG][:, shuffled(2000, 1)], "conv": t["conv"][:, shuffled(10)],
            "ids": t["ids"][:, [2, 0, 1]], "q": t["q"][shuffled(24)],
        },
    ),
    "stacked": (
        lambda c: views.stacked(c, {"fused": ["q", "k", "v"]}, new_axis=False),
        lambda t: {"fused": torch.cat([t["q"], t["k"], t["v"]]), **{n: x for n, x in t.items() if n not in "qkv" or n == "qkv"}},
    ),
    "stacked along the second axis": (
        lambda c: views.stacked(c, {"wide": ["k", "v"]}, axis=1, new_axis=False),
        lambda t: {"wide": torch.cat([t["k"], t["v"]], 1), **{n: x for n, x in t.items() if n not in ("k", "v")}},
    ),
    "stacked as experts of two dtypes": (
        lambda c: views.stacked(c, {"both": ["e0", "e1"]}),
        lambda t: {
            "both": torch.stack([t["e0"].float(), t["e1"].float()]),
            **{n: x for n, x in t.items() if n not in ("e0", "e1")},
        },
    ),
    "stacked along a new last axis": (
        lambda c: views.stacked(c, {"last": ["k", "v"]}, axis=2),
        lambda t: {"last": torch.stack([t["k"], t["v"]], 2), **{n: x for n, x in t.items() if n not in ("k", "v")}},
    ),
    "unstacked": (
        lambda c: views.unstacked(c, {f"experts.{i}": ("experts", i) for i in range(5)}),
        lambda t: {**{f"experts.{i}": t["experts"][i] for i in range(5)}, **{n: x for n, x in t.items() if n != "experts"}},
    ),
    "unstacked along the last axis": (
        lambda c: views.unstacked(c, {"one": ("experts", 3)}, axis=2),
        lambda t: {"one": t["experts"][:, :, 3], **{n: x for n, x in t.items() if n != "experts"}},
    ),
    "ranges": (
        lambda c: views.unstacked(
            c, {"q2": Span(c, "qkv", 0, 0, 24), "k2": Span(c, "qkv", 0, 24, 32), "side": Span(c, "large", 1, 1990)}
        ),
        lambda t: {
            "q2": t["qkv"][:24], "k2": t["qkv"][24:32], "side": t["large"][:, 1990:],
            **{n: x for n, x in t.items() if n not in ("qkv", "large")},
        },
    ),
    "with_zeros": (
        lambda c: views.with_zeros(c, {"z": c.spec("conv")}),
        lambda t: {**t, "z": torch.zeros(12, 10, 3, 3).half()},
    ),
    "a view of a view": (
        lambda c: views.rows(views.stacked(c, {"fused": ["q", "k", "v"]}, new_axis=False), {"fused": shuffled(40)}),
        lambda t: {
            "fused": torch.cat([t["q"], t["k"], t["v"]])[shuffled(40)],
            **{n: x for n, x in t.items() if n not in "qkv" or n == "qkv"},
        },
    ),
}  # fmt: skip


def contents(c: Checkpoint) -> dict[str, torch.Tensor]:
    out = {}
    for name in c.names():
        spec = c.spec(name)
        raw = bytearray(spec.nbytes)
        c.read([ReadRequest(name, 0, spec.numel)], memoryview(raw))
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}[
            str(spec.dtype)
        ]
        out[name] = (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).reshape(spec.shape)
    return out


def equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(
        torch.equal(got[n], want[n]) and got[n].dtype == want[n].dtype for n in want
    )


@pytest.mark.parametrize("kind", VIEWS)
def test_equal_to_what_it_says(kind: str, folder: Path) -> None:
    make, want = VIEWS[kind]
    assert equal(contents(make(stockpot.open_checkpoint(folder))), want(tensors()))


@pytest.mark.parametrize("kind", VIEWS)
def test_is_a_source(kind: str, folder: Path) -> None:
    run_checks(source_checks(lambda: VIEWS[kind][0](stockpot.open_checkpoint(folder))))


def test_chunks_of_several_files(tmp_path: Path, folder: Path) -> None:
    """What a distributed run leaves: each rank's file holds some rows, the last fewer."""
    whole = tensors()["large"]
    parts = [whole[:300], whole[300:600], whole[600:]]
    files = [write_model(tmp_path / f"{i}", {"large": p, "other": torch.ones(2)}, CONFIG) for i, p in enumerate(parts)]

    def made() -> Checkpoint:
        ranks = [stockpot.open_checkpoint(f) for f in files]
        return views.chunked(
            ranks[0],
            {"large": [Span(r, "large") for r in ranks], "part": [Span(ranks[1], "large", 0, 5, 9)]},
            ref="ranks",
        )

    assert equal(contents(made()), {"large": whole, "part": parts[1][5:9]})
    run_checks(source_checks(made))
    assert [p.path for p in made().parts] == [str(f) for f in files]
    result = stockpot.merge(
        {"merge_method": "linear", "models": ["ranks"]}, tmp_path / "out", sources={"ranks": made()}
    )
    assert torch.equal(load(tmp_path / "out")["large"], whole)
    stockpot.verify(tmp_path / "out")
    assert [p["path"] for p in result.lineage["inputs"][0]["parts"]] == [str(f) for f in files]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: views.renamed(c, {"a": "larg"}), "no tensor 'larg'.*did you mean 'large'"),
        (lambda c: views.first_rows(c, {"q": 25}), r"'q' is \[24, 24\]: it has no first 25 rows"),
        (lambda c: views.first_rows(c, {"scalar": 1}), r"'scalar' is \[\]: it has no first 1 rows"),
        (lambda c: views.rows(c, {"q": [0, 24]}), r"'q' is \[24, 24\]: it has no row 24"),
        (lambda c: views.rows(c, {"q": [-2]}), "no row -2"),
        (lambda c: views.permuted(c, {"q": {0: [0] * 24}}), "the order of axis 0 is no permutation"),
        (lambda c: views.permuted(c, {"q": {2: [0]}}), "the order of axis 2 is no permutation"),
        (lambda c: views.stacked(c, {"x": ["q", "k"]}), r"its parts have different shapes: 'q' \[24, 24\], 'k' \[8, 24\]"),
        (lambda c: views.stacked(c, {"x": ["q", "conv"]}, new_axis=False), "different shapes"),
        (lambda c: views.stacked(c, {"x": []}), "made of no tensor"),
        (lambda c: views.stacked(c, {"conv": ["k", "v"]}), "there is a tensor 'conv' already"),
        (lambda c: views.stacked(c, {"x": ["k", "v"]}, axis=3), "it has no axis 3"),
        (lambda c: views.stacked(c, {"x": ["ids", "ids"]}, axis=1).spec("x") and views.stacked(c, {"x": ["e0", "experts"]}),
         "different shapes"),
        (lambda c: views.unstacked(c, {"x": ("experts", 5)}), "it has no entries 5 to 6"),
        (lambda c: views.unstacked(c, {"x": ("scalar", 0)}), "it has no axis 0"),
        (lambda c: views.unstacked(c, {"x": Span(c, "q", 0, 3, 3)}), "no entries 3 to 3"),
        (lambda c: views.with_zeros(c, {"q": c.spec("q")}), "there is a tensor 'q' already"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make: Any, message: str, folder: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        make(stockpot.open_checkpoint(folder))


def test_floats_and_integers_have_no_common_dtype(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", {"a": torch.ones(2, 2), "b": torch.ones(2, 2, dtype=torch.int64)}, CONFIG)
    with pytest.raises(ArgumentError, match="parts of F32, I64 have no dtype in common"):
        views.stacked(stockpot.open_checkpoint(path), {"x": ["a", "b"]})


# merging through them

METHODS = {
    "linear": {"parameters": {"weight": [0.3, 0.7]}},
    "ties": {"parameters": {"density": 0.37}},
    "slerp": {"parameters": {"t": 0.4}},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind", ["renamed", "rows", "permuted", "stacked", "unstacked", "first_rows", "stacked as experts of two dtypes"]
)
def test_merging_views_is_merging_what_they_show(
    kind: str, method: str, folder: Path, other: Path, tmp_path: Path
) -> None:
    """The same bytes as from files that hold what the views show; sound lineage; any number of threads."""
    make, want = VIEWS[kind]
    paths = []
    for i, seed in enumerate((0, 1, 2)):
        own = {n: t.clone() for n, t in want(tensors(seed)).items()}
        paths.append(write_model(tmp_path / f"shown{i}", own, CONFIG))
    third = write_model(tmp_path / "third", tensors(2), CONFIG)
    sources = {f"view{i}": make(stockpot.open_checkpoint(p)) for i, p in enumerate((folder, other, third))}

    def recipe(names: list[str]) -> dict[str, Any]:
        made: dict[str, Any] = {"merge_method": method, "models": names[:2], **METHODS[method]}
        return made | ({"base_model": names[2]} if method == "ties" else {})

    stockpot.merge(recipe([str(p) for p in paths]), tmp_path / "want")
    names = ["view0", "view1", "view2"]
    used = {n: s for n, s in sources.items() if method == "ties" or n != "view2"}
    for threads in (1, 2):
        options = stockpot.Options(threads=threads)
        result = stockpot.merge(recipe(names), tmp_path / f"got{threads}", options, sources=used)
        got, wanted = load(tmp_path / f"got{threads}"), load(tmp_path / "want")
        assert got.keys() == wanted.keys()
        for name in wanted:
            assert torch.equal(got[name].reshape(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8)), (
                name
            )
        stockpot.verify(tmp_path / f"got{threads}")
        row = next(r for r in result.lineage["inputs"] if r["model"] == "view0")
        assert row["made"]
        assert row["parts"][0]["path"] == str(folder)


def test_lineage_has_the_digests_of_the_files_behind(tmp_path: Path) -> None:
    """What passes through a view, and what is read in part, is recorded like what is read directly."""
    folder = write_model(tmp_path / "m", {n: t for n, t in tensors().items() if t.numel()}, CONFIG, shards=2)
    direct = stockpot.merge({"merge_method": "linear", "models": [str(folder)]}, tmp_path / "direct")
    view = VIEWS["first_rows"][0](stockpot.open_checkpoint(folder))
    through = stockpot.merge({"merge_method": "linear", "models": ["v"]}, tmp_path / "through", sources={"v": view})
    assert through.lineage["inputs"][0]["parts"][0]["files"] == direct.lineage["inputs"][0]["files"]


def test_names_of_sources(folder: Path, tmp_path: Path) -> None:
    view = stockpot.open_checkpoint(folder)
    with pytest.raises(ArgumentError, match="the recipe names no model 'vew'; did you mean 'view'"):
        stockpot.plan({"merge_method": "linear", "models": ["view"]}, sources={"vew": view})
    text = "name: first\nmerge_method: linear\nmodels: [view]\n---\nmerge_method: linear\nmodels: [first, view]\n"
    stockpot.merge(text, tmp_path / "out", sources={"view": views.rows(view, {"q": shuffled(24)})})
    assert torch.equal(load(tmp_path / "out")["q"], tensors()["q"][shuffled(24)])


def test_a_step_is_read_through_a_view(tmp_path: Path) -> None:
    """`vocab: crop` over a step, streamed and written first."""
    a, b = ({"model.embed_tokens.weight": torch.randn(n, 8), "w": torch.randn(3, 8)} for n in (30, 20))
    for name, t in (("a", a), ("b", b), ("c", perturbed(a, 1))):
        write_model(tmp_path / name, t, CONFIG)
    for method, extra in (("linear", ""), ("ties", "parameters: {density: 0.5}\nbase_model: %s\n" % (tmp_path / "a"))):
        first = f"merge_method: {method}\nmodels: [{tmp_path / 'c'}]\n{extra}"
        second = "merge_method: linear\nmodels: [%s, %s]\nvocab: crop\n"
        stockpot.merge(first, tmp_path / f"{method}-first")
        stockpot.merge(second % (tmp_path / f"{method}-first", tmp_path / "b"), tmp_path / f"{method}-two")
        both = f"name: one\n{first}---\n{second % ('one', tmp_path / 'b')}"
        result = stockpot.merge(both, tmp_path / f"{method}-both")
        assert [s["name"] for s in result.lineage["steps"]] == ["one"]
        got, want = load(tmp_path / f"{method}-both"), load(tmp_path / f"{method}-two")
        assert all(torch.equal(got[n], want[n]) for n in want)
        assert got["model.embed_tokens.weight"].shape == (20, 8)


KILLED = """
import os, signal, sys
import stockpot
from stockpot import views

class Progress:
    def __call__(self, done, total):
        if done > total // 4:
            os.kill(os.getpid(), signal.SIGKILL)

order = eval(sys.argv[3])
view = views.rows(stockpot.open_checkpoint(sys.argv[1]), {"large": order})
progress = Progress() if sys.argv[4] == "kill" else None
stockpot.merge({"merge_method": "linear", "models": ["v"]}, sys.argv[2], stockpot.Options(threads=1), sources={"v": view},
               progress=progress)
"""


def test_another_view_does_not_go_on_with_the_work_of_the_first(tmp_path: Path) -> None:
    """Both read the same files by the same recipe: what tells them apart is how they are made."""
    big = {"large": torch.randn(3000, 4000), "small": torch.ones(3)}
    path = write_model(tmp_path / "m", big, CONFIG)
    there, back = "list(range(3000))", "list(range(2999, -1, -1))"
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "out")]
    killed = subprocess.run([*command, back, "kill"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out.partial").exists()
    subprocess.run([*command, there, "go"], check=True)
    assert torch.equal(load(tmp_path / "out")["large"], big["large"])
    lineage = json.loads((tmp_path / "out" / "stockpot.json").read_text())
    assert lineage["bytes_resumed"] == 0


def test_a_view_says_what_it_is_called_and_what_it_takes(folder: Path, tmp_path: Path) -> None:
    """Memory: what its source takes, and of rearranged rows some whole ones."""
    from fp8 import write_fp8

    plain = stockpot.open_checkpoint(folder)
    assert views.rows(plain, {"q": [0]}).ref == views.renamed(plain, {"a": "q"}).ref == plain.ref
    assert views.rows(plain, {"q": [0]}, ref="x").ref == views.renamed(plain, {"a": "q"}, ref="x").ref == "x"
    write_fp8(tmp_path / "m", "block", 0)
    source = stockpot.open_checkpoint(tmp_path / "m")
    name = next(iter(source.names()))
    for view in (views.renamed(source, {"a": name}), views.rows(source, {name: [0]})):
        assert view.scratch_itemsize > source.scratch_itemsize > 0
    wide = views.permuted(plain, {"large": {1: shuffled(2000, 1)}})
    assert wide.resident - plain.resident == 24 * 2000 * 4
    assert views.rows(plain, {"large": BIG}).resident == plain.resident


def test_views_below_a_step_tell_two_plans_apart(folder: Path) -> None:
    """A merge that was stopped must not go on with the work of another order of rows."""
    recipe = {
        "steps": [{"name": "s", "merge_method": "linear", "models": ["v"]}, {"merge_method": "linear", "models": ["s"]}]
    }
    source = stockpot.open_checkpoint(folder)
    one, two = (stockpot.plan(recipe, sources={"v": views.rows(source, {"q": o})}) for o in (range(24), shuffled(24)))
    assert one.identity != two.identity
    assert one.inputs[0].checkpoint.made != two.inputs[0].checkpoint.made


def test_a_span_of_another_checkpoint_is_refused(folder: Path, other: Path) -> None:
    one, two = stockpot.open_checkpoint(folder), stockpot.open_checkpoint(other)
    with pytest.raises(ArgumentError, match=r"'x': a span of .*n, not of .*m: 'chunked' takes those of several"):
        views.unstacked(one, {"x": Span(two, "q", 0, 0, 3)})
    got = contents(views.chunked(one, {"x": [Span(two, "q", 0, 0, 3)]}))
    assert torch.equal(got["x"], tensors(1)["q"][:3])


def test_short_runs_are_read_many_at_once(tmp_path: Path) -> None:
    """Elements that take turns: the bytes are right, and not one read for each of them is made."""
    k, v = torch.randn(300, 400), torch.randn(300, 400)
    path = write_model(tmp_path / "m", {"k": k, "v": v.bfloat16()}, CONFIG)
    source = stockpot.open_checkpoint(path)
    calls = []
    source.observers.append(lambda request, raw: calls.append(request))
    found = contents(views.stacked(source, {"both": ["k", "v"]}, axis=2))["both"]
    assert torch.equal(found, torch.stack([k, v.bfloat16().float()], 2))
    assert len(calls) < 20
    assert torch.equal(contents(views.unstacked(source, {"one": ("k", 7)}, axis=1))["one"], k[:, 7])


def test_a_digest_is_of_the_shape_that_lies_in_the_file(tmp_path: Path) -> None:
    """A view that only changes the shape has other pieces: what the lineage says of the file is what the file says."""
    path = write_model(tmp_path / "m", {"e": torch.randn(1, 600, 1000)}, CONFIG)
    direct = stockpot.merge({"merge_method": "linear", "models": [str(path)]}, tmp_path / "direct")
    view = views.unstacked(stockpot.open_checkpoint(path), {"e0": ("e", 0)})
    through = stockpot.merge({"merge_method": "linear", "models": ["v"]}, tmp_path / "through", sources={"v": view})
    assert through.lineage["inputs"][0]["parts"][0]["files"] == direct.lineage["inputs"][0]["files"]


def test_sources_are_checkpoints(folder: Path) -> None:
    for wrong in (str(folder), {"q": torch.ones(2)}):
        with pytest.raises(ArgumentError, match="sources: 'v': expected what open_checkpoint"):
            stockpot.plan({"merge_method": "linear", "models": ["v"]}, sources={"v": wrong})
    with pytest.raises(ArgumentError, match="rows are whole numbers"):
        views.rows(stockpot.open_checkpoint(folder), {"q": [0.5]})


def test_what_base_and_adapter_are_made_of_may_be_given(lora_run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Wherever a recipe names a model: both halves of base+adapter, and the base of `adapter: fused`."""
    base, own = stockpot.open_checkpoint(tiny_llama), str(lora_run / "checkpoint-4")
    name = next(n for n in base.names() if "mlp.down_proj" in n)
    order = shuffled(base.spec(name).shape[0])
    given = {"mine": views.rows(base, {name: order})}
    plain = stockpot.merge({"merge_method": "passthrough", "models": [f"{tiny_llama}+{own}"]}, tmp_path / "plain")
    stockpot.merge({"merge_method": "passthrough", "models": [f"mine+{own}"]}, tmp_path / "given", sources=given)
    fused = {"merge_method": "linear", "models": [own], "adapter": {"mode": "fused", "base": "mine"}}
    stockpot.merge(fused, tmp_path / "fused", sources=given)
    want = load(Path(plain.path))
    for out in ("given", "fused"):
        got = load(tmp_path / out)
        assert torch.equal(got[name], want[name][order])
        assert all(torch.equal(got[n], want[n]) for n in want if n != name)


def test_a_view_writes_what_is_behind_it_in_its_own_dtype(lora_run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """base+adapter is computed in float32 and written as the base has it, through a view too."""
    tensors = {n: t.bfloat16() for n, t in load(tiny_llama).items()}
    config = json.loads((tiny_llama / "config.json").read_text())
    for name, rows in (("long", 0), ("short", 5)):
        cut = {
            n: t[: len(t) - rows].clone() if n in ("model.embed_tokens.weight", "lm_head.weight") else t
            for n, t in tensors.items()
        }
        write_model(tmp_path / name, cut, config)
    models = [f"{tmp_path / 'long'}+{lora_run / 'checkpoint-4'}", str(tmp_path / "short")]
    stockpot.merge({"merge_method": "linear", "models": models, "vocab": "crop"}, tmp_path / "out")
    assert {t.dtype for t in load(tmp_path / "out").values()} == {torch.bfloat16}
