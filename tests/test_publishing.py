"""What a kill or a cut of power may leave, at every moment of a merge; and that nothing is removed that is not ours."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import stockpot
from disk import Disk, Folder, contents, recording, write_out
from stockpot import lineage as lineages
from stockpot.api.merging import Options
from stockpot.engine import publish, upload
from stockpot.engine.journal import Journal
from stockpot.engine.native import numpy_only
from stockpot.engine.outdir import LINEAGE, strangers
from stockpot.engine.verify import compare
from stockpot.errors import OutputError
from stockpot.lineage import read_lineage, record_verdict

from helpers import write_model

CONFIG = {"model_type": "nobody", "num_hidden_layers": 1}


def small(path: Path, seed: float) -> Path:
    write_model(path, {"a": torch.arange(12.0).reshape(3, 4) + seed, "b": torch.ones(5) * seed}, CONFIG)
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0}}, "seed": 0}))
    (path / "chat_templates").mkdir()
    (path / "chat_templates/one.jinja").write_text("{{ x }}")
    return path


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    return [str(small(tmp_path / "models/a", 1.0)), str(small(tmp_path / "models/b", 2.0))]


def linear(models: list[str], **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": models, **more}


def merged(models: list[str], out: Path, **more: Any) -> Any:
    return stockpot.merge(linear(models), out, Options(threads=1), **more)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def comparable(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what differs from run to run: the lineage's times. What a merge leaves in OUT while it tidies up is no harm."""
    out = {k: v for k, v in files.items() if k != "stockpot.journal"}
    if LINEAGE in out:
        lineage = json.loads(out[LINEAGE])
        for key in ("created", "seconds", "bytes_read", "bytes_written", "bytes_resumed"):
            lineage.pop(key, None)
        out[LINEAGE] = json.dumps(lineage, sort_keys=True).encode()
    return out


def known_again(old: Path) -> None:
    """The journals beside a directory that was copied name it by what it is: that of the copy."""
    for journal in old.parent.glob("*/stockpot.journal"):
        head, *rows = journal.read_text().splitlines()
        last = json.loads(rows[-1]) if rows else {}
        if "ino" in last.get("publishing", {}):
            last["publishing"] |= {"dev": old.stat().st_dev, "ino": old.stat().st_ino}
            journal.write_text("\n".join([head, *rows[:-1], json.dumps(last)]) + "\n")


def differences(out: Path) -> list[str]:
    """What verifying finds."""
    found, checkpoint = read_lineage(str(out))
    return compare(found, checkpoint, 1)


def clean(folder: Folder) -> bool:
    return not folder.dirty and all(clean(n) for n in folder.values() if isinstance(n, Folder))


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("there", ["nothing", "an old one", "an empty one"])
def test_every_moment(
    pair: list[str], tmp_path: Path, there: str, swaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call OUT is the old one, the new one, or absent, and complete, after a kill and after a cut of power; the same
    command then makes it the new one, and leaves nothing beside it.
    """
    if not swaps:
        monkeypatch.setattr(publish, "exchange", lambda one, two: False)
    root = tmp_path / "root"
    out = root / ("deep/er/out" if there == "nothing" else "out")
    root.mkdir()
    old: dict[str, bytes] = {}
    if there == "an old one":
        merged([pair[1]], out)
        old = comparable(files_of(out))
    elif there == "an empty one":
        out.mkdir()
    disk = Disk(root)
    with numpy_only(), recording(disk):  # compiled calls write past what is recorded
        merged(pair, out, overwrite=True)
    new = comparable(files_of(out))
    assert new != old
    place = str(out.relative_to(root))
    seen = set()
    last = ""
    first: Any = None
    for n, what, tree in disk.replayed():
        first = tree.get("out") if n == 0 else first
        node: Any = tree
        for part in place.split("/"):
            node = node.get(part) if isinstance(node, Folder) else None
        for durable in (False, True):
            held = None if node is None else comparable(contents(node, durable=durable))
            state = "absent" if not held else "old" if held == old else "new" if held == new else "half"
            assert state != "half", (n, what, durable, sorted(held or ()))
            seen.add(state)
        if what.startswith(("rename", "exchange")) and node:
            assert clean(node), (n, what)  # nothing in it waits to be flushed
        if what.split()[0] in ("rename", "exchange", "remove", "mkdir", "sync") and what != last:
            again = tmp_path / f"again{n}"
            write_out(tree, again, durable=True)
            name = next((name for name, found in tree.items() if found is first), None)
            if name is not None:
                known_again(again / name)
            merged(pair, again / place, overwrite=True)
            assert comparable(files_of(again / place)) == new, (n, what)
            assert [p.name for p in (again / place).parent.iterdir()] == [out.name], (n, what)
            assert not (again / place / "stockpot.journal").exists()
            shutil.rmtree(again)
        last = what
    assert seen == {"nothing": {"absent", "new"}, "an old one": {"old", "new"}, "an empty one": {"absent", "new"}}[
        there
    ] | ({"absent"} if there == "an old one" and not swaps else set())
    assert clean(tree)  # and the folders above, which were made for it


def test_the_same_command_after_a_kill_is_done_at_once(pair: list[str], tmp_path: Path) -> None:
    """Published, but not tidied up: nothing is merged again; another command tidies up and goes its own way."""
    out = tmp_path / "out"
    first = merged(pair, out)
    identity = stockpot.plan(linear(pair), Options(threads=1)).identity
    journal = json.dumps({"stockpot_journal": 3, "plan": identity, "inputs": None}) + '\n{"publishing": {}}\n'
    (out / "stockpot.journal").write_text(journal)
    before = files_of(out)
    found = merged(pair, out)
    assert found.lineage == json.loads(json.dumps(first.lineage))
    assert any("stopped while it tidied up" in n for n in found.notes)
    assert files_of(out) == {k: v for k, v in before.items() if k != "stockpot.journal"}
    (out / "stockpot.journal").write_text(journal)
    with pytest.raises(OutputError, match="not empty"):
        merged(pair[:1], out)
    assert not (out / "stockpot.journal").exists()
    (out / "stockpot.journal").write_text(journal)
    assert merged(pair, out, overwrite=True, resume=False).lineage["created"] >= first.lineage["created"]
    (out / "stockpot.journal").write_text(journal)
    assert merged(pair[:1], out, overwrite=True).lineage["inputs"] != first.lineage["inputs"]


# what is not ours


def test_overwrite_removes_what_stockpot_wrote_and_nothing_else(pair: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merged(pair, out)
    before = files_of(out)
    for name, make in {
        "thesis.tex": lambda p: p.write_text("years"),
        "chat_templates/mine.jinja": lambda p: p.write_text("mine"),
        "link": lambda p: p.symlink_to(tmp_path / "models"),
        "dir/inner": lambda p: (p.parent.mkdir(), p.write_text("x")),
    }.items():
        make(out / name)
        with pytest.raises(OutputError, match=f"what stockpot did not write .*{name}.*move that away"):
            merged(pair[:1], out, overwrite=True)
        assert {k: v for k, v in files_of(out).items() if k in before} == before
        (out / name).unlink()
    (out / ".DS_Store").write_text("litter")
    (out / "stockpot.json.tmp").write_text("of a gate that was killed")
    merged(pair[:1], out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out", "models"] or sorted(os.listdir(tmp_path)) == [
        "models",
        "out",
    ]
    for lineage in ("{}", "[]", "no json", '{"output": {"files": 3, "side_files": {}}}'):
        (out / "stockpot.json").write_text(lineage)
        with pytest.raises(OutputError, match=r"is no output of stockpot \(no stockpot.json"):
            merged(pair, out, overwrite=True)


def test_what_took_the_place_of_a_written_file_is_not_removed(pair: list[str], tmp_path: Path) -> None:
    """A model that was trained into OUT, a card that was written by hand: under the names of what was merged there."""
    out = tmp_path / "out"
    merged(pair, out)
    shutil.copytree(out, tmp_path / "copy")  # with other times: still what was written
    merged(pair[:1], tmp_path / "copy", overwrite=True)
    held = {name: (out / name).read_bytes() for name in ("model.safetensors", "README.md", "config.json")}
    for name in held:
        for content, later in ((held[name] + b" ", 0), (held[name][:-1] + b"!", 3600)):
            (out / name).write_bytes(content)
            when = (out / "stockpot.json").stat().st_mtime + later
            os.utime(out / name, (when, when))
            with pytest.raises(OutputError, match=f"what stockpot did not write .*{name}"):
                merged(pair[:1], out, overwrite=True)
            assert (out / name).read_bytes() == content
        (out / name).write_bytes(held[name])
        os.utime(out / name, (1_700_000_000, 1_700_000_000))
    merged(pair[:1], out, overwrite=True)


def test_a_mount_point_is_found_first(pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda p: str(p).endswith("/out"))
    with pytest.raises(OutputError, match="is a mount point, which can't be renamed; name a directory in it"):
        merged(pair, tmp_path / "out")
    merged(pair, tmp_path / "out/inner")  # as it says


def test_another_tokenizer_is_not_copied(pair: list[str], tmp_path: Path) -> None:
    """Files beside the weights are those that were planned with too: changed, gone, or new."""
    from stockpot.api.merging import merge_planned
    from stockpot.errors import ReadError

    tokenizer, template = Path(pair[0], "tokenizer.json"), Path(pair[0], "chat_templates/two.jinja")
    before = tokenizer.read_text()
    for change in (
        lambda: tokenizer.write_text(before.replace('"x": 0', '"y": 0')),
        lambda: template.write_text("new"),
        lambda: template.unlink(),
    ):
        planned = stockpot.plan(linear(pair), Options(threads=1))
        change()
        with pytest.raises((ReadError, OutputError), match=r"was changed after the merge was planned"):
            merge_planned(planned, tmp_path / "out", Options(threads=1))
        assert not (tmp_path / "out").exists()
    merged(pair, tmp_path / "out")  # as it says


def test_what_appears_meanwhile_is_kept(pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the exchange, and between the exchange and the removal."""
    out = tmp_path / "out"
    merged(pair[:1], out)
    real = publish.remove_written

    def late(old: str) -> bool:
        Path(old, "late.txt").write_text("mine")
        return real(old)

    monkeypatch.setattr(publish, "remove_written", late)
    found = merged(pair, out, overwrite=True)
    kept = [p for p in tmp_path.iterdir() if ".replaced-" in p.name]
    assert [(p.name, p.read_text()) for p in kept[0].iterdir() if p.name != LINEAGE] == [("late.txt", "mine")]
    assert any(str(kept[0]) in n for n in found.notes)
    assert not (out / "stockpot.journal").exists()


@pytest.mark.parametrize("where", ["out", "out.partial", "out.steps"])
@pytest.mark.parametrize("what", ["recipe", "model", "suite"])
def test_what_is_read_is_never_in_the_way(pair: list[str], tmp_path: Path, where: str, what: str) -> None:
    """Recipe, suite and inputs in OUT, in OUT.partial, in OUT.steps, although those bear our marks."""
    place = tmp_path / where
    place.mkdir()
    if where == "out.partial":
        (place / "stockpot.journal").write_text('{"stockpot_journal": 3, "plan": "x"}\n')
    if where == "out.steps":
        (place / "stockpot.scratch").write_text('{"stockpot_scratch": 1}\n')
    models = list(pair)
    if what == "model":
        shutil.copytree(pair[0], place / "a")
        models[0] = str(place / "a")
    step = f"merge_method: ties\nname: one\nbase_model: {pair[1]}\nmodels: [{models[0]}]\nparameters: {{density: 0.3}}\n---\n"
    text = step + f"merge_method: linear\nmodels: [one, {models[0]}]\n"
    recipe = (place if what == "recipe" else tmp_path) / "r.yml"
    recipe.write_text(text)
    suite = (place if what == "suite" else tmp_path) / "suite.yml"
    suite.write_text("slices: []")
    before = files_of(tmp_path)

    def release(partial: str) -> None: ...

    release.files = (str(suite),)  # type: ignore[attr-defined]
    from stockpot.api.merging import merge_planned

    planned = stockpot.plan(recipe, Options(threads=1))
    with pytest.raises(OutputError, match=r"is or holds the input|did not write|no output of stockpot"):
        merge_planned(planned, tmp_path / "out", Options(threads=1), overwrite=True, release=release)
    assert files_of(tmp_path) == before


def test_scratch_directories_of_others_stay(pair: list[str], tmp_path: Path) -> None:
    """OUT.steps: with our mark it is used, and only what merges left in it goes; without one it is refused."""
    text = (
        f"merge_method: ties\nname: one\nbase_model: {pair[1]}\nmodels: [{pair[0]}]\nparameters: {{density: 0.3}}\n---\n"
        f"merge_method: linear\nmodels: [one, {pair[0]}]\n"
    )
    steps = tmp_path / "out.steps"
    steps.mkdir()
    (steps / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match=r"holds something else .*thesis\.tex"):
        stockpot.merge(text, tmp_path / "out")
    assert (steps / "thesis.tex").read_text() == "years"
    assert not (tmp_path / "out").exists()
    (steps / "stockpot.scratch").write_text('{"stockpot_scratch": 1}\n')
    (steps / "other.partial").mkdir()
    (steps / "other.partial/notes").write_text("no journal")
    stockpot.merge(text, tmp_path / "out")
    assert files_of(steps) == {"thesis.tex": b"years", "other.partial/notes": b"no journal"}
    shutil.rmtree(steps)
    stockpot.merge(text, tmp_path / "out", overwrite=True)
    assert not steps.exists()
    steps.symlink_to(tmp_path / "models")
    with pytest.raises(OutputError, match="is or holds the input"):
        stockpot.merge(text, tmp_path / "out", overwrite=True)
    steps.unlink()
    steps.symlink_to(tmp_path / "nothing")
    with pytest.raises(OutputError, match="needed for unfinished work"):
        stockpot.merge(text, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("content", [b"", b"my own journal\n", b'{"plan": 3}\n'])
def test_a_partial_directory_needs_our_journal(pair: list[str], tmp_path: Path, content: bytes) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "stockpot.journal").write_bytes(content)
    (partial / "notes").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        merged(pair, tmp_path / "out")
    assert (partial / "notes").read_text() == "mine"
    if not content:  # killed as it began
        (partial / "notes").unlink()
        merged(pair, tmp_path / "out")


# links


def stopped(pair: list[str], out: Path) -> None:
    """A merge into OUT that was killed when it had everything but the name."""
    from stockpot.engine import run as runs
    from stockpot.engine.devices import NumpyDevice

    planned = stockpot.plan(linear(pair), Options(threads=1))
    runs.run_plan(planned, str(out), NumpyDevice()).release()


def test_hard_links_are_broken(pair: list[str], tmp_path: Path) -> None:
    """A shard that is an input too, or a backup's (cp -al): neither is written into."""
    out = tmp_path / "out"
    stopped(pair, out)
    shard = tmp_path / "out.partial/model.safetensors"
    source = Path(pair[0], "model.safetensors")
    before = source.read_bytes()
    backup = tmp_path / "backup"
    os.link(shard, backup)
    kept = backup.read_bytes()
    merged(pair, out)
    assert backup.read_bytes() == kept
    assert not os.path.samefile(backup, out / "model.safetensors")
    shutil.rmtree(out)
    stopped(pair, out)
    shard.unlink()
    os.link(source, shard)
    merged(pair, out)
    assert source.read_bytes() == before
    assert differences(out) == []


def test_links_in_place_of_shards_are_not_followed(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that comes after the directory was cleared."""
    from stockpot.engine import run as runs

    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    real = runs._clear

    def clear_and_link(directory: str, keep: Any = frozenset()) -> None:
        real(directory, keep)
        if keep:
            os.symlink(victim, os.path.join(directory, "model.safetensors"))

    monkeypatch.setattr(runs, "_clear", clear_and_link)
    with pytest.raises(OutputError, match="can't be written"):
        merged(pair, tmp_path / "out")
    assert victim.read_bytes() == b"precious"


# neighbours


def test_the_lock_is_of_the_file_that_is_there(tmp_path: Path) -> None:
    """Who waits for a journal that is published meanwhile does not get the dead file's lock."""
    import fcntl

    path = tmp_path / "stockpot.journal"

    def journal() -> Journal:
        return Journal(str(path), "plan", None, lambda: None)  # type: ignore[arg-type]

    first = journal()
    assert not first.open()
    with pytest.raises(OutputError, match="another merge is writing here right now"):
        journal().open()
    real, swapped = fcntl.flock, []

    def late(fd: int, how: int) -> None:
        if not swapped:  # between opening and locking: the other one publishes, a third one begins
            swapped.append(True)
            os.rename(path, tmp_path / "published")
            first.unlock()
            third.open()
        real(fd, how)

    third = journal()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fcntl, "flock", late)
        with pytest.raises(OutputError, match="another merge is writing here right now"):
            journal().open()
    third.unlock()
    second = journal()
    assert second.open()
    second.unlock()


def test_scratch_for_urls_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKPOT_SCRATCH", str(tmp_path))
    place = Path(upload.scratch_for("memory://bucket/out"))
    assert upload.scratch_for("memory://bucket/out/") == str(place)
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    place.parent.chmod(0o777)
    with pytest.raises(OutputError, match=r"others can get into it.*STOCKPOT_SCRATCH"):
        upload.scratch_for("memory://bucket/out")
    place.parent.rmdir()
    place.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="others can get into it, or it is not ours"):
        upload.scratch_for("memory://bucket/out")
    place.parent.unlink()
    monkeypatch.setenv("STOCKPOT_SCRATCH", str(tmp_path / "another"))  # as it says
    assert Path(upload.scratch_for("memory://bucket/out")).parent.is_dir()


def test_unfinished_work_of_another_user_is_refused(pair: list[str], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory of somebody else's")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    partial = shared / "out.partial"
    partial.mkdir(mode=0o777)
    (partial / "stockpot.journal").write_text('{"stockpot_journal": 3, "plan": "x"}\n')
    os.chown(partial, 65534, 65534)
    with pytest.raises(OutputError, match="belongs to another user"):
        merged(pair, shared / "out")
    shared.chmod(0o755)  # whoever put it there may write to it anyway
    merged(pair, shared / "out")


def test_merges_into_one_out_at_once(pair: list[str], tmp_path: Path) -> None:
    """Of several at once each publishes whole or is told that another one is at it; OUT always verifies."""
    out = tmp_path / "out"
    merged(pair, out)
    told: list[str] = []

    def work(models: list[str]) -> None:
        for _ in range(6):
            try:
                merged(models, out, overwrite=True)
                told.append("published")
            except OutputError as e:
                told.append(str(e))

    threads = [threading.Thread(target=work, args=(m,)) for m in (pair, pair[:1], pair[1:])]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(t == "published" or "another merge is writing here right now" in t for t in told), set(told)
    assert told.count("published") >= 3
    assert strangers(str(out)) == []
    assert differences(out) == []
    assert sorted(os.listdir(tmp_path)) == ["models", "out"]


# the gates' verdict and the card


def test_verdict_and_card_change_together(pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two, the first time and the second: OUT verifies, and the gates write again."""
    out = tmp_path / "out"
    merged(pair, out)

    def verdict(passed: bool) -> dict[str, Any]:
        gate = {"gate": "g", "severity": "critical", "status": "passed" if passed else "failed", "why": "a | b\nc"}
        return {"passed": passed, "suite_sha256": "00", "gates": [gate]}

    real = lineages.replace_file
    for passed in (True, False):

        def killed(path: str, content: Any) -> None:
            if path.endswith("README.md"):
                raise KeyboardInterrupt
            real(path, content)

        monkeypatch.setattr(lineages, "replace_file", killed)
        with pytest.raises(KeyboardInterrupt):
            record_verdict(str(out), verdict(passed))
        assert differences(out) == []
        assert read_lineage(str(out))[0]["gates"]["passed"] is passed
        monkeypatch.setattr(lineages, "replace_file", real)
        record_verdict(str(out), verdict(passed))
        assert differences(out) == []
        assert ("not passed" in (out / "README.md").read_text()) is not passed
        assert (out / "README.md").read_text().count("## Release gates") == 1
    (out / "README.md").rename(tmp_path / "secret")
    (out / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(OutputError, match="is a symbolic link"):
        record_verdict(str(out), verdict(True))
    (out / "README.md").unlink()
    (out / "README.md").write_text("forged")
    assert differences(out) == ["README.md: is not the file that was written"]
    record_verdict(str(out), verdict(True))  # what was forged does not become known by it
    assert read_lineage(str(out))[0]["card_before"] == []
