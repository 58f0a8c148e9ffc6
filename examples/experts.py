"""Experts of many: fine-tune a base three times, merge the experts by three recipes, compare on held-out text."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from shared import DOMAINS, loss, stockpot, train

EXPERT_STEPS = 60

RECIPES = {
    "linear": """\
merge_method: linear
base_model: base
models:
  - model: expert-code
  - model: expert-prose
  - model: expert-arithmetic
dtype: float32
""",
    "task_arithmetic": """\
merge_method: task_arithmetic
base_model: base
models:
  - model: expert-code
  - model: expert-prose
  - model: expert-arithmetic
parameters:
  weight: 0.4
dtype: float32
""",
    "ties": """\
merge_method: ties
base_model: base
models:
  - model: expert-code
  - model: expert-prose
  - model: expert-arithmetic
parameters:
  density: 0.5
  lambda: 0.7
dtype: float32
""",
}


def main(out: Path, parts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "base")
    for seed, name in enumerate(DOMAINS, 1):
        folder = out / f"expert-{name}"
        if (folder / "model.safetensors").exists():
            continue
        began = time.monotonic()
        model = LlamaForCausalLM.from_pretrained(out / "base")
        train(model, parts[name][0], EXPERT_STEPS, 1e-3, seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"fine-tuned {folder.name} in {time.monotonic() - began:.0f} s")
    for name, text in RECIPES.items():
        (out / f"{name}.yml").write_text(text)
        stockpot(out, "merge", f"{name}.yml", f"merged-{name}", "--overwrite")
    table = Table(title="held-out loss (nats a token, lower is better)", title_justify="left")
    for column in ("model", *DOMAINS, "mean"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for group in (["base"], [f"expert-{n}" for n in DOMAINS], [f"merged-{n}" for n in RECIPES]):
        for name in group:
            model = LlamaForCausalLM.from_pretrained(out / name)
            scores = [loss(model, parts[d][1]) for d in DOMAINS]
            table.add_row(name, *(f"{s:.3f}" for s in scores), f"{sum(scores) / len(scores):.3f}")
        table.add_section()
    Console(width=90).print(table)
