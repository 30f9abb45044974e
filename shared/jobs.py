"""One piece of work that an asyncio task hands to a device's thread and waits for."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")
_numbers = itertools.count()


class Job(Generic[T]):
    """Made in the event loop; the thread ends it with `resolve` or `fail`, and looks at `cancelled` between steps."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.created_at = time.monotonic()
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[T] = self._loop.create_future()

    async def result(self) -> T:
        """Waits for the end of the job; when the waiting is cancelled, so is the job."""
        try:
            return await self._future
        finally:
            self.cancelled = True

    def cancel(self) -> None:
        """Gives the job up, and whoever still waits for it. Called in the event loop."""
        self.cancelled = True
        self._future.cancel()

    def resolve(self, result: T) -> None:
        """Ends the job well. Called from any thread."""
        self._call(self._resolve, result)

    def fail(self, error: Exception) -> None:
        """Ends the job with an error. Called from any thread."""
        self._call(self._fail, error)

    def _call(self, method: "object", value: object) -> None:
        try:
            self._loop.call_soon_threadsafe(method, value)  # type: ignore[arg-type]
        except RuntimeError:  # the loop is closed: the process is ending and nobody waits any more
            self.cancelled = True

    def _resolve(self, result: T) -> None:
        if not self._future.done():
            self._future.set_result(result)

    def _fail(self, error: Exception) -> None:
        if not self._future.done():
            self._future.set_exception(error)


class TextJob(Job[T]):
    """A text in the making: its pieces as they come, then the result."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()

    async def pieces(self) -> AsyncIterator[str | T]:
        """The text as it comes, no piece empty, and the result. Raises what made it fail."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        yield await self.result()

    def emit(self, piece: str) -> None:
        """Hands a piece over. Called from any thread."""
        if piece:
            self._call(self._pieces.put_nowait, piece)

    def _resolve(self, result: T) -> None:
        super()._resolve(result)
        self._pieces.put_nowait(None)

    def _fail(self, error: Exception) -> None:
        super()._fail(error)
        if not self._future.cancelled():
            self._future.exception()  # it may be that nobody listens any more, which is no defect
        self._pieces.put_nowait(None)
