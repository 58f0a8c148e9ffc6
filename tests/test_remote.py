"""Inputs and outputs behind URLs, against servers that the tests start: S3 (moto), HTTP, and a stand-in for the Hub."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import stockpot
from servers import serving
from stockpot.api.merging import Options
from stockpot.checkpoints import ReadRequest, open_checkpoint
from stockpot.checkpoints.stores import RemoteStore
from stockpot.errors import CheckpointError, OutputError, ReadError, StockpotError

from fp8 import write_fp8
from helpers import cli, load, write_model

LINEAR = {"merge_method": "linear", "models": ["s3://models/a", "s3://models/b"]}


@pytest.fixture(scope="module")
def s3(family):
    """An S3 server with the family's models in the bucket `models`; the file system that reaches it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {k: os.environ.get(k) for k in settings}
    os.environ.update(settings)
    fs = fsspec.filesystem("s3")
    fs.mkdir("models")
    for name in ("base", "a", "b"):
        fs.put(str(family / name), f"models/{name}", recursive=True)
    yield fs
    server.stop()
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


@pytest.fixture
def local(family, tmp_path):
    out = tmp_path / "local"
    stockpot.merge({"merge_method": "linear", "models": [family / "a", family / "b"]}, out)
    return load(out)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


def test_s3_inputs_give_the_same_bytes(s3, local, tmp_path):
    result = stockpot.merge(LINEAR, tmp_path / "out")
    assert same(load(tmp_path / "out"), local)
    assert result.lineage["inputs"][0]["path"] == "s3://models/a"
    assert len(result.lineage["inputs"][0]["files"][0]["digest"]) == 64
    stockpot.verify(tmp_path / "out")


def test_a_plan_of_remote_models_travels(s3, local):
    """Whoever gets it opens the files anew: small files have a folder of their own there."""
    import pickle

    from stockpot.engine.candidates import CheckpointCache, make_candidate

    planned = stockpot.plan(LINEAR)
    again = pickle.loads(pickle.dumps(planned))
    assert again.identity == planned.identity
    folders = [p.inputs[0].checkpoint.directory for p in (planned, again)]
    assert folders[0] != folders[1]
    assert all(os.path.exists(os.path.join(f, "config.json")) for f in folders)
    found = make_candidate(again, CheckpointCache(2**30))
    for name, (_, raw) in found.tensors.items():
        assert raw.tobytes() == local[name].view(torch.uint8).numpy().tobytes()


def test_s3_two_passes_and_a_base(s3, family, tmp_path):
    recipe = {"merge_method": "ties", "parameters": {"density": 0.4}}
    stockpot.merge(
        {**recipe, "base_model": "s3://models/base", "models": ["s3://models/a", "s3://models/b"]}, tmp_path / "x"
    )
    stockpot.merge({**recipe, "base_model": family / "base", "models": [family / "a", family / "b"]}, tmp_path / "y")
    assert same(load(tmp_path / "x"), load(tmp_path / "y"))


def test_merge_into_s3(s3, local, tmp_path, monkeypatch):
    monkeypatch.setenv("STOCKPOT_SCRATCH", str(tmp_path))
    result = stockpot.merge(LINEAR, "s3://models/merged", stockpot.Options(shard_size="100kB"))
    assert result.path == "s3://models/merged"
    assert os.listdir(tmp_path) == ["local"]  # no scratch is left
    names = {Path(n).name for n in s3.ls("models/merged", refresh=True)}
    assert {"config.json", "stockpot.json", "README.md", "model.safetensors.index.json"} <= names
    stockpot.verify("s3://models/merged")
    s3.get("models/merged", str(tmp_path / "copy"), recursive=True)
    assert same(load(tmp_path / "copy"), local)
    with pytest.raises(OutputError, match="exists and is not empty; use --overwrite"):
        stockpot.merge(LINEAR, "s3://models/merged")
    stockpot.merge(LINEAR, "s3://models/merged", overwrite=True)
    left = {Path(n).name for n in s3.ls("models/merged", refresh=True)}
    assert "model.safetensors" in left
    assert not any("-of-" in n for n in left)  # the old shards are gone
    stockpot.verify("s3://models/merged")


@pytest.mark.parametrize("out", ["s3://models/a", "s3://models/a/", "s3://models"])
def test_an_input_is_never_overwritten(s3, out):
    with pytest.raises(OutputError, match="is or holds the input s3://models/a; choose another OUT"):
        stockpot.merge(LINEAR, out, overwrite=True)
    assert s3.exists("models/a/model.safetensors")


def test_an_upload_that_fails_keeps_the_result(s3, local, tmp_path, monkeypatch):
    monkeypatch.setenv("STOCKPOT_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr("stockpot.checkpoints.stores._FIRST_PAUSE", 0.001)
    real = s3.put_file

    def broken(source, target, **kwargs):
        if target.endswith("model.safetensors"):
            raise ConnectionResetError("the line is dead")
        return real(source, target, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(s3, "put_file", broken)
        with pytest.raises(
            OutputError, match=r"upload failed: .*the line is dead; the result is in .*the same command goes on"
        ):
            stockpot.merge(LINEAR, "s3://models/late")
    assert not s3.exists("models/late/stockpot.json")
    assert not s3.exists("models/late/config.json")  # the new config never lies beside other weights
    result = stockpot.merge(LINEAR, "s3://models/late")  # the same command
    assert result.lineage["bytes_resumed"] > 0
    stockpot.verify("s3://models/late")


def test_an_out_that_can_not_be_written_is_found_first(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("STOCKPOT_SCRATCH", str(tmp_path))

    def denied(path, data, **kwargs):
        raise PermissionError("Access Denied")

    with monkeypatch.context() as m:
        m.setattr(s3, "pipe_file", denied)
        with pytest.raises(
            OutputError, match="s3://models/denied: can't be written to: PermissionError: Access Denied"
        ):
            stockpot.merge(LINEAR, "s3://models/denied")
    with pytest.raises(OutputError, match="s3://no-such-bucket/x: can't be"):
        stockpot.merge(LINEAR, "s3://no-such-bucket/x")
    assert not list(tmp_path.iterdir())  # nothing was merged
    stockpot.merge(LINEAR, "s3://models/denied")
    assert not s3.exists("models/denied/.stockpot-writable")


def test_an_out_that_does_not_outlive_the_command(recipe, tmp_path):
    done = cli("merge", recipe("merge_method: linear\nmodels: [a, b]\n"), "memory://out")
    assert done.returncode == 2
    assert "lives only as long as this command" in " ".join(done.stderr.replace("│", "").split())


def test_ranges_only(family, tmp_path):
    """One tensor of a large file costs its bytes, not the file's."""
    with serving(family) as (url, log):
        checkpoint = open_checkpoint(f"{url}/base/model.safetensors")
        log.clear()
        spec = checkpoint.spec("model.norm.weight")
        raw = bytearray(spec.nbytes)
        checkpoint.read([ReadRequest("model.norm.weight", 0, spec.numel)], memoryview(raw))
        asked = [r for _, _, r in log if r]
        assert len(asked) == 1
        start, stop = asked[0].removeprefix("bytes=").split("-")
        assert int(stop) - int(start) + 1 == spec.nbytes
        assert bytes(raw) == load(family / "base")["model.norm.weight"].view(torch.uint8).numpy().tobytes()


def test_http_directory(family, local, tmp_path):
    with serving(family) as (url, _):
        stockpot.merge({"merge_method": "linear", "models": [f"{url}/a", f"{url}/b"]}, tmp_path / "out")
    assert same(load(tmp_path / "out"), local)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_what_lay_beside_an_older_merge_stays(s3, family, tmp_path):
    stockpot.merge(LINEAR, "s3://models/mine")
    s3.pipe("models/mine/notes/thesis.txt", b"years of work")
    s3.pipe("models/mine/plot.png", b"png")
    stockpot.merge(LINEAR, "s3://models/mine", overwrite=True)
    assert s3.cat("models/mine/notes/thesis.txt") == b"years of work"
    assert s3.cat("models/mine/plot.png") == b"png"


def test_file_urls_are_paths(family, tmp_path, local):
    shutil.copytree(family / "a", tmp_path / "a")
    recipe = {"merge_method": "linear", "models": [f"file://{tmp_path}/a", f"file://{family}/b"]}
    for out in (f"file://{tmp_path}/a", tmp_path / "a", f"file://{tmp_path}"):
        with pytest.raises(OutputError, match="is or holds the input"):
            stockpot.merge(recipe, out, overwrite=True)
    stockpot.merge(recipe, f"file://{tmp_path}/out")
    assert same(load(tmp_path / "out"), local)


def test_signed_urls_and_servers_without_listings(family, tmp_path):
    with serving(family) as (url, log):
        checkpoint = open_checkpoint(f"{url}/a/model.safetensors?X-Signature=abc")
        assert len(checkpoint) == len(load(family / "a"))
        assert not any(path.rstrip("/").endswith("/a") for _, path, _ in log)  # the folder was not asked for
        with pytest.raises(OutputError, match="HTTP servers are read from, not written to"):
            stockpot.merge({"merge_method": "linear", "models": [f"{url}/a"]}, f"{url}/out")


def test_a_server_that_tells_no_sizes(family, tmp_path):
    with serving(family, tells_sizes=False) as (url, _):
        recipe = {"merge_method": "linear", "models": [f"{url}/a", str(family / "b")]}
        with pytest.raises(CheckpointError, match=r"the server tells no size of model.*safetensors"):
            stockpot.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_average_over_http(lora_run, tmp_path):
    adapters = sorted(lora_run.glob("checkpoint-*"))[:2]
    with serving(lora_run) as (url, _):
        recipe = {"merge_method": "linear", "adapter": "product"}
        stockpot.merge({**recipe, "models": [f"{url}/{p.name}" for p in adapters]}, tmp_path / "a")
    stockpot.merge({**recipe, "models": adapters}, tmp_path / "b")
    assert same(load(tmp_path / "a"), load(tmp_path / "b"))


def test_memory_and_torch_files(family, local, tmp_path):
    fs = fsspec.filesystem("memory")
    for name in "ab":
        torch.save(load(family / name), tmp_path / f"{name}.pt")
        fs.put_file(str(tmp_path / f"{name}.pt"), f"/zips/{name}.pt")
    stockpot.merge({"merge_method": "linear", "models": ["memory://zips/a.pt", "memory://zips/b.pt"]}, tmp_path / "out")
    assert same(load(tmp_path / "out"), local)
    stockpot.merge({"merge_method": "linear", "models": ["memory://zips/a.pt", "memory://zips/b.pt"]}, "memory://out/x")
    stockpot.verify("memory://out/x")
    fs.rm("/zips", recursive=True)


def test_a_failing_line_is_tried_again(family, tmp_path, local, monkeypatch):
    """Every third read fails; the result is the same."""
    monkeypatch.setattr("stockpot.checkpoints.stores._FIRST_PAUSE", 0.001)
    fs = fsspec.filesystem("memory")
    fs.put(str(family / "a"), "/flaky/a", recursive=True)
    fs.put(str(family / "b"), "/flaky/b", recursive=True)
    count = 0
    real = type(fs).cat_file

    def flaky(self, path, *args, **kwargs):
        nonlocal count
        count += 1
        if count % 3 == 0:
            raise TimeoutError("no answer")
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(type(fs), "cat_file", flaky)
    stockpot.merge({"merge_method": "linear", "models": ["memory://flaky/a", "memory://flaky/b"]}, tmp_path / "out")
    assert same(load(tmp_path / "out"), local)
    assert count > 6


def test_a_dead_line_is_an_error(family, monkeypatch):
    monkeypatch.setattr("stockpot.checkpoints.stores._FIRST_PAUSE", 0.001)
    fs = fsspec.filesystem("memory")
    fs.put(str(family / "a"), "/dead/a", recursive=True)
    checkpoint = open_checkpoint("memory://dead/a")

    def dead(self, *args, **kwargs):
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(fs), "cat_file", dead)
    with pytest.raises(ReadError, match="failed 5 times; the last time: TimeoutError: no answer"):
        checkpoint.read([ReadRequest("model.norm.weight", 0, 64)], memoryview(bytearray(128)))


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("memory://nowhere/model", "no such file or directory"),
        ("memory://nowhere/model.safetensors", "no such file or directory"),
        ("gopher://a/b", "gopher"),
        ("s3://models/absent", "no such file or directory"),
    ],
)
def test_urls_that_lead_nowhere(ref, message, s3):
    with pytest.raises((CheckpointError, stockpot.errors.ArgumentError), match=message):
        open_checkpoint(ref)


def test_replaced_behind_our_back(family, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.put(str(family / "a"), "/moving/a", recursive=True)
    checkpoint = open_checkpoint("memory://moving/a")
    assert checkpoint.changed() is None
    fs.put_file(str(family / "a" / "config.json"), "/moving/a/model.safetensors")
    assert "was changed after its header was read" in str(checkpoint.changed())


def test_read_ahead_gives_the_same_bytes_and_stays_within_its_bounds(family):
    fs = fsspec.filesystem("memory")
    fs.put(str(family / "a"), "/ahead/a", recursive=True)
    checkpoint = open_checkpoint("memory://ahead/a")
    plain = open_checkpoint(family / "a")
    for name in checkpoint.names():
        n = checkpoint.spec(name).numel
        checkpoint.will_read(ReadRequest(name, 0, n))
    for name in checkpoint.names():
        n = checkpoint.spec(name).numel
        a, b = bytearray(2 * n), bytearray(2 * n)
        checkpoint.read([ReadRequest(name, 0, n)], memoryview(a))
        plain.read([ReadRequest(name, 0, n)], memoryview(b))
        assert a == b
    assert checkpoint._ahead.size == 0
    checkpoint.close()


def test_long_ranges_come_in_parts(monkeypatch):
    monkeypatch.setattr("stockpot.checkpoints.stores.PART", 1000)
    fs = fsspec.filesystem("memory")
    data = os.urandom(12_345)
    fs.pipe_file("/parts/x", data)
    assert RemoteStore(fs, "memory://").read("/parts/x", 17, 12_000) == data[17:12_000]


# the Hub


@pytest.fixture
def hub(family, tmp_path):
    """(environment, log) of a Hub that has org/base, org/a (sharded) and org/b, and of an empty cache."""
    root = tmp_path / "hub"
    for name in ("base", "a", "b"):
        shutil.copytree(family / name, root / "org" / name)
    with serving(root, hub=True) as (url, log):
        home = str(tmp_path / "home")
        yield {**os.environ, "HF_ENDPOINT": url, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}, log


def run(env, *args, cwd):
    command = [sys.executable, "-m", "stockpot", *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=cwd, check=False)


def test_hub_models_are_planned_then_downloaded_then_found_in_the_cache(hub, recipe, tmp_path, local):
    env, log = hub
    path = recipe("merge_method: linear\nmodels: [org/a, org/b@main]\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    planned = run(env, "plan", path, cwd=elsewhere)
    assert planned.returncode == 0, planned.stderr
    assert "org/a: 1 file of 364 kB in all will be downloaded into the Hub's cache" in planned.stdout + planned.stderr
    weights = [r for method, p, r in log if p.endswith(".safetensors") and method == "GET"]
    assert all(weights)  # ranges only: headers
    merged = run(env, "merge", path, "out", cwd=elsewhere)
    assert merged.returncode == 0, merged.stderr
    assert same(load(elsewhere / "out"), local)
    log.clear()
    offline = run({**env, "HF_HUB_OFFLINE": "1"}, "merge", path, "again", cwd=elsewhere)
    assert offline.returncode == 0, offline.stderr
    assert not log
    assert same(load(elsewhere / "again"), local)


def test_fp8_models_of_the_hub(hub, recipe, tmp_path):
    """What is dequantised while it is read is downloaded first like any other model."""
    env, _ = hub
    for seed, name in enumerate(("org/eight", "org/other")):
        write_fp8(tmp_path / "hub" / name, "block", seed)
    for place, models in (
        ("here", [tmp_path / "hub/org/eight", tmp_path / "hub/org/other"]),
        ("there", ["org/eight", "org/other"]),
    ):
        path = recipe(f"merge_method: linear\nmodels: [{models[0]}, {models[1]}]\n")
        done = run(env, "merge", path, tmp_path / place, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert same(load(tmp_path / "here"), load(tmp_path / "there"))


def test_a_misspelt_parameter_is_found_before_anything_is_downloaded(hub, recipe, tmp_path):
    env, log = hub
    path = recipe("merge_method: linear\nmodels: [org/a, org/b]\nparameters: {wieght: 1}\n")
    result = run(env, "merge", path, tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 2
    assert "did you mean 'weight'?" in result.stderr
    assert not any(p.endswith(".safetensors") and not r for m, p, r in log if m == "GET")


def test_a_bad_out_is_found_before_anything_is_downloaded(hub, recipe, tmp_path):
    env, log = hub
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    path = recipe("merge_method: linear\nmodels: [org/a, org/b]\n")
    result = run(env, "merge", path, tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 2
    assert "exists and is not empty" in result.stderr
    assert not any(p.endswith(".safetensors") and not r for m, p, r in log if m == "GET")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("org/missing", "no model of this name on the Hub"),
        ("org/a@v7", "or no revision 'v7'"),
    ],
)
def test_what_the_hub_does_not_have(hub, ref, message, tmp_path):
    env, _ = hub
    result = run(env, "inspect", ref, cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_offline_says_what_is_missing(hub, tmp_path):
    env, log = hub
    result = run({**env, "HF_HUB_OFFLINE": "1"}, "inspect", "org/a", cwd=tmp_path)
    assert result.returncode == 3
    assert "org/a: no such file or directory, and as a Hub id it is not complete in the cache" in result.stderr
    assert not log


def test_unreachable_hub(hub, tmp_path):
    """Known at the first call: what is read later is tried again and again."""
    env, _ = hub
    result = run({**env, "HF_ENDPOINT": "http://127.0.0.1:9"}, "inspect", "org/a", cwd=tmp_path)
    assert result.returncode == 3
    assert "the Hugging Face Hub can't be reached" in result.stderr
    assert "Traceback" not in result.stderr


# servers that mean ill


def drip(handler: Any, chunk: bytes, pause: float, most: int) -> int:
    """Send as long as somebody reads. How much that was."""
    sent = 0
    try:
        while sent < most:
            handler.wfile.write(chunk)
            sent += len(chunk)
            time.sleep(pause)
    except OSError:
        pass
    return sent


def ill(kind: str, sent: list[int]) -> Any:
    """What a server does with a file."""

    def file(self: Any, path: Path, headers: dict[str, str], *, body: bool) -> None:
        asked = self.headers.get("Range")
        config = path.name == "config.json"
        self.close_connection = True
        if kind == "endless" and config:
            self.send_response(200)
            self.end_headers()
            sent.append(drip(self, b" " * 2**20, 0, 2**34) if body else 0)
        elif kind == "swells" and config:
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(gzip.compress(bytes(2**28)) if body else b"")
        elif kind == "slow" and config:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            sent.append(drip(self, b" ", 0.1, 1000) if body else 0)
        elif kind in ("ignores", "more") and not config:
            self.send_response(206 if kind == "more" and asked else 200)
            self.send_header("Content-Length", str(2**34))
            self.end_headers()
            sent.append(drip(self, path.read_bytes() + bytes(2**20), 0, 2**34) if body else 0)
        else:
            data = path.read_bytes()
            self.send(200, data, {}, body=body)

    return file


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("endless", r"more than \d+ bytes: too large for a small file"),
        ("swells", "is sent compressed, which was not asked for"),
        ("slow", "the server is too slow"),
        ("ignores", r"has bytes that no tensor owns|ignores ranges"),
        ("more", r"asked for \d+ bytes, the server sends more"),
    ],
)
def test_http_servers_that_mean_ill(family, monkeypatch, kind, told):
    """A ceiling and a deadline on every answer."""
    monkeypatch.setattr("stockpot.checkpoints.http.PATIENCE", 1.5)
    sent: list[int] = []
    began = time.monotonic()
    with serving(family, file=ill(kind, sent)) as (url, _), pytest.raises(StockpotError, match=told):
        stockpot.open_checkpoint(f"{url}/a")
    assert time.monotonic() - began < 30
    assert sum(sent) < 2**28


@pytest.mark.parametrize("kind", ["endless", "slow", "wide"])
def test_listings_have_limits_too(family, monkeypatch, kind):
    monkeypatch.setattr("stockpot.checkpoints.http.PATIENCE", 1.0)
    monkeypatch.setattr("stockpot.checkpoints.http.SLOWEST", 2**30)
    sent: list[int] = []

    def serve(self: Any, *, body: bool) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        chunk = {"endless": b" " * 2**20, "slow": b" ", "wide": b'<a href="/a/x">' * 1000}[kind]
        sent.append(drip(self, chunk, 0.1 if kind == "slow" else 0, 2**34) if body else 0)

    with serving(family, serve=serve) as (url, _), pytest.raises(StockpotError, match=r"too slow|too large"):
        stockpot.open_checkpoint(f"{url}/a")
    assert sum(sent) < 2**26


def test_a_large_file_of_a_server_without_ranges_is_refused(family, tmp_path):
    """The beginning can be had, what comes after can't."""

    def file(self: Any, path: Path, headers: dict[str, str], *, body: bool) -> None:
        self.send(200, path.read_bytes(), {}, body=body)

    write_model(tmp_path / "m", {f"w{i}": torch.ones(100_000) for i in range(4)}, {})
    with (
        serving(tmp_path, file=file) as (url, _),
        pytest.raises(StockpotError, match="ignores ranges, so parts of the file"),
    ):
        stockpot.merge({"merge_method": "linear", "models": [f"{url}/m"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_strangers_weights_at_a_url_stay(family, tmp_path):
    fs = fsspec.filesystem("memory")
    recipe = {"merge_method": "linear", "models": [str(family / "a")]}
    fs.pipe_file("/place/out/other.safetensors", b"mine")
    with pytest.raises(OutputError, match="not empty"):
        stockpot.merge(recipe, "memory://place/out")
    with pytest.raises(OutputError, match=r"holds weights that stockpot did not write \('other.safetensors'\)"):
        stockpot.merge(recipe, "memory://place/out", overwrite=True)
    assert fs.cat_file("/place/out/other.safetensors") == b"mine"
    fs.mv("/place/out/other.safetensors", "/place/other.safetensors")  # as it says
    stockpot.merge(recipe, "memory://place/out", overwrite=True)
    fs.pipe_file("/place/out/notes.txt", b"mine")
    stockpot.merge(recipe, "memory://place/out", overwrite=True)
    assert fs.cat_file("/place/out/notes.txt") == b"mine"
    fs.rm("/place", recursive=True)


def test_an_upload_that_was_killed_removes_what_the_older_one_left(family, tmp_path, monkeypatch):
    """The lineage that lists it goes first: the journal remembers."""
    from stockpot.engine import upload

    fs = fsspec.filesystem("memory")
    monkeypatch.setenv("STOCKPOT_SCRATCH", str(tmp_path / "scratch"))
    recipe = {"merge_method": "linear", "models": [str(family / "a")]}
    stockpot.merge(recipe, "memory://killed/out", Options(shard_size="20kB"))
    older = {n for n in fs.ls("/killed/out", detail=False) if n.endswith(".safetensors")}
    assert len(older) > 1
    real = upload.RemoteStore.persist

    def stops(self: Any, what: str, call: Any) -> Any:
        if what.startswith("writing") and what.endswith("config.json"):
            raise KeyboardInterrupt
        return real(self, what, call)

    with monkeypatch.context() as m:
        m.setattr(upload.RemoteStore, "persist", stops)
        with pytest.raises(KeyboardInterrupt):
            stockpot.merge(recipe, "memory://killed/out", overwrite=True)
    assert not fs.exists("/killed/out/stockpot.json")
    stockpot.merge(recipe, "memory://killed/out", overwrite=True)
    left = {n for n in fs.ls("/killed/out", detail=False) if n.endswith(".safetensors")}
    assert left == {"/killed/out/model.safetensors"}
    assert stockpot.open_checkpoint("memory://killed/out").names()
    assert not list((tmp_path / "scratch").iterdir())
    fs.rm("/killed", recursive=True)
