"""96 recipes that people published for mergekit (golden/recipes.json: names replaced, comments removed) plan and merge here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stockpot
from stockpot.recipes import load_as_mergekit
from stockpot.testing.models import write_model

RECIPES: dict[str, str] = json.loads((Path(__file__).parent / "golden" / "recipes.json").read_text())
WAITS = {
    "choosing or writing a chat template is a coming feature": [
        "001-multislerp", "008-dare_ties", "022-multislerp", "038-della_linear", "044-sce", "071-della", "074-dare_ties",
        "118-task_arithmetic", "130-ties",
    ],
    "merging sub-modules by separate recipes is a coming feature": ["053-linear"],
    "other tokenizers are a coming feature": ["128-linear"],
    "building a tokenizer from several models is a coming feature": ["143-linear"],
    "putting mixtures of experts together is a coming feature": ["139-other", "140-other"],
    "this is a recipe of mergekit-evolve; see `stockpot sweep`": ["136-dare_ties"],
    "slerp takes exactly 2 models, got 3": ["058-slerp", "088-slerp"],  # mergekit refuses them too
}  # fmt: skip
REASONS = {name: why for why, names in WAITS.items() for name in names}
VOCABULARY, HIDDEN, INNER = 24, 8, 12


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        at = f"model.layers.{i}."
        out |= {at + f"self_attn.{x}_proj.weight": (HIDDEN if x in "qo" else HIDDEN // 2, HIDDEN) for x in "qkvo"}
        out |= {at + f"mlp.{x}_proj.weight": (INNER, HIDDEN) for x in ("gate", "up")}
        out |= {at + "mlp.down_proj.weight": (HIDDEN, INNER)}
        out |= {at + f"{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    return out | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def stand_in(root: Path, name: str, layers: int) -> Path:
    """A tiny Llama, or an adapter for one, in the place of a name."""
    folder = root / f"L{layers}" / name
    if folder.exists():
        return folder
    rng = np.random.default_rng([*map(ord, name)])
    if name.startswith("lora"):
        tensors = {
            f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight": rng.standard_normal(shape) * 0.05
            for i in range(layers)
            for side, shape in (("A", (2, HIDDEN)), ("B", (HIDDEN, 2)))
        }
        base = str(stand_in(root, "base", layers))
        config = {
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": base,
        }  # fmt: skip
        write_model(str(folder), tensors, "F32", adapter=config)
        return folder
    start = np.random.default_rng(7)
    values = {n: start.standard_normal(s) * 0.1 for n, s in shapes(layers).items()}
    if name != "base":
        values = {n: v + rng.standard_normal(v.shape) * 0.02 for n, v in values.items()}
    write_model(str(folder), values)
    (folder / "config.json").write_text(
        json.dumps({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        })
    )  # fmt: skip
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def placed(text: str, root: Path) -> str:
    """The recipe with paths in the places of `base`, `model3`, `lora0`."""
    ends = [int(end) for end in re.findall(r"layer_range: *\[ *\d+ *, *(\d+)", text)]
    layers = max(ends, default=4)
    kept = re.sub(r"((?:tokenizer_source|source|kind): *['\"]?)base\b", r"\1BASE_WORD", text)

    def path(match: Any) -> str:
        return (match[1] or "") + str(stand_in(root, match[2], layers))

    found = re.sub(r"(?<![\w./-])(model:)?(base|model\d+|lora\d+)(?![\w:./-])", path, kept)
    return found.replace("BASE_WORD", "base")


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes(name: str, shelf: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(placed(RECIPES[name], shelf))
    if name in REASONS:
        with pytest.raises(stockpot.StockpotError) as caught:
            stockpot.plan(load_as_mergekit(path))
        assert REASONS[name] in str(caught.value)
        return
    stockpot.merge(load_as_mergekit(path), tmp_path / "out")
    stockpot.verify(tmp_path / "out")
    recorded = json.loads((tmp_path / "out" / "stockpot.json").read_text())["recipe"]
    assert "compat: mergekit" in json.dumps(recorded)


def test_most_of_them_merge() -> None:
    assert len(RECIPES) == 96
    assert len(RECIPES) - len(REASONS) == 79
