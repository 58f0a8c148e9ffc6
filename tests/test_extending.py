"""docs/extending.md, run as it stands there."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stockpot
from stockpot.methods.declaration import _REGISTRY
from stockpot.testing import method_checks, statistic_checks
from stockpot.testing.models import CUT, state, write_model

PAGE = Path(__file__).parents[1] / "docs/extending.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not a source checkout")


def blocks() -> dict[str, str]:
    """The page's Python files by name."""
    found = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE.read_text(), re.S) if PAGE.exists() else []
    return dict(found)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in blocks().items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(_REGISTRY)
    yield tmp_path
    _REGISTRY.clear()
    _REGISTRY.update(before)
    for name in blocks():
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_page_has_what_it_promises() -> None:
    assert set(blocks()) == {"trimmed_sum.py", "test_trimmed_sum.py", "low_rank_mean.py", "counting.py"}


def test_a_method_and_its_test(files: Path) -> None:
    __import__("trimmed_sum")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "trimmed_sum", str(files / "test_trimmed_sum.py")],
        cwd=files, capture_output=True, text=True, env={"PYTHONPATH": str(files), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    write_model(str(files / "base"), state(CUT, 0))
    write_model(str(files / "a"), state(CUT, 1))
    result = stockpot.merge(
        f"merge_method: trimmed_sum\nbase_model: {files}/base\nmodels: [{files}/a]\nparameters: {{density: 0.3}}\n",
        files / "out",
    )
    assert result.lineage["groups"][0]["parameters"] == {"density": (0.3,)}


def test_a_method_on_matrices(files: Path) -> None:
    __import__("low_rank_mean")
    for check in method_checks("low_rank_mean"):
        folder = files / check.name
        folder.mkdir()
        check(folder)


def test_a_statistic(files: Path) -> None:
    made: Any = runpy.run_path(str(files / "counting.py"))["Changed"]
    sys.modules["counting"] = __import__("counting")
    stat = sys.modules["counting"].Changed()
    assert made().name == stat.name
    for check in statistic_checks(stat, {}, oracle=lambda b: (b != 0).sum(1)):
        check(files)
