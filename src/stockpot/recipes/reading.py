"""Nodes of YAML -> plain things: mappings with known keys, lists, text, model references, parameter settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stockpot.errors import RecipeError, StockpotError, nearest
from stockpot.recipes.nodes import Node
from stockpot.recipes.schema import Settings
from stockpot.recipes.values import Condition, Setting, Value

__all__ = ["NodeReader", "plain_value"]


class NodeReader:
    """Reads nodes and gathers problems; what can't be read is reported and left out.

    references  the nodes that name a model or another place, wherever in the text they stand
    """

    def __init__(self, text: str, origin: str) -> None:
        self.text = text
        self.origin = origin
        self.problems: list[StockpotError] = []
        self.references: list[Node] = []

    # small things

    def bad(self, line: int, why: str) -> None:
        self.problems.append(RecipeError(why).within(*([f"{self.origin}:{line}"] if self.origin else [])))

    def mapping(
        self,
        node: Node,
        where: str,
        known: list[str],
        misplaced: frozenset[str] = frozenset(),
        elsewhere: Mapping[str, str] | None = None,
    ) -> dict[str, Node]:
        """A mapping's values by key; unknown keys are reported and dropped."""
        if node.kind != "map":
            self.bad(node.line, f"{where}: expected a mapping with {', '.join(known)}; got {node.what}")
            return {}
        out = {}
        for key, line, value in node.value:
            if key in known:
                out[key] = value
            elif key in misplaced:
                self.bad(line, f"{where}: key {key!r} belongs under 'parameters:'")
            elif elsewhere and key in elsewhere:
                self.bad(line, f"{where}: key {key!r} belongs under '{elsewhere[key]}:'")
            else:
                self.bad(line, f"{where}: unknown key {key!r}; known are {', '.join(known)}{nearest(key, known)}")
        return out

    def listing(self, node: Node, where: str) -> list[Node]:
        if node.kind != "list" or not node.value:
            what = "an empty list" if node.kind == "list" else node.what
            self.bad(node.line, f"{where}: expected a list with at least one entry, got {what}")
            return []
        return list(node.value)

    def text_of(self, node: Node, where: str) -> str | None:
        if node.kind == "scalar" and isinstance(node.value, str) and node.value.strip():
            return node.value
        self.bad(node.line, f"{where}: expected text, got {node.what}")
        return None

    def model(self, node: Node, where: str) -> str:
        if node.kind == "map":
            return self.model_mapping(node, where)
        self.references.append(node)
        if node.kind == "scalar" and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            return node.text  # a directory called 2024, or 1.10
        return self.text_of(node, where) or ""

    def model_mapping(self, node: Node, where: str) -> str:
        """The long form that mergekit writes into model cards: `{model: {path: ...}}` or `{path: ...}`."""
        parts = self.mapping(node, where, ["model", "path", "revision", "lora", "override_architecture"])
        override = parts.get("override_architecture")
        if override is not None and override.value is not None:
            self.bad(
                override.line, f"{where}.override_architecture: is not supported; names and shapes say what fits what"
            )
        inner = parts.get("model") or parts.get("path")
        if inner is None:
            self.bad(node.line, f"{where}: expected a path")
            return ""
        ref = self.model(inner, where)
        revision, lora = parts.get("revision"), parts.get("lora")
        if revision is not None and revision.value is not None and revision.kind == "scalar":
            ref = f"{ref}@{revision.text}"
        if lora is not None and lora.value is not None:
            ref = f"{ref}+{self.model(lora, f'{where}.lora')}"
        return ref

    def patterns(self, node: Node, where: str) -> tuple[str, ...]:
        if node.kind == "list" and not node.value:
            self.bad(
                node.line, f"{where}: an empty list matches no tensor; give at least one pattern, or leave {where} out"
            )
        nodes = node.value if node.kind == "list" else [node]
        return tuple(p for p in (self.text_of(n, where) for n in nodes) if p)

    def companions(self, node: Node | None, where: str) -> Settings:
        """What lies beside a model: references by name."""
        if node is None:
            return {}
        if node.kind != "map" or not node.value:
            self.bad(node.line, f"{where}: expected a mapping from names to checkpoints, got {node.what}")
            return {}
        return {key: Setting(self.model(value, f"{where}.{key}"), line) for key, line, value in node.value}

    # parameters

    def settings(self, node: Node | None, where: str) -> Settings:
        if node is None or (node.kind == "scalar" and node.value is None):
            return {}
        if node.kind != "map":
            self.bad(node.line, f"{where}: expected a mapping of parameters, got {node.what}")
            return {}
        out = {}
        for key, line, value in node.value:
            parsed = self.value(value, f"{where}.{key}")
            if parsed is not None:
                out[key] = Setting(parsed, line)
        return out

    def value(self, node: Node, where: str) -> Value | None:
        if node.kind == "scalar":
            if node.value is None:
                self.bad(node.line, f"{where}: has no value")
            result: Value | None = node.value
            return result
        if node.kind == "map":
            condition = self.condition(node, where)
            return (condition,) if condition else None
        if not node.value:
            self.bad(node.line, f"{where}: an empty list is neither a gradient nor a choice by name")
            return None
        if all(n.kind == "map" for n in node.value):
            found = [self.condition(n, where) for n in node.value]
            return tuple(c for c in found if c is not None)
        if all(n.kind == "scalar" and _is_number(n.value) for n in node.value):
            if all(abs(n.value) <= 1e300 for n in node.value):
                return tuple(float(n.value) for n in node.value)
            self.bad(node.line, f"{where}: numbers beyond 1e300 are not taken")
            return None
        wrong = next(n for n in node.value if n.kind != "scalar" or not _is_number(n.value))
        self.bad(
            wrong.line, f"{where}: expected a gradient of numbers or a list of filter/value entries, got {wrong.what}"
        )
        return None

    def condition(self, node: Node, where: str) -> Condition | None:
        parts = self.mapping(node, where, ["filter", "value"])
        if "value" not in parts:
            if all(key in ("filter", "value") for key, _, _ in node.value):
                self.bad(node.line, f"{where}: an entry with a filter needs a value")
            return None
        value = self.value(parts["value"], where)
        pattern = None
        if "filter" in parts and parts["filter"].value is not None:
            pattern = self.text_of(parts["filter"], f"{where}.filter")
        return None if value is None else Condition(pattern, value)


def plain_value(node: Node, put: Mapping[int, str] | None = None) -> Any:
    """A node as plain data: what is checked later, where its meaning is known. put: other texts, by the nodes' ids."""
    if put is not None and id(node) in put:
        return put[id(node)]
    if node.kind == "map":
        return {key: plain_value(child, put) for key, _, child in node.value}
    return [plain_value(child, put) for child in node.value] if node.kind == "list" else node.value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
