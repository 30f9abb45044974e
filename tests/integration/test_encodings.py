"""Encoded prompts that are kept in a real Redis: what needs no encoder, what is encoded once, and Redis away."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from embedded_redis import EmbeddedRedis, embedded_redis
from inprocess import eventually, node_of, started

from services.encoder.app import create_app
from services.encoder.model import TextEncoder
from services.encoder.settings import EncoderSettings
from services.gateway.clients import EncoderClient
from services.gateway.connection import connect
from services.gateway.embeddings import PICTURES, PROMPTS, EmbeddingCache
from services.gateway.encodings import CachingEncoder, key_of
from services.gateway.store import Bounds, History
from shared.client import ServiceClient
from shared.errors import ServiceError, Unreachable, UpstreamTimeout

pytestmark = pytest.mark.slow
ENCODE = "/v1/hidden_states"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with embedded_redis(tmp_path_factory.mktemp("redis") / uuid.uuid4().hex[:4]) as running:
        yield running


class Encodes(httpx2.AsyncBaseTransport):
    """Passes calls on and counts the encodes; they wait while the gate is closed, and their ends while the exit is."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self.inner, self.count, self.ended = inner, 0, 0
        self.gate, self.exit = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.exit.set()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """One call."""
        if request.url.path == ENCODE:
            self.count += 1
            try:
                await self.gate.wait()
            finally:
                await self.exit.wait()
                self.ended += 1
        response = await self.inner.handle_async_request(request)
        content = b"".join([piece async for piece in response.aiter_raw()])
        return httpx2.Response(response.status_code, headers=response.headers, stream=httpx2.ByteStream(content))


@pytest.fixture
async def encodes(text_encoder: TextEncoder) -> AsyncIterator[Encodes]:
    app = await asyncio.to_thread(create_app, EncoderSettings(), model=text_encoder)
    async with started(app) as running:
        yield Encodes(httpx2.ASGITransport(running))


@asynccontextmanager
async def gateway(encodes: Encodes, redis: EmbeddedRedis, *, max_bytes: int = 1 << 20) -> AsyncIterator[CachingEncoder]:
    """The encoder as one gateway has it."""
    service = ServiceClient("encoder", "http://encoder", max_reply_bytes=1 << 24, transport=encodes)
    cache = EmbeddingCache(redis.url, max_bytes=max_bytes, ttl_s=60, prefix=PROMPTS)
    nodes = node_of(service)
    with structlog.testing.capture_logs():
        async with nodes, CachingEncoder(EncoderClient(nodes), cache) as encoder:
            await eventually(lambda: nodes.model)
            yield encoder


def text() -> str:
    """One that was not encoded before."""
    return f"a cat {uuid.uuid4().hex}"


async def encode(encoder: CachingEncoder, *texts: str, layer: int = -2, timeout_s: float = 30) -> list[bytes]:
    encoding = await encoder.encode(texts, layer=layer, timeout_s=timeout_s)
    return [bytes(item.data) for item in encoding.items]


async def kept(encoder: CachingEncoder) -> None:
    """Everything is kept that was encoded."""
    await eventually(lambda: not encoder._keeping)


async def test_a_prompt_that_comes_again_needs_no_encoder(encodes: Encodes, redis: EmbeddedRedis) -> None:
    one, other = text(), text()
    async with gateway(encodes, redis) as first:
        before = await encode(first, one, other)
        await kept(first)
        assert encodes.count == 2
        assert await encode(first, one) == before[:1]
    async with gateway(encodes, redis) as second:
        assert await encode(second, other, one) == before[::-1]
        assert encodes.count == 2
        assert await encode(second, one, layer=-1) != before[:1]
        assert encodes.count == 3


async def test_what_is_kept_is_the_encoders_answer(encodes: Encodes, redis: EmbeddedRedis) -> None:
    one = text()
    async with gateway(encodes, redis) as encoder:
        await encode(encoder, one)
        await kept(encoder)
        message = await encoder._encoder.encode_message([one], layer=-2, timeout_s=30)
        assert encoder.nodes.model == message.fingerprint
        assert await encoder._cache.get(key_of(message.fingerprint, -2, one)) == message.body


async def test_equal_prompts_that_come_together_are_encoded_once(encodes: Encodes, redis: EmbeddedRedis) -> None:
    one = text()
    async with gateway(encodes, redis) as first, gateway(encodes, redis) as second:
        encodes.gate.clear()
        asked = [asyncio.create_task(encode(encoder, one)) for encoder in (first, second) * 8]
        await eventually(lambda: encodes.count)
        encodes.gate.set()
        answers = await asyncio.gather(*asked)
        assert encodes.count == 1
        assert all(answer == answers[0] for answer in answers)


async def test_who_goes_away_takes_it_from_nobody(encodes: Encodes, redis: EmbeddedRedis) -> None:
    one = text()
    async with gateway(encodes, redis) as encoder:
        encodes.gate.clear()
        first, second = (asyncio.create_task(encode(encoder, one)) for _ in range(2))
        await eventually(lambda: encodes.count)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert encodes.ended == 0
        encodes.gate.set()
        assert await second
        assert encodes.count == 1


async def test_what_nobody_wants_any_more_is_given_up(encodes: Encodes, redis: EmbeddedRedis) -> None:
    one = text()
    async with gateway(encodes, redis) as encoder:
        encodes.gate.clear()
        with pytest.raises(UpstreamTimeout):
            await encode(encoder, one, timeout_s=1.0)
        await eventually(lambda: encodes.ended == encodes.count == 1)
        encodes.gate.set()
        assert await encode(encoder, one)
        assert encodes.count == 2


async def test_one_that_was_given_up_takes_no_other_with_it(encodes: Encodes, redis: EmbeddedRedis) -> None:
    """Its end comes after the next one of the same text has begun, which others must still be able to join."""
    one = text()
    async with gateway(encodes, redis) as encoder:
        with redis.gone():  # which would else let only one encode a text
            encodes.gate.clear()
            first = asyncio.create_task(encode(encoder, one))
            await eventually(lambda: encodes.count == 1)
            encodes.exit.clear()
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            second = asyncio.create_task(encode(encoder, one))
            await eventually(lambda: encoder._flights)
            encodes.exit.set()
            await eventually(lambda: encodes.ended == 1)
            await eventually(lambda: encodes.count == 2)
            third = asyncio.create_task(encode(encoder, one))
            await asyncio.sleep(0.1)
            encodes.gate.set()
            assert await second == await third
            assert encodes.count == 2


async def test_a_call_waits_for_one_of_the_connections(redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them in use is not Redis away."""
    monkeypatch.setattr("services.gateway.connection.MAX_CONNECTIONS", 2)
    async with connect(redis.url) as client:
        slow = [asyncio.create_task(client.execute_command("BLPOP", uuid.uuid4().hex, 0.3)) for _ in range(4)]  # type: ignore[no-untyped-call]
        await asyncio.gather(*slow, *(client.set(text(), b"1") for _ in range(20)))


async def test_an_error_is_everybodys_and_is_not_kept(encodes: Encodes, redis: EmbeddedRedis) -> None:
    one = text()
    async with gateway(encodes, redis) as encoder:
        refused = await asyncio.gather(*(encode(encoder, one, layer=-99) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(error, ServiceError) and "hidden_layer" in error.detail for error in refused)
        assert await encode(encoder, one)


async def test_what_is_broken_in_the_cache_is_encoded_again(encodes: Encodes, redis: EmbeddedRedis) -> None:
    one = text()
    async with gateway(encodes, redis) as encoder:
        await encoder._cache.put(key_of(str(encoder.nodes.model), -2, one), b"garbage")
        assert await encode(encoder, one)
        assert encodes.count == 1


async def test_without_redis_there_is_no_cache(encodes: Encodes, redis: EmbeddedRedis, tmp_path: Path) -> None:
    one = text()
    async with gateway(encodes, redis) as encoder:
        with redis.gone():
            before = await encode(encoder, one)
            assert await encode(encoder, one) == before
            assert encodes.count == 2
            encodes.gate.clear()
            asked = [asyncio.create_task(encode(encoder, one)) for _ in range(8)]
            await eventually(lambda: encodes.count > 2)
            encodes.gate.set()
            await asyncio.gather(*asked)
            assert encodes.count == 3
        with redis.hanging():
            assert await encode(encoder, one) == before


async def test_it_is_bounded_and_takes_nothing_from_others(encodes: Encodes, redis: EmbeddedRedis) -> None:
    async with (
        gateway(encodes, redis, max_bytes=64 << 10) as encoder,
        EmbeddingCache(redis.url, max_bytes=1 << 20, ttl_s=60, prefix=PICTURES) as pictures,
        History(redis.url, Bounds(10, 1 << 20)) as history,
    ):
        await history.add({"prompt": "x"}, b"png", b"jpeg")
        await pictures.put("vl_1", b"a reference")
        for _ in range(30):
            await encode(encoder, text())
        await kept(encoder)
        there: Any = await encoder._cache._redis.get(f"{PROMPTS}bytes")
        assert 0 < int(there) <= 64 << 10
        assert len(await encoder._cache.ids()) < 30
        assert await pictures.get("vl_1") == b"a reference"
        assert await history.count() == 1


async def test_references_still_need_redis_where_they_must_be_kept(redis: EmbeddedRedis) -> None:
    async def make() -> Any:
        raise AssertionError

    async with EmbeddingCache(redis.url, max_bytes=1 << 20, ttl_s=60) as cache:
        with redis.gone(), pytest.raises(Unreachable):
            await cache.find_or_make("vl_2", make, timeout_s=5, must_keep=True)
