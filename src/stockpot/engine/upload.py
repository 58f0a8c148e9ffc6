"""OUT behind a URL: merged in a scratch directory here, then uploaded, the lineage last.

A directory there without stockpot.json is one whose upload did not finish; the same command goes on from the scratch
directory.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from stockpot.checkpoints.remote import Store, open_store
from stockpot.engine.journal import NAME as JOURNAL_NAME
from stockpot.errors import OutputError, StockpotError

__all__ = ["check_url", "scratch_for", "upload"]

_AT_ONCE = 4


def scratch_for(url: str) -> str:
    """The directory here that stands for OUT until it is uploaded: always the same one, so that a merge can go on.

    It lies in STOCKPOT_SCRATCH, else where temporary files do.
    """
    folder = os.environ.get("STOCKPOT_SCRATCH") or tempfile.gettempdir()
    return os.path.join(
        os.path.abspath(folder), f"stockpot-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}"
    )


def _open(url: str) -> tuple[Store, str]:
    try:
        store, path = open_store(url)
    except StockpotError as e:
        raise OutputError(str(e)) from e
    return store, path.rstrip("/")


def _listing(store: Store, path: str, url: str) -> set[str]:
    try:
        files, folders = store.list(path)
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, NotImplementedError) as e:
        raise OutputError(f"{url}: can't be looked into: {e}") from e
    return {*files, *folders}


def check_url(url: str, *, overwrite: bool, inputs: Iterable[str]) -> None:
    """OUT must hold nothing, or `overwrite` be given; never an input, or a directory that holds one.

    Raises OutputError before anything is merged.
    """
    for source in inputs:
        if (source.rstrip("/") + "/").startswith(url.rstrip("/") + "/"):
            raise OutputError(f"{url}: is or holds the input {source}; choose another OUT")
    store, path = _open(url)
    if _listing(store, path, url) and not overwrite:
        raise OutputError(f"{url}: exists and is not empty; use --overwrite to replace it")


def upload(partial: str, url: str, last: str, *, overwrite: bool) -> None:
    """Upload every file of `partial`, `last` after all others, and remove what lay there before. Then `partial` goes."""
    store, root = _open(url)
    before = _listing(store, root, url)
    if before and not overwrite:
        raise OutputError(f"{url}: something has appeared there meanwhile; the result is in {partial}")
    names = [
        os.path.relpath(os.path.join(base, name), partial)
        for base, _, found in os.walk(partial)
        for name in found
        if name != JOURNAL_NAME
    ]

    def send(name: str) -> None:
        source, target = os.path.join(partial, name), posixpath.join(root, name.replace(os.sep, "/"))
        store.persist(f"writing {target}", lambda: store.fs.put_file(source, target))
        store.fs.invalidate_cache()
        if store.find(target).size != os.path.getsize(source):
            raise OSError(f"{target} has {store.find(target).size} bytes, {os.path.getsize(source)} were sent")

    try:
        if last in before:
            store.persist(f"removing {last}", lambda: store.fs.rm_file(posixpath.join(root, last)))
        store.fs.makedirs(root, exist_ok=True)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(send, [n for n in names if n != last]))
        for name in before - {n.replace(os.sep, "/").partition("/")[0] for n in names}:
            store.persist(f"removing {name}", lambda n=name: store.fs.rm(posixpath.join(root, n), recursive=True))  # type: ignore[misc]
        send(last)
    except Exception as e:
        raise OutputError(f"{url}: upload failed: {e}; the result is in {partial}, and the same command goes on") from e
    shutil.rmtree(partial)
