"""How large a request's body may be, and how much of large ones is held at the same time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.errors import BodyTooLarge, QueueFull

RETRY_AFTER_S = 5
MAX_QUOTES, MAX_MARKS = 50_000, 300_000
"""Of a JSON body: quotes without those that a text escapes, more than the longest conversation has; and commas and
opening brackets, more than all its texts could hold, where base64 has none. Each 100,000 fields, or as many lists, hold
the event loop for up to half a second, until they are parsed and refused."""
_TOO_MUCH = f"The request body has more than {MAX_QUOTES // 2} names and texts, or {MAX_MARKS} commas and brackets."


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
    """Counts what arrives of bodies: bytes up to each path's limit, by the framework, and what JSON is made of."""

    def __init__(self, app: ASGIApp, *, limits: BodyLimits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        limit = self.limits.of(scope.get("path", ""))
        counted = _of_few_values(receive) if _is_json(scope) else receive
        await RequestBodyLimitMiddleware(self.app, limit)(scope, counted, send)


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
        digits = length.lstrip("0") or "0"
        if not digits.isascii() or not digits.isdigit() or len(digits) > len(str(limit)) or int(digits) > limit:
            raise BodyTooLarge(f"The request body is larger than {limit} bytes.")
        return int(digits)


def _is_json(scope: Scope) -> bool:
    return scope["type"] == "http" and "json" in Headers(scope=scope).get("content-type", "").lower()


def _of_few_values(receive: Receive) -> Receive:
    """`receive`, which raises HTTPException, caused by the BodyTooLarge to be told, once there is too much to parse."""
    quotes = marks = 0

    async def receive_few() -> Message:
        nonlocal quotes, marks
        message = await receive()
        body = message.get("body", b"")
        quotes += body.count(b'"') - body.count(b'\\"')
        marks += sum(map(body.count, (b",", b"[", b"{")))
        if quotes > MAX_QUOTES or marks > MAX_MARKS:
            refusal = BodyTooLarge(_TOO_MUCH)
            raise HTTPException(refusal.status) from refusal
        return message

    return receive_few
