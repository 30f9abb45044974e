"""Draws the next token of several texts, each in its own way. A pure leaf: scores in, tokens out."""

import random
from collections import Counter
from collections.abc import Sequence

import torch

from shared.language.options import Sampling

BROKEN = -1  # instead of a token where the model's scores are not numbers


class Sampler:
    """How one text draws its tokens, and what it has drawn so far."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.drawn: Counter[int] = Counter()
        self._random = random.Random(sampling.seed)  # noqa: S311 - picks words, guards nothing

    @property
    def penalized(self) -> bool:
        """Whether tokens that were drawn before count less."""
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    def penalty(self, times: int) -> float:
        """What is subtracted from the score of a token that was drawn so often."""
        return self.sampling.presence_penalty + times * self.sampling.frequency_penalty

    def number(self) -> float:
        """The next random number of this text, in [0, 1): one for each token, on every device the same."""
        return self._random.random()


def draw(scores: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each text from its row of `scores` [texts, vocabulary]; `BROKEN` where they are no numbers."""
    scores = _with_penalties(scores.to(torch.float32, copy=True), samplers)
    best, tokens = scores.max(dim=-1)
    random_rows = [row for row, sampler in enumerate(samplers) if sampler.sampling.temperature > 0]
    if random_rows:
        tokens[random_rows] = _draw(scores[random_rows], [samplers[row] for row in random_rows])
    drawn: list[int] = torch.where(best.isfinite(), tokens, BROKEN).tolist()
    for sampler, token in zip(samplers, drawn, strict=True):
        sampler.drawn[token] += 1
    return drawn


def shares(scores: torch.Tensor, samplings: Sequence[Sampling]) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token is drawn with, and which token that is, both [texts, vocabulary], the likeliest first.

    The filters follow one another as in transformers' `generate`: temperature, top_k, top_p, min_p. The shares of a row
    are not normalized: those of tokens that were filtered out are 0.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=scores.device, dtype=torch.float32).unsqueeze(1)

    warmth = column([max(one.temperature, 1e-6) for one in samplings])
    ordered, tokens = (scores / warmth).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    kept = ranks < column([one.top_k or scores.shape[-1] for one in samplings])
    chances = torch.where(kept, ordered, -torch.inf).softmax(dim=-1)
    before = chances.cumsum(dim=-1) - chances
    kept = (before < column([one.top_p for one in samplings])) & (
        chances >= chances[:, :1] * column([one.min_p for one in samplings])
    )
    kept[:, 0] = True  # whatever the filters say, one token is left
    return torch.where(kept, chances, 0.0), tokens


def _draw(scores: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    chances, tokens = shares(scores, [sampler.sampling for sampler in samplers])
    reached = chances.cumsum(dim=-1)
    numbers = torch.tensor([sampler.number() for sampler in samplers], device=scores.device, dtype=torch.float32)
    places = torch.searchsorted(reached, (numbers * reached[:, -1]).unsqueeze(1), right=True)
    last = (chances > 0).sum(dim=-1, keepdim=True) - 1  # rounding may point past the last token that is left
    return tokens.gather(1, places.minimum(last).clamp(min=0)).squeeze(1)  # none is left where there are no numbers


def _with_penalties(scores: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    for row, sampler in enumerate(samplers):
        if sampler.penalized and sampler.drawn:
            places = torch.tensor(list(sampler.drawn), device=scores.device)
            amounts = [sampler.penalty(times) for times in sampler.drawn.values()]
            scores[row, places] -= torch.tensor(amounts, device=scores.device, dtype=scores.dtype)
    return scores
