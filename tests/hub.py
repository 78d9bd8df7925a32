"""A server that speaks as much of the Hugging Face hub's API as fetching a model needs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Repository:
    """What a repository has, and to whom.

    Attributes:
      files: content by path.
      revisions: commit of each branch and tag.
      gated: its files are refused to those who send no token.
    """

    files: Mapping[str, bytes]
    revisions: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"main": COMMIT})
    gated: bool = False


@dataclasses.dataclass
class Hub:
    """A running server.

    Attributes:
      repositories: by name; they may be changed.
      fetched: the files that were downloaded, in order.
      answers: how many requests there were.
      broken: the status that every request gets instead, as of a hub that is down.
    """

    repositories: dict[str, Repository] = dataclasses.field(default_factory=dict)
    fetched: list[str] = dataclasses.field(default_factory=list)
    answers: int = 0
    broken: int | None = None
    url: str = ""


def files_of(folder: Path) -> dict[str, bytes]:
    """A directory's files, as a repository has them."""
    return {each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


@contextlib.contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.answers += 1
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.hub.broken:
            return self._send(self.hub.broken, b"")
        is_api, parts = parts[:2] == ["api", "models"], parts[2:] if parts[:2] == ["api", "models"] else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.revisions.get(revision, revision if revision in repository.revisions.values() else None)
        if commit is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return (
            self._api(name, repository, rest, commit) if is_api else self._file(repository, "/".join(rest[2:]), commit)
        )

    def _api(self, name: str, repository: Repository, rest: list[str], commit: str) -> None:
        if rest[:1] == ["tree"]:
            files = repository.files.items()
            return self._json([{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files])
        return self._json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in repository.files]})

    def _file(self, repository: Repository, path: str, commit: str) -> None:
        if repository.gated and "Authorization" not in self.headers:
            return self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if path not in repository.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = repository.files[path]
        if self.command == "GET":
            self.hub.fetched.append(path)
        return self._send(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
