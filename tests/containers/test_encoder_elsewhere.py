"""An encoder of `deploy/compose.encoder.yaml` and a gateway that reaches it over the network of the machine."""

import secrets
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest
from docker_engine import Project, docker
from servers import free_port, http_client, picture, png_size

pytestmark = pytest.mark.slow
TOKEN = secrets.token_hex(32)
BRIDGE = "{{(index .IPAM.Config 0).Subnet}}"


@pytest.fixture(scope="module")
def node(settings: dict[str, str]) -> Iterator[Project]:
    """The encoder alone, healthy, published on this machine."""
    port = free_port()
    told = {**settings, "ZIMAGE_SERVICE_TOKEN": TOKEN, "ZIMAGE_ENCODER_PORT": str(port)}
    project = Project(told, port, ("deploy/compose.encoder.yaml",))
    try:
        project.up("encoder")
        yield project
    finally:
        project.down("--volumes")


@pytest.fixture(scope="module")
def server(settings: dict[str, str], node: Project) -> Iterator[Project]:
    """Everything but an encoder."""
    machine = next(IPv4Network(docker("network", "inspect", "bridge", "--format", BRIDGE)).hosts())
    urls = {"ZIMAGE_SERVICE_TOKEN": TOKEN, "ZIMAGE_ENCODER_URLS": f"http://{machine}:{node.port}"}
    project = Project({**settings, **urls}, free_port())
    try:
        project.up("--scale", "encoder=0")
        yield project
    finally:
        project.down("--volumes")


def test_strangers_are_refused(node: Project) -> None:
    with node.client() as stranger:
        assert stranger.post("/v1/hidden_states", json={"input": "A cat"}).status_code == 401
        assert stranger.get("/health/ready").status_code == 200
    with http_client(node.url) as friend:
        answer = friend.get("/v1/models", headers={"authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 200, answer.text


def test_prompts_go_there(server: Project, node: Project) -> None:
    assert server.containers("encoder") == []
    with server.client() as client:
        (encoder,) = server.nodes("encoder")
        assert encoder["state"] == "ready"
        assert encoder["url"].rstrip("/").endswith(f":{node.port}")
        drawn = client.post("/api/generate", json=picture())
        assert drawn.status_code == 200, drawn.text
        assert png_size(drawn.content) == (64, 64)
        wanted = {"prompt": "A cat", "custom_system_prompt": "Expand the prompt.", "max_tokens": 8}
        rewritten = client.post("/api/rewrite", json=wanted)
        assert rewritten.status_code == 200, rewritten.text
