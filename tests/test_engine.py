"""The engine on disk: the same bytes for any threads and budget, after any kill, with an honest record."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from safetensors import safe_open

import stockpot
from stockpot import Options
from stockpot.api.merging import merge_planned
from stockpot.errors import ArgumentError, CheckpointError, OutputError, VerificationError
from stockpot.methods import Cost, Mask, PerModel, Rank, Real, Scope, Space, Total, dare_ties, method, ties
from stockpot.methods.arrays import magnitude
from stockpot.methods.declaration import _REGISTRY

from helpers import SHAPES, cli, load, perturbed, write_model

METHODS: dict[str, str] = {
    "linear": "merge_method: linear\n{models}",
    "slerp": "merge_method: slerp\nbase_model: {root}/base\nmodels: [{root}/a]\nparameters: {{t: [0, 0.5, 1]}}\n",
    "task_arithmetic": "merge_method: task_arithmetic\nbase_model: {root}/base\n{models}parameters: {{lambda: 0.7}}\n",
    "ties": "merge_method: ties\nbase_model: {root}/base\n{models}parameters: {{density: 0.4}}\n",
    "ties rescale": "merge_method: ties\nbase_model: {root}/base\n{models}parameters: {{density: 0.4, rescale: true}}\n",
    "ties paper": "merge_method: ties\nbase_model: {root}/base\n{models}parameters: {{density: 0.4, dialect: paper}}\n",
    "dare_linear": "merge_method: dare_linear\nbase_model: {root}/base\n{models}parameters: {{density: 0.3}}\n",
    "dare_ties mergekit": "merge_method: dare_ties\nbase_model: {root}/base\n{models}"
    "parameters: {{density: 0.4, dialect: mergekit, normalize: true}}\n",
    "passthrough": "merge_method: passthrough\nslices:\n"
    "  - sources: [{{model: {root}/a, layer_range: [0, 3]}}]\n  - sources: [{{model: {root}/b, layer_range: [1, 4]}}]\n",
}


def text_of(method: str, root: Path) -> str:
    models = "models:\n" + "".join(
        f"  - {{model: {root}/{name}, parameters: {{weight: {weight}}}}}\n"
        for name, weight in zip("abc", ("0.5", "0.3", "0.2"))
    )
    return METHODS[method].format(root=root, models=models)


def weights_of(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(path.glob("*.safetensors*"))}


@pytest.fixture(scope="module")
def wide_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with a tensor of several blocks, one with rows longer than a piece, and many tiny ones."""
    root = tmp_path_factory.mktemp("wide")
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (5000, 500),
        "model.layers.0.a.weight": (3, 700_000),
        "model.layers.1.a.weight": (3, 700_000),
        "model.layers.2.a.weight": (3, 700_000),
        "model.layers.3.a.weight": (3, 700_000),
        "model.norm.weight": (500,),
        "flat.weight": (1_300_000,),
    } | {f"model.layers.{i}.tiny.{j}.weight": (7, 5) for i in range(4) for j in range(25)}
    generator = torch.Generator().manual_seed(0)
    base = {n: (torch.randn(s, generator=generator) * 0.02).bfloat16() for n, s in shapes.items()}
    base["steps"] = torch.tensor(3)
    write_model(root / "base", base)
    for seed, name in enumerate("abc", 1):
        model = perturbed({n: t for n, t in base.items() if t.is_floating_point()}, seed) | {"steps": torch.tensor(3)}
        write_model(root / name, model, shards=3)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_bytes_do_not_depend_on_threads_or_budget(wide_family: Path, tmp_path: Path, method: str) -> None:
    text = text_of(method, wide_family)
    reference = None
    for i, options in enumerate(
        [
            Options(threads=1),
            Options(threads=3),
            Options(threads=2, max_memory="120MiB"),
            Options(threads=1, device="torch"),
        ]
    ):
        stockpot.merge(text, tmp_path / f"out{i}", options)
        got = weights_of(tmp_path / f"out{i}")
        reference = reference or got
        assert got == reference, options
    stockpot.verify(tmp_path / "out0")


def test_a_cutoff_over_many_tensors(tmp_path: Path) -> None:
    """So many tensors that each has but a small share of the sample."""
    shapes = {f"model.layers.{i}.w.weight": (300, 300) for i in range(120)}
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    states = {"base": base, "a": perturbed(base, 1, 0.1), "b": perturbed(base, 2, 0.1), "c": perturbed(base, 3, 0.1)}
    for name, state in states.items():
        write_model(tmp_path / name, state)
    stockpot.merge(text_of("ties paper", tmp_path), tmp_path / "out")
    experts = [states[n] for n in "abc"]
    memory = ties(experts, base=base, weight=[0.5, 0.3, 0.2], density=0.4, dialect="paper")
    for name, value in load(tmp_path / "out").items():
        assert torch.equal(value, memory[name])


def test_disk_and_memory_give_the_same_bits(wide_family: Path, tmp_path: Path) -> None:
    states = {name: load(wide_family / name) for name in ("base", "a", "b", "c")}
    experts = [states[n] for n in "abc"]
    for merge, name in ((ties, "ties paper"), (dare_ties, "dare_ties mergekit")):
        out = tmp_path / name
        stockpot.merge(text_of(name, wide_family), out)
        keywords = {"dialect": "paper"} if merge is ties else {"dialect": "mergekit", "normalize": True}
        memory = merge(experts, base=states["base"], weight=[0.5, 0.3, 0.2], density=0.4, **keywords)
        for tensor, value in load(out).items():
            assert torch.equal(value, memory[tensor]), tensor


def test_seed_changes_masks_and_is_recorded(family: Path, tmp_path: Path) -> None:
    text = text_of("dare_linear", family)
    for seed in (0, 1):
        result = stockpot.merge(text, tmp_path / str(seed), Options(seed=seed))
        assert result.lineage["seed"] == seed
    assert weights_of(tmp_path / "0") != weights_of(tmp_path / "1")


# killed and resumed

KILLED = """
import sys, stockpot
from stockpot.engine import journal
journal._INTERVAL = 0.02
stockpot.merge(sys.argv[1], sys.argv[2], stockpot.Options(threads=2))
"""


def test_kill_and_resume_at_twenty_moments(wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path]) -> None:
    path = recipe(text_of("ties rescale", wide_family))
    stockpot.merge(path, tmp_path / "reference")
    reference = weights_of(tmp_path / "reference")
    command = [sys.executable, "-c", KILLED, str(path)]
    rng = random.Random(0)
    span, killed, resumed = 1.0, 0, 0
    for attempt in range(100):
        out = tmp_path / f"out{attempt}"
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not Path(f"{out}.partial").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, span))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
        else:
            span *= 0.8  # was done before
        if not out.exists():
            result = stockpot.merge(path, out)
            resumed += result.lineage["bytes_resumed"] > 0
        assert weights_of(out) == reference
        assert not Path(f"{out}.partial").exists()
        if killed == 20:
            break
    assert killed == 20
    assert resumed >= 3
    lineage = json.loads((tmp_path / "reference" / "stockpot.json").read_text())
    again = json.loads((out / "stockpot.json").read_text())
    assert again["output"] == lineage["output"]
    assert again["inputs"] == lineage["inputs"]


def interrupted(path: Path, out: Path, sent: int) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "stockpot", "merge", path, out],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not Path(f"{out}.partial", "stockpot.journal").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_cleanly(wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path], sent: int) -> None:
    if signal.getsignal(sent) is signal.SIG_IGN:
        pytest.skip("ignored here, as under nohup, and then by a merge too")
    path = recipe(text_of("ties paper", wide_family))
    done = interrupted(path, tmp_path / "out", sent)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert cli("merge", path, tmp_path / "out").returncode == 0
    assert cli("verify", tmp_path / "out").returncode == 0


def partial_of(wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path]) -> tuple[Path, Path, dict[str, bytes]]:
    """A merge stopped halfway: (recipe, OUT, the bytes that it should end with)."""
    path = recipe(text_of("linear", wide_family))
    stockpot.merge(path, tmp_path / "reference")
    planned = stockpot.plan(path, Options(threads=1))
    from stockpot.engine import devices, loop, run

    class Stop(Exception):
        pass

    seen = 0
    original = loop.Loop._do

    def failing(self: Any, *args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 6:
            raise Stop
        original(self, *args)

    loop.Loop._do = failing  # type: ignore[method-assign]
    try:
        with pytest.raises(Stop):
            run.run_plan(planned, str(tmp_path / "out"), devices.NumpyDevice())
    finally:
        loop.Loop._do = original  # type: ignore[method-assign]
    return path, tmp_path / "out", weights_of(tmp_path / "reference")


def test_resume_takes_over_what_is_done(wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path]) -> None:
    path, out, reference = partial_of(wide_family, tmp_path, recipe)
    result = stockpot.merge(path, out, Options(threads=3, max_memory="100MiB"))
    assert 0 < result.lineage["bytes_resumed"] < result.bytes_written + result.lineage["bytes_resumed"]
    assert weights_of(out) == reference
    stockpot.verify(out)


def test_no_resume_starts_over(wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path]) -> None:
    path, out, reference = partial_of(wide_family, tmp_path, recipe)
    assert stockpot.merge(path, out, resume=False).lineage["bytes_resumed"] == 0
    assert weights_of(out) == reference


def test_journal_cut_short_or_scribbled_on(wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path]) -> None:
    path, out, reference = partial_of(wide_family, tmp_path, recipe)
    journal = Path(f"{out}.partial", "stockpot.journal")
    good = journal.read_bytes()
    for i, bad in enumerate([good[:-7], good[:40], good + b"nonsense\n", good.replace(b"[", b"{", 2)]):
        journal.write_bytes(bad)
        target = tmp_path / f"copy{i}"
        import shutil

        shutil.copytree(f"{out}.partial", f"{target}.partial")
        stockpot.merge(path, target)
        assert weights_of(target) == reference


def test_damaged_partial_data_is_done_again(wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path]) -> None:
    """A journal vouches for bytes that a crash took away: they are checked and made again."""
    path, out, reference = partial_of(wide_family, tmp_path, recipe)
    shard = Path(f"{out}.partial", "model.safetensors")
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 50 :: 4096] = b"\xff" * len(raw[len(raw) // 50 :: 4096])
    shard.write_bytes(raw)
    stockpot.merge(path, out)
    assert weights_of(out) == reference


def test_another_recipe_or_seed_does_not_resume(
    wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path]
) -> None:
    _, out, _ = partial_of(wide_family, tmp_path, recipe)
    other = text_of("linear", wide_family).replace("0.5", "0.7")
    stockpot.merge(other, out)
    stockpot.merge(other, tmp_path / "fresh")
    assert weights_of(out) == weights_of(tmp_path / "fresh")


def test_two_merges_into_one_place(wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path]) -> None:
    import fcntl

    path = recipe(text_of("linear", wide_family))
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with open(partial / "stockpot.journal", "wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another merge"):
            stockpot.merge(path, tmp_path / "out")


# what is written


def test_shards_index_and_mode(family: Path, tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        result = stockpot.merge(text_of("linear", family), tmp_path / "out", Options(shard_size="100kB"))
    finally:
        os.umask(old)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load(out).values())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as f:
            assert tuple(f.get_slice(name).get_shape()) == SHAPES[name]
        assert (out / file).stat().st_mode & 0o777 == 0o644
    assert [f["name"] for f in result.lineage["output"]["files"]] == files


def test_side_files_come_from_the_base(family: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("base", "a"):
        shutil.copytree(family / name, tmp_path / name)
        for file in (
            "tokenizer.json tokenizer_config.json special_tokens_map.json merges.txt vocab.json tokenizer.model "
            "chat_template.jinja generation_config.json preprocessor_config.json LICENSE"
        ).split():
            (tmp_path / name / file).write_text(f"{file} of {name}")
        for junk in ("optimizer.pt", "trainer_state.json", "training_args.bin", "pytorch_model.bin"):
            (tmp_path / name / junk).write_text("x")
    text = f"merge_method: linear\nvocab: by_position\nmodels: [{tmp_path}/a, {tmp_path}/base]\n"
    stockpot.merge(text + f"base_model: {tmp_path}/base\n", tmp_path / "out")
    stockpot.merge(text, tmp_path / "first")
    stockpot.merge(text + f"tokenizer_source: {tmp_path}/base\n", tmp_path / "asked")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "chat_template.jinja of base"
    assert (tmp_path / "first/merges.txt").read_text() == "merges.txt of a"
    assert (tmp_path / "asked/tokenizer.model").read_text() == "tokenizer.model of base"
    present = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "vocab.json", "generation_config.json", "preprocessor_config.json", "LICENSE"} <= present
    assert not {"optimizer.pt", "trainer_state.json", "training_args.bin", "pytorch_model.bin"} & present
    card = (tmp_path / "out/README.md").read_text()
    assert "- merge" in card
    assert "merge_method: linear" in card


def test_lineage(family: Path, tmp_path: Path, recipe: Callable[[str], Path]) -> None:
    path = recipe(text_of("ties", family))
    result = stockpot.merge(path, tmp_path / "out")
    lineage = json.loads((tmp_path / "out/stockpot.json").read_text())
    assert lineage["recipe"]["text"] == path.read_text()
    assert lineage["groups"][0]["parameters"]["weight"] == [0.5, 0.3, 0.2]
    assert set(lineage["output"]["tensors"]) == set(SHAPES)
    size = (family / "a/model.safetensors").stat().st_size
    assert [f["bytes"] for i in lineage["inputs"] for f in i["files"]] == [size] * 4
    digests = [f["digest"] for i in lineage["inputs"] for f in i["files"]]
    assert len(set(digests)) == 4
    assert lineage["packages"]["stockpot"] == stockpot.__version__
    # inputs are read once for each pass and never again for their digests
    data = sum(t.numel() * 2 for t in load(family / "a").values())
    assert 4 * data <= result.bytes_read <= 8.2 * data
    assert result.bytes_written == data


def test_input_digest_is_content(family: Path, tmp_path: Path) -> None:
    """The same content in other shards, by another method and budget, has the same tensor digests."""
    from stockpot.engine.digests import file_digest
    from stockpot.engine.verify import checkpoint_digests

    stockpot.merge(text_of("slerp", family), tmp_path / "out", Options(max_memory="80MiB", threads=1))
    lineage = json.loads((tmp_path / "out/stockpot.json").read_text())
    checkpoint = stockpot.open_checkpoint(family / "a")
    digests = checkpoint_digests(checkpoint, 2)
    expected = file_digest(checkpoint.files[0].raw, (digests[n] for n in checkpoint.files[0].entries))
    assert lineage["inputs"][1]["files"][0]["digest"] == expected


def test_verify_finds_every_kind_of_damage(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stockpot.merge(text_of("linear", family), out, Options(shard_size="100kB"))
    stockpot.verify(out)
    shard = next(out.glob("model-00002*"))
    good = shard.read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    for bad in (bytes(flipped), good[:-1], good + b"x"):
        shard.write_bytes(bad)
        with pytest.raises(VerificationError):
            stockpot.verify(out)
    shard.unlink()
    with pytest.raises(VerificationError):
        stockpot.verify(out)
    shard.write_bytes(good)
    stockpot.verify(out)
    (out / "stockpot.json").write_text("[]")
    with pytest.raises(VerificationError):
        stockpot.verify(out)
    (out / "stockpot.json").unlink()
    with pytest.raises(VerificationError, match="nothing to verify"):
        stockpot.verify(out)


def test_out_is_never_half_there(family: Path, tmp_path: Path) -> None:
    text = text_of("linear", family)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("keep me")
    with pytest.raises(OutputError, match="not empty"):
        stockpot.merge(text, tmp_path / "full")
    assert (tmp_path / "full/x").read_text() == "keep me"
    with pytest.raises(OutputError, match=r"no output of stockpot .*it holds 'x'.*removes nothing else"):
        stockpot.merge(text, tmp_path / "full", overwrite=True)
    (tmp_path / "full").rename(tmp_path / "elsewhere")  # as it says
    stockpot.merge(text, tmp_path / "full", overwrite=True)
    stockpot.merge(text, tmp_path / "full", overwrite=True)
    assert not list(tmp_path.glob("full.*"))
    assert (tmp_path / "elsewhere/x").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    stockpot.merge(text, tmp_path / "empty")
    stockpot.merge(text, tmp_path / "deep/er")
    with pytest.raises(OutputError, match="input"):
        stockpot.merge(text, family / "a", overwrite=True)
    with pytest.raises(OutputError, match="input"):
        stockpot.merge(text, family, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        stockpot.merge(text, tmp_path / "file")
    assert (family / "a/model.safetensors").exists()


def test_nothing_beside_out_is_touched(family: Path, tmp_path: Path) -> None:
    """Neither a directory that happens to be called OUT.partial, nor one called OUT.replaced, nor an input of such a name."""
    import shutil

    text = text_of("linear", family)
    for name in ("out.partial", "out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="something else"):
        stockpot.merge(text, tmp_path / "out", overwrite=True)
    shutil.rmtree(tmp_path / "out.partial")
    stockpot.merge(text, tmp_path / "out")
    assert (tmp_path / "out.replaced/notes.txt").read_text() == "mine"
    shutil.copytree(family / "a", tmp_path / "x.partial")
    with pytest.raises(OutputError, match="input"):
        stockpot.merge(f"merge_method: linear\nmodels: [{tmp_path}/x.partial, {family}/b]\n", tmp_path / "x")
    assert (tmp_path / "x.partial/model.safetensors").exists()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="symbolic link"):
        stockpot.merge(text, tmp_path / "link")


def test_out_that_appears_during_the_merge(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(partial: str) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("x")

    planned = stockpot.plan(text_of("ties paper", family))
    with pytest.raises(OutputError, match="not empty"):
        merge_planned(planned, out, Options(), release=appear)
    assert (out / "precious").exists()


def test_damaged_header_of_a_partial_shard(wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path]) -> None:
    path, out, reference = partial_of(wide_family, tmp_path, recipe)
    with open(f"{out}.partial/model.safetensors", "r+b") as f:
        f.write(bytes(100))
    Path(f"{out}.partial", "junk.txt").write_text("not ours")
    stockpot.merge(path, out)
    assert weights_of(out) == reference
    assert not (out / "junk.txt").exists()


@pytest.mark.parametrize(
    "line", ['[999,0,1,"",["",""]]', '[0,0,0,"",[]]', '["a",0,1,"",[]]', '[0,0,99,"00",[]]', "{}", "[" * 9999]
)
def test_journal_lines_that_make_no_sense(
    wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path], line: str
) -> None:
    path, out, reference = partial_of(wide_family, tmp_path, recipe)
    with open(f"{out}.partial/stockpot.journal", "a") as f:
        f.write(line + "\n")
    stockpot.merge(path, out)
    assert weights_of(out) == reference
    stockpot.verify(out)


def test_side_files_are_verified_too(family: Path, tmp_path: Path) -> None:
    stockpot.merge(text_of("linear", family), tmp_path / "out")
    config = tmp_path / "out/config.json"
    config.write_text(config.read_text().replace("64", "65"))
    with pytest.raises(VerificationError, match=r"config\.json"):
        stockpot.verify(tmp_path / "out")


@pytest.mark.parametrize("modules", ['[{"path": "."}]', '[{"path": "../base"}]', '[{"path": 5}]', "{}"])
def test_modules_that_point_elsewhere(family: Path, tmp_path: Path, modules: str) -> None:
    import shutil

    shutil.copytree(family / "a", tmp_path / "a")
    (tmp_path / "a/modules.json").write_text(modules)
    text = f"merge_method: linear\nmodels: [{tmp_path}/a, {family}/b]\n"
    if ".." in modules:
        with pytest.raises(CheckpointError, match="lies outside of the directory"):
            stockpot.merge(text, tmp_path / "out")
        return
    stockpot.merge(text, tmp_path / "out")
    stockpot.verify(tmp_path / "out")


def test_integers_are_kept_with_a_warning(wide_family: Path, tmp_path: Path) -> None:
    a = load(wide_family / "a")
    write_model(tmp_path / "odd", a | {"steps": torch.tensor(99)})
    result = stockpot.merge(f"merge_method: linear\nmodels: [{wide_family}/a, {tmp_path}/odd]\n", tmp_path / "out")
    assert load(tmp_path / "out")["steps"] == 3
    assert "steps" in result.warnings[0]


def test_memory_budget_is_checked_and_kept(wide_family: Path, tmp_path: Path, recipe: Callable[[str], Path]) -> None:
    text = text_of("ties", wide_family)
    with pytest.raises(ArgumentError, match="allow at least"):
        stockpot.plan(text, Options(max_memory="10MB"))
    for limit in ("100MiB", "200MiB"):
        assert stockpot.plan(text, Options(max_memory=limit, threads=2)).budget.peak <= stockpot.specs.parse_size(limit)
    path = recipe(text)
    script = (
        "import resource, sys, numpy, blake3, stockpot, stockpot.api.merging, stockpot.engine.run, stockpot.lineage\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "stockpot.merge(sys.argv[1], sys.argv[2], stockpot.Options(max_memory='100MiB', threads=2))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 100


@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_inputs_are_read_once_where_there_is_room(method: str, tmp_path: Path) -> None:
    """What a statistic has read is kept for the merge, as far as the budget allows; the bytes are the same."""
    torch.manual_seed(0)
    names = ["base", "a", "b"]
    start = torch.randn(1700, 1024)
    for name in names:
        w = (start + 0.1 * torch.randn(start.shape)).to(torch.bfloat16)
        write_model(tmp_path / name, {"w": w, "v": w[:300].clone()})
    size = 2 * 2000 * 1024
    models = names[:2] if method == "slerp" else names[1:]
    recipe: dict[str, object] = {"merge_method": method, "base_model": str(tmp_path / "base")}
    recipe["models"] = [{"model": str(tmp_path / m)} for m in models]
    recipe["parameters"] = {"t": 0.3} if method == "slerp" else {"density": 0.4}
    inputs = {"slerp": 2, "ties": 3}[method]
    planned = stockpot.plan(recipe, Options(threads=2))
    least = planned.budget.peak - planned.budget.hold
    read, outs = {}, set()
    for extra in (2**27, 4 * 2**20 * inputs // 2 + 1, 0):
        result = stockpot.merge(recipe, tmp_path / f"{extra}", Options(threads=2, max_memory=least + extra))
        read[extra] = result.bytes_read - inputs * size
        outs.add((tmp_path / f"{extra}" / "model.safetensors").read_bytes())
    assert len(outs) == 1
    sample = 0 if method == "slerp" else 2 * 2**17 * 2 * inputs  # a cutoff looks at a few elements first
    everything, some, nothing = read.values()
    assert 0 <= everything <= sample
    assert everything < some < nothing
    assert nothing >= 2 * 1700 * 1024 * inputs


def test_all_threads_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    from collections import Counter

    from stockpot.engine.bundles import Bundles

    torch.manual_seed(0)
    for name in "ab":
        write_model(tmp_path / name, {f"layers.{i}.w": torch.randn(1024, 1024) for i in range(12)})
    worked: Counter[str] = Counter()
    real = Bundles.merge

    def counted(self: Bundles, rows: Any, *args: Any) -> Any:
        worked[threading.current_thread().name] += len(rows)
        return real(self, rows, *args)

    monkeypatch.setattr(Bundles, "merge", counted)
    recipe = {"merge_method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}
    stockpot.merge(recipe, tmp_path / "out", Options(threads=3))
    assert len(worked) == 3
    assert min(worked.values()) >= sum(worked.values()) // 10


def test_the_sample_for_a_cutoff_over_the_whole_model_is_of_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stockpot.engine import loop
    from stockpot.engine.gathering import Gathering

    sizes = []
    real = Gathering.suggest

    def noted(self: Gathering, deltas: Any) -> None:
        sizes.append(deltas.shape[1])
        real(self, deltas)

    monkeypatch.setattr(Gathering, "suggest", noted)
    monkeypatch.setattr(loop, "_JOB_SAMPLES", 2**14)
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        write_model(tmp_path / name, {f"layers.{i}.w": torch.randn(256, 300).to(torch.bfloat16) for i in range(100)})
    recipe = {
        "merge_method": "ties", "base_model": str(tmp_path / "base"),
        "models": [str(tmp_path / "a"), str(tmp_path / "b")], "parameters": {"density": 0.3, "dialect": "paper"},
    }  # fmt: skip
    stockpot.merge(recipe, tmp_path / "out")
    assert 0 < max(sizes) <= 3 * 2**14


# methods that users declare themselves


def test_families_that_need_rows_or_whole_tensors(family32: Path, tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    @method(scope=Scope.ROW, space=Space.DELTA, stats=(Rank("density", over="row"),))
    def row_trim(delta: Any, *, cutoff: Any, density: Annotated[PerModel, Real(0, 1)] = 0.5) -> Any:
        """Keep the largest half of each row."""
        return (delta * (magnitude(delta) >= cutoff)).sum(0)

    @method(scope=Scope.TENSOR, space=Space.WEIGHT, cost=Cost(lambda m, shape, size: 0))
    def whole(models: Any) -> Any:
        """See whole matrices."""
        shapes.append(models.shape[1:])
        return models.mean(0)

    @method(
        space=Space.DELTA,
        stats=(Total("energy", of=lambda delta, **_: delta * delta, over="model"),),
        draws=(Mask("density"),),
    )
    def scaled_by_energy(delta: Any, *, energy: Any, mask: Any, density: Annotated[PerModel, Real(0, 1)] = 0.5) -> Any:
        """A total over the model and a mask."""
        return (delta * mask).sum(0) * float(energy[0] > 0)

    try:
        root = family32
        models = f"base_model: {root}/base\nmodels: [{root}/a, {root}/b]\n"
        stockpot.merge("merge_method: row_trim\n" + models, tmp_path / "row")
        states = {n: load(root / n) for n in ("base", "a", "b")}
        merged = load(tmp_path / "row")
        for name, base in states["base"].items():
            rows = 0
            for expert in "ab":
                d = (states[expert][name] - base).double().reshape(base.shape[0] if base.dim() > 1 else 1, -1)
                k = d.shape[1] // 2
                cut = d.abs().sort(dim=1, descending=True).values[:, k - 1 : k]
                rows = rows + d * (d.abs().float() >= cut.float())
            torch.testing.assert_close(
                merged[name].double(), base.double() + rows.reshape(base.shape), rtol=0, atol=1e-7
            )
        stockpot.merge("merge_method: whole\n" + models, tmp_path / "whole")
        assert sorted(set(shapes)) == sorted(set(SHAPES.values()))
        stockpot.merge("merge_method: scaled_by_energy\n" + models, tmp_path / "energy")
    finally:
        for name in ("row_trim", "whole", "scaled_by_energy"):
            _REGISTRY.pop(name, None)


def test_torch_device_without_a_gpu(family: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="CUDA"):
        stockpot.merge(text_of("linear", family), tmp_path / "out", Options(device="cuda:99"))
    with pytest.raises(ArgumentError, match="expected auto, cpu"):
        stockpot.merge(text_of("linear", family), tmp_path / "out", Options(device="gpu"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
