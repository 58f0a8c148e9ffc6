"""Suites and their data: what is read, what is refused and how, how documents are divided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stockpot.errors import ProblemsError, StockpotError, SuiteError
from stockpot.evaluation.documents import document_id, filled, in_selection
from stockpot.evaluation.parts import open_parts
from stockpot.evaluation.suite import Suite, load_suite
from stockpot.evaluation.text import normalized

GOOD = """
base: base
batch_size: 4
timeout: 60
slices:
  - {name: code, kind: loss, data: code.txt, weight: 0.3}
  - {name: sums, kind: exact_match, data: sums.jsonl, weight: 0.7, max_new_tokens: 5, stop: ["\\n", ";"], timeout: 5}
  - {name: quiz, kind: choice, data: quiz.jsonl, weight: 0, split: report}
gates:
  - {slice: code, max: 4.7}
  - {slice: score, reference: base, max_drop: 0.1, severity: warning, min_examples: 3}
  - {slice: quiz, expert: experts/quiz, max_drop_percent: 5}
"""


def write(folder: Path, text: str) -> Path:
    (folder / "code.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    sums = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(40)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    quiz = [{"prompt": f"after {i}?", "choices": [str(i + 1), str(i - 1)], "answer": i % 2} for i in range(40)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, quiz)))
    (folder / "suite.yml").write_text(text)
    return folder / "suite.yml"


def test_a_suite_is_read(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, GOOD))
    code, sums, quiz = suite.slices
    assert (code.metric, code.direction, code.weight, code.split, code.timeout) == ("loss", "min", 0.3, "auto", 60)
    assert (sums.metric, sums.direction, sums.timeout, sums.options["stop"]) == ("exact_match", "max", 5, ["\n", ";"])
    assert quiz.split == "report"
    assert suite.batch_size == 4
    assert [g.reference for g in suite.gates] == [None, "base", "experts/quiz"]
    assert suite.gates[2].percent
    assert suite.gates[2].max_drop == 5
    # directions differ: what is better low counts negative
    assert suite.direction == "max"
    assert suite.score({"code": 2.0, "sums": 0.5, "quiz": 1.0}) == pytest.approx(0.7 * 0.5 - 0.3 * 2.0)


def test_documents_are_divided_and_never_shared(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, GOOD))
    parts = {(p.slice.name, p.split): p for p in open_parts(suite)}
    assert set(parts) == {
        ("code", "selection"),
        ("code", "report"),
        ("sums", "selection"),
        ("sums", "report"),
        ("quiz", "report"),
    }
    a, b = parts["sums", "selection"].evaluator.ids, parts["sums", "report"].evaluator.ids
    assert len(a) + len(b) == 40
    assert not set(a) & set(b)
    assert all(in_selection(i, 0.5) for i in a)
    keys = {p.info(suite).key for p in parts.values()}
    assert len(keys) == len(parts)


def test_keys_change_with_what_is_scored_and_only_then(tmp_path: Path) -> None:
    def keys(text: str = GOOD) -> dict[tuple[str, str], str]:
        suite = load_suite(write(tmp_path, text))
        return {(p.slice.name, p.split): p.info(suite).key for p in open_parts(suite)}

    before = keys()
    assert (
        keys(GOOD.replace("weight: 0.3", "weight: 0.4").replace("batch_size: 4", "batch_size: 8") + "# a comment\n")
        == before
    )
    other = keys(GOOD.replace("max_new_tokens: 5", "max_new_tokens: 6"))
    assert {k for k in before if before[k] != other[k]} == {("sums", "selection"), ("sums", "report")}
    quiz = (tmp_path / "quiz.jsonl").read_text()
    (tmp_path / "quiz.jsonl").write_text(
        quiz + "\n" + json.dumps({"prompt": "new?", "choices": ["a", "b"], "answer": "b"})
    )
    suite = load_suite(tmp_path / "suite.yml")
    assert {(p.slice.name, p.split): p.info(suite).key for p in open_parts(suite)}["quiz", "report"] != before[
        "quiz", "report"
    ]


def test_data_used_to_choose_is_not_reported_on(tmp_path: Path) -> None:
    text = """slices:
  - {name: choose, kind: loss, data: code.txt, split: selection}
  - {name: tell, kind: loss, data: same.txt, split: report}
"""
    path = write(tmp_path, text)
    lines = (tmp_path / "code.txt").read_text()
    (tmp_path / "same.txt").write_text("something else entirely\n" * 100 + lines[-1500:])
    suite = load_suite(path)
    assert open_parts(suite)  # cut at other places, so no document is the same
    (tmp_path / "same.txt").write_text(lines)
    with pytest.raises(
        SuiteError, match=r"documents of slice 'choose' .* slice 'tell'|in slice 'choose' \(split selection\) too"
    ):
        open_parts(suite)


BAD = {
    "unknown metric": ("{name: a, kind: loss, data: code.txt, metric: los}", r"got 'los'; did you mean 'loss'"),
    "unknown kind": ("{name: a, kind: chioce, data: quiz.jsonl}", r"did you mean 'choice'"),
    "unknown key": ("{name: a, kind: loss, data: code.txt, wieght: 1}", r"unknown key 'wieght'.*did you mean 'weight'"),
    "no name": ("{kind: loss, data: code.txt}", "'name' is missing"),
    "no data": ("{name: a, kind: loss}", "'data' is missing"),
    "no file": ("{name: a, kind: loss, data: cod.txt}", r"no such file; did you mean 'code.txt'"),
    "weight": ("{name: a, kind: loss, data: code.txt, weight: -1}", "weight: expected a number of at least 0"),
    "split": ("{name: a, kind: loss, data: code.txt, split: test}", "expected one of selection, report, auto"),
    "all weights zero": ("{name: a, kind: loss, data: code.txt, weight: 0}", "there is no score"),
    "command without metric": ("{name: a, kind: command, command: 'x {split}'}", "'metric' is missing"),
    "command without split": ("{name: a, kind: command, command: x, metric: acc}", "can't be divided"),
    "direction": ("{name: a, kind: command, command: 'x {split}', metric: zork}", "give direction"),
    "function": ("{name: a, kind: python, function: 'os.system', metric: acc}", "expected module:name"),
    "module": ("{name: a, kind: python, function: 'no_such_module_here:f', metric: acc}", "can't be imported"),
    "attribute": ("{name: a, kind: python, function: 'json:dump_s', metric: acc}", r"has no 'dump_s'; did you mean 'dumps'"),
    "function without split": ("{name: a, kind: python, function: 'json:dumps', metric: acc}", "can't be divided"),
    "field": ("{name: a, kind: loss, data: sums.jsonl, field: promt}", r"no text in field 'promt'.*did you mean 'prompt'"),
    "prompt": ("{name: a, kind: exact_match, data: sums.jsonl, prompt: question}", "no text in field 'question'"),
    "template": ("{name: a, kind: exact_match, data: sums.jsonl, template: 'Q: {question}'}",
                 "template: no text in field 'question'"),
    "choices": ("{name: a, kind: choice, data: sums.jsonl}", "expected a list of at least two texts"),
    "text as task": ("{name: a, kind: choice, data: code.txt}", "needs JSON lines"),
    "empty": ("{name: a, kind: loss, data: empty.txt}", "holds no documents"),
    "empty jsonl": ("{name: a, kind: choice, data: empty.jsonl}", "holds no documents"),
    "not JSON": ("{name: a, kind: choice, data: broken.jsonl}", r"broken.jsonl:2: not valid JSON"),
    "half a character": ("{name: a, kind: loss, data: half.jsonl}", r"half.jsonl:1: .* is half a character"),
    "not text": ("{name: a, kind: loss, data: binary.txt}", "not a text file in UTF-8"),
    "one document": ("{name: a, kind: loss, data: one.jsonl}", "too few different documents"),
    "normalize": ("{name: a, kind: exact_match, data: sums.jsonl, normalize: lowr}", "did you mean 'lower'"),
    "extract": ("{name: a, kind: exact_match, data: sums.jsonl, extract: '('}", "not a regular expression"),
    "chunk": ("{name: a, kind: loss, data: code.txt, chunk: 1}", "whole number of at least 16"),
    "limit of a command": ("{name: a, kind: command, command: 'x {split}', metric: acc, limit: 3}", "chooses its examples by"),
    "prompt and template": ("{name: a, kind: exact_match, data: sums.jsonl, template: x, prompt: q}", "no effect beside"),
    "chunk of rows": ("{name: a, kind: loss, data: sums.jsonl, field: prompt, chunk: 50}", "chunk has no effect on JSON lines"),
    "field of text": ("{name: a, kind: loss, data: code.txt, field: text}", "field has no effect on plain text"),
    "a list": ("[a]", "expected a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(tmp_path: Path, name: str) -> None:
    line, message = BAD[name]
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(
        json.dumps({"prompt": "a", "choices": ["x", "y"], "answer": 0}) + "\n{oops\n"
    )
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00abc")
    (tmp_path / "half.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    (tmp_path / "one.jsonl").write_text('{"text": "only this"}\n{"text": "only this"}\n')
    path = write(tmp_path, f"slices:\n  - {line}\n")
    with pytest.raises(StockpotError, match=message) as caught:
        open_parts(load_suite(path))
    assert caught.value.exit_code == 2
    assert "suite.yml:" in str(caught.value)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    text = """sliecs: []
dtype: float23
slices:
  - {name: a, kind: loss, data: code.txt, metric: bleu}
  - {name: a, kind: loss, data: code.txt}
gates:
  - {slice: b, max: 1}
  - {slice: a}
  - {slice: a, reference: base}
  - {slice: a, min: 1, max: 2}
  - {slice: a, reference: expert, max_drop: 1}
  - {slice: a, max_drop: 1, max: 2}
"""
    with pytest.raises(ProblemsError) as caught:
        load_suite(write(tmp_path, text))
    said = str(caught.value)
    for part in ("unknown key 'sliecs'", "dtype", "'bleu'", "the name is taken", "no slice 'b'", "exactly one of min, max",
                 "max_drop or max_drop_percent", "needs 'expert'", "needs a reference"):  # fmt: skip
        assert part in said
    assert all(isinstance(p, SuiteError) for p in caught.value.problems)


def test_a_suite_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(SuiteError, match=r"did you mean 'suite\.yml'"):
        load_suite(tmp_path / "suit.yml")
    with pytest.raises(SuiteError, match="not valid YAML"):
        load_suite(write(tmp_path, "slices: [\n"))
    with pytest.raises(SuiteError, match="a suite needs at least slices"):
        load_suite(write(tmp_path, "# nothing\n"))
    with pytest.raises(SuiteError, match=r"suite.yml:1: YAML tag '!x' is not allowed in a suite"):
        load_suite(write(tmp_path, "slices: !x [1]\n"))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path, "slices: [{name: a, kind: loss, data: marked.jsonl, split: report}]")
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "some text"}\n')
    (part,) = open_parts(load_suite(path))
    assert part.evaluator.ids == (document_id("some text"),)


def test_text_is_cut_at_lines(tmp_path: Path) -> None:
    text = "slices: [{name: a, kind: loss, data: code.txt, chunk: 100, split: selection}]"
    suite: Suite = load_suite(write(tmp_path, text))
    (part,) = open_parts(suite)
    documents = part.evaluator.documents  # type: ignore[attr-defined]
    assert "".join(d.text for d in documents) == (tmp_path / "code.txt").read_text()
    assert all(d.text.endswith("\n") and len(d.text) < 140 for d in documents)
    assert document_id(" a\n") == document_id("a")


def test_templates_and_normalisation() -> None:
    assert filled("Q: {q}\n{{x}} A:", {"q": 3}, "here") == "Q: 3\n{x} A:"
    assert normalized(" The Answer, is 42. ", ["lower", "punctuation", "articles", "spaces"]) == "answer is 42"
    assert normalized("so 1,234.5 it is 17.", ["numbers"]) == "17"
    assert normalized(" a ", []) == " a "
