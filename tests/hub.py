"""A small model and data hub on loopback: folders under repository names, commits, and failures on demand."""

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

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")
REFUSALS = {
    "gated": (401, "GatedRepo"), "gated for this token": (403, "GatedRepo"), "not shown": (401, ""),
    "no repository": (404, "RepoNotFound"), "no revision": (404, "RevisionNotFound"), "no file": (404, "EntryNotFound"),
    "forbidden": (403, ""), "too many": (429, ""), "broken": (500, ""), "down": (503, ""),
}  # fmt: skip
"""Status and X-Error-Code of each answer that refuses. `not shown` is what is given for what does not exist, too."""
TORN = ("cut", "longer", "shorter")
"""Faults of a body alone: it ends in the middle, or has another size than HEAD says."""


class Hub:
    """What the hub serves, how it fails, and what it was asked."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.address = ""
        self.requests: list[str] = []
        self.main: dict[str, str] = {}
        self.commits: dict[str, dict[str, Path]] = {}
        self._faults: dict[tuple[str, str | None], str] = {}
        for name, folder in folders.items():
            self.move(name, folder)

    def move(self, name: str, folder: Path) -> str:
        """Make a folder the newest commit of a repository, which `main` is then; returns it."""
        commit = hashlib.sha1(f"{name} {len(self.commits.get(name, {}))}".encode()).hexdigest()
        self.commits.setdefault(name, {})[commit] = folder
        self.main[name] = commit
        return commit

    def fail(self, name: str, fault: str, file: str | None = None) -> None:
        """Answer with a fault, one of REFUSALS, TORN or `dropped`, whatever is asked of a repository or of a file."""
        assert fault in (*REFUSALS, *TORN, "dropped")
        self._faults[name, file] = fault

    def heal(self) -> None:
        """End every failure."""
        self._faults.clear()

    def fault(self, name: str, file: str | None) -> str | None:
        return self._faults.get((name, file)) or self._faults.get((name, None))

    def commit(self, name: str, revision: str) -> str | None:
        found = self.main.get(name) if revision == "main" else revision
        return found if found in self.commits.get(name, {}) else None


class _Handler(BaseHTTPRequestHandler):
    wbufsize = -1  # head and body in one piece
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, content: bytes = b"") -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = urlsplit(self.path).path
        if found := _API.fullmatch(path):
            kind, name, what, revision, inside = (group and unquote(group) for group in found.groups())
            name = f"datasets/{name}" if kind == "datasets" else name
            if commit := self._commit(name, revision or "main", None):
                self._describe(name, commit, what, inside, content)
        elif found := _FILE.fullmatch(path):
            kind, name, revision, inside = (group and unquote(group) for group in found.groups())
            name = f"datasets/{name}" if kind else name
            if commit := self._commit(name, revision, inside):
                self._send_file(name, commit, inside)
        else:
            self._refuse(404, "")

    def _commit(self, name: str, revision: str, file: str | None) -> str | None:
        """Return the commit that is asked for; None where the answer is given already, or none shall be."""
        fault = self.hub.fault(name, file)
        commit = self.hub.commit(name, revision)
        if fault in REFUSALS:
            self._refuse(*REFUSALS[fault], commit or "")
        elif fault == "dropped":
            self.close_connection = True
        elif name not in self.hub.main:
            self._refuse(404, "RepoNotFound")
        elif commit is None:
            self._refuse(404, "RevisionNotFound")
        else:
            return commit
        return None

    def _describe(self, name: str, commit: str, what: str | None, inside: str | None, content: bytes) -> None:
        files = _entries(self.hub.commits[name][commit])
        if what == "tree":
            if inside:
                self._refuse(404, "EntryNotFound", commit)
                return
            answer: Any = files
        elif what == "paths-info":
            wanted = json.loads(content)["paths"]
            answer = [file for file in files if file["path"] in wanted]
        else:
            siblings = [{"rfilename": file["path"]} for file in files]
            answer = {"id": name.removeprefix("datasets/"), "sha": commit, "siblings": siblings, "private": False,
                      "gated": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
        data = json.dumps(answer).encode()
        self._send(200, {"Content-Type": "application/json", "Content-Length": len(data)}, data)

    def _send_file(self, name: str, commit: str, inside: str) -> None:
        path = self.hub.commits[name][commit] / inside
        if not path.is_file():
            self._refuse(404, "EntryNotFound", commit)
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        begin, middle = 0, len(data) // 2
        fault = self.hub.fault(name, inside) if self.command == "GET" else None
        if fault in ("longer", "shorter"):
            data = data + b"more" if fault == "longer" else data[:-4]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            begin = int(asked[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        end = middle if fault == "cut" else len(data)
        status = 206 if "Content-Range" in headers else 200
        self._send(status, headers | {"Content-Length": len(data) - begin}, data[begin : max(begin, end)])

    def _refuse(self, status: int, code: str, commit: str = "") -> None:
        told = {"X-Error-Code": code, "X-Repo-Commit": commit}
        self._send(status, {name: value for name, value in told.items() if value} | {"Content-Length": 0}, b"")

    def _send(self, status: int, headers: Mapping[str, str | int], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

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
def hub(folders: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve folders under names such as `google/flan-t5-small` or `datasets/knkarthick/samsum`."""
    served = Hub(folders)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": served}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    served.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
