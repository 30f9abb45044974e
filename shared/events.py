"""Server-sent events: an answer that goes out as it comes about.

What is refused before the first event is an ordinary refusal with its status; what fails later is an event, as the
status has long been sent.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import structlog
from fastapi import Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from shared.errors import InternalError, ServiceError
from shared.problems import Problem, problem_of, request_id_of
from shared.requests import until_disconnected

MEDIA_TYPE = "text/event-stream"
ERROR = "error"
"""The event that ends a stream of ours which fails; its data is a problem, as any refusal has it."""
PING_INTERVAL_S = 15.0  # a comment now and then, or proxies take a long silence for the end
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_UNKNOWN = "Something went wrong in the server; its log has the cause under this request id."

log = structlog.get_logger(__name__)


def event(data: str, name: str | None = None) -> bytes:
    """One event as it is sent. A line break in `data` is kept."""
    return format_sse_event(data_str=data, event=name)


def error_event(problem: Problem) -> bytes:
    """The event `ERROR`."""
    return event(problem.model_dump_json(), ERROR)


def wants_events(request: Request) -> bool:
    """Whether the client asks for events instead of one answer."""
    return MEDIA_TYPE in request.headers.get("accept", "")


async def event_response(
    request: Request, events: AsyncGenerator[bytes], *, told: Callable[[Problem], bytes] = error_event
) -> StreamingResponse:
    """Answers with these events. Raises what the generator raises before the first of them, and ClientGone.

    `told` makes the last event of what fails later. When the client goes away the generator is closed.
    """
    try:
        first = await until_disconnected(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return StreamingResponse(
        _all(first, events, lambda error: told(problem_of(error, request_id_of(request)))),
        media_type=MEDIA_TYPE,
        headers=_HEADERS,
    )


async def _all(
    first: bytes, events: AsyncGenerator[bytes], told: Callable[[ServiceError], bytes]
) -> AsyncIterator[bytes]:
    try:
        yield first
        async for item in _with_pings(events):
            yield item
    except ServiceError as error:
        yield told(error)
    except Exception:  # the last line of defence: logged here, told without its text
        log.exception("a stream failed unexpectedly")
        yield told(InternalError(_UNKNOWN))
    finally:
        await events.aclose()


async def _with_pings(events: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    while True:
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait((coming,), timeout=PING_INTERVAL_S))[0]:
                yield KEEPALIVE_COMMENT
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
        item = coming.result()
        if item is None:
            return
        yield item
