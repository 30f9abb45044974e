"""The connection to Redis: how long it may take, and what is told when Redis is away. Knows nothing of what is kept."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.errors import Unreachable

CONNECT_TIMEOUT_S = 1.0
ANSWER_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 64
AWAY = (RedisConnectionError, RedisTimeoutError, OSError)
"""What calls raise while Redis cannot be reached."""

T = TypeVar("T")


def connect(url: str) -> Redis:
    """A pool of connections, none of which is open yet; while all of them are used a call waits for one."""
    pool = BlockingConnectionPool.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=ANSWER_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        max_connections=MAX_CONNECTIONS,
        timeout=ANSWER_TIMEOUT_S,
    )
    return Redis.from_pool(pool)


class MakeRoom(Protocol):
    """Drops what Redis can do without."""

    async def __call__(self, wanted: int, /) -> bool:
        """Drops so many bytes, if there are; answers whether anything was dropped. Raises RedisError."""


async def with_room(call: Callable[[], Awaitable[T]], make_room: MakeRoom, size: int) -> T:
    """What the call answers that writes `size` bytes, tried again for as long as Redis is full and room can be made.

    Raises RedisError, of which OutOfMemoryError is one: then there is nothing left that could be dropped.
    """
    while True:
        try:
            return await call()
        except OutOfMemoryError:
            if not await make_room(size):
                raise


@asynccontextmanager
async def told(detail: str) -> AsyncIterator[None]:
    """Tells a client in this sentence that Redis cannot be reached, without the text of a library."""
    try:
        yield
    except OutOfMemoryError:
        raise Unreachable("Redis is full: it takes nothing more until it is given more memory.") from None
    except (*AWAY, RedisError):
        raise Unreachable(detail, retry_after_s=2) from None
