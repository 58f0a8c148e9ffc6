"""What strangers and tired people hand to a merge: each gets a message to act on, the right exit code, and nothing at OUT."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from stockpot.cli.main import app

from helpers import CONFIG, load, write_model

LINEAR = "merge_method: linear\nmodels: [{t}/m, {f}/b]\n"


class Room:
    """A test's directory `t`, with a copy `m` of a model to spoil; `f` is the family's."""

    def __init__(self, t: Path, family: Path) -> None:
        self.t, self.m = t, t / "m"
        shutil.copytree(family / "a", self.m)
        self.file = self.m / "model.safetensors"

    def change(self, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load(self.m)
        edit(tensors)
        save_file(tensors, self.file, {"format": "pt"})

    def header(self, edit: Callable[[dict[str, dict[str, object]]], object]) -> None:
        raw = self.file.read_bytes()
        n = struct.unpack("<Q", raw[:8])[0]
        doc = json.loads(raw[8 : 8 + n])
        edit(doc)
        new = json.dumps(doc).encode()
        self.file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + n :])

    def raw(self, edit: Callable[[bytearray], bytes | bytearray]) -> None:
        self.file.write_bytes(edit(bytearray(self.file.read_bytes())))

    def shard(self, edit: Callable[[dict[str, str]], object]) -> None:
        tensors = load(self.m)
        self.file.unlink()
        write_model(self.m, tensors, shards=2)
        path = self.m / "model.safetensors.index.json"
        doc = json.loads(path.read_text())
        edit(doc["weight_map"])
        path.write_text(json.dumps(doc))

    def empty(self) -> None:
        shutil.rmtree(self.m)
        self.m.mkdir()

    def pickled(self, payload: bytes) -> None:
        self.empty()
        with zipfile.ZipFile(self.m / "pytorch_model.bin", "w") as z:
            z.writestr("archive/data.pkl", payload)


class Command:
    def __reduce__(self):
        return os.system, ("touch /tmp/stockpot-was-here",)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return "model.layers.0.self_attn.q_proj.weight"


def point_outside(room: Room) -> None:
    room.shard(lambda w: w.update({first({}): "../family/model.safetensors"}))


def outward_link(room: Room) -> None:
    shutil.move(room.file, room.t / "elsewhere.safetensors")
    room.file.symlink_to(room.t / "elsewhere.safetensors")


def vocabulary(room: Room) -> None:
    room.change(lambda d: d.update({"model.embed_tokens.weight": torch.zeros(259, 64, dtype=torch.bfloat16)}))


def out_in_use(room: Room) -> None:
    (room.t / "out").mkdir()
    (room.t / "out" / "thesis.tex").write_text("years of work")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)

#: name -> (what is spoilt, the recipe, exit code, what the message says)
CASES: dict[str, tuple[Callable[[Room], object] | None, str, int, str]] = {
    # files
    "missing directory": (lambda r: shutil.rmtree(r.m), LINEAR, 3, "m: no such file or directory"),
    "misspelt directory": (None, "merge_method: linear\nmodels: [{t}/mm, {f}/b]\n", 3, "did you mean '{t}/m'?"),
    "empty directory": (Room.empty, LINEAR, 3, "an empty directory; expected model.safetensors"),
    "a directory of something else": (
        lambda r: (r.empty(), (r.m / "notes.txt").write_text("x")), LINEAR, 3, "no safetensors file; found notes.txt"),
    "a text file": (
        lambda r: (r.t / "m.txt").write_text("x"), "merge_method: linear\nmodels: [{t}/m.txt, {f}/b]\n", 3,
        "only files of a known format can be opened: safetensors (.safetensors); torch (.ckpt, .pt, .pth, .bin,"),
    "a training run": (
        lambda r: (r.empty(), (r.m / "checkpoint-5").mkdir()), LINEAR, 3, "a training run, not a checkpoint: name one of its"),
    "empty file": (lambda r: r.raw(lambda b: b""), LINEAR, 3, "0 bytes is too short for a safetensors file"),
    "truncated data": (lambda r: r.raw(lambda b: b[:-100]), LINEAR, 3, "is truncated: the header describes"),
    "truncated header": (lambda r: r.raw(lambda b: b[:50]), LINEAR, 3, "runs past the end of the file"),
    "bytes after the data": (lambda r: r.raw(lambda b: b + b"x"), LINEAR, 3, "has bytes that no tensor owns"),
    "header length 2^63": (
        lambda r: r.raw(lambda b: struct.pack("<Q", 2**63) + b[8:]), LINEAR, 3, "over the format's limit of 100000000 bytes"),
    "header that is no JSON": (lambda r: r.raw(lambda b: b[:8] + b"{" * 40 + b[48:]), LINEAR, 3, "header is not valid JSON"),
    "header that is a list": (lambda r: r.raw(lambda b: b[:8] + b"[" + b[9:]), LINEAR, 3, "does not start with '{'"),
    "HTML in place of a model": (
        lambda r: r.raw(lambda b: b"<!DOCTYPE html><html><body>404</body></html>" * 9), LINEAR, 3, "this is not a safetensors"),
    "Git LFS pointer": (
        lambda r: r.raw(lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"), LINEAR, 3,
        "git lfs pull"),
    "overlapping offsets": (
        lambda r: r.header(lambda d: d["model.norm.weight"].update(data_offsets=[0, 128])), LINEAR, 3, "overlaps the tensor"),
    "unknown dtype": (
        lambda r: r.header(lambda d: d["model.norm.weight"].update(dtype="F4")), LINEAR, 3, "dtype 'F4' is not supported"),
    "negative shape": (
        lambda r: r.header(lambda d: d["model.norm.weight"].update(shape=[-1])), LINEAR, 3, "not a list of non-negative"),
    "shape that does not fit": (
        lambda r: r.header(lambda d: d["model.norm.weight"].update(shape=[63])), LINEAR, 3, "needs 126 bytes, data_offsets give"),
    "index that names ../x": (point_outside, LINEAR, 3, "points outside the directory: '../family/model.safetensors'"),
    "index that names an absolute path": (
        lambda r: r.shard(lambda w: w.update({first({}): "/etc/passwd"})), LINEAR, 3, "points outside the directory"),
    "index that names a missing shard": (
        lambda r: r.shard(lambda w: w.update({first({}): "model-9.safetensors"})), LINEAR, 3, "1 of 3 shards are missing"),
    "index that names a stranger": (
        lambda r: r.shard(lambda w: w.update({"ghost": "model-00001-of-00002.safetensors"})), LINEAR, 3, "does not hold it"),
    "link that leaves the checkpoint": (outward_link, LINEAR, 3, "outside the checkpoint; set STOCKPOT_FOLLOW_SYMLINKS=1"),
    "config that is no JSON": (lambda r: (r.m / "config.json").write_text("{"), LINEAR, 3, "config.json: not valid JSON"),
    "a pickle that runs a command": (
        lambda r: r.pickled(pickle.dumps(Command())), LINEAR, 3, "expected a mapping from names to tensors"),
    "a pickle that is cut short": (lambda r: r.pickled(b"\x80\x04"), LINEAR, 3, "its pickle can't be read"),
    "an old pickle": (
        lambda r: (r.empty(), torch.save({"a": torch.ones(1)}, r.m / "pytorch_model.bin", _use_new_zipfile_serialization=False)),
        LINEAR, 3, "saved by a torch older than 1.6; load it there and save it again"),
    # models that do not fit
    "missing tensor": (lambda r: r.change(lambda d: d.pop("model.norm.weight")), LINEAR, 3, "model.norm.weight"),
    "other shape": (
        lambda r: r.change(lambda d: d.update({"model.norm.weight": torch.zeros(65, dtype=torch.bfloat16)})), LINEAR, 3,
        "'model.norm.weight' is [65] in {t}/m but [64] in {f}/b"),
    "other vocabulary": (vocabulary, LINEAR, 3, "is [259, 64] in {t}/m but [256, 64] in {f}/b"),
    "integers against floats": (
        lambda r: r.change(lambda d: d.update({"model.norm.weight": torch.zeros(64, dtype=torch.int16)})), LINEAR, 3,
        "'model.norm.weight' is I16 in {t}/m but BF16 in {f}/b"),
    "NaN": (
        lambda r: r.change(lambda d: d["model.norm.weight"].fill_(float("nan"))), LINEAR, 3, "in {t}/m: 64 NaN"),
    "adapter with a model": (
        lambda r: (r.m / "adapter_config.json").write_text("{}"), LINEAR, 3, "a PEFT adapter without adapter_model"),
    # recipes
    "no recipe": (None, "", 2, "empty; a recipe needs at least merge_method and models"),
    "a recipe that is a list": (None, "- a\n- b\n", 2, "a recipe is a mapping with merge_method and models; got a list"),
    "YAML syntax": (None, "merge_method: [linear\nmodels: 3", 2, "not valid YAML"),
    "a YAML bomb": (None, BOMB, 2, "nested too deeply or expanded too far"),
    "deep nesting": (None, "models: " + "[" * 3000, 2, "not valid YAML"),
    "a Python object": (None, "merge_method: !!python/object/apply:os.system ['true']\n", 2, "is not allowed in a recipe"),
    "a key twice": (None, LINEAR + "merge_method: slerp\n", 2, "key 'merge_method' given twice (first on line 1)"),
    "unknown method": (None, LINEAR.replace("linear", "liner"), 2, "did you mean 'linear'?"),
    "unknown key": (None, LINEAR + "parametres: {}\n", 2, "did you mean 'parameters'?"),
    "misspelt parameter": (None, LINEAR + "parameters: {wieght: 1}\n", 2, "did you mean 'weight'?"),
    "density 1.5": (
        None, "merge_method: ties\nbase_model: {f}/base\nparameters: {density: 1.5}\nmodels: [{t}/m, {f}/b]\n", 2,
        "density: expected a number from 0 to 1, got 1.5"),
    "false where a number goes": (None, LINEAR + "parameters: {weight: false}\n", 2, "weight: expected a number, got false"),
    "weights that sum to zero": (
        None, "merge_method: linear\nmodels:\n- {model: '{t}/m', parameters: {weight: 1}}\n"
        "- {model: '{f}/b', parameters: {weight: -1}}\n", 2, "sum to zero"),
    "slerp with three models": (
        None, "merge_method: slerp\nparameters: {t: 0.5}\nmodels: [{t}/m, {f}/b, {f}/c]\n", 2, "takes exactly 2 models, got 3"),
    "slerp without t": (None, "merge_method: slerp\nmodels: [{t}/m, {f}/b]\n", 2, "slerp needs the parameter 't'"),
    "ties without a base": (None, LINEAR.replace("linear", "ties"), 2, "works on differences from a base: set base_model"),
    "no model but the base": (
        None, "merge_method: ties\nbase_model: {f}/base\nmodels: [{f}/base]\n", 2, "takes at least 1 model besides"),
    "layers past the end": (
        None, "merge_method: passthrough\nslices: [{sources: [{model: '{t}/m', layer_range: [0, 9]}]}]\n", 2,
        "layer_range [0, 9] goes past the end: {t}/m has 4 layers"),
    "layers reversed": (
        None, "merge_method: passthrough\nslices: [{sources: [{model: '{t}/m', layer_range: [3, 1]}]}]\n", 2,
        "holds no layers"),
    "layers empty": (
        None, "merge_method: passthrough\nslices: [{sources: [{model: '{t}/m', layer_range: [2, 2]}]}]\n", 2,
        "holds no layers"),
    "unknown dtype asked for": (None, LINEAR + "dtype: bfloat61\n", 2, "did you mean 'bfloat16'?"),
    "OUT is not empty": (out_in_use, LINEAR, 2, "exists and is not empty; use --overwrite to replace it"),
    "OUT is a file": (lambda r: (r.t / "out").write_text("x"), LINEAR, 2, "is a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, family: Path, tmp_path: Path) -> None:
    spoil, text, code, message = CASES[name]
    room = Room(tmp_path, family)
    if spoil is not None:
        spoil(room)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text.replace("{t}", str(tmp_path)).replace("{f}", str(family)))
    before = sorted(str(p) for p in (tmp_path / "out").rglob("*")) if (tmp_path / "out").is_dir() else None
    result = CliRunner().invoke(app, ["merge", str(recipe), str(tmp_path / "out"), "--quiet"])
    said = result.stderr + result.stdout
    assert result.exit_code == code, said
    assert message.replace("{t}", str(tmp_path)).replace("{f}", str(family)) in said
    assert "Traceback" not in said
    assert "bug in stockpot" not in said
    if before is None:
        assert not (tmp_path / "out").is_dir()
    else:
        assert sorted(str(p) for p in (tmp_path / "out").rglob("*")) == before
    assert not Path("/tmp/stockpot-was-here").exists()


def test_the_same_model_twice_is_allowed(family: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: linear\nmodels: [{family}/a, {family}/a]\n")
    result = CliRunner().invoke(app, ["merge", str(recipe), str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    a, out = load(family / "a"), load(tmp_path / "out")
    assert all(torch.equal(a[k], out[k]) for k in a)


def test_a_link_out_of_the_checkpoint_when_asked_for(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(tmp_path, family)
    outward_link(room)
    monkeypatch.setenv("STOCKPOT_FOLLOW_SYMLINKS", "1")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(LINEAR.replace("{t}", str(tmp_path)).replace("{f}", str(family)))
    assert CliRunner().invoke(app, ["merge", str(recipe), str(tmp_path / "out")]).exit_code == 0


def test_the_hub_caches_links_are_no_surprise(family: Path, tmp_path: Path) -> None:
    """models--org--name/snapshots/REVISION/file -> ../../blobs/DIGEST."""
    snapshot, blobs = tmp_path / "models--org--m" / "snapshots" / "abc", tmp_path / "models--org--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (family / "a").iterdir():
        shutil.copy(file, blobs / file.name[::-1])
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name[::-1])
    result = CliRunner().invoke(app, ["inspect", str(snapshot), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["kind"] == "model"
    assert CONFIG["model_type"] == "llama"
