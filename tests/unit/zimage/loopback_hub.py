"""A server on the loopback that speaks as much of the Hugging Face hub's protocol as `snapshot_download` asks for.

Large files (safetensors and pickles) are redirected to a content address, as the real hub does; xet is not offered, so
plain HTTP is used. Every request is written down.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 1 << 16
LARGE = (".safetensors", ".bin", ".pt")


@dataclass
class Hub:
    """What the server has and does. Faults may be set at any time; `requests` are (method, path, Range) as asked."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by their path, by the repository's name."""
    url: str = ""
    cdn: str = ""
    """Where large files are, under another name: the library then asks without the token, as of the real one."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    token: str | None = None
    """The token that a request must carry."""
    refusal: tuple[int, dict[str, str]] | None = None
    """Status and headers of the answer to everything."""
    break_after: dict[str, int] = field(default_factory=dict)
    """Closes the connection of a large file after so many bytes, once."""
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes told for a path instead of the true ones."""
    pause_s: float = 0.0
    """A pause between the pieces of a large file."""
    withheld: str | None = None
    """A large file whose body never comes."""
    sent_bytes: int = 0
    """Bytes of large files that went out."""

    def asked_for(self, method: str = "GET") -> list[str]:
        """The files of repositories that were fetched (or looked at with HEAD), in the order of the requests."""
        paths = [path for used, path, _ in self.requests if used == method]
        found = [
            self.large_file(path[5:])[0] if path.startswith("/cdn/") else path.partition(f"/resolve/{COMMIT}/")[2]
            for path in paths
        ]
        return [name for name in found if name]

    def large_file(self, wanted: str) -> tuple[str, bytes]:
        """Path and bytes of the file with this content address."""
        files = ((name, data) for repository in self.files.values() for name, data in repository.items())
        return next((name, data) for name, data in files if name.endswith(LARGE) and address(data) == wanted)


def address(data: bytes) -> str:
    """The content address of a large file."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def loopback_hub(**files: Mapping[str, bytes]) -> Iterator[Hub]:
    """Runs a hub in a thread."""
    hub = Hub({name: dict(paths) for name, paths in files.items()})
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url, hub.cdn = f"http://127.0.0.1:{server.server_port}", f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the signature of the base
        """Says nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("range", "")))
        if self.hub.refusal is not None:
            self._send(self.hub.refusal[0], b"{}", self.hub.refusal[1])
        elif (
            self.hub.token
            and not path.startswith("/cdn/")
            and self.headers.get("authorization") != f"Bearer {self.hub.token}"
        ):
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        else:
            self._route(path)

    def _route(self, path: str) -> None:
        if path.startswith("/cdn/"):
            return self._large(path.removeprefix("/cdn/"))
        for name, files in self.hub.files.items():
            if path == f"/api/models/{name}/revision/main" or path == f"/api/models/{name}/revision/{COMMIT}":
                return self._send_json({"id": name, "sha": COMMIT, "private": False, "siblings": []})
            if path.startswith(f"/api/models/{name}/revision/"):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if path == f"/api/models/{name}/tree/{COMMIT}":
                return self._send_json([self._entry(file, data) for file, data in files.items()])
            if path.startswith(f"/{name}/resolve/{COMMIT}/"):
                return self._file(path.removeprefix(f"/{name}/resolve/{COMMIT}/"), files)
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _entry(self, file: str, data: bytes) -> dict[str, Any]:
        size = self.hub.claimed_sizes.get(file, len(data))
        entry = {"type": "file", "path": file, "size": size, "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
        if file.endswith(LARGE):
            entry["lfs"] = {"oid": address(data), "size": size, "pointerSize": 134}
        return entry

    def _file(self, file: str, files: Mapping[str, bytes]) -> None:
        if file not in files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = files[file]
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not file.endswith(LARGE):
            return self._send(200, data, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})  # noqa: S324
        size = self.hub.claimed_sizes.get(file, len(data))
        linked = {"X-Linked-Etag": f'"{address(data)}"', "X-Linked-Size": str(size)}
        return self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/cdn/{address(data)}"})

    def _large(self, wanted: str) -> None:
        file, data = self.hub.large_file(wanted)
        start = int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        end = start + self.hub.break_after.pop(file, len(data) - start)
        self.close_connection = end < len(data)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{wanted}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        while self.hub.withheld == file:
            time.sleep(0.05)
        for at in range(start, end, PIECE):
            self.wfile.write(data[at : min(at + PIECE, end)])
            self.hub.sent_bytes += min(at + PIECE, end) - at
            time.sleep(self.hub.pause_s)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
