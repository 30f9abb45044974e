"""`shared.client`: deadlines, request ids, and errors made whole again, over a real connection where that matters."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from inprocess import served
from starlette.types import Receive, Scope, Send

from shared.client import ServiceClient
from shared.errors import (
    BY_CODE,
    BadUpstream,
    InvalidField,
    QueueFull,
    ServiceError,
    Unauthorized,
    UnknownName,
    Unreachable,
    Unready,
    UpstreamTimeout,
)
from shared.problems import MEDIA_TYPE, problem_response

Answer = Callable[[httpx2.Request], httpx2.Response]


class Body(httpx2.AsyncByteStream):
    """A body that has yet to be read, as it comes from a connection."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


def response(status: int, content: bytes = b"", headers: Any = None) -> httpx2.Response:
    return httpx2.Response(status, headers=headers, stream=Body(content))


async def real_client(name: str, url: str, *, max_reply_bytes: int = 1_000) -> ServiceClient:
    """A client with real connections; made in a thread, because it reads certificates, as an app is made outside."""
    return await asyncio.to_thread(ServiceClient, name, url, max_reply_bytes=max_reply_bytes)


def client(answer: Answer | httpx2.AsyncBaseTransport, *, max_reply_bytes: int = 10_000) -> ServiceClient:
    transport = answer if isinstance(answer, httpx2.AsyncBaseTransport) else httpx2.MockTransport(answer)
    return ServiceClient("encoder", "http://encoder", max_reply_bytes=max_reply_bytes, transport=transport)


def answer_with(error: ServiceError) -> Answer:
    problem = problem_response(error, "id-of-the-service")
    return lambda _: response(problem.status_code, bytes(problem.body), list(problem.headers.items()))


THEIRS = [kind for kind in BY_CODE.values() if kind not in (Unready, Unauthorized)]


@pytest.mark.parametrize("kind", THEIRS, ids=lambda kind: kind.code)
async def test_an_error_of_a_service_is_raised_as_the_same_class(kind: type[ServiceError]) -> None:
    async with client(answer_with(kind("'width' must be at least 16.", retry_after_s=9))) as service:
        with pytest.raises(ServiceError) as raised:
            await service.get("/", timeout_s=5)
    assert type(raised.value) is kind
    assert raised.value.told
    assert raised.value.detail == "'width' must be at least 16."
    assert raised.value.retry_after_s == 9


async def test_a_service_is_reached_at_one_address_of_its_host() -> None:
    seen = []

    def remember(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, stream=httpx2.ByteStream(b""))

    for url, address, told, host in (
        ("https://encoders:7861/base", "10.0.0.7", "https://10.0.0.7:7861/base", "encoders:7861"),
        ("http://user:secret@encoders", "fd00::7", "http://[fd00::7]", "encoders"),
    ):
        transport = httpx2.MockTransport(remember)
        service = ServiceClient("encoder", url, max_reply_bytes=10, transport=transport, address=address)
        async with service:
            await service.get("/v1/model", timeout_s=5)
        assert service.base_url == told
        request = seen.pop()
        assert request.url.host == address
        assert request.headers["host"] == host
        assert request.extensions["sni_hostname"] == "encoders"


async def test_a_service_that_is_not_ready_is_named() -> None:
    async with client(answer_with(Unready("the model is being loaded", retry_after_s=60))) as service:
        with pytest.raises(Unready, match=r"encoder service is not ready yet\. the model is being loaded") as raised:
            await service.get("/", timeout_s=5)
    assert raised.value.retry_after_s == 2


@pytest.mark.parametrize("kind", [UnknownName, InvalidField])
async def test_no_retry_after_where_none_was_sent(kind: type[ServiceError]) -> None:
    async with client(answer_with(kind("Text."))) as service:
        with pytest.raises(kind) as raised:
            await service.get("/", timeout_s=5)
    assert raised.value.retry_after_s is None


@pytest.mark.parametrize(
    "retry_after", [b"soon", b"-1", b"1.5", b"Wed, 21 Oct 2026 07:28:00 GMT", b"\xb2", b"", b"9" * 5000]
)
async def test_a_retry_after_that_is_no_number_is_left_out(retry_after: bytes) -> None:
    body = problem_response(QueueFull("Full."), None).body
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"retry-after", retry_after)]
    async with client(lambda _: response(429, bytes(body), headers)) as service:
        with pytest.raises(QueueFull) as raised:
            await service.get("/", timeout_s=5)
    assert raised.value.retry_after_s is None


def problem(**fields: Any) -> bytes:
    body = {"type": "about:blank", "title": "T", "status": 422, "detail": "D.", "code": "invalid_field"}
    return json.dumps({**body, "request_id": None, **fields}).encode()


@pytest.mark.parametrize(
    ("status", "content_type", "content"),
    [
        (500, "text/plain", b"Traceback (most recent call last): secret"),
        (404, "text/html", b"<html>secret</html>"),
        (422, "application/json", b'{"detail": "secret"}'),
        (422, "application/json", problem(detail="secret")),
        (422, MEDIA_TYPE, b"secret"),
        (422, MEDIA_TYPE, b""),
        (422, MEDIA_TYPE, b"[]"),
        (422, MEDIA_TYPE, b'{"detail": "secret"}'),
        (422, MEDIA_TYPE, problem(detail=["secret"])),
        (422, MEDIA_TYPE, problem(code="secret")),
        (422, MEDIA_TYPE, problem(code=None)),
        (422, MEDIA_TYPE, b"[" * 5_000),
        (302, "text/plain", b"secret"),
        (304, "text/plain", b""),
        (503, "", b""),
    ],
)
async def test_an_answer_that_cannot_be_understood(status: int, content_type: str, content: bytes) -> None:
    headers = {"content-type": content_type, "location": "http://elsewhere/"}
    async with client(lambda _: response(status, content, headers)) as service:
        with pytest.raises(BadUpstream, match="encoder service") as raised:
            await service.get("/", timeout_s=5)
    assert "secret" not in raised.value.detail


async def test_a_success_is_handed_on() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        assert json.loads(request.content) == {"input": "a cat"}
        assert request.headers["accept"] == "application/vnd.safetensors"
        assert request.headers["content-type"] == "application/json"
        assert request.headers["accept-encoding"] == "identity"
        return response(201, b"body", {"Server-Timing": "encode;dur=1"})

    async with client(answer) as service:
        headers = {"accept": "application/vnd.safetensors"}
        reply = await service.post_json("/v1/x", {"input": "a cat"}, timeout_s=5, headers=headers)
    assert reply.body == b"body"
    assert reply.headers["server-timing"] == "encode;dur=1"


async def test_headers_of_the_client_are_sent_with_every_call() -> None:
    seen: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers["authorization"])
        return response(200)

    transport = httpx2.MockTransport(answer)
    headers = {"authorization": "Bearer key"}
    async with ServiceClient("api", "http://api", max_reply_bytes=10, headers=headers, transport=transport) as service:
        await service.get("/", timeout_s=5)
        await service.post_json("/", {}, timeout_s=5)
        await service.post_chunks("/", [b"x"], timeout_s=5, headers={})
    assert seen == ["Bearer key"] * 3


async def test_the_request_id_is_passed_on() -> None:
    seen: list[str | None] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers.get("x-request-id"))
        return response(200)

    async with client(answer) as service:
        await service.get("/", timeout_s=5)
        with structlog.contextvars.bound_contextvars(request_id="id-12345"):
            await service.get("/", timeout_s=5)
            await service.post_chunks("/", [b"x"], timeout_s=5, headers={})
    assert seen == [None, "id-12345", "id-12345"]


async def test_a_reply_of_the_largest_size_and_one_more_byte() -> None:
    for size, fits in ((100, True), (101, False)):
        async with client(lambda _, size=size: response(200, b"x" * size), max_reply_bytes=100) as it:
            if fits:
                assert len((await it.get("/", timeout_s=5)).body) == 100
            else:
                with pytest.raises(BadUpstream, match="more than 100 bytes"):
                    await it.get("/", timeout_s=5)


class Endless(httpx2.AsyncByteStream):
    def __init__(self) -> None:
        self.sent = 0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.sent += 50
            yield b"x" * 50

    async def aclose(self) -> None:
        self.closed = True


async def test_a_reply_without_an_end_is_not_read_on() -> None:
    stream = Endless()
    async with client(lambda _: httpx2.Response(200, stream=stream), max_reply_bytes=1_000) as service:
        with pytest.raises(BadUpstream, match="more than 1000 bytes"):
            await service.get("/", timeout_s=5)
    assert stream.sent <= 1_050
    assert stream.closed


class Silent(httpx2.AsyncBaseTransport):
    def __init__(self) -> None:
        self.cancelled = False

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            return await asyncio.Event().wait()  # type: ignore[return-value]
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def test_a_service_that_does_not_answer() -> None:
    transport = Silent()
    async with client(transport) as service:
        with pytest.raises(UpstreamTimeout, match=r"encoder service did not answer within 0\.01 s"):
            await service.get("/", timeout_s=0.01)
    assert transport.cancelled


async def test_a_body_that_never_ends_meets_the_deadline_too() -> None:
    class Stuck(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"x"
            await asyncio.Event().wait()

    async with client(lambda _: httpx2.Response(200, stream=Stuck())) as service:
        with pytest.raises(UpstreamTimeout):
            await service.get("/", timeout_s=0.01)


async def test_a_caller_that_is_cancelled_stays_cancelled() -> None:
    transport = Silent()
    async with client(transport) as service:
        call = asyncio.create_task(service.get("/", timeout_s=60))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


def failing(error: type[Exception]) -> Answer:
    def answer(request: httpx2.Request) -> httpx2.Response:
        raise error("a library's own text")

    return answer


@pytest.mark.parametrize(
    "error",
    [
        httpx2.ConnectError,
        httpx2.ConnectTimeout,
        httpx2.ReadError,
        httpx2.WriteError,
        httpx2.CloseError,
        httpx2.RemoteProtocolError,
        httpx2.LocalProtocolError,
    ],
)
async def test_failures_of_the_connection(error: type[Exception]) -> None:
    async with client(failing(error)) as service:
        with pytest.raises(Unreachable, match="The encoder service") as raised:
            await service.get("/", timeout_s=5)
    assert raised.value.retry_after_s == 2
    assert "library" not in raised.value.detail


@pytest.mark.slow
async def test_a_service_with_all_it_takes_is_full_and_still_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that waited behind the work would make a node look away that only has much to do."""
    monkeypatch.setattr("shared.client._WORK", httpx2.Limits(max_connections=1))
    monkeypatch.setattr("shared.client.PLACE_TIMEOUT_S", 0.05)
    asked = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] == "POST":
            asked.set()
            await asyncio.sleep(30)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"well"})

    async with served(app) as url, await real_client("encoder", url) as service:
        working = asyncio.create_task(service.post_json("/v1/hidden_states", {}, timeout_s=30))
        await asked.wait()
        assert (await service.get("/v1/model", timeout_s=5)).body == b"well"
        with pytest.raises(QueueFull, match="as many requests") as full:
            await service.post_json("/v1/hidden_states", {}, timeout_s=30)
        assert full.value.retry_after_s
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_what_another_program_refuses_is_the_requests_fault(status: int) -> None:
    transport = httpx2.MockTransport(lambda _: response(status, b"secret"))
    async with ServiceClient(
        "API encoder", "http://mac", max_reply_bytes=10_000, transport=transport, foreign=True
    ) as service:
        with pytest.raises(InvalidField, match=f"refused it with status {status}") as refused:
            await service.get("/", timeout_s=5)
    assert refused.value.told
    assert "secret" not in refused.value.detail


async def test_a_port_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    async with await real_client("encoder", f"http://127.0.0.1:{port}") as service:
        with pytest.raises(Unreachable, match="cannot be reached"):
            await service.get("/", timeout_s=5)


async def test_a_server_that_hangs_up() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with await real_client("encoder", f"http://127.0.0.1:{port}") as service:
            with pytest.raises(Unreachable, match="closed the connection before it had answered"):
                await service.get("/", timeout_s=5)


async def test_a_server_that_speaks_something_else() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"220 smtp.example.com ESMTP\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with await real_client("encoder", f"http://127.0.0.1:{port}") as service:
            with pytest.raises(Unreachable, match="encoder service"):
                await service.get("/", timeout_s=5)


class Recorder:
    """An app that answers with what it was sent."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.body, more = b"", True
        while more:
            message = await receive()
            self.body += message.get("body", b"")
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


async def test_chunks_go_over_a_real_connection_in_order_and_under_one_length() -> None:
    app = Recorder()
    pieces = [b"head", memoryview(bytearray(range(256)) * 8192), b"", memoryview(b"tail"), b"!" * 70_000]
    expected = b"".join(pieces)
    async with served(app) as url, await real_client("diffusion", url) as service:
        reply = await service.post_chunks("/", pieces, timeout_s=30, headers={"content-type": "x/y"})
    assert reply.body == b"ok"
    assert app.body == expected
    assert app.headers["content-length"] == str(len(expected))
    assert app.headers["content-type"] == "x/y"
    assert "transfer-encoding" not in app.headers


async def test_chunks_may_come_from_an_iterator() -> None:
    app = Recorder()
    async with client(httpx2.ASGITransport(app)) as service:
        await service.post_chunks("/", iter([b"a", b"b"]), timeout_s=5, headers={})
    assert (app.body, app.headers["content-length"]) == (b"ab", "2")


async def test_many_calls_at_once_over_real_connections() -> None:
    app = Recorder()
    async with served(app) as url, await real_client("encoder", url) as service:
        replies = await asyncio.gather(*(service.post_json("/", {"n": n}, timeout_s=30) for n in range(50)))
    assert [reply.body for reply in replies] == [b"ok"] * 50


@given(st.integers(100, 599), st.binary(max_size=60), st.sampled_from([MEDIA_TYPE, "application/json", ""]))
def test_whatever_is_answered_only_our_errors_come_out(status: int, content: bytes, content_type: str) -> None:
    async def call() -> None:
        headers = {"content-type": content_type}
        async with client(lambda _: response(status, content, headers)) as service:
            try:
                reply = await service.get("/", timeout_s=5)
            except ServiceError:
                assert not 200 <= status < 300
            else:
                assert 200 <= status < 300
                assert reply.body == content

    asyncio.run(call())
