"""The training runs of the study: three settings of different data and size, several seeds each.

    python benchmarks/evidence/runs.py OUT --seeds 5 [--setting code-lora]

    code-lora         the demo's run: LoRA of rank 8 on Python code, base of 1.3 M parameters, constant learning rate
    prose-lora        LoRA of rank 16 on English documentation, base of 5 M parameters, constant learning rate, small batches
    arithmetic-full   full fine-tune on sums, base of 0.5 M parameters, cosine decay to zero

Each seed has its own order of batches and its own initial factors; the base of a setting is trained once. Held-out text is
divided in documents; selection and report halves are drawn by stockpot.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from shared import BLOCK, DOMAINS, texts, train, train_tokenizer


@dataclass(frozen=True)
class Setting:
    """One kind of run."""

    name: str
    domain: str
    hidden: int
    layers: int
    base_steps: int
    steps: int
    save_steps: int
    rate: float
    schedule: str
    batch: int
    rank: int | None
    held_out: int  # characters


SETTINGS = {
    s.name: s
    for s in (
        Setting("code-lora", "code", 160, 4, 130, 325, 20, 6e-3, "constant_with_warmup", 6, 8, 60_000),
        Setting("prose-lora", "prose", 256, 6, 110, 245, 15, 4e-3, "constant_with_warmup", 4, 16, 24_000),
        Setting("arithmetic-full", "arithmetic", 96, 3, 130, 406, 25, 2e-3, "cosine", 4, None, 60_000),
    )
}


def make_base(folder: Path, setting: Setting, corpus: dict[str, str]) -> PreTrainedTokenizerFast:
    """Base and tokenizer of a setting, trained unless they are there."""
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(corpus).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if (folder / "model.safetensors").exists():
        return tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=setting.hidden, intermediate_size=setting.hidden * 27 // 10,
        num_hidden_layers=setting.layers, num_attention_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    streams = [torch.tensor(tokenizer(corpus[d])["input_ids"]) for d in DOMAINS]
    train(model, torch.cat([s[: len(s) * 9 // 10] for s in streams]), setting.base_steps, 4e-3, seed=0)
    model.save_pretrained(folder)
    return tokenizer


def fine_tune(folder: Path, setting: Setting, seed: int) -> None:
    """One run with transformers' Trainer, as users leave it."""
    corpus = texts()
    base = folder.parent / "base"
    tokenizer = make_base(base, setting, corpus)
    text = corpus[setting.domain]
    held_out = folder.parent / "held_out.txt"
    if not held_out.exists():
        held_out.write_text(text[len(text) * 9 // 10 :][: setting.held_out])
    tokens = torch.tensor(tokenizer(text[: len(text) * 9 // 10])["input_ids"])
    windows = tokens[: len(tokens) // BLOCK * BLOCK].reshape(-1, BLOCK)
    rows = [{"input_ids": w, "labels": w} for w in windows]
    set_seed(seed)
    model: Any = LlamaForCausalLM.from_pretrained(base)
    if setting.rank is not None:
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(
            model, LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, task_type="CAUSAL_LM", target_modules=layers)
        )
    arguments = TrainingArguments(
        str(folder), max_steps=setting.steps, save_steps=setting.save_steps, logging_steps=setting.save_steps,
        learning_rate=setting.rate, lr_scheduler_type=setting.schedule, warmup_steps=20,
        per_device_train_batch_size=setting.batch, report_to=[], disable_tqdm=True, use_cpu=True, seed=seed, save_only_model=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer,
        data_collator=lambda batch: {k: torch.stack([row[k] for row in batch]) for k in batch[0]},
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_state()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--setting", choices=SETTINGS, action="append")
    options = parser.parse_args()
    for name in options.setting or SETTINGS:
        for seed in range(options.seeds):
            folder = options.out.resolve() / name / f"seed-{seed}"
            if (folder / "trainer_state.json").exists():
                continue
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            began = time.monotonic()
            fine_tune(folder, SETTINGS[name], seed)
            print(f"{name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
