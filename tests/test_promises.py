"""Promises of the docs that nothing else notices the breaking of: each test here names one (docs/architecture.md lists them)."""

from __future__ import annotations

import os
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stockpot
from stockpot.errors import CheckpointError, OutputError
from stockpot.methods import ties

from helpers import load, write_model

# which value of a parameter holds


def test_the_most_specific_setting_wins(family: Path) -> None:
    """A rule's, then the model's own, the slice's, the recipe's, the default: the strongest is taken away one by one."""
    rule = {"match": "*", "parameters": {"density": 0.1}}
    own, piece, shared = ({"density": d} for d in (0.2, 0.3, 0.4))

    def density(*, with_rule: bool, with_own: bool, with_slice: bool, with_shared: bool) -> float:
        source: dict[str, Any] = {"model": str(family / "a"), "layer_range": [0, 4]}
        recipe: dict[str, Any] = {
            "merge_method": "ties",
            "base_model": str(family / "base"),
            "slices": [{"sources": [source | ({"parameters": own} if with_own else {})]}],
        }
        recipe["slices"][0] |= {"parameters": piece} if with_slice else {}
        recipe |= {"parameters": shared} if with_shared else {}
        recipe |= {"rules": [rule]} if with_rule else {}
        (group,) = stockpot.plan(recipe).groups
        (found,) = group.params["density"]
        return float(found)

    keys = ("with_rule", "with_own", "with_slice", "with_shared")
    found = [density(**{k: j >= i for j, k in enumerate(keys)}) for i in range(5)]
    assert found == [0.1, 0.2, 0.3, 0.4, 1.0]


# how many elements a density keeps


@pytest.mark.parametrize(
    ("density", "n", "kept"), [(0.3, 7, 2), (0.5, 7, 3), (0.99, 7, 6), (0.1, 7, 1), (0.0, 7, 0), (0.7, 10, 7)]
)
def test_a_density_keeps_the_whole_number_below(density: float, n: int, kept: int) -> None:
    values = np.arange(1.0, n + 1)
    merged = ties([{"w": values}], base={"w": np.zeros(n)}, density=density)["w"]
    assert np.count_nonzero(merged) == kept
    rows = {"w": np.tile(values, (70_000, 1))}  # so many that they are counted by windows, not sorted
    many = ties([rows], base={"w": np.zeros((70_000, n))}, density=0.3)["w"]
    assert np.count_nonzero(many) == 70_000 * 3  # int(147,000) is within the value 6, of which all are kept


def test_a_majority_of_zero_is_positive() -> None:
    """Deltas that cancel exactly, in a model whose signs are as often positive as negative."""
    one, two = {"w": np.array([1.0, 2.0, -2.0])}, {"w": np.array([-1.0, 2.0, -2.0])}
    merged = ties([one, two], base={"w": np.zeros(3)}, density=1.0, dialect="paper")["w"]
    np.testing.assert_array_equal(merged, [1.0, 2.0, -2.0])


# flushing before recording, recording before publishing


class Recorder:
    """What is done to files, in order: (call, name of the file or folder)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        for name in ("fdatasync", "fsync"):
            monkeypatch.setattr(os, name, self.of_descriptor(name, getattr(os, name)))
        write, rename, unlink = os.write, os.rename, os.unlink
        monkeypatch.setattr(os, "write", lambda fd, data: self.note("write", self.name(fd), write(fd, data)))
        monkeypatch.setattr(os, "rename", lambda a, b: self.note("rename", os.path.basename(b), rename(a, b)))
        monkeypatch.setattr(os, "unlink", lambda p, **k: self.note("unlink", os.path.basename(p), unlink(p, **k)))

    @staticmethod
    def name(fd: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def note(self, call: str, name: str, result: Any) -> Any:
        with self.lock:
            self.calls.append((call, name))
        return result

    def of_descriptor(self, call: str, real: Any) -> Any:
        return lambda fd: self.note(call, self.name(fd), real(fd))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_data_is_flushed_before_it_is_vouched_for(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Recorder(monkeypatch)
    stockpot.merge(f"merge_method: linear\nmodels: [{family}/a, {family}/b]\n", tmp_path / "out")
    calls = [
        c for c in seen.calls if c[1] in ("model.safetensors", "stockpot.journal", "out.partial", "out", tmp_path.name)
    ]
    first_line = calls.index(("write", "stockpot.journal"))
    recorded = calls.index(("write", "stockpot.journal"), first_line + 1)
    flushed = calls.index(("fdatasync", "model.safetensors"))
    assert flushed < recorded, "the journal vouches for what is not on disk yet"
    assert ("fsync", "stockpot.journal") in calls[recorded:], "what the journal says is not flushed"
    published = calls.index(("rename", "out"))
    assert ("fsync", "out.partial") in calls[recorded:published], "the folder is renamed before it is flushed"
    assert ("fsync", tmp_path.name) in calls[published:], "the rename is not flushed"
    dropped = calls.index(("unlink", "stockpot.journal"))
    assert published < dropped


def test_the_seed_is_part_of_what_is_resumed(family: Path, tmp_path: Path) -> None:
    """Work left by another seed is not gone on with; that of the same one is."""
    from stockpot.engine import devices, run
    from stockpot.engine.bundles import Bundles

    text = f"merge_method: dare_linear\nbase_model: {family}/base\nmodels: [{family}/a]\nparameters: {{density: 0.5}}\n"
    plans = [stockpot.plan(text, stockpot.Options(seed=s, threads=1)) for s in (0, 1)]
    assert plans[0].identity != plans[1].identity
    real = Bundles.merge

    def half(self: Bundles, rows: Any, *args: Any) -> Any:
        done = real(self, rows[: len(rows) // 2], *args)
        self.ledger.done[rows[: len(rows) // 2]] = True
        raise KeyboardInterrupt(done)

    Bundles.merge = half  # type: ignore[method-assign]
    try:
        for name in ("same", "other"):
            with pytest.raises(KeyboardInterrupt):
                run.run_plan(plans[0], str(tmp_path / name), devices.NumpyDevice())
    finally:
        Bundles.merge = real  # type: ignore[method-assign]
    for seed, name in ((0, "same"), (1, "other")):
        stockpot.merge(text, tmp_path / name, stockpot.Options(seed=seed))
        stockpot.merge(text, tmp_path / f"{name} fresh", stockpot.Options(seed=seed))
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            tmp_path / f"{name} fresh/model.safetensors"
        ).read_bytes()


def test_a_full_disk_is_found_before_the_work(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    text = f"merge_method: linear\nmodels: [{family}/a, {family}/b]\n"
    need = stockpot.plan(text).bytes_out
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**12, 10**12, need - 1))
    with pytest.raises(OutputError, match="the output needs"):
        stockpot.merge(text, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**12, 10**12, need))
    stockpot.merge(text, tmp_path / "out")


# what is read


def test_only_the_hubs_cache_may_link_to_blobs(family: Path, tmp_path: Path) -> None:
    """A link to ../blobs is followed from a folder called snapshots, and from no other."""
    for place in ("snapshots", "versions"):
        home = tmp_path / place / "models--x"
        (home / "blobs").mkdir(parents=True)
        (home / "blobs" / "abc").write_bytes((family / "a/model.safetensors").read_bytes())
        folder = home / place / "1"
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes((family / "a/config.json").read_bytes())
        (folder / "model.safetensors").symlink_to("../../blobs/abc")
    stockpot.open_checkpoint(tmp_path / "snapshots/models--x/snapshots/1")
    with pytest.raises(CheckpointError, match="symbolic link"):
        stockpot.open_checkpoint(tmp_path / "versions/models--x/versions/1")


def test_the_first_pattern_that_matches_counts(tiny_llama: Path, tmp_path: Path) -> None:
    """Two patterns of rank and alpha match one module: PEFT takes the first, and so does a merge."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    patterns = {"0.self_attn.q_proj": 2, "q_proj": 6}  # in the order in which PEFT writes them, too
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        rank_pattern=patterns, alpha_pattern={"0.self_attn.q_proj": 3, "q_proj": 50},
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")
    merged = expected.merge_and_unload().state_dict()
    stockpot.merge(f"merge_method: linear\nmodels: ['{tiny_llama}+{tmp_path}/adapter']\n", tmp_path / "out")
    for name, value in load(tmp_path / "out").items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)


# sums and sweeps


def test_parts_of_a_sum_are_added_in_their_order() -> None:
    """Whatever the order in which pieces are done: the same last bit."""
    from stockpot.engine.gathering import Gathering
    from stockpot.methods import slerp
    from stockpot.planning.plan import StatPlan

    plan = StatPlan(0, slerp, 0, "tensor", {}, 2)
    rng = np.random.default_rng(0)
    parts = {(t, p): rng.standard_normal(3) * 10.0 ** rng.integers(-8, 8) for t in range(3) for p in range(20)}
    found = []
    for seed in range(5):
        gathering = Gathering([plan], 10, {})
        keys = list(parts)
        np.random.default_rng(seed).shuffle(keys)
        for key in keys:
            gathering.add(tuple(key), parts[tuple(key)])
        gathering.finish_pass()
        found.append(gathering.results[0].tobytes())
    assert len(set(found)) == 1
    total = np.zeros(3)
    for key in sorted(parts):
        total = total + parts[key]
    assert np.frombuffer(found[0], np.float64)[[0, 1, 3]].tolist() == total.tolist()


def test_equal_candidates_are_scored_once(tmp_path: Path) -> None:
    """Two workers that make the same candidate at the same time don't both score it."""
    import stockpot
    from scoring import distance_suite
    from stockpot.testing.models import state

    write_model(tmp_path / "a", {n: torch.from_numpy(v).float() for n, v in state({"w": (40, 40)}, 0).items()})
    log = tmp_path / "log"
    suite = distance_suite(tmp_path, log=str(log), delay=0.3)
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "a"), "parameters": {"weight": 1.0}}]}
    # a normalised weight of one model is 1 whatever it was: eight names for the same bytes
    grid = {"models[0].weight": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}
    found = stockpot.sweep(None, tmp_path / "out", suite, recipe=recipe, grid=grid, jobs=4, publish=False)
    assert len(found.result.rows) >= 8
    scored = [line for line in log.read_text().splitlines() if line.startswith("selection")]
    assert len(scored) == len({line.split()[1] for line in scored}) == 1
