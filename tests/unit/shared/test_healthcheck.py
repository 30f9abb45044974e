"""`python -m shared.healthcheck`: what it asks of a service, and its exit status."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from shared.healthcheck import is_healthy

LIVE, READY = "/health/live", "/health/ready"


class Service(HTTPServer):
    """Answers 200 on the paths of `good`, 503 on all others."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.good = {LIVE, READY}


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        self.send_response(200 if self.path in self.server.good else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Says nothing."""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as opened:
        thread = threading.Thread(target=opened.serve_forever)
        thread.start()
        yield opened
        opened.shutdown()
        thread.join(10)


def test_ready(service: Service, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    assert is_healthy(service.server_port, started=False, mark=mark)
    service.good = {LIVE}
    assert not is_healthy(service.server_port, started=False, mark=mark)
    assert not mark.exists()


def test_ready_once_and_live_since(service: Service, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    service.good = {LIVE}
    assert not is_healthy(service.server_port, started=True, mark=mark)
    service.good = {LIVE, READY}
    assert is_healthy(service.server_port, started=True, mark=mark)
    service.good = {LIVE}
    assert is_healthy(service.server_port, started=True, mark=mark)
    service.good = set()
    assert not is_healthy(service.server_port, started=True, mark=mark)


def test_the_exit_status(service: Service) -> None:
    def status() -> int:
        command = [sys.executable, "-m", "shared.healthcheck", str(service.server_port)]
        return subprocess.run(command, timeout=60, check=False).returncode

    assert status() == 0
    service.good = set()
    assert status() == 1


def test_nobody_there(service: Service, tmp_path: Path) -> None:
    port = service.server_port
    service.server_close()
    assert not is_healthy(port, started=False)
    assert not is_healthy(port, started=True, mark=tmp_path / "mark")
