"""Evaluators of the user's own: a shell command that prints JSON, a Python function or class."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from stockpot.errors import EvaluationError, SuiteError, nearest
from stockpot.evaluation.scores import Progress
from stockpot.evaluation.suite import Slice, Suite

if TYPE_CHECKING:
    from stockpot.evaluation.loaded import LoadedModel

__all__ = ["CommandEvaluator", "PythonEvaluator", "stop_commands", "told_of_commands"]

_MAX_HASHED = 256 * 2**20
_MAX_PRINTED = 64 * 2**20
_running: set[int] = set()
#: called with the process group of a command when it starts, and with 0 when it has ended
told_of_commands: list[Callable[[int], None]] = []


def stop_commands() -> None:
    """Kill the commands that run, with all that they started."""
    for pid in list(_running):
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)


@dataclass(frozen=True)
class CommandEvaluator:
    """`command` with {checkpoint} (a directory) and {split}; prints a JSON object, alone or as its last line.

    The object maps metrics to numbers; it may hold `examples` (metric to list), `counts` and `ids`, lists of that length.
    What decides its scores: the command's text and every file that it names or that `files` lists.
    """

    slice: Slice
    suite: Suite
    split: str
    ids: tuple[str, ...] = ()

    def identity(self) -> Any:
        named = [w for w in _words(str(self.slice.options["command"])) if os.path.isfile(self.suite.locate(w))]
        return [self.slice.options["command"], self.split, file_digests([*named, *_files(self.slice)], self.suite)]

    def score(self, checkpoint: LoadedModel, progress: Progress | None = None) -> Mapping[str, float]:
        text = str(self.slice.options["command"]).replace("{split}", self.split)
        where = checkpoint.save() if "{checkpoint}" in text else ""
        text = text.replace("{checkpoint}", shlex.quote(where))
        environment = {**os.environ, "STOCKPOT_CHECKPOINT": where, "STOCKPOT_SPLIT": self.split}
        # to files, not pipes: what the command left running in the background may hold these open
        with (
            tempfile.TemporaryFile("w+", errors="replace") as out_file,
            tempfile.TemporaryFile("w+", errors="replace") as err_file,
        ):
            process = subprocess.Popen(
                text, shell=True, cwd=self.suite.directory, env=environment, stdin=subprocess.DEVNULL, stdout=out_file,
                stderr=err_file, start_new_session=True,
            )  # fmt: skip
            _running.add(process.pid)
            for tell in told_of_commands:
                tell(process.pid)
            try:
                process.wait(self.slice.timeout)
            except subprocess.TimeoutExpired:
                raise EvaluationError(f"the command did not end within {self.slice.timeout:g} s: {text}") from None
            finally:
                stop_commands()
                process.wait()
                _running.discard(process.pid)
                for tell in told_of_commands:
                    tell(0)
            out, err = (_printed(f) for f in (out_file, err_file))
        if process.returncode:
            raise EvaluationError(f"the command ended with {process.returncode}: {text}{_tail(err or out)}")
        return _last_object(out, text)


def _printed(file: IO[str]) -> str:
    """The end of what went to a file: results stand last."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _MAX_PRINTED, 0))
    return file.read()


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def _last_object(out: str, command: str) -> dict[str, Any]:
    """The JSON object that was printed: all of stdout, or its last line."""
    lines = [line for line in out.splitlines() if line.strip()]
    for text in (out, lines[-1] if lines else ""):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    raise EvaluationError(f"the command printed no JSON object: {command}{_tail(out) or ': it printed nothing'}")


def _tail(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()][-3:]
    return "".join(f"\n    {line[:200]}" for line in lines)


@dataclass(frozen=True)
class PythonEvaluator:
    """`function: module:name`: called with the checkpoint and the slice's `options`; a class is made with these and scored with.

    A function that takes `split` is told which. What decides its scores: the module's source, the options, and `files`.
    """

    slice: Slice
    suite: Suite
    split: str
    ids: tuple[str, ...] = ()
    _found: list[Any] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        target = self.target()
        callee = getattr(target, "score", target)
        if not callable(callee):
            raise SuiteError(
                f"{self._where}: {self.slice.options['function']} is not callable, it is {type(target).__name__}"
            )
        if self.slice.options.get("options") and not inspect.isclass(target) and hasattr(target, "score"):
            raise SuiteError(f"{self._where}: an object takes no options: name a class or a function")
        if self.slice.split == "auto" and "split" not in self._accepted(target):
            raise SuiteError(
                f"{self._where}: what a function scores can't be divided: give split: selection or report, or let it take a "
                "parameter 'split'"
            )

    @property
    def _where(self) -> str:
        return f"{self.suite.path}:{self.slice.line}: slice {self.slice.name!r}: function"

    @staticmethod
    def _accepted(target: Any) -> set[str]:
        try:
            return set(inspect.signature(target).parameters)
        except (TypeError, ValueError):
            return set()

    def target(self) -> Any:
        """The function, class or object that is named. Raises SuiteError."""
        if self._found:
            return self._found[0]
        module_name, _, attribute = str(self.slice.options["function"]).partition(":")
        for folder in (self.suite.directory, os.getcwd()):
            if folder not in sys.path:
                sys.path.append(folder)
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as e:
            raise SuiteError(f"{self._where}: {module_name!r} can't be imported: {type(e).__name__}: {e}") from e
        for name in attribute.split("."):
            if not hasattr(found, name):
                raise SuiteError(f"{self._where}: {module_name!r} has no {name!r}{nearest(name, dir(found))}")
            found = getattr(found, name)
        self._found.append(found)
        return found

    def identity(self) -> Any:
        module = sys.modules.get(str(self.slice.options["function"]).partition(":")[0])
        source = getattr(module, "__file__", None)
        files = [source] if source and os.path.isfile(source) else []
        return [
            self.slice.options["function"], self.slice.options.get("options", {}), self.split,
            file_digests([*files, *_files(self.slice)], self.suite),
        ]  # fmt: skip

    def score(self, checkpoint: LoadedModel, progress: Progress | None = None) -> Mapping[str, float]:
        target = self.target()
        options = dict(self.slice.options.get("options") or {})
        if "split" in self._accepted(target):
            options.setdefault("split", self.split)
        if inspect.isclass(target):
            made: Any = target(**options)
            result = made.score(checkpoint)
        elif hasattr(target, "score"):
            result = target.score(checkpoint)
        else:
            result = target(checkpoint, **options)
        if not isinstance(result, Mapping):
            raise EvaluationError(f"expected a mapping from metrics to numbers, got {type(result).__name__}")
        return result


def _files(part: Slice) -> list[str]:
    files = part.options.get("files", [])
    return list(files) if isinstance(files, list) else [files]


def file_digests(names: list[str], suite: Suite) -> list[list[str]]:
    """[path relative to the suite, SHA-256] of files; of very large ones size and time. Raises SuiteError."""
    out = []
    for name in dict.fromkeys(names):
        path = suite.locate(name)
        if not os.path.isfile(path):
            raise SuiteError(f"{suite.path}: files: {name}: no such file")
        if os.path.getsize(path) > _MAX_HASHED:
            stat = os.stat(path)
            out.append([os.path.relpath(path, suite.directory), f"{stat.st_size} {stat.st_mtime_ns}"])
            continue
        with open(path, "rb") as f:
            out.append([os.path.relpath(path, suite.directory), hashlib.sha256(f.read()).hexdigest()])
    return sorted(out)
