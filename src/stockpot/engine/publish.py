"""The last steps: flush, rename into place. OUT is there complete, the old one or the new one; never half.

The journal says what is being published, so that whoever comes after a kill can tidy up: see `tidy`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

from stockpot.engine.journal import Journal, locked, published_record
from stockpot.engine.outdir import (
    JOURNAL,
    LINEAGE,
    alone_in,
    check_free,
    exchange,
    is_journal,
    partial_path,
    remove_written,
)
from stockpot.errors import OutputError
from stockpot.files import sync_folder

__all__ = ["publish", "tidy"]


def publish(partial: str, out: str, journal: Journal, *, overwrite: bool) -> str | None:
    """Flush the directory, rename it to OUT, drop the journal. An old OUT of ours changes places with it and is then removed.

    Whether OUT is free is looked at once more: something may have appeared there during the merge. Where renaming fails, all is
    as before, journal included, and the same command goes on. Returns where an old OUT still lies that could not be removed
    whole. Raises OutputError.
    """
    target = os.path.abspath(out)
    parent = os.path.dirname(target)
    lies, old = partial, ""
    try:
        with alone_in(parent):
            check_free(out, overwrite=overwrite)
            for folder, _, _ in os.walk(partial):  # parts have folders of their own
                sync_folder(folder)
            if os.path.isdir(target) and os.listdir(target):
                old = f"{target}.replaced-{secrets.token_hex(4)}"
                found = os.lstat(target)
                journal.note({"old": os.path.basename(old), "dev": found.st_dev, "ino": found.st_ino})
                _change_places(partial, target, old)
            else:
                journal.note({})
                if os.name == "nt" and os.path.isdir(target):
                    os.rmdir(target)
                os.rename(partial, target)  # in place of an empty directory too
            lies = out
            sync_folder(parent)
        kept = old if old and not _removed(old) else None
        os.unlink(os.path.join(target, JOURNAL))
        sync_folder(target)
        sync_folder(parent)
        return kept
    except OSError as e:
        raise OutputError(f"{out}: could not be put into place: {e.strerror or e}; the result is in {lies}") from e


def _removed(old: str) -> bool:
    """Whether an old OUT is gone; what can't be removed stays where it is."""
    try:
        return remove_written(old)
    except OSError:
        return False


def _change_places(partial: str, target: str, old: str) -> None:
    """The old OUT under its new name, the new one in its place. Raises OSError with all as it was."""
    if exchange(partial, target):
        try:
            os.rename(partial, old)
        except OSError:
            exchange(partial, target)
            raise
        return
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(old, target)
        raise


def tidy(out: str) -> str | None:
    """Finish what a merge that was killed while it published has left: its journal in OUT, the old OUT under another name; or put
    the old OUT back where it was the only one.

    Returns the plan of the merge that is in OUT, where that was only to be tidied up after. Raises OutputError where that merge
    is still at it.
    """
    target = os.path.abspath(out)
    done, begun = os.path.join(target, JOURNAL), os.path.join(partial_path(out), JOURNAL)
    if not os.path.lexists(done) and not os.path.lexists(begun):
        return None
    with alone_in(os.path.dirname(target)):
        try:
            if os.path.lexists(done) and is_journal(done) and os.path.isfile(os.path.join(target, LINEAGE)):
                with locked(done) as fd:
                    plan, record = published_record(fd)
                    for place in _olds(target, record):
                        remove_written(place)
                    os.unlink(done)
                    sync_folder(target)
                    return plan
            if not os.path.lexists(target) and is_journal(begun):
                with locked(begun) as fd:
                    _, record = published_record(fd)
                    for place in _olds(target, record):
                        os.rename(place, target)
                        sync_folder(os.path.dirname(target))
        except OSError as e:
            raise OutputError(f"{out}: what an earlier merge left can't be tidied up: {e.strerror or e}") from e
    return None


def _olds(target: str, record: Mapping[str, Any] | None) -> list[str]:
    """Where the OUT that was replaced lies: known by what it is, not by its name alone."""
    name = (record or {}).get("old")
    if record is None or not isinstance(name, str) or os.path.basename(name) != name or not name:
        return []
    places = [os.path.join(os.path.dirname(target), name), partial_path(target)]
    found = []
    for place in places:
        try:
            held = os.lstat(place)
        except OSError:
            continue
        if (held.st_dev, held.st_ino) == (record.get("dev"), record.get("ino")):
            found.append(place)
    return found
