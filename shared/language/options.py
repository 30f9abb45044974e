"""What a caller asks of a text: the prompt's tokens, how tokens are drawn, where it ends. No torch here."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length"]
"""`stop`: the model ended its turn or a stop string came; `length`: `max_tokens` were written."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, by `system`, `user` or `assistant`."""

    role: str
    content: str


class Prompt(NamedTuple):
    """A conversation's tokens, and whether its template has opened a think block, which the answer then goes on with
    and does not open itself."""

    ids: list[int]
    opens_thinking: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the defaults change nothing about the model's distribution.

    `temperature` 0 takes the likeliest token. `top_k` 0 and `min_p` 0 are off. The penalties are subtracted from the
    scores of tokens that were written already: `presence_penalty` once, `frequency_penalty` each time. A `seed` gives
    the same text again as long as the scores are the same; in another batch they may differ by rounding.
    """

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One text to be written after the tokens `ids`."""

    ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: Sequence[str] = field(default=())

    @property
    def room(self) -> int:
        """Tokens that it may come to hold, prompt included."""
        return len(self.ids) + self.max_tokens


@dataclass(frozen=True, slots=True)
class Ending:
    """How a text ended, and how many tokens were read and written."""

    reason: FinishReason
    prompt_tokens: int
    written_tokens: int


def drawn_seed() -> int:
    """A seed for a text that names none."""
    return secrets.randbelow(2**32)
