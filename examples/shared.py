"""What both parts of the demo share: text, a tokenizer, a small base model, training and held-out loss."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ast
import pydoc_data.topics
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

warnings.filterwarnings("ignore", category=FutureWarning)
logging.set_verbosity_error()
logging.disable_progress_bar()

DOMAINS = ("code", "prose", "arithmetic")
BLOCK, BATCH = 96, 12
BASE_STEPS = 130


def texts() -> dict[str, str]:
    """Half a megabyte or so of each domain."""
    library = Path(os.__file__).parent
    names = (
        "argparse",
        "ast",
        "collections/__init__",
        "dataclasses",
        "difflib",
        "doctest",
        "functools",
        "heapq",
        "inspect",
    )
    code = "\n".join((library / f"{n}.py").read_text() for n in names if (library / f"{n}.py").exists())
    tree = ast.parse((library / "typing.py").read_text())
    docs = [
        ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    prose = "\n".join([*pydoc_data.topics.topics.values(), *docs])
    rng = random.Random(0)
    sums = []
    for _ in range(30_000):
        a, b = rng.randrange(100), rng.randrange(100)
        sums.append(f"{a} + {b} = {a + b}" if rng.random() < 0.5 else f"{a} - {b} = {a - b}")
    return {"code": code[:500_000], "prose": prose[:500_000], "arithmetic": "\n".join(sums)}


def train_tokenizer(corpus: dict[str, str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((t[:100_000] for t in corpus.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def batches(data: torch.Tensor, steps: int, seed: int):  # type: ignore[no-untyped-def]
    """Random windows `[BATCH, BLOCK]` of one or several streams of tokens."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(data) - BLOCK, (BATCH,), generator=generator)
        yield torch.stack([data[s : s + BLOCK] for s in starts])


def train(model: LlamaForCausalLM, data: torch.Tensor, steps: int, rate: float, seed: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for batch in batches(data, steps, seed):
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


@torch.no_grad()
def loss(model: LlamaForCausalLM, data: torch.Tensor) -> float:
    """Mean loss over held-out text, in nats a token."""
    model.eval()
    windows = data[: 40 * BLOCK].reshape(-1, BLOCK)
    return float(model(input_ids=windows, labels=windows).loss)


def make_base(out: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Base model and tokenizer in `out`/base, trained unless they are there; (training, held-out) tokens by domain."""
    corpus = texts()
    if not (out / "base/tokenizer.json").exists():
        train_tokenizer(corpus).save_pretrained(out / "base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "base")
    streams = {name: torch.tensor(tokenizer(text)["input_ids"]) for name, text in corpus.items()}
    parts = {name: (s[: len(s) * 9 // 10], s[len(s) * 9 // 10 :]) for name, s in streams.items()}
    if not (out / "base/model.safetensors").exists():
        began = time.monotonic()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512, hidden_size=160, intermediate_size=432, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=256,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        size = sum(p.numel() for p in model.parameters())
        train(model, torch.cat([parts[n][0] for n in DOMAINS]), BASE_STEPS, 4e-3, seed=0)
        model.save_pretrained(out / "base")
        print(f"trained a base of {size / 1e6:.1f} M parameters in {time.monotonic() - began:.0f} s")
    return parts


def stockpot(out: Path, *arguments: str) -> None:
    """Run the command line in `out`, as a user would."""
    print("$ stockpot " + " ".join(arguments), flush=True)
    executable = shutil.which("stockpot", path=str(Path(sys.executable).parent)) or "stockpot"
    subprocess.run([executable, *arguments], cwd=out, check=True)
