"""Rewrites prompts: fills in the defaults, has the back end write, and tells thinking from text. Knows no HTTP."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from services.rewriter.backend import BackEnd, Writing
from services.rewriter.settings import RewriterSettings
from services.rewriter.thinking import Piece, ThinkParser
from shared.language.options import Message, Sampling, drawn_seed
from shared.schemas.rewriter import RewritePrompt, Rewritten

T = TypeVar("T")


class RewriterEngine:
    """Has prompts rewritten by one back end; holds no state of its own."""

    def __init__(self, back_end: BackEnd, settings: RewriterSettings) -> None:
        self._back_end = back_end
        self._settings = settings

    def unready_reason(self) -> str | None:
        """Why nothing can be rewritten, or None."""
        return self._back_end.unready_reason()

    async def rewrite(self, request: RewritePrompt) -> Rewritten:
        """The whole answer. Raises a ServiceError."""
        async with aclosing(self._write(request, follow=False)) as pieces:
            *_, last = [piece async for piece in pieces]
        assert isinstance(last, Rewritten)  # noqa: S101 - `_write` ends with it
        return last

    def follow(self, request: RewritePrompt) -> AsyncGenerator[Piece | Rewritten]:
        """Pieces of thinking and of the prompt as they come, then the whole answer. Closing the generator ends it.

        Raises a ServiceError.
        """
        return self._write(request, follow=True)

    async def _write(self, request: RewritePrompt, *, follow: bool) -> AsyncGenerator[Piece | Rewritten]:
        writing = self._writing(request, follow=follow)
        parser, reason = ThinkParser(), None
        async with aclosing(self._back_end.write(writing)) as pieces:
            async for written in pieces:
                for piece in (*parser.feed_thinking(written.thinking), *parser.feed(written.text)):
                    yield piece
                reason = written.reason or reason
        for piece in parser.end():
            yield piece
        yield Rewritten(
            rewritten_prompt=parser.answer.text,
            thinking_content=parser.answer.thinking or None,
            backend=self._back_end.name,
            finish_reason=reason,
            seed=writing.seed,
        )

    def _writing(self, request: RewritePrompt, *, follow: bool) -> Writing:
        defaults = self._settings
        seed = request.seed
        if seed is None and self._back_end.name == "local":  # another server draws its own
            seed = drawn_seed()
        enable_thinking = request.enable_thinking
        if enable_thinking is None and not defaults.rewriter_enable_thinking:
            enable_thinking = False  # else the model's template decides, which not every server lets us tell
        return Writing(
            messages=(Message("system", request.system_prompt), Message("user", request.prompt)),
            sampling=Sampling(
                seed=seed or 0,
                temperature=_or(request.temperature, defaults.rewriter_temperature),
                top_p=_or(request.top_p, defaults.rewriter_top_p),
                min_p=_or(request.min_p, defaults.rewriter_min_p),
                top_k=_or(request.top_k, defaults.rewriter_top_k),
                presence_penalty=_or(request.presence_penalty, defaults.rewriter_presence_penalty),
            ),
            max_tokens=_or(request.max_tokens, defaults.rewriter_max_tokens),
            seed=seed,
            enable_thinking=enable_thinking,
            follow=follow,
        )


def _or(given: T | None, default: T) -> T:
    return default if given is None else given
