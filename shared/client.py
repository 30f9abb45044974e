"""The HTTP client with which services speak to one another: deadlines, request ids, and errors made whole again.

Every call has a deadline. An error that another service raised is raised here as the same class.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx2
import structlog

from shared import problems
from shared.errors import BadUpstream, ServiceError, Unreachable, Unready, UpstreamTimeout, rebuild
from shared.requests import REQUEST_ID

CONNECT_TIMEOUT_S = 5.0
_ADDED_HEADERS = {"accept-encoding": "identity"}  # tensors and pictures do not shrink


@dataclass(frozen=True, slots=True)
class Reply:
    """A successful answer: its headers and its whole body."""

    headers: Mapping[str, str]
    body: bytes


class ServiceClient:
    """Calls one service by its base URL."""

    def __init__(
        self,
        name: str,
        base_url: str,
        *,
        max_reply_bytes: int,
        headers: Mapping[str, str] | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.name = name
        self.base_url = base_url
        self._max_reply_bytes = max_reply_bytes
        self._http = httpx2.AsyncClient(
            base_url=base_url,
            headers={**_ADDED_HEADERS, **(headers or {})},
            timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=256, max_keepalive_connections=64, keepalive_expiry=60.0),
            transport=transport,
            trust_env=False,
            follow_redirects=False,
        )

    async def __aenter__(self) -> Self:
        """Opens the connection pool."""
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes every connection."""
        await self._http.aclose()

    async def get(self, path: str, *, timeout_s: float) -> Reply:
        """GET, within `timeout_s` seconds. Raises a ServiceError."""
        return await self._call("GET", path, timeout_s=timeout_s)

    async def post_json(
        self, path: str, body: Any, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """POST of a JSON body, within `timeout_s` seconds. Raises a ServiceError."""
        return await self._call("POST", path, timeout_s=timeout_s, headers=headers, json=body)

    async def post_chunks(
        self, path: str, chunks: Iterable[bytes | memoryview], *, timeout_s: float, headers: Mapping[str, str]
    ) -> Reply:
        """POST of a body in pieces, which are sent as they are, within `timeout_s` seconds. Raises a ServiceError."""
        pieces = list(chunks)
        length = {"content-length": str(sum(len(piece) for piece in pieces))}
        return await self._call("POST", path, timeout_s=timeout_s, headers={**headers, **length}, content=_send(pieces))

    async def _call(
        self, method: str, path: str, *, timeout_s: float, headers: Mapping[str, str] | None = None, **body: Any
    ) -> Reply:
        try:
            async with asyncio.timeout(timeout_s):
                request = self._http.stream(method, path, headers={**_request_id(), **(headers or {})}, **body)
                async with request as response:
                    content = await self._read(response)
        except TimeoutError:
            raise UpstreamTimeout(f"The {self.name} service did not answer within {timeout_s:g} s.") from None
        except httpx2.TimeoutException:
            raise Unreachable(f"The {self.name} service cannot be reached.", retry_after_s=2) from None
        except httpx2.ConnectError:
            raise Unreachable(f"The {self.name} service cannot be reached.", retry_after_s=2) from None
        except httpx2.TransportError:
            raise Unreachable(
                f"The {self.name} service closed the connection before it had answered.", retry_after_s=2
            ) from None
        if response.is_success:
            return Reply(headers=response.headers, body=content)
        raise self._error(response, content)

    async def _read(self, response: httpx2.Response) -> bytes:
        pieces, size = [], 0
        async for piece in response.aiter_raw():
            size += len(piece)
            if size > self._max_reply_bytes:
                raise BadUpstream(f"The {self.name} service sent more than {self._max_reply_bytes} bytes.")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _error(self, response: httpx2.Response, content: bytes) -> ServiceError:
        if response.headers.get("content-type", "").startswith(problems.MEDIA_TYPE):
            try:
                problem = problems.Problem.model_validate_json(content)
            except ValueError:
                return BadUpstream(f"The {self.name} service refused with a broken answer.")
            retry_after = response.headers.get("retry-after", "")
            seconds = int(retry_after) if re.fullmatch("[0-9]{1,6}", retry_after) else None
            error = rebuild(problem.code, problem.detail, retry_after_s=seconds)
            if isinstance(error, Unready):
                return Unready(f"The {self.name} service is not ready yet. {error.detail}", retry_after_s=2)
            if error is not None:
                return error
        return BadUpstream(f"The {self.name} service answered with status {response.status_code}.")


async def _send(pieces: Iterable[bytes | memoryview]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece  # type: ignore[misc]  # the sockets take any buffer; bytes() would copy megabytes


def _request_id() -> dict[str, str]:
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return {REQUEST_ID: request_id} if request_id else {}
