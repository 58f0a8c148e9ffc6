"""A suite: the YAML file that says on what a checkpoint is scored. Parsed strictly, like recipes; opens no data."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stockpot.errors import SuiteError, nearest, raise_problems
from stockpot.recipes.nodes import Node, parse_documents, read_yaml_text
from stockpot.recipes.reading import NodeReader, plain_value
from stockpot.runs.metrics import known_objective

__all__ = ["KINDS", "SPLITS", "Gate", "Kind", "Slice", "Suite", "is_device", "load_suite"]

SPLITS = ("selection", "report")


@dataclass(frozen=True)
class Kind:
    """A kind of evaluator: its options (True: must be given), and its metrics with their better direction.

    metrics  {} where only scoring tells which there are
    """

    options: Mapping[str, bool]
    metrics: Mapping[str, str] = field(default_factory=dict)
    metric: str | None = None
    data: bool = True


_TEXT = {"prompt": False, "answer": False, "template": False}
KINDS: dict[str, Kind] = {
    "loss": Kind({"field": False, "chunk": False, "max_length": False}, {"loss": "min", "perplexity": "min"}, "loss"),
    "perplexity": Kind({"field": False, "chunk": False, "max_length": False}, {"loss": "min", "perplexity": "min"}, "perplexity"),
    "exact_match": Kind(
        {**_TEXT, "max_new_tokens": False, "stop": False, "normalize": False, "extract": False},
        {"exact_match": "max", "length": "min", "truncated": "min"},
        "exact_match",
    ),
    "choice": Kind(
        {**_TEXT, "choices": False, "max_length": False},
        {"accuracy": "max", "accuracy_norm": "max", "loss": "min"},
        "accuracy",
    ),
    "harness": Kind({"task": True, "include_path": False, "num_fewshot": False, "limit": False}, metric="acc", data=False),
    "command": Kind({"command": True, "files": False}, data=False),
    "python": Kind({"function": True, "options": False, "files": False}, data=False),
}  # fmt: skip
_SLICE_KEYS = ["name", "kind", "data", "metric", "direction", "weight", "split", "timeout", "limit"]
_TOP_KEYS = "name base tokenizer dtype device batch_size timeout selection_share slices gates".split()
_GATE_KEYS = "slice min max reference expert max_drop max_drop_percent severity min_examples".split()
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Slice:
    """One thing to score.

    direction  "min" or "max": which values of `metric` are better
    weight     share in the suite's score; 0: reported, not counted
    split      "selection", "report", or "auto": its documents are divided between the two by their hashes
    options    those of its kind, as written
    """

    name: str
    kind: str
    metric: str
    direction: str
    weight: float = 1.0
    split: str = "auto"
    data: str | None = None
    limit: int | None = None
    timeout: float = 3600.0
    options: Mapping[str, Any] = field(default_factory=dict)
    line: int = 0


@dataclass(frozen=True)
class Gate:
    """One condition for release; exactly one of low, high (absolute) or reference (a regression) is its test.

    slice      a slice's name, or "score" for the suite's weighted score
    low, high  the least or the most that the metric may be
    reference  "base", "expert", "best_parent", or the path of a checkpoint
    max_drop   how much worse than the reference it may be: absolute, or in percent of the reference
    """

    slice: str
    low: float | None = None
    high: float | None = None
    reference: str | None = None
    max_drop: float | None = None
    percent: bool = False
    severity: str = "critical"
    min_examples: int = 30
    line: int = 0

    def describe(self) -> str:
        """In words: `code: at most 4.7`."""
        if self.reference is not None:
            drop = f"{self.max_drop:g}{' %' if self.percent else ''}"
            return f"{self.slice}: at most {drop} worse than {self.reference}"
        if self.low is not None:
            return f"{self.slice}: at least {self.low:g}"
        return f"{self.slice}: at most {self.high:g}"


@dataclass(frozen=True)
class Suite:
    """All of a suite's file. `digest` is of its text."""

    path: str
    text: str
    slices: tuple[Slice, ...]
    gates: tuple[Gate, ...] = ()
    name: str = ""
    base: str | None = None
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    batch_size: int = 16
    selection_share: float = 0.5

    @property
    def directory(self) -> str:
        """Where relative paths are looked for."""
        return os.path.dirname(os.path.abspath(self.path))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def direction(self) -> str:
        """Which values of the score are better: that of its slices, or "max" where they differ."""
        found = {s.direction for s in self.slices if s.weight}
        return found.pop() if len(found) == 1 else "max"

    def score(self, metrics: Mapping[str, float]) -> float:
        """The weighted mean over slices of `metrics[slice]`. Where directions differ, what is better low counts negative."""
        total = sum(s.weight for s in self.slices if s.name in metrics)
        return sum(self.sign(s) * s.weight * metrics[s.name] for s in self.slices if s.name in metrics) / total

    def sign(self, part: Slice) -> int:
        """-1 for a slice that counts negative in the score."""
        return 1 if part.direction == self.direction else -1

    def slice(self, name: str) -> Slice:
        return next(s for s in self.slices if s.name == name)

    def resolve(self, ref: str) -> str:
        """A checkpoint that the suite names: relative to its file where it is there, else as written (a Hub id)."""
        local = self.locate(ref)
        return local if os.path.exists(local) else ref

    def locate(self, path: str) -> str:
        """A path of the suite, relative to its file."""
        return os.path.normpath(os.path.join(self.directory, os.path.expanduser(path)))


def load_suite(path: str | os.PathLike[str]) -> Suite:
    """Read a suite's file. Raises SuiteError, or ProblemsError with everything that is wrong with it."""
    where = os.fspath(path)
    text = read_yaml_text(where, "a suite", SuiteError)
    return parse_suite(text, where)


def parse_suite(text: str, origin: str) -> Suite:
    """YAML text -> Suite; see load_suite."""
    documents = parse_documents(text, origin, "a suite", "slices", SuiteError)
    if len(documents) > 1:
        raise SuiteError(f"{origin}:{documents[1].line}: a suite is one YAML document")
    return _SuiteReader(text, origin).suite(documents[0])


def is_device(text: str) -> bool:
    """Whether it names where torch can run a model."""
    return re.fullmatch(r"cpu|mps|cuda(:\d+)?", text) is not None


class _SuiteReader(NodeReader):
    def bad(self, line: int, why: str) -> None:
        self.problems.append(SuiteError(f"{self.origin}:{line}: {why}"))

    def suite(self, node: Node) -> Suite:
        parts = self.mapping(node, "suite", _TOP_KEYS)
        slices: list[Slice] = []
        taken = {"score"}
        if "slices" not in parts:
            if node.kind == "map":
                self.bad(node.line, "suite: 'slices' is missing: a list of what to score")
        else:
            for i, child in enumerate(self.listing(parts["slices"], "slices")):
                made = self.slice(child, f"slices[{i}]", taken)
                if made is not None:
                    slices.append(made)
                    taken.add(made.name)
        top = _Values(self, parts, "suite")
        default = top.number("timeout", 3600.0, low=0.001)
        slices = [s if s.timeout > 0 else replace(s, timeout=default) for s in slices]
        names = [s.name for s in slices]
        gates = []
        if "gates" in parts:
            for i, child in enumerate(self.listing(parts["gates"], "gates")):
                gate = self.gate(child, f"gates[{i}]", names)
                if gate is not None:
                    gates.append(gate)
        device = top.text("device") or "cpu"
        if not is_device(device):
            self.bad(parts["device"].line, f"suite: device: expected cpu, cuda, cuda:N or mps, got {device!r}")
        suite = Suite(
            self.origin, self.text, tuple(slices), tuple(gates),
            name=top.text("name") or os.path.splitext(os.path.basename(self.origin))[0],
            base=top.text("base"), tokenizer=top.text("tokenizer"),
            dtype=top.choice("dtype", _DTYPES) or "auto", device=device,
            batch_size=top.whole("batch_size", 1) or 16,
            selection_share=top.number("selection_share", 0.5, low=0.01, high=0.99),
        )  # fmt: skip
        if slices and not any(s.weight for s in slices):
            self.bad(node.line, "suite: every slice has weight 0, so there is no score")
        raise_problems(self.problems)
        return suite

    def slice(self, node: Node, where: str, taken: Container[str]) -> Slice | None:
        if node.kind != "map":
            self.bad(node.line, f"{where}: expected a mapping with name, kind and data; got {node.what}")
            return None
        kind_node = next((v for k, _, v in node.value if k == "kind"), None)
        name_node = next((v for k, _, v in node.value if k == "name"), None)
        if kind_node is None:
            self.bad(node.line, f"{where}: 'kind' is missing: one of {', '.join(KINDS)}")
            return None
        if not isinstance(kind_node.value, str) or kind_node.value not in KINDS:
            self.bad(kind_node.line, f"{where}: kind: expected one of {', '.join(KINDS)}, got {kind_node.what}"
                     f"{nearest(str(kind_node.value), KINDS)}")  # fmt: skip
            return None
        kind = KINDS[kind_node.value]
        if name_node is not None and isinstance(name_node.value, str):
            where = f"slice {name_node.value!r}"
        parts = self.mapping(node, where, [*_SLICE_KEYS, *(o for o in kind.options if o not in _SLICE_KEYS)])
        values = _Values(self, parts, where)
        name = values.text("name")
        if name is None:
            if "name" not in parts:
                self.bad(node.line, f"{where}: 'name' is missing")
            return None
        if name in taken:
            self.bad(node.line, f"{where}: the name is taken{' (it stands for the suite)' if name == 'score' else ''}")
        if kind.data and "data" not in parts:
            self.bad(
                node.line,
                f"{where}: 'data' is missing: a file of {'text or ' if 'field' in kind.options else ''}JSON lines",
            )
        if not kind.data and "data" in parts:
            self.bad(parts["data"].line, f"{where}: kind {kind_node.value} takes no data of its own")
        for option, needed in kind.options.items():
            if needed and option not in parts:
                self.bad(node.line, f"{where}: kind {kind_node.value} needs {option!r}")
        if kind_node.value in ("command", "python") and "limit" in parts:
            self.bad(parts["limit"].line, f"{where}: limit: a {kind_node.value} chooses its examples by itself")
        if "template" in parts and "prompt" in parts:
            self.bad(parts["prompt"].line, f"{where}: prompt has no effect beside template: remove one")
        metric, direction = self.metric(kind_node.value, kind, values, node.line, where)
        options = {o: plain_value(parts[o]) for o in kind.options if o in parts}
        self.check_options(kind_node.value, options, parts, where)
        split = values.choice("split", (*SPLITS, "auto"))
        if split is None:
            split = "auto"
        if kind_node.value == "command" and split == "auto" and "{split}" not in str(options.get("command", "")):
            self.bad(node.line, f"{where}: what a command scores can't be divided: give split: selection or report, or pass "
                     "{split} to the command")  # fmt: skip
        return Slice(
            name, kind_node.value, metric, direction, weight=values.number("weight", 1.0, low=0.0), split=split,
            data=values.text("data"), limit=values.whole("limit", 1), timeout=values.number("timeout", 0.0, low=0.001),
            options=options, line=node.line,
        )  # fmt: skip

    def metric(self, kind_name: str, kind: Kind, values: _Values, line: int, where: str) -> tuple[str, str]:
        metric = values.text("metric") or kind.metric
        if metric is None:
            self.bad(line, f"{where}: 'metric' is missing: which of the numbers that the {kind_name} gives counts")
            metric = "?"
        if kind.metrics and metric not in kind.metrics:
            at = values.parts["metric"].line
            known = ", ".join(kind.metrics)
            self.bad(at, f"{where}: metric: {kind_name} has {known}; got {metric!r}{nearest(metric, kind.metrics)}")
        direction = values.choice("direction", ("min", "max"))
        natural = kind.metrics.get(metric) or known_objective(metric)
        if direction is None and natural is None and metric != "?":
            self.bad(
                line,
                f"{where}: whether a low or a high {metric!r} is better can't be told from its name: give direction",
            )
        return metric, direction or natural or "max"

    def check_options(self, kind: str, options: Mapping[str, Any], parts: Mapping[str, Node], where: str) -> None:
        whole = {"chunk": 16, "max_length": 2, "max_new_tokens": 1, "num_fewshot": 0}
        for key, value in options.items():
            line = parts[key].line
            if key in whole:
                if isinstance(value, bool) or not isinstance(value, int) or value < whole[key]:
                    self.bad(line, f"{where}: {key}: expected a whole number of at least {whole[key]}, got {value!r}")
            elif key in ("stop", "normalize", "files"):
                items = value if isinstance(value, list) else [value]
                if not items or not all(isinstance(v, str) and v for v in items):
                    self.bad(line, f"{where}: {key}: expected text or a list of texts, got {value!r}")
                elif key == "normalize":
                    for v in items:
                        if v not in NORMALIZERS:
                            self.bad(
                                line,
                                f"{where}: normalize: expected {', '.join(NORMALIZERS)}, got {v!r}{nearest(v, NORMALIZERS)}",
                            )
            elif key == "options":
                if not isinstance(value, dict):
                    self.bad(line, f"{where}: options: expected a mapping, got {value!r}")
            elif key != "limit" and (not isinstance(value, str) or not value.strip()):
                self.bad(line, f"{where}: {key}: expected text, got {value!r}")
            elif key == "extract":
                try:
                    re.compile(value)
                except re.error as e:
                    self.bad(line, f"{where}: extract: not a regular expression: {e}")
            elif key == "function" and not re.fullmatch(r"[\w.]+:[\w.]+", value):
                self.bad(line, f"{where}: function: expected module:name, got {value!r}")

    def gate(self, node: Node, where: str, names: list[str]) -> Gate | None:
        parts = self.mapping(node, where, _GATE_KEYS)
        values = _Values(self, parts, where)
        name = values.text("slice")
        if name is None:
            if "slice" not in parts:
                self.bad(node.line, f"{where}: 'slice' is missing: a slice's name, or 'score'")
            return None
        if name not in names and name != "score":
            self.bad(parts["slice"].line, f"{where}: slice: there is no slice {name!r}; known are {', '.join([*names, 'score'])}"
                     f"{nearest(name, [*names, 'score'])}")  # fmt: skip
        reference = values.text("reference")
        if "expert" in parts:
            if reference not in (None, "expert"):
                self.bad(parts["expert"].line, f"{where}: expert and reference: {reference} contradict each other")
            reference = values.text("expert")
        elif reference == "expert":
            self.bad(
                parts["reference"].line, f"{where}: reference: expert needs 'expert', the checkpoint to compare with"
            )
        tests = [k for k in ("min", "max") if k in parts] + (["reference"] if reference else [])
        if len(tests) != 1:
            self.bad(node.line, f"{where}: expected exactly one of min, max, or reference with max_drop; got "
                     f"{' and '.join(tests) or 'none'}")  # fmt: skip
        drops = [k for k in ("max_drop", "max_drop_percent") if k in parts]
        if reference and len(drops) != 1:
            self.bad(node.line, f"{where}: a reference needs max_drop or max_drop_percent: how much worse it may be")
        if drops and not reference:
            self.bad(parts[drops[0]].line, f"{where}: {drops[0]} needs a reference: base, best_parent, or a checkpoint")
        return Gate(
            name, low=values.number("min", None), high=values.number("max", None), reference=reference,
            max_drop=values.number(drops[0], None, low=0.0) if drops else None, percent=drops == ["max_drop_percent"],
            severity=values.choice("severity", ("critical", "warning")) or "critical",
            min_examples=values.whole("min_examples", 0, 30), line=node.line,
        )  # fmt: skip


NORMALIZERS = ("strip", "lower", "spaces", "punctuation", "articles", "numbers")


class _Values:
    """Single values of a mapping, checked."""

    def __init__(self, reader: NodeReader, parts: Mapping[str, Node], where: str) -> None:
        self.reader, self.parts, self.where = reader, parts, where

    def text(self, key: str) -> str | None:
        node = self.parts.get(key)
        if node is None:
            return None
        if node.kind == "scalar" and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            return node.text
        return self.reader.text_of(node, f"{self.where}: {key}")

    def choice(self, key: str, known: tuple[str, ...]) -> str | None:
        node = self.parts.get(key)
        if node is None:
            return None
        if node.value not in known:
            hint = nearest(node.value, known) if isinstance(node.value, str) else ""
            self.reader.bad(
                node.line, f"{self.where}: {key}: expected one of {', '.join(known)}, got {node.what}{hint}"
            )
            return None
        return str(node.value)

    def number(self, key: str, default: Any, low: float | None = None, high: float | None = None) -> Any:
        node = self.parts.get(key)
        if node is None:
            return default
        v = node.value
        if isinstance(v, bool) or not isinstance(v, (int, float)) or not abs(v) < 1e300:
            self.reader.bad(node.line, f"{self.where}: {key}: expected a number, got {node.what}")
            return default
        if (low is not None and v < low) or (high is not None and v > high):
            span = f"from {low:g} to {high:g}" if high is not None else f"of at least {low:g}"
            self.reader.bad(node.line, f"{self.where}: {key}: expected a number {span}, got {v!r}")
            return default
        return float(v)

    def whole(self, key: str, low: int, default: int | None = None) -> Any:
        node = self.parts.get(key)
        if node is None:
            return default
        v = node.value
        if isinstance(v, bool) or not isinstance(v, int) or v < low:
            self.reader.bad(
                node.line, f"{self.where}: {key}: expected a whole number of at least {low}, got {node.what}"
            )
            return default
        return v
