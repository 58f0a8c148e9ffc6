"""Holds this version's outputs against another's: a hundred random recipes must give the same bytes.

    git worktree add ../before eb4905a && cc ... (or pip install it into an environment of its own)
    python benchmarks/compare_versions.py ../before/src --recipes 100

Makes small models of several dtypes and shapes in a temporary directory, merges each recipe by both versions in processes of
their own, and compares every shard byte by byte. Recipes cover all methods and dialects that the older version has, gradients,
filters, rules, slices, output dtypes, seeds, threads and memory limits. What the older version computed wrongly (a statistic over
the model beside a rule) is left out: `--all` tries it too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LAYERS = 3
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (300, 96),
    "model.norm.weight": (96,),
    "lm_head.weight": (300, 96),
    "model.wide.weight": (2, 540_000),
    "model.flat.weight": (700_000,),
} | {
    f"model.layers.{i}.{name}": shape
    for i in range(LAYERS)
    for name, shape in {
        "self_attn.q_proj.weight": (96, 96),
        "mlp.up_proj.weight": (800, 700),
        "mlp.bias": (97,),
        "norm.weight": (96,),
    }.items()
}

WORKER = """
import json, sys
import stockpot
for row in json.load(sys.stdin):
    try:
        stockpot.merge(row["recipe"], row["out"], stockpot.Options(**row["options"]))
    except stockpot.StockpotError as e:
        print(json.dumps([row["name"], str(e)]))
"""


def write_models(root: Path, dtype: str) -> None:
    """A base and four fine-tunes of it."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    base = {n: torch.randn(s, generator=generator) * 0.02 for n, s in SHAPES.items()}
    for i, name in enumerate(("base", "a", "b", "c", "d")):
        folder = root / name
        folder.mkdir(parents=True)
        scale = 0.002 if i else 0.0
        tensors = {n: (t + scale * torch.randn(t.shape, generator=generator)).to(kind) for n, t in base.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = {"model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": False, "vocab_size": 300}
        (folder / "config.json").write_text(json.dumps(config))


def number(rng: random.Random, low: float, high: float) -> Any:
    """A number, a gradient over the layers, or a choice by name."""
    one = lambda: round(rng.uniform(low, high), 3)  # noqa: E731
    kind = rng.random()
    if kind < 0.6:
        return one()
    if kind < 0.8:
        return [one() for _ in range(rng.randint(2, 4))]
    return [{"filter": rng.choice(["mlp", "self_attn", "norm"]), "value": one()}, {"value": one()}]


def random_recipe(rng: random.Random, root: Path, *, everything: bool) -> dict[str, Any]:
    method = rng.choice(["linear", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties", "passthrough"])
    recipe: dict[str, Any] = {"merge_method": method}
    parameters: dict[str, Any] = {}
    models = rng.sample("abcd", {"slerp": 1, "passthrough": 1}.get(method, rng.randint(1, 4)))
    if method not in ("linear", "passthrough"):
        recipe["base_model"] = str(root / "base")
    per_model: dict[str, Any] = {}
    if method in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"):
        per_model["weight"] = lambda: number(rng, 0.1, 1.5)
        if rng.random() < 0.3:
            parameters["normalize"] = rng.random() < 0.5
    if method in ("ties", "dare_linear", "dare_ties"):
        per_model["density"] = lambda: number(rng, 0.05, 1.0)
        if rng.random() < 0.4:
            parameters["rescale"] = rng.random() < 0.5
        parameters["dialect"] = rng.choice(["mergekit", "paper", "peft"] if method == "ties" else ["mergekit", "paper"])
    if method not in ("linear", "passthrough", "slerp") and rng.random() < 0.5:
        parameters["lambda"] = number(rng, 0.2, 1.2)
    if method == "slerp":
        parameters["t"] = number(rng, 0.0, 1.0)
        parameters["dialect"] = rng.choice(["stockpot", "mergekit"])
    if method == "passthrough" and rng.random() < 0.5:
        per_model["scale"] = lambda: number(rng, 0.2, 1.2)
    wide = parameters.get("dialect") == "paper" and method == "ties"
    if wide:  # one density for the model
        per_model.pop("density")
        parameters["density"] = round(rng.uniform(0.05, 1.0), 3)
    entries = [
        {"model": str(root / m), "parameters": {k: make() for k, make in per_model.items() if rng.random() < 0.8}}
        for m in models
    ]
    for key, make in per_model.items():
        if any(key not in e["parameters"] for e in entries):
            parameters[key] = make()
    entries = [e if e["parameters"] else {"model": e["model"]} for e in entries]
    if rng.random() < 0.15 and method != "slerp":
        recipe["slices"] = [
            {"sources": [{**e, "layer_range": [start, start + 2]} for e in entries]} for start in (0, LAYERS - 2)
        ]
    else:
        recipe["models"] = entries
    if parameters:
        recipe["parameters"] = parameters
    if rng.random() < 0.2 and (everything or not wide):
        rule: dict[str, Any] = {"match": rng.choice(["*mlp*", "*norm*", "lm_head*"])}
        if method in ("ties", "dare_ties", "task_arithmetic", "dare_linear") and rng.random() < 0.5:
            rule["parameters"] = {"lambda": round(rng.uniform(0.2, 1.2), 2)}
        else:
            rule |= {"merge_method": "linear", "parameters": {"weight": 1.0}}
        recipe["rules"] = [rule]
    if rng.random() < 0.2:
        recipe["out_dtype"] = rng.choice(["float16", "bfloat16", "float32"])
    return recipe


def merge_all(source: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Errors by name."""
    environment = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run(
        [sys.executable, "-c", WORKER], input=json.dumps(rows), env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(line) for line in done.stdout.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="the src directory of the other version")
    parser.add_argument("--recipes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="also what the older version is known to get wrong")
    given = parser.parse_args()
    own = str(Path(__file__).parents[1] / "src")
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        dtypes = ["bfloat16", "float16", "float32"]
        for dtype in dtypes:
            write_models(top / dtype, dtype)
        rows = []
        for i in range(given.recipes):
            recipe = random_recipe(rng, top / rng.choice(dtypes), everything=given.all)
            options = {"threads": rng.choice([1, 2, 3]), "seed": rng.randint(0, 5)}
            if rng.random() < 0.3:
                options["max_memory"] = "160MiB"
            rows.append({"name": str(i), "recipe": recipe, "options": options})
        failed = [
            merge_all(source, [{**r, "out": str(top / f"{r['name']}-{which}")} for r in rows])
            for which, source in enumerate((given.other, own))
        ]
        different = 0
        for row in rows:
            outs = [
                {f.name: f.read_bytes() for f in (top / f"{row['name']}-{w}").glob("*.safetensors")} for w in (0, 1)
            ]
            errors = [f.get(row["name"]) for f in failed]
            if outs[0] != outs[1] or (errors[0] is None) != (errors[1] is None):
                different += 1
                print(json.dumps(row), *errors, sep="\n  ")
        print(f"{given.recipes} recipes, {len(failed[1])} refused by this version, {different} differ")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
