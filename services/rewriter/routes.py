"""The rewriter's endpoint: HTTP in, HTTP out."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from services.rewriter.engine import RewriterEngine
from shared import events
from shared.errors import (
    BadUpstream,
    BodyTooLarge,
    ClientGone,
    InternalError,
    InvalidField,
    MalformedBody,
    NumericalError,
    OutOfMemory,
    QueueFull,
    Unreachable,
    Unready,
    UpstreamTimeout,
    WrongContentType,
)
from shared.problems import responses
from shared.requests import require_json, until_disconnected
from shared.schemas.rewriter import DONE, Piece, RewritePrompt, Rewritten

REFUSALS = responses(
    MalformedBody,
    BodyTooLarge,
    WrongContentType,
    InvalidField,
    QueueFull,
    ClientGone,
    InternalError,
    NumericalError,
    BadUpstream,
    OutOfMemory,
    Unready,
    Unreachable,
    UpstreamTimeout,
)
router = APIRouter(prefix="/v1", tags=["rewriter"])


async def engine_of(request: Request) -> RewriterEngine:
    """The engine that the lifespan made."""
    engine: RewriterEngine = request.state.engine
    return engine


Engine = Annotated[RewriterEngine, Depends(engine_of)]


@router.post(
    "/rewrite",
    summary="A longer prompt from a short one",
    dependencies=[Depends(require_json)],
    response_model=Rewritten,
    responses={**REFUSALS, 200: {"content": {events.MEDIA_TYPE: {"schema": {"type": "string"}}}}},
)
async def rewrite(body: RewritePrompt, request: Request, engine: Engine) -> Response:
    """Answers JSON, or with `Accept: text/event-stream` events as the text comes: `thinking` and `text` with pieces,
    `done` with the whole answer. Closing the connection ends the text at the next token."""
    if events.wants_events(request):
        return await events.event_response(request, _events(engine, body))
    rewritten = await until_disconnected(request, engine.rewrite(body))
    return JSONResponse(rewritten.model_dump())


async def _events(engine: RewriterEngine, body: RewritePrompt) -> AsyncGenerator[bytes]:
    async with aclosing(engine.follow(body)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Rewritten):
                yield events.event(piece.model_dump_json(), DONE)
            else:
                yield events.event(Piece(text=piece.text).model_dump_json(), piece.part)
