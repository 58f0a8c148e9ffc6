"""`stockpot run show` and `stockpot soup`: training runs on the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stockpot.cli.boundary import boundary
from stockpot.cli.evidence import release_of
from stockpot.cli.groups import grouped
from stockpot.cli.options import AsJson, Engine, OutOrNone, Publishing, Shown

if TYPE_CHECKING:
    from stockpot.runs import SoupSpec

__all__ = ["run_app", "soup"]

run_app = typer.Typer(name="run", help="Look at training runs.", no_args_is_help=True, rich_markup_mode=None)

Run = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a training run (output_dir).")]
Snapshots = Annotated[
    str | None,
    typer.Option(metavar="PATTERN", help="Where snapshots lie in any other layout: 'ckpt_{step}.safetensors'."),
]
Metrics = Annotated[str | None, typer.Option(metavar="FILE", help="Metrics by step, .csv or .jsonl.")]
Smooth = Annotated[int, typer.Option(metavar="N", help="Mean of the last N logged values.")]


@run_app.callback()
def _group() -> None:
    """Look at training runs."""


@run_app.command()
@boundary
def show(
    run: Run, snapshots: Snapshots = None, metrics: Metrics = None, smooth: Smooth = 1, as_json: AsJson = False
) -> None:
    """Show the snapshots of RUN with the metrics that were logged for them."""
    from stockpot.cli.show_run import show_run
    from stockpot.runs import open_run

    show_run(open_run(run, snapshots=snapshots, metrics=metrics), smooth=smooth, as_json=as_json)


@dataclass(frozen=True)
class Which:
    """Which snapshots are averaged."""

    last: Annotated[
        int | None,
        typer.Option(help="The last K snapshots, the final checkpoint not among them [default: 10].", metavar="K"),
    ] = None
    every: Annotated[int, typer.Option(metavar="M", help="Every M-th of them, counting back from the newest.")] = 1
    start: Annotated[
        int | None, typer.Option(help="All snapshots from this step on, in place of --last.", metavar="STEP")
    ] = None
    steps: Annotated[
        str | None, typer.Option(help="These snapshots, in place of --last: 100,200,300.", metavar="STEPS")
    ] = None
    best: Annotated[int | None, typer.Option(help="Of these, the best N by the metric of --by.", metavar="N")] = None
    include_final: Annotated[bool, typer.Option("--include-final", help="The final checkpoint may be chosen too.")] = (
        False
    )


@dataclass(frozen=True)
class How:
    """How they are weighted."""

    scheme: Annotated[
        str | None, typer.Option(help="uniform, metric, linear, 1-sqrt, ema, lawa, swa, weights; often implied.")
    ] = None
    by: Annotated[
        str | None, typer.Option(help="Weight by a logged metric, or by 'step' (arXiv 2504.18580).", metavar="METRIC")
    ] = None
    objective: Annotated[
        str | None,
        typer.Option(help="Whether a low or a high metric is better: min or max; known for the usual names."),
    ] = None
    penalty: Annotated[
        float | None, typer.Option(help="p: below 1 favours snapshots that rank better [default: 1].", metavar="P")
    ] = None
    power: Annotated[float, typer.Option(metavar="Q", help="q: how steeply the penalty grows with rank.")] = 1.2
    smooth: Smooth = 1
    decay: Annotated[float | None, typer.Option(help="Exponential moving average with this decay.", metavar="D")] = None
    decay_per: Annotated[str, typer.Option(help="What the decay counts: snapshot or step.")] = "snapshot"
    weights: Annotated[
        str | None, typer.Option(help="Weights by step: a .json object, or a .csv with step,weight.", metavar="FILE")
    ] = None
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide given weights by their sum.")] = False
    option: Annotated[
        list[str] | None,
        typer.Option(help="A number of the scheme's own, NAME=VALUE; may be repeated.", metavar="NAME=VALUE"),
    ] = None
    name: Annotated[str | None, typer.Option(help="All of the above from a name such as last_10_loss_pf-0_7.")] = None


@dataclass(frozen=True)
class Adapters:
    """What of the snapshots is averaged, and how LoRA adapters are."""

    adapter: Annotated[
        str | None, typer.Option(help="LoRA: factors (A and B apart; default), product (exact), fused (into the base).")
    ] = None
    rank: Annotated[int | None, typer.Option(help="With --adapter product: recompress to this rank.", metavar="R")] = (
        None
    )
    base: Annotated[
        str | None,
        typer.Option(help="With --adapter fused: the base model; by default the one that adapter_config.json names."),
    ] = None
    part: Annotated[
        str | None,
        typer.Option(help="Of snapshots that hold several state dicts or models: which one.", metavar="NAME"),
    ] = None


@boundary
@grouped
def soup(
    run: Run,
    which: Which,
    how: How,
    adapters: Adapters,
    engine: Engine,
    publishing: Publishing,
    shown: Shown,
    out: OutOrNone = None,
    snapshots: Snapshots = None,
    metrics: Metrics = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the weights, merge nothing.")] = False,
) -> None:
    """Average snapshots of RUN, weighted by what training logged, and publish the result at OUT.

    stockpot soup output_dir soup --last 10 --by loss --penalty 0.7
    """
    from stockpot.api.soups import soup_recipe
    from stockpot.errors import ArgumentError
    from stockpot.runs import open_run
    from stockpot.runs.schemes import SCHEMES

    spec = _spec(which, how)
    if out is None and not dry_run:
        raise ArgumentError("OUT is missing: the directory to create (or --dry-run)")
    windows = SCHEMES[spec.kind].windows
    if windows and publishing.suite is not None:
        raise ArgumentError(
            f"--suite decides over one soup; score the windows of {spec.kind} afterwards (stockpot gate)"
        )
    release = release_of(publishing, shown)
    opened = open_run(run, snapshots=snapshots, metrics=metrics)
    if windows:
        _windows(opened, spec, adapters, out or "", engine, shown, dry_run=dry_run)
        return
    _one(
        opened,
        soup_recipe(opened, spec, **asdict(adapters)),
        out or "",
        engine,
        shown,
        dry_run=dry_run,
        release=release,
    )


def _spec(which: Which, how: How) -> SoupSpec:
    """What was asked for: by a name, or by options."""
    from stockpot.errors import ArgumentError
    from stockpot.runs import SoupSpec, parse_name

    given = asdict(which) | asdict(how)
    given |= {"steps": _steps(which.steps), "weights": _weights(how.weights), "options": _numbers(how.option or [])}
    for key in ("option", "name"):
        del given[key]
    spec = SoupSpec(**given)
    if how.name is None:
        return spec
    if spec.given():
        raise ArgumentError(f"--name says it all: {', '.join(spec.given())} can't be given beside it")
    return parse_name(how.name)


def _one(
    run: Any, recipe: dict[str, Any], out: str, engine: Engine, shown: Shown, *, dry_run: bool, release: Any
) -> None:
    from stockpot.api.merging import check_target, merge_planned, plan
    from stockpot.cli.progress import progress_bar
    from stockpot.cli.show import show_notes
    from stockpot.cli.show_run import show_soup, show_soup_result
    from stockpot.cli.terminal import print_json

    options = engine.options()
    planned = plan(recipe, options, run=run)
    assert planned.soup is not None
    show_notes(planned.notes, quiet=shown.quiet or (shown.as_json and not dry_run))
    if dry_run:
        if shown.as_json:
            print_json(planned.soup.to_dict())
        else:
            show_soup(planned.soup)
        return
    check_target(planned, out, overwrite=engine.overwrite)
    if shown.talks:
        show_soup(planned.soup)
    with progress_bar(enabled=shown.talks) as progress:
        result = merge_planned(planned, out, options, overwrite=engine.overwrite, progress=progress, release=release)
    show_soup_result(result, as_json=shown.as_json, quiet=shown.quiet)


def _windows(
    run: Any, spec: SoupSpec, adapters: Adapters, out: str, engine: Engine, shown: Shown, *, dry_run: bool
) -> None:
    """LAWA: one soup a window, each in OUT/checkpoint-<newest step>, so that OUT is a run again.

    Windows that are there already, from a run of this command that was stopped, are left as they are.
    """
    import os

    from stockpot.api.merging import merge_planned, plan
    from stockpot.api.soups import check_windows, window_done, window_recipe
    from stockpot.cli.show import show_notes
    from stockpot.cli.show_run import show_soup, show_soup_result
    from stockpot.cli.terminal import print_json
    from stockpot.runs import resolve_windows, soup_name

    overwrite, options = engine.overwrite, engine.options()
    windows = resolve_windows(run, spec)
    todo = windows if overwrite or dry_run else [w for w in windows if not window_done(out, *w)]
    if not dry_run:
        check_windows(run, todo, out, overwrite=overwrite)
    show_notes(run.warnings, quiet=shown.quiet or (shown.as_json and not dry_run))
    documents = []
    for step, made in windows:
        folder = os.path.join(out, f"checkpoint-{step}")
        if shown.talks:
            show_soup(made)
        if not dry_run and any(step == other for other, _ in todo):
            planned = plan(window_recipe(run, made, **asdict(adapters)), options, run=run)
            result = merge_planned(planned, folder, options, overwrite=overwrite)
            if not shown.as_json:
                show_soup_result(result, as_json=False, quiet=shown.quiet)
        documents.append(made.to_dict() | ({} if dry_run else {"path": os.path.abspath(folder)}))
    if shown.as_json:
        name = soup_name(spec, len(windows[-1][1].ingredients))
        print_json({"name": name, "windows": documents, "warnings": list(run.warnings)})


def _steps(text: str | None) -> tuple[int, ...] | None:
    from stockpot.errors import ArgumentError

    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        raise ArgumentError(
            f"--steps: expected whole numbers with commas between, such as 100,200, got {text!r}"
        ) from None


def _numbers(texts: list[str]) -> dict[str, float]:
    from stockpot.errors import ArgumentError

    out = {}
    for text in texts:
        key, sign, value = text.partition("=")
        try:
            out[key.strip()] = float(value)
        except ValueError:
            sign = ""
        if not sign or not key.strip():
            raise ArgumentError(f"--option: expected NAME=VALUE with a number, got {text!r}")
    return out


def _weights(path: str | None) -> dict[int, float] | None:
    from stockpot.runs.files import read_weights

    return None if path is None else read_weights(path)
