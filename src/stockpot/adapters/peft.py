"""What the tensors of a PEFT LoRA adapter are: factors with their scales, and plain tensors beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.adapters.patterns import Patterns
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.errors import CheckpointError, brief

__all__ = ["Adapter", "LowRank", "changes_the_base", "config_for", "read_adapter"]

#: values of init_lora_weights with which the base is not the base any more
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.*)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)")


@dataclass(frozen=True)
class LowRank:
    """One module's factors: delta = scale * B A, of the base's tensor `<module>.weight`.

    a, b        names of A `[rank, in, ...]` and B `[out, rank, ...]`
    transposed  the delta is (B A)^T: embeddings, and Conv1D layers as the config has it (fan_in_fan_out)
    embedding   the factors of an embedding
    bias        name of B's bias `[out]` (lora_bias), or None
    """

    module: str
    a: str
    b: str
    rank: int
    scale: float
    transposed: bool = False
    bias: str | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """`modules` by name without PEFT's prefix; `plain` are full tensors: modules_to_save, biases, magnitudes."""

    checkpoint: Checkpoint
    modules: Mapping[str, LowRank]
    plain: tuple[str, ...]

    @property
    def is_dora(self) -> bool:
        """Whether magnitudes make the delta depend on the base's weights."""
        return bool(self.checkpoint.config.get("use_dora")) or any("lora_magnitude_vector" in n for n in self.plain)


def read_adapter(checkpoint: Checkpoint) -> Adapter:
    """Find out what a PEFT adapter's tensors are. Raises CheckpointError where they are no LoRA's."""
    config = checkpoint.config
    kind = config.get("peft_type")
    if checkpoint.kind != "adapter":
        raise CheckpointError(f"{checkpoint.ref}: a full model; expected a LoRA adapter")
    if kind != "LORA":
        raise CheckpointError(f"{checkpoint.ref}: peft_type {kind!r}: products are known for LoRA adapters only")
    if config.get("target_parameters"):
        raise CheckpointError(f"{checkpoint.ref}: target_parameters: products of expert parameters are not supported")
    if config.get("alora_invocation_tokens"):
        raise CheckpointError(
            f"{checkpoint.ref}: an activated LoRA (alora_invocation_tokens) acts on some tokens only, so that it has no "
            "product that could be averaged or merged; average its factors"
        )
    found: dict[str, dict[str, str]] = {}
    plain = []
    for name in checkpoint.names():
        m = _FACTOR.fullmatch(name)
        if m:
            found.setdefault(m[1], {})[m[2]] = name
        else:
            plain.append(name)
    modules = {}
    patterns = {key: _patterns(checkpoint, key) for key in ("rank_pattern", "alpha_pattern")}
    for prefix, parts in found.items():
        low_rank = _low_rank(checkpoint, prefix, parts, patterns)
        modules[low_rank.module] = low_rank
    if not modules:
        raise CheckpointError(f"{checkpoint.ref}: a LoRA adapter without lora_A and lora_B tensors")
    return Adapter(checkpoint, modules, tuple(plain))


def _low_rank(
    checkpoint: Checkpoint, prefix: str, parts: Mapping[str, str], patterns: Mapping[str, Patterns]
) -> LowRank:
    module = prefix.removeprefix(PREFIX)
    embedding = "lora_embedding_A" in parts
    a = parts.get("lora_embedding_A" if embedding else "lora_A.weight")
    b = parts.get("lora_embedding_B" if embedding else "lora_B.weight")
    if a is None or b is None:
        raise CheckpointError(
            f"{checkpoint.ref}: {module}: one of its two factors is missing ({', '.join(parts.values())})"
        )
    shape_a, shape_b = checkpoint.spec(a).shape, checkpoint.spec(b).shape
    if len(shape_a) < 2 or len(shape_b) < 2 or shape_a[0] != shape_b[1]:
        raise CheckpointError(
            f"{checkpoint.ref}: {module}: factors of {list(shape_a)} and {list(shape_b)} don't multiply"
        )
    if any(d != 1 for d in shape_b[2:]):
        raise CheckpointError(f"{checkpoint.ref}: {module}: B of {list(shape_b)} is not a 1x1 convolution")
    rank = shape_a[0]
    config = checkpoint.config
    r = _patterned(checkpoint, "rank_pattern", patterns["rank_pattern"], module, config.get("r", rank))
    alpha = _patterned(checkpoint, "alpha_pattern", patterns["alpha_pattern"], module, config.get("lora_alpha", rank))
    if r != rank:
        raise CheckpointError(f"{checkpoint.ref}: {module}: factors of rank {rank}, adapter_config.json says {r}")
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    return LowRank(module, a, b, rank, float(scale), transposed, parts.get("lora_B.bias"), embedding)


def _patterns(checkpoint: Checkpoint, key: str) -> Patterns:
    found = checkpoint.config.get(key) or {}
    try:
        return Patterns(found if isinstance(found, dict) else {})
    except ValueError as e:
        raise CheckpointError(f"{checkpoint.ref}: {key}: {e}") from e


def _patterned(checkpoint: Checkpoint, key: str, patterns: Patterns, module: str, default: Any) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    try:
        value = patterns.of(module, default)
    except ValueError as e:
        raise CheckpointError(f"{checkpoint.ref}: {key}: {e}") from e
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise CheckpointError(
            f"{checkpoint.ref}: adapter_config.json: {key} of {module} is {brief(value)}, not a number"
        )
    return value


def changes_the_base(config: Mapping[str, Any]) -> bool:
    """Whether PEFT changes the base's weights as it loads an adapter of this adapter_config.json."""
    start = config.get("init_lora_weights")
    return isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE)


def config_for(config: Mapping[str, Any], names: Sequence[str], others: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """adapter_config.json for an adapter of tensors `names`, of which `config` may not know all: others' modules came in.

    PEFT makes layers for what the config names, and leaves out without a word what it does not.
    """
    out, configs = dict(config), [config, *others]
    found = [m[1].removeprefix(PREFIX) for m in map(_FACTOR.fullmatch, names) if m]
    out["target_modules"] = sorted(set(found))
    for key in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if out.get(key) is not None:
            out[key] = None
    saved = [m for c in configs for m in c.get("modules_to_save") or ()]
    if saved:
        out["modules_to_save"] = list(dict.fromkeys(saved))
    if any(n.endswith("lora_B.bias") for n in names):
        out["lora_bias"] = True
    return out
