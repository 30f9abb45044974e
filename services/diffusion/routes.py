"""The diffusion service's endpoints: HTTP in, HTTP out."""

import base64
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from services.diffusion.engine import DiffusionEngine, PictureRequest, Timings
from services.diffusion.messages import judge_header, read_message
from services.diffusion.settings import DiffusionSettings
from shared import wire
from shared.errors import (
    BodyTooLarge,
    ClientGone,
    InternalError,
    InvalidField,
    MalformedBody,
    NumericalError,
    OutOfMemory,
    QueueFull,
    Unready,
    WrongContentType,
)
from shared.problems import request_id_of, responses
from shared.requests import until_disconnected
from shared.schemas.diffusion import THUMBNAIL_HEADER, DiffusionFacts, Queue, RunningPicture

REFUSALS = responses(
    MalformedBody,
    BodyTooLarge,
    WrongContentType,
    InvalidField,
    QueueFull,
    ClientGone,
    InternalError,
    NumericalError,
    OutOfMemory,
    Unready,
)
router = APIRouter(prefix="/v1", tags=["diffusion"])


async def engine_of(request: Request) -> DiffusionEngine:
    """The engine that the lifespan made."""
    engine: DiffusionEngine = request.state.engine
    return engine


async def settings_of(request: Request) -> DiffusionSettings:
    """The service's settings."""
    settings: DiffusionSettings = request.state.settings
    return settings


Engine = Annotated[DiffusionEngine, Depends(engine_of)]
Settings = Annotated[DiffusionSettings, Depends(settings_of)]


async def require_tensors(request: Request) -> None:
    """Refuses a body that does not say it is safetensors. Raises WrongContentType."""
    if request.headers.get("content-type", "") != wire.MEDIA_TYPE:
        raise WrongContentType(f"Send the embeddings as safetensors with the header 'Content-Type: {wire.MEDIA_TYPE}'.")


@router.post(
    "/generate",
    summary="A picture from embeddings",
    dependencies=[Depends(require_tensors)],
    response_class=Response,
    responses={**REFUSALS, 200: {"content": {"image/png": {}}, "description": "The picture."}},
    openapi_extra={"requestBody": {"content": {wire.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def generate(request: Request, engine: Engine, settings: Settings) -> Response:
    """Takes one safetensors body: the tensors `text` and, with guidance, `negative`, each [tokens, width], and the
    parameters as JSON in the metadata entry `parameters`. The header `X-Thumbnail` of the answer holds a small JPEG in
    base64. A client that goes away stops its picture at the next step.
    """
    engine.check_room()
    judge = partial(judge_header, facts=engine.facts, max_pixels=settings.max_pixels)
    message, header, parameters = await read_message(request.stream(), judge)
    work = engine.generate(PictureRequest(parameters, message, header, request_id_of(request)))
    picture = await until_disconnected(request, work)
    headers = {
        "Server-Timing": server_timing(picture.timings),
        THUMBNAIL_HEADER: base64.b64encode(picture.thumbnail).decode(),
    }
    return Response(picture.png, media_type="image/png", headers=headers)


def server_timing(timings: Timings) -> str:
    """The stages in the form of the Server-Timing header, in milliseconds."""
    stages = (("queue", timings.queue), ("denoise", timings.denoise), ("decode", timings.decode), ("png", timings.png))
    return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages)


@router.get("/queue", summary="What runs and what waits")
async def queue(engine: Engine) -> Queue:
    """The steps that each running picture has done, and how many wait."""
    return Queue(
        running=[
            RunningPicture(request_id=job.request.request_id, step=job.step, steps=job.request.parameters.steps)
            for job in engine.running
        ],
        waiting=engine.waiting,
        max_waiting=engine.max_waiting,
    )


@router.get("/model", summary="What the loaded checkpoint takes", responses=responses(Unready))
async def model(engine: Engine, settings: Settings) -> DiffusionFacts:
    """Device, dtype and limits."""
    facts = engine.facts
    return DiffusionFacts(
        device=facts.device,
        dtype=facts.dtype,
        text_width=facts.text_width,
        text_limit=facts.text_limit,
        max_pixels=settings.max_pixels,
    )
