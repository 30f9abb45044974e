"""The encoder's endpoints on the tiny checkpoint: both forms of the answer, and every refusal."""

import base64
import json
import re
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import pytest
import safetensors.torch
import structlog
import torch
from inprocess import client_of, eventually

from services.encoder.app import create_app
from services.encoder.model import TextEncoder
from services.encoder.settings import EncoderSettings
from shared.problems import MEDIA_TYPE as PROBLEM
from shared.wire import MEDIA_TYPE, parse_header

URL = "/v1/hidden_states"
TENSORS = {"accept": MEDIA_TYPE}
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def app(text_encoder: TextEncoder) -> Any:
    return create_app(EncoderSettings(encoder_max_tokens=500), model=text_encoder)


@pytest.fixture
async def client(app: Any) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(app) as client:
        yield client


def states_of(encoder: TextEncoder, text: str, layer: int = -2) -> torch.Tensor:
    return encoder.hidden_states(encoder.tokenize([text]), layer)[0]


async def test_numbers(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    answer = await client.post(URL, json={"input": "A cat"})
    expected = states_of(text_encoder, "A cat")
    body = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert set(body) == {"hidden_states", "shape", "model", "layer", "dtype", "encoding_format"}
    assert torch.equal(torch.tensor(body["hidden_states"]), expected)
    assert body["shape"] == list(expected.shape)
    assert (body["layer"], body["dtype"], body["encoding_format"]) == (-2, "float32", "float")
    assert body["model"] == text_encoder.facts.name
    assert answer.headers["server-timing"].startswith("encode;dur=")


async def test_base64_is_float32_little_endian(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    body = (await client.post(URL, json={"input": "A cat", "encoding_format": "base64", "layer": -1})).json()
    expected = states_of(text_encoder, "A cat", -1)
    data = base64.b64decode(body["hidden_states"], validate=True)
    assert data == expected.numpy().astype("<f4").tobytes()
    assert len(data) == 4 * body["shape"][0] * body["shape"][1]
    assert body["encoding_format"] == "base64"
    assert body["layer"] == -1


async def test_several_texts_make_a_list(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    texts = ["A cat", "A much longer text about a cat"]
    answers = (await client.post(URL, json={"input": texts})).json()
    assert len(answers) == 2
    for text, answer in zip(texts, answers, strict=True):
        torch.testing.assert_close(torch.tensor(answer["hidden_states"]), states_of(text_encoder, text))
    assert len((await client.post(URL, json={"input": ["A cat"]})).json()) == 1


@pytest.mark.parametrize("text", ["A cat", ["A cat", "两只猫 in the sun"]])
async def test_tensors(client: httpx2.AsyncClient, text_encoder: TextEncoder, text: str | list[str]) -> None:
    answer = await client.post(URL, json={"input": text}, headers=TENSORS)
    texts = [text] if isinstance(text, str) else text
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert int(answer.headers["content-length"]) == len(answer.content)
    facts = text_encoder.facts
    told = {"model": facts.name, "layer": "-2", "fingerprint": facts.fingerprint}
    assert parse_header(answer.content).metadata == told
    tensors = safetensors.torch.load(answer.content)
    assert set(tensors) == {f"hidden_states.{index}" for index in range(len(texts))}
    for index, item in enumerate(texts):
        torch.testing.assert_close(tensors[f"hidden_states.{index}"], states_of(text_encoder, item))


async def test_tensors_are_in_the_models_dtype(tiny_app_bf16: Any) -> None:
    async with client_of(tiny_app_bf16) as client:
        answer = await client.post(URL, json={"input": "A cat"}, headers=TENSORS)
        assert safetensors.torch.load(answer.content)["hidden_states.0"].dtype == torch.bfloat16
        body = (await client.post(URL, json={"input": "A cat", "encoding_format": "base64"})).json()
        assert body["dtype"] == "bfloat16"
        numbers = torch.frombuffer(bytearray(base64.b64decode(body["hidden_states"])), dtype=torch.float32)
        states = safetensors.torch.load(answer.content)["hidden_states.0"]
        assert torch.equal(numbers.reshape(body["shape"]), states.float())


@pytest.fixture
def tiny_app_bf16(tiny_checkpoint_bf16: Path) -> Any:
    return create_app(EncoderSettings(model_path=tiny_checkpoint_bf16, text_encoder_device="cpu"))


async def test_max_length(client: httpx2.AsyncClient) -> None:
    body = (await client.post(URL, json={"input": "A cat sleeping in the sun", "max_length": 2})).json()
    assert body["shape"] == [2, 64]
    assert len(body["hidden_states"]) == 2


async def test_fields_of_other_clients_are_accepted(client: httpx2.AsyncClient) -> None:
    body = {"input": "A cat", "model": "Qwen3-4B", "layer": -2, "max_length": 512, "encoding_format": "base64"}
    assert (await client.post(URL, json=body)).status_code == 200


async def test_tokenize(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    texts = ["<|im_start|>user\nA cat<|im_end|>\n", "A cat"]
    body = (await client.post("/v1/tokenize", json={"input": texts})).json()
    assert body["tokens"] == text_encoder.tokenize(texts)
    assert body["counts"] == [len(ids) for ids in body["tokens"]]
    assert (await client.post("/v1/tokenize", json={"input": "A cat"})).json()["counts"] == [body["counts"][1]]


async def test_what_the_node_is(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    body = (await client.get("/v1/model")).json()
    facts = text_encoder.facts
    assert (body["service"], body["name"], body["fingerprint"]) == ("encoder", facts.name, facts.fingerprint)
    assert re.fullmatch("[0-9a-f]{16}", body["fingerprint"])
    assert (body["version"], body["device"], body["dtype"]) == (version("zimage-server"), "cpu", "float32")


async def test_models(client: httpx2.AsyncClient, text_encoder: TextEncoder) -> None:
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert model["id"] == text_encoder.facts.name
    assert (model["device"], model["dtype"], model["width"], model["layers"]) == ("cpu", "float32", 64, 4)


REFUSED: dict[str, tuple[Any, int, str]] = {
    "no input": ({}, 422, "'input'"),
    "empty": ({"input": ""}, 422, "'input'"),
    "an empty list": ({"input": []}, 422, "'input'"),
    "NUL": ({"input": "a\0"}, 422, "'input'"),
    "too many": ({"input": ["a"] * 65}, 422, "'input'"),
    "layer 0": ({"input": "a", "layer": 0}, 422, "'layer'"),
    "too deep": ({"input": "a", "layer": -5}, 422, "'hidden_layer'"),
    "too many tokens": ({"input": "cat " * 3_000}, 422, "500"),
    "an unknown form": ({"input": "a", "encoding_format": "pickle"}, 422, "'encoding_format'"),
    "an unknown field": ({"input": "a", "dimensions": 64}, 422, "'dimensions'"),
}


@pytest.mark.parametrize(("body", "status", "text"), REFUSED.values(), ids=REFUSED.keys())
async def test_refusals(client: httpx2.AsyncClient, body: Any, status: int, text: str) -> None:
    answer = await client.post(URL, json=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == PROBLEM
    assert text in answer.json()["detail"]
    assert (await client.post(URL, json={"input": "A cat"})).status_code == 200


@pytest.mark.parametrize("path", [URL, "/v1/tokenize"])
@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"[" * 100_000 + b"]" * 100_000, JSON, 400),
        (b'{"input": "\\ud800"}', JSON, 422),
        (b'{"input": "A cat"}', {"content-type": "text/plain"}, 415),
        (b" " * ((16 << 20) + 1), JSON, 413),
    ],
    ids=["cut", "nested", "surrogate", "type", "large"],
)
async def test_bodies_that_cannot_be_read(
    client: httpx2.AsyncClient, path: str, content: bytes, headers: dict[str, str], status: int
) -> None:
    answer = await client.post(path, content=content, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert (await client.post(path, json={"input": "A cat"})).status_code == 200


async def test_the_documents_of_openapi(client: httpx2.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    answers = paths[URL]["post"]["responses"]
    assert set(answers["200"]["content"]) == {"application/json", MEDIA_TYPE}
    for path in (URL, "/v1/tokenize"):
        assert {"400", "415", "422", "429", "503"} <= set(paths[path]["post"]["responses"])


async def test_a_model_that_cannot_be_loaded(broken_app: Any) -> None:
    statuses: list[int] = []
    broken_app.state.stop = statuses.append
    async with client_of(broken_app, ready=False) as client:
        await eventually(lambda: statuses)
        answer = await client.get("/health/ready")
        assert answer.status_code == 503
        assert "does not exist" in answer.json()["detail"]
        assert (await client.post(URL, json={"input": "A cat"})).status_code == 503
        assert (await client.get("/v1/models")).status_code == 503
        assert (await client.get("/health/live")).status_code == 200
    assert statuses == [78]


@pytest.fixture
def broken_app(tmp_path: Path) -> Any:
    return create_app(EncoderSettings(model_path=tmp_path / "gone"))


async def test_the_queue_is_a_metric(client: httpx2.AsyncClient) -> None:
    await client.post(URL, json={"input": "A cat"})
    text = (await client.get("/metrics")).text
    assert 'zimage_encoder_waiting{service="encoder"} 0.0' in text
    assert json.dumps(URL) in text
