"""Builds the gateway's application."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from fastapi import FastAPI

from services.gateway.clients import ApiEncoderClient, DiffusionClient, Encoder, EncoderClient
from services.gateway.engine import GatewayEngine
from services.gateway.routes import generate, health, prompts
from services.gateway.routes import history as history_routes
from services.gateway.settings import GatewaySettings
from services.gateway.state import State
from services.gateway.store import Bounds, History
from services.gateway.watch import Watch
from shared.client import ServiceClient
from shared.health import Metrics
from shared.service import create_service
from shared.templates import load_templates

MAX_BODY_BYTES = 2 << 20  # four texts of 32,000 characters, each at most 12 bytes in JSON
MAX_EMBEDDINGS_BYTES = 512 << 20
MAX_PNG_BYTES = 64 << 20
DESCRIPTION = "The public API of the Z-Image server: prompts in, pictures out."


def create_app(
    settings: GatewaySettings, *, encoder: Encoder | None = None, diffusion: DiffusionClient | None = None
) -> FastAPI:
    """The app; with `encoder` or `diffusion` given those are used instead of what the settings name.

    Raises BrokenTemplate when the templates cannot be read.
    """
    metrics = Metrics("gateway")
    templates = load_templates(settings.templates_dir)
    encoder = encoder or _encoder(settings)
    if diffusion is None and not settings.encoder_only:
        diffusion = DiffusionClient(
            ServiceClient("diffusion", str(settings.diffusion_url), max_reply_bytes=MAX_PNG_BYTES)
        )
    watch = Watch({"encoder": encoder} if diffusion is None else {"encoder": encoder, "diffusion": diffusion})
    history = _history(settings)
    engine = GatewayEngine(settings, templates, encoder=encoder, diffusion=diffusion, history=history)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(encoder.service)
            if diffusion is not None:
                await stack.enter_async_context(diffusion.service)
            if history is not None:
                await stack.enter_async_context(history)
            watching = asyncio.create_task(watch.run(), name="watch")
            yield State(engine=engine, watch=watch, history=history)
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    return create_service(
        description=DESCRIPTION,
        lifespan=lifespan,
        routers=[generate.router, prompts.router, history_routes.router, health.router],
        readiness=watch.unready_reason,
        metrics=metrics,
        max_body_bytes=MAX_BODY_BYTES,
    )


def _history(settings: GatewaySettings) -> History | None:
    if settings.redis_url is None:
        return None
    return History(settings.redis_url, Bounds(settings.history_max_entries, settings.history_max_bytes))


def _encoder(settings: GatewaySettings) -> Encoder:
    if not settings.use_api_encoder:
        return EncoderClient(ServiceClient("encoder", str(settings.encoder_url), max_reply_bytes=MAX_EMBEDDINGS_BYTES))
    headers = {"authorization": f"Bearer {settings.api_key.get_secret_value()}"} if settings.api_key else None
    service = ServiceClient(
        "API encoder", str(settings.api_url), max_reply_bytes=2 * MAX_EMBEDDINGS_BYTES, headers=headers
    )
    return ApiEncoderClient(service, settings.api_model)
