"""How a text is written whose request leaves that open: the same for every service that rewrites. No torch here."""

from typing import TypeVar

from shared.language.options import Sampling
from shared.schemas.fields import MAX_WRITTEN_TOKENS, Penalty, Share, Temperature, TopK
from shared.schemas.rewriter import RewriteOptions
from shared.settings import ServiceSettings, setting

T = TypeVar("T")


class WritingSettings(ServiceSettings):
    """The defaults of a rewriting, by a template or from a picture."""

    rewriter_temperature: Temperature = setting(
        1.0, key="rewriter.temperature", panel="Rewriter", description="Sampling temperature."
    )
    rewriter_top_p: Share = setting(
        0.95, key="rewriter.top_p", panel="Rewriter", description="Nucleus sampling threshold."
    )
    rewriter_min_p: Share = setting(
        0.0, key="rewriter.min_p", panel="Rewriter", description="Minimum probability threshold (0.0 = disabled)."
    )
    rewriter_top_k: TopK = setting(0, key="rewriter.top_k", description="draw from so many tokens only; 0 is off")
    rewriter_presence_penalty: Penalty = setting(
        0.0, key="rewriter.presence_penalty", description="makes tokens that were written already less likely"
    )
    rewriter_max_tokens: int = setting(
        512,
        key="rewriter.max_tokens",
        panel="Rewriter",
        ge=1,
        le=MAX_WRITTEN_TOKENS,
        description="Maximum tokens to generate.",
    )
    rewriter_enable_thinking: bool = setting(
        default=True, key="rewriter.enable_thinking", description="let the model think before it writes"
    )

    def sampling(self, asked: RewriteOptions, seed: int) -> Sampling:
        """How tokens are drawn."""
        return Sampling(
            seed=seed,
            temperature=_or(asked.temperature, self.rewriter_temperature),
            top_p=_or(asked.top_p, self.rewriter_top_p),
            min_p=_or(asked.min_p, self.rewriter_min_p),
            top_k=_or(asked.top_k, self.rewriter_top_k),
            presence_penalty=_or(asked.presence_penalty, self.rewriter_presence_penalty),
        )

    def max_tokens(self, asked: RewriteOptions) -> int:
        """How many tokens are written at most."""
        return _or(asked.max_tokens, self.rewriter_max_tokens)

    def enable_thinking(self, asked: RewriteOptions) -> bool | None:
        """Whether the model thinks first; None leaves it to the model's template, which not every server lets us
        tell."""
        if asked.enable_thinking is None and not self.rewriter_enable_thinking:
            return False
        return asked.enable_thinking


def _or(given: T | None, default: T) -> T:
    return default if given is None else given
