"""The back end `local`: a language model of its own, on the thread that owns the device."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Literal, Self

from services.rewriter.backend import WriterFacts, Writing, Written
from shared.device_thread import DeviceThread, device_failed, not_begun
from shared.errors import Unready
from shared.language.generations import Assignment, Generations, WritingLimits
from shared.language.model import LanguageModel


class LocalBackEnd:
    """Writes the prompts of many requests together."""

    name: Literal["local"] = "local"

    def __init__(
        self,
        load: Callable[[], LanguageModel],
        limits: WritingLimits,
        *,
        on_failure: Callable[[int], None] | None = None,
    ) -> None:
        self.device = DeviceThread(
            "rewriter", load=load, tick=self._tick, on_loss=self._lose_all, on_failure=on_failure
        )
        self.generations = Generations(limits, wake=self.device.wake)

    @property
    def facts(self) -> WriterFacts:
        """Of the loaded model. Raises Unready."""
        facts = self.device.model.facts
        return WriterFacts(model=facts.name, device=facts.device, dtype=facts.dtype, fingerprint=facts.fingerprint)

    async def __aenter__(self) -> Self:
        """Begins to load."""
        self.device.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the device's thread; what waits or is being written is refused."""
        await self.device.stop()
        stopping = Unready("The service is stopping.", retry_after_s=5)
        self.generations.refuse_all(stopping, stopping)

    def unready_reason(self) -> str | None:
        """Why nothing can be written, or None."""
        return self.device.unready_reason()

    async def write(self, writing: Writing) -> AsyncGenerator[Written]:
        """The answer as it comes. Raises Unready, InvalidField, QueueFull, NumericalError, OutOfMemory."""
        assignment = Assignment(
            messages=writing.messages,
            sampling=writing.sampling,
            max_tokens=writing.max_tokens,
            enable_thinking=writing.enable_thinking,
        )
        async with aclosing(self.generations.write(self.device.model, assignment)) as pieces:
            async for piece in pieces:
                yield Written(text=piece) if isinstance(piece, str) else Written(reason=piece.reason)

    def _lose_all(self) -> None:
        self.generations.refuse_all(device_failed(), not_begun())

    def _tick(self, model: LanguageModel) -> bool:
        return self.generations.tick(model)
