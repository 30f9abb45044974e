"""Texts of many requests, written together: a bounded queue, and what becomes of every token. Knows no HTTP."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from shared.errors import InternalError, InvalidField, NumericalError, QueueFull, ServiceError
from shared.jobs import TextJob
from shared.language.batch import Row
from shared.language.model import LanguageModel
from shared.language.options import Ending, FinishReason, Message, Sampling, Wanted
from shared.language.sampling import BROKEN
from shared.language.text import TextStream
from shared.language.thinking import OPEN
from shared.tensors import DEVICE_ERROR

QUICK_CHARS = 2_000  # conversations up to this are tokenized in the event loop: quicker than a thread could be asked

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WritingLimits:
    """Texts that are written together, texts that may wait, and tokens that the former may hold, padding included."""

    max_running: int
    max_waiting: int
    max_cache_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A conversation to be continued. `max_tokens` None takes what there is room for, up to `default_tokens`."""

    messages: Sequence[Message]
    sampling: Sampling
    max_tokens: int | None = None
    default_tokens: int = 2_048
    stop: Sequence[str] = ()
    enable_thinking: bool | None = None


class Generation(TextJob[Ending]):
    """A text in the making, whose result is how it ended."""

    def __init__(self, wanted: Wanted, text: TextStream, *, opens_thinking: bool) -> None:
        super().__init__()
        self.row = Row(wanted)
        self.text = text
        self.opens_thinking = opens_thinking


class Generations:
    """Takes conversations from many requests and continues them by `tick`, on the thread that owns the device.

    `wake` tells that thread that there is work.
    """

    def __init__(self, limits: WritingLimits, wake: Callable[[], None]) -> None:
        self.limits = limits
        self._wake = wake
        self._waiting: deque[Generation] = deque()
        self._running: dict[Row, Generation] = {}
        self._refused: ServiceError | None = None
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether a tick would find work."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts in the making."""
        return len(self._running)

    async def write(self, language: LanguageModel, assignment: Assignment) -> AsyncGenerator[str | Ending]:
        """The text as it comes, then how it ended; a think block that the template has opened begins it. Whoever leaves
        the generator early ends the text at the next token.

        Raises InvalidField, QueueFull, Unready before the first piece, and NumericalError or OutOfMemory at any.
        """
        generation = await self._generation(language, assignment)
        try:
            with self._lock:
                if self._refused is not None:
                    raise self._refused
                if len(self._waiting) >= self.limits.max_waiting:
                    waiting = len(self._waiting)
                    raise QueueFull(f"{waiting} texts wait to be written already; try again soon.", retry_after_s=5)
                self._waiting.append(generation)
            self._wake()
            if generation.opens_thinking:
                yield f"{OPEN}\n"
            async for piece in generation.pieces():
                yield piece
        finally:
            generation.cancel()
            with self._lock, suppress(ValueError):  # a text that nobody waits for takes no place in the queue
                self._waiting.remove(generation)

    def tick(self, language: LanguageModel) -> bool:
        """One piece of work for all texts; answers whether there was any."""
        self._let_go(language)
        self._admit(language)
        if not self._running:
            return False
        try:
            for row, token in language.batch.advance():
                self._take(language, row, token)
        except ServiceError as error:
            self._fail_running(language, error)
        except DEVICE_ERROR:
            raise  # after it every call of the device fails: only a new process helps
        except Exception:  # one bad text must not end the service
            log.exception("texts could not be written", texts=len(self._running))
            self._fail_running(language, InternalError("The text could not be written."))
        return True

    def refuse_all(self, begun: ServiceError, waiting: ServiceError) -> None:
        """Ends every text with an error, those in the making with another than those that wait or are still to come;
        called once no tick runs any more."""
        with self._lock:
            self._refused = waiting
            left = list(self._waiting)
            self._waiting.clear()
        _fail_all(self._running.values(), begun)
        self._running.clear()
        _fail_all(left, waiting)

    async def _generation(self, language: LanguageModel, assignment: Assignment) -> Generation:
        if sum(len(message.content) for message in assignment.messages) <= QUICK_CHARS:
            prompt = language.prompt(assignment.messages, enable_thinking=assignment.enable_thinking)
        else:
            prompt = await asyncio.to_thread(
                language.prompt, assignment.messages, enable_thinking=assignment.enable_thinking
            )
        wanted = Wanted(
            ids=prompt.ids,
            max_tokens=self._max_tokens(language, assignment, len(prompt.ids)),
            sampling=assignment.sampling,
            stop=assignment.stop,
        )
        return Generation(wanted, language.text_stream(assignment.stop), opens_thinking=prompt.opens_thinking)

    def _max_tokens(self, language: LanguageModel, assignment: Assignment, read: int) -> int:
        most = min(language.facts.context, self.limits.max_cache_tokens)
        wanted = assignment.max_tokens or max(1, min(assignment.default_tokens, most - read))
        if read + wanted > most:
            raise InvalidField(
                f"The conversation has {read} tokens and 'max_tokens' is {wanted}: together they may be at most {most}."
            )
        return wanted

    def _let_go(self, language: LanguageModel) -> None:
        for row, generation in list(self._running.items()):
            if generation.cancelled:
                self._end(language, row)

    def _admit(self, language: LanguageModel) -> None:
        """Lets the oldest text in, if another prompt may be read and its cache has room. Nobody overtakes it."""
        if not language.batch.can_join:
            return
        with self._lock:
            if self._waiting and self._fits(self._waiting[0]):
                generation = self._waiting.popleft()
                self._running[generation.row] = generation
                language.batch.join(generation.row)

    def _fits(self, generation: Generation) -> bool:
        rooms = [row.wanted.room for row in (*self._running, generation.row)]
        return len(rooms) <= self.limits.max_running and len(rooms) * max(rooms) <= self.limits.max_cache_tokens

    def _take(self, language: LanguageModel, row: Row, token: int) -> None:
        generation = self._running[row]
        if token == BROKEN:
            self._end(language, row)
            generation.fail(NumericalError("The language model's scores are not numbers."))
            return
        if token in language.facts.ends:
            self._finish(language, generation, "stop")
            return
        generation.emit(generation.text.add(token))
        if generation.text.stopped:
            self._finish(language, generation, "stop")
        elif len(row.tokens) >= row.wanted.max_tokens:
            self._finish(language, generation, "length")

    def _finish(self, language: LanguageModel, generation: Generation, reason: FinishReason) -> None:
        row = generation.row
        self._end(language, row)
        generation.emit(generation.text.end())
        generation.resolve(Ending(reason, len(row.wanted.ids), len(row.tokens)))

    def _end(self, language: LanguageModel, row: Row) -> None:
        del self._running[row]
        language.batch.leave(row)

    def _fail_running(self, language: LanguageModel, error: ServiceError) -> None:
        language.batch.clear()
        failed = list(self._running.values())
        self._running.clear()
        _fail_all(failed, error)


def _fail_all(generations: Iterable[Generation], error: ServiceError) -> None:
    for generation in generations:
        generation.fail(error)
