"""Inputs are what was planned: files that are replaced, written to or only touched, before, during and between merges."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stockpot
from servers import serving
from stockpot.api.merging import Options, merge_planned
from stockpot.checkpoints.stores import _found
from stockpot.engine import loop
from stockpot.engine.devices import NumpyDevice
from stockpot.engine.run import run_plan
from stockpot.errors import ReadError, StockpotError

ROWS = 700_000  # more than a piece
NAMES = [f"layers.{i}.w" for i in range(4)]


def model(path: Path, seed: int) -> Path:
    path.mkdir()
    generator = torch.Generator().manual_seed(seed)
    save_file({n: torch.randn(ROWS, generator=generator) for n in NAMES}, path / "model.safetensors")
    return path


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [model(tmp_path / n, i) for i, n in enumerate("ab")]


def replacement(of: Path, seed: int = 9) -> Path:
    """Another model's file, of the same size and time."""
    other = model(of.parent / f"other{seed}", seed) / "model.safetensors"
    held = (of / "model.safetensors").stat()
    os.utime(other, ns=(held.st_atime_ns, held.st_mtime_ns))
    return other


def recipe(models: list[Path], method: str) -> dict[str, Any]:
    if method == "ties":
        parameters = {"density": 0.4}
        return {
            "merge_method": "ties",
            "base_model": str(models[0]),
            "models": [str(models[1])],
            "parameters": parameters,
        }
    return {"merge_method": "linear", "models": [str(m) for m in models], "parameters": {"weight": 0.5}}


def output(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


class Stop(Exception):
    pass


def stopped(models: list[Path], out: Path, method: str, after: int = 4) -> None:
    """A merge into OUT that ended after some of its work."""
    count = 0
    real = loop.Loop._do

    def failing(self: Any, *args: Any) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise Stop
        real(self, *args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(loop.Loop, "_do", failing)
        with pytest.raises(Stop):
            run_plan(stockpot.plan(recipe(models, method), Options(threads=1)), str(out), NumpyDevice())


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_resume_takes_the_files_that_are_there(models: list[Path], tmp_path: Path, method: str) -> None:
    """Replaced by a file of the same size and time, as tar, containers and cp -p leave it."""
    stopped(models, tmp_path / "out", method)
    os.replace(replacement(models[1]), models[1] / "model.safetensors")
    stockpot.merge(recipe(models, method), tmp_path / "out")
    stockpot.merge(recipe(models, method), tmp_path / "fresh")
    same(output(tmp_path / "out"), output(tmp_path / "fresh"))


def test_a_resume_keeps_what_is_of_the_same_bytes(models: list[Path], tmp_path: Path) -> None:
    """Only one tensor is another one: what was merged of the others is taken over."""
    stopped(models, tmp_path / "out", "linear", after=5)
    tensors = output(models[1])
    tensors[NAMES[0]] = tensors[NAMES[0]] + 1
    held = (models[1] / "model.safetensors").stat()
    save_file(tensors, tmp_path / "new")
    os.utime(tmp_path / "new", ns=(held.st_atime_ns, held.st_mtime_ns))
    os.replace(tmp_path / "new", models[1] / "model.safetensors")
    result = stockpot.merge(recipe(models, "linear"), tmp_path / "out")
    assert 0 < result.lineage["bytes_resumed"] < 3 * ROWS * 4
    stockpot.merge(recipe(models, "linear"), tmp_path / "fresh")
    same(output(tmp_path / "out"), output(tmp_path / "fresh"))


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_resume_after_a_touch(models: list[Path], tmp_path: Path, method: str) -> None:
    """A new name, new permissions: what was merged is compared, and taken over, and again after that; where statistics were
    gathered before, nothing shows that they are of what is there, and all is done again.
    """
    stopped(models, tmp_path / "out", method)
    os.link(models[1] / "model.safetensors", tmp_path / "backup")
    stopped(models, tmp_path / "out", method, after=1)
    (models[0] / "model.safetensors").chmod(0o600)
    result = stockpot.merge(recipe(models, method), tmp_path / "out")
    assert (result.lineage["bytes_resumed"] > 0) is (method == "linear")
    stockpot.merge(recipe(models, method), tmp_path / "fresh")
    same(output(tmp_path / "out"), output(tmp_path / "fresh"))


def test_replaced_between_plan_and_merge(models: list[Path], tmp_path: Path) -> None:
    planned = stockpot.plan(recipe(models, "linear"))
    os.replace(replacement(models[1]), models[1] / "model.safetensors")
    with pytest.raises(ReadError, match="was changed after its header was read; merge again"):
        merge_planned(planned, tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()
    merge_planned(stockpot.plan(recipe(models, "linear")), tmp_path / "out", Options())  # as it says


def test_touched_between_plan_and_merge(models: list[Path], tmp_path: Path) -> None:
    planned = stockpot.plan(recipe(models, "linear"))
    (models[1] / "model.safetensors").chmod(0o600)
    merge_planned(planned, tmp_path / "out", Options())


@pytest.fixture
def midway(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None], Callable[[], None]], None]:
    """Set what is done when the first piece of work is done, and after the last."""

    def setting(first: Callable[[], None], last: Callable[[], None]) -> None:
        real, runs, begun = loop.Loop._do, loop.Loop.run, []

        def does(self: Any, *args: Any) -> None:
            real(self, *args)
            if not begun:
                begun.append(True)
                first()

        def ran(self: Any, *args: Any) -> bool:
            done = runs(self, *args)
            last()
            return done

        monkeypatch.setattr(loop.Loop, "_do", does)
        monkeypatch.setattr(loop.Loop, "run", ran)

    return setting


def test_replaced_and_put_back_during_a_merge(models: list[Path], tmp_path: Path, midway: Any) -> None:
    """What is open is read on: the output is of what was planned."""
    stockpot.merge(recipe(models, "linear"), tmp_path / "fresh")
    place, other = models[1] / "model.safetensors", replacement(models[1])

    def swap() -> None:
        os.rename(place, tmp_path / "aside")
        os.rename(other, place)

    def back() -> None:
        os.rename(place, other)
        os.rename(tmp_path / "aside", place)

    midway(swap, back)
    stockpot.merge(recipe(models, "linear"), tmp_path / "out", Options(threads=1))
    same(output(tmp_path / "out"), output(tmp_path / "fresh"))


@pytest.mark.parametrize("kept_time", [True, False])
def test_replaced_for_good_during_a_merge(models: list[Path], tmp_path: Path, midway: Any, kept_time: bool) -> None:
    other = replacement(models[1])
    if not kept_time:
        os.utime(other)
    midway(lambda: os.replace(other, models[1] / "model.safetensors"), lambda: None)
    with pytest.raises(ReadError, match="was changed after its header was read"):
        stockpot.merge(recipe(models, "linear"), tmp_path / "out", Options(threads=1))
    assert not (tmp_path / "out").exists()
    stockpot.merge(recipe(models, "linear"), tmp_path / "out")
    stockpot.merge(recipe(models, "linear"), tmp_path / "fresh")
    same(output(tmp_path / "out"), output(tmp_path / "fresh"))


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_written_to_during_a_merge_with_the_time_set_back(
    models: list[Path], tmp_path: Path, midway: Any, method: str
) -> None:
    place = models[1] / "model.safetensors"
    held = place.stat()

    def write() -> None:
        with open(place, "r+b") as f:
            f.seek(held.st_size - 4 * ROWS * len(NAMES))
            f.write(np.full(100, 7, np.float32).tobytes())
            f.seek(-4000, 2)
            f.write(np.full(1000, 7, np.float32).tobytes())
        os.utime(place, ns=(held.st_atime_ns, held.st_mtime_ns))

    midway(write, lambda: None)
    with pytest.raises(ReadError, match=r"was touched during the merge .*merge again"):
        stockpot.merge(recipe(models, method), tmp_path / "out", Options(threads=1))
    assert not (tmp_path / "out").exists()


def test_a_backup_during_a_merge_is_no_change(models: list[Path], tmp_path: Path, midway: Any) -> None:
    stockpot.merge(recipe(models, "linear"), tmp_path / "fresh")
    midway(lambda: os.link(models[1] / "model.safetensors", tmp_path / "backup"), lambda: None)
    stockpot.merge(recipe(models, "linear"), tmp_path / "out", Options(threads=1))
    same(output(tmp_path / "out"), output(tmp_path / "fresh"))


# behind URLs


def swapped_after(root: Path, gets: int) -> dict[str, Any]:
    """A server whose file is another one, of the same size and a later time, after so many answers."""
    count = 0

    def after() -> None:
        nonlocal count
        count += 1
        if count == gets:
            os.replace(root / "later.safetensors", root / "model.safetensors")

    return {"after": staticmethod(after)}


@pytest.mark.parametrize("gets", [2, 5, 9])
@pytest.mark.parametrize("stamps", [("Last-Modified",), ("ETag",), ("ETag", "Last-Modified")])
def test_replaced_on_a_server(tmp_path: Path, gets: int, stamps: tuple[str, ...]) -> None:
    root = model(tmp_path / "root", 0)
    os.utime(root / "model.safetensors", (1_700_000_000, 1_700_000_000))
    shutil.copy(model(tmp_path / "new", 1) / "model.safetensors", root / "later.safetensors")
    before = output(root)
    with serving(root, stamps=stamps, **swapped_after(root, gets)) as (url, _), contextlib.suppress(StockpotError):
        stockpot.merge({"merge_method": "linear", "models": [f"{url}/model.safetensors"]}, tmp_path / "out")
    if (tmp_path / "out").exists():  # it came after the last look
        same(output(tmp_path / "out"), before)


def test_a_server_without_stamps_is_noted(tmp_path: Path) -> None:
    root = model(tmp_path / "root", 0)
    with serving(root, stamps=()) as (url, _):
        source = {"merge_method": "linear", "models": [f"{url}/model.safetensors"]}
        assert any("tells neither an ETag nor a time of change" in n for n in stockpot.plan(source).notes)
        stockpot.merge(source, tmp_path / "out")
        same(output(tmp_path / "out"), output(root))
    other = {**output(root)}
    other["layers.9.w"] = other.pop("layers.3.w")
    save_file(other, root / "later.safetensors")
    with serving(root, stamps=(), **swapped_after(root, 6)) as (url, _):
        planned = stockpot.plan({"merge_method": "linear", "models": [f"{url}/model.safetensors"]})
        os.replace(root / "later.safetensors", root / "model.safetensors")
        with pytest.raises(ReadError, match="was changed after its header was read"):
            merge_planned(planned, tmp_path / "again", Options())


def test_stamps_of_stores() -> None:
    """Whatever a store calls it, another value is another file."""
    for key in ("ETag", "LastModified", "Last-Modified", "VersionId", "generation", "md5Hash", "mtime"):
        one, two = (_found({"name": "x", "size": 3, key: value}) for value in ("1", "2"))
        assert one.stamped
        assert one.stamp != two.stamp
    assert not _found({"name": "x", "size": 3}).stamped
