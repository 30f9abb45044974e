"""Builds the vl service's application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TypedDict

import structlog
from fastapi import FastAPI

from services.vl.engine import Limits, VlEngine
from services.vl.loading import load_vision_model
from services.vl.model import VisionModel
from services.vl.routes import router
from services.vl.settings import VlSettings
from shared.health import Metrics
from shared.pictures import MAX_PICTURE_BYTES
from shared.service import create_service
from shared.wire import MAX_HEADER_BYTES

MAX_BODY_BYTES = MAX_PICTURE_BYTES + MAX_HEADER_BYTES
log = structlog.get_logger(__name__)

DESCRIPTION = "Turns a reference picture into hidden states of Qwen3-VL, and describes it."


class State(TypedDict):
    """What a request finds in `request.state`."""

    engine: VlEngine


def create_app(settings: VlSettings, *, model: VisionModel | None = None) -> FastAPI:
    """The app; with `model` given that one is used instead of reading `settings.vl_model_folder`."""
    metrics = Metrics("vl")

    def fail(exit_code: int) -> None:
        app.state.stop(exit_code)

    engine = VlEngine(
        partial(_load, settings) if model is None else lambda: model,
        Limits(max_waiting=settings.vl_max_waiting, max_tokens=settings.vl_max_tokens),
        settings,
        auto_unload=settings.vl_auto_unload,
        on_failure=fail,
    )
    metrics.gauge("zimage_vl_waiting", "Pictures that wait or are being read", lambda: engine.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        engine.device.start()
        yield State(engine=engine)
        await engine.stop()

    app = create_service(
        description=DESCRIPTION,
        lifespan=lifespan,
        routers=[router],
        readiness=engine.device.unready_reason,
        metrics=metrics,
        max_body_bytes=MAX_BODY_BYTES,
        token=settings.token,
    )
    return app


def _load(settings: VlSettings) -> VisionModel:
    """The model; its weights too, where they are to stay."""
    model = load_vision_model(settings)
    facts = model.facts
    log.info(
        "vision-language model found",
        model_path=facts.path,
        device=facts.device,
        dtype=facts.dtype,
        layers=facts.layers,
        fingerprint=facts.fingerprint,
    )
    if not settings.vl_auto_unload:
        model.require_room()
        model.load()
    return model
