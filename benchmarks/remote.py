"""A merge whose inputs lie on an S3 server of this machine, against reading the same ranges from it in parallel.

python benchmarks/remote.py benchmarks/data/small

Needs the test extra (moto, s3fs). The server is a process of its own; the raw reader asks for ranges of 4 MiB, sixteen at a time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RAW = """
import sys, time, fsspec
fs = fsspec.filesystem("s3")
paths = [p for name in sys.argv[1:] for p in fs.ls("models/" + name) if p.endswith(".safetensors")]
ranges = [(p, at, min(at + 2**22, fs.size(p))) for p in paths for at in range(0, fs.size(p), 2**22)]
for i in range(0, len(ranges), 16):
    part = ranges[i : i + 16]
    fs.cat_ranges([r[0] for r in part], [r[1] for r in part], [r[2] for r in part])
"""


def serve(port: int) -> None:
    import logging

    from moto.server import main

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    main(["-H", "127.0.0.1", "-p", str(port)])


def timed(command: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--port", type=int, default=5959)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    server = multiprocessing.Process(target=serve, args=(args.port,), daemon=True)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{args.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    time.sleep(3)
    import fsspec

    fs = fsspec.filesystem("s3")
    fs.mkdir("models")
    names = ["expert0", "expert1"]
    for name in names:
        fs.put(str(args.data / name), f"models/{name}", recursive=True)
    with tempfile.TemporaryDirectory() as scratch:
        recipe, out = Path(scratch, "recipe.yml"), Path(scratch, "out")
        recipe.write_text("merge_method: linear\nmodels: [s3://models/expert0, s3://models/expert1]\n")
        start = timed([sys.executable, "-c", "import s3fs"])
        for _ in range(args.repeat):
            raw = timed([sys.executable, "-c", RAW, *names])
            shutil.rmtree(out, ignore_errors=True)
            merged = timed([sys.executable, "-m", "stockpot", "merge", str(recipe), str(out), "-q"])
            print(
                f"import s3fs {start:.2f} s; raw ranges {raw:.2f} s; merge {merged:.2f} s; ratio {merged / raw:.2f}",
                flush=True,
            )
    server.terminate()


if __name__ == "__main__":
    main()
