"""The wire side of the Hub stand-in: a server that speaks what clients use of the Hub's protocol."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.hub_repo import Repo

RESOLVE = re.compile(r"^/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")
STORAGE = re.compile(r"^/storage/(?P<repo>[^/]+(?:/[^/]+)?)/(?P<revision>[0-9a-f]{40})/(?P<file>.+)$")
API = re.compile(
    r"^/api/models/(?P<repo>[^/]+(?:/[^/]+)?)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?:/(?P<file>.+))?)?$"
)


@dataclass(frozen=True)
class Request:
    """One request that the stand-in answered; `path` is decoded and has no query."""

    method: str
    path: str
    status: int
    range: str | None = None
    with_token: bool = False


@dataclass
class Fault:
    """What goes wrong for the requests that match `path` (a shell-style pattern on the decoded path).

    One of: `status` (with the Hub's error `code`, if any, and more `headers`); `content`, which replaces the
    answer and has none of the Hub's headers; `cut_after`, which hangs up after so many bytes of a file.
    `delay` holds the answer back, in seconds. `times` is how often it happens, None for always.
    """

    path: str
    methods: tuple[str, ...] = ("HEAD", "GET")
    status: int | None = None
    code: str | None = None
    message: str = "made to fail"
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None
    cut_after: int | None = None
    delay: float = 0.0
    times: int | None = None


class Hub(Protocol):
    """What the server needs to know of the stand-in."""

    repos: dict[str, Repo]
    requests: list[Request]
    strays: list[str]
    closing: threading.Event
    storage_url: str
    uploads: Any

    def fault(self, method: str, path: str, *, cuts: bool) -> Fault | None: ...


class HubServer(ThreadingHTTPServer):
    """A threaded server on a free port of 127.0.0.1, which also drops open connections when it stops."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.hub = hub
        self._connections: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections and drop the open ones, kept alive by a client or not."""
        self.shutdown()
        self.server_close()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of the server's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HubHandler(BaseHTTPRequestHandler):
    """Answers one connection; the server's `hub` holds the repositories, the faults and the log."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *arguments: object) -> None:
        """Keep quiet: requests are in `hub.requests`."""

    def do_CONNECT(self) -> None:
        self._answer_stray()

    def do_POST(self) -> None:
        self._answer_upload()

    def do_PUT(self) -> None:
        self._answer_upload()

    def _answer_upload(self) -> None:
        """Requests with a body: `hub.uploads` knows them."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault(self.command, path, cuts=False)
        if fault is not None and fault.status is not None:
            return self._refuse(fault.status, fault.code, fault.message, fault.headers)
        if not self.headers.get("Authorization") and not path.startswith("/upload/"):
            return self._refuse(401, message="Invalid username or password.")
        answer = self.hub.uploads.answer(self.command, path, body)
        if answer is None:
            self.close_connection = True
            return self._refuse(404, message="the stand-in knows no such address")
        return self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if not self.path.startswith("/"):
            return self._answer_stray()
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault(self.command, path, cuts=False)
        if fault is not None and fault.delay:
            self.hub.closing.wait(fault.delay)
        if fault is not None and fault.status is not None:
            return self._refuse(fault.status, fault.code, fault.message, fault.headers)
        if fault is not None and fault.content is not None:
            return self._send(200, {"Content-Type": "text/html"}, fault.content)
        raw = urlsplit(self.path).path
        match = RESOLVE.match(raw) or STORAGE.match(raw) or API.match(raw)
        if match is None:
            return self._refuse(404, message="the stand-in knows no such address")
        groups = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
        return self._answer_repo(match.re, groups)

    def _answer_repo(self, kind: re.Pattern[str], wanted: dict[str, str]) -> None:
        repo = self.hub.repos.get(wanted["repo"])
        if repo is None:
            # The Hub does not tell strangers whether a repository is missing or private.
            status = 404 if self.headers.get("Authorization") else 401
            return self._refuse(status, "RepoNotFound", "Repository not found")
        revision, file = wanted.get("revision", "main"), wanted.get("file", "")
        if not repo.has_revision(revision):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind is API:
            answer = repo.info() if wanted.get("what") != "tree" else repo.tree(file, self._recursive())
            if answer is not None:
                return self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())
        elif file in repo.files:
            return self._send_file(repo, file, redirect=kind is RESOLVE and repo.is_large(file))
        return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.commit})

    def _recursive(self) -> bool:
        return parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")

    def _send_file(self, repo: Repo, name: str, *, redirect: bool) -> None:
        etag, size = f'"{repo.etags[name]}"', repo.files[name].stat().st_size
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if redirect:
            location = f"{self.hub.storage_url}/storage/{repo.name}/{repo.commit}/{name}"
            linked = {"Location": location, "X-Linked-Etag": etag, "X-Linked-Size": str(size)}
            return self._send(302, {**headers, **linked}, b"")
        first, last, status = 0, size - 1, 200
        if asked := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "")):
            first, last, status = int(asked[1]), min(int(asked[2] or size - 1), size - 1), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            if first > last:
                return self._refuse(416, message="the range lies outside the file")
        self._start(status, {**headers, "ETag": etag, "Content-Length": str(last + 1 - first)})
        if self.command == "HEAD":
            return None
        fault = self.hub.fault(self.command, unquote(urlsplit(self.path).path), cuts=True)
        count = last + 1 - first if fault is None else min(fault.cut_after or 0, last + 1 - first)
        with repo.files[name].open("rb") as file:
            file.seek(first)
            while count > 0 and (piece := file.read(min(count, 1 << 20))):
                self.wfile.write(piece)
                count -= len(piece)
        if fault is not None:
            self.close_connection = True
        return None

    def _refuse(
        self, status: int, code: str | None = None, message: str = "", headers: dict[str, str] | None = None
    ) -> None:
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        body = json.dumps({"error": message, "errors": [{"message": message}]}).encode()
        self._send(status, {"Content-Type": "application/json", **named, **(headers or {})}, body)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._start(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _start(self, status: int, headers: dict[str, str]) -> None:
        path, token = unquote(urlsplit(self.path).path), "Authorization" in self.headers
        self.hub.requests.append(Request(self.command, path, status, self.headers.get("Range"), token))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer_stray(self) -> None:
        self.hub.strays.append(f"{self.command} {self.path}")
        self.close_connection = True
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()
