"""What tensor names say: which stack of layers a tensor belongs to, its number there, and its depth.

There is no table of architectures. A **stack** is a container whose children are numbered 0, 1, 2, ... and look alike:
`model.layers`, `transformer.h`, `encoder.block`, `vit.encoder.layer`, or a name nobody has used yet. A tensor belongs to
the outermost such container on its path, so the experts inside a layer do not count as layers. A lone child `0` counts
when its container has one of the usual names for layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["LayerMap", "Place", "map_layers", "outside_depth"]

_USUAL = frozenset(
    "layers layer h blocks block encoder decoder resblocks transformer_blocks encoders decoders stages stage".split()
)
#: parts of a name among which numbers are looked for
_DEEPEST = 24
_LAYERS = frozenset(("layers", "layer", "h", "blocks", "block"))
_EXIT_FIRST = ("embed_out", "final", "lm_head", "classifier", "score", "qa_outputs")
_ENTRY = (
    "embed emb. wte wpe patch cls_token mask_token register_token position token_type shared. stem pre_ "
    "rotary conv_in word_"
).split()
_EXIT = "head norm ln_f ln_post output pool cls. predictions projection proj_out logit fc. vocab".split()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor sits: stack prefix and layer number."""

    stack: str
    layer: int


@dataclass(frozen=True)
class LayerMap:
    """The stacks of one checkpoint. `stacks` maps a prefix to its number of layers."""

    stacks: dict[str, int]
    places: dict[str, Place]

    def depth(self, name: str) -> float:
        """0 at the first layer, 1 at the last; outside the layers 0 on the way in, 1 on the way out."""
        place = self.places.get(name)
        if place is None:
            return outside_depth(name)
        n = self.stacks[place.stack]
        return place.layer / (n - 1) if n > 1 else 1.0


def outside_depth(name: str) -> float:
    """0.0 for what comes before the layers (embeddings), 1.0 for what comes after (final norm, heads)."""
    low = name.lower() + "."
    if any(word in low for word in _EXIT_FIRST):
        return 1.0
    if any(word in low for word in _ENTRY):
        return 0.0
    return 1.0 if any(word in low for word in _EXIT) else 0.0


def map_layers(names: Iterable[str]) -> LayerMap:
    """Find the stacks among `names` and place every tensor that lies in one."""
    names = list(names)
    suffixes: dict[str, dict[int, set[str]]] = {}
    paths: dict[str, list[tuple[str, int]]] = {}
    for name in names:
        parts = name.split(".")
        found = []
        for i, part in enumerate(parts[:_DEEPEST]):
            if (
                i + 1 < len(parts)
                and part.isascii()
                and part.isdigit()
                and (part == "0" or part[0] != "0")
                and len(part) < 6
            ):
                prefix = ".".join(parts[:i])
                found.append((prefix, int(part)))
                suffixes.setdefault(prefix, {}).setdefault(int(part), set()).add(".".join(parts[i + 1 :]))
        if found:
            paths[name] = found
    stacks = {prefix: len(children) for prefix, children in suffixes.items() if _is_stack(prefix, children)}
    places = {}
    for name, found in paths.items():
        for prefix, number in found:
            if prefix in stacks:
                places[name] = Place(prefix, number)
                break
    used = {place.stack for place in places.values()}
    return LayerMap({p: n for p, n in stacks.items() if p in used}, places)


def _is_stack(prefix: str, children: dict[int, set[str]]) -> bool:
    n = len(children)
    if set(children) != set(range(n)):
        return False
    if n == 1:
        return prefix.rpartition(".")[2] in _USUAL
    common = Counter(suffix for child in children.values() for suffix in child)
    shared = sum(1 for count in common.values() if count > 1)
    if shared and prefix.rpartition(".")[2] in _LAYERS:
        return True  # of many kinds: attention, Mamba, experts by turns
    return 2 * shared >= min(len(child) for child in children.values())
