"""stockpot's jobs on models trained here and now: snapshots of one run into one adapter, experts into one model, and a search
for the best of the run's merges with a report.

    python examples/demo.py demo-output        (or: make demo)

About three minutes on two cores. Text comes from Python's own standard library and from generated arithmetic; nothing is
downloaded. Trained models are kept in the output directory and used again by the next run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import evidence
import experts
import snapshots
from shared import make_base


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output").resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = make_base(out)
    print("\n== Snapshots of one run ==\n")
    snapshots.main(out, parts)
    print("\n== Experts of many ==\n")
    experts.main(out, parts)
    print("\n== Which merge of the run is best, and how sure is that ==\n")
    evidence.main(out)
    print(f"\nEverything is in {out}; `stockpot verify {out}/soup-5-by-loss` checks an output against its lineage.")
    print(f"The report, for a browser: {out / 'sweep/report.html'}")


if __name__ == "__main__":
    main()
