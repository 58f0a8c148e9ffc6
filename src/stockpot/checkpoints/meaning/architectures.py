"""What transformers declares about its model types, as data: `architectures.json`, written by tools/architectures.py.

Read only when a question needs it, so that nothing here imports transformers.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = [
    "Architecture",
    "Rename",
    "architecture_of",
    "base_class_of",
    "default_of",
    "list_rule_of",
    "part_types",
    "renames_of",
    "table_version",
]


@functools.cache
def _table() -> dict[str, Any]:
    with open(os.path.join(os.path.dirname(__file__), "architectures.json"), encoding="utf-8") as f:
        data: dict[str, Any] = json.load(f)
    return data


def table_version() -> str:
    """The version of transformers that the table was made from."""
    return str(_table()["transformers"])


@dataclass(frozen=True)
class Rename:
    """One rename or conversion between a file and memory, applied as transformers does: the first match of any source.

    sources, targets  patterns of names; `*` in a source is the number of an expert
    operations        what is done to the tensors beside renaming: "MergeModulelist", "Concatenate 1", "Chunk"...
    scope             it holds below this path only, with or without the model's prefix; None: everywhere
    paired            the target is that of the source that matched
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[str, ...] = ()
    scope: str | None = None
    paired: bool = False
    compiled: re.Pattern[str] = field(default=re.compile(""), repr=False, compare=False)

    def applied(self, name: str, prefix: str) -> tuple[str, int, int | None] | None:
        """(the new name, which source matched, the number that its `*` stands for); None where none matches."""
        at = ""
        if self.scope is not None:
            scope = f"{self.scope}." if self.scope else ""
            base = f"{prefix}." if prefix else ""
            at = next((p for p in (base + scope, scope) if name.startswith(p)), "-")
            if at == "-":
                return None
        rest = name[len(at) :]
        found = self.compiled.search(rest)
        if found is None:
            return None
        group = next(g for g, value in found.groupdict().items() if value is not None)
        which = int(group[1:])
        target = self.targets[which if self.paired else 0]
        if r"\1" in target:
            target = target.replace(r"\1", found.group(self.compiled.groupindex[group] + 1) or "")
        number = None
        if "*." in self.sources[which]:
            numbers = re.findall(r"(?:^|\.)(\d+)(?=\.)", found.group(0)) or re.findall(r"_(\d+)(?=\.)", found.group(0))
            number = int(numbers[-1]) if numbers else None
        return at + rest.replace(found.group(0), target, 1), which, number


def _rename(row: Mapping[str, Any]) -> Rename:
    branches = []
    for i, source in sorted(enumerate(row["from"]), key=lambda item: -len(item[1])):
        pattern = source.replace("*.", r".*\.")
        if re.search(r"[a-zA-Z0-9]$", pattern):  # a pattern ends where a name does
            pattern += r"(?!\w)"
        branches.append(f"(?P<g{i}>{pattern})")
    kind = row.get("kind", "")
    operations = tuple(row.get("ops", ()))
    if kind not in ("", "PrefixChange", "GroupWeightRename"):
        operations = (*operations, kind)  # numbers move too: known by name, not understood
    return Rename(
        tuple(row["from"]), tuple(row["to"]), operations, row.get("scope"), kind == "GroupWeightRename",
        re.compile("|".join(branches)),
    )  # fmt: skip


@functools.cache
def _renames(number: int) -> tuple[Rename, ...]:
    rows = _table()["legacy"] if number < 0 else _table()["rules"][number]
    return tuple(_rename(row) for row in rows)


@dataclass(frozen=True)
class Architecture:
    """One model class of a type.

    prefix   what the names of the base model begin with in models that have a head on it
    is_base  whether the class is the base model itself, whose names lack the prefix
    places   where in the model the parts of its config are built: {"text_config": "model.language_model"}
    ties     (second name, the one that counts, part of the config that decides), in the names of memory
    """

    model_type: str
    name: str
    prefix: str
    is_base: bool
    ties: tuple[tuple[str, str, str], ...]
    rules: int | None
    places: Mapping[str, str] = field(default_factory=dict)


def architecture_of(config: Mapping[str, Any], names: Iterable[str] = ()) -> Architecture | None:
    """The class that a config.json is of; where it names none that is known, the likeliest of its type.

    names: of its tensors, which show whether there is a head.
    """
    model_type = config.get("model_type")
    entry = _table()["types"].get(model_type) if isinstance(model_type, str) else None
    if not entry or not entry["classes"]:
        return None
    classes: Mapping[str, Any] = entry["classes"]
    named = config.get("architectures")
    for name in named if isinstance(named, list) else ():
        if isinstance(name, str) and name in classes:
            return _architecture(model_type, name, classes[name])
    return _likeliest(str(model_type), classes, list(names))


def renames_of(architecture: Architecture | None, config: Mapping[str, Any] | None = None) -> tuple[Rename, ...]:
    """What is done to the names of a file as it is loaded, in order; of a class that is not known what is done to all.

    config: the model's own, whose parts may be of other types than the class has by default.
    """
    own = () if architecture is None or architecture.rules is None else _renames(architecture.rules)
    return (*own, *_of_other_parts(architecture, config or {}), *_renames(-1))


def _of_other_parts(architecture: Architecture | None, config: Mapping[str, Any]) -> Iterable[Rename]:
    """The renames of parts that are not of the types that the class has by default, below their places."""
    if architecture is None:
        return
    usual = part_types(architecture.model_type)
    for key, place in architecture.places.items():
        part: Any = config.get(key)
        kind = part.get("model_type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind == usual.get(key):
            continue
        classes = (_table()["types"].get(kind) or {"classes": {}})["classes"]
        found = next((e for e in classes.values() if e["is_base"] and "rules" in e), None)
        scope = place.removeprefix(architecture.prefix).removeprefix(".")
        for rename in _renames(found["rules"]) if found is not None else ():
            yield replace(rename, scope=f"{scope}.{rename.scope}" if rename.scope else scope)


def _likeliest(model_type: str, classes: Mapping[str, Any], names: Sequence[str]) -> Architecture:
    heads = [c for c, e in classes.items() if not e["is_base"]]
    prefixes = {classes[c]["prefix"] for c in heads} - {""}
    bare = not any(n.startswith(f"{p}.") for p in prefixes for n in names)
    bases = [c for c, e in classes.items() if e["is_base"] and c.endswith("Model")]
    endings = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForPreTraining", "ForMaskedLM")
    ordered = [c for ending in endings for c in classes if c.endswith(ending)]
    if bare and bases and names:
        ordered = [*bases, *ordered]
    name = next(iter([*ordered, *bases, *classes]))
    return _architecture(model_type, name, classes[name])


def _architecture(model_type: str | None, name: str, entry: Mapping[str, Any]) -> Architecture:
    ties = tuple((t, s, p) for t, s, p in entry.get("ties", ()))
    return Architecture(
        str(model_type), name, entry["prefix"], entry["is_base"], ties, entry.get("rules"), entry.get("at", {})
    )


def base_class_of(model_type: str) -> str | None:
    """The class of a type that is its base model, without a head."""
    entry = _table()["types"].get(model_type) or {"classes": {}}
    return next((c for c, e in entry["classes"].items() if e["is_base"] and c.endswith("Model")), None)


def default_of(model_type: object, key: str) -> Any:
    """What a config of this type has for a key that it leaves out; None where that is not known."""
    entry = _table()["types"].get(model_type) if isinstance(model_type, str) else None
    return None if entry is None else entry["config"].get(key)


def part_types(model_type: object) -> dict[str, str]:
    """The types of the sub-configs that a type has where config.json says no other: `{"text_config": "llama"}`."""
    entry = _table()["types"].get(model_type) if isinstance(model_type, str) else None
    return {} if entry is None else dict(entry.get("parts", {}))


def list_rule_of(model_type: object, key: str) -> list[list[Any]] | None:
    """How a list with an entry for each layer follows from their number, where config.json leaves it out: [what comes first,
    what is repeated, what comes last, and whether an explicit list may end otherwise: ["free"]]; None where the type has no such
    list, or it is more than such a rule.
    """
    entry = _table()["types"].get(model_type) if isinstance(model_type, str) else None
    found: list[list[Any]] | None = None if entry is None else entry.get("lists", {}).get(key)
    return found


def has_list(model_type: object, key: str) -> bool:
    """Whether a type works out such a list, by a rule that is known or not."""
    entry = _table()["types"].get(model_type) if isinstance(model_type, str) else None
    return entry is not None and key in entry.get("lists", {})
