"""Processes that die, hang or are stopped, and a queue that is full."""

import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from servers import LONG_PICTURE, Running, free_port, picture, png_size, running, sent, serve, wait_until, zimage

pytestmark = pytest.mark.slow
DRAIN_S = 90.0  # after SIGTERM the running requests are done by then, on a slow machine too


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that makes one picture at a time, with a short queue and little patience with the encoder; instead of
    the package's."""
    data_dir = tmp_path_factory.mktemp("faults")
    bounds = {"ZIMAGE_DIFFUSION_MAX_RUNNING": "1", "ZIMAGE_DIFFUSION_MAX_WAITING": "1", "ZIMAGE_ENCODE_TIMEOUT_S": "2"}
    with serve(tiny_checkpoint, data_dir, **bounds) as started:
        yield started


def new_prompt() -> dict[str, str]:
    """A prompt that nobody encoded before: what is kept needs no encoder."""
    return {"prompt": f"A cat {uuid.uuid4().hex}"}


def health(client: httpx2.Client) -> Any:
    return client.get("/health").json()


def test_a_full_queue_refuses_at_once(server: Running, client: httpx2.Client, diffusion: httpx2.Client) -> None:
    def queue() -> Any:
        return diffusion.get("/v1/queue").json()

    with sent(server.url, "/api/generate", LONG_PICTURE):
        wait_until(lambda: queue()["running"], "the first picture in the making")
        with sent(server.url, "/api/generate", LONG_PICTURE):
            wait_until(lambda: queue()["waiting"] == 1, "the second picture waits")
            refused = client.post("/api/generate", json=picture())
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["code"] == "queue_full"
    wait_until(lambda: not queue()["running"] and not queue()["waiting"], "the queue is empty")
    assert png_size(client.post("/api/generate", json=picture()).content) == (64, 64)


def test_a_waiting_picture_is_dropped_when_its_client_goes(
    server: Running, client: httpx2.Client, diffusion: httpx2.Client
) -> None:
    def queue() -> Any:
        return diffusion.get("/v1/queue").json()

    with sent(server.url, "/api/generate", LONG_PICTURE):
        wait_until(lambda: queue()["running"], "the first picture in the making")
        with sent(server.url, "/api/generate", LONG_PICTURE):
            wait_until(lambda: queue()["waiting"] == 1, "the second picture waits")
    wait_until(lambda: not queue()["running"] and not queue()["waiting"], "the queue is empty")
    assert png_size(client.post("/api/generate", json=picture()).content) == (64, 64)


def test_an_encoder_that_hangs(server: Running, client: httpx2.Client) -> None:
    encoder = server.service("encoder")
    assert encoder is not None
    encoder.suspend()
    try:
        late = client.post("/api/encode", json=new_prompt())
        assert late.status_code == 504
        assert late.json()["code"] == "upstream_timeout"
        told = wait_until(lambda: (got := health(client))["status"] == "degraded" and got, "/health is degraded")
        assert told["encoder_loaded"] is False
        assert told["services"]["encoder"]["status"] == "unreachable"
        assert told["services"]["encoder"]["reason"]
        assert told["services"]["diffusion"]["status"] == "ready"
        assert client.get("/health/ready").status_code == 503
    finally:
        encoder.resume()
    wait_until(lambda: health(client)["status"] == "healthy", "/health is healthy again")
    assert client.post("/api/encode", json=new_prompt()).status_code == 200


def test_an_encoder_that_is_killed_is_started_again(server: Running, client: httpx2.Client) -> None:
    before = server.service("encoder")
    assert before is not None
    before.kill()

    def works() -> bool:
        answer = client.post("/api/encode", json=new_prompt())
        assert answer.status_code in (200, 503, 504), answer.text
        return answer.status_code == 200

    wait_until(lambda: server.service("encoder") not in (None, before), "a new encoder runs")
    wait_until(works, "a prompt is encoded again")
    assert png_size(client.post("/api/generate", json=picture()).content) == (64, 64)
    assert "a service ended and is started again" in server.output
    assert '"exit_code": -9' in server.output
    wait_until(lambda: health(client)["status"] == "healthy", "/health is healthy again")


def test_ctrl_c_stops_cleanly(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with serve(tiny_checkpoint, tmp_path) as server:
        assert server.stop(signal.SIGINT) == 0
        assert "Traceback" not in server.output


def test_ctrl_c_while_it_loads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    flags = ("--model-path", tiny_checkpoint, "--port", str(port), "--data-dir", tmp_path)
    with running(zimage("serve", *flags), port, tmp_path) as server:
        wait_until(lambda: "listens at" in server.output, "the services are being started")
        assert server.stop(signal.SIGINT) == 0
        assert "Traceback" not in server.output


def test_a_running_picture_is_finished_before_the_stop(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with serve(tiny_checkpoint, tmp_path) as server, ThreadPoolExecutor(1) as pool:
        with server.client() as client, server.service_client("diffusion") as diffusion:
            drawn = pool.submit(client.post, "/api/generate", json=picture(width=384, height=384, steps=100))
            wait_until(lambda: diffusion.get("/v1/queue").json()["running"], "a picture in the making")
            server.begin_stop()
            wait_until(lambda: not server.is_ready(), "it is not ready any more")
            assert not drawn.done(), "the picture was done too soon for this test"
            answer = drawn.result(timeout=DRAIN_S)
            assert server.wait_stopped() == 0
        assert answer.status_code == 200, answer.text
        assert png_size(answer.content) == (384, 384)
        assert server.output.index('"event": "stopping"') < server.output.index('"path": "/api/generate"')
        assert "Traceback" not in server.output


def test_a_picture_that_takes_too_long_is_told_of_the_stop(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with serve(tiny_checkpoint, tmp_path, ZIMAGE_SHUTDOWN_TIMEOUT_S="1") as server, ThreadPoolExecutor(1) as pool:
        with server.client() as client, server.service_client("diffusion") as diffusion:
            cut_off = pool.submit(client.post, "/api/generate", json=picture(width=1024, height=1024, steps=100))
            wait_until(lambda: diffusion.get("/v1/queue").json()["running"], "a picture in the making")
            assert server.stop() == 0
            answer = cut_off.result(timeout=DRAIN_S)
        assert (answer.status_code, answer.json()["code"]) == (503, "unready")
        assert int(answer.headers["retry-after"]) > 0
        assert "Traceback" not in server.output


def test_a_killed_supervisor_leaves_nothing_behind(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with serve(tiny_checkpoint, tmp_path) as server:
        assert len(server.processes()) >= 4
        server.process.kill()
        assert server.process.wait(10) == -signal.SIGKILL
        server.stopped = True
        wait_until(lambda: not server.processes(), "no service is left", timeout_s=30)
    with server.client() as client, pytest.raises(httpx2.ConnectError):
        client.get("/health/live")
