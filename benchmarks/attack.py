"""Attack stockpot, as long as you like: what tests/ does for seconds, by the thousand, and what needs the system's help.

    python benchmarks/attack.py differential 750   # random recipes: kernels, numpy, threads, budgets: one set of bytes
    python benchmarks/attack.py pickles 40000      # random torch files: read as torch reads them, or refused
    python benchmarks/attack.py mutations 5000     # configs, adapters, runs, lineages, suites with values of other types
    python benchmarks/attack.py kills              # kill -9 at file-system calls (strace): OUT is old, new or absent, then new
    python benchmarks/attack.py faults             # EIO, ENOSPC, short writes from the kernel (strace): an error, and then OUT

Each prints what it did and what it found, and exits with 1 where it found anything. Figures: benchmarks/README.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))

import stockpot
from stockpot.api.merging import Options
from stockpot.checkpoints.opening import open_checkpoint
from stockpot.checkpoints.source import ReadRequest
from stockpot.engine.native import load_kernels, numpy_only
from stockpot.errors import StockpotError
from stockpot.specs import BY_LABEL
from stockpot.testing.models import write_model

STOCKPOT = os.path.join(os.path.dirname(sys.executable), "stockpot")
SIZES = [1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 127, 129, 1023, 1025, 4097, 65535, 65537, 70001, 131077]
LARGE = [2**19 - 1, 2**19, 2**19 + 1, 2**20 + 17]
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "passthrough")


def pickles(count: int) -> int:
    import pickles as made

    found: Counter[str] = Counter()
    read = 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(count):
            try:
                read += made.one(seed, Path(folder))
            except BaseException:
                found[traceback.format_exc().splitlines()[-1][:100]] += 1
    print(f"{count} pickles, {read} read and equal to what torch reads, {sum(found.values())} findings: {dict(found)}")
    return len(found)


def mutations(count: int) -> int:
    import mutations as made

    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = made.World(Path(folder))
        for seed in range(count):
            target = made.TARGETS[seed % len(made.TARGETS)]
            try:
                world.run(target, random.Random(seed))
            except BaseException:
                found[f"{target} {seed}: {traceback.format_exc().splitlines()[-1][:100]}"] += 1
    print(f"{count} typed mutations, {sum(found.values())} findings: {dict(found)}")
    return len(found)


# bytes that must not depend on how they are computed


def _shapes(rnd: random.Random) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {}
    for i in range(rnd.randint(1, 6)):
        n = rnd.choice(SIZES if rnd.random() < 0.9 else LARGE)
        shape = rnd.choice([(n,), (n,), (n, 1), (1, n), (3, n) if n < 70000 else (n,)])
        out[f"layers.{i}.w"] = () if rnd.random() < 0.05 else shape
    return out


def _values(rnd: random.Random, rng: Any, shape: tuple[int, ...], base: Any) -> Any:
    values = rng.standard_normal(shape) * 10.0 ** rnd.choice([-3, -1, 0, 0, 2])
    if rnd.random() < 0.15:
        values = np.round(values)  # ties and zeros
    if rnd.random() < 0.1:
        values = values * 0
    if base is not None and rnd.random() < 0.7:
        values = np.where(rng.random(shape) < 0.3, base, base + values * 0.01)
    return values


def _recipe(rnd: random.Random, paths: list[str], base: str) -> dict[str, Any]:
    method = rnd.choice(METHODS)
    parameters: dict[str, Any] = {}
    doc: dict[str, Any] = {"merge_method": method}
    if method == "slerp":
        paths, parameters["t"] = paths[:2], rnd.choice([0, 0.3, 0.5, 1, 1 / 3])
    elif method == "passthrough":
        paths = paths[:1]
    elif rnd.random() < 0.5:
        parameters["normalize"] = rnd.random() < 0.5
    if method in ("task_arithmetic", "ties", "dare_linear", "dare_ties"):
        doc["base_model"] = base
        if rnd.random() < 0.4:
            parameters["lambda"] = rnd.choice([0.5, 1.0, 1.7, -1])
    if method in ("ties", "dare_linear", "dare_ties"):
        parameters["density"] = rnd.choice([0.0, 0.01, 0.2, 0.5, 0.9, 1.0])
    weighted = method not in ("slerp", "passthrough")
    doc["models"] = [
        {"model": p, **({"parameters": {"weight": rnd.choice([0.1, 0.5, 1, 1, -0.3, 2.5, 1 / 3])}} if weighted else {})}
        for p in paths
    ]
    if parameters:
        doc["parameters"] = parameters
    if rnd.random() < 0.4:
        doc["dtype"] = rnd.choice(["bfloat16", "float16", "float32", "float64"])
    return doc


def _digests(path: str) -> dict[str, str]:
    checkpoint = open_checkpoint(path)
    out = {}
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        raw = bytearray(spec.nbytes)
        checkpoint.read([ReadRequest(name, 0, spec.numel)], memoryview(raw))
        out[name] = hashlib.sha256(raw).hexdigest()
    checkpoint.close()
    return out


def differential(count: int) -> int:
    kernels = load_kernels()
    levels = [0, 1, 2] if kernels is not None else []
    merges, refused, different = 0, Counter(), []
    for seed in range(count):
        rnd, rng = random.Random(seed), np.random.default_rng(seed)
        with tempfile.TemporaryDirectory() as folder:
            many = rnd.choice([1, 2, 2, 3, 4, 5, 9])
            shapes = _shapes(rnd)
            bases = {n: rng.standard_normal(s) for n, s in shapes.items()}
            label = rnd.choice(["F64", "F32", "F16", "BF16", "BF16", "F8_E4M3"])
            paths = []
            for i in range(many + 1):
                kind = label if rnd.random() < 0.6 else rnd.choice(["F32", "F16", "BF16"])
                values = {n: bases[n] if i == many else _values(rnd, rng, s, bases[n]) for n, s in shapes.items()}
                paths.append(write_model(f"{folder}/m{i}", values, BY_LABEL[kind].label))
            recipe = _recipe(rnd, paths[:many], paths[many])
            first: Any = None
            for level, threads, memory in [
                ("numpy", 1, "4GiB"),
                *((k, 1, "4GiB") for k in levels),
                (2, 3, "96MiB"),
                ("numpy", 3, "96MiB"),
            ]:
                if level != "numpy" and kernels is None:
                    continue
                if kernels is not None and level != "numpy":
                    kernels.allow(level)
                out = f"{folder}/out-{level}-{threads}"
                options = Options(threads=threads, max_memory=memory, seed=seed % 10, allow_nonfinite=True,
                                  shard_size=rnd.choice(["5GB", "100kB"]))  # fmt: skip
                try:
                    if level == "numpy":
                        with numpy_only():
                            stockpot.merge(recipe, out, options)
                    else:
                        stockpot.merge(recipe, out, options)
                    got: Any = _digests(out)
                except StockpotError as e:
                    got = type(e).__name__
                    refused[str(e).replace(folder, "")[:50]] += 1
                    if "--max-memory" in str(e):
                        continue  # said, and nothing written: no difference
                merges += 1
                if first is None:
                    first = got
                elif got != first:
                    different.append((seed, level, threads, recipe["merge_method"]))
    if kernels is not None:
        kernels.allow(2)
    print(f"{count} recipes, {merges} merges, {len(different)} differences {different[:5]}; refused: {dict(refused)}")
    return len(different)


# what only the system can do


class Place:
    """Two models, an older output and a recipe, in a folder of its own."""

    def __init__(self, folder: str) -> None:
        self.d = folder
        rng = np.random.default_rng(0)
        for name in ("a", "b", "c"):
            write_model(f"{folder}/{name}", {f"layers.{i}.w": rng.standard_normal((128, 128)) for i in range(6)}, "F32")
        Path(folder, "c/tokenizer.json").write_text("{}")
        doc = {"merge_method": "ties", "base_model": f"{folder}/c", "models": [f"{folder}/a", f"{folder}/b"]}
        Path(folder, "r.yml").write_text(json.dumps({**doc, "parameters": {"density": 0.5}}))
        Path(folder, "old.yml").write_text(
            json.dumps({"merge_method": "linear", "models": [f"{folder}/a", f"{folder}/c"]})
        )
        self.merge("new")
        subprocess.run([*self.command("old"), "--overwrite"], check=True, capture_output=True)
        subprocess.run([STOCKPOT, "merge", f"{folder}/old.yml", f"{folder}/old", "--quiet", "--overwrite"], check=True)
        self.new, self.old = self.state("new"), self.state("old")

    def command(self, out: str) -> list[str]:
        return [
            STOCKPOT,
            "merge",
            f"{self.d}/r.yml",
            f"{self.d}/{out}",
            "--quiet",
            "--threads",
            "1",
            "--shard-size",
            "100kB",
        ]

    def merge(self, out: str, *more: str, inject: str = "") -> subprocess.CompletedProcess[str]:
        words = [*self.command(out), *more]
        if inject:
            call = inject.partition(":")[0]
            paths = (
                [w for p in ("", ".partial") for w in ("-P", f"{self.d}/{out}{p}")] if "signal" not in inject else []
            )
            paths += ["-P", self.d, "-P", f"{self.d}/a/model.safetensors"] if paths else []
            paths += [w for n in self.shards for w in ("-P", f"{self.d}/{out}.partial/{n}")] if paths else []
            words = [
                "strace",
                "-f",
                "-qq",
                "-o",
                "/dev/null",
                *paths,
                "-e",
                f"trace={call}",
                "-e",
                f"inject={inject}",
                *words,
            ]
        return subprocess.run(["timeout", "-k", "1", "40", *words], capture_output=True, text=True, check=False)

    @property
    def shards(self) -> list[str]:
        there = Path(self.d, "new")
        return ["stockpot.journal", *(p.name for p in there.iterdir())] if there.exists() else []

    def state(self, out: str) -> str:
        """What a reader finds: a digest of all tensors; "absent", or "half"."""
        folder = Path(self.d, out)
        if not folder.exists():
            return "absent"
        try:
            return hashlib.sha256(json.dumps(_digests(str(folder)), sort_keys=True).encode()).hexdigest()
        except StockpotError:
            return "half"

    def named(self, out: str) -> str:
        state = self.state(out)
        return {self.new: "new", self.old: "old"}.get(state, state)

    def clear(self, out: str) -> None:
        for path in Path(self.d).glob(f"{out}*"):
            if path.name == out or path.name.startswith(f"{out}."):
                shutil.rmtree(path, ignore_errors=True)

    def verified(self, out: str) -> bool:
        return subprocess.run([STOCKPOT, "verify", f"{self.d}/{out}"], capture_output=True, check=False).returncode == 0

    def counts(self) -> dict[str, int]:
        """How often a merge makes each call."""
        calls = "mkdir,rename,renameat2,unlink,rmdir,fsync,fdatasync,fallocate,ftruncate,pwrite64,flock,write"
        log = f"{self.d}/calls"
        shutil.copytree(f"{self.d}/old", f"{self.d}/count")
        subprocess.run(
            ["strace", "-f", "-qq", "-c", "-o", log, "-e", f"trace={calls}", *self.command("count"), "--overwrite"],
            check=True,
        )
        self.clear("count")
        rows = (line.split() for line in Path(log).read_text().splitlines() if line.strip())
        return {r[-1]: int(r[3]) for r in rows if r[-1] in calls.split(",")}


def kills() -> int:
    done, wrong = 0, []
    states: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder)
        for overwrite in (False, True):
            for call, count in place.counts().items():
                at = range(1, count + 1) if count <= 10 else sorted(random.Random(1).sample(range(1, count + 1), 8))
                for when in at:
                    place.clear("o")
                    more = []
                    if overwrite:
                        shutil.copytree(f"{folder}/old", f"{folder}/o")
                        more = ["--overwrite"]
                    if not place.merge("o", *more, inject=f"{call}:signal=SIGKILL:when={when}").returncode:
                        continue  # it makes fewer such calls, and was not killed
                    done += 1
                    state = place.named("o")
                    states[state] += 1
                    if state not in ("new", "old" if overwrite else "absent") or (
                        state != "absent" and not place.verified("o")
                    ):
                        wrong.append((overwrite, call, when, state))
                    again = place.merge("o", *more)
                    left = sorted(p.name for p in Path(folder).glob("o.*") if p.is_dir()) + sorted(
                        p.name for p in Path(folder, "o").glob("*journal")
                    )
                    if again.returncode or place.named("o") != "new" or not place.verified("o") or left:
                        wrong.append((overwrite, call, when, "afterwards", again.returncode, again.stderr[-200:], left))
    print(f"{done} kills: OUT was {dict(states)}; {len(wrong)} findings")
    for row in wrong:
        print("  ", row)
    return len(wrong)


FAULTS = {
    "pread64": ["error=EIO", "error=EINTR", "retval=0", "error=ESTALE"],
    "pwrite64": ["error=ENOSPC", "error=EIO", "error=EINTR", "retval=0", "error=EDQUOT"],
    "write": ["error=ENOSPC", "error=EIO"],
    "fdatasync": ["error=EIO", "error=ENOSPC"],
    "fsync": ["error=EIO", "error=ENOSPC"],
    "rename": ["error=EXDEV", "error=EACCES", "error=ENOSPC"],
    "renameat2": ["error=ENOSYS", "error=EINVAL", "error=EACCES"],
    "unlink": ["error=EACCES", "error=EIO"],
    "fallocate": ["error=EOPNOTSUPP", "error=ENOSPC", "error=EINTR"],
    "flock": ["error=ENOLCK", "error=EINTR", "error=EOPNOTSUPP"],
    "ftruncate": ["error=EIO", "error=EFBIG"],
    "sync_file_range": ["error=EIO", "error=ENOSPC"],
    "mkdir": ["error=EACCES", "error=EMLINK"],
    "getdents64": ["error=EIO"],
}


def faults() -> int:
    done, wrong = 0, []
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder)
        for call, kinds in FAULTS.items():
            for kind in kinds:
                for when in ("1", "3", "2+"):
                    if "EINTR" in kind and when == "2+":
                        continue  # for ever is no interruption
                    place.clear("o")
                    result = place.merge("o", inject=f"{call}:{kind}:when={when}")
                    done += 1
                    why = []
                    published = Path(folder, "o").exists()
                    if result.returncode not in (0, 2, 3):
                        why.append(f"exit {result.returncode}")
                    if "Traceback" in result.stderr:
                        why.append("traceback")
                    if published and (place.named("o") != "new" or not place.verified("o")):
                        why.append("wrong bytes published")
                    if result.returncode == 0 and not published:
                        why.append("success without OUT")
                    again = place.merge("o", *(["--overwrite"] if published else []))
                    if again.returncode or place.named("o") != "new":
                        why.append(f"does not go on: {again.stderr[-150:]}")
                    if why:
                        wrong.append((call, kind, when, why, result.stderr.strip()[-150:]))
    print(f"{done} faults, {done - len(wrong)} sound")
    for row in wrong:
        print("  ", row)
    return len(wrong)


def main() -> None:
    commands: dict[str, Any] = {
        "pickles": pickles,
        "mutations": mutations,
        "differential": differential,
        "kills": kills,
        "faults": faults,
    }
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    name = sys.argv[1]
    if name in ("kills", "faults") and shutil.which("strace") is None:
        raise SystemExit("strace is needed, which is Linux's")
    began = time.monotonic()
    found = commands[name](*map(int, sys.argv[2:]))
    print(f"{time.monotonic() - began:.0f} s")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
