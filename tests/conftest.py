"""Small real models, made once for a test session. Nothing here reaches the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import SHAPES, perturbed, write_model


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
