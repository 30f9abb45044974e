"""`POST /api/rewrite` and `GET /api/rewriters`."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Request, Response
from fastapi.responses import JSONResponse

from services.gateway.routes.refusals import LIST, REWRITE
from services.gateway.state import Engine
from services.gateway.written import RewriteEvent
from shared import events
from shared.requests import require_json, until_disconnected
from shared.schemas.public import RewriterEntry, RewriterList
from shared.schemas.rewriter import DONE, REWRITE_EXAMPLES, RewriteAnswer, RewriteRequest

router = APIRouter(prefix="/api", tags=["rewrite"])

_FOLLOWED = {
    "description": "The rewritten prompt.",
    "content": {
        events.MEDIA_TYPE: {
            "schema": {"type": "string"},
            "example": 'event: text\ndata: {"text":"A fluffy orange"}\n\nevent: text\ndata: {"text":" cat"}\n\n',
        }
    },
}


@router.post(
    "/rewrite",
    summary="A longer prompt from a short one",
    dependencies=[Depends(require_json)],
    response_model=RewriteAnswer,
    responses={**REWRITE, 200: _FOLLOWED},
)
async def rewrite(
    body: Annotated[RewriteRequest, Body(openapi_examples=REWRITE_EXAMPLES)], request: Request, engine: Engine
) -> Response:
    """Rewrites a prompt by a template (`rewriter`) or by `custom_system_prompt`.

    Answers JSON, or with `Accept: text/event-stream` events as the text comes: `thinking` and `text` with pieces of it,
    `done` with the whole answer, `error` with a problem. Closing the connection ends the work.
    """
    if events.wants_events(request):
        return await events.event_response(request, _events(engine, body))
    answer = await until_disconnected(request, engine.rewrite(body))
    return JSONResponse(answer.model_dump())


@router.get("/rewriters", summary="Templates for the rewriter", responses=LIST)
async def rewriters(engine: Engine) -> RewriterList:
    """Templates of the category `rewriter`."""
    return RewriterList(
        rewriters=[
            RewriterEntry(name=template.name, description=template.description)
            for template in engine.templates.rewriters.values()
        ]
    )


async def _events(engine: Engine, body: RewriteRequest) -> AsyncGenerator[bytes]:
    async with aclosing(engine.follow_rewriting(body)) as pieces:
        async for piece in pieces:
            if isinstance(piece, RewriteEvent):
                yield events.event(piece.data, piece.name)
            else:
                yield events.event(piece.model_dump_json(), DONE)
