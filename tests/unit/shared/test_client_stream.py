"""`ServiceClient.stream`: events of another service, its errors, deadlines, and the end of a connection."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import httpx2
import pytest
from inprocess import eventually, served
from starlette.types import Receive, Scope, Send

from shared.client import ServiceClient
from shared.errors import BadUpstream, QueueFull, ServiceError, Unreachable, UpstreamTimeout
from shared.problems import problem_response

EVENTS = {"content-type": "text/event-stream"}


class Body(httpx2.AsyncByteStream):
    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


def client(
    answer: Callable[[httpx2.Request], httpx2.Response], *, max_reply_bytes: int = 1_000, foreign: bool = False
) -> ServiceClient:
    transport = httpx2.MockTransport(answer)
    return ServiceClient(
        "writer", "http://writer", max_reply_bytes=max_reply_bytes, transport=transport, foreign=foreign
    )


def sends(*pieces: bytes) -> Callable[[httpx2.Request], httpx2.Response]:
    return lambda _: httpx2.Response(200, headers=EVENTS, stream=Body(pieces))


async def received(service: ServiceClient, *, timeout_s: float = 5) -> list[tuple[str, str]]:
    async with aclosing(service.stream("/v1/write", {"a": 1}, timeout_s=timeout_s)) as stream:
        return [(event.event, event.data) async for event in stream]


async def test_events_however_they_are_cut() -> None:
    pieces = [bytes([byte]) for byte in "event: text\ndata: 两\n\n: ping\n\ndata: 1\ndata: 2\n\n".encode()]
    assert await received(client(sends(*pieces))) == [("text", "两"), ("message", "1\n2")]


async def test_what_is_sent() -> None:
    requests: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return sends()(request)

    assert await received(client(answer)) == []
    assert requests[0].headers["accept"] == "text/event-stream"
    assert requests[0].content == b'{"a":1}'


@pytest.mark.parametrize("foreign", [True, False])
async def test_a_refusal_of_ours_is_made_whole_again_another_servers_is_not(*, foreign: bool) -> None:
    refusal = problem_response(QueueFull("Ours.", retry_after_s=4), "id")

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(429, headers=dict(refusal.headers), stream=Body([bytes(refusal.body)]))

    with pytest.raises(QueueFull) as failed:
        await received(client(answer, foreign=foreign))
    assert failed.value.detail == ("The writer service answered with status 429." if foreign else "Ours.")
    assert failed.value.retry_after_s == 4


@pytest.mark.parametrize(
    ("pieces", "text"),
    [([b"data: 1\n\n"] * 2_000, "more than 1000 bytes"), ([b"data: " + b"x" * (2 << 20)], "not events")],
)
async def test_answers_without_end(pieces: list[bytes], text: str) -> None:
    with pytest.raises(BadUpstream, match=text):
        await received(client(sends(*pieces)))


async def test_something_else_than_events() -> None:
    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "application/json"}, stream=Body([b"{}"]))

    with pytest.raises(BadUpstream, match="not events"):
        await received(client(answer))


class Server:
    """Sends one event and then nothing more, or breaks off; knows whether its client is still there."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.breaks = breaks
        self.waits = self.left = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app."""
        if scope["type"] != "http":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        if self.breaks:
            raise RuntimeError("the server breaks")
        self.waits = True
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left = True


async def real(url: str) -> ServiceClient:
    """A client with real connections; made in a thread, because it reads certificates, as an app is made outside."""
    return await asyncio.to_thread(ServiceClient, "writer", url, max_reply_bytes=1_000)


async def test_closing_the_generator_closes_the_connection() -> None:
    server: Any = Server()
    async with served(server) as url, await real(url) as service:
        stream = service.stream("/", {}, timeout_s=30)
        assert (await anext(stream)).data == "1"
        assert not server.left
        await stream.aclose()
        await eventually(lambda: server.left)


async def test_the_deadline_is_that_of_the_last_event() -> None:
    server: Any = Server()
    async with served(server) as url, await real(url) as service:
        with pytest.raises(UpstreamTimeout, match=r"did not answer within 0\.2 s"):
            await received(service, timeout_s=0.2)
        await eventually(lambda: server.left)


async def test_a_connection_that_breaks() -> None:
    async with served(Server(breaks=True)) as url, await real(url) as service:
        with pytest.raises(Unreachable, match="closed the connection"):
            await received(service)


async def test_nobody_listens() -> None:
    async with await real("http://127.0.0.1:9") as service:
        with pytest.raises(ServiceError) as failed:
            await received(service)
        assert isinstance(failed.value, Unreachable)


async def test_connecting_is_tried_again_a_request_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another server than ours, which may be behind a balancer that refuses for a moment."""
    import anyio

    tried: list[str] = []
    connect = anyio.connect_tcp

    async def refusing(*arguments: Any, **options: Any) -> Any:
        tried.append("connect")
        if len(tried) < 3:
            raise OSError("refused")
        return await connect(*arguments, **options)

    async with served(Server(breaks=True)) as url:
        monkeypatch.setattr(anyio, "connect_tcp", refusing)
        service = await asyncio.to_thread(ServiceClient, "API", url, max_reply_bytes=1_000, foreign=True)
        async with service:
            with pytest.raises(Unreachable, match="closed the connection"):
                await received(service)
    assert len(tried) == 3
