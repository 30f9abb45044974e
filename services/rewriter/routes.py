"""The rewriter's endpoint: HTTP in, HTTP out."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from services.rewriter.engine import RewriterEngine
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
from shared.events import wants_events
from shared.problems import responses
from shared.requests import require_json
from shared.rewriting import FOLLOWED, rewriting_response
from shared.schemas.node import NodeFacts
from shared.schemas.rewriter import RewritePrompt, Rewritten

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
    responses={**REFUSALS, 200: FOLLOWED},
)
async def rewrite(body: RewritePrompt, request: Request, engine: Engine) -> Response:
    """Answers JSON, or with `Accept: text/event-stream` events as the text comes: `thinking` and `text` with pieces,
    `done` with the whole answer. Closing the connection ends the text at the next token."""
    return await rewriting_response(request, engine.write(body, follow=wants_events(request)))


@router.get("/model", summary="What writes", responses=responses(Unready))
async def model(request: Request, engine: Engine) -> NodeFacts:
    """The language model, where it computes, and its fingerprint; of another server no more than its model's name."""
    facts = engine.facts
    return NodeFacts(
        service="rewriter",
        version=request.app.version,
        name=facts.model,
        device=facts.device,
        dtype=facts.dtype,
        fingerprint=facts.fingerprint,
    )
