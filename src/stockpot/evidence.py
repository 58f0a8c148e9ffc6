"""Measuring merges, from Python and for the command line: evaluate, sweep, gate, path, report."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stockpot.api import Options, merge_planned, plan, plan_soup
from stockpot.errors import ArgumentError, CheckpointError, GateError, OutputError, SuiteError, VerificationError
from stockpot.evaluation.gates import BEST_PARENT, Verdict, judge, needed_references
from stockpot.evaluation.parts import open_parts
from stockpot.evaluation.pool import Pool, Task, score_all
from stockpot.evaluation.scores import Scores
from stockpot.evaluation.statistics import Interval, bootstrap_score, suite_score
from stockpot.evaluation.suite import SPLITS, Suite, load_suite, parse_suite
from stockpot.lineage import NAME, read_lineage, record_verdict
from stockpot.recipes.parsing import load_recipe
from stockpot.runs import Run, open_run
from stockpot.search import PathResult, SweepOptions, SweepResult, interpolation_path
from stockpot.search.path import path_from_dict
from stockpot.search.sweep import Shown, SweepJob, read_sweep, run_sweep

if TYPE_CHECKING:
    from stockpot.reports.charts import Chart

__all__ = ["Evaluation", "Sweep", "evaluate", "gate", "path", "release_check", "report", "sweep"]

SuiteLike = str | os.PathLike[str] | Suite
BEST, PAGE, CHARTS, LEADERBOARD, PATH = "best", "report.html", "charts", "leaderboard.csv", "path.json"
ScoringShown = Callable[[str, str, int, int], None]


def opened_suite(suite: SuiteLike, *, base: str | None = None, device: str | None = None) -> Suite:
    """A suite with what the command line said in place of its own."""
    found = suite if isinstance(suite, Suite) else load_suite(suite)
    if base is not None:
        found = replace(found, base=os.path.abspath(base) if os.path.exists(base) else base)
    return replace(found, device=device) if device is not None else found


# evaluate


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint. `score` is the suite's, None where a slice that counts has no data in these splits."""

    checkpoint: str
    suite: Suite
    scores: Mapping[tuple[str, str], Scores]
    score: Interval | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "suite": self.suite.name,
            "score": None
            if self.score is None
            else {"value": self.score.value, "low": self.score.low, "high": self.score.high},
            "direction": self.suite.direction,
            "slices": [
                {"name": name, "split": split, "metrics": dict(s), "examples": s.n, "seconds": round(s.seconds, 3)}
                for (name, split), s in self.scores.items()
            ],
        }


def evaluate(
    checkpoint: str | os.PathLike[str], suite: SuiteLike, *, split: str | None = None, base: str | None = None,
    device: str | None = None, shown: ScoringShown | None = None,
) -> Evaluation:  # fmt: skip
    """Score a checkpoint: a model, or an adapter on its base.

    split  "selection", "report" or "all"; None: report where the suite has report data, else selection
    base   the model that an adapter is loaded onto, in place of the suite's or the one that its config names

    Raises StockpotError: SuiteError for the suite and its data, EvaluationError for what scoring came to.
    """
    if split not in (None, "all", *SPLITS):
        raise ArgumentError(f"split: expected selection, report or all, got {split!r}")
    opened = opened_suite(suite, base=base, device=device)
    open_parts(opened, light=True)
    ref = os.fspath(checkpoint)
    with Pool(opened) as pool:
        there = {i.split for i in pool.infos}
        wanted = list(SPLITS) if split == "all" else [split or ("report" if "report" in there else "selection")]
        if not there & set(wanted):
            raise SuiteError(f"{opened.path}: no slice has data of split {wanted[0]}")
        found = score_all(pool, [Task(ref, _as_it_is(ref))], wanted, shown)[ref]
    score = None
    if len(wanted) == 1:
        by_slice = {name: s for (name, _), s in found.items()}
        score = bootstrap_score(opened, by_slice) if suite_score(opened, by_slice) is not None else None
    return Evaluation(ref, opened, found, score)


def _as_it_is(ref: str) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": os.path.abspath(ref) if os.path.exists(ref) else ref}]}


# gates


def gate(
    out: str | os.PathLike[str], suite: SuiteLike, *, base: str | None = None, device: str | None = None, force: bool = False,
    shown: ScoringShown | None = None,
) -> Verdict:  # fmt: skip
    """Decide the suite's gates for a checkpoint, and write the verdict into its lineage and model card where it has them.

    Raises GateError where a critical gate is not passed, unless `force`; the verdict is written either way.
    """
    opened = opened_suite(suite, base=base, device=device)
    verdict = _verdict(os.fspath(out), opened, base, shown, force=force)
    if os.path.isfile(os.path.join(out, NAME)):
        record_verdict(os.fspath(out), verdict.to_dict())
    check_verdict(verdict, os.fspath(out), force=force)
    return verdict


def release_check(
    suite: SuiteLike, *, base: str | None = None, device: str | None = None, force: bool = False,
    shown: ScoringShown | None = None,
    told: Callable[[Verdict], None] | None = None,
) -> Callable[[str], None]:  # fmt: skip
    """What merge_planned calls with the finished directory before it publishes it: raises GateError to keep it from that."""
    opened = opened_suite(suite, base=base, device=device)
    if not opened.gates:
        raise SuiteError(f"{opened.path}: has no gates to decide a release by")
    open_parts(opened, light=True)

    def check(partial: str) -> None:
        verdict = _verdict(partial, opened, base, shown, force=force)
        record_verdict(partial, verdict.to_dict())
        if told is not None:
            told(verdict)
        check_verdict(verdict, partial, force=force)

    return check


def check_verdict(verdict: Verdict, what: str, *, force: bool) -> None:
    """Raise GateError where a critical gate is not passed."""
    if verdict.passed or force:
        return
    lines = "\n".join(f"  - slice {o.gate.slice!r}: {o.status}: {o.gate.describe()}: {o.why}" for o in verdict.failing)
    many = "s" if len(verdict.failing) > 1 else ""
    raise GateError(f"{what}: {len(verdict.failing)} critical gate{many} not passed:\n{lines}\n"
                    "--force publishes it all the same, and says so in its lineage")  # fmt: skip


def _verdict(out: str, suite: Suite, base: str | None, shown: ScoringShown | None, *, force: bool) -> Verdict:
    """Score the checkpoint and everything that its gates compare it with."""
    if not suite.gates:
        raise SuiteError(f"{suite.path}: has no gates")
    tasks = [Task(out, _as_it_is(out))]
    names: dict[str, list[str]] = {}
    for reference in needed_references(suite):
        found = _reference_tasks(reference, out, suite, base)
        names[reference] = [t.name for t in found]
        tasks += [t for t in found if t.name not in {u.name for u in tasks}]
    with Pool(suite) as pool:
        scored = score_all(pool, tasks, _gate_splits(suite, [(i.slice, i.split) for i in pool.infos]), shown)
    by_name = {name: _preferred(parts) for name, parts in scored.items()}
    references = {reference: [by_name[n] for n in found] for reference, found in names.items()}
    verdict = judge(suite, by_name[out], references)
    return replace(verdict, forced=force)


def _gate_splits(suite: Suite, there: Sequence[tuple[str, str]]) -> list[str]:
    """Report data, and selection data where a slice has nothing else."""
    only = {name for name, split in there if split == "selection"} - {
        name for name, split in there if split == "report"
    }
    return ["report", *(["selection"] if only else [])]


def _preferred(parts: Mapping[tuple[str, str], Scores]) -> dict[str, Scores]:
    out: dict[str, Scores] = {}
    for (name, split), scores in parts.items():
        if name not in out or split == "report":
            out[name] = scores
    return out


def _reference_tasks(reference: str, out: str, suite: Suite, base: str | None) -> list[Task]:
    """What a gate's reference stands for. Raises SuiteError where that is not known."""
    if reference == "base":
        return [_base_task(out, suite, base)]
    if reference == BEST_PARENT:
        parents = _parents(out)
        if not parents:
            raise SuiteError(
                f"{out}: its lineage names no parents for reference: best_parent; name a checkpoint instead"
            )
        return [Task(p, _as_it_is(p)) for p in parents]
    place = suite.locate(reference)
    ref = place if os.path.exists(place) else reference
    return [Task(ref, _as_it_is(ref))]


def _lineage_of(out: str) -> dict[str, Any]:
    try:
        return read_lineage(out)[0]
    except (VerificationError, CheckpointError):
        return {}


def _parents(out: str) -> list[str]:
    """The checkpoints on disk that a merge was made from; the base is none of them."""
    paths = []
    for entry in _lineage_of(out).get("inputs", ()):
        paths += [str(p.get("path")) for p in entry.get("parts", ())] or [str(entry.get("path"))]
    own = _own_base(out)
    return [
        p
        for p in dict.fromkeys(paths)
        if os.path.exists(p) and (own is None or os.path.realpath(p) != os.path.realpath(own))
    ]


def _own_base(out: str) -> str | None:
    """The base_model of the recipe that `out` was made by, where it can be found."""
    text = _lineage_of(out).get("recipe", {})
    try:
        named = load_recipe(str(text.get("text", "")) + "\n").base_model
    except Exception:
        return None
    if named is None:
        return None
    beside = os.path.join(os.path.dirname(str(text.get("file", ""))), named)
    return next((p for p in (named, beside) if os.path.exists(p)), None)


def _base_task(out: str, suite: Suite, base: str | None) -> Task:
    if os.path.exists(os.path.join(out, "adapter_config.json")):
        return Task("base", _as_it_is(out), bare=True)
    given = base or (suite.locate(suite.base) if suite.base else None) or _own_base(out)
    if given is None:
        raise SuiteError(f"{out}: reference: base: which model that is isn't known: give --base, or base in the suite")
    return Task(given, _as_it_is(given))


# sweep


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: what it found, the directory of the published winner (None: not published), the report's path."""

    result: SweepResult
    best: str | None
    page: str | None
    verdict: Verdict | None = None
    files: tuple[str, ...] = field(default=(), repr=False)


def sweep(
    run: Run | str | os.PathLike[str] | None, out: str | os.PathLike[str], suite: SuiteLike,
    options: SweepOptions | None = None, *,
    recipe: Any = None, grid: Mapping[str, Sequence[Any]] | None = None, base: str | None = None, device: str | None = None,
    jobs: int = 1, publish: bool = True, force: bool = False, retry_failed: bool = False, shown: Shown | None = None,
) -> Sweep:  # fmt: skip
    """Search merges of a run's snapshots, or a grid over a recipe, and publish the best as OUT/best with a report.

    out      holds sweep.sqlite (what was scored: a sweep that was stopped goes on), best/, report.html, charts/, leaderboard.csv
    recipe   in place of a run: a recipe (as for merge), with `grid`: values by key (search.parse_grid)
    jobs     candidates scored at once, each by a process with its own model
    publish  merge the winner into OUT/best; where the suite has gates, only if they pass or with `force`

    Raises StockpotError; GateError after the report was written.
    """
    opened = opened_suite(suite, base=base, device=device)
    folder = os.fspath(out)
    found = None if run is None else run if isinstance(run, Run) else open_run(run)
    if (found is None) == (recipe is None):
        raise ArgumentError("give a run, or a recipe with a grid: one of the two")
    plain = None if recipe is None else _plain_recipe(recipe)
    job = SweepJob(
        opened, folder, found, options or SweepOptions(), plain, grid or {}, base,
        jobs=jobs, retry_failed=retry_failed,
    )  # fmt: skip
    result = run_sweep(job, shown)
    verdict: list[Verdict] = []
    best: str | None = None
    refused: GateError | None = None
    if publish and result.winner is not None:
        try:
            best = _publish_winner(result, folder, opened, base, device, force, verdict.append)
        except GateError as e:
            refused = e
    page, files = write_report(folder, result, gates=verdict[0].to_dict() if verdict else None)
    if refused is not None:
        raise refused
    return Sweep(result, best, page, verdict[0] if verdict else None, files)


def _plain_recipe(recipe: Any) -> dict[str, Any]:
    """A recipe as a mapping whose paths no longer depend on where its file lies."""
    import yaml

    parsed = load_recipe(recipe)
    if parsed.steps:
        raise ArgumentError("recipe: several steps can't be swept; merge the earlier ones first")
    plan(parsed)  # every mistake in it, before the grid
    found = yaml.safe_load(parsed.text)
    beside = os.path.dirname(os.path.abspath(parsed.origin)) if os.path.isfile(parsed.origin) else None

    def fixed(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: fixed(v) for k, v in value.items()}
        if isinstance(value, list):
            return [fixed(v) for v in value]
        if isinstance(value, str) and not os.path.isabs(value):
            for start in (os.getcwd(), beside):
                if (
                    start is not None
                    and os.sep in os.path.join(value, "")
                    and os.path.exists(os.path.join(start, value))
                ):
                    return os.path.realpath(os.path.join(start, value))
        return value

    places = {
        "model",
        "base_model",
        "path",
        "models",
        "slices",
        "sources",
        "run",
        "metrics",
        "adapter",
        "base",
        "tokenizer_source",
    }
    return {k: fixed(v) if k in places else v for k, v in found.items()}


def _publish_winner(
    result: SweepResult,
    folder: str,
    suite: Suite,
    base: str | None,
    device: str | None,
    force: bool,
    told: Callable[[Verdict], None],
) -> str:
    """Merge the winner into OUT/best, unless it is there."""
    target = os.path.join(folder, BEST)
    assert result.winner is not None
    recipe = dict(result.row(result.winner).tried.recipe)
    planned = plan_soup(recipe, Options())
    known = _lineage_of(target) if os.path.isdir(target) else {}
    if known.get("recipe", {}).get("sha256") == planned.recipe.digest and not suite.gates:
        return target
    check = release_check(suite, base=base, force=force, told=told) if suite.gates else None
    merge_planned(planned, target, Options(), overwrite=True, release=check)
    return target


# path


def path(
    a: str | os.PathLike[str], b: str | os.PathLike[str], suite: SuiteLike, *, base: str | None = None, points: int = 11,
    out: str | os.PathLike[str] | None = None, device: str | None = None, shown: ScoringShown | None = None,
) -> PathResult:  # fmt: skip
    """Score the straight line from A to B: whether merging them can work (linear mode connectivity).

    base  for full models a reference that is scored beside; for adapters the model they are loaded onto
    out   a directory for path.json, path.csv, path.png and path.html; that of a sweep takes the path into its report
    """
    from stockpot.checkpoints.opening import open_checkpoint

    first = os.fspath(a)
    adapter = open_checkpoint(first).kind == "adapter"
    opened = opened_suite(suite, base=base if adapter else None, device=device)
    open_parts(opened, light=True)
    found = interpolation_path(
        _full(first), _full(os.fspath(b)), opened, base=None if adapter else base, points=points, shown=shown
    )
    if out is not None:
        _write_path(os.fspath(out), found)
    return found


def _full(ref: str) -> str:
    return os.path.abspath(ref) if os.path.exists(ref) else ref


def _write_path(out: str, found: PathResult) -> None:
    from stockpot.reports.charts import path_chart
    from stockpot.reports.page import path_page
    from stockpot.reports.table import path_csv
    from stockpot.search.store import NAME as STORE

    chart = path_chart(found)
    with _writing(out):
        os.makedirs(out, exist_ok=True)
        _write(os.path.join(out, PATH), json.dumps(found.to_dict(), indent=1))
        _write(os.path.join(out, "path.csv"), path_csv(found))
        _write(os.path.join(out, "path.png"), chart.png)
        if not os.path.exists(os.path.join(out, STORE)):
            _write(os.path.join(out, "path.html"), path_page(found))
    if os.path.exists(os.path.join(out, STORE)):
        report(out)


# report


def report(out: str | os.PathLike[str]) -> str:
    """Write the report of a sweep again, from what it stored. Returns the page's path."""
    from stockpot.search.store import NAME as STORE
    from stockpot.search.store import Store

    folder = os.fspath(out)
    if not os.path.isfile(os.path.join(folder, STORE)):
        raise ArgumentError(f"{folder}: no sweep here ({STORE} is missing)")
    store = Store(folder)
    try:
        kept, place = store.meta("suite"), store.meta("run")
    finally:
        store.close()
    suite = parse_suite(kept["text"], kept["path"])
    run = None
    if place is not None:
        with contextlib.suppress(CheckpointError):  # the run may be gone: only its curves are missed
            run = open_run(place[0], snapshots=place[1], metrics=place[2])
    result = read_sweep(folder, suite, run)
    gates = _lineage_of(os.path.join(folder, BEST)).get("gates")
    return write_report(folder, result, gates=gates)[0]


def write_report(
    folder: str, result: SweepResult, *, gates: Mapping[str, Any] | None = None
) -> tuple[str, tuple[str, ...]]:
    """The page, the charts as PNG and the leaderboard as CSV. (the page's path, every file)."""
    from stockpot.reports.charts import sweep_charts
    from stockpot.reports.page import sweep_page
    from stockpot.reports.table import leaderboard_csv

    along = None
    if os.path.isfile(os.path.join(folder, PATH)):
        with open(os.path.join(folder, PATH), encoding="utf-8") as f, contextlib.suppress(ValueError, KeyError):
            along = path_from_dict(json.load(f), result.suite)
    charts: list[Chart] = sweep_charts(result, along)
    lineage = _lineage_of(os.path.join(folder, BEST)) if os.path.isdir(os.path.join(folder, BEST)) else None
    page = os.path.join(folder, PAGE)
    files = [page, os.path.join(folder, LEADERBOARD)]
    with _writing(folder):
        _write(files[1], leaderboard_csv(result))
        os.makedirs(os.path.join(folder, CHARTS), exist_ok=True)
        for chart in charts:
            files.append(os.path.join(folder, CHARTS, f"{chart.name}.png"))
            _write(files[-1], chart.png)
        _write(page, sweep_page(result, path=along, lineage=lineage, gates=gates, charts=charts))
    return page, tuple(files)


@contextlib.contextmanager
def _writing(folder: str) -> Any:
    try:
        yield
    except OSError as e:
        raise OutputError(f"{folder}: the report can't be written: {e.strerror or e}; what was scored is kept") from e


def _write(path: str, content: str | bytes) -> None:
    """Whole or not at all."""
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with open(path + ".tmp", "wb") as f:
        f.write(data)
    os.replace(path + ".tmp", path)
