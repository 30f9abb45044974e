"""History in Redis: entries, pictures and thumbnails apart from one another, changed by atomic scripts only.

An entry's id is drawn from a counter that nothing resets, so no id is ever used twice. The index of an entry is its
place among those that are left, oldest first: it moves when an older one goes, and in a full history one goes with each
that is added.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import structlog
from redis.exceptions import OutOfMemoryError, RedisError

from services.gateway.connection import ANSWER_TIMEOUT_S, AWAY, MakeRoom, connect, told, with_room
from services.gateway.scripts import ADD, CLEAR, DELETE
from shared.errors import QueueFull, UnknownName

PREFIX = "{zimage}:history:"  # the braces keep the keys together on a Redis cluster
PING_INTERVAL_S = 0.5
ADD_WINDOW_S = 6.0  # how long writing is tried again once Redis went away: longer than its supervisor needs
ADD_PAUSE_S = 0.2
READ_AT_ONCE = {"none": 64, "thumb": 16, "full": 1}
"""Entries by what comes with each: whole pictures take megabytes, of which a slow Redis sends few in time."""
MAX_READERS = 16
"""Listings with whole pictures at the same time, each of which holds one for as long as its client takes."""
READERS_RETRY_S = 2
MAX_INDEX = 2**53  # beyond any entry, and a whole number to Redis, Lua and JSON alike

Row = tuple[dict[str, Any], bytes | None]
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much history is kept; the oldest goes first. At least one entry always stays."""

    max_entries: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Deleted:
    """What `delete` removed, and how many entries are left."""

    entry: dict[str, Any]
    remaining: int


class History:
    """Pictures that were made, newest last, with what made them."""

    def __init__(self, url: str, bounds: Bounds, *, make_room: MakeRoom | None = None) -> None:
        """`make_room` drops what may go before history does, when Redis is full."""
        self._bounds = bounds
        self._make_room = make_room or _nothing_to_drop
        self._redis = connect(url)
        self._add, self._delete, self._clear = (self._redis.register_script(text) for text in (ADD, DELETE, CLEAR))
        self._away_since: float | None = None
        self._closing = False
        self._readers = 0

    async def __aenter__(self) -> Self:
        """Starts to watch whether Redis is there."""
        self._watching = asyncio.create_task(self._watch(), name="history")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes every connection."""
        self._closing = True  # as a client that is just connecting may let a cancellation go by
        self._watching.cancel()
        await asyncio.wait([self._watching])
        await self._redis.aclose()

    @property
    def is_here(self) -> bool:
        """Whether Redis answered when it was last asked."""
        return self._away_since is None

    async def add(self, entry: Mapping[str, Any], png: bytes, thumbnail: bytes) -> int | None:
        """Keeps a picture and answers its id once Redis has it on disk; None when Redis is away for longer, or full.

        An answer that got lost is asked for again under the same token, so that a picture is kept exactly once.
        """
        away_s = 0.0 if self._away_since is None else time.monotonic() - self._away_since
        if away_s > ADD_WINDOW_S:
            return None
        token = secrets.token_hex(16)
        arguments = [json.dumps(entry), png, thumbnail, token, self._bounds.max_entries, self._bounds.max_bytes]
        try:
            async with asyncio.timeout(ADD_WINDOW_S - away_s):
                return await self._add_until_answered(arguments)
        except TimeoutError:
            log.warning("a picture could not be kept: Redis is away")
        except OutOfMemoryError:
            log.error("a picture could not be kept: Redis is full")  # noqa: TRY400 - known and told
        except RedisError as error:
            log.error("history could not be written", reason=type(error).__name__)  # noqa: TRY400 - known and told
        return None

    async def count(self) -> int:
        """How many entries there are. Raises Unreachable."""
        async with _told():
            return int(await self._redis.zcard(f"{PREFIX}index"))

    async def entries(self, *, offset: int = 0, limit: int | None = None, images: str = "none") -> AsyncGenerator[Row]:
        """Entries from `offset` on, oldest first; `images` "full" or "thumb" adds those bytes to each.

        Yields (entry, bytes or None), read a few at a time, so that a long history needs little memory. Raises
        Unreachable, and QueueFull while too many others read whole pictures.
        """
        last = -1 if limit is None else offset + limit - 1
        if limit == 0:
            return
        with self._reader(images):
            async with _told():
                ids = [int(item) for item in await self._redis.zrange(f"{PREFIX}index", offset, last)]  # type: ignore[arg-type]
            count = READ_AT_ONCE[images]
            for start in range(0, len(ids), count):
                for pair in await self._read(ids[start : start + count], images):
                    yield pair

    async def image(self, entry_id: int) -> bytes:
        """The PNG of an entry. Raises UnknownName, Unreachable."""
        async with _told():
            png: Any = await self._redis.get(f"{PREFIX}image:{entry_id}")
        if png is None:
            raise UnknownName("There is no picture with that id in the history.")
        return bytes(png)

    async def delete(self, index: int, entry_id: int | None = None) -> Deleted:
        """Removes the entry at that place, if it has that id. Raises UnknownName, Unreachable."""
        found = None
        if 0 <= index <= MAX_INDEX:  # Redis would count negative ones from the end
            async with _told():
                found = await self._delete(keys=[PREFIX], args=[index, "" if entry_id is None else entry_id])
        if found is None:
            raise UnknownName(
                "There is no history entry with that index." if entry_id is None else "That id is not at that index."
            )
        entry_id, text, remaining = found
        return Deleted({"id": int(entry_id), **json.loads(text)}, int(remaining))

    async def clear(self) -> int:
        """Removes every entry and answers how many there were. Raises Unreachable."""
        async with _told():
            return int(await self._clear(keys=[PREFIX], args=[]))

    @contextmanager
    def _reader(self, images: str) -> Iterator[None]:
        """Holds a place for a listing. Raises QueueFull."""
        if images != "full":
            yield
            return
        if self._readers >= MAX_READERS:
            raise QueueFull(
                f"{MAX_READERS} listings with whole pictures are being read. Try again soon, or with images=thumb.",
                retry_after_s=READERS_RETRY_S,
            )
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1

    async def _add_until_answered(self, arguments: Sequence[Any]) -> int:
        size = sum(len(item) for item in arguments[:3])
        while True:
            try:
                return int(await with_room(lambda: self._add(keys=[PREFIX], args=arguments), self._make_room, size))
            except AWAY:
                await asyncio.sleep(ADD_PAUSE_S)

    async def _read(self, ids: Sequence[int], images: str) -> list[Row]:
        kinds = ["entry"] if images == "none" else ["entry", "image" if images == "full" else "thumb"]
        async with _told():
            found: list[Any] = await self._redis.mget([f"{PREFIX}{kind}:{number}" for kind in kinds for number in ids])
        texts, pictures = found[: len(ids)], found[len(ids) :] or [None] * len(ids)
        return [
            ({"id": number, **json.loads(text)}, picture)
            for number, text, picture in zip(ids, texts, pictures, strict=True)
            if text is not None  # deleted in the meantime
        ]

    async def _watch(self) -> None:
        while not self._closing:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await self._redis.ping()
                here = True
            except (*AWAY, RedisError, TimeoutError):
                here = False
            if here != self.is_here:
                log.warning("Redis is back" if here else "Redis is away")
                self._away_since = None if here else time.monotonic()
            await asyncio.sleep(PING_INTERVAL_S)


async def _nothing_to_drop(_: int) -> bool:
    return False


def _told() -> AbstractAsyncContextManager[None]:
    return told("The history cannot be reached; pictures are still made.")
