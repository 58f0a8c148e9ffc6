"""PEFT's patterns (rank_pattern, alpha_pattern): regular expressions of a stranger's file, kept from running wild.

PEFT takes the first pattern that matches the end of a module's name, after a dot or as a whole. In practice patterns are names;
these are looked up. Other ones are tried as the regular expressions that they are, if they are of a kind that takes no more than
some steps for each character, and refused else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["Patterns"]

_NAME = re.compile(r"[\w.\-]*")
#: characters of a pattern and of a module's name, patterns that are no names, comparisons in all: at most
_LONGEST, _LONGEST_NAME, _MOST_EXPRESSIONS, _MOST_STEPS = 256, 512, 64, 1_000_000


class Patterns:
    """One mapping of patterns. Raises ValueError, in words, for one that is refused."""

    def __init__(self, patterns: Mapping[Any, Any]) -> None:
        self.values = list(patterns.values())
        self.expressions: list[tuple[int, re.Pattern[str]]] = []
        #: names by their length, and by where their dots are, which stand for any character: {name: its place among all}
        self.names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self.steps = 0
        for place, pattern in enumerate(patterns):
            if not isinstance(pattern, str):
                raise ValueError(f"{pattern!r:.80} is not a pattern")
            if _NAME.fullmatch(pattern):
                dots = tuple(i for i, c in enumerate(pattern) if c == ".")
                self.names.setdefault(len(pattern), {}).setdefault(dots, {}).setdefault(pattern, place)
                continue
            self.expressions.append((place, _compiled(pattern)))
            if len(self.expressions) > _MOST_EXPRESSIONS:
                raise ValueError(f"more than {_MOST_EXPRESSIONS} patterns that are no plain names")

    def of(self, module: str, default: Any) -> Any:
        """The value of the first pattern that matches, else `default`."""
        if self.expressions and len(module) > _LONGEST_NAME:
            raise ValueError(f"a module's name of {len(module)} characters is too long for patterns")
        starts = [0, *(i + 1 for i, c in enumerate(module) if c == ".")]
        ends = [(module[s:], self.names[len(module) - s]) for s in starts if len(module) - s in self.names]
        self.steps += sum(len(by_dots) for _, by_dots in ends) + 16 * len(self.expressions)
        if self.steps > _MOST_STEPS:
            raise ValueError("more patterns and modules than can be compared in a reasonable time")
        found = [names.get(_dotted(end, dots)) for end, by_dots in ends for dots, names in by_dots.items()]
        found += [place for place, expression in self.expressions if expression.match(module)]
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


def _compiled(pattern: str) -> re.Pattern[str]:
    if len(pattern) > _LONGEST:
        raise ValueError(
            f"a pattern of {len(pattern)} characters: at most {_LONGEST} are taken of one that is no plain name"
        )
    bare = re.sub(r"\\.", "_", pattern)  # what is escaped is no operator
    bare = re.sub(r"\[[^\]]*\]", "_", bare)
    repeats = len(re.findall(r"[*+]|\{\d*,\d*\}", bare))
    if re.search(r"\)\s*[*+{?]", bare) or "(?" in bare or re.search(r"\\\d", pattern) or repeats > 2:
        raise ValueError(
            f"{pattern!r} repeats a group, looks around, or repeats more than twice, which may take for ever to match: write the "
            "names out"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f"{pattern!r} is not a pattern: {e}") from e
