"""The diffusion service's endpoints: HTTP in, HTTP out."""

import asyncio
import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from services.diffusion.engine import DiffusionEngine, PreviewReady, Told
from services.diffusion.jobs import Picture, PictureRequest, StepDone, Timings, Waits
from services.diffusion.messages import judge_header, read_message
from services.diffusion.settings import DiffusionSettings
from shared import events, wire
from shared.errors import (
    BodyTooLarge,
    Cancelled,
    ClientGone,
    DeviceFailed,
    InternalError,
    InvalidField,
    MalformedBody,
    NotBegun,
    NumericalError,
    OutOfMemory,
    QueueFull,
    UnknownName,
    Unready,
    UpstreamTimeout,
    WrongContentType,
)
from shared.problems import request_id_of, responses
from shared.requests import until_disconnected
from shared.schemas.diffusion import (
    DONE,
    PREVIEW,
    QUEUED,
    STEP,
    THUMBNAIL_HEADER,
    CancelledAnswer,
    DiffusionFacts,
    Done,
    LoraEntry,
    LoraList,
    Preview,
    Queue,
    Queued,
    RunningPicture,
    Stepped,
)

REFUSALS = responses(
    MalformedBody,
    UnknownName,
    Cancelled,
    BodyTooLarge,
    WrongContentType,
    InvalidField,
    QueueFull,
    ClientGone,
    InternalError,
    NumericalError,
    OutOfMemory,
    Unready,
    NotBegun,
    DeviceFailed,
    UpstreamTimeout,
)
PICTURE = {
    "content": {"image/png": {}, events.MEDIA_TYPE: {"schema": {"type": "string"}}},
    "description": "The picture, or what happens to it until it is there.",
}
LARGE_PNG_BYTES = 64 << 10
"""The event of a larger one is made in a thread: that takes about 10 ms for each megabyte."""
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
    responses={**REFUSALS, 200: PICTURE},
    openapi_extra={"requestBody": {"content": {wire.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def generate(request: Request, engine: Engine, settings: Settings) -> Response:
    """Takes one safetensors body: the tensors `text` and, with guidance, `negative`, each [tokens, width], and the
    parameters as JSON in the metadata entry `parameters`. Answers the PNG, or with `Accept: text/event-stream` the
    events `queued`, `step`, `preview` and `done`. The header `X-Thumbnail` holds a small JPEG in base64. A client that
    goes away stops its picture at the next step.
    """
    engine.check_room()
    judge = partial(judge_header, facts=engine.facts, max_pixels=settings.max_pixels)
    message, header, parameters = await read_message(request.stream(), judge)
    wanted = PictureRequest(parameters, message, header, request_id_of(request))
    if events.wants_events(request):
        return await events.event_response(request, _stream(engine, wanted))
    picture = await until_disconnected(request, _picture(engine, wanted))
    return Response(picture.png, media_type="image/png", headers=headers_of(picture))


@router.delete(
    "/generate/{request_id}", summary="Give a picture up", responses=responses(UnknownName, InvalidField, InternalError)
)
async def cancel(request_id: str, engine: Engine) -> CancelledAnswer:
    """By the id of its request. Its client is told so; the device is free at the next step."""
    engine.cancel(request_id)
    return CancelledAnswer(cancelled=request_id)


@router.get("/queue", summary="What runs and what waits")
async def queue(engine: Engine) -> Queue:
    """The steps that each running picture has done, and how many wait."""
    return Queue(
        running=[
            RunningPicture(request_id=job.request.request_id, step=job.step, steps=job.request.parameters.steps)
            for job in engine.pictures.running
        ],
        waiting=len(engine.pictures.waiting),
        max_waiting=engine.pictures.max_waiting,
    )


@router.get("/loras", summary="The LoRAs that requests may name", responses=responses(Unready))
async def loras(engine: Engine) -> LoraList:
    """What is in the folder of LoRAs now; a file that is not whole safetensors is left out."""
    files, default = await engine.loras()
    scales = dict(default)
    return LoraList(
        loras=[
            LoraEntry(
                name=one.name, bytes=one.bytes, rank=one.rank, metadata=dict(one.metadata), default=scales.get(one.name)
            )
            for one in files
        ]
    )


@router.get("/model", summary="What the loaded checkpoint takes", responses=responses(Unready))
async def model(request: Request, engine: Engine, settings: Settings) -> DiffusionFacts:
    """Device, dtype, fingerprint and limits."""
    facts = engine.facts
    return DiffusionFacts(
        service="diffusion",
        version=request.app.version,
        name=facts.name,
        fingerprint=facts.fingerprint,
        device=facts.device,
        dtype=facts.dtype,
        text_width=facts.text_width,
        text_limit=facts.text_limit,
        max_pixels=settings.max_pixels,
    )


def headers_of(picture: Picture) -> dict[str, str]:
    """What is told of a picture beside its pixels."""
    thumbnail = base64.b64encode(picture.thumbnail).decode()
    return {"Server-Timing": server_timing(picture.timings), THUMBNAIL_HEADER: thumbnail}


def server_timing(timings: Timings) -> str:
    """The stages in the form of the Server-Timing header, in milliseconds."""
    stages = (("queue", timings.queue), ("denoise", timings.denoise), ("decode", timings.decode), ("png", timings.png))
    return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages)


async def _picture(engine: DiffusionEngine, wanted: PictureRequest) -> Picture:
    async with aclosing(engine.generate(wanted)) as told:
        async for item in told:
            if isinstance(item, Picture):
                return item
    raise InternalError("The picture was lost.")


async def _stream(engine: DiffusionEngine, wanted: PictureRequest) -> AsyncGenerator[bytes]:
    async with aclosing(engine.generate(wanted, watched=True)) as told:
        async for item in told:
            if isinstance(item, Picture) and len(item.png) > LARGE_PNG_BYTES:
                yield await asyncio.to_thread(_event, item, wanted.request_id)
            else:
                yield _event(item, wanted.request_id)


def _event(item: Told, request_id: str | None) -> bytes:
    """The event that tells it, as it is sent."""
    name, body = _body(item, request_id)
    return events.event(body.model_dump_json(), name)


def _body(item: Told, request_id: str | None) -> tuple[str, BaseModel]:
    match item:
        case Waits():
            return QUEUED, Queued(id=request_id, place=item.place)
        case StepDone():
            left = round(item.seconds_left, 3)
            return STEP, Stepped(step=item.step, steps=item.steps, seconds_left=left)
        case PreviewReady():
            return PREVIEW, Preview(step=item.step, image_b64=base64.b64encode(item.jpeg).decode())
        case Picture():
            return DONE, Done(headers=headers_of(item), image_b64=base64.b64encode(item.png).decode())
