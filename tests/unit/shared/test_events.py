"""`shared.events`: refusals before the first event, errors after it, silence, and clients that go away."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
import structlog
from fastapi import FastAPI, Request, Response
from inprocess import eventually, served

from shared import events
from shared.errors import BadUpstream, QueueFull
from shared.problems import MEDIA_TYPE as PROBLEM
from shared.problems import Problem, install_handlers

Source = Callable[[], AsyncGenerator[bytes]]


async def get(source: Source, **options: Any) -> httpx2.Response:
    """The answer of a route that sends these events, and what was logged meanwhile."""
    app = FastAPI()
    install_handlers(app)

    @app.get("/")
    async def route(request: Request) -> Response:
        return await events.event_response(request, source(), **options)

    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get("/")


async def two() -> AsyncGenerator[bytes]:
    yield events.event("1", "first")
    yield events.event("a\nb")


async def test_events_as_they_are_sent() -> None:
    answer = await get(two)
    assert answer.headers["content-type"].startswith(events.MEDIA_TYPE)
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.text == "event: first\ndata: 1\n\ndata: a\ndata: b\n\n"


async def test_a_refusal_before_the_first_event_has_its_status() -> None:
    closed = []

    async def refused() -> AsyncGenerator[bytes]:
        try:
            raise QueueFull("Full.", retry_after_s=3)
            yield b""
        finally:
            closed.append(True)

    answer = await get(refused)
    assert (answer.status_code, answer.headers["content-type"]) == (429, PROBLEM)
    assert answer.headers["retry-after"] == "3"
    assert closed


async def broken(error: Exception) -> AsyncGenerator[bytes]:
    yield events.event("1")
    raise error


async def test_an_error_after_it_is_the_last_event() -> None:
    answer = await get(lambda: broken(BadUpstream("No sense.")))
    assert answer.status_code == 200
    name, data = answer.text.strip().rpartition("\n\n")[2].split("\n")
    assert name == "event: error"
    problem = Problem.model_validate_json(data.removeprefix("data: "))
    assert (problem.status, problem.code, problem.detail) == (502, "bad_upstream", "No sense.")


async def test_a_defect_is_told_without_its_text_and_logged() -> None:
    with structlog.testing.capture_logs() as logs:
        answer = await get(lambda: broken(RuntimeError("a library's own text")))
    assert "internal_error" in answer.text
    assert "library" not in answer.text
    assert [entry["log_level"] for entry in logs] == ["error"]


async def test_errors_may_be_told_otherwise() -> None:
    def told(problem: Problem) -> bytes:
        return events.event(json.dumps({"error": problem.code}))

    answer = await get(lambda: broken(BadUpstream("No sense.")), told=told)
    assert answer.text.endswith('data: {"error": "bad_upstream"}\n\n')


async def test_a_long_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PING_INTERVAL_S", 0.01)

    async def slow() -> AsyncGenerator[bytes]:
        yield events.event("1")
        await asyncio.sleep(0.05)
        yield events.event("2")

    text = (await get(slow)).text
    assert ": ping\n\n" in text
    assert text.replace(": ping\n\n", "") == "data: 1\n\ndata: 2\n\n"


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_the_source_is_closed_when_the_client_goes_away(after: int) -> None:
    """While the first event is awaited, and while a later one is."""
    state: dict[str, bool] = {}

    async def endless() -> AsyncGenerator[bytes]:
        try:
            for number in range(after):
                yield events.event(str(number))
            state["waits"] = True
            await asyncio.Event().wait()
        finally:
            state["closed"] = True

    app = FastAPI()
    install_handlers(app)

    @app.get("/")
    async def route(request: Request) -> Response:
        return await events.event_response(request, endless())

    async def read(url: str) -> AsyncIterator[str]:
        async with httpx2.AsyncClient(trust_env=False, timeout=30) as client, client.stream("GET", url) as answer:
            async for text in answer.aiter_text():
                yield text

    async def follow(url: str) -> None:
        async for _ in read(url):
            pass

    async with served(app) as url:
        task = asyncio.create_task(follow(url))
        await eventually(lambda: state.get("waits"))
        assert "closed" not in state
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: state.get("closed"))
