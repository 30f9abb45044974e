"""Builds the gateway's application."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.types import Lifespan

from services.gateway.clients import ApiEncoderClient, Encoder, EncoderClient, ask_foreign_facts
from services.gateway.commissions import DiffusionClient
from services.gateway.drawing import Drawing
from services.gateway.embeddings import PROMPTS, EmbeddingCache
from services.gateway.encodings import CachingEncoder
from services.gateway.engine import GatewayEngine
from services.gateway.members import Probe
from services.gateway.nodes import Nodes
from services.gateway.references import VlClient, ask_vl_facts
from services.gateway.rewriting import RewriterClient, Rewriting
from services.gateway.routes import generate, health, prompts, rewrite
from services.gateway.routes import history as history_routes
from services.gateway.routes import vl as vl_routes
from services.gateway.settings import GatewaySettings
from services.gateway.state import State
from services.gateway.store import Bounds, History
from services.gateway.vision import Vision
from services.gateway.watch import Watch
from shared.addresses import without_version
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
REPLY_BYTES_PER_PIXEL = 5  # of a picture that does not shrink: three, a third more in base64, and previews beside it
LEAST_REPLY_BYTES = 64 << 20
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
    encoder, diffusion = encoder or _encoder(settings), diffusion or _diffusion(settings)
    rewriter, vl = rewriter or _rewriter(settings), vl or _vl(settings)
    clients = {"encoder": encoder, "diffusion": diffusion, "rewriter": rewriter, "vl": vl}
    pools = {name: client.nodes for name, client in clients.items() if client is not None}
    remembering = _remembering(settings, encoder)
    cache = _cache(settings, remembering)
    history = _history(settings, [one for one in (remembering, cache) if one is not None])
    watch = Watch(pools, optional=("rewriter", "vl"), history=history)
    parts = [part for part in (*pools.values(), history, cache, remembering) if part is not None]
    engine = GatewayEngine(
        settings,
        templates,
        encoder=remembering or encoder,
        drawing=Drawing(settings, diffusion, history),
        rewriting=Rewriting(templates, rewriter),
        vision=Vision(settings, vl, cache),
    )

    return create_service(
        description=DESCRIPTION,
        lifespan=_lifespan(State(engine=engine, watch=watch, history=history), parts),
        routers=[module.router for module in (generate, prompts, rewrite, vl_routes, history_routes, health)],
        readiness=watch.unready_reason,
        metrics=metrics,
        max_body_bytes=_body_limits(settings),
        hosts=settings.hosts,
    )


def _lifespan(state: State, parts: Sequence[AbstractAsyncContextManager[object]]) -> Lifespan[FastAPI]:
    """Runs the parts, from the first to the last, for as long as the app serves."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with AsyncExitStack() as stack:
            for part in parts:
                await stack.enter_async_context(part)
            yield state

    return lifespan


def _body_limits(settings: GatewaySettings) -> BodyLimits:
    larger = dict.fromkeys(PICTURE_PATHS, MAX_BODY_WITH_PICTURES_BYTES)
    return BodyLimits(MAX_BODY_BYTES, larger=larger, together=settings.max_upload_bytes)


def _history(settings: GatewaySettings, caches: Sequence[EmbeddingCache | CachingEncoder]) -> History | None:
    """The history, for which the caches make room, those first that are made again most easily."""
    if settings.redis_url is None:
        return None

    async def make_room(wanted: int) -> bool:
        for cache in caches:
            if await cache.make_room(wanted):
                return True
        return False

    bounds = Bounds(settings.history_max_entries, settings.history_max_bytes)
    return History(settings.redis_url, bounds, make_room=make_room)


def _cache(settings: GatewaySettings, remembering: CachingEncoder | None) -> EmbeddingCache | None:
    """The cache of references, for which prompts make room: they are encoded again more easily."""
    if settings.redis_url is None:
        return None
    return EmbeddingCache(
        settings.redis_url,
        max_bytes=settings.vl_cache_bytes,
        ttl_s=settings.vl_cache_ttl_s,
        make_room=None if remembering is None else remembering.make_room,
    )


def _remembering(settings: GatewaySettings, encoder: Encoder) -> CachingEncoder | None:
    """The encoder with a cache before it; None for one whose model is not known, and without a place for a cache."""
    if settings.redis_url is None or not settings.encoding_cache_bytes or not isinstance(encoder, EncoderClient):
        return None
    max_bytes, ttl_s = settings.encoding_cache_bytes, settings.encoding_cache_ttl_s
    cache = EmbeddingCache(settings.redis_url, max_bytes=max_bytes, ttl_s=ttl_s, prefix=PROMPTS)
    return CachingEncoder(encoder, cache)


def _vl(settings: GatewaySettings) -> VlClient | None:
    if not settings.vl_urls:
        return None
    urls = tuple(map(str, settings.vl_urls))
    return VlClient(_nodes(settings, "vl", urls, MAX_EMBEDDINGS_BYTES, probe=ask_vl_facts))


def _rewriter(settings: GatewaySettings) -> RewriterClient | None:
    if not settings.rewriter_urls:
        return None
    return RewriterClient(_nodes(settings, "rewriter", tuple(map(str, settings.rewriter_urls)), MAX_REWRITTEN_BYTES))


def _encoder(settings: GatewaySettings) -> Encoder:
    if not settings.use_api_encoder:
        return EncoderClient(_nodes(settings, "encoder", settings.encoders, MAX_EMBEDDINGS_BYTES))
    headers = {"authorization": f"Bearer {settings.api_key.get_secret_value()}"} if settings.api_key else None
    connect = partial(_client, "API encoder", 2 * MAX_EMBEDDINGS_BYTES, headers, foreign=True)
    nodes = Nodes("API encoder", [without_version(str(settings.api_url))], connect, probe=ask_foreign_facts)
    return ApiEncoderClient(nodes, settings.api_model)


def _diffusion(settings: GatewaySettings) -> DiffusionClient | None:
    if settings.encoder_only:
        return None
    max_reply_bytes = max(LEAST_REPLY_BYTES, REPLY_BYTES_PER_PIXEL * settings.max_pixels)
    return DiffusionClient(_nodes(settings, "diffusion", settings.diffusions, max_reply_bytes))


def _nodes(
    settings: GatewaySettings, name: str, urls: Sequence[str], max_reply_bytes: int, probe: Probe | None = None
) -> Nodes:
    return Nodes(name, urls, partial(_client, name, max_reply_bytes, settings.authorization), probe=probe)


def _client(
    name: str,
    max_reply_bytes: int,
    headers: Mapping[str, str] | None,
    url: str,
    address: str | None,
    *,
    foreign: bool = False,
) -> ServiceClient:
    return ServiceClient(name, url, max_reply_bytes=max_reply_bytes, headers=headers, address=address, foreign=foreign)
