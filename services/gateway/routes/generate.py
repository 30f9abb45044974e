"""`POST /api/generate`: one picture or several, at once or as events; giving them up; the LoRAs that they may have."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Body, Depends, Request, Response
from pydantic import BaseModel

from services.gateway.drawing import Generated, Happened
from services.gateway.engine import GatewayEngine
from services.gateway.pictures import multipart
from services.gateway.routes.refusals import CANCEL, GENERATE, LORAS
from services.gateway.state import Engine
from shared import events
from shared.problems import request_id_of
from shared.requests import require_json, until_disconnected
from shared.responses import ChunkedResponse
from shared.schemas.diffusion import DONE, CancelledAnswer, DiffusionParameters, Done, LoraList
from shared.schemas.public import GENERATE_EXAMPLES, GenerateRequest, SeveralPictures

PNG, JSON, MULTIPART = "image/png", "application/json", "multipart/mixed"
MAX_PROMPT_BYTES = 1_000  # of a header: proxies take some kilobytes of all of them
_ELLIPSIS = quote("…")
router = APIRouter(prefix="/api", tags=["generate"])

_BINARY = {"schema": {"type": "string", "format": "binary"}}
PICTURE: dict[str, Any] = {
    "model": SeveralPictures,
    "description": "The picture; several as `multipart/mixed` or, if the client accepts it, as JSON; or events.",
    "content": {
        PNG: _BINARY,
        MULTIPART: _BINARY,
        events.MEDIA_TYPE: {"schema": {"type": "string"}},
    },
    "headers": {
        "X-Generation-Time": {"description": "Seconds from the request to the picture.", "schema": {"type": "number"}},
        "X-Seed": {"description": "The seed that was used, also when it was drawn.", "schema": {"type": "integer"}},
        "X-History-Id": {"description": "Id of the picture in the history.", "schema": {"type": "integer"}},
        "X-History": {"description": "`unsaved` when the history could not be written.", "schema": {"type": "string"}},
        "Server-Timing": {"description": "Milliseconds of each stage.", "schema": {"type": "string"}},
        "X-Prompt": {
            "description": f"With `rewrite`: the prompt that was drawn, percent-encoded; {MAX_PROMPT_BYTES} bytes.",
            "schema": {"type": "string"},
        },
        "X-Original-Prompt": {
            "description": "With `rewrite`: the prompt that came, in the same form.",
            "schema": {"type": "string"},
        },
    },
}


@router.post(
    "/generate",
    summary="A picture from a prompt",
    dependencies=[Depends(require_json)],
    response_class=Response,
    responses={**GENERATE, 200: PICTURE},
)
async def generate(
    body: Annotated[GenerateRequest, Body(openapi_examples=GENERATE_EXAMPLES)], request: Request, engine: Engine
) -> Response:
    """Encodes the prompt, denoises and decodes, and answers the PNG. With `num_images` above 1 it answers
    `multipart/mixed`, or JSON to a client that accepts it; with `Accept: text/event-stream` the events `rewritten` (if
    that is asked for), `queued`, `step`, `preview` and, for each picture, `done`. Closing the connection stops it."""
    if events.wants_events(request):
        return await events.event_response(request, _stream(engine, body, request_id_of(request)))
    made = await until_disconnected(request, _pictures(engine, body, request_id_of(request)))
    if len(made) == 1:
        return Response(made[0].png, media_type=PNG, headers=headers_of(made[0]))
    if JSON in request.headers.get("accept", ""):
        return Response(await asyncio.to_thread(_as_json, made), media_type=JSON, headers=_headers_of_all(made))
    media_type, pieces = multipart([({"Content-Type": PNG, **headers_of(one)}, one.png) for one in made])
    return ChunkedResponse(pieces, media_type=media_type, headers=_headers_of_all(made))


@router.delete("/generate/{request_id}", summary="Give a picture up", responses=CANCEL)
async def cancel(request_id: str, engine: Engine) -> CancelledAnswer:
    """By the id of its request: that of the event `queued`, or the header `X-Request-ID`. The device is free at the
    next step; whoever waits for the picture is answered 409."""
    await engine.cancel(request_id)
    return CancelledAnswer(cancelled=request_id)


@router.get("/loras", summary="The LoRAs that pictures may have", responses=LORAS)
async def loras(engine: Engine) -> LoraList:
    """What is in the server's folder of LoRAs, with what the files say of themselves."""
    return await engine.loras()


def headers_of(made: Generated) -> dict[str, str]:
    """What is told of a picture beside its pixels."""
    return {
        "X-Generation-Time": f"{made.seconds:.3f}",
        "X-Seed": str(made.parameters.seed),
        "Server-Timing": made.server_timing,
        **_prompts(made),
        **_vision(made.parameters),
        **({"X-History": "unsaved"} if made.history_id is None else {"X-History-Id": str(made.history_id)}),
    }


def _vision(parameters: DiffusionParameters) -> dict[str, str]:
    """Of a picture with references: their share, of several together, and how they were blended in."""
    blending = parameters.blending
    if blending is None:
        return {}
    return {"X-VL-Alpha": f"{round(blending.alpha, 6):g}", "X-VL-Blend-Mode": blending.mode.value}


def _prompts(made: Generated) -> dict[str, str]:
    """Both prompts, where one was rewritten to the other."""
    if made.original_prompt is None:
        return {}
    return {"X-Prompt": in_header(made.prompt), "X-Original-Prompt": in_header(made.original_prompt)}


def in_header(text: str) -> str:
    """A text percent-encoded (RFC 3986); what is longer than a header should be ends with an ellipsis."""
    encoded = quote(text, safe="")
    if len(encoded) <= MAX_PROMPT_BYTES:
        return encoded
    kept = ""
    for char in text:
        piece = quote(char, safe="")
        if len(kept) + len(piece) + len(_ELLIPSIS) > MAX_PROMPT_BYTES:
            break
        kept += piece
    return kept + _ELLIPSIS


def _headers_of_all(made: Sequence[Generated]) -> dict[str, str]:
    """Of an answer with several pictures: the longest of their times, the first of their seeds, what they share."""
    first, seconds = made[0], max(one.seconds for one in made)
    return {
        "X-Generation-Time": f"{seconds:.3f}",
        "X-Seed": str(first.parameters.seed),
        **_prompts(first),
        **_vision(first.parameters),
    }


def _as_json(made: Sequence[Generated]) -> str:
    return SeveralPictures(images=[_done(one) for one in made]).model_dump_json()


def _done(made: Generated) -> Done:
    return Done(headers=headers_of(made), image_b64=base64.b64encode(made.png).decode())


async def _pictures(engine: GatewayEngine, body: GenerateRequest, request_id: str | None) -> list[Generated]:
    async with aclosing(engine.generate(body, request_id=request_id)) as told:
        made = [item async for item in told if isinstance(item, Generated)]
    return sorted(made, key=lambda one: one.index)


async def _stream(engine: GatewayEngine, body: GenerateRequest, request_id: str | None) -> AsyncGenerator[bytes]:
    async with aclosing(engine.generate(body, request_id=request_id, watched=True)) as told:
        async for item in told:
            yield await asyncio.to_thread(_done_event, item) if isinstance(item, Generated) else _event(item)


def _event(happened: Happened) -> bytes:
    return _indexed(happened.index, happened.progress.fields, happened.progress.name)


def _done_event(made: Generated) -> bytes:
    return _indexed(made.index, _done(made), DONE)


def _indexed(index: int, fields: BaseModel, name: str) -> bytes:
    """An event of the diffusion service with the picture's place among those that were asked for."""
    return events.event(json.dumps({"index": index, **fields.model_dump()}), name)
