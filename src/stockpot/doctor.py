"""What this machine has for merging, and what is missing for which feature."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from typing import Any

from stockpot.machine import available_threads, memory
from stockpot.version import __version__

__all__ = ["examine"]

_NEEDED = ("numpy", "blake3", "ml_dtypes", "pyyaml", "rich", "typer", "threadpoolctl")
#: package -> (extra that brings it, what it is for)
_OPTIONAL = {
    "torch": ("torch", "--device cuda, merging torch tensors in memory"),
    "transformers": ("train", "training callbacks; evaluate: scoring models"),
    "safetensors": ("train", "training callbacks; evaluate: scoring models"),
    "peft": ("evaluate", "scoring adapters"),
    "matplotlib": ("evaluate", "charts and the HTML report"),
    "cma": ("evaluate", "learned coefficients (lcsc)"),
    "lm_eval": ("harness", "tasks of lm-evaluation-harness"),
    "huggingface_hub": ("hub", "models by Hub id"),
    "fsspec": ("remote", "inputs and outputs behind URLs"),
    "s3fs": ("remote", "s3:// URLs"),
    "aiohttp": ("remote", "http:// and https:// URLs"),
    "tensorboard": ("tensorboard", "metrics from TensorBoard logs"),
}
_PROBE_BYTES = 256 * 2**20


def examine(folder: str = ".", *, probe_disk: bool = True) -> dict[str, Any]:
    """Facts as plain data. folder: where outputs would go; its disk is written to (256 MiB) and read unless told not to."""
    from stockpot.engine.native import LIBRARY, load_kernels

    facts: dict[str, Any] = {
        "stockpot": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": {"available": available_threads(), "processors": os.cpu_count()},
        "memory": memory(),
        "kernels": {"compiled": load_kernels() is not None, "library": LIBRARY},
        "packages": {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)},
        "devices": _devices(),
        "disk": _disk(os.path.abspath(folder), probe=probe_disk),
    }
    facts["missing"] = _missing(facts)
    return facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    """What torch sees, asked only where torch is installed."""
    if _version("torch") is None:
        return {"cuda": [], "why": "torch is not installed"}
    try:
        import torch

        if not torch.cuda.is_available():
            return {"cuda": [], "why": f"torch {torch.__version__} finds no CUDA device"}
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(len(names))]
        return {"cuda": [{"name": n, "bytes": s} for n, s in zip(names, sizes, strict=True)], "why": None}
    except Exception as e:  # a broken installation is a finding, not a failure of ours
        return {"cuda": [], "why": f"torch can't be used: {type(e).__name__}: {e}"}


def _disk(folder: str, *, probe: bool) -> dict[str, Any]:
    """Room where outputs would go and how fast it takes and gives bytes (flushed; what is read may come from memory)."""
    facts: dict[str, Any] = {
        "folder": folder,
        "free": None,
        "write_bytes_per_second": None,
        "read_bytes_per_second": None,
    }
    try:
        facts["free"] = shutil.disk_usage(folder).free
        if not probe or facts["free"] < 4 * _PROBE_BYTES:
            return facts
        block = os.urandom(2**22)
        with tempfile.TemporaryFile(dir=folder) as f:
            began = time.monotonic()
            for _ in range(_PROBE_BYTES // len(block)):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            facts["write_bytes_per_second"] = round(_PROBE_BYTES / (time.monotonic() - began))
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            f.seek(0)
            began = time.monotonic()
            while f.read(len(block)):
                pass
            facts["read_bytes_per_second"] = round(_PROBE_BYTES / (time.monotonic() - began))
    except OSError as e:
        facts["why"] = f"{e.strerror or e}"
    return facts


def _missing(facts: dict[str, Any]) -> list[str]:
    """What does not work as it could, and how to get it, a line each."""
    lines = [
        f"{name} is not installed: needed for everything; pip install stockpot again"
        for name in _NEEDED
        if facts["packages"][name] is None
    ]
    lines += [
        f"{name} is not installed: needed for {use}; pip install 'stockpot[{extra}]'"
        for name, (extra, use) in _OPTIONAL.items()
        if facts["packages"][name] is None
    ]
    if not facts["kernels"]["compiled"]:
        why = "switched off by STOCKPOT_NATIVE=0" if os.environ.get("STOCKPOT_NATIVE") == "0" else "not built"
        lines.append(
            f"compiled kernels are {why}: merges are several times slower; install a C compiler and stockpot again"
        )
    if not facts["devices"]["cuda"] and facts["packages"]["torch"] is not None:
        lines.append(f"no GPU: {facts['devices']['why']}")
    if sys.platform == "win32":
        lines.append("Windows: no compiled kernels, no locks between two merges into one OUT")
    if facts["disk"].get("why"):
        lines.append(f"{facts['disk']['folder']}: {facts['disk']['why']}")
    return lines
