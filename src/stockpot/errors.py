"""Every error that stockpot raises on purpose.

StockpotError
├── UserError            exit code 2   a mistake in what was asked
│   ├── RecipeError        (ValueError)  the recipe can't be read or makes no sense
│   ├── SuiteError         (ValueError)  the evaluation suite can't be read or makes no sense
│   ├── ArgumentError      (ValueError)  an argument of the API or the command line
│   ├── MethodError        (RuntimeError) a method of somebody's own failed, or returned what it may not
│   └── OutputError        (OSError)     OUT can't be used
├── InputError           exit code 3   the data can't be used
│   ├── CheckpointError    (ValueError)  a file or directory is not a readable checkpoint
│   │   └── LayoutError                    it is whole, but in a layout that has to be converted first
│   ├── MismatchError      (ValueError)  checkpoints that do not fit each other
│   ├── NonfiniteError     (ValueError)  NaN or infinities in an input or in the output
│   ├── EvaluationError    (RuntimeError) a checkpoint could not be scored
│   └── ReadError          (OSError)     a read failed although the headers were sound
├── VerificationError    exit code 4   an output does not match its lineage
├── GateError            exit code 5   a release gate is not passed
└── ProblemsError        exit code 2 or 3   several of the above, found together by `plan`

Each error is also the fitting standard type, so `except ValueError` works for those who prefer it.
`Interrupted` (exit code 130) is not an error in the merge: the same command goes on from where it stopped.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "EvaluationError",
    "GateError",
    "InputError",
    "Interrupted",
    "LayoutError",
    "MethodError",
    "MismatchError",
    "NonfiniteError",
    "OutputError",
    "ProblemsError",
    "ReadError",
    "RecipeError",
    "StockpotError",
    "SuiteError",
    "UserError",
    "VerificationError",
    "nearest",
    "nearest_file",
    "raise_problems",
]


#: characters of a message
_LONGEST = 8000


class StockpotError(Exception):
    """The root: everything that stockpot raises on purpose.

    places  where the mistake stands, the outermost first: `recipe.yml:3`, `run`. They come before what is wrong in the text
    """

    exit_code = 1
    places: tuple[str, ...] = ()

    def within(self, *places: str) -> Self:
        """The same error, said to stand in these places; for `raise` and for lists of problems."""
        self.places = (*filter(None, places), *self.places)
        return self

    def about(self, path: str, name: str) -> Self:
        """The same error about `path` (messages about a file begin with its path), by the name that the user gave it."""
        if self.args and isinstance(self.args[0], str) and self.args[0].startswith(path):
            self.args = (name + self.args[0][len(path) :], *self.args[1:])
        return self

    @property
    def what(self) -> str:
        """What is wrong, without where; cut short where somebody's file has made it very long."""
        text = super().__str__()
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"

    def __str__(self) -> str:
        return ": ".join((*self.places, self.what))


class UserError(StockpotError):
    """What was asked for is wrong; the input data may well be fine."""

    exit_code = 2


class RecipeError(UserError, ValueError):
    """The recipe can't be parsed, or asks for something that makes no sense."""


class SuiteError(UserError, ValueError):
    """The suite can't be parsed, its data can't be read, or it asks for something that makes no sense."""


class ArgumentError(UserError, ValueError):
    """An argument of the API or an option of the command line is out of range."""


class MethodError(UserError, RuntimeError):
    """A method that does not come with stockpot failed, or returned what it may not. Its own exception is the cause."""


class OutputError(UserError, OSError):
    """OUT exists, can't be written, or lacks the space."""


class InputError(StockpotError):
    """The input data can't be used."""

    exit_code = 3


class CheckpointError(InputError, ValueError):
    """A file or directory is not a checkpoint that can be read."""


class LayoutError(CheckpointError):
    """A whole checkpoint in a layout that stockpot does not read: shards of a trainer, another framework's. Names the way out."""


class MismatchError(InputError, ValueError):
    """The checkpoints do not fit each other: names, shapes, settings."""


class NonfiniteError(InputError, ValueError):
    """An input or the output holds NaN or infinities."""


class EvaluationError(InputError, RuntimeError):
    """A checkpoint could not be scored: the evaluator raised, hung, died, or returned something that is not a finite number."""


class ReadError(InputError, OSError):
    """Reading failed although the headers were sound (a truncated or vanished file)."""


class VerificationError(StockpotError):
    """An output is not what its lineage says."""

    exit_code = 4


class GateError(StockpotError):
    """A critical release gate failed or could not be decided; nothing is published.

    found  of a sweep: what it found all the same (api.searching.Sweep)
    """

    exit_code = 5
    found: object = None


class Interrupted(StockpotError):
    """The merge was stopped by a signal; what is finished is kept, and the same command resumes."""

    exit_code = 130


class ProblemsError(StockpotError):
    """Several problems found together. `problems` holds the single errors.

    The exit code is 2 when any of them is a user's mistake, else 3.
    """

    def __init__(self, problems: Sequence[StockpotError]) -> None:
        self.problems = tuple(problems)
        self.exit_code = min((p.exit_code for p in self.problems), default=2)
        super().__init__(self.problems)

    def within(self, *places: str) -> Self:
        for p in self.problems:
            p.within(*places)
        return self

    def about(self, path: str, name: str) -> Self:
        for p in self.problems:
            p.about(path, name)
        return self

    @property
    def what(self) -> str:
        head = f"{len(self.problems)} problems" if len(self.problems) != 1 else "1 problem"
        return head + ":\n" + "\n".join(f"  - {p}" for p in self.problems)

    def __reduce__(self) -> tuple[type[ProblemsError], tuple[tuple[StockpotError, ...]]]:
        return type(self), (self.problems,)  # between processes


def raise_problems(problems: Sequence[StockpotError]) -> None:
    """Raise nothing, the one problem, or all of them together."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ProblemsError(problems)


#: what moves a terminal's cursor, hides text or turns it round: control characters and those of writing direction
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def visible(text: str, *, line: bool = False) -> str:
    """Text of strangers as it may be shown: what can't be seen in it is written out (`\\x1b`). line: line breaks and tabs too."""

    def written(m: re.Match[str]) -> str:
        code = ord(m[0])
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    text = _UNSEEN.sub(written, text)
    return text.replace("\n", "\\n").replace("\t", "\\t") if line else text


def visible_json(text: str) -> str:
    """The same for JSON, which stays JSON of the same content."""
    return _UNSEEN.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def brief(value: object, most: int = 160) -> str:
    """How a message shows what a file holds, cut short."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def few_of(names: Sequence[object], most: int = 5) -> str:
    """The first of some names, quoted, and how many there are: `'a', 'b', ... (7 in all)`."""
    shown = ", ".join(repr(n) for n in names[:most])
    return shown + (f", ... ({len(names)} in all)" if len(names) > most else "")


def nearest(got: str, known: Iterable[str]) -> str:
    """The ending of an error message: `; did you mean 'weight'?`, or an empty string."""
    options = sorted(set(known))
    match = difflib.get_close_matches(got, options, n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def nearest_file(path: str) -> str:
    """The same for a path that is not there: the nearest name in its directory."""
    folder = os.path.dirname(path) or "."
    if os.path.exists(path) or not os.path.isdir(folder) or not os.access(folder, os.R_OK):
        return ""
    return nearest(os.path.basename(path), os.listdir(folder))
