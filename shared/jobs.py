"""One piece of work that an asyncio task hands to a device's thread and waits for."""

import asyncio
import itertools
import time
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
