"""Real processes for tests: `zimage serve`, a node or a gateway alone. Waits are bounded, nothing outlives its test.

Each process carries a mark of its own in its environment, which its children inherit: so a child is found whoever its
parent is by then.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("ZIMAGE_SHARED", ROOT.parent / "shared"))
READY_S, STOP_S, WAIT_S = 120.0, 60.0, 60.0
_MARK = "ZIMAGE_TEST_MARK"


def shared_file(path: str) -> Path:
    """A file of the folder with the specification; skips the test where that folder is not beside the repository."""
    file = SHARED / path
    if not file.is_file():
        pytest.skip(f"{file} is not there; ZIMAGE_SHARED names the folder that holds {path}.")
    return file


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])


def wait_until(condition: Callable[[], Any], what: str, *, timeout_s: float = WAIT_S) -> Any:
    """The first true value of `condition`, asked again and again. Fails the test when time is up."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"still not so after {timeout_s:g} s: {what}")
        time.sleep(0.05)
    return value


def http_client(base_url: str, *, timeout_s: float = WAIT_S) -> httpx2.Client:
    """A client for a local server, whatever proxies the environment names."""
    return httpx2.Client(base_url=base_url, timeout=timeout_s, trust_env=False)


def environment(**settings: str) -> dict[str, str]:
    """This process's environment without the settings of zimage that a developer may have set, and with these.

    One thread for torch: with models this small a second one only waits, the longer the busier the machine is.
    """
    outer = {name: value for name, value in os.environ.items() if not name.startswith("ZIMAGE_")}
    return {**outer, "NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", **settings}


def zimage(*arguments: str | Path) -> list[str]:
    """The command line of `zimage` with these arguments."""
    return [sys.executable, "-m", "zimage", *map(str, arguments)]


@dataclass
class Running:
    """A started command; `url` is where it answers, `log` the file with its output."""

    process: subprocess.Popen[bytes]
    url: str
    data_dir: Path
    log: Path
    mark: str
    stopped: bool = field(default=False)

    @property
    def output(self) -> str:
        """What it wrote to its standard output and error so far."""
        return self.log.read_text(errors="replace")

    def client(self, *, timeout_s: float = WAIT_S) -> httpx2.Client:
        """A client of it."""
        return http_client(self.url, timeout_s=timeout_s)

    def service_client(self, name: str) -> httpx2.Client:
        """A client of one of its services, past the gateway."""
        with self.client() as client:
            return http_client(client.get("/health").json()["services"][name]["url"])

    def events(self, service: str) -> list[dict[str, Any]]:
        """The lines of a service's log that are JSON."""
        events = []
        for line in (self.data_dir / "logs" / f"{service}.log").read_text().splitlines():
            with suppress(ValueError):
                events.append(json.loads(line))
        return events

    def processes(self) -> list[psutil.Process]:
        """The processes of this command that still run, the command itself included."""
        return processes_of(self.mark)

    def service(self, name: str) -> psutil.Process | None:
        """The process of a service, None while there is none."""
        for process in self.processes():
            with suppress(psutil.Error):
                if f"services.{name}" in process.cmdline():
                    return process
        return None

    def is_live(self) -> bool:
        """Whether it answers at all."""
        return self._answers("/health/live")

    def is_ready(self) -> bool:
        """Whether it says that it can work."""
        return self._answers("/health/ready")

    def _answers(self, path: str) -> bool:
        with self.client(timeout_s=5) as client, suppress(httpx2.HTTPError):
            return client.get(path).is_success
        return False

    def wait_ready(self) -> None:
        """Returns once it can work; fails with its output when it ends before or needs too long."""
        end = time.monotonic() + READY_S
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"not ready (exit status {self.process.returncode}):\n{self.output}")
            time.sleep(0.1)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends the signal and answers the exit status, once no process is left."""
        self.begin_stop(number)
        return self.wait_stopped()

    def begin_stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends the signal."""
        self.stopped = True
        self.process.send_signal(number)

    def wait_stopped(self) -> int:
        """The exit status, once no process is left."""
        try:
            status = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end within {STOP_S:g} s:\n{self.output[-4000:]}")
        assert not self.processes(), f"left behind: {self.processes()}"
        return status

    def kill(self) -> None:
        """Ends whatever is left, at once."""
        self.stopped = True
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait(STOP_S)


@contextmanager
def running(command: Sequence[str], port: int, data_dir: Path, **settings: str) -> Iterator[Running]:
    """Starts a command that answers on `port`; at the end stops it by SIGTERM, which must end it with status 0."""
    data_dir.mkdir(parents=True, exist_ok=True)
    mark, log = uuid.uuid4().hex, data_dir / f"output-{port}.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=data_dir,
            env=environment(**settings, **{_MARK: mark}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Running(process, f"http://127.0.0.1:{port}", data_dir, log, mark)
    try:
        yield server
        if not server.stopped:
            status = server.stop()
            assert status == 0, f"SIGTERM ended it with status {status}:\n{server.output[-4000:]}"
    finally:
        server.kill()


@contextmanager
def serve(model: Path, data_dir: Path, *flags: str, **settings: str) -> Iterator[Running]:
    """`zimage serve` on a free port, ready."""
    port = free_port()
    command = zimage("serve", "--model-path", model, "--port", str(port), "--data-dir", data_dir, *flags)
    with running(command, port, data_dir, **settings) as server:
        server.wait_ready()
        yield server


@dataclass(frozen=True)
class Ended:
    """A command that ran to its end."""

    status: int
    stdout: str
    stderr: str
    left: list[psutil.Process]


def run(command: Sequence[str], cwd: Path, *, timeout_s: float = 120, **settings: str) -> Ended:
    """Runs a command to its end; `left` are the processes that it left behind, which are then killed."""
    mark = uuid.uuid4().hex
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment(**settings, **{_MARK: mark}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr, processes_of(mark))
    finally:
        for process in processes_of(mark):
            with suppress(psutil.Error):
                process.kill()


def processes_of(mark: str) -> list[psutil.Process]:
    """The living processes whose environment carries the mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def picture(**fields: Any) -> dict[str, Any]:
    """The body of a small, quick picture, with these fields instead of its own."""
    return {"prompt": "A red circle on a blue background", "width": 64, "height": 64, "steps": 2, "seed": 7, **fields}


LONG_PICTURE = picture(width=512, height=512, steps=100)
"""A picture that takes seconds even on the tiny checkpoint, in many steps; for tests that do not wait for its end."""


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height that a PNG's header names."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n", f"not a PNG: {png[:100]!r}"
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])


@contextmanager
def sent(url: str, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A POST of which nobody reads the answer; leaving closes the connection as a client does that goes away."""
    host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + data)
        yield connection
