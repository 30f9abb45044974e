"""The encoder's endpoints: HTTP in, HTTP out."""

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from services.encoder.answers import json_answers, tensor_answer
from services.encoder.engine import EncoderEngine
from shared import wire
from shared.errors import (
    BodyTooLarge,
    ClientGone,
    InternalError,
    InvalidField,
    MalformedBody,
    OutOfMemory,
    QueueFull,
    Unready,
    WrongContentType,
)
from shared.problems import responses
from shared.requests import require_json, until_disconnected
from shared.responses import ChunkedResponse
from shared.schemas.encoder import (
    EncoderFacts,
    HiddenStates,
    HiddenStatesRequest,
    ModelInfo,
    ModelList,
    TokenizeRequest,
    Tokens,
)

REFUSALS = responses(
    MalformedBody,
    BodyTooLarge,
    WrongContentType,
    InvalidField,
    QueueFull,
    ClientGone,
    InternalError,
    OutOfMemory,
    Unready,
)
router = APIRouter(prefix="/v1", tags=["encoder"])


async def engine_of(request: Request) -> EncoderEngine:
    """The engine that the lifespan made."""
    engine: EncoderEngine = request.state.engine
    return engine


Engine = Annotated[EncoderEngine, Depends(engine_of)]


@router.post(
    "/hidden_states",
    summary="Hidden states of texts",
    dependencies=[Depends(require_json)],
    response_model=HiddenStates | list[HiddenStates],
    responses={**REFUSALS, 200: {"content": {wire.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def hidden_states(body: HiddenStatesRequest, request: Request, engine: Engine) -> Response:
    """Answers JSON (one object for one text, a list for several), or with `Accept: application/vnd.safetensors` the
    tensors `hidden_states.0`, `hidden_states.1`, ... in the model's own dtype, each [tokens, width]."""
    started = time.perf_counter()
    work = engine.encode(body.texts, layer=body.layer, max_length=body.max_length)
    encoded = await until_disconnected(request, work)
    headers = {"Server-Timing": f"encode;dur={(time.perf_counter() - started) * 1000:.2f}"}
    if wire.MEDIA_TYPE in request.headers.get("accept", ""):
        chunks = tensor_answer(encoded, engine.facts, body.layer)
        return ChunkedResponse(chunks, media_type=wire.MEDIA_TYPE, headers=headers)
    content = await asyncio.to_thread(json_answers, encoded, engine.facts, body)
    return Response(content, media_type="application/json", headers=headers)


@router.post("/tokenize", summary="Tokens of texts", dependencies=[Depends(require_json)], responses=REFUSALS)
async def tokenize(body: TokenizeRequest, engine: Engine) -> Tokens:
    """Special tokens in the text are recognized; none are added."""
    tokens = await engine.tokenize(body.texts)
    return Tokens(tokens=tokens, counts=[len(ids) for ids in tokens])


@router.get("/model", summary="What this node is", responses=responses(Unready))
async def model(request: Request, engine: Engine) -> EncoderFacts:
    """Name, device, dtype, fingerprint and size."""
    facts = engine.facts
    return EncoderFacts(
        service="encoder",
        version=request.app.version,
        name=facts.name,
        device=facts.device,
        dtype=facts.dtype,
        fingerprint=facts.fingerprint,
        width=facts.width,
        layers=facts.layers,
    )


@router.get("/models", summary="The model that this node serves", responses=responses(Unready))
async def models(engine: Engine) -> ModelList:
    """In the form of OpenAI's list, with device, dtype and size."""
    facts = engine.facts
    return ModelList(
        data=[ModelInfo(id=facts.name, device=facts.device, dtype=facts.dtype, width=facts.width, layers=facts.layers)]
    )
