"""Release gates on published merges, the interpolation path, and the report in a real browser."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stockpot
from scoring import distance_suite
from stockpot.errors import ArgumentError, GateError, SuiteError
from stockpot.evaluation.scores import Scores
from stockpot.evaluation.statistics import Interval
from stockpot.evaluation.suite import parse_suite
from stockpot.runs import SoupSpec
from stockpot.search import SweepOptions
from stockpot.search.path import make_path

from helpers import cli

PASSING = (
    "gates: [{slice: near, max: 1000, min_examples: 1}, {slice: near, reference: base, max_drop: 5, min_examples: 1}]\n"
)
FAILING = "gates: [{slice: near, max: 1000, min_examples: 1}, {slice: near, max: 0, min_examples: 1}]\n"
SMALL = SweepOptions(k=(2, 3, 5), intervals=(2,), penalties=(1.0, 0.7))


@pytest.fixture
def soup(lora_run: Path, tmp_path: Path) -> Path:
    stockpot.soup(lora_run, tmp_path / "soup", SoupSpec(last=3))
    return tmp_path / "soup"


def test_the_verdict_is_in_lineage_and_card(soup: Path, tmp_path: Path) -> None:
    suite = distance_suite(tmp_path, extra=PASSING)
    done = cli("gate", soup, "--suite", suite)
    assert done.returncode == 0, done.stderr
    assert "gates passed" in done.stdout
    lineage = stockpot.verify(soup)  # the card was changed, and its digest with it
    assert lineage["gates"]["passed"] is True
    assert [g["status"] for g in lineage["gates"]["gates"]] == ["pass", "pass"]
    card = (soup / "README.md").read_text()
    assert card.count("## Release gates") == 1
    assert cli("gate", soup, "--suite", suite).returncode == 0
    assert (soup / "README.md").read_text() == card  # written again, not twice


def test_a_failing_gate_ends_with_5_and_names_the_slice(soup: Path, tmp_path: Path) -> None:
    suite = distance_suite(tmp_path, extra=FAILING)
    done = cli("gate", soup, "--suite", suite)
    assert done.returncode == 5
    assert "slice 'near': fail: near: at most 0" in done.stderr
    assert "publishes" not in done.stderr  # nothing would be
    with pytest.raises(GateError) as raised:
        stockpot.gate(soup, suite)
    assert "publishes" not in str(raised.value)
    assert stockpot.verify(soup)["gates"]["passed"] is False
    assert "not passed" in (soup / "README.md").read_text()
    assert cli("gate", soup, "--suite", suite, "--force", "--json").returncode == 0
    warning = distance_suite(tmp_path, name="w.yml", extra=FAILING.replace("max: 0,", "max: 0, severity: warning,"))
    done = cli("gate", soup, "--suite", warning)
    assert done.returncode == 0
    assert "with a warning" in done.stdout
    few = distance_suite(tmp_path, name="f.yml", extra="gates: [{slice: near, max: 1000, min_examples: 500}]\n")
    done = cli("gate", soup, "--suite", few)
    assert done.returncode == 5
    assert "inconclusive" in done.stderr
    assert "20 examples, 500 are needed" in done.stderr


def test_parents_and_experts(soup: Path, lora_run: Path, tmp_path: Path) -> None:
    gates = f"""gates:
  - {{slice: near, reference: best_parent, max_drop: 0.5, min_examples: 1}}
  - {{slice: near, expert: {lora_run}, max_drop_percent: 200, min_examples: 1}}
"""
    verdict = stockpot.gate(soup, distance_suite(tmp_path, extra=gates))
    assert [o.status for o in verdict.outcomes] == ["pass", "pass"]
    assert "best_parent has" in verdict.outcomes[0].why
    shutil.copytree(lora_run / "checkpoint-4", tmp_path / "stranger")
    with pytest.raises(SuiteError, match="names no parents"):
        stockpot.gate(tmp_path / "stranger", distance_suite(tmp_path, extra=gates))
    lineage = json.loads((soup / "stockpot.json").read_text())
    lineage["inputs"][0]["path"] = "/gone/away"
    (soup / "stockpot.json").write_text(json.dumps(lineage))
    with pytest.raises(SuiteError, match="/gone/away is not there any more"):
        stockpot.gate(soup, distance_suite(tmp_path, extra=gates))
    with pytest.raises(SuiteError, match="has no gates"):
        stockpot.gate(soup, distance_suite(tmp_path))


def test_merge_and_soup_refuse_to_publish(lora_run: Path, family32: Path, tmp_path: Path) -> None:
    failing, passing = distance_suite(tmp_path, extra=FAILING), distance_suite(tmp_path, name="ok.yml", extra=PASSING)
    done = cli("soup", lora_run, "out", "--last", "3", "--suite", failing, cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "slice 'near'" in done.stderr
    assert "--force publishes it all the same" in done.stderr
    assert not (tmp_path / "out").exists()
    done = cli("soup", lora_run, "out", "--last", "3", "--suite", failing, "--json", cwd=tmp_path)
    assert done.returncode == 5
    assert json.loads(done.stdout)["published"] is False
    assert (
        cli("soup", lora_run, "out", "--last", "3", "--suite", failing, "--device", "banana", cwd=tmp_path).returncode
        == 2
    )
    done = cli("soup", lora_run, "out", "--last", "3", "--suite", failing, "--force", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert stockpot.verify(tmp_path / "out")["gates"]["forced"] is True
    assert "published by force" in (tmp_path / "out/README.md").read_text()
    (tmp_path / "r.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {family32}/base\n"
        f"models: [{{model: {family32}/a}}, {{model: {family32}/b}}]\n"
    )
    done = cli("merge", "r.yml", "merged", "--suite", passing, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    gates = stockpot.verify(tmp_path / "merged")["gates"]
    assert gates["passed"]
    assert "base" in gates["gates"][1]["gate"]
    assert cli("merge", "r.yml", "again", "--suite", failing, cwd=tmp_path).returncode == 5
    assert (
        cli("merge", "r.yml", "again", "--force", cwd=tmp_path).returncode == 2
    )  # without a suite there is nothing to force


def test_a_sweep_publishes_through_the_gates(lora_run: Path, tmp_path: Path) -> None:
    suite = distance_suite(tmp_path, extra=FAILING)
    with pytest.raises(GateError, match="near"):
        stockpot.sweep(lora_run, tmp_path / "out", suite, SMALL)
    assert not (tmp_path / "out/best").exists()
    assert (tmp_path / "out/report.html").exists()
    stockpot.report(tmp_path / "out")
    assert "Release gates: not passed" in (tmp_path / "out/report.html").read_text()
    found = stockpot.sweep(lora_run, tmp_path / "out", suite, SMALL, force=True)
    assert found.result.evaluations == 0
    assert stockpot.verify(tmp_path / "out/best")["gates"]["forced"] is True


# the path


def points(values: list[float]) -> list[dict[str, Scores]]:
    import numpy as np

    noise = np.linspace(-0.01, 0.01, 50)
    return [{"a": Scores({"loss": v}, examples={"loss": v + noise})} for v in values]


def path_of(values: list[float]) -> Any:
    suite = parse_suite("slices: [{name: a, kind: loss, data: x}]", "suite.yml")
    steps = [i / (len(values) - 1) for i in range(len(values))]
    return make_path("A", "B", suite, steps, points(values), Interval(9.0))


def test_the_barrier_is_that_of_the_definition() -> None:
    """L(t) = (t^2 - 1)^2 from -1 to 1 has a barrier of 1 at the middle; a model with itself has none."""
    hill = path_of([((2 * i / 10 - 1) ** 2 - 1) ** 2 for i in range(11)])
    assert hill.barrier == pytest.approx(1.0)
    assert [p.accepted for p in hill.points] == [True] + [False] * 9 + [True]
    assert "not connected" in hill.verdict
    flat = path_of([2.0] * 11)
    assert flat.barrier == 0.0
    assert all(p.accepted for p in flat.points)
    valley = path_of([1.0, 0.5, 0.4, 0.6, 1.2])
    assert valley.barrier == 0.0
    assert valley.best == 0.5
    assert "better than both ends" in valley.verdict
    suite = parse_suite("slices: [{name: a, kind: loss, data: x}]", "suite.yml")
    blind = make_path("A", "B", suite, [0.0, 0.5, 1.0], [{"a": Scores({"loss": v})} for v in (1.0, 9.0, 1.0)])
    assert not blind.points[1].accepted  # no examples to tell noise by: the value itself decides
    assert "not connected" in blind.verdict
    partly = path_of([1.0, 1.0, 3.0, 2.0, 1.0])
    assert "a barrier of 2 at t = 0.5" in partly.verdict


def test_path_on_the_command_line(lora_run: Path, tmp_path: Path) -> None:
    suite = distance_suite(tmp_path)
    a, b = lora_run / "checkpoint-4", lora_run / "checkpoint-24"
    done = cli("path", a, b, "--suite", suite, "--points", "5", "--out", tmp_path / "line")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2].startswith(("Connected", "Not connected", "A barrier"))
    assert {p.name for p in (tmp_path / "line").iterdir()} == {"path.json", "path.csv", "path.png", "path.html"}
    rows = list(csv.DictReader((tmp_path / "line/path.csv").read_text().splitlines()))
    assert [float(r["t"]) for r in rows] == [0, 0.25, 0.5, 0.75, 1]
    found = json.loads(cli("path", a, b, "--suite", suite, "--points", "3", "--json").stdout)
    assert found["points"][1]["score"] == pytest.approx(float(rows[2]["score"]))
    assert found["points"][0]["score"] == pytest.approx(float(rows[0]["score"]))
    assert cli("path", a, b, "--suite", suite, "--points", "2").returncode == 2
    assert cli("path", a, lora_run / "nothing", "--suite", suite).returncode == 3
    with pytest.raises(ArgumentError, match="no sweep here"):
        stockpot.report(tmp_path / "line")


# the report


@pytest.fixture(scope="module")
def page(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a sweep with gates and a path, one candidate of it named to attack the page."""
    folder = tmp_path_factory.mktemp("report")
    suite = distance_suite(folder, extra=PASSING)
    options = SweepOptions(stages=("uniform", "interval", "weights", "schedules", "comparison", "greedy", "lcsc"), k=(2, 3, 5),
                           intervals=(2,), penalties=(1.0, 0.7), comparison_k=(3,), lcsc_evaluations=12)  # fmt: skip
    stockpot.sweep(lora_run, folder / "out", suite, options)
    stockpot.path(lora_run / "checkpoint-4", lora_run / "checkpoint-24", suite, points=3, out=folder / "out")
    return folder / "out/report.html"


def chromium() -> str | None:
    return next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    place = chromium()
    if place is None:
        if os.environ.get("STOCKPOT_NEEDS_CHROMIUM"):
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=place, args=quiet)
        yield opened
        opened.close()


def test_the_page_needs_no_network(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text)
    assert "@import" not in text
    for chart in ("scores", "differences", "weights", "k", "penalty", "search", "curves", "path"):
        assert f'id="chart-{chart}"' in text
        assert (page.parent / f"charts/{chart}.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((page.parent / "leaderboard.csv").read_text().splitlines()))
    assert len(rows) == text.count("<tr class=")
    assert "Release gates: passed" in text
    assert "Lineage of the published merge" in text


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_in_a_browser(page: Path, browser: Any, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked: list[str] = []
    said: list[str] = []
    tab = context.new_page()
    tab.on("request", lambda r: asked.append(r.url))
    tab.on("console", lambda m: said.append(m.text))
    tab.on("pageerror", lambda e: said.append(str(e)))
    tab.goto(page.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    over = tab.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .drawing, pre') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert over == []
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(13, 17, 23)") == (scheme == "dark")
    # what the charts are drawn in follows the theme
    fills = tab.evaluate("getComputedStyle(document.querySelector('#chart-scores svg text')).fill")
    assert fills == ("rgb(145, 152, 161)" if scheme == "dark" else "rgb(87, 96, 106)")

    names = "[...document.querySelectorAll('#leaderboard tbody tr')].filter(r => r.offsetParent).map(r => r.cells[1].textContent)"
    before = tab.evaluate(names)
    tab.click("#leaderboard th:nth-child(2) button")
    after = tab.evaluate(names)
    assert after != before
    assert sorted(after) == sorted(before)
    assert tab.evaluate(
        "([...n]) => n.every((x, i) => !i || n[i - 1].trim().toLowerCase().localeCompare(x.trim().toLowerCase()) <= 0)",
        after,
    )
    assert tab.get_attribute("#leaderboard th:nth-child(2)", "aria-sort") == "ascending"
    cells = "[...document.querySelectorAll('#leaderboard tbody tr')].map(r => r.cells[4].dataset.value)"
    scores = f"{cells}.filter(Boolean).map(Number)"
    tab.focus("#leaderboard th:nth-child(5) button")
    tab.keyboard.press("Enter")
    assert tab.evaluate(scores) == sorted(tab.evaluate(scores))
    tab.keyboard.press("Enter")
    assert tab.evaluate(scores) == sorted(tab.evaluate(scores), reverse=True)

    tab.fill("#filter", "ties base_last")
    shown = tab.evaluate(names)
    assert shown
    assert all("ties" in n and "base_last" in n for n in shown)
    tab.fill("#filter", "")
    tab.select_option("#stage", "uniform")
    assert len(tab.evaluate(names)) == 3
    tab.select_option("#stage", "")

    context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.click("button[data-copy='last_3_unweighted']")
    tab.wait_for_function("document.getElementById('said').textContent.includes('copied')")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert "merge_method: linear" in copied
    assert "last: 3" in copied
    tab.click("#theme")
    assert (tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)") == (scheme == "light")
    # everything that can be used can be reached by keyboard
    assert tab.evaluate(
        "[...document.querySelectorAll('button, input, select, summary, .scroll')].every(e => e.tabIndex >= 0)"
    )
    assert said == []
    assert [u for u in asked if not u.startswith(("file:", "data:"))] == []
    context.close()


def test_the_copied_recipe_is_what_was_scored(page: Path, browser: Any, tmp_path: Path) -> None:
    tab = browser.new_page()
    tab.goto(page.as_uri())
    recipes = json.loads(tab.inner_text("#recipes") or tab.evaluate("document.getElementById('recipes').textContent"))
    lineage = json.loads((page.parent / "best/stockpot.json").read_text())
    winner = lineage["soup"]["name"] if "soup" in lineage else None
    rows = csv.DictReader((page.parent / "leaderboard.csv").read_text().splitlines())
    best = next(r["name"] for r in rows if r["stage"] not in ("reference", "single"))
    assert winner in (None, best)
    (tmp_path / "recipe.yml").write_text(recipes[best])
    done = cli("merge", "recipe.yml", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mine = json.loads((tmp_path / "out/stockpot.json").read_text())
    assert mine["output"]["files"] == lineage["output"]["files"]
    tab.close()


def test_markup_in_names_and_errors_is_text(page: Path, lora_run: Path, tmp_path: Path) -> None:
    """What an evaluator raises may hold anything."""
    suite = distance_suite(tmp_path)
    (tmp_path / "tests_evil.py").write_text(
        "from tests_distance import distance\n"
        "def f(checkpoint, split):\n    found = distance(checkpoint, split)\n"
        "    if int(found['distance'] * 1e9) % 2: raise ValueError('</script><img src=x onerror=alert(1)>')\n    return found\n"
    )
    suite.write_text(
        "slices: [{name: near, kind: python, function: 'tests_evil:f', metric: distance, direction: min}]\n"
    )
    stockpot.sweep(lora_run, tmp_path / "out", suite, SMALL)
    text = (tmp_path / "out/report.html").read_text()
    assert "&lt;img src=x" in text
    assert "<img src=x" not in text


def test_report_again_without_the_run(page: Path, tmp_path: Path) -> None:
    shutil.copytree(page.parent, tmp_path / "copy")
    before = (tmp_path / "copy/report.html").read_text()
    (tmp_path / "copy/report.html").unlink()
    done = cli("report", tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy/report.html").read_text().count("<tr class=") == before.count("<tr class=")
