"""How large a request's body may be, and how much of large ones is held at the same time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from shared.errors import BodyTooLarge, QueueFull

RETRY_AFTER_S = 5


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """How many bytes a request's body may have: `usual`, and of paths that begin with a key of `larger` more.

    Bodies of more than `usual` bytes may have `together` bytes at the same time; None does not bound them.
    """

    usual: int
    larger: Mapping[str, int] = field(default_factory=dict)
    together: int | None = None

    def of(self, path: str) -> int:
        """The limit of a path."""
        return next((limit for prefix, limit in self.larger.items() if path.startswith(prefix)), self.usual)


class CountedBodies:
    """Counts what arrives of bodies of unknown length, up to each path's limit; the counting is the framework's."""

    def __init__(self, app: ASGIApp, *, limits: BodyLimits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        limit = self.limits.of(scope.get("path", ""))
        await RequestBodyLimitMiddleware(self.app, limit)(scope, receive, send)


class HeldBodies:
    """Judges bodies before a byte of them is read, and keeps count of the large ones until their requests end."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._held = 0

    @contextmanager
    def place(self, path: str, headers: Headers) -> Iterator[None]:
        """Holds a place for the body. Raises BodyTooLarge, and QueueFull while too many large ones are held.

        One of unknown length takes as much room as its path allows.
        """
        size, together = self._size(path, headers), self._limits.together
        large = size if together is not None and size > self._limits.usual else 0
        if together is not None and large and self._held + large > together:
            raise QueueFull(
                f"The large bodies of other requests are {self._held} bytes; together they may be {together}. "
                "Try again soon.",
                retry_after_s=RETRY_AFTER_S,
            )
        self._held += large
        try:
            yield
        finally:
            self._held -= large

    def _size(self, path: str, headers: Headers) -> int:
        limit = self._limits.of(path)
        length = headers.get("content-length")
        if length is None:
            return limit if "transfer-encoding" in headers else 0
        if not length.isascii() or not length.isdigit() or int(length[:20]) > limit:
            raise BodyTooLarge(f"The request body is larger than {limit} bytes.")
        return int(length)
