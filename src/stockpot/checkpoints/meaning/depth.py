"""What a config says of layers by number, rewritten for other layers: counts, lists, positions, prefixes, intervals.

A rule is read as what it says of each layer (dense or sparse, which attention), so that the same can be said of the layers
of another model: by the same keys with other values, or by an explicit list where the type takes one. What can't be said is
refused.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.checkpoints.meaning.architectures import list_rule_of, part_types
from stockpot.checkpoints.meaning.layer_rules import POSITIONS, Rule, Vector, effective, rules_for
from stockpot.errors import MismatchError

__all__ = ["Pick", "config_parts", "describing_part", "follow", "hidden_layers", "sees"]

#: keys that count layers, in the order in which they are looked for
COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers", "depth", "num_blocks",
)  # fmt: skip
#: lists whose length is the number of layers, of types that have no such number
_COUNTING_LISTS = ("layers_block_type", "hybrid_override_pattern")
_MODELS = ("decoder", "encoder", "generator", "text_encoder", "language_model")
_NOT_MODELS = ("quantization_config", "compression_config", "generation_config")


@dataclass(frozen=True)
class Pick:
    """Where a layer of the output comes from: the part of its model's config that describes its stack, how many layers this has,
    the layer's number. kinds: what the tensors of each of the model's layers are, so that those of different make are told apart.
    """

    config: Mapping[str, Any]
    count: int
    layer: int
    model_type: Any = None
    kinds: Sequence[Hashable] = ()
    ref: str = "its model"

    @property
    def kind(self) -> Hashable:
        return self.kinds[self.layer] if self.layer < len(self.kinds) else None


def config_parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
    """(path, part, model type) of a config and the configs within it, the outermost first."""

    def walk(part: Mapping[str, Any], path: str, kind: Any) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
        yield path, part, kind
        known = part_types(kind)
        for key, inner in part.items():
            is_part = key.endswith("_config") or key in _MODELS or key in known
            if isinstance(inner, Mapping) and is_part and key not in _NOT_MODELS:
                own = inner.get("model_type") or known.get(key)
                yield from walk(inner, f"{path}.{key}" if path else key, own)

    yield from walk(config, "", config.get("model_type"))


def _counts(part: Mapping[str, Any], kind: Any, stack: str) -> list[str]:
    """The keys of a part that may count the layers of a stack."""
    side = "decoder" if "decoder" in stack else "encoder" if "encoder" in stack else ""
    other = {"decoder": "encoder", "encoder": "decoder"}.get(side, "-")
    found = [k for k in COUNTS if isinstance(effective(part, kind, k), int) and other not in k]
    own = [k for k in found if side and side in k]
    return own or found


def describing_part(config: Mapping[str, Any], stack: str, layers: int) -> tuple[str, Mapping[str, Any], Any] | None:
    """(path, part, type) of the part of a config that says how many layers a stack has; None where none says so many."""
    parts = list(config_parts(config))
    found = [
        (path, part, kind)
        for path, part, kind in parts
        if any(
            effective(part, kind, k) + extra == layers
            for k in _counts(part, kind, stack)
            for extra in (0, _extra(part, kind))
        )
        or any(isinstance(part.get(k), (list, str)) and len(part[k]) == layers for k in _COUNTING_LISTS)
    ]
    if len(parts) > 1:
        found = [f for f in found if sees(stack) == sees(f[0]) or (sees(stack) and kind_sees(f[2]))]
    inner = [f for f in found if f[0]]
    found = inner or found  # a root that repeats what its text model says
    return found[0] if found else None


def sees(name: str) -> bool:
    """Whether a name is that of a part that takes images or sounds."""
    return any(word in name for word in ("vis", "image", "img", "audio", "speech"))


def kind_sees(model_type: object) -> bool:
    """The same of a model type."""
    return isinstance(model_type, str) and sees(model_type)


def _extra(part: Mapping[str, Any], kind: Any) -> int:
    """Layers for predicting further tokens, which are stored after the model's own."""
    extra = effective(part, kind, "num_nextn_predict_layers")
    return extra if isinstance(extra, int) and not isinstance(extra, bool) else 0


def hidden_layers(config: Mapping[str, Any], stack: str, layers: int) -> int:
    """How many of a stack's layers are the model's own: those for predicting further tokens come after them."""
    found = describing_part(config, stack, layers)
    if found is None:
        return layers
    _, part, kind = found
    counts = [effective(part, kind, k) for k in _counts(part, kind, stack)]
    return layers if layers in counts else max((c for c in counts if c < layers), default=layers)


def follow(
    config: Mapping[str, Any], stack: str, layers: int, picks: Sequence[Pick], *, alone: bool = True
) -> dict[str, Any]:
    """A copy of a config for a model whose stack is made of other layers.

    stack, layers  the one that changes, and how many of them the config's own model has
    picks          where each layer of the output comes from
    alone          whether the model has no other stack of that size, so that a general count means this one

    Raises MismatchError with the first layer that the config could not say the kind of.
    """
    out = copy.deepcopy(dict(config))
    found = describing_part(config, stack, layers)
    if found is None:
        if [p.layer for p in picks] == list(range(layers)) or not config:
            return out
        raise MismatchError(
            f"its config.json does not say how many layers {stack!r} has (it has {layers}), so that it can't be made to follow "
            "them; write the number under num_hidden_layers (of text_config, where there is one)"
        )
    path, part, kind = found
    target: dict[str, Any] = out
    for key in filter(None, path.split(".")):
        target = target[key]
    own = hidden_layers(config, stack, layers)
    for key in _counts(part, kind, stack):
        if effective(part, kind, key) == own:
            target[key] = len(picks)
    if alone and part.get("num_hidden_layers") == own:
        target["num_hidden_layers"] = len(picks)
    if _extra(part, kind) and layers != own:
        target["num_nextn_predict_layers"] = 0
    unchanged = [p.layer for p in picks] == list(range(own)) and all(p.config is part for p in picks)
    if path:  # a root that repeats what its text model says
        out |= {k: len(picks) for k in COUNTS if out.get(k) == own}
    for rule in () if unchanged else rules_for(part, own):
        wanted = _wanted(rule, picks)
        if wanted is None:
            continue
        if wanted == rule.vector(part, kind, len(picks)) and rule.key not in POSITIONS:
            continue
        said = rule.said(wanted, part, kind) if _ends_well(rule, wanted, kind) else None
        if said is None:
            raise _unsayable(rule, wanted, picks, part, kind)
        target.update(said)
    if not unchanged:
        _check_kinds(picks)
    return out


def _wanted(rule: Rule, picks: Sequence[Pick]) -> Vector | None:
    """What a rule says of each layer that is picked, in the config that the layer comes from; None where none of these configs
    speaks so. Raises MismatchError where some do and others don't.
    """
    known: dict[int, Vector | None] = {}
    for pick in picks:
        if id(pick.config) not in known:
            known[id(pick.config)] = rule.vector(pick.config, pick.model_type, pick.count)
    if all(v is None for v in known.values()):
        return None
    out = []
    for at, pick in enumerate(picks):
        found = known[id(pick.config)]
        if found is None:
            raise MismatchError(
                f"layer {at} of the output is layer {pick.layer} of {pick.ref}, whose config does not say what the "
                f"others' say by {rule.key}; write it into its config.json"
            )
        out.append(found[pick.layer])
    return out


def _unsayable(rule: Rule, wanted: Vector, picks: Sequence[Pick], part: Mapping[str, Any], kind: Any) -> MismatchError:
    implied = rule.vector(part, kind, len(picks)) or []
    at = next((i for i, (a, b) in enumerate(zip(implied, wanted)) if a != b), len(wanted) - 1)
    return MismatchError(
        f"layer {at} of the output is layer {picks[at].layer} of {picks[at].ref}, of another kind than {rule.key} can say "
        f"of it ({wanted[at]!r} is wanted there); choose layers whose kinds stay in their places"
    )


def _ends_well(rule: Rule, wanted: Vector, kind: Any) -> bool:
    """Whether a list ends as its type makes every such list end: Gemma 4's last layer sees all."""
    known = list_rule_of(kind, rule.key)
    return not known or not known[2] or len(known) > 3 or wanted[-1] == known[2][0]


def _check_kinds(picks: Sequence[Pick]) -> None:
    """Layers of different make must be told apart by what the rules say of them, or stay where they are. Raises MismatchError."""
    told: dict[int, bool] = {}
    for at, pick in enumerate(picks):
        key = id(pick.config)
        if key not in told:
            told[key] = _tells_apart(pick)
        if not told[key] and pick.kind not in _kinds_there(pick.kinds, at, len(picks)):
            raise MismatchError(
                f"layer {at} of the output is layer {pick.layer} of {pick.ref}, whose tensors are not those of layer {at} "
                "there, and nothing that is known of the config says which layers are of which kind; choose layers whose kinds "
                "stay in their places"
            )


def _kinds_there(kinds: Sequence[Hashable], at: int, layers: int) -> set[Hashable]:
    """The kind that layer `at` of so many should have: that of the layer of this number, or of that as far from the end, by
    where the odd ones are (T5's first layer, GPT-NeoX Japanese's last one). Both must agree where they are anywhere.
    """
    from_start = kinds[at] if at < len(kinds) else None
    from_end = kinds[len(kinds) - layers + at] if len(kinds) >= layers - at else None
    counts = Counter(kinds)
    usual, most = counts.most_common(1)[0]
    if sum(c == most for c in counts.values()) > 1:  # which are the odd ones can't be told
        return {from_start} & {from_end}
    odd = [i for i, kind in enumerate(kinds) if kind != usual]
    if all(2 * i < len(kinds) for i in odd):
        return {from_start if at < len(kinds) else usual}
    if odd == [len(kinds) - 1]:
        return {from_end if from_end is not None else usual}
    return {from_start} & {from_end}


def _tells_apart(pick: Pick) -> bool:
    """Whether what the rules say of a model's layers goes with what their tensors are."""
    found = (r.vector(pick.config, pick.model_type, pick.count) for r in rules_for(pick.config, pick.count))
    vectors = [v for v in found if v is not None]
    makes: dict[tuple[str, ...], Hashable] = {}
    return all(
        makes.setdefault(tuple(str(v[i]) for v in vectors), kind) == kind
        for i, kind in enumerate(pick.kinds[: pick.count])
    )
