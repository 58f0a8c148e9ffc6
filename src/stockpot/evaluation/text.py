"""The built-in evaluators: held-out loss, multiple choice by log-likelihood, generation with exact match."""

from __future__ import annotations

import hashlib
import json
import re
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stockpot.errors import EvaluationError
from stockpot.evaluation.documents import Document
from stockpot.evaluation.scores import Progress, Scores
from stockpot.evaluation.suite import Slice, Suite

if TYPE_CHECKING:
    from stockpot.evaluation.loaded import LoadedModel

__all__ = ["ChoiceEvaluator", "GenerationEvaluator", "LossEvaluator", "normalized"]

_DEFAULT_LENGTH = 1024
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class _DocumentEvaluator:
    """What the evaluators over documents share. Tokens are made once for each tokenizer and kept."""

    slice: Slice
    suite: Suite
    documents: tuple[Document, ...]
    _encoded: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(d.id for d in self.documents)

    def only(self, ids: set[str]) -> Any:
        """The same over some of the documents."""
        return replace(self, documents=tuple(d for d in self.documents if d.id in ids), _encoded={})

    def identity(self) -> Any:
        """What decides the scores: options and documents to the last character, in their order."""
        exact = hashlib.sha256()
        for d in self.documents:
            exact.update(json.dumps([d.id, d.text, d.fields], sort_keys=True).encode())
        return [dict(self.slice.options), len(self.documents), exact.hexdigest()]

    def encoded(self, checkpoint: LoadedModel) -> Any:
        """What `encode` makes of the documents, kept until the tokenizer changes."""
        key = f"{checkpoint.tokenizer_digest} {checkpoint.max_length}"
        if key not in self._encoded:
            self._encoded.clear()
            self._encoded[key] = self.encode(checkpoint)
        return self._encoded[key]

    def encode(self, checkpoint: LoadedModel) -> Any:
        raise NotImplementedError

    def length(self, checkpoint: LoadedModel) -> int:
        """Most tokens that the model is given at once: `max_length`, 1024 by default, or what it takes."""
        return min(int(self.slice.options.get("max_length", _DEFAULT_LENGTH)), checkpoint.max_length)


@dataclass(frozen=True)
class LossEvaluator(_DocumentEvaluator):
    """Mean negative log-likelihood in nats a token, over all tokens of all documents but each one's first.

    A document longer than the model's window is cut into windows, each scored by itself. An example is a document, its
    count the number of tokens that were scored.
    """

    def encode(self, checkpoint: LoadedModel) -> Any:
        size = self.length(checkpoint)
        rows: list[tuple[int, list[int], int]] = []
        for index, document in enumerate(self.documents):
            tokens = checkpoint.encode(document.text)
            for start in range(0, len(tokens), size):
                window = tokens[start : start + size]
                if len(window) > 1:
                    rows.append((index, window, 1))
        return rows

    def score(self, checkpoint: LoadedModel, progress: Progress | None = None) -> Scores:
        from stockpot.evaluation.likelihood import log_likelihoods

        began = time.monotonic()
        rows = self.encoded(checkpoint)
        found = log_likelihoods(checkpoint, [(w, first) for _, w, first in rows], self.suite.batch_size, progress)
        total, count = np.zeros(len(self.documents)), np.zeros(len(self.documents))
        for (index, _, _), (value, n, _) in zip(rows, found, strict=True):
            total[index] -= value
            count[index] += n
        scored = count > 0
        if not scored.any():
            raise EvaluationError("no document is longer than one token, so there is nothing to predict")
        each = total[scored] / count[scored]
        loss = float(total.sum() / count.sum())
        ids = tuple(d.id for d, ok in zip(self.documents, scored) if ok)
        metrics = {"loss": loss, "perplexity": float(np.exp(loss))}
        return Scores(metrics, examples={"loss": each}, counts=count[scored], ids=ids, seconds=time.monotonic() - began)


@dataclass(frozen=True)
class ChoiceEvaluator(_DocumentEvaluator):
    """The choice with the highest log-likelihood after the prompt, as it is (accuracy) or by character (accuracy_norm).

    loss is the negative log-likelihood of the right choice among the choices: it tells more than right or wrong.
    """

    def encode(self, checkpoint: LoadedModel) -> Any:
        size = self.length(checkpoint)
        rows = []
        for document in self.documents:
            fields = document.fields or {}
            for choice in fields["choices"]:
                rows.append(_pair(checkpoint, fields["prompt"], choice, size))
        return rows

    def score(self, checkpoint: LoadedModel, progress: Progress | None = None) -> Scores:
        from stockpot.evaluation.likelihood import log_likelihoods

        began = time.monotonic()
        found = log_likelihoods(checkpoint, self.encoded(checkpoint), self.suite.batch_size, progress)
        right, right_norm, losses = [], [], []
        at = 0
        for document in self.documents:
            fields = document.fields or {}
            choices, answer = fields["choices"], fields["answer"]
            values = np.array([v for v, _, _ in found[at : at + len(choices)]])
            at += len(choices)
            right.append(float(values.argmax() == answer))
            right_norm.append(float((values / [max(len(c), 1) for c in choices]).argmax() == answer))
            top = values.max()
            losses.append(float(top + np.log(np.exp(values - top).sum()) - values[answer]))
        examples = {"accuracy": right, "accuracy_norm": right_norm, "loss": losses}
        return Scores(
            {k: float(np.mean(v)) for k, v in examples.items()}, examples=examples, ids=self.ids,
            seconds=time.monotonic() - began,
        )  # fmt: skip


@dataclass(frozen=True)
class GenerationEvaluator(_DocumentEvaluator):
    """Greedy generation after the prompt, compared with the accepted answers once both are normalised.

    exact_match; length, the tokens generated; truncated, whether none of the stops was reached.
    """

    def encode(self, checkpoint: LoadedModel) -> Any:
        room = max(checkpoint.max_length - self._new_tokens, 1)
        return [checkpoint.encode((d.fields or {})["prompt"])[-room:] for d in self.documents]

    @property
    def _new_tokens(self) -> int:
        return int(self.slice.options.get("max_new_tokens", 64))

    def score(self, checkpoint: LoadedModel, progress: Progress | None = None) -> Scores:
        from stockpot.evaluation.likelihood import generated

        began = time.monotonic()
        options = self.slice.options
        stop = _listed(options.get("stop", ["\n"]))
        steps = _listed(options.get("normalize", ["strip"]))
        extract = re.compile(options["extract"]) if "extract" in options else None
        texts = generated(checkpoint, self.encoded(checkpoint), self._new_tokens, stop, self.suite.batch_size, progress)
        right, length, truncated = [], [], []
        for document, (text, n, stopped) in zip(self.documents, texts, strict=True):
            if extract is not None:
                match = extract.search(text)
                text = "" if match is None else (match[1] or "") if match.groups() else match[0]
            accepted = {normalized(a, steps) for a in (document.fields or {})["answer"]}
            right.append(float(normalized(text, steps) in accepted))
            length.append(float(n))
            truncated.append(float(not stopped))
        examples = {"exact_match": right, "length": length, "truncated": truncated}
        return Scores(
            {k: float(np.mean(v)) for k, v in examples.items()}, examples=examples, ids=self.ids,
            seconds=time.monotonic() - began,
        )  # fmt: skip


def _listed(value: Any) -> list[str]:
    return list(value) if isinstance(value, list) else [value]


def _pair(checkpoint: LoadedModel, prompt: str, choice: str, size: int) -> tuple[list[int], int]:
    """(tokens of prompt and choice, where the choice begins). Space at the prompt's end belongs to the choice."""
    kept = prompt.rstrip()
    choice = prompt[len(kept) :] + choice if len(kept) < len(prompt) else choice
    whole, head = checkpoint.encode(kept + choice), checkpoint.encode(kept)
    first = min(len(head), len(whole) - 1)
    cut = max(len(whole) - size, 0)
    return whole[cut:], max(first - cut, 1)


def normalized(text: str, steps: Sequence[str]) -> str:
    """strip, lower, spaces (runs to one), punctuation, articles (removed), numbers (the last one in it), in this order."""
    if "lower" in steps:
        text = text.lower()
    if "numbers" in steps:
        found = re.findall(r"-?\d[\d,]*\.?\d*", text)
        text = found[-1].replace(",", "").rstrip(".") if found else ""
    if "punctuation" in steps:
        text = text.translate(str.maketrans("", "", string.punctuation))
    if "articles" in steps:
        text = _ARTICLES.sub(" ", text)
    if "spaces" in steps or "articles" in steps:
        text = re.sub(r"\s+", " ", text)
    return text.strip() if {"strip", "spaces", "articles"} & set(steps) else text
