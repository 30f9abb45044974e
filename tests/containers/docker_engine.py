"""Docker as these tests use it: its command line, Compose projects, containers. Every call has a deadline."""

import os
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from servers import ROOT, http_client, wait_until

SERVICES = ("gateway", "encoder", "rewriter", "vl", "diffusion")
TAG = "test"
BUILD_S, UP_S, CALL_S = 1800.0, 600.0, 180.0
CLIENT_TIMEOUT_S = 120.0


def docker(*arguments: str, timeout_s: float = CALL_S, check: bool = True, **environment: str) -> str:
    """What a docker command prints; fails the test with its words when it fails or takes too long."""
    done = _run(arguments, timeout_s, environment)
    if check and done.returncode != 0:
        pytest.fail(f"docker {' '.join(arguments)}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout.strip()


def refusal(*arguments: str, **environment: str) -> str:
    """What a docker command says that must fail."""
    done = _run(arguments, CALL_S, environment)
    assert done.returncode != 0, f"docker {' '.join(arguments)} succeeded:\n{done.stdout[-4000:]}"
    return done.stderr


def _run(
    arguments: Sequence[str], timeout_s: float, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["docker", *arguments],  # noqa: S607 - wherever this machine has it
            cwd=ROOT,
            env=_environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"docker {' '.join(arguments)} took longer than {timeout_s:g} s")


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what a developer set for zimage, and with these settings."""
    ours = ("ZIMAGE_", "MODEL_PATH", "VL_MODEL_PATH", "LORA_PATH", "COMPOSE_")
    outer = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**outer, "DOCKER_BUILDKIT": "1", **settings}


def inspect(container: str, template: str) -> str:
    """What the engine knows of a container, by a Go template."""
    return docker("inspect", "--format", template, container)


def get_inside(container: str, port: int, path: str) -> str:
    """The body that the service in a container answers, asked from inside: its port is not published."""
    code = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{port}{path}', timeout=20).read().decode())"
    return docker("exec", container, "python", "-c", code)


@dataclass
class Project:
    """A Compose project on CPUs; `url` is where its gateway answers."""

    settings: Mapping[str, str]
    port: int
    files: Sequence[str] = ("compose.yaml", "compose.cpu.yaml")
    name: str = field(default_factory=lambda: f"zimage-test-{uuid.uuid4().hex[:8]}")

    @property
    def url(self) -> str:
        """Where the gateway answers."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, *, timeout_s: float = CLIENT_TIMEOUT_S) -> httpx2.Client:
        """A client of the gateway."""
        return http_client(self.url, timeout_s=timeout_s)

    def compose(self, *arguments: str, timeout_s: float = CALL_S, check: bool = True) -> str:
        """What a `docker compose` command on this project prints."""
        files = [part for file in self.files for part in ("--file", file)]
        told = {"ZIMAGE_PORT": str(self.port), **self.settings}
        return docker(
            "compose", "--project-name", self.name, *files, *arguments, timeout_s=timeout_s, check=check, **told
        )

    def up(self, *arguments: str) -> None:
        """Starts what does not run yet and returns once all of it is healthy."""
        self.compose("up", "--detach", "--no-build", "--wait", *arguments, timeout_s=UP_S)

    def down(self, *arguments: str) -> None:
        """Stops and removes the containers; volumes stay, unless `--volumes` is given."""
        self.compose("down", "--timeout", "20", *arguments, timeout_s=UP_S, check=False)

    def containers(self, service: str) -> list[str]:
        """The ids of a service's containers."""
        return self.compose("ps", "--all", "--quiet", service).split()

    def wait_until_healthy(self, service: str) -> None:
        """Returns once every container of a service is, which after a pause takes a health check's interval."""

        def healthy() -> bool:
            states = {inspect(container, "{{.State.Health.Status}}") for container in self.containers(service)}
            return states == {"healthy"}

        wait_until(healthy, f"{service} is healthy", timeout_s=UP_S)

    def nodes(self, service: str) -> list[dict[str, Any]]:
        """A back end's nodes as the gateway tells of them."""
        with self.client() as client:
            return [node for node in client.get("/api/nodes").json()["nodes"] if node["service"] == service]

    def wait_for_nodes(self, service: str, count: int) -> None:
        """Returns once the gateway knows so many nodes of a service and all of them are ready."""

        def there() -> bool:
            states = [node["state"] for node in self.nodes(service)]
            return len(states) == count and set(states) == {"ready"}

        wait_until(there, f"{count} ready nodes of {service}")


@contextmanager
def in_the_middle(
    ask: Callable[[int], httpx2.Response], count: int, *, clients: int = 8, after: int | None = None
) -> Iterator[list[httpx2.Response]]:
    """Sends `count` requests by `clients` threads; the body runs once `after` of them (half) are answered.

    The list that it gets holds all answers when it is left. Fails when one raises.
    """
    answers: list[httpx2.Response] = []
    reached, lock, limit = threading.Event(), threading.Lock(), count // 2 if after is None else after

    def one(index: int) -> None:
        try:
            answer = ask(index)
        except BaseException:
            reached.set()
            raise
        with lock:
            answers.append(answer)
            if len(answers) >= limit:
                reached.set()

    with ThreadPoolExecutor(clients) as pool:
        sent = [pool.submit(one, index) for index in range(count)]
        assert reached.wait(CLIENT_TIMEOUT_S), "the first requests took too long"
        yield answers
        for future in sent:
            future.result(timeout=CLIENT_TIMEOUT_S)


def make_readable(folder: Path) -> Path:
    """Lets the user of the containers read a checkpoint, which safetensors writes for its owner only."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
