"""Results as text for people or JSON for programs. Knows no merging."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stockpot.cli.terminal import console, print_json, say, tell
from stockpot.errors import visible
from stockpot.specs import format_count, format_size

if TYPE_CHECKING:
    from stockpot.api import MergeResult
    from stockpot.planning.plan import Plan

__all__ = [
    "print_table",
    "show_checkpoint",
    "show_doctor",
    "show_merge",
    "show_methods",
    "show_notes",
    "show_plan",
    "show_verified",
]


#: rows of a table that rich still lays out
_LONG = 400


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A plain table; columns whose name begins with # hold numbers. Long ones are laid out by hand: rich takes 0.3 ms a cell."""
    from rich.table import Table

    heads, cells = list(columns), [[visible(str(c), line=True) for c in row] for row in rows]
    if len(cells) > _LONG:
        numeric_of = [h.startswith("#") for h in heads]
        lines = [[h.lstrip("#") for h in heads], *cells]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = (
            "  ".join(
                c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric_of, strict=True)
            ).rstrip()
            for line in lines
        )
        say("\n".join([*([visible(title, line=True)] if title else []), *shown]))
        return
    table = Table(
        title=visible(title, line=True) or None, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for column in heads:
        numeric = column.startswith("#")
        table.add_column(column.lstrip("#"), justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for row in cells:
        table.add_row(*row)
    console().print(table)


def show_notes(notes: Iterable[str], *, quiet: bool) -> None:
    """Notes go to stderr, so that they never mix with output."""
    if not quiet:
        for note in notes:
            tell(f"note: {note}")


def show_merge(result: MergeResult, *, as_json: bool, quiet: bool) -> None:
    for warning in result.warnings:
        tell(f"warning: {warning}")
    if as_json:
        print_json(
            {
                "path": result.path,
                "seconds": round(result.seconds, 3),
                "bytes_read": result.bytes_read,
                "bytes_written": result.bytes_written,
                "warnings": list(result.warnings),
                "notes": list(result.notes),
                "seed": result.lineage["seed"],
                "files": result.lineage["output"]["files"],
            }
        )
    elif not quiet:
        rate = (result.bytes_read + result.bytes_written) / max(result.seconds, 1e-9)
        say(
            f"{result.path}: {len(result.lineage['output']['tensors'])} tensors, {format_size(result.bytes_written)} written, "
            f"{format_size(result.bytes_read)} read in {result.seconds:.1f} s ({format_size(rate)}/s)"
        )


def _parameters(params: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(f"{v:g}" for v in value) + "]"
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{k}={shown(v)}" for k, v in params.items())


def show_plan(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        print_json(plan.to_dict())
        return
    print_table(
        "models",
        ("model", "#tensors", "#bytes", ""),
        (
            (
                m.ref,
                len(m.checkpoint),
                format_size(m.checkpoint.nbytes),
                "config and tokenizer" if m.index == plan.template.donor else "",
            )
            for m in plan.inputs
        ),
    )
    say()
    rows = plan.group_rows()
    shown = rows if len(rows) <= 40 else rows[:40]
    print_table(
        "tensors",
        ("method", "parameters", "#tensors", "#elements", "#read", "#passes", "#written", "such as"),
        (
            (
                r["method"],
                _parameters(r["parameters"]),
                r["tensors"],
                format_count(r["elements"]),
                format_size(r["read_bytes"]),
                r["passes"],
                format_size(r["write_bytes"]),
                r["example"],
            )
            for r in shown
        ),
    )
    if len(rows) > len(shown):
        say(f"... and {len(rows) - len(shown)} more groups (--json shows all)")
    budget = plan.budget
    say(
        f"\nreads {format_size(plan.bytes_in)}, writes {format_size(plan.bytes_out)} in {len(plan.shards)} "
        f"file{'s' if len(plan.shards) != 1 else ''}; holds at most {format_size(budget.peak)} of {format_size(budget.limit)} "
        f"over the interpreter ({budget.workers} worker{'s' if budget.workers != 1 else ''}); seed {plan.seed}"
    )
    for row in plan.account:
        say(f"accounted for: {_accounted(row)}")
    for note in plan.notes:
        say(f"note: {note}")


def _accounted(row: Mapping[str, Any]) -> str:
    """What becomes of a checkpoint's tensors and files, in a line."""
    tensors = row["tensors"]
    said = [f"{tensors[fate]} {fate}" for fate in ("merged", "copied") if tensors[fate]]
    said += [f"{len(left['names'])} left out ({left['why']})" for left in tensors["left_out"]]
    files: dict[str, int] = {}
    for file in row["files"]:
        files[file["fate"]] = files.get(file["fate"], 0) + 1
    counted = ", ".join(f"{n} {fate}" for fate, n in files.items())
    return f"{row['model']}: tensors: {', '.join(said) or 'none'}; files: {counted}"


def show_checkpoint(info: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    architecture = f", {info['architecture']}" if info["architecture"] else ""
    say(f"{info['path']}: {info['kind']}{architecture}")
    say(
        f"{format_count(info['parameters'])} parameters, {format_size(info['bytes'])} in {len(info['files'])} "
        f"file{'s' if len(info['files']) != 1 else ''}, {len(info['tensors'])} tensors"
    )
    for dtype, row in info["dtypes"].items():
        say(f"  {dtype}: {row['tensors']} tensors, {format_size(row['bytes'])}")
    for stack, count in info["layers"].items():
        say(f"  layers: {stack} x {count}")
    for part, row in info["parts"].items():
        begins = f", names begin with {row['prefix']!r}" if row["prefix"] else ""
        say(f"  part: {part or 'the model'}: {row['tensors']} tensors, {format_size(row['bytes'])}{begins}")
    for tie in info["ties"]:
        word = {True: "tied", False: "not tied"}.get(tie["tied"], "perhaps tied")
        say(f"  {word}: {tie['second']} = {tie['first']} ({tie['known']}{'' if tie['stored'] else '; stored once'})")
    say(f"  names: {_names(info['dialect'])}")
    for file in info["beside"]:
        say(f"  beside: {file['name']}: not read: {file['why']}")
    say()
    print_table("", ("tensor", "dtype", "shape"), ((n, t["dtype"], t["shape"]) for n, t in info["tensors"].items()))


def _names(dialect: Mapping[str, Any]) -> str:
    """How a checkpoint's tensors are called, in words."""
    said = [f"of {dialect['class']}"] if "class" in dialect else ["of no model type that is known"]
    if dialect.get("prefix"):
        said.append(f"{'with' if dialect['prefixed'] else 'without'} the base's prefix {dialect['prefix']!r}")
    if dialect.get("renamed_in_memory"):
        said.append(f"{dialect['renamed_in_memory']} have other names in memory")
    if dialect["wrappers"]:
        said.append(f"with {dialect['wrappers']} of a wrapper")
    if dialect["format"] not in (None, "pt"):
        said.append(f"format {dialect['format']}")
    return ", ".join(said)


def show_verified(out: str, lineage: Mapping[str, Any], *, as_json: bool) -> None:
    tensors = lineage["output"]["tensors"]
    if as_json:
        print_json({"path": out, "verified": True, "tensors": len(tensors), "created": lineage.get("created")})
    else:
        say(f"{out}: {len(tensors)} tensors are what was written on {lineage.get('created')}")


def _method_row(method: Any) -> dict[str, Any]:
    from stockpot.methods.finding import passes_of, traits

    return {
        "name": method.name,
        "summary": method.summary,
        "family": method.family,
        "traits": list(traits(method)),
        "passes": list(passes_of(method)),
        "space": method.space.value,
        "base_optional": method.base_optional,
        "scope": method.scope.value,
        "models": list(method.models),
        "statistics": [s.name for s in method.stats],
        "draws": [d.name for d in method.draws],
        "companions": {c.name: c.about for c in method.companions},
        "applies": list(method.applies) if method.applies is not None else None,
        "otherwise": method.otherwise,
        "reproducible": method.reproducible,
        "experimental": method.experimental,
        "dialects": list(method.dialects),
        "cite": method.cite,
        "parameters": [
            {
                "name": p.name,
                "kind": p.kind.describe(),
                "per_model": p.per_model,
                "default": default_text(p),
            }
            for p in method.parameters.values()
        ],
    }


def default_text(parameter: Any) -> str:
    """A parameter's default as the docs show it."""
    from stockpot.methods.parameters import REQUIRED, ByDialect

    if parameter.default is REQUIRED:
        return "required"
    if isinstance(parameter.default, ByDialect):
        known = ", ".join(f"{value} ({dialect})" for dialect, value in parameter.default.values.items())
        return f"{known}; else required"
    return str(parameter.default).lower() if isinstance(parameter.default, bool) else str(parameter.default)


def show_methods(words: Sequence[str], *, as_json: bool) -> None:
    """All methods, one in full, or those of which all the words are said."""
    from stockpot.methods import methods
    from stockpot.methods.finding import family_of, find_methods

    known = methods()
    if len(words) == 1 and words[0] in known:
        _show_method(known[words[0]], as_json=as_json)
        return
    found = find_methods(words) if words else list(known.values())
    if as_json:
        print_json([_method_row(m) for m in found])
        return
    rows = [(m.name, family_of(m), m.space.value, m.summary) for m in found]
    print_table("", ("method", "family", "works on", "what it does"), rows)


def _show_method(method: Any, *, as_json: bool) -> None:
    from stockpot.methods.finding import models_text, passes_text, space_text, traits

    if as_json:
        print_json(_method_row(method))
        return
    say(f"{method.name}: {inspect.getdoc(method.function)}\n")
    say(f"works on {space_text(method)}; models: {models_text(method)}")
    say(f"{', '.join(traits(method))}; reads its inputs {passes_text(method)}")
    if method.cite:
        say(f"source: {method.cite}")
    say()
    print_table(
        "",
        ("parameter", "value", "for each model", "default"),
        (
            (p.name, p.kind.describe(), "yes" if p.per_model else "", default_text(p))
            for p in method.parameters.values()
        ),
    )


def show_doctor(facts: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return

    def size(n: int | None, per: str = "") -> str:
        return "unknown" if n is None else format_size(n) + per

    memory, disk, threads = facts["memory"], facts["disk"], facts["threads"]
    limit = f", {size(memory['container_limit'])} allowed here" if memory["container_limit"] else ""
    gpus = ", ".join(f"{d['name']} ({size(d['bytes'])})" for d in facts["devices"]["cuda"])
    speed = f"writes {size(disk['write_bytes_per_second'], '/s')}, reads {size(disk['read_bytes_per_second'], '/s')}"
    rows = [
        ("stockpot", f"{facts['stockpot']}, Python {facts['python']}, {facts['platform']}"),
        ("threads", f"{threads['available']} of {threads['processors']} processors"),
        ("memory", f"{size(memory['available'])} free of {size(memory['total'])}{limit}"),
        ("kernels", "compiled" if facts["kernels"]["compiled"] else "none: numpy does their work"),
        ("GPU", gpus or "none"),
        ("disk", f"{disk['folder']}: {size(disk['free'])} free; {speed}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)),
    ]
    print_table("", ["", ""], rows)
    for line in facts["missing"]:
        say(f"missing: {line}")
    if not facts["missing"]:
        say("nothing is missing")
