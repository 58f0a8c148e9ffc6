"""Models of the Hugging Face Hub by their ids, through huggingface_hub's cache.

What lies complete in the cache is opened there, without a word to the network. Else the headers are read from the Hub by
ranges, so that a recipe can be planned, and its mistakes found, before anything large is downloaded; `fetch` then brings
the weights into the cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from stockpot.checkpoints.checkpoint import Checkpoint
from stockpot.checkpoints.remote import RemoteCheckpoint, remote_folder
from stockpot.errors import CheckpointError

__all__ = ["HubCheckpoint", "fetch", "fetch_missing", "open_hub"]

#: seconds for the Hub's first answer
_PATIENCE = 10.0


class HubCheckpoint(RemoteCheckpoint):
    """A model of the Hub that is not in the cache yet."""

    @property
    def downloads(self) -> list[str]:
        """Names of the files that `fetch` brings: the weights that count, and what lies beside them."""
        assert self.folder is not None
        prefix = self.folder.root + "/"
        weights = [h.path.removeprefix(prefix) for h in self.files]
        small = [
            os.path.relpath(os.path.join(base, name), self.folder.local)
            for base, _, names in os.walk(self.folder.local)
            for name in names
        ]
        return sorted({*weights, *small})

    @property
    def download_bytes(self) -> int:
        """Size of the weights."""
        return sum(h.size for h in self.files)


def open_hub(ref: str, open_folder: Callable[[Any], Checkpoint]) -> Checkpoint:
    """A model by its id. Raises CheckpointError that says what is missing and why it can't be had."""
    from stockpot.checkpoints.opening import LocalFolder

    try:
        import huggingface_hub
    except ImportError as e:
        raise CheckpointError(
            f"{ref}: no such file or directory; if this is a Hugging Face Hub id: pip install 'stockpot[hub]', or download it "
            f"(`hf download {ref.partition('@')[0]} --local-dir DIR`) and name DIR"
        ) from e
    name, _, revision = ref.partition("@")
    cached, why = _cached(name, revision or None), ""
    if cached is not None:
        try:
            opened = open_folder(LocalFolder(ref, cached))
            if not opened.config and "config.json" not in os.listdir(cached):
                raise CheckpointError(f"{ref}: config.json is missing")
            return opened
        except CheckpointError as e:
            why = str(e)  # a partial download: see what the Hub has
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        where = huggingface_hub.constants.HF_HUB_CACHE
        raise CheckpointError(
            f"{ref}: no such file or directory, and as a Hub id it is not complete in the cache ({where}) while offline mode "
            f"is on{': ' + why if why else ''}"
        )
    return _online(ref, name, revision, why, open_folder)


def _online(ref: str, name: str, revision: str, why: str, open_folder: Callable[[Any], Checkpoint]) -> Checkpoint:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        _ask_for(name, revision)
        folder = remote_folder(f"hf://{name}{'@' + revision if revision else ''}", ref)
    except GatedRepoError as e:
        raise CheckpointError(f"{ref}: a gated model: ask for access on its page, then log in (`hf auth login`)") from e
    except (RepositoryNotFoundError, RevisionNotFoundError, FileNotFoundError) as e:
        which = f", or no revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{ref}: no such file or directory, and no model of this name on the Hub{which} (or a private one: `hf auth login`)"
        ) from e
    except (HfHubHTTPError, OSError, ValueError) as e:
        raise CheckpointError(
            f"{ref}: no such file or directory, and the Hugging Face Hub can't be reached: {_first_line(e)}"
            + (f"; in its cache: {why}" if why else "")
        ) from e
    folder.make = HubCheckpoint
    return open_folder(folder)


def _ask_for(name: str, revision: str) -> None:
    """Ask the Hub for a model once, so that no answer at all is known at once; later calls are patient. Raises OSError."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.HfApi().model_info(name, revision=revision or None, timeout=_PATIENCE)
    except (HfHubHTTPError, ValueError):
        raise
    except Exception as e:  # of the HTTP library's own kinds
        raise OSError(_first_line(e)) from e


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def _cached(name: str, revision: str | None) -> str | None:
    """The directory of a model in the cache, complete or not."""
    import huggingface_hub

    try:
        return str(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:
        return None


def fetch(checkpoint: HubCheckpoint) -> None:
    """Download a model into the cache. Raises CheckpointError."""
    import huggingface_hub

    name, _, revision = checkpoint.ref.partition("@")
    try:
        huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=checkpoint.downloads)
    except Exception as e:
        raise CheckpointError(f"{checkpoint.ref}: download failed: {_first_line(e)}; what is complete is kept") from e


def fetch_missing(checkpoints: Iterable[Checkpoint]) -> bool:
    """Download what is not in the cache yet, parts of computed checkpoints included. Whether there was anything."""
    waiting = [c for c in checkpoints if c.download_bytes]
    for checkpoint in (part for c in waiting for part in (c, *c.parts)):
        if isinstance(checkpoint, HubCheckpoint):
            fetch(checkpoint)
    return bool(waiting)
