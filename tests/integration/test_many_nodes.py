"""A gateway before several nodes of a service, each a process: killed, stopped, slowed, and back again."""

import re
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from servers import Running, free_port, http_client, picture, running, wait_until, zimage

pytestmark = pytest.mark.slow
TOKEN = "a-token-that-nobody-would-guess"
CLIENTS, ENCODES = 8, 160
MOST_ENCODES = 20_000  # where what is done meanwhile takes long
SLOW_PICTURE = picture(width=256, height=256, steps=60)


@dataclass
class Farm:
    """Nodes of one service on ports that they keep, and the gateway before them."""

    kind: str
    model: Path
    data_dir: Path
    stack: ExitStack
    ports: list[int] = field(default_factory=lambda: [free_port() for _ in range(3)])
    nodes: dict[int, Running] = field(default_factory=dict)

    @property
    def urls(self) -> str:
        """The nodes, as the gateway is told of them."""
        return ",".join(f"http://127.0.0.1:{port}" for port in self.ports)

    def start(self, *ports: int) -> None:
        """Nodes, ready."""
        for port in ports:
            command = zimage("node", self.kind, "--model-path", self.model, "--port", str(port))
            node = running(command, port, self.data_dir, ZIMAGE_SERVICE_TOKEN=TOKEN)
            self.nodes[port] = self.stack.enter_context(node)
        for port in ports:
            self.nodes[port].wait_ready()

    def encodes(self, port: int) -> int:
        """How many encodes a node has answered."""
        with http_client(f"http://127.0.0.1:{port}") as client:
            text = client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text
        found = re.findall(r'zimage_requests_total\{.*route="/v1/hidden_states".*status="200"\} ([0-9.]+)', text)
        return int(float(found[0])) if found else 0


@contextmanager
def farm(kind: str, model: Path, data_dir: Path, count: int) -> Iterator[Farm]:
    with ExitStack() as stack:
        nodes = Farm(kind, model, data_dir, stack, [free_port() for _ in range(count)])
        nodes.start(*nodes.ports)
        yield nodes


@contextmanager
def gateway(data_dir: Path, **settings: str) -> Iterator[Running]:
    port = free_port()
    told = {"ZIMAGE_PORT": str(port), "ZIMAGE_SERVICE_TOKEN": TOKEN, **settings}
    with running([sys.executable, "-m", "services.gateway"], port, data_dir, **told) as started:
        started.wait_ready()
        yield started


def states(started: Running, service: str) -> dict[int, str]:
    """The state of each node, by its port."""
    with started.client() as client:
        nodes = client.get("/api/nodes").json()["nodes"]
    return {httpx2.URL(node["url"]).port or 0: node["state"] for node in nodes if node["service"] == service}


class Load:
    """Clients that encode prompts, all different, and what they were answered."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.statuses: Counter[int] = Counter()
        self._goal = MOST_ENCODES
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        """How many have been answered."""
        return self.statuses.total()

    def end_after(self, more: int) -> None:
        """Lets the clients come to their end once so many more are answered."""
        with self._lock:
            self._goal = min(self._goal, self.done + more)

    def work(self) -> None:
        """One client, until there are enough."""
        with http_client(self.url, timeout_s=120) as client:
            while self.done < self._goal:
                answer = client.post("/api/encode", json={"prompt": f"A cat {uuid.uuid4().hex}"})
                with self._lock:
                    self.statuses[answer.status_code] += 1


def under_load(started: Running, act: Callable[[], object]) -> None:
    """Does something to a node after some encodes, with more of them while and after it is done; every client must be
    served."""
    load = Load(started.url)
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(load.work) for _ in range(CLIENTS)]
        try:
            wait_until(lambda: load.done >= ENCODES // 4, "a part of the encodes is done")
            act()
        finally:
            load.end_after(ENCODES * 3 // 4)
        for client in clients:
            client.result(timeout=200)
    assert set(load.statuses) == {200}


@pytest.fixture(scope="module")
def encoders(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with farm("encoder", tiny_checkpoint, tmp_path_factory.mktemp("encoders"), 3) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def encoding(encoders: Farm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    urls = {"ZIMAGE_ENCODER_URLS": encoders.urls, "ZIMAGE_ENCODER_ONLY": "true"}
    with gateway(tmp_path_factory.mktemp("gateway"), **urls) as one:
        yield one


class TestEncoders:
    """Three of them; each test leaves all three working."""

    @pytest.fixture(autouse=True)
    def all_ready(self, encoding: Running, encoders: Farm) -> None:
        wait_until(lambda: set(states(encoding, "encoder").values()) == {"ready"}, "all nodes are ready")

    def test_each_has_a_share_of_the_work(self, encoding: Running, encoders: Farm) -> None:
        """How even it is depends on how quick each process is on a busy machine; the unit tests have that."""
        before = {port: encoders.encodes(port) for port in encoders.ports}
        under_load(encoding, lambda: None)
        taken = [encoders.encodes(port) - before[port] for port in encoders.ports]
        assert sum(taken) >= ENCODES
        assert min(taken) >= ENCODES / 16, taken

    def test_what_is_told_of_them(self, encoding: Running, encoders: Farm) -> None:
        with encoding.client() as client:
            nodes, health = client.get("/api/nodes").json()["nodes"], client.get("/health").json()
        assert [httpx2.URL(node["url"]).port for node in nodes] == encoders.ports
        assert len({node["fingerprint"] for node in nodes}) == 1
        for node in nodes:
            assert (node["device"], node["model"], node["in_flight"]) == ("cpu", encoders.model.name, 0)
            assert node["version"]
        assert (health["status"], health["encoder_loaded"]) == ("healthy", True)
        assert (health["services"]["encoder"]["nodes"], health["services"]["encoder"]["ready_nodes"]) == (3, 3)

    def test_strangers_are_refused(self, encoders: Farm) -> None:
        with encoders.nodes[encoders.ports[0]].client() as client:
            assert client.post("/v1/hidden_states", json={"input": "A cat"}).status_code == 401
            assert client.get("/v1/model").status_code == 401
            assert client.get("/health/ready").status_code == 200

    def test_one_is_killed(self, encoding: Running, encoders: Farm) -> None:
        port = encoders.ports[1]
        try:
            under_load(encoding, encoders.nodes[port].kill)
            wait_until(lambda: states(encoding, "encoder")[port] == "unreachable", "it is noticed")
        finally:
            encoders.start(port)

    def test_one_is_stopped(self, encoding: Running, encoders: Farm) -> None:
        port = encoders.ports[0]
        process = encoders.nodes[port].service("encoder")
        assert process is not None
        try:
            under_load(encoding, process.suspend)
            wait_until(lambda: states(encoding, "encoder")[port] == "unreachable", "it is noticed")
        finally:
            process.resume()

    def test_one_is_slowed(self, encoding: Running, encoders: Farm) -> None:
        process = encoders.nodes[encoders.ports[2]].service("encoder")
        assert process is not None
        over = threading.Event()

        def slow() -> None:
            while not over.wait(0.01):
                process.suspend()
                over.wait(0.1)
                process.resume()

        slowing = threading.Thread(target=slow)
        try:
            under_load(encoding, slowing.start)
        finally:
            over.set()
            slowing.join(30)
            process.resume()

    def test_all_are_stopped_for_a_moment(self, encoding: Running, encoders: Farm) -> None:
        processes = [encoders.nodes[port].service("encoder") for port in encoders.ports]

        def stop() -> None:
            for process in processes:
                assert process is not None
                process.suspend()
            threading.Event().wait(0.5)
            for process in processes:
                assert process is not None
                process.resume()

        under_load(encoding, stop)


@pytest.fixture(scope="module")
def painters(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with farm("diffusion", tiny_checkpoint, tmp_path_factory.mktemp("diffusion"), 2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def settings(
    painters: Farm, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    with farm("encoder", tiny_checkpoint, tmp_path_factory.mktemp("encoder"), 1) as encoders:
        yield {"ZIMAGE_ENCODER_URLS": encoders.urls, "ZIMAGE_DIFFUSION_URLS": painters.urls}


@pytest.fixture(scope="module")
def drawing(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with gateway(tmp_path_factory.mktemp("drawing"), **settings) as one:
        yield one


class TestDiffusion:
    """Two nodes of the diffusion service; each test leaves both working."""

    @pytest.fixture
    def started(self, drawing: Running) -> Running:
        wait_until(lambda: set(states(drawing, "diffusion").values()) == {"ready"}, "all nodes are ready")
        return drawing

    def busy(self, started: Running) -> int | None:
        """The port of the node that draws."""
        with started.client() as client:
            nodes = client.get("/api/nodes").json()["nodes"]
        ports = [httpx2.URL(one["url"]).port for one in nodes if one["service"] == "diffusion" and one["in_flight"]]
        return ports[0] if ports else None

    def running_on(self, started: Running, painters: Farm) -> int:
        """The port of the node whose picture has begun."""

        def begun() -> int | None:
            port = self.busy(started)
            if port is None:
                return None
            with painters.nodes[port].client() as client:
                queue = client.get("/v1/queue", headers={"authorization": f"Bearer {TOKEN}"}).json()
            return port if any(one["step"] > 1 for one in queue["running"]) else None

        return int(wait_until(begun, "a picture in the making"))

    def test_one_is_killed_in_the_middle_of_a_picture(self, started: Running, painters: Farm) -> None:
        with started.client(timeout_s=200) as client, ThreadPoolExecutor(1) as pool:
            whole = client.post("/api/generate", json=SLOW_PICTURE)
            drawing = pool.submit(client.post, "/api/generate", json=SLOW_PICTURE)
            port = self.running_on(started, painters)
            painters.nodes[port].kill()
            try:
                answer = drawing.result(timeout=200)
                assert answer.status_code == 200, answer.text
                assert answer.content == whole.content
                wait_until(lambda: states(started, "diffusion")[port] == "unreachable", "it is noticed")
            finally:
                painters.start(port)

    def test_events_go_on_where_another_one_draws(self, started: Running, painters: Farm) -> None:
        headers = {"accept": "text/event-stream", "x-request-id": "picture-0001"}

        def follow() -> list[Any]:
            with (
                started.client(timeout_s=200) as client,
                client.stream("POST", "/api/generate", json=SLOW_PICTURE, headers=headers) as answer,
            ):
                return [(event.event, event.data) for event in httpx2.EventSource(answer)]

        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(follow)
            process = painters.nodes[self.running_on(started, painters)].service("diffusion")
            assert process is not None
            process.suspend()
            try:
                events = following.result(timeout=200)
            finally:
                process.resume()
        queued = [data for name, data in events if name == "queued"]
        assert len(queued) >= 2
        assert all('"picture-0001"' in data for data in queued)
        assert [name for name, _ in events].count("done") == 1
        assert events[-1][0] == "done"

    def test_the_only_one_is_killed_and_comes_back(self, started: Running, painters: Farm) -> None:
        first, second = painters.ports
        other = painters.nodes[second].service("diffusion")
        assert other is not None
        other.suspend()
        try:
            wait_until(lambda: states(started, "diffusion")[second] == "unreachable", "it is noticed")
            with started.client(timeout_s=200) as client, ThreadPoolExecutor(1) as pool:
                whole = client.post("/api/generate", json=SLOW_PICTURE)
                drawing = pool.submit(client.post, "/api/generate", json=SLOW_PICTURE)
                self.running_on(started, painters)
                painters.nodes[first].kill()
                painters.start(first)
                assert drawing.result(timeout=200).content == whole.content
        finally:
            other.resume()

    def test_a_picture_is_given_up_through_another_gateway(
        self, started: Running, painters: Farm, settings: dict[str, str], tmp_path: Path
    ) -> None:
        body = picture(width=512, height=512, steps=100)
        with (
            gateway(tmp_path / "other", **settings) as other,
            ThreadPoolExecutor(1) as pool,
            started.client(timeout_s=200) as client,
            other.client() as elsewhere,
        ):
            headers = {"x-request-id": "picture-0002"}
            drawing = pool.submit(client.post, "/api/generate", json=body, headers=headers)
            self.running_on(started, painters)
            assert elsewhere.delete("/api/generate/picture-0003").status_code == 404
            assert elsewhere.delete("/api/generate/picture-0002").json() == {"cancelled": "picture-0002"}
            assert (drawing.result(timeout=200).status_code, self.busy(started)) == (409, None)
