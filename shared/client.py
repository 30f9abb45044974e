"""The HTTP client with which services speak to one another: deadlines, request ids, and errors made whole again.

Every call has a deadline. An error that another service raised is raised here as the same class.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self

import httpx2
import structlog

from shared import problems
from shared.errors import (
    BadUpstream,
    InvalidField,
    QueueFull,
    ServiceError,
    Unauthorized,
    Unreachable,
    Unready,
    UpstreamTimeout,
    rebuild,
)
from shared.requests import REQUEST_ID

CONNECT_TIMEOUT_S = 5.0
CONNECT_RETRIES = 2
PLACE_TIMEOUT_S = 5.0  # that a request waits for one of the connections
_WORK = httpx2.Limits(max_connections=256, max_keepalive_connections=64, keepalive_expiry=60.0)
_QUESTIONS = httpx2.Limits(max_connections=8, max_keepalive_connections=2, keepalive_expiry=60.0)
_REFUSALS = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
"""With which a server says that a request, not the server, is at fault."""
EVENTS = "text/event-stream"
_ADDED_HEADERS = {"accept-encoding": "identity"}  # tensors and pictures do not shrink


@dataclass(frozen=True, slots=True)
class Reply:
    """A successful answer: its headers and its whole body."""

    headers: Mapping[str, str]
    body: bytes


class ServiceClient:
    """Calls one service by its base URL.

    `address` is where to connect instead of looking the URL's host up: one of several machines of that name. `foreign`
    is a server that is not ours: of its refusals nothing but the status is told. Connecting is tried again,
    a request that has been sent is not. What is asked by GET and DELETE has connections of its own, so that a service
    with much to do still says what it is and gives up what is not wanted any more.
    """

    def __init__(  # noqa: PLR0913 - options by their names
        self,
        name: str,
        base_url: str,
        *,
        max_reply_bytes: int,
        headers: Mapping[str, str] | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        foreign: bool = False,
        address: str | None = None,
    ) -> None:
        self.name = name
        url, named = httpx2.URL(base_url), dict(headers or {})
        self._extensions = {}
        if address is not None:
            named["host"] = url.netloc.decode()
            self._extensions["sni_hostname"] = url.host
            url = url.copy_with(host=address)
        self.base_url = str(url.copy_with(username=None, password=None)) if url.userinfo else str(url)
        self._foreign = foreign
        self._max_reply_bytes = max_reply_bytes
        retries = CONNECT_RETRIES * foreign
        self._work, self._questions = (
            httpx2.AsyncClient(
                base_url=url,
                headers={**_ADDED_HEADERS, **named},
                timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S, pool=PLACE_TIMEOUT_S),
                transport=transport or httpx2.AsyncHTTPTransport(trust_env=False, limits=limits, retries=retries),
                trust_env=False,
                follow_redirects=False,
            )
            for limits in (_WORK, _QUESTIONS)
        )

    async def __aenter__(self) -> Self:
        """Opens the connection pools."""
        await self._work.__aenter__()
        await self._questions.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes every connection."""
        await self._work.aclose()
        await self._questions.aclose()

    async def get(self, path: str, *, timeout_s: float) -> Reply:
        """GET, within `timeout_s` seconds. Raises a ServiceError."""
        return await self._call("GET", path, timeout_s=timeout_s)

    async def delete(self, path: str, *, timeout_s: float) -> Reply:
        """DELETE, within `timeout_s` seconds. Raises a ServiceError."""
        return await self._call("DELETE", path, timeout_s=timeout_s)

    async def post_json(
        self, path: str, body: Any, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """POST of a JSON body, within `timeout_s` seconds. Raises a ServiceError."""
        return await self._call("POST", path, timeout_s=timeout_s, headers=headers, json=body)

    async def post_chunks(
        self, path: str, chunks: Iterable[bytes | memoryview], *, timeout_s: float, headers: Mapping[str, str]
    ) -> Reply:
        """POST of a body in pieces, which are sent as they are, within `timeout_s` seconds. Raises a ServiceError."""
        body, length = _in_pieces(chunks)
        return await self._call("POST", path, timeout_s=timeout_s, headers={**headers, **length}, content=body)

    def stream(
        self, path: str, body: Any, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[httpx2.ServerSentEvent]:
        """The events that answer a JSON body, the last of them within `timeout_s` seconds. Raises a ServiceError.

        Closing the generator closes the connection.
        """
        return self._stream(path, timeout_s=timeout_s, headers=headers, json=body)

    def stream_chunks(
        self, path: str, chunks: Iterable[bytes | memoryview], *, timeout_s: float, headers: Mapping[str, str]
    ) -> AsyncGenerator[httpx2.ServerSentEvent]:
        """The events that answer a body in pieces, as `stream` does it. Raises a ServiceError."""
        body, length = _in_pieces(chunks)
        return self._stream(path, timeout_s=timeout_s, headers={**headers, **length}, content=body)

    async def _stream(
        self, path: str, *, timeout_s: float, headers: Mapping[str, str] | None, **body: Any
    ) -> AsyncGenerator[httpx2.ServerSentEvent]:
        deadline = asyncio.get_running_loop().time() + timeout_s
        sent = {"accept": EVENTS, **_request_id(), **(headers or {})}
        async with AsyncExitStack() as stack:
            with self._told(timeout_s):
                async with asyncio.timeout_at(deadline):
                    request = self._work.stream("POST", path, headers=sent, extensions=self._extensions, **body)
                    response = await stack.enter_async_context(request)
                    if not response.is_success:
                        raise self._error(response, await self._read(response))
            events, size = aiter(httpx2.EventSource(response, max_event_size=self._max_reply_bytes)), 0
            while True:
                with self._told(timeout_s):
                    async with asyncio.timeout_at(deadline):
                        event = await anext(events, None)
                if event is None:
                    return
                size += len(event.data)
                if size > self._max_reply_bytes:
                    raise BadUpstream(f"The {self.name} service sent more than {self._max_reply_bytes} bytes.")
                yield event

    async def _call(
        self, method: str, path: str, *, timeout_s: float, headers: Mapping[str, str] | None = None, **body: Any
    ) -> Reply:
        http = self._work if method == "POST" else self._questions
        with self._told(timeout_s):
            async with asyncio.timeout(timeout_s):
                sent = {**_request_id(), **(headers or {})}
                request = http.stream(method, path, headers=sent, extensions=self._extensions, **body)
                async with request as response:
                    content = await self._read(response)
        if response.is_success:
            return Reply(headers=response.headers, body=content)
        raise self._error(response, content)

    @contextmanager
    def _told(self, timeout_s: float) -> Iterator[None]:
        """Makes our errors of the HTTP library's."""
        try:
            yield
        except TimeoutError:
            raise UpstreamTimeout(f"The {self.name} service did not answer within {timeout_s:g} s.") from None
        except httpx2.PoolTimeout:
            raise QueueFull(f"The {self.name} service has as many requests as it takes.", retry_after_s=5) from None
        except (httpx2.TimeoutException, httpx2.ConnectError):
            raise Unreachable(f"The {self.name} service cannot be reached.", retry_after_s=2) from None
        except httpx2.SSEError:
            raise BadUpstream(f"The {self.name} service answered something that is not events.") from None
        except httpx2.TransportError:
            raise Unreachable(
                f"The {self.name} service closed the connection before it had answered.", retry_after_s=2
            ) from None

    async def _read(self, response: httpx2.Response) -> bytes:
        pieces, size = [], 0
        async for piece in response.aiter_raw():
            size += len(piece)
            if size > self._max_reply_bytes:
                raise BadUpstream(f"The {self.name} service sent more than {self._max_reply_bytes} bytes.")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def rebuilt(self, problem: bytes, *, retry_after_s: int | None = None) -> ServiceError:
        """The error that a service of ours told as a problem."""
        try:
            told = problems.Problem.model_validate_json(problem)
        except ValueError:
            return BadUpstream(f"The {self.name} service refused with a broken answer.")
        error = rebuild(told.code, told.detail, retry_after_s=retry_after_s)
        if isinstance(error, Unauthorized):
            return BadUpstream(f"The {self.name} service does not accept this one's token.")
        if isinstance(error, Unready):
            error = Unready(f"The {self.name} service is not ready yet. {error.detail}", retry_after_s=2)
            error.told = True
        return error or BadUpstream(f"The {self.name} service answered with status {told.status}.")

    def _error(self, response: httpx2.Response, content: bytes) -> ServiceError:
        retry_after = response.headers.get("retry-after", "")
        seconds = int(retry_after) if re.fullmatch("[0-9]{1,6}", retry_after) else None
        if not self._foreign and response.headers.get("content-type", "").startswith(problems.MEDIA_TYPE):
            return self.rebuilt(content, retry_after_s=seconds)
        told = f"The {self.name} service answered with status {response.status_code}."
        if response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
            return QueueFull(told, retry_after_s=seconds)
        if self._foreign and response.status_code in _REFUSALS:
            error: ServiceError = InvalidField(
                f"The {self.name} service refused it with status {response.status_code}."
            )
            error.told = True
            return error
        return BadUpstream(told)


def _in_pieces(chunks: Iterable[bytes | memoryview]) -> tuple[AsyncIterator[bytes], dict[str, str]]:
    """A body that is sent in these pieces, and the header with its length."""
    pieces = list(chunks)
    return _send(pieces), {"content-length": str(sum(len(piece) for piece in pieces))}


async def _send(pieces: Iterable[bytes | memoryview]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece  # type: ignore[misc]  # the sockets take any buffer; bytes() would copy megabytes


def _request_id() -> dict[str, str]:
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return {REQUEST_ID: request_id} if request_id else {}
