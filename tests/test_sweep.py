"""Sweeps: the staged protocol on a real run, resuming, faults, grids, learned coefficients, several jobs."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stockpot
from scoring import distance_suite
from stockpot.errors import ArgumentError, OutputError
from stockpot.evaluation.suite import load_suite
from stockpot.runs import Run, Snapshot, open_run
from stockpot.runs.metrics import MetricLog
from stockpot.search import SweepOptions, parse_grid
from stockpot.search.candidates import comparison_candidates
from stockpot.search.grid import grid_candidates
from stockpot.search.stages import STAGE_FUNCTIONS, _Coefficients
from stockpot.search.sweep import SweepJob, run_sweep

from helpers import cli

SMALL = SweepOptions(k=(2, 3, 5), intervals=(2,), penalties=(1.0, 0.7), by=("loss", "step"))


def sweep(run: Path, suite: Path, out: Path, options: SweepOptions = SMALL, **more: Any) -> Any:
    return run_sweep(SweepJob(load_suite(suite), str(out), open_run(run), options, **more))


@pytest.fixture(scope="module")
def done(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """(folder, suite, result) of a whole sweep with the distance evaluator."""
    folder = tmp_path_factory.mktemp("sweep")
    suite = distance_suite(folder, log=str(folder / "calls.txt"))
    return folder, suite, sweep(lora_run, suite, folder / "out")


def test_the_staged_protocol(done: tuple[Path, Path, Any], lora_run: Path) -> None:
    _, _, result = done
    by_stage: dict[str, list[str]] = {}
    for row in result.rows:
        by_stage.setdefault(row.tried.stage, []).append(row.name)
    assert by_stage["reference"] == ["final", "last_merging", "base"]
    assert by_stage["uniform"] == ["last_2_unweighted", "last_3_unweighted", "last_5_unweighted"]
    score = {r.name: r.selection.value for r in result.rows}
    # intervals only for the two best k, and only where the run is long enough (6 regular snapshots)
    best = sorted(by_stage["uniform"], key=lambda n: score[n])[:2]
    assert by_stage["interval"] == [n.replace("_unw", "_2_unw") for n in best if "5" not in n]
    shortlist = sorted([*by_stage["uniform"], *by_stage["interval"]], key=lambda n: score[n])[:2]
    expected = [
        n.replace("unweighted", f"{m}_pf-{p}") for n in shortlist for m in ("loss", "steps") for p in ("1_0", "0_7")
    ]
    assert by_stage["weights"] == expected
    merges = [r for r in result.rows if r.tried.stage != "reference"]
    assert result.winner == min(merges, key=lambda r: r.selection.value).name
    assert result.row(result.winner).report is not None
    assert sum(r.report is not None for r in result.rows) <= 5  # the winner and what it is compared with
    assert set(result.final_comparison) >= {"final", "last_merging", "base"}
    for row in merges:
        assert row.tried.recipe["run"]["path"] == str(lora_run)
        assert math.isclose(sum(row.tried.weights.values()), 1.0)


def test_scores_are_those_of_what_would_be_published(done: tuple[Path, Path, Any], tmp_path: Path) -> None:
    _, _, result = done
    from safetensors.numpy import load_file

    winner = result.row(result.winner)
    stockpot.merge(dict(winner.tried.recipe), tmp_path / "out")
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    flat = np.concatenate([v.reshape(-1) for v in tensors.values()]).astype(np.float64)
    flat = flat[: len(flat) // 40 * 40].reshape(40, -1)
    assert winner.selection.value == pytest.approx(float((flat**2).mean()), rel=1e-12)


def test_nothing_is_scored_twice(done: tuple[Path, Path, Any], lora_run: Path) -> None:
    folder, suite, result = done
    calls = (folder / "calls.txt").read_text().splitlines()
    again = sweep(lora_run, suite, folder / "out")
    assert again.evaluations == 0
    assert (folder / "calls.txt").read_text().splitlines() == calls
    assert [r.to_dict()["selection"] for r in again.leaderboard()] == [
        r.to_dict()["selection"] for r in result.leaderboard()
    ]
    # a longer list scores only what is new
    wider = sweep(lora_run, suite, folder / "out", replace(SMALL, k=(2, 3, 4, 5)))
    assert 0 < wider.evaluations < 15
    # equal candidates under different names are scored once: what greedy tries were soups before
    greedy = sweep(lora_run, suite, folder / "out", replace(SMALL, stages=("uniform", "greedy")))
    assert greedy.reused > len(result.rows) // 4


def test_a_changed_suite_scores_again(done: tuple[Path, Path, Any], lora_run: Path, tmp_path: Path) -> None:
    folder, suite, result = done
    shutil.copytree(folder, tmp_path / "copy")
    text = suite.read_text()
    moved = tmp_path / "copy" / "suite.yml"
    moved.write_text(text.replace("metric: distance", "metric: distance\n    weight: 2\n    timeout: 50"))
    assert sweep(lora_run, moved, tmp_path / "copy/out").evaluations == 0  # what is scored is the same
    moved.write_text(text.replace("options: {", 'options: {"target": 0.1, '))
    assert sweep(lora_run, moved, tmp_path / "copy/out").evaluations >= len(result.rows)
    other = Path(shutil.copytree(lora_run, tmp_path / "other_run"))
    with pytest.raises(ArgumentError, match="holds a sweep of"):
        sweep(other, moved, tmp_path / "copy/out")


def test_another_metric_of_the_same_function(lora_run: Path, tmp_path: Path) -> None:
    """The scores that are there lack it: they are no scores now, and the report of before still stands until then."""
    suite = distance_suite(tmp_path)
    sweep(lora_run, suite, tmp_path / "out", replace(SMALL, stages=("uniform",)))
    module = tmp_path / "tests_distance.py"
    suite.write_text(suite.read_text().replace("metric: distance", "metric: other"))
    failed = sweep(lora_run, suite, tmp_path / "out", replace(SMALL, stages=("uniform",)))
    assert all("gave no metric 'other'" in str(r.error) for r in failed.rows)
    module.write_text(module.read_text().replace('{"distance": float', '{"other": 1.0, "distance": float'))
    found = sweep(lora_run, suite, tmp_path / "out", replace(SMALL, stages=("uniform",)))
    assert all(r.selection is not None and r.selection.value == 1.0 for r in found.rows)


def test_what_is_published_is_what_was_scored_last(lora_run: Path, tmp_path: Path) -> None:
    """Snapshots that change between two sweeps: scored again, and published again."""
    from safetensors.torch import load_file, save_file

    run = Path(shutil.copytree(lora_run, tmp_path / "run"))
    suite, options = distance_suite(tmp_path), replace(SMALL, stages=("uniform",), k=(2,))
    stockpot.sweep(run, tmp_path / "out", suite, options)
    first = (tmp_path / "out/best/adapter_model.safetensors").read_bytes()
    file = run / "checkpoint-24/adapter_model.safetensors"
    save_file({k: v * 2 for k, v in load_file(file).items()}, file, {"format": "pt"})
    again = stockpot.sweep(run, tmp_path / "out", suite, options)
    assert again.result.evaluations > 0
    assert (tmp_path / "out/best/adapter_model.safetensors").read_bytes() != first


def test_a_tokenizer_that_changed_scores_again(lora_run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from helpers import tiny_tokenizer

    distance_suite(tmp_path)
    suite = tmp_path / "suite.yml"
    suite.write_text("tokenizer: tok\n" + suite.read_text())
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    options = replace(SMALL, stages=("uniform",), k=(2,))
    assert sweep(lora_run, suite, tmp_path / "out", options).evaluations
    assert not sweep(lora_run, suite, tmp_path / "out", options).evaluations
    config = tmp_path / "tok/tokenizer_config.json"
    config.write_text(config.read_text().replace("w2", "w3"))
    assert sweep(lora_run, suite, tmp_path / "out", options).evaluations


def test_a_sweep_that_was_stopped_is_no_result(lora_run: Path, tmp_path: Path) -> None:
    suite = distance_suite(tmp_path)
    stockpot.sweep(lora_run, tmp_path / "out", suite, SMALL, publish=False)
    with sqlite3.connect(tmp_path / "out/sweep.sqlite") as db:
        db.execute("DELETE FROM meta WHERE key = 'keys'")
    db.close()
    done = cli("report", tmp_path / "out")
    assert done.returncode == 3
    assert "did not come to its end" in done.stderr


def test_what_is_not_ours_stays_where_it_is(lora_run: Path, tmp_path: Path) -> None:
    suite = distance_suite(tmp_path)
    (tmp_path / "out/best").mkdir(parents=True)
    (tmp_path / "out/best/thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="was not written by stockpot"):
        stockpot.sweep(lora_run, tmp_path / "out", suite, replace(SMALL, stages=("uniform",)))
    assert (tmp_path / "out/best/thesis.txt").exists()
    (tmp_path / "other/candidates.tmp").mkdir(parents=True)
    with pytest.raises(OutputError, match="in the way"):
        stockpot.sweep(lora_run, tmp_path / "other", suite, SMALL)


def test_a_sweep_of_failures_alone(lora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "tests_fails.py").write_text("def f(checkpoint, split):\n    raise ValueError('never')\n")
    suite = tmp_path / "suite.yml"
    suite.write_text("slices: [{name: a, kind: python, function: 'tests_fails:f', metric: acc}]\n")
    done = cli("sweep", lora_run, tmp_path / "out", "--suite", suite, "--k", "2", "--json")
    assert done.returncode == 3
    assert "no merge could be scored" in done.stderr
    assert json.loads(done.stdout)["winner"] is None


def test_two_sweeps_in_one_place(lora_run: Path, tmp_path: Path) -> None:
    from stockpot.search.store import ScoreStore

    (tmp_path / "out").mkdir()
    held = ScoreStore(str(tmp_path / "out"), exclusive=True)
    done = cli("sweep", lora_run, tmp_path / "out", "--suite", distance_suite(tmp_path))
    assert done.returncode == 2
    assert "another sweep is running there" in done.stderr
    held.close()


def test_killed_at_ten_moments_and_resumed(lora_run: Path, done: tuple[Path, Path, Any], tmp_path: Path) -> None:
    """The same leaderboard, and every evaluation that was finished is finished once."""
    _, _, result = done
    suite = distance_suite(tmp_path, log=str(tmp_path / "calls.txt"), delay=0.1)
    command = [sys.executable, "-m", "stockpot", "sweep", str(lora_run), "out", "--suite", str(suite), "--k", "2,3,5",
               "--intervals", "2", "--penalties", "1.0,0.7", "--no-publish", "--quiet"]  # fmt: skip
    rng = random.Random(0)
    kills = 0
    for number in range(10):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        want = number + 1  # each time one more evaluation, then some moment within the next
        while process.poll() is None and _rows(tmp_path / "out/sweep.sqlite") < want and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.15)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 10
    time.sleep(1.0)  # the worker of the last one notices that its parent is gone
    assert not _workers(tmp_path)
    before = _scores(tmp_path / "out/sweep.sqlite")
    finished = subprocess.run([*command[:-1], "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["ranking"] == list(result.ranking)
    assert [c["selection"] for c in found["candidates"]] == [r.to_dict()["selection"] for r in result.rows]
    after = _scores(tmp_path / "out/sweep.sqlite")
    assert before.items() <= after.items()  # what was known was not touched: same time of scoring
    calls = len((tmp_path / "calls.txt").read_text().splitlines())
    # an evaluation that a kill cut off may have been counted by the evaluator and not by the store: one for each kill at most
    assert len(after) <= calls <= len(after) + kills
    assert found["evaluations"] == len(after) - len(before)


def _rows(path: Path) -> int:
    return len(_scores(path))


def _scores(path: Path) -> dict[tuple[str, str], float]:
    if not path.exists():
        return {}
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            return {(d, p): at for d, p, at in db.execute("SELECT digest, part, at FROM scores")}
    except sqlite3.OperationalError:
        return {}


def _workers(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"stockpot.evaluation.worker" in entry.read_bytes() and os.readlink(entry.parent / "cwd") == str(folder):
                found.append(entry.parent.name)
        except OSError:
            continue
    return found


FAULTY = """
import os, time
from tests_distance import distance

def fussy(checkpoint, split, how):
    found = distance(checkpoint, split)
    mark = int(found["distance"] * 1e9)
    if mark % 3 == 0:
        if how == "raise":
            raise RuntimeError("not this one")
        if how == "hang":
            time.sleep(600)
        if how == "die":
            os.abort()
        return {"distance": float("nan")}
    return found
"""


@pytest.mark.parametrize(
    ("how", "message"), [("raise", "not this one"), ("hang", "did not end within"), ("die", "died"), ("nan", "is nan")]
)
def test_failing_candidates_are_recorded_and_the_sweep_goes_on(
    lora_run: Path, tmp_path: Path, how: str, message: str
) -> None:
    distance_suite(tmp_path)
    (tmp_path / "tests_fussy.py").write_text(FAULTY)
    suite = tmp_path / "suite.yml"
    suite.write_text(
        f"timeout: 2\nslices: [{{name: near, kind: python, function: 'tests_fussy:fussy', options: {{how: {how}}}, "
        "metric: distance, direction: min}]\n"
    )
    result = sweep(lora_run, suite, tmp_path / "out", replace(SMALL, by=("loss",), intervals=(2,), penalties=(0.7,)))
    failed = [r for r in result.rows if r.error]
    scored = [r for r in result.rows if r.selection is not None]
    assert failed
    assert scored
    assert [r.error for r in failed if message not in str(r.error)] == []
    assert result.leaderboard()[-1].error
    again = sweep(lora_run, suite, tmp_path / "out", replace(SMALL, by=("loss",), intervals=(2,), penalties=(0.7,)))
    assert again.evaluations == 0  # what failed is not tried again by itself


def test_several_jobs_find_the_same(lora_run: Path, done: tuple[Path, Path, Any], tmp_path: Path) -> None:
    _, _, result = done
    suite = distance_suite(tmp_path, delay=0.2)
    module = tmp_path / "tests_distance.py"
    module.write_text(
        module.read_text().replace(
            "    time.sleep(delay)",
            f"    open({str(tmp_path / 'pids.txt')!r}, 'a').write(f'{{os.getpid()}}\\n')\n    time.sleep(delay)",
        )
    )
    found = sweep(lora_run, suite, tmp_path / "out", jobs=2)
    assert found.ranking == result.ranking
    assert [r.digest for r in found.rows] == [r.digest for r in result.rows]
    assert len(set((tmp_path / "pids.txt").read_text().split())) == 2


def test_jobs_are_as_many_as_memory_allows(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "stockpot.evaluation.pool.memory", lambda: {"available": 2**20, "total": 2**30, "container_limit": None}
    )
    found = sweep(lora_run, distance_suite(tmp_path), tmp_path / "out", replace(SMALL, stages=("uniform",)), jobs=3)
    assert any("1 of the jobs asked for" in n for n in found.notes)
    assert not [r for r in found.rows if r.error]


def test_no_room_for_results(lora_run: Path, tmp_path: Path) -> None:
    """The limit on file size stands in for a full disk: clear, and what was scored before is kept."""
    suite = distance_suite(tmp_path)
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000)); from stockpot.cli.main import main; main()"
    )
    command = ["sweep", str(lora_run), "out", "--suite", str(suite), "--no-publish", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", script, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "sweep.sqlite" in done.stderr
    assert "Traceback" not in done.stderr
    kept = _rows(tmp_path / "out/sweep.sqlite")
    assert kept > 0
    assert cli(*command, cwd=tmp_path).returncode == 0
    assert _rows(tmp_path / "out/sweep.sqlite") > kept


def test_out_that_can_not_be_written(lora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be created"):
        sweep(lora_run, distance_suite(tmp_path), tmp_path / "file" / "out")


# stages


def run_of(count: int) -> Run:
    shots = tuple(Snapshot(100 * i, f"/nowhere/{i}", "adapter") for i in range(1, count + 1))
    return Run("run", "pattern", shots, MetricLog({"loss": tuple((s.step, 1.0) for s in shots)}))


def test_the_46_comparisons_of_the_paper() -> None:
    """Three runs of 17, 28 and 22 regular snapshots; one adds the last 5 with interval 3 for the two sparse methods."""
    found = [
        *comparison_candidates(run_of(17), SweepOptions()),
        *comparison_candidates(run_of(28), SweepOptions(comparison_spaced=((5, 3),))),
        *comparison_candidates(run_of(22), SweepOptions()),
    ]
    assert len(found) == 46
    names = [t.name for t in found]
    assert names.count("last_5_3_dare_ties_base_last") == 1
    assert sum("slerp" in n for n in names) == 6
    first = next(t for t in found if t.name == "last_5_ties_base_first")
    assert first.recipe["run"] == {"path": "run", "last": 5, "base": 100}
    assert first.recipe["parameters"] == {"density": 0.5}


def feed(
    stage: str, options: SweepOptions, value: Any, count: int = 6, by_weights: bool = False
) -> tuple[list[Any], dict[str, float]]:
    """Run a stage with scores that a function gives. (candidates, goodness)."""
    tried: list[Any] = []
    good: dict[str, float] = {}
    generator = STAGE_FUNCTIONS[stage](run_of(count), options, tried, [])
    try:
        batch = next(generator)
        while True:
            for t in batch:
                if t.name not in good:
                    tried.append(t)
                    found = value(t)
                    if found is not None:
                        good[t.name] = found
            batch = generator.send(dict(good))
    except StopIteration:
        return tried, good


def test_greedy_soups() -> None:
    """The worked example of the method: f = -(x - 3)^2 over 0, 4, 10 keeps 4 alone, since equal is not better."""
    where = {100: 0.0, 200: 4.0, 300: 10.0}

    def value(t: Any) -> float:
        x = sum(w * where[s] for s, w in t.weights.items())
        return -((x - 3) ** 2)

    tried, good = feed("greedy", SweepOptions(), value, count=3)
    assert [t.name for t in tried] == ["step_100", "step_200", "step_300", "greedy_2", "greedy_3"]
    assert good["greedy_2"] == pytest.approx(-1.0)
    assert sorted(tried[-1].weights) == [200, 300]  # 4 was kept alone, so the third is tried with it
    assert max(good, key=lambda n: good[n]) == "step_200"


@pytest.mark.parametrize(
    ("total", "signs"), [("one", "any"), ("one", "positive"), ("free", "any"), ("free", "positive")]
)
def test_learned_coefficients_find_the_optimum(total: str, signs: str) -> None:
    """f = |theta - theta*|^2 over five snapshots, theta* in their span: below 1 % of the best single one."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, 12))
    truth = {"any": [0.7, -0.4, 0.9, -0.5, 0.3], "positive": [0.1, 0.3, 0.05, 0.2, 0.35]}[signs]
    if total == "free":
        truth = [1.3 * t for t in truth]
    target = np.array(truth) @ points
    steps = [100 * i for i in range(1, 6)]

    def value(t: Any) -> float:
        alpha = np.array([t.weights[s] for s in steps])
        if total == "one":
            assert abs(alpha.sum() - 1) < 1e-6
        if signs == "positive":
            assert alpha.min() >= 0
        return -float(((alpha @ points - target) ** 2).sum())

    options = SweepOptions(stages=("lcsc",), lcsc_evaluations=700, lcsc_sum=total, lcsc_signs=signs)
    tried, good = feed("lcsc", options, value, count=5)
    alone = max(-float(((p - target) ** 2).sum()) for p in points)
    assert max(good.values()) > 0.01 * alone
    first = [t for t in tried if t.name <= "lcsc_006"]
    assert list(first[0].weights.values()) == pytest.approx([0.2] * 5)  # uniform, EMAs, the last
    assert list(first[-1].weights.values()) == [0.0] * 4 + [1.0]
    again, _ = feed("lcsc", options, value, count=5)
    assert [t.weights for t in again] == [t.weights for t in tried]  # so that a sweep can resume


def test_learned_coefficients_survive_failures() -> None:
    tried, good = feed(
        "lcsc",
        SweepOptions(lcsc_evaluations=40),
        lambda t: None if t.name[-1] in "37" else -sum(w * w for w in t.weights.values()),
    )
    assert 30 <= len(tried) <= 40
    assert len(good) < len(tried)
    nothing, _ = feed("lcsc", SweepOptions(lcsc_evaluations=30), lambda t: None)
    assert nothing


def test_one_hot_coefficients_are_the_snapshot() -> None:
    space = _Coefficients(4, "one", "any")
    assert space.coefficients(space.point([0.0, 0.0, 0.0, 1.0])) == [0.0, 0.0, 0.0, 1.0]
    assert sum(space.coefficients([0.123456789, 0.2, 0.3])) == pytest.approx(1.0, abs=1e-12)
    positive = _Coefficients(7, "one", "positive")
    rng = np.random.default_rng(1)
    for _ in range(500):
        alpha = positive.coefficients(rng.normal(0, 0.5, 6))
        assert min(alpha) >= 0
        assert sum(alpha) == pytest.approx(1.0, abs=1e-9)


def test_the_search_leaves_the_users_random_numbers_alone() -> None:
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    feed("lcsc", SweepOptions(lcsc_evaluations=20), lambda t: -sum(w * w for w in t.weights.values()))
    assert np.random.rand() == expected


def test_short_runs_and_unlogged_metrics(lora_run: Path) -> None:
    notes: list[str] = []
    generator = STAGE_FUNCTIONS["uniform"](run_of(3), SweepOptions(), [], notes)
    assert [t.name for t in next(generator)] == ["last_2_unweighted", "last_3_unweighted"]
    assert len(notes) == 4
    with pytest.raises(ArgumentError, match="fewer than every k"):
        next(STAGE_FUNCTIONS["uniform"](run_of(1), SweepOptions(k=(2,)), [], notes))
    _, good = feed("uniform", SweepOptions(k=(2, 3)), lambda t: 1.0)
    tried = feed("uniform", SweepOptions(k=(2, 3)), lambda t: 1.0)[0]
    generator = STAGE_FUNCTIONS["weights"](run_of(6), SweepOptions(by=("f1", "step")), tried, notes)
    next(generator)
    assert {t.settings["by"] for t in generator.send(good)} == {"step"}
    assert "was not logged" in notes[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ("unifrom",)}, "did you mean 'uniform'"),
        ({"stages": ()}, "at least one"),
        ({"stages": ("weights",)}, "add uniform"),
        ({"k": (0,)}, "k: expected whole numbers of at least 1"),
        ({"k": (2, 2)}, "given twice"),
        ({"penalties": (0.0,)}, "penalties: expected numbers above 0"),
        ({"lcsc_sum": "two"}, "expected one or free"),
        ({"adapter": "fused"}, "expected factors or product"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SweepOptions(**options)


# grids


def test_grids() -> None:
    assert parse_grid(["weight=0.2:0.8:0.2", "density=0.5,1"]) == {"weight": [0.2, 0.4, 0.6, 0.8], "density": [0.5, 1]}
    assert parse_grid(["run.last=2:4:1", "dialect=paper,peft"]) == {"run.last": [2, 3, 4], "dialect": ["paper", "peft"]}
    recipe = {
        "merge_method": "ties",
        "base_model": "b",
        "models": ["x", {"model": "y"}],
        "parameters": {"density": 0.1},
    }
    found = list(grid_candidates(recipe, parse_grid(["models[0].weight=0.3,0.7", "density=0.2,0.4"])))
    assert len(found) == 4
    assert found[3].recipe["models"][0] == {"model": "x", "parameters": {"weight": 0.7}}
    assert found[3].recipe["parameters"] == {"density": 0.4}
    assert recipe["models"][0] == "x"
    for bad, message in (("wieght=1", "did you mean 'weight'"), ("models[5].weight=1", "counted from 0"),
                         ("run.last=2", "has no run"),
                         ("models[0].wait=1", "did you mean 'weight'")):  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            list(grid_candidates(recipe, parse_grid([bad])))
    for bad in ("weight", "weight=", "weight=1:0:1", "weight=0:1:0", "weight=0:1:x", "weight=0:1:1e-9"):
        with pytest.raises(ArgumentError, match="grid"):
            parse_grid([bad])


@pytest.mark.parametrize(("models", "parts", "points"), [(2, 10, 11), (3, 4, 15), (3, 10, 66), (4, 5, 56)])
def test_a_simplex_shares_one_among_the_models(models: int, parts: int, points: int) -> None:
    recipe = {"merge_method": "linear", "models": [f"m{i}" for i in range(models)]}
    found = list(grid_candidates(recipe, parse_grid([f"models.weight=simplex:{parts}"])))
    weights = [tuple(m["parameters"]["weight"] for m in c.recipe["models"]) for c in found]
    assert len(set(weights)) == len(weights) == points
    assert len({c.name for c in found}) == points
    assert all(abs(sum(w) - 1) < 1e-12 and min(w) >= 0 for w in weights)
    # what is written by hand
    every = itertools.product(range(parts + 1), repeat=models)
    assert set(weights) == {tuple(n / parts for n in w) for w in every if sum(w) == parts}
    assert found[0].settings == {"models.weight": weights[0]}


def test_a_simplex_that_has_no_meaning_is_refused() -> None:
    for bad, why in [("weight=simplex:3", "models.weight=simplex:3"), ("models.weight=simplex", "as simplex:10"),
                     ("models.weight=simplex:0", "simplex:PARTS"), ("models[0].weight=simplex:2", "all models")]:  # fmt: skip
        with pytest.raises(ArgumentError, match=re.escape(why)):
            parse_grid([bad])
    for recipe, why in [
        ({"models": ["a"]}, "the recipe lists 1"),
        ({"models": list("abcdefgh")}, "combinations are more"),
    ]:
        with pytest.raises(ArgumentError, match=why):
            list(grid_candidates({"merge_method": "linear", **recipe}, parse_grid(["models.weight=simplex:100"])))
    with pytest.raises(ArgumentError, match="did you mean 'weight'"):
        list(grid_candidates({"merge_method": "linear", "models": ["a", "b"]}, parse_grid(["models.wait=simplex:2"])))


def test_a_grid_over_a_recipe_of_full_models(family32: Path, tmp_path: Path) -> None:
    suite = distance_suite(tmp_path)
    (tmp_path / "r.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {family32}/base\n"
        f"models: [{{model: {family32}/a}}, {{model: {family32}/b}}]\n"
        "parameters: {weight: 1.0}\n"
    )
    done = cli(
        "sweep", "out", "--recipe", "r.yml", "--grid", "weight=0.2:0.8:0.2", "--suite", suite, "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [c["name"] for c in found["candidates"]] == ["weight-0.2", "weight-0.4", "weight-0.6", "weight-0.8"]
    assert found["winner"] == "weight-0.2"  # the nearest to nothing
    lineage = json.loads((tmp_path / "out/best/stockpot.json").read_text())
    assert "weight: 0.2" in lineage["recipe"]["text"]
    for bad, message in (
        (["out"], "RUN and OUT"),
        (["a", "b", "--recipe", "r.yml"], "OUT alone"),
        (["a", "b", "--grid", "x=1"], "goes with --recipe"),
    ):
        wrong = cli("sweep", *bad, "--suite", suite, cwd=tmp_path)
        assert wrong.returncode == 2
        assert message in wrong.stderr


def test_references_of_a_swept_recipe_are_relative_to_it(family32: Path, tmp_path: Path) -> None:
    """Wherever a recipe may name a model: what the workers get does not depend on where it lies."""
    import shutil

    from stockpot.api.searching import _plain_recipe

    deep = tmp_path / "deep"
    deep.mkdir()
    for name in ("base", "a", "b"):
        shutil.copytree(family32 / name, deep / name)
    sliced = """merge_method: task_arithmetic
slices:
  - sources: [{model: a, layer_range: [0, 4]}, {model: {model: {path: b}}, layer_range: [0, 4]}]
    base_model: base
tokenizer_source: a
parameters: {weight: 1.0}
"""
    (deep / "r.yml").write_text(sliced)
    found = _plain_recipe(deep / "r.yml")
    assert found["slices"][0]["base_model"] == str(deep / "base")
    assert found["slices"][0]["sources"][1]["model"] == {"model": {"path": str(deep / "b")}}
    assert found["tokenizer_source"] == str(deep / "a")
    assert stockpot.plan(found).identity == stockpot.plan(found | {"tokenizer_source": str(deep / "a")}).identity
    arguments = ["--recipe", "deep/r.yml", "--grid", "lambda=0.2,0.4", "--suite", distance_suite(tmp_path), "--json"]
    done = cli("sweep", "out", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["winner"] == "lambda-0.2"
    others = {
        "&m is no reference": "merge_method: linear\nmodels: [&m a, b, *m]\n",
        "base and adapter": "merge_method: linear\nmodels: [{model: base+a}]\n",
        "companions": "merge_method: fisher\nmodels: [{model: a, companions: {fisher: b}}]\n",
        "a run": "merge_method: linear\nrun: {path: a, metrics: b/config.json}\n",
        "an adapter's base": "merge_method: linear\nmodels: [a]\nadapter: {mode: fused, base: base}\n",
    }
    from stockpot.planning.inputs import located

    for text in others.values():
        (deep / "o.yml").write_text(text)
        plain = json.dumps(located(stockpot.load_recipe(deep / "o.yml")))
        for name in ("base", "a", "b/config.json" if "run" in text else "b"):
            if f" {name}" in text or f"[{name}" in text or f"+{name}" in text:
                assert f"{deep}/{name}" in plain, text


def test_python(done: tuple[Path, Path, Any], lora_run: Path, tmp_path: Path) -> None:
    """As the documentation shows it; winners alone are published."""
    found = stockpot.sweep(lora_run, tmp_path / "out", distance_suite(tmp_path), SMALL)
    assert found.best == str(tmp_path / "out/best")
    assert stockpot.verify(found.best)["soup"]["name"] == found.result.winner
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names <= {
        "best",
        "charts",
        "leaderboard.csv",
        "report.html",
        "sweep.sqlite",
        "sweep.sqlite-wal",
        "sweep.sqlite-shm",
    }
    rows = (tmp_path / "out/leaderboard.csv").read_text().splitlines()
    assert len(rows) == 1 + len(found.result.rows)
    with pytest.raises(ArgumentError, match="one of the two"):
        stockpot.sweep(None, tmp_path / "x", distance_suite(tmp_path))
