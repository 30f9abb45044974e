"""Vision conditioning: what is made of reference pictures. Knows no HTTP.

What was extracted is kept under an id of everything that determines it, so equal requests share one extraction.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from services.gateway.clients import Embeddings
from services.gateway.embeddings import EmbeddingCache, Kept
from services.gateway.references import Reference, VlClient, id_of, read_reference
from services.gateway.settings import GatewaySettings
from services.gateway.written import RewriteEvent
from shared.errors import InvalidField, UnknownName, Unreachable, Unready
from shared.pictures import decode_picture
from shared.schemas.diffusion import Blending
from shared.schemas.fields import BlendMode
from shared.schemas.rewriter import Rewritten
from shared.schemas.vl import (
    DescribeParameters,
    ExtractOptions,
    ExtractParameters,
    VlConfig,
    VlGenerateRequest,
    VlReference,
    VlStatus,
)

NO_VISION = "This server has no vision conditioning: start it with --vl-model-path."
NO_CACHE = "This server keeps no embeddings: it was started without Redis."

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """A reference under its id, and the seconds that it took to get it."""

    embeddings_id: str
    reference: Reference
    seconds: float


@dataclass(frozen=True, slots=True)
class Seen:
    """The references of a picture, how they are blended in, the request's fields to keep with the picture, and the
    seconds that it took."""

    references: tuple[Embeddings, ...]
    blending: Blending
    fields: dict[str, Any]
    seconds: float


class Vision:
    """Has reference pictures read by the vl service, if there is one, and keeps what came of it."""

    def __init__(self, settings: GatewaySettings, client: VlClient | None, cache: EmbeddingCache | None) -> None:
        self._settings = settings
        self._model_folder = settings.vl_model_folder  # looked up once: a request is not to wait for a disk
        self._client = client
        self._cache = cache

    @property
    def client(self) -> VlClient:
        """The vl service. Raises Unready when this server has none."""
        if self._client is None:
            raise Unready(NO_VISION)
        return self._client

    @property
    def cache(self) -> EmbeddingCache:
        """Where embeddings are kept. Raises Unready when there is no vl service, or no Redis."""
        _ = self.client
        if self._cache is None:
            raise Unready(NO_CACHE)
        return self._cache

    async def status(self, *, available: bool) -> VlStatus:
        """What there is; answers also while the vl service or Redis is away."""
        ids: list[str] = []
        if self._cache is not None and self._client is not None:
            with suppress(Unreachable):
                ids = await self._cache.ids()
        facts = None if self._client is None else self._client.facts
        path = self._model_folder
        return VlStatus(
            available=available,
            configured=self._client is not None,
            model_path=facts.model_path if facts else None if path is None else str(path),
            device=facts.device if facts else None if self._client is None else self._settings.vl_device.value,
            default_alpha=self._settings.vl_alpha,
            default_hidden_layer=self._settings.vl_hidden_layer,
            blend_modes=list(BlendMode),
            cached_embeddings=ids,
        )

    def config(self) -> VlConfig:
        """The defaults of a request's fields."""
        defaults = self._settings
        facts = None if self._client is None else self._client.facts
        return VlConfig(
            alpha=defaults.vl_alpha,
            hidden_layer=defaults.vl_hidden_layer,
            auto_unload=facts.auto_unload if facts else defaults.vl_auto_unload,
            blend_mode=defaults.vl_blend_mode,
            outlier_masking=defaults.vl_outlier_masking,
            style_share=defaults.vl_style_share,
        )

    async def extract(self, picture: bytes, options: ExtractOptions) -> Found:
        """The embeddings of a picture, which are kept from now on. Raises a ServiceError."""
        _ = self.cache
        parameters = ExtractParameters(
            text=options.text or None,
            hidden_layer=_or(options.hidden_layer, self._settings.vl_hidden_layer),
            image_tokens_only=options.image_tokens_only,
            scale_to_text=options.scale_to_text,
        )
        return await self._found(picture, parameters, timeout_s=self._settings.vl_timeout_s, must_keep=True)

    async def see(self, request: VlGenerateRequest, left_s: Callable[[], float]) -> Seen:
        """The references of a request, extracted where that was not done before; `left_s` says how many seconds there
        are. Raises a ServiceError."""
        _ = self.client
        started, wanted = time.perf_counter(), self._wanted(request)
        found = [await self._look(request, one, left_s()) for one in wanted]
        blending = Blending(
            mode=_or(request.vl_blend_mode, self._settings.vl_blend_mode),
            alphas=[one.alpha for one in wanted],
            style_share=_or(request.vl_style_share, self._settings.vl_style_share),
            outlier_masking=_or(request.vl_outlier_masking, self._settings.vl_outlier_masking),
        )
        return Seen(
            tuple(one.reference.embeddings for one in found),
            blending,
            _fields(request, found, blending),
            time.perf_counter() - started,
        )

    async def describe(self, text: str, parameters: DescribeParameters, *, timeout_s: float) -> Rewritten:
        """A text about the picture that `text` is in base64. Raises a ServiceError."""
        client = self.client
        picture = await asyncio.to_thread(decode_picture, text, "image")
        return await client.describe(picture, parameters, timeout_s=timeout_s)

    async def follow_description(
        self, text: str, parameters: DescribeParameters, *, timeout_s: float
    ) -> AsyncGenerator[RewriteEvent | Rewritten]:
        """The same as it comes. Closing the generator ends the text. Raises a ServiceError."""
        client = self.client
        picture = await asyncio.to_thread(decode_picture, text, "image")
        async with aclosing(client.follow_description(picture, parameters, timeout_s=timeout_s)) as events:
            async for event in events:
                yield event

    def _wanted(self, request: VlGenerateRequest) -> Sequence[VlReference]:
        if request.vl_references is not None:
            if request.vl_image is not None or request.vl_embeddings_id is not None:
                raise InvalidField("'vl_references' takes the place of 'vl_image' and 'vl_embeddings_id'.")
            return request.vl_references
        alpha = _or(request.vl_alpha, self._settings.vl_alpha)
        if request.vl_embeddings_id is not None:
            return [VlReference(embeddings_id=request.vl_embeddings_id, alpha=alpha)]
        if request.vl_image is None:
            raise InvalidField("Either 'vl_image', 'vl_embeddings_id' or 'vl_references' must be given.")
        return [VlReference(embeddings_id=None, image=request.vl_image, alpha=alpha)]

    async def _look(self, request: VlGenerateRequest, wanted: VlReference, timeout_s: float) -> Found:
        if wanted.image is None:
            started, embeddings_id = time.perf_counter(), wanted.embeddings_id or ""
            message = await self.cache.get(embeddings_id)
            if message is None:
                raise UnknownName("There are no embeddings of that id (any more); POST /api/vl/extract makes them.")
            return _found(read_reference(message), embeddings_id, started)
        field = "vl_image" if request.vl_references is None else "vl_references"
        picture = await asyncio.to_thread(decode_picture, wanted.image, field)
        parameters = ExtractParameters(
            text=request.vl_text or None,
            hidden_layer=_or(request.vl_hidden_layer, self._settings.vl_hidden_layer),
            image_tokens_only=request.vl_image_tokens_only,
            scale_to_text=True,
        )
        return await self._found(picture, parameters, timeout_s=timeout_s, must_keep=False)

    async def _found(
        self, picture: bytes, parameters: ExtractParameters, *, timeout_s: float, must_keep: bool
    ) -> Found:
        """From the cache, else extracted and kept; without `must_keep` also while Redis is away."""
        started = time.perf_counter()
        end = started + min(timeout_s, self._settings.vl_timeout_s)
        facts = self.client.facts or await self.client.ask_facts()
        embeddings_id = await asyncio.to_thread(id_of, picture, parameters, facts.fingerprint)
        if self._cache is None:
            return _found(await self._extracted(picture, parameters, end), embeddings_id, started)

        async def make() -> Kept:
            reference, its_id = await self._extracted(picture, parameters, end), embeddings_id
            if reference.told.fingerprint != facts.fingerprint:  # another model has come meanwhile
                its_id = await asyncio.to_thread(id_of, picture, parameters, reference.told.fingerprint)
            return Kept(its_id, reference.message)

        left_s = end - time.perf_counter()
        kept = await self._cache.find_or_make(embeddings_id, make, timeout_s=left_s, must_keep=must_keep)
        return _found(read_reference(kept.message), kept.embeddings_id, started)

    async def _extracted(self, picture: bytes, parameters: ExtractParameters, end: float) -> Reference:
        left_s = max(0.001, end - time.perf_counter())
        return await self.client.extract(picture, parameters, timeout_s=left_s)


def _found(reference: Reference, embeddings_id: str, started: float) -> Found:
    return Found(embeddings_id, reference, time.perf_counter() - started)


def _fields(request: VlGenerateRequest, found: Sequence[Found], blending: Blending) -> dict[str, Any]:
    """What is kept with a picture: the ids in place of the pictures that were sent."""
    several = [
        {"embeddings_id": one.embeddings_id, "alpha": alpha} for one, alpha in zip(found, blending.alphas, strict=True)
    ]
    return {
        "vl_embeddings_id": found[0].embeddings_id if request.vl_references is None else None,
        "vl_references": None if request.vl_references is None else several,
        "vl_alpha": blending.alpha if request.vl_references is None else None,
        "vl_hidden_layer": found[0].reference.told.hidden_layer,
        "vl_blend_mode": blending.mode.value,
        "vl_outlier_masking": blending.outlier_masking.value,
        "vl_style_share": blending.style_share,
    }


def _or(given: T | None, default: T) -> T:
    return default if given is None else given
