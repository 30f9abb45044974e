"""A gateway whose encoder and diffusion service run in this process on the tiny checkpoint, with every call seen."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from fakes import WatchedModel
from inprocess import client_of, node_of, started

from services.diffusion import app as diffusion_app
from services.diffusion.model import ZImageModel
from services.diffusion.settings import DiffusionSettings
from services.encoder import app as encoder_app
from services.encoder.model import TextEncoder
from services.encoder.settings import EncoderSettings
from services.gateway import app as gateway_app
from services.gateway.clients import EncoderClient
from services.gateway.commissions import DiffusionClient
from services.gateway.references import VlClient
from services.gateway.rewriting import RewriterClient
from services.gateway.settings import GatewaySettings
from shared.client import ServiceClient
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


@pytest.fixture
def start_gateway(text_encoder: TextEncoder, zimage_model: ZImageModel, tmp_path: Path) -> Start:
    """Starts a gateway with the given settings."""
    model = WatchedModel(zimage_model)
    encoder = encoder_app.create_app(EncoderSettings(), model=text_encoder)
    diffusion = diffusion_app.create_app(DiffusionSettings(max_pixels=1 << 30), model=model)

    @asynccontextmanager
    async def start(
        *, rewriter: RewriterClient | None = None, vl: VlClient | None = None, **settings: Any
    ) -> AsyncIterator[Gateway]:
        async with started(encoder) as encoding, started(diffusion) as drawing:
            recorders = Recorder(httpx2.ASGITransport(encoding)), Recorder(httpx2.ASGITransport(drawing))
            services = [
                ServiceClient(name, f"http://{name}", max_reply_bytes=64 << 20, transport=recorder)
                for name, recorder in zip(("encoder", "diffusion"), recorders, strict=True)
            ]
            app = await asyncio.to_thread(
                gateway_app.create_app,
                GatewaySettings(**{"data_dir": tmp_path, **settings}),
                encoder=EncoderClient(node_of(services[0])),
                diffusion=None if settings.get("encoder_only") else DiffusionClient(node_of(services[1])),
                rewriter=rewriter,
                vl=vl,
            )
            async with client_of(app) as client:
                yield Gateway(client, app, *recorders, model)
                model.gate.set()

    return start


@pytest.fixture
async def gateway(start_gateway: Start) -> AsyncIterator[Gateway]:
    """A gateway with the default settings."""
    with structlog.testing.capture_logs():
        async with start_gateway() as gateway:
            yield gateway
