"""HTTP servers may ignore ranges, send without end, or a byte a second: what is read of one has a ceiling and a deadline."""

from __future__ import annotations

from collections.abc import Coroutine
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin, urlsplit

__all__ = ["TooMuch", "bounded", "info", "is_http", "listing"]

#: seconds that any answer may take, and bytes a second that a long one must come with
PATIENCE = 20.0
SLOWEST = 2**15
#: bytes of a page that lists a directory, at most
PAGE = 2**23
_CHUNK = 2**18


class TooMuch(OSError):
    """A server sends what was not asked for; asking again would not help."""


def is_http(fs: Any) -> bool:
    """Whether a file system is fsspec's of HTTP servers."""
    protocol = getattr(fs, "protocol", ())
    names = {protocol} if isinstance(protocol, str) else set(protocol)
    return bool(names & {"http", "https"}) and hasattr(fs, "set_session")


def bounded(fs: Any, url: str, start: int, stop: int | None, most: int) -> bytes:
    """Bytes start..stop of a file, or all of it where `stop` is None, at most `most`. Raises TooMuch, OSError."""
    wanted = most if stop is None else stop - start
    data, _ = _in_time(fs, url, _bounded(fs, url, start, stop, most), wanted)
    return bytes(data)


def info(fs: Any, url: str) -> dict[str, Any]:
    """What the server tells of a file, as fsspec has it. Raises TooMuch, OSError."""
    return dict(_in_time(fs, url, fs._info(url), 0))


def listing(fs: Any, url: str) -> list[dict[str, Any]]:
    """The files and folders that a page links to, below itself, as fsspec has them. Raises TooMuch, OSError."""
    data, kind = _in_time(fs, url, _bounded(fs, url, 0, None, PAGE), PAGE)
    if kind not in ("text/html", ""):
        return []
    parser = _Links()
    parser.feed(data.decode("utf-8", "ignore"))
    above = url.partition("?")[0].rstrip("/") + "/"
    found = (urljoin(above, link) for link in parser.found)
    names = dict.fromkeys(u for u in found if _below(u, above))
    return [{"name": u, "size": None, "type": "directory" if u.endswith("/") else "file"} for u in names]


def _below(url: str, above: str) -> bool:
    """Whether an address lies below another one, on whichever of http and https."""
    a, b = urlsplit(url), urlsplit(above)
    return a.netloc == b.netloc and a.path.startswith(b.path) and a.path != b.path and "/../" not in a.path


class _Links(HTMLParser):
    """Where a page's links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _in_time(fs: Any, url: str, call: Coroutine[Any, Any, Any], wanted: int) -> Any:
    from fsspec.asyn import sync
    from fsspec.exceptions import FSTimeoutError

    async def run() -> Any:
        return await call

    try:
        return sync(fs.loop, run, timeout=PATIENCE + wanted / SLOWEST)
    except FSTimeoutError as e:
        raise TooMuch(f"{url}: the server is too slow: its answer did not come in time") from e


async def _bounded(fs: Any, url: str, start: int, stop: int | None, most: int) -> tuple[bytes, str]:
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if stop is not None:
        headers["Range"] = f"bytes={start}-{stop - 1}"
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers=headers, **options) as answer:
        fs._raise_not_found_for_status(answer, url)
        if answer.headers.get("Content-Encoding", "identity") not in ("identity", ""):
            raise TooMuch(f"{url}: is sent compressed, which was not asked for: it could be of any size")
        ranged = answer.status == 206
        if stop is not None and not ranged and start > 0:
            raise TooMuch(f"{url}: the server ignores ranges, so parts of the file can't be read; download it")
        limit = most if stop is None else stop - start
        parts, size = [], 0
        async for chunk in answer.content.iter_chunked(_CHUNK):
            parts.append(chunk)
            size += len(chunk)
            if size > limit:
                if stop is None:
                    raise TooMuch(
                        f"{url}: more than {most} bytes: too large for a small file of a checkpoint, or a listing"
                    )
                if ranged:
                    raise TooMuch(f"{url}: asked for {limit} bytes, the server sends more")
                break  # it sends the whole: the beginning of it was asked for
        data = b"".join(parts)
        kind = answer.headers.get("Content-Type", "").partition(";")[0]
        return (data if stop is None else data[: stop - start]), kind
