"""Vision conditioning: reference pictures extracted, kept, and blended into pictures."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request, Response

from services.gateway.routes import generate as pictures
from services.gateway.routes.refusals import GENERATE, LIST, VL_CACHE, VL_EXTRACT
from services.gateway.routes.uploads import FORM, read_extraction
from services.gateway.state import Engine, Services
from shared.requests import require_json, until_disconnected
from shared.schemas.history import ClearedAnswer
from shared.schemas.vl import (
    VL_EXTRACT_EXAMPLES,
    VL_GENERATE_EXAMPLES,
    ExtractAnswer,
    ExtractOptions,
    ExtractRequest,
    VlConfig,
    VlDeletedAnswer,
    VlGenerateRequest,
    VlStatus,
)

router = APIRouter(prefix="/api/vl", tags=["vision"])

_FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": {"type": "string", "format": "binary"},
        **ExtractOptions.model_json_schema()["properties"],
    },
}
_EXTRACT_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": ExtractRequest.model_json_schema(), "examples": VL_EXTRACT_EXAMPLES},
        FORM: {"schema": _FORM_SCHEMA},
    },
}
_HEADERS = {
    **pictures.PICTURE["headers"],
    "X-VL-Alpha": {"description": "The references' share, of several together.", "schema": {"type": "number"}},
    "X-VL-Blend-Mode": {"description": "How they were blended in.", "schema": {"type": "string"}},
}


@router.get("/status", summary="Is there vision conditioning?", responses=LIST)
async def status(engine: Engine, services: Services) -> VlStatus:
    """Always answers 200: what is configured, whether it can work now, and which embeddings are kept."""
    return await engine.vision.status(available=services.is_ready("vl"))


@router.get("/config", summary="Defaults of a request's fields", responses=LIST)
async def config(engine: Engine) -> VlConfig:
    """What a field stands for that a request leaves out."""
    return engine.vision.config()


@router.post(
    "/extract",
    summary="Embeddings of a reference picture",
    responses=VL_EXTRACT,
    openapi_extra={"requestBody": _EXTRACT_BODY},
)
async def extract(request: Request, engine: Engine) -> ExtractAnswer:
    """Reads a PNG, JPEG or WEBP with the vision-language model, and keeps what comes of it under an id that
    `/api/vl/generate` takes. The picture comes as base64 in JSON, or as the file `image` of a form. The same picture
    with the same options has the same id, and is read once."""
    _ = engine.vision.cache
    picture, options = await read_extraction(request)
    found = await until_disconnected(request, engine.vision.extract(picture, options))
    shape, told = list(found.reference.embeddings.shape), found.reference.told
    return ExtractAnswer(
        embeddings_id=found.embeddings_id,
        num_tokens=shape[0],
        shape=shape,
        hidden_layer=told.hidden_layer,
        original_std=round(told.original_std, 6),
        scaled_std=round(told.scaled_std, 6),
        extract_time=round(found.seconds, 6),
    )


@router.post(
    "/generate",
    summary="A picture from a prompt and reference pictures",
    dependencies=[Depends(require_json)],
    response_class=Response,
    responses={**GENERATE, 200: {**pictures.PICTURE, "headers": _HEADERS}},
)
async def generate(
    body: Annotated[VlGenerateRequest, Body(openapi_examples=VL_GENERATE_EXAMPLES)], request: Request, engine: Engine
) -> Response:
    """As `/api/generate`, with all its fields; the embeddings of one reference or of several are blended into the
    prompt's. A reference is named by the id of an extraction, or is a picture that is extracted on the way."""
    return await pictures.generate(body, request, engine)


@router.delete("/cache/{embeddings_id}", summary="Forget a reference", responses=VL_CACHE)
async def delete(embeddings_id: str, engine: Engine) -> VlDeletedAnswer:
    """By its id."""
    await engine.vision.cache.delete(embeddings_id)
    return VlDeletedAnswer(deleted=embeddings_id)


@router.delete("/cache", summary="Forget all references", responses=VL_CACHE)
async def clear(engine: Engine) -> ClearedAnswer:
    """History is not touched."""
    return ClearedAnswer(cleared=await engine.vision.cache.clear())
