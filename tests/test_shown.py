"""Strangers' text where people see it: terminals, cards, pages. What verifies reads nothing outside of the directory."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import stockpot
from stockpot.adapters.patterns import Patterns
from stockpot.cli.show import print_table
from stockpot.engine.verify import compare
from stockpot.errors import StockpotError, VerificationError, brief, few_of, visible, visible_json
from stockpot.lineage import damage, read_lineage
from stockpot.reports.page import _gates, _lineage, document

from helpers import cli, write_model

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m‮\r\x7f﻿⁦evil"
SEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f؜‎‏\u2028-‮⁦-⁩﻿]")


def test_visible() -> None:
    shown = visible(f"a{EVIL}\nb\t\ud800")
    assert not SEEN.search(shown)
    assert "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202e\\x0d\\x7f\\ufeff\\u2066evil\nb\t\\ud800" in shown
    assert visible("a\nb\tc", line=True) == "a\\nb\\tc"
    plain = "Grüße, 模型, 🍲, e\u0301, 👩\u200d🍳"
    assert visible(plain) == plain
    doc = {f"k{EVIL}": [EVIL, 1]}
    text = visible_json(json.dumps(doc, ensure_ascii=False))
    assert not SEEN.search(text)
    assert json.loads(text) == doc


def test_messages_are_cut_short() -> None:
    assert len(brief(["x"] * 10_000)) < 250
    assert few_of(list("abcdefg"), 2) == "'a', 'b', ... (7 in all)"
    assert few_of(["a"]) == "'a'"
    long = str(StockpotError("x" * 10**6))
    assert len(long) < 9000
    assert long.endswith("... (1000000 characters)")


@pytest.mark.parametrize("rows", [3, 1000])
def test_tables(rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Short ones by rich, long ones by hand: the same content, nothing raw in either."""
    print_table(f"title{EVIL}", ("name", "#size"), ((f"n{i}{EVIL}\nx", i) for i in range(rows)))
    out = capsys.readouterr().out
    assert not SEEN.search(out)
    assert len(out.splitlines()) == rows + 2
    assert out.splitlines()[2].split()[-1] == "0"
    assert all("\\nx" in line for line in out.splitlines()[2:])
    print_table("", ("[red]markup[/red]", "#n"), [["[bold]kept[/bold]", 1]])
    assert "[bold]kept[/bold]" in capsys.readouterr().out


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A model whose names, files and config are hostile."""
    folder = tmp_path / "evil"
    folder.mkdir()
    save_file({f"w{EVIL}": torch.ones(2), "a.weight": torch.ones(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"model_type": EVIL, "architectures": [EVIL], "_name_or_path": EVIL})
    )
    (folder / f"f{EVIL}.bin").write_bytes(b"PK")
    return folder


def commands(evil: Path, tmp_path: Path) -> list[list[str]]:
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: linear\nmodels: [{json.dumps(str(evil))}]\n")
    mixed = tmp_path / "m.yml"
    write_model(tmp_path / "plain", {"b": torch.ones(2)}, {})
    mixed.write_text(f"merge_method: linear\nmodels: [{json.dumps(str(evil))}, {tmp_path}/plain]\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": f"s{EVIL}.safetensors"}}))
    out = str(tmp_path / "out")
    return [
        ["inspect", str(evil)], ["inspect", str(evil), "--json"], ["plan", str(recipe)], ["plan", str(recipe), "--json"],
        ["plan", str(mixed)], ["merge", str(recipe), out], ["verify", out], ["inspect", str(broken)],
        ["merge", str(recipe), f"{out}{EVIL}"], ["inspect", f"nowhere{EVIL}"], ["run", "show", str(evil)],
    ]  # fmt: skip


def test_commands_print_nothing_raw(evil: Path, tmp_path: Path) -> None:
    for command in commands(evil, tmp_path):
        done = cli(*command)
        assert done.returncode in (0, 2, 3), (command, done.stderr)
        assert not SEEN.search(done.stdout), command
        assert not SEEN.search(done.stderr), command
        assert "Traceback" not in done.stderr
    lineage = json.loads((tmp_path / "out/stockpot.json").read_text())
    lineage["created"] = EVIL
    lineage["output"]["side_files"] |= {f"x{EVIL}": "0"}
    (tmp_path / "out/stockpot.json").write_text(json.dumps(lineage))
    done = cli("verify", str(tmp_path / "out"))
    assert done.returncode == 4
    assert not SEEN.search(done.stdout + done.stderr)


def test_the_card_holds_nothing_raw(evil: Path, tmp_path: Path) -> None:
    """Names with backquotes and line breaks, a recipe that would end its own block."""
    odd = tmp_path / "a`b\n# Heading\x1b"
    evil.rename(odd)
    text = f"# ```\n# \x1b‮\nmerge_method: linear\nmodels: [{json.dumps(str(odd))}]\n"
    (tmp_path / "r.yml").write_text(text.replace("\x1b", ""), encoding="utf-8")
    stockpot.merge(tmp_path / "r.yml", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert not SEEN.search(card)
    assert "\n# Heading" not in card
    fence = re.search(r"^(`{3,})yaml$", card, re.M)
    assert fence is not None
    body = card.split(f"{fence[1]}yaml\n")[1]
    assert f"\n{fence[1]}\n" in body
    assert fence[1] not in body.split(f"\n{fence[1]}\n")[0]


# the page


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_escapes_everything() -> None:
    bad = "\"'><img src=x onerror=alert(1)></script><script>alert(2)</script>" + EVIL
    verdict = {"passed": False, "gates": [dict.fromkeys(("gate", "severity", "status", "why"), bad)]}
    files = [{"name": bad, "digest": bad}]
    lineage = {
        "inputs": [{"path": bad}],
        "output": {"files": files},
        "packages": {bad: bad},
        "created": bad,
        "platform": bad,
    }
    page = document(bad, bad, [_gates(verdict), _lineage(lineage)], [(bad, "text/csv", b"x")], {bad: bad})
    tags = Tags()
    tags.feed(page)
    assert not SEEN.search(page)
    assert not [t for t, a in tags.found if t == "img" or any(k.startswith("on") for k in a)]
    scripts = [a for t, a in tags.found if t == "script"]
    assert [s.get("type") for s in scripts] == ["application/json", None]
    policy = next(a["content"] for t, a in tags.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("style-src")[0]


# verifying


def test_verify_reads_nothing_outside(tmp_path: Path) -> None:
    write_model(tmp_path / "a", {"w": torch.ones(2)}, {})
    stockpot.merge({"merge_method": "linear", "models": [str(tmp_path / "a")]}, tmp_path / "out")
    (tmp_path / "secret").write_text("secret")
    path = tmp_path / "out/stockpot.json"
    lineage = json.loads(path.read_text())
    (tmp_path / "out/link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "out/fifo")
    for name, why in {
        "../secret": "lies outside of the directory",
        str(tmp_path / "secret"): "lies outside of the directory",
        "x/../../secret": "lies outside of the directory",
        "/proc/self/mem": "lies outside of the directory",
        "link": "is a symbolic link to",
        "fifo": "missing",
        "nothing": "missing",
        "x\0y": "lies outside",
    }.items():
        changed = json.loads(json.dumps(lineage))
        changed["output"]["side_files"][name] = "0" * 64
        path.write_text(json.dumps(changed))
        found = compare(*read_lineage(str(tmp_path / "out")), 1)
        assert len(found) == 1, (name, found)
        assert why in found[0], (name, found)


def test_a_damaged_lineage_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "a", {"w": torch.ones(2)}, {})
    stockpot.merge({"merge_method": "linear", "models": [str(tmp_path / "a")]}, tmp_path / "out")
    path = tmp_path / "out/stockpot.json"
    whole = json.loads(path.read_text())
    assert damage(whole) == ""
    for keys, value, told in (
        (("format",), "1", "format: expected a number, got str"),
        (("output",), [], "output: expected a mapping, got list"),
        (("output", "files"), {}, "output.files: expected a list"),
        (("output", "files"), [{"name": 3}], "output.files: an entry without its name"),
        (("output", "tensors", "w"), None, "output.tensors: an entry without its dtype"),
        (("output", "side_files", "x"), 3, "output.side_files: expected digests"),
        (("inputs",), [3], "inputs: an entry without its model"),
        (("gates",), [], "gates: expected a mapping"),
        (("packages",), 2, "packages: expected a mapping"),
        (("notes",), {}, "notes: expected a list"),
        (("inputs", 0, "parts"), 5, "inputs: parts: expected a list"),
    ):
        doc = json.loads(json.dumps(whole))
        owner = doc
        for key in keys[:-1]:
            owner = owner[key]
        owner[keys[-1]] = value
        path.write_text(json.dumps(doc))
        with pytest.raises(VerificationError, match=re.escape(told)):
            read_lineage(str(tmp_path / "out"))


# patterns of adapters


def peft(patterns: dict[str, int], module: str) -> int:
    """As PEFT reads them."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), -1)


def test_patterns_are_matched_as_peft_does() -> None:
    modules = ["q_proj", "xq_proj", "layersX1.q", "layers.1.q", "a.b", "aXb", "b", ""]
    modules += ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj"]
    for patterns in (
        {"q_proj": 1, "layers.1.self_attn.q_proj": 2},
        {"layers.1.self_attn.q_proj": 2, "q_proj": 1},
        {"layers.1.q": 1, "a.b": 2, "b": 3},
        {r"layers\.\d+\.self_attn\.q_proj": 1, ".*": 2},
        {r"model\.layers\.(1|11)\..*": 1, "[ab].b": 2, "q_pro[jk]": 3},
        {"": 4, "b": 5},
        {"x.*": 1, "q_proj": 2},
        {".": 1, "..": 2, "...": 3},
        {r"(?:.*\.)?q_proj": 1},
        {r".*layers\.\d+\..*q_proj": 1, r".*\.layers\.(0|1)\..*q_proj.*": 2},
        {"(model|text_model)?.*q_proj": 1, "^q_proj$": 2},
        {"^model.layers.1.self_attn.q_proj": 1, "^q_proj": 2},
        {"(a$|b)": 1, "a$b": 2, "[^a]b": 3, "(a+)+b": 4, r"\w{1,3}": 5},
    ):
        found = Patterns(patterns)
        for module in modules:
            assert found.of(module, -1) == peft(patterns, module), (patterns, module)


def test_random_patterns_are_matched_as_peft_does() -> None:
    rnd = random.Random(0)
    atoms = ["a", "b", ".", "[ab]", r"\.", r"\w", r"\d", "q_proj", "(a|b)", "(a|)", "(ab)", "$", "^", "[^b]"]
    modules = ["q_proj", "a.b", "aXb", "b", "", "aab", "abab.b", "a_1.b-2", "ab.q_proj"]
    for _ in range(1500):
        pattern = "".join(
            rnd.choice(atoms) + rnd.choice(["", "", "*", "+", "?", "{1,2}", "*?"]) for _ in range(rnd.randrange(1, 5))
        )
        try:
            re.compile(pattern)
        except re.error:
            continue
        for module in modules:
            assert Patterns({pattern: 1}).of(module, -1) == peft({pattern: 1}, module), (pattern, module)


@pytest.mark.parametrize("pattern", ["(a+)+z", "(a|aa)*z", ".?" * 60 + "b", ".*a.*a.*a.*a.*z", "(a?){30}a{30}b"])
def test_patterns_can_not_run_wild(pattern: str) -> None:
    assert Patterns({pattern: 1}).of("a" * 300, -1) == -1


@pytest.mark.parametrize(
    "pattern", ["(?=a)b", r"(a)\1", "(?i)a", r"\bq", "(", "[", "a{99999}", "(a{200}){200}", "x" * 600 + "+"]
)
def test_patterns_that_are_not_followed_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"write the names out|is not a pattern|at most 512"):
        Patterns({pattern: 1})
    assert Patterns({"layers.0.q_proj": 1}).of("model.layers.0.q_proj", 2) == 1  # as it says


def test_many_patterns_are_looked_up() -> None:
    patterns = {f"model.layers.{i}.mlp.{p}": i for i in range(20_000) for p in ("up", "down")}
    found = Patterns(patterns)
    for i in range(0, 20_000, 7):
        assert found.of(f"base.model.layers.{i}.mlp.up", -1) == i


def test_no_traceback_without_a_terminal(evil: Path) -> None:
    """Output that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "stockpot", "inspect", str(evil)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert "Traceback" not in done.stderr
