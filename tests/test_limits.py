"""No file under a mebibyte takes more than 256 MiB or 5 seconds of any reader, to be opened or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import extremes

SECONDS, BYTES = 5, 256 * 2**20

#: one process for several of them: each in a child of its own, with limits that the system keeps
RUNNER = """
import json, os, resource, signal, sys, traceback
sys.path[:0] = {path!r}
import extremes
from pathlib import Path
from stockpot.errors import StockpotError

def memory():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmSize"))

for line in sys.stdin:
    name, folder = json.loads(line)
    action = extremes.MAKERS[name](Path(folder))
    pid = os.fork()
    if not pid:
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = int(used.ru_utime + used.ru_stime) + {seconds} + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        resource.setrlimit(resource.RLIMIT_AS, (memory() + {bytes}, -1))
        signal.alarm(60)  # who waits uses no time
        try:
            action()
        except StockpotError as e:
            print("refused", len(str(e)), file=sys.stderr)
            os._exit(0 if all(len(str(p)) < 20_000 for p in getattr(e, "problems", [e])) else 4)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    print(json.dumps(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = [str(Path(__file__).parent), *(p for p in os.environ.get("PYTHONPATH", "").split(":") if p)]
    code = RUNNER.format(path=path, seconds=SECONDS, bytes=BYTES)
    log = tmp_path_factory.mktemp("limits") / "log"
    with open(log, "w") as told:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told, text=True
        )
        yield process, log
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize("name", sorted(extremes.MAKERS))
def test_small_files_take_little(runner: Any, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    process, log = runner
    before = log.stat().st_size
    process.stdin.write(json.dumps([name, str(folder)]) + "\n")
    process.stdin.flush()
    status = json.loads(process.stdout.readline())
    told = log.read_text(errors="replace")[before:]
    deep = name == "folders_in_folders"
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()] if not deep else [0]
    assert max(sizes, default=0) <= extremes.MOST
    subprocess.run(["rm", "-rf", str(folder)], check=True)  # deeper than shutil goes
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    # signal 24: too long; exit 3: an error of the wrong kind, or out of memory; 4: a message without end
    assert status == 0, f"{how}\n{told[-3000:]}"
