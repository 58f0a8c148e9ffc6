"""A method of somebody's own in a file: `merge_method: ./my_methods.py:trimmed_sum`. Its code is run, so it must be allowed."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from dataclasses import replace

from stockpot.errors import MethodError, RecipeError, StockpotError, nearest
from stockpot.methods.declaration import _REGISTRY, Method

__all__ = ["load_method_file", "names_file"]

#: by path and SHA-256 what a text declared, so that it is not run twice
_loaded: dict[tuple[str, str], dict[str, Method]] = {}


def names_file(method: str) -> bool:
    """Whether a `merge_method` names a function of a file."""
    return ".py:" in method


def load_method_file(reference: str, folder: str) -> tuple[Method, str]:
    """(the method, the file and its SHA-256 in words). reference: `FILE.py:FUNCTION`, FILE relative to `folder`.

    Its name is FUNCTION@ and the first characters of the digest, so that a changed file or another of the same function is
    another method. Raises RecipeError where there is no such file or method, MethodError where its code fails.
    """
    file, _, name = reference.rpartition(":")
    path = os.path.normpath(os.path.join(folder, os.path.expanduser(file)))
    try:
        with open(path, "rb") as f:
            text = f.read()
    except OSError as e:
        raise RecipeError(f"merge_method {reference!r}: {path} can't be read: {e.strerror}") from e
    digest = hashlib.sha256(path.encode() + b"\0" + text).hexdigest()
    if (path, digest) not in _loaded:
        _loaded[path, digest] = _run(path, text, digest)
    found = _loaded[path, digest]
    if name not in found:
        known = f"it declares {', '.join(found)}" if found else "it declares none (`@method` of stockpot.methods does)"
        raise RecipeError(f"merge_method {reference!r}: {path} has no method {name!r}; {known}{nearest(name, found)}")
    said = hashlib.sha256(text).hexdigest()
    return found[name], f"{found[name].name} is {name} of {path}, whose code was run (SHA-256 {said[:16]}...)"


def _run(path: str, text: bytes, digest: str) -> dict[str, Method]:
    """Run a file's text; what it declares is registered under names of its own."""
    module_name = f"stockpot_code_{digest[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None:
        raise RecipeError(f"{path}: not a file of Python")
    module = importlib.util.module_from_spec(spec)
    before = dict(_REGISTRY)
    sys.modules[module_name] = module
    try:
        # the text that was hashed, not what the file may have become
        exec(compile(text, path, "exec"), module.__dict__)
        declared = {name: m for name, m in _REGISTRY.items() if before.get(name) is not m}
    except BaseException as e:
        del sys.modules[module_name]
        if isinstance(e, (StockpotError, KeyboardInterrupt)):
            raise
        frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        line = f":{frames[-1].lineno}" if frames else ""
        raise MethodError(f"{path}{line}: {type(e).__name__}: {e}") from e
    finally:
        _REGISTRY.clear()
        _REGISTRY.update(before)
    named = {name: f"{name}@{digest[:8]}" for name in declared}
    made = {
        n: replace(m, name=named[n], otherwise=named.get(m.otherwise or "", m.otherwise)) for n, m in declared.items()
    }
    _REGISTRY.update({m.name: m for m in made.values()})
    return made
