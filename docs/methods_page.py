"""Writes docs/methods.md from the methods' declarations:  python docs/methods_page.py"""

from __future__ import annotations

import inspect
from pathlib import Path

from stockpot.cli.show import default_text
from stockpot.methods import Example, Method, methods
from stockpot.methods.finding import models_text, passes_text, space_text, traits

HEAD = """# Methods

This page is generated from the declarations (`python docs/methods_page.py`; a test keeps it current).
`stockpot methods NAME` shows the same in a terminal.

Notation: `m` models, deltas are model minus base, `[m, *block]` is a block of every model's tensor. Parameters marked
*for each model* may stand on a model, on a slice or at the top; all may be a number, a gradient over the layers or a choice
by tensor name (see [Recipes](recipes.md)).

`stockpot methods spherical` (or `two models`, `needs a base`, `random`, an arXiv id, any word of this page's tables)
finds those that fit. Who computes what under the same name: [Dialects](dialects.md).

Unless a method says otherwise below, all tensors are treated alike, one-dimensional ones, embeddings and heads too,
as in mergekit; `rules` in a recipe gives any of them other parameters or another method.

"""


FAMILIES = {
    "averages": "weighted means of the models",
    "spherical": "directions and lengths apart: weights from the inner products of the models alone",
    "task vectors": "sums of changes from a base",
    "trimmed": "only the elements of each change that matter",
    "random": "a random part of each change, rescaled",
    "consensus": "element by element, by how the models agree",
    "adapters": "LoRA factors, module by module",
    "layers": "layers stacked, copied, filled in",
}


def render() -> str:
    """The page."""
    parts = [HEAD]
    found = [m for m in methods().values() if m.builtin]
    assert {m.family for m in found} == set(FAMILIES)
    for family, about in FAMILIES.items():
        parts.append(f"**{family}**: {about}\n\n| method | | |\n|---|---|---|")
        for m in found:
            if m.family == family:
                said = [t for t in traits(m)[1:] if not t.startswith("dialects")]
                parts.append(
                    f"| [`{m.name}`](#{m.name}) | {m.summary.replace('|', chr(92) + '|')} | {', '.join(said)} |"
                )
        parts.append("")
    for method in found:
        doc = (inspect.getdoc(method.function) or "").split("\n", 1)
        parts.append(f"## {method.name}\n\n{doc[0]}\n")
        source = f" Source: {method.cite}." if method.cite else ""
        parts.append(
            f"Works on {space_text(method)}; models: {models_text(method)}; reads its inputs {passes_text(method)}."
            f"{source}{_more(method)}\n"
        )
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
        out.append(" Experimental: rebuilt from the paper, no public code confirms it.")
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
