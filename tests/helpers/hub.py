"""A small hub of models and data sets on the loopback interface, with commits and with faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import ModelCard, constants

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_PUSH = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")
REFUSALS = {
    "gated": (401, "GatedRepo"), "gated for this token": (403, "GatedRepo"), "not shown": (401, ""),
    "no repository": (404, "RepoNotFound"), "no revision": (404, "RevisionNotFound"), "no file": (404, "EntryNotFound"),
    "forbidden": (403, ""), "too many": (429, ""), "broken": (500, ""), "down": (503, ""),
}  # fmt: skip
"""Status and X-Error-Code of each refusal. Without a token, the real hub answers `not shown` for unknown names too."""
TORN = ("cut", "longer", "shorter")
"""Faults of a file's body: it ends in the middle, or its size differs from the one in the answer to HEAD."""


class Hub:
    """The repositories and faults of a hub, and the requests that it received."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.address = ""
        self.requests: list[str] = []
        self.main: dict[str, str] = {}
        self.commits: dict[str, dict[str, Path]] = {}
        self._faults: dict[tuple[str, str | None], str] = {}
        self.writers: dict[str, str] = {}
        """The owner in whose name a token may write, by token."""
        self.private: set[str] = set()
        self.headers: dict[str, str] = {}
        """Headers that replace those of every file."""
        self.sha: str | None = None
        """What the description of every repository says instead of its commit."""
        self.kept: Path | None = None
        """The folder that receives pushes."""
        for name, folder in folders.items():
            self.move(name, folder)

    def move(self, name: str, folder: Path) -> str:
        """Make a folder the newest commit of a repository, to which `main` then points, and return the commit."""
        commit = hashlib.sha1(f"{name} {len(self.commits.get(name, {}))}".encode()).hexdigest()
        self.commits.setdefault(name, {})[commit] = folder
        self.main[name] = commit
        return commit

    def fail(self, name: str, fault: str, file: str | None = None) -> None:
        """Answer every request for a repository, or for a file, with a fault: one of REFUSALS, TORN or `dropped`."""
        assert fault in (*REFUSALS, *TORN, "dropped")
        self._faults[name, file] = fault

    def heal(self) -> None:
        """Remove all faults."""
        self._faults.clear()

    def fault(self, name: str, file: str | None) -> str | None:
        """Return the fault of a file or of its whole repository."""
        return self._faults.get((name, file)) or self._faults.get((name, None))

    def commit(self, name: str, revision: str) -> str | None:
        """Return the commit of a revision, or None if there is none."""
        commit = self.main.get(name) if revision == "main" else revision
        return commit if commit in self.commits.get(name, {}) else None


class _Handler(BaseHTTPRequestHandler):
    wbufsize = -1  # Send headers and body together.
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        push = _PUSH.fullmatch(self.path)
        if push:
            self._log_request()
            name, action = push.groups()
            if self._may_write(name):
                receive = self._receive_commit if action == "commit" else self._plan_upload
                receive(name, content)
        elif self.path == "/api/validate-yaml":
            self._log_request()
            self._send_json({"errors": [], "warnings": []})
        elif self.path.startswith("/api/repos/create"):
            self._log_request()
            self._create(json.loads(content))
        else:
            self._answer(content)

    def _log_request(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")

    def _may_write(self, name: str) -> bool:
        """Return whether the token of the request may write to a repository; if not, refuse the request."""
        owner = self.hub.writers.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        fault = self.hub.fault(name, None)
        refusal = REFUSALS.get(str(fault)) or ((401, "") if owner is None else (403, ""))
        if fault is None and owner == name.partition("/")[0]:
            return True
        self._refuse(*refusal)
        return False

    def _create(self, repository: dict[str, Any]) -> None:
        name = f"{repository['organization']}/{repository['name']}"
        if not self._may_write(name):
            return
        if name in self.hub.main:
            self._send_json({"error": "exists", "url": f"{self.hub.address}/{name}"}, 409)
            return
        assert self.hub.kept is not None
        empty = self.hub.kept / name / "0"
        empty.mkdir(parents=True)
        (empty / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        self.hub.move(name, empty)
        if repository.get("visibility") == "private":
            self.hub.private.add(name)
        self._send_json({"url": f"{self.hub.address}/{name}"})

    def _plan_upload(self, name: str, content: bytes) -> None:
        """Request every file as a part of the commit, as the real hub does for small files."""
        plan = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
        files = [{"path": file["path"], **plan} for file in json.loads(content)["files"]]
        self._send_json({"files": files})

    def _receive_commit(self, name: str, content: bytes) -> None:
        assert self.hub.kept is not None
        target = self.hub.kept / name / str(len(self.hub.commits[name]))
        shutil.copytree(self.hub.commits[name][self.hub.main[name]], target)
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "deletedFile":
                (target / line["value"]["path"]).unlink()
            elif line["key"] == "file":
                (target / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
        commit = self.hub.move(name, target)
        self._send_json({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})

    def _answer(self, content: bytes = b"") -> None:
        self._log_request()
        path = urlsplit(self.path).path
        api = _API.fullmatch(path)
        file = _FILE.fullmatch(path)
        if api:
            kind, name, view, revision, inside = (group and unquote(group) for group in api.groups())
            name = f"datasets/{name}" if kind == "datasets" else name
            commit = self._commit(name, revision or "main", None)
            if commit:
                self._describe(name, commit, view, inside, content)
        elif file:
            kind, name, revision, inside = (group and unquote(group) for group in file.groups())
            name = f"datasets/{name}" if kind else name
            commit = self._commit(name, revision, inside)
            if commit:
                self._send_file(name, commit, inside)
        else:
            self._refuse(404, "")

    def _commit(self, name: str, revision: str, file: str | None) -> str | None:
        """Return the requested commit. If a fault or an error prevents that, answer the request and return None."""
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

    def _describe(self, name: str, commit: str, view: str | None, inside: str | None, content: bytes) -> None:
        files = _entries(self.hub.commits[name][commit])
        if view == "tree":
            if inside:
                self._refuse(404, "EntryNotFound", commit)
                return
            answer: Any = files
        elif view == "paths-info":
            wanted = json.loads(content)["paths"]
            answer = [file for file in files if file["path"] in wanted]
        else:
            card = self.hub.commits[name][commit] / "README.md"
            tags: list[str] = []
            if card.is_file() and not name.startswith("datasets/"):
                tags = ModelCard.load(card).data.tags or []
            answer = {
                "id": name.removeprefix("datasets/"),
                "sha": self.hub.sha or commit,
                "siblings": [{"rfilename": file["path"]} for file in files],
                "private": name in self.hub.private,
                "gated": False,
                "tags": tags,
                "downloads": 0,
                "likes": 0,
            }
        self._send_json(answer)

    def _send_file(self, name: str, commit: str, inside: str) -> None:
        path = self.hub.commits[name][commit] / inside
        if not path.is_file():
            self._refuse(404, "EntryNotFound", commit)
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        headers |= self.hub.headers
        begin = 0
        middle = len(data) // 2
        fault = self.hub.fault(name, inside) if self.command == "GET" else None
        if fault in ("longer", "shorter"):
            data = data + b"more" if fault == "longer" else data[:-4]
        requested_range = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if requested_range:
            begin = int(requested_range[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        end = middle if fault == "cut" else len(data)
        status = 206 if "Content-Range" in headers else 200
        self._send(status, headers | {"Content-Length": len(data) - begin}, data[begin : max(begin, end)])

    def _send_json(self, answer: Any, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self._send(status, {"Content-Type": "application/json", "Content-Length": len(data)}, data)

    def _refuse(self, status: int, code: str, commit: str = "") -> None:
        headers: dict[str, str | int] = {"Content-Length": 0}
        if code:
            headers["X-Error-Code"] = code
        if commit:
            headers["X-Repo-Commit"] = commit
        self._send(status, headers, b"")

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
    """Return the files of a commit as the hub's API lists them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": file.relative_to(folder).as_posix(),
            "size": file.stat().st_size,
            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
        }
        for file in files
    ]


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path, offline: bool = False) -> None:
    """Have huggingface_hub ask the hub at an address from now on, and keep what it gives in a cache."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)


@contextmanager
def hub(folders: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve folders as repositories named `google/flan-t5-small` or `datasets/knkarthick/samsum`, for example."""
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
