"""Companions out of the state of a torch optimizer: its parameters have numbers, the model's tensors names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import stockpot

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = torch.randint(0, 32, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("optimizer") / "base"
    LlamaForCausalLM(CONFIG).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(base: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(a checkpoint that the Trainer saved, with its optimizer.pt; Adam's second moments by name)."""
    model = LlamaForCausalLM.from_pretrained(base)
    arguments = TrainingArguments(
        output_dir=str(base.parent / "run"), max_steps=3, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, weight_decay=0.1, logging_strategy="no", save_only_model=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    state = trainer.optimizer.state
    moments = {n: state[p]["exp_avg_sq"] for n, p in model.named_parameters()}
    return base.parent / "run" / "checkpoint-3", moments


def optimizer_of(
    model: torch.nn.Module, file: Path, names: bool = False, trained: Callable[[str], bool] = bool
) -> None:
    """AdamW in one group, saved after a step."""
    chosen = [(n, p) for n, p in model.named_parameters() if trained(n)]
    torch.manual_seed(3)
    for _, p in chosen:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(chosen if names else [p for _, p in chosen], lr=1e-2)
    optimizer.step()
    torch.save(optimizer.state_dict(), file)


def recipe(base: Path, *models: tuple[Path, Path]) -> dict[str, Any]:
    entries = [{"model": str(m), "companions": {"moment": str(o)}} for m, o in models]
    return {"merge_method": "ota", "base_model": str(base), "models": entries}


def expected(base: Path, models: list[Path], moments: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The definition in float64, the square root of moments as weights."""
    start, ends = load_file(base / "model.safetensors"), [load_file(m / "model.safetensors") for m in models]
    out = {}
    for name, x in start.items():
        shares = torch.stack([m[name].double().sqrt() for m in moments])
        deltas = torch.stack([e[name].double() - x.double() for e in ends])
        total = shares.sum(0)
        mean = torch.where(total > 0, (shares * deltas).sum(0) / total.clamp_min(1e-300), deltas.mean(0))
        out[name] = x.double() + mean
    return out


def test_the_trainers_two_groups(base: Path, trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    checkpoint, moments = trained
    other = tmp_path / "other"
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    optimizer_of(model, tmp_path / "other.pt")  # one group, in the model's order
    model.save_pretrained(other)
    own = torch.load(tmp_path / "other.pt", weights_only=True)["state"]
    by_name = {n: own[i]["exp_avg_sq"] for i, (n, _) in enumerate(model.named_parameters())}
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert len(groups) == 2
    assert all(len(g["params"]) > 3 for g in groups)
    asked = recipe(base, (checkpoint, checkpoint / "optimizer.pt"), (other, tmp_path / "other.pt"))
    plan = stockpot.plan(asked)
    assert any("the Trainer's two groups of LlamaForCausalLM" in n or "param_names" in n for n in plan.notes)
    assert any("the order of LlamaForCausalLM" in n for n in plan.notes)
    stockpot.merge(asked, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, wanted in expected(base, [checkpoint, other], [moments, by_name]).items():
        assert torch.allclose(got[name].double(), wanted, atol=1e-6), name
    stockpot.verify(tmp_path / "out")


def test_names_in_the_file_and_beside_it(base: Path, tmp_path: Path) -> None:
    """A part of the model that was trained, or another order: with names all is known, without it is refused."""
    model = LlamaForCausalLM.from_pretrained(base)
    optimizer_of(model, tmp_path / "named.pt", names=True)
    model.save_pretrained(tmp_path / "one")
    backwards = dict(reversed(list(model.named_parameters())))
    torch.manual_seed(3)
    for p in backwards.values():
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(backwards.values(), lr=1e-2)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "backwards.pt")
    asked = recipe(base, (tmp_path / "one", tmp_path / "named.pt"), (tmp_path / "one", tmp_path / "backwards.pt"))
    with pytest.raises(
        stockpot.StockpotError, match=r"parameter 1 is .*q_proj.*exp_avg_sq is .*backwards.pt.names.json"
    ):
        stockpot.plan(asked)
    # what the message says to do
    names = {id(p): n for n, p in model.named_parameters()}
    found = [names[id(p)] for g in optimizer.param_groups for p in g["params"]]
    (tmp_path / "backwards.pt.names.json").write_text(json.dumps(found))
    plan = stockpot.plan(asked)
    assert any("its own param_names" in n for n in plan.notes)
    assert any("backwards.pt.names.json" in n for n in plan.notes)
    stockpot.merge(asked, tmp_path / "out")
    # both of one model: whatever the moments, its change
    got, whole = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "one"))
    assert all(torch.allclose(got[n], whole[n], atol=1e-6) for n in whole)


@pytest.mark.parametrize(
    ("what", "names", "message"),
    [
        (
            "part",
            None,
            r"groups have 2 parameters; expected one of 21, as LlamaForCausalLM has, or the Trainer's two.*write",
        ),
        (
            "groups",
            None,
            r"groups have 1 and 1 parameters; expected one of 21, as LlamaForCausalLM has, or the Trainer's two",
        ),
        ("part", ["lm_head.weight"], "keeps something of parameter 1, and part.pt.names.json has 1"),
        ("part", ["lm_head.weight", "lm_head.weight"], "expected a list of different names"),
        ("part", {"a": 1}, "expected a list of different names"),
        ("part", "{", "not JSON"),
        ("part", ["model.norm.weight", "head"], "parameter 1 is 'head', which .* has not"),
        (
            "part",
            ["lm_head.weight", "model.norm.weight"],
            r"parameter 0 is 'lm_head.weight', \[32, 16\] in .*is \[16\]",
        ),
        ("sgd", None, "keeps no 'exp_avg_sq' of parameter 0, only momentum_buffer"),
    ],
)
def test_refused(base: Path, tmp_path: Path, what: str, names: Any, message: str) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    file = tmp_path / f"{what}.pt"
    if what == "groups":
        last = [model.lm_head.weight, model.model.norm.weight]
        for p in last:
            p.grad = torch.ones_like(p)
        two = torch.optim.AdamW([{"params": [p]} for p in last], lr=0.1)
        two.step()
        torch.save(two.state_dict(), file)
    elif what == "part":
        optimizer_of(model, file, trained=lambda n: n in ("lm_head.weight", "model.norm.weight"))
    else:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.step()
        torch.save(optimizer.state_dict(), file)
    if names is not None:
        Path(f"{file}.names.json").write_text(names if isinstance(names, str) else json.dumps(names))
    with pytest.raises(stockpot.StockpotError, match=message):
        stockpot.plan(recipe(base, (base, file)))


@pytest.mark.parametrize("how", ["named", "listed"])
def test_a_part_that_was_trained(base: Path, tmp_path: Path, how: str) -> None:
    """What the optimizer never saw has a moment of 0: the other model's change counts there, or the plain mean."""
    chosen = ("model.norm.weight", "lm_head.weight")
    model = LlamaForCausalLM.from_pretrained(base)
    optimizer_of(model, tmp_path / "part.pt", names=how == "named", trained=lambda n: n in chosen)
    model.save_pretrained(tmp_path / "part")
    if how == "listed":
        (tmp_path / "part.pt.names.json").write_text(json.dumps(list(chosen)))
    other = LlamaForCausalLM.from_pretrained(base)
    optimizer_of(other, tmp_path / "all.pt", names=True)
    other.save_pretrained(tmp_path / "all")
    asked = recipe(base, (tmp_path / "part", tmp_path / "part.pt"), (tmp_path / "all", tmp_path / "all.pt"))
    plan = stockpot.plan(asked)
    assert any(
        "keeps nothing of 19 of its tensors, which counts as 0: 'model.embed_tokens.weight'" in n for n in plan.notes
    )
    stockpot.merge(asked, tmp_path / "out")
    got, part, whole = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "part", "all"))
    for name, x in got.items():
        if name in chosen:
            assert not torch.equal(part[name], whole[name])
            assert not torch.allclose(x, whole[name], atol=1e-4)
        else:
            assert torch.allclose(x, whole[name], atol=1e-6), name


def test_a_parameter_that_never_got_a_gradient(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    left_alone = "model.layers.0.mlp.up_proj.weight"
    for n, p in model.named_parameters():
        p.grad = None if n == left_alone else torch.ones_like(p)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 20
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    model.save_pretrained(tmp_path / "one")
    notes = stockpot.plan(recipe(base, (tmp_path / "one", tmp_path / "o.pt"))).notes
    assert any(f"keeps nothing of 1 of its tensors, which counts as 0: {left_alone!r}" in n for n in notes)


def test_of_one_parameter(base: Path, tmp_path: Path) -> None:
    """A file of one state dict."""
    model = LlamaForCausalLM.from_pretrained(base)
    optimizer_of(model, tmp_path / "o.pt", names=True, trained=lambda n: n == "model.norm.weight")
    model.save_pretrained(tmp_path / "one")
    notes = stockpot.plan(recipe(base, (tmp_path / "one", tmp_path / "o.pt"))).notes
    assert any("by its own param_names" in n and "nothing of 20 of its" in n for n in notes)


def test_a_learning_rate_that_is_a_tensor(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2))
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    model.save_pretrained(tmp_path / "one")
    notes = stockpot.plan(recipe(base, (tmp_path / "one", tmp_path / "o.pt"))).notes
    assert any("by the order of LlamaForCausalLM" in n for n in notes)
    assert not any("counts as 0" in n for n in notes)


def test_tied_weights_that_are_stored_twice(tmp_path: Path) -> None:
    """The head has the embedding's moment, as the optimizer knew one parameter."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    optimizer_of(model, tmp_path / "o.pt")
    model.save_pretrained(tmp_path / "one")
    for name in ("base", "one"):
        tensors = load_file(tmp_path / name / "model.safetensors")
        copy = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors | {"lm_head.weight": copy}, tmp_path / name / "model.safetensors", {"format": "pt"})
    asked = recipe(tmp_path / "base", (tmp_path / "one", tmp_path / "o.pt"))
    assert not any("counts as 0" in n for n in stockpot.plan(asked).notes)
    stockpot.merge(asked, tmp_path / "out")
    got, one = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "one"))
    assert all(torch.allclose(got[n], one[n], atol=1e-6) for n in got)


def test_a_list_beside_a_link_and_one_that_changes(base: Path, tmp_path: Path) -> None:
    """It lies beside the link, not beside what the link leads to; another list is another plan."""
    model = LlamaForCausalLM.from_pretrained(base)
    optimizer_of(model, tmp_path / "o.pt")
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link.pt"
    link.symlink_to(tmp_path / "o.pt")
    names = [n for n, _ in model.named_parameters()]
    Path(f"{link}.names.json").write_text(json.dumps(names))
    one = stockpot.plan(recipe(base, (tmp_path / "one", link)))
    assert any("by link.pt.names.json" in n for n in one.notes)
    q, o = (names.index(f"model.layers.0.self_attn.{x}_proj.weight") for x in "qo")
    names[q], names[o] = names[o], names[q]
    Path(f"{link}.names.json").write_text(json.dumps(names))
    assert stockpot.plan(recipe(base, (tmp_path / "one", link))).identity != one.identity


def test_of_what_no_class_is_known(base: Path, tmp_path: Path) -> None:
    import shutil

    optimizer_of(LlamaForCausalLM.from_pretrained(base), tmp_path / "o.pt")
    shutil.copytree(base, tmp_path / "odd")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps({**config, "architectures": ["Unheard"]}))
    with pytest.raises(stockpot.StockpotError, match=r"architectures \['Unheard'\]\) isn't known; write the names"):
        stockpot.plan(recipe(base, (tmp_path / "odd", tmp_path / "o.pt")))


@pytest.mark.parametrize(
    "parts",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 1000, "num_experts": 1000},
        {"text_config": {"n_layer": 10**6}, "num_hidden_layers": 1},
    ],
)
def test_a_config_of_more_layers_than_any(base: Path, tmp_path: Path, parts: dict[str, Any]) -> None:
    import shutil

    optimizer_of(LlamaForCausalLM.from_pretrained(base), tmp_path / "o.pt")
    shutil.copytree(base, tmp_path / "odd")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps(config | parts))
    with pytest.raises(stockpot.StockpotError, match=r"more layers than any model has; write the names"):
        stockpot.plan(recipe(base, (tmp_path / "odd", tmp_path / "o.pt")))


def test_a_config_that_makes_no_model(base: Path, tmp_path: Path) -> None:
    import shutil

    optimizer_of(LlamaForCausalLM.from_pretrained(base), tmp_path / "o.pt")
    shutil.copytree(base, tmp_path / "odd")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps(config | {"num_hidden_layers": "many"}))
    with pytest.raises(
        stockpot.StockpotError, match=r"(?s)LlamaForCausalLM can't be made of the config of .*; write the names"
    ):
        stockpot.plan(recipe(base, (tmp_path / "odd", tmp_path / "o.pt")))


def test_groups_without_a_state_are_no_optimizers(base: Path, tmp_path: Path) -> None:
    torch.save({"state": {}, "param_groups": [{"lr": torch.ones(1)}, {"lr": torch.ones(1)}]}, tmp_path / "o.pt")
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "one")
    with pytest.raises(stockpot.StockpotError, match="has no tensor"):
        stockpot.plan(recipe(base, (tmp_path / "one", tmp_path / "o.pt")))


def test_where_no_optimizer_is_wanted(base: Path, tmp_path: Path) -> None:
    optimizer_of(LlamaForCausalLM.from_pretrained(base), tmp_path / "o.pt")
    asked = {
        "merge_method": "fisher",
        "models": [{"model": str(base), "companions": {"fisher": str(tmp_path / "o.pt")}}] * 2,
    }
    with pytest.raises(stockpot.StockpotError, match="has no tensor"):
        stockpot.plan(asked)


def test_the_list_beside_it_counts_before_the_files_own_names(base: Path, tmp_path: Path) -> None:
    """As of a model that was wrapped: what the error says to write is then read."""
    model = LlamaForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "one")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW([("module." + n, p) for n, p in model.named_parameters()], lr=1e-2)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    with pytest.raises(
        stockpot.StockpotError, match=r"by its own param_names parameter 0 is 'module\..*o.pt.names.json"
    ):
        stockpot.plan(recipe(base, (tmp_path / "one", tmp_path / "o.pt")))
    (tmp_path / "o.pt.names.json").write_bytes(b"\xff[]")
    with pytest.raises(stockpot.StockpotError, match="not JSON"):
        stockpot.plan(recipe(base, (tmp_path / "one", tmp_path / "o.pt")))
    (tmp_path / "o.pt.names.json").write_text(json.dumps([n for n, _ in model.named_parameters()]))
    stockpot.plan(recipe(base, (tmp_path / "one", tmp_path / "o.pt")))


def test_an_optimizers_tensors_in_a_safetensors_file(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "o.safetensors"
    model = LlamaForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "one")
    save_file({f"state.{i}.exp_avg_sq": torch.ones_like(p) for i, p in enumerate(model.parameters())}, file)
    with pytest.raises(
        stockpot.StockpotError, match=r"it has no param_groups; expected one of 21.*o.safetensors.names.json"
    ):
        stockpot.plan(recipe(base, (tmp_path / "one", file)))
    Path(f"{file}.names.json").write_text(json.dumps([n for n, _ in model.named_parameters()]))
    stockpot.plan(recipe(base, (tmp_path / "one", file)))
