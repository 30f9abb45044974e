"""A server on the loopback that answers what a test says, for answers that no server of ours gives on demand."""

import json
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Command = Callable[..., int]
"""What the fixture `command` gives."""


@dataclass(frozen=True)
class Answer:
    """What goes back; `truncate_to` closes the connection after so many bytes of the body."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    truncate_to: int | None = None


@dataclass
class Script:
    """A running server: `act` is called for each request with its path and body, which `bodies` keep."""

    url: str
    act: Callable[[str, bytes], Answer]
    bodies: list[bytes] = field(default_factory=list)

    @property
    def fields(self) -> dict[str, Any]:
        """The JSON object of the only request."""
        (body,) = self.bodies
        return dict(json.loads(body))


@contextmanager
def scripted_server(act: Callable[[str, bytes], Answer]) -> Iterator[Script]:
    """Runs the server in threads."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            script.bodies.append(body)
            answer = script.act(self.path, body)
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body[: answer.truncate_to])
            self.close_connection = answer.truncate_to is not None

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the signature of the base
            """Says nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that goes away is part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    script = Script(f"http://127.0.0.1:{server.server_port}", act)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def png(width: int, height: int) -> bytes:
    """A black picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"".join(b"\0" + bytes(3 * width) for _ in range(height)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
