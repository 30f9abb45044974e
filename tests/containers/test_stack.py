"""`docker stack deploy` on a swarm of one machine: replicas found by name, updates under load, removal."""

import secrets
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import httpx2
import pytest
from docker_engine import CLIENT_TIMEOUT_S, SERVICES, TAG, docker, inspect
from servers import free_port, http_client, picture, png_size, wait_until

pytestmark = pytest.mark.slow
NAME, SECRET = "zimage-test-stack", "zimage_service_token"
REPLICAS = 2
ON_ONE_MACHINE = {f"{service.upper()}_ROLE": "cpu" for service in SERVICES}
DEPLOYED_S, UPDATED_S, REMOVED_S = 600.0, 600.0, 180.0
CLIENTS = 3


@dataclass(frozen=True)
class Stack:
    """A deployed stack; `url` is where the balancer in front of its gateways answers."""

    url: str
    settings: Mapping[str, str]

    def client(self) -> httpx2.Client:
        """A client of the gateways; which of them answers is the balancer's affair."""
        return http_client(self.url, timeout_s=CLIENT_TIMEOUT_S)

    def deploy(self) -> None:
        """Deploys it and returns once every replica runs, which it does when it is healthy."""
        file = ("--compose-file", "deploy/stack.yaml", "--resolve-image", "never", "--detach=true")
        docker("stack", "deploy", *file, NAME, **self.settings)
        wait_until(self.is_complete, "every replica runs", timeout_s=DEPLOYED_S)

    def replicas(self) -> dict[str, str]:
        """How many replicas of each service run, as 2/2."""
        told = docker("stack", "services", "--format", "{{.Name}} {{.Replicas}}", NAME)
        return {name.removeprefix(f"{NAME}_"): count.split()[0] for name, count in map(_halves, told.splitlines())}

    def is_complete(self) -> bool:
        """Whether all that is wanted runs."""
        return all(here == wanted for here, _, wanted in (count.partition("/") for count in self.replicas().values()))

    def containers(self) -> list[str]:
        """The ids of its containers, of those too that have ended."""
        return docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.stack.namespace={NAME}").split()


def _halves(line: str) -> tuple[str, str]:
    name, _, count = line.partition(" ")
    return name, count


@pytest.fixture(scope="module")
def swarm() -> Iterator[None]:
    """This machine as a swarm of its own, with the label and the secret that the stack asks for."""
    state = docker("info", "--format", "{{.Swarm.LocalNodeState}}")
    if state != "inactive":
        pytest.skip(f"this machine is in a swarm already ({state}), which this test would change")
    docker("swarm", "init", "--advertise-addr", "127.0.0.1")
    try:
        node = docker("info", "--format", "{{.Swarm.NodeID}}")
        docker("node", "update", "--label-add", "zimage.role=cpu", "--label-add", "zimage.data=true", node)
        subprocess.run(  # the token comes by standard input, so that no list of processes shows it
            ["docker", "secret", "create", SECRET, "-"],  # noqa: S607
            input=secrets.token_hex(32).encode(),
            stdout=subprocess.DEVNULL,
            timeout=60,
            check=True,
        )
        yield
    finally:
        docker("swarm", "leave", "--force")


@pytest.fixture(scope="module")
def stack(swarm: None, settings: dict[str, str]) -> Iterator[Stack]:
    """Two replicas of each service, all healthy."""
    port = free_port()
    told = {
        **settings,
        **ON_ONE_MACHINE,
        **{f"{service.upper()}_REPLICAS": str(REPLICAS) for service in SERVICES},
        **dict.fromkeys(("ZIMAGE_TEXT_ENCODER_DEVICE", "ZIMAGE_DIT_DEVICE", "ZIMAGE_VAE_DEVICE"), "cpu"),
        "DIFFUSION_PER_MACHINE": str(REPLICAS),
        "ZIMAGE_VL_URLS": "http://tasks.vl:7863",
        "ZIMAGE_PORT": str(free_port()),
    }
    deployed = Stack(f"http://127.0.0.1:{port}", told)
    try:
        deployed.deploy()
        network, published = ("--network", f"{NAME}_front"), ("--publish", f"127.0.0.1:{port}:8000")
        mounted = ("--volume", f"{Path(__file__).parent / 'balancer.py'}:/balancer.py:ro")
        image, command = f"zimage-gateway:{TAG}", ("python", "/balancer.py", "tasks.gateway", "7860")
        docker("run", "--detach", "--name", f"{NAME}-balancer", *network, *published, *mounted, image, *command)
        yield deployed
    finally:
        remove(deployed)


def remove(stack: Stack) -> None:
    """Removes the stack and its volumes; does nothing where it is gone."""
    docker("rm", "--force", f"{NAME}-balancer", check=False)
    docker("stack", "rm", NAME, check=False)
    wait_until(lambda: not stack.containers(), "no container is left", timeout_s=REMOVED_S)
    label = f"label=com.docker.stack.namespace={NAME}"
    wait_until(
        lambda: not docker("network", "ls", "--quiet", "--filter", label), "no network is left", timeout_s=REMOVED_S
    )
    volumes = docker("volume", "ls", "--quiet", "--filter", label).split()
    if volumes:
        docker("volume", "rm", *volumes)


@contextmanager
def under_load(stack: Stack) -> Iterator[list[httpx2.Response]]:
    """Clients that encode and draw until the body ends; the list holds every answer by then. Fails when one raises."""
    answers: list[httpx2.Response] = []
    over = Event()

    def work(number: int) -> None:
        index = 0
        while not over.is_set():
            index += 1
            body = picture(prompt=f"picture {number}.{index}", seed=index)
            for path, fields in (("/api/generate", body), ("/api/encode", {"prompt": f"text {number}.{index}"})):
                with stack.client() as client:  # a connection for each request: connections are what is spread
                    answers.append(client.post(path, json=fields))

    with ThreadPoolExecutor(CLIENTS) as pool:
        working = [pool.submit(work, number) for number in range(CLIENTS)]
        try:
            yield answers
        finally:
            over.set()
        for future in working:
            future.result(timeout=CLIENT_TIMEOUT_S)


def test_two_replicas_of_each_service(stack: Stack) -> None:
    assert stack.replicas() == {"redis": "1/1", **dict.fromkeys(SERVICES, f"{REPLICAS}/{REPLICAS}")}
    with stack.client() as client:
        wait_until(lambda: client.get("/health").json()["status"] == "healthy", "/health is healthy")
        nodes = client.get("/api/nodes").json()["nodes"]
        assert Counter(node["service"] for node in nodes) == dict.fromkeys(set(SERVICES) - {"gateway"}, REPLICAS)
        drawn = client.post("/api/generate", json=picture())
        assert drawn.status_code == 200, drawn.text
        assert png_size(drawn.content) == (64, 64)
        assert drawn.headers["x-history-id"]


def test_the_services_ask_for_the_token(stack: Stack) -> None:
    (container, *_) = docker("ps", "--quiet", "--filter", f"name={NAME}_encoder").split()
    code = (
        "import urllib.request as r, urllib.error as e\n"
        "try: print(r.urlopen('http://127.0.0.1:7861/v1/models', timeout=20).status)\n"
        "except e.HTTPError as refused: print(refused.code)"
    )
    assert docker("exec", container, "python", "-c", code) == "401"
    assert "ZIMAGE_SERVICE_TOKEN=" not in inspect(container, "{{.Config.Env}}")


@pytest.mark.parametrize("service", SERVICES)
def test_an_update_under_load_is_not_noticed(stack: Stack, service: str) -> None:
    before = set(stack.containers())
    with under_load(stack) as answers:
        docker("service", "update", "--quiet", "--force", "--detach=false", f"{NAME}_{service}", timeout_s=UPDATED_S)
        wait_until(stack.is_complete, "every replica runs again", timeout_s=UPDATED_S)
    assert len(set(stack.containers()) - before) == REPLICAS
    assert len(answers) > 2 * CLIENTS
    assert [(answer.status_code, answer.text) for answer in answers if answer.is_error] == []


def test_removal_leaves_nothing(stack: Stack) -> None:
    assert stack.containers()
    remove(stack)
    assert not stack.containers()
