"""What several test files share: models on disk, oracles in float64, comparisons in units of the last place."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN, INNER, LAYERS, VOCABULARY = 64, 160, 4, 256

SHAPES: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
for _i in range(LAYERS):
    _p = f"model.layers.{_i}."
    for _n in "qkvo":
        SHAPES[f"{_p}self_attn.{_n}_proj.weight"] = (HIDDEN, HIDDEN)
    SHAPES[_p + "mlp.gate_proj.weight"] = (INNER, HIDDEN)
    SHAPES[_p + "mlp.down_proj.weight"] = (HIDDEN, INNER)
    SHAPES[_p + "input_layernorm.weight"] = (HIDDEN,)
SHAPES |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

State = Mapping[str, torch.Tensor]


def write_model(path: Path, tensors: State, config: Mapping[str, Any] | None = None, shards: int = 1) -> Path:
    """A model directory as safetensors writes it, in one file or several with an index."""
    path.mkdir(parents=True, exist_ok=True)
    chosen = dict(CONFIG if config is None else config)
    if config is None and not any("lm_head" in n for n in tensors):
        chosen["architectures"] = ["LlamaModel"]  # a class with a head would miss it
    (path / "config.json").write_text(json.dumps(chosen))
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        save_file(part, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def perturbed(base: State, seed: int, scale: float = 0.002) -> dict[str, torch.Tensor]:
    """A fine-tune stand-in: the base plus noise."""
    generator = torch.Generator().manual_seed(seed)
    return {n: (t.float() + torch.randn(t.shape, generator=generator) * scale).to(t.dtype) for n, t in base.items()}


def load(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, as the safetensors library reads it."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        out |= load_file(file)
    return out


def ulp_distance(result: torch.Tensor, exact: torch.Tensor, terms: float) -> torch.Tensor:
    """|result - exact| in units of the last place of the result's dtype at `exact`.

    What rounding inside the sum of terms of size `terms` explains (2^-22 of it) is taken off first: a near-cancellation
    in float32 can't be as exact as its tiny result.
    """
    info = torch.finfo(result.dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(info.tiny)))
    ulp = torch.exp2(exponent) * info.eps
    slack = terms * (2.0**-22 if info.bits < 32 else 0.0)
    return ((result.double() - exact).abs() - slack).clamp_min(0) / ulp


def assert_ulp(result: torch.Tensor, exact: torch.Tensor, terms: float, limit: float = 1.0) -> None:
    worst = ulp_distance(result, exact, terms).max().item() if result.numel() else 0.0
    assert worst <= limit, f"{worst} ULP"


# oracles in float64, written as the definitions read


def oracle_trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    k = max(int(density * delta.numel()), 1) if delta.numel() else 0
    if k == 0:
        return torch.zeros_like(delta)
    cutoff = delta.float().abs().flatten().sort(descending=True).values[k - 1]
    return torch.where(delta.float().abs() >= cutoff, delta, 0.0)


def oracle_elect(
    deltas: Sequence[torch.Tensor], weight: Sequence[float], *, by: str = "weight", weighted: bool = True
) -> torch.Tensor:
    values = torch.stack([w * d for w, d in zip(weight, deltas)])
    ballot = values if weighted else torch.stack(list(deltas))
    sign = torch.where(sum(ballot[i] for i in range(len(ballot))) >= 0, 1.0, -1.0)
    agree = torch.sign(ballot) == sign
    total = torch.where(agree, values, 0.0).sum(0)
    if by == "none":
        return total
    column = torch.tensor([1.0 if by == "count" else w for w in weight], dtype=torch.float64)
    divisor = (agree * column.reshape(-1, *[1] * total.dim())).sum(0)
    return total / torch.where(divisor == 0, 1.0, divisor)


def oracle_slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    x, y = a.double().flatten(), b.double().flatten()
    if x.norm() == 0 or y.norm() == 0:
        return (1 - t) * a.double() + t * b.double()
    cos = float(x @ y / (x.norm() * y.norm()))
    if abs(cos) > 0.9995 or cos < -0.99:
        return (1 - t) * a.double() + t * b.double()
    w = math.acos(cos)
    return (math.sin((1 - t) * w) * a.double() + math.sin(t * w) * b.double()) / math.sin(w)


def cli(*args: object, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "stockpot", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


# training runs


def tokens(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows of a language that can be learnt a little: each token is the one before plus a small number."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        start = torch.randint(0, 64, (1,), generator=generator)
        row = (start + torch.randint(1, 3, (16,), generator=generator).cumsum(0)) % 64
        rows.append({"input_ids": row, "labels": row})
    return rows


def train_lora(
    base: Path, out: Path, *, steps: int, save_steps: int, lora: Mapping[str, Any] | None = {}, callbacks: Any = (), **more: Any
) -> Path:  # fmt: skip
    """A run of transformers' Trainer as users leave it: checkpoints, the final model on top, the state."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    set_seed(0)
    resume = more.pop("resume", None)
    model = LlamaForCausalLM.from_pretrained(base)
    if lora is not None:
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **lora}
        model = get_peft_model(model, LoraConfig(**options))
    arguments = {
        "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "learning_rate": 1e-2, "save_steps": save_steps,
        "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True, "max_steps": steps,
        "logging_strategy": "steps", **more,
    }  # fmt: skip
    trainer = Trainer(
        model, TrainingArguments(str(out), **arguments), train_dataset=tokens(64), eval_dataset=tokens(8, seed=1),
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    return out


def tiny_tokenizer() -> Any:
    """64 words, one a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1", pad_token="w2", unk_token="w0")
