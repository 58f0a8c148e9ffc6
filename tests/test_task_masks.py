"""`stockpot masks`: a multi-task checkpoint with masks, and what comes back of each expert."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stockpot
from stockpot.api.multitask import make_masks, open_task, restore_task
from stockpot.checkpoints.source import ReadRequest
from stockpot.testing import run_checks, source_checks

from helpers import cli

SHAPES = {"model.layers.0.w": (37, 19), "model.layers.1.w": (700, 801), "model.norm": (13,)}


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "odd"}))
    return str(folder)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} | {"steps": torch.tensor([3, 4])}
    written(tmp_path / "base", base)
    for i in range(3):
        tensors = {
            n: v + 0.1 * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
            for n, v in base.items()
        }
        written(tmp_path / f"task{i}", tensors | {"steps": torch.tensor([3, 4 + (i == 2)])})
    return tmp_path


def recipe(root: Path, *names: str, method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "base_model": str(root / "base"), "models": [str(root / n) for n in names], **more}


@pytest.mark.parametrize("threshold", [0.2, 0.4, 1.0])
def test_tall_masks(models: Path, threshold: float) -> None:
    names = ["task0", "task1", "task2"]
    report = make_masks(recipe(models, *names), models / "out", threshold=threshold)
    base, merged = load_file(models / "base/model.safetensors"), load_file(models / "out/model/model.safetensors")
    for name, task in zip(names, report.tasks):
        expert = load_file(models / name / "model.safetensors")
        back = restore_task(models / "out", name, models / f"{name}-back")
        found = load_file(Path(back.path) / "model.safetensors")
        missed = whole = ones = elements = 0.0
        for key in SHAPES:
            own = expert[key].double() - base[key]
            mask = own.abs() > threshold * (merged[key].double() - expert[key]).abs()
            assert torch.equal(found[key], torch.where(mask, merged[key], base[key]))
            missed += float((found[key].double() - expert[key]).square().sum())
            whole += float(own.square().sum())
            ones += int(mask.sum())
            elements += mask.numel()
        assert torch.equal(found["steps"], expert["steps"])  # what is not merged is the expert's own
        assert task.error == pytest.approx((missed / whole) ** 0.5, rel=1e-9)
        assert task.kept == pytest.approx(ones / elements)
        stockpot.verify(back.path)
    assert json.loads((models / "out/masks.json").read_text())["tasks"][1]["name"] == "task1"
    size = sum(f.stat().st_size for f in (models / "out/masks").iterdir())
    assert size < 1.1 * 3 * sum(v.numel() for v in base.values()) / 8 + 10_000
    assert report.bytes == report.model_bytes + report.base_bytes + size
    assert report.bytes < report.experts_bytes


def test_one_task_comes_back_exactly(models: Path) -> None:
    report = make_masks(recipe(models, "task1"), models / "out")
    assert report.tasks[0].error < 1e-6
    back = restore_task(models / "out", "task1", models / "back")
    found, expert = load_file(Path(back.path) / "model.safetensors"), load_file(models / "task1/model.safetensors")
    for key in SHAPES:
        assert torch.allclose(found[key], expert[key], atol=1e-6)


def test_emr_masks_and_scales(models: Path) -> None:
    names = ["task0", "task1", "task2"]
    report = make_masks(recipe(models, *names, method="emr"), models / "out")
    base, merged = load_file(models / "base/model.safetensors"), load_file(models / "out/model/model.safetensors")
    united = {k: merged[k].double() - base[k] for k in SHAPES}
    for name, task in zip(names, report.tasks):
        expert = load_file(models / name / "model.safetensors")
        own = {k: expert[k].double() - base[k] for k in SHAPES}
        masks = {k: own[k] * united[k] > 0 for k in SHAPES}
        scale = sum(float(v.abs().sum()) for v in own.values()) / sum(
            float(united[k][masks[k]].abs().sum()) for k in SHAPES
        )
        assert task.scale == pytest.approx(scale, rel=1e-6)
        back = load_file(Path(restore_task(models / "out", name, models / f"{name}-back").path) / "model.safetensors")
        missed = 0.0
        for k in SHAPES:
            wanted = base[k].double() + scale * masks[k] * united[k]
            assert torch.allclose(back[k].double(), wanted, atol=1e-6)
            missed += float((wanted - expert[k]).square().sum())
        whole = sum(float(v.square().sum()) for v in own.values())
        assert task.error == pytest.approx((missed / whole) ** 0.5, rel=1e-4)
    tall = make_masks(recipe(models, *names), models / "tall")
    assert report.tasks[0].error < tall.tasks[0].error


def test_any_range_can_be_read(models: Path) -> None:
    make_masks(recipe(models, "task0", "task1"), models / "out")
    whole = open_task(models / "out", "task0")
    name = "model.layers.1.w"
    everything = np.empty(whole.spec(name).nbytes, np.uint8)
    whole.read([ReadRequest(name, 0, whole.spec(name).numel)], everything.data)
    for start, stop in [(0, 1), (3, 9), (7, 8), (8, 8), (1001, 560_000), (560_699, 560_700)]:
        part = np.empty(4 * (stop - start), np.uint8)
        whole.read([ReadRequest(name, start, stop)], part.data)
        assert part.tobytes() == everything[4 * start : 4 * stop].tobytes()


@pytest.mark.parametrize("method", ["task_arithmetic", "emr"])
def test_a_restored_task_is_a_source_like_others(models: Path, method: str) -> None:
    make_masks(recipe(models, "task1", "task2", method=method), models / "out")
    run_checks(source_checks(lambda: open_task(models / "out", "task2")))
    found = open_task(models / "out", "task2")
    files = {(Path(leaf.path).name, name) for leaf, name in found.stored("model.norm")}
    assert files == {("model", "model.norm"), ("base", "model.norm"), ("task2.safetensors", "mask/model.norm")}
    assert [name for _, name in found.stored("steps")] == ["own/steps"]
    raw = np.empty(2, np.int64)
    found.read([ReadRequest("steps", 0, 2)], memoryview(raw).cast("B"))
    assert raw.tolist() == [3, 5]


def test_a_base_that_is_another_or_elsewhere(models: Path) -> None:
    make_masks(recipe(models, "task0", "task1"), models / "out")
    shutil.move(models / "base", models / "moved")
    with pytest.raises(stockpot.StockpotError, match="say with --base where it is"):
        open_task(models / "out", "task0")
    done = cli("masks", "restore", models / "out", "task0", models / "back", "--base", models / "moved", "--quiet")
    assert done.returncode == 0, done.stderr
    other = load_file(models / "moved/model.safetensors")
    other["model.norm"][0] += 1e-3
    save_file(other, models / "moved/model.safetensors", {"format": "pt"})
    with pytest.raises(stockpot.StockpotError, match="holds other weights than when the masks were made"):
        open_task(models / "out", "task0", base=str(models / "moved"))
    with pytest.raises(stockpot.StockpotError, match="it is not the base of these masks"):
        open_task(models / "out", "task0", base=written(models / "small", {"model.norm": torch.ones(13)}))


def test_what_can_not_be_masked_is_refused_and_nothing_is_left(models: Path) -> None:
    before = sorted(p.name for p in models.iterdir())
    odd = load_file(models / "task1/model.safetensors")
    odd.pop("model.norm")
    partial = recipe(models, "task0", absent="skip")
    partial["models"].append(written(models / "odd", odd))
    before = sorted([*before, "odd"])
    for odd, why in [
        (
            {"merge_method": "linear", "models": [str(models / "task0"), str(models / "task1")]},
            "adds changes to a base",
        ),
        (partial, "merged under their own names"),
        (recipe(models, "task0", dtype="bfloat16"), "leave dtype out of the recipe"),
    ]:
        with pytest.raises(stockpot.StockpotError, match=why):
            make_masks(odd, models / "out")
    with pytest.raises(stockpot.StockpotError, match="a number of at least 0"):
        make_masks(recipe(models, "task0"), models / "out", threshold=-1)
    with pytest.raises(stockpot.StockpotError, match="exists; masks are written to a new directory"):
        make_masks(recipe(models, "task0"), models / "task1")
    with pytest.raises(stockpot.StockpotError, match="there is no directory"):
        make_masks(recipe(models, "task0"), models / "no" / "out")
    assert sorted(p.name for p in models.iterdir()) == before
    with pytest.raises(stockpot.StockpotError, match="holds no masks"):
        open_task(models / "task0", "x")


def test_tasks_of_one_name_and_one_that_changes_nothing(models: Path) -> None:
    shutil.copytree(models / "task1", models / "more" / "task0")
    shutil.copytree(models / "base", models / "still" / "task0")
    for method in ("task_arithmetic", "emr"):
        asked = recipe(models, "task0", "more/task0", "still/task0", method=method)
        report = make_masks(asked, models / method)
        assert [t.name for t in report.tasks] == ["task0", "task0-2", "task0-3"]
        still = report.tasks[2]
        assert (still.kept, still.error) == (0, 0)
        assert still.scale == (0 if method == "emr" else 1)
        back = load_file(
            Path(restore_task(models / method, "task0-3", models / f"{method}-b").path) / "model.safetensors"
        )
        base = load_file(models / "base/model.safetensors")
        assert all(torch.equal(back[n], base[n]) for n in base)
        second = open_task(models / method, "task0-2")
        assert second.spec("model.norm") == open_task(models / method, "task0").spec("model.norm")


def test_short_writes_lose_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["task0", "task1", "task2"]
    make_masks(recipe(models, *names), models / "out")
    real = os.pwrite
    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: max(len(data) // 3, 1)], at))
        make_masks(recipe(models, *names), models / "slow")
    for file in (models / "out/masks").iterdir():
        assert file.read_bytes() == (models / "slow/masks" / file.name).read_bytes()


def test_stopped_and_begun_again_even_with_another_recipe(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stockpot.api.multitask import making

    before = sorted(p.name for p in models.iterdir())
    with monkeypatch.context() as m:
        m.setattr(making, "base_digest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_masks(recipe(models, "task0", "task1", "task2"), models / "out")
    assert not (models / "out").exists()
    assert (models / "out.steps").is_dir()
    make_masks(recipe(models, "task0", "task2"), models / "out")
    assert sorted(p.name for p in models.iterdir()) == sorted([*before, "out"])
    assert sorted(p.name for p in (models / "out/masks").iterdir()) == ["task0.safetensors", "task2.safetensors"]
    make_masks(recipe(models, "task0", "task2"), models / "plain")
    for file in ("model/model.safetensors", "masks/task0.safetensors", "masks/task2.safetensors"):
        assert (models / "out" / file).read_bytes() == (models / "plain" / file).read_bytes()


def test_what_is_not_ours_stays(models: Path) -> None:
    (models / "out.steps").mkdir()
    (models / "out.steps" / "thesis.txt").write_text("mine")
    with pytest.raises(stockpot.StockpotError, match="holds something else; move it away"):
        make_masks(recipe(models, "task0"), models / "out")
    assert (models / "out.steps" / "thesis.txt").read_text() == "mine"


def test_on_the_command_line(models: Path) -> None:
    path = models / "recipe.yml"
    path.write_text(json.dumps(recipe(models, "task0", "task1")))
    done = cli("masks", path, models / "out", "--threshold", 0.3)
    assert done.returncode == 0, done.stderr
    assert "task1: " in done.stdout
    assert "% saved)" in done.stdout
    back = cli("masks", "restore", models / "out", "task1")
    assert back.returncode == 0, back.stderr
    assert (models / "out-task1" / "stockpot.json").exists()
    assert "did you mean 'task1'" in cli("masks", "restore", models / "out", "tsk1").stderr
    assert "name the task" in cli("masks", "restore", models / "out").stderr
    assert "takes no task" in cli("masks", path, models / "o2", "task1").stderr
    assert "no --overwrite" in cli("masks", path, models / "o2", "--overwrite").stderr
    told = json.loads(cli("masks", path, models / "o3", "--json").stdout)
    assert [t["name"] for t in told["tasks"]] == ["task0", "task1"]
    (models / "out/masks.json").write_text('{"format": 7}')
    assert "is of format 7, expected 1" in cli("masks", "restore", models / "out", "task1").stderr
    (models / "out/masks.json").write_text('{"format": 1, "tasks": 3}')
    broken = cli("masks", "restore", models / "out", "task1")
    assert broken.returncode == 3
    assert "is not what stockpot writes" in broken.stderr
