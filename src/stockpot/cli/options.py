"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from stockpot.api import Options

__all__ = [
    "AllowCode",
    "AllowNonfinite",
    "AsJson",
    "Compat",
    "Device",
    "Engine",
    "Force",
    "Gates",
    "MaxMemory",
    "Out",
    "OutOrNone",
    "Overwrite",
    "Publishing",
    "Quiet",
    "Seed",
    "ShardSize",
    "Shown",
    "Threads",
]


def _lasts(out: str | None) -> str | None:
    if out is not None and out.startswith("memory://"):
        raise typer.BadParameter(
            f"{out}: lives only as long as this command; name a directory, or a URL that lasts (s3://bucket/name)"
        )
    return out


def _compat(value: str | None) -> str | None:
    if value not in (None, "mergekit"):
        raise typer.BadParameter(f"expected mergekit, got {value}")
    return value


Out = Annotated[str, typer.Argument(callback=_lasts, help="Directory to create, or a URL (s3://bucket/name).")]
OutOrNone = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(metavar="OUT", callback=_lasts, help="Directory to create, or a URL (s3://bucket/name)."),
]
Device = Annotated[
    str, typer.Option(help="For methods on whole matrices: auto, cpu, cuda, cuda:N, or torch (on the CPU).")
]
Threads = Annotated[Optional[int], typer.Option(help="Worker threads; as many as processors by default.")]  # noqa: UP045
MaxMemory = Annotated[str, typer.Option(help="Memory for the merge, over what the interpreter itself takes.")]
ShardSize = Annotated[str, typer.Option(help="Most bytes of tensor data in one file.")]
Seed = Annotated[int, typer.Option(help="Seed of random masks; always recorded.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Publish although inputs or output hold NaN or infinities.")
]
Compat = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        callback=_compat, metavar="mergekit", help="Read RECIPE as mergekit does (as `compat: mergekit` in it)."
    ),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run the files that `merge_method: FILE.py:FUNCTION` names.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")]
Gates = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--suite", metavar="FILE", help="Publish only if the release gates of this suite pass."),
]
Force = Annotated[bool, typer.Option("--force", help="Publish although a critical gate is not passed.")]


@dataclass(frozen=True)
class Engine:
    """How a merge is run."""

    device: Device = "cpu"
    threads: Threads = None
    max_memory: MaxMemory = "512MiB"
    shard_size: ShardSize = "5GB"
    overwrite: Overwrite = False
    allow_nonfinite: AllowNonfinite = False
    allow_code: AllowCode = False

    def options(self, seed: int = 0) -> Options:
        from stockpot.api.merging import Options

        return Options(
            self.device,
            self.threads,
            self.max_memory,
            self.shard_size,
            seed,
            allow_nonfinite=self.allow_nonfinite,
            allow_code=self.allow_code,
        )


@dataclass(frozen=True)
class Publishing:
    """Whether the result may be published."""

    suite: Gates = None
    force: Force = False


@dataclass(frozen=True)
class Shown:
    """What is printed."""

    as_json: AsJson = False
    quiet: Quiet = False

    @property
    def talks(self) -> bool:
        """Whether people read along."""
        return not (self.as_json or self.quiet)
