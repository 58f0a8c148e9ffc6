"""Names that nothing knows: not taken for tensors that only some models have. Heads that a class has and no file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import stockpot
import tiny
from stockpot.errors import MismatchError, StockpotError


def linear(*paths: Path, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [str(p) for p in paths], **more}


def changed(path: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(path, to)
    tensors = change(load_file(path / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def llama(tmp_path: Path) -> Path:
    cls, config = tiny.types()["llama"]
    tiny.tiny(cls, config, 0).save_pretrained(tmp_path / "0")
    return tmp_path / "0"


@pytest.mark.parametrize("name", ["axk1", "pi0", "pp_chart2table"])
def test_files_and_memory(tmp_path: Path, name: str) -> None:
    """What transformers calls otherwise by rules that the table lacks."""
    cls, config = tiny.types()[name]
    for seed, original in ((0, True), (1, False)):
        tiny.tiny(cls, config, seed).save_pretrained(tmp_path / str(seed), save_original_format=original)
    for order in ("01", "10"):
        models = [tmp_path / n for n in order]
        with pytest.raises(MismatchError, match=r"seem to be those of .* under other names: ") as e:
            stockpot.plan(linear(*models))
        assert "absent" not in str(e.value)
        for absent in ("skip", "zero"):
            # less than half of it, and the user has said that some are absent
            notes = stockpot.plan(linear(*models, absent=absent)).notes
            assert any("may be those of" in n and "merged with none of them" in n for n in notes)
    for n in "01":  # as it says
        model = cls.from_pretrained(tmp_path / n)  # type: ignore[attr-defined]
        model.save_pretrained(tmp_path / f"same{n}", save_original_format=False)
    stockpot.plan(linear(tmp_path / "same0", tmp_path / "same1"))


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.replace("self_attn", "inner.self_attn"),
        lambda n: n.replace("mlp.up_proj", "up_proj.mlp"),
        lambda n: n.replace("model.layers", "trunk.blocks.stages"),
        lambda n: n.replace("model.layers", "h").replace("embed_tokens", "inner.embed_tokens"),
    ],
)
@pytest.mark.parametrize("absent", ["error", "skip", "zero"])
def test_names_of_nobody(tmp_path: Path, change: Callable[[str], str], absent: str) -> None:
    first = llama(tmp_path)
    second = changed(first, tmp_path / "1", lambda t: {change(k): v for k, v in t.items()})
    names = list(load_file(first / "model.safetensors"))
    moved = [n for n in names if change(n) != n]
    assert moved
    if absent == "error" or 2 * len(moved) > len(names):
        with pytest.raises(MismatchError, match=r"seem to be those of .* under other names: "):
            stockpot.plan(linear(first, second, absent=absent))
    else:
        assert any("may be those of" in n for n in stockpot.plan(linear(first, second, absent=absent)).notes)
    plan = stockpot.plan(linear(first, second, absent=absent, exclude=[*moved, *map(change, moved)]))  # as it says
    assert sum(len(t.inputs) == 2 for t in plan.tensors) == len(names) - len(moved)


@pytest.mark.parametrize(("one", "two"), [("text_model", "vision_model"), ("encoder", "decoder"), ("query", "passage")])
def test_towers_of_equal_shapes_are_united(tmp_path: Path, one: str, two: str) -> None:
    """Models that have nothing in common but shapes: a union is what is asked for."""
    for name in (one, two):
        (tmp_path / name).mkdir()
        tensors = {f"{name}.layers.{i}.{k}.weight": torch.ones(4, 4) for i in range(4) for k in "qkv"}
        save_file(tensors, tmp_path / name / "model.safetensors")
    plan = stockpot.plan(linear(tmp_path / one, tmp_path / two, absent="skip"))
    assert len(plan.tensors) == 24


def test_others_of_the_same_shape_may_be_absent(tmp_path: Path) -> None:
    """Heads of two tasks; towers of two kinds beside the same trunk."""
    first = llama(tmp_path)
    for n, own in (("1", "ranking_head.weight"), ("2", "reward_head.weight")):
        changed(first, tmp_path / n, lambda t, own=own: {**t, own: torch.ones(1, 8)})  # type: ignore[misc]
    for n, own in (("3", "vision_tower"), ("4", "audio_tower")):
        tower = {f"{own}.layers.{i}.weight": torch.ones(4, 4) for i in range(4)}
        changed(first, tmp_path / n, lambda t, tower=tower: {**t, **tower})  # type: ignore[misc]
    for a, b in ("12", "34"):
        plan = stockpot.plan(linear(tmp_path / a, tmp_path / b, absent="skip"))
        assert len(plan.tensors) > len(load_file(tmp_path / a / "model.safetensors"))
        with pytest.raises(StockpotError, match="'absent: zero' counts them as zeros there"):
            stockpot.plan(linear(tmp_path / a, tmp_path / b))


def test_another_shape_is_another_tensor(tmp_path: Path) -> None:
    first = llama(tmp_path)
    a = changed(first, tmp_path / "1", lambda t: {**t, "model.adapter.weight": torch.ones(3)})
    b = changed(first, tmp_path / "2", lambda t: {**t, "model.new.adapter.weight": torch.ones(4)})
    assert not any("may be those of" in n for n in stockpot.plan(linear(a, b, absent="skip")).notes)
    c = changed(first, tmp_path / "3", lambda t: {**t, "model.new.adapter.weight": torch.ones(3)})
    with pytest.raises(MismatchError, match=r"1 tensors seem to be those of .* under other names"):
        stockpot.plan(linear(a, c))
    assert any("1 tensors may be those of" in n for n in stockpot.plan(linear(a, c, absent="skip")).notes)


def test_two_that_are_one_in_memory(tmp_path: Path) -> None:
    """Names of two versions in one file: which of them counts, nobody can say."""
    cls, config = tiny.types()["bert"]
    tiny.tiny(cls, config, 0).save_pretrained(tmp_path / "0")

    def old_and_new(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {k.removeprefix("bert."): v for k, v in t.items()}
        return bare | {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v + 1 for k, v in bare.items()}

    both = changed(tmp_path / "0", tmp_path / "1", old_and_new)
    for absent in ("error", "skip"):
        for pair in ((tmp_path / "0", both), (both, tmp_path / "0")):
            with pytest.raises(StockpotError, match="LayerNorm"):
                stockpot.plan(linear(*pair, absent=absent))


# heads that nobody has


def edited(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("llama", "lm_head.weight"),
        ("gpt_neox", "embed_out.weight"),  # which its class calls lm_head
        ("t5", "lm_head.weight"),
        ("llava", "lm_head.weight"),
    ],
)
@pytest.mark.parametrize("said", [False, None])
def test_no_head(tmp_path: Path, name: str, head: str, said: bool | None) -> None:
    """Its class has a head that is not tied, and no file holds it: a note with ways out that work."""
    cls, config = tiny.types()[name]
    tiny.tiny(cls, config, 0).save_pretrained(tmp_path / "0")
    headless = changed(tmp_path / "0", tmp_path / "1", lambda t: {k: v for k, v in t.items() if not k.endswith(head)})
    edited(headless, tie_word_embeddings=said)

    def told() -> list[str]:
        return [n for n in stockpot.plan(linear(headless, headless)).notes if "and there is none: who loads" in n]

    if said is None and name == "t5":  # ties by default
        assert not told()
        return
    (note,) = told()
    assert "lm_head.weight' is not tied to" in note
    assert "at random" in note
    assert "tie_word_embeddings': true" in note
    base = note.partition("'architectures': [\"")[2].partition('"')[0]
    assert base in dir(tf)
    edited(headless, tie_word_embeddings=True)
    assert not told()
    edited(headless, tie_word_embeddings=said, architectures=[base])
    assert not told()


def test_a_class_without_a_head(tmp_path: Path) -> None:
    """Base models and classifiers have none to miss; where nothing names the class, it is a note."""
    cls, config = tiny.types()["llama"]
    model = tiny.tiny(cls, config, 0)
    model.config.tie_word_embeddings = False
    model.model.save_pretrained(tmp_path / "base")
    assert not stockpot.plan(linear(tmp_path / "base")).notes
    classifier = tf.LlamaForSequenceClassification(model.config)
    classifier.save_pretrained(tmp_path / "classifier")
    assert not stockpot.plan(linear(tmp_path / "classifier")).notes
    model.save_pretrained(tmp_path / "0")
    own = changed(tmp_path / "0", tmp_path / "1", lambda t: {k: v for k, v in t.items() if "lm_head" not in k})
    edited(own, tie_word_embeddings=False, architectures=None)
    assert any("there is none: who loads the output" in n for n in stockpot.plan(linear(own)).notes)
