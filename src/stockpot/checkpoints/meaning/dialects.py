"""One model under several names: what a tensor of one file is called, and how it is laid out, in another.

What a file is called depends on what it was loaded from before it was saved: `transformer.h.0` and `h.0`,
`language_model.model` and `model.language_model`, experts one by one or packed. Each tensor of a file is located in memory:
as a whole one, or as a part of one that memory packs. A view then gives one file's tensors under another file's names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.derived import files_of
from stockpot.checkpoints.joined import Joined, JoinedCheckpoint, Run, join
from stockpot.checkpoints.meaning.architectures import architecture_of, renames_of
from stockpot.checkpoints.meaning.buffers import is_computed
from stockpot.checkpoints.meaning.memory import Piece, pieces_of, without_wrappers
from stockpot.specs import TensorSpec

__all__ = ["Dialect", "Unified", "dialect_of", "unify"]


@dataclass(frozen=True)
class Dialect:
    """How the tensors of one checkpoint are named and laid out.

    pieces  tensor -> what of memory lies in it, in order
    """

    checkpoint: Checkpoint
    pieces: Mapping[str, tuple[Piece, ...]]

    def keys(self) -> dict[str, int]:
        """Names in memory, without the model's prefix -> elements."""
        found: Counter[str] = Counter()
        for name, pieces in self.pieces.items():
            numel = self.checkpoint.spec(name).numel
            for piece in pieces:
                found[piece.key] += numel // len(pieces)
        return dict(found)


def dialect_of(checkpoint: Checkpoint) -> Dialect:
    """Where every tensor of a checkpoint stands in memory."""
    plain, _ = without_wrappers(checkpoint.names())
    architecture = architecture_of(checkpoint.config, plain.values())
    prefix = architecture.prefix if architecture is not None else ""
    renames = renames_of(architecture, checkpoint.config)
    head = f"{prefix}." if prefix else ""
    pieces = {}
    for name in checkpoint.names():
        found = pieces_of(plain[name], renames, prefix)
        pieces[name] = tuple(replace(p, key=p.key.removeprefix(head)) for p in found)
    return Dialect(checkpoint, pieces)


@dataclass
class Unified:
    """A checkpoint under the names of another one.

    renamed   how many of the tensors have other names there than in their file
    example   one of them: (its own name, the other's)
    repacked  how many tensors are put together of parts, or are parts
    problems  layouts that can't be turned into each other, in words
    """

    checkpoint: Checkpoint
    renamed: int = 0
    example: tuple[str, str] = ("", "")
    repacked: int = 0
    problems: list[str] = field(default_factory=list)


def unify(like: Checkpoint, other: Checkpoint) -> Unified:
    """`other` under the names, and in the layout, of `like`; tensors that only it has keep their own names.

    Where the names are the same already it is `other` itself.
    """
    own, theirs = set(_weights(like)), set(_weights(other))
    if not theirs - own or not own - theirs:
        return Unified(other)
    a, b = dialect_of(like), dialect_of(other)
    twice = [why for why in (_twice(a), _twice(b)) if why]
    if twice:
        return Unified(other, problems=twice)
    found = _Translation(a, b)
    layout, specs = found.translated()
    if not layout:
        return Unified(other, problems=found.problems)
    for name in other.names():
        if name not in found.used and name not in specs:
            specs[name] = other.spec(name)
            layout[name] = join([Run(0, name, 0, 0, specs[name].numel)])
    made = JoinedCheckpoint(
        other.ref, other.path, other.kind, other.config, files_of([other]), sources=(other,), specs=specs, layout=layout
    )
    return Unified(made, found.renamed, found.example, found.repacked, found.problems)


def _weights(checkpoint: Checkpoint) -> Iterable[str]:
    tied = checkpoint.tied()
    return (n for n in checkpoint.names() if n not in tied and not is_computed(n, checkpoint.spec(n)))


def _twice(dialect: Dialect) -> str:
    """Two weights of a file that are one in memory, in words: which of them counts, nobody can say."""
    weights = set(_weights(dialect.checkpoint))
    seen: dict[object, str] = {}
    for name, pieces in dialect.pieces.items():
        for piece in pieces if name in weights else ():
            place = (piece.key, piece.index) if piece.part is None else (piece.key, piece.part, None)
            first = seen.setdefault(place, name)
            if first != name:
                return f"{first!r} and {name!r} of {dialect.checkpoint.ref} are one in memory: {piece.key!r}"
    return ""


class _Translation:
    """The names of one dialect for the tensors of another."""

    def __init__(self, like: Dialect, other: Dialect) -> None:
        self.like, self.other = like, other
        self.used: set[str] = set()
        self.renamed = self.repacked = 0
        self.example = ("", "")
        self.problems: list[str] = []
        self.places: dict[str, dict[tuple[int, ...], tuple[str, int, int]]] = {}  # key -> part -> tensor, which, of
        self.opaque: dict[tuple[str, tuple[int | None, int]], tuple[str, str]] = {}
        mine = like.keys()
        self.mine: dict[str, tuple[Piece, ...]] = dict(like.pieces)
        self.specs = {name: like.checkpoint.spec(name) for name in like.pieces}
        strips, adds = map(_leading, self.prefixes(mine))
        for name, pieces in other.pieces.items():
            for which, piece in enumerate(pieces):
                key = _moved(piece.key, mine, strips, adds)
                if piece.part is None:
                    self.opaque[key, piece.index] = (name, piece.how)
                else:
                    self.places.setdefault(key, {})[piece.part] = (name, which, len(pieces))
        self.deepen()
        self.parts: dict[str, list[tuple[tuple[int, ...], str]]] = {}  # of like: key -> its parts
        for name, pieces in self.mine.items():
            for piece in pieces:
                if piece.part:
                    self.parts.setdefault(piece.key, []).append((piece.part, name))
        for parts in self.parts.values():
            parts.sort()

    def deepen(self) -> None:
        """Names for layers that only the other one has: those of a layer that both have, with another number."""
        layers: dict[str, dict[int, list[str]]] = {}
        for name, pieces in self.like.pieces.items():
            found = _LAYER.match(name)
            if found is not None and _LAYER.match(pieces[0].key) is not None:
                layers.setdefault(found[1], {}).setdefault(int(found[2]), []).append(name)
        deepest: dict[str, int] = {}
        for key in self.places:
            found = _LAYER.match(key)
            if found is not None:
                deepest[found[1]] = max(deepest.get(found[1], -1), int(found[2]))
        for by_number in layers.values():
            stack = _LAYER.match(self.like.pieces[next(iter(by_number.values()))[0]][0].key)
            assert stack is not None
            for number in range(max(by_number) + 1, deepest.get(stack[1], -1) + 1):
                for template in sorted(by_number, reverse=True):
                    for name in by_number[template]:
                        new = _renumbered(name, number)
                        pieces = tuple(replace(p, key=_renumbered(p.key, number)) for p in self.like.pieces[name])
                        if new not in self.mine and all(p.key in self.places for p in pieces):
                            self.mine[new], self.specs[new] = pieces, self.specs[name]

    def prefixes(self, mine: Mapping[str, int]) -> tuple[str, str]:
        """(what the other's names have more, what they have less): a model within a model, such as the text model of one
        that sees. Both empty where nothing fits better than the names as they are, or two fit as well.
        """
        theirs = self.other.keys()
        straight = sum(theirs.get(k) == n for k, n in mine.items())
        adds, strips = _offsets(theirs, mine), _offsets(mine, theirs)
        add, many = _best(adds)
        strip, more = _best(strips)
        if max(many, more) <= straight:
            return "", ""
        smaller = min(len(mine), len(theirs))
        if 2 * max(many, more) < smaller:
            return "", ""
        return ("", add) if many >= more else (strip, "")

    def translated(self) -> tuple[dict[str, Joined], dict[str, TensorSpec]]:
        layout: dict[str, Joined] = {}
        specs: dict[str, TensorSpec] = {}
        for name, pieces in self.mine.items():
            if any(p.part is None for p in pieces):
                self.check_opaque(name, pieces[0], layout, specs)
                continue
            runs: list[Run] | None = []
            for piece in pieces:
                found = self.runs(name, piece)
                runs = None if runs is None or found is None else runs + found
            if not runs:
                hidden = next((v for (key, _), v in self.opaque.items() if key == pieces[0].key), None)
                if hidden is not None:
                    self.refuse(name, *hidden)
                continue
            self.take(name, runs, layout, specs)
        return layout, specs

    def check_opaque(self, name: str, piece: Piece, layout: dict[str, Joined], specs: dict[str, TensorSpec]) -> None:
        """A tensor of a layout that is known by name only: the same one, or none."""
        if piece.key in self.places:
            self.refuse(next(iter(self.places[piece.key].values()))[0], name, piece.how)
        elif (piece.key, piece.index) in self.opaque:
            own, how = self.opaque[piece.key, piece.index]
            if how == piece.how:
                self.take(name, [Run(0, own, 0, 0, self.other.checkpoint.spec(own).numel)], layout, specs)
            else:
                self.refuse(name, own, f"{how} and {piece.how}")

    def refuse(self, one: str, two: str, how: str) -> None:
        why = f"{one!r} and {two!r} are the same weights in layouts that differ by {how}"
        if not any(p.startswith("'") and p.endswith(how) for p in self.problems):
            self.problems.append(why)

    def runs(self, name: str, piece: Piece) -> list[Run] | None:
        """Where the elements of a piece of one of `like`'s tensors lie in the other's; None where they don't."""
        assert piece.part is not None
        there = self.places.get(piece.key)
        if there is None:
            return None
        other = self.other.checkpoint
        if piece.part in there:
            return [self.run(*there[piece.part])]
        if piece.part == ():  # whole here, in parts there
            parts = sorted(there)
            if self.complete(parts):
                return [self.run(*there[p]) for p in parts]
            return None
        if () in there:  # a part here, whole there
            whole, _, of = there[()]
            mine = self.parts[piece.key]
            sizes = [self.specs[n].numel for _, n in mine]
            at = [p for p, _ in mine].index(piece.part)
            if of == 1 and self.complete([p for p, _ in mine]) and self.fits(name, whole, sum(sizes)):
                return [Run(0, whole, sum(sizes[:at]), 0, sizes[at])]
            self.problems.append(
                f"{whole!r} {list(other.spec(whole).shape)} holds what is {name!r} and its like in {self.like.checkpoint.ref}, "
                "in a layout that is not theirs"
            )
        return None

    def run(self, tensor: str, which: int, of: int) -> Run:
        size = self.other.checkpoint.spec(tensor).numel // of
        return Run(0, tensor, which * size, 0, size)

    @staticmethod
    def complete(parts: Sequence[tuple[int, ...]]) -> bool:
        """Whether parts are all there: 0, 1, 2, ... along each of their axes."""
        sizes = [max(p[i] for p in parts) + 1 for i in range(len(parts[0]))]
        total = 1
        for size in sizes:
            total *= size
        return len(set(parts)) == len(parts) == total and len({len(p) for p in parts}) == 1

    def fits(self, part: str, whole: str, elements: int) -> bool:
        """Whether a packed tensor's last axis is that of its parts, and it has as many elements as they."""
        one, all_ = self.specs[part].shape, self.other.checkpoint.spec(whole)
        return all_.numel == elements and (len(one) < 2 or one[-1:] == all_.shape[-1:])

    def take(self, name: str, runs: list[Run], layout: dict[str, Joined], specs: dict[str, TensorSpec]) -> None:
        like, other = self.specs[name], self.other.checkpoint
        dtypes = {other.spec(r.name).dtype for r in runs}
        whole = len(runs) == 1 and runs[0].length == other.spec(runs[0].name).numel
        shape = other.spec(runs[0].name).shape if whole else like.shape
        if not whole and (sum(r.length for r in runs) != like.numel or len(dtypes) > 1):
            shapes = ", ".join(f"{r.name!r} {list(other.spec(r.name).shape)}" for r in runs[:3])
            self.problems.append(f"{name!r} is {list(like.shape)} in {self.like.checkpoint.ref}, but {shapes} here")
            return
        if not whole and len(like.shape) > 1 and other.spec(runs[0].name).shape[-1:] != like.shape[-1:]:
            self.problems.append(
                f"{runs[0].name!r} is {list(other.spec(runs[0].name).shape)}, which {name!r} {list(like.shape)} of "
                f"{self.like.checkpoint.ref} is not made of"
            )
            return
        layout[name] = join(runs)
        specs[name] = TensorSpec(dtypes.pop(), shape)
        self.used.update(r.name for r in runs)
        if not whole:
            self.repacked += 1
        if runs[0].name != name:
            self.renamed += 1
            self.example = self.example if self.example[0] else (runs[0].name, name)


#: what leads to a numbered layer, and its number
_LAYER = re.compile(r"(.*?\.?(?:layers?|h|blocks?|resblocks))\.(\d+)\.")


def _renumbered(name: str, number: int) -> str:
    return _LAYER.sub(lambda m: f"{m[1]}.{number}.", name, count=1)


def _leading(prefix: str) -> list[str]:
    """A prefix and what it begins with, the longest first: the heads of a model within a model lie higher up."""
    parts = prefix.split(".")[:-1]
    return [".".join(parts[:i]) + "." for i in range(len(parts), 0, -1)]


def _moved(key: str, known: Mapping[str, int], strips: Sequence[str], adds: Sequence[str]) -> str:
    """A name of the other's without a prefix, or with one, so that it is one that is known: itself where none is."""
    if key in known and not strips:
        return key
    found = [key.removeprefix(s) for s in strips if key.startswith(s)] + [a + key for a in adds]
    return next((k for k in found if k in known), key)


def _offsets(inner: Mapping[str, int], outer: Mapping[str, int]) -> Counter[str]:
    """For each prefix, how many names of `inner` are names of `outer` with it in front, of as many elements."""
    by_end: dict[str, list[str]] = {}
    for name in outer:
        parts = name.split(".")
        for i in range(1, min(len(parts), 6)):
            by_end.setdefault(".".join(parts[i:]), []).append(".".join(parts[:i]) + ".")
    found: Counter[str] = Counter()
    for name, numel in inner.items():
        for prefix in by_end.get(name, ()):
            if outer[prefix + name] == numel:
                found[prefix] += 1
    return found


def _best(found: Counter[str]) -> tuple[str, int]:
    """The prefix that fits most; none where two fit as well."""
    ordered = found.most_common(2)
    if not ordered or (len(ordered) == 2 and ordered[0][1] == ordered[1][1]):
        return "", 0
    return ordered[0]
