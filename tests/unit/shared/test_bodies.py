"""`shared.bodies`: what large bodies may take together, through the middleware that judges them."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx2
import pytest
import structlog
from fastapi import APIRouter, FastAPI, Request
from inprocess import bare_app, client_of, eventually
from starlette.datastructures import Headers

from shared.bodies import BodyLimits, HeldBodies
from shared.errors import BodyTooLarge

LIMITS = BodyLimits(usual=100, larger={"/pictures": 1000}, together=2500)


class Holding:
    """Keeps requests with their bodies until it is opened."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.inside = 0
        self.breaks = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def app_of(holding: Holding, limits: BodyLimits = LIMITS) -> FastAPI:
    router = APIRouter()

    @router.post("/pictures")
    @router.post("/texts")
    async def held(request: Request) -> int:
        body = await request.body()
        with holding.entered():
            await holding.gate.wait()
            if holding.breaks:
                raise ZeroDivisionError
        return len(body)

    return bare_app(router, max_body_bytes=limits)


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def holding() -> Holding:
    return Holding()


@pytest.fixture
def app(holding: Holding) -> FastAPI:
    return app_of(holding)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(app) as client:
        yield client


async def chunked(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 10):
        yield b"x" * 10


def refused(answer: httpx2.Response) -> None:
    assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) > 0
    assert "2500" in answer.json()["detail"]


async def test_large_bodies_have_a_sum(client: httpx2.AsyncClient, holding: Holding) -> None:
    works = [asyncio.create_task(client.post("/pictures", content=b"x" * 900)) for _ in range(2)]
    await eventually(lambda: holding.inside == 2)
    refused(await client.post("/pictures", content=b"x" * 900))
    refused(await client.post("/pictures", content=chunked(200)))  # of unknown length: as much as the path allows
    works += [asyncio.create_task(client.post("/pictures", content=b"x" * size)) for size in (700, 100, 100)]
    works += [asyncio.create_task(client.post("/texts", content=b"x" * 100)) for _ in range(20)]  # small ones have none
    await eventually(lambda: holding.inside == len(works))
    refused(await client.post("/pictures", content=b"x" * 101))
    holding.gate.set()
    assert [answer.json() for answer in await asyncio.gather(*works)] == [900, 900, 700, 100, 100, *[100] * 20]
    assert (await client.post("/pictures", content=chunked(1000))).json() == 1000


async def test_every_end_gives_the_room_back(client: httpx2.AsyncClient, holding: Holding) -> None:
    for _ in range(5):
        works = [asyncio.create_task(client.post("/pictures", content=b"x" * 1000)) for _ in range(2)]
        await eventually(lambda: holding.inside == 2)
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
    holding.gate.set()
    for _ in range(5):
        assert (await client.post("/pictures", content=b"x" * 1001)).status_code == 413
        assert (await client.post("/pictures", content=chunked(1100))).status_code == 413
    holding.breaks = True
    for _ in range(5):
        assert (await client.post("/pictures", content=b"x" * 1000)).status_code == 500
    holding.breaks = False
    answers = await asyncio.gather(*(client.post("/pictures", content=b"x" * 1000) for _ in range(2)))
    assert [answer.status_code for answer in answers] == [200, 200]


@pytest.fixture
def unbounded(holding: Holding) -> FastAPI:
    return app_of(holding, BodyLimits(100, {"/pictures": 1000}))


async def test_without_a_sum_there_is_none(unbounded: FastAPI, holding: Holding) -> None:
    async with client_of(unbounded) as client:
        works = [asyncio.create_task(client.post("/pictures", content=b"x" * 1000)) for _ in range(20)]
        await eventually(lambda: holding.inside == 20)
        holding.gate.set()
        assert {answer.status_code for answer in await asyncio.gather(*works)} == {200}


@pytest.fixture
def roomy(holding: Holding) -> FastAPI:
    return app_of(holding, BodyLimits(1 << 20))


async def test_a_json_body_has_few_names_and_texts(roomy: FastAPI, holding: Holding) -> None:
    holding.gate.set()
    fields = {str(number): 0 for number in range(24_999)}
    texts = {"prompt": '"' * 32_000, "system_prompt": "," * 32_000}
    async with client_of(roomy) as client:
        assert (await client.post("/texts", json={**fields, "1": 0})).status_code == 200
        assert (await client.post("/texts", json=texts)).status_code == 200
        for content in (json.dumps(fields | {"more": 0, "most": 0}).encode(), b'{"a' * 60_000):
            answer = await client.post("/texts", content=content, headers={"content-type": "application/json"})
            assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
            assert "25000 names and texts" in answer.json()["detail"]
        assert (await client.post("/texts", content=b'"' * 60_000)).status_code == 200, "what is no JSON has none"


@pytest.mark.parametrize("flood", [b"[],", b"1,", b"{}, "], ids=["lists", "numbers", "objects"])
async def test_a_json_body_has_few_values(roomy: FastAPI, holding: Holding, flood: bytes) -> None:
    """A list of two bytes costs the parser ninety in memory, and the event loop waits for it."""
    holding.gate.set()
    headers = {"content-type": "application/json"}
    async with client_of(roomy) as client:
        answer = await client.post(
            "/texts", content=b'{"prompt": [' + flood * 200_000 + b"1," * 100_000, headers=headers
        )
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert "300000 commas and brackets" in answer.json()["detail"]
        long_texts = {str(number): ",[{" * 10_000 for number in range(9)}
        assert (await client.post("/texts", json=long_texts)).status_code == 200


@pytest.mark.parametrize(
    ("length", "status"),
    [("0" * 5000, 200), ("0" * 30 + "5", 200), ("0" * 20 + "999999999", 413), ("9" * 5000, 413), ("\u0665", 413)],
)
def test_a_length_is_a_number_however_it_is_written(length: str, status: int) -> None:
    """Python reads no more than 4,300 digits, and zeros in front are not a number's size."""
    held = HeldBodies(LIMITS)
    headers = Headers(raw=[(b"content-length", length.encode("utf-8"))])
    if status == 200:
        with held.place("/texts", headers):
            return
    with pytest.raises(BodyTooLarge), held.place("/texts", headers):
        pass
