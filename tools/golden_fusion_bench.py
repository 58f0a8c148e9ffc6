"""Write golden vectors: what FusionBench's functions make of the tensors recorded in tests/golden/mergekit.json.

    git clone https://github.com/tanganke/fusion_bench
    python tools/golden_fusion_bench.py fusion_bench tests/golden/fusion_bench.json            # run every case, write the file
    python tools/golden_fusion_bench.py fusion_bench tests/golden/fusion_bench.json --check   # is it the same?

The functions are taken by name out of its files, so that none of its many dependencies are needed but torch. The file has:

    version    of FusionBench
    inputs     "fisher0", ...: companions -> tensor -> values, beside those of mergekit.json
    cases      id, recipe (models by name) and values: tensor -> float32 values

What draws at random (DARE), trains or looks at data is left out.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

MERGEKIT = Path(__file__).parents[1] / "tests" / "golden" / "mergekit.json"
MODELS = ("a", "b", "c")
Tensors = dict[str, torch.Tensor]


class Peer:
    """Functions of FusionBench by the file that they are in."""

    def __init__(self, root: Path) -> None:
        self.root = root / "fusion_bench" / "method"

    def take(self, file: str, **given: Any) -> dict[str, Any]:
        """The namespace of a file's functions. given: what they use besides."""
        tree = ast.parse((self.root / file).read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        for node in tree.body:
            assert isinstance(node, ast.FunctionDef)
            node.decorator_list = []
            node.returns = None
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
        space: dict[str, Any] = {"torch": torch, "np": np, "math": math, "EPS": 1e-8, "print": lambda *_: None, **given}
        exec(compile(ast.unparse(tree), file, "exec", dont_inherit=True), space)
        return space


def read(values: dict[str, Any]) -> Tensors:
    """In float32, in the order in which FusionBench flattens them."""
    return {name: torch.tensor(np.array(values[name], np.float32)) for name in sorted(values)}


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def shaped(vector: torch.Tensor, like: Tensors) -> Tensors:
    parts = torch.split(vector, [t.numel() for t in like.values()])
    return {name: part.reshape(t.shape) for part, (name, t) in zip(parts, like.items(), strict=True)}


def cases(peer: Peer, base: Tensors, models: list[Tensors], fishers: list[Tensors]) -> list[dict[str, Any]]:
    """Each as id, recipe and values."""
    import copy
    from collections import OrderedDict, defaultdict

    used = {
        "copy": copy,
        "OrderedDict": OrderedDict,
        "defaultdict": defaultdict,
        "Tensor": torch.Tensor,
        "nn": torch.nn,
    }
    ties = peer.take("ties_merging/ties_merging_utils.py", **used)
    added: Callable[[list[Tensors]], Tensors] = lambda all_of: {k: sum(t[k] for t in all_of) for k in all_of[0]}  # noqa: E731
    emr = peer.take("emr_merging/utils.py", state_dict_sum=added)
    tall = peer.take("tall_mask/utils.py")
    arcs = peer.take("slerp/slerp_utils.py", log=None)
    fisher = peer.take("fisher_merging/fisher_merging.py", re=re, **used)
    stock = peer.take("model_stock/model_stock.py", log=None, **used)
    magmax = peer.take("magmax/magmax.py")

    vectors = torch.stack([flat(m) - flat(base) for m in models])
    deltas = [{k: m[k] - base[k] for k in base} for m in models]
    out: list[dict[str, Any]] = []

    def case(name: str, recipe: dict[str, Any], found: Tensors) -> None:
        out.append({"id": name, "recipe": recipe, "values": {k: v.float().tolist() for k, v in found.items()}})

    def recipe(method: str, names: tuple[str, ...] = MODELS, based: bool = True, **parameters: Any) -> dict[str, Any]:
        made: dict[str, Any] = {"merge_method": method, "models": [{"model": n} for n in names]}
        if based:
            made["base_model"] = "base"
        if parameters:
            made["parameters"] = parameters
        return made

    def one_more(density: float) -> float:
        """FusionBench, like the authors of TIES, keeps one element more than the fraction says: the fraction that does."""
        n = vectors.shape[1]
        return (int(density * n) + 1.5) / n

    def on_base(vector: torch.Tensor, scale: float = 1.0) -> Tensors:
        return shaped(flat(base) + scale * vector, base)

    for density in (0.2, 0.5, 0.77):
        for function, normalize in (("mean", True), ("sum", False)):
            merged = ties["ties_merging"](vectors, density, function)
            wanted = recipe("ties", dialect="paper", density=one_more(density), normalize=normalize, **{"lambda": 0.3})
            case(f"ties: {function}, {density}", wanted, on_base(merged, 0.3))
    unified, _, _ = emr["emr_merge"](deltas)
    case("emr", recipe("emr"), {k: base[k] + unified[k] for k in base})
    for function, scale in (("sum", 1.0), ("ties", 0.8)):
        tv = vectors.sum(0) if function == "sum" else ties["ties_merging"](vectors, 0.2, "sum")
        for threshold in (0.2, 0.4):
            originals = torch.stack([flat(m) for m in models])
            masks = tall["generate_task_masks"](vectors, originals, flat(base), tv=tv, tall_mask_lambda=threshold)
            agreed = tv * (masks.sum(0) >= 2)
            method = "consensus_ta" if function == "sum" else "consensus_ties"
            own = {"threshold": threshold, "k": 2, "lambda": scale}
            if function == "ties":
                own["density"] = one_more(0.2)
            case(f"{method}: {threshold}", recipe(method, **own), on_base(agreed, scale))
    for t in (0.0, 0.4, 1.0):
        found = {k: arcs["slerp"](t, base[k], models[0][k]) for k in base}
        case(f"slerp: {t}", recipe("slerp", ("base", "a"), t=t), found)
    for normalize in (True, False):
        listed = {k: [m[k] for m in models] for k in base}
        shares = torch.ones(len(models)) / len(models)
        found = fisher["merging_with_fisher_weights"](listed, fishers, shares, normalize, 1e-6)
        wanted = recipe("fisher", based=False, normalize=normalize)
        for i, model in enumerate(wanted["models"]):
            model["companions"] = {"fisher": f"fisher{i}"}
        case(f"fisher: {'normalised' if normalize else 'as it is'}", wanted, found)
    ratio = stock["compute_ratio"](stock["compute_angle"](models[0], models[1], base))
    case(
        "model_stock",
        recipe("model_stock", ("a", "b"), dialect="mergekit"),
        stock["merge_weights"](models[0], models[1], base, ratio),
    )
    chosen = magmax["_magmax_select"](deltas)
    case("magmax", recipe("magmax", **{"lambda": 0.5}), {k: base[k] + 0.5 * chosen[k] for k in base})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path, help="a checkout of FusionBench")
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    inputs = json.loads(MERGEKIT.read_text())["inputs"]
    base, models = read(inputs["base"]), [read(inputs[n]) for n in MODELS]
    rng = np.random.default_rng(20261128)
    fishers = [
        {k: torch.tensor((scale * rng.gamma(0.5, 1.0, v.shape) + 0.01).astype(np.float32)) for k, v in base.items()}
        for scale in (1.0, 30.0, 0.2)
    ]
    project = (args.peer / "pyproject.toml").read_text()
    found = re.search(r'^version = "(.*)"', project, re.MULTILINE)
    assert found is not None
    made = {
        "version": found[1],
        "inputs": {f"fisher{i}": {k: v.tolist() for k, v in f.items()} for i, f in enumerate(fishers)},
        "cases": cases(Peer(args.peer), base, models, fishers),
    }
    text = json.dumps(rounded(made), indent=0, separators=(",", ":"))
    text = re.sub(r"\n(?=[-\d\[\]])", "", text) + "\n"
    if args.check:
        same = args.file.read_text() == text
        raise SystemExit(0 if same else f"{args.file} is not what FusionBench {found[1]} gives")
    args.file.write_text(text)
    print(f"{len(made['cases'])} cases")


def rounded(x: Any) -> Any:
    """Numbers by the fewest digits that give exactly the float32 back."""
    if isinstance(x, float):
        return float(str(np.float32(x)))
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return {k: v if k == "recipe" else rounded(v) for k, v in x.items()} if isinstance(x, dict) else x


if __name__ == "__main__":
    main()
