"""`docker compose up` on CPUs: the public API, scaling, containers that die, hang and come back, Redis away."""

import base64
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from docker_engine import UP_S, Project, docker, get_inside, in_the_middle, inspect
from servers import picture, png_size, run, shared_file, wait_until

pytestmark = pytest.mark.slow
ENCODER_PORT = 7861
ENCODED = re.compile(r'^zimage_requests_total\{.*route="/v1/hidden_states".*status="200".*\} (\S+)$', re.MULTILINE)
PICTURE_DEADLINE_S = 100
LONG = picture(width=512, height=512, steps=60, seed=11)
HISTORY = "/api/history?images=full"


def encode(client: httpx2.Client, prompt: str) -> httpx2.Response:
    return client.post("/api/encode", json={"prompt": prompt})


def encoded_by(container: str) -> int:
    """How many encodes an encoder has answered since it started."""
    return sum(int(float(count)) for count in ENCODED.findall(get_inside(container, ENCODER_PORT, "/metrics")))


@pytest.fixture
def three_encoders(server: Project) -> Iterator[list[str]]:
    """The ids of three encoder containers, all known to the gateway; the one of before is there again afterwards."""
    server.up("--scale", "encoder=3", "--no-recreate")
    try:
        server.wait_for_nodes("encoder", 3)
        yield server.containers("encoder")
    finally:
        server.wait_until_healthy("encoder")
        server.up("--scale", "encoder=1", "--no-recreate")
        server.wait_for_nodes("encoder", 1)


@contextmanager
def running_picture(server: Project, body: dict[str, Any]) -> Iterator[Any]:
    """A picture that its only diffusion container has begun; yields the future of its answer."""
    with ThreadPoolExecutor(1) as pool, server.client(timeout_s=PICTURE_DEADLINE_S + 60) as client:
        answer = pool.submit(client.post, "/api/generate", json=body)
        wait_until(lambda: any(node["in_flight"] for node in server.nodes("diffusion")), "it is being drawn")
        assert not answer.done(), "the picture was done too soon for this test"
        yield answer


def test_conformance(server: Project, tmp_path: Path) -> None:
    script = shared_file("acceptance/conformance.py")
    command = [sys.executable, str(script), server.url, "--size", "64", "--steps", "2"]
    ended = run(command, tmp_path, timeout_s=600)
    assert re.search(r"^[1-9]\d* passed, 0 failed, 0 skipped$", ended.stdout, re.MULTILINE), ended.stdout + ended.stderr


def test_only_the_gateway_is_published_and_all_are_locked_down(server: Project) -> None:
    for service in ("gateway", "encoder", "rewriter", "vl", "diffusion"):
        (container,) = server.containers(service)
        ports = inspect(container, "{{range $port, $to := .NetworkSettings.Ports}}{{if $to}}{{$port}} {{end}}{{end}}")
        assert ports.split() == (["7860/tcp"] if service == "gateway" else [])
        held = inspect(container, "{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}} {{.Config.User}}")
        assert held == "true [ALL] zimage"
    assert inspect(f"{server.name}_back", "{{.Internal}}") == "true"


def test_redis_keeps_everything(server: Project) -> None:
    (redis,) = server.containers("redis")
    for name, value in (("appendonly", "yes"), ("appendfsync", "always"), ("maxmemory-policy", "noeviction")):
        assert docker("exec", redis, "redis-cli", "config", "get", name).split() == [name, value]


def test_three_encoders_share_the_work(server: Project, client: httpx2.Client, three_encoders: list[str]) -> None:
    before = {container: encoded_by(container) for container in three_encoders}
    with in_the_middle(lambda index: encode(client, f"an even share {index}"), 300) as answers:
        pass
    assert Counter(answer.status_code for answer in answers) == {200: 300}
    shares = [encoded_by(container) - before[container] for container in three_encoders]
    even = sum(shares) / 3  # a text that one is slow with is given to another one too
    assert sum(shares) >= 300
    assert all(abs(share - even) <= 0.2 * even for share in shares), shares


def test_a_killed_encoder_is_not_noticed(server: Project, client: httpx2.Client, three_encoders: list[str]) -> None:
    with in_the_middle(lambda index: encode(client, f"killed meanwhile {index}"), 200) as answers:
        docker("kill", three_encoders[0])
    assert Counter(answer.status_code for answer in answers) == {200: 200}
    docker("start", three_encoders[0])
    server.wait_for_nodes("encoder", 3)


def test_a_paused_encoder_is_not_noticed(server: Project, client: httpx2.Client, three_encoders: list[str]) -> None:
    try:
        with in_the_middle(lambda index: encode(client, f"paused meanwhile {index}"), 200) as answers:
            docker("pause", three_encoders[0])
        assert Counter(answer.status_code for answer in answers) == {200: 200}
    finally:
        docker("unpause", three_encoders[0])
    server.wait_for_nodes("encoder", 3)


def test_a_picture_outlives_the_only_diffusion_container(server: Project, client: httpx2.Client) -> None:
    first = client.post("/api/generate", json=LONG)
    assert first.status_code == 200, first.text
    with running_picture(server, {**LONG, "timeout_s": PICTURE_DEADLINE_S}) as answer:
        (diffusion,) = server.containers("diffusion")
        docker("kill", diffusion)
        docker("start", diffusion)
        again = answer.result(timeout=PICTURE_DEADLINE_S + 30)
    assert again.status_code == 200, again.text
    assert again.headers["x-seed"] == first.headers["x-seed"]
    assert again.content == first.content
    (node,) = server.nodes("diffusion")
    assert node["last_error"]
    server.wait_for_nodes("diffusion", 1)


def test_a_picture_whose_diffusion_container_stays_away_is_refused_in_time(
    server: Project, client: httpx2.Client
) -> None:
    (diffusion,) = server.containers("diffusion")
    try:
        with running_picture(server, {**LONG, "timeout_s": 20}) as answer:
            docker("kill", diffusion)
            sent = time.monotonic()
            refused = answer.result(timeout=60)
        assert refused.status_code in (503, 504), refused.text
        assert refused.headers["content-type"] == "application/problem+json"
        assert time.monotonic() - sent < 60
    finally:
        docker("start", diffusion)
        server.wait_for_nodes("diffusion", 1)
    assert png_size(client.post("/api/generate", json=picture()).content) == (64, 64)


def test_down_and_up_keeps_history_and_references(server: Project, client: httpx2.Client) -> None:
    kept = client.post("/api/generate", json=picture(seed=5))
    assert kept.headers["x-history-id"]
    image = base64.b64encode(kept.content).decode()
    extracted = client.post("/api/vl/extract", json={"image": image})
    assert extracted.status_code == 200, extracted.text
    name = extracted.json()["embeddings_id"]
    before = client.get(HISTORY).json()
    server.down()
    server.up()
    assert client.get(HISTORY).json() == before
    assert name in client.get("/api/vl/status").json()["cached_embeddings"]
    drawn = client.post("/api/vl/generate", json={**picture(), "vl_embeddings_id": name})
    assert drawn.status_code == 200, drawn.text


def test_pictures_are_made_while_redis_is_away(server: Project, client: httpx2.Client) -> None:
    (redis,) = server.containers("redis")
    network = f"{server.name}_back"
    docker("network", "disconnect", network, redis)
    try:
        unsaved = client.post("/api/generate", json=picture(seed=6))
        assert unsaved.status_code == 200, unsaved.text
        assert unsaved.headers["x-history"] == "unsaved"
        assert encode(client, "while Redis is away").status_code == 200
    finally:
        docker("network", "connect", "--alias", "redis", network, redis)

    def kept() -> bool:
        return "x-history-id" in client.post("/api/generate", json=picture(seed=6)).headers

    wait_until(kept, "pictures are kept again", timeout_s=UP_S)
