"""The command line as a user meets it: output, exit codes, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import stockpot

from helpers import CONFIG, SHAPES, cli, load, write_model


@pytest.fixture
def linear(family: Path, recipe: Callable[[str], Path]) -> Path:
    return recipe(f"merge_method: linear\nmodels: [{family}/a, {family}/b]\n")


def test_merge_plan_verify_inspect(family: Path, linear: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = cli("plan", linear)
    assert planned.returncode == 0
    assert "linear" in planned.stdout
    assert not out.exists()
    merged = cli("merge", linear, out)
    assert (merged.returncode, merged.stderr) == (0, "")
    assert f"{len(SHAPES)} tensors" in merged.stdout
    assert cli("verify", out).returncode == 0
    shown = cli("inspect", out)
    assert "layers: model.layers x 4" in shown.stdout
    assert "model.layers.3.mlp.down_proj.weight" in shown.stdout
    again = cli("merge", linear, out)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    assert cli("merge", linear, out, "--overwrite", "--quiet").stdout == ""


def test_json(family: Path, linear: Path, tmp_path: Path) -> None:
    plan = json.loads(cli("plan", linear, "--json").stdout)
    assert plan["output"]["tensors"] == len(SHAPES)
    assert plan["groups"][0]["parameters"] == {"weight": [1.0, 1.0], "normalize": True}
    assert plan["memory"]["peak"] <= plan["memory"]["limit"]
    merged = json.loads(cli("merge", linear, tmp_path / "out", "--json").stdout)
    assert merged["seed"] == 0
    assert merged["bytes_written"] == plan["write_bytes"] - len(
        Path(family / "a/model.safetensors").read_bytes()
    ) + sum(t.nbytes for t in load(family / "a").values())
    assert json.loads(cli("verify", tmp_path / "out", "--json").stdout)["verified"] is True
    inspected = json.loads(cli("inspect", family / "a", "--json").stdout)
    assert inspected["parameters"] == sum(t.numel() for t in load(family / "a").values())
    assert inspected["layers"] == {"model.layers": 4}
    names = [m["name"] for m in json.loads(cli("methods", "--json").stdout)]
    assert {"linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "passthrough"} <= set(names)
    ties = json.loads(cli("methods", "ties", "--json").stdout)
    assert ties["dialects"] == ["mergekit", "paper", "peft"]


def test_inspect_shows_ties(family: Path, tmp_path: Path) -> None:
    a = load(family / "a")
    write_model(
        tmp_path / "m",
        a | {"lm_head.weight": a["model.embed_tokens.weight"].clone()},
        CONFIG | {"tie_word_embeddings": True},
    )
    assert "tied: lm_head.weight = model.embed_tokens.weight" in cli("inspect", tmp_path / "m").stdout


def test_version_help_and_methods() -> None:
    assert cli("--version").stdout.strip() == f"stockpot {stockpot.__version__}"
    for command in ("merge", "plan", "inspect", "verify", "methods"):
        assert command in cli("--help").stdout
        assert "Usage" in cli(command, "--help").stdout
    assert "elect a sign" in cli("methods").stdout
    assert "arXiv:2306.01708" in cli("methods", "ties").stdout
    assert "reads its inputs 2 times" in cli("methods", "slerp").stdout


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["spherical"], {"karcher", "model_stock", "multislerp", "nuslerp", "slerp", "warp"}),
        (["Spherical", "needs", "a", "base"], {"model_stock", "warp"}),
        (["two", "models"], {"arcee_fusion", "model_stock", "nuslerp", "slerp", "wise_ft"}),
        (["random"], {"dare_linear", "dare_ties", "della", "della_linear"}),
        (["dare"], {"dare_linear", "dare_ties"}),
        (["2406.16768"], {"warp"}),
        (["experimental"], {"warp"}),
        (["LoRA", "factors"], {"evo_asymmetric", "product", "product_svd"}),
        (["companion"], {"fisher", "ota"}),
        (["keeps autograd"], {"linear", "passthrough", "task_arithmetic", "wise_ft"}),
    ],
)
def test_methods_are_found_by_what_is_said_of_them(words: list[str], names: set[str]) -> None:
    found = json.loads(cli("methods", *words, "--json").stdout)
    assert {m["name"] for m in found} == names
    assert all(m["name"] in cli("methods", *words).stdout for m in found)


def test_what_is_said_of_no_method_names_what_is_said() -> None:
    done = cli("methods", "quantum")
    assert done.returncode == 2
    assert "unknown merge method 'quantum'; nor is it said of any: " in done.stderr
    assert "spherical" in done.stderr


CODES: dict[str, tuple[list[str], int, str]] = {
    "no such recipe": (["merge", "{tmp}/recipe.yaml", "{tmp}/out"], 2, "did you mean 'recipe.yml'"),
    "recipe is a directory": (["merge", "{tmp}", "{tmp}/out"], 2, "can't be read"),
    "no such option": (["merge", "{recipe}", "{tmp}/out", "--thread", "2"], 2, "--thread"),
    "threads 0": (["merge", "{recipe}", "{tmp}/out", "--threads", "0"], 2, "at least 1"),
    "memory that is no size": (["plan", "{recipe}", "--max-memory", "lots"], 2, "expected a size"),
    "memory too small": (["merge", "{recipe}", "{tmp}/out", "--max-memory", "1MB"], 2, "allow at least"),
    "shard size zero": (["merge", "{recipe}", "{tmp}/out", "--shard-size", "0"], 2, "positive"),
    "unknown device": (["merge", "{recipe}", "{tmp}/out", "--device", "tpu"], 2, "expected auto, cpu"),
    "cuda without one": (["merge", "{recipe}", "{tmp}/out", "--device", "cuda"], 2, "no CUDA device"),
    "unknown method": (["methods", "teis"], 2, "did you mean 'ties'"),
    "out is an input": (["merge", "{recipe}", "{family}/a", "--overwrite"], 2, "is or holds the input"),
    "out under a file": (["merge", "{recipe}", "{recipe}/out"], 2, "lies in one"),
    "huge number of threads": (["plan", "{tmp}/none.yml", "--threads", "300000000"], 2, "can't be read"),
    "memory of many digits": (["plan", "{recipe}", "--max-memory", "9" * 400, "--threads", "0"], 2, "at least 1"),
    "verify with no threads": (["verify", "{family}/a", "--threads", "0"], 2, "at least 1"),
    "inspect nothing": (["inspect", "{tmp}/nothing"], 3, "no such file"),
    "inspect a text file": (["inspect", "{recipe}"], 3, "only files of a known format"),
    "inspect an empty directory": (["inspect", "{tmp}/empty"], 3, "empty directory"),
    "verify without lineage": (["verify", "{family}/a"], 4, "nothing to verify"),
    "verify nothing": (["verify", "{tmp}/nothing"], 3, "no such directory"),
}


@pytest.mark.parametrize("case", CODES)
def test_exit_codes(family: Path, linear: Path, tmp_path: Path, case: str) -> None:
    args, code, message = CODES[case]
    (tmp_path / "empty").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    done = cli(*(a.format(tmp=tmp_path, recipe=linear, family=family) for a in args))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before


OPENING: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickles": (lambda d: (d / "pytorch_model.bin").write_bytes(b"x"), "torch older than 1.6"),
    "a run": (lambda d: (d / "checkpoint-10").mkdir(), "name one of its snapshots"),
    "no index": (lambda d: [(d / f"model-0000{i}-of-00002.safetensors").write_bytes(b"") for i in (1, 2)], "no index"),
    "index out of the directory": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "points outside",
    ),
    "missing shard": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}'),
        "shards are missing",
    ),
    "index of nothing": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    "index not json": (lambda d: (d / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    "adapter without weights": (lambda d: (d / "adapter_config.json").write_text("{}"), "adapter_model.safetensors"),
    "quantised": (
        lambda d: write_model(d, {}, {"quantization_config": {"quant_method": "gptq"}}),
        "quantised \\(gptq\\)",
    ),
    "config not json": (lambda d: (write_model(d, {}), (d / "config.json").write_text("]"))[0], "not valid JSON"),
}


@pytest.mark.parametrize("case", OPENING)
def test_directories_that_are_not_checkpoints(tmp_path: Path, case: str) -> None:
    make, message = OPENING[case]
    folder = tmp_path / "m"
    folder.mkdir()
    make(folder)
    with pytest.raises(stockpot.StockpotError, match=message) as caught:
        stockpot.open_checkpoint(folder)
    assert caught.value.exit_code == 3


def test_index_must_agree_with_its_shards(family: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "m", load(family / "a"), shards=3)
    index = tmp_path / "m/model.safetensors.index.json"
    good = json.loads(index.read_text())
    assert len(stockpot.open_checkpoint(tmp_path / "m")) == len(SHAPES)
    for change, message in (
        (lambda m: m.pop("lm_head.weight"), "not in the index"),
        (lambda m: m.update(ghost=next(iter(m.values()))), "does not hold it"),
    ):
        doc = json.loads(json.dumps(good))
        change(doc["weight_map"])
        index.write_text(json.dumps(doc))
        with pytest.raises(stockpot.StockpotError, match=message):
            stockpot.open_checkpoint(tmp_path / "m")


def test_a_file_cut_short_while_merging(family: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(family / "a", tmp_path / "a")
    planned = stockpot.plan(f"merge_method: linear\nmodels: [{tmp_path}/a, {family}/b]\n")
    path = tmp_path / "a/model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    from stockpot.api.merging import merge_planned

    with pytest.raises(stockpot.StockpotError, match="was changed after its header was read") as caught:
        merge_planned(planned, tmp_path / "out", stockpot.Options())
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "code",
    [
        "import stockpot; stockpot.__all__; stockpot.Options",
        "import stockpot, sys; stockpot.plan(sys.argv[1])",
        "import stockpot, sys; stockpot.merge(sys.argv[1], sys.argv[2])",
        "from typer.testing import CliRunner; from stockpot.cli.main import app; CliRunner().invoke(app, ['--help'])",
    ],
)
def test_nothing_heavy_is_imported(linear: Path, tmp_path: Path, code: str) -> None:
    """Neither torch nor transformers for anything on the CPU; not even numpy for help, planning and bad input."""
    heavy = "{'torch', 'transformers', 'safetensors'}" if "merge(" in code else "{'torch', 'transformers', 'numpy'}"
    code += f"; import sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(linear), str(tmp_path / "out")], check=True)


def test_doctor(tmp_path: Path) -> None:
    done = cli("doctor", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["threads"]["available"] >= 1
    assert facts["memory"]["total"] > facts["memory"]["available"] > 2**27
    assert facts["packages"]["numpy"]
    assert facts["disk"]["write_bytes_per_second"] > 10**6
    assert facts["disk"]["folder"] == str(tmp_path)
    assert not list(tmp_path.iterdir())
    assert any("no GPU" in line for line in facts["missing"])


def test_doctor_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKPOT_NATIVE", "0")
    done = cli("doctor", tmp_path / "nowhere", "--no-disk")
    assert done.returncode == 0, done.stderr
    assert "missing: compiled kernels are switched off by STOCKPOT_NATIVE=0" in done.stdout
    assert "nowhere: No such file or directory" in done.stdout


def test_a_plan_is_the_same_whatever_order_sets_have(family: Path, recipe: Callable[[str], Path]) -> None:
    path = recipe(
        f"merge_method: ties\nbase_model: {family}/base\nmodels: [{family}/a, {family}/b]\nparameters: {{density: 0.4}}\n"
        "rules: [{match: '*mlp*', merge_method: dare_ties, parameters: {density: 0.5}}]\n"
    )
    told = set()
    for seed in ("1", "2", "3"):
        command = [sys.executable, "-m", "stockpot.cli.main", "plan", str(path), "--json"]
        done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told.add(done.stdout)
    assert len(told) == 1
