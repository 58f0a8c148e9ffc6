"""Compiles the kernels when stockpot is built or installed. Without a C compiler it is installed all the same: slower."""

import os
import shlex
import subprocess
import sys
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "src/stockpot/engine/native"
SOURCES = ("kernels.c", "kernels.inc", "fused.inc", "transfer.inc", "blake3.inc", "bundle.inc")
# no fused multiply-add: the bytes must be those of the numpy code
FLAGS = (
    "-std=gnu11 -O3 -shared -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi"
).split()


def compile_library(source: str, library: str) -> str | None:
    """None, or why it could not be compiled."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    try:
        subprocess.run([*compiler, *FLAGS, "-o", library + ".new", source, "-lm"], check=True, capture_output=True)
    except subprocess.CalledProcessError as e:
        return e.stderr.decode(errors="replace").strip()
    except OSError as e:
        return str(e)
    os.replace(library + ".new", library)  # a process that uses the old one keeps it
    return None


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or sys.platform == "win32":
            return
        library = os.path.join(self.root, FOLDER, "kernels.so.1")
        sources = [os.path.join(self.root, FOLDER, name) for name in SOURCES]
        if not os.path.exists(library) or os.path.getmtime(library) < max(map(os.path.getmtime, sources)):
            why = compile_library(sources[0], library)
            if why:
                if os.path.exists(library):
                    os.unlink(library)  # of another version
                self.app.display_warning(f"stockpot: compiled kernels left out, numpy does their work: {why}")
                return
        build_data["artifacts"].append(f"/{FOLDER}/kernels.so.1")
        build_data["pure_python"] = False
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"
