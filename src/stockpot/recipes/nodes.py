"""YAML as a tree of nodes that remember their lines; strict where YAML is lax (a key given twice is an error)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from stockpot.errors import RecipeError, StockpotError, UserError
from stockpot.files import read_text

__all__ = ["Node", "parse_documents", "plain_nodes", "read_yaml_text"]

_MAX_BYTES = 2**20
#: characters of a number: base 60 takes the square of them
_LONGEST_NUMBER = 100
#: the parser in C, where there is one, for texts that would take long
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LONG = 2**16
_MAX_NODES = 200_000
_MAX_DEPTH = 40
_CONTAINERS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
#: what YAML 1.1 itself takes for a number, so that text which looks so is written in quotes
_YAML_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]\d+)?")


def read_yaml_text(path: str, what: str, error: type[StockpotError] = RecipeError) -> str:
    """The text of a YAML file of ours. what: "a recipe", for the error. Raises `error` where it can't be read or is too large."""
    return read_text(path, what, error, most=_MAX_BYTES)


@dataclass(frozen=True, slots=True)
class Node:
    """kind: "map" (value: list of (key, key line, Node)), "list" (value: list of Node) or "scalar" (value: plain)."""

    kind: str
    value: Any
    line: int
    text: str = ""  # a scalar as it was written

    @property
    def what(self) -> str:
        """How an error message names it."""
        if self.kind == "map":
            return "a mapping"
        if self.kind == "list":
            return "a list"
        return "nothing" if self.value is None else repr(self.value)


def parse_documents(
    text: str,
    origin: str,
    what: str = "a recipe",
    needs: str = "merge_method and models",
    error: type[UserError] = RecipeError,
) -> list[Node]:
    """Every YAML document -> Node. Raises `error` with file and line. Nothing is executed or expanded.

    what, needs  for messages: what the text is, what it needs at least
    """
    try:
        if len(text) > _LONG:
            _check_nesting(text, origin, what, error)
        documents = list(yaml.compose_all(text, Loader=_LOADER if len(text) > _LONG else yaml.SafeLoader))
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = mark.line + 1 if mark else 1
        raise error(f"{origin}:{line}: not valid YAML: {e.problem or e}") from e
    except (yaml.YAMLError, RecursionError) as e:
        raise error(f"{origin}: not valid YAML: {e}") from e
    documents = [d for d in documents if d is not None]
    if not documents:
        raise error(f"{origin}: empty; {what} needs at least {needs}")
    converter = _Converter(origin, what, error)
    return [converter.convert(d, 0) for d in documents]


def _check_nesting(text: str, origin: str, what: str, error: type[UserError]) -> None:
    """Raise `error` for a text nested so deeply that composing it would end the process, or of very many values."""
    depth = count = 0
    for event in yaml.parse(text, Loader=_LOADER):
        count += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2 * _MAX_DEPTH or count > _MAX_NODES:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise error(f"{origin}:{line}: nested too deeply, or too long, for {what}")


def plain_nodes(value: Any, error: type[UserError] = RecipeError) -> list[Node]:
    """Plain data, as YAML would give it -> one document. Its nodes lie on no line. Raises `error` for anything else."""
    count = 0

    def convert(value: Any, depth: int) -> Node:
        nonlocal count
        count += 1
        if count > _MAX_NODES or depth > _MAX_DEPTH:
            raise error("nested too deeply, or too long")
        if isinstance(value, Mapping):
            return Node("map", [(str(key), 0, convert(v, depth + 1)) for key, v in value.items()], 0)
        if isinstance(value, (list, tuple)):
            return Node("list", [convert(v, depth + 1) for v in value], 0)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if value is not None and not isinstance(value, (str, int, float)):
            raise error(
                f"a recipe as a mapping must hold text, numbers, lists and mappings only: {value!r} is {type(value).__name__}"
            )
        if (
            isinstance(value, str)
            and _NUMBER.fullmatch(value)
            and "e" in value.lower()
            and not _YAML_FLOAT.fullmatch(value)
        ):
            return Node("scalar", float(value), 0, value)  # as the record of it reads, see _Converter._scalar
        return Node("scalar", value, 0, str(value))

    return [convert(value, 0)]


class _Converter:
    def __init__(self, origin: str, what: str, error: type[UserError]) -> None:
        self.origin = origin
        self.what = what
        self.error = error
        self.count = 0
        self.scalars = yaml.constructor.SafeConstructor()

    def fail(self, node: yaml.Node, why: str) -> UserError:
        return self.error(f"{self.origin}:{node.start_mark.line + 1}: {why}")

    def convert(self, node: yaml.Node, depth: int) -> Node:
        self.count += 1
        if self.count > _MAX_NODES or depth > _MAX_DEPTH:
            raise self.fail(node, f"nested too deeply or expanded too far (YAML aliases?) for {self.what}")
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _CONTAINERS:
            raise self.fail(node, f"YAML tag {node.tag!r} is not allowed in {self.what}")
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            items = []
            inherited: list[tuple[str, int, Node]] = []
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise self.fail(key, "expected a plain word as key")
                if key.tag == "tag:yaml.org,2002:merge":
                    inherited += self.merged(value, depth)
                    continue
                if key.value in seen:
                    raise self.fail(key, f"key {key.value!r} given twice (first on line {seen[key.value]})")
                seen[key.value] = key.start_mark.line + 1
                items.append((key.value, key.start_mark.line + 1, self.convert(value, depth + 1)))
            for name, key_line, child in inherited:
                if name not in seen:
                    seen[name] = key_line
                    items.append((name, key_line, child))
            return Node("map", items, line)
        if isinstance(node, yaml.SequenceNode):
            return Node("list", [self.convert(child, depth + 1) for child in node.value], line)
        return Node("scalar", self._scalar(node), line, node.value)

    def merged(self, node: yaml.Node, depth: int) -> list[tuple[str, int, Node]]:
        """The items that a merge key (`<<: *common`) brings in; keys written out win over them, earlier ones over later."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        out: list[tuple[str, int, Node]] = []
        for source in sources:
            converted = self.convert(source, depth + 1)
            if converted.kind != "map":
                raise self.fail(source, "<<: expected an alias of a mapping")
            out += converted.value
        return out

    def _scalar(self, node: yaml.Node) -> Any:
        if node.tag == "tag:yaml.org,2002:str":
            # YAML 1.1 takes 1e-3 for a string; nobody who writes it means one
            if getattr(node, "style", None) is None and _NUMBER.fullmatch(node.value):
                return float(node.value)
            return node.value
        if node.tag in {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null")}:
            if len(node.value) > _LONGEST_NUMBER:
                raise self.fail(node, f"expected a number, got one of {len(node.value)} characters")
            try:
                return self.scalars.construct_object(node)
            except (ValueError, KeyError, IndexError, OverflowError, yaml.YAMLError) as e:
                raise self.fail(node, f"{node.value!r} can't be read: {e}") from e
        if node.tag == "tag:yaml.org,2002:timestamp":
            return node.value
        raise self.fail(node, f"YAML tag {node.tag!r} is not allowed in {self.what}")
