"""The documents of a slice: text or JSON lines, each with a digest; divided between selection and report by these."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stockpot.errors import SuiteError, nearest, nearest_file
from stockpot.evaluation.suite import Slice, Suite
from stockpot.files import read_text

__all__ = ["Document", "document_id", "filled", "in_selection", "read_documents"]

_MAX_BYTES = 4 * 2**30
_TEXT_ENDINGS = (".txt", ".md", ".text")
_JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
DEFAULT_CHUNK = 2000


@dataclass(frozen=True)
class Document:
    """One example. `id` is a digest of what is scored: equal for equal content, wherever it lies.

    text     for loss
    fields   for the other kinds: prompt, answer, choices
    """

    id: str
    text: str = ""
    fields: Mapping[str, Any] | None = None
    line: int = 0


def document_id(content: str) -> str:
    """SHA-256 of the content without space around it, 24 hexadecimal digits."""
    return hashlib.sha256(content.strip().encode("utf-8", "surrogatepass")).hexdigest()[:24]


def in_selection(document: str, share: float) -> bool:
    """Whether a document (by its id) belongs to the selection half: decided by the id alone, so equal ones stay together."""
    return int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) / 2**32 < share


def read_documents(part: Slice, suite: Suite) -> list[Document]:
    """Every document of a slice, in the order of its file. Raises SuiteError."""
    assert part.data is not None
    path = suite.locate(part.data)
    where = f"{suite.path}:{part.line}: slice {part.name!r}"
    if not os.path.isfile(path):
        raise SuiteError(f"{where}: data: {_missing(path)}")
    ending = os.path.splitext(path)[1].lower()
    language = part.kind in ("loss", "perplexity")
    unused, what = ("chunk", "JSON lines") if ending in _JSON_ENDINGS else ("field", "plain text")
    if unused in part.options:
        raise SuiteError(f"{where}: {unused} has no effect on {what} ({path}): remove it")
    if ending in _JSON_ENDINGS:
        rows = _rows(path, where)
        found = [
            _text_row(r, n, part, where, path) if language else _task_row(r, n, part, where, path) for n, r in rows
        ]
    elif ending in _TEXT_ENDINGS or language:
        if not language:
            raise SuiteError(
                f"{where}: data: {path}: kind {part.kind} needs JSON lines (.jsonl) with a prompt and an answer"
            )
        found = [
            Document(document_id(text), text) for text in _chunks(path, where, part.options.get("chunk", DEFAULT_CHUNK))
        ]
    else:
        known = ", ".join((*_TEXT_ENDINGS, *_JSON_ENDINGS))
        raise SuiteError(f"{where}: data: {path}: expected a file ending in {known}")
    if part.limit is not None:
        found = found[: part.limit]
    if not found:
        raise SuiteError(f"{where}: data: {path} holds no documents")
    return found


def _missing(path: str) -> str:
    if os.path.isdir(path):
        return f"{path} is a directory; expected a file"
    return f"{path}: no such file{nearest_file(path)}"


def _read(path: str, where: str) -> str:
    return read_text(
        path, "the documents of a slice: give a sample", SuiteError, most=_MAX_BYTES, where=f"{where}: data: "
    )


def _rows(path: str, where: str) -> list[tuple[int, dict[str, Any]]]:
    """(line, object) of JSON lines, or of one JSON list."""
    text = _read(path, where)
    if text.lstrip().startswith("["):
        try:
            rows: Iterable[tuple[int, Any]] = enumerate(json.loads(text), 1)
        except (ValueError, RecursionError) as e:
            raise SuiteError(f"{where}: data: {path}: not valid JSON: {e}") from e
    else:
        rows = _lines(text, path, where)
    out = []
    for number, row in rows:
        if not isinstance(row, dict):
            raise SuiteError(f"{where}: data: {path}:{number}: expected a JSON object, got {json.dumps(row)[:60]}")
        out.append((number, row))
    return out


def _lines(text: str, path: str, where: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as e:
            raise SuiteError(f"{where}: data: {path}:{number}: not valid JSON: {e}") from e


def _chunks(path: str, where: str, size: int) -> Iterator[str]:
    """Text cut at line ends into documents of about `size` characters: whole lines until it is reached."""
    lines: list[str] = []
    held = 0
    for line in _read(path, where).splitlines(keepends=True):
        lines.append(line)
        held += len(line)
        if held >= size:
            yield "".join(lines)
            lines, held = [], 0
    if "".join(lines).strip():
        yield "".join(lines)


def _text_row(row: dict[str, Any], number: int, part: Slice, where: str, path: str) -> Document:
    name = part.options.get("field", "text")
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        known = ", ".join(row) or "none"
        hint = nearest(name, row) if name not in row else ""
        raise SuiteError(f"{where}: data: {path}:{number}: no text in field {name!r}; fields are {known}{hint}")
    _check_text(text, f"{where}: data: {path}:{number}")
    return Document(document_id(text), text, line=number)


def _task_row(row: dict[str, Any], number: int, part: Slice, where: str, path: str) -> Document:
    """prompt and answer, and choices for multiple choice."""
    at = f"{where}: data: {path}:{number}"
    template = part.options.get("template")
    if template is not None:
        prompt = filled(template, row, at)
    else:
        prompt = _field(row, part.options.get("prompt", "prompt"), at)
    fields: dict[str, Any] = {"prompt": prompt}
    answer_name = part.options.get("answer", "answer")
    if part.kind == "choice":
        name = part.options.get("choices", "choices")
        choices = row.get(name)
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            hint = nearest(name, row) if name not in row else ""
            raise SuiteError(f"{at}: {name!r}: expected a list of at least two texts, got {choices!r}{hint}")
        answer = row.get(answer_name)
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            hint = nearest(answer_name, row) if answer_name not in row else ""
            raise SuiteError(
                f"{at}: {answer_name!r}: expected one of the choices, or its number from 0 to {len(choices) - 1}; "
                f"got {answer!r}{hint}"
            )
        fields |= {"choices": choices, "answer": answer}
    else:
        raw = row.get(answer_name)
        accepted = [_text(a) for a in raw] if isinstance(raw, list) and raw else [_text(raw)]
        if any(a is None for a in accepted):
            hint = nearest(answer_name, row) if answer_name not in row else ""
            raise SuiteError(
                f"{at}: {answer_name!r}: expected a text, a number, or a list of accepted ones; got {raw!r}{hint}"
            )
        fields["answer"] = accepted
    _check_text(json.dumps(fields, ensure_ascii=False), at)
    return Document(document_id(json.dumps(fields, sort_keys=True, ensure_ascii=False)), fields=fields, line=number)


def _check_text(text: str, at: str) -> None:
    """JSON can hold halves of characters, which no tokenizer takes. Raises SuiteError."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise SuiteError(f"{at}: {text[e.start]!r} is half a character (a lone surrogate)") from e


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _field(row: Mapping[str, Any], name: str, at: str) -> str:
    value = _text(row.get(name))
    if value is None or not value:
        known = ", ".join(row) or "none"
        hint = nearest(name, row) if name not in row else ""
        raise SuiteError(f"{at}: no text in field {name!r}; fields are {known}{hint}")
    return value


def filled(template: str, row: Mapping[str, Any], at: str) -> str:
    """`Q: {question}` with the row's fields; braces in pairs stand for themselves. Nothing is evaluated."""

    def put(match: re.Match[str]) -> str:
        return match[0][0] if match[0] in ("{{", "}}") else _field(row, match[1], f"{at}: template")

    return re.sub(r"\{\{|\}\}|\{(\w+)\}", put, template)


def check_apart(selection: Mapping[str, Sequence[str]], report: Mapping[str, Sequence[str]], suite: Suite) -> None:
    """Refuse documents that are used to choose and to report. Both: ids of documents by slice. Raises SuiteError."""
    where = {i: name for name, ids in selection.items() for i in ids}
    clashes: dict[tuple[str, str], int] = {}
    for name, ids in report.items():
        for i in dict.fromkeys(ids):
            if i in where:
                clashes[where[i], name] = clashes.get((where[i], name), 0) + 1
    if clashes:
        (a, b), count = next(iter(clashes.items()))
        whole = sum(clashes.values())
        more = f" ({whole} in all)" if whole != count else ""
        raise SuiteError(
            f"{suite.path}: {count} documents of slice {b!r} (split report) are in slice {a!r} (split selection) too{more}: "
            "what was used to choose can't be reported on. Remove them from one, or leave split out: equal documents are "
            "then kept in one half"
        )
