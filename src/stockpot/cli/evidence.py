"""`stockpot evaluate | aggregate | sweep | gate | path | report` on the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from stockpot.cli.boundary import boundary
from stockpot.cli.groups import grouped
from stockpot.cli.options import AsJson, Force, Publishing, Quiet, Shown

if TYPE_CHECKING:
    from stockpot.search import SweepOptions

__all__ = ["register", "release_of"]

SuiteFile = Annotated[str, typer.Option("--suite", metavar="FILE", help="What to score: a suite, a YAML file.")]
Base = Annotated[
    str | None, typer.Option(help="The base model, in place of the suite's or the adapter's own.", metavar="MODEL")
]
ModelDevice = Annotated[str | None, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:N.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    for command in (evaluate, aggregate, sweep, gate, path, report):
        app.command()(command)


@boundary
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A model, or an adapter (scored on its base).")],
    suite: SuiteFile,
    split: Annotated[
        str | None, typer.Option(help="selection, report or all [default: report where the suite has report data].")
    ] = None,
    base: Base = None,
    device: ModelDevice = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score CHECKPOINT on a suite."""
    from stockpot.api import measuring
    from stockpot.cli.progress import scoring_bar
    from stockpot.cli.show_evidence import show_evaluation

    with scoring_bar(enabled=not (quiet or as_json)) as shown:
        found = measuring.evaluate(checkpoint, suite, split=split, base=base, device=device, shown=shown)
    show_evaluation(found, as_json=as_json)


@boundary
def aggregate(
    scores: Annotated[str, typer.Argument(help="A CSV file: a name, then a column for each task.")],
    weights: Annotated[str, typer.Option(help="Weights of the columns: gsm8k=0.3,gsm_plus=0.7.")],
    reference: Annotated[
        list[str] | None,
        typer.Option(help="A row that the others are given in percent of; may be repeated.", metavar="NAME"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Weighted averages of a table of scores, and percentages against named rows."""
    from stockpot.cli.show_evidence import show_aggregate
    from stockpot.evaluation.aggregate import aggregate_scores, parse_weights

    show_aggregate(aggregate_scores(scores, parse_weights(weights), reference or []), as_json=as_json)


@dataclass(frozen=True)
class Protocol:
    """What is tried, in which stages."""

    stages: Annotated[
        str | None,
        typer.Option(
            help="uniform,interval,weights [default]; also schedules, comparison, greedy, lcsc; 'all' for all of them."
        ),
    ] = None
    k: Annotated[str | None, typer.Option(help="Numbers of snapshots [default: 2,3,4,5,8,10].", metavar="LIST")] = None
    intervals: Annotated[str | None, typer.Option(help="Intervals for the best k [default: 2,3].", metavar="LIST")] = (
        None
    )
    by: Annotated[str | None, typer.Option(help="Metrics to weight by [default: loss,step].", metavar="LIST")] = None
    penalties: Annotated[str | None, typer.Option(help="Penalties [default: 1.0,0.9,0.8,0.7,0.5].", metavar="LIST")] = (
        None
    )
    power: Annotated[float | None, typer.Option(help="q of the penalty.", metavar="Q")] = None
    smooth: Annotated[int, typer.Option(metavar="N", help="Mean of the last N logged values.")] = 1
    keep: Annotated[int, typer.Option(help="How many candidates go on to the next stage.")] = 2
    adapter: Annotated[str, typer.Option(help="How LoRA adapters are averaged: factors or product.")] = "factors"
    density: Annotated[float, typer.Option(help="Of TIES and DARE-TIES in comparisons.")] = 0.5
    comparison_k: Annotated[str | None, typer.Option(help="Of comparisons [default: 3,5,10].", metavar="LIST")] = None
    comparison_spaced: Annotated[
        str | None,
        typer.Option(help="More comparisons, as K:INTERVAL: 5:3 is the last 5, every third.", metavar="LIST"),
    ] = None
    lcsc_evaluations: Annotated[int, typer.Option(help="How many candidates CMA-ES may try.")] = 60
    lcsc_sum: Annotated[str, typer.Option(help="Coefficients of lcsc sum to one, or are free.")] = "one"
    lcsc_signs: Annotated[str, typer.Option(help="Coefficients of lcsc: any sign, or positive.")] = "any"
    seed: Annotated[int, typer.Option(help="Of CMA-ES.")] = 0

    def options(self) -> SweepOptions:
        """As the search takes it; lists that were not given stay its own. Raises ArgumentError."""
        from stockpot.search import SweepOptions
        from stockpot.search.options import STAGES

        lists: dict[str, Any] = {
            "k": _numbers("--k", self.k, int),
            "intervals": _numbers("--intervals", self.intervals, int),
            "penalties": _numbers("--penalties", self.penalties, float),
            "comparison_k": _numbers("--comparison-k", self.comparison_k, int),
            "comparison_spaced": _pairs(self.comparison_spaced),
            "by": _words(self.by),
            "power": self.power,
            "stages": STAGES if self.stages == "all" else _words(self.stages),
        }
        given = {k: v for k, v in asdict(self).items() if k not in lists}
        return SweepOptions(**given, **{k: v for k, v in lists.items() if v is not None})


@dataclass(frozen=True)
class Scoring:
    """With what candidates are scored, and how many at once."""

    base: Base = None
    device: ModelDevice = None
    jobs: Annotated[int, typer.Option(help="Candidates scored at once, each with a model of its own in memory.")] = 1
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Score again what failed before.")] = False


@dataclass(frozen=True)
class RunFiles:
    """Where a run's files lie."""

    snapshots: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Where snapshots lie in any other layout.")
    ] = None
    metrics: Annotated[str | None, typer.Option(metavar="FILE", help="Metrics by step, .csv or .jsonl.")] = None


@boundary
@grouped
def sweep(
    places: Annotated[
        list[str],
        typer.Argument(metavar="RUN OUT", help="A training run and the directory to create; with --recipe OUT alone."),
    ],
    suite: SuiteFile,
    protocol: Protocol,
    scoring: Scoring,
    files: RunFiles,
    shown: Shown,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE", help="Sweep a recipe's parameters in place of a run.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES",
            help="weight=0.2:0.8:0.2 or density=0.3,0.5; models[0].weight, run.penalty; models.weight=simplex:10. "
            "May be repeated.",
        ),
    ] = None,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Don't merge the winner into OUT/best.")] = False,
    force: Force = False,
) -> None:
    """Try merges of RUN's snapshots, score each on a suite, publish the best with a report.

    stockpot sweep output_dir OUT --suite suite.yml

    A sweep that was stopped goes on when the same command is given again; nothing is scored twice.
    """
    from stockpot.api.searching import Sweep
    from stockpot.api.searching import sweep as run_sweep
    from stockpot.cli.progress import sweep_bar
    from stockpot.cli.show_evidence import show_sweep
    from stockpot.errors import ArgumentError, EvaluationError, GateError
    from stockpot.runs import open_run
    from stockpot.search import parse_grid

    run, out = _places(places, recipe)
    if grid and recipe is None:
        raise ArgumentError("--grid goes with --recipe")
    options = protocol.options()
    if scoring.jobs < 1:
        raise ArgumentError(f"--jobs: expected a whole number of at least 1, got {scoring.jobs}")
    opened = None if run is None else open_run(run, **asdict(files))
    refused: GateError | None = None
    with sweep_bar(enabled=shown.talks) as bar:
        try:
            found = run_sweep(
                opened, out, suite, options, recipe=recipe, grid=parse_grid(grid or []), publish=not no_publish, force=force,
                shown=bar, **asdict(scoring),
            )  # fmt: skip
        except GateError as e:
            refused, found = e, cast(Sweep, e.found)
    show_sweep(found, as_json=shown.as_json, quiet=shown.quiet)
    if refused is not None:
        raise refused
    if found.result.winner is None:
        raise EvaluationError("no merge could be scored")


def _places(places: list[str], recipe: str | None) -> tuple[str | None, str]:
    from stockpot.errors import ArgumentError

    if recipe is not None and len(places) == 1:
        return None, places[0]
    if recipe is None and len(places) == 2:
        return places[0], places[1]
    expected = "OUT alone beside --recipe" if recipe is not None else "RUN and OUT"
    raise ArgumentError(f"expected {expected}, got {' '.join(places)}")


def _numbers(name: str, text: str | None, kind: Any) -> tuple[Any, ...] | None:
    from stockpot.errors import ArgumentError

    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ArgumentError(f"{name}: expected numbers with commas between them, got {text!r}") from None


def _pairs(text: str | None) -> tuple[tuple[Any, ...], ...] | None:
    from stockpot.errors import ArgumentError

    if text is None:
        return None
    found = tuple(_numbers("--comparison-spaced", part.replace(":", ","), int) or () for part in text.split(","))
    if any(len(pair) != 2 for pair in found):
        raise ArgumentError(f"--comparison-spaced: expected K:INTERVAL,..., got {text!r}")
    return found


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(w.strip() for w in text.split(",") if w.strip())


@boundary
def gate(
    out: Annotated[
        str, typer.Argument(help="A checkpoint; where stockpot made it, the verdict goes into its lineage.")
    ],
    suite: SuiteFile,
    base: Base = None,
    device: ModelDevice = None,
    force: Annotated[bool, typer.Option("--force", help="End with 0 although a critical gate is not passed.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Decide the release gates of a suite for OUT: exit code 5 where a critical one is not passed."""
    from stockpot.api import release
    from stockpot.cli.progress import scoring_bar
    from stockpot.cli.show_evidence import show_verdict

    with scoring_bar(enabled=not (quiet or as_json)) as shown:
        verdict = release.gate(out, suite, base=base, device=device, force=True, shown=shown)
    show_verdict(verdict, as_json=as_json, quiet=quiet)
    release.check_verdict(verdict, out, force=force, publishes=False)


@boundary
def path(
    a: Annotated[str, typer.Argument(help="One end, t = 0.")],
    b: Annotated[str, typer.Argument(help="The other end, t = 1.")],
    suite: SuiteFile,
    base: Base = None,
    points: Annotated[int, typer.Option(help="How many points, both ends among them.")] = 11,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write path.json, .csv, .png and .html there; into the report of a sweep."),
    ] = None,
    device: ModelDevice = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score the straight line from A to B: can they be merged at all?"""
    from stockpot.api import pages
    from stockpot.cli.progress import scoring_bar
    from stockpot.cli.show_evidence import show_path

    with scoring_bar(enabled=not (quiet or as_json)) as shown:
        found = pages.path(a, b, suite, base=base, points=points, out=out, device=device, shown=shown)
    show_path(found, out, as_json=as_json)


@boundary
def report(
    out: Annotated[str, typer.Argument(help="The directory of a sweep.")],
    as_json: AsJson = False,
) -> None:
    """Write the report of a sweep again, from what it stored."""
    from stockpot.api import pages
    from stockpot.cli.terminal import print_json, say

    page = pages.report(out)
    if as_json:
        print_json({"report": page})
    else:
        say(page)


def release_of(publishing: Publishing, shown: Shown) -> Any:
    """What merge_planned is to call before it publishes: None where no gates were asked for."""
    from stockpot.errors import ArgumentError

    if publishing.suite is None:
        if publishing.force:
            raise ArgumentError("--force publishes against the gates of a suite: it needs --suite")
        return None
    from stockpot.api.release import release_check
    from stockpot.cli.show_evidence import show_verdict
    from stockpot.cli.terminal import print_json

    def told(verdict: Any) -> None:
        if not shown.as_json:
            show_verdict(verdict, as_json=False, quiet=shown.quiet)
        elif not (verdict.passed or publishing.force):  # else the lineage, which holds it, is printed
            print_json({"published": False, "gates": verdict.to_dict()})

    return release_check(publishing.suite, force=publishing.force, told=told)
