"""Averaging ten rank-16 adapters of a 1B-shaped Llama: stockpot, PEFT's add_weighted_adapter, and the floor.

    python benchmarks/adapters.py benchmarks/data/adapters --repeat 3

Makes the run (ten snapshots as the Trainer leaves them, 45 MB each) and the base (random bf16 weights, 2.5 GB) when they
are not there. Whole processes, page cache warm, each in turn so that all see the same machine; medians. PEFT needs a live
base model, which it loads from disk as its users do. `--fused` writes the soup into the base as well.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from run import HERE, measured

SHAPES = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048),
          "gate_proj": (8192, 2048), "up_proj": (8192, 2048), "down_proj": (2048, 8192)}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
run, out, *steps = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained(run + "/../base", dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, f"{run}/checkpoint-{steps[0]}", adapter_name=steps[0])
for step in steps[1:]:
    model.load_adapter(f"{run}/checkpoint-{step}", adapter_name=step)
model.add_weighted_adapter(steps, [1 / len(steps)] * len(steps), "soup", combination_type="linear")
model.save_pretrained(out, selected_adapters=["soup"])
"""


def module(name: str) -> str:
    return ("self_attn." if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp.") + name


def make(data: Path, count: int, rank: int) -> None:
    import torch
    from safetensors.torch import save_file

    for i in range(count):
        folder = data / f"run/checkpoint-{(i + 1) * 100}"
        if (folder / "adapter_config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(i)
        tensors = {}
        for layer in range(16):
            for name, (rows, columns) in SHAPES.items():
                prefix = f"base_model.model.model.layers.{layer}.{module(name)}."
                tensors[prefix + "lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.02
                tensors[prefix + "lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
            "target_modules": list(SHAPES), "inference_mode": True, "base_model_name_or_path": str(data / "base"),
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))
    base = data / "base"
    if not (base / "model.safetensors").exists():
        base.mkdir(parents=True, exist_ok=True)
        tensors = {
            n: torch.randn(32000, 2048, dtype=torch.bfloat16) for n in ("model.embed_tokens.weight", "lm_head.weight")
        }
        for layer in range(16):
            prefix = f"model.layers.{layer}."
            for name, shape in SHAPES.items():
                tensors[f"{prefix}{module(name)}.weight"] = torch.randn(shape, dtype=torch.bfloat16)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{name}.weight"] = torch.ones(2048, dtype=torch.bfloat16)
        tensors["model.norm.weight"] = torch.ones(2048, dtype=torch.bfloat16)
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        (base / "config.json").write_text(json.dumps(CONFIG))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--snapshots", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--timeout", type=float, default=600)
    args = parser.parse_args()
    data = args.data.resolve()
    # in a process of its own: what this one holds would count as memory of those that it starts
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(data, args.snapshots, args.rank))
    maker.start()
    maker.join()
    run = data / "run"
    steps = [str((i + 1) * 100) for i in range(args.snapshots)]
    files = [str(run / f"checkpoint-{s}/adapter_model.safetensors") for s in steps]
    soup = [sys.executable, "-m", "stockpot", "soup", str(run)]
    with tempfile.TemporaryDirectory(dir=data) as scratch:
        out = Path(scratch, "out")
        commands = {
            "import torch, safetensors": [sys.executable, "-c", "import torch, safetensors"],
            "copy floor": [sys.executable, str(HERE / "floor.py"), str(out), str(os.path.getsize(files[0])), *files],
            "soup, factors": [*soup, str(out), "--quiet"],
            "soup, product": [*soup, str(out), "--adapter", "product", "--quiet"],
            "soup, product of the same rank": [
                *soup,
                str(out),
                "--adapter",
                "product",
                "--rank",
                str(args.rank),
                "--quiet",
            ],
        }
        if args.fused:
            commands["soup, fused"] = [*soup, str(out), "--adapter", "fused", "--quiet"]
        if not args.no_peft:
            commands["PEFT add_weighted_adapter"] = [sys.executable, "-c", PEFT, str(run), str(out), *steps]
        results: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
        measured(commands["copy floor"], args.timeout)
        for _ in range(args.repeat):
            for name, command in commands.items():
                shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
                results[name].append(measured(command, args.timeout))
                if results[name][-1][2]:
                    print(f"{name}: exit code {results[name][-1][2]}", file=sys.stderr)
                os.sync()
    seconds = {name: statistics.median(r[0] for r in rows) for name, rows in results.items()}
    allowed = seconds["import torch, safetensors"] + seconds["copy floor"]
    print("| | s | MiB | over (import torch + floor) |\n|---|---|---|---|")
    for name, rows in results.items():
        memory = max(r[1] for r in rows)
        print(f"| {name} | {seconds[name]:.2f} | {memory:.0f} | {seconds[name] / allowed:.2f} |")
    if not args.no_peft:
        times = seconds["PEFT add_weighted_adapter"] / seconds["soup, factors"]
        print(f"\nfactors: {times:.1f} times faster than PEFT")


if __name__ == "__main__":
    main()
