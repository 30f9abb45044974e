"""The cache of embeddings in a real Redis: bounds, ids, and what it leaves to history."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from embedded_redis import EmbeddedRedis, embedded_redis

from services.gateway.embeddings import PROMPTS, EmbeddingCache, Kept
from services.gateway.store import Bounds, History
from shared.errors import StorageFailed, UnknownName, Unreachable, UpstreamTimeout

pytestmark = pytest.mark.slow
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with embedded_redis(tmp_path_factory.mktemp("redis") / uuid.uuid4().hex[:4]) as running:
        yield running


def cache_of(redis: EmbeddedRedis, *, max_bytes: int = 10 * KIB, ttl_s: float = 60.0) -> EmbeddingCache:
    return EmbeddingCache(redis.url, max_bytes=max_bytes, ttl_s=ttl_s)


@pytest.fixture
async def cache(redis: EmbeddedRedis) -> AsyncIterator[EmbeddingCache]:
    async with cache_of(redis) as cache:
        await cache.clear()
        yield cache


async def test_what_was_put_is_there_for_every_gateway(cache: EmbeddingCache, redis: EmbeddedRedis) -> None:
    assert await cache.get("a") is None
    await cache.put("a", b"\0\xff" * 10)
    async with cache_of(redis) as other:
        assert await other.get("a") == b"\0\xff" * 10
        assert await other.ids() == ["a"]
        await other.delete("a")
    assert await cache.get("a") is None
    with pytest.raises(UnknownName):
        await cache.delete("a")


async def test_what_was_not_used_for_longest_goes_first(cache: EmbeddingCache) -> None:
    for name in "abcd":
        await cache.put(name, name.encode() * 2 * KIB)
    assert await cache.get("a") is not None
    await cache.put("e", b"e" * 4 * KIB)
    assert await cache.ids() == ["e", "a", "d", "c"]
    await cache.put("c", b"c" * KIB)  # in its own place, and smaller
    assert await cache.ids() == ["c", "e", "a", "d"]
    await cache.put("f", b"f" * 10 * KIB)
    assert await cache.ids() == ["f"]
    await cache.put("g", b"g" * 11 * KIB)
    assert await cache.ids() == ["f"]
    assert await cache.clear() == 1
    assert await cache.clear() == 0


async def test_what_was_not_used_for_long_goes(redis: EmbeddedRedis) -> None:
    async with cache_of(redis, ttl_s=0.3) as cache:
        await cache.clear()
        await cache.put("a", b"a" * KIB)
        await asyncio.sleep(0.5)
        assert await cache.get("a") is None
        await cache.put("b", b"b" * KIB)
        await asyncio.sleep(0.5)
        assert await cache.ids() == []


async def test_the_size_is_right_after_everything(cache: EmbeddingCache, redis: EmbeddedRedis) -> None:
    for index in range(60):
        await cache.put(f"x{index % 7}", bytes(index * 37 % 5000))
    kept = {name: len(await cache.get(name) or b"") for name in await cache.ids()}
    assert int(await cache._redis.get("{zimage}:vl:bytes") or 0) == sum(kept.values()) <= 10 * KIB
    await cache.clear()
    assert int(await cache._redis.get("{zimage}:vl:bytes") or 0) == 0


async def test_history_is_not_touched(cache: EmbeddingCache, redis: EmbeddedRedis) -> None:
    async with History(redis.url, Bounds(3, 1 << 20)) as history:
        await history.add({"prompt": "x"}, b"png", b"jpeg")
        for index in range(50):
            await cache.put(str(index), bytes(5 * KIB))
        await cache.clear()
        assert await history.count() == 1
        await history.clear()


async def test_it_outlives_redis(cache: EmbeddingCache, redis: EmbeddedRedis) -> None:
    await cache.put("a", b"kept")
    with redis.gone():
        with pytest.raises(Unreachable):
            await cache.get("a")
        with pytest.raises(Unreachable):
            await cache.put("b", b"x")
    assert await cache.get("a") == b"kept"


async def test_one_at_a_time(cache: EmbeddingCache, redis: EmbeddedRedis) -> None:
    inside = most = 0

    async def work(cache: EmbeddingCache) -> None:
        nonlocal inside, most
        async with cache.alone("a", timeout_s=20):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.01)
            inside -= 1

    async with cache_of(redis) as other:
        await asyncio.gather(*(work(one) for one in (cache, other, cache, other)))
        assert most == 1
        async with cache.alone("a", timeout_s=20):
            with pytest.raises(UpstreamTimeout):
                async with other.alone("a", timeout_s=0.2):
                    pass
            async with other.alone("b", timeout_s=20):
                pass


@asynccontextmanager
async def full(cache: EmbeddingCache, spare: int = 0) -> AsyncIterator[None]:
    """Redis may have no more memory than it has now."""
    used = (await cache._redis.info("memory"))["used_memory"]
    await cache._redis.config_set("maxmemory", used + spare)
    try:
        yield
    finally:
        await cache._redis.config_set("maxmemory", 0)


async def test_history_finds_room_where_embeddings_were(redis: EmbeddedRedis) -> None:
    async with cache_of(redis, max_bytes=100 * MIB) as cache:
        history = History(redis.url, Bounds(100, 1 << 30), make_room=cache.make_room)
        async with history:
            await history.add({"prompt": "first"}, bytes(MIB), b"jpeg")
            for name in "abcdefghijkl":
                await cache.put(name, bytes(MIB))
            async with full(cache):
                assert await history.add({"prompt": "second"}, bytes(2 * MIB), b"jpeg") is not None
                kept = await cache.ids()
                assert kept == list("lkjihgfedcba")[: len(kept)]
                assert 0 < len(kept) < 12
                await cache.put("m", bytes(MIB))  # in the place of others
                assert (await cache.ids())[0] == "m"
                assert await history.count() == 2
                for number in range(20):
                    if await history.add({"prompt": str(number)}, bytes(2 * MIB), b"jpeg") is None:
                        break
                assert await cache.ids() == []
                assert await history.count() == 2 + number
                with pytest.raises(Unreachable, match="full"):
                    await cache.put("n", bytes(4 * MIB))  # more than may be left where 2 had no room
                assert [entry["prompt"] async for entry, _ in history.entries()][:2] == ["first", "second"]
                assert await history.clear() == 2 + number  # which makes room again
                assert await history.add({"prompt": "third"}, bytes(MIB), b"jpeg") is not None
            assert await history.clear() == 1


async def test_a_full_redis_makes_room_for_the_lock(cache: EmbeddingCache) -> None:
    async def make() -> Kept:
        return Kept("c", b"c" * KIB)

    for name in "ab":
        await cache.put(name, name.encode() * 4 * KIB)
    async with full(cache, spare=-(1 << 10)):
        made = await cache.find_or_make("c", make, timeout_s=5, must_keep=True)
        assert made.message == await cache.get("c")


async def test_a_full_redis_drops_prompts_for_references_but_no_history(redis: EmbeddedRedis) -> None:
    async with (
        EmbeddingCache(redis.url, max_bytes=100 * MIB, ttl_s=60.0, prefix=PROMPTS) as prompts,
        EmbeddingCache(redis.url, max_bytes=100 * MIB, ttl_s=60.0, make_room=prompts.make_room) as pictures,
        History(redis.url, Bounds(100, 1 << 30)) as history,
    ):
        await pictures.clear()
        await history.add({"prompt": "first"}, bytes(MIB), b"jpeg")
        for name in "abcdef":
            await prompts.put(name, bytes(MIB))
        async with full(pictures):

            async def make() -> Kept:
                return Kept("r", bytes(MIB))

            await pictures.find_or_make("r", make, timeout_s=5, must_keep=True)
            assert await pictures.ids() == ["r"]
            assert len(await prompts.ids()) < 6
            assert await history.count() == 1
        await prompts.clear()
        await history.clear()


async def test_what_is_larger_than_the_cache_is_not_said_to_be_kept(cache: EmbeddingCache) -> None:
    async def make() -> Kept:
        return Kept("a", bytes(11 * KIB))

    with pytest.raises(StorageFailed, match=r"vl\.cache_bytes"):
        await cache.find_or_make("a", make, timeout_s=5, must_keep=True)
    assert (await cache.find_or_make("a", make, timeout_s=5, must_keep=False)).message == bytes(11 * KIB)


async def test_embeddings_can_be_used_while_redis_is_full(cache: EmbeddingCache) -> None:
    await cache.put("a", b"a" * KIB)
    await cache.put("b", b"b" * KIB)
    async with full(cache, spare=-(1 << 16)):
        assert await cache.get("a") == b"a" * KIB
        assert await cache.ids() == ["a", "b"]
        await cache.delete("a")
        assert await cache.clear() == 1
