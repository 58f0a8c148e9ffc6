"""Fuzzing where damaged bytes don't reach: whole pickles, documents of other types, and a machine of merges, kills and swaps.

`STOCKPOT_FUZZ_EXAMPLES` makes it longer; benchmarks/attack.py runs the same for thousands.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.numpy import load_file, save_file

import mutations
import pickles
import stockpot
from stockpot.api.merging import Options
from stockpot.engine import loop, publish
from stockpot.engine.outdir import strangers
from stockpot.engine.verify import compare
from stockpot.errors import OutputError
from stockpot.lineage import read_lineage

EXAMPLES = int(os.environ.get("STOCKPOT_FUZZ_EXAMPLES", "150"))


def test_pickles_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    """Random documents with whole tensors, and damaged ones: the same bytes, or refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = sum(pickles.one(seed, tmp_path) for seed in range(6 * EXAMPLES))
    assert read > EXAMPLES


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> mutations.World:
    return mutations.World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("target", mutations.TARGETS)
def test_documents_of_other_types(world: mutations.World, target: str) -> None:
    for seed in range(EXAMPLES // 5):
        world.run(target, random.Random(f"{target} {seed}"))


class Killed(BaseException):
    """As if by a signal that nobody can catch: what would tidy up is not run either."""


class Merging(RuleBasedStateMachine):
    """Two inputs and an OUT. What must hold: OUT is absent, or the merge of inputs that once were there together, whole and
    verifying; inputs and strangers' files are never changed; a command that succeeds leaves nothing beside OUT.
    """

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="machine-"))
        self.out = self.home / "out"
        self.count = 0
        self.known: set[bytes] = set()
        self.mine: dict[Path, bytes] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    @initialize()
    def models(self) -> None:
        for name in "ab":
            self.write(name)

    def write(self, name: str, *, keep_time: bool = False) -> None:
        """Another model there, by a rename as tools do it."""
        self.count += 1
        folder = self.home / name
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(self.count)
        # of several pieces, so that a merge can be stopped between them
        save_file({f"w{i}": rng.standard_normal(540_000, np.float32) for i in range(4)}, self.home / "new")
        place = folder / "model.safetensors"
        if keep_time and place.exists():
            held = place.stat()
            os.utime(self.home / "new", ns=(held.st_atime_ns, held.st_mtime_ns))
        os.replace(self.home / "new", place)

    def recipe(self) -> dict[str, Any]:
        return {"merge_method": "linear", "models": [str(self.home / n) for n in "ab"]}

    def expected(self) -> bytes:
        a, b = (load_file(self.home / n / "model.safetensors") for n in "ab")
        return b"".join(((a[k].astype(np.float64) + b[k]) / 2).astype(np.float32).tobytes() for k in sorted(a))

    def merge(self, *, overwrite: bool) -> None:
        self.known.add(self.expected())
        stockpot.merge(self.recipe(), self.out, Options(threads=1), overwrite=overwrite)
        assert self.held() == self.expected()
        beside = {p.name for p in self.home.iterdir()} - {"a", "b", "out"}
        assert beside <= {p.relative_to(self.home).parts[0] for p in self.mine}, beside

    def held(self) -> bytes | None:
        """OUT's tensors, one after the other."""
        if not (self.out / "model.safetensors").exists():
            return None
        tensors = load_file(self.out / "model.safetensors")
        return b"".join(tensors[k].tobytes() for k in sorted(tensors))

    @rule(overwrite=st.booleans())
    def merges(self, overwrite: bool) -> None:
        in_the_way = (self.out.exists() and not overwrite) or bool(self.mine)
        with contextlib.suppress(*([OutputError] if in_the_way else [])):
            self.merge(overwrite=overwrite)

    @rule(after=st.integers(0, 9), where=st.sampled_from(["work", "publish", "tidy"]))
    def killed(self, after: int, where: str) -> None:
        """A merge that ends in the midst of it."""
        count = 0

        def stopping(real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count > after % 4:
                    raise Killed
                return real(*args, **kwargs)

            return call

        self.known.add(self.expected())
        with pytest.MonkeyPatch.context() as m:
            if where == "work":
                m.setattr(loop.Loop, "_do", stopping(loop.Loop._do))
            elif where == "publish":
                m.setattr(publish, "sync_folder", stopping(publish.sync_folder))
            else:
                m.setattr(publish, "remove_written", stopping(publish.remove_written))
            with contextlib.suppress(Killed, OutputError):
                stockpot.merge(self.recipe(), self.out, Options(threads=1), overwrite=True)

    @rule(after=st.integers(1, 3), name=st.sampled_from("ab"), keep_time=st.booleans())
    def killed_swapped_and_resumed(self, after: int, name: str, keep_time: bool) -> None:
        """What chance alone seldom puts together."""
        self.killed(after=after, where="work")
        self.write(name, keep_time=keep_time)
        self.merges(overwrite=True)

    @rule(name=st.sampled_from("ab"), keep_time=st.booleans())
    def swapped(self, name: str, keep_time: bool) -> None:
        self.write(name, keep_time=keep_time)

    @rule(name=st.sampled_from("ab"))
    def touched(self, name: str) -> None:
        path = self.home / name / "model.safetensors"
        path.chmod(0o600 if path.stat().st_mode & 0o040 else 0o644)

    @rule(place=st.sampled_from(["out/thesis.tex", "out.steps/notes", "out.partial.notes"]))
    def strangers_write(self, place: str) -> None:
        path = self.home / place
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        self.mine[path] = b"mine"

    @precondition(lambda self: self.mine)
    @rule()
    def strangers_leave(self) -> None:
        for path in self.mine:
            path.unlink(missing_ok=True)
            if path.parent != self.home and path.parent != self.out:
                path.parent.rmdir()
        self.mine.clear()
        if self.out.exists() and not list(self.out.iterdir()):
            self.out.rmdir()

    @rule()
    def verified(self) -> None:
        if (self.out / "stockpot.json").exists():
            assert compare(*read_lineage(str(self.out)), 1) == []

    @invariant()
    def out_is_whole(self) -> None:
        held = self.held()
        assert held is None or held in self.known
        assert (held is None) == (not (self.out / "stockpot.json").exists())
        if held is not None:
            assert set(strangers(str(self.out)) or ()) == {p.name for p in self.mine if p.parent == self.out}

    @invariant()
    def nothing_is_lost(self) -> None:
        for path, content in self.mine.items():
            assert path.read_bytes() == content


Merging.TestCase.settings = settings(
    max_examples=max(EXAMPLES // 10, 5),
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
TestMerging = Merging.TestCase
