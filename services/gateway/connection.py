"""The connection to Redis: how long it may take, and what is told when Redis is away. Knows nothing of what is kept."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.errors import Unreachable

CONNECT_TIMEOUT_S = 1.0
ANSWER_TIMEOUT_S = 5.0
AWAY = (RedisConnectionError, RedisTimeoutError, OSError)
"""What calls raise while Redis cannot be reached."""


def connect(url: str) -> Redis:
    """A pool of connections, none of which is open yet."""
    return Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=ANSWER_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        max_connections=64,
    )


@asynccontextmanager
async def told(detail: str) -> AsyncIterator[None]:
    """Tells a client in this sentence that Redis cannot be reached, without the text of a library."""
    try:
        yield
    except (*AWAY, RedisError):
        raise Unreachable(detail, retry_after_s=2) from None
