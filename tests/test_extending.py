"""docs/extending.md, run as it stands there."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stockpot
from stockpot.methods.declaration import _REGISTRY
from stockpot.testing import method_checks, statistic_checks
from stockpot.testing.models import CUT, state, write_model

PAGE = Path(__file__).parents[1] / "docs/extending.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not a source checkout")


def blocks() -> dict[str, str]:
    """The page's Python files by name."""
    found = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE.read_text(), re.S) if PAGE.exists() else []
    return dict(found)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in blocks().items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(_REGISTRY)
    yield tmp_path
    _REGISTRY.clear()
    _REGISTRY.update(before)
    for name in blocks():
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_page_has_what_it_promises() -> None:
    assert set(blocks()) == {
        "trimmed_sum.py",
        "test_trimmed_sum.py",
        "low_rank_mean.py",
        "counting.py",
        "softmax_scheme.py",
        "npz_format.py",
        "packed_experts.py",
        "heaviest.py",
    }


def test_a_method_and_its_test(files: Path) -> None:
    __import__("trimmed_sum")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "trimmed_sum", str(files / "test_trimmed_sum.py")],
        cwd=files, capture_output=True, text=True, env={"PYTHONPATH": str(files), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    write_model(str(files / "base"), state(CUT, 0))
    write_model(str(files / "a"), state(CUT, 1))
    result = stockpot.merge(
        f"merge_method: trimmed_sum\nbase_model: {files}/base\nmodels: [{files}/a]\nparameters: {{density: 0.3}}\n",
        files / "out",
    )
    assert result.lineage["groups"][0]["parameters"] == {"density": (0.3,)}


def test_a_method_on_matrices(files: Path) -> None:
    __import__("low_rank_mean")
    for check in method_checks("low_rank_mean"):
        folder = files / check.name
        folder.mkdir()
        check(folder)


def test_a_way_to_weight_snapshots(files: Path, lora_run: Path) -> None:
    import math

    from stockpot import SoupSpec, parse_name
    from stockpot.errors import ArgumentError
    from stockpot.runs.schemes import SCHEMES, add_scheme
    from stockpot.training.average import checked_spec

    before = dict(SCHEMES)
    try:
        __import__("softmax_scheme")
        spec = SoupSpec(last=3, scheme="softmax", by="loss", options={"temperature": 0.1})
        result = stockpot.soup(lora_run, files / "out", spec)
        assert result.soup is not None
        assert result.soup["name"] == "last_3_loss_softmax-0_1"
        assert parse_name("last_3_loss_softmax-0_1") == spec
        rows = result.soup["snapshots"]
        raw = [math.exp(-r["metric"] / 0.1) for r in rows]
        assert [r["weight"] for r in rows] == pytest.approx([x / sum(raw) for x in raw])
        assert checked_spec(spec) is spec
        run = {"path": str(lora_run), "last": 3, "scheme": "softmax", "by": "loss", "options": {"temperature": 0.1}}
        assert stockpot.plan({"merge_method": "linear", "run": run}).soup.name == "last_3_loss_softmax-0_1"  # type: ignore[union-attr]
        for given, message in (
            ({}, "needs options: temperature"),
            ({"temprature": 1.0}, "did you mean 'temperature'"),
            ({"temperature": 0.0}, "a number from 1e-06 to 1e"),
        ):
            with pytest.raises(ArgumentError, match=message):
                SoupSpec(last=3, scheme="softmax", by="loss", options=given)
        with pytest.raises(ArgumentError, match="uniform weights have no 'temperature'; it has none"):
            SoupSpec(last=3, options={"temperature": 1.0})
        with pytest.raises(ArgumentError, match="called 'softmax' already"):
            add_scheme("softmax", SCHEMES["softmax"])
    finally:
        SCHEMES.clear()
        SCHEMES.update(before)


def test_every_scheme_is_in_the_help_and_the_docs() -> None:
    from stockpot.runs.schemes import SCHEMES

    from helpers import cli

    shown = " ".join(cli("soup", "--help").stdout.split())
    page = (PAGE.parent / "mwa.md").read_text()
    for name in SCHEMES:
        assert name in shown, name
        assert name in page or name == "metric", name


def test_a_statistic(files: Path) -> None:
    made: Any = runpy.run_path(str(files / "counting.py"))["Changed"]
    sys.modules["counting"] = __import__("counting")
    stat = sys.modules["counting"].Changed()
    assert made().name == stat.name
    for check in statistic_checks(stat, {}, oracle=lambda b: (b != 0).sum(1)):
        check(files)


@pytest.fixture
def formats() -> Iterator[dict[str, Any]]:
    from stockpot.checkpoints.formats import FORMATS

    before = dict(FORMATS)
    yield FORMATS
    FORMATS.clear()
    FORMATS.update(before)


def test_a_format(files: Path, formats: dict[str, Any]) -> None:
    import fsspec
    import numpy as np

    from stockpot.checkpoints import open_checkpoint
    from stockpot.errors import CheckpointError
    from stockpot.testing import source_checks

    tensors = [{n: v.astype("<f4") for n, v in state(CUT, seed).items()} for seed in range(2)]
    for folder, held in zip("ab", tensors, strict=True):
        write_model(str(files / "safe" / folder), held, "F32")
        (files / folder).mkdir()
        np.savez(files / folder / "model.npz", **held)
        (files / folder / "config.json").write_text('{"architectures": ["Some"]}')
        fsspec.filesystem("memory").put(str(files / folder), f"/npz/{folder}", recursive=True)
    with pytest.raises(CheckpointError, match=r"no safetensors file; found config.json, model.npz"):
        open_checkpoint(files / "a")
    with pytest.raises(CheckpointError, match=r"numpy's archive of arrays"):
        open_checkpoint(files / "a/model.npz")
    runpy.run_path(str(files / "npz_format.py"))
    assert open_checkpoint(files / "a").config == {"architectures": ["Some"]}
    for ref in (str(files / "a"), str(files / "a/model.npz"), "memory://npz/a", "memory://npz/a/model.npz"):
        for check in source_checks(lambda ref=ref: open_checkpoint(ref)):  # type: ignore[misc]
            check(str(files))
    safe = stockpot.merge({"merge_method": "linear", "models": [str(files / f"safe/{n}") for n in "ab"]}, files / "one")
    for number, models in enumerate(([str(files / n) for n in "ab"], [f"memory://npz/{n}" for n in "ab"])):
        result = stockpot.merge({"merge_method": "linear", "models": models}, files / f"two{number}")
        assert result.lineage["output"]["tensors"] == safe.lineage["output"]["tensors"]
        stockpot.verify(files / f"two{number}")

    np.savez_compressed(files / "small.npz", **tensors[0])
    np.savez(files / "order.npz", w=np.asfortranarray(tensors[0]["model.embed_tokens.weight"]))
    whole = (files / "a/model.npz").read_bytes()
    (files / "cut.npz").write_bytes(whole[:-5000])
    for name, message in (
        ("small", "is compressed"),
        ("order", "save float32 in C order"),
        ("cut", "not a readable zip"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(files / f"{name}.npz")


def test_a_format_is_held_to_the_file(tmp_path: Path, formats: dict[str, Any]) -> None:
    from dataclasses import replace

    from stockpot.checkpoints import open_checkpoint
    from stockpot.checkpoints.formats import Format, add_format
    from stockpot.checkpoints.header import Entry, Header
    from stockpot.errors import CheckpointError
    from stockpot.specs import DType, TensorSpec

    (tmp_path / "m.raw").write_bytes(bytes(range(100)))
    spec = TensorSpec(DType.F32, (5, 5))
    headers = {
        "good": Header(str(tmp_path / "m.raw"), 100, 0, 0, {"w": Entry(spec, 0, 100)}, {}, b"raw"),
    }
    good = headers["good"]
    headers["past"] = replace(good, entries={"w": Entry(spec, 4, 104)})
    headers["before"] = replace(good, entries={"w": Entry(spec, -4, 96)})
    headers["short"] = replace(good, entries={"w": Entry(spec, 0, 96)})
    headers["silent"] = replace(good, raw=b"")
    chosen = ["good"]
    add_format("raw", Format((".raw",), lambda file, path: headers[chosen[0]], "model.raw"))
    assert open_checkpoint(tmp_path / "m.raw").spec("w") == spec
    with pytest.raises(
        CheckpointError, match=r"no model.safetensors and no .* and no model.raw; to take m.raw, name the file"
    ):
        open_checkpoint(tmp_path)
    for name, message in (
        ("past", r"bytes 4 to 104 are not in the file \(100 bytes\)"),
        ("before", "bytes -4 to 96 are not in the file"),
        ("short", r"F32 x \[5, 5\] needs 100 bytes, its place has 96"),
        ("silent", "no bytes of the description"),
    ):
        chosen[0] = name
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "m.raw")

    def describe(file: Any, path: str) -> Header:
        return good

    for name, format, message in (
        ("torch", Format((".x",), describe), "comes with stockpot"),
        ("x", Format((), describe), r"endings are such as '.npz', got \(\)"),
        ("x", Format(("npz",), describe), "endings are such as '.npz'"),
        ("x", Format((".raw",), describe), "files ending in .raw are those of the format 'raw'"),
        ("x", Format((".pt",), describe), "files ending in .pt are those of the format 'torch'"),
        ("x", Format((".x",), describe, "model.y"), "model.y does not end in .x"),
        ("x", Format((".x",), describe, adapter="adapter_model.y"), "adapter_model.y does not end in .x"),
    ):
        with pytest.raises(ValueError, match=message):
            add_format(name, format)
    assert sorted(formats) == ["raw", "safetensors", "torch"]


def test_installed_formats_are_found(
    tmp_path: Path, formats: dict[str, Any], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    import numpy as np

    from stockpot import installed
    from stockpot.checkpoints import open_checkpoint

    class Entry:
        def load(self) -> None:
            runpy.run_path(str(files / "npz_format.py"))

    monkeypatch.setattr(installed, "_done", set())
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [Entry()] if group == "stockpot.formats" else []
    )
    np.savez(tmp_path / "m.npz", w=np.ones((3, 4), "<f4"))
    assert open_checkpoint(tmp_path / "m.npz").spec("w").shape == (3, 4)


def test_a_view(files: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    apart = {f"mlp.experts.{i}.weight": torch.full((4, 3), float(i)) for i in range(3)} | {"norm": torch.ones(3)}
    packed = {"mlp.experts": torch.ones(3, 4, 3), "norm": torch.zeros(3)}
    for name, tensors in (("apart", apart), ("packed", packed)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    merge_packed = __import__("packed_experts").merge_packed
    merge_packed(str(tmp_path / "packed.safetensors"), str(tmp_path / "apart.safetensors"), str(tmp_path / "out"), 3)
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out.keys() == apart.keys()
    assert all(torch.equal(out[f"mlp.experts.{i}.weight"], torch.full((4, 3), (i + 1) / 2)) for i in range(3))
    stockpot.verify(tmp_path / "out")


def test_a_method_on_adapters(files: Path, tmp_path: Path) -> None:
    __import__("heaviest")
    checks = method_checks("heaviest")
    assert len(checks) > 5
    for i, check in enumerate(checks):
        (tmp_path / str(i)).mkdir()
        check(tmp_path / str(i))
