"""Builds the diffusion service's application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TypedDict

from fastapi import FastAPI

from services.diffusion.engine import DiffusionEngine
from services.diffusion.loading import limits_of, load_zimage
from services.diffusion.model import ZImageModel
from services.diffusion.routes import router
from services.diffusion.settings import DiffusionSettings
from shared.bodies import BodyLimits
from shared.health import Metrics
from shared.service import create_service

MAX_BODY_BYTES = 512 << 20  # embeddings of 40,960 tokens and their negative, in bfloat16 at width 2560, and a little
USUAL_BODY_BYTES = 16 << 20  # a prompt of 512 tokens has 2.6 MB; larger bodies share `LARGE_BODIES_BYTES`
LARGE_BODIES_BYTES = 2 << 30
DESCRIPTION = "Turns the hidden states of a prompt into a PNG, step by step."


class State(TypedDict):
    """What a request finds in `request.state`."""

    engine: DiffusionEngine
    settings: DiffusionSettings


def create_app(settings: DiffusionSettings, *, model: ZImageModel | None = None) -> FastAPI:
    """The app; with `model` given that one is used instead of loading `settings.model_folder`."""
    metrics = Metrics("diffusion")

    def fail(exit_code: int) -> None:
        app.state.stop(exit_code)

    engine = DiffusionEngine(
        partial(load_zimage, settings) if model is None else lambda: model,
        limits_of(settings),
        max_waiting=settings.diffusion_max_waiting,
        png_compression=settings.png_compression,
        memory_bytes=settings.diffusion_memory_bytes,
        on_failure=fail,
    )
    pictures = engine.pictures
    metrics.gauge("zimage_diffusion_waiting", "Pictures that wait", lambda: len(pictures.waiting))
    metrics.gauge("zimage_diffusion_running", "Pictures in the making", lambda: len(pictures.running))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        engine.device.start()
        yield State(engine=engine, settings=settings)
        await engine.stop()

    app = create_service(
        description=DESCRIPTION,
        lifespan=lifespan,
        routers=[router],
        readiness=engine.device.unready_reason,
        metrics=metrics,
        max_body_bytes=BodyLimits(USUAL_BODY_BYTES, {"/v1/generate": MAX_BODY_BYTES}, LARGE_BODIES_BYTES),
        token=settings.token,
    )
    return app
