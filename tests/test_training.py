"""Callbacks beside real trainers: the same average as computed by hand, a model left as it was, runs that resume."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stockpot
from stockpot.errors import ArgumentError
from stockpot.runs import SoupSpec, open_run, resolve_soup
from stockpot.training import MergingCallback
from stockpot.training.average import Held, SnapshotAverage, swapped

from helpers import tokens, train_lora

SPEC = SoupSpec(last=3, by="loss", penalty=0.5)


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


#: dropout makes training depend on every random number drawn
LORA = {"lora_dropout": 0.2}


@pytest.fixture(scope="module")
def with_callback(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("callback") / "run"
    callback = MergingCallback(SPEC, evaluate=True)
    return train_lora(tiny_llama, out, steps=20, save_steps=4, callbacks=[callback], lora=LORA)


def test_the_average_is_that_of_the_saved_snapshots(with_callback: Path, tmp_path: Path) -> None:
    """What the callback saves at step 20 is the soup of the last three checkpoints, itself among them."""
    run = open_run(with_callback)
    soup = resolve_soup(run, SoupSpec(last=3, by="loss", penalty=0.5, include_final=True))
    assert [i.snapshot.step for i in soup.ingredients] == [12, 16, 20]
    merged = adapter(with_callback / "checkpoint-20/merging/average")
    for name, tensor in merged.items():
        exact = sum(i.weight * adapter(Path(i.snapshot.path))[name].double() for i in soup.ingredients)
        assert torch.allclose(tensor.double(), exact, atol=1e-7)
    record = json.loads((with_callback / "checkpoint-20/merging/average/stockpot_merging.json").read_text())
    assert [s["step"] for s in record["snapshots"]] == [12, 16, 20]
    assert [s["weight"] for s in record["snapshots"]] == pytest.approx([i.weight for i in soup.ingredients])
    assert len(list((with_callback / "checkpoint-20/merging/snapshots").iterdir())) == 3
    shared = (with_callback / "checkpoint-20/merging/snapshots/16.safetensors").stat()
    assert shared.st_nlink > 1  # a hard link, not a copy


def test_it_loads_in_peft_and_is_evaluated(with_callback: Path, tiny_llama: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tiny_llama), with_callback / "checkpoint-16/merging/average"
    ).eval()
    rows = tokens(8, seed=1)
    batch = torch.stack([r["input_ids"] for r in rows])
    with torch.no_grad():
        loss = float(model(input_ids=batch, labels=batch).loss)
    history = json.loads((with_callback / "trainer_state.json").read_text())["log_history"]
    logged = {r["step"]: r["eval_merged_loss"] for r in history if "eval_merged_loss" in r}
    assert sorted(logged) == [4, 8, 12, 16, 20]
    assert logged[16] == pytest.approx(loss, rel=1e-4)
    assert "eval_merged_loss" in open_run(with_callback).metrics.names()


def test_training_goes_on_as_if_it_were_not_there(with_callback: Path, tiny_llama: Path, tmp_path: Path) -> None:
    plain = train_lora(tiny_llama, tmp_path / "run", steps=20, save_steps=4, lora=LORA)
    ours, theirs = adapter(with_callback), adapter(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_survives_resume(with_callback: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Stopped at step 12 and gone on with: the same average as without the stop."""
    out = tmp_path / "run"
    out.mkdir()
    for step in (4, 8, 12):
        shutil.copytree(with_callback / f"checkpoint-{step}", out / f"checkpoint-{step}")
    train_lora(tiny_llama, out, steps=20, save_steps=4, callbacks=[MergingCallback(SPEC)], resume=True, lora=LORA)
    ours, theirs = (
        adapter(out / "checkpoint-20/merging/average"),
        adapter(with_callback / "checkpoint-20/merging/average"),
    )
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def test_it_survives_the_rotation_of_checkpoints(tiny_llama: Path, with_callback: Path, tmp_path: Path) -> None:
    callback = MergingCallback(SPEC)
    out = train_lora(
        tiny_llama, tmp_path / "run", steps=20, save_steps=4, callbacks=[callback], save_total_limit=1, lora=LORA
    )
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-20"]
    ours, theirs = (
        adapter(out / "checkpoint-20/merging/average"),
        adapter(with_callback / "checkpoint-20/merging/average"),
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(list((out / "checkpoint-20/merging/snapshots").iterdir())) == 3


def test_without_its_snapshots_it_begins_anew(with_callback: Path, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(with_callback / "checkpoint-12", out / "checkpoint-12")
    shutil.rmtree(out / "checkpoint-12/merging/snapshots")
    state = json.loads((out / "checkpoint-12/trainer_state.json").read_text())
    assert state["stateful_callbacks"].pop("MergingCallback")["attributes"]["folder"].endswith("/checkpoint-12")
    (out / "checkpoint-12/trainer_state.json").write_text(json.dumps(state))
    callback = MergingCallback(SPEC, every=2)
    with pytest.warns(UserWarning, match="the average begins anew at step 12"):
        train_lora(tiny_llama, out, steps=16, save_steps=4, callbacks=[callback], resume=True)
    assert [h.step for h in callback.snapshots.held] == [14, 16]


def test_full_models_and_a_function_that_evaluates(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    seen: list[float] = []

    def measure(model: Any) -> dict[str, float]:
        seen.append(float(next(model.parameters()).sum()))
        return {"sum": seen[-1]}

    callback = MergingCallback(SoupSpec(last=2), evaluate=measure)
    out = train_lora(tiny_llama, tmp_path / "run", steps=8, save_steps=4, lora=None, callbacks=[callback])
    merged = AutoModelForCausalLM.from_pretrained(out / "checkpoint-8/merging/average")
    parts = [load_file(out / f"checkpoint-{s}/model.safetensors") for s in (4, 8)]
    for name, tensor in load_file(out / "checkpoint-8/merging/average/model.safetensors").items():
        assert torch.allclose(tensor, (parts[0][name] + parts[1][name]) / 2, atol=1e-7)
    assert float(next(merged.parameters()).sum()) == pytest.approx(seen[-1], abs=1e-3)
    assert len(seen) == 2


def test_the_trainer_s_own_evaluation(tiny_llama: Path, tmp_path: Path) -> None:
    """With `callback.trainer`, everything that Trainer.evaluate measures is measured of the average."""
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    callback = MergingCallback(SoupSpec(last=2), every=2, evaluate=True, save=False)
    trainer = Trainer(
        LlamaForCausalLM.from_pretrained(tiny_llama),
        TrainingArguments(str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="no",
                          report_to=[], disable_tqdm=True, use_cpu=True),
        train_dataset=tokens(16), eval_dataset=tokens(8, seed=1), callbacks=[callback],
    )  # fmt: skip
    callback.trainer = trainer
    trainer.train()
    rows = [r for r in trainer.state.log_history if "eval_merged_loss" in r]
    assert [r["step"] for r in rows] == [2, 4]
    assert "eval_merged_runtime" in rows[0]


def test_resume_from_another_directory_and_no_second_adapter(
    with_callback: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    callback = MergingCallback(SPEC)
    out = train_lora(
        tiny_llama, tmp_path / "run", steps=20, save_steps=4, callbacks=[callback],
        resume=str(with_callback / "checkpoint-12"), lora=LORA,
    )  # fmt: skip
    assert [h.step for h in callback.snapshots.held] == [12, 16, 20]
    ours = adapter(out / "checkpoint-20/merging/average")
    theirs = adapter(with_callback / "checkpoint-20/merging/average")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["checkpoint-16", "checkpoint-20"]
    assert [p.name for p in (out / "checkpoint-20").iterdir() if p.is_dir()] == ["merging"]
    assert not list((out / "checkpoint-20/merging/average").glob("*/"))


def test_the_trainer_may_make_it_again_from_its_state(with_callback: Path, tiny_llama: Path, tmp_path: Path) -> None:
    out = train_lora(
        tiny_llama, tmp_path / "run", steps=16, save_steps=4, callbacks=[MergingCallback()], lora=LORA,
        resume=str(with_callback / "checkpoint-12"), restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    record = json.loads((out / "checkpoint-16/merging/average/stockpot_merging.json").read_text())
    assert record["spec"] == {"last": 3, "by": "loss", "penalty": 0.5}
    assert [s["step"] for s in record["snapshots"]] == [8, 12, 16]


def test_a_metric_that_is_never_logged(tiny_llama: Path, tmp_path: Path) -> None:
    callback = MergingCallback(SoupSpec(last=2, by="eval_accuracy"))
    with pytest.warns(UserWarning, match="no snapshot can be weighted by 'eval_accuracy'"):
        out = train_lora(tiny_llama, tmp_path / "run", steps=4, save_steps=4, callbacks=[callback])
    assert not (out / "checkpoint-4/merging/average").exists()


def test_a_rerun_leaves_no_old_snapshots(tiny_llama: Path, tmp_path: Path) -> None:
    for every in (1, 3):
        callback = MergingCallback(SoupSpec(last=4), every=every)
        train_lora(tiny_llama, tmp_path / "run", steps=8, save_steps=4, callbacks=[callback])
    names = sorted(p.name for p in (tmp_path / "run/checkpoint-8/merging/snapshots").iterdir())
    assert names == ["3.safetensors", "6.safetensors"]


def test_saving_by_a_fraction_of_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    callback = MergingCallback(SoupSpec(last=4))
    train_lora(tiny_llama, tmp_path / "run", steps=8, save_steps=0.25, callbacks=[callback])
    assert [h.step for h in callback.snapshots.held] == [2, 4, 6, 8]


def test_a_plain_module(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(16, 1)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.layer(input_ids.float() / 64).square().mean()}

    trainer = Trainer(
        Plain(),
        TrainingArguments(str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=2, save_steps=2, logging_steps=1,
                          report_to=[], disable_tqdm=True, use_cpu=True),
        train_dataset=tokens(16), eval_dataset=tokens(8, seed=1), callbacks=[MergingCallback(SPEC, evaluate=True)],
    )  # fmt: skip
    trainer.train()
    assert set(load_file(tmp_path / "checkpoint-4/merging/average/model.safetensors")) == {"layer.weight", "layer.bias"}
    assert [r["step"] for r in trainer.state.log_history if "eval_merged_loss" in r] == [2, 4]


def test_metrics_that_can_t_weigh_and_parameters_unfrozen_on_the_way() -> None:
    average = SnapshotAverage(SoupSpec(last=4, by="accuracy", penalty=0.5))
    for step, metric in enumerate((0.0, float("inf"), float("nan"), None)):
        average.put(Held(step, {"w": torch.ones(1)}, metric))
    assert average.weights() == {}
    assert average.average() is None
    late = SnapshotAverage(SoupSpec(last=4))
    for step in range(4):
        late.put(Held(step, {"w": torch.ones(2)} | ({"late": torch.ones(2)} if step > 1 else {})))
    found = late.average()
    assert found is not None
    assert torch.equal(found["late"], torch.ones(2))
    for every in (0, -1, 2.5, True):
        with pytest.raises(ArgumentError, match="every: expected"):
            MergingCallback(every=every)  # type: ignore[arg-type]


def test_average_by_hand() -> None:
    average = SnapshotAverage(SoupSpec(last=2, by="loss", penalty=0.5))
    assert average.average() is None
    for step, value, metric in ((1, 1.0, 0.5), (2, 2.0, 0.4), (3, 4.0, 0.2)):
        average.put(Held(step, {"w": torch.full((3,), value)}, metric))
    assert [h.step for h in average.held] == [2, 3]
    weights = stockpot.metric_weights([0.4, 0.2], "min", 0.5)
    found = average.average()
    assert found is not None
    assert torch.allclose(found["w"], torch.full((3,), weights[0] * 2 + weights[1] * 4))
    average.held[0].metric = None  # not logged yet: left out
    assert average.weights() == {3: 1.0}
    narrow = SnapshotAverage(SoupSpec(last=3))
    for step in range(3):
        narrow.put(Held(step, {"w": torch.full((2,), 1.0 + step / 128, dtype=torch.bfloat16)}))
    found = narrow.average()
    assert found is not None
    assert found["w"].dtype == torch.bfloat16


def test_snapshots_are_copies_and_the_model_comes_back() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average = SnapshotAverage(SoupSpec(last=2))
    average.add(1, model)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(1)
    assert set(average.held[0].tensors) == {"weight"}
    assert torch.equal(average.held[0].tensors["weight"], own["weight"])
    with swapped(model, average.average() or {}):
        assert torch.equal(model.weight, own["weight"])
    assert torch.equal(model.weight, own["weight"] + 1)


def test_specs_that_make_no_sense_while_training() -> None:
    for spec in (
        SoupSpec(scheme="swa"),
        SoupSpec(scheme="lawa"),
        SoupSpec(weights={1: 1.0}),
        SoupSpec(steps=(1,)),
        SoupSpec(every=2),
        SoupSpec(by="grad_norm"),
    ):
        with pytest.raises(ArgumentError):
            SnapshotAverage(spec)


# PyTorch Lightning


def lightning() -> Any:
    return pytest.importorskip("lightning.pytorch")


def train_lightning(out: Path, steps: int, callbacks: list[Any], resume: Path | None = None) -> Any:
    pl = lightning()
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
            self.save_hyperparameters({"path": Path("x")})  # a class that the pickle names

        def training_step(self, batch: Any, index: int) -> Any:
            loss = torch.nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[0].sum(1))
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[0].sum(1)))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    data = torch.utils.data.TensorDataset(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    saver = ModelCheckpoint(
        dirpath=out / "checkpoints", every_n_train_steps=4, save_top_k=-1, filename="{epoch}-{step}", save_last=True
    )
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=CSVLogger(out, name="", version=0), log_every_n_steps=1,
        callbacks=[*callbacks, saver], enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=1, num_sanity_val_steps=0,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, loader, loader, ckpt_path=str(resume) if resume else None, weights_only=False)
    return module


def test_lightning_run(tmp_path: Path) -> None:
    """.ckpt files read without running their pickles; metrics.csv; the soup loads into the module."""
    module = train_lightning(tmp_path / "run", 20, [])
    run = open_run(tmp_path / "run")
    assert run.layout == "lightning"
    assert [s.step for s in run.snapshots] == [4, 8, 12, 16, 20]
    assert {"loss", "val_loss"} <= set(run.metrics.names())
    table = list(csv.DictReader((tmp_path / "run/version_0/metrics.csv").open()))
    twelfth = next(float(row["loss"]) for row in table if row["step"] == "11" and row["loss"])
    assert run.metrics.value_at("loss", 12).value == twelfth  # Lightning counts from 0
    result = stockpot.soup(run, tmp_path / "out", SoupSpec(last=3, by="loss", penalty=0.7))
    assert result.soup is not None
    merged = load_file(tmp_path / "out/model.safetensors")
    parts = [torch.load(s["path"], weights_only=False)["state_dict"] for s in result.soup["snapshots"]]
    for name, tensor in merged.items():
        exact = sum(s["weight"] * p[name].double() for s, p in zip(result.soup["snapshots"], parts))
        assert torch.allclose(tensor.double(), exact, atol=1e-7)
    module.load_state_dict(merged)


def test_lightning_callback(tmp_path: Path) -> None:
    lightning()
    from stockpot.training.lightning import MergingCallback as Lightning

    def callback() -> Lightning:
        return Lightning(4, SPEC, evaluate=lambda module: {"norm": float(module.net[0].weight.norm())})

    plain = train_lightning(tmp_path / "plain", 20, [])
    module = train_lightning(tmp_path / "run", 20, [callback()])
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])
    saved = torch.load(next((tmp_path / "run/checkpoints").glob("*step=20.ckpt")), weights_only=False)
    state = next(v for k, v in saved["callbacks"].items() if "MergingCallback" in k)
    assert [s["step"] for s in state["snapshots"]] == [12, 16, 20]
    weights = stockpot.metric_weights([s["metric"] for s in state["snapshots"]], "min", 0.5)
    for name, tensor in saved["merged_state_dict"].items():
        exact = sum(w * s["tensors"][name].double() for w, s in zip(weights, state["snapshots"]))
        assert torch.allclose(tensor.double(), exact, atol=1e-7)
    module.load_state_dict(saved["merged_state_dict"], strict=False)
    assert state["history"]
    assert "merged_norm" in open_run(tmp_path / "run").metrics.names()

    # stopped at 12 and gone on with
    resumed = next((tmp_path / "run/checkpoints").glob("*step=12.ckpt"))
    train_lightning(tmp_path / "again", 20, [callback()], resume=resumed)
    again = torch.load(next((tmp_path / "again/checkpoints").glob("*step=20.ckpt")), weights_only=False)
    held = next(v for k, v in again["callbacks"].items() if "MergingCallback" in k)["snapshots"]
    assert [h["step"] for h in held] == [12, 16, 20]
    assert held[0]["metric"] == state["snapshots"][0]["metric"]
    for name, tensor in held[0]["tensors"].items():
        assert torch.equal(tensor, state["snapshots"][0]["tensors"][name])
