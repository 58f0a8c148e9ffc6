"""Soups of real runs: what they weigh, that they load, and that they compute what averaged weights compute."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stockpot
from stockpot.errors import ArgumentError, RecipeError, StockpotError
from stockpot.planning.planner import build_plan
from stockpot.recipes.parsing import RUN_OPTIONS, load_recipe
from stockpot.runs import SoupSpec, open_run, resolve_soup

from helpers import cli, tokens

MWA = ("--last", "4", "--by", "loss", "--penalty", "0.7")


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.stack([row["input_ids"] for row in tokens(2, seed=9)])).logits


def weights_of(run: Path, spec: SoupSpec) -> dict[str, float]:
    return {i.snapshot.path: i.weight for i in resolve_soup(open_run(run), spec).ingredients}


def averaged(weights: dict[str, float], file: str) -> dict[str, torch.Tensor]:
    """The oracle: float64 sums of what the snapshots hold."""
    out: dict[str, torch.Tensor] = {}
    for path, weight in weights.items():
        for name, tensor in load_file(Path(path) / file).items():
            out[name] = out.get(name, 0) + weight * tensor.double()
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"last": 4},
        {"last": 4, "by": "loss", "penalty": 0.7},
        {"last": 3, "every": 2, "by": "eval_loss", "penalty": 0.5, "power": 2.0},
        {"last": 5, "by": "step", "penalty": 1.05},
        {"last": 5, "decay": 0.8},
        {"last": 5, "scheme": "1-sqrt"},
        {"last": 6, "best": 2, "by": "loss"},
        {"weights": {8: 0.25, 20: 0.5, 26: 0.25}},
        {"weights": {8: -0.5, 20: 1.5}},
        {"weights": {8: 1, 20: 3}, "normalize": True},
    ],
    ids=lambda o: "-".join(o),
)
def test_factors_are_averaged_as_weighted(lora_run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    spec = SoupSpec(**options)
    result = stockpot.soup(lora_run, tmp_path / "out", spec)
    exact = averaged(weights_of(lora_run, spec), "adapter_model.safetensors")
    merged = load_file(tmp_path / "out/adapter_model.safetensors")
    assert set(merged) == set(exact)
    for name, tensor in merged.items():
        assert torch.allclose(tensor.double(), exact[name], atol=1e-7, rtol=1e-6)
    assert result.soup is not None
    assert result.soup["name"] == resolve_soup(open_run(lora_run), spec).name
    lineage = stockpot.verify(tmp_path / "out")
    assert lineage["soup"] == result.soup
    assert "run:" in lineage["recipe"]["text"]


@pytest.mark.parametrize("adapter", ["factors", "product", "product 16", "fused"])
def test_soup_of_adapters_gives_the_logits_of_averaged_weights(
    lora_run: Path, tiny_llama: Path, tmp_path: Path, adapter: str
) -> None:
    """Oracle: each snapshot merged into the base by PEFT, the full weights averaged in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    spec = SoupSpec(last=4, by="loss", penalty=0.5, power=2.0)
    total: dict[str, torch.Tensor] = {}
    for path, weight in weights_of(lora_run, spec).items():
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), path).merge_and_unload()
        for name, tensor in model.state_dict().items():
            total[name] = total.get(name, 0) + weight * tensor.double()
    oracle = LlamaForCausalLM.from_pretrained(tiny_llama)
    oracle.load_state_dict({name: tensor.float() for name, tensor in total.items()})
    mode, _, rank = adapter.partition(" ")
    result = stockpot.soup(lora_run, tmp_path / "out", spec, adapter=mode, rank=int(rank) if rank else None)
    if mode == "fused":
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert result.adapter is None
    else:
        merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / "out")
        assert result.adapter is not None
    difference = (logits(merged) - logits(oracle)).abs().max().item()
    moved = (logits(LlamaForCausalLM.from_pretrained(tiny_llama)) - logits(oracle)).abs().max().item()
    assert moved > 0.05
    if mode == "factors":
        assert difference < 0.1 * moved
        assert 0 < result.adapter["relative_error"] < 0.2
    else:
        assert difference < 2e-6


def test_soup_of_full_models(full_run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    spec = SoupSpec(last=2, by="loss", penalty=0.7)
    result = cli("soup", full_run, tmp_path / "out", "--last", "2", "--by", "loss", "--penalty", "0.7", "--json")
    assert result.returncode == 0, result.stderr
    exact = averaged(weights_of(full_run, spec), "model.safetensors")
    oracle = AutoModelForCausalLM.from_pretrained(full_run)
    oracle.load_state_dict({**oracle.state_dict(), **{k: v.float() for k, v in exact.items()}})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(merged), logits(oracle), atol=1e-5)
    for mode in ("product", "fused"):
        refused = cli("soup", full_run, tmp_path / mode, "--adapter", mode)
        assert refused.returncode == 3
        assert "a full model; expected a LoRA adapter" in refused.stderr


# the command line


def test_command(lora_run: Path, tmp_path: Path) -> None:
    done = cli("soup", lora_run, tmp_path / "out", *MWA)
    assert (done.returncode, done.stderr) == (0, "")
    assert "last_4_loss_pf-0_7: 4 snapshots, " in done.stdout
    assert "logged at step 24" in done.stdout
    assert "from the average of the products B A" in done.stdout
    assert cli("verify", tmp_path / "out").returncode == 0
    again = cli("soup", lora_run, tmp_path / "out", *MWA)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    assert cli("soup", lora_run, tmp_path / "out", *MWA, "--overwrite", "--quiet").stdout == ""


def test_dry_run(lora_run: Path, tmp_path: Path) -> None:
    dry = cli("soup", lora_run, tmp_path / "out", *MWA, "--dry-run", "--json")
    assert (dry.returncode, dry.stderr) == (0, "")
    data = json.loads(dry.stdout)
    assert set(data) == {"name", "snapshots", "effective_snapshots"}
    assert data["name"] == "last_4_loss_pf-0_7"
    assert [s["step"] for s in data["snapshots"]] == [12, 16, 20, 24]
    losses = [s["metric"] for s in data["snapshots"]]
    weights = [s["weight"] for s in data["snapshots"]]
    assert weights == stockpot.metric_weights(losses, "min", 0.7)
    assert data["effective_snapshots"] == pytest.approx(1 / sum(w * w for w in weights))
    assert not (tmp_path / "out").exists()
    by_name = cli("soup", lora_run, "--dry-run", "--json", "--name", "last_4_loss_pf-0_7")
    assert json.loads(by_name.stdout) == data


def test_lawa_writes_a_run(lora_run: Path, tmp_path: Path) -> None:
    done = cli("soup", lora_run, tmp_path / "out", "--scheme", "lawa", "--last", "3", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["name"] == "last_3_lawa"
    assert [[s["step"] for s in w["snapshots"]] for w in data["windows"]] == [
        [4, 8, 12], [8, 12, 16], [12, 16, 20], [16, 20, 24],
    ]  # fmt: skip
    run = open_run(tmp_path / "out")
    assert [s.step for s in run.snapshots] == [12, 16, 20, 24]
    merged = load_file(tmp_path / "out/checkpoint-16/adapter_model.safetensors")
    exact = averaged({str(lora_run / f"checkpoint-{s}"): 1 / 3 for s in (8, 12, 16)}, "adapter_model.safetensors")
    for name, tensor in merged.items():
        assert torch.allclose(tensor.double(), exact[name], atol=1e-7)


def test_lawa_takes_the_adapter_options(lora_run: Path, tmp_path: Path) -> None:
    done = cli(
        "soup", lora_run, tmp_path / "out", "--scheme", "lawa", "--last", "5", "--adapter", "product", "--rank", "2"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/checkpoint-24/adapter_config.json").read_text())["r"] == 2
    again = cli("soup", lora_run, tmp_path / "out", "--scheme", "lawa", "--last", "5", "--json")
    assert again.returncode == 0, again.stderr  # what is there is left as it is
    assert json.loads((tmp_path / "out/checkpoint-24/adapter_config.json").read_text())["r"] == 2
    bad = cli("soup", lora_run, tmp_path / "no", "--scheme", "lawa", "--last", "5", "--adapter", "nonsense")
    assert (bad.returncode, (tmp_path / "no").exists()) == (2, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"12": %s, "24": 0.5}' % ("9" * 400), "expected two numbers"),
        ("step,weight\n12," + "9" * 140_000 + "\n", "not a CSV file"),
        ('{"12": 0.5, "24": 0.5}', None),
        ("step,weight\n12,0.5\n24,0.5\n", None),
        ('{"12": 0.5, "12": 0.5}', "step 12 is given twice"),
        ('{"12": "x"}', "expected two numbers"),
        ("[1, 2]", "expected an object"),
        ("{", "not valid JSON"),
        ("a,b\n1,2\n", "columns step and weight"),
        ('{"12": 0.5}', "sum to 0.5, not 1"),
    ],
)
def test_weights_file(lora_run: Path, tmp_path: Path, text: str, said: str | None) -> None:
    path = tmp_path / ("w.csv" if "," in text.splitlines()[0] and text[0] not in "{[" else "w.json")
    path.write_text(text)
    result = cli("soup", lora_run, "--dry-run", "--json", "--weights", path)
    if said is None:
        assert [s["weight"] for s in json.loads(result.stdout)["snapshots"]] == [0.5, 0.5]
    else:
        assert result.returncode == 2
        assert said in result.stderr
        assert "Traceback" not in result.stderr


BAD = {
    "no OUT": (["{run}"], 2, "OUT is missing"),
    "no run": (["{run}/nowhere", "{out}"], 3, "no such directory"),
    "fewer than asked": (["{run}", "{out}", "--last", "50"], 2, "the run has 6 besides the final one"),
    "penalty 0": (["{run}", "{out}", "--by", "loss", "--penalty", "0"], 2, "penalty: expected a number above 0"),
    "penalty without metric": (["{run}", "{out}", "--penalty", "0.7"], 2, "name the metric with by"),
    "unknown metric": (["{run}", "{out}", "--by", "lss"], 2, "did you mean 'loss'"),
    "steps that are no numbers": (["{run}", "{out}", "--steps", "1,a"], 2, "--steps: expected whole numbers"),
    "no such step": (["{run}", "{out}", "--steps", "5"], 2, "the nearest are 4, 8"),
    "name with options": (["{run}", "{out}", "--name", "last_2_unweighted", "--last", "3"], 2, "--name says it all"),
    "bad name": (["{run}", "{out}", "--name", "best"], 2, "not the name of a soup"),
    "unknown mode": (["{run}", "{out}", "--adapter", "products"], 2, "did you mean 'product'"),
    "rank without product": (["{run}", "{out}", "--rank", "4"], 2, "adapter.rank has no effect with factors"),
    "rank 0": (["{run}", "{out}", "--adapter", "product", "--rank", "0"], 2, "whole number of at least 1"),
    "base that is none": (["{run}", "{out}", "--adapter", "fused", "--base", "{run}/x"], 3, "no such file"),
    "missing weights file": (["{run}", "{out}", "--weights", "{out}.json"], 2, "can't be read"),
    "OUT holds the run": (["{run}", "{run}"], 2, "is or holds the input"),
    "OUT in a file": (["{run}", "{run}/trainer_state.json/x"], 2, "must be a directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes(lora_run: Path, tmp_path: Path, case: str) -> None:
    arguments, code, said = BAD[case]
    out = tmp_path / "out"
    result = cli("soup", *(a.format(run=lora_run, out=out) for a in arguments))
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert "<recipe>" not in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_out(lora_run: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = cli("soup", lora_run, tmp_path / "out")
    assert result.returncode == 2
    assert "no permission" in result.stderr


# recipes


def test_run_keys_are_the_spec_s_fields() -> None:
    from dataclasses import fields

    assert sorted(RUN_OPTIONS) == sorted(f.name for f in fields(SoupSpec))


@pytest.mark.parametrize("base", ["first", "last", 8])
def test_any_method_over_a_run(lora_run: Path, recipe: Callable[[str], Path], tmp_path: Path, base: object) -> None:
    """ties over snapshots is ties over the same models written out."""
    path = recipe(
        f"merge_method: ties\nrun: {{path: {lora_run}, last: 3, by: loss, penalty: 0.7, base: {base}}}\n"
        "parameters: {density: 0.5}\n"
    )
    stockpot.merge(path, tmp_path / "out")
    soup = resolve_soup(open_run(lora_run), SoupSpec(last=3, by="loss", penalty=0.7))
    home = {"first": 16, "last": 24}.get(str(base), base)
    models = [
        {"model": i.snapshot.path, "parameters": {"weight": i.weight}}
        for i in soup.ingredients
        if i.snapshot.step != home
    ]
    stockpot.merge(
        {
            "merge_method": "ties",
            "base_model": str(lora_run / f"checkpoint-{home}"),
            "models": models,
            "parameters": {"density": 0.5},
        },
        tmp_path / "other",
    )
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("out", "other"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_linear_over_a_run_weighs_every_snapshot(lora_run: Path, tmp_path: Path) -> None:
    """A base_model among the snapshots is the donor of config, and a model like the others."""
    run = {"path": str(lora_run), "last": 3, "by": "loss", "penalty": 0.7}
    stockpot.merge(
        {"merge_method": "linear", "run": run, "base_model": str(lora_run / "checkpoint-16")}, tmp_path / "out"
    )
    exact = averaged(weights_of(lora_run, SoupSpec(last=3, by="loss", penalty=0.7)), "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "out/adapter_model.safetensors").items():
        assert torch.allclose(tensor.double(), exact[name], atol=1e-7)
    with pytest.raises(RecipeError, match="linear averages every snapshot alike"):
        stockpot.plan({"merge_method": "linear", "run": {**run, "base": "first"}})


def test_no_file_stays_open(lora_run: Path, tmp_path: Path) -> None:
    stockpot.soup(lora_run, tmp_path / "warm")
    before = len(os.listdir("/proc/self/fd"))
    for i, adapter in enumerate(("factors", "product", None)):
        stockpot.soup(lora_run, tmp_path / str(i), adapter=adapter)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("base", ["last", 4, "outside"])
def test_fused_recipes_from_anywhere(
    lora_run: Path, tiny_llama: Path, tmp_path: Path, base: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base may be any snapshot; paths are relative to the recipe."""
    text = {
        "last": f"run: {{path: {lora_run}, last: 2, base: last}}",
        4: f"run: {{path: {lora_run}, last: 2, base: 4}}",
        "outside": "models: [run/checkpoint-8, run/checkpoint-12]\nbase_model: run/checkpoint-12",
    }[base]  # type: ignore[index]
    (tmp_path / "run").symlink_to(lora_run)
    (tmp_path / "r.yml").write_text(
        f"merge_method: ties\n{text}\nadapter: {{mode: fused, base: {tiny_llama}}}\nparameters: {{density: 0.5}}\n"
    )
    monkeypatch.chdir("/")
    stockpot.merge(tmp_path / "r.yml", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"normalize": "banana"}, "normalize: expected"),
        ({"weight": float("nan")}, "weight: expected"),
        ({"density": 0.5}, "product has no parameter 'density'"),
    ],
)
def test_parameters_under_product(lora_run: Path, settings: dict[str, Any], said: str) -> None:
    models = [str(lora_run / "checkpoint-4"), str(lora_run / "checkpoint-8")]
    recipe = {"merge_method": "linear", "models": models, "adapter": "product", "parameters": settings}
    with pytest.raises(RecipeError, match=said):
        stockpot.plan(recipe)


def test_notes_of_a_dry_run(lora_run: Path) -> None:
    dry = cli("soup", lora_run, "--dry-run", "--json", "--last", "3", "--by", "loss", "--penalty", "1.1")
    assert "favours the snapshots that rank worse" in dry.stderr
    assert json.loads(dry.stdout)["name"] == "last_3_loss_pf-1_1"


def test_slerp_over_a_run(lora_run: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "slerp",
        "run": {"path": str(lora_run), "last": 2, "base": "first"},
        "parameters": {"t": 0.3},
    }
    stockpot.merge(recipe, tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_ties_over_fused_snapshots(lora_run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    recipe = {
        "merge_method": "ties",
        "run": {"path": str(lora_run), "last": 3},
        "adapter": {"mode": "fused", "base": str(tiny_llama)},
        "parameters": {"density": 0.6},
    }
    stockpot.merge(recipe, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    changed = [n for (n, a), b in zip(merged.state_dict().items(), base.state_dict().values()) if not torch.equal(a, b)]
    assert changed
    assert all("q_proj" in n or "v_proj" in n for n in changed)
    stockpot.verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: {path: %s, lst: 3}", "unknown key 'lst'.*did you mean 'last'"),
        ("run: {last: 3}", "run: needs 'path'"),
        ("run: {path: %s, last: 0}", "run: last: expected a whole number"),
        ("run: {path: %s, last: x}", "run: last: expected a whole number"),
        ("run: {path: %s, base: middle}", "run.base: expected first, last or a step"),
        ("run: {path: %s, name: last_3_unweighted, last: 3}", "name says it all"),
        ("run: {path: %s}\nmodels: [a, b]", "exactly one of 'models', 'slices' and 'run'"),
        ("run: {path: %s}\nadapter: products", "did you mean 'product'"),
        ("run: {path: %s}\nadapter: {mode: product, rank: x}", "adapter.rank: expected a whole number"),
        ("run: {path: %s, base: first}\nbase_model: x", "base and base_model are both given"),
        ("run: {path: %s, scheme: lawa}", "one soup for every window"),
    ],
)
def test_run_recipes_that_make_no_sense(lora_run: Path, text: str, said: str) -> None:
    body = "merge_method: linear\n" + (text % lora_run if "%s" in text else text) + "\n"
    with pytest.raises((RecipeError, StockpotError), match=said) as caught:
        build_plan(load_recipe(body))
    assert caught.value.exit_code == 2


def test_slerp_takes_no_snapshot_weights(lora_run: Path) -> None:
    body = f"merge_method: slerp\nrun: {{path: {lora_run}, last: 2, by: loss}}\nparameters: {{t: 0.5}}\n"
    with pytest.raises(StockpotError, match="weight"):
        build_plan(load_recipe(body))


def test_batch_normalisation_is_spoken_of(tmp_path: Path) -> None:
    for step in (1, 2):
        state = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).state_dict()
        torch.save({"state_dict": state, "global_step": step}, tmp_path / f"step={step}.ckpt")
    result = stockpot.soup(tmp_path, tmp_path / "out")
    assert any("update_bn" in note for note in result.notes)


def test_python_recipe_is_a_start(lora_run: Path, tmp_path: Path) -> None:
    """The recipe behind a soup can be changed and merged."""
    recipe = stockpot.soup_recipe(lora_run, SoupSpec(last=3, by="loss", penalty=0.7))
    assert recipe["run"] == {"path": str(lora_run), "last": 3, "by": "loss", "penalty": 0.7}
    stockpot.merge({**recipe, "dtype": "bfloat16"}, tmp_path / "out")
    assert load_file(tmp_path / "out/adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    with pytest.raises(ArgumentError, match="out: expected"):
        stockpot.soup(lora_run, "")


def test_resumed_soup_counts_weights_in(lora_run: Path, tmp_path: Path) -> None:
    """A journal of other weights is not gone on with."""
    one = stockpot.plan(stockpot.soup_recipe(lora_run, SoupSpec(last=3, by="loss", penalty=0.7)))
    state = lora_run / "trainer_state.json"
    text = state.read_text()
    try:
        doc = json.loads(text)
        for row in doc["log_history"]:
            if "loss" in row and row["step"] == 24:
                row["loss"] *= 2
        state.write_text(json.dumps(doc))
        two = stockpot.plan(stockpot.soup_recipe(lora_run, SoupSpec(last=3, by="loss", penalty=0.7)))
    finally:
        state.write_text(text)
    assert one.recipe.digest == two.recipe.digest
    assert one.identity != two.identity


# TRL


def test_trl_run(tiny_llama: Path, tmp_path: Path) -> None:
    """A run of TRL's SFTTrainer with PEFT: opened, souped, loaded."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from helpers import tiny_tokenizer

    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in tokens(32)])
    trainer = SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(tiny_llama),
        args=SFTConfig(
            str(tmp_path / "run"), max_steps=8, save_steps=2, logging_steps=1, per_device_train_batch_size=4,
            report_to=[], use_cpu=True, bf16=False, max_length=16, learning_rate=1e-2, disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    run = open_run(tmp_path / "run")
    assert [s.step for s in run.snapshots] == [2, 4, 6, 8]
    assert "mean_token_accuracy" in run.metrics.names()
    result = stockpot.soup(run, tmp_path / "out", SoupSpec(last=3, by="mean_token_accuracy", penalty=0.9))
    assert result.soup is not None
    merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / "out")
    assert torch.isfinite(logits(merged)).all()
    assert (tmp_path / "out/tokenizer.json").exists()


def test_a_run_is_opened_once(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller has opened is not looked through again for the plan; another run than the recipe's is."""
    from stockpot.planning import snapshots

    opened = stockpot.open_run(lora_run)
    recipe = stockpot.soup_recipe(opened, stockpot.SoupSpec(last=2))
    shutil.copytree(lora_run, tmp_path / "other")
    wanted = [m.checkpoint.path for m in stockpot.plan(recipe).inputs]
    elsewhere = stockpot.plan(recipe, run=stockpot.open_run(tmp_path / "other"))
    assert [m.checkpoint.path for m in elsewhere.inputs] == wanted
    monkeypatch.setattr(snapshots, "open_run", None)
    stockpot.soup(opened, tmp_path / "out", stockpot.SoupSpec(last=2))
    assert [m.checkpoint.path for m in stockpot.plan(recipe, run=opened).inputs] == wanted


def test_errors_of_mappings_name_no_lines(tmp_path: Path) -> None:
    """A recipe written in Python has keys, not lines of a text that nobody wrote."""
    with pytest.raises(RecipeError) as caught:
        stockpot.plan({"merge_method": "linear", "models": ["a"], "parameters": {"weigth": 1}, "dtype": "bf17"})
    assert "<recipe>" not in str(caught.value)
    assert str(caught.value).startswith("dtype: ")
    with pytest.raises(RecipeError, match="must hold text, numbers, lists and mappings only"):
        stockpot.plan({"merge_method": "linear", "models": [object()]})
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RecipeError, match="nested too deeply"):
        stockpot.plan({"merge_method": "linear", "models": deep})


@pytest.mark.parametrize("text", ["1e-3", "1E5", "1.0e-3", "12", "0.5", "x", "1e"])
def test_text_in_a_mapping_is_what_its_record_says(text: str) -> None:
    """What a merge records of a recipe in Python reads as the recipe did."""
    given = load_recipe({"merge_method": "linear", "models": ["a"], "parameters": {"weight": text}})
    again = load_recipe(given.text)
    assert given.parameters["weight"].value == again.parameters["weight"].value
