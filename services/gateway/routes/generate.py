"""`POST /api/generate`."""

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Request, Response

from services.gateway.routes.refusals import GENERATE
from services.gateway.state import Engine
from shared.requests import require_json, until_disconnected
from shared.schemas.public import GENERATE_EXAMPLES, GenerateRequest

router = APIRouter(prefix="/api", tags=["generate"])

_PICTURE = {
    "description": "The picture.",
    "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
    "headers": {
        "X-Generation-Time": {"description": "Seconds from the request to the picture.", "schema": {"type": "number"}},
        "X-Seed": {"description": "The seed that was used, also when it was drawn.", "schema": {"type": "integer"}},
        "X-History-Id": {"description": "Id of the picture in the history.", "schema": {"type": "integer"}},
        "X-History": {"description": "`unsaved` when the history could not be written.", "schema": {"type": "string"}},
        "Server-Timing": {"description": "Milliseconds of each stage.", "schema": {"type": "string"}},
    },
}


@router.post(
    "/generate",
    summary="A picture from a prompt",
    dependencies=[Depends(require_json)],
    response_class=Response,
    responses={**GENERATE, 200: _PICTURE},
)
async def generate(
    body: Annotated[GenerateRequest, Body(openapi_examples=GENERATE_EXAMPLES)], request: Request, engine: Engine
) -> Response:
    """Encodes the prompt, denoises and decodes, and answers the PNG. Closing the connection stops the work."""
    made = await until_disconnected(request, engine.generate(body))
    headers = {
        "X-Generation-Time": f"{made.seconds:.3f}",
        "X-Seed": str(made.parameters.seed),
        "Server-Timing": made.server_timing,
        **({"X-History": "unsaved"} if made.history_id is None else {"X-History-Id": str(made.history_id)}),
    }
    return Response(made.png, media_type="image/png", headers=headers)
