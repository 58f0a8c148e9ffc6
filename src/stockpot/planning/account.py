"""What becomes of everything that the inputs hold: each tensor and each file is merged, copied, or left out for a reason."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from stockpot.checkpoints.beside import NOT_WEIGHTS, copied_files, part_files
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.meaning.buffers import is_computed
from stockpot.errors import CheckpointError, few_of
from stockpot.files import read_any_json
from stockpot.planning.matching import Matcher
from stockpot.planning.plan import Action, ModelInput, TensorPlan

__all__ = ["account_of", "note_left_files", "note_other_settings"]

#: files of a directory that are looked at, at most
_MOST = 5000
#: what a torch file holds besides that nobody misses
_TRAINERS = ("(training state)", "(a number of the trainer's)")
_WRITTEN = {"config.json", "adapter_config.json", "README.md", "stockpot.json"}


def account_of(
    inputs: Sequence[ModelInput], tensors: Sequence[TensorPlan], matcher: Matcher, donor: int, tokenizer: int
) -> tuple[Mapping[str, Any], ...]:
    """One row for each checkpoint on disk that the inputs are, or are computed from:

    model     what the user wrote; path: where it lies
    tensors   merged, copied: how many; left_out: [{why, names}]
    files     [{name, fate, why}], fate one of read, copied, written anew, left out
    """
    used: dict[int, dict[str, str]] = {}  # leaf -> stored tensor -> what is done with it
    leaves: dict[int, tuple[str, Checkpoint]] = {}
    why: dict[int, dict[str, str]] = {}
    for model in inputs:
        if model.role == "factors":
            continue
        for part in model.checkpoint.parts or (model.checkpoint,):
            leaves.setdefault(id(part), (model.ref, part))
    for t in tensors:
        fate = "merged" if t.action is Action.MERGE else "copied"
        for o in t.inputs:
            for leaf, name in inputs[o.model].checkpoint.stored(o.name):
                own = used.setdefault(id(leaf), {})
                own[name] = "merged" if own.get(name) == "merged" else fate
    for model in inputs:
        if model.role != "factors":
            _reasons(model, matcher, why)
    rows = []
    files = {id(inputs[i].checkpoint): i for i in (donor, tokenizer)}
    for key, (ref, leaf) in leaves.items():
        own = used.get(key, {})
        left: dict[str, list[str]] = {}
        for name in leaf.names():
            if name not in own:
                left.setdefault(why.get(key, {}).get(name, "no tensor of the output is made of it"), []).append(name)
        takes = [i for i in files.values() if _lies_in(inputs[i].checkpoint, leaf)]
        rows.append(
            {
                "model": ref,
                "path": leaf.path,
                "tensors": {
                    "merged": sum(f == "merged" for f in own.values()),
                    "copied": sum(f == "copied" for f in own.values()),
                    "left_out": [{"why": reason, "names": names} for reason, names in left.items()],
                },
                "files": list(_files(leaf, [inputs[i].checkpoint for i in takes], donor in takes)),
            }
        )
    return tuple(rows)


def _lies_in(checkpoint: Checkpoint, leaf: Checkpoint) -> bool:
    return checkpoint is leaf or checkpoint.directory == leaf.directory


def _reasons(model: ModelInput, matcher: Matcher, why: dict[int, dict[str, str]]) -> None:
    """Why tensors of a model are not used, for those that may not be."""
    checkpoint = model.checkpoint
    tied = checkpoint.tied()
    computed = set(matcher.left.get(model.index, ()))
    copies = checkpoint.ties.copies
    for name in checkpoint.names():
        reason = ""
        if name in tied:
            reason = f"another name of {tied[name]}"
        elif name in copies:
            reason = "a copy of the embedding"
        elif name in computed or (checkpoint.kind == "model" and is_computed(name, checkpoint.spec(name))):
            reason = "computed anew by models"
        elif model.role != "model":
            reason = f"beside tensors that take no {model.role}"
        elif not matcher.recipe.includes(name):
            reason = "left out by the recipe (include, exclude)"
        elif matcher.recipe.slices:
            reason = "of layers that the recipe does not take"
        if reason:
            for leaf, own in checkpoint.stored(name):
                why.setdefault(id(leaf), {}).setdefault(own, reason)
    for leaf in checkpoint.parts:
        for second, first in leaf.tied().items():
            why.setdefault(id(leaf), {}).setdefault(second, f"another name of {first}")


def _files(leaf: Checkpoint, taken: Sequence[Checkpoint], is_donor: bool) -> Iterator[dict[str, str]]:
    """Every file of a checkpoint's directory. taken: the inputs in it whose files are copied."""
    read = {leaf.relative(h): h for h in leaf.files}
    copied = {name for c in taken for source in (copied_files(c), part_files(c)) for _, name in source}
    left = dict(leaf.left)
    for name in _listing(leaf, read):
        if name in read:
            beside = read[name].left
            yield {"name": name, "fate": "read", **({"why": f"but not {', '.join(beside)}"} if beside else {})}
        elif name in left:
            yield {"name": name, "fate": "left out", "why": left[name]}
        elif name in copied and (name not in _WRITTEN or "/" in name):
            yield {"name": name, "fate": "copied"}
        elif name in _WRITTEN or name.endswith(".index.json"):
            why = "" if is_donor else "that of the model whose config is taken is written"
            yield {"name": name, "fate": "written anew" if is_donor else "left out", **({"why": why} if why else {})}
        elif NOT_WEIGHTS.fullmatch(os.path.basename(name)) or _is_training(name):
            yield {"name": name, "fate": "left out", "why": "the state of training"}
        elif taken:
            yield {"name": name, "fate": "left out", "why": "not of a kind that belongs to a model"}
        else:
            yield {"name": name, "fate": "left out", "why": "those of another model are taken"}


def _is_training(name: str) -> bool:
    base = os.path.basename(name)
    top = name.partition("/")[0]
    return base in ("trainer_state.json", "zero_to_fp32.py", "latest", "all_results.json", "train_results.json") or (
        top.startswith(("checkpoint-", "global_step", "runs", "logs"))
    )


def _listing(leaf: Checkpoint, read: Iterable[str]) -> list[str]:
    """The names of all files in a checkpoint's directory, those of its folders too; of a lone file its own."""
    if os.path.isfile(leaf.path):
        return [os.path.basename(leaf.path)]
    found: list[str] = []
    for base, folders, names in os.walk(leaf.directory):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inner = os.path.relpath(base, leaf.directory)
        found += [n if inner == "." else f"{inner}/{n}".replace(os.sep, "/") for n in sorted(names)]
        if len(found) > _MOST:
            break
    return list(dict.fromkeys([*read, *found]))[:_MOST]


def note_other_settings(inputs: Sequence[ModelInput], donor: int) -> Iterator[str]:
    """What parts are set to otherwise in another model: the donor's files are copied (pooling, activations, schedulers)."""
    own = inputs[donor].checkpoint
    files = {relative: path for path, relative in part_files(own) if relative.endswith(".json")}
    for model in inputs:
        if model.index == donor or model.role != "model" or model.checkpoint.directory == own.directory:
            continue
        other = [
            name
            for name, path in files.items()
            if os.path.isfile(there := os.path.join(model.checkpoint.directory, name)) and _json(path) != _json(there)
        ]
        if other:
            yield f"{model.ref}: {few_of(other)}: not the settings of {inputs[donor].ref}, which are copied"


def _json(path: str) -> Any:
    try:
        return read_any_json(path)
    except CheckpointError as e:
        return str(e)


def note_left_files(inputs: Sequence[ModelInput]) -> Iterator[str]:
    """What holds weights and is not read, by model and reason."""
    for model in inputs:
        for leaf in model.checkpoint.parts or (model.checkpoint,):
            by_reason: dict[str, list[str]] = {}
            for name, reason in leaf.left:
                by_reason.setdefault(reason, []).append(name)
            for header in leaf.files:
                for held in header.left:
                    if not held.endswith(_TRAINERS):
                        by_reason.setdefault(f"{leaf.relative(header)} is read without it", []).append(held)
            for reason, names in by_reason.items():
                yield f"{leaf.ref}: {few_of(names)}: left out: {reason}"
