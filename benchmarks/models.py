"""Creates the Llama-shaped inputs of the benchmarks: a base and n experts, random weights, real layout.

python benchmarks/models.py benchmarks/data/small --size small --experts 3
python benchmarks/models.py benchmarks/data/large --size large --experts 3
python benchmarks/models.py benchmarks/data/tiny --tiny-tensors 14403 --experts 3
"""

from __future__ import annotations

import argparse
import json
import os

import torch
from safetensors.torch import save_file

SIZES = {  # hidden, intermediate, layers, vocabulary
    "small": (768, 2048, 12, 32000),
    "medium": (1280, 3456, 16, 32000),
    "large": (2048, 5632, 16, 32000),
    "quarter": (1024, 2816, 16, 32000),
}


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    hidden, inner, layers, vocabulary = SIZES[size]
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            out[f"{p}self_attn.{name}_proj.weight"] = (hidden, hidden)
        out[p + "mlp.gate_proj.weight"] = out[p + "mlp.up_proj.weight"] = (inner, hidden)
        out[p + "mlp.down_proj.weight"] = (hidden, inner)
        out[p + "input_layernorm.weight"] = out[p + "post_attention_layernorm.weight"] = (hidden,)
    return out | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write(folder: str, tensors: dict[str, torch.Tensor], config: dict[str, object], shard: int) -> None:
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/config.json", "w") as f:
        json.dump(config, f, indent=2)
    groups: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled + tensor.nbytes > shard and groups[-1]:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    if len(groups) == 1:
        save_file(groups[0], f"{folder}/model.safetensors", {"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups):
        save_file(group, f"{folder}/{name}", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: n for n, g in zip(names, groups) for k in g}}
    with open(f"{folder}/model.safetensors.index.json", "w") as f:
        json.dump(index, f)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--tiny-tensors", type=int, default=0)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--shard", type=int, default=2 * 10**9)
    args = parser.parse_args()
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
    }
    if args.tiny_tensors:
        wanted = {f"model.layers.{i // 9}.block{i % 9}.weight": (8, 8) for i in range(args.tiny_tensors)}
        config |= {"hidden_size": 8, "num_hidden_layers": -(-args.tiny_tensors // 9)}
    else:
        hidden, inner, layers, vocabulary = SIZES[args.size]
        wanted = shapes(args.size)
        config |= {
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary,
            "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
        }  # fmt: skip
    torch.manual_seed(0)
    base = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in wanted.items()}
    write(f"{args.folder}/base", base, config, args.shard)
    for i in range(args.experts):
        torch.manual_seed(i + 1)
        expert = {name: (t.float() + torch.randn(t.shape) * 0.002).bfloat16() for name, t in base.items()}
        write(f"{args.folder}/expert{i}", expert, config, args.shard)


if __name__ == "__main__":
    main()
