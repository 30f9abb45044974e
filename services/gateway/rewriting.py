"""Rewriting prompts: the rewriter service as the gateway calls it, which system prompt is meant, what came of it."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.gateway.nodes import Nodes
from services.gateway.written import RewriteEvent, follow, rewritten_of
from shared.client import ServiceClient
from shared.errors import BadUpstream, InvalidField, Unready
from shared.schemas.fields import MAX_PROMPT_CHARS
from shared.schemas.public import GenerateRequest
from shared.schemas.rewriter import (
    RewriteAnswer,
    RewriteChoice,
    RewriteOptions,
    RewritePrompt,
    RewriteRequest,
    Rewritten,
)
from shared.templates import Templates

NO_REWRITER = (
    "This server runs no rewriter: start it with --rewriter-use-api, with rewriter.backend set, or with an encoder."
)


class RewriterClient:
    """Short prompts to longer ones."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    async def rewrite(self, prompt: RewritePrompt, *, timeout_s: float) -> Rewritten:
        """What the language model wrote. Raises a ServiceError."""

        async def work(service: ServiceClient, left_s: float) -> Rewritten:
            reply = await service.post_json("/v1/rewrite", prompt.model_dump(), timeout_s=left_s)
            return rewritten_of(service, reply.body)

        return await self.nodes.ask(work, timeout_s=timeout_s)

    def follow(self, prompt: RewritePrompt, *, timeout_s: float) -> AsyncGenerator[RewriteEvent | Rewritten]:
        """Pieces as they come, then the whole. Closing the generator ends the text. Raises a ServiceError."""
        body = prompt.model_dump()
        return follow(self.nodes, lambda service: service.stream("/v1/rewrite", body, timeout_s=timeout_s))


class Rewriting:
    """Has prompts rewritten by the rewriter service, if there is one."""

    def __init__(self, templates: Templates, client: RewriterClient | None) -> None:
        self._templates = templates
        self._client = client

    async def rewrite(self, prompt: str, choice: RewriteChoice, *, timeout_s: float) -> RewriteAnswer:
        """The rewritten prompt. Raises a ServiceError."""
        started = time.perf_counter()
        client, asked = self.asked(prompt, choice)
        return answer_of(prompt, choice, await client.rewrite(asked, timeout_s=timeout_s), started)

    def follow(self, request: RewriteRequest, *, timeout_s: float) -> AsyncGenerator[RewriteEvent | RewriteAnswer]:
        """Pieces as they come, then the whole. Closing the generator ends the text. Raises a ServiceError."""
        started = time.perf_counter()
        client, asked = self.asked(request.prompt, request)
        return answers(client.follow(asked, timeout_s=timeout_s), request, started)

    def system_prompt(self, choice: RewriteChoice) -> str | None:
        """The text that is given, else the template's. Raises UnknownName."""
        template = None if choice.rewriter is None else self._templates.rewriter(choice.rewriter)
        return choice.custom_system_prompt or (None if template is None else template.system_prompt)

    def asked(self, prompt: str, choice: RewriteChoice) -> tuple[RewriterClient, RewritePrompt]:
        """The rewriter, and what it is asked. Raises UnknownName, InvalidField, Unready."""
        system_prompt = self.system_prompt(choice)
        if system_prompt is None:
            raise InvalidField("Either 'rewriter' or 'custom_system_prompt' must be given.")
        if self._client is None:
            raise Unready(NO_REWRITER)
        options = choice.model_dump(include=set(RewriteOptions.model_fields))
        return self._client, RewritePrompt(prompt=prompt, system_prompt=system_prompt, **options)


def rewritten_request(request: GenerateRequest, answer: RewriteAnswer) -> GenerateRequest:
    """The request for the picture of a rewritten prompt; thinking that the request gives itself stays.

    Where the model wrote nothing but thinking, as when `max_tokens` cut it off, so does the prompt, to be drawn with
    that thinking. Raises BadUpstream for a text that is too long for a prompt.
    """
    thinking = answer.thinking_content if request.thinking_content is None else request.thinking_content
    if max(len(answer.rewritten_prompt), len(thinking or "")) > MAX_PROMPT_CHARS:
        raise BadUpstream(f"The rewriter wrote more than the {MAX_PROMPT_CHARS} characters that a prompt may have.")
    prompt = answer.rewritten_prompt or request.prompt
    return request.model_copy(update={"prompt": prompt, "thinking_content": thinking, "rewrite": None})


async def answers(
    written: AsyncGenerator[RewriteEvent | Rewritten], request: RewriteRequest, started: float
) -> AsyncGenerator[RewriteEvent | RewriteAnswer]:
    """The same pieces, and in place of the whole what is answered. Closing the generator closes the given one."""
    async with aclosing(written) as events:
        async for event in events:
            yield answer_of(request.prompt, request, event, started) if isinstance(event, Rewritten) else event


def answer_of(prompt: str, choice: RewriteChoice, written: Rewritten, started: float) -> RewriteAnswer:
    """What is answered to a request that came at `started`, by the clock `perf_counter`."""
    return RewriteAnswer(
        original_prompt=prompt,
        rewriter=choice.rewriter,
        gen_time=round(time.perf_counter() - started, 6),
        **written.model_dump(),
    )
