"""Vision conditioning at a gateway without Redis, before a vl service in this process."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from inprocess import eventually, node_of, started, until
from pictures import encoded
from running_gateway import Gateway, Recorder, Start, Whole

from services.gateway.references import VlClient, ask_vl_facts, id_of
from services.gateway.vision import NO_CACHE
from services.vl import app as vl_app
from services.vl.model import VisionModel
from services.vl.settings import VlSettings
from shared.client import ServiceClient
from shared.schemas.vl import ExtractParameters
from shared.wire import parse_header

PICTURE = encoded()
IMAGE = base64.b64encode(PICTURE).decode()
PATH = "/api/vl/generate"
SMALL = {"prompt": "A cat", "width": 64, "height": 64, "steps": 2, "seed": 3}


@pytest.fixture
def vl(vision_model: VisionModel) -> FastAPI:
    return vl_app.create_app(VlSettings(), model=vision_model)


@pytest.fixture
async def seeing(start_gateway: Start, vl: FastAPI) -> AsyncIterator[tuple[Gateway, Recorder]]:
    async with started(vl) as app:
        recorder = Recorder(httpx2.ASGITransport(app))
        service = ServiceClient("vl", "http://vl", max_reply_bytes=64 << 20, transport=recorder)
        async with start_gateway(vl=VlClient(node_of(service, probe=ask_vl_facts))) as gateway:
            await until(gateway.client, "/api/vl/status", lambda answer: answer.json()["available"])
            yield gateway, recorder


async def drawn(gateway: Gateway, **fields: Any) -> httpx2.Response:
    return await gateway.client.post(PATH, json={**SMALL, **fields})


async def test_a_picture_in_one_go(seeing: tuple[Gateway, Recorder]) -> None:
    gateway, _ = seeing
    answer = await drawn(gateway, vl_image=IMAGE, vl_alpha=0.5)
    assert answer.status_code == 200, answer.text
    assert (answer.headers["x-vl-alpha"], answer.headers["x-vl-blend-mode"]) == ("0.5", "linear")
    assert "vision;dur=" in answer.headers["server-timing"]
    message = gateway.diffusion.calls[-1][0].content
    header = parse_header(message)
    assert [tensor.name for tensor in header.tensors] == ["text", "vl"]


@pytest.mark.parametrize(
    ("rewrite", "status"),
    [({"rewriter": "no-such"}, 404), ({"custom_system_prompt": "Write more."}, 503)],
    ids=["unknown", "no service"],
)
async def test_a_rewriter_that_is_refused_costs_no_extraction(
    seeing: tuple[Gateway, Recorder], rewrite: dict[str, str], status: int
) -> None:
    gateway, vl = seeing
    answer = await drawn(gateway, vl_image=IMAGE, rewrite=rewrite)
    assert answer.status_code == status, answer.text
    assert vl.calls == []


async def test_large_uploads_are_bounded_together(start_gateway: Start) -> None:
    async with start_gateway(max_upload_bytes=32 << 20) as gateway:
        begun, gate = 0, asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:  # of unknown length, so that it counts as the largest
            nonlocal begun
            begun += 1
            yield b"{"
            await gate.wait()

        headers = {"content-type": "application/json"}
        upload = asyncio.create_task(gateway.client.post("/api/rewrite", content=slowly(), headers=headers))
        await eventually(lambda: begun)
        large = {"prompt": "What is it?", "image": "A" * (6 << 20)}
        for path in ("/api/rewrite", PATH, "/api/vl/extract"):
            answer = await gateway.client.post(path, json=large)
            assert (answer.status_code, answer.json()["code"]) == (429, "queue_full"), path
            assert answer.headers["retry-after"]
        assert (await gateway.generate()).status_code == 200
        gate.set()
        await upload
        assert (await gateway.client.post("/api/rewrite", json=large)).status_code != 429


async def test_alpha_0_sends_what_draws_the_same(seeing: tuple[Gateway, Recorder]) -> None:
    gateway, _ = seeing
    plain = (await gateway.client.post("/api/generate", json=SMALL)).content
    with_picture = (await drawn(gateway, vl_image=IMAGE, vl_alpha=0.0)).content
    assert plain[plain.index(b"IDAT") :] == with_picture[with_picture.index(b"IDAT") :]
    assert b'"blending"' not in plain + with_picture
    assert b'"vl_' not in plain


async def test_events_tell_the_references_too(seeing: tuple[Gateway, Recorder]) -> None:
    gateway, _ = seeing
    headers = {"accept": "text/event-stream"}
    answer = await gateway.client.post(PATH, json={**SMALL, "vl_image": IMAGE}, headers=headers)
    assert '"X-VL-Alpha": "0.3"' in answer.text


async def test_what_needs_redis_says_so(seeing: tuple[Gateway, Recorder]) -> None:
    gateway, _ = seeing
    for answer in (
        await gateway.client.post("/api/vl/extract", json={"image": IMAGE}),
        await drawn(gateway, vl_embeddings_id="vl_0_0_L-2"),
        await gateway.client.delete("/api/vl/cache"),
    ):
        assert (answer.status_code, answer.json()["detail"]) == (503, NO_CACHE)


@pytest.mark.slow
@pytest.mark.parametrize("body", [b"", b"garbage", b"\x10\0\0\0\0\0\0\0" + b"{}" + b" " * 14])
async def test_garbage_of_the_service_is_a_bad_upstream(seeing: tuple[Gateway, Recorder], body: bytes) -> None:
    gateway, recorder = seeing
    recorder.instead = lambda request: httpx2.Response(200, stream=Whole(body)) if request.method == "POST" else None
    answer = await drawn(gateway, vl_image=IMAGE)
    assert (answer.status_code, answer.json()["code"]) == (502, "bad_upstream")
    recorder.instead = None
    assert (await drawn(gateway, vl_image=IMAGE)).status_code == 200


DESCRIBE = {"prompt": "What is it?", "image": IMAGE, "max_tokens": 12, "seed": 5}
EVENTS = {"accept": "text/event-stream"}


async def test_a_description_as_it_is_written(seeing: tuple[Gateway, Recorder]) -> None:
    gateway, _ = seeing
    whole = (await gateway.client.post("/api/rewrite", json=DESCRIBE)).json()
    answer = await gateway.client.post("/api/rewrite", json=DESCRIBE, headers=EVENTS)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in answer.text.strip().split("\n\n")]
    *pieces, done = [(block["event"], json.loads(block["data"])) for block in blocks]
    assert len(pieces) > 2
    assert "".join(data["text"] for name, data in pieces if name == "text") == whole["rewritten_prompt"]
    assert done == ("done", {**whole, "gen_time": done[1]["gen_time"]})
    assert (whole["original_prompt"], whole["seed"]) == ("What is it?", 5)


async def test_all_options_of_a_description_are_passed_on(seeing: tuple[Gateway, Recorder]) -> None:
    gateway, recorder = seeing
    options = {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.5,
        "min_p": 0.1,
        "top_k": 7,
        "presence_penalty": 1.0,
        "seed": 2**63 - 1,
        "enable_thinking": False,
    }
    for headers in ({}, EVENTS):
        answer = await gateway.client.post("/api/rewrite", json={**DESCRIBE, **options}, headers=headers)
        assert answer.status_code == 200, answer.text
        sent = parse_header(recorder.calls[-1][0].content).metadata["parameters"]
        assert json.loads(sent) == {"prompt": "What is it?", "system_prompt": None, **options}


@pytest.mark.slow
@pytest.mark.parametrize("headers", [{}, EVENTS], ids=["JSON", "events"])
async def test_descriptions_that_are_refused(seeing: tuple[Gateway, Recorder], headers: dict[str, str]) -> None:
    gateway, recorder = seeing
    for fields, status in (
        ({"image": "x"}, 422),
        ({"image": base64.b64encode(PICTURE[:-40]).decode()}, 422),
        ({"rewriter": "no_such"}, 404),
        ({"temperature": -1}, 422),
    ):
        answer = await gateway.client.post("/api/rewrite", json={**DESCRIBE, **fields}, headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    recorder.instead = lambda _: httpx2.Response(200, stream=Whole(b"event: done\ndata: {}\n\n"))
    answer = await gateway.client.post("/api/rewrite", json=DESCRIBE, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (502, "bad_upstream")
    recorder.instead = None
    assert (await gateway.client.post("/api/rewrite", json=DESCRIBE, headers=headers)).status_code == 200


def parameters(**fields: Any) -> ExtractParameters:
    wanted = {"hidden_layer": -2, "image_tokens_only": False, "scale_to_text": True, **fields}
    return ExtractParameters(**wanted)


def test_ids_name_everything_that_determines_embeddings() -> None:
    first = id_of(PICTURE, parameters(), "f")
    assert first == id_of(PICTURE, parameters(), "f")
    others = [
        id_of(PICTURE + b"\0", parameters(), "f"),
        id_of(PICTURE, parameters(), "g"),
        id_of(PICTURE, parameters(hidden_layer=-3), "f"),
        id_of(PICTURE, parameters(text="a"), "f"),
        id_of(PICTURE, parameters(image_tokens_only=True), "f"),
        id_of(PICTURE, parameters(scale_to_text=False), "f"),
    ]
    assert len({first, *others}) == 7
    assert first.startswith("vl_")
    assert first.endswith("_L-2")
