"""What tests of scoring share: suites on disk, an evaluator that needs no model, held-out text for the tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

#: scores a candidate by its distance from given values: no torch, no model, the same every time; counts its calls in a file
DISTANCE = """
import json, os, time
import numpy as np

def distance(checkpoint, split, target=0.0, log="", delay=0.0):
    parts = [np.frombuffer(raw.tobytes(), np.float32) for _, raw in checkpoint.candidate.tensors.values()]
    flat = np.concatenate(parts).astype(np.float64)
    flat = flat[: len(flat) // 40 * 40].reshape(40, -1)
    each = ((flat - target) ** 2).mean(1)[:: 2 if split == "report" else 1]
    time.sleep(delay)
    if log:
        with open(log, "a") as f:
            f.write(f"{split} {each.sum()!r}\\n")
    return {"distance": float(each.mean()), "examples": {"distance": each.tolist()}}
"""


def distance_suite(folder: Path, *, name: str = "suite.yml", extra: str = "", **options: Any) -> Path:
    """A suite whose one slice is the distance above."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tests_distance.py").write_text(DISTANCE)
    text = f"""slices:
  - name: near
    kind: python
    function: tests_distance:distance
    options: {json.dumps(options)}
    metric: distance
    direction: min
{extra}"""
    (folder / name).write_text(text)
    return folder / name


def held_out(path: Path, rows: int = 60, seed: int = 5) -> Path:
    """JSON lines of text in the words of helpers.tiny_tokenizer."""
    rng = random.Random(seed)
    lines = []
    for _ in range(rows):
        at, words = rng.randrange(64), []
        for _ in range(12):
            at = (at + rng.randrange(1, 3)) % 64
            words.append(f"w{at}")
        lines.append(json.dumps({"text": " ".join(words)}))
    path.write_text("\n".join(lines) + "\n")
    return path
