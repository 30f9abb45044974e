"""`services.gateway.clients`: answers of the services, and of other servers, that are not what they should be."""

import base64
import json
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inprocess import node_of

from services.gateway.clients import ApiEncoderClient, Embeddings, EncoderClient, Encoding, ask_foreign_facts
from services.gateway.commissions import Commission, DiffusionClient
from services.gateway.nodes import Nodes
from shared.client import ServiceClient
from shared.errors import BadUpstream, OutOfMemory, ServiceError
from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.fields import LongPromptMode
from shared.wire import TensorMeta, build_header, parse_header

Answer = Callable[[httpx2.Request], tuple[int, bytes]]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(60)
PARAMETERS = DiffusionParameters(
    width=64, height=64, steps=1, seed=0, guidance_scale=0.0, shift=3.0, long_prompt_mode=LongPromptMode.POOL
)


class Body(httpx2.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self.content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.content


def service(answer: Answer, told: dict[str, str] | None = None) -> Nodes:
    def handle(request: httpx2.Request) -> httpx2.Response:
        status, content = answer(request)
        return httpx2.Response(status, headers=told, stream=Body(content))

    transport = httpx2.MockTransport(handle)
    headers = {"authorization": "Bearer key"}
    return node_of(
        ServiceClient("encoder", "http://encoder", max_reply_bytes=1 << 20, headers=headers, transport=transport)
    )


def always(content: bytes, status: int = 200) -> Nodes:
    return service(lambda _: (status, content))


def tensors(*metas: TensorMeta, cut: int = 0) -> bytes:
    whole = build_header(metas) + bytes(sum(meta.nbytes for meta in metas))
    return whole[: len(whole) - cut]


def states(index: int = 0, dtype: str = "BF16", shape: tuple[int, ...] = (3, 8)) -> TensorMeta:
    return TensorMeta(f"hidden_states.{index}", dtype, shape)


async def encode(client: Any, *texts: str) -> Encoding:
    encoding: Encoding = await client.encode(texts or ["a cat"], layer=-2, timeout_s=5)
    return encoding


async def test_embeddings_are_views_of_the_answer() -> None:
    encoding = await encode(EncoderClient(always(tensors(states(), states(1, "F32", (1, 8))))), "a", "b")
    first, second = encoding.items
    assert (first.dtype, first.shape, first.tokens, first.torch_dtype) == ("BF16", (3, 8), 3, "torch.bfloat16")
    assert (second.dtype, second.shape, second.torch_dtype) == ("F32", (1, 8), "torch.float32")
    assert len(first.data) == 48
    assert encoding.seconds >= 0


BROKEN = {
    "nothing": b"",
    "text": b"not tensors at all",
    "JSON": b'{"hidden_states": []}',
    "another name": tensors(TensorMeta("text", "F32", (3, 8))),
    "one is missing": tensors(states()),
    "rank 1": tensors(states(), states(1, "F32", (8,))),
    "rank 3": tensors(states(), states(1, "F32", (1, 3, 8))),
    "no rows": tensors(states(), states(1, "F32", (0, 8))),
    "no columns": tensors(states(), states(1, "F32", (3, 0))),
    "cut": tensors(states(), states(1), cut=1),
    "a broken header": struct.pack("<Q", 4) + b"{{{{",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
async def test_answers_of_the_encoder_that_are_not_embeddings(content: bytes) -> None:
    with pytest.raises(BadUpstream, match="encoder service answered something that is not embeddings"):
        await encode(EncoderClient(always(content)), "a", "b")


@given(st.binary(max_size=200))
async def test_no_answer_of_the_encoder_breaks_it(content: bytes) -> None:
    with pytest.raises(BadUpstream):
        await encode(EncoderClient(always(content)))


async def test_token_counts() -> None:
    assert await EncoderClient(always(b'{"tokens": [[1, 2]], "counts": [2]}')).count_tokens("a", timeout_s=5) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"tokens": [], "counts": []}', b'{"tokens": [[1]], "counts": ["x"]}', b"\xff", b"[" * 9999],
)
async def test_answers_that_are_not_tokens(content: bytes) -> None:
    with pytest.raises(BadUpstream, match="not tokens"):
        await EncoderClient(always(content)).count_tokens("a", timeout_s=5)


def api_answer(**fields: Any) -> bytes:
    body = {
        "hidden_states": base64.b64encode(struct.pack("<6f", *range(6))).decode(),
        "shape": [3, 2],
        "model": "Qwen3-4B",
        "layer": -2,
        "dtype": "bfloat16",
        "encoding_format": "base64",
    }
    return json.dumps({**body, **fields}).encode()


async def test_another_server_as_encoder() -> None:
    seen: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> tuple[int, bytes]:
        seen.append(request)
        return 200, api_answer()

    encoding = await encode(ApiEncoderClient(service(answer), "Qwen3-4B"), "a cat", "")
    for item in encoding.items:
        assert (item.dtype, item.shape, item.torch_dtype) == ("F32", (3, 2), "torch.float32")
        assert struct.unpack("<6f", item.data) == tuple(range(6))
    bodies = [json.loads(request.content) for request in seen]
    assert {body["input"] for body in bodies} == {"a cat", ""}
    for body, request in zip(bodies, seen, strict=True):
        assert (body["model"], body["layer"], body["encoding_format"]) == ("Qwen3-4B", -2, "base64")
        assert body["max_length"] >= 1504
        assert request.headers["authorization"] == "Bearer key"


async def test_another_server_counts_tokens_by_encoding() -> None:
    assert await ApiEncoderClient(always(api_answer()), None).count_tokens("a", timeout_s=5) == 3


NO_EMBEDDINGS = {
    "numbers": api_answer(hidden_states=[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]),
    "no base64": api_answer(hidden_states="?" * 32),
    "not ASCII": api_answer(hidden_states="é" * 32),
    "padding": api_answer(hidden_states="AAA"),
    "too short": api_answer(hidden_states=""),
    "another shape": api_answer(shape=[2, 2]),
    "rank 1": api_answer(shape=[6]),
    "rank 3": api_answer(shape=[1, 3, 2]),
    "no shape": api_answer(shape=[]),
    "negative sides": api_answer(shape=[-3, -2]),
    "no rows": api_answer(shape=[0, 2], hidden_states=""),
    "a list": b"[]",
    "nothing": b"",
    "HTML": b"<html>secret</html>",
    "no hidden states": json.dumps({"shape": [3, 2]}).encode(),
}


@pytest.mark.parametrize("content", NO_EMBEDDINGS.values(), ids=NO_EMBEDDINGS.keys())
async def test_answers_of_another_server_that_are_not_embeddings(content: bytes) -> None:
    with pytest.raises(BadUpstream, match="API encoder") as refused:
        await encode(ApiEncoderClient(always(content), None))
    assert "secret" not in refused.value.detail


async def test_another_server_without_the_endpoint() -> None:
    with pytest.raises(BadUpstream, match="status 404"):
        await encode(ApiEncoderClient(always(b'{"detail": "Not Found"}', 404), None))


async def test_the_message_to_diffusion() -> None:
    seen: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> tuple[int, bytes]:
        seen.append(request)
        return 200, PNG

    text, negative = (Embeddings("BF16", (rows, 8), memoryview(bytes([rows]) * rows * 16)) for rows in (3, 1))
    drawn = await DiffusionClient(service(answer)).generate(Commission(PARAMETERS, text, negative), timeout_s=5)
    assert drawn.png == PNG
    (request,) = seen
    header = parse_header(request.content)
    assert header.tensors == (TensorMeta("text", "BF16", (3, 8)), TensorMeta("negative", "BF16", (1, 8)))
    assert request.content[header.data_start :] == bytes(text.data) + bytes(negative.data)
    assert DiffusionParameters.model_validate_json(header.metadata["parameters"]) == PARAMETERS
    assert request.headers["content-type"] == "application/vnd.safetensors"
    assert request.headers["content-length"] == str(len(request.content))


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG", b"<html>secret</html>"])
async def test_an_answer_that_is_no_png(content: bytes) -> None:
    text = Embeddings("BF16", (3, 8), memoryview(bytes(48)))
    with pytest.raises(BadUpstream, match="not a PNG"):
        await DiffusionClient(always(content)).generate(Commission(PARAMETERS, text, None), timeout_s=5)


@pytest.mark.parametrize(
    ("headers", "thumbnail"),
    [
        ({"x-thumbnail": "/9j/4A=="}, b"\xff\xd8\xff\xe0"),
        ({"x-thumbnail": ""}, b""),
        ({"x-thumbnail": "?"}, b""),
        ({"x-thumbnail": "AAA"}, b""),
        ({}, b""),
    ],
)
async def test_thumbnails(headers: dict[str, str], thumbnail: bytes) -> None:
    text = Embeddings("BF16", (3, 8), memoryview(bytes(48)))
    client = DiffusionClient(service(lambda _: (200, PNG), headers))
    drawn = await client.generate(Commission(PARAMETERS, text, None), timeout_s=5)
    assert drawn.thumbnail == thumbnail


EVENT = b"event: %s\ndata: %s\n\n"


async def test_events_of_a_picture() -> None:
    done = json.dumps({"headers": {"Server-Timing": "png;dur=1"}, "image_b64": base64.b64encode(PNG).decode()})
    told = [(b"queued", b'{"id": null, "place": 3}'), (b"step", b'{"step": 1, "steps": 2, "seconds_left": 0.5}')]
    stream = b"".join(EVENT % one for one in (*told, (b"done", done.encode())))
    client = DiffusionClient(service(lambda _: (200, stream), {"content-type": "text/event-stream"}))
    text = Embeddings("BF16", (3, 8), memoryview(bytes(48)))
    happened = [item async for item in client.follow(Commission(PARAMETERS, text, None), timeout_s=5)]
    assert [item.name for item in happened[:-1]] == ["queued", "step"]
    assert happened[0].fields.model_dump() == {"id": None, "place": 3}
    assert (happened[-1].png, happened[-1].server_timing, happened[-1].thumbnail) == (PNG, "png;dur=1", b"")


FULL = b'{"title": "t", "status": 503, "detail": "Full.", "code": "out_of_memory", "request_id": "1"}'


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        (b"error", FULL, OutOfMemory),
        (b"error", b"{}", BadUpstream),
        (b"done", b'{"headers": {}, "image_b64": "R0lGODlh"}', BadUpstream),
        (b"done", b'{"headers": {}, "image_b64": "?"}', BadUpstream),
        (b"done", b"7", BadUpstream),
        (b"step", b"{}", BadUpstream),
        (b"dance", b"{}", BadUpstream),
    ],
)
async def test_events_that_end_it(name: bytes, data: bytes, error: type[ServiceError]) -> None:
    client = DiffusionClient(service(lambda _: (200, EVENT % (name, data)), {"content-type": "text/event-stream"}))
    text = Embeddings("BF16", (3, 8), memoryview(bytes(48)))
    with pytest.raises(error):
        _ = [item async for item in client.follow(Commission(PARAMETERS, text, None), timeout_s=5)]


async def test_any_server_that_lists_models_may_be_an_api_encoder() -> None:
    (node, _), *_ = always(b"not even JSON").all
    assert (await ask_foreign_facts(node.service)).fingerprint == ""
    (node, _), *_ = always(b"", 500).all
    with pytest.raises(BadUpstream):
        await ask_foreign_facts(node.service)
