"""Builds the rewriter's application."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypedDict

from fastapi import FastAPI

from services.rewriter.backend import BackEnd
from services.rewriter.clients import ApiBackEnd
from services.rewriter.engine import RewriterEngine
from services.rewriter.routes import router
from services.rewriter.settings import BackEndKind, RewriterSettings
from shared.client import ServiceClient
from shared.health import Metrics
from shared.service import create_service

if TYPE_CHECKING:
    from shared.language.model import LanguageModel

MAX_BODY_BYTES = 1 << 20  # two texts of 32,000 characters, each at most 12 bytes in JSON
MAX_ANSWER_BYTES = 16 << 20
DESCRIPTION = "Makes short prompts longer with a language model."


class State(TypedDict):
    """What a request finds in `request.state`."""

    engine: RewriterEngine


def create_app(settings: RewriterSettings, *, model: "LanguageModel | None" = None) -> FastAPI:
    """The app; with `model` given that one writes instead of what the settings name."""
    metrics = Metrics("rewriter")

    def fail(exit_code: int) -> None:
        app.state.stop(exit_code)

    if model is not None or settings.back_end is BackEndKind.LOCAL:
        back_end = _local(settings, model, metrics, fail)
    else:
        back_end = _api(settings)
    engine = RewriterEngine(back_end, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with back_end:
            yield State(engine=engine)

    app = create_service(
        description=DESCRIPTION,
        lifespan=lifespan,
        routers=[router],
        readiness=engine.unready_reason,
        metrics=metrics,
        max_body_bytes=MAX_BODY_BYTES,
        token=settings.token,
    )
    return app


def _local(
    settings: RewriterSettings, model: "LanguageModel | None", metrics: Metrics, fail: Callable[[int], None]
) -> BackEnd:
    from services.rewriter.local import LocalBackEnd  # torch, which the other back ends do without
    from services.rewriter.model import load_language_model
    from shared.language.generations import WritingLimits

    back_end = LocalBackEnd(
        partial(load_language_model, settings) if model is None else lambda: model,
        WritingLimits(
            max_running=settings.rewriter_max_writing,
            max_waiting=settings.rewriter_max_waiting,
            max_cache_tokens=settings.rewriter_max_cache_tokens,
        ),
        on_failure=fail,
    )
    generations = back_end.generations
    metrics.gauge("zimage_rewriter_writing", "Prompts that are being written", lambda: generations.running)
    metrics.gauge("zimage_rewriter_waiting", "Prompts that wait", lambda: generations.waiting)
    return back_end


def _api(settings: RewriterSettings) -> BackEnd:
    upstream, ours = settings.upstream, settings.back_end is BackEndKind.ENCODER
    services = [
        ServiceClient(
            "encoder" if ours else "rewriter API",
            url,
            max_reply_bytes=MAX_ANSWER_BYTES,
            headers={"authorization": f"Bearer {upstream.key.get_secret_value()}"} if upstream.key else None,
            foreign=not ours,
        )
        for url in upstream.urls
    ]
    return ApiBackEnd(
        services,
        name="local" if ours else "api",
        model=settings.rewriter_api_model,
        timeout_s=settings.rewriter_api_timeout_s,
    )
