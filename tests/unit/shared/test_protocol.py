"""`shared.protocol` on real connections: heads that never end, and what is no HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
import structlog
from inprocess import served
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shared.problems import MEDIA_TYPE
from shared.protocol import MAX_BYTES_BEYOND_BODY

PATIENCE_S = 30.0
GET = b"GET / HTTP/1.1\r\nHost: test\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
FILLER = b"x" * (64 << 10)
LARGE_PIECES = 512


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers the length of the body, after a moment if the path says so."""
    if scope["type"] == "http":
        request = Request(scope, receive)
        length = len(await request.body())
        if scope["path"] == "/slow":
            await asyncio.sleep(0.2)
        await Response(str(length))(scope, receive, send)


async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
    """Begins an answer that never ends."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"begin", "more_body": True})
        await asyncio.Event().wait()


class Large:
    """Answers more than any buffer takes, and notes when its answer has ended."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] == "http":
            try:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": FILLER * LARGE_PIECES, "more_body": True})
                await send({"type": "http.response.body", "body": b"end"})
            finally:
                self.ended.set()


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with served(app) as url:
        yield url


class Connection:
    """A client that sends what no library would."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self._writer = reader, writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def send_until_refused(self, data: bytes) -> int:
        """Sends without end; answers how many bytes went out before the server closed."""
        sent = 0
        try:
            while True:
                await self.send(data)
                sent += len(data)
        except ConnectionError:
            return sent

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer."""
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            status, *lines = head.strip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(status.split()[1]), headers, body

    async def ended(self) -> bool:
        """Whether the server closes without another byte."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read() == b""


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def still_works(url: str) -> None:
    async with connected(url) as connection:
        await connection.send(GET + b"\r\n")
        assert (await connection.answer())[0] == 200


ENDLESS = {
    "a path": (b"GET /", FILLER),
    "a header": (GET + b"X-Endless: ", FILLER),
    "headers": (GET, b"X-More: " + FILLER + b"\r\n"),
    "a trailer": (CHUNKED + b"0\r\nX-Trailer: ", FILLER),
    "an extension of a chunk": (CHUNKED + b"1;", FILLER),
    "small chunks": (CHUNKED, b"1\r\nx\r\n" * 10_000),
}


@pytest.mark.parametrize(("begin", "more"), ENDLESS.values(), ids=ENDLESS.keys())
async def test_what_never_ends_is_cut(url: str, begin: bytes, more: bytes) -> None:
    async with connected(url) as connection, asyncio.timeout(PATIENCE_S):
        await connection.send(begin)
        assert await connection.send_until_refused(more) < 4 * MAX_BYTES_BEYOND_BODY
    await still_works(url)


async def test_a_head_beyond_the_bound_is_refused_as_a_problem(url: str) -> None:
    async with connected(url) as connection:
        begin = GET + b"X-A: "
        await connection.send(begin.ljust(MAX_BYTES_BEYOND_BODY, b"x"))
        await connection.send(b"x")
        status, headers, body = await connection.answer()
        assert (status, headers["content-type"], headers["connection"]) == (431, MEDIA_TYPE, "close")
        problem = json.loads(body)
        assert (problem["status"], problem["code"]) == (431, "headers_too_large")
        assert str(MAX_BYTES_BEYOND_BODY) in problem["detail"]
        assert len(problem["request_id"]) == 32
        assert await connection.ended()
    await still_works(url)


NO_HTTP = {
    "TLS": b"\x16\x03\x01\x02\x00\x01",
    "a word": b"hello\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\n\r\n",
    "bytes in the path": b"GET /\xff HTTP/1.1\r\n\r\n",
    "JSON": b"{}\r\n\r\n",
    "two lengths": GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
}


@pytest.mark.parametrize("garbage", NO_HTTP.values(), ids=NO_HTTP.keys())
async def test_what_is_no_http_is_refused_as_a_problem(url: str, garbage: bytes) -> None:
    async with connected(url) as connection:
        await connection.send(garbage)
        status, headers, body = await connection.answer()
        assert (status, headers["content-type"], json.loads(body)["code"]) == (400, MEDIA_TYPE, "malformed_body")
        assert await connection.ended()
    await still_works(url)


async def test_a_body_counts_for_itself(url: str) -> None:
    whole = FILLER * (2 * MAX_BYTES_BEYOND_BODY // len(FILLER))
    chunk = b"%x\r\n%s\r\n" % (len(FILLER), FILLER)
    async with connected(url) as connection:
        for _ in range(2):
            await connection.send(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole)
            assert (await connection.answer())[2] == b"%d" % len(whole)
            await connection.send(CHUNKED + chunk * 128 + b"0\r\n\r\n")
            assert (await connection.answer())[2] == b"%d" % (128 * len(FILLER))


@pytest.mark.parametrize("begin", [b"", GET])
async def test_a_head_that_does_not_come_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch, begin: bytes) -> None:
    monkeypatch.setattr("shared.protocol.HEAD_TIMEOUT_S", 0.05)
    async with connected(url) as connection:
        await connection.send(begin)
        assert await connection.ended()
    monkeypatch.undo()
    await still_works(url)


async def test_an_answer_takes_its_time_though_the_next_head_is_late(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.protocol.HEAD_TIMEOUT_S", 0.05)
    async with connected(url) as connection:
        await connection.send(b"GET /slow HTTP/1.1\r\nHost: test\r\n\r\n" + GET)
        assert (await connection.answer())[0] == 200
        assert await connection.ended()


@pytest.mark.slow
async def test_nothing_is_written_into_an_answer_that_has_begun() -> None:
    async with served(streaming) as url, connected(url) as connection:
        await connection.send(GET + b"\r\n")
        await connection.reader.readuntil(b"begin")
        await connection.send(b"no HTTP\r\n\r\n")
        assert await connection.ended()


async def test_requests_in_a_row_are_answered(url: str) -> None:
    async with connected(url) as connection:
        await connection.send((GET + b"\r\n") * 3)
        assert [(await connection.answer())[0] for _ in range(3)] == [200, 200, 200]


async def test_a_client_that_takes_nothing_of_its_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.protocol.UNREAD_TIMEOUT_S", 0.2)
    large = Large()
    async with served(large) as url, connected(url) as connection:
        await connection.send(GET + b"\r\n")
        async with asyncio.timeout(PATIENCE_S):
            await large.ended.wait()  # the app's last words wait for the client
            taken = 0
            with suppress(ConnectionError):
                while piece := await connection.reader.read(1 << 16):
                    taken += len(piece)
            assert taken < len(FILLER) * LARGE_PIECES


@pytest.mark.slow
async def test_a_client_that_takes_its_answer_slowly_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.protocol.UNREAD_TIMEOUT_S", 0.2)
    large = Large()
    async with served(large) as url, connected(url) as connection, asyncio.timeout(PATIENCE_S):
        await connection.send(GET + b"\r\n")
        await connection.reader.readuntil(b"\r\n\r\n")
        taken = b""
        while not taken.endswith(b"end\r\n0\r\n\r\n"):
            taken = taken[-100:] + await connection.reader.read(1 << 20)
            await asyncio.sleep(0.02)
    await large.ended.wait()
