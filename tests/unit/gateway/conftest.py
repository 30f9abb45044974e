"""A gateway whose encoder and diffusion service run in this process on the tiny checkpoint, with every call seen."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from fakes import WatchedModel
from inprocess import client_of, node_of, started
from running_gateway import Gateway, Recorder, Start

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
