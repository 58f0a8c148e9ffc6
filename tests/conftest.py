"""Small real models, made once for a test session. Nothing here reaches the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

try:
    import torch

    from helpers import SHAPES, perturbed, write_model
except ImportError:  # `make quick`: no test that needs a real model is run
    pass


@pytest.fixture
def registry() -> Iterator[None]:
    """What a test declares is forgotten after it."""
    from stockpot.methods.declaration import _REGISTRY

    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b, c: a Llama-shaped bf16 model of 4 layers and three perturbed copies, written by safetensors."""
    root = tmp_path_factory.mktemp("family")
    generator = torch.Generator().manual_seed(0)
    base = {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in SHAPES.items()}
    write_model(root / "base", base)
    for seed, name in enumerate("abc", 1):
        write_model(root / name, perturbed(base, seed))
    return root


@pytest.fixture(scope="session")
def family32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32."""
    root = tmp_path_factory.mktemp("family32")
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in SHAPES.items()}
    write_model(root / "base", base)
    for seed, name in enumerate("abc", 1):
        write_model(root / name, perturbed(base, seed))
    return root


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a recipe's text to a file."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers in float32, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    path = tmp_path_factory.mktemp("tiny") / "llama"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def lora_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA fine-tune by transformers' Trainer: 26 steps, snapshots every 4 and at the end, the final adapter on top."""
    from helpers import train_lora

    return train_lora(tiny_llama, tmp_path_factory.mktemp("lora") / "output_dir", steps=26, save_steps=4)


@pytest.fixture(scope="session")
def full_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full fine-tune by transformers' Trainer: 12 steps, snapshots every 4."""
    from helpers import train_lora

    return train_lora(tiny_llama, tmp_path_factory.mktemp("full") / "output_dir", steps=12, save_steps=4, lora=None)
