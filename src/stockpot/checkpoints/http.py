"""HTTP servers may ignore ranges, send without end, or a byte a second: what is read of one has a ceiling and a deadline."""

from __future__ import annotations

from typing import Any

__all__ = ["TooMuch", "bounded", "is_http"]

#: seconds that any answer may take, and bytes a second that a long one must come with
PATIENCE = 20.0
SLOWEST = 2**15
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
    from fsspec.asyn import sync
    from fsspec.exceptions import FSTimeoutError

    wanted = most if stop is None else stop - start
    try:
        data: bytes = sync(fs.loop, _bounded, fs, url, start, stop, most, timeout=PATIENCE + wanted / SLOWEST)
    except FSTimeoutError as e:
        raise TooMuch(f"{url}: the server is too slow: {wanted} bytes did not come in time") from e
    return data


async def _bounded(fs: Any, url: str, start: int, stop: int | None, most: int) -> bytes:
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {})}
    if stop is not None:
        headers["Range"] = f"bytes={start}-{stop - 1}"
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers=headers, **options) as answer:
        fs._raise_not_found_for_status(answer, url)
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
                    raise TooMuch(f"{url}: more than {most} bytes: too large for a small file of a checkpoint")
                if ranged:
                    raise TooMuch(f"{url}: asked for {limit} bytes, the server sends more")
                break  # it sends the whole: the beginning of it was asked for
        data = b"".join(parts)
        return data if stop is None else data[: stop - start]
