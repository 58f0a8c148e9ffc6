"""Write src/stockpot/checkpoints/meaning/architectures.json: what transformers declares about its models, as data.

Every model class is built on the meta device from the default config of its type, with few layers. Recorded are its base
prefix, the weights that it ties and the part of the config that decides it, the renames and conversions between files and
memory, and defaults of the config that stockpot has to know where config.json leaves them out.

    python tools/architectures.py            # write the table
    python tools/architectures.py --check    # whether it is what would be written
    python tools/architectures.py llama t5   # print the entries of a few model types
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
warnings.simplefilter("ignore")

TABLE = Path(__file__).parents[1] / "src/stockpot/checkpoints/meaning/architectures.json"
#: keys of configs that say how many layers there are
COUNTS = (
    "num_hidden_layers n_layer n_layers num_layers num_decoder_layers decoder_layers encoder_layers depth "
    "num_encoder_layers num_blocks num_layer_per_stack"
).split()
#: keys whose defaults matter: layers, what kinds they are of, ties, the vocabulary
KEPT = {
    *COUNTS, "vocab_size", "tie_word_embeddings", "layer_types", "mlp_layer_types", "layers_block_type", "block_types",
    "attention_types", "attention_layers", "no_rope_layers", "no_rope_layer_interval", "sliding_window_pattern",
    "_sliding_window_pattern", "full_attention_interval", "full_attn_idxs", "attn_layer_indices", "mlp_only_layers",
    "decoder_sparse_step", "first_k_dense_replace", "moe_layer_freq", "moe_layers", "interleave_moe_layer_step",
    "num_dense_layers", "moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index", "attn_layer_period",
    "attn_layer_offset", "expert_layer_period", "expert_layer_offset", "hybrid_layer_ids", "cross_attention_layers",
    "cross_attention_frequency", "num_kv_shared_layers", "global_attn_every_n_layers", "max_window_layers",
    "num_nextn_predict_layers", "hybrid_override_pattern", "encoder_sparse_step", "num_experts", "num_local_experts",
    "num_sparse_encoder_layers", "num_sparse_decoder_layers", "indexer_types", "layer_rope_theta", "rope_scaling_layers",
    "kv_source_layers", "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "num_key_value_heads",
    "num_attention_heads", "head_dim", "hidden_size", "global_attention_indices",
    "attn_layers", "fullatt_block_indexes", "global_attn_indexes", "n_dense_layers", "num_hash_layers",
    "sliding_window_layers", "swa_layers", "dense_layers", "use_sliding_window",
}  # fmt: skip
LAYERS = 4


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def plain(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, (list, tuple)) and len(value) <= 512 and all(map(plain, value)))
    )


#: lists with an entry for each layer that configs work out where config.json leaves them out
LISTS = (
    "layer_types mlp_layer_types layers_block_type no_rope_layers moe_layers indexer_types layer_rope_theta full_attn_idxs "
    "attention_layers attn_layers kv_source_layers rope_scaling_layers"
).split()


def list_rules(config_class: type, written: dict[str, Any]) -> dict[str, Any]:
    """How the lists follow from the number of layers: [what comes first, what is repeated, what comes last]; null where that is
    more than such a rule.
    """
    count = next((k for k in COUNTS if isinstance(written.get(k), int)), None)
    if count is None:
        return {}
    found: dict[str, dict[int, Any]] = {}
    for n in range(2, 41):
        with contextlib.suppress(Exception):
            made = config_class(**{count: n}).to_dict()
            for key in LISTS:
                if isinstance(made.get(key), (list, tuple)) and len(made[key]) == n:
                    found.setdefault(key, {})[n] = list(made[key])
    rules = {key: rule_of(vectors) for key, vectors in found.items() if len(vectors) > 8}
    for key, rule in rules.items():
        if rule and rule[2]:  # does the type insist on how the list ends?
            other = [*found[key][8][:-1], rule[1][0]]
            with contextlib.suppress(Exception):
                if config_class(**{count: 8, key: list(other)}).to_dict()[key] == other:
                    rules[key] = [*rule, ["free"]]
    return rules


def rule_of(vectors: dict[int, list[Any]]) -> list[list[Any]] | None:
    longest = max(vectors)
    for tail in (0, 1):
        whole = vectors[longest]
        body, last = (whole[:-1], whole[-1:]) if tail else (whole, [])
        for first in range(5):
            for period in range(1, 9):
                head, repeated = body[:first], body[first : first + period]

                def made(
                    n: int, head: list[Any] = head, repeated: list[Any] = repeated, last: list[Any] = last
                ) -> list[Any]:
                    m = n - len(last)
                    return [
                        *(head[i] if i < len(head) else repeated[(i - len(head)) % len(repeated)] for i in range(m)),
                        *last,
                    ]

                if all(made(n) == v for n, v in vectors.items()):
                    return [head, repeated, last]
    return None


def sub_configs(config: Any) -> dict[str, Any]:
    from transformers import PretrainedConfig

    return {k: v for k, v in vars(config).items() if isinstance(v, PretrainedConfig)}


def defaults(config: Any) -> dict[str, Any]:
    """The keys that matter, as config.json would have them, and the types of sub-configs."""
    written = config.to_dict()
    own = {k: written[k] for k in sorted(KEPT & written.keys()) if plain(written[k]) and written[k] is not None}
    own.setdefault("tie_word_embeddings", bool(getattr(config, "tie_word_embeddings", False)))
    inner = {k: v.model_type for k, v in sorted(sub_configs(config).items()) if v.model_type}
    lists = list_rules(type(config), written)
    own = {k: v for k, v in own.items() if k not in lists}
    return {"config": own, **({"lists": lists} if lists else {}), **({"parts": inner} if inner else {})}


def shrunk(config: Any) -> Any:
    """The config with few layers, where that gives one that still stands."""
    small = config.to_dict()

    def cut(part: dict[str, Any]) -> None:
        old = {part[k] for k in COUNTS if isinstance(part.get(k), int)}
        for key, value in list(part.items()):
            if key in COUNTS and isinstance(value, int) and value > LAYERS:
                part[key] = LAYERS
            elif isinstance(value, list) and len(value) in old and len(value) > LAYERS:
                part[key] = value[:LAYERS]
            elif isinstance(value, dict) and key.endswith("config"):
                cut(value)

    cut(small)
    fill(small)
    for key, value in list(small.items()):
        # lists of layer numbers
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value) and key.endswith("layers"):
            small[key] = [v for v in value if v < LAYERS]
    return type(config).from_dict(small)


def fill(part: dict[str, Any]) -> None:
    """Values in place of those without a default that models can't be built without."""
    heads, width = part.get("num_attention_heads"), part.get("hidden_size")
    layers = part.get("num_hidden_layers")
    if isinstance(heads, int) and isinstance(width, int):
        for key, value in (("num_key_value_heads", heads), ("head_dim", width // heads)):
            if key in part and part[key] is None:
                part[key] = value
    if isinstance(layers, int) and "layer_types" in part and part["layer_types"] is None:
        part["layer_types"] = ["full_attention"] * layers
    for key, value in (("vocab_size", 64), ("prediction_length", 4), ("vocabulary_map", {"<image>": 1})):
        if key in part and part[key] is None:
            part[key] = value
    for key, value in part.items():
        if isinstance(value, dict) and key.endswith("config"):
            fill(value)


def build(cls: type, config: Any) -> Any:
    import torch

    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), torch.device("meta"), limited(60):
        return cls(config)


def config_path(config: Any, wanted: Any, path: str = "") -> str | None:
    if config is wanted:
        return path
    for key, inner in sub_configs(config).items():
        found = config_path(inner, wanted, f"{path}.{key}" if path else key)
        if found is not None:
            return found
    return None


def described_op(op: Any) -> str:
    name = type(op).__name__
    values = [str(v) for k, v in vars(op).items() if v not in (None, False)]
    return " ".join([name, *values])


def rule(transform: Any) -> dict[str, Any]:
    """A rename or conversion as data: patterns as they are matched, and what is done."""
    out: dict[str, Any] = {"from": list(transform.source_patterns), "to": list(transform.target_patterns)}
    ops = getattr(transform, "operations", None)
    if ops:
        out["ops"] = [described_op(o) for o in ops]
    kind = type(transform).__name__
    if kind not in ("WeightRenaming", "WeightConverter"):
        out["kind"] = kind
    if transform.scope_prefix is not None:
        out["scope"] = transform.scope_prefix
    return out


def ties(model: Any) -> list[list[str]]:
    """[target, source, part of the config whose tie_word_embeddings decides] in the names of memory; N stands for numbers."""
    from transformers import PreTrainedModel

    found = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, PreTrainedModel) or not module._tied_weights_keys:
            continue
        path = config_path(model.config, module.config)
        kept = getattr(module.config, "tie_word_embeddings", False)
        try:
            module.config.tie_word_embeddings = True
            expanded = module.get_expanded_tied_weights_keys()
        finally:
            with contextlib.suppress(Exception):
                module.config.tie_word_embeddings = kept
        names = set(module.state_dict().keys())
        at = f"{prefix}." if prefix else ""
        found += [
            [at + target, at + source, "?" if path is None else path]
            for target, source in expanded.items()
            if target in names and source in names
        ]
    return sorted(map(list, {tuple(row) for row in found}))


def places(model: Any) -> dict[str, str]:
    """Where the parts of the config are built as models of their own."""
    from transformers import PreTrainedModel

    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, PreTrainedModel):
            path = config_path(model.config, module.config)
            if path and "." not in path:
                found.setdefault(path, name)
    return found


def entry_of(cls: type, config: Any) -> dict[str, Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    try:
        model = build(cls, shrunk(config))
    except TimeoutError:
        raise
    except Exception:
        try:
            model = build(cls, config)
        except Exception:
            declared = undecided(cls, config)
            if declared is None:
                raise
            return declared
    out: dict[str, Any] = {"prefix": cls.base_model_prefix}
    base = getattr(model, cls.base_model_prefix, None) if cls.base_model_prefix else None
    out["is_base"] = base is None or base is model
    if found := ties(model):
        out["ties"] = found
    if found := places(model):
        out["at"] = found
    if found := [rule(t) for t in get_model_conversion_mapping(model, add_legacy=False)]:
        out["rules"] = found
    return out


def undecided(cls: type, config: Any) -> dict[str, Any] | None:
    """What a class says of itself where it can't be built: without what its parts declare."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    keys = cls._tied_weights_keys or {}
    if not isinstance(keys, dict):
        return None
    literal = [[t, s, ""] for t, s in keys.items() if t.replace(".", "").replace("_", "").isalnum()]
    rules = get_checkpoint_conversion_mapping(cls.__name__) or get_checkpoint_conversion_mapping(config.model_type)
    return {
        "prefix": cls.base_model_prefix,
        "is_base": cls.__name__.endswith("Model"),
        "unbuilt": True,
        **({"ties": literal} if literal else {}),
        **({"rules": [rule(r) for r in rules]} if rules else {}),
    }


def classes_of(model_type: str) -> list[type]:
    import transformers
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    package = importlib.import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
    found: dict[str, type] = {}
    for file in sorted(os.listdir(package.__path__[0])):
        if file.startswith("modeling_") and file.endswith(".py"):
            module = importlib.import_module(f"{package.__name__}.{file[:-3]}")
            for name, cls in vars(module).items():
                if (
                    inspect.isclass(cls)
                    and issubclass(cls, transformers.PreTrainedModel)
                    and cls.__module__ == module.__name__
                    and not name.endswith("PreTrainedModel")
                    and getattr(cls.config_class, "model_type", None) == model_type
                ):
                    found[name] = cls
    return list(found.values())


def described(model_type: str) -> tuple[str, dict[str, Any] | None, list[str]]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    why: list[str] = []
    try:
        config_class = CONFIG_MAPPING[model_type]
        config = config_class()
        out = defaults(config)
    except Exception as e:
        return model_type, None, [f"config: {type(e).__name__}: {str(e)[:100]}"]
    out["classes"] = {}
    try:
        classes = classes_of(model_type)
    except Exception as e:
        return model_type, out, [f"modeling: {type(e).__name__}: {str(e)[:100]}"]
    for cls in classes:
        try:
            out["classes"][cls.__name__] = entry_of(cls, config_class())
        except Exception as e:
            why.append(f"{cls.__name__}: {type(e).__name__}: {str(e)[:100]}")
    return model_type, out, why


def legacy() -> list[dict[str, Any]]:
    """Renames that transformers applies to the files of every model."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return [rule(t) for t in get_checkpoint_conversion_mapping("legacy")]


def table(types: list[str], processes: int = 2) -> dict[str, Any]:
    import transformers

    with Pool(processes, maxtasksperchild=60) as pool:
        rows = pool.map(described, types, chunksize=4)
    shared: list[Any] = []
    numbers: dict[str, int] = {}
    found = {}
    for model_type, out, _ in rows:
        if out is None:
            continue
        for entry in out["classes"].values():
            if "rules" in entry:
                key = json.dumps(entry["rules"])
                if key not in numbers:
                    numbers[key] = len(shared)
                    shared.append(entry["rules"])
                entry["rules"] = numbers[key]
        found[model_type] = out
    failed = {t: why for t, _, why in rows if why}
    return {
        "transformers": transformers.__version__, "legacy": legacy(), "rules": shared, "types": found, "not_built": failed
    }  # fmt: skip


def text_of(data: dict[str, Any]) -> str:
    """A line for each model type and each list of rules, so that differences can be read."""
    lines = ["{"]
    for key in ("transformers", "legacy"):
        lines.append(f'"{key}": {json.dumps(data[key], sort_keys=True)},')
    lines += ['"rules": [', ",\n".join(json.dumps(r, sort_keys=True) for r in data["rules"]), "],"]
    for key in ("types", "not_built"):
        rows = ",\n".join(f"{json.dumps(t)}: {json.dumps(v, sort_keys=True)}" for t, v in sorted(data[key].items()))
        lines += [f'"{key}": {{', rows, "}" + ("," if key == "types" else "")]
    return "\n".join([*lines, "}"]) + "\n"


def compared(stored: dict[str, Any], made: dict[str, Any]) -> str | int:
    """What is not as it would be written now, in words; 0 where nothing is."""
    if stored["transformers"] != made["transformers"]:
        return (
            f"the table is of transformers {stored['transformers']}, installed is {made['transformers']}: write it anew"
        )
    wrong = [t for t in {*stored["types"], *made["types"]} if unfolded(stored, t) != unfolded(made, t)]
    return f"the table differs for {', '.join(sorted(wrong)[:20])}: write it anew" if wrong else 0


def unfolded(data: dict[str, Any], model_type: str) -> Any:
    """The entry of a type with its rules in place of their numbers."""
    entry = json.loads(json.dumps(data["types"].get(model_type)))
    for row in (entry or {"classes": {}})["classes"].values():
        if "rules" in row:
            row["rules"] = data["rules"][row["rules"]]
    return entry


def main(asked: list[str]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    check = asked == ["--check"]
    if asked and not check:
        print(text_of(table(asked, 1)), end="")
        return
    data = table(list(CONFIG_MAPPING_NAMES))
    if check:
        raise SystemExit(compared(json.loads(TABLE.read_text()), json.loads(text_of(data))))
    TABLE.write_text(text_of(data))
    built = sum(len(t["classes"]) for t in data["types"].values())
    print(
        f"{len(data['types'])} types, {built} classes; {len(data['not_built'])} types with classes that can't be built"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
