"""Gateways as processes of their own before nodes that they know by URL."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import Running, free_port, picture, png_size, running, wait_until

pytestmark = pytest.mark.slow


@contextmanager
def gateway(data_dir: Path, **settings: str) -> Iterator[Running]:
    """`python -m services.gateway`, ready."""
    port = free_port()
    command = [sys.executable, "-m", "services.gateway"]
    with running(command, port, data_dir, ZIMAGE_PORT=str(port), **settings) as started:
        started.wait_ready()
        yield started


def test_a_picture_over_three_processes(nodes: dict[str, Running], tmp_path: Path) -> None:
    urls = {f"ZIMAGE_{kind.upper()}_URLS": node.url for kind, node in nodes.items()}
    with gateway(tmp_path, **urls) as started, started.client() as client:
        answer = client.post("/api/generate", json=picture(width=96))
        assert answer.status_code == 200, answer.text
        assert png_size(answer.content) == (96, 64)
        services = client.get("/health").json()["services"]
        assert {kind: services[kind]["url"].rstrip("/") for kind in nodes} == {k: n.url for k, n in nodes.items()}
    with_api = {"ZIMAGE_USE_API_ENCODER": "true", "ZIMAGE_API_URL": nodes["encoder"].url}
    diffusion_url = nodes["diffusion"].url
    with gateway(tmp_path, ZIMAGE_DIFFUSION_URLS=diffusion_url, **with_api) as started, started.client() as client:
        assert client.post("/api/generate", json=picture(width=96)).content == answer.content


def test_every_line_of_a_log_is_json(nodes: dict[str, Running]) -> None:
    for kind, node in nodes.items():
        lines = [json.loads(line) for line in node.output.splitlines()]
        assert {line["service"] for line in lines} == {kind}


def test_an_encoder_alone(nodes: dict[str, Running], tmp_path: Path) -> None:
    settings = {"ZIMAGE_ENCODER_ONLY": "true", "ZIMAGE_ENCODER_URLS": nodes["encoder"].url}
    with gateway(tmp_path, **settings) as started, started.client() as client:
        health = client.get("/health").json()
        assert (health["status"], health["encoder_only_mode"], health["pipeline_loaded"]) == ("healthy", True, False)
        assert client.post("/api/encode", json={"prompt": "A cat"}).status_code == 200
        assert client.post("/api/generate", json=picture()).status_code == 503


def test_nodes_that_are_not_there(tmp_path: Path) -> None:
    urls = {name: f"http://127.0.0.1:{free_port()}" for name in ("ZIMAGE_ENCODER_URLS", "ZIMAGE_DIFFUSION_URLS")}
    port = free_port()
    command = [sys.executable, "-m", "services.gateway"]
    with running(command, port, tmp_path, ZIMAGE_PORT=str(port), **urls) as started:
        wait_until(started.is_live, "the gateway answers")
        with started.client() as client:
            wait_until(lambda: client.get("/health").json()["status"] == "degraded", "/health says so")
            assert client.get("/health/ready").status_code == 503
            for path, body in (("/api/encode", {"prompt": "A cat"}), ("/api/generate", picture())):
                refused = client.post(path, json=body)
                assert (refused.status_code, refused.json()["code"]) == (503, "unreachable")
                assert int(refused.headers["retry-after"]) > 0
