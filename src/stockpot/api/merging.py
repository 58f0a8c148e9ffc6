"""Planning and running a merge: plan, merge, and what the command line does before and after."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.errors import ArgumentError, CheckpointError, MismatchError, RecipeError, StockpotError
from stockpot.files import is_url, read_json, without_file_scheme
from stockpot.methods.code import load_method_file, names_file
from stockpot.methods.declaration import Scope
from stockpot.planning.plan import Plan
from stockpot.planning.planner import DEFAULT_SHARD_SIZE, build_plan
from stockpot.planning.steps import steps_in
from stockpot.recipes.parsing import load_recipe
from stockpot.recipes.schema import Recipe
from stockpot.runs import Run
from stockpot.specs import format_size, parse_size

if TYPE_CHECKING:
    from stockpot.engine.run import Outcome, Progress

__all__ = ["MergeResult", "Options", "RecipeLike", "check_target", "check_threads", "merge", "merge_planned", "plan"]

RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe


def check_threads(threads: int) -> int:
    """A number of threads that makes sense. Raises ArgumentError."""
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ArgumentError(f"threads: expected a whole number of at least 1, got {threads!r}")
    return threads


@dataclass(frozen=True)
class Options:
    """How to run a merge; none of it changes the output's bytes but `seed` and `shard_size`.

    device      of methods on whole matrices: "cpu", "cuda", "cuda:N", "auto" (a GPU where there is one), or "torch" (torch on
                the CPU). Elementwise methods and their statistics run on the CPU, where they are faster
    threads     worker threads; None: as many as processors
    max_memory  bytes (or "2GiB") of memory for the merge, over what the interpreter takes; None: 512 MiB
    shard_size  bytes of tensor data in a file, at most
    seed        of random masks
    allow_nonfinite  publish although an input or the output holds NaN or infinities
    allow_code  run the files that a recipe's `merge_method: FILE.py:FUNCTION` names
    """

    device: str = "cpu"
    threads: int | None = None
    max_memory: int | str | None = None
    shard_size: int | str = DEFAULT_SHARD_SIZE
    seed: int = 0
    allow_nonfinite: bool = False
    allow_code: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None:
            check_threads(self.threads)
        if not isinstance(self.device, str):
            raise ArgumentError(f"device: expected auto, cpu, cuda, cuda:N or torch, got {self.device!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ArgumentError(f"seed: expected a whole number, got {self.seed!r}")


@dataclass(frozen=True)
class MergeResult:
    """Where the output lies and what it took. `lineage` is the content of stockpot.json."""

    path: str
    lineage: Mapping[str, Any] = field(repr=False)
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def soup(self) -> Mapping[str, Any] | None:
        """Name, snapshots and weights, where a run was merged."""
        return self.lineage.get("soup")

    @property
    def adapter(self) -> Mapping[str, Any] | None:
        """How adapters were averaged, and the relative error against the exact average of their products."""
        return self.lineage.get("adapter")


def plan(
    recipe: RecipeLike,
    options: Options | None = None,
    *,
    sources: Mapping[str, Checkpoint] | None = None,
    run: Run | None = None,
) -> Plan:
    """Resolve a recipe against the headers of its models; reads no tensor data and writes nothing.

    recipe   a path, YAML text (with a line break), a mapping, or a Recipe
    sources  opened checkpoints, views of them above all (stockpot.views), by the names that the recipe has for them
    run      that of its `run:`, where it is open already

    Raises StockpotError with every problem found.
    """
    chosen = options or Options()
    asked, notes = with_code(load_recipe(recipe), allowed=chosen.allow_code)
    planned = build_plan(
        asked,
        shard_size=parse_size(chosen.shard_size),
        max_memory=None if chosen.max_memory is None else parse_size(chosen.max_memory),
        threads=chosen.threads,
        seed=chosen.seed,
        sources=sources,
        run=run,
    )
    return replace(planned, notes=(*planned.notes, *notes)) if notes else planned


def with_code(recipe: Recipe, *, allowed: bool) -> tuple[Recipe, list[str]]:
    """(the recipe with the methods of its files loaded, notes of them). Raises RecipeError where code is not allowed."""
    folder = os.path.dirname(os.path.abspath(recipe.origin)) if os.path.isfile(recipe.origin) else os.getcwd()
    notes: list[str] = []

    def loaded(name: str, line: int) -> str:
        if not names_file(name):
            return name
        try:
            if not allowed:
                raise RecipeError(
                    f"merge_method {name!r} is code in a file, which is run only with --allow-code (Options(allow_code=True)): "
                    "use it for files whose author you trust"
                )
            method, note = load_method_file(name, folder)
        except StockpotError as e:
            raise e.within(recipe.at(line)) from e.__cause__
        notes.append(note)
        return method.name

    main = loaded(recipe.merge_method, recipe.lines.get("merge_method", 1))
    rules = tuple(
        replace(r, merge_method=loaded(r.merge_method, r.line)) if r.merge_method else r for r in recipe.rules
    )
    steps = []
    for step in recipe.steps:
        made, more = with_code(step, allowed=allowed)
        steps.append(made)
        notes += more
    return replace(recipe, merge_method=main, rules=rules, steps=tuple(steps)), notes


def merge(
    recipe: RecipeLike,
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
    sources: Mapping[str, Checkpoint] | None = None,
) -> MergeResult:
    """Merge into the directory `out`, which appears complete or not at all. sources: see plan.

    A merge that was killed goes on when called again (`resume`). progress(bytes done, bytes in all) is called from this
    thread about every 0.1 s. Raises StockpotError; nothing is then left at `out`.
    """
    chosen = options or Options()
    planned = plan(recipe, chosen, sources=sources)
    return merge_planned(planned, out, chosen, overwrite=overwrite, resume=resume, progress=progress, sources=sources)


def fetched(planned: Plan, options: Options, sources: Mapping[str, Checkpoint] | None = None) -> Plan:
    """The plan over local files: models of the Hub that are not in its cache are downloaded first. Raises CheckpointError."""
    from stockpot.checkpoints.hub import fetch_missing

    if not fetch_missing(m.checkpoint for m in planned.inputs):
        return planned
    return plan(planned.recipe, options, sources=sources)


def merge_planned(
    planned: Plan,
    out: str | os.PathLike[str],
    options: Options,
    *,
    overwrite: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
    release: Callable[[str], None] | None = None,
    sources: Mapping[str, Checkpoint] | None = None,
) -> MergeResult:
    """Run a plan that was made already; see merge.

    release  called with the finished directory before it is published: what it raises keeps it from that, and the work is kept
    """
    from stockpot.engine.devices import open_device
    from stockpot.engine.outdir import LINEAGE, remove_scratch, scratch_path
    from stockpot.engine.publish import publish
    from stockpot.engine.run import run_plan
    from stockpot.engine.steps import prepare_steps
    from stockpot.lineage import check_side_files, write_side_files

    if isinstance(out, str):
        out = without_file_scheme(out)
    url = out if isinstance(out, str) and is_url(out) else None
    if url is None and resume:
        published = finished(planned, os.fspath(out), gated=release is not None)
        if published is not None:
            return published
    target = check_target(planned, out, overwrite=overwrite, also=getattr(release, "files", ()))
    device = open_device(options.device)
    notes = [*planned.notes, *device_notes(planned, options.device)]
    planned = fetched(planned, options, sources)
    check_side_files(planned)
    with contextlib.ExitStack() as held:
        for model in planned.inputs:
            held.callback(model.checkpoint.close)
        steps = prepare_steps(planned, target, device, resume=resume, progress=progress)
        for step in steps:
            held.callback(step.release)
        outcome = run_plan(planned, target, device, resume=resume, progress=progress)
        held.callback(outcome.release)
        for step in steps:
            for path, digests in step.part_digests.items():
                outcome.part_digests[path] = {**digests, **outcome.part_digests.get(path, {})}
        if not options.allow_nonfinite:
            check_finite(planned, outcome)
        facts = options.__dict__ | {"budget": planned.budget.__dict__}
        lineage = write_side_files(planned, outcome, facts, adapter=adapter_report(planned))
        if release is not None:
            release(outcome.partial)
            lineage = read_json(os.path.join(outcome.partial, LINEAGE))  # with the verdict in it
        if url is not None:
            from stockpot.engine.upload import upload

            assert outcome.journal is not None
            upload(outcome.partial, url, outcome.journal, overwrite=overwrite)
        if steps:  # before the output appears: who is killed in between finds nothing left beside it
            remove_scratch(scratch_path(target))
        if url is None:
            assert outcome.journal is not None
            kept = publish(outcome.partial, target, outcome.journal, overwrite=overwrite)
            if kept is not None:
                notes.append(f"what was in {target} could not be removed whole, and lies in {kept}")
    return MergeResult(
        url or os.path.abspath(target),
        lineage,
        outcome.seconds,
        outcome.bytes_read,
        outcome.bytes_written,
        tuple(outcome.warnings),
        tuple(notes),
    )


def device_notes(planned: Plan, device: str) -> list[str]:
    """What a user who named a device should know: that nothing here is for it."""
    steps = [found.step for m in planned.inputs for found in steps_in(m.checkpoint)]
    if device in ("cpu", "auto") or any(g.method.scope is Scope.TENSOR for p in (planned, *steps) for g in p.groups):
        return []
    return [f"--device {device}: nothing here is for it; elementwise merging stays on the CPU, where it is faster"]


def check_finite(planned: Plan, outcome: Outcome) -> None:
    """Raise NonfiniteError where an input or the output holds what is no number."""
    from stockpot.engine.measures import nonfinite_report
    from stockpot.errors import NonfiniteError

    lines = nonfinite_report(outcome.sizes, planned)
    if lines:
        listed = "\n".join(f"  - {line}" for line in lines)
        raise NonfiniteError(
            f"not everything is a number, so nothing is published:\n{listed}\n"
            f"the work is kept in {outcome.partial}: the same command with --allow-nonfinite (Options.allow_nonfinite) "
            "publishes it all the same"
        )


def finished(planned: Plan, out: str, *, gated: bool = False) -> MergeResult | None:
    """What is in OUT, where this very merge was published there and killed before it had tidied up; it is tidied up then.

    gated: whether it must have passed gates. Raises OutputError.
    """
    from stockpot.engine.outdir import LINEAGE
    from stockpot.engine.publish import tidy

    if not out or "\0" in out or tidy(out) != planned.identity:
        return None
    lineage = read_json(os.path.join(out, LINEAGE))
    if gated and "gates" not in lineage:
        return None
    told = "published by an earlier run, which was stopped while it tidied up; that is done now"
    seconds, read, written = (lineage.get(k, 0) for k in ("seconds", "bytes_read", "bytes_written"))
    return MergeResult(os.path.abspath(out), lineage, seconds, read, written, tuple(lineage["warnings"]), (told,))


def check_target(planned: Plan, out: str | os.PathLike[str], *, overwrite: bool, also: Iterable[str] = ()) -> str:
    """Where the merge is made, if it can go to OUT: free, writable, nothing that is read, large enough. For a URL that is a
    directory here. also: files that are read besides the models and the recipe. Raises ArgumentError, OutputError.
    """
    from stockpot.engine.outdir import check_out
    from stockpot.engine.steps import written_steps

    target = os.fspath(out)
    if not isinstance(target, str) or not target or "\0" in target:
        raise ArgumentError(f"out: expected the path of a directory, got {target!r}")
    parts = [part.path for m in planned.inputs for part in m.checkpoint.parts]
    files = [
        h.path for m in planned.inputs for h in m.checkpoint.files
    ]  # OUT may lie within an input, but not hold its files
    recipe = [planned.recipe.origin] if os.path.isfile(planned.recipe.origin) else []
    inputs = [*(m.checkpoint.path for m in planned.inputs), *parts, *files, *recipe, *also]
    if is_url(target):
        from stockpot.engine.upload import check_url, scratch_for

        check_url(target, overwrite=overwrite, inputs=inputs)
        target = scratch_for(target)
        overwrite = True
    check_out(target, overwrite=overwrite, inputs=inputs, steps=written_steps(planned))
    check_space(planned, target)
    return target


def adapter_report(planned: Plan) -> dict[str, Any] | None:
    """The relative error of averaging adapters, where it is known how to measure it."""
    from stockpot.adapters import FactoredAdapter, product_report

    for model in planned.inputs:
        if isinstance(model.checkpoint, FactoredAdapter):
            return product_report(model.checkpoint)
    try:
        return _factors_report(planned)
    except (CheckpointError, MismatchError):
        return None  # kinds of adapters whose products are not known; their factors are averaged all the same


def _factors_report(planned: Plan) -> dict[str, Any] | None:
    from stockpot.adapters import factors_report, read_adapter

    first = planned.inputs[0].checkpoint
    if planned.soup is None or planned.template.kind != "adapter" or not all(g.method.average for g in planned.groups):
        return None
    if first.config.get("peft_type") != "LORA" or first.config.get("target_parameters"):
        return None
    by_path = {m.checkpoint.path: m.checkpoint for m in planned.inputs}
    adapters = [read_adapter(by_path[os.path.realpath(i.snapshot.path)]) for i in planned.soup.ingredients]
    if any(a.is_dora for a in adapters):
        return None
    weights = [i.weight for i in planned.soup.ingredients]
    total = sum(weights)
    workers = planned.budget.workers
    return factors_report(adapters, [w / total for w in weights] if total else weights, threads=workers)


def check_space(planned: Plan, out: str) -> None:
    """Refuse when the disk has less room than the output needs."""
    from stockpot.engine.outdir import partial_path
    from stockpot.errors import OutputError

    partial = partial_path(out)
    held = 0
    if os.path.isdir(partial):
        held = sum(e.stat(follow_symlinks=False).st_blocks * 512 for e in os.scandir(partial))
    folder = os.path.dirname(partial)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free + held
    if free < planned.bytes_out:
        raise OutputError(
            f"{out}: the output needs {format_size(planned.bytes_out)}, {folder} has {format_size(free)} free"
        )
