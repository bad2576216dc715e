"""A small local server in place of the hub: the HTTP API that `huggingface_hub` uses to create and fill a repository.

It keeps files, commit messages and visibility by repository. Large files go through git-lfs (a batch, then a PUT each),
as on the hub for clients without xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "hf_standin"
OWNER = "mina"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The content of the server, and the faults that it should show."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    read_only: bool = False
    loses: str | None = None  # a file that a commit leaves out
    damages: str | None = None  # a file whose content changes on arrival


@contextmanager
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(_Handler):
        hub = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self._begin()
        if path == "/api/whoami-v2":
            self._answer({"name": OWNER, "type": "user", "orgs": []})
        elif path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            repository = self.hub.repositories.get(name)
            if repository is None:
                self._refuse(404, "Repository not found", "RepoNotFound")
            else:
                self._answer({"id": name, "private": repository.private, "siblings": []})
        else:
            self._refuse(404, f"no such thing: {path}")

    def do_PUT(self) -> None:
        path = self._begin(signed=True)
        content = self._body()
        oid = path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            self._refuse(400, "the content has another hash")
            return
        self.hub.objects[oid] = content
        self._answer({})

    def do_POST(self) -> None:
        path = self._begin()
        body = self._body()
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "Invalid username or password.")
        elif self.hub.read_only:
            self._refuse(403, "You don't have the rights to write here.")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":  # the YAML of a model card, before a commit
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            self._post_to_repository(path, body)

    def _post_to_repository(self, path: str, body: bytes) -> None:
        _, _, _, owner, name, what, *_ = path.split("/")
        repository = self.hub.repositories[f"{owner}/{name}"]
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self._answer({"files": modes})
        elif what == "commit":
            self._commit(f"{owner}/{name}", repository, [json.loads(line) for line in body.splitlines()])
        elif what == "paths-info":
            paths = parse_qs(body.decode())["paths"]
            self._answer([_info(repository, name) for name in paths if name in repository.files])
        else:
            self._refuse(404, f"no such thing: {path}")

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request.get('organization') or OWNER}/{request['name']}"
        private = request.get("visibility") == "private" or request.get("private") is True
        self.hub.repositories[name] = Repository(private=private)
        self._answer({"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def _batch(self, request: dict[str, Any]) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.address}/objects/{entry['oid']}"}}}
            for entry in request["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
                continue
            path = value["path"]
            if line["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]]
                repository.large.add(path)
            else:
                content = base64.b64decode(value["content"])
            if path != self.hub.loses:
                repository.files[path] = content + (b"!" if path == self.hub.damages else b"")
        oid = hashlib.sha1(str(len(repository.messages)).encode()).hexdigest()
        self._answer({"commitUrl": f"{self.hub.address}/{name}/commit/{oid}", "commitOid": oid})

    def _begin(self, *, signed: bool = False) -> str:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", "0")))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value: Any, status: int = 200, code: str | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        self._answer({"error": message}, status, code)


def _info(repository: Repository, path: str) -> dict[str, Any]:
    content = repository.files[path]
    git_name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    info: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_name}
    if path in repository.large:
        large = {"size": len(content), "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
        info["lfs"] = large
    return info
