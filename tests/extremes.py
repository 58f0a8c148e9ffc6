"""Small files that ask for much: each under a mebibyte, made for one reader, which refuses or opens them within a budget.

Used by tests/test_limits.py. A maker writes into an empty folder and returns what is to be called; that may raise nothing but a
StockpotError.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stockpot
from stockpot.api import pages
from stockpot.api.looking import inspect
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.engine.verify import compare
from stockpot.evaluation.suite import parse_suite
from stockpot.lineage import read_lineage
from stockpot.recipes import parse_recipe
from stockpot.runs import open_run

Action = Callable[[], object]
MOST = 2**20

MAKERS: dict[str, Callable[[Path], Action]] = {}


def made(call: Callable[[Path], Action]) -> Callable[[Path], Action]:
    MAKERS[call.__name__] = call
    return call


# safetensors


def safetensors(path: Path, names: dict[str, list[int]], dtype: str = "U8", metadata: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    doc: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, shape in names.items():
        size = {"U8": 1, "F32": 4, "F8_E4M3": 1}[dtype]
        for n in shape:
            size *= n
        doc[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(doc, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(at))
    return path


def opened(path: Path) -> Action:
    """Everything that is asked of a checkpoint before a merge."""

    def act() -> None:
        checkpoint = open_checkpoint(path)
        checkpoint.layers(), checkpoint.ties, checkpoint.parameters
        inspect(path)
        recipe: dict[str, Any] = {"merge_method": "linear", "models": [str(path)]}
        stockpot.plan(recipe)

    return act


def config(folder: Path, **keys: Any) -> Path:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **keys})
    )
    return folder


@made
def many_tensors(f: Path) -> Action:
    safetensors(f / "model.safetensors", {f"a{i}": [0, 1] if i else [1] for i in range(14_500)})
    return opened(f)


@made
def names_of_many_numbers(f: Path) -> Action:
    safetensors(f / "model.safetensors", {f"{i}." + "0." * 490 + "w": [1] for i in range(900)})
    return opened(config(f))


@made
def one_long_name(f: Path) -> Action:
    safetensors(f / "model.safetensors", {"0." * 450_000 + "w": [1]})
    return opened(f)


@made
def many_heads(f: Path) -> Action:
    safetensors(f / "model.safetensors", {f"m{i}.lm_head.weight": [1] for i in range(11_000)})
    return opened(config(f, tie_word_embeddings=True))


@made
def many_embeddings(f: Path) -> Action:
    names = {f"m{i}.embed_tokens.weight": [1 + i % 7] for i in range(7000)} | {
        f"m{i}.lm_head.weight": [9] for i in range(4000)
    }
    safetensors(f / "model.safetensors", names)
    return opened(config(f, tie_word_embeddings=True))


@made
def many_dimensions(f: Path) -> Action:
    safetensors(f / "model.safetensors", {"w": [1] * 240_000})
    return opened(f)


@made
def many_experts(f: Path) -> Action:
    names = {
        f"model.layers.0.mlp.experts.{i}.{p}_proj.weight": [1] for i in range(3000) for p in ("up", "gate", "down")
    }
    safetensors(f / "model.safetensors", names)
    return opened(config(f, model_type="mixtral", architectures=["MixtralForCausalLM"]))


@made
def names_like_patterns(f: Path) -> Action:
    """Names on which the table's own patterns could go wrong."""
    names = {f"{i}." + "mlp.experts." * 20 + "0.gate_proj.x": [1] for i in range(2500)}
    safetensors(f / "model.safetensors", names)
    return opened(config(f, model_type="pi0", architectures=["PI0ForConditionalGeneration"]))


@made
def two_of_different_names(f: Path) -> Action:
    for n, start in (("a", "x."), ("b", "y.z.")):
        safetensors(f / n / "model.safetensors", {f"{start}{i % 97}.{i}.w": [1] for i in range(9000)})
        config(f / n)
    return lambda: stockpot.plan({"merge_method": "linear", "models": [str(f / "a"), str(f / "b")]})


@made
def fp8_and_scales(f: Path) -> Action:
    raw = {f"l{i}.weight": {"dtype": "F8_E4M3", "shape": [1, 1], "data_offsets": [i, i + 1]} for i in range(5000)}
    at = len(raw)
    for i in range(5000):
        raw[f"l{i}.weight_scale"] = {"dtype": "F32", "shape": [1], "data_offsets": [at + 4 * i, at + 4 * i + 4]}
    text = json.dumps(raw, separators=(",", ":")).encode()
    (f / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at + 20_000))
    return opened(config(f, quantization_config={"quant_method": "fp8", "weight_block_size": [10**30, -1]}))


@made
def deep_metadata(f: Path) -> Action:
    raw = b'{"__metadata__":' + b"[" * 400_000 + b"]" * 400_000 + b"}"
    (f / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    return opened(f)


@made
def numbers_of_many_digits(f: Path) -> Action:
    raw = b'{"w":{"dtype":"U8","shape":[' + b"9" * 900_000 + b'],"data_offsets":[0,1]}}'
    (f / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"x")
    return opened(f)


@made
def an_index_of_many(f: Path) -> Action:
    weight_map = {f"w{i}": f"m{i}.safetensors" for i in range(20_000)}
    (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return opened(f)


# torch's files


def torch_file(path: Path, pickled: bytes, more: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", pickled)
        for name, data in (more or {}).items():
            z.writestr(name, data)
    return path


def a_pickle(name: str, body: bytes) -> None:
    def make(f: Path) -> Action:
        return opened(torch_file(f / "model.bin", b"\x80\x02" + body, {"archive/data/0": b"\0" * 16}))

    MAKERS[f"pickle_{name}"] = make


_TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x04tQK\x00"
)

a_pickle("nested_tuple_key", b"}" + b")" + b"\x85" * 900_000 + b"Ns.")
a_pickle("doubled_tuple_key", b"})" + b"2\x86" * 60 + b"Ns.")
a_pickle("doubled_tuple_in_a_set", b"\x8f(" + b")" + b"2\x86" * 60 + b"\x90.")
a_pickle("memo", b"}r\x00\x00\xd7\x17.")
a_pickle("memo_put", b"}p400000000\n.")
a_pickle("many_sets", b"(" + b"\x8f" * 900_000 + b"t.")
a_pickle("many_dictionaries", b"(" + b"}" * 900_000 + b"t.")
a_pickle("many_lists", b"(" + b"]" * 900_000 + b"l.")
a_pickle("many_classes", b"(" + b"ca\nb\n" * 150_000 + b"t.")
a_pickle("many_tables", b"(ccollections\nOrderedDict\nq\x00)R" + b"h\x00)R" * 220_000 + b"t.")
a_pickle("many_objects", b"(ca\nb\nq\x00)R" + b"h\x00)R" * 220_000 + b"t.")
a_pickle("many_new_objects", b"(ca\nb\nq\x00)\x81" + b"h\x00)\x81" * 220_000 + b"t.")
a_pickle("a_deep_list", b"]" * 450_000 + b"a" * 449_999 + b".")
a_pickle("a_deep_dictionary", b"}" + b"X\x01\x00\x00\x00a}" * 130_000 + b"s" * 130_000 + b".")
a_pickle("a_long_number", b"}\x8b" + struct.pack("<I", 900_000) + b"\x7f" * 900_000 + b"Ns.")
a_pickle("a_number_as_text", b"}I" + b"9" * 900_000 + b"\nNs.")
a_pickle("bytes_that_are_not_there", b"}\x96" + struct.pack("<Q", 2**40) + b".")
a_pickle("text_that_is_not_there", b"}X" + struct.pack("<I", 2**32 - 1) + b".")
a_pickle("keys_in_itself", b"}q\x00X\x01\x00\x00\x00ah\x00s.")
a_pickle("marks", b"(" * 900_000 + b".")
a_pickle("copies", b"}" + b"2" * 900_000 + b".")
a_pickle(
    "long_shapes",
    b"}X" + struct.pack("<I", 400_000) + b"a" * 400_000 + b"q\x01(" + b"".join(
        b"X\x06\x00\x00\x00%06d" % i + _TENSOR + b"h\x01h\x01tR" for i in range(2000)
    ) + b"u.",
)  # fmt: skip
_AGAIN = b"".join(b"X\x06\x00\x00\x00%06dh\x05" % i for i in range(60_000))


@made
def one_tensor_under_many_names(f: Path) -> Action:
    pickled = b"\x80\x02}(X\x01\x00\x00\x00a" + _TENSOR + b"K\x04\x85K\x01\x85tRq\x05" + _AGAIN + b"u."
    torch_file(f / "model.bin", pickled, {"archive/data/0": b"\0" * 16})
    return lambda: open_checkpoint(f).ties


a_pickle(
    "names_of_a_megabyte", b"}X" + struct.pack("<I", 900_000) + b"a." * 450_000 + _TENSOR + b"K\x04\x85K\x01\x85tRs."
)


# what the walks over a document meet

_HEAD = b"\x80\x02"


def _text(text: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text


def _doubled(times: int) -> bytes:
    return b")" + b"2\x86" * times


a_pickle("a_tensor_with_a_deep_offset_as_key", b"}" + _TENSOR[:-2] + b")" + b"\x85" * 800_000 + b")" + b")" + b"tRNs.")
a_pickle("a_tensor_with_a_doubled_offset_as_key", b"}" + _TENSOR[:-2] + _doubled(60) + b")" + b")" + b"tRNs.")
a_pickle("a_class_of_a_long_name", b"(" + _text(b"torch" + b"a" * 400_000) + b"q\x01"
         + _text(b"_rebuild" + b"b" * 400_000) + b"q\x02" + b"h\x01h\x02\x93" * 9000 + b"t.")  # fmt: skip
a_pickle("mappings_that_fan_out", b"}q\x01" + _text(b"w") + _TENSOR + b"K\x04\x85K\x01\x85tRs" + b"".join(
    b"q\x02}(" + b"".join(_text(b"%d" % k) + b"h\x02" for k in range(10)) + b"u" for _ in range(8)) + b".")  # fmt: skip
a_pickle("empty_mappings_that_fan_out", b"}q\x01" + b"".join(
    b"q\x02}(" + b"".join(_text(b"%d" % k) + b"h\x02" for k in range(10)) + b"u" for _ in range(8)) + b".")  # fmt: skip
a_pickle("lists_that_fan_out", b"]q\x02" + b"".join(b"](" + b"h\x02" * 20 + b"eq\x02" for _ in range(12))
         + b"q\x03}" + _text(b"optimizer") + b"}" + _text(b"x") + b"h\x03ss.")  # fmt: skip
a_pickle(
    "a_long_key_of_many",
    _text(b"k" * 400_000) + b"q\x01}(" + b"".join(_text(b"%06d" % i) + b"}h\x01}ss" for i in range(9000)) + b"u.",
)
a_pickle(
    "a_long_list_of_many",
    b"](" + b"K\x01" * 300_000 + b"eq\x01}(" + b"".join(_text(b"%06d" % i) + b"h\x01" for i in range(20_000)) + b"u.",
)

_CALL = b"ctorch._utils\n_rebuild_tensor_v2\nq\x07" + _TENSOR.partition(b"_rebuild_tensor_v2\n")[2][1:-2] + b"q\x08"
a_pickle("long_shapes_of_many", b"(" + b"K\x01" * 64 + b"lq\x01" + b"(" + _CALL + b"K\x00h\x01h\x01tq\x09"
         + b"(" + b"h\x07h\x09R" * 120_000 + b"t.")  # fmt: skip


@made
def a_score_that_is_none(f: Path) -> Action:
    """Lightning's callbacks, with scores whose places make no sense."""
    (f / "run").mkdir()
    for n, offset in enumerate((b"X\x01\x00\x00\x00a", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff")):
        score = _TENSOR[:-2] + offset + b"))tR"
        state = b"}(" + _text(b"monitor") + _text(b"loss") + _text(b"current_score") + score + b"u"
        weights = _text(b"state_dict") + b"}" + _text(b"w") + _TENSOR + b"K\x04\x85K\x01\x85tRs"
        body = _HEAD + b"}(" + weights + _text(b"callbacks") + b"}" + _text(b"c") + state + b"su."
        torch_file(f / f"run/epoch={n}-step={n}.ckpt", body, {"archive/data/0": b"\0" * 16})
    return lambda: (open_run(f / "run"), opened(f / "run/epoch=1-step=1.ckpt")())


@made
def a_zip_of_many(f: Path) -> Action:
    return opened(torch_file(f / "model.bin", b"\x80\x02}.", {f"archive/data/{i}": b"" for i in range(8000)}))


@made
def a_zip_that_swells(f: Path) -> Action:
    with zipfile.ZipFile(f / "model.bin", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", b"\0" * 500_000_000)
    return opened(f / "model.bin")


@made
def a_run_of_such_files(f: Path) -> Action:
    for step in range(1, 9):
        (f / f"checkpoint-{step}").mkdir()
        torch_file(f / f"checkpoint-{step}/pytorch_model.bin", b"\x80\x02}r\x00\x00\xd7\x17.")
    return lambda: open_run(f)


# configs and what lies beside


def a_json(name: str, text: str, **keys: Any) -> None:
    def make(f: Path) -> Action:
        file, _, _ = name.partition(":")
        safetensors(f / "model.safetensors", {f"model.layers.{i}.w": [1] for i in range(4)})
        config(f, **keys)
        (f / file).parent.mkdir(parents=True, exist_ok=True)
        (f / file).write_text(text)
        slices = [{"sources": [{"model": str(f), "layer_range": [0, 2]}]}]

        def act() -> None:
            try:
                opened(f)()
            finally:
                stockpot.plan({"merge_method": "passthrough", "slices": slices})

        return act

    MAKERS[f"json_{name}"] = make


for _name in ("config.json", "modules.json", "model_index.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
              "router_config.json"):  # fmt: skip
    a_json(f"{_name}:deep", "[" * 450_000 + "]" * 450_000)
    a_json(f"{_name}:deep_mappings", '{"a":' * 150_000 + "1" + "}" * 150_000)
    a_json(f"{_name}:wide", json.dumps({f"k{i}_config": {} for i in range(40_000)}))
    a_json(f"{_name}:a_number", '{"num_hidden_layers": ' + "9" * 900_000 + "}")
_DEEPSEEK = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 4}
_QWEN = {"model_type": "qwen3", "num_hidden_layers": 4}
_KEYS = (
    "num_hidden_layers",
    "first_k_dense_replace",
    "full_attention_interval",
    "num_nextn_predict_layers",
    "vocab_size",
)
for _count in (10**9, 10**300, -1, 4.5):
    for _key in _KEYS:
        a_json(f"config.json:{_key}_{_count:.3g}", json.dumps({**_DEEPSEEK, _key: _count}))
a_json("config.json:lists", json.dumps({**_QWEN, "layer_types": ["full_attention"] * 40_000}))
_PARTS = {f"p{i}_config": {"text_config": {}} for i in range(9000)}
a_json("config.json:nested_parts", json.dumps({"model_type": "llava", **_PARTS}))
a_json("modules.json:many", json.dumps([{"path": f"{i}_Dense"} for i in range(30_000)]))
a_json("model_index.json:many", json.dumps({f"part{i}": ["diffusers", "X"] for i in range(25_000)}))


@made
def a_sentencepiece_number_without_end(f: Path) -> Action:
    for n in "ab":
        safetensors(f / n / "model.safetensors", {"model.embed_tokens.weight": [2, 2]})
        config(f / n)
        (f / n / "tokenizer.model").write_bytes(b"\x0a" + b"\x80" * 900_000 + n.encode())
    return lambda: stockpot.plan({"merge_method": "linear", "models": [str(f / "a"), str(f / "b")]})


@made
def tokenizers_of_many_lines(f: Path) -> Action:
    for n in "ab":
        safetensors(f / n / "model.safetensors", {"model.embed_tokens.weight": [2, 2]})
        config(f / n)
        (f / n / "vocab.txt").write_text("\n".join(f"{i}{n}" for i in range(120_000)))
    return lambda: stockpot.plan({"merge_method": "linear", "models": [str(f / "a"), str(f / "b")]})


def adapter(f: Path, modules: int, **keys: Any) -> Action:
    names: dict[str, list[int]] = {}
    for i in range(modules):
        module = f"base_model.model.layers.{i}." + "a" * 60
        names |= {f"{module}.lora_A.weight": [1, 1], f"{module}.lora_B.weight": [1, 1]}
    safetensors(f / "adapter_model.safetensors", names, "F32")
    (f / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **keys}))
    recipe = {"merge_method": "linear", "adapter": {"mode": "product"}, "models": [str(f)]}
    return lambda: stockpot.plan(recipe)


@made
def patterns_that_explode(f: Path) -> Action:
    return adapter(f, 2, rank_pattern={"(a+)+z": 1}, alpha_pattern={"(a|aa)*z": 1})


@made
def patterns_that_take_the_cube(f: Path) -> Action:
    return adapter(f, 500, alpha_pattern={f".*a.*a{'z' * i}": 1 for i in range(60)})


@made
def patterns_of_options(f: Path) -> Action:
    return adapter(f, 2, rank_pattern={".?" * 60 + "b": 1})


@made
def many_patterns(f: Path) -> Action:
    return adapter(f, 1500, alpha_pattern={f"x{i}.{'y' * (i % 300)}": 1 for i in range(5000)})


# runs


@made
def a_long_log(f: Path) -> Action:
    (f / "checkpoint-1").mkdir()
    safetensors(f / "checkpoint-1/model.safetensors", {"w": [1]})
    rows = [{"step": i, f"m{i % 50}": 1.0} for i in range(20_000)]
    (f / "checkpoint-1/trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": rows}))
    return lambda: open_run(f)


@made
def many_metrics(f: Path) -> Action:
    (f / "checkpoint-1").mkdir()
    safetensors(f / "checkpoint-1/model.safetensors", {"w": [1]})
    row = {"step": 1, **{f"m{i}": 1.0 for i in range(50_000)}}
    (f / "checkpoint-1/trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": [row]}))
    return lambda: open_run(f)


@made
def a_log_of_torchtune(f: Path) -> Action:
    (f / "epoch_0").mkdir()
    safetensors(f / "epoch_0/model.safetensors", {"w": [1]})
    (f / "log_1.txt").write_text("Step " + "9" * 900_000 + " | loss:1\n" + "Step 3 | " + "a:1 " * 10_000)
    return lambda: open_run(f)


@made
def a_table_of_metrics(f: Path) -> Action:
    a_long_log(f)
    (f / "m.csv").write_text("step," + ",".join(f"m{i}" for i in range(5000)) + "\n" + ("1" + ",2" * 5000 + "\n") * 80)
    return lambda: open_run(f, metrics=str(f / "m.csv"))


# recipes, suites


def a_text(name: str, text: str) -> None:
    MAKERS[f"recipe_{name}"] = lambda f: lambda: parse_recipe(text)
    MAKERS[f"suite_{name}"] = lambda f: lambda: parse_suite(text, "suite.yml")


a_text(
    "aliases",
    "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}]\n" for p, c in zip("abcdefghij", "bcdefghijk")),
)
a_text("merge_keys", "a: &a {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join(['*a'] * 50)}]\n" for i in range(300)))
a_text("deep", "[" * 300_000)
a_text("deep_lines", "".join(" " * i + "- \n" for i in range(1300)))
a_text("long", "merge_method: linear\nmodels:\n" + "- a\n" * 150_000)
a_text("one_word", "x" * 1_000_000)
a_text("a_number", "merge_method: " + "9" * 900_000)
a_text("an_octal", "models: [" + "0" + "7" * 200_000 + "]\n")
a_text("sexagesimal", "models: [" + "1" + ":59" * 200_000 + "]\n")


@made
def many_excluded(f: Path) -> Action:
    safetensors(f / "m/model.safetensors", {f"layers.{i}.w": [1] for i in range(9000)})
    patterns = [f"*layers.{i}.*" for i in range(300)] + [f"layers.{i}.w" for i in range(2000, 5000)]
    recipe = {"merge_method": "linear", "models": [str(f / "m")], "exclude": patterns}
    return lambda: stockpot.plan(recipe)


@made
def steps_that_read_one_another_twice(f: Path) -> Action:
    safetensors(f / "m/model.safetensors", {"w": [1]})
    docs = [f"merge_method: linear\nname: s0\nmodels: [{f}/m]\n"]
    docs += [f"merge_method: linear\nname: s{i}\nmodels: [s{i - 1}, s{i - 1}]\n" for i in range(1, 30)]
    text = "---\n".join([*docs, "merge_method: linear\nmodels: [s29]\n"])
    return lambda: stockpot.plan(text)


@made
def a_chain_of_steps(f: Path) -> Action:
    safetensors(f / "m/model.safetensors", {"w": [1]})
    docs = [f"merge_method: linear\nname: s0\nmodels: [{f}/m]\n"]
    docs += [f"merge_method: linear\nname: s{i}\nmodels: [s{i - 1}]\n" for i in range(1, 3000)]
    text = "---\n".join([*docs, "merge_method: linear\nmodels: [s2999]\n"])
    return lambda: stockpot.plan(text)


@made
def a_suite_of_many_slices(f: Path) -> Action:
    (f / "d.jsonl").write_text('{"text": "a"}\n')
    text = "slices:\n" + "".join(f"- {{name: s{i}, kind: loss, data: d.jsonl}}\n" for i in range(8000))
    return lambda: parse_suite(text, str(f / "suite.yml"))


# what stockpot writes


@made
def a_lineage_of_many_files(f: Path) -> Action:
    safetensors(f / "model.safetensors", {"w": [1]})
    output = {"files": [], "side_files": {f"../{i}": "0" for i in range(40_000)}, "tensors": {}}
    recipe = {"text": "", "sha256": ""}
    lineage = {"format": 1, "digests": "blake3-pieces-1", "recipe": recipe, "inputs": [], "output": output}
    (f / "stockpot.json").write_text(json.dumps(lineage))
    return lambda: compare(*read_lineage(str(f)), 1)


@made
def a_deep_lineage(f: Path) -> Action:
    safetensors(f / "model.safetensors", {"w": [1]})
    (f / "stockpot.json").write_text('{"output":' * 90_000 + "1" + "}" * 90_000)
    return lambda: compare(*read_lineage(str(f)), 1)


@made
def scores_that_swell(f: Path) -> Action:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        head = (
            b"\x93NUMPY\x01\x00v\x00"
            + b"{'descr': '<f8', 'fortran_order': False, 'shape': (60000000,), }".ljust(117)
            + b"\n"
        )
        z.writestr("x_a.npy", head + bytes(480_000_000))
    db = sqlite3.connect(f / "sweep.sqlite")
    from stockpot.search import store

    db.executescript(store._TABLES)
    db.execute("INSERT INTO meta VALUES ('format', '1')")
    suite = {"text": "slices: [{name: a, kind: loss, data: x}]\n", "path": "s.yml"}
    for key, value in {"suite": suite, "run": None, "gates": None, "keys": {"a selection": "k"}}.items():
        db.execute("INSERT INTO meta VALUES (?, ?)", (key, json.dumps(value)))
    db.execute("INSERT INTO candidates VALUES ('c', 0, 's', '{}', '{}', '{}', 0, 'd', 1.0, NULL)")
    for part in ("k", "a"):
        db.execute(
            "INSERT INTO scores VALUES ('d', ?, 'a', 'selection', '{\"loss\": 1}', ?, 1, 1)", (part, buffer.getvalue())
        )
    db.commit()
    db.close()
    return lambda: pages.report(f)


@made
def folders_in_folders(f: Path) -> Action:
    safetensors(f / "model.safetensors", {"model.layers.0.w": [1]})
    config(f)
    (f / "modules.json").write_text(json.dumps([{"path": "1_Pooling"}]))
    (f / "1_Pooling").mkdir()
    here = os.getcwd()
    os.chdir(f / "1_Pooling")
    try:
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    return opened(f)


@made
def a_fifo_for_everything(f: Path) -> Action:
    safetensors(f / "model.safetensors", {"model.embed_tokens.weight": [2, 2]})
    for name in (
        "tokenizer.json", "modules.json", "stockpot.json", "trainer_state.json", "chat_template.jinja", "x.safetensors",
        "added_tokens.json", "log_1.txt", "events.out.tfevents.1",
    ):  # fmt: skip
        os.mkfifo(f / name)
    (f / "epoch_0").mkdir()

    def act() -> None:
        for call in (opened(f), lambda: open_run(f), lambda: read_lineage(str(f))):
            with contextlib.suppress(stockpot.StockpotError):
                call()

    return act


# optimizers


@made
def an_optimizer_of_many_layers(f: Path) -> Action:
    """Names by the order of a class: a model of as many layers as its config asks for is not made."""
    import torch

    safetensors(f / "m/model.safetensors", {"model.norm.weight": [1]}, "F32")
    config(f / "m", num_hidden_layers=10**8)
    config(safetensors(f / "base/model.safetensors", {"model.norm.weight": [1]}, "F32").parent)
    parameter = torch.ones(1, requires_grad=True)
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    torch.save(optimizer.state_dict(), f / "o.pt")
    models = [{"model": str(f / "m"), "companions": {"moment": str(f / "o.pt")}}]
    recipe = {"merge_method": "ota", "base_model": str(f / "base"), "models": models}
    return lambda: stockpot.plan(recipe)
