"""Write golden vectors: what mergekit itself makes of small recipes, to compare other implementations with.

A checkpoint of four interesting tensors (a vector, two matrices, a stack of matrices) and five fine-tunes of it are made from
fixed seeds: a, b and c as usual, with a quarter of the numbers left alone, d hardly trained, e far away. Every recipe of CASES
is merged by mergekit end to end, from files to files, and the outcome is recorded: the values, or the first line of mergekit's
error, or how many numbers of each tensor are not finite.

    python tools/golden_mergekit.py mergekit.json                  # run every case and write the file
    python tools/golden_mergekit.py mergekit.json --check          # whether the file is what would be written
    python tools/golden_mergekit.py --only ties nuslerp            # print the outcome of a few methods

It needs an environment of its own with mergekit, which is only called. The file has:

    versions   of mergekit, torch, numpy and transformers
    inputs     model -> tensor -> values, for the models named in recipes
    cases      id, recipe (as mergekit reads it, once models are directories) and one of values, error, nonfinite

Values are float32, written with as many digits, nine at most, as give exactly that number back. Methods that draw at random
are only asked for what does not depend on the draw.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

Array = np.ndarray[Any, np.dtype[np.float32]]
Recipe = dict[str, Any]

#: the tensors recorded; 200 is a size where 0.29 * size falls just below a whole number in float64
RECORDED = {
    "model.embed_tokens.weight": (25, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.block_sparse_moe.input_linear.weight": (2, 2, 8),
    "model.norm.weight": (8,),
}
#: the rest of what mergekit requires of this architecture
OTHERS = {
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.layers.0.block_sparse_moe.router.layer.weight": (2, 8),
    "model.layers.0.block_sparse_moe.output_linear.weight": (2, 8, 1),
    "model.layers.0.shared_mlp.input_linear.weight": (2, 8),
    "model.layers.0.shared_mlp.output_linear.weight": (8, 1),
}
#: an architecture that mergekit knows by name and that stacks its experts in one tensor
CONFIG = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "layer_types": ["attention"],
    "mamba_n_heads": 2,
    "intermediate_size": 1,
    "shared_intermediate_size": 1,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 25,
    "torch_dtype": "float32",
}
#: how far each fine-tune lies from the base, and the share of its numbers that it left as they were
FINE_TUNES = {"a": (0.05, 0.25), "b": (0.05, 0.25), "c": (0.05, 0.25), "d": (0.002, 0.0), "e": (0.5, 0.0)}


def of(parameter: str, **values: Any) -> dict[str, dict[str, Any]]:
    """Models with one parameter each: of("weight", a=1, b=2)."""
    return {model: {parameter: value} for model, value in values.items()}


def weighted(**values: Any) -> dict[str, dict[str, Any]]:
    return of("weight", **values)


def pruned(**values: tuple[Any, Any]) -> dict[str, dict[str, Any]]:
    """Models with a weight and a density each."""
    return {model: {"weight": weight, "density": density} for model, (weight, density) in values.items()}


def mix(models: str | dict[str, dict[str, Any]], base: str | None = None, **parameters: Any) -> Recipe:
    """A recipe less its method; a string names one model by each letter, "0" the base; lambda_ is lambda."""
    if isinstance(models, str):
        models = {"base" if letter == "0" else letter: {} for letter in models}
    recipe: Recipe = {"models": [{"model": m, **({"parameters": p} if p else {})} for m, p in models.items()]}
    if base:
        recipe["base_model"] = base
    if parameters:
        recipe["parameters"] = {name.removesuffix("_"): value for name, value in parameters.items()}
    return recipe


def on_base(models: str | dict[str, dict[str, Any]], **parameters: Any) -> Recipe:
    return mix(models, "base", **parameters)


def sliced(sources: dict[str, dict[str, Any]], base: str | None = None, **parameters: Any) -> Recipe:
    """A recipe of one slice, with the parameters of the slice's own level."""
    listed = [{"model": m, "layer_range": [0, 1], **({"parameters": p} if p else {})} for m, p in sources.items()]
    recipe: Recipe = {"slices": [{"sources": listed, **({"parameters": parameters} if parameters else {})}]}
    if base:
        recipe["base_model"] = base
    return recipe


BY_NAME = [{"filter": "self_attn", "value": 0.2}, {"filter": "norm", "value": 0.9}, {"value": 0.5}]
ONLY_ATTENTION = [{"filter": "self_attn", "value": 0.9}]
CARD = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 0.9]},
    {"filter": "block_sparse_moe", "value": [1, 0.5, 0.7, 0.3, 0.1]},
    {"value": 0.5},
]
HALVES = pruned(a=(1, 0.5), b=(1, 0.5))
UNLIKE = pruned(a=(0.7, 0.2), b=(0.4, 0.6), c=(0.3, 1))

CASES: dict[str, dict[str, Recipe]] = {
    "linear": {
        "equal": mix(weighted(a=1, b=1)),
        "three": mix(weighted(a=0.2, b=0.5, c=1.3)),
        "not normalized": mix(weighted(a=0.4, b=0.5, c=-0.2), normalize=False),
        "negative": mix(weighted(a=1.5, b=-0.5)),
        "sum is zero": mix(weighted(a=1, b=-1)),
        "one model": mix(weighted(a=2)),
        "by name": mix(weighted(a=BY_NAME, b=0.5)),
        "filter without match falls back": mix(weighted(a=ONLY_ATTENTION, b=0.5), weight=0.3),
        "filter without match, no fallback": mix(weighted(a=ONLY_ATTENTION, b=0.5)),
        "gradient": mix(weighted(a=[0.1, 0.9], b=0.4)),
        "weight as text": mix(weighted(a="5e-1", b=0.25)),
        "unknown parameter": mix(weighted(a=0.3, b=0.7), temperature=3),
        "weight missing": mix({"a": {"weight": 1}, "b": {}}),
        "base without weight": on_base(weighted(a=1, b=1)),
        "base takes weight for all": on_base(weighted(a=0.3, b=0.6), weight=0.1),
        "base is listed": on_base(weighted(base=0.5, a=0.3, b=0.2)),
    },
    "slerp": {
        "t 0.25": on_base("a", t=0.25),
        "t 0.5, base last": on_base("a0", t=0.5),
        "t 1": on_base("a", t=1),
        "t beyond 1": on_base("a", t=1.3),
        "t below 0": on_base("a", t=-0.2),
        "almost parallel": on_base("d", t=0.4),
        "far apart": on_base("e", t=0.4),
        "by name and layer": on_base("a", t=CARD),
        "base is a fine-tune": mix("ab", "a", t=0.6),
        "slice": sliced({"base": {}, "b": {}}, "base", t=0.35),
        "no base": mix("ab", t=0.5),
        "three models": on_base("ab", t=0.5),
        "no t": on_base("a"),
        "t of a model": on_base(of("t", a=0.5)),
    },
    "task_arithmetic": {
        "three": on_base(weighted(a=0.7, b=0.4, c=-0.3)),
        "lambda": on_base(weighted(a=0.7, b=0.4), lambda_=0.6),
        "lambda above 1": on_base(weighted(a=0.7, b=0.4), lambda_=1.7),
        "normalized": on_base(weighted(a=0.7, b=0.4), normalize=True),
        "normalized, sum is zero": on_base(weighted(a=1, b=-1), normalize=True),
        "density is ignored": on_base(pruned(a=(0.7, 0.3), b=(0.4, 0.1))),
        "base is listed": on_base(weighted(base=5, a=0.7, b=0.4), normalize=True),
        "by name": on_base(weighted(a=BY_NAME, b=ONLY_ATTENTION), weight=0.3),
        "base alone": on_base("0"),
        "no weight": on_base("ab"),
        "no base": mix(weighted(a=0.5, b=0.5)),
    },
    "ties": {
        "halves": on_base(HALVES),
        "unlike": on_base(UNLIKE),
        "unlike, not normalized": on_base(UNLIKE, normalize=False),
        "lambda": on_base(UNLIKE, lambda_=0.6),
        "rescale": on_base(UNLIKE, rescale=True),
        "int8_mask": on_base(HALVES, int8_mask=True),
        "density by default": on_base(weighted(a=0.3, b=0.7)),
        "density 0": on_base(pruned(a=(1, 0), b=(1, 0.5))),
        "density too small for one": on_base(pruned(a=(1, 0.001), b=(1, 0.001))),
        "density above 1": on_base(pruned(a=(1, 1.5), b=(1, 0.5))),
        "rounding of 0.29": on_base("ab", weight=1, density=0.29),
        "rounding of 0.53": on_base("ab", weight=1, density=0.53),
        "negative weight": on_base(pruned(a=(1, 0.5), b=(-0.6, 0.8))),
        "normalized, sum is zero": on_base(pruned(a=(1, 0.7), b=(-1, 0.7))),
        "one model": on_base(pruned(a=(0.5, 0.4))),
        "one model, not normalized": on_base(pruned(a=(0.5, 0.4)), normalize=False),
        "density by name": on_base({"a": {"density": BY_NAME}, "b": {"density": [0.1, 0.8]}}, weight=0.5),
        "model before recipe": on_base({"a": {"density": 0.2}, "b": {"weight": 0.3}, "c": {}}, weight=0.6, density=0.7),
        "base is listed": on_base(pruned(base=(9, 0.1), a=(0.6, 0.5), b=(0.4, 0.5))),
    },
    "dare_linear": {
        "density 1": on_base(pruned(a=(0.7, 1), b=(0.4, 1))),
    },
    "dare_ties": {
        "density 1": on_base(pruned(a=(0.7, 1), b=(0.4, 1), c=(0.3, 1))),
    },
    "breadcrumbs": {
        "halves": on_base(HALVES, gamma=0.1),
        "gamma by default": on_base(UNLIKE),
        "dense, no room for gamma": on_base(pruned(a=(1, 0.9), b=(0.5, 0.95)), gamma=0.2),
        "density 0": on_base(pruned(a=(1, 0), b=(0.5, 0.5)), gamma=0.1),
        "density too small for one": on_base(pruned(a=(1, 0.001)), gamma=0),
        "gamma 0": on_base(HALVES, gamma=0),
        "gamma of a model": on_base({"a": {"gamma": 0.3}, "b": {"gamma": 0.05}}, weight=0.5, density=0.6),
        "rounding of 0.57 and 0.29": on_base("ab", weight=1, density=0.57, gamma=0.29),
        "normalized, lambda": on_base(UNLIKE, gamma=0.1, normalize=True, lambda_=0.6),
        "rescale": on_base(UNLIKE, gamma=0.1, rescale=True),
    },
    "breadcrumbs_ties": {
        "halves": on_base(HALVES, gamma=0.1),
        "gamma by default": on_base(UNLIKE),
        "normalized": on_base(UNLIKE, gamma=0.1, normalize=True),
        "lambda": on_base(UNLIKE, gamma=0.05, lambda_=1.4),
        "density 1": on_base(pruned(a=(0.7, 1), b=(0.4, 1), c=(0.3, 1)), gamma=0.2),
        "rescale": on_base(HALVES, gamma=0.1, rescale=True),
    },
    "della": {
        "density 1": on_base(pruned(a=(0.7, 1), b=(0.4, 1), c=(0.3, 1))),
        "density 1, not normalized, lambda": on_base(pruned(a=(0.7, 1), b=(0.4, 1)), normalize=False, lambda_=1.2),
        "density 0 of one": on_base(pruned(a=(1, 0), b=(0.5, 1))),
        "epsilon too large": on_base(HALVES, epsilon=0.5),
    },
    "della_linear": {
        "density 1": on_base(pruned(a=(0.7, 1), b=(0.4, 1), c=(0.3, 1))),
        "density 1, normalized, lambda": on_base(pruned(a=(0.7, 1), b=(0.4, 1)), normalize=True, lambda_=1.2),
        "epsilon too large": on_base(pruned(a=(1, 0.9)), epsilon=0.1),
    },
    "sce": {
        "all": on_base("ab"),
        "three": on_base("abc"),
        "half": on_base("abc", select_topk=0.5),
        "too small for one": on_base("abc", select_topk=0.001),
        "rounding of 0.29": on_base("ad", select_topk=0.29),
        "rounding of 0.53": on_base("ad", select_topk=0.53),
        "weights are ignored": on_base(weighted(a=0.9, b=0.1), select_topk=0.7),
        "near the base": on_base("ad", select_topk=0.6),
        "no base": mix("ab"),
    },
    "model_stock": {
        "two": on_base("ab"),
        "three": on_base("abc"),
        "two, by row": on_base("ab", filter_wise=True),
        "three, by row": on_base("abc", filter_wise=True),
        "base is listed": on_base("0abd", filter_wise=False),
        "weights are ignored": on_base(weighted(a=0.9, c=0.1)),
        "one model": on_base("a"),
    },
    "nuslerp": {
        "equal": mix(weighted(a=0.5, b=0.5)),
        "unlike": mix(weighted(a=0.6, b=0.2)),
        "not flattened": mix(weighted(a=0.6, b=0.2), nuslerp_flatten=False),
        "row wise": mix(weighted(a=0.6, b=0.2), nuslerp_flatten=False, nuslerp_row_wise=True),
        "row wise, flattened": mix(weighted(a=0.6, b=0.2), nuslerp_row_wise=True),
        "sum is zero": mix(weighted(a=1, b=-1)),
        "negative": mix(weighted(a=1.5, b=-0.5)),
        "one has it all": mix(weighted(a=0, b=2), nuslerp_flatten=False),
        "base": on_base(weighted(a=0.6, b=0.2)),
        "base, not flattened": on_base(weighted(a=0.6, b=0.2), nuslerp_flatten=False),
        "base, row wise": on_base(weighted(b=0.3, c=0.7), nuslerp_flatten=False, nuslerp_row_wise=True),
        "base is listed": on_base(weighted(base=0.9, a=0.6, b=0.2)),
        "almost parallel": mix(weighted(base=0.3, d=0.7)),
        "far apart": mix(weighted(a=0.3, e=0.6), nuslerp_flatten=False),
        "one model": on_base(weighted(a=1)),
        "three models": mix(weighted(a=1, b=1, c=1)),
        "no weight": mix("ab"),
    },
    "multislerp": {
        "equal": mix(weighted(a=1, b=1, c=1)),
        "unlike": mix(weighted(a=0.5, b=0.3, c=0.9)),
        "not normalized": mix(weighted(a=0.5, b=0.3, c=0.9), normalize_weights=False),
        "two": mix(weighted(a=0.7, b=0.2)),
        "base": on_base(weighted(a=0.5, b=0.3, c=0.9)),
        "base, not normalized": on_base(weighted(a=0.5, b=0.3), normalize_weights=False),
        "base is listed": on_base(weighted(base=3, a=0.5, b=0.3)),
        "negative": mix(weighted(a=1.4, b=-0.3, c=0.2)),
        "large eps": on_base(weighted(a=0.5, b=0.3), eps=0.01),
        "far apart": mix(weighted(a=0.5, b=0.3, e=0.6)),
        "one model": on_base(weighted(a=0.5)),
        "nothing, three": on_base(weighted(a=0, b=0, c=0), normalize_weights=False),
        "sum is zero": mix(weighted(a=1, b=-1)),
    },
    "karcher": {
        "two": mix("ab"),
        "three, weights are ignored": mix(weighted(a=0.9, b=0.2, c=0.1)),
        "far apart": mix("0ae"),
        "far apart, no step": mix("0ae", max_iter=0),
        "far apart, one step": mix("0ae", max_iter=1),
        "far apart, large tolerance": mix("0ae", tol=0.2),
        "base is a model like the others": on_base("ab"),
        "almost parallel": mix("0d"),
        "one model": mix("a"),
    },
    "arcee_fusion": {
        "a": on_base("a"),
        "base last": on_base("b0"),
        "far apart": on_base("e"),
        "base is a fine-tune": mix("b", "a"),
        "three models": on_base("ab"),
        "base alone": on_base("0"),
    },
    "nearswap": {
        "t 0.01": on_base("a", t=0.01),
        "t 0.03": on_base("a", t=0.03),
        "near the base": on_base("0d", t=0.001),
        "by name": on_base("b", t=[{"filter": "self_attn", "value": 0.02}, {"value": 0.05}]),
        "no t": on_base("a"),
        "three models": on_base("ab", t=0.01),
    },
    "ram": {
        "two": on_base("ab"),
        "three": on_base("abc"),
        "large epsilon": on_base("abc", epsilon=0.03),
    },
    "ramplus_tl": {
        "two": on_base("ab"),
        "three": on_base("abc"),
        "r and alpha": on_base("abc", r=0.5, alpha=1.5),
        "alpha limits": on_base("ab", r=0.4, alpha=0.3),
        "large epsilon": on_base("abc", epsilon=0.03, r=0.3, alpha=0.8),
    },
    "passthrough": {
        "scale": mix(of("scale", a=0.5)),
        "scale for all": mix("a", scale=-1.25),
        "scale 0": mix("a", scale=0),
        "scale by name": mix(of("scale", b=[{"filter": "self_attn", "value": 0.0}, {"filter": "norm", "value": 1.5}])),
        "scale in a slice": sliced(of("scale", c=[0.5, 2.0])),
        "base": on_base("0", scale=0.5),
        "two models": mix("ab"),
        "base beside a model": on_base("a"),
    },
}


def models() -> dict[str, dict[str, Array]]:
    """The tensors of the base and of its fine-tunes."""
    base: dict[str, Array] = {}
    made = {"base": base}
    draw = np.random.default_rng(20260)
    for name, shape in {**RECORDED, **OTHERS}.items():
        base[name] = draw.normal(0, 0.3, shape).astype(np.float32)
    for seed, (model, (spread, kept)) in enumerate(FINE_TUNES.items(), 1):
        draw = np.random.default_rng(seed)
        made[model] = {}
        for name, tensor in base.items():
            moved = (draw.random(tensor.shape) >= kept) * draw.normal(0, spread, tensor.shape)
            made[model][name] = tensor + moved.astype(np.float32)
    return made


def recorded(tensor: Array) -> Any:
    """Nested lists of the shortest numbers that are these in float32."""
    if tensor.ndim:
        return [recorded(part) for part in tensor]
    return float(str(tensor))


def merged(recipe: Recipe) -> dict[str, Any]:
    """What mergekit makes of the recipe, where its models are directories of the current one."""
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    with tempfile.TemporaryDirectory() as out:
        try:
            run_merge(MergeConfiguration.model_validate(recipe), out, options)
        except Exception as error:  # whatever it is, it is mergekit's answer
            first = str(error).partition("\n")[0]
            return {"error": f"{type(error).__name__}: {first}"}
        tensors: dict[str, Array] = {}
        for path in Path(out).glob("*.safetensors"):
            tensors |= load_file(path)
    odd = {name: int(np.count_nonzero(~np.isfinite(tensors[name]))) for name in RECORDED}
    if any(odd.values()):
        return {"nonfinite": odd}
    return {"values": {name: recorded(tensors[name]) for name in RECORDED}}


@contextlib.contextmanager
def checkpoints(made: dict[str, dict[str, Array]]) -> Iterator[None]:
    """Write every model to a directory of its name and work beside them."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for model, tensors in made.items():
            directory = Path(folder, model)
            directory.mkdir()
            directory.joinpath("config.json").write_text(json.dumps(CONFIG))
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def outcomes(methods: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Run the cases of these methods."""
    with checkpoints(models()):
        for method in methods:
            for name, rest in CASES[method].items():
                recipe = {"merge_method": method, **rest, "dtype": "float32"}
                yield {"id": f"{method}: {name}", "recipe": recipe, **merged(recipe)}


def as_text(value: Any, depth: int) -> str:
    """JSON with one line for everything that lies deeper than this."""
    if not depth or not value or not isinstance(value, (dict, list)):
        return json.dumps(value, separators=(",", ":"))
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}:{as_text(item, depth - 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + "\n}"
    return "[\n" + ",\n".join(as_text(item, depth - 1) for item in value) + "\n]"


def golden() -> str:
    """The text of the whole file."""
    content = {
        "versions": {name: version(name) for name in ("mergekit", "torch", "numpy", "transformers")},
        "inputs": {model: {name: recorded(tensors[name]) for name in RECORDED} for model, tensors in models().items()},
        "cases": list(outcomes(CASES)),
    }
    return as_text(content, 2) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write golden vectors made by mergekit.")
    parser.add_argument("file", nargs="?", type=Path, help="the file to write or to check")
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="METHOD", help="print the outcome of these methods")
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    if asked.only:
        for outcome in outcomes(asked.only):
            print(json.dumps(outcome))
        return 0
    if asked.file is None:
        parser.error("name the file, or methods after --only")
    file = asked.file.resolve()
    text = golden()
    if asked.check:
        same = file.read_text() == text
        print(f"{file.name} is {'up to date' if same else 'not what mergekit makes now'}")
        return 0 if same else 1
    file.write_text(text)
    print(f"{sum(map(len, CASES.values()))} cases, {len(text) // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
