"""Fuzz the readers of strangers' files with atheris (coverage-guided), for as long as you like.

pip install atheris
python benchmarks/fuzz.py header -max_total_time=600      # or: index, "torch zip", recipe, journal

Everything after the target's name goes to libFuzzer. A finding is written to crash-* in the working directory.
"""

import os
import sys
import tempfile

import atheris

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))

with atheris.instrument_imports(include=["stockpot", "json", "zipfile", "yaml"]):
    from hostile import TARGETS, attack


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"usage: fuzz.py TARGET [libFuzzer options]; targets: {', '.join(TARGETS)}")
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as corpus:
        with open(os.path.join(corpus, "real"), "wb") as f:
            f.write(TARGETS[name][0])
        atheris.Setup([*sys.argv, corpus], lambda data: attack(name, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
