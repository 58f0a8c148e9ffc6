"""Writes docs/methods.md from the methods' declarations:  python docs/methods_page.py"""

from __future__ import annotations

import inspect
from pathlib import Path

from stockpot.cli.show import default_text
from stockpot.methods import Example, Method, methods

HEAD = """# Methods

This page is generated from the declarations (`python docs/methods_page.py`; a test keeps it current).
`stockpot methods NAME` shows the same in a terminal.

Notation: `m` models, deltas are model minus base, `[m, *block]` is a block of every model's tensor. Parameters marked
*for each model* may stand on a model, on a slice or at the top; all may be a number, a gradient over the layers or a choice
by tensor name (see [Recipes](recipes.md)).

## Who computes what under the same name

| | default here | mergekit 0.1.5 | PEFT | papers' code |
|---|---|---|---|---|
| TIES cutoff | each tensor; whole model with `dialect: paper` | each tensor | each tensor | whole model |
| TIES kept | int(density x n), at least 1, and ties at the cutoff | same, ties broken at will | int(density x n) | one more |
| TIES election | on weighted deltas; unweighted with `peft` | weighted | unweighted | no weights |
| TIES divisor | agreeing weight; agreeing count with `peft` | agreeing weight | agreeing count | agreeing count |
| TIES exactly zero sum | positive; the model's majority sign with `paper` | positive | positive | majority sign |
| DARE rescale | 1/density; L1 norm restored with `dialect: mergekit` | L1 norm restored | 1/density | 1/density |
| SLERP, zero or nearly opposite tensors | linear; unguarded with `dialect: mergekit` | unguarded | | |

`compat: mergekit` in a recipe makes the mergekit dialects the default.
"""


SEES = {
    "delta": "differences from a base (`base_model` is needed)",
    "weight": "weights",
    "factors": "the factors of LoRA adapters, module by module",
}


def render() -> str:
    """The page."""
    parts = [HEAD]
    for method in methods().values():
        if not method.builtin:
            continue
        low, high = method.models
        count = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        doc = (inspect.getdoc(method.function) or "").split("\n", 1)
        parts.append(f"## {method.name}\n\n{doc[0]}\n")
        space = "deltas, or on weights where there is no base" if method.base_optional else SEES[method.space.value]
        source = f" Source: {method.cite}." if method.cite else ""
        parts.append(f"Works on {space}; models: {count}.{source}{_more(method)}\n")
        parts.append("| parameter | value | for each model | default |\n|---|---|---|---|")
        for p in method.parameters.values():
            kind = p.kind.describe().replace("|", "\\|")
            parts.append(f"| `{p.name}` | {kind} | {'yes' if p.per_model else ''} | {default_text(p)} |")
        if len(doc) > 1:
            parts.append(f"\n```text\n{doc[1].strip()}\n```\n")
        if method.dialects_say:
            parts.append("\n".join(f"- `{name}`: {method.dialects_say[name]}" for name in method.dialects) + "\n")
        shown = [e for e in method.examples if e.source or e is method.examples[0]][:3]
        parts.append("\n".join(map(_example, shown)) + "\n")
    return "\n".join(parts).rstrip() + "\n"


def _more(method: Method) -> str:
    """What else a reader must know, in sentences."""
    out = [f" Beside each model: {c.name}, {c.about} (`companions`)." for c in method.companions]
    if method.applies is not None:
        rest = {"mean": "the mean of the models", "base": "the base's"}.get(
            str(method.otherwise), str(method.otherwise)
        )
        out.append(f" For tensors of the kinds {', '.join(method.applies)}; others get {rest}.")
    if method.reproducible == "machine":
        out.append(
            " Rests on a library (linear algebra, exponentials): its last bits may differ from machine to machine."
        )
    if method.ordered:
        out.append(" The order of the models matters.")
    if method.experimental:
        out.append(" Experimental.")
    return "".join(out)


def _example(example: Example) -> str:
    given = ", ".join(f"{k} {v}" for k, v in example.parameters.items())
    if isinstance(example.models[0], tuple):
        models = "; ".join(f"scale {s:g}, A {a}, B {b}" for s, a, b in example.models)
        return (
            f"Example ({example.source}): {models}{', with ' + given if given else ''} give B A = {example.expected}.\n"
        )
    base = f", base {example.base}" if example.base is not None else ""
    why = f" ({example.source})" if example.source else ""
    beside = "".join(f", {k} {v}" for k, v in example.companions.items())
    return (
        f"Example{why}: models {example.models}{base}{beside}{', ' + given if given else ''} give {example.expected}.\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("methods.md").write_text(render())
