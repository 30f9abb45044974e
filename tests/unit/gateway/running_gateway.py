"""A gateway in this process, and what it asked of the services."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import httpx2
from fakes import WatchedModel

from shared.schemas.node import MODEL_PATH

SMALL = {"width": 64, "height": 64, "steps": 2}


class Whole(httpx2.AsyncByteStream):
    """A body in one piece."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.content


class Recorder(httpx2.AsyncBaseTransport):
    """Passes calls on and keeps those to `/v1/...` but probes; `instead` answers them in the service's place."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self.inner = inner
        self.calls: list[tuple[httpx2.Request, bytes]] = []
        self.instead: Callable[[httpx2.Request], httpx2.Response | None] | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """One call."""
        if request.url.path == MODEL_PATH or not request.url.path.startswith("/v1/"):
            return await self.inner.handle_async_request(request)
        await request.aread()
        if self.instead is not None and (answer := self.instead(request)) is not None:
            return answer
        response = await self.inner.handle_async_request(request)
        content = b"".join([piece async for piece in response.aiter_raw()])
        self.calls.append((request, content))
        return httpx2.Response(response.status_code, headers=response.headers, stream=Whole(content))


@dataclass
class Gateway:
    """A running gateway, its client, and what it asked of the services."""

    client: httpx2.AsyncClient
    app: Any
    encoder: Recorder
    diffusion: Recorder
    model: WatchedModel

    async def generate(self, **fields: Any) -> httpx2.Response:
        """A small picture unless the fields say otherwise."""
        return await self.client.post("/api/generate", json={"prompt": "A cat", **SMALL, **fields})


Start = Callable[..., AbstractAsyncContextManager[Gateway]]
