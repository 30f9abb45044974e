"""A cache of embeddings in Redis: within a size and a time, least recently used out first.

That of reference pictures and that of prompts have keys and bounds of their own, apart from history's: filling one
never drops a picture. Every gateway reads what any of them wrote. An entry is a service's answer as it came.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

import structlog
from redis.exceptions import RedisError

from services.gateway.connection import MakeRoom, connect, told, with_room
from shared.errors import StorageFailed, UnknownName, Unreachable, UpstreamTimeout

PICTURES, PROMPTS = "{zimage}:vl:", "{zimage}:text:"  # the braces keep the keys together on a Redis cluster
LOCK_BYTES = 4096  # what a lock may take of a Redis that is full
LOCK_S = 15.0  # after it work whose gateway is gone may be begun anew
RENEW_S = 5.0
POLL_S = 0.05
PATIENCE_S = 1.0  # for a cache that is not needed; one that takes longer is not asked for a while
SPARED_S = 5.0

T = TypeVar("T")
log = structlog.get_logger(__name__)

# KEYS[1] is the prefix of every key. index: sorted set of ids, scored by their last use in microseconds; sizes: hash of
# an entry's bytes; bytes: their sum; entry:<id>: the message.
_COMMON = """
local p = KEYS[1]
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function drop(id)
  local size = redis.call('HGET', p..'sizes', id)
  redis.call('UNLINK', p..'entry:'..id)
  redis.call('ZREM', p..'index', id)
  redis.call('HDEL', p..'sizes', id)
  if size then redis.call('DECRBY', p..'bytes', size) end
end
local function sweep(ttl_ms)
  for _, id in ipairs(redis.call('ZRANGE', p..'index', '-inf', now - ttl_ms * 1000, 'BYSCORE')) do drop(id) end
end
"""
_PUT = """
local id, message, ttl_ms, most = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
redis.call('INCRBY', p..'bytes', 0) -- refused while Redis is full, which it asks of a script's first write only
drop(id)
sweep(ttl_ms)
if #message > most then return 0 end
while tonumber(redis.call('GET', p..'bytes') or 0) + #message > most do
  drop(redis.call('ZRANGE', p..'index', 0, 0)[1])
end
redis.call('SET', p..'entry:'..id, message, 'PX', ttl_ms)
redis.call('HSET', p..'sizes', id, #message)
redis.call('INCRBY', p..'bytes', #message)
redis.call('ZADD', p..'index', now, id)
return 1
"""
_GET = """
local id, ttl_ms = ARGV[1], tonumber(ARGV[2])
local message = redis.call('GET', p..'entry:'..id)
if not message then drop(id) return nil end
redis.call('PEXPIRE', p..'entry:'..id, ttl_ms)
redis.call('ZADD', p..'index', now, id)
return message
"""
_LIST = """
sweep(tonumber(ARGV[1]))
local ids = {}
for _, id in ipairs(redis.call('ZRANGE', p..'index', 0, -1, 'REV')) do
  if redis.call('EXISTS', p..'entry:'..id) == 1 then table.insert(ids, id) else drop(id) end
end
return ids
"""
_DROP_OLDEST = """
local wanted, dropped = tonumber(ARGV[1]), 0
while wanted > 0 do
  local id = redis.call('ZRANGE', p..'index', 0, 0)[1]
  if not id then break end
  wanted = wanted - (redis.call('HGET', p..'sizes', id) or 0)
  drop(id)
  dropped = dropped + 1
end
return dropped
"""
_DELETE = """
local there = redis.call('EXISTS', p..'entry:'..ARGV[1])
drop(ARGV[1])
return there
"""
_CLEAR = """
local count = 0
for _, id in ipairs(redis.call('ZRANGE', p..'index', 0, -1)) do
  count = count + redis.call('EXISTS', p..'entry:'..id)
  drop(id)
end
return count
"""


@dataclass(frozen=True, slots=True)
class Kept:
    """Embeddings under their id."""

    embeddings_id: str
    message: bytes


class EmbeddingCache:
    """Embeddings by their ids."""

    def __init__(
        self, url: str, *, max_bytes: int, ttl_s: float, prefix: str = PICTURES, make_room: MakeRoom | None = None
    ) -> None:
        """`make_room` drops what may go once all of this cache has gone and Redis is still full."""
        self._redis = connect(url)
        self._prefix = prefix
        self._spared_until = 0.0
        self._max_bytes = max_bytes
        self._further_room = make_room
        self._ttl_ms = max(1, int(ttl_s * 1000))
        self._put, self._get, self._list, self._drop_oldest, self._delete, self._clear = (
            self._redis.register_script(_COMMON + text) for text in (_PUT, _GET, _LIST, _DROP_OLDEST, _DELETE, _CLEAR)
        )

    async def __aenter__(self) -> Self:
        """Nothing to do: connections are opened when they are needed."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes every connection."""
        await self._redis.aclose()

    async def find_or_make(
        self, embeddings_id: str, make: Callable[[], Awaitable[Kept]], *, timeout_s: float, must_keep: bool
    ) -> Kept:
        """What is kept, else what `make` gives, which is then kept under the id that it has.

        Of several who want the same one makes it and the others wait, for `timeout_s` seconds at most. Without
        `must_keep` all this does without a Redis that is away. Raises what `make` does, UpstreamTimeout, and with
        `must_keep` Unreachable, and StorageFailed for what is larger than the whole cache.
        """
        get = partial(self.get, embeddings_id)
        async with AsyncExitStack() as stack:
            message = await self._tried(get, must=must_keep)
            if message is None:
                alone = self.alone(embeddings_id, timeout_s=timeout_s)
                await self._tried(partial(stack.enter_async_context, alone), must=must_keep, wait_s=timeout_s)
                message = await self._tried(get, must=must_keep)
            if message is not None:
                return Kept(embeddings_id, message)
            made = await make()
            kept = await self._tried(partial(self.put, made.embeddings_id, made.message), must=must_keep)
        if must_keep and not kept:
            raise StorageFailed(
                f"The embeddings take {len(made.message)} bytes and the cache of this server holds {self._max_bytes}: "
                "give a smaller picture, or the server a larger vl.cache_bytes."
            )
        return made

    async def get(self, embeddings_id: str) -> bytes | None:
        """The message, which counts as used now; None where there is none. Raises Unreachable."""
        async with _told():
            found: Any = await self._get(keys=[self._prefix], args=[embeddings_id, self._ttl_ms])
        return None if found is None else bytes(found)

    async def put(self, embeddings_id: str, message: bytes) -> bool:
        """Keeps the message, and drops what was not used for longest until there is room; answers whether it is kept,
        which one that is larger than the whole cache is not. Raises Unreachable."""
        arguments: list[str | bytes | int] = [embeddings_id, message, self._ttl_ms, self._max_bytes]
        async with _told():
            kept = await with_room(lambda: self._put(keys=[self._prefix], args=arguments), self._room, len(message))
        if not kept:
            log.warning("embeddings are larger than the whole cache", id=embeddings_id, bytes=len(message))
        return bool(kept)

    async def make_room(self, wanted: int) -> bool:
        """Drops what was not used for longest, `wanted` bytes of it, while Redis is full; answers whether there was
        any. Raises RedisError."""
        dropped = int(await self._drop_oldest(keys=[self._prefix], args=[wanted]))
        if dropped:
            log.warning("Redis is full: embeddings were dropped", entries=dropped)
        return dropped > 0

    async def _room(self, wanted: int) -> bool:
        further = self._further_room
        return await self.make_room(wanted) or (further is not None and await further(wanted))

    async def ids(self) -> list[str]:
        """The ids that are kept, those used last first. Raises Unreachable."""
        async with _told():
            return [item.decode() for item in await self._list(keys=[self._prefix], args=[self._ttl_ms])]

    async def delete(self, embeddings_id: str) -> None:
        """Raises UnknownName where there is none of that id, and Unreachable."""
        async with _told():
            there = await self._delete(keys=[self._prefix], args=[embeddings_id])
        if not there:
            raise UnknownName("There are no embeddings of that id; GET /api/vl/status lists those that are kept.")

    async def clear(self) -> int:
        """Removes all and answers how many there were. Raises Unreachable."""
        async with _told():
            return int(await self._clear(keys=[self._prefix], args=[]))

    @asynccontextmanager
    async def alone(self, embeddings_id: str, *, timeout_s: float) -> AsyncIterator[None]:
        """Within it nobody else, through whichever gateway, is within it for the same id of this cache.

        Raises UpstreamTimeout where another needs longer than `timeout_s` seconds, and Unreachable.
        """
        lock = self._redis.lock(f"{self._prefix}lock:{embeddings_id}", timeout=LOCK_S, sleep=POLL_S)
        async with _told():
            if not await with_room(lambda: lock.acquire(blocking_timeout=timeout_s), self._room, LOCK_BYTES):
                raise UpstreamTimeout(f"The same embeddings, asked for before, were not made within {timeout_s:g} s.")

        async def renew() -> None:
            while True:
                await asyncio.sleep(RENEW_S)
                with suppress(RedisError, OSError):
                    await lock.reacquire()

        renewing = asyncio.create_task(renew(), name="lock")
        try:
            yield
        finally:
            renewing.cancel()
            with suppress(RedisError, OSError):  # it then ends by itself
                await lock.release()

    async def _tried(self, call: Callable[[], Awaitable[T]], *, must: bool, wait_s: float = 0.0) -> T | None:
        """What Redis answers; None while it is away, unless it `must` be there. Raises Unreachable.

        One that must not be there is given `PATIENCE_S` (beyond a wait for others), and then left alone for a while.
        """
        if must:
            return await call()
        if time.monotonic() < self._spared_until:
            return None
        with suppress(Unreachable, TimeoutError):
            async with asyncio.timeout(wait_s + PATIENCE_S):
                return await call()
        self._spared_until = time.monotonic() + SPARED_S
        return None


def _told() -> AbstractAsyncContextManager[None]:
    return told("The cache of embeddings cannot be reached.")
