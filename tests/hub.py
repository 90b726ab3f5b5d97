"""A small model and data hub on loopback: folders served under repository names, as client libraries ask for them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+(?:/(.*))?)?")
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class _Hub(BaseHTTPRequestHandler):
    repositories: Mapping[str, Path]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body=True, content=content)

    def _answer(self, body: bool, content: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        if found := _API.fullmatch(path):
            kind, name, what, inside = found.groups()
            self._describe(f"datasets/{name}" if kind == "datasets" else name, what, inside, content, body)
        elif found := _FILE.fullmatch(path):
            kind, name, inside = found.groups()
            self._send_file(f"datasets/{name}" if kind else name, inside, body)
        else:
            self._refuse("EntryNotFound")

    def _describe(self, name: str, what: str | None, inside: str | None, content: bytes, body: bool) -> None:
        if name not in self.repositories:
            self._refuse("RepoNotFound")
            return
        files = _entries(self.repositories[name])
        if what == "tree":
            if inside:
                self._refuse("EntryNotFound")
                return
            answer: Any = files
        elif what == "paths-info":
            wanted = json.loads(content)["paths"]
            answer = [file for file in files if file["path"] in wanted]
        else:
            siblings = [{"rfilename": file["path"]} for file in files]
            answer = {"id": name.removeprefix("datasets/"), "sha": SHA, "siblings": siblings, "private": False,
                      "gated": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
        self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

    def _send_file(self, name: str, inside: str, body: bool) -> None:
        if name not in self.repositories:
            self._refuse("RepoNotFound")
            return
        path = self.repositories[name] / inside
        if not path.is_file():
            self._refuse("EntryNotFound")
            return
        data = path.read_bytes()
        self._send(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA}, body)

    def _send(self, data: bytes, headers: Mapping[str, str], body: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data)), "Accept-Ranges": "none"}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _entries(folder: Path) -> list[dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size,
         "oid": hashlib.sha1(file.read_bytes()).hexdigest()}
        for file in files
    ]  # fmt: skip


@contextmanager
def hub(repositories: Mapping[str, Path]) -> Iterator[str]:
    """Serve folders under names such as `google/flan-t5-small` or `datasets/knkarthick/samsum`; yields the address."""
    handler = type("Hub", (_Hub,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
