"""PEFT's patterns (rank_pattern, alpha_pattern): regular expressions of a stranger's file, kept from running wild.

PEFT takes the first pattern that matches the end of a module's name, after a dot or as a whole. In practice patterns are names;
these are looked up. Others are followed state by state, all at once, in a time that grows with the lengths of pattern and name
alone; what needs more than that (looking around, what was matched before) is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        from re import _parser as sre_parse  # type: ignore[attr-defined]
    except ImportError:  # Python 3.10
        import sre_parse

__all__ = ["Patterns"]

_NAME = re.compile(r"\^?[\w.\-]*")
#: characters of a pattern and of a module's name, states of all patterns, and steps in all: at most
_LONGEST, _LONGEST_NAME, _MOST_STATES, _MOST_STEPS = 512, 512, 20_000, 4_000_000

Test = Callable[[str], bool]


class Patterns:
    """One mapping of patterns. Raises ValueError, in words, for one that is refused."""

    def __init__(self, patterns: Mapping[Any, Any]) -> None:
        self.values = list(patterns.values())
        self.machines: list[tuple[int, _Machine]] = []
        #: names by their length, and by where their dots are, which stand for any character: {name: its place among all}
        self.names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self.whole: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self.steps = states = 0
        for place, pattern in enumerate(patterns):
            if not isinstance(pattern, str):
                raise ValueError(f"{pattern!r:.80} is not a pattern")
            if _NAME.fullmatch(pattern):
                name = pattern.removeprefix("^")
                dots = tuple(i for i, c in enumerate(name) if c == ".")
                table = self.names if name == pattern else self.whole
                table.setdefault(len(name), {}).setdefault(dots, {}).setdefault(name, place)
                continue
            self.machines.append((place, _Machine(pattern)))
            states += len(self.machines[-1][1].edges)
            if states > _MOST_STATES:
                raise ValueError("more patterns that are no plain names than can be followed in a reasonable time")

    def of(self, module: str, default: Any) -> Any:
        """The value of the first pattern that matches, else `default`."""
        if self.machines and len(module) > _LONGEST_NAME:
            raise ValueError(f"a module's name of {len(module)} characters is too long for patterns")
        starts = [0, *(i + 1 for i, c in enumerate(module) if c == ".")]
        ends = [(module[s:], self.names[len(module) - s]) for s in starts if len(module) - s in self.names]
        ends += [(module, self.whole[len(module)])] if len(module) in self.whole else []
        self.steps += sum(len(by_dots) for _, by_dots in ends)
        found = [names.get(_dotted(end, dots)) for end, by_dots in ends for dots, names in by_dots.items()]
        for place, machine in self.machines:
            matches, steps = machine.matches(module, starts)
            self.steps += steps
            found += [place] if matches else []
        if self.steps > _MOST_STEPS:
            raise ValueError("more patterns and modules than can be compared in a reasonable time")
        first = min((place for place in found if place is not None), default=None)
        return default if first is None else self.values[first]


def _dotted(text: str, dots: tuple[int, ...]) -> str:
    """A text with dots in these places."""
    if all(text[i] == "." for i in dots):
        return text
    letters = list(text)
    for i in dots:
        letters[i] = "."
    return "".join(letters)


class _Machine:
    """A pattern as states with what leads from one to others: on a character that passes a test, or on none.

    `(.*\\.)?(PATTERN)$`, as PEFT has it, begins at each of the places after a dot, and must end with the name.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > _LONGEST:
            raise ValueError(
                f"a pattern of {len(pattern)} characters: at most {_LONGEST} are taken of one that is no plain name"
            )
        self.pattern = pattern
        #: of each state: (test, next state), and the states that are reached without a character, anywhere or at one end only
        self.edges: list[tuple[Test, int] | None] = []
        self.free: list[list[tuple[int, str]]] = []
        try:
            parsed = sre_parse.parse(pattern)
        except (re.error, OverflowError, RecursionError) as e:
            raise ValueError(f"{pattern!r} is not a pattern: {e}") from e
        if parsed.state.flags & ~re.UNICODE.value:
            raise self.refusal("sets flags")
        self.first = self.state()
        self.last = self.sequence(parsed, self.first)

    def refusal(self, why: str) -> ValueError:
        return ValueError(f"{self.pattern!r} {why}, which is not followed here: write the names out")

    def state(self) -> int:
        self.edges.append(None)
        self.free.append([])
        if len(self.edges) > _MOST_STATES:
            raise self.refusal("repeats very often")
        return len(self.edges) - 1

    def step(self, at: int, test: Test) -> int:
        target = self.state()
        self.edges[at] = (test, target)
        fresh = self.state()
        self.free[target].append((fresh, ""))
        return fresh

    def sequence(self, items: Any, at: int) -> int:
        for kind, value in items:
            at = self.item(str(kind), value, at)
        return at

    def item(self, kind: str, value: Any, at: int) -> int:
        if kind == "LITERAL":
            return self.step(at, chr(value).__eq__)
        if kind == "NOT_LITERAL":
            return self.step(at, chr(value).__ne__)
        if kind == "ANY":
            return self.step(at, "\n".__ne__)
        if kind == "IN":
            return self.step(at, _one_of(value, self))
        if kind == "SUBPATTERN":
            if value[1] or value[2]:
                raise self.refusal("sets flags")
            return self.sequence(value[3], at)
        if kind == "BRANCH":
            end = self.state()
            for branch in value[1]:
                begin = self.state()
                self.free[at].append((begin, ""))
                self.free[self.sequence(branch, begin)].append((end, ""))
            return end
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            return self.repeat(value[0], value[1], value[2], at)
        if kind == "AT" and (where := _ENDS.get(str(value))) is not None:
            after = self.state()
            self.free[at].append((after, where))
            return after
        raise self.refusal("looks around, or back at what was matched")

    def repeat(self, least: int, most: Any, items: Any, at: int) -> int:
        for _ in range(least):
            at = self.sequence(items, at)
        if str(most) == "MAXREPEAT":
            loop, end = self.state(), self.state()
            self.free[at].append((loop, ""))
            self.free[loop].append((end, ""))
            self.free[self.sequence(items, self.passed(loop))].append((loop, ""))
            return end
        end = self.state()
        for _ in range(int(most) - least):
            self.free[at].append((end, ""))
            at = self.sequence(items, self.passed(at))
        self.free[at].append((end, ""))
        return end

    def passed(self, at: int) -> int:
        """A state of its own after another one."""
        after = self.state()
        self.free[at].append((after, ""))
        return after

    def matches(self, text: str, starts: list[int]) -> tuple[bool, int]:
        """(whether it matches from one of the starts to the end, in how many steps)."""
        begins = set(starts)
        steps = 0
        current: set[int] = set()
        for i in range(len(text) + 1):
            if i in begins:
                current |= self.closed({self.first}, i, len(text))
            steps += 1 + len(current)
            if i == len(text) or steps > _MOST_STEPS:
                break
            reached = {edge[1] for s in current if (edge := self.edges[s]) is not None and edge[0](text[i])}
            current = self.closed(reached, i + 1, len(text))
        return self.last in current, steps

    def closed(self, states: set[int], place: int, size: int) -> set[int]:
        """With all that are reached from there without a character, at a place in a text of this size."""
        here = {"", *(["first"] if place == 0 else []), *(["last"] if place == size else [])}
        found, todo = set(states), list(states)
        while todo:
            for state, where in self.free[todo.pop()]:
                if state not in found and where in here:
                    found.add(state)
                    todo.append(state)
        return found


_ENDS = {"AT_BEGINNING": "first", "AT_BEGINNING_STRING": "first", "AT_END": "last", "AT_END_STRING": "last"}
_CATEGORIES: dict[str, Test] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}


def _one_of(items: Any, machine: _Machine) -> Test:
    """The test of a class of characters."""
    tests: list[Test] = []
    negated = False
    for kind, value in items:
        name = str(kind)
        if name == "NEGATE":
            negated = True
        elif name == "LITERAL":
            tests.append(chr(value).__eq__)
        elif name == "RANGE":
            tests.append(lambda c, low=value[0], high=value[1]: low <= ord(c) <= high)  # type: ignore[misc]
        elif name == "CATEGORY" and str(value).replace("_NOT_", "_") in _CATEGORIES:
            test = _CATEGORIES[str(value).replace("_NOT_", "_")]
            wanted = "_NOT_" not in str(value)
            tests.append(lambda c, test=test, wanted=wanted: test(c) is wanted)  # type: ignore[misc]
        else:
            raise machine.refusal("has a class of characters of an odd kind")
    return lambda c: any(t(c) for t in tests) is not negated
