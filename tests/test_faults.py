"""What may go wrong outside: numbers that are none, files that change, disks that fail. Nothing is half-written, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

import stockpot
from stockpot.api.merging import Options, merge_planned
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.engine import loop, measures, run
from stockpot.engine.native import Kernels, load_kernels
from stockpot.engine.sink import ShardSink
from stockpot.errors import NonfiniteError, OutputError, ReadError
from stockpot.specs import DType

from helpers import load, write_model


def linear(*models: Path) -> dict[str, object]:
    return {"merge_method": "linear", "models": list(models)}


@pytest.fixture
def copies(family, tmp_path):
    """Two models that a test may spoil."""
    for name in "ab":
        shutil.copytree(family / name, tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def spoil(path: Path, name: str, values: list[float]) -> None:
    tensors = load(path)
    tensors[name].view(-1)[: len(values)] = torch.tensor(values, dtype=tensors[name].dtype)
    write_model(path, tensors)


# numbers


def test_nan_and_infinity_are_named_and_nothing_is_published(copies, tmp_path):
    a, b = copies
    nan, inf = float("nan"), float("inf")
    spoil(b, "model.norm.weight", [nan, inf, -inf, nan, nan])
    out = tmp_path / "out"
    with pytest.raises(NonfiniteError) as caught:
        stockpot.merge(linear(a, b), out)
    message = str(caught.value)
    assert f"'model.norm.weight' in {b}: 3 NaN, 2 infinite" in message
    assert "'model.norm.weight' in the output: 3 NaN, 2 infinite" in message
    assert "--allow-nonfinite" in message
    assert caught.value.exit_code == 3
    assert not out.exists()
    result = stockpot.merge(linear(a, b), out, Options(allow_nonfinite=True))
    assert result.lineage["bytes_resumed"] > 0  # nothing is computed twice
    assert len(result.lineage["nonfinite"]) == 2
    stockpot.verify(out)


def test_overflow_in_the_output_alone(copies, tmp_path):
    a, b = copies
    for path in copies:
        spoil(path, "lm_head.weight", [6e4, 6e4])
    recipe = {**linear(a, b), "parameters": {"normalize": False}, "dtype": "float16"}
    with pytest.raises(NonfiniteError, match=r"'lm_head.weight' in the output: 2 infinite") as caught:
        stockpot.merge(recipe, tmp_path / "out")
    assert "in /" not in str(caught.value).partition("the work is kept")[0]  # the inputs are fine


def test_norms_are_recorded_and_odd_ones_warned_of(family, tmp_path):
    result = stockpot.merge(linear(family / "a", family / "b"), tmp_path / "one")
    row = result.lineage["output"]["tensors"]["lm_head.weight"]
    exact = load(tmp_path / "one")["lm_head.weight"].double().norm().item()
    assert row["norm"] == pytest.approx(exact, rel=1e-5)
    assert 0.9 < row["norm_ratio"] < 1.01
    assert not result.warnings
    tripled = {**linear(family / "a", family / "b", family / "c"), "parameters": {"normalize": False}}
    warnings = stockpot.merge(tripled, tmp_path / "three").warnings
    assert len(warnings) == 1
    assert "31 tensors with a norm under 0.5 or over 2 times the mean of the inputs'" in warnings[0]


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64])
def test_measures_by_kernel_and_numpy(dtype):
    values = torch.randn(5000, dtype=torch.float64)
    values[17], values[1200], values[1201] = float("nan"), float("inf"), -float("inf")
    kinds = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32, DType.F64: torch.float64}
    typed = values.to(kinds[dtype])
    raw = memoryview(typed.view(torch.uint8).numpy().tobytes())
    edges = [0, 5, 1000, 1000, 3000, 5000]
    compiled = measures.measure(load_kernels(), raw, dtype, edges)
    plain = measures.measure(None, raw, dtype, edges)
    for i, (x, y) in enumerate(zip(compiled, plain, strict=True)):
        part = typed[edges[i] : edges[i + 1]].double()
        assert (x.nans, x.infinities) == (y.nans, y.infinities) == (int(part.isnan().sum()), int(part.isinf().sum()))
        assert x.squares == pytest.approx(float((part[part.isfinite()] ** 2).sum()), rel=1e-5)
        assert x.squares == pytest.approx(y.squares, rel=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e-32, 1e-200, 1e200])
def test_tiny_and_huge_norms(size, tmp_path):
    """0.1 a + 0.1 a is a fifth of a: warned of whatever the size, and the lineage stays JSON."""
    write_model(tmp_path / "a", {"w": torch.randn(30, 30, dtype=torch.float64) * size})
    recipe = {**linear(tmp_path / "a", tmp_path / "a"), "parameters": {"weight": 0.1, "normalize": False}}
    result = stockpot.merge(recipe, tmp_path / "out")
    text = (tmp_path / "out" / "stockpot.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    if 1e-100 < size < 1e100:
        assert result.lineage["output"]["tensors"]["w"]["norm_ratio"] == pytest.approx(0.2)
        assert "w (0.2)" in result.warnings[0]
    else:  # squares are beyond float64
        assert not result.warnings


def test_links_that_leave_a_checkpoint_are_not_copied(copies, tmp_path):
    a, b = copies
    (tmp_path / "secret.json").write_text("{}")
    (a / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(
        stockpot.errors.CheckpointError, match=r"tokenizer.json: is a symbolic link to .*secret.json, outside"
    ):
        stockpot.merge(linear(a, b), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# files that change


@pytest.mark.parametrize("how", ["rewritten", "longer", "gone"])
def test_an_input_that_changes_after_the_plan(copies, tmp_path, how):
    a, b = copies
    planned = stockpot.plan(linear(a, b))
    path = b / "model.safetensors"
    if how == "gone":
        path.unlink()
    else:
        raw = path.read_bytes()
        time.sleep(0.01)
        path.write_bytes(raw + b"x" if how == "longer" else raw)
    with pytest.raises(ReadError, match=r"model.safetensors: (was changed after its header was read|No such file)"):
        merge_planned(planned, tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_an_input_that_changes_during_the_merge(copies, tmp_path, monkeypatch):
    a, b = copies

    original = run._Runner._work

    def work(self, *args):
        original(self, *args)
        path = b / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(run._Runner, "_work", work)
    with pytest.raises(ReadError, match="was changed after its header was read; merge again to take it as it is now"):
        stockpot.merge(linear(a, b), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    stockpot.merge(linear(a, b), tmp_path / "out")  # starts over: what was merged is not of these files
    stockpot.merge(linear(a, b), tmp_path / "reference")
    one, two = load(tmp_path / "out"), load(tmp_path / "reference")
    assert all(torch.equal(one[k], two[k]) for k in two)


def test_measuring_without_kernels_takes_little_memory():
    raw = bytearray(2 * 2**22)
    measures.measure(None, raw[:8], DType.BF16, [0, 4])
    tracemalloc.start()
    measures.measure(None, memoryview(raw), DType.BF16, [0, 2**22])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


# disks that fail


def failing(real, number: int, after: int):
    """A system call that fails from its `after`-th call on."""
    calls = 0

    def call(*args):
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number))
        return real(*args)

    return call


def test_no_thread_outlives_a_merge_whose_caller_fails(family, tmp_path, monkeypatch):
    """Files opened afterwards may have the descriptors that a thread still had in hand."""
    real = loop.Loop._do

    def slow(self, *args):
        time.sleep(0.2)
        real(self, *args)

    def progress(done: int, total: int) -> None:
        raise KeyError("a caller's own mistake")

    with monkeypatch.context() as m:
        m.setattr(loop.Loop, "_do", slow)
        with pytest.raises(KeyError, match="own mistake"):
            stockpot.merge(linear(family / "a", family / "b"), tmp_path / "out", progress=progress)
    assert not [t for t in threading.enumerate() if t.name.startswith("stockpot-")]
    stockpot.merge(linear(family / "a", family / "b"), tmp_path / "out")
    stockpot.verify(tmp_path / "out")


@pytest.fixture(params=["compiled", "python"])
def bad_files(request, family, monkeypatch):
    """Files that give and take nothing where compiled code reads and writes them: Python tries again, and finds out why."""
    if request.param == "python":
        monkeypatch.setattr(Kernels, "transfers", False)
        yield
        return
    fd = os.open(family, os.O_RDONLY)  # a directory
    real = Checkpoint.extents
    monkeypatch.setattr(
        Checkpoint, "extents", lambda self, wanted: [(fd, at, size) for _, at, size in real(self, wanted) or ()]
    )
    monkeypatch.setattr(ShardSink, "fd", lambda self, shard: fd)
    yield
    os.close(fd)


@pytest.mark.usefixtures("bad_files")
def test_files_are_tried_again_by_python(family, tmp_path, monkeypatch):
    stockpot.merge(linear(family / "a", family / "b"), tmp_path / "out")
    stockpot.verify(tmp_path / "out")
    monkeypatch.undo()
    stockpot.merge(linear(family / "a", family / "b"), tmp_path / "reference")
    one, two = (json.loads((tmp_path / x / "stockpot.json").read_text()) for x in ("out", "reference"))
    assert one["output"] == two["output"]
    assert one["inputs"] == two["inputs"]


@pytest.mark.usefixtures("bad_files")
def test_an_io_error_on_one_read(family, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EIO, 1))
    with pytest.raises(ReadError, match=r"model.safetensors: read at byte \d+ failed: Input/output error") as caught:
        stockpot.merge(linear(family / "a", family / "b"), tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    stockpot.merge(linear(family / "a", family / "b"), tmp_path / "out")
    stockpot.verify(tmp_path / "out")


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fdatasync", "fsync", "rename"])
def test_a_disk_that_fails_to_take_the_output(family, tmp_path, monkeypatch, number, call):
    with monkeypatch.context() as m:
        m.setattr(os, call, failing(getattr(os, call), number, 0 if call != "pwrite" else 1))
        with pytest.raises(OutputError) as caught:
            stockpot.merge(linear(family / "a", family / "b"), tmp_path / "out")
    assert caught.value.exit_code == 2
    assert os.strerror(number) in str(caught.value)
    assert not (tmp_path / "out").exists()
    stockpot.merge(linear(family / "a", family / "b"), tmp_path / "out")  # the same command, once there is room
    stockpot.verify(tmp_path / "out")


def test_a_clock_that_jumps_changes_nothing(family, tmp_path, monkeypatch):
    stockpot.merge(linear(family / "a", family / "b"), tmp_path / "one")
    jumping = iter(range(10**9, 0, -7919))
    monkeypatch.setattr(time, "time", lambda: float(next(jumping)))
    stockpot.merge(linear(family / "a", family / "b"), tmp_path / "two")
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_closed_standard_output(family, tmp_path, recipe):
    """`stockpot plan ... | head -0`: no traceback, and a merge goes through all the same."""
    path = recipe(f"merge_method: linear\nmodels: [{family}/a, {family}/b]\n")
    command = f"{sys.executable} -m stockpot merge {path} {tmp_path}/out --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    stockpot.verify(tmp_path / "out")


# the limit on open files


@pytest.mark.parametrize(("soft", "hard", "code"), [(30, 4096, 0), (30, 60, 2)])
def test_more_shards_than_files_may_be_open(family, tmp_path, soft, hard, code):
    """The soft limit is raised as far as the merge needs; where the hard one is lower, it is said before anything is written."""
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); "
        "from stockpot.cli.main import main; main()"
    )
    (tmp_path / "r.yml").write_text(f"merge_method: linear\nmodels: [{family}/a, {family}/b]\n")
    command = [sys.executable, "-c", script, "merge", "r.yml", "out", "--shard-size", "1", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    if code:
        assert "files would be open at once" in done.stderr
        assert "--shard-size" in done.stderr
        assert not (tmp_path / "out").exists()
    else:
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > soft
        stockpot.verify(tmp_path / "out")
