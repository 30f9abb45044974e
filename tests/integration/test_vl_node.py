"""The vl service as a process of its own: what it answers, and what broken pictures do to it."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pictures import FORMATS, encoded, malformed, pixels
from safetensors.numpy import load
from servers import Running, free_port, running, zimage

from shared.wire import MEDIA_TYPE, TensorMeta, build_header

pytestmark = pytest.mark.slow
MALFORMED, SENDERS = 200, 4  # a thousand go through a whole server
GROWTH_BYTES = 50_000_000
HEADERS = {"content-type": MEDIA_TYPE}


@pytest.fixture(scope="module")
def node(tiny_vision_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port = free_port()
    command = zimage("node", "vl", "--model-path", tiny_vision_checkpoint, "--port", str(port))
    with running(command, port, tmp_path_factory.mktemp("vl")) as started:
        started.wait_ready()
        yield started


@pytest.fixture
def client(node: Running) -> Iterator[httpx2.Client]:
    with node.client() as client:
        yield client


def message(picture: bytes, **fields: Any) -> bytes:
    wanted = {"hidden_layer": -2, "image_tokens_only": False, "scale_to_text": True, **fields}
    return build_header([TensorMeta("image", "U8", (len(picture),))], {"parameters": json.dumps(wanted)}) + picture


def extract(client: httpx2.Client, picture: bytes, **fields: Any) -> httpx2.Response:
    return client.post("/v1/extract", content=message(picture, **fields), headers=HEADERS)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_extraction(client: httpx2.Client, kind: str) -> None:
    answer = extract(client, encoded(kind=kind))
    assert answer.status_code == 200, answer.text
    (states,) = load(answer.content).values()
    assert states.std() == pytest.approx(58.75, rel=1e-3)
    assert states.shape[1] == client.get("/v1/model").json()["width"]
    again = load(extract(client, encoded(kind=kind)).content)["vl"]
    assert states.tobytes() == again.tobytes()


def test_a_description(client: httpx2.Client) -> None:
    picture = encoded()
    body = build_header(
        [TensorMeta("image", "U8", (len(picture),))],
        {"parameters": json.dumps({"prompt": "What is it?", "max_tokens": 5, "seed": 2})},
    )
    answer = client.post("/v1/describe", content=body + picture, headers=HEADERS)
    assert answer.status_code == 200, answer.text
    assert answer.json()["seed"] == 2


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"\xff" * 40, 422),
        (message(encoded())[:-1], 422),
        (message(encoded()) + b"x", 422),
        (message(encoded(), hidden_layer=-7), 422),
        (message(encoded(), hidden_layer=0), 422),
        (message(encoded(), nothing=1), 422),
        (message(encoded(), text="x" * 32_001), 422),
        (message(b""), 422),
        (message(encoded() + bytes(20_000_000)), 413),
        (build_header([TensorMeta("image", "F32", (2,))], {"parameters": "{"}) + bytes(8), 400),
        (build_header([TensorMeta("image", "U8", (8,))]) + bytes(8), 422),
    ],
)
def test_messages_that_are_refused(client: httpx2.Client, body: bytes, status: int) -> None:
    answer = client.post("/v1/extract", content=body, headers=HEADERS)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert client.post("/v1/extract", content=body).status_code in (413, 415)


def test_malformed_pictures_cost_nothing(node: Running, client: httpx2.Client) -> None:
    (process,) = node.processes()
    for data in malformed(60, seed=1):
        extract(client, data)
    assert extract(client, encoded(pixels(512, 512))).status_code == 200
    before = process.memory_info().rss
    with ThreadPoolExecutor(SENDERS) as pool:
        statuses = Counter(pool.map(lambda data: extract(client, data).status_code, malformed(MALFORMED)))
    assert set(statuses) <= {200, 413, 422}, statuses
    assert statuses[422] > MALFORMED * 0.7
    assert process.memory_info().rss - before < GROWTH_BYTES
    assert extract(client, encoded()).status_code == 200
