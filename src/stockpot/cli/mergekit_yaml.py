"""`stockpot-mergekit-yaml`: mergekit-yaml's arguments and options, so that a script changes by one word.

The recipe is read under `compat: mergekit`. Options without meaning here are accepted with a word; those that ask for
something that can't be had are refused.
"""

from __future__ import annotations

import gc
import os
import re
from typing import Annotated, Optional

import typer

from stockpot.cli.boundary import boundary
from stockpot.cli.terminal import tell
from stockpot.errors import ArgumentError

__all__ = ["app", "main"]

app = typer.Typer(
    name="stockpot-mergekit-yaml",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def _flag(about: str) -> typer.models.OptionInfo:
    found: typer.models.OptionInfo = typer.Option(help=about)
    return found


def _shard_size(text: str) -> int:
    """mergekit's sizes: a whole number and K, M or B. Its help calls them parameters; its code counts bytes."""
    match = re.fullmatch(r"\s*(\d+)\s*([KMB]?)\s*", text.upper())
    if match is None:
        raise ArgumentError(
            f"--out-shard-size: expected a whole number with K, M or B after it, such as 5B, got {text!r}"
        )
    return int(match[1]) * _UNITS[match[2]] or 10**15


@app.command()
@boundary
def mergekit_yaml(
    config_file: Annotated[str, typer.Argument(help="The recipe.")],
    out_path: Annotated[
        str, typer.Argument(help="Directory to create; an earlier output of stockpot there is replaced.")
    ],
    allow_crimes: Annotated[bool, _flag("Architectures are told by tensors here.")] = False,
    unsafe_truncate_embeddings: Annotated[bool, _flag("As `vocab: crop` in the recipe.")] = False,
    trust_remote_code: Annotated[bool, _flag("No code of a model is ever run.")] = False,
    transformers_cache: Annotated[Optional[str], _flag("Where models of the Hub are kept.")] = None,  # noqa: UP045
    lora_merge_cache: Annotated[Optional[str], _flag("Adapters are applied while merging.")] = None,  # noqa: UP045
    lora_merge_dtype: Annotated[Optional[str], _flag("Adapters are applied in float32.")] = None,  # noqa: UP045
    random_seed: Annotated[int, _flag("Seed of random masks.")] = 0,
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="Notes are shown anyway.")] = 0,
    quiet: Annotated[bool, _flag("Print nothing but warnings and errors.")] = False,
    cuda: Annotated[bool, _flag("As --device cuda.")] = False,
    device: Annotated[Optional[str], _flag("For methods on whole matrices.")] = None,  # noqa: UP045
    low_cpu_memory: Annotated[bool, _flag("Memory is within --max-memory of `stockpot merge`.")] = False,
    lazy_unpickle: Annotated[bool, _flag("Pickles are never run, and read tensor by tensor.")] = False,
    read_to_gpu: Annotated[bool, _flag("Reading is on the CPU.")] = False,
    multi_gpu: Annotated[bool, _flag("One device at most is used.")] = False,
    num_threads: Annotated[Optional[int], typer.Option("--num-threads", "-j", help="Worker threads.")] = None,  # noqa: UP045
    gpu_rich: Annotated[bool, typer.Option("--gpu-rich", help="As --device cuda.")] = False,
    async_write: Annotated[bool, _flag("Writing is beside reading always.")] = False,
    write_threads: Annotated[int, _flag("The worker threads write.")] = 1,
    out_shard_size: Annotated[str, _flag("Most bytes in one file, 5B being 5 GB.")] = "5B",
    copy_tokenizer: Annotated[bool, _flag("A tokenizer is copied always.")] = True,
    clone_tensors: Annotated[bool, _flag("Layers may occur any number of times.")] = False,
    write_model_card: Annotated[bool, _flag("A model card is written always.")] = True,
    safe_serialization: Annotated[bool, _flag("Outputs are safetensors.")] = True,
) -> None:
    """Merge as CONFIG_FILE, a recipe of mergekit's, says, with the options of mergekit-yaml."""
    if not safe_serialization:
        raise ArgumentError("--no-safe-serialization: outputs are safetensors; torch.save them yourself where you must")
    size = _shard_size(out_shard_size)
    if transformers_cache is not None:
        os.environ["HF_HUB_CACHE"] = transformers_cache
    words = {
        "--allow-crimes": (allow_crimes, "tensors are matched by name and shape; what does not fit is refused"),
        "--trust-remote-code": (trust_remote_code, "no code of a model is ever run"),
        "--lora-merge-cache": (lora_merge_cache is not None, "adapters are applied while merging; nothing is kept"),
        "--lora-merge-dtype": (lora_merge_dtype is not None, "adapters are applied in float32"),
        "--low-cpu-memory": (low_cpu_memory, "memory is limited to 512 MiB; `stockpot merge --max-memory` sets it"),
        "--read-to-gpu": (read_to_gpu, "only methods on whole matrices use a GPU"),
        "--multi-gpu": (multi_gpu, "one GPU at most is used"),
        "--gpu-rich": (gpu_rich, "only methods on whole matrices use a GPU, one at most"),
        "--no-copy-tokenizer": (
            not copy_tokenizer,
            "the tokenizer's files are copied all the same; delete them where not wanted",
        ),
        "--no-write-model-card": (
            not write_model_card,
            "a model card is written all the same; delete it where not wanted",
        ),
    }
    for option, (given, word) in words.items():
        if given and not quiet:
            tell(f"note: {option} has no effect: {word}")

    from stockpot.api.merging import Options, merge_planned, plan
    from stockpot.cli.progress import progress_bar
    from stockpot.cli.show import show_merge, show_notes
    from stockpot.recipes import load_as_mergekit

    where = device or ("cuda" if cuda or gpu_rich else "cpu")
    options = Options(device=where, threads=num_threads, shard_size=size, seed=random_seed)
    recipe = load_as_mergekit(config_file, **({"vocab": "crop"} if unsafe_truncate_embeddings else {}))
    planned = plan(recipe, options)
    show_notes(planned.notes, quiet=quiet)
    with progress_bar(enabled=not quiet) as progress:
        result = merge_planned(planned, out_path, options, overwrite=True, progress=progress)
    show_merge(result, as_json=False, quiet=quiet)


def main() -> None:
    """The console script."""
    gc.set_threshold(100_000, 50, 100)
    app(prog_name="stockpot-mergekit-yaml")


if __name__ == "__main__":
    main()
