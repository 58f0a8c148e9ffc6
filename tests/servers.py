"""Servers that tests start on this machine: files over HTTP with ranges, and as much of the Hugging Face Hub as is needed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Files(BaseHTTPRequestHandler):
    """GET and HEAD of files below `root`, with ranges; directories as pages of links. `log` keeps (method, path, range)."""

    root: Path
    log: list[tuple[str, str, str | None]]
    tells_sizes = True
    #: which of ETag and Last-Modified are told; called after each answer to a GET
    stamps = ("ETag",)
    after: Callable[[], None] | None = None

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.serve(body=False)

    def do_GET(self) -> None:
        self.serve(body=True)

    def serve(self, *, body: bool) -> None:
        self.log.append((self.command, self.path, self.headers.get("Range")))
        path = self.root / self.path.partition("?")[0].strip("/")
        if path.is_dir():
            links = "".join(f'<a href="{self.path.rstrip("/")}/{p.name}">{p.name}</a>' for p in sorted(path.iterdir()))
            self.send(200, links.encode(), {"Content-Type": "text/html"}, body=body)
        elif path.is_file():
            self.file(path, {}, body=body)
        else:
            self.send(404, b"", {}, body=body)

    def file(self, path: Path, headers: dict[str, str], *, body: bool) -> None:
        data = path.read_bytes()
        modified = formatdate(path.stat().st_mtime, usegmt=True)
        known = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Last-Modified": modified}
        headers = {"Accept-Ranges": "bytes", **{k: known[k] for k in self.stamps}, **headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and self.tells_sizes:
            start, stop = int(asked[1]), min(int(asked[2] or len(data) - 1) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self.send(206, data[start:stop], headers, body=body)
        else:
            self.send(200, data, headers, body=body)

    def send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        if self.tells_sizes:
            headers = {**headers, "Content-Length": str(len(data))}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)
            if self.after is not None:
                self.after()

    def json(self, doc: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(doc).encode(), {"Content-Type": "application/json", **(headers or {})}, body=True)


class _Hub(_Files):
    """Models `org/name` that lie in `root/org/name`, all at one commit, called main."""

    def serve(self, *, body: bool) -> None:
        self.log.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self.about(found[1], found[2])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self.tree(found[1], found[3] or "")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], found[3], body=body)
        else:
            self.send(404, b"", {}, body=body)

    def do_POST(self) -> None:
        self.log.append((self.command, self.path, None))
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", self.path)
        if not found or not (self.root / found[1]).is_dir():
            return self.missing()
        asked = json.loads(raw) if raw.startswith(b"{") else {"paths": re.findall(rb"paths=([^&]+)", raw)}
        paths = [p if isinstance(p, str) else p.decode() for p in asked["paths"]]
        rows = [self.row(self.root / found[1], self.root / found[1] / p) for p in paths]
        return self.json([r for r in rows if r])

    def missing(self) -> None:
        self.json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def about(self, name: str, revision: str | None) -> None:
        folder = self.root / name
        if not folder.is_dir():
            return self.missing()
        if revision not in (None, "main", COMMIT):
            return self.json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = [{"rfilename": p.relative_to(folder).as_posix()} for p in sorted(folder.rglob("*")) if p.is_file()]
        return self.json({"id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": files, "tags": []})

    def row(self, folder: Path, path: Path) -> dict[str, Any] | None:
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        if not path.is_file():
            return None
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest[:40]}

    def tree(self, name: str, below: str) -> None:
        folder = self.root / name
        if not (folder / below).is_dir():
            return self.missing()
        return self.json([self.row(folder, p) for p in sorted((folder / below).iterdir())])

    def resolve(self, name: str, file: str, *, body: bool) -> None:
        path = self.root / name / file
        if not (self.root / name).is_dir():
            return self.missing()
        if not path.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body=body)
        return self.file(path, {"X-Repo-Commit": COMMIT}, body=body)


@contextlib.contextmanager
def serving(
    root: Path, *, hub: bool = False, tells_sizes: bool = True, **more: Any
) -> Iterator[tuple[str, list[tuple[str, str, str | None]]]]:
    """(the address, what was asked of it) of a server of the files below `root`. One that tells no sizes knows no ranges.

    more: attributes of the handler
    """
    log: list[tuple[str, str, str | None]] = []
    handler = type(
        "Handler", (_Hub if hub else _Files,), {"root": root, "log": log, "tells_sizes": tells_sizes, **more}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        server.server_close()
