"""`--compat mergekit` and `stockpot-mergekit-yaml`: mergekit's recipes and commands as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import cli, load


def mergekit_yaml(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stockpot.cli.mergekit_yaml", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def breadcrumbs(family: Path, recipe: Callable[[str], Path]) -> Path:
    return recipe(
        f"# kept as it is\nmerge_method: sce\nbase_model: {family}/base\nmodels:\n"
        f"  - model: {family}/a\n  - model: {family}/b\nparameters: {{select_topk: 0.3, int8_mask: true}}\ndtype: float32\n"
    )


def test_the_usual_line_of_a_notebook(breadcrumbs: Path, tmp_path: Path) -> None:
    out = tmp_path / "merge"
    words = ["--copy-tokenizer", "--allow-crimes", "--out-shard-size", "1B", "--lazy-unpickle", "--trust-remote-code"]
    done = mergekit_yaml(breadcrumbs, out, *words, "-j", 1, "-v", "--random-seed", 7)
    assert done.returncode == 0, done.stderr
    assert "--allow-crimes has no effect" in done.stderr
    assert "--trust-remote-code has no effect: no code of a model is ever run" in done.stderr
    lineage = json.loads((out / "stockpot.json").read_text())
    assert "compat: mergekit" in lineage["recipe"]["text"]
    assert lineage["seed"] == 7
    assert all(g["parameters"].get("dialect") == "mergekit" for g in lineage["groups"])
    # as `stockpot merge --compat mergekit`, and over what it wrote itself
    assert cli("merge", breadcrumbs, tmp_path / "other", "--compat", "mergekit", "--seed", 7).returncode == 0
    ours, theirs = load(tmp_path / "other"), load(out)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    again = mergekit_yaml(breadcrumbs, out, "--quiet")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    # nothing but its own is replaced
    (out / "notes.txt").write_text("mine")
    refused = mergekit_yaml(breadcrumbs, out)
    assert refused.returncode == 2
    assert "notes.txt" in refused.stderr


def test_what_it_cannot_do_is_refused(breadcrumbs: Path, tmp_path: Path) -> None:
    for options, why in [
        (["--no-safe-serialization"], "outputs are safetensors"),
        (["--out-shard-size", "5GB"], "expected a whole number with K, M or B"),
        (["--out-shard-size", "1.5B"], "expected a whole number with K, M or B"),
        (["--allow-crime"], "No such option"),
    ]:
        done = mergekit_yaml(breadcrumbs, tmp_path / "out", *options)
        assert done.returncode == 2
        assert why in " ".join(done.stderr.split())
        assert not (tmp_path / "out").exists()


def test_shards_are_counted_in_bytes(breadcrumbs: Path, tmp_path: Path) -> None:
    assert mergekit_yaml(breadcrumbs, tmp_path / "out", "--out-shard-size", "20K").returncode == 0
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert mergekit_yaml(breadcrumbs, tmp_path / "one", "--out-shard-size", "0").returncode == 0
    assert [p.name for p in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]


def test_every_option_of_mergekit_yaml_is_known() -> None:
    names = """allow-crimes unsafe-truncate-embeddings trust-remote-code transformers-cache lora-merge-cache lora-merge-dtype
    random-seed quiet cuda device low-cpu-memory lazy-unpickle read-to-gpu multi-gpu num-threads gpu-rich async-write
    write-threads out-shard-size copy-tokenizer clone-tensors write-model-card safe-serialization no-copy-tokenizer
    no-write-model-card no-safe-serialization no-cuda no-quiet"""
    shown = mergekit_yaml("--help").stdout
    for name in names.split():
        assert f"--{name}" in shown


def test_truncated_embeddings_are_a_line_of_the_recipe(breadcrumbs: Path, tmp_path: Path) -> None:
    assert mergekit_yaml(breadcrumbs, tmp_path / "out", "--unsafe-truncate-embeddings").returncode == 0
    assert "vocab: crop" in json.loads((tmp_path / "out/stockpot.json").read_text())["recipe"]["text"]


def test_compat_reads_files_of_several_recipes(family: Path, recipe: Callable[[str], Path], tmp_path: Path) -> None:
    several = recipe(
        f"name: first\nmerge_method: nearswap\nbase_model: {family}/base\nmodels: [{family}/a]\nparameters: {{t: 0.01}}\n"
        f"---\nmerge_method: karcher\nmodels: [first, {family}/b]\nparameters: {{weight: 3, max_iter: 20000}}\n"
    )
    assert cli("merge", several, tmp_path / "out", "--compat", "mergekit", "--quiet").returncode == 0
    text = json.loads((tmp_path / "out/stockpot.json").read_text())["recipe"]["text"]
    assert text.count("compat: mergekit") == 2
    in_braces = recipe(f'{{"merge_method": "linear", "models": ["{family}/a", "{family}/b"]}}\n')
    assert cli("plan", in_braces, "--compat", "mergekit").returncode == 0
    wrong = cli("plan", in_braces, "--compat", "peft")
    assert wrong.returncode == 2
    assert "expected mergekit" in wrong.stderr


def test_compat_passes_over_unknown_parameters_but_not_misspelt_ones(
    family: Path, recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    head = f"merge_method: dare_ties\nbase_model: {family}/base\nmodels:\n  - model: {family}/a\n"
    odd = recipe(head + "parameters: {int_space: 4, weight: 0.5}\n")
    done = cli("plan", odd, "--compat", "mergekit")
    assert done.returncode == 0
    assert "int_space has no effect" in done.stderr + done.stdout
    assert cli("plan", odd).returncode == 2
    misspelt = cli("plan", recipe(head + "parameters: {desnity: 0.5}\n"), "--compat", "mergekit")
    assert misspelt.returncode == 2
    assert "did you mean 'density'" in misspelt.stderr
    line = cli("plan", recipe(head + "parameters: {wieght: 0.5}\n"), "--compat", "mergekit").stderr
    assert ":5:" in line  # lines are those of the file


def test_a_base_alone_is_copied(family: Path, recipe: Callable[[str], Path], tmp_path: Path) -> None:
    alone = recipe(f"merge_method: ties\nbase_model: {family}/base\nmodels:\n  - model: {family}/base\n")
    assert "at least 1 model besides the base" in cli("plan", alone).stderr
    assert cli("merge", alone, tmp_path / "out", "--compat", "mergekit").returncode == 0
    ours, theirs = load(tmp_path / "out"), load(family / "base")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
