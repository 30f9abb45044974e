"""Rewrites prompts: fills in the defaults, has the back end write, and tells thinking from text. Knows no HTTP."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.rewriter.backend import BackEnd, WriterFacts, Writing
from services.rewriter.settings import RewriterSettings
from shared.language.options import Message, drawn_seed
from shared.language.thinking import Piece, ThinkParser
from shared.schemas.rewriter import RewritePrompt, Rewritten


class RewriterEngine:
    """Has prompts rewritten by one back end; holds no state of its own."""

    def __init__(self, back_end: BackEnd, settings: RewriterSettings) -> None:
        self._back_end = back_end
        self._settings = settings

    @property
    def facts(self) -> WriterFacts:
        """What writes. Raises Unready."""
        return self._back_end.facts

    def unready_reason(self) -> str | None:
        """Why nothing can be rewritten, or None."""
        return self._back_end.unready_reason()

    async def write(self, request: RewritePrompt, *, follow: bool) -> AsyncGenerator[Piece | Rewritten]:
        """Pieces of thinking and of the prompt, then the whole answer; the pieces come early where somebody follows
        them. Closing the generator ends it. Raises a ServiceError."""
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
        seed = request.seed
        if seed is None and self._back_end.name == "local":  # another server draws its own
            seed = drawn_seed()
        return Writing(
            messages=(Message("system", request.system_prompt), Message("user", request.prompt)),
            sampling=self._settings.sampling(request, seed or 0),
            max_tokens=self._settings.max_tokens(request),
            seed=seed,
            enable_thinking=self._settings.enable_thinking(request),
            follow=follow,
        )
