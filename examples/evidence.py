"""Evidence: a suite on held-out text, a sweep over merges of the run by the paper's protocol, a path between two snapshots."""

from __future__ import annotations

from pathlib import Path

from shared import BLOCK, stockpot, texts
from snapshots import DOMAIN

SUITE = f"""# what a checkpoint is scored on; stockpot divides the documents between choosing (selection) and reporting
slices:
  - name: {DOMAIN}
    kind: loss
    data: held_out.txt
    chunk: 600          # characters in a document
    max_length: {BLOCK}      # tokens scored at once, as in training
gates:
  - {{slice: {DOMAIN}, reference: base, max_drop: 0, min_examples: 20}}
  - {{slice: {DOMAIN}, reference: best_parent, max_drop: 0.02, min_examples: 20, severity: warning}}
"""


def main(out: Path) -> None:
    text = texts()[DOMAIN]
    (out / "held_out.txt").write_text(text[len(text) * 9 // 10 :][:40_000])
    (out / "suite.yml").write_text(SUITE)
    steps = sorted(int(p.name.partition("-")[2]) for p in (out / "run").glob("checkpoint-*"))
    stockpot(out, "sweep", "run", "sweep", "--suite", "suite.yml", "--penalties", "1.0,0.7,0.5")
    first, last = f"run/checkpoint-{steps[len(steps) // 2]}", f"run/checkpoint-{steps[-2]}"
    stockpot(out, "path", first, last, "--suite", "suite.yml", "--points", "5", "--out", "sweep")
