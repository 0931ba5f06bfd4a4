"""Part of the Hugging Face hub's HTTP API, for its real client: create, upload and download repositories in memory.

One revision, ``main``, whose commit is a checksum of the files; every file is sent and stored as a regular one. A wrong
path is a 404, and writing without the token a 401, with the hub's headers. Repositories of the organization ``503``
answer with this status, as of any other number, and those of ``drop`` by closing the connection.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_for_tests"
Repositories = dict[str, dict[str, bytes]]


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    repositories: Repositories
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer descriptions, lists of files and files."""
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if self._fails(name):
            return None
        files = self.repositories.get(name)
        if files is None:
            return self._send({}, 404, {"X-Error-Code": "RepoNotFound"})
        commit = _oid(b"".join(files.values()))
        if parts[0] == "api" and "tree" in parts:
            entries = [{"type": "file", "path": k, "size": len(v), "oid": _oid(v)} for k, v in files.items()]
            return self._send(entries)
        if parts[0] == "api":
            return self._send({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self._send({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self._send(content, 200, {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"'})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Answer the creation of a repository and the two steps of a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._send({"error": "Invalid token"}, 401)
        url = f"http://{self.headers['Host']}"
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[1:] == ["repos", "create"]:
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            if self._fails(name):
                return None
            self.repositories.setdefault(name, {})
            return self._send({"url": f"{url}/{name}"})
        if parts[1] == "validate-yaml":
            return self._send({"warnings": [], "errors": []})
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self._send({"files": modes})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._send({"commitUrl": f"{url}/{name}/commit/main", "commitOid": "0" * 40})

    def _fails(self, name: str) -> bool:
        """Answer for a repository that never works; return whether it is one."""
        organization = name.split("/")[0]
        if organization == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif organization.isdecimal():
            self._send({"error": "by its name"}, int(organization))
        return organization == "drop" or organization.isdecimal()

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def fake_hub() -> Iterator[tuple[str, Repositories]]:
    """Run the server; yield its address, for ``HF_ENDPOINT``, and its repositories: content by file name by name."""
    repositories: Repositories = {}
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
