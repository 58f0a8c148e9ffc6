"""The command line: arguments to api calls, errors to exit codes.

0 done · 1 a bug in stockpot · 2 the user's mistake · 3 unusable input data · 4 verification failed ·
5 a release gate not passed · 130 stopped by a signal
"""

from __future__ import annotations

import gc
import io
import sys
from typing import Annotated, Optional

import typer

from stockpot.cli.boundary import boundary
from stockpot.cli.diagnose import diagnose
from stockpot.cli.evidence import register, release_of
from stockpot.cli.groups import grouped
from stockpot.cli.masks import masks
from stockpot.cli.options import (
    AllowCode,
    AsJson,
    Compat,
    Engine,
    MaxMemory,
    Out,
    Publishing,
    Seed,
    ShardSize,
    Shown,
    Threads,
)
from stockpot.cli.soup import run_app, soup

__all__ = ["app", "main"]

app = typer.Typer(
    name="stockpot",
    help="Merge model checkpoints: streamed, resumable, with a record of what was done.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to import than everything else here
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(run_app)
app.command()(soup)
app.command()(diagnose)
app.command()(masks)
register(app)


def _version(value: bool) -> None:
    if value:
        import stockpot
        from stockpot.cli.terminal import say

        say(f"stockpot {stockpot.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Merge model checkpoints: streamed, resumable, with a record of what was done."""


@app.command()
@boundary
@grouped
def merge(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    out: Out,
    engine: Engine,
    publishing: Publishing,
    shown: Shown,
    seed: Seed = 0,
    compat: Compat = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start over even if a killed merge could go on.")
    ] = False,
) -> None:
    """Merge as RECIPE says and publish the result at OUT.

    A merge that was killed goes on from where it stopped when the same command is given again.
    """
    from stockpot.api.merging import merge_planned, plan
    from stockpot.cli.progress import progress_bar
    from stockpot.cli.show import show_merge, show_notes
    from stockpot.recipes import load_as_mergekit

    release = release_of(publishing, shown)
    options = engine.options(seed)
    planned = plan(load_as_mergekit(recipe) if compat else recipe, options)
    show_notes(planned.notes, quiet=not shown.talks)
    with progress_bar(enabled=shown.talks) as progress:
        result = merge_planned(
            planned, out, options, overwrite=engine.overwrite, resume=not no_resume, progress=progress, release=release
        )
    show_merge(result, as_json=shown.as_json, quiet=shown.quiet)


@app.command()
@boundary
def plan(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    threads: Threads = None,
    max_memory: MaxMemory = "512MiB",
    shard_size: ShardSize = "5GB",
    compat: Compat = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what RECIPE would read, write and hold in memory, or every problem that headers can show."""
    from stockpot.api.merging import Options, plan
    from stockpot.cli.show import show_plan
    from stockpot.recipes import load_as_mergekit

    options = Options(threads=threads, max_memory=max_memory, shard_size=shard_size, allow_code=allow_code)
    show_plan(plan(load_as_mergekit(recipe) if compat else recipe, options), as_json=as_json)


@app.command()
@boundary
def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A model or adapter directory, a .safetensors file, a .ckpt, .pt or .bin file of torch, a URL or a Hub id."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show tensors, dtypes, layers and tied weights of CHECKPOINT, from its headers alone."""
    from stockpot.api.looking import inspect
    from stockpot.cli.show import show_checkpoint

    show_checkpoint(inspect(checkpoint), as_json=as_json)


@app.command()
@boundary
def verify(
    out: Annotated[str, typer.Argument(help="A directory that stockpot wrote.")],
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Read every tensor of OUT again and compare it with its lineage (stockpot.json)."""
    from stockpot.api.looking import verify
    from stockpot.cli.show import show_verified

    show_verified(out, verify(out, threads=threads), as_json=as_json)


@app.command()
@boundary
def methods(
    words: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="One method's name, or what is searched: spherical, two models, needs a base, random, ..."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the merge methods, describe one with its parameters, or find those that fit."""
    from stockpot.cli.show import show_methods

    show_methods(words or [], as_json=as_json)


@app.command()
@boundary
def doctor(
    folder: Annotated[str, typer.Argument(help="Where outputs would go.")] = ".",
    no_disk: Annotated[
        bool, typer.Option("--no-disk", help="Don't measure the disk's speed (256 MiB written).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what this machine has for merging, and what is missing for which feature."""
    from stockpot.cli.show import show_doctor
    from stockpot.doctor import examine

    show_doctor(examine(folder, probe_disk=not no_disk), as_json=as_json)


def main() -> None:
    """The console script."""
    # plans of many tensors are many small objects without cycles: looking for some among them takes a third of the time
    gc.set_threshold(100_000, 50, 100)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # tensor names on a terminal that can't show them
    app(prog_name="stockpot")


if __name__ == "__main__":
    main()
