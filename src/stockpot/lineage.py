"""What is written beside the tensors: config, tokenizer files, the model card, and `stockpot.json`, the lineage, last."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import stockpot
from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.opening import open_checkpoint, read_json
from stockpot.engine.digests import ALGORITHM, file_digest
from stockpot.engine.publish import write_file
from stockpot.engine.run import Outcome
from stockpot.errors import CheckpointError, VerificationError
from stockpot.planning.plan import Action, ModelInput, Plan

__all__ = ["NAME", "read_lineage", "write_side_files"]

NAME = "stockpot.json"
_PACKAGES = ("stockpot", "numpy", "blake3", "torch")
_NOT_COPIED = re.compile(
    r"(.*\.index\.json|config\.json|adapter_config\.json|stockpot\.json|trainer_state\.json|optimizer.*|scheduler.*|"
    r"rng_state.*|training_args.*|all_results\.json|train_results\.json|eval_results\.json)$"
)
_COPIED = re.compile(
    r".*\.(json|jinja|txt|model|spm|bpe|tiktoken|vocab)$|(LICENSE|NOTICE|COPYING)(\..*)?$", re.IGNORECASE
)
_FOLDERS = ("chat_templates", "additional_chat_templates")


def write_side_files(plan: Plan, outcome: Outcome, options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the tensors into the partial directory. The lineage comes last. Returns the lineage."""
    directory = outcome.partial
    checkpoint = plan.inputs[plan.donor].checkpoint
    config_name = "adapter_config.json" if plan.kind == "adapter" else "config.json"
    for source, relative in copied_files(plan.inputs[plan.tokenizer_donor].checkpoint):
        target = os.path.join(directory, relative)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(source, target)
    _copy_modules(checkpoint, directory)
    if plan.config:
        write_file(os.path.join(directory, config_name), json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
    if len(plan.shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.spec.nbytes for t in plan.tensors)},
            "weight_map": {t.name: plan.shards[t.shard].name for t in plan.tensors},
        }
        write_file(os.path.join(directory, "model.safetensors.index.json"), json.dumps(index, indent=2) + "\n")
    write_file(os.path.join(directory, "README.md"), model_card(plan))
    lineage = make_lineage(plan, outcome, options)
    write_file(os.path.join(directory, NAME), readable(lineage))
    return lineage


def copied_files(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """(path, name in the output) of tokenizer, processor, generation and chat template files, licences included."""
    directory = checkpoint.directory
    if os.path.isfile(checkpoint.path) and not checkpoint.config:
        return  # a lone weights file: what lies beside it need not belong to it
    code = isinstance(checkpoint.config.get("auto_map"), dict)
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if os.path.isdir(path) and name in _FOLDERS:
            yield from ((os.path.join(path, f), os.path.join(name, f)) for f in sorted(os.listdir(path)))
        elif not os.path.isfile(path) or _NOT_COPIED.fullmatch(name):
            continue
        elif _COPIED.fullmatch(name) or (code and name.endswith(".py")):
            yield path, name


def _copy_modules(checkpoint: Checkpoint, directory: str) -> None:
    """The folders that a sentence encoder's modules.json names (1_Pooling and the like), as they are."""
    path = os.path.join(checkpoint.directory, "modules.json")
    if not os.path.isfile(path) or checkpoint.kind != "model":
        return
    with open(path, encoding="utf-8") as f:
        modules = json.load(f)
    for module in modules if isinstance(modules, list) else ():
        name = module.get("path") if isinstance(module, dict) else None
        source = os.path.join(checkpoint.directory, name) if isinstance(name, str) else ""
        if name and os.sep not in name and ".." not in name and os.path.isdir(source):
            shutil.copytree(source, os.path.join(directory, name), dirs_exist_ok=True)


def make_lineage(plan: Plan, outcome: Outcome, options: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a merge as plain data; its keys are described in docs/lineage.md."""
    tensors = {}
    for t in plan.tensors:
        row: dict[str, Any] = {
            "dtype": t.spec.dtype.label,
            "shape": list(t.spec.shape),
            "digest": outcome.output_digests[t.name],
            "file": plan.shards[t.shard].name,
        }
        row["from" if t.action is not Action.MERGE else "group"] = (
            {"model": t.operands[0].model, "name": t.operands[0].name} if t.action is not Action.MERGE else t.group
        )
        tensors[t.name] = row
    return {
        "format": 1,
        "stockpot": stockpot.__version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "recipe": {"file": plan.recipe.origin, "sha256": plan.recipe.digest, "text": plan.recipe.text},
        "seed": plan.seed,
        "options": dict(options),
        "groups": [{"method": g.method.name, "parameters": g.public_params()} for g in plan.groups],
        "digests": ALGORITHM,
        "inputs": [_input(plan, m, outcome) for m in plan.inputs],
        "output": {
            "files": [
                {
                    "name": shard.name,
                    "bytes": shard.size,
                    "digest": file_digest(
                        shard.header, (outcome.output_digests[t.name] for t in plan.tensors if t.shard == i)
                    ),
                }
                for i, shard in enumerate(plan.shards)
            ],
            "tensors": tensors,
        },
        "notes": list(plan.notes),
        "warnings": outcome.warnings,
        "bytes_read": outcome.bytes_read,
        "bytes_written": outcome.bytes_written,
        "bytes_resumed": outcome.resumed_bytes,
        "seconds": round(outcome.seconds, 3),
        "packages": _versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def readable(lineage: Mapping[str, Any]) -> str:
    """JSON with a line for each key and each tensor: `indent` takes a minute for models of many tensors."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def lines(value: Mapping[str, Any], indent: str, deep: tuple[str, ...]) -> str:
        inner = indent + " "
        rows = (
            f"{inner}{compact(k)}: {lines(v, inner, deep[1:]) if deep and k == deep[0] else compact(v)}"
            for k, v in value.items()
        )
        return "{\n" + ",\n".join(rows) + "\n" + indent + "}"

    plain = dict(lineage)
    output = {"files": plain["output"]["files"], "tensors": plain["output"]["tensors"]}
    tensors = lines(output["tensors"], "  ", ())
    body = lines({k: v for k, v in plain.items() if k != "output"}, "", ())[:-2]
    return f'{body},\n "output": {{\n  "files": {compact(output["files"])},\n  "tensors": {tensors}\n }}\n}}\n'


def _input(plan: Plan, model: ModelInput, outcome: Outcome) -> dict[str, Any]:
    """Files of one input. A file's digest covers its header and those tensors that took part: `tensors_read` counts them."""
    files = []
    for header in model.checkpoint.files:
        read = [
            outcome.input_digests[model.index, n] for n in header.entries if (model.index, n) in outcome.input_digests
        ]
        files.append(
            {
                "name": os.path.basename(header.path),
                "bytes": header.size,
                "digest": file_digest(header.raw, read),
                "tensors": len(header.entries),
                "tensors_read": len(read),
            }
        )
    return {
        "model": model.ref,
        "path": model.checkpoint.path,
        "donor_of_config": model.index == plan.donor,
        "files": files,
    }


def _versions() -> dict[str, str]:
    out = {}
    for name in _PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(plan: Plan) -> str:
    """README.md with the Hugging Face Hub's metadata for merges."""
    bases = []
    for model in plan.inputs:
        for candidate in (model.ref, model.checkpoint.config.get("_name_or_path")):
            if isinstance(candidate, str) and _HUB_ID.fullmatch(candidate) and not os.path.exists(candidate):
                bases.append(candidate)
                break
    library = "peft" if plan.kind == "adapter" else "transformers"
    head = ["---", f"library_name: {library}", "tags:", "- merge", "- stockpot"]
    if bases:
        head += ["base_model:", *(f"- {b}" for b in dict.fromkeys(bases)), "base_model_relation: merge"]
    head += ["---"]
    models = "\n".join(
        f"- `{m.ref}`" + (" (config and tokenizer)" if m.index == plan.donor else "") for m in plan.inputs
    )
    method = plan.recipe.merge_method
    body = f"""
# {method} merge

Made with stockpot {stockpot.__version__} by `{method}` from

{models}

`{NAME}` beside this file records inputs, digests and parameters; `stockpot verify .` checks them.

## Recipe

```yaml
{plan.recipe.text.rstrip()}
```
"""
    return "\n".join(head) + "\n" + body


def read_lineage(directory: str) -> tuple[dict[str, Any], Checkpoint]:
    """The lineage in a directory and the checkpoint beside it. Raises VerificationError where there is none."""
    path = os.path.join(directory, NAME)
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory}: no such directory")
    if not os.path.exists(path):
        raise VerificationError(
            f"{directory}: no {NAME}, so there is nothing to verify against (was it merged by stockpot?)"
        )
    try:
        lineage = read_json(path)
        checkpoint = open_checkpoint(directory)
        _ = lineage["output"]["files"], lineage["output"]["tensors"]
    except (CheckpointError, KeyError, TypeError) as e:
        raise VerificationError(f"{directory}: {e}") from e
    return lineage, checkpoint
