"""Opening runs that real trainers wrote, and runs that went wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stockpot
from stockpot.errors import ArgumentError, CheckpointError, MismatchError
from stockpot.runs import SoupSpec, open_run, resolve_soup, resolve_windows
from stockpot.runs.metrics import log_from_rows

from helpers import cli


@pytest.fixture
def run(lora_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(lora_run, tmp_path / "run"))


def steps(found: list[stockpot.Snapshot] | tuple[stockpot.Snapshot, ...]) -> list[int]:
    return [s.step for s in found]


def test_trainer_run(lora_run: Path) -> None:
    run = open_run(lora_run)
    assert (run.layout, run.warnings, run.broken) == ("transformers", (), ())
    assert steps(run.snapshots) == [4, 8, 12, 16, 20, 24, 26]
    assert {s.kind for s in run.snapshots} == {"adapter"}
    assert run.final is not None
    assert run.final.step == 26
    assert run.last_merging is not None
    assert run.last_merging.step == 24
    assert {"loss", "eval_loss", "learning_rate", "epoch", "grad_norm"} <= set(run.metrics.names())
    assert not any("runtime" in n or "per_second" in n for n in run.metrics.names())
    logged = {
        row["step"]: row["loss"]
        for row in json.loads((lora_run / "trainer_state.json").read_text())["log_history"]
        if "loss" in row
    }
    assert run.metrics.value_at("loss", 12).value == logged[12]
    assert run.metrics.value_at("loss", 12).rule == "logged at step 12"
    smooth = run.metrics.value_at("loss", 12, smooth=3)
    assert smooth.value == pytest.approx((logged[8] + logged[10] + logged[12]) / 3)
    assert smooth.rule == "mean of 3 values logged at steps 8 to 12"
    assert run.metrics.value_at("eval_loss", 23).rule == "logged at step 20, the last before 23"
    assert run.metrics.value_at("step", 20).value == 20


def test_full_fine_tune(full_run: Path) -> None:
    run = open_run(full_run)
    assert {s.kind for s in run.snapshots} == {"model"}
    assert steps(run.snapshots) == [4, 8, 12]


def test_the_newest_state_wins(run: Path) -> None:
    state = json.loads((run / "trainer_state.json").read_text())
    state["log_history"].append({"step": 24, "loss": 123.0})
    state["global_step"] = 99
    (run / "checkpoint-8/trainer_state.json").write_text(json.dumps(state | {"global_step": 8, "log_history": []}))
    (run / "trainer_state.json").write_text(json.dumps(state))
    assert open_run(run).metrics.value_at("loss", 24).value == 123.0


def test_without_any_state_it_is_still_a_run_of_steps(run: Path) -> None:
    for state in run.rglob("trainer_state.json"):
        state.unlink()
    found = open_run(run)
    assert steps(found.regular) == [4, 8, 12, 16, 20, 24, 26]
    assert "its step is not known" in found.warnings[0]
    assert found.metrics.names() == []
    assert resolve_soup(found, SoupSpec(last=3)).name == "last_3_unweighted"
    with pytest.raises(ArgumentError, match="no metric 'loss': nothing was logged"):
        resolve_soup(found, SoupSpec(last=3, by="loss"))
    (run / "adapter_model.safetensors").unlink()
    assert open_run(run).final is not None  # off the regular interval


def test_a_run_that_goes_on_has_no_final_checkpoint(run: Path) -> None:
    (run / "trainer_state.json").unlink()
    shutil.rmtree(run / "checkpoint-26")
    found = open_run(run)
    assert found.final is None
    assert found.last_merging is not None
    assert found.last_merging.step == 24


def test_final_model_at_the_top_only(run: Path) -> None:
    shutil.rmtree(run / "checkpoint-26")
    found = open_run(run)
    assert found.final is not None
    assert (found.final.step, found.final.path) == (26, str(run))
    taken = resolve_soup(found, SoupSpec(last=2, include_final=True))
    assert [i.snapshot.step for i in taken.ingredients] == [24, 26]


@pytest.mark.parametrize("how", ["truncated", "no weights", "no config", "empty"])
def test_half_written_checkpoint(run: Path, how: str) -> None:
    folder = run / "checkpoint-20"
    if how == "truncated":
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif how == "no config":
        (folder / "adapter_config.json").write_text("{")
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    found = open_run(run)
    assert steps(found.snapshots) == [4, 8, 12, 16, 24, 26]
    assert steps(found.broken) == [20]
    assert "step 20 is left out: half-written or damaged" in found.warnings[0]
    assert [i.snapshot.step for i in resolve_soup(found, SoupSpec(last=3)).ingredients] == [12, 16, 24]
    with pytest.raises(CheckpointError, match="step 20 can't be used"):
        resolve_soup(found, SoupSpec(steps=(16, 20)))
    result = cli("soup", run, run.parent / "out", "--steps", "16,20")
    assert (result.returncode, result.stdout) == (3, "")
    assert "step 20 can't be used" in result.stderr
    result = cli("soup", run, run.parent / "out", "--last", "3", "--json")
    assert result.returncode == 0
    assert any("step 20" in note for note in json.loads(result.stdout)["notes"])


def test_state_cut_short(run: Path) -> None:
    """The newest that can be read is used, and only for the steps that it covers."""
    (run / "trainer_state.json").write_text((run / "trainer_state.json").read_text()[:200])
    for step in (24, 26):
        path = run / f"checkpoint-{step}/trainer_state.json"
        path.write_text(path.read_text()[:300])
    found = open_run(run)
    assert len([w for w in found.warnings if "can't be used" in w]) == 3
    assert "cut short?" in found.warnings[0]
    assert found.metrics.value_at("loss", 20).rule == "logged at step 20"
    with pytest.raises(
        ArgumentError, match=r"of step 24 is not known: trainer_state.json can't be used .* ends at step 20"
    ):
        found.metrics.value_at("loss", 24)
    assert "ends at step 20" in cli("soup", run, "--dry-run", "--last", "4", "--by", "loss").stderr


def test_no_state_that_can_be_read(run: Path) -> None:
    for state in run.rglob("trainer_state.json"):
        state.write_text('{"log_history"')
    result = cli("soup", run, "--dry-run", "--last", "3", "--by", "loss")
    assert result.returncode == 2
    assert "no metric 'loss': nothing was logged (trainer_state.json can't be used: not valid JSON" in result.stderr
    for state in run.rglob("trainer_state.json"):
        state.write_text('{"log_history": [{"step": 4, "loss": 1%s}, {"step": 1e999, "loss": 1}]}' % ("0" * 400))
    assert cli("run", "show", run).returncode == 0
    assert "not a number: inf at step 4" in cli("soup", run, "--dry-run", "--steps", "4", "--by", "loss").stderr


def test_adapter_without_its_config(run: Path) -> None:
    (run / "checkpoint-20/adapter_config.json").unlink()
    found = open_run(run)
    assert steps(found.broken) == [20]
    assert "without adapter_config.json" in found.broken[0].fault


def test_losses_that_are_not_numbers(run: Path) -> None:
    state = json.loads((run / "trainer_state.json").read_text())
    for row in state["log_history"]:
        if row["step"] == 20 and "loss" in row:
            row["loss"] = float("nan")
    (run / "trainer_state.json").write_text(json.dumps(state))
    assert "NaN" in (run / "trainer_state.json").read_text()
    result = cli("soup", run, "--dry-run", "--last", "4", "--by", "loss")
    assert result.returncode == 2
    assert "'loss' of step 20 is not a number: nan at step 20" in result.stderr
    assert cli("run", "show", run).returncode == 0
    shown = json.loads(cli("run", "show", run, "--json").stdout)
    assert next(s for s in shown["snapshots"] if s["step"] == 20)["metrics"]["loss"]["value"] is None


def test_nothing_there(tmp_path: Path, lora_run: Path) -> None:
    for path, said in [
        (tmp_path, "no snapshots of a training run.*found nothing"),
        (tmp_path / "absent", "no such directory"),
        (lora_run / "trainer_state.json", "is a file"),
        (lora_run / "checkpoint-4", "no snapshots of a training run.*adapter_config.json"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            open_run(path)


def test_only_broken_or_one_checkpoint(run: Path) -> None:
    for folder in run.glob("checkpoint-*"):
        if folder.name != "checkpoint-8":
            shutil.rmtree(folder)
    (run / "adapter_model.safetensors").unlink()
    (run / "trainer_state.json").unlink()
    assert resolve_soup(open_run(run), SoupSpec()).to_dict()["snapshots"][0]["weight"] == 1.0
    with pytest.raises(ArgumentError, match="the last 2 snapshots were asked for, which needs 2; the run has 1"):
        resolve_soup(open_run(run), SoupSpec(last=2))
    (run / "checkpoint-8/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no usable snapshot: step 8: half-written"):
        resolve_soup(open_run(run), SoupSpec())


def test_adapters_and_models_do_not_mix(run: Path, full_run: Path) -> None:
    shutil.rmtree(run / "checkpoint-24")
    shutil.copytree(full_run / "checkpoint-4", run / "checkpoint-24")
    found = open_run(run)
    assert [s.kind for s in found.snapshots[-2:]] == ["model", "adapter"]
    with pytest.raises(MismatchError, match="step 20 is an adapter and step 24 a full model"):
        resolve_soup(found, SoupSpec(last=2))
    assert cli("soup", run, run.parent / "out", "--last", "2").returncode == 3


@pytest.mark.parametrize("change", ["rank", "modules"])
def test_snapshots_of_different_ranks_or_modules(run: Path, change: str) -> None:
    folder = run / "checkpoint-20"
    tensors = load_file(folder / "adapter_model.safetensors")
    if change == "rank":
        tensors = {k: (v[:2] if "lora_A" in k else v[:, :2]).contiguous() for k, v in tensors.items()}
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 2, "lora_alpha": 4}))
    else:
        tensors = {k: v for k, v in tensors.items() if "layers.1" not in k}
    save_file(tensors, folder / "adapter_model.safetensors")
    for options in ([], ["--adapter", "product"]):
        result = cli("soup", run, run.parent / "out", "--last", "3", *options)
        if change == "rank" and options:
            assert result.returncode == 0, result.stderr  # products of different ranks add up
            continue
        assert (result.returncode, result.stdout) == (3, ""), result.stderr
        assert "layers.1" in result.stderr or "lora_alpha" in result.stderr or "is [" in result.stderr
        assert not (run.parent / "out").exists()


def test_choosing(lora_run: Path) -> None:
    run = open_run(lora_run)

    def chosen(**options: object) -> list[int]:
        return [i.snapshot.step for i in resolve_soup(run, SoupSpec(**options)).ingredients]  # type: ignore[arg-type]

    assert chosen() == [4, 8, 12, 16, 20, 24]
    assert chosen(last=3) == [16, 20, 24]
    assert chosen(last=3, every=2) == [8, 16, 24]
    assert chosen(last=3, include_final=True) == [20, 24, 26]
    assert chosen(every=2) == [8, 16, 24]
    assert chosen(steps=(26, 4)) == [4, 26]
    assert chosen(start=15) == [16, 20, 24]
    assert chosen(start=4, every=3) == [12, 24]
    assert chosen(scheme="swa") == [4, 8, 12, 16, 20, 24]
    assert chosen(last=6, best=2, by="step") == [20, 24]
    assert chosen(last=6, best=2, by="step", objective="min") == [4, 8]
    for options, said in [
        (
            {"last": 7},
            "the last 7 snapshots were asked for, which needs 7; the run has 6 besides the final one of step 26",
        ),
        ({"last": 4, "every": 2}, "needs 7; the run has 6"),
        ({"steps": (5,)}, "no snapshot of step 5; the nearest are 4, 8"),
        ({"start": 100}, "no regular snapshot from step 100 on"),
        ({"last": 3, "by": "los"}, "no metric 'los' was logged; there are .*did you mean 'loss'"),
        ({"last": 3, "by": "grad_norm"}, "give objective min or max"),
        ({"last": 2, "best": 3, "by": "loss"}, "the best 3 were asked for, among 2"),
        ({"weights": {4: 0.5, 8: 0.6}}, "sum to 1.1, not 1"),
        ({"weights": {4: 0.5, 9: 0.5}}, "no snapshot of step 9"),
        ({"last": 3, "by": "loss", "smooth": 99}, "smooth asks for 99"),
    ]:
        with pytest.raises(ArgumentError, match=said):
            resolve_soup(run, SoupSpec(**options))  # type: ignore[arg-type]


def test_windows(lora_run: Path) -> None:
    windows = resolve_windows(open_run(lora_run), SoupSpec(scheme="lawa", last=3))
    assert [step for step, _ in windows] == [12, 16, 20, 24]
    assert [i.snapshot.step for i in windows[0][1].ingredients] == [4, 8, 12]
    assert windows[0][1].name == "steps_4-8-12_unweighted"
    with pytest.raises(ArgumentError, match="the last 9 snapshots"):
        resolve_windows(open_run(lora_run), SoupSpec(scheme="lawa", last=9))


def test_metric_weights_of_a_run(lora_run: Path) -> None:
    run = open_run(lora_run)
    soup = resolve_soup(run, SoupSpec(last=4, by="loss", penalty=0.7))
    losses = [run.metrics.value_at("loss", s).value for s in (12, 16, 20, 24)]
    assert [i.weight for i in soup.ingredients] == stockpot.metric_weights(losses, "min", 0.7, 1.2)
    assert soup.name == "last_4_loss_pf-0_7"
    noted = resolve_soup(run, SoupSpec(last=4, by="loss", penalty=1.05))
    assert "favours the snapshots that rank worse" in noted.notes[0]


# other layouts


def test_pattern_and_metrics_files(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        folder = tmp_path / "run" / f"s{step}"
        folder.mkdir(parents=True)
        save_file({"w": torch.full((4,), float(step))}, folder / "w.safetensors")
    (tmp_path / "m.csv").write_text("step, val_loss ,note\n10,0.5,a\n20,,b\n25,0.3,\n30,0.4,x\n")
    (tmp_path / "m.jsonl").write_text('{"step": 10, "val_loss": 0.5}\n\n{"step": 30, "val_loss": 0.4}\n')
    run = open_run(tmp_path / "run", snapshots="s{step}/w.safetensors", metrics=tmp_path / "m.csv")
    assert run.layout == "pattern"
    assert [(s.step, s.kind) for s in run.snapshots] == [(10, "model"), (20, "model"), (30, "model")]
    assert run.metrics.value_at("val_loss", 20).value == 0.5
    other = open_run(tmp_path / "run", snapshots="s{step}", metrics=tmp_path / "m.jsonl")
    assert other.metrics.value_at("val_loss", 30).value == 0.4
    result = cli("soup", tmp_path / "run", tmp_path / "out", "--snapshots", "s{step}/w.safetensors", "--metrics",
                 tmp_path / "m.csv", "--by", "val_loss")  # fmt: skip
    assert result.returncode == 0, result.stderr
    weights = stockpot.metric_weights([0.5, 0.5, 0.4], "min")
    merged = load_file(tmp_path / "out/model.safetensors")["w"]
    assert torch.allclose(merged, torch.full((4,), sum(w * s for w, s in zip(weights, (10, 20, 30)))))
    for pattern, said in [("s", "with {step} once"), ("../s{step}", "relative"), ("t{step}", "nothing matches")]:
        with pytest.raises((ArgumentError, CheckpointError), match=said):
            open_run(tmp_path / "run", snapshots=pattern)
    for name, text, said in [
        ("a.csv", "epoch,loss\n1,2\n", "column 'step'"),
        ("b.jsonl", "[1]\n", "expected an object"),
        ("c.jsonl", "{", "not valid JSON"),
        ("d.csv", "step,loss\n1,x\n", "no numbers"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(CheckpointError, match=said):
            open_run(tmp_path / "run", snapshots="s{step}", metrics=tmp_path / name)


def test_metrics_of_a_resumed_lightning_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (4, 8):
        torch.save(
            {"state_dict": {"w": torch.ones(2)}, "global_step": step}, tmp_path / f"checkpoints/step={step}.ckpt"
        )
    for version, rows in enumerate(("3,0.5\n5,0.4\n", "5,0.45\n7,0.3\n")):
        folder = tmp_path / f"lightning_logs/version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("step,loss\n" + rows)
        os.utime(folder / "metrics.csv", (version, version))
    run = open_run(tmp_path)
    assert run.metrics.series["loss"] == ((4, 0.5), (6, 0.45), (8, 0.3))


def test_torchtune(tmp_path: Path) -> None:
    """The layout that torchtune's checkpointer and DiskLogger write."""
    for epoch in range(3):
        folder = tmp_path / f"epoch_{epoch}"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"w": torch.full((4,), float(epoch))}, folder / "model-00001-of-00001.safetensors")
    lines = [f"Step {s} | loss:{3 - s / 10} lr:2e-05 tokens_per_second_per_gpu:100\n" for s in range(1, 7)]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/log_1700000000.txt").write_text("".join(lines))
    run = open_run(tmp_path)
    assert (run.layout, steps(run.snapshots), run.epochs_as_steps) == ("torchtune", [0, 1, 2], True)
    assert [run.metrics.value_at("loss", e).value for e in range(3)] == pytest.approx([2.8, 2.6, 2.4])
    with (tmp_path / "logs/log_1700000000.txt").open("a") as f:
        f.write("Step 7 | loss:1.0\n")
    assert "does not divide into the 3 epochs" in open_run(tmp_path).warnings[0]
    for epoch in range(3):
        (tmp_path / f"epoch_{epoch}").rename(tmp_path / f"step_{2 * epoch + 2}")
    by_step = open_run(tmp_path)
    assert steps(by_step.snapshots) == [2, 4, 6]
    assert by_step.metrics.value_at("loss", 4).value == pytest.approx(2.6)


def test_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    with tensorboard.SummaryWriter(str(tmp_path / "runs/a")) as writer:
        for step in range(1, 11):
            writer.add_scalar("train/loss", 1 / step, step)
    run = open_run(tmp_path)
    assert run.metrics.value_at("loss", 10).value == pytest.approx(0.1)


def test_the_newest_of_many_tensorboard_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from stockpot.runs import tensorboard as reading

    monkeypatch.setattr(reading, "_MOST_FOLDERS", 2)
    for age, name in enumerate(("c", "a", "b")):  # the oldest is neither the first nor the last by name
        with tensorboard.SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar(f"loss_{name}", 1.0, 1)
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    log = reading.read_events(str(tmp_path))
    assert log is not None
    assert sorted(log.series) == ["loss_a", "loss_b"]
    assert log.source == "TensorBoard (the newest 2 of 3 folders with event files)"


def test_log_from_rows_takes_what_is_a_number() -> None:
    log = log_from_rows(
        [{"step": 1, "loss": "2.5", "name": "x", "flag": True}, {"loss": 1.0}, {"step": 1, "loss": 2.0}], "test"
    )
    assert log.series == {"loss": ((1, 2.0),)}


# showing


def test_show(lora_run: Path) -> None:
    shown = cli("run", "show", lora_run)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "7 snapshots (adapters)" in shown.stdout
    assert any(bar in shown.stdout for bar in "▁▂▃▄▅▆▇█")
    lines = shown.stdout.splitlines()
    assert any(line.split()[:1] == ["26"] and "final checkpoint" in line for line in lines)
    assert any(line.split()[:1] == ["24"] and "last merging checkpoint" in line for line in lines)
    data = json.loads(cli("run", "show", lora_run, "--json").stdout)
    assert (data["final"], data["last_merging"], len(data["snapshots"])) == (26, 24, 7)
    assert data["snapshots"][0]["metrics"]["loss"]["rule"] == "logged at step 4"
    missing = cli("run", "show", lora_run / "nowhere")
    assert (missing.returncode, missing.stdout) == (3, "")


# runs as people have them


def _adapters(path: Path, names: tuple[str, ...], tiny_llama: Path) -> None:
    """Checkpoints with adapters of their own names, saved by PEFT, and what the Trainer logged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
    for step in (10, 20, 30, 40):
        folder = path / f"checkpoint-{step}"
        model.save_pretrained(folder)
        log = [{"loss": 4 - s / 100, "step": s} for s in (10, 20, 30, 40) if s <= step]
        state = {"global_step": step, "max_steps": 40, "log_history": log}
        (folder / "trainer_state.json").write_text(json.dumps(state))


def test_adapters_with_names_of_their_own(tiny_llama: Path, tmp_path: Path) -> None:
    _adapters(tmp_path / "one", ("policy",), tiny_llama)
    run = open_run(tmp_path / "one")
    assert [os.path.basename(s.path) for s in run.snapshots] == ["policy"] * 4
    assert any("named 'policy'" in w for w in run.warnings)
    assert run.final is not None
    assert run.final.step == 40
    assert run.metrics.value_at("loss", 20).value == 3.8
    _adapters(tmp_path / "two", ("policy", "reference"), tiny_llama)
    with pytest.raises(
        CheckpointError, match=r"several adapters \(policy, reference\).*--snapshots 'checkpoint-\{step\}/policy'"
    ):
        open_run(tmp_path / "two")
    named = open_run(tmp_path / "two", snapshots="checkpoint-{step}/reference")  # as it says
    assert [s.step for s in named.snapshots] == [10, 20, 30, 40]
    assert named.metrics.value_at("loss", 30).value == 3.7  # what the Trainer logged is there all the same
    assert named.final is not None


def test_the_best_model_is_not_the_last(tmp_path: Path) -> None:
    """load_best_model_at_end leaves the best checkpoint's model at the top."""
    for step in (10, 20, 30):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"w": torch.full((2048,), float(step))}, folder / "model.safetensors")
    state = {"global_step": 35, "max_steps": 35, "log_history": [], "best_model_checkpoint": "out/checkpoint-20"}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    shutil.copy(tmp_path / "checkpoint-20/model.safetensors", tmp_path / "model.safetensors")
    run = open_run(tmp_path)
    assert [s.step for s in run.snapshots] == [10, 20, 30]
    assert any("the model of checkpoint-20 once more" in w for w in run.warnings)
    # a model of its own is the end of training
    save_file({"w": torch.full((2048,), 35.0)}, tmp_path / "model.safetensors")
    assert [s.step for s in open_run(tmp_path).snapshots] == [10, 20, 30, 35]


def _lightning(path: Path, score: float, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    callback = {"monitor": "val_loss", "current_score": torch.tensor(score), "best_k_models": {}}
    callbacks = {"ModelCheckpoint{'monitor': 'val_loss'}": callback}
    torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": step, "callbacks": callbacks}, path)


def test_lightning_with_a_folder_of_its_own(tmp_path: Path) -> None:
    for step, score in ((8, 0.75), (16, 0.5), (24, 0.625)):
        _lightning(tmp_path / f"run/ck/best-val_loss={score:.3f}.ckpt", score, step)
    for place in ("run", "run/ck"):
        run = open_run(tmp_path / place)
        assert [s.step for s in run.snapshots] == [8, 16, 24]
        assert run.metrics.value_at("val_loss", 16).value == 0.5  # what each file keeps of itself
        assert "scores that the .ckpt files keep" in run.metrics.source
    (tmp_path / "run/version_0").mkdir()
    (tmp_path / "run/version_0/metrics.csv").write_text("step,val_loss\n7,0.7\n15,0.45\n23,0.6\n")
    for place in ("run", "run/ck"):
        assert open_run(tmp_path / place).metrics.value_at("val_loss", 16).value == 0.45
    _lightning(tmp_path / "run/other/last.ckpt", 0.1, 30)
    with pytest.raises(CheckpointError, match=r"several folders hold .ckpt files"):
        open_run(tmp_path / "run")


def test_the_metrics_of_another_run_are_not_taken(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for step in (8, 16, 24):
            _lightning(tmp_path / name / f"epoch={step}.ckpt", 0.5, step)
    (tmp_path / "b/version_0").mkdir()
    (tmp_path / "b/version_0/metrics.csv").write_text("step,loss\n7,0.7\n23,0.6\n")
    assert "loss" not in open_run(tmp_path / "a").metrics.names()
    assert "loss" in open_run(tmp_path / "b").metrics.names()


def test_patterns_of_lightning_files_keep_their_metrics(tmp_path: Path) -> None:
    for step in (8, 16, 24):
        _lightning(tmp_path / f"ck/m-{step}.ckpt", step / 100, step)
    run = open_run(tmp_path, snapshots="ck/m-{step}.ckpt")
    assert run.metrics.value_at("val_loss", 16).value == pytest.approx(0.16)


def test_shards_are_not_called_damaged(tmp_path: Path) -> None:
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
        (folder / "pytorch_model_fsdp_0/.metadata").write_bytes(b"x")
    run = open_run(tmp_path)
    assert len(run.broken) == 2
    assert all("merge-weights" in s.fault and "damaged" not in s.fault for s in run.broken)
