"""Typed mutations: the JSON and YAML that stockpot reads, with values of other types, odd texts and numbers in any place.

Each target may raise nothing but a StockpotError with a message. Used by tests/test_hostile.py and benchmarks/attack.py.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

import stockpot
from stockpot.api import pages
from stockpot.cli.main import app
from stockpot.engine.verify import compare
from stockpot.errors import StockpotError
from stockpot.evaluation.parts import open_parts
from stockpot.evaluation.suite import load_suite
from stockpot.lineage import read_lineage
from stockpot.runs import SoupSpec, open_run

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e308, float("nan"), float("inf"), 10**400, 10**19, -(10**30), "", "x", "\ud800",
    "\x00", "a\nb", "../..", "/etc", "*", "(", "(a+)+$", "[", {}, [], [[]], [None], {"": None}, {"a": {"b": []}}, [1, "x"], "1",
    "nan", "-inf", "None", [0] * 50, "é" * 300, "bfloat16", "LORA", {"model.layers.0": 1}, "\x1b]0;x\x07", [[[[[[[[[[[]]]]]]]]]]],
]  # fmt: skip


def _paths(doc: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    for key in doc if isinstance(doc, dict) else range(len(doc)) if isinstance(doc, list) else ():
        yield from _paths(doc[key], (*at, key))


def mutated(rnd: random.Random, doc: Any) -> Any:
    """A copy with one to three places changed."""
    doc = copy.deepcopy(doc)
    for _ in range(rnd.choice((1, 1, 1, 2, 3))):
        at = rnd.choice(list(_paths(doc)))
        if not at:
            if rnd.random() < 0.1:
                return copy.deepcopy(rnd.choice(ODD))
            continue
        owner = doc
        for key in at[:-1]:
            owner = owner[key]
        kind = rnd.random()
        if kind < 0.75:
            owner[at[-1]] = copy.deepcopy(rnd.choice(ODD))
        elif kind < 0.85:
            del owner[at[-1]]
        elif isinstance(owner, dict):
            owner[str(rnd.choice(ODD))] = owner.pop(at[-1])
        else:
            owner.insert(0, copy.deepcopy(rnd.choice(ODD)))
        if not isinstance(doc, (dict, list)):
            break
    return doc


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 16,
    "tie_word_embeddings": True, "torch_dtype": "float32", "text_config": {"tie_word_embeddings": False, "num_hidden_layers": 2},
    "auto_map": {"AutoModel": "x.Y"}, "layer_types": ["full_attention", "full_attention"], "_name_or_path": "a/b",
    "quantization_config": None, "id2label": {"0": "x"},
}  # fmt: skip
FP8 = {
    **CONFIG,
    "quantization_config": {
        "quant_method": "fp8", "weight_block_size": [4, 4], "format": "float",
        "config_groups": {"g": {"weights": {"block_structure": [4, 4]}}},
    },
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "bias": "none",
    "alpha_pattern": {"layers.0": 8}, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None,
    "init_lora_weights": True, "task_type": "CAUSAL_LM", "target_parameters": None, "base_model_name_or_path": "a",
}  # fmt: skip
STATE = {
    "global_step": 30, "max_steps": 30, "best_metric": 1.0, "best_model_checkpoint": "checkpoint-20",
    "log_history": [{"step": s, "loss": 3.0 / s, "eval_loss": 1.0, "epoch": 0.1} for s in (10, 20, 30)]
    + [{"step": 30, "train_runtime": 3.0}],
}  # fmt: skip
SUITE = {
    "name": "s", "base": "a", "device": "cpu",
    "slices": [{"name": "l", "kind": "likelihood", "data": "docs.jsonl", "metric": "loss", "direction": "min", "weight": 1,
                "split": "selection", "limit": 5, "timeout": 10}],
    "gates": [{"metric": "loss", "max": 3, "severity": "critical"}],
}  # fmt: skip
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    "added_tokens": [{"id": 2, "content": "<s>"}],
}


def _model(
    path: Path, tensors: dict[str, tuple[str, list[int], bytes]], config: Any, name: str = "model.safetensors"
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    doc: dict[str, Any] = {}
    parts = []
    for key, (dtype, shape, raw) in tensors.items():
        at = sum(map(len, parts))
        doc[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        parts.append(raw)
    head = json.dumps(doc).encode()
    (path / name).write_bytes(struct.pack("<Q", len(head)) + head + b"".join(parts))
    _dump(path / ("config.json" if name.startswith("model") else "adapter_config.json"), config)
    return path


def _dump(path: Path, doc: Any) -> None:
    path.write_text(json.dumps(doc), encoding="utf-8", errors="surrogatepass")


def _f32(*shape: int) -> tuple[str, list[int], bytes]:
    return "F32", list(shape), np.random.default_rng(len(shape)).standard_normal(shape).astype("<f4").tobytes()


class World:
    """Models, adapters, a run, an output and a sweep in a folder, each of whose documents can be mutated."""

    def __init__(self, folder: Path) -> None:
        self.d = folder
        tensors = {"model.embed_tokens.weight": _f32(16, 8), "lm_head.weight": _f32(16, 8)}
        tensors |= {f"model.layers.{i}.self_attn.q_proj.weight": _f32(8, 8) for i in range(2)}
        self.tensors = tensors
        for name in "ab":
            _model(folder / name, tensors, CONFIG)
        scale = {
            "model.layers.0.w.weight": ("F8_E4M3", [8, 8], bytes(range(64))),
            "model.layers.0.w.weight_scale_inv": _f32(2, 2),
        }
        _model(folder / "f", scale, FP8)
        factors = {
            f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight": _f32(*s)
            for i in range(2) for x, s in (("A", (2, 8)), ("B", (8, 2)))
        }  # fmt: skip
        for name in "xy":
            _model(folder / name, factors, ADAPTER, "adapter_model.safetensors")
        for step in (10, 20, 30):
            _model(folder / f"run/checkpoint-{step}", tensors, CONFIG)
        self.linear("b", "b", out="out")
        self.lineage = json.loads((folder / "out/stockpot.json").read_text())
        (folder / "docs.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')

    def linear(self, *names: str, out: str = "merged", **more: Any) -> None:
        recipe = {"merge_method": "linear", "models": [str(self.d / n) for n in names], **more}
        stockpot.merge(recipe, self.d / out, overwrite=(self.d / out).exists())

    def command(self, *words: str) -> None:
        result = CliRunner().invoke(app, [w.format(d=self.d) for w in words])
        assert result.exit_code != 1, result.output[-1500:]

    # targets

    def config(self, change: Callable[[Any], Any]) -> None:
        _dump(self.d / "a/config.json", change(CONFIG))
        stockpot.inspect(self.d / "a")
        self.linear("a", "b")

    def config_of_slices(self, change: Callable[[Any], Any]) -> None:
        _dump(self.d / "a/config.json", change(CONFIG))
        source = [{"sources": [{"model": str(self.d / "a"), "layer_range": [0, 1]}]}] * 3
        stockpot.plan({"merge_method": "passthrough", "slices": source})

    def fp8(self, change: Callable[[Any], Any]) -> None:
        _dump(self.d / "f/config.json", change(FP8))
        self.linear("f", "f")

    def adapter(self, change: Callable[[Any], Any]) -> None:
        _dump(self.d / "x/adapter_config.json", change(ADAPTER))
        _dump(self.d / "a/config.json", CONFIG)
        _each(
            lambda: self.linear("x", "y"),
            lambda: self.linear("x", "y", adapter="product"),
            lambda: self.linear("a+{x}".format(x=self.d / "x"), out="fused"),
            lambda: self.command("inspect", "{d}/a+{d}/x"),
        )

    def state(self, change: Callable[[Any], Any]) -> None:
        _dump(self.d / "run/trainer_state.json", change(STATE))
        run = open_run(self.d / "run")
        specs = (
            SoupSpec(last=2),
            SoupSpec(last=2, by="loss", penalty=0.7),
            SoupSpec(by="eval_loss"),
            SoupSpec(last=2, by="step"),
        )
        _each(*(lambda s=s: stockpot.soup(run, self.d / "soup", s, overwrite=True) for s in specs))  # type: ignore[misc]

    def state_shown(self, change: Callable[[Any], Any]) -> None:
        _dump(self.d / "run/trainer_state.json", change(STATE))
        self.command("run", "show", "{d}/run")

    def lineage_read(self, change: Callable[[Any], Any]) -> None:
        _dump(self.d / "out/stockpot.json", change(self.lineage))
        try:
            _each(
                lambda: compare(*read_lineage(str(self.d / "out")), 1),
                lambda: self.command("verify", "{d}/out"),
                lambda: stockpot.plan({"merge_method": "linear", "models": [str(self.d / "out")]}),
            )
        finally:
            _dump(self.d / "out/stockpot.json", self.lineage)

    def suite(self, change: Callable[[Any], Any]) -> None:
        _dump(self.d / "suite.yml", change(SUITE))
        open_parts(load_suite(self.d / "suite.yml"), light=True)

    def modules(self, change: Callable[[Any], Any]) -> None:
        _dump(self.d / "b/modules.json", change([{"idx": 0, "path": "1_Pooling", "type": "x"}, {"path": "2_Dense"}]))
        try:
            self.linear("b", "b")
        finally:
            (self.d / "b/modules.json").unlink()

    def pipeline(self, change: Callable[[Any], Any]) -> None:
        _dump(
            self.d / "b/model_index.json", change({"_class_name": "X", "unet": ["diffusers", "Y"], "vae": [None, None]})
        )
        try:
            self.linear("b", "b")
        finally:
            (self.d / "b/model_index.json").unlink()

    def index(self, change: Callable[[Any], Any]) -> None:
        folder = self.d / "s"
        shutil.rmtree(folder, ignore_errors=True)
        for n, name in (("1", "a"), ("2", "b")):
            _model(folder, {name: _f32(2)}, {}, f"model{n}.safetensors")
        weight_map = {"a": "model1.safetensors", "b": "model2.safetensors"}
        _dump(
            folder / "model.safetensors.index.json", change({"metadata": {"total_size": 16}, "weight_map": weight_map})
        )
        stockpot.inspect(folder)

    def tokenizer(self, change: Callable[[Any], Any]) -> None:
        for name, doc in (("a", change(TOKENIZER)), ("b", TOKENIZER)):
            _dump(self.d / name / "tokenizer.json", doc)
        _dump(self.d / "a/added_tokens.json", change({"<s>": 2}))
        _dump(self.d / "a/config.json", CONFIG)
        try:
            _each(lambda: self.linear("a", "b"), lambda: self.linear("b", "a", vocab="crop"))
        finally:
            for name in ("a/tokenizer.json", "b/tokenizer.json", "a/added_tokens.json"):
                (self.d / name).unlink()

    def metrics(self, change: Callable[[Any], Any]) -> None:
        rows = [change({"step": s, "loss": 1.0, "x": {"y": 1}}) for s in (10, 20, 30)]
        text = "\n".join(json.dumps(r) for r in rows)
        (self.d / "m.jsonl").write_text(text, errors="replace")
        _dump(self.d / "run/trainer_state.json", STATE)
        run = open_run(self.d / "run", metrics=self.d / "m.jsonl")
        stockpot.soup(run, self.d / "soup", SoupSpec(last=2, by="loss", penalty=0.7), overwrite=True)

    def recipe(self, change: Callable[[Any], Any]) -> None:
        parameters = {"weight": [0.1, 0.5], "density": 0.5}
        other = {"weight": [{"filter": "self_attn", "value": 0.5}, {"value": 1}]}
        b = str(self.d / "b")
        found = change(
            {
                "merge_method": "ties", "base_model": b, "dtype": "bfloat16", "include": ["*"], "exclude": ["*lm_head*"],
                "models": [{"model": b, "parameters": parameters}, {"model": b, "parameters": other}],
                "parameters": {"normalize": True, "lambda": 1}, "tokenizer_source": "base", "absent": "skip",
                "rules": [{"match": "*norm*", "merge_method": "linear"}],
            }
        )  # fmt: skip
        if isinstance(found, dict):
            stockpot.merge(found, self.d / "merged", overwrite=(self.d / "merged").exists())

    def sweep_store(self, change: Callable[[Any], Any]) -> None:
        from stockpot.search import store

        folder = self.d / "sweep"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        db = sqlite3.connect(folder / "sweep.sqlite")
        db.executescript(store._TABLES)
        suite = {"text": "slices: [{name: a, kind: loss, data: x}]\n", "path": "s.yml"}
        meta = change(
            {
                "format": 1,
                "suite": suite,
                "run": [str(self.d / "run"), None, None],
                "gates": None,
                "keys": {"a selection": "k"},
            }
        )
        for key, value in (meta if isinstance(meta, dict) else {}).items():
            db.execute(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                (str(key).encode("utf-8", "replace").decode(), json.dumps(value)),
            )
        row = change(
            [{"recipe": {"merge_method": "linear", "models": ["a"]}, "settings": {"k": 2}, "weights": {"10": 1.0}}]
        )
        found = row[0] if isinstance(row, list) and row and isinstance(row[0], dict) else {}
        kept = [json.dumps(found.get(k)) for k in ("recipe", "settings", "weights")]
        db.execute("INSERT INTO candidates VALUES ('c', 0, 's', ?, ?, ?, 0, 'd', 1.0, NULL)", kept)
        db.execute(
            "INSERT INTO scores VALUES ('d', 'k', 'a', 'selection', ?, ?, 1, 1)",
            (json.dumps(change({"loss": 1.0})), b"no zip"),
        )
        db.commit()
        db.close()
        pages.report(folder)

    def run(self, name: str, rnd: random.Random) -> None:
        """One mutation of one target. Raises what is no StockpotError, and ValueError for one without a message."""
        _each(lambda: getattr(self, name)(lambda doc: mutated(rnd, doc)))


def _each(*calls: Callable[[], object]) -> None:
    for call in calls:
        try:
            call()
        except StockpotError as e:
            if not str(e):
                raise ValueError("an error without a message") from e


TARGETS = (
    "config", "config_of_slices", "fp8", "adapter", "state", "state_shown", "lineage_read", "suite", "modules", "pipeline",
    "index", "tokenizer", "metrics", "recipe", "sweep_store",
)  # fmt: skip
