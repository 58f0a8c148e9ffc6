"""The output's config.json: the donor's, with dtype, layers, vocabulary and ties brought up to date."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.checkpoints.meaning.architectures import architecture_of, default_of
from stockpot.checkpoints.meaning.depth import Pick, config_parts, follow
from stockpot.errors import MismatchError
from stockpot.specs import DType

__all__ = ["Layers", "output_config"]

_SCALED = ("t5", "mt5", "umt5", "longt5", "pop2piano")
_SCALED_BY_TIE = ("switch_transformers", "udop")


@dataclass(frozen=True)
class Layers:
    """The layers of the output: the stack that they make, how many of them the donor has, where each comes from, whether the
    donor has no other stack of that size.
    """

    stack: str
    old: int
    picks: Sequence[Pick]
    alone: bool


def output_config(
    config: Mapping[str, Any],
    *,
    dtype: DType | None,
    layers: Layers | None,
    untied: Iterable[str],
    vocabulary: tuple[int, int] | None,
) -> dict[str, Any]:
    """A changed copy.

    dtype       what every float tensor was written in, None where they differ
    layers      None when the recipe has no slices
    vocabulary  (rows that the donor's embeddings had, rows that they were cut to), or None
    untied      names of output heads that were written although the donor's config declares them tied

    Raises MismatchError where the config can't say what the layers are.
    """
    out = copy.deepcopy(dict(config))
    if layers is not None:
        out = follow(config, layers.stack, layers.old, layers.picks, alone=layers.alone)
    if dtype is not None and out:
        for key in ("dtype", "torch_dtype"):
            if key in out:
                out[key] = dtype.array
        if "dtype" not in out and "torch_dtype" not in out:
            out["torch_dtype"] = dtype.array
    if vocabulary is not None:
        _set_vocabulary(out, *vocabulary)
    for name in untied:
        _untie(out, config, name)
    return out


def _at(config: dict[str, Any], path: str) -> dict[str, Any]:
    for key in filter(None, path.split(".")):
        inner = config.get(key)
        config[key] = dict(inner) if isinstance(inner, Mapping) else {}
        config = config[key]
    return config


def _set_vocabulary(out: dict[str, Any], old: int, new: int) -> None:
    """Everywhere that the number stands; where it is left out, where it is the default."""
    parts = [(path, kind) for path, part, kind in config_parts(out) if isinstance(part.get("vocab_size"), int)]
    if not parts:
        parts = [(path, kind) for path, _, kind in config_parts(out) if default_of(kind, "vocab_size") == old]
    if not parts:
        known = [(path, kind) for path, _, kind in config_parts(out) if "vis" not in path and "audio" not in path]
        parts = known[-1:]
    for path, _ in parts:
        _at(out, path)["vocab_size"] = new


def _untie(out: dict[str, Any], config: Mapping[str, Any], name: str) -> None:
    architecture = architecture_of(config, [name])
    paths = {""} | {path for path, part, _ in config_parts(out) if "tie_word_embeddings" in part}
    if architecture is not None:
        paths |= {p for second, _, p in architecture.ties if second.endswith(name.rpartition(".")[2]) and p != "?"}
    for path in paths:
        _at(out, path)["tie_word_embeddings"] = False
    kind = config.get("model_type")
    if kind in _SCALED:  # they scale what goes into a tied head, and take that from the same key
        out.setdefault("scale_decoder_outputs", True)
    elif kind in _SCALED_BY_TIE:
        raise MismatchError(
            f"{name!r} is tied in a {kind}, which scales what goes into a tied head: it can't be untied"
        )
