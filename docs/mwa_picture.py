"""Draws docs/mwa.svg: what the penalty p and the power q do to the weights of ten snapshots.

python docs/mwa_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from stockpot.runs import metric_weights

RANKS = range(1, 11)
LOSSES = [1.0 + 1e-9 * rank for rank in RANKS]  # equal but for their order: what is seen is p and q alone


def main() -> None:
    plt.switch_backend("svg")
    plt.rcParams["svg.hashsalt"] = "stockpot"  # the same file every time
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for p in (1.0, 0.9, 0.7, 0.5):
        left.plot(RANKS, metric_weights(LOSSES, "min", p, 1.2), "o-", label=f"p = {p}")
    for q in (1.1, 1.2, 1.5, 2.0):
        right.plot(RANKS, metric_weights(LOSSES, "min", 0.7, q), "o-", label=f"q = {q}")
    left.set_title("penalty p, at q = 1.2")
    right.set_title("power q, at p = 0.7")
    left.set_ylabel("weight")
    for axes in (left, right):
        axes.set_xlabel("rank of the snapshot (1: lowest loss)")
        axes.set_xticks(list(RANKS))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("mwa.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
