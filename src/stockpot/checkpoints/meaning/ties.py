"""Tied weights: one matrix under two names (input embedding and output head), read once and written once.

transformers stores a tied pair under one name, other tools under both. Whether a pair is tied is known from the config, where
it is silent from the model type's default, and of types that nobody has described from the file: equal bytes. Two stored
tensors that differ are never one, whatever the config says: so transformers takes it too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stockpot.checkpoints.meaning.architectures import Architecture, architecture_of, default_of, part_types, renames_of
from stockpot.checkpoints.meaning.memory import pieces_of, without_wrappers
from stockpot.specs import Shape, TensorSpec

__all__ = ["Tie", "Ties", "find_ties", "is_embedding", "is_head"]

_HEADS = ("lm_head.weight", "embed_out.weight", "output_projection.weight", "cls.predictions.decoder.weight",
          "lm_head.decoder.weight", "vocab_projector.weight", "proj_out.weight", "pred_layer.proj.weight",
          "generator_lm_head.weight")  # fmt: skip
_EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
               "tok_embeddings.weight", "tok_embed.weight", "embedding.weight", "backbone.embeddings.weight",
               "transformer.embeddings.weight")  # fmt: skip
#: second names of an encoder-decoder's shared embedding, tied whatever `tie_word_embeddings` says
_SHARED_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
#: types that tie their shared embedding whatever the config says
_ALWAYS = frozenset(("t5", "mt5", "umt5", "longt5", "pop2piano", "udop"))
#: biases that are one: (second name, the one that counts)
_BIASES = (("cls.predictions.decoder.bias", "cls.predictions.bias"), ("lm_head.decoder.bias", "lm_head.bias"))


_HEAD_ENDS = tuple(f".{h}" for h in _HEADS)
_EMBEDDING_ENDS = tuple(f".{e}" for e in (*_EMBEDDINGS, *_SHARED_COPIES))


def is_head(name: str) -> bool:
    """Whether a name is that of an output head which may be tied to the embedding."""
    return name in _HEADS or name.endswith(_HEAD_ENDS)


def is_embedding(name: str) -> bool:
    """Whether a name is that of an embedding of tokens."""
    return name in _EMBEDDINGS or name in _SHARED_COPIES or name.endswith(_EMBEDDING_ENDS)


@dataclass(frozen=True)
class Tie:
    """Two names of one matrix.

    second, first  the name that is left out where both are stored, and the one that counts
    tied           True, False, or None where nobody says
    known          from what: "config.json", "the default of gemma2", "always", "equal bytes"
    key            where in the config the word on it stands: pairs of one key are untied together
    """

    second: str
    first: str
    tied: bool | None
    known: str
    key: str = ""


@dataclass(frozen=True)
class Ties:
    """The pairs of one checkpoint.

    pairs       all that its class may tie, of which at least one name is stored
    duplicates  stored second names of tied tensors -> the stored name that counts
    apart       (second, first) that the config ties and the file holds with different values
    copies      stored second names that nobody says are tied, with the bytes of the other one
    """

    pairs: tuple[Tie, ...]
    duplicates: Mapping[str, str]
    apart: tuple[tuple[str, str], ...] = ()
    copies: frozenset[str] = frozenset()

    def stands_alone(self, name: str, stored: Container[str]) -> bool:
        """Whether a stored tensor that elsewhere is tied is one of its own here: no copy, and not the only name of the matrix."""
        if name in self.copies:
            return False
        own = self._by_name[0].get(name, [])
        return is_head(name) if not own else not any(t.tied and t.first not in stored for t in own)

    def alias(self, name: str, stored: Container[str]) -> str | None:
        """The stored tensor that an absent name stands for; None where the config unties them, or there is none."""
        seconds, firsts = self._by_name
        for tie in seconds.get(name, ()):
            if tie.tied is not False and tie.first in stored:
                return tie.first
        for tie in firsts.get(name, ()):
            if tie.tied and tie.second in stored:
                return tie.second
        if is_head(name) and name not in seconds:  # another class's name for the head
            head = self._head
            return head.first if head is not None and head.tied is not False and head.first in stored else None
        return None

    @functools.cached_property
    def _by_name(self) -> tuple[dict[str, list[Tie]], dict[str, list[Tie]]]:
        """The pairs by their second names, by those that count."""
        seconds: dict[str, list[Tie]] = {}
        firsts: dict[str, list[Tie]] = {}
        for tie in self.pairs:
            seconds.setdefault(tie.second, []).append(tie)
            firsts.setdefault(tie.first, []).append(tie)
        return seconds, firsts

    @functools.cached_property
    def _head(self) -> Tie | None:
        return next((t for t in self.pairs if is_head(t.second)), None)

    def together(self, names: Iterable[str]) -> list[str]:
        """Second names that become tensors of their own where some are untied: their config has one word for all of a key."""
        wanted = set(names)
        keys = {t.key for t in self.pairs if t.second in wanted or t.first in wanted}
        return [t.second for t in self.pairs if t.key in keys and t.tied and t.known != "always"]

    def twins(self) -> set[str]:
        """Names of tensors that are one with another, stored or not."""
        apart = set(self.apart)
        found = [t for t in self.pairs if t.tied and (t.second, t.first) not in apart]
        return {n for t in found for n in (t.second, t.first)} | set(self.duplicates) | set(self.duplicates.values())


def find_ties(specs: Mapping[str, TensorSpec], config: Mapping[str, Any], same: Callable[[str, str], bool]) -> Ties:
    """The ties of a checkpoint. same: whether two stored tensors of one shape hold the same bytes."""
    architecture = architecture_of(config, specs)
    pairs = {t.second: t for t in _declared(architecture, specs, config)}
    general = _said_anywhere(config)
    for tie in _by_suffix(specs, general, described=architecture is not None):
        pairs.setdefault(tie.second, tie)
    duplicates: dict[str, str] = {}
    apart, copies = [], set()
    for second, tie in list(pairs.items()):
        if second not in specs or tie.first not in specs or tie.tied is False:
            continue
        if specs[second].shape != specs[tie.first].shape:
            continue
        equal = same(second, tie.first)
        if tie.tied is None:
            pairs[second] = Tie(
                second, tie.first, None if equal else False, f"{'equal' if equal else 'different'} bytes"
            )
            copies |= {second} if equal else set()
        elif equal:
            duplicates[second] = tie.first
        else:
            apart.append((second, tie.first))
    return Ties(tuple(pairs.values()), duplicates, tuple(apart), frozenset(copies))


def _declared(
    architecture: Architecture | None, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> Iterable[Tie]:
    """What the model's class ties, under the names of the file."""
    if architecture is None or not architecture.ties:
        return
    head = f"{architecture.prefix}." if architecture.prefix else ""
    wanted = {n.removeprefix(head) for t in architecture.ties for n in t[:2]}
    ends = {n.rpartition(".")[2] for n in wanted}
    plain, _ = without_wrappers(specs)
    renames = renames_of(architecture, config)
    stored: dict[str, str] = {}
    for name in specs:
        if name.rpartition(".")[2] not in ends or plain[name].count(".") > 7:
            continue
        for key in {
            plain[name],
            *(p.key for p in pieces_of(plain[name], renames, architecture.prefix) if p.part == ()),
        }:
            if key.removeprefix(head) in wanted:
                stored.setdefault(key.removeprefix(head), name)
    for second, first, path in architecture.ties:
        a, b = second.removeprefix(head), first.removeprefix(head)
        if a in stored or b in stored:
            tied, known = _word(config, path)
            copies = any(a == c or a.endswith("." + c) for c in _SHARED_COPIES) and b.endswith("shared.weight")
            if copies and architecture.model_type in _ALWAYS:
                tied, known = True, "always"
            yield Tie(stored.get(a, second), stored.get(b, first), tied, known, path)


def _word(config: Mapping[str, Any], path: str) -> tuple[bool | None, str]:
    """(whether the part of a config at a path ties its embeddings, how that is known)."""
    if path == "?":
        return None, "nobody says"
    part: Any = config
    kind: Any = config.get("model_type")
    for key in filter(None, path.split(".")):
        inner = part.get(key) if isinstance(part, Mapping) else None
        kind = (inner.get("model_type") if isinstance(inner, Mapping) else None) or part_types(kind).get(key)
        part = inner
    said = part.get("tie_word_embeddings") if isinstance(part, Mapping) else None
    if isinstance(said, bool):
        return said, f"config.json{': ' + path if path else ''}"
    default = default_of(kind, "tie_word_embeddings")
    return (default, f"the default of {kind}") if isinstance(default, bool) else (None, "nobody says")


def _said_anywhere(config: Mapping[str, Any]) -> tuple[bool | None, str]:
    """For classes that no table has: what the config says, in whatever part."""
    for path in ("", "text_config", "decoder"):
        part: Any = config if not path else config.get(path)
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"]), f"config.json{': ' + path if path else ''}"
    return None, "nobody says"


def _by_suffix(specs: Mapping[str, TensorSpec], word: tuple[bool | None, str], *, described: bool) -> Iterable[Tie]:
    """Pairs by the usual names of heads, embeddings and their biases. described: the class has said all that it ties."""
    if described:
        word = (False, "its class does not tie them")
    heads = [n for n in specs if is_head(n)] or ["lm_head.weight"]
    found = _embeddings(specs)
    for name in heads:
        spec = specs.get(name)
        embedding = found.get(None if spec is None else spec.shape)
        if embedding is not None and embedding != name:
            yield Tie(name, embedding, *word)
    for name, spec in specs.items():
        for suffix in _SHARED_COPIES:
            if name == suffix or name.endswith("." + suffix):
                shared = name[: len(name) - len(suffix)] + "shared.weight"
                if shared in specs and specs[shared].shape == spec.shape:
                    yield Tie(name, shared, *(word if word[0] is False else (True, "always")))
        for second, first in _BIASES:
            if name == second and first in specs:
                yield Tie(second, first, *(word if word[0] is False else (True, "always")))


def _embeddings(specs: Mapping[str, TensorSpec]) -> dict[Shape | None, str]:
    """For each shape the embedding of tokens that has it, by the likeliest of the usual names; under None of whatever shape."""
    found: dict[Shape | None, tuple[int, str]] = {}
    for name, spec in specs.items():
        rank = next((i for i, e in enumerate(_EMBEDDINGS) if name == e or name.endswith("." + e)), None)
        for key in (spec.shape, None) if rank is not None else ():
            if key not in found or rank < found[key][0]:  # type: ignore[operator]
                found[key] = (rank, name)  # type: ignore[assignment]
    return {key: name for key, (_, name) in found.items()}
