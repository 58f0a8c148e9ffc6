"""Whole-process time and memory of stockpot against the copy floor and, if given, mergekit.

    python benchmarks/run.py benchmarks/data/large --repeat 3
    python benchmarks/run.py benchmarks/data/small --repeat 3 --mergekit PATH/TO/bin/mergekit-yaml

Every command of a row runs once in turn (floor, stockpot, flushed floor, mergekit, floor, ...) after one warming read, so
that all see the same machine; medians are printed, as a Markdown table. Memory is the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
METHODS = ("linear", "task_arithmetic", "slerp", "passthrough", "ties", "ties_paper", "dare_ties")


#: of methods beside the plain ones: (whether a base is given, how many experts at most, parameters of each model, of the whole)
MORE: dict[str, tuple[bool, int, str, str]] = {
    "ties_paper": (True, 9, "density: 0.5", "dialect: paper"),
    "ties": (True, 9, "density: 0.5", ""),
    "dare_ties": (True, 9, "density: 0.5", ""),
    "dare_linear": (True, 9, "density: 0.5", ""),
    "breadcrumbs": (True, 9, "density: 0.5, gamma: 0.01", ""),
    "breadcrumbs_ties": (True, 9, "density: 0.5, gamma: 0.01", ""),
    "della": (True, 9, "density: 0.5, epsilon: 0.2", ""),
    "della_linear": (True, 9, "density: 0.5, epsilon: 0.2", ""),
    "sce": (True, 9, "", "select_topk: 0.5"),
    "pcb": (True, 9, "", ""),
    "consensus_ta": (True, 9, "", ""),
    "consensus_ties": (True, 9, "", ""),
    "emr": (True, 9, "", ""),
    "magmax": (True, 9, "", ""),
    "ram": (True, 9, "", ""),
    "ramplus_tl": (True, 9, "", ""),
    "model_stock": (True, 9, "", ""),
    "model_stock_rows": (True, 9, "", "filter_wise: true"),
    "multislerp": (True, 9, "weight: 0.3", ""),
    "karcher": (False, 9, "", ""),
    "nuslerp": (True, 2, "weight: 0.5", ""),
    "nuslerp_rows": (True, 2, "weight: 0.5", "nuslerp_flatten: false"),
    "nuslerp_columns": (True, 2, "weight: 0.5", "nuslerp_flatten: false, nuslerp_row_wise: true"),
    "slerp_rows": (True, 1, "", "t: 0.4, over: row"),
    "arcee_fusion": (True, 1, "", ""),
    "nearswap": (True, 1, "", "t: 0.001"),
    "wise_ft": (True, 1, "", ""),
    "warp": (True, 9, "", ""),
    "lm_cocktail": (False, 9, "loss: 1.0", ""),
}
_NAMES = {
    "ties_paper": "ties",
    "model_stock_rows": "model_stock",
    "nuslerp_rows": "nuslerp",
    "nuslerp_columns": "nuslerp",
}
_NAMES |= {"slerp_rows": "slerp"}


def recipe(method: str, data: Path, experts: int) -> tuple[str, list[str]]:
    """(YAML, names of the models that it reads)."""
    names = [f"expert{i}" for i in range(experts)]
    weights = [1 / experts] * experts
    if method == "passthrough":
        return f"merge_method: passthrough\nmodels:\n  - model: {data}/expert0\ndtype: bfloat16\n", names[:1]
    if method == "slerp":
        text = (
            f"merge_method: slerp\nbase_model: {data}/base\nmodels:\n  - model: {data}/base\n  - model: {data}/expert0\n"
            "parameters: {t: 0.4}\ndtype: bfloat16\n"
        )
        return text, ["base", "expert0"]
    based, most, own, whole = MORE.get(method, (method != "linear", 9, "", ""))
    names = names[:most]
    lines = [f"merge_method: {_NAMES.get(method, method)}", "dtype: bfloat16"]
    if based:
        lines.append(f"base_model: {data}/base")
    lines.append("models:")
    weighed = method in ("linear", "task_arithmetic") or "density" in own
    for name, weight in zip(names, weights):
        parts = ([f"weight: {weight}"] if weighed else []) + ([own] if own else [])
        lines.append(f"  - model: {data}/{name}")
        if parts:
            lines.append(f"    parameters: {{{', '.join(parts)}}}")
    if whole:
        lines.append(f"parameters: {{{whole}}}")
    return "\n".join(lines) + "\n", ["base", *names] if based else names


def measured(command: list[str], timeout: float) -> tuple[float, float, int]:
    """(seconds, MiB, exit code)."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - began > timeout:
                process.kill()
            time.sleep(0.005)
    finally:
        process.returncode = 0
    return time.monotonic() - began, usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(status)


def drop(paths: list[str]) -> None:
    """Out of the page cache, so that the next command reads the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=sorted({*METHODS, *MORE}))
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--mergekit", help="mergekit-yaml of an environment of its own")
    parser.add_argument("--threads", help="for stockpot")
    parser.add_argument("--device", help="for stockpot")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each command")
    parser.add_argument("--one", action="store_true", help="also with one thread, for the gain of the others")
    parser.add_argument("--timeout", type=float, default=600)
    args = parser.parse_args()
    data = args.data.resolve()
    empty = measured([sys.executable, "-c", "import stockpot.engine.run"], args.timeout)
    torch = measured([sys.executable, "-c", "import torch"], args.timeout)
    print(
        f"import stockpot's engine: {empty[0]:.2f} s, {empty[1]:.0f} MiB; import torch: {torch[0]:.2f} s, {torch[1]:.0f} MiB\n"
    )
    columns = [
        "method",
        "floor s",
        "floor, flushed s",
        "stockpot s",
        "ratio to floor",
        "to flushed floor",
        "MiB over import",
    ]
    if args.mergekit:
        columns += ["mergekit s", "mergekit MiB", "times faster"]
    if args.one:
        columns += ["one thread s", "gain without start-up"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    with tempfile.TemporaryDirectory(dir=data) as scratch:
        for method in args.methods:
            text, used = recipe(method, data, args.experts)
            path = Path(scratch, "recipe.yml")
            path.write_text(text)
            inputs = [str(f) for name in used for f in sorted((data / name).glob("*.safetensors"))]
            size = sum(os.path.getsize(f) for f in inputs) // len(used)
            out = Path(scratch, "out")
            stockpot = [sys.executable, "-m", "stockpot", "merge", str(path), str(out), "--quiet"]
            for option in ("threads", "device"):
                if getattr(args, option):
                    stockpot += [f"--{option}", getattr(args, option)]
            commands = {
                "floor": [sys.executable, str(HERE / "floor.py"), str(out), str(size), *inputs],
                "stockpot": stockpot,
            }
            commands["flushed"] = ["env", "FLUSH=1", *commands["floor"]]
            if args.mergekit and method != "ties_paper":
                commands["mergekit"] = [args.mergekit, str(path), str(out), "--lazy-unpickle"]
            if args.one:
                commands["one"] = [*stockpot, "--threads", "1"]
            results: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
            measured(commands["floor"], args.timeout)
            for _ in range(args.repeat):
                for name, command in commands.items():
                    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
                    if args.cold:
                        drop(inputs)
                    results[name].append(measured(command, args.timeout))
                    if results[name][-1][2]:
                        print(f"{name} {method}: exit code {results[name][-1][2]}", file=sys.stderr)
                    os.sync()
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
            seconds = {name: statistics.median(r[0] for r in rows) for name, rows in results.items()}
            memory = {name: max(r[1] for r in rows) for name, rows in results.items()}
            cells = [
                method, f"{seconds['floor']:.2f}", f"{seconds['flushed']:.2f}", f"{seconds['stockpot']:.2f}",
                f"{seconds['stockpot'] / seconds['floor']:.2f}", f"{seconds['stockpot'] / seconds['flushed']:.2f}",
                f"{memory['stockpot'] - empty[1]:.0f}",
            ]  # fmt: skip
            if args.mergekit:
                if "mergekit" in seconds:
                    cells += [f"{seconds['mergekit']:.1f}", f"{memory['mergekit']:.0f}"]
                    cells += [f"{seconds['mergekit'] / seconds['stockpot']:.1f}"]
                else:
                    cells += ["", "", ""]
            if args.one:
                cells += [
                    f"{seconds['one']:.2f}",
                    f"{(seconds['one'] - empty[0]) / (seconds['stockpot'] - empty[0]):.2f}",
                ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
