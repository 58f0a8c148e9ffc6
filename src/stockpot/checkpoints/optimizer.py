"""What a torch optimizer keeps of each parameter, under the parameters' names.

`torch.save(optimizer.state_dict(), FILE)` numbers parameters by their order in the optimizer's groups and knows no names. They
come, in this order, from `FILE.names.json` beside it, from the file itself (`param_names`, which torch writes where the optimizer
was made with them), or from the order in which the model's class makes its parameters, in one group or in the two (with
and without weight decay) that transformers' Trainer makes. Every shape is compared; nothing is guessed.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.torchpickle import TensorReader
from stockpot.checkpoints.views import renamed
from stockpot.errors import CheckpointError
from stockpot.files import is_url

__all__ = ["is_optimizer", "moments_of"]

_STATE = re.compile(r"state\.(\d+)\.(.+)")
_NAMES = "names.json"


def is_optimizer(checkpoint: Checkpoint) -> bool:
    """Whether it is an optimizer's state: tensors by number."""
    return len(checkpoint) > 0 and all(_STATE.fullmatch(n) for n in checkpoint.names())


def moments_of(checkpoint: Checkpoint, model: Checkpoint, key: str) -> Checkpoint:
    """What the optimizer keeps as `key` of each parameter of a model, under the model's names. Raises CheckpointError."""
    ref = checkpoint.ref
    kept: dict[int, set[str]] = {}
    for name in checkpoint.names():
        found = _STATE.fullmatch(name)
        assert found is not None
        kept.setdefault(int(found[1]), set()).add(found[2])
    without = [i for i, keys in sorted(kept.items()) if key not in keys]
    if without:
        has = ", ".join(sorted(kept[without[0]]))
        raise CheckpointError(
            f"{ref}: the optimizer keeps no {key!r} of parameter {without[0]}, only {has}: not Adam's state?"
        )
    names, why = _named(checkpoint, model, len(kept))
    if sorted(kept) != list(range(len(names))):
        raise CheckpointError(
            f"{ref}: keeps something of {len(kept)} parameters, and {why} has {len(names)}; {_advice(ref)}"
        )
    for i, name in enumerate(names):
        mine = checkpoint.spec(f"state.{i}.{key}").shape
        if name not in model:
            raise CheckpointError(
                f"{ref}: by {why} parameter {i} is {name!r}, which {model.ref} has not; {_advice(ref)}"
            )
        if mine != model.spec(name).shape:
            raise CheckpointError(
                f"{ref}: by {why} parameter {i} is {name!r}, {list(model.spec(name).shape)} in {model.ref}, and {key} is "
                f"{list(mine)}; {_advice(ref)}"
            )
    return renamed(checkpoint, {n: f"state.{i}.{key}" for i, n in enumerate(names)}, ref=f"{ref} ({key} by {why})")


def _advice(ref: str) -> str:
    return (
        f"write the names in the optimizer's order beside it, where it was trained: names = {{id(p): n for n, p in "
        "model.named_parameters()}; json.dump([names[id(p)] for g in optimizer.param_groups for p in g['params']], "
        f"open('{os.path.basename(ref)}.{_NAMES}', 'w'))"
    )


def _named(checkpoint: Checkpoint, model: Checkpoint, count: int) -> tuple[list[str], str]:
    """(the parameters' names by number, where they come from)."""
    ref = checkpoint.ref
    path = f"{checkpoint.path}.{_NAMES}"
    if not is_url(path) and os.path.isfile(path):  # first: it is what an error about the others asks for
        return _checked(ref, _read(path), os.path.basename(path)), os.path.basename(path)
    groups = _groups(checkpoint)
    listed = [n for g in groups for n in g.get("param_names", ())]
    if listed:
        return _checked(ref, listed, "its own param_names"), "its own param_names"
    sizes = [len(g["params"]) for g in groups if isinstance(g.get("params"), (list, tuple))]
    made, decayed, label = _parameters(checkpoint.ref, model)
    if len(sizes) == 1:
        return made, f"the order of {label}"
    if len(sizes) == 2 and sizes == [len(decayed), len(made) - len(decayed)]:
        return [*decayed, *(n for n in made if n not in set(decayed))], f"the Trainer's two groups of {label}"
    shown = " and ".join(map(str, sizes)) or f"{count}"
    raise CheckpointError(
        f"{ref}: its groups have {shown} parameters; expected one of {len(made)}, as {label} has, or the Trainer's two of "
        f"{len(decayed)} and {len(made) - len(decayed)} (a part of it was trained?); {_advice(ref)}"
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


def _parameters(ref: str, model: Checkpoint) -> tuple[list[str], Sequence[str], str]:
    """(all parameters in the order in which the model's class makes them, those of the Trainer's first group, its class)."""
    wanted = [c for c in model.config.get("architectures") or () if isinstance(c, str)]
    try:
        import torch
        import transformers
    except ImportError as e:
        why = f"the order of the parameters is the model's, which transformers knows, and it can't be imported ({e})"
        raise CheckpointError(f"{ref}: {why}; install it, or {_advice(ref)}") from e
    cls = getattr(transformers, wanted[0], None) if wanted else None
    if model.kind == "adapter" or not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        what = "an adapter" if model.kind == "adapter" else f"architectures {wanted}"
        why = f"the order of the parameters of {model.ref} ({what}) isn't known"
        raise CheckpointError(f"{ref}: {why}; {_advice(ref)}")
    try:
        config = transformers.AutoConfig.for_model(**model.config)
        with torch.device("meta"):
            made = cls(config)
        decayed = transformers.Trainer.get_decay_parameter_names(None, made)  # type: ignore[arg-type]
    except Exception as e:  # whatever a config leads to
        raise CheckpointError(
            f"{ref}: {wanted[0]} can't be made of the config of {model.ref}: {e}; {_advice(ref)}"
        ) from e
    names = [n for n, _ in made.named_parameters()]
    chosen = set(decayed)
    return names, [n for n in names if n in chosen], wanted[0]
