"""Many clients at once: nobody gets another's answer, and one that goes away frees the device."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from servers import LONG_PICTURE, Running, picture, png_size, sent, wait_until

pytestmark = pytest.mark.slow
CLIENTS = 16


def test_encodes_do_not_mix(client: httpx2.Client) -> None:
    prompts = [
        f"Number {index}: {'a small red circle beside a large blue square, ' * index}" for index in range(CLIENTS)
    ]

    def encode(prompt: str) -> dict[str, Any]:
        answer = client.post("/api/encode", json={"prompt": prompt})
        assert answer.status_code == 200, answer.text
        return {name: value for name, value in answer.json().items() if name != "encode_time"}

    alone = [encode(prompt) for prompt in prompts]
    assert len({answer["token_count"] for answer in alone}) == CLIENTS
    with ThreadPoolExecutor(CLIENTS) as pool:
        assert list(pool.map(encode, prompts)) == alone


def test_pictures_of_mixed_sizes(client: httpx2.Client) -> None:
    sizes = [(64, 64), (128, 64), (64, 128), (96, 96), (64, 64), (160, 80), (256, 256), (16, 16)]

    def draw(size: tuple[int, int]) -> tuple[int, int]:
        answer = client.post("/api/generate", json=picture(width=size[0], height=size[1]))
        assert answer.status_code == 200, answer.text
        return png_size(answer.content)

    with ThreadPoolExecutor(len(sizes)) as pool:
        assert list(pool.map(draw, sizes)) == sizes


def test_a_client_that_goes_away_frees_the_device(
    server: Running, client: httpx2.Client, diffusion: httpx2.Client
) -> None:
    body = {**LONG_PICTURE, "seed": 12345}

    def running() -> Any:
        return diffusion.get("/v1/queue").json()["running"]

    with sent(server.url, "/api/generate", body):
        request_id = wait_until(lambda: [one for one in running() if one["step"] >= 1], "a picture in the making")[0][
            "request_id"
        ]
    wait_until(lambda: not running(), "nothing is made any more")

    def cancelled() -> list[dict[str, Any]]:
        events = server.events("diffusion")
        return [
            event for event in events if (event["event"], event.get("request_id")) == ("picture cancelled", request_id)
        ]

    steps = [event["step"] for event in wait_until(cancelled, "the log says that the picture was cancelled")]
    assert len(steps) == 1
    assert steps[0] < body["steps"]

    def ended() -> list[int]:
        events = [event for event in server.events("gateway") if event.get("request_id") == request_id]
        return [event["status"] for event in events if event["event"] == "request"]

    assert wait_until(ended, "the gateway's log has the request") == [499]
    assert client.post("/api/generate", json=picture()).status_code == 200
