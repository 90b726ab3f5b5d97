"""A small model and data hub on loopback: folders under repository names, commits, and failures on demand."""

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

from huggingface_hub import ModelCard

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_PUSH = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
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
        self.writers: dict[str, str] = {}
        """Whose name a token may write under."""
        self.private: set[str] = set()
        self.kept: Path | None = None
        """Where what is pushed is kept."""
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
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.path.startswith(("/api/repos/create", "/api/validate-yaml")) and not _PUSH.fullmatch(self.path):
            self._answer(content)
            return
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif found := _PUSH.fullmatch(self.path):
            name, what = found.groups()
            if self._may_write(name):
                (self._take if what == "commit" else self._plan)(name, content)
        else:
            self._create(json.loads(content))

    def _may_write(self, name: str) -> bool:
        """Return whether the token may write there; where it may not that is answered."""
        owner = self.hub.writers.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        fault = self.hub.fault(name, None)
        refusal = REFUSALS.get(str(fault)) or ((401, "") if owner is None else (403, ""))
        if fault is None and owner == name.partition("/")[0]:
            return True
        self._refuse(*refusal)
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(name):
            return
        if name in self.hub.main:
            self._send_json({"error": "there is one", "url": f"{self.hub.address}/{name}"}, 409)
            return
        assert self.hub.kept is not None
        empty = self.hub.kept / name / "0"
        empty.mkdir(parents=True)
        (empty / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        self.hub.move(name, empty)
        if asked.get("visibility") == "private":
            self.hub.private.add(name)
        self._send_json({"url": f"{self.hub.address}/{name}"})

    def _plan(self, name: str, content: bytes) -> None:
        """Ask for every file within the commit, as the hub does for small ones."""
        files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                 for one in json.loads(content)["files"]]  # fmt: skip
        self._send_json({"files": files})

    def _take(self, name: str, content: bytes) -> None:
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
            siblings, card = (
                [{"rfilename": file["path"]} for file in files],
                self.hub.commits[name][commit] / "README.md",
            )
            tags = (ModelCard.load(card).data.tags or []) if card.is_file() and not name.startswith("datasets/") else []
            answer = {"id": name.removeprefix("datasets/"), "sha": commit, "siblings": siblings,
                      "private": name in self.hub.private, "gated": False, "tags": tags, "downloads": 0,
                      "likes": 0}  # fmt: skip
        self._send_json(answer)

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

    def _send_json(self, answer: Any, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self._send(status, {"Content-Type": "application/json", "Content-Length": len(data)}, data)

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
