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
    assert set(blocks()) == {
        "trimmed_sum.py",
        "test_trimmed_sum.py",
        "low_rank_mean.py",
        "counting.py",
        "softmax_scheme.py",
    }


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


def test_a_way_to_weight_snapshots(files: Path, lora_run: Path) -> None:
    import math

    from stockpot import SoupSpec, parse_name
    from stockpot.errors import ArgumentError
    from stockpot.runs.schemes import SCHEMES, add_scheme
    from stockpot.training.average import checked_spec

    before = dict(SCHEMES)
    try:
        __import__("softmax_scheme")
        spec = SoupSpec(last=3, scheme="softmax", by="loss", options={"temperature": 0.1})
        result = stockpot.soup(lora_run, files / "out", spec)
        assert result.soup is not None
        assert result.soup["name"] == "last_3_loss_softmax-0_1"
        assert parse_name("last_3_loss_softmax-0_1") == spec
        rows = result.soup["snapshots"]
        raw = [math.exp(-r["metric"] / 0.1) for r in rows]
        assert [r["weight"] for r in rows] == pytest.approx([x / sum(raw) for x in raw])
        assert checked_spec(spec) is spec
        run = {"path": str(lora_run), "last": 3, "scheme": "softmax", "by": "loss", "options": {"temperature": 0.1}}
        assert stockpot.plan({"merge_method": "linear", "run": run}).soup.name == "last_3_loss_softmax-0_1"  # type: ignore[union-attr]
        for given, message in (
            ({}, "needs options: temperature"),
            ({"temprature": 1.0}, "did you mean 'temperature'"),
            ({"temperature": 0.0}, "a number from 1e-06 to 1e"),
        ):
            with pytest.raises(ArgumentError, match=message):
                SoupSpec(last=3, scheme="softmax", by="loss", options=given)
        with pytest.raises(ArgumentError, match="uniform weights have no 'temperature'; it has none"):
            SoupSpec(last=3, options={"temperature": 1.0})
        with pytest.raises(ArgumentError, match="called 'softmax' already"):
            add_scheme("softmax", SCHEMES["softmax"])
    finally:
        SCHEMES.clear()
        SCHEMES.update(before)


def test_every_scheme_is_in_the_help_and_the_docs() -> None:
    from stockpot.runs.schemes import SCHEMES

    from helpers import cli

    shown = " ".join(cli("soup", "--help").stdout.split())
    page = (PAGE.parent / "mwa.md").read_text()
    for name in SCHEMES:
        assert name in shown, name
        assert name in page or name == "metric", name


def test_a_statistic(files: Path) -> None:
    made: Any = runpy.run_path(str(files / "counting.py"))["Changed"]
    sys.modules["counting"] = __import__("counting")
    stat = sys.modules["counting"].Changed()
    assert made().name == stat.name
    for check in statistic_checks(stat, {}, oracle=lambda b: (b != 0).sum(1)):
        check(files)
