"""Builds the gateway's application."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from fastapi import FastAPI

from services.gateway.clients import ApiEncoderClient, BackEnd, DiffusionClient, Encoder, EncoderClient
from services.gateway.drawing import Drawing
from services.gateway.embeddings import EmbeddingCache
from services.gateway.engine import GatewayEngine
from services.gateway.references import VlClient
from services.gateway.rewriting import RewriterClient, Rewriting
from services.gateway.routes import generate, health, prompts, rewrite
from services.gateway.routes import history as history_routes
from services.gateway.routes import vl as vl_routes
from services.gateway.settings import GatewaySettings
from services.gateway.state import State
from services.gateway.store import Bounds, History
from services.gateway.vision import Vision
from services.gateway.watch import Watch
from shared.bodies import BodyLimits
from shared.client import ServiceClient
from shared.health import Metrics
from shared.pictures import MAX_PICTURE_BYTES
from shared.service import create_service
from shared.templates import load_templates

MAX_BODY_BYTES = 2 << 20  # four texts of 32,000 characters, each at most 12 bytes in JSON
MAX_BODY_WITH_PICTURES_BYTES = MAX_BODY_BYTES + MAX_PICTURE_BYTES * 4 // 3  # one of the largest in base64
PICTURE_PATHS = ("/api/vl/", "/api/rewrite")
MAX_EMBEDDINGS_BYTES = 512 << 20
MAX_PNG_BYTES = 64 << 20
MAX_REWRITTEN_BYTES = 16 << 20
DESCRIPTION = "The public API of the Z-Image server: prompts in, pictures out."


def create_app(
    settings: GatewaySettings,
    *,
    encoder: Encoder | None = None,
    diffusion: DiffusionClient | None = None,
    rewriter: RewriterClient | None = None,
    vl: VlClient | None = None,
) -> FastAPI:
    """The app; with `encoder`, `diffusion`, `rewriter` or `vl` given those are used instead of what the settings name.

    Raises BrokenTemplate when the templates cannot be read.
    """
    metrics = Metrics("gateway")
    templates = load_templates(settings.templates_dir)
    encoder = encoder or _encoder(settings)
    if diffusion is None and not settings.encoder_only:
        diffusion = DiffusionClient(
            ServiceClient("diffusion", str(settings.diffusion_url), max_reply_bytes=MAX_PNG_BYTES)
        )
    rewriter, vl = rewriter or _rewriter(settings), vl or _vl(settings)
    back_ends: dict[str, BackEnd] = {"encoder": encoder}
    back_ends |= {} if diffusion is None else {"diffusion": diffusion}
    back_ends |= {} if rewriter is None else {"rewriter": rewriter}
    back_ends |= {} if vl is None else {"vl": vl}
    watch = Watch(back_ends, optional=("rewriter", "vl"))
    cache = _cache(settings)
    history = _history(settings, cache)
    engine = GatewayEngine(
        settings,
        templates,
        encoder=encoder,
        drawing=Drawing(settings, diffusion, history),
        rewriting=Rewriting(templates, rewriter),
        vision=Vision(settings, vl, cache),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with AsyncExitStack() as stack:
            for back_end in back_ends.values():
                await stack.enter_async_context(back_end.service)
            if history is not None:
                await stack.enter_async_context(history)
            if cache is not None:
                await stack.enter_async_context(cache)
            watching = asyncio.create_task(watch.run(), name="watch")
            yield State(engine=engine, watch=watch, history=history)
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    return create_service(
        description=DESCRIPTION,
        lifespan=lifespan,
        routers=[module.router for module in (generate, prompts, rewrite, vl_routes, history_routes, health)],
        readiness=watch.unready_reason,
        metrics=metrics,
        max_body_bytes=BodyLimits(
            MAX_BODY_BYTES,
            larger=dict.fromkeys(PICTURE_PATHS, MAX_BODY_WITH_PICTURES_BYTES),
            together=settings.max_upload_bytes,
        ),
    )


def _history(settings: GatewaySettings, cache: EmbeddingCache | None) -> History | None:
    if settings.redis_url is None:
        return None
    bounds = Bounds(settings.history_max_entries, settings.history_max_bytes)
    return History(settings.redis_url, bounds, make_room=None if cache is None else cache.make_room)


def _cache(settings: GatewaySettings) -> EmbeddingCache | None:
    if settings.redis_url is None:
        return None
    return EmbeddingCache(settings.redis_url, max_bytes=settings.vl_cache_bytes, ttl_s=settings.vl_cache_ttl_s)


def _vl(settings: GatewaySettings) -> VlClient | None:
    if settings.vl_url is None:
        return None
    return VlClient(ServiceClient("vl", str(settings.vl_url), max_reply_bytes=MAX_EMBEDDINGS_BYTES))


def _rewriter(settings: GatewaySettings) -> RewriterClient | None:
    if settings.rewriter_url is None:
        return None
    return RewriterClient(ServiceClient("rewriter", str(settings.rewriter_url), max_reply_bytes=MAX_REWRITTEN_BYTES))


def _encoder(settings: GatewaySettings) -> Encoder:
    if not settings.use_api_encoder:
        return EncoderClient(ServiceClient("encoder", str(settings.encoder_url), max_reply_bytes=MAX_EMBEDDINGS_BYTES))
    headers = {"authorization": f"Bearer {settings.api_key.get_secret_value()}"} if settings.api_key else None
    service = ServiceClient(
        "API encoder", str(settings.api_url), max_reply_bytes=2 * MAX_EMBEDDINGS_BYTES, headers=headers
    )
    return ApiEncoderClient(service, settings.api_model)
