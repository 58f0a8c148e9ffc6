"""What is written beside the tensors: config, tokenizer files, the model card, and `stockpot.json`, the lineage, last."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stockpot.adapters import FactoredAdapter, product_report
from stockpot.checkpoints.beside import side_files, side_stamps
from stockpot.checkpoints.checkpoint import Checkpoint, FilePart
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.engine.digests import ALGORITHM, file_digest, piece_digest
from stockpot.engine.measures import nonfinite_report
from stockpot.engine.outdir import JOURNAL
from stockpot.engine.outdir import LINEAGE as NAME
from stockpot.engine.run import Outcome
from stockpot.engine.verify import side_digest, stored_digest
from stockpot.errors import CheckpointError, OutputError, ReadError, VerificationError, visible
from stockpot.files import (
    copy_file,
    is_url,
    make_folders,
    open_regular,
    read_bytes,
    read_json,
    replace_file,
    write_file,
)
from stockpot.planning.plan import MergeGroup, ModelInput, Plan
from stockpot.planning.steps import steps_in, why_written
from stockpot.version import __version__

__all__ = ["NAME", "check_side_files", "read_lineage", "record_verdict", "write_side_files"]

_PACKAGES = ("stockpot", "numpy", "blake3", "torch")


def check_side_files(plan: Plan) -> None:
    """Find out before the merge whether what is to be copied beside the tensors can be read, and is what was planned with.

    Raises CheckpointError, ReadError.
    """
    _check_unchanged(plan)
    for source, _ in side_sources(plan):
        try:
            os.close(open_regular(source))
        except OSError as e:
            raise CheckpointError(f"{source}: is to be copied, but can't be read: {e.strerror or e}") from e


def write_side_files(
    plan: Plan, outcome: Outcome, options: Mapping[str, Any], *, adapter: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything but the tensors into the partial directory. The lineage comes last. Returns the lineage."""
    try:
        written = _copy_and_write(plan, outcome.partial)
        digests = {name: side_digest(os.path.join(outcome.partial, name)) for name in written}
        lineage = make_lineage(plan, outcome, options, digests)
        if adapter is not None:
            lineage["adapter"] = dict(adapter)
        write_file(os.path.join(outcome.partial, NAME), readable(lineage))
    except ReadError:
        raise  # an input's, not the output's
    except OSError as e:
        raise OutputError(f"{outcome.partial}: writing beside the tensors failed: {e.strerror or e}") from e
    return lineage


def _copy_and_write(plan: Plan, directory: str) -> list[str]:
    """Copied and generated files; their names."""
    generated = {"README.md": model_card(plan)}
    if plan.template.config:
        config_name = "adapter_config.json" if plan.template.kind == "adapter" else "config.json"
        generated[config_name] = json.dumps(plan.template.config, indent=2) + "\n"
    generated |= _indexes(plan)
    names = []
    taken = {*generated, *(s.name for s in plan.shards), NAME, JOURNAL}
    for source, relative in side_sources(plan):
        if relative in taken:
            continue
        target = os.path.join(directory, relative)
        make_folders(os.path.dirname(target))
        copy_file(source, target)
        names.append(relative)
    _check_unchanged(plan)
    for name, text in generated.items():
        make_folders(os.path.dirname(os.path.join(directory, name)))
        write_file(os.path.join(directory, name), text)
    return sorted([*names, *generated])


def _indexes(plan: Plan) -> dict[str, str]:
    """The index of every part that is written in several files."""
    by_part: dict[FilePart, set[int]] = {}
    for number, shard in enumerate(plan.shards):
        by_part.setdefault(shard.part, set()).add(number)
    out = {}
    for part, numbers in by_part.items():
        if len(numbers) > 1:
            own = [t for t in plan.tensors if t.shard in numbers]
            index = {
                "metadata": {"total_size": sum(t.spec.nbytes for t in own)},
                "weight_map": {
                    t.name.removeprefix(part.prefix): os.path.basename(plan.shards[t.shard].name) for t in own
                },
            }
            out[f"{part.stem}.safetensors.index.json"] = json.dumps(index, indent=2) + "\n"
    return out


def _check_unchanged(plan: Plan) -> None:
    """A tokenizer was compared with the others as the merge was planned: another one is not copied. Raises ReadError."""
    if not plan.sides:
        return
    donor, tokenizer = (plan.inputs[i].checkpoint for i in (plan.template.donor, plan.template.tokenizer))
    changed = sorted({row[0] for row in set(side_stamps(donor, tokenizer)) ^ set(plan.sides)})
    if changed:
        raise ReadError(f"{changed[0]}: was changed after the merge was planned; merge again to take it as it is now")


def side_sources(plan: Plan) -> Iterator[tuple[str, str]]:
    """(path, name in the output) of every file that is copied."""
    yield from side_files(*(plan.inputs[i].checkpoint for i in (plan.template.donor, plan.template.tokenizer)))


def make_lineage(
    plan: Plan, outcome: Outcome, options: Mapping[str, Any], side_files: Mapping[str, str]
) -> dict[str, Any]:
    """The record of a merge as plain data; its keys are described in docs/lineage.md."""
    tensors = {}
    for t in plan.tensors:
        row: dict[str, Any] = {
            "dtype": t.spec.dtype.label,
            "shape": list(t.spec.shape),
            "digest": outcome.output_digests[t.name],
            "file": plan.shards[t.shard].name,
        }
        if t.group < 0:
            row["from"] = {"model": t.operands[0].model, "name": t.operands[0].name}
        else:
            row["group"] = t.group
        norm, ratio = outcome.sizes.norm(t.name), outcome.sizes.ratio(t.name)
        if norm is not None and t.spec.dtype.is_float:
            row["norm"] = float(f"{norm:.6g}")
            row["norm_ratio"] = None if ratio is None else float(f"{ratio:.6g}")
        tensors[t.name] = row
    return {
        "format": 1,
        "stockpot": __version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "recipe": {"file": plan.recipe.origin or "<recipe>", "sha256": plan.recipe.digest, "text": plan.recipe.text},
        "seed": plan.seed,
        **({"steps": steps} if (steps := _steps(plan)) else {}),
        **({"soup": plan.soup.to_dict()} if plan.soup else {}),
        "options": dict(options),
        "groups": [_group(g) for g in plan.groups],
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
            "side_files": dict(side_files),
            "tensors": tensors,
        },
        "account": [dict(row) for row in plan.account],
        "notes": list(plan.notes),
        "warnings": outcome.warnings,
        "nonfinite": nonfinite_report(outcome.sizes, plan),
        "parameters": {"output": plan.parameters, "inputs": [m.checkpoint.parameters for m in plan.inputs]},
        "bytes_read": outcome.bytes_read,
        "bytes_written": outcome.bytes_written,
        "bytes_resumed": outcome.resumed_bytes,
        "seconds": round(outcome.seconds, 3),
        "packages": _versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _group(group: MergeGroup) -> dict[str, Any]:
    """A method and its parameters; where the bytes rest on more than these and the inputs, that too."""
    row: dict[str, Any] = {"method": group.method.name, "parameters": group.public_params()}
    if group.method.reproducible != "anywhere":
        row["reproducible"] = group.method.reproducible
    return row


def _steps(plan: Plan) -> list[dict[str, Any]]:
    """The steps that a plan reads, the innermost first."""
    out: list[dict[str, Any]] = []
    for found in (step for model in plan.inputs for step in steps_in(model.checkpoint)):
        step = found.step
        out += [s for s in _steps(step) if s not in out]
        row = {"name": found.ref, "streamed": why_written(step) is None, "groups": [_group(g) for g in step.groups]}
        for model in step.inputs:
            if isinstance(model.checkpoint, FactoredAdapter):
                row["adapter"] = product_report(model.checkpoint)
        out += [row] if row not in out else []
    return out


def readable(lineage: Mapping[str, Any]) -> str:
    """JSON with a line for each key and each tensor: `indent` takes a minute for models of many tensors."""

    def compact(value: Any) -> str:
        return json.dumps(value)

    def lines(value: Mapping[str, Any], indent: str, deep: tuple[str, ...]) -> str:
        inner = indent + " "
        rows = (
            f"{inner}{compact(k)}: {lines(v, inner, deep[1:]) if deep and k == deep[0] else compact(v)}"
            for k, v in value.items()
        )
        return "{\n" + ",\n".join(rows) + "\n" + indent + "}"

    plain = dict(lineage)
    output = plain["output"]
    tensors = lines(output["tensors"], "  ", ())
    body = lines({k: v for k, v in plain.items() if k != "output"}, "", ())[:-2]
    rows = [
        f'  "files": {compact(output["files"])}',
        f'  "side_files": {compact(output["side_files"])}',
        f'  "tensors": {tensors}',
    ]
    return body + ',\n "output": {\n' + ",\n".join(rows) + "\n }\n}\n"


def _input(plan: Plan, model: ModelInput, outcome: Outcome) -> dict[str, Any]:
    """Files of one input. A file's digest covers its header and those tensors that took part: `tensors_read` counts them.

    A checkpoint that was computed while it was read lists the checkpoints that it came from under `parts`.
    """
    checkpoint = model.checkpoint
    row: dict[str, Any] = {
        "model": model.ref,
        "path": checkpoint.path,
        **({"role": model.role} if model.role != "model" else {}),
        "donor_of_config": model.index == plan.template.donor,
    }
    if checkpoint.parts:
        row |= {"made": checkpoint.made} if checkpoint.made else {}
        # of factors the adapters are listed themselves
        listed = {p.path for p in checkpoint.parts} if model.role == "factors" else set()
        row["parts"] = [
            {"path": p.path, **({} if p.path in listed else {"files": _files(p, _part_digests(p, outcome))})}
            for p in checkpoint.parts
        ]
        return row
    own = {name: digest for (index, name), digest in outcome.input_digests.items() if index == model.index}
    if any(p.path == checkpoint.path for m in plan.inputs for p in m.checkpoint.parts):
        own = _part_digests(checkpoint, outcome) | own  # another input is computed from it
    return row | {"files": _files(checkpoint, own)}


def _part_digests(part: Checkpoint, outcome: Outcome) -> dict[str, str]:
    """Of every tensor of a part: as it was read, or read now where a resumed merge had no need of it."""
    known = dict(outcome.part_digests.get(part.path, {}))
    for name in part.names():
        if name not in known:
            known[name] = stored_digest(part, name)
    part.close()
    return known


def _files(checkpoint: Checkpoint, digests: Mapping[str, str]) -> list[dict[str, Any]]:
    files = []
    for i, header in enumerate(checkpoint.files):
        prefix = checkpoint.parted[i].prefix if checkpoint.parted else ""
        read = [digests[prefix + n] for n in header.entries if prefix + n in digests]
        files.append(
            {
                "name": checkpoint.relative(header),
                "bytes": header.size,
                "digest": file_digest(header.raw, read),
                "tensors": len(header.entries),
                "tensors_read": len(read),
            }
        )
    return files


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
    for model in (m for m in plan.inputs if m.role == "model"):
        for candidate in (model.ref, model.checkpoint.config.get("_name_or_path")):
            if isinstance(candidate, str) and _HUB_ID.fullmatch(candidate) and not os.path.exists(candidate):
                bases.append(candidate)
                break
    library = "peft" if plan.template.kind == "adapter" else "transformers"
    head = ["---", f"library_name: {library}", "tags:", "- merge", "- stockpot"]
    if bases:
        head += ["base_model:", *(f"- {b}" for b in dict.fromkeys(bases)), "base_model_relation: merge"]
    head += ["---"]
    about = {m.index: " (config and tokenizer)" if m.index == plan.template.donor else "" for m in plan.inputs}
    about |= {m.index: f" ({m.role})" for m in plan.inputs if m.role != "model"}
    models = "\n".join(f"- `{visible(m.ref, line=True).replace('`', chr(39))}`{about[m.index]}" for m in plan.inputs)
    recipe = visible(plan.recipe.text.rstrip())
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", recipe))]))  # none in the recipe is as long
    method = plan.recipe.merge_method
    body = f"""
# {method} merge

Made with stockpot {__version__} by `{method}` from

{models}

`{NAME}` beside this file records inputs, digests and parameters; `stockpot verify .` checks them.

## Recipe

{fence}yaml
{recipe}
{fence}
"""
    return "\n".join(head) + "\n" + body


def read_lineage(directory: str) -> tuple[dict[str, Any], Checkpoint]:
    """The lineage in a directory and the checkpoint beside it. Raises VerificationError where there is none."""
    checkpoint = None
    if is_url(directory):
        checkpoint = open_checkpoint(directory)
    elif not os.path.isdir(directory):
        raise CheckpointError(f"{directory}: no such directory")
    path = os.path.join(checkpoint.directory if checkpoint else directory, NAME)
    if not os.path.exists(path):
        raise VerificationError(
            f"{directory}: no {NAME}, so there is nothing to verify against (was it merged by stockpot?)"
        )
    try:
        lineage = read_json(path)
        wrong = damage(lineage)
        if wrong:
            raise VerificationError(f"{path}: is no lineage of stockpot, or a damaged one: {wrong}")
        checkpoint = checkpoint or open_checkpoint(directory)
    except CheckpointError as e:
        raise VerificationError(f"{directory}: {e}") from e
    return lineage, checkpoint


def damage(lineage: Mapping[str, Any]) -> str:
    """What of a lineage is not what it should be, as far as anything here uses it; "" where all is."""
    text, number, rows, mapping = str, int, list, dict
    wanted: list[tuple[str, Any]] = [
        ("format", number), ("digests", text), ("recipe", mapping), ("recipe.text", text), ("recipe.sha256", text),
        ("inputs", rows), ("output", mapping), ("output.files", rows), ("output.side_files", mapping),
        ("output.tensors", mapping),
    ]  # fmt: skip
    for path, kind in wanted:
        found: Any = lineage
        for key in path.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if not isinstance(found, kind):
            return f"{path}: expected {_KINDS[kind]}, got {type(found).__name__}"
    output = lineage["output"]
    inner: list[tuple[str, Iterable[Any], Mapping[str, type]]] = [
        ("output.files", output["files"], {"name": text, "bytes": number, "digest": text}),
        ("output.tensors", output["tensors"].values(), {"dtype": text, "shape": rows, "digest": text}),
        ("inputs", lineage["inputs"], {"model": text, "path": text}),
    ]
    for path, entries, keys in inner:
        for entry in entries:
            for key, kind in keys.items():
                if not isinstance(entry, Mapping) or not isinstance(entry.get(key), kind):
                    return f"{path}: an entry without its {key} ({_KINDS[kind]})"
    if not all(isinstance(d, str) for d in output["side_files"].values()):
        return "output.side_files: expected digests"
    if not all(isinstance(entry.get("parts", []), list) for entry in lineage["inputs"]):
        return "inputs: parts: expected a list"
    parts = [p for entry in lineage["inputs"] for p in entry.get("parts", [])]
    if not all(isinstance(p, Mapping) and isinstance(p.get("path"), str) for p in parts):
        return "inputs: a part without its path"
    for key in ("gates", "soup", "options", "adapter", "packages"):
        if not isinstance(lineage.get(key, {}), Mapping):
            return f"{key}: expected a mapping"
    for key in ("warnings", "notes", "card_before", "steps"):
        if not isinstance(lineage.get(key, []), list):
            return f"{key}: expected a list"
    return ""


_KINDS: Mapping[Any, str] = {str: "text", int: "a number", list: "a list", dict: "a mapping"}


_GATES = "\n## Release gates\n"


def record_verdict(directory: str, verdict: Mapping[str, Any]) -> None:
    """Write what the release gates said into the lineage, under `gates`, and into the model card. Raises OutputError."""
    path, card = os.path.join(directory, NAME), os.path.join(directory, "README.md")
    for file in (path, card):
        if os.path.islink(file):
            raise OutputError(f"{file}: is a symbolic link; the verdict of the gates is written into files of OUT only")
    lineage = read_json(path)
    try:
        known = {lineage["output"]["side_files"]["README.md"], *lineage.get("card_before", ())}
        before = side_digest(card)
        text = read_bytes(card).decode("utf-8", "surrogateescape").split(_GATES)[0].rstrip("\n") + "\n"
        new = (text + _GATES + _gates_text(verdict)).encode("utf-8", "surrogateescape")
        lineage["gates"] = dict(verdict)
        lineage["output"]["side_files"]["README.md"] = piece_digest(new).hex()
        # who is killed between the two leaves the card as it was, which the lineage knows as well
        lineage["card_before"] = [before] if before in known else []
        replace_file(path, readable(lineage))
        replace_file(card, new)
    except (OSError, KeyError, TypeError) as e:
        raise OutputError(f"{directory}: the verdict of the gates can't be written: {e}") from e


def _gates_text(verdict: Mapping[str, Any]) -> str:
    word = "passed" if verdict["passed"] else "not passed" + ("; published by force" if verdict.get("forced") else "")
    cells = [[g["gate"], g["severity"], g["status"], g["why"]] for g in verdict["gates"]]
    plain = ([visible(" ".join(c.split())).replace("|", "\\|").replace("<", "&lt;") for c in row] for row in cells)
    rows = "\n".join("| " + " | ".join(row) + " |" for row in plain)
    head = f"The gates of the suite with SHA-256 `{verdict['suite_sha256']}`: {word}."
    return f"\n{head}\n\n| gate | severity | status | |\n|---|---|---|---|\n{rows}\n"
