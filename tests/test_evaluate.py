"""Scoring real models: the built-in evaluators against transformers and the harness, the user's own, and their faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import stockpot
from scoring import held_out
from stockpot.engine.candidates import CheckpointCache, make_candidate
from stockpot.errors import EvaluationError, SuiteError
from stockpot.evaluation.loaded import LoadedModel
from stockpot.evaluation.pool import Task, WorkerPool, score_all
from stockpot.evaluation.suite import load_suite, parse_suite
from stockpot.planning.planner import build_plan
from stockpot.recipes.parsing import load_recipe
from stockpot.runs import SoupSpec, open_run, recipe_of

from helpers import cli, tiny_tokenizer


@pytest.fixture(scope="module")
def room(tiny_llama: Path, lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, held-out text, a quiz, and sums: what suites here name."""
    folder = tmp_path_factory.mktemp("room")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    held_out(folder / "text.jsonl")
    quiz = []
    for i in range(40):
        start = (7 * i) % 60
        quiz.append({"prompt": f"w{start} w{start + 1} w{start + 2}", "choices": [f" w{start + 3}", f" w{(start + 30) % 64} w5"],
                     "answer": i % 2})  # fmt: skip
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, quiz)))
    sums = [{"prompt": f"w{i} w{i + 1}", "answer": [f"w{i + 2}", f"w{i + 3}"]} for i in range(3, 43)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    return folder


def suite_at(room: Path, body: str, name: str = "suite.yml") -> Path:
    (room / name).write_text(f"tokenizer: tokenizer\n{body}")
    return room / name


def put(loaded: LoadedModel, recipe: dict[str, Any]) -> Any:
    loaded.put(make_candidate(build_plan(load_recipe(recipe)), CheckpointCache(2**28)))
    return loaded.model


def as_it_is(path: Path | str) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(path)}]}


# swapping


def test_adapters_are_swapped_into_one_model(tiny_llama: Path, lora_run: Path, tmp_path: Path) -> None:
    """The same logits as PEFT gives for what `soup` publishes; the module is made once; the base is there without adapters."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    import stockpot

    run = open_run(lora_run)
    loaded = LoadedModel(parse_suite(f"base: {tiny_llama}\nslices: [{{name: a, kind: loss, data: x}}]", "suite.yml"))
    ids = torch.arange(12)[None] % 64
    modules = set()
    for number, spec in enumerate([SoupSpec(last=2), SoupSpec(last=5, by="loss", penalty=0.7)]):
        with torch.no_grad():
            module = put(loaded, recipe_of(run, spec))
            modules.add(id(module))
            own = module(input_ids=ids).logits.clone()
            stockpot.soup(run, tmp_path / f"soup{number}", spec)
            reference = PeftModel.from_pretrained(
                LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / f"soup{number}"
            )
            assert torch.equal(own, reference.eval()(input_ids=ids).logits)
    assert len(modules) == 1
    loaded.put(None)
    with torch.no_grad():
        bare = loaded.model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(bare, LlamaForCausalLM.from_pretrained(tiny_llama)(input_ids=ids).logits)
    # another rank: the adapter is made anew, on the same base
    with torch.no_grad():
        wide = put(loaded, recipe_of(run, SoupSpec(last=3), adapter="product"))(input_ids=ids).logits
    stockpot.soup(run, tmp_path / "wide", SoupSpec(last=3), adapter="product")
    reference = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / "wide")
    with torch.no_grad():
        assert torch.equal(wide, reference.eval()(input_ids=ids).logits)


def test_full_models_are_swapped(full_run: Path) -> None:
    from transformers import LlamaForCausalLM

    run = open_run(full_run)
    loaded = LoadedModel(parse_suite("slices: [{name: a, kind: loss, data: x}]", "suite.yml"))
    ids = torch.arange(10)[None]
    modules = set()
    for shot in run.snapshots:
        module = put(loaded, as_it_is(shot.path))
        modules.add(id(module))
        with torch.no_grad():
            assert torch.equal(
                module(input_ids=ids).logits, LlamaForCausalLM.from_pretrained(shot.path)(input_ids=ids).logits
            )
    assert len(modules) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_tied_bfloat16_models_are_swapped(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                         tie_word_embeddings=tied)  # fmt: skip
    loaded = LoadedModel(parse_suite("dtype: bfloat16\nslices: [{name: a, kind: loss, data: x}]", "suite.yml"))
    for seed in (1, 2):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / f"m{seed}")
        module = put(loaded, as_it_is(tmp_path / f"m{seed}"))
        other = LlamaForCausalLM.from_pretrained(tmp_path / f"m{seed}", dtype=torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(
                module(input_ids=torch.arange(9)[None]).logits, other(input_ids=torch.arange(9)[None]).logits
            )


@pytest.mark.parametrize("kind", ["pissa", "dora", "saved"])
def test_other_kinds_of_adapters_are_scored_as_peft_loads_them(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    """PiSSA changes the base as it loads; DoRA's magnitudes come from the base; modules may be saved whole."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaForCausalLM

    options = {
        "pissa": {"init_lora_weights": "pissa"},
        "dora": {"use_dora": True},
        "saved": {"modules_to_save": ["lm_head"]},
    }[kind]
    loaded = LoadedModel(parse_suite(f"base: {tiny_llama}\nslices: [{{name: a, kind: loss, data: x}}]", "suite.yml"))
    ids = torch.arange(12)[None]
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]
        model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(tmp_path / f"{kind}{seed}")
        reference = PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / f"{kind}{seed}"
        ).eval()
        with torch.no_grad():
            mine = put(loaded, as_it_is(tmp_path / f"{kind}{seed}"))(input_ids=ids).logits
            assert torch.allclose(mine, reference(input_ids=ids).logits, atol=1e-6)
            loaded.put(None)
            assert torch.equal(
                loaded.model(input_ids=ids).logits, LlamaForCausalLM.from_pretrained(tiny_llama)(input_ids=ids).logits
            )


def lora_of(base: Path, out: Path, seed: int, **options: Any) -> Path:
    """An adapter that does something, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(out)
    return out


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        logits: torch.Tensor = (
            PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
            .eval()(input_ids=torch.arange(12)[None])
            .logits
        )
    return logits


@pytest.mark.parametrize("first", [{"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}, {"r": 2}])
def test_one_adapter_leaves_nothing_to_the_next(tiny_llama: Path, tmp_path: Path, first: dict[str, Any]) -> None:
    """Not what it saved whole, not what it changed in the base; nor the base alone afterwards."""
    from transformers import LlamaForCausalLM

    a = lora_of(tiny_llama, tmp_path / "a", 1, **first)
    b = lora_of(tiny_llama, tmp_path / "b", 2, r=8)
    loaded = LoadedModel(parse_suite(f"base: {tiny_llama}\nslices: [{{name: a, kind: loss, data: x}}]", "suite.yml"))
    ids = torch.arange(12)[None]
    for path in (a, b, a):
        with torch.no_grad():
            assert torch.allclose(
                put(loaded, as_it_is(path))(input_ids=ids).logits, peft_logits(tiny_llama, path), atol=1e-6
            )
            loaded.put(None)
            bare = loaded.model(input_ids=ids).logits
            assert torch.equal(bare, LlamaForCausalLM.from_pretrained(tiny_llama)(input_ids=ids).logits)


def test_a_candidate_that_does_not_fit_spoils_none_after_it(tiny_llama: Path, lora_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    good, bad = lora_of(tiny_llama, tmp_path / "good", 1), lora_of(tiny_llama, tmp_path / "bad", 2, r=8)
    tensors = load_file(bad / "adapter_model.safetensors")
    save_file({k.replace("layers.1.", "layers.7."): v for k, v in tensors.items()}, bad / "adapter_model.safetensors")
    loaded = LoadedModel(parse_suite(f"base: {tiny_llama}\nslices: [{{name: a, kind: loss, data: x}}]", "suite.yml"))
    ids = torch.arange(12)[None]
    for order in ([bad, good], [good, bad, good]):
        for path in order:
            if path is bad:
                with pytest.raises(EvaluationError, match="has no place for"):
                    put(loaded, as_it_is(path))
            else:
                with torch.no_grad():
                    assert torch.equal(put(loaded, as_it_is(path))(input_ids=ids).logits, peft_logits(tiny_llama, path))


def test_tensors_that_are_missing_are_not_made_up(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llama, tmp_path / "part")
    tensors = load_file(tmp_path / "part/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "part/model.safetensors", {"format": "pt"})
    loaded = LoadedModel(parse_suite("slices: [{name: a, kind: loss, data: x}]", "suite.yml"))
    with pytest.raises(EvaluationError, match=r"lacks 1 tensors that the model needs: model\.norm\.weight"):
        put(loaded, as_it_is(tmp_path / "part"))


def test_evaluators_can_not_leave_training_on(tiny_llama: Path) -> None:
    loaded = LoadedModel(parse_suite("slices: [{name: a, kind: loss, data: x}]", "suite.yml"))
    put(loaded, as_it_is(tiny_llama)).train()
    assert not loaded.model.training


# the built-in evaluators


def test_loss_is_what_transformers_computes(room: Path, lora_run: Path, tiny_llama: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    path = suite_at(room, "batch_size: 7\nslices: [{name: text, kind: loss, data: text.jsonl, split: report}]")
    found = stockpot.evaluate(lora_run, path)
    scores = found.scores["text", "report"]
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), lora_run).eval()
    tokenizer = tiny_tokenizer()
    total, count, each = 0.0, 0, []
    for line in (room / "text.jsonl").read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=ids).loss)
        each.append(loss)
        total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)
    assert scores.examples["loss"].tolist() == pytest.approx(each, rel=1e-4)
    assert found.score is not None
    assert found.score.low is not None
    assert found.score.low < scores["loss"] < (found.score.high or 0)


def test_long_documents_are_cut_into_windows(room: Path, tiny_llama: Path) -> None:
    from transformers import LlamaForCausalLM

    words = " ".join(f"w{i % 64}" for i in range(100))
    (room / "long.jsonl").write_text(json.dumps({"text": words}))
    path = suite_at(room, "slices: [{name: text, kind: perplexity, data: long.jsonl, split: report, max_length: 30}]")
    found = stockpot.evaluate(tiny_llama, path).scores["text", "report"]
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    ids = torch.tensor(tiny_tokenizer()(words)["input_ids"])
    total, count = 0.0, 0
    for start in range(0, len(ids), 30):
        window = ids[None, start : start + 30]
        with torch.no_grad():
            total += float(model(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
        count += window.shape[1] - 1
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found.counts is not None
    assert found.counts.tolist() == [count]


def test_generation_is_greedy_and_stops(room: Path, lora_run: Path, tiny_llama: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    one = "{name: sums, kind: exact_match, data: sums.jsonl, split: report, max_new_tokens: 1, stop: ['zzz']}"
    body = f"batch_size: 5\nslices: [{one}]"
    found = stockpot.evaluate(lora_run, suite_at(room, body)).scores["sums", "report"]
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), lora_run).eval()
    tokenizer = tiny_tokenizer()
    right = []
    for line in (room / "sums.jsonl").read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([tokenizer(row["prompt"])["input_ids"]])).logits[0, -1].argmax())
        right.append(float(f"w{best}" in row["answer"]))
    assert found.examples["exact_match"].tolist() == right
    assert sum(right) > 0  # the run has learnt something
    assert found["truncated"] == 1.0  # nothing stops it after one token
    assert found["length"] == 1.0
    # with a stop: text after it is cut, and the row counts as ended
    more = (
        "slices: [{name: sums, kind: exact_match, data: sums.jsonl, split: report, max_new_tokens: 12, stop: [' w']}]"
    )
    stopped = stockpot.evaluate(lora_run, suite_at(room, more, "stops.yml")).scores["sums", "report"]
    assert stopped.examples["exact_match"].tolist() == right
    assert stopped["truncated"] == 0.0
    assert 2.0 <= stopped["length"] < 4.0  # tokens that are not shown are counted


# lm-evaluation-harness

TASK = """task: quiz_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def task_folder(room: Path) -> Path:
    folder = room / "tasks"
    folder.mkdir()
    (folder / "quiz.yaml").write_text(TASK.format(data=room / "quiz.jsonl"))
    return folder


def test_harness_gives_the_numbers_of_its_own_command_line(
    room: Path, task_folder: Path, full_run: Path, tmp_path: Path
) -> None:
    """And the built-in multiple choice gives the same accuracy, example by example."""
    body = """slices:
  - {name: harness, kind: harness, task: quiz_local, include_path: tasks, split: report}
  - {name: own, kind: choice, data: quiz.jsonl, split: report}
"""
    suite = load_suite(suite_at(room, body))
    run = open_run(full_run)
    first, last = run.snapshots[0].path, run.snapshots[-1].path
    with WorkerPool(suite) as pool:
        found = score_all(pool, [Task("first", as_it_is(first)), Task("last", as_it_is(last))], pool.infos)
    assert found["first"]["harness", "report"] != found["last"]["harness", "report"]
    out = tmp_path / "last"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
         f"pretrained={last},tokenizer={room / 'tokenizer'},dtype=float32", "--tasks", "quiz_local",
         "--include_path", str(task_folder), "--device", "cpu", "--batch_size", "16", "--output_path", str(out)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = out.rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["quiz_local"]
    ours = found["last"]["harness", "report"]
    assert ours["acc"] == pytest.approx(theirs["acc,none"], abs=1e-9)
    assert ours["acc_norm"] == pytest.approx(theirs["acc_norm,none"], abs=1e-9)
    assert ours.n == 40
    assert ours.examples["acc"].tolist() == found["last"]["own", "report"].examples["accuracy"].tolist()


def test_harness_tasks_are_divided_and_keep_the_random_state(room: Path, task_folder: Path, full_run: Path) -> None:
    import random

    from stockpot.evaluation.parts import open_parts

    body = "slices: [{name: h, kind: harness, task: quiz_local, include_path: tasks}]"
    suite = load_suite(suite_at(room, body))
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state()
    parts = open_parts(suite)
    ids = [set(p.evaluator.ids) for p in parts]
    assert sum(map(len, ids)) == 40
    assert not ids[0] & ids[1]
    loaded = LoadedModel(suite)
    put(loaded, as_it_is(open_run(full_run).snapshots[-1].path))
    scores = parts[0].evaluator.score(loaded)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert scores.n == len(ids[0])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("task: quiz_lokal, include_path: tasks", r"knows no task 'quiz_lokal'; did you mean 'quiz_local'"),
        ("task: quiz_local, include_path: nowhere", "no such directory"),
    ],
)
def test_unknown_tasks(room: Path, task_folder: Path, line: str, message: str, full_run: Path) -> None:
    with pytest.raises(SuiteError, match=message):
        stockpot.evaluate(full_run, suite_at(room, f"slices: [{{name: h, kind: harness, {line}, split: report}}]"))


# the user's own


def test_commands_and_functions(room: Path, lora_run: Path) -> None:
    (room / "weigh.py").write_text(
        "import json, sys, os\nfrom safetensors import safe_open\n"
        "f = safe_open(os.path.join(sys.argv[1], 'adapter_model.safetensors'), 'np')\n"
        "assert os.path.exists(os.path.join(sys.argv[1], 'adapter_config.json'))\n"
        "assert os.environ['STOCKPOT_SPLIT'] == sys.argv[2]\n"
        "print('some words')\nprint(json.dumps({'norm': float(sum((f.get_tensor(k) ** 2).sum() for k in f.keys()))}))\n"
    )
    (room / "mine.py").write_text(
        "class Probe:\n    def __init__(self, power, split):\n        self.power = power\n"
        "    def score(self, checkpoint):\n        assert not checkpoint.model.training\n"
        "        found = checkpoint.model.named_parameters()\n"
        "        total = sum(float((p.detach() ** self.power).sum()) for n, p in found if 'lora' in n)\n"
        "        return {'norm': total, 'words': len(checkpoint.tokenizer)}\n"
    )
    body = f"""slices:
  - {{name: shell, kind: command, command: '{sys.executable} weigh.py {{checkpoint}} {{split}}', metric: norm,
     direction: min, split: report}}
  - {{name: python, kind: python, function: 'mine:Probe', options: {{power: 2}}, metric: norm, direction: min}}
"""
    found = stockpot.evaluate(lora_run, suite_at(room, body)).scores
    assert found["python", "report"]["words"] == 64
    assert found["shell", "report"]["norm"] == pytest.approx(found["python", "report"]["norm"], rel=1e-5)


FAULTS = {
    "raises": ("def f(checkpoint):\n    raise ValueError('out of cheese')\n", "ValueError: out of cheese"),
    "nan": ("def f(checkpoint):\n    return {'acc': float('nan')}\n", "acc is nan, which is no score"),
    "other metric": ("def f(checkpoint):\n    return {'accuracy_of': 1}\n", "gave no metric 'acc'"),
    "nothing": ("def f(checkpoint):\n    return None\n", "expected a mapping from metrics to numbers, got NoneType"),
    "hangs": ("import time\ndef f(checkpoint):\n    time.sleep(600)\n", "did not end within 1 s and was stopped"),
    "dies": ("import os\ndef f(checkpoint):\n    print('last words', flush=True)\n    os.abort()\n",
             r"died \(signal 6\)(.|\n)*last words"),
    "no server": ("def f(checkpoint):\n    raise ConnectionRefusedError('the judge is down')\n", "the judge is down"),
    "exits": ("import sys\ndef f(checkpoint):\n    sys.exit(3)\n", "died .exit code 3|SystemExit"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_functions_are_told(tmp_path: Path, lora_run: Path, fault: str) -> None:
    code, message = FAULTS[fault]
    module = f"faulty_{fault.replace(' ', '_')}"
    (tmp_path / f"{module}.py").write_text(code)
    (tmp_path / "suite.yml").write_text(
        f"slices: [{{name: a, kind: python, function: '{module}:f', metric: acc, split: report, timeout: 1}}]"
    )
    began = time.monotonic()
    with pytest.raises(EvaluationError, match=message):
        stockpot.evaluate(lora_run, tmp_path / "suite.yml")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("exit 3", "ended with 3"),
        ("echo oops >&2; false", "oops"),
        ("echo no json", "printed no JSON object"),
        ("true", "it printed nothing"),
        ("sleep 600", "did not end within 1 s"),
        ('echo "[1]"', "printed no JSON object"),
        ("echo {checkpoint}; sleep 987", "did not end within 1 s"),
    ],
)
def test_faults_of_commands_are_told(tmp_path: Path, lora_run: Path, command: str, message: str) -> None:
    suite = (
        f"slices: [{{name: a, kind: command, command: {json.dumps(command)}, metric: acc, split: report, timeout: 1}}]"
    )
    (tmp_path / "suite.yml").write_text(suite)
    done = cli("evaluate", lora_run, "--suite", tmp_path / "suite.yml")
    assert done.returncode == 3
    assert message in done.stderr
    assert "a (report)" in done.stderr
    time.sleep(0.5)
    assert b"sleep\x00987" not in b"".join(_command_lines())


def _command_lines() -> list[bytes]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(entry.read_bytes())
        except OSError:
            continue
    return found


MEDDLERS = {
    "double": "checkpoint.model.double()",
    "merge": "checkpoint.model.merge_and_unload()",
    "merge in place": "checkpoint.model.merge_adapter()",
    "scale": "[p.data.mul_(0.5) for p in checkpoint.model.parameters()]",
    "train": "checkpoint.model.train()",
    "chdir": "__import__('os').chdir('/')",
}


def test_functions_that_meddle_with_the_model_spoil_no_other_score(
    room: Path, lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, rows = f"tokenizer: {room / 'tokenizer'}\nslices:\n", ""
    for how, code in MEDDLERS.items():
        name = f"meddler_{how.replace(' ', '_')}"
        (tmp_path / f"{name}.py").write_text(f"def f(checkpoint):\n    {code}\n    return {{'z': 1.0}}\n")
        rows += f"  - {{name: {name}, kind: python, function: '{name}:f', metric: z, direction: min, split: report}}\n"
    text = "  - {name: text, kind: loss, data: %s, split: report}\n" % (room / "text.jsonl")
    (tmp_path / "with.yml").write_text(head + rows + text)
    (tmp_path / "without.yml").write_text(head + text)
    run = open_run(lora_run)
    monkeypatch.chdir(lora_run.parent)
    tasks = [Task("a", recipe_of(run, SoupSpec(last=2))), Task("base", as_it_is(lora_run.name), bare=True),
             Task("b", recipe_of(run, SoupSpec(last=4))), Task("c", as_it_is(lora_run.name))]  # fmt: skip
    found = []
    for name in ("with.yml", "without.yml"):
        suite = load_suite(tmp_path / name)
        with WorkerPool(suite) as pool:
            scored = score_all(pool, tasks, pool.infos)
        found.append({n: s["text", "report"]["loss"] for n, s in scored.items()})
        if name == "with.yml":  # each of them ran, on every model
            meddled = {f"meddler_{how.replace(' ', '_')}" for how in MEDDLERS}
            assert all({slice_name for slice_name, _ in s} == meddled | {"text"} for s in scored.values())
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 4


def test_what_a_command_leaves_in_the_background(tmp_path: Path, lora_run: Path) -> None:
    """It neither holds up the result nor lives on."""
    command = "sleep 985 & echo '{\"acc\": 1}'"
    suite = (
        f"slices: [{{name: a, kind: command, command: {json.dumps(command)}, metric: acc, split: report, timeout: 60}}]"
    )
    (tmp_path / "suite.yml").write_text(suite)
    began = time.monotonic()
    assert stockpot.evaluate(lora_run, tmp_path / "suite.yml").scores["a", "report"] == {"acc": 1.0}
    assert time.monotonic() - began < 40
    assert b"sleep\x00985" not in b"".join(_command_lines())


def test_a_worker_whose_end_is_held_open(tmp_path: Path, lora_run: Path) -> None:
    """What it forked lives on with its connection: its death is noticed all the same, and the child ended."""
    (tmp_path / "forks.py").write_text(
        "import os, signal, time\ndef f(checkpoint):\n    if os.fork() == 0:\n        time.sleep(984)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "suite.yml").write_text(
        "slices: [{name: a, kind: python, function: 'forks:f', metric: acc, split: report, timeout: 300}]"
    )
    began = time.monotonic()
    with pytest.raises(EvaluationError, match=r"died \(signal 9, out of memory\?\)"):
        stockpot.evaluate(lora_run, tmp_path / "suite.yml")
    assert time.monotonic() - began < 60


def test_a_function_that_hangs_in_a_command_leaves_nothing_behind(tmp_path: Path, lora_run: Path) -> None:
    (tmp_path / "waiting.py").write_text(
        "import subprocess\ndef f(checkpoint):\n    subprocess.run(['sleep', '986'])\n"
    )
    suite = "slices: [{name: a, kind: python, function: 'waiting:f', metric: acc, split: report, timeout: 1}]"
    (tmp_path / "suite.yml").write_text(suite)
    with pytest.raises(EvaluationError, match="did not end within 1 s"):
        stockpot.evaluate(lora_run, tmp_path / "suite.yml")
    time.sleep(0.5)
    assert b"sleep\x00986" not in b"".join(_command_lines())


def test_the_current_directory_shadows_no_module(
    tmp_path: Path, room: Path, lora_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise RuntimeError('not this one')\n")
    monkeypatch.chdir(tmp_path)
    assert stockpot.evaluate(
        lora_run, suite_at(room, "slices: [{name: t, kind: loss, data: text.jsonl}]", "shadow.yml")
    ).score


def test_generation_settings_of_a_model_change_nothing(room: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Greedy is greedy; but what ends a text is the model's to say."""
    import shutil

    body = (
        "slices: [{name: sums, kind: exact_match, data: sums.jsonl, split: report, max_new_tokens: 20, stop: ['zzz']}]"
    )
    suite = suite_at(room, body, "settings.yml")
    plain = stockpot.evaluate(tiny_llama, suite).scores["sums", "report"]
    shutil.copytree(tiny_llama, tmp_path / "odd")
    settings = {"repetition_penalty": 5.0, "suppress_tokens": list(range(3, 40)), "do_sample": True, "temperature": 3.0}
    (tmp_path / "odd/generation_config.json").write_text(json.dumps(settings))
    odd = stockpot.evaluate(tmp_path / "odd", suite).scores["sums", "report"]
    assert odd == plain
    (tmp_path / "odd/generation_config.json").write_text(json.dumps({"eos_token_id": list(range(64))}))
    assert stockpot.evaluate(tmp_path / "odd", suite).scores["sums", "report"]["length"] == 0.0


def test_slices_of_the_same_data_are_scored_once(room: Path, lora_run: Path) -> None:
    body = """slices:
  - {name: right, kind: choice, data: quiz.jsonl, split: report}
  - {name: sure, kind: choice, data: quiz.jsonl, split: report, metric: loss}
"""
    found = stockpot.evaluate(lora_run, suite_at(room, body, "twice.yml")).scores
    assert found["right", "report"] == found["sure", "report"]
    assert found["right", "report"].seconds == found["sure", "report"].seconds


def test_evaluate_on_the_command_line(room: Path, lora_run: Path) -> None:
    body = """slices:
  - {name: text, kind: loss, data: text.jsonl, weight: 0.7}
  - {name: quiz, kind: choice, data: quiz.jsonl, metric: loss, weight: 0.3}
"""
    path = suite_at(room, body, "both.yml")
    done = cli("evaluate", lora_run, "--suite", path)
    assert done.returncode == 0, done.stderr
    assert "accuracy_norm" in done.stdout
    assert "lower is better" in done.stdout
    document = json.loads(cli("evaluate", lora_run, "--suite", path, "--json", "--split", "all").stdout)
    assert [(s["name"], s["split"]) for s in document["slices"]] == [
        ("text", "selection"), ("text", "report"), ("quiz", "selection"), ("quiz", "report")
    ]  # fmt: skip
    assert sum(s["examples"] for s in document["slices"]) == 100
    bad = cli("evaluate", lora_run.parent / "nothing", "--suite", path)
    assert bad.returncode == 3
    assert "no such file" in bad.stderr
    assert cli("evaluate", lora_run, "--suite", path, "--split", "tset").returncode == 2


def test_no_tokenizer_no_base_are_told(tmp_path: Path, lora_run: Path, tiny_llama: Path) -> None:
    held_out(tmp_path / "text.jsonl")
    (tmp_path / "suite.yml").write_text("slices: [{name: text, kind: loss, data: text.jsonl}]")
    with pytest.raises(EvaluationError, match="no tokenizer"):
        stockpot.evaluate(tiny_llama, tmp_path / "suite.yml")
    with pytest.raises(EvaluationError, match=r"nowhere.*no such file|can't be loaded"):
        stockpot.evaluate(lora_run, tmp_path / "suite.yml", base="nowhere")
