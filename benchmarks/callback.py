"""What MergingCallback costs: the demo's LoRA fine-tune with the time inside the callback's own code added up.

    python benchmarks/callback.py demo-output

Comparing two trainings would drown it in noise. The callback keeps the last 10 snapshots by loss, one every 15 steps, and
saves the average and the snapshots with each of 17 checkpoints; it evaluates nothing.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from shared import make_base
from snapshots import DOMAIN, fine_tune
from stockpot.runs import SoupSpec
from stockpot.training import MergingCallback

EVENTS = ("on_train_begin", "on_step_end", "on_evaluate", "on_save")


class Timed(MergingCallback):
    """Adds up the seconds spent in each event."""

    seconds = 0.0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in EVENTS:
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return found(*args, **kwargs)
            finally:
                Timed.seconds += time.perf_counter() - began

        return timed


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output").resolve()
    training, _ = make_base(out)[DOMAIN]
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(out / "base", Path(scratch, "base"))
        callback = Timed(SoupSpec(last=10, by="loss", penalty=0.7))
        began = time.perf_counter()
        fine_tune(Path(scratch), training, [callback])
        whole = time.perf_counter() - began
    share = Timed.seconds / (whole - Timed.seconds)
    print(
        f"training took {whole:.1f} s, of which {Timed.seconds:.2f} s in the callback: {share:.2%} more than without it"
    )


if __name__ == "__main__":
    main()
