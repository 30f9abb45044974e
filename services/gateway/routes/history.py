"""The history of pictures."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from enum import StrEnum
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse

from services.gateway.state import Kept
from services.gateway.store import MAX_INDEX, Row
from shared.errors import InvalidField, QueueFull, UnknownName, Unreachable, Unready
from shared.problems import responses
from shared.schemas.history import ClearedAnswer, DeletedAnswer, HistoryAnswer

MAX_LIMIT = 10_000
router = APIRouter(prefix="/api/history", tags=["history"])
AWAY = responses(InvalidField, Unready, Unreachable)
MAX_ID = 2**63 - 1
LARGE_BYTES = 256 << 10  # of a picture, whose base64 is not written in the event loop


class Images(StrEnum):
    """Which picture comes with each entry."""

    NONE = "none"
    THUMB = "thumb"
    FULL = "full"


_FIELDS = {Images.FULL: "image_b64", Images.THUMB: "thumb_b64"}


@router.get("", summary="What was made", response_model=HistoryAnswer, responses={**AWAY, **responses(QueueFull)})
async def history(
    kept: Kept,
    limit: Annotated[int | None, Query(ge=0, le=MAX_LIMIT, description="At most this many entries.")] = None,
    offset: Annotated[int, Query(ge=0, le=MAX_INDEX, description="Leave out this many of the oldest.")] = 0,
    images: Annotated[Images, Query(description="Whether entries carry a picture; `none` is quick.")] = Images.FULL,
) -> Response:
    """Oldest first. An entry keeps its index while others are added, until the history is full: then the oldest goes
    with each new one. `X-Total-Count` counts all entries."""
    total = await kept.count()
    rows = kept.entries(offset=offset, limit=limit, images=images)
    first = await anext(rows, None)  # what cannot be read is refused before the answer begins
    return StreamingResponse(
        _as_json(first, rows, _FIELDS.get(images)),
        media_type="application/json",
        headers={"X-Total-Count": str(total)},
    )


@router.get(
    "/{entry_id}/image",
    summary="The PNG of an entry",
    response_class=Response,
    responses={**AWAY, **responses(UnknownName), 200: {"content": {"image/png": {}}, "description": "The picture."}},
)
async def image(kept: Kept, entry_id: int) -> Response:
    """By the entry's id, which never changes and is never used again."""
    return Response(
        await kept.image(entry_id),
        media_type="image/png",
        headers={"Cache-Control": "private, max-age=86400, immutable"},
    )


@router.delete(
    "/{index}",
    summary="Delete one entry",
    response_model=DeletedAnswer,
    responses={**AWAY, **responses(UnknownName)},
)
async def delete(
    kept: Kept,
    index: int,
    entry_id: Annotated[
        int | None,
        Query(alias="id", ge=0, le=MAX_ID, description="Only if the entry at that index has this id, else 404."),
    ] = None,
) -> JSONResponse:
    """By its place in the list, 0 being the oldest; with `id` never another than the one that was listed there. The
    entry is answered as it was kept, by whichever version."""
    deleted = await kept.delete(index, entry_id)
    return JSONResponse({"deleted": deleted.entry, "remaining": deleted.remaining})


@router.delete("", summary="Delete every entry", responses=AWAY)
async def clear(kept: Kept) -> ClearedAnswer:
    """Ids go on counting from where they were."""
    return ClearedAnswer(cleared=await kept.clear())


async def _as_json(first: Row | None, rows: AsyncGenerator[Row], image_field: str | None) -> AsyncIterator[str]:
    async with aclosing(rows):
        yield '{"history":['
        if first is not None:
            yield await _entry(first, image_field)
            async for row in rows:
                yield "," + await _entry(row, image_field)
        yield "]}"


async def _entry(row: Row, image_field: str | None) -> str:
    entry, picture = row
    text = json.dumps(entry, separators=(",", ":"))
    if image_field is None or picture is None:
        return text
    write = partial(_with_picture, text, image_field, picture)
    return await asyncio.to_thread(write) if len(picture) > LARGE_BYTES else write()


def _with_picture(text: str, field: str, picture: bytes) -> str:
    return f'{text[:-1]},"{field}":"{base64.b64encode(picture).decode()}"}}'
