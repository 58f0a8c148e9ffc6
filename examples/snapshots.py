"""Snapshots of one run: a LoRA fine-tune by transformers' Trainer, its run shown, its snapshots averaged, all compared."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from shared import BATCH, BLOCK, loss, stockpot

DOMAIN = "code"
STEPS, SAVE_STEPS = 325, 20  # 16 snapshots and the final checkpoint
SOUPS = {
    "soup-10-uniform": ["--last", "10"],
    "soup-10-by-loss": ["--last", "10", "--by", "loss", "--penalty", "0.7"],
    "soup-5-uniform": ["--last", "5"],
    "soup-5-by-loss": ["--last", "5", "--by", "loss", "--penalty", "0.7"],
    "soup-5-by-loss-exact": ["--last", "5", "--by", "loss", "--penalty", "0.7", "--adapter", "product"],
}


def fine_tune(out: Path, data: torch.Tensor, callbacks: Any = ()) -> Trainer:
    """A LoRA run as users leave it in their output_dir: checkpoint-N/ and trainer_state.json."""
    set_seed(0)
    options = LoraConfig(
        r=8, lora_alpha=16, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM.from_pretrained(out / "base"), options)
    windows = data[: len(data) // BLOCK * BLOCK].reshape(-1, BLOCK)
    rows = [{"input_ids": w, "labels": w} for w in windows]
    arguments = TrainingArguments(
        str(out / "run"), max_steps=STEPS, save_steps=SAVE_STEPS, logging_steps=SAVE_STEPS, learning_rate=6e-3,
        lr_scheduler_type="constant_with_warmup", warmup_steps=20, per_device_train_batch_size=BATCH // 2,
        report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "base")
    trainer = Trainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=list(callbacks),
        data_collator=lambda batch: {k: torch.stack([row[k] for row in batch]) for k in batch[0]},
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_state()
    return trainer


def main(out: Path, parts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    training, held_out = parts[DOMAIN]
    if not (out / "run/trainer_state.json").exists():
        shutil.rmtree(out / "run", ignore_errors=True)
        began = time.monotonic()
        fine_tune(out, training)
        print(f"fine-tuned a LoRA adapter on {DOMAIN} in {time.monotonic() - began:.0f} s")
    stockpot(out, "run", "show", "run")
    for number, (folder, options) in enumerate(SOUPS.items()):
        stockpot(out, "soup", "run", folder, *options, "--overwrite", *(["--quiet"] if number not in (1, 4) else []))
    steps = sorted(int(p.name.partition("-")[2]) for p in (out / "run").glob("checkpoint-*"))
    rows = {
        "base": None,
        f"last merging checkpoint, step {steps[-2]}": f"run/checkpoint-{steps[-2]}",
        f"final checkpoint, step {steps[-1]}": f"run/checkpoint-{steps[-1]}",
    } | {name: name for name in SOUPS}
    table = Table(title=f"held-out loss on {DOMAIN} (nats a token, lower is better)", title_justify="left")
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_column("name of the soup")
    for label, place in rows.items():
        model = LlamaForCausalLM.from_pretrained(out / "base")
        name = ""
        if place is not None:
            model = PeftModel.from_pretrained(model, out / place)
            record = out / place / "stockpot.json"
            name = json.loads(record.read_text())["soup"]["name"] if record.exists() else ""
        table.add_row(label, f"{loss(model, held_out):.4f}", name)
    Console(width=100).print(table)
