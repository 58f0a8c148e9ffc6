"""OUT behind a URL: merged in a scratch directory here, then uploaded, the lineage last.

A directory there without stockpot.json is one whose upload did not finish; the same command goes on from the scratch
directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import shutil
import stat
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from stockpot.checkpoints.stores import RemoteStore, open_store
from stockpot.engine.journal import Journal
from stockpot.engine.outdir import JOURNAL, LINEAGE, partial_path
from stockpot.errors import OutputError, StockpotError, few_of
from stockpot.files import is_url, make_folders

__all__ = ["check_url", "scratch_for", "upload"]

_AT_ONCE = 4
_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "obs"}
#: every file written there is a commit that stays
_KEEPS_HISTORY = {"hf", "github", "git"}
#: written to OUT and removed again before the work begins
_PROBE = ".stockpot-writable"


def scratch_for(url: str) -> str:
    """The directory here that stands for OUT until it is uploaded: always the same one, so that a merge can go on.

    It lies in a directory of ours alone, in STOCKPOT_SCRATCH, else where temporary files do. Raises OutputError where somebody
    else has, or can get into, a directory of that name.
    """
    return os.path.join(_private_folder(), _scratch_name(url))


def _scratch_name(url: str) -> str:
    return f"out-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}"


def _private_name() -> str:
    above = os.path.abspath(os.environ.get("STOCKPOT_SCRATCH") or tempfile.gettempdir())
    return os.path.join(above, f"stockpot-{os.geteuid() if hasattr(os, 'geteuid') else 0}")


def _private_folder() -> str:
    """A directory that nobody else can get into, made where there is none: what lies in it is uploaded as ours."""
    path = _private_name()
    uid = int(path.rpartition("-")[2])
    try:
        make_folders(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
    except OSError as e:
        raise OutputError(f"{path}: needed for unfinished work: {e.strerror or e}") from e
    ours = stat.S_ISDIR(found.st_mode) and (os.name == "nt" or (found.st_uid == uid and not found.st_mode & 0o077))
    if not ours:
        raise OutputError(
            f"{path}: needed for unfinished work, but others can get into it, or it is not ours (a directory of mode 0700 is "
            "expected); move it away, or name another place in STOCKPOT_SCRATCH"
        )
    return path


def _open(url: str) -> tuple[RemoteStore, str]:
    try:
        store, path = open_store(url)
    except StockpotError as e:
        raise OutputError(str(e)) from e
    return store, path.rstrip("/")


def _listing(store: RemoteStore, path: str, url: str) -> set[str]:
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
    store, path = _open(url)
    if url.startswith(("http://", "https://")):
        raise OutputError(f"{url}: HTTP servers are read from, not written to")
    if not path.strip("/"):
        raise OutputError(f"{url}: is the root of a store; name a directory in it")
    for source in inputs:
        if is_url(source):
            other, held = _open(source)
            if type(other.fs) is type(store.fs) and (held + "/").startswith(path + "/"):
                raise OutputError(f"{url}: is or holds the input {source}; choose another OUT")
    there = _listing(store, path, url) - {_PROBE}
    scratch = os.path.join(_private_name(), _scratch_name(url))
    begun = LINEAGE not in there and os.path.isdir(partial_path(scratch))  # an upload that did not finish
    if there and not overwrite and not begun:
        raise OutputError(f"{url}: exists and is not empty; use --overwrite to replace it")
    if there and not begun:
        # what else lies there stays, but for weights: a reader would take them for the new model's
        written = _written(store, path, there)
        others = sorted(n for n in there - written if n.endswith((".safetensors", ".safetensors.index.json")))
        if others:
            raise OutputError(
                f"{url}: holds weights that stockpot did not write ({few_of(others, 3)}), and --overwrite removes nothing else: "
                "move them away, or choose another OUT"
            )
    _check_writable(store, path, url)


def _protocols(store: RemoteStore) -> set[str]:
    found = store.fs.protocol
    return {found} if isinstance(found, str) else set(found)


def _make_folder(store: RemoteStore, path: str) -> None:
    """Stores of objects have no folders, and would take a misspelt name for a bucket to create."""
    if not _protocols(store) & _BUCKETS:
        store.fs.makedirs(path, exist_ok=True)


def _check_writable(store: RemoteStore, path: str, url: str) -> None:
    """A merge of hours should not end with finding out that its result can't be put where it belongs."""
    if _protocols(store) & _KEEPS_HISTORY:
        return
    probe = posixpath.join(path, _PROBE)
    try:
        _make_folder(store, path)
        store.persist(f"writing {probe}", lambda: store.fs.pipe_file(probe, b""))
    except Exception as e:
        raise OutputError(f"{url}: can't be written to: {type(e).__name__}: {e}") from e
    # who may write but not delete may still merge
    with contextlib.suppress(Exception):
        store.fs.rm_file(probe)


def _written(store: RemoteStore, root: str, there: Iterable[str]) -> set[str]:
    """What a lineage there lists."""
    if LINEAGE not in there:
        return set()
    try:
        recorded = json.loads(store.whole(posixpath.join(root, LINEAGE)))["output"]
        names = [*(f["name"] for f in recorded["files"]), *recorded["side_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {n for n in names if isinstance(n, str) and not n.startswith("/") and ".." not in n.split("/")}


def upload(partial: str, url: str, journal: Journal, *, overwrite: bool) -> None:
    """Upload every file of `partial`: tensors, then what lies beside them, then the config, and the lineage after all others.
    Files of an older merge are removed, nothing else. Then `partial` goes.
    """
    store, root = _open(url)
    before = _listing(store, root, url)
    if LINEAGE in before and not overwrite:
        raise OutputError(f"{url}: something has appeared there meanwhile; the result is in {partial}")
    outdated = _written(store, root, before) - {LINEAGE}
    if LINEAGE in before:
        journal.note({"files": sorted(outdated)})  # the lineage that lists them is the first that goes
    else:
        outdated = set(journal.noted)
    names = [
        os.path.relpath(os.path.join(base, name), partial)
        for base, _, found in os.walk(partial)
        for name in found
        if name != JOURNAL
    ]

    def send(name: str) -> None:
        source, target = os.path.join(partial, name), posixpath.join(root, name.replace(os.sep, "/"))
        store.persist(f"writing {target}", lambda: store.fs.put_file(source, target))
        arrived, sent = store.find(target).size, os.path.getsize(source)
        if arrived != sent:
            raise OSError(f"{target} has {arrived} bytes, {sent} were sent")

    def rank(name: str) -> int:
        return (
            3 if name == LINEAGE else 2 if name.endswith("config.json") else 0 if name.endswith(".safetensors") else 1
        )

    try:
        if LINEAGE in before:
            store.persist(f"removing {LINEAGE}", lambda: store.fs.rm_file(posixpath.join(root, LINEAGE)))
        _make_folder(store, root)
        for level in range(3):
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(send, [n for n in names if rank(n) == level]))
        for name in sorted(outdated - {n.replace(os.sep, "/") for n in names}):
            with contextlib.suppress(FileNotFoundError):
                store.persist(f"removing {name}", lambda n=name: store.fs.rm_file(posixpath.join(root, n)))  # type: ignore[misc]
        send(LINEAGE)
    except Exception as e:
        raise OutputError(f"{url}: upload failed: {e}; the result is in {partial}, and the same command goes on") from e
    shutil.rmtree(partial)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(partial))
