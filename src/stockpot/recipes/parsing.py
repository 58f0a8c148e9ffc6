"""YAML text -> Recipe, strictly: every unknown key, wrong type or coming feature is an error, all reported at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from stockpot.errors import ArgumentError, RecipeError, nearest, raise_problems
from stockpot.recipes.nodes import Node, parse_documents, plain_nodes, read_yaml_text
from stockpot.recipes.reading import NodeReader, plain_value
from stockpot.recipes.schema import AdapterChoice, LayerSlice, ModelEntry, Recipe, Rule, RunChoice, Source
from stockpot.specs import parse_dtype

__all__ = ["RUN_OPTIONS", "load_as_mergekit", "load_recipe", "located_mapping", "parse_recipe"]

_TOP = (
    "merge_method models slices base_model parameters dtype out_dtype include exclude rules compat tokenizer_source "
    "tokenizer chat_template modules run adapter vocab absent part name"
).split()
_COMING = {
    "modules": "merging sub-modules by separate recipes",
    "chat_template": "choosing or writing a chat template",
}
#: keys of a recipe's first level that tell another program's file
_OTHERS = {
    "experts": "this is a recipe of mergekit-moe; putting mixtures of experts together is a coming feature of stockpot",
    "genome": "this is a recipe of mergekit-evolve; see `stockpot sweep` for searching parameters",
}
_PARAMETERS = frozenset(
    "normalize weight density t lambda scale rescale dialect int8_mask select_topk epsilon gamma filter_wise max_iter tol "
    "nuslerp_flatten nuslerp_row_wise normalize_weights eps".split()
)
#: the options of a `run:` besides its files: the fields of runs.SoupSpec
RUN_OPTIONS = (
    "last every start steps best include_final scheme by objective penalty power smooth decay decay_per weights normalize "
    "options"
).split()
_RUN_KEYS = ["path", "name", "snapshots", "metrics", "base", "part", *RUN_OPTIONS]
_ADAPTER_MODES = ("factors", "product", "fused")
_ABSENT = ("error", "zero", "skip")
_VOCAB = ("crop", "by_position")
_TOKENIZER = "building a tokenizer from several models"


def load_recipe(recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
    """A path, YAML text (with a line break), a mapping as YAML would give it, or a Recipe -> Recipe."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _from_nodes(plain_nodes(recipe), _text_of(recipe), "")
    if isinstance(recipe, str) and "\n" in recipe:
        return parse_recipe(recipe, "<recipe>")
    if not isinstance(recipe, (str, os.PathLike)):
        raise RecipeError(f"expected a path, YAML text, a mapping or a Recipe, got {type(recipe).__name__}")
    path = os.fspath(recipe)
    text = read_yaml_text(path, "a recipe")
    return parse_recipe(text, path)


def load_as_mergekit(path: str | os.PathLike[str], **more: str) -> Recipe:
    """A recipe's file as if `compat: mergekit` stood in each of its recipes, and other lines (`vocab: crop`) where they say
    nothing of them. They become part of the recipe's text, so that the lineage has them; lines keep their numbers in errors.
    """
    origin = os.fspath(path)
    text = read_yaml_text(origin, "a recipe")
    documents = parse_documents(text, origin)
    for node in documents:
        steps = next((value for key, _, value in node.value if key == "steps"), None) if node.kind == "map" else None
        for recipe in steps.value if steps is not None and steps.kind == "list" else [node]:
            if recipe.kind != "map":
                continue
            own = {key for key, _, _ in recipe.value}
            for key, value in {"compat": "mergekit", **more}.items():
                if key not in own:
                    recipe.value.append((key, recipe.line, Node("scalar", value, recipe.line, value)))
    whole = "---\n".join(_text_of(plain_value(node, {})) for node in documents if node.kind == "map")
    return _from_nodes(documents, whole if whole else text, origin)


def _text_of(recipe: Mapping[str, Any]) -> str:
    """A mapping as YAML: what a merge records of it."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    try:
        text: str = yaml.safe_dump(plain(recipe), sort_keys=False)
    except yaml.YAMLError as e:
        raise RecipeError(f"a recipe as a mapping must hold text, numbers, lists and mappings only: {e}") from e
    return text


#: steps of a file, and how often they may be computed in all, where each reads others
_MOST_STEPS, _MOST_READS = 100, 2000


def parse_recipe(text: str, origin: str = "<recipe>") -> Recipe:
    """Parse YAML text. Raises RecipeError, or ProblemsError when there are several problems."""
    return _from_nodes(parse_documents(text, origin), text, origin)


def _from_nodes(documents: list[Node], text: str, origin: str) -> Recipe:
    parser = _Parser(text, origin)
    recipe = parser.file(documents)
    raise_problems(parser.problems)
    return recipe


def located_mapping(recipe: Recipe, place: Callable[[str], str]) -> dict[str, Any]:
    """A recipe as a mapping, every reference in it replaced by `place` of it: it no longer depends on where its file lies."""
    documents = parse_documents(recipe.text, recipe.origin)
    parser = _Parser(recipe.text, recipe.origin)
    parser.file(documents)
    found: dict[str, Any] = plain_value(documents[0], {id(n): place(n.text) for n in parser.references})
    return found


class _Parser(NodeReader):
    # several recipes in one file

    def file(self, documents: list[Node]) -> Recipe:
        """The last recipe of a file, with the steps before it: documents of their own, or entries of `steps`."""
        nodes = documents
        first = documents[0]
        if len(documents) == 1 and first.kind == "map" and any(key == "steps" for key, _, _ in first.value):
            for key, line, _ in first.value:
                if key != "steps":
                    self.bad(line, f"recipe: key {key!r} belongs into one of the steps")
            nodes = self.listing(next(value for key, _, value in first.value if key == "steps"), "steps")
        steps: list[Recipe] = []
        if len(nodes) > 1 and nodes is documents:  # mergekit's order is free: the nameless one is the result
            nodes = sorted(nodes, key=lambda n: n.kind == "map" and all(key != "name" for key, _, _ in n.value))
        for i, node in enumerate(nodes):
            made = replace(self.recipe(node), steps=tuple(steps))
            last = i == len(nodes) - 1
            if not last and made.name is None:
                self.bad(node.line, "a step that others are to use needs a 'name'")
            elif made.name is not None and any(s.name == made.name for s in steps):
                self.bad(made.lines["name"], f"name: there are two steps called {made.name!r}")
            elif last and len(nodes) == 1 and made.name is not None and nodes is documents:
                return made
            steps.append(made)
        if not steps:
            return Recipe(self.text, self.origin, "")
        self.check_uses(steps)
        return steps[-1]

    def check_uses(self, steps: list[Recipe]) -> None:
        """A step that nothing uses is a mistake, and so is one that is used before it is made."""
        names = [s.name for s in steps]
        used = {ref for s in steps for ref in s.references()}
        for i, s in enumerate(steps):
            for ref in s.references():
                if ref in names[i:] and ref is not None and not os.path.exists(ref):
                    self.bad(s.lines.get("merge_method", 1), f"uses the step {ref!r}, which comes later or is this one")
        if len(steps) > _MOST_STEPS:
            self.bad(
                steps[-1].lines.get("merge_method", 1),
                f"{len(steps)} steps in one file; {_MOST_STEPS} are taken at most",
            )
        reads: dict[str | None, int] = {}
        for s in steps:  # a streamed step is computed wherever it is read
            named = [*(e.ref for e in s.models), *(x.ref for piece in s.slices for x in piece.sources), s.base_model]
            reads[s.name] = 1 + sum(reads.get(ref, 0) for ref in named)
        if max(reads.values()) > _MOST_READS:
            line = steps[-1].lines.get("merge_method", 1)
            self.bad(
                line,
                "its steps read one another so often that it would never end; merge the earlier ones by themselves",
            )
        for s in steps[:-1]:
            if s.name is not None and s.name not in used:
                self.bad(s.lines["name"], f"name: no later step uses {s.name!r}")

    # the parts of a recipe

    def recipe(self, node: Node) -> Recipe:
        if node.kind != "map":
            self.bad(node.line, f"a recipe is a mapping with merge_method and models; got {node.what}")
            return Recipe(self.text, self.origin, "")
        for key, line, _ in node.value:
            if key in _OTHERS and not any(k == "merge_method" for k, _, _ in node.value):
                self.bad(line, _OTHERS[key])
                return Recipe(self.text, self.origin, "")
        top = self.mapping(node, "recipe", _TOP, _PARAMETERS, {"pad_to_multiple_of": "tokenizer"})
        top = {key: value for key, value in top.items() if value.kind != "scalar" or value.value is not None}
        for key, feature in _COMING.items():
            if key in top:
                self.bad(top[key].line, f"{key}: {feature} is a coming feature of stockpot; remove the key for now")
        method = ""
        if "merge_method" in top:
            method = self.text_of(top["merge_method"], "merge_method") or ""
        else:
            self.bad(node.line, "merge_method is missing")
        if ("models" in top) + ("slices" in top) + ("run" in top) != 1 and "modules" not in top:
            self.bad(node.line, "expected exactly one of 'models', 'slices' and 'run'")
        base = self.model(top["base_model"], "base_model") if "base_model" in top else None
        return Recipe(
            text=self.text,
            origin=self.origin,
            merge_method=method,
            models=self.each(top, "models", self.entry),
            slices=self.each(top, "slices", self.slice),
            base_model=base or None,
            parameters=self.settings(top.get("parameters"), "parameters"),
            dtype=self.dtype(top, "dtype"),
            out_dtype=self.dtype(top, "out_dtype"),
            include=self.patterns(top["include"], "include") if "include" in top else (),
            exclude=self.patterns(top["exclude"], "exclude") if "exclude" in top else (),
            rules=self.each(top, "rules", self.rule),
            mergekit_compat=self.switch(top, "compat", "mergekit"),
            tokenizer_from=self.tokenizer(top),
            vocab=self.vocab(top),
            part=self.part(top, "part"),
            absent=self.absent(top),
            run=self.run(top["run"]) if "run" in top else None,
            adapter=self.adapter(top["adapter"]) if "adapter" in top else None,
            lines={key: line for key, line, _ in node.value},
            name=self.name(top),
        )

    def absent(self, top: dict[str, Node]) -> str:
        """What becomes of tensors that only some models have."""
        if "absent" not in top:
            return "error"
        node = top["absent"]
        if node.value not in _ABSENT:
            self.bad(node.line, f"absent: expected {', '.join(_ABSENT[:-1])} or {_ABSENT[-1]}, got {node.what}")
        elif node.value != "error" and "slices" in top:
            self.bad(node.line, f"absent: {node.value} goes with models or run, not with slices")
        return str(node.value)

    def vocab(self, top: dict[str, Node]) -> str | None:
        """What is done about rows of embeddings that are not the same tokens in all models."""
        if "vocab" not in top:
            return None
        if top["vocab"].value not in _VOCAB:
            self.bad(top["vocab"].line, f"vocab: expected {' or '.join(_VOCAB)}, got {top['vocab'].what}")
        return str(top["vocab"].value)

    def part(self, parts: dict[str, Node], key: str) -> str | None:
        """Which part of a checkpoint is meant, where it has several."""
        return self.text_of(parts["part"], key) if "part" in parts else None

    def each(self, top: dict[str, Node], key: str, read: Callable[[Node], Any]) -> tuple[Any, ...]:
        return tuple(read(n) for n in self.listing(top[key], key)) if key in top else ()

    def entry(self, node: Node) -> ModelEntry:
        if node.kind == "scalar":
            return ModelEntry(self.model(node, "models"), {}, node.line)
        parts = self.mapping(node, "models", ["model", "parameters", "companions", "part"])
        if "model" not in parts:
            self.bad(node.line, "models: an entry needs 'model'")
        ref = self.model(parts["model"], "models.model") if "model" in parts else ""
        settings = self.settings(parts.get("parameters"), "models.parameters")
        beside = self.companions(parts.get("companions"), "models.companions")
        return ModelEntry(ref, settings, node.line, beside, self.part(parts, "models.part"))

    def slice(self, node: Node) -> LayerSlice:
        parts = self.mapping(node, "slices", ["sources", "base_model", "parameters"])
        sources: tuple[Source, ...] = ()
        if "sources" in parts:
            sources = tuple(self.source(n) for n in self.listing(parts["sources"], "slices.sources"))
        else:
            self.bad(node.line, "slices: an entry needs 'sources'")
        base = self.model(parts["base_model"], "slices.base_model") if "base_model" in parts else None
        return LayerSlice(sources, base, self.settings(parts.get("parameters"), "slices.parameters"), node.line)

    def source(self, node: Node) -> Source:
        parts = self.mapping(node, "slices.sources", ["model", "layer_range", "parameters", "companions", "part"])
        if "model" not in parts:
            self.bad(node.line, "slices.sources: an entry needs 'model'")
        ref = self.model(parts["model"], "slices.sources.model") if "model" in parts else ""
        span = self.layer_range(parts["layer_range"]) if "layer_range" in parts else None
        settings = self.settings(parts.get("parameters"), "slices.sources.parameters")
        beside = self.companions(parts.get("companions"), "slices.sources.companions")
        return Source(ref, span, settings, node.line, beside, self.part(parts, "slices.sources.part"))

    def layer_range(self, node: Node) -> tuple[int, int] | None:
        values = [n.value for n in node.value] if node.kind == "list" else []
        if len(values) != 2 or not all(type(v) is int for v in values):
            self.bad(node.line, "layer_range: expected [start, stop] with whole numbers, stop not included")
            return None
        start, stop = values
        if start < 0 or stop <= start:
            self.bad(
                node.line,
                f"layer_range: [{start}, {stop}] holds no layers; expected 0 <= start < stop (negative numbers do not "
                "count from the end)",
            )
            return None
        return start, stop

    def rule(self, node: Node) -> Rule:
        parts = self.mapping(node, "rules", ["match", "merge_method", "parameters"])
        if "match" not in parts:
            self.bad(node.line, "rules: an entry needs 'match', a pattern on tensor names")
        if "merge_method" not in parts and "parameters" not in parts:
            self.bad(node.line, "rules: an entry needs 'merge_method' or 'parameters'")
        return Rule(
            self.patterns(parts["match"], "rules.match") if "match" in parts else (),
            self.text_of(parts["merge_method"], "rules.merge_method") if "merge_method" in parts else None,
            self.settings(parts.get("parameters"), "rules.parameters"),
            node.line,
        )

    def run(self, node: Node) -> RunChoice:
        if node.kind == "scalar":
            return RunChoice(self.model(node, "run"), {}, node.line)
        parts = self.mapping(node, "run", _RUN_KEYS)
        if "path" not in parts:
            self.bad(node.line, "run: needs 'path', the directory of a training run")
        parts = {k: n for k, n in parts.items() if n.kind != "scalar" or n.value is not None}
        texts = {k: self.text_of(parts[k], f"run.{k}") for k in ("name", "snapshots", "metrics") if k in parts}
        self.references += [parts["metrics"]] if "metrics" in parts else []
        path = self.model(parts["path"], "run.path") if "path" in parts else ""
        base = None
        if "base" in parts:
            base = parts["base"].value
            if base not in ("first", "last") and type(base) is not int:
                self.bad(parts["base"].line, f"run.base: expected first, last or a step, got {parts['base'].what}")
        options = {k: plain_value(parts[k]) for k in RUN_OPTIONS if k in parts}
        if isinstance(options.get("steps"), list):
            options["steps"] = tuple(options["steps"])
        return RunChoice(
            path,
            options,
            node.line,
            texts.get("name"),
            texts.get("snapshots"),
            texts.get("metrics"),
            base,
            self.part(parts, "run.part"),
        )

    def adapter(self, node: Node) -> AdapterChoice:
        parts = {"mode": node}
        if node.kind == "map":
            parts = self.mapping(node, "adapter", ["mode", "rank", "base"])
        mode = self.text_of(parts["mode"], "adapter.mode") if "mode" in parts else None
        if mode not in _ADAPTER_MODES:
            got = repr(mode) if mode else "nothing"
            self.bad(
                node.line,
                f"adapter: expected one of {', '.join(_ADAPTER_MODES)}, got {got}{nearest(mode or '', _ADAPTER_MODES)}",
            )
        rank = parts["rank"].value if "rank" in parts else None
        if rank is not None and (type(rank) is not int or rank < 1):
            self.bad(
                parts["rank"].line, f"adapter.rank: expected a whole number of at least 1, got {parts['rank'].what}"
            )
        elif rank is not None and mode != "product":
            self.bad(parts["rank"].line, f"adapter.rank has no effect with {mode}; it recompresses a product")
        base = self.model(parts["base"], "adapter.base") if "base" in parts else None
        if base is not None and mode != "fused":
            self.bad(
                parts["base"].line, f"adapter.base has no effect with {mode}; it names the model that fused writes into"
            )
        return AdapterChoice(mode or "", node.line, rank, base)

    def dtype(self, top: dict[str, Node], key: str) -> str | None:
        if key not in top:
            return None
        text = self.text_of(top[key], key)
        if text is None:
            return None
        try:
            return parse_dtype(text).label
        except ArgumentError as e:
            self.bad(top[key].line, f"{key}: {e}")
            return None

    def switch(self, top: dict[str, Node], key: str, word: str) -> bool:
        """Whether a key that takes one word only is given."""
        if key not in top:
            return False
        if top[key].kind == "scalar" and top[key].value == word:
            return True
        self.bad(top[key].line, f"{key}: expected {word}, got {top[key].what}")
        return False

    def name(self, top: dict[str, Node]) -> str | None:
        if "name" not in top:
            return None
        text = self.text_of(top["name"], "name")
        if text is not None and (os.path.basename(text) != text or text in (".", "..")):
            self.bad(top["name"].line, f"name: expected a plain word, got {text!r}")
            return None
        return text

    def tokenizer(self, top: dict[str, Node]) -> str | None:
        """`base` or the model whose tokenizer files are copied; everything else is a feature to come."""
        if "tokenizer" in top and "tokenizer_source" in top:
            self.bad(top["tokenizer"].line, "give only one of 'tokenizer' and 'tokenizer_source'")
        node, where = top.get("tokenizer_source"), "tokenizer_source"
        if "tokenizer" in top and top["tokenizer"].kind == "map" and not top["tokenizer"].value:
            return "union"  # as mergekit reads it
        if "tokenizer" in top:
            parts = self.mapping(top["tokenizer"], "tokenizer", ["source", "tokens", "pad_to_multiple_of"])
            for key in ("tokens", "pad_to_multiple_of"):
                if key in parts:
                    self.bad(parts[key].line, f"tokenizer.{key}: {_TOKENIZER} is a coming feature of stockpot")
            node, where = parts.get("source"), "tokenizer.source"
        if node is None:
            return "union" if "tokenizer" in top else None
        ref = self.text_of(node, where)
        self.references += [node] if ref not in (None, "base", "union") else []
        return ref
