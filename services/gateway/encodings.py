"""Encoded prompts that are kept: a prompt that comes again needs no encoder, equal ones that come together are encoded
once. Knows no HTTP.

The key is what determines embeddings: the encoder's fingerprint, the layer and the text. What is kept is the encoder's
answer as it came. While Redis is away prompts are encoded as if there were no cache.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Self

import structlog

from services.gateway.clients import EncoderClient, EncoderMessage, Encoding, read_encoder_message
from services.gateway.embeddings import EmbeddingCache, Kept
from services.gateway.nodes import Nodes
from shared.errors import BadUpstream, UpstreamTimeout
from shared.tasks import all_of

log = structlog.get_logger(__name__)


class CachingEncoder:
    """An encoder that remembers, in a Redis that all gateways share."""

    def __init__(self, encoder: EncoderClient, cache: EmbeddingCache) -> None:
        self._encoder = encoder
        self._cache = cache
        self._flights: dict[str, _Flight] = {}
        self._keeping: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Opens the cache."""
        await self._cache.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Gives up what is still being encoded or kept."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await self._cache.__aexit__()

    async def make_room(self, wanted: int) -> bool:
        """Drops so many bytes of what is kept, as the cache does. Raises RedisError."""
        return await self._cache.make_room(wanted)

    @property
    def nodes(self) -> Nodes:
        """Where texts are encoded."""
        return self._encoder.nodes

    async def encode(self, texts: Sequence[str], *, layer: int, timeout_s: float) -> Encoding:
        """Hidden states `layer` of each text, kept or encoded. Raises a ServiceError."""
        started = time.perf_counter()
        found = await all_of(self._find(text, layer, started + timeout_s) for text in texts)
        return Encoding(tuple(message.items[0] for message in found), time.perf_counter() - started)

    async def count_tokens(self, text: str, *, timeout_s: float) -> int:
        """How many tokens the encoder makes of a text. Raises a ServiceError."""
        return await self._encoder.count_tokens(text, timeout_s=timeout_s)

    async def _find(self, text: str, layer: int, end: float) -> EncoderMessage:
        """What is kept of a text, or what the encoder makes of it until `end`, by the clock `perf_counter`."""
        model = self.nodes.model
        if not model:
            return await self._encode(text, layer, end)
        key = key_of(model, layer, text)
        while True:
            flight = self._flights.get(key)
            if flight is not None:
                try:
                    return await flight.joined(end)
                except UpstreamTimeout:  # perhaps of one who had less time
                    if time.perf_counter() >= end:
                        raise
                    continue
            flight = self._flights[key] = _Flight(partial(self._leave, key))
            flight.start(self._fly(flight, key, text, layer, end), self._keeping)
            return await flight.joined(end)

    def _leave(self, key: str, flight: "_Flight") -> None:
        """Nobody may join the flight any more; another one of the same text may have begun since."""
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _fly(self, flight: "_Flight", key: str, text: str, layer: int, end: float) -> None:
        """Finds or makes a text's embeddings; those who wait have them before they are kept."""

        async def make() -> Kept:
            message = await self._encode(text, layer, end)
            flight.land(message)
            return Kept(key_of(message.fingerprint, layer, text), message.body)

        left_s = max(0.001, end - time.perf_counter())
        kept = await self._cache.find_or_make(key, make, timeout_s=left_s, must_keep=False)
        if not flight.answer.done():
            flight.land(await self._read(kept, text, layer, end))

    async def _read(self, kept: Kept, text: str, layer: int, end: float) -> EncoderMessage:
        """What was kept; where that is broken, the text is encoded again."""
        try:
            return read_encoder_message(kept.message, 1)
        except BadUpstream:
            return await self._encode(text, layer, end)

    async def _encode(self, text: str, layer: int, end: float) -> EncoderMessage:
        left_s = max(0.001, end - time.perf_counter())
        return await self._encoder.encode_message([text], layer=layer, timeout_s=left_s)


class _Flight:
    """One text that is being found or encoded, for all who want it. Ended when nobody does any more.

    `leave` takes it from those that others may still join.
    """

    def __init__(self, leave: Callable[["_Flight"], None]) -> None:
        self.answer: asyncio.Future[EncoderMessage] = asyncio.get_running_loop().create_future()
        self._leave = leave
        self._task: asyncio.Task[None] | None = None
        self._waiting = 0

    def start(self, work: Coroutine[Any, Any, None], kept: set["asyncio.Task[None]"]) -> None:
        """Begins the work, which lands; its task is in `kept` until it has ended."""
        self._task = asyncio.create_task(work, name="encoding")
        kept.add(self._task)
        self._task.add_done_callback(kept.discard)
        self._task.add_done_callback(self._ended)

    def land(self, message: EncoderMessage) -> None:
        """Hands the embeddings to all who wait."""
        self._leave(self)
        self.answer.set_result(message)

    async def joined(self, end: float) -> EncoderMessage:
        """The answer, until `end` by the clock `perf_counter`. Raises a ServiceError."""
        self._waiting += 1
        try:
            async with asyncio.timeout(max(0.0, end - time.perf_counter())):
                return await asyncio.shield(self.answer)
        except TimeoutError:
            raise UpstreamTimeout("The prompt was not encoded in time.") from None
        finally:
            self._waiting -= 1
            if not self._waiting and not self.answer.done():
                self._leave(self)
                if self._task is not None:
                    self._task.cancel()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if self.answer.done():
            if error is not None:  # what nobody waits for any more
                log.error("embeddings could not be kept", exc_info=error)
            return
        self._leave(self)
        if error is None:
            self.answer.cancel()
        else:
            self.answer.set_exception(error)


def key_of(fingerprint: str, layer: int, text: str) -> str:
    """Equal wherever and whenever the same model reads the same text."""
    return f"{fingerprint}:{layer}:{hashlib.sha256(text.encode()).hexdigest()[:40]}"
