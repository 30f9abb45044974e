"""The processes that are measured: `zimage serve`, and the baseline in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]

READY_S, STOP_S = 300.0, 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running `zimage serve`."""

    url: str
    process: psutil.Process

    def service(self, name: str) -> psutil.Process:
        """The process of one service."""
        for process in self.process.children(recursive=True):
            if f"services.{name}" in process.cmdline():
                return process
        raise LookupError(f"no process of the {name} service")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])


@contextmanager
def serve(model: Path, data_dir: Path, *flags: str, **settings: str) -> Iterator[Server]:
    """Starts the server on a free port and hands it out once it is ready.

    It keeps no encoded prompts, unless the settings say otherwise: what is measured comes again from run to run.
    """
    port = free_port()
    command = ["serve", "--model-path", str(model), "--port", str(port), "--data-dir", str(data_dir), *flags]
    told = {"ZIMAGE_ENCODING_CACHE_BYTES": "0", **settings}
    with started(["zimage", *command], port, data_dir / "bench-server.log", **told) as server:
        yield server


@contextmanager
def started(module: Sequence[str], port: int, log: Path, **settings: str) -> Iterator[Server]:
    """Starts `python -m` a module with its arguments, and hands it out once `/health/ready` says so."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NO_COLOR": "1", **settings},
        )
    server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
    try:
        _wait_ready(server.url, process, log)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + READY_S
    with httpx2.Client(base_url=url, trust_env=False, timeout=5) as client:
        while time.monotonic() < end and process.poll() is None:
            with suppress(httpx2.HTTPError):
                if client.get("/health/ready").is_success:
                    return
            time.sleep(0.1)
    raise RuntimeError(f"the server did not become ready; see {log}")


class Baseline:
    """A script without the server as a child: a line of JSON in, a line of JSON out."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.facts = self._read()

    def draw(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a picture, or a text; answers its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(body) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the baseline ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def baseline(model: Path, log: Path, *, module: str = "benchmarks.baseline") -> Iterator[Baseline]:
    """Starts a baseline and hands it out once it is loaded; it ends with its standard input."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with process:
        yield Baseline(process)
