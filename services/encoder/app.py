"""Builds the encoder's application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TypedDict

from fastapi import FastAPI

from services.encoder import completions, routes
from services.encoder.engine import EncoderEngine, Limits
from services.encoder.model import TextEncoder, load_text_encoder
from services.encoder.settings import EncoderSettings
from shared.health import Metrics
from shared.language.generations import WritingLimits
from shared.service import create_service

MAX_BODY_BYTES = 16 << 20
DESCRIPTION = "Turns texts into the hidden states of Qwen3, many at a time, and writes with the same weights."


class State(TypedDict):
    """What a request finds in `request.state`."""

    engine: EncoderEngine


def create_app(settings: EncoderSettings, *, model: TextEncoder | None = None) -> FastAPI:
    """The app; with `model` given that one is used instead of loading `settings.model_folder`."""
    metrics = Metrics("encoder")

    def fail(exit_code: int) -> None:
        app.state.stop(exit_code)

    load = partial(load_text_encoder, settings) if model is None else lambda: model
    engine = EncoderEngine(load, _limits(settings), _writing_limits(settings), on_failure=fail)
    metrics.gauge("zimage_encoder_waiting", "Texts that wait for their hidden states", lambda: engine.waiting)
    writing = engine.generations
    metrics.gauge("zimage_encoder_writing", "Chat completions that are being written", lambda: writing.running)
    metrics.gauge("zimage_encoder_waiting_chats", "Chat completions that wait", lambda: writing.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        engine.device.start()
        yield State(engine=engine)
        await engine.stop()

    app = create_service(
        description=DESCRIPTION,
        lifespan=lifespan,
        routers=[routes.router, completions.router],
        readiness=engine.device.unready_reason,
        metrics=metrics,
        max_body_bytes=MAX_BODY_BYTES,
        token=settings.token,
    )
    return app


def _limits(settings: EncoderSettings) -> Limits:
    return Limits(
        max_batch_tokens=settings.encoder_max_batch_tokens,
        max_batch_texts=settings.encoder_max_batch_texts,
        max_waiting=settings.encoder_max_waiting,
        max_tokens=settings.encoder_max_tokens,
    )


def _writing_limits(settings: EncoderSettings) -> WritingLimits:
    return WritingLimits(
        max_running=settings.encoder_max_writing,
        max_waiting=settings.encoder_max_waiting_chats,
        max_cache_tokens=settings.encoder_max_cache_tokens,
    )
