"""What a torch optimizer keeps of each parameter, under the parameters' names.

`torch.save(optimizer.state_dict(), FILE)` numbers parameters by their order in the optimizer's groups and knows no names. They
come, in this order, from `FILE.names.json` beside it, from the file itself (`param_names`, which torch writes where the optimizer
was made with them), or from the order in which the model's class makes its parameters, in one group or in the two (with
and without weight decay) that transformers' Trainer makes. Every shape is compared; nothing is guessed.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.torchpickle import TensorReader
from stockpot.checkpoints.views import renamed, with_zeros
from stockpot.errors import CheckpointError, few_of
from stockpot.files import is_url
from stockpot.specs import DType, TensorSpec

__all__ = ["is_optimizer", "moments_of"]

_STATE = re.compile(r"state\.(\d+)\.(.+)")
_OF_GROUP = re.compile(r"param_groups\.\d+\.\w+")
#: numbers in a config of which a class makes as many modules
_MANY = re.compile(r"^(num|n|decoder|encoder)_.*(layers?|blocks?|experts?)$|^(n_layer|num_layers|depth)$")
_MOST_MODULES = 200_000


def is_optimizer(checkpoint: Checkpoint) -> bool:
    """Whether it is an optimizer's state: tensors by number, and perhaps a learning rate that is one."""
    kept = sum(map(len, _kept(checkpoint).values()))
    of_groups = sum(_OF_GROUP.fullmatch(n) is not None for n in checkpoint.names())
    return kept > 0 and kept + of_groups == len(checkpoint)


def _kept(checkpoint: Checkpoint) -> dict[int, dict[str, str]]:
    """By a parameter's number what is kept of it: `exp_avg_sq` -> the tensor's name."""
    prefixes = [key for header in checkpoint.files for key, prefix in header.parts.items() if key and not prefix]
    alone = f"{prefixes[0]}." if len(prefixes) == 1 else ""  # the only state dict of a file has names without its own
    out: dict[int, dict[str, str]] = {}
    for name in checkpoint.names():
        if found := _STATE.fullmatch(alone + name):
            out.setdefault(int(found[1]), {})[found[2]] = name
    return dict(sorted(out.items()))


@dataclass(frozen=True)
class _Names:
    """The parameters' names by number, and where they come from."""

    names: list[str]
    why: str


def moments_of(checkpoint: Checkpoint, model: Checkpoint, key: str, beside: str) -> tuple[Checkpoint, str]:
    """(what the optimizer keeps as `key` of each parameter of a model, under the model's names; what is to be said of it).

    beside: where a list of the names may lie. What it keeps nothing of, for want of a gradient, is 0. Raises CheckpointError.
    """
    ref = checkpoint.ref
    kept = _kept(checkpoint)
    without = [i for i, keys in kept.items() if key not in keys]
    if without:
        has = ", ".join(sorted(kept[without[0]]))
        why = f"the optimizer keeps no {key!r} of parameter {without[0]}, only {has}: not Adam's state?"
        raise CheckpointError(f"{ref}: {why}")
    known = _named(checkpoint, model, beside)
    advice = _advice(ref, beside)
    if max(kept) >= len(known.names):
        raise CheckpointError(
            f"{ref}: keeps something of parameter {max(kept)}, and {known.why} has {len(known.names)}; {advice}"
        )
    stored = {known.names[i]: names[key] for i, names in kept.items()}
    for i, name in enumerate(known.names):
        by = f"by {known.why} parameter {i} is {name!r}"
        if name not in model:
            raise CheckpointError(f"{ref}: {by}, which {model.ref} has not; {advice}")
        mine, wanted = checkpoint.spec(stored[name]).shape if name in stored else None, model.spec(name).shape
        if mine is not None and mine != wanted:
            why = f"{by}, {list(wanted)} in {model.ref}, and {key} is {list(mine)}"
            raise CheckpointError(f"{ref}: {why}; {advice}")
    stored |= {copy: stored[first] for copy, first in model.tied().items() if first in stored and copy not in stored}
    zeros = {
        n: TensorSpec(DType.F32, model.spec(n).shape)
        for n in model.names()
        if n not in stored and model.spec(n).dtype.is_float
    }
    made = renamed(checkpoint, stored, ref=f"{ref} ({key} by {known.why})")
    note = f"{made.ref}, for {model.ref}"
    if zeros:
        made = with_zeros(made, zeros, ref=made.ref)
        note += f"; it keeps nothing of {len(zeros)} of its tensors, which counts as 0: {few_of(list(zeros))}"
    return made, note


def _advice(ref: str, beside: str) -> str:
    where = "beside a local copy of it" if is_url(ref) else "beside it"
    return (
        f"write the names in the optimizer's order {where}, where it was trained: names = {{id(p): n for n, p in "
        "model.named_parameters()}; json.dump([names[id(p)] for g in optimizer.param_groups for p in g['params']], "
        f"open('{os.path.basename(beside)}', 'w')), model as it was saved, not wrapped"
    )


def _named(checkpoint: Checkpoint, model: Checkpoint, beside: str) -> _Names:
    ref = checkpoint.ref
    if not is_url(beside) and os.path.isfile(beside):  # first: it is what an error about the others asks for
        where = os.path.basename(beside)
        return _Names(_checked(ref, _read(beside), where), where)
    groups = _groups(checkpoint)
    listed = [n for g in groups for n in g.get("param_names", ())]
    if listed:
        return _Names(_checked(ref, listed, "its own param_names"), "its own param_names")
    sizes = [len(g["params"]) for g in groups if isinstance(g.get("params"), (list, tuple))]
    made, decayed, label = _parameters(ref, model, beside)
    rest = [n for n in made if n not in decayed]
    if sizes == [len(made)]:
        return _Names(made, f"the order of {label}")
    if sizes == [len(made) - len(rest), len(rest)]:
        return _Names([n for n in made if n in decayed] + rest, f"the Trainer's two groups of {label}")
    has = f"its groups have {' and '.join(map(str, sizes))} parameters" if sizes else "it has no param_groups"
    raise CheckpointError(
        f"{ref}: {has}; expected one of {len(made)}, as {label} has, or the Trainer's two of "
        f"{len(made) - len(rest)} and {len(rest)} (a part of it was trained?); {_advice(ref, beside)}"
    )


def _groups(checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    """The optimizer's groups, read out of the pickle that is in the header: by the reader that executes nothing."""
    try:
        document = TensorReader(io.BytesIO(checkpoint.files[0].raw)).load()
    except Exception:  # no pickle: a safetensors file
        return []
    groups = document.get("param_groups") if isinstance(document, dict) else None
    return [g for g in groups if isinstance(g, dict)] if isinstance(groups, (list, tuple)) else []


def _read(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as f:
            return json.loads(f.read(2**26))
    except (ValueError, RecursionError, OSError) as e:
        raise CheckpointError(f"{path}: not JSON: {e}; expected a list of names") from e


def _checked(ref: str, names: Any, where: str) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise CheckpointError(f"{ref}: {where}: expected a list of different names")
    return names


def _parameters(ref: str, model: Checkpoint, beside: str) -> tuple[list[str], Set[str], str]:
    """(all parameters in the order in which the model's class makes them, those of the Trainer's first group, its class)."""
    wanted = [c for c in model.config.get("architectures") or () if isinstance(c, str)]
    advice = _advice(ref, beside)
    if _modules(model.config) > _MOST_MODULES:
        raise CheckpointError(f"{ref}: the config of {model.ref} asks for more layers than any model has; {advice}")
    try:
        import torch
        import transformers
    except ImportError as e:
        why = f"the order of the parameters is the model's, which transformers knows, and it can't be imported ({e})"
        raise CheckpointError(f"{ref}: {why}; install it, or {advice}") from e
    cls = getattr(transformers, wanted[0], None) if wanted else None
    if model.kind == "adapter" or not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        what = "an adapter" if model.kind == "adapter" else f"architectures {wanted}"
        why = f"the order of the parameters of {model.ref} ({what}) isn't known"
        raise CheckpointError(f"{ref}: {why}; {advice}")
    try:
        config = transformers.AutoConfig.for_model(**model.config)
        with torch.device("meta"):
            made = cls(config)
        decayed = transformers.Trainer.get_decay_parameter_names(None, made)  # type: ignore[arg-type]
    except Exception as e:  # whatever a config leads to
        raise CheckpointError(f"{ref}: {wanted[0]} can't be made of the config of {model.ref}: {e}; {advice}") from e
    return [n for n, _ in made.named_parameters()], set(decayed), wanted[0]


def _modules(config: Any) -> int:
    """About how many layers and experts a config makes: the product of all such numbers, of parts the sum."""
    if not isinstance(config, Mapping):
        return 0
    numbers = [v for k, v in config.items() if isinstance(v, int) and _MANY.search(str(k))]
    return math.prod(max(n, 1) for n in numbers) + sum(map(_modules, config.values()))
