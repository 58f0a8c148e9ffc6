"""Several recipes in one file: the same bytes as one command after the other, streamed where the methods allow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import stockpot
from stockpot.errors import ProblemsError, RecipeError

from helpers import load

#: first step -> (its recipe, whether it is streamed)
FIRST = {
    "linear": ("merge_method: linear\nmodels: [{f}/a, {f}/b]\nparameters: {{weight: [0.2, 0.9]}}\n", True),
    "task_arithmetic": ("merge_method: task_arithmetic\nbase_model: {f}/base\nmodels: [{f}/a, {f}/b]\n", True),
    "dare_ties": (
        "merge_method: dare_ties\nbase_model: {f}/base\nmodels: [{f}/a, {f}/b]\nparameters: {{density: 0.6}}\n", True),
    "passthrough": (
        "merge_method: passthrough\nslices:\n- sources: [{{model: '{f}/a', layer_range: [0, 2]}}]\n"
        "- sources: [{{model: '{f}/b', layer_range: [2, 4]}}]\n", True),
    "ties": ("merge_method: ties\nbase_model: {f}/base\nmodels: [{f}/a, {f}/b]\nparameters: {{density: 0.4}}\n", False),
    "slerp": ("merge_method: slerp\nmodels: [{f}/a, {f}/b]\nparameters: {{t: 0.3}}\n", False),
}  # fmt: skip
SECOND = {
    "linear": "merge_method: linear\nmodels: [{first}, {f}/c]\n",
    "ties": "merge_method: ties\nbase_model: {f}/base\nmodels: [{first}, {f}/c]\nparameters: {{density: 0.5}}\n",
    "base": "merge_method: task_arithmetic\nbase_model: {first}\nmodels: [{f}/c]\nparameters: {{weight: 0.5}}\n",
}


def same(a: Path, b: Path) -> bool:
    one, two = load(a), load(b)
    return one.keys() == two.keys() and all(
        torch.equal(one[k].view(torch.uint8), two[k].view(torch.uint8)) for k in one
    )


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_two_steps_are_two_commands(first, second, family, tmp_path, recipe):
    text, streamed = FIRST[first]
    stockpot.merge(text.format(f=family), tmp_path / "first")
    stockpot.merge(SECOND[second].format(f=family, first=tmp_path / "first"), tmp_path / "second")
    path = recipe(f"name: mixed\n{text.format(f=family)}---\n{SECOND[second].format(f=family, first='mixed')}")
    planned = stockpot.plan(path)
    assert any(
        ("is streamed, not written" if streamed else "is written to a scratch directory first") in n
        for n in planned.notes
    )
    result = stockpot.merge(path, tmp_path / "out")
    assert same(tmp_path / "out", tmp_path / "second")
    assert result.lineage["steps"][0]["streamed"] is streamed
    lineage = stockpot.verify(tmp_path / "out")
    mixed = next(row for row in lineage["inputs"] if row["model"] == "mixed")
    assert {Path(p["path"]).name for p in mixed["parts"]} >= {"a", "b"}
    assert all(p["files"][0]["tensors_read"] for p in mixed["parts"])
    assert sorted(os.listdir(tmp_path)) == ["first", "out", "recipe.yml", "second"]  # no scratch is left


def test_steps_upon_steps_in_either_form(family, tmp_path):
    chain = [
        {"name": "one", "merge_method": "linear", "models": [f"{family}/a", f"{family}/b"]},
        {"name": "two", "merge_method": "slerp", "models": ["one", f"{family}/c"], "parameters": {"t": 0.4}},
        {"name": "three", "merge_method": "linear", "models": ["one", "two"]},
        {
            "merge_method": "task_arithmetic",
            "base_model": f"{family}/base",
            "models": ["three", "one"],
            "parameters": {"weight": 0.5},
        },
    ]
    made: dict[str, str] = {}
    for i, step in enumerate(chain):
        plain = {k: v for k, v in step.items() if k != "name"}
        plain["models"] = [made.get(m, m) for m in step["models"]]
        stockpot.merge(plain, tmp_path / f"s{i}")
        made[str(step.get("name"))] = str(tmp_path / f"s{i}")
    stockpot.merge({"steps": chain}, tmp_path / "listed")
    documents = "---\n".join(
        json.dumps(step) + "\n" for step in [chain[3], *chain[:3]]
    )  # the nameless one is the result
    result = stockpot.merge(documents, tmp_path / "documents")
    assert same(tmp_path / "listed", tmp_path / "s3")
    assert same(tmp_path / "documents", tmp_path / "s3")
    assert [(s["name"], s["streamed"]) for s in result.lineage["steps"]] == [
        ("one", True),
        ("two", False),
        ("three", True),
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_do_not_depend_on_threads_or_memory(threads, family, tmp_path):
    from stockpot.testing.models import CUT, state
    from stockpot.testing.models import write_model as write

    del family  # whose tensors are one piece each
    family = tmp_path / "cut"
    base = state(CUT, 0)
    for i, name in enumerate(("base", "a", "b", "c")):
        write(str(family / name), {n: v + (0.002 * i) * state(CUT, i)[n] for n, v in base.items()})
    text = f"name: x\n{FIRST['dare_ties'][0].format(f=family)}---\n{SECOND['ties'].format(f=family, first='x')}"
    stockpot.merge(text, tmp_path / "reference")
    stockpot.merge(text, tmp_path / "out", stockpot.Options(threads=threads, max_memory="120MiB"))
    assert same(tmp_path / "out", tmp_path / "reference")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\n{linear}---\n{linear}", "no later step uses 'x'"),
        ("name: x\n{linear}---\nname: x\n{linear}---\n{second}", "two steps called 'x'"),
        ("name: a/b\n{linear}---\n{second}", "expected a plain word"),
        ("{linear}---\n{linear}", "a step that others are to use needs a 'name'"),
        ("steps: []\n", "steps: expected a list"),
        (
            "steps: [{{merge_method: linear, models: [y, {f}/a], name: y}}]\n",
            "uses the step 'y', which comes later or is this one",
        ),
        ("name: x\nmerge_method: liner\nmodels: [{f}/a]\n---\n{second}", "did you mean 'linear'"),
        ("name: x\nmerge_method: linear\nmodels: [{f}/aa]\n---\n{second}", "did you mean"),
        ("merge_method: linear\nsteps: []\n", "belongs into one of the steps"),
    ],
)
def test_steps_that_make_no_sense(text, message, family, tmp_path):
    linear = f"merge_method: linear\nmodels: [{family}/a, {family}/b]\n"
    second = f"merge_method: linear\nmodels: [x, {family}/c]\n"
    with pytest.raises((RecipeError, ProblemsError, stockpot.StockpotError), match=message):
        stockpot.merge(text.format(linear=linear, second=second, f=family), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.steps").exists()


def test_killed_and_resumed(family32, tmp_path, recipe):
    """SIGKILL at several moments: the same command goes on, and nothing is left beside OUT."""
    text = f"name: x\n{FIRST['ties'][0].format(f=family32)}---\n{SECOND['ties'].format(f=family32, first='x')}"
    path = recipe(text)
    stockpot.merge(path, tmp_path / "reference")
    command = [sys.executable, "-m", "stockpot", "merge", str(path), str(tmp_path / "out"), "-q"]
    for delay in (0.4, 0.5, 0.6, 0.7):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "out").exists():
            break
    else:
        subprocess.run(command, check=True)
    assert same(tmp_path / "out", tmp_path / "reference")
    assert not (tmp_path / "out.steps").exists()
    stockpot.verify(tmp_path / "out")
