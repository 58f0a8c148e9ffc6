"""A recipe: what the user wants, frozen, hashed, with the line of everything for error messages."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stockpot.recipes.values import Setting

__all__ = ["AdapterChoice", "LayerSlice", "ModelEntry", "Recipe", "Rule", "RunChoice", "Settings", "Source"]

Settings = Mapping[str, Setting]


@functools.lru_cache(maxsize=256)
def matching(patterns: tuple[str, ...]) -> Callable[[str], object]:
    """What is true of names that match one of some patterns (`*.mlp.*`): plain ones are looked up, the others one expression."""
    plain = frozenset(p for p in patterns if not any(c in p for c in "*?["))
    rest = [fnmatch.translate(p) for p in patterns if p not in plain]
    if not rest:
        return plain.__contains__
    match = re.compile("|".join(f"(?:{p})" for p in rest)).match
    return (lambda name: name in plain or match(name)) if plain else match


@dataclass(frozen=True)
class ModelEntry:
    """One of `models`. companions: references by the name of what they are to the model (fisher); part: of a checkpoint that has
    several.
    """

    ref: str
    parameters: Settings
    line: int
    companions: Settings = field(default_factory=dict)
    part: str | None = None


@dataclass(frozen=True)
class Source:
    """One source of a slice: layers [start, stop) of a model; None means all of them."""

    ref: str
    layer_range: tuple[int, int] | None
    parameters: Settings
    line: int
    companions: Settings = field(default_factory=dict)
    part: str | None = None


@dataclass(frozen=True)
class LayerSlice:
    """A run of output layers, made from as many layers of each source."""

    sources: tuple[Source, ...]
    base_model: str | None
    parameters: Settings
    line: int


@dataclass(frozen=True)
class Rule:
    """Tensors whose names match a pattern get another method or other parameters. The first rule that matches wins."""

    patterns: tuple[str, ...]
    merge_method: str | None
    parameters: Settings
    line: int


@dataclass(frozen=True)
class RunChoice:
    """`run:` a training run that stands for its models. `options` choose and weight snapshots (runs.SoupSpec's fields).

    base   first or last (of the chosen snapshots) or a step: the snapshot that is the base model
    """

    path: str
    options: Mapping[str, Any]
    line: int
    name: str | None = None
    snapshots: str | None = None
    metrics: str | None = None
    base: str | int | None = None
    part: str | None = None


@dataclass(frozen=True)
class AdapterChoice:
    """`adapter:` how adapters are averaged: factors apart, their products, or fused into `base`."""

    mode: str
    line: int
    rank: int | None = None
    base: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe. `text` is verbatim, or a mapping written as YAML; `lines` are those of top-level keys.

    origin its file, `<recipe>` for text, nothing for a mapping, which has no lines

    vocab  "crop" or "by_position": what is done about rows of embeddings that are not the same tokens everywhere
    part   of every model that has several, where an entry names none
    name   of a step
    steps  the recipes that come before it in the same file, which it may name as models
    """

    text: str
    origin: str
    merge_method: str
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[LayerSlice, ...] = ()
    base_model: str | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    mergekit_compat: bool = False
    tokenizer_from: str | None = None
    vocab: str | None = None
    part: str | None = None
    absent: str = "error"
    run: RunChoice | None = None
    adapter: AdapterChoice | None = None
    lines: Mapping[str, int] = field(default_factory=dict)
    name: str | None = None
    steps: tuple[Recipe, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def references(self) -> set[str]:
        """Every model that it names, and what stands on either side of a + in them."""
        entries: list[ModelEntry | Source] = [*self.models, *(s for piece in self.slices for s in piece.sources)]
        found = {e.ref for e in entries} | {str(c.value) for e in entries for c in e.companions.values()}
        bases = {self.base_model, *(piece.base_model for piece in self.slices), self.tokenizer_from}
        found |= {b for b in bases if b}
        found |= {self.adapter.base} if self.adapter is not None and self.adapter.base else set()
        return found | {half for ref in found if "+" in ref for half in ref.split("+")}

    def includes(self, name: str) -> bool:
        """Whether a tensor is merged: `include` and `exclude`."""
        if self.include and not matching(self.include)(name):
            return False
        return not matching(self.exclude)(name)

    def told(self, line: int, text: str) -> str:
        """A note, after the place that it is about."""
        return ": ".join(filter(None, (self.at(line), text)))

    def at(self, line: int) -> str:
        """`recipe.yml:12`, for error messages; nothing for a recipe that is no text."""
        return f"{self.origin}:{line}" if self.origin else ""
