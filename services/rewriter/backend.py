"""What every back end of the rewriter takes and gives."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from shared.language.options import Message, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """A conversation to be continued. `follow` says that somebody reads along, so that pieces should come early.

    `seed` None leaves the drawing of one to another server, `enable_thinking` None the choice to the model.
    """

    messages: Sequence[Message]
    sampling: Sampling
    max_tokens: int
    seed: int | None
    enable_thinking: bool | None
    follow: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A piece of the answer; `thinking` where a server tells it apart from the text; the last one has a `reason`."""

    text: str = ""
    thinking: str = ""
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterFacts:
    """Which language model writes, where, and what tells it from others."""

    model: str
    device: str
    dtype: str
    fingerprint: str


class BackEnd(Protocol):
    """A language model, wherever it runs."""

    @property
    def name(self) -> Literal["local", "api"]:
        """What answers call it: `local` is this server's own model."""

    @property
    def facts(self) -> WriterFacts:
        """What is known of the model. Raises Unready."""

    async def __aenter__(self) -> Self:
        """Gets ready."""

    async def __aexit__(self, *_: object) -> None:
        """Gives up what still runs."""

    def unready_reason(self) -> str | None:
        """Why nothing can be written, or None."""

    def write(self, writing: Writing) -> AsyncGenerator[Written]:
        """The answer as it comes; closing the generator ends it. Raises a ServiceError."""
