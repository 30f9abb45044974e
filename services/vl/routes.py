"""The vl service's endpoints: HTTP in, HTTP out."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from services.vl.answers import tensor_answer
from services.vl.engine import VlEngine
from services.vl.messages import read_message
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
from shared.problems import responses
from shared.requests import until_disconnected
from shared.responses import ChunkedResponse
from shared.rewriting import FOLLOWED, rewriting_response
from shared.schemas.rewriter import Rewritten
from shared.schemas.vl import DescribeParameters, ExtractParameters, VlFacts

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
_TENSORS: dict[str, Any] = {"content": {wire.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
router = APIRouter(prefix="/v1", tags=["vl"])


async def engine_of(request: Request) -> VlEngine:
    """The engine that the lifespan made."""
    engine: VlEngine = request.state.engine
    return engine


Engine = Annotated[VlEngine, Depends(engine_of)]


async def require_tensors(request: Request) -> None:
    """Refuses a body that does not say it is safetensors. Raises WrongContentType."""
    if request.headers.get("content-type", "") != wire.MEDIA_TYPE:
        raise WrongContentType(f"Send the picture as safetensors with the header 'Content-Type: {wire.MEDIA_TYPE}'.")


@router.post(
    "/extract",
    summary="Hidden states of a picture",
    dependencies=[Depends(require_tensors)],
    response_class=Response,
    responses={**REFUSALS, 200: {**_TENSORS, "description": "The tensor `vl`, [tokens, width]."}},
    openapi_extra={"requestBody": _TENSORS},
)
async def extract(request: Request, engine: Engine) -> Response:
    """Takes one safetensors body: the bytes of a PNG, JPEG or WEBP as the tensor `image`, U8 [bytes], and the
    parameters as JSON in the metadata entry `parameters`. Answers the tensor `vl`, [tokens, width] in the model's own
    dtype, with the metadata entry `extracted`."""
    engine.check_room()
    started = time.perf_counter()
    picture, parameters = await read_message(request.stream(), ExtractParameters)
    extraction = await until_disconnected(request, engine.extract(picture, parameters))
    headers = {"Server-Timing": f"extract;dur={(time.perf_counter() - started) * 1000:.2f}"}
    chunks = tensor_answer(extraction, engine.facts, parameters.hidden_layer)
    return ChunkedResponse(chunks, media_type=wire.MEDIA_TYPE, headers=headers)


@router.post(
    "/describe",
    summary="A text about a picture",
    dependencies=[Depends(require_tensors)],
    response_model=Rewritten,
    responses={**REFUSALS, 200: FOLLOWED},
    openapi_extra={"requestBody": _TENSORS},
)
async def describe(request: Request, engine: Engine) -> Response:
    """Takes a picture as `/v1/extract` does, with other parameters. Answers JSON, or with `Accept: text/event-stream`
    events as the rewriter's `/v1/rewrite` does. Closing the connection ends the text at the next token."""
    engine.check_room()
    picture, parameters = await read_message(request.stream(), DescribeParameters)
    return await rewriting_response(request, engine.describe(picture, parameters))


@router.get("/model", summary="The model that this node serves", responses=responses(Unready))
async def model(request: Request, engine: Engine) -> VlFacts:
    """What it is, where it computes, its fingerprint, and whether its weights are in memory now."""
    facts = engine.facts
    return VlFacts(
        service="vl",
        version=request.app.version,
        name=facts.name,
        model_path=facts.path,
        device=facts.device,
        dtype=facts.dtype,
        width=facts.width,
        layers=facts.layers,
        target_std=facts.target_std,
        auto_unload=engine.auto_unload,
        loaded=engine.loaded,
        fingerprint=facts.fingerprint,
    )
