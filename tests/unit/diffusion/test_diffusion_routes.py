"""The diffusion service's endpoints on the tiny checkpoint: pictures, refusals, and clients that go away."""

import asyncio
import base64
import io
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import structlog
import torch
from fakes import WatchedModel, embeddings, message, parameters
from inprocess import client_of, eventually, started, until
from PIL import Image

from services.diffusion import app as app_module
from services.diffusion import routes
from services.diffusion.app import create_app
from services.diffusion.model import ZImageModel
from services.diffusion.settings import DiffusionSettings
from shared import events
from shared.problems import MEDIA_TYPE as PROBLEM
from shared.wire import MEDIA_TYPE, TensorMeta, build_header

URL = "/v1/generate"
TENSORS = {"content-type": MEDIA_TYPE}


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def model(zimage_model: ZImageModel) -> WatchedModel:
    return WatchedModel(zimage_model)


@pytest.fixture
def app(model: WatchedModel) -> Any:
    return create_app(DiffusionSettings(diffusion_max_waiting=2, max_pixels=128 * 128), model=model)


@pytest.fixture
async def client(app: Any, model: WatchedModel) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(app) as client:
        yield client
        model.gate.set()


async def draw(client: httpx2.AsyncClient, body: bytes | None = None, **headers: str) -> httpx2.Response:
    return await client.post(URL, content=message() if body is None else body, headers={**TENSORS, **headers})


def check_problem(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM)
    problem: dict[str, Any] = response.json()
    assert problem["code"] == code
    return problem


async def test_a_picture(client: httpx2.AsyncClient, zimage_model: ZImageModel) -> None:
    answer = await draw(client, message(width=96, guidance_scale=2.0))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    wanted = parameters(width=96, guidance_scale=2.0)
    picture = zimage_model.start(wanted, embeddings(20), embeddings(5, seed=2))
    while not picture.finished:
        zimage_model.step([picture])
    with Image.open(io.BytesIO(answer.content)) as image:
        assert np.array_equal(np.asarray(image), zimage_model.decode([picture])[0])
    with Image.open(io.BytesIO(base64.b64decode(answer.headers["x-thumbnail"], validate=True))) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (96, 64))
    number = r"dur=\d+\.\d\d"
    stages = f"queue;{number}, denoise;{number}, decode;{number}, png;{number}"
    assert re.fullmatch(stages, answer.headers["server-timing"])


async def test_the_same_request_gives_the_same_bytes(client: httpx2.AsyncClient) -> None:
    first, second = await draw(client), await draw(client)
    assert first.content == second.content
    assert first.content != (await draw(client, message(seed=8))).content


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
async def test_embeddings_in_any_float(client: httpx2.AsyncClient, dtype: torch.dtype) -> None:
    body = message(tensors={"text": embeddings(20).to(dtype)}, steps=1)
    assert (await draw(client, body)).status_code == 200


async def test_a_body_in_small_pieces(client: httpx2.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        body = message(steps=1)
        for start in range(0, len(body), 61):
            yield body[start : start + 61]

    answer = await client.post(URL, content=pieces(), headers=TENSORS)
    assert answer.status_code == 200


def header_only(dtype: str, shape: tuple[int, ...]) -> bytes:
    return build_header([TensorMeta("text", dtype, shape)], {"parameters": parameters().model_dump_json()})


def filled(value: float) -> bytes:
    return message(tensors={"text": torch.full((20, 64), value)})


REFUSED: dict[str, tuple[bytes, str]] = {
    "NaN": (filled(float("nan")), "'text' hold values that are not finite"),
    "infinity": (filled(float("inf")), "'text' hold values that are not finite"),
    "wrong width": (header_only("F32", (20, 2560)), "'text' must have the shape [tokens, 64], not [20, 2560]"),
    "rank 3": (header_only("F32", (1, 20, 64)), "'text' must have the shape"),
    "int8": (header_only("I8", (20, 64)), "'text' must be one of"),
    "a million rows": (header_only("F32", (1_000_000, 64)), "'text' must have 1 to 40960 tokens, not 1000000"),
    "no rows": (header_only("F32", (0, 64)), "'text' must have 1 to 40960 tokens, not 0"),
    "a broken header": (b"\x20" + b"\0" * 7 + b"{" * 32, "safetensors"),
    "no header": (b"", "safetensors"),
    "a cut body": (message()[:-10], "shorter or longer"),
    "a negative is missing": (
        message(tensors={"text": embeddings(20)}, guidance_scale=2.0),
        "'negative' is required",
    ),
    "too many pixels": (message(raw={"width": 144, "height": 128}), "at most 16384 pixels, not 18432"),
    "steps": (message(raw={"steps": 101}), "'steps' must be at most 100"),
    "width": (message(raw={"width": 100}), "'width' must be a multiple of 16"),
    "a mode": (message(raw={"long_prompt_mode": "squeeze"}), "'long_prompt_mode' must be one of"),
}


@pytest.mark.parametrize(("body", "text"), REFUSED.values(), ids=REFUSED.keys())
async def test_refusals(client: httpx2.AsyncClient, body: bytes, text: str) -> None:
    problem = check_problem(await draw(client, body), 422, "invalid_field")
    assert text in problem["detail"]
    assert (await draw(client, message(steps=1))).status_code == 200


async def test_parameters_that_are_not_json(client: httpx2.AsyncClient) -> None:
    body = build_header([TensorMeta("text", "F32", (1, 64))], {"parameters": "{"}) + b"\0" * 256
    check_problem(await draw(client, body), 400, "malformed_body")


@pytest.mark.parametrize("content_type", ["application/json", "application/octet-stream", "", "image/png"])
async def test_another_content_type(client: httpx2.AsyncClient, content_type: str) -> None:
    answer = await client.post(URL, content=message(), headers={"content-type": content_type})
    assert MEDIA_TYPE in check_problem(answer, 415, "wrong_content_type")["detail"]


async def test_large_bodies_have_a_bound_together(model: WatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of tens of thousands of tokens has hundreds of megabytes; usual ones go on beside them."""
    usual, large = message(), message(tensors={"text": embeddings(200)})
    monkeypatch.setattr(app_module, "USUAL_BODY_BYTES", len(usual))
    monkeypatch.setattr(app_module, "LARGE_BODIES_BYTES", 2 * len(large) - 1)
    app = await asyncio.to_thread(create_app, DiffusionSettings(max_pixels=128 * 128), model=model)
    async with client_of(app) as client:
        model.gate.clear()
        first = asyncio.create_task(draw(client, large))
        await eventually(model.entered.is_set)
        refused = await draw(client, large)
        assert "large bodies" in check_problem(refused, 429, "queue_full")["detail"]
        assert refused.headers["retry-after"]
        beside = asyncio.create_task(draw(client, usual))
        model.gate.set()
        assert [answer.status_code for answer in await asyncio.gather(first, beside)] == [200, 200]
        assert (await draw(client, large)).status_code == 200


async def test_a_body_that_says_it_is_too_large(client: httpx2.AsyncClient) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        yield b""

    headers = {**TENSORS, "content-length": str(app_module.MAX_BODY_BYTES + 1)}
    check_problem(await client.post(URL, content=nothing(), headers=headers), 413, "too_large")


async def test_a_full_queue(client: httpx2.AsyncClient, model: WatchedModel) -> None:
    model.gate.clear()
    tasks = [asyncio.create_task(draw(client))]
    await eventually(model.entered.is_set)
    tasks += [asyncio.create_task(draw(client)) for _ in range(2)]

    await until(client, "/v1/queue", lambda answer: answer.json()["waiting"] == 2)
    answer = await draw(client)
    assert check_problem(answer, 429, "queue_full")["detail"].startswith("2 pictures are waiting")
    assert answer.headers["retry-after"] == "5"
    model.gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200, 200, 200]
    assert (await client.get("/v1/queue")).json() == {"running": [], "waiting": 0, "max_waiting": 2}


async def test_the_queue_names_what_runs(client: httpx2.AsyncClient, model: WatchedModel) -> None:
    model.gate.clear()
    task = asyncio.create_task(draw(client, **{"x-request-id": "picture-1"}))
    await eventually(model.entered.is_set)
    queue = (await client.get("/v1/queue")).json()
    assert queue["running"] == [{"request_id": "picture-1", "step": 0, "steps": 4}]
    text = (await client.get("/metrics")).text
    assert 'zimage_diffusion_running{service="diffusion"} 1.0' in text
    model.gate.set()
    await task


async def test_a_client_that_goes_away_stops_its_picture(app: Any, model: WatchedModel) -> None:
    gone = asyncio.Event()
    body = [{"type": "http.request", "body": message(seed=1, steps=100), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if body:
            return body.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(part: Any) -> None:
        sent.append(part)

    headers = [(b"content-type", MEDIA_TYPE.encode())]
    scope = {"type": "http", "method": "POST", "path": URL, "headers": headers, "query_string": b""}
    async with (
        started(app) as running,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(running), base_url="http://test", timeout=None) as client,
    ):
        await until(client, "/health/ready", lambda answer: answer.is_success)
        model.gate.clear()
        request = asyncio.create_task(running(scope, receive, send))
        await eventually(model.entered.is_set)
        gone.set()
        await request
        model.gate.set()
        assert (await draw(client, message(seed=2))).status_code == 200
    assert model.steps.count((1,)) == 1
    assert model.steps.count((2,)) == 4
    assert sent[0]["status"] == 499


def events_of(answer: httpx2.Response) -> list[tuple[str, dict[str, Any]]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [(event.event, json.loads(event.data)) for event in httpx2.EventSource(answer)]


async def test_the_way_of_a_picture_as_events(client: httpx2.AsyncClient) -> None:
    body = message(width=96, preview_every=3)
    answer = await draw(client, body, accept="text/event-stream", **{"x-request-id": "picture-1"})
    told = events_of(answer)
    assert [name for name, _ in told] == ["queued", "step", "step", "step", "preview", "step", "done"]
    assert told[0][1] == {"id": "picture-1", "place": 1}
    assert [fields["step"] for name, fields in told if name == "step"] == [1, 2, 3, 4]
    assert all(fields["steps"] == 4 and fields["seconds_left"] >= 0 for name, fields in told if name == "step")
    with Image.open(io.BytesIO(base64.b64decode(told[4][1]["image_b64"], validate=True))) as preview:
        assert (preview.format, preview.size) == ("JPEG", (12, 8))
    done = told[-1][1]
    plain = await draw(client, body)
    assert base64.b64decode(done["image_b64"], validate=True) == plain.content
    assert done["headers"]["X-Thumbnail"] == plain.headers["x-thumbnail"]
    assert done["headers"]["Server-Timing"].startswith("queue;dur=")


@pytest.mark.parametrize("large", [True, False])
async def test_the_event_of_a_large_picture_is_made_in_a_thread(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, *, large: bool
) -> None:
    """The loop serves others meanwhile; the small ones that tell of steps are not worth one."""
    made: list[tuple[str | None, bool]] = []

    def noted(data: str, name: str | None = None) -> bytes:
        made.append((name, threading.current_thread() is threading.main_thread()))
        return event(data, name)

    event = events.event
    monkeypatch.setattr(events, "event", noted)
    monkeypatch.setattr(routes, "LARGE_PNG_BYTES", 0 if large else 1 << 30)
    told = events_of(await draw(client, accept="text/event-stream"))
    assert [name for name, _ in told] == [name for name, _ in made]
    assert [in_loop for _, in_loop in made] == [True] * 5 + [not large]


async def test_what_is_refused_is_no_stream(client: httpx2.AsyncClient, model: WatchedModel) -> None:
    events = {"accept": "text/event-stream"}
    check_problem(await draw(client, filled(float("nan"))), 422, "invalid_field")
    check_problem(await draw(client, message(raw={"width": 65}), **events), 422, "invalid_field")
    check_problem(await draw(client, message(raw={"loras": [{"name": "ink"}]}), **events), 404, "not_found")
    model.gate.clear()
    drawing = asyncio.create_task(draw(client, message(width=96)))
    await eventually(model.entered.is_set)
    waiting = [asyncio.create_task(draw(client)) for _ in range(2)]
    await until(client, "/v1/queue", lambda answer: answer.json()["waiting"] == 2)
    check_problem(await draw(client, **events), 429, "queue_full")
    model.gate.set()
    assert [answer.status_code for answer in await asyncio.gather(drawing, *waiting)] == [200] * 3


async def test_what_fails_within_a_stream_is_an_event(client: httpx2.AsyncClient, model: WatchedModel) -> None:
    model.break_next.append(RuntimeError("a library's own text"))
    answer = await draw(client, accept="text/event-stream")
    assert answer.status_code == 200
    name, problem = events_of(answer)[-1]
    assert (name, problem["code"], problem["status"]) == ("error", "internal_error", 500)
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert "library" not in answer.text


async def test_a_picture_is_given_up_by_its_id(client: httpx2.AsyncClient, model: WatchedModel) -> None:
    model.gate.clear()
    drawing = asyncio.create_task(draw(client, message(steps=100), **{"x-request-id": "picture-1"}))
    await eventually(model.entered.is_set)
    check_problem(await client.delete(f"{URL}/picture-2"), 404, "not_found")
    assert (await client.delete(f"{URL}/picture-1")).json() == {"cancelled": "picture-1"}
    model.gate.set()
    check_problem(await drawing, 409, "cancelled")
    await until(client, "/v1/queue", lambda answer: not answer.json()["running"])
    assert len(model.steps) == 1
    check_problem(await client.delete(f"{URL}/picture-1"), 404, "not_found")


async def test_a_deadline(client: httpx2.AsyncClient, model: WatchedModel) -> None:
    model.gate.clear()
    late = await draw(client, message(timeout_s=0.02))
    assert "within 0.02 s" in check_problem(late, 504, "upstream_timeout")["detail"]
    model.gate.set()
    assert (await draw(client)).status_code == 200


async def test_without_a_folder_there_are_no_loras(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/v1/loras")).json() == {"loras": []}


async def test_a_picture_that_breaks(client: httpx2.AsyncClient, model: WatchedModel) -> None:
    model.break_next.append(RuntimeError("a library's own text"))
    answer = await draw(client)
    check_problem(answer, 500, "internal_error")
    assert "library" not in answer.text
    assert (await draw(client)).status_code == 200
    assert (await client.get("/health/ready")).status_code == 200


async def test_model(client: httpx2.AsyncClient, zimage_model: ZImageModel) -> None:
    facts = zimage_model.facts
    assert len(facts.fingerprint) == 16
    assert (await client.get("/v1/model")).json() == {
        "service": "diffusion",
        "version": version("zimage-server"),
        "name": facts.name,
        "fingerprint": facts.fingerprint,
        "device": "cpu",
        "dtype": "float32",
        "text_width": 64,
        "text_limit": 1504,
        "max_pixels": 128 * 128,
    }


@pytest.fixture
def broken_app(tmp_path: Path) -> Any:
    return create_app(DiffusionSettings(model_path=tmp_path / "gone"))


async def test_a_model_that_cannot_be_loaded(broken_app: Any) -> None:
    statuses: list[int] = []
    broken_app.state.stop = statuses.append
    async with client_of(broken_app, ready=False) as client:
        await eventually(lambda: statuses)
        assert statuses == [78]
        assert "does not exist" in check_problem(await client.get("/health/ready"), 503, "unready")["detail"]
        check_problem(await draw(client), 503, "unready")
        check_problem(await client.get("/v1/model"), 503, "unready")
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/v1/queue")).json()["running"] == []


async def test_the_documents_of_openapi(client: httpx2.AsyncClient) -> None:
    post = (await client.get("/openapi.json")).json()["paths"][URL]["post"]
    assert set(post["requestBody"]["content"]) == {MEDIA_TYPE}
    assert set(post["responses"]["200"]["content"]) == {"image/png", "text/event-stream"}
    assert {"400", "404", "409", "413", "415", "422", "429", "500", "503"} <= set(post["responses"])
    for status, response in post["responses"].items():
        if status != "200":
            examples = response["content"][PROBLEM]["examples"]
            assert all(str(example["value"]["status"]) == status for example in examples.values())
            assert json.dumps(examples)
