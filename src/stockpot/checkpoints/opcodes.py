"""A look at a pickle's opcodes before anything is made of them: what a small file could do to the machine is refused first.

C's unpickler trusts a file with memory (an index of its memo allocates a table of twice that), with the C stack (the hash of a
nested tuple) and with time (the hash of a tuple that holds another one twice, that another one twice...). The opcodes are
followed here with numbers in place of objects: of each a weight, how much there is to hash in it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

__all__ = ["check_pickle"]

#: opcodes of a file, at most: some 100,000 tensors have three million
_MOST_STEPS = 16_000_000
#: classes and functions that a file names, and sets that it makes, at most
_MOST_NAMES = 10_000
#: what there may be to hash in a key, or in an entry of a set
_MOST_WEIGHT = 64
#: bytes of a whole number, at most
_MOST_DIGITS = 128
_CAP = 2**20

#: opcodes of a fixed size that put one plain value on the stack -> bytes of the argument
_PUSH = {
    b"N": 0, b"\x88": 0, b"\x89": 0, b"J": 4, b"K": 1, b"M": 2, b"G": 8, b")": 0, b"]": 0, b"}": 0, b"\x8f": 0,
}  # fmt: skip
#: those whose argument begins with its length -> bytes of that
_SIZED = {
    b"U": 1, b"T": 4, b"X": 4, b"\x8c": 1, b"\x8d": 8, b"C": 1, b"B": 4, b"\x8e": 8, b"\x96": 8, b"\x8a": 1, b"\x8b": 4,
}  # fmt: skip
#: those whose argument is a line
_LINES = {b"I", b"L", b"F", b"S", b"V"}
_WHOLE = {b"I", b"L", b"\x8a", b"\x8b"}


class _Walk:
    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.at = 0
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[int, int] = {}
        self.names = 0

    def take(self, size: int) -> bytes:
        found = self.raw[self.at : self.at + size]
        if len(found) != size:
            raise ValueError("cut short")
        self.at += size
        return found

    def line(self) -> bytes:
        end = self.raw.find(b"\n", self.at)
        if end < 0:
            raise ValueError("cut short")
        found = self.raw[self.at : end]
        self.at = end + 1
        return found

    def skip(self, size: int) -> None:
        if size > len(self.raw) - self.at:
            raise ValueError("cut short")
        self.at += size

    def pop(self) -> int:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise ValueError("takes what is not there")
        return self.stack.pop()

    def marked(self) -> list[int]:
        if not self.marks:
            raise ValueError("takes what is not there")
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def hashed(self, weights: list[int]) -> None:
        if weights and max(weights) > _MOST_WEIGHT:
            raise ValueError("a key, or an entry of a set, is a tuple nested too deep or too long")

    def named(self) -> None:
        self.names += 1
        if self.names > _MOST_NAMES:
            raise ValueError(f"names more than {_MOST_NAMES} classes, or makes as many sets")


def check_pickle(raw: bytes) -> None:
    """Raise ValueError for a pickle that is cut short, or asks too much of who reads it."""
    walk = _Walk(raw)
    steps = 0
    while True:
        steps += 1
        if steps > _MOST_STEPS:
            raise ValueError(f"more than {_MOST_STEPS} steps")
        op = raw[walk.at : walk.at + 1]
        walk.at += 1
        size = _PUSH.get(op)
        if size is not None:
            if size:
                walk.skip(size)
            if op == b"\x8f":
                walk.named()
            walk.stack.append(1)
        elif op == b"q" or op == b"r" or op == b"p" or op == b"\x94":
            _put(walk, op, steps)
        elif op == b"h" or op == b"j" or op == b"g":
            index = walk.take(1)[0] if op == b"h" else _number(walk.take(4)) if op == b"j" else int(_short(walk.line()))
            if index not in walk.memo:
                raise ValueError(f"recalls {index}, which it never kept")
            walk.stack.append(walk.memo[index])
        elif op in _SIZED:
            length = int.from_bytes(walk.take(_SIZED[op]), "little")
            if op in _WHOLE:
                _short(b"x" * min(length, _MOST_DIGITS + 1))
            walk.skip(length)
            walk.stack.append(1)
        elif op in _LINES:
            found = walk.line()
            if op in _WHOLE:
                _short(found)
            walk.stack.append(1)
        elif op == b".":
            walk.pop()
            return
        else:
            act = _ACTS.get(op)
            if act is None:
                raise ValueError(f"has the opcode {op!r}, which no file of tensors needs" if op else "cut short")
            act(walk)


def _number(raw: bytes) -> int:
    return int(struct.unpack("<I", raw)[0])


def _short(digits: bytes) -> bytes:
    if len(digits) > _MOST_DIGITS:
        raise ValueError("has a whole number of very many digits")
    return digits


def _put(walk: _Walk, op: bytes, steps: int) -> None:
    if op == b"\x94":
        index = len(walk.memo)
    elif op == b"q":
        index = walk.take(1)[0]
    else:
        index = _number(walk.take(4)) if op == b"r" else int(_short(walk.line()))
    if not 0 <= index <= 256 + 2 * steps:  # C's memo is a table as long as its largest index
        raise ValueError(f"keeps something under the number {index}, after {steps} steps")
    if not walk.stack:
        raise ValueError("takes what is not there")
    walk.memo[index] = walk.stack[-1]


def _tuple(count: int) -> Callable[[_Walk], None]:
    def act(walk: _Walk) -> None:
        weights = walk.marked() if count < 0 else [walk.pop() for _ in range(count)]
        walk.stack.append(min(1 + sum(weights), _CAP))

    return act


def _made(count: int) -> Callable[[_Walk], None]:
    """Takes so many, puts one object."""

    def act(walk: _Walk) -> None:
        for _ in range(count):
            walk.pop()
        walk.stack.append(1)

    return act


def _of_mark(walk: _Walk) -> None:
    walk.marked()
    walk.stack.append(1)


def _items(walk: _Walk) -> None:
    walk.hashed(walk.marked()[::2])


def _dict(walk: _Walk) -> None:
    _items(walk)
    walk.stack.append(1)


def _item(walk: _Walk) -> None:
    walk.pop()
    walk.hashed([walk.pop()])


def _entries(walk: _Walk) -> None:
    walk.hashed(walk.marked())


def _frozen(walk: _Walk) -> None:
    weights = walk.marked()
    walk.hashed(weights)
    walk.named()
    walk.stack.append(min(1 + sum(weights), _CAP))


def _global(walk: _Walk) -> None:
    walk.line(), walk.line()
    walk.named()
    walk.stack.append(1)


def _stack_global(walk: _Walk) -> None:
    walk.pop(), walk.pop()
    walk.named()
    walk.stack.append(1)


def _instance(walk: _Walk) -> None:
    walk.line(), walk.line()
    walk.named()
    _of_mark(walk)


def _persistent(walk: _Walk) -> None:
    walk.line()
    walk.stack.append(1)


def _popped(walk: _Walk) -> None:
    if walk.marks and len(walk.stack) == walk.marks[-1]:
        walk.marks.pop()
    else:
        walk.pop()


def _twice(walk: _Walk) -> None:
    walk.stack.append(walk.pop())
    walk.stack.append(walk.stack[-1])


_ACTS: dict[bytes, Callable[[_Walk], object]] = {
    b"(": lambda w: w.marks.append(len(w.stack)),
    b"t": _tuple(-1), b"\x85": _tuple(1), b"\x86": _tuple(2), b"\x87": _tuple(3),
    b"R": _made(2), b"b": _made(2), b"\x81": _made(2), b"\x92": _made(3), b"Q": _made(1),
    b"l": _of_mark, b"d": _dict, b"o": _of_mark, b"i": _instance, b"c": _global, b"\x93": _stack_global,
    b"a": lambda w: w.pop(), b"e": lambda w: w.marked(), b"s": _item, b"u": _items, b"\x90": _entries, b"\x91": _frozen,
    b"0": _popped, b"1": lambda w: w.marked(), b"2": _twice,
    b"P": _persistent,
    b"\x80": lambda w: w.skip(1), b"\x95": lambda w: w.skip(8),
}  # fmt: skip
