"""How the services that write answer: with the whole text, or with events as it comes."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from shared import events
from shared.language.thinking import Piece
from shared.requests import until_disconnected
from shared.schemas.rewriter import DONE, Rewritten
from shared.schemas.rewriter import Piece as PieceBody

FOLLOWED: dict[str, Any] = {"content": {events.MEDIA_TYPE: {"schema": {"type": "string"}}}}
"""The answer in its second form, for the OpenAPI document."""


async def rewriting_response(request: Request, written: AsyncGenerator[Piece | Rewritten]) -> Response:
    """JSON with the last item, or events where the client asks for them: `thinking` and `text` with the pieces, `done`
    with the last item. When the client goes away the generator is closed. Raises what it raises before its first item,
    and ClientGone."""
    if events.wants_events(request):
        return await events.event_response(request, _events(written))
    whole = await until_disconnected(request, _whole(written))
    return JSONResponse(whole.model_dump())


async def _whole(written: AsyncGenerator[Piece | Rewritten]) -> Rewritten:
    async with aclosing(written) as pieces:
        *_, last = [piece async for piece in pieces]
    assert isinstance(last, Rewritten)  # noqa: S101 - every writer ends with it
    return last


async def _events(written: AsyncGenerator[Piece | Rewritten]) -> AsyncGenerator[bytes]:
    async with aclosing(written) as pieces:
        async for piece in pieces:
            if isinstance(piece, Rewritten):
                yield events.event(piece.model_dump_json(), DONE)
            else:
                yield events.event(PieceBody(text=piece.text).model_dump_json(), piece.part)
