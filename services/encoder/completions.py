"""`POST /v1/chat/completions`, as OpenAI's clients know it: HTTP in, HTTP out."""

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

from fastapi import APIRouter, Depends, Request, Response

from services.encoder.engine import EncoderEngine
from services.encoder.routes import Engine
from shared import events
from shared.errors import (
    BodyTooLarge,
    ClientGone,
    InternalError,
    InvalidField,
    MalformedBody,
    NumericalError,
    OutOfMemory,
    QueueFull,
    Unready,
    WrongContentType,
)
from shared.language.generations import Assignment
from shared.language.options import Ending, FinishReason, Message, Sampling, drawn_seed
from shared.problems import OpenAIRoute, Problem, openai_error, request_id_of, responses
from shared.requests import require_json, until_disconnected
from shared.schemas.chat import (
    DONE,
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatRequest,
    ChunkChoice,
    Usage,
)

REFUSALS = responses(
    MalformedBody,
    BodyTooLarge,
    WrongContentType,
    InvalidField,
    QueueFull,
    ClientGone,
    InternalError,
    NumericalError,
    OutOfMemory,
    Unready,
)
router = APIRouter(prefix="/v1", tags=["chat"], route_class=OpenAIRoute)


@router.post(
    "/chat/completions",
    summary="Continue a conversation",
    dependencies=[Depends(require_json)],
    response_model=ChatAnswer,
    responses={**REFUSALS, 200: {"content": {events.MEDIA_TYPE: {"schema": {"type": "string"}}}}},
)
async def chat_completions(body: ChatRequest, request: Request, engine: Engine) -> Response:
    """Writes with the encoder's own weights, in OpenAI's form, with `"stream": true` as events. Text that the model
    marks as its thinking is left where it stands. Closing the connection ends the text at the next token."""
    head = ChatChunk(id=f"chatcmpl-{request_id_of(request)}", created=int(time.time()), model=engine.facts.name)
    if body.stream:
        return await events.event_response(request, _stream(engine, body, head), told=_told)
    answer = await until_disconnected(request, _answer(engine, body, head))
    return Response(answer.model_dump_json(), media_type="application/json")


def assignment_of(body: ChatRequest) -> Assignment:
    """What the body asks of the model; a field that it leaves out has OpenAI's default."""
    return Assignment(
        messages=[Message("system" if one.role == "developer" else one.role, one.text) for one in body.messages],
        sampling=Sampling(
            seed=drawn_seed() if body.seed is None else body.seed,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
        ),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=body.stops,
        enable_thinking=body.enable_thinking,
    )


async def _answer(engine: EncoderEngine, body: ChatRequest, head: ChatChunk) -> ChatAnswer:
    async with aclosing(engine.write(assignment_of(body))) as written:
        *pieces, ending = [piece async for piece in written]
    assert isinstance(ending, Ending)  # noqa: S101 - the engine ends with it
    message = AnswerMessage(role="assistant", content="".join(map(str, pieces)))
    choice = ChatChoice(message=message, finish_reason=ending.reason)
    return ChatAnswer(id=head.id, created=head.created, model=head.model, choices=[choice], usage=_usage(ending))


async def _stream(engine: EncoderEngine, body: ChatRequest, head: ChatChunk) -> AsyncGenerator[bytes]:
    """The events of one answer: the assistant's role, pieces of text, why it ended, on request the usage, DONE."""

    def chunk(content: str, reason: FinishReason | None = None) -> bytes:
        choice = ChunkChoice(delta=AnswerMessage(role=role, content=content), finish_reason=reason)
        return events.event(head.model_copy(update={"choices": [choice]}).model_dump_json())

    role: Literal["assistant"] | None = "assistant"
    async with aclosing(engine.write(assignment_of(body))) as pieces:
        async for piece in pieces:
            if isinstance(piece, str):
                yield chunk(piece)
                role = None
                continue
            yield chunk("", piece.reason)
            if body.stream_options is not None and body.stream_options.include_usage:
                yield events.event(head.model_copy(update={"usage": _usage(piece)}).model_dump_json())
    yield events.event(DONE)


def _told(problem: Problem) -> bytes:
    """What fails within a stream, as OpenAI's clients look for it."""
    return events.event(json.dumps({"error": openai_error(problem)}))


def _usage(ending: Ending) -> Usage:
    return Usage(
        prompt_tokens=ending.prompt_tokens,
        completion_tokens=ending.written_tokens,
        total_tokens=ending.prompt_tokens + ending.written_tokens,
    )
