"""What surrounds every request: its id, its log line and metrics, and the limits on headers and body.

A plain ASGI middleware, so that streaming and the noticing of a client that goes away work as without it.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import TypeVar

import structlog
from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.bodies import BodyLimits, HeldBodies
from shared.errors import (
    ClientGone,
    HeadersTooLarge,
    InternalError,
    ServiceError,
    Unready,
    WrongContentType,
)
from shared.health import Metrics
from shared.problems import INCOMPLETE, problem_response

MAX_HEADER_BYTES = 64 << 10
BODY_TIMEOUT_S = 120.0  # a body that trickles in for longer counts as a client that went away
REQUEST_ID = "X-Request-ID"
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._-]{8,64}")
_QUIET_PATHS = ("/health", "/metrics", "/v1/model")  # which gateways and monitoring ask every second
_STOPPED = "The server stopped before the answer was ready."
_UNKNOWN = "Something went wrong in the server; its log has the cause under this request id."

T = TypeVar("T")
log = structlog.get_logger(__name__)


class RequestContext:
    """Gives each request an id (the caller's, if it sent a good one), logs it when it ends and counts it."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, limits: BodyLimits) -> None:
        self.app = app
        self.metrics = metrics
        self.bodies = HeldBodies(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _REQUEST_ID_FORM.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                error = await self._judged(headers, scope, _in_time(receive), send_with_id)
                if error is not None and not status:
                    await problem_response(error, request_id)(scope, receive, send_with_id)
            finally:
                self._record(scope, status or ClientGone.status, time.perf_counter() - started)

    async def _judged(self, headers: Headers, scope: Scope, receive: Receive, send: Send) -> ServiceError | None:
        """Runs the app unless headers or body are refused; answers what the client is to be told."""
        with ExitStack() as stack:
            try:
                if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
                    raise HeadersTooLarge(f"The request headers are larger than {MAX_HEADER_BYTES} bytes.")
                stack.enter_context(self.bodies.place(scope["path"], headers))
            except ServiceError as refusal:
                return refusal
            return await self._run(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> ServiceError | None:
        """Runs the app; answers what the client is to be told where the app told nothing.

        An answer that had begun ends with its connection: that is the only honest way left.
        """
        begun = False

        async def noting_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noting_send)
        except ClientDisconnect:
            return ClientGone(INCOMPLETE)
        except asyncio.CancelledError:  # by the server, when its time to stop is up
            if not begun:
                await problem_response(Unready(_STOPPED, retry_after_s=5), scope["request_id"])(scope, receive, send)
            raise
        except Exception:  # the last line of defence: logged here, told without its text
            log.exception("a request failed unexpectedly")
            if begun:
                raise
            return InternalError(_UNKNOWN)
        return None

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self.metrics.observe_request(scope["method"], route, status, seconds)
        if not scope["path"].startswith(_QUIET_PATHS):
            log.info("request", method=scope["method"], path=scope["path"], status=status, duration_s=round(seconds, 4))


def _in_time(receive: Receive) -> Receive:
    """`receive` with a deadline for the whole body; after the body there is none, as only the end is awaited then."""
    deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT_S
    complete = False

    async def receive_in_time() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        complete = not message.get("more_body", False)
        return message

    return receive_in_time


async def require_json(request: Request) -> None:
    """A route dependency: refuses a body that does not say it is JSON. Raises WrongContentType."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise WrongContentType("Send the body as JSON with the header 'Content-Type: application/json'.")


async def until_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Awaits `work`, and cancels it as soon as the client goes away. Raises ClientGone in that case.

    The request's body must have been read: the next thing to come from the connection is its end.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("The client closed the connection before the answer was ready.")
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
