"""Prompts before they become pictures: formatting, encoding, templates."""

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Request

from services.gateway.routes.refusals import ENCODE, FORMAT, LIST, SAVE
from services.gateway.state import Engine
from shared.requests import require_json, until_disconnected
from shared.schemas.public import (
    PROMPT_EXAMPLES,
    EncodeAnswer,
    EncodeRequest,
    FormatAnswer,
    PromptRequest,
    SaveAnswer,
    TemplateEntry,
    TemplateList,
)

router = APIRouter(prefix="/api", tags=["prompts"])


@router.post(
    "/encode", summary="Embeddings of a prompt, measured", dependencies=[Depends(require_json)], responses=ENCODE
)
async def encode(
    body: Annotated[EncodeRequest, Body(openapi_examples=PROMPT_EXAMPLES)], request: Request, engine: Engine
) -> EncodeAnswer:
    """Encodes a prompt without making a picture; answers shape, dtype and time, not the embeddings themselves."""
    encoded = await until_disconnected(request, engine.encode(body))
    return EncodeAnswer(
        shape=list(encoded.embeddings.shape),
        dtype=encoded.embeddings.torch_dtype,
        encode_time=round(encoded.seconds, 6),
        token_count=encoded.embeddings.tokens,
        prompt=body.prompt,
        formatted_prompt=encoded.formatted_prompt,
    )


@router.post(
    "/save-embeddings",
    summary="Embeddings of a prompt, in a file",
    dependencies=[Depends(require_json)],
    responses=SAVE,
)
async def save_embeddings(
    body: Annotated[EncodeRequest, Body(openapi_examples=PROMPT_EXAMPLES)], request: Request, engine: Engine
) -> SaveAnswer:
    """Encodes a prompt and writes the tensor `embeddings` to a safetensors file in the gateway's data directory."""
    saved = await until_disconnected(request, engine.save_embeddings(body))
    return SaveAnswer(
        path=str(saved.path),
        shape=list(saved.encoded.embeddings.shape),
        encode_time=round(saved.encoded.seconds, 6),
    )


@router.post(
    "/format-prompt", summary="A prompt as the encoder reads it", dependencies=[Depends(require_json)], responses=FORMAT
)
async def format_prompt(
    body: Annotated[PromptRequest, Body(openapi_examples=PROMPT_EXAMPLES)], request: Request, engine: Engine
) -> FormatAnswer:
    """Applies the template and the chat format, and counts. Nothing is encoded, except by an API encoder, which cannot
    count otherwise."""
    formatted = engine.format(body)
    return FormatAnswer(
        formatted_prompt=formatted,
        char_count=len(formatted),
        token_count=await until_disconnected(request, engine.count_tokens(formatted)),
        **body.model_dump(),
    )


@router.get("/templates", summary="Templates for pictures", responses=LIST)
async def templates(engine: Engine) -> TemplateList:
    """The names that `template` takes, `default` first."""
    return TemplateList(
        templates=[
            TemplateEntry(
                name=template.name,
                has_thinking=template.thinking_content is not None,
                description=template.description,
                category=template.category,
            )
            for template in engine.templates.pictures.values()
        ]
    )
