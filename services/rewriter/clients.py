"""The back ends `encoder` and `api`: a server that speaks OpenAI's chat completions."""

import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, Literal, Self

from pydantic import BaseModel, ValidationError

from services.rewriter.backend import WriterFacts, Writing, Written
from shared.client import ServiceClient
from shared.errors import BadUpstream, DeviceFailed, NotBegun, QueueFull, ServiceError, Unreachable, Unready, rebuild
from shared.schemas.chat import DONE

PATH = "/v1/chat/completions"
ELSEWHERE = (DeviceFailed, NotBegun, QueueFull, Unreachable, Unready)
"""What another server of the same model may do better."""


class _Said(BaseModel):
    """A message or a piece of one. Some servers tell thinking apart, under one of two names."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(BaseModel):
    message: _Said | None = None
    delta: _Said | None = None
    finish_reason: str | None = None


class _Heard(BaseModel):
    """What is read of a completion, or of an event: no more than is needed, as servers differ in the rest."""

    choices: list[_Choice] = []
    error: Any = None


class ApiBackEnd:
    """Has prompts written by other processes: our encoder nodes, or any server of this protocol.

    Several `services` are asked in turns.
    """

    def __init__(
        self, services: Sequence[ServiceClient], *, name: Literal["local", "api"], model: str, timeout_s: float
    ) -> None:
        self.name = name
        self._services = deque(services)
        self._called = services[0].name
        self._model = model
        self._timeout_s = timeout_s
        named = hashlib.sha256(f"{services[0].base_url} {model}".encode()).hexdigest()[:16]
        self._facts = WriterFacts(model=model, device="remote", dtype="unknown", fingerprint=named)
        self._open = AsyncExitStack()

    @property
    def facts(self) -> WriterFacts:
        """The other server and its model by their names: no more is known of them."""
        return self._facts

    async def __aenter__(self) -> Self:
        """Opens the connection pools."""
        for service in self._services:
            await self._open.enter_async_context(service)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes every connection, which ends what still runs."""
        await self._open.aclose()

    def unready_reason(self) -> str | None:
        """None: whether the server can be reached is told by each answer."""
        return None

    async def write(self, writing: Writing) -> AsyncGenerator[Written]:
        """The answer: as it comes if somebody follows it, else in one piece. A server that is away or has no room costs
        nothing where there is another, unless it has begun to answer. Raises a ServiceError."""
        self._services.rotate(-1)
        *others, last = self._services
        for service in others:
            told = False
            try:
                async with aclosing(self._write(service, writing)) as pieces:
                    async for piece in pieces:
                        told = True
                        yield piece
            except ELSEWHERE:
                if told:
                    raise
            else:
                return
        async with aclosing(self._write(last, writing)) as pieces:
            async for piece in pieces:
                yield piece

    async def _write(self, service: ServiceClient, writing: Writing) -> AsyncGenerator[Written]:
        body = self._body(writing)
        if not writing.follow:
            reply = await service.post_json(PATH, body, timeout_s=self._timeout_s)
            yield self._whole(reply.body)
            return
        reason, whole = None, False
        async with aclosing(service.stream(PATH, body, timeout_s=self._timeout_s)) as events:
            async for event in events:
                if event.data == DONE:
                    whole = True
                    break
                piece = self._piece(event.data)
                reason = reason or piece.reason
                if piece.text or piece.thinking:
                    yield Written(text=piece.text, thinking=piece.thinking)
        if not (whole or reason):
            raise BadUpstream("The language model's server ended its answer before the text was whole.")
        yield Written(reason=reason)

    def _body(self, writing: Writing) -> Mapping[str, Any]:
        """The request. What some servers do not know is left out where it would change nothing."""
        sampling = writing.sampling
        unusual = {
            "min_p": sampling.min_p,
            "top_k": sampling.top_k,
            "presence_penalty": sampling.presence_penalty,
        }
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": message.role, "content": message.content} for message in writing.messages],
            "max_tokens": writing.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": writing.follow,
            **{name: value for name, value in unusual.items() if value},
        }
        if writing.seed is not None:
            body["seed"] = writing.seed
        if writing.enable_thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": writing.enable_thinking}
        return body

    def _whole(self, body: bytes) -> Written:
        heard = self._heard(body)
        if not heard.choices or heard.choices[0].message is None:
            raise self._not_understood()
        return _written(heard.choices[0], heard.choices[0].message)

    def _piece(self, data: str) -> Written:
        heard = self._heard(data)
        if heard.error is not None:
            raise self._broken_off(heard.error)
        if not heard.choices:  # only the usage
            return Written()
        return _written(heard.choices[0], heard.choices[0].delta or _Said())

    def _heard(self, text: str | bytes) -> _Heard:
        try:
            return _Heard.model_validate_json(text)
        except ValidationError:
            raise self._not_understood() from None

    def _broken_off(self, error: Any) -> ServiceError:
        """The error of our own encoder as it is; of another server's nothing is told but that there was one."""
        ours = isinstance(error, dict) and self.name == "local"
        known = rebuild(str(error.get("code")), str(error.get("message"))) if ours else None
        return known or BadUpstream(f"The {self._called} service broke its answer off with an error.")

    def _not_understood(self) -> BadUpstream:
        return BadUpstream(f"The {self._called} service answered something that is no chat completion.")


def _written(choice: _Choice, said: _Said) -> Written:
    thinking = said.reasoning_content or said.reasoning or ""
    return Written(text=said.content or "", thinking=thinking, reason=choice.finish_reason)
