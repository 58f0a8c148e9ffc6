"""How configs speak of layers: lists with an entry for each, lists of numbers, prefixes, intervals, as rules that can be read
and said again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.checkpoints.meaning.architectures import default_of, has_list, list_rule_of

__all__ = ["POSITIONS", "Rule", "Vector", "effective", "rules_for"]

#: lists of layer numbers
POSITIONS = frozenset(
    "full_attn_idxs attn_layer_indices mlp_only_layers cross_attention_layers moe_layers hybrid_layer_ids global_attn_indexes "
    "fullatt_block_indexes deepstack_visual_indexes window_block_indexes window_block_indices global_attention_blocks "
    "intermediate_layers_indices dense_layers swa_layers sliding_window_layers rope_scaling_layers target_layer_ids "
    "no_rope_layer_ids full_attention_layers linear_attention_layers dense_attention_layers".split()
)
#: lists with an entry for each layer, whatever their names
_ENTRIES = frozenset(
    "layer_types mlp_layer_types layers_block_type attention_layers attn_layers no_rope_layers indexer_types layer_rope_theta "
    "num_attention_heads_per_layer num_key_value_heads_per_layer sliding_windows activation_sparsity_pattern".split()
)


def effective(part: Mapping[str, Any], kind: Any, key: str) -> Any:
    value = part.get(key)
    return default_of(kind, key) if value is None else value


# what a config says of each layer

Vector = list[Any]


def _entries_of(part: Mapping[str, Any], kind: Any, key: str, n: int) -> Vector | None:
    """A list with an entry for each layer: as the config has it, else as the type works it out. None where it has none, or it
    can't be known.
    """
    value = part.get(key)
    if isinstance(value, (list, tuple)):
        return list(value) if len(value) == n else None
    first = whole(effective(part, kind, "max_window_layers"))
    if key == "layer_types" and kind in _WINDOWED and part.get("use_sliding_window") and first is not None:
        slides = part.get("sliding_window", 0) is not None
        return ["sliding_attention" if slides and i >= first else "full_attention" for i in range(n)]
    rule = list_rule_of(kind, key)
    if rule is None or (key == "layer_types" and part.get("use_sliding_window")):
        return None
    head, repeated, last = rule[:3]
    if key == "layer_types":
        for interval in ("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"):
            every = part.get(interval)
            if isinstance(every, int) and every > 0 and len(repeated) != every and len({*map(str, repeated)}) == 2:
                return [repeated[-1] if (i + 1) % every == 0 else repeated[0] for i in range(n)]
    if key == "no_rope_layers":
        every = part.get("no_rope_layer_interval")
        if isinstance(every, int) and every > 0:
            return [int((i + 1) % every != 0) for i in range(n)]
    if key == "mlp_layer_types" and isinstance(part.get("first_k_dense_replace"), int) and len(repeated) == 1:
        return ["dense" if i < part["first_k_dense_replace"] else repeated[0] for i in range(n)]
    m = n - len(last)
    return [*(head[i] if i < len(head) else repeated[(i - len(head)) % len(repeated)] for i in range(m)), *last]


def _knows_list(kind: Any, key: str) -> bool:
    return list_rule_of(kind, key) is not None


def whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Rule:
    """A way in which a config speaks of layers.

    key      what it is called in an error
    vector   (part, type, layers) -> what it says of each; None where the part does not speak so
    said     (what is to be said of each, part, type) -> keys and their new values; None where it can't be said
    """

    key: str
    vector: Callable[[Mapping[str, Any], Any, int], Vector | None]
    said: Callable[[Vector, Mapping[str, Any], Any], dict[str, Any] | None]


def _positions(key: str) -> Rule:
    def vector(part: Mapping[str, Any], kind: Any, n: int) -> Vector | None:
        value = part.get(key)
        if not isinstance(value, list) or not all(whole(v) is not None for v in value):
            return None
        inside = {v % n if v < 0 else v for v in value}
        return [i in inside for i in range(n)]

    return Rule(key, vector, lambda wanted, part, kind: {key: [i for i, v in enumerate(wanted) if v]})


def _entries(key: str) -> Rule:
    def vector(part: Mapping[str, Any], kind: Any, n: int) -> Vector | None:
        return _entries_of(part, kind, key, n)

    return Rule(key, vector, lambda wanted, part, kind: {key: list(wanted)})


def _letters(key: str) -> Rule:
    def vector(part: Mapping[str, Any], kind: Any, n: int) -> Vector | None:
        value = part.get(key)
        return list(value) if isinstance(value, str) and len(value) == n else None

    return Rule(key, vector, lambda wanted, part, kind: {key: "".join(wanted)})


def _repeated(key: str) -> Rule:
    """A list that is gone through again and again: block_types of RecurrentGemma."""

    def vector(part: Mapping[str, Any], kind: Any, n: int) -> Vector | None:
        value = effective(part, kind, key)
        return [value[i % len(value)] for i in range(n)] if isinstance(value, list) and value else None

    return Rule(key, vector, lambda wanted, part, kind: {key: list(wanted)})


def _runs(key: str) -> Rule:
    """GPT-Neo's lists of [kinds, how often]."""

    def vector(part: Mapping[str, Any], kind: Any, n: int) -> Vector | None:
        value = effective(part, kind, key)
        try:
            out = [entry for kinds, times in value for _ in range(times) for entry in kinds]
        except (TypeError, ValueError):
            return None
        return out if len(out) == n else None

    return Rule(key, vector, lambda wanted, part, kind: {key: [[list(wanted), 1]]})


def _by_layer(key: str) -> Rule:
    """A mapping from layer numbers: per_layer_config of Gemma 4."""

    def vector(part: Mapping[str, Any], kind: Any, n: int) -> Vector | None:
        value = part.get(key)
        if not isinstance(value, Mapping) or not all(str(k).isdigit() for k in value):
            return None
        by_number = {int(k): v for k, v in value.items()}
        return [by_number.get(i) for i in range(n)]

    def said(wanted: Vector, part: Mapping[str, Any], kind: Any) -> dict[str, Any]:
        return {key: {str(i): v for i, v in enumerate(wanted) if v is not None}}

    return Rule(key, vector, said)


def _searched(
    keys: Sequence[str], says: Callable[[dict[str, int], int, int], Any], ranges: Callable[[int], list[list[int]]]
) -> Rule:
    """A rule of a few numbers: other numbers are tried until they say what is wanted.

    says: (numbers, layer, layers) -> what the rule says of the layer
    """

    def numbers(part: Mapping[str, Any], kind: Any) -> dict[str, int] | None:
        found = {k: whole(effective(part, kind, k)) for k in keys}
        return None if any(v is None for v in found.values()) else {k: int(v or 0) for k, v in found.items()}

    def vector(part: Mapping[str, Any], kind: Any, n: int) -> Vector | None:
        found = numbers(part, kind)
        if found is None or any(
            k.endswith(("interval", "period", "freq", "step", "every")) and v < 1 for k, v in found.items()
        ):
            return None
        return [says(found, i, n) for i in range(n)]

    def said(wanted: Vector, part: Mapping[str, Any], kind: Any) -> dict[str, Any] | None:
        n = len(wanted)
        own = numbers(part, kind) or {}
        tried: list[dict[str, int]] = [own] if own else []

        def combine(at: int, chosen: dict[str, int]) -> None:
            if at == len(keys):
                tried.append(chosen)
                return
            for value in dict.fromkeys([own.get(keys[at], 0), *spans[at]]):
                combine(at + 1, {**chosen, keys[at]: value})

        spans = ranges(n)
        combine(0, {})
        for values in tried:
            if all(says(values, i, n) == wanted[i] for i in range(n)):
                return dict(values)
        return None

    return Rule(keys[0], vector, said)


def _sparse(part: Mapping[str, Any], kind: Any, n: int) -> Vector | None:
    """Qwen's mixtures: experts in every `decoder_sparse_step`-th layer that is not in `mlp_only_layers`."""
    step = whole(effective(part, kind, "decoder_sparse_step"))
    only = effective(part, kind, "mlp_only_layers")
    if step is None or step < 1 or not isinstance(only, list):
        return None
    return [i not in only and (i + 1) % step == 0 for i in range(n)]


def _said_sparse(wanted: Vector, part: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    return {"mlp_only_layers": [i for i, sparse in enumerate(wanted) if not sparse], "decoder_sparse_step": 1}


def _dense_first(part: Mapping[str, Any], kind: Any, n: int) -> Vector | None:
    """DeepSeek's: experts from `first_k_dense_replace` on, in every `moe_layer_freq`-th layer, or as a list says."""
    first = whole(effective(part, kind, "first_k_dense_replace"))
    every = effective(part, kind, "moe_layer_freq")
    if isinstance(every, list):
        return [bool(v) for v in every] if len(every) == n else None
    if first is None:
        return None
    often = every if isinstance(every, int) and every > 0 else 1
    return [i >= first and i % often == 0 for i in range(n)]


def _said_dense_first(wanted: Vector, part: Mapping[str, Any], kind: Any) -> dict[str, Any] | None:
    if isinstance(part.get("moe_layer_freq"), list):
        return {"moe_layer_freq": [int(v) for v in wanted]}
    first = next((i for i, sparse in enumerate(wanted) if sparse), len(wanted))
    every = effective(part, kind, "moe_layer_freq")
    for often in dict.fromkeys([every if isinstance(every, int) and every > 0 else 1, 1]):
        if all(sparse == (i >= first and i % often == 0) for i, sparse in enumerate(wanted)):
            return {"first_k_dense_replace": first} | ({"moe_layer_freq": often} if every is not None else {})
    if _knows_list(kind, "mlp_layer_types"):
        return {"first_k_dense_replace": first}  # the list, which goes before it, says the rest
    return None


def _unknown(key: str) -> Rule:
    """What depends on a layer's number in a way that is not known: layers may only stay where they are."""

    def vector(part: Mapping[str, Any], kind: Any, n: int) -> Vector | None:
        if part.get(key):
            return None
        if has_list(kind, key) and list_rule_of(kind, key) is None:
            return [f"that of layer {i}" for i in range(n)]
        windows = key == "layer_types" and part.get("use_sliding_window") and kind not in _WINDOWED
        return [f"that of layer {i}" for i in range(n)] if windows else None

    return Rule(key, vector, lambda wanted, part, kind: None)


#: types whose layers slide from `max_window_layers` on
_WINDOWED = ("qwen2", "qwen3")


_RULES: tuple[Rule, ...] = (
    *(_entries(k) for k in sorted(_ENTRIES)),
    *(_positions(k) for k in sorted(POSITIONS - {"mlp_only_layers"})),
    _letters("hybrid_override_pattern"),
    _repeated("block_types"),
    _runs("attention_types"),
    _by_layer("per_layer_config"),
    Rule("mlp_only_layers", _sparse, _said_sparse),
    Rule("first_k_dense_replace", _dense_first, _said_dense_first),
    _unknown("layer_types"),
    _unknown("mlp_layer_types"),
    _unknown("no_rope_layers"),
    _searched(["num_dense_layers"], lambda v, i, n: i < v["num_dense_layers"], lambda n: [[*range(n + 1)]]),
    _searched(["n_dense_layers"], lambda v, i, n: i < v["n_dense_layers"], lambda n: [[*range(n + 1)]]),
    _searched(["num_hash_layers"], lambda v, i, n: i < v["num_hash_layers"], lambda n: [[*range(n + 1)]]),
    _searched(["num_kv_shared_layers"], lambda v, i, n: i >= n - v["num_kv_shared_layers"], lambda n: [[*range(n)]]),
    _searched(
        ["attn_layer_period", "attn_layer_offset"],
        lambda v, i, n: i % v["attn_layer_period"] == v["attn_layer_offset"],
        lambda n: [[*range(1, n + 2)], [*range(n + 1)]],
    ),
    _searched(
        ["expert_layer_period", "expert_layer_offset"],
        lambda v, i, n: i % v["expert_layer_period"] == v["expert_layer_offset"],
        lambda n: [[*range(1, n + 2)], [*range(n + 1)]],
    ),
    _searched(
        ["moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"],
        lambda v, i, n: (
            (i + 1) % v["moe_layer_interval"] == 0
            and v["moe_layer_start_index"] <= i <= v["moe_layer_end_index"] % n
        ),
        lambda n: [[1, 2, 3, 4], [*range(n + 1)], [-1, *range(n)]],
    ),
    _searched(
        ["cross_attention_frequency"],
        lambda v, i, n: i % v["cross_attention_frequency"] == 0,
        lambda n: [[*range(1, n + 1)]],
    ),
)  # fmt: skip
#: intervals that lists go before, where there are lists; alone they are rules of their own
_INTERVALS: dict[str, tuple[str, Callable[[int, int], bool]]] = {
    "interleave_moe_layer_step": ("moe_layers", lambda i, k: (i + 1) % k == 0),
    "global_attn_every_n_layers": ("layer_types", lambda i, k: i % k == 0),
    "sliding_window_pattern": ("layer_types", lambda i, k: (i + 1) % k == 0),
    "full_attention_interval": ("layer_types", lambda i, k: (i + 1) % k == 0),
    "no_rope_layer_interval": ("no_rope_layers", lambda i, k: (i + 1) % k == 0),
}


def _interval(key: str) -> Rule:
    listed, says = _INTERVALS[key]

    def vector(part: Mapping[str, Any], kind: Any, n: int) -> Vector | None:
        every = whole(effective(part, kind, key))
        if every is None or every < 1 or part.get(listed) or _knows_list(kind, listed):
            return None
        return [says(i, every) for i in range(n)]

    def said(wanted: Vector, part: Mapping[str, Any], kind: Any) -> dict[str, Any] | None:
        for every in range(1, len(wanted) + 2):
            if all(says(i, every) == v for i, v in enumerate(wanted)):
                return {key: every}
        if key == "interleave_moe_layer_step":
            return {"moe_layers": [i for i, v in enumerate(wanted) if v]}
        return None

    return Rule(key, vector, said)


def rules_for(part: Mapping[str, Any], n: int) -> list[Rule]:
    """Those that are known, and lists that nobody has described, with an entry for each layer by their names."""
    known = {r.key for r in _RULES} | POSITIONS | _ENTRIES
    more = [
        _entries(k)
        for k, v in part.items()
        if isinstance(v, list) and len(v) == n and k not in known and ("layer" in k or "block" in k)
    ]
    return [*_RULES, *map(_interval, _INTERVALS), *more]
