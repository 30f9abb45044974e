"""`shared.requests`, `shared.service` and `shared.health`: what surrounds every request of every service."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
import structlog
from fastapi import APIRouter, Depends, FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from inprocess import client_of, served
from pydantic import BaseModel

from shared.bodies import BodyLimits
from shared.errors import ClientGone, QueueFull
from shared.health import Metrics
from shared.problems import MEDIA_TYPE
from shared.requests import MAX_HEADER_BYTES, RequestContext, require_json, until_disconnected
from shared.responses import ChunkedResponse
from shared.service import create_service

MAX_BODY_BYTES = 1000
JSON = {"content-type": "application/json"}


class Body(BaseModel):
    text: str


def make_app(waiting_for: list[str], max_body_bytes: int | BodyLimits = MAX_BODY_BYTES) -> FastAPI:
    router = APIRouter(prefix="/v1")

    @router.post("/echo", dependencies=[Depends(require_json)])
    async def echo(body: Body) -> Body:
        return body

    @router.post("/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    @router.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("a secret of the library")

    @router.get("/full")
    async def full() -> None:
        raise QueueFull("3 pictures are waiting.", retry_after_s=5)

    @router.get("/log-context")
    async def log_context() -> dict[str, Any]:
        return structlog.contextvars.get_contextvars()

    @router.get("/chunks")
    async def chunks() -> ChunkedResponse:
        return ChunkedResponse([b"ab", memoryview(b"cde"), b""], media_type="text/plain", headers={"X-Pieces": "3"})

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        yield {}

    metrics = Metrics("echo")
    metrics.gauge("zimage_test_waiting", "What waits", lambda: len(waiting_for))
    return create_service(
        description="For tests.",
        lifespan=lifespan,
        routers=[router],
        readiness=lambda: waiting_for[0] if waiting_for else None,
        metrics=metrics,
        max_body_bytes=max_body_bytes,
    )


@pytest.fixture
def waiting_for() -> list[str]:
    return []


@pytest.fixture
def app(waiting_for: list[str]) -> FastAPI:
    return make_app(waiting_for)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(app, ready=False) as client:
        yield client


def check_problem(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == MEDIA_TYPE
    problem = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["request_id"] == response.headers["x-request-id"]
    return problem


@pytest.fixture
async def still_works(client: httpx2.AsyncClient) -> AsyncIterator[None]:
    """After the test the next good request is answered as ever."""
    yield
    answer = await client.post("/v1/echo", json={"text": "a cat"})
    assert (answer.status_code, answer.json()) == (200, {"text": "a cat"})


@pytest.mark.parametrize("request_id", ["12345678", "a.b-C_d9" * 8, "3f1c0a5b7d2e4c69"])
async def test_a_good_request_id_is_kept(client: httpx2.AsyncClient, request_id: str) -> None:
    answer = await client.get("/v1/log-context", headers={"x-request-id": request_id})
    assert answer.headers["x-request-id"] == request_id
    assert answer.json()["request_id"] == request_id


@pytest.mark.parametrize(
    "request_id", ["", "short", "x" * 65, "with space", "new\tline1", "<script>", "a/b/c/d/e", "é" * 9]
)
async def test_any_other_request_id_is_replaced(client: httpx2.AsyncClient, request_id: str) -> None:
    answer = await client.get("/v1/log-context", headers={"x-request-id": request_id.encode()})
    made = answer.headers["x-request-id"]
    assert len(made) == 32
    assert int(made, 16)
    assert answer.json()["request_id"] == made


async def test_every_request_has_an_id_of_its_own(client: httpx2.AsyncClient) -> None:
    answers = await asyncio.gather(*(client.get("/v1/log-context") for _ in range(20)))
    ids = [answer.json()["request_id"] for answer in answers]
    assert len(set(ids)) == 20
    assert ids == [answer.headers["x-request-id"] for answer in answers]
    assert "request_id" not in structlog.contextvars.get_contextvars()


@pytest.mark.usefixtures("still_works")
async def test_a_body_that_says_it_is_too_large(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/v1/echo", json={"text": "x" * MAX_BODY_BYTES})
    assert f"{MAX_BODY_BYTES} bytes" in check_problem(answer, 413, "too_large")["detail"]


@pytest.mark.parametrize("path", ["/v1/echo", "/v1/raw"])
@pytest.mark.usefixtures("still_works")
async def test_a_body_that_turns_out_too_large(client: httpx2.AsyncClient, path: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"x" * 100

    answer = await client.post(path, content=pieces(), headers=JSON)
    assert "content-length" not in answer.request.headers
    check_problem(answer, 413, "too_large")


async def test_a_body_of_the_largest_size(client: httpx2.AsyncClient) -> None:
    assert (await client.post("/v1/raw", content=b"x" * MAX_BODY_BYTES)).json() == MAX_BODY_BYTES


@pytest.mark.parametrize("length", ["-1", "1e3", "ten", "²", "9" * 30, "0x10", "1001"])
async def test_lengths_that_are_none_or_too_large(app: FastAPI, length: str) -> None:
    status, _ = await call(app, headers=[(b"content-length", length.encode("latin-1"))])
    assert status == 413


async def call(app: Any, *, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Calls an app below any client, which would not send such headers."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/raw", "headers": headers, "query_string": b"", "state": {}}
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


@pytest.mark.usefixtures("still_works")
async def test_headers_that_are_too_large(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/v1/log-context", headers={"x-filler": "x" * (1 << 20)})
    check_problem(answer, 431, "headers_too_large")
    just_right = await client.get("/v1/log-context", headers={"x-filler": "x" * (MAX_HEADER_BYTES - 1000)})
    assert just_right.status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
@pytest.mark.usefixtures("still_works")
async def test_a_content_type_that_is_not_json(client: httpx2.AsyncClient, content_type: str) -> None:
    answer = await client.post("/v1/echo", content=b'{"text": "a"}', headers={"content-type": content_type})
    assert "application/json" in check_problem(answer, 415, "wrong_content_type")["detail"]


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "Application/LD+JSON"])
async def test_content_types_that_are_json(client: httpx2.AsyncClient, content_type: str) -> None:
    answer = await client.post("/v1/echo", content=b'{"text": "a"}', headers={"content-type": content_type})
    assert answer.status_code == 200


@pytest.mark.usefixtures("still_works")
async def test_a_body_that_is_not_json(client: httpx2.AsyncClient) -> None:
    check_problem(await client.post("/v1/echo", content=b"{", headers=JSON), 400, "malformed_body")
    check_problem(await client.post("/v1/echo", content=b'{"text": "\xff"}', headers=JSON), 400, "malformed_body")


@pytest.fixture
def roomy_app() -> FastAPI:
    return make_app([], max_body_bytes=1 << 20)


async def test_deeply_nested_json(roomy_app: FastAPI) -> None:
    async with client_of(roomy_app, ready=False) as client:
        answer = await client.post("/v1/echo", content=b"[" * 100_000 + b"]" * 100_000, headers=JSON)
        check_problem(answer, 400, "malformed_body")
        shallow = await client.post("/v1/echo", content=b"[" * 100 + b"]" * 100, headers=JSON)
        check_problem(shallow, 422, "invalid_field")
        assert (await client.post("/v1/echo", json={"text": "a"})).status_code == 200


@pytest.mark.usefixtures("still_works")
async def test_a_field_that_is_wrong(client: httpx2.AsyncClient) -> None:
    problem = check_problem(await client.post("/v1/echo", json={"text": 1}), 422, "invalid_field")
    assert problem["detail"] == "'text' must be a string."


async def test_unknown_paths_and_methods(client: httpx2.AsyncClient) -> None:
    check_problem(await client.get("/v1/nowhere"), 404, "not_found")
    check_problem(await client.get("/../../etc/passwd"), 404, "not_found")
    check_problem(await client.delete("/v1/echo"), 405, "method_not_allowed")


async def test_an_unknown_error_tells_its_id_alone(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/v1/broken")
    problem = check_problem(answer, 500, "internal_error")
    assert "request id" in problem["detail"]
    assert "secret" not in answer.text
    assert "ZeroDivision" not in answer.text


async def test_a_known_error_keeps_its_retry_after(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/v1/full")
    assert check_problem(answer, 429, "queue_full")["detail"] == "3 pictures are waiting."
    assert answer.headers["retry-after"] == "5"


async def test_live_and_ready(client: httpx2.AsyncClient, waiting_for: list[str]) -> None:
    assert (await client.get("/health/ready")).json() == {"status": "ready"}
    waiting_for.append("the model is being loaded")
    answer = await client.get("/health/ready")
    assert check_problem(answer, 503, "unready")["detail"] == "the model is being loaded"
    assert answer.headers["retry-after"] == "2"
    assert (await client.get("/health/live")).json() == {"status": "live"}


async def test_metrics_count_by_route_and_status(client: httpx2.AsyncClient, waiting_for: list[str]) -> None:
    waiting_for.extend(["a", "b"])
    for body in ({"text": "a"}, {"text": "b"}, {"text": 1}):
        await client.post("/v1/echo", json=body)
    await client.get("/v1/some/unknown/path")
    await client.get("/v1/broken")
    text = (await client.get("/metrics")).text
    lines = set(text.splitlines())
    assert 'zimage_requests_total{method="POST",route="/v1/echo",service="echo",status="200"} 2.0' in lines
    assert 'zimage_requests_total{method="POST",route="/v1/echo",service="echo",status="422"} 1.0' in lines
    assert 'zimage_requests_total{method="GET",route="unmatched",service="echo",status="404"} 1.0' in lines
    assert 'zimage_requests_total{method="GET",route="/v1/broken",service="echo",status="500"} 1.0' in lines
    assert 'zimage_request_seconds_count{route="/v1/echo",service="echo"} 3.0' in lines
    assert 'zimage_test_waiting{service="echo"} 2.0' in lines
    assert "unknown" not in text


async def test_two_services_have_metrics_of_their_own() -> None:
    first, second = Metrics("one"), Metrics("two")
    first.observe_request("GET", "/", 200, 0.1)
    assert first.registry.get_sample_value("zimage_request_seconds_count", {"service": "one", "route": "/"}) == 1
    assert second.registry.get_sample_value("zimage_request_seconds_count", {"service": "one", "route": "/"}) is None


async def test_a_response_in_pieces(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/v1/chunks")
    assert answer.content == b"abcde"
    assert answer.headers["content-length"] == "5"
    assert answer.headers["x-pieces"] == "3"


async def test_openapi_is_served(client: httpx2.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert document["info"]["title"] == "Z-Image echo"
    assert {"/health/live", "/health/ready", "/metrics", "/v1/echo"} <= set(document["paths"])


async def test_other_protocols_pass_by() -> None:
    seen: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await RequestContext(inner, metrics=Metrics("m"), limits=BodyLimits(1))({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan"]


async def test_an_error_after_the_answer_began_closes_the_connection() -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    metrics = Metrics("m")
    with pytest.raises(ZeroDivisionError):
        await call(RequestContext(inner, metrics=metrics, limits=BodyLimits(1)), headers=[])
    sample = {"service": "m", "method": "POST", "route": "unmatched", "status": "200"}
    assert metrics.registry.get_sample_value("zimage_requests_total", sample) == 1


@pytest.mark.parametrize("path", ["/v1/raw", "/v1/echo"])
@pytest.mark.parametrize("end", ["cut off", "trickling"])
async def test_a_body_that_never_ends_is_given_up(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, path: str, end: str
) -> None:
    monkeypatch.setattr("shared.requests.BODY_TIMEOUT_S", 0.01)
    pieces = [{"type": "http.request", "body": b'{"text": ', "more_body": True}]
    sent: list[Any] = []

    async def receive() -> Any:
        if pieces:
            return pieces.pop()
        return {"type": "http.disconnect"} if end == "cut off" else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    with structlog.testing.capture_logs() as logs:
        await app(scope, receive, send)
    assert [message["status"] for message in sent if "status" in message] == [499]
    assert [entry["status"] for entry in logs if entry["event"] == "request"] == [499]
    assert not [entry for entry in logs if entry["log_level"] == "error"]


async def test_an_answer_may_take_longer_than_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.requests.BODY_TIMEOUT_S", 0.01)
    work = Work()

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        await request.body()
        answer = asyncio.create_task(until_disconnected(request, work()))
        await asyncio.sleep(0.05)
        work.release.set()
        assert await answer == "done"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = RequestContext(inner, metrics=Metrics("m"), limits=BodyLimits(10))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
        assert (await client.post("/", content=b"body")).status_code == 200


class Connection:
    """A client whose end of the connection the test holds."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    def request(self) -> Request:
        return Request({"type": "http", "headers": []}, self.receive)


class Work:
    """Something that takes until it is released, and remembers how it ended."""

    def __init__(self) -> None:
        self.begun, self.release, self.cancelled = asyncio.Event(), asyncio.Event(), False

    async def __call__(self) -> str:
        self.begun.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return "done"


async def test_work_is_awaited() -> None:
    connection, work = Connection(), Work()
    answer = asyncio.create_task(until_disconnected(connection.request(), work()))
    await work.begun.wait()
    work.release.set()
    assert await answer == "done"
    assert not work.cancelled


async def test_work_is_cancelled_when_the_client_goes() -> None:
    connection, work = Connection(), Work()
    answer = asyncio.create_task(until_disconnected(connection.request(), work()))
    await work.begun.wait()
    connection.gone.set()
    with pytest.raises(ClientGone):
        await answer
    assert work.cancelled
    assert len(asyncio.all_tasks()) == 1


async def test_work_is_cancelled_when_the_request_is() -> None:
    connection, work = Connection(), Work()
    answer = asyncio.create_task(until_disconnected(connection.request(), work()))
    await work.begun.wait()
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert work.cancelled
    assert len(asyncio.all_tasks()) == 1


async def test_an_error_of_the_work_comes_through() -> None:
    async def work() -> None:
        raise QueueFull("Full.")

    with pytest.raises(QueueFull):
        await until_disconnected(Connection().request(), work())
    assert len(asyncio.all_tasks()) == 1


async def test_a_body_that_is_still_coming_is_not_the_end() -> None:
    pieces = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.request", "body": b""}]
    work = Work()

    async def receive() -> Any:
        if pieces:
            return pieces.pop(0)
        work.release.set()
        return await asyncio.Event().wait()

    assert await until_disconnected(Request({"type": "http", "headers": []}, receive), work()) == "done"


async def test_a_client_that_goes_away_from_a_real_server_stops_the_work() -> None:
    work = Work()
    metrics = Metrics("m")
    recorded = asyncio.Event()

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                await until_disconnected(Request(scope, receive), work())
            finally:
                recorded.set()

    async with served(RequestContext(inner, metrics=metrics, limits=BodyLimits(1))) as url:
        port = int(url.rpartition(":")[2])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        async with asyncio.timeout(30):
            await work.begun.wait()
            writer.close()
            await recorded.wait()
    assert work.cancelled


@given(st.lists(st.sampled_from([0, 1, 7, 100]), min_size=1, max_size=6))
def test_pieces_of_any_size_have_one_length(sizes: list[int]) -> None:
    response = ChunkedResponse([b"x" * size for size in sizes], media_type="application/octet-stream")
    assert response.headers["content-length"] == str(sum(sizes))


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


async def test_a_request_is_logged_with_its_status(client: httpx2.AsyncClient) -> None:
    with structlog.testing.capture_logs() as logs:
        await client.get("/v1/full")
        for often_asked in ("/health/ready", "/metrics", "/v1/model"):
            await client.get(often_asked)
        await client.get("/v1/broken")
    requests = [(entry["path"], entry["status"]) for entry in logs if entry["event"] == "request"]
    assert requests == [("/v1/full", 429), ("/v1/broken", 500)]
    failures = [entry for entry in logs if entry["event"] == "a request failed unexpectedly"]
    assert len(failures) == 1
    assert failures[0]["exc_info"]
    assert json.dumps(requests)
